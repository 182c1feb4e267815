"""The sub-command of training: train."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from torchimpl.training.job import Request
    from torchimpl.training.loop import Fitted, Progress

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="rich")
console = Console()
errors = Console(stderr=True)
# Between two lines of progress where there is no terminal.
SECONDS = 10.0

HELP = """Train a model: fine-tune a classifier, or pre-train a language model.

\b
[bold]finetune[/bold]  classes of texts, or of pairs of texts
[bold]mlm[/bold]       a masked language model, whole words masked
[bold]causal[/bold]    a language model that sees what came before

\b
[bold]Examples[/bold]
refimpl train finetune MODEL reviews.tsv out/reviews --tokenizer vocab.txt
refimpl train mlm model.json corpus.txt out/mlm --tokenizer vocab.txt --segmenter jieba
torchrun --nproc-per-node 2 -m refimpl.cli train mlm MODEL corpus.npz out/further

\b
[bold]Where no option says otherwise[/bold]
finetune  3 epochs, batches of 32, adamw, rate 3e-05
mlm       1 epoch, batches of 256, lamb, rate 0.00176
causal    1 epoch, batches of 64, adamw, rate 0.0003

A run that was stopped, by Ctrl-C or by a crash, goes on where it was when the same command is given again, with the \
numbers that it would have had. OUT/model is the model of the best evaluation with its tokenizer, ready for \
`refimpl export` and as the next MODEL; OUT/run has steps.csv, epochs.csv and loss.svg."""
DATA = """finetune: .jsonl, .tsv or .csv with text, label and, for pairs, pair; or .npz with token_ids, labels, \
segment_ids, mask. mlm, causal: .txt (a text a line), .jsonl with text; or .npz with token_ids, mask, words."""
FIELDS = "JSON with fields of torchimpl.training.loop.TrainConfig; options on the command line override it."
LORA = "Train adapters of this rank and the head, not the encoder; OUT/adapter is PEFT's folder, OUT/model is merged."


class TaskName(StrEnum):
    """What can be trained."""

    finetune = "finetune"
    mlm = "mlm"
    causal = "causal"


def option(metavar: str | None, words: str, panel: str, *names: str) -> Any:
    """An option that is absent unless it is given."""
    return typer.Option(None, *names, metavar=metavar, help=words, rich_help_panel=panel)


# A path is no literal that could stand in the signature.
VALIDATION = option("FILE", "What evaluations are on, a file as DATA.", "Data")
TOKENIZER = option("FILE", "tokenizer.json, or a vocab.txt of any name; looked for in MODEL otherwise.", "Data")
CASED = """Whether texts of a vocab.txt keep their case. Else tokenizer_config.json beside it decides; without that, \
they are put in lower case, as for the released Chinese models."""
RECIPE = option("FILE", FIELDS, "Recipe")


@app.callback()
def group() -> None:
    """Training."""


@app.command(help=HELP)
def train(
    context: typer.Context,
    task: Annotated[TaskName, typer.Argument(metavar="TASK", help="finetune, mlm or causal.")],
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model folder; or a model's JSON, for new weights.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help=DATA)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of the run.")],
    validation: Path | None = VALIDATION,
    hold_out: float | None = option("SHARE", "Without --validation: the share of DATA held out (0.1).", "Data"),
    tokenizer: Path | None = TOKENIZER,
    cased: bool | None = option(None, CASED, "Data", "--cased/--lower-case"),
    length: int | None = option("N", "The most tokens of a text (128).", "Data"),
    segmenter: str | None = option("NAME", "What a word is: wordpiece, jieba or module:function.", "Data"),
    mask_id: int | None = option("ID", "Of [MASK], where DATA is .npz and no tokenizer is given.", "Data"),
    recipe: Path | None = RECIPE,
    epochs: int | None = option("N", "Times through the data.", "Recipe"),
    max_steps: int | None = option("N", "Updates at most.", "Recipe"),
    batch_size: int | None = option("N", "Examples of an update, in all processes together.", "Recipe"),
    accumulate: int | None = option("N", "Micro-batches of an update; the loss stays the mean over all.", "Recipe"),
    learning_rate: float | None = option("R", "The largest rate.", "Recipe"),
    optimizer: str | None = option("NAME", "adamw, adafactor or lamb.", "Recipe"),
    schedule: str | None = option("NAME", "constant, linear or cosine.", "Recipe"),
    warmup: float | None = option("SHARE", "Of all steps, in which the rate rises.", "Recipe"),
    residual_warmup: float | None = option("SHARE", "Of all steps, in which residual branches grow from 0.", "Recipe"),
    evaluate_every: int | None = option("N", "Steps from one evaluation to the next; else every epoch.", "Recipe"),
    patience: int | None = option("N", "Stop after so many evaluations without a better one.", "Recipe"),
    save_every: int | None = option("N", "Steps from one saved state to the next.", "Recipe"),
    seed: int | None = option("N", "Of weights, order, masks and dropout.", "Recipe"),
    dropout: float | None = option("P", "Instead of 0.1.", "Model"),
    pooling: str | None = option("NAME", "first_token, mean_of_tokens, first_last_average or pooler.", "Model"),
    lora_rank: int | None = option("R", LORA, "Model"),
    lora_alpha: float | None = option("A", "scale = A / R; 2 R if not given.", "Model"),
    lora_targets: str | None = option("NAMES", "Matrices, by comma: the ends of their names.", "Model"),
    device: str | None = option("NAME", "cpu or cuda (cpu).", "Machine"),
    precision: str | None = option("NAME", "float32, or bfloat16 for the forward pass.", "Machine"),
    recompute: bool | None = option(None, "Compute layers twice instead of keeping them.", "Machine", "--recompute"),
    parallel: str | None = option("NAME", "With torchrun: ddp, or fsdp to split the weights.", "Machine"),
    tensorboard: bool | None = option(None, "Events in OUT/run/tensorboard.", "Machine", "--tensorboard"),
) -> None:
    given = {name: value for name, value in context.params.items() if value is not None}
    try:
        _train(given)
    except KeyboardInterrupt:
        # While all that is needed was being loaded.
        errors.print("refimpl: stopped before anything was trained")
        raise typer.Exit(130) from None


def _train(given: dict[str, Any]) -> None:
    # Loading all of this takes seconds, in which Ctrl-C is heard as well.
    from refimpl.check import SpecError
    from torchimpl.checkpoint import CheckpointError
    from torchimpl.lora import LoraError
    from torchimpl.training import distributed, job, memory
    from torchimpl.training.run import TrainError

    try:
        request = _request(given)
        if request.device == "cpu":
            memory.keep_freed()
        with _shown() as (told, progress):
            fitted = job.run(request, told, progress)
    except (TrainError, CheckpointError, LoraError, SpecError, OSError) as error:
        words = f"[red]refimpl:[/red] {escape(str(error))}"
        distributed.once(lambda: errors.print(words, soft_wrap=True))
        if os.environ.get("WORLD_SIZE", "1") != "1":
            # Whoever ends first has torchrun end the others, who are about to end with the same status.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        if _first():
            errors.print(escape(_stopped(given["out"], job.saved_step(given["out"]))), soft_wrap=True)
        raise typer.Exit(130) from None
    if _first():
        _conclude(request, fitted)


def _stopped(out: Path, step: int) -> str:
    if step:
        return (
            f"refimpl: stopped; {out / 'run'} has the state after step {step}, and the same command goes on from there"
        )
    return "refimpl: stopped before a state was saved; the same command begins anew (--save-every N saves more often)"


def _request(given: dict[str, Any]) -> "Request":
    import dataclasses

    from torchimpl.training import job
    from torchimpl.training.loop import TrainConfig

    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    changes = {name: value for name, value in given.items() if name in fields}
    rest = {name: value for name, value in given.items() if name not in fields}
    rest["task"] = given["task"].value
    if "lora_targets" in rest:
        rest["lora_targets"] = tuple(part.strip() for part in rest["lora_targets"].split(","))
    return job.Request(**{**rest, "recipe": job.recipe(rest["task"], rest.pop("recipe", None), changes)})


@contextlib.contextmanager
def _shown() -> "Iterator[tuple[Callable[[str], None], Callable[[Progress], None] | None]]":
    """What tells lines and progress: a bar on a terminal, now and then a line elsewhere, nothing in other processes."""
    if not _first():
        yield (lambda line: None), None
        return
    if not console.is_terminal:
        yield (lambda line: console.print(escape(line), soft_wrap=True)), _Lines()
        return
    from rich import progress

    columns = (progress.BarColumn(bar_width=24), progress.TextColumn("{task.fields[said]}"))
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, said="")

        def show(now: "Progress") -> None:
            bar.update(task, completed=now.step, total=now.steps, said=said(now))

        yield (lambda line: console.print(escape(line), soft_wrap=True)), show


class _Lines:
    """A line at the first step, at the last, and every ten seconds between."""

    def __init__(self) -> None:
        self.last = float("-inf")

    def __call__(self, now: "Progress") -> None:
        if time.monotonic() - self.last >= SECONDS or now.step == now.steps:
            self.last = time.monotonic()
            console.print(said(now), soft_wrap=True)


def said(now: "Progress") -> str:
    """Where a run is: step, loss, pace and time left."""
    hours, rest = divmod(round(now.seconds_left), 3600)
    left = f"{hours}:{rest // 60:02}:{rest % 60:02}"
    return f"step {now.step}/{now.steps}, loss {now.loss:.4f}, {now.tokens_per_second:,.0f} tokens/s, {left} left"


def _conclude(request: "Request", fitted: "Fitted") -> None:
    from torchimpl.training.job import figures

    console.print(f"best: {figures(fitted.best)}, at step {fitted.best.step} of {len(fitted.steps)}", soft_wrap=True)
    console.print(f"{escape(str(request.out / 'model'))}: the model of that step", soft_wrap=True)


def _first() -> bool:
    return os.environ.get("RANK", "0") == "0"
