"""FLASH-Quad: pre-norm gated attention units of the paper's form over the whole sequence.

    x_0 = rms_norm(E_token + E_segment),   x_(l+1) = x_l + unit_paper_l(layer_norm_l(x_l)),   y = layer_norm(x_L)

Specification: refimpl/models/flash_quad.py. In training, hidden dropout acts on the embeddings' sum before its norm and
on every unit before the residual sum, attention dropout on the attention weights. What stands on y is in _heads.

Differs: the paper starts gamma with the deviation 0.02, beside a bias that carries the first steps. Without one the
weights of a squared ReLU begin at gamma^4 / n^2: models of 2 layers that were to repeat 8 or 32 tokens learnt nothing
in 300 steps with the divisor 512, and the task with gammas of 1, which is the start here.
"""

from collections.abc import Callable

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from refimpl.models.flash_quad import Config, layer_shapes
from torchimpl import check
from torchimpl.dropout import Dropout
from torchimpl.models import _encoder
from torchimpl.ops import attention_kernel, gau, norm


class Layer(nn.Module):
    """A gated attention unit of the normalised input, added to the input as it came."""

    def __init__(self, config: Config, hidden_dropout: float, attention_dropout: float) -> None:
        super().__init__()
        _encoder.add_parameters(self, layer_shapes(config))
        self.hidden_dropout = Dropout(hidden_dropout)
        self.attention_dropout = Dropout(attention_dropout)
        self.config = config

    def forward(
        self,
        x: Float[Tensor, "*b n d"],
        visible: Bool[Tensor, "*_b _n n"] | None,
        positions: Int[Tensor, "*p n"],
        frequencies: Float[Tensor, " r"],
    ) -> Float[Tensor, "*b n d"]:
        # An empty array has no scores to divide.
        lengths = {"array": max(x.shape[-2], 1), "constant": self.config.length, "visible": 1}
        unit = gau.unit_paper(
            norm.layer_norm(x, self.norm_scale, self.norm_bias, epsilon=self.config.epsilon),
            visible, None, positions, frequencies, self.w_in, self.b_in,
            self.gamma_q, self.beta_q, self.gamma_k, self.beta_k, self.w_out, self.b_out,
            length=lengths[self.config.divisor], rotate=_encoder.ROTATIONS[self.config.rotation], kernel=self._kernel,
        )  # fmt: skip
        # gau.block_pre_norm with a dropout between its parts.
        return x + self.hidden_dropout(unit)

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
        normed = norm.layer_norm(x, self.norm_scale, self.norm_bias, epsilon=self.config.epsilon)
        unit, keys = _encoder.unit_step(
            "flash_quad.step", self, normed, mask, positions, frequencies, past,
            rotate=_encoder.ROTATIONS[self.config.rotation], kernel=self._kernel, scale=1 / max(self.config.length, 1),
        )  # fmt: skip
        return x + self.hidden_dropout(unit), keys

    def _kernel(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        if self.config.divisor == "visible":
            scores = scores / attention_kernel.visible_lengths(scores, mask).clamp(min=1)
        return self.attention_dropout(_encoder.KERNELS[self.config.kernel](scores, mask))

    def reset_parameters(self, gain: float) -> None:
        for kernel in (self.w_in, self.w_out):
            _encoder.reset_kernel(kernel, gain)
        for one in (self.norm_scale, self.gamma_q, self.gamma_k):
            nn.init.ones_(one)
        for offset in (self.norm_bias, self.b_in, self.beta_q, self.beta_k, self.b_out):
            nn.init.zeros_(offset)


class FlashQuad(nn.Module):
    """The encoder, called as a module for the last of its hidden states. Dropouts act in training only."""

    def __init__(self, config: Config, *, hidden_dropout: float = 0.1, attention_dropout: float = 0.1) -> None:
        super().__init__()
        self.config = config
        self.embedding = _encoder.Embedding(config, hidden_dropout)
        self.layers = nn.ModuleList(Layer(config, hidden_dropout, attention_dropout) for _ in range(config.layers))
        self.final_norm = _encoder.LayerNorm(config.hidden_size, config.epsilon)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New weights from torch's generator: gammas 1, norms the identity, biases 0, the rest as in _encoder."""
        _encoder.reset_units(self)
        self.final_norm.reset_parameters()

    def hidden_states(
        self,
        token_ids: Int[Tensor, "*b n"],
        segment_ids: Int[Tensor, "*b n"] | None = None,
        mask: Bool[Tensor, "*b n"] | None = None,
        positions: Int[Tensor, "*p n"] | None = None,
        *,
        visible: Callable[..., Tensor | None] = _encoder.bidirectional,
    ) -> list[Float[Tensor, "*b n d"]]:
        """The embedding, the output of every layer but the last, and the norm of the last one's.

        `visible` is one of bidirectional, causal and unilm of _encoder, or a function of their signature.
        Raises: ShapeError for ids and masks that are not of one shape and positions that are neither (n,) nor of that
            shape; DomainError for other dtypes.
        """
        given = token_ids, segment_ids, mask, positions
        states = _encoder.encoded(self, given, lambda inputs: visible(inputs.mask, inputs.segment_ids))
        return _encoder.closed(self, states)

    def forward(
        self,
        token_ids: Int[Tensor, "*b n"],
        segment_ids: Int[Tensor, "*b n"] | None = None,
        mask: Bool[Tensor, "*b n"] | None = None,
        positions: Int[Tensor, "*p n"] | None = None,
        *,
        visible: Callable[..., Tensor | None] = _encoder.bidirectional,
    ) -> Float[Tensor, "*b n d"]:
        """The normalised output of the last layer.

        Raises: as `hidden_states`.
        """
        return self.hidden_states(token_ids, segment_ids, mask, positions, visible=visible)[-1]

    def initial_state(self, *, batch: tuple[int, ...]) -> _encoder.State:
        """The state before the first token of `batch` texts: no layer has a key.

        Raises: DomainError for the divisor array.
        """
        self._check_streams("flash_quad.initial_state")
        return _encoder.State(0, tuple(layer.no_keys(batch) for layer in self.layers))

    def step(
        self,
        state: _encoder.State,
        token_ids: Int[Tensor, "*b n"],
        segment_ids: Int[Tensor, "*b n"] | None = None,
        mask: Bool[Tensor, "*b n"] | None = None,
        positions: Int[Tensor, "*p n"] | None = None,
    ) -> tuple[list[Float[Tensor, "*b n d"]], _encoder.State]:
        """The hidden states of the next n tokens of a causal stream, and the state after them.

        Raises: as `hidden_states`; ShapeError for a state of other texts or of another Config; DomainError for anything
            but a state, and for the divisor array.
        """
        self._check_streams("flash_quad.step")
        states, state = _encoder.stepped(self, state, (token_ids, segment_ids, mask, positions))
        return _encoder.closed(self, states), state

    def _check_streams(self, operation: str) -> None:
        divisor, expected = self.config.divisor, "the divisor visible or constant, since no token may read a later one"
        check.domain(operation, divisor != "array", expected, divisor=divisor)
