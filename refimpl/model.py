"""A whole model: an encoder, who sees whom in it, and the heads that stand on its vectors.

    model = Model(gau_alpha.dialect("bert4keras-0.11.5", **gau_alpha.SIZES["base"]), (TiedLM(),), "bidirectional")
    forward(weights, token_ids, model=model)["mlm_logits"]

A causal model also reads a text piece by piece: `initial_state` and `step`.

One mapping holds all weights: the names of the encoder's (embedding.*, layers.*, final_norm.*) and of the heads'
(mlm.*, pooler.*, classifier.*, ...) do not meet. In JSON:

    {"encoder": {"model": "gau_alpha", ...}, "visible": "bidirectional",
     "heads": [{"head": "sequence_classifier", "labels": 3, "pooling": "mean_of_tokens"}]}

Encoders are in refimpl/models, heads in refimpl/models/_heads.py, and a head's name is its class's in snake_case.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Shaped

from refimpl import check, config
from refimpl.models import _encoder, _heads
from refimpl.models._encoder import Shapes, State, Weights

Visible = Literal["bidirectional", "causal", "unilm"]
# Everything that a model may give, in the order in which it does. d is hidden_size, v the vocabulary, and the leading
# axes are those of the token ids before n; with the head MultipleChoice the last of them counts choices.
OUTPUTS = (
    # (..., n, d); defined at padded tokens too.
    "last_hidden_state",
    # (..., n, v), of TransformedLM or TiedLM; no softmax.
    "mlm_logits",
    # (..., d), of Pooler.
    "pooled",
    # (..., 2), of NextSentence.
    "next_sentence_logits",
    # (..., labels), of SequenceClassifier.
    "logits",
    # (..., d), the sentence vector of SequenceClassifier or SentenceEmbedding.
    "embedding",
    # (..., k) for ids (..., k, n), of MultipleChoice; -inf for a choice without a real token.
    "choice_logits",
    # (..., types, n, n), of EntityPointer or EfficientEntityPointer; -inf where no span can be.
    "entity_scores",
    # (..., n, n), of SpanPointer; -inf where no span can be.
    "span_scores",
)

# Heads whose output for a token is made of its vector alone.
_TOKEN_BY_TOKEN = (_heads.TransformedLM, _heads.TiedLM)


@dataclass(frozen=True)
class Model:
    """An encoder's Config, the heads on it and who sees whom, checked against each other where it is made.

    C1. Of flash `visible` must say what `mix` says: causal, or bidirectional; unilm is not defined.
    C2. No two heads may give the same output; NextSentence and the pooling "pooler" must have a Pooler beside them.
    Raises: DomainError for anything else, naming what does not go together.
    """

    config: Any
    heads: tuple[Any, ...]
    visible: Visible

    def __post_init__(self) -> None:
        name = getattr(self.config, "model", None)
        check.domain("model.Model", name in config.known(), "the Config of an encoder", config=self.config)
        choices = get_args(Visible)
        fits = type(self.visible) is str and self.visible in choices
        check.domain("model.Model", fits, f"visible one of {', '.join(choices)}", visible=self.visible)
        kinds = tuple(_heads.HEADS.values())
        fits = isinstance(self.heads, tuple) and all(type(head) in kinds for head in self.heads)
        check.domain("model.Model", fits, "a tuple of heads of refimpl.models._heads", heads=self.heads)
        _check_visible(self)
        _check_heads(self)

    @property
    def choosing(self) -> bool:
        """Whether token ids have an axis of choices before their tokens."""
        return any(isinstance(head, _heads.MultipleChoice) for head in self.heads)


def outputs(model: Model) -> tuple[str, ...]:
    """The names of what a model gives, in the order of OUTPUTS."""
    given = {"last_hidden_state"}.union(*(head.outputs for head in model.heads))
    return tuple(name for name in OUTPUTS if name in given)


def shapes(model: Model) -> Shapes:
    """The name and shape of every weight: the encoder's, then each head's. The token table is held once."""
    made = dict(encoder_of(model).shapes(model.config))
    for head in model.heads:
        made |= head.shapes(model.config)
    return made


def parameters(model: Model) -> int:
    """How many numbers the weights hold."""
    return _encoder.count(shapes(model))


def hidden_states(
    weights: Weights,
    token_ids: Shaped[np.ndarray, "..."],
    segment_ids: Shaped[np.ndarray, "..."] | None = None,
    mask: Shaped[np.ndarray, "..."] | None = None,
    positions: Shaped[np.ndarray, "..."] | None = None,
    *,
    model: Model,
) -> list[Float[np.ndarray, "*b n d"]]:
    """The encoder's hidden states, the last of which the heads stand on; `weights` may hold those of the heads too.

    Raises: as hidden_states of the encoder.
    """
    encoder = encoder_of(model)
    # Of flash, the Config says it.
    seen = {} if model.config.model == "flash" else {"visible": _encoder.VISIBLE[model.visible]}
    own = _encoder.part(weights, encoder.shapes(model.config))
    states: list[np.ndarray] = encoder.hidden_states(
        own, token_ids, segment_ids, mask, positions, config=model.config, **seen
    )
    return states


def forward(
    weights: Weights,
    token_ids: Shaped[np.ndarray, "..."],
    segment_ids: Shaped[np.ndarray, "..."] | None = None,
    mask: Shaped[np.ndarray, "..."] | None = None,
    positions: Shaped[np.ndarray, "..."] | None = None,
    *,
    model: Model,
) -> dict[str, np.ndarray]:
    """Everything that the model gives, by name, in the order of OUTPUTS.

    C1. The names must be `outputs(model)`, in that order, whatever the order of the heads.
    C2. Sentence vectors must be made of real tokens (mask True); pointers must score spans of real tokens only, at
        `positions`, as the encoder.
    C3. With MultipleChoice the token ids are (..., k, n), and a choice is there where any of its tokens is real.
    Raises: ShapeError for weights or inputs that do not fit; DomainError for ids out of range, a mask that is not
        boolean, positions that are no integers, and weights that are NaN or infinite.
    Precision: as the encoder and the heads.
    """
    weights = _encoder.checked_weights("model.forward", weights, shapes(model))
    token_ids = check.integer("model.forward", "token_ids", token_ids)
    least = 2 if model.choosing else 1
    expected = "token_ids (..., k, n) for multiple_choice" if model.choosing else "token_ids (..., n)"
    check.shape("model.forward", token_ids.ndim >= least, expected, token_ids=token_ids)
    states = hidden_states(weights, token_ids, segment_ids, mask, positions, model=model)
    real = np.ones(token_ids.shape, np.bool_) if mask is None else check.boolean("model.forward", "mask", mask)
    made: dict[str, np.ndarray] = {"last_hidden_state": states[-1]}
    # The pooler first: other heads read it.
    for head in sorted(model.heads, key=lambda head: not isinstance(head, _heads.Pooler)):
        w = _encoder.part(weights, head.shapes(model.config))
        table = weights["embedding.token"]
        made |= _given(head, w, states, real, positions, table, made.get("pooled"), model.config)
    return {name: made[name] for name in outputs(model)}


def initial_state(model: Model, *, batch: tuple[int, ...]) -> State:
    """The state of a causal model before the first token of `batch` texts; () for one text without a batch axis.

    Raises: as `check_streams`; DomainError for lengths below 0.
    """
    check_streams("model.initial_state", model)
    check.domain("model.initial_state", all(size >= 0 for size in batch), "lengths >= 0", batch=batch)
    state: State = encoder_of(model).initial_state(model.config, batch=batch)
    return state


def step(
    weights: Weights,
    state: State,
    token_ids: Shaped[np.ndarray, "..."],
    segment_ids: Shaped[np.ndarray, "..."] | None = None,
    mask: Shaped[np.ndarray, "..."] | None = None,
    positions: Shaped[np.ndarray, "..."] | None = None,
    *,
    model: Model,
) -> tuple[dict[str, np.ndarray], State]:
    """What a causal model gives for the next n tokens, and the state after them; n may be any number, 0 too.

        state = initial_state(model, batch=(1,))
        made, state = step(weights, state, token_ids[:, :5], model=model)
        made, state = step(weights, state, token_ids[:, 5:6], model=model)

    C1. However a text is split into pieces, the outputs must be those of `forward` for the same tokens of the whole.
    C2. Without positions they must go on from piece to piece, padding counted. Segments and masks are those of the
        piece; what an earlier piece hid stays hidden.
    C3. The given state must not be changed: a text may be continued in two ways.
    Raises: as `forward` and `check_streams`; ShapeError for a state of other texts or of another model; DomainError for
        anything but a state.
    Precision: as `forward`.
    Differs: a state of keys and values grows with the text; that of flash is sums and one chunk, whatever its length.
    """
    check_streams("model.step", model)
    weights = _encoder.checked_weights("model.step", weights, shapes(model))
    own = _encoder.part(weights, encoder_of(model).shapes(model.config))
    states, state = encoder_of(model).step(own, state, token_ids, segment_ids, mask, positions, config=model.config)
    made: dict[str, np.ndarray] = {"last_hidden_state": states[-1]}
    real = np.ones(states[-1].shape[:-1], np.bool_)
    for head in model.heads:
        w = _encoder.part(weights, head.shapes(model.config))
        made |= _given(head, w, states, real, positions, weights["embedding.token"], None, model.config)
    return {name: made[name] for name in outputs(model)}, state


def check_streams(operation: str, model: Model) -> None:
    """Whether a model can be read piece by piece.

    Raises: DomainError for a model that is not causal, for an encoder without a step, and for heads that read the whole
        text: poolings, choices, pointers.
    """
    causal = model.visible == "causal"
    check.domain(operation, causal, "visible causal, since no token may read a later one", visible=model.visible)
    name = model.config.model
    check.domain(operation, hasattr(encoder_of(model), "step"), "an encoder with a step", model=name)
    whole = [_heads.name_of(head) for head in model.heads if not isinstance(head, _TOKEN_BY_TOKEN)]
    expected = "heads that read one token each, transformed_lm or tied_lm; these read the whole text"
    check.domain(operation, not whole, expected, heads=whole)


def to_dict(model: Model) -> dict[str, Any]:
    """What `from_dict` makes the same model of."""
    heads = [{"head": _heads.name_of(head), **dataclasses.asdict(head)} for head in model.heads]
    return {"encoder": config.to_dict(model.config), "visible": model.visible, "heads": heads}


def from_dict(given: Mapping[str, Any]) -> Model:
    """The model of a JSON object with the keys encoder, visible and heads.

    Raises: DomainError for an unknown or missing key on any level, an unknown encoder or head, and as Model.
    """
    check.domain("model", isinstance(given, Mapping), "a JSON object", received=given)
    keys = ("encoder", "visible", "heads")
    config.check_keys("model", given, known=keys, required=keys)
    heads = given["heads"]
    check.domain("model", isinstance(heads, (list, tuple)), '"heads" to be a list', heads=heads)
    return Model(config.from_dict(given["encoder"]), tuple(map(_head, heads)), given["visible"])


def read(file: str | Path) -> Model:
    """The model in a JSON file.

    Raises: as `from_dict`; DomainError for a file that is no JSON and for a key that stands twice.
    """
    return from_dict(config.read_json(file))


def write(model: Model, file: str | Path) -> None:
    """Write the JSON file that `read` reads."""
    config.write_json(to_dict(model), file)


def encoder_of(model: Model) -> Any:
    """The module of refimpl/models that a model's encoder is from."""
    return importlib.import_module(f"refimpl.models.{model.config.model}")


def _head(given: Any) -> Any:
    check.domain("model", isinstance(given, Mapping), "every head to be a JSON object", received=given)
    name = given.get("head")
    if not isinstance(name, str) or name not in _heads.HEADS:
        known = ", ".join(_heads.HEADS)
        raise check.DomainError(f'model: expected "head" to be one of {known}, received {name!r}')
    return config.made(f"heads.{name}", _heads.HEADS[name], "head", given)


def _check_visible(model: Model) -> None:
    held, visible = model.config, model.visible
    if held.model == "flash":
        check.domain("model.Model", visible == held.mix, f"visible {held.mix}, as mix of flash", visible=visible)
    if visible == "unilm":
        check.domain("model.Model", held.segments <= 2, "at most 2 segments for unilm", segments=held.segments)


def _check_heads(model: Model) -> None:
    names = [_heads.name_of(head) for head in model.heads]
    for output in OUTPUTS:
        twice = [name for name, head in zip(names, model.heads, strict=True) if output in head.outputs]
        check.domain("model.Model", len(twice) <= 1, f"one head at most that gives {output}", heads=twice)
    pooler = "pooler" in names
    for name, head in zip(names, model.heads, strict=True):
        needs = isinstance(head, _heads.NextSentence) or getattr(head, "pooling", "") == "pooler"
        check.domain("model.Model", pooler or not needs, f"a pooler, which {name} reads", heads=names)
    constants = ("activation", "mlm_epsilon")
    lacking = [name for name in constants if not hasattr(model.config, name)]
    fits = "transformed_lm" not in names or not lacking
    expected = f"an encoder with {' and '.join(constants)} for transformed_lm"
    check.domain("model.Model", fits, expected, model=model.config.model)


def _given(
    head: Any,
    weights: Weights,
    states: list[np.ndarray],
    mask: np.ndarray,
    positions: np.ndarray | None,
    table: np.ndarray,
    pooled: np.ndarray | None,
    config: Any,
) -> dict[str, np.ndarray]:
    """What one head gives, by name; pooled is there for heads that read it."""
    last, one = states[-1], head.outputs[0]
    pooling: str = getattr(head, "pooling", "")
    sentence: Any = pooled
    if pooling in _heads.POOLINGS:
        sentence = _heads.POOLINGS[pooling](states, mask)
    match head:
        case _heads.TransformedLM():
            return {one: _heads.masked_lm_transformed(weights, last, table, config=config)}
        case _heads.TiedLM():
            return {one: _heads.masked_lm_tied(weights, last, table, config=config)}
        case _heads.Pooler():
            pool = _heads.pooler_tanh if head.activation == "tanh" else _heads.pooler_linear
            return {one: pool(weights, last, config=config)}
        case _heads.NextSentence():
            return {one: _heads.next_sentence(weights, sentence, config=config)}
        case _heads.SequenceClassifier():
            logits = _heads.sequence_classifier(weights, sentence, head=head, config=config)
            return {"logits": logits, "embedding": sentence}
        case _heads.SentenceEmbedding():
            return {one: sentence}
        case _heads.MultipleChoice():
            return {one: _heads.multiple_choice(weights, sentence, np.asarray(mask.any(axis=-1)), config=config)}
        case _heads.EntityPointer():
            return {one: _heads.entity_pointer(weights, last, mask, positions, head=head, config=config)}
        case _heads.EfficientEntityPointer():
            return {one: _heads.entity_pointer_efficient(weights, last, mask, positions, head=head, config=config)}
        case _heads.SpanPointer():
            return {one: _heads.span_pointer(weights, last, mask, positions, head=head, config=config)}
    raise check.DomainError(f"model.forward: expected a head of refimpl.models._heads, received {head!r}")
