"""The judge's sub-commands: check, repro, identify, mutants, vectors, ops."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from conformance import model, report, runner, stub, vectors
from conformance.adapters import ADAPTERS, AdapterError, Implementation, load
from conformance.budget import DTYPES, PROFILES, Profile
from conformance.case import OPERATORS, families, selected
from conformance.vectors import CorpusError
from conformance.verdict import Verdict, describe

app = typer.Typer(add_completion=False, no_args_is_help=True)
corpus = typer.Typer(no_args_is_help=True, help="The frozen corpus: verify it, regenerate it, copy it out.")
app.add_typer(corpus, name="vectors")
# In a pipe there is no width to fit into.
console = Console(width=None if sys.stdout.isatty() else 140)
errors = Console(stderr=True)

ADAPTER_HELP = f"One of {', '.join(ADAPTERS)}; or python:FILE, a file with IMPLEMENTS = {{'operator': function}}."
Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help=ADAPTER_HELP)]
Operators = Annotated[
    list[str] | None, typer.Option("--op", metavar="NAME", help="An operator, a family or a model; may be given again.")
]
Format = Annotated[str | None, typer.Option("--dtype", metavar="D", help=f"Only this format: {', '.join(DTYPES)}.")]

DRAWN = (
    f"Drawn cases for each law; without it {runner.EXAMPLES}, or fewer where an adapter finds every case dear, "
    "which the last line of a run tells."
)
Examples = Annotated[
    int | None, typer.Option(min=0, metavar="N", help=f"{DRAWN} 0 leaves the laws out.", show_default=False)
]

# Failures printed in full; the rest is counted and stands in the reports.
SHOWN = 20


@contextmanager
def told() -> Iterator[None]:
    """Errors that the user can mend end the command with one line and status 2; Ctrl-C with 130."""
    try:
        yield
    except (AdapterError, CorpusError, OSError, UnicodeDecodeError) as error:
        errors.print(f"[red]refimpl:[/red] {escape(str(error))}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        errors.print("refimpl: stopped; nothing was written")
        raise typer.Exit(130) from None


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on the terminal; callback(done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task(escape(title), total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@app.command()
def check(
    adapter: Adapter,
    op: Operators = None,
    dtype: Format = None,
    profile: Annotated[
        str | None, typer.Option(metavar="P", help=f"Judge under this arithmetic instead: {', '.join(PROFILES)}.")
    ] = None,
    examples: Examples = None,
    json: Annotated[Path | None, typer.Option(metavar="F", help="Write every verdict as JSON lines.")] = None,
    junit: Annotated[Path | None, typer.Option(metavar="F", help="Write JUnit XML for a CI server.")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="F", help="Write a Markdown summary.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="F", help="Write a self-contained HTML report.")] = None,
    xfails: Annotated[
        Path | None, typer.Option(metavar="F", help="Expected failures: `op/case [dtype]  # reason`, one a line.")
    ] = None,
) -> None:
    """Judge an implementation: the frozen vectors, then the laws.

    Exit status 0 only when nothing failed and no fewer cases ran than the manifest promises.

    refimpl check spec                                the specification's own zoo
    refimpl check python:my_rope.py --html out.html   your functions
    refimpl check torch --op attention --dtype bfloat16
    """
    with told():
        expected = runner.read_expected_failures(xfails) if xfails else []
        with bar(f"judging {adapter}") as progress:
            run = runner.check(
                adapter,
                names=op,
                dtype=dtype,
                profile=profile,
                examples=examples,
                expected=expected,
                progress=progress,
            )
        show(run)
        for path, writer in ((json, report.json_lines), (junit, report.junit), (markdown, report.markdown)):
            if path:
                report.write(path, writer(run))
        if html:
            report.write(html, report.html([run]))
    raise typer.Exit(0 if run.ok else 1)


def show(run: runner.Run) -> None:
    """The table and the failures of a run, on the terminal."""
    console.print(report.table(run))
    failures = report.failures(run)
    for implementation, text in failures[:SHOWN]:
        console.print(f"[red]-\\[x][/red] {escape(implementation)}: {escape(text)}", soft_wrap=True)
    if len(failures) > SHOWN:
        console.print(f"... and {len(failures) - SHOWN} more; --html or --json shows all of them")
    for complaint in run.complaints:
        console.print(f"[red]-\\[x][/red] {escape(complaint)}", soft_wrap=True)
    for reason, count in report.skips(run):
        console.print(f"[yellow]-\\[skip][/yellow] {count} cases: {escape(reason)}", soft_wrap=True)
    if run.unclaimed:
        listed = ", ".join(run.unclaimed[:SHOWN]) + (" ..." if len(run.unclaimed) > SHOWN else "")
        console.print(f"not claimed ({len(run.unclaimed)}): {listed}", style="dim", soft_wrap=True)
    mark = "[green]-\\[ok][/green]" if run.ok else "[red]-\\[x][/red]"
    console.print(f"{mark} {escape(report.summary(run))}", soft_wrap=True)


@app.command()
def repro(
    case: Annotated[str, typer.Argument(metavar="CASE", help="OPERATOR/CASE as a failure prints it; or OPERATOR/LAW.")],
    adapter: Adapter,
    dtype: Format = None,
    examples: Annotated[int | None, typer.Option(min=1, metavar="N", help=DRAWN, show_default=False)] = None,
) -> None:
    """Run one case (or one law) again and show arguments, result, expected value, bound and the worst elements."""
    with told():
        op, _, name = case.partition("/")
        if op not in OPERATORS() and op not in model.MODELS():
            raise AdapterError(f"repro: no operator or model {op!r}; `refimpl ops` lists them")
        implementations = [i for i in load(adapter) if dtype in (None, i.profile.dtype) and i.claims(op)]
        if not implementations:
            raise AdapterError(f"repro: {adapter} does not claim {op}{f' in {dtype}' if dtype else ''}")
        whole = op in model.MODELS()
        known = () if whole else families()[op.split(".")[0]].LAWS
        law = next((x for x in known if x.name == name and op in x.operators), None)
        failed = judged = False
        for implementation in implementations:
            if whole:
                verdict = _whole_again(implementation, op, name)
            elif law is not None:
                drawn = runner.draws(implementation, examples)
                verdict = runner.check_law(
                    implementation.name, implementation.functions[op], law, op, implementation.profile, drawn
                )
            else:
                vector = vectors.load_case(case)
                if implementation.profile.dtype not in vector.case.dtypes:
                    continue
                verdict = runner.judge(
                    implementation.name, implementation.functions[op], vector, implementation.profile
                )
                console.print(f"[bold]{vector.case.id}[/bold] {escape(vector.case.note)}")
                console.print(escape(describe(vector.case)), soft_wrap=True)
                console.print(report.elements(verdict, vector))
            colour = "red" if verdict.failed else "green"
            detail = f": {escape(verdict.message)}" if verdict.message else ""
            detail += escape(f'. Equals the known bug "{verdict.equals[0]}"') if verdict.equals else ""
            shown = escape(implementation.name)
            console.print(
                f"[{colour}]{verdict.outcome}[/{colour}] {shown} ({implementation.profile}){detail}",
                soft_wrap=True,
            )
            failed, judged = failed or verdict.failed, True
        if not judged:
            raise AdapterError(f"repro: {case} is not judged in the formats of {adapter}")
    raise typer.Exit(1 if failed else 0)


def _whole_again(implementation: Implementation, op: str, name: str) -> Verdict:
    """One case or law of a model again; of a case every state, and the worst elements."""
    function, profile = implementation.models[op], implementation.profile
    if name in model.laws(op):
        return model.judge_law(implementation.name, function, op, name, profile)
    if name not in model.CASES()[op]:
        there = ", ".join((*model.CASES()[op], *model.laws(op)))
        raise AdapterError(f"repro: {op} has no case or law {name!r}; there are: {there}")
    case = model.CASES()[op][name]
    verdict = model.judge(implementation.name, function, op, case, profile)
    console.print(f"[bold]{op}/{name}[/bold] {escape(str(case.config))}, visible={case.visible}", soft_wrap=True)
    ratios = model.by_state(op, case, verdict.outputs, profile)
    if ratios:
        states = ", ".join(f"{state} {report.figure(ratio)}" for state, ratio in ratios.items())
        console.print(f"error / bound: {states}", soft_wrap=True)
        console.print(report.elements(verdict, model.vector(op, case, profile)))
    return verdict


@app.command()
def mutants(
    op: Operators = None,
    dtype: Annotated[str, typer.Option(metavar="D", help="The storage format to judge in.")] = "float32",
    examples: Annotated[int, typer.Option(min=1, help="Drawn cases for each law.")] = 25,
    all_: Annotated[bool, typer.Option("--all", help="List every mutant, not only the survivors.")] = False,
) -> None:
    """Prove that the suite can fail: judge every known-wrong implementation, by the vectors and by the laws alone.

    Exit status 0 only when the vectors kill every mutant that is not proven equivalent.
    """
    from conformance.mutant import kills
    from conformance.mutant import mutants as known

    with told():
        chosen = [m for m in known() if op is None or selected(m.op, op)]
        if not chosen:
            raise AdapterError(f"mutants: no operator or family {op!r}")
        loaded = vectors.load(names=sorted({m.op for m in chosen}))
        profile = Profile(dtype, "strict", "A64" if dtype == "float64" else "A32")
        found = []
        with bar("judging mutants") as progress:
            for i, mutant in enumerate(chosen, 1):
                found.append(kills(mutant, loaded, profile, examples))
                progress(i, len(chosen))
        console.print(report.mutant_table(found, every=all_))
        alive = [k for k in found if not k.mutant.equivalent]
        survivors = [k for k in alive if not k.vectors]
        by_laws = sum(bool(k.laws) for k in alive)
        total = max(len(alive), 1)
        console.print(
            f"{len(alive)} mutants ({sum(bool(k.mutant.url) for k in alive)} from public threads), "
            f"{len(found) - len(alive)} proven equivalent; killed by the vectors {total - len(survivors)} "
            f"({1 - len(survivors) / total:.1%}), by the laws alone {by_laws} ({by_laws / total:.1%})"
        )
    raise typer.Exit(1 if survivors else 0)


@app.command()
def identify(
    family: Annotated[str, typer.Argument(metavar="FAMILY", help="rope.")],
    adapter: Annotated[
        str,
        typer.Argument(metavar="ADAPTER", help="FILE.py:FUNCTION taking (x, positions), or an adapter that rotates."),
    ],
    width: Annotated[int, typer.Option(min=2, help="Head width to probe with.")] = 16,
) -> None:
    """Name the convention that a function follows: layout, sign, rotated part, base, scaling.

    refimpl identify rope my_rope.py:rotate
    """
    from conformance import identify as naming

    with told():
        if family != "rope":
            raise AdapterError(f"identify: expected rope, received {family!r}")
        functions = naming.functions(adapter)
        named = {name: naming.identify(function, width=width) for name, function in functions.items()}
        for name, found in named.items():
            console.print(f"[bold]{escape(name)}[/bold]: {escape(str(found))}", soft_wrap=True)
    raise typer.Exit(0 if all(found.named for found in named.values()) else 1)


@app.command()
def ops(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="An operator, a family or a model.")] = None,
    write: Annotated[
        Path | None, typer.Option("--stub", metavar="F", help="Write the adapter stub to a file to fill in.")
    ] = None,
    onnx: Annotated[
        Path | None,
        typer.Option("--onnx", metavar="F", help="Write the operator's own ONNX graph, as it is judged, to a file."),
    ] = None,
    opset: Annotated[int, typer.Option(help="With --onnx: 20 (primitives) or 23.")] = 20,
    dtype: Annotated[str, typer.Option(help="With --onnx: float32 or float64.")] = "float32",
) -> None:
    """The operators and models: all with the layers that have them, or one with what an adapter must know of it."""
    with told():
        if name is None:
            console.print(_matrix())
            return
        whole = name in model.MODELS()
        chosen = [op for op in OPERATORS() if selected(op, [name])]
        if not chosen and not whole:
            raise AdapterError(f"ops: no operator or family {name!r}, nor a model; `refimpl ops` lists them")
        if onnx is not None:
            _write_graph(name, onnx, opset, dtype)
            return
        if whole:
            console.print(escape(f"{_described(name)}\n"), soft_wrap=True)
        for op in chosen:
            console.print(f"[bold]{op}[/bold]\n")
            console.print(escape(textwrap.indent(inspect.cleandoc(stub.documentation(op)), "  ")), soft_wrap=True)
            console.print(_arguments(op))
        for family in dict.fromkeys(op.partition(".")[0] for op in chosen):
            console.print(escape(f"{stub.conventions(family)}\n"), soft_wrap=True)
        text = stub.model_adapter(name) if whole else stub.adapter(chosen)
        if write:
            report.write(write, text)
            console.print(f"wrote {write}; fill it in, then: refimpl check python:{write}")
        else:
            console.print(
                "[bold]An adapter to fill in[/bold] (save as my_adapter.py, then: refimpl check python:my_adapter.py)\n"
            )
            console.print(escape(text), soft_wrap=True)


def _write_graph(name: str, path: Path, opset: int, dtype: str) -> None:
    if name not in OPERATORS():
        raise AdapterError(f"ops --onnx: expected one operator, received {name!r}")
    try:
        from conformance.adapters import graphs

        fixed = graphs.write(name, path, opset=opset, dtype=dtype)
    except ImportError as error:
        raise AdapterError(
            f"ops --onnx: {error.name or error} is not installed; pip install 'refimpl[export]'"
        ) from None
    listed = ", ".join(f"{argument} axis {axis} = {size}" for (argument, axis), size in fixed.items()) or "none"
    console.print(f"wrote {path} (opset {opset}, {dtype}); sizes that it fixes: {escape(listed)}", soft_wrap=True)


LAYERS = ("refimpl", "torchimpl", "export")


def _matrix() -> Table:
    """Operator or model x layer: who has it, and what judges it."""
    table = Table(title="Operators, and models", caption="refimpl ops NAME shows what an adapter must know of one")
    table.add_column("operator", no_wrap=True)
    for column in (*LAYERS, "vectors", "laws", "mutants"):
        table.add_column(column, justify="right")
    minimum = vectors.read_manifest()["operators"]
    for op in OPERATORS():
        family = op.split(".")[0]
        module = families()[family]
        there = ["yes" if _exists(f"{layer}.ops.{family}") else "-" for layer in LAYERS]
        laws = sum(op in law.operators for law in module.LAWS)
        wrong = sum(m.op == op for m in (*module.MUTANTS, *module.MUSEUM))
        table.add_row(op, *there, str(minimum.get(op, {}).get("minimum", 0)), str(laws), str(wrong))
    table.add_section()
    for name in model.MODELS():
        there = ["yes" if _exists(f"{layer}.models.{name}") else "-" for layer in LAYERS]
        wrong = [*model.wrong_models(name), *model.wrong_steps(name)]
        table.add_row(name, *there, *(str(len(held)) for held in (model.CASES()[name], model.laws(name), wrong)))
    return table


def _described(name: str) -> str:
    """How a model is called, and what it is held against; of the lists one name a line, for names hold commas."""
    module = model.MODELS()[name]
    lists: dict[str, Any] = {"cases": model.CASES()[name], "laws": model.laws(name), "known wrong models": module.WRONG}
    parts = [inspect.cleandoc(module.__doc__ or ""), (inspect.cleandoc(model.__doc__ or "")).partition("\n\n")[2]]
    parts.append(stub.model_documentation(name))
    steps = [mutant.bug for mutant in model.wrong_steps(name)]
    if steps:
        lists["known wrong steps"] = steps
        parts.append(stub.steps(name))
    listed = ["\n  ".join([f"{title} ({len(names)}):", *names]) for title, names in lists.items()]
    return "\n\n".join(parts + listed)


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _arguments(op: str) -> Table:
    table = Table(title=f"{op}: arguments and results of a case", title_justify="left")
    for column in ("name", "kind", "shapes or values in the cases"):
        table.add_column(column)
    for row in stub.rows(op):
        table.add_row(*row)
    return table


@corpus.command()
def verify(
    folder: Annotated[Path, typer.Option(metavar="DIR", help="The corpus to read.")] = vectors.FOLDER,
) -> None:
    """Check every byte of the corpus against the manifest, and the counts that it promises."""
    with told():
        read = vectors.verify(folder)
        weak = vectors.weaknesses(vectors.load(folder))
        for line in weak:
            console.print(f"[red]-\\[x][/red] {line}")
        size = sum(e["bytes"] for e in read["cases"])
        exact = sum(e["exact"] for e in read["cases"])
        console.print(
            f"{len(read['cases'])} cases of {len(read['operators'])} operators ({exact} exact), {size / 1e6:.1f} MB, "
            f"root {read['sha256'][:16]}; lazy answers accepted: {len(weak)}"
        )
    raise typer.Exit(1 if weak else 0)


@corpus.command()
def regenerate(
    compare: Annotated[
        bool, typer.Option("--compare", help="Write nothing; exit 1 where a byte would change.")
    ] = False,
) -> None:
    """Build the corpus again from the generator and put it in place when whole; says what changed."""
    with told():
        total = len(vectors.cases())
        with bar("regenerating") as progress:
            done = iter(range(1, total + 1))

            def step(_: str) -> None:
                progress(next(done), total)

            changed = vectors.regenerate(keep=compare, progress=step)
        for name in changed[:SHOWN]:
            console.print(f"changed: {name}")
        console.print(f"{total} cases, {len(changed)} files differ{' (nothing was written)' if compare else ''}")
    raise typer.Exit(1 if compare and changed else 0)


@corpus.command()
def export(
    target: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that does not exist yet.")],
    op: Operators = None,
) -> None:
    """Copy the corpus to a folder, for a checker in another language; the folder appears only when whole."""
    with told():
        count = vectors.export(target, names=op)
        console.print(f"{count} cases in {target}; manifest.json names each file, its hash and its attributes")


def main(arguments: list[str] | None = None) -> Any:
    """Run a sub-command without the `refimpl` script (python -m conformance)."""
    return app(arguments)
