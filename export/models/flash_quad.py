"""FLASH-Quad: pre-norm gated attention units of the paper's form over the whole sequence.

Specification: refimpl/models/flash_quad.py. Every layer is one call of the local function gau.block_pre_norm.
"""

from collections.abc import Callable
from functools import partial

from export.graph import Value, maximum
from export.models import _encoder
from export.models._encoder import Weights
from export.ops import attention_kernel, gau, norm, rope
from refimpl.models.flash_quad import Config

Kernel = Callable[[Value, Value | None], Value]


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
    """The embedding, the output of every layer but the last, and the norm of the last one's: x_0 ... x_(L-1), y."""
    seen, positions, frequencies = _encoder.context(visible(mask, segment_ids), mask, positions, config)
    rotations = {"interleaved": rope.rotate_interleaved, "half_split": rope.rotate_half_split}
    states = [_encoder.embed(weights, token_ids, segment_ids, epsilon=config.epsilon)]
    for index in range(config.layers):
        w = _encoder.layer_of(weights, index)
        normalise = partial(norm.layer_norm, scale=w["norm_scale"], bias=w["norm_bias"], epsilon=config.epsilon)
        x = gau.block_pre_norm(
            states[-1], seen, None, positions, frequencies,
            w["w_in"], w["b_in"], w["gamma_q"], w["beta_q"], w["gamma_k"], w["beta_k"], w["w_out"], w["b_out"],
            length=max(config.length, 1), rotate=rotations[config.rotation], kernel=_kernel(config), norm=normalise,
        )  # fmt: skip
        states.append(x)
    scale, bias = weights["final_norm.scale"], weights["final_norm.bias"]
    return [*states[:-1], norm.layer_norm(states[-1], scale, bias, epsilon=config.epsilon)]


def _kernel(config: Config) -> Kernel:
    """The kernel; where scores are divided by what is open until the graph runs, that is done here."""
    kernels: dict[str, Kernel] = {
        "squared_relu": partial(attention_kernel.squared_relu_constant, length=1),
        "laplace": attention_kernel.laplace,
    }
    kernel = kernels[config.kernel]
    if config.divisor == "constant":
        return kernel

    def divided(scores: Value, mask: Value | None) -> Value:
        seen = mask if config.divisor == "visible" else None
        lengths = maximum(attention_kernel.visible_lengths(scores, seen), 1)
        return kernel(scores / lengths.cast(scores.dtype), mask)

    return divided
