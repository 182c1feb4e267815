"""The references of attention by hand, its laws on right and wrong implementations, its bounds."""

import functools

import numpy as np
import pytest

from conformance import vectors, verdict
from conformance.adapters import spec
from conformance.budget import Arithmetic, Profile, round_to
from conformance.case import OPERATORS
from conformance.generate import Draw
from conformance.ops import attention

FLOAT32 = Profile("float32")
A = Arithmetic(FLOAT32, digits=True)


@functools.cache
def vector(identifier):
    return vectors.build(next(c for c in attention.CASES if c.id == identifier))


def mutant(op, bug):
    every = (*attention.MUTANTS, *attention.MUSEUM)
    return next(m.call for m in every if m.op == op and m.bug.startswith(bug))


def holds(function, name, op, profile=FLOAT32):
    law = next(entry for entry in attention.LAWS if entry.name == name and op in entry.operators)
    # Mutants divide by zero where they are wrong.
    with np.errstate(all="ignore"):
        return not verdict.check_law("mine", function, law, op, profile, 25).failed


# References.


def test_reference_of_attend_by_hand():
    # Two query heads share one key head; scores 2 and -1 after the scale, squares 4 and 0 (a masked 9).
    q = A.exact(np.array([[[[2.0], [-1.0]]]]))
    k = A.exact(np.array([[[[2.0]], [[-1.0]], [[3.0]]]]))
    v = A.exact(np.array([[[[1.0, 10]], [[2, 20]], [[4, 40]]]]))
    mask = np.array([True, True, False]).reshape(1, 1, 1, 3)
    out = attention.attend(A, q, k, v, mask, "squared_relu_1", 0.5)
    # Head 0: scores 2, -1: 4 v0. Head 1: scores -1, 1/2: v1 / 4.
    assert out.value.tolist() == [[[[4, 40], [0.5, 5]]]]


def test_reference_of_grouped_heads_shares_neighbours():
    v = A.exact(np.arange(2.0).reshape(1, 1, 2, 1))
    ones = A.exact(np.ones((1, 1, 6, 1))), A.exact(np.ones((1, 1, 2, 1)))
    out = attention.attend(A, *ones, v, None, "softmax", 1.0)
    assert out.value.ravel().tolist() == [0, 0, 0, 1, 1, 1]


def test_reference_of_rotated_values_by_hand():
    q, k = A.exact(np.zeros((1, 1, 1, 2))), A.exact(np.zeros((1, 2, 1, 2)))
    v = A.exact(np.array([[[[1.0, 0.0]], [[0.0, 2.0]]]]))
    out = attention.attend_rotated_values(A, q, k, v, None, np.array([0, 3]), "interleaved", 10000.0, "softmax", 1.0)
    np.testing.assert_allclose(out.value.ravel(), [0.5 - np.sin(3), np.cos(3)], rtol=1e-14)


def test_reference_of_the_layer_takes_columns_head_by_head():
    # One token: the output is its value; two heads of width 1 are swapped by W_o.
    x = A.exact(np.array([[[3.0, 5.0]]]))
    eye, swap = A.exact(np.eye(2)), A.exact(np.array([[0.0, 1.0], [1.0, 0.0]]))
    options = {"heads": 2, "layout": "interleaved", "base": 100.0, "kernel": "softmax"}
    b_o = A.exact(np.array([10.0, 20.0]))
    out = attention.cross_attention(
        A, x, x, None, None, None, eye, None, eye, None, eye, None, swap, b_o, **options
    )  # fmt: skip
    assert out.value.tolist() == [[[15.0, 23.0]]]


def test_references_of_masks_and_positions_by_hand():
    assert attention.causal_mask(A, 2, 3).tolist() == [[True, True, False], [True, True, True]]
    assert attention.causal_mask(A, 2, 1).tolist() == [[False], [True]]
    assert attention.unilm_mask(A, np.array([0, 0, 1])).tolist() == [[True, True, False]] * 2 + [[True] * 3]
    valid = np.array([[False, True, True, False]])
    assert attention.positions_from_mask(A, valid).tolist() == [[0, 0, 1, 1]]


# Laws.


@pytest.mark.parametrize(
    ("name", "op", "bug"),
    [
        ("repeated_key_heads_are_grouped_heads", "attend", "key heads are tiled"),
        ("masked_keys_do_not_matter", "attend", "the mask is ignored"),
        ("equal_values_come_back", "attend", "a fully masked row is the mean"),
        ("one_hot_values_show_the_weights", "attend", "the scale is 1/√d whatever is asked"),
        ("rotated_values_are_complex_products", "attend_rotated_values", "the two halves of pairs"),
        ("projection_is_affine", "project", "inputs are rounded to bfloat16"),
        ("selected_features_attend_as_complex_numbers", "multi_head_attention", "columns are feature-major"),
        ("padding_stands_on_either_side", "multi_head_attention", "positions count padding"),
        ("biases_are_weights_of_a_constant_feature", "cross_attention", "b_v is missing"),
        ("a_common_shift_of_positions_changes_nothing", "cross_attention", "values are rotated too"),
    ],
)
def test_laws_hold_for_the_specification_and_fail_for_a_mutant(name, op, bug):
    op = f"attention.{op}"
    assert holds(OPERATORS()[op].call, name, op, Profile("float64", "strict", "A64"))
    assert not holds(mutant(op, bug), name, op)


@pytest.mark.parametrize("name", ["masked_keys_do_not_matter", "padding_stands_on_either_side"])
def test_laws_hold_where_every_operation_rounds_to_bfloat16(name):
    member = next(i for i in spec.implementations() if i.name == "spec bfloat16 eager")
    op = "attention.multi_head_attention"
    assert holds(member.functions[op], name, op, member.profile)


# Bounds.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", ["attend/heads", "multi_head_attention/plain", "cross_attention/grouped"])
def test_a_final_rounding_uses_most_of_a_16_bit_bound(case, dtype):
    found = vector(f"attention.{case}")
    ratio = verdict.compare([round_to(found.expected["y"], dtype)], found, Profile(dtype), exact=False).ratio
    assert 0.2 < ratio <= 1


def test_float32_arithmetic_passes_and_rounded_keys_do_not():
    found = vector("attention.attend/dense")
    member = next(i for i in spec.implementations() if i.name == "spec float32 split")
    assert verdict.judge("mine", member.functions[found.case.op], found, FLOAT32).outcome == "pass"
    out = OPERATORS()["attention.attend"].call(**{**found.case.arguments, "k": round_to(found.case["k"], "bfloat16")})
    assert not verdict.compare([out], found, FLOAT32, exact=False).ok


def test_a_wrong_layer_is_named():
    found = vector("attention.multi_head_attention/grouped")
    function = mutant("attention.multi_head_attention", "keys are not rotated")
    wrong = verdict.judge("mine", function, found, Profile("float64", "strict", "A64"))
    assert wrong.outcome == "logic"
    assert "keys are not rotated" in [m.bug for m, _ in verdict.diagnose([(wrong, found)])]


# Arrays with radii, as models have them.


def _held(profile, arrays, radius, digits=False):
    a = Arithmetic(profile, digits)
    return a, [a.ball(x, radius * np.abs(x) + radius / 8) for x in arrays]


def _attended(q, k, v, mask, scale, keep=lambda x: x):
    shared = [h * k.shape[-2] // q.shape[-2] for h in range(q.shape[-2])]
    scores = keep(keep(np.einsum("bnhd,bmhd->bhnm", q, k[..., shared, :])) * scale)
    top = np.where(mask, scores, -np.inf).max(axis=-1, keepdims=True)
    weights = np.where(mask, keep(np.exp(keep(scores - np.where(np.isfinite(top), top, 0)))), 0)
    total = keep(weights.sum(axis=-1, keepdims=True))
    return keep(np.einsum("bhnm,bmhe->bnhe", keep(weights / np.where(total > 0, total, 1)), v[..., shared, :]))


def _corners(arrays, radii, mask, scale, name):
    """Corners of the ball: that which moves one output as far as it goes to first order, and others at random."""
    draw, (q, k, v) = Draw(name), arrays
    shared = [h * k.shape[-2] // q.shape[-2] for h in range(q.shape[-2])]
    for n, h, e in np.ndindex(q.shape[1], q.shape[2], v.shape[-1]):
        scores = np.where(mask, np.einsum("bnhd,bmhd->bhnm", q, k[..., shared, :]) * scale, -np.inf)[:, h, n]
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights = weights / weights.sum(axis=-1, keepdims=True)
        values, keys = v[:, :, shared[h], e], k[:, :, shared[h]]
        slope = scale * weights * (values - (weights * values).sum(axis=-1, keepdims=True))
        signs = [draw.ternary(*x.shape) for x in arrays]
        signs[0][:, n, h] = np.sign(np.einsum("bm,bmd->bd", slope, keys))
        signs[1][:, :, shared[h]] = np.sign(slope[..., None] * q[:, n, None, h])
        signs[2][:, :, shared[h], e] = np.sign(weights)
        for sign in (1, -1):
            # Both ends of the scores, the same end of the values: they add up.
            yield [x + sign * s * r for x, s, r in zip(arrays, signs, radii, strict=True)]
    for _ in range(10):
        yield [x + draw.ternary(*x.shape) * r for x, r in zip(arrays, radii, strict=True)]


CASES_WITH_RADII = {
    "plain": (3, 5, 2, 2, 4, 3, 0.5, 0),
    "grouped": (2, 6, 4, 2, 3, 2, -0.5, 0),
    "wide scores": (2, 5, 2, 1, 4, 2, 8.0, 0),
    "one key": (2, 1, 1, 1, 3, 2, 1.0, 0),
    "keys far from zero": (2, 5, 2, 2, 4, 2, 0.25, 8),
}


@pytest.mark.parametrize("name", CASES_WITH_RADII)
@pytest.mark.parametrize("radius", [2.0**-30, 2.0**-9, 0.03, 0.3])
def test_no_array_of_the_ball_leaves_the_bound_of_attend(name, radius):
    n, m, h, g, d, e, scale, far = CASES_WITH_RADII[name]
    draw = Draw(f"radii/{name}")
    arrays = [draw.dense(2, n, h, d), draw.dense(2, m, g, d) + far, draw.dense(2, m, g, e)]
    mask = np.ones((2, 1, n, m), bool)
    mask[1, :, :, 3:] = False
    a, balls = _held(Profile("float64", "strict", "A64"), arrays, radius)
    ball = attention.attend(a, *balls, mask, "softmax", scale)
    composed = attention.composed_attend(a, *balls, mask, "softmax", scale)
    error = np.zeros(ball.shape)
    for corner in _corners(arrays, [b.rad for b in balls], mask, scale, name):
        error = np.maximum(error, np.abs(_attended(*corner, mask, scale) - ball.value))
    assert (error <= ball.rad).all() and (ball.rad <= composed.rad).all()
    assert np.array_equal(ball.value, composed.value)
    if radius == 2.0**-9:
        assert np.median(ball.rad / composed.rad) < {"wide scores": 0.9, "one key": 1.01}.get(name, 0.7)
        assert np.median(error / ball.rad) > (0.3 if name != "wide scores" else 0.05)


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", "strict"), ("bfloat16", "eager"), ("float16", "eager")])
def test_right_attention_to_moved_arrays_stays_within(dtype, rounding):
    profile, scale = Profile(dtype, rounding), 0.5
    mask = np.tri(4, 5, 1, dtype=bool)[None, None]

    def keep(x):
        return round_to(x, profile.elementary)

    for radius in (2.0**-20, 2.0**-7, 0.1):
        draw = Draw(f"honest/{dtype}/{radius}")
        arrays = [draw.grid(2, 4, 2, 3), draw.grid(2, 5, 2, 3), draw.grid(2, 5, 2, 2)]
        a, balls = _held(profile, arrays, radius)
        ball = attention.attend(a, *balls, mask, "softmax", scale).finished()
        for corner in _corners(arrays, [b.rad for b in balls], mask, scale, dtype):
            held = [keep(c) for c in corner]
            held = [np.where(np.abs(c - b.value) <= b.rad, c, b.value) for c, b in zip(held, balls, strict=True)]
            made = round_to(_attended(*held, mask, scale, keep), dtype)
            assert (np.abs(made - ball.value) <= ball.rad).all(), radius


def test_a_query_that_is_off_moves_alike_keys_alike():
    """All keys are one: whatever the query is off by, all weights stay where they are."""
    a = Arithmetic(Profile("float64", "strict", "A64"))
    q, k = a.ball(np.ones((1, 1, 1, 2)), 0.25), a.exact(np.full((1, 4, 1, 2), 3.0))
    v = a.exact(np.arange(4.0).reshape(1, 4, 1, 1))
    ball = attention.attend(a, q, k, v, None, "softmax", 1.0)
    assert ball.value.item() == 1.5 and ball.rad.item() < 1e-12
    assert attention.composed_attend(a, q, k, v, None, "softmax", 1.0).rad.item() > 1
    # A key's own radius e moves its weight 1/4 by at most a quarter of expm1(e), the distance from the mean apart.
    k = a.ball(k.mid, np.array([0.0, 0.0, 0.0, 2.0**-20]).reshape(1, 4, 1, 1))
    moved = attention.attend(a, a.exact(q.mid), k, v, None, "softmax", 1.0)
    assert moved.rad.item() == pytest.approx(2 * 2.0**-20 / 4 * 1.5, rel=1e-5)


def test_what_moves_and_rounds_in_attend_by_hand():
    v = np.array([1.0, -1.0]).reshape(1, 2, 1, 1)
    double, single = Arithmetic(Profile("float64", "strict", "A64")), A

    def rad(a, q, k):
        return attention.attend(a, q, k, a.exact(v), None, "softmax", 1.0).rad.item()

    # Keys off by h meet a query of 3/2 at most; the mean is 0, its values 1 away.
    h, ones = 2.0**-20, np.ones((1, 2, 1, 1))
    assert rad(double, double.ball(ones[:, :1], 0.5), double.ball(ones, h)) == pytest.approx(1.5 * h, rel=1e-5)
    # Two scores of 1: 5 roundings of the product and one of the scale; 2 u times 1 + 1, 2 + 6 and two exponentials of 8
    # in the weights; a sum of two products.
    made = rad(single, single.ball(ones[:, :1], 2.0**-60), single.exact(ones))
    assert made == pytest.approx((5 + 1 + 4 + 8 + 16 + 3) * 2.0**-24, rel=1e-4)


def test_nothing_visible_stays_zero_and_what_is_lost_stays_lost():
    a = Arithmetic(FLOAT32)
    q, k, v = (a.ball(Draw(name).dense(1, 3, 2, 4), 0.01) for name in "qkv")
    mask = np.tri(3, dtype=bool) & (np.arange(3)[:, None] > 0)
    out = attention.attend(a, q, k, v, mask[None, None], "softmax", 0.5)
    assert not out.value[0, 0].any() and (out.rad[0, 0] < 1e-40).all() and (out.rad[0, 1:] > 0.005).all()
    lost = attention.attend(a, a.ball(q.mid, np.inf), k, v, mask[None, None], "softmax", 0.5)
    assert np.isinf(lost.rad[0, 2]).all()
