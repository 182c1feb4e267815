"""What is known of a value while its graph is written: its dtype and rank, with the errors of refimpl.check."""

from collections.abc import Sequence

import numpy as np

from export.graph import Size, Value, agree
from refimpl import check
from refimpl.check import DomainError

shape = check.shape
domain = check.domain


def real(operation: str, name: str, x: Value) -> Value:
    """`x` itself; anything that is not a floating value of the graph is refused."""
    if not isinstance(x, Value) or not x.is_float:
        raise DomainError(f"{operation}: {name} must be a floating value, received {_kind(x)}")
    return x


def boolean(operation: str, name: str, x: Value) -> Value:
    """`x` itself; anything that is not a boolean value of the graph is refused, 0/1 numbers included."""
    if not isinstance(x, Value) or x.dtype != np.bool_:
        raise DomainError(f"{operation}: {name} must be boolean (True = may attend), received {_kind(x)}")
    return x


def integer(operation: str, name: str, x: Value) -> Value:
    """`x` as int64; a float dtype is refused even when it holds whole numbers."""
    if not isinstance(x, Value) or x.dtype.kind not in "iu":
        raise DomainError(f"{operation}: {name} must be integers, received {_kind(x)}")
    return x.cast(np.int64)


def broadcasts(sizes: Sequence[Size], into: Sequence[Size]) -> bool:
    """Whether a shape broadcasts to another without enlarging it, as far as sizes are known."""
    pairs = zip(reversed(sizes), reversed(into), strict=False)
    return len(sizes) <= len(into) and all(agree(one, 1) or agree(one, other) for one, other in pairs)


def same(sizes: Sequence[Size], others: Sequence[Size]) -> bool:
    """Whether two shapes are equal, as far as sizes are known."""
    return len(sizes) == len(others) and all(map(agree, sizes, others))


def _kind(x: object) -> str:
    return f"dtype {x.dtype}" if isinstance(x, Value) else type(x).__name__
