"""Views of a run: terminal tables, JSON lines (the truth), JUnit, Markdown and one self-contained HTML file."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from rich.markup import escape
from rich.table import Table

from conformance.budget import Profile
from conformance.mutant import Kill
from conformance.runner import EXAMPLES, Run, draws, message, repro_command
from conformance.vectors import Vector
from conformance.verdict import OUTCOMES, Verdict, informative, judged_profile

COLOURS = {
    "pass": "green",
    "precision": "yellow",
    "logic": "red",
    "errored": "red",
    "unverifiable": "cyan",
    "skipped": "dim",
    "expected": "magenta",
    "not claimed": "dim",
}


@dataclass(frozen=True)
class Cell:
    """One operator under one implementation: the worst outcome, the worst error / bound, counts."""

    outcome: str
    ratio: float
    cases: int
    laws: int
    failed: int
    message: str = ""
    equals: tuple[str, ...] = ()


def write(path: Path, content: str | bytes) -> None:
    """Write a file that appears under its name only when whole; text as UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        # A message may quote bytes that are no text (lone surrogates).
        data = content if isinstance(content, bytes) else content.encode("utf-8", errors="backslashreplace")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def cells(run: Run) -> dict[tuple[str, str], Cell]:
    """(row, column) -> what happened there. Implementations of one precision and variant share a cell."""
    grouped: dict[tuple[str, str], list[tuple[int, Verdict]]] = {}
    for i, verdict in enumerate(run.verdicts):
        grouped.setdefault((row(verdict), column(verdict)), []).append((i, verdict))
    return {key: _cell(run, rows) for key, rows in grouped.items()}


def row(verdict: Verdict) -> str:
    """The operator, and the variant that judged it where there are several."""
    return f"{verdict.op} ({verdict.variant})" if verdict.variant else verdict.op


def rows(run: Run) -> list[str]:
    """The rows of a table: operators in alphabetical order, then models; variants of each in the order of the run."""
    order = {name: i for i, name in enumerate(dict.fromkeys(v.variant for v in run.verdicts))}
    # Only an operator has a family before its name.
    found = {("." not in v.op, v.op, order[v.variant], row(v)) for v in run.verdicts}
    return [name for _, _, _, name in sorted(found)]


def column(verdict: Verdict) -> str:
    """The heading under which a verdict is shown: format, and the profile where it says something."""
    return column_of(_profile(verdict))


def column_of(profile: Profile) -> str:
    return profile.dtype if profile.name == "strict" else f"{profile.dtype} {profile.name}"


def _cell(run: Run, rows: list[tuple[int, Verdict]]) -> Cell:
    def rank(item: tuple[int, Verdict]) -> tuple[int, float]:
        i, v = item
        severity = ("skipped", "unverifiable", "pass", "expected", "precision", "errored", "logic")
        return severity.index("expected" if i in run.expected else v.outcome), 0.0 if math.isnan(v.ratio) else v.ratio

    worst_index, worst = max(rows, key=rank)
    ratios = [v.ratio for _, v in rows if v.kind != "law" and v.outcome not in ("skipped", "errored")]
    ratios = [r for r in ratios if not math.isnan(r)]
    return Cell(
        outcome="expected" if worst_index in run.expected else worst.outcome,
        ratio=max(ratios, default=float("nan")),
        cases=sum(v.kind != "law" for _, v in rows),
        laws=sum(v.kind == "law" for _, v in rows),
        failed=sum(v.failed for i, v in rows if i not in run.expected),
        message=worst.message,
        equals=worst.equals,
    )


def columns(run: Run) -> list[str]:
    return list(dict.fromkeys(column(v) for v in run.verdicts))


def figure(ratio: float) -> str:
    """A ratio in at most five characters."""
    if math.isnan(ratio):
        return "-"
    if math.isinf(ratio):
        return "inf"
    return f"{ratio:.2g}" if ratio < 100 else f"{ratio:.0e}".replace("+0", "").replace("+", "")


def table(run: Run) -> Table:
    """Operator x precision: verdict and worst error / bound."""
    made = Table(title=f"{escape(run.adapter)}: verdict and worst error / bound", title_justify="left")
    made.add_column("operator", no_wrap=True)
    heads = columns(run)
    for head in heads:
        made.add_column(head, justify="right")
    found, last = cells(run), ""
    for name in rows(run):
        entries = [name]
        for head in heads:
            cell = found.get((name, head))
            if cell is None:
                entries.append("")
                continue
            text = f"{cell.outcome} {figure(cell.ratio)}" if cell.outcome != "pass" else f"ok {figure(cell.ratio)}"
            entries.append(f"[{COLOURS[cell.outcome]}]{text}[/]")
        if "." not in name and last.count("."):
            made.add_section()
        made.add_row(*entries)
        last = name
    return made


def counts(run: Run) -> dict[str, int]:
    """Verdicts by outcome; expected failures apart."""
    made = Counter("expected" if i in run.expected else v.outcome for i, v in enumerate(run.verdicts))
    return {name: made[name] for name in (*OUTCOMES, "expected") if made[name]}


def unverifiable(run: Run) -> tuple[int, int]:
    """Unverifiable and all compared elements outside the cases made to be unverifiable."""
    told = [v for v in run.verdicts if v.kind != "law" and not v.ill_conditioned]
    return sum(v.unverifiable for v in told), sum(v.elements for v in told)


def summary(run: Run) -> str:
    """The last line: counts against the manifest."""
    listed = ", ".join(f"{n} {name}" for name, n in counts(run).items()) or "nothing ran"
    silent, elements = unverifiable(run)
    laws = sum(v.kind == "law" for v in run.verdicts)
    return (
        f"{run.adapter}: {listed}; {run.judged} of {run.promised} promised cases and {laws} laws{_fewer(run)} in "
        f"{run.seconds:.1f} s; unverifiable elements {silent} of {elements}; corpus {run.corpus[:12]}"
    )


def _fewer(run: Run) -> str:
    """Where laws drew fewer cases than they do by default: how many, and in which rows if not in all."""
    parts = []
    for count in sorted({n for n in run.drawn.values() if n < EXAMPLES}):
        names = [name for name, n in run.drawn.items() if n == count]
        where = "" if len(names) == len(run.drawn) else f" for {', '.join(names)}"
        parts.append(f"{count} drawn cases a law instead of {EXAMPLES}{where}")
    return f" ({'; '.join(parts)})" if parts else ""


def skips(run: Run) -> list[tuple[str, int]]:
    """Reasons for skipping, most frequent first."""
    return Counter(v.message for v in run.verdicts if v.outcome == "skipped").most_common()


def failing_laws(run: Run) -> dict[tuple[str, str, str], list[str]]:
    """(implementation, operator, format) -> names of the laws that do not hold."""
    made: dict[tuple[str, str, str], list[str]] = {}
    for v in run.verdicts:
        if v.kind == "law" and v.failed:
            made.setdefault((v.implementation, v.op, v.dtype), []).append(v.case)
    return made


# How the message on a case of a model ends: what is off first, and the looser bound that it is within.
_FIRST = re.compile(r"; (x_\d+, .* is the first that is off|every hidden state is right, the head is off)(?= \(|$)")


def failures(run: Run) -> list[tuple[str, str]]:
    """The failures as a terminal shows them, (implementation, text): those of one model in one format are one text."""
    laws = failing_laws(run)
    made: dict[Any, list[Verdict]] = {}
    for i, v in enumerate(run.failures):
        # Only an operator has a family before its name.
        made.setdefault(i if "." in v.op else _of_one_model(v), []).append(v)
    texts = []
    for together in made.values():
        one = together[0]
        alone = message(one, laws.get((one.implementation, one.op, one.dtype), ()), run.adapter)
        texts.append((one.implementation, _folded(run, together) if together[1:] else alone))
    return texts


def _folded(run: Run, failed: Sequence[Verdict]) -> str:
    """A model that fails: how many cases and laws, then one line for every state that is off first and every fault."""
    one = failed[0]
    every = Counter(_kind(v) for v in run.verdicts if _of_one_model(v) == _of_one_model(one))
    here = Counter(map(_kind, failed))
    counts = " and ".join(f"{here[kind]} of {n} {kind}s" for kind, n in every.items())
    outcomes = ", ".join(dict.fromkeys(v.outcome for v in failed))
    head = f"{one.op} ({one.dtype} {one.profile}): {counts} fail: {outcomes}. "
    lines: dict[tuple[str, str], list[Verdict]] = {}
    for v in failed:
        lines.setdefault((_kind(v), _fault(v)), []).append(v)
    shown = [head + f"Reproduce: {repro_command(run.adapter, one)}"]
    for (kind, fault), together in lines.items():
        told = together[0]
        names = "all" if len(together) == every[kind] else ", ".join(v.case for v in together)
        of = f"{len(together)} {kind}s ({names})" if together[1:] else f"{kind} {told.case}"
        example = f". {told.case}: {_FIRST.sub('', told.message)}" if _FIRST.search(told.message) else ""
        equals = f'. Equals the known bug "{told.equals[0]}"' if told.equals else ""
        shown.append(f"{of}: {fault}{example}{equals}")
    return "\n      ".join(shown)


def _kind(verdict: Verdict) -> str:
    return "law" if verdict.kind == "law" else "case"


def _fault(verdict: Verdict) -> str:
    """What failing cases have in common: the state that is off first, or else the message."""
    if first := _FIRST.search(verdict.message):
        return first[1]
    errored = verdict.outcome == "errored"
    return f"errored. {verdict.message.partition('. Case: ')[0]}" if errored else verdict.message


def _of_one_model(verdict: Verdict) -> tuple[str, ...]:
    return verdict.implementation, verdict.variant, verdict.op, verdict.dtype, verdict.profile


def elements(verdict: Verdict, vector: Vector, most: int = 8) -> Table:
    """The elements furthest beyond their bound."""
    made = Table(title="worst elements", title_justify="left")
    for name in ("element", "received", "expected", "error", "bound", "error / bound"):
        made.add_column(name, justify="right")
    bounds = vector.bounds[str(judged_profile(vector, _profile(verdict)))]
    rows: list[tuple[float, tuple[str, ...]]] = []
    for (name, expected), out in zip(vector.expected.items(), verdict.outputs, strict=False):
        if out.shape != expected.shape:
            continue
        error = np.abs(out - expected)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(error == 0, 0.0, error / bounds[name])
        ratio = np.where(np.isnan(ratio), np.inf, ratio)
        for index in np.argsort(-ratio, axis=None)[:most]:
            i = tuple(int(x) for x in np.unravel_index(index, ratio.shape))
            known = "" if informative(expected, bounds[name])[i] else " (unverifiable)"
            rows.append(
                (
                    float(ratio[i]),
                    (
                        f"{name}{list(i)}",
                        f"{out[i]:.9g}",
                        f"{expected[i]:.9g}",
                        f"{error[i]:.2g}",
                        f"{bounds[name][i]:.2g}{known}",
                        figure(float(ratio[i])),
                    ),
                )
            )
    for _, row in sorted(rows, key=lambda r: -r[0])[:most]:
        made.add_row(*row)
    return made


def _profile(verdict: Verdict) -> Profile:
    return Profile(verdict.dtype, verdict.profile)


def mutant_table(found: Sequence[Kill], *, every: bool) -> Table:
    """Mutants with what kills them; without `every`, only those that the vectors or the laws leave alive."""
    made = Table(title="known-wrong implementations", title_justify="left")
    for name in ("operator", "bug", "vectors", "laws"):
        made.add_column(name, overflow="fold")
    for kill in found:
        if every or not kill.vectors or not kill.laws:
            if kill.mutant.equivalent:
                made.add_row(
                    kill.mutant.op, escape(kill.mutant.bug), escape(f"equivalent: {kill.mutant.equivalent}"), ""
                )
            else:
                made.add_row(
                    kill.mutant.op,
                    escape(kill.mutant.bug),
                    str(len(kill.vectors)) if kill.vectors else "[red]alive[/red]",
                    ", ".join(kill.laws) or "[yellow]alive[/yellow]",
                )
    return made


def json_lines(run: Run) -> str:
    """One object a line: the run, each verdict, the summary. Not-a-number and infinities are strings."""
    lines: list[dict[str, Any]] = [
        {
            "event": "run",
            "adapter": run.adapter,
            "corpus": run.corpus,
            "promised": run.promised,
            "implementations": [
                {
                    "name": i.name,
                    "version": i.version,
                    "profile": str(i.profile),
                    "angle": i.profile.angle,
                    "drawn": draws(i, run.examples) if i.laws else 0,
                }
                for i in run.implementations
            ],
            "unclaimed": list(run.unclaimed),
        }
    ]
    for i, v in enumerate(run.verdicts):
        lines.append(
            {
                "event": "verdict",
                "implementation": v.implementation,
                "operator": v.op,
                v.kind: v.case,
                "dtype": v.dtype,
                "profile": v.profile,
                "verdict": v.outcome,
                "ratio": v.ratio if math.isfinite(v.ratio) else str(v.ratio),
                "elements": v.elements,
                "unverifiable": v.unverifiable,
                "message": v.message,
                "equals": list(v.equals),
                "expected_failure": run.expected.get(i),
                "repro": repro_command(run.adapter, v) if v.failed else None,
            }
        )
    lines.append(
        {"event": "summary", "ok": run.ok, "judged": run.judged, "complaints": list(run.complaints)} | counts(run)
    )
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)


def junit(run: Run) -> str:
    """JUnit XML: one test suite an operator, one test case a verdict."""
    root = ElementTree.Element("testsuites", name=_xml(f"refimpl check {run.adapter}"), time=f"{run.seconds:.3f}")
    laws = failing_laws(run)
    for op in run.operators:
        rows = [(i, v) for i, v in enumerate(run.verdicts) if v.op == op]
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=op,
            tests=str(len(rows)),
            failures=str(sum(v.outcome in ("logic", "precision") and i not in run.expected for i, v in rows)),
            errors=str(sum(v.outcome == "errored" and i not in run.expected for i, v in rows)),
            skipped=str(sum(v.outcome == "skipped" or i in run.expected for i, v in rows)),
        )
        for i, v in rows:
            name = _xml(f"{v.case} [{v.implementation}, {column(v)}]")
            case = ElementTree.SubElement(suite, "testcase", classname=v.op, name=name)
            if i in run.expected:
                ElementTree.SubElement(case, "skipped", message=_xml(f"expected failure: {run.expected[i]}"))
            elif v.outcome == "skipped":
                ElementTree.SubElement(case, "skipped", message=_xml(v.message))
            elif v.failed:
                kind = "error" if v.outcome == "errored" else "failure"
                text = _xml(message(v, laws.get((v.implementation, v.op, v.dtype), ()), run.adapter))
                ElementTree.SubElement(case, kind, type=v.outcome, message=text)
    if run.complaints or run.judged < run.promised:
        suite = ElementTree.SubElement(root, "testsuite", name="run", tests="1", failures="1")
        case = ElementTree.SubElement(suite, "testcase", classname="run", name="complete")
        text = "; ".join(run.complaints) or f"{run.judged} cases ran, the manifest promises {run.promised}"
        ElementTree.SubElement(case, "failure", message=_xml(text))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _xml(text: str) -> str:
    """XML 1.0 knows no control characters, surrogates or U+FFFE and U+FFFF."""
    return "".join(
        c if (" " <= c < "\ud800" or c >= "\ue000" and c not in "\ufffe\uffff" or c in "\n\t") else "?" for c in text
    )


def markdown(run: Run) -> str:
    """A summary for a pull request or a CI step."""
    heads = columns(run)
    found = cells(run)
    lines = [
        f"## refimpl check {run.adapter}: {'ok' if run.ok else 'FAILED'}",
        "",
        summary(run),
        "",
        "Verdict and worst error / bound.",
        "",
        "| operator | " + " | ".join(heads) + " |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for name in rows(run):
        found_here = [found.get((name, head)) for head in heads]
        entries = [f"{c.outcome} {figure(c.ratio)}" if c else "" for c in found_here]
        lines.append(f"| {name} | " + " | ".join(entries) + " |")
    laws = failing_laws(run)
    if run.failures:
        lines += ["", "### Failures", ""]
        lines += [
            f"- {v.implementation}: {_flat(message(v, laws.get((v.implementation, v.op, v.dtype), ()), run.adapter))}"
            for v in run.failures
        ]
    lines += [f"- {_flat(c)}" for c in run.complaints]
    if run.unclaimed:
        lines += ["", f"Not claimed: {', '.join(run.unclaimed)}"]
    return "\n".join(lines) + "\n"


def _flat(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def heat(ratio: float) -> str:
    """Colour of error / bound on a logarithmic scale: green far below 1, amber at 1, red beyond."""
    if math.isnan(ratio):
        return "#eceff1"
    if ratio > 1:
        shade = min(math.log10(min(ratio, 1e6)) / 6, 1.0)
        return f"hsl(6 {70 + 20 * shade:.0f}% {72 - 24 * shade:.0f}%)"
    shade = min(max((math.log10(max(ratio, 1e-4)) + 4) / 4, 0.0), 1.0)
    return f"hsl({152 - 100 * shade**3:.0f} 52% {86 - 22 * shade:.0f}%)"


def html(runs: Iterable[Run], sections: Sequence[tuple[str, str]] = ()) -> str:
    """One self-contained page: status matrix, heat map, failures. `sections` adds (title, HTML) blocks before them."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(
        loader=PackageLoader("conformance", "templates"), autoescape=select_autoescape(["html.j2"]), trim_blocks=True
    )
    shown = []
    for run in runs:
        laws = failing_laws(run)
        shown.append(
            {
                "run": run,
                "rows": rows(run),
                "columns": columns(run),
                "cells": cells(run),
                "summary": summary(run),
                "skips": skips(run),
                "failures": [
                    (v, message(v, laws.get((v.implementation, v.op, v.dtype), ()), run.adapter)) for v in run.failures
                ],
                "expected": [(run.verdicts[i], reason) for i, reason in sorted(run.expected.items())],
            }
        )
    template = environment.get_template("report.html.j2")
    return template.render(runs=shown, sections=sections, heat=heat, figure=figure)
