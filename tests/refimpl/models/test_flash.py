"""FLASH: a model worked out by hand, its clauses, and every refusal that is its own."""

import dataclasses
import math

import numpy as np
import pytest

from conformance.budget import Profile
from conformance.law import LawFailed
from conformance.models import _encoder
from conformance.models import flash as judge
from refimpl.check import DomainError, ShapeError
from refimpl.models import flash, gau_alpha
from refimpl.ops import norm

FLOAT64 = Profile("float64", "strict", "A64")
CASES = {case.name: case for case in judge.cases()}
PADDED = CASES["padded"]


def states(case, **changes):
    case = case.with_(**changes)
    inputs = case.token_ids, case.segment_ids, case.mask, case.positions
    return flash.hidden_states(case.weights, *inputs, config=case.config)


def test_one_token_and_two_layers_by_hand():
    config = flash.Config(
        vocab_size=1, hidden_size=2, layers=2, expanded_size=1, key_size=2, segments=1, chunk=5, mix="bidirectional",
        kernel="squared_relu", divisor="root_key_size", normaliser="visible", rows="lucidrains", rotation="half_split",
        rotary_base=10000.0, epsilon=0.0,
    )  # fmt: skip
    weights = {
        # (0.5, 4) + (0.5, 3) = (1, 7) has the root mean square 5: x_0 = (0.2, 1.4).
        "embedding.token": np.array([[0.5, 4.0]]),
        "embedding.segment": np.array([[0.5, 3.0]]),
        # The layer norm of (0.2, 1.4) is (-1, 1); with this scale and bias it is (-1, 3).
        "layers.0.norm_scale": np.array([2.0, 1.0]),
        "layers.0.norm_bias": np.array([1.0, 2.0]),
        # (-1, 3) W + b = (ln 3, ln 3, ln 3, 0): gate, value and the first shared feature are t = 3/4 ln 3.
        "layers.0.w_in": np.array([[0.0, 0, 0, 3], [0, 0, 1, 1]]),
        "layers.0.b_in": np.array([math.log(3), math.log(3), math.log(3) - 3, 0]),
        # In the order (q_quad, q_lin, k_quad, k_lin): scores 2t·3t, linear weights 5t·7t + 1·11.
        "layers.0.gamma": np.array([[2.0, 9], [5, 9], [3, 9], [7, 9]]),
        "layers.0.beta": np.array([[0.0, 0], [0, 1], [0, 0], [0, 11]]),
        "layers.0.w_out": np.array([[1.0, -1.0]]),
        "layers.0.b_out": np.array([0.25, 0.5]),
        "final_norm.scale": np.array([3.0, 4.0]),
        "final_norm.bias": np.array([0.5, 1.0]),
    }
    t = 0.75 * math.log(3)
    weight = (6 * t * t / math.sqrt(2)) ** 2 + 35 * t * t + 11
    o = t * weight * t
    # A second layer that adds nothing, so that x_1 is to be seen.
    weights |= {name.replace("layers.0", "layers.1"): w for name, w in weights.items() if name.startswith("layers")}
    weights |= {"layers.1.w_out": np.zeros((1, 2)), "layers.1.b_out": np.zeros(2)}
    embedded, first, last = states(_encoder.Case("hand", config, weights, np.array([[0]])))
    np.testing.assert_allclose(embedded, [[[0.2, 1.4]]], rtol=1e-15)
    np.testing.assert_allclose(first, [[[0.2 + o + 0.25, 1.4 - o + 0.5]]], rtol=1e-14)
    # Now the first feature is the larger one: the last norm gives (1, -1) before scale and bias.
    np.testing.assert_allclose(last, [[[3.5, -3.0]]], rtol=1e-14)


def test_names_and_shapes():
    config = dataclasses.replace(PADDED.config, layers=1)
    assert flash.shapes(config) == {
        "embedding.token": (29, 5),
        "embedding.segment": (3, 5),
        "layers.0.norm_scale": (5,),
        "layers.0.norm_bias": (5,),
        "layers.0.w_in": (5, 18),
        "layers.0.b_in": (18,),
        "layers.0.gamma": (4, 4),
        "layers.0.beta": (4, 4),
        "layers.0.w_out": (7, 5),
        "layers.0.b_out": (5,),
        "final_norm.scale": (5,),
        "final_norm.bias": (5,),
    }
    assert flash.parameters(config) == 145 + 15 + 10 + 90 + 18 + 32 + 35 + 5 + 10
    # The formula of the docstring.
    each = 5 * (3 * 7 + 4) + 3 * 5 + 2 * 7 + 9 * 4
    assert flash.parameters(PADDED.config) == (29 + 3 + 2) * 5 + 2 * each


def test_c1_the_residual_path_is_not_normalised_and_the_last_norm_acts_once():
    # Units of weight 0 leave the embedding as it is.
    silent = {n: 0 * w if n.endswith(("w_out", "b_out")) else w for n, w in PADDED.weights.items()}
    embedded, *rest, last = states(PADDED, weights=silent)
    assert len(rest) == PADDED.config.layers - 1 == 1
    for x in rest:
        np.testing.assert_array_equal(x, embedded)
    scale, bias = silent["final_norm.scale"], silent["final_norm.bias"]
    expected = norm.layer_norm(embedded, scale, bias, epsilon=PADDED.config.epsilon)
    np.testing.assert_array_equal(last, expected)


def test_the_embedding_is_that_of_gau_alpha():
    case = PADDED
    sizes = {name: getattr(case.config, name) for name in ("vocab_size", "hidden_size", "expanded_size", "key_size")}
    rest = {name: getattr(case.config, name) for name in ("segments", "epsilon", "rotary_base")}
    config = gau_alpha.Config(layers=1, n_min=1, **sizes, **rest)
    shapes = gau_alpha.shapes(config)
    weights = {n: case.weights[n] if n in case.weights else np.ones(shape) for n, shape in shapes.items()}
    weights["layers.0.w_out"] = np.ones(shapes["layers.0.w_out"])
    other = gau_alpha.hidden_states(weights, case.token_ids, case.segment_ids, config=config)[0]
    np.testing.assert_array_equal(states(case)[0], other)


@pytest.mark.parametrize("name", CASES)
def test_the_derivation_in_balls_agrees(name):
    assert _encoder.worst(judge.model, judge.reference, CASES[name], FLOAT64) <= 0.1


def test_every_convention_stands_in_some_case():
    seen = {field: {getattr(case.config, field) for case in CASES.values()} for field in ("mix", "kernel", "divisor")}
    seen |= {field: {getattr(case.config, field) for case in CASES.values()} for field in ("rows", "rotation")}
    assert all(len(values) == 2 for values in seen.values())
    assert len({case.config.normaliser for case in CASES.values()}) == 6


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.config.mix == "causal"])
def test_causal_layers_do_not_see_what_comes_after(name):
    case = CASES[name]
    later = np.where(np.arange(11) >= 6, (case.token_ids + 1) % 29, case.token_ids)
    for one, other in zip(states(case, token_ids=later), states(case), strict=True):
        np.testing.assert_array_equal(one[:, :6], other[:, :6])


@pytest.mark.parametrize("name", ["article", "paper", "lucidrains"])
def test_c6_what_counts_padding_is_moved_by_it(name):
    assert not judge.blind_to_padding(CASES[name])
    with pytest.raises(LawFailed, match="law padding on the right"):
        _encoder.right_padding(judge.model, CASES[name], judge.reference, FLOAT64)


@pytest.mark.parametrize("name", ["padded", "causal"])
def test_c4_only_differences_of_positions_enter(name):
    case = CASES[name]
    implied = states(case)
    for positions in (np.arange(11), np.arange(11) + 300, np.tile(np.arange(11), (4, 1))):
        for one, other in zip(states(case, positions=positions), implied, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-11)
    # Row by row, and they are those of the whole text: chunks do not begin anew.
    rows = np.stack([np.arange(11) * step for step in (1, 2, 3, 4)])
    moved = states(case, positions=rows)[-1]
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(states(case, positions=row)[-1][i], moved[i])
    assert np.abs(moved - implied[-1])[3].max() > 1e-4
    assert np.abs(states(case, positions=np.arange(11) % 3)[-1] - implied[-1])[0].max() > 1e-5


def test_c5_without_masks_every_token_is_real_and_of_segment_0():
    ids = np.zeros((2, 5), int)
    explicit = states(PADDED, token_ids=ids, segment_ids=np.zeros((2, 5), int), mask=np.ones((2, 5), bool))
    for one, other in zip(explicit, states(PADDED, token_ids=ids, segment_ids=None, mask=None), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"token_ids": PADDED.token_ids + 29}, DomainError, "expected token_ids from 0 to 28 (vocab_size 29)"),
        ({"mask": np.ones((4, 11))}, DomainError, "mask must be boolean"),
        ({"mask": np.ones((3, 11), bool)}, ShapeError, "of one shape"),
        ({"positions": np.arange(11.0)}, DomainError, "positions must be integers"),
        ({"positions": np.zeros((1, 11), int)}, ShapeError, "positions (n,) or (..., n)"),
        ({"weights": {**PADDED.weights, "layers.0.beta": np.ones((2, 4))}}, ShapeError, "0.beta of shape (4, 4)"),
        ({"config": dataclasses.replace(PADDED.config, layers=3)}, ShapeError, "missing: layers.2.b_in, layers.2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes, error, message):
    with pytest.raises(error) as raised:
        states(PADDED, **changes)
    assert message in str(raised.value) and str(raised.value).startswith("flash.hidden_states: ")
