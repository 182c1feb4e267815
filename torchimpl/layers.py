"""What training does to the layers of an encoder for a while: computing them twice, and letting them grow in."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils import checkpoint

from refimpl import check


def layers(model: nn.Module) -> list[nn.Module]:
    """The layers of every encoder in `model`: the modules of its lists named `layers`."""
    lists = [m for n, m in model.named_modules() if n.rpartition(".")[2] == "layers" and isinstance(m, nn.ModuleList)]
    return [layer for held in lists for layer in held]


@contextmanager
def recomputed(found: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, these layers keep their input alone and are computed again for their gradients, with the same dropout.

    Raises: DomainError without a layer.
    """
    check.domain("layers.recomputed", bool(found), "a model with layers to compute again", layers=0)
    for layer in found:
        layer.forward = partial(checkpoint.checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in found:
            del layer.forward


@contextmanager
def grown(found: Sequence[nn.Module], scale: Tensor) -> Iterator[None]:
    """Inside, residual branches are scaled by the number in `scale`, in training mode alone.

        x_(l+1) = norm(x_l + scale branch_l(x_l))

    Every layer of ours drops out its branches, and nothing else, by one module: dropout or hidden_dropout.

    Raises: DomainError without a layer, and for layers that have no such module.
    Source: https://kexue.fm/archives/8998 (RoFormerV2).
    """
    branches = [getattr(layer, "hidden_dropout", None) or getattr(layer, "dropout", None) for layer in found]
    fits = bool(branches) and all(isinstance(branch, nn.Dropout) for branch in branches)
    check.domain("layers.grown", fits, "layers whose branches end in a dropout", received=branches)

    def scaled(module: nn.Module, given: Any, branch: Tensor) -> Tensor | None:
        return branch * scale.to(branch.dtype) if module.training else None

    hooks = [branch.register_forward_hook(scaled) for branch in branches if branch is not None]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
