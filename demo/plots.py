"""The pictures of the report, each as SVG text that stands in the page."""

import io
from typing import Any

import numpy as np

from demo.digits import Images

INK, SOFT, LINE = "#1c2733", "#5b6b7b", "#dde3e9"
COLOURS = ("#1d7f4f", "#7d4fa6")
# From no whitening of scales (gamma 0) to all of it (1).
SHADES = ("#c9b8e0", "#a98fd0", "#8a68bd", "#63429b", "#3b2270")


def learning(runs: dict[str, dict[str, Any]], majority: float) -> str:
    """Loss by step and accuracy by epoch, a colour for each model."""
    figure, (left, right) = _axes(1, 2, (10.6, 3.5))
    for (title, told), colour in zip(runs.items(), COLOURS, strict=False):
        losses, epochs = np.array(told["losses"]), told["epochs"]
        per_epoch = len(losses) / len(epochs)
        left.plot(np.arange(1, len(losses) + 1) / per_epoch, losses, color=colour, alpha=0.25, linewidth=0.8)
        left.plot(
            [e[0] for e in epochs], [e[2] for e in epochs], color=colour, linewidth=1.8, label=f"{title}: training"
        )
        left.plot([e[0] for e in epochs], [e[3] for e in epochs], color=colour, linewidth=1.6, linestyle=(0, (3, 2)),
                  label=f"{title}: validation")  # fmt: skip
        right.plot([e[0] for e in epochs], [100 * e[4] for e in epochs], color=colour, linewidth=1.8, label=title)
        best = epochs[told["best"] - 1]
        right.plot([best[0]], [100 * best[4]], "o", color=colour, markersize=6)
    right.axhline(100 * majority, color=SOFT, linewidth=1, linestyle=(0, (2, 3)))
    # On the right, where the curves are high above it.
    place = right.get_yaxis_transform()
    right.text(0.99, 100 * majority + 1.5, "always the most frequent digit", color=SOFT, fontsize=8.5, ha="right",
               transform=place)  # fmt: skip
    left.set(yscale="log", xlabel="epoch")
    right.set(ylim=(0, 101), xlabel="epoch")
    _title(left, "Cross entropy")
    _title(right, "Accuracy on the validation images (%)")
    left.legend(frameon=False, fontsize=8.5)
    right.legend(frameon=False, fontsize=8.5, loc="lower right", bbox_to_anchor=(1.0, 0.15))
    return _svg(figure)


def whitening(runs: dict[str, dict[str, Any]]) -> str:
    """Accuracy against the number of components kept, a curve for each gamma, at beta = 1; one panel for each model."""
    figure, panels = _axes(1, len(runs), (5.3 * len(runs), 3.5))
    for axes, (title, told) in zip(np.atleast_1d(panels), runs.items(), strict=True):
        found = told["trials"]
        gammas = sorted({gamma for _, gamma, *_ in found})
        for gamma, colour in zip(gammas, SHADES, strict=False):
            points = [(k, test) for beta, g, k, _, test in found if beta == 1 and g == gamma]
            axes.plot([k for k, _ in points], [100 * a for _, a in points], color=colour, marker="o", markersize=3,
                      linewidth=1.6, label=f"gamma {gamma:g}")  # fmt: skip
        axes.axhline(100 * told["before"]["test"], color=SOFT, linewidth=1, linestyle=(0, (2, 3)))
        axes.set(xscale="log", xlabel="components kept, k")
        _title(axes, f"{title}: nearest neighbour right (%)")
        ks = sorted({k for _, _, k, *_ in found})
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.minorticks_off()
        # Few components tell little: the interesting part is the top.
        highest = max(test for *_, test in found)
        axes.set_ylim(max(0.0, 100 * highest - 45), 100 * highest + 2)
        axes.legend(frameon=False, fontsize=8.5, loc="lower right", title="dotted: before, all of it", title_fontsize=8)
    return _svg(figure)


def digits(images: Images, answers: dict[str, np.ndarray], most: int = 12) -> str:
    """Test images that a model gets wrong, with every model's answer; then some that all get right."""
    wrong = np.flatnonzero(np.any([given != images.labels for given in answers.values()], axis=0))
    rest = np.setdiff1d(np.arange(len(images.labels)), wrong)
    shown = [*wrong[:most], *rest[: 2 * most - len(wrong[:most])]]
    figure, panels = _axes(2, most, (10.6, 2.75))
    for axes in panels.flat:
        axes.axis("off")
    for axes, index in zip(panels.flat, shown, strict=False):
        axes.imshow(images.token_ids[index].reshape(8, 8), cmap="gray_r", vmin=0, vmax=16)
        given = [int(answer[index]) for answer in answers.values()]
        right = all(answer == images.labels[index] for answer in given)
        text = f"{images.labels[index]}" if right else f"{images.labels[index]}: {', '.join(map(str, given))}"
        axes.set_title(text, fontsize=9, color=COLOURS[0] if right else "#c0392b", pad=3)
    return _svg(figure)


def _axes(rows: int, columns: int, size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns)
    for axes in np.atleast_1d(panels).flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(LINE)
        axes.tick_params(colors=SOFT, labelsize=8.5, length=3)
        axes.grid(axis="y", color=LINE, linewidth=0.6)
        axes.xaxis.label.set(color=SOFT, fontsize=9)
    return figure, panels


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", color=INK, fontsize=10.5, fontweight="bold")


def _svg(figure: Any) -> str:
    import matplotlib as mpl

    text = io.StringIO()
    # The same figures give the same bytes: no date, and names that do not depend on memory.
    with mpl.rc_context({"svg.hashsalt": "refimpl"}):
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    return text.getvalue().partition("?>")[2].partition(">")[2].strip()
