"""GAU-α: gated attention units in a row, one root-mean-square norm after each, and no bias.

    x_0 = rms_norm(E_token + E_segment),   x_(l+1) = rms_norm(x_l + unit_l(x_l))

Specification: refimpl/models/gau_alpha.py. In training, hidden dropout acts on the embeddings' sum before its norm and
on every unit before the residual sum, attention dropout on the attention weights. What stands on x_L is in _heads.
"""

import math

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from refimpl.models.gau_alpha import Config, layer_shapes
from torchimpl.dropout import Dropout
from torchimpl.models import _encoder
from torchimpl.ops import gau, norm, rope
from torchimpl.ops.attention_kernel import softmax_plus


class Layer(nn.Module):
    """A gated attention unit, added to its input and normalised."""

    def __init__(self, config: Config, hidden_dropout: float, attention_dropout: float) -> None:
        super().__init__()
        _encoder.add_parameters(self, layer_shapes(config))
        self.hidden_dropout = Dropout(hidden_dropout)
        self.attention_dropout = Dropout(attention_dropout)
        self.n_min, self.epsilon = config.n_min, config.epsilon

    def forward(
        self,
        x: Float[Tensor, "*b n d"],
        visible: Bool[Tensor, "*_b _n n"] | None,
        positions: Int[Tensor, "*p n"],
        frequencies: Float[Tensor, " r"],
    ) -> Float[Tensor, "*b n d"]:
        unit = gau.unit(
            x, visible, None, positions, frequencies,
            self.w_in, None, self.gamma_q, None, self.gamma_k, None, self.w_out, None,
            rotate=rope.rotate_interleaved, kernel=self._kernel,
        )  # fmt: skip
        # gau.block_post_norm with a dropout between its parts.
        return norm.rms_norm(x + self.hidden_dropout(unit), epsilon=self.epsilon)

    def no_keys(self, batch: tuple[int, ...]) -> _encoder.Keys:
        """What is kept of a stream before its first token."""
        return _encoder.no_keys(self.w_in, batch, self.gamma_k.shape, self.w_out.shape[:1])

    def step(
        self,
        x: Float[Tensor, "*b n d"],
        mask: Bool[Tensor, "*b n"],
        positions: Int[Tensor, "*p n"],
        frequencies: Float[Tensor, " r"],
        past: _encoder.Keys,
    ) -> tuple[Float[Tensor, "*b n d"], _encoder.Keys]:
        """The layer on the next tokens of a causal stream, and what it keeps after them."""
        unit, keys = _encoder.unit_step(
            "gau_alpha.step", self, x, mask, positions, frequencies, past,
            rotate=rope.rotate_interleaved, kernel=self._kernel, scale=1 / math.sqrt(self.gamma_k.shape[0]),
        )  # fmt: skip
        return norm.rms_norm(x + self.hidden_dropout(unit), epsilon=self.epsilon), keys

    def _kernel(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return self.attention_dropout(softmax_plus(scores, mask, n_min=self.n_min))

    def reset_parameters(self, gain: float) -> None:
        for kernel in (self.w_in, self.w_out):
            _encoder.reset_kernel(kernel, gain)
        for gamma in (self.gamma_q, self.gamma_k):
            nn.init.ones_(gamma)


class GauAlpha(_encoder.Transformer):
    """The encoder. Both dropouts are 0.1 at the release, and act in training only."""

    def __init__(self, config: Config, *, hidden_dropout: float = 0.1, attention_dropout: float = 0.1) -> None:
        layers = [Layer(config, hidden_dropout, attention_dropout) for _ in range(config.layers)]
        super().__init__(config, _encoder.Embedding(config, hidden_dropout), layers)

    def reset_parameters(self) -> None:
        """New weights from torch's generator: gammas 1, the rest as in _encoder."""
        _encoder.reset_units(self)

    def seen(self, keys: Bool[Tensor, "*_b _n n"]) -> Bool[Tensor, "..."]:
        """The mask as a layer takes it: a unit has one head and no axis for it."""
        return keys
