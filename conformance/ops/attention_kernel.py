"""Judging attention_kernel: every mask, length and constant on which implementations disagree."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from hypothesis import strategies as st

from conformance.budget import MP, Arithmetic, Ball, Profile, erf, log, relu, round_to, sqrt, where
from conformance.budget import softmax as normalised
from conformance.case import SPEC, Case, Function, Operator, Package
from conformance.generate import Draw, drawn
from conformance.law import Law, LawFailed, close, equal, run
from conformance.mutant import Mutant
from refimpl.ops import attention_kernel as spec

Mask = np.ndarray | None


# References.
def visible(mask: Mask, shape: tuple[int, ...]) -> np.ndarray:
    """The mask written out."""
    return np.ones(shape, dtype=bool) if mask is None else np.broadcast_to(mask, shape)


def softmax(a: Arithmetic, scores: Ball, mask: Mask) -> Ball:
    """exp(scores) over its sum, both over visible keys."""
    return normalised(scores, visible(mask, scores.shape))


def softmax_plus(a: Arithmetic, scores: Ball, mask: Mask, n_min: int) -> Ball:
    """softmax(scores ln max(n, n_min) / ln 512), n counted row by row."""
    seen = visible(mask, scores.shape)
    n = seen.sum(-1, keepdims=True).clip(min=n_min).astype(np.float64)
    return normalised(scores * (log(a.exact(n)) / log(a.exact(512.0))), seen)


def _squared_relu(a: Arithmetic, scores: Ball, mask: Mask, length: Any) -> Ball:
    positive = relu(scores)
    # Dividing before the square, by the root of the length on either side, rounds five times more.
    divided = (positive * positive / a.exact(length)).rounded(5)
    return where(visible(mask, scores.shape), divided, a.exact(0.0))


def squared_relu_visible(a: Arithmetic, scores: Ball, mask: Mask) -> Ball:
    """relu(scores)^2 over the number of visible keys."""
    n = visible(mask, scores.shape).sum(-1, keepdims=True).clip(min=1)
    return _squared_relu(a, scores, mask, n.astype(np.float64))


def squared_relu_array(a: Arithmetic, scores: Ball, mask: Mask) -> Ball:
    """relu(scores)^2 over the length of the key axis."""
    return _squared_relu(a, scores, mask, float(scores.shape[-1]))


def squared_relu_constant(a: Arithmetic, scores: Ball, mask: Mask, length: int) -> Ball:
    """relu(scores)^2 over a constant."""
    return _squared_relu(a, scores, mask, float(length))


def laplace(a: Arithmetic, scores: Ball, mask: Mask) -> Ball:
    """(1 + erf((scores - sqrt(1/2)) / (sqrt(1/(4 pi)) sqrt(2)))) / 2, then the mask."""
    pi = a.exact(np.asarray(+MP.pi, dtype=object) if a.digits else np.pi)
    mean, scale = sqrt(a.exact(0.5)), sqrt(2.0 / (4.0 * pi))
    return where(visible(mask, scores.shape), (erf((scores - mean) / scale) + 1.0) * 0.5, a.exact(0.0))


# Names by which a case of another family asks for a kernel: the function's, with its parameter behind it.
REFERENCES: dict[str, Callable[[Arithmetic, Ball, Mask], Ball]] = {
    "softmax": softmax,
    "softmax_plus_1": partial(softmax_plus, n_min=1),
    "softmax_plus_16": partial(softmax_plus, n_min=16),
    "squared_relu_visible": squared_relu_visible,
    "squared_relu_1": partial(squared_relu_constant, length=1),
    "laplace": laplace,
}


def kernels(of: Package) -> dict[str, Callable[..., Any]]:
    """The kernels that a case may name."""
    family = of.attention_kernel
    return {
        "softmax": family.softmax,
        "softmax_plus_1": partial(family.softmax_plus, n_min=1),
        "softmax_plus_16": partial(family.softmax_plus, n_min=16),
        "squared_relu_visible": family.squared_relu_visible,
        "squared_relu_1": partial(family.squared_relu_constant, length=1),
        "laplace": family.laplace,
    }


KERNELS = kernels(SPEC)

_SQUARED = ("squared_relu_visible", "squared_relu_array", "squared_relu_constant")
_NORMALISED = ("softmax", "softmax_plus")
_ALL = (*_NORMALISED, *_SQUARED, "laplace")

OPERATORS = tuple(
    Operator(f"attention_kernel.{name}", getattr(spec, name), reference, multilinear=name in _SQUARED)
    for name, reference in (
        ("softmax", softmax),
        ("softmax_plus", softmax_plus),
        ("squared_relu_visible", squared_relu_visible),
        ("squared_relu_array", squared_relu_array),
        ("squared_relu_constant", squared_relu_constant),
        ("laplace", laplace),
    )
)


# Cases.
def _case(function: str, name: str, clauses: str, **arguments: Any) -> Case:
    options = {k: arguments.pop(k) for k in ("exact", "note") if k in arguments}
    return Case(f"attention_kernel.{function}", name, arguments, tuple(clauses.split()), **options)


def counts(*numbers: int, keys: int) -> np.ndarray:
    """One mask row per number: that many visible keys, at the start."""
    return np.arange(keys) < np.array(numbers)[:, None]


def poisoned(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Large scores where nothing may be seen."""
    return np.where(np.broadcast_to(mask, scores.shape), scores, 1024.0)


def _shared(function: str, clauses: str, **options: Any) -> list[Case]:
    """What every kernel is asked."""
    draw = Draw(f"attention_kernel/{function}")
    full = draw.mask(2, 3, 7, keep=0.6)
    full[0, 1], full[1, 2], full[1, 0] = False, np.arange(7) == 4, True
    grid = draw.grid(2, 3, 7, exponent=-5)
    keys = counts(2, 5, keys=7)[:, None, :]
    make = partial(_case, function)
    return [
        make("rows-of-every-kind", clauses, scores=poisoned(grid, full), mask=full, **options,
             note="a row without a visible key, one with a single key, one with all"),
        make("keys-masked", clauses, scores=poisoned(draw.grid(2, 3, 7, exponent=-5), keys), mask=keys, **options,
             note="a mask (b, 1, m) counts as (b, n, m)"),
        make("rows-masked", clauses, scores=draw.grid(2, 3, 5, exponent=-5), mask=draw.mask(2, 3, 1, keep=0.5) |
             np.array([[[False], [True], [False]], [[True], [False], [False]]]), **options,
             note="a mask (b, n, 1) counts the keys it spans"),
        make("no-mask", clauses, scores=draw.grid(3, 5, exponent=-5), mask=None, **options,
             note="more keys than queries, none hidden"),
        make("dense", clauses, scores=4 * draw.dense(2, 11), mask=draw.mask(2, 11), **options,
             note="24-bit scores: inputs rounded to 16 bits show"),
        make("dense-53", clauses, scores=4 * draw.dense(2, 7, bits=53), mask=None, **options),
    ]  # fmt: skip


def _shifted(function: str, clauses: str, **options: Any) -> list[Case]:
    """Scores that overflow an exponential unless the largest visible one is subtracted."""
    draw = Draw(f"attention_kernel/{function}/large")
    mask = counts(5, 2, keys=5)
    close_by = draw.grid(2, 5, low=119, high=127, exponent=0)
    return [
        _case(function, "above-88", clauses, scores=poisoned(close_by, mask), mask=mask, **options,
              note="exp overflows float32 from 88.7; the masked scores are larger still"),
        _case(function, "below-minus-88", clauses, scores=-draw.grid(2, 5, low=119, high=127, exponent=0), mask=mask,
              **options, note="every exponential underflows in float32"),
        _case(function, "hundreds-apart", clauses, scores=draw.dense(3, 5, exponent=10), mask=None, **options,
              note="standard deviation 590: exp overflows float64"),
    ]  # fmt: skip


def _plus_cases() -> list[Case]:
    draw = Draw("attention_kernel/softmax_plus/lengths")
    make = partial(_case, "softmax_plus")
    lengths = counts(1, 2, 8, 15, 16, 17, 0, keys=17)
    found = [
        make(f"floor-{n_min}", "C1 C2 C3 C4", n_min=n_min, mask=lengths,
             scores=poisoned(draw.grid(7, 17, exponent=-6), lengths), note="1, 2, 8, 15, 16, 17 and 0 visible keys")
        for n_min in (1, 2, 16)
    ]  # fmt: skip
    scores = draw.dense(1, 520, exponent=2)
    mask = np.arange(520) < 512
    return [
        *found,
        make("one-key", "C2", n_min=1, scores=poisoned(draw.grid(3, 5, exponent=-4), np.eye(3, 5, dtype=bool)),
             mask=np.eye(3, 5, dtype=bool), note="ln 1 = 0 must not bring masked keys back"),
        make("at-512", "C3", n_min=16, scores=np.where(mask, scores, 1024.0), mask=mask, note="here it is softmax"),
    ]  # fmt: skip


def _exact_squares(function: str, clauses: str, **options: Any) -> list[Case]:
    """Lengths that are powers of 4, so that dividing before the square, after it or by a root gives one number."""
    draw = Draw(f"attention_kernel/{function}/exact")
    by_array = function == "squared_relu_array"
    lengths = (16, 4, 1) if not by_array else (16, 13, 5)
    mask = counts(*lengths, 0, keys=16)
    batch = np.stack([counts(4, keys=4), counts(1, keys=4)])
    some = draw.permutation(16) < 4
    make = partial(_case, function, clauses=clauses, exact=True, **options)
    return [
        make(name="exact-lengths", scores=poisoned(draw.grid(4, 16, exponent=-3), mask), mask=mask),
        make(name="exact-no-mask", scores=draw.grid(3, 4, exponent=-2), mask=None),
        make(name="exact-sixteen", scores=draw.grid(2, 3, 16, low=-15, high=15, exponent=-1), mask=None),
        make(name="exact-keys-masked", scores=poisoned(draw.ternary(2, 3, 4, exponent=2), batch), mask=batch),
        make(name="exact-scattered", scores=poisoned(draw.grid(5, 16, low=-63, high=63, exponent=-4), some), mask=some),
    ]


def _tiny(function: str, **options: Any) -> Case:
    draw = Draw(f"attention_kernel/{function}/tiny")
    scores = np.concatenate([draw.grid(2, 4, exponent=-17), draw.grid(2, 3, exponent=-9)], axis=-1)
    return _case(function, "tiny", "", scores=scores, mask=None, **options, note="squares underflow in float16")


CASES = (
    *_shared("softmax", "C1 C3"),
    *_shifted("softmax", "C2"),
    *_shared("softmax_plus", "C1 C2 C3 C4", n_min=2),
    *_shifted("softmax_plus", "C2", n_min=16),
    *_plus_cases(),
    *_shared("squared_relu_visible", "C1 C2 C3"),
    *_exact_squares("squared_relu_visible", "C1 C2 C3"),
    _tiny("squared_relu_visible"),
    *_shared("squared_relu_array", "C1 C2"),
    *_exact_squares("squared_relu_array", "C1 C2"),
    _tiny("squared_relu_array"),
    *_shared("squared_relu_constant", "C1 C2", length=512),
    *_exact_squares("squared_relu_constant", "C1 C2", length=64),
    _tiny("squared_relu_constant", length=3),
    *_shared("laplace", "C1 C2 C3"),
    _case("laplace", "zeros", "C1", scores=np.array([[0.0, 0, 0, 1], [1, 0, 0, 0]]), mask=counts(4, 2, keys=4),
          note="laplace(0) is 0.0061"),
    _case("laplace", "tails", "C2", scores=np.array([[-64.0, -4, -2, -1, -0.5, 0.5, 0.703125, 1, 2, 4, 64]]),
          mask=None),
)  # fmt: skip


# Laws.
def _mask_of(case: Case) -> np.ndarray:
    return visible(case["mask"], case["scores"].shape)


def masked_scores_do_not_matter(implementation: Function, case: Case) -> None:
    """Changing masked scores changes nothing, bit for bit, and their weights are exactly 0."""
    mask = _mask_of(case)
    before = run(implementation, case)[0].value
    for poison in (100.0, -100.0):
        after = run(implementation, case, scores=np.where(mask, case["scores"], poison))[0].value
        equal("masked_scores_do_not_matter", case, after, before)
    equal("masked_scores_do_not_matter", case, np.where(mask, 0.0, before), np.zeros(mask.shape))


def a_broadcast_mask_is_the_mask_written_out(implementation: Function, case: Case) -> None:
    """A mask with axes of length 1, or none at all, gives what the same mask gives when it is written out."""
    one, two = run(implementation, case)[0], run(implementation, case, mask=_mask_of(case).copy())[0]
    close("a_broadcast_mask_is_the_mask_written_out", case, two.value, one.value, one.radius + two.radius)


def _padded(case: Case) -> dict[str, np.ndarray]:
    scores, mask = case["scores"], _mask_of(case)
    lead = (*scores.shape[:-1], 3)
    return {
        "scores": np.concatenate([np.full(lead, 50.0), scores, np.full(lead, 60.0)], axis=-1),
        "mask": np.concatenate([np.zeros(lead, bool), mask, np.zeros(lead, bool)], axis=-1),
    }


def masked_keys_may_be_added(implementation: Function, case: Case) -> None:
    """Three masked keys on either side change no weight: padding does not count."""
    one, two = run(implementation, case)[0], run(implementation, case, **_padded(case))[0]
    inner = two.value[..., 3:-3], two.radius[..., 3:-3]
    close("masked_keys_may_be_added", case, inner[0], one.value, one.radius + inner[1])


def masked_keys_dilute(implementation: Function, case: Case) -> None:
    """Six masked keys scale the weights by m / (m + 6): the length is that of the array."""
    m = case["scores"].shape[-1]
    one, two = run(implementation, case)[0], run(implementation, case, **_padded(case))[0]
    back = (m + 6) / m
    radius = one.radius + back * two.radius[..., 3:-3] + 2.0**-50 * np.abs(one.value)
    close("masked_keys_dilute", case, back * two.value[..., 3:-3], one.value, radius)


def rows_sum_to_one(implementation: Function, case: Case) -> None:
    """Rows with a visible key sum to 1, rows without to 0."""
    out = run(implementation, case)[0]
    expected = _mask_of(case).any(-1).astype(np.float64)
    tolerance = out.radius.sum(-1) + 2.0**-50 * out.value.shape[-1]
    close("rows_sum_to_one", case, out.value.sum(-1), expected, tolerance)


def a_fully_masked_row_is_zero(implementation: Function, case: Case) -> None:
    """A row that sees nothing is exactly 0, and the other rows stay as they are."""
    mask = _mask_of(case).copy()
    mask[..., 0, :] = False
    out = run(implementation, case, mask=mask)[0].value
    equal("a_fully_masked_row_is_zero", case, out[..., 0, :], np.zeros(out[..., 0, :].shape))
    before = run(implementation, case, mask=_mask_of(case).copy())[0].value
    equal("a_fully_masked_row_is_zero", case, out[..., 1:, :], before[..., 1:, :])


def rows_are_independent(implementation: Function, case: Case) -> None:
    """Changing the scores of one row changes no other row, bit for bit."""
    changed = case["scores"].copy()
    changed[..., 0, :] = -changed[..., 0, :] / 2
    before, after = (run(implementation, case, scores=s)[0].value for s in (case["scores"], changed))
    equal("rows_are_independent", case, after[..., 1:, :], before[..., 1:, :])


def a_common_shift_changes_nothing(implementation: Function, case: Case) -> None:
    """Adding one power of two to all scores changes nothing (where the sums are exact in the storage format)."""
    for shift in (-1024.0, -64.0, 64.0, 256.0, 1024.0):
        moved = case["scores"] + shift
        if np.array_equal(round_to(moved, case.profile.dtype), moved):
            one, two = run(implementation, case)[0], run(implementation, case, scores=moved)[0]
            close("a_common_shift_changes_nothing", case, two.value, one.value, one.radius + two.radius)


def log_weight_slope(implementation: Function, case: Case) -> None:
    """ln(w_j / w_l) = λ (s_j - s_l): λ is 1 for softmax, ln max(n, n_min) / ln 512 for softmax_plus."""
    mask, scores, out = _mask_of(case), case["scores"], run(implementation, case)[0]
    n = mask.sum(-1, keepdims=True)
    slope = np.log(np.maximum(n, case["n_min"])) / math.log(512) if "n_min" in case.arguments else 1.0
    # Below 1e-290 float64 itself runs out of digits.
    known = mask & (out.value > np.maximum(4 * out.radius, 1e-290))
    value = np.where(known, out.value, 1.0)
    part = np.where(known, out.radius / value, 0.0)
    top = np.argmax(np.where(known, value, 0.0), axis=-1, keepdims=True)

    def at_top(array: np.ndarray) -> np.ndarray:
        return np.take_along_axis(array, top, axis=-1)

    usable = known & at_top(known)
    actual = np.where(usable, np.log(value) - np.log(at_top(value)), 0.0)
    expected = np.where(usable, slope * (scores - at_top(scores)), 0.0)
    tolerance = 4 / 3 * (part + at_top(part)) + 2.0**-48 * (1 + np.abs(expected))
    close("log_weight_slope", case, actual, expected, tolerance)


def signs_split_the_square(implementation: Function, case: Case) -> None:
    """w(s) + w(-s) = s² / N, and one of the two is exactly 0; N is the length that the function names."""
    scores, mask = case["scores"], _mask_of(case)
    one, two = run(implementation, case)[0], run(implementation, case, scores=-scores)[0]
    if case.op.endswith("visible"):
        length = np.maximum(mask.sum(-1, keepdims=True), 1)
    else:
        length = np.asarray(case.arguments.get("length", scores.shape[-1]))
    expected = np.where(mask, scores**2, 0.0) / length
    radius = one.radius + two.radius + 2.0**-50 * expected
    close("signs_split_the_square", case, one.value + two.value, expected, radius)
    equal("signs_split_the_square", case, np.minimum(one.value, two.value), np.zeros(scores.shape))


def doubling_scores_quadruples_weights(implementation: Function, case: Case) -> None:
    """w(2 s) = 4 w(s)."""
    one, two = run(implementation, case)[0], run(implementation, case, scores=2 * case["scores"])[0]
    radius = 4 * one.radius + two.radius
    close("doubling_scores_quadruples_weights", case, two.value, 4 * one.value, radius)


def weights_are_normal_probabilities(implementation: Function, case: Case) -> None:
    """The weight of s is the integral up to s of the normal density of mean sqrt(1/2) and variance 1/(4 pi)."""
    from scipy.special import ndtr

    out, mask = run(implementation, case)[0], _mask_of(case)
    expected = np.where(mask, ndtr((case["scores"] - math.sqrt(0.5)) * math.sqrt(4 * math.pi)), 0.0)
    # 2^-45 is the error of the comparison itself.
    close("weights_are_normal_probabilities", case, out.value, expected, out.radius + 2.0**-45)


def weights_rise_with_scores(implementation: Function, case: Case) -> None:
    """Higher scores of a row never weigh less than lower ones, beyond rounding, and weights lie in [0, 1]."""
    scores, mask, out = case["scores"], _mask_of(case), run(implementation, case)[0]
    if (out.value < 0).any() or (out.value > 1).any():
        raise LawFailed(f"{case.op} law weights_rise_with_scores ({case.profile}): a weight lies outside [0, 1]")
    higher = (scores[..., :, None] >= scores[..., None, :]) & mask[..., :, None] & mask[..., None, :]
    slack = np.maximum(out.radius, 2.0**-60)
    drop = out.value[..., None, :] - out.value[..., :, None] - slack[..., None, :] - slack[..., :, None]
    worst = np.where(higher, drop, -1.0).max(initial=-1.0)
    if worst > 0:
        raise LawFailed(f"{case.op} law weights_rise_with_scores ({case.profile}): a higher score weighs less")


def _of(*functions: str) -> tuple[str, ...]:
    return tuple(f"attention_kernel.{f}" for f in functions)


LAWS = (
    Law(masked_scores_do_not_matter, _of(*_ALL)),
    Law(a_broadcast_mask_is_the_mask_written_out, _of(*_ALL)),
    Law(masked_keys_may_be_added, _of(*(f for f in _ALL if f != "squared_relu_array")), ("C1",)),
    Law(masked_keys_dilute, _of("squared_relu_array"), ("C1",)),
    Law(rows_sum_to_one, _of(*_NORMALISED), ("C1",)),
    Law(a_fully_masked_row_is_zero, _of(*_ALL)),
    Law(rows_are_independent, _of(*_ALL)),
    Law(a_common_shift_changes_nothing, _of(*_NORMALISED), ("C2",)),
    Law(log_weight_slope, _of(*_NORMALISED), ("C1",)),
    Law(signs_split_the_square, _of(*_SQUARED), ("C1", "C2")),
    Law(doubling_scores_quadruples_weights, _of(*_SQUARED)),
    Law(weights_are_normal_probabilities, _of("laplace"), ("C2", "C3")),
    Law(weights_rise_with_scores, _of("laplace"), ("C2",)),
)


def drawn_mask(draw: Draw, kind: str, b: int, n: int, m: int) -> np.ndarray | None:
    """None, or a mask of one of the shapes that broadcast to (b, n, m)."""
    shapes = {"full": (b, n, m), "keys": (b, 1, m), "rows": (b, n, 1), "shared": (n, m)}
    return None if kind == "none" else draw.mask(*shapes[kind], keep=0.7)


def strategy(function: str, profile: Profile) -> st.SearchStrategy[Case]:
    """Up to 18 keys and every kind of mask; scores from hundredths to a thousand."""

    def build(draw: Draw, b: int, n: int, m: int, kind: str, exponent: int, n_min: int, length: int) -> dict:
        options = {"softmax_plus": {"n_min": n_min}, "squared_relu_constant": {"length": length}}
        scores = draw.grid(b, n, m, exponent=exponent)
        return {"scores": scores, "mask": drawn_mask(draw, kind, b, n, m), **options.get(function, {})}

    return drawn(
        f"attention_kernel.{function}", profile, build,
        b=st.integers(1, 2), n=st.integers(1, 4), m=st.integers(1, 18),
        kind=st.sampled_from(["full", "keys", "none", "rows", "shared"]), exponent=st.integers(-6, 3),
        n_min=st.sampled_from([1, 2, 16]), length=st.sampled_from([1, 4, 7, 512]),
    )  # fmt: skip


# Mutants: plain NumPy, one fault each.
def np_softmax(scores: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """A right softmax to put faults around."""
    top = np.where(seen, scores, -np.inf).max(-1, keepdims=True, initial=-np.inf)
    weights = np.where(seen, np.exp(np.where(seen, scores - np.where(np.isfinite(top), top, 0), 0)), 0)
    return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)


def _soft(change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Function:
    return lambda scores, mask: change(scores, visible(mask, scores.shape))


def _plus(factor: Callable[..., Any]) -> Function:
    """softmax_plus with another factor(n, n_min, scores)."""

    def call(scores: np.ndarray, mask: Mask, n_min: int) -> np.ndarray:
        seen = visible(mask, scores.shape)
        return np_softmax(scores * factor(seen.sum(-1, keepdims=True), n_min, scores), seen)

    return call


def _squares(length: Callable[..., Any], power: float = 2, keep: bool = True, **fixed: Any) -> Function:
    """A squared ReLU over another length(n, scores)."""

    def call(scores: np.ndarray, mask: Mask, **options: Any) -> np.ndarray:
        seen = visible(mask, scores.shape)
        weights = np.maximum(scores, 0) ** power / length(seen.sum(-1, keepdims=True), scores, **options)
        return np.where(seen, weights, 0) if keep else weights

    return call


def _no_shift(scores: np.ndarray, seen: np.ndarray) -> np.ndarray:
    weights = np.where(seen, np.exp(scores), 0)
    return np.where(seen.any(-1, keepdims=True), weights / weights.sum(-1, keepdims=True), 0)


def _shift_by_all(scores: np.ndarray, seen: np.ndarray) -> np.ndarray:
    weights = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    return np.where(seen.any(-1, keepdims=True), weights / weights.sum(-1, keepdims=True), 0)


def _additive(constant: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    return lambda scores, seen: np_softmax(scores + np.where(seen, 0, constant), np.ones_like(seen))


def _leak(scores: np.ndarray, mask: Mask, n_min: int) -> np.ndarray:
    seen = visible(mask, scores.shape)
    factor = np.log(np.maximum(seen.sum(-1, keepdims=True), n_min)) / math.log(512)
    return np_softmax(np.where(seen, scores, -1e12) * factor, np.ones_like(seen))


def _queries_without_mask(scores: np.ndarray, mask: Mask, n_min: int) -> np.ndarray:
    seen = visible(mask, scores.shape)
    n = seen.sum(-1, keepdims=True) if mask is not None else scores.shape[-2]
    return np_softmax(scores * np.log(np.maximum(n, n_min)) / math.log(512), seen)


def _columns(scores: np.ndarray, mask: Mask, n_min: int) -> np.ndarray:
    # Counts the mask as it comes, not as it broadcasts.
    n = scores.shape[-1] if mask is None else mask.sum(-1, keepdims=True)
    factor = np.log(np.maximum(n, n_min)) / math.log(512)
    return np_softmax(scores * factor, visible(mask, scores.shape))


def _laplace(
    mean: float = math.sqrt(0.5), deviation: float = math.sqrt(1 / (4 * math.pi)), mask_first: bool = False,
    sums: bool = False, unmasked: bool = False, root: float = math.sqrt(2),
) -> Function:  # fmt: skip
    from scipy.special import erfc

    def call(scores: np.ndarray, mask: Mask) -> np.ndarray:
        seen = visible(mask, scores.shape)
        scores = np.where(seen, scores, 0) if mask_first else scores
        weights = erfc((mean - scores) / (deviation * root)) / 2
        weights = weights if mask_first or unmasked else np.where(seen, weights, 0)
        return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300) if sums else weights

    return call


def _mutant(function: str, bug: str, call: Function) -> Mutant:
    return Mutant(f"attention_kernel.{function}", bug, call)


_LN512 = math.log(512)


MUTANTS = (
    _mutant("softmax", "no maximum is subtracted", _soft(_no_shift)),
    _mutant("softmax", "the maximum subtracted is that of all keys, masked ones included", _soft(_shift_by_all)),
    _mutant("softmax", "masked scores are set to 0 instead of hidden",
            _soft(lambda s, seen: np_softmax(np.where(seen, s, 0), np.ones_like(seen)))),
    _mutant("softmax", "masked after the normalisation, so rows do not sum to 1",
            _soft(lambda s, seen: np.where(seen, np_softmax(s, np.ones_like(seen)), 0))),
    _mutant("softmax", "normalised over the queries", _soft(
        lambda s, seen: np_softmax(s.swapaxes(-1, -2), seen.swapaxes(-1, -2)).swapaxes(-1, -2))),
    _mutant("softmax", "powers of 2 instead of e", _soft(lambda s, seen: np_softmax(s * math.log(2), seen))),
    _mutant("softmax", "a fully masked row is uniform (additive constant -1e4)", _soft(_additive(-1e4))),
    _mutant("softmax", "one more key of score 0 in the sum", _soft(
        lambda s, seen: np_softmax(np.concatenate([s, 0 * s[..., :1]], -1),
                                   np.concatenate([seen, seen.any(-1, keepdims=True)], -1))[..., :-1])),
    _mutant("softmax", "the mask is inverted", _soft(lambda s, seen: np_softmax(s, ~seen))),
    _mutant("softmax_plus", "n is the length of the array, padding included",
            _plus(lambda n, n_min, s: np.log(max(s.shape[-1], n_min)) / _LN512)),
    _mutant("softmax_plus", "n_min is ignored", _plus(lambda n, n_min, s: np.log(np.maximum(n, 1)) / _LN512)),
    _mutant("softmax_plus", "n_min clamps from above",
            _plus(lambda n, n_min, s: np.log(np.clip(n, 1, max(n_min, 1))) / _LN512)),
    _mutant("softmax_plus", "n_min is always 16", _plus(lambda n, n_min, s: np.log(np.maximum(n, 16)) / _LN512)),
    _mutant("softmax_plus", "the logarithm is of n + 1", _plus(
        lambda n, n_min, s: np.log(np.maximum(n, n_min) + 1) / _LN512)),
    _mutant("softmax_plus", "the training length is 511", _plus(
        lambda n, n_min, s: np.log(np.maximum(n, n_min)) / math.log(511))),
    _mutant("softmax_plus", "no factor: plain softmax", _plus(lambda n, n_min, s: 1.0)),
    _mutant("softmax_plus", "the factor is its square root", _plus(
        lambda n, n_min, s: np.sqrt(np.log(np.maximum(n, n_min)) / _LN512))),
    _mutant("softmax_plus", "every row takes the n of the longest", _plus(
        lambda n, n_min, s: np.log(max(n.max(), n_min)) / _LN512)),
    _mutant("softmax_plus", "masked before the scaling: at one visible key, ln 1 = 0 unmasks all", _leak),
    _mutant("softmax_plus", "without a mask n counts the queries", _queries_without_mask),
    _mutant("softmax_plus", "n is counted before the mask is broadcast", _columns),
    _mutant("squared_relu_visible", "divided by the length of the array", _squares(lambda n, s: s.shape[-1])),
    _mutant("squared_relu_visible", "n is not floored: a fully masked row is NaN",
            lambda scores, mask: np.where(visible(mask, scores.shape), np.maximum(scores, 0) ** 2, 0)
            / visible(mask, scores.shape).sum(-1, keepdims=True)),
    _mutant("squared_relu_visible", "n is floored at 16", _squares(lambda n, s: np.maximum(n, 16))),
    _mutant("squared_relu_visible", "not squared", _squares(lambda n, s: np.maximum(n, 1), power=1)),
    _mutant("squared_relu_visible", "negative scores are squared too",
            lambda scores, mask: np.where(visible(mask, scores.shape), scores**2, 0)
            / np.maximum(visible(mask, scores.shape).sum(-1, keepdims=True), 1)),
    _mutant("squared_relu_visible", "divided by n squared", _squares(lambda n, s: np.maximum(n, 1) ** 2)),
    _mutant("squared_relu_visible", "every row takes the n of the longest",
            _squares(lambda n, s: max(n.max(), 1))),
    _mutant("squared_relu_visible", "the mask only counts, it does not hide",
            _squares(lambda n, s: np.maximum(n, 1), keep=False)),
    _mutant("squared_relu_array", "divided by the visible keys", _squares(lambda n, s: np.maximum(n, 1))),
    _mutant("squared_relu_array", "divided by the number of queries", _squares(lambda n, s: s.shape[-2])),
    _mutant("squared_relu_array", "divided by 512", _squares(lambda n, s: 512)),
    _mutant("squared_relu_array", "the mask is ignored", _squares(lambda n, s: s.shape[-1], keep=False)),
    _mutant("squared_relu_constant", "divided by the visible keys",
            _squares(lambda n, s, length: np.maximum(n, 1))),
    _mutant("squared_relu_constant", "not divided", _squares(lambda n, s, length: 1)),
    _mutant("squared_relu_constant", "divided by length squared", _squares(lambda n, s, length: length**2)),
    _mutant("squared_relu_constant", "cubed", _squares(lambda n, s, length: length, power=3)),
    _mutant("laplace", "masked before the activation: laplace(0) stays", _laplace(mask_first=True)),
    _mutant("laplace", "the mask is ignored", _laplace(unmasked=True)),
    _mutant("laplace", "mean 1/2 instead of its root", _laplace(mean=0.5)),
    _mutant("laplace", "variance in place of the deviation", _laplace(deviation=1 / (4 * math.pi))),
    _mutant("laplace", "the root of 2 is missing", _laplace(root=1.0)),
    _mutant("laplace", "deviation 0.282, the constant cut to three digits", _laplace(deviation=0.282)),
    _mutant("laplace", "rows are normalised", _laplace(sums=True)),
)  # fmt: skip


def _mask_for_batches_only(scores: np.ndarray, mask: Mask) -> np.ndarray:
    seen = visible(mask, scores.shape)
    return np_softmax(scores, seen if scores.ndim > 2 and scores.shape[0] > 1 else np.ones_like(seen))


MUSEUM = (
    Mutant("attention_kernel.softmax", "the mask is skipped for batch size 1", _mask_for_batches_only,
           "https://github.com/huggingface/transformers/pull/46773"),
    Mutant("attention_kernel.softmax", "the mask is dropped (fallback path)",
           lambda scores, mask: np_softmax(scores, np.ones(scores.shape, dtype=bool)),
           "https://github.com/keras-team/keras/issues/23038"),
    Mutant("attention_kernel.softmax", "the boolean mask becomes a bias the wrong way round",
           lambda scores, mask: np_softmax(
               scores + np.where(visible(mask, scores.shape), -1e30, 0), np.ones(scores.shape, dtype=bool)),
           "https://github.com/neuro-galaxy/torch_brain/pull/74"),
    Mutant("attention_kernel.squared_relu_constant", "the length of the batch instead of the constant of the training",
           _squares(lambda n, s, length: s.shape[-1]), "https://github.com/JunnYu/FLASHQuad_pytorch/issues/1"),
)  # fmt: skip
