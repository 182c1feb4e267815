"""The pictures: nothing is cut off, no label lies on another, the same figures give the same bytes."""

from itertools import combinations

import numpy as np
import pytest

from demo import plots
from demo.digits import Images

TITLES = ("GAU (quadratic)", "FLASH (mixed chunks of 16)")


def learning():
    epochs = [[n, 3 * n, 2.0 / n, 2.2 / n, 1 - 0.9 / n] for n in range(1, 31)]
    told = {"losses": [2.0 / n for n in range(1, 91)], "epochs": epochs, "best": 30}
    return plots.learning(dict.fromkeys(TITLES, told), 0.08)


def whitening():
    trials = [[1.0, gamma, k, 0.0, 0.9 - 0.4 / k] for gamma in (0.0, 0.25, 0.5, 0.75, 1.0) for k in (2, 8, 48)]
    told = {"trials": trials, "before": {"test": 0.8}}
    return plots.whitening(dict.fromkeys(TITLES, told))


def digits():
    ids = np.arange(30)[:, None] + np.zeros((30, 64), int)
    labels = np.arange(30) % 10
    return plots.digits(Images(ids, ids, labels), {TITLES[0]: (labels + (np.arange(30) < 5)) % 10, TITLES[1]: labels})


@pytest.mark.parametrize("draw", [learning, whitening, digits])
def test_every_label_is_whole_and_apart_from_the_others(monkeypatch, draw):
    figures = []
    monkeypatch.setattr(plots, "_svg", figures.append)
    draw()
    (figure,) = figures
    figure.draw_without_rendering()
    whole = figure.bbox.padded(1)
    texts = [text for axes in figure.axes for text in (axes.title, axes._left_title, *axes.texts) if text.get_text()]
    legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    assert len(texts) == {learning: 3, whitening: 2, digits: 24}[draw]
    boxes = [artist.get_window_extent() for artist in (*texts, *legends)]
    for box in boxes:
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1
        assert whole.y0 <= box.y0 and box.y1 <= whole.y1
    for one, other in combinations(boxes, 2):
        assert not one.overlaps(other)


@pytest.mark.parametrize("draw", [learning, whitening, digits])
def test_the_same_bytes_every_time(draw):
    made = draw()
    assert made == draw()
    assert made.startswith("<svg ")
    assert made.endswith("</svg>")


def test_the_wrong_digits_come_first(monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_svg", figures.append)
    digits()
    titles = [axes.get_title() for axes in figures[0].axes]
    assert titles[:7] == ["0: 1, 0", "1: 2, 1", "2: 3, 2", "3: 4, 3", "4: 5, 4", "5", "6"]
