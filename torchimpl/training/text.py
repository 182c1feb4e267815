"""From the files that hold examples to token ids: what a word is, windows of a corpus, rows, arrays.

A segmenter is a function from a text to its words. Each word is tokenised on its own, so that no token lies in two.
"""

import csv
import importlib
import itertools
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy

from refimpl.tokenizer import FIRST, PAD, SEPARATOR, AnyTokenizer
from torchimpl.training.run import TrainError

Segmenter = Callable[[str], Sequence[str]]
LARGEST_FILE = 8 << 30
LONGEST_LINE = 1 << 24
# Of the arrays of an .npz together, unpacked.
LARGEST_ARRAYS = 8 << 30
SUFFIXES = (".jsonl", ".tsv", ".csv")


class Row(NamedTuple):
    """An example of a classification: a text, the text that it is paired with if there is one, and its class."""

    text: str
    pair: str | None
    label: str


class Encoded(NamedTuple):
    """Token ids, segment ids and mask (n, width) of texts, and how many tokens each has that is not cut."""

    token_ids: np.ndarray
    segment_ids: np.ndarray
    mask: np.ndarray
    lengths: tuple[int, ...]


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


def pieces(text: str, tokenizer: AnyTokenizer, segment: Segmenter | None = None) -> tuple[list[int], list[int]]:
    """The token ids of a text without [CLS] and [SEP], and which word each belongs to, from 0."""
    if segment is None:
        found = [index for index, _ in tokenizer.pieces(text)]
        starts = [not tokenizer.token(index).startswith("##") for index in found]
        return found, [max(number - 1, 0) for number in np.cumsum(starts).tolist()]
    ids: list[int] = []
    words: list[int] = []
    encoded = [[index for index, _ in part] for part in tokenizer.pieces_batch(list(segment(text)))]
    for number, part in enumerate([part for part in encoded if part]):
        ids += part
        words += [number] * len(part)
    return ids, words


def windows(
    texts: Iterator[str], tokenizer: AnyTokenizer, length: int, segment: Segmenter | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, mask and words (n, length): every text cut into [CLS] ... [SEP], between words where that is possible.

    Raises: TrainError for a length below 3, a tokenizer without [PAD], and where no text has a token.
    """
    if length < 3:
        raise TrainError(f"train: expected a length of 3 or more, [CLS] and [SEP] included, received {length}")
    first, last, padding = tokenizer.ids[FIRST], tokenizer.ids[SEPARATOR], special(tokenizer, PAD)
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
    made = np.full((len(rows), length), padding, np.int32)
    mask, belongs = np.zeros((len(rows), length), np.bool_), np.full((len(rows), length), -1, np.int32)
    for index, (ids, words) in enumerate(rows):
        made[index, : len(ids)], mask[index, : len(ids)], belongs[index, : len(ids)] = ids, True, words
    return made, mask, belongs


def encoded(rows: Sequence[Row], tokenizer: AnyTokenizer, length: int) -> Encoded:
    """The texts as [CLS] text [SEP], or [CLS] text [SEP] pair [SEP].

    width is that of the longest, `length` at most. What is too long loses tokens at the end of its longer part.
    Raises: TrainError for a length below 5, and for a tokenizer without [PAD].
    """
    if length < 5:
        raise TrainError(f"train: expected a length of 5 or more, [CLS] and [SEP] included, received {length}")
    padding = special(tokenizer, PAD)
    texts = [row.text if row.pair is None else (row.text, row.pair) for row in rows]
    made = tokenizer.encode_batch(texts, max_length=length)
    width = max(len(one.token_ids) for one in made)
    token_ids = np.full((len(made), width), padding, np.int64)
    segment_ids, mask = np.zeros_like(token_ids), np.zeros(token_ids.shape, np.bool_)
    for index, one in enumerate(made):
        here = slice(len(one.token_ids))
        token_ids[index, here], segment_ids[index, here], mask[index, here] = one.token_ids, one.segment_ids, True
    return Encoded(token_ids, segment_ids, mask, tuple(one.length for one in made))


def cut(lengths: Sequence[int], length: int) -> str:
    """How many texts of these lengths are cut to `length`, and the longest of them, in words; "" where none is."""
    many = sum(whole > length for whole in lengths)
    if not many:
        return ""
    return f"{many:,} of {len(lengths):,} texts cut to --length {length}, the longest from {max(lengths):,} tokens"


def special(tokenizer: AnyTokenizer, token: str) -> int:
    """The id of [PAD] or [MASK], which a tokenizer may lack.

    Raises: TrainError where it does.
    """
    if token not in tokenizer.ids:
        raise TrainError(f"train: the tokenizer has no {token}")
    return tokenizer.ids[token]


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

    All headers are looked at before an array is made, so that a small file cannot ask for a large memory.
    Raises: TrainError for a missing or unknown array, one that holds objects or is larger than its file says, more than
        LARGEST_ARRAYS bytes in all, and rows that differ in number.
    """
    _check_size(file, LARGEST_FILE)
    try:
        with zipfile.ZipFile(file) as held:
            members = _members(file, held, required, known)
            found = {name: _array(held, member) for name, member in members.items()}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        if isinstance(error, TrainError):
            raise
        raise TrainError(f"train: {file} is no archive of plain arrays ({error})") from None
    return found


def _members(
    file: Path, held: zipfile.ZipFile, required: Sequence[str], known: Sequence[str]
) -> dict[str, zipfile.ZipInfo]:
    """What of an .npz holds which array, by the headers alone."""
    listed = held.infolist()
    members = {member.filename.removesuffix(".npy"): member for member in listed}
    if missing := [name for name in required if name not in members]:
        raise TrainError(f"train: {file} has no {', '.join(missing)}; it has {', '.join(members) or 'nothing'}")
    if unknown := [name for name in members if name not in known]:
        raise TrainError(f"train: {file}: unknown arrays {', '.join(unknown)}; the known ones are {', '.join(known)}")
    if len(members) < len(listed):
        raise TrainError(f"train: {file} has two arrays of one name")
    total = sum(member.file_size for member in listed)
    if total > LARGEST_ARRAYS:
        raise TrainError(f"train: {file} has {total} bytes of arrays; at most {LARGEST_ARRAYS} are read")
    sizes = {name: _shape(held, member) for name, member in members.items()}
    if len({shape[:1] for shape in sizes.values()}) > 1 or () in sizes.values():
        raise TrainError(f"train: {file}: expected arrays with as many rows, received {sizes}")
    return members


def _shape(held: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[int, ...]:
    """The shape that the header of an array tells, where the archive holds as many bytes as it needs."""
    with held.open(member) as opened:
        shape, dtype = _header(opened)
        left = member.file_size - opened.tell()
    if dtype.hasobject:
        raise ValueError(f"{member.filename} holds objects")
    due = math.prod(shape) * dtype.itemsize
    if due != left:
        raise ValueError(f"{member.filename}: {shape} of {dtype} are {due} bytes, received {left}")
    return shape


def _header(opened: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = npy.read_magic(opened)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of .npy, of which plain arrays have no need")
    shape, _, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(opened)
    return shape, dtype


def _array(held: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with held.open(member) as opened:
        return np.asarray(npy.read_array(opened, allow_pickle=False))


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
