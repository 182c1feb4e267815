"""Heads: figures worked out by hand, which weights each one needs, what may replace what, and every refusal.

The outputs of the original implementations are compared in test_roformer.py and test_roformer_v2.py.
"""

import dataclasses
import math

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from refimpl.check import DomainError, ShapeError
from refimpl.models import _encoder, _heads, gau_alpha, roformer, roformer_v2
from refimpl.ops import head as spans

SIZES = {
    "vocab_size": 7, "segments": 2, "embedding_size": 2, "hidden_size": 4, "layers": 2, "heads": 1,
    "intermediate_size": 3,
}  # fmt: skip
V1 = roformer.dialect("huggingface", **SIZES)
V2 = roformer_v2.dialect("bert4keras-0.11.5", **SIZES)
GAU = gau_alpha.Config(
    vocab_size=7, hidden_size=4, layers=1, expanded_size=3, key_size=2, segments=2, n_min=1, epsilon=1e-12,
    rotary_base=1e4,
)  # fmt: skip
ENTITIES = _heads.EntityPointer(types=3, size=2, rotary_base=10000.0)
EFFICIENT = _heads.EfficientEntityPointer(types=3, size=2, rotary_base=10000.0)
ANSWER = _heads.SpanPointer(size=2, rotary_base=10000.0)
CHOICE = _heads.MultipleChoice(pooling="first_token")
RNG = np.random.default_rng(5)
HIDDEN = RNG.normal(size=(2, 5, 4))
TABLE = RNG.normal(size=(7, 2))
MASK = np.array([[True] * 5, [True] * 3 + [False] * 2])


def classes(labels=3, pooling="mean_of_tokens"):
    return _heads.SequenceClassifier(labels, pooling)


def weights_of(head, config=V1, seed=6):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in head.shapes(config).items()}


def test_the_head_of_roformer_by_hand():
    config = dataclasses.replace(V1, activation="relu", mlm_epsilon=9.0)
    weights = {
        # (2, 3, 9, 9) gives (8, -5), relu (8, 0), and with epsilon 9 the norm (0.8, -0.8): (5, -8).
        "mlm.transform.kernel": np.array([[4.0, 0.0], [0.0, -1.0], [0.0, 0.0], [0.0, 0.0]]),
        "mlm.transform.bias": np.array([0.0, -2.0]),
        "mlm.norm.scale": np.array([5.0, 10.0]),
        "mlm.norm.bias": np.array([1.0, 0.0]),
        "mlm.bias": np.array([0.0, 1.0, 0.0, 0.0, 0.0, 0.0, -3.0]),
    }
    table = np.array([[1, 0], [0, 1], [1, 1], [2, 0], [0, 2], [-1, 0], [10, 1]], float)
    hidden = np.array([2.0, 3.0, 9.0, 9.0])
    np.testing.assert_allclose(_heads.masked_lm_transform(weights, hidden, config=config), [5, -8], rtol=1e-14)
    logits = _heads.masked_lm_transformed(weights, hidden, table, config=config)
    np.testing.assert_allclose(logits, [5, -7, -3, 10, -16, -5, 39], rtol=1e-14)


def test_the_head_of_roformer_v2_and_gau_alpha_by_hand():
    weights = {"mlm.mapping.kernel": np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0], [1.0, 1.0]])}
    table = np.array([[1, 0], [0, 1], [1, 1], [2, 0], [0, 2], [-1, 0], [10, 1]], float)
    logits = _heads.masked_lm_tied(weights, np.array([[1.0, 2.0, 9.0, 3.0]]), table, config=V2)
    # The mapping gives (4, 7).
    np.testing.assert_array_equal(logits, [[4, 7, 11, 8, 14, -4, 47]])
    # Without embedding_size the table is as wide as the hidden vectors, and nothing is mapped.
    assert _heads.TiedLM().shapes(GAU) == {}
    table = np.arange(28.0).reshape(7, 4)
    logits = _heads.masked_lm_tied({}, np.array([0.0, 1.0, 0.0, -1.0]), table, config=GAU)
    np.testing.assert_array_equal(logits, [-2.0] * 7)


def test_the_mapping_stands_where_widths_differ():
    assert _heads.TiedLM().shapes(V2) == {"mlm.mapping.kernel": (4, 2)}
    assert _heads.TiedLM().shapes(dataclasses.replace(V2, embedding_size=4)) == {}


def test_every_head_names_its_weights():
    assert _heads.TransformedLM().shapes(V1) == {
        "mlm.transform.kernel": (4, 2), "mlm.transform.bias": (2,), "mlm.norm.scale": (2,), "mlm.norm.bias": (2,),
        "mlm.bias": (7,),
    }  # fmt: skip
    assert _heads.Pooler("tanh").shapes(V1) == {"pooler.kernel": (4, 4), "pooler.bias": (4,)}
    assert _heads.NextSentence().shapes(V1) == {"next_sentence.kernel": (4, 2), "next_sentence.bias": (2,)}
    assert classes().shapes(GAU) == {"classifier.kernel": (4, 3), "classifier.bias": (3,)}
    assert _heads.SentenceEmbedding("pooler").shapes(V1) == {}
    assert CHOICE.shapes(V2) == {"choice.kernel": (4, 1), "choice.bias": (1,)}
    assert ENTITIES.shapes(V2) == {"entity.kernel": (4, 12), "entity.bias": (12,)}
    assert EFFICIENT.shapes(V2) == {
        "entity.kernel": (4, 4), "entity.bias": (4,), "entity.type_kernel": (4, 6), "entity.type_bias": (6,)
    }  # fmt: skip
    assert ANSWER.shapes(GAU) == {"span.kernel": (4, 4)}


@pytest.mark.parametrize("config", [V1, V2, GAU], ids=lambda config: config.model)
def test_every_model_may_wear_every_task_head(config):
    heads = (_heads.Pooler("linear"), _heads.NextSentence(), CHOICE, ENTITIES, EFFICIENT, ANSWER)
    for head in (*heads, _heads.SequenceClassifier(3, "mean_of_tokens")):
        assert {shape[0] for name, shape in head.shapes(config).items() if name.endswith(".kernel")} == {4}


def test_one_mapping_may_hold_an_encoder_and_its_heads():
    encoder, head = roformer.shapes(V1), _heads.TransformedLM()
    everything = {**{name: np.zeros(shape) for name, shape in encoder.items()}, **weights_of(head)}
    assert _encoder.part(everything, encoder).keys() == encoder.keys()
    weights = _encoder.part(everything, head.shapes(V1))
    assert weights.keys() == head.shapes(V1).keys()
    # A weight that is missing is named by who misses it.
    del everything["mlm.bias"]
    with pytest.raises(ShapeError, match="heads.masked_lm_transformed: expected 5 weights, missing: mlm.bias"):
        _heads.masked_lm_transformed(_encoder.part(everything, head.shapes(V1)), HIDDEN, TABLE, config=V1)


def test_pooler_and_next_sentence_by_hand():
    weights = {"pooler.kernel": np.eye(4)[::-1].copy(), "pooler.bias": np.array([0.0, 0.0, 0.0, 1.0])}
    x = np.array([[[0.1, 0.2, 0.3, 0.4], [9.0, 9.0, 9.0, 9.0]]])
    np.testing.assert_allclose(_heads.pooler_linear(weights, x, config=V1), [[0.4, 0.3, 0.2, 1.1]], rtol=1e-15)
    expected = [[math.tanh(v) for v in (0.4, 0.3, 0.2, 1.1)]]
    np.testing.assert_allclose(_heads.pooler_tanh(weights, x, config=V1), expected, rtol=1e-14)
    kernel = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, -1.0]])
    head = {"next_sentence.kernel": kernel, "next_sentence.bias": np.array([0.5, 0.0])}
    logits = _heads.next_sentence(head, np.array([1.0, 2.0, 4.0, 8.0]), config=V1)
    np.testing.assert_array_equal(logits, [5.5, -2.0])


def test_the_classifier_by_hand():
    head = _heads.SequenceClassifier(labels=3, pooling="pooler")
    weights = {"classifier.kernel": np.eye(4)[:, :3].copy(), "classifier.bias": np.array([0.0, 10.0, 20.0])}
    logits = _heads.sequence_classifier(weights, np.array([[1.0, 2.0, 3.0, 4.0]]), head=head, config=V2)
    np.testing.assert_array_equal(logits, [[1, 12, 23]])


def test_sentence_vectors_share_one_signature():
    first, last = HIDDEN[..., ::-1].copy(), HIDDEN
    # The embedding holds NaN: no pooling may touch it.
    states = [np.full_like(HIDDEN, np.nan), first, np.full_like(HIDDEN, np.nan), last]
    np.testing.assert_array_equal(_heads.first_token(states, MASK), last[:, 0])
    means = [last[0].mean(axis=0), last[1, :3].mean(axis=0)]
    np.testing.assert_allclose(_heads.mean_of_tokens(states, MASK), means, rtol=1e-13)
    average = [(mean + mean[::-1]) / 2 for mean in means]
    np.testing.assert_allclose(_heads.first_last_average(states, MASK), average, rtol=1e-13)


def test_choices_are_an_axis_before_the_tokens():
    ids = np.random.default_rng(8).integers(1, 7, (2, 3, 6))
    encoder = weights_of_model(roformer, V1)
    states = roformer.hidden_states(encoder, ids, config=V1)
    sentence = _heads.first_token(states, np.ones(ids.shape, bool))
    choices = np.array([[True, True, True], [True, True, False]])
    weights = weights_of(CHOICE)
    scores = _heads.multiple_choice(weights, sentence, choices, config=V1)
    assert scores.shape == (2, 3) and scores[1, 2] == -np.inf
    alone = roformer.hidden_states(encoder, ids[0, 1], config=V1)[-1][0]
    expected = alone @ weights["choice.kernel"][:, 0] + weights["choice.bias"][0]
    np.testing.assert_allclose(scores[0, 1], expected, rtol=1e-12)


def weights_of_model(model, config):
    rng = np.random.default_rng(9)
    return {name: rng.normal(size=shape) for name, shape in model.shapes(config).items()}


def test_entities_by_hand():
    # Type 0 asks whether the start has feature 0 and the end feature 1. Rotation is off: all positions are equal.
    head = _heads.EntityPointer(types=2, size=2, rotary_base=10000.0)
    kernel = np.zeros((4, 8))
    kernel[0, 0], kernel[1, 2] = 1, 1
    bias = np.zeros(8)
    bias[[5, 7]] = 3, 5
    hidden = np.array([[2.0, 0, 0, 0], [0, 0, 7, 0], [0, 3.0, 0, 0]])
    scores = _heads.entity_pointer(
        {"entity.kernel": kernel, "entity.bias": bias}, hidden, np.ones(3, bool), np.zeros(3, int), head=head, config=V2
    )
    expected = np.full((2, 3, 3), -np.inf)
    upper = np.triu(np.ones((3, 3), bool))
    expected[0][upper], expected[1][upper] = 0, 15 / math.sqrt(2)
    expected[0, 0, 2] = 6 / math.sqrt(2)
    np.testing.assert_allclose(scores, expected, rtol=1e-14)
    assert spans.decode_spans(scores[:1], threshold=0.0).tolist() == [[0, 0, 2]]


@pytest.mark.parametrize(
    ("head", "score"), [(ENTITIES, _heads.entity_pointer), (EFFICIENT, _heads.entity_pointer_efficient)]
)
def test_entity_heads_share_one_signature_and_count_positions(head, score):
    weights = weights_of(head)
    implied = score(weights, HIDDEN, MASK, head=head, config=V1)
    assert implied.shape == (2, 3, 5, 5)
    finite = np.triu(np.ones((5, 5), bool)) & MASK[:, :, None] & MASK[:, None, :]
    np.testing.assert_array_equal(np.isfinite(implied), np.repeat(finite[:, None], 3, axis=1))
    for positions in (np.arange(5), np.arange(5) + 100, np.tile(np.arange(5), (2, 1))):
        given = score(weights, HIDDEN, MASK, positions, head=head, config=V1)
        np.testing.assert_allclose(given, implied, rtol=0, atol=1e-11)
    still = score(weights, HIDDEN, MASK, np.zeros(5, int), head=head, config=V1)
    assert np.abs(still[0, 0, 0, 1:] - implied[0, 0, 0, 1:]).max() > 1e-2
    other = score(weights, HIDDEN, MASK, head=dataclasses.replace(head, rotary_base=5.0, size=2), config=V1)
    np.testing.assert_allclose(other, implied, rtol=0, atol=1e-12)


def test_the_rotary_base_of_a_pointer_is_its_own():
    # Two features turn by the position itself; from four on the base shows.
    head = _heads.SpanPointer(size=4, rotary_base=10000.0)
    weights = weights_of(head)
    one = _heads.span_pointer(weights, HIDDEN, MASK, head=head, config=V1)
    config = dataclasses.replace(V1, rotary_base=7.0)
    np.testing.assert_array_equal(one, _heads.span_pointer(weights, HIDDEN, MASK, head=head, config=config))
    other = dataclasses.replace(head, rotary_base=7.0)
    assert np.abs(one[0, 0] - _heads.span_pointer(weights, HIDDEN, MASK, head=other, config=V1)[0, 0]).max() > 1e-2


def test_the_pointer_to_a_span_is_that_of_one_entity_without_bias():
    weights = weights_of(ANSWER)
    scores = _heads.span_pointer(weights, HIDDEN, MASK, head=ANSWER, config=V1)
    assert scores.shape == (2, 5, 5)
    as_entity = {"entity.kernel": weights["span.kernel"], "entity.bias": np.zeros(4)}
    one = dataclasses.replace(ENTITIES, types=1)
    expected = _heads.entity_pointer(as_entity, HIDDEN, MASK, head=one, config=V1)[:, 0]
    np.testing.assert_array_equal(scores, expected)
    # Without a bias, vectors of zeros score zero.
    flat = _heads.span_pointer(weights, 0 * HIDDEN, MASK, head=ANSWER, config=V1)
    assert (flat[np.isfinite(flat)] == 0).all()
    best = spans.best_span(scores, max_length=5)
    assert (best.start <= best.end).all() and best.end[1] < 3


def test_a_causal_language_model_is_the_same_head_on_causal_states():
    ids = np.array([[1, 2, 3, 4, 5]])
    encoder, weights = weights_of_model(roformer, V1), weights_of(_heads.TransformedLM())

    def logits(ids, visible):
        last = roformer.hidden_states(encoder, ids, config=V1, visible=visible)[-1]
        return _heads.masked_lm_transformed(weights, last, encoder["embedding.token"], config=V1)

    other = np.array([[1, 2, 3, 6, 5]])
    causal = [logits(each, _encoder.causal) for each in (ids, other)]
    np.testing.assert_array_equal(causal[0][:, :3], causal[1][:, :3])
    assert np.abs(causal[0][:, 3:] - causal[1][:, 3:]).min() > 0
    masked = [logits(each, _encoder.bidirectional) for each in (ids, other)]
    assert np.abs(masked[0][:, :3] - masked[1][:, :3]).min() > 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: _heads.masked_lm_transformed(weights_of(_heads.TransformedLM()), HIDDEN, TABLE.T, config=V1),
            ShapeError, "heads.masked_lm_transformed: expected a token table of shape (7, 2), received",
        ),
        (
            lambda: _heads.masked_lm_tied(weights_of(_heads.TiedLM(), V2), HIDDEN, TABLE[:6], config=V2),
            ShapeError, "heads.masked_lm_tied: expected a token table of shape (7, 2), received table of shape (6, 2)",
        ),
        (
            lambda: _heads.masked_lm_tied({}, HIDDEN, TABLE, config=V2),
            ShapeError, "heads.masked_lm_tied: expected 1 weights, missing: mlm.mapping.kernel",
        ),
        (
            lambda: _heads.masked_lm_tied(weights_of(_heads.TiedLM(), V2), HIDDEN, TABLE * np.nan, config=V2),
            DomainError, "table must be finite",
        ),
        (
            lambda: _heads.masked_lm_transform({}, HIDDEN, config=V1),
            ShapeError, "heads.masked_lm_transform: expected 5 weights, missing: mlm.bias, mlm.norm.bias",
        ),
        (
            lambda: _heads.pooler_tanh({"pooler.kernel": np.eye(4)}, HIDDEN, config=V1),
            ShapeError, "heads.pooler_tanh: expected 2 weights, missing: pooler.bias",
        ),
        (
            lambda: _heads.pooler_linear({**weights_of(_heads.Pooler("tanh")), "x": TABLE}, HIDDEN, config=V1),
            ShapeError, "heads.pooler_linear: expected 2 weights, missing: none, unknown: x",
        ),
        (
            lambda: _heads.next_sentence(
                {"next_sentence.kernel": np.ones((2, 4)), "next_sentence.bias": np.ones(2)}, HIDDEN[:, 0], config=V1
            ),
            ShapeError, "heads.next_sentence: expected next_sentence.kernel of shape (4, 2), received",
        ),
        (
            lambda: _heads.sequence_classifier(
                weights_of(classes(2)), HIDDEN[:, 0], head=classes(3), config=V1
            ),
            ShapeError, "heads.sequence_classifier: expected classifier.kernel of shape (4, 3)",
        ),
        (
            lambda: _heads.multiple_choice(weights_of(CHOICE), HIDDEN, MASK * 1, config=V1),
            DomainError, "head.choose: mask must be boolean",
        ),
        (lambda: _heads.first_token([], MASK), ShapeError, "heads.first_token: expected at least 1 of the hidden"),
        (lambda: _heads.mean_of_tokens([], MASK), ShapeError, "heads.mean_of_tokens: expected at least 1"),
        (
            lambda: _heads.first_last_average([HIDDEN], MASK),
            ShapeError, "heads.first_last_average: expected at least 2 of the hidden states, received received=1",
        ),
        (
            lambda: _heads.entity_pointer({}, HIDDEN, MASK, head=ENTITIES, config=V1),
            ShapeError, "heads.entity_pointer: expected 2 weights",
        ),
        (
            lambda: _heads.entity_pointer_efficient({}, HIDDEN, MASK, head=EFFICIENT, config=V1),
            ShapeError, "heads.entity_pointer_efficient: expected 4 weights",
        ),
        (
            lambda: _heads.span_pointer({}, HIDDEN, MASK, head=ANSWER, config=V1),
            ShapeError, "heads.span_pointer: expected 1 weights, missing: span.kernel",
        ),
        (
            lambda: _heads.span_pointer(
                weights_of(ANSWER), HIDDEN, MASK, np.arange(5.0), head=ANSWER, config=V1
            ),
            DomainError, "positions must be integers",
        ),
        (lambda: classes(labels=0), DomainError, "heads.SequenceClassifier: expected labels >= 1"),
        (lambda: classes(labels=True), DomainError, "heads.SequenceClassifier: expected labels of type int"),
        (lambda: classes(pooling="mean"), DomainError, "heads.SequenceClassifier: expected pooling one of 'first_tok"),
        (lambda: dataclasses.replace(CHOICE, pooling=1), DomainError, "heads.MultipleChoice: expected pooling one of"),
        (lambda: _heads.SentenceEmbedding(None), DomainError, "heads.SentenceEmbedding: expected pooling one of"),
        (lambda: _heads.Pooler("relu"), DomainError, "heads.Pooler: expected activation one of 'tanh', 'linear'"),
        (lambda: dataclasses.replace(ANSWER, size=3), DomainError, "heads.SpanPointer: expected an even size"),
        (lambda: dataclasses.replace(ENTITIES, rotary_base=0.0), DomainError, "expected rotary_base > 0"),
        (lambda: dataclasses.replace(ENTITIES, types=2.0), DomainError, "heads.EntityPointer: expected types of type"),
        (lambda: dataclasses.replace(ENTITIES, types=0), DomainError, "heads.EntityPointer: expected types >= 1"),
        (lambda: dataclasses.replace(EFFICIENT, size=0), DomainError, "heads.EfficientEntityPointer: expected size"),
        (lambda: dataclasses.replace(ANSWER, size=0), DomainError, "heads.SpanPointer: expected size >= 1, received"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


def test_a_pointer_needs_tokens():
    # The check of annotations, which the tests switch on, may come first.
    with pytest.raises((ShapeError, TypeCheckError), match="head.global_pointer"):
        _heads.span_pointer(weights_of(ANSWER), np.ones(4), np.array(True), head=ANSWER, config=V1)
