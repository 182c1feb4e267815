"""Heads: what stands on the vectors of an encoder, out of the local functions of export/ops.

Specification: refimpl/models/_heads.py. The token table is the encoder's initialiser, read transposed. A head function
takes the head, its weights and what it reads; `given` asks the right one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from export.graph import Value, constant
from export.models import _encoder
from export.models._encoder import Weights
from export.ops import attention, norm, pooling
from export.ops import head as spans
from refimpl.models import _heads as specification


def masked_lm_transformed(weights: Weights, hidden: Value, table: Value, *, config: Any) -> Value:
    """One logit per token of the vocabulary: dense layer, activation, norm, tied table and a bias per token."""
    x = attention.project(hidden, weights["mlm.transform.kernel"], weights["mlm.transform.bias"])
    x = _encoder.ACTIVATIONS[config.activation](x)
    x = norm.layer_norm(x, weights["mlm.norm.scale"], weights["mlm.norm.bias"], epsilon=config.mlm_epsilon)
    return attention.project(x, table.transpose(1, 0), weights["mlm.bias"])


def masked_lm_tied(weights: Weights, hidden: Value, table: Value, *, config: Any) -> Value:
    """One logit per token of the vocabulary: the tied table, behind a matrix where widths differ."""
    mapping = weights.get("mlm.mapping.kernel")
    x = hidden if mapping is None else attention.project(hidden, mapping, None)
    return attention.project(x, table.transpose(1, 0), None)


def pooled(weights: Weights, hidden: Value, *, head: specification.Pooler) -> Value:
    """A dense layer on the first token, behind tanh or as it is."""
    pool = pooling.pooler_tanh if head.activation == "tanh" else pooling.pooler_linear
    return pool(hidden, weights["pooler.kernel"], weights["pooler.bias"])


def first_token(states: Sequence[Value], mask: Value) -> Value:
    """The last state's first token."""
    return pooling.first(states[-1])


def mean_of_tokens(states: Sequence[Value], mask: Value) -> Value:
    """The mean of the last state's real tokens."""
    return pooling.masked_mean(states[-1], mask)


def first_last_average(states: Sequence[Value], mask: Value) -> Value:
    """The average of the means of the first layer and of the last."""
    return pooling.first_last_average(states[1], states[-1], mask)


POOLINGS: Mapping[str, Callable[[Sequence[Value], Value], Value]] = {
    "first_token": first_token,
    "mean_of_tokens": mean_of_tokens,
    "first_last_average": first_last_average,
}


def entity_pointer(
    weights: Weights, hidden: Value, mask: Value, positions: Value | None, *, head: specification.EntityPointer
) -> Value:
    """The score of every span for every type, at the positions of the encoder."""
    kernel, bias = weights["entity.kernel"], weights["entity.bias"]
    positions = _encoder.counted(positions, mask)
    return spans.global_pointer(hidden, kernel, bias, mask, positions, heads=head.types, base=head.rotary_base)


def entity_pointer_efficient(
    weights: Weights, hidden: Value, mask: Value, positions: Value | None, *, head: specification.EfficientEntityPointer
) -> Value:
    """The same, with one query and key for all types."""
    held = [weights[f"entity.{name}"] for name in ("kernel", "bias", "type_kernel", "type_bias")]
    positions = _encoder.counted(positions, mask)
    return spans.efficient_global_pointer(hidden, *held, mask, positions, base=head.rotary_base)


def span_pointer(
    weights: Weights, hidden: Value, mask: Value, positions: Value | None, *, head: specification.SpanPointer
) -> Value:
    """The score of every span (start, end), of one type and without a bias."""
    kernel = weights["span.kernel"]
    no_bias = constant(np.zeros(2 * head.size, kernel.dtype))
    positions = _encoder.counted(positions, mask)
    return spans.global_pointer(hidden, kernel, no_bias, mask, positions, heads=1, base=head.rotary_base)[..., 0, :, :]


def given(
    head: Any,
    weights: Weights,
    states: Sequence[Value],
    mask: Value,
    positions: Value | None,
    pooled_: Value | None,
    config: Any,
    choices: Callable[[Value], Value],
) -> dict[str, Value]:
    """What one head gives, by name, except the pooler, which other heads read as `pooled_`.

    choices: an array (batch * choices, ...) as (batch, choices, ...); only MultipleChoice asks for it.
    """
    last, one = states[-1], head.outputs[0]
    how: str = getattr(head, "pooling", "")
    sentence: Any = POOLINGS[how](states, mask) if how in POOLINGS else pooled_
    match head:
        case specification.TransformedLM():
            return {one: masked_lm_transformed(weights, last, weights["embedding.token"], config=config)}
        case specification.TiedLM():
            return {one: masked_lm_tied(weights, last, weights["embedding.token"], config=config)}
        case specification.NextSentence():
            return {one: spans.classify(sentence, weights["next_sentence.kernel"], weights["next_sentence.bias"])}
        case specification.SequenceClassifier():
            logits = spans.classify(sentence, weights["classifier.kernel"], weights["classifier.bias"])
            return {"logits": logits, "embedding": sentence}
        case specification.SentenceEmbedding():
            return {one: sentence}
        case specification.MultipleChoice():
            there = choices(mask).cast(np.int64).sum(-1) > 0
            return {one: spans.choose(choices(sentence), weights["choice.kernel"], weights["choice.bias"], there)}
        case specification.EntityPointer():
            return {one: entity_pointer(weights, last, mask, positions, head=head)}
        case specification.EfficientEntityPointer():
            return {one: entity_pointer_efficient(weights, last, mask, positions, head=head)}
    return {one: span_pointer(weights, last, mask, positions, head=head)}
