"""Judging whole models: their cases state by state, their laws, and the known wrong model that a failure equals.

What is judged is a function model(weights, token_ids, segment_ids, mask, positions, *, config, visible) that returns
(logits, x_0, ..., x_L): arrays in, arrays out, weights in the storage format. conformance/models has one file for each
model, with cases of tiny weights, a reference in Balls, laws and wrong models.

A function whose model reads a causal text piece by piece has an attribute `step`, a function step(weights, state,
token_ids, segment_ids, mask, positions, *, config, visible) that returns (results, state) for the next tokens: state is
None before the first of them, and otherwise whatever a step has returned; without positions they go on. The law
`streamed` holds it against the whole, and by the law `branched` it leaves the state that it is given as it was, for
other texts to go on from there. Where there is no step, the law `prefix` alone tells that a text may grow.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np

from conformance import models
from conformance.budget import PROFILES, Ball, Profile
from conformance.case import Case as OperatorCase
from conformance.case import Unsupported
from conformance.law import LawFailed
from conformance.models import _encoder, _streams
from conformance.models._encoder import Case, Model
from conformance.models._streams import Stream
from conformance.mutant import Mutant
from conformance.vectors import Vector
from conformance.verdict import Comparison, Verdict, compare, diagnose, explained, raised

FLOAT64 = Profile("float64", "strict", "A64")


@lru_cache(maxsize=1)
def MODELS() -> dict[str, ModuleType]:
    """The judged models by name: the files of conformance/models, in alphabetical order."""
    names = sorted(m.name for m in pkgutil.iter_modules(models.__path__) if not m.name.startswith("_"))
    return {name: importlib.import_module(f"conformance.models.{name}") for name in names}


@lru_cache(maxsize=1)
def CASES() -> dict[str, dict[str, Case]]:
    """The cases of every model, by their slugs. They remember their references, which no implementation enters."""
    return {name: {case.slug: case for case in module.cases()} for name, module in MODELS().items()}


def laws(name: str) -> dict[str, list[tuple[Any, Case]]]:
    """The laws of a model by name, each with the cases that tell a model that breaks it."""
    made: dict[str, list[tuple[Any, Case]]] = {}
    module = MODELS()[name]
    for case in CASES()[name].values():
        held = list(module.laws(case) if hasattr(module, "laws") else _encoder.LAWS)
        for law in [*held, *(_streams.LAWS if hasattr(module, "step") else ())]:
            if case.name in _encoder.TELLING[law.__name__]:
                made.setdefault(law.__name__, []).append((law, case))
    return made


def wrong_models(name: str) -> list[Mutant]:
    """The known wrong models."""
    return [Mutant(name, bug, model) for bug, model in MODELS()[name].WRONG.items()]


def wrong_steps(name: str) -> list[Mutant]:
    """The right models whose step is known to be wrong."""
    return [Mutant(name, bug, model) for bug, model in getattr(MODELS()[name], "WRONG_STREAMS", {}).items()]


def verdicts(implementation: str, model: Model, name: str, declared: Profile, *, with_laws: bool) -> list[Verdict]:
    """Every verdict on one model: its cases, then its laws."""
    cases = list(CASES()[name].values())
    judged = [judge(implementation, model, name, case, declared) for case in cases]
    pairs = list(zip(judged, cases, strict=True))
    # What explains two thirds of the failures explains some among any third of them and one more.
    failing = [(v, case) for v, case in pairs if v.failed and v.outputs]
    few = failing[: len(failing) // 3 + 1]
    known = [m for m in wrong_models(name) if any(_equals(m.call, v, case, must_fail=True) for v, case in few)]
    bugs = diagnose(pairs, known=known, equals=_equals)
    made = explained(judged, bugs)
    coarse = {v.outcome for v in made if v.failed} == {"precision"}
    for law in laws(name) if with_laws else ():
        verdict = judge_law(implementation, model, name, law, declared)
        imprecise = coarse and verdict.failed and not verdict.equals
        made.append(replace(verdict, outcome="precision") if imprecise else verdict)
    return made


def judge(implementation: str, model: Model, name: str, case: Case, declared: Profile) -> Verdict:
    """Run one model on one case; the message names the first state that leaves its bound."""
    profile = _judged(declared)
    verdict = Verdict(implementation, name, case.slug, profile.dtype, declared.name, "pass", "model")
    try:
        found = _encoder.run(model, case, profile)
    except Unsupported as reason:
        return replace(verdict, outcome="skipped", message=str(reason))
    except LawFailed as fault:
        return replace(verdict, outcome="logic", ratio=np.inf, message=str(fault).partition(": ")[2])
    except Exception as error:
        return replace(verdict, outcome="errored", message=raised(error))
    expected = due(name, case, profile)
    result, first = _compared(found, expected)
    verdict = replace(
        verdict,
        ratio=result.ratio,
        elements=result.elements,
        unverifiable=result.unverifiable,
        message=result.message,
        outputs=found,
    )
    if result.ok:
        silent = result.elements > 0 and result.unverifiable == result.elements
        return replace(verdict, outcome="unverifiable" if silent else "pass")
    for other in _looser(profile) if first else ():
        parts = _parts(found, due(name, case, other))
        # Bounds widen from layer to layer: only one that says something where the fault begins shows what it is.
        if all(part.ok for part in parts.values()) and not parts[first].unverifiable:
            return replace(verdict, outcome="precision", message=f"{result.message} (passes {other})")
    return replace(verdict, outcome="logic")


def judge_law(implementation: str, model: Model, name: str, law: str, declared: Profile) -> Verdict:
    """Hold a model to one law on the cases that tell."""
    profile = _judged(declared)
    verdict = Verdict(implementation, name, law, profile.dtype, declared.name, "pass", "law")
    if law in _streams.READ and not hasattr(model, "step"):
        return replace(verdict, outcome="skipped", message="the model has no step")
    model, declined, chosen = _encoder.refusing(model), [], laws(name)[law]
    for check, case in chosen:
        try:
            check(model, case, MODELS()[name].reference, profile)
        except Unsupported as reason:
            declined.append(str(reason))
        except LawFailed as fault:
            verdict = replace(verdict, outcome="logic", message=str(fault))
            return _explained(verdict, model, case) if law in _streams.READ else verdict
        except Exception as error:
            return replace(verdict, outcome="errored", message=f"{raised(error)}. Case: {case.slug}")
    return replace(verdict, outcome="skipped", message=declined[0]) if len(declined) == len(chosen) else verdict


def _explained(failed: Verdict, model: Model, case: Case) -> Verdict:
    """The verdict on a law of steps that is broken, with the known wrong step that the streams of the law equal.

    A step may also compute as a wrong model what the whole does rightly. In 16 bits bounds tell no fault from another.
    """
    if Profile(failed.dtype).sixteen_bit:
        return failed
    pairs = [(_read(failed, model, stream), stream) for stream in _streams.READ[failed.case](case)]
    failing = [pair for pair in pairs if pair[0].failed and pair[0].outputs]
    # What explains every failure explains the one of the fewest steps.
    fewest = sorted(failing, key=lambda pair: sum(map(len, pair[1].pieces)))[:1]
    for known in (wrong_steps(failed.op), wrong_models(failed.op)):
        likely = [m for m in known if all(_equals(m.call, *pair, must_fail=True) for pair in fewest)]
        if bugs := diagnose(pairs, known=likely, equals=_equals, partly=False):
            return explained([failed], bugs)[0]
    return failed


def _read(failed: Verdict, model: Model, stream: Stream) -> Verdict:
    """What the model gives on one stream of a law that it breaks, and whether it breaks it there."""
    profile = _judged(Profile(failed.dtype, failed.profile))
    try:
        verdict = replace(failed, outputs=stream.found(model, profile))
    except Exception:
        return failed
    try:
        stream.hold(model, MODELS()[failed.op].reference, profile)
    except Exception:
        return verdict
    return replace(verdict, outcome="pass")


def vector(name: str, case: Case, declared: Profile) -> Vector:
    """A case as reports show one: the expected results and their bounds in one format."""
    profile = _judged(declared)
    return _vector(due(name, case, profile), str(profile), name, case.slug)


def due(name: str, read: Case | Stream, profile: Profile) -> dict[str, Ball]:
    """The results as they should be: logits, x_0, ..., x_L."""
    reference = MODELS()[name].reference
    if isinstance(read, Stream):
        return read.expected(reference, profile)
    return _encoder.finished(reference, read, profile)


def by_state(name: str, case: Case, outputs: Sequence[np.ndarray], declared: Profile) -> dict[str, float]:
    """The worst error / bound in every state, the embedding first and the logits last."""
    expected = due(name, case, _judged(declared))
    if [out.shape for out in outputs] != [ball.shape for ball in expected.values()]:
        return {}
    parts = _parts(outputs, expected)
    return {state: parts[state].ratio for state in _in_order(parts)}


def _judged(declared: Profile) -> Profile:
    # Positions stay far below 2^17, so that the angles of either class are judged alike.
    return declared if declared.sixteen_bit else Profile(declared.dtype, "strict", declared.angle)


def _looser(profile: Profile) -> list[Profile]:
    """Arithmetic in which a precision fault shows as such; 11 bits say nothing behind the first layer."""
    if profile.sixteen_bit:
        return [replace(profile, name=name) for name in PROFILES[PROFILES.index(profile.name) + 1 :]]
    return [Profile("float32", "strict", "A32")] if profile.dtype == "float64" else []


def _vector(expected: dict[str, Ball], profile: str = "", op: str = "", case: str = "") -> Vector:
    values, radii = ({n: getattr(b, part) for n, b in expected.items()} for part in ("value", "rad"))
    return Vector(OperatorCase(op, case, {}), values, {profile: radii})


def _parts(found: Sequence[np.ndarray], expected: dict[str, Ball]) -> dict[str, Comparison]:
    """Every result by itself; there are as many as expected."""
    return {
        name: compare([out], _vector({name: ball}), "", exact=False)
        for (name, ball), out in zip(expected.items(), found, strict=True)
    }


def _in_order(names: Iterable[str]) -> list[str]:
    """States as they are formed: the logits, which a model returns first, come last."""
    return sorted(names, key=lambda name: name == "logits")


def _compared(found: Sequence[np.ndarray], expected: dict[str, Ball]) -> tuple[Comparison, str]:
    """All results together, and the name of the first that leaves its bound, which the message names."""
    if len(found) != len(expected):
        return Comparison(np.inf, 0, 0, f"{len(found)} results, expected {len(expected)} ({', '.join(expected)})"), ""
    parts = _parts(found, expected)
    first = next((name for name in _in_order(parts) if not parts[name].ok), "")
    message = f"{parts[first].message}; {_where(first)}" if first else ""
    elements, silent = (sum(getattr(p, n) for p in parts.values()) for n in ("elements", "unverifiable"))
    return Comparison(max(p.ratio for p in parts.values()), elements, silent, message), first


def _where(name: str) -> str:
    if name == "logits":
        return "every hidden state is right, the head is off"
    index = int(name.removeprefix("x_"))
    return f"{name}, {f'behind layer {index - 1}' if index else 'the embedding'}, is the first that is off"


def _equals(wrong: Model, verdict: Verdict, read: Case | Stream, *, must_fail: bool = False) -> bool:
    """Whether a wrong model gives what the implementation gave, within twice the bound (both are rounded)."""
    profile = _judged(Profile(verdict.dtype, verdict.profile))
    expected = due(verdict.op, read, profile)
    try:
        made = read.found(wrong, FLOAT64) if isinstance(read, Stream) else _encoder.run(wrong, read, FLOAT64)
    except Exception:
        # A wrong model that cannot take this case did not produce this output.
        return False
    if len(verdict.outputs) != len(made):
        return False
    for out, other, ball in zip(verdict.outputs, made, expected.values(), strict=True):
        if out.shape != other.shape:
            return False
        tolerance = 2 * profile.storage * np.abs(np.where(np.isfinite(other), other, 0.0))
        tolerance = tolerance + (2 * ball.rad if ball.shape == out.shape else 0.0)
        with np.errstate(invalid="ignore"):
            near = np.abs(out - other) <= tolerance
        if not (near | (out == other) | (np.isnan(out) & np.isnan(other))).all():
            return False
    return not (must_fail and _compared(made, expected)[0].ok)
