"""The export's sub-command: export."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from export.parity import Parity

app = typer.Typer(add_completion=False, no_args_is_help=True)
console = Console()
errors = Console(stderr=True)


@app.callback()
def group() -> None:
    """Models as ONNX files."""


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A model folder, as training writes it.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="The file to write.")],
    opset: Annotated[int, typer.Option(metavar="N", help="23, or 20 for older runtimes.")] = 23,
    dtype: Annotated[str, typer.Option(metavar="D", help="float32, or float64 for a twin to verify with.")] = "float32",
    inline: Annotated[
        bool, typer.Option("--inline", help="Without local functions, for readers that do not know them.")
    ] = False,
) -> None:
    """Write a trained model as an ONNX file, after holding the graph against the specification.

    Exit status 1, and no file, where the graph leaves its bound.
    """
    try:
        found = _export(folder, out, opset, dtype, inline)
    except KeyboardInterrupt:
        errors.print("refimpl: stopped; nothing was written")
        raise typer.Exit(130) from None
    for figures in found:
        console.print(
            f"{figures.runtime}, {figures.dtype}: worst error {figures.worst:.1e} of the largest element "
            f"(bound {figures.bound:.0e}, {figures.cases} requests; {escape(figures.where)})",
            soft_wrap=True,
        )
    console.print(f"{escape(str(out))}: opset {opset}, {dtype}, {out.stat().st_size / 1e6:.2f} MB", soft_wrap=True)


def _export(folder: Path, out: Path, opset: int, dtype: str, inline: bool) -> "tuple[Parity, ...]":
    # Loading all of this takes seconds, in which Ctrl-C is heard as well.
    from export import model
    from export.parity import ParityError
    from refimpl.check import SpecError
    from torchimpl.checkpoint import CheckpointError

    try:
        return model.export(folder, out, opset=opset, dtype=dtype, inline=inline)
    except ParityError as error:
        errors.print(f"[red]refimpl:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None
    except (CheckpointError, model.ExportError, SpecError, OSError) as error:
        errors.print(f"[red]refimpl:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from None
