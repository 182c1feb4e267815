"""One run of the judge: an adapter against the corpus and the laws, counted against what the manifest promises."""

from __future__ import annotations

import fnmatch
import gc
import shlex
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from conformance import model
from conformance.adapters import AdapterError, Implementation, load
from conformance.budget import PROFILES
from conformance.case import OPERATORS, families, selected
from conformance.vectors import FOLDER, Vector, read_manifest
from conformance.vectors import load as load_vectors
from conformance.verdict import Verdict, check_law, diagnose, explained, judge

# Drawn cases a law sees in one run unless another number is asked for; a run over everything stays under a minute.
EXAMPLES = 10

# Below this many operators times implementations a second process costs more than it saves.
PARALLEL_FROM = 60


@dataclass(frozen=True)
class ExpectedFailure:
    """One line of an xfails file: `op/case [dtype]  # reason`; the pattern may hold * and ?."""

    pattern: str
    dtype: str
    reason: str
    line: int

    @property
    def operator(self) -> str:
        return self.pattern.partition("/")[0]

    @property
    def case(self) -> str:
        return self.pattern.partition("/")[2]

    def matches(self, verdict: Verdict) -> bool:
        return fnmatch.fnmatchcase(f"{verdict.op}/{verdict.case}", self.pattern) and self.dtype in ("*", verdict.dtype)


@dataclass(frozen=True)
class Run:
    """Everything that one `refimpl check` found.

    promised: cases that the manifest owes to the claimed operators and formats; judged: those that came to a verdict,
    skips with a reason among them. unclaimed: operators in the question that no implementation claims. examples: the
    drawn cases of a law that were asked for; None for the default.
    """

    adapter: str
    implementations: tuple[Implementation, ...]
    verdicts: tuple[Verdict, ...]
    promised: int
    judged: int
    unclaimed: tuple[str, ...]
    corpus: str
    seconds: float
    examples: int | None = None
    expected: dict[int, str] = field(default_factory=dict)
    complaints: tuple[str, ...] = ()

    @property
    def failures(self) -> list[Verdict]:
        """Failed verdicts that no xfails line expects."""
        return [v for i, v in enumerate(self.verdicts) if v.failed and i not in self.expected]

    @property
    def ok(self) -> bool:
        """Nothing failed unexpectedly, no expectation was idle, no case was lost, something was compared."""
        compared = any(v.kind != "law" and v.outcome != "skipped" for v in self.verdicts)
        return not self.failures and not self.complaints and self.judged >= self.promised and compared

    @property
    def drawn(self) -> dict[str, int]:
        """How many cases a law drew, by implementation and precision; those of which no law was judged are left out."""
        judged = {(v.implementation, v.dtype, v.profile) for v in self.verdicts if v.kind == "law"}
        return {
            f"{i.name} {i.profile}": draws(i, self.examples)
            for i in self.implementations
            if (i.name, i.profile.dtype, i.profile.name) in judged
        }

    @property
    def operators(self) -> list[str]:
        return sorted({v.op for v in self.verdicts})


def draws(implementation: Implementation, examples: int | None) -> int:
    """The cases that a law draws: as many as are asked for, else the default or the fewer that an adapter declares."""
    if examples is not None:
        return examples
    return EXAMPLES if implementation.examples is None else min(EXAMPLES, implementation.examples)


def read_expected_failures(path: Path) -> list[ExpectedFailure]:
    """Read an xfails file; a line without a reason is refused."""
    made = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        body, hash_, reason = line.partition("#")
        words = body.split()
        if not words:
            continue
        if not hash_ or not reason.strip() or len(words) > 2:
            raise AdapterError(f"{path}:{number}: expected `op/case [dtype]  # reason`, received {line!r}")
        made.append(ExpectedFailure(words[0], words[1] if len(words) > 1 else "*", reason.strip(), number))
    return made


def check(
    adapter: str,
    *,
    names: Sequence[str] | None = None,
    dtype: str | None = None,
    profile: str | None = None,
    examples: int | None = None,
    expected: Sequence[ExpectedFailure] = (),
    folder: Path = FOLDER,
    progress: Callable[[int, int], None] | None = None,
) -> Run:
    """Judge every claimed operator and model of an adapter (or those of `names`: operators, families or models).

    dtype restricts and profile overrides what the adapter declares. examples: the drawn cases of a law; None for the
    default, which an adapter may lower. progress(done, total) runs after each operator.
    """
    started = time.perf_counter()
    every = (*OPERATORS(), *model.MODELS())
    unknown = [n for n in names or () if not any(selected(op, [n]) for op in every)]
    if unknown:
        raise AdapterError(f"check: no operator or family {unknown[0]!r}, nor a model; `refimpl ops` lists them")
    if profile is not None and profile not in PROFILES:
        raise AdapterError(f"check: expected a profile among {', '.join(PROFILES)}, received {profile!r}")
    implementations = _implementations(adapter, dtype, profile)
    if not implementations:
        raise AdapterError(f"check: {adapter} declares no implementation in {dtype}")
    chosen = [op for op in every if names is None or selected(op, names)]
    manifest = read_manifest(folder)
    vectors = load_vectors(folder, chosen, manifest)
    jobs = [(n, op) for n, i in enumerate(implementations) for op in chosen if i.claims(op)]
    owed = Counter((e["operator"], held) for e in manifest["cases"] for held in set(e["dtypes"]))
    promised = sum(owed[op, implementations[n].profile.dtype] for n, op in jobs) + sum(
        len(model.CASES()[name]) for _, name in jobs if name in model.MODELS()
    )
    judging = _Judging(adapter, implementations, vectors, examples)
    found: dict[int, list[Verdict]] = {}
    for done, (job, made) in enumerate(_each(judging, jobs, dtype, profile), 1):
        found[job] = made
        if progress:
            progress(done, len(jobs))
    verdicts = [v for job in range(len(jobs)) for v in found[job]]
    matched = {i: _expectation(expected, v) for i, v in enumerate(verdicts)}
    complaints = _unknown(jobs, manifest) + _idle(expected, verdicts)
    return Run(
        adapter=adapter,
        implementations=implementations,
        verdicts=tuple(verdicts),
        promised=promised,
        judged=sum(v.kind != "law" for v in verdicts),
        unclaimed=tuple(op for op in chosen if not any(i.claims(op) for i in implementations)),
        corpus=manifest["sha256"],
        seconds=time.perf_counter() - started,
        examples=examples,
        expected={i: e.reason for i, e in matched.items() if e is not None and verdicts[i].failed},
        complaints=complaints,
    )


def _implementations(adapter: str, dtype: str | None, profile: str | None) -> tuple[Implementation, ...]:
    """What an adapter declares in one format (or in all), under its own profile or another."""
    return tuple(
        replace(i, profile=replace(i.profile, name=profile or i.profile.name))
        for i in load(adapter)
        if dtype in (None, i.profile.dtype)
    )


@dataclass(frozen=True)
class _Judging:
    """What a job needs: an adapter's implementations, the vectors, the number of examples."""

    adapter: str
    implementations: tuple[Implementation, ...]
    vectors: Sequence[Vector]
    examples: int | None

    @cached_property
    def by_operator(self) -> dict[str, list[Vector]]:
        found: dict[str, list[Vector]] = {}
        for vector in self.vectors:
            found.setdefault(vector.case.op, []).append(vector)
        return found

    def __call__(self, job: tuple[int, str]) -> list[Verdict]:
        """Every verdict on one operator or model of one implementation."""
        implementation, op = self.implementations[job[0]], job[1]
        examples, profile = draws(implementation, self.examples), implementation.profile
        with_laws = bool(examples) and implementation.laws
        if op in implementation.models:
            whole = implementation.models[op]
            made = model.verdicts(implementation.name, whole, op, profile, with_laws=with_laws)
            return [replace(v, outputs=(), variant=implementation.variant) for v in made]
        function = implementation.functions[op]
        cases = [v for v in self.by_operator.get(op, ()) if profile.dtype in v.case.dtypes]
        made = [judge(implementation.name, function, v, profile) for v in cases]
        made = explained(made, diagnose(list(zip(made, cases, strict=True))))
        if with_laws:
            # Where the vectors show too little precision and no fault of logic, a broken law shows the same.
            coarse = {v.outcome for v in made if v.failed} == {"precision"}
            for law in _laws(op):
                verdict = check_law(implementation.name, function, law, op, profile, examples)
                made.append(replace(verdict, outcome="precision") if coarse and verdict.failed else verdict)
        return [replace(v, outputs=(), variant=implementation.variant) for v in made]


def _lists(judging: _Judging, jobs: Sequence[tuple[int, str]]) -> tuple[deque[int], deque[int]]:
    """The numbers of the jobs with laws, each operator's together, and of those without.

    What is drawn for a law, and the references of those that share a precision, are then made once.
    """
    place = {op: i for i, op in enumerate(dict.fromkeys(op for _, op in jobs))}
    held = [i for i, (n, _) in enumerate(jobs) if judging.implementations[n].laws]
    rest = [i for i, (n, _) in enumerate(jobs) if not judging.implementations[n].laws]
    return deque(sorted(held, key=lambda i: place[jobs[i][1]])), deque(rest)


def _each(
    judging: _Judging, jobs: Sequence[tuple[int, str]], dtype: str | None, profile: str | None
) -> Iterator[tuple[int, list[Verdict]]]:
    """The number and the verdicts of every job, as they end.

    Many jobs are shared by two processes, each of which loads the adapter for itself. One begins with those that have
    laws, the other with the rest, which may need a compiler that is long to load; each then helps the other out.
    """
    held, rest = _lists(judging, jobs)
    if len(jobs) < PARALLEL_FROM:
        yield from ((job, judging(jobs[job])) for job in (*held, *rest))
        return
    given = (judging.adapter, dtype, profile, judging.vectors, judging.examples)
    # A multiprocessing.Pool would wait for ever for a process that a crash in native code has ended.
    ended = AdapterError(f"check: a process that ran {judging.adapter} ended without a verdict")
    running: dict[Future[list[Verdict]], tuple[ProcessPoolExecutor, Callable[[], int], int]] = {}

    def hand(pool: ProcessPoolExecutor, take: Callable[[], int]) -> None:
        if not held and not rest:
            return
        job = take()
        try:
            running[pool.submit(_judge, jobs[job])] = pool, take, job
        except (BrokenProcessPool, ValueError, OSError):
            # The process may have ended by now, and its pipes may be closed or closing.
            raise ended from None

    with ExitStack() as stack:
        pools = [
            (stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"), _begin, given)), take)
            for take in (
                lambda: held.popleft() if held else rest.popleft(),
                lambda: rest.popleft() if rest else held.pop(),
            )
        ]
        try:
            # One to work on, and one to go on with while the verdicts on the first are fetched.
            for pool, take in pools * 2:
                hand(pool, take)
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    pool, take, job = running.pop(future)
                    made = future.result()
                    hand(pool, take)
                    yield job, made
        except BrokenProcessPool:
            raise ended from None
        finally:
            for pool, _ in pools:
                pool.shutdown(wait=False, cancel_futures=True)


_PROCESS: list[_Judging] = []


def _begin(
    adapter: str, dtype: str | None, profile: str | None, vectors: Sequence[Vector], examples: int | None
) -> None:
    """Set up a worker process; Ctrl-C ends it without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _PROCESS.append(_Judging(adapter, _implementations(adapter, dtype, profile), vectors, examples))
    # What is loaded by now stays to the end: the collector need not look through it, nor after every 700 objects.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def _judge(job: tuple[int, str]) -> list[Verdict]:
    return _PROCESS[0](job)


def _laws(op: str) -> list[Any]:
    return [law for law in families()[op.split(".")[0]].LAWS if op in law.operators]


def _law_names(op: str) -> list[str]:
    """The names of the laws of an operator or a model."""
    return list(model.laws(op)) if op in model.MODELS() else [law.name for law in _laws(op)]


def _expectation(expected: Sequence[ExpectedFailure], verdict: Verdict) -> ExpectedFailure | None:
    return next((e for e in expected if e.matches(verdict)), None)


def _unknown(jobs: Sequence[tuple[int, str]], manifest: dict[str, Any]) -> tuple[str, ...]:
    """Claimed operators of which the corpus knows nothing: it is a part, or older than the operator."""
    absent = sorted({op for _, op in jobs} - {e["operator"] for e in manifest["cases"]} - model.MODELS().keys())
    return tuple(f"the corpus has no case of {op}" for op in absent)


def _idle(expected: Sequence[ExpectedFailure], verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    """An expectation that nothing met, or that a passing case met, is out of date and fails the run.

    Lines on operators and formats that were not asked for are passed over, and so are lines that name laws: whether a
    law meets the rare input on which it fails depends on what is drawn.
    """
    made = []
    for line in expected:
        met = [v for v in verdicts if line.matches(v)]
        asked = {v.op for v in verdicts if fnmatch.fnmatchcase(v.op, line.operator) and line.dtype in ("*", v.dtype)}
        on_laws = any(fnmatch.fnmatchcase(law, line.case) for op in asked for law in _law_names(op))
        known = any(fnmatch.fnmatchcase(op, line.operator) for op in (*OPERATORS(), *model.MODELS()))
        if known and (not asked or (on_laws and all(v.kind == "law" for v in met))):
            continue
        if not met:
            made.append(f"xfails line {line.line}: {line.pattern} matches no case that ran")
        elif not any(v.failed for v in met):
            made.append(f"xfails line {line.line}: {line.pattern} is expected to fail and does not ({line.reason})")
    return tuple(made)


def repro_command(adapter: str, verdict: Verdict) -> str:
    """The command that shows one verdict again."""
    return f"refimpl repro {verdict.op}/{verdict.case} {shlex.quote(adapter)} --dtype {verdict.dtype}"


def message(verdict: Verdict, failing_laws: Sequence[str] = (), adapter: str = "") -> str:
    """The one-line account of a failure: what, where, how far, which known bug, which laws, how to see it again."""
    kind = "law" if verdict.kind == "law" else "case"
    parts = [
        f"{verdict.op} {kind} {verdict.case} ({verdict.dtype} {verdict.profile}): {verdict.outcome}. {verdict.message}."
    ]
    if verdict.equals:
        parts.append(
            f'Equals the known bug "{verdict.equals[0]}"'
            + (f" (or {len(verdict.equals) - 1} more)." if verdict.equals[1:] else ".")
        )
    if failing_laws:
        parts.append(f"Fails laws: {', '.join(failing_laws)}.")
    if adapter:
        parts.append(f"Reproduce: {repro_command(adapter, verdict)}")
    return " ".join(parts)
