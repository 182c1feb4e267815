"""Multi-task training: gradients by hand, block by block; three tasks on digits of which one is scaled by 1000."""

import copy
import csv
import dataclasses
import math
import weakref
import xml.etree.ElementTree as ET
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from demo import digits
from refimpl import multitask as rules
from refimpl.check import DomainError
from refimpl.model import Model
from refimpl.models import _heads, gau_alpha
from torchimpl.training import loop, multitask, pretrain
from torchimpl.training.task import Task, Work

# Gradients on what is shared: (3, 4) and (-5, 12), of lengths 5 and 13, and their product is 33.
SHARED = {"a": (3.0, 4.0), "b": (-5.0, 12.0)}
HEADS = {"a": (6.0, -8.0, 0.0), "b": (0.0, 0.0, 2.0)}


class Branch(nn.Module):
    """Parameters that all branches hold, and some of its own."""

    def __init__(self, shared):
        super().__init__()
        self.shared, self.head = shared, nn.Parameter(torch.zeros(3))
        self.never_read = nn.Parameter(torch.zeros(2))


def linear_task(name, *, shift=0.0, scale=1.0):
    """A loss with these gradients, times the batch's factor."""

    def loss(branch, batch):
        slopes = torch.tensor(SHARED[name]), torch.tensor(HEADS[name])
        value = (branch.shared.weight[0] * slopes[0]).sum() + (branch.head * slopes[1]).sum()
        return scale * batch["factor"].mean() * value + shift

    def draw(rows, generator):
        return {"factor": torch.ones(len(rows)), "noise": torch.rand(len(rows), generator=generator)}

    return Task(7, draw, loss, lambda model: {"figure": float(model.head.sum())}, best="figure")


def toy():
    shared = nn.Linear(2, 1, bias=False)
    return {name: Branch(shared) for name in SHARED}


def entries(*names, factors=None):
    factors = [1.0] * len(names) if factors is None else factors
    return [multitask.Entry(n, {"factor": torch.tensor([f])}) for n, f in zip(names, factors, strict=True)]


def run(rule, given=None, *, conflicts=True, branches=None, shift=10.0, **scales):
    branches = toy() if branches is None else branches
    # A shift makes the losses positive, where weights are 0.
    tasks = {name: linear_task(name, shift=shift, scale=scales.get(name, 1.0)) for name in branches}
    found = multitask.backward(branches, tasks, entries("a", "b") if given is None else given,
                               weights=rule, conflicts=conflicts)  # fmt: skip
    return branches, found


def gradients(branches):
    shared = branches["a"].shared.weight.grad
    return shared[0].tolist(), [None if b.head.grad is None else b.head.grad.tolist() for b in branches.values()]


@pytest.mark.parametrize("conflicts", [True, False])
@pytest.mark.parametrize(
    ("rule", "weights", "head_weights"),
    [
        (partial(rules.fixed, weights=np.array([2.0, 0.5])), [2, 0.5], [2, 0.5]),
        (partial(rules.reference_loss, reference=np.array([4.0, 5.0])), [0.25, 0.2], [0.25, 0.2]),
        # The losses are 10 and 10 where the weights are 0.
        (rules.detached_loss, [0.1, 0.1], [0.1, 0.1]),
        # On a head there is one task: its mean is its loss.
        (partial(rules.generalised_mean, p=0.0), [0.5, 0.5], [1, 1]),
        (rules.gradient_normalised, [1 / 5, 1 / 13], [1 / 10, 1 / 2]),
        # (25 - 33) / (25 - 66 + 169) < 0: the first alone.
        (rules.pareto, [1, 0], [1, 1]),
        (rules.pareto_normalised, [1 / 10, 1 / 26], [1 / 10, 1 / 2]),
    ],
    ids=lambda value: getattr(getattr(value, "func", value), "__name__", ""),
)
def test_gradients_by_hand(rule, weights, head_weights, conflicts):
    branches, found = run(rule, conflicts=conflicts, branches=zeroed())
    assert found.weights == pytest.approx(weights, rel=1e-12)
    assert found.norms.tolist() == [5, 13]
    assert found.losses.tolist() == [10, 10]
    shared, heads = gradients(branches)
    assert shared == pytest.approx(np.array(weights) @ np.array(list(SHARED.values())), rel=1e-6)
    for weight, head, slopes in zip(head_weights, heads, HEADS.values(), strict=True):
        assert head == pytest.approx(weight * np.array(slopes), rel=1e-6)
    if conflicts:
        assert found.cosines == pytest.approx(np.array([[1, 33 / 65], [33 / 65, 1]]), abs=1e-15)
    else:
        assert found.cosines is None


def zeroed():
    branches = toy()
    nn.init.zeros_(branches["a"].shared.weight)
    return branches


def test_a_task_may_come_twice_and_another_not_at_all():
    # The released way: the mean of the gradients of all entries, each of one task.
    mean = partial(rules.fixed, weights=np.array([1 / 3, 1 / 3]))
    branches, found = run(mean, entries("b", "b", "b", factors=[1.0, 2.0, 6.0]))
    assert gradients(branches) == ([pytest.approx(-15), pytest.approx(36)], [None, pytest.approx([0, 0, 6])])
    assert found.tasks.tolist() == [1, 1, 1]
    assert found.norms == pytest.approx([13, 26, 78])
    # Each entry is normalised on its own, on the head too.
    branches, _ = run(rules.gradient_normalised, entries("a", "b", "a", factors=[4.0, 1.0, 0.5]))
    assert gradients(branches)[0] == pytest.approx([6 / 5 - 5 / 13, 8 / 5 + 12 / 13], rel=1e-6)
    assert gradients(branches)[1] == [pytest.approx([1.2, -1.6, 0]), pytest.approx([0, 0, 1])]


def test_gradients_are_added_and_absent_ones_stay_away():
    branches = toy()
    branches["a"].shared.weight.grad = torch.tensor([[100.0, 0.0]])
    run(partial(rules.fixed, weights=np.ones(2)), entries("a"), branches=branches)
    assert gradients(branches) == ([103, 4], [[6, -8, 0], None])
    assert branches["a"].never_read.grad is None


def test_what_is_frozen_is_left_out():
    branches = toy()
    branches["b"].head.requires_grad_(False)
    run(rules.gradient_normalised, branches=branches)
    assert gradients(branches)[0] == pytest.approx([3 / 5 - 5 / 13, 4 / 5 + 12 / 13])
    assert gradients(branches)[1] == [pytest.approx([0.6, -0.8, 0]), None]
    branches["a"].shared.requires_grad_(False)
    with pytest.raises(DomainError, match="parameters that all tasks share"):
        run(rules.gradient_normalised, branches=branches)


def test_what_only_some_tasks_share_is_a_block_of_its_own():
    branches = {**toy(), "c": None}
    branches["c"] = Branch(branches["a"].shared)
    branches["c"].head = branches["b"].head
    tasks = {"a": linear_task("a"), "b": linear_task("b"), "c": linear_task("b", scale=3.0)}
    multitask.backward(branches, tasks, entries("a", "b", "c"), weights=rules.pareto, conflicts=True)
    # Of b and c the shorter; a has a head to itself.
    assert branches["b"].head.grad.tolist() == [0, 0, 2]
    assert branches["a"].head.grad.tolist() == [6, -8, 0]


def test_a_head_learns_though_it_hands_no_gradient_on():
    # As behind a kernel that starts at 0.
    branches = zeroed()
    tasks = {"a": linear_task("a"), "b": linear_task("b")}
    silent = dataclasses.replace(tasks["b"], loss=lambda branch, batch: (branch.head * torch.tensor([0, 3.0, 4])).sum())
    found = multitask.backward(
        branches, {**tasks, "b": silent}, entries("a", "b"), weights=rules.gradient_normalised, conflicts=True
    )
    assert found.weights.tolist() == [0.2, 0.0] and found.norms.tolist() == [5, 0]
    assert found.cosines.tolist() == [[pytest.approx(1), 0], [0, 0]]
    assert gradients(branches)[0] == pytest.approx([0.6, 0.8])
    assert gradients(branches)[1] == [pytest.approx([0.6, -0.8, 0]), pytest.approx([0, 0.6, 0.8])]


def test_opposite_gradients_leave_the_encoder_where_it_is():
    branches, _ = run(rules.pareto, entries("a", "a", factors=[1.0, -3.0]))
    assert gradients(branches)[0] == pytest.approx([0, 0], abs=1e-6)


def test_tiny_gradients_are_normalised_in_float64():
    # 1 / |g| = 1e39 is more than float32 holds; so is |g|^2 less.
    branches, found = run(rules.gradient_normalised, b=1e-39 / 13, a=1e30)
    assert found.norms[1] == pytest.approx(1e-39, rel=1e-4)
    assert gradients(branches)[0] == pytest.approx([3 / 5 - 5 / 13, 4 / 5 + 12 / 13], rel=1e-4)


@pytest.mark.parametrize("rule", [rules.gradient_normalised, partial(rules.fixed, weights=np.array([0.3, 0.7]))])
def test_one_gradient_at_a_time_is_held_and_the_numbers_are_the_same(monkeypatch, rule):
    alive, most, real = [], [], torch.autograd.grad

    def grad(*arguments, **options):
        most.append(sum(reference() is not None for reference in alive))
        made = real(*arguments, **options)
        alive.extend(weakref.ref(tensor) for tensor in made if tensor is not None)
        return made

    monkeypatch.setattr(torch.autograd, "grad", grad)
    names, factors = ("a", "b", "a", "b"), [0.3, 0.7, 1.1, 0.9]
    streamed, told = run(rule, entries(*names, factors=factors), conflicts=False)
    assert most == [0, 0, 0, 0]
    stacked, also = run(rule, entries(*names, factors=factors), branches=toy())
    assert most[4:] == [0, 2, 4, 6]
    assert gradients(streamed) == gradients(stacked)
    assert told.norms.tolist() == also.norms.tolist() and told.weights.tolist() == also.weights.tolist()


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (lambda branch, batch: branch.shared.weight.sum() * math.nan, "a finite loss of task b, received loss=nan"),
        (lambda branch, batch: branch.shared.weight.sum() * math.inf, "a finite loss of task b"),
        (lambda branch, batch: (branch.shared.weight * 0).sum().sqrt(), "a finite gradient of task b"),
        (lambda branch, batch: torch.zeros(()), "a loss of task b that parameters reach"),
    ],
)
@pytest.mark.parametrize("conflicts", [True, False])
def test_a_loss_that_is_no_number_is_refused_by_name(broken, named, conflicts):
    tasks = {"a": linear_task("a"), "b": dataclasses.replace(linear_task("b"), loss=broken)}
    with pytest.raises(DomainError, match=named):
        multitask.backward(
            toy(), tasks, entries("a", "b"), weights=rules.gradient_normalised, conflicts=conflicts
        )  # fmt: skip


def test_what_backward_refuses():
    tasks = {"a": linear_task("a"), "b": linear_task("b")}
    call = partial(multitask.backward, weights=rules.pareto, conflicts=True)
    with pytest.raises(DomainError, match="at least one entry"):
        call(toy(), tasks, [])
    with pytest.raises(DomainError, match="a task among a, b, received task='c'"):
        call(toy(), tasks, entries("c"))
    with pytest.raises(DomainError, match="branches and tasks of the same names"):
        call(toy(), {"b": tasks["b"], "a": tasks["a"]}, entries("a"))
    with pytest.raises(DomainError, match="parameters that all tasks share"):
        call({"a": toy()["a"], "b": toy()["b"]}, tasks, entries("a"))


# Who is drawn.


def test_tasks_are_drawn_by_their_frequencies():
    count, frequencies = 20_000, (60.0, 2.0, 0.0, 5.0, 4.0)
    numbers = multitask.drawn(count, torch.Generator().manual_seed(0), frequencies=frequencies)
    found = np.bincount(numbers.numpy(), minlength=5)
    shares = np.array(frequencies) / 71
    assert (abs(found - count * shares) <= 4 * np.sqrt(count * shares * (1 - shares))).all()
    assert found[2] == 0
    with pytest.raises(DomainError, match="not all 0"):
        multitask.drawn(3, torch.Generator(), frequencies=(0.0, 0.0))
    with pytest.raises(DomainError, match="frequencies >= 0"):
        multitask.drawn(3, torch.Generator(), frequencies=(1.0, -1.0))


def test_every_task_comes_once_for_each_example():
    assert multitask.every(2, torch.Generator(), tasks=3).tolist() == [0, 1, 2, 0, 1, 2]


def test_a_mixture_draws_rows_of_each_task():
    tasks = {"a": linear_task("a"), "b": dataclasses.replace(linear_task("b"), size=3)}
    made = mixed(tasks, batch_size=500)
    batch = made.draw(torch.arange(2), torch.Generator().manual_seed(1))
    assert batch["task"].tolist() == [0, 1, 0, 1]
    assert [sorted(set(rows.tolist())) for rows in batch["rows"]] == [list(range(7)), list(range(3))] * 2
    again = made.draw(torch.arange(2), torch.Generator().manual_seed(1))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert len(set(batch["seed"].tolist())) == 4


def test_every_entry_draws_random_numbers_of_its_own():
    seen = []

    def loss(branch, batch):
        seen.append(batch["noise"].tolist())
        return branch.shared.weight.sum()

    made = mixed({name: dataclasses.replace(linear_task(name), loss=loss) for name in SHARED})
    network = nn.Linear(1, 1)
    network.branches = toy()
    batch = made.draw(torch.arange(2), torch.Generator().manual_seed(1))
    made.loss(network, batch)
    made.loss(network, batch)
    assert seen[:4] == seen[4:]
    assert len(set(map(tuple, seen))) == 4


def test_what_tasks_keep_is_kept_by_the_mixture():
    kept = torch.zeros(3)
    other = dataclasses.replace(linear_task("b"), memory={"seen": kept}, origin={"sha256": "f00"})
    made = mixed({"a": linear_task("a"), "b": other}, weights=partial(rules.fixed, weights=np.ones(2)))
    assert made.memory["b/seen"] is kept
    assert made.origin == {
        "tasks": {"a": [7, {}], "b": [7, {"sha256": "f00"}]},
        "rows": 2,
        "weights": ["fixed", {"weights": [1.0, 1.0]}],
        "choose": ["every", {"tasks": 2}],
    }


def test_losses_alone_are_cast():
    inside, seen = [], []

    @contextmanager
    def casting():
        inside.append(True)
        yield
        inside.clear()

    def loss(branch, batch):
        seen.append(bool(inside))
        value = (branch.shared.weight * 2).sum()
        value.register_hook(lambda gradient: seen.append(bool(inside)))
        return value

    tasks = {name: dataclasses.replace(linear_task(name), loss=loss) for name in SHARED}
    multitask.backward(toy(), tasks, entries("a"), weights=rules.pareto, conflicts=True, casting=casting)
    assert seen == [True, False]


def mixed(tasks, **changes):
    options = {"choose": partial(multitask.every, tasks=len(tasks)), "steps": 4, "batch_size": 2,
               "weights": rules.gradient_normalised, "conflicts": True, "score": len, **changes}  # fmt: skip
    return multitask.mixture(tasks, **options)


def test_what_a_mixture_refuses():
    tasks = {"a": linear_task("a"), "b": linear_task("b")}
    with pytest.raises(DomainError, match="sizes of at least 1"):
        mixed(tasks, steps=0)
    with pytest.raises(DomainError, match="without a backward of their own"):
        mixed({**tasks, "b": dataclasses.replace(tasks["b"], backward=lambda work: None)})
    with pytest.raises(DomainError, match=r"tasks 0 to 1, received chosen=\[0, 1, 2\]"):
        mixed(tasks, choose=partial(multitask.every, tasks=3)).draw(torch.arange(1), torch.Generator())
    with pytest.raises(DomainError, match="a MultiTask with the branches a, b"):
        mixed(tasks).evaluate(toy()["a"])


# What is told.


def test_figures_by_hand():
    cosines = np.array([[1, 0.5, 0.1], [0.5, 1, 0.3], [0.1, 0.3, 1]])
    found = multitask.Measured(
        np.array([0, 2, 0]), np.array([1.0, 5.0, 2.0]), np.array([3.0, 7.0, 4.0]), np.array([0.25, 1.0, 0.5]), cosines
    )
    told = multitask.figures(found, ("a", "b", "c"))
    expected = {
        "loss/a": 1.5, "loss/b": math.nan, "loss/c": 5, "norm/a": 3.5, "norm/b": math.nan, "norm/c": 7,
        "weight/a": 0.75, "weight/b": math.nan, "weight/c": 1,
        "cosine/a/b": math.nan, "cosine/a/c": pytest.approx(0.4), "cosine/b/c": math.nan,
    }  # fmt: skip
    assert list(told) == list(expected)
    for name, value in expected.items():
        assert told[name] == value or (math.isnan(told[name]) and math.isnan(value))
    assert math.isnan(multitask.figures(found._replace(cosines=None), ("a", "b", "c"))["cosine/a/c"])


def test_the_plot_is_a_picture_of_every_curve(monkeypatch):
    names, drawn, real = ("a", "b", "c"), {}, multitask._curve

    def curve(axes, values, label, colour):
        drawn[axes.get_title(loc="left"), label] = values
        real(axes, values, label, colour)

    monkeypatch.setattr(multitask, "_curve", curve)
    columns = [f"{kind}/{name}" for kind in ("loss", "norm") for name in names]
    columns += ["cosine/a/b", "cosine/a/c", "cosine/b/c"]
    rng = np.random.default_rng(0)
    rows = [dict(zip(columns, rng.uniform(0.1, 1, len(columns)), strict=True)) for _ in range(40)]
    for row in rows:
        row["loss/a"] = math.nan
    picture = multitask.plot(rows, names)
    assert ET.fromstring(picture).tag.endswith("svg")
    assert [label for _, label in drawn] == [*names, *names, "a, b", "a, c", "b, c"]
    assert [values for (_, label), values in drawn.items()][-1] == [row["cosine/b/c"] for row in rows]
    # The same rows give the same bytes.
    assert "dc:date" not in picture
    # Before the first step.
    assert ET.fromstring(multitask.plot([], names)).tag.endswith("svg")


# Three tasks on digits.

CONFIG = gau_alpha.dialect("bert4keras-0.11.5", vocab_size=18, segments=8, hidden_size=16, layers=2, expanded_size=32,
                           key_size=8)  # fmt: skip
SIZES = {"row": 8, "column": 8, "digit": 10}


def specification(name):
    head = _heads.SequenceClassifier(labels=SIZES[name], pooling="mean_of_tokens")
    return Model(CONFIG, (head,), "bidirectional")


def model(dtype=torch.float32):
    specs = {name: specification(name) for name in SIZES}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return multitask.MultiTask(specs, hidden_dropout=0.0, attention_dropout=0.0).to(dtype)


@pytest.fixture(scope="module")
def tasks():
    """The row and the column with the most ink, and the digit."""
    found = digits.load()

    def labelled(images, name, most):
        images = digits.Images(*(array[:most] for array in images))
        ink = images.token_ids.reshape(-1, 8, 8)
        labels = {"row": ink.sum(axis=2).argmax(axis=1), "column": ink.sum(axis=1).argmax(axis=1),
                  "digit": images.labels}[name]  # fmt: skip
        parts = (images.token_ids, labels, images.segment_ids)
        return loop.Labelled(*(torch.from_numpy(np.asarray(part)) for part in parts))

    return {
        name: loop.classification(labelled(found.train, name, 1000), labelled(found.validation, name, 40))
        for name in SIZES
    }


def trained(tasks, rule, *, steps=6, dtype=torch.float32, change=None, conflicts=False):
    """Stochastic gradients with momentum: unlike Adam's, the steps are as long as the gradients are."""
    if change:
        own = tasks["column"]
        tasks = {**tasks, "column": dataclasses.replace(own, loss=lambda m, b: change(own.loss(m, b)))}
    network = model(dtype)
    task = mixed(tasks, batch_size=16, weights=rule, conflicts=conflicts)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = task.draw(torch.arange(1), generator)
        drawn = [
            multitask.Entry(name, tasks[name].draw(rows, generator))
            for name, rows in zip(tasks, batch["rows"], strict=True)
        ]
        optimizer.zero_grad()
        multitask.backward(network.branches, tasks, drawn, weights=rule, conflicts=conflicts)
        optimizer.step()
    return network.state_dict()


def apart(one, other):
    """The largest difference of a weight, beside the largest of its kind; encoder and heads apart."""
    return {
        part: max(
            float((one[name] - other[name]).abs().max() / one[name].abs().max())
            for name in one
            if name.startswith(part)
        )
        for part in ("encoder", "heads")
    }


def test_normalised_gradients_are_unmoved_by_a_loss_times_1000(tasks):
    def loss(branch, batch):
        # That of loop.classification is formed in float32.
        return functional.cross_entropy(branch(batch["token_ids"], batch["segment_ids"])["logits"], batch["labels"])

    tasks = {name: dataclasses.replace(task, loss=loss) for name, task in tasks.items()}
    before, start = trained(tasks, rules.gradient_normalised, dtype=torch.float64), model(torch.float64).state_dict()
    after = trained(tasks, rules.gradient_normalised, dtype=torch.float64, change=lambda loss: 1000 * loss)
    # It has learnt, and 1000 is not a power of two: rounding is all that is left.
    assert min(apart(start, before).values()) > 0.1
    assert max(apart(before, after).values()) < 1e-11


@pytest.mark.parametrize("change", [lambda loss: 1024 * loss, lambda loss: loss + 7], ids=["times 1024", "plus 7"])
@pytest.mark.parametrize("conflicts", [False, True])
def test_where_nothing_rounds_they_are_the_same_bit_for_bit(tasks, change, conflicts):
    before = trained(tasks, rules.gradient_normalised, conflicts=conflicts)
    after = trained(tasks, rules.gradient_normalised, conflicts=conflicts, change=change)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("rule", "change", "moved"),
    [
        (partial(rules.fixed, weights=np.ones(3)), lambda loss: 2 * loss, True),
        (rules.pareto, lambda loss: 4 * loss, True),
        (rules.pareto_normalised, lambda loss: 1024 * loss, False),
        (rules.detached_loss, lambda loss: 1024 * loss, False),
        (rules.detached_loss, lambda loss: loss + 7, True),
    ],
)
def test_which_rules_are_moved(tasks, rule, change, moved):
    found = apart(trained(tasks, rule, steps=3), trained(tasks, rule, steps=3, change=change))
    assert found["encoder"] > 1e-3 if moved else max(found.values()) == 0


def test_a_multitask_model_holds_its_encoder_once():
    network = model()
    names = set(network.state_dict())
    assert {name.partition(".")[0] for name in names} == {"encoder", "heads"}
    assert {name.split(".")[1] for name in names if name.startswith("heads")} == set(SIZES)
    assert len(list(network.parameters())) == len(names)
    assert all(branch.encoder is network.encoder for branch in network.branches.values())
    logits = network.branches["digit"](torch.zeros(2, 64, dtype=torch.int64))["logits"]
    assert logits.shape == (2, 10)
    copied = copy.deepcopy(network)
    assert copied.branches["row"].encoder is copied.encoder and copied.encoder is not network.encoder


def test_branches_go_into_evaluation_with_the_model():
    network = model()
    network.eval()
    assert not any(branch.training for branch in network.branches.values())
    network.train()
    assert all(branch.training for branch in network.branches.values())


def test_what_a_multitask_model_refuses():
    head = (_heads.SequenceClassifier(labels=2, pooling="mean_of_tokens"),)
    one, other = Model(CONFIG, head, "bidirectional"), Model(dataclasses.replace(CONFIG, layers=1), head, "causal")
    with pytest.raises(DomainError, match="models of one Config"):
        multitask.MultiTask({"a": one, "b": other})
    with pytest.raises(DomainError, match="names of tasks without a dot, received name='a.b'"):
        multitask.MultiTask({"a.b": one})
    with pytest.raises(DomainError, match="at least one task"):
        multitask.MultiTask({})


FIT = loop.TrainConfig(
    epochs=2, batch_size=2, learning_rate=0.003, schedule="constant", warmup=0.0, final=1.0, weight_decay=0.01,
    clip=1.0, seed=0, save_every=2,
)  # fmt: skip


def mixture_with_mlm(tasks, folder):
    """Two classifiers and a masked language model of the pixels, one of the three at a time."""
    found = digits.load()
    parts = [pretrain.corpus(torch.from_numpy(part.token_ids[:100])) for part in (found.train, found.validation)]
    own = {
        "row": tasks["row"],
        "digit": tasks["digit"],
        "mlm": pretrain.masked_lm(*parts, pretrain.Masking(17, 18)),
    }
    specs = {
        "row": specification("row"),
        "digit": specification("digit"),
        "mlm": Model(CONFIG, (_heads.TiedLM(),), "bidirectional"),
    }
    log = multitask.Log(folder, tuple(own))
    choose = partial(multitask.drawn, frequencies=(1, 2, 3))
    mean = partial(rules.fixed, weights=np.full(3, 1 / 2))
    task = multitask.mixture(
        own, choose=choose, steps=6, batch_size=8, weights=mean, conflicts=True, journal=log,
        score=lambda figures: figures["digit/accuracy"] - figures["mlm/loss"],
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return multitask.MultiTask(specs), task, log


class Stopped(BaseException):
    """As KeyboardInterrupt, which pytest would take for itself."""


def test_a_mixture_with_a_language_model_is_fitted_and_goes_on_bit_for_bit(tasks, tmp_path):
    found = []
    for folder, stops in ((tmp_path / "whole", []), (tmp_path / "stopped", [1, 5])):
        for stop in [*stops, None]:

            def progress(now, stop=stop):
                if now.step == stop:
                    raise Stopped

            network, task, log = mixture_with_mlm(tasks, folder)
            if stop is not None:
                with pytest.raises(Stopped):
                    loop.fit(network, task, FIT, folder, progress, journals=(log,))
                with log.path.open("a") as file:
                    file.write("9,0.3")
        fitted = loop.fit(network, task, FIT, folder, journals=(log,))
        found.append((fitted, network.state_dict(), log.path.read_text(), log.rows()))
    (whole, weights, text, rows), (again, same, also, _) = found
    assert whole.steps == again.steps and whole.epochs == again.epochs
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert text == also
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    # Two entries a step: the loss of the step is the mean of theirs.
    pairs = [[row[f"loss/{n}"] for n in ("row", "digit", "mlm") if not math.isnan(row[f"loss/{n}"])] for row in rows]
    assert [step.loss for step in whole.steps] == pytest.approx([np.mean(pair) for pair in pairs], rel=1e-6)
    assert any(len(pair) == 2 for pair in pairs)
    figures = whole.epochs[0].figures
    assert figures["score"] == figures["digit/accuracy"] - figures["mlm/loss"]
    with (tmp_path / "whole" / "multitask.csv").open(newline="") as file:
        assert next(csv.reader(file))[:4] == ["step", "loss/row", "loss/digit", "loss/mlm"]


def test_the_loss_of_a_mixture_is_the_mean_of_its_entries(tasks):
    made, network = mixed(tasks, batch_size=3), model()
    batch = made.draw(torch.arange(1), torch.Generator().manual_seed(0))
    each = [
        tasks[name].loss(network.branches[name], tasks[name].draw(rows, torch.Generator()))
        for name, rows in zip(tasks, batch["rows"], strict=True)
    ]
    assert float(made.loss(network, batch).detach()) == pytest.approx(float(sum(each).detach()) / 3, rel=1e-6)


def test_a_mixture_neither_compiled_nor_spread(tasks):
    made, network = mixed(tasks), model()
    batch = made.draw(torch.arange(1), torch.Generator())
    work = Work(made, network, nn.Sequential(network), ((batch, 1.0),), lambda index: nullcontext(), nullcontext)
    with pytest.raises(DomainError, match="one process and compiled=False, received forward='Sequential'"):
        made.backward(work)
    assert math.isfinite(made.backward(dataclasses.replace(work, forward=network)))
