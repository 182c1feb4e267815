"""Where weights come from: every kind of file is listed by its headers, read as it is stored, refused when hostile."""

import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from refimpl.bundle import BundleError
from refimpl.check import DomainError
from tests.golden import checkpoints
from torchimpl import source
from torchimpl.source import SourceError

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

W = torch.arange(6, dtype=torch.float32).reshape(2, 3)
DTYPES = ("float16", "bfloat16", "float32", "float64")


@pytest.fixture
def gau(tmp_path):
    checkpoints.gau_alpha(tmp_path / "gau")
    return tmp_path / "gau"


@pytest.mark.parametrize("name", ["", "bert_model.ckpt", "bert_model.ckpt.index"])
def test_tensorflow_by_folder_prefix_and_index(gau, name):
    found = source.find(gau / name)
    assert (found.kind, found.config_file, set(found.carried)) == (
        source.TENSORFLOW, gau / "bert_config.json", {"vocab.txt"},
    )  # fmt: skip
    header = found.tensors["GAU_alpha/encoder/layer_0/gau/i_dense/kernel"]
    assert (header.dtype, header.shape, header.bytes) == ("float32", (48, 208), 4 * 48 * 208)
    assert found.config["attention_key_size"] == 16


def test_a_folder_of_one_checkpoint_needs_no_file_that_names_it(gau):
    (gau / "checkpoint").write_text('model_checkpoint_path: "/elsewhere/bert_model.ckpt"')
    assert source.find(gau).kind == source.TENSORFLOW
    # Of two it names one.
    (gau / "other.index").write_bytes((gau / "bert_model.ckpt.index").read_bytes())
    with pytest.raises(BundleError, match="a checkpoint in the same folder"):
        source.find(gau)
    (gau / "checkpoint").write_text('model_checkpoint_path: "bert_model.ckpt"')
    found = source.find(gau)
    assert found.config_file == gau / "bert_config.json"
    assert list(found.read(["bert/embeddings/token_type_embeddings"])) == ["bert/embeddings/token_type_embeddings"]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "weights.pt", "weights.pth"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_come_as_they_are_stored(tmp_path, name, dtype):
    tensors = {"w": W.to(getattr(torch, dtype)), "b": torch.ones(3, dtype=getattr(torch, dtype))}
    file = tmp_path / name
    if name.endswith("safetensors"):
        safetensors.save_file(tensors, file)
    else:
        torch.save(tensors, file)
    found = source.find(file)
    assert (found.tensors["w"].dtype, found.tensors["w"].shape) == (dtype, (2, 3))
    assert found.tensors["w"].bytes == 6 * tensors["w"].element_size()
    assert found.config is None
    read = found.read(["w"])
    assert list(read) == ["w"]
    assert read["w"].dtype == tensors["w"].dtype
    assert torch.equal(read["w"], tensors["w"])


def test_bfloat16_of_tensorflow_stays_bfloat16(tmp_path):
    from tests.refimpl import test_bundle as bundles

    bits = np.array([0x3F80, 0xC000], np.uint16)
    bundles.write(tmp_path / "model.ckpt", {"w": bundles.Stored("bfloat16", (2,), bits.tobytes())})
    read = source.find(tmp_path / "model.ckpt").read(["w"])["w"]
    assert read.dtype == torch.bfloat16
    assert read.tolist() == [1.0, -2.0]


def test_the_file_of_transformers_goes_first_and_kinds_are_not_mixed(gau, tmp_path):
    folder = checkpoints.write(tmp_path / "hf", {"w": np.ones(2, np.float32)}, {})
    checkpoints.write(folder, {"w": np.zeros(2, np.float32)}, name="pytorch_model.bin")
    assert source.find(folder).kind == source.SAFETENSORS
    (gau / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(SourceError, match=r"weights of one kind; name the file.*model\.safetensors and bert_model"):
        source.find(gau)


def sharded(folder, weight_map=None, shards=None, suffix="safetensors"):
    folder.mkdir(exist_ok=True)
    shards = shards or {f"a.{suffix}": {"x": W}, f"b.{suffix}": {"y": W + 1, "z": W + 2}}
    for name, tensors in shards.items():
        if suffix == "safetensors":
            safetensors.save_file(tensors, folder / name)
        else:
            torch.save(tensors, folder / name)
    listed = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    index = "model.safetensors.index.json" if suffix == "safetensors" else "pytorch_model.bin.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map or listed}))
    return folder


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(tmp_path, suffix):
    found = source.find(sharded(tmp_path / "hf", suffix=suffix))
    assert set(found.tensors) == {"x", "y", "z"}
    read = found.read(["z", "x"])
    assert list(read) == ["z", "x"]
    assert torch.equal(read["z"], W + 2)


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/etc/a.safetensors", "sub/a.safetensors", "..", "a.bin", "c:\\a.safetensors", ""]
)
def test_shards_stay_in_their_folder(tmp_path, name):
    folder = sharded(tmp_path / "hf", {"x": name})
    safetensors.save_file({"x": W}, tmp_path / "a.safetensors")
    with pytest.raises(SourceError, match="shards by the names of files in the same folder"):
        source.find(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"x": "a.safetensors", "q": "a.safetensors"}, "the tensors that model.safetensors.index.json lists for it"),
        ({"y": "b.safetensors"}, "not so: z"),
        ({"x": "missing.safetensors"}, "expected a file, received nothing of that name"),
        ({"x": 3}, 'an object with "weight_map"'),
        (["x"], 'an object with "weight_map"'),
    ],
)
def test_shards_that_are_not_what_is_listed(tmp_path, weight_map, message):
    with pytest.raises(SourceError, match=message):
        source.find(sharded(tmp_path / "hf", weight_map))


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_something_runs_nothing(tmp_path, legacy):
    torch.save({"w": Bomb(tmp_path / "hit")}, tmp_path / "m.bin", _use_new_zipfile_serialization=not legacy)
    (tmp_path / "raw.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "hit"), 2))
    for name in ("m.bin", "raw.bin"):
        with pytest.raises(SourceError, match="a file of torch.save that holds weights alone"):
            source.find(tmp_path / name)
    assert not (tmp_path / "hit").exists()


def test_a_legacy_file_of_weights_is_read(tmp_path):
    torch.save({"w": W}, tmp_path / "m.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(source.find(tmp_path / "m.bin").read(["w"])["w"], W)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([W], "a state dict, names to tensors, received list"),
        ({}, "a state dict, names to tensors, received dict"),
        ({"w": 3}, "a state dict, names to tensors, received 'w': int"),
        ({"w": {"v": W}}, "received 'w': dict"),
        ({"w": W.to_sparse()}, "received 'w': a sparse or quantised tensor"),
        ({"w": torch.ones(1).expand(10**6)}, "at most the 4 bytes that it holds, received a view of 4000000"),
    ],
)
def test_a_file_of_something_else(tmp_path, held, message):
    torch.save(held, tmp_path / "m.bin")
    with pytest.raises(SourceError, match=message):
        source.find(tmp_path / "m.bin")


def test_a_file_that_unpacks_to_more_than_it_is(tmp_path):
    torch.save({"w": torch.zeros(10**5)}, tmp_path / "m.bin")
    with zipfile.ZipFile(tmp_path / "m.bin") as plain, zipfile.ZipFile(tmp_path / "z.bin", "w", 8) as packed:
        for part in plain.infolist():
            packed.writestr(part.filename, plain.read(part))
    with pytest.raises(SourceError, match=r"at most \d+ bytes in a file of that size"):
        source.find(tmp_path / "z.bin")


@pytest.mark.parametrize("name", ["model.safetensors", "m.bin", "bert_model.ckpt"])
@pytest.mark.parametrize("keep", [0, 7, 60, -1])
def test_a_truncated_file(gau, tmp_path, name, keep):
    if name == "bert_model.ckpt":
        file = gau / f"{name}.index"
    else:
        file = checkpoints.write(tmp_path / "hf", {"w": np.ones((64, 64), np.float32)}, name=name) / name
    data = file.read_bytes()
    file.write_bytes(data[:keep] if keep >= 0 else data[: len(data) - 1000 if name != "bert_model.ckpt" else -9])
    with pytest.raises((SourceError, BundleError)):
        source.find(file)


def test_a_safetensors_header_that_announces_more_than_there_is(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(SourceError, match="expected a file of safetensors"):
        source.find(tmp_path / "m.safetensors")


def test_whole_numbers_are_listed_and_not_read(tmp_path):
    safetensors.save_file({"ids": torch.arange(3)}, tmp_path / "m.safetensors")
    found = source.find(tmp_path / "m.safetensors")
    assert (found.tensors["ids"].dtype, found.tensors["ids"].bytes) == ("int64", 24)
    with pytest.raises(SourceError, match="ids: expected a dtype among float16, bfloat16, float32, float64, received"):
        found.read(["ids"])


@pytest.mark.parametrize("name", ["model.safetensors", "m.bin"])
def test_a_file_that_changes_after_it_was_listed(tmp_path, name):
    folder = checkpoints.write(tmp_path / "hf", {"w": np.ones(3, np.float32)}, name=name)
    found = source.find(folder / name)
    checkpoints.write(folder, {"w": np.ones(4, np.float32)}, name=name)
    with pytest.raises(SourceError, match=r"w: expected float32 of shape \(3,\), received another since"):
        found.read(["w"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "a folder, a file of weights or the prefix of a TensorFlow checkpoint, received nothing there"),
        ("", r"a folder with manifest\.json, model\.safetensors, .* or \*\.index, received none of them"),
        ("notes.txt", r"a file of weights \(\.safetensors, \.bin, \.pt, \.pth\) or a \.index, received the name notes"),
    ],
)
def test_paths_without_weights(tmp_path, name, message):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SourceError, match=message):
        source.find(tmp_path / name)


def test_configurations(tmp_path):
    folder = checkpoints.write(tmp_path / "hf", {"w": np.ones(3, np.float32)}, vocabulary=False)
    assert (source.find(folder).config_file, source.find(folder).carried) == (None, {})
    (folder / "bert4torch_config.json").write_text('{"a": 1}')
    assert source.find(folder).config == {"a": 1}
    (folder / "config.json").write_text('{"a": 2}')
    assert source.find(folder).config == {"a": 2}
    (tmp_path / "mine.json").write_text('{"a": 3}')
    assert source.find(folder, tmp_path / "mine.json").config == {"a": 3}
    (folder / "config.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(DomainError, match='the key "a" stands twice'):
        source.find(folder)
    (folder / "config.json").write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(SourceError, match="at most 1048576 bytes"):
        source.find(folder)


def test_vocabularies_are_bounded(tmp_path, monkeypatch):
    folder = checkpoints.write(tmp_path / "hf", {"w": np.ones(3, np.float32)})
    (folder / "tokenizer.json").write_text("{}")
    assert source.carried(source.find(folder)) == {
        "vocab.txt": checkpoints.VOCABULARY.encode(),
        "tokenizer.json": b"{}",
    }
    monkeypatch.setattr(source, "_LARGEST_VOCABULARY", 3)
    with pytest.raises(SourceError, match="at most 3 bytes"):
        source.carried(source.find(folder))


def test_headers_of_safetensors_and_tensorflow_are_read_without_torch(gau, tmp_path):
    import subprocess
    import sys

    folder = checkpoints.write(tmp_path / "hf", {"w": np.ones(3, np.float32)})
    code = (
        "import sys; from pathlib import Path; from torchimpl import source;"
        f"source.find(Path({str(folder)!r})); source.find(Path({str(gau)!r})); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_bytes_that_are_no_file_at_all(tmp_path):
    for data in (b"", b"PK\x03\x04", b"\x80\x02.", os.urandom(100)):
        (tmp_path / "m.bin").write_bytes(data)
        with pytest.raises(SourceError):
            source.find(tmp_path / "m.bin")
