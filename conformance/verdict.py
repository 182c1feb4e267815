"""Pass or fail: one implementation on one frozen case, or under one law.

pass: equal, or |out - expected| <= bound everywhere it can be known.
precision: wrong under the declared profile, within the bound of a looser one, which the message names.
logic: wrong under every profile. unverifiable: no element whose bound carries information.
skipped: the implementation declines, with its reason. errored: it raised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from conformance.budget import PROFILES, Profile, round_to
from conformance.case import OPERATORS, Case, Function, Unsupported, as_tuple
from conformance.law import LawFailed, call, contained
from conformance.mutant import Mutant, mutants
from conformance.strategies import sample, search
from conformance.vectors import ELEVEN_BITS_INSIDE, FLOAT32_INSIDE, Vector

OUTCOMES = ("pass", "precision", "logic", "unverifiable", "skipped", "errored")
FAILURES = ("precision", "logic", "errored")


@dataclass(frozen=True)
class Verdict:
    """What happened to one case of an operator (kind "vector") or of a model ("model"), or under one law ("law").

    ratio: the worst |out - expected| / bound over the verifiable elements (nan where none was compared).
    equals: known bugs whose output this is. variant: the implementation's, where it has rows of its own in a report.
    """

    implementation: str
    op: str
    case: str
    dtype: str
    profile: str
    outcome: str
    kind: str = "vector"
    ratio: float = float("nan")
    message: str = ""
    elements: int = 0
    unverifiable: int = 0
    ill_conditioned: bool = False
    equals: tuple[str, ...] = ()
    variant: str = ""
    outputs: tuple[np.ndarray, ...] = field(default=(), repr=False, compare=False)

    @property
    def failed(self) -> bool:
        return self.outcome in FAILURES


@dataclass(frozen=True)
class Comparison:
    """The worst element of a case under one profile."""

    ratio: float
    elements: int
    unverifiable: int
    message: str = ""

    @property
    def ok(self) -> bool:
        return self.ratio <= 1.0


def informative(expected: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """Where a bound says something: below half of the largest expected magnitude of that output."""
    finite = expected[np.isfinite(expected)]
    scale = float(np.abs(finite).max()) if finite.size else 0.0
    return np.isfinite(bound) & (bound <= scale / 2) | (bound == 0)


def compare(outputs: Sequence[np.ndarray], vector: Vector, profile: Profile | str, *, exact: bool) -> Comparison:
    """Outputs (float64) against a vector under one profile; `exact` allows float32 arithmetic only, after rounding."""
    bounds = vector.bounds[str(profile)]
    worst, message, elements, unverifiable = 0.0, "", 0, 0
    if len(outputs) != len(vector.expected):
        return Comparison(
            np.inf, 0, 0, f"{len(outputs)} results, expected {len(vector.expected)} ({', '.join(vector.expected)})"
        )
    for (name, expected), out in zip(vector.expected.items(), outputs, strict=True):
        if out.shape != expected.shape:
            return Comparison(np.inf, 0, 0, f"{name} has shape {out.shape}, expected {expected.shape}")
        bound = np.where(np.isfinite(expected), bounds[name], 0.0)
        known = informative(expected, bound)
        if exact:
            # Every order gives this number; another algebra (the root of the scale on both sides) may miss it by what
            # float32 does, which in 16 bits is still equality unless terms cancel.
            dtype = str(profile).partition("-")[0]
            out, expected = round_to(out, dtype), round_to(expected, dtype)
            finest = vector.bounds.get("float64-strict" if dtype == "float64" else "float32-strict", {})
            bound = finest.get(name, np.zeros_like(bound))
            # A bound that says nothing gives an exact case no freedom.
            bound = np.where(np.isfinite(expected) & np.isfinite(bound), bound, 0.0)
            known = np.ones_like(known)
        elements += expected.size
        unverifiable += int((~known).sum())
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            error = np.where((out == expected) | (np.isnan(out) & np.isnan(expected)), 0.0, np.abs(out - expected))
            ratio = np.where(error == 0, 0.0, error / bound)
        # NaN is a failure wherever the bound is finite; beyond an infinite bound anything may stand.
        ratio = np.where(np.isnan(ratio), np.where(np.isinf(bound), 0.0, np.inf), ratio)
        if ratio.size and ratio.max() > worst:
            index = tuple(int(i) for i in np.unravel_index(np.argmax(ratio), ratio.shape))
            worst = float(ratio.max())
            times = f"{worst:.2g} x the bound" if np.isfinite(worst) else "beyond any bound"
            times = f"{times} of float32 arithmetic, in an exact case" if exact else times
            message = f"{name}{list(index)}={out[index]:.6g}, should be {expected[index]:.6g}; {times}"
            if not exact and bound[index] == 0:
                message = f"{name}{list(index)}={out[index]:.6g}, should be exactly {expected[index]:.6g}"
    return Comparison(worst, elements, unverifiable, message if worst > 1 else "")


def judged_profile(vector: Vector, declared: Profile) -> Profile:
    """The profile whose bounds apply: the declared one; float32 and float64 have one each."""
    name = declared.name if declared.sixteen_bit else "strict"
    return Profile(declared.dtype, name, "A64" if declared.dtype == "float64" else vector.case.angle)


def looser(declared: Profile) -> list[str]:
    """Bounds in which a precision fault shows as such: the next profiles of the same format; float32 inside for
    float64; 11 bits everywhere (float16, TF32) for float32."""
    if declared.sixteen_bit:
        return [f"{declared.dtype}-{n}" for n in PROFILES[PROFILES.index(declared.name) + 1 :]]
    return [FLOAT32_INSIDE] if declared.dtype == "float64" else [ELEVEN_BITS_INSIDE]


def judge(implementation: str, function: Function, vector: Vector, declared: Profile) -> Verdict:
    """Run one implementation on one frozen case."""
    case = vector.case
    profile = judged_profile(vector, declared)
    verdict = Verdict(
        implementation, case.op, case.name, profile.dtype, declared.name, "pass", ill_conditioned=case.ill_conditioned
    )
    if case.angle == "A64" and declared.angle != "A64" and declared.dtype != "float64":
        return replace(verdict, outcome="skipped", message="angle class A32 is declared: positions stay below 2^17")
    try:
        outputs = call(function, case.under(profile))
        observe = OPERATORS()[case.op].observe
        if observe is not None:
            outputs = tuple(np.asarray(o, np.float64) for o in as_tuple(observe(case.arguments, outputs)))
    except Unsupported as reason:
        return replace(verdict, outcome="skipped", message=str(reason))
    except LawFailed as fault:
        return replace(verdict, outcome="logic", ratio=np.inf, message=str(fault).partition(": ")[2])
    except Exception as error:
        return replace(verdict, outcome="errored", message=raised(error))
    result = compare(outputs, vector, profile, exact=case.exact)
    verdict = replace(
        verdict,
        ratio=result.ratio,
        elements=result.elements,
        unverifiable=result.unverifiable,
        message=result.message,
        outputs=outputs,
    )
    if result.ok:
        silent = result.elements > 0 and result.unverifiable == result.elements
        return replace(verdict, outcome="unverifiable" if silent else "pass")
    for other in looser(profile) if not case.exact else [str(profile), *looser(profile)]:
        if other in vector.bounds and compare(outputs, vector, other, exact=False).ok:
            named = "the bound of inexact cases" if other == str(profile) else other
            return replace(verdict, outcome="precision", message=f"{result.message} (passes {named})")
    return replace(verdict, outcome="logic")


def raised(error: BaseException) -> str:
    """What was raised, as text that every terminal and file can hold."""
    return f"{type(error).__name__}: {error}".encode("utf-8", "backslashreplace").decode()


def explained(judged: Sequence[Verdict], bugs: Sequence[tuple[Mutant, str]]) -> list[Verdict]:
    """The verdicts on the cases of one operator or model, with the known bugs that the failures equal."""
    # One fault of logic explains the cases that it moves only a little.
    logic = any(v.outcome == "logic" for v in judged) or any(not bug.precision for bug, _ in bugs)
    texts = tuple(text for _, text in bugs)

    def with_bugs(v: Verdict) -> Verdict:
        return replace(v, equals=texts, outcome="logic" if logic and v.outcome == "precision" else v.outcome)

    return [with_bugs(v) if v.failed else v for v in judged]


def diagnose(
    judged: Sequence[tuple[Verdict, Any]],
    known: Sequence[Mutant] | None = None,
    equals: Callable[..., bool] | None = None,
    *,
    partly: bool = True,
) -> tuple[tuple[Mutant, str], ...]:
    """Known bugs of one operator whose output is the implementation's, each with a text that says how sure that is.

    A bug is named when it gives the same output on every failing case (or, with `partly`, on two thirds of at least
    three, where no bug fits all); among those that do, the ones that agree on the most passing cases.
    """
    failing = [(v, vector) for v, vector in judged if v.outputs and v.failed]
    passing = [(v, vector) for v, vector in judged if v.outputs and not v.failed]
    if not failing:
        return ()
    known = list(mutants(failing[0][0].op)) if known is None else known
    equals = _equals if equals is None else equals
    fits = [sum(equals(m.call, v, vector, must_fail=True) for v, vector in failing) for m in known]
    most = max(fits, default=0)
    if most < len(failing) and (not partly or len(failing) < 3 or 3 * most < 2 * len(failing)):
        return ()
    named = [m for m, fit in zip(known, fits, strict=True) if fit == most]
    agree = [sum(equals(m.call, v, vector) for v, vector in passing) for m in named]
    share = "" if most == len(failing) else f", on {most} of {len(failing)} failing cases"
    return tuple((m, f"{m}{share}") for m, a in zip(named, agree, strict=True) if a == max(agree))


def _equals(mutant: Function, verdict: Verdict, vector: Vector, *, must_fail: bool = False) -> bool:
    """Whether a mutant gives what the implementation gave, within twice the bound (both are rounded).

    must_fail: the mutant must fail the case itself; one that passes it explains nothing.
    """
    profile = judged_profile(vector, Profile(verdict.dtype, verdict.profile))
    case = vector.case
    try:
        with np.errstate(all="ignore"):
            outputs = as_tuple(
                mutant(**{k: v.copy() if isinstance(v, np.ndarray) else v for k, v in case.arguments.items()})
            )
            observe = OPERATORS()[case.op].observe
            if observe is not None:
                outputs = as_tuple(observe(case.arguments, outputs))
    except Exception:
        # A mutant that cannot take this case did not produce this output.
        return False
    values = [np.asarray(o, np.float64) for o in outputs]
    if must_fail and compare(values, vector, profile, exact=case.exact).ok:
        return False
    for name, out, wrong in zip(vector.expected, verdict.outputs, values, strict=False):
        if wrong.shape != out.shape:
            return False
        tolerance = 2 * profile.storage * np.abs(np.where(np.isfinite(wrong), wrong, 0.0))
        bound = vector.bounds[str(profile)][name]
        if bound.shape == out.shape:
            tolerance = tolerance + 2 * bound
        with np.errstate(invalid="ignore"):
            near = np.abs(out - wrong) <= tolerance
        if not (near | (out == wrong) | (np.isnan(out) & np.isnan(wrong))).all():
            return False
    return True


def check_law(
    implementation: str, function: Function, law: Any, op: str, profile: Profile, examples: int, *, shrink: bool = True
) -> Verdict:
    """Run one law on drawn cases, derandomised; a failure carries the counter-example, the smallest with `shrink`."""
    from hypothesis.errors import FlakyFailure

    verdict = Verdict(implementation, op, law.name, profile.dtype, profile.name, "pass", "law")
    seen: list[Case] = []
    declined: list[str] = []

    def holds(case: Case) -> None:
        seen.append(case)
        try:
            with contained():
                law.check(function, case)
        except Unsupported as reason:
            declined.append(str(reason))

    first: Exception | None = None
    flaky: Sequence[BaseException] = ()
    try:
        for case in sample(op, profile, examples):
            holds(case)
    except Exception as error:
        first = error
    if first is None:
        declines = bool(seen) and len(declined) == len(seen)
        return replace(verdict, outcome="skipped", message=declined[0]) if declines else verdict
    failing = seen[-1:]
    try:
        if not shrink:
            raise first
        # The search meets the same cases, and goes on to smaller ones.
        search(op, profile, examples, holds)
        seen, flaky = failing, (first,)
    except LawFailed as fault:
        return replace(verdict, outcome="logic", message=f"{fault}. Smallest case: {describe(seen[-1])}")
    except FlakyFailure as group:
        flaky = group.exceptions
    except Exception as error:
        return replace(
            verdict,
            outcome="errored",
            message=f"{raised(error)}. Case: {describe(seen[-1]) if seen else '-'}",
        )
    text = f"not the same twice: a case failed once and passed when it was repeated: {'; '.join(map(raised, flaky))}"
    return replace(verdict, outcome="logic", message=f"{text}. Case: {describe(seen[-1])}")


def describe(case: Case) -> str:
    """The arguments of a case in one line: shapes of arrays, small arrays and numbers in full."""
    parts = []
    for name, value in case.arguments.items():
        if isinstance(value, np.ndarray):
            text = (
                np.array2string(value, separator=",", threshold=12).replace("\n", "")
                if value.size <= 12
                else f"array{value.shape}"
            )
            parts.append(f"{name}={text}")
        else:
            parts.append(f"{name}={value!r}")
    return ", ".join(parts)
