"""The project's own ONNX graphs in onnx's ReferenceEvaluator, float64: what they mean, without a runtime's kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from conformance.adapters import Implementation
from conformance.adapters.graphs import SINCE_23, Session, on_graph, operators
from conformance.budget import Profile

EXAMPLES = 2


def _load(model: Any) -> Session:
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(model)

    def run(arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        return tuple(evaluator.run(None, {k: v for k, v in arrays.items() if k in evaluator.input_names}))

    return run


def implementations() -> tuple[Implementation, ...]:
    """Opset 20 for every operator, opset 23 where the graph differs."""
    import onnx

    calls = operators()
    found = []
    for opset in (20, 23):
        functions = {op: on_graph(f, opset, _load) for op, f in calls.items() if opset == 20 or op.startswith(SINCE_23)}
        variant = "" if opset == 20 else f"opset {opset}"
        profile = Profile("float64", "strict", "A64")
        label, laws = f"onnx-reference {variant}".strip(), opset == 20
        found.append(Implementation(label, functions, profile, onnx.__version__, laws, EXAMPLES, variant))
    return tuple(found)
