"""The project's own ONNX graphs in ONNX Runtime: optimisation off, basic and all; opset 20 and 23; float32 and float64.

Opset 23 is judged where a graph uses what came with it (RMSNormalization, RotaryEmbedding, Attention).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from conformance.adapters import Implementation
from conformance.adapters.graphs import SINCE_23, Session, on_graph, operators
from conformance.budget import Profile

LEVELS = {"off": "ORT_DISABLE_ALL", "basic": "ORT_ENABLE_BASIC", "all": "ORT_ENABLE_ALL"}
# Laws draw cases whose graphs must be written and loaded: two rows have them, the furthest apart.
WITH_LAWS = (("float32", "all"), ("float64", "off"))
EXAMPLES = 3


def _load(model: Any, level: str) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, LEVELS[level])
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        return tuple(session.run(None, {name: arrays[name] for name in names}))

    return run


def implementations() -> tuple[Implementation, ...]:
    """A row for every level, format and opset."""
    import onnxruntime

    calls = operators()
    found = []
    for opset in (20, 23):
        named = {op: f for op, f in calls.items() if opset == 20 or op.startswith(SINCE_23)}
        for dtype in ("float32", "float64"):
            for level in LEVELS:
                load = partial(_load, level=level)
                variant = level if opset == 20 else f"{level}, opset {opset}"
                functions = {op: on_graph(f, opset, load) for op, f in named.items()}
                laws = opset == 20 and (dtype, level) in WITH_LAWS
                profile = Profile(dtype, "strict", "A64")
                label, version = f"onnxruntime {variant}", onnxruntime.__version__
                found.append(Implementation(label, functions, profile, version, laws, EXAMPLES, variant))
    return tuple(found)
