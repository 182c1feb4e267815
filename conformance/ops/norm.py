"""Judging norm: layer norm, and root-mean-square norm with and without a scale."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from conformance.budget import Arithmetic, Ball, Profile, gamma, sqrt, where
from conformance.case import Case, Function, Operator
from conformance.generate import Draw, drawn
from conformance.law import Law, close, equal, run
from conformance.mutant import Mutant
from refimpl.ops import norm

RMS, SCALED, LAYER = "norm.rms_norm", "norm.rms_norm_scaled", "norm.layer_norm"
ALL = (RMS, SCALED, LAYER)


# References. Inputs of a case are exact, and every operation has a radius of its own; those of a model have radii.
def composed_rms_norm(a: Arithmetic, x: Ball, epsilon: float) -> Ball:
    """x / sqrt(mean(x^2) + epsilon); a row of zeros gives zeros."""
    zero = np.asarray((x.magnitude == 0).all(axis=-1, keepdims=True))
    return where(zero, a.exact(np.zeros(x.shape)), _over_root(x, epsilon)[0])


def composed_rms_norm_scaled(a: Arithmetic, x: Ball, scale: Ball, epsilon: float) -> Ball:
    """composed_rms_norm, times a scale per feature."""
    return composed_rms_norm(a, x, epsilon) * scale


def composed_layer_norm(a: Arithmetic, x: Ball, scale: Ball, bias: Ball, epsilon: float) -> Ball:
    """(x - mean) / sqrt(var + epsilon) * scale + bias; with epsilon = 0 a constant row gives bias."""
    return _standardised(a, x, epsilon) * scale + bias


def rms_norm(a: Arithmetic, x: Ball, epsilon: float) -> Ball:
    """composed_rms_norm of an x with a radius: the numerator and the root move together."""
    composed = composed_rms_norm(a, x, epsilon)
    if not x.rad.any():
        return composed
    narrowed = _narrowed(composed, x, a.ball(x.mid, 0.0), _held(a, x), epsilon, mean=0.0)
    return where(_uncertain(x), narrowed, composed)


def rms_norm_scaled(a: Arithmetic, x: Ball, scale: Ball, epsilon: float) -> Ball:
    """rms_norm, times a scale per feature."""
    return rms_norm(a, x, epsilon) * scale


def layer_norm(a: Arithmetic, x: Ball, scale: Ball, bias: Ball, epsilon: float) -> Ball:
    """composed_layer_norm of an x with a radius: features, their mean and the root move together."""
    if not x.rad.any():
        return composed_layer_norm(a, x, scale, bias, epsilon)
    still, held = a.ball(x.mid, 0.0), _held(a, x)
    still = still - still.mean(keepdims=True)
    # A feature moves by its radius and the mean's, its share of that taken off twice.
    move = (1 - 2 / x.shape[-1]) * x.rad + _mean(x.rad)
    # Of the difference, only the size is known; adding 0 rounds once, as the subtraction does.
    held = a.ball(still.magnitude + move, held.rad + held.mean(keepdims=True).rad) + 0.0
    composed = _over_root(x - x.mean(keepdims=True), epsilon)[0]
    narrowed = _narrowed(composed, x, still, held, epsilon, mean=1.0)
    # A row without radius may be constant.
    return where(_uncertain(x), narrowed, _standardised(a, x, epsilon)) * scale + bias


def _standardised(a: Arithmetic, x: Ball, epsilon: float) -> Ball:
    constant = (x.value == x.value[..., :1]).all(axis=-1, keepdims=True) & (epsilon == 0)
    return where(constant, a.exact(np.zeros(x.shape)), _over_root(x - x.mean(keepdims=True), epsilon)[0])


def _over_root(x: Ball, epsilon: float) -> tuple[Ball, Ball]:
    """The quotient and its root, from one operation to the next."""
    root = sqrt((x * x).mean(keepdims=True) + epsilon)
    return x / root, root


def _held(a: Arithmetic, x: Ball) -> Ball:
    """The size of what is normalised, with what its readers may differ by.

    One kernel may take the moments from sums that it then stores, and normalise what it reads back, or form a sum of
    three once for each.
    """
    return a.exact(x.magnitude).rounded(2).stored()


def _narrowed(composed: Ball, x: Ball, still: Ball, held: Ball, epsilon: float, *, mean: float) -> Ball:
    """The quotient of an x with radius r, with the smaller of its composed radius and the one derived here.

    Composing counts r three times: in a feature, in the mean and in the root. Let c be x, or x less its mean, s the
    root, y = c / s, and let primes mark the same of x + e, |e| <= r. With f = c' - c and t = mean(y f), and as
    mean(y^2) <= 1, s'^2 = s^2 + 2 s t + mean(f^2) >= (s + t)^2, so that s' = s + t + g, where
    0 <= g = (mean(f^2) - t^2) / (s' + s + t), and

        (y' - y) s' = c' - y s' = f - y t - y g

    without remainder. f - y t is linear in e: row i of I - mean 11ᵀ / d - y yᵀ / d, whose product with e is at most
    that of its magnitudes with r. As t = mean(y e), s' and s + t are at least s - p, p = mean(|y| r), and
    mean(f^2) <= mean(r^2):

        |y' - y| <= (|I - mean 11ᵀ / d - y yᵀ / d| r + |y| mean(r^2) / (2 (s - p))) / (s - p), where p < s.

    To that comes what an implementation that holds x + e rounds. All of it grows with magnitudes and falls with s', so
    that the largest |c'| and |y'| and the least s' bound it, operation by operation as for an exact input.

    still: c, from exact midpoints: c, s and y are known only up to its radius. held: a size of c', and its roundings.
    mean: 1 where the mean is subtracted, else 0.
    """
    a, r, d = x.arithmetic, x.rad, x.shape[-1]
    ball, root = _over_root(still, epsilon)
    y, unsure, most = ball.value, ball.rad, ball.magnitude
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        least = root.value - root.rad - _mean(most * r)
        known = least > 0
        least = np.where(known, least, 1.0)
        others = [np.abs((i == np.arange(d)) * d - mean - y[..., i : i + 1] * y) * r for i in range(d)]
        moved = np.stack([row.mean(axis=-1) for row in others], axis=-1)
        moved = moved + np.abs(y) * _mean(unsure * r) + unsure * _mean(most * r)
        # The sums themselves are formed in float64.
        moved = moved + gamma(2 * d + 16, 2.0**-53) * (r + _mean(r) + most * _mean(most * r))
        moved = (moved + most * _mean(r * r) / (2 * least)) / least
        rounded = sqrt(a.ball(least**2, ((held * held).mean(keepdims=True) + epsilon).rad))
        rounded = a.ball((most + moved) * least, held.rad) / rounded
        rad = np.where(known, moved + rounded.rad, np.inf)
    return a.ball(composed.mid, np.fmin(composed.rad, rad))


def _uncertain(x: Ball) -> np.ndarray:
    return np.asarray(x.rad.any(axis=-1, keepdims=True))


def _mean(rows: np.ndarray) -> np.ndarray:
    return rows.mean(axis=-1, keepdims=True)


OPERATORS = (
    Operator(RMS, norm.rms_norm, composed_rms_norm),
    Operator(SCALED, norm.rms_norm_scaled, composed_rms_norm_scaled),
    Operator(LAYER, norm.layer_norm, composed_layer_norm),
)

WIDE = ("float64", "float32", "bfloat16")


def _cases(name: str, x: np.ndarray, epsilon: float, *, rms: str = "", layer: str = "", **options: Any) -> list[Case]:
    """One case an operator, with the clauses it tests; scale and bias are drawn under the case's name."""
    draw, width = Draw(f"norm/{name}/affine"), x.shape[-1]
    if options.get("exact"):
        scale, bias = np.ldexp(1.0, draw.integers(width, -1, 2)), draw.grid(width, low=-4, high=4, exponent=-1)
    else:
        scale, bias = draw.grid(width, low=16, high=127), draw.grid(width, exponent=-7)
    # Running variances divide by 1, 2, 3 on the way: no row makes every order of a layer norm exact.
    inexact = {**options, "exact": False}
    made = [
        Case(RMS, name, {"x": x, "epsilon": epsilon}, tuple(rms.split()), **options),
        Case(SCALED, name, {"x": x, "scale": scale, "epsilon": epsilon}, ("C2",), **options),
        Case(LAYER, name, {"x": x, "scale": scale, "bias": bias, "epsilon": epsilon}, tuple(layer.split()), **inexact),
    ]
    # A layer norm of width 1 is its bias, whatever x is.
    return made if width > 1 else made[:2]


def _rows(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float64)


_SIGNS = _rows([1, -1, 1, -1], [-1, 1, -1, 1], [1, 1, -1, -1])
_CONSTANT = _rows([0.5] * 4, [-3.0] * 4, [1, 2, 3, 5], [-7, 4, 1, 0])
_WITH_ZEROS = np.concatenate([np.zeros((1, 5)), Draw("norm/zero").grid(2, 5)])

CASES = (
    *_cases("grid", Draw("norm/grid").grid(2, 5, 7), 1e-12, rms="C1", layer="C1"),
    *_cases("dense", Draw("norm/dense").dense(3, 11), 1e-7, rms="C1", layer="C1"),
    *_cases("dense-53-bits", Draw("norm/dense53").dense(2, 13, bits=53), 1e-12, rms="C1", layer="C1"),
    # Rows of very different size: the mean runs over one row only.
    *_cases("rows-differ", Draw("norm/rows").grid(4, 7) * np.ldexp(1.0, [[-6], [0], [3], [-3]]), 1e-12, rms="C1"),
    # Rows whose mean square is near epsilon: 1e-12, 1e-7 and 1e-5 part company here.
    *_cases("near-1e-7", Draw("norm/7").grid(4, 8, exponent=-18), 1e-7, rms="C2", layer="C2", only=WIDE),
    *_cases("near-1e-12", Draw("norm/12").grid(3, 7, exponent=-26), 1e-12, rms="C2", layer="C2", only=WIDE),
    # Inside the root, epsilon makes it 2 and 4; outside it would make it 4 and 14.
    *_cases("epsilon-3", _SIGNS, 3.0, rms="C2", layer="C2", exact=True),
    *_cases("epsilon-12", 2 * _SIGNS[::-1], 12.0, rms="C2", layer="C2", exact=True),
    *_cases("powers-of-two", _SIGNS * np.ldexp(1.0, [[1], [-1], [4]]), 0.0, rms="C3", exact=True),
    *_cases("zero-row", _WITH_ZEROS, 0.0, rms="C4", layer="C4"),
    *_cases("zero-row-epsilon", -_WITH_ZEROS, 2.0**-10, rms="C4", layer="C4"),
    *_cases("constant-row", _CONSTANT, 0.0, layer="C4"),
    *_cases("constant-row-epsilon", _CONSTANT, 1.0, layer="C4"),
    # A mean many times the spread: one-pass variances lose it.
    *_cases("offset", Draw("norm/offset").grid(3, 7, low=112, high=127), 1e-7, layer="C3"),
    *_cases("offset-2000", 2000 + Draw("norm/2000").grid(3, 5, low=-7, high=7, exponent=-1), 1e-7, layer="C3"),
    *_cases("width-1", Draw("norm/1").grid(7, 1, low=3), 2.0**-4, rms="C1"),
    *_cases("width-2", Draw("norm/2").grid(5, 2), 2.0**-4, rms="C1", layer="C1"),
    # Squares beyond float16, and one feature that carries its whole row.
    *_cases("large", Draw("norm/large").grid(3, 7, exponent=4), 1e-12, rms="C1", only=WIDE),
    *_cases("spikes", 1.5 * np.eye(5, 7) + Draw("norm/spikes").grid(5, 7, exponent=-13), 1e-7, rms="C2"),
)


# Laws.
def _affine(case: Case) -> tuple[np.ndarray, np.ndarray]:
    width = case["x"].shape[-1]
    return case.arguments.get("scale", np.ones(width)), case.arguments.get("bias", np.zeros(width))


def spike(implementation: Function, case: Case) -> None:
    """A row with one feature t among zeros has a closed form: t / sqrt(t^2 / d + epsilon), or its centred kin."""
    x, epsilon = case["x"], case["epsilon"]
    scale, bias = _affine(case)
    width, t = x.shape[-1], np.ldexp(1.0, np.arange(x.size // x.shape[-1]) % 5 - 2)
    rows = t.reshape(-1, 1) * np.eye(width)[np.arange(t.size) % width]
    share = 1 / width if case.op == LAYER else 0.0
    power = (rows**2).sum(axis=-1, keepdims=True) * (1 - share) / width + epsilon
    centred = rows - share * t.reshape(-1, 1)
    expected = np.where(power > 0, centred / np.sqrt(np.where(power > 0, power, 1.0)), 0.0) * scale + bias
    out = run(implementation, case, x=rows.reshape(x.shape))[0]
    close(
        "spike",
        case,
        out.value,
        expected.reshape(x.shape),
        out.radius + 8 * 2.0**-53 * np.abs(expected.reshape(x.shape)),
    )


def rows_without_spread(implementation: Function, case: Case) -> None:
    """With epsilon = 0 a row of zeros gives zeros, in a layer norm bias."""
    changed, bias = case["x"].copy(), _affine(case)[1]
    changed[0] = 0.0
    changed[1] = np.ldexp(1.0, np.arange(changed.shape[-1]) % 3)
    out = run(implementation, case, x=changed, epsilon=0.0)[0]
    close("rows_without_spread", case, out.value[0], bias, out.radius[0])


def ramp_far_from_zero(implementation: Function, case: Case) -> None:
    """128, 129, 130, ... has variance (d^2 - 1) / 12 about its middle."""
    (scale, bias), shape, width = _affine(case), case["x"].shape, case["x"].shape[-1]
    steps = np.arange(width) - (width - 1) / 2
    power = (width**2 - 1) / 12 + case["epsilon"]
    expected = np.broadcast_to((steps / np.sqrt(power) if power else steps) * scale + bias, shape)
    out = run(implementation, case, x=np.broadcast_to(128.0 + np.arange(width), shape).copy())[0]
    close("ramp_far_from_zero", case, out.value, expected, out.radius + 8 * 2.0**-53 * (1 + np.abs(expected)))


def positive_scale(implementation: Function, case: Case) -> None:
    """With epsilon = 0, eight times a row gives the same result."""
    one, two = run(implementation, case, epsilon=0.0), run(implementation, case, epsilon=0.0, x=8 * case["x"])
    close("positive_scale", case, two[0].value, one[0].value, one[0].radius + two[0].radius)


def epsilon_scales_as_a_square(implementation: Function, case: Case) -> None:
    """N(4 x, 16 epsilon) = N(x, epsilon)."""
    one = run(implementation, case)[0]
    two = run(implementation, case, epsilon=16 * case["epsilon"], x=4 * case["x"])[0]
    close("epsilon_scales_as_a_square", case, two.value, one.value, one.radius + two.radius)


def common_offset(implementation: Function, case: Case) -> None:
    """Adding one number to a whole row changes nothing."""
    x = case["x"]
    # The power of two just below the largest magnitude: the sum stays on the grid of x.
    offset = np.ldexp(1.0, np.frexp(np.abs(x).max(initial=0.0))[1] - 1)
    one, two = run(implementation, case)[0], run(implementation, case, x=x + offset)[0]
    close("common_offset", case, two.value, one.value, one.radius + two.radius)


def linear_in_scale(implementation: Function, case: Case) -> None:
    """Doubling scale and bias doubles the result."""
    doubled = {k: 2 * case[k] for k in ("scale", "bias") if k in case.arguments}
    one, two = run(implementation, case)[0], run(implementation, case, **doubled)[0]
    close("linear_in_scale", case, two.value, 2 * one.value, 2 * one.radius + two.radius)


def unit_scale_is_plain(implementation: Function, case: Case) -> None:
    """With scale 1 (and bias 0) the mean square of a row is its power over power + epsilon."""
    width = case["x"].shape[-1]
    plain = {k: np.full(width, float(k == "scale")) for k in ("scale", "bias") if k in case.arguments}
    out = run(implementation, case, **plain)[0]
    x = case["x"] - (case["x"].mean(axis=-1, keepdims=True) if case.op == LAYER else 0.0)
    power = (x**2).mean(axis=-1)
    divisor = power + case["epsilon"]
    # Rows of rounding residue have no defined power.
    known = np.where(power > 2.0**-40 * (case["x"] ** 2).mean(axis=-1), 0.0, np.inf)
    expected = np.where(divisor > 0, power / np.where(divisor > 0, divisor, 1.0), 0.0)
    slack = (out.radius * (2 * np.abs(out.value) + out.radius)).mean(axis=-1) + 2.0**-30 * expected
    close("unit_scale_is_plain", case, (out.value**2).mean(axis=-1), expected, slack + known)


def features_permute(implementation: Function, case: Case) -> None:
    """Reversing the features of x, scale and bias reverses the result."""
    turned = {k: case[k][..., ::-1].copy() for k in ("x", "scale", "bias") if k in case.arguments}
    one, two = run(implementation, case)[0], run(implementation, case, **turned)[0]
    close("features_permute", case, two.value[..., ::-1], one.value, one.radius + two.radius[..., ::-1])


def rows_are_independent(implementation: Function, case: Case) -> None:
    """Changing one row leaves the others as they are, bit for bit."""
    changed = case["x"].copy()
    changed[0] = -2 * changed[0] + 1
    kept = run(implementation, case)[0].value[1:]
    equal("rows_are_independent", case, run(implementation, case, x=changed)[0].value[1:], kept)


LAWS = (
    Law(spike, ALL, ("C2",)),
    Law(unit_scale_is_plain, ALL, ("C1",)),
    Law(rows_without_spread, (RMS, LAYER), ("C4",)),
    Law(rows_without_spread, (SCALED,)),
    Law(ramp_far_from_zero, (LAYER,), ("C1", "C3")),
    Law(positive_scale, (RMS,), ("C3",)),
    Law(common_offset, (LAYER,), ("C3",)),
    Law(epsilon_scales_as_a_square, ALL),
    Law(linear_in_scale, (SCALED, LAYER)),
    Law(features_permute, ALL),
    Law(rows_are_independent, ALL),
)


def strategy(function: str, profile: Profile) -> st.SearchStrategy[Case]:
    """2 to 3 rows of 1 to 9 features, with zero and constant rows; epsilon from 0 to 1."""

    def build(draw: Draw, rows: int, width: int, epsilon: float, kind: str) -> dict[str, Any]:
        x = draw.grid(rows, width)
        if kind != "plain":
            x[0] = 0.0 if kind == "zero" else x[0, 0]
        affine = {"scale": draw.grid(width, low=16), "bias": draw.grid(width)}
        taken = {"rms_norm": (), "rms_norm_scaled": ("scale",), "layer_norm": ("scale", "bias")}[function]
        return {"x": x, **{k: affine[k] for k in taken}, "epsilon": epsilon}

    return drawn(
        f"norm.{function}",
        profile,
        build,
        rows=st.integers(2, 3),
        width=st.integers(1, 9),
        epsilon=st.sampled_from([1e-12, 1e-7, 1e-5, 0.25, 1.0, 0.0]),
        kind=st.sampled_from(["plain", "zero", "constant"]),
    )


def _power(x: np.ndarray) -> np.ndarray:
    return (x * x).mean(axis=-1, keepdims=True)


def _sum_of_squares(x: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x * x).sum(axis=-1, keepdims=True) + epsilon)


def _epsilon_outside(x: np.ndarray, epsilon: float) -> np.ndarray:
    return x / (np.sqrt(_power(x)) + epsilon)


def _centred(x: np.ndarray, epsilon: float) -> np.ndarray:
    return norm.rms_norm(x - x.mean(axis=-1, keepdims=True), epsilon=epsilon)


def _whole_array(x: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean() + epsilon)


def _length_minus_one(x: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x * x).sum(axis=-1, keepdims=True) / (x.shape[-1] - 1) + epsilon)


def _last_feature_left_out(x: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x[..., :-1] ** 2).sum(axis=-1, keepdims=True) / x.shape[-1] + epsilon)


def _rescaled_without_epsilon(x: np.ndarray, epsilon: float) -> np.ndarray:
    largest = np.abs(x).max(axis=-1, keepdims=True)
    return x / largest / np.sqrt(_power(x / largest) + epsilon)


def _layer(x: np.ndarray, scale: np.ndarray, bias: np.ndarray, epsilon: float, ddof: int = 0) -> np.ndarray:
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(
        x.var(axis=-1, keepdims=True, ddof=ddof) + epsilon
    ) * scale + bias


def _centred_in_the_variance(x: np.ndarray, scale: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt(x.var(axis=-1, keepdims=True) + epsilon) * scale + bias


def _one_pass(x: np.ndarray, scale: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
    narrow = x.astype(np.float32)
    mean = narrow.mean(axis=-1, keepdims=True)
    variance = (narrow * narrow).mean(axis=-1, keepdims=True) - mean * mean
    return (x - mean) / np.sqrt(variance + np.float32(epsilon)) * scale + bias


def _layer_epsilon_outside(x: np.ndarray, scale: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
    return (x - x.mean(axis=-1, keepdims=True)) / (x.std(axis=-1, keepdims=True) + epsilon) * scale + bias


MUTANTS = (
    Mutant(RMS, "sum of squares instead of the mean", _sum_of_squares),
    Mutant(RMS, "epsilon outside the root", _epsilon_outside),
    Mutant(RMS, "epsilon left out", lambda x, epsilon: norm.rms_norm(x, epsilon=0.0)),
    Mutant(RMS, "epsilon fixed at 1e-5", lambda x, epsilon: norm.rms_norm(x, epsilon=1e-5)),
    Mutant(RMS, "epsilon fixed at 1e-7", lambda x, epsilon: norm.rms_norm(x, epsilon=1e-7)),
    Mutant(RMS, "epsilon squared", lambda x, epsilon: norm.rms_norm(x, epsilon=epsilon**2)),
    Mutant(RMS, "row centred first", _centred),
    Mutant(RMS, "mean over the whole array", _whole_array),
    Mutant(RMS, "mean over the first axis", lambda x, epsilon: x / np.sqrt((x * x).mean(axis=0) + epsilon)),
    Mutant(RMS, "divided by d - 1", _length_minus_one),
    Mutant(RMS, "last feature left out of the mean", _last_feature_left_out),
    Mutant(RMS, "0/0 for a row of zeros", lambda x, epsilon: x / np.sqrt(_power(x) + epsilon)),
    Mutant(SCALED, "0/0 for a row of zeros", lambda x, scale, epsilon: x / np.sqrt(_power(x) + epsilon) * scale),
    Mutant(RMS, "mean of magnitudes", lambda x, epsilon: x / (np.abs(x).mean(axis=-1, keepdims=True) + epsilon)),
    Mutant(RMS, "divided by the mean square", lambda x, epsilon: x / (_power(x) + epsilon)),
    Mutant(RMS, "root clamped at epsilon", lambda x, epsilon: x / np.maximum(np.sqrt(_power(x)), max(epsilon, 1e-300))),
    Mutant(SCALED, "scale left out", lambda x, scale, epsilon: norm.rms_norm(x, epsilon=epsilon)),
    Mutant(SCALED, "scale + 1", lambda x, scale, epsilon: norm.rms_norm_scaled(x, scale + 1, epsilon=epsilon)),
    Mutant(SCALED, "scaled before the norm", lambda x, scale, epsilon: norm.rms_norm(x * scale, epsilon=epsilon)),
    Mutant(SCALED, "epsilon outside the root", lambda x, scale, epsilon: _epsilon_outside(x, epsilon) * scale),
    Mutant(SCALED, "row centred first", lambda x, scale, epsilon: _centred(x, epsilon) * scale),
    Mutant(LAYER, "bias left out", lambda x, scale, bias, epsilon: _layer(x, scale, 0 * bias, epsilon)),
    Mutant(LAYER, "scale left out", lambda x, scale, bias, epsilon: _layer(x, 1.0 + 0 * scale, bias, epsilon)),
    Mutant(LAYER, "bias before scale", lambda x, scale, bias, epsilon: _layer(x, scale, scale * bias, epsilon)),
    Mutant(LAYER, "not centred", lambda x, scale, bias, epsilon: norm.rms_norm(x, epsilon=epsilon) * scale + bias),
    Mutant(LAYER, "centred in the variance only", _centred_in_the_variance),
    Mutant(LAYER, "epsilon left out", lambda x, scale, bias, epsilon: norm.layer_norm(x, scale, bias, epsilon=0.0)),
    Mutant(LAYER, "epsilon fixed at 1e-5", lambda x, scale, bias, epsilon: _layer(x, scale, bias, 1e-5)),
    Mutant(LAYER, "0/0 for a constant row", _layer),
)

MUSEUM = (
    Mutant(
        LAYER,
        "epsilon added to the standard deviation, outside the root",
        _layer_epsilon_outside,
        url="https://github.com/tracel-ai/burn/issues/2185",
    ),
    Mutant(
        LAYER,
        "unbiased variance, divided by d - 1",
        lambda x, scale, bias, epsilon: _layer(x, scale, bias, epsilon, ddof=1),
        url="https://github.com/LBANN/lbann/pull/2024",
    ),
    Mutant(
        LAYER,
        "variance in one pass, mean of squares minus square of mean",
        _one_pass,
        url="https://github.com/pytorch/pytorch/issues/51102",
    ),
    Mutant(
        RMS,
        "divided by the reciprocal root, that is multiplied by the root",
        lambda x, epsilon: x * np.sqrt(_power(x) + epsilon),
        url="https://github.com/mosaicml/llm-foundry/pull/372",
    ),
    Mutant(
        RMS,
        "row divided by its maximum first, epsilon not",
        _rescaled_without_epsilon,
        url="https://github.com/apple/coremltools/issues/2821",
    ),
    Mutant(
        RMS,
        "epsilon fixed at 1e-6",
        lambda x, epsilon: norm.rms_norm(x, epsilon=1e-6),
        url="https://github.com/apache/tvm/pull/15856",
    ),
)
