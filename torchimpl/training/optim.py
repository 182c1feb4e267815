"""The optimisers by name, and what of a model each of them decays.

    adamw      torch.optim.AdamW
    adafactor  torch.optim.Adafactor: the rate is relative to the size of a weight, second moments are factored
    lamb       Lamb of this file: Adam's direction, as long as the weight that it changes

Scales and offsets are never drawn towards zero, and LAMB takes Adam's own length for them.
"""

import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from refimpl import check

OPTIMIZERS = ("adamw", "adafactor", "lamb")
# What scales or shifts features one by one is not drawn towards zero, whatever its rank.
NOT_DECAYED = ("gamma", "beta")


class Recipe(Protocol):
    """What of a configuration the optimiser reads."""

    @property
    def optimizer(self) -> str: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def beta1(self) -> float: ...
    @property
    def beta2(self) -> float: ...
    @property
    def epsilon(self) -> float: ...
    @property
    def bias_correction(self) -> bool: ...


class Lamb(torch.optim.Optimizer):
    """LAMB: every weight moves by the rate times its own length.

        m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2
        u = m / (sqrt(v) + epsilon) + weight_decay x,   x = x - lr (|x| / |u|) u

    C1. With bias_correction, m / (1 - beta1^t) and v / (1 - beta2^t) stand for m and v in u.
    C2. |x| / |u| is 1 where either is 0, and in groups with adapt=False.

    Raises: DomainError for a negative rate, decay or epsilon, and for betas outside [0, 1).
    Source: arXiv:1904.00962, algorithm 2.
    Differs: the paper lets |x| pass through a function phi, here the identity; RoFormerV2 was trained without bias
        correction (ZhuiyiTechnology/roformer-v2). pytorch_optimizer.Lamb decays outside the ratio and cuts |x| at 10.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        adapt: bool = True,
    ) -> None:
        for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
            check.domain("optim.Lamb", value >= 0, f"{name} >= 0", **{name: value})
        check.domain("optim.Lamb", all(0 <= beta < 1 for beta in betas), "betas from 0 to below 1", betas=betas)
        group = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**group, "bias_correction": bias_correction, "adapt": adapt})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every weight that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        (beta1, beta2), first, second = group["betas"], state["exp_avg"], state["exp_avg_sq"]
        state["step"] += 1
        first.lerp_(parameter.grad, 1 - beta1)
        second.mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        step = int(state["step"])
        grown = (1 - beta1**step, 1 - beta2**step) if group["bias_correction"] else (1.0, 1.0)
        update = first / grown[0] / (second.sqrt() / math.sqrt(grown[1]) + group["eps"])
        if group["weight_decay"]:
            update = update + group["weight_decay"] * parameter
        if group["adapt"]:
            size, length = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(update)
            update = update * torch.where((size > 0) & (length > 0), size / length, 1.0)
        parameter.sub_(group["lr"] * update)


def build(model: nn.Module, config: Recipe) -> torch.optim.Optimizer:
    """The optimiser of the weights of `model` that have gradients, in two groups: matrices, and what is not decayed.

    Raises: DomainError for another name, and for a model without a weight to train.
    """
    check.domain("optim.build", config.optimizer in OPTIMIZERS, f"one of {OPTIMIZERS}", optimizer=config.optimizer)
    kernels: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scales = parameter.ndim < 2 or name.rpartition(".")[2] in NOT_DECAYED
            (rest if scales else kernels).append(parameter)
    check.domain("optim.build", bool(kernels or rest), "a model with weights that have gradients", weights=0)
    decayed = {"params": kernels, "weight_decay": config.weight_decay}
    groups: list[dict[str, Any]] = [decayed, {"params": rest, "weight_decay": 0.0}]
    betas, rate = (config.beta1, config.beta2), config.learning_rate
    if config.optimizer == "lamb":
        groups[1]["adapt"] = False
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "lamb":
        return Lamb(groups, rate, betas=betas, eps=config.epsilon, bias_correction=config.bias_correction)
    if config.optimizer == "adafactor":
        # Its second moment grows by a law of its own; its two epsilons are those of the paper.
        return torch.optim.Adafactor(groups, lr=rate)
    return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=config.epsilon)
