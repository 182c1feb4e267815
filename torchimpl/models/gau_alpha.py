"""GAU-α: gated attention units in a row, one root-mean-square norm after each, and no bias in the encoder.

    x_0 = rms_norm(E_token + E_segment),   x_(l+1) = rms_norm(x_l + unit_l(x_l)),   logits = masked_mean(x_L) W + b

Specification: refimpl/models/gau_alpha.py. In training, hidden dropout acts on the embeddings' sum before its norm and
on every unit before the residual sum, attention dropout on the attention weights.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from refimpl.models.gau_alpha import Config, layer_shapes
from torchimpl.models import _encoder
from torchimpl.models._encoder import Output
from torchimpl.ops import attention, gau, norm, rope
from torchimpl.ops.attention_kernel import softmax_plus


class Layer(nn.Module):
    """A gated attention unit, added to its input and normalised."""

    def __init__(self, config: Config, hidden_dropout: float, attention_dropout: float) -> None:
        super().__init__()
        _encoder.add_parameters(self, layer_shapes(config))
        self.hidden_dropout = nn.Dropout(hidden_dropout)
        self.attention_dropout = nn.Dropout(attention_dropout)
        self.n_min, self.epsilon = config.n_min, config.epsilon

    def forward(
        self,
        x: Float[Tensor, "*b n d"],
        visible: Bool[Tensor, "*b 1 n"] | None,
        positions: Int[Tensor, " n"],
        frequencies: Float[Tensor, " r"],
    ) -> Float[Tensor, "*b n d"]:
        unit = gau.unit(
            x, visible, None, positions, frequencies,
            self.w_in, None, self.gamma_q, None, self.gamma_k, None, self.w_out, None,
            rotate=rope.rotate_interleaved, kernel=self._kernel,
        )  # fmt: skip
        # gau.block_post_norm with a dropout between its parts.
        return norm.rms_norm(x + self.hidden_dropout(unit), epsilon=self.epsilon)

    def _kernel(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return self.attention_dropout(softmax_plus(scores, mask, n_min=self.n_min))

    def reset_parameters(self, gain: float) -> None:
        for kernel in (self.w_in, self.w_out):
            _encoder.reset_kernel(kernel, gain)
        for gamma in (self.gamma_q, self.gamma_k):
            nn.init.ones_(gamma)


class GauAlpha(nn.Module):
    """A sequence classifier; `hidden_states` is the encoder alone.

    Both dropouts are 0.1 at the release, and act in training only.
    """

    def __init__(self, config: Config, *, hidden_dropout: float = 0.1, attention_dropout: float = 0.1) -> None:
        super().__init__()
        self.config = config
        self.embedding = _encoder.Embedding(config, hidden_dropout)
        layers = (Layer(config, hidden_dropout, attention_dropout) for _ in range(config.layers))
        self.layers = nn.ModuleList(layers)
        self.classifier = _encoder.Classifier(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New weights from torch's generator: gammas 1, the classifier's bias 0, the rest as in _encoder."""
        gain = _encoder.gain(self.config.layers, _encoder.GAU_ORDER)
        for part in (self.embedding, *self.layers, self.classifier):
            part.reset_parameters(gain)

    def hidden_states(
        self,
        token_ids: Int[Tensor, "*b n"],
        segment_ids: Int[Tensor, "*b n"] | None = None,
        mask: Bool[Tensor, "*b n"] | None = None,
    ) -> list[Float[Tensor, "*b n d"]]:
        """The embedding, then the output of every layer: x_0 ... x_L.

        Raises: ShapeError for ids and masks that are not of one shape; DomainError for other dtypes.
        """
        return self._states(_encoder.checked_inputs("gau_alpha.hidden_states", token_ids, segment_ids, mask))

    def forward(
        self,
        token_ids: Int[Tensor, "*b n"],
        segment_ids: Int[Tensor, "*b n"] | None = None,
        mask: Bool[Tensor, "*b n"] | None = None,
    ) -> Output:
        """Logits of a sequence classifier, the sentence vector below them and the last layer's vectors.

        Raises: as `hidden_states`.
        """
        inputs = _encoder.checked_inputs("gau_alpha.forward", token_ids, segment_ids, mask)
        return self.classifier(self._states(inputs)[-1], inputs.mask)

    def _states(self, inputs: _encoder.Inputs) -> list[Tensor]:
        visible = None if inputs.mask is None else attention.key_mask(inputs.mask)
        positions, frequencies = _encoder.placed(inputs.token_ids, self.config)
        states = [self.embedding(inputs)]
        for layer in self.layers:
            states.append(layer(states[-1], visible, positions, frequencies))
        return states
