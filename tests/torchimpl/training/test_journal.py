"""Logs besides the tables: events that TensorBoard reads, and a picture with every curve."""

import re

import pytest

from torchimpl.training import journal
from torchimpl.training.run import PLOT, Epoch, Step

STEPS = [Step(number, 1, 1 / number, 0.1, 2.0) for number in range(1, 8)]
EPOCHS = [Epoch(1, 3, 0.6, {"loss": 0.5, "accuracy": 0.25}), Epoch(2, 6, 0.2, {"loss": 0.4, "accuracy": 0.75})]


def events(folder):
    """(tag, step, value) of every event, in the order of the files."""
    from tensorboardX.proto.event_pb2 import Event

    found, starts = [], []
    for file in sorted(folder.glob("events*")):
        data = file.read_bytes()
        while data:
            # TFRecord: the length in 8 bytes, a checksum of 4, the event, a checksum of 4.
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.HasField("session_log"):
                starts.append(event.step)
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return found, starts


def test_events_have_steps_and_figures(tmp_path):
    pytest.importorskip("tensorboardX", reason="pip install 'refimpl[train]'")
    log = journal.TensorBoard(tmp_path)
    log.begin([], [])
    for step in STEPS[:3]:
        log.step(step)
    log.evaluated(STEPS[:3], EPOCHS[:1])
    log.flush()
    log.close()
    found, starts = events(tmp_path / journal.EVENTS)
    assert [(tag, step) for tag, step, _ in found if tag == "training/loss"] == [
        ("training/loss", n) for n in (1, 2, 3)
    ]
    assert ("validation/accuracy", 3, 0.25) in found
    assert {tag for tag, *_ in found} == {
        "training/loss", "training/learning_rate", "training/gradient_norm", "validation/loss", "validation/accuracy",
    }  # fmt: skip
    # A run that is taken up behind step 2 takes step 3 and later ones back.
    again = journal.TensorBoard(tmp_path)
    again.begin(STEPS[:2], [])
    again.close()
    assert events(tmp_path / journal.EVENTS)[1][-1] == 3


def test_the_picture_has_every_curve(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install 'refimpl[train]'")
    plot = journal.Plot(tmp_path)
    plot.begin([], [])
    assert not (tmp_path / PLOT).exists()
    plot.step(STEPS[0])
    plot.evaluated(STEPS, EPOCHS)
    drawn = (tmp_path / PLOT).read_text()
    assert drawn.lstrip().startswith("<?xml") and "</svg>" in drawn
    # The loss of the steps has seven points: a move and six lines.
    curves = [len(re.findall("[ML]", path)) for path in re.findall(r'<path d="([^"]*)" clip-path', drawn)]
    assert 7 in curves and curves.count(2) >= 3
    assert journal.plotted(STEPS, EPOCHS) == journal.plotted(STEPS, EPOCHS)
    assert list(tmp_path.iterdir()) == [tmp_path / PLOT]


def test_losses_below_zero_and_other_figures_can_be_drawn():
    pytest.importorskip("matplotlib", reason="pip install 'refimpl[train]'")
    below = [step._replace(loss=-1.0) for step in STEPS]
    assert b"</svg>" in journal.plotted(below, [Epoch(1, 3, -1.0, {"score": float("nan")})])


def test_many_steps_are_thinned_to_means():
    assert journal.thinned(STEPS) == ([1, 2, 3, 4, 5, 6, 7], [step.loss for step in STEPS])
    steps, losses = journal.thinned(STEPS, points=3)
    assert steps == [2, 5, 7]
    assert losses == pytest.approx([(1 + 1 / 2 + 1 / 3) / 3, (1 / 4 + 1 / 5 + 1 / 6) / 3, 1 / 7])


def test_losses_within_a_decade_are_labelled_as_people_write_them():
    pytest.importorskip("matplotlib", reason="pip install 'refimpl[train]'")
    steps = [step._replace(loss=3.2 - step.step / 5) for step in STEPS]
    picture = journal.plotted(steps, [Epoch(1, 3, 2.5, {"loss": 2.6})]).decode()
    assert "<!-- 2 -->" in picture and "<!-- 3 -->" in picture and r"\times" not in picture
