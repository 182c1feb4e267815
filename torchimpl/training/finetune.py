"""Fine-tuning: classes of texts, or of pairs of texts, from the files that people have them in."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from refimpl.tokenizer import AnyTokenizer
from torchimpl.training import text
from torchimpl.training.loop import Labelled
from torchimpl.training.run import TrainError

ARRAYS = ("token_ids", "labels", "segment_ids", "mask")


class Data(NamedTuple):
    """Examples to learn, examples to judge by, and the names of the classes."""

    train: Labelled
    validation: Labelled
    classes: tuple[str, ...]


def read(
    file: Path,
    validation: Path | None,
    *,
    tokenizer: AnyTokenizer | None = None,
    length: int = 512,
    share: float = 0.1,
    seed: int = 0,
    told: Callable[[str], None] = lambda line: None,
) -> Data:
    """The examples of a .npz (token_ids, labels and, if need be, segment_ids, mask), or texts as in `text.rows`.

    Without a file for validation, `share` of the examples are held out, drawn by the seed. Classes are in the order of
    their names, numbers in that of their size.

    told: receives a line about every file of which texts were cut to `length`.
    Raises: TrainError for arrays of other shapes or dtypes, texts without a tokenizer, a class of the validation that
        is not learnt, fewer than two classes, and too few examples to hold one out.
    """
    parts = [_read(part, tokenizer, length, told) for part in (file, validation) if part is not None]
    classes = _classes([labels for _, labels in parts])
    numbers = {name: index for index, name in enumerate(classes)}
    held = [examples._replace(labels=torch.tensor([numbers[n] for n in names])) for examples, names in parts]
    if validation is not None:
        return Data(held[0], held[1], classes)
    size = len(held[0].labels)
    left = max(1, round(share * size))
    if left >= size:
        raise TrainError(f"train: {file} has {size} examples, of which {left} are to be held out: too few")
    drawn = torch.from_numpy(np.random.default_rng(seed).permutation(size))
    return Data(held[0].take(drawn[left:].sort().values), held[0].take(drawn[:left].sort().values), classes)


def _read(
    file: Path, tokenizer: AnyTokenizer | None, length: int, told: Callable[[str], None]
) -> tuple[Labelled, list[str]]:
    """Examples whose labels are yet to be numbered, and these by name."""
    if file.suffix == ".npz":
        return _arrays(text.arrays(file, ("token_ids", "labels"), ARRAYS), file)
    rows = text.rows(file)
    if tokenizer is None:
        raise TrainError(f"train: {file} holds texts, for which a tokenizer is needed: tokenizer.json or vocab.txt")
    *arrays, lengths = text.encoded(rows, tokenizer, length)
    if line := text.cut(lengths, length):
        told(f"{file}: {line}")
    ids, segments, mask = map(torch.from_numpy, arrays)
    return Labelled(ids, torch.zeros(len(rows), dtype=torch.int64), segments, mask), [row.label for row in rows]


def _arrays(held: dict[str, np.ndarray], file: Path) -> tuple[Labelled, list[str]]:
    shape = held["token_ids"].shape
    for name, array in held.items():
        due, kinds = (shape[:1] if name == "labels" else shape), ("b" if name == "mask" else "iu")
        if len(shape) != 2 or array.shape != due or array.dtype.kind not in kinds or array.size == 0:
            raise TrainError(
                f"train: {file}: expected {', '.join(ARRAYS[:3])} of integers and a boolean mask, (n, length) each and "
                f"labels (n,), received {name} {array.shape} of {array.dtype}"
            )
        if kinds == "iu" and array.min() < 0:
            raise TrainError(f"train: {file}: {name} holds {array.min()}; ids and classes count from 0")
    tensors: dict[str, Tensor] = {
        n: torch.from_numpy(a if n == "mask" else a.astype(np.int64)) for n, a in held.items()
    }
    return Labelled(**tensors), [str(label) for label in held["labels"].tolist()]


def _classes(parts: list[list[str]]) -> tuple[str, ...]:
    numbered = all(name.isdecimal() and str(int(name)) == name for name in parts[0])
    made = sorted(set(parts[0]), key=int if numbered else str)
    if unknown := sorted({name for part in parts[1:] for name in part} - set(made)):
        raise TrainError(f"train: the classes {', '.join(unknown[:5])} are in the validation and never learnt")
    if len(made) < 2:
        raise TrainError(f"train: expected two classes or more, received {', '.join(made)}")
    return tuple(made)
