"""Judging flash: cases with chunks of three tokens over eleven, every convention of the Config among them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from conformance.budget import Arithmetic
from conformance.generate import Draw
from conformance.models import _encoder
from conformance.models._encoder import Case, Expected, Model
from conformance.ops import mixed_chunk_attention as judged
from conformance.ops.norm import layer_norm
from refimpl.models import flash as spec
from refimpl.ops import attention_kernel, norm, pooling, rope
from refimpl.ops import mixed_chunk_attention as mca

# Rows of gamma and beta that make (q_quad, k_quad, q_lin, k_lin), told once more.
ROWS = {"paper": (0, 1, 2, 3), "lucidrains": (0, 2, 1, 3)}
# By these a row is divided by counts of real tokens, or of tokens before it.
BLIND_TO_PADDING = {
    "bidirectional": ("visible", "unnormalised"),
    "causal": ("visible", "unnormalised", "su", "paper", "lucidrains_causal"),
}


def blind_to_padding(case: Case) -> bool:
    """Whether padding behind the rows must change nothing."""
    return case.config.normaliser in BLIND_TO_PADDING[case.config.mix]


# Reference.
def reference(a: Arithmetic, case: Case) -> Expected:
    """The model in Balls."""
    config = case.config
    unit = next(operator.reference for operator in judged.OPERATORS if operator.name == judged.UNIT)
    options = {
        "mix": config.mix, "layout": config.rotation, "rows": ROWS[config.rows], "chunk": config.chunk,
        "scale": {"root_key_size": config.key_size**-0.5, "chunk": 1 / config.chunk}[config.divisor],
        "kernel": config.kernel, "normaliser": config.normaliser, "documents": None,
        "positions": np.arange(case.token_ids.shape[1]), "base": config.rotary_base,
    }  # fmt: skip
    states = [_encoder.embed(a, case).stored()]
    for index in range(config.layers):
        w = _encoder.layer_of(a, case, index)
        x = layer_norm(a, states[-1], w.pop("norm_scale"), w.pop("norm_bias"), config.epsilon).stored()
        y = unit(a, x=x, key_mask=case.real, segments=None, bias=None, **w, **options)
        states.append((states[-1] + y.stored()).stored())
    scale, bias = (a.exact(case.weights[f"final_norm.{name}"]) for name in ("scale", "bias"))
    return _encoder.classified(a, case, layer_norm(a, states[-1], scale, bias, config.epsilon).stored(), states)


# Cases.
def cases() -> list[Case]:
    """Every convention stands in some case; eleven tokens are three whole chunks of three and a tail of two."""
    made = []
    for name, mask, segments, changes in (
        ("one layer", None, True, {"layers": 1}),
        ("padded", _encoder.MASK, True, {}),
        ("rows without tokens", _encoder.MASK_NONE, True, {"kernel": "laplace", "rotation": "half_split"}),
        ("causal", _encoder.MASK, True, {"mix": "causal", "epsilon": 0.25, "rotary_base": 10.0}),
        ("article", _encoder.MASK, False, {"normaliser": "su", "labels": 1}),
        ("article, causal", _encoder.MASK, True, {"normaliser": "su", "mix": "causal"}),
        ("paper", None, True, {"normaliser": "paper", "divisor": "chunk", "rotation": "half_split"}),
        ("paper, causal", _encoder.MASK, True, {"normaliser": "paper", "divisor": "chunk", "mix": "causal"}),
        ("lucidrains", _encoder.MASK, True, {"normaliser": "lucidrains", "divisor": "chunk", "rows": "lucidrains"}),
        (
            "lucidrains, causal", _encoder.MASK, True,
            {"normaliser": "lucidrains_causal", "divisor": "chunk", "mix": "causal", "kernel": "laplace"},
        ),
        ("unnormalised", _encoder.MASK_NONE, True, {"normaliser": "unnormalised", "divisor": "chunk"}),
        ("one chunk", _encoder.MASK, True, {"chunk": 13, "mix": "causal"}),
    ):  # fmt: skip
        sizes: dict[str, Any] = {"vocab_size": 29, "hidden_size": 5, "layers": 2, "expanded_size": 7, "key_size": 4}
        conventions: dict[str, Any] = {"chunk": 3, "mix": "bidirectional", "kernel": "squared_relu"}
        conventions |= {"divisor": "root_key_size", "normaliser": "visible", "rows": "paper", "rotation": "interleaved"}
        constants = {"segments": 3, "rotary_base": 10000.0, "epsilon": 2.0**-20, "labels": 2}
        config = spec.Config(**{**sizes, **conventions, **constants, **changes})
        draw = Draw(f"flash/{name}")
        weights = _encoder.weights_of(draw, spec.shapes(config))
        made.append(Case(name, config, weights, **_encoder.batch(draw, config, mask, segments=segments)))
    return made


# Wrong models: the specification with one thing changed.
def _built(
    weights: Any, token_ids: Any, segment_ids: Any, mask: Any, *, config: Any, layer: Callable[..., np.ndarray],
    last: Callable[..., np.ndarray] = norm.layer_norm, pool: Callable[..., np.ndarray] = pooling.masked_mean,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    mask = np.ones(token_ids.shape, bool) if mask is None else mask
    x = spec.hidden_states(weights, token_ids, segment_ids, mask, config=config)[0]
    for index in range(config.layers):
        w = {k.removeprefix(f"layers.{index}."): np.float64(v) for k, v in weights.items() if f"layers.{index}." in k}
        x = layer(x, w, index, mask, config)
    hidden = last(x, weights["final_norm.scale"], weights["final_norm.bias"], epsilon=config.epsilon)
    embedding = pool(hidden, mask)
    return embedding @ weights["classifier.kernel"] + weights["classifier.bias"], embedding, hidden


def _pre_norm(x: np.ndarray, normed: Callable[..., np.ndarray], unit: Callable[..., np.ndarray]) -> np.ndarray:
    return x + unit(normed(x))


def layer(
    x: Any, w: Any, index: int, mask: Any, config: Any, *, block: Callable[..., np.ndarray] = _pre_norm,
    positions: Callable[..., np.ndarray] = lambda p, index, chunk: p,
    visible: Callable[[np.ndarray], Any] = lambda mask: mask, rows: tuple[int, ...] | None = None,
    epsilon: float | None = None, **other: Any,
) -> np.ndarray:  # fmt: skip
    """A layer of FLASH, with whatever part a wrong model puts into it."""
    kernels = {
        "squared_relu": partial(attention_kernel.squared_relu_constant, length=1), "laplace": attention_kernel.laplace
    }  # fmt: skip
    rule = {
        "mix": getattr(mca, config.mix), "rotate": getattr(rope, f"rotate_{config.rotation}"),
        "rows": config.row_order if rows is None else rows, "chunk": config.chunk, "scale": config.scale,
        "kernel": kernels[config.kernel], "normaliser": getattr(mca, config.normaliser),
    }  # fmt: skip

    def normed(y: np.ndarray) -> np.ndarray:
        small = config.epsilon if epsilon is None else epsilon
        return norm.layer_norm(y, w["norm_scale"], w["norm_bias"], epsilon=small)

    def unit(y: np.ndarray) -> np.ndarray:
        return mca.unit(
            y, visible(mask), None, None, positions(np.arange(y.shape[-2]), index, config.chunk),
            rope.frequencies(config.key_size, base=config.rotary_base),
            w["w_in"], w["b_in"], w["gamma"], w["beta"], w["w_out"], w["b_out"], **{**rule, **other},
        )  # fmt: skip

    return block(x, normed, unit)


def _with(**parts: Any) -> Model:
    return partial(_built, layer=partial(layer, **parts))


WRONG: dict[str, Model] = {
    "layers swapped": partial(_encoder.layers_swapped, spec.forward),
    "segment ids dropped": partial(_encoder.segments_dropped, spec.forward),
    "classifier bias dropped": partial(_encoder.bias_dropped, spec.forward),
    "norm after the unit": _with(block=lambda x, normed, unit: normed(x + unit(x))),
    "residual path normalised": _with(block=lambda x, normed, unit: normed(x) + unit(normed(x))),
    "last norm missing": partial(_built, layer=layer, last=lambda x, scale, bias, epsilon: x),
    "positions off by one behind the first, in layer 1": _with(
        # A shift of all positions would change nothing: only differences enter.
        positions=lambda p, index, chunk: np.maximum(p - 1, 0) if index == 1 else p
    ),
    "positions within the chunk": _with(positions=lambda p, index, chunk: p % chunk),
    "half-split rotation": _with(rotate=rope.rotate_half_split),
    "interleaved rotation": _with(rotate=rope.rotate_interleaved),
    "rows of the paper": _with(rows=mca.ROWS_PAPER),
    "rows of lucidrains": _with(rows=mca.ROWS_LUCIDRAINS),
    "reads both ways": _with(mix=mca.bidirectional),
    "chunks of four": _with(chunk=4),
    "scores not divided": _with(scale=1.0),
    "squared ReLU": _with(kernel=partial(attention_kernel.squared_relu_constant, length=1)),
    "padded keys visible": _with(visible=lambda mask: None),
    "the mask of the first row for all": _with(visible=lambda mask: mask[:1]),
    "padding counted": _with(normaliser=mca.su),
    "epsilon fixed to 1e-5": _with(epsilon=1e-5),
    "mask ignored in pooling": partial(_built, layer=layer, pool=lambda x, mask: x.mean(axis=-2)),
}
