"""Properties that every right implementation has, as plain functions over an implementation.

A law is `law(implementation, case)`; it returns nothing or raises LawFailed with what was expected, received and where.
Cases come from the family's strategy (Hypothesis), so that a failing one is shrunk. Tolerances are never chosen:
they are the radii of the reference at the case's declared precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from conformance.case import OPERATORS, Case, Function, as_tuple, known_reference, storage_arguments

# No result of a case comes near this number of elements; a larger one is refused before it is copied.
LARGEST_RESULT = 1 << 24


class LawFailed(AssertionError):
    """A property does not hold for an implementation."""


@dataclass(frozen=True)
class Law:
    """check: the plain function; operators: names it applies to; clauses: docstring labels it tests."""

    check: Callable[[Function, Case], None]
    operators: tuple[str, ...]
    clauses: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.check.__name__


@dataclass(frozen=True)
class Output:
    """What an implementation returned (float64) and how far a right one may be from the formula."""

    value: np.ndarray
    radius: np.ndarray


@contextmanager
def contained() -> Iterator[None]:
    """What an implementation does to NumPy's error state, or by sys.exit, ends with the call; Ctrl-C does not."""
    try:
        with np.errstate(all="ignore"):
            yield
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        # SystemExit would end the run with a status of the implementation's choice; so would a panic in an extension.
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def call(implementation: Function, case: Case) -> tuple[np.ndarray, ...]:
    """Call an implementation on a case: copies of its results as float64; its arguments must come back unmodified."""
    arguments = storage_arguments(case)
    kept = {k: v.tobytes() for k, v in arguments.items() if isinstance(v, np.ndarray)}
    poison(*(arguments[k].size for k in kept))
    with contained():
        returned = tuple(_real(r) for r in as_tuple(implementation(**arguments)))
    outputs = tuple(np.array(r, dtype=np.float64) for r in returned)
    for name, before in kept.items():
        if arguments[name].tobytes() != before:
            raise LawFailed(
                f"{case.op} case {case.name} ({case.profile}): the argument {name} was modified by the call"
            )
    overwrite(returned)
    return outputs


def poison(*sizes: int) -> None:
    """Free memory of so many numbers that is full of NaN: a result that is never written shows."""
    filled = [np.full(max(size, 1), np.nan, np.float64) for size in sizes]
    del filled


def overwrite(results: Iterable[np.ndarray]) -> None:
    """Fill results with NaN: a cached buffer handed out twice comes back poisoned."""
    for result in results:
        if result.flags.writeable and result.dtype.kind not in "biu":
            result[...] = np.nan


def _real(result: Any) -> np.ndarray:
    """A result as an array that shares its memory where it can; complex numbers, objects and text are no result."""
    array = np.asarray(result)
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise TypeError(f"expected an array of real numbers, received {type(result).__name__} of dtype {array.dtype}")
    if array.size > LARGEST_RESULT:
        raise ValueError(f"a result of shape {array.shape} is larger than any that is expected")
    return array


def results(returned: Any, due: Sequence[str]) -> tuple[np.ndarray, ...]:
    """Copies, as float64, of what a whole model or its step has returned, where it is a tuple of arrays.

    due: the names of what is expected. Raises TypeError with what came instead.
    """
    listed = f"{len(due)} arrays ({', '.join(due)})"
    if not isinstance(returned, (tuple, list)):
        raise TypeError(f"expected a tuple of {listed}, received {_described(returned)}")
    for i, result in enumerate(returned):
        if not hasattr(result, "__array__") and not isinstance(result, (list, tuple)):
            name = due[i] if i < len(due) else f"result {i}"
            raise TypeError(f"expected {name} as an array among {listed}, received {_described(result)}")
    return tuple(np.array(_real(result), np.float64) for result in returned)


def shaped(returned: Any, due: Mapping[str, tuple[int, ...]]) -> Any:
    """What a whole model or its step has returned, where it is as many arrays as are due, of their shapes.

    Raises: ValueError with what came instead; TypeError as `results`.
    """
    found = results(returned, tuple(due))
    if len(found) != len(due):
        raise ValueError(f"{len(found)} results, expected {len(due)} ({', '.join(due)})")
    for (name, shape), array in zip(due.items(), found, strict=True):
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    return returned


def stepped(returned: Any) -> tuple[Any, Any]:
    """The results and the state that a step has returned, of which it may be told what the results are by `results`.

    Raises: TypeError for anything but a pair.
    """
    due = "(results, state), where results are the tuple (logits, x_0, ...)"
    if not isinstance(returned, (tuple, list)):
        raise TypeError(f"expected a step to return {due}, received {_described(returned)}")
    if len(returned) != 2:
        raise TypeError(f"expected a step to return {due}, received {len(returned)} values")
    return returned[0], returned[1]


def _described(held: Any) -> str:
    """What came in the place of arrays."""
    if isinstance(held, dict):
        return f"a dict with the keys {', '.join(map(repr, held))}"
    shape = getattr(held, "shape", None)
    return "None" if held is None else type(held).__name__ if shape is None else f"one array of shape {tuple(shape)}"


def run(implementation: Function, case: Case, **changes: Any) -> tuple[Output, ...]:
    """The observables of an implementation on a case (with some arguments changed), each with its permitted radius."""
    case = case.with_(**changes) if changes else case
    outputs = call(implementation, case)
    operator = OPERATORS()[case.op]
    if operator.observe is not None:
        outputs = tuple(np.asarray(o, np.float64) for o in as_tuple(operator.observe(case.arguments, outputs)))
    expected = known_reference(case)
    made = []
    for name, value, ball in zip(expected, outputs, expected.values(), strict=False):
        if value.shape != ball.shape:
            raise LawFailed(
                f"{case.op} case {case.name} ({case.profile}): {name} has shape {value.shape}, expected {ball.shape}"
            )
        # Two results that are NaN would agree with each other under every law.
        finite = np.isfinite(value)
        if not finite.all() and (strange := ~finite & np.isfinite(ball.value) & np.isfinite(ball.rad)).any():
            raise LawFailed(
                f"{case.op} case {case.name} ({case.profile}): {name} is NaN or infinite in {int(strange.sum())} of "
                f"{strange.size} elements where numbers are expected"
            )
        made.append(Output(value, ball.rad))
    if len(outputs) != len(expected):
        raise LawFailed(f"{case.op}: {len(outputs)} results, expected {len(expected)} ({', '.join(expected)})")
    return tuple(made)


def close(law: str, case: Case, actual: Any, expected: Any, tolerance: Any) -> None:
    """Raise LawFailed at the element furthest beyond `tolerance`, NaN where a number is due among them.

    An infinite tolerance says nothing; one that is NaN (0 times an infinite radius) is infinite.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        raise LawFailed(f"{case.op} law {law} ({case.profile}): shape {actual.shape}, expected {expected.shape}")
    tolerance = np.broadcast_to(np.asarray(tolerance, np.float64), actual.shape)
    with np.errstate(invalid="ignore"):
        # Nearly always; whatever is not a number is looked at below.
        if (np.abs(actual - expected) <= tolerance).all():
            return
        tolerance = np.where(np.isnan(tolerance), np.inf, tolerance)
        same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
        excess = np.where(same, 0.0, np.abs(actual - expected) - tolerance)
    bad = (excess > 0) | (np.isnan(excess) & ~np.isinf(tolerance))
    if bad.any():
        index = tuple(
            int(i) for i in np.unravel_index(np.argmax(np.where(bad, np.nan_to_num(excess, nan=np.inf), -1)), bad.shape)
        )
        raise LawFailed(
            f"{case.op} law {law} ({case.profile}): out{list(index)}={actual[index]:.6g}, should be "
            f"{expected[index]:.6g} within {tolerance[index]:.2g}; {int(bad.sum())} of {bad.size} elements differ"
        )


def equal(law: str, case: Case, actual: Any, expected: Any) -> None:
    """Bit for bit (signs of zero aside): causality, isolation of documents, data movement."""
    close(law, case, actual, expected, 0.0)
