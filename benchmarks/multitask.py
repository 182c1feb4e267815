"""Claim: under gradient normalisation, multiplying one task's loss by 1000 changes nothing; under fixed weights much.

    python benchmarks/multitask.py

One small GAU-α learns three tasks on the digits of scikit-learn at once: the row and the column with the most ink, and
the digit. Every weighting trains the same weights on the same batches with the same AdamW, then once more with the loss
of the row times 1000. A rule whose accuracies stay is blind to the scale of a loss; the largest difference of a weight
at the end, beside the largest of its kind, stands behind them. It is not 0 where nothing changes: 1000 is no power of
two, and training blows roundings of float32 up.

What gradient normalisation measured on the way is drawn to out/multitask.svg.
"""

import argparse
import dataclasses
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from demo import digits
from refimpl import multitask as rules
from refimpl.model import Model
from refimpl.models import _heads, gau_alpha
from torchimpl import checkpoint
from torchimpl.training import loop, multitask
from torchimpl.training.task import Task

CONFIG = gau_alpha.dialect(
    "bert4keras-0.11.5", vocab_size=17, segments=8, hidden_size=32, layers=2, expanded_size=64, key_size=16
)
CLASSES = {"row": 8, "column": 8, "digit": 10}
SCALED, SCALE = "row", 1000.0
RATE, BATCH = 0.005, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path("out"))
    options = parser.parse_args()

    tasks = digit_tasks()
    first = measured_at_start(tasks)
    weightings: dict[str, rules.Rule] = {
        "fixed": partial(rules.fixed, weights=np.ones(3)),
        "initial loss": partial(rules.reference_loss, reference=first.losses),
        "detached loss": rules.detached_loss,
        "generalised mean, p = -1": partial(rules.generalised_mean, p=-1.0),
        "gradient normalised": rules.gradient_normalised,
        "pareto": rules.pareto,
        "pareto normalised": rules.pareto_normalised,
    }
    print(f"{options.steps} steps of {BATCH} images a task; accuracy on 300 other images, in %; conflict: on how many")
    print(f"steps two gradients oppose each other; on the right, the loss of the {SCALED} times {SCALE:g}")
    heads = f"{'row':>7}{'column':>7}{'digit':>7}"
    print(f"{'':26}{heads}{'conflict':>10}  {heads}  weights moved by")
    blind, started = {}, time.perf_counter()
    # Initial losses are those before the change: what a rule is told beforehand is not told anew.
    scaled = {**tasks, SCALED: dataclasses.replace(tasks[SCALED], loss=partial(thousandfold, tasks[SCALED]))}
    for name, rule in weightings.items():
        plain, rows = trained(tasks, rule, options.steps)
        moved, _ = trained(scaled, rule, options.steps)
        accuracies, after = accuracy(plain, tasks), accuracy(moved, tasks)
        conflict = np.mean([min(row[f"cosine/{pair}"] for pair in PAIRS) < 0 for row in rows])
        told = "".join(f"{100 * accuracies[task]:7.1f}" for task in CLASSES)
        later = "".join(f"{100 * after[task]:7.1f}" for task in CLASSES)
        print(f"{name:26}{told}{100 * conflict:8.0f} %  {later}  {apart(plain, moved):.1e}", flush=True)
        blind[name] = accuracies == after
        if name == "gradient normalised":
            options.folder.mkdir(parents=True, exist_ok=True)
            picture = multitask.plot(rows, tuple(CLASSES))
            checkpoint.write(options.folder / "multitask.svg", picture.encode())
    print(f"{time.perf_counter() - started:.0f} s; {options.folder / 'multitask.svg'}")
    if not blind["gradient normalised"] or blind["fixed"]:
        raise SystemExit("missed: gradient normalisation should not see that a loss was multiplied, and the sum should")


PAIRS = ("row/column", "row/digit", "column/digit")


def digit_tasks() -> dict[str, Task]:
    """The row and the column with the most ink, the first of equals, and the digit."""
    found = digits.load()

    def labelled(images: digits.Images, name: str) -> loop.Labelled:
        ink = images.token_ids.reshape(-1, 8, 8)
        labels = {"row": ink.sum(axis=2).argmax(axis=1), "column": ink.sum(axis=1).argmax(axis=1)}
        parts = (images.token_ids, labels.get(name, images.labels), images.segment_ids)
        return loop.Labelled(*map(torch.from_numpy, parts))

    return {name: loop.classification(labelled(found.train, name), labelled(found.validation, name))
            for name in CLASSES}  # fmt: skip


def thousandfold(task: Task, model, batch) -> torch.Tensor:
    return SCALE * task.loss(model, batch)


def model() -> multitask.MultiTask:
    torch.manual_seed(0)
    heads = {name: _heads.SequenceClassifier(labels=k, pooling="mean_of_tokens") for name, k in CLASSES.items()}
    specs = {name: Model(CONFIG, (head,), "bidirectional") for name, head in heads.items()}
    return multitask.MultiTask(specs, hidden_dropout=0.0, attention_dropout=0.0)


def entries(tasks: dict[str, Task], generator: torch.Generator) -> list[multitask.Entry]:
    rows = {name: torch.randint(task.size, (BATCH,), generator=generator) for name, task in tasks.items()}
    return [multitask.Entry(name, task.draw(rows[name], generator)) for name, task in tasks.items()]


def step(network, tasks, rule, generator) -> multitask.Measured:
    return multitask.backward(network.branches, tasks, entries(tasks, generator), weights=rule, conflicts=True)


def measured_at_start(tasks) -> multitask.Measured:
    return step(model(), tasks, rules.gradient_normalised, torch.Generator().manual_seed(0))


def trained(tasks, rule, steps):
    network, generator, rows = model(), torch.Generator().manual_seed(0), []
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        rows.append(multitask.figures(step(network, tasks, rule, generator), tuple(tasks)))
        optimizer.step()
    return network, rows


def accuracy(network, tasks) -> dict[str, float]:
    with torch.no_grad():
        return {name: task.evaluate(network.branches[name])["accuracy"] for name, task in tasks.items()}


def apart(one, other) -> float:
    """The largest difference of a weight, beside the largest of its kind."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((first - second).abs().max() / first.abs().max()) for first, second in pairs)


if __name__ == "__main__":
    main()
