"""What a whole model and its step return, where it comes in: told by what was expected and what came."""

import numpy as np
import pytest

from conformance import model
from conformance.budget import Profile
from conformance.law import results, shaped, stepped
from conformance.models import _encoder, gau_alpha

FLOAT64 = Profile("float64", "strict", "A64")
SHAPES = {"logits": (1, 2, 3), "x_0": (1, 2, 4)}
RIGHT = (np.ones((1, 2, 3)), np.ones((1, 2, 4), np.float32))


def test_results_are_copies_in_float64():
    found = results(list(RIGHT), tuple(SHAPES))
    assert [array.dtype for array in found] == [np.float64] * 2
    assert not np.shares_memory(found[0], RIGHT[0]) and shaped(RIGHT, SHAPES) is RIGHT


@pytest.mark.parametrize(
    ("returned", "error", "words"),
    [
        ({"logits": RIGHT[0], "x_0": RIGHT[1]}, TypeError, "received a dict with the keys 'logits', 'x_0'"),
        (RIGHT[0], TypeError, r"expected a tuple of 2 arrays \(logits, x_0\), received one array of shape \(1, 2, 3\)"),
        (None, TypeError, "received None"),
        (
            (RIGHT[0], {"x": 1}),
            TypeError,
            "expected x_0 as an array among 2 arrays .*, received a dict with the keys 'x'",
        ),
        ((RIGHT[0], "x_0"), TypeError, "received str"),
        ((RIGHT[0],), ValueError, r"1 results, expected 2 \(logits, x_0\)"),
        ((*RIGHT, RIGHT[1]), ValueError, "3 results, expected 2"),
        (RIGHT[::-1], ValueError, r"logits has shape \(1, 2, 4\), expected \(1, 2, 3\)"),
    ],
)
def test_other_results_are_told_by_what_was_expected_and_what_came(returned, error, words):
    with pytest.raises(error, match=words):
        shaped(returned, SHAPES)
    if error is TypeError:
        with pytest.raises(error, match=words):
            results(returned, tuple(SHAPES))


@pytest.mark.parametrize(
    ("returned", "words"),
    [((*RIGHT, None), "received 3 values"), (None, "received None"), (RIGHT[0], "received one array of shape")],
)
def test_a_step_that_returns_no_pair_is_told_what_is_due(returned, words):
    assert stepped((RIGHT, "state")) == (RIGHT, "state")
    with pytest.raises(TypeError, match=rf"expected a step to return \(results, state\), .*{words}"):
        stepped(returned)


def judged(whole, law):
    if law == "padded":
        return model.judge("mine", whole, "gau_alpha", model.CASES()["gau_alpha"][law], FLOAT64)
    return model.judge_law("mine", whole, "gau_alpha", law, FLOAT64)


@pytest.mark.parametrize("law", ["padded", "padding", "one_by_one", "segments_enter"])
def test_cases_and_laws_alike_tell_what_is_wrong_with_results(law):
    def changed(change):
        return judged(lambda *given, **options: change(gau_alpha.model(*given, **options)), law)

    few = changed(lambda made: made[:-1])
    assert few.failed and "4 results, expected 5 (logits, x_0, x_1, x_2, x_3)" in few.message
    named = changed(lambda made: {"logits": made[0]})
    assert named.outcome == "errored" and "received a dict with the keys 'logits'" in named.message
    short = changed(lambda made: (made[0], *(array[..., 1:] for array in made[1:])))
    assert short.failed and "x_0 has shape (" in short.message and ", 4), expected (" in short.message
    # A case is wrong; what a law would compare has come to nothing.
    assert {few.outcome, short.outcome} == {"logic" if law == "padded" else "errored"}


@pytest.mark.parametrize("law", ["padding", "one_by_one", "unseen_tokens", "segments_enter", "prefix"])
def test_nan_is_told_as_nan_by_laws(law):
    found = judged(lambda *given, **options: [a * np.nan for a in gau_alpha.model(*given, **options)], law)
    assert found.outcome == "logic" and "is nan, expected a number" in found.message


def test_a_step_of_a_model_that_returns_no_pair_is_told_by_its_law():
    def flat(*given, **options):
        made, state = gau_alpha.step(*given, **options)
        return (*made, state)

    found = judged(_encoder.Streaming(gau_alpha.model, flat), "streamed")
    assert found.outcome == "errored" and "expected a step to return (results, state)" in found.message
    assert "received 5 values" in found.message


def test_results_of_a_step_that_are_too_few_are_told_by_its_law():
    def few(*given, **options):
        made, state = gau_alpha.step(*given, **options)
        return made[:-1], state

    found = judged(_encoder.Streaming(gau_alpha.model, few), "streamed")
    assert found.outcome == "errored" and "results, expected" in found.message and "x_2" in found.message
