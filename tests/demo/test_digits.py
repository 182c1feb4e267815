"""The images: a split that is written down here, a baseline counted by hand, other images of the same digits."""

from collections import Counter

import numpy as np
import pytest
import torch

from demo import digits
from demo.digits import Digits, Images


@pytest.fixture(scope="module")
def data():
    return digits.load()


def test_shapes_and_ranges(data):
    for part, n in zip(data, (1137, 300, 360), strict=True):
        assert part.token_ids.shape == part.segment_ids.shape == (n, 64)
        assert part.labels.shape == (n,)
        assert {array.dtype for array in part} == {np.dtype(np.int64)}
        assert (part.token_ids.min(), part.token_ids.max()) == (0, 16)
        assert set(part.labels) == set(range(10))
        assert part.segment_ids[0].tolist() == [row for row in range(8) for _ in range(8)]
        assert (part.segment_ids == part.segment_ids[0]).all()


def test_the_split_is_this_one(data):
    assert data.train.labels[:12].tolist() == [8, 3, 8, 3, 1, 4, 5, 1, 5, 2, 6, 0]
    assert data.validation.labels[:12].tolist() == [4, 9, 5, 8, 5, 3, 3, 9, 7, 1, 8, 7]
    assert data.test.labels[:12].tolist() == [6, 6, 6, 2, 5, 6, 6, 2, 2, 1, 1, 9]
    assert data.test.token_ids[0, :16].tolist() == [0, 0, 1, 13, 7, 0, 0, 0, 0, 0, 7, 14, 2, 0, 0, 0]
    assert [int(part.token_ids.sum()) for part in data] == [355437, 93196, 113085]


def test_every_image_is_in_one_part(data):
    from sklearn import datasets

    found = datasets.load_digits()
    whole = Counter(
        (tuple(image), label) for image, label in zip(found.data.astype(int).tolist(), found.target, strict=True)
    )
    rows = [zip(part.token_ids.tolist(), part.labels, strict=True) for part in data]
    parts = [Counter((tuple(image), label) for image, label in each) for each in rows]
    assert len(whole) == sum(map(len, parts)) == 1797
    assert parts[0] + parts[1] + parts[2] == whole


def test_the_same_every_time(data):
    np.random.default_rng(5).random(3)
    for part, again in zip(data, digits.load(), strict=True):
        for one, other in zip(part, again, strict=True):
            np.testing.assert_array_equal(one, other)


def test_the_first_of_every_part(data):
    few = data.first(7)
    assert [len(array) for part in few for array in part] == [7] * 9
    np.testing.assert_array_equal(few.validation.token_ids, data.validation.token_ids[:7])
    assert data.first(320).validation.labels.shape == (300,)


def labelled(labels):
    return Images(np.zeros((len(labels), 64), int), np.zeros((len(labels), 64), int), np.array(labels))


def test_the_baseline_answers_the_most_frequent_training_digit(data):
    small = Digits(labelled([1, 3, 3, 9, 9, 9]), labelled([3, 3, 3]), labelled([3, 3, 9, 1]))
    assert digits.majority(small) == 0.25
    counts = Counter(data.train.labels.tolist())
    # Three digits are equally frequent; the first of them is answered.
    most = min(digit for digit, count in counts.items() if count == max(counts.values()))
    assert digits.majority(data) == data.test.labels.tolist().count(most) / 360 == 29 / 360


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_jitter_moves_by_one_shade_and_stays_in_range(dtype):
    ids = torch.arange(17, dtype=dtype).repeat(200, 1)
    moved = digits.jitter(ids, torch.Generator().manual_seed(0))
    assert moved.dtype == dtype
    assert moved.shape == ids.shape
    assert (moved.min(), moved.max()) == (0, 16)
    assert {int(step) for step in (moved - ids).unique()} == {-1, 0, 1}
    # Each third of the time; at the ends what would leave the range stays.
    shares = [float((moved - ids == step)[:, 1:16].double().mean()) for step in (-1, 0, 1)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.03)
    assert float((moved == ids)[:, [0, 16]].double().mean()) == pytest.approx(2 / 3, abs=0.06)
    assert torch.equal(ids, torch.arange(17, dtype=dtype).repeat(200, 1))


def test_jitter_draws_from_its_generator_alone():
    ids = torch.full((4, 64), 8)
    before = torch.get_rng_state()
    first = digits.jitter(ids, torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(digits.jitter(ids, torch.Generator().manual_seed(3)), first)
    generator = torch.Generator().manual_seed(3)
    digits.jitter(ids, generator)
    assert not torch.equal(digits.jitter(ids, generator), first)
