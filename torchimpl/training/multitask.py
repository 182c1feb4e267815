"""Multi-task training: one encoder, a head for each task, and a rule that says how much each gradient counts.

    model = MultiTask({"topic": Model(config, (SequenceClassifier(...),), "bidirectional"), "mlm": ...})
    task = mixture({"topic": classification(...), "mlm": ...}, choose=partial(drawn, frequencies=(1, 3)),
                   steps=1000, batch_size=32, weights=gradient_normalised, conflicts=True,
                   score=lambda figures: figures["topic/accuracy"], journal=journal)
    train.fit(model, task, config, folder, journals=(journal,))

Source: RoFormerV2's second stage, https://kexue.fm/archives/8998 and ZhuiyiTechnology/roformer-v2. The rules are those
of refimpl/multitask.py. An entry of an update is one batch of one task; `choose` says of which tasks:

    drawn   one task for each example that fit asks for, by fixed frequencies: the released way, with batch_size = 8 in
            the TrainConfig and partial(fixed, weights=[1 / 8] * tasks); the rule sees who is there
    every   all tasks, for rules that balance them

A parameter belongs to the tasks whose branch holds it: the encoder to all, a head to one. Parameters of the same tasks
are a block, and every block is weighted by its own gradients, as if there were no other. So a head, which meets no
other task, has its gradient normalised by its own length under gradient_normalised and left as it is under pareto; it
learns though the encoder's weight of its task be 0, and multiplying its loss by a constant moves it no more than the
encoder. Rules that do not read gradients give an entry the same weight everywhere; generalised_mean alone compares the
losses within the block, and leaves a head's gradient as it is.
"""

import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from torch import Tensor, nn

from refimpl import check, multitask
from refimpl import model as specification
from refimpl.multitask import Rule
from torchimpl import model as models
from torchimpl.training.run import Epoch, Step
from torchimpl.training.task import Batch, Task, Work

# The numbers of the tasks of an update, for so many examples of an epoch.
Choose = Callable[[int, torch.Generator], Tensor]
# The figure of a mixture that marks the weights to keep.
SCORE = "score"


class Entry(NamedTuple):
    """One batch of the task of this name."""

    task: str
    batch: Batch


class Measured(NamedTuple):
    """An update, entry by entry: the task's number and loss, and length and weight of its gradient on what all share.

    cosines: between the entries' gradients there; None where conflicts are not measured.
    """

    tasks: np.ndarray
    losses: np.ndarray
    norms: np.ndarray
    weights: np.ndarray
    cosines: np.ndarray | None


class MultiTask(nn.Module):
    """One encoder and the heads of every task, whose branch is a torchimpl.model.Model on that encoder.

    The state has the encoder once. options: what the encoder takes besides its Config.
    Raises: DomainError unless all models have one Config, and for a name with a dot or none.
    """

    def __init__(self, tasks: Mapping[str, specification.Model], **options: Any) -> None:
        super().__init__()
        check.domain("multitask.MultiTask", len(tasks) > 0, "at least one task", tasks=list(tasks))
        configs = [model.config for model in tasks.values()]
        same = all(config == configs[0] for config in configs)
        check.domain("multitask.MultiTask", same, "models of one Config", configs=configs)
        self.encoder = models.encoder(configs[0], **options)
        # A plain dict: what it holds is registered under encoder and heads, and would be twice in the state.
        self.branches = {name: models.Model(model, **options) for name, model in tasks.items()}
        self.heads = nn.ModuleDict()
        for name, branch in self.branches.items():
            fits = bool(name) and "." not in name
            check.domain("multitask.MultiTask", fits, "names of tasks without a dot", name=name)
            branch.encoder = self.encoder
            self.heads[name] = branch.heads

    def train(self, mode: bool = True) -> "MultiTask":
        """Into training or evaluation, the branches too."""
        super().train(mode)
        for branch in self.branches.values():
            branch.train(mode)
        return self


def drawn(count: int, generator: torch.Generator, *, frequencies: Sequence[float]) -> Tensor:
    """`count` tasks, each drawn on its own; frequencies are those of task 0, 1, ..., of any sum.

    The gradients' mean is on average that of the losses weighted by the frequencies.
    Raises: DomainError for negative frequencies and for none above 0.
    """
    held = torch.as_tensor(frequencies, dtype=torch.float64)
    usable = held.ndim == 1 and bool(held.isfinite().all() and (held >= 0).all() and (held > 0).any())
    check.domain("multitask.drawn", usable, "frequencies >= 0, not all 0", frequencies=list(frequencies))
    return torch.multinomial(held, count, replacement=True, generator=generator)


def every(count: int, generator: torch.Generator, *, tasks: int) -> Tensor:
    """Tasks 0 to tasks - 1, `count` times."""
    return torch.arange(tasks).repeat(count)


def mixture(
    tasks: Mapping[str, Task],
    *,
    choose: Choose,
    steps: int,
    batch_size: int,
    weights: Rule,
    conflicts: bool,
    score: Callable[[Mapping[str, float]], float],
    journal: "Log | None" = None,
) -> Task:
    """The tasks as one, for train.fit of a MultiTask with branches of the same names; numbers follow their order.

    steps: how many examples an epoch of the mixture has; TrainConfig.batch_size of them are an update, and each makes
        what `choose` gives for it. batch_size: rows of an entry, drawn with replacement from its task.
    conflicts: as `backward`.
    score: what the weights to keep have the most of, made of the figures: those of every task, as "task/figure".
    Raises: DomainError for sizes below 1, for a task with a backward of its own, and in training for more than one
        process and compiled=True; what `backward` raises.
    """
    sizes = {"tasks": len(tasks), "steps": steps, "batch_size": batch_size}
    check.domain("multitask.mixture", min(sizes.values()) >= 1, "sizes of at least 1", **sizes)
    taken = [name for name, task in tasks.items() if task.backward is not None]
    check.domain("multitask.mixture", not taken, "tasks without a backward of their own", tasks=taken)
    names = tuple(tasks)

    def draw(rows: Tensor, generator: torch.Generator) -> Batch:
        numbers = choose(len(rows), generator)
        known = bool((numbers >= 0).all() and (numbers < len(tasks)).all())
        check.domain("multitask.mixture", known, f"tasks 0 to {len(tasks) - 1}", chosen=numbers.tolist())
        size = torch.tensor([tasks[name].size for name in names], dtype=torch.float64)[numbers]
        picked = torch.rand(len(numbers), batch_size, generator=generator, dtype=torch.float64) * size[:, None]
        seeds = torch.randint(2**62, (len(numbers),), generator=generator)
        return {"task": numbers, "rows": picked.long(), "seed": seeds}

    def entries(batch: Batch, device: torch.device) -> Iterator[Entry]:
        held = (batch["task"].tolist(), batch["rows"].cpu(), batch["seed"].tolist())
        for number, rows, seed in zip(*held, strict=True):
            made = tasks[names[number]].draw(rows, torch.Generator().manual_seed(seed))
            yield Entry(names[number], {name: tensor.to(device) for name, tensor in made.items()})

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        branches, device = _branches(model, names), next(model.parameters()).device
        made = [tasks[entry.task].loss(branches[entry.task], entry.batch) for entry in entries(batch, device)]
        return torch.stack(made).mean()

    def learn(work: Work) -> Tensor:
        plain = work.forward is work.model
        check.domain("multitask.mixture", plain, "one process and compiled=False", forward=type(work.forward).__name__)
        branches, device = _branches(work.model, names), next(work.model.parameters()).device
        flow = (entry for batch, _ in work.pieces for entry in entries(batch, device))
        found = backward(branches, tasks, flow, weights=weights, conflicts=conflicts, casting=work.casting)
        if journal is not None:
            journal.measured(found)
        return torch.tensor(found.losses.mean(), device=device)

    def evaluate(model: nn.Module) -> dict[str, float]:
        branches = _branches(model, names)
        given = {name: tasks[name].evaluate(branches[name]) for name in names}
        figures = {f"{name}/{figure}": value for name, held in given.items() for figure, value in held.items()}
        return {**figures, SCORE: float(score(figures))}

    memory = {f"{name}/{kind}": tensor for name, task in tasks.items() for kind, tensor in task.memory.items()}
    held = {name: [task.size, dict(task.origin)] for name, task in tasks.items()}
    origin = {"tasks": held, "rows": batch_size, "weights": _described(weights), "choose": _described(choose)}
    return Task(steps, draw, loss, evaluate, SCORE, backward=learn, memory=memory, origin=origin)


def backward(
    branches: Mapping[str, nn.Module],
    tasks: Mapping[str, Task],
    entries: Iterator[Entry] | Sequence[Entry],
    *,
    weights: Rule,
    conflicts: bool,
    casting: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Measured:
    """Add to every parameter's grad the weighted gradients of the entries, which run one after another.

    branches: what the loss of each task is given; they share the modules that are trained together.
    conflicts: whether cosines are measured. Then, and for rules that are not multitask.separable, the gradients of all
        entries are in memory at once; otherwise one is, beside the sum. The numbers are the same, bit for bit.

    C1. Parameters that no entry reaches must keep their grad as it was, None included: absent heads rest.
    C2. The lengths of gradients and their products must be formed in float64, and the weight times the gradient too.
    Raises: DomainError without an entry, for tasks that are not known, where nothing is shared by all, and for a loss
        that no parameter reaches, or that is not finite itself or in its gradient, naming the task.
    """
    operation, names = "multitask.backward", tuple(branches)
    check.domain(operation, names == tuple(tasks), "branches and tasks of the same names", branches=names,
                 tasks=tuple(tasks))  # fmt: skip
    blocks = _blocks(branches)
    check.domain(operation, names in blocks, "parameters that all tasks share", tasks=names)
    adds_at_once = not conflicts and multitask.separable(weights)
    found: list[_Held] = []
    settled: list[_Settled] = []
    for entry in entries:
        check.domain(operation, entry.task in names, f"a task among {', '.join(names)}", task=entry.task)
        found.append(_gradients(names.index(entry.task), entry, tasks, branches, blocks, casting))
        if adds_at_once:
            settled.append(_settle(found, blocks, names, weights))
            found.clear()
    check.domain(operation, bool(found or settled), "at least one entry", entries=0)
    if found:
        settled.append(_settle(found, blocks, names, weights))
    tasks_of, losses, lengths, given = (np.concatenate(parts) for parts in list(zip(*settled, strict=True))[:4])
    return Measured(tasks_of, losses, lengths, given, multitask.cosines(settled[0].gram) if conflicts else None)


def figures(measured: Measured, names: Sequence[str]) -> dict[str, float]:
    """What is logged of an update, by name; of a task with several entries their means and the sum of their weights.

    loss/a, norm/a, weight/a for every task, NaN where it was not there; cosine/a/b for every pair, NaN also where
    conflicts are not measured.
    """
    of = [np.flatnonzero(measured.tasks == number) for number in range(len(names))]
    made: dict[str, float] = {}
    for field, values, kind in (
        ("loss", measured.losses, np.mean), ("norm", measured.norms, np.mean), ("weight", measured.weights, np.sum)
    ):  # fmt: skip
        made |= {f"{field}/{name}": float(kind(values[own])) if len(own) else math.nan
                 for name, own in zip(names, of, strict=True)}  # fmt: skip
    for first, name in enumerate(names):
        for second in range(first + 1, len(names)):
            held = np.zeros((0, 0)) if measured.cosines is None else measured.cosines[np.ix_(of[first], of[second])]
            made[f"cosine/{name}/{names[second]}"] = float(held.mean()) if held.size else math.nan
    return made


class Log:
    """multitask.csv in the folder of a run: the `figures` of every step. A journal of train.fit.

    A run that is taken up goes on behind the step of its state; what was written later is dropped.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.path, self.names = folder / "multitask.csv", tuple(names)
        self._now: dict[str, float] = {}
        self._file: TextIO | None = None

    def measured(self, found: Measured) -> None:
        """What `mixture` measured in the step that `step` is told of next."""
        self._now = figures(found, self.names)

    def rows(self) -> list[dict[str, float]]:
        """What the file holds, a row for each step."""
        if not self.path.is_file():
            return []
        # A process that is killed may leave half a line.
        lines = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(lines)]

    def begin(self, steps: Sequence[Step], epochs: Sequence[Epoch]) -> None:
        kept = [row for row in self.rows() if row["step"] <= len(steps)]
        self._file = self.path.open("w", newline="")
        none = np.zeros(0)
        columns = figures(Measured(none, none, none, none, None), self.names)
        self._table = csv.DictWriter(self._file, ["step", *columns])
        self._table.writeheader()
        self._table.writerows({**row, "step": int(row["step"])} for row in kept)

    def step(self, step: Step) -> None:
        self._table.writerow({"step": step.step, **self._now})

    def evaluated(self, steps: Sequence[Step], epochs: Sequence[Epoch]) -> None:
        pass

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class _Held(NamedTuple):
    """The gradients of an entry, for each block that its task belongs to."""

    task: int
    loss: float
    gradients: dict[tuple[str, ...], tuple[Tensor | None, ...]]


class _Settled(NamedTuple):
    """What Measured has, of entries whose gradients have been added; gram is that of what all share."""

    tasks: np.ndarray
    losses: np.ndarray
    norms: np.ndarray
    weights: np.ndarray
    gram: np.ndarray


Blocks = dict[tuple[str, ...], list[nn.Parameter]]


def _described(function: Callable[..., Any]) -> list[Any]:
    """What a run must agree in: the name of a function, and what functools.partial fixed."""
    own, fixed = getattr(function, "func", function), getattr(function, "keywords", {})
    return [getattr(own, "__name__", type(own).__name__), {k: np.asarray(v).tolist() for k, v in fixed.items()}]


def _branches(model: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Module]:
    has = tuple(getattr(model, "branches", ()))
    check.domain("multitask.mixture", has == names, f"a MultiTask with the branches {', '.join(names)}", branches=has)
    branches: dict[str, nn.Module] = model.branches
    return branches


def _blocks(branches: Mapping[str, nn.Module]) -> Blocks:
    """The trained parameters by the tasks that hold them."""
    owners: dict[nn.Parameter, tuple[str, ...]] = {}
    for name, branch in branches.items():
        for parameter in branch.parameters():
            if parameter.requires_grad:
                owners[parameter] = (*owners.get(parameter, ()), name)
    blocks: Blocks = {}
    for parameter, tasks in owners.items():
        blocks.setdefault(tasks, []).append(parameter)
    return blocks


def _gradients(
    number: int,
    entry: Entry,
    tasks: Mapping[str, Task],
    branches: Mapping[str, nn.Module],
    blocks: Blocks,
    casting: Callable[[], AbstractContextManager[Any]],
) -> _Held:
    with casting():
        loss = tasks[entry.task].loss(branches[entry.task], entry.batch)
    value = loss.item()
    check.domain("multitask.backward", math.isfinite(value), f"a finite loss of task {entry.task}", loss=value)
    reaches = loss.requires_grad
    check.domain("multitask.backward", reaches, f"a loss of task {entry.task} that parameters reach", loss=value)
    own = {owners: parameters for owners, parameters in blocks.items() if entry.task in owners}
    flat = [parameter for parameters in own.values() for parameter in parameters]
    found = iter(torch.autograd.grad(loss, flat, allow_unused=True))
    return _Held(number, value, {owners: tuple(next(found) for _ in held) for owners, held in own.items()})


def _settle(found: Sequence[_Held], blocks: Blocks, names: tuple[str, ...], rule: Rule) -> _Settled:
    """Add the weighted gradients of these entries, block by block."""
    numbers, losses = np.array([held.task for held in found], np.int64), np.array([held.loss for held in found])
    told: dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]] = {}
    for owners, parameters in blocks.items():
        there = [index for index, held in enumerate(found) if owners in held.gradients]
        if not there:
            continue
        gradients = [found[index].gradients[owners] for index in there]
        gram = _gram(gradients, parameters[0].device)
        for index, square in zip(there, gram.diagonal(), strict=True):
            task = names[found[index].task]
            check.domain("multitask.backward", math.isfinite(square), f"a finite gradient of task {task}",
                         square=float(square))  # fmt: skip
        weights = rule(losses[there], gram, numbers[there])
        for weight, parts in zip(weights, gradients, strict=True):
            _add(parameters, parts, float(weight))
        told[owners] = gram, weights
    gram, weights = told[names]
    return _Settled(numbers, losses, multitask.norms(gram), weights, gram)


def _gram(gradients: Sequence[Sequence[Tensor | None]], device: torch.device) -> np.ndarray:
    """The products of the entries' gradients; None is 0. A product of two does not depend on who else is there."""
    total = torch.zeros(len(gradients), len(gradients), dtype=torch.float64, device=device)
    for parts in zip(*gradients, strict=True):
        wide = [None if part is None else part.flatten().double() for part in parts]
        for row, one in enumerate(wide):
            for column, other in enumerate(wide[: row + 1]):
                if one is not None and other is not None:
                    total[row, column] += one.dot(other)
    lower: np.ndarray = total.cpu().numpy()
    return np.tril(lower) + np.tril(lower, -1).T


@torch.no_grad()
def _add(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None], weight: float) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            # A weight may be too large for the gradient's own format, where their product is not.
            part = (gradient.double() * weight).to(gradient.dtype)
            parameter.grad = part if parameter.grad is None else parameter.grad.add_(part)


# Ink, paler text, lines and curves, as in the report of `refimpl demo`.
INK, SOFT, LINE = "#1c2733", "#5b6b7b", "#dde3e9"
COLOURS = ("#1d7f4f", "#7d4fa6", "#c0702b", "#2f6fb0", "#b03a5b", "#6b7a1f", "#1f8a8a", "#8a6d4f")


def plot(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> str:
    """Losses, lengths of gradients and cosines by step, of rows of `figures`, as SVG: the same rows, the same bytes."""
    import io

    import matplotlib as mpl
    from matplotlib.figure import Figure

    pairs = [f"{one}/{other}" for index, one in enumerate(names) for other in names[index + 1 :]]
    panels = {
        "Loss": {name: f"loss/{name}" for name in names},
        "Length of the gradient on the encoder": {name: f"norm/{name}" for name in names},
        "Cosine of two tasks' gradients": {pair.replace("/", ", "): f"cosine/{pair}" for pair in pairs},
    }
    with mpl.rc_context({"svg.hashsalt": "refimpl"}):
        figure = Figure(figsize=(13, 3.5), layout="constrained")
        for axes, (title, curves) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color(LINE)
            axes.tick_params(which="both", colors=SOFT, labelsize=8.5, length=3)
            axes.grid(axis="y", color=LINE, linewidth=0.6)
            axes.set_title(title, loc="left", color=INK, fontsize=10.5, fontweight="bold")
            axes.set_xlabel("step", color=SOFT, fontsize=9)
            for index, (label, column) in enumerate(curves.items()):
                _curve(axes, [row[column] for row in rows], label, COLOURS[index % len(COLOURS)])
            if title.startswith("Cosine"):
                axes.set_ylim(-1, 1)
                axes.axhline(0, color=SOFT, linewidth=1, linestyle=(0, (2, 3)))
            elif axes.lines:
                axes.set_yscale("log")
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize=8.5)
        text = io.StringIO()
        # No date, and names that do not depend on memory.
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    return text.getvalue().partition("?>")[2].partition(">")[2].strip()


def _curve(axes: Any, values: Sequence[float], label: str, colour: str) -> None:
    """Every step, faintly, and the mean of the steps around it."""
    there = np.flatnonzero(np.isfinite(values))
    held = np.asarray(values, float)[there]
    if not len(held):
        return
    window = max(1, len(held) // 15)
    padded = np.pad(held, (window // 2, window - 1 - window // 2), mode="edge")
    axes.plot(there + 1, held, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(there + 1, np.convolve(padded, np.ones(window) / window, "valid"), color=colour, linewidth=1.8,
              label=label)  # fmt: skip
