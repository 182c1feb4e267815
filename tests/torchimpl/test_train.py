"""The training loop: literal schedules and first steps, and runs that were stopped go on bit for bit."""

import csv
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from refimpl.check import DomainError
from torchimpl import train

CONFIG = train.TrainConfig(
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


def task() -> train.Task:
    def loss(model, rows, generator):
        noise = torch.randn(len(rows), 4, generator=generator)
        return (model(X[rows] + 0.1 * noise) - X[rows].sum(dim=1, keepdim=True)).square().mean()

    def evaluate(model):
        return {"score": -float((model(X) - X.sum(dim=1, keepdim=True)).square().mean())}

    return train.Task(len(X), loss, evaluate, best="score")


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
    return train.fit(model, task(), CONFIG, tmp_path_factory.mktemp("whole")), model.state_dict()


def assert_same(run, model, whole):
    fitted, last = whole
    assert run.steps == fitted.steps
    assert run.epochs == fitted.epochs
    assert run.best == fitted.best
    for name, tensor in fitted.weights.items():
        assert torch.equal(run.weights[name], tensor)
    for name, tensor in last.items():
        assert torch.equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize("stops", [[1], [2], [3], [4], [8], [9], [2, 3, 5], [1, 1, 7]])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, whole, stops):
    for step in stops:
        with pytest.raises(Stopped):
            train.fit(network(), task(), CONFIG, tmp_path, stop_at(step))
    model = network()
    assert_same(train.fit(model, task(), CONFIG, tmp_path), model, whole)


@pytest.mark.parametrize("name", [train.STATE, train.EPOCHS])
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
        train.fit(network(), task(), CONFIG, tmp_path)
    assert not [part for part in tmp_path.iterdir() if part.name.startswith(".")]
    model = network()
    assert_same(train.fit(model, task(), CONFIG, tmp_path), model, whole)


def test_a_killed_process_is_taken_up(tmp_path, whole):
    script = (
        "import os, sys; from pathlib import Path; from tests.torchimpl import test_train as t\n"
        "def stop(now):\n    if now.step == 5: os._exit(9)\n"
        "t.train.fit(t.network(), t.task(), t.CONFIG, Path(sys.argv[1]), stop)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=root)
    assert done.returncode == 9
    model = network()
    assert_same(train.fit(model, task(), CONFIG, tmp_path), model, whole)


def test_a_finished_run_is_read_back(tmp_path, whole):
    train.fit(network(), task(), CONFIG, tmp_path)
    model = network()
    assert_same(train.fit(model, task(), CONFIG, tmp_path, stop_at(9)), model, whole)


def test_the_logs_tell_every_step_once(tmp_path, whole):
    fitted, _ = whole
    with pytest.raises(Stopped):
        train.fit(network(), task(), CONFIG, tmp_path, stop_at(5))
    train.fit(network(), task(), CONFIG, tmp_path)
    with (tmp_path / train.STEPS).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 10))
    assert [float(row["loss"]) for row in rows] == [step.loss for step in fitted.steps]
    with (tmp_path / train.EPOCHS).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "3"), ("2", "6"), ("3", "9")]
    assert [float(row["score"]) for row in rows] == [epoch.figures["score"] for epoch in fitted.epochs]


@pytest.mark.parametrize(("change", "named"), [({"seed": 8}, "seed"), ({"epochs": 4}, "epochs")])
def test_the_state_of_another_run_is_refused(tmp_path, change, named):
    with pytest.raises(Stopped):
        train.fit(network(), task(), CONFIG, tmp_path, stop_at(2))
    with pytest.raises(train.TrainError, match=f"another run, which differs in {named}"):
        train.fit(network(), task(), replace(CONFIG, **change), tmp_path)
    with pytest.raises(train.TrainError, match="differs in weights"):
        train.fit(nn.Linear(4, 1), task(), CONFIG, tmp_path)


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_damaged_state_is_refused(tmp_path, data):
    (tmp_path / train.STATE).write_bytes(data)
    with pytest.raises(train.TrainError, match="is no state of a run"):
        train.fit(network(), task(), CONFIG, tmp_path)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    broken = replace(task(), loss=lambda model, rows, generator: model(X[rows]).mean() * float("nan"))
    with pytest.raises(train.TrainError, match="step 1: the loss is nan"):
        train.fit(network(), broken, CONFIG, tmp_path)
    assert not (tmp_path / train.STATE).exists()


def test_the_first_update_by_hand(tmp_path):
    # AdamW's first step has length lr in every direction; only matrices are drawn to 0: 1 - 0.1 · 0.5 - 0.1.
    model = nn.Linear(1, 1)
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)
    model.gamma = nn.Parameter(torch.ones(4, 2))
    simple = train.Task(2, lambda m, rows, g: m(torch.ones(2, 1)).mean() + m.gamma.sum(), lambda m: {"s": 0.0}, "s")
    config = train.TrainConfig(
        epochs=1, batch_size=2, learning_rate=0.1, schedule="constant", warmup=0.0, final=1.0, weight_decay=0.5,
        clip=1.0, seed=0, save_every=1,
    )  # fmt: skip
    fitted = train.fit(model, simple, config, tmp_path)
    assert model.weight.item() == pytest.approx(0.85, abs=1e-6)
    assert model.bias.item() == pytest.approx(0.9, abs=1e-6)
    assert model.gamma.detach().numpy() == pytest.approx(0.9, abs=1e-6)
    # Ten gradients of 1, cut to a common norm of 1.
    assert fitted.steps[0] == (1, 1, pytest.approx(10.0), 0.1, pytest.approx(math.sqrt(10)))
    assert model.weight.grad.item() == pytest.approx(1 / math.sqrt(10), abs=1e-6)


def test_schedules_by_hand():
    config = replace(CONFIG, learning_rate=1.0, warmup=0.2, final=0.1)
    rates = [train.learning_rate(config, step, 10) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.55)
    assert train.learning_rate(replace(config, schedule="linear"), 6, 10) == pytest.approx(0.55)
    assert train.learning_rate(replace(config, schedule="linear"), 4, 10) == pytest.approx(0.775)
    assert train.learning_rate(config, 4, 10) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert train.learning_rate(replace(config, schedule="constant"), 9, 10) == 1.0
    assert train.learning_rate(replace(config, warmup=0.0), 0, 10) == 1.0


def test_every_epoch_sees_every_example_in_an_order_of_its_own():
    orders = [train.order(3, epoch, 11).tolist() for epoch in range(4)]
    assert all(sorted(made) == list(range(11)) for made in orders)
    assert len({tuple(made) for made in orders}) == 4
    assert train.order(3, 2, 11).tolist() == orders[2]
    assert train.order(4, 2, 11).tolist() != orders[2]


def test_the_batches_follow_the_order_of_their_epoch(tmp_path):
    seen, real = [], task().loss

    def loss(model, rows, generator):
        seen.append(rows.tolist())
        return real(model, rows, generator)

    train.fit(network(), replace(task(), loss=loss), CONFIG, tmp_path)
    assert [len(rows) for rows in seen] == [5, 5, 3] * 3
    for epoch in range(3):
        assert sum(seen[3 * epoch : 3 * epoch + 3], []) == train.order(7, epoch, 13).tolist()


def test_the_first_of_the_best_epochs_is_kept(tmp_path):
    scores = iter([float("nan"), 0.5, 0.5, 0.2])
    kept = []

    def evaluate(model):
        kept.append(model[0].weight.clone())
        return {"score": next(scores)}

    fitted = train.fit(network(), replace(task(), evaluate=evaluate), replace(CONFIG, epochs=4), tmp_path)
    assert fitted.best.epoch == 2
    assert torch.equal(fitted.weights["0.weight"], kept[1])
    assert not torch.equal(kept[1], kept[2])


def test_a_figure_that_was_never_a_number_is_an_error(tmp_path):
    blind = replace(task(), evaluate=lambda model: {"score": float("nan")})
    with pytest.raises(train.TrainError, match="score was never a number in 3 epochs"):
        train.fit(network(), blind, CONFIG, tmp_path)


def test_progress_and_the_random_numbers_of_others(tmp_path):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    told = []
    fitted = train.fit(network(), task(), CONFIG, tmp_path, told.append)
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


class Output(NamedTuple):
    logits: torch.Tensor


class Counting(nn.Module):
    """Two classes by a linear map of the sum of the real ids."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 2)

    def forward(self, token_ids, segment_ids, mask):
        return Output(self.line((token_ids * mask).sum(dim=1, keepdim=True).float()))


def test_classification_learns_what_can_be_learnt(tmp_path):
    drawn = np.random.default_rng(0)
    ids = torch.from_numpy(drawn.integers(0, 10, (200, 5)))
    mask = torch.from_numpy(drawn.random((200, 5)) < 0.8)
    labels = ((ids * mask).sum(dim=1) > 18).long()
    examples = train.Labelled(ids, labels, mask=mask)
    parts = examples.take(slice(0, 150)), examples.take(slice(150, 200))
    seen = []

    def change(token_ids, generator):
        seen.append(token_ids.shape)
        return token_ids + torch.randint(0, 2, token_ids.shape, generator=generator)

    config = replace(CONFIG, epochs=30, batch_size=25, learning_rate=0.3, weight_decay=0.0)
    fitted = train.fit(Counting(), train.classification(*parts, change=change), config, tmp_path)
    assert set(seen) == {(25, 5)}
    assert fitted.best.figures["accuracy"] >= 0.9
    assert fitted.epochs[-1].figures["loss"] < fitted.epochs[0].figures["loss"]


def test_the_state_is_plain_numbers(tmp_path):
    train.fit(network(), task(), CONFIG, tmp_path)
    with safe_open(tmp_path / train.STATE, "pt") as held:
        names = set(held.keys())
    assert {"steps", "random/torch", "random/task", "model/0.weight", "best/0.weight"} <= names
    assert "optimizer/0.weight/exp_avg" in names
