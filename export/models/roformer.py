"""RoFormer: BERT whose queries and keys are rotated by their positions; a layer norm behind every sum.

Specification: refimpl/models/roformer.py. Every layer calls the local functions attention.multi_head_attention,
attention.project and norm.layer_norm.
"""

from collections.abc import Callable

from export.graph import Value
from export.models import _encoder
from export.models._encoder import Weights
from export.ops import attention, norm
from refimpl.models.roformer import Config


def hidden_states(
    weights: Weights,
    token_ids: Value,
    segment_ids: Value,
    mask: Value,
    positions: Value | None = None,
    *,
    config: Config,
    visible: Callable[[Value, Value], Value] = _encoder.bidirectional,
) -> list[Value]:
    """The embedding, then the output of every layer: x_0 ... x_L."""
    summed = _encoder.embedded(weights, token_ids, segment_ids)
    states = [_encoder.mapped(weights, _normed(weights, "embedding.norm", summed, config))]
    shared = _encoder.context(attention.per_head(visible(mask, segment_ids)), mask, positions, config)
    for index in range(config.layers):
        w, x = _encoder.layer_of(weights, index), states[-1]
        middle = _normed(w, "attention_norm", x + _encoder.self_attention(w, x, shared, config), config)
        states.append(_normed(w, "feed_forward_norm", middle + _encoder.feed_forward(w, middle, config), config))
    return states


def _normed(weights: Weights, name: str, x: Value, config: Config) -> Value:
    return norm.layer_norm(x, weights[f"{name}.scale"], weights[f"{name}.bias"], epsilon=config.epsilon)
