"""GAU-α: a model worked out by hand, the published size, its clauses, and every refusal."""

import dataclasses
import math

import numpy as np
import pytest

from conformance.budget import Profile
from conformance.models import _encoder
from conformance.models import gau_alpha as judge
from refimpl.check import DomainError, ShapeError
from refimpl.models import gau_alpha
from refimpl.ops import norm

FLOAT64 = Profile("float64", "strict", "A64")
CASES = {case.name: case for case in judge.cases()}
PADDED = CASES["padded"]
BASE = gau_alpha.Config(
    vocab_size=12000, hidden_size=768, layers=24, expanded_size=1536, key_size=128, segments=2,
    n_min=1, epsilon=1e-12, rotary_base=10000.0, labels=15,
)  # fmt: skip


def forward(case, **changes):
    case = case.with_(**changes)
    return gau_alpha.forward(case.weights, case.token_ids, case.segment_ids, case.mask, config=case.config)


def test_one_token_and_one_layer_by_hand():
    config = gau_alpha.Config(
        vocab_size=2, hidden_size=2, layers=1, expanded_size=1, key_size=2, segments=1,
        n_min=1, epsilon=0.0, rotary_base=10000.0, labels=2,
    )  # fmt: skip
    log3 = math.log(3)
    weights = {
        # (0.5, 4) + (0.5, 3) = (1, 7) has the root mean square 5: x_0 = (0.2, 1.4).
        "embedding.token": np.array([[9.0, 9.0], [0.5, 4.0]]),
        "embedding.segment": np.array([[0.5, 3.0]]),
        # Gate and value: silu(ln 3) = 3/4 ln 3 each. The shared features decide nothing: one key weighs 1.
        "layers.0.w_in": np.array([[5 * log3, 0, 1, 2], [0, log3 / 1.4, 3, 4]]),
        "layers.0.gamma_q": np.array([1.0, 2.0]),
        "layers.0.gamma_k": np.array([3.0, 4.0]),
        "layers.0.w_out": np.array([[1.0, -2.0]]),
        "classifier.kernel": np.array([[1.0, 10.0], [0.0, 1.0]]),
        "classifier.bias": np.array([0.0, -1.0]),
    }
    g = (0.75 * log3) ** 2
    assert g == pytest.approx(0.678909, abs=1e-6)
    a, b = 0.2 + g, 1.4 - 2 * g
    root = math.sqrt((a * a + b * b) / 2)
    out = gau_alpha.forward(weights, np.array([[1]]), config=config)
    np.testing.assert_allclose(out.hidden, [[[a / root, b / root]]], rtol=1e-13)
    np.testing.assert_allclose(out.embedding, [[a / root, b / root]], rtol=1e-13)
    np.testing.assert_allclose(out.logits, [[a / root, (10 * a + b) / root - 1]], rtol=1e-13)


def test_the_published_size():
    # 24 (768 (2·1536 + 128) + 1536·768 + 2·128) + 12000·768 + 2·768, the figure of the released model.
    assert 24 * (768 * 3200 + 1536 * 768 + 256) + 12000 * 768 + 2 * 768 == 96_517_632
    assert gau_alpha.parameters(BASE) - (768 * 15 + 15) == 96_517_632


def test_names_and_shapes():
    config = dataclasses.replace(PADDED.config, layers=1)
    assert gau_alpha.shapes(config) == {
        "embedding.token": (29, 5),
        "embedding.segment": (3, 5),
        "layers.0.w_in": (5, 18),
        "layers.0.gamma_q": (4,),
        "layers.0.gamma_k": (4,),
        "layers.0.w_out": (7, 5),
        "classifier.kernel": (5, 2),
        "classifier.bias": (2,),
    }
    assert gau_alpha.parameters(config) == 145 + 15 + 90 + 4 + 4 + 35 + 10 + 2
    # The formula of the docstring.
    assert gau_alpha.parameters(PADDED.config) == (29 + 3) * 5 + 3 * (5 * (3 * 7 + 4) + 2 * 4) + (5 + 1) * 2


def test_hidden_states_are_the_embedding_and_every_layer():
    case = PADDED
    states = gau_alpha.hidden_states(case.weights, case.token_ids, case.segment_ids, case.mask, config=case.config)
    assert len(states) == 1 + case.config.layers
    token, segment = case.weights["embedding.token"], case.weights["embedding.segment"]
    expected = norm.rms_norm(token[case.token_ids] + segment[case.segment_ids], epsilon=case.config.epsilon)
    np.testing.assert_array_equal(states[0], expected)
    # C1 of forward: nothing stands between the last layer and the mean.
    np.testing.assert_array_equal(forward(case).hidden, states[-1])


@pytest.mark.parametrize("name", CASES)
def test_the_derivation_in_balls_agrees(name):
    assert _encoder.worst(gau_alpha.forward, judge.reference, CASES[name], FLOAT64) <= 0.1
    assert max(_encoder.by_layer(gau_alpha.hidden_states, judge.reference, CASES[name], FLOAT64)) <= 0.1


def test_c2_a_shift_of_all_positions_changes_nothing_so_padding_may_stand_on_the_left():
    case = PADDED.rows(slice(0, 1))
    left = {
        "token_ids": np.concatenate([[[7, 3, 1]], case.token_ids], axis=1),
        "segment_ids": np.concatenate([[[2, 0, 1]], case.segment_ids], axis=1),
        "mask": np.concatenate([np.zeros((1, 3), bool), case.real], axis=1),
    }
    np.testing.assert_allclose(forward(case, **left).hidden[:, 3:], forward(case).hidden, rtol=1e-13)


def test_c2_without_masks_every_token_is_real_and_of_segment_0():
    ids = np.zeros((2, 3), int)
    explicit = forward(PADDED, token_ids=ids, segment_ids=np.zeros((2, 3), int), mask=np.ones((2, 3), bool))
    implied = forward(PADDED, token_ids=ids, segment_ids=None, mask=None)
    for one, other in zip(explicit, implied, strict=True):
        np.testing.assert_array_equal(one, other)


def test_one_text_needs_no_batch_axis_and_may_be_empty():
    alone = forward(PADDED, token_ids=PADDED.token_ids[1], segment_ids=None, mask=PADDED.mask[1])
    batch = forward(PADDED, segment_ids=None)
    for one, many in zip(alone, batch, strict=True):
        np.testing.assert_allclose(one, many[1], rtol=1e-13)
    empty = forward(PADDED, token_ids=np.zeros((2, 0), int), segment_ids=None, mask=None)
    assert empty.hidden.shape == (2, 0, 5)
    np.testing.assert_array_equal(empty.logits, np.tile(PADDED.weights["classifier.bias"], (2, 1)))


def test_weights_are_not_changed_and_float32_weights_will_do():
    kept = {name: array.copy() for name, array in PADDED.weights.items()}
    half = forward(PADDED, weights={name: array.astype(np.float32) for name, array in PADDED.weights.items()})
    np.testing.assert_array_equal(half.logits, forward(PADDED).logits)
    assert half.logits.dtype == np.float64
    assert all(np.array_equal(kept[name], PADDED.weights[name]) for name in kept)


def test_a_silent_layer_is_its_norm():
    # With W_out = 0 a layer is the norm alone, and a normalised row is its own norm.
    weights = {name: 0 * array if "w_out" in name else array for name, array in PADDED.weights.items()}
    out = forward(PADDED, weights=weights)
    embedded = gau_alpha.hidden_states(weights, PADDED.token_ids, PADDED.segment_ids, config=PADDED.config)[0]
    np.testing.assert_allclose(out.hidden, embedded, rtol=1e-11)


WEIGHTS = PADDED.weights
IDS = PADDED.token_ids


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"token_ids": IDS.astype(float)}, DomainError, "token_ids must be integers, received dtype float64"),
        ({"token_ids": np.array(3)}, ShapeError, "expected token_ids of shape (..., n)"),
        ({"token_ids": IDS[:, :3]}, ShapeError, "token_ids, segment_ids and mask of one shape (..., n), received"),
        ({"token_ids": IDS * 0 + 29}, DomainError, "from 0 to 28 (vocab_size 29), received 29 at index [0, 0]"),
        ({"token_ids": np.where(np.arange(11) == 4, -1, IDS)}, DomainError, "received -1 at index [0, 4]"),
        ({"segment_ids": IDS * 0 + 3}, DomainError, "segment_ids from 0 to 2 (segments 3), received 3"),
        ({"segment_ids": IDS[:1]}, ShapeError, "of one shape"),
        ({"mask": np.ones((4, 11), int)}, DomainError, "mask must be boolean (True = may attend), received"),
        ({"mask": np.ones((4, 1), bool)}, ShapeError, "of one shape"),
        ({"weights": {}}, ShapeError, "expected 16 weights, missing: classifier.bias, classifier.kernel, "),
        ({"weights": {**WEIGHTS, "pooler": IDS}}, ShapeError, "missing: none, unknown: pooler"),
        (
            {"weights": {**WEIGHTS, "layers.1.w_out": WEIGHTS["layers.1.w_out"].T}}, ShapeError,
            "gau_alpha.forward: expected layers.1.w_out of shape (7, 5), received layers.1.w_out of shape (5, 7)",
        ),
        (
            {"weights": {**WEIGHTS, "layers.2.gamma_k": np.full(4, np.nan)}}, DomainError,
            "layers.2.gamma_k must be finite",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes, error, message):
    with pytest.raises(error) as raised:
        forward(PADDED, **changes)
    assert message in str(raised.value) and str(raised.value).startswith("gau_alpha.forward: ")
    case = PADDED.with_(**changes)
    with pytest.raises(error, match="gau_alpha.hidden_states: "):
        gau_alpha.hidden_states(case.weights, case.token_ids, case.segment_ids, case.mask, config=case.config)
