"""The judge of norm: its reference against values by hand, its laws on right and wrong functions, its bounds."""

from itertools import islice

import numpy as np
import pytest

from conformance.budget import Arithmetic, Profile, round_to
from conformance.case import Case, reference
from conformance.generate import Draw
from conformance.ops import norm as family
from conformance.vectors import build
from conformance.verdict import check_law, judge
from refimpl.ops import norm

FLOAT64 = Profile("float64", "strict", "A64")
RIGHT = {
    "norm.rms_norm": norm.rms_norm,
    "norm.rms_norm_scaled": norm.rms_norm_scaled,
    "norm.layer_norm": norm.layer_norm,
}
X = np.array([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])


def _expected(op: str, **arguments) -> np.ndarray:
    return reference(Case(op, "by-hand", arguments), digits=True)["y"].value


def test_reference_by_hand() -> None:
    # Mean squares 25/4 and 0; epsilon 11/4 turns the first root into 3.
    np.testing.assert_array_equal(_expected("norm.rms_norm", x=X, epsilon=2.75)[0], [1, 4 / 3, 0, 0])
    np.testing.assert_array_equal(_expected("norm.rms_norm", x=X, epsilon=0.0), [[1.2, 1.6, 0, 0], [0, 0, 0, 0]])
    scale = np.array([2.0, 3.0, 5.0, 7.0])
    np.testing.assert_array_equal(_expected("norm.rms_norm_scaled", x=X, scale=scale, epsilon=2.75)[0], [2, 4, 0, 0])
    # Mean 3, centred -2, -1, 0, 3, variance 14/4; epsilon 1/2 turns the root into 2. A constant row gives bias.
    x, bias = np.array([[1.0, 2.0, 3.0, 6.0], [5.0] * 4]), np.array([0.0, 0.25, 0.5, 1.0])
    out = _expected("norm.layer_norm", x=x, scale=scale, bias=bias, epsilon=0.5)
    np.testing.assert_array_equal(out, [[-2, -1.25, 0.5, 11.5], bias])
    np.testing.assert_array_equal(_expected("norm.layer_norm", x=x, scale=scale, bias=bias, epsilon=0.0)[1], bias)


@pytest.mark.parametrize(
    ("law", "op", "bug"),
    [
        ("spike", "norm.rms_norm", "epsilon outside the root"),
        ("spike", "norm.layer_norm", "unbiased variance, divided by d - 1"),
        ("unit_scale_is_plain", "norm.rms_norm", "divided by d - 1"),
        ("unit_scale_is_plain", "norm.rms_norm_scaled", "row centred first"),
        ("positive_scale", "norm.rms_norm", "epsilon fixed at 1e-7"),
        ("common_offset", "norm.layer_norm", "not centred"),
        ("epsilon_scales_as_a_square", "norm.rms_norm", "epsilon squared"),
        ("linear_in_scale", "norm.rms_norm_scaled", "scale + 1"),
        ("rows_without_spread", "norm.rms_norm", "0/0 for a row of zeros"),
        ("rows_without_spread", "norm.layer_norm", "0/0 for a constant row"),
        ("ramp_far_from_zero", "norm.layer_norm", "variance in one pass, mean of squares minus square of mean"),
        ("features_permute", "norm.rms_norm", "last feature left out of the mean"),
        ("rows_are_independent", "norm.rms_norm", "mean over the whole array"),
    ],
)
def test_laws_hold_and_fail(law: str, op: str, bug: str) -> None:
    chosen = next(entry for entry in family.LAWS if entry.name == law and op in entry.operators)
    wrong = next(m for m in (*family.MUTANTS, *family.MUSEUM) if (m.op, m.bug) == (op, bug))
    assert check_law("right", RIGHT[op], chosen, op, FLOAT64, 10).outcome == "pass"
    with np.errstate(all="ignore"):
        assert check_law("wrong", wrong.call, chosen, op, FLOAT64, 10).outcome == "logic"


@pytest.mark.parametrize("mutant", [*family.MUTANTS, *family.MUSEUM], ids=lambda m: f"{m.op}: {m.bug}")
def test_every_mutant_dies_by_a_vector(mutant) -> None:
    with np.errstate(all="ignore"):
        verdicts = [judge("wrong", mutant.call, build(c), FLOAT64) for c in family.CASES if c.op == mutant.op]
    assert any(v.outcome in ("logic", "precision") for v in verdicts)


def test_bounds_hold_what_float32_does_and_no_more() -> None:
    case = next(c for c in family.CASES if c.id == "norm.layer_norm/dense")
    vector, x = build(case), case["x"].astype(np.float32)
    scale, bias = case["scale"].astype(np.float32), case["bias"].astype(np.float32)
    centred = x - x.mean(axis=-1, keepdims=True, dtype=np.float32)
    root = np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + np.float32(case["epsilon"]))
    error = np.abs((centred / root * scale + bias).astype(np.float64) - vector.expected["y"])
    assert 0.005 < (error / vector.bounds["float32-strict"]["y"]).max() <= 1
    # An error in the fourth decimal is far outside.
    assert (vector.bounds["float32-strict"]["y"] < 2e-5).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_one_rounding_to_16_bits_nearly_fills_the_bound(dtype: str) -> None:
    worst = 0.0
    for case in family.CASES:
        if case.op == "norm.rms_norm" and dtype in case.dtypes and not case.exact:
            verdict = judge("right", _stored(norm.rms_norm, dtype), build(case), Profile(dtype))
            assert verdict.outcome == "pass", verdict.message
            worst = max(worst, verdict.ratio)
    assert 0.2 < worst <= 1


def _stored(function, dtype: str):
    from conformance.case import storage_type

    def rounded(**arguments):
        wide = {k: v.astype(np.float64) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
        return function(**wide).astype(storage_type(dtype))

    return rounded


# Rows with radii, as models have them.
def _ball(x, radius, *, profile=FLOAT64, epsilon=0.0, layer=True, digits=False):
    """The normalised rows as balls, with the radius of one operation after the other."""
    a, plain = Arithmetic(profile, digits), (np.ones(x.shape[-1]), np.zeros(x.shape[-1]))
    row, affine = a.ball(x, radius), tuple(a.exact(v) for v in plain)
    with np.errstate(all="ignore"):
        if layer:
            return family.layer_norm(a, row, *affine, epsilon), family.composed_layer_norm(a, row, *affine, epsilon)
        return family.rms_norm(a, row, epsilon), family.composed_rms_norm(a, row, epsilon)


def _normed(x, epsilon, layer):
    x = x - layer * x.mean(axis=-1, keepdims=True)
    root = np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon)
    return np.where(root > 0, x / np.where(root > 0, root, 1.0), 0.0)


def _worst_moves(x, radius, epsilon, layer):
    """Rows in the corners of the ball that move one output after the other as far as they can, and back."""
    for i in range(x.shape[-1]):
        for sign in (1, -1):
            corner = x
            for _ in range(2):
                y = _normed(corner, epsilon, layer)
                slope = (np.arange(x.shape[-1]) == i) - (layer + y[..., i : i + 1] * y) / x.shape[-1]
                corner = x + sign * np.sign(slope) * radius
                yield corner


def test_radii_by_hand() -> None:
    """What moves the mean and the root moves the quotient with them."""
    h = 2.0**-20
    # Root 2, y = (1/2, -1/2): row 1 of I - 11ᵀ/2 - yyᵀ/2 is (3/8, -3/8), over the root 3/16 each.
    ball, composed = _ball(np.array([[1.0, -1.0]]), np.array([[h, 3 * h]]), epsilon=3.0)
    np.testing.assert_allclose(ball.rad, [[0.75 * h, 0.75 * h]], rtol=1e-5)
    # Composed: 5/2 h by feature and mean, over 2; half the root's 5/2 h / 2, over 2.
    assert composed.rad[0, 0] == pytest.approx((2.5 + 0.5) * h / 2 + 0.5 * 4 * h / 4, rel=0.5)
    # Without a mean: y = (1, 1), row 1 of I - yyᵀ/2 is (1/2, -1/2).
    ball, composed = _ball(np.array([[4.0, 4.0]]), np.array([[h, 0.0]]), layer=False)
    np.testing.assert_allclose(ball.rad, [[h / 8, h / 8]], rtol=1e-5)
    assert composed.rad[0, 0] > 2 * ball.rad[0, 0]
    # (3, 4) and a radius of 1: the root is at least 5 / sqrt(2) less half of y = 3 sqrt(2) / 5.
    ball, _ = _ball(np.array([[3.0, 4.0]]), np.array([[1.0, 0.0]]), layer=False)
    y, least = 0.6 * np.sqrt(2), 4.4 / np.sqrt(2)
    by_hand = (1 - 0.36 + y * 0.5 / (2 * least)) / least
    assert ball.rad[0, 0] == pytest.approx(by_hand, rel=1e-9)


def test_what_rounds_in_a_moved_row_by_hand() -> None:
    """float32 less float64, in units of 2^-24: operation by operation, at the largest features and the least root."""
    narrow, wide, u = Profile("float32"), FLOAT64, 2.0**-24

    def units(profile, unit, other, *row, **options):
        made = [_ball(*row, profile=p, digits=True, **options)[0].rad[0, 0] for p in (profile, other)]
        return (made[0] - made[1]) / unit

    # x = (0, 1), radius (1/4, 0). y is 0 there and nothing moves the root, 1/sqrt(2), known to 5/sqrt(2): 1.768 on the
    # move sqrt(2)/4. (1/4, 1), formed twice, has 2 each; its power 4.25, the root 6.718; (0.5 + 6.718 move) over it,
    # once more.
    moved = np.array([[0.0, 1.0]]), np.array([[0.25, 0.0]])
    assert units(narrow, u, wide, *moved, layer=False) == pytest.approx(1.76777 + 4.41941, rel=1e-4)
    # One storage rounding of (1/4, 1) more, not the same in the moments: its power is off by 1.0625, the root by 1.503.
    fused, strict = (Profile("float16", name) for name in ("fused", "strict"))
    assert units(fused, 2.0**-11, strict, *moved, layer=False) == pytest.approx(1.10485, rel=1e-2)
    # (1, -1), radius (1/2, 0), epsilon 3: centred 1 or 1.25 at most, with 9.25 and 8.25; power 31.125, root 18.475 of
    # 1.875 at least; the quotient 0.60889 at most, 11.5418. y is known to 3.375 and the least root to 8.344: 1.0341 on
    # the move. Scale and bias round a quotient of 0.60889 each.
    moved = np.array([[1.0, -1.0]]), np.array([[0.5, 0.0]])
    by_hand = 11.54181 + 1.03411 + 2 * 0.608889
    assert units(narrow, u, wide, *moved, epsilon=3.0) == pytest.approx(by_hand, rel=1e-4)


ROWS = {
    "plain": lambda d: Draw(f"moved/{d}").dense(5, d),
    "near-constant": lambda d: 1 + 2.0**-20 * Draw(f"moved/constant/{d}").dense(5, d),
    "far": lambda d: 4096 + Draw(f"moved/far/{d}").dense(5, d),
    "outlier": lambda d: 64 * np.eye(5, d) + Draw(f"moved/outlier/{d}").dense(5, d),
    "tiny": lambda d: 2.0**-20 * Draw(f"moved/tiny/{d}").dense(5, d),
    "few-values": lambda d: Draw(f"moved/few/{d}").ternary(5, d),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("layer", [True, False])
def test_no_row_of_the_ball_leaves_the_bound(kind, layer) -> None:
    reached = []
    for d in (1, 2, 3, 7):
        x = ROWS[kind](d)
        centred = x - layer * x.mean(axis=-1, keepdims=True)
        spread = np.sqrt((centred * centred).mean(axis=-1, keepdims=True))
        for epsilon in (0.0, 0.25):
            for part in (2.0**-30, 2.0**-10, 0.125, 0.6):
                shapes = (1.0, np.abs(Draw(f"moved/{d}/{part}").dense(5, d)), np.eye(5, d))
                for radius in (part * np.maximum(spread, np.sqrt(epsilon)) * shape for shape in shapes):
                    ball, composed = _ball(x, radius, epsilon=epsilon, layer=layer)
                    assert (ball.rad <= composed.rad).all() and not np.isnan(ball.rad).any()
                    error = np.zeros(x.shape)
                    for corner in _worst_moves(x, radius, epsilon, layer):
                        moved = np.abs(_normed(corner, epsilon, layer) - ball.value)
                        error = np.maximum(error, moved)
                    assert (error <= ball.rad).all(), (d, epsilon, part)
                    if part == 2.0**-10 and kind == "plain" and d > 2 and radius.all():
                        reached.append(np.median(error / ball.rad))
    # The largest move fills it, where the radius is not large against the root.
    assert all(0.97 < share <= 1 for share in reached) and (reached or kind != "plain")


@pytest.mark.parametrize("layer", [True, False])
def test_wide_rows_stay_within(layer) -> None:
    x = Draw("moved/768").dense(2, 768)
    ball, composed = _ball(x, np.full(x.shape, 1e-3), epsilon=1e-12, layer=layer)
    for corner in islice(_worst_moves(x, 1e-3, 1e-12, layer), 40):
        assert (np.abs(_normed(corner, 1e-12, layer) - ball.value) <= ball.rad).all()
    assert np.median(ball.rad / composed.rad) < 0.75 and (ball.rad < composed.rad).all()


def _two_pass(x, epsilon, layer, keep, seen=None):
    """In float32, every operation kept; `seen` is what the moments are taken of, where that is not x."""
    f, d = np.float32, np.float32(x.shape[-1])

    def mean(v):
        total = np.zeros(v.shape[:-1], f)
        for i in range(v.shape[-1]):
            total = f(total + v[..., i])
        return keep(f(keep(total) / d))[..., None]

    seen = x if seen is None else seen
    middle = mean(seen) if layer else f(0)
    apart, centred = (keep(f(v - middle)) if layer else v for v in (seen, x))
    root = keep(np.sqrt(keep(f(mean(keep(f(apart * apart))) + f(epsilon)))))
    return keep(f(centred / root))


def _welford(x, epsilon, layer, keep, seen=None):
    """Mean and squares updated one feature after the other, in float32."""
    f = np.float32
    mean, squares = np.zeros(x.shape[:-1], f), np.zeros(x.shape[:-1], f)
    for i in range(x.shape[-1]):
        before = f(x[..., i] - mean)
        mean = f(mean + before / f(i + 1)) if layer else mean
        squares = f(squares + before * f(x[..., i] - mean))
    return f(f(x - mean[..., None]) / np.sqrt(squares / f(x.shape[-1]) + f(epsilon))[..., None])


@pytest.mark.parametrize("name", ["float32-strict", *(f"{d}-{p}" for d in ("float16", "bfloat16")
                                                      for p in ("strict", "fused", "eager"))])  # fmt: skip
@pytest.mark.parametrize("layer", [True, False])
def test_right_implementations_of_a_moved_row_stay_within(name, layer) -> None:
    """Rounding on top of the worst move: two passes either way round, Welford, moments of what is not stored yet."""
    profile = Profile(*name.split("-"))
    stored, epsilon = profile.dtype, 2.0**-12
    coarse = stored if profile.name != "strict" else "float32"

    def keep(v):
        return round_to(v, profile.elementary).astype(np.float32)

    for d in (2, 7):
        x = Draw(f"honest/{d}").grid(6, d) + np.array([[0.0], [8.0], [0.0], [-2.0], [0.5], [0.0]])
        x = round_to(x * np.ldexp(1.0, [[0], [0], [-7], [3], [0], [-3]]), stored)
        spread = np.sqrt(((x - layer * x.mean(-1, keepdims=True)) ** 2).mean(-1, keepdims=True) + epsilon)
        for part in (2.0**-18, 2.0**-9, 0.2):
            # Rounding of the inputs is part of their radius.
            radius = part * spread + 2 * (2.0**-9 if coarse == "bfloat16" else 2.0**-12) * np.abs(x)
            ball, _ = _ball(x, radius, profile=profile, epsilon=epsilon, layer=layer)
            due = ball.finished()
            for corner in _worst_moves(x, radius * (1 - 2.0**-20), epsilon, layer):
                near = round_to(corner, "float32")
                held = round_to(near, coarse)
                held = np.where(np.abs(held - x) <= radius, held, x)
                ways = [(_two_pass, held, None)]
                if profile.elementary == "float32":
                    ways += [(_welford, held, None)]
                if profile.name == "fused":
                    both = (np.abs(near - x) <= radius) & (held == round_to(near, coarse))
                    ways += [(_two_pass, held, np.where(both, near, held))]
                for way, given, seen in ways:
                    for turn in (slice(None), slice(None, None, -1)):
                        v = given[:, turn].astype(np.float32)
                        w = None if seen is None else seen[:, turn].astype(np.float32)
                        made = round_to(way(v, epsilon, layer, keep, w)[:, turn].astype(np.float64), stored)
                        assert (np.abs(made - due.value) <= due.rad).all(), (d, part, way)


def test_rows_without_radius_are_those_of_one_operation_after_the_other() -> None:
    x = np.concatenate([Draw("exact rows").dense(3, 5), np.full((1, 5), 3.0), np.zeros((1, 5))])
    radius = np.zeros_like(x)
    for digits in (False, True):
        for layer in (True, False):
            ball, composed = _ball(x, radius, layer=layer, digits=digits)
            assert np.array_equal(ball.rad, composed.rad) and np.array_equal(ball.value, composed.value)
            radius[0] = 2.0**-10
            some, _ = _ball(x, radius, layer=layer, digits=digits)
            # Rows have nothing to do with each other.
            assert np.array_equal(some.rad[1:], composed.rad[1:])
            assert (some.rad[0] > composed.rad[0]).all()
            radius[0] = 0.0


@pytest.mark.parametrize("layer", [True, False])
def test_a_row_that_may_be_all_zeros_or_constant_says_nothing(layer) -> None:
    x = np.zeros((1, 3)) + layer
    assert np.isinf(_ball(x, np.full((1, 3), 2.0**-30), layer=layer)[0].rad).all()
    # Epsilon holds the root.
    held, _ = _ball(x, np.full((1, 3), 2.0**-30), layer=layer, epsilon=0.25)
    assert (held.rad >= 2.0**-29).all() and (held.rad < 2.0**-27).all()
    lost, _ = _ball(np.array([[1.0, 2.0, 4.0]]), np.full((1, 3), np.inf), layer=layer)
    assert np.isinf(lost.rad).all()


def test_fifty_digits_have_the_same_radii() -> None:
    x = Draw("digits").dense(4, 6)
    for layer in (True, False):
        fast, slow = (_ball(x, 1e-4 * np.abs(x), layer=layer, digits=digits, epsilon=1e-7)[0] for digits in (0, 1))
        np.testing.assert_allclose(fast.rad, slow.rad, rtol=1e-9)
        assert slow.mid.dtype == object and np.abs(fast.value - slow.value).max() < 1e-15
