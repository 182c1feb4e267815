"""Expected values: hand computation, PyTorch, and intermediate arrays of bert4keras 0.11.5 (float64 run).

tests/golden/norm/b4k_post_norm.npz holds five tokens of the first block's sum before, and result after, the norm that
follows attention: layer_* from a RoFormer, rms_* from a RoFormerV2, both with random weights.
"""

from inspect import unwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.check import DomainError, ShapeError
from refimpl.ops import norm

GOLDEN = Path(__file__).parents[2] / "golden" / "norm" / "b4k_post_norm.npz"
X = np.array([[3.0, 4.0, 0.0, 0.0, 0.0], [1.0, -1.0, 1.0, -1.0, 1.0]])
SCALE = np.array([1.0, 2.0, 3.0, 5.0, 7.0])
BIAS = np.array([0.5, -0.5, 0.25, 0.0, 1.0])


def test_rms_norm_by_hand() -> None:
    # Mean squares 25 / 5 = 5 and 1; epsilon 4 turns the roots into 3 and sqrt(5).
    np.testing.assert_allclose(norm.rms_norm(X, epsilon=0.0), [X[0] / np.sqrt(5), X[1]], rtol=1e-15)
    np.testing.assert_allclose(norm.rms_norm(X, epsilon=4.0), [X[0] / 3, X[1] / np.sqrt(5)], rtol=1e-15)


def test_rms_norm_scaled_by_hand() -> None:
    expected = [[1.0, 8 / 3, 0, 0, 0], SCALE * X[1] / np.sqrt(5)]
    np.testing.assert_allclose(norm.rms_norm_scaled(X, SCALE, epsilon=4.0), expected, rtol=1e-15)


def test_layer_norm_by_hand() -> None:
    # Mean 2, centred -1 and 1, population variance 1 (unbiased: 2); epsilon 3 turns the root into 2.
    out = norm.layer_norm(np.array([1.0, 3.0]), np.array([5.0, 7.0]), np.array([11.0, 13.0]), epsilon=3.0)
    assert out.tolist() == [11.0 - 2.5, 13.0 + 3.5]


def test_bert4keras_arrays() -> None:
    golden = np.load(GOLDEN)
    layer = [golden[name] for name in ("layer_x", "layer_scale", "layer_bias")]
    assert np.abs(norm.layer_norm(*layer, epsilon=1e-7) - golden["layer_y"]).max() < 2e-15
    assert np.abs(norm.rms_norm(golden["rms_x"], epsilon=1e-7) - golden["rms_y"]).max() < 1e-15
    # The epsilon of the older releases is told apart by these arrays.
    assert np.abs(norm.layer_norm(*layer, epsilon=1e-12) - golden["layer_y"]).max() > 2e-8
    assert np.abs(norm.rms_norm(golden["rms_x"], epsilon=1e-12) - golden["rms_y"]).max() > 2e-8


def test_agrees_with_torch() -> None:
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(2, 3, 7)) * 10.0 ** np.arange(-3, 4)
    scale, bias = np.random.default_rng(1).normal(size=(2, 7))
    args = [torch.from_numpy(a) for a in (x, scale, bias)]
    expected = torch.nn.functional.layer_norm(args[0], (7,), args[1], args[2], eps=1e-3).numpy()
    np.testing.assert_allclose(norm.layer_norm(x, scale, bias, epsilon=1e-3), expected, rtol=0, atol=1e-14)
    expected = torch.nn.functional.rms_norm(args[0], (7,), args[1], eps=1e-3).numpy()
    np.testing.assert_allclose(norm.rms_norm_scaled(x, scale, epsilon=1e-3), expected, rtol=0, atol=1e-14)


def test_epsilon_matters_where_a_row_is_small() -> None:
    # At a root mean square of 1e-3, 1e-12 and 1e-7 differ by 1 - 1/sqrt(1.1) = 4.65 %.
    x = np.full((1, 11), 1e-3)
    old, new = norm.rms_norm(x, epsilon=1e-12), norm.rms_norm(x, epsilon=1e-7)
    np.testing.assert_allclose(new / old, 1 / np.sqrt(1.1), rtol=1e-6)


@given(factor=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_rms_norm_ignores_scale_and_has_unit_mean_square(factor: float, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(3, 7))
    out = norm.rms_norm(x, epsilon=0.0)
    np.testing.assert_allclose(norm.rms_norm(factor * x, epsilon=0.0), out, rtol=1e-14)
    np.testing.assert_allclose((out**2).mean(axis=-1), 1.0, rtol=1e-14)


@given(offset=st.floats(-1e3, 1e3), seed=st.integers(0, 99))
def test_layer_norm_ignores_an_offset_and_standardises(offset: float, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(3, 7))
    ones, zeros = np.ones(7), np.zeros(7)
    out = norm.layer_norm(x, ones, zeros, epsilon=0.0)
    np.testing.assert_allclose(norm.layer_norm(x + offset, ones, zeros, epsilon=0.0), out, atol=1e-10)
    np.testing.assert_allclose(out.mean(axis=-1), 0.0, atol=1e-14)
    np.testing.assert_allclose((out**2).mean(axis=-1), 1.0, rtol=1e-13)


def test_the_three_functions_meet() -> None:
    x = np.random.default_rng(5).normal(size=(2, 3, 7))
    ones, zeros = np.ones(7), np.zeros(7)
    assert (norm.rms_norm_scaled(x, ones, epsilon=0.5) == norm.rms_norm(x, epsilon=0.5)).all()
    centred = x - x.mean(axis=-1, keepdims=True)
    expected = norm.rms_norm(centred, epsilon=0.5)
    np.testing.assert_allclose(norm.layer_norm(x, ones, zeros, epsilon=0.5), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("epsilon", [0.0, 1e-12, 1.0])
def test_rows_without_spread_have_a_defined_result(epsilon: float) -> None:
    zero = np.zeros((2, 5))
    assert (norm.rms_norm(zero, epsilon=epsilon) == 0).all()
    assert (norm.rms_norm_scaled(zero, SCALE, epsilon=epsilon) == 0).all()
    ones = np.ones(7)
    for constant in (0.0, 0.1, 0.9, -1e7, 1 / 3):
        assert (norm.layer_norm(np.full((3, 5), constant), SCALE, BIAS, epsilon=epsilon) == BIAS).all()
        # The rounded mean of seven times 0.9 is not 0.9: with epsilon = 0 the residue must not become 1.
        assert (norm.layer_norm(np.full((3, 7), constant), ones, 2 * ones, epsilon=epsilon) == 2).all()


@pytest.mark.filterwarnings("error")
def test_a_row_too_small_to_square_counts_as_zero() -> None:
    assert norm.rms_norm(np.array([1e-200, 1e-170]), epsilon=0.0).tolist() == [0.0, 0.0]


@pytest.mark.filterwarnings("error")
def test_empty_and_single() -> None:
    assert norm.rms_norm(np.zeros((3, 0)), epsilon=0.0).shape == (3, 0)
    assert norm.layer_norm(np.zeros((3, 0)), np.zeros(0), np.zeros(0), epsilon=0.0).shape == (3, 0)
    assert norm.rms_norm(np.zeros((0, 5)), epsilon=0.0).shape == (0, 5)
    assert norm.rms_norm(np.array([-7.0]), epsilon=0.0).tolist() == [-1.0]
    assert norm.layer_norm(np.array([7.0]), np.array([2.0]), np.array([3.0]), epsilon=0.0).tolist() == [3.0]


def test_float32_and_integers_are_computed_in_float64_and_left_alone() -> None:
    x = np.array([[255, 256, 1]], np.float32)
    before = x.copy()
    out = norm.rms_norm(x, epsilon=0.0)
    assert out.dtype == np.float64 and (x == before).all()
    assert (norm.rms_norm(x.astype(np.int64), epsilon=0.0) == out).all()
    assert (unwrap(norm.rms_norm)([[255, 256, 1]], epsilon=0.0) == out).all()


@pytest.mark.parametrize("epsilon", [-1e-300, -1.0, np.nan, np.inf])
def test_refuses_epsilon(epsilon: float) -> None:
    for call in (
        lambda: norm.rms_norm(X, epsilon=epsilon),
        lambda: norm.rms_norm_scaled(X, SCALE, epsilon=epsilon),
        lambda: norm.layer_norm(X, SCALE, BIAS, epsilon=epsilon),
    ):
        with pytest.raises(DomainError, match=r"norm\..*: expected a finite epsilon >= 0, received epsilon="):
            call()


def test_refuses_shapes() -> None:
    with pytest.raises(ShapeError, match=r"norm.rms_norm: expected x of shape \(..., d\)"):
        unwrap(norm.rms_norm)(3.0, epsilon=1.0)
    with pytest.raises(ShapeError, match=r"norm.rms_norm_scaled: expected scale.*\(2, 5\).*\(2,\)"):
        norm.rms_norm_scaled(X, np.ones(2), epsilon=1.0)
    with pytest.raises(ShapeError, match=r"norm.layer_norm: expected scale"):
        norm.layer_norm(X, np.ones(1), BIAS, epsilon=1.0)
    with pytest.raises(ShapeError, match=r"norm.layer_norm: expected bias"):
        norm.layer_norm(X, SCALE, np.ones(4), epsilon=1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_refuses_values_that_are_not_finite(bad: float) -> None:
    broken = np.array([1.0, bad, 1.0, 1.0, 1.0])
    with pytest.raises(DomainError, match="norm.rms_norm: x must be finite"):
        norm.rms_norm(broken, epsilon=1.0)
    with pytest.raises(DomainError, match="norm.layer_norm: scale must be finite"):
        norm.layer_norm(X, broken, BIAS, epsilon=1.0)
    with pytest.raises(DomainError, match="norm.layer_norm: bias must be finite"):
        norm.layer_norm(X, SCALE, broken, epsilon=1.0)


def test_the_largest_magnitude() -> None:
    x = np.array([norm.LARGEST, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(norm.rms_norm(x, epsilon=0.0), [2.0, 0, 0, 0], rtol=1e-15)
    with pytest.raises(
        DomainError, match=r"norm.rms_norm: expected abs\(x\) at most 1e\+150, received largest=1.1e\+150"
    ):
        norm.rms_norm(1.1 * x, epsilon=0.0)
