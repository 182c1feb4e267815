"""The judge of models: the specification passes, and every known wrong model is found out by a case or a law."""

import numpy as np
import pytest

from conformance.budget import Profile
from conformance.law import LawFailed
from conformance.models import _encoder, flash, gau_alpha

JUDGES = {"gau_alpha": gau_alpha, "flash": flash}
FLOAT64, FLOAT32 = (Profile(dtype, "strict", "A64") for dtype in ("float64", "float32"))
WRONG = [(name, wrong) for name, judge in JUDGES.items() for wrong in judge.WRONG]
# The law that each of these breaks; all wrong models are found by their numbers.
BROKEN_LAW = {
    "segment ids dropped": "segments_matter",
    "padded keys visible": "right_padding",
    "mask ignored in pooling": "right_padding",
    "padding counted by softmax_plus": "right_padding",
    "padding counted": "right_padding",
    "the mask of the first row for all": "one_by_one",
}


def laws(judge, case):
    """The laws that hold for a case."""
    blind = judge is gau_alpha or judge.blind_to_padding(case)
    return [law for law in _encoder.LAWS if blind or law is not _encoder.right_padding]


def broken(model, judge, case, profile=FLOAT64):
    """The names of the laws that a model breaks on a case."""
    names = set()
    for law in laws(judge, case):
        try:
            law(model, case, judge.reference, profile)
        except LawFailed:
            names.add(law.__name__)
    return names


@pytest.mark.parametrize("name", JUDGES)
@pytest.mark.parametrize("profile", [FLOAT64, FLOAT32], ids=str)
def test_the_specification_keeps_every_law(name, profile):
    judge = JUDGES[name]
    for case in judge.cases():
        assert broken(judge.spec.forward, judge, case, profile) == set(), case.name


@pytest.mark.parametrize(("name", "wrong"), WRONG)
def test_a_wrong_model_is_found_out(name, wrong):
    judge = JUDGES[name]
    ratios = [_encoder.worst(judge.WRONG[wrong], judge.reference, case, FLOAT64) for case in judge.cases()]
    # Not by a hair: even the bounds of float32 would tell.
    assert max(ratios) > 1e6
    assert any(_encoder.worst(judge.WRONG[wrong], judge.reference, case, FLOAT32) > 1 for case in judge.cases())
    if wrong in BROKEN_LAW:
        assert any(BROKEN_LAW[wrong] in broken(judge.WRONG[wrong], judge, case) for case in judge.cases())


@pytest.mark.parametrize("name", JUDGES)
def test_the_wrong_models_are_right_but_for_their_fault(name):
    judge = JUDGES[name]
    for case in judge.cases():
        model = judge._with()
        assert _encoder.worst(model, judge.reference, case, FLOAT64) <= 0.1


@pytest.mark.parametrize("name", JUDGES)
def test_the_order_of_the_batch_is_noticed(name):
    judge = JUDGES[name]

    def model(*arguments, config):
        out = judge.spec.forward(*arguments, config=config)
        return out._replace(logits=out.logits - out.logits[:1])

    found = set().union(*(broken(model, judge, case) for case in judge.cases()))
    assert found >= {"batch_permutes", "one_by_one"}


@pytest.mark.parametrize("name", JUDGES)
def test_the_first_wrong_layer_is_named(name):
    judge = JUDGES[name]
    (case,) = (case for case in judge.cases() if case.name == "padded")

    def states(weights, *arguments, config):
        other = {**weights, "layers.1.w_out": 1.5 * weights["layers.1.w_out"]}
        return judge.spec.hidden_states(other, *arguments, config=config)

    ratios = _encoder.by_layer(states, judge.reference, case, FLOAT64)
    assert len(ratios) == 1 + case.config.layers
    assert max(ratios[:2]) <= 1 < min(ratios[2:])


def test_nan_and_other_shapes_are_beyond_every_bound():
    case = gau_alpha.cases()[0]

    def nan(*arguments, config):
        return tuple(np.full_like(part, np.nan) for part in gau_alpha.spec.forward(*arguments, config=config))

    def short(*arguments, config):
        logits, embedding, hidden = gau_alpha.spec.forward(*arguments, config=config)
        return logits[..., :1], embedding, hidden

    assert _encoder.worst(nan, gau_alpha.reference, case, FLOAT64) == np.inf
    assert _encoder.worst(short, gau_alpha.reference, case, FLOAT64) == np.inf
    assert "one_by_one" in broken(nan, gau_alpha, case)


@pytest.mark.parametrize("name", JUDGES)
def test_weights_are_exact_in_every_format(name):
    for case in JUDGES[name].cases():
        for array in case.weights.values():
            assert np.array_equal(array.astype(np.float16).astype(np.float64), array)
            assert np.abs(array * 2**7).max() <= 160
