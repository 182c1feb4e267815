"""Graphs that give every layer and take positions: the specification, for every model; the default graph without."""

import importlib
from functools import cache

import numpy as np
import pytest

from refimpl import model as specification
from refimpl.check import DomainError
from refimpl.model import Model
from refimpl.models import _heads, flash, flash_quad, gau_alpha, roformer, roformer_v2

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("torch")
# Only now: these need the packages above.
exporting, graph, parity = map(importlib.import_module, ("export.model", "export.graph", "export.parity"))
reference = importlib.import_module("onnx.reference")

UNITS = {
    "vocab_size": 11, "segments": 2, "hidden_size": 7, "layers": 3, "expanded_size": 13, "key_size": 4,
    "rotary_base": 10000.0,
}  # fmt: skip
TRANSFORMER = {
    "vocab_size": 11, "segments": 2, "embedding_size": 6, "hidden_size": 12, "layers": 3, "heads": 3,
    "intermediate_size": 5,
}  # fmt: skip
MIXED = {
    "chunk": 3, "kernel": "laplace", "divisor": "chunk", "normaliser": "visible", "rows": "paper",
    "rotation": "half_split", "epsilon": 1e-6,
}  # fmt: skip
POINTERS = (
    _heads.EntityPointer(types=2, size=4, rotary_base=100.0), _heads.SpanPointer(size=2, rotary_base=100.0),
    _heads.SequenceClassifier(labels=5, pooling="first_last_average"),
)  # fmt: skip
CHOICES = (
    _heads.EfficientEntityPointer(types=2, size=4, rotary_base=100.0), _heads.MultipleChoice("mean_of_tokens"),
    _heads.TiedLM(),
)  # fmt: skip
QUAD = {"kernel": "squared_relu", "rotation": "interleaved", "epsilon": 1e-6}
CONFIGS = {
    "roformer": roformer.dialect("bert4keras-0.11.5", **TRANSFORMER),
    "roformer_v2": roformer_v2.dialect("bert4keras-0.11.5", **TRANSFORMER),
    "gau_alpha": gau_alpha.Config(**UNITS, n_min=1, epsilon=1e-12),
    "flash": flash.Config(**UNITS, **MIXED, mix="bidirectional"),
    "flash_quad": flash_quad.Config(**UNITS, **QUAD, divisor="visible", length=0),
}
MODELS = {
    "roformer": Model(CONFIGS["roformer"], (*POINTERS, _heads.TransformedLM()), "bidirectional"),
    "roformer causal": Model(CONFIGS["roformer"], (_heads.TransformedLM(),), "causal"),
    "roformer_v2": Model(CONFIGS["roformer_v2"], (*POINTERS, _heads.TiedLM()), "unilm"),
    "roformer_v2 causal": Model(CONFIGS["roformer_v2"], CHOICES, "causal"),
    "gau_alpha": Model(CONFIGS["gau_alpha"], POINTERS, "bidirectional"),
    "gau_alpha causal": Model(CONFIGS["gau_alpha"], (), "causal"),
    "flash": Model(CONFIGS["flash"], POINTERS, "bidirectional"),
    "flash causal": Model(flash.Config(**UNITS, **MIXED, mix="causal"), CHOICES, "causal"),
    "flash_quad": Model(CONFIGS["flash_quad"], POINTERS, "bidirectional"),
    "flash_quad causal": Model(
        flash_quad.Config(**UNITS, **QUAD, divisor="constant", length=9), (_heads.TiedLM(),), "causal"
    ),
    "flash_quad array": Model(flash_quad.Config(**UNITS, **QUAD, divisor="array", length=0), (), "unilm"),
}
# The dtype and what reads it. In ONNX Runtime both opsets are run: operator 23 rotates by itself there.
READERS = {
    "onnx": ("float64", 23),
    "onnxruntime float64": ("float64", 20),
    "onnxruntime float32": ("float32", 23),
    "onnxruntime float32, primitives": ("float32", 20),
}


@cache
def weights_of(name):
    # Rounded, so that both formats hold the same numbers.
    drawn = np.random.default_rng(3)
    shapes = specification.shapes(MODELS[name])
    return {key: (drawn.normal(size=shape) / 2).astype(np.float32).astype(float) for key, shape in shapes.items()}


@cache
def built(name, dtype="float64", opset=23, layers=True, positions=True):
    held = {key: array.astype(dtype) for key, array in weights_of(name).items()}
    return exporting.build(MODELS[name], held, opset=opset, layers=layers, positions=positions)


def session_of(proto):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def requests():
    """Rows whose positions have nothing in common: with jumps, back, below 0, far away, all equal; padding anywhere."""
    drawn = np.random.default_rng(7)
    for n in (1, 2, 7, 19):
        at = np.arange(n)
        positions = np.stack(
            [at, 3 * at + 5, np.where(at < n // 2, at, at + 100), at[::-1], at - 40, 0 * at + 9, drawn.permutation(n)]
            + [at + 123456, drawn.integers(-500, 500, n)]
        )
        b = len(positions)
        mask = drawn.random((b, n)) < 0.8
        # Padding on the left and on the right, no token, no padding.
        mask[0], mask[1], mask[2], mask[3] = at >= n // 3, at < max(n // 2, 1), False, True
        segment_ids = np.sort(drawn.integers(0, 2, (b, n)), axis=1)
        yield {
            "token_ids": drawn.integers(0, 11, (b, n)), "segment_ids": segment_ids, "mask": mask,
            "positions": positions,
        }  # fmt: skip


def request_of(model, request):
    """Three questions of three choices where the model chooses."""
    if not model.choosing:
        return request
    return {key: array.reshape(3, 3, -1) for key, array in request.items()}


def specified(name, request, weights=None):
    held, model = weights or weights_of(name), MODELS[name]
    states = specification.hidden_states(held, **request, model=model)
    made = specification.forward(held, **request, model=model)
    return {**made, **{f"hidden_states.{i}": state for i, state in enumerate(states)}}


@cache
def asked_of(name):
    """All requests, what the specification gives, and how far one rounding of every weight moves it."""
    asked = [parity.Case(str(i), request_of(MODELS[name], one)) for i, one in enumerate(requests())]
    expected = [list(specified(name, case.inputs).values()) for case in asked]

    def forward(weights, request):
        return list(specified(name, request, weights).values())

    moved = parity.sensitivity(forward, weights_of(name), asked, expected)
    return asked, expected, dict(zip(specified(name, asked[0].inputs), moved, strict=True))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", MODELS)
def test_layers_and_positions_are_those_of_the_specification(name, reader):
    dtype, opset = READERS[reader]
    proto = built(name, dtype, opset)
    onnx.checker.check_model(proto, full_check=True)
    asked, expected, moved = asked_of(name)
    assert list(moved) == [entry.name for entry in proto.graph.output]
    allowed = parity.bounds(dtype, moved)
    if dtype == "float64":
        assert set(allowed.values()) == {1e-12}
    run = reference.ReferenceEvaluator(proto).run if reader == "onnx" else session_of(proto).run
    parity.compare(reader, dtype, lambda inputs: run(None, dict(inputs)), asked, expected, bounds=allowed)


@pytest.mark.parametrize("name", MODELS)
def test_positions_enter_and_counting_is_what_they_are_without(name):
    request = request_of(MODELS[name], list(requests())[2])
    given, plain = session_of(built(name)), session_of(built(name, positions=False))
    names = [entry.name for entry in given.get_outputs()]
    counted = {**request, "positions": np.broadcast_to(np.arange(7), request["token_ids"].shape)}
    rest = {key: array for key, array in request.items() if key != "positions"}
    for one, other in zip(given.run(None, counted), plain.run(None, rest), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-13 * np.abs(one[np.isfinite(one)]).max())
    # The embedding is the one thing that does not turn.
    moved = dict(zip(names, given.run(None, {**request, "positions": 3 * counted["positions"]}), strict=True))
    for key, array in zip(names, given.run(None, counted), strict=True):
        with np.errstate(invalid="ignore"):
            far = np.nanmax(np.where(np.isinf(array), 0, np.abs(moved[key] - array)))
        assert (far == 0) == (key == "hidden_states.0"), key


def test_padding_on_the_left_is_stepped_over():
    """[0 0 a b c] at the positions 0 0 0 1 2 is [a b c]: each option alone too."""
    short = {key: array[2:5, :3] for key, array in list(requests())[2].items()}
    short = {**short, "mask": np.ones((3, 3), np.bool_), "positions": np.tile([0, 1, 2], (3, 1))}
    longer = {key: np.pad(array, ((0, 0), (2, 0))) for key, array in short.items()}
    for name in ("roformer", "gau_alpha causal", "flash_quad causal"):
        alone = {key: array for key, array in short.items() if key != "positions"}
        layers = session_of(built(name, positions=False)).run(None, alone)
        plain = session_of(built(name, layers=False))
        assert [entry.name for entry in plain.get_outputs()] == list(specification.outputs(MODELS[name]))
        last = plain.run(["last_hidden_state"], longer)[0]
        np.testing.assert_allclose(last[:, 2:], layers[0], rtol=0, atol=1e-12 * np.abs(layers[0]).max())


@pytest.mark.parametrize("name", ["roformer", "flash causal"])
def test_inputs_and_outputs_say_their_sizes(name):
    def told(entries):
        kinds = [(entry.name, entry.type.tensor_type) for entry in entries]
        return {name: [size.dim_param or size.dim_value for size in kind.shape.dim] for name, kind in kinds}

    model, proto = MODELS[name], built(name, "float32")
    lead, d = ["batch", "choices"] if model.choosing else ["batch"], model.config.hidden_size
    assert told(proto.graph.input) == dict.fromkeys([*exporting.INPUTS, "positions"], [*lead, "length"])
    assert proto.graph.input[3].type.tensor_type.elem_type == onnx.TensorProto.INT64
    outputs = told(proto.graph.output)
    assert [outputs[f"hidden_states.{i}"] for i in range(4)] == [[*lead, "length", d]] * 4
    # No more than that is added.
    plain = exporting.build(model, {key: array.astype("float32") for key, array in weights_of(name).items()})
    assert [entry.name for entry in plain.graph.input] == list(exporting.INPUTS)
    assert [entry.name for entry in plain.graph.output] == list(specification.outputs(model))


def test_positions_that_are_no_integers_are_refused():
    ids, config = np.zeros((2, 3), np.int64), CONFIGS["gau_alpha"]
    module = importlib.import_module("export.models.gau_alpha")

    def call(**inputs):
        weights = {key: graph.initializer(key, array) for key, array in weights_of("gau_alpha").items()}
        return module.hidden_states(weights, **inputs, config=config)

    examples = {"token_ids": ids, "segment_ids": ids, "mask": ids == 0, "positions": ids == 0}
    with pytest.raises(DomainError, match="positions must be integers, received dtype bool"):
        graph.build(call, examples, opset=23)


def test_the_runtime_refuses_a_file_with_another_input(tmp_path):
    sessions = importlib.import_module("runtime.session")
    proto = built("gau_alpha", "float32", layers=False)
    told = {"refimpl.format": "2", "refimpl.model": importlib.import_module("json").dumps(
        specification.to_dict(MODELS["gau_alpha"])
    )}  # fmt: skip
    onnx.helper.set_model_props(proto, told)
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(
        sessions.SessionError, match="takes token_ids, segment_ids, mask, positions; expected token_ids,"
    ):
        sessions.Session(tmp_path / "model.onnx")
