"""Judging roformer: its hidden states and the logits of its masked language model, in every mode of attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from conformance.budget import Arithmetic, Ball, affine
from conformance.generate import Draw
from conformance.models import _encoder, _streams
from conformance.models._encoder import Case, Expected, Model
from conformance.ops.norm import layer_norm
from refimpl.models import _encoder as parts
from refimpl.models import _heads
from refimpl.models import roformer as spec
from refimpl.ops import norm

HEAD = _heads.TransformedLM()


# What is called: names become functions, and one mapping holds the weights of the encoder and of its head.
def hidden_states(weights: Any, *inputs: Any, config: Any, visible: str) -> list[np.ndarray]:
    """The specification's hidden states."""
    encoder = parts.part(weights, spec.shapes(config))
    return spec.hidden_states(encoder, *inputs, config=config, visible=_encoder.VISIBLE[visible])


def model(weights: Any, *inputs: Any, config: Any, visible: str) -> tuple[np.ndarray, ...]:
    """The specification's logits and hidden states."""
    states = hidden_states(weights, *inputs, config=config, visible=visible)
    head = parts.part(weights, HEAD.shapes(config))
    logits = _heads.masked_lm_transformed(head, states[-1], weights["embedding.token"], config=config)
    return (logits, *states)


step = _streams.step_of(spec, HEAD, _heads.masked_lm_transformed)


# Reference.
def reference(a: Arithmetic, case: Case) -> Expected:
    """The model in Balls."""
    w = {name: a.exact(array) for name, array in case.weights.items()}

    def normed(x: Ball, held: dict[str, Ball], name: str, epsilon: float) -> Ball:
        return layer_norm(a, x, held[f"{name}.scale"], held[f"{name}.bias"], epsilon).stored()

    epsilon = case.config.epsilon
    x = normed(_encoder.embedded(a, case), w, "embedding.norm", epsilon)
    if "embedding.mapping.kernel" in w:
        x = affine(x, w["embedding.mapping.kernel"], w["embedding.mapping.bias"]).stored()
    states = [x]
    for index in range(case.config.layers):
        held = _encoder.layer_of(a, case, index)
        attended = _encoder.self_attention(a, case, x, held)
        middle = normed((x + attended).stored(), held, "attention_norm", epsilon)
        fed = _encoder.feed_forward(a, case, middle, held)
        x = normed((middle + fed).stored(), held, "feed_forward_norm", epsilon)
        states.append(x)
    inner = affine(x, w["mlm.transform.kernel"], w["mlm.transform.bias"]).stored()
    inner = normed(_encoder.activated(a, case, inner), w, "mlm.norm", case.config.mlm_epsilon)
    return Expected(affine(inner, w["embedding.token"].transpose(1, 0), w["mlm.bias"]), tuple(states))


# Cases.
def cases() -> list[Case]:
    """What each case is for stands in its name; the constants differ, so that none can be built in."""

    def shapes(config: Any) -> Any:
        return {**spec.shapes(config), **HEAD.shapes(config)}

    return _encoder.encoder_cases("roformer", spec.Config, shapes, activation="gelu_erf", mlm_epsilon=2.0**-4)


# Wrong models: the specification with one thing changed.
def _normed(w: Any, name: str, x: np.ndarray, config: Any, *, epsilon: Callable[[Any], float] | None = None) -> Any:
    small = config.epsilon if epsilon is None else epsilon(config)
    return norm.layer_norm(x, w[f"{name}.scale"], w[f"{name}.bias"], epsilon=small)


def _not_centred(w: Any, name: str, x: np.ndarray, config: Any) -> Any:
    return norm.rms_norm_scaled(x, w[f"{name}.scale"], epsilon=config.epsilon) + w[f"{name}.bias"]


def _embedded(w: Any, ids: Any, segments: Any, config: Any, *, normed: Callable[..., Any] = _normed) -> np.ndarray:
    x = normed(w, "embedding.norm", w["embedding.token"][ids] + w["embedding.segment"][segments], config)
    if "embedding.mapping.kernel" not in w:
        return x
    return x @ w["embedding.mapping.kernel"] + w["embedding.mapping.bias"]


def _normed_apart(w: Any, ids: Any, segments: Any, config: Any) -> np.ndarray:
    """The token's vector alone is normalised."""
    inner = {**w, "embedding.segment": 0 * w["embedding.segment"]}
    mapping = w.get("embedding.mapping.kernel", np.eye(config.embedding_size))
    return _embedded(inner, ids, segments, config) + w["embedding.segment"][segments] @ mapping


def _transformed(
    w: Any, x: np.ndarray, config: Any, *, normed: Callable[..., Any] = _normed, activation: str | None = None
) -> np.ndarray:
    inner = parts.ACTIVATIONS[activation or config.activation](x @ w["mlm.transform.kernel"] + w["mlm.transform.bias"])
    return normed(w, "mlm.norm", inner, config, epsilon=lambda config: config.mlm_epsilon)


def _norm_before_activation(w: Any, x: np.ndarray, config: Any) -> np.ndarray:
    inner = _normed(
        w, "mlm.norm", x @ w["mlm.transform.kernel"] + w["mlm.transform.bias"], config,
        epsilon=lambda config: config.mlm_epsilon,
    )  # fmt: skip
    return parts.ACTIVATIONS[config.activation](inner)


def _logits(
    w: Any, states: list[np.ndarray], config: Any, *, transformed: Callable[..., Any] = _transformed,
    table: Callable[[np.ndarray], np.ndarray] = lambda table: table.T, of: int = -1,
) -> np.ndarray:  # fmt: skip
    return transformed(w, states[of], config) @ table(w["embedding.token"]) + w["mlm.bias"]


def _built(*inputs: Any, embed: Any = _embedded, layer: Any = None, logits: Any = _logits, **rest: Any) -> Any:
    layer = partial(_encoder.wrong_layer, norm=_normed) if layer is None else layer
    return _encoder.encoded(*inputs, embed=embed, layer=layer, logits=logits, **rest)


def _with(**changed: Any) -> Model:
    return partial(_built, layer=partial(_encoder.wrong_layer, **{"norm": _normed, **changed}))


def _head_with(**changed: Any) -> Model:
    return partial(_built, logits=partial(_logits, **changed))


def _no_norm(w: Any, name: str, x: np.ndarray, config: Any, **epsilon: Any) -> np.ndarray:
    return x


_WEIGHTS = (
    "embedding.norm.scale", "embedding.norm.bias", "embedding.mapping.bias", "attention.b_q", "attention.b_k",
    "attention.b_v", "attention.b_o", "attention_norm.scale", "attention_norm.bias", "feed_forward.b_in",
    "feed_forward.b_out", "feed_forward_norm.scale", "feed_forward_norm.bias", "mlm.transform.bias", "mlm.norm.scale",
    "mlm.norm.bias", "mlm.bias",
)  # fmt: skip

WRONG: dict[str, Model] = {
    "layers swapped": partial(_encoder.layers_swapped, model),
    "segment ids dropped": partial(_encoder.segments_dropped, model),
    **{name: _with(**changed) for name, changed in _encoder.WRONG_LAYERS.items()},
    **{name: partial(_built, **changed) for name, changed in _encoder.WRONG_INPUTS.items()},
    **{
        f"{name} dropped": partial(_encoder.weights_changed, model, name, 1.0 if name.endswith("scale") else 0.0)
        for name in _WEIGHTS
    },
    "norms of a layer exchanged": _with(order=_encoder.exchanged_norms),
    "norms not centred": _with(norm=_not_centred),
    "epsilon fixed to 1e-12": _with(norm=partial(_normed, epsilon=lambda config: 1e-12)),
    "the head's epsilon in the layers": _with(norm=partial(_normed, epsilon=lambda config: config.mlm_epsilon)),
    "the head's epsilon in the embedding": partial(
        _built,
        embed=partial(_embedded, normed=partial(_normed, epsilon=lambda config: config.mlm_epsilon)),
    ),
    "norm of the embedding missing": partial(_built, embed=partial(_embedded, normed=_no_norm)),
    "segment added behind the norm": partial(_built, embed=_normed_apart),
    "the layers' epsilon in the head": _head_with(
        transformed=partial(_transformed, normed=lambda w, name, x, config, epsilon: _normed(w, name, x, config))
    ),
    "norm of the head missing": _head_with(transformed=partial(_transformed, normed=_no_norm)),
    "norm of the head before its activation": _head_with(transformed=_norm_before_activation),
    "relu in the head": _head_with(transformed=partial(_transformed, activation="relu")),
    "gelu_tanh in the head": _head_with(transformed=partial(_transformed, activation="gelu_tanh")),
    "table read as (in, out)": _head_with(table=lambda table: table.reshape(table.shape[::-1])),
    "table not tied": _head_with(table=lambda table: Draw("untied").grid(*table.shape[::-1], exponent=-7)),
    "logits of the layer before the last": _head_with(of=-2),
    "probabilities for logits": partial(_encoder.probabilities, model),
}
# Their step alone is wrong.
WRONG_STREAMS = _streams.wrong_streams(
    model, step, spec.initial_state, _streams.WRONG_STATES, {**_streams.SHARED, **_streams.SHARED_KEYS}
)
