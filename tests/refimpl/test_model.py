"""Whole models: what may stand on what, the JSON form, every output against encoder and head alone, every refusal."""

import json

import numpy as np
import pytest

from refimpl import check, model
from refimpl.check import DomainError, ShapeError
from refimpl.model import Model
from refimpl.models import _encoder, _heads, flash, flash_quad, gau_alpha, roformer, roformer_v2
from refimpl.ops import pooling

TRANSFORMER = {
    "vocab_size": 23, "segments": 2, "embedding_size": 6, "hidden_size": 8, "layers": 2, "heads": 2,
    "intermediate_size": 7,
}  # fmt: skip
GATED = {
    "vocab_size": 23, "segments": 2, "hidden_size": 8, "layers": 2, "expanded_size": 5, "key_size": 4,
}  # fmt: skip
CONVENTIONS = {
    "chunk": 4, "kernel": "laplace", "divisor": "chunk", "normaliser": "visible", "rows": "paper",
    "rotation": "half_split", "epsilon": 1e-6, "rotary_base": 1e4,
}  # fmt: skip
V1 = roformer.dialect("bert4keras-0.11.5", **TRANSFORMER)
V2 = roformer_v2.dialect("bert4keras-0.11.5", **TRANSFORMER)
GAU = gau_alpha.dialect("bert4keras-0.11.4", **GATED)
BOTH_WAYS = flash.Config(**GATED, **CONVENTIONS, mix="bidirectional")
CAUSAL = flash.Config(**GATED, **CONVENTIONS, mix="causal")
QUADRATIC = flash_quad.Config(
    **GATED, kernel="laplace", divisor="visible", length=0, rotation="half_split", epsilon=1e-6, rotary_base=1e4
)
ENCODERS = {"roformer": V1, "roformer_v2": V2, "gau_alpha": GAU, "flash": BOTH_WAYS, "flash_quad": QUADRATIC}
every = pytest.mark.parametrize("name", ENCODERS)

POOLER, NEXT, TIED = _heads.Pooler("tanh"), _heads.NextSentence(), _heads.TiedLM()
CLASSES = _heads.SequenceClassifier(labels=3, pooling="mean_of_tokens")
EMBEDDING = _heads.SentenceEmbedding("first_token")
CHOICE = _heads.MultipleChoice("pooler")
ENTITIES = _heads.EntityPointer(types=3, size=2, rotary_base=100.0)
EFFICIENT = _heads.EfficientEntityPointer(types=3, size=2, rotary_base=100.0)
ANSWER = _heads.SpanPointer(size=4, rotary_base=100.0)


def weights_of(whole, seed=1):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.5, shape) for name, shape in model.shapes(whole).items()}


def text(*lead, n=9, seed=2):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 23, (*lead, n))
    segments = (np.arange(n) >= 5) * np.ones((*lead, n), int)
    return ids, segments, rng.random((*lead, n)) < 0.8


def test_the_published_models_and_their_sizes():
    def parameters(config, *heads):
        return model.parameters(Model(config, heads, "bidirectional"))

    assert parameters(gau_alpha.dialect("junnyu", **gau_alpha.SIZES["base"]), TIED) == 96_517_632
    sizes = {"small": 15_225_600, "base": 94_152_192, "large": 314_279_936}
    for name, count in sizes.items():
        assert parameters(roformer_v2.dialect("bert4keras-0.11.3", **roformer_v2.SIZES[name]), TIED) == count
    base = roformer.dialect("junnyu", **roformer.SIZES["base-char"])
    # The head's dense layer, its norm and a bias per token; the table is the encoder's.
    assert parameters(base, _heads.TransformedLM()) == roformer.parameters(base) + 768 * 768 + 3 * 768 + 12000
    assert parameters(base, POOLER, NEXT) == roformer.parameters(base) + 768 * 768 + 768 + 768 * 2 + 2


JSON = {
    "encoder": {
        "model": "roformer", **TRANSFORMER, "activation": "gelu_erf", "epsilon": 1e-7, "mlm_epsilon": 1e-12,
        "rotary_base": 10000.0,
    },
    "visible": "bidirectional",
    "heads": [
        {"head": "transformed_lm"},
        {"head": "pooler", "activation": "tanh"},
        {"head": "next_sentence"},
        {"head": "sequence_classifier", "labels": 3, "pooling": "mean_of_tokens"},
        {"head": "multiple_choice", "pooling": "pooler"},
        {"head": "efficient_entity_pointer", "types": 3, "size": 2, "rotary_base": 100.0},
        {"head": "span_pointer", "size": 4, "rotary_base": 100.0},
    ],
}  # fmt: skip


def test_a_model_comes_back_from_its_file(tmp_path):
    made = model.from_dict(JSON)
    heads = (_heads.TransformedLM(), POOLER, NEXT, CLASSES, CHOICE, EFFICIENT, ANSWER)
    assert made == Model(V1, heads, "bidirectional")
    assert model.to_dict(made) == JSON
    model.write(made, tmp_path / "config.json")
    assert model.read(tmp_path / "config.json") == made
    assert json.loads((tmp_path / "config.json").read_text()) == JSON
    with pytest.raises(AttributeError):
        made.visible = "causal"


def test_every_head_has_a_name():
    assert list(_heads.HEADS) == [
        "transformed_lm", "tied_lm", "pooler", "next_sentence", "sequence_classifier", "sentence_embedding",
        "multiple_choice", "entity_pointer", "efficient_entity_pointer", "span_pointer",
    ]  # fmt: skip
    assert {name for kind in _heads.HEADS.values() for name in kind.outputs} | {"last_hidden_state"} == set(
        model.OUTPUTS
    )


HEADS = JSON["heads"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 3}, 'model: unknown key "layers"; the known keys are encoder, visible, heads'),
        ({"visible": None}, "model.Model: expected visible one of bidirectional, causal, unilm, received visible=None"),
        ({"visible": "prefix"}, "expected visible one of bidirectional, causal, unilm, received visible='prefix'"),
        ({"visible": ["causal"]}, "expected visible one of"),
        ({"encoder": "roformer"}, "config: expected a JSON object, received received='roformer'"),
        ({"encoder": {**JSON["encoder"], "labels": 2}}, 'roformer.Config: unknown key "labels"'),
        (
            {"encoder": {"model": "bert"}},
            'expected "model" to be one of flash, flash_quad, gau_alpha, roformer, roformer_v2',
        ),
        ({"heads": {"head": "pooler"}}, 'model: expected "heads" to be a list, received heads='),
        ({"heads": None}, 'expected "heads" to be a list'),
        ({"heads": ["pooler"]}, "model: expected every head to be a JSON object, received received='pooler'"),
        ({"heads": [{}]}, 'expected "head" to be one of transformed_lm, tied_lm, pooler, .* received None'),
        ({"heads": [{"head": "crf"}]}, "received 'crf'"),
        ({"heads": [{"head": ["pooler"]}]}, "received .'pooler'."),
        ({"heads": [{"head": "Pooler"}]}, "received 'Pooler'"),
        ({"heads": [{"head": "pooler"}]}, 'heads.pooler: missing key "activation"; received head'),
        (
            {"heads": [{"head": "pooler", "activation": "tanh", "bias": True}]},
            'heads.pooler: unknown key "bias"; the known keys are head, activation',
        ),
        (
            {"heads": [{"head": "tied_lm", "outputs": []}]},
            'heads.tied_lm: unknown key "outputs"; the known keys are he',
        ),
        ({"heads": [{**HEADS[3], "labels": 0}]}, "heads.SequenceClassifier: expected labels >= 1, received labels=0"),
        ({"heads": [{**HEADS[3], "labels": 2.0}]}, "expected labels of type int, received labels=2.0"),
        ({"heads": [{**HEADS[3], "pooling": "mean"}]}, "expected pooling one of 'first_token', 'mean_of_tokens', 'fi"),
        ({"heads": [HEADS[2]]}, "expected a pooler, which next_sentence reads, received heads=.'next_sentence'."),
        ({"heads": [HEADS[4]]}, "expected a pooler, which multiple_choice reads"),
        (
            {"heads": [HEADS[1], HEADS[1]]},
            "one head at most that gives pooled, received heads=.'pooler', 'pooler'.",
        ),
        ({"heads": [HEADS[0], {"head": "tied_lm"}]}, "one head at most that gives mlm_logits"),
    ],
)
def test_what_is_no_model_is_refused_in_words(changes, message):
    with pytest.raises(DomainError, match=message):
        model.from_dict({**JSON, **changes})


@pytest.mark.parametrize("key", ["encoder", "visible", "heads"])
def test_a_missing_key_is_named(key):
    with pytest.raises(DomainError, match=f'model: missing key "{key}"; received '):
        model.from_dict({name: value for name, value in JSON.items() if name != key})


def test_a_file_is_read_strictly(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(JSON).replace('"activation": "tanh"', '"activation": "tanh", "activation": "linear"'))
    with pytest.raises(DomainError, match='the key "activation" stands twice'):
        model.read(file)
    for data, message in ((b"[]", "model: expected a JSON object"), (b"{", "is no JSON")):
        file.write_bytes(data)
        with pytest.raises(DomainError, match=message):
            model.read(file)


@pytest.mark.parametrize(
    ("config", "heads", "visible", "message"),
    [
        (GAU, (CLASSES, EMBEDDING), "causal", "one head at most that gives embedding, .*sequence_classifier', 'sente"),
        (GAU, (ENTITIES, EFFICIENT), "causal", "one head at most that gives entity_scores"),
        (GAU, (_heads.TransformedLM(),), "causal", "encoder with activation and mlm_epsilon for transformed_lm, .*gau"),
        (V2, (_heads.TransformedLM(),), "causal", "for transformed_lm, received model='roformer_v2'"),
        (BOTH_WAYS, (), "causal", "expected visible bidirectional, as mix of flash, received visible='causal'"),
        (CAUSAL, (), "bidirectional", "expected visible causal, as mix of flash"),
        (CAUSAL, (), "unilm", "expected visible causal, as mix of flash, received visible='unilm'"),
        (gau_alpha.dialect("junnyu", **{**GATED, "segments": 3}), (), "unilm", "at most 2 segments for unilm"),
        (GAU, [TIED], "causal", "expected a tuple of heads of refimpl.models._heads"),
        (GAU, (_heads.TiedLM,), "causal", "expected a tuple of heads"),
        ({"model": "gau_alpha"}, (), "causal", "expected the Config of an encoder"),
    ],
)
def test_what_does_not_go_together_is_refused(config, heads, visible, message):
    with pytest.raises(DomainError, match=f"model.Model: .*{message}"):
        Model(config, heads, visible)


def test_outputs_stand_in_one_order():
    heads = (ANSWER, EFFICIENT, CHOICE, CLASSES, NEXT, POOLER, TIED)
    assert model.outputs(Model(GAU, heads, "causal")) == model.OUTPUTS == (
        "last_hidden_state", "mlm_logits", "pooled", "next_sentence_logits", "logits", "embedding", "choice_logits",
        "entity_scores", "span_scores",
    )  # fmt: skip
    for order in (heads, heads[::-1]):
        whole = Model(GAU, order, "causal")
        assert tuple(model.forward(weights_of(whole), *text(2, 3), model=whole)) == model.OUTPUTS
    assert model.outputs(Model(GAU, (), "causal")) == ("last_hidden_state",)


def test_encoder_and_heads_share_no_name():
    for config in ENCODERS.values():
        lm = _heads.TransformedLM() if config is V1 else TIED
        whole = Model(config, (lm, POOLER, NEXT, CLASSES, CHOICE, ENTITIES, ANSWER), "bidirectional")
        parts = [model.encoder_of(whole).shapes(config), *(head.shapes(config) for head in whole.heads)]
        assert len(model.shapes(whole)) == sum(map(len, parts))


@every
@pytest.mark.parametrize("visible", ["bidirectional", "causal", "unilm"])
def test_every_output_is_that_of_the_encoder_and_the_head(name, visible):
    config = ENCODERS[name]
    if name == "flash" and visible != "bidirectional":
        if visible == "unilm":
            return
        config = CAUSAL
    lm = _heads.TransformedLM() if name == "roformer" else TIED
    whole = Model(config, (lm, POOLER, NEXT, CLASSES, ENTITIES, ANSWER), visible)
    weights, (ids, segments, mask), positions = weights_of(whole), text(3), np.arange(9)[::-1] * 2
    found = model.forward(weights, ids, segments, mask, positions, model=whole)
    encoder = model.encoder_of(whole)
    own = _encoder.part(weights, encoder.shapes(config))
    seen = {} if name == "flash" else {"visible": getattr(_encoder, visible)}
    states = encoder.hidden_states(own, ids, segments, mask, positions, config=config, **seen)
    last, table = states[-1], weights["embedding.token"]

    def of(head):
        return _encoder.part(weights, head.shapes(config))

    pooled = np.tanh(last[:, 0] @ weights["pooler.kernel"] + weights["pooler.bias"])
    mean = pooling.masked_mean(last, mask)
    logits = _heads.masked_lm_transformed if name == "roformer" else _heads.masked_lm_tied
    expected = {
        "last_hidden_state": last,
        "mlm_logits": logits(of(lm), last, table, config=config),
        "pooled": pooled,
        "next_sentence_logits": pooled @ weights["next_sentence.kernel"] + weights["next_sentence.bias"],
        "logits": mean @ weights["classifier.kernel"] + weights["classifier.bias"],
        "embedding": mean,
        "entity_scores": _heads.entity_pointer(of(ENTITIES), last, mask, positions, head=ENTITIES, config=config),
        "span_scores": _heads.span_pointer(of(ANSWER), last, mask, positions, head=ANSWER, config=config),
    }
    assert list(found) == list(expected)
    for output, array in expected.items():
        np.testing.assert_allclose(found[output], array, rtol=1e-12, atol=1e-12, err_msg=output)
    # Who sees whom shows, and so do positions.
    if visible != "bidirectional" and name != "flash":
        other = model.forward(
            weights, ids, segments, mask, positions, model=Model(config, whole.heads, "bidirectional")
        )
        assert np.abs(other["last_hidden_state"] - last).max() > 1e-3


@pytest.mark.parametrize(
    ("pooling_", "expected"),
    [
        ("first_token", lambda states, mask, pooled: states[-1][:, 0]),
        ("mean_of_tokens", lambda states, mask, pooled: pooling.masked_mean(states[-1], mask)),
        ("first_last_average", lambda states, mask, pooled: pooling.first_last_average(states[1], states[-1], mask)),
        ("pooler", lambda states, mask, pooled: pooled),
    ],
)
@pytest.mark.parametrize("activation", ["tanh", "linear"])
def test_a_sentence_vector_is_pooled_as_it_says(pooling_, expected, activation):
    heads = (_heads.SentenceEmbedding(pooling_), _heads.Pooler(activation))
    whole = Model(GAU, heads, "bidirectional")
    weights, (ids, segments, mask) = weights_of(whole), text(3)
    found = model.forward(weights, ids, segments, mask, model=whole)
    assert list(found) == ["last_hidden_state", "pooled", "embedding"]
    states = model.hidden_states(weights, ids, segments, mask, model=whole)
    linear = states[-1][:, 0] @ weights["pooler.kernel"] + weights["pooler.bias"]
    pooled = np.tanh(linear) if activation == "tanh" else linear
    np.testing.assert_allclose(found["pooled"], pooled, rtol=1e-13)
    np.testing.assert_allclose(found["embedding"], expected(states, mask, pooled), rtol=1e-13)
    # The classifier reads the same vector, and gives it.
    classes = _heads.SequenceClassifier(3, pooling_)
    other = Model(GAU, (heads[1], classes), "bidirectional")
    weights |= {name: weights_of(other)[name] for name in classes.shapes(GAU)}
    both = model.forward(weights, ids, segments, mask, model=other)
    np.testing.assert_array_equal(both["embedding"], found["embedding"])
    logits = found["embedding"] @ weights["classifier.kernel"] + weights["classifier.bias"]
    np.testing.assert_allclose(both["logits"], logits, rtol=1e-13)


def test_every_choice_is_read_by_itself_and_needs_a_token():
    whole = Model(V1, (_heads.MultipleChoice("mean_of_tokens"), TIED), "bidirectional")
    weights, (ids, segments, mask) = weights_of(whole), text(2, 3)
    mask[1, 2] = False
    found = model.forward(weights, ids, segments, mask, model=whole)
    assert found["choice_logits"].shape == (2, 3) and found["mlm_logits"].shape == (2, 3, 9, 23)
    assert (found["choice_logits"] == -np.inf).tolist() == [[False] * 3, [False, False, True]]
    alone = model.forward(weights, ids[:1, 1:2], segments[:1, 1:2], mask[:1, 1:2], model=whole)
    np.testing.assert_allclose(alone["choice_logits"], found["choice_logits"][:1, 1:2], rtol=1e-12)
    with pytest.raises(ShapeError, match=r"model.forward: expected token_ids \(..., k, n\) for multiple_choice"):
        model.forward(weights, ids[0, 0], model=whole)


def test_without_a_mask_every_token_is_real():
    whole = Model(GAU, (CLASSES, ANSWER), "bidirectional")
    weights, (ids, _, _) = weights_of(whole), text(2)
    implied = model.forward(weights, ids, model=whole)
    explicit = model.forward(weights, ids, 0 * ids, np.ones(ids.shape, bool), np.arange(9), model=whole)
    for name, array in explicit.items():
        np.testing.assert_array_equal(implied[name], array)
    assert np.isfinite(implied["span_scores"]).sum() == 2 * 9 * 10 / 2


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"token_ids": np.full((2, 9), 23)}, DomainError, "gau_alpha.hidden_states: expected token_ids from 0 to 22"),
        ({"token_ids": np.ones((2, 9))}, DomainError, "model.forward: token_ids must be integers"),
        ({"token_ids": np.array(1)}, ShapeError, "model.forward: expected token_ids"),
        ({"mask": np.ones((2, 9))}, DomainError, "mask must be boolean"),
        ({"positions": np.ones(9)}, DomainError, "positions must be integers"),
        (
            {"weights": {}},
            ShapeError,
            "model.forward: expected 12 weights, missing: classifier.bias, class",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes, error, message):
    whole = Model(GAU, (CLASSES,), "bidirectional")
    given = {"weights": weights_of(whole), "token_ids": np.ones((2, 9), int), **changes}
    with pytest.raises(error) as raised:
        model.forward(**given, model=whole)
    assert message in str(raised.value)
    assert isinstance(raised.value, check.SpecError)
