"""The judge of gau_alpha and flash: the specification passes, and every known wrong model is found out."""

from functools import cache

import numpy as np
import pytest

from conformance.budget import Arithmetic, Profile
from conformance.law import LawFailed
from conformance.models import _encoder, flash, gau_alpha

JUDGES = {"gau_alpha": gau_alpha, "flash": flash}
FLOAT64, FLOAT32 = (Profile(dtype, "strict", "A64") for dtype in ("float64", "float32"))
CASES = {name: {case.name: case for case in judge.cases()} for name, judge in JUDGES.items()}
BOTH = [(name, case) for name, cases in CASES.items() for case in cases]
WRONG = [(name, wrong) for name, judge in JUDGES.items() for wrong in judge.WRONG]
# The law that each of these breaks, and a case; all wrong models are found by their numbers.
BROKEN_LAW = {
    "segment ids dropped": ("segments_enter", "padded"),
    "padded keys visible": ("right_padding", "padded"),
    "queries hidden in the place of keys": ("right_padding", "padded"),
    "padding counted by softmax_plus": ("right_padding", "causal"),
    "everything where nothing is seen": ("right_padding", "rows without tokens"),
    "padding counted": ("right_padding", "padded"),
    "every real key visible": ("unseen_tokens", "causal"),
    "reads both ways": ("unseen_tokens", "causal"),
    "the mask of the first row for all": ("one_by_one", "padded"),
    "positions of the first row for all": ("one_by_one", "positions of every row"),
    "positions within the chunk": ("positions_shift", "padded"),
}


@cache
def due(name, case, profile):
    """The results of a case."""
    expected = JUDGES[name].reference(Arithmetic(profile), CASES[name][case])
    return [ball.finished() for ball in expected.results().values()]


def worst(model, name, case, profile):
    found = _encoder.run(model, CASES[name][case], profile)
    return max(_encoder._ratio(value, ball) for value, ball in zip(found, due(name, case, profile), strict=True))


def laws(name, case):
    """The laws that hold for a case."""
    return flash.laws(CASES[name][case]) if name == "flash" else list(_encoder.LAWS)


def breaks(law, model, name, case, profile=FLOAT64):
    try:
        law(model, CASES[name][case], JUDGES[name].reference, profile)
    except LawFailed:
        return True
    return False


@pytest.mark.parametrize(
    ("name", "case", "profile"),
    [(*both, FLOAT64) for both in BOTH] + [(name, "padded", FLOAT32) for name in JUDGES],
    ids=str,
)
def test_the_specification_keeps_every_law(name, case, profile):
    broken = [law.__name__ for law in laws(name, case) if breaks(law, JUDGES[name].model, name, case, profile)]
    assert broken == []


def test_padding_on_the_left_changes_a_flash_and_no_gau_alpha():
    assert not breaks(_encoder.padding, gau_alpha.model, "gau_alpha", "padded")
    assert breaks(_encoder.padding, flash.model, "flash", "padded")
    blind = {case for case in CASES["flash"] if _encoder.right_padding in laws("flash", case)}
    assert CASES["flash"].keys() - blind == {"article", "paper", "lucidrains"}
    for case in CASES["flash"].keys() - blind:
        assert breaks(_encoder.right_padding, flash.model, "flash", case)


@pytest.mark.parametrize(("name", "wrong"), WRONG)
def test_a_wrong_model_is_found_out(name, wrong):
    model = JUDGES[name].WRONG[wrong]
    # Not by a hair: even the bounds of float32 tell.
    assert max(worst(model, name, case, FLOAT64) for case in CASES[name]) > 1e6
    assert any(worst(model, name, case, FLOAT32) > 1 for case in CASES[name])
    if wrong in BROKEN_LAW:
        broken, case = BROKEN_LAW[wrong]
        law = getattr(_encoder, broken)
        assert law in laws(name, case) or law is _encoder.right_padding
        assert breaks(law, model, name, case)


def test_as_many_wrong_models_as_there_are_things_to_get_wrong():
    assert len(gau_alpha.WRONG) >= 41 and len(flash.WRONG) >= 39
    assert BROKEN_LAW.keys() <= {wrong for _, wrong in WRONG}


@pytest.mark.parametrize(("name", "case"), BOTH)
def test_the_specification_and_the_wrong_models_but_for_their_fault_are_right(name, case):
    for model in (JUDGES[name].model, JUDGES[name]._with()):
        assert worst(model, name, case, FLOAT64) <= 0.1
    judge = JUDGES[name]
    assert max(_encoder.by_layer(judge.hidden_states, judge.reference, CASES[name][case], FLOAT64)) <= 0.1


@pytest.mark.parametrize("name", JUDGES)
def test_the_order_of_the_batch_is_noticed(name):
    def model(*arguments, **options):
        logits, *states = JUDGES[name].model(*arguments, **options)
        return (logits - logits[:1], *states)

    for law in (_encoder.batch_permutes, _encoder.one_by_one):
        assert breaks(law, model, name, "padded")


@pytest.mark.parametrize("name", JUDGES)
def test_the_first_wrong_layer_is_named(name):
    case = CASES[name]["padded"]

    def states(weights, *arguments, **options):
        other = {**weights, "layers.1.w_out": 1.5 * weights["layers.1.w_out"]}
        return JUDGES[name].hidden_states(other, *arguments, **options)

    ratios = _encoder.by_layer(states, JUDGES[name].reference, case, FLOAT64)
    assert len(ratios) == 1 + case.config.layers
    assert max(ratios[:2]) <= 1 < min(ratios[2:])


def test_nan_and_other_shapes_are_beyond_every_bound():
    def nan(*arguments, **options):
        return tuple(np.full_like(part, np.nan) for part in gau_alpha.model(*arguments, **options))

    def short(*arguments, **options):
        logits, *states = gau_alpha.model(*arguments, **options)
        return (logits[..., :1], *states)

    assert worst(nan, "gau_alpha", "one layer", FLOAT64) == np.inf
    assert worst(short, "gau_alpha", "one layer", FLOAT64) == np.inf
    assert breaks(_encoder.one_by_one, nan, "gau_alpha", "one layer")


def test_cases_ask_for_every_mode_and_positions():
    assert {case.visible for case in CASES["gau_alpha"].values()} == set(_encoder.VISIBLE)
    assert {case.config.n_min for case in CASES["gau_alpha"].values()} == {1, 16}
    for cases in CASES.values():
        assert {np.ndim(case.positions) for case in cases.values() if case.positions is not None} == {1, 2}


@pytest.mark.parametrize("name", JUDGES)
def test_weights_are_exact_in_every_format(name):
    for case in CASES[name].values():
        for array in case.weights.values():
            assert np.array_equal(array.astype(np.float16).astype(np.float64), array)
            assert np.abs(array * 2**7).max() <= 160
