"""FLASH with mixed chunks: pre-norm units that attend inside chunks quadratically and between them linearly.

    x_0 = rms_norm(E_token + E_segment),   x_(l+1) = x_l + unit_l(layer_norm_l(x_l)),   y = layer_norm(x_L)

Source: Hua et al., Transformer Quality in Linear Time, arXiv:2202.10447; https://kexue.fm/archives/8934. The unit is
mixed_chunk_attention.unit. The embedding is that of GAU-α, so that the residual stream starts at unit scale. What
stands on y is in _heads.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float, Shaped

from refimpl import check
from refimpl.config import check_types
from refimpl.models import _encoder
from refimpl.models._encoder import Shapes, State, Weights
from refimpl.ops import mixed_chunk_attention, norm, rope

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
    layers = _encoder.layered(layer_shapes(config), config.layers)
    return {**_encoder.embedding_shapes(config), **dict(layers), **_encoder.final_norm_shapes(config)}


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
    C3. Padded keys (mask False) must have no part in chunks and sums, of padded queries neither: none sees itself, read
        either way. Chunks are those of the array, so padding on the left moves their borders; who sees whom is told by
        `mix`.
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
    given = token_ids, segment_ids, mask, positions
    weights, inputs = _encoder.checked("flash.hidden_states", weights, shapes(config), given, config)

    def through(w: Weights, x: np.ndarray) -> np.ndarray:
        return _layer(w, x, inputs, config, getattr(mixed_chunk_attention, config.mix))

    states = _encoder.encoded(weights, _encoder.embed(weights, inputs, config), config, through)
    return _encoder.closed(weights, states, config)


def initial_state(config: Config, *, batch: tuple[int, ...]) -> State:
    """The state before the first token of `batch` texts: nothing summed, nothing buffered."""
    kept = mixed_chunk_attention.initial_state(batch=batch, s=config.key_size, e=config.expanded_size)
    return State(0, (kept,) * config.layers)


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

    C1. However a text is split into pieces, its states must be those of `hidden_states` with `mix` causal.
    C2. Without positions they must go on from piece to piece: token i of the stream is at i, padding counted.
    C3. The given state must not be changed.
    Raises: as `hidden_states`; ShapeError for a state of other texts or of another Config; DomainError for anything
        but a state and a Config whose `mix` is not causal.
    Precision: as `hidden_states`.
    """
    operation, given = "flash.step", (token_ids, segment_ids, mask, positions)
    weights, state, inputs = _encoder.checked_piece(operation, weights, shapes(config), state, given, config)
    check.domain(operation, config.mix == "causal", "mix causal, since no token may read a later one", mix=config.mix)

    def through(w: Weights, x: np.ndarray, past: Any) -> tuple[np.ndarray, Any]:
        summed = isinstance(past, mixed_chunk_attention.State)
        check.domain(operation, summed, "a state that keeps sums in every layer", received=type(past))
        kept = []

        # The unit calls its mix once; what the layer keeps leaves it here.
        def mix(
            q_quad: np.ndarray, k_quad: np.ndarray, q_lin: np.ndarray, k_lin: np.ndarray, v: np.ndarray,
            key_mask: Any, segments: Any, bias: Any, *, documents: Any, **rule: Any,
        ) -> np.ndarray:  # fmt: skip
            mixed, now = mixed_chunk_attention.step(past, q_quad, k_quad, q_lin, k_lin, v, key_mask, bias, **rule)
            kept.append(now)
            return mixed

        return _layer(w, x, inputs, config, mix), kept[0]

    states, state = _encoder.stepped(weights, state, _encoder.embed(weights, inputs, config), through)
    return _encoder.closed(weights, states, config), state


def _layer(
    w: Weights, x: np.ndarray, inputs: _encoder.Inputs, config: Config, mix: Callable[..., np.ndarray]
) -> np.ndarray:
    unit = mixed_chunk_attention.unit(
        norm.layer_norm(x, w["norm_scale"], w["norm_bias"], epsilon=config.epsilon), inputs.mask, None, None,
        inputs.positions, rope.frequencies(config.key_size, base=config.rotary_base),
        w["w_in"], w["b_in"], w["gamma"], w["beta"], w["w_out"], w["b_out"], mix=mix,
        rotate=_encoder.ROTATIONS[config.rotation], rows=config.row_order, chunk=config.chunk, scale=config.scale,
        kernel=_encoder.KERNELS[config.kernel], normaliser=getattr(mixed_chunk_attention, config.normaliser),
    )  # fmt: skip
    return x + unit
