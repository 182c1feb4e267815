"""Claim: of a dense layer's three products in float32, oneDNN forms y = x W and dx = dy Wᵀ faster than torch's own.

    python benchmarks/dense.py

torch's own is what torch.mm calls, MKL where it was built with it. Both take turns; a ratio is the median over rounds
of the time of torch.mm over that of oneDNN, with its quartiles. That both give the same is checked first. The sizes are
those of a gated attention unit, of a transformer and of a vocabulary at the widths of benchmarks/training.py and 768.

Then what torchimpl does not do, and why: batched products by oneDNN, one after another; u, v and z of a gated unit from
one product instead of three, with silu, forward and backward; an autograd function with a setup_context.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

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
# Products, rows, inner width, columns: scores and values of a unit at n 128 and 512, and of chunks of 256.
BATCHED = ((8, 128, 128, 768), (2, 512, 512, 768), (8, 512, 512, 1536), (16, 256, 128, 256), (16, 256, 256, 1024))
# Rows, width, expanded and shared key width of a unit: GAU-α of two widths, FLASH.
UNITS = ((1024, 384, 768, 128), (4096, 768, 1536, 128), (4096, 512, 1024, 128))
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
    print("time of torch.bmm / time of oneDNN, a product after another")
    for sizes in BATCHED:
        print(" x ".join(map(str, sizes)) + ":", ratio(batched(*sizes), options.rounds), flush=True)
    print("time of three products for u, v, z / time of one, with silu, forward and backward")
    for sizes in UNITS:
        print(" x ".join(map(str, sizes)) + ":", ratio(gates(*sizes), options.rounds), flush=True)
    with_context, without = (1e6 * call(function) for function in (_WithSetup, _Without))
    print(f"an autograd function, forward: {with_context:.0f} us with a setup_context, {without:.0f} us without")


def products(rows: int, width: int, out: int) -> dict[str, Pair]:
    """What a dense layer forms in a step, by torch.mm and by oneDNN."""
    x, w, dy = torch.randn(rows, width), torch.randn(width, out), torch.randn(rows, out)
    return {
        "y": (lambda: x @ w, lambda: dense.by_onednn(x, w, None)),
        "dx": (lambda: dy @ w.T, lambda: dense.by_onednn(dy, w.T, None)),
        "dW": (lambda: x.T @ dy, lambda: dense.by_onednn(x.T, dy, None)),
    }


def batched(products: int, rows: int, width: int, out: int) -> Pair:
    a, v = torch.randn(products, rows, width), torch.randn(products, width, out)
    return lambda: a @ v, lambda: torch.stack([dense.by_onednn(x, y, None) for x, y in zip(a, v, strict=True)])


def gates(rows: int, width: int, expanded: int, key: int) -> Pair:
    widths = (expanded, expanded, key)
    x, w = torch.randn(rows, width, requires_grad=True), torch.randn(width, sum(widths), requires_grad=True)
    slopes = [torch.randn(rows, part) for part in widths]

    def three() -> Tensor:
        made = [functional.silu(dense.linear(x, part, None)) for part in w.split(widths, dim=1)]
        return torch.autograd.grad(made, (x, w), slopes)[1]

    def one() -> Tensor:
        made = functional.silu(dense.linear(x, w, None)).split(widths, dim=1)
        return torch.autograd.grad(made, (x, w), slopes)[1]

    return three, one


class _WithSetup(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])


class _Without(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        return x.clone()


def call(function: type[torch.autograd.Function], calls: int = 2000) -> float:
    """Seconds of a call on small tensors."""
    x, w = torch.ones(1, requires_grad=True), torch.ones(1)
    begun = time.perf_counter()
    for _ in range(calls):
        function.apply(x, w, None)
    return (time.perf_counter() - begun) / calls


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
