"""The one place where arguments enter the specification: casts, domains, shapes and their errors.

Every message names the operation, what was expected and what was received.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


class SpecError(ValueError):
    """An argument that an operator is not defined for."""


class ShapeError(SpecError):
    """Shapes that do not fit together."""


class DomainError(SpecError):
    """A value outside an operator's domain: NaN, infinity, a negative epsilon, an odd width."""


def real(operation: str, name: str, values: Any, *, finite: bool = True) -> np.ndarray:
    """`values` as a float64 array; complex, textual or (with `finite`) NaN and infinite input is refused."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise DomainError(f"{operation}: {name} must hold real numbers, received dtype {array.dtype}")
    array = array.astype(np.float64, copy=False)
    if finite and not np.isfinite(array).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise DomainError(
            f"{operation}: {name} must be finite, received {array[index]} at index {list(index)} of shape {array.shape}"
        )
    return array


def boolean(operation: str, name: str, values: Any) -> np.ndarray:
    """`values` as a bool array; anything that is not boolean is refused, 0/1 numbers included."""
    array = np.asarray(values)
    if array.dtype != np.bool_:
        raise DomainError(f"{operation}: {name} must be boolean (True = may attend), received dtype {array.dtype}")
    return array


def integer(operation: str, name: str, values: Any) -> np.ndarray:
    """`values` as an int64 array; a float dtype is refused even when it holds whole numbers."""
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise DomainError(f"{operation}: {name} must be integers, received dtype {array.dtype}")
    return array.astype(np.int64, copy=False)


def shape(operation: str, condition: bool, expected: str, **received: Any) -> None:
    """Raise ShapeError unless `condition`; `received` lists every shape that matters."""
    if not condition:
        raise ShapeError(f"{operation}: expected {expected}, received {_listed(received)}")


def domain(operation: str, condition: bool, expected: str, **received: Any) -> None:
    """Raise DomainError unless `condition`; `received` lists the offending values."""
    if not condition:
        raise DomainError(f"{operation}: expected {expected}, received {_listed(received)}")


def broadcast(operation: str, expected: str, **arrays: np.ndarray) -> tuple[int, ...]:
    """The common shape of `arrays`; ShapeError where they do not broadcast."""
    try:
        return np.broadcast_shapes(*(a.shape for a in arrays.values()))
    except ValueError:
        raise ShapeError(f"{operation}: expected {expected}, received {_listed(arrays)}") from None


def _listed(received: Mapping[str, Any]) -> str:
    parts = (
        f"{name} of shape {tuple(value.shape)}" if hasattr(value, "shape") else f"{name}={value!r}"
        for name, value in received.items()
    )
    return ", ".join(parts)
