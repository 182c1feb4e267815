"""Judging flash: its hidden states and tied logits, in chunks of three tokens over eleven, by every convention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from conformance.budget import Arithmetic, affine
from conformance.generate import Draw
from conformance.models import _encoder, _streams
from conformance.models._encoder import Case, Expected, Model
from conformance.ops import mixed_chunk_attention as judged
from conformance.ops.norm import layer_norm
from refimpl.models import _heads
from refimpl.models import flash as spec
from refimpl.ops import attention_kernel, norm, rope
from refimpl.ops import mixed_chunk_attention as mca

HEAD = _heads.TiedLM()

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


def laws(case: Case) -> list[Callable[..., None]]:
    """The laws that hold for a case: padding on the left moves the borders of the chunks."""
    counted = (_encoder.padding,) if blind_to_padding(case) else (_encoder.padding, _encoder.prefix)
    blind = [_encoder.right_padding] if blind_to_padding(case) else []
    return blind + [law for law in _encoder.LAWS if law not in counted]


# What is called.
def hidden_states(weights: Any, *inputs: Any, config: Any, visible: str) -> list[np.ndarray]:
    """The specification's hidden states; `mix` says who sees whom."""
    return spec.hidden_states(weights, *inputs, config=config)


def model(weights: Any, *inputs: Any, config: Any, visible: str) -> tuple[np.ndarray, ...]:
    """The specification's logits and hidden states; the head has no weights of its own."""
    states = hidden_states(weights, *inputs, config=config, visible=visible)
    return (_heads.masked_lm_tied({}, states[-1], weights["embedding.token"], config=config), *states)


step = _streams.step_of(spec, HEAD, _heads.masked_lm_tied)


# Reference.
def reference(a: Arithmetic, case: Case) -> Expected:
    """The model in Balls."""
    config = case.config
    unit = next(operator.reference for operator in judged.OPERATORS if operator.name == judged.UNIT)
    options = {
        "mix": config.mix, "layout": config.rotation, "rows": ROWS[config.rows], "chunk": config.chunk,
        "scale": {"root_key_size": config.key_size**-0.5, "chunk": 1 / config.chunk}[config.divisor],
        "kernel": config.kernel, "normaliser": config.normaliser, "documents": None,
        "positions": case.places, "base": config.rotary_base,
    }  # fmt: skip
    states = [_encoder.embed(a, case).stored()]
    for index in range(config.layers):
        w = _encoder.layer_of(a, case, index)
        x = layer_norm(a, states[-1], w.pop("norm_scale"), w.pop("norm_bias"), config.epsilon).stored()
        y = unit(a, x=x, key_mask=case.real, segments=None, bias=None, **w, **options)
        states.append((states[-1] + y.stored()).stored())
    scale, bias = (a.exact(case.weights[f"final_norm.{name}"]) for name in ("scale", "bias"))
    states[-1] = layer_norm(a, states[-1], scale, bias, config.epsilon).stored()
    table = a.exact(case.weights["embedding.token"])
    return Expected(affine(states[-1], table.transpose(1, 0), None), tuple(states))


# Cases.
def cases() -> list[Case]:
    """Every convention stands in some case; eleven tokens are three whole chunks of three and a tail of two."""
    made = []
    everywhere: dict[str, np.ndarray] = {
        "positions": 3 * np.arange(11)[::-1] + 100,
        "positions of every row": Draw("positions").integers((4, 11), 0, 50),
    }
    for name, mask, segments, changes in (
        ("one layer", None, True, {"layers": 1, "key_size": 36}),
        ("padded", _encoder.MASK, True, {}),
        ("rows without tokens", _encoder.MASK_NONE, True, {"kernel": "laplace", "rotation": "half_split"}),
        ("causal", _encoder.MASK, True, {"mix": "causal", "epsilon": 0.25, "rotary_base": 10.0}),
        ("article", _encoder.MASK, False, {"normaliser": "su"}),
        ("article, causal", _encoder.MASK, True, {"normaliser": "su", "mix": "causal"}),
        ("paper", None, True, {"normaliser": "paper", "divisor": "chunk", "rotation": "half_split"}),
        (
            "paper, causal", _encoder.MASK, True,
            {"normaliser": "paper", "divisor": "chunk", "mix": "causal", "rotation": "half_split"},
        ),
        ("lucidrains", _encoder.MASK, True, {"normaliser": "lucidrains", "divisor": "chunk", "rows": "lucidrains"}),
        (
            "lucidrains, causal", _encoder.MASK, True,
            {"normaliser": "lucidrains_causal", "divisor": "chunk", "mix": "causal", "kernel": "laplace"},
        ),
        ("unnormalised", _encoder.MASK_NONE, True, {"normaliser": "unnormalised", "divisor": "chunk"}),
        ("one chunk", _encoder.MASK, True, {"chunk": 13, "mix": "causal"}),
        ("positions", _encoder.MASK, True, {}),
        ("positions of every row", _encoder.MASK, True, {"mix": "causal"}),
    ):  # fmt: skip
        sizes: dict[str, Any] = {"vocab_size": 29, "hidden_size": 5, "layers": 2, "expanded_size": 7, "key_size": 4}
        conventions: dict[str, Any] = {"chunk": 3, "mix": "bidirectional", "kernel": "squared_relu"}
        conventions |= {"divisor": "root_key_size", "normaliser": "visible", "rows": "paper", "rotation": "interleaved"}
        constants = {"segments": 3, "rotary_base": 10000.0, "epsilon": 2.0**-20}
        config = spec.Config(**{**sizes, **conventions, **constants, **changes})
        draw = Draw(f"flash/{name}")
        weights = _encoder.weights_of(draw, spec.shapes(config))
        given = {**_encoder.batch(draw, config, mask, segments=segments), "positions": everywhere.get(name)}
        made.append(Case(name, config, weights, visible=config.mix, **given))
    return made


# Wrong models: the specification with one thing changed.
def _built(
    weights: Any, token_ids: Any, segment_ids: Any, mask: Any, positions: Any, *, config: Any, visible: str,
    layer: Callable[..., np.ndarray], last: Callable[..., np.ndarray] = norm.layer_norm,
    logits: Callable[..., np.ndarray] = _encoder.tied, see: Callable[..., Any] = lambda mask, ids: mask,
    place: Callable[..., np.ndarray] = lambda positions, mask, given: positions,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    segments = np.zeros_like(token_ids) if segment_ids is None else segment_ids
    mask = np.ones(token_ids.shape, bool) if mask is None else mask
    w = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    places = place(np.arange(token_ids.shape[1]) if positions is None else positions, mask, positions is not None)
    summed = w["embedding.token"][token_ids] + w["embedding.segment"][segments]
    states = [norm.rms_norm(summed, epsilon=config.epsilon)]
    for index in range(config.layers):
        held = {k.removeprefix(f"layers.{index}."): v for k, v in w.items() if f"layers.{index}." in k}
        states.append(layer(states[-1], held, index, see(mask, token_ids), places, config))
    states[-1] = last(states[-1], w["final_norm.scale"], w["final_norm.bias"], epsilon=config.epsilon)
    return (logits(w, states, config), *states)


def _pre_norm(x: np.ndarray, normed: Callable[..., np.ndarray], unit: Callable[..., np.ndarray]) -> np.ndarray:
    return x + unit(normed(x))


def layer(
    x: Any, w: Any, index: int, mask: Any, places: Any, config: Any, *,
    block: Callable[..., np.ndarray] = _pre_norm,
    positions: Callable[..., np.ndarray] = lambda p, index, chunk: p, base: float | None = None,
    rows: tuple[int, ...] | None = None, epsilon: float | None = None, **other: Any,
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
            y, mask, None, None, positions(places, index, config.chunk),
            rope.frequencies(config.key_size, base=config.rotary_base if base is None else base),
            w["w_in"], w["b_in"], w["gamma"], w["beta"], w["w_out"], w["b_out"], **{**rule, **other},
        )  # fmt: skip

    return block(x, normed, unit)


def _with(**parts: Any) -> Model:
    return partial(_built, layer=partial(layer, **parts))


def _everywhere(**parts: Any) -> Model:
    return partial(_built, layer=layer, **parts)


_WEIGHTS = ("norm_scale", "norm_bias", "b_in", "beta", "b_out", "final_norm.scale", "final_norm.bias")

WRONG: dict[str, Model] = {
    "layers swapped": partial(_encoder.layers_swapped, model),
    "segment ids dropped": partial(_encoder.segments_dropped, model),
    **{
        f"{name} dropped": partial(_encoder.weights_changed, model, name, 1.0 if name.endswith("scale") else 0.0)
        for name in _WEIGHTS
    },
    **{name: _everywhere(logits=partial(_encoder.tied, **changed)) for name, changed in _encoder.WRONG_TIED.items()},
    "norm after the unit": _with(block=lambda x, normed, unit: normed(x + unit(x))),
    "norm of what the unit gives": _with(block=lambda x, normed, unit: x + normed(unit(x))),
    "norm missing": _with(block=lambda x, normed, unit: x + unit(x)),
    "no residual": _with(block=lambda x, normed, unit: unit(normed(x))),
    "residual path normalised": _with(block=lambda x, normed, unit: normed(x) + unit(normed(x))),
    "last norm missing": _everywhere(last=lambda x, scale, bias, epsilon: x),
    "last norm not centred": _everywhere(
        last=lambda x, scale, bias, epsilon: norm.rms_norm_scaled(x, scale, epsilon=epsilon) + bias
    ),
    "positions off by one behind the first, in layer 1": _with(
        # A shift of all positions would change nothing: only differences enter.
        positions=lambda p, index, chunk: np.where(p > p.min(), p - 1, p) if index == 1 else p
    ),
    "positions within the chunk": _with(positions=lambda p, index, chunk: p % chunk),
    "no rotation": _with(positions=lambda p, index, chunk: 0 * p),
    "given positions ignored": _everywhere(place=_encoder.WRONG_INPUTS["given positions ignored"]["place"]),
    "positions of the first row for all": _everywhere(
        place=_encoder.WRONG_INPUTS["positions of the first row for all"]["place"]
    ),
    "half-split rotation": _with(rotate=rope.rotate_half_split),
    "interleaved rotation": _with(rotate=rope.rotate_interleaved),
    "rotary base fixed to 10000": _with(base=10000.0),
    "rows of the paper": _with(rows=mca.ROWS_PAPER),
    "rows of lucidrains": _with(rows=mca.ROWS_LUCIDRAINS),
    "reads both ways": _with(mix=mca.bidirectional),
    "chunks of four": _with(chunk=4),
    "scores not divided": _with(scale=1.0),
    "squared ReLU": _with(kernel=partial(attention_kernel.squared_relu_constant, length=1)),
    "padded keys visible": _everywhere(see=lambda mask, ids: None),
    "the mask of the first row for all": _everywhere(see=lambda mask, ids: np.broadcast_to(mask[:1], mask.shape)),
    "id 0 hidden": _everywhere(see=lambda mask, ids: mask & (ids != 0)),
    "padding counted": _with(normaliser=mca.su),
    "epsilon fixed to 1e-5": _with(epsilon=1e-5),
    "probabilities for logits": partial(_encoder.probabilities, model),
}
# Their step alone is wrong.
WRONG_STREAMS = _streams.wrong_streams(
    model, step, spec.initial_state, {**_streams.WRONG_STATES, **_streams.WRONG_CHUNKS},
    {**_streams.SHARED, **_streams.SHARED_SUMS},
)  # fmt: skip
