"""Expected values are computed by hand or by loops over single tokens."""

from inspect import unwrap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.check import DomainError, ShapeError
from refimpl.ops import pooling

X = np.random.default_rng(0).normal(size=(2, 5, 3))
LAST = np.random.default_rng(1).normal(size=(2, 5, 3))
MASK = np.array([[True, True, True, False, False], [False, True, False, True, True]])
KERNEL = np.random.default_rng(2).normal(size=(3, 7))
BIAS = np.random.default_rng(3).normal(size=7)


def _by_loop(x: np.ndarray, mask: np.ndarray) -> list[list[float]]:
    rows = []
    for tokens, visible in zip(x, mask, strict=True):
        kept = [token for token, seen in zip(tokens, visible, strict=True) if seen]
        rows.append([sum(token[i] for token in kept) / len(kept) for i in range(x.shape[-1])])
    return rows


def test_first_is_position_0() -> None:
    assert (pooling.first(X) == X[:, 0]).all()
    assert pooling.first(np.array([[7.0, 8.0]])).tolist() == [7.0, 8.0]


def test_masked_mean_by_hand() -> None:
    x = np.array([[1.0, 10.0], [3.0, 30.0], [1e6, -1e6]])
    assert pooling.masked_mean(x, np.array([True, True, False])).tolist() == [2.0, 20.0]
    np.testing.assert_allclose(pooling.masked_mean(X, MASK), _by_loop(X, MASK), rtol=1e-14)


def test_first_last_average_by_hand() -> None:
    first, last = np.array([[2.0], [4.0], [99.0]]), np.array([[10.0], [20.0], [77.0]])
    assert pooling.first_last_average(first, last, np.array([True, True, False])).tolist() == [9.0]
    expected = 0.5 * (np.array(_by_loop(X, MASK)) + np.array(_by_loop(LAST, MASK)))
    np.testing.assert_allclose(pooling.first_last_average(X, LAST, MASK), expected, rtol=1e-14)


def test_poolers_by_hand() -> None:
    x = np.array([[1.0, 2.0], [50.0, 60.0]])
    kernel, bias = np.array([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]]), np.array([0.5, 0.0, 0.25])
    assert pooling.pooler_linear(x, kernel, bias).tolist() == [1.5, 2.0, 0.25]
    expected = [0.9051482536448664, 0.9640275800758169, 0.24491866240370913]
    np.testing.assert_allclose(pooling.pooler_tanh(x, kernel, bias), expected, rtol=1e-15)


@given(seed=st.integers(0, 999), padding=st.integers(0, 4))
def test_padding_on_either_side_and_what_it_holds_change_nothing(seed: int, padding: int) -> None:
    random = np.random.default_rng(seed)
    x, last, mask = random.normal(size=(2, 5, 3)), random.normal(size=(2, 5, 3)), random.random((2, 5)) < 0.6

    def padded(array: np.ndarray) -> np.ndarray:
        poison = np.full((2, padding, *array.shape[2:]), array.dtype.type(0 if array.dtype == bool else 1e30))
        return np.concatenate([poison, array, poison], axis=1)

    mean, average = pooling.masked_mean(x, mask), pooling.first_last_average(x, last, mask)
    np.testing.assert_allclose(pooling.masked_mean(padded(x), padded(mask)), mean, rtol=1e-13)
    out = pooling.first_last_average(padded(x), padded(last), padded(mask))
    np.testing.assert_allclose(out, average, rtol=1e-13)


@given(seed=st.integers(0, 999))
def test_order_and_repetition_change_no_mean(seed: int) -> None:
    random = np.random.default_rng(seed)
    x, mask = random.normal(size=(5, 3)), random.random(5) < 0.6
    order = random.permutation(5)
    mean = pooling.masked_mean(x, mask)
    np.testing.assert_allclose(pooling.masked_mean(x[order], mask[order]), mean, atol=1e-14)
    np.testing.assert_allclose(pooling.masked_mean(np.tile(x, (2, 1)), np.tile(mask, 2)), mean, atol=1e-14)


def test_average_of_a_block_with_itself_and_exchange() -> None:
    assert (pooling.first_last_average(X, X, MASK) == pooling.masked_mean(X, MASK)).all()
    exchanged = pooling.first_last_average(LAST, X, MASK)
    assert (pooling.first_last_average(X, LAST, MASK) == exchanged).all()


@pytest.mark.filterwarnings("error")
def test_rows_without_a_visible_token_give_zeros() -> None:
    none = np.zeros((2, 5), bool)
    assert (pooling.masked_mean(X, none) == np.zeros((2, 3))).all()
    assert (pooling.first_last_average(X, LAST, none) == np.zeros((2, 3))).all()
    assert (pooling.masked_mean(np.zeros((2, 0, 3)), np.zeros((2, 0), bool)) == np.zeros((2, 3))).all()
    assert pooling.masked_mean(np.zeros((0, 5, 3)), np.zeros((0, 5), bool)).shape == (0, 3)
    assert pooling.masked_mean(np.zeros((2, 5, 0)), MASK).shape == (2, 0)


def test_poolers_read_position_0_only_and_keep_leading_axes() -> None:
    changed = X.copy()
    changed[:, 1:] = 1e9
    for pooler in (pooling.pooler_linear, pooling.pooler_tanh):
        assert (pooler(changed, KERNEL, BIAS) == pooler(X, KERNEL, BIAS)).all()
        assert pooler(X[None], KERNEL, BIAS).shape == (1, 2, 7)
        assert pooler(X[0], KERNEL, BIAS).shape == (7,)
    np.testing.assert_allclose(np.arctanh(pooling.pooler_tanh(X, KERNEL, BIAS)), pooling.pooler_linear(X, KERNEL, BIAS))


def test_arguments_are_left_alone_and_lists_are_taken() -> None:
    x, mask = X.copy(), MASK.copy()
    pooling.masked_mean(x, mask)
    pooling.first_last_average(x, x, mask)
    assert (x == X).all() and (mask == MASK).all()
    assert unwrap(pooling.masked_mean)([[1, 2], [3, 4]], [True, True]).tolist() == [2.0, 3.0]


def test_refuses_shapes() -> None:
    with pytest.raises(ShapeError, match=r"pooling.first: expected .* n >= 1, received x of shape \(2, 0, 3\)"):
        pooling.first(np.zeros((2, 0, 3)))
    with pytest.raises(ShapeError, match="pooling.first"):
        unwrap(pooling.first)(np.zeros(3))
    for mask in (MASK[:, :4], MASK[0], MASK[..., None]):
        with pytest.raises(ShapeError, match="pooling.masked_mean: .*x of shape .*mask of shape"):
            pooling.masked_mean(X, mask)
        with pytest.raises(ShapeError, match="pooling.first_last_average: .*mask of shape"):
            pooling.first_last_average(X, LAST, mask)
    with pytest.raises(ShapeError, match="pooling.first_last_average: expected equal shapes"):
        pooling.first_last_average(X, LAST[:1], MASK)
    for pooler in (pooling.pooler_linear, pooling.pooler_tanh):
        for x, kernel, bias in [
            (X[:, :0], KERNEL, BIAS),
            (X, KERNEL.T, BIAS),
            (X, KERNEL, BIAS[:1]),
            (X, KERNEL[0], BIAS),
            (X[0, 0], KERNEL, BIAS),
        ]:
            with pytest.raises(ShapeError, match=rf"pooling.{pooler.__name__}: .*kernel of shape"):
                unwrap(pooler)(x, kernel, bias)


def test_refuses_values() -> None:
    with pytest.raises(DomainError, match="pooling.masked_mean: mask must be boolean"):
        pooling.masked_mean(X, MASK.astype(np.float64))
    with pytest.raises(DomainError, match="pooling.first_last_average: mask must be boolean"):
        pooling.first_last_average(X, LAST, MASK.astype(np.int64))
    broken = np.full((2, 5, 3), np.nan)
    for call in (
        lambda: pooling.first(broken),
        lambda: pooling.masked_mean(broken, MASK),
        lambda: pooling.first_last_average(X, broken, MASK),
        lambda: pooling.first_last_average(broken, X, MASK),
        lambda: pooling.pooler_linear(X, KERNEL * np.inf, BIAS),
        lambda: pooling.pooler_tanh(X, KERNEL, BIAS * np.nan),
    ):
        with pytest.raises(DomainError, match="must be finite"):
            call()
