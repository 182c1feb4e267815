"""The laws of a step: right ones pass, every known wrong one breaks one law; without a step the law `prefix` judges."""

import copy
import importlib
from dataclasses import replace

import numpy as np
import pytest

from conformance import model
from conformance.adapters import load
from conformance.budget import Profile
from conformance.law import LawFailed
from conformance.models import _streams, gau_alpha
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
# Steps that change the state they are given; of one text there is nothing wrong with them.
KNOWN_SHARED = {"state updated in place", "layers updated in place, tokens counted by value"}
KNOWN_BUFFERS = {"one buffer of keys for all continuations"}
KNOWN_SUMS = {"sums over chunks updated in place"}
BRANCHED = KNOWN_SHARED | KNOWN_BUFFERS | KNOWN_SUMS
LAWS = ("streamed", "branched")
WRONG = [(name, bug) for name in NAMES for bug in model.MODELS()[name].WRONG_STREAMS]


def right(name):
    module = model.MODELS()[name]
    return Streaming(module.model, module.step)


def judged(whole, name="gau_alpha", profile=FLOAT64, law="streamed"):
    return model.judge_law("mine", whole, name, law, profile)


def test_every_causal_encoder_of_layers_with_a_step_is_streamed():
    assert {"flash", "gau_alpha", "roformer", "roformer_v2"} <= set(NAMES)
    for name, module in model.MODELS().items():
        assert all((law in model.laws(name)) == hasattr(module, "step") for law in LAWS)
        assert "prefix" in model.laws(name)
    for name in NAMES:
        own = KNOWN_CHUNKS | KNOWN_SUMS if name == "flash" else KNOWN_BUFFERS
        assert model.MODELS()[name].WRONG_STREAMS.keys() == KNOWN | KNOWN_SHARED | own


@pytest.mark.parametrize("name", NAMES)
def test_right_steps_pass_on_every_causal_case(name):
    # The length of the whole array is known to no step.
    causal = [case for case in model.CASES()[name].values() if case.visible == "causal"]
    held = [case for case in causal if getattr(case.config, "divisor", "") != "array"]
    assert len(held) == {"flash": 6, "flash_quad": 3, "gau_alpha": 2}.get(name, 3)
    for case in held:
        for law in _streams.LAWS:
            law(right(name), case, model.MODELS()[name].reference, FLOAT64)


@pytest.mark.parametrize(("name", "names"), [("spec", ["flash", "gau_alpha"]), ("torchimpl", NAMES)])
def test_both_own_adapters_offer_steps_that_pass(name, names):
    offered = [i for i in load(name) if i.models and i.laws]
    assert {i.profile.dtype for i in offered} == {"float64", "float32"} and len(offered) == 2
    for implementation in offered:
        for whole in names:
            for law in LAWS:
                found = judged(implementation.models[whole], whole, implementation.profile, law)
                assert found.outcome == "pass" and found.kind == "law", found.message


@pytest.mark.parametrize(("name", "bug"), WRONG)
def test_a_wrong_step_breaks_one_law(name, bug):
    wrong, reference = model.MODELS()[name].WRONG_STREAMS[bug], model.MODELS()[name].reference
    case, (kept, broken) = model.CASES()[name]["causal"], _streams.LAWS[:: 1 if bug in BRANCHED else -1]
    said = "branched, 3 texts that go on from one state" if bug in BRANCHED else "streamed in pieces of "
    with pytest.raises(LawFailed, match=f"law {said}"):
        broken(wrong, case, reference, FLOAT32)
    kept(wrong, case, reference, FLOAT64)
    # In the whole there is nothing wrong with it.
    assert wrong.whole is model.MODELS()[name].model


@pytest.mark.parametrize("name", NAMES)
def test_wrong_steps_are_right_but_for_their_fault(name):
    def kept(begun, before, now, config):
        return now

    def own(shared, own):
        return own

    module = model.MODELS()[name]
    begin = importlib.import_module(f"refimpl.models.{name}").initial_state
    made = _streams.wrong_streams(module.model, module.step, begin, {"kept": kept}, {"own": own})
    for wrong in made["kept"], made["own"], right(name):
        assert {judged(wrong, name, law=law).outcome for law in LAWS} == {"pass"}


def test_a_state_that_is_handed_over_by_value_cannot_be_changed():
    # As by an adapter that reaches another process, or a session of a graph.
    def by_value(step):
        return lambda weights, state, *given, **options: step(weights, copy.deepcopy(state), *given, **options)

    for bug in BRANCHED & gau_alpha.WRONG_STREAMS.keys():
        wrong = gau_alpha.WRONG_STREAMS[bug]
        assert judged(wrong, law="branched").outcome == "logic"
        assert judged(Streaming(wrong.whole, by_value(wrong.step)), law="branched").outcome == "pass"


@pytest.mark.parametrize("tokens", [1, 3, 7])
def test_a_state_that_steps_of_one_size_change_is_told(tokens):
    # Single tokens and many go through different code in many an implementation.
    def step(weights, state, ids, *given, **options):
        box = [None] if state is None else state
        made, now = gau_alpha.step(weights, box[0], ids, *given, **options)
        if ids.shape[1] != tokens:
            return made, [now]
        box[0] = now
        return made, box

    mine = Streaming(gau_alpha.model, step)
    assert judged(mine, law="streamed").outcome == "pass"
    # What all the rest has been read into is read by nobody again.
    assert judged(mine, law="branched").outcome == ("pass" if tokens == 7 else "logic")


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
    assert judged(gau_alpha.model, law="branched") == replace(found, case="branched")
    made = {v.case: v.outcome for v in model.verdicts("mine", gau_alpha.model, "gau_alpha", FLOAT64, with_laws=True)}
    assert made["prefix"] == "pass" and made["streamed"] == made["branched"] == "skipped"

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
    wrong = (
        gau_alpha.WRONG_STREAMS["keys of the last piece forgotten"],
        gau_alpha.WRONG_STREAMS["state updated in place"],
    )
    for law, bug in zip(_streams.LAWS, wrong, strict=True):
        law(Streaming(crash, crash), case, gau_alpha.reference, FLOAT64)
        with pytest.raises(LawFailed):
            law(bug, case.with_(visible="causal"), gau_alpha.reference, FLOAT64)


def test_pieces_are_parts_of_the_text():
    case = model.CASES()["gau_alpha"]["causal"]
    case = replace(case, positions=np.arange(11) + 5)
    seen = []

    def step(weights, state, ids, segments, mask, positions, *, config, visible):
        seen.append((state, ids.shape, segments.shape, mask.shape, positions.tolist(), visible))
        return [ids[..., None]], len(seen)

    (found,) = _streams.in_pieces(Streaming(step, step), case, (4, 0, 7), FLOAT64)
    assert np.array_equal(found[..., 0], case.token_ids)
    assert seen == [
        (None, (4, 4), (4, 4), (4, 4), [5, 6, 7, 8], "causal"),
        (1, (4, 0), (4, 0), (4, 0), [], "causal"),
        (2, (4, 7), (4, 7), (4, 7), [9, 10, 11, 12, 13, 14, 15], "causal"),
    ]


def test_what_the_first_piece_alone_is_told_is_what_holds_without():
    seen = []

    def step(weights, state, ids, *given, **options):
        seen.append(given)
        return [ids[..., None]], 0

    *_, begun = _streams.READ["streamed"](model.CASES()["gau_alpha"]["causal"])
    begun.found(Streaming(step, step), FLOAT64)
    first, *rest = seen
    assert all(array is not None for array in first) and rest == [(None, None, None)] * 2
    assert begun.told.mask[:, 4:].all() and not begun.told.segments[:, 4:].any()
    assert begun.told.positions.tolist() == [100, 103, 106, 109, 4, 5, 6, 7, 8, 9, 10]


# Steps that are right where every piece is told everything.
def with_inputs(change):
    """A step that takes other inputs for its own: change(state, ids, segments, mask, positions) -> all of them."""

    def of(right):
        def step(weights, state, *given, **options):
            return right(weights, *change(state, *given), **options)

        return step

    return of


def of_the_first_row(state, ids, segments, mask, positions):
    return state, ids, segments, mask, positions if positions is None or positions.ndim == 1 else positions[0]


def unhidden(state, ids, segments, mask, positions):
    """Where there is no mask, what earlier pieces hid is hidden no more."""
    if mask is None and state is not None:
        layers = tuple(kept._replace(real=np.ones_like(kept.real)) for kept in state.layers)
        state = state._replace(layers=layers)
    return state, ids, segments, mask, positions


def counted_once(state, ids, *given):
    """A piece of no token is one of one token."""
    return (state if state is None or ids.shape[1] else state._replace(tokens=state.tokens + 1)), ids, *given


def behind_the_last(right):
    """Positions go on behind the last that was told."""

    def step(weights, state, ids, segments, mask, positions, **options):
        inner, last = (None, -1) if state is None else state
        if positions is None:
            positions = last + 1 + np.arange(ids.shape[1])
        made, inner = right(weights, inner, ids, segments, mask, positions, **options)
        return made, (inner, positions[..., -1].max() if ids.shape[1] else last)

    return step


def sixteen_keys(right):
    def step(weights, state, *given, **options):
        made, now = right(weights, state, *given, **options)
        layers = tuple(type(kept)(*(array[:, -16:] for array in kept)) for kept in now.layers)
        return made, now._replace(layers=layers)

    return step


def begins_with_a_token(right):
    def step(weights, state, ids, *given, **options):
        if state is None and not ids.size:
            raise ValueError("a text begins with a token")
        return right(weights, state, ids, *given, **options)

    return step


def in_buffers(right):
    held = {}

    def step(*given, **options):
        made, state = right(*given, **options)
        key = tuple((array.shape, array.dtype.str) for array in made)
        for buffer, array in zip(held.setdefault(key, [np.empty_like(a) for a in made]), made, strict=True):
            buffer[...] = array
        return held[key], state

    return step


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (with_inputs(of_the_first_row), "law streamed in pieces of 4, 7 "),
        (with_inputs(unhidden), "4, 3, 4, segment_ids, mask, positions told with the first alone "),
        (with_inputs(counted_once), "law streamed in pieces of 3, 0, 8 "),
        (behind_the_last, "told with the first alone "),
        (sixteen_keys, "law streamed in pieces of 0, 17, 1, 1, 5 "),
        (begins_with_a_token, "a text begins with a token"),
        (in_buffers, "of one call was overwritten by a later one"),
    ],
)
def test_a_step_that_is_right_where_it_is_told_everything_is_found(wrong, said):
    mine = Streaming(gau_alpha.model, wrong(gau_alpha.step))
    found = judged(mine)
    assert found.failed and said in found.message
    # Behind a piece with a mask, one without sees what is known by this name.
    assert found.equals == (("padding of earlier pieces visible",) if "segment_ids" in said else ())
    case = model.CASES()["gau_alpha"]["causal"]
    told = _streams.Stream(case, (slice(None),), ((4, 3, 4),))
    if wrong is not in_buffers:
        told.hold(mine, gau_alpha.reference, FLOAT64)


CONSTANTS = {
    "flash": [{"normaliser": "visible"}, {"kernel": "squared_relu"}, {"divisor": "root_key_size"}, {"chunk": 3}]
    + [{"rotation": "interleaved"}, {"rotary_base": 10.0}, {"epsilon": 0.25}],
    "flash_quad": [{"kernel": "squared_relu"}, {"divisor": "visible", "length": 0}, {"rotation": "interleaved"}]
    + [{"rotary_base": 10000.0}, {"epsilon": 2.0**-20}],
    "gau_alpha": [{"n_min": 1}, {"rotary_base": 10000.0}, {"epsilon": 2.0**-40}],
    "roformer": [{"activation": "gelu_erf"}, {"rotary_base": 10000.0}, {"epsilon": 2.0**-40}],
    "roformer_v2": [{"activation": "relu"}, {"rotary_base": 10000.0}, {"epsilon": 2.0**-40}],
}


@pytest.mark.parametrize(("name", "built_in"), [(name, c) for name, every in CONSTANTS.items() for c in every])
def test_what_a_step_has_built_in_is_found(name, built_in):
    module = model.MODELS()[name]

    def step(*given, config, **options):
        return module.step(*given, config=replace(config, **built_in), **options)

    with pytest.raises(LawFailed):
        for check, case in model.laws(name)["streamed"]:
            check(Streaming(module.model, step), case, module.reference, FLOAT64)


def test_texts_that_go_on_from_one_state_are_read_in_turn():
    case = model.CASES()["gau_alpha"]["causal"]
    (stream,) = _streams.READ["branched"](case)
    seen = []

    def step(weights, state, ids, *given, **options):
        seen.append((state, ids))
        return [ids[..., None]], (0 if state is None else 10 * state + ids.shape[1])

    (found,) = stream.found(Streaming(step, step), FLOAT64)
    assert found.shape == (12, 11, 1) and np.array_equal(found[..., 0], stream.told.token_ids)
    # The first four tokens once; then one, three and seven from one state, and the rest of the first two in turn.
    assert [state for state, _ in seen] == [None, 0, 0, 0, 1, 3]
    assert [ids.shape for _, ids in seen] == [(4, n) for n in (4, 1, 3, 7, 6, 4)]
    ids = stream.told.token_ids.reshape(3, 4, 11)
    assert np.array_equal(ids[0], case.token_ids) and (ids[:, :, :4] == ids[:1, :, :4]).all()
    assert all((ids[i, :, 4:] != ids[j, :, 4:]).all() for i, j in ((0, 1), (0, 2), (1, 2)))


def test_continuations_are_held_against_each_alone():
    # That pieces are not the whole is the other law's affair.
    def step(weights, state, ids, *given, **options):
        made, now = gau_alpha.step(weights, state, ids, *given, **options)
        return made, now._replace(tokens=0)

    assert judged(Streaming(gau_alpha.model, step), law="branched").outcome == "pass"
    assert judged(Streaming(gau_alpha.model, step), law="streamed").outcome == "logic"
