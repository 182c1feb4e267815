"""The command's frame: what it collects, what it says about itself, and what it says when something is not installed.

Each command line runs in a process of its own, against a folder that registers sub-commands as an installed one does.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import refimpl
from refimpl import cli

ROOT = Path(__file__).resolve().parents[2]

# Two folders that register sub-commands: one that loads, one that needs a package nobody has.
TOOL = """
import typer
app = typer.Typer()
group = typer.Typer(help="A group of two.")
app.add_typer(group, name="group")

@app.command()
def judge(adapter: str, op: list[str] = typer.Option([], "--op")):
    "Judge ADAPTER."
    print("judged", adapter, op)
    raise typer.Exit(1)

@app.command()
def late():
    "Needs a package only when it runs."
    import onnxruntime_that_is_absent

@app.command()
def known():
    "The package that it lacks stands in an extra."
    raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime.capi")

@group.command()
def first():
    "The first."
    print("first ran")

@group.command()
def second():
    "The second."
"""
ENTRIES = """
[refimpl.commands.tool]
judge = tool:app
late = tool:app
known = tool:app
group = tool:app
[refimpl.commands.far]
away = far:app
broken = broken:app
[console_scripts]
other = tool:app
"""
METADATA = """Metadata-Version: 2.1
Name: refimpl
Version: 0
Requires-Dist: torch; extra == 'all'
Requires-Dist: onnxruntime>=1; extra == 'all'
Requires-Dist: onnxruntime>=1; extra == 'runtime'
"""


@pytest.fixture
def installed(tmp_path):
    files = {
        "tool.py": TOOL,
        "far.py": "import typer, package_that_is_absent",
        "broken.py": "import far.nowhere",
        "refimpl-0.dist-info/METADATA": METADATA,
        "refimpl-0.dist-info/entry_points.txt": ENTRIES,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def refimpl_command(folder, *words, before=""):
    # Only what `folder` registers counts, whether or not refimpl itself is installed where the tests run.
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n"
        "from importlib import metadata\n"
        f"found = metadata.Distribution.at({str(folder / 'refimpl-0.dist-info')!r})\n"
        "metadata.entry_points = lambda: type('Found', (), {\n"
        "    'groups': {entry.group for entry in found.entry_points},\n"
        "    'select': lambda self, group: found.entry_points.select(group=group)})()\n"
        "metadata.requires = lambda name: found.requires\n"
        f"{before}\n"
        f"from refimpl.cli import main; main({list(words)!r})"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}
    environment.pop("FORCE_COLOR", None)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def without(package):
    return f"sys.modules[{package!r}] = None"


def test_the_sub_command_gets_its_arguments_and_gives_its_status(installed):
    done = refimpl_command(installed, "judge", "mine", "--op", "rope")
    assert (done.returncode, done.stdout) == (1, "judged mine ['rope']\n")


def test_a_group_of_sub_commands(installed):
    assert refimpl_command(installed, "group", "first").stdout == "first ran\n"


@pytest.mark.parametrize("words", [["--help"], []])
def test_help_teaches(installed, words):
    done = refimpl_command(installed, *words)
    assert done.returncode == 0, done.stderr
    for text in ("refimpl check python:my_file.py", "Exit status: 0 nothing failed, 1", "Judge ADAPTER.", "A group of"):
        assert text in done.stdout
    # What cannot be imported stands in the list all the same.
    assert "away" in done.stdout
    assert "Install it with: pip install 'refimpl[far]'" in done.stdout
    assert "other" not in done.stdout


def test_help_of_a_sub_command(installed):
    done = refimpl_command(installed, "judge", "--help")
    assert done.returncode == 0
    assert "Usage: refimpl judge" in done.stdout


def test_only_the_sub_command_that_is_asked_for_is_imported(installed):
    done = refimpl_command(installed, "group", "first", before=without("far"))
    assert done.stdout == "first ran\n"


def test_version(installed):
    done = refimpl_command(installed, "--version")
    assert (done.returncode, done.stdout) == (0, f"refimpl {refimpl.__version__}\n")


def test_a_misspelt_sub_command_is_refused_with_a_suggestion(installed):
    done = refimpl_command(installed, "juge")
    assert done.returncode == 2
    assert "'judge'" in done.stderr


@pytest.mark.parametrize("words", [["away"], ["away", "x", "--op", "rope"], ["away", "--help"]])
def test_a_missing_extra_is_named(installed, words):
    done = refimpl_command(installed, *words)
    assert done.returncode == 2
    assert done.stderr == (
        "refimpl: `refimpl away` needs the Python package package_that_is_absent, which is not installed. "
        "Install it with: pip install 'refimpl[far]'\n"
    )


def test_a_package_missing_while_the_sub_command_runs_is_named(installed):
    done = refimpl_command(installed, "late")
    assert done.returncode == 2
    assert done.stderr == (
        "refimpl: this needs the Python package onnxruntime_that_is_absent, which is not installed. "
        "Install it with: pip install 'refimpl[all]'\n"
    )
    assert "pip install 'refimpl[runtime]'" in refimpl_command(installed, "known").stderr


def test_a_missing_module_of_this_project_is_no_missing_extra(installed):
    (installed / "far.py").write_text("")
    done = refimpl_command(installed, "broken")
    assert done.returncode == 1
    assert "No module named 'far.nowhere'" in done.stderr


@pytest.mark.parametrize("words", [[], ["--help"], ["judge", "mine"]])
def test_without_the_command_line_packages_it_says_what_to_install(installed, words):
    done = refimpl_command(installed, *words, before=without("typer"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "Install it with: pip install 'refimpl[conformance]'" in done.stderr
    assert "refimpl check python:my_file.py" in done.stderr


def test_the_version_needs_no_extra(installed):
    done = refimpl_command(installed, "--version", before=without("typer"))
    assert (done.returncode, done.stdout) == (0, f"refimpl {refimpl.__version__}\n")


def test_ctrl_c_while_sub_commands_are_loaded(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_root", interrupted)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["check"])
    assert stopped.value.code == 130 and capsys.readouterr().err == "refimpl: stopped\n"
