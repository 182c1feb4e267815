"""What the models share around their layers: checked inputs and weights, the embedding, who sees whom.

    x_0 = rms_norm(E_token[ids] + E_segment[segments])

Weights are named by dots, layers.0.w_in; kernels are (in, out). The same names stand in a state_dict of torchimpl.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from refimpl import check
from refimpl.config import from_dict
from refimpl.ops import activation, attention, attention_kernel, gau, norm, rope

Weights = Mapping[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]
# Token ids, segment ids, mask and positions as a model takes them.
Given = tuple[np.ndarray, np.ndarray | None, np.ndarray | None, np.ndarray | None]
Activation = Literal["gelu_erf", "gelu_tanh", "relu", "silu"]
ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu_erf": activation.gelu_erf,
    "gelu_tanh": activation.gelu_tanh,
    "relu": activation.relu,
    "silu": activation.silu,
}
# Of flash and flash_quad, which divide by a length elsewhere.
KERNELS: dict[str, Callable[..., np.ndarray]] = {
    "squared_relu": partial(attention_kernel.squared_relu_constant, length=1),
    "laplace": attention_kernel.laplace,
}
ROTATIONS = {"interleaved": rope.rotate_interleaved, "half_split": rope.rotate_half_split}


class Inputs(NamedTuple):
    """Token and segment ids, which tokens are real, and where they stand."""

    token_ids: Int[np.ndarray, "*b n"]
    segment_ids: Int[np.ndarray, "*b n"]
    mask: Bool[np.ndarray, "*b n"]
    positions: Int[np.ndarray, "*p n"]


class Keys(NamedTuple):
    """What a layer that attends keeps of a stream: rotated keys, values, and which of their m tokens are real.

    Keys are (..., m, s), or (..., m, h, s) where there are heads, and values alike.
    """

    k: Float[np.ndarray, "..."]
    v: Float[np.ndarray, "..."]
    real: Bool[np.ndarray, "*b m"]


class State(NamedTuple):
    """A causal stream of an encoder: how many tokens were read, and what every layer keeps of them."""

    tokens: int
    layers: tuple[Any, ...]


class Sublayers(NamedTuple):
    """What the attention adds, the norm of that sum, what the feed-forward adds, and the norm of that sum."""

    attention: Float[np.ndarray, "*b n d"]
    middle: Float[np.ndarray, "*b n d"]
    feed_forward: Float[np.ndarray, "*b n d"]
    output: Float[np.ndarray, "*b n d"]


def embedding_shapes(config: Any) -> Shapes:
    """One vector per token of the vocabulary and one per segment."""
    d = config.hidden_size
    return {"embedding.token": (config.vocab_size, d), "embedding.segment": (config.segments, d)}


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
    positions: Shaped[np.ndarray, "..."] | None,
    config: Any,
    *,
    first: int = 0,
) -> Inputs:
    """Ids within their tables, a boolean mask, and positions.

    Without segment_ids, mask and positions every token is of segment 0, real, and at its place in the array, counted
    from `first`.
    Raises: ShapeError unless all are of one shape (..., n), which for positions may be (n,); DomainError for ids that
        are no integers or out of range, a mask that is not boolean, and positions that are no integers.
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
    if positions is None:
        return Inputs(token_ids, segment_ids, mask, np.arange(first, first + token_ids.shape[-1]))
    positions = check.integer(operation, "positions", positions)
    fits = positions.shape in (token_ids.shape, token_ids.shape[-1:])
    check.shape(operation, fits, "positions (n,) or (..., n)", positions=positions, token_ids=token_ids)
    return Inputs(token_ids, segment_ids, mask, positions)


def checked(
    operation: str, weights: Weights, shapes: Shapes, given: Given, config: Any
) -> tuple[dict[str, np.ndarray], Inputs]:
    """What hidden states are made of.

    Raises: as `checked_weights` and `checked_inputs`, in that order.
    """
    return checked_weights(operation, weights, shapes), checked_inputs(operation, *given, config)


def embed(weights: Weights, inputs: Inputs, config: Any) -> Float[np.ndarray, "*b n d"]:
    """The normalised sum of a token's vector and its segment's."""
    vectors = weights["embedding.token"][inputs.token_ids] + weights["embedding.segment"][inputs.segment_ids]
    return norm.rms_norm(vectors, epsilon=config.epsilon)


def encoded(
    weights: Weights, x: np.ndarray, config: Any, layer: Callable[[Weights, np.ndarray], np.ndarray]
) -> list[np.ndarray]:
    """The embedding x, then the output of every layer; layer: of its weights and what enters it."""
    states = [x]
    for index in range(config.layers):
        states.append(layer(layer_of(weights, index), states[-1]))
    return states


def mapped(weights: Weights, x: np.ndarray) -> Float[np.ndarray, "*b n d"]:
    """An embedding in the width of the layers: as it is where the weights hold no mapping."""
    kernel = weights.get("embedding.mapping.kernel")
    return x if kernel is None else attention.project(x, kernel, weights.get("embedding.mapping.bias"))


def final_norm_shapes(config: Any) -> Shapes:
    """The weights of the one norm behind all layers that normalise what enters them."""
    return {"final_norm.scale": (config.hidden_size,), "final_norm.bias": (config.hidden_size,)}


def closed(weights: Weights, states: list[np.ndarray], config: Any) -> list[np.ndarray]:
    """The states with the last one normalised."""
    scale, bias = weights["final_norm.scale"], weights["final_norm.bias"]
    return [*states[:-1], norm.layer_norm(states[-1], scale, bias, epsilon=config.epsilon)]


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


def check_epsilon(config: Any, name: str) -> None:
    """Another epsilon than the one that `check_numerics` looks at is >= 0."""
    epsilon = getattr(config, name)
    check.domain(f"{config.model}.Config", epsilon >= 0, f"{name} >= 0", **{name: epsilon})


def check_transformer(config: Any) -> None:
    """A common part of the __post_init__ of models with heads, whose key_size is hidden_size / heads."""
    sizes = ("vocab_size", "segments", "embedding_size", "hidden_size", "layers", "heads", "intermediate_size")
    check_sizes(config, *sizes)
    d, heads = config.hidden_size, config.heads
    check.domain(f"{config.model}.Config", d % heads == 0, "heads that divide hidden_size", hidden_size=d, heads=heads)
    check_numerics(config)


def from_dialect(model: str, dialects: Mapping[str, Mapping[str, Any]], name: str, sizes: Mapping[str, int]) -> Any:
    """The Config of `model` with the constants that a public implementation calls its own.

    Raises: DomainError for a name that is not listed, for a constant among the sizes, and as the Config itself.
    """
    check.domain(f"{model}.dialect", name in dialects, "one of " + ", ".join(dialects), name=name)
    fixed = sorted(dialects[name].keys() & sizes.keys())
    check.domain(f"{model}.dialect", not fixed, f"sizes only, since {name} fixes the constants", given=fixed)
    return from_dict({"model": model, **dialects[name], **sizes})


def part(weights: Weights, shapes: Shapes) -> dict[str, np.ndarray]:
    """Those of the weights that `shapes` names: one mapping may hold an encoder and its heads."""
    return {name: weights[name] for name in shapes if name in weights}


def table_width(config: Any) -> int:
    """The width of the token table: embedding_size where a model has one, else hidden_size."""
    return getattr(config, "embedding_size", config.hidden_size)


def table_shapes(config: Any) -> Shapes:
    """`embedding_shapes` of the width embedding_size."""
    e = config.embedding_size
    return {"embedding.token": (config.vocab_size, e), "embedding.segment": (config.segments, e)}


def bidirectional(
    mask: Shaped[np.ndarray, "..."], segment_ids: Shaped[np.ndarray, "..."]
) -> Bool[np.ndarray, "*b _ n"]:
    """Every token sees all real tokens.

    C1. This, `causal` and `unilm` must hide padded keys (mask False), from the padded token itself too; a token that
        sees none attends to nothing.
    """
    return attention.key_mask(mask)


def causal(mask: Shaped[np.ndarray, "..."], segment_ids: Shaped[np.ndarray, "..."]) -> Bool[np.ndarray, "*b n n"]:
    """Every token sees the real tokens up to itself: a language model. A padded one does not see itself."""
    return attention.key_mask(mask) & attention.causal_mask(mask.shape[-1], mask.shape[-1])


def unilm(mask: Shaped[np.ndarray, "..."], segment_ids: Shaped[np.ndarray, "..."]) -> Bool[np.ndarray, "*b n n"]:
    """Segment 0 sees itself whole, segment 1 sees segment 0 and is causal: sequence to sequence in one stack."""
    return attention.key_mask(mask) & attention.unilm_mask(segment_ids)


VISIBLE: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "bidirectional": bidirectional,
    "causal": causal,
    "unilm": unilm,
}


def mask_from_ids_bert4keras(token_ids: Shaped[np.ndarray, "..."]) -> Bool[np.ndarray, "*b n"]:
    """The mask that bert4keras derives when it is given none: id 0 is padding, except at position 0.

    mask_bi = (token_ids_bi != 0) or i = 0

    C1. An id 0 between real tokens must be hidden; position 0 must be real whatever stands there.
    Raises: DomainError unless integers; ShapeError without a token axis.
    Differs: Hugging Face and JunnYu derive nothing from ids: without a mask every token is real.
    """
    token_ids = check.integer("encoder.mask_from_ids_bert4keras", "token_ids", token_ids)
    check.shape("encoder.mask_from_ids_bert4keras", token_ids.ndim >= 1, "token_ids (..., n)", token_ids=token_ids)
    mask = token_ids != 0
    mask[..., :1] = True
    return mask


def self_attention(
    weights: Weights, x: np.ndarray, visible: np.ndarray, positions: np.ndarray, config: Any
) -> Float[np.ndarray, "*b n d"]:
    """Softmax attention with interleaved rotary positions; biases that the weights do not hold are left out."""
    projections: list[Any] = [weights.get(f"attention.{kind}_{name}") for name in "qkvo" for kind in "wb"]
    frequencies = rope.frequencies(config.key_size, base=config.rotary_base)
    return attention.multi_head_attention(
        x, attention.per_head(visible), positions, frequencies, *projections,
        heads=config.heads, rotate=rope.rotate_interleaved, kernel=attention_kernel.softmax,
    )  # fmt: skip


def no_keys(*, batch: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> Keys:
    """The keys of a stream before its first token; key and value are the shapes behind the token axis."""
    return Keys(np.zeros((*batch, 0, *key)), np.zeros((*batch, 0, *value)), np.zeros((*batch, 0), np.bool_))


def heads_state(config: Any, batch: tuple[int, ...]) -> State:
    """The state of an encoder with heads before its first token."""
    width = config.heads, config.key_size
    return State(0, (no_keys(batch=batch, key=width, value=width),) * config.layers)


def units_state(config: Any, batch: tuple[int, ...]) -> State:
    """The state of an encoder of gated attention units before its first token."""
    keys = no_keys(batch=batch, key=(config.key_size,), value=(config.expanded_size,))
    return State(0, (keys,) * config.layers)


def checked_state(operation: str, state: State, config: Any) -> State:
    """A state with something for every layer; what a layer keeps is checked where it is read.

    Raises: DomainError for anything but a State that counts its tokens; ShapeError for another number of layers.
    """
    counted = isinstance(state, State) and isinstance(state.tokens, int) and state.tokens >= 0
    check.domain(operation, counted, "a state of initial_state or of the step before", state=state)
    fits = len(state.layers) == config.layers
    check.shape(operation, fits, f"a state of {config.layers} layers", layers=len(state.layers))
    return state


def checked_piece(
    operation: str, weights: Weights, shapes: Shapes, state: State, given: Given, config: Any
) -> tuple[dict[str, np.ndarray], State, Inputs]:
    """What a step reads; without positions they go on from the state's.

    Raises: as `checked_weights`, `checked_state` and `checked_inputs`, in that order.
    """
    weights, state = checked_weights(operation, weights, shapes), checked_state(operation, state, config)
    return weights, state, checked_inputs(operation, *given, config, first=state.tokens)


def stepped(
    weights: Weights, state: State, x: np.ndarray, layer: Callable[[Weights, np.ndarray, Any], tuple[np.ndarray, Any]]
) -> tuple[list[np.ndarray], State]:
    """`encoded` of the next tokens of a causal stream, and the state after them.

    layer: of its weights, what enters it and what it has kept, to what leaves it and what it keeps now.
    """
    states, kept = [x], []
    for index, past in enumerate(state.layers):
        x, now = layer(layer_of(weights, index), x, past)
        states.append(x)
        kept.append(now)
    return states, State(state.tokens + x.shape[-2], tuple(kept))


def grown(operation: str, past: Keys, k: np.ndarray, v: np.ndarray, mask: Bool[np.ndarray, "*b n"]) -> Keys:
    """What a layer has kept, with the keys and values of the next tokens behind it.

    Raises: ShapeError for a state of other texts or of another model; DomainError for one that is no Keys.
    """
    check.domain(operation, isinstance(past, Keys), "a state that keeps keys in every layer", received=type(past))
    held_k, held_v = check.real(operation, "k", past.k), check.real(operation, "v", past.v)
    real, lead = check.boolean(operation, "real", past.real), mask.ndim
    fits = real.ndim == lead and held_k.shape[:lead] == held_v.shape[:lead] == real.shape
    fits = fits and real.shape[:-1] == mask.shape[:-1]
    fits = fits and held_k.shape[lead:] == k.shape[lead:] and held_v.shape[lead:] == v.shape[lead:]
    expected = f"a state of the texts {mask.shape[:-1]}, keys {k.shape[lead:]} and values {v.shape[lead:]}"
    check.shape(operation, fits, expected, k=held_k, v=held_v, real=real)
    pairs = ((held_k, k), (held_v, v), (real, mask))
    return Keys(*(np.concatenate(pair, axis=lead - 1) for pair in pairs))


def seen(keys: Keys, tokens: int) -> Bool[np.ndarray, "*b n m"]:
    """Who sees whom, where the last `tokens` of the keys ask: `causal` of the whole, their rows of it."""
    return attention.key_mask(keys.real) & attention.causal_mask(tokens, keys.real.shape[-1])


def self_attention_step(
    operation: str, weights: Weights, x: np.ndarray, inputs: Inputs, past: Keys, config: Any
) -> tuple[Float[np.ndarray, "*b n d"], Keys]:
    """`self_attention` of the next tokens of a causal stream, and the keys after them."""
    q, k, v = (
        attention.project(x, weights[f"attention.w_{name}"], weights.get(f"attention.b_{name}")).reshape(
            *x.shape[:-1], config.heads, config.key_size
        )
        for name in "qkv"
    )
    turn = rope.angles(inputs.positions, rope.frequencies(config.key_size, base=config.rotary_base))[..., None, :]
    keys = grown(operation, past, rope.rotate_interleaved(k, turn), v, inputs.mask)
    o = attention.attend(
        rope.rotate_interleaved(q, turn), keys.k, keys.v, attention.per_head(seen(keys, x.shape[-2])),
        kernel=attention_kernel.softmax, scale=1 / math.sqrt(config.key_size),
    )  # fmt: skip
    return attention.project(o.reshape(x.shape), weights["attention.w_o"], weights.get("attention.b_o")), keys


def unit_step(
    operation: str, w: Weights, x: np.ndarray, inputs: Inputs, past: Keys, config: Any, *,
    rotate: Callable[[np.ndarray, np.ndarray], np.ndarray], kernel: Callable[..., np.ndarray], divisor: float,
) -> tuple[Float[np.ndarray, "*b n d"], Keys]:  # fmt: skip
    """A gated attention unit of the next tokens of a causal stream, with the biases that there are, and its keys."""
    u, v, z = gau.parts(x, w["w_in"], w.get("b_in"), key_width=config.key_size)
    turn = rope.angles(inputs.positions, rope.frequencies(config.key_size, base=config.rotary_base))
    q, k = (rotate(gau.scale_offset(z, w[f"gamma_{name}"], w.get(f"beta_{name}")), turn) for name in "qk")
    keys = grown(operation, past, k, v, inputs.mask)
    scores = np.einsum("...ns,...ms->...nm", q, keys.k) / divisor
    # A kernel that counts finds all keys that a causal row sees.
    mixed = np.einsum("...nm,...me->...ne", kernel(scores, seen(keys, x.shape[-2])), keys.v)
    return attention.project(u * mixed, w["w_out"], w.get("b_out")), keys


def feed_forward(weights: Weights, x: np.ndarray, config: Any) -> Float[np.ndarray, "*b n d"]:
    """activation(x W_in + b_in) W_out + b_out; biases that the weights do not hold are left out."""
    inner = attention.project(x, weights["feed_forward.w_in"], weights.get("feed_forward.b_in"))
    inner = ACTIVATIONS[config.activation](inner)
    return attention.project(inner, weights["feed_forward.w_out"], weights.get("feed_forward.b_out"))


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
