"""The training loop: literal schedules and first steps, and runs that were stopped go on bit for bit."""

import csv
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from refimpl.check import DomainError
from torchimpl.training import loop, run, schedule

CONFIG = loop.TrainConfig(
    epochs=3, batch_size=5, learning_rate=0.01, schedule="cosine", warmup=0.2, final=0.1, weight_decay=0.1, clip=1.0,
    seed=7, save_every=2,
)  # fmt: skip
# 13 examples in batches of 5: three steps an epoch, the last of 3 examples.
X = torch.from_numpy(np.random.default_rng(0).normal(size=(13, 4)).astype(np.float32))


def network() -> nn.Module:
    """Dropout draws from torch's own generator, so that its state must be kept too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 7), nn.Dropout(0.3), nn.Tanh(), nn.Linear(7, 1))


def task() -> loop.Task:
    def draw(rows, generator):
        return {"x": X[rows], "noise": torch.randn(len(rows), 4, generator=generator)}

    def loss(model, batch):
        return (model(batch["x"] + 0.1 * batch["noise"]) - batch["x"].sum(dim=1, keepdim=True)).square().mean()

    def evaluate(model):
        return {"score": -float((model(X) - X.sum(dim=1, keepdim=True)).square().mean())}

    return loop.Task(len(X), draw, loss, evaluate, best="score")


class Stopped(BaseException):
    """As KeyboardInterrupt, which pytest would take for itself."""


def stop_at(step):
    def progress(now):
        if now.step == step:
            raise Stopped

    return progress


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped, and the module that it leaves."""
    model = network()
    return loop.fit(model, task(), CONFIG, tmp_path_factory.mktemp("whole")), model.state_dict()


def assert_same(done, model, whole):
    fitted, last = whole
    assert done.steps == fitted.steps
    assert done.epochs == fitted.epochs
    assert done.best == fitted.best
    for name, tensor in fitted.weights.items():
        assert torch.equal(done.weights[name], tensor)
    for name, tensor in last.items():
        assert torch.equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize("stops", [[1], [2], [3], [4], [8], [9], [2, 3, 5], [1, 1, 7]])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, whole, stops):
    for step in stops:
        with pytest.raises(Stopped):
            loop.fit(network(), task(), CONFIG, tmp_path, stop_at(step))
    model = network()
    assert_same(loop.fit(model, task(), CONFIG, tmp_path), model, whole)


@pytest.mark.parametrize("name", [run.STATE, run.EPOCHS])
@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize("time", [2, 3])
def test_a_run_stopped_while_it_saves_goes_on_bit_for_bit(tmp_path, whole, monkeypatch, name, moment, time):
    real, seen = getattr(os, moment), []

    def stopping(*arguments):
        seen.append(any(part.name.startswith(f".{name}.") for part in tmp_path.iterdir()))
        if sum(seen) == time:
            raise Stopped
        return real(*arguments)

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(os, moment, stopping)
        loop.fit(network(), task(), CONFIG, tmp_path)
    assert not [part for part in tmp_path.iterdir() if part.name.startswith(".")]
    model = network()
    assert_same(loop.fit(model, task(), CONFIG, tmp_path), model, whole)


def test_a_finished_run_is_read_back(tmp_path, whole):
    loop.fit(network(), task(), CONFIG, tmp_path)
    model = network()
    assert_same(loop.fit(model, task(), CONFIG, tmp_path, stop_at(9)), model, whole)


def test_the_logs_tell_every_step_once(tmp_path, whole):
    fitted, _ = whole
    with pytest.raises(Stopped):
        loop.fit(network(), task(), CONFIG, tmp_path, stop_at(5))
    loop.fit(network(), task(), CONFIG, tmp_path)
    with (tmp_path / run.STEPS).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 10))
    assert [float(row["loss"]) for row in rows] == [step.loss for step in fitted.steps]
    with (tmp_path / run.EPOCHS).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "3"), ("2", "6"), ("3", "9")]
    assert [float(row["score"]) for row in rows] == [epoch.figures["score"] for epoch in fitted.epochs]


@pytest.mark.parametrize("change", [
    {"optimizer": "adafactor", "learning_rate": 0.1},
    {"optimizer": "lamb", "accumulate": 2, "clip": None},
    {"precision": "bfloat16", "evaluate_every": 2, "schedule": "linear"},
])  # fmt: skip
def test_every_kind_of_run_goes_on_bit_for_bit(tmp_path, change):
    config, model, again = replace(CONFIG, **change), network(), network()
    fitted = loop.fit(model, task(), config, tmp_path / "whole")
    with pytest.raises(Stopped):
        loop.fit(network(), task(), config, tmp_path / "stopped", stop_at(5))
    assert_same(loop.fit(again, task(), config, tmp_path / "stopped"), again, (fitted, model.state_dict()))
    assert fitted.steps[-1].loss != fitted.steps[0].loss


@pytest.mark.parametrize(("change", "named"), [
    ({"seed": 8}, r"seed \(7 then, 8 now\)"), ({"clip": None}, "clip"), ({"optimizer": "lamb"}, "optimizer"),
])  # fmt: skip
def test_the_state_of_another_run_is_refused(tmp_path, change, named):
    with pytest.raises(Stopped):
        loop.fit(network(), task(), CONFIG, tmp_path, stop_at(2))
    with pytest.raises(loop.TrainError, match=f"another run, which differs in {named}"):
        loop.fit(network(), task(), replace(CONFIG, **change), tmp_path)
    with pytest.raises(loop.TrainError, match="differs in weights"):
        loop.fit(nn.Linear(4, 1), task(), CONFIG, tmp_path)


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_damaged_state_is_refused(tmp_path, data):
    (tmp_path / run.STATE).write_bytes(data)
    with pytest.raises(loop.TrainError, match="is no state of a run"):
        loop.fit(network(), task(), CONFIG, tmp_path)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    broken = replace(task(), loss=lambda model, batch: model(batch["x"]).mean() * float("nan"))
    with pytest.raises(loop.TrainError, match="step 1: the loss is nan"):
        loop.fit(network(), broken, CONFIG, tmp_path)
    assert not (tmp_path / run.STATE).exists()


def test_the_first_update_by_hand(tmp_path):
    # AdamW's first step has length lr in every direction; only matrices are drawn to 0: 1 - 0.1 · 0.5 - 0.1.
    model = nn.Linear(1, 1)
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)
    model.gamma = nn.Parameter(torch.ones(4, 2))
    simple = loop.Task(
        2, lambda rows, g: {"x": torch.ones(2, 1)}, lambda m, batch: m(batch["x"]).mean() + m.gamma.sum(),
        lambda m: {"s": 0.0}, "s",
    )  # fmt: skip
    config = loop.TrainConfig(
        epochs=1, batch_size=2, learning_rate=0.1, schedule="constant", warmup=0.0, final=1.0, weight_decay=0.5,
        clip=1.0, seed=0, save_every=1,
    )  # fmt: skip
    fitted = loop.fit(model, simple, config, tmp_path)
    assert model.weight.item() == pytest.approx(0.85, abs=1e-6)
    assert model.bias.item() == pytest.approx(0.9, abs=1e-6)
    assert model.gamma.detach().numpy() == pytest.approx(0.9, abs=1e-6)
    # Ten gradients of 1, cut to a common norm of 1.
    assert fitted.steps[0] == (1, 1, pytest.approx(10.0), 0.1, pytest.approx(math.sqrt(10)))
    assert model.weight.grad.item() == pytest.approx(1 / math.sqrt(10), abs=1e-6)


def test_the_batches_follow_the_order_of_their_epoch(tmp_path):
    seen, real = [], task().draw

    def draw(rows, generator):
        seen.append(rows.tolist())
        return real(rows, generator)

    loop.fit(network(), replace(task(), draw=draw), CONFIG, tmp_path)
    assert [len(rows) for rows in seen] == [5, 5, 3] * 3
    for epoch in range(3):
        assert sum(seen[3 * epoch : 3 * epoch + 3], []) == schedule.order(7, epoch, 13).tolist()


def test_the_first_of_the_best_epochs_is_kept(tmp_path):
    scores = iter([float("nan"), 0.5, 0.5, 0.2])
    kept = []

    def evaluate(model):
        kept.append(model[0].weight.clone())
        return {"score": next(scores)}

    fitted = loop.fit(network(), replace(task(), evaluate=evaluate), replace(CONFIG, epochs=4), tmp_path)
    assert fitted.best.epoch == 2
    assert torch.equal(fitted.weights["0.weight"], kept[1])
    assert not torch.equal(kept[1], kept[2])


def test_a_figure_that_was_never_a_number_is_an_error(tmp_path):
    blind = replace(task(), evaluate=lambda model: {"score": float("nan")})
    with pytest.raises(loop.TrainError, match="score was never a number in 3 epochs"):
        loop.fit(network(), blind, CONFIG, tmp_path)


def test_progress_and_the_random_numbers_of_others(tmp_path):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    told = []
    fitted = loop.fit(network(), task(), CONFIG, tmp_path, told.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert [(now.step, now.steps, now.epoch, now.epochs) for now in told][-1] == (9, 9, 3, 3)
    assert told[1].loss == pytest.approx(np.mean([step.loss for step in fitted.steps[:2]]))
    assert told[-1].seconds_left == 0
    assert all(now.samples_per_second > 0 for now in told)


@pytest.mark.parametrize(
    "change", [{"epochs": 0}, {"learning_rate": 0.0}, {"warmup": 1.5}, {"weight_decay": -1.0}, {"schedule": "step"}]
)
def test_a_configuration_is_checked(change):
    with pytest.raises(DomainError, match=f"train.TrainConfig: .*{next(iter(change))}"):
        replace(CONFIG, **change)


class Counting(nn.Module):
    """Two classes by a linear map of the sum of the real ids."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 2)

    def forward(self, token_ids, segment_ids, mask):
        return {"logits": self.line((token_ids * mask).sum(dim=1, keepdim=True).float())}


def test_classification_learns_what_can_be_learnt(tmp_path):
    drawn = np.random.default_rng(0)
    ids = torch.from_numpy(drawn.integers(0, 10, (200, 5)))
    mask = torch.from_numpy(drawn.random((200, 5)) < 0.8)
    labels = ((ids * mask).sum(dim=1) > 18).long()
    examples = loop.Labelled(ids, labels, mask=mask)
    parts = examples.take(slice(0, 150)), examples.take(slice(150, 200))
    seen = []

    def change(token_ids, generator):
        seen.append(token_ids.shape)
        return token_ids + torch.randint(0, 2, token_ids.shape, generator=generator)

    config = replace(CONFIG, epochs=30, batch_size=25, learning_rate=0.3, weight_decay=0.0)
    fitted = loop.fit(Counting(), loop.classification(*parts, change=change), config, tmp_path)
    assert set(seen) == {(25, 5)}
    assert fitted.best.figures["accuracy"] >= 0.9
    assert fitted.epochs[-1].figures["loss"] < fitted.epochs[0].figures["loss"]


def test_the_state_is_plain_numbers(tmp_path):
    loop.fit(network(), task(), CONFIG, tmp_path)
    with safe_open(tmp_path / run.STATE, "pt") as held:
        names = set(held.keys())
    assert {"steps", "random/torch/0", "random/task", "model/0.weight", "best/0.weight"} <= names
    assert "optimizer/0.weight/exp_avg" in names


def counted(size=12):
    """Numbers with weights of their own: an example counts as often as its weight says."""
    x = torch.arange(1.0, size + 1)[:, None]
    weight = torch.arange(size) % 4

    def draw(rows, generator):
        return {"x": x[rows], "weight": weight[rows]}

    def loss(model, batch):
        errors = (model(batch["x"]) - 1).square()[:, 0]
        return (errors * batch["weight"]).sum() / max(int(batch["weight"].sum()), 1)

    return loop.Task(size, draw, loss, lambda m: {"s": 0.0}, "s", count=lambda batch: int(batch["weight"].sum()))


@pytest.mark.parametrize("accumulate", [2, 3, 12])
def test_micro_batches_have_the_gradient_of_the_whole_batch(tmp_path, accumulate):
    """By hand: the mean over all that counts, not the mean of the micro-batches' means; some count nothing."""
    config = replace(CONFIG, batch_size=12, epochs=1, accumulate=accumulate, clip=None)
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.5)
    sizes = []
    model.register_forward_hook(lambda module, given, output: sizes.append(len(output)))
    step = loop.fit(model, counted(), config, tmp_path).steps[0]
    assert sizes == [12 // accumulate] * accumulate
    x, weight = np.arange(1.0, 13), np.arange(12) % 4
    assert step.loss == pytest.approx((weight * (0.5 * x - 1) ** 2).sum() / weight.sum(), rel=1e-6)
    assert step.gradient_norm == pytest.approx(abs((weight * 2 * (0.5 * x - 1) * x).sum()) / weight.sum(), rel=1e-6)


def test_a_batch_that_counts_nothing_moves_nothing(tmp_path):
    model = nn.Linear(1, 1, bias=False)
    before = model.weight.item()
    empty = replace(counted(), draw=lambda rows, generator: {"x": torch.ones(len(rows), 1), "weight": rows * 0})
    fitted = loop.fit(model, empty, replace(CONFIG, accumulate=2, weight_decay=0.0), tmp_path)
    assert {step.loss for step in fitted.steps} == {0.0}
    assert model.weight.item() == before


def test_the_forward_pass_in_bfloat16(tmp_path):
    seen = set()
    model = network()
    model[0].register_forward_hook(lambda module, given, output: seen.add((module.training, output.dtype)))
    fitted = loop.fit(model, task(), replace(CONFIG, epochs=20, precision="bfloat16"), tmp_path)
    # Evaluations are in float32.
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    assert {tensor.dtype for tensor in fitted.weights.values()} == {torch.float32}
    assert model[0].weight.grad.dtype == torch.float32
    assert fitted.epochs[-1].figures["score"] > fitted.epochs[0].figures["score"] / 2


def scored(*scores):
    """A task whose evaluations give these."""
    left = iter(scores)
    return replace(task(), evaluate=lambda model: {"score": next(left)})


def test_a_run_ends_when_nothing_gets_better(tmp_path):
    config = replace(CONFIG, epochs=9, patience=2)
    fitted = loop.fit(network(), scored(0.1, 0.4, 0.4, 0.3, 0.9), config, tmp_path)
    assert [epoch.epoch for epoch in fitted.epochs] == [1, 2, 3, 4]
    assert fitted.best.epoch == 2
    # Taken up, it has ended: no evaluation is asked for.
    assert loop.fit(network(), scored(), config, tmp_path).best == fitted.best


def test_the_smallest_figure_can_be_the_best(tmp_path):
    fitted = loop.fit(network(), replace(scored(0.3, 0.1, 0.1), smallest=True), CONFIG, tmp_path)
    assert fitted.best.epoch == 2
    ended = replace(scored(0.1, 0.3), smallest=True)
    assert len(loop.fit(network(), ended, replace(CONFIG, patience=1), tmp_path / "b").epochs) == 2


def test_evaluations_by_steps_and_the_last(tmp_path):
    fitted = loop.fit(network(), task(), replace(CONFIG, evaluate_every=4), tmp_path)
    assert [(epoch.epoch, epoch.step) for epoch in fitted.epochs] == [(2, 4), (3, 8), (3, 9)]
    losses = [step.loss for step in fitted.steps]
    assert fitted.epochs[1].loss == pytest.approx(np.mean(losses[4:8]))


def test_the_schedule_ends_with_the_last_of_so_many_steps(tmp_path):
    config = replace(CONFIG, max_steps=5, warmup=0.0, final=0.0, schedule="linear")
    fitted = loop.fit(network(), task(), config, tmp_path)
    assert [step.learning_rate for step in fitted.steps] == pytest.approx([0.01, 0.008, 0.006, 0.004, 0.002])
    assert [epoch.step for epoch in fitted.epochs] == [3, 5]


def test_a_task_can_own_its_gradients_and_remember(tmp_path):
    """Gradients of ones, and a count that a stopped run takes up."""

    def own():
        memory = {"updates": torch.zeros((), dtype=torch.int64)}

        def backward(work):
            assert work.task is made and sum(share for _, share in work.pieces) == pytest.approx(1)
            loss = loop.backward(work)
            for parameter in work.model.parameters():
                parameter.grad.fill_(1)
            memory["updates"] += 1
            return loss

        made = replace(task(), backward=backward, memory=memory)
        return made

    config = replace(CONFIG, accumulate=2, save_every=1)
    with pytest.raises(Stopped):
        loop.fit(network(), own(), config, tmp_path, stop_at(3))
    last = own()
    fitted = loop.fit(network(), last, config, tmp_path)
    weights = sum(parameter.numel() for parameter in network().parameters())
    assert {round(step.gradient_norm**2, 3) for step in fitted.steps} == {weights}
    assert int(last.memory["updates"]) == len(fitted.steps) == 9


def test_the_state_of_other_data_is_refused(tmp_path):
    loop.fit(network(), replace(task(), origin={"data": "a"}), CONFIG, tmp_path)
    with pytest.raises(loop.TrainError, match=r"differs in data \('a' then, 'b' now\)"):
        loop.fit(network(), replace(task(), origin={"data": "b"}), CONFIG, tmp_path)
    with pytest.raises(loop.TrainError, match="differs in data"):
        loop.fit(network(), task(), CONFIG, tmp_path)


def test_journals_are_told_everything_once(tmp_path):
    calls = []

    class Journal:
        def __getattr__(self, name):
            return lambda *given: calls.append((name, *map(len, given[:1]))) if name != "step" else calls.append(given)

    with pytest.raises(Stopped):
        loop.fit(network(), task(), replace(CONFIG, save_every=1), tmp_path, stop_at(2), [Journal()])
    assert [call for call in calls if call[0] in ("begin", "close")] == [("begin", 0), ("close",)]
    del calls[:]
    fitted = loop.fit(network(), task(), replace(CONFIG, save_every=1), tmp_path, None, [Journal()])
    assert calls[0] == ("begin", 2) and calls[-1] == ("close",)
    assert [call[0] for call in calls if isinstance(call[0], loop.Step)] == list(fitted.steps[2:])
    assert [call for call in calls if call[0] == "evaluated"] == [("evaluated", 3), ("evaluated", 6), ("evaluated", 9)]


@pytest.mark.parametrize("change", [
    {"accumulate": 0}, {"optimizer": "sgd"}, {"precision": "float16"}, {"patience": -1}, {"parallel": "zero"},
    {"residual_warmup": 2.0}, {"residual_warmup": 0.5, "compiled": True},
    {"optimizer": "adafactor", "parallel": "fsdp"},
])  # fmt: skip
def test_a_configuration_that_cannot_be_is_refused(change):
    with pytest.raises(DomainError, match=f"train.TrainConfig: .*{next(iter(change))}"):
        replace(CONFIG, **change)


def test_what_a_model_lacks_is_said_before_it_is_trained(tmp_path):
    for change in ({"recompute": True}, {"residual_warmup": 0.5}):
        with pytest.raises(DomainError, match="layers"):
            loop.fit(network(), task(), replace(CONFIG, **change), tmp_path)
    assert not (tmp_path / run.STATE).exists()
