"""Judging pooling: position 0, masked means of one or two blocks, and dense layers on position 0."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from conformance.budget import Arithmetic, Ball, Profile, affine, einsum, tanh
from conformance.case import Case, Function, Operator
from conformance.generate import Draw, drawn
from conformance.law import Law, Output, close, equal, run
from conformance.mutant import Mutant
from refimpl.ops import pooling

FIRST, MEAN, AVERAGE, LINEAR, TANH = (
    f"pooling.{name}" for name in ("first", "masked_mean", "first_last_average", "pooler_linear", "pooler_tanh")
)
MEANS, POOLERS = (MEAN, AVERAGE), (LINEAR, TANH)


def first(a: Arithmetic, x: Ball) -> Ball:
    """x[..., 0, :]."""
    return x[..., 0, :]


def masked_mean(a: Arithmetic, x: Ball, mask: np.ndarray) -> Ball:
    """sum_n mask_n x_n / max(sum_n mask_n, 1), in any order."""
    total = einsum("...nd,...n->...d", x, mask.astype(np.float64))
    return total / np.maximum(mask.sum(axis=-1, keepdims=True), 1)


def first_last_average(a: Arithmetic, first: Ball, last: Ball, mask: np.ndarray) -> Ball:
    """Half the sum of both means; one mean of the sum of both blocks is permitted."""
    return (masked_mean(a, first, mask).stored() + masked_mean(a, last, mask).stored()) * 0.5


def pooler_linear(a: Arithmetic, x: Ball, kernel: Ball, bias: Ball) -> Ball:
    """x_0 kernel + bias."""
    return affine(x[..., 0, :], kernel, bias)


def pooler_tanh(a: Arithmetic, x: Ball, kernel: Ball, bias: Ball) -> Ball:
    """tanh(x_0 kernel + bias)."""
    return tanh(pooler_linear(a, x, kernel, bias).stored())


OPERATORS = (
    Operator(FIRST, pooling.first, first),
    Operator(MEAN, pooling.masked_mean, masked_mean, multilinear=True),
    Operator(AVERAGE, pooling.first_last_average, first_last_average, multilinear=True),
    Operator(LINEAR, pooling.pooler_linear, pooler_linear, multilinear=True),
    Operator(TANH, pooling.pooler_tanh, pooler_tanh),
)


def _mask(*rows: str) -> np.ndarray:
    return np.array([[c == "1" for c in row] for row in rows])


def _mean(name: str, mask: np.ndarray, clauses: str, *, width: int = 3, **options: Any) -> list[Case]:
    """Both means under one mask; exact inputs are few-bit integers, masked tokens hold 1024."""
    made = []
    for op, parts in ((MEAN, ("x",)), (AVERAGE, ("first", "last"))):
        draw = Draw(f"{op}/{name}")
        arrays = {}
        for part in parts:
            shape = (*mask.shape, width)
            x = draw.grid(*shape, low=-7, high=7, exponent=0) if options.get("exact") else draw.grid(*shape)
            if name.startswith("dense"):
                x = draw.dense(*shape, bits=53 if "53" in name else 24)
            arrays[part] = np.where(mask[..., None], x, 1024.0)
        made.append(Case(op, name, {**arrays, "mask": mask}, tuple(clauses.split()), **options))
    return made


def _cancelling(op: str) -> Case:
    # Seven tokens carry +32, the eighth nearly as much back: 0.1 % of any carried sum decides the result.
    x = np.full((2, 8, 3), 32.0)
    x[:, -1] = [[-223, -225, -216], [-226, -216, -223]]
    arrays = {"x": x} if op == MEAN else {"first": x, "last": -x[::-1]}
    return Case(op, "exact-cancellation", {**arrays, "mask": np.ones((2, 8), bool)}, ("C1",), exact=True)


def _pooler(name: str, x: np.ndarray, kernel: np.ndarray, bias: np.ndarray, clauses: str, **options: Any) -> list[Case]:
    shared = {"x": x, "kernel": kernel, "bias": bias}
    exact = options.pop("exact", False)
    labels = tuple(clauses.split())
    return [
        Case(LINEAR, name, shared, labels, exact=exact, **options),
        Case(TANH, name, {**shared, "bias": -bias[..., ::-1]}, ("C2",), **options),
    ]


def _ternary(name: str, *shape: int) -> np.ndarray:
    return Draw(f"pooling/{name}").ternary(*shape)


def _grid(name: str, *shape: int) -> np.ndarray:
    return Draw(f"pooling/{name}").grid(*shape)


_RAGGED = _mask("1111100", "1111111", "1000000", "1110000")

CASES = (
    *(
        Case(FIRST, name, {"x": x}, ("C1", "C2"), exact=True)
        for name, x in (
            ("grid", _grid("first", 2, 5, 3)),
            ("one-token", _grid("first1", 3, 1, 5)),
            ("one-sentence", _grid("first2", 7, 11)),
            ("batch-axes", _grid("first3", 2, 3, 5, 2)),
            ("dense", Draw("pooling/first4").dense(2, 3, 5)),
            ("dense-53-bits", Draw("pooling/first5").dense(3, 2, 7, bits=53)),
        )
    ),
    # Masked tokens hold 1024 everywhere. Counts of exact cases are powers of two.
    *_mean("right-padding", _RAGGED, "C1 C2"),
    *_mean("left-padding", _RAGGED[:, ::-1], "C1 C2"),
    *_mean("holes", _mask("10110", "01101", "00001"), "C1 C2", width=7),
    *_mean("no-visible-token", _mask("00000", "11100", "00000"), "C3"),
    *_mean("one-token", _mask("1", "0", "1"), "C2 C3", width=5),
    *_mean("dense", _mask("1110101", "1111111"), "C1", width=5),
    *_mean("dense-53-bits", _mask("1110101", "0111111"), "C1", width=5),
    *_mean("more-than-255", np.arange(300)[None] < 290, "C1", width=2),
    *_mean("exact-full", _mask("11111111", "11111111"), "C2", exact=True),
    *_mean("exact-half", _mask("11110000", "00001111"), "C1 C2", exact=True),
    *_mean("exact-scattered", _mask("10010000000", "01010101000"), "C1", width=5, exact=True),
    *_mean("exact-one", _mask("0000001", "0100000", "0000000"), "C3", exact=True),
    *_mean("exact-batch-axes", np.stack([_mask("1100", "0110"), _mask("1111", "0010")]), "C2", exact=True),
    _cancelling(MEAN),
    _cancelling(AVERAGE),
    Case(
        AVERAGE,
        "two-blocks-apart",
        {"first": 8 * _grid("apart", 2, 3, 5), "last": _grid("apart2", 2, 3, 5) / 8, "mask": _mask("110", "111")},
        ("C1", "C2"),
    ),
    *_pooler("grid", _grid("p", 2, 3, 5), _grid("k", 5, 7), _grid("b", 7), "C1 C2"),
    *_pooler("square", _grid("p2", 3, 2, 5), _grid("k2", 5, 5), _grid("b2", 5), "C1"),
    *_pooler("one-token", _grid("p3", 2, 1, 3), _grid("k3", 3, 11), _grid("b3", 11), "C1"),
    *_pooler("dense", Draw("p4").dense(2, 3, 7), Draw("k4").dense(7, 5), Draw("b4").dense(5), "C1"),
    *_pooler("saturating", 8 * _grid("p5", 2, 3, 7), _grid("k5", 7, 5), _grid("b5", 5), "C1"),
    *_pooler("small", _grid("p6", 2, 3, 7) / 64, _grid("k6", 7, 5), _grid("b6", 5) / 64, "C1"),
    *_pooler("exact-grid", _ternary("q", 2, 3, 5), _ternary("r", 5, 7), _ternary("s", 7), "C1 C2", exact=True),
    *_pooler("exact-square", _ternary("q2", 3, 2, 7), _ternary("r2", 7, 7), _ternary("s2", 7), "C1", exact=True),
    *_pooler("exact-wide", _ternary("q3", 3, 2, 11), _ternary("r3", 11, 3), _ternary("s3", 3), "C1", exact=True),
    *_pooler("exact-one-token", _ternary("q4", 5, 1, 3), _ternary("r4", 3, 5), _ternary("s4", 5), "C2", exact=True),
    *_pooler("exact-axes", _ternary("q5", 2, 2, 3, 5), _ternary("r5", 5, 3), _ternary("s5", 3), "C2", exact=True),
)


# Laws.
def _blocks(case: Case) -> list[str]:
    return [name for name in ("x", "first", "last") if name in case.arguments]


def impulse(implementation: Function, case: Case) -> None:
    """A single token e_d gives 1 / count at d (times 1/2 of each block), and nothing when it is masked."""
    mask, names = case["mask"], _blocks(case)
    zero = np.zeros(case[names[0]].shape)
    token, feature = mask.shape[-1] // 2, zero.shape[-1] - 1
    spike = zero.copy()
    spike[..., token, feature] = 1.0
    share = np.where(mask[..., token], 1 / np.maximum(mask.sum(axis=-1), 1), 0.0) / len(names)
    expected = np.zeros((*mask.shape[:-1], zero.shape[-1]))
    expected[..., feature] = share
    for name in names:
        out = run(implementation, case, **{n: spike if n == name else zero for n in names})[0]
        close("impulse", case, out.value, expected, out.radius + 2.0**-52 * expected)


def constant_tokens(implementation: Function, case: Case) -> None:
    """Equal tokens give that token; without a visible token the result is zero."""
    names = _blocks(case)
    token = case[names[0]][..., :1, :]
    out = run(implementation, case, **{n: np.broadcast_to(token, case[n].shape).copy() for n in names})[0]
    expected = np.where(case["mask"].any(axis=-1, keepdims=True), token[..., 0, :], 0.0)
    close("constant_tokens", case, out.value, expected, out.radius)


def masked_content(implementation: Function, case: Case) -> None:
    """What masked tokens hold changes nothing, bit for bit."""
    changed = {n: np.where(case["mask"][..., None], case[n], 512.0 - case[n]) for n in _blocks(case)}
    equal("masked_content", case, run(implementation, case, **changed)[0].value, run(implementation, case)[0].value)


def _padded(implementation: Function, case: Case, front: int, back: int) -> Output:
    widths = [(0, 0)] * (case["mask"].ndim - 1) + [(front, back)]
    arrays = {n: np.pad(case[n], [*widths, (0, 0)], constant_values=64.0) for n in _blocks(case)}
    return run(implementation, case, mask=np.pad(case["mask"], widths), **arrays)[0]


def padding(implementation: Function, case: Case) -> None:
    """Masked tokens in front or behind change nothing."""
    one = run(implementation, case)[0]
    for front, back in ((2, 0), (0, 3)):
        two = _padded(implementation, case, front, back)
        close("padding", case, two.value, one.value, one.radius + two.radius)


def tokens_permute(implementation: Function, case: Case) -> None:
    """Reversing the tokens and the mask changes nothing."""
    turned = {n: case[n][..., ::-1, :].copy() for n in _blocks(case)}
    one, two = run(implementation, case)[0], run(implementation, case, mask=case["mask"][..., ::-1].copy(), **turned)[0]
    close("tokens_permute", case, two.value, one.value, one.radius + two.radius)


def blocks_exchange(implementation: Function, case: Case) -> None:
    """Exchanging first and last changes nothing."""
    one, two = run(implementation, case)[0], run(implementation, case, first=case["last"], last=case["first"])[0]
    close("blocks_exchange", case, two.value, one.value, one.radius + two.radius)


def later_tokens(implementation: Function, case: Case) -> None:
    """Tokens after position 0 change nothing, bit for bit."""
    changed = case["x"].copy()
    changed[..., 1:, :] = 1 - changed[..., 1:, :]
    equal("later_tokens", case, run(implementation, case, x=changed)[0].value, run(implementation, case)[0].value)


def first_token_comes_back(implementation: Function, case: Case) -> None:
    """Position 0 comes back bit for bit."""
    equal("first_token_comes_back", case, run(implementation, case)[0].value, case["x"][..., 0, :])


def one_hot_kernel(implementation: Function, case: Case) -> None:
    """A kernel with a single 1 at (i, j) moves x[0, i] to output j; elsewhere stands bias, both under tanh if there."""
    kernel, bias, x = np.zeros(case["kernel"].shape), case["bias"], case["x"]
    i, j = kernel.shape[0] - 1, kernel.shape[1] // 2
    kernel[i, j] = 1.0
    expected = np.broadcast_to(bias, (*x.shape[:-2], bias.size)).copy()
    expected[..., j] += x[..., 0, i]
    expected = np.tanh(expected) if case.op == TANH else expected
    out = run(implementation, case, kernel=kernel)[0]
    close("one_hot_kernel", case, out.value, expected, out.radius + 2.0**-51 * np.abs(expected))


LAWS = (
    Law(impulse, MEANS, ("C1", "C2")),
    Law(constant_tokens, MEANS, ("C3",)),
    Law(masked_content, MEANS),
    Law(padding, MEANS),
    Law(tokens_permute, MEANS),
    Law(blocks_exchange, (AVERAGE,), ("C1",)),
    Law(later_tokens, (FIRST,), ("C1",)),
    Law(later_tokens, POOLERS, ("C2",)),
    Law(first_token_comes_back, (FIRST,), ("C1", "C2")),
    Law(one_hot_kernel, POOLERS, ("C1",)),
)


def strategy(function: str, profile: Profile) -> st.SearchStrategy[Case]:
    """2 to 3 sentences of 1 to 6 tokens of 2 to 5 features; any mask, also one without a visible token."""

    def build(draw: Draw, batch: int, length: int, width: int, out: int, keep: float) -> dict[str, Any]:
        x, mask = draw.grid(batch, length, width), draw.mask(batch, length, keep=keep)
        if function == "first":
            return {"x": x}
        if function == "masked_mean":
            return {"x": x, "mask": mask}
        if function == "first_last_average":
            return {"first": x, "last": draw.grid(batch, length, width), "mask": mask}
        return {"x": x, "kernel": draw.grid(width, out), "bias": draw.grid(out)}

    return drawn(
        f"pooling.{function}",
        profile,
        build,
        batch=st.integers(2, 3),
        length=st.integers(1, 6),
        width=st.integers(2, 5),
        out=st.integers(2, 5),
        keep=st.sampled_from([0.75, 0.25, 1.0]),
    )


def _count(mask: np.ndarray) -> np.ndarray:
    return np.maximum(mask.sum(axis=-1, keepdims=True), 1)


def _sum(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return (x * mask[..., None]).sum(axis=-2)


def _without_first(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    rest = mask.copy()
    rest[..., 0] = False
    return pooling.masked_mean(x, rest)


def _largest(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.where(mask[..., None], x, -1e9).max(axis=-2)


def _first_visible(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.take_along_axis(x, mask.argmax(axis=-1)[..., None, None], axis=-2)[..., 0, :]


def _unmasked_average(first: np.ndarray, last: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return ((first + last) / 2).mean(axis=-2)


def _dense(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return x @ kernel + bias


def _turned(kernel: np.ndarray) -> np.ndarray:
    return kernel.T if kernel.shape[0] == kernel.shape[1] else kernel


_mean_of, _average_of, _linear_of = pooling.masked_mean, pooling.first_last_average, pooling.pooler_linear

MUTANTS = (
    Mutant(FIRST, "last position", lambda x: x[..., -1, :]),
    Mutant(FIRST, "position 1 where there is one", lambda x: x[..., min(1, x.shape[-2] - 1), :]),
    Mutant(FIRST, "mean of all tokens", lambda x: x.mean(axis=-2)),
    Mutant(FIRST, "first feature axis instead of the token axis", lambda x: np.moveaxis(x, -1, -2)[..., 0, :]),
    Mutant(FIRST, "tanh of position 0", lambda x: np.tanh(x[..., 0, :])),
    Mutant(MEAN, "sum instead of the mean", _sum),
    Mutant(MEAN, "masked sum divided by the length of the array", lambda x, mask: _sum(x, mask) / mask.shape[-1]),
    Mutant(MEAN, "count of the first sentence for all", lambda x, mask: _sum(x, mask) / _count(mask).flat[0]),
    Mutant(MEAN, "count plus one", lambda x, mask: _sum(x, mask) / (mask.sum(axis=-1, keepdims=True) + 1)),
    Mutant(MEAN, "0/0 without a visible token", lambda x, mask: _sum(x, mask) / mask.sum(axis=-1, keepdims=True)),
    Mutant(MEAN, "mask inverted", lambda x, mask: _mean_of(x, ~mask)),
    Mutant(MEAN, "position 0 left out", _without_first),
    Mutant(MEAN, "maximum instead of the mean", _largest),
    Mutant(MEAN, "first visible token only", _first_visible),
    Mutant(MEAN, "padding counted on the right only", lambda x, mask: _mean_of(x, np.sort(mask, axis=-1)[..., ::-1])),
    Mutant(AVERAGE, "last block only", lambda first, last, mask: _mean_of(last, mask)),
    Mutant(AVERAGE, "first block only", lambda first, last, mask: _mean_of(first, mask)),
    Mutant(AVERAGE, "sum of both means", lambda first, last, mask: 2 * _average_of(first, last, mask)),
    Mutant(AVERAGE, "difference of both means", lambda first, last, mask: _average_of(first, -last, mask)),
    Mutant(LINEAR, "bias left out", lambda x, kernel, bias: _linear_of(x, kernel, 0 * bias)),
    Mutant(
        LINEAR, "kernel read as (out, in) where square", lambda x, kernel, bias: _linear_of(x, _turned(kernel), bias)
    ),
    Mutant(LINEAR, "last position", lambda x, kernel, bias: _dense(x[..., -1, :], kernel, bias)),
    Mutant(LINEAR, "mean of all tokens", lambda x, kernel, bias: _dense(x.mean(axis=-2), kernel, bias)),
    Mutant(LINEAR, "tanh added", lambda x, kernel, bias: np.tanh(_linear_of(x, kernel, bias))),
    Mutant(TANH, "bias after tanh", lambda x, kernel, bias: np.tanh(x[..., 0, :] @ kernel) + bias),
    Mutant(TANH, "logistic function for tanh", lambda x, kernel, bias: 1 / (1 + np.exp(-_linear_of(x, kernel, bias)))),
    Mutant(TANH, "tanh before the dense layer", lambda x, kernel, bias: _linear_of(np.tanh(x), kernel, bias)),
    Mutant(TANH, "relu for tanh", lambda x, kernel, bias: np.maximum(_linear_of(x, kernel, bias), 0)),
)


MUSEUM = (
    Mutant(
        MEAN,
        "mean over the padding too",
        lambda x, mask: x.mean(axis=-2),
        url="https://github.com/HKUDS/LightRAG/pull/3675",
    ),
    Mutant(
        AVERAGE,
        "mean over the padding too",
        _unmasked_average,
        url="https://github.com/autoliuweijie/BERT-whitening-pytorch/issues/13",
    ),
    Mutant(
        TANH,
        "tanh left out",
        _linear_of,
        url="https://github.com/bojone/SimCSE/issues/11",
    ),
)
