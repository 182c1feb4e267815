"""Graphs of roformer and roformer_v2: the specification in onnx and in ONNX Runtime, for every batch and length."""

import importlib
from functools import cache

import numpy as np
import pytest

from refimpl.check import DomainError, ShapeError
from refimpl.models import roformer, roformer_v2

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
# Only now: these need the packages above.
graph = importlib.import_module("export.graph")
reference = importlib.import_module("onnx.reference")

SIZES = {
    "vocab_size": 11, "segments": 3, "embedding_size": 12, "hidden_size": 12, "layers": 2, "heads": 3,
    "intermediate_size": 7,
}  # fmt: skip
V1 = {"activation": "gelu_erf", "epsilon": 1e-7, "mlm_epsilon": 1e-12, "rotary_base": 10000.0}
V2 = {"activation": "relu", "epsilon": 1e-7, "rotary_base": 10000.0}
CONFIGS = {
    "roformer": roformer.Config(**SIZES, **V1),
    "roformer, embedding mapped": roformer.Config(
        **{**SIZES, **V1, "embedding_size": 5, "heads": 2, "activation": "gelu_tanh", "rotary_base": 100.0}
    ),
    "roformer, large epsilon": roformer.Config(**{**SIZES, **V1, "epsilon": 0.25, "heads": 1, "activation": "silu"}),
    "roformer_v2": roformer_v2.Config(**SIZES, **V2),
    "roformer_v2, embedding mapped": roformer_v2.Config(
        **{**SIZES, **V2, "embedding_size": 17, "heads": 2, "activation": "gelu_erf", "epsilon": 1e-12}
    ),
}
SPECIFICATIONS = {"roformer": roformer, "roformer_v2": roformer_v2}
OPSETS = (20, 23)
SHAPES = [(1, 1), (4, 7), (2, 65), (3, 11)]


def weights_of(config, dtype=np.float64):
    # Rounded, so that both formats hold the same numbers.
    drawn = np.random.default_rng(0)
    shapes = SPECIFICATIONS[config.model].shapes(config)
    return {name: (drawn.normal(size=shape) / 3).astype(np.float32).astype(dtype) for name, shape in shapes.items()}


@cache
def built(name, opset, dtype):
    config = CONFIGS[name]
    hidden_states = importlib.import_module(f"export.models.{config.model}").hidden_states
    ids = np.zeros((2, 3), np.int64)
    examples = {"token_ids": ids, "segment_ids": ids, "mask": np.ones(ids.shape, np.bool_)}

    def call(**inputs):
        weights = {key: graph.initializer(key, array) for key, array in weights_of(config, np.dtype(dtype)).items()}
        return hidden_states(weights, **inputs, config=config)

    return graph.build(call, examples, opset=opset, outputs=[f"x_{i}" for i in range(config.layers + 1)])


@cache
def session(name, opset, dtype, level="ORT_ENABLE_ALL"):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    data = built(name, opset, dtype).model.SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def request_of(b, n):
    drawn = np.random.default_rng(b * n)
    mask = drawn.random((b, n)) < 0.7
    # Padding on the right and on the left, and a row without a token where there are several.
    mask[-1] = np.arange(n) < max(n // 2, 1)
    mask[0] = np.arange(n) >= n // 3
    mask[1:2] = False
    return {
        "token_ids": drawn.integers(0, 11, (b, n)),
        "segment_ids": drawn.integers(0, 3, (b, n)),
        "mask": mask,
    }


def specified(name, request):
    config = CONFIGS[name]
    return SPECIFICATIONS[config.model].hidden_states(weights_of(config), **request, config=config)


def close(found, expected, share):
    assert len(found) == len(expected)
    for made, due in zip(found, expected, strict=True):
        np.testing.assert_allclose(made, due, rtol=0, atol=share * np.abs(due).max())


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", CONFIGS)
def test_float64_in_onnx_equals_the_specification(name, opset):
    evaluator = reference.ReferenceEvaluator(built(name, opset, "float64").model)
    for b, n in SHAPES:
        request = request_of(b, n)
        close(evaluator.run(None, request), specified(name, request), 1e-12)


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
@pytest.mark.parametrize(("dtype", "share"), [("float32", 1e-5), ("float64", 1e-12)])
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", CONFIGS)
def test_onnx_runtime_answers_as_the_specification(name, opset, dtype, share, level):
    for b, n in SHAPES:
        request = request_of(b, n)
        found = session(name, opset, dtype, level).run(None, request)
        assert {array.dtype for array in found} == {np.dtype(dtype)}
        close(found, specified(name, request), share)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_file_is_valid_and_takes_every_batch_and_length(name, opset):
    made = built(name, opset, "float32")
    onnx.checker.check_model(made.model, full_check=True)
    assert made.fixed == {}
    assert {entry.domain: entry.version for entry in made.model.opset_import}[""] == opset
    for entry in made.model.graph.input:
        assert all(size.dim_param for size in entry.type.tensor_type.shape.dim)
    config = CONFIGS[name]
    held = {tensor.name: tuple(tensor.dims) for tensor in made.model.graph.initializer}
    assert held == SPECIFICATIONS[config.model].shapes(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_are_calls_of_the_same_local_functions(name):
    made = built(name, 23, "float32").model
    calls = [node.op_type for node in made.graph.node if node.domain == graph.DOMAIN]
    attention = [call for call in calls if "multi_head_attention" in call]
    norms = [call for call in calls if ("layer_norm" if CONFIGS[name].model == "roformer" else "rms_norm") in call]
    assert len(attention) == 2 and len(set(attention)) == 1
    # The embedding's, of another width where it is mapped, and two of every layer.
    assert len(norms) == 5 and len(set(norms)) <= 2
    assert len({function.name for function in made.functions}) == len(made.functions)


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_on_either_side_changes_nothing(name):
    run = session(name, 23, "float64").run
    short = {key: array[:1] for key, array in request_of(3, 11).items()}
    short["mask"] = np.ones((1, 11), np.bool_)
    alone = run(None, short)
    for before, behind in ((4, 0), (0, 4)):
        longer = {key: np.pad(array, ((0, 0), (before, behind))) for key, array in short.items()}
        found = [array[:, before : before + 11] for array in run(None, longer)]
        close(found, alone, 1e-12)


@pytest.mark.parametrize("name", ["roformer", "roformer_v2"])
def test_a_mask_of_numbers_is_refused(name):
    hidden_states = importlib.import_module(f"export.models.{name}").hidden_states
    ids = np.zeros((2, 3), np.int64)

    def call(**inputs):
        weights = {key: graph.initializer(key, array) for key, array in weights_of(CONFIGS[name]).items()}
        return hidden_states(weights, **inputs, config=CONFIGS[name])

    with pytest.raises(DomainError, match="valid must be boolean"):
        graph.build(call, {"token_ids": ids, "segment_ids": ids, "mask": np.ones((2, 3))}, opset=23)


def test_a_kernel_of_another_width_is_refused():
    config = CONFIGS["roformer"]
    other = {**weights_of(config), "layers.1.feed_forward.w_out": np.zeros((6, 12))}
    ids = np.zeros((2, 3), np.int64)

    def call(**inputs):
        made = {key: graph.initializer(key, array) for key, array in other.items()}
        return importlib.import_module("export.models.roformer").hidden_states(made, **inputs, config=config)

    with pytest.raises(ShapeError, match="attention.project"):
        graph.build(call, {"token_ids": ids, "segment_ids": ids, "mask": ids == 0}, opset=23)
