"""Claim: a training step of our gated attention unit is 1.2 times as fast as FLASH-pytorch's, and no slower compiled.

    python benchmarks/gau.py

Both run the same layer, x + unit(layer_norm(x)) with squared ReLU, 8 sequences of 512 tokens, widths 768, 1536 and 128,
float32, forward and backward; that the same weights give the same output and gradient is checked first. The trained
bias of relative positions, which FLASH-pytorch always adds, is taken out, so that the units alone are compared.

The variants alternate within a round; a ratio is the median over rounds. `products` are the matrix products of a step
alone, by torch.mm and into memory that is there already. Ours forms most of its own by oneDNN (benchmarks/dense.py).
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial

import flash_pytorch
import torch
from torch import Tensor

from torchimpl.ops import attention_kernel, gau, norm, rope

SIZES = {"b": 8, "n": 512, "d": 768, "e": 1536, "s": 128}
Step = Callable[[], tuple[Tensor, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=13)
    options = parser.parse_args()

    torch.manual_seed(0)
    b, n, d, e, s = SIZES.values()
    theirs = flash_pytorch.GAU(dim=d, query_key_dim=s, expansion_factor=e / d)
    theirs.rel_pos_bias = None
    # Large enough for scores of order 1, so that a wrong attention would show beside the residual path.
    torch.nn.init.normal_(theirs.offsetscale.gamma, std=5.0)
    weights = copied(theirs)
    ours = partial(layer, weights)
    step = partial(trained, x=torch.randn(b, n, d), upstream=torch.randn(b, n, d))
    print(f"b={b} n={n} d={d} e={e} s={s}, float32, {torch.get_num_threads()} threads; compiling", flush=True)
    variants: dict[str, Step] = {
        "theirs": partial(step, theirs, list(theirs.parameters())),
        "ours": partial(step, ours, weights.values()),
        "ours compiled": partial(step, torch.compile(ours), weights.values()),
        "theirs compiled": partial(step, torch.compile(theirs), list(theirs.parameters())),
    }
    expected = variants["theirs"]()
    for name in ("ours", "ours compiled", "theirs compiled"):
        pairs = zip(variants[name](), expected, strict=True)
        gaps = [((one - other).abs().max() / other.abs().max()).item() for one, other in pairs]
        print(f"{name}: change and gradient of x are off by {gaps[0]:.1e} and {gaps[1]:.1e} of their largest entry")
        if max(gaps) > 1e-4:
            raise SystemExit(f"{name} is another function: there is nothing to compare")

    variants["products"] = products(b, n, d, e, s)
    spent: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(options.rounds):
        for name, variant in variants.items():
            begin = time.perf_counter()
            variant()
            spent[name].append(time.perf_counter() - begin)
        print(f"{turn + 1}: " + ", ".join(f"{name} {times[-1]:.2f} s" for name, times in spent.items()), flush=True)

    for slow, fast in (
        ("theirs", "ours"),
        ("theirs", "ours compiled"),
        ("theirs compiled", "ours compiled"),
        ("ours", "ours compiled"),
        ("theirs", "products"),
    ):
        ratios = sorted(one / other for one, other in zip(spent[slow], spent[fast], strict=True))
        middle = statistics.median(ratios)
        print(f"{slow} / {fast}".ljust(32), f"{middle:.2f} (rounds from {ratios[0]:.2f} to {ratios[-1]:.2f})")


def copied(theirs: flash_pytorch.GAU) -> dict[str, Tensor]:
    """Leaves of our own with the weights of FLASH-pytorch's unit: its value precedes its gate."""
    hidden, shared, offsets, out = theirs.to_hidden[0], theirs.to_qk[0], theirs.offsetscale, theirs.to_out[0]
    value, gate = hidden.weight.chunk(2)
    value_bias, gate_bias = hidden.bias.chunk(2)
    found = {
        "w_in": torch.cat([gate, value, shared.weight]).T.contiguous(),
        "b_in": torch.cat([gate_bias, value_bias, shared.bias]),
        "gamma_q": offsets.gamma[0],
        "beta_q": offsets.beta[0],
        "gamma_k": offsets.gamma[1],
        "beta_k": offsets.beta[1],
        "w_out": out.weight.T.contiguous(),
        "b_out": out.bias,
        "norm_scale": theirs.norm.weight,
        "norm_bias": theirs.norm.bias,
    }
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in found.items()}


def layer(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The layer in our functions."""
    *unit, scale, bias = weights.values()
    normalise = partial(norm.layer_norm, scale=scale, bias=bias, epsilon=1e-5)
    kernel = partial(attention_kernel.squared_relu_constant, length=1)
    options = {"length": SIZES["n"], "rotate": rope.rotate_half_split, "kernel": kernel, "norm": normalise}
    return gau.block_pre_norm(x, None, None, None, None, *unit, **options)


def trained(
    model: Callable[[Tensor], Tensor], parameters: Iterable[Tensor], *, x: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """A step without its optimiser: what the layer adds to x, and the gradient of x through the unit."""
    for parameter in parameters:
        parameter.grad = None
    x = x.detach().requires_grad_()
    y = model(x)
    y.backward(upstream)
    return (y - x).detach(), x.grad - upstream


def products(b: int, n: int, d: int, e: int, s: int) -> Step:
    """The matrix products of a step, forward and backward: dense in, scores, A v, dense out."""
    shapes = {
        "x": (b * n, d), "whole": (b * n, 2 * e + s), "w_in": (d, 2 * e + s), "w_out": (e, d),
        "shared": (b, n, s), "scores": (b, n, n), "value": (b, n, e),
    }  # fmt: skip
    x, whole, w_in, w_out, shared, scores, value = (torch.randn(shape) for shape in shapes.values())
    x_, whole_, w_in_, w_out_, shared_, scores_, value_ = (torch.empty(shape) for shape in shapes.values())
    flat, flat_ = value.view(b * n, e), value_.view(b * n, e)

    def run() -> tuple[Tensor, ...]:
        for a, w, y, a_, w_, y_ in ((x, w_in, whole, x_, w_in_, whole_), (flat, w_out, x, flat_, w_out_, x_)):
            torch.mm(a, w, out=y_)
            torch.mm(a.T, y, out=w_)
            torch.mm(y, w.T, out=a_)
        for k, k_ in ((shared, shared_), (value, value_)):
            torch.bmm(k, k.mT, out=scores_)
            torch.bmm(scores, k, out=k_)
            torch.bmm(scores.mT, k, out=k_)
        return ()

    return run


if __name__ == "__main__":
    main()
