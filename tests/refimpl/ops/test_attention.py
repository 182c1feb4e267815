"""Attention against torch, bert4keras' RoFormer, complex-number rotation in plain loops, and its laws."""

import cmath
import math
import pathlib
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.check import DomainError, ShapeError
from refimpl.ops import attention, rope
from refimpl.ops import attention_kernel as ak

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "b4k_attention" / "roformer_layer0.npz"


def numbers(*shape, seed=0):
    """Deterministic numbers in (-1, 1) without a random generator."""
    return np.sin(1.7 * np.arange(1, np.prod(shape, dtype=int) + 1) ** 1.3 + seed).reshape(shape)


def bits(*rows):
    return np.array(rows, dtype=bool)


def weights_of(d_in, d_memory, heads, groups, width, value_width, d_out, bias=True):
    shapes = [(d_in, heads * width), (d_memory, groups * width), (d_memory, groups * value_width)]
    shapes += [(heads * value_width, d_out)]
    pairs = [(numbers(*s, seed=i), numbers(s[1], seed=i + 9) if bias else None) for i, s in enumerate(shapes)]
    return [array for pair in pairs for array in pair]


self_attention = partial(attention.multi_head_attention, heads=3, rotate=rope.rotate_interleaved, kernel=ak.softmax)


# Masks and positions


def test_causal_mask_is_aligned_at_the_end():
    assert attention.causal_mask(2, 3).astype(int).tolist() == [[1, 1, 0], [1, 1, 1]]
    assert attention.causal_mask(3, 3).astype(int).tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert attention.causal_mask(3, 1).astype(int).tolist() == [[0], [0], [1]]


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0)])
def test_causal_mask_of_nothing(shape):
    assert attention.causal_mask(*shape).shape == shape


def test_causal_mask_differs_from_torch_unless_square():
    torch = pytest.importorskip("torch")
    from torch.nn.attention.bias import causal_lower_right

    q, k, v = (torch.from_numpy(numbers(1, 1, length, 4, seed=length)) for length in (3, 5, 5))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    end = sdpa(q, k, v, torch.from_numpy(attention.causal_mask(3, 5)))
    torch.testing.assert_close(end, sdpa(q, k, v, causal_lower_right(3, 5)))
    assert (end - sdpa(q, k, v, is_causal=True)).abs().max() > 0.1


def test_unilm_mask_shows_the_prefix_whole_and_the_rest_causally():
    got = attention.unilm_mask(np.array([[0, 0, 1, 1, 0], [1, 1, 1, 1, 1]]))
    assert got[0].astype(int).tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1],
    ]
    np.testing.assert_array_equal(got[1], attention.causal_mask(5, 5))


def test_unilm_mask_of_one_segment_is_full_and_of_nothing_empty():
    assert attention.unilm_mask(np.zeros(4, dtype=np.int64)).all()
    assert attention.unilm_mask(np.zeros((2, 0), dtype=np.int64)).shape == (2, 0, 0)


def test_key_mask_hides_keys_from_every_query():
    got = attention.key_mask(bits([1, 1, 0], [1, 0, 0]))
    assert got.shape == (2, 1, 3)
    assert attention.per_head(got).shape == (2, 1, 1, 3)
    assert attention.per_head(attention.causal_mask(2, 3)).shape == (1, 2, 3)


def test_positions_count_real_tokens_whichever_side_is_padded():
    valid = bits([0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 1, 0])
    expected = [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]
    assert attention.positions_from_mask(valid).tolist() == expected
    assert attention.positions_from_mask(np.ones((2, 0), dtype=bool)).shape == (2, 0)


# attend


def test_attend_by_hand():
    # One query, three keys; scale 2 makes the scores 0, ln 2, ln 5; the third is then masked.
    q = np.array([[[math.log(10) / 2]]])
    k = np.array([0.0, math.log(2) / math.log(10), math.log(5) / math.log(10)]).reshape(3, 1, 1)
    v = np.array([[8.0, 0.0], [16.0, 8.0], [0.0, 1.0]]).reshape(3, 1, 2)
    got = attention.attend(q, k, v, None, kernel=ak.softmax, scale=2.0)
    np.testing.assert_allclose(got, [[[5.0, 21 / 8]]], rtol=1e-14)
    got = attention.attend(q, k, v, bits([1, 1, 0]), kernel=ak.softmax, scale=2.0)
    np.testing.assert_allclose(got, [[[40 / 3, 16 / 3]]], rtol=1e-14)


@pytest.mark.parametrize("groups", [6, 3, 2, 1])
def test_attend_equals_torch_with_grouped_heads(groups):
    torch = pytest.importorskip("torch")
    q, k = numbers(2, 5, 6, 4), numbers(2, 7, groups, 4, seed=1)
    v = numbers(2, 7, groups, 3, seed=2)
    mask = numbers(2, 6, 5, 7, seed=3) > -0.5
    mask[..., 0] = True
    got = attention.attend(q, k, v, mask, kernel=ak.softmax, scale=0.37)
    heads_first = [torch.from_numpy(t).transpose(1, 2) for t in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, torch.from_numpy(mask), scale=0.37, enable_gqa=True
    )
    np.testing.assert_allclose(got, expected.transpose(1, 2), rtol=1e-12, atol=1e-14)


def test_neighbouring_query_heads_share_a_key_head():
    # Value head g is the constant g, so the output names the key head that was used: 3 = 6/2 neighbours each.
    q, k = numbers(1, 6, 4), numbers(5, 2, 4)
    v = np.broadcast_to(np.arange(2.0)[:, None], (5, 2, 1))
    got = attention.attend(q, k, v, None, kernel=ak.softmax, scale=1.0)
    np.testing.assert_allclose(got[0, :, 0], [0, 0, 0, 1, 1, 1], atol=1e-15)


def test_a_fully_masked_row_is_zero_and_masked_values_do_not_matter():
    q, k, v = numbers(2, 3, 1, 4), numbers(2, 5, 1, 4), numbers(2, 5, 1, 2)
    mask = attention.per_head(attention.key_mask(bits([1, 1, 0, 0, 0], [0, 0, 0, 0, 0])))
    got = attention.attend(q, k, v, mask, kernel=ak.softmax, scale=1.0)
    assert not got[1].any()
    assert got[0].all()
    hidden = ~mask[:, 0, 0, :, None, None]
    poisoned = attention.attend(q, np.where(hidden, 1e6, k), np.where(hidden, -1e9, v), mask,
                                kernel=ak.softmax, scale=1.0)  # fmt: skip
    np.testing.assert_array_equal(poisoned, got)


def test_the_kernel_sees_scaled_scores_and_the_mask():
    seen = []

    def kernel(scores, mask):
        seen.append((scores, mask))
        return np.ones_like(scores)

    q, k, v = np.full((1, 2, 3), 2.0), np.full((4, 2, 3), 5.0), np.ones((4, 2, 1))
    mask = bits([1, 1, 1, 0])
    got = attention.attend(q, k, v, mask, kernel=kernel, scale=0.5)
    np.testing.assert_array_equal(seen[0][0], np.full((2, 1, 4), 15.0))
    assert seen[0][1].tolist() == mask.tolist()
    np.testing.assert_array_equal(got, np.full((1, 2, 1), 4.0))


@pytest.mark.parametrize("shapes", [(0, 5, 2, 2), (3, 0, 2, 2), (3, 5, 0, 0)])
def test_attend_on_nothing(shapes):
    n, m, h, g = shapes
    q, k, v = np.ones((2, n, h, 4)), np.ones((2, m, g, 4)), np.ones((2, m, g, 3))
    got = attention.attend(q, k, v, None, kernel=ak.softmax, scale=1.0)
    assert got.shape == (2, n, h, 3)
    assert not got.any() or m > 0


def test_rotated_values_equal_complex_rotation():
    # One pair per head: key m at position p_m multiplies its value by exp(i p_m θ).
    q, k, v = numbers(3, 1, 2), numbers(5, 1, 2, seed=1), numbers(5, 1, 2, seed=2)
    positions, theta = np.array([4, 0, 7, 7, 100]), 0.3
    weights = ak.softmax(np.einsum("nhd,mhd->hnm", q, k), None)[0]
    values = [complex(*v[m, 0]) * cmath.exp(1j * positions[m] * theta) for m in range(5)]
    expected = [sum(weights[n, m] * values[m] for m in range(5)) for n in range(3)]
    angles = rope.angles(positions, np.array([theta]))
    got = attention.attend_rotated_values(
        q, k, v, angles, None, rotate=rope.rotate_interleaved, kernel=ak.softmax, scale=1.0
    )
    np.testing.assert_allclose(got[:, 0, 0] + 1j * got[:, 0, 1], expected, rtol=1e-12)


def test_rotating_back_makes_rotated_values_relative():
    q, k, v = numbers(2, 5, 3, 4), numbers(2, 5, 3, 4, seed=1), numbers(2, 5, 3, 4, seed=2)
    theta = rope.frequencies(4, base=100.0)

    def output(shift):
        angles = rope.angles(np.arange(5) + shift, theta)
        place = partial(rope.rotate_interleaved, angles=angles[:, None])
        o = attention.attend_rotated_values(
            place(q), place(k), v, angles, None, rotate=rope.rotate_interleaved, kernel=ak.softmax, scale=0.5
        )
        return o, rope.rotate_interleaved(o, -angles[:, None])

    (here, here_back), (there, there_back) = output(0), output(11)
    assert np.abs(here - there).max() > 0.1
    np.testing.assert_allclose(here_back, there_back, atol=1e-12)


# Projections and positions


def plain_loops(x, memory, valid, positions_q, positions_k, weights, heads, groups, base):
    """Cross-attention of one sequence written as loops over scalars, with rotation by complex numbers."""
    w_q, b_q, w_k, b_k, w_v, b_v, w_o, b_o = weights
    width, value_width = w_q.shape[1] // heads, w_v.shape[1] // groups

    def row(token, w, b, head, size):
        columns = range(head * size, (head + 1) * size)
        return [sum(token[i] * w[i, c] for i in range(len(token))) + (0 if b is None else b[c]) for c in columns]

    def pairs(vector, position):
        turned = [complex(vector[2 * i], vector[2 * i + 1]) for i in range(width // 2)]
        if position is None:
            return turned
        return [z * cmath.exp(1j * position * base ** (-2 * i / width)) for i, z in enumerate(turned)]

    outputs = []
    for n, token in enumerate(x):
        mixed = []
        for head in range(heads):
            group = head // (heads // groups)
            query = pairs(row(token, w_q, b_q, head, width), None if positions_q is None else positions_q[n])
            logits = []
            for m, other in enumerate(memory):
                key = pairs(row(other, w_k, b_k, group, width), None if positions_k is None else positions_k[m])
                logits.append(sum((a * b.conjugate()).real for a, b in zip(query, key, strict=True)) / width**0.5)
            total = sum(math.exp(s) for s, seen in zip(logits, valid, strict=True) if seen)
            mix = [math.exp(s) / total if seen else 0.0 for s, seen in zip(logits, valid, strict=True)]
            values = [row(other, w_v, b_v, group, value_width) for other in memory]
            mixed += [sum(a * value[j] for a, value in zip(mix, values, strict=True)) for j in range(value_width)]
        outputs.append(row(mixed, w_o, b_o, 0, w_o.shape[1]))
    return np.array(outputs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("positions_q", "positions_k"), [([3, 0], [9, 2, 5]), ([3, 0], None), (None, None)])
def test_cross_attention_equals_plain_loops(bias, positions_q, positions_k):
    weights = weights_of(5, 7, heads=6, groups=2, width=4, value_width=3, d_out=11, bias=bias)
    x, memory, valid = numbers(2, 5), numbers(3, 7, seed=4), bits(1, 0, 1)
    expected = plain_loops(x, memory, valid, positions_q, positions_k, weights, 6, 2, 50.0)
    got = attention.cross_attention(
        x, memory, attention.per_head(valid[None]),
        None if positions_q is None else np.array(positions_q),
        None if positions_k is None else np.array(positions_k),
        rope.frequencies(4, base=50.0), *weights, heads=6, rotate=rope.rotate_interleaved, kernel=ak.softmax,
    )  # fmt: skip
    np.testing.assert_allclose(got, expected, rtol=1e-11)


def test_self_attention_equals_bert4keras():
    golden = np.load(GOLDEN)
    weights = [golden[name] for name in ("w_q", "b_q", "w_k", "b_k", "w_v", "b_v", "w_o", "b_o")]
    mask = attention.per_head(attention.key_mask(golden["valid"]))
    got = attention.multi_head_attention(
        golden["x"], mask, np.arange(20), rope.frequencies(12, base=10000.0), *weights,
        heads=4, rotate=rope.rotate_interleaved, kernel=ak.softmax,
    )  # fmt: skip
    np.testing.assert_allclose(got, golden["y"], rtol=0, atol=1e-12)


@given(left=st.integers(0, 3), right=st.integers(0, 3), shift=st.integers(-50, 50))
@settings(max_examples=15)
def test_padding_on_either_side_and_a_shift_of_positions_change_nothing(left, right, shift):
    weights = weights_of(5, 5, heads=3, groups=3, width=4, value_width=4, d_out=5)
    x, theta = numbers(2, 4, 5), rope.frequencies(4, base=100.0)
    expected = self_attention(x, None, np.arange(4), theta, *weights)
    padded = np.concatenate([np.full((2, left, 5), 1e3), x, np.full((2, right, 5), -1e3)], axis=1)
    valid = np.zeros((2, left + 4 + right), dtype=bool)
    valid[:, left : left + 4] = True
    mask = attention.per_head(attention.key_mask(valid))
    positions = attention.positions_from_mask(valid) + shift
    got = self_attention(padded, mask, positions, theta, *weights)
    np.testing.assert_allclose(got[:, left : left + 4], expected, rtol=1e-9)


def test_positions_may_differ_within_a_batch():
    weights = weights_of(5, 5, heads=3, groups=1, width=4, value_width=4, d_out=5)
    x, theta = numbers(2, 4, 5), rope.frequencies(4, base=100.0)
    positions = np.array([[0, 1, 2, 3], [7, 3, 9, 1]])
    got = self_attention(x, None, positions, theta, *weights)
    alone = [self_attention(x[i], None, positions[i], theta, *weights) for i in range(2)]
    np.testing.assert_allclose(got, alone, rtol=1e-12)


def test_a_causal_future_changes_nothing_before_it():
    weights = weights_of(5, 5, heads=3, groups=3, width=4, value_width=4, d_out=5)
    x, theta = numbers(6, 5), rope.frequencies(4, base=100.0)
    changed = x.copy()
    changed[4] += 100
    before, after = (
        self_attention(t, attention.causal_mask(6, 6), np.arange(6), theta, *weights) for t in (x, changed)
    )
    np.testing.assert_array_equal(before[:4], after[:4])
    assert np.abs(before[4:] - after[4:]).min() > 0


def test_queries_may_be_no_tokens():
    weights = weights_of(5, 5, heads=3, groups=3, width=4, value_width=4, d_out=7)
    theta = rope.frequencies(4, base=100.0)
    assert self_attention(np.zeros((2, 0, 5)), None, np.arange(0), theta, *weights).shape == (2, 0, 7)


def test_project_adds_the_bias_to_every_row():
    w = np.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    x = np.array([[1.0, 0.0], [0.0, 2.0]])
    assert attention.project(x, w, None).tolist() == [[1, 2, 3], [20, 40, 60]]
    assert attention.project(x, w, np.array([0.0, 0.5, 0.0])).tolist() == [[1, 2.5, 3], [20, 40.5, 60]]


# Errors


def attend_zeros(q, k, v, mask=None):
    arrays = [np.zeros(shape) for shape in (q, k, v)]
    mask = None if mask is None else np.ones(mask, dtype=bool)
    return attention.attend(*arrays, mask, kernel=ak.softmax, scale=1.0)


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((2, 3, 4, 5), (2, 7, 3, 5), (2, 7, 3, 5)),  # 4 query heads, 3 key heads
        ((2, 3, 2, 5), (2, 7, 4, 5), (2, 7, 4, 5)),  # fewer query heads than key heads
        ((2, 3, 4, 5), (2, 7, 4, 6), (2, 7, 4, 5)),  # widths of q and k
        ((2, 3, 4, 5), (2, 7, 4, 5), (2, 6, 4, 5)),  # lengths of k and v
        ((2, 3, 4, 5), (3, 7, 4, 5), (3, 7, 4, 5)),  # batches
        ((2, 3, 4, 5), (7, 4, 5), (7, 4, 5)),  # axes
        ((2, 3, 4, 5), (2, 7, 4, 5), (2, 7, 2, 5)),  # heads of k and v
        ((2, 3, 4, 5), (2, 7, 0, 5), (2, 7, 0, 5)),  # no key heads
    ],
)
def test_attend_refuses_shapes_that_do_not_fit(q, k, v):
    with pytest.raises(ShapeError, match=r"attention.attend: expected q .* received q of shape"):
        attend_zeros(q, k, v)


@pytest.mark.parametrize("mask", [(2, 3, 7), (7,), (2, 7), (1, 7), (2, 4, 7, 3), (3, 4, 3, 7), (1, 2, 4, 3, 7)])
def test_attend_refuses_masks_that_could_be_misread(mask):
    with pytest.raises(ShapeError, match="mask"):
        attend_zeros((2, 3, 4, 5), (2, 7, 4, 5), (2, 7, 4, 5), mask)


@pytest.mark.parametrize("mask", [(3, 7), (2, 4, 3, 7), (1, 1, 3, 7), (2, 1, 1, 7), (1, 4, 1, 1)])
def test_attend_takes_masks_with_all_axes_or_two(mask):
    assert attend_zeros((2, 3, 4, 5), (2, 7, 4, 5), (2, 7, 4, 5), mask).shape == (2, 3, 4, 5)


def test_attend_refuses_values_outside_its_domain():
    q = np.zeros((1, 1, 2))
    with pytest.raises(DomainError, match="v must be finite"):
        attention.attend(q, q, q + np.nan, None, kernel=ak.softmax, scale=1.0)
    with pytest.raises(DomainError, match="finite scale, received scale=inf"):
        attention.attend(q, q, q, None, kernel=ak.softmax, scale=math.inf)
    with pytest.raises(DomainError, match="mask must be boolean"):
        attention.attend(q, q, q, np.ones((1, 1)), kernel=ak.softmax, scale=1.0)


def call_self(x=(4, 5), positions=(4,), heads=3, frequencies=2, **changes):
    names = ("w_q", "b_q", "w_k", "b_k", "w_v", "b_v", "w_o", "b_o")
    weights = dict(zip(names, weights_of(5, 5, 3, 3, 4, 4, 5), strict=True))
    weights.update({name: np.zeros(shape) for name, shape in changes.items()})
    theta = None if frequencies is None else np.ones(frequencies)
    return attention.multi_head_attention(
        np.zeros(x), None, np.zeros(positions), theta, **weights,
        heads=heads, rotate=rope.rotate_interleaved, kernel=ak.softmax,
    )  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"x": (4, 6)}, {"w_q": (5, 13)}, {"w_q": (5, 2), "b_q": (2,)}, {"w_k": (5, 10), "b_k": (10,)},
        {"w_v": (5, 13), "b_v": (13,)}, {"b_o": (1,)}, {"w_o": (12,)}, {"positions": (3,)}, {"positions": (2, 4)},
        {"heads": 5}, {"frequencies": 3},
    ],
)  # fmt: skip
def test_self_attention_refuses_shapes_that_do_not_fit(changes):
    with pytest.raises(ShapeError, match="expected"):
        call_self(**changes)


def test_self_attention_refuses_no_heads_and_positions_without_frequencies():
    with pytest.raises(DomainError, match="heads >= 1, received heads=0"):
        call_self(heads=0)
    with pytest.raises(DomainError, match="frequencies for positions_q"):
        call_self(frequencies=None)


@pytest.mark.parametrize(
    ("function", "argument", "error"),
    [
        (attention.key_mask, np.array([1, 0]), DomainError),
        (attention.key_mask, np.array(True), ShapeError),
        (attention.per_head, np.array([[1]]), DomainError),
        (attention.per_head, np.array([True]), ShapeError),
        (attention.positions_from_mask, np.array([1, 0]), DomainError),
        (attention.positions_from_mask, np.array(True), ShapeError),
        (attention.unilm_mask, np.array([0, 2]), DomainError),
        (attention.unilm_mask, np.array([0, -1]), DomainError),
        (attention.unilm_mask, np.array([0.0, 1.0]), DomainError),
        (attention.unilm_mask, np.array(1), ShapeError),
    ],
)
def test_masks_refuse_what_they_are_not_made_of(function, argument, error):
    # Shape annotations refuse some of these before the function does.
    with pytest.raises((error, TypeError)):
        function(argument)


@pytest.mark.parametrize(("n", "m"), [(-1, 2), (2, -1)])
def test_causal_mask_refuses_negative_lengths(n, m):
    with pytest.raises(DomainError, match="lengths >= 0"):
        attention.causal_mask(n, m)


def test_rotated_values_refuse_angles_without_a_token_axis():
    q = np.zeros((3, 1, 2))
    with pytest.raises(ShapeError, match="angles_k"):
        attention.attend_rotated_values(
            q, q, q, np.zeros(1), None, rotate=rope.rotate_interleaved, kernel=ak.softmax, scale=1.0
        )
