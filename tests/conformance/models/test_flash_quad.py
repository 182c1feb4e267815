"""The judge of flash_quad: right models pass, and every known wrong model is found out, by numbers and by laws."""

from functools import cache
from itertools import combinations

import numpy as np
import pytest

from conformance import model
from conformance.adapters import load
from conformance.budget import Arithmetic, Profile
from conformance.law import LawFailed
from conformance.models import _encoder, _streams, flash_quad

FLOAT64, FLOAT32 = (Profile(dtype, "strict", "A64") for dtype in ("float64", "float32"))
CASES = {case.name: case for case in flash_quad.cases()}
STREAMS = ("causal", "constant, causal")
# The law that each of these breaks, and a case; all wrong models are found by their numbers.
BROKEN_LAW = {
    "segment ids dropped": ("segments_enter", "padded"),
    "padded keys visible": ("padding", "padded"),
    "queries hidden in the place of keys": ("padding", "padded"),
    "scores divided by the length of the array": ("padding", "padded"),
    "hidden keys counted": ("prefix", "causal"),
    "every real key visible": ("unseen_tokens", "causal"),
    "the mask of the first row for all": ("one_by_one", "padded"),
    "positions of the first row for all": ("one_by_one", "positions of every row"),
    "positions count real tokens only": ("positions_shift", "padded"),
}


@cache
def due(case, profile):
    return [ball.finished() for ball in flash_quad.reference(Arithmetic(profile), CASES[case]).results().values()]


@cache
def found(whole, case, profile):
    return _encoder.run(whole, CASES[case], profile)


def worst(whole, case, profile):
    made = found(whole, case, profile)
    return max(_encoder._ratio(value, ball) for value, ball in zip(made, due(case, profile), strict=True))


def breaks(law, whole, case, profile=FLOAT64):
    try:
        law(whole, CASES[case], flash_quad.reference, profile)
    except LawFailed:
        return True
    return False


@pytest.mark.parametrize(("case", "profile"), [*((case, FLOAT64) for case in CASES), ("padded", FLOAT32)], ids=str)
def test_the_specification_keeps_every_law(case, profile):
    laws = flash_quad.laws(CASES[case])
    assert [law.__name__ for law in laws if breaks(law, flash_quad.model, case, profile)] == []


@pytest.mark.parametrize("case", CASES)
def test_the_specification_and_the_wrong_models_but_for_their_fault_are_right(case):
    for whole in (flash_quad.model, flash_quad._with()):
        assert worst(whole, case, FLOAT64) <= 0.1
    by_layer = _encoder.by_layer(flash_quad.hidden_states, flash_quad.reference, CASES[case], FLOAT64)
    assert len(by_layer) == 1 + CASES[case].config.layers and max(by_layer) <= 0.1


@pytest.mark.parametrize("wrong", flash_quad.WRONG)
def test_a_wrong_model_is_found_out(wrong):
    whole = flash_quad.WRONG[wrong]
    # Not by a hair: even the bounds of float32 tell.
    assert any(worst(whole, case, FLOAT64) > 1e6 for case in CASES)
    assert any(worst(whole, case, FLOAT32) > 1 for case in CASES)
    if wrong in BROKEN_LAW:
        law, case = BROKEN_LAW[wrong]
        assert getattr(_encoder, law) in flash_quad.laws(CASES[case])
        assert breaks(getattr(_encoder, law), whole, case)


def test_as_many_wrong_models_as_there_are_things_to_get_wrong():
    assert len(flash_quad.WRONG) >= 55 and BROKEN_LAW.keys() <= flash_quad.WRONG.keys()
    # No two of them are one: each is told from every other by some case.
    for one, other in combinations(flash_quad.WRONG, 2):
        made = ([found(flash_quad.WRONG[bug], case, FLOAT64) for bug in (one, other)] for case in CASES)
        apart = (np.abs(a - b).max() for pair in made for a, b in zip(*pair, strict=True))
        assert any(distance > 1e-9 for distance in apart), (one, other)


@pytest.mark.parametrize("case", STREAMS)
def test_the_step_keeps_its_laws_and_every_wrong_step_breaks_one(case):
    right = _encoder.Streaming(flash_quad.model, flash_quad.step)
    for profile in (FLOAT64, FLOAT32):
        assert not any(breaks(law, right, case, profile) for law in _streams.LAWS)
    broken = {
        bug: [law.__name__ for law in _streams.LAWS if breaks(law, wrong, case)]
        for bug, wrong in flash_quad.WRONG_STREAMS.items()
    }
    # Positions are told in the streams of one case.
    unseen = [] if case == "causal" else ["given positions ignored in a piece"]
    assert [bug for bug, laws in broken.items() if not laws] == unseen
    assert sorted(filter(None, broken.values())) == [["branched"]] * 3 + [["streamed"]] * (5 - len(unseen))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_torchimpl_passes_and_its_step_too(dtype):
    own = next(i for i in load("torchimpl") if i.models and i.profile.dtype == dtype)
    made = model.verdicts("torchimpl", own.models["flash_quad"], "flash_quad", own.profile, with_laws=True)
    assert {v.outcome for v in made} == {"pass"}
    assert {v.case for v in made if v.kind == "law"} == {law.__name__ for law in (*_encoder.LAWS, *_streams.LAWS)}
    assert len([v for v in made if v.kind == "model"]) == len(CASES)


def test_a_wrong_model_is_told_by_its_name_and_the_first_wrong_state():
    bug, case = "norm after the unit", model.CASES()["flash_quad"]["one-layer"]
    found = model.judge("mine", flash_quad.WRONG[bug], "flash_quad", case, FLOAT64)
    assert found.outcome == "logic" and "x_1, behind layer 0, is the first that is off" in found.message
    equal = [m.bug for m in model.wrong_models("flash_quad") if model._equals(m.call, found, case)]
    assert equal == [bug]


def test_weights_are_exact_in_every_format():
    for case in CASES.values():
        for array in case.weights.values():
            assert np.array_equal(array.astype(np.float16).astype(np.float64), array)
            assert np.abs(array * 2**7).max() <= 320
