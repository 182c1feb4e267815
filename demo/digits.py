"""Handwritten digits as sequences: the 1,797 images of scikit-learn, 8 x 8 pixels of 17 shades, read row by row.

Token ids are the shades, segment ids the rows. The split is fixed: what is tested is never looked at before.
"""

from typing import Any, NamedTuple

import numpy as np

SHADES, ROWS, LENGTH, CLASSES = 17, 8, 64, 10
SEED = 0
VALIDATION, TEST = 300, 360


class Images(NamedTuple):
    """Some of the images, as a model takes them, and the digits that they show."""

    token_ids: np.ndarray
    segment_ids: np.ndarray
    labels: np.ndarray


class Digits(NamedTuple):
    """The three parts: to learn from, to choose by, and to report on."""

    train: Images
    validation: Images
    test: Images

    def first(self, count: int) -> "Digits":
        """The first images of every part, for a quick run."""
        return Digits(*(Images(*(array[:count] for array in part)) for part in self))


def load() -> Digits:
    """All images, in three parts that are the same every time."""
    from sklearn import datasets

    found = datasets.load_digits()
    token_ids = found.images.reshape(-1, LENGTH).astype(np.int64)
    segment_ids = np.broadcast_to(np.arange(LENGTH) // (LENGTH // ROWS), token_ids.shape).copy()
    order = np.random.default_rng(SEED).permutation(len(token_ids))
    rows = np.split(order, [TEST, TEST + VALIDATION])
    test, validation, train = (Images(token_ids[r], segment_ids[r], found.target[r].astype(np.int64)) for r in rows)
    return Digits(train, validation, test)


def majority(digits: Digits) -> float:
    """The accuracy on the test set of always answering the most frequent digit of the training set."""
    most = np.bincount(digits.train.labels, minlength=CLASSES).argmax()
    return float((digits.test.labels == most).mean())


def jitter(token_ids: Any, generator: Any) -> Any:
    """Every pixel one shade darker, lighter or the same: other images of the same digits (tensors of torch)."""
    import torch

    moved = token_ids + torch.randint(-1, 2, token_ids.shape, generator=generator, dtype=token_ids.dtype)
    return moved.clamp(0, SHADES - 1)
