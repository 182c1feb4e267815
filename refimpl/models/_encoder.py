"""What the models share around their layers: checked inputs and weights, the embedding, the classifier.

    x_0 = rms_norm(E_token[ids] + E_segment[segments]),   logits = masked_mean(hidden) W + b

Weights are named by dots, layers.0.w_in; kernels are (in, out). The same names stand in a state_dict of torchimpl.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from refimpl import check
from refimpl.ops import head, norm, pooling

Weights = Mapping[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]


class Output(NamedTuple):
    """The classes' logits, the sentence vector that they are read from, and the vectors of the tokens."""

    logits: Float[np.ndarray, "*b k"]
    embedding: Float[np.ndarray, "*b d"]
    hidden: Float[np.ndarray, "*b n d"]


class Inputs(NamedTuple):
    """Token and segment ids, and which tokens are real."""

    token_ids: Int[np.ndarray, "*b n"]
    segment_ids: Int[np.ndarray, "*b n"]
    mask: Bool[np.ndarray, "*b n"]


def embedding_shapes(config: Any) -> Shapes:
    """One vector per token of the vocabulary and one per segment."""
    d = config.hidden_size
    return {"embedding.token": (config.vocab_size, d), "embedding.segment": (config.segments, d)}


def classifier_shapes(config: Any) -> Shapes:
    """One column per class."""
    return {"classifier.kernel": (config.hidden_size, config.labels), "classifier.bias": (config.labels,)}


def layered(shapes: Shapes, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The shapes of one layer for every layer: layers.0.w_in, layers.0.w_out, layers.1.w_in, ..."""
    return ((f"layers.{i}.{name}", shape) for i in range(layers) for name, shape in shapes.items())


def count(shapes: Shapes) -> int:
    """How many numbers the weights hold."""
    return sum(math.prod(shape) for shape in shapes.values())


def layer_of(weights: Weights, index: int) -> dict[str, np.ndarray]:
    """The weights of one layer, by their names within it."""
    prefix = f"layers.{index}."
    return {name.removeprefix(prefix): array for name, array in weights.items() if name.startswith(prefix)}


def checked_weights(operation: str, weights: Weights, shapes: Shapes) -> dict[str, np.ndarray]:
    """The weights in float64.

    Raises: ShapeError for a name that is missing or not known and for another shape; DomainError for NaN or infinity.
    """
    missing, unknown = sorted(shapes.keys() - weights.keys()), sorted(weights.keys() - shapes.keys())
    if missing or unknown:
        raise check.ShapeError(
            f"{operation}: expected {len(shapes)} weights, missing: {_few(missing)}, unknown: {_few(unknown)}"
        )
    made = {name: check.real(operation, name, weights[name]) for name in shapes}
    for name, shape in shapes.items():
        check.shape(operation, made[name].shape == shape, f"{name} of shape {shape}", **{name: made[name]})
    return made


def checked_inputs(
    operation: str,
    token_ids: Shaped[np.ndarray, "..."],
    segment_ids: Shaped[np.ndarray, "..."] | None,
    mask: Shaped[np.ndarray, "..."] | None,
    config: Any,
) -> Inputs:
    """Ids within their tables and a boolean mask; without them every token is of segment 0 and real.

    Raises: ShapeError unless all are of one shape (..., n); DomainError for ids that are no integers or out of range,
        and for a mask that is not boolean.
    """
    token_ids = check.integer(operation, "token_ids", token_ids)
    check.shape(operation, token_ids.ndim >= 1, "token_ids of shape (..., n)", token_ids=token_ids)
    segment_ids = np.zeros_like(token_ids) if segment_ids is None else segment_ids
    segment_ids = check.integer(operation, "segment_ids", segment_ids)
    mask = np.ones(token_ids.shape, dtype=np.bool_) if mask is None else check.boolean(operation, "mask", mask)
    fits = token_ids.shape == segment_ids.shape == mask.shape
    received = {"token_ids": token_ids, "segment_ids": segment_ids, "mask": mask}
    check.shape(operation, fits, "token_ids, segment_ids and mask of one shape (..., n)", **received)
    _within(operation, "token_ids", token_ids, config.vocab_size, "vocab_size")
    _within(operation, "segment_ids", segment_ids, config.segments, "segments")
    return Inputs(token_ids, segment_ids, mask)


def embed(weights: Weights, inputs: Inputs, *, epsilon: float) -> Float[np.ndarray, "*b n d"]:
    """The normalised sum of a token's vector and its segment's."""
    vectors = weights["embedding.token"][inputs.token_ids] + weights["embedding.segment"][inputs.segment_ids]
    return norm.rms_norm(vectors, epsilon=epsilon)


def classified(weights: Weights, hidden: Float[np.ndarray, "*b n d"], mask: Bool[np.ndarray, "*b n"]) -> Output:
    """The logits of the mean of the real tokens."""
    embedding = pooling.masked_mean(hidden, mask)
    return Output(head.classify(embedding, weights["classifier.kernel"], weights["classifier.bias"]), embedding, hidden)


def check_sizes(config: Any, *names: str) -> None:
    """The named fields are at least 1. A common part of every __post_init__."""
    for name in names:
        size = getattr(config, name)
        check.domain(f"{config.model}.Config", size >= 1, f"{name} >= 1", **{name: size})


def check_numerics(config: Any) -> None:
    """What the rotation and the norms ask for: an even key_size, rotary_base > 0, epsilon >= 0."""
    operation = f"{config.model}.Config"
    check.domain(operation, config.key_size % 2 == 0, "an even key_size", key_size=config.key_size)
    check.domain(operation, config.rotary_base > 0, "rotary_base > 0", rotary_base=config.rotary_base)
    check.domain(operation, config.epsilon >= 0, "epsilon >= 0", epsilon=config.epsilon)


def _within(operation: str, name: str, ids: np.ndarray, size: int, size_name: str) -> None:
    outside = (ids < 0) | (ids >= size)
    if outside.any():
        index = tuple(int(i) for i in np.argwhere(outside)[0])
        raise check.DomainError(
            f"{operation}: expected {name} from 0 to {size - 1} ({size_name} {size}), "
            f"received {ids[index]} at index {list(index)}"
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"
