"""RoFormer: BERT without position embeddings; queries and keys are rotated by their positions instead.

    x_0 = layer_norm(E_token + E_segment) [W + b],   m_l = layer_norm(x_l + attention_l(x_l))
    x_(l+1) = layer_norm(m_l + feed_forward_l(m_l))

Specification: refimpl/models/roformer.py. In training, hidden dropout acts behind the embedding's norm and before both
residual sums of a layer, attention dropout on the attention weights. What stands on x_L is in _heads.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from refimpl.models import _encoder as specification
from refimpl.models.roformer import Config, layer_shapes, shapes
from torchimpl.dropout import Dropout
from torchimpl.models import _encoder


class Embedding(nn.Module):
    """The norm of the sum of a token's vector and its segment's, mapped where embedding_size differs."""

    def __init__(self, config: Config, dropout: float) -> None:
        super().__init__()
        _encoder.add_parameters(self, specification.table_shapes(config), "embedding.")
        self.norm = _encoder.LayerNorm(config.embedding_size, config.epsilon)
        self.dropout = Dropout(dropout)
        mapped = config.embedding_size != config.hidden_size
        self.mapping = _encoder.Mapping(shapes(config)) if mapped else nn.Identity()

    def forward(self, inputs: _encoder.Inputs) -> Float[Tensor, "*b n d"]:
        vectors = functional.embedding(inputs.token_ids, self.token)
        vectors = vectors + functional.embedding(inputs.segment_ids, self.segment)
        return self.mapping(self.dropout(self.norm(vectors)))


class Layer(nn.Module):
    """Attention, then a feed-forward, each added to its input and normalised."""

    def __init__(self, config: Config, hidden_dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.attention = _encoder.SelfAttention(config, layer_shapes(config), attention_dropout)
        self.attention_norm = _encoder.LayerNorm(config.hidden_size, config.epsilon)
        self.feed_forward = _encoder.FeedForward(config, layer_shapes(config))
        self.feed_forward_norm = _encoder.LayerNorm(config.hidden_size, config.epsilon)
        self.dropout = Dropout(hidden_dropout)

    def forward(
        self,
        x: Float[Tensor, "*b n d"],
        visible: Bool[Tensor, "*_b 1 _n n"] | None,
        positions: Int[Tensor, "*p n"],
        frequencies: Float[Tensor, " r"],
    ) -> Float[Tensor, "*b n d"]:
        return self._behind(x, self.attention(x, visible, positions, frequencies))

    def no_keys(self, batch: tuple[int, ...]) -> _encoder.Keys:
        """What is kept of a stream before its first token."""
        return self.attention.no_keys(batch)

    def step(
        self,
        x: Float[Tensor, "*b n d"],
        mask: Bool[Tensor, "*b n"],
        positions: Int[Tensor, "*p n"],
        frequencies: Float[Tensor, " r"],
        past: _encoder.Keys,
    ) -> tuple[Float[Tensor, "*b n d"], _encoder.Keys]:
        """The layer on the next tokens of a causal stream, and what it keeps after them."""
        attended, keys = self.attention.step(x, mask, positions, frequencies, past)
        return self._behind(x, attended), keys

    def _behind(self, x: Tensor, attended: Tensor) -> Tensor:
        """All that stands behind the attention."""
        middle = self.attention_norm(x + self.dropout(attended))
        return self.feed_forward_norm(middle + self.dropout(self.feed_forward(middle)))


class Roformer(_encoder.Transformer):
    """The encoder. Both dropouts are 0.1 at the release, and act in training only."""

    def __init__(self, config: Config, *, hidden_dropout: float = 0.1, attention_dropout: float = 0.1) -> None:
        layers = [Layer(config, hidden_dropout, attention_dropout) for _ in range(config.layers)]
        super().__init__(config, Embedding(config, hidden_dropout), layers)
