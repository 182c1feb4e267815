"""What the models share around their layers: the embedding, who sees whom, and what Transformers do in a layer."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from export.graph import Value, arange, take
from export.ops import activation, attention, attention_kernel, norm, rope

Weights = Mapping[str, Value]


ACTIVATIONS: Mapping[str, Callable[[Value], Value]] = {
    "gelu_erf": activation.gelu_erf,
    "gelu_tanh": activation.gelu_tanh,
    "relu": activation.relu,
    "silu": activation.silu,
}


def embedded(weights: Weights, token_ids: Value, segment_ids: Value) -> Value:
    """The sum of a token's vector and its segment's."""
    vectors = take(weights["embedding.token"], token_ids, axis=0)
    return vectors + take(weights["embedding.segment"], segment_ids, axis=0)


def embed(weights: Weights, token_ids: Value, segment_ids: Value, *, epsilon: float) -> Value:
    """The normalised sum of a token's vector and its segment's."""
    return norm.rms_norm(embedded(weights, token_ids, segment_ids), epsilon=epsilon)


def layer_of(weights: Weights, index: int) -> dict[str, Value]:
    """The weights of one layer, by their names within it."""
    prefix = f"layers.{index}."
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def mapped(weights: Weights, x: Value) -> Value:
    """The embedding in the width of the hidden states: as it is where the weights hold no mapping."""
    kernel = weights.get("embedding.mapping.kernel")
    return x if kernel is None else attention.project(x, kernel, weights.get("embedding.mapping.bias"))


def bidirectional(mask: Value, segment_ids: Value) -> Value:
    """Every token sees all real tokens."""
    return attention.key_mask(mask)


def causal(mask: Value, segment_ids: Value) -> Value:
    """Every token sees the real tokens up to itself: a language model. A padded one does not see itself."""
    n = mask.size(-1)
    return attention.key_mask(mask) & attention.causal_mask(n, n)


def unilm(mask: Value, segment_ids: Value) -> Value:
    """Segment 0 sees itself whole, segment 1 sees segment 0 and is causal: sequence to sequence in one stack."""
    return attention.key_mask(mask) & attention.unilm_mask(segment_ids)


VISIBLE: Mapping[str, Callable[[Value, Value], Value]] = {
    "bidirectional": bidirectional,
    "causal": causal,
    "unilm": unilm,
}


class Context(NamedTuple):
    """What the attention of every layer reads besides weights: who is seen, positions and frequencies."""

    visible: Value
    positions: Value
    frequencies: Value


def counted(positions: Value | None, mask: Value) -> Value:
    """The positions (b, n) that are given, else 0, 1, 2, ... of the array."""
    return arange(mask.size(1)) if positions is None else positions


def context(seen: Value, mask: Value, positions: Value | None, config: Any) -> Context:
    """The same keys are seen in every layer, at the same positions."""
    return Context(seen, counted(positions, mask), rope.frequencies(config.key_size, base=config.rotary_base))


def self_attention(weights: Weights, x: Value, shared: Context, config: Any) -> Value:
    """Softmax attention with interleaved rotary positions; biases that the weights do not hold are left out."""
    projections: list[Any] = [weights.get(f"attention.{kind}_{name}") for name in "qkvo" for kind in "wb"]
    return attention.multi_head_attention(
        x, *shared, *projections, heads=config.heads, rotate=rope.rotate_interleaved, kernel=attention_kernel.softmax
    )


def feed_forward(weights: Weights, x: Value, config: Any) -> Value:
    """Two dense layers around the activation that the Config names."""
    inner = attention.project(x, weights["feed_forward.w_in"], weights.get("feed_forward.b_in"))
    inner = ACTIVATIONS[config.activation](inner)
    return attention.project(inner, weights["feed_forward.w_out"], weights.get("feed_forward.b_out"))
