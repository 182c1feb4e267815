"""Judging gau_alpha: cases from one layer to three, bounds from the references of its operators, known wrong models."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from conformance.budget import Arithmetic
from conformance.generate import Draw
from conformance.models import _encoder
from conformance.models._encoder import Case, Expected, Model
from conformance.ops import gau
from refimpl.models import gau_alpha as spec
from refimpl.ops import attention, norm, pooling, rope
from refimpl.ops import gau as gau_spec
from refimpl.ops.attention_kernel import softmax, softmax_plus


# Reference.
def reference(a: Arithmetic, case: Case) -> Expected:
    """The model in Balls; n_min is 1 or 16, the kernels that cases of gau name."""
    config = case.config
    states = [_encoder.embed(a, case).stored()]
    for index in range(config.layers):
        states.append(
            gau.block_post_norm(
                a, x=states[-1], epsilon=config.epsilon, mask=case.real[:, None, :], bias=None,
                positions=np.arange(case.token_ids.shape[1]), **_encoder.layer_of(a, case, index),
                b_in=None, beta_q=None, beta_k=None, b_out=None,
                layout="interleaved", base=config.rotary_base, kernel=f"softmax_plus_{config.n_min}",
            ).stored()
        )  # fmt: skip
    return _encoder.classified(a, case, states[-1], states)


# Cases.
def cases() -> list[Case]:
    """What each case is for stands in its name; the constants differ, so that none can be built in."""
    made = []
    for name, mask, segments, changes in (
        ("one layer", None, True, {"layers": 1}),
        ("padded", _encoder.MASK, True, {}),
        ("rows without tokens", _encoder.MASK_NONE, True, {"layers": 2}),
        ("no segment ids", _encoder.MASK, False, {"layers": 2, "labels": 1}),
        ("n_min 1", _encoder.MASK_NONE, True, {"layers": 2, "n_min": 1}),
        ("large epsilon", _encoder.MASK, True, {"layers": 2, "epsilon": 0.25, "rotary_base": 10.0}),
    ):
        sizes: dict[str, Any] = {"vocab_size": 29, "hidden_size": 5, "layers": 3, "expanded_size": 7, "key_size": 4}
        constants = {"segments": 3, "n_min": 16, "epsilon": 2.0**-40, "rotary_base": 10000.0, "labels": 2}
        config = spec.Config(**{**sizes, **constants, **changes})
        draw = Draw(f"gau_alpha/{name}")
        weights = _encoder.weights_of(draw, spec.shapes(config))
        made.append(Case(name, config, weights, **_encoder.batch(draw, config, mask, segments=segments)))
    return made


# Wrong models: the specification with one thing changed.
def _built(
    weights: Any, token_ids: Any, segment_ids: Any, mask: Any, *, config: Any,
    layer: Callable[..., np.ndarray], pool: Callable[..., np.ndarray] = pooling.masked_mean,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    mask = np.ones(token_ids.shape, bool) if mask is None else mask
    x = spec.hidden_states(weights, token_ids, segment_ids, mask, config=config)[0]
    for index in range(config.layers):
        w = {k.removeprefix(f"layers.{index}."): np.float64(v) for k, v in weights.items() if f"layers.{index}." in k}
        x = layer(x, w, index, mask, config)
    embedding = pool(x, mask)
    return embedding @ weights["classifier.kernel"] + weights["classifier.bias"], embedding, x


def layer(
    x: Any, w: Any, index: int, mask: Any, config: Any, *, block: Callable[..., np.ndarray] = gau_spec.block_post_norm,
    positions: Callable[[np.ndarray, int], np.ndarray] = lambda p, index: p, rotate: Any = rope.rotate_interleaved,
    kernel: Callable[..., Any] = lambda n_min: partial(softmax_plus, n_min=n_min),
    visible: Callable[[np.ndarray], Any] = attention.key_mask, swapped: bool = False, epsilon: float | None = None,
) -> np.ndarray:  # fmt: skip
    """A layer of GAU-α, with whatever part a wrong model puts into it."""
    first, second = ("gamma_k", "gamma_q") if swapped else ("gamma_q", "gamma_k")
    return block(
        x, visible(mask), None, positions(np.arange(x.shape[-2]), index),
        rope.frequencies(config.key_size, base=config.rotary_base),
        w["w_in"], None, w[first], None, w[second], None, w["w_out"], None,
        rotate=rotate, kernel=kernel(config.n_min), epsilon=config.epsilon if epsilon is None else epsilon,
    )  # fmt: skip


def _norm_before(x: np.ndarray, *arguments: Any, epsilon: float, **functions: Any) -> np.ndarray:
    return x + gau_spec.unit(norm.rms_norm(x, epsilon=epsilon), *arguments, **functions)


def _no_residual(x: np.ndarray, *arguments: Any, epsilon: float, **functions: Any) -> np.ndarray:
    return norm.rms_norm(gau_spec.unit(x, *arguments, **functions), epsilon=epsilon)


def _array_length(n_min: int) -> Callable[..., Any]:
    return lambda scores, mask: softmax(scores * (math.log(max(scores.shape[-1], n_min)) / math.log(512)), mask)


def _behind_the_first(p: np.ndarray, index: int) -> np.ndarray:
    # A shift of all positions would change nothing: only differences enter.
    return np.maximum(p - 1, 0) if index == 1 else p


def _with(**parts: Any) -> Model:
    return partial(_built, layer=partial(layer, **parts))


WRONG: dict[str, Model] = {
    "layers swapped": partial(_encoder.layers_swapped, spec.forward),
    "segment ids dropped": partial(_encoder.segments_dropped, spec.forward),
    "classifier bias dropped": partial(_encoder.bias_dropped, spec.forward),
    "norm before the unit": _with(block=_norm_before),
    "no residual": _with(block=_no_residual),
    "positions off by one behind the first, in layer 1": _with(positions=_behind_the_first),
    "no rotation": _with(positions=lambda p, index: 0 * p),
    "half-split rotation": _with(rotate=rope.rotate_half_split),
    "gammas exchanged": _with(swapped=True),
    "padded keys visible": _with(visible=lambda mask: None),
    "the mask of the first row for all": _with(visible=lambda mask: mask[:1, None, :]),
    "padding counted by softmax_plus": _with(kernel=_array_length),
    "plain softmax": _with(kernel=lambda n_min: softmax),
    "n_min fixed to 16": _with(kernel=lambda n_min: partial(softmax_plus, n_min=16)),
    "epsilon fixed to 1e-12": _with(epsilon=1e-12),
    "mask ignored in pooling": partial(_built, layer=layer, pool=lambda x, mask: x.mean(axis=-2)),
    "first token for the mean": partial(_built, layer=layer, pool=lambda x, mask: x[..., 0, :]),
}
