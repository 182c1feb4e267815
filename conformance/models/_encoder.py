"""What judging one model shares with judging another: cases, bounds, laws, and parts of the references.

A model under judgement is a function with the arguments of the specification's forward, model(weights, token_ids,
segment_ids, mask, config=config) -> (logits, embedding, hidden), which takes weights in the format of the profile.
Laws are plain functions over a model, a case and the bounds of that model's reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from conformance.budget import Arithmetic, Ball, Profile
from conformance.case import storage_type
from conformance.generate import Draw
from conformance.law import LawFailed
from conformance.ops import head, norm, pooling

Model = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """A tiny model and a batch for it. Weights are dyadic: every storage format holds them exactly."""

    name: str
    config: Any
    weights: Mapping[str, np.ndarray] = field(repr=False)
    token_ids: np.ndarray
    segment_ids: np.ndarray | None = None
    mask: np.ndarray | None = None

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)

    @property
    def real(self) -> np.ndarray:
        """Which tokens are real."""
        return np.ones(self.token_ids.shape, bool) if self.mask is None else self.mask

    def rows(self, index: Any) -> Case:
        """The case of some rows of the batch."""
        chosen = {n: getattr(self, n) for n in ("token_ids", "segment_ids", "mask")}
        return self.with_(**{n: None if a is None else np.ascontiguousarray(a[index]) for n, a in chosen.items()})


class Expected(NamedTuple):
    """The results of a model with their radii, and the hidden state before and after every layer."""

    logits: Ball
    embedding: Ball
    hidden: Ball
    states: tuple[Ball, ...]


Reference = Callable[[Arithmetic, Case], Expected]
OUTPUTS = Expected._fields[:3]


def weights_of(draw: Draw, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Weights in steps of 2^-7: scales and gammas around 1, everything else around 0."""
    made = {}
    for name, shape in shapes.items():
        near_one = name.endswith("scale") or "gamma" in name
        low, high = (64, 160) if near_one else (-95, 95)
        made[name] = draw.grid(*shape, low=low, high=high, exponent=-7)
    return made


def run(model: Model, case: Case, profile: Profile) -> tuple[np.ndarray, ...]:
    """What a model returns on a case, as float64."""
    target = storage_type(profile.dtype)
    weights = {name: array.astype(target) for name, array in case.weights.items()}
    made = model(weights, case.token_ids, case.segment_ids, case.mask, config=case.config)
    return tuple(np.asarray(array, np.float64) for array in made)


def expected(reference: Reference, case: Case, profile: Profile) -> tuple[Ball, ...]:
    """Logits, embedding and hidden as they should be, the rounding of the output included."""
    return tuple(ball.finished() for ball in reference(Arithmetic(profile), case)[:3])


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
def right_padding(model: Model, case: Case, reference: Reference, profile: Profile) -> None:
    """Five padded tokens behind every row, with ids of their own, change nothing on the rest."""
    b, n = case.token_ids.shape
    draw = Draw(f"{case.name}/padding")

    def behind(array: np.ndarray, size: int) -> np.ndarray:
        return np.concatenate([array, draw.integers((b, 5), 0, size - 1)], axis=1)

    segments = np.zeros_like(case.token_ids) if case.segment_ids is None else case.segment_ids
    longer = case.with_(
        token_ids=behind(case.token_ids, case.config.vocab_size),
        segment_ids=behind(segments, case.config.segments),
        mask=np.concatenate([case.real, np.zeros((b, 5), bool)], axis=1),
    )
    logits, embedding, hidden = run(model, longer, profile)
    _equal("right_padding", (logits, embedding, hidden[:, :n]), run(model, case, profile), case, reference, profile)


def one_by_one(model: Model, case: Case, reference: Reference, profile: Profile) -> None:
    """Every row of the batch alone gives what it gives in the batch."""
    alone = [run(model, case.rows(slice(i, i + 1)), profile) for i in range(len(case.token_ids))]
    together = tuple(np.concatenate(parts) for parts in zip(*alone, strict=True))
    _equal("one_by_one", together, run(model, case, profile), case, reference, profile)


def batch_permutes(model: Model, case: Case, reference: Reference, profile: Profile) -> None:
    """The batch backwards gives the results backwards."""
    backwards = tuple(array[::-1] for array in run(model, case.rows(slice(None, None, -1)), profile))
    _equal("batch_permutes", backwards, run(model, case, profile), case, reference, profile)


def segments_matter(model: Model, case: Case, reference: Reference, profile: Profile) -> None:
    """Another segment for every token moves the logits of every row with a real token, by more than rounding does."""
    segments = np.zeros_like(case.token_ids) if case.segment_ids is None else case.segment_ids
    moved = case.with_(segment_ids=(segments + 1) % case.config.segments)
    change = np.abs(run(model, moved, profile)[0] - run(model, case, profile)[0])
    rounding = sum(expected(reference, c, profile)[0].rad for c in (moved, case))
    still = ~(change > rounding).any(axis=-1) & case.real.any(axis=-1)
    if still.any():
        raise LawFailed(
            f"{case.name}: the logits of rows {np.flatnonzero(still).tolist()} do not depend on segment_ids"
        )


LAWS = (right_padding, one_by_one, batch_permutes, segments_matter)


def _equal(
    law: str, found: tuple[np.ndarray, ...], due: tuple[np.ndarray, ...], case: Case, reference: Reference, profile: Any
) -> None:
    for name, one, other, ball in zip(OUTPUTS, found, due, expected(reference, case, profile), strict=True):
        error = np.nan_to_num(np.abs(one - other), nan=np.inf)
        # Either run may err by the radius.
        beyond = error > 2 * ball.rad
        if beyond.any():
            index = tuple(int(i) for i in np.argwhere(beyond)[0])
            raise LawFailed(
                f"{case.name} law {law} ({profile}): {name}{list(index)}={one[index]:.6g}, should be "
                f"{other[index]:.6g} within {2 * ball.rad[index]:.2g}; {int(beyond.sum())} of {beyond.size} differ"
            )


# Parts of the references.
def embed(a: Arithmetic, case: Case) -> Ball:
    """The normalised sum of a token's vector and its segment's."""
    segments = np.zeros_like(case.token_ids) if case.segment_ids is None else case.segment_ids
    token, segment = (a.exact(case.weights[f"embedding.{name}"]) for name in ("token", "segment"))
    return norm.rms_norm(a, (token[case.token_ids] + segment[segments]).stored(), case.config.epsilon)


def layer_of(a: Arithmetic, case: Case, index: int) -> dict[str, Ball]:
    """The weights of one layer."""
    prefix = f"layers.{index}."
    return {k.removeprefix(prefix): a.exact(w) for k, w in case.weights.items() if k.startswith(prefix)}


def classified(a: Arithmetic, case: Case, hidden: Ball, states: list[Ball]) -> Expected:
    """The mean of the real tokens, and the classes' logits of it."""
    kernel, bias = (a.exact(case.weights[f"classifier.{name}"]) for name in ("kernel", "bias"))
    embedding = pooling.masked_mean(a, hidden, case.real)
    return Expected(head.classify(a, embedding.stored(), kernel, bias), embedding, hidden, tuple(states))


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


# Wrong models that need nothing but the right one.
def layers_swapped(forward: Model, weights: Any, *arguments: Any, config: Any) -> Any:
    """Layers 0 and 1 in each other's place."""
    if config.layers < 2:
        return forward(weights, *arguments, config=config)
    other = {"0": "1", "1": "0"}
    parts = {name: name.split(".") for name in weights}
    renamed = {n: ".".join([p[0], other.get(p[1], p[1]), *p[2:]]) for n, p in parts.items()}
    return forward({renamed[name]: array for name, array in weights.items()}, *arguments, config=config)


def segments_dropped(forward: Model, weights: Any, token_ids: Any, segment_ids: Any, mask: Any, *, config: Any) -> Any:
    """Every token in segment 0."""
    return forward(weights, token_ids, None, mask, config=config)


def bias_dropped(forward: Model, weights: Any, *arguments: Any, config: Any) -> Any:
    """Logits without the classifier's bias."""
    zero = np.zeros_like(weights["classifier.bias"])
    return forward({**weights, "classifier.bias": zero}, *arguments, config=config)
