"""What the number of a step decides alone: the learning rate, the residual warm-up, the order of the examples."""

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

SCHEDULES = ("constant", "linear", "cosine")


class Recipe(Protocol):
    """What of a configuration the schedule reads."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def schedule(self) -> str: ...
    @property
    def warmup(self) -> float: ...
    @property
    def final(self) -> float: ...


def learning_rate(config: Recipe, step: int, steps: int) -> float:
    """The rate of update `step`, counted from 0, of all `steps`."""
    warm = round(config.warmup * steps)
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    past = (step - warm) / max(steps - warm, 1)
    if config.schedule == "constant":
        return config.learning_rate
    falling = 1 - past if config.schedule == "linear" else (1 + math.cos(math.pi * past)) / 2
    return config.learning_rate * (config.final + (1 - config.final) * falling)


def residual_scale(share: float, step: int, steps: int) -> float:
    """What residual branches are scaled by in update `step`, counted from 0: 0, then linearly to 1 over the share."""
    warm = round(share * steps)
    return step / warm if step < warm else 1.0


def order(seed: int, epoch: int, size: int) -> Tensor:
    """The order of the examples in an epoch, which depends on nothing else."""
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(size))
