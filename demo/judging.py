"""The first part of the demonstration: our own operators and real third-party implementations, judged and explained.

What a third party does otherwise stands in conformance/adapters/deviations/<adapter>.txt, an xfails file: each line
says which cases fail and why. A failure that no line explains, or a line that nothing meets, fails the demonstration.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from conformance import report, runner, vectors
from conformance.adapters import AdapterError, deviations
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
PACKAGES = ("numpy", "torch", "onnxruntime", "rotary-embedding-torch", "FLASH-pytorch", "peft", "scikit-learn")


def judge(out: Path, bars: Bars, *, fresh: bool = False, adapters: tuple[str, ...] | None = None) -> Iterator[Stage]:
    """A stage for every adapter, or for those named; one that is not installed has the reason for its result."""
    judged = stage.code("refimpl", "conformance", "torchimpl", "export", "demo/judging.py")
    corpus = vectors.read_manifest()["sha256"]
    for adapter, part in {**OWN, **THIRD_PARTIES}.items():
        if adapters is not None and adapter not in adapters:
            continue

        def make(_: Path, adapter: str = adapter, part: Part = part) -> dict[str, Any]:
            with bars.counting(f"judging {adapter}") as progress:
                try:
                    run = runner.check(
                        adapter,
                        dtype=part.dtype,
                        examples=part.examples,
                        expected=deviations(adapter),
                        progress=progress,
                    )
                except AdapterError as error:
                    return {"adapter": adapter, "ok": True, "absent": str(error)}
            return told(run)

        depends = {"code": judged, "corpus": corpus, "part": part, "versions": stage.versions(*PACKAGES)}
        yield stage.stage(out, f"judging/{adapter}", depends, make, fresh=fresh)


def told(run: runner.Run) -> dict[str, Any]:
    """What a report says about a run, as JSON holds it. Not-a-number is None."""
    why: dict[tuple[str, str], dict[str, None]] = {}
    for i, reason in run.expected.items():
        why.setdefault((run.verdicts[i].op, report.column(run.verdicts[i])), {})[reason] = None
    functions = {(op, report.column_of(i.profile)): f for i in run.implementations for op, f in i.functions.items()}
    rows = []
    for (op, head), cell in sorted(report.cells(run).items()):
        named = cell.equals[0] if cell.equals else ""
        if head == "float32" and not named and run.adapter not in OWN and (op, head) in functions:
            found = [identify(f) for f in rotations(op, functions[op, head], head).values()]
            named = "; ".join(str(convention) for convention in found if convention.named)
        rows.append(
            {
                "operator": op,
                "column": head,
                "outcome": cell.outcome,
                "ratio": None if cell.ratio != cell.ratio else cell.ratio,
                "cases": cell.cases,
                "laws": cell.laws,
                "failed": cell.failed,
                "convention": named,
                "reason": "; ".join(why.get((op, head), {})),
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


def table(results: list[dict[str, Any]]) -> Table:
    """Implementation x operator: verdict, worst error / bound, convention identified; our own one line a column."""
    made = Table(title="implementation x operator", title_justify="left")
    for name in ("implementation", "operator", "precision", "verdict", "error / bound", "convention or known bug"):
        made.add_column(name, justify="right" if name == "error / bound" else "left", overflow="fold")
    for found in results:
        made.add_section()
        adapter = found["adapter"]
        if adapter not in OWN:
            for row in found["rows"]:
                verdict = f"[{report.COLOURS[row['outcome']]}]{word(row)}[/]"
                figures = (row["operator"], row["column"], verdict, report.figure(ratio(row)))
                made.add_row(adapter, *figures, escape(row["convention"]))
            continue
        for head in found["columns"]:
            rows = [row for row in found["rows"] if row["column"] == head]
            worst = max((ratio(row) for row in rows if row["ratio"] is not None), default=float("nan"))
            failed = sum(row["failed"] for row in rows)
            verdict = f"[red]{failed} failed[/red]" if failed else "[green]pass[/green]"
            made.add_row(adapter, f"all {len(rows)}", head, verdict, report.figure(worst), "")
    return made


def explain(results: list[dict[str, Any]], console: Console) -> None:
    """Say why each known deviation deviates, and what failed beyond them."""
    for found in results:
        reasons = dict.fromkeys((row["operator"], row["reason"]) for row in found["rows"] if row["reason"])
        for op, reason in reasons:
            console.print(f"[magenta]-\\[deviates][/magenta] {found['adapter']} {op}: {escape(reason)}", soft_wrap=True)
        for text in (*found["failures"][:5], *found["complaints"]):
            console.print(f"[red]-\\[x][/red] {escape(text)}", soft_wrap=True)
