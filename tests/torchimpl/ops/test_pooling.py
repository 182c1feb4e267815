"""Pooling in torch: by hand, at degenerate rows, in 16 bits, under autograd and torch.compile."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from refimpl.check import DomainError, ShapeError
from torchimpl.ops import pooling

X = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [5.0, 10.0]], [[7.0, 1.0], [9.0, 5.0], [100.0, 100.0]]])
MASK = torch.tensor([[True, True, True], [True, True, False]])
KERNEL, BIAS = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]]), torch.tensor([0.5, 0.0, 0.25])
HALVES = [torch.float16, torch.bfloat16]


def numbers(*shape):
    """Deterministic numbers in (-1, 1) that take a gradient."""
    count = torch.Size(shape).numel()
    return torch.sin(1.7 * torch.arange(1, count + 1, dtype=torch.float64) ** 1.3).reshape(shape).requires_grad_()


def test_by_hand():
    assert pooling.first(X).tolist() == [[1, 2], [7, 1]]
    assert pooling.masked_mean(X, MASK).tolist() == [[3, 6], [8, 3]]
    assert pooling.first_last_average(X, 3 * X, MASK).tolist() == [[6, 12], [16, 6]]
    assert pooling.pooler_linear(X, KERNEL, BIAS).tolist() == [[1.5, 2, 0.25], [7.5, 1, 13.25]]
    assert_close(pooling.pooler_tanh(X, KERNEL, BIAS)[0], torch.tensor([0.9051482536, 0.9640275801, 0.2449186624]))
    assert pooling.masked_mean(X[None], MASK[None]).shape == (1, 2, 2)


def test_rows_without_a_visible_token_give_zeros():
    assert pooling.masked_mean(X, torch.zeros(2, 3, dtype=torch.bool)).tolist() == [[0, 0], [0, 0]]
    assert pooling.masked_mean(X[:, :0], MASK[:, :0]).tolist() == [[0, 0], [0, 0]]
    assert pooling.first_last_average(X, X, torch.zeros(2, 3, dtype=torch.bool)).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("hidden", [float("nan"), float("inf"), -1e30])
def test_what_masked_tokens_hold_reaches_neither_result_nor_gradient(hidden):
    x = X.masked_fill(~MASK[..., None], hidden).requires_grad_()
    out = pooling.masked_mean(x, MASK)
    assert out.tolist() == [[3, 6], [8, 3]]
    out.sum().backward()
    assert x.grad[..., 0].tolist() == [[pytest.approx(1 / 3)] * 3, [0.5, 0.5, 0]]
    assert pooling.first_last_average(x, x, MASK).tolist() == [[3, 6], [8, 3]]


@pytest.mark.parametrize("dtype", HALVES)
def test_sums_in_sixteen_bits_neither_stall_nor_overflow(dtype):
    # bfloat16 counts to 256, float16 to 2048 and not beyond 65504.
    ones, mask = torch.ones(1, 4096, 3, dtype=dtype), torch.ones(1, 4096, dtype=torch.bool)
    assert pooling.masked_mean(ones, mask).tolist() == [[1, 1, 1]]
    assert pooling.masked_mean(ones * 1024, mask).tolist() == [[1024] * 3]
    assert pooling.first_last_average(ones * 60000, ones * 60000, mask).tolist() == (ones[:, 0] * 60000).tolist()
    assert pooling.masked_mean(ones, mask).dtype == dtype


def test_gradients():
    x, last, mask = numbers(2, 5, 3), numbers(2, 5, 3), torch.tensor([[1, 1, 0, 1, 0], [0] * 5]) == 1
    assert gradcheck(pooling.first, (x,))
    assert gradcheck(pooling.masked_mean, (x, mask))
    assert gradcheck(pooling.first_last_average, (x, last, mask))
    assert gradcheck(pooling.pooler_linear, (x, numbers(3, 7), numbers(7)))
    assert gradcheck(pooling.pooler_tanh, (x, numbers(3, 7), numbers(7)))


def test_compiled_with_open_sizes_equals_eager():
    compiled = torch.compile(pooling.first_last_average, fullgraph=True, dynamic=True)
    for n in (5, 7):
        first, mask = numbers(3, n, 11).detach().float(), torch.arange(n) < torch.tensor([[n], [2], [0]])
        assert_close(compiled(first, 2 * first, mask), pooling.first_last_average(first, 2 * first, mask))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: pooling.first(X[0, 0]), ShapeError, "pooling.first: expected x of shape"),
        (lambda: pooling.first(X[:, :0]), ShapeError, "n >= 1"),
        (lambda: pooling.first(X.long()), DomainError, "x must be a floating tensor, received torch.int64"),
        (lambda: pooling.masked_mean(X, MASK[:, :2]), ShapeError, r"pooling.masked_mean: .*\(2, 3, 2\).*\(2, 2\)"),
        (lambda: pooling.masked_mean(X[0, 0], MASK[0, 0]), ShapeError, "x of shape"),
        (lambda: pooling.masked_mean(X, MASK.float()), DomainError, "mask must be a boolean tensor"),
        (lambda: pooling.masked_mean([1.0], MASK), DomainError, "received list"),
        (lambda: pooling.first_last_average(X, X[:1], MASK), ShapeError, "equal shapes"),
        (lambda: pooling.first_last_average(X, X, MASK[0]), ShapeError, "first of shape"),
        (lambda: pooling.first_last_average(X, X.long(), MASK), DomainError, "last must be a floating"),
        (lambda: pooling.pooler_linear(X, KERNEL.T, BIAS), ShapeError, "pooling.pooler_linear: expected"),
        (lambda: pooling.pooler_linear(X[:, :0], KERNEL, BIAS), ShapeError, "n >= 1"),
        (lambda: pooling.pooler_tanh(X, KERNEL, BIAS[:2]), ShapeError, "pooling.pooler_tanh: expected"),
        (lambda: pooling.pooler_tanh(X, KERNEL, None), DomainError, "bias must be a floating tensor"),
    ],
)
def test_errors_say_what_was_expected_and_received(call, error, says):
    with pytest.raises(error, match=says):
        call()
