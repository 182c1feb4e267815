"""Claim: compiled by torch.compile, no operator of torchimpl is slower than run eagerly.

    python benchmarks/compiled.py                # every call below
    python benchmarks/compiled.py --only gau --rounds 30

A call of every family at sizes of use, float32, forward, and forward and backward where there is something to learn.
Eager and compiled alternate within a round; the ratio is the median over rounds of eager / compiled in one round, with
the quartiles beside it. Below 0.95 in the upper quartile as well is called slower, and the exit status is 1, unless all
that is lost is the entry into compiled code: what a view of the same arguments takes longer compiled.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from torchimpl.ops import (
    activation,
    attention,
    attention_kernel,
    can,
    gau,
    head,
    linear_attention,
    lora,
    norm,
    pooling,
    rope,
    whitening,
)
from torchimpl.ops import mixed_chunk_attention as mca

Call = Callable[..., Any]
SQUARED_RELU = partial(attention_kernel.squared_relu_constant, length=512)


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape)


def turned(rotate: Call, angles: Tensor, x: Tensor) -> Tensor:
    return rotate(x, angles)


def calls() -> Iterator[tuple[str, Call, list[Any]]]:
    """Name, function, arguments; gradients are taken of the floating ones."""
    b, n, d, h, e, s = 8, 512, 256, 4, 512, 64
    x, positions, theta = draw(b, n, d), torch.arange(n), rope.frequencies(d // h, base=10000.0)
    angles = rope.angles(positions, theta)[:, None, :]
    heads = [draw(b, n, h, d // h) for _ in range(3)]
    valid = torch.arange(n) < torch.randint(n // 2, n, (b, 1))
    mask = attention.key_mask(valid)

    for name in ("elu_plus_one", "gelu_erf", "gelu_tanh", "relu", "silu"):
        yield f"activation.{name}", getattr(activation, name), [draw(b, n, e)]
    yield "norm.layer_norm", partial(norm.layer_norm, epsilon=1e-12), [x, draw(d), draw(d)]
    yield "norm.rms_norm", partial(norm.rms_norm, epsilon=1e-12), [x]
    yield "norm.rms_norm_scaled", partial(norm.rms_norm_scaled, epsilon=1e-12), [x, draw(d)]
    for name in ("rotate_interleaved", "rotate_half_split", "rotate_proportional"):
        yield f"rope.{name}", partial(turned, getattr(rope, name), angles), [heads[0]]

    scores = draw(b, n, n)
    for name, options in (
        ("softmax", {}), ("softmax_plus", {"n_min": 1}), ("squared_relu_array", {}), ("squared_relu_visible", {}),
        ("squared_relu_constant", {"length": n}), ("laplace", {}),
    ):  # fmt: skip
        yield f"attention_kernel.{name}", partial(getattr(attention_kernel, name), **options), [scores, mask]
    attended = partial(attention.attend, kernel=attention_kernel.softmax, scale=(d // h) ** -0.5)
    yield "attention.attend", attended, [*heads, attention.per_head(mask)]
    weights = [w for _ in range(4) for w in (draw(d, d, scale=d**-0.5), draw(d))]
    layer = partial(
        attention.multi_head_attention, heads=h, rotate=rope.rotate_interleaved, kernel=attention_kernel.softmax
    )
    yield "attention.multi_head_attention", layer, [x, attention.per_head(mask), positions, theta, *weights]

    theta_s = rope.frequencies(s, base=10000.0)
    gated = [draw(d, 2 * e + s, scale=d**-0.5), None, *(draw(s) for _ in range(4)), draw(e, d, scale=e**-0.5), None]
    for name, kernel in (("softmax_plus", partial(attention_kernel.softmax_plus, n_min=1)), ("squared", SQUARED_RELU)):
        unit = partial(gau.unit, rotate=rope.rotate_interleaved, kernel=kernel)
        yield f"gau.unit, {name}", unit, [x, mask, None, positions, theta_s, *gated]

    for name, options in (("bidirectional", {}), ("chunked", {"chunk_size": 64}), ("quadratic", {})):
        yield f"linear_attention.{name}", partial(getattr(linear_attention, name), scale=0.125, **options), heads
    decayed = partial(linear_attention.chunked, chunk_size=64, scale=0.125)
    yield (
        "linear_attention.chunked, decay",
        lambda q, k, v, g: decayed(q, k, v, log_decay=g),
        [*heads, -draw(b, n, h).abs()],
    )

    long = 4096
    parts = [draw(1, long, s) for _ in range(4)] + [draw(1, long, e)]
    for name in ("bidirectional", "causal"):
        rule = {"chunk": 256, "scale": 1 / 256, "kernel": SQUARED_RELU, "normaliser": mca.visible}
        yield f"mixed_chunk_attention.{name}", partial(getattr(mca, name), **rule), parts

    wide = 768
    factors = [draw(wide, wide), draw(wide, 8), draw(8, wide)]
    yield "lora.apply", partial(lora.apply, scale=2.0), [draw(b, n // 2, wide), *factors]
    yield "lora.merge", partial(lora.merge, scale=2.0), factors
    step = partial(lora.sgd_update, scale=2.0, learning_rate=0.1)
    yield "lora.sgd_update", step, [*factors[1:], draw(wide, wide)]

    p, prior = torch.softmax(draw(5000, 119), dim=-1), torch.full((119,), 1 / 119)
    for iterations in (1, 3):
        adjust = partial(can.alternating_normalization, alpha=1.0, iterations=iterations)
        yield f"can.alternating_normalization, {iterations}", adjust, [p[:4000], p[4000:], prior]
    yield "can.top_entropy", partial(can.top_entropy, top=3), [p]

    sample = draw(5000, d)
    m = whitening.moments(sample)
    w = whitening.projection(whitening.covariance(m, beta=1.0), gamma=1.0, k=64)
    yield "whitening.moments", lambda x: (whitening.moments(x).mean, whitening.moments(x).scatter), [sample]
    yield "whitening.transform", partial(whitening.transform, beta=1.0), [sample, m.mean, w]
    yield "whitening.normalize", whitening.normalize, [sample]
    yield "whitening.spearman", whitening.spearman, [draw(5000), draw(5000)]

    for name in ("masked_mean", "first"):
        yield f"pooling.{name}", getattr(pooling, name), [x, valid] if name == "masked_mean" else [x]
    short, real = x[:, :128], valid[:, :128]
    pointer = partial(head.global_pointer, heads=8, base=10000.0)
    yield (
        "head.global_pointer",
        pointer,
        [short, draw(d, 8 * 2 * s, scale=d**-0.5), draw(8 * 2 * s), real, positions[:128]],
    )


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [part for part in result if isinstance(part, Tensor)]


def once(call: Call, arguments: list[Any], backward: bool) -> float:
    """Seconds of one call, with the gradients of all floating arguments or without."""
    given = [
        x.detach().requires_grad_(backward) if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments
    ]
    begun = time.perf_counter()
    with torch.set_grad_enabled(backward):
        results = tensors(call(*given))
        if backward:
            torch.autograd.backward(
                [r for r in results if r.requires_grad], [torch.ones_like(r) for r in results if r.requires_grad]
            )
    return time.perf_counter() - begun


def timed(function: Call, arguments: list[Any], backward: bool, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of every round, eager and compiled."""
    # Partial functions are one to Dynamo, which would take the sizes in which two of them differ for open.
    torch._dynamo.reset()
    variants = (function, torch.compile(function, fullgraph=True))
    # The first turn compiles, the second warms up.
    turns = [[once(call, arguments, backward) for call in variants] for _ in range(rounds + 2)][2:]
    return [turn[0] for turn in turns], [turn[1] for turn in turns]


def viewed(*given: Any) -> Tensor:
    """The least that a function of these arguments can do."""
    return next(x for x in given if isinstance(x, Tensor) and x.is_floating_point())[:1]


def gained(eager: list[float], compiled: list[float]) -> float:
    """Seconds that a call is shorter compiled, in the middle of all rounds."""
    return statistics.median(a - b for a, b in zip(eager, compiled, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="a part of the names to run")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 1 << 10
    chosen = [found for found in calls() if options.only in found[0]]
    print(f"float32, {torch.get_num_threads()} threads, {options.rounds} rounds; eager / compiled, quartiles")
    slower = []
    for name, function, arguments in track(chosen, "compiling", console=Console(stderr=True), transient=True):
        learnt = name.partition(".")[0] not in ("can", "whitening")
        text = f"{name:38}"
        for backward in (False, True) if learnt else (False,):
            eager, made = timed(function, arguments, backward, options.rounds)
            low, middle, high = statistics.quantiles([a / b for a, b in zip(eager, made, strict=True)], n=4)
            label = "forward and backward" if backward else "forward"
            text += f"  {label} {middle:.2f} ({low:.2f} to {high:.2f})"
            if high < 0.95:
                entry = gained(*timed(viewed, arguments, backward, options.rounds))
                small = gained(eager, made) >= entry
                text += " (entry)" if small else ""
                slower += [] if small else [f"{name}, {label}: {middle:.2f}"]
        print(text, flush=True)
    print(f"slower when compiled: {'; '.join(slower) or 'none'}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
