"""From text files to token ids: a WordPiece tokenizer, words by a segmenter, and the files that hold examples.

A segmenter is a function from a text to its words. Each word is tokenised on its own, so that no token lies in two.
"""

import csv
import importlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from torchimpl.run import TrainError

Segmenter = Callable[[str], Sequence[str]]
LARGEST_FILE = 8 << 30
LONGEST_LINE = 1 << 24
LARGEST_TOKENIZER = 1 << 28
SUFFIXES = (".jsonl", ".tsv", ".csv")


class Row(NamedTuple):
    """An example of a classification: a text, the text that it is paired with if there is one, and its class."""

    text: str
    pair: str | None
    label: str


def tokenizer(file: Path) -> Any:
    """The tokenizer of a tokenizer.json, or the WordPiece tokenizer of a vocab.txt: BERT's, for lower case.

    Raises: TrainError for a file that is neither, or has no [CLS], [SEP], [PAD], [MASK] and [UNK].
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    _check_size(file, LARGEST_TOKENIZER)
    if file.suffix == ".json":
        try:
            made = Tokenizer.from_file(str(file))
        # What the library raises has no class of its own.
        except Exception as error:
            raise TrainError(f"train: {file} is no tokenizer.json ({error})") from None
        made.no_padding()
        made.no_truncation()
    else:
        lines = file.read_text(encoding="utf-8").splitlines()
        vocabulary = {token: index for index, token in enumerate(lines)}
        if len(vocabulary) < len(lines):
            twice = next(token for index, token in enumerate(lines) if vocabulary[token] != index)
            raise TrainError(f"train: {file} holds the token {twice!r} twice")
        made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ("[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]")
    if absent := [name for name in special if made.token_to_id(name) is None]:
        raise TrainError(f"train: {file} has no {', '.join(absent)}")
    return made


def segmenter(name: str) -> Segmenter | None:
    """A segmenter by name: None for wordpiece (a token that begins with ## goes on with the word before it), jieba
    where that is installed, or module:function.

    Raises: TrainError for another name, and for a module or function that is not there.
    """
    if name == "wordpiece":
        return None
    module, _, function = ("jieba:lcut" if name == "jieba" else name).partition(":")
    if not function:
        raise TrainError(f"train: expected the segmenter wordpiece, jieba or module:function, received {name!r}")
    try:
        found: Segmenter = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise TrainError(f"train: the segmenter {name} cannot be loaded: {error}") from None
    return found


def pieces(text: str, tokenizer: Any, segment: Segmenter | None = None) -> tuple[list[int], list[int]]:
    """The token ids of a text without [CLS] and [SEP], and which word each belongs to, from 0."""
    if segment is None:
        found = tokenizer.encode(text, add_special_tokens=False)
        starts = [not token.startswith("##") for token in found.tokens]
        return found.ids, [max(number - 1, 0) for number in np.cumsum(starts).tolist()]
    ids: list[int] = []
    words: list[int] = []
    encoded = [part.ids for part in tokenizer.encode_batch(list(segment(text)), add_special_tokens=False)]
    for number, part in enumerate([part for part in encoded if part]):
        ids += part
        words += [number] * len(part)
    return ids, words


def windows(
    texts: Iterator[str], tokenizer: Any, length: int, segment: Segmenter | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, mask and words (n, length): every text cut into [CLS] ... [SEP], between words where that is possible.

    Raises: TrainError for a length below 3, and where no text has a token.
    """
    if length < 3:
        raise TrainError(f"train: expected a length of 3 or more, [CLS] and [SEP] included, received {length}")
    first, last = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    rows: list[tuple[list[int], list[int]]] = []
    for text in texts:
        ids, words = pieces(text, tokenizer, segment)
        start = 0
        while start < len(ids):
            end = min(start + length - 2, len(ids))
            cut = end
            while end < len(ids) and cut > start and words[cut] == words[cut - 1]:
                cut -= 1
            # A word that is longer than a window is cut.
            end = cut if cut > start else end
            own = [word - words[start] for word in words[start:end]]
            rows.append(([first, *ids[start:end], last], [-1, *own, -1]))
            start = end
    if not rows:
        raise TrainError("train: the corpus has no token")
    made = np.full((len(rows), length), tokenizer.token_to_id("[PAD]"), np.int32)
    mask, belongs = np.zeros((len(rows), length), np.bool_), np.full((len(rows), length), -1, np.int32)
    for index, (ids, words) in enumerate(rows):
        made[index, : len(ids)], mask[index, : len(ids)], belongs[index, : len(ids)] = ids, True, words
    return made, mask, belongs


def encoded(rows: Sequence[Row], tokenizer: Any, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, segment ids and mask (n, width): [CLS] text [SEP], or [CLS] text [SEP] pair [SEP].

    width is that of the longest, `length` at most. What is too long loses tokens at the end of its longer part.
    Raises: TrainError for a length below 5.
    """
    if length < 5:
        raise TrainError(f"train: expected a length of 5 or more, [CLS] and [SEP] included, received {length}")
    first, last = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    made = []
    for row in rows:
        one = tokenizer.encode(row.text, add_special_tokens=False).ids
        two = None if row.pair is None else tokenizer.encode(row.pair, add_special_tokens=False).ids
        room = length - 2 - (two is not None)
        while len(one) + len(two or []) > room:
            (one if len(one) >= len(two or []) else two or one).pop()
        head = [first, *one, last]
        tail = [] if two is None else [*two, last]
        made.append((head + tail, [0] * len(head) + [1] * len(tail)))
    width = max(len(ids) for ids, _ in made)
    token_ids = np.full((len(made), width), tokenizer.token_to_id("[PAD]"), np.int64)
    segment_ids, mask = np.zeros_like(token_ids), np.zeros(token_ids.shape, np.bool_)
    for index, (ids, segments) in enumerate(made):
        token_ids[index, : len(ids)], segment_ids[index, : len(ids)], mask[index, : len(ids)] = ids, segments, True
    return token_ids, segment_ids, mask


def documents(file: Path) -> Iterator[str]:
    """The texts of a corpus: the lines of a .txt that are not empty, or "text" of every object of a .jsonl.

    Raises: TrainError for another suffix, a line that is too long and an object without a text.
    """
    if file.suffix not in (".txt", ".jsonl"):
        raise TrainError(f"train: expected a corpus as .txt, .jsonl or .npz, received {file}")
    for number, line in _lines(file):
        if file.suffix == ".txt":
            yield line
        else:
            yield _text(_object(file, number, line), "text", file, number)


def rows(file: Path) -> list[Row]:
    """The examples of a .jsonl, .tsv or .csv with the fields text, label and, if the texts come in pairs, pair.

    A .tsv has no quotes; a table names its columns in the first line.
    Raises: TrainError for another suffix, a missing field, an empty file and pairs that some rows lack.
    """
    if file.suffix not in SUFFIXES:
        raise TrainError(f"train: expected examples as {', '.join(SUFFIXES)} or .npz, received {file}")
    made = [Row(_text(o, "text", file, n), _pair(o, file, n), _text(o, "label", file, n)) for n, o in _objects(file)]
    if not made:
        raise TrainError(f"train: {file} has no example")
    if len({row.pair is None for row in made}) == 2:
        raise TrainError(f"train: {file}: some examples have a pair and others have none")
    return made


def arrays(file: Path, required: Sequence[str], known: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of an .npz, all with as many rows.

    Raises: TrainError for a missing or unknown array, one that holds objects, and rows that differ in number.
    """
    _check_size(file, LARGEST_FILE)
    try:
        with np.load(file, allow_pickle=False) as held:
            found = {name: held[name] for name in held.files}
    except (ValueError, OSError) as error:
        raise TrainError(f"train: {file} is no archive of plain arrays ({error})") from None
    if missing := [name for name in required if name not in found]:
        raise TrainError(f"train: {file} has no {', '.join(missing)}; it has {', '.join(found) or 'nothing'}")
    if unknown := [name for name in found if name not in known]:
        raise TrainError(f"train: {file}: unknown arrays {', '.join(unknown)}; the known ones are {', '.join(known)}")
    sizes = {name: array.shape for name, array in found.items()}
    if len({shape[:1] for shape in sizes.values()}) > 1 or () in sizes.values():
        raise TrainError(f"train: {file}: expected arrays with as many rows, received {sizes}")
    return found


def _objects(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if file.suffix == ".jsonl":
        yield from ((number, _object(file, number, line)) for number, line in _lines(file))
        return
    _check_size(file, LARGEST_FILE)
    form: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if file.suffix == ".tsv" else {}
    with file.open(encoding="utf-8-sig", newline="") as held:
        try:
            for number, row in enumerate(csv.DictReader(held, strict=True, **form), start=2):
                if None in row or None in row.values():
                    raise TrainError(f"train: {file}, row {number}: expected the fields of the first, received {row}")
                yield number, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise TrainError(f"train: {file} is no table in UTF-8 ({error})") from None


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    _check_size(file, LARGEST_FILE)
    with file.open(encoding="utf-8-sig") as held:
        for number in itertools.count(1):
            try:
                line = held.readline(LONGEST_LINE + 1)
            except UnicodeDecodeError as error:
                raise TrainError(f"train: {file}, line {number}: no UTF-8 ({error})") from None
            if not line:
                return
            if len(line) > LONGEST_LINE:
                raise TrainError(f"train: {file}, line {number}: longer than {LONGEST_LINE} characters")
            if line.strip():
                yield number, line.strip()


def _object(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        made = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TrainError(f"train: {file}, line {number}: no JSON ({error})") from None
    if not isinstance(made, dict):
        raise TrainError(f"train: {file}, line {number}: expected an object, received {line[:60]}")
    return made


def _pair(held: dict[str, Any], file: Path, number: int) -> str | None:
    return _text(held, "pair", file, number) if "pair" in held else None


def _text(held: dict[str, Any], key: str, file: Path, number: int) -> str:
    found = held.get(key)
    # A class may be a number.
    if key == "label" and type(found) is int:
        return str(found)
    if not isinstance(found, str):
        raise TrainError(f"train: {file}, line {number}: expected a text under {key!r}, received {found!r}")
    return found


def _check_size(file: Path, most: int) -> None:
    if not file.is_file():
        raise TrainError(f"train: {file} is no file")
    if file.stat().st_size > most:
        raise TrainError(f"train: {file} has {file.stat().st_size} bytes; at most {most} are read")
