"""Graphs of attention: one for all batches and lengths, grouped heads, masks of every size, and ONNX's Attention."""

from functools import partial

import numpy as np
import pytest

from export.graph import build, op
from export.ops import attention, rope
from export.ops import attention_kernel as kernels
from refimpl.check import DomainError, ShapeError
from refimpl.ops import attention as spec
from refimpl.ops import attention_kernel as spec_kernels
from refimpl.ops import rope as spec_rope

B, N, M, H, G, D, E = 3, 5, 7, 4, 2, 6, 11
DTYPES = [np.float32, np.float64]
OPSETS = [20, 23]


def made(*shape, dtype=np.float64):
    return np.random.default_rng(shape).normal(size=shape).astype(dtype)


def named(kernel, module=kernels):
    numbers = {"softmax_plus": {"n_min": 2}, "squared_relu_constant": {"length": 11}}.get(kernel, {})
    return partial(getattr(module, kernel), **numbers) if numbers else getattr(module, kernel)


def qkv(b=B, n=N, m=M, h=H, g=G, dtype=np.float64):
    return {"q": made(b, n, h, D, dtype=dtype), "k": made(b, m, g, D, dtype=dtype), "v": made(b, m, g, E, dtype=dtype)}


def masked(*shape):
    mask = np.random.default_rng(shape).random(shape) < 0.6
    if mask.shape[-2] > 1:
        # A query that sees nothing, and one that sees a single key.
        mask[..., 0, :] = False
        mask[..., 1, :] = np.arange(mask.shape[-1]) == 0
    return mask


# What masks and positions are made of.
def test_masks_and_positions(Graph):
    valid = np.array([[True, True, False], [False, True, True], [False, False, False]])
    graph = Graph(lambda valid: (attention.key_mask(valid), attention.positions_from_mask(valid)), valid=valid)
    assert graph.fixed == {}
    graph.gives((valid[:, None], np.array([[0, 1, 1], [0, 0, 1], [0, 0, 0]])), valid=valid)
    graph.gives((valid[:1, None, :0], np.zeros((1, 0), int)), valid=valid[:1, :0])
    ids = np.array([[0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]])
    graph = Graph(attention.unilm_mask, segment_ids=ids)
    graph.gives(spec.unilm_mask(ids), segment_ids=ids)
    assert graph(segment_ids=ids[:1])[0].astype(int).tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]
    mask = spec.unilm_mask(ids)
    Graph(attention.per_head, mask=mask).gives(mask[:, None], mask=mask)


@pytest.mark.parametrize(("n", "m"), [(3, 3), (2, 5), (5, 2), (0, 3), (1, 1)])
def test_causal_masks_are_aligned_at_the_end(Graph, n, m):
    """Of numbers, and of lengths that the graph asks for."""
    expected = spec.causal_mask(n, m)
    x, y = np.zeros(n), np.zeros(m)
    Graph(lambda x, y: (x, y, attention.causal_mask(n, m)), x=x, y=y).gives((x, y, expected), x=x, y=y)
    graph = Graph(lambda x, y: attention.causal_mask(x.size(0), y.size(0)), x=np.zeros(4), y=np.zeros(9))
    assert graph.fixed == {}
    graph.gives(expected, x=x, y=y)


# Attention itself.
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, G, H])
@pytest.mark.parametrize("kernel", ["softmax", "softmax_plus", "squared_relu_visible", "laplace"])
def test_one_graph_for_every_size(Graph, kernel, groups, dtype, opset):
    call = partial(attention.attend, kernel=named(kernel), scale=0.3)
    expected = partial(spec.attend, kernel=named(kernel, spec_kernels), scale=0.3)
    graph = Graph(partial(call, mask=None), opset, **qkv(g=groups, dtype=dtype))
    hidden = Graph(call, opset, mask=masked(B, 1, N, M), **qkv(g=groups, dtype=dtype))
    # Heads and widths are fixed, batch and lengths are not.
    assert {axis for _, axis in {**graph.fixed, **hidden.fixed}} <= {2, 3}
    for b, n, m in ((1, 1, 1), (1, 2, 1), (5, 1, 2), (2, 13, 17)):
        arrays = qkv(b, n, m, g=groups, dtype=dtype)
        graph.gives(expected(**arrays, mask=None), **arrays)
        for shape in ((b, 1, n, m), (1, 1, 1, m), (b, 1, n, 1), (1, 1, n, m)):
            mask = masked(*shape)
            hidden.gives(expected(**arrays, mask=mask), mask=mask, **arrays)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", ["softmax", "squared_relu_visible"])
def test_masks_of_every_size(Graph, kernel, dtype, opset):
    call = partial(attention.attend, kernel=named(kernel), scale=0.5)
    arrays = qkv(dtype=dtype)
    for shape in ((B, H, N, M), (1, H, N, M), (B, 1, 1, M), (B, H, N, 1), (N, M)):
        mask = masked(*shape)
        expected = spec.attend(**arrays, mask=mask, kernel=named(kernel, spec_kernels), scale=0.5)
        graph = Graph(call, opset, mask=mask, **arrays)
        graph.gives(expected, mask=mask, **arrays)
        # The value of a key that no query sees does not matter, nor does the key.
        lone = np.ones(shape, bool)
        if shape[-1] > 1:
            lone[..., 3] = False
            loud = {name: x.copy() for name, x in arrays.items()}
            loud["k"][:, 3], loud["v"][:, 3] = 1e4, 1e4
            graph.gives(graph(mask=lone, **arrays), tolerance=0, among=("all",), mask=lone, **loud)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("rank", [3, 5])
def test_other_ranks(Graph, rank, opset):
    for g in (G, H):
        arrays = qkv(g=g, dtype=np.float32)
        arrays = {name: x[0] if rank == 3 else np.stack([x, -x]) for name, x in arrays.items()}
        mask = masked(*(1, 1, 1, N, M)[-rank:])
        expected = spec.attend(**arrays, mask=mask, kernel=spec_kernels.softmax, scale=0.5)
        graph = Graph(partial(attention.attend, kernel=kernels.softmax, scale=0.5), opset, mask=mask, **arrays)
        assert "Attention" not in graph.operators
        graph.gives(expected, mask=mask, **arrays)


def test_when_the_operator_is_taken(Graph):
    def has(opset=23, kernel="softmax", scale=0.5, dtype=np.float32, **sizes):
        call = partial(attention.attend, mask=None, kernel=named(kernel), scale=scale)
        arrays = qkv(dtype=dtype, **sizes)
        graph = Graph(call, opset, **arrays)
        graph.gives(spec.attend(**arrays, mask=None, kernel=named(kernel, spec_kernels), scale=scale), **arrays)
        return "Attention" in graph.operators

    assert has()
    assert not has(opset=20)
    assert not has(dtype=np.float64)
    assert not has(kernel="softmax_plus")
    assert not has(h=1, g=1)
    # ONNX Runtime refuses these scales.
    assert not has(scale=0.0)
    assert not has(scale=-0.5)


def test_the_operator_wants_its_mask_written_out(session):
    """Why the mask is expanded to the queries."""
    arrays = {**qkv(g=H, dtype=np.float32), "mask": masked(B, 1, 1, M)}

    def plain(q, k, v, mask):
        flat = (x.reshape(x.size(0), x.size(1), -1) for x in (q, k, v))
        return op("Attention", *flat, mask, q_num_heads=H, kv_num_heads=H)

    with pytest.raises(Exception, match="q_sequence_length"):
        session(build(plain, arrays, opset=23).model)(arrays)


def test_no_token_at_all(Graph):
    """ONNX Runtime's operator takes no empty sequence, the written-out form does."""
    graph = Graph(partial(attention.attend, kernel=kernels.softmax, scale=1.0), mask=masked(1, 1, N, M), **qkv())
    for n, m in ((0, 3), (3, 0)):
        graph.gives(np.zeros((1, n, H, E)), mask=np.ones((1, 1, n, m), bool), **qkv(1, n, m))


@pytest.mark.parametrize("groups", [G, H])
def test_the_scale_keeps_its_digits_in_float64(Graph, groups):
    """ONNX Runtime's optimiser makes a plain factor beside a product a float32."""
    arrays = qkv(g=groups)
    expected = spec.attend(**arrays, mask=None, kernel=spec_kernels.squared_relu_array, scale=1 / 3)
    call = partial(attention.attend, mask=None, kernel=kernels.squared_relu_array, scale=1 / 3)
    Graph(call, **arrays).gives(expected, **arrays)


def test_literal_values(Graph):
    """Two keys, scores ln 3 apart: weights 1/4 and 3/4; heads of q in neighbouring pairs share a key head."""
    q = np.ones((1, 1, 4, 1))
    k = np.array([[[0.0], [0.0]], [[2 * np.log(3)], [-2 * np.log(3)]]])[None]
    v = np.array([[[0.0], [100.0]], [[4.0], [104.0]]])[None]
    expected = np.array([3.0, 3.0, 101.0, 101.0]).reshape(1, 1, 4, 1)
    for dtype in DTYPES:
        arrays = {"q": q.astype(dtype), "k": k.astype(dtype), "v": v.astype(dtype)}
        for opset in OPSETS:
            graph = Graph(partial(attention.attend, mask=None, kernel=kernels.softmax, scale=0.5), opset, **arrays)
            graph.gives(expected, **arrays)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["rotate_interleaved", "rotate_half_split"])
def test_rotated_values(Graph, layout, dtype, opset):
    def call(q, k, v, mask, positions, module=attention, angles=rope, kernel=kernels.softmax):
        phi = angles.angles(positions, angles.frequencies(10, base=100.0))
        rotate = getattr(angles, layout)
        return module.attend_rotated_values(q, k, v, phi, mask, rotate=rotate, kernel=kernel, scale=0.4)

    def given(b, n, m):
        arrays = qkv(b, n, m, dtype=dtype)
        return {**arrays, "v": arrays["v"][..., :10], "mask": masked(b, 1, n, m), "positions": np.arange(m) - 3}

    graph = Graph(call, opset, **given(B, N, M))
    for b, n, m in ((1, 1, 1), (2, 3, 13)):
        arrays = given(b, n, m)
        graph.gives(call(**arrays, module=spec, angles=spec_rope, kernel=spec_kernels.softmax), **arrays)


# Projections.
@pytest.mark.parametrize("shape", [(D,), (B, D), (B, N, D)])
def test_project(Graph, shape):
    for dtype in DTYPES:
        arrays = {"x": made(*shape, dtype=dtype), "w": made(D, E, dtype=dtype), "b": made(E, dtype=dtype)}
        Graph(attention.project, **arrays).gives(spec.project(**arrays), **arrays)
        del arrays["b"]
        Graph(partial(attention.project, b=None), **arrays).gives(spec.project(**arrays, b=None), **arrays)


WEIGHTS = {"q": H * D, "k": G * D, "v": G * E, "o": 13}


def weights(dtype, biased=True):
    rows = {"q": 7, "k": 7, "v": 7, "o": H * E}
    found = {}
    for name, columns in WEIGHTS.items():
        found[f"w_{name}"] = made(rows[name], columns, dtype=dtype) / 2
        if biased:
            found[f"b_{name}"] = made(columns, dtype=dtype)
    return found


def multi_head(module, angles, kernel, layout="rotate_interleaved"):
    def call(x, mask, positions, **given):
        arrays = [given.get(f"{kind}_{name}") for name in WEIGHTS for kind in "wb"]
        options = {"heads": H, "rotate": getattr(angles, layout), "kernel": kernel}
        theta = angles.frequencies(D, base=100.0)
        return module.multi_head_attention(x, mask, positions, theta, *arrays, **options)

    return call


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kernel", ["softmax", "softmax_plus", "squared_relu_visible"])
def test_multi_head_attention(Graph, kernel, biased, dtype, opset):
    call = multi_head(attention, rope, named(kernel))
    expected = multi_head(spec, spec_rope, named(kernel, spec_kernels))

    def given(b, n):
        mask = {"mask": masked(b, 1, 1, n) | (np.arange(n) == 0), "positions": np.arange(n)}
        return {"x": made(b, n, 7, dtype=dtype), **mask, **weights(dtype, biased)}

    graph = Graph(call, opset, **given(B, N))
    assert {axis for name, axis in graph.fixed if name in ("x", "mask", "positions")} <= {2}
    assert not any(name in ("mask", "positions") for name, _ in graph.fixed)
    for b, n in ((1, 1), (3, 2), (2, 11)):
        arrays = given(b, n)
        graph.gives(expected(**arrays), tolerance=1e-5 if dtype == np.float32 else 1e-14, **arrays)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("sides", ["", "q", "k", "qk"])
def test_cross_attention_rotates_the_sides_that_have_positions(Graph, sides, opset):
    def call(x, memory, mask, module=attention, angles=rope, kernel=kernels.softmax, **given):
        arrays = [given.get(f"{kind}_{name}") for name in WEIGHTS for kind in "wb"]
        options = {"heads": H, "rotate": angles.rotate_half_split, "kernel": kernel}
        positions = [given.get(f"positions_{side}") for side in "qk"]
        return module.cross_attention(x, memory, mask, *positions, angles.frequencies(D, base=9.0), *arrays, **options)

    def given(b, n, m):
        positions = {f"positions_{side}": 7 + np.arange({"q": n, "k": m}[side]) for side in sides}
        arrays = {"x": made(b, n, 7, dtype=np.float32), "memory": made(b, m, 7, dtype=np.float32) + 1}
        return {**arrays, "mask": masked(b, 1, 1, m) | (np.arange(m) == 0), **positions, **weights(np.float32)}

    graph = Graph(call, opset, **given(B, N, M))
    for b, n, m in ((1, 1, 1), (2, 11, 3)):
        arrays = given(b, n, m)
        expected = call(**arrays, module=spec, angles=spec_rope, kernel=spec_kernels.softmax)
        graph.gives(expected, tolerance=1e-5, **arrays)


def test_what_does_not_fit_is_refused():
    def refused(error, match, call, **given):
        with pytest.raises(error, match=match):
            build(call, given, opset=20)

    arrays = qkv()
    plain = partial(attention.attend, mask=None, kernel=kernels.softmax, scale=1.0)
    for name, wrong in (("k", made(B, M, G, D - 1)), ("k", made(B, M, 3, D)), ("v", made(B, M - 1, G, E)),
                        ("q", made(B + 1, N, H, D)), ("q", made(B, N, 3, D)), ("q", made(H, D))):  # fmt: skip
        refused(ShapeError, "h a multiple of g", plain, **{**arrays, name: wrong})
    refused(DomainError, "q must be a floating value", plain, **{**arrays, "q": arrays["q"].astype(int)})
    refused(DomainError, "a finite scale", partial(plain, scale=np.inf), **arrays)
    whole = partial(attention.attend, kernel=kernels.softmax, scale=1.0)
    # A mask (b, n, m) would be read as one of heads.
    for shape in ((B, N, M), (N, M - 1), (1, M), (B, 3, N, M)):
        refused(ShapeError, "expected a mask", whole, mask=np.ones(shape, bool), **arrays)
    refused(DomainError, "mask must be boolean", whole, mask=np.ones((N, M)), **arrays)

    refused(ShapeError, "x \\(..., in\\)", partial(attention.project, b=None), x=made(2, 3), w=made(5, 7))
    refused(ShapeError, "b \\(out,\\)", attention.project, x=made(2, 5), w=made(5, 7), b=made(5))
    refused(ShapeError, "valid", attention.key_mask, valid=np.array(True))
    refused(DomainError, "valid must be boolean", attention.positions_from_mask, valid=np.arange(3))
    refused(DomainError, "segment_ids must be integers", attention.unilm_mask, segment_ids=np.ones(3))
    refused(ShapeError, "segment_ids", attention.unilm_mask, segment_ids=np.array(1))
    refused(ShapeError, "a mask \\(..., n, m\\)", attention.per_head, mask=np.ones(3, bool))
    refused(DomainError, "lengths >= 0", lambda x: attention.causal_mask(-1, 3), x=np.ones(1))
    rotated = partial(attention.attend_rotated_values, mask=None, rotate=rope.rotate_interleaved,
                      kernel=kernels.softmax, scale=1.0)  # fmt: skip
    refused(ShapeError, "angles_k \\(..., m, r\\)", rotated, **arrays, angles_k=made(5))

    given = {"x": made(B, N, 7), **weights(np.float64, biased=False)}

    def attended(x, heads=H, positions=None, theta=None, **given):
        flat = [given.get(f"{kind}_{name}") for name in WEIGHTS for kind in "wb"]
        options = {"heads": heads, "rotate": rope.rotate_interleaved, "kernel": kernels.softmax}
        return attention.multi_head_attention(x, None, positions, theta, *flat, **options)

    refused(ShapeError, "columns of w_q in 5 heads", partial(attended, heads=5), **given)
    refused(ShapeError, "of w_v in as many heads", attended, **{**given, "w_v": made(7, 5)})
    refused(DomainError, "heads >= 1", partial(attended, heads=0), **given)
    refused(DomainError, "frequencies for positions_q", attended, **given, positions=np.arange(N))
