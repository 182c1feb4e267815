"""Judging head: classification and choice, scores of spans by both pointers, and the decoding of spans."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from conformance.budget import Arithmetic, Ball, Profile, affine, concatenate, einsum, sqrt, where
from conformance.case import Case, Function, Operator
from conformance.generate import Draw, drawn
from conformance.law import Law, Output, close, equal, run
from conformance.mutant import Mutant
from conformance.ops.rope import rotate
from refimpl.ops import head, rope

CLASSIFY, CHOOSE, GLOBAL, EFFICIENT, DECODE, BEST = (
    f"head.{name}"
    for name in ("classify", "choose", "global_pointer", "efficient_global_pointer", "decode_spans", "best_span")
)
POINTERS = (GLOBAL, EFFICIENT)


def classify(a: Arithmetic, x: Ball, kernel: Ball, bias: Ball) -> Ball:
    """x kernel + bias."""
    return affine(x, kernel, bias)


def choose(a: Arithmetic, x: Ball, kernel: Ball, bias: Ball, mask: np.ndarray) -> Ball:
    """One score per choice; -inf where masked."""
    return where(mask, affine(x, kernel, bias)[..., 0], -np.inf)


def _masked(scores: Ball, mask: np.ndarray) -> Ball:
    """-inf outside the visible upper triangle; scores are (..., h, n, n)."""
    n = mask.shape[-1]
    start, end = np.arange(n)[:, None], np.arange(n)
    allowed = mask[..., :, None] & mask[..., None, :] & (start <= end)
    return where(np.broadcast_to(allowed[..., None, :, :], scores.shape), scores, -np.inf)


def global_pointer(
    a: Arithmetic, x: Ball, kernel: Ball, bias: Ball, mask: np.ndarray, positions: np.ndarray, heads: int, base: float
) -> Ball:
    """Head by head: query and key of width s, rotated, multiplied, divided by sqrt(s)."""
    s = kernel.shape[-1] // (2 * heads)
    z = affine(x, kernel, bias).stored()
    every = []
    for h in range(heads):
        q = rotate(a, z[..., 2 * s * h : 2 * s * h + s], positions, base).stored()
        k = rotate(a, z[..., 2 * s * h + s : 2 * s * (h + 1)], positions, base).stored()
        every.append(einsum("...ns,...ms->...nm", q, k)[..., None, :, :])
    return _masked(concatenate(every, axis=-3).stored() / sqrt(a.exact(float(s))), mask)


def efficient_global_pointer(
    a: Arithmetic,
    x: Ball,
    kernel: Ball,
    bias: Ball,
    type_kernel: Ball,
    type_bias: Ball,
    mask: np.ndarray,
    positions: np.ndarray,
    base: float,
) -> Ball:
    """A shared product of even and odd channels, plus half an end and half a start term per type."""
    s = kernel.shape[-1] // 2
    z = affine(x, kernel, bias).stored()
    q, k = rotate(a, z[..., 0::2], positions, base).stored(), rotate(a, z[..., 1::2], positions, base).stored()
    shared = (einsum("...ns,...ms->...nm", q, k).stored() / sqrt(a.exact(float(s)))).stored()
    t = (affine(z, type_kernel, type_bias) * 0.5).stored().swapaxes(-1, -2)
    # Either order of the two additions.
    scores = shared[..., None, :, :] + t[..., 0::2, None, :] + t[..., 1::2, :, None]
    total = shared.magnitude[..., None, :, :] + t.magnitude[..., 0::2, None, :] + t.magnitude[..., 1::2, :, None]
    return _masked(Ball(scores.mid, scores.rad + 2 * a.unit * total, a), mask)


def decode_spans(a: Arithmetic, scores: Ball, threshold: float) -> np.ndarray:
    """Triples in order, by plain loops."""
    value = scores.value
    types, n, _ = value.shape
    found = [(h, i, j) for h in range(types) for i in range(n) for j in range(i, n) if value[h, i, j] > threshold]
    return np.array(found, np.int64).reshape(-1, 3)


def best_span(a: Arithmetic, scores: Ball, max_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first of the best spans in order of start, then end, by plain loops."""
    value = scores.value
    n, batch = value.shape[-1], value.shape[:-2]
    start, end, score = np.full(batch, -1), np.full(batch, -1), np.full(batch, -np.inf)
    for b in np.ndindex(batch):
        for i in range(n):
            for j in range(i, min(n, i + max_length)):
                if value[b][i, j] > score[b]:
                    start[b], end[b], score[b] = i, j, value[b][i, j]
    return start, end, score


OPERATORS = (
    Operator(CLASSIFY, head.classify, classify, multilinear=True),
    Operator(CHOOSE, head.choose, choose, multilinear=True),
    Operator(GLOBAL, head.global_pointer, global_pointer, outputs=("scores",)),
    Operator(EFFICIENT, head.efficient_global_pointer, efficient_global_pointer, outputs=("scores",)),
    Operator(DECODE, head.decode_spans, decode_spans, outputs=("spans",)),
    Operator(BEST, head.best_span, best_span, outputs=("start", "end", "score")),
)


def _mask(*rows: str) -> np.ndarray:
    return np.array([[c == "1" for c in row] for row in rows])


def _classify(name: str, shape: tuple[int, ...], classes: int, *, bits: int = 0, exact: bool = False) -> Case:
    draw = Draw(f"head/classify/{name}")

    def take(*size: int) -> np.ndarray:
        return draw.ternary(*size) if exact else draw.dense(*size, bits=bits) if bits else draw.grid(*size)

    arguments = {"x": take(*shape), "kernel": take(shape[-1], classes), "bias": take(classes)}
    return Case(CLASSIFY, name, arguments, ("C1", "C2"), exact)


def _choose(name: str, mask: np.ndarray, width: int, clauses: str, *, exact: bool = False) -> Case:
    draw = Draw(f"head/choose/{name}")
    take = draw.ternary if exact else draw.dense if name == "dense" else draw.grid
    x = np.where(mask[..., None], take(*mask.shape, width), 1024.0)
    arguments = {"x": x, "kernel": take(width, 1), "bias": take(1), "mask": mask}
    return Case(CHOOSE, name, arguments, tuple(clauses.split()), exact)


def _pointers(
    name: str,
    mask: np.ndarray,
    positions: np.ndarray,
    *,
    d: int = 3,
    h: int = 2,
    s: int = 6,
    base: float = 10000.0,
    bits: int = 0,
    clauses: tuple[str, str] = ("C1 C2 C3 C4 C5", "C1 C2 C3 C4"),
    **options: Any,
) -> list[Case]:
    """One case a pointer; masked tokens hold 64. Exact ones have ternary inputs and equal positions."""
    made = []
    for op, labels in zip(POINTERS, clauses, strict=True):
        draw = Draw(f"{op}/{name}")

        def take(*size: int, draw: Draw = draw) -> np.ndarray:
            if options.get("exact"):
                return draw.ternary(*size)
            return draw.dense(*size, bits=bits) if bits else draw.grid(*size)

        arguments: dict[str, Any] = {"x": np.where(mask[..., None], take(*mask.shape, d), 64.0)}
        width = 2 * h * s if op == GLOBAL else 2 * s
        arguments |= {"kernel": take(d, width), "bias": take(width)}
        if op == EFFICIENT:
            arguments |= {"type_kernel": take(width, 2 * h), "type_bias": take(2 * h)}
        arguments |= {"mask": mask, "positions": positions}
        if op == GLOBAL:
            arguments["heads"] = h
        made.append(Case(op, name, arguments | {"base": base}, tuple(labels.split()), **options))
    return made


def _decode(name: str, scores: np.ndarray, threshold: float, clauses: str) -> Case:
    return Case(DECODE, name, {"scores": scores, "threshold": threshold}, tuple(clauses.split()), exact=True)


def _best(name: str, scores: np.ndarray, max_length: int, clauses: str) -> Case:
    return Case(BEST, name, {"scores": scores, "max_length": max_length}, tuple(clauses.split()), exact=True)


def _scores(name: str, *shape: int, low: int = -127, high: int = 127) -> np.ndarray:
    return Draw(f"head/scores/{name}").grid(*shape, low=low, high=high, exponent=-4)


def _upper(scores: np.ndarray, *, hidden: int = 0) -> np.ndarray:
    """-inf below the diagonal and for the last `hidden` tokens, as a pointer gives it."""
    n = scores.shape[-1]
    kept = np.triu(np.ones((n, n), bool)) & (np.arange(n) < n - hidden) & (np.arange(n)[:, None] < n - hidden)
    return np.where(kept, scores, -np.inf)


_FULL = _mask("11111", "11111")
_PADDED = _mask("11100", "11111")
_ALL_KINDS = _mask("01011", "00000", "11110")
_FAR = np.array([4093, 4095, 4096, 17, 5003])
_NOTHING = np.full((1, 3, 3), -np.inf)

CASES = (
    _classify("grid", (2, 5), 7),
    _classify("square", (3, 5), 5),
    _classify("batch-axes", (2, 3, 7), 2),
    _classify("one-vector", (11,), 3),
    _classify("dense", (3, 11), 5, bits=24),
    _classify("dense-53-bits", (2, 7), 5, bits=53),
    *(
        _classify(f"exact-{i}", shape, classes, exact=True)
        for i, (shape, classes) in enumerate([((2, 5), 7), ((3, 7), 7), ((5, 11), 3), ((2, 3, 5), 2), ((13,), 5)])
    ),
    _choose("four-choices", _mask("1111", "1111"), 5, "C2"),
    _choose("dense", _mask("11011", "01111"), 7, "C1"),
    _choose("missing-choices", _mask("1100", "1110", "1111"), 5, "C1"),
    _choose("missing-in-front", _mask("0011", "1011"), 7, "C1"),
    _choose("all-missing", _mask("000", "110"), 3, "C1 C3"),
    _choose("batch-axes", np.stack([_mask("110", "011"), _mask("101", "111")]), 2, "C1"),
    _choose("ten-choices", _mask("1111111111", "1111111000"), 3, "C1 C2"),
    *(
        _choose(f"exact-{i}", mask, width, "C1 C2", exact=True)
        for i, (mask, width) in enumerate(
            [
                (_mask("1111", "1111"), 5),
                (_mask("1100", "1111"), 7),
                (_mask("0111", "1010"), 11),
                (_mask("1110111"), 3),
                (_mask("11", "01", "11"), 13),
            ]
        )
    ),
    *_pointers("grid", _FULL, np.arange(5)),
    *_pointers("dense", _FULL, np.arange(5), d=5, s=4, bits=24),
    *_pointers("dense-53-bits", _mask("111"), np.arange(3), s=4, bits=53),
    # Three types of width 2, and one of width 8, out of a dense output that another split would read as well.
    *_pointers("three-types", _PADDED, np.arange(5), h=3, s=2),
    *_pointers("one-type", _PADDED, np.arange(5), h=1, s=8),
    *_pointers("right-padding", _PADDED, np.arange(5), h=2, s=4),
    *_pointers("left-padding", _PADDED[:, ::-1], np.array([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]), h=2, s=4),
    *_pointers("holes-and-nothing", _ALL_KINDS, np.arange(5), h=2, s=2),
    *_pointers("one-token", _mask("1", "0", "1"), np.array([7]), h=2, s=4),
    *_pointers("long-positions", _FULL, _FAR, h=1, s=6),
    *_pointers("base-50", _FULL, np.array([0, 3, 4, 11, 2]), s=4, base=50.0),
    *_pointers("angles-64", _mask("1111"), np.array([0, 131072, 131077, 1000003]), h=1, s=4, angle="A64"),
    *_pointers("exact-equal-positions", _FULL, np.zeros(5, np.int64), s=4, exact=True),
    *_pointers("exact-padding", _PADDED, np.zeros(5, np.int64), h=3, s=4, exact=True),
    *_pointers("exact-wide", _ALL_KINDS, np.zeros(5, np.int64), d=2, h=1, s=16, exact=True),
    _decode("grid", _scores("d1", 2, 5, 5), 0.0, "C2 C3"),
    _decode("pointer", _upper(_scores("d2", 3, 5, 5), hidden=1), 0.0, "C3"),
    # Many scores equal the threshold.
    _decode("at-the-threshold", _scores("d3", 3, 5, 5, low=-1, high=1), 0.0, "C1"),
    _decode("threshold-2", _scores("d4", 2, 7, 7), 2.0, "C1 C2"),
    _decode("negative-threshold", _upper(_scores("d5", 2, 3, 3)), -3.0, "C1 C3"),
    _decode("nested", _upper(np.full((2, 3, 3), 0.5)), 0.0, "C3"),
    _decode("tiny-scores", _upper(np.ldexp(_scores("d6", 2, 5, 5), -9)), 0.0, "C1"),
    _best("grid", _scores("b1", 3, 7, 7), 7, "C1"),
    _best("length-1", _scores("b2", 3, 5, 5), 1, "C1"),
    _best("length-2", _scores("b3", 3, 7, 7), 2, "C1"),
    _best("length-3", _scores("b4", 2, 3, 7, 7), 3, "C1"),
    _best("ties", _scores("b5", 7, 5, 5, low=0, high=1), 3, "C2"),
    _best("ties-of-three", _scores("b6", 11, 7, 7, low=0, high=3), 50, "C2"),
    _best("nothing-beside-spans", np.concatenate([_NOTHING, _upper(_scores("b7", 2, 3, 3))]), 3, "C3"),
    _best("only-out-of-reach", np.stack([np.where(np.eye(5, k=3), 9.0, -np.inf), _scores("b8", 5, 5)]), 3, "C1 C3"),
    _best("all-negative", _upper(_scores("b9", 3, 5, 5, low=-127, high=-1)), 4, "C2"),
)


# Laws.
def one_hot_kernel(implementation: Function, case: Case) -> None:
    """A kernel with a single 1 at (i, j) moves x[i] to class j; elsewhere stands bias."""
    kernel, bias, x = np.zeros(case["kernel"].shape), case["bias"], case["x"]
    i, j = kernel.shape[0] - 1, kernel.shape[1] // 2
    kernel[i, j] = 1.0
    expected = np.broadcast_to(bias, (*x.shape[:-1], bias.size)).copy()
    expected[..., j] += x[..., i]
    if case.op == CHOOSE:
        expected = np.where(case["mask"], expected[..., 0], -np.inf)
    out = run(implementation, case, kernel=kernel)[0]
    radius = np.where(np.isfinite(expected), out.radius, 0.0)
    close("one_hot_kernel", case, out.value, expected, radius + 2.0**-52 * np.where(radius > 0, np.abs(expected), 0.0))


def choices_exchange(implementation: Function, case: Case) -> None:
    """Reversing the choices reverses the scores."""
    turned = {"x": case["x"][..., ::-1, :].copy(), "mask": case["mask"][..., ::-1].copy()}
    one, two = run(implementation, case)[0], run(implementation, case, **turned)[0]
    radius = np.where(case["mask"], one.radius + two.radius[..., ::-1], 0.0)
    close("choices_exchange", case, two.value[..., ::-1], one.value, radius)


def _allowed(case: Case) -> np.ndarray:
    mask = case["mask"]
    return (mask[..., :, None] & mask[..., None, :] & np.triu(np.ones(mask.shape[-1:] * 2, bool)))[..., None, :, :]


def _finite(output: Output, allowed: np.ndarray) -> np.ndarray:
    """The radius where a score is due, 0 where -inf is."""
    return np.where(allowed, output.radius, 0.0)


def spans_that_can_be(implementation: Function, case: Case) -> None:
    """Scores are finite exactly where both tokens are visible and the end is not before the start, -inf elsewhere."""
    scores = run(implementation, case)[0].value
    expected = np.broadcast_to(np.where(_allowed(case), 0.0, -np.inf), scores.shape)
    equal("spans_that_can_be", case, np.where(np.isfinite(scores), 0.0, scores), expected)


def masked_content(implementation: Function, case: Case) -> None:
    """What masked tokens or choices hold changes nothing, bit for bit."""
    changed = np.where(case["mask"][..., None], case["x"], 1 - case["x"])
    equal("masked_content", case, run(implementation, case, x=changed)[0].value, run(implementation, case)[0].value)


def shifted_positions(implementation: Function, case: Case) -> None:
    """Adding one number to all positions changes nothing."""
    one, two = run(implementation, case)[0], run(implementation, case, positions=case["positions"] + 37)[0]
    close("shifted_positions", case, two.value, one.value, _finite(one, _allowed(case)) + _finite(two, _allowed(case)))


def padding(implementation: Function, case: Case) -> None:
    """Masked tokens in front or behind only move the scores."""
    one, n = run(implementation, case)[0], case["mask"].shape[-1]
    allowed = _allowed(case)
    for front, back in ((1, 0), (0, 2)):
        two = run(
            implementation,
            case,
            x=np.pad(case["x"], [(0, 0), (front, back), (0, 0)], constant_values=2.0),
            mask=np.pad(case["mask"], [(0, 0), (front, back)]),
            positions=np.pad(case["positions"], [(front, back)]),
        )[0]
        inner = (..., slice(front, front + n), slice(front, front + n))
        radius = np.where(allowed, one.radius + two.radius[inner], 0.0)
        close("padding", case, two.value[inner], one.value, radius)


def rotated_impulses(implementation: Function, case: Case) -> None:
    """With constant queries e_a and keys e_b the scores are cosines and sines of (j - i) times one frequency.

    The pair (a, b) walks over one pair of features; every other head must score 0.
    """
    zero = {"kernel": np.zeros(case["kernel"].shape)}
    if case.op == EFFICIENT:
        zero |= {"type_kernel": np.zeros(case["type_kernel"].shape), "type_bias": np.zeros(case["type_bias"].shape)}
    heads = case["heads"] if case.op == GLOBAL else 1
    s = case["bias"].size // (2 * heads)
    allowed, positions = _allowed(case), case["positions"]
    chosen, pair = heads - 1, int(positions[-1]) % (s // 2)
    phi = (positions - positions[:, None]) * case["base"] ** (-2.0 * pair / s)
    # <R_i e_a, R_j e_b> for (a, b) the first or second feature of the pair.
    table = {(0, 0): np.cos(phi), (0, 1): -np.sin(phi), (1, 0): np.sin(phi), (1, 1): np.cos(phi)}
    for (a, b), response in table.items():
        bias = np.zeros(case["bias"].shape)
        at_query, at_key = 2 * pair + a, 2 * pair + b
        if case.op == GLOBAL:
            bias[2 * s * chosen + at_query], bias[2 * s * chosen + s + at_key] = 1.0, 1.0
        else:
            bias[2 * at_query], bias[2 * at_key + 1] = 1.0, 1.0
        out = run(implementation, case, bias=bias, **zero)[0]
        which = np.arange(out.value.shape[-3])[:, None, None]
        expected = np.where((which == chosen) | (case.op == EFFICIENT), response / np.sqrt(s), 0.0)
        expected = np.where(allowed, np.broadcast_to(expected, out.value.shape), -np.inf)
        slack = 2.0**-50 * (1 + np.abs(phi))
        close("rotated_impulses", case, out.value, expected, np.where(allowed, out.radius + slack, 0.0))


def end_and_start_terms(implementation: Function, case: Case) -> None:
    """A single channel of z feeds half of x_j into type 0 (end) or half of x_i (start), and nothing anywhere else."""
    x, allowed = case["x"], _allowed(case)
    kernel, bias = np.zeros(case["kernel"].shape), np.zeros(case["bias"].shape)
    kernel[0, 0] = 1.0
    for column, axis in ((0, -1), (1, -2)):
        type_kernel, type_bias = np.zeros(case["type_kernel"].shape), np.zeros(case["type_bias"].shape)
        type_kernel[0, column] = 1.0
        type_bias[-2 + column] = 4.0
        changes = {"kernel": kernel, "bias": bias, "type_kernel": type_kernel, "type_bias": type_bias}
        out = run(implementation, case, **changes)[0]
        half = 0.5 * x[..., 0]
        of_type = np.zeros((out.value.shape[-3], 1, 1))
        of_type[0] = 1.0
        constant = np.zeros((out.value.shape[-3], 1, 1))
        constant[-1] = 2.0
        along = np.expand_dims(half, -2 if axis == -1 else -1)[..., None, :, :]
        expected = np.where(allowed, np.broadcast_to(along * of_type + constant, out.value.shape), -np.inf)
        close("end_and_start_terms", case, out.value, expected, np.where(allowed, out.radius, 0.0))


def shared_and_type_terms_add(implementation: Function, case: Case) -> None:
    """Scores with type terms minus scores without them do not depend on the rotation."""
    zero = {k: np.zeros(case[k].shape) for k in ("type_kernel", "type_bias")}
    still = np.zeros_like(case["positions"])
    allowed, differences = _allowed(case), []
    slack = np.zeros(())
    for positions in (case["positions"], still):
        one, two = (
            run(implementation, case, positions=positions)[0],
            run(implementation, case, positions=positions, **zero)[0],
        )
        differences.append(np.where(allowed, one.value, 0.0) - np.where(allowed, two.value, 0.0))
        slack = (
            slack + _finite(one, allowed) + _finite(two, allowed) + 2.0**-51 * np.abs(np.where(allowed, one.value, 0.0))
        )
    close("shared_and_type_terms_add", case, differences[0], differences[1], slack)


def quadratic_in_x(implementation: Function, case: Case) -> None:
    """Without biases, twice x gives four times the scores."""
    bias = {"bias": np.zeros(case["bias"].shape)}
    one, two = run(implementation, case, **bias)[0], run(implementation, case, x=2 * case["x"], **bias)[0]
    allowed = _allowed(case)
    close("quadratic_in_x", case, two.value, 4 * one.value, 4 * _finite(one, allowed) + _finite(two, allowed))


def single_span(implementation: Function, case: Case) -> None:
    """Among -inf, one score above the threshold on or above the diagonal is the one span; below it, none is."""
    shape = case["scores"].shape
    h, i, j = shape[0] - 1, 0, shape[-1] - 1
    above = case["threshold"] + 1.0
    for start, end, expected in ((i, j, [[h, i, j]]), (j, j, [[h, j, j]]), *(((j, i, []),) if j > i else ())):
        scores = np.full(shape, -np.inf)
        scores[h, start, end] = above
        out = run(implementation, case, scores=scores)[0].value
        equal("single_span", case, out, np.array(expected, np.float64).reshape(-1, 3))


def strictly_above(implementation: Function, case: Case) -> None:
    """A score that equals the threshold is no span."""
    scores = np.full(case["scores"].shape, case["threshold"])
    equal("strictly_above", case, run(implementation, case, scores=scores)[0].value, np.zeros((0, 3)))


def threshold_shifts(implementation: Function, case: Case) -> None:
    """Doubling scores and threshold changes nothing, and every returned span lies above it, in order, once."""
    spans = run(implementation, case)[0].value
    doubled = run(implementation, case, scores=2 * case["scores"], threshold=2 * case["threshold"])[0].value
    equal("threshold_shifts", case, doubled, spans)
    rows = [tuple(int(v) for v in row) for row in spans]
    above = {
        (h, i, j)
        for h, i, j in np.ndindex(case["scores"].shape)
        if i <= j and case["scores"][h, i, j] > case["threshold"]
    }
    equal("threshold_shifts", case, np.array(rows).reshape(-1, 3), np.array(sorted(above)).reshape(-1, 3))


def best_of_one(implementation: Function, case: Case) -> None:
    """Among -inf, a single score within reach is the best span; one token longer, there is none."""
    shape, reach = case["scores"].shape, case["max_length"]
    n = shape[-1]
    for length in (1, min(reach, n), reach + 1):
        if length > n:
            continue
        scores = np.full(shape, -np.inf)
        scores[..., n - length, n - 1] = -3.0
        found = length <= reach
        expected = (n - length, n - 1, -3.0) if found else (-1, -1, -np.inf)
        for out, value in zip(run(implementation, case, scores=scores), expected, strict=True):
            equal("best_of_one", case, out.value, np.full(out.value.shape, value))


def ties_in_order(implementation: Function, case: Case) -> None:
    """Of equal scores the smallest start wins, then the smallest end; scores below the diagonal never win."""
    shape = case["scores"].shape
    n = shape[-1]
    scores = np.where(np.tril(np.ones((n, n), bool), -1), 5.0, np.broadcast_to(1.0, shape))
    for out, value in zip(run(implementation, case, scores=scores), (0, 0, 1), strict=True):
        equal("ties_in_order", case, out.value, np.full(out.value.shape, value))
    scores[..., 0, 0] = 0.0
    expected = (0, 1, 1) if n > 1 and case["max_length"] > 1 else (1, 1, 1) if n > 1 else (0, 0, 0)
    for out, value in zip(run(implementation, case, scores=scores), expected, strict=True):
        equal("ties_in_order", case, out.value, np.full(out.value.shape, value))


def score_of_the_span(implementation: Function, case: Case) -> None:
    """The score stands at (start, end), which is within reach, and no score in reach exceeds it."""
    start, end, score = (out.value for out in run(implementation, case))
    scores, n = case["scores"], case["scores"].shape[-1]
    lengths = np.arange(n) - np.arange(n)[:, None]
    reachable = np.where((lengths >= 0) & (lengths < case["max_length"]), scores, -np.inf)
    equal("score_of_the_span", case, score, reachable.max(axis=(-1, -2)))
    for b in np.ndindex(score.shape):
        i, j = int(start[b]), int(end[b])
        if 0 <= i < n and 0 <= j < n:
            equal("score_of_the_span", case, score[b], reachable[b][i, j])
        else:
            equal("score_of_the_span", case, [start[b], end[b], score[b]], [-1, -1, -np.inf])


LAWS = (
    Law(one_hot_kernel, (CLASSIFY,), ("C1", "C2")),
    Law(one_hot_kernel, (CHOOSE,), ("C1", "C3")),
    Law(choices_exchange, (CHOOSE,), ("C2",)),
    Law(masked_content, (CHOOSE, *POINTERS)),
    Law(spans_that_can_be, (GLOBAL,), ("C5",)),
    Law(spans_that_can_be, (EFFICIENT,), ("C4",)),
    Law(shifted_positions, POINTERS, ("C4",)),
    Law(padding, POINTERS),
    Law(rotated_impulses, (GLOBAL,), ("C1", "C2", "C3", "C4")),
    Law(rotated_impulses, (EFFICIENT,), ("C1", "C4")),
    Law(end_and_start_terms, (EFFICIENT,), ("C2",)),
    Law(shared_and_type_terms_add, (EFFICIENT,), ("C3",)),
    Law(quadratic_in_x, (GLOBAL,)),
    Law(single_span, (DECODE,), ("C2",)),
    Law(strictly_above, (DECODE,), ("C1",)),
    Law(threshold_shifts, (DECODE,), ("C3",)),
    Law(best_of_one, (BEST,), ("C1", "C3")),
    Law(ties_in_order, (BEST,), ("C2",)),
    Law(score_of_the_span, (BEST,)),
)


def strategy(function: str, profile: Profile) -> st.SearchStrategy[Case]:
    """1 to 2 sentences of 1 to 5 tokens, 1 to 3 types of width 2 or 4; any mask; positions with gaps."""

    def build(
        draw: Draw, batch: int, n: int, types: int, half: int, keep: float, reach: int, base: float
    ) -> dict[str, Any]:
        x, mask = draw.grid(batch, n, 3), draw.mask(batch, n, keep=keep)
        if function == "classify":
            return {"x": x, "kernel": draw.grid(3, types + 1), "bias": draw.grid(types + 1)}
        if function == "choose":
            return {"x": x, "kernel": draw.grid(3, 1), "bias": draw.grid(1), "mask": mask}
        if function == "decode_spans":
            scores = draw.grid(types, n, n, low=-7, high=7, exponent=-2)
            return {"scores": scores, "threshold": 0.25 * (reach - 2)}
        if function == "best_span":
            return {"scores": draw.grid(batch, n, n, low=-3, high=3, exponent=-2), "max_length": reach}
        positions = np.cumsum(draw.integers(n, 0, 3))
        width = 4 * half * (types if function == "global_pointer" else 1)
        shared = {"x": x, "kernel": draw.grid(3, width, exponent=-7), "bias": draw.grid(width)}
        where_ = {"mask": mask, "positions": positions}
        if function == "global_pointer":
            return {**shared, **where_, "heads": types, "base": base}
        types_of = {"type_kernel": draw.grid(width, 2 * types), "type_bias": draw.grid(2 * types)}
        return {**shared, **types_of, **where_, "base": base}

    return drawn(
        f"head.{function}",
        profile,
        build,
        batch=st.integers(1, 2),
        n=st.integers(1, 5),
        types=st.integers(1, 3),
        half=st.integers(1, 2),
        keep=st.sampled_from([0.75, 0.25, 1.0]),
        reach=st.integers(1, 6),
        base=st.sampled_from([10000.0, 50.0]),
    )


def _allowed_by(mask: np.ndarray) -> np.ndarray:
    return mask[..., :, None] & mask[..., None, :] & np.triu(np.ones(mask.shape[-1:] * 2, bool))


def _both(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x[..., 0, :], x[..., 1, :]


def _pointer(
    x: np.ndarray,
    kernel: np.ndarray,
    bias: np.ndarray,
    mask: np.ndarray,
    positions: np.ndarray,
    heads: int,
    base: float,
    *,
    wrong: str = "",
) -> np.ndarray:
    """global_pointer with one thing wrong."""
    s = kernel.shape[-1] // (2 * heads)
    z = x @ kernel + bias
    if wrong == "split":
        q, k = z[..., : heads * s], z[..., heads * s :]
        q, k = q.reshape(*q.shape[:-1], heads, s), k.reshape(*k.shape[:-1], heads, s)
    elif wrong == "channels":
        z = z.reshape(*z.shape[:-1], heads, s, 2)
        q, k = z[..., 0], z[..., 1]
    elif wrong == "types last":
        q, k = _both(np.moveaxis(z.reshape(*z.shape[:-1], 2, s, heads), -1, -3))
    else:
        q, k = _both(z.reshape(*z.shape[:-1], heads, 2, s))
    if wrong == "exchanged":
        q, k = k, q
    if wrong == "array index":
        positions = np.broadcast_to(np.arange(mask.shape[-1]), positions.shape)
    exponent = 2 * s if wrong == "width of both" else s
    theta = (1000.0 if wrong == "base 1000" else base) ** (-2.0 * np.arange(s // 2) / exponent)
    phi = (positions[..., None] * theta)[..., None, :]
    if wrong == "backwards":
        q, k = _turn(q, -phi), _turn(k, -phi)
    elif wrong == "half split":
        q, k = rope.rotate_half_split(q, phi), rope.rotate_half_split(k, phi)
    elif wrong == "blockwise":
        q, k = _blockwise(q, phi), _blockwise(k, phi)
    elif wrong != "not rotated":
        q, k = _turn(q, phi), k if wrong == "query only" else _turn(k, phi)
    scores = np.einsum("...nhs,...mhs->...hnm", q, k)
    n = mask.shape[-1]
    divisor = {"unscaled": 1.0, "divided by s": float(s), "sqrt(2 s)": np.sqrt(2 * s), "sqrt(n)": np.sqrt(n)}
    scores = scores / divisor.get(wrong, np.sqrt(s))
    upper = np.triu(np.ones((n, n), bool), k=1 if wrong == "no single tokens" else 0)
    visible = mask[..., :, None] & mask[..., None, :]
    if wrong == "ends only":
        visible = np.broadcast_to(mask[..., None, :], visible.shape)
    if wrong == "one token visible":
        visible = mask[..., :, None] | mask[..., None, :]
    allowed = visible & (upper.T if wrong == "lower" else np.ones_like(upper) if wrong == "square" else upper)
    if wrong == "transposed":
        return np.where(allowed[..., None, :, :], scores.swapaxes(-1, -2), -np.inf)
    if wrong == "multiplied":
        return np.where(upper, scores * visible[..., None, :, :], -np.inf)
    return np.where(allowed[..., None, :, :], scores, -1e12 / np.sqrt(s) if wrong == "finite" else -np.inf)


def _turn(x: np.ndarray, phi: np.ndarray) -> np.ndarray:
    return rope.rotate_interleaved(x, phi)


def _blockwise(x: np.ndarray, phi: np.ndarray) -> np.ndarray:
    """Neighbours paired, but cosines and sines repeated block after block."""
    turned = np.stack([-x[..., 1::2], x[..., 0::2]], axis=-1).reshape(x.shape)
    tiled = np.concatenate([phi, phi], axis=-1)
    return x * np.cos(tiled) + turned * np.sin(tiled)


def _pointer_with(wrong: str) -> Function:
    return lambda **arguments: _pointer(**arguments, wrong=wrong)


def _efficient(
    x: np.ndarray,
    kernel: np.ndarray,
    bias: np.ndarray,
    type_kernel: np.ndarray,
    type_bias: np.ndarray,
    mask: np.ndarray,
    positions: np.ndarray,
    base: float,
    *,
    wrong: str = "",
) -> np.ndarray:
    """efficient_global_pointer with one thing wrong."""
    s = kernel.shape[-1] // 2
    z = x @ kernel + bias
    q, k = (z[..., :s], z[..., s:]) if wrong == "halves" else (z[..., 0::2], z[..., 1::2])
    if wrong == "exchanged":
        q, k = k, q
    phi = positions[..., None] * base ** (-2.0 * np.arange(s // 2) / s)
    turn = {"half split": rope.rotate_half_split, "blockwise": _blockwise}.get(wrong, _turn)
    q, k = turn(q, phi), turn(k, phi)
    if wrong == "rotated first":
        z = np.stack([q, k], axis=-1).reshape(z.shape)
    t = (z @ type_kernel + type_bias).swapaxes(-1, -2) * (1.0 if wrong == "not halved" else 0.5)
    end, start = t[..., 0::2, :], t[..., 1::2, :]
    if wrong == "types in halves":
        end, start = np.split(t, 2, axis=-2)
    if wrong == "terms exchanged":
        end, start = start, end
    start, end = (0 * start if wrong == "no start" else start), (0 * end if wrong == "no end" else end)
    shared = np.einsum("...ns,...ms->...nm", q, k) / (1.0 if wrong == "unscaled" else np.sqrt(s))
    scores = shared[..., None, :, :] + end[..., None, :] + start[..., :, None]
    if wrong == "all halved":
        scores = (shared[..., None, :, :] + 2 * end[..., None, :] + 2 * start[..., :, None]) / 2
    if wrong == "all scaled":
        scores = shared[..., None, :, :] + (end[..., None, :] + start[..., :, None]) / np.sqrt(s)
    return np.where(_allowed_by(mask)[..., None, :, :], scores, -1e12 if wrong == "finite" else -np.inf)


def _efficient_with(wrong: str) -> Function:
    return lambda **arguments: _efficient(**arguments, wrong=wrong)


def _choices(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray, mask: np.ndarray, fill: float) -> np.ndarray:
    return np.where(mask, (x @ kernel + bias)[..., 0], fill)


def _bias_once(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return _choices(x, kernel, 0 * bias, mask, -np.inf) + bias * (np.arange(mask.shape[-1]) == 0)


def _choice_weights(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray, mask: np.ndarray) -> np.ndarray:
    scores = np.exp(_choices(x, kernel, bias, mask, -np.inf))
    return scores / scores.sum(axis=-1, keepdims=True)


def _softmax(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    weights = np.exp(x @ kernel + bias)
    return weights / weights.sum(axis=-1, keepdims=True)


def _by_score(scores: np.ndarray, threshold: float) -> np.ndarray:
    spans = head.decode_spans(scores, threshold=threshold)
    return spans[np.argsort([-scores[tuple(span)] for span in spans], kind="stable")] if len(spans) else spans


def _outermost(scores: np.ndarray, threshold: float) -> np.ndarray:
    """Spans inside another one of their type are dropped."""
    spans = head.decode_spans(scores, threshold=threshold)
    inside = [
        any(a[0] == b[0] and b[1] <= a[1] and a[2] <= b[2] and tuple(a) != tuple(b) for b in spans) for a in spans
    ]
    return spans[~np.array(inside, bool)]


def _swapped(scores: np.ndarray, threshold: float) -> np.ndarray:
    spans = head.decode_spans(scores.swapaxes(-1, -2), threshold=threshold)
    return spans[:, [0, 2, 1]]


def _last_of_ties(scores: np.ndarray, max_length: int) -> tuple[np.ndarray, ...]:
    n = scores.shape[-1]
    turned = head.best_span(scores[..., ::-1, ::-1].swapaxes(-1, -2), max_length=max_length)
    found = turned.start >= 0
    return np.where(found, n - 1 - turned.end, -1), np.where(found, n - 1 - turned.start, -1), turned.score


def _any_order(scores: np.ndarray, max_length: int) -> tuple[np.ndarray, ...]:
    n = scores.shape[-1]
    index = scores.reshape(*scores.shape[:-2], -1).argmax(axis=-1)
    return index // n, index % n, scores.max(axis=(-1, -2))


def _separately(scores: np.ndarray, max_length: int) -> tuple[np.ndarray, ...]:
    start, end = scores.max(axis=-1).argmax(axis=-1), scores.max(axis=-2).argmax(axis=-1)
    return start, end, scores.max(axis=(-1, -2))


def _zero_for_none(scores: np.ndarray, max_length: int) -> tuple[np.ndarray, ...]:
    best = head.best_span(scores, max_length=max_length)
    return np.maximum(best.start, 0), np.maximum(best.end, 0), best.score


def _end_first(scores: np.ndarray, max_length: int) -> tuple[np.ndarray, ...]:
    best = head.best_span(scores, max_length=max_length)
    return best.end, best.start, best.score


def _worst(scores: np.ndarray, max_length: int) -> tuple[np.ndarray, ...]:
    best = head.best_span(np.where(np.isfinite(scores), -scores, scores), max_length=max_length)
    return best.start, best.end, -best.score


def _one_token_too_short(scores: np.ndarray, max_length: int) -> tuple[np.ndarray, ...]:
    return head.best_span(scores, max_length=max(max_length - 1, 1))


def _at_the_threshold(scores: np.ndarray, threshold: float) -> np.ndarray:
    return np.argwhere((scores >= threshold) & np.triu(np.ones(scores.shape[-2:], bool)))


def _without_single_tokens(scores: np.ndarray, threshold: float) -> np.ndarray:
    return np.argwhere((scores > threshold) & np.triu(np.ones(scores.shape[-2:], bool), k=1))


_choose_right, _decode_right, _best_right = head.choose, head.decode_spans, head.best_span

MUTANTS = (
    Mutant(CLASSIFY, "softmax added", _softmax),
    Mutant(CLASSIFY, "bias left out", lambda x, kernel, bias: x @ kernel),
    Mutant(CLASSIFY, "relu added", lambda x, kernel, bias: np.maximum(x @ kernel + bias, 0)),
    Mutant(CLASSIFY, "kernel read as (out, in)", lambda x, kernel, bias: x @ kernel.T.reshape(kernel.shape) + bias),
    Mutant(CLASSIFY, "tanh before the dense layer", lambda x, kernel, bias: np.tanh(x) @ kernel + bias),
    Mutant(CHOOSE, "masked choices score 0", lambda x, kernel, bias, mask: _choices(x, kernel, bias, mask, 0.0)),
    Mutant(CHOOSE, "masked choices score -1e4", lambda x, kernel, bias, mask: _choices(x, kernel, bias, mask, -1e4)),
    Mutant(CHOOSE, "masked choices score -1e12", lambda x, kernel, bias, mask: _choices(x, kernel, bias, mask, -1e12)),
    Mutant(CHOOSE, "mask ignored", lambda x, kernel, bias, mask: (x @ kernel + bias)[..., 0]),
    Mutant(CHOOSE, "mask inverted", lambda x, kernel, bias, mask: _choose_right(x, kernel, bias, ~mask)),
    Mutant(CHOOSE, "bias left out", lambda x, kernel, bias, mask: _choose_right(x, kernel, 0 * bias, mask)),
    Mutant(CHOOSE, "bias added to the first choice only", _bias_once),
    Mutant(CHOOSE, "softmax added", _choice_weights),
    Mutant(GLOBAL, "all queries, then all keys", _pointer_with("split")),
    Mutant(GLOBAL, "query and key in alternate channels", _pointer_with("channels")),
    Mutant(GLOBAL, "types in the fastest axis of the dense output", _pointer_with("types last")),
    Mutant(GLOBAL, "key before query", _pointer_with("exchanged")),
    Mutant(GLOBAL, "half-split rotation", _pointer_with("half split")),
    Mutant(GLOBAL, "no rotation", _pointer_with("not rotated")),
    Mutant(GLOBAL, "query rotated, key not", _pointer_with("query only")),
    Mutant(GLOBAL, "rotation in the other direction", _pointer_with("backwards")),
    Mutant(GLOBAL, "positions ignored", _pointer_with("array index")),
    Mutant(GLOBAL, "base 1000", _pointer_with("base 1000")),
    Mutant(GLOBAL, "frequencies of width 2 s", _pointer_with("width of both")),
    Mutant(GLOBAL, "not divided by sqrt(s)", _pointer_with("unscaled")),
    Mutant(GLOBAL, "divided by s", _pointer_with("divided by s")),
    Mutant(GLOBAL, "divided by sqrt(2 s)", _pointer_with("sqrt(2 s)")),
    Mutant(GLOBAL, "divided by sqrt(n), the length of the array", _pointer_with("sqrt(n)")),
    Mutant(GLOBAL, "spans of one token left out", _pointer_with("no single tokens")),
    Mutant(GLOBAL, "lower triangle", _pointer_with("lower")),
    Mutant(GLOBAL, "no triangle", _pointer_with("square")),
    Mutant(GLOBAL, "padding masked at the end token only", _pointer_with("ends only")),
    Mutant(GLOBAL, "one visible token suffices", _pointer_with("one token visible")),
    Mutant(GLOBAL, "rows are ends", _pointer_with("transposed")),
    Mutant(GLOBAL, "scores of padding multiplied by 0", _pointer_with("multiplied")),
    Mutant(GLOBAL, "-1e12 for -inf", _pointer_with("finite")),
    Mutant(EFFICIENT, "query and key in halves", _efficient_with("halves")),
    Mutant(EFFICIENT, "key before query", _efficient_with("exchanged")),
    Mutant(EFFICIENT, "half-split rotation", _efficient_with("half split")),
    Mutant(EFFICIENT, "type terms after the rotation", _efficient_with("rotated first")),
    Mutant(EFFICIENT, "type terms not halved", _efficient_with("not halved")),
    Mutant(EFFICIENT, "ends and starts in halves", _efficient_with("types in halves")),
    Mutant(EFFICIENT, "end term at the start", _efficient_with("terms exchanged")),
    Mutant(EFFICIENT, "start term left out", _efficient_with("no start")),
    Mutant(EFFICIENT, "end term left out", _efficient_with("no end")),
    Mutant(EFFICIENT, "not divided by sqrt(s)", _efficient_with("unscaled")),
    Mutant(EFFICIENT, "whole sum halved", _efficient_with("all halved")),
    Mutant(EFFICIENT, "type terms divided by sqrt(s)", _efficient_with("all scaled")),
    Mutant(EFFICIENT, "-1e12 for -inf", _efficient_with("finite")),
    Mutant(DECODE, "at the threshold too", _at_the_threshold),
    Mutant(DECODE, "spans below the diagonal too", lambda scores, threshold: np.argwhere(scores > threshold)),
    Mutant(DECODE, "threshold ignored", lambda scores, threshold: _decode_right(scores, threshold=0.0)),
    Mutant(DECODE, "ends exclusive", lambda scores, threshold: _decode_right(scores, threshold=threshold) + [0, 0, 1]),
    Mutant(DECODE, "start and end exchanged", _swapped),
    Mutant(DECODE, "best score first", _by_score),
    Mutant(DECODE, "nested spans dropped", _outermost),
    Mutant(DECODE, "one-token spans dropped", _without_single_tokens),
    Mutant(BEST, "one token too long", lambda scores, max_length: _best_right(scores, max_length=max_length + 1)),
    Mutant(BEST, "one token too short", _one_token_too_short),
    Mutant(BEST, "length ignored", lambda scores, max_length: _best_right(scores, max_length=scores.shape[-1])),
    Mutant(BEST, "last of equal scores", _last_of_ties),
    Mutant(BEST, "ends before starts too", _any_order),
    Mutant(BEST, "first token for no span", _zero_for_none),
    Mutant(BEST, "start and end exchanged", _end_first),
    Mutant(BEST, "worst span", _worst),
)

MUSEUM = (
    Mutant(
        EFFICIENT,
        "neighbours rotated with cosines and sines repeated block after block",
        _efficient_with("blockwise"),
        url="https://github.com/xiangking/ark-nlp/issues/47",
    ),
    Mutant(
        GLOBAL,
        "neighbours rotated with cosines and sines repeated block after block",
        _pointer_with("blockwise"),
        url="https://github.com/Tongjilibo/bert4torch/issues/1",
    ),
    Mutant(
        BEST,
        "start and end chosen separately, the end may come first",
        _separately,
        url="https://github.com/huggingface/transformers/issues/12254",
    ),
)
