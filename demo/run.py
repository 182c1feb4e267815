"""The whole way, stage by stage: what it prints, what it writes, and in which order."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from conformance import report
from demo import classifiers, digits, judging, page, reading
from demo.classifiers import Classifier
from demo.digits import Digits
from demo.stage import Stage
from demo.terminal import Bars

MODELS = (classifiers.GAU, classifiers.FLASH)


def run(
    out: Path,
    console: Console,
    errors: Console,
    *,
    fresh: bool = False,
    models: tuple[Classifier, ...] = MODELS,
    data: Digits | None = None,
    adapters: tuple[str, ...] | None = None,
) -> bool:
    """Judge, train, export, serve, read; write out/report.html. True when nothing failed that is not explained.

    models, data, adapters: what a test makes smaller.
    """
    bars = Bars(errors)
    data = digits.load() if data is None else data

    def said(stage: Stage, text: str, ok: bool = True) -> Stage:
        mark = "[green]-\\[ok][/green]" if ok else "[red]-\\[x][/red]"
        when = "[dim]done before:[/dim] " if stage.taken_up else ""
        console.print(f"{mark} {when}{escape(text)} [dim]({stage.seconds:.1f} s)[/dim]", soft_wrap=True)
        return stage

    judged = []
    for stage in judging.judge(out, bars, fresh=fresh, adapters=adapters):
        if "absent" in stage.result:
            console.print(f"[yellow]-\\[skip][/yellow] {escape(stage.result['absent'])}", soft_wrap=True)
        else:
            said(stage, stage.result["summary"], stage.result["ok"])
        judged.append(stage)
    found = [stage.result for stage in judged if "absent" not in stage.result]
    console.print(judging.table(found))
    judging.explain(found, console)

    console.print(f"majority baseline: {digits.majority(data):.1%} of the test images")
    done: list[tuple[Classifier, dict[str, Stage]]] = []
    for classifier in models:
        trained = classifiers.train(out, classifier, data, bars, fresh=fresh)
        said(trained, f"trained {classifier.title}: {_trained(trained.result)}")
        exported = classifiers.export(out, trained, fresh=fresh)
        said(exported, f"exported {classifier.title}: {_exported(exported.result)}")
        served = classifiers.serve(out, trained, exported, data, fresh=fresh)
        equal = served.result["equal"] == served.result["images"]
        said(served, f"served {classifier.title} without torch: {_served(served.result)}", equal)
        read = reading.read(out, served, data, bars, fresh=fresh)
        said(read, f"read {classifier.title}: {_read(read.result)}")
        done.append((classifier, {"trained": trained, "exported": exported, "served": served, "read": read}))
    console.print(_table(done, digits.majority(data)))
    answers = {c.title: classifiers.read(s["served"].folder)["test"][0].argmax(axis=1) for c, s in done}
    target = out / "report.html"
    report.write(target, page.html(judged, done, answers, data))
    console.print(f"report: {target}")
    agree = all(s["served"].result["equal"] == s["served"].result["images"] for _, s in done)
    return agree and all(stage.result["ok"] for stage in judged)


def _trained(told: dict[str, Any]) -> str:
    accuracy = told["accuracy"]
    return (
        f"{accuracy['test']:.1%} of the test images right ({accuracy['validation']:.1%} of the validation images), "
        f"epoch {told['best']} of {len(told['epochs'])}, {told['parameters']:,} parameters"
    )


def _exported(told: dict[str, Any]) -> str:
    worst = {f["dtype"]: f["worst"] for f in told["model.onnx"]["parity"]}
    figures = ", ".join(f"{dtype} {error:.1e}" for dtype, error in worst.items())
    return f"worst error against the specification: {figures} of the largest element"


def _served(told: dict[str, Any]) -> str:
    return (
        f"{told['equal']} of {told['images']} predictions equal, logits within {told['difference']:.1e}; one image "
        f"{told['one_ms']:.2f} ms, {told['batch']} images {told['batch_ms']:.1f} ms on {told['threads']} threads"
    )


def _read(told: dict[str, Any]) -> str:
    can, white = told["can"]["test"], told["whitening"]
    beta, gamma, k, _, test = white["best"]
    return (
        f"CAN {can['before']:.1%} to {can['after']:.1%} of the test images ({can['uncertain']} uncertain); nearest "
        f"neighbour {white['before']['test']:.1%} to {test:.1%} (beta {beta:g}, gamma {gamma:g}, k {k})"
    )


def _table(done: list[tuple[Classifier, dict[str, Stage]]], majority: float) -> Table:
    table = Table(title="handwritten digits, test images", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    table.padding = (0, 1, 0, 0)
    table.add_column("model", no_wrap=True)
    # So that 80 columns hold it.
    widths = {"parameters": 10, "accuracy": 8, "train, s": 6, "one image, ms": 10, "a batch, ms": 9}
    for name, width in widths.items():
        table.add_column(name, justify="right", width=width)
    for classifier, stages in done:
        trained, served = stages["trained"].result, stages["served"].result
        times = (
            f"{trained['seconds']:.0f}",
            f"{served['one_ms']:.2f}",
            f"{served['batch_ms']:.1f} ({served['batch']})",
        )
        table.add_row(classifier.title, f"{trained['parameters']:,}", f"{served['accuracy']['test']:.1%}", *times)
    table.add_row("the most frequent digit", "0", f"{majority:.1%}", "", "", "", style="dim")
    return table
