"""FLASH-Quad: pre-norm gated attention units of the paper's form over the whole sequence.

    x_0 = rms_norm(E_token + E_segment),   x_(l+1) = x_l + unit_paper_l(layer_norm_l(x_l)),   y = layer_norm(x_L)

Source: Hua et al., Transformer Quality in Linear Time, arXiv:2202.10447. A layer is gau.block_pre_norm without bias.
Embedding and last norm are those of flash, of which this is the model without chunks. What stands on y is in _heads.

What the scores q kᵀ are divided by before the kernel:

| `divisor` | A | who |
| array | kernel(q kᵀ / n), n the length of the array | the paper's pseudo-code, lucidrains/FLASH-pytorch (GAU) |
| constant | kernel(q kᵀ / length) | JunnYu/FLASHQuad_pytorch, with max_position, 512 |
| visible | kernel(q kᵀ / n_i), n_i the keys that token i sees | no public code; `array` where no key is hidden |
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float, Shaped

from refimpl import check
from refimpl.config import check_types
from refimpl.models import _encoder
from refimpl.models._encoder import Shapes, State, Weights
from refimpl.ops import attention_kernel, gau, norm, rope

Kernel = Callable[[np.ndarray, np.ndarray | None], np.ndarray]


@dataclass(frozen=True)
class Config:
    """Sizes, constants and conventions. None has a default: public code disagrees on every convention."""

    model: ClassVar[str] = "flash_quad"

    vocab_size: int
    hidden_size: int
    layers: int
    # Widths of gate and value, and of the shared queries and keys.
    expanded_size: int
    key_size: int
    segments: int
    kernel: Literal["squared_relu", "laplace"]
    divisor: Literal["array", "constant", "visible"]
    # What scores are divided by with the divisor constant; 0 with the others, which count.
    length: int
    rotation: Literal["interleaved", "half_split"]
    rotary_base: float
    # Of every norm.
    epsilon: float

    def __post_init__(self) -> None:
        check_types(self)
        sizes = ("vocab_size", "hidden_size", "layers", "expanded_size", "key_size", "segments")
        _encoder.check_sizes(self, *sizes)
        _encoder.check_numerics(self)
        if self.divisor == "constant":
            _encoder.check_sizes(self, "length")
        fits, expected = self.divisor == "constant" or self.length == 0, f"length 0 with divisor {self.divisor}"
        check.domain("flash_quad.Config", fits, expected, length=self.length)


def layer_shapes(config: Config) -> Shapes:
    """The weights of one layer: its norm and its unit, whose columns of w_in are gate, value, shared."""
    d, e, s = config.hidden_size, config.expanded_size, config.key_size
    return {
        "norm_scale": (d,),
        "norm_bias": (d,),
        "w_in": (d, 2 * e + s),
        "b_in": (2 * e + s,),
        "gamma_q": (s,),
        "beta_q": (s,),
        "gamma_k": (s,),
        "beta_k": (s,),
        "w_out": (e, d),
        "b_out": (d,),
    }


def shapes(config: Config) -> Shapes:
    """The name and shape of every weight of the encoder; kernels are (in, out)."""
    layers = _encoder.layered(layer_shapes(config), config.layers)
    return {**_encoder.embedding_shapes(config), **dict(layers), **_encoder.final_norm_shapes(config)}


def parameters(config: Config) -> int:
    """How many numbers the weights hold.

    (vocab_size + segments + 2) d + layers (d (3e + s) + 3d + 2e + 5s)
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
    visible: Callable[[np.ndarray, np.ndarray], np.ndarray] = _encoder.bidirectional,
) -> list[Float[np.ndarray, "*b n d"]]:
    """The embedding, the output of every layer but the last, and the norm of the last one's: x_0 ... x_(L-1), y.

    C1. The norm of a layer must act on what enters its unit; the residual path must not be normalised.
    C2. One more layer norm must stand behind the last layer. x_L itself is not among the states: what heads read is
        the last of them, as in every model.
    C3. Keys that `visible`, one of _encoder's bidirectional, causal and unilm, hides must have no part in any query.
        Vectors of padded tokens are defined too.
    C4. Scores must be divided before the kernel, by what the table above says. There must be no √s, and the kernel's
        weights must not be divided once more. A token that sees no key must get b_out from the unit.
    C5. With the divisors `constant` and `visible`, padding on either side must change nothing on real tokens, and the
        beginning of a causal text must be what it is alone. With `array` neither holds: n counts padded tokens and
        those to come, so every batch must be as long as the texts were in training.
    C6. Queries and keys of every layer must be rotated at `positions`, 0, 1, 2, ... of the array where none are given.
        Only differences enter.
    C7. Without segment_ids every token must be of segment 0; without a mask every token must be real, id 0 too.
    Raises: ShapeError for weights or inputs that do not fit; DomainError for ids out of range, a mask that is not
        boolean, positions that are no integers, and weights that are NaN or infinite.
    Precision: float64 throughout. The residual stream grows with the layers, the last norm divides by it.
    Source: as the module. segment_ids choose embeddings; they are no borders of packed documents.
    Differs: the paper adds scaled sinusoids to the embedding and a relative bias to the scores, and FLASH-pytorch's GAU
        has a T5 bias, divided by n as well, in the place of a rotation; none of them is here, gau.unit_paper takes a
        bias. The paper and FLASHQuad_pytorch rotate half-split. The norm is LayerNorm or ScaleNorm in the paper.
        https://kexue.fm/archives/8934 divides by √s before the square and by n_i behind it (gau.unit), so that weights
        fall as 1 / n_i, and not as 1 / n_i²; https://kexue.fm/archives/9019 finds that a constant transfers to other
        lengths better than n. The paper says nothing on padding; `visible` counts as mixed_chunk_attention.visible.
    """
    given = token_ids, segment_ids, mask, positions
    weights, inputs = _encoder.checked("flash_quad.hidden_states", weights, shapes(config), given, config)
    keys = visible(inputs.mask, inputs.segment_ids)

    def through(w: Weights, x: np.ndarray) -> np.ndarray:
        return gau.block_pre_norm(
            x, keys, None, inputs.positions, rope.frequencies(config.key_size, base=config.rotary_base),
            w["w_in"], w["b_in"], w["gamma_q"], w["beta_q"], w["gamma_k"], w["beta_k"], w["w_out"], w["b_out"],
            length=_length(config, x.shape[-2]), rotate=_encoder.ROTATIONS[config.rotation], kernel=_kernel(config),
            norm=partial(norm.layer_norm, scale=w["norm_scale"], bias=w["norm_bias"], epsilon=config.epsilon),
        )  # fmt: skip

    states = _encoder.encoded(weights, _encoder.embed(weights, inputs, config), config, through)
    return _encoder.closed(weights, states, config)


def initial_state(config: Config, *, batch: tuple[int, ...]) -> State:
    """The state before the first token of `batch` texts: no layer has a key.

    Raises: DomainError for the divisor array.
    """
    _check_streams("flash_quad.initial_state", config)
    return _encoder.units_state(config, batch)


def step(
    weights: Weights,
    state: State,
    token_ids: Shaped[np.ndarray, "..."],
    segment_ids: Shaped[np.ndarray, "..."] | None = None,
    mask: Shaped[np.ndarray, "..."] | None = None,
    positions: Shaped[np.ndarray, "..."] | None = None,
    *,
    config: Config,
) -> tuple[list[Float[np.ndarray, "*b n d"]], State]:
    """The hidden states of the next n tokens of a causal stream, and the state after them; n may be any number, 0 too.

    C1. However a text is split into pieces, its states must be those of `hidden_states` with `visible` causal.
    C2. Without positions they must go on from piece to piece: token i of the stream is at i, padding counted.
    C3. The given state must not be changed.
    Raises: as `hidden_states`; ShapeError for a state of other texts or of another Config; DomainError for anything
        but a state, and for the divisor array, which counts what is still to come.
    Precision: as `hidden_states`.
    """
    operation, given = "flash_quad.step", (token_ids, segment_ids, mask, positions)
    _check_streams(operation, config)
    weights, state, inputs = _encoder.checked_piece(operation, weights, shapes(config), state, given, config)

    def through(w: Weights, x: np.ndarray, past: Any) -> tuple[np.ndarray, Any]:
        """gau.block_pre_norm, whose queries meet the keys of earlier tokens too."""
        normed = norm.layer_norm(x, w["norm_scale"], w["norm_bias"], epsilon=config.epsilon)
        unit, keys = _encoder.unit_step(
            operation, w, normed, inputs, past, config, rotate=_encoder.ROTATIONS[config.rotation],
            kernel=_kernel(config), divisor=_length(config, x.shape[-2]),
        )  # fmt: skip
        return x + unit, keys

    states, state = _encoder.stepped(weights, state, _encoder.embed(weights, inputs, config), through)
    return _encoder.closed(weights, states, config), state


def _check_streams(operation: str, config: Config) -> None:
    fits, expected = config.divisor != "array", "the divisor visible or constant, since no token may read a later one"
    check.domain(operation, fits, expected, divisor=config.divisor)


def _length(config: Config, n: int) -> int:
    # An empty array has no scores to divide.
    return {"array": max(n, 1), "constant": config.length, "visible": 1}[config.divisor]


def _kernel(config: Config) -> Kernel:
    kernel = _encoder.KERNELS[config.kernel]
    return partial(_over_visible, kernel=kernel) if config.divisor == "visible" else kernel


def _over_visible(scores: np.ndarray, mask: np.ndarray | None, *, kernel: Kernel) -> np.ndarray:
    """The kernel of scores that are divided by the number of keys that their row sees."""
    return kernel(scores / np.maximum(attention_kernel.visible_lengths(scores, mask), 1), mask)
