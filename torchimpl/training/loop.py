"""The training loop: an optimiser under a schedule, evaluations on the way, taken up where it stopped.

A run is a folder: steps.csv and epochs.csv tell what happened, state.safetensors is everything that the next step
depends on (weights, optimiser, position, random numbers, the best weights so far). It is written under its name when
whole, so a run that is killed at any moment goes on from its last state with the numbers that it would have had: bit
for bit, on the same machine with the same number of threads.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from refimpl import check
from torchimpl import layers
from torchimpl.training import distributed, optim
from torchimpl.training.run import STATE, Epoch, Journal, Parts, Past, Step, Tables, TrainError, copied, restored, save
from torchimpl.training.schedule import SCHEDULES, learning_rate, order, residual_scale
from torchimpl.training.task import Batch, Task, Work, backward, divide, tokens

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The rate rises linearly over the share `warmup` of all steps, then falls to the share `final`."""

    epochs: int
    # Examples of one update, in all processes and micro-batches together.
    batch_size: int
    learning_rate: float
    schedule: Literal["constant", "linear", "cosine"]
    warmup: float
    final: float
    weight_decay: float
    # The norm of all gradients together is cut to this; None cuts nothing.
    clip: float | None
    seed: int
    # Steps from one saved state to the next; every evaluation is saved in any case.
    save_every: int
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    # By torch.compile: the same mathematics in another order of sums.
    compiled: bool = False
    # torchimpl/training/optim.py; bias_correction is LAMB's.
    optimizer: Literal["adamw", "adafactor", "lamb"] = "adamw"
    bias_correction: bool = True
    # Micro-batches of an update. The loss stays the mean over the whole batch.
    accumulate: int = 1
    # Of the forward pass, by torch.autocast; weights, gradients and optimiser stay float32.
    precision: Literal["float32", "bfloat16"] = "float32"
    # Layers are computed again in the backward pass instead of kept: less memory, the same numbers.
    recompute: bool = False
    # The share of all steps over which residual branches grow from 0 to 1.
    residual_warmup: float = 0.0
    # Updates at most; 0 for those of all epochs. The schedule ends with them.
    max_steps: int = 0
    # Steps from one evaluation to the next; 0 for the ends of epochs.
    evaluate_every: int = 0
    # Evaluations without a better figure after which the run ends; 0 for never.
    patience: int = 0
    # How several processes share the work: torchimpl/training/distributed.py.
    parallel: Literal["ddp", "fsdp"] = "ddp"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "save_every", "accumulate"):
            self._check(name, getattr(self, name) >= 1, ">= 1")
        for name in ("learning_rate", "epsilon"):
            self._check(name, getattr(self, name) > 0, "> 0")
        for name in ("warmup", "final", "beta1", "beta2", "residual_warmup"):
            self._check(name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        for name in ("weight_decay", "max_steps", "evaluate_every", "patience"):
            self._check(name, getattr(self, name) >= 0, ">= 0")
        self._check("clip", self.clip is None or self.clip > 0, "> 0 or None")
        known = {
            "schedule": SCHEDULES, "optimizer": optim.OPTIMIZERS, "precision": PRECISIONS,
            "parallel": distributed.PARALLEL,
        }  # fmt: skip
        for name, values in known.items():
            self._check(name, getattr(self, name) in values, f"one of {values}")
        fits = not (self.compiled and self.residual_warmup)
        self._check("residual_warmup", fits, "0 with compiled=True: its scale is no part of what is compiled")
        fits = not (self.parallel == "fsdp" and self.optimizer == "adafactor")
        self._check("optimizer", fits, "adamw or lamb with parallel='fsdp': Adafactor's factors do not follow shards")

    def _check(self, name: str, fits: bool, expected: str) -> None:
        check.domain("train.TrainConfig", fits, f"{name} {expected}", **{name: getattr(self, name)})

    def steps(self, size: int) -> int:
        """How many updates `size` examples make, unless the run ends early."""
        every = math.ceil(size / self.batch_size) * self.epochs
        return min(every, self.max_steps) if self.max_steps else every


class Progress(NamedTuple):
    """What a bar on a terminal shows."""

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    samples_per_second: float
    seconds_left: float
    tokens_per_second: float


class Fitted(NamedTuple):
    """The weights of the best epoch, everything that was logged, and the seconds that it took in all its parts.

    Of several processes the first alone has the weights.
    """

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


def fit(
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    folder: Path,
    progress: Callable[[Progress], None] | None = None,
    journals: Sequence[Journal] = (),
    optimizer: Callable[[nn.Module, TrainConfig], torch.optim.Optimizer] = optim.build,
    device: torch.device | None = None,
) -> Fitted:
    """Train, or go on training what `folder` holds the state of.

    The module is left with the weights of the last step. torch's own random numbers start from the seed and are given
    back to the caller as they were. An exception, Ctrl-C among them, leaves the last saved state. Where a group of
    processes has been joined, all of them call this alike.

    journals: who keeps a log besides the tables. optimizer: makes another one than the configuration names. device: to
        which the module is brought, as a whole or in shards; its own where None.
    Raises: TrainError for a loss that is not finite, and for a state of another model, task or configuration.
    """
    device = next(model.parameters()).device if device is None else device
    place, per_epoch = distributed.place(), math.ceil(task.size / config.batch_size)
    total = config.steps(task.size)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed + place.rank)
        generator = torch.Generator().manual_seed(config.seed)
        origin = _origin(model, task, config)
        spreading = distributed.spread(model, config.parallel, device)
        forward = torch.compile(spreading) if config.compiled else spreading
        parts = Parts(model, optimizer(model, config), generator, task.memory, device, origin)
        steps, epochs, best, spent = restored(parts, folder / STATE)
        logs: list[Journal] = [Tables(folder), *journals] if place.first else []
        started, first, seconds, seen = time.perf_counter(), len(steps), spent, 0
        scale = torch.ones((), device=device)
        with _kept(logs, steps, epochs), _layers(model, config, scale):
            while len(steps) < total and not _exhausted(epochs, task, config):
                epoch, at = divmod(len(steps), per_epoch)
                if at == 0 or len(steps) == first:
                    shuffled = order(config.seed, epoch, task.size)
                batch = task.draw(shuffled[at * config.batch_size : (at + 1) * config.batch_size], generator)
                seen += tokens(batch)
                scale.fill_(residual_scale(config.residual_warmup, len(steps), total))
                rate, number = learning_rate(config, len(steps), total), len(steps) + 1
                pieces = divide(task, batch, config.batch_size, config.accumulate, device)
                meeting = partial(_meeting, spreading, len(pieces))
                work = Work(task, model, forward, pieces, meeting, _casting(config, device))
                loss, norm = _update(parts, work, rate, number, config.clip)
                steps.append(Step(number, epoch + 1, loss, rate, norm))
                for log in logs:
                    log.step(steps[-1])
                evaluating = _evaluates(config, number, per_epoch, total)
                if evaluating:
                    since = epochs[-1].step if epochs else 0
                    mean = float(np.mean([step.loss for step in steps[since:]]))
                    epochs.append(Epoch(epoch + 1, number, mean, _figures(model, task, device)))
                    if best_epoch(epochs, task.best, smallest=task.smallest) is epochs[-1]:
                        best = copied(model.state_dict())
                seconds = spent + time.perf_counter() - started
                if evaluating or number % config.save_every == 0:
                    for log in logs:
                        log.flush()
                    save(parts, Past(steps, epochs, best, seconds), folder / STATE)
                if evaluating:
                    for log in logs:
                        log.evaluated(steps, epochs)
                if progress:
                    pace = (number - first) / max(seconds - spent, 1e-9)
                    recent = float(np.mean([step.loss for step in steps[-20:]]))
                    now = (number, total, epoch + 1, config.epochs, recent)
                    left = 0.0 if _exhausted(epochs, task, config) else (total - number) / pace
                    flow = seen / max(seconds - spent, 1e-9)
                    progress(Progress(*now, pace * config.batch_size, left, flow))
    found = best_epoch(epochs, task.best, smallest=task.smallest)
    if found is None:
        raise TrainError(f"train: {task.best} was never a number in {len(epochs)} epochs")
    return Fitted(best, found, tuple(steps), tuple(epochs), seconds)


def best_epoch(epochs: Sequence[Epoch], figure: str, *, smallest: bool = False) -> Epoch | None:
    """The epoch with the largest (smallest) figure, the first of equals; NaN is none."""
    ranked = [epoch for epoch in epochs if not math.isnan(epoch.figures[figure])]
    return max(ranked, key=lambda epoch: epoch.figures[figure] * (-1 if smallest else 1), default=None)


def classification(
    train: Labelled,
    validation: Labelled,
    *,
    change: Callable[[Tensor, torch.Generator], Tensor] | None = None,
) -> Task:
    """Classes by cross entropy of the output logits, which the head SequenceClassifier gives.

    The figures are loss and accuracy on `validation`.

    change: makes other token ids of the same classes, anew for every batch (augmentation).
    """

    def draw(rows: Tensor, generator: torch.Generator) -> Batch:
        batch = train.take(rows)
        token_ids = batch.token_ids if change is None else change(batch.token_ids, generator)
        drawn = batch._replace(token_ids=token_ids)._asdict()
        return {name: tensor for name, tensor in drawn.items() if tensor is not None}

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch["token_ids"], batch.get("segment_ids"), batch.get("mask"))["logits"]
        return functional.cross_entropy(logits.float(), batch["labels"])

    def evaluate(model: nn.Module) -> dict[str, float]:
        logits = predict(model, validation, outputs=("logits",))["logits"]
        right = (logits.argmax(dim=-1) == validation.labels).double().mean()
        return {"loss": float(functional.cross_entropy(logits, validation.labels)), "accuracy": float(right)}

    return Task(len(train.labels), draw, loss, evaluate, best="accuracy")


def predict(
    model: nn.Module, examples: Labelled, *, batch_size: int = 256, outputs: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """The model's outputs by name on all examples, batch by batch, without gradients, on the host.

    outputs: those to keep; all of them where None. The vectors and spans of all tokens can be large.
    Raises: TrainError for an output that the model does not give.
    """
    parts: list[dict[str, Tensor]] = []
    training, device = model.training, next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        for start in range(0, len(examples.labels), batch_size):
            batch = examples.take(slice(start, start + batch_size))
            inputs = (batch.token_ids, batch.segment_ids, batch.mask)
            given = model(*(None if part is None else part.to(device) for part in inputs))
            kept = tuple(given) if outputs is None else outputs
            absent = [name for name in kept if name not in given]
            if absent:
                raise TrainError(f"train: the model gives {', '.join(given)}; it does not give {', '.join(absent)}")
            parts.append({name: given[name].cpu() for name in kept})
    model.train(training)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _origin(model: nn.Module, task: Task, config: TrainConfig) -> dict[str, Any]:
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    told = {"examples": task.size, "best figure": task.best, "processes": distributed.place().processes}
    return {**dataclasses.asdict(config), **told, **task.origin, "weights": shapes}


def _update(parts: Parts, work: Work, rate: float, number: int, clip: float | None) -> tuple[float, float]:
    """One step of the optimiser: the loss before it, and the norm of the gradients before the cut."""
    for group in parts.optimizer.param_groups:
        group["lr"] = rate
    parts.model.train()
    parts.optimizer.zero_grad(set_to_none=True)
    loss = distributed.total((work.task.backward or backward)(work))
    norm = distributed.whole(nn.utils.clip_grad_norm_(parts.model.parameters(), math.inf if clip is None else clip))
    found = float(loss.detach()), float(norm)
    if not (math.isfinite(found[0]) and math.isfinite(found[1])):
        raise TrainError(
            f"train: step {number}: the loss is {found[0]}, the norm of its gradients {found[1]}; the last saved state "
            "is kept"
        )
    parts.optimizer.step()
    return found


def _meeting(spreading: nn.Module, pieces: int, index: int) -> AbstractContextManager[Any]:
    """Gradients of all processes meet in the last piece."""
    return nullcontext() if index + 1 == pieces else distributed.unsynchronised(spreading)


def _casting(config: TrainConfig, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    casts = config.precision == "bfloat16"
    return partial(torch.autocast, device.type, torch.bfloat16) if casts else nullcontext


def _evaluates(config: TrainConfig, number: int, per_epoch: int, total: int) -> bool:
    return number == total or number % (config.evaluate_every or per_epoch) == 0


def _exhausted(epochs: Sequence[Epoch], task: Task, config: TrainConfig) -> bool:
    """Whether the last evaluations brought nothing better."""
    best = best_epoch(epochs, task.best, smallest=task.smallest)
    since = len(epochs) if best is None else len(epochs) - 1 - epochs.index(best)
    return bool(config.patience) and since >= config.patience


def _figures(model: nn.Module, task: Task, device: torch.device) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        return distributed.from_first(task.evaluate(model), device)


@contextmanager
def _kept(logs: Sequence[Journal], steps: Sequence[Step], epochs: Sequence[Epoch]) -> Iterator[None]:
    begun: list[Journal] = []
    try:
        for log in logs:
            begun.append(log)
            log.begin(steps, epochs)
        yield
    finally:
        for log in begun:
            log.close()


@contextmanager
def _layers(model: nn.Module, config: TrainConfig, scale: Tensor) -> Iterator[None]:
    found = layers.layers(model)
    with (
        layers.grown(found, scale) if config.residual_warmup else nullcontext(),
        layers.recomputed(found) if config.recompute else nullcontext(),
    ):
        yield
