"""The project's own ONNX graphs, as functions on arrays: written once for every set of ranks, numbers and names.

A graph is used again for every array that fits its open sizes, so that what is judged is the dynamic graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conformance.adapters import AdapterError
from conformance.budget import Profile
from conformance.case import OPERATORS, Function, Package, cases, storage_arguments

# What runs a graph: arrays by input name -> results.
Session = Callable[[Mapping[str, np.ndarray]], tuple[np.ndarray, ...]]
# Families whose graphs use operators that came with opset 23.
SINCE_23 = ("norm.", "rope.rotate", "attention.", "gau.", "mixed_chunk_attention.unit", "head.")


def operators() -> dict[str, Function]:
    """Every operator, as a function on the values of a graph."""
    package = Package("export.ops")
    return {name: operator.of(package) for name, operator in OPERATORS().items()}


def on_graph(call: Function, opset: int, load: Callable[[Any], Session]) -> Function:
    """`call`, written as a graph and run by what `load` makes of the model."""
    known: dict[Any, list[tuple[Mapping[tuple[str, int], int], Session]]] = {}

    def run(**arguments: Any) -> tuple[np.ndarray, ...]:
        from export import operator

        # In the order of their names: a file lists the arrays of a case in any order, and every order would be a graph.
        arguments = dict(sorted(arguments.items()))
        arrays = {k: v for k, v in arguments.items() if isinstance(v, np.ndarray)}
        numbers = {k: v for k, v in arguments.items() if k not in arrays}
        key = repr(numbers), tuple((k, v.dtype, v.ndim) for k, v in arrays.items())
        sessions = known.setdefault(key, [])
        for fixed, session in sessions:
            if all(arrays[name].shape[axis] == size for (name, axis), size in fixed.items()):
                return session(arrays)
        built = operator.model(call, arguments, opset=opset)
        sessions.append((built.fixed, load(built.model)))
        return sessions[-1][1](arrays)

    return run


def write(op: str, path: Path, *, opset: int, dtype: str) -> Mapping[tuple[str, int], int]:
    """The graph of an operator, for the ranks and numbers of its first case in that format; the sizes it fixes."""
    from export import graph, operator

    if opset not in graph.OPSETS or dtype not in ("float32", "float64"):
        raise AdapterError(
            f"ops --onnx: expected opset 20 or 23 and float32 or float64, received opset {opset} and {dtype}"
        )
    case = next((c for c in cases([op]) if c.op == op and dtype in c.dtypes), None)
    if case is None:
        raise AdapterError(f"ops {op}: no case in {dtype}")
    arguments = storage_arguments(case.under(Profile(dtype, "strict", "A64")))
    calls = operators()
    if op not in calls:
        raise AdapterError(f"ops {op}: export has no graph of it")
    built = operator.model(calls[op], arguments, opset=opset, outputs=OPERATORS()[op].outputs)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(built.model.SerializeToString(deterministic=True))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return built.fixed
