"""What a user gets on installing: packages, extras, pins, the command, the changelog and the Makefile's promises."""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

import refimpl
from tests.layout import MAY_IMPORT

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = SETTINGS["project"]
EXTRAS = PROJECT["optional-dependencies"]
COMMANDS = {
    (group.removeprefix("refimpl.commands."), name): target
    for group, entries in PROJECT["entry-points"].items()
    for name, target in entries.items()
}


def packages_in(requirements: list[str]) -> set[str]:
    """Normalised names of the packages that a list of requirements names."""
    return {re.match(r"[\w.-]+", line)[0].replace("_", "-").replace(".", "-").lower() for line in requirements}


def pins() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_every_package_folder_is_installed():
    present = [name for name in MAY_IMPORT if (ROOT / name / "__init__.py").is_file()]
    assert sorted(SETTINGS["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == sorted(present)


def test_the_version_is_a_release_number():
    assert re.fullmatch(r"\d+\.\d+\.\d+", refimpl.__version__)


def test_the_specification_needs_three_packages():
    assert packages_in(PROJECT["dependencies"]) == {"numpy", "scipy", "jaxtyping"}


def test_the_extra_all_holds_every_other_extra():
    (line,) = EXTRAS["all"]
    assert set(re.fullmatch(r"refimpl\[(.*)\]", line)[1].split(",")) == set(EXTRAS) - {"all"}


def test_pins_are_exact_versions_of_everything_that_is_named():
    assert [line for line in pins() if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    named = packages_in(PROJECT["dependencies"])
    for extra in EXTRAS:
        named |= packages_in(EXTRAS[extra])
    assert named - {"refimpl"} <= packages_in(pins())


@pytest.mark.parametrize(("extra", "name"), COMMANDS)
def test_a_registered_sub_command_exists(extra, name):
    import typer

    module, _, attribute = COMMANDS[extra, name].partition(":")
    group = typer.main.get_command(getattr(importlib.import_module(module), attribute))
    assert extra in EXTRAS
    assert name in group.commands
    # The help page prints it.
    assert group.commands[name].help


def changelog():
    spec = importlib.util.spec_from_file_location("changelog_build", ROOT / "changelog.d" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_changelog_is_built_from_fragments(tmp_path):
    build = changelog()
    (tmp_path / "rope.fixed.md").write_text("Angles are exact.\nAt every position.\n")
    (tmp_path / "gau.added.md").write_text("A unit.")
    for version, day in {"0.9.0": "2026-01-02", "0.10.0": "2026-03-04"}.items():
        (tmp_path / version).mkdir()
        (tmp_path / version / "date").write_text(day + "\n")
        (tmp_path / version / "old.removed.md").write_text(f"Gone in {version}.")
    assert build.problems(tmp_path) == []
    assert build.render(tmp_path) == build.HEAD + (
        "\n## Unreleased\n\n### Added\n\n- A unit.\n\n### Fixed\n\n- Angles are exact.\n  At every position.\n"
        "\n## 0.10.0 (2026-03-04)\n\n### Removed\n\n- Gone in 0.10.0.\n"
        "\n## 0.9.0 (2026-01-02)\n\n### Removed\n\n- Gone in 0.9.0.\n"
    )


def test_a_fragment_that_would_be_lost_is_named(tmp_path):
    (tmp_path / "rope.mended.md").write_text("x")
    (tmp_path / "gau.added.md").write_text("\n")
    (tmp_path / "1.0.0").mkdir()
    kind, empty, date = changelog().problems(tmp_path)
    assert kind.startswith("gau.added.md: empty")
    assert empty.startswith("rope.mended.md: expected <subject>.<kind>.md")
    assert date.startswith("1.0.0/date: expected a day")


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy2(ROOT / name, folder)
    # Without what an outer make says about itself.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
    )


def interpreter(folder: Path, script: str) -> Path:
    """An executable that stands in for python3."""
    file = folder / "stand-in"
    file.write_text("#!/bin/sh\n" + script)
    file.chmod(0o755)
    return file


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@needs_make
def test_make_alone_lists_the_targets(tmp_path):
    done = make(tmp_path)
    assert done.returncode == 0
    assert {line.split()[1] for line in done.stdout.splitlines() if line.startswith("make ")} >= {
        *("demo", "test", "check", "bench", "vectors", "changelog", "clean", "help")
    }


@needs_make
def test_make_says_when_python_is_too_old(tmp_path):
    python = interpreter(tmp_path, 'test "$1" = --version && echo Python 3.9.2 && exit; exit 1')
    done = make(tmp_path, "demo", f"PYTHON={python}")
    assert done.returncode != 0
    assert f"refimpl needs Python >= 3.11, and {python} is Python 3.9.2" in done.stderr
    assert "make demo PYTHON=python3.12" in done.stderr
    assert not (tmp_path / ".venv").exists()


# In a virtual environment without pip, `python -c 'import pip'` fails as after an interrupted start.
@needs_make
@pytest.mark.parametrize("venv_works", [True, False])
def test_make_replaces_a_half_built_environment(tmp_path, venv_works):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "left-over").touch()
    fake = tmp_path / "built"
    fake.write_text(f'#!/bin/sh\necho "built: $*" >> {tmp_path}/calls\n')
    fake.chmod(0o755)
    refuse = "" if venv_works else 'case "$*" in *-m\\ venv*--without-pip*) ;; *-m\\ venv*) exit 1;; esac\n'
    python = interpreter(
        tmp_path,
        f'echo "python: $*" >> {tmp_path}/calls\n{refuse}'
        f'case "$*" in *-m\\ venv*) rm -rf .venv; mkdir -p .venv/bin; cp {fake} .venv/bin/python;; esac\n',
    )
    done = make(tmp_path, "install", f"PYTHON={python}")
    calls = (tmp_path / "calls").read_text()
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / ".venv" / "left-over").exists()
    assert ("-m pip --python .venv/bin/python install" in calls) is not venv_works
    assert "-c constraints.txt -e .[all]" in calls
    make(tmp_path, "install", f"PYTHON={python}")
    assert (tmp_path / "calls").read_text() == calls, "nothing changed, so nothing is to be installed again"
