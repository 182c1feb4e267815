"""A run as a folder: what the next step depends on, in one file, and the tables that people read.

state.safetensors holds the weights, the optimiser, the position, every random number's state and the best weights so
far. It appears under its name when whole; a run that is killed at any moment goes on from its last state.
"""

import csv
import io
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from torchimpl import checkpoint
from torchimpl.training import distributed

FORMAT = 2
STATE, STEPS, EPOCHS, PLOT = "state.safetensors", "steps.csv", "epochs.csv", "loss.svg"


class TrainError(ValueError):
    """A run that cannot be taken up, or that has left the numbers."""


class Step(NamedTuple):
    """One update: its number from 1, the loss before it, its learning rate, the gradients' norm before the cut."""

    step: int
    epoch: int
    loss: float
    learning_rate: float
    gradient_norm: float


class Epoch(NamedTuple):
    """One evaluation: epoch and step from 1, the mean loss of the steps since the last one, the figures.

    There is one at the end of every epoch, unless a configuration asks for others.
    """

    epoch: int
    step: int
    loss: float
    figures: dict[str, float]


class Journal(Protocol):
    """Somebody who keeps a log of a run."""

    def begin(self, steps: Sequence[Step], epochs: Sequence[Epoch]) -> None:
        """What had happened before, where a run is taken up."""

    def step(self, step: Step) -> None:
        """One more update."""

    def evaluated(self, steps: Sequence[Step], epochs: Sequence[Epoch]) -> None:
        """One more evaluation: all of them, the last one new."""

    def flush(self) -> None:
        """A state is about to be saved."""

    def close(self) -> None:
        """The run has ended, or was stopped."""


class Tables:
    """steps.csv and epochs.csv."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, steps: Sequence[Step], epochs: Sequence[Epoch]) -> None:
        self._epochs(epochs)
        self._file = (self.folder / STEPS).open("w", newline="")
        self._table = csv.writer(self._file)
        self._table.writerows([Step._fields, *steps])

    def step(self, step: Step) -> None:
        self._table.writerow(step)

    def evaluated(self, steps: Sequence[Step], epochs: Sequence[Epoch]) -> None:
        self._epochs(epochs)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _epochs(self, epochs: Sequence[Epoch]) -> None:
        figures = list(epochs[0].figures) if epochs else []
        rows: list[list[Any]] = [[e.epoch, e.step, e.loss, *(e.figures[name] for name in figures)] for e in epochs]
        text = io.StringIO(newline="")
        csv.writer(text).writerows([["epoch", "step", "training loss", *figures], *rows])
        checkpoint.write(self.folder / EPOCHS, text.getvalue().encode())


@dataclass(frozen=True)
class Parts:
    """What changes in place from step to step, and what a state must have been made with to be taken up."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    # Of what the task draws; dropout draws from torch's own.
    generator: torch.Generator
    memory: Mapping[str, Tensor]
    device: torch.device
    origin: Mapping[str, Any]


class Past(NamedTuple):
    """What a state tells besides: the log, the weights of the best epoch, the seconds spent."""

    steps: list[Step]
    epochs: list[Epoch]
    best: dict[str, Tensor]
    seconds: float


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the host, whole; nothing in processes other than the first."""
    made = {}
    for name, tensor in tensors.items():
        full = distributed.whole(tensor)
        if distributed.place().first:
            made[name] = full.detach().cpu().contiguous().clone()
    return made


def save(parts: Parts, past: Past, file: Path) -> None:
    """Write the state; every process takes part, the first one writes."""
    tensors = {f"model/{name}": tensor for name, tensor in parts.model.state_dict().items()}
    for name, parameter in parts.model.named_parameters():
        for kind, tensor in parts.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{name}/{kind}"] = tensor
    tensors |= {f"task/{name}": tensor for name, tensor in parts.memory.items()}
    for kind, state in _random(parts).items():
        for rank, drawn in enumerate(distributed.from_all(state, parts.device)):
            tensors[f"random/{kind}/{rank}"] = drawn
    held = copied(tensors)
    if distributed.place().first:
        held |= {f"best/{name}": tensor for name, tensor in past.best.items()}
        held["random/task"] = parts.generator.get_state()
        held["steps"] = torch.tensor(past.steps, dtype=torch.float64)
        # JSON knows no NaN; a figure that is none is null.
        epochs = [[*e[:3], {k: None if math.isnan(v) else v for k, v in e.figures.items()}] for e in past.epochs]
        told = {"format": FORMAT, "origin": parts.origin, "epochs": epochs, "seconds": past.seconds}
        _write(file, held, {"state": json.dumps(told)})


def restored(parts: Parts, file: Path) -> Past:
    """Everything as it was when the state was saved; nothing yet where there is no state.

    What a killed process had begun to write is removed.
    Raises: TrainError for a file that is no state, and for that of another run.
    """
    if distributed.place().first:
        for name in (file.name, EPOCHS, PLOT):
            for part in file.parent.glob(f".{name}.*"):
                part.unlink()
    if not file.is_file():
        return Past([], [], {}, 0.0)
    try:
        with safe_open(file, "pt") as held:
            told = json.loads(held.metadata()["state"])
            form, origin = told["format"], told["origin"]
            tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TrainError(f"train: {file} is no state of a run ({error}); remove it to begin anew") from None
    if form != FORMAT:
        raise TrainError(f"train: {file} has format {form}, expected {FORMAT}; remove it to begin anew")
    if differing := [name for name in {**parts.origin, **origin} if parts.origin.get(name) != origin.get(name)]:
        raise TrainError(
            f"train: {file} is the state of another run, which differs in {_told(differing, origin, parts.origin)}; "
            "give this run another folder, or remove the file to begin anew"
        )
    weights = under("model/", tensors)
    for name, tensor in parts.model.state_dict().items():
        distributed.put(tensor, weights[name])
    for name, parameter in parts.model.named_parameters():
        for kind, tensor in under(f"optimizer/{name}/", tensors).items():
            # The count of steps stays where the optimisers keep it, on the host.
            parts.optimizer.state[parameter][kind] = (
                tensor if kind == "step" else distributed.as_held(tensor, parameter)
            )
    for name, tensor in parts.memory.items():
        distributed.put(tensor, tensors[f"task/{name}"])
    parts.generator.set_state(tensors["random/task"])
    rank = distributed.place().rank
    torch.set_rng_state(tensors[f"random/torch/{rank}"])
    if parts.device.type == "cuda":
        torch.cuda.set_rng_state(tensors[f"random/cuda/{rank}"], parts.device)
    steps = [Step(int(row[0]), int(row[1]), *row[2:]) for row in tensors["steps"].tolist()]
    epochs = [
        Epoch(epoch, step, loss, {name: math.nan if value is None else value for name, value in figures.items()})
        for epoch, step, loss, figures in told["epochs"]
    ]
    return Past(steps, epochs, under("best/", tensors), told["seconds"])


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by what follows it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _random(parts: Parts) -> dict[str, Tensor]:
    states = {"torch": torch.get_rng_state()}
    if parts.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(parts.device)
    return states


def _told(differing: Sequence[str], then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Names, with both values where these are short."""
    short = (bool, int, float, str)
    return ", ".join(
        f"{name} ({then[name]!r} then, {now[name]!r} now)"
        if isinstance(then.get(name), short) and isinstance(now.get(name), short)
        else name
        for name in differing
    )


def _write(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """As checkpoint.write, without a second copy of the tensors in memory."""
    handle, part = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    os.close(handle)
    try:
        save_file(dict(tensors), part, dict(metadata))
        with open(part, "rb+") as written:
            os.fsync(written.fileno())
        os.chmod(part, 0o644)
        os.replace(part, file)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
