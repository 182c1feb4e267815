"""The tokenizer of a training: named or from the model folder, verified, and passed on with who is in lower case."""

import json

import pytest
import torch

from refimpl import model as specification
from refimpl.check import DomainError
from tests.refimpl.test_tokenizer import TOKENS, json_file, vocab_file
from tests.torchimpl.test_layers import CONFIGS
from torchimpl import checkpoint
from torchimpl import model as modules
from torchimpl.checkpoint import CheckpointError
from torchimpl.training import vocabulary
from torchimpl.training.run import TrainError

MODEL = specification.Model(CONFIGS["roformer_v2"], (), "bidirectional")
LOWER, CASED = TOKENS.index("we"), TOKENS.index("We")


def folder_with(folder, files):
    torch.manual_seed(0)
    checkpoint.save(folder, MODEL, modules.Model(MODEL).weights(), files)
    return folder


def first(found):
    return found.tokenizer().pieces("We")[0][0]


def test_a_file_that_is_named_is_read_and_passed_on(tmp_path):
    file = vocab_file(tmp_path, name="words.of.mine")
    for cased, expected in ((None, LOWER), (False, LOWER), (True, CASED)):
        found = vocabulary.find(file, tmp_path / "absent", cased)
        assert first(found) == expected
        assert found.files().keys() == {"vocab.txt", "tokenizer_config.json"}
        assert found.files()["vocab.txt"] == file.read_bytes()
        assert json.loads(found.files()["tokenizer_config.json"]) == {"do_lower_case": not cased}
        # The folder says the same of itself when it is the next model.
        again = vocabulary.find(None, folder_with(tmp_path / "model", found.files()))
        assert first(again) == expected and again.files() == found.files()
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    assert first(vocabulary.find(file, tmp_path)) == LOWER
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false, "model_max_length": 512}')
    assert [first(vocabulary.find(file, tmp_path, cased)) for cased in (None, False)] == [CASED, LOWER]
    with pytest.raises(TrainError, match="absent.txt is no file"):
        vocabulary.find(tmp_path / "absent.txt", tmp_path)


def test_a_tokenizer_json_tells_itself(tmp_path):
    file = json_file(tmp_path, lower_case=False)
    (tmp_path / "tokenizer_config.json").write_text("not read")
    found = vocabulary.find(file, tmp_path)
    assert first(found) == CASED and found.files() == {"tokenizer.json": file.read_bytes()}
    with pytest.raises(TrainError, match="tells itself whether texts keep their case; leave out --cased"):
        vocabulary.find(file, tmp_path, True)
    # In a folder with both it comes first.
    both = {"vocab.txt": vocab_file(tmp_path).read_bytes(), **found.files()}
    assert vocabulary.find(None, folder_with(tmp_path / "model", both)).files() == found.files()


def test_a_folder_is_read_as_its_manifest_lists_it(tmp_path):
    assert vocabulary.find(None, folder_with(tmp_path / "bare", {})) is None
    assert vocabulary.find(None, tmp_path / "model.json") is None
    words = vocab_file(tmp_path).read_bytes()
    folder = folder_with(tmp_path / "model", {"vocab.txt": words})
    assert first(vocabulary.find(None, folder)) == LOWER
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    with pytest.raises(TrainError, match="tokenizer_config.json is not in the manifest .* say so: --cased or --lower"):
        vocabulary.find(None, folder)
    assert first(vocabulary.find(None, folder, True)) == CASED
    (folder / "tokenizer_config.json").unlink()
    (folder / "vocab.txt").write_bytes(words[::-1])
    with pytest.raises(CheckpointError, match="vocab.txt is not the file that was written"):
        vocabulary.find(None, folder)
    (tmp_path / "bare/vocab.txt").write_bytes(words)
    with pytest.raises(TrainError, match="vocab.txt is not in the manifest .* say so: --tokenizer .*bare/vocab.txt"):
        vocabulary.find(None, tmp_path / "bare")


def test_errors_name_the_file(tmp_path):
    found = vocabulary.find(vocab_file(tmp_path, ["[PAD]", "[UNK]"]), tmp_path)
    with pytest.raises(DomainError, match=r"a vocabulary with \[CLS\], \[SEP\], .* of .*vocab\.txt"):
        found.tokenizer()
