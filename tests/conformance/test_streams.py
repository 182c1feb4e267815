"""The law `streamed`: right steps pass, every known wrong one is told; without a step the law `prefix` judges."""

from dataclasses import replace

import numpy as np
import pytest

from conformance import model
from conformance.adapters import load
from conformance.budget import Profile
from conformance.law import LawFailed
from conformance.models import _encoder, gau_alpha
from conformance.models._encoder import Streaming

FLOAT64, FLOAT32 = (Profile(dtype, "strict", "A64") for dtype in ("float64", "float32"))
NAMES = [name for name, module in model.MODELS().items() if hasattr(module, "step")]
KNOWN = {
    "second layer starts anew in every piece",
    "positions start anew in every piece",
    "given positions ignored in a piece",
    "keys of the last piece forgotten",
    "padding of earlier pieces visible",
}
KNOWN_CHUNKS = {"open chunk dropped", "chunk closed a token early"}
WRONG = [(name, bug) for name in NAMES for bug in model.MODELS()[name].WRONG_STREAMS]


def right(name):
    module = model.MODELS()[name]
    return Streaming(module.model, module.step)


def judged(whole, name="gau_alpha", profile=FLOAT64, law="streamed"):
    return model.judge_law("mine", whole, name, law, profile)


def test_every_causal_encoder_of_layers_with_a_step_is_streamed():
    assert {"flash", "gau_alpha", "roformer", "roformer_v2"} <= set(NAMES)
    for name, module in model.MODELS().items():
        assert ("streamed" in model.laws(name)) == hasattr(module, "step")
        assert "prefix" in model.laws(name)
    for name in NAMES:
        expected = KNOWN | KNOWN_CHUNKS if name == "flash" else KNOWN
        assert model.MODELS()[name].WRONG_STREAMS.keys() == expected


@pytest.mark.parametrize("name", NAMES)
def test_right_steps_pass_on_every_causal_case(name):
    # The length of the whole array is known to no step.
    causal = [case for case in model.CASES()[name].values() if case.visible == "causal"]
    held = [case for case in causal if getattr(case.config, "divisor", "") != "array"]
    assert len(held) == {"flash": 6, "flash_quad": 2}.get(name, 1)
    for case in held:
        _encoder.streamed(right(name), case, model.MODELS()[name].reference, FLOAT64)


@pytest.mark.parametrize(("name", "names"), [("spec", ["flash", "gau_alpha"]), ("torchimpl", NAMES)])
def test_both_own_adapters_offer_steps_that_pass(name, names):
    offered = [i for i in load(name) if i.models and i.laws]
    assert {i.profile.dtype for i in offered} == {"float64", "float32"} and len(offered) == 2
    for implementation in offered:
        for whole in names:
            found = judged(implementation.models[whole], whole, implementation.profile)
            assert found.outcome == "pass" and found.kind == "law", found.message


@pytest.mark.parametrize(("name", "bug"), WRONG)
def test_a_wrong_step_is_told(name, bug):
    wrong = model.MODELS()[name].WRONG_STREAMS[bug]
    for profile in (FLOAT64, FLOAT32):
        found = judged(wrong, name, profile)
        assert found.outcome == "logic" and "law streamed in pieces of " in found.message, profile
    # In the whole there is nothing wrong with it.
    assert judged(wrong, name, law="prefix").outcome == "pass"


@pytest.mark.parametrize("name", NAMES)
def test_wrong_steps_are_right_but_for_their_fault(name):
    def kept(begun, before, now, config):
        return now

    module = model.MODELS()[name]
    for wrong in _encoder.wrong_streams(module.model, module.step, {"none": kept}), {"none": right(name)}:
        assert judged(wrong["none"], name).outcome == "pass"


def test_one_text_alone_is_streamed_too():
    def step(weights, state, ids, *given, **options):
        made, state = gau_alpha.step(weights, state, ids, *given, **options)
        return tuple(array + 1e-3 * (len(ids) == 1) for array in made), state

    found = judged(Streaming(gau_alpha.model, step))
    assert found.outcome == "logic" and "law streamed in pieces of 4, 7 " in found.message


def test_positions_that_go_on_by_pieces_are_told():
    def step(weights, state, *given, **options):
        made, now = gau_alpha.step(weights, state, *given, **options)
        return made, now._replace(tokens=1 + (0 if state is None else state.tokens))

    # Token by token nothing is wrong.
    found = judged(Streaming(gau_alpha.model, step))
    assert found.outcome == "logic" and "law streamed in pieces of 4, 7 " in found.message


@pytest.mark.parametrize("place", ["weights", "mask"])
def test_weights_and_inputs_of_a_step_come_back_unmodified(place):
    def step(weights, state, ids, segments, mask, positions, **options):
        made = gau_alpha.step(weights, state, ids, segments, mask, positions, **options)
        array = weights["layers.0.w_in"] if place == "weights" else mask
        array[...] = ~array if array.dtype == bool else array + 1
        return made

    found = judged(Streaming(gau_alpha.model, step))
    assert found.outcome == "logic" and "was modified by the call" in found.message


def test_a_step_that_crashes_or_loses_a_result_is_an_error():
    def crash(*_, **__):
        raise RuntimeError("out of keys")

    def short(*given, **options):
        (logits, *states), state = gau_alpha.step(*given, **options)
        return (logits, *states[:-1]), state

    found = judged(Streaming(gau_alpha.model, crash))
    assert found.outcome == "errored" and "out of keys" in found.message
    assert judged(Streaming(gau_alpha.model, short)).outcome == "errored"


def test_a_model_without_a_step_is_judged_by_its_prefixes():
    found = judged(gau_alpha.model)
    assert (found.outcome, found.message) == ("skipped", "the model has no step")
    made = {v.case: v.outcome for v in model.verdicts("mine", gau_alpha.model, "gau_alpha", FLOAT64, with_laws=True)}
    assert made["prefix"] == "pass" and made["streamed"] == "skipped"

    def looks_ahead(weights, ids, *given, **options):
        return tuple(array * (1 + 1e-9 * ids.shape[1]) for array in gau_alpha.model(weights, ids, *given, **options))

    assert judged(looks_ahead, law="prefix").outcome == "logic"


@pytest.mark.parametrize(("bug", "outcome"), [(None, "pass"), ("positions start anew in every piece", "logic")])
def test_a_file_of_ones_own_offers_a_step_by_an_attribute(tmp_path, bug, outcome):
    step = "gau_alpha.step" if bug is None else f"gau_alpha.WRONG_STREAMS[{bug!r}].step"
    (tmp_path / "mine.py").write_text(
        "from conformance.models import gau_alpha\n"
        "def mine(*given, **options):\n    return gau_alpha.model(*given, **options)\n"
        f"mine.step = {step}\n"
        "IMPLEMENTS = {'gau_alpha': mine}\nPROFILE = {'float64': 'strict'}\n"
    )
    (mine,) = load(f"python:{tmp_path / 'mine.py'}")
    assert judged(mine.models["gau_alpha"]).outcome == outcome


def test_only_causal_texts_are_streamed():
    def crash(*_, **__):
        raise AssertionError

    case = model.CASES()["gau_alpha"]["padded"]
    _encoder.streamed(Streaming(crash, crash), case, gau_alpha.reference, FLOAT64)
    with pytest.raises(LawFailed):
        wrong = gau_alpha.WRONG_STREAMS["keys of the last piece forgotten"]
        _encoder.streamed(wrong, case.with_(visible="causal"), gau_alpha.reference, FLOAT64)


def test_pieces_are_parts_of_the_text():
    case = model.CASES()["gau_alpha"]["causal"]
    case = replace(case, positions=np.arange(11) + 5)
    seen = []

    def step(weights, state, ids, segments, mask, positions, *, config, visible):
        seen.append((state, ids.shape, segments.shape, mask.shape, positions.tolist(), visible))
        return [ids[..., None]], len(seen)

    (found,) = _encoder.in_pieces(Streaming(step, step), case, (4, 0, 7), FLOAT64)
    assert np.array_equal(found[..., 0], case.token_ids)
    assert seen == [
        (None, (4, 4), (4, 4), (4, 4), [5, 6, 7, 8], "causal"),
        (1, (4, 0), (4, 0), (4, 0), [], "causal"),
        (2, (4, 7), (4, 7), (4, 7), [9, 10, 11, 12, 13, 14, 15], "causal"),
    ]
