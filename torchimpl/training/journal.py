"""Logs of a run besides its tables: events for TensorBoard, and a picture of the losses."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchimpl import checkpoint
from torchimpl.training.run import PLOT, Epoch, Step

EVENTS = "tensorboard"
# A curve on paper shows no more points than these; each is the mean of its neighbours.
POINTS = 1000
TRAINING, VALIDATION, SOFT, LINE = "#1d7f4f", "#7d4fa6", "#5b6b7b", "#dde3e9"


class TensorBoard:
    """Events in the folder `tensorboard`. What a killed run wrote behind its last state is not shown."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / EVENTS

    def begin(self, steps: Sequence[Step], epochs: Sequence[Epoch]) -> None:
        from tensorboardX import SummaryWriter

        # Events of this step and later ones, of an earlier process, no longer count.
        self._writer = SummaryWriter(str(self.folder), purge_step=len(steps) + 1)

    def step(self, step: Step) -> None:
        for name in ("loss", "learning_rate", "gradient_norm"):
            self._writer.add_scalar(f"training/{name}", getattr(step, name), step.step)

    def evaluated(self, steps: Sequence[Step], epochs: Sequence[Epoch]) -> None:
        for name, value in epochs[-1].figures.items():
            self._writer.add_scalar(f"validation/{name}", value, epochs[-1].step)
        self._writer.flush()

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        # begin may have failed.
        if hasattr(self, "_writer"):
            self._writer.close()


class Plot:
    """loss.svg: the loss of the steps and of the evaluations, and the other figures beside them."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / PLOT

    def begin(self, steps: Sequence[Step], epochs: Sequence[Epoch]) -> None:
        # What is not installed is to be missed now, not after an epoch.
        import matplotlib  # noqa: F401

        if epochs:
            self.evaluated(steps, epochs)

    def step(self, step: Step) -> None:
        pass

    def evaluated(self, steps: Sequence[Step], epochs: Sequence[Epoch]) -> None:
        checkpoint.write(self.file, plotted(steps, epochs))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def plotted(steps: Sequence[Step], epochs: Sequence[Epoch]) -> bytes:
    """The picture as SVG; the same numbers give the same bytes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    at = [epoch.step for epoch in epochs]
    others = [name for name in epochs[0].figures if name != "loss"]
    figure = Figure(figsize=(5.3 * (1 + len(others)), 3.5), layout="constrained")
    left, *right = np.atleast_1d(figure.subplots(1, 1 + len(others)))
    left.plot(*thinned(steps), color=TRAINING, alpha=0.4, linewidth=0.8)
    left.plot(at, [epoch.loss for epoch in epochs], color=TRAINING, marker="o", markersize=3, label="training")
    if "loss" in epochs[0].figures:
        values = [epoch.figures["loss"] for epoch in epochs]
        left.plot(at, values, color=VALIDATION, marker="o", markersize=3, label="validation")
    positive = all(step.loss > 0 for step in steps)
    left.set(yscale="log" if positive else "linear", title="loss")
    if positive:
        # Where losses span less than a decade the labels are 2 and 3, not 2 x 10^0.
        for axis in ("major", "minor"):
            getattr(left.yaxis, f"set_{axis}_formatter")(LogFormatter(minor_thresholds=(1.5, 0.5)))
    left.legend(frameon=False, fontsize=8.5)
    for axes, name in zip(right, others, strict=True):
        axes.plot(at, [epoch.figures[name] for epoch in epochs], color=VALIDATION, marker="o", markersize=3)
        axes.set(title=f"{name} (validation)")
    for axes in (left, *right):
        _style(axes)
    text = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "refimpl"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def thinned(steps: Sequence[Step], points: int = POINTS) -> tuple[list[float], list[float]]:
    """Step numbers and losses, means of neighbours where there are more than `points`."""
    width = math.ceil(len(steps) / points)
    parts = [steps[start : start + width] for start in range(0, len(steps), width)]
    means = [(float(np.mean([s.step for s in part])), float(np.mean([s.loss for s in part]))) for part in parts]
    return [step for step, _ in means], [loss for _, loss in means]


def _style(axes: Any) -> None:
    axes.set_xlabel("step", color=SOFT, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", colors=SOFT, labelsize=8.5)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
