"""`refimpl models`: what it lists, what it runs against transformers and against originals, and what it explains."""

import importlib
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from refimpl import model as specification
from refimpl.check import DomainError
from refimpl.model import Model
from refimpl.models import _heads, gau_alpha
from tests.golden import checkpoints
from tests.golden import originals as by_hand

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")
testing = pytest.importorskip("typer.testing")
# Only now: these need the packages above.
MODULES = ("export.models_command", "export.running", "export.model", "torchimpl.checkpoint", "torchimpl.convert")
command, running, exporting, checkpoint, converting = map(importlib.import_module, MODULES)

PLAIN = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1", "FORCE_COLOR": None}
OLD, NEW = "bert4keras-0.11.3", "bert4keras-0.11.5"


def models(*words):
    return testing.CliRunner().invoke(command.app, ["models", *map(str, words)], env=PLAIN)


def refused(*words):
    done = models(*words)
    assert (done.exit_code, done.stdout) == (2, "")
    return done.stderr


def far(got, expected):
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.fixture
def gau(tmp_path):
    """bert4keras' GAU-α, its ids as a file, and what it gave."""
    io = checkpoints.gau_alpha(tmp_path / "gau")
    np.savez(tmp_path / "ids.npz", token_ids=io["token_ids"], segment_ids=io["segment_ids"])
    return tmp_path / "gau", tmp_path / "ids.npz", io


@pytest.fixture
def junnyu(tmp_path):
    tensors, io = checkpoints.junnyu()
    return checkpoints.write(tmp_path / "junnyu", tensors, checkpoints.JUNNYU), io


def hugging_face(tmp_path, **options):
    """A tiny RoFormer of transformers with random weights that are not small, and its own folder."""
    transformers = pytest.importorskip("transformers")
    config = transformers.RoFormerConfig(
        vocab_size=31, embedding_size=10, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=20, max_position_embeddings=32, type_vocab_size=3, layer_norm_eps=3e-3,
        attn_implementation="eager", **options,
    )  # fmt: skip
    torch.manual_seed(2)
    model = transformers.RoFormerForMaskedLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_positions" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.eval().save_pretrained(tmp_path / "hf", max_shard_size=options.get("max_shard_size", "1GB"))
    rng = np.random.default_rng(0)
    inputs = {
        "input_ids": rng.integers(0, 31, (3, 13)),
        "token_type_ids": rng.integers(0, 3, (3, 13)),
        "attention_mask": (np.arange(13) < np.array([[13], [5], [1]])).astype(np.int64),
    }
    np.savez(tmp_path / "ids.npz", **inputs)
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with torch.no_grad():
        given = model(**tensors, output_hidden_states=True)
    return tmp_path / "hf", tmp_path / "ids.npz", given


# transformers calculates in float32 with tables of float32.
@pytest.mark.parametrize("backend", ["numpy", "torch", "onnx"])
def test_a_hugging_face_folder_gives_what_transformers_gives(tmp_path, backend):
    folder, ids, given = hugging_face(tmp_path)
    words = ("run", folder, "--inputs", ids, "--out", tmp_path / "out.npz", "--backend", backend, "--layers")
    done = models(*words, "--dtype", "float32")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path / 'out.npz'}: last_hidden_state (3, 13, 24), mlm_logits (3, 13, 31)")
    out = dict(np.load(tmp_path / "out.npz"))
    assert {array.dtype for array in out.values()} == {np.dtype(np.float32)}
    assert far(out["mlm_logits"], given.logits.numpy()) < 5e-6
    assert far(out["last_hidden_state"], given.hidden_states[-1].numpy()) < 5e-6
    assert list(out) == ["last_hidden_state", "mlm_logits", *(f"hidden_states.{i}" for i in range(3))]
    for i, state in enumerate(given.hidden_states):
        assert far(out[f"hidden_states.{i}"], state.numpy()) < 5e-6


def test_a_causal_decoder_of_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, ids, _ = hugging_face(tmp_path, is_decoder=True)
    model = transformers.RoFormerForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    inputs = {name: torch.from_numpy(array) for name, array in np.load(ids).items()}
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits.numpy()
    assert models("run", folder, "--inputs", ids, "--out", tmp_path / "out.npz").exit_code == 0
    assert far(np.load(tmp_path / "out.npz")["mlm_logits"], expected) < 5e-6
    # Without the triangle it is another model.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_decoder": False}))
    assert models("run", folder, "--inputs", ids, "--out", tmp_path / "out.npz").exit_code == 0
    assert far(np.load(tmp_path / "out.npz")["mlm_logits"], expected) > 1e-2


def test_shards_and_an_encoder_alone_as_transformers_saves_them(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, ids, given = hugging_face(tmp_path)
    model = transformers.RoFormerForMaskedLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    model.roformer.save_pretrained(tmp_path / "bare")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    for name, outputs in (("shards", 2), ("bare", 1)):
        assert models("run", tmp_path / name, "--inputs", ids, "--out", tmp_path / "out.npz").exit_code == 0
        out = np.load(tmp_path / "out.npz")
        assert len(list(out)) == outputs
        assert far(out["last_hidden_state"], given.hidden_states[-1].numpy()) < 5e-6


@pytest.mark.parametrize("backend", ["numpy", "torch", "onnx"])
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-13), ("float32", 5e-6)])
def test_gau_alpha_in_every_backend(gau, tmp_path, backend, dtype, bound):
    folder, ids, io = gau
    words = ("run", folder, "--inputs", ids, "--out", tmp_path / "new" / "out.npz", "--backend", backend)
    done = models(*words, "--dtype", dtype, "--dialect", NEW, "--mask-from-ids", "bert4keras")
    assert (done.exit_code, done.stderr) == (0, "")
    out = np.load(tmp_path / "new" / "out.npz")
    assert out["last_hidden_state"].dtype == dtype
    assert far(out["last_hidden_state"], io["0.11.5/last_hidden_state"]) < bound
    assert far(out["mlm_logits"][:, ::5], io["0.11.5/mlm_logits"]) < bound


def test_numpy_in_float32_is_float64_on_rounded_weights(junnyu, tmp_path):
    folder, io = junnyu
    inputs = {name: io[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
    np.savez(tmp_path / "ids.npz", **inputs)
    given = running.inputs(tmp_path / "ids.npz")
    double, single = (running.run(folder, given, dtype=dtype) for dtype in ("float64", "float32"))
    # The weights are stored in float32, so only the outputs are rounded.
    assert all(np.array_equal(array.astype(np.float32), single[name]) for name, array in double.items())


def test_weights_in_float64_are_rounded_for_float32(gau, tmp_path):
    folder, ids, _ = gau
    converting.convert(folder, tmp_path / "model", dialect=NEW, dtype="float64")
    held = checkpoint.load(tmp_path / "model")
    # Between two numbers of float32, and nearer to the first.
    finer = {name: tensor * (1 + 2.0**-26) for name, tensor in held.weights.items()}
    checkpoint.save(tmp_path / "finer", held.model, finer)
    given = running.inputs(ids)
    for dtype, equal in (("float32", True), ("float64", False)):
        one, other = (running.run(tmp_path / name, given, dtype=dtype) for name in ("model", "finer"))
        assert np.array_equal(one["mlm_logits"], other["mlm_logits"]) == equal


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_weights_that_only_float64_holds_are_not_rounded(gau, tmp_path, backend):
    folder, ids, _ = gau
    file = running.inputs(ids)
    held, weights = running._model(folder, None, None, OLD)
    rng = np.random.default_rng(3)
    weights = {
        name: w.double() * torch.from_numpy(1 + rng.uniform(-1e-8, 1e-8, w.shape)) for name, w in weights.items()
    }
    assert any(not torch.equal(w, w.float().double()) for w in weights.values())
    checkpoint.save(tmp_path / "wide", held, weights)
    expected = running.run(tmp_path / "wide", file)["last_hidden_state"]
    assert far(running.run(tmp_path / "wide", file, backend=backend)["last_hidden_state"], expected) < 1e-13


def test_no_mask_is_derived_unless_it_is_asked_for(gau, tmp_path):
    folder, ids, io = gau
    assert models("run", folder, "--inputs", ids, "--out", tmp_path / "o.npz", "--dialect", NEW).exit_code == 0
    assert far(np.load(tmp_path / "o.npz")["last_hidden_state"], io["0.11.5/last_hidden_state"]) > 1e-2
    mask = io["token_ids"] != 0
    np.savez(tmp_path / "m.npz", token_ids=io["token_ids"], segment_ids=io["segment_ids"], mask=mask)
    words = ("run", folder, "--inputs", tmp_path / "m.npz", "--out", tmp_path / "o.npz", "--dialect", NEW)
    assert models(*words).exit_code == 0
    assert far(np.load(tmp_path / "o.npz")["last_hidden_state"], io["0.11.5/last_hidden_state"]) < 1e-13
    message = refused(
        "run", folder, "--inputs", tmp_path / "m.npz", "--out", tmp_path / "no.npz", "--dialect", NEW,
        "--mask-from-ids", "bert4keras",
    )  # fmt: skip
    assert "mask_from_ids: expected no mask among the inputs, received one" in message
    assert not (tmp_path / "no.npz").exists()


def test_a_model_folder_runs_in_its_own_dialect_or_in_another(gau, tmp_path):
    folder, ids, io = gau
    converting.convert(folder, tmp_path / "model", dialect=OLD)
    words = ("run", tmp_path / "model", "--inputs", ids, "--out", tmp_path / "o.npz", "--mask-from-ids", "bert4keras")
    for dialect, release in ((None, "0.11.3"), (NEW, "0.11.5"), ("bert4keras-0.11.4", "0.11.4")):
        assert models(*words, *(["--dialect", dialect] if dialect else [])).exit_code == 0
        assert far(np.load(tmp_path / "o.npz")["last_hidden_state"], io[f"{release}/last_hidden_state"]) < 1e-13
    assert "no model for a model folder" in refused(*words, "--model", "gau_alpha")
    assert "expected one of bert4keras-0.11.3" in refused(*words, "--dialect", "su")


def test_positions_and_batches(gau, tmp_path, monkeypatch):
    folder, ids, io = gau
    given = running.inputs(ids)
    once = running.run(folder, given, dialect=NEW, mask_from_ids="bert4keras")
    # Only differences of positions enter.
    moved = np.broadcast_to(np.arange(26) + 7, given["token_ids"].shape)
    shifted = running.run(folder, {**given, "positions": moved}, dialect=NEW, mask_from_ids="bert4keras")
    assert far(shifted["mlm_logits"], once["mlm_logits"]) < 1e-12
    spread = running.run(folder, {**given, "positions": 2 * moved}, dialect=NEW, mask_from_ids="bert4keras")
    assert far(spread["mlm_logits"], once["mlm_logits"]) > 1e-3
    # One text at a time, with its own positions.
    monkeypatch.setattr(running, "LARGEST_SCORES", 1)
    parts = running.run(folder, given, dialect=NEW, mask_from_ids="bert4keras")
    assert all(far(parts[name], array) < 1e-13 for name, array in once.items())
    rows = {**given, "positions": np.stack([np.arange(26) * factor for factor in (5, -3)])}
    numpy, torch_, graph = (
        running.run(folder, rows, dialect=NEW, mask_from_ids="bert4keras", backend=backend, layers=True)
        for backend in running.BACKENDS
    )
    assert list(numpy) == list(torch_) == list(graph) and "hidden_states.0" in numpy
    for name, array in numpy.items():
        assert far(graph[name], array) < 1e-12 and far(torch_[name], array) < 1e-12
    assert far(numpy["mlm_logits"], once["mlm_logits"]) > 1e-3


def test_a_model_that_chooses_is_refused(tmp_path):
    config = gau_alpha.dialect(NEW, vocab_size=11, hidden_size=6, layers=1, expanded_size=8, key_size=4, segments=2)
    model = Model(config, (_heads.MultipleChoice("first_token"),), "bidirectional")
    weights = {name: torch.zeros(shape) for name, shape in specification.shapes(model).items()}
    checkpoint.save(tmp_path / "model", model, weights)
    for backend in running.BACKENDS:
        with pytest.raises(running.RunError, match=r"expected a model of one text a row, received the head multiple_"):
            running.run(tmp_path / "model", {"token_ids": IDS}, backend=backend)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backend", "jax"], "backend: expected one of numpy, torch, onnx, received 'jax'"),
        (["--dtype", "float16"], "dtype: expected one of float64, float32, received 'float16'"),
        (["--mask-from-ids", "hf"], "mask_from_ids: expected one of bert4keras, received 'hf'"),
    ],
)
def test_options_of_run_that_stop_it(gau, tmp_path, words, message):
    folder, ids, _ = gau
    assert message in refused("run", folder, "--inputs", ids, "--out", tmp_path / "o.npz", "--dialect", NEW, *words)
    assert not (tmp_path / "o.npz").exists()


IDS = np.arange(6).reshape(2, 3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ids": IDS}, "expected arrays named token_ids, input_ids, segment_ids, .*, received ids"),
        ({"segment_ids": IDS}, "expected an array token_ids or input_ids, received segment_ids"),
        ({"token_ids": IDS, "input_ids": IDS}, "expected one of token_ids and input_ids, received both"),
        ({"token_ids": IDS[0]}, r"expected token_ids of shape \(b, n\), neither of them 0, received \(3,\)"),
        ({"token_ids": IDS[:0]}, r"neither of them 0, received \(0, 3\)"),
        ({"token_ids": IDS, "mask": IDS[:1]}, r"expected mask of the shape \(2, 3\) of token_ids, received \(1, 3\)"),
        ({"token_ids": IDS, "mask": IDS}, "expected a mask of 0 and 1, received other numbers"),
        ({"token_ids": IDS.astype(float)}, "expected token_ids of whole numbers, received float64"),
        ({"token_ids": IDS.astype(object)}, "allow_pickle=False|bytes of numbers"),
        ({"token_ids": IDS + 200}, r"expected token_ids from 0 to 119 \(vocab_size 120\), received 200"),
    ],
)
def test_inputs_that_stop_it(gau, tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    words = ("run", gau[0], "--inputs", tmp_path / "bad.npz", "--out", tmp_path / "o.npz", "--dialect", NEW)
    import re

    assert re.search(message, refused(*words))


# ONNX Runtime would read the table from its end.
@pytest.mark.parametrize("backend", ["numpy", "torch", "onnx"])
def test_ids_beyond_the_table_are_refused_by_every_backend(gau, backend):
    for given, message in (
        ({"token_ids": IDS - 1}, r"run: expected token_ids from 0 to 119 \(vocab_size 120\), received -1"),
        ({"token_ids": IDS, "segment_ids": IDS}, r"run: expected segment_ids from 0 to 1 \(segments 2\), received 2"),
    ):
        with pytest.raises(DomainError, match=message):
            running.run(gau[0], given, dialect=NEW, backend=backend)


def test_inputs_that_are_no_npz(tmp_path, monkeypatch):
    np.save(tmp_path / "one.npy", IDS)
    (tmp_path / "text.npz").write_text("mine")
    for name in ("one.npy", "text.npz", "missing.npz"):
        with pytest.raises(running.RunError, match="expected an .npz file of numbers"):
            running.inputs(tmp_path / name)
    # A header that announces more than there is.
    header = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
    header += str({"descr": "<i8", "fortran_order": False, "shape": (1 << 40,)}).encode().ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as archive:
        archive.writestr("token_ids.npy", header + bytes(8))
    with pytest.raises(running.RunError, match=f"expected 8 bytes of numbers, received {8 << 40} of dtype int64"):
        running.inputs(tmp_path / "bomb.npz")
    np.savez(tmp_path / "ids.npz", token_ids=IDS)
    monkeypatch.setattr(running, "LARGEST_INPUT", 100)
    with pytest.raises(running.RunError, match="expected arrays of at most 100 bytes, received"):
        running.inputs(tmp_path / "ids.npz")


def test_outputs_are_bounded_before_anything_is_run(gau, monkeypatch):
    folder, ids, _ = gau
    monkeypatch.setattr(running, "LARGEST_OUTPUT", 1000)
    with pytest.raises(running.RunError, match=r"outputs of at most 1000 bytes, received \d+ of 2 texts of 26 tokens"):
        running.run(folder, running.inputs(ids), dialect=NEW)


@pytest.mark.parametrize("place", ["run", "packed", "replace"])
def test_ctrl_c_leaves_nothing(gau, tmp_path, monkeypatch, place):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(os if place == "replace" else running, place, stop)
    done = models("run", gau[0], "--inputs", gau[1], "--out", tmp_path / "o.npz", "--dialect", NEW)
    assert (done.exit_code, done.stderr) == (130, "refimpl: stopped; nothing was written\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gau", "ids.npz"]


def inspected(*words):
    done = models("inspect", *words, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_inspect_counts_tied_tensors_once(junnyu):
    folder, _ = junnyu
    tensors, _ = checkpoints.junnyu()
    once = {name: array for name, array in tensors.items() if "decoder" not in name}
    found = inspected(folder)
    assert found["parameters"] == sum(array.size for array in once.values())
    assert found["bytes"] == sum(array.nbytes for array in tensors.values())
    assert found["tensors"][0].keys() == {"name", "shape", "dtype", "bytes"}
    assert {one["name"]: tuple(one["shape"]) for one in found["tensors"]} == {n: a.shape for n, a in tensors.items()}
    assert found["detected"]["heads"] == "transformed_lm"
    assert found["detected"]["dialect"] == "bert4keras-0.11.3 or junnyu or huggingface"
    # And without the configuration.
    (folder / "config.json").unlink()
    bare = inspected(folder)
    assert (bare["parameters"], bare["detected"]["model"]) == (found["parameters"], "roformer")
    assert bare["detected"]["configuration"] == "none beside the weights"


def test_inspect_of_every_kind(gau, tmp_path):
    folder = gau[0]
    found = inspected(folder / "bert_model.ckpt")
    assert (found["kind"], found["parameters"]) == ("TensorFlow checkpoint", 49728)
    assert found["detected"]["dialect"] == "not told; conversion asks for it"
    converting.convert(folder, tmp_path / "model", dialect=NEW)
    ours = inspected(tmp_path / "model")
    assert (ours["kind"], ours["parameters"]) == ("model folder", 49728)
    assert ours["detected"]["dialect"] == NEW
    weights = checkpoint.load(tmp_path / "model").weights
    torch.save(weights, tmp_path / "own.pt")
    other = inspected(tmp_path / "own.pt")
    assert (other["kind"], other["parameters"]) == ("PyTorch file", 49728)
    assert "not recognised: originals: expected the tensors of a known layout" in other["detected"]["layout"]
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    onnx.save(exporting.build(checkpoint.load(tmp_path / "model").model, arrays), tmp_path / "m.onnx")
    graph = inspected(tmp_path / "m.onnx")
    assert graph["kind"] == "ONNX file"
    assert graph["detected"]["inputs"] == "token_ids, segment_ids, mask"
    assert {one["name"] for one in graph["tensors"]} >= set(arrays)
    (tmp_path / "bad.onnx").write_bytes(b"\xff\xff")
    assert "expected an ONNX file" in refused("inspect", tmp_path / "bad.onnx")


def test_inspect_reads_no_numbers(gau):
    folder = gau[0]
    shard = folder / "bert_model.ckpt.data-00000-of-00001"
    shard.write_bytes(bytes(shard.stat().st_size))
    assert inspected(folder)["parameters"] == 49728


def test_inspect_as_a_table_says_why_it_cannot_be_converted(junnyu):
    folder, _ = junnyu
    (folder / "config.json").write_text(json.dumps({**checkpoints.JUNNYU, "num_hidden_layers": 1}))
    done = models("inspect", folder)
    assert done.exit_code == 0
    assert "roformer.embeddings_project.weight" in done.stdout
    assert "convertible: no: originals: the tensors are not those of the configuration; missing: none" in done.stdout
    assert "nothing there" in refused("inspect", folder / "no")


def test_explain_names_the_equal_dialects_and_measures_the_others(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "gau_alpha", "hidden_act": "swish", "layer_norm_eps": 1e-12}))
    done = models("explain", config)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "gau_alpha, layer_norm_eps 1e-12" in done.stdout
    rows = {line.split()[1]: line for line in done.stdout.splitlines() if " bert4keras-" in line or " junnyu " in line}
    equal = {name: "yes" in line for name, line in rows.items()}
    assert equal == {OLD: True, "bert4keras-0.11.4": False, NEW: False, "junnyu": True}
    assert " 16 " in rows[NEW]
    assert "hides id 0, except at position 0, when it is given no mask" in done.stdout


def test_explain_of_our_configurations_and_of_one_that_tells_nothing(gau, tmp_path):
    folder = gau[0]
    converting.convert(folder, tmp_path / "model", dialect=NEW)
    said = models("explain", tmp_path / "model" / "config.json").stdout
    assert "gau_alpha, a configuration of ours" in said
    from refimpl import config

    config.write(gau_alpha.dialect(OLD, **gau_alpha.SIZES["base"]), tmp_path / "encoder.json")
    assert "gau_alpha, a configuration of ours" in models("explain", tmp_path / "encoder.json").stdout
    assert "expected the model to be named" in refused("explain", folder / "bert_config.json")
    done = models("explain", folder / "bert_config.json", "--model", "gau_alpha")
    assert "which does not tell its dialect: conversion asks for it" in done.stdout
    assert "largest difference from bert4keras-0.11.3, the first of them" in done.stdout
    assert "a model with dialects" in refused("explain", folder / "bert_config.json", "--model", "flash")
    (tmp_path / "list.json").write_text("[1]")
    assert "a configuration that is a JSON object" in refused("explain", tmp_path / "list.json")
    assert "expected a file" in refused("explain", tmp_path / "missing.json")


def test_explain_gives_the_same_figures_for_the_same_seed(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "roformer", "hidden_act": "gelu_new", "layer_norm_eps": 1e-5}))
    first, again, other = (models("explain", config, "--seed", seed).stdout for seed in (0, 0, 1))
    assert first == again != other
    assert "activation gelu_tanh" in first
    assert "yes" not in first


def test_help_says_that_no_mask_is_derived():
    done = models("run", "--help")
    assert "No mask is derived from the ids unless --mask-from-ids bert4keras" in " ".join(done.stdout.split())


@pytest.mark.parametrize("name", ["b4k_roformer", "b4k_roformer_v2", "jy_roformer_v2", "jy_gau_alpha", "hf_roformer"])
def test_every_layer_of_the_originals(tmp_path, name):
    folder = by_hand.WHOLE / name
    if not folder.is_dir():
        pytest.skip(f"no shared/golden/{name} beside the repository; parts of it in tests/golden are tested")
    io, keras = np.load(folder / "io_float64.npz"), name.startswith("b4k")
    names = ("token_ids", "segment_ids") if keras else ("input_ids", "token_type_ids", "attention_mask")
    np.savez(tmp_path / "ids.npz", **{key: io[key] for key in names})
    keywords = {"dialect": NEW, "mask_from_ids": "bert4keras"} if keras else {}
    out = running.run(Path(folder), running.inputs(tmp_path / "ids.npz"), layers=True, **keywords)
    count = sum(key.startswith("hidden_states.") for key in out)
    assert count >= 3
    for i in range(count):
        if f"hidden_{i}" in io:
            assert far(out[f"hidden_states.{i}"], io[f"hidden_{i}"]) < 1e-13


def test_a_preset_is_the_published_model_for_training(tmp_path):
    done = models("preset", "roformer_v2", "small", "--dialect", NEW)
    made = specification.from_dict(json.loads(done.stdout))
    assert (done.exit_code, made.heads, made.visible) == (0, (), "bidirectional")
    # Published without its head, which has no weights but the bias of 12,000 tokens.
    assert sum(int(np.prod(shape)) for shape in specification.shapes(made).values()) == 15_225_600
    assert (made.config.layers, made.config.epsilon) == (6, 1e-7)
    other = models("preset", "gau_alpha", "base", "--dialect", "junnyu", "--set", "layers=2", "--set", "vocab_size=97")
    assert json.loads(other.stdout)["encoder"] == {
        "model": "gau_alpha", "vocab_size": 97, "hidden_size": 768, "layers": 2, "expanded_size": 1536, "key_size": 128,
        "segments": 2, "n_min": 1, "epsilon": 1e-12, "rotary_base": 10000.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("flash", "base", "--dialect", NEW), "a model with dialects: roformer, roformer_v2, gau_alpha"),
        (("gau_alpha", "small", "--dialect", NEW), "expected one of base, received size='small'"),
        (("gau_alpha", "base", "--dialect", "su"), "expected one of bert4keras-0.11.3"),
        (("gau_alpha", "base", "--dialect", NEW, "--set", "n_min=3"), "expected sizes among vocab_size, segments"),
        (("gau_alpha", "base", "--dialect", NEW, "--set", "model=3"), "received=['model']"),
        (("gau_alpha", "base", "--dialect", NEW, "--set", "layers=0"), "layers=0"),
        (("gau_alpha", "base", "--dialect", NEW, "--set", "layers"), "expected FIELD=N"),
    ],
)
def test_presets_that_are_not_there(words, told):
    assert told in refused("preset", *words)
