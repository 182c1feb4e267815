"""The demonstration: the specification's zoo and real third-party implementations, judged and explained.

What a third party does otherwise stands in conformance/adapters/deviations/<adapter>.txt, an xfails file: each line
says which cases fail and why. A failure that no line explains, or a line that nothing meets, fails the demonstration.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from conformance import report, runner
from conformance.adapters import ADAPTERS, AdapterError
from conformance.identify import identify, rotations

DEVIATIONS = Path(__file__).parent / "adapters" / "deviations"

# Drawn cases for each law: the demonstration is to be over in three minutes.
EXAMPLES = 5
# What takes many minutes, needs a GPU, or shows what another adapter shows.
OWN = {"spec", "torchimpl", "onnxruntime"}
LEFT_OUT = {"torchimpl-compiled", "cuda", "onnx-reference"}


def deviations(adapter: str) -> list[runner.ExpectedFailure]:
    """What is known to deviate in a shipped adapter, with reasons."""
    path = DEVIATIONS / f"{adapter}.txt"
    return runner.read_expected_failures(path) if path.is_file() else []


def run(out: Path, console: Console, errors: Console) -> bool:
    """Judge every installed adapter, print the table, write out/report.html; True when nothing is unexplained."""
    runs, absent = [], []
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        for adapter in [name for name in ADAPTERS if name not in LEFT_OUT]:
            task = progress.add_task(f"judging {adapter}", total=None)
            try:
                found = runner.check(
                    adapter, examples=EXAMPLES, expected=deviations(adapter), progress=_told(progress, task)
                )
            except AdapterError as error:
                absent.append(str(error))
                progress.remove_task(task)
                continue
            runs.append(found)
            progress.remove_task(task)
            mark = "[green]-\\[ok][/green]" if found.ok else "[red]-\\[x][/red]"
            console.print(f"{mark} {escape(report.summary(found))}", soft_wrap=True)
    console.print(table(runs))
    explain(runs, console)
    for text in absent:
        console.print(f"[yellow]-\\[skip][/yellow] {escape(text)}", soft_wrap=True)
    for found in runs:
        for verdict in found.failures[:5]:
            console.print(f"[red]-\\[x][/red] {escape(runner.message(verdict, (), found.adapter))}", soft_wrap=True)
        for complaint in found.complaints:
            console.print(f"[red]-\\[x][/red] {escape(complaint)}", soft_wrap=True)
    target = out / "report.html"
    report.write(target, report.html(runs, [("Conventions and deviations", _page(runs))]))
    console.print(f"report: {target}")
    return all(found.ok for found in runs)


def _told(progress: Progress, task: TaskID) -> Callable[[int, int], None]:
    return lambda done, total: progress.update(task, completed=done, total=total)


def rows(found: runner.Run) -> list[tuple[str, str, report.Cell, str]]:
    """(operator, precision, cell, convention or known bug) of one third-party run."""
    cells = report.cells(found)
    functions = {(op, report.column_of(i.profile)): f for i in found.implementations for op, f in i.functions.items()}
    made = []
    for op in found.operators:
        for head in report.columns(found):
            if (op, head) in cells:
                cell = cells[op, head]
                named = cell.equals[0] if cell.equals else ""
                if head == "float32" and not named and (op, head) in functions:
                    found_here = [identify(f) for f in rotations(op, functions[op, head], head).values()]
                    named = "; ".join(str(c) for c in found_here if c.named)
                made.append((op, head, cell, named))
    return made


def table(runs: list[runner.Run]) -> Table:
    """Implementation x operator: verdict, worst error / bound, convention identified."""
    made = Table(title="implementation x operator", title_justify="left")
    for name in ("implementation", "operator", "precision", "verdict", "error / bound", "convention or known bug"):
        made.add_column(name, justify="right" if name == "error / bound" else "left", overflow="fold")
    for found in runs:
        made.add_section()
        if found.adapter in OWN:
            for head in report.columns(found):
                cells = [c for (_, h), c in report.cells(found).items() if h == head]
                worst = max((c.ratio for c in cells if c.ratio == c.ratio), default=float("nan"))
                failed = sum(c.failed for c in cells)
                verdict = f"[red]{failed} failed[/red]" if failed else "[green]pass[/green]"
                made.add_row(found.adapter, f"all {len(cells)}", head, verdict, report.figure(worst), "")
            continue
        for op, head, cell, named in rows(found):
            verdict = f"[{report.COLOURS[cell.outcome]}]{_word(cell)}[/]"
            made.add_row(found.adapter, op, head, verdict, report.figure(cell.ratio), escape(named))
    return made


def _word(cell: report.Cell) -> str:
    return "deviates" if cell.outcome == "expected" else cell.outcome


def explain(runs: list[runner.Run], console: Console) -> None:
    """Say why each known deviation deviates."""
    for found in runs:
        reasons = dict.fromkeys((found.verdicts[i].op, reason) for i, reason in found.expected.items())
        for op, reason in reasons:
            console.print(f"[magenta]-\\[deviates][/magenta] {found.adapter} {op}: {escape(reason)}", soft_wrap=True)


def _page(runs: list[runner.Run]) -> str:
    lines = ['<div class="scroll"><table class="wide"><tr>']
    lines += [f"<th>{h}</th>" for h in ("implementation", "operator", "precision", "verdict", "error / bound")]
    lines.append("<th>convention, known bug, reason</th></tr>")
    for found in runs:
        if found.adapter in OWN:
            continue
        why: dict[tuple[str, str], dict[str, None]] = {}
        for i, reason in found.expected.items():
            verdict = found.verdicts[i]
            why.setdefault((verdict.op, report.column(verdict)), {})[reason] = None
        for op, head, cell, named in rows(found):
            reason = "; ".join(why.get((op, head), {}))
            text = "<br>".join(html.escape(t) for t in (named, reason) if t)
            # What passes and has no convention to tell stands in the heat maps below.
            if not text and cell.outcome == "pass":
                continue
            mark = f'<span class="mark {cell.outcome}">{_word(cell)}</span>'
            cells = (html.escape(found.adapter), f"<code>{op}</code>", head, mark, report.figure(cell.ratio), text)
            lines.append("<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    lines.append("</table></div>")
    return "".join(lines)
