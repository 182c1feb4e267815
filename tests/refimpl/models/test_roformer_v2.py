"""RoFormerV2: a model worked out by hand, the original implementations, dialects and the published sizes.

The laws that it shares with RoFormer, and their refusals, are tested in test_roformer.py.
"""

import dataclasses

import numpy as np
import pytest

from refimpl.check import DomainError
from refimpl.models import _encoder, _heads, roformer_v2
from tests.golden import originals

DOUBLE, SINGLE = 1e-12, 5e-6
NAMES = ("vocab_size", "segments", "embedding_size", "hidden_size", "layers", "heads", "intermediate_size")
SIZES = {"b4k_roformer_v2": (120, 2, 48, 48, 3, 3, 192), "jy_roformer_v2": (120, 2, 48, 48, 3, 4, 192)}
SMALL = {
    "vocab_size": 23, "segments": 2, "embedding_size": 6, "hidden_size": 12, "layers": 1, "heads": 3,
    "intermediate_size": 7,
}  # fmt: skip


def of_folder(folder, dialect):
    return roformer_v2.dialect(dialect, **dict(zip(NAMES, SIZES[folder], strict=True)))


def logits_of(encoder):
    """The masked-language head, which has no weights of its own here."""
    return lambda hidden, config: _heads.masked_lm_tied({}, hidden, encoder["embedding.token"], config=config)


def test_one_token_and_one_layer_by_hand():
    config = roformer_v2.Config(
        vocab_size=2, segments=1, embedding_size=2, hidden_size=2, layers=1, heads=1, intermediate_size=2,
        activation="relu", epsilon=0.0, rotary_base=10000.0,
    )  # fmt: skip
    weights = {
        # (0.5, 4) + (0.5, 3) = (1, 7) has the root mean square 5: x_0 = (0.2, 1.4).
        "embedding.token": np.array([[9.0, 9.0], [0.5, 4.0]]),
        "embedding.segment": np.array([[0.5, 3.0]]),
        # One token attends to itself: o = (0.8, -2.4), and the sum (1, -1) has the root mean square 1.
        "layers.0.attention.w_q": np.array([[3.0, 1.0], [2.0, 5.0]]),
        "layers.0.attention.w_k": np.array([[1.0, 0.0], [7.0, 1.0]]),
        "layers.0.attention.w_v": np.array([[4.0, 0.0], [0.0, 2.0]]),
        "layers.0.attention.w_o": np.array([[1.0, -0.5], [0.0, -5.0 / 7.0]]),
        # relu((4, -1)) = (4, 0), and (6, 2) + (1, -1) = (7, 1) becomes (1.4, 0.2).
        "layers.0.feed_forward.w_in": np.array([[3.0, 0.0], [-1.0, 1.0]]),
        "layers.0.feed_forward.w_out": np.array([[1.5, 0.5], [9.0, 9.0]]),
    }
    embedded, last = roformer_v2.hidden_states(weights, np.array([[1]]), config=config)
    np.testing.assert_allclose(embedded, [[[0.2, 1.4]]], rtol=1e-14)
    steps = roformer_v2.layer(
        _encoder.layer_of(weights, 0), embedded, np.ones((1, 1, 1), bool), np.zeros(1), config=config
    )
    np.testing.assert_allclose(np.concatenate(steps[:3]), [[[0.8, -2.4]], [[1, -1]], [[6, 2]]], rtol=1e-14)
    np.testing.assert_allclose(last, [[[1.4, 0.2]]], rtol=1e-14)


def test_every_array_of_bert4keras():
    original, config = originals.whole("b4k_roformer_v2"), of_folder("b4k_roformer_v2", "bert4keras-0.11.5")
    encoder = originals.weights_bert4keras(original, roformer_v2.shapes(config))
    assert len(encoder) == len(original.weights)
    got = originals.of_bert4keras(roformer_v2, config, encoder, logits_of(encoder), original.double)
    errors = originals.errors(got, original.double)
    assert max(errors.values()) < DOUBLE, errors
    errors = originals.errors(got, original.single)
    assert max(errors.values()) < SINGLE, errors


def test_every_array_of_junnyu():
    original, config = originals.whole("jy_roformer_v2"), of_folder("jy_roformer_v2", "junnyu")
    encoder = originals.weights_torch(original, roformer_v2.shapes(config))
    # JunnYu stores the tied table twice.
    assert len(encoder) + 1 == len(original.weights)
    got = originals.of_torch(roformer_v2, config, encoder, logits_of(encoder), original.double)
    errors = originals.errors(got, original.double)
    # Here alone the original kept sines and cosines in float32.
    tables = [errors.pop(name) for name in list(errors) if "float32tables" in name]
    assert max(errors.values()) < DOUBLE, errors
    assert all(1e-9 < error < 1e-7 for error in tables)
    errors = originals.errors(got, original.single)
    assert max(errors.values()) < SINGLE, errors


def test_the_kept_part_of_bert4keras_model():
    original = originals.copy("b4k_roformer_v2")
    config = dataclasses.replace(of_folder("b4k_roformer_v2", "bert4keras-0.11.5"), layers=1)
    encoder = originals.weights_bert4keras(original, roformer_v2.shapes(config))
    last = original.double.pop("io/last_hidden_state")

    def errors(config):
        logits = logits_of(encoder)
        got = originals.of_bert4keras(roformer_v2, config, encoder, logits, original.double)
        got["io/mlm_logits"] = logits(last, config)
        return originals.errors(got, original.double)

    assert len(errors(config)) == 5 and max(errors(config).values()) < DOUBLE
    old = errors(dataclasses.replace(config, epsilon=1e-12))
    assert old["io/hidden_0"] > 1e-9 and old["io/hidden_1"] > 1e-9


def test_dialects_agree_and_differ_as_documented():
    made = {name: roformer_v2.dialect(name, **roformer_v2.SIZES["base"]) for name in roformer_v2.DIALECTS}
    assert made["bert4keras-0.11.3"] == made["junnyu"]
    assert made["bert4keras-0.11.4"] == made["bert4keras-0.11.5"]
    assert dataclasses.replace(made["junnyu"], epsilon=1e-7) == made["bert4keras-0.11.5"]
    assert (made["junnyu"].epsilon, made["junnyu"].activation, made["junnyu"].rotary_base) == (1e-12, "relu", 1e4)


def test_dialects_that_cannot_be_are_refused():
    with pytest.raises(DomainError, match="roformer_v2.dialect: expected one of .*Hugging Face has no RoFormerV2"):
        roformer_v2.dialect("huggingface", **roformer_v2.SIZES["base"])
    with pytest.raises(DomainError, match="embedding_size = hidden_size, since junnyu maps with a bias, .*6, 12"):
        roformer_v2.dialect("junnyu", **SMALL)


@pytest.mark.parametrize(("name", "parameters"), [("small", 15_225_600), ("base", 94_152_192), ("large", 314_279_936)])
def test_the_published_sizes(name, parameters):
    # The figures of the released models, whose masked-language head is the token table.
    config = roformer_v2.dialect("bert4keras-0.11.3", **roformer_v2.SIZES[name])
    assert roformer_v2.parameters(config) == parameters
    assert _heads.TiedLM().shapes(config) == {}
    d = config.hidden_size
    assert parameters == config.layers * 12 * d * d + 12000 * d + 2 * d
    assert config.key_size == 64


def test_names_and_shapes():
    config = roformer_v2.dialect("bert4keras-0.11.5", **SMALL)
    assert roformer_v2.shapes(config) == {
        "embedding.token": (23, 6),
        "embedding.segment": (2, 6),
        "embedding.mapping.kernel": (6, 12),
        **{f"layers.0.attention.w_{name}": (12, 12) for name in "qkvo"},
        "layers.0.feed_forward.w_in": (12, 7),
        "layers.0.feed_forward.w_out": (7, 12),
    }
    # The formula of the docstring.
    assert roformer_v2.parameters(config) == (23 + 2) * 6 + 6 * 12 + 4 * 12**2 + 2 * 12 * 7
    assert "embedding.mapping.kernel" not in roformer_v2.shapes(dataclasses.replace(config, embedding_size=12))
