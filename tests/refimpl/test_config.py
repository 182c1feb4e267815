"""Configurations: read from JSON in one place, strictly, and checked field by field."""

import dataclasses
import json
import pathlib

import pytest

from refimpl import config
from refimpl.check import DomainError

GAU = {
    "model": "gau_alpha", "vocab_size": 29, "hidden_size": 5, "layers": 2, "expanded_size": 7, "key_size": 4,
    "segments": 3, "n_min": 1, "epsilon": 1e-12, "rotary_base": 10000,
}  # fmt: skip
FLASH = {
    "model": "flash", "vocab_size": 29, "hidden_size": 5, "layers": 2, "expanded_size": 7, "key_size": 4,
    "segments": 3, "chunk": 3, "mix": "causal", "kernel": "laplace", "divisor": "chunk", "normaliser": "visible",
    "rows": "paper", "rotation": "half_split", "rotary_base": 1e4, "epsilon": 1e-5,
}  # fmt: skip
FLASH_QUAD = {
    "model": "flash_quad", "vocab_size": 29, "hidden_size": 5, "layers": 2, "expanded_size": 7, "key_size": 4,
    "segments": 3, "kernel": "laplace", "divisor": "constant", "length": 512, "rotation": "half_split",
    "rotary_base": 1e4, "epsilon": 1e-5,
}  # fmt: skip


def changed(given, **changes):
    return {**given, **changes}


def test_the_directory_is_the_registry():
    folder = pathlib.Path(config.models.__path__[0])
    assert set(config.known()) == {file.stem for file in folder.glob("[!_]*.py")} >= {"flash", "gau_alpha"}


@pytest.mark.parametrize("given", [GAU, FLASH, FLASH_QUAD], ids=["gau_alpha", "flash", "flash_quad"])
def test_a_configuration_comes_back_from_its_file(tmp_path, given):
    made = config.from_dict(given)
    assert type(made).__module__ == f"refimpl.models.{given['model']}"
    assert made.model == given["model"]
    assert config.to_dict(made) == given
    config.write(made, tmp_path / "config.json")
    assert config.read(tmp_path / "config.json") == made
    assert json.loads((tmp_path / "config.json").read_text()) == given


def test_a_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.from_dict(GAU).layers = 3


def test_an_unknown_key_is_named_with_the_known_ones():
    with pytest.raises(DomainError) as error:
        config.from_dict(changed(GAU, hidden_dropout=0.1, colour="blue"))
    assert str(error.value) == (
        'gau_alpha.Config: unknown key "hidden_dropout", "colour"; the known keys are model, vocab_size, hidden_size, '
        "layers, expanded_size, key_size, segments, n_min, epsilon, rotary_base"
    )


def test_a_missing_key_is_named():
    with pytest.raises(DomainError, match='gau_alpha.Config: missing key "epsilon"; received model, vocab_size'):
        config.from_dict({key: value for key, value in GAU.items() if key != "epsilon"})


@pytest.mark.parametrize("model", ["bert", "_encoder", "os", None, ["flash"]])
def test_an_unknown_model_is_named_with_the_known_ones(model):
    with pytest.raises(DomainError, match=r'expected "model" to be one of .*flash, flash_quad, gau_alpha.*, received'):
        config.from_dict(changed(GAU, model=model))


def test_only_an_object_is_a_configuration(tmp_path):
    (tmp_path / "config.json").write_text('["flash"]')
    with pytest.raises(DomainError, match="expected a JSON object"):
        config.read(tmp_path / "config.json")


@pytest.mark.parametrize("data", [b"{", b"", b"\xff{}", b"[" * 100_000])
def test_a_file_that_is_no_json_is_named(tmp_path, data):
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(DomainError, match="config: .*config.json is no JSON: "):
        config.read(tmp_path / "config.json")


def test_a_key_stands_once(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GAU)[:-1] + ', "layers": 3}')
    with pytest.raises(DomainError, match='the key "layers" stands twice'):
        config.read(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("given", "key", "value", "message"),
    [
        (GAU, "layers", 2.0, "gau_alpha.Config: expected layers of type int, received layers=2.0"),
        (GAU, "layers", True, "expected layers of type int, received layers=True"),
        (GAU, "layers", "2", "expected layers of type int"),
        (GAU, "layers", None, "expected layers of type int"),
        (GAU, "layers", 0, "expected layers >= 1, received layers=0"),
        (GAU, "vocab_size", -1, "expected vocab_size >= 1"),
        (GAU, "key_size", 3, "expected an even key_size, received key_size=3"),
        (GAU, "n_min", 0, "expected n_min >= 1"),
        (GAU, "epsilon", -1e-9, "expected epsilon >= 0"),
        (GAU, "epsilon", float("nan"), "expected epsilon a finite number"),
        (GAU, "epsilon", False, "expected epsilon a finite number"),
        (GAU, "rotary_base", 0, "expected rotary_base > 0"),
        (FLASH, "mix", "both", "flash.Config: expected mix one of 'bidirectional', 'causal', received mix='both'"),
        (FLASH, "normaliser", "lucidrains", "expected a normaliser other than lucidrains with mix causal"),
        (FLASH, "chunk", 0, "expected chunk >= 1"),
        (FLASH, "rows", 0, "expected rows one of 'paper', 'lucidrains'"),
    ],
)
def test_a_wrong_value_is_named(given, key, value, message):
    with pytest.raises(DomainError) as error:
        config.from_dict(changed(given, **{key: value}))
    assert message in str(error.value)


def test_the_normaliser_of_causal_reading_is_for_causal_reading():
    with pytest.raises(DomainError, match="other than lucidrains_causal with mix bidirectional"):
        config.from_dict(changed(FLASH, mix="bidirectional", normaliser="lucidrains_causal"))


def test_a_configuration_made_by_hand_is_checked_too():
    with pytest.raises(DomainError, match="n_min >= 1"):
        dataclasses.replace(config.from_dict(GAU), n_min=0)
    with pytest.raises(DomainError, match="expected chunk of type int"):
        dataclasses.replace(config.from_dict(FLASH), chunk=2.5)
