"""RoPE against figures of Hugging Face transformers 5.23.0, 50-digit arithmetic, hand calculation and its laws."""

import functools

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.budget import Arithmetic, Profile, concatenate, cos, sin
from conformance.ops import rope as judged
from refimpl.check import DomainError, ShapeError
from refimpl.ops import rope
from tests.golden import collection

TRANSFORMERS = ("llama_basic", "llama_gqa_offset", "gptj_full", "gptj_partial_offset")
ROTATIONS = [rope.rotate_interleaved, rope.rotate_half_split, rope.rotate_proportional]


def numbers(*shape, seed=0):
    """Deterministic numbers in (-1, 1) without a random generator."""
    return np.sin(1.7 * np.arange(1, np.prod(shape, dtype=int) + 1) ** 1.3 + seed).reshape(shape)


def angles_of(positions, width, base=10000.0):
    return rope.angles(np.asarray(positions), rope.frequencies(width, base=base))


# Frequencies


def test_frequencies_are_powers_of_the_base():
    np.testing.assert_allclose(rope.frequencies(6, base=1000.0), [1.0, 0.1, 0.01], rtol=1e-15)
    np.testing.assert_allclose(rope.frequencies(4, base=65536.0), [1.0, 1 / 256], rtol=0)


def test_width_two_turns_one_radian_per_position_for_any_base():
    assert rope.frequencies(2, base=7.0).tolist() == [1.0]


def test_width_zero_has_no_frequencies():
    assert rope.frequencies(0, base=10000.0).shape == (0,)
    assert rope.frequencies_ntk(0, base=10000.0, factor=2.0).shape == (0,)
    assert yarn(width=0).shape == (0,)


def test_linear_scaling_divides_the_position():
    # transformers 5.23.0, rope_type linear.
    scaled = rope.frequencies_linear(6, base=1000.0, factor=4.0)
    np.testing.assert_allclose(scaled, [0.25, 0.025, 0.0025], rtol=1e-15)
    np.testing.assert_allclose(rope.angles(np.array([12]), scaled), [[3.0, 0.3, 0.03]], rtol=1e-15)


def test_ntk_keeps_the_fastest_pair_and_divides_the_slowest_by_the_factor():
    # base 10, width 6: plain frequencies 1, 10^(-1/3), 10^(-2/3); the new base is 10 * 8^(6/4).
    expected = [1.0, 10 ** (-1 / 3) / 8**0.5, 10 ** (-2 / 3) / 8]
    np.testing.assert_allclose(rope.frequencies_ntk(6, base=10.0, factor=8.0), expected, rtol=1e-14)


def test_dynamic_ntk_equals_transformers_past_the_training_length():
    got = rope.frequencies_dynamic_ntk(10, base=10000.0, factor=2.0, length=192, max_length=64)
    expected = [1.0, 0.10598819702863693, 0.011233496479690075, 0.0011906177969649434, 0.00012619145854841918]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("length", [1, 63, 64])
def test_dynamic_ntk_leaves_lengths_up_to_the_training_length_exactly_alone(length):
    # 1.1 * n / n - 0.1 is not 1 in floating point: the test of equality is exact on purpose.
    got = rope.frequencies_dynamic_ntk(10, base=10000.0, factor=1.1, length=length, max_length=64)
    assert (got == rope.frequencies(10, base=10000.0)).all()


def test_dynamic_ntk_is_continuous_at_the_training_length():
    got = rope.frequencies_dynamic_ntk(10, base=10000.0, factor=8.0, length=1000001, max_length=1000000)
    np.testing.assert_allclose(got, rope.frequencies(10, base=10000.0), rtol=2e-5)


def yarn(*, width=16, base=1e4, factor=4.0, original_length=1024, beta_fast=32.0, beta_slow=1.0):
    return rope.frequencies_yarn(
        width, base=base, factor=factor, original_length=original_length, beta_fast=beta_fast, beta_slow=beta_slow
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # transformers 5.23.0, rope_type yarn, float32.
        (
            {},
            [
                1.0,
                0.31622776389,
                0.0812500044703,
                0.0197642371058,
                0.0043750000186,
                7.905694656e-4,
                2.5e-4,
                7.9056947e-5,
            ],
        ),
        # The unclamped ramp would begin at index -1 here.
        (
            {"original_length": 64, "factor": 8.0},
            [
                1.0,
                0.2239946573973,
                0.0416666641831,
                0.003952847328,
                0.00124999997,
                3.952847328e-4,
                1.25e-4,
                3.9528473e-5,
            ],
        ),
        (
            {"width": 12, "base": 5e5, "factor": 8.0, "original_length": 4096, "beta_fast": 16.0, "beta_slow": 2.0},
            [1.0, 0.112246192992, 0.00708705466241, 1.7677668e-4, 1.98425077542e-5, 2.2272474780e-6],
        ),
    ],
    ids=["plain", "clamped", "other-betas"],
)
def test_yarn_equals_transformers(arguments, expected):
    np.testing.assert_allclose(yarn(**arguments), expected, rtol=1e-6)


def test_yarn_upper_index_is_clamped_to_width_minus_one():
    # base 2, width 8: t(1) = 8 ln(1024 / 2 pi) / (2 ln 2) = 29.4, clamped to 7; t(500) = -6.5, clamped to 0.
    theta = 2.0 ** (-np.arange(4) / 4)
    m = 1 - np.arange(4) / 7
    np.testing.assert_allclose(
        yarn(width=8, base=2.0, factor=10.0, beta_fast=500.0), theta * (m + (1 - m) / 10), rtol=1e-14
    )


def test_yarn_with_an_empty_ramp_steps_after_its_lower_index():
    # original_length below one turn: lo = 0 and hi <= 0, so that only the fastest pair keeps its frequency.
    theta = rope.frequencies(16, base=1e4)
    np.testing.assert_allclose(yarn(original_length=5), np.r_[theta[0], theta[1:] / 4], rtol=1e-14)
    # Every pair turns more than beta_fast times: nothing is interpolated, although lo > hi = width - 1.
    np.testing.assert_allclose(yarn(width=4, base=1.1, original_length=10**6), 1.1 ** (-np.arange(2) / 2), rtol=1e-14)


def test_yarn_magnitude():
    # transformers 5.23.0 gives 1.138629436111989 for factor 4.
    assert rope.yarn_magnitude(4.0) == pytest.approx(1.138629436111989, rel=1e-15)
    assert rope.yarn_magnitude(1.0) == 1.0
    assert rope.yarn_magnitude(0.25) == 1.0


# Angles


def test_angles_take_integers_reals_and_negative_positions_of_any_shape():
    positions = np.array([[0.0, -2.0, 0.1], [3.0, 4.0, 7.0]])
    got = rope.angles(positions, np.array([1.0, 0.25]))
    np.testing.assert_array_equal(got[..., 0], positions)
    np.testing.assert_array_equal(got[..., 1], positions / 4)
    assert rope.angles(np.array(3), np.array([1.0, 0.25])).tolist() == [3.0, 0.75]
    assert rope.angles(np.zeros((2, 0), int), np.array([1.0, 0.25])).shape == (2, 0, 2)


def test_long_positions_keep_nine_digits():
    """cos and sin of float64 angles against 50 digits, to position 2^20."""
    mpmath.mp.dps = 50
    for base in (10000.0, 500000.0):
        positions = np.array([1, 4095, 131071, 2**20 - 1, 2**20])
        got = angles_of(positions, 128, base)
        for row, p in enumerate(positions):
            exact = [mpmath.mpf(int(p)) * mpmath.power(base, mpmath.mpf(-2 * i) / 128) for i in range(64)]
            relative = [abs(mpmath.mpf(float(a)) / e - 1) for a, e in zip(got[row], exact, strict=True)]
            assert max(relative) < 2**-52 * (1 + np.log(base))
            assert max(abs(np.cos(a) - mpmath.cos(e)) for a, e in zip(got[row], exact, strict=True)) < 1e-9
            assert max(abs(np.sin(a) - mpmath.sin(e)) for a, e in zip(got[row], exact, strict=True)) < 1e-9


# Rotations


class Transformers:
    """One file of transformers' rotations, heads behind tokens."""

    def __init__(self, name):
        self.arrays = collection.load("hf_rotary", name)
        self.llama = name.startswith("llama")
        self.rotate = rope.rotate_half_split if self.llama else rope.rotate_interleaved
        self.width = self.arrays["q"].shape[-1] if self.llama else int(self.arrays["rotary_dim"])
        self.base, self.positions = float(self.arrays["theta"]), self.arrays["position_ids"]

    def heads(self, name):
        return self.arrays[name].swapaxes(1, 2) if self.llama else self.arrays[name]

    def table(self, name):
        half = self.width // 2
        if self.llama:
            np.testing.assert_array_equal(self.arrays[name][..., :half], self.arrays[name][..., half:])
        return self.arrays[name][..., :half]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_rotations_equal_transformers(name):
    case = Transformers(name)
    phi = angles_of(case.positions, case.width, case.base)[..., None, :]
    for part in "qk":
        x, expected = case.heads(part), case.heads(f"{part}_out_float64")
        np.testing.assert_allclose(rope.rotate_contiguous(x, phi, case.rotate), expected, atol=1e-13, rtol=0)
        if case.width == x.shape[-1]:
            np.testing.assert_allclose(case.rotate(x, phi), expected, atol=1e-13, rtol=0)
    # The rest is float32's.
    assert case.arrays.left == {"cos", "sin", "q_out", "k_out"} | ({"inv_freq"} if case.llama else set())


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_in_float32_errs_as_float32_may(name):
    """Its frequencies, angles, tables and results in float32, each within the bound of the judge."""
    case, arithmetic = Transformers(name), Arithmetic(Profile("float32", "strict", "A32"))

    def within(found, ball):
        assert np.max(np.abs(found - ball.value) / ball.finished().rad) < 1

    phi = judged.angle(arithmetic, case.positions, judged.powers(case.width, case.base))
    for part in ("cos", "sin"):
        within(case.table(part), {"cos": cos, "sin": sin}[part](phi))
    layout = "half_split" if case.llama else "interleaved"
    for part in "qk":
        x = arithmetic.exact(case.heads(part))
        positions = case.positions[..., None]
        ball = judged.rotate(arithmetic, x, positions, case.base, layout=layout, rotary_width=case.width)
        within(case.heads(f"{part}_out"), ball)
    if case.llama:
        theta = case.arrays["inv_freq"]
        within(theta, judged.frequencies(arithmetic, case.width, case.base))
        # From its own frequencies on, only roundings are left: of the angle, of its sine and cosine, of the result.
        own = arithmetic.exact(theta) * case.positions[..., None].astype(float)
        turned = rope.angles(case.positions, theta)[..., None, :]
        for part in ("cos", "sin"):
            within(case.table(part), {"cos": cos, "sin": sin}[part](own))
        for part in "qk":
            first, second = (arithmetic.exact(half) for half in np.split(case.heads(part), 2, axis=-1))
            c, s = cos(own)[..., None, :], sin(own)[..., None, :]
            ball = concatenate([first * c - second * s, first * s + second * c])
            np.testing.assert_allclose(case.rotate(case.heads(part), turned), ball.value, rtol=0, atol=1e-13)
            within(case.heads(f"{part}_out"), ball)


def test_every_file_of_transformers_is_reproduced_and_the_copies_are_copies():
    assert collection.collected("hf_rotary") == set(TRANSFORMERS)
    assert not collection.differing_copies("hf_rotary")


def test_quarter_and_half_turns_by_hand():
    x = np.array([1.0, 2.0, 3.0, 5.0, 7.0, 11.0])
    phi = np.array([np.pi / 2, np.pi, 0.0])
    np.testing.assert_allclose(rope.rotate_interleaved(x, phi), [-2.0, 1.0, -3.0, -5.0, 7.0, 11.0], atol=1e-14)
    np.testing.assert_allclose(rope.rotate_half_split(x, phi), [-5.0, -2.0, 3.0, 1.0, -7.0, 11.0], atol=1e-14)
    np.testing.assert_allclose(rope.rotate_proportional(x, phi[:2]), [-5.0, -2.0, 3.0, 1.0, -7.0, 11.0], atol=1e-14)
    np.testing.assert_allclose(rope.rotate_proportional(x, phi[:1]), [-5.0, 2.0, 3.0, 1.0, 7.0, 11.0], atol=1e-14)
    contiguous = functools.partial(rope.rotate_contiguous, x, phi[:2])
    np.testing.assert_allclose(contiguous(rope.rotate_interleaved), [-2.0, 1.0, -3.0, -5.0, 7.0, 11.0], atol=1e-14)
    np.testing.assert_allclose(contiguous(rope.rotate_half_split), [-3.0, -2.0, 1.0, -5.0, 7.0, 11.0], atol=1e-14)


def test_interleaved_is_multiplication_by_a_unit_complex_number():
    x, positions = numbers(2, 5, 3, 14), np.array([[0, 1, 2, 3, 4], [9, 9, 100, 2, 1]])
    phi = angles_of(positions, 14)[..., None, :]
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * phi)
    expected = np.empty_like(x)
    expected[..., 0::2], expected[..., 1::2] = turned.real, turned.imag
    np.testing.assert_allclose(rope.rotate_interleaved(x, phi), expected, atol=1e-14)


@pytest.mark.parametrize("rotate", ROTATIONS)
def test_position_zero_width_zero_and_no_tokens_change_nothing(rotate):
    x = numbers(2, 3, 10)
    assert (rotate(x, np.zeros((3, 5))) == x).all()
    assert rotate(numbers(2, 3, 0), np.zeros((3, 0))).shape == (2, 3, 0)
    assert rotate(np.zeros((2, 0, 10)), np.zeros((0, 5))).shape == (2, 0, 10)


def test_partial_rotations_pass_the_rest_through_exactly():
    x, phi = numbers(3, 10), angles_of([4, 5, 6], 4)
    assert (rope.rotate_contiguous(x, phi, rope.rotate_interleaved)[:, 4:] == x[:, 4:]).all()
    proportional = rope.rotate_proportional(x, phi)
    assert (proportional[:, [2, 3, 4, 7, 8, 9]] == x[:, [2, 3, 4, 7, 8, 9]]).all()
    assert (proportional[:, [0, 1, 5, 6]] != x[:, [0, 1, 5, 6]]).all()
    assert (rope.rotate_contiguous(x, np.zeros((3, 0)), rope.rotate_half_split) == x).all()
    assert (rope.rotate_proportional(x, np.zeros((3, 0))) == x).all()


def test_an_odd_rest_passes_through_a_contiguous_rotation():
    x = numbers(3, 7)
    y = rope.rotate_contiguous(x, angles_of([1, 2, 3], 4), rope.rotate_half_split)
    assert y.shape == x.shape
    assert (y[:, 4:] == x[:, 4:]).all()


def test_proportional_equals_half_split_with_resting_pairs():
    """Frequencies as the `proportional` type of transformers 5.23.0 gives them for width 16, half rotated."""
    theta = np.array([1.0, 0.3162277638912201, 0.10000000149011612, 0.03162277862429619, 0.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(rope.frequencies(16, base=10000.0)[:4], theta[:4], rtol=1e-7)
    x, positions = numbers(5, 16), np.array([0, 1, 7, 30, 1000])
    whole = rope.rotate_half_split(x, rope.angles(positions, theta))
    np.testing.assert_array_equal(rope.rotate_proportional(x, rope.angles(positions, theta[:4])), whole)


def test_arguments_are_not_modified():
    x, phi = numbers(3, 10), angles_of([4, 5, 6], 10)
    kept = x.copy(), phi.copy()
    for rotate in ROTATIONS:
        rotate(x, phi)
    rope.rotate_contiguous(x, phi, rope.rotate_interleaved)
    assert (x == kept[0]).all()
    assert (phi == kept[1]).all()


positions = st.integers(-(2**15), 2**15)


@pytest.mark.parametrize("rotate", ROTATIONS)
@settings(max_examples=25, deadline=None)
@given(p=positions, q=positions, half=st.integers(1, 8), seed=st.integers(0, 1000))
def test_rotations_compose_and_keep_the_relative_position(rotate, p, q, half, seed):
    phi = functools.partial(angles_of, width=2 * half)
    x, y = numbers(2 * half, seed=seed), numbers(2 * half, seed=seed + 7)
    # The float64 angle of position 2^15 is off by at most 2^15 * 2^-52 * 10.
    np.testing.assert_allclose(rotate(rotate(x, phi(p)), phi(q)), rotate(x, phi(p + q)), atol=1e-9)
    np.testing.assert_allclose(rotate(rotate(x, phi(p)), -phi(p)), x, atol=1e-14)
    score = rotate(x, phi(p)) @ rotate(y, phi(q))
    np.testing.assert_allclose(score, x @ rotate(y, phi(q - p)), atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(rotate(x, phi(p))), np.linalg.norm(x), rtol=1e-14)


def attended(values, positions, weights, unrotate):
    """o_p = sum_m a_pm R_m v_m, taken back by R_(-p) where asked."""
    phi = angles_of(positions, values.shape[-1])
    out = weights @ rope.rotate_interleaved(values, phi)
    return rope.rotate_interleaved(out, -phi) if unrotate else out


def test_rotated_values_are_shift_invariant_only_after_rotating_back():
    values, weights = numbers(5, 6), np.abs(numbers(5, 5, seed=3))
    here = functools.partial(attended, values, np.arange(5), weights)
    there = functools.partial(attended, values, np.arange(5) + 11, weights)
    np.testing.assert_allclose(here(True), there(True), atol=1e-13)
    assert np.abs(here(False) - there(False)).max() > 0.1


def test_a_scale_per_feature_does_not_commute_with_a_rotation():
    x, gamma, phi = numbers(6), np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), angles_of(3, 6)
    assert np.abs(rope.rotate_interleaved(gamma * x, phi) - gamma * rope.rotate_interleaved(x, phi)).max() > 0.1


# Layouts


def test_orders_by_hand_and_their_inverse():
    assert rope.half_split_order(6).tolist() == [0, 2, 4, 1, 3, 5]
    assert rope.interleaved_order(6).tolist() == [0, 3, 1, 4, 2, 5]
    assert rope.half_split_order(0).tolist() == []
    for width in (2, 10, 26):
        inverse = np.argsort(rope.half_split_order(width))
        assert (rope.interleaved_order(width) == inverse).all()


def test_half_split_of_permuted_features_is_the_permuted_interleaved_rotation():
    x, phi, order = numbers(3, 14), angles_of([0, 5, 77], 14), rope.half_split_order(14)
    np.testing.assert_array_equal(rope.rotate_half_split(x[:, order], phi), rope.rotate_interleaved(x, phi)[:, order])


def test_permute_projection_by_hand():
    # Two heads of width 5, rotary width 4: feature 4 of each head stays.
    weight = np.arange(10.0) + np.array([[0.0], [100.0], [200.0]])
    got = rope.permute_projection(weight, heads=2, order=rope.half_split_order(4))
    assert got[0].tolist() == [0, 2, 1, 3, 4, 5, 7, 6, 8, 9]
    assert got[2].tolist() == [200, 202, 201, 203, 204, 205, 207, 206, 208, 209]
    assert rope.permute_projection(weight[0], heads=2, order=[0, 2, 1, 3]).tolist() == got[0].tolist()


@pytest.mark.parametrize("rotary", [14, 10])
def test_permuted_grouped_query_projections_give_the_same_scores(rotary):
    """Six query heads on two key heads of width 14: 6/2 is not 2, so that a wrong head count shows."""
    tokens, width, heads, key_heads = numbers(5, 11), 14, 6, 2
    w_q, b_q = numbers(11, heads * width, seed=1), numbers(heads * width, seed=2)
    w_k, b_k = numbers(11, key_heads * width, seed=3), numbers(key_heads * width, seed=4)
    phi = angles_of([0, 1, 2, 9, 10], rotary)[:, None, :]
    order = rope.half_split_order(rotary)

    def scores(rotate, permute):
        def projected(weight, bias, count):
            if permute:
                weight = rope.permute_projection(weight, heads=count, order=order)
                bias = rope.permute_projection(bias, heads=count, order=order)
            return rope.rotate_contiguous((tokens @ weight + bias).reshape(5, count, width), phi, rotate)

        keys = projected(w_k, b_k, key_heads).repeat(heads // key_heads, axis=1)
        return np.einsum("nhd,mhd->hnm", projected(w_q, b_q, heads), keys)

    expected = scores(rope.rotate_interleaved, permute=False)
    np.testing.assert_allclose(scores(rope.rotate_half_split, permute=True), expected, atol=1e-12)
    assert np.abs(scores(rope.rotate_half_split, permute=False) - expected).max() > 0.1


@pytest.mark.parametrize("biased", [True, False])
def test_permuted_gau_gives_the_same_scores_and_gates(biased):
    d, e, s = 7, 13, 10
    tokens, w_in, b_in = numbers(5, d), numbers(d, 2 * e + s, seed=1), numbers(2 * e + s, seed=2)
    gamma, beta = numbers(2, s, seed=3), numbers(2, s, seed=4)
    phi = angles_of([0, 1, 2, 9, 10], s)

    def outputs(weights, rotate):
        hidden = tokens @ weights.w_in + (0 if weights.b_in is None else weights.b_in)
        shared = hidden[:, 2 * e :]
        q, k = (
            (rotate(shared * g + o, phi) for g, o in zip(weights.gamma, weights.beta, strict=True))
            if biased
            else (rotate(shared * g, phi) for g in weights.gamma)
        )
        return hidden[:, : 2 * e], q @ k.T

    plain = rope.PermutedGau(w_in, b_in if biased else None, gamma, beta if biased else None)
    moved = rope.permute_gau(*plain, s=s, order=rope.half_split_order(s))
    expected = outputs(plain, rope.rotate_interleaved)
    got = outputs(moved, rope.rotate_half_split)
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_allclose(got[1], expected[1], atol=1e-13)
    assert (moved.b_in is None) == (moved.beta is None) == (not biased)


def test_permute_gau_by_hand():
    got = rope.permute_gau(
        np.arange(6.0)[None],
        np.arange(6.0) + 10,
        np.array([[1.0, 2.0, 3.0, 4.0]]),
        np.array([[5.0, 6.0, 7.0, 8.0]]),
        s=4,
        order=[0, 2, 1, 3],
    )
    assert got.w_in.tolist() == [[0, 1, 2, 4, 3, 5]]
    assert got.b_in.tolist() == [10, 11, 12, 14, 13, 15]
    assert got.gamma.tolist() == [[1, 3, 2, 4]]
    assert got.beta.tolist() == [[5, 7, 6, 8]]


# Errors

_X, _PHI = np.ones((5, 3, 6)), np.zeros((5, 3))
_GAU = (np.ones((2, 9)), np.ones(9), np.ones((2, 4)), np.ones((2, 4)))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: rope.frequencies(5, base=10.0), DomainError, "rope.frequencies: expected an even rotary width"),
        (lambda: rope.frequencies(-2, base=10.0), DomainError, "width=-2"),
        (lambda: rope.frequencies(4.0, base=10.0), (DomainError, TypeError), ""),
        (lambda: rope.frequencies(4, base=0.0), DomainError, "base > 0, received base=0.0"),
        (lambda: rope.frequencies(4, base=-10.0), DomainError, "base=-10.0"),
        (lambda: rope.frequencies(4, base=float("nan")), DomainError, "base=nan"),
        (lambda: rope.frequencies_linear(4, base=10.0, factor=0.0), DomainError, "factor > 0"),
        (lambda: rope.frequencies_ntk(4, base=10.0, factor=-1.0), DomainError, "frequencies_ntk: expected factor > 0"),
        (lambda: rope.frequencies_ntk(4, base=-1.0, factor=2.0), DomainError, "base=-1.0"),
        (lambda: rope.frequencies_ntk(2, base=10.0, factor=2.0), DomainError, "at least 4, received width=2"),
        (
            lambda: rope.frequencies_dynamic_ntk(4, base=10.0, factor=2.0, length=0, max_length=8),
            DomainError,
            "length=0",
        ),
        (
            lambda: rope.frequencies_dynamic_ntk(4, base=10.0, factor=2.0, length=3, max_length=0),
            DomainError,
            "max_length=0",
        ),
        (lambda: yarn(factor=0.0), DomainError, "factor=0.0"),
        (lambda: yarn(original_length=0), DomainError, "original_length=0"),
        (lambda: yarn(beta_slow=0.0), DomainError, "beta_slow=0.0"),
        (lambda: yarn(beta_fast=0.5), DomainError, "beta_fast >= beta_slow"),
        (lambda: yarn(base=1.0), DomainError, "base > 1"),
        (lambda: rope.yarn_magnitude(0.0), DomainError, "yarn_magnitude: expected factor > 0"),
        (lambda: rope.angles(np.array([np.nan]), np.ones(2)), DomainError, "positions must be finite"),
        (lambda: rope.angles(np.array([1]), np.array([np.inf])), DomainError, "frequencies must be finite"),
        (lambda: rope.rotate_interleaved(_X[..., :5], _PHI[:, None]), ShapeError, "even rotary width"),
        (lambda: rope.rotate_half_split(_X[..., :5], _PHI[:, None, :2]), ShapeError, "even rotary width"),
        (lambda: rope.rotate_interleaved(_X, _PHI[:, None, :2]), ShapeError, "x of shape (5, 3, 6)"),
        (lambda: rope.rotate_half_split(_X, _PHI[:, None, :1]), ShapeError, "d/2 pairs"),
        # The forgotten head axis: (5, 3) against (5, 3, 6) would meet heads with positions.
        (lambda: rope.rotate_interleaved(_X, _PHI), ShapeError, "insert the head axis"),
        # x is never enlarged, or one token would silently become five.
        (lambda: rope.rotate_half_split(_X[:1], _PHI[:, None]), ShapeError, "broadcast to x"),
        (lambda: rope.rotate_proportional(_X, np.zeros((5, 1, 4))), ShapeError, "at most d/2 pairs"),
        (lambda: rope.rotate_proportional(_X[..., :5], _PHI[:, None, :2]), ShapeError, "even rotary width"),
        (
            lambda: rope.rotate_contiguous(_X, np.zeros((5, 1, 4)), rope.rotate_interleaved),
            ShapeError,
            "at least 2r features",
        ),
        (lambda: rope.rotate_interleaved(_X * np.nan, _PHI[:, None]), DomainError, "x must be finite"),
        (lambda: rope.rotate_half_split(_X, _PHI[:, None] + np.inf), DomainError, "angles must be finite"),
        (lambda: rope.rotate_interleaved(_X * 1j, _PHI[:, None]), DomainError, "real numbers"),
        (lambda: rope.half_split_order(3), DomainError, "width=3"),
        (lambda: rope.interleaved_order(-2), DomainError, "width=-2"),
        (lambda: rope.permute_projection(_X, heads=4, order=[0, 1]), ShapeError, "4 equal heads"),
        (lambda: rope.permute_projection(_X, heads=0, order=[0, 1]), DomainError, "heads >= 1"),
        (lambda: rope.permute_projection(_X, heads=3, order=[0, 2, 1, 3]), ShapeError, "at most 2 indices"),
        (lambda: rope.permute_projection(_X, heads=1, order=[0, 1, 1]), DomainError, "permutation of 0 ... 2"),
        (
            lambda: rope.permute_projection(_X, heads=1, order=np.array([0.0, 1.0])),
            DomainError,
            "order must be integers",
        ),
        (lambda: rope.permute_gau(*_GAU, s=3, order=[1, 0]), ShapeError, "gamma with 3 features"),
        (lambda: rope.permute_gau(*_GAU[:3], _GAU[3][:, :2], s=4, order=[1, 0]), ShapeError, "beta of shape (2, 4)"),
        (
            lambda: rope.permute_gau(_GAU[0], _GAU[1][:5], *_GAU[2:], s=4, order=[1, 0]),
            ShapeError,
            "b_in of shape (9,)",
        ),
        (
            lambda: rope.permute_gau(_GAU[0][:, :3], None, *_GAU[2:], s=4, order=[1, 0]),
            ShapeError,
            "w_in with at least 4",
        ),
        (lambda: rope.permute_gau(*_GAU, s=4, order=[0, 1, 2, 3, 4]), ShapeError, "at most 4 indices"),
    ],
)
def test_errors_say_what_was_expected_and_received(call, error, says):
    with pytest.raises(error) as caught:
        call()
    assert says in str(caught.value)
