"""The references of gau by hand, its laws on right and wrong implementations, its bounds."""

import functools
import math

import numpy as np
import pytest

from conformance import vectors, verdict
from conformance.adapters import spec
from conformance.budget import Arithmetic, Profile, round_to
from conformance.case import OPERATORS
from conformance.ops import gau

FLOAT32 = Profile("float32")
A = Arithmetic(FLOAT32, digits=True)


@functools.cache
def vector(identifier):
    return vectors.build(next(c for c in gau.CASES if c.id == identifier))


def mutant(op, bug):
    return next(m.call for m in (*gau.MUTANTS, *gau.MUSEUM) if m.op == op and m.bug.startswith(bug))


def holds(function, name, op, profile=FLOAT32):
    law = next(entry for entry in gau.LAWS if entry.name == name and op in entry.operators)
    # Mutants divide by zero where they are wrong.
    with np.errstate(all="ignore"):
        return not verdict.check_law("mine", function, law, op, profile, 25).failed


def silu(x):
    return x / (1 + math.exp(-x))


# References.


def exact(**arrays):
    return {name: A.exact(np.array(value, dtype=float)) for name, value in arrays.items()}


# One feature x, columns u = x, v = 2x and z = (x, 0): s = 2, so the scores are γ_q γ_k silu(x_n) silu(x_m) / √2.
SMALL = exact(w_in=[[1, 2, 1, 0]], gamma_q=[3, 1], gamma_k=[1, 1], w_out=[[1]]) | dict.fromkeys(
    ("b_in", "beta_q", "beta_k", "b_out")
)
OPTIONS = {"mask": None, "bias": None, "positions": None, "layout": "interleaved", "base": 100.0}


def test_reference_of_both_forms_by_hand():
    x = A.exact(np.array([[[1.0], [2.0]]]))
    z, v = [silu(1.0), silu(2.0)], [silu(2.0), silu(4.0)]
    squares = [[(3 * z[n] * z[m]) ** 2 for m in range(2)] for n in range(2)]
    mixed = [z[n] * sum(squares[n][m] * v[m] for m in range(2)) for n in range(2)]
    su = gau.unit(A, x=x, **SMALL, **OPTIONS, kernel="squared_relu_visible")
    np.testing.assert_allclose(su.value.ravel(), [t / (2 * 2) for t in mixed], rtol=1e-14)
    paper = gau.unit_paper(A, length=8, x=x, **SMALL, **OPTIONS, kernel="squared_relu_1")
    np.testing.assert_allclose(paper.value.ravel(), [t / 64 for t in mixed], rtol=1e-14)


def test_reference_of_the_bias_is_not_divided():
    x, bias = A.exact(np.array([[[1.0]]])), A.exact(np.array([[5.0]]))
    still = SMALL | exact(gamma_q=[0, 0])
    options = OPTIONS | {"bias": bias, "kernel": "squared_relu_1"}
    for out in (gau.unit(A, x=x, **still, **options), gau.unit_paper(A, length=8, x=x, **still, **options)):
        np.testing.assert_allclose(out.value.ravel(), [25 * silu(1.0) * silu(2.0)], rtol=1e-14)


def test_reference_of_the_blocks_by_hand():
    x = A.exact(np.array([[[3.0, 4.0]]]))
    weights = exact(w_in=np.zeros((2, 4)), gamma_q=[1, 1], gamma_k=[1, 1], w_out=np.zeros((1, 2)), b_out=[1, 0])
    weights |= dict.fromkeys(("b_in", "beta_q", "beta_k"))
    post = gau.block_post_norm(A, x, 0.0, **weights, **OPTIONS, kernel="softmax")
    np.testing.assert_allclose(post.value.ravel(), [1, 1], rtol=1e-14)
    norm = exact(norm_scale=[1, 1], norm_bias=[0, 0])
    pre = gau.block_pre_norm(A, x, **norm, epsilon=1e-5, length=1, **weights, **OPTIONS, kernel="softmax")
    np.testing.assert_allclose(pre.value.ravel(), [4, 4], rtol=1e-14)


def test_reference_of_parts_cuts_u_v_z():
    x = A.exact(np.array([[1.0]]))
    u, v, z = gau.parts(A, x, A.exact(np.array([[1.0, 2, 3, 4, 5]])), None, 1)
    np.testing.assert_allclose(u.value, [[silu(1.0), silu(2.0)]], rtol=1e-15)
    np.testing.assert_allclose(v.value, [[silu(3.0), silu(4.0)]], rtol=1e-15)
    np.testing.assert_allclose(z.value, [[silu(5.0)]], rtol=1e-15)


def test_reference_of_the_cross_unit_by_hand():
    # One key, softmax: the gate of x times the value, whatever the scores.
    x, y, other = (A.exact(np.array([[[value]]])) for value in (1.0, 2.0, 3.0))
    weights = exact(w_in=[[1, 1, 1]], w_k=[[1, 1]], w_v=[[2]], w_out=[[10]], b_out=[1])
    weights |= dict.fromkeys(("b_in", "b_k", "b_v"))
    arrays = {"mask": None, "bias": None, "positions_q": None, "positions_k": None}
    options = {"layout": "interleaved", "base": 100.0, "kernel": "softmax"}
    out = gau.unit_cross(A, x, y, other, **arrays, **weights, **options)
    np.testing.assert_allclose(out.value.ravel(), [10 * silu(1.0) * silu(6.0) + 1], rtol=1e-14)


# Laws.


@pytest.mark.parametrize(
    ("name", "op", "bug"),
    [
        ("one_visible_key_joins_gate_and_value", "unit", "columns in the order v, u, z"),
        ("one_visible_key_joins_gate_and_value", "unit", "the gate multiplies the values before"),
        ("opposite_queries_add_up_to_the_square", "unit", "gamma after the rotation"),
        ("opposite_queries_add_up_to_the_square", "unit", "base 10000 whatever is asked"),
        ("padding_stands_on_either_side", "unit", "padding counts in the length"),
        ("opposite_queries_add_up_to_the_square", "unit_paper", "the bias is divided by the length"),
        ("the_future_changes_nothing", "unit_paper", "the causal mask is applied to scores"),
        ("squared_complex_products_mix_the_values", "unit_cross", "no division by √s"),
        ("rows_come_out_with_unit_mean_square", "block_post_norm", "the norm before the unit"),
        ("the_output_is_affine_in_its_projection", "block_pre_norm", "the residual path is normalised"),
        ("parts_are_selected_features", "parts", "order v, u, z"),
        ("ones_show_scale_and_offset", "scale_offset", "1 + gamma"),
    ],
)
def test_laws_hold_for_the_specification_and_fail_for_a_mutant(name, op, bug):
    op = f"gau.{op}"
    assert holds(OPERATORS()[op].call, name, op, Profile("float64", "strict", "A64"))
    assert not holds(mutant(op, bug), name, op)


# Bounds.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", ["unit/plain", "unit_paper/plain", "block_post_norm/plain"])
def test_a_final_rounding_uses_most_of_a_16_bit_bound(case, dtype):
    found = vector(f"gau.{case}")
    ratio = verdict.compare([round_to(found.expected["y"], dtype)], found, Profile(dtype), exact=False).ratio
    assert 0.2 < ratio <= 1


def test_float32_arithmetic_passes_and_a_rounded_projection_does_not():
    found = vector("gau.unit/dense")
    member = next(i for i in spec.implementations() if i.name == "spec float32 reversed")
    assert verdict.judge("mine", member.functions[found.case.op], found, FLOAT32).outcome == "pass"
    rounded = {**found.case.arguments, "x": round_to(found.case["x"], "bfloat16")}
    out = OPERATORS()["gau.unit"].call(**rounded)
    assert not verdict.compare([out], found, FLOAT32, exact=False).ok


def test_a_wrong_unit_is_named():
    found = vector("gau.unit/no-bias")
    wrong = verdict.judge("mine", mutant("gau.unit", "divided by s, not"), found, Profile("float64", "strict", "A64"))
    assert wrong.outcome == "logic"
    assert "divided by s, not by its root" in [m.bug for m, _ in verdict.diagnose([(wrong, found)])]
