"""Judging flash_quad: its hidden states and tied logits, in every mode of attention and by every convention."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from conformance.budget import Arithmetic, Ball, affine, einsum
from conformance.generate import Draw
from conformance.models import _encoder, _streams
from conformance.models._encoder import Case, Expected, Model
from conformance.ops import gau as judged
from conformance.ops.attention_kernel import REFERENCES
from conformance.ops.norm import layer_norm
from conformance.ops.rope import rotate
from refimpl.models import _heads
from refimpl.models import flash_quad as spec
from refimpl.ops import attention_kernel, gau, norm, rope

HEAD = _heads.TiedLM()
# The kernels as REFERENCES names them.
KERNELS = {"squared_relu": "squared_relu_1", "laplace": "laplace"}


def blind_to_padding(case: Case) -> bool:
    """Whether padding around the rows must change nothing: the length of the array counts it."""
    return bool(case.config.divisor != "array")


def laws(case: Case) -> list[Callable[..., None]]:
    """The laws that hold for a case: the length of the array tells of padding and of what is still to come."""
    counted = () if blind_to_padding(case) else (_encoder.padding, _encoder.prefix)
    return [law for law in _encoder.LAWS if law not in counted]


# What is called: names become functions.
def hidden_states(weights: Any, *inputs: Any, config: Any, visible: str) -> list[np.ndarray]:
    """The specification's hidden states."""
    return spec.hidden_states(weights, *inputs, config=config, visible=_encoder.VISIBLE[visible])


def model(weights: Any, *inputs: Any, config: Any, visible: str) -> tuple[np.ndarray, ...]:
    """The specification's logits and hidden states; the head has no weights of its own."""
    states = hidden_states(weights, *inputs, config=config, visible=visible)
    return (_heads.masked_lm_tied({}, states[-1], weights["embedding.token"], config=config), *states)


step = _streams.step_of(spec, HEAD, _heads.masked_lm_tied)


# Reference.
def reference(a: Arithmetic, case: Case) -> Expected:
    """The model in Balls."""
    config = case.config
    states = [_encoder.embed(a, case).stored()]
    for index in range(config.layers):
        w = _encoder.layer_of(a, case, index)
        x = layer_norm(a, states[-1], w["norm_scale"], w["norm_bias"], config.epsilon).stored()
        states.append((states[-1] + _unit(a, case, x, w).stored()).stored())
    scale, bias = (a.exact(case.weights[f"final_norm.{name}"]) for name in ("scale", "bias"))
    states[-1] = layer_norm(a, states[-1], scale, bias, config.epsilon).stored()
    table = a.exact(case.weights["embedding.token"])
    return Expected(affine(states[-1], table.transpose(1, 0), None), tuple(states))


def _unit(a: Arithmetic, case: Case, x: Ball, w: dict[str, Ball]) -> Ball:
    config, n = case.config, case.token_ids.shape[1]
    u, v, z = (part.stored() for part in judged.parts(a, x, w["w_in"], w["b_in"], config.key_size))
    q, k = (
        rotate(
            a, judged.scale_offset(a, z, w[f"gamma_{name}"], w[f"beta_{name}"]).stored(), np.asarray(case.places),
            config.rotary_base, layout=config.rotation,
        ).stored()
        for name in "qk"
    )  # fmt: skip
    seen = case.keys.sum(axis=-1, keepdims=True)
    counts: dict[str, Any] = {"array": float(n), "constant": float(config.length), "visible": np.maximum(seen, 1.0)}
    # The divisor may be folded into q or k.
    scores = (einsum("bns,bms->bnm", q, k, length=config.key_size + 4) / a.exact(counts[config.divisor])).stored()
    weights = REFERENCES[KERNELS[config.kernel]](a, scores, case.keys).stored()
    gated = (u * einsum("bnm,bme->bne", weights, v).stored()).stored()
    return affine(gated, w["w_out"], w["b_out"])


# Cases.
def cases() -> list[Case]:
    """Every convention stands in some case; the constants differ, so that none can be built in."""
    made = []
    paper = {"divisor": "array", "rotation": "half_split"}
    constant = {"divisor": "constant", "length": 3}
    for name, mask, segments, changes, inputs in (
        ("one layer", None, True, {"layers": 1, "key_size": 36}, {}),
        ("padded", _encoder.MASK, True, {"layers": 3}, {}),
        ("rows without tokens", _encoder.MASK_NONE, True, {"kernel": "laplace", "rotation": "half_split"}, {}),
        ("no segment ids", _encoder.MASK, False, {}, {}),
        ("paper", None, True, paper, {}),
        ("array, padded", _encoder.MASK, True, paper, {}),
        ("array, causal", _encoder.MASK, True, {**paper, "kernel": "laplace"}, {"visible": "causal"}),
        ("constant", _encoder.MASK, True, constant, {}),
        (
            "constant, causal", _encoder.MASK, True, {**constant, "kernel": "laplace", "rotation": "half_split"},
            {"visible": "causal"},
        ),
        ("causal", _encoder.MASK, True, {}, {"visible": "causal"}),
        ("unilm", _encoder.MASK, True, {"segments": 2}, {"visible": "unilm", "segment_ids": _encoder.CONTIGUOUS}),
        ("unilm, segments in turn", None, True, {"segments": 2}, {"visible": "unilm"}),
        ("positions", _encoder.MASK, True, {}, {"positions": 3 * np.arange(11)[::-1] + 100}),
        (
            "positions of every row", _encoder.MASK, True, {},
            {"positions": Draw("positions").integers((4, 11), 0, 50)},
        ),
        ("large epsilon", _encoder.MASK, True, {"epsilon": 0.25, "rotary_base": 10.0}, {"visible": "causal"}),
    ):  # fmt: skip
        sizes: dict[str, Any] = {"vocab_size": 29, "hidden_size": 5, "layers": 2, "expanded_size": 7, "key_size": 4}
        conventions: dict[str, Any] = {"kernel": "squared_relu", "divisor": "visible", "length": 0}
        constants = {"rotation": "interleaved", "segments": 3, "rotary_base": 10000.0, "epsilon": 2.0**-20}
        config = spec.Config(**{**sizes, **conventions, **constants, **changes})
        draw = Draw(f"flash_quad/{name}")
        weights = _encoder.weights_of(draw, spec.shapes(config), _step)
        given = {**_encoder.batch(draw, config, mask, segments=segments), **inputs}
        made.append(Case(name, config, weights, **given))
    return made


def _step(name: str) -> int:
    """Divided scores are squared: queries and keys are large, so that much is attended to."""
    return -6 if "gamma" in name or "beta" in name else -7


# Wrong models: the specification with one thing changed.
def _embedded(w: Any, ids: Any, segments: Any, config: Any) -> np.ndarray:
    return norm.rms_norm(w["embedding.token"][ids] + w["embedding.segment"][segments], epsilon=config.epsilon)


def _not_normed(w: Any, ids: Any, segments: Any, config: Any) -> np.ndarray:
    return w["embedding.token"][ids] + w["embedding.segment"][segments]


def _pre_norm(x: np.ndarray, normed: Callable[..., np.ndarray], unit: Callable[..., np.ndarray]) -> np.ndarray:
    return x + unit(normed(x))


def _by_config(seen: np.ndarray, config: Any) -> Any:
    n = seen.shape[-1]
    return {"array": n, "constant": config.length, "visible": seen.sum(axis=-1, keepdims=True)}[config.divisor]


def layer(
    w: Any, x: np.ndarray, index: int, keys: np.ndarray, places: np.ndarray, config: Any, *,
    block: Callable[..., np.ndarray] = _pre_norm, centre: Callable[[np.ndarray], np.ndarray] = lambda x: x,
    place: Callable[[np.ndarray, int], np.ndarray] = lambda places, index: places,
    rotate: Any = None, base: float | None = None, kernel: Callable[..., Any] | None = None,
    divisor: Callable[..., Any] = _by_config, behind: Callable[..., Any] = lambda seen, config: 1,
    columns: Callable[[np.ndarray, int], np.ndarray] = lambda w_in, e: w_in, swapped: bool = False,
    epsilon: float | None = None,
) -> np.ndarray:  # fmt: skip
    """A layer of FLASH-Quad, with whatever part a wrong model puts into it."""
    kernels: dict[str, Callable[..., np.ndarray]] = {
        "squared_relu": partial(attention_kernel.squared_relu_constant, length=1), "laplace": attention_kernel.laplace
    }  # fmt: skip

    def weigh(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
        seen = np.broadcast_to(mask, scores.shape)
        weights = (kernel or kernels[config.kernel])(scores / np.maximum(divisor(seen, config), 1), mask)
        return weights / np.maximum(behind(seen, config), 1)

    def normed(y: np.ndarray) -> np.ndarray:
        small = config.epsilon if epsilon is None else epsilon
        return norm.layer_norm(y, w["norm_scale"], w["norm_bias"], epsilon=small)

    def unit(y: np.ndarray) -> np.ndarray:
        first, second = ("k", "q") if swapped else ("q", "k")
        return gau.unit_paper(
            y, keys, None, place(places, index),
            rope.frequencies(config.key_size, base=config.rotary_base if base is None else base),
            columns(w["w_in"], config.expanded_size), columns(w["b_in"], config.expanded_size),
            w[f"gamma_{first}"], w[f"beta_{first}"], w[f"gamma_{second}"], w[f"beta_{second}"], w["w_out"], w["b_out"],
            length=1, rotate=rotate or getattr(rope, f"rotate_{config.rotation}"), kernel=weigh,
        )  # fmt: skip

    return block(x, normed, unit)


def _built(*inputs: Any, embed: Any = _embedded, layer: Any = layer, logits: Any = _encoder.tied, **rest: Any) -> Any:
    last = rest.pop("last", norm.layer_norm)

    def finished(w: Any, states: list[np.ndarray], config: Any) -> np.ndarray:
        # The states are still to be returned: the last of them is replaced.
        scale, bias = w["final_norm.scale"], w["final_norm.bias"]
        states[-1] = last(states[-1], scale, bias, epsilon=config.epsilon)
        return np.asarray(logits(w, states, config))

    return _encoder.encoded(*inputs, embed=embed, layer=layer, logits=finished, **rest)


def _with(**changed: Any) -> Model:
    return partial(_built, layer=partial(layer, **changed))


def _moved(places: np.ndarray, index: int, behind: int) -> np.ndarray:
    # A shift of all positions would change nothing: only differences enter.
    return np.where(places > places.min(), places - 1, places) if index == behind else places


def _of_the_text(seen: np.ndarray, config: Any) -> Any:
    """Every query counts the keys that some query sees, as if none were hidden by its order."""
    return (
        seen.any(axis=-2, keepdims=True).sum(axis=-1, keepdims=True)
        if config.divisor == "visible"
        else _by_config(seen, config)
    )


def _value_first(w_in: np.ndarray, e: int) -> np.ndarray:
    return np.concatenate([w_in[..., e : 2 * e], w_in[..., :e], w_in[..., 2 * e :]], axis=-1)


def _shared_first(w_in: np.ndarray, e: int) -> np.ndarray:
    return np.concatenate([w_in[..., 2 * e :], w_in[..., : 2 * e]], axis=-1)


def _not_masked(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Scores are zeroed in the place of weights: Laplace's of 0 is not 0."""
    return attention_kernel.laplace(scores * mask, None)


_WEIGHTS = (
    "norm_scale", "norm_bias", "b_in", "beta_q", "beta_k", "b_out", "final_norm.scale", "final_norm.bias"
)  # fmt: skip

WRONG: dict[str, Model] = {
    "layers swapped": partial(_encoder.layers_swapped, model),
    "segment ids dropped": partial(_encoder.segments_dropped, model),
    **{
        f"{name} dropped": partial(_encoder.weights_changed, model, name, 1.0 if name.endswith("scale") else 0.0)
        for name in _WEIGHTS
    },
    **{name: partial(_built, **changed) for name, changed in _encoder.WRONG_INPUTS.items()},
    **{
        name: partial(_built, logits=partial(_encoder.tied, **changed)) for name, changed in _encoder.WRONG_TIED.items()
    },
    "norm of the embedding missing": partial(_built, embed=_not_normed),
    "norm after the unit": _with(block=lambda x, normed, unit: normed(x + unit(x))),
    "norm of what the unit gives": _with(block=lambda x, normed, unit: x + normed(unit(x))),
    "norm missing": _with(block=lambda x, normed, unit: x + unit(x)),
    "no residual": _with(block=lambda x, normed, unit: unit(normed(x))),
    "residual path normalised": _with(block=lambda x, normed, unit: normed(x) + unit(normed(x))),
    "last norm missing": partial(_built, last=lambda x, scale, bias, epsilon: x),
    "last norm not centred": partial(
        _built, last=lambda x, scale, bias, epsilon: norm.rms_norm_scaled(x, scale, epsilon=epsilon) + bias
    ),
    **{f"positions off by one behind the first, in layer {i}": _with(place=partial(_moved, behind=i)) for i in (0, 1)},
    "positions backwards in layer 0": _with(place=lambda places, index: -places if index == 0 else places),
    "no rotation": _with(place=lambda places, index: 0 * places),
    "half-split rotation": _with(rotate=rope.rotate_half_split),
    "interleaved rotation": _with(rotate=rope.rotate_interleaved),
    "rotary base fixed to 10000": _with(base=10000.0),
    "scores not divided": _with(divisor=lambda seen, config: 1),
    "scores divided by the length of the array": _with(divisor=lambda seen, config: seen.shape[-1]),
    "scores divided by the visible keys": _with(divisor=lambda seen, config: seen.sum(axis=-1, keepdims=True)),
    "scores divided by 512": _with(divisor=lambda seen, config: 512),
    "hidden keys counted": _with(divisor=_of_the_text),
    "scores divided by √s too": _with(
        divisor=lambda seen, config: math.sqrt(config.key_size) * np.maximum(_by_config(seen, config), 1)
    ),
    "divided behind the kernel": _with(divisor=lambda seen, config: 1, behind=_by_config),
    "divided by √s, and by the length behind the square": _with(
        divisor=lambda seen, config: math.sqrt(config.key_size), behind=_by_config
    ),
    "divided again behind the kernel": _with(behind=_by_config),
    "squared ReLU": _with(kernel=partial(attention_kernel.squared_relu_constant, length=1)),
    "Laplace": _with(kernel=attention_kernel.laplace),
    "softmax": _with(kernel=attention_kernel.softmax),
    "gammas and betas exchanged": _with(swapped=True),
    "value before gate": _with(columns=_value_first),
    "shared features first": _with(columns=_shared_first),
    "epsilon fixed to 1e-5": _with(epsilon=1e-5),
    "probabilities for logits": partial(_encoder.probabilities, model),
}
# Their step alone is wrong.
WRONG_STREAMS = _streams.wrong_streams(
    model, step, spec.initial_state, _streams.WRONG_STATES, {**_streams.SHARED, **_streams.SHARED_KEYS}
)
