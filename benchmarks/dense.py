"""Claim: of a dense layer's three products in float32, oneDNN forms y = x W and dx = dy Wᵀ faster than torch's own.

    python benchmarks/dense.py

torch's own is what torch.mm calls, MKL where it was built with it. Both take turns; a ratio is the median over rounds
of the time of torch.mm over that of oneDNN, with its quartiles. That both give the same is checked first. The sizes are
those of a gated attention unit, of a transformer and of a vocabulary at the widths of benchmarks/training.py and 768.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from torchimpl import dense

# Rows, columns in, columns out.
SIZES = (
    (1024, 384, 768),
    (1024, 384, 1536),
    (1024, 1536, 384),
    (150, 384, 12000),
    (4096, 768, 1536),
    (4096, 1536, 768),
)
Pair = tuple[Callable[[], Tensor], Callable[[], Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    print(f"float32, {torch.get_num_threads()} threads; time of torch.mm / time of oneDNN, quartiles in brackets")
    for rows, width, out in SIZES:
        torch.manual_seed(0)
        cells = [f"{name} {ratio(pair, options.rounds)}" for name, pair in products(rows, width, out).items()]
        print(f"{rows} x {width} x {out}:".ljust(20), ", ".join(cells), flush=True)


def products(rows: int, width: int, out: int) -> dict[str, Pair]:
    """What a dense layer forms in a step, by torch.mm and by oneDNN."""
    x, w, dy = torch.randn(rows, width), torch.randn(width, out), torch.randn(rows, out)
    return {
        "y": (lambda: x @ w, lambda: dense.by_onednn(x, w, None)),
        "dx": (lambda: dy @ w.T, lambda: dense.by_onednn(dy, w.T, None)),
        "dW": (lambda: x.T @ dy, lambda: dense.by_onednn(x.T, dy, None)),
    }


def ratio(pair: Pair, rounds: int) -> str:
    """The middle ratio of their times and its quartiles."""
    one, other = (form() for form in pair)
    if (one - other).abs().max() > 1e-4 * one.abs().max():
        raise SystemExit("the products differ: there is nothing to compare")
    found = []
    for _ in range(rounds):
        times = []
        for form in pair:
            begun = time.perf_counter()
            form()
            times.append(time.perf_counter() - begun)
        found.append(times[0] / times[1])
    low, middle, high = statistics.quantiles(found, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
