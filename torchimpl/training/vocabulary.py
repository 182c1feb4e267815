"""The tokenizer of a training: the file that is named or the one in the model folder, and what is passed on of it.

A model folder has the file as tokenizer.json or vocab.txt; beside a vocab.txt, tokenizer_config.json tells whether
texts are in lower case. Its manifest lists both, and what it does not list is not read.
"""

import json
from pathlib import Path
from typing import NamedTuple

from refimpl import tokenizer as tokenizers
from refimpl.tokenizer import CONFIG, FILES, JSON, VOCAB, AnyTokenizer
from torchimpl import checkpoint
from torchimpl.training.run import TrainError


class Vocabulary(NamedTuple):
    """The bytes of a tokenizer.json or vocab.txt, and where they were found.

    lower_case: of the texts of a vocab.txt; None for a tokenizer.json, which tells itself.
    """

    where: str
    data: bytes
    lower_case: bool | None

    @property
    def name(self) -> str:
        """What the file is called in a model folder."""
        return JSON if self.lower_case is None else VOCAB

    def tokenizer(self) -> AnyTokenizer:
        """Raises: DomainError as refimpl.tokenizer.parsed; ModuleNotFoundError where tokenizers is not installed."""
        return tokenizers.parsed(self.data, self.where, lower_case=self.lower_case)

    def files(self) -> dict[str, bytes]:
        """What a model folder holds of it."""
        told = {} if self.lower_case is None else {CONFIG: _config(self.lower_case)}
        return {self.name: self.data, **told}


def find(named: Path | None, folder: Path, cased: bool | None = None) -> Vocabulary | None:
    """The tokenizer's file that is named, or that of a model folder; None without either.

    cased: texts keep their case; where None, what tokenizer_config.json beside a vocab.txt says, else lower case.
    Raises: TrainError for a file that is not there or that the manifest does not list, and for `cased` with a
        tokenizer.json; CheckpointError for a file that changed; DomainError for one that is too large.
    """
    if named is not None:
        if not named.is_file():
            raise TrainError(f"train: {named} is no file")
        beside = named.with_name(CONFIG)
        told = tokenizers.bounded(beside) if cased is None and beside.is_file() else None
        return _made(named, tokenizers.bounded(named), beside, told, cased)
    for name in FILES:
        file, beside = folder / name, folder / CONFIG
        if file.is_file():
            told = _listed(beside) if name == VOCAB and cased is None and beside.is_file() else None
            return _made(file, _listed(file), beside, told, cased)
    return None


def _made(file: Path, data: bytes, beside: Path, told: bytes | None, cased: bool | None) -> Vocabulary:
    if file.suffix == ".json":
        if cased is not None:
            raise TrainError(
                f"train: {file} tells itself whether texts keep their case; leave out --cased, --lower-case"
            )
        return Vocabulary(str(file), data, None)
    if told is not None:
        return Vocabulary(str(file), data, tokenizers.told_lower_case(told, str(beside)) is not False)
    return Vocabulary(str(file), data, not cased)


def _listed(file: Path) -> bytes:
    if file.name not in checkpoint.listed(file.parent):
        remedy = f"--tokenizer {file}" if file.name in FILES else "--cased or --lower-case"
        raise TrainError(
            f"train: {file} is not in the manifest of its folder, so it is not read; if it belongs to this model, say "
            f"so: {remedy}"
        )
    return checkpoint.extra(file.parent, file.name)


def _config(lower_case: bool) -> bytes:
    return (json.dumps({"do_lower_case": lower_case}, indent=2) + "\n").encode()
