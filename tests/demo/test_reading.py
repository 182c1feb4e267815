"""What is read from answers: bookkeeping by hand, and settings that the test images have no part in."""

import io
from itertools import product

import numpy as np
import pytest
from rich.console import Console

from demo import classifiers, reading
from demo.digits import Digits, Images
from demo.stage import Stage
from demo.terminal import Bars

CUSTOMARY = {"top": 3, "threshold": 0.9, "alpha": 1.0, "iterations": 1}


def images(labels):
    ids = np.zeros((len(labels), 64), np.int64)
    return Images(ids, ids, np.array(labels))


def logits(rows):
    """Logits of probabilities of the first two classes; the others have next to nothing."""
    p = np.full((len(rows), 10), 1e-12)
    p[:, :2] = rows
    return np.log(p).astype(np.float32)


# Five sure of each class, then one torn row for each label: next to the sure ones, with the prior (0.8, 0.2), a torn
# row turns from class 1 to class 0, since 0.45 / 5.45 · 0.8 > 0.55 / 5.55 · 0.2.
SURE, TORN = [[1 - 1e-9, 1e-9]] * 5 + [[1e-9, 1 - 1e-9]] * 5, [0.45, 0.55]


def case(validation, test):
    """The answers and labels of torn rows with these true labels in the two parts."""
    train = [0] * 8 + [1] * 2
    # One of the sure rows is wrong, and stays so.
    labels = [[0] * 5 + [1] * 4 + [2] + torn for torn in (validation, test)]
    empty = np.zeros((0, 3), np.float32)
    answers = {part: (logits(SURE + [TORN] * len(torn)), empty)
               for part, torn in (("validation", validation), ("test", test))}  # fmt: skip
    answers["train"] = (logits([[0.5, 0.5]] * len(train)), empty)
    return answers, Digits(images(train), *map(images, labels))


def test_what_is_mended_and_spoilt_is_counted_in_each_part():
    told = reading.normalised(*case([0, 0, 1], [0, 1, 1, 1]))
    # The entropy of a torn row is 0.688 of ln 3 = 1.099: uncertain from threshold 0.6 on, which is tried before any
    # other number of classes.
    assert told["setting"] == CUSTOMARY | {"threshold": 0.6}
    assert told["validation"] == {
        "before": 10 / 13, "after": 11 / 13, "uncertain": 3, "mended": 2, "spoilt": 1, "images": 13
    }  # fmt: skip
    assert told["test"] == {"before": 12 / 14, "after": 10 / 14, "uncertain": 4, "mended": 1, "spoilt": 3, "images": 14}


def test_where_nothing_helps_the_customary_setting_stays():
    told = reading.normalised(*case([1, 1], [0, 0]))
    assert told["setting"] == CUSTOMARY
    assert told["validation"] == {
        "before": 11 / 12,
        "after": 11 / 12,
        "uncertain": 0,
        "mended": 0,
        "spoilt": 0,
        "images": 12,
    }
    assert told["test"]["after"] == told["test"]["before"] == 9 / 12


def test_the_prior_is_that_of_the_training_labels():
    answers, data = case([0, 0], [0, 0])
    even = data._replace(train=images([0] * 5 + [1] * 5))
    assert reading.normalised(answers, data)["test"]["mended"] == 2
    assert reading.normalised(answers, even)["validation"]["mended"] == 0


@pytest.mark.parametrize("validation", [[0, 0], [1, 1]])
def test_the_test_images_do_not_choose_the_setting(validation):
    chosen = [reading.normalised(*case(validation, test))["setting"] for test in ([0, 0, 0], [1, 1, 1], [0])]
    assert chosen[0] == chosen[1] == chosen[2]


def dominated(width=5, rank=None, seed=0):
    """Vectors of four classes on two axes, beside a plane of noise that is a hundred times as wide."""
    drawn = np.random.default_rng(seed)
    answers, parts = {}, {}
    for part, n in (("train", 80), ("validation", 40), ("test", 36)):
        labels = drawn.integers(0, 4, n)
        x = drawn.normal(size=(n, width)) * 0.05
        x[:, :2] = drawn.normal(size=(n, 2)) * 100
        x[:, 2] += 2 * (labels % 2) - 1
        x[:, 3] += 2 * (labels // 2) - 1
        if rank is not None:
            x[:, rank:] = 0
            # With beta = 0 the mean counts as a direction of its own.
            x[:, rank] = 3
        answers[part] = np.zeros((n, 10), np.float32), x.astype(np.float32)
        parts[part] = images(labels)
    return answers, Digits(**parts)


def nearest(answers, data):
    told = []
    found = reading.nearest(answers, data, lambda done, total: told.append((done, total)))
    return found, told


def by_hand(train, asked, train_labels, labels):
    """The share of right answers of the nearest training row by cosine, one pair at a time."""
    right = 0
    for x, label in zip(asked, labels, strict=True):
        cosines = [x @ y / np.sqrt((x @ x) * (y @ y)) for y in train]
        right += train_labels[int(np.argmax(cosines))] == label
    return right / len(labels)


def test_whitening_helps_where_noise_dominates():
    answers, data = dominated()
    found, told = nearest(answers, data)
    beta, gamma, k, validation, test = found["best"]
    assert found["width"] == 5
    assert max(found["before"].values()) < 0.75
    assert min(validation, test) > 0.9
    assert gamma > 0
    assert k == 4
    vectors = {part: x.astype(np.float64) for part, (_, x) in answers.items()}
    for part in ("validation", "test"):
        before = by_hand(vectors["train"], vectors[part], data.train.labels, getattr(data, part).labels)
        assert found["before"][part] == before


@pytest.mark.parametrize(("beta", "gamma", "k"), [(1.0, 1.0, 4), (0.5, 0.5, 3), (0.0, 0.75, 4), (1.0, 0.0, 2)])
def test_a_trial_by_hand(beta, gamma, k):
    answers, data = dominated()
    found, _ = nearest(answers, data)
    vectors = {part: x.astype(np.float64) for part, (_, x) in answers.items()}
    train = vectors["train"] - beta * vectors["train"].mean(axis=0)
    values, axes = np.linalg.eigh(train.T @ train / len(train))
    w = axes[:, ::-1][:, :k] / values[::-1][:k] ** (gamma / 2)
    scores = [
        by_hand(train @ w, (vectors[part] - beta * vectors["train"].mean(axis=0)) @ w, data.train.labels,
                getattr(data, part).labels)
        for part in ("validation", "test")
    ]  # fmt: skip
    assert [beta, gamma, k, *scores] in found["trials"]


def test_every_trial_is_told_once_and_the_best_is_that_of_validation():
    found, told = nearest(*dominated())
    grid = list(product((0.0, 0.5, 1.0), (0.0, 0.25, 0.5, 0.75, 1.0), (2, 3, 4)))
    assert [tuple(trial[:3]) for trial in found["trials"]] == grid
    assert told == [(i, 45) for i in range(1, 46)]
    highest = max(trial[3] for trial in found["trials"])
    assert found["best"] == next(trial for trial in found["trials"] if trial[3] == highest)


def test_the_test_images_do_not_choose_the_whitening():
    answers, data = dominated()
    found, _ = nearest(answers, data)
    for labels in (np.zeros_like(data.test.labels), (data.test.labels + 1) % 4):
        other, _ = nearest(answers, data._replace(test=data.test._replace(labels=labels)))
        assert other["best"][:4] == found["best"][:4]
    worse, _ = nearest(answers, data._replace(validation=data.validation._replace(labels=data.validation.labels * 0)))
    assert worse["best"][:4] != found["best"][:4]


def test_no_more_components_than_the_rank():
    found, _ = nearest(*dominated(width=7, rank=5))
    assert {trial[2] for trial in found["trials"]} == {2, 3, 4}
    assert found["width"] == 7


def test_the_share_of_nearest_rows_of_the_same_digit():
    data = Digits(images([4, 7]), images([4]), images([4]))
    train, asked = np.eye(2), np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    assert reading.matched(train, asked, data, np.array([4, 7, 7])) == pytest.approx(2 / 3)


def test_softmax_by_hand():
    made = reading.softmax(np.array([[0.0, np.log(3.0)], [1000.0, 1000.0], [-1000.0, 1000.0]], np.float32))
    np.testing.assert_allclose(made, [[0.25, 0.75], [0.5, 0.5], [0.0, 1.0]], atol=1e-8)
    assert made.dtype == np.float64


def test_a_stage_of_its_own(tmp_path):
    answers, data = dominated()
    folder = tmp_path / "toy" / "served"
    folder.mkdir(parents=True)

    def read(data):
        np.savez(
            folder / classifiers.ANSWERS, **{f"{p}/{i}": a for p, both in answers.items() for i, a in enumerate(both)}
        )
        served = Stage("toy/served", {}, folder, 0.0, False)
        return reading.read(tmp_path, served, data, Bars(Console(file=io.StringIO())))

    first = read(data)
    assert (first.name, first.taken_up) == ("toy/read", False)
    assert set(first.result) == {"can", "whitening"}
    assert first.result["whitening"]["best"] == nearest(answers, data)[0]["best"]
    assert read(data) == first._replace(taken_up=True)
    answers["test"][1][0, 0] += 1
    assert not read(data).taken_up
    assert not read(data._replace(test=data.test._replace(labels=1 - data.test.labels))).taken_up
