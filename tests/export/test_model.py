"""Exported models: the file is valid, says what it is, answers as the specification, and is written whole or not."""

import hashlib
import importlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import refimpl
from refimpl import model as specification
from refimpl.model import Model
from refimpl.models import _heads, flash, flash_quad, gau_alpha, roformer, roformer_v2

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")
# Only now: these need the packages above.
MODULES = ("export.model", "export.parity", "torchimpl.checkpoint", "export.models.gau_alpha")
model, parity, checkpoint, graph_of_gau = map(importlib.import_module, MODULES)

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "vocab_size": 11, "segments": 3, "hidden_size": 7, "layers": 2, "expanded_size": 13, "key_size": 4,
    "rotary_base": 10000.0,
}  # fmt: skip
CLASSES = (_heads.SequenceClassifier(labels=5, pooling="mean_of_tokens"),)
TASKS = (
    _heads.EntityPointer(types=2, size=4, rotary_base=100.0), _heads.NextSentence(), _heads.Pooler("tanh"),
    _heads.SentenceEmbedding("first_last_average"), _heads.SpanPointer(size=2, rotary_base=100.0),
)  # fmt: skip
CHOICES = (
    _heads.EfficientEntityPointer(types=2, size=4, rotary_base=100.0), _heads.MultipleChoice("first_token"),
    _heads.TiedLM(), _heads.SequenceClassifier(labels=5, pooling="pooler"), _heads.Pooler("linear"),
)  # fmt: skip
TRANSFORMER = {
    "vocab_size": 11, "segments": 2, "embedding_size": 6, "hidden_size": 12, "layers": 2, "heads": 3,
    "intermediate_size": 5,
}  # fmt: skip
GAU = Model(gau_alpha.Config(**SIZES, n_min=1, epsilon=1e-12), CLASSES, "bidirectional")
BIDIRECTIONAL = Model(
    flash.Config(
        **SIZES, chunk=3, mix="bidirectional", kernel="laplace", divisor="chunk", normaliser="visible", rows="paper",
        rotation="half_split", epsilon=1e-6,
    ),
    CLASSES, "bidirectional",
)  # fmt: skip
CAUSAL = Model(
    flash.Config(
        **SIZES, chunk=17, mix="causal", kernel="squared_relu", divisor="root_key_size", normaliser="su",
        rows="lucidrains", rotation="interleaved", epsilon=1e-5,
    ),
    CHOICES, "causal",
)  # fmt: skip
QUADRATIC = Model(
    flash_quad.Config(
        **SIZES, kernel="squared_relu", divisor="visible", length=0, rotation="half_split", epsilon=1e-6
    ),
    CHOICES, "causal",
)  # fmt: skip
MODELS = {
    "gau": GAU,
    "gau unilm": Model(gau_alpha.Config(**{**SIZES, "segments": 2}, n_min=16, epsilon=1e-7), TASKS, "unilm"),
    "bidirectional": BIDIRECTIONAL,
    "causal": CAUSAL,
    "quadratic": QUADRATIC,
    "roformer": Model(
        roformer.dialect("bert4keras-0.11.5", **TRANSFORMER), (*TASKS, _heads.TransformedLM()), "bidirectional"
    ),
    "roformer_v2": Model(roformer_v2.dialect("bert4keras-0.11.5", **TRANSFORMER), CHOICES, "causal"),
}

# The model, opset, dtype and inline of a file.
FILES = [
    ("gau", 23, "float32", False),
    ("gau", 20, "float32", True),
    ("gau", 20, "float64", False),
    ("bidirectional", 20, "float32", False),
    ("bidirectional", 23, "float64", True),
    ("causal", 23, "float32", False),
    ("causal", 20, "float64", True),
    ("quadratic", 23, "float32", False),
    ("quadratic", 20, "float64", True),
    ("gau unilm", 23, "float32", False),
    ("roformer", 23, "float32", False),
    ("roformer", 20, "float32", True),
    ("roformer_v2", 23, "float32", False),
]


def weights(whole):
    drawn = np.random.default_rng(0)
    shapes = specification.shapes(whole)
    return {name: drawn.normal(size=shape).astype(np.float32) / 2 for name, shape in shapes.items()}


def save(folder, whole):
    checkpoint.save(folder, whole, {name: torch.from_numpy(array) for name, array in weights(whole).items()})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    return {name: save(place / name, whole) for name, whole in MODELS.items()}


@pytest.fixture(scope="module")
def written(folders, tmp_path_factory):
    """One file for each entry of FILES, made when it is first asked for."""

    @cache
    def made(name, opset, dtype, inline):
        path = tmp_path_factory.mktemp("files") / "model.onnx"
        found = model.export(folders[name], path, opset=opset, dtype=dtype, inline=inline)
        return SimpleNamespace(model=MODELS[name], path=path, found=found, proto=onnx.load(path))

    return made


# Module scope, so that pytest asks everything about one file before the next.
@pytest.fixture(scope="module", params=FILES, ids=lambda file: "-".join(map(str, file)))
def asked(request):
    return request.param


@pytest.fixture
def file(written, asked):
    return written(*asked)


def below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_the_file_is_valid_and_is_what_was_asked_for(file, asked):
    _, opset, dtype, inline = asked
    onnx.checker.check_model(str(file.path), full_check=True)
    assert {entry.domain: entry.version for entry in file.proto.opset_import}[""] == opset
    # What runtimes of that time read.
    assert file.proto.ir_version == 10
    assert bool(file.proto.functions) == (not inline)
    assert any(node.domain == "refimpl" for node in file.proto.graph.node) == (not inline)
    for node in (node for body in (file.proto.graph, *file.proto.functions) for node in body.node):
        if not node.domain:
            # Raises for an operator that is newer than the opset.
            onnx.defs.get_schema(node.op_type, opset)


def test_inputs_and_outputs_share_an_open_batch_and_length(file, asked):
    kinds = {onnx.TensorProto.INT64: "int64", onnx.TensorProto.BOOL: "bool"}
    kinds |= {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.DOUBLE: "float64"}

    def told(entries):
        types = [(entry.name, entry.type.tensor_type) for entry in entries]
        sizes = [[size.dim_param or size.dim_value for size in kind.shape.dim] for _, kind in types]
        return [(name, kinds[kind.elem_type], *s) for (name, kind), s in zip(types, sizes, strict=True)]

    dtype, d = asked[2], file.model.config.hidden_size
    lead = ["batch", "choices"] if file.model.choosing else ["batch"]
    assert told(file.proto.graph.input) == [
        ("token_ids", "int64", *lead, "length"),
        ("segment_ids", "int64", *lead, "length"),
        ("mask", "bool", *lead, "length"),
    ]
    due = {
        "last_hidden_state": ["length", d],
        "mlm_logits": ["length", 11],
        "pooled": [d],
        "next_sentence_logits": [2],
        "logits": [5],
        "embedding": [d],
        "choice_logits": [],
        "entity_scores": [2, "length", "length"],
        "span_scores": ["length", "length"],
    }
    expected = [(name, dtype, *lead, *due[name]) for name in specification.outputs(file.model)]
    assert told(file.proto.graph.output) == expected


def test_weights_keep_their_names_and_are_stored_once(file, asked):
    expected = weights(file.model)
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in file.proto.graph.initializer}
    assert len(file.proto.graph.initializer) == len(expected)
    assert list(held) == list(expected)
    for name, array in expected.items():
        assert held[name].dtype == asked[2]
        np.testing.assert_array_equal(held[name], array)


def test_the_metadata_tell_what_the_file_is(file, asked, folders):
    name, opset, dtype, _ = asked
    told = {entry.key: entry.value for entry in file.proto.metadata_props}
    assert specification.from_dict(json.loads(told.pop("refimpl.model"))) == file.model
    figures = json.loads(told.pop("refimpl.parity"))
    assert figures == [each._asdict() for each in file.found]
    assert [each["dtype"] for each in figures] == ["float64", dtype]
    assert told == {
        "refimpl.format": "2",
        "refimpl.dtype": dtype,
        "refimpl.opset": str(opset),
        "refimpl.weights.sha256": hashlib.sha256((folders[name] / "model.safetensors").read_bytes()).hexdigest(),
    }
    assert (file.proto.producer_name, file.proto.producer_version) == ("refimpl", refimpl.__version__)


# Neither building nor the comparison before writing has these.
@pytest.mark.parametrize(("b", "n"), [(7, 37), (3, 130), (5, 11)])
def test_it_answers_as_the_specification(file, asked, b, n):
    drawn = np.random.default_rng(b * n)
    request = {
        "token_ids": drawn.integers(0, 11, (b, n)),
        "segment_ids": drawn.integers(0, 2, (b, n)),
        # Any mask, among them one without a token.
        "mask": (drawn.random((b, n)) < 0.7) & (np.arange(b) != 1)[:, None],
    }
    if file.model.choosing:
        # Two questions, of as many choices.
        request = {name: np.stack([array, array[::-1]]) for name, array in request.items()}
    expected = specification.forward(weights(file.model), **request, model=file.model)
    session = onnxruntime.InferenceSession(file.path, providers=["CPUExecutionProvider"])
    share = {"float32": 1e-5, "float64": 1e-12}[asked[2]]
    for made, (name, reference) in zip(session.run(None, request), expected.items(), strict=True):
        assert made.dtype == asked[2]
        largest = np.abs(reference[np.isfinite(reference)]).max()
        np.testing.assert_allclose(made, reference, rtol=0, atol=share * largest, err_msg=name)


def test_the_same_folder_gives_the_same_bytes(written, folders, tmp_path):
    path = written("bidirectional", 20, "float32", False).path
    code = (
        "import sys; from pathlib import Path; from export.model import export\n"
        "export(Path(sys.argv[1]), Path(sys.argv[2]), opset=20)"
    )
    # Another name, another process, another order of sets: that of this process is drawn.
    other = save(tmp_path / "other", BIDIRECTIONAL)
    words = [sys.executable, "-c", code, other, tmp_path / "other.onnx"]
    subprocess.run(words, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "1"}, check=True)
    assert (tmp_path / "other.onnx").read_bytes() == path.read_bytes()
    # In one process, after other models.
    model.export(folders["gau"], tmp_path / "gau.onnx")
    model.export(folders["bidirectional"], tmp_path / "again.onnx", opset=20)
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


def test_the_folder_of_the_file_is_made(folders, tmp_path):
    model.export(folders["gau"], tmp_path / "new" / "deep" / "gau.onnx")
    assert below(tmp_path) == ["new", "new/deep", "new/deep/gau.onnx"]
    onnx.load(tmp_path / "new" / "deep" / "gau.onnx")


def test_a_file_is_replaced(folders, tmp_path):
    (tmp_path / "gau.onnx").write_bytes(b"mine")
    model.export(folders["gau"], tmp_path / "gau.onnx")
    assert below(tmp_path) == ["gau.onnx"]
    onnx.load(tmp_path / "gau.onnx")


def stopped(error):
    def call(*arguments, **named):
        raise error

    return call


@pytest.mark.parametrize(
    ("place", "name", "error"),
    [
        (parity, "check", KeyboardInterrupt()),
        (parity, "check", parity.ParityError("off")),
        (onnx.checker, "check_model", onnx.checker.ValidationError("invalid")),
        (os, "fsync", KeyboardInterrupt()),
        (os, "replace", OSError("full")),
    ],
)
@pytest.mark.parametrize("there", [False, True])
def test_what_is_stopped_leaves_nothing(folders, tmp_path, monkeypatch, place, name, error, there):
    if there:
        (tmp_path / "gau.onnx").write_bytes(b"mine")
    with monkeypatch.context() as patched, pytest.raises(type(error)):
        patched.setattr(place, name, stopped(error))
        model.export(folders["gau"], tmp_path / "gau.onnx")
    assert below(tmp_path) == ["gau.onnx"] * there
    assert not there or (tmp_path / "gau.onnx").read_bytes() == b"mine"


def test_a_graph_that_is_off_makes_no_folder(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "check", stopped(parity.ParityError("off")))
    with pytest.raises(parity.ParityError):
        model.export(folders["gau"], tmp_path / "new" / "gau.onnx")
    assert below(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 21}, r"opset among \(20, 23\), received 21"),
        ({"opset": "23"}, "received 23"),
        ({"dtype": "float16"}, "dtype among .*'float32', 'float64'.*, received 'float16'"),
        ({"file": Path()}, r"name of a file to write, received the folder \."),
    ],
)
def test_what_cannot_be_asked_for_is_refused_before_anything_is_read(tmp_path, options, message):
    named = {"file": tmp_path / "gau.onnx"} | options
    with pytest.raises(model.ExportError, match=message):
        model.export(tmp_path / "absent", **named)


def test_a_folder_that_is_no_model_or_is_damaged_is_refused(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="absent is no model folder"):
        model.export(tmp_path / "absent", tmp_path / "new" / "gau.onnx")
    held = save(tmp_path / "gau", GAU) / "model.safetensors"
    data = bytearray(held.read_bytes())
    data[-1] ^= 1
    held.write_bytes(data)
    with pytest.raises(checkpoint.CheckpointError, match="model.safetensors is not the file that was written"):
        model.export(tmp_path / "gau", tmp_path / "new" / "gau.onnx")
    assert not (tmp_path / "new").exists()


def test_weights_that_do_not_fit_into_one_file_are_refused(folders, tmp_path, monkeypatch):
    size = sum(array.nbytes for array in weights(GAU).values())
    monkeypatch.setattr(model, "LARGEST", size)
    message = f"the weights have {size} bytes in float32; one ONNX file holds less than {size}"
    with pytest.raises(model.ExportError, match=message):
        model.export(folders["gau"], tmp_path / "gau.onnx")
    # Twice as much in float64: it is the file's own format that counts, and its twin is never written.
    monkeypatch.setattr(model, "LARGEST", int(1.5 * size))
    with pytest.raises(model.ExportError, match=f"the weights have {2 * size} bytes in float64"):
        model.export(folders["gau"], tmp_path / "gau.onnx", dtype="float64")
    assert below(tmp_path) == []
    model.export(folders["gau"], tmp_path / "gau.onnx")
    assert below(tmp_path) == ["gau.onnx"]


def test_a_twin_holds_no_weights_and_gives_the_same(written):
    exact = {name: array.astype(np.float64) for name, array in weights(GAU).items()}
    twin, whole = (model.build(GAU, exact, stored=stored) for stored in (False, True))
    assert not twin.graph.initializer and len(whole.graph.initializer) == len(exact)
    assert [node.SerializeToString() for node in twin.graph.node] == [
        node.SerializeToString() for node in whole.graph.node
    ]
    ids = np.array([[1, 2, 3]])
    request = {"token_ids": ids, "segment_ids": 0 * ids, "mask": ids > 1}
    reference = importlib.import_module("onnx.reference").ReferenceEvaluator
    for one, other in zip(
        reference(twin).run(None, {**exact, **request}), reference(whole).run(None, request), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_the_tied_table_is_stored_once(written):
    file = written("roformer", 23, "float32", False)
    names = [tensor.name for tensor in file.proto.graph.initializer]
    assert names.count("embedding.token") == 1 and "mlm.bias" in names
    assert sum(list(tensor.dims) in ([11, 6], [6, 11]) for tensor in file.proto.graph.initializer) == 1


def test_a_graph_that_takes_one_length_only_is_refused(monkeypatch):
    def fixing(held, token_ids, *rest, **named):
        int(token_ids.shape[1])
        return forward(held, token_ids, *rest, **named)

    forward = graph_of_gau.hidden_states
    monkeypatch.setattr(graph_of_gau, "hidden_states", fixing)
    with pytest.raises(model.ExportError, match=r"gau_alpha takes only \{\('token_ids', 1\): 3\}"):
        model.build(GAU, weights(GAU))


def test_an_encoder_alone_is_exported(tmp_path):
    whole = Model(MODELS["roformer_v2"].config, (), "bidirectional")
    model.export(save(tmp_path / "model", whole), tmp_path / "model.onnx")
    assert [entry.name for entry in onnx.load(tmp_path / "model.onnx").graph.output] == ["last_hidden_state"]
