"""RoFormerV2: RoFormer without a single bias, and with root-mean-square norms that have no weights.

Specification: refimpl/models/roformer_v2.py. Every layer calls the local functions attention.multi_head_attention,
attention.project and norm.rms_norm.
"""

from collections.abc import Callable

from export.graph import Value
from export.models import _encoder
from export.models._encoder import Weights
from export.ops import attention, norm
from refimpl.models.roformer_v2 import Config


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
    epsilon = config.epsilon
    states = [_encoder.mapped(weights, _encoder.embed(weights, token_ids, segment_ids, epsilon=epsilon))]
    shared = _encoder.context(attention.per_head(visible(mask, segment_ids)), mask, positions, config)
    for index in range(config.layers):
        w, x = _encoder.layer_of(weights, index), states[-1]
        middle = norm.rms_norm(x + _encoder.self_attention(w, x, shared, config), epsilon=epsilon)
        states.append(norm.rms_norm(middle + _encoder.feed_forward(w, middle, config), epsilon=epsilon))
    return states
