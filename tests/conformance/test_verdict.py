"""The judge's own judgement: what must fail fails, what is right passes."""

import sys

import numpy as np
import pytest

from conformance import vectors
from conformance.budget import Profile
from conformance.case import Case, Unsupported, families, known_reference, reference
from conformance.law import LawFailed, close
from conformance.verdict import check_law, compare, informative, judge
from refimpl.ops import norm

OP = "norm.rms_norm"
F64, F32, BF16 = Profile("float64", "strict", "A64"), Profile("float32"), Profile("bfloat16")


@pytest.fixture(scope="module")
def corpus():
    return {v.case.name: v for v in vectors.load(names=[OP])}


def right(x, epsilon):
    return norm.rms_norm(x.astype(np.float64), epsilon=epsilon).astype(x.dtype)


@pytest.mark.parametrize("profile", [F64, F32, BF16, Profile("float16")])
def test_the_right_answer_passes(corpus, profile):
    outcomes = {judge("x", right, v, profile).outcome for v in corpus.values() if profile.dtype in v.case.dtypes}
    assert outcomes == {"pass"}


def outcome(corpus, function, name="grid", profile=F32):
    return judge("x", function, corpus[name], profile)


def test_nan_anywhere_fails(corpus):
    def one_nan(x, epsilon):
        y = right(x, epsilon)
        y.flat[3] = np.nan
        return y

    assert outcome(corpus, one_nan).outcome == "logic"


def test_zeros_and_constants_fail(corpus):
    assert outcome(corpus, lambda x, epsilon: np.zeros_like(x)).outcome == "logic"
    assert outcome(corpus, lambda x, epsilon: np.full_like(x, right(x, epsilon).mean())).outcome == "logic"


def test_a_modified_input_fails(corpus):
    def in_place(x, epsilon):
        y = right(x, epsilon)
        x *= 2
        return y

    verdict = outcome(corpus, in_place)
    assert verdict.outcome == "logic" and "argument x was modified" in verdict.message


def test_a_cached_result_fails(corpus):
    kept = {}

    def cached(x, epsilon):
        return kept.setdefault("y", right(x, epsilon))

    assert outcome(corpus, cached).outcome == "pass"
    assert outcome(corpus, cached).outcome == "logic"


def test_wrong_shapes_and_counts_fail(corpus):
    assert "shape" in outcome(corpus, lambda x, epsilon: right(x, epsilon)[..., :-1]).message
    assert "2 results" in outcome(corpus, lambda x, epsilon: (right(x, epsilon),) * 2).message


def test_an_exception_is_errored_and_a_declined_case_skipped(corpus):
    def raises(x, epsilon):
        raise RuntimeError("kernel not found")

    def declines(x, epsilon):
        raise Unsupported("three axes only")

    assert outcome(corpus, raises).message == "RuntimeError: kernel not found"
    assert (outcome(corpus, declines).outcome, outcome(corpus, declines).message) == ("skipped", "three axes only")


def test_too_little_precision_is_precision_not_logic(corpus):
    """float64 claimed, float32 computed."""

    def single(x, epsilon):
        return right(x.astype(np.float32), epsilon).astype(np.float64)

    verdict = outcome(corpus, single, profile=F64)
    assert verdict.outcome == "precision" and "float32" in verdict.message


def test_one_percent_on_one_row_is_seen(corpus):
    def last_row(x, epsilon):
        y = right(x, epsilon)
        y[-1] *= y.dtype.type(1.01)
        return y

    assert outcome(corpus, last_row).outcome == "logic"


def test_exact_cases_ask_for_equality_in_sixteen_bits(corpus):
    """One unit in the last place, which the bound of an inexact case allows; float32 rounding is forgiven."""
    name = next(n for n, v in corpus.items() if v.case.exact)

    def nearly(x, epsilon):
        y = right(x, epsilon)
        return np.nextafter(y, np.array(9, y.dtype))

    def coarsely(x, epsilon):
        return right(x, epsilon) * x.dtype.type(1.001)

    assert judge("x", nearly, corpus[name], BF16).outcome == "precision"
    assert judge("x", nearly, corpus[name], F32).outcome == "pass"
    assert judge("x", coarsely, corpus[name], F32).failed
    assert judge("x", right, corpus[name], BF16).outcome == "pass"


def vector_of(expected, bound):
    """A vector with hand-made expectations."""
    case = next(iter(vectors.cases([OP])))
    return vectors.Vector(case, {"y": np.array(expected)}, {"float32-strict": {"y": np.array(bound)}})


def test_infinities_must_be_met_exactly():
    vector = vector_of([-np.inf, 1.0], [0.0, 0.1])
    assert compare([np.array([-np.inf, 1.05])], vector, F32, exact=False).ok
    for wrong in ([np.inf, 1.0], [-1e12, 1.0], [np.nan, 1.0]):
        assert not compare([np.array(wrong)], vector, F32, exact=False).ok


def test_elements_without_information_are_counted_not_judged():
    vector = vector_of([1.0, 0.5], [np.inf, 0.1])
    result = compare([np.array([77.0, 0.45])], vector, F32, exact=False)
    assert result.ok and result.unverifiable == 1 and result.elements == 2
    assert informative(np.array([1.0, 0.5]), np.array([0.6, 0.4])).tolist() == [False, True]


def test_the_worst_element_is_named():
    result = compare([np.array([1.0, 2.5])], vector_of([1.0, 2.0], [0.1, 0.1]), F32, exact=False)
    assert result.ratio == pytest.approx(5) and result.message.startswith("y[1]=2.5, should be 2; 5 x the bound")


def test_empty_outputs_compare():
    result = compare([np.zeros((0, 3))], vector_of(np.zeros((0, 3)), np.zeros((0, 3))), F32, exact=False)
    assert result.ok and result.elements == 0


@pytest.mark.parametrize(
    "change", [lambda y: y + 1j, lambda y: y.astype(object), lambda y: y.astype(str), lambda y: None]
)
def test_what_is_not_an_array_of_real_numbers_is_no_result(corpus, change):
    verdict = outcome(corpus, lambda x, epsilon: change(right(x, epsilon)))
    assert verdict.outcome == "errored" and "real numbers" in verdict.message


def test_a_huge_result_is_refused_before_it_is_copied(corpus):
    verdict = outcome(corpus, lambda x, epsilon: np.broadcast_to(x.flat[0], (1 << 40,)))
    assert verdict.outcome == "errored" and "larger than any" in verdict.message


def test_a_cached_bfloat16_result_fails(corpus):
    kept = {}

    def cached(x, epsilon):
        return kept.setdefault("y", right(x, epsilon))

    assert [outcome(corpus, cached, profile=BF16).outcome for _ in range(2)] == ["pass", "logic"]


def test_leaving_the_process_is_an_error_of_the_implementation(corpus):
    """sys.exit(0) must not end the judge with the status of success."""
    verdict = outcome(corpus, lambda x, epsilon: sys.exit(0))
    assert verdict.outcome == "errored" and "SystemExit" in verdict.message
    law = families()["norm"].LAWS[0]
    assert check_law("x", lambda x, epsilon: sys.exit(0), law, OP, F32, 2).outcome == "errored"
    with pytest.raises(KeyboardInterrupt):
        outcome(corpus, interrupted)


def interrupted(x, epsilon):
    raise KeyboardInterrupt


def test_the_error_state_of_numpy_is_put_back(corpus):
    def strict(x, epsilon):
        np.seterr(all="raise")
        return right(x, epsilon)

    before = np.geterr()
    assert outcome(corpus, strict).outcome == "pass" and np.geterr() == before


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_law_takes_nan_or_infinity_for_an_agreement(value):
    laws = [law for law in families()["norm"].LAWS if OP in law.operators]
    found = {
        law.name: check_law("x", lambda x, epsilon: np.full_like(x, value), law, OP, F32, 5).outcome for law in laws
    }
    assert set(found.values()) == {"logic"}, found


def test_an_unknown_tolerance_says_nothing():
    case = next(iter(vectors.cases([OP])))
    close("law", case, [1.0, np.nan, 3.0], [2.0, 2.0, 3.0], [np.nan, np.inf, 0.0])
    for actual in (1.0, np.nan, np.inf):
        with pytest.raises(LawFailed):
            close("law", case, [actual], [2.0], [0.5])


def test_a_nan_is_not_called_inexact():
    result = compare([np.array([np.nan])], vector_of([1.0], [0.1]), F32, exact=False)
    assert "exactly" not in result.message and "beyond any bound" in result.message


def test_a_law_that_fails_once_is_not_passed(corpus):
    """Wrong on its first call alone: repeating the search finds nothing, and that is said."""
    calls = []

    def first_wrong(x, epsilon):
        calls.append(x)
        return right(x, epsilon) + (len(calls) == 1)

    law = next(law for law in families()["norm"].LAWS if law.name == "spike")
    verdict = check_law("x", first_wrong, law, OP, F32, 5)
    assert verdict.outcome == "logic" and "not the same twice" in verdict.message and "x=" in verdict.message


def test_a_law_stops_at_the_first_failure_where_nothing_is_shrunk():
    calls = []

    def zeros(x, epsilon):
        calls.append(x)
        return np.zeros_like(x)

    law = next(law for law in families()["norm"].LAWS if law.name == "spike")
    assert check_law("x", zeros, law, OP, F32, 5, shrink=False).outcome == "logic" and len(calls) == 1


def test_a_reference_that_is_known_is_the_one_that_is_derived(monkeypatch):
    x = np.array([[3.0, 4.0, 0.0]])
    case = Case(OP, "drawn", {"x": x, "epsilon": 0.0}, known={})
    others = [
        case,
        case.with_(x=-x),
        case.with_(epsilon=2.75),
        case.under(BF16),
        Case("norm.layer_norm", "drawn", {**case.arguments, "scale": x[0], "bias": x[0]}, known=case.known),
    ]
    derived = [reference(c)["y"] for c in others]
    for _ in range(2):
        for c, ball in zip(others, derived, strict=True):
            np.testing.assert_array_equal(known_reference(c)["y"].value, ball.value)
            np.testing.assert_array_equal(known_reference(c)["y"].rad, ball.rad)
    assert len(case.known) == len(others) and not known_reference(case)["y"].rad.flags.writeable
    monkeypatch.setattr("conformance.case.reference", None)
    known_reference(case.with_(epsilon=2.75))
    with pytest.raises(TypeError):
        # Equal numbers, and another quotient under 1 / x.
        known_reference(case.with_(x=np.where(x == 0, -0.0, x)))
