"""`refimpl convert`: every weight bit for bit, what is said of it, and what stops it without leaving anything."""

import hashlib
import importlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from refimpl import model as specification
from refimpl.check import SpecError
from refimpl.model import Model
from refimpl.models import _encoder
from refimpl.models._heads import NextSentence, Pooler, TiedLM, TransformedLM
from tests.golden import checkpoints
from tests.golden import originals as by_hand

torch = pytest.importorskip("torch")
testing = pytest.importorskip("typer.testing")
# Only now: these need the packages above.
MODULES = ("torchimpl.checkpoint", "torchimpl.command", "torchimpl.convert", "torchimpl.source")
checkpoint, command, converting, sources = map(importlib.import_module, MODULES)

PLAIN = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1", "FORCE_COLOR": None}
OLD, NEW = "bert4keras-0.11.3", "bert4keras-0.11.5"


@pytest.fixture
def junnyu(tmp_path):
    return checkpoints.write(tmp_path / "junnyu", checkpoints.junnyu()[0], checkpoints.JUNNYU)


@pytest.fixture
def gau(tmp_path):
    checkpoints.gau_alpha(tmp_path / "gau")
    return tmp_path / "gau"


def run(*words):
    return testing.CliRunner().invoke(command.app, ["convert", *map(str, words)], env=PLAIN)


def refused(*words):
    """The reason why nothing was written."""
    done = run(*words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert not Path(words[1]).exists()
    return done.stderr


def arrays(folder):
    return {name: tensor.numpy() for name, tensor in checkpoint.load(folder).weights.items()}


def far(got, expected):
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_junnyu_roformer_bit_for_bit_and_what_it_gives(tmp_path, name):
    tensors, io = checkpoints.junnyu()
    source = checkpoints.write(tmp_path / "junnyu", tensors, checkpoints.JUNNYU, name=name)
    made = converting.convert(source, tmp_path / "out")
    held = checkpoint.load(tmp_path / "out")
    assert held.model.heads == (TransformedLM(),)
    expected = by_hand.weights_torch(by_hand.copy("jy_roformer"), specification.shapes(held.model))
    assert list(held.weights) == list(expected)
    assert all(np.array_equal(array, expected[ours]) for ours, array in arrays(tmp_path / "out").items())
    assert made.parameters == sum(array.size for array in expected.values())
    inputs = io["input_ids"], io["token_type_ids"], io["attention_mask"] == 1
    got = specification.forward(arrays(tmp_path / "out"), *inputs, model=held.model)
    assert far(got["last_hidden_state"], io["last_hidden_state"]) < 1e-13
    assert far(got["mlm_logits"], io["logits"]) < 1e-13


@pytest.mark.parametrize("release", ["0.11.3", "0.11.4", "0.11.5"])
def test_gau_alpha_of_bert4keras_gives_what_each_release_gave(gau, tmp_path, release):
    io = checkpoints.gau_alpha(tmp_path / "again")
    converting.convert(gau, tmp_path / "out", dialect=f"bert4keras-{release}")
    held = checkpoint.load(tmp_path / "out")
    ids = io["token_ids"].astype(np.int64)
    mask = _encoder.mask_from_ids_bert4keras(ids)
    weights = arrays(tmp_path / "out")
    got = specification.forward(weights, ids, io["segment_ids"].astype(np.int64), mask, model=held.model)
    assert far(got["last_hidden_state"], io[f"{release}/last_hidden_state"]) < 1e-13
    assert far(got["mlm_logits"][:, ::5], io[f"{release}/mlm_logits"]) < 1e-13


def test_application_lm_of_bert4keras(gau, tmp_path):
    io = checkpoints.gau_alpha(tmp_path / "again")
    converting.convert(gau, tmp_path / "out", dialect=NEW, visible="causal")
    held, ids = checkpoint.load(tmp_path / "out"), io["token_ids"].astype(np.int64)
    mask = _encoder.mask_from_ids_bert4keras(ids)
    segments = io["segment_ids"].astype(np.int64)
    got = specification.forward(arrays(tmp_path / "out"), ids, segments, mask, model=held.model)
    assert far(got["last_hidden_state"], io["0.11.5/lm_last_hidden_state"]) < 1e-13


def renamed_gau(layout):
    """The weights of bert4keras' GAU-α under the PyTorch names of JunnYu and of bert4torch, written out here."""
    from refimpl import bundle

    held = bundle.read(checkpoints.HERE / "bundle" / "gau_alpha")
    word, segment = held["bert/embeddings/word_embeddings"], held["bert/embeddings/token_type_embeddings"]
    made = {}
    for i in range(3):
        place = f"GAU_alpha/encoder/layer_{i}/gau/"
        q, k = held[f"{place}q_scaleoffset/gamma"], held[f"{place}k_scaleoffset/gamma"]
        to = f"gau_alpha.encoder.layer.{i}.gau." if layout == "junnyu" else f"encoderLayer.{i}.gau."
        made[f"{to}i_dense.weight"], made[f"{to}o_dense.weight"] = (
            held[f"{place}{name}/kernel"].T for name in ("i_dense", "o_dense")
        )
        if layout == "junnyu":
            made |= {f"{to}q_scaleoffset.weight": q, f"{to}k_scaleoffset.weight": k}
        else:
            made[f"{to}offsetscale.gamma"] = np.stack([q, k])
    if layout == "junnyu":
        names = ("gau_alpha.embeddings.word_embeddings.weight", "gau_alpha.embeddings.token_type_embeddings.weight")
        return made | dict(zip(names, (word, segment), strict=True)) | {"cls.predictions.decoder.weight": word}
    names = ("embeddings.word_embeddings.weight", "embeddings.segment_embeddings.weight", "mlmDecoder.weight")
    return made | dict(zip(names, (word, segment, word), strict=True))


@pytest.mark.parametrize("layout", ["junnyu", "bert4torch"])
def test_the_same_gau_alpha_in_pytorch_names_is_the_same_folder(gau, tmp_path, layout):
    config = json.loads((gau / "bert_config.json").read_text())
    source = checkpoints.write(tmp_path / "torch", renamed_gau(layout), config)
    converting.convert(gau, tmp_path / "one", dialect=OLD)
    converting.convert(source, tmp_path / "other", dialect=OLD)
    for name in ("model.safetensors", "config.json", "vocab.txt"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_the_first_layer_of_bert4keras_roformer_v2(tmp_path):
    original = by_hand.copy("b4k_roformer_v2")
    config = {
        "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 192,
        "hidden_act": "relu", "vocab_size": 120,
    }  # fmt: skip
    checkpoints.tensorflow(tmp_path / "tf", original.weights, config, 1)
    converting.convert(tmp_path / "tf", tmp_path / "out", dialect=NEW)
    held, ids = checkpoint.load(tmp_path / "out"), original.double["io/token_ids"]
    assert held.model.heads == (TiedLM(),)
    mask = _encoder.mask_from_ids_bert4keras(ids)
    got = specification.forward(
        arrays(tmp_path / "out"), ids, original.double["io/segment_ids"], mask, model=held.model
    )
    assert far(got["last_hidden_state"], original.double["io/hidden_1"]) < 1e-13


def test_bert4keras_roformer_v2_of_two_widths_has_its_head_in_no_checkpoint(tmp_path):
    held = dict(np.load(by_hand.COPIES / "b4k_roformer_v2_narrow.npz"))
    config = {
        "hidden_size": 12, "embedding_size": 6, "num_hidden_layers": 2, "num_attention_heads": 3,
        "intermediate_size": 20, "hidden_act": "relu", "vocab_size": 31,
    }  # fmt: skip
    kept = {name: array for name, array in held.items() if not name.startswith("io/")}
    assert checkpoints.tensorflow(tmp_path / "tf", kept, config, 2).keys() == kept.keys()
    done = run(tmp_path / "tf", tmp_path / "out", "--dialect", NEW)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "heads: none" in done.stdout
    assert "no language head: what stands before the token table of another width is in no" in done.stdout
    whole, weights, ids = checkpoint.load(tmp_path / "out").model, arrays(tmp_path / "out"), held["io/token_ids"]
    inputs = ids, held["io/segment_ids"], _encoder.mask_from_ids_bert4keras(ids)
    made = specification.forward(weights, *inputs, model=whole)
    assert far(made["last_hidden_state"], held["io/last_hidden_state"]) < 1e-13
    # With the matrix that bert4keras drew anew, and did not save, its logits are those of the tied head.
    tied = Model(whole.config, (TiedLM(),), "bidirectional")
    made = specification.forward({**weights, "mlm.mapping.kernel": held["io/output_mapping"]}, *inputs, model=tied)
    assert far(made["mlm_logits"], held["io/mlm_logits"]) < 1e-13
    # A tensor of that name has no place, since nobody writes one.
    checkpoints.tensorflow(
        tmp_path / "more", kept, config, 2, {"Output-Mapping/kernel": held["io/output_mapping"]}
    )  # fmt: skip
    told = refused(tmp_path / "more", tmp_path / "other", "--dialect", NEW)
    assert "missing: none; without a place in the model: Output-Mapping/kernel" in " ".join(told.split())


def test_every_head_of_bert4keras_roformer(tmp_path):
    original = by_hand.copy("b4k_roformer_emb")
    config = {
        "hidden_size": 64, "embedding_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 117,
        "intermediate_size": 160, "hidden_act": "gelu",
    }  # fmt: skip
    tensors = checkpoints.tensorflow(tmp_path / "tf", original.weights, config, 2)
    converting.convert(tmp_path / "tf", tmp_path / "out", dialect=NEW, pooler="linear")
    held, weights = checkpoint.load(tmp_path / "out"), arrays(tmp_path / "out")
    assert held.model.heads == (Pooler("linear"), NextSentence())
    for ours, array in weights.items():
        layer = re.search(r"\d+", ours)
        generic = ours.replace(layer[0], "{}", 1) if layer else ours
        theirs = tensors[by_hand.BERT4KERAS[generic].format(layer and layer[0])]
        assert np.array_equal(array, theirs.T if ours == "next_sentence.kernel" else theirs), ours
    # What stands before the first layer and behind the last is golden.
    io = original.double
    ids, segments = io["io/token_ids"], io["io/segment_ids"]
    states = specification.hidden_states(
        weights, ids, segments, _encoder.mask_from_ids_bert4keras(ids), model=held.model
    )
    assert far(states[0], io["io/hidden_0"]) < 1e-13


def test_what_is_said_and_what_is_carried(gau, junnyu, tmp_path):
    done = run(gau, tmp_path / "out", "--dialect", NEW)
    assert (done.exit_code, done.stderr) == (0, "")
    first, second, third, last = done.stdout.splitlines()
    assert first == (
        f"{gau}: TensorFlow checkpoint, TensorFlow names of bert4keras, 14 tensors, configuration "
        f"{gau / 'bert_config.json'}"
    )
    assert second == "gau_alpha, 49,728 parameters in float32; bidirectional; heads: tied_lm"
    assert third == "epsilon 1e-07, n_min 16: the constants of bert4keras-0.11.5"
    assert last == f"{tmp_path / 'out'}: a model folder, with vocab.txt"
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == checkpoints.VOCABULARY.encode()
    listed = json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]["vocab.txt"]
    assert listed["sha256"] == hashlib.sha256(checkpoints.VOCABULARY.encode()).hexdigest()
    done = run(junnyu, tmp_path / "other")
    assert "tied, and equal bit by bit: cls.predictions.decoder.weight = roformer.embeddings.word_emb" in done.stdout
    assert "mlm_epsilon 1e-12: the constants of bert4keras-0.11.3, junnyu, huggingface\n" in done.stdout


def changed(folder, change, config=None):
    tensors = {name: array.copy() for name, array in checkpoints.junnyu()[0].items()}
    change(tensors)
    return checkpoints.write(folder, tensors, checkpoints.JUNNYU if config is None else config)


def minus_zero(tensors):
    tensors["roformer.embeddings.word_embeddings.weight"][0, 0] = 0.0
    tensors["cls.predictions.decoder.weight"] = tensors["roformer.embeddings.word_embeddings.weight"].copy()
    tensors["cls.predictions.decoder.weight"][0, 0] = -0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("cls.predictions.transform.dense.bias"), "missing: cls.predictions.transform.dense.bias;"),
        (lambda t: t.update({"classifier.weight": np.ones((2, 48), np.float32)}), "a place in the model: classifier.w"),
        (lambda t: t.update({"roformer.embeddings_project.bias": np.ones(47, np.float32)}), "of shape (48,) for embed"),
        (lambda t: t["cls.predictions.decoder.weight"].__setitem__((3, 2), 9), "1 of 3680 numbers that differ"),
        (lambda t: t["cls.predictions.decoder.bias"].__setitem__(0, 9), "decoder.bias to be cls.predictions.bias bit"),
        (minus_zero, "received zeros of another sign, or NaN"),
        (
            lambda t: t["roformer.encoder.layer.1.output.dense.bias"].__setitem__(5, np.nan),
            "roformer.encoder.layer.1.output.dense.bias holds numbers that are not finite",
        ),
        (
            lambda t: t.update({"roformer.embeddings_project.bias": np.ones(48, np.int64)}),
            "roformer.embeddings_project.bias: expected a dtype among float16, bfloat16, float32, float64, rec",
        ),
    ],
)  # fmt: skip
def test_what_stops_it(tmp_path, change, message):
    assert message in refused(changed(tmp_path / "jy", change), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["jy"]


def test_an_untied_decoder_may_be_left_out_by_name(tmp_path):
    source = changed(tmp_path / "jy", lambda t: t["cls.predictions.decoder.weight"].__setitem__((3, 2), 9))
    done = run(source, tmp_path / "out", "--ignore", "cls.predictions.decoder.*")
    assert done.exit_code == 0
    assert "ignored as asked: cls.predictions.decoder.bias, cls.predictions.decoder.weight\n" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            (),
            "a dialect, since the configuration does not tell the release of bert4keras; one of bert4keras-0.11.3 (ep",
        ),
        (("--dialect", "su"), "expected a dialect among"),
        (("--dialect", NEW, "--model", "bert"), "expected a model among roformer, roformer_v2, gau_alpha"),
        (("--dialect", NEW, "--ignore", "[x]*"), "a pattern that some of the 14 names match; received '[x]*'"),
        (("--dialect", NEW, "--visible", "all"), "--visible must be one of bidirectional, causal, unilm, not all"),
        (("--dialect", NEW, "--pooler", "relu"), "--pooler must be one of tanh, linear, not relu"),
        (("--dialect", NEW, "--pooler", "tanh"), "expected a checkpoint with a pooler"),
        (("--dialect", NEW, "--dtype", "int8"), "a dtype among float16, bfloat16, float32, float64, received 'int8'"),
        (("--dialect", NEW, "--config", "none.json"), "expected a file, received nothing of that name"),
    ],
)
def test_options_that_stop_it(gau, tmp_path, words, message):
    assert message in refused(gau, tmp_path / "out", *words)


def test_a_truncated_shard_and_a_wrong_checksum(gau, tmp_path):
    shard = gau / "bert_model.ckpt.data-00000-of-00001"
    data = shard.read_bytes()
    shard.write_bytes(data[:-4])
    assert "bytes to hold" in refused(gau, tmp_path / "out", "--dialect", NEW)
    shard.write_bytes(b"\xff" + data[1:])
    assert "CRC-32C" in refused(gau, tmp_path / "out", "--dialect", NEW)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_a_dtype_is_kept_unless_another_is_asked_for(tmp_path, dtype):
    tensors, _ = checkpoints.junnyu()
    kind = getattr(torch, dtype)
    folder = checkpoints.write(tmp_path / "jy", {}, checkpoints.JUNNYU)
    (folder / "model.safetensors").unlink()
    torch.save(
        {name: torch.from_numpy(array).to(kind) for name, array in tensors.items()}, folder / "pytorch_model.bin"
    )
    assert converting.convert(folder, tmp_path / "kept").dtypes == (dtype,)
    kept = checkpoint.load(tmp_path / "kept").weights["mlm.bias"]
    assert torch.equal(kept, torch.from_numpy(tensors["cls.predictions.bias"]).to(kind))
    assert converting.convert(folder, tmp_path / "changed", dtype="float32").dtypes == ("float32",)
    assert torch.equal(checkpoint.load(tmp_path / "changed").weights["mlm.bias"], kept.float())


def test_numbers_beyond_float16_are_named(tmp_path):
    source = changed(tmp_path / "jy", lambda t: t["roformer.embeddings_project.bias"].__setitem__(0, 1e6))
    message = "roformer.embeddings_project.bias has numbers beyond the range of float16"
    assert message in refused(source, tmp_path / "out", "--dtype", "float16")


def test_a_foreign_folder_is_left_and_a_model_folder_is_replaced(junnyu, gau, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    done = run(junnyu, tmp_path / "mine")
    assert (done.exit_code, "exists and is no model folder; it is left as it is" in done.stderr) == (2, True)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]
    # The checkpoint itself is foreign too.
    assert run(junnyu, junnyu).exit_code == 2
    assert run(junnyu, tmp_path / "out").exit_code == run(gau, tmp_path / "out", "--dialect", OLD).exit_code == 0
    assert checkpoint.load(tmp_path / "out").model.config.model == "gau_alpha"
    with pytest.raises(SpecError, match="is a model folder already; there is nothing to convert"):
        converting.convert(tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize("place", ["read", "write", "rename"])
def test_ctrl_c_leaves_nothing(junnyu, tmp_path, monkeypatch, place):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    target = {"read": (sources.Source, "read"), "write": (os, "replace"), "rename": (Path, "rename")}[place]
    monkeypatch.setattr(*target, stop)
    done = run(junnyu, tmp_path / "out")
    assert (done.exit_code, done.stderr) == (130, "refimpl: stopped; nothing was written\n")
    assert [path.name for path in tmp_path.iterdir()] == ["junnyu"]


FOLDERS = (
    "b4k_gau_alpha", "b4k_roformer", "b4k_roformer_emb", "b4k_roformer_v2", "hf_roformer", "jy_gau_alpha",
    "jy_roformer", "jy_roformer_v2",
)  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_every_original_as_its_own_code_wrote_it(tmp_path, name):
    folder = by_hand.WHOLE / name
    if not folder.is_dir():
        pytest.skip(f"no shared/golden/{name} beside the repository; parts of it in tests/golden are tested")
    io = np.load(folder / "io_float64.npz")
    keras = name.startswith("b4k")
    converting.convert(folder, tmp_path / "out", dialect=NEW if keras else None)
    held, weights = checkpoint.load(tmp_path / "out"), arrays(tmp_path / "out")
    if keras:
        inputs = io["token_ids"], io["segment_ids"], _encoder.mask_from_ids_bert4keras(io["token_ids"])
    else:
        inputs = io["input_ids"], io["token_type_ids"], io["attention_mask"] == 1
    got = specification.forward(weights, *inputs, model=held.model)
    assert far(got["last_hidden_state"], io["last_hidden_state"]) < 1e-13
    assert far(got["mlm_logits"], io["mlm_logits" if keras else "logits"]) < 1e-13
    if name == "b4k_roformer_emb":
        assert far(got["pooled"], io["pooler_output"]) < 1e-13
        odds = np.exp(got["next_sentence_logits"])
        assert far(odds / odds.sum(-1, keepdims=True), io["nsp_proba"]) < 1e-13
