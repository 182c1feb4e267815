"""FLASH with mixed chunks: pre-norm units that attend inside chunks quadratically and between them linearly.

    x_0 = rms_norm(E_token + E_segment),   x_(l+1) = x_l + unit_l(layer_norm_l(x_l)),   y = layer_norm(x_L)

Specification: refimpl/models/flash.py. In training, dropout acts on the embeddings' sum before its norm and on every
unit before the residual sum. What stands on y is in _heads.
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from refimpl.models.flash import Config, layer_shapes
from torchimpl import check
from torchimpl.dropout import Dropout
from torchimpl.models import _encoder
from torchimpl.ops import mixed_chunk_attention, norm

# Of gamma at the start: heads that hardly attend, so that the residual path carries the first steps (arXiv:2202.10447).
GAMMA_DEVIATION = 0.02


class Layer(nn.Module):
    """Mixed chunk attention of the normalised input, added to the input as it came."""

    def __init__(self, config: Config, dropout: float) -> None:
        super().__init__()
        _encoder.add_parameters(self, layer_shapes(config))
        self.dropout = Dropout(dropout)
        self.epsilon = config.epsilon
        self.mix: Callable[..., Tensor] = getattr(mixed_chunk_attention, config.mix)
        self.rule = _rule(config)

    def forward(
        self,
        x: Float[Tensor, "*b n d"],
        mask: Bool[Tensor, "*b n"] | None,
        positions: Int[Tensor, "*p n"],
        frequencies: Float[Tensor, " r"],
    ) -> Float[Tensor, "*b n d"]:
        return self._mixed(x, mask, positions, frequencies, self.mix)

    def no_sums(self, batch: tuple[int, ...]) -> mixed_chunk_attention.State:
        """What is kept of a stream before its first token."""
        made = mixed_chunk_attention.initial_state(batch=batch, s=self.gamma.shape[1], e=self.w_out.shape[0])
        sums = {name: getattr(made, name).to(self.w_in) for name in ("summary", "k_quad", "k_lin", "v")}
        rest = {name: getattr(made, name).to(self.w_in.device) for name in ("counted", "valid")}
        return made._replace(**sums, **rest)

    def step(
        self,
        x: Float[Tensor, "*b n d"],
        mask: Bool[Tensor, "*b n"],
        positions: Int[Tensor, "*p n"],
        frequencies: Float[Tensor, " r"],
        past: mixed_chunk_attention.State,
    ) -> tuple[Float[Tensor, "*b n d"], mixed_chunk_attention.State]:
        """The layer on the next tokens of a causal stream, and what it keeps after them."""
        summed = isinstance(past, mixed_chunk_attention.State)
        check.domain("flash.step", summed, "a state that keeps sums in every layer", received=type(past))
        kept = []

        # The unit calls its mix once; what the layer keeps leaves it here.
        def mix(
            q_quad: Tensor, k_quad: Tensor, q_lin: Tensor, k_lin: Tensor, v: Tensor,
            key_mask: Any, segments: Any, bias: Any, *, documents: Any, **rule: Any,
        ) -> Tensor:  # fmt: skip
            mixed, now = mixed_chunk_attention.step(past, q_quad, k_quad, q_lin, k_lin, v, key_mask, bias, **rule)
            kept.append(now)
            return mixed

        return self._mixed(x, mask, positions, frequencies, mix), kept[0]

    def _mixed(
        self, x: Tensor, mask: Tensor | None, positions: Tensor, frequencies: Tensor, mix: Callable[..., Tensor]
    ) -> Tensor:
        unit = mixed_chunk_attention.unit(
            norm.layer_norm(x, self.norm_scale, self.norm_bias, epsilon=self.epsilon),
            mask, None, None, positions, frequencies,
            self.w_in, self.b_in, self.gamma, self.beta, self.w_out, self.b_out, mix=mix, **self.rule,
        )  # fmt: skip
        return x + self.dropout(unit)

    def reset_parameters(self, gain: float) -> None:
        nn.init.ones_(self.norm_scale)
        nn.init.normal_(self.gamma, std=GAMMA_DEVIATION)
        for kernel in (self.w_in, self.w_out):
            _encoder.reset_kernel(kernel, gain)
        for offset in (self.norm_bias, self.b_in, self.beta, self.b_out):
            nn.init.zeros_(offset)


class Flash(nn.Module):
    """The encoder, called as a module for the last of its hidden states. Dropout acts in training only."""

    def __init__(self, config: Config, *, hidden_dropout: float = 0.1) -> None:
        super().__init__()
        self.config = config
        self.embedding = _encoder.Embedding(config, hidden_dropout)
        self.layers = nn.ModuleList(Layer(config, hidden_dropout) for _ in range(config.layers))
        self.final_norm = _encoder.LayerNorm(config.hidden_size, config.epsilon)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New weights from torch's generator: gammas near 0, norms the identity, biases 0, the rest as in _encoder."""
        _encoder.reset_units(self)
        self.final_norm.reset_parameters()

    def hidden_states(
        self,
        token_ids: Int[Tensor, "*b n"],
        segment_ids: Int[Tensor, "*b n"] | None = None,
        mask: Bool[Tensor, "*b n"] | None = None,
        positions: Int[Tensor, "*p n"] | None = None,
    ) -> list[Float[Tensor, "*b n d"]]:
        """The embedding, the output of every layer but the last, and the norm of the last one's.

        Raises: ShapeError for ids and masks that are not of one shape and positions that are neither (n,) nor of that
            shape; DomainError for other dtypes.
        """
        given = token_ids, segment_ids, mask, positions
        return _encoder.closed(self, _encoder.encoded(self, given, lambda inputs: inputs.mask))

    def forward(
        self,
        token_ids: Int[Tensor, "*b n"],
        segment_ids: Int[Tensor, "*b n"] | None = None,
        mask: Bool[Tensor, "*b n"] | None = None,
        positions: Int[Tensor, "*p n"] | None = None,
    ) -> Float[Tensor, "*b n d"]:
        """The normalised output of the last layer.

        Raises: as `hidden_states`.
        """
        return self.hidden_states(token_ids, segment_ids, mask, positions)[-1]

    def initial_state(self, *, batch: tuple[int, ...]) -> _encoder.State:
        """The state before the first token of `batch` texts: nothing summed, nothing buffered."""
        return _encoder.State(0, tuple(layer.no_sums(batch) for layer in self.layers))

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
            but a state, and where `mix` is not causal.
        """
        mix = self.config.mix
        check.domain("flash.step", mix == "causal", "mix causal, since no token may read a later one", mix=mix)
        states, state = _encoder.stepped(self, state, (token_ids, segment_ids, mask, positions))
        return _encoder.closed(self, states), state


def _rule(config: Config) -> dict[str, Any]:
    return {
        "rotate": _encoder.ROTATIONS[config.rotation],
        "rows": config.row_order,
        "chunk": config.chunk,
        "scale": config.scale,
        "kernel": _encoder.KERNELS[config.kernel],
        "normaliser": getattr(mixed_chunk_attention, config.normaliser),
    }
