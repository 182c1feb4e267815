"""torchimpl.ops.attention: masks and heads by hand, the fused form against the plain one, torch's layer, 16 bits."""

import math
from functools import partial

import pytest
import torch

from refimpl.check import DomainError, ShapeError
from torchimpl.ops import attention, rope
from torchimpl.ops import attention_kernel as kernels

BARE = partial(kernels.squared_relu_constant, length=1)
CAUSAL = torch.ones(3, 5, dtype=torch.bool).tril(2)


def drawn(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes)


def qkv(b=2, n=3, m=5, h=4, g=2, d=7, e=7, dtype=torch.float64):
    return drawn((b, n, h, d), (b, m, g, d), (b, m, g, e), dtype=dtype)


def masks(b=2, n=3, m=5, h=4):
    """None, shared, by key, by head; the last three have a row that sees nothing."""
    keys = torch.tensor([[0, 0, 1, 1, 1], [0] * 5], dtype=torch.bool)[:, None, None, :]
    heads = torch.rand(b, h, n, m, generator=torch.Generator().manual_seed(1)) < 0.5
    heads[1, -1, 1] = False
    return {"none": None, "shared": CAUSAL & torch.tensor([[True], [False], [True]]), "keys": keys, "heads": heads}


def test_masks_by_hand() -> None:
    valid = torch.tensor([[True, True, False], [False, True, True]])
    assert attention.key_mask(valid).tolist() == [[[True, True, False]], [[False, True, True]]]
    assert attention.causal_mask(2, 3).int().tolist() == [[1, 1, 0], [1, 1, 1]]
    assert attention.causal_mask(3, 2).int().tolist() == [[0, 0], [1, 0], [1, 1]]
    assert attention.causal_mask(0, 2).shape == (0, 2)
    segments = torch.tensor([0, 0, 1, 1])
    assert attention.unilm_mask(segments).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert attention.per_head(attention.key_mask(valid)).shape == (2, 1, 1, 3)
    rows = torch.tensor([[0, 0, 1, 1, 0], [1, 0, 1, 0, 1], [0] * 5], dtype=torch.bool)
    assert attention.positions_from_mask(rows).tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 1, 2], [0] * 5]


@pytest.mark.parametrize("form", ["fused", "plain"])
def test_attend_by_hand(form) -> None:
    # Two query heads on one key head; scores are (0, ln 3 + hidden) and (ln 3, 0), and the last key is hidden.
    q = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    k = torch.tensor([[[math.log(3), 0.0]], [[0.0, math.log(3)]], [[9.0, 9.0]]]) / 2
    v = torch.tensor([[[4.0, 0.0, 1.0]], [[0.0, 8.0, 1.0]], [[5.0, 5.0, 5.0]]])
    kernel = kernels.softmax if form == "fused" else lambda scores, mask: kernels.softmax(scores, mask)
    o = attention.attend(q, k, v, torch.tensor([[True, True, False]]), kernel=kernel, scale=2.0)
    torch.testing.assert_close(o, torch.tensor([[[1.0, 6.0, 1.0], [3.0, 2.0, 1.0]]]))


def test_neighbours_share_a_key_head() -> None:
    q = torch.ones(1, 6, 1)
    k, v = torch.ones(1, 2, 1), torch.tensor([[[5.0], [7.0]]])
    for kernel in (kernels.softmax, BARE):
        o = attention.attend(q, k, v, None, kernel=kernel, scale=1.0)
        assert o.flatten().tolist() == [5.0, 5.0, 5.0, 7.0, 7.0, 7.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", masks().values(), ids=masks())
def test_fused_is_plain(mask, dtype) -> None:
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    for scale, sizes in ((0.3, {}), (-0.7, {"e": 3}), (0.0, {"g": 4}), (1.0, {"g": 1, "e": 11})):
        given = [t.requires_grad_() for t in qkv(**sizes, dtype=dtype)]
        heads_first = [t.transpose(1, 2) for t in given]
        fused = attention._attend_fused(*heads_first, mask, scale)
        plain = attention._attend_plain(*heads_first, mask, kernels.softmax, scale)
        assert fused.dtype == plain.dtype == dtype
        torch.testing.assert_close(fused, plain, rtol=tolerance, atol=tolerance)
        hidden = torch.zeros_like(plain) if mask is None else ~mask.any(-1, keepdim=True)
        assert not (fused * hidden).any() and not (plain * hidden).any()
        upstream = drawn(fused.shape, dtype=dtype, seed=2)[0]
        found = [torch.autograd.grad(y, given, upstream) for y in (fused, plain)]
        for one, other in zip(*found, strict=True):
            assert one.isfinite().all()
            torch.testing.assert_close(one, other, rtol=4 * tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("kernel", [kernels.softmax, kernels.squared_relu_visible, kernels.laplace])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_keys_do_not_matter(kernel, dtype) -> None:
    q, k, v = qkv(dtype=dtype)
    keys = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 1]], dtype=torch.bool)
    found = []
    for poison in (0.0, 1e30, -1e30):
        given = [q, *(torch.where(keys[..., None, None], t, poison) for t in (k, v))]
        given = [t.requires_grad_() for t in given]
        o = attention.attend(*given, keys[:, None, None], kernel=kernel, scale=0.4)
        found.append((o, *torch.autograd.grad(o.sum(), given[:1])))
    for o, gradient in found[1:]:
        assert torch.equal(o, found[0][0]) and torch.equal(gradient, found[0][1])


@pytest.mark.parametrize("kernel", [kernels.softmax, kernels.squared_relu_visible])
def test_gradients(kernel) -> None:
    given = [t.requires_grad_() for t in qkv(b=2, n=3, m=5, h=2, g=1, d=3, e=2)]
    for mask in masks(h=2).values():
        attend = partial(attention.attend, mask=mask, kernel=kernel, scale=0.7)
        assert torch.autograd.gradcheck(lambda q, k, v, attend=attend: attend(q, k, v), given)


def test_softmax_is_torchs_attention() -> None:
    o = attention.attend(*(t.requires_grad_() for t in qkv()), None, kernel=kernels.softmax, scale=1.0)
    assert "ScaledDotProduct" in str(o.grad_fn.next_functions[0][0])


def test_nothing_to_attend() -> None:
    for kernel in (kernels.softmax, BARE):
        o = attention.attend(*qkv(m=0), None, kernel=kernel, scale=1.0)
        assert o.shape == (2, 3, 4, 7) and not o.any()
        assert attention.attend(*qkv(n=0), None, kernel=kernel, scale=1.0).shape == (2, 0, 4, 7)
        assert attention.attend(*qkv(h=0, g=0), None, kernel=kernel, scale=1.0).shape == (2, 3, 0, 7)
        assert not attention.attend(*qkv(d=0, e=0), None, kernel=kernel, scale=1.0).numel()


def test_16_bits() -> None:
    # The square of 300 leaves float16, 90000 times 2^-10 does not; beside it 2^-13 squared is below float16.
    q, k = torch.tensor([[[300.0]]]), torch.tensor([[[1.0]], [[2.0**-21]]])
    v = torch.tensor([[[2.0**-10, 0.0]], [[0.0, 2.0**15]]])
    o = attention.attend(*(t.to(torch.float16) for t in (q, k, v)), None, kernel=BARE, scale=1.0)
    assert o.dtype == torch.float16
    expected = torch.tensor([[[90000 / 1024, (300 * 2.0**-21) ** 2 * 2**15]]])
    torch.testing.assert_close(o.float(), expected, rtol=1e-3, atol=0)
    # 4096 equal keys; a sum in bfloat16 would stall at 256 of them.
    ones = torch.ones(4096, 1, 1, dtype=torch.bfloat16)
    for kernel in (kernels.softmax, kernels.squared_relu_visible):
        assert attention.attend(ones[:1], ones, ones, None, kernel=kernel, scale=1.0).item() == 1.0


def test_project() -> None:
    x, w, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0, 3], [0, 1, 4]]), torch.tensor([0.5, 0, 0])
    assert attention.project(x, w, None).tolist() == [[1.0, 2.0, 11.0]]
    assert attention.project(x[0], w, b).tolist() == [1.5, 2.0, 11.0]
    assert torch.autograd.gradcheck(attention.project, [t.double().requires_grad_() for t in (x, w, b)])
    assert attention.project(torch.ones(3, 0), torch.ones(0, 2), torch.ones(2)).tolist() == [[1.0, 1.0]] * 3


def test_multi_head_attention_is_torchs_layer() -> None:
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    torch.nn.init.normal_(layer.in_proj_bias)
    torch.nn.init.normal_(layer.out_proj.bias)
    x, valid = torch.randn(2, 5, 12, dtype=torch.float64), torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]).bool()
    expected = layer(x, x, x, key_padding_mask=~valid, need_weights=False)[0]
    ws, bs = [w.T for w in layer.in_proj_weight.chunk(3)], layer.in_proj_bias.chunk(3)
    given = [t for pair in zip(ws, bs, strict=True) for t in pair] + [layer.out_proj.weight.T, layer.out_proj.bias]
    mask, options = valid[:, None, None], {"heads": 3, "rotate": rope.rotate_interleaved}
    for kernel in (kernels.softmax, lambda scores, mask: kernels.softmax(scores, mask)):
        found = attention.multi_head_attention(x, mask, None, None, *given, **options, kernel=kernel)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def layer(d=5, d_memory=7, heads=2, groups=1, width=4, e=3):
    shapes = (d, heads * width), (heads * width,), (d_memory, groups * width), (groups * width,)
    return drawn(*shapes, (d_memory, groups * e), (groups * e,), (heads * e, d), (d,), seed=3)


def test_positions_of_the_two_sides() -> None:
    x, memory = drawn((2, 3, 5), (2, 5, 7))
    theta = rope.frequencies(4, base=100.0).double()
    call = partial(attention.cross_attention, heads=2, rotate=rope.rotate_interleaved, kernel=kernels.softmax)

    def at(p, r):
        p, r = (None if places is None else torch.tensor(places) for places in (p, r))
        return call(x, memory, None, p, r, theta, *layer())

    both = at([5, 2, 3], [0, 1, 2, 3, 4])
    # Only differences of positions count, and they do count.
    torch.testing.assert_close(both, at([15, 12, 13], [10, 11, 12, 13, 14]))
    zeros = [0] * 5
    torch.testing.assert_close(at(None, None), at(zeros[:3], zeros))
    torch.testing.assert_close(at([5, 2, 3], None), at([5, 2, 3], zeros))
    torch.testing.assert_close(at(None, [0, 1, 2, 3, 4]), at(zeros[:3], [0, 1, 2, 3, 4]))
    for other in (at(None, None), at([5, 2, 3], None), at(None, [0, 1, 2, 3, 4])):
        assert (both - other).abs().max() > 1e-3


def test_rotated_values_turn_with_their_keys() -> None:
    q, k, v = qkv(e=6)
    theta = rope.frequencies(6, base=100.0).double()
    call = partial(attention.attend_rotated_values, rotate=rope.rotate_half_split, kernel=BARE, scale=0.3)
    places = torch.tensor([4, 0, 9, 2, 7])
    here, there = (call(q, k, v, rope.angles(places + shift, theta), None) for shift in (0, 5))
    turn = rope.angles(torch.tensor([5]), theta)[:, None]
    torch.testing.assert_close(there, rope.rotate_half_split(here, turn))
    assert (there - here).abs().max() > 1e-2
    one = call(q[:, :1], k[:, :1], v[:, :1], rope.angles(places[:1], theta), None)
    weights = (q[:, :1, :, None] @ k[:, :1].repeat_interleave(2, dim=2)[..., None]).squeeze(-1).mul(0.3).relu().square()
    expected = weights * rope.rotate_half_split(v[:, :1], rope.angles(places[:1], theta)[:, None]).repeat_interleave(
        2, 2
    )
    torch.testing.assert_close(one, expected)


def test_errors_of_masks() -> None:
    for function in (attention.key_mask, attention.positions_from_mask):
        with pytest.raises(DomainError, match=f"attention.{function.__name__}: valid must be a boolean tensor"):
            function(torch.ones(3))
        with pytest.raises(ShapeError, match="expected valid"):
            function(torch.tensor(True))
    with pytest.raises(DomainError, match="causal_mask: expected lengths >= 0, received n=-1, m=2"):
        attention.causal_mask(-1, 2)
    with pytest.raises(DomainError, match="segment_ids must be a tensor of integers"):
        attention.unilm_mask(torch.zeros(3))
    with pytest.raises(ShapeError, match=r"expected segment_ids \(..., n\)"):
        attention.unilm_mask(torch.tensor(1))
    with pytest.raises(ShapeError, match=r"expected a mask \(..., n, m\)"):
        attention.per_head(torch.ones(3, dtype=torch.bool))


def test_errors_of_attend() -> None:
    q, k, v = qkv()
    call = partial(attention.attend, kernel=kernels.softmax, scale=1.0)
    wrong = (
        (q[..., :3], k, v),
        (q, k[:, :4], v),
        (q[:1], k, v),
        (q, k[0], v[0]),
        (q[:, :, :3], k, v),
        (q, k[:, :, :0], v),
    )
    for given in (*wrong, (q[0, 0], k[0, 0], v[0, 0])):
        with pytest.raises(ShapeError, match=r"attention.attend: expected q \(\*b, n, h, d\).*received q of shape"):
            call(*given, None)
    for shape in ((2, 3, 5), (1, 3, 5), (5,), (3, 1), (2, 4, 3, 4), (2, 2, 3, 5), (1, 2, 4, 3, 5)):
        with pytest.raises(ShapeError, match=r"attention.attend: expected a mask \(n, m\)"):
            call(q, k, v, torch.ones(shape, dtype=torch.bool))
    with pytest.raises(DomainError, match="attention.attend: mask must be a boolean tensor"):
        call(q, k, v, torch.ones(3, 5))
    with pytest.raises(DomainError, match="attention.attend: k must be a floating tensor"):
        call(q, k.long(), v, None)
    for scale in (math.inf, -math.inf, math.nan):
        with pytest.raises(DomainError, match="attention.attend: expected a finite scale"):
            call(q, k, v, None, scale=scale)
    with pytest.raises(ShapeError, match=r"expected angles_k \(..., m, r\)"):
        attention.attend_rotated_values(
            q, k, v, torch.ones(3), None, rotate=rope.rotate_half_split, kernel=BARE, scale=1.0
        )


def test_errors_of_layers() -> None:
    x, w, b = drawn((2, 3), (3, 5), (5,))
    for given in ((x, w.T, None), (x, w[0], None), (x, w, b[:3]), (x, w, b[None]), (x[0, 0], w, None)):
        with pytest.raises(ShapeError, match=r"attention.project: expected x \(..., in\), w \(in, out\), b \(out,\)"):
            attention.project(*given)
    with pytest.raises(DomainError, match="attention.project: b must be a floating tensor"):
        attention.project(x, w, b.long())
    x, memory = drawn((2, 3, 5), (2, 5, 7))
    call = partial(attention.cross_attention, x, memory, None)
    options = {"rotate": rope.rotate_interleaved, "kernel": kernels.softmax}
    with pytest.raises(DomainError, match="expected heads >= 1, received heads=0"):
        call(None, None, None, *layer(), heads=0, **options)
    for heads in (3, 9):
        with pytest.raises(ShapeError, match=r"expected columns of w_q in whole heads.*w_v of shape \(7, 3\)"):
            call(None, None, None, *layer(), heads=heads, **options)
    with pytest.raises(DomainError, match="expected frequencies for positions_q"):
        call(torch.arange(3), None, None, *layer(), heads=2, **options)


def test_compiled() -> None:
    call = partial(attention.attend, kernel=kernels.softmax, scale=0.3)
    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for n, m in ((3, 5), (5, 7)):
        given = qkv(n=n, m=m, dtype=torch.float32)
        mask = torch.stack([torch.arange(m) < 4, torch.zeros(m, dtype=torch.bool)])[:, None, None]
        torch.testing.assert_close(compiled(*given, mask), call(*given, mask), rtol=1e-4, atol=1e-5)
