"""torchimpl.ops.gau: units by hand, FLASH-pytorch's unit, gradients, and 16 bits."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from conformance.case import Package
from refimpl.check import DomainError, ShapeError
from tests.golden import collection, lucidrains
from torchimpl.ops import attention_kernel as kernels
from torchimpl.ops import gau, norm, rope

TORCH = Package("torchimpl.ops")
BARE = partial(kernels.squared_relu_constant, length=1)
NAMES = ("w_in", "b_in", "gamma_q", "beta_q", "gamma_k", "beta_k", "w_out", "b_out")
SU = {"rotate": rope.rotate_interleaved, "kernel": kernels.squared_relu_visible}


def drawn(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes)


def weights(d=5, e=3, s=2, dtype=torch.float64):
    return drawn((d, 2 * e + s), (2 * e + s,), (s,), (s,), (s,), (s,), (e, d), (d,), dtype=dtype, seed=1)


def silu(x):
    return x / (1 + math.exp(-x))


def test_parts_and_scale_offset_by_hand() -> None:
    # x W counts the columns: u, u, v, v, z.
    found = gau.parts(
        torch.tensor([[1.0]]), torch.tensor([[1.0, 2, 3, 4, 5]]), torch.tensor([0.0, 0, 0, 1, 0]), key_width=1
    )
    for part, columns in zip(found, ((1, 2), (3, 5), (5,)), strict=True):
        torch.testing.assert_close(part, torch.tensor([[silu(c) for c in columns]]))
    assert found._fields == ("gate", "value", "shared")
    assert gau.parts(torch.ones(2, 3), torch.ones(3, 2), None, key_width=2).gate.shape == (2, 0)
    z, gamma, beta = torch.tensor([[1.0, 2.0]]), torch.tensor([3.0, 5.0]), torch.tensor([0.5, -1.0])
    assert gau.scale_offset(z, gamma, None).tolist() == [[3.0, 10.0]]
    assert gau.scale_offset(z, gamma, beta).tolist() == [[3.5, 9.0]]
    assert torch.autograd.gradcheck(gau.scale_offset, [t.double().requires_grad_() for t in (z, gamma, beta)])


def test_units_by_hand() -> None:
    # Two tokens 1 and 2, widths e = 1 and s = 4 with equal features: scores are 4 z z' over 2, or over a length.
    x, w_in = torch.tensor([[[1.0], [2.0]]], dtype=torch.float64), torch.ones(1, 6, dtype=torch.float64)
    ones, w_out = torch.ones(4, dtype=torch.float64), torch.tensor([[10.0]], dtype=torch.float64)
    a, b = silu(1.0), silu(2.0)
    given = (w_in, None, ones, None, ones, None, w_out, None)
    bias = torch.tensor([[0.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    found = gau.unit(x, None, bias, None, None, *given, **SU)
    mixed = ((2 * a * a) ** 2 * a + (2 * a * b - 1) ** 2 * b) / 2, ((2 * a * b) ** 2 * a + (2 * b * b) ** 2 * b) / 2
    torch.testing.assert_close(found, torch.tensor([[[10 * a * mixed[0]], [10 * b * mixed[1]]]], dtype=torch.float64))
    mask = torch.tensor([[False, False], [True, False]])
    options = {"length": 8, "rotate": rope.rotate_half_split, "kernel": BARE}
    found = gau.unit_paper(x, mask, bias, None, None, *given, **options)
    expected = [0.0, 10 * b * (a * b / 2) ** 2 * a]
    torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float64))
    # Gate and queries, keys, values from three sequences; the gate's column is 3, the queries' are 1.
    y, w_u_q = x[:, :1] + 2, torch.tensor([[3.0, 1, 1, 1, 1]], dtype=torch.float64)
    w_k, w_v = torch.full((1, 4), -1.0).double(), torch.full((1, 1), 0.5).double()
    given = (None, None, None, None, None, w_u_q, None, w_k, None, w_v, None, w_out, ones[:1])
    assert not (gau.unit_cross(x, y, 2 * y, *given, **SU) - 1).any()
    found, c = gau.unit_cross(x, -y, 2 * y, *given, **SU), silu(3.0)
    expected = [1 + 10 * silu(3 * t) * (2 * silu(t) * c) ** 2 * c for t in (1.0, 2.0)]
    torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float64))


def test_blocks() -> None:
    x, given = drawn((2, 7, 5))[0], weights()
    normalise = partial(norm.rms_norm, epsilon=0.5)
    post = gau.block_post_norm(x, None, None, None, None, *given, **SU, epsilon=0.5)
    torch.testing.assert_close(post, normalise(x + gau.unit(x, None, None, None, None, *given, **SU)))
    paper = {"length": 3, "rotate": rope.rotate_half_split, "kernel": BARE}
    pre = gau.block_pre_norm(x, None, None, None, None, *given, **paper, norm=normalise)
    torch.testing.assert_close(pre, x + gau.unit_paper(normalise(x), None, None, None, None, *given, **paper))


def test_is_the_unit_of_flash_pytorch() -> None:
    flash_pytorch = pytest.importorskip("flash_pytorch")
    torch.manual_seed(0)
    theirs = flash_pytorch.GAU(dim=12, query_key_dim=6, expansion_factor=1.5).double()
    offsets, (to_hidden, to_qk) = theirs.offsetscale, (part[0] for part in (theirs.to_hidden, theirs.to_qk))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    # Its value comes before the gate, its keys have a layer of their own, and it divides its bias by the length.
    value, gate = to_hidden.weight.chunk(2)
    value_bias, gate_bias = to_hidden.bias.chunk(2)
    w_in, b_in = torch.cat([gate, value, to_qk.weight]).T, torch.cat([gate_bias, value_bias, to_qk.bias])
    x, valid = torch.randn(2, 7, 12, dtype=torch.float64), torch.arange(7) < torch.tensor([[7], [4]])
    found = gau.block_pre_norm(
        x, valid[:, None], theirs.rel_pos_bias(x[0] @ x[0].mT) / 7, None, None, w_in, b_in, offsets.gamma[0],
        offsets.beta[0], offsets.gamma[1], offsets.beta[1], theirs.to_out[0].weight.T, theirs.to_out[0].bias,
        length=7, rotate=rope.rotate_half_split, kernel=BARE,
        norm=lambda t: norm.layer_norm(t, theirs.norm.weight, theirs.norm.bias, epsilon=1e-5),
    )  # fmt: skip
    torch.testing.assert_close(found, theirs(x, mask=valid), rtol=1e-11, atol=1e-11)


def of_golden(array, dtype):
    tensor = torch.tensor(array)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("name", lucidrains.GAU)
def test_flash_pytorchs_outputs_in_float32(name: str) -> None:
    """Within what float32 may do to the formula, weights and input rounded first."""
    golden = collection.load("flash_pytorch", name)
    with torch.no_grad():
        found = lucidrains.gau(TORCH, partial(of_golden, dtype=torch.float32), golden, name)
    assert found.dtype == torch.float32
    bound = lucidrains.Balls("float32").gau(golden, name).rad
    assert np.max(np.abs(found.double().numpy() - golden["y"]) / bound) < 1


@pytest.mark.parametrize("name", lucidrains.GAU)
def test_flash_pytorchs_gradients(name: str) -> None:
    golden = collection.load("flash_pytorch", name)
    x = torch.tensor(golden["x"], requires_grad=True)
    y = lucidrains.gau(TORCH, partial(of_golden, dtype=torch.float64), golden, name, x=x)
    (found,) = torch.autograd.grad(y, x, torch.tensor(golden["grad_y"]))
    expected = torch.tensor(golden["grad_x"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


def test_positions() -> None:
    x, given, theta = drawn((2, 7, 5))[0], weights(s=4), rope.frequencies(4, base=100.0).double()

    def at(places):
        return gau.unit(x, None, None, None if places is None else torch.tensor(places), theta, *given, **SU)

    # Only differences count, and they do count.
    torch.testing.assert_close(at([0, 1, 2, 3, 4, 5, 6]), at([9, 10, 11, 12, 13, 14, 15]))
    torch.testing.assert_close(at(None), at([3] * 7))
    assert (at(None) - at([0, 1, 2, 3, 4, 5, 6])).abs().max() > 1e-3


def test_gradients() -> None:
    x, bias = drawn((2, 3, 5), (3, 3))
    mask = torch.tensor([[[1, 0, 1]], [[0, 0, 0]]], dtype=torch.bool)
    given = [t.requires_grad_() for t in (x, bias, *weights())]
    theta, places = rope.frequencies(2, base=100.0).double(), torch.tensor([4, 0, 2])
    for kernel in (BARE, kernels.softmax):
        unit = partial(gau.unit, rotate=rope.rotate_interleaved, kernel=kernel)
        assert torch.autograd.gradcheck(lambda x, b, *w, unit=unit: unit(x, mask, b, places, theta, *w), given)
    block = partial(gau.block_pre_norm, length=3, rotate=rope.rotate_half_split, kernel=BARE, norm=lambda t: 2 * t)
    assert torch.autograd.gradcheck(lambda x, b, *w: block(x, mask, b, None, None, *w), given)
    block = partial(gau.block_post_norm, **SU, epsilon=0.25)
    assert torch.autograd.gradcheck(lambda x, b, *w: block(x, mask, b, None, None, *w), given)
    cross = drawn((2, 3, 5), (2, 5, 7), (2, 5, 2), (5, 5), (5,), (7, 2), (2,), (2, 3), (3,), (3, 5), (5,), seed=3)
    cross = [t.requires_grad_() for t in cross]
    assert torch.autograd.gradcheck(
        lambda x, k, v, *w: gau.unit_cross(x, k, v, None, None, None, None, None, *w, **SU), cross
    )


def test_a_token_that_sees_nothing() -> None:
    x, given = drawn((2, 3, 5))[0].requires_grad_(), weights()
    mask = torch.tensor([[True] * 3, [False] * 3, [True, False, False]])
    for kernel in (kernels.softmax, kernels.squared_relu_visible, kernels.laplace):
        o = gau.unit(x, mask, None, None, None, *given, rotate=rope.rotate_half_split, kernel=kernel)
        assert torch.equal(o[:, 1], given[-1].expand(2, 5))
        assert torch.autograd.grad(o.sum(), x)[0].isfinite().all()


def test_16_bits() -> None:
    x, given = drawn((2, 7, 5))[0], weights()
    exact = gau.unit(x, None, None, None, None, *given, **SU)
    for dtype in (torch.float16, torch.bfloat16):
        found = gau.unit(x.to(dtype), None, None, None, None, *(t.to(dtype) for t in given), **SU)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps * exact.abs().max())
    # Scores of 400: their square leaves float16, times a value of 2^-8 it does not.
    w_in, one = torch.tensor([[1.0, 2.0**-8, 20.0]]), torch.ones(1)
    given = (w_in, None, one, None, one, None, torch.tensor([[2.0**-6]]), None)
    found = gau.unit(
        torch.ones(1, 1).half(), None, None, None, None, *(t if t is None else t.half() for t in given), **SU
    )
    expected = silu(1.0) * silu(2.0**-8) * 400**2 / 64
    assert found.item() == pytest.approx(expected, rel=3e-3)


def test_errors() -> None:
    x, given = drawn((2, 3, 5))[0], dict(zip(NAMES, weights(), strict=True))

    def call(function=gau.unit, *, mask=None, bias=None, positions=None, at=x, options=SU, **changed):
        return function(at, mask, bias, positions, None, *{**given, **changed}.values(), **options)

    truth = torch.ones(2, 3, 3, dtype=torch.bool)
    wrong = {
        "gau.unit: expected a mask": [{"mask": truth[:, 0]}, {"mask": truth[0, :, :2]}],
        "gau.unit: expected a bias that broadcasts": [{"bias": x}, {"bias": x[None, :, :, :3]}],
        r"gau.unit: expected gamma_q \(s,\)": [{"gamma_q": x[0]}],
        r"gau.parts: expected x": [{"at": x[..., :3]}, {"b_in": x[0, 0]}, {"w_in": given["w_in"][:, :-1]}],
        r"gau.parts: expected w_in": [{"w_in": x}, {"w_in": given["w_in"][:, :1]}],
        r"gau.scale_offset: expected gamma": [{"gamma_k": x[0, 0]}],
        r"gau.scale_offset: expected beta": [{"beta_k": x[0, 0]}],
        r"expected queries \(\*b, n, s\)": [{"at": x[0, 0]}],
        "attention.project: expected x": [{"w_out": x[0, :2]}],
    }
    for message, cases in wrong.items():
        for case in cases:
            with pytest.raises(ShapeError, match=message):
                call(**case)
    for message, case in {
        "mask must be a boolean tensor": {"mask": x[0, :, :3]},
        "bias must be a floating tensor": {"bias": truth},
        "gamma_q must be a floating tensor": {"gamma_q": torch.ones(2).long()},
        "w_in must be a floating tensor": {"w_in": given["w_in"].long()},
        "gamma must be a floating tensor": {"gamma_k": torch.ones(2).long()},
        "beta must be a floating tensor": {"beta_k": torch.ones(2).long()},
        "x must be a floating tensor": {"at": x.long()},
        "expected frequencies for positions": {"positions": torch.arange(3)},
    }.items():
        with pytest.raises(DomainError, match=message):
            call(**case)
    with pytest.raises(DomainError, match="gau.unit_paper: expected length >= 1, received length=0"):
        call(gau.unit_paper, options={"length": 0, **SU})
    with pytest.raises(DomainError, match="gau.parts: expected key_width >= 1"):
        gau.parts(x, given["w_in"], None, key_width=0)
    narrow = {"w_out": given["w_out"][:, :2], "b_out": None}
    with pytest.raises(ShapeError, match="gau.block_post_norm: expected a unit that ends in the width of x"):
        call(gau.block_post_norm, options={"epsilon": 0.5, **SU}, **narrow)
    with pytest.raises(ShapeError, match="gau.block_pre_norm: expected a unit that ends in the width of x"):
        call(gau.block_pre_norm, options={"length": 3, "norm": torch.neg, **SU}, **narrow)
    with pytest.raises(DomainError, match="gau.block_pre_norm: x must be a floating tensor"):
        call(gau.block_pre_norm, at=x.long(), options={"length": 3, "norm": torch.neg, **SU})
    w_k, w_v = x[0, :, :2], x[0, :2, :3]
    for keys, values, w in ((x, x[:, :1, :2], w_k), (x, x[..., :2], x[0, :, :0])):
        with pytest.raises(ShapeError):
            gau.unit_cross(x, keys, values, *[None] * 5, given["w_in"], None, w.T, None, w_v, None, x[0], None, **SU)


def test_compiled() -> None:
    call = partial(gau.block_post_norm, rotate=rope.rotate_interleaved, kernel=BARE, epsilon=1e-7)
    theta, given = rope.frequencies(2, base=100.0), weights(dtype=torch.float32)
    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for n in (3, 7):
        x = drawn((2, n, 5), dtype=torch.float32)[0]
        mask = torch.stack([torch.arange(n) < 2, torch.zeros(n, dtype=torch.bool)])[:, None]
        made = [f(x, mask, None, torch.arange(n), theta, *given) for f in (compiled, call)]
        torch.testing.assert_close(*made, rtol=1e-4, atol=1e-5)
