"""A whole model: an encoder and the heads that stand on its vectors, as one module to train.

    module = Model(specification);   module(token_ids, segment_ids, mask)["logits"]

A causal model also reads a text piece by piece: `initial_state` and `step`.

Specification: refimpl/model.py. The weights of the encoder are under `encoder`, those of each head under `heads` and
the head's name; the specification has them in one mapping of names that do not meet. `names` says which is which,
`flat` and `nested` translate a state. The token table is one parameter, of the encoder, whoever reads it.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from refimpl import model as specification
from refimpl.models import _heads as heads_of
from torchimpl import check
from torchimpl.models import _encoder, _heads


class Model(nn.Module):
    """The model that a refimpl.model.Model describes, with new weights from torch's generator, encoder first.

    options: what the encoder takes besides its Config: hidden_dropout, and attention_dropout where it has one.

    Every head is run by every call, so that DistributedDataParallel finds a gradient for each of its weights as long as
    the loss reads every output; else it must be told find_unused_parameters.
    """

    def __init__(self, model: specification.Model, **options: Any) -> None:
        super().__init__()
        self.specification = model
        self.encoder = encoder(model.config, **options)
        self.heads = nn.ModuleDict({heads_of.name_of(head): _head(model.config, head, options) for head in model.heads})

    def hidden_states(
        self,
        token_ids: Int[Tensor, "*b n"],
        segment_ids: Int[Tensor, "*b n"] | None = None,
        mask: Bool[Tensor, "*b n"] | None = None,
        positions: Int[Tensor, "*p n"] | None = None,
    ) -> list[Float[Tensor, "*b n d"]]:
        """The encoder's hidden states, the last of which the heads stand on.

        Raises: as hidden_states of the encoder.
        """
        # Of flash, the Config says it.
        if self.specification.config.model == "flash":
            states: list[Tensor] = self.encoder.hidden_states(token_ids, segment_ids, mask, positions)
            return states
        visible = _encoder.VISIBLE[self.specification.visible]
        states = self.encoder.hidden_states(token_ids, segment_ids, mask, positions, visible=visible)
        return states

    def forward(
        self,
        token_ids: Int[Tensor, "*b n"],
        segment_ids: Int[Tensor, "*b n"] | None = None,
        mask: Bool[Tensor, "*b n"] | None = None,
        positions: Int[Tensor, "*p n"] | None = None,
        told: Bool[Tensor, "*b n"] | None = None,
    ) -> dict[str, Tensor]:
        """Everything that the model gives, by name, in the order of refimpl.model.OUTPUTS.

        told: the tokens whose mlm_logits are wanted, which are then (k, v), one row for each in the order of the array;
            a loss over 15 % of the tokens has no use for the others, and the vocabulary is wide.
        Raises: ShapeError for ids, masks and positions whose shapes do not fit, and for ids without an axis of choices
            where the head MultipleChoice stands; DomainError for other dtypes.
        """
        if told is not None:
            fits, expected = check.boolean("model.forward", "told", told).shape == token_ids.shape, "told as token_ids"
            check.shape("model.forward", fits, expected, told=told, token_ids=token_ids)
        if self.specification.choosing:
            token_ids = check.integer("model.forward", "token_ids", token_ids)
            fits, expected = token_ids.ndim >= 2, "token_ids (..., k, n) for multiple_choice"
            check.shape("model.forward", fits, expected, token_ids=token_ids)
        states = self.hidden_states(token_ids, segment_ids, mask, positions)
        made = {"last_hidden_state": states[-1]}
        if "pooler" in self.heads:
            made["pooled"] = self.heads["pooler"](states[-1])
        for name, head in self.heads.items():
            if name != "pooler":
                made |= self._given(name, head, states, mask, positions, made.get("pooled"), told)
        return {name: made[name] for name in specification.OUTPUTS if name in made}

    def initial_state(self, *, batch: tuple[int, ...]) -> _encoder.State:
        """The state of a causal model before the first token of `batch` texts, in its dtype and on its device.

        Raises: DomainError for a model that cannot be read piece by piece (refimpl.model.check_streams).
        """
        specification.check_streams("model.initial_state", self.specification)
        state: _encoder.State = self.encoder.initial_state(batch=batch)
        return state

    def step(
        self,
        state: _encoder.State,
        token_ids: Int[Tensor, "*b n"],
        segment_ids: Int[Tensor, "*b n"] | None = None,
        mask: Bool[Tensor, "*b n"] | None = None,
        positions: Int[Tensor, "*p n"] | None = None,
    ) -> tuple[dict[str, Tensor], _encoder.State]:
        """What a causal model gives for the next n tokens, as `forward` does in the whole, and the state after them.

        Gradients go back through the state; generate under torch.no_grad(). The given state stays as it is.
        Raises: as `forward` and `initial_state`; ShapeError for a state of other texts or of another model; DomainError
            for anything but a state.
        """
        specification.check_streams("model.step", self.specification)
        states, state = self.encoder.step(state, token_ids, segment_ids, mask, positions)
        made = {"last_hidden_state": states[-1]}
        for name, head in self.heads.items():
            made |= self._given(name, head, states, mask, positions, None, None)
        return {name: made[name] for name in specification.OUTPUTS if name in made}, state

    def _given(
        self,
        name: str,
        head: Any,
        states: list[Tensor],
        mask: Tensor | None,
        positions: Tensor | None,
        pooled: Tensor | None,
        told: Tensor | None,
    ) -> dict[str, Tensor]:
        """What one head gives, by name; pooled is there for heads that read it."""
        last, one = states[-1], head.head.outputs[0]
        pooling: str = getattr(head.head, "pooling", "")
        sentence = _heads.POOLINGS[pooling](states, mask) if pooling in _heads.POOLINGS else pooled
        if name in ("transformed_lm", "tied_lm"):
            return {one: head(last if told is None else last[told], self.encoder.embedding.token)}
        if name == "multiple_choice":
            return {one: head(sentence, _heads.real_tokens(last, mask).any(dim=-1))}
        if name in ("entity_pointer", "efficient_entity_pointer", "span_pointer"):
            return {one: head(last, _heads.real_tokens(last, mask), positions)}
        if name == "sequence_classifier":
            return {"logits": head(sentence), "embedding": sentence}
        # next_sentence and sentence_embedding.
        return {one: head(sentence)}

    def weights(self) -> dict[str, Tensor]:
        """The state under the specification's names."""
        return flat(self.specification, self.state_dict())

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take the weights of these names of the specification.

        Raises: ShapeError for names that are missing or unknown; as load_state_dict for other shapes.
        """
        self.load_state_dict(nested(self.specification, weights))


def encoder(config: Any, **options: Any) -> nn.Module:
    """The module of an encoder's Config: gau_alpha.GauAlpha, roformer_v2.RoformerV2 and so on."""
    name = "".join(part.capitalize() for part in config.model.split("_"))
    made: nn.Module = getattr(importlib.import_module(f"torchimpl.models.{config.model}"), name)(config, **options)
    return made


def names(model: specification.Model) -> dict[str, str]:
    """For each weight of the specification, in its order, the name that it has in the state of the module."""
    made = {name: f"encoder.{name}" for name in specification.encoder_of(model).shapes(model.config)}
    for head in model.heads:
        made |= {name: f"heads.{heads_of.name_of(head)}.{name}" for name in head.shapes(model.config)}
    return made


def flat(model: specification.Model, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A module's state under the specification's names.

    Raises: ShapeError for names that are missing or unknown.
    """
    places = names(model)
    _check_names("model.flat", set(places.values()), set(state))
    return {name: state[place] for name, place in places.items()}


def nested(model: specification.Model, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The specification's weights under the names of a module's state.

    Raises: ShapeError for names that are missing or unknown.
    """
    places = names(model)
    _check_names("model.nested", set(places), set(weights))
    return {place: weights[name] for name, place in places.items()}


def _head(config: Any, head: Any, options: Mapping[str, Any]) -> nn.Module:
    own = {name: options[name] for name in ("hidden_dropout",) if name in options}
    # The one head that has a dropout.
    dropping = own if isinstance(head, heads_of.TiedLM) else {}
    made: nn.Module = getattr(_heads, type(head).__name__)(config, head, **dropping)
    return made


def _check_names(operation: str, due: set[str], given: set[str]) -> None:
    missing, unknown = sorted(due - given)[:3], sorted(given - due)[:3]
    expected = f"{len(due)} weights"
    check.shape(operation, not missing and not unknown, expected, missing=missing, unknown=unknown)
