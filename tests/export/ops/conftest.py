"""What tests of operators stand on: a graph, judged by ONNX Runtime with and without its optimiser and by onnx."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from export.graph import build

TOLERANCE = {np.dtype(np.float32): 2e-6, np.dtype(np.float64): 1e-14}


def session(model, level="ORT_ENABLE_ALL"):
    """arrays -> results."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    made = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda arrays: made.run(None, {i.name: arrays[i.name] for i in made.get_inputs()})


def nodes(model):
    """Every node, those of local functions too."""
    return [node for found in (model.graph, *model.functions) for node in found.node]


class Graph:
    """The graph of a call, with sizes open, and what runs it."""

    def __init__(self, call, opset=20, **examples):
        built = build(call, examples, opset=opset)
        self.model, self.fixed = built.model, built.fixed
        onnx.checker.check_model(self.model, full_check=True)
        self.operators = {node.op_type for node in nodes(self.model) if not node.domain}
        for operator in self.operators:
            # Raises for an operator that is newer than the opset.
            onnx.defs.get_schema(operator, opset)
        evaluator = ReferenceEvaluator(self.model)

        def by_onnx(arrays):
            # Exponentials that overflow to the infinity that is wanted.
            with np.errstate(over="ignore"):
                return evaluator.run(None, {i: arrays[i] for i in evaluator.input_names})

        self.runs = {
            "off": session(self.model, "ORT_DISABLE_ALL"),
            "all": session(self.model),
            "onnx": by_onnx,
        }

    def __call__(self, **arrays):
        """The result, or the results, in ONNX Runtime."""
        found = self.runs["all"](arrays)
        return found[0] if len(found) == 1 else found

    def gives(self, expected, *, tolerance=None, among=("off", "all", "onnx"), **arrays):
        """Every runner's results have the shapes and values of `expected`; tolerance is relative to the largest."""
        expected = expected if isinstance(expected, tuple) else (expected,)
        for name in among:
            found = self.runs[name](arrays)
            assert len(found) == len(expected)
            for got, wanted in zip(found, map(np.asarray, expected), strict=True):
                assert got.shape == wanted.shape, f"{name}: shape {got.shape}, expected {wanted.shape}"
                if got.dtype.kind != "f":
                    assert np.array_equal(got, wanted), name
                    continue
                size = max(1.0, np.abs(wanted, where=np.isfinite(wanted), out=np.zeros(wanted.shape)).max(initial=0))
                allowed = (TOLERANCE[got.dtype] if tolerance is None else tolerance) * size
                with np.errstate(invalid="ignore"):
                    error = np.where(got == wanted, 0, np.abs(got - wanted))
                assert error.max(initial=0) <= allowed, f"{name}: off by {error.max():.3g}, allowed {allowed:.3g}"


@pytest.fixture(name="Graph")
def graph_class():
    return Graph


@pytest.fixture(name="session")
def session_function():
    return session
