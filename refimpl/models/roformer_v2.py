"""RoFormerV2: RoFormer without a single bias, and with root-mean-square norms that have no weights.

    x_0 = rms_norm(E_token + E_segment) [W],   m_l = rms_norm(x_l + attention_l(x_l))
    x_(l+1) = rms_norm(m_l + feed_forward_l(m_l))

Source: https://kexue.fm/archives/8998, ZhuiyiTechnology/roformer-v2. What stands on x_L is in _heads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Shaped

from refimpl import check
from refimpl.config import check_types
from refimpl.models import _encoder
from refimpl.models._encoder import Activation, Shapes, State, Sublayers, Weights
from refimpl.ops import norm

# The models were released with bert4keras 0.11.3; 0.11.4 changed the epsilon of every norm.
DIALECTS: Mapping[str, Mapping[str, Any]] = {
    name: {"epsilon": epsilon, "activation": "relu", "rotary_base": 10000.0}
    for name, epsilon in {
        "bert4keras-0.11.3": 1e-12,
        "bert4keras-0.11.4": 1e-7,
        "bert4keras-0.11.5": 1e-7,
        "junnyu": 1e-12,
    }.items()
}
# The published models.
SIZES: Mapping[str, Mapping[str, int]] = {
    name: {
        "vocab_size": 12000, "segments": 2, "embedding_size": d, "hidden_size": d, "layers": layers,
        "heads": d // 64, "intermediate_size": 4 * d,
    }
    for name, layers, d in (("small", 6, 384), ("base", 12, 768), ("large", 24, 1024))
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Sizes and constants. None has a default: `dialect` fills the constants by the name of an implementation."""

    model: ClassVar[str] = "roformer_v2"

    vocab_size: int
    # Kinds of segments, of which a pair of sentences has two.
    segments: int
    # Where it differs from hidden_size, a matrix follows the embedding.
    embedding_size: int
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    activation: Activation
    epsilon: float
    rotary_base: float

    def __post_init__(self) -> None:
        check_types(self)
        _encoder.check_transformer(self)

    @property
    def key_size(self) -> int:
        """The width of a head."""
        return self.hidden_size // self.heads


def dialect(name: str, **sizes: int) -> Config:
    """The configuration of these sizes with the constants of one implementation, a key of DIALECTS.

    dialect("junnyu", **SIZES["base"])

    C1. Nothing may be guessed: a name that is not listed must be refused.
    Raises: DomainError for another name, for a constant among the sizes, for junnyu with another embedding_size than
        hidden_size, and as Config.
    Differs: Hugging Face's RoFormer always has biases and affine norms, so it is no dialect here. JunnYu's mapping of
        the embedding has a bias, and its masked-language head does not map back.
    """
    operation = "roformer_v2.dialect"
    has = "one of " + ", ".join(DIALECTS) + " (Hugging Face has no RoFormerV2)"
    check.domain(operation, name != "huggingface", has, name=name)
    made = _encoder.from_dialect("roformer_v2", DIALECTS, name, sizes)
    e, d = made.embedding_size, made.hidden_size
    fits = name != "junnyu" or e == d
    check.domain(operation, fits, "embedding_size = hidden_size, since junnyu maps with a bias", received=(e, d))
    return made


def layer_shapes(config: Config) -> Shapes:
    """The weights of one layer; the columns of w_q, w_k and w_v are those of head 0, head 1, ..."""
    d, f = config.hidden_size, config.intermediate_size
    return {
        "attention.w_q": (d, d),
        "attention.w_k": (d, d),
        "attention.w_v": (d, d),
        "attention.w_o": (d, d),
        "feed_forward.w_in": (d, f),
        "feed_forward.w_out": (f, d),
    }


def shapes(config: Config) -> Shapes:
    """The name and shape of every weight of the encoder; kernels are (in, out)."""
    e, d = config.embedding_size, config.hidden_size
    mapping = {"embedding.mapping.kernel": (e, d)} if e != d else {}
    layers = _encoder.layered(layer_shapes(config), config.layers)
    return {**_encoder.table_shapes(config), **mapping, **dict(layers)}


def parameters(config: Config) -> int:
    """How many numbers the weights hold: (vocab_size + segments) e + [e != d] e d + layers (4d² + 2df)."""
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

    C1. x_0 must be the normed sum of both embeddings, mapped after the norm where embedding_size differs.
    C2. Keys that `visible`, one of _encoder's bidirectional, causal and unilm, hides must have no part in any query.
        Vectors of padded tokens are defined too.
    C3. Queries and keys of every layer must be rotated at `positions`, values never. Without positions they are
        0, 1, 2, ... of the array. Only differences enter, so padding may stand on either side.
    C4. Without segment_ids every token must be of segment 0; without a mask every token must be real, id 0 too.
    Raises: ShapeError for weights or inputs that do not fit; DomainError for ids out of range, a mask that is not
        boolean, positions that are no integers, and weights that are NaN or infinite.
    Precision: float64 throughout; errors of a layer are divided by its norms and handed on.
    Source: as the module.
    Differs: as roformer.hidden_states. keras-hub hides queries in the place of keys and trains a scale in its norms.
    """
    given = token_ids, segment_ids, mask, positions
    weights, inputs = _encoder.checked("roformer_v2.hidden_states", weights, shapes(config), given, config)
    keys = visible(inputs.mask, inputs.segment_ids)

    def through(w: Weights, x: np.ndarray) -> np.ndarray:
        return layer(w, x, keys, inputs.positions, config=config).output

    return _encoder.encoded(weights, _embedding(weights, inputs, config), config, through)


def initial_state(config: Config, *, batch: tuple[int, ...]) -> State:
    """The state before the first token of `batch` texts: no layer has a key."""
    return _encoder.heads_state(config, batch)


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
    operation, given = "roformer_v2.step", (token_ids, segment_ids, mask, positions)
    weights, state, inputs = _encoder.checked_piece(operation, weights, shapes(config), state, given, config)

    def through(w: Weights, x: np.ndarray, past: Any) -> tuple[np.ndarray, Any]:
        attended, keys = _encoder.self_attention_step(operation, w, x, inputs, past, config)
        return _sublayers(w, x, attended, config).output, keys

    return _encoder.stepped(weights, state, _embedding(weights, inputs, config), through)


def layer(
    weights: Weights,
    x: Shaped[np.ndarray, "..."],
    visible: Shaped[np.ndarray, "..."],
    positions: Shaped[np.ndarray, "..."],
    *,
    config: Config,
) -> Sublayers:
    """One layer with all that stands between its sublayers; visible (..., n or 1, n) is True where a query may attend.

    middle = rms_norm(x + attention(x)),   output = rms_norm(middle + feed_forward(middle))

    C1. Each norm must stand after its sum: the residual path is normalised.
    C2. The scores must be divided by the root of a head's width, and softmax taken over visible keys only.
    Raises: ShapeError and DomainError for weights and arrays that do not fit.
    """
    w = _encoder.checked_weights("roformer_v2.layer", weights, layer_shapes(config))
    return _sublayers(w, x, _encoder.self_attention(w, x, visible, positions, config), config)


def _sublayers(w: Weights, x: np.ndarray, attended: np.ndarray, config: Config) -> Sublayers:
    middle = norm.rms_norm(x + attended, epsilon=config.epsilon)
    fed = _encoder.feed_forward(w, middle, config)
    return Sublayers(attended, middle, fed, norm.rms_norm(middle + fed, epsilon=config.epsilon))


def _embedding(weights: Weights, inputs: _encoder.Inputs, config: Config) -> np.ndarray:
    return _encoder.mapped(weights, _encoder.embed(weights, inputs, config))
