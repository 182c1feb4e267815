"""The sub-command models: inspect, run and explain checkpoints, of ours and of other people."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(add_completion=False, no_args_is_help=True)
models = typer.Typer(no_args_is_help=True, help="Look into a checkpoint, run it on arrays, and compare its dialects.")
app.add_typer(models, name="models")
# In a pipe there is no width to fit into.
console = Console(width=None if sys.stdout.isatty() else 160)
errors = Console(stderr=True)

PATH = """A model folder, a TensorFlow checkpoint (folder or prefix), a Hugging Face folder, or a file of safetensors \
or PyTorch."""
Configuration = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The configuration, where it has another name or place.")
]
ModelName = Annotated[
    str | None, typer.Option(metavar="NAME", help="roformer, roformer_v2 or gau_alpha, where nothing else decides.")
]


@contextmanager
def told() -> Iterator[None]:
    """Errors that the user can mend end the command with one line and status 2; Ctrl-C with 130."""
    # What is loaded inside takes seconds, in which Ctrl-C is heard as well.
    try:
        yield
    except KeyboardInterrupt:
        errors.print("refimpl: stopped; nothing was written")
        raise typer.Exit(130) from None
    except (ValueError, OSError) as error:
        # SpecError, CheckpointError and ExportError are ValueErrors of ours; a bare one is a mistake.
        if type(error) in (ValueError, UnicodeDecodeError):
            raise
        errors.print(f"[red]refimpl:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from None


@models.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help=f"{PATH} ONNX files are listed too.")],
    config: Configuration = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, every tensor with name, shape, dtype, bytes.")] = (
        False
    ),
) -> None:
    """List the tensors of a checkpoint and say what it was recognised as. Headers are read, numbers are not."""
    with told():
        from export import listing

        found = listing.of(path, config)
    if as_json:
        typer.echo(json.dumps(listing.as_json(found), indent=2))
        return
    table = Table("tensor", "shape", "dtype", "bytes")
    table.columns[3].justify = "right"
    for name, header in found.tensors.items():
        table.add_row(escape(name), str(header.shape), header.dtype, f"{header.bytes:,}")
    console.print(table)
    size = sum(header.bytes for header in found.tensors.values())
    console.print(f"{escape(str(path))}: {found.kind}, {len(found.tensors)} tensors, {size:,} bytes", soft_wrap=True)
    console.print(f"parameters: {found.parameters:,}, what is there twice counted once")
    for name, said in found.detected.items():
        console.print(f"{escape(name)}: {escape(said)}", soft_wrap=True)


@models.command()
def run(
    path: Annotated[Path, typer.Argument(metavar="PATH", help=PATH)],
    inputs: Annotated[
        Path,
        typer.Option(
            metavar="F.npz",
            help="token_ids or input_ids (b, n), and as far as given segment_ids or token_type_ids, mask or "
            "attention_mask, positions or position_ids, all of one shape. Without positions a token is at its place in "
            "the array.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="G.npz", help="The file to write: every output by its name.")],
    backend: Annotated[
        str,
        typer.Option(metavar="B", help="numpy, the specification; torch; or onnx, a graph in ONNX Runtime."),
    ] = "numpy",
    dtype: Annotated[
        str,
        typer.Option(
            metavar="D",
            help="float64 or float32. torch and onnx calculate in it; numpy calculates in float64, on weights that "
            "are rounded to it, and rounds its outputs.",
        ),
    ] = "float64",
    dialect: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Whose constants a checkpoint was trained with; of a model folder, whose to take instead of its own.",
        ),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="hidden_states.0, the embedding, to hidden_states.L too, in every backend.")
    ] = False,
    mask_from_ids: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help="Without a mask every token is real, id 0 too; bert4keras takes id 0 for padding, except at "
            "position 0.",
        ),
    ] = None,
    config: Configuration = None,
    model: ModelName = None,
) -> None:
    """Run a model on arrays of ids and write what it gives: last_hidden_state, mlm_logits, pooled, ...

    No mask is derived from the ids unless --mask-from-ids bert4keras asks for it.
    """
    with told():
        from export import running
        from torchimpl import checkpoint

        if out.is_dir():
            raise running.RunError(f"run: expected the name of a file to write, received the folder {out}")
        given = running.inputs(inputs)
        made = running.run(
            path, given, config_file=config, model=model, dialect=dialect, backend=backend, dtype=dtype,
            layers=layers, mask_from_ids=mask_from_ids,
        )  # fmt: skip
        out.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write(out, running.packed(made))
    listed = ", ".join(f"{name} {array.shape}" for name, array in made.items())
    console.print(f"{escape(str(out))}: {listed}, {dtype}", soft_wrap=True)


@models.command()
def explain(
    config: Annotated[
        Path,
        typer.Argument(metavar="CONFIG", help="config.json of a model folder, of Hugging Face, or bert_config.json."),
    ],
    model: ModelName = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the random weights that are run.")] = 0,
) -> None:
    """Say what the dialects of a model differ in, which one a configuration has, and what taking another would do.

    The differences are measured now: a small model with random weights is run in every dialect.
    """
    with told():
        from export import explaining

        said = explaining.of(config, model, seed)
    _explain(said)


@models.command()
def preset(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="roformer, roformer_v2 or gau_alpha.")],
    size: Annotated[str, typer.Argument(metavar="SIZE", help="A published one, such as small or base.")],
    dialect: Annotated[str, typer.Option(metavar="NAME", help="Whose constants: bert4keras-0.11.5, junnyu, ...")],
    sizes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=N", help="Another size than the published one; again for more."),
    ] = None,
) -> None:
    """Print the JSON of a model of a published size, for `refimpl train`, which gives it new weights and a head.

    refimpl models preset roformer_v2 small --dialect bert4keras-0.11.5 --set vocab_size=21128 > model.json
    """
    with told():
        from refimpl import dialects
        from refimpl import model as specification

        changed = {}
        for one in sizes or ():
            name, _, number = one.partition("=")
            if not number.isdecimal():
                raise typer.BadParameter(f"expected FIELD=N with a whole number N, received {one!r}")
            changed[name] = int(number)
        made = dialects.preset(model, size, dialect, changed)
    typer.echo(json.dumps(specification.to_dict(made), indent=2))


def _explain(said: Any) -> None:
    keys = [key for key in said.constants if key != "activation"]
    table = Table("dialect", *keys, "equal", "vectors", "short text", "logits", "short text")
    for name, constants in said.dialects.items():
        far = next(one for one in said.measured if one.dialect == name)
        figures = (far.hidden_long, far.hidden_short, far.logits_long, far.logits_short)
        equal = "yes" if name in said.equal else ""
        table.add_row(name, *(f"{constants[k]:g}" for k in keys), equal, *(f"{x:.0e}" if x else "0" for x in figures))
    console.print(f"{escape(str(said.path))}: {said.model}, {escape(said.told)}", soft_wrap=True)
    console.print(table)
    console.print(escape(said.legend), soft_wrap=True)
    for name, notes in said.besides.items():
        for note in notes:
            console.print(f"{name} {escape(note)}", soft_wrap=True)
