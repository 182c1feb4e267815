"""Causal texts read piece by piece: what the judge's own steps are, the laws of a step, and the known wrong steps.

`streamed`: a text in pieces gives what it gives in the whole. `branched`: a step leaves the state that it is given as
it was, so that texts which go on from one state give what each of them gives alone. Both read a Stream, by which the
step that breaks one of them is compared with the wrong ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from conformance.budget import Ball, Profile
from conformance.models._encoder import (
    INPUTS,
    Case,
    Model,
    Reference,
    Streaming,
    finished,
    ids_alone,
    run,
    unchanged,
    within,
)
from refimpl.models import _encoder as spec

# The state of some texts before their first token.
Begin = Callable[..., spec.State]
# Of a state of no token, the states before and after a step, and the Config: what is kept.
Change = Callable[..., spec.State]
# Of two states of the judge's own steps, one that all continuations share and one of this text: the state to be read.
Read = Callable[[spec.State, spec.State], spec.State]


@dataclass(frozen=True)
class Stream:
    """A text of every row of a batch, read piece by piece; or some continuations of it, read in turn.

    told: a case that holds all tokens. rows: those of each continuation. pieces: how many tokens at a time, of each.
    The first piece is common to all: it is read once, and every continuation goes on from the state behind it.
    once: the inputs that the first piece alone is told; of all others the case holds what holds without them.
    """

    told: Case
    rows: tuple[slice, ...]
    pieces: tuple[tuple[int, ...], ...]
    once: tuple[str, ...] = ()

    def found(self, model: Any, profile: Profile) -> tuple[np.ndarray, ...]:
        """What the step of a model gives, or a model without one in the whole: one continuation below the other."""
        if hasattr(model, "step"):
            texts = [self.told.rows(rows) for rows in self.rows]
            return in_turn(model, texts, self.pieces, profile, once=self.once)
        return tuple(array[self._rows] for array in run(model, self.told, profile))

    def due(self, model: Any, profile: Profile) -> tuple[np.ndarray, ...]:
        """What it is to be: what a model gives in the whole; of several continuations, what each gives alone."""
        if len(self.rows) == 1:
            return tuple(array[self._rows] for array in run(model, self.told, profile))
        pairs = zip(self.rows, self.pieces, strict=True)
        alone = [in_pieces(model, self.told.rows(rows), pieces, profile) for rows, pieces in pairs]
        return tuple(np.concatenate(parts) for parts in zip(*alone, strict=True))

    def expected(self, reference: Reference, profile: Profile) -> dict[str, Ball]:
        """The results of a right model."""
        return {name: ball[self._rows] for name, ball in finished(reference, self.told, profile).items()}

    def hold(self, model: Any, reference: Reference, profile: Profile) -> None:
        """Raise LawFailed unless the step gives what is due; either run may err by the radius."""
        due, found = self.due(model, profile), self.found(model, profile)
        radii = {name: 2 * ball.rad for name, ball in self.expected(reference, profile).items()}
        law = f"streamed in pieces of {', '.join(map(str, self.pieces[0]))}"
        if self.once:
            law += f", {', '.join(self.once)} told with the first alone"
        if len(self.rows) > 1:
            law = f"branched, {len(self.rows)} texts that go on from one state, which no step may change"
        within(law, found, due, self.told, radii, profile)

    @property
    def _rows(self) -> np.ndarray:
        every = np.arange(len(self.told.token_ids))
        return np.concatenate([every[rows] for rows in self.rows])


def in_pieces(model: Any, case: Case, pieces: Sequence[int], profile: Profile) -> tuple[np.ndarray, ...]:
    """What the step of a model returns for so many tokens at a time, put together, as float64."""
    return in_turn(model, [case], [pieces], profile)


def in_turn(
    model: Any, texts: Sequence[Case], pieces: Sequence[Sequence[int]], profile: Profile, *, once: Sequence[str] = ()
) -> tuple[np.ndarray, ...]:
    """The same for texts with one first piece, which are read in turn from there on; one below the other.

    What steps have returned is to be what it was when the last of them has. Behind the first, none is told what is told
    once.
    """
    first = pieces[0][0]
    returned: list[tuple[Any, tuple[np.ndarray, ...], Case]] = []
    begun, state = _stepped(model, None, texts[0].tokens(0, first), profile, returned)
    states, starts, made = [state] * len(texts), [first] * len(texts), [[begun] for _ in texts]
    rest = [text.with_(**dict.fromkeys(once)) for text in texts]
    for turn in range(1, max(map(len, pieces))):
        for i, text in enumerate(rest):
            if turn < len(pieces[i]):
                stop = starts[i] + pieces[i][turn]
                found, states[i] = _stepped(model, states[i], text.tokens(starts[i], stop), profile, returned)
                made[i].append(found)
                starts[i] = stop
    for results, found, piece in returned:
        unchanged(results, found, piece, profile)
    whole = [[np.concatenate(parts, axis=1) for parts in zip(*found, strict=True)] for found in made]
    return tuple(np.concatenate(parts) for parts in zip(*whole, strict=True))


def _stepped(
    model: Any, state: Any, piece: Case, profile: Profile, returned: list[tuple[Any, tuple[np.ndarray, ...], Case]]
) -> tuple[tuple[np.ndarray, ...], Any]:
    """One step, checked and copied as any call of a model, and the state that it returns.

    returned: the results, their copies and the piece are added to it. A state may share memory with results, so that
    nothing is written into them.
    """
    kept: list[Any] = []

    def step(weights: Any, *inputs: Any, **options: Any) -> Any:
        results, after = model.step(weights, state, *inputs, **options)
        kept.extend((tuple(results), after))
        return kept[0]

    found = run(step, piece, profile)
    returned.append((kept[0], found, piece))
    return found, kept[1]


# Laws.
def streamed(model: Any, case: Case, reference: Reference, profile: Profile) -> None:
    """A causal text through the step of a model, token by token or some at once, gives what it gives in the whole.

    At 0, 1, 2, ... and at positions that are told; in the batch, and one text alone; with every input, with ids alone,
    and with what the first piece alone is told.
    """
    for stream in READ["streamed"](case):
        stream.hold(model, reference, profile)


def branched(model: Any, case: Case, reference: Reference, profile: Profile) -> None:
    """Causal texts that go on from one state, read in turn, give what each of them gives alone.

    Steps of one token, of some and of all that is left have read a state before another step reads it.
    """
    for stream in READ["branched"](case):
        stream.hold(model, reference, profile)


def _in_pieces(case: Case) -> tuple[Stream, ...]:
    n, every, backwards, one = case.token_ids.shape[1], slice(None), slice(None, None, -1), slice(3, 4)
    ragged = (2, 5, 0, n - 7)
    if case.name != "causal":
        # What a step may take from its Config shows in one stream.
        return (Stream(case, (every,), (ragged,)),)
    placed, unmasked = case.with_(positions=3 * np.arange(n)[::-1] + 4090), case.with_(mask=None)
    # As texts are generated: behind a prompt token by token, and further than any window of sixteen.
    generated = ids_alone(case)
    rest = generated.token_ids.shape[1] - 19
    # As padding before a text is stepped over.
    counted = case.with_(positions=np.maximum(case.real.cumsum(axis=-1) - 1, 0))
    # Four tokens that are told of, and behind them some that are real, in segment 0, at 4, 5, ... because nothing is.
    first = np.arange(n) < 4
    begun = case.with_(
        segment_ids=np.where(first, case.segments, 0), mask=case.real | ~first,
        positions=np.where(first, 3 * np.arange(n) + 100, np.arange(n)),
    )  # fmt: skip
    # Every text takes more than one step: in a single one no state is read, and no wrong step shows.
    # The second is cut where no chunk ends. Backwards, the first text has padding.
    return (
        Stream(case, (every,), ((1,) * n,)),
        Stream(placed, (backwards,), (ragged,)),
        Stream(case, (one,), ((4, n - 4),)),
        Stream(generated, (every,), ((0, 17, 1, 1, rest),)),
        Stream(unmasked, (every,), ((n - 1, 1),)),
        Stream(unmasked, (every,), ((3, 0, n - 3),)),
        Stream(counted, (backwards,), ((4, n - 4),)),
        Stream(begun, (every,), ((4, 3, n - 7),), ("segment_ids", "mask", "positions")),
    )


def _continued(case: Case) -> tuple[Stream, ...]:
    """Three texts that differ behind their fourth token, and as many steps from the state there."""
    b, n = case.token_ids.shape
    held = {name: getattr(case, name) for name in INPUTS}
    told = {k: a if a is None or a.ndim == 1 else np.concatenate([a] * 3) for k, a in held.items()}
    other = (np.arange(n) >= 4) * np.repeat(np.arange(3), b)[:, None]
    told["token_ids"] = (told["token_ids"] + other) % case.config.vocab_size
    rows = tuple(slice(i * b, (i + 1) * b) for i in range(3))
    pieces = (4, 1, n - 5), (4, 3, n - 7), (4, n - 4)
    return (Stream(case.with_(**told), rows, pieces),)


def _of_causal(streams: Callable[[Case], tuple[Stream, ...]]) -> Callable[[Case], tuple[Stream, ...]]:
    return lambda case: streams(case) if case.visible == "causal" else ()


LAWS = (streamed, branched)
# What each of them reads of a case.
READ = {"streamed": _of_causal(_in_pieces), "branched": _of_causal(_continued)}


# The judge's own steps.
def step_of(module: Any, head: Any, logits: Callable[..., np.ndarray]) -> Model:
    """The specification's step under a masked-language head, as the judge calls one."""

    def step(weights: Any, state: Any, *inputs: Any, config: Any, visible: str) -> Any:
        state = module.initial_state(config, batch=inputs[0].shape[:-1]) if state is None else state
        states, state = module.step(spec.part(weights, module.shapes(config)), state, *inputs, config=config)
        made = logits(spec.part(weights, head.shapes(config)), states[-1], weights["embedding.token"], config=config)
        return (made, *states), state

    return step


# Wrong steps.
def _wrong_step(
    step: Model, begin: Begin, change: Change, weights: Any, state: Any, *inputs: Any, config: Any, **see: Any
) -> Any:
    """A step that keeps something else."""
    begun = begin(config, batch=inputs[0].shape[:-1])
    made, now = step(weights, state, *inputs, config=config, **see)
    return made, change(begun, begun if state is None else state, now, config)


def _unplaced_step(step: Model, weights: Any, state: Any, *inputs: Any, **options: Any) -> Any:
    return step(weights, state, *inputs[:3], None, **options)


def _shared_step(
    step: Model, begin: Begin, read: Read, weights: Any, state: Any, *inputs: Any, config: Any, **see: Any
) -> Any:
    """A step that writes what it keeps where every other continuation of the text reads it."""
    begun = begin(config, batch=inputs[0].shape[:-1])
    slot, own = ([begun], begun) if state is None else state
    made, now = step(weights, read(slot[0], own), *inputs, config=config, **see)
    slot[0] = now
    return made, (slot, now)


def _first(kept: spec.Keys, tokens: int) -> spec.Keys:
    """The first keys of a batch."""
    return spec.Keys(*(array[:, :tokens] for array in kept))


def _in_every_layer(change: Callable[..., Any]) -> Change:
    return lambda begun, before, now, config: now._replace(layers=tuple(change(kept, config) for kept in now.layers))


def _without_buffer(kept: Any, config: Any) -> Any:
    empty = {name: getattr(kept, name)[..., :0, :] for name in ("k_quad", "k_lin", "v")}
    return kept._replace(valid=kept.valid[..., :0], **empty)


def _closed_early(kept: Any, config: Any) -> Any:
    """The open chunk is taken for complete while one token is missing."""
    if kept.v.shape[-2] < config.chunk - 1:
        return kept
    summary = kept.summary + (kept.k_lin * kept.valid[..., None]).swapaxes(-1, -2) @ kept.v
    counted = kept.counted + kept.valid.sum(axis=-1)
    return _without_buffer(kept, config)._replace(summary=summary, counted=counted, chunks=kept.chunks + 1)


def _all_real(kept: Any, config: Any) -> Any:
    return kept._replace(
        **{name: np.ones_like(getattr(kept, name)) for name in ("real", "valid") if hasattr(kept, name)}
    )


# What a step may keep in the place of its state.
WRONG_STATES: dict[str, Change] = {
    "second layer starts anew in every piece": lambda begun, before, now, config: now._replace(
        layers=(*now.layers[:1], *begun.layers[1:2], *now.layers[2:])
    ),
    "positions start anew in every piece": lambda begun, before, now, config: now._replace(tokens=0),
    "keys of the last piece forgotten": lambda begun, before, now, config: now._replace(layers=before.layers),
    "padding of earlier pieces visible": _in_every_layer(_all_real),
}
# The same where a layer keeps sums over chunks and one that is open.
WRONG_CHUNKS: dict[str, Change] = {
    "open chunk dropped": _in_every_layer(_without_buffer),
    "chunk closed a token early": _in_every_layer(_closed_early),
}

# What a step may read where its continuations share what they keep, of the state that all of them have written and of
# the one that this text would have.
SHARED: dict[str, Read] = {
    "state updated in place": lambda shared, own: shared,
    "layers updated in place, tokens counted by value": lambda shared, own: shared._replace(tokens=own.tokens),
}
# The same where a layer keeps keys in slots: those behind the tokens of a text are written, whoever has written them.
# In a Stream here the last to write has written as far as the next one reads.
SHARED_KEYS: dict[str, Read] = {
    "one buffer of keys for all continuations": lambda shared, own: own._replace(
        layers=tuple(_first(kept, own.tokens) for kept in shared.layers)
    ),
}
# The same where a layer keeps sums.
SHARED_SUMS: dict[str, Read] = {
    "sums over chunks updated in place": lambda shared, own: own._replace(
        layers=tuple(
            kept._replace(summary=sums.summary, counted=sums.counted)
            for kept, sums in zip(own.layers, shared.layers, strict=True)
        )
    ),
}


def wrong_streams(
    model: Model, step: Model, begin: Begin, changes: Mapping[str, Change], shared: Mapping[str, Read]
) -> dict[str, Streaming]:
    """A right model with each of the wrong steps."""
    steps = {bug: partial(_wrong_step, step, begin, change) for bug, change in changes.items()}
    steps["given positions ignored in a piece"] = partial(_unplaced_step, step)
    steps |= {bug: partial(_shared_step, step, begin, read) for bug, read in shared.items()}
    return {bug: Streaming(model, wrong) for bug, wrong in steps.items()}
