"""FLASH-Quad: a model worked out by hand under every convention, its clauses, and every refusal that is its own."""

import dataclasses
import math
from functools import partial

import numpy as np
import pytest

from conformance.budget import Profile
from conformance.law import LawFailed
from conformance.models import _encoder
from conformance.models import flash_quad as judge
from refimpl.check import DomainError, ShapeError
from refimpl.models import _encoder as encoder
from refimpl.models import flash, flash_quad
from refimpl.ops import attention, attention_kernel, gau, norm, rope

FLOAT64 = Profile("float64", "strict", "A64")
CASES = {case.name: case for case in judge.cases()}
PADDED = CASES["padded"]
HAND = flash_quad.Config(
    vocab_size=1, hidden_size=2, layers=2, expanded_size=1, key_size=2, segments=1, kernel="squared_relu",
    divisor="array", length=0, rotation="half_split", rotary_base=10000.0, epsilon=0.0,
)  # fmt: skip


def states(case, **changes):
    case = case.with_(**changes)
    inputs = case.token_ids, case.segment_ids, case.mask, case.positions
    return flash_quad.hidden_states(case.weights, *inputs, config=case.config, visible=getattr(encoder, case.visible))


def by_hand():
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
        # q = (t, 1) and k = (3t, -2), each turned by its position.
        "layers.0.gamma_q": np.array([1.0, 9]),
        "layers.0.beta_q": np.array([0.0, 1]),
        "layers.0.gamma_k": np.array([3.0, 9]),
        "layers.0.beta_k": np.array([0.0, -2]),
        "layers.0.w_out": np.array([[1.0, -1.0]]),
        "layers.0.b_out": np.array([0.25, 0.5]),
        "final_norm.scale": np.array([3.0, 4.0]),
        "final_norm.bias": np.array([0.5, 1.0]),
    }
    # A second layer that adds nothing, so that x_1 is to be seen.
    weights |= {name.replace("layers.0", "layers.1"): w for name, w in weights.items() if name.startswith("layers")}
    return weights | {"layers.1.w_out": np.zeros((1, 2)), "layers.1.b_out": np.zeros(2)}


T = 0.75 * math.log(3)
# q_i · k_j where token j stands so many places behind token i: (t + i) (3t + 2i) of complex numbers, turned.
SCORE = {at: ((T + 1j) * (3 * T + 2j) * complex(math.cos(at), -math.sin(at))).real for at in (-1, 0, 1)}


def square(score):
    return max(score, 0) ** 2


def law(score):
    # The distribution function of the normal law of mean √(1/2) and variance 1/(4π).
    return 0.5 * math.erfc((math.sqrt(0.5) - score) * math.sqrt(2 * math.pi))


BOTH, FIRST = [[1, 1], [1, 1]], [[1, 0], [1, 0]]
CAUSAL = [[1, 0], [1, 1]]


@pytest.mark.parametrize(
    ("changes", "mask", "visible", "seen", "lengths"),
    [
        ({}, None, "bidirectional", BOTH, (2, 2)),
        ({"kernel": "laplace"}, None, "bidirectional", BOTH, (2, 2)),
        # Padding and what is still to come are counted by the length of the array, and by nothing else.
        ({}, [1, 0], "bidirectional", FIRST, (2, 2)),
        ({}, None, "causal", CAUSAL, (2, 2)),
        ({"divisor": "visible"}, None, "bidirectional", BOTH, (2, 2)),
        ({"divisor": "visible"}, [1, 0], "bidirectional", FIRST, (1, 1)),
        ({"divisor": "visible"}, None, "causal", CAUSAL, (1, 2)),
        ({"divisor": "visible", "kernel": "laplace"}, [1, 0], "causal", FIRST, (1, 1)),
        ({"divisor": "visible", "kernel": "laplace"}, [0, 0], "bidirectional", [[0, 0], [0, 0]], (1, 1)),
        ({"divisor": "constant", "length": 5}, [1, 0], "bidirectional", FIRST, (5, 5)),
        ({"divisor": "constant", "length": 5, "kernel": "laplace"}, None, "causal", CAUSAL, (5, 5)),
    ],
)
def test_two_tokens_and_two_layers_by_hand(changes, mask, visible, seen, lengths):
    config = dataclasses.replace(HAND, **changes)
    kernel = law if config.kernel == "laplace" else square
    mask = None if mask is None else np.array([mask], bool)
    ids = np.array([[0, 0]])
    embedded, first, last = states(_encoder.Case("hand", config, by_hand(), ids, mask=mask, visible=visible))
    np.testing.assert_allclose(embedded, [[[0.2, 1.4]] * 2], rtol=1e-15)
    expected = []
    for i in (0, 1):
        weight = sum(kernel(SCORE[j - i] / lengths[i]) * seen[i][j] for j in (0, 1))
        o = T * weight * T
        expected.append([0.2 + o + 0.25, 1.4 - o + 0.5])
    np.testing.assert_allclose(first, [expected], rtol=1e-13)
    # The last norm of two numbers says which one is the larger.
    signs = [1 if one > other else -1 for one, other in expected]
    np.testing.assert_allclose(last, [[[3 * sign + 0.5, -4 * sign + 1] for sign in signs]], rtol=1e-12)


def test_the_scores_by_hand_have_either_sign_and_tell_the_rotation():
    # Otherwise neither the ReLU nor the positions would have been looked at above.
    assert SCORE[0] == pytest.approx(3 * T * T - 2)
    assert SCORE[-1] < 0 < SCORE[0] < SCORE[1]


def test_names_and_shapes():
    config = dataclasses.replace(PADDED.config, layers=1)
    assert flash_quad.shapes(config) == {
        "embedding.token": (29, 5),
        "embedding.segment": (3, 5),
        "layers.0.norm_scale": (5,),
        "layers.0.norm_bias": (5,),
        "layers.0.w_in": (5, 18),
        "layers.0.b_in": (18,),
        "layers.0.gamma_q": (4,),
        "layers.0.beta_q": (4,),
        "layers.0.gamma_k": (4,),
        "layers.0.beta_k": (4,),
        "layers.0.w_out": (7, 5),
        "layers.0.b_out": (5,),
        "final_norm.scale": (5,),
        "final_norm.bias": (5,),
    }
    assert flash_quad.parameters(config) == 145 + 15 + 10 + 90 + 18 + 16 + 35 + 5 + 10
    # The formula of the docstring.
    each = 5 * (3 * 7 + 4) + 3 * 5 + 2 * 7 + 5 * 4
    assert flash_quad.parameters(PADDED.config) == (29 + 3 + 2) * 5 + 3 * each


@pytest.mark.parametrize("name", ["one layer", "array, padded", "constant, causal"])
def test_a_layer_is_the_pre_norm_block(name):
    case = CASES[name]
    config, w = case.config, encoder.layer_of(case.weights, 0)
    mask = np.ones((4, 11), bool) if case.mask is None else case.mask
    hidden = attention.key_mask(mask)
    keys = hidden & np.tri(11, dtype=bool) if case.visible == "causal" else hidden
    kernels = {"squared_relu": partial(attention_kernel.squared_relu_constant, length=1)}
    kernel = kernels.get(config.kernel, attention_kernel.laplace)
    # In "one layer" nothing is hidden: the keys that are seen are the array.
    length = config.length or 11
    embedded, *rest = states(case.with_(config=config))
    block = gau.block_pre_norm(
        embedded, keys, None, np.arange(11), rope.frequencies(config.key_size, base=config.rotary_base),
        *(w[n] for n in ("w_in", "b_in", "gamma_q", "beta_q", "gamma_k", "beta_k", "w_out", "b_out")),
        length=length, rotate=getattr(rope, f"rotate_{config.rotation}"), kernel=kernel,
        norm=lambda x: norm.layer_norm(x, w["norm_scale"], w["norm_bias"], epsilon=config.epsilon),
    )  # fmt: skip
    scale, bias = case.weights["final_norm.scale"], case.weights["final_norm.bias"]
    last = norm.layer_norm(block, scale, bias, epsilon=config.epsilon)
    np.testing.assert_allclose(rest[0], last if config.layers == 1 else block, rtol=1e-13, atol=1e-14)


def test_c1_the_residual_path_is_not_normalised_and_the_last_norm_acts_once():
    # Units of weight 0 leave the embedding as it is.
    silent = {n: 0 * w if n.endswith(("w_out", "b_out")) else w for n, w in PADDED.weights.items()}
    embedded, *rest, last = states(PADDED, weights=silent)
    assert len(rest) == PADDED.config.layers - 1 == 2
    for x in rest:
        np.testing.assert_array_equal(x, embedded)
    scale, bias = silent["final_norm.scale"], silent["final_norm.bias"]
    expected = norm.layer_norm(embedded, scale, bias, epsilon=PADDED.config.epsilon)
    np.testing.assert_array_equal(last, expected)


def test_embedding_and_last_norm_are_those_of_flash():
    case = PADDED
    sizes = {f.name: getattr(case.config, f.name) for f in dataclasses.fields(case.config)}
    config = flash.Config(
        **{n: v for n, v in sizes.items() if n not in ("divisor", "length", "layers")}, layers=1, chunk=3,
        mix="bidirectional", divisor="chunk", normaliser="visible", rows="paper",
    )  # fmt: skip
    weights = {n: case.weights.get(n, np.ones(shape)) for n, shape in flash.shapes(config).items()}
    silent = {n: 0 * w if n.endswith(("w_out", "b_out")) else w for n, w in weights.items()}
    chunked = flash.hidden_states(silent, case.token_ids, case.segment_ids, config=config)
    own = {n: 0 * w if n.endswith(("w_out", "b_out")) else w for n, w in case.weights.items()}
    embedded, *_, last = states(case, weights=own)
    np.testing.assert_array_equal(embedded, chunked[0])
    np.testing.assert_array_equal(last, chunked[1])


@pytest.mark.parametrize("name", CASES)
def test_the_derivation_in_balls_agrees(name):
    assert _encoder.worst(judge.model, judge.reference, CASES[name], FLOAT64) <= 0.1


def test_every_convention_stands_in_some_case():
    seen = {field: {getattr(case.config, field) for case in CASES.values()} for field in ("kernel", "rotation")}
    assert all(len(values) == 2 for values in seen.values())
    assert {case.config.divisor for case in CASES.values()} == {"array", "constant", "visible"}
    assert {case.visible for case in CASES.values()} == {"bidirectional", "causal", "unilm"}
    # Of every divisor one text is padded, and one is read in its order.
    for divisor in ("array", "constant", "visible"):
        cases = [case for case in CASES.values() if case.config.divisor == divisor]
        assert any(case.mask is not None and case.visible == "bidirectional" for case in cases)
        assert any(case.visible == "causal" for case in cases)


def test_divisors_are_one_where_they_count_the_same():
    case = CASES["positions"].with_(mask=None)
    made = {}
    for divisor, length in (("array", 0), ("constant", 11), ("visible", 0)):
        made[divisor] = states(case, config=dataclasses.replace(case.config, divisor=divisor, length=length))[-1]
    np.testing.assert_allclose(made["constant"], made["array"], rtol=0, atol=0)
    np.testing.assert_allclose(made["visible"], made["array"], rtol=1e-13)
    # One token alone is divided by 1.
    made = [
        states(case.tokens(0, 1), config=dataclasses.replace(case.config, divisor=divisor, length=length))[-1]
        for divisor, length in (("array", 0), ("constant", 1))
    ]
    np.testing.assert_array_equal(*made)
    # And three where they do not.
    padded = case.with_(mask=_encoder.MASK)
    made = [
        states(padded, config=dataclasses.replace(case.config, divisor=divisor, length=length))[-1][1]
        for divisor, length in (("array", 0), ("constant", 3), ("visible", 0))
    ]
    assert all(np.abs(made[i] - made[j]).max() > 1e-3 for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("name", CASES)
def test_c5_what_counts_the_array_is_moved_by_padding_and_nothing_else_is(name):
    def broken(law):
        try:
            law(judge.model, CASES[name], judge.reference, FLOAT64)
        except LawFailed as told:
            return f"law {law.__name__}" in str(told)
        return False

    counts = CASES[name].config.divisor == "array"
    assert broken(_encoder.padding) == counts == (not judge.blind_to_padding(CASES[name]))
    if CASES[name].visible == "causal":
        assert broken(_encoder.prefix) == counts
    held = {law.__name__ for law in judge.laws(CASES[name])}
    assert ("padding" in held) == ("prefix" in held) == (not counts)


@pytest.mark.parametrize("name", ["padded", "causal", "array, padded"])
def test_c6_only_differences_of_positions_enter(name):
    case = CASES[name]
    implied = states(case)
    for positions in (np.arange(11), np.arange(11) + 300, np.tile(np.arange(11), (4, 1))):
        for one, other in zip(states(case, positions=positions), implied, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-11)
    rows = np.stack([np.arange(11) * step for step in (1, 2, 3, 4)])
    moved = states(case, positions=rows)[-1]
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(states(case, positions=row)[-1][i], moved[i])
    assert np.abs(moved - implied[-1])[3].max() > 1e-4


def test_c7_without_masks_every_token_is_real_and_of_segment_0():
    ids = np.zeros((2, 5), int)
    explicit = states(PADDED, token_ids=ids, segment_ids=np.zeros((2, 5), int), mask=np.ones((2, 5), bool))
    for one, other in zip(explicit, states(PADDED, token_ids=ids, segment_ids=None, mask=None), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["causal", "constant, causal"])
@pytest.mark.parametrize("sizes", [(11,), (1,) * 11, (4, 0, 5, 2)])
def test_a_text_in_pieces_is_the_text_in_the_whole(name, sizes):
    case = CASES[name]
    state, pieces, start = flash_quad.initial_state(case.config, batch=(4,)), [], 0
    for size in sizes:
        at, before = (..., slice(start, start + size)), state
        inputs = (case.token_ids[at], case.segment_ids[at], case.mask[at])
        made, state = flash_quad.step(case.weights, state, *inputs, config=case.config)
        # The given state is what it was: a text may be continued in two ways.
        again, _ = flash_quad.step(case.weights, before, *inputs, config=case.config)
        np.testing.assert_array_equal(again[-1], made[-1])
        assert before.tokens == start and before.layers[1].k.shape == (4, start, 4)
        pieces.append(made)
        start += size
    for one, parts in zip(states(case), zip(*pieces, strict=True), strict=True):
        np.testing.assert_allclose(np.concatenate(parts, axis=1), one, rtol=1e-12, atol=1e-13)


def test_what_counts_tokens_to_come_is_not_read_in_pieces():
    case = CASES["array, causal"]
    message = "expected the divisor visible or constant, since no token may read a later one, received divisor='array'"
    with pytest.raises(DomainError, match=f"flash_quad.initial_state: {message}"):
        flash_quad.initial_state(case.config, batch=(4,))
    state = flash_quad.initial_state(CASES["causal"].config, batch=(4,))
    with pytest.raises(DomainError, match=f"flash_quad.step: {message}"):
        flash_quad.step(case.weights, state, case.token_ids, config=case.config)
    other = CASES["causal"]
    with pytest.raises(ShapeError, match=r"flash_quad.step: expected a state of the texts \(3,\)"):
        flash_quad.step(other.weights, state, other.token_ids[:3], config=other.config)
    with pytest.raises(DomainError, match="flash_quad.step: expected a state of initial_state"):
        flash_quad.step(other.weights, (0, state.layers), other.token_ids, config=other.config)


@pytest.mark.parametrize("divisor", ["array", "visible", "constant"])
@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (3,)])
def test_texts_without_tokens_batches_without_texts_and_a_text_alone(divisor, shape):
    config = dataclasses.replace(PADDED.config, divisor=divisor, length=3 * (divisor == "constant"))
    made = states(PADDED, config=config, token_ids=np.ones(shape, int), segment_ids=None, mask=None)
    assert [x.shape for x in made] == [(*shape, 5)] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"divisor": "constant"}, "expected length >= 1, received length=0"),
        ({"divisor": "constant", "length": -2}, "expected length >= 1, received length=-2"),
        ({"divisor": "array", "length": 512}, "expected length 0 with divisor array, received length=512"),
        ({"length": -1}, "expected length 0 with divisor visible, received length=-1"),
        ({"length": 1.0}, "expected length of type int, received length=1.0"),
        ({"divisor": "sequence"}, "expected divisor one of 'array', 'constant', 'visible', received divisor='sequ"),
        ({"kernel": "softmax"}, "expected kernel one of 'squared_relu', 'laplace', received kernel='softmax'"),
        ({"rotation": None}, "expected rotation one of 'interleaved', 'half_split', received rotation=None"),
        ({"key_size": 3}, "expected an even key_size"),
        ({"layers": 0}, "expected layers >= 1"),
        ({"epsilon": -1e-9}, "expected epsilon >= 0"),
        ({"rotary_base": 0.0}, "expected rotary_base > 0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, message):
    with pytest.raises(DomainError) as raised:
        dataclasses.replace(PADDED.config, **changes)
    assert str(raised.value).startswith("flash_quad.Config: ") and message in str(raised.value)


def test_nothing_has_a_default():
    fields = dataclasses.fields(flash_quad.Config)
    assert all(field.default is field.default_factory is dataclasses.MISSING for field in fields)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"token_ids": PADDED.token_ids + 29}, DomainError, "expected token_ids from 0 to 28 (vocab_size 29)"),
        ({"segment_ids": PADDED.segment_ids - 1}, DomainError, "expected segment_ids from 0 to 2 (segments 3)"),
        ({"mask": np.ones((4, 11))}, DomainError, "mask must be boolean"),
        ({"mask": np.ones((3, 11), bool)}, ShapeError, "of one shape"),
        ({"positions": np.arange(11.0)}, DomainError, "positions must be integers"),
        ({"positions": np.zeros((1, 11), int)}, ShapeError, "positions (n,) or (..., n)"),
        ({"weights": {**PADDED.weights, "layers.0.beta_q": np.ones(3)}}, ShapeError, "0.beta_q of shape (4,)"),
        ({"weights": {**PADDED.weights, "layers.0.b_out": np.full(5, np.nan)}}, DomainError, "layers.0.b_out"),
        ({"config": dataclasses.replace(PADDED.config, layers=4)}, ShapeError, "missing: layers.3.b_in, layers.3"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes, error, message):
    with pytest.raises(error) as raised:
        states(PADDED, **changes)
    assert message in str(raised.value) and str(raised.value).startswith("flash_quad.hidden_states: ")
