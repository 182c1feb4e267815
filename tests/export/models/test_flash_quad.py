"""Graphs of flash_quad: the specification in onnx and in ONNX Runtime, for every convention, batch, length and mask."""

import importlib
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from refimpl.models import _encoder, flash_quad

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
# Only now: these need the packages above.
graph = importlib.import_module("export.graph")
graph_encoder = importlib.import_module("export.models._encoder")
written = importlib.import_module("export.models.flash_quad")
reference = importlib.import_module("onnx.reference")

QUAD = flash_quad.Config(
    vocab_size=11, segments=2, hidden_size=7, layers=2, expanded_size=13, key_size=4, kernel="squared_relu",
    divisor="visible", length=0, rotation="interleaved", rotary_base=10000.0, epsilon=1e-6,
)  # fmt: skip
# The Config and who sees whom.
MODELS = {
    "visible": (QUAD, "bidirectional"),
    "visible, causal": (replace(QUAD, rotation="half_split", epsilon=0.25), "causal"),
    "visible, unilm, laplace": (replace(QUAD, kernel="laplace", rotary_base=10.0), "unilm"),
    "array": (replace(QUAD, divisor="array", rotation="half_split"), "bidirectional"),
    "array, causal, laplace": (replace(QUAD, divisor="array", kernel="laplace"), "causal"),
    "constant": (replace(QUAD, divisor="constant", length=5), "bidirectional"),
    "constant, unilm": (replace(QUAD, divisor="constant", length=512, layers=1), "unilm"),
}
OPSETS = (20, 23)
SHAPES = [(1, 1), (4, 7), (2, 33), (3, 11)]


def weights_of(config, dtype=np.float64):
    # Rounded, so that both formats hold the same numbers.
    drawn = np.random.default_rng(0)
    shapes = flash_quad.shapes(config)
    return {name: (drawn.normal(size=shape) * 0.75).astype(np.float32).astype(dtype) for name, shape in shapes.items()}


@cache
def built(name, opset, dtype):
    config, visible = MODELS[name]
    ids = np.zeros((2, 3), np.int64)
    examples = {"token_ids": ids, "segment_ids": ids, "mask": np.ones(ids.shape, np.bool_)}

    def call(**inputs):
        weights = {key: graph.initializer(key, array) for key, array in weights_of(config, np.dtype(dtype)).items()}
        return written.hidden_states(weights, **inputs, config=config, visible=graph_encoder.VISIBLE[visible])

    return graph.build(call, examples, opset=opset, outputs=[f"x_{i}" for i in range(config.layers + 1)])


def request_of(b, n):
    drawn = np.random.default_rng(b * n)
    mask = drawn.random((b, n)) < 0.7
    # Padding on the right and on the left, and a row without a token where there are several.
    mask[-1] = np.arange(n) < max(n // 2, 1)
    mask[0] = np.arange(n) >= n // 3
    mask[1:2] = False
    segments = drawn.integers(0, 2, (b, n))
    return {"token_ids": drawn.integers(0, 11, (b, n)), "segment_ids": segments, "mask": mask}


def expected_of(name, request):
    config, visible = MODELS[name]
    return flash_quad.hidden_states(weights_of(config), **request, config=config, visible=getattr(_encoder, visible))


def agrees(made, expected, share):
    assert len(made) == len(expected)
    for one, other in zip(made, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=share * np.abs(other).max())


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", MODELS)
def test_the_graph_is_the_specification(name, opset):
    made = built(name, opset, "float64")
    # Batch and length stay open.
    assert not made.fixed
    onnx.checker.check_model(made.model, full_check=True)
    evaluator = reference.ReferenceEvaluator(made.model)
    for shape in SHAPES:
        request = request_of(*shape)
        agrees(evaluator.run(None, request), expected_of(name, request), 1e-12)


@pytest.mark.parametrize(
    ("opset", "dtype", "share"), [(23, "float32", 1e-5), (20, "float32", 1e-5), (23, "float64", 1e-12)]
)
@pytest.mark.parametrize("name", MODELS)
def test_the_file_answers_as_the_specification(name, opset, dtype, share):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    data = built(name, opset, dtype).model.SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    for shape in SHAPES:
        request = request_of(*shape)
        made = session.run(None, request)
        assert {array.dtype.name for array in made} == {dtype}
        agrees(made, expected_of(name, request), share)


def test_a_layer_is_a_call_of_the_block():
    made = built("visible", 23, "float32").model
    calls = [node for node in made.graph.node if node.op_type.startswith("gau.block_pre_norm")]
    # One function serves both layers.
    assert [node.op_type for node in calls] == ["gau.block_pre_norm"] * 2


@pytest.mark.parametrize(("name", "moved"), [("array", True), ("visible", False), ("constant", False)])
def test_padding_counts_where_the_convention_says_so(name, moved):
    evaluator = reference.ReferenceEvaluator(built(name, 20, "float64").model)
    request = request_of(3, 11) | {"mask": np.ones((3, 11), bool)}
    longer = {key: np.pad(array, ((0, 0), (0, 4))) for key, array in request.items()}
    short, long = evaluator.run(None, request)[-1], evaluator.run(None, longer)[-1][:, :11]
    assert (np.abs(short - long).max() > 1e-3) == moved
    assert moved or np.abs(short - long).max() < 1e-12
