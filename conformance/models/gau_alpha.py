"""Judging gau_alpha: its hidden states and the logits of its masked language model, in every mode of attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from conformance.budget import Arithmetic, Profile, affine
from conformance.generate import Draw
from conformance.models import _encoder, _streams
from conformance.models._encoder import Case, Expected, Model
from conformance.ops import gau
from conformance.ops.norm import rms_norm
from refimpl.models import _heads
from refimpl.models import gau_alpha as spec
from refimpl.ops import gau as gau_spec
from refimpl.ops import norm, rope
from refimpl.ops.attention_kernel import softmax, softmax_plus

HEAD = _heads.TiedLM()


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
    """The model in Balls; n_min is 1 or 16, the kernels that cases of gau name."""
    config = case.config
    states = [_encoder.embed(a, case).stored()]
    for index in range(config.layers):
        mixed = gau.unit(
            a, x=states[-1], mask=case.keys, bias=None, positions=case.places,
            **_encoder.layer_of(a, case, index), b_in=None, beta_q=None, beta_k=None, b_out=None,
            layout="interleaved", base=config.rotary_base, kernel=f"softmax_plus_{config.n_min}",
        ).stored()  # fmt: skip
        # gau.block_post_norm, with the norm that knows what its inputs' radii have in common.
        states.append(rms_norm(a, (states[-1] + mixed).stored(), epsilon=config.epsilon).stored())
    table = a.exact(case.weights["embedding.token"])
    return Expected(affine(states[-1], table.transpose(1, 0), None), tuple(states))


# Laws.
def floors_meet(model: Model, case: Case, reference: _encoder.Reference, profile: Profile) -> None:
    """Where every token sees sixteen keys, n_min 16 gives what n_min 1 gives: dialects differ in short texts only."""
    long, b = case.with_(segment_ids=None, mask=None, positions=None, visible="bidirectional"), len(case.token_ids)
    ids = Draw(f"{case.name}/sixteen").integers((b, 16), 0, case.config.vocab_size - 1)
    one, other = (long.with_(token_ids=ids, config=replace(case.config, n_min=n_min)) for n_min in (1, 16))
    radii = {name: 2 * ball.rad for name, ball in _encoder.finished(reference, one, profile).items()}
    found, due = (_encoder.run(model, each, profile) for each in (other, one))
    _encoder.within("floors_meet, 16 tokens", found, due, case, radii, profile)


def laws(case: Case) -> list[Callable[..., None]]:
    """The laws that hold for a case."""
    return [*_encoder.LAWS, floors_meet]


# Cases.
def cases() -> list[Case]:
    """What each case is for stands in its name; the constants differ, so that none can be built in."""
    made = []
    for name, mask, segments, changes, inputs in (
        ("one layer", None, True, {"layers": 1, "key_size": 36}, {}),
        ("padded", _encoder.MASK, True, {}, {}),
        ("rows without tokens", _encoder.MASK_NONE, True, {"layers": 2}, {}),
        ("no segment ids", _encoder.MASK, False, {"layers": 2}, {}),
        ("n_min 1", _encoder.MASK_NONE, True, {"layers": 2, "n_min": 1}, {}),
        ("causal", _encoder.MASK, True, {"layers": 2, "n_min": 1}, {"visible": "causal"}),
        ("unilm", _encoder.MASK, True, {"segments": 2}, {"visible": "unilm", "segment_ids": _encoder.CONTIGUOUS}),
        ("unilm, segments in turn", None, True, {"layers": 2, "segments": 2, "n_min": 1}, {"visible": "unilm"}),
        ("positions", _encoder.MASK, True, {"layers": 2}, {"positions": 3 * np.arange(11)[::-1] + 100}),
        (
            "positions of every row", _encoder.MASK, True, {"layers": 2},
            {"positions": Draw("positions").integers((4, 11), 0, 50)},
        ),
        (
            "large epsilon", _encoder.MASK, True, {"layers": 2, "epsilon": 0.25, "rotary_base": 10.0},
            {"visible": "causal"},
        ),
    ):  # fmt: skip
        sizes: dict[str, Any] = {"vocab_size": 29, "hidden_size": 5, "layers": 3, "expanded_size": 7, "key_size": 4}
        constants = {"segments": 3, "n_min": 16, "epsilon": 2.0**-40, "rotary_base": 10000.0}
        config = spec.Config(**{**sizes, **constants, **changes})
        draw = Draw(f"gau_alpha/{name}")
        weights = _encoder.weights_of(draw, spec.shapes(config))
        given = {**_encoder.batch(draw, config, mask, segments=segments), **inputs}
        made.append(Case(name, config, weights, **given))
    return made


# Wrong models: the specification with one thing changed.
def _embedded(
    w: Any, ids: Any, segments: Any, config: Any, *, normed: Callable[..., Any] = norm.rms_norm
) -> np.ndarray:
    return normed(w["embedding.token"][ids] + w["embedding.segment"][segments], epsilon=config.epsilon)


def _segment_behind(w: Any, ids: Any, segments: Any, config: Any) -> np.ndarray:
    """The token's vector alone is normalised."""
    return norm.rms_norm(w["embedding.token"][ids], epsilon=config.epsilon) + w["embedding.segment"][segments]


def layer(
    w: Any, x: np.ndarray, index: int, keys: np.ndarray, places: np.ndarray, config: Any, *,
    block: Callable[..., np.ndarray] = gau_spec.block_post_norm,
    place: Callable[[np.ndarray, int], np.ndarray] = lambda places, index: places,
    rotate: Any = rope.rotate_interleaved, base: float | None = None,
    kernel: Callable[..., Any] = lambda n_min: partial(softmax_plus, n_min=n_min),
    columns: Callable[[np.ndarray, int], np.ndarray] = lambda w_in, e: w_in, swapped: bool = False,
    epsilon: float | None = None,
) -> np.ndarray:  # fmt: skip
    """A layer of GAU-α, with whatever part a wrong model puts into it."""
    first, second = ("gamma_k", "gamma_q") if swapped else ("gamma_q", "gamma_k")
    return block(
        x, keys, None, place(places, index),
        rope.frequencies(config.key_size, base=config.rotary_base if base is None else base),
        columns(w["w_in"], config.expanded_size), None, w[first], None, w[second], None, w["w_out"], None,
        rotate=rotate, kernel=kernel(config.n_min), epsilon=config.epsilon if epsilon is None else epsilon,
    )  # fmt: skip


def _norm_before(x: np.ndarray, *arguments: Any, epsilon: float, **functions: Any) -> np.ndarray:
    return x + gau_spec.unit(norm.rms_norm(x, epsilon=epsilon), *arguments, **functions)


def _norm_of_the_summand(x: np.ndarray, *arguments: Any, epsilon: float, **functions: Any) -> np.ndarray:
    return x + norm.rms_norm(gau_spec.unit(x, *arguments, **functions), epsilon=epsilon)


def _no_norm(x: np.ndarray, *arguments: Any, epsilon: float, **functions: Any) -> np.ndarray:
    return x + gau_spec.unit(x, *arguments, **functions)


def _no_residual(x: np.ndarray, *arguments: Any, epsilon: float, **functions: Any) -> np.ndarray:
    return norm.rms_norm(gau_spec.unit(x, *arguments, **functions), epsilon=epsilon)


def _centred(x: np.ndarray, *arguments: Any, epsilon: float, **functions: Any) -> np.ndarray:
    y = x + gau_spec.unit(x, *arguments, **functions)
    return norm.rms_norm(y - y.mean(axis=-1, keepdims=True), epsilon=epsilon)


def _not_divided(x: np.ndarray, *arguments: Any, kernel: Callable[..., Any], **functions: Any) -> np.ndarray:
    root = math.sqrt(arguments[6].shape[0])
    return gau_spec.block_post_norm(x, *arguments, kernel=lambda scores, mask: kernel(scores * root, mask), **functions)


def _array_length(n_min: int) -> Callable[..., Any]:
    return lambda scores, mask: softmax(scores * (math.log(max(scores.shape[-1], n_min)) / math.log(512)), mask)


def _counts_of_the_text(n_min: int) -> Callable[..., Any]:
    """Every query counts the keys that some query sees, as if none were hidden by its order."""

    def kernel(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
        count = np.maximum(mask.any(axis=-2, keepdims=True).sum(axis=-1, keepdims=True), n_min)
        return softmax(scores * (np.log(count) / math.log(512)), mask)

    return kernel


def _uniform_where(seen: int) -> Callable[..., Any]:
    """Weights all alike where a query sees so many keys: none in JunnYu's port, one in bert4keras 0.11.3."""

    def kernel_of(n_min: int) -> Callable[..., Any]:
        def kernel(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
            few = np.broadcast_to(mask, scores.shape).sum(axis=-1, keepdims=True) == seen
            return np.where(few, 1 / scores.shape[-1], softmax_plus(scores, mask, n_min=n_min))

        return kernel

    return kernel_of


def _behind_the_first(places: np.ndarray, index: int) -> np.ndarray:
    # A shift of all positions would change nothing: only differences enter.
    return np.where(places > places.min(), places - 1, places) if index == 1 else places


def _value_first(w_in: np.ndarray, e: int) -> np.ndarray:
    return np.concatenate([w_in[:, e : 2 * e], w_in[:, :e], w_in[:, 2 * e :]], axis=1)


def _shared_first(w_in: np.ndarray, e: int) -> np.ndarray:
    return np.concatenate([w_in[:, -(w_in.shape[1] - 2 * e) :], w_in[:, : 2 * e]], axis=1)


def _one_more_norm(*inputs: Any, config: Any, **options: Any) -> Any:
    _, *states = model(*inputs, config=config, **options)
    states[-1] = norm.rms_norm(states[-1], epsilon=config.epsilon)
    return (_encoder.tied(inputs[0], states, config), *states)


def _built(*inputs: Any, embed: Any = _embedded, layer: Any = layer, logits: Any = _encoder.tied, **rest: Any) -> Any:
    return _encoder.encoded(*inputs, embed=embed, layer=layer, logits=logits, **rest)


def _with(**changed: Any) -> Model:
    return partial(_built, layer=partial(layer, **changed))


WRONG: dict[str, Model] = {
    "layers swapped": partial(_encoder.layers_swapped, model),
    "segment ids dropped": partial(_encoder.segments_dropped, model),
    **{name: partial(_built, **changed) for name, changed in _encoder.WRONG_INPUTS.items()},
    **{
        name: partial(_built, logits=partial(_encoder.tied, **changed)) for name, changed in _encoder.WRONG_TIED.items()
    },
    "norm of the embedding missing": partial(_built, embed=partial(_embedded, normed=lambda x, epsilon: x)),
    "segment added behind the norm": partial(_built, embed=_segment_behind),
    "norm before the unit": _with(block=_norm_before),
    "norm before the sum": _with(block=_norm_of_the_summand),
    "norm missing": _with(block=_no_norm),
    "norms centred": _with(block=_centred),
    "one more norm behind the last layer": _one_more_norm,
    "no residual": _with(block=_no_residual),
    "positions off by one behind the first, in layer 1": _with(place=_behind_the_first),
    "positions backwards in layer 0": _with(place=lambda places, index: -places if index == 0 else places),
    "no rotation": _with(place=lambda places, index: 0 * places),
    "half-split rotation": _with(rotate=rope.rotate_half_split),
    "rotary base fixed to 10000": _with(base=10000.0),
    "scores not divided": _with(block=_not_divided),
    "gammas exchanged": _with(swapped=True),
    "value before gate": _with(columns=_value_first),
    "shared features first": _with(columns=_shared_first),
    "padding counted by softmax_plus": _with(kernel=_array_length),
    "hidden keys counted by softmax_plus": _with(kernel=_counts_of_the_text),
    "plain softmax": _with(kernel=lambda n_min: softmax),
    "n_min fixed to 16": _with(kernel=lambda n_min: partial(softmax_plus, n_min=16)),
    "n_min fixed to 1": _with(kernel=lambda n_min: partial(softmax_plus, n_min=1)),
    "everything where nothing is seen": _with(kernel=_uniform_where(0)),
    "everything where one key is seen": _with(kernel=_uniform_where(1)),
    "epsilon fixed to 1e-12": _with(epsilon=1e-12),
    "probabilities for logits": partial(_encoder.probabilities, model),
}
# Their step alone is wrong.
WRONG_STREAMS = _streams.wrong_streams(
    model, step, spec.initial_state, _streams.WRONG_STATES, {**_streams.SHARED, **_streams.SHARED_KEYS}
)
