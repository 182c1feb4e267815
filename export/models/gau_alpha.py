"""GAU-α: gated attention units in a row, one root-mean-square norm after each.

Specification: refimpl/models/gau_alpha.py. Every layer is one call of the local function gau.block_post_norm.
"""

from functools import partial

from export.graph import Value, arange
from export.models import _encoder
from export.models._encoder import Output, Weights
from export.ops import attention, gau, rope
from export.ops.attention_kernel import softmax_plus
from refimpl.models.gau_alpha import Config


def forward(weights: Weights, token_ids: Value, segment_ids: Value, mask: Value, *, config: Config) -> Output:
    """Logits of a sequence classifier, the sentence vector below them and the last layer's vectors."""
    visible = attention.key_mask(mask)
    positions = arange(token_ids.size(1))
    frequencies = rope.frequencies(config.key_size, base=config.rotary_base)
    kernel = partial(softmax_plus, n_min=config.n_min)
    x = _encoder.embed(weights, token_ids, segment_ids, epsilon=config.epsilon)
    for index in range(config.layers):
        w = _encoder.layer_of(weights, index)
        x = gau.block_post_norm(
            x, visible, None, positions, frequencies,
            w["w_in"], None, w["gamma_q"], None, w["gamma_k"], None, w["w_out"], None,
            rotate=rope.rotate_interleaved, kernel=kernel, epsilon=config.epsilon,
        )  # fmt: skip
    return _encoder.classified(weights, x, mask)
