"""The `refimpl` command: it collects the sub-commands that the other folders register.

A folder registers a sub-command as an entry point in the group `refimpl.commands.<extra>` (pyproject.toml): the name
is the sub-command, the value a typer.Typer that holds a command of that name, the extra what must be installed for it.
Only the sub-command that is asked for is imported.
"""

import re
import sys
from importlib import metadata
from typing import Any

from refimpl import __version__

GROUP = "refimpl.commands."
# What the command line itself is made of stands in this extra.
COMMAND_LINE_EXTRA = "conformance"
# Exit status: 0 nothing failed, 1 something failed, 2 the command could not do its work.
UNABLE = 2
INTERRUPTED = 130

ABOUT = """One NumPy definition of every operator of RoFormer, GAU, FLASH, LoRA, CAN and whitening, and a judge \
that says which implementations are right, which convention they follow and how far off they are."""

FIRST_STEPS = [
    ("refimpl ops rope.rotate_interleaved", "what the operator takes and must do, with an adapter stub to fill in"),
    ("refimpl check python:my_file.py", "judge your own functions: verdict, worst error / bound, reason"),
    ("refimpl identify rope python:my_file.py", "which of the known RoPE conventions a function follows"),
]

STATUS = "Exit status: 0 nothing failed, 1 something failed, 2 the command could not run."


def main(arguments: list[str] | None = None) -> None:
    """Run `refimpl ARGUMENTS...` and exit."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        import typer
    except ModuleNotFoundError as error:
        sys.exit(_without_command_line(words, error))
    try:
        _root(typer, words).main(args=words, prog_name="refimpl")
    except KeyboardInterrupt:
        # While sub-commands are loaded; later each has its own word for it.
        print("refimpl: stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except ModuleNotFoundError as error:
        if _is_ours(error):
            raise
        extra = _extra_that_brings(str(error.name)) or "all"
        sys.exit(_refuse(f"this needs the Python package {error.name}, which is not installed", extra))


def registered() -> dict[str, tuple[metadata.EntryPoint, str]]:
    """Every sub-command by name: where it is found and the extra that it needs. Imports nothing."""
    everything = metadata.entry_points()
    groups = sorted(group for group in everything.groups if group.startswith(GROUP))
    return {
        entry.name: (entry, group.removeprefix(GROUP)) for group in groups for entry in everything.select(group=group)
    }


def _root(typer: Any, words: list[str]) -> Any:
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")

    steps = "\n".join(f"[bold]{command}[/bold]\n  {purpose}" for command, purpose in FIRST_STEPS)

    # Backspace keeps the line breaks of the paragraph that it opens.
    @app.callback(invoke_without_command=True, help=f"{ABOUT}\n\n\b\nStart here:\n{steps}", epilog=STATUS)
    def refimpl(
        context: typer.Context,
        version: bool = typer.Option(False, "--version", help="Print the version and exit."),
    ) -> None:
        if version:
            typer.echo(f"refimpl {__version__}")
        elif context.invoked_subcommand is None:
            typer.echo(context.get_help())

    root = typer.main.get_command(app)
    commands = registered()
    wanted = next((word for word in words if not word.startswith("-")), None)
    # The help page and the suggestion after a misspelt name need them all.
    for name in [wanted] if wanted in commands else commands:
        root.add_command(_load(typer, name, *commands[name]), name)
    return root


def _load(typer: Any, name: str, entry: metadata.EntryPoint, extra: str) -> Any:
    try:
        loaded = typer.main.get_command(entry.load())
    except ModuleNotFoundError as error:
        if _is_ours(error):
            raise
        return _stub(typer, name, f"`refimpl {name}` needs the Python package {error.name}", extra)
    return getattr(loaded, "commands", {}).get(name, loaded)


def _stub(typer: Any, name: str, reason: str, extra: str) -> Any:
    """Stands in for a sub-command that cannot be imported: takes any argument and says what to install."""
    # Unescaped, the help printer takes [extra] for a style.
    remedy = _remedy(extra).replace("[", r"\[")
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")

    @app.command(
        name,
        help=f"Not installed. {remedy}",
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
        add_help_option=False,
    )
    def absent() -> None:
        raise typer.Exit(_refuse(f"{reason}, which is not installed", extra))

    return typer.main.get_command(app)


def _without_command_line(words: list[str], error: ModuleNotFoundError) -> int:
    if words == ["--version"]:
        print(f"refimpl {__version__}")
        return 0
    steps = "\n".join(f"  {command:<42}{purpose}" for command, purpose in FIRST_STEPS)
    print(f"{ABOUT}\n\n{steps}\n\n{STATUS}\n", file=sys.stderr)
    return _refuse(f"the command line needs the Python package {error.name}, not installed", COMMAND_LINE_EXTRA)


def _refuse(reason: str, extra: str) -> int:
    print(f"refimpl: {reason}. {_remedy(extra)}", file=sys.stderr)
    return UNABLE


def _remedy(extra: str) -> str:
    return f"Install it with: pip install 'refimpl[{extra}]'"


def _is_ours(error: ModuleNotFoundError) -> bool:
    """A module of this project that is missing is a mistake of ours; only other people's packages can be installed."""
    folder = (error.name or "").partition(".")[0]
    return folder in {"", "refimpl", *(entry.module.partition(".")[0] for entry, _ in registered().values())}


def _extra_that_brings(module: str) -> str | None:
    """The smallest extra of refimpl that lists the package of this import name, if the two names are alike."""
    package = module.partition(".")[0].replace("_", "-").lower()
    extras: dict[str, list[str]] = {}
    for line in metadata.requires("refimpl") or []:
        if match := re.match(r"([\w.-]+).*;.*extra == ['\"]([\w-]+)['\"]", line):
            extras.setdefault(match[2], []).append(match[1].replace("_", "-").lower())
    return min(
        (extra for extra, names in extras.items() if package in names), key=lambda e: len(extras[e]), default=None
    )


if __name__ == "__main__":
    main()
