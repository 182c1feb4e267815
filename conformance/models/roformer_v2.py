"""Judging roformer_v2: its hidden states and the logits of its masked language model, in every mode of attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from conformance.budget import Arithmetic, affine
from conformance.generate import Draw
from conformance.models import _encoder, _streams
from conformance.models._encoder import Case, Expected, Model
from conformance.ops.norm import rms_norm
from refimpl.models import _encoder as parts
from refimpl.models import _heads
from refimpl.models import roformer_v2 as spec
from refimpl.ops import norm

HEAD = _heads.TiedLM()


# What is called: names become functions, and one mapping holds the weights of the encoder and of its head.
def hidden_states(weights: Any, *inputs: Any, config: Any, visible: str) -> list[np.ndarray]:
    """The specification's hidden states."""
    encoder = parts.part(weights, spec.shapes(config))
    return spec.hidden_states(encoder, *inputs, config=config, visible=_encoder.VISIBLE[visible])


def model(weights: Any, *inputs: Any, config: Any, visible: str) -> tuple[np.ndarray, ...]:
    """The specification's logits and hidden states."""
    states = hidden_states(weights, *inputs, config=config, visible=visible)
    head = parts.part(weights, HEAD.shapes(config))
    logits = _heads.masked_lm_tied(head, states[-1], weights["embedding.token"], config=config)
    return (logits, *states)


step = _streams.step_of(spec, HEAD, _heads.masked_lm_tied)


# Reference.
def reference(a: Arithmetic, case: Case) -> Expected:
    """The model in Balls."""
    w = {name: a.exact(array) for name, array in case.weights.items()}
    epsilon = case.config.epsilon
    x = _encoder.embed(a, case).stored()
    if "embedding.mapping.kernel" in w:
        x = affine(x, w["embedding.mapping.kernel"], None).stored()
    states = [x]
    for index in range(case.config.layers):
        held = _encoder.layer_of(a, case, index)
        middle = rms_norm(a, (x + _encoder.self_attention(a, case, x, held)).stored(), epsilon).stored()
        x = rms_norm(a, (middle + _encoder.feed_forward(a, case, middle, held)).stored(), epsilon).stored()
        states.append(x)
    if "mlm.mapping.kernel" in w:
        x = affine(x, w["mlm.mapping.kernel"], None).stored()
    return Expected(affine(x, w["embedding.token"].transpose(1, 0), None), tuple(states))


# Cases.
def cases() -> list[Case]:
    """What each case is for stands in its name; the constants differ, so that none can be built in."""

    def shapes(config: Any) -> Any:
        return {**spec.shapes(config), **HEAD.shapes(config)}

    return _encoder.encoder_cases("roformer_v2", spec.Config, shapes, activation="relu")


# Wrong models: the specification with one thing changed.
def _normed(w: Any, name: str, x: np.ndarray, config: Any, *, epsilon: float | None = None) -> Any:
    return norm.rms_norm(x, epsilon=config.epsilon if epsilon is None else epsilon)


def _centred(w: Any, name: str, x: np.ndarray, config: Any) -> Any:
    return norm.rms_norm(x - x.mean(axis=-1, keepdims=True), epsilon=config.epsilon)


def _no_norm(w: Any, name: str, x: np.ndarray, config: Any) -> Any:
    return x


def _summed(w: Any, ids: Any, segments: Any) -> np.ndarray:
    return w["embedding.token"][ids] + w["embedding.segment"][segments]


def _mapped(w: Any, x: np.ndarray) -> np.ndarray:
    return x @ w["embedding.mapping.kernel"] if "embedding.mapping.kernel" in w else x


def _embedded(w: Any, ids: Any, segments: Any, config: Any, *, normed: Callable[..., Any] = _normed) -> np.ndarray:
    return _mapped(w, normed(w, "", _summed(w, ids, segments), config))


def _mapped_first(w: Any, ids: Any, segments: Any, config: Any) -> np.ndarray:
    return _normed(w, "", _mapped(w, _summed(w, ids, segments)), config)


def _mapping_missing(w: Any, ids: Any, segments: Any, config: Any) -> np.ndarray:
    x = _normed(w, "", _summed(w, ids, segments), config)
    return np.pad(x, ((0, 0), (0, 0), (0, config.hidden_size)))[..., : config.hidden_size]


def _segment_behind(w: Any, ids: Any, segments: Any, config: Any) -> np.ndarray:
    """The token's vector alone is normalised."""
    return _mapped(w, _normed(w, "", w["embedding.token"][ids], config) + w["embedding.segment"][segments])


def _logits(
    w: Any, states: list[np.ndarray], config: Any, *, of: int = -1,
    back: Callable[[Any], np.ndarray] = lambda w: w["mlm.mapping.kernel"],
    table: Callable[[np.ndarray], np.ndarray] = lambda table: table.T,
) -> np.ndarray:  # fmt: skip
    x = states[of] @ back(w) if "mlm.mapping.kernel" in w else states[of]
    return x @ table(w["embedding.token"])


def _built(*inputs: Any, embed: Any = _embedded, layer: Any = None, logits: Any = _logits, **rest: Any) -> Any:
    layer = partial(_encoder.wrong_layer, norm=_normed) if layer is None else layer
    return _encoder.encoded(*inputs, embed=embed, layer=layer, logits=logits, **rest)


def _with(**changed: Any) -> Model:
    return partial(_built, layer=partial(_encoder.wrong_layer, **{"norm": _normed, **changed}))


def _head_with(**changed: Any) -> Model:
    return partial(_built, logits=partial(_logits, **changed))


WRONG: dict[str, Model] = {
    "layers swapped": partial(_encoder.layers_swapped, model),
    "segment ids dropped": partial(_encoder.segments_dropped, model),
    **{name: _with(**changed) for name, changed in _encoder.WRONG_LAYERS.items()},
    **{name: partial(_built, **changed) for name, changed in _encoder.WRONG_INPUTS.items()},
    "norms centred": _with(norm=_centred),
    "epsilon fixed to 1e-12": _with(norm=partial(_normed, epsilon=1e-12)),
    "epsilon of the embedding fixed to 1e-12": partial(
        _built, embed=partial(_embedded, normed=partial(_normed, epsilon=1e-12))
    ),
    "norm of the embedding missing": partial(_built, embed=partial(_embedded, normed=_no_norm)),
    "norm of the embedding centred": partial(_built, embed=partial(_embedded, normed=_centred)),
    "norm of the embedding behind its mapping": partial(_built, embed=_mapped_first),
    "zeros and a cut for the mapping of the embedding": partial(_built, embed=_mapping_missing),
    "segment added behind the norm": partial(_built, embed=_segment_behind),
    "the embedding's mapping turned over in the head": _head_with(back=lambda w: w["embedding.mapping.kernel"].T),
    "table read as (in, out)": _head_with(table=lambda table: table.reshape(table.shape[::-1])),
    "table not tied": _head_with(table=lambda table: Draw("untied").grid(*table.shape[::-1], exponent=-7)),
    "logits of the layer before the last": _head_with(of=-2),
    "probabilities for logits": partial(_encoder.probabilities, model),
}
# Their step alone is wrong.
WRONG_STREAMS = _streams.wrong_streams(
    model, step, spec.initial_state, _streams.WRONG_STATES, {**_streams.SHARED, **_streams.SHARED_KEYS}
)
