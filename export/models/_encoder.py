"""What the models share around their layers: the embedding and the classifier."""

from collections.abc import Mapping
from typing import NamedTuple

from export.graph import Value, take
from export.ops import head, norm, pooling

Weights = Mapping[str, Value]


class Output(NamedTuple):
    """The classes' logits, the sentence vector that they are read from, and the vectors of the tokens."""

    logits: Value
    embedding: Value
    hidden: Value


def embed(weights: Weights, token_ids: Value, segment_ids: Value, *, epsilon: float) -> Value:
    """The normalised sum of a token's vector and its segment's."""
    vectors = take(weights["embedding.token"], token_ids, axis=0)
    vectors = vectors + take(weights["embedding.segment"], segment_ids, axis=0)
    return norm.rms_norm(vectors, epsilon=epsilon)


def classified(weights: Weights, hidden: Value, mask: Value) -> Output:
    """The logits of the mean of the real tokens."""
    embedding = pooling.masked_mean(hidden, mask)
    return Output(head.classify(embedding, weights["classifier.kernel"], weights["classifier.bias"]), embedding, hidden)


def layer_of(weights: Weights, index: int) -> dict[str, Value]:
    """The weights of one layer, by their names within it."""
    prefix = f"layers.{index}."
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
