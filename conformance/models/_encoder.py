"""What judging one model shares with judging another: cases, bounds, laws, and parts of the references.

A model under judgement is a function model(weights, token_ids, segment_ids, mask, positions, config=config,
visible=name) -> (logits, x_0, ..., x_L), which takes weights in the format of the profile: the masked language model's
logits of every token and the hidden states; `visible` is bidirectional, causal or unilm. It may have an attribute
`step`, a function step(weights, state, ..., config=config, visible="causal") -> (results, state) of the next tokens;
state is None before the first, and otherwise what the step before returned.
Laws are plain functions over a model, a case and the bounds of that model's reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import numpy as np

from conformance.budget import Arithmetic, Ball, Profile, affine
from conformance.case import storage_type
from conformance.generate import Draw
from conformance.law import LawFailed, contained, overwrite, poison, results, shaped, stepped
from conformance.ops import activation, attention, norm
from refimpl.models import _encoder as spec
from refimpl.ops import attention_kernel, rope

Model = Callable[..., Any]
# Fields of a case that are arrays, or None.
INPUTS = ("token_ids", "segment_ids", "mask", "positions")
# Below 0, and about 512 and 4096, where tables end; float16 tells positions apart to 2048.
FAR = (37, 4090, -150, 506)


@dataclass(frozen=True)
class Streaming:
    """A model with a step: called as the model, and stepped through a causal text piece by piece."""

    whole: Model
    step: Model

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.whole(*inputs, **options)


@dataclass(frozen=True)
class Case:
    """A tiny model and a batch for it. Weights are dyadic: every storage format holds them exactly."""

    name: str
    config: Any
    weights: Mapping[str, np.ndarray] = field(repr=False)
    token_ids: np.ndarray
    segment_ids: np.ndarray | None = None
    mask: np.ndarray | None = None
    positions: np.ndarray | None = None
    visible: str = "bidirectional"
    # References of this case and of what laws make of it, by profile and inputs.
    known: dict[Any, dict[str, Ball]] = field(default_factory=dict, repr=False, compare=False)

    def with_(self, **changes: Any) -> Self:
        """The case with other inputs, or with other weights or another Config, of which nothing is known yet."""
        if changes.keys() & {"config", "weights"}:
            changes["known"] = {}
        return replace(self, **changes)

    @property
    def slug(self) -> str:
        """The name in reports and on a command line."""
        return self.name.replace(",", "").replace(" ", "-")

    @property
    def real(self) -> np.ndarray:
        """Which tokens are real."""
        return np.ones(self.token_ids.shape, bool) if self.mask is None else self.mask

    @property
    def segments(self) -> np.ndarray:
        """The segment of every token."""
        return np.zeros_like(self.token_ids) if self.segment_ids is None else self.segment_ids

    @property
    def places(self) -> np.ndarray:
        """The positions, of every row or for all of them."""
        return np.arange(self.token_ids.shape[1]) if self.positions is None else self.positions

    @property
    def keys(self) -> np.ndarray:
        """The keys that every token sees, (b, n, n)."""
        a, (b, n) = Arithmetic(Profile("float64")), self.token_ids.shape
        among: dict[str, Callable[[], np.ndarray]] = {
            "bidirectional": lambda: np.ones((n, n), bool),
            "causal": lambda: attention.causal_mask(a, n, n),
            "unilm": lambda: attention.unilm_mask(a, self.segments),
        }
        return np.broadcast_to(among[self.visible]() & self.real[:, None, :], (b, n, n))

    def rows(self, index: Any) -> Self:
        """The case of some rows of the batch."""
        chosen = {n: getattr(self, n) for n in INPUTS}
        # Positions that are shared belong to every row.
        return self.with_(
            **{n: a if a is None or a.ndim == 1 else np.ascontiguousarray(a[index]) for n, a in chosen.items()}
        )

    def tokens(self, start: int, stop: int) -> Self:
        """The case of some tokens of every row."""
        held = {n: getattr(self, n) for n in INPUTS}
        return self.with_(**{n: a if a is None else np.ascontiguousarray(a[..., start:stop]) for n, a in held.items()})

    def call(self, model: Model, weights: Mapping[str, Any]) -> Any:
        """What a model returns for these inputs."""
        inputs = (getattr(self, name) for name in INPUTS)
        return model(weights, *inputs, config=self.config, visible=self.visible)


class Expected(NamedTuple):
    """The logits of every token, and the hidden states: the last is what heads stand on."""

    logits: Ball
    states: tuple[Ball, ...]

    def results(self) -> dict[str, Ball]:
        """What a model returns, by name."""
        return {"logits": self.logits, **{f"x_{i}": state for i, state in enumerate(self.states)}}


Reference = Callable[[Arithmetic, Any], Expected]


def weights_of(
    draw: Draw, shapes: Mapping[str, tuple[int, ...]], step: Callable[[str], int] = lambda name: -7
) -> dict[str, np.ndarray]:
    """Weights in steps of 2^-7, or 2^step: scales and gammas around 1, everything else around 0."""
    made = {}
    for name, shape in shapes.items():
        near_one = name.endswith("scale") or "gamma" in name
        low, high = (64, 160) if near_one else (-95, 95)
        made[name] = draw.grid(*shape, low=low, high=high, exponent=step(name))
    return made


def run(model: Model, case: Case, profile: Profile) -> tuple[np.ndarray, ...]:
    """What a model returns on a case, as float64; weights and inputs must come back unmodified."""
    target = storage_type(profile.dtype)
    weights = {name: array.astype(target) for name, array in case.weights.items()}
    given = {n: a.copy() for n in INPUTS if (a := getattr(case, n)) is not None}
    poison(*(case.token_ids.size * width for width in (case.config.vocab_size, case.config.hidden_size)))
    with contained():
        returned = case.with_(**given).call(model, dict(weights))
        found = results(returned, tuple(_due(case.token_ids, case.config)))
    kept = [name for name, array in given.items() if not np.array_equal(array, getattr(case, name))]
    kept += [name for name, array in weights.items() if not np.array_equal(array, case.weights[name])]
    if kept:
        raise LawFailed(f"{case.name} ({profile}): {kept[0]} was modified by the call")
    return found


def _due(token_ids: np.ndarray, config: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of what a model returns, by name."""
    names = ("logits", *(f"x_{i}" for i in range(config.layers + 1)))
    widths = {name: config.vocab_size if name == "logits" else config.hidden_size for name in names}
    return {name: (*token_ids.shape, width) for name, width in widths.items()}


def refusing(model: Any) -> Model:
    """A model whose results, and those of its step, are refused unless they are of the number and shapes that are due.

    Cases tell by their first state what is off; laws would compare whatever came.
    """

    def whole(weights: Any, token_ids: np.ndarray, *inputs: Any, config: Any, **options: Any) -> Any:
        return shaped(model(weights, token_ids, *inputs, config=config, **options), _due(token_ids, config))

    def step(weights: Any, state: Any, token_ids: np.ndarray, *inputs: Any, config: Any, **options: Any) -> Any:
        made, after = stepped(model.step(weights, state, token_ids, *inputs, config=config, **options))
        return shaped(made, _due(token_ids, config)), after

    return Streaming(whole, step) if hasattr(model, "step") else whole


def unchanged(returned: Sequence[Any], found: tuple[np.ndarray, ...], case: Case, profile: Profile) -> None:
    """Raise LawFailed if results that a model has returned are no longer what they were: its next call wrote them."""
    for name, result, before in zip(_names(found), returned, found, strict=True):
        if not np.array_equal(np.asarray(result, np.float64), before, equal_nan=True):
            raise LawFailed(f"{case.name} ({profile}): {name} of one call was overwritten by a later one")


def expected(reference: Reference, case: Case, profile: Profile) -> tuple[Ball, ...]:
    """The results as they should be, the rounding of the output included."""
    return tuple(finished(reference, case, profile).values())


def finished(reference: Reference, case: Case, profile: Profile) -> dict[str, Ball]:
    """The results as they should be, by name, derived once for the same inputs."""
    inputs = (getattr(case, name) for name in INPUTS)
    held = tuple(None if a is None else (a.dtype.str, a.shape, a.tobytes()) for a in inputs)
    key = reference, profile, case.visible, held
    if key not in case.known:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            due = reference(Arithmetic(profile), case).results()
            case.known[key] = {name: ball.finished() for name, ball in due.items()}
    return case.known[key]


def worst(model: Model, reference: Reference, case: Case, profile: Profile) -> float:
    """The largest error over its bound among all results; at most 1 for a right model. Vectors of padding count."""
    found, due = run(model, case, profile), expected(reference, case, profile)
    return max(_ratio(value, ball) for value, ball in zip(found, due, strict=True))


def by_layer(hidden_states: Model, reference: Reference, case: Case, profile: Profile) -> list[float]:
    """The largest error over its bound in the embedding and behind every layer: where a model goes wrong first."""
    due = [ball.finished() for ball in reference(Arithmetic(profile), case).states]
    return [_ratio(value, ball) for value, ball in zip(run(hidden_states, case, profile), due, strict=True)]


def _ratio(value: np.ndarray, ball: Ball) -> float:
    if value.shape != ball.shape:
        return float("inf")
    # NaN is beyond every bound.
    error = np.nan_to_num(np.abs(value - ball.value), nan=np.inf)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        return float(np.where(error > 0, error / ball.rad, 0.0).max(initial=0.0))


# Laws.
def one_by_one(model: Model, case: Case, reference: Reference, profile: Profile) -> None:
    """Every row of the batch alone gives what it gives in the batch."""
    alone = [run(model, case.rows(slice(i, i + 1)), profile) for i in range(len(case.token_ids))]
    together = tuple(np.concatenate(parts) for parts in zip(*alone, strict=True))
    _equal("one_by_one", together, run(model, case, profile), case, reference, profile)


def batch_permutes(model: Model, case: Case, reference: Reference, profile: Profile) -> None:
    """The batch backwards gives the results backwards."""
    backwards = tuple(array[::-1] for array in run(model, case.rows(slice(None, None, -1)), profile))
    _equal("batch_permutes", backwards, run(model, case, profile), case, reference, profile)


def padding(model: Model, case: Case, reference: Reference, profile: Profile) -> None:
    """Five padded tokens before or behind every row, in the batch or alone, change nothing on the rest."""
    _padding(model, case, reference, profile, "left", "right")


def right_padding(model: Model, case: Case, reference: Reference, profile: Profile) -> None:
    """The same behind every row only: for models whose chunks begin with the array."""
    _padding(model, case, reference, profile, "right")


def _padding(model: Model, case: Case, reference: Reference, profile: Profile, *sides: str) -> None:
    b, n = case.token_ids.shape
    short = finished(reference, case, profile)
    around = {side: (5, 0) if side == "left" else (0, 5) for side in sides}
    longer = {side: _padded(case, *sizes) for side, sizes in around.items()}
    # Rows have nothing to do with each other, so that their bounds are those of the batch.
    for rows in (slice(None), *(slice(i, i + 1) for i in range(b))):
        alone = run(model, case.rows(rows), profile)
        for side in sides:
            inner = slice(around[side][0], around[side][0] + n)
            long = finished(reference, longer[side], profile)
            made = tuple(array[:, inner] for array in run(model, longer[side].rows(rows), profile))
            radii = {name: short[name].rad[rows] + long[name].rad[rows, inner] for name in short}
            law = f"padding on the {side}, batch {len(case.token_ids[rows])}"
            within(law, made, alone, case, radii, profile)


def unseen_tokens(model: Model, case: Case, reference: Reference, profile: Profile) -> None:
    """A token that sees some others in no layer, not through others either, is the same to the bit whatever they are.

    Causality is this law for the tokens behind one.
    """
    b, n = case.token_ids.shape
    reached = case.keys | np.eye(n, dtype=bool)
    for _ in range(case.config.layers):
        reached = (reached.astype(int) @ reached.astype(int)) > 0
    found = run(model, case, profile)
    later = np.arange(n) >= np.array([[n // 2]])
    for changed in (~case.real, later & (case.visible != "bidirectional"), later[:, ::-1] & (case.segments == 1)):
        changed = np.broadcast_to(changed, (b, n))
        blind = ~(reached & changed[:, None, :]).any(axis=-1)
        ids = np.where(changed, (case.token_ids + 1) % case.config.vocab_size, case.token_ids)
        for name, one, other in zip(_names(found), run(model, case.with_(token_ids=ids), profile), found, strict=True):
            # NaN is not equal to itself, and is no answer.
            differ = ~(one == other).all(axis=-1) & blind
            if differ.any():
                _numbers("unseen_tokens", name, one, other, case, profile)
                index = [int(i) for i in np.argwhere(differ)[0]]
                raise LawFailed(
                    f"{case.name} law unseen_tokens ({profile}): {name}{index} depends on the ids of tokens "
                    f"{np.flatnonzero(changed[index[0]]).tolist()}, none of which it sees"
                )


def positions_shift(model: Model, case: Case, reference: Reference, profile: Profile) -> None:
    """Positions further on or back, by a number for each row, change nothing: only differences enter."""
    moved = case.with_(positions=case.places + np.resize(FAR, (len(case.token_ids), 1)))
    due = finished(reference, moved, profile)
    radii = {name: ball.rad + due[name].rad for name, ball in finished(reference, case, profile).items()}
    within("positions_shift", run(model, moved, profile), run(model, case, profile), case, radii, profile)


def bare(model: Model, case: Case, reference: Reference, profile: Profile) -> None:
    """Without mask, without segments, and of twenty-four ids alone, results are right: no mode hangs on an input."""
    _right("bare, without mask", model, case.with_(mask=None), reference, profile)
    _right("bare, without segments", model, case.with_(segment_ids=None), reference, profile)
    _right("bare, 24 ids alone", model, ids_alone(case), reference, profile)


def ids_alone(case: Case) -> Case:
    """Five texts of twenty-four ids, eight whole chunks of three, and nothing else: more than a window of sixteen."""
    ids = Draw(f"{case.name}/alone").integers((5, 24), 0, case.config.vocab_size - 1)
    return case.with_(token_ids=ids, segment_ids=None, mask=None, positions=None)


def placed(model: Model, case: Case, reference: Reference, profile: Profile) -> None:
    """At positions that are told of every row, results are right, in every mode."""
    places = Draw(f"{case.name}/placed").integers(case.token_ids.shape, 0, 50)
    _right("placed", model, case.with_(positions=places), reference, profile)


def large_scores(model: Model, case: Case, reference: Reference, profile: Profile) -> None:
    """Queries and keys 256 times as large, some of them hidden, give what the formula gives: no score is clipped."""
    names = ("w_q", "b_q", "w_k", "b_k", "gamma", "gamma_q", "gamma_k")
    large = {name: 256 * array if name.endswith(names) else array for name, array in case.weights.items()}
    _right("large_scores", model, case.with_(weights=large, mask=MASK), reference, profile)


def fine_weights(model: Model, case: Case, reference: Reference, profile: Profile) -> None:
    """Weights of twenty bits give what they give: none is rounded to sixteen. Sixteen bits do not hold them."""
    if profile.sixteen_bit:
        return
    draw = Draw(f"{case.name}/fine")
    fine = {name: array + draw.grid(*array.shape, exponent=-20) for name, array in case.weights.items()}
    _right("fine_weights", model, case.with_(weights=fine), reference, profile)


def eleven_layers(model: Model, case: Case, reference: Reference, profile: Profile) -> None:
    """Of eleven layers that are the first but for what they add, layer 2 comes before layer 10, whatever text says."""
    if profile.dtype != "float64":
        # Bounds widen from layer to layer.
        return
    added, shares = ("w_o", "b_o", "w_out", "b_out"), {2: 1.0, 10: -1.0}
    held = {name: array for name, array in case.weights.items() if not name.startswith("layers.")}
    for name, array in case.weights.items():
        if name.startswith("layers.0."):
            for i in range(11):
                share = shares.get(i, 0.0) if name.endswith(added) else 1.0
                held[name.replace("layers.0.", f"layers.{i}.")] = share * array
    deep = case.with_(config=replace(case.config, layers=11), weights=held)
    _right("eleven_layers", model, deep, reference, profile)


def results_stay(model: Model, case: Case, reference: Reference, profile: Profile) -> None:
    """What a call has returned is the caller's: no later call writes it, and none gives it out again."""
    kept: list[tuple[Any, ...]] = []

    def keeping(*inputs: Any, **options: Any) -> tuple[Any, ...]:
        kept.append(tuple(model(*inputs, **options)))
        return kept[-1]

    found = run(keeping, case, profile)
    run(model, case.rows(slice(None, None, -1)), profile)
    unchanged(kept[0], found, case, profile)
    overwrite(np.asarray(result) for result in kept[0])
    _equal("results_stay", run(model, case, profile), found, case, reference, profile)


def segments_enter(model: Model, case: Case, reference: Reference, profile: Profile) -> None:
    """Another segment for every token moves some result of every row by more than rounding does."""
    moved = case.with_(segment_ids=(case.segments + 1) % case.config.segments)
    still = np.ones(len(case.token_ids), bool)
    due = zip(expected(reference, moved, profile), expected(reference, case, profile), strict=True)
    found = run(model, moved, profile), run(model, case, profile)
    for one, other, balls in zip(*found, due, strict=True):
        change = np.abs(one - other) > balls[0].rad + balls[1].rad
        still &= ~change.any(axis=(1, 2))
    if still.any():
        for name, one, other in zip(_names(found[0]), *found, strict=True):
            _numbers("segments_enter", name, one, other, case, profile)
        raise LawFailed(f"{case.name}: nothing of rows {np.flatnonzero(still).tolist()} depends on segment_ids")


def prefix(model: Model, case: Case, reference: Reference, profile: Profile) -> None:
    """The first tokens of a causal text alone, one, a few and most of them, give what they give in the whole."""
    if case.visible != "causal":
        return
    whole, due = run(model, case, profile), finished(reference, case, profile)
    for count in (1, 4, case.token_ids.shape[1] - 2):
        begun = case.tokens(0, count)
        radii = {
            name: ball.rad + due[name].rad[:, :count] for name, ball in finished(reference, begun, profile).items()
        }
        until = tuple(array[:, :count] for array in whole)
        within(f"prefix, {count} tokens", run(model, begun, profile), until, case, radii, profile)


# Those of a step stand in _streams.py.
LAWS = (
    padding, unseen_tokens, positions_shift, bare, placed, one_by_one, batch_permutes, segments_enter, prefix,
    large_scores, fine_weights, eleven_layers, results_stay,
)  # fmt: skip
# The cases that a run of the judge holds a law against; the tests hold it against all.
# fmt: off
TELLING: dict[str, tuple[str, ...]] = {
    "padding": ("padded", "rows without tokens"),
    "right_padding": ("padded", "rows without tokens"),
    "unseen_tokens": ("padded", "causal", "unilm"),
    "positions_shift": ("one layer", "padded"),
    "bare": ("no segment ids", "causal", "article", "paper", "lucidrains"),
    "placed": ("causal", "unilm", "unilm, segments in turn"),
    "one_by_one": ("padded", "positions of every row"),
    "batch_permutes": ("padded",),
    "segments_enter": ("padded",),
    "prefix": ("causal",),
    "large_scores": ("one layer",),
    "fine_weights": ("one layer",),
    "eleven_layers": ("one layer",),
    "results_stay": ("padded",),
    # Every convention that a step may take for another.
    "streamed": (
        "causal", "large epsilon", "activation silu", "positions of every row",
        "article, causal", "paper, causal", "lucidrains, causal", "one chunk", "constant, causal",
    ),
    "branched": ("causal",),
    "floors_meet": ("one layer",),
}
# fmt: on


def _padded(case: Case, before: int, behind: int) -> Case:
    """Hidden tokens with ids, segments and positions of their own around every row."""
    b = len(case.token_ids)
    draw = Draw(f"{case.name}/padding/{before}/{behind}")

    def around(array: np.ndarray, size: int) -> np.ndarray:
        return np.concatenate(
            [draw.integers((b, before), 0, size - 1), array, draw.integers((b, behind), 0, size - 1)], axis=1
        )

    places = case.positions
    return case.with_(
        token_ids=around(case.token_ids, case.config.vocab_size),
        segment_ids=around(case.segments, case.config.segments),
        mask=np.pad(case.real, ((0, 0), (before, behind))),
        positions=None if places is None else around(np.broadcast_to(places, case.token_ids.shape), 50),
    )


def _names(results: tuple[np.ndarray, ...]) -> list[str]:
    return ["logits", *(f"x_{i}" for i in range(len(results) - 1))]


def _equal(
    law: str, found: tuple[np.ndarray, ...], due: tuple[np.ndarray, ...], case: Case, reference: Reference, profile: Any
) -> None:
    # Either run may err by the radius.
    radii = {name: 2 * ball.rad for name, ball in finished(reference, case, profile).items()}
    within(law, found, due, case, radii, profile)


def _right(law: str, model: Model, case: Case, reference: Reference, profile: Profile) -> None:
    """Raise LawFailed unless a model gives what the reference does."""
    found, due = run(model, case, profile), finished(reference, case, profile)
    radii = {name: ball.rad for name, ball in due.items()}
    within(law, found, tuple(ball.value for ball in due.values()), case, radii, profile)


def within(
    law: str, found: tuple[np.ndarray, ...], due: tuple[np.ndarray, ...], case: Case, radii: Any, profile: Any
) -> None:
    for (name, radius), one, other in zip(radii.items(), found, due, strict=True):
        error = np.nan_to_num(np.abs(one - other), nan=np.inf)
        beyond = error > radius
        if beyond.any():
            index = tuple(int(i) for i in np.argwhere(beyond)[0])
            _numbers(law, name, one, other, case, profile)
            raise LawFailed(
                f"{case.name} law {law} ({profile}): {name}{list(index)}={one[index]:.6g}, should be "
                f"{other[index]:.6g} within {radius[index]:.2g}; {int(beyond.sum())} of {beyond.size} differ"
            )


def _numbers(law: str, name: str, one: np.ndarray, other: np.ndarray, case: Case, profile: Any) -> None:
    """Raise LawFailed with clear words where a law is broken by NaN."""
    for array in (one, other):
        if (strange := np.isnan(array)).any():
            index = [int(i) for i in np.argwhere(strange)[0]]
            raise LawFailed(
                f"{case.name} law {law} ({profile}): {name}{index} is nan, expected a number; {int(strange.sum())} of "
                f"{strange.size} are nan"
            )


# Parts of the references.
def embedded(a: Arithmetic, case: Case) -> Ball:
    """The sum of a token's vector and its segment's."""
    token, segment = (a.exact(case.weights[f"embedding.{name}"]) for name in ("token", "segment"))
    return (token[case.token_ids] + segment[case.segments]).stored()


def embed(a: Arithmetic, case: Case) -> Ball:
    """The normalised sum of a token's vector and its segment's."""
    return norm.rms_norm(a, embedded(a, case), case.config.epsilon)


def layer_of(a: Arithmetic, case: Case, index: int) -> dict[str, Ball]:
    """The weights of one layer."""
    prefix = f"layers.{index}."
    return {k.removeprefix(prefix): a.exact(w) for k, w in case.weights.items() if k.startswith(prefix)}


def self_attention(a: Arithmetic, case: Case, x: Ball, w: Mapping[str, Ball]) -> Ball:
    """Softmax attention over the keys of the case, queries and keys turned by neighbouring pairs."""
    names = [f"{kind}_{name}" for name in "qkvo" for kind in "wb"]
    return attention.multi_head_attention(
        a, x, case.keys[:, None], case.places, **{name: w.get(f"attention.{name}") for name in names},
        heads=case.config.heads, layout="interleaved", base=case.config.rotary_base, kernel="softmax",
    ).stored()  # fmt: skip


def feed_forward(a: Arithmetic, case: Case, x: Ball, w: Mapping[str, Ball]) -> Ball:
    """Two dense layers around the activation."""
    inner = affine(x, w["feed_forward.w_in"], w.get("feed_forward.b_in")).stored()
    inner = activated(a, case, inner)
    return affine(inner, w["feed_forward.w_out"], w.get("feed_forward.b_out")).stored()


def activated(a: Arithmetic, case: Case, x: Ball) -> Ball:
    """The activation that the Config names."""
    return getattr(activation, case.config.activation)(a, x).stored()


# Inputs. Real tokens: all; left and right padding; holes; none. Ids of padding are ids like any other.
MASK = np.array([[1] * 11, [0] * 4 + [1] * 7, [1] * 6 + [0] * 5, [1, 0, 1, 1, 0, 1, 0, 0, 0, 1, 1]], dtype=bool)
MASK_NONE = np.array([[0] * 11, [1] + [0] * 10, [0] * 10 + [1], [1] * 2 + [0] * 9], dtype=bool)


def batch(draw: Draw, config: Any, mask: np.ndarray | None, *, segments: bool = True) -> dict[str, Any]:
    """Four rows of eleven tokens."""
    ids = draw.integers((4, 11), 0, config.vocab_size - 1)
    return {
        "token_ids": ids,
        "segment_ids": draw.integers((4, 11), 0, config.segments - 1) if segments else None,
        "mask": mask,
    }


# The batches of encoders by name: mask, whether there are segment ids, changes of the Config, further inputs.
CONTIGUOUS = (np.arange(11) >= np.array([[5], [8], [2], [0]])).astype(np.int64)
# fmt: off
ENCODER_BATCHES: dict[str, tuple[np.ndarray | None, bool, dict[str, Any], dict[str, Any]]] = {
    "one layer": (None, True, {"layers": 1}, {}),
    "padded": (MASK, True, {"layers": 3}, {}),
    "rows without tokens": (MASK_NONE, True, {}, {}),
    "no segment ids": (MASK, False, {}, {}),
    "one head": (MASK, True, {"heads": 1, "hidden_size": 36, "embedding_size": 36, "layers": 1}, {}),
    "narrow embedding": (MASK, True, {"embedding_size": 5}, {}),
    "three heads, wide embedding": (
        MASK, True, {"embedding_size": 13, "hidden_size": 12, "heads": 3, "layers": 1, "intermediate_size": 7}, {},
    ),
    "causal": (MASK, True, {}, {"visible": "causal"}),
    "unilm": (MASK, True, {"segments": 2}, {"visible": "unilm", "segment_ids": CONTIGUOUS}),
    "unilm, segments in turn": (None, True, {"segments": 2}, {"visible": "unilm"}),
    "positions": (MASK, True, {}, {"positions": 3 * np.arange(11)[::-1] + 100}),
    "positions of every row": (MASK, True, {}, {"positions": Draw("positions").integers((4, 11), 0, 50)}),
    "large epsilon": (MASK, True, {"epsilon": 0.25, "rotary_base": 10.0}, {"visible": "causal"}),
    "activation gelu_erf": (MASK, True, {"activation": "gelu_erf"}, {}),
    "activation gelu_tanh": (MASK, True, {"activation": "gelu_tanh"}, {}),
    "activation relu": (MASK, True, {"activation": "relu"}, {}),
    "activation silu": (MASK, True, {"activation": "silu"}, {"visible": "causal"}),
}
# fmt: on


def encoder_cases(
    model: str, make: Callable[..., Any], shapes: Callable[[Any], Mapping[str, tuple[int, ...]]], **constants: Any
) -> list[Case]:
    """A case of every batch; what a batch does not change is one of the constants."""
    sizes = {"vocab_size": 29, "segments": 3, "embedding_size": 8, "hidden_size": 8, "layers": 2, "heads": 2}
    common = {**sizes, "intermediate_size": 5, "epsilon": 2.0**-40, "rotary_base": 10000.0, **constants}
    made = []
    for name, (mask, segments, changes, inputs) in ENCODER_BATCHES.items():
        config = make(**{**common, **changes})
        draw = Draw(f"{model}/{name}")
        weights = weights_of(draw, shapes(config), _step)
        made.append(Case(name, config, weights, **{**batch(draw, config, mask, segments=segments), **inputs}))
    return made


def _step(name: str) -> int:
    """Bounds grow with every layer: its dense layers are small. The head's is not: both forms of gelu must be told."""
    if name.startswith(("embedding.token", "embedding.segment", "mlm.transform.kernel")) or name.endswith("scale"):
        return -7
    return -9 if name.endswith(("kernel", "w_q", "w_k", "w_v", "w_o", "w_out")) else -8


# Wrong models that need nothing but the right one.
def layers_swapped(forward: Model, weights: Any, *arguments: Any, config: Any, **options: Any) -> Any:
    """Layers 0 and 1 in each other's place."""
    if config.layers < 2:
        return forward(weights, *arguments, config=config, **options)
    other = {"0": "1", "1": "0"}
    parts = {name: name.split(".") for name in weights}
    renamed = {n: ".".join([p[0], other.get(p[1], p[1]), *p[2:]]) for n, p in parts.items()}
    return forward({renamed[name]: array for name, array in weights.items()}, *arguments, config=config, **options)


def segments_dropped(
    forward: Model, weights: Any, token_ids: Any, segment_ids: Any, *arguments: Any, config: Any, **options: Any
) -> Any:
    """Every token in segment 0."""
    return forward(weights, token_ids, None, *arguments, config=config, **options)


def weights_changed(forward: Model, name: str, value: float, weights: Any, *arguments: Any, **options: Any) -> Any:
    """All weights of this name, in every layer, replaced by a number."""
    changed = {key: np.full_like(array, value) for key, array in weights.items() if f".{key}".endswith(f".{name}")}
    return forward({**weights, **changed}, *arguments, **options)


def tied(
    w: Any, states: list[np.ndarray], config: Any, *, of: int = -1,
    table: Callable[[np.ndarray], np.ndarray] = lambda table: table.T,
) -> np.ndarray:  # fmt: skip
    """The logits of the tied head behind vectors as wide as the table."""
    return states[of] @ table(np.asarray(w["embedding.token"], np.float64))


# What may be wrong in the tied head, by the arguments of `tied`.
WRONG_TIED: dict[str, dict[str, Any]] = {
    "table read as (in, out)": {"table": lambda table: table.reshape(table.shape[::-1])},
    "table not tied": {"table": lambda table: Draw("untied").grid(*table.shape[::-1], exponent=-7)},
    "logits of the layer before the last": {"of": -2},
}


def probabilities(forward: Model, *inputs: Any, **options: Any) -> Any:
    """Softmax of an encoder's logits in their place."""
    logits, *states = forward(*inputs, **options)
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (shifted / shifted.sum(axis=-1, keepdims=True), *states)


# Wrong encoders: plain NumPy and the operators of the specification, with openings for whatever is wrong.
VISIBLE = {"bidirectional": spec.bidirectional, "causal": spec.causal, "unilm": spec.unilm}
Function = Callable[..., Any]


def encoded(
    weights: Any, token_ids: Any, segment_ids: Any, mask: Any, positions: Any, *, config: Any, visible: str,
    embed: Function, layer: Function, logits: Function, see: Function = lambda mask, segments, ids, seen: seen,
    place: Function = lambda positions, mask, given: positions,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """An encoder of an embedding, a layer and a masked-language head."""
    weights = {name: np.float64(array) for name, array in weights.items()}
    segments = np.zeros_like(token_ids) if segment_ids is None else segment_ids
    mask = np.ones(token_ids.shape, bool) if mask is None else mask
    keys = see(mask, segments, token_ids, VISIBLE[visible](mask, segments))
    places = place(np.arange(token_ids.shape[1]) if positions is None else positions, mask, positions is not None)
    states = [embed(weights, token_ids, segments, config)]
    for index in range(config.layers):
        states.append(layer(spec.layer_of(weights, index), states[-1], index, keys, places, config))
    return (logits(weights, states, config), *states)


def wrong_layer(
    w: Any, x: np.ndarray, index: int, keys: np.ndarray, places: np.ndarray, config: Any, *, norm: Function,
    order: Function | None = None, activation: str | None = None,
    place: Function = lambda places, index: places, **attention: Any,
) -> np.ndarray:  # fmt: skip
    """A layer whose sublayers, norms and their order may be wrong."""

    def attend(y: np.ndarray) -> np.ndarray:
        return wrong_attention(w, y, keys, place(places, index), config, **attention)

    def feed(y: np.ndarray) -> np.ndarray:
        inner = y @ w["feed_forward.w_in"] + w.get("feed_forward.b_in", 0)
        inner = spec.ACTIVATIONS[activation or config.activation](inner)
        return inner @ w["feed_forward.w_out"] + w.get("feed_forward.b_out", 0)

    def first(y: np.ndarray) -> np.ndarray:
        return norm(w, "attention_norm", y, config)

    def second(y: np.ndarray) -> np.ndarray:
        return norm(w, "feed_forward_norm", y, config)

    return (order or _post_norm)(x, attend, feed, first, second)


def _heads_first(y: np.ndarray, heads: int) -> np.ndarray:
    return y.reshape(*y.shape[:-1], heads, -1)


def heads_last(y: np.ndarray, heads: int) -> np.ndarray:
    """Head 0 takes every h-th column."""
    return y.reshape(*y.shape[:-1], -1, heads).swapaxes(-1, -2)


def wrong_attention(
    w: Any, x: np.ndarray, keys: np.ndarray, places: np.ndarray, config: Any, *,
    rotate: Function = rope.rotate_interleaved, turned: str = "qk", base: float | None = None,
    split: Function = _heads_first, join: Function = lambda o: o.reshape(*o.shape[:-2], -1),
    width: Function = lambda config: config.key_size, kernel: Function = attention_kernel.softmax,
) -> np.ndarray:  # fmt: skip
    """Attention whose rotation, heads, scale and kernel may be wrong."""
    angles = rope.angles(places, rope.frequencies(config.key_size, base=base or config.rotary_base))[..., None, :]
    parts = {}
    for name in "qkv":
        y = split(x @ w[f"attention.w_{name}"] + w.get(f"attention.b_{name}", 0), config.heads)
        parts[name] = rotate(y, angles) if name in turned else y
    scores = np.einsum("bnhd,bmhd->bhnm", parts["q"], parts["k"]) / np.sqrt(width(config))
    o = np.einsum("bhnm,bmhd->bnhd", kernel(scores, keys[:, None]), parts["v"])
    return join(o) @ w["attention.w_o"] + w.get("attention.b_o", 0)


def _post_norm(x: Any, attend: Function, feed: Function, first: Function, second: Function) -> Any:
    middle = first(x + attend(x))
    return second(middle + feed(middle))


def _pre_norm(x: Any, attend: Function, feed: Function, first: Function, second: Function) -> Any:
    middle = x + attend(first(x))
    return middle + feed(second(middle))


def _norm_of_the_summand(x: Any, attend: Function, feed: Function, first: Function, second: Function) -> Any:
    middle = x + first(attend(x))
    return middle + second(feed(middle))


def _no_first_residual(x: Any, attend: Function, feed: Function, first: Function, second: Function) -> Any:
    middle = first(attend(x))
    return second(middle + feed(middle))


def _no_second_residual(x: Any, attend: Function, feed: Function, first: Function, second: Function) -> Any:
    return second(feed(first(x + attend(x))))


def _no_first_norm(x: Any, attend: Function, feed: Function, first: Function, second: Function) -> Any:
    middle = x + attend(x)
    return second(middle + feed(middle))


def _no_second_norm(x: Any, attend: Function, feed: Function, first: Function, second: Function) -> Any:
    middle = first(x + attend(x))
    return middle + feed(middle)


def _side_by_side(x: Any, attend: Function, feed: Function, first: Function, second: Function) -> Any:
    return second(first(x + attend(x)) + feed(x))


def _feed_forward_first(x: Any, attend: Function, feed: Function, first: Function, second: Function) -> Any:
    middle = first(x + feed(x))
    return second(middle + attend(middle))


def exchanged_norms(x: Any, attend: Function, feed: Function, first: Function, second: Function) -> Any:
    return _post_norm(x, attend, feed, second, first)


def _uniform_where_nothing(scores: np.ndarray, keys: np.ndarray) -> np.ndarray:
    return attention_kernel.softmax(scores, keys | ~keys.any(axis=-1, keepdims=True))


def _by_queries(mask: np.ndarray, segments: Any, ids: Any, seen: Any) -> np.ndarray:
    return np.broadcast_to(mask[:, :, None], (*mask.shape, mask.shape[1]))


def _from_mask(positions: np.ndarray, mask: np.ndarray, given: bool) -> np.ndarray:
    return np.maximum(mask.cumsum(axis=-1) - 1, 0) if not given else positions


# What may be wrong in the layers of every encoder with heads, by the arguments of `wrong_layer`.
WRONG_LAYERS: dict[str, dict[str, Any]] = {
    "norms before the sublayers": {"order": _pre_norm},
    "norms before the sums": {"order": _norm_of_the_summand},
    "no residual around the attention": {"order": _no_first_residual},
    "no residual around the feed-forward": {"order": _no_second_residual},
    "first norm missing": {"order": _no_first_norm},
    "second norm missing": {"order": _no_second_norm},
    "feed-forward beside the attention": {"order": _side_by_side},
    "feed-forward before the attention": {"order": _feed_forward_first},
    "relu for every activation": {"activation": "relu"},
    "gelu_erf for every activation": {"activation": "gelu_erf"},
    "gelu_tanh for every activation": {"activation": "gelu_tanh"},
    "positions off by one behind the first, in layer 1": {
        # A shift of all positions would change nothing: only differences enter.
        "place": lambda places, index: np.where(places > places.min(), places - 1, places) if index == 1 else places
    },
    "positions backwards in layer 0": {"place": lambda places, index: -places if index == 0 else places},
    "no rotation": {"turned": ""},
    "queries rotated only": {"turned": "q"},
    "values rotated too": {"turned": "qkv"},
    "half-split rotation": {"rotate": rope.rotate_half_split},
    "rotary base fixed to 10000": {"base": 10000.0},
    "heads in every h-th column": {"split": heads_last},
    "heads joined feature by feature": {"join": lambda o: o.swapaxes(-1, -2).reshape(*o.shape[:-2], -1)},
    "scores not divided": {"width": lambda config: 1},
    "scores divided by the root of hidden_size": {"width": lambda config: config.hidden_size},
    "everything where nothing is seen": {"kernel": _uniform_where_nothing},
}
# What may be wrong with the keys that are seen and with the positions, by the arguments of `encoded`.
WRONG_INPUTS: dict[str, dict[str, Any]] = {
    "padded keys visible": {"see": lambda mask, segments, ids, seen: seen | ~mask[:, None, :]},
    "the mask of the first row for all": {
        "see": lambda mask, segments, ids, seen: np.broadcast_to(seen[:1], seen.shape)
    },
    "queries hidden in the place of keys": {"see": _by_queries},
    "every real key visible": {"see": lambda mask, segments, ids, seen: mask[:, None, :]},
    "causal in every mode": {"see": lambda mask, segments, ids, seen: spec.causal(mask, segments)},
    "no token sees itself": {"see": lambda mask, segments, ids, seen: seen & ~np.eye(mask.shape[1], dtype=bool)},
    "id 0 hidden": {"see": lambda mask, segments, ids, seen: seen & (ids != 0)[:, None, :]},
    "given positions ignored": {"place": lambda positions, mask, given: np.arange(mask.shape[1])},
    "positions of the first row for all": {
        "place": lambda positions, mask, given: positions.reshape(-1, mask.shape[1])[0]
    },
    "positions count real tokens only": {"place": _from_mask},
}
