"""Heads: what stands on the vectors of an encoder, and the weights that each adds to the encoder's.

    hidden = roformer.hidden_states(encoder_weights, token_ids, segment_ids, mask, config=config)
    logits = masked_lm_transformed(head_weights, hidden[-1], encoder_weights["embedding.token"], config=config)

Source: arXiv:1810.04805 (masked language model, pooler, next sentence); https://kexue.fm/archives/8739 (CLUE tasks).

A head is a frozen dataclass of its sizes, whose shapes(config) names its weights; `config` is that of any encoder. Its
functions take the head's weights and no others: _encoder.part splits a mapping that holds the encoder's too. Functions
that may replace each other share one signature. A causal language model is a masked one, read from the hidden states
of _encoder.causal or unilm: the head is the same. `outputs` names what a head gives in a whole model, refimpl.model.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float, Shaped

from refimpl import check
from refimpl.config import check_types
from refimpl.models import _encoder
from refimpl.models._encoder import Shapes, Weights
from refimpl.ops import attention, norm, pooling
from refimpl.ops import head as spans

# How a sentence vector is made of hidden states, or taken from the head Pooler.
Pooling = Literal["first_token", "mean_of_tokens", "first_last_average", "pooler"]


@dataclass(frozen=True)
class TransformedLM:
    """The masked-language head of RoFormer: a dense layer, its norm, the tied token table and a bias per token."""

    outputs: ClassVar[tuple[str, ...]] = ("mlm_logits",)

    def shapes(self, config: Any) -> Shapes:
        """Names and shapes; the token table is the encoder's."""
        e = _encoder.table_width(config)
        return {
            "mlm.transform.kernel": (config.hidden_size, e),
            "mlm.transform.bias": (e,),
            "mlm.norm.scale": (e,),
            "mlm.norm.bias": (e,),
            "mlm.bias": (config.vocab_size,),
        }


@dataclass(frozen=True)
class TiedLM:
    """The masked-language head of RoFormerV2 and GAU-α: the tied token table, behind a matrix where widths differ."""

    outputs: ClassVar[tuple[str, ...]] = ("mlm_logits",)

    def shapes(self, config: Any) -> Shapes:
        """Names and shapes, none for equal widths; the token table is the encoder's."""
        e, d = _encoder.table_width(config), config.hidden_size
        return {"mlm.mapping.kernel": (d, e)} if e != d else {}


@dataclass(frozen=True)
class Pooler:
    """A dense layer on the first token, behind tanh as in BERT or as it is."""

    outputs: ClassVar[tuple[str, ...]] = ("pooled",)

    activation: Literal["tanh", "linear"]

    def __post_init__(self) -> None:
        check_types(self, "heads.Pooler")

    def shapes(self, config: Any) -> Shapes:
        """Names and shapes."""
        d = config.hidden_size
        return {"pooler.kernel": (d, d), "pooler.bias": (d,)}


@dataclass(frozen=True)
class NextSentence:
    """Two classes: the second sentence follows the first, or it does not."""

    outputs: ClassVar[tuple[str, ...]] = ("next_sentence_logits",)

    def shapes(self, config: Any) -> Shapes:
        """Names and shapes; bert4keras stores the kernel transposed, (2, hidden_size)."""
        return {"next_sentence.kernel": (config.hidden_size, 2), "next_sentence.bias": (2,)}


@dataclass(frozen=True)
class SequenceClassifier:
    """One logit per class from a sentence vector, which is given too."""

    outputs: ClassVar[tuple[str, ...]] = ("logits", "embedding")

    labels: int
    pooling: Pooling

    def __post_init__(self) -> None:
        check_types(self, "heads.SequenceClassifier")
        _check_sizes(self, "labels")

    def shapes(self, config: Any) -> Shapes:
        """Names and shapes."""
        return {"classifier.kernel": (config.hidden_size, self.labels), "classifier.bias": (self.labels,)}


@dataclass(frozen=True)
class SentenceEmbedding:
    """A sentence vector and nothing else: a head without weights."""

    outputs: ClassVar[tuple[str, ...]] = ("embedding",)

    pooling: Pooling

    def __post_init__(self) -> None:
        check_types(self, "heads.SentenceEmbedding")

    def shapes(self, config: Any) -> Shapes:
        """No weights; those of the pooler are its own."""
        return {}


@dataclass(frozen=True)
class MultipleChoice:
    """One score per choice, from the sentence vector of the question with that choice."""

    outputs: ClassVar[tuple[str, ...]] = ("choice_logits",)

    pooling: Pooling

    def __post_init__(self) -> None:
        check_types(self, "heads.MultipleChoice")

    def shapes(self, config: Any) -> Shapes:
        """Names and shapes."""
        return {"choice.kernel": (config.hidden_size, 1), "choice.bias": (1,)}


@dataclass(frozen=True)
class EntityPointer:
    """GlobalPointer: a query and a key of `size` features for each of `types` kinds of spans."""

    outputs: ClassVar[tuple[str, ...]] = ("entity_scores",)

    types: int
    size: int
    rotary_base: float

    def __post_init__(self) -> None:
        _check_pointer(self, "types", "size")

    def shapes(self, config: Any) -> Shapes:
        """Names and shapes; the columns are query and key of type 0, query and key of type 1, ..."""
        width = 2 * self.types * self.size
        return {"entity.kernel": (config.hidden_size, width), "entity.bias": (width,)}


@dataclass(frozen=True)
class EfficientEntityPointer:
    """Efficient GlobalPointer: one query and key of `size` features, and a start and an end term per type."""

    outputs: ClassVar[tuple[str, ...]] = ("entity_scores",)

    types: int
    size: int
    rotary_base: float

    def __post_init__(self) -> None:
        _check_pointer(self, "types", "size")

    def shapes(self, config: Any) -> Shapes:
        """Names and shapes; even columns are the query's and the end's, odd ones the key's and the start's."""
        width = 2 * self.size
        return {
            "entity.kernel": (config.hidden_size, width),
            "entity.bias": (width,),
            "entity.type_kernel": (width, 2 * self.types),
            "entity.type_bias": (2 * self.types,),
        }


@dataclass(frozen=True)
class SpanPointer:
    """GlobalPointer of one type and without a bias: the answer in a text that is read."""

    outputs: ClassVar[tuple[str, ...]] = ("span_scores",)

    size: int
    rotary_base: float

    def __post_init__(self) -> None:
        _check_pointer(self, "size")

    def shapes(self, config: Any) -> Shapes:
        """Names and shapes; the first half of the columns is the query's."""
        return {"span.kernel": (config.hidden_size, 2 * self.size)}


def name_of(head: Any) -> str:
    """The name of a head, or of its class, in files: SequenceClassifier is sequence_classifier."""
    kind = head if isinstance(head, type) else type(head)
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()


HEADS: Mapping[str, type] = {
    name_of(kind): kind
    for kind in (
        TransformedLM, TiedLM, Pooler, NextSentence, SequenceClassifier, SentenceEmbedding, MultipleChoice,
        EntityPointer, EfficientEntityPointer, SpanPointer,
    )
}  # fmt: skip


def masked_lm_transform(
    weights: Weights, hidden: Shaped[np.ndarray, "..."], *, config: Any
) -> Float[np.ndarray, "*b e"]:
    """What the token table is multiplied with in `masked_lm_transformed`, whose weights it takes.

    y = layer_norm(activation(hidden W + b), epsilon = mlm_epsilon)

    C1. The norm must stand after the activation, with the epsilon of its own.
    Raises: ShapeError for weights or vectors that do not fit; DomainError for NaN or infinity.
    """
    w = _checked("heads.masked_lm_transform", weights, TransformedLM(), config)
    return _transformed(w, hidden, config)


def masked_lm_transformed(
    weights: Weights, hidden: Shaped[np.ndarray, "..."], table: Shaped[np.ndarray, "..."], *, config: Any
) -> Float[np.ndarray, "*b v"]:
    """One logit per token of the vocabulary, from the vector of each token; the weights of TransformedLM.

    logits = layer_norm(activation(hidden W + b)) tableᵀ + bias

    C1. table must be the encoder's embedding.token, (vocab_size, embedding_size).
    C2. The result must be logits: no softmax.
    Raises: ShapeError for weights, table or vectors that do not fit; DomainError for NaN or infinity.
    Precision: as attention.project, behind a norm.
    Source: arXiv:1810.04805; RoFormer in bert4keras, Hugging Face and JunnYu.
    Differs: bert4keras from 0.11.4 on has 1e-12 inside this norm and 1e-7 in all others, the others one epsilon.
    """
    operation = "heads.masked_lm_transformed"
    w = _checked(operation, weights, TransformedLM(), config)
    return attention.project(_transformed(w, hidden, config), _table(operation, table, config).T, w["mlm.bias"])


def masked_lm_tied(
    weights: Weights, hidden: Shaped[np.ndarray, "..."], table: Shaped[np.ndarray, "..."], *, config: Any
) -> Float[np.ndarray, "*b v"]:
    """One logit per token of the vocabulary, from the vector of each token; the weights of TiedLM.

    logits = hidden [W] tableᵀ

    C1. table must be the encoder's embedding.token, (vocab_size, embedding_size); no bias must be added.
    C2. The result must be logits: no softmax.
    Raises: ShapeError for weights, table or vectors that do not fit; DomainError for NaN or infinity.
    Precision: as attention.project.
    Source: RoFormerV2 and GAU-α in bert4keras.
    Differs: JunnYu has no W, so that its head asks for equal widths. bert4keras has W and leaves it out of its
        checkpoints: after loading one its logits are those of a random W.
    """
    operation = "heads.masked_lm_tied"
    w = _checked(operation, weights, TiedLM(), config)
    x = attention.project(hidden, w["mlm.mapping.kernel"], None) if w else hidden
    return attention.project(x, _table(operation, table, config).T, None)


def pooler_tanh(weights: Weights, hidden: Shaped[np.ndarray, "..."], *, config: Any) -> Float[np.ndarray, "*b d"]:
    """The first token's vector through a dense layer and tanh: BERT's pooler, under `next_sentence`.

    Raises: as pooling.pooler_tanh; ShapeError for other weights than Pooler's.
    Differs: bert4keras has no pooler on RoFormerV2 and GAU-α.
    """
    w = _checked("heads.pooler_tanh", weights, Pooler("tanh"), config)
    return pooling.pooler_tanh(hidden, w["pooler.kernel"], w["pooler.bias"])


def pooler_linear(weights: Weights, hidden: Shaped[np.ndarray, "..."], *, config: Any) -> Float[np.ndarray, "*b d"]:
    """The same without tanh: bert4keras' with_pool = "linear".

    Raises: as pooling.pooler_linear; ShapeError for other weights than Pooler's.
    """
    w = _checked("heads.pooler_linear", weights, Pooler("linear"), config)
    return pooling.pooler_linear(hidden, w["pooler.kernel"], w["pooler.bias"])


def next_sentence(weights: Weights, pooled: Shaped[np.ndarray, "..."], *, config: Any) -> Float[np.ndarray, "*b 2"]:
    """The two logits of BERT's second task, from the pooled vector.

    Raises: as head.classify; ShapeError for other weights than NextSentence's.
    """
    w = _checked("heads.next_sentence", weights, NextSentence(), config)
    return spans.classify(pooled, w["next_sentence.kernel"], w["next_sentence.bias"])


def first_token(
    states: Sequence[Shaped[np.ndarray, "..."]], mask: Shaped[np.ndarray, "..."]
) -> Float[np.ndarray, "*b d"]:
    """A sentence vector from all hidden states: the last one's first token, [CLS].

    Raises: as pooling.first; ShapeError without a state.
    Differs: padding on the left puts a padded token there.
    """
    _check_states("heads.first_token", states, 1)
    return pooling.first(states[-1])


def mean_of_tokens(
    states: Sequence[Shaped[np.ndarray, "..."]], mask: Shaped[np.ndarray, "..."]
) -> Float[np.ndarray, "*b d"]:
    """A sentence vector from all hidden states: the mean of the last one's real tokens.

    Raises: as pooling.masked_mean; ShapeError without a state.
    """
    _check_states("heads.mean_of_tokens", states, 1)
    return pooling.masked_mean(states[-1], mask)


def first_last_average(
    states: Sequence[Shaped[np.ndarray, "..."]], mask: Shaped[np.ndarray, "..."]
) -> Float[np.ndarray, "*b d"]:
    """A sentence vector from all hidden states: the average of the means of the first layer and of the last.

    C1. The first layer's output is states[1]; states[0], the embedding, must not enter.
    Raises: as pooling.first_last_average; ShapeError without a layer.
    """
    _check_states("heads.first_last_average", states, 2)
    return pooling.first_last_average(states[1], states[-1], mask)


POOLINGS: Mapping[str, Callable[..., np.ndarray]] = {
    "first_token": first_token,
    "mean_of_tokens": mean_of_tokens,
    "first_last_average": first_last_average,
}


def sequence_classifier(
    weights: Weights, sentence: Shaped[np.ndarray, "..."], *, head: SequenceClassifier, config: Any
) -> Float[np.ndarray, "*b k"]:
    """The logits of the classes from a sentence vector, pooled in any way.

    Raises: as head.classify; ShapeError for other weights than the head's.
    """
    w = _checked("heads.sequence_classifier", weights, head, config)
    return spans.classify(sentence, w["classifier.kernel"], w["classifier.bias"])


def multiple_choice(
    weights: Weights, sentence: Shaped[np.ndarray, "..."], choices: Shaped[np.ndarray, "..."], *, config: Any
) -> Float[np.ndarray, "*b k"]:
    """One score per choice from its sentence vector, -inf where `choices` is False; the weights of MultipleChoice.

    C1. The encoder must read every choice by itself: the choices are an axis before the tokens, (..., k, n).
    Raises: as head.choose; ShapeError for other weights than the head's.
    """
    # Its weights do not depend on the pooling.
    w = _checked("heads.multiple_choice", weights, MultipleChoice("first_token"), config)
    return spans.choose(sentence, w["choice.kernel"], w["choice.bias"], choices)


def entity_pointer(
    weights: Weights,
    hidden: Shaped[np.ndarray, "..."],
    mask: Shaped[np.ndarray, "..."],
    positions: Shaped[np.ndarray, "..."] | None = None,
    *,
    head: EntityPointer,
    config: Any,
) -> Float[np.ndarray, "*b h n n"]:
    """The score of every span for every type; head.decode_spans reads it.

    C1. Without positions they must be 0, 1, 2, ... of the array.
    Raises: as head.global_pointer; ShapeError for other weights than the head's.
    """
    w = _checked("heads.entity_pointer", weights, head, config)
    positions = _positions(hidden, positions)
    return spans.global_pointer(
        hidden, w["entity.kernel"], w["entity.bias"], mask, positions, heads=head.types, base=head.rotary_base
    )


def entity_pointer_efficient(
    weights: Weights,
    hidden: Shaped[np.ndarray, "..."],
    mask: Shaped[np.ndarray, "..."],
    positions: Shaped[np.ndarray, "..."] | None = None,
    *,
    head: EfficientEntityPointer,
    config: Any,
) -> Float[np.ndarray, "*b h n n"]:
    """The score of every span for every type, with one query and key for all types.

    C1. Without positions they must be 0, 1, 2, ... of the array.
    Raises: as head.efficient_global_pointer; ShapeError for other weights than the head's.
    """
    w = _checked("heads.entity_pointer_efficient", weights, head, config)
    shared, types = (w["entity.kernel"], w["entity.bias"]), (w["entity.type_kernel"], w["entity.type_bias"])
    positions = _positions(hidden, positions)
    return spans.efficient_global_pointer(hidden, *shared, *types, mask, positions, base=head.rotary_base)


def span_pointer(
    weights: Weights,
    hidden: Shaped[np.ndarray, "..."],
    mask: Shaped[np.ndarray, "..."],
    positions: Shaped[np.ndarray, "..."] | None = None,
    *,
    head: SpanPointer,
    config: Any,
) -> Float[np.ndarray, "*b n n"]:
    """The score of every span (start, end); head.best_span reads it. `mask` is True on tokens that an answer may hold.

    C1. Without positions they must be 0, 1, 2, ... of the array.
    Raises: as head.global_pointer; ShapeError for other weights than the head's.
    Source: https://kexue.fm/archives/8739 (cmrc2018), where `mask` is True on [CLS] too: the span (0, 0) is no answer.
    """
    w = _checked("heads.span_pointer", weights, head, config)
    kernel, positions = w["span.kernel"], _positions(hidden, positions)
    no_bias = np.zeros(kernel.shape[1])
    return spans.global_pointer(hidden, kernel, no_bias, mask, positions, heads=1, base=head.rotary_base)[..., 0, :, :]


def _checked(operation: str, weights: Weights, head: Any, config: Any) -> dict[str, np.ndarray]:
    return _encoder.checked_weights(operation, weights, head.shapes(config))


def _transformed(weights: Weights, hidden: np.ndarray, config: Any) -> np.ndarray:
    x = attention.project(hidden, weights["mlm.transform.kernel"], weights["mlm.transform.bias"])
    x = _encoder.ACTIVATIONS[config.activation](x)
    return norm.layer_norm(x, weights["mlm.norm.scale"], weights["mlm.norm.bias"], epsilon=config.mlm_epsilon)


def _table(operation: str, table: np.ndarray, config: Any) -> np.ndarray:
    table = check.real(operation, "table", table)
    shape = (config.vocab_size, _encoder.table_width(config))
    check.shape(operation, table.shape == shape, f"a token table of shape {shape}", table=table)
    return table


def _positions(hidden: np.ndarray, positions: np.ndarray | None) -> np.ndarray:
    if positions is not None:
        return positions
    # What has no token axis is refused where it is scored.
    return np.arange(np.shape(hidden)[-2] if np.ndim(hidden) >= 2 else 0)


def _check_states(operation: str, states: Sequence[np.ndarray], least: int) -> None:
    check.shape(operation, len(states) >= least, f"at least {least} of the hidden states", received=len(states))


def _check_sizes(head: Any, *names: str) -> None:
    for name in names:
        size = getattr(head, name)
        check.domain(f"heads.{type(head).__name__}", size >= 1, f"{name} >= 1", **{name: size})


def _check_pointer(head: Any, *names: str) -> None:
    operation = f"heads.{type(head).__name__}"
    check_types(head, operation)
    _check_sizes(head, *names)
    check.domain(operation, head.size % 2 == 0, "an even size", size=head.size)
    check.domain(operation, head.rotary_base > 0, "rotary_base > 0", rotary_base=head.rotary_base)
