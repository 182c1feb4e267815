"""Heads: the specification's figures and the originals', names, gradients, compilation, and every refusal."""

import dataclasses

import numpy as np
import pytest
import torch

from refimpl.check import DomainError, ShapeError
from refimpl.models import _heads as spec
from refimpl.models import gau_alpha, roformer, roformer_v2
from tests.golden import originals
from torchimpl.models import _heads
from torchimpl.models.roformer import Roformer

DOUBLE, SINGLE = 1e-12, 5e-6
SIZES = {
    "vocab_size": 29, "segments": 2, "embedding_size": 7, "hidden_size": 22, "layers": 2, "heads": 1,
    "intermediate_size": 3,
}  # fmt: skip
V1 = roformer.dialect("bert4keras-0.11.5", **SIZES)
V2 = roformer_v2.dialect("bert4keras-0.11.5", **SIZES)
GAU = gau_alpha.Config(
    vocab_size=29, hidden_size=22, layers=1, expanded_size=3, key_size=2, segments=2, n_min=1, epsilon=1e-12,
    rotary_base=1e4,
)  # fmt: skip
CLASSES = spec.SequenceClassifier(labels=5, pooling="first_token")
CHOICE = spec.MultipleChoice(pooling="first_token")
TRANSFORMED, TIED, NEXT = spec.TransformedLM(), spec.TiedLM(), spec.NextSentence()
TANH, LINEAR = spec.Pooler("tanh"), spec.Pooler("linear")
ENTITIES = spec.EntityPointer(types=3, size=4, rotary_base=100.0)
EFFICIENT = spec.EfficientEntityPointer(types=3, size=4, rotary_base=100.0)
ANSWER = spec.SpanPointer(size=4, rotary_base=100.0)

RNG = np.random.default_rng(5)
HIDDEN, TABLE = RNG.normal(size=(3, 11, 22)), RNG.normal(size=(29, 7))
WIDE_TABLE = RNG.normal(size=(29, 22))
MASK = np.arange(11) < np.array([[11], [6], [0]])
POSITIONS = RNG.permutation(40)[:11]
CHOICES = RNG.normal(size=(3, 4, 22)), np.arange(4) < np.array([[4], [2], [0]])

# The module, the specification's function of the same weights, and the arrays that both are given.
HEADS = {
    "transformed": (lambda: _heads.TransformedLM(V1, TRANSFORMED), spec.masked_lm_transformed, V1, (HIDDEN, TABLE)),
    "tied": (lambda: _heads.TiedLM(V2, TIED), spec.masked_lm_tied, V2, (HIDDEN, TABLE)),
    "tied of one width": (lambda: _heads.TiedLM(GAU, TIED), spec.masked_lm_tied, GAU, (HIDDEN, WIDE_TABLE)),
    "pooler": (lambda: _heads.Pooler(V1, TANH), spec.pooler_tanh, V1, (HIDDEN,)),
    "linear pooler": (lambda: _heads.Pooler(V1, LINEAR), spec.pooler_linear, V1, (HIDDEN,)),
    "next sentence": (lambda: _heads.NextSentence(V1, NEXT), spec.next_sentence, V1, (HIDDEN[:, 0],)),
    "classifier": (lambda: _heads.SequenceClassifier(V2, CLASSES), spec.sequence_classifier, V2, (HIDDEN[:, 0],)),
    "choice": (lambda: _heads.MultipleChoice(V1, CHOICE), spec.multiple_choice, V1, CHOICES),
    "entities": (lambda: _heads.EntityPointer(V2, ENTITIES), spec.entity_pointer, V2, (HIDDEN, MASK)),
    "entities at positions": (
        lambda: _heads.EntityPointer(V1, ENTITIES), spec.entity_pointer, V1, (HIDDEN, MASK, POSITIONS)
    ),
    "efficient": (lambda: _heads.EfficientEntityPointer(V2, EFFICIENT), spec.entity_pointer_efficient, V2,
                  (HIDDEN, MASK)),
    "efficient at positions": (
        lambda: _heads.EfficientEntityPointer(GAU, EFFICIENT), spec.entity_pointer_efficient, GAU,
        (HIDDEN, MASK, POSITIONS),
    ),
    "answer": (lambda: _heads.SpanPointer(V1, ANSWER), spec.span_pointer, V1, (HIDDEN, MASK)),
    "answer at positions": (lambda: _heads.SpanPointer(V1, ANSWER), spec.span_pointer, V1, (HIDDEN, MASK, POSITIONS)),
}  # fmt: skip
every = pytest.mark.parametrize("name", HEADS)
WITH_SIZES = (spec.SequenceClassifier, spec.EntityPointer, spec.EfficientEntityPointer, spec.SpanPointer)


def head_of(name, dtype=torch.float64):
    """A head with random weights of all names, in eval mode."""
    module, rng = HEADS[name][0]().to(dtype).eval(), np.random.default_rng(6)
    state = {key: torch.tensor(rng.normal(size=tuple(t.shape))) for key, t in module.state_dict().items()}
    module.load_state_dict(state)
    return module


def given(name, dtype=torch.float64):
    arrays = (torch.tensor(array) for array in HEADS[name][3])
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in arrays)


def expected(name, module):
    _, function, config, arrays = HEADS[name]
    weights = {key: tensor.double().numpy() for key, tensor in module.state_dict().items()}
    sizes = {"head": module.head} if isinstance(module.head, WITH_SIZES) else {}
    return function(weights, *arrays, **sizes, config=config)


@every
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, DOUBLE), (torch.float32, SINGLE)])
def test_every_head_is_that_of_the_specification(name, dtype, bound):
    module = head_of(name, dtype)
    right = expected(name, module)
    found = module(*given(name, dtype)).detach()
    assert found.dtype == dtype
    finite = np.isfinite(right)
    np.testing.assert_array_equal(found.numpy()[~finite], right[~finite])
    scale = np.abs(right[finite]).max()
    np.testing.assert_allclose(found.double().numpy()[finite], right[finite], rtol=0, atol=bound * scale)


@every
def test_the_state_has_the_names_and_shapes_of_the_specification(name):
    make, _, config, _ = HEADS[name]
    module = make()
    assert {key: tuple(t.shape) for key, t in module.state_dict().items()} == module.head.shapes(config)
    other = make()
    other.load_state_dict(module.state_dict())
    for key, tensor in module.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor)


def test_there_is_a_module_for_every_head_of_the_specification():
    named = {kind.__name__ for kind in spec.HEADS.values()}
    # The one without weights is told here.
    embedding = spec.SentenceEmbedding("first_token")
    assert torch.equal(_heads.SentenceEmbedding(V1, embedding)(X), X)
    assert named == {type(make()).__name__ for make, *_ in HEADS.values()} | {"SentenceEmbedding"}


def test_the_transform_is_what_the_table_is_multiplied_with():
    module = head_of("transformed")
    weights = {key: tensor.numpy() for key, tensor in module.state_dict().items()}
    found = module.transform(torch.tensor(HIDDEN)).detach().numpy()
    right = spec.masked_lm_transform(weights, HIDDEN, config=V1)
    np.testing.assert_allclose(found, right, rtol=0, atol=DOUBLE)
    # The norm has an epsilon of its own.
    module.config = dataclasses.replace(V1, mlm_epsilon=0.5)
    assert (module.transform(torch.tensor(HIDDEN)).detach().numpy() != found).any()


@pytest.mark.parametrize("name", ["first_token", "mean_of_tokens", "first_last_average"])
def test_sentence_vectors_are_those_of_the_specification(name):
    # The embedding holds NaN: no pooling may touch it.
    states = [np.full_like(HIDDEN, np.nan), HIDDEN[..., ::-1].copy(), np.full_like(HIDDEN, np.nan), HIDDEN]
    pool, tensors = getattr(_heads, name), [torch.tensor(state) for state in states]
    right = getattr(spec, name)(states, MASK)
    np.testing.assert_allclose(pool(tensors, torch.tensor(MASK)).numpy(), right, rtol=0, atol=DOUBLE)
    right = getattr(spec, name)(states, np.ones_like(MASK))
    np.testing.assert_allclose(pool(tensors, None).numpy(), right, rtol=0, atol=DOUBLE)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, DOUBLE), (torch.float32, SINGLE)])
def test_the_kept_parts_of_bert4keras_models(dtype, bound):
    sizes = {"layers": 1, "heads": 4, "segments": 2}
    plain = roformer.dialect(
        "bert4keras-0.11.5", vocab_size=120, embedding_size=48, hidden_size=48, intermediate_size=96, **sizes
    )
    original = originals.copy("b4k_roformer")
    head = loaded(_heads.TransformedLM(plain, TRANSFORMED), original, dtype)
    table = torch.tensor(original.weights["bert/embeddings/word_embeddings"]).to(dtype)
    last = torch.tensor(original.double["io/last_hidden_state"]).to(dtype)
    got = {"io/mlm_transform": head.transform(last), "io/mlm_logits": head(last, table)}
    assert close(got, original.double, bound)

    mapped = roformer.dialect(
        "bert4keras-0.11.5", vocab_size=117, embedding_size=32, hidden_size=64, intermediate_size=160, **sizes
    )
    original = originals.copy("b4k_roformer_emb")
    last = torch.tensor(original.double["io/last_hidden_state"]).to(dtype)
    pooled = loaded(_heads.Pooler(mapped, TANH), original, dtype)(last)
    proba = loaded(_heads.NextSentence(mapped, NEXT), original, dtype)(pooled).softmax(dim=-1)
    assert close({"io/pooler_output": pooled, "io/nsp_proba": proba}, original.double, bound)


def loaded(module, original, dtype):
    weights = originals.weights_bert4keras(original, module.head.shapes(module.config))
    module.load_state_dict({key: torch.tensor(array) for key, array in weights.items()})
    return module.to(dtype).eval()


def close(got, arrays, bound):
    got = {key: tensor.detach().double().numpy() for key, tensor in got.items()}
    errors = originals.errors(got, {key: arrays[key] for key in got})
    assert max(errors.values()) < bound, errors
    return len(errors) == 2


@every
def test_every_weight_learns_and_texts_of_padding_do_no_harm(name):
    module, arguments = head_of(name, torch.float32), given(name, torch.float32)
    arguments[0].requires_grad_()
    scores = module(*arguments)
    torch.manual_seed(0)
    (scores.masked_fill(scores.isinf(), 0) * torch.randn_like(scores)).sum().backward()
    for key, parameter in [*module.named_parameters(), ("hidden", arguments[0])]:
        assert torch.isfinite(parameter.grad).all() and (parameter.grad != 0).any(), key


def test_the_tied_table_learns_from_both_of_its_ends():
    config = dataclasses.replace(V1, hidden_size=12, heads=3)
    encoder, head = Roformer(config).eval(), _heads.TransformedLM(config, TRANSFORMED)
    ids = torch.tensor([[1, 2, 3]])
    table = encoder.embedding.token
    head(encoder(ids), table).log_softmax(dim=-1)[..., 5].sum().backward()
    # Every token as an answer, and tokens 1, 2, 3 as inputs too.
    assert (table.grad != 0).any(dim=-1).all()
    both = table.grad.clone()
    table.grad = None
    head(encoder(ids).detach(), table).log_softmax(dim=-1)[..., 5].sum().backward()
    assert (both != table.grad).any(dim=-1).nonzero().flatten().tolist() == [1, 2, 3]
    assert "embedding.token" not in head.state_dict()


@every
def test_sixteen_bits_give_finite_results_nearby(name):
    module = head_of(name, torch.bfloat16)
    right = torch.tensor(expected(name, module))
    found = module(*given(name, torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.isinf(), right.isinf()) and not found.isnan().any()
    seen = ~right.isinf()
    torch.testing.assert_close(found[seen].double(), right[seen], rtol=0, atol=0.05 * right[seen].abs().max().item())


@every
def test_nothing_waits_for_the_device_and_nothing_is_made_elsewhere(name):
    found = head_of(name).to("meta")(*(tensor.to("meta") for tensor in given(name)))
    assert found.device.type == "meta" and found.shape == head_of(name)(*given(name)).shape


@pytest.mark.parametrize("name", ["transformed", "tied", "choice", "entities", "efficient", "answer"])
def test_compiled_heads_equal_eager_ones(name):
    torch.compiler.reset()
    module, arguments = head_of(name), given(name)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="eager")
    for rows in (3, 2):
        # Texts and their masks; tables are whole.
        sliced = tuple(t[:rows].clone() if t.shape[0] == 3 else t for t in arguments)
        torch.testing.assert_close(compiled(*sliced), module(*sliced), rtol=0, atol=DOUBLE)
    torch.compiler.reset()


def test_weights_start_as_the_encoders_do():
    torch.manual_seed(0)
    sizes = {"hidden_size": 300, "embedding_size": 200, "layers": 4}
    v1, v2 = dataclasses.replace(V1, **sizes), dataclasses.replace(V2, **sizes)
    head = _heads.TransformedLM(v1, TRANSFORMED)
    kernel = head.mlm.transform.kernel
    # Sigma 0.02 cut at two of them, of which 0.8796 is left.
    assert kernel.std().item() == pytest.approx(0.017593, rel=0.02) and 0.0398 < kernel.abs().max() <= 0.0400001
    assert (head.mlm.norm.scale == 1).all()
    assert all((bias == 0).all() for bias in (head.mlm.bias, head.mlm.norm.bias, head.mlm.transform.bias))
    # 4^(-1/2) / √300; a kernel of GAU-α has the order 3, and its one layer the gain 1.
    assert _heads.TiedLM(v2, TIED).mlm.mapping.kernel.std().item() == pytest.approx(0.5 / 300**0.5, rel=0.02)
    wide = dataclasses.replace(GAU, hidden_size=300, layers=8)
    assert _heads.Pooler(wide, TANH).pooler.kernel.std().item() == pytest.approx(0.5 / 300**0.5, rel=0.02)
    entity = _heads.EfficientEntityPointer(v2, dataclasses.replace(EFFICIENT, size=100, types=50)).entity
    assert entity.type_kernel.std().item() == pytest.approx(0.5 / 200**0.5, rel=0.02)
    assert (entity.type_bias == 0).all()


def test_dropout_stands_before_the_table_of_the_tied_head():
    module = _heads.TiedLM(GAU, TIED, hidden_dropout=0.5).double().train()
    torch.manual_seed(0)
    dropped = module(torch.tensor(HIDDEN), torch.eye(29, 22, dtype=torch.float64))[..., :22]
    kept = dropped != 0
    assert 0.4 < kept.double().mean() < 0.6
    torch.testing.assert_close(dropped[kept], 2 * torch.tensor(HIDDEN)[kept], rtol=1e-12, atol=0)
    assert _heads.TiedLM(GAU, TIED).dropout.p == 0.1
    # Behind the mapping.
    module = _heads.TiedLM(V2, TIED, hidden_dropout=0.5).double().train()
    dropped = module(torch.tensor(HIDDEN), torch.eye(29, 7, dtype=torch.float64))[..., :7]
    assert 0.3 < (dropped == 0).double().mean() < 0.7


def call(name, *changes):
    """The head with the first of its arguments changed."""
    return lambda: head_of(name)(*changes, *given(name)[len(changes) :])


X = torch.tensor(HIDDEN)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (call("transformed", X, torch.tensor(TABLE.T)), ShapeError,
         "heads.masked_lm_transformed: expected a token table of shape (29, 7), received table of shape (7, 29)"),
        (call("tied", X, torch.tensor(TABLE[:6])), ShapeError,
         "heads.masked_lm_tied: expected a token table of shape (29, 7), received table of shape (6, 7)"),
        (call("tied", X, torch.ones(29, 7, dtype=torch.int64)), DomainError,
         "heads.masked_lm_tied: table must be a floating tensor"),
        (call("transformed", X[..., :5]), ShapeError, "attention.project: expected x (..., in), w (in, out)"),
        (call("tied", X[..., :5]), ShapeError, "attention.project: expected x (..., in), w (in, out)"),
        (call("pooler", X[0, 0]), ShapeError, "pooling.pooler_tanh: expected x of shape (..., n, d)"),
        (call("linear pooler", X[:, :0]), ShapeError, "pooling.pooler_linear: expected x of shape (..., n, d)"),
        (call("next sentence", X[..., :5]), ShapeError, "head.classify: expected x (..., d), kernel (d, k)"),
        (call("classifier", X.long()), DomainError, "head.classify: x must be a floating tensor"),
        (call("choice", X, torch.ones(3, 4)), DomainError, "head.choose: mask must be a boolean tensor"),
        (call("entities", X, torch.ones(3, 10, dtype=torch.bool)), ShapeError, "head.global_pointer: expected x"),
        (call("entities at positions", X, torch.tensor(MASK), torch.ones(11)), DomainError,
         "head.global_pointer: positions must be a tensor of integers"),
        (call("efficient", X, torch.tensor(MASK) * 1), DomainError,
         "head.efficient_global_pointer: mask must be a boolean tensor"),
        (call("answer", X[0, 0], torch.tensor(True)), ShapeError, "head.global_pointer: expected x (..., n, d)"),
        (lambda: _heads.first_token([], None), ShapeError, "heads.first_token: expected at least 1 of the hidden"),
        (lambda: _heads.mean_of_tokens([], None), ShapeError, "heads.mean_of_tokens: expected at least 1"),
        (lambda: _heads.first_last_average([X], None), ShapeError,
         "heads.first_last_average: expected at least 2 of the hidden states, received received=1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(wrong, error, message):
    with pytest.raises(error) as raised:
        wrong()
    assert message in str(raised.value)
