"""Heads: what stands on the vectors of an encoder, one module for each.

    hidden = encoder(token_ids, segment_ids, mask)
    logits = TransformedLM(config, specification.TransformedLM())(hidden, encoder.embedding.token)

Specification: refimpl/models/_heads.py, whose names of weights the state of a module has. `config` is that of the
encoder, `head` the specification's dataclass of the same name. Kernels start as the encoder's do,
norms as the identity, biases at 0. In training, dropout acts where bert4keras has one: before the table of TiedLM.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from refimpl.models import _heads as specification
from refimpl.models._encoder import table_width
from torchimpl import check
from torchimpl.dropout import Dropout
from torchimpl.models import _encoder
from torchimpl.ops import attention, norm, pooling
from torchimpl.ops import head as spans


class Head(nn.Module):
    """The weights of one head of the specification, a module of its own for every dot in their names."""

    def __init__(self, config: Any, head: Any) -> None:
        super().__init__()
        self.config, self.head = config, head
        _encoder.add_nested(self, head.shapes(config))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New weights from torch's generator."""
        _encoder.reset(self, _encoder.kernel_law(self.config))


class TransformedLM(Head):
    """The masked-language head of RoFormer: a dense layer, its norm, the tied token table and a bias per token."""

    def transform(self, hidden: Float[Tensor, "*b d"]) -> Float[Tensor, "*b e"]:
        """What the token table is multiplied with.

        Raises: ShapeError for vectors of another width; DomainError for other dtypes.
        """
        dense, affine = self.mlm.transform, self.mlm.norm
        x = _encoder.ACTIVATIONS[self.config.activation](attention.project(hidden, dense.kernel, dense.bias))
        return norm.layer_norm(x, affine.scale, affine.bias, epsilon=self.config.mlm_epsilon)

    def forward(self, hidden: Float[Tensor, "*b d"], table: Float[Tensor, "_v e"]) -> Float[Tensor, "*b v"]:
        """One logit per token of the vocabulary; `table` is the encoder's embedding.token.

        Raises: as `transform`; ShapeError for another table.
        """
        table = _table("heads.masked_lm_transformed", table, self.config)
        return attention.project(self.transform(hidden), table.T, self.mlm.bias)


class TiedLM(Head):
    """The masked-language head of RoFormerV2 and GAU-α: the tied token table, behind a matrix where widths differ."""

    def __init__(self, config: Any, head: specification.TiedLM, *, hidden_dropout: float = 0.1) -> None:
        super().__init__(config, head)
        self.dropout = Dropout(hidden_dropout)

    def forward(self, hidden: Float[Tensor, "*b d"], table: Float[Tensor, "_v e"]) -> Float[Tensor, "*b v"]:
        """One logit per token of the vocabulary; `table` is the encoder's embedding.token.

        Raises: ShapeError for vectors of another width and for another table; DomainError for other dtypes.
        """
        table = _table("heads.masked_lm_tied", table, self.config)
        if hasattr(self, "mlm"):
            hidden = attention.project(hidden, self.mlm.mapping.kernel, None)
        return attention.project(self.dropout(hidden), table.T, None)


class Pooler(Head):
    """A dense layer on the first token, behind tanh as in BERT or as it is."""

    def __init__(self, config: Any, head: specification.Pooler) -> None:
        super().__init__(config, head)
        self.pool = pooling.pooler_tanh if head.activation == "tanh" else pooling.pooler_linear

    def forward(self, hidden: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b d"]:
        return self.pool(hidden, self.pooler.kernel, self.pooler.bias)


class NextSentence(Head):
    """Two logits from the pooled vector: the second sentence follows the first, or it does not."""

    def forward(self, pooled: Float[Tensor, "*b d"]) -> Float[Tensor, "*b 2"]:
        return spans.classify(pooled, self.next_sentence.kernel, self.next_sentence.bias)


class SequenceClassifier(Head):
    """One logit per class from a sentence vector, pooled in any way."""

    def forward(self, sentence: Float[Tensor, "*b d"]) -> Float[Tensor, "*b k"]:
        return spans.classify(sentence, self.classifier.kernel, self.classifier.bias)


class SentenceEmbedding(Head):
    """The sentence vector as it is pooled: a head without weights."""

    def forward(self, sentence: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return sentence


class MultipleChoice(Head):
    """One score per choice from its sentence vector, -inf where `choices` is False."""

    def forward(self, sentence: Float[Tensor, "*b k d"], choices: Bool[Tensor, "*b k"]) -> Float[Tensor, "*b k"]:
        return spans.choose(sentence, self.choice.kernel, self.choice.bias, choices)


class EntityPointer(Head):
    """The score of every span for every type, with a query and a key of its own per type."""

    def forward(
        self,
        hidden: Float[Tensor, "*b n d"],
        mask: Bool[Tensor, "*b n"],
        positions: Int[Tensor, "*p n"] | None = None,
    ) -> Float[Tensor, "*b h n n"]:
        kernel, bias, positions = self.entity.kernel, self.entity.bias, _positions(hidden, positions)
        return spans.global_pointer(
            hidden, kernel, bias, mask, positions, heads=self.head.types, base=self.head.rotary_base
        )


class EfficientEntityPointer(Head):
    """The score of every span for every type, with one query and key for all types."""

    def forward(
        self,
        hidden: Float[Tensor, "*b n d"],
        mask: Bool[Tensor, "*b n"],
        positions: Int[Tensor, "*p n"] | None = None,
    ) -> Float[Tensor, "*b h n n"]:
        weights = (self.entity.kernel, self.entity.bias, self.entity.type_kernel, self.entity.type_bias)
        positions = _positions(hidden, positions)
        return spans.efficient_global_pointer(hidden, *weights, mask, positions, base=self.head.rotary_base)


class SpanPointer(Head):
    """The score of every span (start, end), of one type and without a bias.

    `mask` is True on tokens that an answer may hold.
    """

    def forward(
        self,
        hidden: Float[Tensor, "*b n d"],
        mask: Bool[Tensor, "*b n"],
        positions: Int[Tensor, "*p n"] | None = None,
    ) -> Float[Tensor, "*b n n"]:
        kernel, positions = self.span.kernel, _positions(hidden, positions)
        no_bias = kernel.new_zeros(kernel.shape[1])
        scores = spans.global_pointer(hidden, kernel, no_bias, mask, positions, heads=1, base=self.head.rotary_base)
        return scores[..., 0, :, :]


def first_token(states: Sequence[Float[Tensor, "..."]], mask: Bool[Tensor, "..."] | None) -> Float[Tensor, "*b d"]:
    """A sentence vector from all hidden states: the last one's first token, [CLS].

    Raises: as pooling.first; ShapeError without a state.
    """
    _check_states("heads.first_token", states, 1)
    return pooling.first(states[-1])


def mean_of_tokens(states: Sequence[Float[Tensor, "..."]], mask: Bool[Tensor, "..."] | None) -> Float[Tensor, "*b d"]:
    """A sentence vector from all hidden states: the mean of the last one's real tokens, all where mask is None.

    Raises: as pooling.masked_mean; ShapeError without a state.
    """
    _check_states("heads.mean_of_tokens", states, 1)
    return pooling.masked_mean(states[-1], real_tokens(states[-1], mask))


def first_last_average(
    states: Sequence[Float[Tensor, "..."]], mask: Bool[Tensor, "..."] | None
) -> Float[Tensor, "*b d"]:
    """A sentence vector from all hidden states: the average of the means of the first layer and of the last.

    Raises: as pooling.first_last_average; ShapeError without a layer.
    """
    _check_states("heads.first_last_average", states, 2)
    return pooling.first_last_average(states[1], states[-1], real_tokens(states[-1], mask))


POOLINGS: dict[str, Callable[..., Tensor]] = {
    "first_token": first_token,
    "mean_of_tokens": mean_of_tokens,
    "first_last_average": first_last_average,
}


def real_tokens(hidden: Float[Tensor, "*b n d"], mask: Bool[Tensor, "*b n"] | None) -> Bool[Tensor, "*b n"]:
    """The mask, or that of nothing but real tokens where it is None."""
    return torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device) if mask is None else mask


def _table(operation: str, table: Tensor, config: Any) -> Tensor:
    check.real(operation, "table", table)
    shape = (config.vocab_size, table_width(config))
    check.shape(operation, tuple(table.shape) == shape, f"a token table of shape {shape}", table=table)
    return table


def _positions(hidden: Tensor, positions: Tensor | None) -> Tensor:
    if positions is not None:
        return positions
    # What has no token axis is refused where it is scored.
    return torch.arange(hidden.shape[-2] if hidden.ndim >= 2 else 0, device=hidden.device)


def _check_states(operation: str, states: Sequence[Tensor], least: int) -> None:
    check.shape(operation, len(states) >= least, f"at least {least} of the hidden states", received=len(states))
