"""GAU-α: a model worked out by hand, the published size, its clauses, and every refusal."""

import dataclasses
import math
import pathlib

import numpy as np
import pytest

from conformance.budget import Profile
from conformance.models import _encoder
from conformance.models import gau_alpha as judge
from refimpl import bundle, model
from refimpl.check import DomainError, ShapeError
from refimpl.models import _encoder as specified
from refimpl.models import _heads, gau_alpha
from refimpl.ops import gau, norm, rope
from tests.golden import originals

GOLDEN = pathlib.Path(originals.__file__).parent
FLOAT64 = Profile("float64", "strict", "A64")
CASES = {case.name: case for case in judge.cases()}
PADDED = CASES["padded"]


def states(case, **changes):
    case = case.with_(**changes)
    inputs = case.token_ids, case.segment_ids, case.mask, case.positions
    visible = getattr(specified, case.visible)
    return gau_alpha.hidden_states(case.weights, *inputs, config=case.config, visible=visible)


def test_one_token_and_one_layer_by_hand():
    config = gau_alpha.Config(
        vocab_size=2, hidden_size=2, layers=1, expanded_size=1, key_size=2, segments=1,
        n_min=1, epsilon=0.0, rotary_base=10000.0,
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
    }
    g = (0.75 * log3) ** 2
    assert g == pytest.approx(0.678909, abs=1e-6)
    a, b = 0.2 + g, 1.4 - 2 * g
    root = math.sqrt((a * a + b * b) / 2)
    embedded, last = gau_alpha.hidden_states(weights, np.array([[1]]), config=config)
    np.testing.assert_allclose(embedded, [[[0.2, 1.4]]], rtol=1e-15)
    np.testing.assert_allclose(last, [[[a / root, b / root]]], rtol=1e-13)


# The originals. Float64 figures agree to some units of 2^-53, float32 figures to what that leaves after three layers.
DOUBLE, SINGLE = 1e-12, 5e-6
SIZES = {"b4k_gau_alpha": (120, 16), "jy_gau_alpha": (118, 16)}


def of_folder(folder, dialect, **changes):
    vocabulary, key_size = SIZES[folder]
    sizes = {"vocab_size": vocabulary, "segments": 2, "hidden_size": 48, "layers": 3, "expanded_size": 96}
    return gau_alpha.dialect(dialect, **{**sizes, "key_size": key_size, **changes})


def tied(encoder, config):
    return lambda hidden: _heads.masked_lm_tied({}, hidden, encoder["embedding.token"], config=config)


def test_every_array_of_bert4keras():
    original, config = originals.whole("b4k_gau_alpha"), of_folder("b4k_gau_alpha", "bert4keras-0.11.5")
    encoder = originals.weights_bert4keras(original, gau_alpha.shapes(config))
    read = originals.gau_reader(encoder, config)
    got = originals.gau_of_bert4keras(read, tied(encoder, config), config, encoder, original.double)
    errors = originals.errors(got, original.double)
    assert len(errors) == 20 and max(errors.values()) < DOUBLE, errors
    errors = originals.errors(got, original.single)
    assert max(errors.values()) < SINGLE, errors


def test_its_own_files_hold_the_same_weights():
    original = originals.whole("b4k_gau_alpha")
    variables = bundle.read(originals.WHOLE / "b4k_gau_alpha" / "bert_model.ckpt")
    assert variables.keys() >= original.weights.keys()
    for name, array in original.weights.items():
        np.testing.assert_array_equal(variables[name], array)


def test_every_array_of_junnyu():
    original, config = originals.whole("jy_gau_alpha"), of_folder("jy_gau_alpha", "junnyu")
    encoder = originals.weights_torch(original, gau_alpha.shapes(config), originals.TORCH_GAU_ALPHA)
    read = originals.gau_reader(encoder, config)
    got = originals.gau_of_junnyu(read, tied(encoder, config), original.double)
    errors = originals.errors(got, original.double)
    # Here alone the original kept sines and cosines in float32.
    tables = [errors.pop(name) for name in list(errors) if "float32tables" in name]
    assert max(errors.values()) < DOUBLE, errors
    assert len(tables) == 2 and all(1e-9 < error < 2e-7 for error in tables)
    errors = originals.errors(got, original.single)
    assert max(errors.values()) < SINGLE, errors


def test_the_kept_part_of_bert4keras_model():
    original, config = originals.copy("b4k_gau_alpha_edge"), of_folder("b4k_gau_alpha", "bert4keras-0.11.5")
    variables = bundle.read(GOLDEN / "bundle" / "gau_alpha" / "bert_model.ckpt")
    encoder = originals.weights_bert4keras(original._replace(weights=variables), gau_alpha.shapes(config))
    read = originals.gau_reader(encoder, config)
    got = originals.gau_of_bert4keras(read, tied(encoder, config), config, encoder, original.double)
    errors = originals.errors(got, original.double)
    assert len(errors) == 10 and max(errors.values()) < DOUBLE, errors
    # Epsilon and the floor, where queries see few keys, show each.
    ids, segments = (original.double[f"edge/{name}"] for name in ("token_ids", "segment_ids"))
    mask = specified.mask_from_ids_bert4keras(ids)
    assert mask.sum(axis=1).tolist() == [25, 18, 1]
    old = dataclasses.replace(of_folder("b4k_gau_alpha", "bert4keras-0.11.3"), epsilon=1e-7)
    found = read(ids, segments, mask, config=old)[-1]
    assert np.abs(found - original.double["0.11.3/edge_last_hidden_state"]).max() > 1e-9
    ids, segments = (original.double[f"io/{name}"] for name in ("token_ids", "segment_ids"))
    old = of_folder("b4k_gau_alpha", "bert4keras-0.11.4")
    found = read(ids, segments, ids != 0, visible="causal", config=old)[-1]
    assert np.abs(found - original.double["io/lm_last_hidden_state"]).max() > 1e-3


def test_the_kept_part_of_junnyus_model():
    original = originals.copy("jy_gau_alpha")
    config = of_folder("jy_gau_alpha", "junnyu", layers=1)
    encoder = originals.weights_torch(original, gau_alpha.shapes(config), originals.TORCH_GAU_ALPHA)
    got = originals.gau_of_junnyu(originals.gau_reader(encoder, config), tied(encoder, config), original.double)
    errors = originals.errors(got, original.double)
    assert len(errors) == 3 and max(errors.values()) < DOUBLE, errors


def test_the_published_size():
    # 24 (768 (2·1536 + 128) + 1536·768 + 2·128) + 12000·768 + 2·768, the figure of the released model.
    assert 24 * (768 * 3200 + 1536 * 768 + 256) + 12000 * 768 + 2 * 768 == 96_517_632
    for name in gau_alpha.DIALECTS:
        assert gau_alpha.parameters(gau_alpha.dialect(name, **gau_alpha.SIZES["base"])) == 96_517_632
    # The head of the release is tied and has no weights of its own.
    whole = model.Model(gau_alpha.dialect("junnyu", **gau_alpha.SIZES["base"]), (_heads.TiedLM(),), "bidirectional")
    assert model.parameters(whole) == 96_517_632


def test_dialects_agree_and_differ_as_documented():
    made = {name: gau_alpha.dialect(name, **gau_alpha.SIZES["base"]) for name in gau_alpha.DIALECTS}
    constants = {name: (config.epsilon, config.n_min, config.rotary_base) for name, config in made.items()}
    assert constants == {
        "bert4keras-0.11.3": (1e-12, 1, 10000.0),
        "bert4keras-0.11.4": (1e-7, 1, 10000.0),
        "bert4keras-0.11.5": (1e-7, 16, 10000.0),
        "junnyu": (1e-12, 1, 10000.0),
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("bert4keras", {}), "gau_alpha.dialect: expected one of bert4keras-0.11.3, .*, junnyu, received name='bert4"),
        (("huggingface", {}), "gau_alpha.dialect: expected one of"),
        (("junnyu", {"n_min": 16}), "gau_alpha.dialect: expected sizes only, since junnyu fixes .*'n_min'"),
        (("junnyu", {"labels": 2}), 'gau_alpha.Config: unknown key "labels"'),
    ],
)
def test_a_dialect_is_named_and_fixes_its_constants(call, message):
    name, changes = call
    with pytest.raises(DomainError, match=message):
        gau_alpha.dialect(name, **gau_alpha.SIZES["base"], **changes)


def test_names_and_shapes():
    config = dataclasses.replace(PADDED.config, layers=1)
    assert gau_alpha.shapes(config) == {
        "embedding.token": (29, 5),
        "embedding.segment": (3, 5),
        "layers.0.w_in": (5, 18),
        "layers.0.gamma_q": (4,),
        "layers.0.gamma_k": (4,),
        "layers.0.w_out": (7, 5),
    }
    assert gau_alpha.parameters(config) == 145 + 15 + 90 + 4 + 4 + 35
    # The formula of the docstring.
    assert gau_alpha.parameters(PADDED.config) == (29 + 3) * 5 + 3 * (5 * (3 * 7 + 4) + 2 * 4)


def test_hidden_states_are_the_embedding_and_every_layer():
    case = PADDED
    found = states(case)
    assert len(found) == 1 + case.config.layers
    token, segment = case.weights["embedding.token"], case.weights["embedding.segment"]
    expected = norm.rms_norm(token[case.token_ids] + segment[case.segment_ids], epsilon=case.config.epsilon)
    np.testing.assert_array_equal(found[0], expected)
    # Fewer layers give the first of them.
    fewer = {name: array for name, array in case.weights.items() if not name.startswith("layers.2")}
    shorter = states(case, weights=fewer, config=dataclasses.replace(case.config, layers=2))
    for one, other in zip(shorter, found[:-1], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", CASES)
def test_the_derivation_in_balls_agrees(name):
    assert _encoder.worst(judge.model, judge.reference, CASES[name], FLOAT64) <= 0.1


@pytest.mark.parametrize("visible", ["bidirectional", "causal", "unilm"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_c2_padding_may_stand_on_either_side(visible, side):
    case = CASES["unilm"].rows(slice(0, 1)).with_(visible=visible)
    extra = {"token_ids": [[7, 3, 1]], "segment_ids": [[0, 0, 0]], "mask": np.zeros((1, 3), bool)}
    held = {"token_ids": case.token_ids, "segment_ids": case.segment_ids, "mask": case.real}
    order = (lambda e, h: [e, h]) if side == "left" else (lambda e, h: [h, e])
    longer = {name: np.concatenate(order(extra[name], held[name]), axis=1) for name in held}
    inner = slice(3, None) if side == "left" else slice(0, 11)
    for one, other in zip(states(case, **longer), states(case), strict=True):
        np.testing.assert_allclose(one[:, inner], other, rtol=1e-12, atol=1e-12)


def test_c1_the_visible_keys_of_each_query_are_counted():
    # The first query of a causal model sees one key: weight 1, whatever n_min; the second two of them, scaled by ln 2.
    case = CASES["causal"].rows(slice(0, 1)).with_(config=dataclasses.replace(CASES["causal"].config, layers=1))
    case = case.with_(weights={k: v for k, v in case.weights.items() if not k.startswith("layers.1")})
    weights = {name.removeprefix("layers.0."): array for name, array in case.weights.items()}
    x = states(case)[0][0]
    u, v, z = gau.parts(x, weights["w_in"], None, key_width=4)
    angles = rope.angles(np.arange(11), rope.frequencies(4, base=10000.0))
    q, k = (rope.rotate_interleaved(z * weights[f"gamma_{name}"], angles) for name in "qk")
    for query in (0, 1, 4):
        scores = k[: query + 1] @ q[query] / 2 * math.log(query + 1) / math.log(512)
        share = np.exp(scores) / np.exp(scores).sum()
        y = x[query] + (u[query] * (share @ v[: query + 1])) @ weights["w_out"]
        expected = y / math.sqrt((y * y).mean() + case.config.epsilon)
        np.testing.assert_allclose(states(case)[-1][0, query], expected, rtol=1e-12)


def test_c2_a_shift_of_all_positions_changes_nothing_and_other_positions_do():
    implied = states(PADDED)
    for positions in (np.arange(11), np.arange(11) - 500, np.tile(np.arange(11), (4, 1))):
        for one, other in zip(states(PADDED, positions=positions), implied, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-11)
    for positions in (2 * np.arange(11), np.arange(11)[::-1]):
        assert np.abs(states(PADDED, positions=positions)[-1] - implied[-1])[0].max() > 1e-4


def test_c3_without_masks_every_token_is_real_and_of_segment_0():
    ids = np.zeros((2, 3), int)
    explicit = states(PADDED, token_ids=ids, segment_ids=np.zeros((2, 3), int), mask=np.ones((2, 3), bool))
    for one, other in zip(explicit, states(PADDED, token_ids=ids, segment_ids=None, mask=None), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["padded", "causal", "unilm"])
def test_one_text_needs_no_batch_axis_and_may_be_empty(name):
    case = CASES[name]
    alone = states(case, token_ids=case.token_ids[1], segment_ids=case.segment_ids[1], mask=case.mask[1])
    for one, many in zip(alone, states(case), strict=True):
        np.testing.assert_allclose(one, many[1], rtol=1e-13)
    two = {key: getattr(case, key).reshape(2, 2, 11) for key in ("token_ids", "segment_ids", "mask")}
    np.testing.assert_allclose(states(case, **two)[-1], states(case)[-1].reshape(2, 2, 11, 5), rtol=1e-13)
    empty = states(case, token_ids=np.zeros((2, 0), int), segment_ids=None, mask=None)
    assert {state.shape for state in empty} == {(2, 0, 5)}


def test_weights_are_not_changed_and_float32_weights_will_do():
    kept = {name: array.copy() for name, array in PADDED.weights.items()}
    half = states(PADDED, weights={name: array.astype(np.float32) for name, array in PADDED.weights.items()})
    np.testing.assert_array_equal(half[-1], states(PADDED)[-1])
    assert half[-1].dtype == np.float64
    assert all(np.array_equal(kept[name], PADDED.weights[name]) for name in kept)


def test_a_silent_layer_is_its_norm():
    # With W_out = 0 a layer is the norm alone, and a normalised row is its own norm.
    weights = {name: 0 * array if "w_out" in name else array for name, array in PADDED.weights.items()}
    found = states(PADDED, weights=weights)
    np.testing.assert_allclose(found[-1], found[0], rtol=1e-11)


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
        ({"positions": np.arange(11.0)}, DomainError, "positions must be integers, received dtype float64"),
        ({"positions": np.arange(10)}, ShapeError, "positions (n,) or (..., n), received positions of shape (10,)"),
        ({"weights": {}}, ShapeError, "expected 14 weights, missing: embedding.segment, embedding.token, layers.0."),
        ({"weights": {**WEIGHTS, "pooler": IDS}}, ShapeError, "missing: none, unknown: pooler"),
        (
            {"weights": {**WEIGHTS, "layers.1.w_out": WEIGHTS["layers.1.w_out"].T}}, ShapeError,
            "gau_alpha.hidden_states: expected layers.1.w_out of shape (7, 5), received layers.1.w_out of shape (5, 7)",
        ),
        (
            {"weights": {**WEIGHTS, "layers.2.gamma_k": np.full(4, np.nan)}}, DomainError,
            "layers.2.gamma_k must be finite",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes, error, message):
    with pytest.raises(error) as raised:
        states(PADDED, **changes)
    assert message in str(raised.value) and str(raised.value).startswith("gau_alpha.hidden_states: ")
