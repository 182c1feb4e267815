"""Judging can: uncertainty of predictions, class priors, alternating normalisation."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from hypothesis import strategies as st

from conformance.budget import (
    DTYPES,
    LIBM,
    Arithmetic,
    Ball,
    Profile,
    concatenate,
    gamma,
    half_subnormal,
    log,
    power,
    where,
)
from conformance.case import Case, Function, Operator
from conformance.generate import Draw, drawn
from conformance.law import Law, close, equal, run
from conformance.mutant import Mutant
from refimpl.ops import can


# References.
def _largest(p: Ball, top: int) -> Ball:
    """The `top` largest entries of every row, or all of them."""
    order = np.argsort(-p.value, axis=-1, kind="stable")[..., : min(top, p.shape[-1])]
    return p[tuple(np.indices(order.shape)[:-1]) + (order,)]


def _x_log_x(x: Ball) -> Ball:
    zero = x.value == 0
    return where(zero, x * 0.0, x * log(where(zero, x * 0.0 + 1.0, x)))


def top_entropy(a: Arithmetic, p: Ball, top: int) -> Ball:
    """- sum w ln w / ln t over the shares w of the t largest; a row of zeros counts as t equal shares."""
    largest = _largest(p, top)
    t = largest.shape[-1]
    empty = np.broadcast_to(largest.value.sum(-1, keepdims=True) == 0, largest.shape)
    largest = where(empty, largest * 0.0 + 1.0, largest)
    return -(_x_log_x(largest / largest.sum(keepdims=True)).sum() / log(a.exact(float(t))))


def top_entropy_unnormalized(a: Arithmetic, p: Ball, top: int) -> Ball:
    """- sum p ln p / ln k over the largest."""
    return -(_x_log_x(_largest(p, top)).sum() / log(a.exact(float(p.shape[-1]))))


def _reached(a: Arithmetic, u: Ball, threshold: float) -> Ball:
    """1 where u >= threshold, 0 elsewhere; unknown where the precision cannot tell."""
    undecided = (abs(u.value - threshold) <= u.rad) & (u.rad > 0)
    return a.ball(np.where(u.value >= threshold, 1.0, 0.0), np.where(undecided, np.inf, 0.0))


def _decided(reached: Ball) -> Any:
    """A plain array, without any radius, where every decision is certain."""
    return reached if reached.rad.any() else reached.value


def ambiguous_any(a: Arithmetic, p: Ball, threshold: float, max_top: int) -> Any:
    """Whether the entropy of the t largest reaches the threshold for some t in 2..max_top."""
    each = [_reached(a, top_entropy(a, p, t), threshold) for t in range(2, min(max_top, p.shape[-1]) + 1)]
    certain = np.any([(e.value == 1) & (e.rad == 0) for e in each], axis=0)
    unknown = np.any([np.isinf(e.rad) for e in each], axis=0) & ~certain
    value = np.any([e.value == 1 for e in each], axis=0)
    return _decided(a.ball(np.where(value, 1.0, 0.0), np.where(unknown, np.inf, 0.0)))


def class_prior(a: Arithmetic, labels: np.ndarray, classes: int, smoothing: float) -> Ball:
    """(count + smoothing) / (n + smoothing k)."""
    counts = np.array([sum(int(label) == j for label in labels) for j in range(classes)], np.float64)
    return (a.exact(counts) + smoothing) / (a.exact(float(len(labels))) + a.exact(smoothing) * float(classes))


def _mids(x: Any) -> np.ndarray:
    return np.asarray(x, dtype=np.float64)


def _ratio(numerator: Any, denominator: Any) -> np.ndarray:
    """0/0 = 0, for float64 and for 50 digits."""
    zero = denominator == 0
    return np.where(zero, numerator * 0, numerator / np.where(zero, denominator + 1, denominator))


def _relative(error: np.ndarray) -> np.ndarray:
    """The logarithmic error that a relative one may be."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error < 1, -np.log1p(-np.minimum(error, 0.999999)), np.inf)


def _weighted(values: np.ndarray, errors: np.ndarray, axis: int) -> np.ndarray:
    """Relative error of a sum of positive terms with these logarithmic errors."""
    with np.errstate(invalid="ignore", over="ignore"):
        parts = np.where(values > 0, values * np.expm1(errors), 0.0)
        return _relative(_ratio(parts.sum(axis, keepdims=True), values.sum(axis, keepdims=True)))


def _spread(stack: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Range of the logarithms of the column factors by which the confident rows differ with and without b."""
    if frame.shape[0] == 0:
        return np.zeros((len(stack), 1, 1))
    both = (stack[:, :-1] > 0) & (frame > 0)
    factor = np.where(both, np.log(np.where(both, stack[:, :-1] / np.where(both, frame, 1.0), 1.0)), 0.0)
    high, low = np.where(both, factor, -np.inf).max(2), np.where(both, factor, np.inf).min(2)
    return np.where(both.any(2), high - low, 0.0).max(1)[:, None, None]


def alternating_normalization(
    a: Arithmetic, confident: Ball, uncertain: Ball, prior: Ball, alpha: float, iterations: int
) -> Ball:
    """The last row of [C; b] after `iterations` rounds of power, columns to the prior, rows to one.

    Everything is positive, so errors are relative. Written as entry + row + column parts, a column step takes the
    column part of the previous round out exactly, and a row step the row part: each new part is a weighted mean of
    entry errors. They grow by alpha a round, not by the 4 alpha of two independent quotients.
    """
    profile, n = a.profile, confident.shape[0]
    stack = (
        np.stack([np.concatenate([confident.mid, row[None]]) for row in uncertain.mid])
        if len(uncertain.mid)
        else np.zeros((0, n + 1, prior.shape[0]), confident.mid.dtype)
    )
    frame = _mids(confident.mid)
    sixteen = profile.sixteen_bit
    once = a.unit + (profile.storage if sixteen and profile.name == "eager" else 0.0)
    kept = profile.storage if sixteen and profile.name == "fused" else 0.0
    tiny = half_subnormal(profile.dtype if sixteen and profile.name == "eager" else "float32")
    tiny = 0.0 if profile.dtype == "float64" else tiny
    entry, row_error, column_error = np.zeros(stack.shape), np.zeros((len(stack), n + 1, 1)), 0.0
    spread = np.zeros((len(stack), 1, 1))
    for step in range(iterations):
        powered = power(Ball(stack, np.zeros(stack.shape), a), alpha)
        value = powered.value
        rounding = _relative(np.where(value > 0, _ratio(powered.rad, value), 0.0))
        entry, row_error = alpha * entry + rounding, alpha * row_error
        if step > 0:
            # Batched: factors of rows and columns are held apart, raised to alpha and multiplied back.
            libm = (LIBM + 2 * alpha * spread) * a.unit + once
            entry = entry + libm + 6 * once
            row_error = row_error + libm + gamma(stack.shape[2], a.unit) + 3 * once
        column_error = _weighted(value, entry + row_error, 1) + gamma(n + 3, a.unit) + 2 * once
        stack = _ratio(powered.mid, powered.mid.sum(axis=1, keepdims=True)) * prior.mid
        value = _mids(stack)
        entry = entry + 3 * once + kept + np.where(value > 0, _ratio(3 * tiny, value), 0.0)
        row_error = _weighted(value, entry + column_error, 2) + gamma(stack.shape[2], a.unit) + once
        stack = _ratio(stack, stack.sum(axis=2, keepdims=True))
        entry = entry + 2 * once
        with np.errstate(divide="ignore", invalid="ignore"):
            held = frame**alpha
            frame = _ratio(
                _ratio(held, held.sum(0)) * _mids(prior.mid),
                (_ratio(held, held.sum(0)) * _mids(prior.mid)).sum(1, keepdims=True),
            )
            spread = _spread(_mids(stack), frame)
    value = _mids(stack[:, -1])
    with np.errstate(over="ignore", invalid="ignore"):
        radius = np.where(value > 0, value * np.expm1((entry + row_error + column_error)[:, -1]), 0.0)
    # No class in common with the prior: the row comes back as it was.
    lost = np.broadcast_to((value.sum(-1, keepdims=True) == 0) | (iterations == 0), value.shape)
    return a.ball(np.where(lost, uncertain.mid, stack[:, -1]), np.where(lost, 0.0, radius + 2 * tiny * (value > 0)))


def alternating_normalization_official(
    a: Arithmetic, confident: Ball, uncertain: Ball, prior: Ball, alpha: float, iterations: int
) -> Ball:
    """The same with 1e-10 added to every column sum and every row sum."""
    rows = []
    for i in range(uncertain.shape[0]):
        stack = concatenate([confident, uncertain[i : i + 1]], axis=0)
        for _ in range(iterations):
            powered = power(stack, alpha)
            stack = (powered / (powered.sum(0, keepdims=True) + 1e-10) * prior).stored()
            stack = (stack / (stack.sum(1, keepdims=True) + 1e-10)).stored()
        rows.append(stack[-1:])
    return concatenate([*rows, uncertain[:0]], axis=0)


def adjust(
    a: Arithmetic, p: Ball, prior: Ball, top: int, threshold: float, alpha: float, iterations: int
) -> tuple[Ball, Any]:
    """Rows whose entropy reaches the threshold, each normalised under those whose entropy does not."""
    reached = _reached(a, top_entropy(a, p, top), threshold)
    chosen = reached.value == 1
    moved = alternating_normalization(a, p[~chosen], p[chosen], prior, alpha, iterations)
    mid, rad = p.mid.copy(), p.rad.copy()
    mid[chosen], rad[chosen] = moved.mid, moved.rad
    # One undecided row may change the reference set of every other.
    return Ball(mid, rad + (np.inf if np.isinf(reached.rad).any() else 0.0), a), _decided(reached)


NORMALIZATIONS = ("alternating_normalization_loop", "alternating_normalization")
_FORMS = tuple(f"can.{name}" for name in NORMALIZATIONS)
_ALL_FORMS = (*_FORMS, "can.alternating_normalization_official")

OPERATORS = (
    Operator("can.top_entropy", can.top_entropy, top_entropy, ("u",)),
    Operator("can.top_entropy_unnormalized", can.top_entropy_unnormalized, top_entropy_unnormalized, ("u",)),
    Operator("can.ambiguous_any", can.ambiguous_any, ambiguous_any, ("uncertain",)),
    Operator("can.class_prior", can.class_prior, class_prior, ("q",)),
    Operator("can.alternating_normalization_loop", can.alternating_normalization_loop, alternating_normalization),
    Operator("can.alternating_normalization", can.alternating_normalization, alternating_normalization),
    Operator(
        "can.alternating_normalization_official",
        can.alternating_normalization_official,
        alternating_normalization_official,
    ),
    Operator("can.adjust", can.adjust, adjust, ("probabilities", "uncertain")),
)


# Cases.
def _case(op: str, name: str, clauses: str, *, exact: bool = False, only: tuple[str, ...] = (), **arguments) -> Case:
    return Case(f"can.{op}", name, arguments, tuple(clauses.split()), exact, only=only or DTYPES)


WIDE = ("float64", "float32")
# Decisions near a threshold, which bfloat16 throughout cannot take.
FINE = ("float64", "float32", "float16")

# Zero classes, ties, one certain row, a tail outside the leaders, a row of zeros.
_ROWS = (
    np.array(
        [
            [64, 32, 16, 8, 8, 0, 0],
            [1, 1, 1, 125, 0, 0, 0],
            [0, 128, 0, 0, 0, 0, 0],
            [43, 43, 42, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 0],
            [20, 18, 18, 18, 18, 18, 18],
        ]
    )
    / 128.0
)
_WIDE_ROWS = np.stack([np.full(119, 1 / 128), np.eye(3, 119).sum(0) * 0.25, np.eye(119)[7] * 0.5 + np.eye(119)[9] / 4])


def _entropies(op: str) -> tuple[Case, ...]:
    made = partial(_case, op)
    extra = "" if op == "top_entropy_unnormalized" else " C3"
    return (
        made("grid-top-3", "C1", p=Draw("can/entropy").distribution(5, 7), top=3),
        made("zeros-and-ties", f"C1 C2{extra}" + (" C4" if extra else ""), p=_ROWS, top=3),
        made("top-2", "C1", p=_ROWS[:4], top=2),
        made("all-classes", "C1", p=Draw("can/all").distribution(4, 5), top=5),
        made("two-classes-top-3", "C2", p=Draw("can/two").distribution(7, 2), top=3),
        made("more-than-classes", "C2", p=_ROWS[:, [0, 1, 2]], top=11),
        made("119-classes-three-equal", "C1", p=_WIDE_ROWS, top=3),
        made("dense", "C1", p=Draw("can/dense").dense(5, 7) + 1.0, top=4),
        made("near-certain", "C1", p=np.array([[1 - 2.0**-12, 2.0**-12, 0], [0.5, 0.25, 0.25]]), top=3, only=WIDE),
    )


# Entropies of the first row: 0.65 for two, 0.725 for three, 0.774 for four; the second has 1, 0.740, 0.669.
_LAST_TOP = np.array([[80, 16, 16, 16], [60, 60, 4, 4], [126, 1, 1, 0]]) / 128.0
_any = partial(_case, "ambiguous_any")
_prior = partial(_case, "class_prior")
_labels = Draw("can/labels").integers(29, 0, 4)

# Column sums 3/2 and 1/2, with b 2 and 1: shares 1/4 and 1/2, whose products with the prior sum to 1/2.
_EXACT: dict[str, Any] = {"alpha": 1.0, "iterations": 1, "prior": np.array([0.5, 0.75])}


def _normalizations(op: str) -> tuple[Case, ...]:
    made = partial(_case, op)
    grid = Draw("can/grid")
    base: dict[str, Any] = {
        "confident": grid.distribution(7, 5),
        "uncertain": grid.distribution(3, 5),
        "prior": grid.distribution(1, 5)[0],
        "alpha": 1.0,
        "iterations": 1,
    }
    holes = np.array([[3, 1, 0, 0, 0], [1, 3, 0, 0, 0], [2, 1, 1, 0, 0], [1, 2, 1, 0, 0]]) / 4.0
    rows = np.array([[64, 63, 0, 1, 0], [0, 0, 0, 0, 128], [30, 30, 34, 34, 0]]) / 128.0
    few = Draw("can/few")
    sharp = np.array([[125, 1, 1, 1], [1, 125, 1, 1], [2, 1, 124, 1], [60, 60, 4, 4]]) / 128.0
    return (
        made("one-round", "C1 C3", **base),
        made(
            "exact-columns",
            "C3",
            exact=True,
            confident=np.array([[0.5, 0.5], [1.0, 0.0]]),
            uncertain=np.array([[0.5, 0.5], [0.5, 0.0], [0.0, 1.5]]),
            **_EXACT,
        ),
        made(
            "exact-prior-quarter",
            "C3",
            exact=True,
            confident=np.array([[0.25, 0.75], [0.25, 0.25]]),
            uncertain=np.array([[0.5, 1.0], [0.5, 1.0], [0.0, 1.0]]),
            **(_EXACT | {"prior": np.array([0.25, 0.25])}),
        ),
        made("alpha-2", "C2", **(base | {"alpha": 2.0})),
        made("alpha-0.5", "C2", **(base | {"alpha": 0.5})),
        made("alpha-0", "C2", **(base | {"alpha": 0.0, "uncertain": rows})),
        made("two-rounds", "C1 C2", **(base | {"iterations": 2}), only=WIDE),
        made("three-rounds-alpha-2", "C1 C2", **(base | {"iterations": 3, "alpha": 2.0}), only=WIDE),
        made("five-rounds-alpha-0.3", "C2", **(base | {"iterations": 5, "alpha": 0.3}), only=WIDE),
        made("eight-rounds", "C1", **(base | {"iterations": 8}), only=WIDE),
        made("eight-rounds-alpha-2", "C2", **(base | {"iterations": 8, "alpha": 2.0}), only=("float64",)),
        made(
            "sharp-rows-alpha-4",
            "C2",
            only=("float64",),
            confident=sharp,
            uncertain=few.distribution(2, 4),
            prior=np.array([1.0, 2, 3, 2]),
            alpha=4.0,
            iterations=4,
        ),
        made("prior-not-normalised", "C3", **(base | {"prior": np.array([3.0, 1, 7, 2, 5])})),
        made("class-never-predicted", "C4", **(base | {"confident": holes, "uncertain": rows})),
        made(
            "class-never-predicted-two-rounds",
            "C4",
            only=WIDE,
            **(base | {"confident": holes, "uncertain": rows, "iterations": 2, "alpha": 0.5}),
        ),
        made(
            "tiny-unseen-class",
            "C4",
            only=WIDE,
            confident=holes,
            uncertain=np.array([[0.5, 0.5, 0, 2.0**-40, 0], [0.5, 0.25, 0.25, 0, 0]]),
            prior=np.full(5, 0.25),
            alpha=1.0,
            iterations=1,
        ),
        made(
            "excluded-classes",
            "C5",
            only=WIDE,
            **(base | {"uncertain": rows, "prior": np.array([0.25, 0.25, 0.5, 0.0, 0.0]), "iterations": 2}),
        ),
        made("no-rounds", "C5", **(base | {"iterations": 0})),
        made("no-confident-rows", "C6", **(base | {"confident": base["confident"][:0], "uncertain": rows})),
        made(
            "no-confident-rows-three-rounds",
            "C6",
            only=WIDE,
            **(
                base
                | {
                    "confident": base["confident"][:0],
                    "uncertain": rows,
                    "iterations": 3,
                    "alpha": 2.0,
                    "prior": np.array([3.0, 1, 7, 2, 5]),
                }
            ),
        ),
        made("one-confident-row", "C1", **(base | {"confident": base["confident"][:1]})),
        made(
            "zero-rows",
            "C5",
            only=WIDE,
            confident=np.concatenate([holes, 0 * holes[:1]]),
            uncertain=np.concatenate([rows, 0 * rows[:1]]),
            prior=np.full(5, 0.25),
            alpha=1.0,
            iterations=2,
        ),
    )


def _batched(cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """The batched form owes its own clauses on the cases of the loop."""

    def clauses(case: Case) -> tuple[str, ...]:
        return ("C1", "C2") if case["iterations"] > 1 else ("C1",)

    return tuple(Case(c.op, c.name, c.arguments, clauses(c), c.exact, only=c.only) for c in cases)


_official = partial(_case, "alternating_normalization_official")
_adjust = partial(_case, "adjust")
_draw = Draw("can/official")
_base: dict[str, Any] = {
    "confident": _draw.distribution(5, 4), "uncertain": _draw.distribution(3, 4),
    "prior": _draw.distribution(1, 4)[0], "alpha": 1.0, "iterations": 1,
}  # fmt: skip
_mixed = np.concatenate([_ROWS[[0, 1, 2, 3, 5]], Draw("can/adjust").distribution(6, 7)])
_seven = Draw("can/seven").distribution(1, 7)[0]
_TINY = np.ldexp(np.array([[1.0, 0, 0, 1], [2, 0, 0, 2]]), -33) + np.array([0, 0.5, 0.5, 0])

CASES = (
    *_entropies("top_entropy"),
    *_entropies("top_entropy_unnormalized"),
    _any("grid", "C1", p=Draw("can/any").distribution(11, 7), threshold=0.875, max_top=3),
    _any("every-top", "C1", p=_ROWS, threshold=0.875, max_top=7),
    _any("upper-end-included", "C1", p=_LAST_TOP, threshold=0.75, max_top=4, only=FINE),
    _any("upper-end-3", "C1", p=_LAST_TOP, threshold=0.75, max_top=3, only=FINE),
    _any("only-the-first-top", "C1", p=np.array([[60, 60, 4, 4], [120, 4, 2, 2], [32, 32, 32, 32]]) / 128.0,
         threshold=0.9375, max_top=4),
    _any("two-classes", "C1", p=Draw("can/any2").distribution(9, 2), threshold=0.75, max_top=5),
    _any("more-than-classes", "C1", p=Draw("can/any3").distribution(9, 5), threshold=0.75, max_top=99, only=FINE),
    _prior("smoothed", "C1", labels=_labels, classes=7, smoothing=0.5),
    _prior("plain", "C1", labels=_labels, classes=7, smoothing=0.0),
    _prior("one-label", "C1", labels=np.array([3]), classes=5, smoothing=1.0),
    _prior("more-smoothing-than-labels", "C1", labels=np.array([1, 1, 4]), classes=6, smoothing=2.5),
    _prior("exact-sixteenths", "C1", exact=True, labels=Draw("can/16").integers(16, 0, 4), classes=6, smoothing=0.0),
    _prior("exact-smoothed", "C1", exact=True, labels=np.array([0, 2, 2, 2]), classes=4, smoothing=1.0),
    *_normalizations("alternating_normalization_loop"),
    *_batched(_normalizations("alternating_normalization")),
    _official("one-round", "C1", **_base),
    _official("alpha-2-two-rounds", "C1", **(_base | {"alpha": 2.0, "iterations": 2}), only=WIDE),
    _official("alpha-0.5-three-rounds", "C1", **(_base | {"alpha": 0.5, "iterations": 3}), only=("float64",)),
    _official("epsilon-decides", "C1", only=WIDE, **(_base | {"confident": _base["confident"] * [0, 1, 1, 0],
              "uncertain": _TINY})),
    _official("epsilon-decides-rows", "C1", only=WIDE, **(_base | {"prior": np.ldexp(_base["prior"], -30)})),
    _official("no-confident-rows", "C1", **(_base | {"confident": _base["confident"][:0]})),
    _official("zero-row-stays-zero", "C1", **(_base | {"uncertain": _base["uncertain"] * [[1], [0], [1]]}),
              only=("float64", "float32", "bfloat16")),
    _official("no-rounds", "C1", **(_base | {"iterations": 0})),
    _adjust("article", "C1 C2", p=_mixed, prior=_seven, top=3, threshold=0.90625, alpha=1.0, iterations=1,
            only=FINE),
    _adjust("not-normalised", "C1", p=0.5 * _mixed, prior=_seven, top=3, threshold=0.8125, alpha=1.0, iterations=1,
            only=FINE),
    _adjust("lower-threshold", "C2", p=_mixed, prior=_seven, top=2, threshold=0.5, alpha=0.5, iterations=1),
    _adjust("two-rounds", "C1", p=_mixed, prior=_seven, top=3, threshold=0.875, alpha=2.0, iterations=2, only=WIDE),
    _adjust("none-uncertain", "C1", p=_mixed, prior=_seven, top=3, threshold=1.5, alpha=1.0, iterations=1),
    _adjust("all-uncertain", "C2", p=_mixed[-5:], prior=_seven, top=3, threshold=-0.5, alpha=1.0, iterations=1),
    _adjust("two-classes-top-3", "C2", p=Draw("can/binary").distribution(11, 2), prior=np.array([0.25, 0.75]), top=3,
            threshold=0.78125, alpha=1.0, iterations=1),
    _adjust("31-classes", "C1", p=np.concatenate([_WIDE_ROWS[:, :31], np.eye(3, 31)]), prior=np.full(31, 0.25), top=3,
            threshold=0.90625, alpha=1.0, iterations=1),
    _adjust("zeros-inside-the-top", "C2", p=np.array([[64, 64, 0, 0], [128, 0, 0, 0], [100, 20, 8, 0]]) / 128.0,
            prior=np.full(4, 0.25), top=3, threshold=0.5, alpha=1.0, iterations=1),
)  # fmt: skip


# Laws.
def _row_error(out: Any) -> np.ndarray:
    return out.radius.sum(-1)


def equal_shares_are_one(implementation: Function, case: Case) -> None:
    """Equal probabilities have uncertainty 1 (renormalised), or min(top, k) / k of it (not renormalised)."""
    k = case["p"].shape[-1]
    out = run(implementation, case, p=np.full((2, k), 2.0**-3))[0]
    t = min(case["top"], k)
    share = 1.0 if case.op == "can.top_entropy" else t * 2.0**-3 * 3 * np.log(2) / np.log(k)
    close("equal_shares_are_one", case, out.value, np.full(2, share), out.radius + 2.0**-50)


def two_equal_leaders(implementation: Function, case: Case) -> None:
    """(1/2, 1/2, 0, ...) has uncertainty ln 2 / ln min(top, k), or ln 2 / ln k where nothing is renormalised."""
    k = case["p"].shape[-1]
    t = min(case["top"], k) if case.op == "can.top_entropy" else k
    p = np.zeros((2, k))
    p[0, :2], p[1, -2:] = 0.5, 0.5
    out = run(implementation, case, p=p)[0]
    close("two_equal_leaders", case, out.value, np.full(2, np.log(2) / np.log(t)), out.radius + 2.0**-50)


def nothing_known_is_one(implementation: Function, case: Case) -> None:
    """A row of zeros is wholly uncertain."""
    out = run(implementation, case, p=np.concatenate([0 * case["p"][:1], case["p"]]))[0]
    close("nothing_known_is_one", case, out.value[0], 1.0, out.radius[0] + 2.0**-50)


def entropy_does_not_see_class_order(implementation: Function, case: Case) -> None:
    """Reversing the classes changes nothing."""
    one, two = run(implementation, case)[0], run(implementation, case, p=case["p"][..., ::-1].copy())[0]
    close("entropy_does_not_see_class_order", case, two.value, one.value, one.radius + two.radius)


def probabilities_scaled_by_two(implementation: Function, case: Case) -> None:
    """Twice the probabilities: the same when renormalised, 2 u - 2 ln 2 (sum of the largest) / ln k when not."""
    one, two = run(implementation, case)[0], run(implementation, case, p=2 * case["p"])[0]
    expected, slack = one.value, one.radius + two.radius
    if case.op != "can.top_entropy":
        k = case["p"].shape[-1]
        largest = np.sort(case["p"], -1)[..., -min(case["top"], k) :].sum(-1)
        expected = 2 * one.value - 2 * np.log(2) * largest / np.log(k)
        slack = slack + one.radius + 2.0**-48
    close("probabilities_scaled_by_two", case, two.value, expected, slack)


def decision_is_monotone(implementation: Function, case: Case) -> None:
    """Every row reaches -1, none reaches 2, and a larger max_top never loses a row."""
    rows = case["p"].shape[0]
    close("decision_is_monotone", case, run(implementation, case, threshold=-1.0)[0].value, np.ones(rows), 0.0)
    close("decision_is_monotone", case, run(implementation, case, threshold=2.0)[0].value, np.zeros(rows), 0.0)
    few, many = run(implementation, case)[0], run(implementation, case, max_top=case["max_top"] + 1)[0]
    loss = np.where(np.isinf(few.radius + many.radius), 0.0, few.value * (1 - many.value))
    close("decision_is_monotone", case, loss, np.zeros(rows), 0.0)


def any_top_decides(implementation: Function, case: Case) -> None:
    """Two equal leaders with a tail are uncertain by top 2, one leader over three equal others by top 4 alone."""
    for max_top, first in ((2, 0.0), (3, 0.0), (4, 1.0), (9, 1.0)):
        out = run(implementation, case, p=_LAST_TOP, threshold=0.75, max_top=max_top)[0]
        close("any_top_decides", case, out.value, np.array([first, 1.0, 0.0]), out.radius)


def labels_in_any_order(implementation: Function, case: Case) -> None:
    """The prior does not see the order of the labels."""
    one, two = run(implementation, case)[0], run(implementation, case, labels=case["labels"][::-1].copy())[0]
    close("labels_in_any_order", case, two.value, one.value, one.radius + two.radius)


def label_by_label(implementation: Function, case: Case) -> None:
    """One label of class j: (1 + s) / (1 + k s) there and s / (1 + k s) elsewhere."""
    k, s = case["classes"], case["smoothing"]
    for j in (0, k - 1):
        out = run(implementation, case, labels=np.array([j]))[0]
        expected = (np.eye(k)[j] + s) / (1 + k * s)
        close("label_by_label", case, out.value, expected, out.radius + 2.0**-50)


def labels_repeated(implementation: Function, case: Case) -> None:
    """Twice the labels with twice the smoothing give the same prior."""
    one = run(implementation, case)[0]
    two = run(implementation, case, labels=np.tile(case["labels"], 2), smoothing=2 * case["smoothing"])[0]
    close("labels_repeated", case, two.value, one.value, one.radius + two.radius)


def no_confident_rows_give_the_prior(implementation: Function, case: Case) -> None:
    """Without confident rows: the prior on the support of b, for every alpha > 0 and every number of rounds."""
    alpha, rounds = case["alpha"] or 1.0, case["iterations"] or 1
    out = run(implementation, case, confident=case["confident"][:0], alpha=alpha, iterations=rounds)[0]
    expected = (case["uncertain"] > 0) * case["prior"]
    total = expected.sum(-1, keepdims=True)
    expected = np.where(total > 0, expected / np.where(total > 0, total, 1.0), case["uncertain"])
    close("no_confident_rows_give_the_prior", case, out.value, expected, out.radius + 2.0**-50)


def alpha_is_a_power(implementation: Function, case: Case) -> None:
    """One round with alpha = 2 is one round with alpha = 1 on the squares; with alpha = 0 it is the prior."""
    square = {"confident": case["confident"] ** 2, "uncertain": case["uncertain"] ** 2}
    two = run(implementation, case, alpha=2.0, iterations=1)[0]
    one = run(implementation, case, **square, alpha=1.0, iterations=1)[0]
    # A row that shares no class with the prior comes back as it was: the square of it here.
    shared = ((case["uncertain"] * case["prior"]).sum(-1) > 0)[:, None]
    slack = np.where(shared, one.radius + two.radius, np.inf)
    close("alpha_is_a_power", case, two.value, one.value, slack)
    none = run(implementation, case, alpha=0.0)[0]
    expected = np.broadcast_to(case["prior"] / case["prior"].sum(), none.value.shape)
    if case["iterations"]:
        close("alpha_is_a_power", case, none.value, expected, none.radius + 2.0**-50)


def rounds_compose(implementation: Function, case: Case) -> None:
    """Two rounds are one round on the stack after one round, each of whose rows is the last of some stack."""
    # With alpha = 1 a power that is left out of a round would not show.
    case = case.with_(alpha=2.0 if case["alpha"] == 1 else case["alpha"])
    stack = np.concatenate([case["confident"], case["uncertain"][:1]])
    after, error = [], 0.0
    for i in range(len(stack)):
        others = np.delete(stack, i, axis=0)
        out = run(implementation, case, confident=others, uncertain=stack[i : i + 1], iterations=1)[0]
        if not (stack[i] * case["prior"]).sum():
            return
        after.append(out.value)
        with np.errstate(divide="ignore", invalid="ignore"):
            error = max(error, float(np.where(out.value > 0, out.radius / out.value, out.radius > 0).max()))
    state = np.concatenate(after)
    if not np.isfinite(state).all() or error > 0.05 or (state < 0).any():
        return
    two = run(implementation, case, uncertain=stack[-1:], iterations=2)[0]
    one = run(implementation, case, confident=state[:-1], uncertain=state[-1:], iterations=1)[0]
    # The column step sees the state's error once, the row step both, and the entry itself: 4 alpha of it.
    carried = np.expm1(4 * case["alpha"] * -np.log1p(-error)) * one.value
    close("rounds_compose", case, two.value, one.value, one.radius + two.radius + carried)


def result_sums_to_one(implementation: Function, case: Case) -> None:
    """Every row that shares a class with the prior sums to one."""
    out = run(implementation, case, iterations=max(case["iterations"], 1), alpha=case["alpha"] or 1.0)[0]
    shared = (case["uncertain"] * case["prior"]).sum(-1) > 0
    slack = np.where(shared, _row_error(out), np.inf) + 2.0**-50
    close("result_sums_to_one", case, out.value.sum(-1), np.ones(len(shared)), slack)


def uncertain_rows_do_not_see_each_other(implementation: Function, case: Case) -> None:
    """Changing the last uncertain row leaves the others as they are."""
    changed = case["uncertain"].copy()
    changed[-1] = np.roll(changed[-1], 1) * 2
    one, two = run(implementation, case)[0], run(implementation, case, uncertain=changed)[0]
    slack = (one.radius + two.radius)[:-1]
    close("uncertain_rows_do_not_see_each_other", case, two.value[:-1], one.value[:-1], slack)


def fixed_point(implementation: Function, case: Case) -> None:
    """Where the prior is C's column sums plus b, one round with alpha = 1 returns b / sum b."""
    b = case["uncertain"][:1]
    out = run(implementation, case, uncertain=b, prior=case["confident"].sum(0) + b[0], alpha=1.0, iterations=1)[0]
    expected = b / b.sum() if b.sum() else b
    close("fixed_point", case, out.value, expected, out.radius + 2.0**-50)


def prior_has_no_scale(implementation: Function, case: Case) -> None:
    """Four times the prior gives the same."""
    one, two = run(implementation, case)[0], run(implementation, case, prior=4 * case["prior"])[0]
    close("prior_has_no_scale", case, two.value, one.value, one.radius + two.radius)


def unseen_class_takes_all(implementation: Function, case: Case) -> None:
    """One round: where no confident row has a class, the size of b_j does not matter."""
    confident, b = case["confident"].copy(), case["uncertain"].copy()
    confident[:, 0], b[:, 0] = 0.0, 0.5
    # Far below an epsilon of 1e-10, as far as the storage format reaches.
    tiny = 2.0**-2 if case.profile.dtype == "float16" else 2.0**-40
    small = b * np.where(np.arange(b.shape[1]) == 0, tiny, 1.0)
    rounds = {"confident": confident, "iterations": 1}
    one, two = (
        run(implementation, case, **rounds, uncertain=b)[0],
        run(implementation, case, **rounds, uncertain=small)[0],
    )
    lost = ((b * case["prior"]).sum(-1) == 0)[:, None]
    slack = np.where(lost, np.inf, one.radius + two.radius)
    close("unseen_class_takes_all", case, two.value, one.value, slack)


def nothing_in_common_with_the_prior(implementation: Function, case: Case) -> None:
    """A row whose classes the prior excludes comes back as it was."""
    b, prior = case["uncertain"].copy(), np.zeros_like(case["prior"])
    b[:, 0], prior[0] = 0.0, 1.0
    out = run(implementation, case, uncertain=b, prior=prior, alpha=case["alpha"] or 1.0)[0]
    equal("nothing_in_common_with_the_prior", case, out.value, b)


def confident_rows_in_any_order(implementation: Function, case: Case) -> None:
    """Reversing the confident rows changes nothing."""
    one, two = run(implementation, case)[0], run(implementation, case, confident=case["confident"][::-1].copy())[0]
    close("confident_rows_in_any_order", case, two.value, one.value, one.radius + two.radius)


def no_rounds_is_the_identity(implementation: Function, case: Case) -> None:
    """Zero iterations return the uncertain rows, bit for bit."""
    equal("no_rounds_is_the_identity", case, run(implementation, case, iterations=0)[0].value, case["uncertain"])


def both_epsilons(implementation: Function, case: Case) -> None:
    """Without confident rows and with alpha = 1: q b / (b + 1e-10), divided by its sum + 1e-10."""
    if case.profile.dtype == "float16":
        # It holds nothing near 1e-10.
        return
    b = np.ldexp(case["uncertain"], -34)
    for prior in (case["prior"], np.ldexp(case["prior"], -34)):
        changes = {"confident": case["confident"][:0], "uncertain": b, "prior": prior, "alpha": 1.0, "iterations": 1}
        out = run(implementation, case, **changes)[0]
        rounded = case.with_(**changes)
        y = rounded["prior"] * rounded["uncertain"] / (rounded["uncertain"] + 1e-10)
        close("both_epsilons", case, out.value, y / (y.sum(-1, keepdims=True) + 1e-10), out.radius + 2.0**-48)


def confident_rows_stay(implementation: Function, case: Case) -> None:
    """A threshold nobody reaches returns everything; otherwise the rows not reached come back bit for bit."""
    none = run(implementation, case, threshold=1.5)
    equal("confident_rows_stay", case, none[0].value, case["p"])
    equal("confident_rows_stay", case, none[1].value, np.zeros(len(case["p"])))
    some = run(implementation, case)
    if np.isfinite(some[1].radius).all():
        kept = some[1].value == 0
        equal("confident_rows_stay", case, some[0].value[kept], case["p"][kept])


def certain_rows_are_the_reference(implementation: Function, case: Case) -> None:
    """One-hot rows are confident and an even row is not: it becomes q b / (c + b), to sum one, in one round."""
    k = case["p"].shape[-1]
    p = np.concatenate([np.eye(k)[:2], np.eye(k)[:1], np.full((1, k), 0.25), np.eye(k)[:1]])
    out = run(implementation, case, p=p, threshold=0.75, alpha=1.0, iterations=1)
    counts = np.eye(k)[0] * 3 + np.eye(k)[1]
    y = case["prior"] * 0.25 / (counts + 0.25)
    expected = p.copy()
    expected[3] = y / y.sum()
    close("certain_rows_are_the_reference", case, out[1].value, np.array([0.0, 0, 0, 1, 0]), 0.0)
    close("certain_rows_are_the_reference", case, out[0].value, expected, out[0].radius + 2.0**-50)


def all_uncertain_give_the_prior(implementation: Function, case: Case) -> None:
    """A threshold everybody reaches leaves no reference: the prior on the support of every row."""
    p = np.where(case["p"].sum(-1, keepdims=True) > 0, case["p"], 0.25)
    out = run(implementation, case, p=p, threshold=-1.0, iterations=1, alpha=1.0)
    expected = (p > 0) * case["prior"]
    close("all_uncertain_give_the_prior", case, out[1].value, np.ones(len(p)), 0.0)
    slack = out[0].radius + 2.0**-50
    close("all_uncertain_give_the_prior", case, out[0].value, expected / expected.sum(-1, keepdims=True), slack)


_ENTROPIES = ("can.top_entropy", "can.top_entropy_unnormalized")
LAWS = (
    Law(equal_shares_are_one, _ENTROPIES, ("C1",)),
    Law(two_equal_leaders, _ENTROPIES, ("C1", "C2")),
    Law(nothing_known_is_one, ("can.top_entropy",), ("C4",)),
    Law(entropy_does_not_see_class_order, _ENTROPIES),
    Law(probabilities_scaled_by_two, _ENTROPIES, ("C1",)),
    Law(decision_is_monotone, ("can.ambiguous_any",)),
    Law(any_top_decides, ("can.ambiguous_any",), ("C1",)),
    Law(labels_in_any_order, ("can.class_prior",)),
    Law(label_by_label, ("can.class_prior",), ("C1",)),
    Law(labels_repeated, ("can.class_prior",), ("C1",)),
    Law(no_confident_rows_give_the_prior, _FORMS),
    Law(alpha_is_a_power, _FORMS),
    Law(rounds_compose, _FORMS),
    Law(result_sums_to_one, _FORMS),
    Law(uncertain_rows_do_not_see_each_other, _ALL_FORMS, ("C1",)),
    Law(fixed_point, _FORMS),
    Law(prior_has_no_scale, _FORMS),
    Law(unseen_class_takes_all, _FORMS),
    Law(nothing_in_common_with_the_prior, _FORMS[:1], ("C5",)),
    Law(nothing_in_common_with_the_prior, _FORMS[1:]),
    Law(confident_rows_in_any_order, _ALL_FORMS),
    Law(no_rounds_is_the_identity, _ALL_FORMS),
    Law(both_epsilons, ("can.alternating_normalization_official",), ("C1",)),
    Law(confident_rows_stay, ("can.adjust",), ("C1",)),
    Law(certain_rows_are_the_reference, ("can.adjust",), ("C2",)),
    Law(all_uncertain_give_the_prior, ("can.adjust",), ("C2",)),
)


def strategy(function: str, profile: Profile) -> st.SearchStrategy[Case]:
    """Rows of four-bit shares (their squares are exact everywhere), zeros among them; priors with a zero class."""
    op = f"can.{function}"
    rows, classes = st.integers(1, 3), st.integers(2, 5)
    if function == "class_prior":
        return drawn(
            op, profile,
            lambda draw, n, classes, smoothing: {
                "labels": draw.integers(n, 0, classes - 1), "classes": classes, "smoothing": smoothing
            },
            n=st.integers(1, 9), classes=classes, smoothing=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
        )  # fmt: skip
    if function in ("top_entropy", "top_entropy_unnormalized", "ambiguous_any"):

        def shares(draw: Draw, rows: int, classes: int, **rest: Any) -> dict:
            return {"p": draw.grid(rows, classes, low=0, high=15, exponent=-5), **rest}

        if function == "ambiguous_any":
            return drawn(op, profile, shares, rows=rows, classes=classes, max_top=st.integers(2, 6),
                         threshold=st.sampled_from([0.5, 0.875]))  # fmt: skip
        return drawn(op, profile, shares, rows=rows, classes=classes, top=st.integers(2, 6))

    def stack(draw: Draw, n: int, rows: int, classes: int, hole: bool, **rest: Any) -> dict:
        prior = draw.grid(classes, low=1, high=15, exponent=-4)
        prior[-1] *= not hole
        return {
            "confident": draw.grid(n, classes, low=0, high=15, exponent=-4),
            "uncertain": draw.grid(rows, classes, low=0, high=15, exponent=-4),
            "prior": prior,
            **rest,
        }

    shapes = {"n": st.integers(0, 4), "classes": classes, "hole": st.booleans()}
    rest = {"alpha": st.sampled_from([0.5, 1.0, 2.0]), "iterations": st.integers(0, 3)}
    if function != "adjust":
        return drawn(op, profile, stack, rows=rows, **shapes, **rest)

    def whole(draw: Draw, n: int, classes: int, **rest: Any) -> dict:
        made = stack(draw, n, 2, classes, False)
        return {"p": np.concatenate([made["confident"], made["uncertain"]]), "prior": made["prior"], **rest}

    return drawn(op, profile, whole, n=st.integers(0, 4), classes=classes, top=st.integers(2, 4),
                 threshold=st.sampled_from([0.5, 0.875]), **rest)  # fmt: skip


# Mutants: one change each in a plain loop.
def _mutant_loop(
    confident, uncertain, prior, alpha, iterations, *, power_first=True, use_prior=True, rows_last=True, joint=False,
    frozen=False, once=False, epsilon=0.0, keep=True, carry=False, prior_before=False, own=True, reciprocal=False,
    normalised_b=False,
):  # fmt: skip
    def divide(x, y):
        return np.divide(x, y + epsilon, out=np.zeros_like(x), where=np.broadcast_to(y + epsilon != 0, x.shape))

    results = [uncertain[:0]]
    memory = confident
    for i in range(len(uncertain)):
        b = uncertain if joint else uncertain[i : i + 1]
        y = np.concatenate([memory if carry else confident, b])
        for t in range(iterations):
            exponent = 1 / alpha if reciprocal and alpha else alpha
            if power_first and not (once and t > 0):
                y = y**exponent
            top = (confident**alpha if frozen else y[: len(confident)]).sum(0)
            mine = y[len(confident) :].sum(0) if own else 0
            if prior_before:
                y = divide(y * prior, (y * prior).sum(0))
            else:
                y = divide(y, top + mine)
            if not power_first:
                y = y**exponent
            if use_prior and not prior_before:
                y = y * prior
            if rows_last or t < iterations - 1:
                y = divide(y, y.sum(1, keepdims=True))
            if normalised_b:
                y[:-1] = confident
        memory = y[: len(confident)]
        last = y[len(confident) + (i if joint else 0)]
        results.append(uncertain[i : i + 1] if keep and last.sum() == 0 else last[None])
    return np.concatenate(results)


def _columns_last(confident, uncertain, prior, alpha, iterations):
    rows = []
    for b in uncertain:
        y = np.concatenate([confident, b[None]])
        for _ in range(iterations):
            y = y**alpha
            y = y / np.maximum(y.sum(1, keepdims=True), 1e-300)
            y = y / np.maximum(y.sum(0), 1e-300) * prior
        rows.append(y[-1])
    return np.array(rows).reshape(uncertain.shape)


def _without_first_row(confident, uncertain, prior, alpha, iterations):
    return can.alternating_normalization_loop(confident[1:], uncertain, prior, alpha=alpha, iterations=iterations)


def _fewer_rounds(confident, uncertain, prior, alpha, iterations):
    rounds = max(iterations - 1, 0)
    return can.alternating_normalization_loop(confident, uncertain, prior, alpha=alpha, iterations=rounds)


def _uniform_prior(confident, uncertain, prior, alpha, iterations):
    return can.alternating_normalization_loop(
        confident, uncertain, (prior > 0) * 1.0, alpha=alpha, iterations=iterations
    )


def _iterated_formula(confident, uncertain, prior, alpha, iterations):
    c, y = (confident**alpha).sum(0), uncertain
    for _ in range(iterations):
        z = y**alpha
        z = prior * np.divide(z, c + z, out=np.zeros_like(z), where=c + z > 0)
        total = z.sum(1, keepdims=True)
        y = np.divide(z, total, out=uncertain.copy(), where=np.broadcast_to(total > 0, z.shape))
    return y


_LOOPS = (
    ("the power comes after the columns", partial(_mutant_loop, power_first=False)),
    ("the power is 1 / alpha", partial(_mutant_loop, reciprocal=True)),
    ("the power is taken in the first round only", partial(_mutant_loop, once=True)),
    ("the prior is left out", partial(_mutant_loop, use_prior=False)),
    ("the prior multiplies before the columns, which divide it away", partial(_mutant_loop, prior_before=True)),
    ("rows are not normalised in the last round", partial(_mutant_loop, rows_last=False)),
    ("all uncertain rows are normalised jointly", partial(_mutant_loop, joint=True)),
    ("confident rows are not restored for the next uncertain row", partial(_mutant_loop, carry=True)),
    ("column sums leave out b", partial(_mutant_loop, own=False)),
    ("1e-4 is added to the sums", partial(_mutant_loop, epsilon=1e-4)),
    ("a row without a class in common with the prior becomes zeros", partial(_mutant_loop, keep=False)),
    ("rows before columns", _columns_last),
    ("the first confident row is left out", _without_first_row),
    ("one round too few", _fewer_rounds),
    ("a uniform prior on its support", _uniform_prior),
    ("the one-round formula iterated with the column sums of the first", _iterated_formula),
    ("confident rows are reset in every round", partial(_mutant_loop, normalised_b=True)),
)


def _entropy(p, top, *, clamp=True, base=None, renormalize=True, smallest=False, guard=True, shift=0):
    k = p.shape[-1]
    t = min(top + shift, k)
    v = np.sort(p, -1)
    v = v[..., :t] if smallest else v[..., -t:]
    v = v / v.sum(-1, keepdims=True) if renormalize else v
    terms = v * np.log(np.where(v > 0, v, 1.0)) if guard else v * np.log(v)
    return -terms.sum(-1) / np.log({"t": t if clamp else top, "k": k, "2": 2, "e": np.e}[base or "t"])


def _zeros_count_as_one(p, top, **options):
    u = _entropy(p, top, **options)
    return np.where(p.sum(-1) == 0, 1.0, u)


def _any_with(p, threshold, max_top, *, low=2, high=1, strict=False, last_only=False, every=False, fixed=0):
    k = p.shape[-1]
    tops = range(max(low, 2), min(max_top, k) + high) or [2]
    u = np.stack([can.top_entropy(p, top=t) for t in (list(tops)[-1:] if last_only else tops)])
    if fixed:
        u = u * 0 + can.top_entropy_unnormalized(p, top=max_top)
    reached = u > threshold if strict else u >= threshold
    return reached.all(0) if every else reached.any(0)


def _prior_with(labels, classes, smoothing, *, divisor=1.0, only_seen=False, minus=0):
    counts = np.bincount(labels, minlength=classes).astype(float)
    top = counts + smoothing * (counts > 0 if only_seen else 1)
    return top / (len(labels) - minus + smoothing * classes * divisor)


def _official_with(confident, uncertain, prior, alpha, iterations, *, column=1e-10, row=1e-10, outside=False):
    rows = [uncertain[:0]]
    for b in uncertain:
        y = np.concatenate([confident, b[None]])
        for _ in range(iterations):
            y = y**alpha
            y = y / (np.maximum(y.sum(0), column) if outside else y.sum(0) + column) * prior
            y = y / (y.sum(1, keepdims=True) + row)
        rows.append(y[-1:])
    return np.concatenate(rows)


def _adjust_with(
    p, prior, top, threshold, alpha, iterations, *, below=False, every=False, all_rows=False, scaled=False
):
    u = can.top_entropy(p, top=top)
    low = u <= threshold if below else u >= threshold
    out = p.copy()
    if scaled:
        out = out / np.maximum(out.sum(1, keepdims=True), 1e-300)
    reference = p if all_rows else p[~low]
    for i in np.flatnonzero(low):
        rest = np.delete(p, i, axis=0) if every else reference
        out[i] = can.alternating_normalization_loop(rest, p[i : i + 1], prior, alpha=alpha, iterations=iterations)[0]
    return out, low


def _unclamped_adjust(p, prior, top, threshold, alpha, iterations):
    return _adjust_by(p, prior, _entropy(p, top, clamp=False), threshold, alpha, iterations)


def _nan_adjust(p, prior, top, threshold, alpha, iterations):
    u = _entropy(p, top, guard=False)
    confident, low = p[u < threshold], u >= threshold
    out = p.copy()
    out[low] = can.alternating_normalization_loop(confident, p[low], prior, alpha=alpha, iterations=iterations)
    return out, low


def _adjust_by(p, prior, u, threshold, alpha, iterations):
    low = u >= threshold
    out = p.copy()
    out[low] = can.alternating_normalization_loop(p[~low], p[low], prior, alpha=alpha, iterations=iterations)
    return out, low


MUTANTS = (
    *(Mutant(op, bug, call) for op in _FORMS for bug, call in _LOOPS),
    Mutant("can.top_entropy", "divided by ln k", partial(_zeros_count_as_one, base="k")),
    Mutant("can.top_entropy", "natural logarithm, not divided", partial(_zeros_count_as_one, base="e")),
    Mutant("can.top_entropy", "in bits", partial(_zeros_count_as_one, base="2")),
    Mutant("can.top_entropy", "not renormalised", partial(_zeros_count_as_one, renormalize=False)),
    Mutant("can.top_entropy", "the smallest probabilities", partial(_zeros_count_as_one, smallest=True)),
    Mutant("can.top_entropy", "one class too many", partial(_zeros_count_as_one, shift=1)),
    Mutant("can.top_entropy", "a row of zeros is certain", lambda p, top: np.nan_to_num(_entropy(p, top))),
    Mutant("can.top_entropy_unnormalized", "renormalised", partial(_entropy, base="k")),
    Mutant("can.top_entropy_unnormalized", "divided by ln top", partial(_entropy, renormalize=False)),
    Mutant("can.top_entropy_unnormalized", "all classes",
           lambda p, top: _entropy(p, p.shape[-1], renormalize=False, base="k")),
    Mutant("can.ambiguous_any", "upper end excluded", partial(_any_with, high=0)),
    Mutant("can.ambiguous_any", "only max_top is tried", partial(_any_with, last_only=True)),
    Mutant("can.ambiguous_any", "every top must reach the threshold", partial(_any_with, every=True)),
    Mutant("can.ambiguous_any", "starts at three", partial(_any_with, low=3)),
    Mutant("can.ambiguous_any", "the paper's measure instead of the code's", partial(_any_with, fixed=1)),
    Mutant("can.class_prior", "smoothing not counted in the divisor", partial(_prior_with, divisor=0.0)),
    Mutant("can.class_prior", "smoothing only of the classes seen", partial(_prior_with, only_seen=True)),
    Mutant("can.class_prior", "divided by n - 1", partial(_prior_with, minus=1)),
    Mutant("can.class_prior", "uniform", lambda labels, classes, smoothing: np.full(classes, 1 / classes)),
    Mutant("can.alternating_normalization_official", "no epsilon in the columns", partial(_official_with, column=0.0)),
    Mutant("can.alternating_normalization_official", "no epsilon in the rows", partial(_official_with, row=0.0)),
    Mutant("can.alternating_normalization_official", "epsilon 1e-8", partial(_official_with, column=1e-8, row=1e-8)),
    Mutant("can.alternating_normalization_official", "the larger of sum and epsilon",
           partial(_official_with, outside=True)),
    Mutant("can.adjust", "low uncertainty is adjusted", partial(_adjust_with, below=True)),
    Mutant("can.adjust", "every other row is the reference", partial(_adjust_with, every=True)),
    Mutant("can.adjust", "the row itself is in the reference", partial(_adjust_with, all_rows=True)),
    Mutant("can.adjust", "confident rows are normalised too", partial(_adjust_with, scaled=True)),
)  # fmt: skip

_ARTICLE = "https://kexue.fm/archives/8728"
_CODE = "https://github.com/KMnP/can"
MUSEUM = (
    Mutant("can.top_entropy", "k not clamped: two classes never reach 1",
           partial(_zeros_count_as_one, clamp=False), _ARTICLE),
    Mutant("can.top_entropy", "0 ln 0 gives NaN", partial(_zeros_count_as_one, guard=False), _ARTICLE),
    Mutant("can.adjust", "k not clamped: nothing of two classes is uncertain", _unclamped_adjust, _ARTICLE),
    Mutant("can.adjust", "a zero among the leaders: the row leaves both sets", _nan_adjust, _ARTICLE),
    Mutant("can.alternating_normalization", "1e-10 is added: an unseen class loses a tiny b_j",
           can.alternating_normalization_official, _CODE),
    Mutant("can.alternating_normalization_loop", "1e-10 is added: an unseen class loses a tiny b_j",
           can.alternating_normalization_official, _CODE),
)  # fmt: skip
