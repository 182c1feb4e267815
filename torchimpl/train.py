"""The training loop: AdamW under a schedule, evaluated after every epoch, taken up where it stopped.

A run is a folder: steps.csv and epochs.csv tell what happened, state.safetensors is everything that the next step
depends on (weights, optimiser, position, random numbers, the best weights so far). It is written under its name when
whole, so a run that is killed at any moment goes on from its last state with the numbers that it would have had: bit
for bit, on the same machine with the same number of threads.
"""

import csv
import dataclasses
import io
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as write_tensors
from torch import Tensor, nn
from torch.nn import functional

from refimpl import check
from torchimpl import checkpoint

FORMAT = 1
STATE, STEPS, EPOCHS = "state.safetensors", "steps.csv", "epochs.csv"

# What scales or shifts features one by one is not drawn towards zero, whatever its rank.
NOT_DECAYED = ("gamma", "beta")


class TrainError(ValueError):
    """A run that cannot be taken up, or that has left the numbers."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The rate rises linearly over the share `warmup` of all steps, then falls to the share `final`."""

    epochs: int
    batch_size: int
    learning_rate: float
    schedule: Literal["constant", "linear", "cosine"]
    warmup: float
    final: float
    weight_decay: float
    # The norm of all gradients together is cut to this.
    clip: float
    seed: int
    # Steps from one saved state to the next; the end of an epoch is saved in any case.
    save_every: int
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    # By torch.compile: the same mathematics in another order of sums.
    compiled: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "save_every"):
            check.domain("train.TrainConfig", getattr(self, name) >= 1, f"{name} >= 1", **{name: getattr(self, name)})
        for name in ("learning_rate", "clip", "epsilon"):
            check.domain("train.TrainConfig", getattr(self, name) > 0, f"{name} > 0", **{name: getattr(self, name)})
        for name in ("warmup", "final", "beta1", "beta2"):
            value = getattr(self, name)
            check.domain("train.TrainConfig", 0 <= value <= 1, f"{name} from 0 to 1", **{name: value})
        check.domain("train.TrainConfig", self.weight_decay >= 0, "weight_decay >= 0", weight_decay=self.weight_decay)
        known = ("constant", "linear", "cosine")
        check.domain("train.TrainConfig", self.schedule in known, f"one of {known}", schedule=self.schedule)


@dataclass(frozen=True)
class Task:
    """What is learnt.

    size: how many examples there are; every epoch sees each once, in an order of its own.
    loss: the mean loss of the examples of these indices. What it draws, it draws from the generator.
    evaluate: figures by name; the module is in evaluation mode, gradients are off.
    best: the figure whose largest value marks the weights to keep.
    """

    size: int
    loss: Callable[[nn.Module, Tensor, torch.Generator], Tensor]
    evaluate: Callable[[nn.Module], dict[str, float]]
    best: str


class Step(NamedTuple):
    """One update: its number from 1, the loss before it, its learning rate, the gradients' norm before the cut."""

    step: int
    epoch: int
    loss: float
    learning_rate: float
    gradient_norm: float


class Epoch(NamedTuple):
    """One epoch: its number from 1, the mean loss of its examples while they were learnt, the figures after it."""

    epoch: int
    step: int
    loss: float
    figures: dict[str, float]


class Progress(NamedTuple):
    """What a bar on a terminal shows."""

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    samples_per_second: float
    seconds_left: float


class Fitted(NamedTuple):
    """The weights of the best epoch, everything that was logged, and the seconds that it took in all its parts."""

    weights: dict[str, Tensor]
    best: Epoch
    steps: tuple[Step, ...]
    epochs: tuple[Epoch, ...]
    seconds: float


class Labelled(NamedTuple):
    """Token ids (n, length) with a class each; segments and mask where there are some."""

    token_ids: Tensor
    labels: Tensor
    segment_ids: Tensor | None = None
    mask: Tensor | None = None

    def take(self, rows: Any) -> "Labelled":
        """Some of the examples."""
        return Labelled(*(None if part is None else part[rows] for part in self))


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The rate of update `step`, counted from 0, of all `steps`."""
    warm = round(config.warmup * steps)
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    past = (step - warm) / max(steps - warm, 1)
    if config.schedule == "constant":
        return config.learning_rate
    falling = 1 - past if config.schedule == "linear" else (1 + math.cos(math.pi * past)) / 2
    return config.learning_rate * (config.final + (1 - config.final) * falling)


def order(seed: int, epoch: int, size: int) -> Tensor:
    """The order of the examples in an epoch, which depends on nothing else."""
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(size))


def fit(
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    folder: Path,
    progress: Callable[[Progress], None] | None = None,
) -> Fitted:
    """Train, or go on training what `folder` holds the state of.

    The module is left with the weights of the last step. torch's own random numbers start from the seed and are given
    back to the caller as they were. An exception, Ctrl-C among them, leaves the last saved state.

    Raises: TrainError for a loss that is not finite, and for a state of another model, task or configuration.
    """
    per_epoch = math.ceil(task.size / config.batch_size)
    total = per_epoch * config.epochs
    forward = torch.compile(model) if config.compiled else model
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        # Of what the task draws; dropout draws from torch's own generator.
        generator = torch.Generator().manual_seed(config.seed)
        parts = _Parts(model, _optimizer(model, config), generator, _origin(model, task, config))
        steps, epochs, best, spent = _restored(parts, folder / STATE)
        checkpoint.write(folder / EPOCHS, _table(_epoch_rows(epochs)))
        started, first, seconds = time.perf_counter(), len(steps), spent
        with (folder / STEPS).open("w", newline="") as file:
            log = csv.writer(file)
            log.writerows([Step._fields, *steps])
            while len(steps) < total:
                epoch, at = divmod(len(steps), per_epoch)
                rows = order(config.seed, epoch, task.size)[at * config.batch_size : (at + 1) * config.batch_size]
                rate = learning_rate(config, len(steps), total)
                number = len(steps) + 1
                loss, norm = _update(parts, task, forward, rows, rate, number, config.clip)
                steps.append(Step(number, epoch + 1, loss, rate, norm))
                log.writerow(steps[-1])
                complete = at + 1 == per_epoch
                if complete:
                    losses = [step.loss for step in steps[-per_epoch:]]
                    epochs.append(Epoch(epoch + 1, len(steps), float(np.mean(losses)), _figures(model, task)))
                    if best_epoch(epochs, task.best) is epochs[-1]:
                        best = _copied(model.state_dict())
                seconds = spent + time.perf_counter() - started
                if complete or len(steps) % config.save_every == 0:
                    file.flush()
                    _save(parts, _Past(steps, epochs, best, seconds), folder / STATE)
                if complete:
                    checkpoint.write(folder / EPOCHS, _table(_epoch_rows(epochs)))
                if progress:
                    pace = (len(steps) - first) / max(seconds - spent, 1e-9)
                    recent = float(np.mean([step.loss for step in steps[-20:]]))
                    now = (len(steps), total, epoch + 1, config.epochs, recent)
                    progress(Progress(*now, pace * config.batch_size, (total - len(steps)) / pace))
    found = best_epoch(epochs, task.best)
    if found is None:
        raise TrainError(f"train: {task.best} was never a number in {len(epochs)} epochs")
    return Fitted(best, found, tuple(steps), tuple(epochs), seconds)


def best_epoch(epochs: Sequence[Epoch], figure: str) -> Epoch | None:
    """The epoch with the largest figure, the first of equals; NaN is none."""
    ranked = [epoch for epoch in epochs if not math.isnan(epoch.figures[figure])]
    return max(ranked, key=lambda epoch: epoch.figures[figure], default=None)


def classification(
    train: Labelled,
    validation: Labelled,
    *,
    change: Callable[[Tensor, torch.Generator], Tensor] | None = None,
) -> Task:
    """Classes by cross entropy; the figures are loss and accuracy on `validation`.

    change: makes other token ids of the same classes, anew for every batch (augmentation).
    """

    def loss(model: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
        batch = train.take(rows)
        token_ids = batch.token_ids if change is None else change(batch.token_ids, generator)
        logits = model(token_ids, batch.segment_ids, batch.mask).logits
        return functional.cross_entropy(logits, batch.labels)

    def evaluate(model: nn.Module) -> dict[str, float]:
        logits = predict(model, validation).logits
        right = (logits.argmax(dim=-1) == validation.labels).double().mean()
        return {"loss": float(functional.cross_entropy(logits, validation.labels)), "accuracy": float(right)}

    return Task(len(train.labels), loss, evaluate, best="accuracy")


def predict(model: nn.Module, examples: Labelled, *, batch_size: int = 256) -> Any:
    """The model's Output on all examples, batch by batch, without gradients."""
    parts = []
    training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(examples.labels), batch_size):
            batch = examples.take(slice(start, start + batch_size))
            parts.append(model(batch.token_ids, batch.segment_ids, batch.mask))
    model.train(training)
    return type(parts[0])(*(torch.cat(leaves) for leaves in zip(*parts, strict=True)))


@dataclass(frozen=True)
class _Parts:
    """What changes in place from step to step, and what a state must have been made with to be taken up."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    origin: Mapping[str, Any]


class _Past(NamedTuple):
    """What a state tells besides: the log, the weights of the best epoch, the seconds spent."""

    steps: list[Step]
    epochs: list[Epoch]
    best: dict[str, Tensor]
    seconds: float


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    kernels: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in model.named_parameters():
        scales = parameter.ndim < 2 or name.rpartition(".")[2] in NOT_DECAYED
        (rest if scales else kernels).append(parameter)
    groups = [{"params": kernels, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=betas, eps=config.epsilon)


def _origin(model: nn.Module, task: Task, config: TrainConfig) -> dict[str, Any]:
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    return {**dataclasses.asdict(config), "examples": task.size, "best figure": task.best, "weights": shapes}


def _update(
    parts: _Parts, task: Task, forward: nn.Module, rows: Tensor, rate: float, number: int, clip: float
) -> tuple[float, float]:
    """One step of the optimiser: the loss before it, and the norm of the gradients before the cut."""
    for group in parts.optimizer.param_groups:
        group["lr"] = rate
    parts.model.train()
    parts.optimizer.zero_grad(set_to_none=True)
    loss = task.loss(forward, rows, parts.generator)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(parts.model.parameters(), clip)
    found = float(loss.detach()), float(norm)
    if not (math.isfinite(found[0]) and math.isfinite(found[1])):
        raise TrainError(
            f"train: step {number}: the loss is {found[0]}, the norm of its gradients {found[1]}; the last saved state "
            "is kept"
        )
    parts.optimizer.step()
    return found


def _figures(model: nn.Module, task: Task) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        return task.evaluate(model)


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _save(parts: _Parts, past: _Past, file: Path) -> None:
    tensors = {f"model/{name}": tensor for name, tensor in parts.model.state_dict().items()}
    for name, parameter in parts.model.named_parameters():
        for kind, tensor in parts.optimizer.state[parameter].items():
            tensors[f"optimizer/{name}/{kind}"] = tensor
    tensors |= {f"best/{name}": tensor for name, tensor in past.best.items()}
    tensors |= {"random/torch": torch.get_rng_state(), "random/task": parts.generator.get_state()}
    tensors["steps"] = torch.tensor(past.steps, dtype=torch.float64)
    told = {"format": FORMAT, "origin": parts.origin, "epochs": past.epochs, "seconds": past.seconds}
    checkpoint.write(file, write_tensors(_copied(tensors), {"state": json.dumps(told)}))


def _restored(parts: _Parts, file: Path) -> _Past:
    """Everything as it was when the state was saved; nothing yet where there is no state."""
    if not file.is_file():
        return _Past([], [], {}, 0.0)
    try:
        with safe_open(file, "pt") as held:
            told = json.loads(held.metadata()["state"])
            tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TrainError(f"train: {file} is no state of a run ({error}); remove it to begin anew") from None
    if told["format"] != FORMAT:
        raise TrainError(f"train: {file} has format {told['format']}, expected {FORMAT}; remove it to begin anew")
    differing = [key for key, value in parts.origin.items() if told["origin"].get(key) != value]
    if differing:
        raise TrainError(
            f"train: {file} is the state of another run, which differs in {', '.join(differing)}; give this run "
            "another folder, or remove the file to begin anew"
        )
    parts.model.load_state_dict(_under("model/", tensors))
    for name, parameter in parts.model.named_parameters():
        kept = _under(f"optimizer/{name}/", tensors)
        # The count of steps stays where the optimiser keeps it, on the host.
        parts.optimizer.state[parameter] = {k: t if k == "step" else t.to(parameter.device) for k, t in kept.items()}
    parts.generator.set_state(tensors["random/task"])
    torch.set_rng_state(tensors["random/torch"])
    steps = [Step(int(row[0]), int(row[1]), *row[2:]) for row in tensors["steps"].tolist()]
    return _Past(steps, [Epoch(*row) for row in told["epochs"]], _under("best/", tensors), told["seconds"])


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _epoch_rows(epochs: Sequence[Epoch]) -> list[list[Any]]:
    figures = list(epochs[0].figures) if epochs else []
    rows = [[e.epoch, e.step, e.loss, *(e.figures[name] for name in figures)] for e in epochs]
    return [["epoch", "step", "training loss", *figures], *rows]


def _table(rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()
