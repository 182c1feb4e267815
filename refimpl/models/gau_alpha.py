"""GAU-α: gated attention units in a row, one root-mean-square norm after each, and no bias in the encoder.

    x_0 = rms_norm(E_token + E_segment),   x_(l+1) = rms_norm(x_l + unit_l(x_l)),   logits = masked_mean(x_L) W + b

Source: https://kexue.fm/archives/9052, ZhuiyiTechnology/GAU-alpha. The unit is gau.unit with softmax_plus and the
interleaved rotation; gamma is its only vector.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Shaped

from refimpl.config import check_types
from refimpl.models import _encoder
from refimpl.models._encoder import Output, Shapes, Weights
from refimpl.ops import attention, gau, rope
from refimpl.ops.attention_kernel import softmax_plus


@dataclass(frozen=True)
class Config:
    """Sizes and constants. None has a default: the released model and its ports differ in epsilon and n_min."""

    model: ClassVar[str] = "gau_alpha"

    vocab_size: int
    hidden_size: int
    layers: int
    # Widths of gate and value, and of the shared queries and keys.
    expanded_size: int
    key_size: int
    # Kinds of segments, of which a pair of sentences has two.
    segments: int
    # The floor of softmax_plus: 1 at the release, 16 in bert4keras today.
    n_min: int
    # 1e-12 at the release, 1e-7 in bert4keras today.
    epsilon: float
    rotary_base: float
    # Classes of the sequence classifier.
    labels: int

    def __post_init__(self) -> None:
        check_types(self)
        sizes = ("vocab_size", "hidden_size", "layers", "expanded_size", "key_size", "segments", "n_min", "labels")
        _encoder.check_sizes(self, *sizes)
        _encoder.check_numerics(self)


def layer_shapes(config: Config) -> Shapes:
    """The weights of one unit; the columns of w_in are gate, value, shared."""
    d, e, s = config.hidden_size, config.expanded_size, config.key_size
    return {"w_in": (d, 2 * e + s), "gamma_q": (s,), "gamma_k": (s,), "w_out": (e, d)}


def shapes(config: Config) -> Shapes:
    """The name and shape of every weight; kernels are (in, out)."""
    layers = _encoder.layered(layer_shapes(config), config.layers)
    return {**_encoder.embedding_shapes(config), **dict(layers), **_encoder.classifier_shapes(config)}


def parameters(config: Config) -> int:
    """How many numbers the weights hold: (vocab_size + segments) d + layers (d (3e + s) + 2s) + (d + 1) labels."""
    return _encoder.count(shapes(config))


def hidden_states(
    weights: Weights,
    token_ids: Shaped[np.ndarray, "..."],
    segment_ids: Shaped[np.ndarray, "..."] | None = None,
    mask: Shaped[np.ndarray, "..."] | None = None,
    *,
    config: Config,
) -> list[Float[np.ndarray, "*b n d"]]:
    """The embedding, then the output of every layer: x_0 ... x_L.

    C1. Padded keys (mask False) must be hidden from every query, and not be counted by softmax_plus.
    C2. Queries and keys of every layer must be rotated at the positions 0, 1, 2, ... of the array. Only differences
        enter, so padding on the left needs no other positions.
    Raises: ShapeError and DomainError as `forward`.
    """
    operation = "gau_alpha.hidden_states"
    weights = _encoder.checked_weights(operation, weights, shapes(config))
    inputs = _encoder.checked_inputs(operation, token_ids, segment_ids, mask, config)
    return _states(weights, inputs, config)


def forward(
    weights: Weights,
    token_ids: Shaped[np.ndarray, "..."],
    segment_ids: Shaped[np.ndarray, "..."] | None = None,
    mask: Shaped[np.ndarray, "..."] | None = None,
    *,
    config: Config,
) -> Output:
    """Logits of a sequence classifier, the sentence vector below them and the last layer's vectors.

    C1. The sentence vector must be the mean of the real tokens of x_L. No norm stands between x_L and the mean.
    C2. Without segment_ids every token must be of segment 0; without a mask every token must be real, id 0 too.
    Raises: ShapeError for weights or inputs that do not fit; DomainError for ids out of range, a mask that is not
        boolean, and weights that are NaN or infinite.
    Precision: float64 throughout; errors of a layer are divided by its norm and handed on.
    Source: as the module.
    Differs: bert4keras takes id 0 for padding when it is given no mask, and hides it.
    """
    operation = "gau_alpha.forward"
    weights = _encoder.checked_weights(operation, weights, shapes(config))
    inputs = _encoder.checked_inputs(operation, token_ids, segment_ids, mask, config)
    return _encoder.classified(weights, _states(weights, inputs, config)[-1], inputs.mask)


def _states(weights: Weights, inputs: _encoder.Inputs, config: Config) -> list[np.ndarray]:
    visible = attention.key_mask(inputs.mask)
    positions = np.arange(inputs.token_ids.shape[-1])
    frequencies = rope.frequencies(config.key_size, base=config.rotary_base)
    kernel = partial(softmax_plus, n_min=config.n_min)
    states = [_encoder.embed(weights, inputs, epsilon=config.epsilon)]
    for index in range(config.layers):
        w = _encoder.layer_of(weights, index)
        x = gau.block_post_norm(
            states[-1], visible, None, positions, frequencies,
            w["w_in"], None, w["gamma_q"], None, w["gamma_k"], None, w["w_out"], None,
            rotate=rope.rotate_interleaved, kernel=kernel, epsilon=config.epsilon,
        )  # fmt: skip
        states.append(x)
    return states
