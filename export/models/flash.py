"""FLASH with mixed chunks: pre-norm units that attend inside chunks quadratically and between them linearly.

Specification: refimpl/models/flash.py. Every layer is a call of norm.layer_norm, one of mixed_chunk_attention.unit and
a sum.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from export.graph import Value
from export.models import _encoder
from export.models._encoder import Weights
from export.ops import attention_kernel, mixed_chunk_attention, norm, rope
from refimpl.models.flash import Config


def hidden_states(
    weights: Weights,
    token_ids: Value,
    segment_ids: Value,
    mask: Value,
    positions: Value | None = None,
    *,
    config: Config,
) -> list[Value]:
    """The embedding, the output of every layer but the last, and the norm of the last one's: x_0 ... x_(L-1), y."""
    positions = _encoder.counted(positions, token_ids)
    frequencies = rope.frequencies(config.key_size, base=config.rotary_base)
    rule = _rule(config)
    states = [_encoder.embed(weights, token_ids, segment_ids, epsilon=config.epsilon)]
    for index in range(config.layers):
        w = _encoder.layer_of(weights, index)
        unit = mixed_chunk_attention.unit(
            norm.layer_norm(states[-1], w["norm_scale"], w["norm_bias"], epsilon=config.epsilon),
            mask, None, None, positions, frequencies,
            w["w_in"], w["b_in"], w["gamma"], w["beta"], w["w_out"], w["b_out"], **rule,
        )  # fmt: skip
        states.append(states[-1] + unit)
    scale, bias = weights["final_norm.scale"], weights["final_norm.bias"]
    return [*states[:-1], norm.layer_norm(states[-1], scale, bias, epsilon=config.epsilon)]


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
