"""Model folders: what is saved is read back, and what is damaged, foreign or half is refused by name."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from refimpl import config as configuration
from refimpl import model as specification
from refimpl.check import DomainError
from refimpl.model import Model
from refimpl.models import flash, gau_alpha, roformer
from refimpl.models._heads import Pooler, SequenceClassifier, SpanPointer, TiedLM, TransformedLM
from torchimpl import checkpoint
from torchimpl.checkpoint import CheckpointError

SIZES = {
    "vocab_size": 11, "segments": 2, "hidden_size": 5, "layers": 2, "expanded_size": 7, "key_size": 4,
    "rotary_base": 10000.0,
}  # fmt: skip
CLASSES = SequenceClassifier(labels=3, pooling="mean_of_tokens")
GAU = Model(gau_alpha.Config(**SIZES, n_min=1, epsilon=1e-12), (CLASSES,), "bidirectional")
FLASH = Model(
    flash.Config(
        **SIZES, chunk=4, mix="causal", kernel="laplace", divisor="chunk", normaliser="visible", rows="paper",
        rotation="half_split", epsilon=1e-6,
    ),
    (SpanPointer(size=4, rotary_base=100.0), TiedLM(), Pooler("linear")), "causal",
)  # fmt: skip
ROFORMER = Model(
    roformer.dialect(
        "junnyu", vocab_size=11, segments=2, embedding_size=6, hidden_size=8, layers=1, heads=2, intermediate_size=3
    ),
    (TransformedLM(),), "unilm",
)  # fmt: skip
FILES = {"config.json", "model.safetensors", "manifest.json"}


def weights(model=GAU):
    torch.manual_seed(3)
    return checkpoint.module(model).weights()


@pytest.fixture
def folder(tmp_path):
    checkpoint.save(tmp_path / "models" / "gau", GAU, weights())
    return tmp_path / "models" / "gau"


@pytest.mark.parametrize("model", [GAU, FLASH, ROFORMER], ids=lambda model: model.config.model)
def test_what_is_saved_is_read_back(tmp_path, model):
    saved = weights(model)
    checkpoint.save(tmp_path / "model", model, saved)
    held = checkpoint.load(tmp_path / "model")
    assert held.model == model
    assert specification.read(tmp_path / "model" / "config.json") == model
    assert list(held.weights) == list(saved)
    assert all(torch.equal(held.weights[name], tensor) for name, tensor in saved.items())
    assert held.sha256 == hashlib.sha256((tmp_path / "model" / "model.safetensors").read_bytes()).hexdigest()
    ids = torch.randint(0, 11, (2, 6))
    with torch.no_grad():
        expected = checkpoint.module(model, saved).eval()(ids)
        found = checkpoint.module(held.model, held.weights).eval()(ids)
    assert tuple(found) == specification.outputs(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_folder_holds_three_files_and_nothing_lies_beside_it(folder):
    assert {file.name for file in folder.iterdir()} == FILES
    assert [part.name for part in folder.parent.iterdir()] == ["gau"]
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert listed["config.json"]["bytes"] == (folder / "config.json").stat().st_size


def test_a_model_is_replaced_and_anything_else_is_not(folder, tmp_path):
    changed = {name: tensor + 1 for name, tensor in weights().items()}
    checkpoint.save(folder, GAU, changed)
    assert torch.equal(checkpoint.load(folder).weights["classifier.bias"], changed["classifier.bias"])
    assert [part.name for part in folder.parent.iterdir()] == ["gau"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is no model folder"):
        checkpoint.save(tmp_path / "notes", GAU, changed)
    assert (tmp_path / "notes" / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("place", "name", "count"), [(os, "replace", 1), (os, "replace", 3), (Path, "rename", 1), (Path, "rename", 2)]
)
def test_a_save_that_is_stopped_leaves_the_old_model(folder, monkeypatch, place, name, count):
    calls, real = [], getattr(place, name)

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == count:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(place, name, stopping)
        checkpoint.save(folder, GAU, {name: tensor + 1 for name, tensor in weights().items()})
    assert [part.name for part in folder.parent.iterdir()] == ["gau"]
    assert torch.equal(checkpoint.load(folder).weights["layers.0.w_in"], weights()["layers.0.w_in"])


def test_what_belongs_to_a_model_is_kept_and_verified(folder, monkeypatch):
    checkpoint.save(folder, GAU, weights(), {"vocab.txt": b"one\ntwo\n"})
    assert checkpoint.listed(folder) == ("config.json", "model.safetensors", "vocab.txt")
    assert checkpoint.extra(folder, "vocab.txt") == b"one\ntwo\n"
    # Another one is a damaged model's, and one that nobody listed is nobody's.
    (folder / "vocab.txt").write_bytes(b"two\none\n")
    with pytest.raises(CheckpointError, match=r"vocab\.txt is not the file that was written: 8 bytes, expected 8 with"):
        checkpoint.extra(folder, "vocab.txt")
    (folder / "merges.txt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"does not list merges\.txt; it lists config\.json, .*, vocab\.txt"):
        checkpoint.extra(folder, "merges.txt")
    monkeypatch.setattr(checkpoint, "LARGEST_EXTRA", 7)
    with pytest.raises(CheckpointError, match=r"vocab\.txt has 8 bytes; at most 7"):
        checkpoint.extra(folder, "vocab.txt")
    (folder / "vocab.txt").unlink()
    with pytest.raises(CheckpointError, match=r"vocab\.txt is missing"):
        checkpoint.extra(folder, "vocab.txt")


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "model.safetensors", "../a", "a/b", "a\\b", "..", ""])
def test_an_extra_file_has_a_name_of_its_own_in_the_folder(tmp_path, name):
    with pytest.raises(CheckpointError, match="no extra file can have the name"):
        checkpoint.save(tmp_path / "model", GAU, weights(), {name: b""})
    assert not list(tmp_path.iterdir())


def test_missing_and_unknown_weights_are_named(tmp_path):
    wrong = weights()
    wrong["extra.bias"] = wrong.pop("layers.1.gamma_q")
    with pytest.raises(CheckpointError, match=r"missing: layers\.1\.gamma_q; unknown: extra\.bias"):
        checkpoint.save(tmp_path / "model", GAU, wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(4), r"classifier\.bias of shape \(3,\) and a floating dtype, received \(4,\)"),
        (torch.zeros(3, dtype=torch.int64), r"received \(3,\) of torch\.int64"),
        (torch.tensor([0.0, float("nan"), 1.0]), r"classifier\.bias holds numbers that are not finite"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, tensor, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(tmp_path / "model", GAU, {**weights(), "classifier.bias": tensor})


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b" ", lambda data: data[::-1]])
def test_a_changed_file_is_named(folder, name, change):
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    with pytest.raises(CheckpointError, match=f"{name} is not the file that was written"):
        checkpoint.load(folder)


@pytest.mark.parametrize("text", [
    "", "[]", '{"format": "x", "files": {}}', "nonsense", '{"format": 2, "files": 3}',
    '{"format": 2, "files": {"config.json": 3}}', '{"format": 2, "files": {"config.json": {"bytes": 3}}}', "[" * 100000,
])  # fmt: skip
def test_a_manifest_that_is_none_is_refused(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="is no manifest"):
        checkpoint.load(folder)


def rewritten(folder, name, data):
    """The folder with another file in it, listed as it should be."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / name).write_bytes(data)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_newer_format_is_refused(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 3}))
    with pytest.raises(CheckpointError, match="has format 3, this refimpl reads 2"):
        checkpoint.load(folder)


def test_a_folder_without_heads_is_refused_with_what_to_do(folder):
    old = {**json.loads((folder / "config.json").read_text())["encoder"], "labels": 3}
    rewritten(folder, "config.json", json.dumps(old).encode())
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    with pytest.raises(CheckpointError) as raised:
        checkpoint.load(folder)
    said = str(raised.value)
    assert "has format 1 of an earlier refimpl" in said
    assert "save them again with torchimpl.checkpoint.save(folder, refimpl.model.Model(config, heads, visible)" in said
    # What it says to do does it.
    del old["labels"]
    model = Model(configuration.from_dict(old), (CLASSES,), "bidirectional")
    checkpoint.save(folder, model, load_file(folder / "model.safetensors"))
    assert checkpoint.load(folder).model == GAU


def test_a_pickle_is_not_opened(folder):
    rewritten(folder, "model.safetensors", b"\x80\x04\x95" + bytes(64))
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        checkpoint.load(folder)


def test_a_configuration_is_checked(folder):
    config = json.loads((folder / "config.json").read_text())
    rewritten(folder, "config.json", json.dumps({**config, "depth": 3}).encode())
    with pytest.raises(DomainError, match='unknown key "depth"'):
        checkpoint.load(folder)
    rewritten(folder, "config.json", json.dumps(config)[:-1].encode() + b', "heads": []}')
    with pytest.raises(DomainError, match='the key "heads" stands twice'):
        checkpoint.load(folder)
    deeper = {**config, "encoder": {**config["encoder"], "layers": 3}}
    rewritten(folder, "config.json", json.dumps(deeper).encode())
    with pytest.raises(
        CheckpointError, match=r"not those of gau_alpha with sequence_classifier; missing: layers\.2\.gamma_k"
    ):
        checkpoint.load(folder)


def test_shared_and_strided_weights_are_saved_whole(tmp_path):
    saved = weights()
    saved["layers.1.w_in"] = saved["layers.0.w_in"]
    saved["classifier.kernel"] = saved["classifier.kernel"].T.contiguous().T
    checkpoint.save(tmp_path / "model", GAU, saved)
    held = checkpoint.load(tmp_path / "model").weights
    assert all(torch.equal(held[name], saved[name]) for name in saved)
