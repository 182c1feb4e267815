"""Mixed chunk attention against its dense definition written out in loops, hand-worked figures and FLASH-pytorch."""

import functools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conformance.case import Package
from refimpl.check import DomainError, ShapeError
from refimpl.ops import attention_kernel, rope
from refimpl.ops import mixed_chunk_attention as mca
from tests.golden import collection, lucidrains

squared_relu = functools.partial(attention_kernel.squared_relu_constant, length=1)
MODES = ("bidirectional", "causal", "causal_strict")
SPEC = Package("refimpl.ops")


def draw(seed, *batch_and_tokens, s=3, e=5):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(*batch_and_tokens, width)) for width in (s, s, s, s, e)]


def ranges_meet(first, second):
    return min(first) <= max(second) and min(second) <= max(first)


def dense(mode, q_quad, k_quad, q_lin, k_lin, v, mask, segments, bias, *, c, scale, weight, variant, separation):
    """One sequence, one pair of tokens at a time; no chunk sums, no array counts."""
    n, groups = len(v), math.ceil(len(v) / c)
    out = np.zeros(v.shape)
    for i in range(n):
        near, far, read = [], [], set()
        for j in range(n):
            same = segments is None or segments[i] == segments[j]
            ids = [segments[c * (t // c) : c * (t // c) + c] for t in (i, j)] if segments is not None else [[0], [0]]
            apart = not same if separation == "exact" else not ranges_meet(*ids)
            own_apart = separation == "exact" and not same
            in_time = {"bidirectional": True, "causal": j <= i, "causal_strict": j < i}[mode]
            if i // c == j // c and in_time and not own_apart and mask[j]:
                near.append(j)
            if (mode == "bidirectional" or j // c < i // c) and not apart:
                read.add(j // c)
                if mask[j]:
                    far.append(j)
        n_local = {"su": c, "visible": len(near)}.get(variant, 1)
        n_linear = {
            "su": min(c * len(read), n),
            "paper": c * len(read),
            "lucidrains": n,
            "lucidrains_causal": c,
            "unnormalised": 1,
            "visible": len(far),
        }[variant]
        for j in near:
            out[i] += weight(scale * np.dot(q_quad[i], k_quad[j]) + bias[i % c][j % c]) * v[j] / n_local
        for j in far:
            out[i] += np.dot(q_lin[i], k_lin[j]) * v[j] / n_linear
    assert groups * c >= n
    return out


@pytest.mark.parametrize(
    "mode, normaliser, expected",
    [
        ("bidirectional", "su", [2.5 + 2.5, 10 + 5, 112.5 + 7.5, 200 + 10]),
        ("bidirectional", "paper", [5 + 2.5, 20 + 5, 225 + 7.5, 400 + 10]),
        ("bidirectional", "lucidrains", [5 + 2.5, 20 + 5, 225 + 7.5, 400 + 10]),
        ("bidirectional", "unnormalised", [5 + 10, 20 + 20, 225 + 30, 400 + 40]),
        ("bidirectional", "visible", [2.5 + 2.5, 10 + 5, 112.5 + 7.5, 200 + 10]),
        ("causal", "su", [0.5, 10, 40.5 + 4.5, 200 + 6]),
        ("causal", "paper", [1, 20, 81 + 4.5, 400 + 6]),
        ("causal", "lucidrains_causal", [1, 20, 81 + 4.5, 400 + 6]),
        ("causal", "unnormalised", [1, 20, 81 + 9, 400 + 12]),
        ("causal", "visible", [1, 10, 81 + 4.5, 200 + 6]),
        ("causal_strict", "unnormalised", [0, 4, 0 + 9, 144 + 12]),
        ("causal_strict", "visible", [0, 4, 0 + 4.5, 144 + 6]),
    ],
)
def test_two_chunks_of_two_worked_by_hand(mode, normaliser, expected):
    x = np.array([[1.0], [2.0], [3.0], [4.0]])
    out = getattr(mca, mode)(
        x, x, x, x, np.ones((4, 1)), chunk=2, scale=1.0, kernel=squared_relu, normaliser=getattr(mca, normaliser)
    )
    np.testing.assert_allclose(out[:, 0], expected, rtol=1e-15)


def test_causal_linear_lengths_of_the_third_chunk_are_the_tokens_seen():
    # n = 16, c = 4, third chunk: 8 tokens seen; the printed (g-1) n/c would be the same 8 only because n/c = c.
    x, v = np.ones((32, 1)), np.ones((32, 1))
    zero = np.zeros((32, 1))
    for normaliser, expected in ((mca.su, 1.0), (mca.paper, 1.0), (mca.visible, 1.0), (mca.lucidrains_causal, 2.0)):
        out = mca.causal(zero, zero, x, x, v, chunk=4, scale=1.0, kernel=squared_relu, normaliser=normaliser)
        assert out[8, 0] == expected
        assert out[3, 0] == 0


def test_lengths_with_a_ragged_tail_and_a_mask():
    x, v = np.ones((7, 1)), np.ones((7, 1))
    zero = np.zeros((7, 1))
    mask = np.array([True, False, True, True, True, True, False])
    run = functools.partial(mca.bidirectional, zero, zero, x, x, v, mask, chunk=3, scale=1.0, kernel=squared_relu)
    # Five valid tokens, seven in the array, nine after padding.
    for normaliser, length in ((mca.visible, 5), (mca.su, 7), (mca.lucidrains, 7), (mca.paper, 9)):
        np.testing.assert_allclose(run(normaliser=normaliser), np.full((7, 1), 5 / length), rtol=1e-15)


WEIGHTS = {
    "squared_relu": (squared_relu, lambda a: max(a, 0.0) ** 2),
    "laplace": (
        attention_kernel.laplace,
        lambda a: 0.5 * (1 + math.erf((a - math.sqrt(0.5)) * math.sqrt(2 * math.pi))),
    ),
    "identity": (mca.identity, lambda a: a),
}


@given(
    st.sampled_from(MODES),
    st.integers(1, 13),
    st.integers(1, 7),
    st.sampled_from(["su", "paper", "lucidrains", "lucidrains_causal", "unnormalised", "visible"]),
    st.sampled_from(sorted(WEIGHTS)),
    st.sampled_from([None, "exact", "overlap"]),
    st.integers(0, 10**6),
)
def test_equals_the_dense_operator(mode, n, c, variant, kernel, separation, seed):
    rng = np.random.default_rng(seed)
    heads = draw(seed, 2, n)
    mask = rng.random((2, n)) < 0.7
    segments = None if separation is None else np.sort(rng.integers(0, 4, size=(2, n)), axis=-1)
    bias = rng.normal(size=(c, c))
    documents = {None: None, "exact": mca.same_document, "overlap": mca.overlapping_chunks}[separation]
    spec_kernel, weight = WEIGHTS[kernel]
    out = getattr(mca, mode)(
        *heads, mask, segments, bias, chunk=c, scale=0.7, kernel=spec_kernel, normaliser=getattr(mca, variant),
        documents=documents,
    )  # fmt: skip
    for b in range(2):
        expected = dense(
            mode, *(x[b] for x in heads), mask[b], None if segments is None else segments[b], bias,
            c=c, scale=0.7, weight=weight, variant=variant, separation=separation or "exact",
        )  # fmt: skip
        np.testing.assert_allclose(out[b], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("mode", ["causal", "causal_strict"])
@pytest.mark.parametrize("c", [1, 3, 7, 64])
def test_the_future_does_not_move_the_past_by_one_bit(mode, c):
    n = 17
    heads = draw(5, n)
    run = functools.partial(
        getattr(mca, mode), chunk=c, scale=1.0, kernel=attention_kernel.laplace, normaliser=mca.visible
    )
    before = run(*heads)
    for t in range(n):
        edited = [np.concatenate([x[:t], 1e3 * y[t:]]) for x, y in zip(heads, draw(6, n), strict=True)]
        after = run(*edited)
        assert (after[:t] == before[:t]).all()
        moved = t if mode == "causal" else t + 1
        assert moved >= n or (after[moved] != before[moved]).any()


def test_strictly_causal_outputs_ignore_their_own_key_and_value():
    q_quad, k_quad, q_lin, k_lin, v = draw(7, 11)
    run = functools.partial(mca.causal_strict, chunk=4, scale=1.0, kernel=squared_relu, normaliser=mca.unnormalised)
    before = run(q_quad, k_quad, q_lin, k_lin, v)
    assert (before[0] == 0).all()
    for t in range(11):
        edited = [x.copy() for x in (k_quad, k_lin, v)]
        for x in edited:
            x[t] += 3.0
        assert (run(q_quad, edited[0], q_lin, edited[1], edited[2])[: t + 1] == before[: t + 1]).all()


@pytest.mark.parametrize("c", [1, 2, 5, 11, 13])
def test_fast_weight_layers_do_not_depend_on_the_chunk(c):
    q, k, _, _, v = draw(8, 11)
    out = mca.causal_strict(q, k, q, k, v, chunk=c, scale=1.0, kernel=mca.identity, normaliser=mca.unnormalised)
    np.testing.assert_allclose(out, np.tril(q @ k.T, -1) @ v, rtol=1e-12, atol=1e-12)


def test_one_chunk_is_quadratic_attention_alone():
    q_quad, k_quad, q_lin, k_lin, v = draw(9, 7)
    expected = np.tril(np.maximum(0.5 * q_quad @ k_quad.T, 0) ** 2) @ v
    for c in (7, 8, 100):
        run = functools.partial(mca.causal, chunk=c, scale=0.5, kernel=squared_relu)
        np.testing.assert_allclose(run(q_quad, k_quad, q_lin, k_lin, v, normaliser=mca.su), expected / c, rtol=1e-12)


def test_chunks_of_one_are_a_diagonal_and_exclusive_linear_attention():
    q_quad, k_quad, q_lin, k_lin, v = draw(10, 7)
    out = mca.causal(
        q_quad, k_quad, q_lin, k_lin, v, chunk=1, scale=0.5, kernel=squared_relu, normaliser=mca.unnormalised
    )
    diagonal = np.maximum(0.5 * (q_quad * k_quad).sum(-1, keepdims=True), 0) ** 2 * v
    np.testing.assert_allclose(out, diagonal + np.tril(q_lin @ k_lin.T, -1) @ v, rtol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", [squared_relu, attention_kernel.laplace, attention_kernel.softmax])
def test_appended_masked_tokens_change_nothing_with_visible_lengths(mode, kernel):
    heads, more = draw(11, 2, 7), draw(12, 2, 6)
    bias = np.random.default_rng(13).normal(size=(5, 5))
    run = functools.partial(getattr(mca, mode), chunk=5, scale=1.0, kernel=kernel, normaliser=mca.visible, bias=bias)
    longer = [np.concatenate([x, 1e3 * y], axis=1) for x, y in zip(heads, more, strict=True)]
    mask = np.arange(13) < 7
    np.testing.assert_allclose(run(*longer, mask)[:, :7], run(*heads), rtol=1e-13, atol=1e-13)


def test_array_lengths_do_change_with_padding():
    heads = draw(11, 7)
    longer = [np.concatenate([x, x]) for x in heads]
    for normaliser in (mca.su, mca.paper, mca.lucidrains):
        run = functools.partial(mca.bidirectional, chunk=5, scale=1.0, kernel=squared_relu, normaliser=normaliser)
        assert np.abs(run(*longer, np.arange(14) < 7)[:7] - run(*heads)).max() > 0.05


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("normaliser", [mca.su, mca.paper, mca.lucidrains_causal, mca.unnormalised, mca.visible])
def test_fully_masked_sequences_give_zeros(mode, normaliser):
    heads = draw(14, 3, 7)
    mask = np.ones((3, 7), dtype=bool)
    mask[1] = False
    run = functools.partial(getattr(mca, mode), chunk=4, scale=1.0, normaliser=normaliser, bias=np.ones((4, 4)))
    for kernel in (squared_relu, attention_kernel.laplace, attention_kernel.softmax):
        out = run(*heads, mask, kernel=kernel)
        assert (out[1] == 0).all() and np.isfinite(out).all() and (out[2] != 0).any()


@pytest.mark.parametrize("mode", MODES)
def test_no_token_no_feature_and_one_token(mode):
    run = functools.partial(getattr(mca, mode), scale=1.0, kernel=squared_relu, normaliser=mca.visible)
    assert run(*draw(0, 2, 0), chunk=3).shape == (2, 0, 5)
    assert run(*draw(0, 0, 4), chunk=3).shape == (0, 4, 5)
    assert (run(*draw(0, 4, s=0), chunk=3) == 0).all()
    assert run(*draw(0, 4, e=0), chunk=3).shape == (4, 0)
    one = [np.full((1, 1), 2.0)] * 4 + [np.full((1, 1), 3.0)]
    expected = {"bidirectional": 16 * 3 + 4 * 3, "causal": 16 * 3, "causal_strict": 0}[mode]
    assert run(*one, chunk=1)[0, 0] == run(*one, chunk=2)[0, 0] == expected


def edit(heads, segments, document, seed):
    return [
        np.where((segments == document)[..., None], y, x)
        for x, y in zip(heads, draw(seed, *segments.shape), strict=True)
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("normaliser", [mca.su, mca.paper, mca.visible])
def test_editing_one_document_moves_another_by_exactly_zero(mode, normaliser):
    # Borders inside chunks, a document of one token, and one id that comes back.
    segments = np.array([[0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 5], [3, 3, 3, 1, 1, 1, 1, 1, 3, 3, 0, 0, 0]])
    heads = draw(15, 2, 13)
    for kernel in (squared_relu, attention_kernel.laplace, attention_kernel.softmax):
        run = functools.partial(
            getattr(mca, mode), segments=segments, chunk=3, scale=1.0, kernel=kernel, normaliser=normaliser,
            documents=mca.same_document, bias=np.ones((3, 3)),
        )  # fmt: skip
        before = run(*heads)
        for document in range(6):
            after = run(*edit(heads, segments, document, 16))
            others = segments != document
            assert (after[others] == before[others]).all()
            if mode != "causal_strict" and (segments == document).any():
                assert (after[~others] != before[~others]).any()


@pytest.mark.parametrize("mode", MODES)
def test_documents_that_start_at_a_chunk_equal_documents_alone(mode):
    run = functools.partial(getattr(mca, mode), chunk=4, scale=1.0, kernel=squared_relu, normaliser=mca.visible)
    first, second = draw(17, 4), draw(18, 7)
    packed = [np.concatenate(pair) for pair in zip(first, second, strict=True)]
    for documents in (mca.same_document, mca.overlapping_chunks):
        out = run(*packed, segments=np.repeat([8, 9], [4, 7]), documents=documents)
        np.testing.assert_allclose(out, np.concatenate([run(*first), run(*second)]), rtol=1e-12, atol=1e-13)
    late = run(*packed, segments=np.repeat([8, 9], [5, 6]), documents=mca.same_document)
    assert np.abs(late[5:] - run(*(x[5:] for x in packed))).max() > 1e-3


def test_overlapping_chunks_read_by_ranges_of_ids():
    # Chunks of ids: [0 0], [0 1], [1 1], [2 2]; the second meets the first and the third.
    segments = np.array([[0, 0], [0, 1], [1, 1], [2, 2]])
    member, reads = mca.overlapping_chunks(segments)
    assert member.shape == (4, 2, 1) and member.all()
    np.testing.assert_array_equal(reads, [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]])
    x, v = np.ones((8, 1)), np.arange(1.0, 9.0)[:, None]
    run = functools.partial(
        mca.bidirectional, 0 * x, x, x, x, v, segments=segments.ravel(), chunk=2, scale=1.0, kernel=squared_relu
    )
    # Chunk sums of v: 3, 7, 11, 15, divided by the tokens of the chunks read: the paper's mean over chunks.
    overlap = run(normaliser=mca.paper, documents=mca.overlapping_chunks)[:, 0]
    np.testing.assert_allclose(overlap, np.repeat([10 / 4, 21 / 6, 18 / 4, 15 / 2], 2), rtol=1e-15)
    exact = run(normaliser=mca.visible, documents=mca.same_document)[:, 0]
    np.testing.assert_allclose(exact, [2, 2, 2, 5, 5, 5, 7.5, 7.5], rtol=1e-15)
    # Exact, but counted by whole chunks: document 0 lies in two chunks, document 1 in two, document 2 in one.
    coarse = run(normaliser=mca.paper, documents=mca.same_document)[:, 0]
    np.testing.assert_allclose(coarse, [6 / 4, 6 / 4, 6 / 4, 15 / 4, 15 / 4, 15 / 4, 7.5, 7.5], rtol=1e-15)


def test_overlapping_chunks_leak_at_a_border_and_ranges_are_not_sets():
    segments = np.repeat([0, 1], [5, 8])
    heads = draw(15, 13)
    run = functools.partial(
        mca.causal, segments=segments, chunk=3, scale=1.0, kernel=squared_relu, normaliser=mca.paper,
        documents=mca.overlapping_chunks,
    )  # fmt: skip
    moved = np.abs(run(*edit(heads, segments, 0, 16)) - run(*heads)).max(axis=-1)
    # Token 5 shares a chunk with document 0; chunks 2, 3 and 4 read the sum of that chunk.
    assert (moved[5:] > 0).all()
    assert (mca.overlapping_chunks(np.array([[1, 3], [2, 2]])).reads).all()


def test_one_document_is_no_documents():
    heads = draw(19, 2, 7)
    for mode in MODES:
        run = functools.partial(getattr(mca, mode), chunk=3, scale=1.0, kernel=squared_relu, normaliser=mca.paper)
        for documents in (mca.same_document, mca.overlapping_chunks):
            out = run(*heads, segments=np.full((2, 7), 4), documents=documents)
            np.testing.assert_allclose(out, run(*heads), rtol=1e-14)


@given(st.integers(1, 6), st.lists(st.integers(0, 5), max_size=7), st.integers(0, 10**6))
def test_streaming_equals_the_batch(c, blocks, seed):
    n = sum(blocks)
    heads = draw(seed, 2, n)
    rng = np.random.default_rng(seed)
    mask, bias = rng.random((2, n)) < 0.7, rng.normal(size=(c, c))
    for normaliser in (mca.su, mca.paper, mca.lucidrains_causal, mca.unnormalised, mca.visible):
        options = {"chunk": c, "scale": 0.7, "kernel": attention_kernel.laplace, "normaliser": normaliser}
        state, outputs, start = mca.initial_state(batch=(2,), s=3, e=5), [np.zeros((2, 0, 5))], 0
        for size in blocks:
            part = slice(start, start + size)
            out, state = mca.step(state, *(x[:, part] for x in heads), mask[:, part], bias, **options)
            outputs.append(out)
            start += size
        expected = mca.causal(*heads, mask, bias=bias, **options)
        np.testing.assert_allclose(np.concatenate(outputs, axis=1), expected, rtol=1e-11, atol=1e-12)
        assert state.chunks == n // c and state.v.shape == (2, n % c, 5)


def test_the_state_after_seven_tokens():
    q_quad, k_quad, q_lin, k_lin, v = draw(20, 7)
    mask = np.array([True, False, True, True, True, True, False])
    empty = mca.initial_state(batch=(), s=3, e=5)
    options = {"chunk": 3, "scale": 1.0, "kernel": squared_relu, "normaliser": mca.visible}
    _, state = mca.step(empty, q_quad, k_quad, q_lin, k_lin, v, mask, **options)
    valid = [0, 2, 3, 4, 5]
    np.testing.assert_allclose(state.summary, k_lin[valid].T @ v[valid], rtol=1e-13)
    assert state.chunks == 2 and state.counted == 5
    np.testing.assert_array_equal(state.k_quad, k_quad[6:])
    np.testing.assert_array_equal(state.k_lin, k_lin[6:])
    np.testing.assert_array_equal(state.v, v[6:])
    np.testing.assert_array_equal(state.valid, [False])
    assert (empty.summary == 0).all() and empty.v.shape == (0, 5)
    kept = state.summary.copy()
    mca.step(state, q_quad, k_quad, q_lin, k_lin, v, **options)
    assert (state.summary == kept).all() and state.chunks == 2 and state.v.shape == (1, 5)


def test_rows_name_the_heads():
    z, gamma, beta = np.array([[2.0, 3.0]]), np.array([[1.0, 0], [2, 0], [3, 0], [4, 0]]), np.arange(8.0).reshape(4, 2)
    heads = mca.scale_offset_heads(z, gamma, beta, rows=mca.ROWS_PAPER)
    assert [list(head[0]) for head in heads] == [[2, 1], [6, 3], [10, 5], [14, 7]]
    heads = mca.scale_offset_heads(z, gamma, beta, rows=mca.ROWS_LUCIDRAINS)
    assert list(heads.q_lin[0]) == [6, 3] and list(heads.k_quad[0]) == [10, 5]


def silu(x):
    return x / (1 + np.exp(-x))


def unit_weights(seed, d=7, e=5, s=4):
    rng = np.random.default_rng(seed)
    shapes = [(d, 2 * e + s), (2 * e + s,), (4, s), (4, s), (e, d), (d,)]
    return [rng.normal(size=shape) for shape in shapes]


def test_the_unit_step_by_step():
    w_in, b_in, gamma, beta, w_out, b_out = weights = unit_weights(21)
    x = np.random.default_rng(22).normal(size=(11, 7))
    positions, theta = np.arange(11) + 2, np.array([1.0, 0.01])
    options = {"chunk": 4, "scale": 0.5, "kernel": squared_relu, "normaliser": mca.visible}
    out = mca.unit(
        x, None, None, None, positions, theta, *weights,
        mix=mca.causal, rotate=rope.rotate_half_split, rows=mca.ROWS_PAPER, **options,
    )  # fmt: skip
    h = silu(x @ w_in + b_in)
    u, v, z = h[:, :5], h[:, 5:10], h[:, 10:]
    heads = []
    for r in range(4):
        head = gamma[r] * z + beta[r]
        # A rotation as a product of complex numbers: half split pairs (0, 2) and (1, 3).
        turned = (head[:, :2] + 1j * head[:, 2:]) * np.exp(1j * np.outer(positions, theta))
        heads.append(np.concatenate([turned.real, turned.imag], axis=-1))
    mixed = dense(
        "causal", *heads, v, np.ones(11, dtype=bool), None, np.zeros((4, 4)),
        c=4, scale=0.5, weight=lambda a: max(a, 0.0) ** 2, variant="visible", separation="exact",
    )  # fmt: skip
    np.testing.assert_allclose(out, (u * mixed) @ w_out + b_out, rtol=1e-11, atol=1e-12)


def test_the_unit_moves_with_a_common_shift_of_positions_but_not_with_positions_per_chunk():
    weights, x = unit_weights(23), np.random.default_rng(24).normal(size=(2, 11, 7))
    run = functools.partial(
        mca.unit, x, None, None, None, mix=mca.bidirectional, rotate=rope.rotate_interleaved, rows=mca.ROWS_PAPER,
        chunk=4, scale=0.5, kernel=squared_relu, normaliser=mca.su,
    )  # fmt: skip
    theta = rope.frequencies(4, base=10000.0)
    out = run(np.arange(11), theta, *weights)
    np.testing.assert_allclose(run(np.arange(11) + 100, theta, *weights), out, rtol=1e-9, atol=1e-9)
    assert np.abs(run(np.arange(11) % 4, theta, *weights) - out).max() > 1e-2
    np.testing.assert_array_equal(run(None, None, *weights), run(np.zeros(11), theta, *weights))


def test_the_unit_passes_masks_documents_and_bias_on():
    weights, x = unit_weights(25), np.random.default_rng(26).normal(size=(1, 9, 7))
    run = functools.partial(
        mca.unit, mix=mca.bidirectional, rotate=rope.rotate_interleaved, rows=mca.ROWS_PAPER, chunk=4, scale=0.5,
        kernel=squared_relu, normaliser=mca.visible,
    )  # fmt: skip
    plain = run(x, None, None, None, None, None, *weights)
    masked = run(x, np.arange(9) != 5, None, None, None, None, *weights)
    np.testing.assert_allclose(np.abs(masked - plain).max(axis=(0, 2)) > 1e-6, True)
    biased = run(x, None, None, np.ones((4, 4)), None, None, *weights)
    assert np.abs(biased - plain).max() > 1e-3
    packed = run(x, None, np.repeat([0, 1], [4, 5]), None, None, None, *weights, documents=mca.same_document)
    np.testing.assert_allclose(packed[:, :4], run(x[:, :4], None, None, None, None, None, *weights), rtol=1e-12)


def alike(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13 * np.abs(expected).max())


@pytest.mark.parametrize("name", lucidrains.FLASH)
def test_flash_pytorch(name):
    """Outputs of FLASH-pytorch 0.1.9 in float64, with its own weights."""
    golden = collection.load("flash_pytorch", name)
    alike(lucidrains.flash(SPEC, np.asarray, golden, name), golden["y"])
    # Gradients are asked of torchimpl.
    assert golden.left == {"grad_x", "grad_y"}


def test_flash_pytorchs_transformer():
    golden = collection.load("flash_pytorch", "transformer")
    alike(lucidrains.transformer(SPEC, np.asarray, golden), golden["y"])
    assert not golden.left
    # The mask is passed on, and the half of the features that comes late does come late.
    for name in ("mask", "x"):
        golden[name] = golden[name][:, ::-1]
        assert np.abs(lucidrains.transformer(SPEC, np.asarray, golden) - golden["y"]).max() > 1e-2


@pytest.mark.parametrize("name", [*lucidrains.FLASH, "transformer"])
def test_flash_pytorchs_buckets_are_t5s(name):
    table = collection.load("flash_pytorch", name)["rel_pos_bucket"]
    np.testing.assert_array_equal(lucidrains.bucket(len(table), causal="causal" in name), table)


def test_every_file_of_flash_pytorch_is_reproduced_and_the_copies_are_copies():
    assert collection.collected("flash_pytorch") == {*lucidrains.GAU, *lucidrains.FLASH, "transformer"}
    assert not collection.differing_copies("flash_pytorch")


def run_with(mode="causal", **changes):
    arrays = dict(zip(("q_quad", "k_quad", "q_lin", "k_lin", "v"), draw(0, 2, 7), strict=True))
    options = {"chunk": 3, "scale": 1.0, "kernel": squared_relu, "normaliser": mca.su}
    return getattr(mca, mode)(**{**arrays, **options, **changes})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"k_quad": np.ones((2, 7, 4))}, ShapeError, "four heads of one shape"),
        ({"k_lin": np.ones((2, 6, 3))}, ShapeError, r"k_lin of shape \(2, 6, 3\)"),
        ({"q_lin": np.ones((7, 3))}, ShapeError, "four heads of one shape"),
        ({"v": np.ones((2, 6, 5))}, ShapeError, r"v of shape \(2, 6, 5\)"),
        ({"v": np.ones(7)}, ShapeError, r"v of shape \(7,\)"),
        ({"key_mask": np.ones((2, 6), dtype=bool)}, ShapeError, "key_mask that broadcasts"),
        ({"key_mask": np.ones((3, 2, 7), dtype=bool)}, ShapeError, "key_mask that broadcasts"),
        ({"key_mask": np.ones((2, 7))}, DomainError, "must be boolean"),
        ({"segments": np.ones((2, 6), dtype=int), "documents": mca.same_document}, ShapeError, "segments that"),
        ({"segments": np.ones((2, 7)), "documents": mca.same_document}, DomainError, "must be integers"),
        ({"segments": np.ones((2, 7), dtype=int)}, DomainError, "segments and documents together"),
        ({"documents": mca.same_document}, DomainError, "segments and documents together"),
        ({"bias": np.ones((7, 7))}, ShapeError, r"bias of shape \(3, 3\)"),
        ({"bias": np.full((3, 3), np.nan)}, DomainError, "bias must be finite"),
        ({"v": np.full((2, 7, 5), np.inf)}, DomainError, "v must be finite"),
        ({"chunk": 0}, DomainError, "chunk >= 1"),
        ({"scale": math.nan}, DomainError, "a finite scale"),
    ],
)
def test_what_is_refused(mode, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        run_with(mode, **changes)
    assert f"mixed_chunk_attention.{mode}" in str(caught.value)


def test_what_streams_and_heads_refuse():
    heads = draw(0, 2, 7)
    options = {"chunk": 3, "scale": 1.0, "kernel": squared_relu, "normaliser": mca.su}
    for state in (
        mca.initial_state(batch=(), s=3, e=5),
        mca.initial_state(batch=(2,), s=4, e=5),
        mca.initial_state(batch=(2,), s=3, e=4),
    ):
        with pytest.raises(ShapeError, match="step: expected a state of"):
            mca.step(state, *heads, **options)
    _, state = mca.step(mca.initial_state(batch=(2,), s=3, e=5), *(x[:, :2] for x in heads), **options)
    with pytest.raises(ShapeError, match="fewer than c = 2 buffered"):
        mca.step(state, *heads, **{**options, "chunk": 2})
    for changes in (
        {"k_quad": state.k_quad[:, 1:]},
        {"k_lin": state.k_lin[..., 1:]},
        {"v": state.v[:1]},
        {"valid": state.valid[:, 1:]},
        {"counted": state.counted[1:]},
    ):
        with pytest.raises(ShapeError, match="step: expected a state of"):
            mca.step(state._replace(**changes), *heads, **options)
    for changes in (
        {"summary": state.summary * np.nan},
        {"valid": state.v[..., 0]},
        {"counted": np.zeros(2)},
        {"chunks": -1},
    ):
        with pytest.raises(DomainError, match="step"):
            mca.step(state._replace(**changes), *heads, **options)
    z, gamma = np.ones((7, 3)), np.ones((4, 3))
    with pytest.raises(ShapeError, match=r"gamma and beta of shape \(4, s\)"):
        mca.scale_offset_heads(z, np.ones((2, 3)), np.ones((2, 3)), rows=mca.ROWS_PAPER)
    with pytest.raises(ShapeError):
        mca.scale_offset_heads(z, np.ones((4, 2)), np.ones((4, 2)), rows=mca.ROWS_PAPER)
    for rows in ((0, 1, 2), (0, 1, 2, 2), (1, 2, 3, 4)):
        with pytest.raises(DomainError, match="permutation"):
            mca.scale_offset_heads(z, gamma, gamma, rows=rows)
    for documents in (mca.same_document, mca.overlapping_chunks):
        with pytest.raises(DomainError, match=f"{documents.__name__}: segments must be integers"):
            documents(np.ones((2, 2)))
        for shape in ((4,), (3, 0)):
            with pytest.raises(ShapeError, match=r"segments of shape \(\.\.\., G, c\)"):
                documents(np.ones(shape, dtype=int))
    with pytest.raises(DomainError, match="boolean"):
        mca.identity(np.ones((2, 2)), np.ones((2, 2)))


def test_what_the_unit_refuses():
    x, (w_in, b_in, gamma, beta, w_out, b_out) = np.ones((11, 7)), unit_weights(0)
    run = functools.partial(
        mca.unit, mix=mca.causal, rotate=rope.rotate_interleaved, rows=mca.ROWS_PAPER, chunk=4, scale=0.5,
        kernel=squared_relu, normaliser=mca.su,
    )  # fmt: skip
    with pytest.raises(ShapeError):
        run(x, None, None, None, None, None, w_in[:, 1:], b_in[1:], gamma, beta, w_out, b_out)
    with pytest.raises(ShapeError):
        run(x, None, None, None, None, None, w_in, b_in, gamma, beta, w_out[1:], b_out)
    with pytest.raises(DomainError, match="positions and frequencies together"):
        run(x, None, None, None, np.arange(11), None, w_in, b_in, gamma, beta, w_out, b_out)


def test_arguments_stay_as_they_were():
    heads = draw(27, 2, 7)
    kept = [x.copy() for x in heads]
    mask, segments = np.ones((2, 7), dtype=bool), np.zeros((2, 7), dtype=int)
    for x in [*heads, mask, segments]:
        x.flags.writeable = False
    for mode in MODES:
        run_with(
            mode, **dict(zip(("q_quad", "k_quad", "q_lin", "k_lin", "v"), heads, strict=True)), key_mask=mask,
            segments=segments, documents=mca.same_document,
        )  # fmt: skip
    assert all((x == y).all() for x, y in zip(heads, kept, strict=True))


def test_a_length_of_zero_gives_zero():
    heads = draw(28, 7)
    run = functools.partial(mca.bidirectional, *heads, chunk=3, scale=1.0, kernel=squared_relu)
    assert (run(normaliser=lambda reach: mca.Lengths(0, 0)) == 0).all()
    local, linear = (run(normaliser=lambda reach, n=n: mca.Lengths(*n)) for n in ((1, 0), (0, 1)))
    np.testing.assert_allclose(local + linear, run(normaliser=mca.unnormalised), rtol=1e-13, atol=1e-13)
