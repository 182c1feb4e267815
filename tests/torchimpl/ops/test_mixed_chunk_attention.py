"""Mixed chunk attention in torch: worked rows, the dense operator, streams, gradients, 16 bits, captured graphs."""

import functools
import math

import numpy as np
import pytest
import torch

from conformance.case import Package
from refimpl.check import DomainError, ShapeError
from tests.golden import collection, lucidrains
from torchimpl.ops import attention_kernel, rope
from torchimpl.ops import mixed_chunk_attention as mca

TORCH = Package("torchimpl.ops")
SQUARED_RELU = functools.partial(attention_kernel.squared_relu_constant, length=1)
MODES = ("bidirectional", "causal", "causal_strict")
NORMALISERS = ("su", "paper", "lucidrains", "lucidrains_causal", "unnormalised", "visible")


def draw(seed, *batch_and_tokens, s=3, e=5, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(*batch_and_tokens, width, generator=rng, dtype=dtype) for width in (s, s, s, s, e)]


@pytest.mark.parametrize(
    "mode, normaliser, expected",
    [
        ("bidirectional", "su", [2.5 + 2.5, 10 + 5, 112.5 + 7.5, 200 + 10]),
        ("bidirectional", "lucidrains", [5 + 2.5, 20 + 5, 225 + 7.5, 400 + 10]),
        ("bidirectional", "unnormalised", [5 + 10, 20 + 20, 225 + 30, 400 + 40]),
        ("bidirectional", "visible", [2.5 + 2.5, 10 + 5, 112.5 + 7.5, 200 + 10]),
        ("causal", "su", [0.5, 10, 40.5 + 4.5, 200 + 6]),
        ("causal", "paper", [1, 20, 81 + 4.5, 400 + 6]),
        ("causal", "lucidrains_causal", [1, 20, 81 + 4.5, 400 + 6]),
        ("causal", "visible", [1, 10, 81 + 4.5, 200 + 6]),
        ("causal_strict", "unnormalised", [0, 4, 0 + 9, 144 + 12]),
        ("causal_strict", "visible", [0, 4, 0 + 4.5, 144 + 6]),
    ],
)
def test_two_chunks_of_two_worked_by_hand(mode, normaliser, expected):
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64)
    options = {"chunk": 2, "scale": 1.0, "kernel": SQUARED_RELU, "normaliser": getattr(mca, normaliser)}
    out = getattr(mca, mode)(x, x, x, x, torch.ones(4, 1, dtype=torch.float64), **options)
    torch.testing.assert_close(out[:, 0], torch.tensor(expected, dtype=torch.float64))


def test_lengths_with_a_ragged_tail_and_a_mask():
    x, zero = torch.ones(7, 1), torch.zeros(7, 1)
    mask = torch.tensor([True, False, True, True, True, True, False])
    run = functools.partial(mca.bidirectional, zero, zero, x, x, x, mask, chunk=3, scale=1.0, kernel=SQUARED_RELU)
    # Five valid tokens, seven in the array, nine after padding.
    for normaliser, length in ((mca.visible, 5), (mca.su, 7), (mca.lucidrains, 7), (mca.paper, 9)):
        torch.testing.assert_close(run(normaliser=normaliser), torch.full((7, 1), 5 / length))


def dense(mode, heads, mask, segments, bias, *, chunk, scale, normaliser, overlap):
    """The definition on all pairs of tokens of one sequence."""
    q_quad, k_quad, q_lin, k_lin, v = heads
    n = len(v)
    t = torch.arange(n)
    i, j, g = t[:, None], t[None, :], t // chunk
    near = (g[:, None] == g) & {"bidirectional": i >= 0, "causal": j <= i, "causal_strict": j < i}[mode]
    far = (g[:, None] > g) | (mode == "bidirectional")
    if overlap:
        low, high = (torch.stack([f(segments[g == h]) for h in g]) for f in (torch.min, torch.max))
        far = far & (low[:, None] <= high) & (low <= high[:, None])
    else:
        near, far = near & (segments[:, None] == segments), far & (segments[:, None] == segments)
    chunks = torch.stack([far[:, g == h].any(1) for h in g.unique()]).sum(0)
    near, far = near & mask, far & mask
    ones = torch.ones(n, dtype=torch.int64)
    n_local, n_linear = {
        "su": (chunk * ones, (chunk * chunks).clamp(max=n)),
        "paper": (ones, chunk * chunks),
        "lucidrains": (ones, n * ones),
        "lucidrains_causal": (ones, chunk * ones),
        "unnormalised": (ones, ones),
        "visible": (near.sum(1), far.sum(1)),
    }[normaliser]
    local = (scale * q_quad @ k_quad.T + bias[t[:, None] % chunk, t % chunk]).relu().square() * near @ v
    linear = (q_lin @ k_lin.T * far) @ v
    parts = ((n_local.double(), local), (n_linear.double(), linear))
    return sum(torch.where(m > 0, 1 / m.clamp(min=1), 0)[:, None] * x for m, x in parts)


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("mode", MODES)
def test_equals_the_dense_operator(mode, normaliser):
    rng = torch.Generator().manual_seed(1)
    for n, c in ((1, 4), (11, 3), (12, 4), (7, 13), (5, 1)):
        heads = draw(n, 2, n)
        mask = torch.rand(2, n, generator=rng) < 0.7
        segments = torch.randint(4, (2, n), generator=rng)
        bias = torch.randn(c, c, generator=rng, dtype=torch.float64)
        lengths = {"kernel": SQUARED_RELU, "normaliser": getattr(mca, normaliser)}
        for valid in (mask, torch.ones_like(mask)):
            for documents in (None, mca.same_document, mca.overlapping_chunks):
                ids = torch.zeros_like(segments) if documents is None else segments
                given = (None if valid.all() else valid, None if documents is None else ids, bias)
                out = getattr(mca, mode)(*heads, *given, chunk=c, scale=0.7, documents=documents, **lengths)
                for b in range(2):
                    options = {"chunk": c, "scale": 0.7, "normaliser": normaliser}
                    overlap = documents is mca.overlapping_chunks
                    expected = dense(mode, [x[b] for x in heads], valid[b], ids[b], bias, overlap=overlap, **options)
                    torch.testing.assert_close(out[b], expected, rtol=1e-11, atol=1e-12)


def of_golden(array, dtype):
    tensor = torch.tensor(array)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("name", [*lucidrains.FLASH, "transformer"])
def test_flash_pytorchs_outputs_in_float32(name):
    """Within what float32 may do to the formula, weights and input rounded first."""
    golden, kind = collection.load("flash_pytorch", name), "transformer" if name == "transformer" else "flash"
    named = () if kind == "transformer" else (name,)
    with torch.no_grad():
        found = getattr(lucidrains, kind)(TORCH, functools.partial(of_golden, dtype=torch.float32), golden, *named)
    assert found.dtype == torch.float32
    bound = getattr(lucidrains.Balls("float32"), kind)(golden, *named).rad
    assert np.max(np.abs(found.double().numpy() - golden["y"]) / bound) < 1


@pytest.mark.parametrize("i", range(lucidrains.LAYERS))
def test_a_layer_of_flash_pytorchs_transformer_in_float32(i):
    """On one and the same input, where the bound has not yet grown with the layers before."""
    golden, balls = collection.load("flash_pytorch", "transformer"), lucidrains.Balls("float32")
    x = 2 * np.random.default_rng(i).normal(size=(*golden["x"].shape, 16))
    with torch.no_grad():
        put = functools.partial(of_golden, dtype=torch.float32)
        found = lucidrains.layer(TORCH, put, golden, i, put(x)).double().numpy()
    expected = lucidrains.layer(Package("refimpl.ops"), np.asarray, golden, i, x)
    bound = balls.layer(golden, i, balls.put(x)).finished().rad
    assert np.max(np.abs(found - expected) / bound) < 1 and bound.max() < 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("name", lucidrains.FLASH)
def test_flash_pytorchs_gradients(name):
    golden = collection.load("flash_pytorch", name)
    x = torch.tensor(golden["x"], requires_grad=True)
    y = lucidrains.flash(TORCH, functools.partial(of_golden, dtype=torch.float64), golden, name, x=x)
    (found,) = torch.autograd.grad(y, x, torch.tensor(golden["grad_y"]))
    expected = torch.tensor(golden["grad_x"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


@pytest.mark.parametrize("normaliser", [mca.su, mca.lucidrains_causal, mca.visible])
@pytest.mark.parametrize("kernel", [SQUARED_RELU, attention_kernel.squared_relu_array, attention_kernel.softmax])
def test_a_stream_in_any_blocks_is_causal_on_the_whole(kernel, normaliser):
    heads, bias = draw(2, 2, 23), torch.randn(5, 5, dtype=torch.float64)
    mask = torch.rand(2, 23, generator=torch.Generator().manual_seed(3)) < 0.7
    rule = {"chunk": 5, "scale": 0.5, "kernel": kernel, "normaliser": normaliser}
    whole = mca.causal(*heads, mask, None, bias, **rule)
    for blocks in ([23], [1] * 23, [5, 5, 13], [2, 0, 3, 11, 7]):
        state, start, rows = mca.initial_state(batch=(2,), s=3, e=5), 0, []
        for size in blocks:
            t = slice(start, start + size)
            before = [x.clone() if isinstance(x, torch.Tensor) else x for x in state]
            out, after = mca.step(state, *(x[:, t] for x in heads), mask[:, t], bias, **rule)
            torch.testing.assert_close(tuple(state), tuple(before), rtol=0, atol=0)
            rows.append(out)
            state, start = after, start + size
        torch.testing.assert_close(torch.cat(rows, dim=1), whole)
        assert (state.chunks, state.v.shape[1]) == (4, 3)
        assert state.counted.tolist() == mask[:, :20].sum(dim=1).tolist()
        summed = torch.einsum("bjs,bje,bj->bse", heads[3][:, :20], heads[4][:, :20], mask[:, :20].double())
        torch.testing.assert_close(state.summary, summed)


@pytest.mark.parametrize("past", [False, True])
def test_prefix_by_product_is_the_prefix_by_addition(past, monkeypatch):
    sums = torch.randn(2, 7, 3, 5, dtype=torch.float64)
    state = mca.initial_state(batch=(2,), s=3, e=5)
    state = state._replace(summary=torch.randn(2, 3, 5, dtype=torch.float64)) if past else None
    product = mca._prefix(sums, state)
    monkeypatch.setattr(mca, "_FEW_CHUNKS", 0)
    torch.testing.assert_close(product, mca._prefix(sums, state))
    assert (product[:, 0] == (state.summary if past else 0)).all()


def test_identity_hides_masked_scores():
    scores = torch.tensor([[-2.0, 3.0]])
    assert mca.identity(scores, None) is scores
    assert mca.identity(scores, torch.tensor([True, False])).tolist() == [[-2, 0]]


def test_documents():
    ids = torch.tensor([[[7, 7, 3], [3, 9, 9]]])
    member, reads = mca.same_document(ids)
    assert member[0, 0].int().tolist() == [[0, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert reads.all() and reads.shape == (1, 2, 2)
    member, reads = mca.overlapping_chunks(torch.tensor([[[1, 3], [2, 2], [4, 5]]]))
    assert member.all() and member.shape == (1, 3, 2, 1)
    assert reads[0].int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def weights(seed, d=7, e=3, s=4, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    shapes = ((d, 2 * e + s), (2 * e + s,), (4, s), (4, s), (e, d), (d,))
    return [torch.randn(*shape, generator=rng, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("rotate", [rope.rotate_interleaved, rope.rotate_half_split])
def test_unit_is_made_of_its_parts(rotate):
    x = torch.randn(2, 11, 7, dtype=torch.float64)
    w_in, b_in, gamma, beta, w_out, b_out = weights(4)
    rule = {"chunk": 4, "scale": 0.5, "kernel": SQUARED_RELU, "normaliser": mca.visible}
    positions, theta = torch.arange(11) + 5, rope.frequencies(4, base=100.0)
    rows = mca.ROWS_LUCIDRAINS
    out = mca.unit(
        x, None, None, None, positions, theta, w_in, b_in, gamma, beta, w_out, b_out,
        mix=mca.causal, rotate=rotate, rows=rows, **rule,
    )  # fmt: skip
    h = x @ w_in + b_in
    h = h * h.sigmoid()
    heads = [rotate(gamma[r] * h[..., 6:] + beta[r], positions[:, None] * theta) for r in (0, 2, 1, 3)]
    torch.testing.assert_close(out, (h[..., :3] * mca.causal(*heads, h[..., 3:6], **rule)) @ w_out + b_out)


@pytest.mark.parametrize("documents", [None, mca.same_document, mca.overlapping_chunks])
@pytest.mark.parametrize("mode", MODES)
def test_gradients(mode, documents):
    heads = [x.requires_grad_() for x in draw(5, 1, 5, s=2, e=2)]
    bias = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    # The first chunk holds no visible key: its rows have lengths of 0.
    mask = torch.tensor([[False, False, True, True, False]])
    ids = None if documents is None else torch.tensor([[0, 0, 0, 1, 1]])
    rule = {"chunk": 2, "scale": 0.5, "kernel": SQUARED_RELU, "normaliser": mca.visible, "documents": documents}
    call = getattr(mca, mode)
    assert torch.autograd.gradcheck(lambda bias, *heads: call(*heads, mask, ids, bias, **rule), (bias, *heads))


def test_gradients_of_a_stream_and_a_unit():
    heads = [x.requires_grad_() for x in draw(6, 1, 5, s=2, e=2)]
    rule = {"chunk": 2, "scale": 0.5, "kernel": SQUARED_RELU, "normaliser": mca.su}

    def stream(*heads):
        out, state = mca.step(mca.initial_state(batch=(1,), s=2, e=2), *(x[:, :3] for x in heads), **rule)
        later, state = mca.step(state, *(x[:, 3:] for x in heads), **rule)
        return out, later, state.summary

    assert torch.autograd.gradcheck(stream, heads)
    x = torch.randn(1, 3, 7, dtype=torch.float64, requires_grad=True)
    parameters = [w.requires_grad_() for w in weights(7)]
    options = {"mix": mca.bidirectional, "rotate": rope.rotate_interleaved, "rows": mca.ROWS_PAPER, **rule}
    turned = (torch.arange(3), rope.frequencies(4, base=10.0))
    run = functools.partial(mca.unit, **options)
    assert torch.autograd.gradcheck(lambda x, *w: run(x, None, None, None, *turned, *w), (x, *parameters))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_neither_stall_nor_overflow(dtype):
    n = 4096
    one, zero = torch.ones(1, n, 1, dtype=dtype), torch.zeros(1, n, 1, dtype=dtype)
    rule = {"chunk": 8, "scale": 1.0, "kernel": SQUARED_RELU, "normaliser": mca.unnormalised}
    # Sums of ones: a running sum in bfloat16 would stop at 256.
    assert mca.bidirectional(zero, zero, one, one, one, **rule)[0, 0].item() == n
    assert mca.causal(zero, zero, one, one, one, **rule)[0, -1].item() == pytest.approx(n - 8, rel=2**-8)
    state = mca.initial_state(batch=(1,), s=1, e=1)
    for _ in range(n // 512):
        _, state = mca.step(state, *(x[:, :512] for x in (zero, zero, one, one, one)), **rule)
    assert (state.summary.dtype, state.summary.item(), state.v.dtype) == (torch.float32, n, dtype)
    # Scores of 300, weights of 90000 and sums of 8 x 90000 are beyond float16; their quotients are not.
    large, rule = torch.full((1, 8, 1), 300.0, dtype=dtype), {**rule, "normaliser": mca.su}
    out = mca.bidirectional(large[:, :, :1], one[:, :8], large, large, one[:, :8], **rule)
    assert out.dtype == dtype and out.isinf().all() == (dtype == torch.float16)
    out = mca.bidirectional(large, one[:, :8], zero[:, :8], zero[:, :8], one[:, :8] / 2, **rule)
    assert out[0, 0].item() == pytest.approx(45000, rel=2**-7)


def test_captured_whole_with_open_sizes():
    rule = {"chunk": 3, "scale": 0.5, "kernel": SQUARED_RELU, "normaliser": mca.visible}
    captured = torch.compile(functools.partial(mca.causal, **rule), fullgraph=True, dynamic=True, backend="eager")
    for n in (7, 11):
        torch.testing.assert_close(captured(*draw(8, 2, n)), mca.causal(*draw(8, 2, n), **rule))


def test_compiled_equals_eager():
    rule = {"chunk": 4, "scale": 0.5, "kernel": SQUARED_RELU, "normaliser": mca.su}
    run, heads = functools.partial(mca.causal, **rule), draw(9, 2, 11, dtype=torch.float32)
    torch.testing.assert_close(torch.compile(run, fullgraph=True)(*heads), run(*heads), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_compiled_with_packed_documents(dtype, tolerance):
    rule = {"chunk": 4, "scale": 0.5, "kernel": SQUARED_RELU, "normaliser": mca.su, "documents": mca.same_document}
    torch._dynamo.reset()
    heads = draw(9, 2, 11, dtype=dtype)
    ids = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2], [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 5]])
    run = functools.partial(mca.causal, **rule)
    # As many columns as there are documents: a size that only the numbers tell.
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        made = torch.compile(run, fullgraph=True)(*heads, None, ids)
    torch.testing.assert_close(made, run(*heads, None, ids), rtol=tolerance, atol=tolerance)


def test_a_step_without_tokens_compiled():
    rule = {"chunk": 4, "scale": 0.5, "kernel": SQUARED_RELU, "normaliser": mca.su}
    heads, none = (draw(9, 2, n, dtype=torch.float32) for n in (5, 0))
    _, state = mca.step(mca.initial_state(batch=(2,), s=3, e=5), *heads, **rule)
    made, later = torch.compile(functools.partial(mca.step, **rule), fullgraph=True)(state, *none)
    assert made.shape == (2, 0, 5)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(later, state, strict=True))


def test_no_tokens_belong_to_no_document():
    member, reads = mca.same_document(torch.zeros(2, 0, 4, dtype=torch.int64))
    assert (member.shape[:3], reads.shape) == ((2, 0, 4), (2, 0, 0))


def error(kind, text, function, *arguments, **options):
    with pytest.raises(kind, match=text):
        function(*arguments, **options)


def test_errors():
    heads = draw(10, 2, 7)
    rule = {"chunk": 3, "scale": 1.0, "kernel": SQUARED_RELU, "normaliser": mca.su}
    run = functools.partial(mca.bidirectional, **rule)
    error(ShapeError, "four heads of one shape", run, *heads[:3], heads[3][:, :5], heads[4])
    error(DomainError, "v must be a floating", run, *heads[:4], heads[4].long())
    for chunk in (0, 2.0):
        error(DomainError, "an integer chunk >= 1", mca.causal, *heads, **{**rule, "chunk": chunk})
    error(DomainError, "a finite scale", mca.causal_strict, *heads, **{**rule, "scale": math.nan})
    ids = torch.zeros(2, 7, dtype=torch.int64)
    error(DomainError, "segments and documents together", run, *heads, None, ids)
    error(DomainError, "segments and documents together", run, *heads, documents=mca.same_document)
    error(DomainError, "key_mask must be a boolean", run, *heads, ids)
    error(ShapeError, "key_mask that broadcasts", run, *heads, ids[:, :3] == 0)
    error(DomainError, "segments must be", run, *heads, None, ids.double(), documents=mca.same_document)
    error(ShapeError, r"bias of shape \(3, 3\)", run, *heads, None, None, torch.zeros(2, 3))
    error(ShapeError, "segments of shape", mca.same_document, ids[0])
    error(DomainError, "mask must be a boolean", mca.identity, heads[0], heads[0])
    state = mca.initial_state(batch=(2,), s=3, e=5)
    error(ShapeError, "a state of b", mca.step, state._replace(summary=heads[0]), *heads, **rule)
    error(ShapeError, "a state of b", mca.step, mca.initial_state(batch=(3,), s=3, e=5), *heads, **rule)
    error(DomainError, "chunks >= 0", mca.step, state._replace(chunks=-1), *heads, **rule)
    error(DomainError, "counted must be", mca.step, state._replace(counted=torch.zeros(2)), *heads, **rule)
    full = state._replace(**{x: torch.zeros(2, 3, 3) for x in ("k_quad", "k_lin")}, v=torch.zeros(2, 3, 5))
    error(ShapeError, "fewer than c = 3", mca.step, full._replace(valid=torch.ones(2, 3) > 0), *heads, **rule)
    z = heads[0]
    error(ShapeError, r"gamma and beta of shape \(4, s\)", mca.scale_offset_heads, z, z[0], z[0], rows=(0, 1, 2, 3))
    four = torch.ones(4, 3, dtype=torch.float64)
    error(DomainError, "a permutation", mca.scale_offset_heads, z, four, four, rows=(0, 1, 2, 2))
    options = {"mix": mca.causal, "rotate": rope.rotate_interleaved, "rows": mca.ROWS_PAPER, **rule}
    x = torch.ones(2, 7, 7, dtype=torch.float64)
    given = (x, None, None, None, torch.arange(7), None, *weights(11))
    error(DomainError, "positions and frequencies together", mca.unit, *given, **options)
