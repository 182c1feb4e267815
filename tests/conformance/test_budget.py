"""Ball arithmetic: literal radii, and honest low-precision evaluations that must stay inside."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance import budget
from conformance.budget import Arithmetic, Profile, einsum, gamma, round_to, softmax, where
from conformance.generate import Draw

F32 = Arithmetic(Profile("float32"), digits=True)
U32 = 2.0**-24


def test_round_to_is_a_single_correct_rounding():
    # 1 + 2^-8 + 2^-40 lies just above the middle of two bfloat16 numbers; through float32 it would tie to even.
    value = np.array([1 + 2.0**-8 + 2.0**-40])
    assert round_to(value, "bfloat16")[0] == 1 + 2.0**-7
    assert np.float32(value[0]).astype(ml_dtypes.bfloat16) == 1.0
    assert round_to(np.array([65520.0, -65519.0]), "float16").tolist() == [np.inf, -65504.0]
    assert round_to(np.array([2.0**-25, 2.0**-24]), "float16").tolist() == [0.0, 2.0**-24]


def test_gamma():
    assert gamma(3, 0.125) == pytest.approx(0.375 / 0.625)
    assert np.isinf(gamma(4, 0.125))


def test_midpoints_have_fifty_digits():
    third = F32.exact(1.0) / 3.0
    assert abs(third.mid[()] * 3 - 1) < budget.MP.mpf(10) ** -49
    assert third.value == 1 / 3


def test_product_radius_by_hand():
    a = F32.ball(3.0, 0.5)
    b = F32.ball(-2.0, 0.25)
    # |(3 +- .5)(-2 +- .25) + 6| <= .5*2.25 + 3*.25, then one rounding of at most 6 + 1.875 in magnitude.
    spread = 0.5 * 2.25 + 3 * 0.25
    rounding = U32 / (1 - U32) * (6 + spread)
    assert (a * b).rad[()] == pytest.approx(spread + rounding, rel=1e-12)


def test_quotient_by_an_uncertain_divisor_says_nothing():
    assert np.isinf((F32.exact(1.0) / F32.ball(1.0, 0.5)).rad)
    assert np.isinf((F32.exact(1.0) / F32.exact(0.0)).rad)
    assert (F32.exact(1.0) / F32.ball(1.0, 0.25)).rad == pytest.approx(0.25 / 0.75, rel=1e-6)


def test_contraction_counts_every_rounding():
    ones = F32.exact(np.ones(7))
    # seven products, six additions: at most 7 + 1 roundings on any path, magnitude 7.
    assert einsum("i,i->", ones, ones).rad == pytest.approx(float(gamma(8, U32)) * 7, rel=1e-9)
    assert einsum("i,i->", ones, ones, length=20).rad == pytest.approx(float(gamma(20, U32)) * 7, rel=1e-9)


def test_exact_movement_has_no_radius():
    x = F32.exact(Draw("move").grid(3, 5))
    for moved in (x[1:], x.reshape(5, 3), x.swapaxes(0, 1), -x, abs(x), budget.concatenate([x, x])):
        assert not moved.rad.any()
    assert not where(np.eye(3, 5, dtype=bool), x, 0.0).rad.any()


def test_log_of_a_ball_that_touches_zero_says_nothing():
    assert np.isinf(budget.log(F32.ball(1.0, 1.0)).rad)
    assert budget.log(F32.ball(1.0, 0.5)).rad == pytest.approx(np.log(2), rel=1e-5)


def test_overflow_in_the_storage_format_says_nothing():
    half = Arithmetic(Profile("float16", "eager"))
    assert np.isinf((half.exact(300.0) * 300.0).rad)
    assert np.isfinite((Arithmetic(Profile("float16")).exact(300.0) * 300.0).rad)


def test_fused_rounds_only_what_is_stored():
    strict, fused, eager = (Arithmetic(Profile("bfloat16", name)) for name in budget.PROFILES)
    assert strict.exact(3.0).stored().rad == 0
    assert fused.exact(3.0).stored().rad == pytest.approx(3 * 2.0**-8)
    assert (eager.exact(3.0) * 1.0).rad > 3 * 2.0**-8 > (fused.exact(3.0) * 1.0).rad


def test_masked_softmax_rows_are_exact_where_masked():
    mask = np.array([[True, False, True], [False, False, False]])
    weights = softmax(F32.exact(np.array([[0.0, 9.0, 0.0], [1.0, 2.0, 3.0]])), mask)
    assert weights.value.tolist() == [[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]
    assert weights.rad[0, 1] == 0 and not weights.rad[1].any() and weights.rad[0, 0] > 0


FUNCTIONS = {
    "exp": (budget.exp, np.exp),
    "sqrt": (lambda x: budget.sqrt(abs(x)), lambda x: np.sqrt(np.abs(x))),
    "log": (lambda x: budget.log(abs(x) + 0.5), lambda x: np.log(np.abs(x) + type(x[0, 0])(0.5))),
    "silu": (budget.silu, lambda x: x / (1 + np.exp(-x))),
    "tanh": (budget.tanh, np.tanh),
    "sigmoid": (budget.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
    "sin": (budget.sin, np.sin),
    "square-sum": (lambda x: (x * x).sum(-1), lambda x: (x * x).sum(-1)),
    "matmul": (lambda x: x @ x.swapaxes(0, 1), lambda x: x @ x.T),
    "power": (lambda x: budget.power(abs(x) + 1.0, 1.7), lambda x: (np.abs(x) + 1) ** type(x[0, 0])(1.7)),
    "softmax": (
        lambda x: softmax(x * 8.0, np.ones(x.shape, bool)),
        lambda x: (
            np.exp(8 * x - (8 * x).max(-1, keepdims=True))
            / np.exp(8 * x - (8 * x).max(-1, keepdims=True)).sum(-1, keepdims=True)
        ),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("digits", [False, True])
def test_float32_evaluations_stay_inside(name, digits):
    ball_function, float_function = FUNCTIONS[name]
    x = Draw(f"honest/{name}").dense(5, 7, exponent=2)
    ball = ball_function(Arithmetic(Profile("float32"), digits).exact(x)).finished()
    error = np.abs(float_function(x.astype(np.float32)).astype(np.float64) - ball.value)
    assert (error <= ball.rad).all()
    # And the bound is not idle: at most a few hundred times what this evaluation does.
    assert ball.rad.max() < 1e-3 * np.abs(ball.value).max()


@pytest.mark.parametrize("name", ["exp", "silu", "tanh", "sigmoid", "square-sum", "matmul"])
@given(seed=st.integers(0, 1000))
@settings(max_examples=20)
def test_eager_bfloat16_stays_inside_the_eager_bound(name, seed):
    """Round after every operation, as a 16-bit framework without fusion does."""
    x = Draw(f"eager/{seed}").grid(3, 5)

    def keep(v):
        return round_to(np.asarray(v, np.float64), "bfloat16")

    computed = {
        "exp": lambda: keep(np.exp(x)),
        "silu": lambda: keep(x / keep(1 + keep(np.exp(-x)))),
        "tanh": lambda: keep(np.tanh(x)),
        "sigmoid": lambda: keep(1 / keep(1 + keep(np.exp(-x)))),
        "square-sum": lambda: keep(keep(x * x).sum(-1)),
        "matmul": lambda: keep(x @ x.T),
    }[name]()
    ball = FUNCTIONS[name][0](Arithmetic(Profile("bfloat16", "eager")).exact(x)).finished()
    assert (np.abs(computed - ball.value) <= ball.rad).all()


@given(st.integers(0, 1000), st.sampled_from([1, 2, 3, 5]))
@settings(max_examples=20)
def test_float64_midpoints_agree_with_fifty_digits(seed, size):
    x = Draw(f"two/{seed}").dense(size, 4, bits=53)
    profile = Profile("float64", "strict", "A64")
    fast, slow = (FUNCTIONS["softmax"][0](Arithmetic(profile, d).exact(x)).finished() for d in (False, True))
    assert (np.abs(fast.value - slow.value) <= fast.rad).all()


def test_what_is_lost_stays_lost():
    """0 times an infinite radius is not NaN, which would accuse every implementation."""
    lost = F32.exact(1.0) / F32.exact(0.0)
    for ball in (lost * 0.0, einsum("i,i->", lost.reshape(1), np.zeros(1)), budget.tanh(lost * 1e30), budget.sin(lost)):
        assert np.isinf(ball.rad)
    assert np.isinf(softmax(F32.ball(np.array([0.0, -800.0]), np.inf), np.ones(2, bool)).rad).all()
    with pytest.raises(ValueError, match="negative"):
        F32.ball(1.0, -1.0)


@pytest.mark.parametrize("name", ["eager", "fused"])
def test_an_intermediate_that_overflows_says_nothing(name):
    """Scores of 131072 do not fit float16; dividing them afterwards does not bring them back."""
    row = Arithmetic(Profile("float16", name)).exact(np.full((1, 8), 128.0))
    assert np.isinf(((row @ row.swapaxes(0, 1)).stored() / 16.0).rad)


def test_a_partial_sum_that_overflows_says_nothing():
    assert np.isinf(F32.exact(np.array([3e38, 3e38, -3e38, -3e38])).sum(0).rad)


def test_flattened_axes_are_one_long_sum():
    """1600 equal terms added one by one drift further than 40 + 40 roundings."""
    term = np.float32(0.9)
    terms = np.full((40, 40), term)
    total = np.cumsum(terms.ravel(), dtype=np.float32)[-1]
    ball = einsum("ij,ij->", F32.exact(terms.astype(np.float64)), np.ones((40, 40)))
    assert float(gamma(81, U32)) * 1600 * float(term) < abs(float(total) - ball.value) <= ball.rad


def test_an_axis_that_broadcasts_counts_its_terms():
    one, other = F32.exact(np.ones((2, 1))), F32.exact(np.ones((5, 3)))
    assert (einsum("ij,jk->ik", other.swapaxes(0, 1), one.reshape(1, 2)).rad >= float(gamma(6, U32)) * 5).all()


def test_constants_are_written_in_the_working_format():
    x, c = Draw("constant").dense(50) + 1.5, 1.3
    ball = F32.exact(x.astype(np.float32).astype(np.float64)) * c
    assert (np.abs((x.astype(np.float32) * np.float32(c)).astype(np.float64) - ball.value) <= ball.rad).all()
    assert not F32.exact(0.375).rad and not F32.exact(-np.inf).rad and F32.exact(0.1).rad > 0
    # NumPy's float16 arrays meet a Python number in float16.
    half = Arithmetic(Profile("float16", "eager"))
    assert half.exact(0.1).rad >= abs(float(np.float16(0.1)) - 0.1) and np.isinf(half.exact(1e5).rad)
    assert not Arithmetic(Profile("float16")).exact(2049.0).rad < half.exact(2049.0).rad == 0


def test_double_precision_underflows_too():
    """Weights below the smallest normal double: a right softmax is off by part of the spacing."""
    scores = np.array([0.0, *np.linspace(-745.0, -700.0, 91)])
    ball = softmax(Arithmetic(Profile("float64", "strict", "A64"), True).exact(scores), np.ones(92, bool)).finished()
    weights = np.exp(scores) / np.exp(scores).sum()
    assert (np.abs(weights - ball.value) <= ball.rad).all() and ball.rad.min() > 0


@pytest.mark.parametrize("digits", [False, True])
def test_logistic_functions_far_below_zero(digits):
    """(1 + tanh(x / 2)) / 2 cancels there, and so would the radius."""
    x = np.array([-5.0, -6.375, -20.0, -36.0, -38.0, -80.0])
    arithmetic = Arithmetic(Profile("float64", "strict", "A64"), digits)
    right = np.exp(x) / (1 + np.exp(x))
    for function, expected in ((budget.sigmoid, right), (budget.silu, x * right)):
        ball = function(arithmetic.exact(x)).finished()
        assert (np.abs(expected - ball.value) <= ball.rad).all()
        assert (ball.rad <= 1e-13 * np.abs(expected)).all()


def every(dtype, limit):
    """Every number of a 16-bit format up to `limit`."""
    words = np.arange(1 << 16, dtype=np.uint16)
    values = words.view({"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]).astype(np.float64)
    return values[np.abs(values) <= limit][::7]


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 60.0), ("float16", 16.0)])
def test_an_eager_logistic_inside_a_chain(dtype, limit):
    """Exponential, sum, quotient and product each rounded; exp(16) overflows float16, the quotient underflows."""
    x = every(dtype, limit)

    def keep(v):
        return round_to(np.asarray(v, np.float64), dtype)

    arithmetic = Arithmetic(Profile(dtype, "eager"), digits=True)
    small = keep(np.exp(-np.abs(x)))
    naive, stable = keep(1 / keep(1 + keep(np.exp(-x)))), keep(np.where(x >= 0, 1.0, small) / keep(1 + small))
    gate, gated = budget.sigmoid(arithmetic.exact(x)), budget.silu(arithmetic.exact(x))
    for formed in (naive, stable):
        assert (np.abs(formed - gate.value) <= gate.rad).all()
        assert (np.abs(keep(x * formed) - gated.value) <= gated.rad).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_eager_power_by_exponential_and_logarithm(dtype):
    x = every(dtype, 16.0)
    x = x[x > 2.0**-9]

    def keep(v):
        return round_to(np.asarray(v, np.float64), dtype)

    for exponent in (0.5, 2.0):
        ball = budget.power(Arithmetic(Profile(dtype, "eager")).exact(x), exponent).finished()
        assert (np.abs(keep(np.exp(keep(exponent * keep(np.log(x))))) - ball.value) <= ball.rad).all()


def test_a_power_permits_a_libm_logarithm():
    """4 ulp of a logarithm are 8 u of the exponent, which the exponential multiplies by its size."""
    x = 1e-30
    ball = budget.power(F32.exact(np.array(x)), 1.0)
    assert abs(np.exp(np.log(x) * (1 + 8 * U32)) - x) <= ball.rad


def test_softmax_counts_both_exponentials():
    """Every exponential 8 u off, the numerator's one way and the others' the other way."""
    scores = np.zeros(2)
    off = (1 + 8 * U32) / ((1 + 8 * U32) + (1 - 8 * U32)), 1 / (1 + (1 - 16 * U32) * (1 - U32) ** 6)
    ball = softmax(F32.exact(scores), np.ones(2, bool))
    assert all(abs(o - 0.5) <= ball.rad[0] for o in off) and ball.rad[0] >= 0.5 * float(gamma(2 + 6 + 16, U32)) * 0.999


def test_a_sum_that_begins_with_the_bias_is_within_the_bound():
    """b + x_1 w_1 + ... one by one: every addition rounds a number of the bias's size (GEMM with beta = 1)."""
    n, profile = 64, Profile("float32")
    x, w = np.full((1, n), 2.0**-25), np.ones((n, 1))
    b = np.array([1.0])
    total = np.float32(1)
    for i in range(n):
        total = np.float32(total + np.float32(x[0, i]) * np.float32(w[i, 0]))
    made = budget.affine(*(Arithmetic(profile).exact(v) for v in (x, w)), Arithmetic(profile).exact(b))
    error = abs(float(total) - float(made.value[0, 0]))
    # No addition moves the 1; one rounding of the whole, and of a sum of 2^-19, would not cover that.
    assert 2.0**-20 < error <= made.rad[0, 0]


def test_softmax_mean_by_hand():
    # Weights w and 1 - w, values 1 and 0: both exp(d) - 1 are at most e - 1, the sum of weights at least 1/e.
    double, w = Arithmetic(Profile("float64", "strict", "A64")), 1 / (1 + np.exp(6.0))
    scores, values = double.exact(np.array([[-6.0, 0.0]])), double.exact(np.array([[1.0], [0.0]]))
    seen = np.ones((1, 2), bool)
    rad = budget.softmax_mean(scores, np.ones((1, 2)), seen, values).item()
    assert rad == pytest.approx(2 * w * (1 - w) * (np.e - 1) * np.e, rel=1e-9)
    # One score up, the other down. Without the fall of the sum, the bound would be too small.
    assert rad / np.e < w * np.e / (w * np.e + (1 - w) / np.e) - w <= rad
    # Values off by 1/2 and 1/4, where no score is.
    values = double.ball(values.mid, np.array([[0.5], [0.25]]))
    still = budget.softmax_mean(scores, np.zeros((1, 2)), seen, values).item()
    assert still == pytest.approx(0.5 * w + 0.25 * (1 - w), rel=1e-12)


def test_softmax_mean_rounds_at_what_is_held():
    # Four equal weights, values 8: 4 + 6 roundings and two exponentials of 8 u, and 2 u times twice what the scores,
    # all of them alike, are off; then a sum of four products.
    scores, values = F32.ball(np.zeros((1, 4)), 1.0), F32.exact(np.full((4, 1), 8.0))
    rad = budget.softmax_mean(scores, np.zeros((1, 4)), np.ones((1, 4), bool), values).item()
    assert rad == pytest.approx((10 + 16 + 4) * 8 * U32 + 5 * 8 * U32, rel=1e-4)
