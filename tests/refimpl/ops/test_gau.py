"""The gated attention unit against FLASH-pytorch, bert4keras' GAU-α, plain loops and its laws."""

import cmath
import math
import pathlib
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.case import Package
from refimpl.check import DomainError, ShapeError
from refimpl.ops import attention, gau, rope
from refimpl.ops import attention_kernel as ak
from tests.golden import collection, lucidrains

SPEC = Package("refimpl.ops")
GOLDEN = pathlib.Path(__file__).parents[2] / "golden"
BARE = partial(ak.squared_relu_constant, length=1)
KERNELS = {
    "softmax_plus": partial(ak.softmax_plus, n_min=16),
    "squared_relu_visible": ak.squared_relu_visible,
    "laplace": ak.laplace,
}


def numbers(*shape, seed=0):
    """Deterministic numbers in (-1, 1) without a random generator."""
    return np.sin(1.7 * np.arange(1, np.prod(shape, dtype=int) + 1) ** 1.3 + seed).reshape(shape)


def bits(*rows):
    return np.array(rows, dtype=bool)


def weights_of(d=5, e=7, s=4, bias=True):
    shapes = {"w_in": (d, 2 * e + s), "b_in": (2 * e + s,), "gamma_q": (s,), "beta_q": (s,), "gamma_k": (s,)}
    shapes |= {"beta_k": (s,), "w_out": (e, d), "b_out": (d,)}
    weights = {name: numbers(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    return weights if bias else weights | dict.fromkeys(("b_in", "beta_q", "beta_k", "b_out"))


def cross_weights_of(d=5, e=7, s=4):
    shapes = {"w_in": (d, e + s), "b_in": (e + s,), "w_k": (3, s), "b_k": (s,), "w_v": (2, e), "b_v": (e,)}
    shapes |= {"w_out": (e, d), "b_out": (d,)}
    return {name: numbers(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def unit(x, mask=None, bias=None, positions=None, *, kernel=ak.squared_relu_visible, weights=None):
    theta = rope.frequencies(4, base=100.0)
    weights = weights_of() if weights is None else weights
    return gau.unit(x, mask, bias, positions, theta, **weights, rotate=rope.rotate_interleaved, kernel=kernel)


def unit_paper(x, mask=None, bias=None, positions=None, *, length=8, kernel=BARE, weights=None):
    theta = rope.frequencies(4, base=100.0)
    weights = weights_of() if weights is None else weights
    return gau.unit_paper(
        x, mask, bias, positions, theta, **weights, length=length, rotate=rope.rotate_half_split, kernel=kernel
    )


# Against other implementations


@pytest.mark.parametrize("name", lucidrains.GAU)
def test_paper_block_equals_flash_pytorch(name):
    golden = collection.load("flash_pytorch", name)
    block = lucidrains.gau(SPEC, np.asarray, golden, name)
    np.testing.assert_allclose(block, golden["y"], rtol=0, atol=1e-13 * np.abs(golden["y"]).max())
    # Gradients are asked of torchimpl.
    assert golden.left == {"grad_x", "grad_y"}


@pytest.mark.parametrize("name", lucidrains.GAU)
def test_flash_pytorchs_buckets_are_t5s(name):
    table = collection.load("flash_pytorch", name)["rel_pos_bucket"]
    np.testing.assert_array_equal(lucidrains.bucket(len(table), causal="causal" in name), table)


def test_unit_and_post_norm_block_equal_bert4keras():
    golden = np.load(GOLDEN / "b4k_attention" / "gau_alpha_layer0.npz")
    weights = {name: golden[name] for name in ("w_in", "gamma_q", "gamma_k", "w_out")}
    weights |= dict.fromkeys(("b_in", "beta_q", "beta_k", "b_out"))
    arrays = (golden["x"], attention.key_mask(golden["valid"]), None, np.arange(26), rope.frequencies(16, base=1e4))
    functions = {"rotate": rope.rotate_interleaved, "kernel": KERNELS["softmax_plus"]}
    np.testing.assert_allclose(gau.unit(*arrays, **weights, **functions), golden["unit"], rtol=0, atol=1e-13)
    block = gau.block_post_norm(*arrays, **weights, **functions, epsilon=1e-7)
    np.testing.assert_allclose(block, golden["block"], rtol=0, atol=1e-13)
    # Row lengths 18 < 512 make the factor visible.
    plain = gau.unit(*arrays, **weights, rotate=rope.rotate_interleaved, kernel=ak.softmax)
    assert np.abs(plain - golden["unit"]).max() > 1e-3


def silu(number):
    return number / (1 + math.exp(-number))


def dense(token, w, b):
    return [sum(t * w[i, c] for i, t in enumerate(token)) + b[c] for c in range(w.shape[1])]


def turn(vector, position, base=100.0):
    turned = [complex(vector[2 * i], vector[2 * i + 1]) for i in range(len(vector) // 2)]
    return [z * cmath.exp(1j * position * base ** (-2 * i / len(vector))) for i, z in enumerate(turned)]


def product(q, k):
    return sum((a * b.conjugate()).real for a, b in zip(q, k, strict=True))


def test_unit_equals_plain_loops():
    w, x, valid, positions = weights_of(), numbers(3, 5, seed=8), [1, 0, 1], [4, 0, 9]
    bias = numbers(3, 3, seed=5)
    whole = [[silu(c) for c in dense(token, w["w_in"], w["b_in"])] for token in x]
    u, v, z = ([row[a:b] for row in whole] for a, b in ((0, 7), (7, 14), (14, 18)))
    expected = []
    for n in range(3):
        mixed = [0.0] * 7
        for m in range(3):
            q = turn([g * t + b for g, t, b in zip(w["gamma_q"], z[n], w["beta_q"], strict=True)], positions[n])
            k = turn([g * t + b for g, t, b in zip(w["gamma_k"], z[m], w["beta_k"], strict=True)], positions[m])
            weight = max(product(q, k) / 2 + bias[n, m], 0) ** 2 / 2 * valid[m]
            mixed = [a + weight * b for a, b in zip(mixed, v[m], strict=True)]
        expected.append(dense([a * b for a, b in zip(u[n], mixed, strict=True)], w["w_out"], w["b_out"]))
    got = unit(x, bits([1, 0, 1]), bias, np.array(positions))
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_unit_cross_equals_plain_loops():
    w, x, y, other = cross_weights_of(), numbers(2, 5), numbers(3, 3, seed=1), numbers(3, 2, seed=2)
    bias, positions_q, positions_k = numbers(2, 3, seed=3), [5, 2], [0, 11, 3]
    whole = [[silu(c) for c in dense(token, w["w_in"], w["b_in"])] for token in x]
    expected = []
    for n in range(2):
        logits = []
        for m in range(3):
            k = [silu(c) for c in dense(y[m], w["w_k"], w["b_k"])]
            logits.append(product(turn(whole[n][7:], positions_q[n]), turn(k, positions_k[m])) / 2 + bias[n, m])
        share = [math.exp(t) / sum(map(math.exp, logits)) for t in logits]
        values = [[silu(c) for c in dense(token, w["w_v"], w["b_v"])] for token in other]
        mixed = [sum(a * value[j] for a, value in zip(share, values, strict=True)) for j in range(7)]
        expected.append(dense([a * b for a, b in zip(whole[n][:7], mixed, strict=True)], w["w_out"], w["b_out"]))
    got = gau.unit_cross(
        x, y, other, None, bias, np.array(positions_q), np.array(positions_k), rope.frequencies(4, base=100.0), **w,
        rotate=rope.rotate_interleaved, kernel=ak.softmax,
    )  # fmt: skip
    np.testing.assert_allclose(got, expected, rtol=1e-12)


# Parts


def test_parts_are_gate_value_shared_all_activated():
    # W_in is a selection: the columns of x itself, so every part shows where it was cut.
    x = np.array([[[-1.0, 0.0, 2.0]]])
    w_in = np.eye(3)[:, [0, 0, 2, 2, 1, 0, 2]]
    got = gau.parts(x, w_in, None, key_width=3)
    low, high = -1 / (1 + math.e), 2 / (1 + math.exp(-2))
    np.testing.assert_allclose(got.gate, [[[low, low]]], rtol=1e-15)
    np.testing.assert_allclose(got.value, [[[high, high]]], rtol=1e-15)
    np.testing.assert_allclose(got.shared, [[[0, low, high]]], rtol=1e-15)


def test_scale_offset_by_hand():
    z, gamma, beta = np.array([[1.0, -2.0], [3.0, 0.0]]), np.array([10.0, 100.0]), np.array([0.5, 7.0])
    assert gau.scale_offset(z, gamma, beta).tolist() == [[10.5, -193.0], [30.5, 7.0]]
    assert gau.scale_offset(z, gamma, None).tolist() == [[10.0, -200.0], [30.0, 0.0]]


# How the two forms differ


def test_su_and_paper_differ_by_the_length_and_the_root_only():
    # relu(q·k/length)² against relu(q·k/√s)²/n: equal at n = length = s = 4 but for the factor 1/16 against 1/(4·4).
    x = numbers(2, 4, 5)
    np.testing.assert_allclose(unit_paper(x, length=4), unit(x), rtol=1e-12)
    # In general the mixed part scales by s n / length².
    weights = weights_of(bias=False)
    np.testing.assert_allclose(unit_paper(x, length=8, weights=weights), unit(x, weights=weights) / 4, rtol=1e-12)


def test_the_bias_is_added_after_the_division():
    # gamma_q = 0 leaves the bias alone: weights 9 and relu(9)² / 3 whatever the length or the width.
    weights = weights_of(bias=False) | {"gamma_q": np.zeros(4)}
    x, bias = numbers(3, 5), np.full((3, 3), 3.0)
    u, v, _ = gau.parts(x, weights["w_in"], None, key_width=4)
    expected = 9 * (u * v.sum(axis=0)) @ weights["w_out"]
    np.testing.assert_allclose(unit_paper(x, bias=bias, weights=weights, length=512), expected, rtol=1e-12)
    np.testing.assert_allclose(unit(x, bias=bias, weights=weights), expected / 3, rtol=1e-12)


def test_the_layout_changes_nothing_once_the_weights_are_permuted():
    x, w, order = numbers(2, 6, 5), weights_of(), [0, 2, 1, 3]
    columns = np.r_[0:14, 14 + np.array(order)]
    moved = w | {name: w[name][order] for name in ("gamma_q", "beta_q", "gamma_k", "beta_k")}
    moved |= {"w_in": w["w_in"][:, columns], "b_in": w["b_in"][columns]}
    theta = rope.frequencies(4, base=100.0)
    arrays = (x, None, None, np.arange(6), theta)
    expected = gau.unit(*arrays, **w, rotate=rope.rotate_interleaved, kernel=ak.softmax)
    got = gau.unit(*arrays, **moved, rotate=rope.rotate_half_split, kernel=ak.softmax)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert np.abs(gau.unit(*arrays, **w, rotate=rope.rotate_half_split, kernel=ak.softmax) - expected).max() > 1e-4


def test_norms_stand_after_the_sum_or_before_the_unit():
    x, w, theta = numbers(2, 3, 5), weights_of(), rope.frequencies(4, base=100.0)
    arrays = (x, None, None, np.arange(3), theta)
    post = gau.block_post_norm(*arrays, **w, rotate=rope.rotate_interleaved, kernel=ak.softmax, epsilon=0.25)
    total = x + unit(x, positions=np.arange(3), kernel=ak.softmax)
    np.testing.assert_allclose(post, total / np.sqrt((total**2).mean(-1, keepdims=True) + 0.25), rtol=1e-12)
    pre = gau.block_pre_norm(
        *arrays, **w, length=8, rotate=rope.rotate_half_split, kernel=BARE, norm=lambda t: 2 * t
    )  # fmt: skip
    np.testing.assert_allclose(pre, x + unit_paper(2 * x, positions=np.arange(3)), rtol=1e-12)


# Laws


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("form", [unit, unit_paper])
@given(left=st.integers(0, 3), right=st.integers(0, 3), shift=st.integers(-50, 50))
@settings(max_examples=8)
def test_padding_on_either_side_and_a_shift_of_positions_change_nothing(form, kernel, left, right, shift):
    x = numbers(2, 4, 5)
    expected = form(x, positions=np.arange(4), kernel=kernel)
    padded = np.concatenate([np.full((2, left, 5), 1e3), x, np.full((2, right, 5), -1e3)], axis=1)
    valid = np.zeros((2, left + 4 + right), dtype=bool)
    valid[:, left : left + 4] = True
    positions = attention.positions_from_mask(valid) + shift
    got = form(padded, attention.key_mask(valid), positions=positions, kernel=kernel)
    np.testing.assert_allclose(got[:, left : left + 4], expected, rtol=1e-9, atol=1e-12)


def test_without_positions_tokens_may_be_permuted():
    x, order = numbers(2, 5, 5), [3, 0, 4, 1, 2]
    np.testing.assert_allclose(unit(x[:, order]), unit(x)[:, order], rtol=1e-12)
    assert np.abs(unit(x[:, order], positions=np.arange(5)) - unit(x, positions=np.arange(5))[:, order]).max() > 1e-3


def test_weights_of_one_make_it_a_gated_linear_unit():
    def identity(scores, mask):
        return np.broadcast_to(np.eye(scores.shape[-1]), scores.shape)

    x, w = numbers(2, 3, 5), weights_of()
    u, v, _ = gau.parts(x, w["w_in"], w["b_in"], key_width=4)
    np.testing.assert_allclose(unit(x, kernel=identity), (u * v) @ w["w_out"] + w["b_out"], rtol=1e-12)


def test_queries_that_see_nothing_get_the_output_bias():
    mask = bits([0, 0, 0], [1, 0, 1], [1, 1, 1])
    got = unit(numbers(3, 5), mask)
    np.testing.assert_array_equal(got[0], weights_of()["b_out"])
    assert not unit(numbers(3, 5), mask, weights=weights_of(bias=False))[0].any()


@pytest.mark.parametrize("form", [unit, unit_paper])
def test_a_causal_future_changes_nothing_before_it(form):
    x = numbers(2, 6, 5)
    changed = x.copy()
    changed[:, 4] += 3
    before, after = (form(t, attention.causal_mask(6, 6), positions=np.arange(6)) for t in (x, changed))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(before[:, 4:] - after[:, 4:]).max() > 1e-3


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (0, 3, 5), (1, 5)])
@pytest.mark.parametrize("form", [unit, unit_paper])
def test_units_of_no_tokens_no_batch_and_one_token(form, shape):
    got = form(np.ones(shape), positions=np.arange(shape[-2]))
    assert got.shape == shape
    assert np.isfinite(got).all()


def test_arguments_are_left_alone():
    x, w = numbers(2, 3, 5), weights_of()
    before = {name: value.copy() for name, value in w.items()} | {"x": x.copy()}
    unit(x, bias=np.zeros((3, 3)), positions=np.arange(3), weights=w)
    for name, value in before.items():
        np.testing.assert_array_equal(value, w.get(name, x))


# Errors


def call(x=(2, 3, 5), mask=None, bias=None, positions=None, form=unit, **changes):
    weights = weights_of() | {name: np.zeros(shape) for name, shape in changes.items()}
    mask = None if mask is None else np.ones(mask, dtype=bool)
    bias, positions = (None if shape is None else np.zeros(shape) for shape in (bias, positions))
    return form(np.zeros(x), mask, bias, positions, weights=weights)


@pytest.mark.parametrize("form", [unit, unit_paper])
@pytest.mark.parametrize(
    "changes",
    [
        {"x": (2, 3, 6)}, {"w_in": (5, 17), "b_in": (17,)}, {"w_in": (5, 3), "b_in": (3,)}, {"b_in": (17,)},
        {"gamma_k": (5,)}, {"beta_q": (1,)}, {"beta_k": (3,)}, {"w_out": (6, 5)}, {"b_out": (1,)},
        {"mask": (2, 3)}, {"mask": (1, 3)}, {"mask": (2, 3, 4)}, {"mask": (3, 3, 3)}, {"mask": (3,)},
        {"bias": (4,)}, {"bias": (2, 3, 3, 3)}, {"bias": (3, 3, 3)}, {"positions": (4,)}, {"positions": (1, 2, 3)},
    ],
)  # fmt: skip
def test_units_refuse_shapes_that_do_not_fit(form, changes):
    with pytest.raises(ShapeError, match="expected"):
        call(form=form, **changes)


def test_units_refuse_an_odd_rotary_width():
    # 2e + s = 17 with s = 3 is a unit, but three features are no pairs.
    odd = {"w_in": (5, 17), "b_in": (17,), "gamma_q": (3,), "beta_q": (3,), "gamma_k": (3,), "beta_k": (3,)}
    assert call(**odd).shape == (2, 3, 5)
    with pytest.raises(ShapeError):
        call(**odd, positions=(3,))


def test_units_refuse_values_outside_their_domain():
    x = numbers(3, 5)
    with pytest.raises(DomainError, match="x must be finite"):
        unit(x * np.nan)
    with pytest.raises(DomainError, match=r"gau.unit: bias must be finite"):
        unit(x, bias=np.full((3, 3), -np.inf))
    with pytest.raises(DomainError, match=r"gau.unit: mask must be boolean"):
        unit(x, np.ones((3, 3)))
    with pytest.raises(DomainError, match="length >= 1, received length=0"):
        unit_paper(x, length=0)
    with pytest.raises(DomainError, match="key_width >= 1"):
        gau.parts(x, np.ones((5, 4)), None, key_width=0)
    with pytest.raises(DomainError, match="frequencies for positions"):
        gau.unit(x, None, None, np.arange(3), None, **weights_of(), rotate=rope.rotate_interleaved, kernel=ak.softmax)
    with pytest.raises(DomainError, match="epsilon"):
        gau.block_post_norm(
            x, None, None, None, None, **weights_of(), rotate=rope.rotate_interleaved, kernel=ak.softmax, epsilon=-1.0
        )


def test_blocks_refuse_a_unit_that_ends_in_another_width():
    weights = weights_of() | {"w_out": np.zeros((7, 1)), "b_out": np.zeros(1)}
    functions = {"rotate": rope.rotate_interleaved, "kernel": BARE}
    with pytest.raises(ShapeError, match="width of x"):
        gau.block_post_norm(np.zeros((3, 5)), None, None, None, None, **weights, **functions, epsilon=1e-12)
    with pytest.raises(ShapeError, match="width of x"):
        gau.block_pre_norm(np.zeros((3, 5)), None, None, None, None, **weights, **functions, length=8, norm=lambda t: t)


@pytest.mark.parametrize(
    "changes",
    [
        {"w_in": (5, 12), "b_in": (12,)}, {"w_k": (3, 5), "b_k": (5,)}, {"w_v": (2, 8), "b_v": (8,)},
        {"values_from": (4, 2)}, {"keys_from": (2, 3, 3)}, {"x": (2, 2, 5)}, {"mask": (2, 2)}, {"bias": (3, 3)},
        {"positions_q": (3,)}, {"positions_k": (2,)},
    ],
)  # fmt: skip
def test_unit_cross_refuses_shapes_that_do_not_fit(changes):
    shapes = {"x": (2, 5), "keys_from": (3, 3), "values_from": (3, 2), "bias": (2, 3), "positions_q": (2,)}
    shapes |= {"positions_k": (3,)}
    weights = cross_weights_of() | {name: np.zeros(s) for name, s in changes.items() if name[:2] in ("w_", "b_")}
    arrays = {name: np.zeros(changes.get(name, shape)) for name, shape in shapes.items()}
    mask = np.ones(changes.get("mask", (2, 3)), dtype=bool)
    with pytest.raises(ShapeError, match="expected"):
        gau.unit_cross(**arrays, mask=mask, frequencies=np.ones(2), **weights,
                       rotate=rope.rotate_interleaved, kernel=ak.softmax)  # fmt: skip
