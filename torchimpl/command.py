"""The sub-command of the training modules: convert."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from torchimpl.convert import Converted

app = typer.Typer(add_completion=False, no_args_is_help=True)
console = Console()
errors = Console(stderr=True)

MODELS = "roformer, roformer_v2 or gau_alpha, where the names of the tensors are not to decide."
DIALECT = """Whose constants the weights were trained with, such as bert4keras-0.11.3. Needed where the configuration \
does not tell the epsilon; without it the error lists what each would mean."""


@app.callback()
def group() -> None:
    """Checkpoints of other people as model folders."""


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="A TensorFlow checkpoint (folder or prefix), a Hugging Face folder, or a file of safetensors or "
            "PyTorch with its configuration beside it.",
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="DST", help="The model folder to write.")],
    model: Annotated[str | None, typer.Option(metavar="NAME", help=MODELS)] = None,
    dialect: Annotated[str | None, typer.Option(metavar="NAME", help=DIALECT)] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The configuration, where it has another name or place.")
    ] = None,
    visible: Annotated[
        str | None, typer.Option(metavar="V", help="Who sees whom: bidirectional, causal or unilm.")
    ] = None,
    pooler: Annotated[str | None, typer.Option(metavar="P", help="What follows the pooler: tanh, or linear.")] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Tensors to leave out (* and ?); may be given again."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="D", help="float64, float32, float16 or bfloat16; else each tensor keeps its own."),
    ] = None,
) -> None:
    """Write the model folder of somebody else's checkpoint, number by number, and say what was found.

    A tensor that is missing, or left over and not ignored by name, is an error, and nothing is written.
    """
    options = {"visible": _one_of("--visible", visible, ("bidirectional", "causal", "unilm"))}
    options["pooler"] = _one_of("--pooler", pooler, ("tanh", "linear"))
    given = {"config_file": config, "model": model, "dialect": dialect, "ignore": ignore or (), "dtype": dtype}
    try:
        made = _convert(source, folder, {**options, **given})
    except KeyboardInterrupt:
        errors.print("refimpl: stopped; nothing was written")
        raise typer.Exit(130) from None
    for line in _told(made, folder):
        console.print(escape(line), soft_wrap=True)


def _convert(source: Path, folder: Path, options: dict[str, Any]) -> "Converted":
    # Loading all of this takes seconds, in which Ctrl-C is heard as well.
    from refimpl.check import SpecError
    from torchimpl import convert
    from torchimpl.checkpoint import CheckpointError

    try:
        return convert.convert(source, folder, **options)
    except (CheckpointError, SpecError, OSError) as error:
        errors.print(f"[red]refimpl:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from None


def _told(made: "Converted", folder: Path) -> list[str]:
    from refimpl import originals
    from refimpl.models import _heads

    plan, source = made.plan, made.source
    config = plan.model.config
    constants = ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key in ("activation", "epsilon", "mlm_epsilon", "n_min")
        if (value := getattr(config, key, None)) is not None
    )
    heads = ", ".join(map(_heads.name_of, plan.model.heads)) or "none"
    lines = [
        f"{source.path}: {source.kind}, {originals.LAYOUTS[plan.layout]}, {len(source.tensors)} tensors, "
        f"configuration {source.config_file}",
        f"{config.model}, {made.parameters:,} parameters in {', '.join(made.dtypes)}; {plan.model.visible}; "
        f"heads: {heads}",
        f"{constants}: the constants of {', '.join(plan.dialects) or 'no dialect'}",
    ]
    if config.model == "roformer_v2" and config.embedding_size != config.hidden_size:
        lines.append("no language head: what stands before the token table of another width is in no checkpoint")
    copies = [f"{copy} = {of}" for copy, of in plan.copies.items()]
    lines += [f"tied, and equal bit by bit: {', '.join(copies)}"] if copies else []
    lines += [f"without a part in the result: {_few(plan.left_out)}"] if plan.left_out else []
    lines += [f"ignored as asked: {_few(plan.ignored)}"] if plan.ignored else []
    carried = f", with {' and '.join(source.carried)}" if source.carried else ""
    return [*lines, f"{folder}: a model folder{carried}"]


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _one_of(option: str, value: str | None, choices: tuple[str, ...]) -> str | None:
    if value is not None and value not in choices:
        errors.print(f"[red]refimpl:[/red] {option} must be one of {', '.join(choices)}, not {escape(value)}")
        raise typer.Exit(2)
    return value
