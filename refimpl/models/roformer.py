"""RoFormer: BERT without position embeddings; queries and keys are rotated by their positions instead.

    x_0 = layer_norm(E_token + E_segment) [W + b],   m_l = layer_norm(x_l + attention_l(x_l))
    x_(l+1) = layer_norm(m_l + feed_forward_l(m_l))

Source: Su et al., arXiv:2104.09864; ZhuiyiTechnology/roformer. Every dense layer has a bias and every norm a scale and
a bias. What stands on x_L (masked language model, pooler, next sentence, tasks) is in _heads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Shaped

from refimpl.config import check_types
from refimpl.models import _encoder
from refimpl.models._encoder import Activation, Shapes, State, Sublayers, Weights
from refimpl.ops import norm

# Of every norm, and of the norm inside the masked-language head. bert4keras changed the first in 0.11.4 and kept the
# second. "gelu" in their configurations is the erf form in all of them.
DIALECTS: Mapping[str, Mapping[str, Any]] = {
    name: {"epsilon": epsilon, "mlm_epsilon": 1e-12, "activation": "gelu_erf", "rotary_base": 10000.0}
    for name, epsilon in {
        "bert4keras-0.11.3": 1e-12,
        "bert4keras-0.11.4": 1e-7,
        "bert4keras-0.11.5": 1e-7,
        "junnyu": 1e-12,
        "huggingface": 1e-12,
    }.items()
}
_BASE = {
    "segments": 2, "embedding_size": 768, "hidden_size": 768, "layers": 12, "heads": 12, "intermediate_size": 3072
}  # fmt: skip
# The published base models, whose vocabulary holds characters or words.
SIZES: Mapping[str, Mapping[str, int]] = {
    "base-char": {"vocab_size": 12000, **_BASE},
    "base-word": {"vocab_size": 50000, **_BASE},
}


@dataclass(frozen=True)
class Config:
    """Sizes and constants. None has a default: `dialect` fills the constants by the name of an implementation."""

    model: ClassVar[str] = "roformer"

    vocab_size: int
    # Kinds of segments, of which a pair of sentences has two.
    segments: int
    # Where it differs from hidden_size, a dense layer follows the embedding.
    embedding_size: int
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    # Of the feed-forward and of the masked-language head.
    activation: Activation
    # Of every norm but the one inside the masked-language head.
    epsilon: float
    mlm_epsilon: float
    rotary_base: float

    def __post_init__(self) -> None:
        check_types(self)
        _encoder.check_transformer(self)
        _encoder.check_epsilon(self, "mlm_epsilon")

    @property
    def key_size(self) -> int:
        """The width of a head."""
        return self.hidden_size // self.heads


def dialect(name: str, **sizes: int) -> Config:
    """The configuration of these sizes with the constants of one implementation, a key of DIALECTS.

    dialect("bert4keras-0.11.5", **SIZES["base-char"])

    C1. Nothing may be guessed: a name that is not listed must be refused.
    Raises: DomainError for another name, for a constant among the sizes, and as Config.
    Differs: bert4keras up to 0.11.3 knows two segments only, whatever the configuration says. Its set_gelu("tanh")
        asks for activation gelu_tanh: dataclasses.replace.
    """
    return _encoder.from_dialect("roformer", DIALECTS, name, sizes)


def layer_shapes(config: Config) -> Shapes:
    """The weights of one layer; the columns of w_q, w_k and w_v are those of head 0, head 1, ..."""
    d, f = config.hidden_size, config.intermediate_size
    return {
        "attention.w_q": (d, d),
        "attention.b_q": (d,),
        "attention.w_k": (d, d),
        "attention.b_k": (d,),
        "attention.w_v": (d, d),
        "attention.b_v": (d,),
        "attention.w_o": (d, d),
        "attention.b_o": (d,),
        "attention_norm.scale": (d,),
        "attention_norm.bias": (d,),
        "feed_forward.w_in": (d, f),
        "feed_forward.b_in": (f,),
        "feed_forward.w_out": (f, d),
        "feed_forward.b_out": (d,),
        "feed_forward_norm.scale": (d,),
        "feed_forward_norm.bias": (d,),
    }


def shapes(config: Config) -> Shapes:
    """The name and shape of every weight of the encoder; kernels are (in, out)."""
    e, d = config.embedding_size, config.hidden_size
    mapping = {"embedding.mapping.kernel": (e, d), "embedding.mapping.bias": (d,)} if e != d else {}
    return {
        **_encoder.table_shapes(config),
        "embedding.norm.scale": (e,),
        "embedding.norm.bias": (e,),
        **mapping,
        **dict(_encoder.layered(layer_shapes(config), config.layers)),
    }


def parameters(config: Config) -> int:
    """How many numbers the encoder's weights hold.

    (vocab_size + segments + 2) e + [e != d] (e + 1) d + layers (4d² + 2df + 9d + f)
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
    Differs: bert4keras hides id 0 unless told otherwise (_encoder.mask_from_ids_bert4keras). JunnYu adds -1e4 to the
        scores of hidden keys: a token that sees no key attends to all of them there, and to nothing here.
    """
    given = token_ids, segment_ids, mask, positions
    weights, inputs = _encoder.checked("roformer.hidden_states", weights, shapes(config), given, config)
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
    operation, given = "roformer.step", (token_ids, segment_ids, mask, positions)
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

    middle = layer_norm(x + attention(x)),   output = layer_norm(middle + feed_forward(middle))

    C1. Each norm must stand after its sum: the residual path is normalised.
    C2. The scores must be divided by the root of a head's width, and softmax taken over visible keys only.
    Raises: ShapeError and DomainError for weights and arrays that do not fit.
    """
    w = _encoder.checked_weights("roformer.layer", weights, layer_shapes(config))
    return _sublayers(w, x, _encoder.self_attention(w, x, visible, positions, config), config)


def _sublayers(w: Weights, x: np.ndarray, attended: np.ndarray, config: Config) -> Sublayers:
    scale, bias = w["attention_norm.scale"], w["attention_norm.bias"]
    middle = norm.layer_norm(x + attended, scale, bias, epsilon=config.epsilon)
    fed = _encoder.feed_forward(w, middle, config)
    scale, bias = w["feed_forward_norm.scale"], w["feed_forward_norm.bias"]
    return Sublayers(attended, middle, fed, norm.layer_norm(middle + fed, scale, bias, epsilon=config.epsilon))


def _embedding(weights: Weights, inputs: _encoder.Inputs, config: Config) -> np.ndarray:
    x = weights["embedding.token"][inputs.token_ids] + weights["embedding.segment"][inputs.segment_ids]
    x = norm.layer_norm(x, weights["embedding.norm.scale"], weights["embedding.norm.bias"], epsilon=config.epsilon)
    return _encoder.mapped(weights, x)
