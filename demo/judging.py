"""The first part of the demonstration: our own operators and real third-party implementations, judged and explained.

What a third party does otherwise stands in conformance/adapters/deviations/<adapter>.txt, an xfails file: each line
says which cases fail and why. A failure that no line explains, or a line that nothing meets, fails the demonstration.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from conformance import report, runner, vectors
from conformance.adapters import AdapterError, deviations, load
from conformance.identify import identify, rotations
from demo import stage
from demo.stage import Stage
from demo.terminal import Bars


class Part(NamedTuple):
    """What of an adapter is judged: one format or all, so many drawn cases for each law."""

    dtype: str | None
    examples: int


# Our own in one format, since `refimpl check` takes a minute for each; what is other people's in all of theirs.
OWN = {"spec": Part("float32", 1), "torchimpl": Part("float32", 1), "onnxruntime": Part("float32", 0)}
THIRD_PARTIES = {
    name: Part(None, 3)
    for name in ("torch", "onnxruntime-kernels", "rotary-embedding-torch", "FLASH-pytorch", "peft", "scikit-learn")
}
PACKAGES = (
    "numpy", "torch", "onnx", "onnxruntime", "onnxscript", "rotary-embedding-torch", "FLASH-pytorch", "peft",
    "scikit-learn",
)  # fmt: skip


def judge(out: Path, bars: Bars, *, fresh: bool = False, adapters: tuple[str, ...] | None = None) -> Iterator[Stage]:
    """A stage for every adapter, or for those named; one that is not installed has the reason for its result."""
    judged = stage.code("refimpl", "conformance", "torchimpl", "export", "demo/judging.py")
    corpus = vectors.read_manifest()["sha256"]
    for adapter, part in {**OWN, **THIRD_PARTIES}.items():
        if adapters is not None and adapter not in adapters:
            continue

        def make(_: Path, adapter: str = adapter, part: Part = part) -> dict[str, Any]:
            # Only what cannot be loaded is absent; an adapter that breaks while it is judged is a failure.
            try:
                load(adapter)
            except AdapterError as error:
                return {"adapter": adapter, "ok": True, "absent": str(error)}
            with bars.counting(f"judging {adapter}") as progress:
                run = runner.check(
                    adapter, dtype=part.dtype, examples=part.examples, expected=deviations(adapter), progress=progress
                )
            return told(run)

        depends = {"code": judged, "corpus": corpus, "part": part, "versions": stage.versions(*PACKAGES)}
        yield stage.stage(out, f"judging/{adapter}", depends, make, fresh=fresh)


def told(run: runner.Run) -> dict[str, Any]:
    """What a report says about a run, as JSON holds it. Not-a-number is None."""
    why: dict[tuple[str, str], dict[str, None]] = {}
    for i, reason in run.expected.items():
        why.setdefault((report.row(run.verdicts[i]), report.column(run.verdicts[i])), {})[reason] = None
    operators = {report.row(verdict): verdict.op for verdict in run.verdicts}
    functions = {(op, report.column_of(i.profile)): f for i in run.implementations for op, f in i.functions.items()}
    rows = []
    for (name, head), cell in sorted(report.cells(run).items()):
        op = operators[name]
        named = cell.equals[0] if cell.equals else ""
        if head == "float32" and not named and run.adapter not in OWN and (op, head) in functions:
            found = [identify(f) for f in rotations(op, functions[op, head], head).values()]
            # A convention ends in the operator whose it is, which needs no saying where it is this one.
            named = "; ".join(str(convention).removesuffix(f" ({op})") for convention in found if convention.named)
        rows.append(
            {
                "operator": op,
                # With the variant, where there are several.
                "row": name,
                "column": head,
                "outcome": cell.outcome,
                "ratio": None if cell.ratio != cell.ratio else cell.ratio,
                "cases": cell.cases,
                "laws": cell.laws,
                "failed": cell.failed,
                "convention": named,
                "reasons": list(why.get((name, head), {})),
            }
        )
    return {
        "adapter": run.adapter,
        "ok": run.ok,
        "summary": report.summary(run),
        "judged": run.judged,
        "columns": report.columns(run),
        "rows": rows,
        "failures": [runner.message(verdict, (), run.adapter) for verdict in run.failures],
        "complaints": list(run.complaints),
        "skips": report.skips(run),
    }


def ratio(row: dict[str, Any]) -> float:
    """Error over bound; not a number where nothing could be compared."""
    return float("nan") if row["ratio"] is None else row["ratio"]


def word(row: dict[str, Any]) -> str:
    """A verdict in one word; a deviation that the adapter's file explains is no failure."""
    return "deviates" if row["outcome"] == "expected" else str(row["outcome"])


def merged(rows: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """Rows of one operator and verdict as one, and of the same `names` besides: its precisions, its worst ratio."""
    made: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = (row["operator"], word(row), *(json.dumps(row[name]) for name in names))
        known = made.setdefault(key, {**row, "columns": [], "conventions": {}})
        known["columns"].append(row["column"])
        known["conventions"] |= {row["convention"]: None} if row["convention"] else {}
        known["ratio"] = max((r for r in (known["ratio"], row["ratio"]) if r is not None), default=None)
    return [row | {"convention": "; ".join(row["conventions"])} for row in made.values()]


def precisions(row: dict[str, Any], found: dict[str, Any]) -> str:
    """The precisions of a merged row, or how many they are where they are all in which the operator was judged."""
    judged = sum(other["operator"] == row["operator"] for other in found["rows"])
    return f"all {judged}" if len(row["columns"]) == judged > 1 else ", ".join(row["columns"])


def table(results: list[dict[str, Any]]) -> Table:
    """Implementation x operator: verdict, worst error / bound, convention identified; our own one line a column."""
    made = Table(title="implementation x operator", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    # So that 80 columns hold it.
    made.padding = (0, 1, 0, 0)
    made.add_column("operator", no_wrap=True)
    made.add_column("precision", width=9)
    made.add_column("verdict", no_wrap=True)
    made.add_column("error / bound", width=7, justify="right")
    made.add_column("convention or known bug", overflow="fold")
    for found in results:
        made.add_section()
        if found["adapter"] not in OWN:
            made.add_row(f"[bold]{escape(found['adapter'])}[/bold]")
            for row in merged(found["rows"]):
                verdict = f"[{report.COLOURS[row['outcome']]}]{word(row)}[/]"
                figures = (precisions(row, found), verdict, report.figure(ratio(row)))
                made.add_row(f"  {row['operator']}", *figures, escape(row["convention"]))
            continue
        for head in found["columns"]:
            rows = [row for row in found["rows"] if row["column"] == head]
            worst = max((ratio(row) for row in rows if row["ratio"] is not None), default=float("nan"))
            failed = sum(row["failed"] for row in rows)
            verdict = f"[red]{failed} failed[/red]" if failed else "[green]pass[/green]"
            operators = len({row["operator"] for row in rows})
            made.add_row(f"[bold]{found['adapter']}[/bold], all {operators}", head, verdict, report.figure(worst), "")
    return made


def explain(results: list[dict[str, Any]], console: Console) -> None:
    """Say why each known deviation deviates, and what failed beyond them."""
    for found in results:
        reasons = dict.fromkeys((row["operator"], reason) for row in found["rows"] for reason in row["reasons"])
        for op, reason in reasons:
            console.print(f"[magenta]-\\[deviates][/magenta] {found['adapter']} {op}: {escape(reason)}", soft_wrap=True)
        for text in (*found["failures"][:5], *found["complaints"]):
            console.print(f"[red]-\\[x][/red] {escape(text)}", soft_wrap=True)
