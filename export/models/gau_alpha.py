"""GAU-α: gated attention units in a row, one root-mean-square norm after each.

Specification: refimpl/models/gau_alpha.py. Every layer is one call of the local function gau.block_post_norm.
"""

from collections.abc import Callable
from functools import partial

from export.graph import Value
from export.models import _encoder
from export.models._encoder import Weights
from export.ops import gau, rope
from export.ops.attention_kernel import softmax_plus
from refimpl.models.gau_alpha import Config


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
    seen, positions, frequencies = _encoder.context(visible(mask, segment_ids), mask, positions, config)
    kernel = partial(softmax_plus, n_min=config.n_min)
    states = [_encoder.embed(weights, token_ids, segment_ids, epsilon=config.epsilon)]
    for index in range(config.layers):
        w = _encoder.layer_of(weights, index)
        x = gau.block_post_norm(
            states[-1], seen, None, positions, frequencies,
            w["w_in"], None, w["gamma_q"], None, w["gamma_k"], None, w["w_out"], None,
            rotate=rope.rotate_interleaved, kernel=kernel, epsilon=config.epsilon,
        )  # fmt: skip
        states.append(x)
    return states
