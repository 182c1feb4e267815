"""FLASH with mixed chunks: pre-norm units that attend inside chunks quadratically and between them linearly.

    x_0 = rms_norm(E_token + E_segment),   x_(l+1) = x_l + unit_l(layer_norm_l(x_l)),   y = layer_norm(x_L)

Source: Hua et al., Transformer Quality in Linear Time, arXiv:2202.10447; https://kexue.fm/archives/8934. The unit is
mixed_chunk_attention.unit. The embedding is that of GAU-α, so that the residual stream starts at unit scale. What
stands on y is in _heads.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float, Shaped

from refimpl import check
from refimpl.config import check_types
from refimpl.models import _encoder
from refimpl.models._encoder import Shapes, Weights
from refimpl.ops import attention_kernel, mixed_chunk_attention, norm, rope

# For each way of reading, the normalisers that were written for the other one.
_FOR_THE_OTHER = {"bidirectional": "lucidrains_causal", "causal": "lucidrains"}


@dataclass(frozen=True)
class Config:
    """Sizes, constants and conventions. None has a default: public code disagrees on every convention."""

    model: ClassVar[str] = "flash"

    vocab_size: int
    hidden_size: int
    layers: int
    # Widths of gate and value, and of the shared queries and keys.
    expanded_size: int
    key_size: int
    segments: int
    # Tokens that attend to each other quadratically.
    chunk: int
    mix: Literal["bidirectional", "causal"]
    kernel: Literal["squared_relu", "laplace"]
    # Scores are divided by the root of key_size (article) or by chunk (paper, FLASH-pytorch).
    divisor: Literal["root_key_size", "chunk"]
    normaliser: Literal["su", "paper", "lucidrains", "lucidrains_causal", "unnormalised", "visible"]
    # The order of the rows of gamma and beta.
    rows: Literal["paper", "lucidrains"]
    rotation: Literal["interleaved", "half_split"]
    rotary_base: float
    # Of every norm.
    epsilon: float

    def __post_init__(self) -> None:
        check_types(self)
        sizes = ("vocab_size", "hidden_size", "layers", "expanded_size", "key_size", "segments", "chunk")
        _encoder.check_sizes(self, *sizes)
        _encoder.check_numerics(self)
        other = _FOR_THE_OTHER[self.mix]
        fits = self.normaliser != other
        check.domain("flash.Config", fits, f"a normaliser other than {other} with mix {self.mix}", mix=self.mix)

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        return 1 / math.sqrt(self.key_size) if self.divisor == "root_key_size" else 1 / self.chunk

    @property
    def row_order(self) -> tuple[int, ...]:
        """The rows of gamma and beta that make (q_quad, k_quad, q_lin, k_lin)."""
        paper, lucidrains = mixed_chunk_attention.ROWS_PAPER, mixed_chunk_attention.ROWS_LUCIDRAINS
        return paper if self.rows == "paper" else lucidrains


def layer_shapes(config: Config) -> Shapes:
    """The weights of one layer: its norm and its unit, whose columns of w_in are gate, value, shared."""
    d, e, s = config.hidden_size, config.expanded_size, config.key_size
    return {
        "norm_scale": (d,),
        "norm_bias": (d,),
        "w_in": (d, 2 * e + s),
        "b_in": (2 * e + s,),
        "gamma": (4, s),
        "beta": (4, s),
        "w_out": (e, d),
        "b_out": (d,),
    }


def shapes(config: Config) -> Shapes:
    """The name and shape of every weight of the encoder; kernels are (in, out)."""
    d = config.hidden_size
    layers = _encoder.layered(layer_shapes(config), config.layers)
    last = {"final_norm.scale": (d,), "final_norm.bias": (d,)}
    return {**_encoder.embedding_shapes(config), **dict(layers), **last}


def parameters(config: Config) -> int:
    """How many numbers the weights hold.

    (vocab_size + segments + 2) d + layers (d (3e + s) + 3d + 2e + 9s)
    """
    return _encoder.count(shapes(config))


def hidden_states(
    weights: Weights,
    token_ids: Shaped[np.ndarray, "..."],
    segment_ids: Shaped[np.ndarray, "..."] | None = None,
    mask: Shaped[np.ndarray, "..."] | None = None,
    positions: Shaped[np.ndarray, "..."] | None = None,
    *,
    config: Config,
) -> list[Float[np.ndarray, "*b n d"]]:
    """The embedding, the output of every layer but the last, and the norm of the last one's: x_0 ... x_(L-1), y.

    C1. The norm of a layer must act on what enters its unit; the residual path must not be normalised.
    C2. One more layer norm must stand behind the last layer. x_L itself is not among the states: what heads read is
        the last of them, as in every model.
    C3. Padded keys (mask False) must have no part in chunks and sums. Chunks are those of the array, so padding on the
        left moves their borders; who sees whom is told by `mix`.
    C4. Queries and keys must be rotated at `positions`, 0, 1, 2, ... of the array where none are given.
    C5. Without segment_ids every token must be of segment 0; without a mask every token must be real, id 0 too.
    C6. With the normaliser `visible`, appending padding must change nothing on real tokens; with `su`, `paper` and
        `lucidrains` read bidirectionally it does, since they count padded tokens.
    Raises: ShapeError for weights or inputs that do not fit; DomainError for ids out of range, a mask that is not
        boolean, positions that are no integers, and weights that are NaN or infinite.
    Precision: float64 throughout. The residual stream grows with the layers, the last norm divides by it.
    Source: as the module. segment_ids choose embeddings; they are no borders of packed documents.
    Differs: the paper adds scaled sinusoids to the embedding and a relative bias to the scores; FLASH-pytorch shifts
        half of the features by one token, and rotates 32 features only.
    """
    operation = "flash.hidden_states"
    weights = _encoder.checked_weights(operation, weights, shapes(config))
    inputs = _encoder.checked_inputs(operation, token_ids, segment_ids, mask, config)
    positions = _encoder.checked_positions(operation, positions, inputs)
    frequencies = rope.frequencies(config.key_size, base=config.rotary_base)
    rule = _rule(config)
    states = [_encoder.embed(weights, inputs, epsilon=config.epsilon)]
    for index in range(config.layers):
        w = _encoder.layer_of(weights, index)
        x = norm.layer_norm(states[-1], w["norm_scale"], w["norm_bias"], epsilon=config.epsilon)
        unit = mixed_chunk_attention.unit(
            x, inputs.mask, None, None, positions, frequencies,
            w["w_in"], w["b_in"], w["gamma"], w["beta"], w["w_out"], w["b_out"], **rule,
        )  # fmt: skip
        states.append(states[-1] + unit)
    scale, bias = weights["final_norm.scale"], weights["final_norm.bias"]
    return [*states[:-1], norm.layer_norm(states[-1], scale, bias, epsilon=config.epsilon)]


def _rule(config: Config) -> dict[str, Any]:
    kernels: dict[str, Callable[..., np.ndarray]] = {
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
