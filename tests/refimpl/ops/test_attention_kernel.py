"""Attention kernels against hand calculation (512 = 2^9 makes ln n / ln 512 rational), mpmath and their laws."""

import math
from functools import partial

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.check import DomainError, ShapeError
from refimpl.ops import attention_kernel as ak

KERNELS = {
    "softmax": ak.softmax,
    "softmax_plus": partial(ak.softmax_plus, n_min=16),
    "squared_relu_visible": ak.squared_relu_visible,
    "squared_relu_array": ak.squared_relu_array,
    "squared_relu_constant": partial(ak.squared_relu_constant, length=3),
    "laplace": ak.laplace,
}
PADDING_INVARIANT = [name for name in KERNELS if name != "squared_relu_array"]
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


def scores_of(*shape, seed=0):
    return 2 * np.sin(1.7 * np.arange(1, np.prod(shape, dtype=int) + 1) ** 1.3 + seed).reshape(shape)


def mask_of(*bits):
    return np.array(bits, dtype=bool)


# Values


def test_softmax_of_logarithms_gives_their_shares():
    got = ak.softmax(np.log([[1.0, 2.0, 5.0]]), None)
    np.testing.assert_allclose(got, [[1 / 8, 2 / 8, 5 / 8]], rtol=1e-15)


def test_softmax_shares_among_visible_keys_only():
    got = ak.softmax(np.log([[1.0, 2.0, 5.0, 7.0]]), mask_of([1, 0, 1, 0]))
    np.testing.assert_allclose(got, [[1 / 6, 0, 5 / 6, 0]], rtol=1e-15)
    assert got[0, 1] == 0 and got[0, 3] == 0


def test_softmax_neither_overflows_nor_vanishes():
    with np.errstate(all="raise", under="ignore"):
        got = ak.softmax(np.array([[1e4, 1e4 + math.log(3)], [-1e4, -1e4 + math.log(3)], [1e308, -1e308]]), None)
    # The spacing of doubles near 1e4 is 1.8e-12, so ln 3 itself is only that exact.
    np.testing.assert_allclose(got, [[0.25, 0.75], [0.25, 0.75], [1, 0]], rtol=2e-12)


def test_softmax_subtracts_the_largest_visible_score_not_the_largest():
    got = ak.softmax(np.array([[1000.0, 0.0, math.log(3)]]), mask_of([0, 1, 1]))
    np.testing.assert_allclose(got, [[0, 0.25, 0.75]], rtol=1e-15)


@pytest.mark.parametrize(
    ("visible", "n_min", "factor"),
    # ln 2/ln 512 = 1/9, ln 8 = 3/9, ln 16 = 4/9, ln 64 = 6/9
    [(1, 1, 0), (2, 1, 1 / 9), (8, 1, 3 / 9), (1, 2, 1 / 9), (2, 16, 4 / 9), (8, 16, 4 / 9), (16, 16, 4 / 9),
     (64, 16, 6 / 9), (512, 16, 1), (512, 512, 1)],
)  # fmt: skip
def test_softmax_plus_scales_by_the_logarithm_of_the_visible_keys(visible, n_min, factor):
    scores = np.zeros((1, visible + 3))
    scores[0, 0] = math.log(3)
    mask = np.arange(visible + 3) < visible
    got = ak.softmax_plus(scores, mask, n_min=n_min)
    power = 3**factor
    np.testing.assert_allclose(got[0, 0], power / (power + visible - 1), rtol=1e-14)
    np.testing.assert_allclose(got[0, 1:visible], 1 / (power + visible - 1), rtol=1e-14)
    assert not got[0, visible:].any()


def test_softmax_plus_counts_every_row_by_itself():
    scores = np.tile([0.0, 9 * math.log(3), 0.0, 0.0], (2, 1))
    got = ak.softmax_plus(scores, mask_of([1, 1, 0, 0], [1, 1, 1, 1]), n_min=1)
    np.testing.assert_allclose(got, [[1 / 4, 3 / 4, 0, 0], [1 / 12, 9 / 12, 1 / 12, 1 / 12]], rtol=1e-14)


def test_softmax_plus_on_one_visible_key_keeps_the_others_masked():
    # ln 1 = 0 multiplies a finite mask constant away and makes NaN of an infinite one.
    got = ak.softmax_plus(np.array([[5.0, -7.0, 9.0]]), mask_of([0, 1, 0]), n_min=1)
    assert got.tolist() == [[0, 1, 0]]


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (ak.squared_relu_visible, [[0, 2, 0, 0], [0, 0, 2, 4.5]]),
        (ak.squared_relu_array, [[0, 1, 0, 0], [0, 0, 2, 4.5]]),
        (partial(ak.squared_relu_constant, length=8), [[0, 0.5, 0, 0], [0, 0, 1, 2.25]]),
        (partial(ak.squared_relu_constant, length=1), [[0, 4, 0, 0], [0, 0, 8, 18]]),
    ],
)
def test_squared_relu_divides_by_its_length(kernel, expected):
    scores = np.array([[-1.0, 2.0, 7.0, 3.0], [-5.0, 0.0, math.sqrt(8), math.sqrt(18)]])
    mask = mask_of([1, 1, 0, 0], [1, 1, 1, 1])
    np.testing.assert_allclose(kernel(scores, mask), expected, rtol=1e-15)


@pytest.mark.parametrize("score", [-40.0, -9.0, -1.0, 0.0, 0.25, 1.0, 3.0])
def test_laplace_equals_the_normal_distribution_function(score):
    with mpmath.workdps(50):
        deviation = mpmath.sqrt(1 / (4 * mpmath.pi))
        expected = mpmath.ncdf(score, mpmath.sqrt(mpmath.mpf(1) / 2), deviation)
    # The tail's argument has relative error 2^-52, its exponential z² times that.
    rtol = 1e-15 * (4 + 8 * (score - 0.7) ** 2)
    np.testing.assert_allclose(ak.laplace(np.array([score]), None), [float(expected)], rtol=rtol)


def test_laplace_meets_squared_relu_at_the_root_of_one_half():
    point, step = math.sqrt(0.5), 1e-5
    low, middle, high = ak.laplace(np.array([point - step, point, point + step]), None)
    assert middle == pytest.approx(0.5, abs=1e-15)
    assert (high - low) / (2 * step) == pytest.approx(math.sqrt(2), abs=1e-8)


def test_laplace_hides_keys_after_the_activation_and_does_not_normalise():
    got = ak.laplace(np.array([[0.0, 0.0, math.sqrt(0.5)]]), mask_of([1, 0, 1]))
    np.testing.assert_allclose(got, [[0.006094441092401431, 0, 0.5]], rtol=1e-13)


def test_visible_lengths_count_after_broadcasting():
    scores = np.zeros((2, 3, 5))
    lengths = ak.visible_lengths(scores, mask_of([[1, 1, 0, 0, 0]], [[1, 1, 1, 1, 0]]))
    assert lengths.shape == (2, 3, 1)
    assert lengths[:, :, 0].tolist() == [[2, 2, 2], [4, 4, 4]]
    # A mask that broadcasts over the keys still counts keys, not its own columns.
    assert ak.visible_lengths(scores, np.ones((2, 3, 1), dtype=bool)).ravel().tolist() == [5] * 6
    assert ak.visible_lengths(scores, mask_of(1)).ravel().tolist() == [5] * 6
    assert ak.visible_lengths(scores, None).ravel().tolist() == [5] * 6


# Laws


@every_kernel
@given(seed=st.integers(0, 99), bits=st.lists(st.booleans(), min_size=15, max_size=15))
@settings(max_examples=15)
def test_masked_scores_do_not_matter_and_masked_weights_are_zero(kernel, seed, bits):
    scores, mask = scores_of(3, 5, seed=seed), np.array(bits).reshape(3, 5)
    got = kernel(scores, mask)
    assert not got[~mask].any()
    np.testing.assert_array_equal(kernel(np.where(mask, scores, 1e6), mask), got)
    assert (got >= 0).all()


@every_kernel
def test_broadcast_masks_equal_written_out_masks(kernel):
    scores = scores_of(2, 3, 5)
    mask = mask_of([[1, 1, 0, 1, 0]], [[1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(kernel(scores, mask), kernel(scores, np.repeat(mask, 3, axis=1)))
    np.testing.assert_array_equal(kernel(scores, None), kernel(scores, np.ones(scores.shape, dtype=bool)))


@pytest.mark.parametrize("name", PADDING_INVARIANT)
@given(padding=st.integers(1, 600))
@settings(max_examples=10)
def test_masked_keys_may_be_appended(name, padding):
    scores, mask = scores_of(3, 5), mask_of([1, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0])
    wide = np.concatenate([scores, np.full((3, padding), 4.0)], axis=1)
    hidden = np.concatenate([mask, np.zeros((3, padding), dtype=bool)], axis=1)
    np.testing.assert_allclose(KERNELS[name](wide, hidden)[:, :5], KERNELS[name](scores, mask), rtol=1e-14)


def test_padding_dilutes_only_the_array_length():
    scores = scores_of(3, 5)
    wide = np.concatenate([scores, np.full((3, 10), 4.0)], axis=1)
    got = ak.squared_relu_array(wide, np.arange(15) < 5)
    np.testing.assert_allclose(got[:, :5], ak.squared_relu_array(scores, None) / 3, rtol=1e-15)


@pytest.mark.parametrize("kernel", [ak.softmax, partial(ak.softmax_plus, n_min=1)])
@given(shift=st.floats(-1e3, 1e3))
def test_rows_sum_to_one_and_ignore_a_common_shift(kernel, shift):
    scores, mask = scores_of(3, 7), np.arange(7) < 4
    got = kernel(scores + shift, mask)
    np.testing.assert_allclose(got.sum(axis=-1), 1, rtol=1e-14)
    np.testing.assert_allclose(got, kernel(scores, mask), rtol=1e-11)


def test_softmax_plus_is_softmax_at_512_visible_keys():
    scores, mask = scores_of(2, 515), np.arange(515) < 512
    np.testing.assert_allclose(ak.softmax_plus(scores, mask, n_min=16), ak.softmax(scores, mask), rtol=1e-14)


# Degenerate input


@every_kernel
def test_a_fully_masked_row_is_zero(kernel):
    with np.errstate(all="raise", under="ignore"):
        got = kernel(np.array([[3.0, -1e300, 1e300], [1.0, 2.0, 3.0]]), mask_of([0, 0, 0], [1, 1, 1]))
    assert got[0].tolist() == [0, 0, 0]
    assert got[1].any()


@every_kernel
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3), (2, 0, 3)])
def test_no_keys_and_no_rows_give_no_weights(kernel, shape):
    assert kernel(np.zeros(shape), None).shape == shape
    assert kernel(np.zeros(shape), np.ones(shape, dtype=bool)).shape == shape


@every_kernel
def test_one_key_and_rows_without_axes_before_them(kernel):
    assert kernel(np.array([[2.0]]), mask_of([1])).shape == (1, 1)
    np.testing.assert_array_equal(kernel(np.array([1.0, 2.0]), None), kernel(np.array([[1.0, 2.0]]), None)[0])


@pytest.mark.parametrize("kernel", [ak.softmax, partial(ak.softmax_plus, n_min=1)])
def test_equal_scores_share_equally(kernel):
    assert kernel(np.full((1, 4), 7.0), None).tolist() == [[0.25] * 4]


@every_kernel
def test_arguments_are_left_alone_and_results_are_float64(kernel):
    scores, mask = scores_of(2, 3).astype(np.float32), mask_of([1, 1, 0])
    before = scores.copy(), mask.copy()
    assert kernel(scores, mask).dtype == np.float64
    np.testing.assert_array_equal(scores, before[0])
    np.testing.assert_array_equal(mask, before[1])


# Errors


@every_kernel
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_must_be_finite_even_where_they_are_masked(kernel, bad):
    with pytest.raises(DomainError, match=r"attention_kernel\.\w+: scores must be finite"):
        kernel(np.array([[1.0, bad]]), mask_of([1, 0]))


@every_kernel
def test_masks_must_be_boolean(kernel):
    with pytest.raises(DomainError, match="mask must be boolean"):
        kernel(np.zeros((1, 2)), np.array([[1, 0]]))


@every_kernel
@pytest.mark.parametrize("shape", [(2,), (3, 2, 3), (1, 1, 3), (2, 4)])
def test_masks_must_broadcast_to_the_scores_without_enlarging_them(kernel, shape):
    with pytest.raises(ShapeError, match="mask"):
        kernel(np.zeros((2, 3)), np.ones(shape, dtype=bool))


@every_kernel
def test_scores_need_a_key_axis(kernel):
    with pytest.raises(ShapeError, match="key axis"):
        kernel(np.array(1.0), None)


@pytest.mark.parametrize("n_min", [0, -1])
def test_n_min_must_be_positive(n_min):
    with pytest.raises(DomainError, match=f"n_min >= 1, received n_min={n_min}"):
        ak.softmax_plus(np.zeros((1, 2)), None, n_min=n_min)


@pytest.mark.parametrize("length", [0, -512])
def test_length_must_be_positive(length):
    with pytest.raises(DomainError, match=f"length >= 1, received length={length}"):
        ak.squared_relu_constant(np.zeros((1, 2)), None, length=length)
