"""GAU-α: gated attention units in a row, one root-mean-square norm after each, and no bias.

    x_0 = rms_norm(E_token + E_segment),   x_(l+1) = rms_norm(x_l + unit_l(x_l))

Source: https://kexue.fm/archives/9052, ZhuiyiTechnology/GAU-alpha. The unit is gau.unit with softmax_plus and the
interleaved rotation; gamma is its only vector. What stands on x_L is in _heads; the release has the head TiedLM.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Shaped

from refimpl.config import check_types
from refimpl.models import _encoder
from refimpl.models._encoder import Shapes, State, Weights
from refimpl.ops import gau, norm, rope
from refimpl.ops.attention_kernel import softmax_plus

# The epsilon of every norm and the floor of softmax_plus. The model was released with bert4keras 0.11.3; 0.11.4 changed
# the one, 0.11.5 the other.
DIALECTS: Mapping[str, Mapping[str, Any]] = {
    name: {"epsilon": epsilon, "n_min": n_min, "rotary_base": 10000.0}
    for name, epsilon, n_min in (
        ("bert4keras-0.11.3", 1e-12, 1),
        ("bert4keras-0.11.4", 1e-7, 1),
        ("bert4keras-0.11.5", 1e-7, 16),
        ("junnyu", 1e-12, 1),
    )
}
# The published model.
SIZES: Mapping[str, Mapping[str, int]] = {
    "base": {
        "vocab_size": 12000, "segments": 2, "hidden_size": 768, "layers": 24, "expanded_size": 1536, "key_size": 128,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Sizes and constants. None has a default: `dialect` fills the constants by the name of an implementation."""

    model: ClassVar[str] = "gau_alpha"

    vocab_size: int
    hidden_size: int
    layers: int
    # Widths of gate and value, and of the shared queries and keys.
    expanded_size: int
    key_size: int
    # Kinds of segments, of which a pair of sentences has two.
    segments: int
    # The floor of softmax_plus.
    n_min: int
    epsilon: float
    rotary_base: float

    def __post_init__(self) -> None:
        check_types(self)
        sizes = ("vocab_size", "hidden_size", "layers", "expanded_size", "key_size", "segments", "n_min")
        _encoder.check_sizes(self, *sizes)
        _encoder.check_numerics(self)


def dialect(name: str, **sizes: int) -> Config:
    """The configuration of these sizes with the constants of one implementation, a key of DIALECTS.

    dialect("bert4keras-0.11.5", **SIZES["base"])

    C1. Nothing may be guessed: a name that is not listed must be refused.
    Raises: DomainError for another name, for a constant among the sizes, and as Config.
    Differs: where a token sees one key, bert4keras 0.11.3 attends to all tokens alike, padding among them, since ln 1
        multiplies its mask too; where it sees none, JunnYu does so, who puts -1e4 in the place of hidden scores. Here
        the one key has the weight 1, and nothing is attended to where none is seen. bert4keras had n_min 2 for five
        days, in no release.
    """
    return _encoder.from_dialect("gau_alpha", DIALECTS, name, sizes)


def layer_shapes(config: Config) -> Shapes:
    """The weights of one unit; the columns of w_in are gate, value, shared."""
    d, e, s = config.hidden_size, config.expanded_size, config.key_size
    return {"w_in": (d, 2 * e + s), "gamma_q": (s,), "gamma_k": (s,), "w_out": (e, d)}


def shapes(config: Config) -> Shapes:
    """The name and shape of every weight of the encoder; kernels are (in, out)."""
    return {**_encoder.embedding_shapes(config), **dict(_encoder.layered(layer_shapes(config), config.layers))}


def parameters(config: Config) -> int:
    """How many numbers the weights hold: (vocab_size + segments) d + layers (d (3e + s) + 2s)."""
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
    """The embedding, then the output of every layer: x_0 ... x_L.

    C1. Keys that `visible`, one of _encoder's bidirectional, causal and unilm, hides must have no part in any query,
        and softmax_plus must count the visible keys of each query. Vectors of padded tokens are defined too.
    C2. Queries and keys of every layer must be rotated at `positions`. Without positions they are 0, 1, 2, ... of the
        array. Only differences enter, so padding may stand on either side.
    C3. Without segment_ids every token must be of segment 0; without a mask every token must be real, id 0 too.
    C4. No norm must stand behind that of the last layer.
    Raises: ShapeError for weights or inputs that do not fit; DomainError for ids out of range, a mask that is not
        boolean, positions that are no integers, and weights that are NaN or infinite.
    Precision: float64 throughout; errors of a layer are divided by its norm and handed on.
    Source: as the module.
    Differs: bert4keras hides id 0 unless told otherwise (_encoder.mask_from_ids_bert4keras). See `dialect`.
    """
    given = token_ids, segment_ids, mask, positions
    weights, inputs = _encoder.checked("gau_alpha.hidden_states", weights, shapes(config), given, config)
    keys = visible(inputs.mask, inputs.segment_ids)

    def through(w: Weights, x: np.ndarray) -> np.ndarray:
        return gau.block_post_norm(
            x, keys, None, inputs.positions, rope.frequencies(config.key_size, base=config.rotary_base),
            w["w_in"], None, w["gamma_q"], None, w["gamma_k"], None, w["w_out"], None,
            rotate=rope.rotate_interleaved, kernel=partial(softmax_plus, n_min=config.n_min), epsilon=config.epsilon,
        )  # fmt: skip

    return _encoder.encoded(weights, _encoder.embed(weights, inputs, config), config, through)


def initial_state(config: Config, *, batch: tuple[int, ...]) -> State:
    """The state before the first token of `batch` texts: no layer has a key."""
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
        but a state.
    Precision: as `hidden_states`.
    """
    operation, given = "gau_alpha.step", (token_ids, segment_ids, mask, positions)
    weights, state, inputs = _encoder.checked_piece(operation, weights, shapes(config), state, given, config)

    def through(w: Weights, x: np.ndarray, past: Any) -> tuple[np.ndarray, Any]:
        """gau.block_post_norm, whose queries meet the keys of earlier tokens too."""
        unit, keys = _encoder.unit_step(
            operation, w, x, inputs, past, config, rotate=rope.rotate_interleaved,
            kernel=partial(softmax_plus, n_min=config.n_min), divisor=math.sqrt(config.key_size),
        )  # fmt: skip
        return norm.rms_norm(x + unit, epsilon=config.epsilon), keys

    return _encoder.stepped(weights, state, _encoder.embed(weights, inputs, config), through)
