"""The demonstration's sub-command: demo."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(add_completion=False, no_args_is_help=True)
# In a pipe there is no width to fit into.
console = Console(width=None if sys.stdout.isatty() else 140)
errors = Console(stderr=True)


@app.callback()
def group() -> None:
    """The whole way, from the formula to the served model."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the report and the models go.")] = Path("out/demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew, and do not take up what is done.")] = False,
) -> None:
    """Judge the operators, train two small models, export them, serve them without torch; write a report.

    What is done is kept: a second run, or one after Ctrl-C, takes it up. Exit status 1 where something failed that is
    not explained.
    """
    try:
        ok = _run(out, fresh)
    except KeyboardInterrupt:
        errors.print("refimpl: stopped; what is done is kept, and the next run takes it up")
        raise typer.Exit(130) from None
    raise typer.Exit(0 if ok else 1)


def _run(out: Path, fresh: bool) -> bool:
    # Loading all of this takes seconds, in which Ctrl-C is heard as well.
    from conformance.adapters import AdapterError
    from conformance.vectors import CorpusError
    from demo import run
    from demo.stage import StageError
    from export.parity import ParityError
    from torchimpl.training.loop import TrainError

    try:
        return run.run(out, console, errors, fresh=fresh)
    except ParityError as error:
        errors.print(f"[red]refimpl:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None
    except (StageError, TrainError, AdapterError, CorpusError, OSError) as error:
        errors.print(f"[red]refimpl:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from None
