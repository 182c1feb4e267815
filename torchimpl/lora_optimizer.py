"""LoRA as an optimiser: the weight itself is moved by what a step of the factors does to it.

    A, B -> A', B' by SGD or AdamW on scale G B^T and scale A^T G,    W <- W + scale (A' B' - A B)

A and B are states of the optimiser and W is an ordinary weight, so that a model needs nothing attached; step by step
the weights are those of a model with adapters (torchimpl/lora.py). W must have its dense gradient G, which adapters
beside an nn.Linear need not. What is saved is moments: AdamW keeps two numbers per weight, LoRAAdamW three per entry
of A and B. benchmarks/lora.py prints the bytes.

Operators: torchimpl/ops/lora.py. Source: https://kexue.fm/archives/9590.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from torchimpl import check
from torchimpl.lora import LoraError, first_factors
from torchimpl.ops import lora as ops


class _Projected(torch.optim.Optimizer):
    """What LoRASGD and LoRAAdamW share: factors as states, and the weight moved by what a step does to their product.

    A subclass says with `_moved` how one array follows its gradient; arrays are A, B, or W of a group without r.
    """

    def __init__(self, params: Any, defaults: dict[str, Any], generator: torch.Generator | None) -> None:
        # add_param_group, which the constructor calls for every group, draws the factors.
        self._generator = generator
        super().__init__(params, defaults)
        self._generator = None

    def _moved(self, group: dict[str, Any], state: dict[str, Any], name: str, p: Tensor, gradient: Tensor) -> Tensor:
        raise NotImplementedError

    def add_param_group(self, group: dict[str, Any]) -> None:
        """A further group of parameters; its options override those of the optimiser.

        Raises: LoraError for a parameter that is no matrix in a group that has an r; DomainError for options.
        """
        super().add_param_group(group)
        added = self.param_groups[-1]
        try:
            _check_group(added)
        except ValueError:
            self.param_groups.pop()
            raise
        for p in added["params"]:
            self.state[p] = self._start(added, p)

    def _start(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.int64)}
        if group["r"] is None:
            return state
        W = _lying(p.detach(), group)
        wide = check.island(W).dtype
        A, B = first_factors(W.shape, group["r"], dtype=wide, device=W.device, generator=self._generator)
        state |= {"A": A, "B": B}
        # 16 bits would lose a step that is small beside W, so that W is formed anew from its first bits every time.
        if W.dtype in check.HALVES:
            state["base"] = p.detach().clone(memory_format=torch.contiguous_format)
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise LoraError(f"lora.{type(self).__name__}: sparse gradients are not supported")
                state = self.state[p]
                state["step"] += 1
                if group["r"] is None:
                    p.copy_(self._moved(group, state, "W", p, p.grad))
                else:
                    self._step_factors(group, state, p)
        return loss

    def _step_factors(self, group: dict[str, Any], state: dict[str, Any], p: Tensor) -> None:
        scale, A, B = _group_scale(group), state["A"], state["B"]
        gradients = ops.gradients_dense(_lying(p.grad, group).to(A.dtype), A, B, scale=scale)
        new_A = self._moved(group, state, "A", A, gradients.A)
        new_B = self._moved(group, state, "B", B, gradients.B)
        W = _lying(p, group)
        if "base" in state:
            W.copy_(ops.merge(_lying(state["base"], group).to(A.dtype), new_A, new_B, scale=scale))
        else:
            W.add_(ops.update(A, B, new_A, new_B, scale=scale))
        state["A"], state["B"] = new_A, new_B

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state; every tensor keeps its dtype, also beside 16-bit weights.

        Raises: LoraError for factors that do not fit their parameter; ValueError for other groups.
        """
        found = {}
        for own, group in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for p, number in zip(own["params"], group["params"], strict=False):
                kept, needed = state_dict["state"].get(number, {}), set(self.state[p])
                if not needed <= kept.keys():
                    raise LoraError(
                        f"lora.load_state_dict: expected {sorted(needed)} of a parameter, received {sorted(kept)}"
                    )
                if group["r"] is not None:
                    (d, e), r = _lying(p, group).shape, group["r"]
                    shapes = tuple(kept["A"].shape), tuple(kept["B"].shape)
                    if shapes != ((d, r), (r, e)):
                        raise LoraError(
                            f"lora.load_state_dict: expected A and B of {(d, r)} and {(r, e)}, received {shapes}"
                        )
                found[p] = {
                    key: value.detach().clone().to("cpu" if key == "step" else p.device) for key, value in kept.items()
                }
        super().load_state_dict(state_dict)
        # What torch has put there has the dtype of the parameter.
        self.state.update(found)


class LoRASGD(_Projected):
    """Gradient descent of A and B, written into W: what torch.optim.SGD on the factors of an adapter does to W.

    layout: how a matrix lies, "in_out" (y = x W) or "out_in" (torch.nn.Linear.weight). A (in, r) starts uniform within
        1 / sqrt(in), B (r, out) at zero.
    momentum, weight_decay: of the factors, as torch.optim.SGD has them.
    A group with r=None trains its parameters whole, by the same rule on W; in a group with an r every parameter must
    be a matrix. Beside W of 16 bits its value at the start is kept, in 16 bits, and W is formed anew from it in
    float32 every step: who loads weights does so before the optimiser is made.
    Raises: LoraError, DomainError as add_param_group.
    Source: https://kexue.fm/archives/9590.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        r: int | None,
        alpha: float,
        rslora: bool,
        layout: Literal["in_out", "out_in"],
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        rule = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, rule | {"r": r, "alpha": alpha, "rslora": rslora, "layout": layout}, generator)

    def _moved(self, group: dict[str, Any], state: dict[str, Any], name: str, p: Tensor, gradient: Tensor) -> Tensor:
        wide = check.island(p)
        gradient = gradient.to(wide.dtype) + group["weight_decay"] * wide
        if group["momentum"]:
            # The first step is not damped: the mean starts as the gradient.
            past = state.get(f"m_{name}")
            gradient = state[f"m_{name}"] = gradient if past is None else group["momentum"] * past + gradient
        return (wide - group["lr"] * gradient).to(p.dtype)


class LoRAAdamW(_Projected):
    """AdamW of A and B, written into W: what torch.optim.AdamW on the factors of an adapter does to W.

    The moments are those of the projected gradients, with the shapes of A and B, in float32 beside 16-bit weights.
    Everything else, groups with r=None included, as LoRASGD; weight_decay is that of the factors, and has no default.
    Raises: LoraError, DomainError as add_param_group.
    Source: https://kexue.fm/archives/9590. Differs: GaLore keeps moments in a subspace and moves all of W.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        r: int | None,
        alpha: float,
        rslora: bool,
        layout: Literal["in_out", "out_in"],
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        generator: torch.Generator | None = None,
    ) -> None:
        rule = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, rule | {"r": r, "alpha": alpha, "rslora": rslora, "layout": layout}, generator)

    def _start(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        state = super()._start(group, p)
        arrays = {"W": check.island(p.detach())} if group["r"] is None else {"A": state["A"], "B": state["B"]}
        for name, array in arrays.items():
            state |= {f"m_{name}": torch.zeros_like(array), f"v_{name}": torch.zeros_like(array)}
        return state

    def _moved(self, group: dict[str, Any], state: dict[str, Any], name: str, p: Tensor, gradient: Tensor) -> Tensor:
        new = ops.adamw_array(
            p, gradient, state[f"m_{name}"], state[f"v_{name}"], step=int(state["step"]), learning_rate=group["lr"],
            beta_1=group["betas"][0], beta_2=group["betas"][1], epsilon=group["eps"],
            weight_decay=group["weight_decay"],
        )  # fmt: skip
        state[f"m_{name}"], state[f"v_{name}"] = new.m, new.v
        return new.parameter


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The bytes of all tensors that an optimiser holds as its state."""
    return sum(
        value.nbytes for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    )


def _check_group(group: dict[str, Any]) -> None:
    """The options of a group of parameters, and its parameters against them."""
    op = "lora.add_param_group"
    check.domain(op, group["layout"] in ("in_out", "out_in"), 'layout "in_out" or "out_in"', layout=group["layout"])
    check.domain(op, type(group["rslora"]) is bool, "rslora true or false", rslora=group["rslora"])
    for name in ("lr", "momentum", "weight_decay"):
        value = group.get(name, 0.0)
        check.domain(op, 0 <= value < math.inf, f"{name} >= 0", **{name: value})
    check.domain(op, group.get("momentum", 0.0) < 1, "momentum below 1", momentum=group.get("momentum"))
    check.domain(op, all(0 <= beta < 1 for beta in group.get("betas", ())), "betas in [0, 1)", betas=group.get("betas"))
    check.domain(op, group.get("eps", 1.0) > 0, "eps > 0", eps=group.get("eps"))
    for number, p in enumerate(group["params"]):
        check.real(op, f"parameter {number}", p)
    if group["r"] is None:
        return
    _group_scale(group)
    for number, p in enumerate(group["params"]):
        if p.ndim != 2:
            raise LoraError(
                f"{op}: expected matrices in a group with r={group['r']}, received parameter {number} of shape "
                f"{tuple(p.shape)}; a group with r=None trains its parameters whole"
            )


def _group_scale(group: dict[str, Any]) -> float:
    return (ops.scale_rslora if group["rslora"] else ops.scale_lora)(alpha=group["alpha"], r=group["r"])


def _lying(p: Tensor, group: dict[str, Any]) -> Tensor:
    """A matrix as (in, out): a view."""
    return p if group["layout"] == "in_out" else p.T
