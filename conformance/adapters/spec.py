"""The honest zoo: the specification's own code, run in float64, float32, float16 and bfloat16 and in several orders.

Every argument of the specification enters through refimpl.check.real. The zoo replaces that cast by one to a Working
array, whose every operation runs in the working precision. 16-bit members accumulate in float32 and round the output
(strict), or round every operation (eager); orders of summation are BLAS's, reversed, and split in two halves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from conformance.adapters import Implementation
from conformance.budget import DTYPES, Profile
from conformance.case import OPERATORS, Function, storage_type
from conformance.model import MODELS
from conformance.models._encoder import Streaming
from refimpl import check

ORDERS = ("blas", "reversed", "split")


class Working(np.ndarray):
    """An ndarray whose floating results are rounded to `grain` and whose sums run in `order`."""

    compute: type = np.float64
    grain: str = ""
    order: str = "blas"

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
        kind = _kind((*inputs, *(out or ())))
        plain = [_strip(i, kind) for i in inputs]
        if ufunc is np.matmul and method == "__call__":
            result = _contract(kind.order, np.matmul, plain)
        elif ufunc is np.add and method == "reduce":
            result = _reduce(kind.order, plain[0], **options)
        else:
            result = getattr(ufunc, method)(*plain, **options)
        if out is not None:
            out[0][...] = _round(np.asarray(result), kind)
            return out[0]
        return _wrap(result, kind)

    def __array_function__(self, function: Callable[..., Any], types: Any, args: Any, options: Any) -> Any:
        kind = _kind((*args, *options.values()))
        plain, named = _strip(args, kind), _strip(options, kind)
        if function is np.einsum and kind.order != "blas":
            return _wrap(_einsum(kind.order, *plain), kind)
        return _wrap(function(*plain, **named), kind)


def _kind(values: Any) -> type[Working]:
    """The Working class among nested arguments; one that rounds to 16 bits wins over one that does not."""
    found = [type(v) for v in _leaves(values) if isinstance(v, Working)]
    return max(found, key=lambda k: bool(k.grain))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _strip(value: Any, kind: type[Working]) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_strip(v, kind) for v in value) if type(value) in (tuple, list) else value
    if isinstance(value, dict):
        return {k: _strip(v, kind) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        plain = value.view(np.ndarray)
        return plain.astype(kind.compute, copy=False) if plain.dtype.kind == "f" else plain
    if isinstance(value, np.floating):
        return kind.compute(value)
    return value


def _wrap(value: Any, kind: type[Working]) -> Any:
    if isinstance(value, tuple):
        wrapped = tuple(_wrap(v, kind) for v in value)
        return type(value)(*wrapped) if hasattr(value, "_fields") else wrapped
    if isinstance(value, list):
        return [_wrap(v, kind) for v in value]
    if isinstance(value, (np.ndarray, np.floating)) and np.asarray(value).dtype.kind == "f":
        return _round(np.asarray(value), kind).view(kind)
    return value


def _round(value: np.ndarray, kind: type[Working]) -> np.ndarray:
    if value.dtype.kind != "f":
        return value
    if kind.grain:
        value = value.astype(storage_type(kind.grain))
    return value.astype(kind.compute)


def _reduce(order: str, values: np.ndarray, axis: Any = 0, **options: Any) -> Any:
    if order == "blas" or not isinstance(axis, int) or values.ndim == 0 or options.get("initial") is not None:
        return np.add.reduce(values, axis=axis, **options)
    values = np.flip(values, axis)
    if order == "reversed" or values.shape[axis] < 2:
        # cumsum adds one by one; reduce would add pairwise.
        return np.add.reduce(np.ascontiguousarray(values), axis=axis, **options)
    one, other = np.array_split(values, 2, axis=axis)
    return np.add.reduce(one, axis=axis, **options) + np.add.reduce(other, axis=axis, **options)


def _contract(order: str, multiply: Callable[..., Any], pair: list[Any]) -> Any:
    one, other = pair
    if order == "blas" or one.shape[-1] < 2:
        return multiply(one, other)
    axis = -2 if other.ndim > 1 else -1
    one, other = np.flip(one, -1), np.flip(other, axis)
    if order == "reversed":
        return multiply(one, other)
    left, right = np.array_split(one, 2, axis=-1), np.array_split(other, 2, axis=axis)
    return multiply(left[0], right[0]) + multiply(left[1], right[1])


def _einsum(order: str, subscripts: str, *operands: np.ndarray) -> Any:
    """Reverse, or split in two halves, the first contracted index."""
    inputs, _, output = subscripts.replace(" ", "").partition("->")
    terms = inputs.split(",")
    summed = [letter for letter in "".join(terms) if letter.isalpha() and letter not in output]
    if not summed:
        return np.einsum(subscripts, *operands)

    def axis(term: str) -> int:
        front, _, back = term.partition("...")
        place = term.find(summed[0])
        if place < 0:
            return term.count(" ")
        return place if "..." not in term or summed[0] in front else place - len(term)

    flipped = [np.flip(o, axis(t)) if summed[0] in t else o for t, o in zip(terms, operands, strict=True)]
    size = next(o.shape[axis(t)] for t, o in zip(terms, operands, strict=True) if summed[0] in t)
    if order == "reversed" or size < 2:
        return np.einsum(subscripts, *flipped)
    halves = []
    for half in range(2):
        parts = [
            np.array_split(o, 2, axis=axis(t))[half] if summed[0] in t else o
            for t, o in zip(terms, flipped, strict=True)
        ]
        halves.append(np.einsum(subscripts, *parts))
    return halves[0] + halves[1]


@cache
def _working(compute: type, grain: str, order: str) -> type[Working]:
    return type("Working", (Working,), {"compute": compute, "grain": grain, "order": order})


@contextmanager
def working_precision(dtype: str, order: str, *, eager: bool) -> Iterator[None]:
    """Within the block the specification computes in the given precision and order."""
    compute = np.float64 if dtype == "float64" else np.float32
    exact = _working(compute, "", order)
    rounded = _working(compute, dtype if eager else "", order)
    original = check.real

    def real(operation: str, name: str, values: Any, *, finite: bool = True) -> np.ndarray:
        if isinstance(values, Working):
            return values
        # Angles below float32 are not an implementation of RoPE, whatever the storage format.
        angle = operation.startswith(("rope.angles", "rope.frequencies")) or name in (
            "angles",
            "frequencies",
            "positions",
        )
        return np.asarray(values).astype(compute).view(exact if angle else rounded)

    check.real = real
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        check.real = original


def _member(function: Function, dtype: str, order: str, *, eager: bool) -> Function:
    target = storage_type(dtype)

    def run(**arguments: Any) -> Any:
        with working_precision(dtype, order, eager=eager):
            return _stored(function(**arguments), target)

    return run


def _whole(function: Function, dtype: str, order: str) -> Function:
    """A whole model in the working precision, or in float64 throughout where no order is named."""
    target = storage_type(dtype)

    def run(*arguments: Any, **options: Any) -> Any:
        with working_precision(dtype, order, eager=False) if order else nullcontext():
            return _stored(function(*arguments, **options), target)

    return run


def _stepped(step: Function, dtype: str, order: str) -> Function:
    """The step of a model, likewise; its state stays in the working precision."""
    target = storage_type(dtype)

    def run(*arguments: Any, **options: Any) -> Any:
        with working_precision(dtype, order, eager=False) if order else nullcontext():
            made, state = step(*arguments, **options)
            return _stored(made, target), state

    return run


def _streaming(module: ModuleType, dtype: str, order: str) -> Function:
    """A whole model, with its step where it has one."""
    whole = _whole(module.model, dtype, order)
    return Streaming(whole, _stepped(module.step, dtype, order)) if hasattr(module, "step") else whole


def _stored(result: Any, target: np.dtype) -> Any:
    if isinstance(result, (tuple, list)):
        return tuple(_stored(r, target) for r in result)
    array = np.asarray(result).view(np.ndarray) if isinstance(result, np.ndarray) else np.asarray(result)
    return array.astype(target) if array.dtype.kind == "f" else array


def _wide(function: Function, dtype: str) -> Function:
    """float64 throughout, the output rounded once."""
    target = storage_type(dtype)
    return lambda **arguments: _stored(function(**arguments), target)


def implementations() -> tuple[Implementation, ...]:
    """Every operator in each storage format: rounded once; float32 accumulation in three orders; eager.

    Models in float64 and float32: behind a layer or two the bounds of 16 bits say nothing.
    """
    from refimpl import __version__

    made = []
    calls = {name: operator.call for name, operator in OPERATORS().items()}

    def add(name: str, functions: dict[str, Function], profile: Profile, *, laws: bool, order: str = "") -> None:
        models = {} if profile.sixteen_bit else {n: _streaming(m, profile.dtype, order) for n, m in MODELS().items()}
        made.append(Implementation(f"spec {name}", functions, profile, __version__, laws, models=models))

    for dtype in DTYPES:
        strict = Profile(dtype, "strict", "A64" if dtype == "float64" else "A32")
        wide = {n: _wide(f, dtype) for n, f in calls.items()}
        # One member of each format is enough for the laws: the least exact of them.
        add(dtype, wide, Profile(dtype, "strict", "A64"), laws=dtype == "float64")
        for order in ORDERS:
            members = {n: _member(f, dtype, order, eager=False) for n, f in calls.items()}
            add(f"{dtype} {order}", members, strict, laws=dtype == "float32" and order == "split", order=order)
        if strict.sixteen_bit:
            members = {n: _member(f, dtype, "blas", eager=True) for n, f in calls.items()}
            add(f"{dtype} eager", members, Profile(dtype, "eager"), laws=True)
    return tuple(made)
