"""What the models share around their layers: checked inputs, the embedding, who sees whom, the initialiser.

Kernels and embeddings start as a normal law of standard deviation σ cut at ±2σ, with σ chosen so that what is left has
the deviation gain / √f; f is the fan-in of a kernel and the width of an embedding, gain = layers^(-1/order), order the
number of matrices multiplied along a residual branch.

Source: bert4keras (initializer); https://kexue.fm/archives/8978.
Differs: bert4keras reads f off the shape, and takes the wrong axis where hidden_size is below 10 or above 10000, or a
vocabulary between; torch's trunc_normal_ cuts at ±2 unless told otherwise, which at σ = 0.02 is no cut at all.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from refimpl.models import _encoder as specification
from torchimpl import check
from torchimpl.dropout import Dropout
from torchimpl.ops import activation, attention, attention_kernel, gau, norm, rope

# Gate, value and output: the matrices whose product a gated attention unit adds to its input.
GAU_ORDER = 3
# Value and output, or the two matrices of a feed-forward.
TRANSFORMER_ORDER = 2
ORDERS = {
    "roformer_v2": TRANSFORMER_ORDER, "gau_alpha": GAU_ORDER, "flash": GAU_ORDER, "flash_quad": GAU_ORDER,
}  # fmt: skip
# Sigma of BERT's initialiser, before the cut: what is left has the deviation 0.0176.
BERT_SIGMA = 0.02
# The standard deviation of a unit normal law cut at ±2, 0.8796.
CUT_DEVIATION = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_erf": activation.gelu_erf,
    "gelu_tanh": activation.gelu_tanh,
    "relu": activation.relu,
    "silu": activation.silu,
}
# Of flash and flash_quad, which divide by a length elsewhere.
KERNELS: dict[str, Callable[..., Tensor]] = {
    "squared_relu": partial(attention_kernel.squared_relu_constant, length=1),
    "laplace": attention_kernel.laplace,
}
ROTATIONS = {"interleaved": rope.rotate_interleaved, "half_split": rope.rotate_half_split}


class Inputs(NamedTuple):
    """Token and segment ids, which tokens are real (None where all are), and where they stand."""

    token_ids: Int[Tensor, "*b n"]
    segment_ids: Int[Tensor, "*b n"]
    mask: Bool[Tensor, "*b n"] | None
    positions: Int[Tensor, "*p n"]


# Token ids, segment ids, mask and positions as a model takes them.
Given = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


class Keys(NamedTuple):
    """What a layer that attends keeps of a stream: rotated keys, values, and which of their m tokens are real.

    Keys are (..., m, s), or (..., m, h, s) where there are heads, and values alike.
    """

    k: Float[Tensor, "..."]
    v: Float[Tensor, "..."]
    real: Bool[Tensor, "*b m"]


class State(NamedTuple):
    """A causal stream of an encoder: how many tokens were read, and what every layer keeps of them."""

    tokens: int
    layers: tuple[Any, ...]


def bidirectional(
    mask: Bool[Tensor, "*b n"] | None, segment_ids: Int[Tensor, "*b n"]
) -> Bool[Tensor, "*_b _n n"] | None:
    """Every token sees all real tokens; None where there is nothing to hide."""
    return None if mask is None else attention.key_mask(mask)


def causal(mask: Bool[Tensor, "*b n"] | None, segment_ids: Int[Tensor, "*b n"]) -> Bool[Tensor, "*_b n n"]:
    """Every token sees the real tokens up to itself: a language model. A padded one does not see itself."""
    order = torch.arange(segment_ids.shape[-1], device=segment_ids.device)
    # The batch axes are there, of length 1: one mask for all texts.
    past = (order <= order[:, None])[(None,) * (segment_ids.ndim - 1)]
    return past if mask is None else attention.key_mask(mask) & past


def unilm(mask: Bool[Tensor, "*b n"] | None, segment_ids: Int[Tensor, "*b n"]) -> Bool[Tensor, "*b n n"]:
    """Segment 0 sees itself whole, segment 1 sees segment 0 and is causal: sequence to sequence in one stack."""
    seen = attention.unilm_mask(segment_ids)
    return seen if mask is None else attention.key_mask(mask) & seen


VISIBLE: dict[str, Callable[..., Tensor | None]] = {
    "bidirectional": bidirectional,
    "causal": causal,
    "unilm": unilm,
}


class Embedding(nn.Module):
    """The normalised sum of a token's vector and its segment's; dropout acts on the sum."""

    def __init__(self, config: Any, dropout: float) -> None:
        super().__init__()
        add_parameters(self, specification.embedding_shapes(config), "embedding.")
        self.dropout = Dropout(dropout)
        self.epsilon = config.epsilon

    def forward(self, inputs: Inputs) -> Float[Tensor, "*b n d"]:
        vectors = functional.embedding(inputs.token_ids, self.token)
        vectors = vectors + functional.embedding(inputs.segment_ids, self.segment)
        return norm.rms_norm(self.dropout(vectors), epsilon=self.epsilon)

    def reset_parameters(self, gain: float) -> None:
        for table in (self.token, self.segment):
            truncated_normal(table, gain / math.sqrt(table.shape[1]))


class LayerNorm(nn.Module):
    """A layer norm with a scale and a bias per feature."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        add_parameters(self, {"scale": (width,), "bias": (width,)})
        self.epsilon = epsilon

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return norm.layer_norm(x, self.scale, self.bias, epsilon=self.epsilon)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.bias)


class Mapping(nn.Module):
    """A dense layer from the width of the embedding to that of the layers; it may have no bias."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        add_parameters(self, below(shapes, "embedding.mapping."))

    def forward(self, x: Float[Tensor, "*b e"]) -> Float[Tensor, "*b d"]:
        return attention.project(x, self.kernel, getattr(self, "bias", None))


class SelfAttention(nn.Module):
    """Softmax attention with interleaved rotary positions, of those weights of a layer that begin with `attention.`.

    Where weights are dropped out they must be formed, (..., h, n, n) numbers; everywhere else attention is fused.
    """

    def __init__(self, config: Any, shapes: dict[str, tuple[int, ...]], dropout: float) -> None:
        super().__init__()
        add_parameters(self, below(shapes, "attention."))
        self.dropout = Dropout(dropout)
        self.heads = config.heads

    def forward(
        self,
        x: Float[Tensor, "*b n d"],
        visible: Bool[Tensor, "*_b 1 _n n"] | None,
        positions: Int[Tensor, "*p n"],
        frequencies: Float[Tensor, " r"],
    ) -> Float[Tensor, "*b n d"]:
        projections = [getattr(self, f"{kind}_{name}", None) for name in "qkvo" for kind in "wb"]
        dropping = self.training and self.dropout.p > 0
        return attention.multi_head_attention(
            x, visible, positions, frequencies, *projections,
            heads=self.heads, rotate=rope.rotate_interleaved,
            kernel=self._kernel if dropping else attention_kernel.softmax,
        )  # fmt: skip

    def no_keys(self, batch: tuple[int, ...]) -> Keys:
        """What is kept of a stream before its first token."""
        width = self.heads, self.w_k.shape[1] // self.heads
        return no_keys(self.w_k, batch, width, width)

    def step(
        self,
        x: Float[Tensor, "*b n d"],
        mask: Bool[Tensor, "*b n"],
        positions: Int[Tensor, "*p n"],
        frequencies: Float[Tensor, " r"],
        past: Keys,
    ) -> tuple[Float[Tensor, "*b n d"], Keys]:
        """What the attention gives for the next tokens of a causal stream, and the keys after them."""
        q, k, v = (
            attention.project(x, getattr(self, f"w_{name}"), getattr(self, f"b_{name}", None)).unflatten(
                -1, (self.heads, -1)
            )
            for name in "qkv"
        )
        turn = rope.angles(positions, frequencies)[..., None, :]
        keys = grown("attention.step", past, rope.rotate_interleaved(k, turn), v, mask)
        dropping = self.training and self.dropout.p > 0
        o = attention.attend(
            rope.rotate_interleaved(q, turn), keys.k, keys.v, attention.per_head(seen(keys, x.shape[-2])),
            kernel=self._kernel if dropping else attention_kernel.softmax, scale=1 / math.sqrt(q.shape[-1]),
        )  # fmt: skip
        return attention.project(o.flatten(-2), self.w_o, getattr(self, "b_o", None)), keys

    def _kernel(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return self.dropout(attention_kernel.softmax(scores, mask))


class FeedForward(nn.Module):
    """Two dense layers around an activation, of those weights of a layer that begin with `feed_forward.`."""

    def __init__(self, config: Any, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        add_parameters(self, below(shapes, "feed_forward."))
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        inner = self.activation(attention.project(x, self.w_in, getattr(self, "b_in", None)))
        return attention.project(inner, self.w_out, getattr(self, "b_out", None))


class Transformer(nn.Module):
    """An encoder of an embedding and layers that attend; called as a module it gives the last of its hidden states."""

    def __init__(self, config: Any, embedding: nn.Module, layers: list[nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.embedding = embedding
        self.layers = nn.ModuleList(layers)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New weights from torch's generator: kernels and tables as in `kernel_law`, norms the identity, biases 0."""
        reset(self, kernel_law(self.config))

    def seen(self, keys: Bool[Tensor, "*_b _n n"]) -> Bool[Tensor, "..."]:
        """The mask as a layer takes it: the same for every head."""
        return attention.per_head(keys)

    def hidden_states(
        self,
        token_ids: Int[Tensor, "*b n"],
        segment_ids: Int[Tensor, "*b n"] | None = None,
        mask: Bool[Tensor, "*b n"] | None = None,
        positions: Int[Tensor, "*p n"] | None = None,
        *,
        visible: Callable[..., Tensor | None] = bidirectional,
    ) -> list[Float[Tensor, "*b n d"]]:
        """The embedding, then the output of every layer: x_0 ... x_L.

        `visible` is one of bidirectional, causal and unilm of this file, or a function of their signature.
        Raises: ShapeError for ids and masks that are not of one shape and positions that are neither (n,) nor of that
            shape; DomainError for other dtypes.
        """

        def keys(inputs: Inputs) -> Tensor | None:
            made = visible(inputs.mask, inputs.segment_ids)
            return None if made is None else self.seen(made)

        return encoded(self, (token_ids, segment_ids, mask, positions), keys)

    def forward(
        self,
        token_ids: Int[Tensor, "*b n"],
        segment_ids: Int[Tensor, "*b n"] | None = None,
        mask: Bool[Tensor, "*b n"] | None = None,
        positions: Int[Tensor, "*p n"] | None = None,
        *,
        visible: Callable[..., Tensor | None] = bidirectional,
    ) -> Float[Tensor, "*b n d"]:
        """The output of the last layer.

        Raises: as `hidden_states`.
        """
        return self.hidden_states(token_ids, segment_ids, mask, positions, visible=visible)[-1]

    def initial_state(self, *, batch: tuple[int, ...]) -> State:
        """The state before the first token of `batch` texts: no layer has a key."""
        return State(0, tuple(layer.no_keys(batch) for layer in self.layers))

    def step(
        self,
        state: State,
        token_ids: Int[Tensor, "*b n"],
        segment_ids: Int[Tensor, "*b n"] | None = None,
        mask: Bool[Tensor, "*b n"] | None = None,
        positions: Int[Tensor, "*p n"] | None = None,
    ) -> tuple[list[Float[Tensor, "*b n d"]], State]:
        """The hidden states of the next n tokens of a causal stream, and the state after them.

        Raises: as `hidden_states`; ShapeError for a state of other texts or of another Config; DomainError for anything
            but a state.
        """
        return stepped(self, state, (token_ids, segment_ids, mask, positions))


def add_parameters(module: nn.Module, shapes: dict[str, tuple[int, ...]], prefix: str = "") -> None:
    """One parameter per name, without its prefix; numbers are left to reset_parameters."""
    for name, shape in shapes.items():
        module.register_parameter(name.removeprefix(prefix), nn.Parameter(torch.empty(shape)))


def checked_inputs(
    operation: str,
    token_ids: Tensor,
    segment_ids: Tensor | None,
    mask: Tensor | None,
    positions: Tensor | None,
    *,
    first: int = 0,
) -> Inputs:
    """Integers and a boolean mask of one shape; whether ids are within their tables is not looked at.

    Without positions a token is at its place in the array, counted from `first`.
    Raises: ShapeError unless all are of one shape (..., n), which for positions may be (n,); DomainError for other
        dtypes.
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
    if positions is None:
        places = torch.arange(first, first + token_ids.shape[-1], device=token_ids.device)
        return Inputs(token_ids, segment_ids, mask, places)
    positions = check.integer(operation, "positions", positions)
    fits = positions.shape == token_ids.shape or positions.shape == token_ids.shape[-1:]
    check.shape(operation, fits, "positions (n,) or (..., n)", positions=positions, token_ids=token_ids)
    return Inputs(token_ids, segment_ids, mask, positions)


def frequencies_of(config: Any, device: torch.device) -> Float[Tensor, " r"]:
    """The frequencies of the rotation."""
    # An angle at position 1 is the frequency itself, in the widest format that the device has.
    one = torch.ones((), dtype=torch.int64, device=device)
    return rope.angles(one, rope.frequencies(config.key_size, base=config.rotary_base))


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


def mask_from_ids_bert4keras(token_ids: Int[Tensor, "*b n"]) -> Bool[Tensor, "*b n"]:
    """The mask that bert4keras derives when it is given none: id 0 is padding, except at position 0.

    Raises: DomainError unless integers; ShapeError without a token axis.
    """
    token_ids = check.integer("encoder.mask_from_ids_bert4keras", "token_ids", token_ids)
    check.shape("encoder.mask_from_ids_bert4keras", token_ids.ndim >= 1, "token_ids (..., n)", token_ids=token_ids)
    return (token_ids != 0) | (torch.arange(token_ids.shape[-1], device=token_ids.device) == 0)


def checked_state(operation: str, state: State, config: Any) -> State:
    """A state with something for every layer; what a layer keeps is checked where it is read.

    Raises: DomainError for anything but a State that counts its tokens; ShapeError for another number of layers.
    """
    counted = isinstance(state, State) and isinstance(state.tokens, int) and state.tokens >= 0
    check.domain(operation, counted, "a state of initial_state or of the step before", state=type(state))
    fits = len(state.layers) == config.layers
    check.shape(operation, fits, f"a state of {config.layers} layers", layers=len(state.layers))
    return state


def encoded(encoder: nn.Module, given: Given, keys: Callable[[Inputs], Tensor | None]) -> list[Tensor]:
    """The embedding, then the output of every layer; keys: of checked inputs, to the mask that a layer takes.

    Raises: as `checked_inputs`.
    """
    inputs = checked_inputs(f"{encoder.config.model}.hidden_states", *given)
    frequencies = frequencies_of(encoder.config, inputs.token_ids.device)
    seen, states = keys(inputs), [encoder.embedding(inputs)]
    for layer in encoder.layers:
        states.append(layer(states[-1], seen, inputs.positions, frequencies))
    return states


def stepped(encoder: nn.Module, state: State, given: Given) -> tuple[list[Tensor], State]:
    """`encoded` of the next tokens of a causal stream, and the state after them.

    Raises: as `checked_state` and `checked_inputs`, in that order.
    """
    operation = f"{encoder.config.model}.step"
    state = checked_state(operation, state, encoder.config)
    inputs = checked_inputs(operation, *given, first=state.tokens)
    frequencies = frequencies_of(encoder.config, inputs.token_ids.device)
    mask = torch.ones_like(inputs.token_ids, dtype=torch.bool) if inputs.mask is None else inputs.mask
    states, kept = [encoder.embedding(inputs)], []
    for layer, past in zip(encoder.layers, state.layers, strict=True):
        x, now = layer.step(states[-1], mask, inputs.positions, frequencies, past)
        states.append(x)
        kept.append(now)
    return states, State(state.tokens + inputs.token_ids.shape[-1], tuple(kept))


def closed(encoder: nn.Module, states: list[Tensor]) -> list[Tensor]:
    """The states with the last one normalised."""
    return [*states[:-1], encoder.final_norm(states[-1])]


def unit_step(
    operation: str, layer: nn.Module, x: Tensor, mask: Tensor, positions: Tensor, frequencies: Tensor, past: Keys, *,
    rotate: Callable[[Tensor, Tensor], Tensor], kernel: Callable[..., Tensor], scale: float,
) -> tuple[Tensor, Keys]:  # fmt: skip
    """A gated attention unit of the next tokens of a causal stream, with the biases that there are, and its keys."""
    u, v, z = gau.parts(x, layer.w_in, getattr(layer, "b_in", None), key_width=layer.gamma_q.shape[0])
    turn = rope.angles(positions, frequencies)
    pairs = ((getattr(layer, f"gamma_{name}"), getattr(layer, f"beta_{name}", None)) for name in "qk")
    q, k = (rotate(gau.scale_offset(z, *pair), turn) for pair in pairs)
    keys = grown(operation, past, k, v, mask)
    # One head, whose values are wider than its keys. A kernel that counts finds all keys that a causal row sees.
    mixed = attention.attend(
        q[..., None, :], keys.k[..., None, :], keys.v[..., None, :],
        attention.per_head(seen(keys, x.shape[-2])), kernel=kernel, scale=scale,
    )[..., 0, :]  # fmt: skip
    return attention.project(u * mixed, layer.w_out, getattr(layer, "b_out", None)), keys


def reset_units(encoder: nn.Module) -> None:
    """New weights of the embedding and of every layer, which scale their kernels alike."""
    for part in (encoder.embedding, *encoder.layers):
        part.reset_parameters(gain(encoder.config.layers, GAU_ORDER))


def no_keys(like: Tensor, batch: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> Keys:
    """The keys of a stream before its first token, in the dtype and on the device of `like`."""
    k, v = (like.new_zeros((*batch, 0, *shape)) for shape in (key, value))
    return Keys(k, v, torch.zeros((*batch, 0), dtype=torch.bool, device=like.device))


def grown(operation: str, past: Keys, k: Tensor, v: Tensor, mask: Bool[Tensor, "*b n"]) -> Keys:
    """What a layer has kept, with the keys and values of the next tokens behind it, in their dtype.

    Raises: ShapeError for a state of other texts or of another model; DomainError for one that is no Keys.
    """
    check.domain(operation, isinstance(past, Keys), "a state that keeps keys in every layer", received=type(past))
    lead, real = mask.ndim, check.boolean(operation, "real", past.real)
    fits = real.ndim == lead and past.k.shape[:lead] == past.v.shape[:lead] == real.shape
    fits = fits and real.shape[:-1] == mask.shape[:-1]
    fits = fits and past.k.shape[lead:] == k.shape[lead:] and past.v.shape[lead:] == v.shape[lead:]
    expected = "a state of the same texts, keys and values"
    check.shape(operation, fits, expected, held_k=past.k, held_v=past.v, real=real, k=k, v=v, mask=mask)
    pairs = ((past.k.to(k), k), (past.v.to(v), v), (real.to(mask.device), mask))
    return Keys(*(torch.cat(pair, dim=lead - 1) for pair in pairs))


def seen(keys: Keys, tokens: int) -> Bool[Tensor, "*b n m"]:
    """Who sees whom, where the last `tokens` of the keys ask: `causal` of the whole, their rows of it."""
    order = torch.arange(keys.real.shape[-1], device=keys.real.device)
    return attention.key_mask(keys.real) & (order <= order[order.shape[0] - tokens :, None])


def below(shapes: dict[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    """The shapes whose names begin with `prefix`, by what follows it."""
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def add_nested(module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    """One parameter per name, inside a module of its own for every dot."""
    for name, shape in shapes.items():
        *folders, own = name.split(".")
        place = module
        for folder in folders:
            if folder not in dict(place.named_children()):
                place.add_module(folder, nn.Module())
            place = place.get_submodule(folder)
        add_parameters(place, {own: shape})


def kernel_law(config: Any) -> Callable[[Tensor], None]:
    """How the kernels (in, out) of a model and of its heads start; `config` is that of an encoder.

    RoFormer starts as BERT: a normal law of sigma 0.02 cut at two sigma, whatever the shape.
    Raises: DomainError for a model that has no law.
    Source: arXiv:1810.04805 (initializer_range, truncated_normal_initializer); bert4keras, Transformer.initializer and
        RoFormerV2.initializer.
    Differs: Hugging Face does not cut; BERT_SIGMA is its deviation.
    """
    if config.model == "roformer":
        return partial(truncated_normal, deviation=BERT_SIGMA * CUT_DEVIATION)
    check.domain("encoder.kernel_law", config.model in ORDERS, "a model with an initialiser", model=config.model)
    return partial(reset_kernel, gain=gain(config.layers, ORDERS[config.model]))


@torch.no_grad()
def reset(module: nn.Module, law: Callable[[Tensor], None]) -> None:
    """New numbers from torch's generator, by name and shape: kernels and tables by `law`, scales 1, biases 0."""
    for name, parameter in module.named_parameters():
        own = name.rpartition(".")[2]
        if own in ("token", "segment"):
            # A table is the kernel of the tied head, lying on its side: its fan-in is its width.
            law(parameter.T)
        elif parameter.ndim == 2:
            law(parameter)
        elif own == "scale":
            nn.init.ones_(parameter)
        else:
            nn.init.zeros_(parameter)
