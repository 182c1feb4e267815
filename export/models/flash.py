"""FLASH with mixed chunks: pre-norm units that attend inside chunks quadratically and between them linearly.

Specification: refimpl/models/flash.py. Every layer is a call of norm.layer_norm, one of mixed_chunk_attention.unit and
a sum.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from export.graph import Value, arange
from export.models import _encoder
from export.models._encoder import Output, Weights
from export.ops import attention_kernel, mixed_chunk_attention, norm, rope
from refimpl.models.flash import Config


def forward(weights: Weights, token_ids: Value, segment_ids: Value, mask: Value, *, config: Config) -> Output:
    """Logits of a sequence classifier, the sentence vector below them and the normalised vectors of the last layer."""
    positions = arange(token_ids.size(1))
    frequencies = rope.frequencies(config.key_size, base=config.rotary_base)
    rule = _rule(config)
    x = _encoder.embed(weights, token_ids, segment_ids, epsilon=config.epsilon)
    for index in range(config.layers):
        w = _encoder.layer_of(weights, index)
        unit = mixed_chunk_attention.unit(
            norm.layer_norm(x, w["norm_scale"], w["norm_bias"], epsilon=config.epsilon),
            mask, None, None, positions, frequencies,
            w["w_in"], w["b_in"], w["gamma"], w["beta"], w["w_out"], w["b_out"], **rule,
        )  # fmt: skip
        x = x + unit
    scale, bias = weights["final_norm.scale"], weights["final_norm.bias"]
    return _encoder.classified(weights, norm.layer_norm(x, scale, bias, epsilon=config.epsilon), mask)


def _rule(config: Config) -> dict[str, Any]:
    kernels: dict[str, Callable[..., Value]] = {
        "squared_relu": partial(attention_kernel.squared_relu_constant, length=1),
        "laplace": attention_kernel.laplace,
    }
    rotations = {"interleaved": rope.rotate_interleaved, "half_split": rope.rotate_half_split}
    return {
        "mix": getattr(mixed_chunk_attention, config.mix),
        "rotate": rotations[config.rotation],
        "rows": config.row_order,
        "chunk": config.chunk,
        "scale": config.scale,
        "kernel": kernels[config.kernel],
        "normaliser": getattr(mixed_chunk_attention, config.normaliser),
    }
