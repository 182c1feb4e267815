"""torchimpl.ops.attention_kernel: values by hand, masked scores that are anything, and 16 bits."""

import math
from functools import partial

import pytest
import torch

from refimpl.check import DomainError, ShapeError
from torchimpl.ops import attention_kernel as kernels

BOUND = {
    "softmax": kernels.softmax,
    "softmax_plus": partial(kernels.softmax_plus, n_min=2),
    "squared_relu_visible": kernels.squared_relu_visible,
    "squared_relu_array": kernels.squared_relu_array,
    "squared_relu_constant": partial(kernels.squared_relu_constant, length=3),
    "laplace": kernels.laplace,
}
EACH = pytest.mark.parametrize("kernel", BOUND.values(), ids=BOUND)
LAST_HIDDEN = torch.tensor([True, True, True, False])


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_visible_lengths() -> None:
    scores, mask = torch.zeros(2, 3, 5), torch.tensor([[[True] * 4 + [False]], [[False] * 5]])
    assert kernels.visible_lengths(scores, None).tolist() == [[[5]] * 3] * 2
    assert kernels.visible_lengths(scores, mask).tolist() == [[[4]] * 3, [[0]] * 3]
    assert kernels.visible_lengths(scores, torch.tensor([[True], [False], [True]])).tolist() == [[[5], [0], [5]]] * 2


def test_softmax_by_hand() -> None:
    scores = doubles(1, 2, 5, 1e9).log()
    torch.testing.assert_close(kernels.softmax(scores, LAST_HIDDEN), doubles(0.125, 0.25, 0.625, 0))
    torch.testing.assert_close(kernels.softmax(scores[:3] + 1e3, None), doubles(0.125, 0.25, 0.625))
    # No finite stand-in for a masked score is small enough.
    assert kernels.softmax(torch.full((4,), -3e38), LAST_HIDDEN).tolist() == pytest.approx([1 / 3] * 3 + [0])


def test_softmax_plus_by_hand() -> None:
    # ln 8 / ln 512 is a third; of 3 visible keys and at least 8 it is so too.
    weights = kernels.softmax_plus(3 * doubles(1, 2, 5, 1e9).log(), LAST_HIDDEN, n_min=8)
    torch.testing.assert_close(weights, doubles(0.125, 0.25, 0.625, 0))
    weights = kernels.softmax_plus(3 * doubles(1, 2, 5, 3, 1, 1, 1, 2).log(), None, n_min=1)
    torch.testing.assert_close(weights, doubles(1, 2, 5, 3, 1, 1, 1, 2) / 16)
    # ln 1 = 0 does not bring masked keys back.
    assert (
        kernels.softmax_plus(doubles(7, 1, 2, 9), LAST_HIDDEN.flip(0) & LAST_HIDDEN[[1, 3, 3, 3]], n_min=1).sum() == 0
    )
    only = torch.tensor([False, True, False, False])
    assert kernels.softmax_plus(doubles(7, 1, 2, 9), only, n_min=1).tolist() == [0, 1, 0, 0]


def test_squared_relu_by_hand() -> None:
    scores = doubles(2, -1, 4, 8)
    torch.testing.assert_close(kernels.squared_relu_visible(scores, LAST_HIDDEN), doubles(4 / 3, 0, 16 / 3, 0))
    torch.testing.assert_close(kernels.squared_relu_array(scores, LAST_HIDDEN), doubles(1, 0, 4, 0))
    torch.testing.assert_close(kernels.squared_relu_constant(scores, LAST_HIDDEN, length=8), doubles(0.5, 0, 2, 0))
    torch.testing.assert_close(kernels.squared_relu_visible(scores, None), doubles(1, 0, 4, 16))


def test_laplace_by_hand() -> None:
    # The normal distribution at 0, 1, -1, -5 and -8.
    at = kernels.LAPLACE_MEAN + kernels.LAPLACE_DEVIATION * doubles(0, 1, -1, -5, -8)
    expected = doubles(
        0.5, 0.841344746068542949, 0.158655253931457051, 2.86651571879193912e-07, 6.22096057427178413e-16
    )
    torch.testing.assert_close(kernels.laplace(at, None), expected, rtol=1e-12, atol=0)


@EACH
def test_masked_scores_do_not_matter(kernel) -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, 4, 7)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1, 0], [0] * 7, [0, 0, 0, 1, 0, 0, 0], [1] * 7], dtype=torch.bool)
    upstream = torch.randn(3, 4, 7)
    found = []
    for poison in (0.0, 3e38, -3e38, math.inf, -math.inf, math.nan):
        x = torch.where(mask, scores, poison).requires_grad_()
        weights = kernel(x, mask)
        assert torch.equal(weights.masked_fill(mask, 0), torch.zeros(3, 4, 7))
        gradient = torch.autograd.grad(weights, x, upstream)[0]
        assert torch.equal(gradient.masked_fill(mask, 0), torch.zeros(3, 4, 7))
        found.append((weights, gradient))
    for weights, gradient in found[1:]:
        assert torch.equal(weights, found[0][0]) and torch.equal(gradient, found[0][1])
    assert found[0][1].isfinite().all() and found[0][0].isfinite().all()


@EACH
def test_gradients(kernel) -> None:
    scores = (doubles(0.9, -1.3, 0.2, 2.1, -0.4) + doubles(0, 0.31, -0.53)[:, None]).requires_grad_()
    mask = torch.tensor([[1, 0, 1, 1, 1], [0] * 5, [0, 0, 0, 1, 0]], dtype=torch.bool)
    for seen in (None, mask, mask[:1], mask[:, :1]):
        assert torch.autograd.gradcheck(lambda s, seen=seen: kernel(s, seen), scores)


@EACH
def test_no_keys(kernel) -> None:
    assert kernel(torch.zeros(2, 3, 0), None).shape == (2, 3, 0)
    assert kernel(torch.zeros(2, 3, 0), torch.zeros(3, 0, dtype=torch.bool)).shape == (2, 3, 0)


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_round_once(kernel, dtype) -> None:
    torch.manual_seed(0)
    scores, mask = (3 * torch.randn(5, 11)).to(dtype), torch.rand(5, 11) < 0.7
    found = kernel(scores, mask)
    assert found.dtype == dtype
    torch.testing.assert_close(found, kernel(scores.double(), mask).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_16_bits_neither_overflow_nor_stall() -> None:
    scores = torch.tensor([300.0, -300.0], dtype=torch.float16)
    assert kernels.squared_relu_constant(scores, None, length=1000).tolist() == [90.0, 0.0]
    # A sum of ones stalls at 256 in bfloat16, and counts beyond 256 are not whole there.
    ones = torch.ones(4099, dtype=torch.bfloat16)
    assert torch.equal(kernels.softmax(ones, None), ones / 4096)
    assert torch.equal(64 * ones, 64 * kernels.squared_relu_visible(64 * ones[:4096], None)[0] * ones)


@EACH
def test_errors(kernel) -> None:
    scores = torch.zeros(2, 3, 5)
    name = getattr(kernel, "func", kernel).__name__
    with pytest.raises(DomainError, match=f"attention_kernel.{name}: scores must be a floating tensor"):
        kernel(torch.zeros(3, dtype=torch.int64), None)
    with pytest.raises(DomainError, match=f"attention_kernel.{name}: mask must be a boolean tensor"):
        kernel(scores, torch.ones(5))
    for shape in ((3,), (2, 5), (7, 2, 3, 5), (1, 2, 3, 5)):
        with pytest.raises(ShapeError, match="expected a mask that broadcasts to the scores"):
            kernel(scores, torch.ones(shape, dtype=torch.bool))
    with pytest.raises(ShapeError, match="expected scores with a key axis"):
        kernel(torch.tensor(1.0), None)


def test_lengths_below_1_are_refused() -> None:
    with pytest.raises(DomainError, match="softmax_plus: expected n_min >= 1, received n_min=0"):
        kernels.softmax_plus(torch.zeros(3), None, n_min=0)
    with pytest.raises(DomainError, match="squared_relu_constant: expected length >= 1, received length=0"):
        kernels.squared_relu_constant(torch.zeros(3), None, length=0)


def test_compiled() -> None:
    def both(scores, mask):
        return kernels.softmax_plus(scores, mask, n_min=2) + kernels.laplace(scores, mask)

    compiled = torch.compile(both, fullgraph=True, dynamic=True)
    for keys in (5, 7):
        scores = torch.linspace(-2, 2, 3 * keys).reshape(3, keys)
        mask = (torch.arange(keys) % 3 != 1) & torch.tensor([[True], [False], [True]])
        torch.testing.assert_close(compiled(scores, mask), both(scores, mask), rtol=1e-5, atol=1e-6)
        assert not compiled(scores, mask).masked_fill(mask, 0).any()
