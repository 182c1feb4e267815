"""RoFormer: a model worked out by hand, the original implementations, dialects, sizes, and every refusal.

The laws that RoFormerV2 shares are tested on both models here.
"""

import dataclasses
import math

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from refimpl import config as configurations
from refimpl.check import DomainError, ShapeError
from refimpl.models import _encoder, _heads, roformer, roformer_v2
from refimpl.ops import attention, norm
from tests.golden import originals

# Float64 figures agree to some units of 2^-53; float32 figures to what float32 leaves after three layers.
DOUBLE, SINGLE = 1e-12, 5e-6
SIZES = {
    "b4k_roformer": (120, 2, 48, 48, 3, 4, 96),
    "b4k_roformer_emb": (117, 2, 32, 64, 2, 4, 160),
    "jy_roformer": (115, 2, 32, 48, 2, 4, 96),
    "hf_roformer": (112, 2, 48, 48, 2, 3, 80),
}
NAMES = ("vocab_size", "segments", "embedding_size", "hidden_size", "layers", "heads", "intermediate_size")


def of_folder(folder, dialect):
    return roformer.dialect(dialect, **dict(zip(NAMES, SIZES[folder], strict=True)))


def masked_lm(original, weights, config):
    """The encoder's weights and its masked-language head, as functions of hidden states."""
    encoder = weights(original, roformer.shapes(config))
    head = weights(original, _heads.TransformedLM().shapes(config))
    table = encoder["embedding.token"]
    return encoder, head, lambda hidden, config: _heads.masked_lm_transformed(head, hidden, table, config=config)


def test_one_token_and_one_layer_by_hand():
    # With epsilon 9, layer_norm((a, b)) is (0.8, -0.8) wherever (a - b) / 2 = 4.
    config = roformer.Config(
        vocab_size=2, segments=1, embedding_size=2, hidden_size=2, layers=1, heads=1, intermediate_size=1,
        activation="gelu_erf", epsilon=9.0, mlm_epsilon=0.0, rotary_base=10000.0,
    )  # fmt: skip
    eye = np.eye(2)
    weights = {
        # (8, 0) becomes (0.8, -0.8), scaled and shifted (5, -8).
        "embedding.token": np.array([[9.0, 9.0], [7.0, -1.0]]),
        "embedding.segment": np.array([[1.0, 1.0]]),
        "embedding.norm.scale": np.array([5.0, 10.0]),
        "embedding.norm.bias": np.array([1.0, 0.0]),
        # One token attends to itself: v = (5, -3), o = (1, 6), and the sum (6, -2) becomes (1, 1).
        "layers.0.attention.w_q": eye,
        "layers.0.attention.b_q": np.array([3.0, 1.0]),
        "layers.0.attention.w_k": -eye,
        "layers.0.attention.b_k": np.array([0.0, 2.0]),
        "layers.0.attention.w_v": np.array([[1.0, 0.0], [0.0, 0.5]]),
        "layers.0.attention.b_v": np.array([0.0, 1.0]),
        "layers.0.attention.w_o": np.array([[1.0, 0.0], [0.0, -1.0]]),
        "layers.0.attention.b_o": np.array([-4.0, 3.0]),
        "layers.0.attention_norm.scale": np.array([1.0, 1.0]),
        "layers.0.attention_norm.bias": np.array([0.2, 1.8]),
        # gelu(1 + 2 - 1) = 2 Φ(2), and the sum is (1 + 2 Φ(2), 0).
        "layers.0.feed_forward.w_in": np.array([[1.0], [2.0]]),
        "layers.0.feed_forward.b_in": np.array([-1.0]),
        "layers.0.feed_forward.w_out": np.array([[1.0, 0.0]]),
        "layers.0.feed_forward.b_out": np.array([0.0, -1.0]),
        "layers.0.feed_forward_norm.scale": np.array([2.0, 4.0]),
        "layers.0.feed_forward_norm.bias": np.array([0.0, 1.0]),
    }
    g = 1 + math.erf(math.sqrt(2))
    assert g == pytest.approx(2 * 0.9772498680518208)
    half = (1 + g) / 2
    y = half / math.sqrt(half * half + 9)
    embedded, last = roformer.hidden_states(weights, np.array([[1]]), config=config)
    np.testing.assert_allclose(embedded, [[[5, -8]]], rtol=1e-14)
    np.testing.assert_allclose(last, [[[2 * y, 1 - 4 * y]]], rtol=1e-14)
    steps = roformer.layer(
        _encoder.layer_of(weights, 0), embedded, np.ones((1, 1, 1), bool), np.zeros(1), config=config
    )
    np.testing.assert_allclose(np.concatenate(steps[:3]), [[[1, 6]], [[1, 1]], [[g, -1]]], rtol=1e-14)


@pytest.mark.parametrize("folder", ["b4k_roformer", "b4k_roformer_emb"])
def test_every_array_of_bert4keras(folder):
    original, config = originals.whole(folder), of_folder(folder, "bert4keras-0.11.5")
    encoder, head, logits = masked_lm(original, originals.weights_bert4keras, config)
    got = originals.of_bert4keras(roformer, config, encoder, logits, original.double)
    last = got["io/last_hidden_state"]
    got["io/mlm_transform"] = _heads.masked_lm_transform(head, last, config=config)
    if folder == "b4k_roformer_emb":
        weights = originals.weights_bert4keras(original, _heads.Pooler("tanh").shapes(config))
        got["io/pooler_output"] = _heads.pooler_tanh(weights, last, config=config)
        weights = originals.weights_bert4keras(original, _heads.NextSentence().shapes(config))
        got["io/nsp_proba"] = originals.softmax(_heads.next_sentence(weights, got["io/pooler_output"], config=config))
        got["io/embedding_norm"] = without_mapping(config, encoder, original.double)
    errors = originals.errors(got, original.double)
    assert max(errors.values()) < DOUBLE, errors
    errors = originals.errors(got, original.single)
    assert max(errors.values()) < SINGLE, errors


@pytest.mark.parametrize(("folder", "dialect"), [("jy_roformer", "junnyu"), ("hf_roformer", "huggingface")])
def test_every_array_of_the_torch_ports(folder, dialect):
    original, config = originals.whole(folder), of_folder(folder, dialect)
    encoder, _, logits = masked_lm(original, originals.weights_torch, config)
    got = originals.of_torch(roformer, config, encoder, logits, original.double)
    errors = originals.errors(got, original.double)
    # Here alone the original kept sines and cosines in float32.
    tables = [errors.pop(name) for name in list(errors) if "float32tables" in name]
    assert max(errors.values()) < DOUBLE, errors
    assert all(1e-9 < error < 2e-7 for error in tables)
    errors = originals.errors(got, original.single)
    assert max(errors.values()) < SINGLE, errors


def test_the_kept_part_of_junnyus_model():
    original, config = originals.copy("jy_roformer"), of_folder("jy_roformer", "junnyu")
    encoder, _, logits = masked_lm(original, originals.weights_torch, config)
    errors = originals.errors(originals.of_torch(roformer, config, encoder, logits, original.double), original.double)
    assert len(errors) == 6 and max(errors.values()) < DOUBLE, errors


def test_the_kept_part_of_bert4keras_model():
    original = originals.copy("b4k_roformer")
    config = dataclasses.replace(of_folder("b4k_roformer", "bert4keras-0.11.5"), layers=1)
    embedding = {name: shape for name, shape in roformer.shapes(config).items() if name.startswith("embedding")}
    encoder = {**random_weights(config), **originals.weights_bert4keras(original, embedding)}
    head = originals.weights_bert4keras(original, _heads.TransformedLM().shapes(config))
    ids, segments, last = (original.double[f"io/{name}"] for name in ("token_ids", "segment_ids", "last_hidden_state"))

    def errors(config):
        return originals.errors(
            {
                "io/hidden_0": roformer.hidden_states(encoder, ids, segments, config=config)[0],
                "io/last_hidden_state": last,
                "io/mlm_transform": _heads.masked_lm_transform(head, last, config=config),
                "io/mlm_logits": _heads.masked_lm_transformed(head, last, encoder["embedding.token"], config=config),
            },
            original.double,
        )

    assert max(errors(config).values()) < DOUBLE
    # Both epsilons show: 1e-12 in every norm is the dialect of 0.11.3, 1e-7 in the head is nobody's.
    assert errors(dataclasses.replace(config, epsilon=1e-12))["io/hidden_0"] > 1e-9
    assert errors(dataclasses.replace(config, mlm_epsilon=1e-7))["io/mlm_logits"] > 1e-9


def test_the_kept_part_with_an_embedding_of_another_width():
    original, config = originals.copy("b4k_roformer_emb"), of_folder("b4k_roformer_emb", "bert4keras-0.11.5")
    config = dataclasses.replace(config, layers=1)
    embedding = {name: shape for name, shape in roformer.shapes(config).items() if name.startswith("embedding")}
    encoder = {**random_weights(config), **originals.weights_bert4keras(original, embedding)}
    arrays = original.double
    got = {
        "io/embedding_norm": without_mapping(config, encoder, arrays),
        "io/hidden_0": roformer.hidden_states(encoder, arrays["io/token_ids"], arrays["io/segment_ids"], config=config)[
            0
        ],
        "io/last_hidden_state": arrays["io/last_hidden_state"],
    }
    weights = originals.weights_bert4keras(original, _heads.Pooler("tanh").shapes(config))
    got["io/pooler_output"] = _heads.pooler_tanh(weights, arrays["io/last_hidden_state"], config=config)
    weights = originals.weights_bert4keras(original, _heads.NextSentence().shapes(config))
    got["io/nsp_proba"] = originals.softmax(_heads.next_sentence(weights, got["io/pooler_output"], config=config))
    errors = originals.errors(got, arrays)
    assert max(errors.values()) < DOUBLE, errors


def without_mapping(config, encoder, arrays):
    """The embedding of a model of hidden_size = embedding_size, which maps nothing."""
    narrow = dataclasses.replace(config, hidden_size=config.embedding_size)
    tables = {name: encoder[name] for name in roformer.shapes(narrow) if name.startswith("embedding")}
    weights = {**random_weights(narrow), **tables}
    return roformer.hidden_states(weights, arrays["io/token_ids"], arrays["io/segment_ids"], config=narrow)[0]


def test_dialects_agree_and_differ_as_documented():
    made = {name: roformer.dialect(name, **roformer.SIZES["base-char"]) for name in roformer.DIALECTS}
    assert made["bert4keras-0.11.3"] == made["junnyu"] == made["huggingface"]
    assert made["bert4keras-0.11.4"] == made["bert4keras-0.11.5"]
    new, old = made["bert4keras-0.11.5"], made["junnyu"]
    assert (new.epsilon, new.mlm_epsilon) == (1e-7, 1e-12) and (old.epsilon, old.mlm_epsilon) == (1e-12, 1e-12)
    assert dataclasses.replace(new, epsilon=1e-12) == old
    assert (new.activation, new.rotary_base, new.key_size) == ("gelu_erf", 10000.0, 64)


def test_the_published_sizes():
    # 12 layers of 4 · 768² + 2 · 768 · 3072 in kernels and 9 · 768 + 3072 in vectors; tables, and the norm on them.
    layers = 12 * (12 * 768**2 + 9 * 768 + 3072)
    assert layers == 85_054_464
    for name, tables in (("base-char", 12004 * 768), ("base-word", 50004 * 768)):
        config = roformer.dialect("huggingface", **roformer.SIZES[name])
        assert roformer.parameters(config) == layers + tables
    assert layers + 50004 * 768 == 123_457_536


# The laws of both models.

COMMON = {
    "vocab_size": 23, "segments": 2, "embedding_size": 6, "hidden_size": 12, "layers": 3, "heads": 3,
    "intermediate_size": 7,
}  # fmt: skip
MODELS = {
    "roformer": (roformer, roformer.dialect("junnyu", **COMMON)),
    "roformer_v2": (roformer_v2, roformer_v2.dialect("bert4keras-0.11.3", **COMMON)),
}
both = pytest.mark.parametrize("name", MODELS)


def random_weights(config, seed=1):
    model = MODELS[config.model][0] if config.model in MODELS else roformer
    rng = np.random.default_rng(seed)
    weights = {name: rng.normal(0, 0.6, shape) for name, shape in model.shapes(config).items()}
    return {name: 1 + array / 3 if name.endswith("scale") else array for name, array in weights.items()}


def text(batch=4, n=9, seed=2):
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, COMMON["vocab_size"], (batch, n))
    segments = (np.arange(n) >= rng.integers(3, n - 2, (batch, 1))).astype(int)
    return ids, segments


def read(name, ids, segments=None, mask=None, positions=None, **options):
    model, config = MODELS[name]
    weights = options.pop("weights", random_weights(config))
    return model.hidden_states(weights, ids, segments, mask, positions, config=config, **options)


def same(got, expected):
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


@both
@pytest.mark.parametrize("visible", [_encoder.bidirectional, _encoder.causal, _encoder.unilm])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("side", ["right", "left"])
def test_c3_padding_on_either_side_changes_nothing(name, visible, batch, side):
    ids, segments = text(batch)
    n, real = ids.shape[1], [9, 4, 1, 6][:batch]
    short = [slice(0, k) for k in real]
    expected = [read(name, ids[i, row], segments[i, row], visible=visible) for i, row in enumerate(short)]
    places = [slice(0, k) if side == "right" else slice(n + 3 - k, n + 3) for k in real]
    padded_ids, padded_segments = text(batch, n + 3, seed=9)
    # Padding of segment 0, as every tokenizer has it: for unilm, padding of segment 1 would count.
    padded_segments, mask = padded_segments * 0, np.zeros(padded_ids.shape, bool)
    for i, (row, place) in enumerate(zip(short, places, strict=True)):
        padded_ids[i, place], padded_segments[i, place], mask[i, place] = ids[i, row], segments[i, row], True
    for positions in (None, attention.positions_from_mask(mask)):
        got = read(name, padded_ids, padded_segments, mask, positions, visible=visible)
        for i, place in enumerate(places):
            same([state[i, place] for state in got], expected[i])


@both
def test_c2_a_causal_model_does_not_see_what_follows_to_the_bit(name):
    ids, segments = text()
    other = ids.copy()
    other[:, 5] = other[:, 5] % 22 + 1
    one, two = (read(name, changed, segments, visible=_encoder.causal) for changed in (ids, other))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a[:, :5], b[:, :5])
        assert (a[:, 5] != b[:, 5]).any(axis=-1).all()
    assert np.abs(one[-1][:, 6:] - two[-1][:, 6:]).max(axis=(1, 2)).min() > 1e-3


@both
def test_c2_unilm_sees_segment_0_whole_and_segment_1_causally(name):
    ids = np.arange(1, 9)[None]
    segments = np.array([[0, 0, 0, 0, 1, 1, 1, 1]])
    base = read(name, ids, segments, visible=_encoder.unilm)[-1][0]

    def changed_by(place):
        other = ids.copy()
        other[0, place] = 20
        return (read(name, other, segments, visible=_encoder.unilm)[-1][0] != base).any(axis=-1).tolist()

    assert changed_by(2) == [True] * 8
    assert changed_by(5) == [False] * 5 + [True] * 3


@both
def test_c2_every_real_token_is_seen_and_no_other(name):
    ids, segments = text(1)
    mask = np.arange(9) != 4
    base = read(name, ids, segments, mask[None])[-1][0]
    for place in range(9):
        other = ids.copy()
        other[0, place] = other[0, place] % 22 + 1
        moved = (np.abs(read(name, other, segments, mask[None])[-1][0] - base) > 1e-9).any(axis=-1)
        np.testing.assert_array_equal(moved, np.full(9, True) if mask[place] else np.arange(9) == place)


@both
def test_c2_a_text_of_padding_attends_to_nothing(name):
    # With nothing to see, a layer is that of a value of zeros: only the bias of its output is added.
    model, config = MODELS[name]
    weights = random_weights(config)
    ids, segments = text(1)
    got = read(name, ids, segments, np.zeros(ids.shape, bool))
    for i in range(config.layers):
        w = _encoder.layer_of(weights, i)
        steps = model.layer(w, got[i], np.zeros((1, 1, 9), bool), np.arange(9), config=config)
        expected = np.broadcast_to(w.get("attention.b_o", np.zeros(12)), got[i].shape)
        np.testing.assert_array_equal(steps.attention, expected)
        np.testing.assert_array_equal(steps.output, got[i + 1])


@both
@pytest.mark.parametrize("shift", [1, 500, -7])
def test_c3_a_shift_of_all_positions_changes_nothing(name, shift):
    ids, segments = text()
    implied = read(name, ids, segments)
    same(read(name, ids, segments, None, np.arange(9)), implied)
    got = read(name, ids, segments, None, np.arange(9) + shift)
    for one, other in zip(got, implied, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-10)
    # Per text too, and other differences give other vectors.
    same(read(name, ids, segments, None, np.tile(np.arange(9), (4, 1))), implied)
    for positions in (2 * np.arange(9), np.arange(9)[::-1], np.zeros(9, int)):
        assert np.abs(read(name, ids, segments, None, positions)[-1] - implied[-1]).max(axis=(1, 2)).min() > 1e-3


@both
def test_c4_without_masks_every_token_is_real_and_of_segment_0(name):
    ids = np.zeros((2, 3), int)
    explicit = read(name, ids, np.zeros((2, 3), int), np.ones((2, 3), bool))
    for one, other in zip(read(name, ids), explicit, strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.abs(read(name, ids, np.ones((2, 3), int))[-1] - explicit[-1]).max() > 1e-3


@both
def test_states_are_the_embedding_and_every_layer_in_turn(name):
    model, config = MODELS[name]
    ids, segments = text()
    weights = random_weights(config)
    states = read(name, ids, segments)
    assert len(states) == 1 + config.layers
    summed = weights["embedding.token"][ids] + weights["embedding.segment"][segments]
    if name == "roformer":
        vectors = weights["embedding.norm.scale"], weights["embedding.norm.bias"]
        embedded = norm.layer_norm(summed, *vectors, epsilon=config.epsilon)
        embedded = embedded @ weights["embedding.mapping.kernel"] + weights["embedding.mapping.bias"]
    else:
        embedded = norm.rms_norm(summed, epsilon=config.epsilon) @ weights["embedding.mapping.kernel"]
    np.testing.assert_allclose(states[0], embedded, rtol=1e-13)
    for i in range(config.layers):
        mask = np.ones((4, 1, 9), bool)
        steps = model.layer(_encoder.layer_of(weights, i), states[i], mask, np.arange(9), config=config)
        np.testing.assert_array_equal(steps.output, states[i + 1])
    if name == "roformer_v2":
        np.testing.assert_allclose((states[-1] ** 2).mean(axis=-1), 1, rtol=1e-9)


@both
def test_heads_do_not_mix_before_the_output_kernel(name):
    # Head 1 alone: its columns of the output kernel decide, and the other heads' queries do not.
    model, config = MODELS[name]
    w = dict(_encoder.layer_of(random_weights(config), 0))
    x = np.random.default_rng(3).normal(size=(1, 5, 12))
    rows = (np.arange(12) // 4 == 1)[:, None]
    w["attention.w_o"] = w["attention.w_o"] * rows
    one = model.layer(w, x, np.ones((1, 1, 5), bool), np.arange(5), config=config).attention
    w["attention.w_q"] = np.where(rows.T, w["attention.w_q"], 5.0)
    other = model.layer(w, x, np.ones((1, 1, 5), bool), np.arange(5), config=config).attention
    np.testing.assert_array_equal(one, other)


@both
def test_no_batch_axis_two_batch_axes_and_no_token(name):
    ids, segments = text()
    batch = read(name, ids, segments)
    same(read(name, ids[1], segments[1]), [state[1] for state in batch])
    same(read(name, ids.reshape(2, 2, 9), segments.reshape(2, 2, 9)), [s.reshape(2, 2, 9, 12) for s in batch])
    assert [state.shape for state in read(name, np.zeros((2, 0), int))] == [(2, 0, 12)] * 4


@both
def test_weights_are_not_changed_and_float32_weights_will_do(name):
    ids, _ = text()
    given = {key: array.astype(np.float32) for key, array in random_weights(MODELS[name][1]).items()}
    kept = {key: array.copy() for key, array in given.items()}
    got = read(name, ids, weights=given)
    assert {state.dtype for state in got} == {np.dtype(np.float64)}
    wide = {key: array.astype(np.float64) for key, array in given.items()}
    for one, other in zip(got, read(name, ids, weights=wide), strict=True):
        np.testing.assert_array_equal(one, other)
    assert all(np.array_equal(kept[key], given[key]) for key in kept)


@both
@pytest.mark.parametrize("activation", ["gelu_tanh", "relu", "silu", "gelu_erf"])
def test_the_activation_is_the_one_that_is_named(name, activation):
    x = np.random.default_rng(4).normal(size=(3, 12))
    model, config = MODELS[name]
    config = dataclasses.replace(config, activation=activation)
    w = _encoder.layer_of(random_weights(config), 0)
    z = x @ w["feed_forward.w_in"] + w.get("feed_forward.b_in", 0)
    phi = np.vectorize(lambda v: (1 + math.erf(v / math.sqrt(2))) / 2)
    cubic = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
    expected = {
        "gelu_erf": z * phi(z),
        "gelu_tanh": z * (1 + np.tanh(cubic)) / 2,
        "relu": np.maximum(z, 0),
        "silu": z / (1 + np.exp(-z)),
    }[activation] @ w["feed_forward.w_out"] + w.get("feed_forward.b_out", 0)
    np.testing.assert_allclose(_encoder.feed_forward(w, x, config), expected, rtol=1e-12, atol=1e-13)


def test_the_mask_that_bert4keras_derives():
    ids = np.array([[2, 5, 0, 7, 0], [0, 3, 0, 0, 0]])
    expected = [[True, True, False, True, False], [True, True, False, False, False]]
    np.testing.assert_array_equal(_encoder.mask_from_ids_bert4keras(ids), expected)
    np.testing.assert_array_equal(_encoder.mask_from_ids_bert4keras(ids[1]), expected[1])
    assert _encoder.mask_from_ids_bert4keras(np.zeros((2, 0), int)).shape == (2, 0)
    with pytest.raises(DomainError, match="encoder.mask_from_ids_bert4keras: token_ids must be integers"):
        _encoder.mask_from_ids_bert4keras(ids.astype(float))
    with pytest.raises(ShapeError, match="encoder.mask_from_ids_bert4keras: expected token_ids"):
        _encoder.mask_from_ids_bert4keras(np.array(1))


def test_names_and_shapes():
    config = dataclasses.replace(MODELS["roformer"][1], layers=1)
    assert roformer.shapes(config) == {
        "embedding.token": (23, 6),
        "embedding.segment": (2, 6),
        "embedding.norm.scale": (6,),
        "embedding.norm.bias": (6,),
        "embedding.mapping.kernel": (6, 12),
        "embedding.mapping.bias": (12,),
        **{f"layers.0.attention.w_{name}": (12, 12) for name in "qkvo"},
        **{f"layers.0.attention.b_{name}": (12,) for name in "qkvo"},
        "layers.0.attention_norm.scale": (12,),
        "layers.0.attention_norm.bias": (12,),
        "layers.0.feed_forward.w_in": (12, 7),
        "layers.0.feed_forward.b_in": (7,),
        "layers.0.feed_forward.w_out": (7, 12),
        "layers.0.feed_forward.b_out": (12,),
        "layers.0.feed_forward_norm.scale": (12,),
        "layers.0.feed_forward_norm.bias": (12,),
    }
    # The formula of the docstring.
    layer = 4 * 12**2 + 2 * 12 * 7 + 9 * 12 + 7
    assert roformer.parameters(MODELS["roformer"][1]) == (23 + 2 + 2) * 6 + 7 * 12 + 3 * layer
    equal = dataclasses.replace(config, embedding_size=12)
    assert not any("mapping" in name for name in roformer.shapes(equal))
    assert roformer.parameters(equal) == 27 * 12 + layer


@both
def test_a_configuration_comes_back_from_json(name, tmp_path):
    config = MODELS[name][1]
    configurations.write(config, tmp_path / "config.json")
    assert configurations.read(tmp_path / "config.json") == config
    assert configurations.to_dict(config)["model"] == name


@both
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "heads that divide hidden_size, received hidden_size=12, heads=5"),
        ({"heads": 4}, "an even key_size, received key_size=3"),
        ({"layers": 0}, "layers >= 1"),
        ({"intermediate_size": 0}, "intermediate_size >= 1"),
        ({"embedding_size": 0}, "embedding_size >= 1"),
        ({"epsilon": -1e-12}, "epsilon >= 0"),
        ({"rotary_base": 0.0}, "rotary_base > 0"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(name, changes, message):
    with pytest.raises(DomainError) as raised:
        dataclasses.replace(MODELS[name][1], **changes)
    assert message in str(raised.value) and str(raised.value).startswith(f"{name}.Config: ")


@both
def test_an_activation_has_the_name_of_one_formula(name):
    # The check of annotations, which the tests switch on, may come first.
    with pytest.raises((DomainError, TypeCheckError), match="activation"):
        dataclasses.replace(MODELS[name][1], activation="gelu")


def test_the_second_epsilon_is_checked():
    with pytest.raises(DomainError, match="roformer.Config: expected mlm_epsilon >= 0"):
        dataclasses.replace(MODELS["roformer"][1], mlm_epsilon=-1.0)


@both
def test_a_dialect_is_named_and_fixes_its_constants(name):
    model = MODELS[name][0]
    with pytest.raises(DomainError, match=f"{name}.dialect: expected one of bert4keras-0.11.3, .* name='bert4keras'"):
        model.dialect("bert4keras", **COMMON)
    with pytest.raises(DomainError, match=f"{name}.dialect: expected sizes only, since junnyu fixes .*'epsilon'"):
        model.dialect("junnyu", **COMMON, epsilon=1)
    with pytest.raises(DomainError, match=f'{name}.Config: missing key "heads"'):
        model.dialect("bert4keras-0.11.5", **{key: size for key, size in COMMON.items() if key != "heads"})
    with pytest.raises(DomainError, match=f'{name}.Config: unknown key "labels"'):
        model.dialect("bert4keras-0.11.5", **COMMON, labels=2)


IDS = text()[0]
LAST = "layers.2.feed_forward.w_out"


@both
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ids": IDS.astype(float)}, DomainError, "token_ids must be integers, received dtype float64"),
        ({"ids": IDS * 0 + 23}, DomainError, "from 0 to 22 (vocab_size 23), received 23 at index [0, 0]"),
        ({"ids": IDS * 0 - 1}, DomainError, "received -1"),
        ({"segments": IDS * 0 + 2}, DomainError, "segment_ids from 0 to 1 (segments 2), received 2"),
        ({"segments": IDS[:1] * 0}, ShapeError, "of one shape"),
        ({"mask": IDS}, DomainError, "mask must be boolean (True = may attend), received"),
        ({"mask": np.ones((4, 8), bool)}, ShapeError, "of one shape"),
        ({"positions": np.arange(9.0)}, DomainError, "positions must be integers, received dtype float64"),
        ({"positions": np.arange(8)}, ShapeError, "positions (n,) or (..., n), received positions of shape (8,)"),
        ({"positions": np.zeros((1, 9), int)}, ShapeError, "token_ids of shape (4, 9)"),
        ({"weights": {}}, ShapeError, "missing: embedding."),
        ({"weights": {"pooler.kernel": IDS}}, ShapeError, "unknown: pooler.kernel"),
        ({"change": {LAST: np.zeros((12, 7))}}, ShapeError, f"expected {LAST} of shape (7, 12), received {LAST}"),
        ({"change": {LAST: np.full((7, 12), np.nan)}}, DomainError, f"{LAST} must be finite"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(name, changes, error, message):
    options = {"weights": random_weights(MODELS[name][1]), "ids": IDS, **changes}
    options["weights"] |= options.pop("change", {})
    with pytest.raises(error) as raised:
        read(name, options.pop("ids"), **options)
    assert message in str(raised.value) and str(raised.value).startswith(f"{name}.hidden_states: ")


@both
def test_unilm_knows_two_segments_only(name):
    model, config = MODELS[name]
    config = dataclasses.replace(config, segments=3)
    with pytest.raises(DomainError, match="attention.unilm_mask: expected ids 0 and 1"):
        model.hidden_states(random_weights(config), IDS, IDS * 0 + 2, config=config, visible=_encoder.unilm)


@both
def test_a_layer_refuses_the_weights_of_another(name):
    model, config = MODELS[name]
    with pytest.raises(ShapeError, match=f"{name}.layer: expected .* unknown: extra"):
        weights = {**_encoder.layer_of(random_weights(config), 0), "extra": np.zeros(1)}
        model.layer(weights, np.zeros((1, 2, 12)), np.ones((1, 1, 2), bool), np.arange(2), config=config)
