"""Causal models piece by piece: a stream by hand, streamed = whole for any pieces, what a state holds, refusals."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl import model
from refimpl.check import DomainError, ShapeError
from refimpl.model import Model
from refimpl.models import _encoder, _heads, flash, gau_alpha, roformer_v2
from tests.refimpl.test_model import ANSWER, BOTH_WAYS, CAUSAL, CHOICE, CLASSES, GAU, POOLER, TIED, V1, V2, weights_of

# One text is at most this long: flash has chunks of four.
MOST = 11
# A floor of softmax_plus that the first tokens are below and the others above.
CONFIGS = {"roformer": V1, "roformer_v2": V2, "gau_alpha": replace(GAU, n_min=4), "flash": CAUSAL}
WHOLE = {
    name: Model(config, (_heads.TransformedLM() if name == "roformer" else TIED,), "causal")
    for name, config in CONFIGS.items()
}
WEIGHTS = {name: weights_of(whole) for name, whole in WHOLE.items()}
every = pytest.mark.parametrize("name", CONFIGS)


def inputs(*lead, n=MOST, seed=3, positions="own"):
    """Ids, segments, a mask with holes, and positions of every row, of all of them, or none."""
    rng = np.random.default_rng(seed)
    places = {"own": rng.integers(0, 50, (*lead, n)), "common": 3 * np.arange(n)[::-1] + 100, "none": None}
    mask = rng.random((*lead, n)) < 0.7
    return rng.integers(0, 23, (*lead, n)), rng.integers(0, 2, (*lead, n)), mask, places[positions]


def pieces_of(arrays, cuts):
    """The inputs between every two cuts of the text."""
    edges = [0, *sorted(cuts), arrays[0].shape[-1]]
    return [tuple(None if a is None else a[..., i:j] for a in arrays) for i, j in pairwise(edges)]


def streamed(name, arrays, cuts):
    """The outputs of all pieces put together, and the last state."""
    state = model.initial_state(WHOLE[name], batch=arrays[0].shape[:-1])
    found = []
    for piece in pieces_of(arrays, cuts):
        made, state = model.step(WEIGHTS[name], state, *piece, model=WHOLE[name])
        found.append(made)
    return {key: np.concatenate([made[key] for made in found], axis=-2) for key in found[0]}, state


def close(found, due):
    np.testing.assert_allclose(found, due, rtol=0, atol=1e-12 * np.abs(due).max(initial=1.0))


@every
@settings(max_examples=15)
@given(
    batch=st.sampled_from([(), (1,), (4,), (2, 3)]),
    cuts=st.lists(st.integers(0, MOST), max_size=5),
    positions=st.sampled_from(["own", "common", "none"]),
    seed=st.integers(0, 9),
)
def test_pieces_give_what_the_whole_gives(name, batch, cuts, positions, seed):
    arrays = inputs(*batch, positions=positions, seed=seed)
    due = model.forward(WEIGHTS[name], *arrays, model=WHOLE[name])
    found, state = streamed(name, arrays, cuts)
    assert tuple(found) == tuple(due) == ("last_hidden_state", "mlm_logits")
    for key, array in due.items():
        assert found[key].shape == array.shape
        close(found[key], array)
    assert state.tokens == MOST and len(state.layers) == 2


@every
@pytest.mark.parametrize("batch", [(1,), (4,)])
def test_token_by_token_with_and_without_what_may_be_left_out(name, batch):
    ids, *rest = inputs(*batch)
    for arrays in ((ids, *rest), (ids, None, None, None)):
        due = model.forward(WEIGHTS[name], *arrays, model=WHOLE[name])
        for key, array in streamed(name, arrays, range(1, MOST))[0].items():
            close(array, due[key])


@pytest.mark.parametrize("normaliser", ["su", "paper", "lucidrains_causal", "unnormalised"])
def test_flash_by_every_rule_of_lengths_that_does_not_look_ahead(normaliser):
    config = replace(CAUSAL, normaliser=normaliser)
    weights = {name: WEIGHTS["flash"][name] for name in flash.shapes(config)}
    arrays = inputs(4)
    due = flash.hidden_states(weights, *arrays, config=config)
    state, found = flash.initial_state(config, batch=(4,)), []
    for piece in pieces_of(arrays, (3, 4, 9)):
        states, state = flash.step(weights, state, *piece, config=config)
        found.append(states)
    for index, states in enumerate(due):
        close(np.concatenate([made[index] for made in found], axis=1), states)


def test_a_rule_of_lengths_that_looks_ahead_is_no_causal_one():
    with pytest.raises(DomainError, match="a normaliser other than lucidrains with mix causal"):
        replace(CAUSAL, normaliser="lucidrains")


def by_hand():
    """A layer in which every token adds the mean of all that it sees, itself among them, and is normalised."""
    config = roformer_v2.Config(
        vocab_size=3, segments=1, embedding_size=2, hidden_size=2, layers=1, heads=1, intermediate_size=1,
        activation="relu", epsilon=0.0, rotary_base=10000.0,
    )  # fmt: skip
    weights = {
        "embedding.token": np.array([[1.0, 1], [1, -1], [-1, 1]]), "embedding.segment": np.zeros((1, 2)),
        "layers.0.attention.w_q": np.zeros((2, 2)), "layers.0.attention.w_k": np.eye(2),
        "layers.0.attention.w_v": np.eye(2), "layers.0.attention.w_o": np.eye(2),
        "layers.0.feed_forward.w_in": np.zeros((2, 1)), "layers.0.feed_forward.w_out": np.zeros((1, 2)),
    }  # fmt: skip
    return weights, config


@pytest.mark.parametrize(
    ("mask", "last"),
    [
        # (1, 1), (1, -1), (-1, 1): means (1, 1), (1, 0), (1/3, 1/3); sums of the token and its mean, at unit size.
        ([True, True, True], np.array([-2, 4]) / math.sqrt(10)),
        # Without the first: (-1, 1) + (0, 0).
        ([False, True, True], np.array([-1, 1])),
    ],
)
def test_three_tokens_by_hand(mask, last):
    weights, config = by_hand()
    state, found = roformer_v2.initial_state(config, batch=()), []
    for token, real in enumerate(mask):
        (_, x), state = roformer_v2.step(weights, state, np.array([token]), None, np.array([real]), config=config)
        found.append(x[0])
    # The first sees itself, or nothing where it is hidden: (1, 1) both times.
    np.testing.assert_allclose(found[0], [1, 1], rtol=1e-15)
    second = np.array([2, -1]) / math.sqrt(2.5) if mask[0] else np.array([1, -1])
    np.testing.assert_allclose(found[1], second, rtol=1e-15)
    np.testing.assert_allclose(found[2], last, rtol=1e-14)
    (keys,) = state.layers
    assert keys.real.tolist() == mask and keys.v[:, 0].tolist() == [[1, 1], [1, -1], [-1, 1]]
    # Keys are turned by their positions: (1, 1) by 0, (1, -1) by 1, (-1, 1) by 2.
    turned = [[1, 1], *([a * math.cos(p) - b * math.sin(p), a * math.sin(p) + b * math.cos(p)]
                        for p, a, b in ((1, 1, -1), (2, -1, 1)))]  # fmt: skip
    np.testing.assert_allclose(keys.k[:, 0], turned, rtol=1e-15)


def test_the_last_tokens_see_the_real_ones_up_to_themselves():
    keys = _encoder.Keys(np.zeros((1, 4, 2)), np.zeros((1, 4, 2)), np.array([[True, False, True, True]]))
    assert _encoder.seen(keys, 2).astype(int).tolist() == [[[1, 0, 1, 0], [1, 0, 1, 1]]]
    assert _encoder.seen(keys, 0).shape == (1, 0, 4)


def test_what_a_state_holds():
    ids = np.ones((3, 9), int)
    state = streamed("flash", (ids, None, None, None), (5,))[1]
    for kept in state.layers:
        # Two chunks of four are summed; the ninth token is the open one.
        assert (kept.chunks, kept.counted.tolist(), kept.v.shape) == (2, [8, 8, 8], (3, 1, 5))
        assert kept.summary.shape == (3, 4, 5)
    for name, shapes in {"gau_alpha": ((3, 9, 4), (3, 9, 5)), "roformer": ((3, 9, 2, 4), (3, 9, 2, 4))}.items():
        for kept in streamed(name, (ids, None, None, None), (2, 2))[1].layers:
            assert (kept.k.shape, kept.v.shape, kept.real.shape) == (*shapes, (3, 9))


@every
def test_a_text_is_continued_in_two_ways(name):
    arrays = inputs(2, n=10)
    state = streamed(name, pieces_of(arrays, (6,))[0], ())[1]
    before = [np.copy(array) for kept in state.layers for array in kept]
    last = pieces_of(arrays, (6,))[1]
    one, after = model.step(WEIGHTS[name], state, *last, model=WHOLE[name])
    other, _ = model.step(WEIGHTS[name], state, (last[0] + 1) % 23, *last[1:], model=WHOLE[name])
    again, _ = model.step(WEIGHTS[name], state, *last, model=WHOLE[name])
    assert np.array_equal(one["mlm_logits"], again["mlm_logits"]) and state.tokens == 6 and after.tokens == 10
    assert not np.allclose(one["mlm_logits"], other["mlm_logits"], atol=1e-3)
    for one, other in zip((array for kept in state.layers for array in kept), before, strict=True):
        assert np.array_equal(one, other)


@every
def test_no_token_and_no_text(name):
    none = np.zeros((2, 0), int)
    state = model.initial_state(WHOLE[name], batch=(2,))
    made, after = model.step(WEIGHTS[name], state, none, model=WHOLE[name])
    assert {key: array.shape for key, array in made.items()} == {
        "last_hidden_state": (2, 0, 8), "mlm_logits": (2, 0, 23)
    }  # fmt: skip
    assert after.tokens == 0
    made, _ = model.step(WEIGHTS[name], model.initial_state(WHOLE[name], batch=(0,)), none[:0], model=WHOLE[name])
    assert made["mlm_logits"].shape == (0, 0, 23)


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        (
            Model(GAU, (TIED,), "bidirectional"),
            "visible causal, since no token may read a later one, received visible='bi",
        ),
        (Model(GAU, (TIED,), "unilm"), "visible causal, since no token may read a later one, received visible='unilm'"),
        (Model(BOTH_WAYS, (), "bidirectional"), "expected visible causal"),
        (Model(GAU, (TIED, CLASSES), "causal"), r"these read the whole text, received heads=\['sequence_classifier'\]"),
        (Model(V1, (POOLER, CHOICE), "causal"), r"transformed_lm or tied_lm.*heads=\['pooler', 'multiple_choice'\]"),
        (Model(V2, (ANSWER,), "causal"), r"heads=\['span_pointer'\]"),
    ],
)
def test_a_model_that_reads_the_whole_text_is_refused(whole, message):
    with pytest.raises(DomainError, match=f"model.initial_state: .*{message}"):
        model.initial_state(whole, batch=())
    state = model.initial_state(WHOLE["gau_alpha"], batch=(1,))
    with pytest.raises(DomainError, match=f"model.step: .*{message}"):
        model.step(weights_of(whole), state, np.zeros((1, 1), int), model=whole)


def test_an_encoder_without_a_step_is_refused(monkeypatch):
    monkeypatch.delattr(gau_alpha, "step")
    with pytest.raises(DomainError, match="expected an encoder with a step, received model='gau_alpha'"):
        model.initial_state(WHOLE["gau_alpha"], batch=())


def test_a_bidirectional_flash_has_no_step():
    weights = {name: WEIGHTS["flash"][name] for name in flash.shapes(BOTH_WAYS)}
    with pytest.raises(DomainError, match=r"flash\.step: expected mix causal, .* received mix='bidirectional'"):
        flash.step(weights, flash.initial_state(BOTH_WAYS, batch=()), np.array([1]), config=BOTH_WAYS)


@every
def test_a_state_of_something_else_is_refused(name):
    def refused(state, error, message, lead=(2,)):
        with pytest.raises(error, match=message):
            model.step(WEIGHTS[name], state, np.zeros((*lead, 1), int), model=WHOLE[name])

    state = model.initial_state(WHOLE[name], batch=(2,))
    for other in (None, state.layers, state._replace(tokens=-1), state._replace(tokens=1.0)):
        refused(other, DomainError, rf"{name}\.step: expected a state of initial_state or of the step before")
    refused(state._replace(layers=state.layers[:1]), ShapeError, "a state of 2 layers, received layers=1")
    other = model.initial_state(WHOLE["flash" if name != "flash" else "roformer"], batch=(2,))
    keeps = "sums" if name == "flash" else "keys"
    refused(other, DomainError, f"a state that keeps {keeps} in every layer")
    refused(model.initial_state(WHOLE[name], batch=(3,)), ShapeError, "a state of")
    refused(model.initial_state(WHOLE[name], batch=()), ShapeError, "a state of")
    refused(state, ShapeError, "a state of", lead=(1, 2))
    other = model.initial_state(WHOLE["gau_alpha" if name != "gau_alpha" else "roformer"], batch=(2,))
    if name != "flash":
        refused(other, ShapeError, r"a state of the texts \(2,\)")
        fewer = state._replace(layers=tuple(kept._replace(real=kept.real[:1]) for kept in state.layers))
        refused(fewer, ShapeError, r"a state of the texts \(2,\)")


@every
def test_pieces_are_checked_as_texts_are(name):
    state = model.initial_state(WHOLE[name], batch=(2,))
    ids = np.zeros((2, 3), int)
    for piece, error, message in (
        ((ids + 23,), DomainError, "token_ids from 0 to 22"),
        ((ids, None, np.ones((2, 3))), DomainError, "mask must be boolean"),
        ((ids, None, np.ones((2, 2), bool)), ShapeError, "of one shape"),
        ((ids, None, None, np.arange(4)), ShapeError, "positions"),
        ((ids, None, None, np.arange(3.0)), DomainError, "positions must be integers"),
    ):
        with pytest.raises(error, match=message):
            model.step(WEIGHTS[name], state, *piece, model=WHOLE[name])
    short = {key: array for key, array in WEIGHTS[name].items() if key != "embedding.segment"}
    with pytest.raises(ShapeError, match="missing: embedding.segment"):
        model.step(short, state, ids, model=WHOLE[name])
    with pytest.raises(DomainError, match=r"lengths >= 0, received batch=\(-1,\)"):
        model.initial_state(WHOLE[name], batch=(-1,))
