"""What a model learns, and how one update of it is made of pieces: processes and micro-batches."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchimpl.training import distributed

# Tensors by name, their first axis the examples.
Batch = dict[str, Tensor]
# Some of a batch, and its share in the mean over the whole batch of all processes.
Piece = tuple[Batch, float]


@dataclass(frozen=True)
class Task:
    """What is learnt.

    size: how many examples there are; every epoch sees each once, in an order of its own.
    draw: the examples of these indices as tensors. What is random, it draws from the generator.
    loss: the mean loss of a batch, over what `count` counts; 0 where that is nothing.
    evaluate: figures by name; the module is in evaluation mode, gradients are off.
    best: the figure that marks the weights to keep: its largest value, or its smallest.
    count: how many losses the mean of a batch is over; that of a batch is the sum of those of its parts.
    backward: leaves the gradients of an update, and gives its loss; `backward` of this file where there is None.
    memory: tensors that the task changes in place, kept with the state.
    origin: what else a run must agree in with the state that it takes up, as JSON holds it: a hash of the data.
    """

    size: int
    draw: Callable[[Tensor, torch.Generator], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    evaluate: Callable[[nn.Module], dict[str, float]]
    best: str
    smallest: bool = False
    count: Callable[[Batch], int] = lambda batch: examples(batch)
    backward: "Callable[[Work], Tensor] | None" = None
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """The part of this process in one update.

    model: what is trained. forward: what is called for it, so that it is compiled and gradients meet.
    pieces: micro-batches on the device, each with its share in the mean over the whole batch of all processes.
    """

    task: Task
    model: nn.Module
    forward: nn.Module
    pieces: tuple[Piece, ...]
    # Around forward and backward of the piece of this index, and around its forward alone.
    meeting: Callable[[int], AbstractContextManager[Any]]
    casting: Callable[[], AbstractContextManager[Any]]


def examples(batch: Batch) -> int:
    """How many examples a batch has."""
    return len(next(iter(batch.values())))


def backward(work: Work) -> Tensor:
    """The gradients of the mean loss of an update, added up piece by piece; gives that loss (of this process's rows).

    A piece counts by what its mean is over, not as one of so many: where targets differ in number, the gradients are
    those of the undivided batch.
    """
    losses = []
    for index, (batch, share) in enumerate(work.pieces):
        with work.meeting(index):
            with work.casting():
                loss = work.task.loss(work.forward, batch)
            loss = loss if share == 1 else loss * share
            # Gradients of several processes are averaged where they meet, and their sum is wanted.
            processes = distributed.place().processes
            (loss if processes == 1 else loss * processes).backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


def divide(task: Task, batch: Batch, batch_size: int, accumulate: int, device: torch.device) -> tuple[Piece, ...]:
    """This process's rows of a whole batch, in micro-batches; every process has as many of these.

    batch_size: that of a full batch, from which the size of a micro-batch follows.
    """
    rank, processes = distributed.place()
    size, counted = examples(batch), max(task.count(batch), 1)
    micro = math.ceil(batch_size / (processes * accumulate))
    number = math.ceil(math.ceil(size / processes) / micro)
    rows = torch.arange(rank, size, processes)
    pieces = []
    for index in range(number):
        own = rows[index * micro : (index + 1) * micro]
        # A process that has run out of rows joins in the sum with a share of 0.
        part = {name: tensor[own if len(own) else [0]] for name, tensor in batch.items()}
        whole = processes == 1 and number == 1
        share = 1.0 if whole else task.count(part) / counted if len(own) else 0.0
        pieces.append(({name: tensor.to(device) for name, tensor in part.items()}, share))
    return tuple(pieces)


def tokens(batch: Batch) -> int:
    """How many real tokens a batch has; 0 where it is made of something else."""
    if "mask" in batch:
        return int(batch["mask"].sum())
    return batch["token_ids"].numel() if "token_ids" in batch else 0


def trimmed(batch: Batch) -> Batch:
    """The batch without the columns behind the last real token of its longest example: they change no loss."""
    if "mask" not in batch:
        return batch
    real = batch["mask"].any(dim=0).nonzero()
    width, full = (int(real[-1]) + 1 if len(real) else 1), batch["mask"].shape[1]
    return {n: t[:, :width] if t.ndim == 2 and t.shape[1] == full else t for n, t in batch.items()}
