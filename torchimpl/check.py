"""What can be checked without waiting for the device: dtypes and shapes, with the errors of refimpl.check."""

from collections.abc import Sequence

import torch

from refimpl import check
from refimpl.check import DomainError

# Formats whose sums and squares are formed in float32.
HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float64, torch.float32, *HALVES)

shape = check.shape
domain = check.domain


def real(operation: str, name: str, x: torch.Tensor) -> torch.Tensor:
    """`x` itself; anything that is not a tensor of a floating dtype is refused."""
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
        raise DomainError(f"{operation}: {name} must be a floating tensor, received {_kind(x)}")
    return x


def boolean(operation: str, name: str, x: torch.Tensor) -> torch.Tensor:
    """`x` itself; anything that is not a boolean tensor is refused, 0/1 numbers included."""
    if not isinstance(x, torch.Tensor) or x.dtype != torch.bool:
        raise DomainError(f"{operation}: {name} must be a boolean tensor (True = may attend), received {_kind(x)}")
    return x


def integer(operation: str, name: str, x: torch.Tensor) -> torch.Tensor:
    """`x` as int64; a floating dtype is refused even when it holds whole numbers."""
    if not isinstance(x, torch.Tensor) or x.is_floating_point() or x.dtype == torch.bool or x.is_complex():
        raise DomainError(f"{operation}: {name} must be a tensor of integers, received {_kind(x)}")
    return x.to(torch.int64)


def broadcasts(x: Sequence[int], y: Sequence[int]) -> bool:
    """Whether an array of shape `x` stretches to shape `y`, axes counted from the last."""
    # `own in (1, size)` would read better; torch.compile takes an open size for different from an equal constant there.
    return len(x) <= len(y) and all(
        own == 1 or own == size for own, size in zip(reversed(x), reversed(y), strict=False)
    )


def island(x: torch.Tensor) -> torch.Tensor:
    """`x` in the precision in which sums of it are formed: float32 for 16-bit formats, otherwise its own."""
    return x.float() if x.dtype in HALVES else x


def _kind(x: object) -> str:
    return str(x.dtype) if isinstance(x, torch.Tensor) else type(x).__name__
