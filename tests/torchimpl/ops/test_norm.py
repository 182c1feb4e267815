"""torchimpl.ops.norm: values by hand, rows without spread, fused against plain, and 16 bits."""

import math

import pytest
import torch

from refimpl.check import DomainError, ShapeError
from torchimpl.ops import norm


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_rms_norm_by_hand() -> None:
    x = rows([1.0, -1.0, 5.0, 3.0], [0.0, 0.0, 0.0, 0.0])
    # The mean of squares is 9.
    assert torch.equal(norm.rms_norm(x, epsilon=7.0), rows([0.25, -0.25, 1.25, 0.75], [0.0] * 4))
    torch.testing.assert_close(norm.rms_norm(x, epsilon=0.0), rows([1 / 3, -1 / 3, 5 / 3, 1.0], [0.0] * 4))
    scale = torch.tensor([2.0, 1.0, -1.0, 0.0], dtype=torch.float64)
    assert torch.equal(norm.rms_norm_scaled(x, scale, epsilon=7.0), rows([0.5, -0.25, -1.25, 0.0], [0.0] * 4))


def test_layer_norm_by_hand() -> None:
    # Mean 3, variance 14 / 4.
    x, scale, bias = rows([1.0, 2.0, 3.0, 6.0]), torch.tensor([1.0, 2.0, 3.0, -1.0]), torch.tensor([0.0, 0.5, 4.0, 1.0])
    expected = rows([-1.0, -0.5, 4.0, -0.5])
    # Mixed dtypes take the plain form, equal ones the fused.
    torch.testing.assert_close(norm.layer_norm(x, scale, bias, epsilon=0.5), expected)
    torch.testing.assert_close(norm.layer_norm(x, scale.double(), bias.double(), epsilon=0.5), expected)


@pytest.mark.parametrize("epsilon", [0.0, 1e-320, 1e-12])
def test_constant_rows_give_bias(epsilon) -> None:
    x = torch.tensor([[0.1] * 7, [-3.3] * 7, [0.0] * 7])
    scale, bias = torch.linspace(1, 2, 7), torch.linspace(-1, 1, 7)
    assert torch.equal(norm.layer_norm(x, scale, bias, epsilon=epsilon), bias.expand(3, 7))
    assert torch.equal(norm._layer_norm_plain(x, scale, bias, epsilon), bias.expand(3, 7))


def test_width_0() -> None:
    x, none = torch.zeros(3, 0), torch.zeros(0)
    for epsilon in (0.0, 1e-5):
        assert norm.rms_norm(x, epsilon=epsilon).shape == (3, 0)
        assert norm.layer_norm(x, none, none, epsilon=epsilon).shape == (3, 0)


@pytest.mark.parametrize("epsilon", [0.0, 0.25])
def test_gradients(epsilon) -> None:
    x = torch.tensor([[0.3, -1.2, 2.0, 0.7, -0.4], [1.1, 0.2, -0.9, 0.6, 3.0]], dtype=torch.float64)
    if epsilon:
        x = torch.cat([x, torch.zeros(1, 5, dtype=torch.float64), torch.ones(1, 5, dtype=torch.float64)])
    x = x.requires_grad_()
    scale, bias = (torch.linspace(low, 2, 5, dtype=torch.float64).requires_grad_() for low in (-1, 1))
    assert torch.autograd.gradcheck(lambda x: norm.rms_norm(x, epsilon=epsilon), x)
    assert torch.autograd.gradcheck(lambda *a: norm.rms_norm_scaled(*a, epsilon=epsilon), (x, scale))
    for form in (lambda *a: norm.layer_norm(*a, epsilon=epsilon), lambda *a: norm._layer_norm_plain(*a, epsilon)):
        assert torch.autograd.gradcheck(form, (x, scale, bias))


def test_gradient_of_zero_and_constant_rows_is_finite() -> None:
    scale, bias = torch.ones(5), torch.zeros(5)
    forms = (lambda x: norm.rms_norm(x, epsilon=0.0), lambda x: norm.layer_norm(x, scale, bias, epsilon=0.0))
    for form in forms:
        x = torch.tensor([[0.0] * 5, [1.0, 2.0, 3.0, 4.0, 6.0]], requires_grad=True)
        gradient = torch.autograd.grad((form(x) * torch.arange(5)).sum(), x)[0]
        assert torch.equal(gradient[0], torch.zeros(5))
        assert gradient.isfinite().all() and gradient[1].any()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_fused_is_plain(dtype, tolerance) -> None:
    torch.manual_seed(0)
    x, scale, bias = torch.randn(3, 5, 67, dtype=dtype), torch.randn(67, dtype=dtype), torch.randn(67, dtype=dtype)
    x, scale, bias = (t.requires_grad_() for t in (3 * x + 5, scale, bias))
    fused, plain = norm.layer_norm(x, scale, bias, epsilon=1e-5), norm._layer_norm_plain(x, scale, bias, 1e-5)
    assert "NativeLayerNorm" in str(fused.grad_fn)
    torch.testing.assert_close(fused, plain, rtol=tolerance, atol=tolerance)
    upstream = torch.randn_like(fused)
    found = (torch.autograd.grad(y, (x, scale, bias), upstream) for y in (fused, plain))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=20 * tolerance)


def test_16_bits() -> None:
    # Squares of 300 leave float16; of 2^-14 they vanish in it, as an epsilon of 2^-28 does.
    large = torch.tensor([[300.0, -300.0], [2.0**-14, 2.0**-14]], dtype=torch.float16)
    assert norm.rms_norm(large, epsilon=2.0**-28).tolist()[0] == [1.0, -1.0]
    assert norm.rms_norm(large, epsilon=2.0**-28).tolist()[1] == pytest.approx([math.sqrt(0.5)] * 2, rel=1e-3)
    # A sum of ones stalls at 256 in bfloat16.
    ones = torch.ones(1, 4096, dtype=torch.bfloat16)
    assert torch.equal(norm.rms_norm(ones, epsilon=0.0), ones)
    steps = ones + torch.tensor([0.0, 2.0] * 2048, dtype=torch.bfloat16)
    for epsilon in (0.0, 2.0**-20):
        found = norm.layer_norm(steps, ones[0], 0 * ones[0], epsilon=epsilon)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, steps - 2)


def test_errors() -> None:
    x, scale = torch.ones(3, 5), torch.ones(5)
    for epsilon in (-1e-9, math.nan, math.inf):
        with pytest.raises(DomainError, match="norm.rms_norm: expected a finite epsilon >= 0"):
            norm.rms_norm(x, epsilon=epsilon)
    with pytest.raises(ShapeError, match=r"norm.rms_norm: expected x of shape \(..., d\)"):
        norm.rms_norm(torch.tensor(1.0), epsilon=0.0)
    with pytest.raises(ShapeError, match=r"norm.rms_norm_scaled: expected scale of shape \(d,\).*\(3, 5\).*\(3,\)"):
        norm.rms_norm_scaled(x, torch.ones(3), epsilon=0.0)
    with pytest.raises(ShapeError, match="norm.layer_norm: expected bias"):
        norm.layer_norm(x, scale, torch.ones(1, 5), epsilon=0.0)
    with pytest.raises(DomainError, match="norm.layer_norm: scale must be a floating tensor"):
        norm.layer_norm(x, torch.arange(5), scale, epsilon=0.0)
    with pytest.raises(DomainError, match="norm.rms_norm: x must be a floating tensor"):
        norm.rms_norm(torch.arange(5), epsilon=0.0)


def test_compiled() -> None:
    def both(x, scale):
        return norm.rms_norm_scaled(x, scale, epsilon=0.0) + norm.layer_norm(x, scale, scale, epsilon=0.0)

    compiled = torch.compile(both, fullgraph=True, dynamic=True)
    for width in (5, 7):
        x = torch.cat([torch.linspace(-2, 3, 2 * width).reshape(2, width), torch.zeros(1, width)])
        torch.testing.assert_close(compiled(x, x[0]), both(x, x[0]), rtol=1e-5, atol=1e-5)
