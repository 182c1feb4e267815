"""What the models share around their layers: checked inputs, the embedding, the classifier, the initialiser.

Kernels and embeddings start as a normal law of standard deviation σ cut at ±2σ, with σ chosen so that what is left has
the deviation gain / √f; f is the fan-in of a kernel and the width of an embedding, gain = layers^(-1/order), order the
number of matrices multiplied along a residual branch.

Source: bert4keras (initializer); https://kexue.fm/archives/8978.
Differs: bert4keras reads f off the shape, and takes the wrong axis where hidden_size is below 10 or above 10000, or a
vocabulary between; torch's trunc_normal_ cuts at ±2 unless told otherwise, which at σ = 0.02 is no cut at all.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from refimpl.models import _encoder as specification
from torchimpl import check
from torchimpl.ops import head, norm, pooling, rope

# Gate, value and output: the matrices whose product a gated attention unit adds to its input.
GAU_ORDER = 3
# The standard deviation of a unit normal law cut at ±2, 0.8796.
CUT_DEVIATION = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))


class Output(NamedTuple):
    """The classes' logits, the sentence vector that they are read from, and the vectors of the tokens."""

    logits: Float[Tensor, "*b k"]
    embedding: Float[Tensor, "*b d"]
    hidden: Float[Tensor, "*b n d"]


class Inputs(NamedTuple):
    """Token and segment ids, and which tokens are real: None where all are."""

    token_ids: Int[Tensor, "*b n"]
    segment_ids: Int[Tensor, "*b n"]
    mask: Bool[Tensor, "*b n"] | None


class Embedding(nn.Module):
    """The normalised sum of a token's vector and its segment's; dropout acts on the sum."""

    def __init__(self, config: Any, dropout: float) -> None:
        super().__init__()
        add_parameters(self, specification.embedding_shapes(config), "embedding.")
        self.dropout = nn.Dropout(dropout)
        self.epsilon = config.epsilon

    def forward(self, inputs: Inputs) -> Float[Tensor, "*b n d"]:
        vectors = functional.embedding(inputs.token_ids, self.token)
        vectors = vectors + functional.embedding(inputs.segment_ids, self.segment)
        return norm.rms_norm(self.dropout(vectors), epsilon=self.epsilon)

    def reset_parameters(self, gain: float) -> None:
        for table in (self.token, self.segment):
            truncated_normal(table, gain / math.sqrt(table.shape[1]))


class Classifier(nn.Module):
    """Logits of the mean of the real tokens."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        add_parameters(self, specification.classifier_shapes(config), "classifier.")

    def forward(self, hidden: Float[Tensor, "*b n d"], mask: Bool[Tensor, "*b n"] | None) -> Output:
        real = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device) if mask is None else mask
        embedding = pooling.masked_mean(hidden, real)
        return Output(head.classify(embedding, self.kernel, self.bias), embedding, hidden)

    def reset_parameters(self, gain: float) -> None:
        reset_kernel(self.kernel, gain)
        nn.init.zeros_(self.bias)


def add_parameters(module: nn.Module, shapes: dict[str, tuple[int, ...]], prefix: str = "") -> None:
    """One parameter per name, without its prefix; numbers are left to reset_parameters."""
    for name, shape in shapes.items():
        module.register_parameter(name.removeprefix(prefix), nn.Parameter(torch.empty(shape)))


def checked_inputs(operation: str, token_ids: Tensor, segment_ids: Tensor | None, mask: Tensor | None) -> Inputs:
    """Integers and a boolean mask of one shape; whether ids are within their tables is not looked at.

    Raises: ShapeError unless all are of one shape (..., n); DomainError for other dtypes.
    """
    token_ids = check.integer(operation, "token_ids", token_ids)
    check.shape(operation, token_ids.ndim >= 1, "token_ids of shape (..., n)", token_ids=token_ids)
    segment_ids = torch.zeros_like(token_ids) if segment_ids is None else segment_ids
    segment_ids = check.integer(operation, "segment_ids", segment_ids)
    fits = token_ids.shape == segment_ids.shape
    received = {"token_ids": token_ids, "segment_ids": segment_ids}
    if mask is not None:
        received["mask"] = check.boolean(operation, "mask", mask)
        fits = fits and token_ids.shape == mask.shape
    check.shape(operation, fits, "token_ids, segment_ids and mask of one shape (..., n)", **received)
    return Inputs(token_ids, segment_ids, mask)


def placed(token_ids: Int[Tensor, "*b n"], config: Any) -> tuple[Int[Tensor, " n"], Float[Tensor, " r"]]:
    """Positions 0, 1, 2, ... and the frequencies of the rotation, on the device of the ids."""
    positions = torch.arange(token_ids.shape[-1], device=token_ids.device)
    # An angle at position 1 is the frequency itself, in the widest format that the device has.
    one = torch.ones((), dtype=torch.int64, device=token_ids.device)
    return positions, rope.angles(one, rope.frequencies(config.key_size, base=config.rotary_base))


def gain(layers: int, order: int) -> float:
    """What a residual branch of `order` matrices is scaled by, so that `layers` of them add up to unit size."""
    return layers ** (-1 / order)


def reset_kernel(kernel: Tensor, gain: float) -> None:
    """A kernel (in, out): deviation gain / √in."""
    truncated_normal(kernel, gain / math.sqrt(kernel.shape[0]))


def truncated_normal(tensor: Tensor, deviation: float) -> None:
    """Numbers of this standard deviation, none further than 2 σ = 2.274 deviations from 0."""
    sigma = deviation / CUT_DEVIATION
    nn.init.trunc_normal_(tensor, std=sigma, a=-2 * sigma, b=2 * sigma)
