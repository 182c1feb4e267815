"""The judge of linear attention: its reference by hand, its laws on right and wrong implementations, its bounds."""

import math

import numpy as np
import pytest

from conformance.budget import Profile, round_to
from conformance.case import OPERATORS, Case, cases, reference
from conformance.law import LawFailed
from conformance.ops import linear_attention as judged
from conformance.vectors import build
from conformance.verdict import check_law, judge

CAUSAL = ("recurrent", "quadratic", "chunked")
LAWS = {law.name: law for law in judged.LAWS}
WRONG = {(m.op, m.bug): m.call for m in (*judged.MUTANTS, *judged.MUSEUM)}


def column(*values: float) -> np.ndarray:
    """One sequence, one head, one feature."""
    return np.array(values, float).reshape(1, -1, 1, 1)


def expected(function: str, **changes) -> list[np.ndarray]:
    """The reference of three tokens with q = 1, 2, 3, k = 1, 1, 2 and v = 4, 5, 6, at 50 digits."""
    arguments = {"q": column(1, 2, 3), "k": column(1, 1, 2), "v": column(4, 5, 6), "scale": 0.5} | changes
    if function == "chunked":
        arguments["chunk_size"] = 2
    balls = reference(Case(f"linear_attention.{function}", "by-hand", arguments), digits=True)
    return [ball.value for ball in balls.values()]


@pytest.mark.parametrize("form", CAUSAL)
def test_reference_of_three_tokens(form):
    """States 4, 9, 21; half of q S is read."""
    output, state = expected(form)
    np.testing.assert_array_equal(output, column(2, 9, 31.5))
    np.testing.assert_array_equal(state, [[[[21.0]]]])


@pytest.mark.parametrize("form", CAUSAL)
def test_reference_with_decay_and_initial_state(form):
    """8, halved before each token is added: 4 + 4 = 8, 4 + 5 = 9, 4.5 + 12 = 16.5."""
    changes = {"log_decay": np.full((1, 3, 1), math.log(0.5)), "initial_state": np.full((1, 1, 1, 1), 8.0)}
    output, state = expected(form, scale=1.0, **changes)
    np.testing.assert_allclose(output, column(8, 18, 49.5), rtol=1e-15)
    np.testing.assert_allclose(state, [[[[16.5]]]], rtol=1e-15)


@pytest.mark.parametrize("form", CAUSAL)
def test_reference_with_a_masked_token(form):
    """The second token neither adds nor decays: 2, then 1 + 12 = 13; its own query reads 2."""
    halves = np.full((1, 3, 1), math.log(0.5))
    changes = {"mask": np.array([[True, False, True]]), "log_decay": halves, "v": column(2, 5, 6)}
    output, state = expected(form, scale=1.0, **changes)
    np.testing.assert_allclose(output, column(2, 4, 39), rtol=1e-15)
    np.testing.assert_allclose(state, [[[[13.0]]]], rtol=1e-15)


@pytest.mark.parametrize("form", CAUSAL)
def test_reference_of_packed_documents(form):
    """One token from 1: 1 + 4 = 5. None from 7. Two from 0: 5 and 17."""
    changes = {"cu_seqlens": np.array([0, 1, 1, 3]), "initial_state": np.array([1.0, 7, 0]).reshape(3, 1, 1, 1)}
    output, state = expected(form, **changes)
    np.testing.assert_array_equal(output, column(2.5, 5, 25.5))
    np.testing.assert_array_equal(state.ravel(), [5, 7, 17])


def test_reference_without_causality():
    output, state = expected("bidirectional")
    np.testing.assert_array_equal(output, column(10.5, 21, 31.5))
    np.testing.assert_array_equal(state, [[[[21.0]]]])


def test_reference_of_the_quotient():
    """Sums of keys 1, 2, 4: 2 / (0.5 + 0.5), 9 / (2 + 0.5), 31.5 / (6 + 0.5); with nothing seen, zero."""
    output, state, normaliser = expected("normalised", form="recurrent", epsilon=0.5)
    np.testing.assert_allclose(output, column(2, 3.6, 31.5 / 6.5), rtol=1e-15)
    np.testing.assert_array_equal(state, [[[[21.0]]]])
    np.testing.assert_array_equal(normaliser, [[[4.0]]])
    hidden = {"mask": np.array([[False, False, True]]), "epsilon": 0.0}
    output, _, normaliser = expected("normalised", form="quadratic", **hidden)
    np.testing.assert_array_equal(output, column(0, 0, 6))
    np.testing.assert_array_equal(normaliser, [[[2.0]]])


@pytest.mark.parametrize("case", cases(["linear_attention"]), ids=lambda case: case.id.partition(".")[2])
def test_specification_stands_within_the_float64_bound(case):
    results = OPERATORS()[case.op].call(**case.arguments)
    for value, ball in zip(results, reference(case).values(), strict=True):
        assert value.shape == ball.shape
        assert (np.abs(value - ball.value) <= ball.rad).all()


def test_exact_cases_fit_eight_bits():
    """Expected values of exact cases are exact in bfloat16, so that one rounding anywhere shows."""
    exact = [case for case in cases(["linear_attention"]) if case.exact]
    assert len(exact) >= 31
    for case in exact:
        for ball in reference(case).values():
            np.testing.assert_array_equal(round_to(ball.value, "bfloat16"), ball.value)


@pytest.mark.parametrize("op", [operator.name for operator in judged.OPERATORS])
def test_laws_hold_for_the_specification(op):
    for law in judged.LAWS:
        if op in law.operators:
            verdict = check_law("spec", OPERATORS()[op].call, law, op, Profile("float64", "strict", "A64"), 8)
            assert not verdict.failed, verdict.message


@pytest.mark.parametrize(
    ("law", "form", "bug"),
    [
        ("impulse_response", "recurrent", "own token not seen"),
        ("impulse_response", "recurrent", "decay after the token is added"),
        ("initial_state_response", "recurrent", "initial state decays one token late"),
        ("split_and_carry", "chunked", "initial state ignored"),
        ("split_and_carry", "normalised", "initial normaliser ignored"),
        ("packed_equals_separate", "recurrent", "cu_seqlens ignored"),
        ("documents_are_isolated", "recurrent", "state of the last row leaks into the next"),
        ("past_is_untouched", "chunked", "own chunk seen whole"),
        ("masked_tokens_are_ignored", "normalised", "padded keys stay in the normaliser"),
        ("masked_tokens_may_be_dropped", "recurrent", "masked tokens decay the state"),
        ("last_row_reads_the_state", "recurrent", "state before the last token"),
        ("chunk_size_is_free", "chunked", "only the previous chunk is carried"),
        ("constant_values_come_back", "normalised", "own token missing from the normaliser"),
        ("denominator_is_its_own", "normalised", "denominator from the rotated q and k"),
    ],
)
def test_every_law_can_fail(law, form, bug):
    op = f"linear_attention.{form}"
    verdict = check_law("wrong", WRONG[op, bug], LAWS[law], op, Profile("float32"), 40)
    assert verdict.outcome == "logic", verdict.message


def test_a_law_names_the_element():
    case = next(c for c in cases(["linear_attention.recurrent"]) if c.name == "grid")
    wrong = WRONG["linear_attention.recurrent", "next token seen"]
    with pytest.raises(LawFailed, match=r"linear_attention\.recurrent law past_is_untouched .*out\[[01], 2, "):
        LAWS["past_is_untouched"].check(wrong, case)


@pytest.mark.parametrize("form", [*CAUSAL, "normalised"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_bounds_are_tight_and_wide_enough(form, dtype):
    """A float64 result rounded once passes everywhere, and at 16 bits it comes near the bound."""
    worst = 0.0
    for case in cases([f"linear_attention.{form}"]):
        if dtype not in case.dtypes or case.ill_conditioned:
            continue
        results = OPERATORS()[case.op].call(**case.arguments)
        for value, ball in zip(results, reference(case.under(Profile(dtype))).values(), strict=True):
            error = np.abs(round_to(value, dtype) - ball.value)
            assert (error <= ball.rad).all(), case.id
            worst = max(worst, float((error / np.where(ball.rad > 0, ball.rad, 1.0)).max(initial=0)))
    assert worst <= 1
    if dtype != "float32":
        assert worst > 0.2


def test_a_thousandth_of_the_state_shows_at_bfloat16():
    """Exact cases see what no tolerance at 8 bits can."""
    vector = build(next(c for c in cases(["linear_attention.chunked"]) if c.name == "exact-cancelling"))
    wrong = WRONG["linear_attention.chunked", "state loses a thousandth"]
    verdict = judge("wrong", lambda **a: wrong(**{k: _wide(v) for k, v in a.items()}), vector, Profile("bfloat16"))
    assert verdict.failed


def _wide(value):
    return value.astype(np.float64) if isinstance(value, np.ndarray) and value.dtype.kind not in "biu" else value


def test_vanishing_denominators_are_unverifiable():
    case = next(c for c in cases(["linear_attention.normalised"]) if c.ill_conditioned)
    balls = reference(case)
    assert np.isinf(balls["output"].rad).all()
    assert np.isfinite(balls["state"].rad).all()
    assert np.isfinite(balls["normaliser"].rad).all()
