"""Builds CHANGELOG.md from the fragments beside this file: `make changelog`.

A fragment is changelog.d/<subject>.<kind>.md with one entry in words of its reader; parallel work never edits one file.
A release moves them into changelog.d/<version>/ and adds a file `date` (2026-11-23) there.
"""

import argparse
import re
import sys
from pathlib import Path

KINDS = ("added", "changed", "deprecated", "removed", "fixed", "security")
NAME = re.compile(rf"[a-z0-9][a-z0-9_-]*\.({'|'.join(KINDS)})\.md")
HEAD = "# Changelog\n\nBuilt from changelog.d/ by `make changelog`; edit the fragments there, not this file.\n"


def problems(folder: Path) -> list[str]:
    """What is wrong with the fragments, one sentence each."""
    found = []
    for place in [folder, *_releases(folder)]:
        for file in sorted(place.glob("*.md")):
            if not NAME.fullmatch(file.name):
                found.append(f"{file.name}: expected <subject>.<kind>.md, kind one of {', '.join(KINDS)}")
            elif not file.read_text(encoding="utf-8").strip():
                found.append(f"{file.name}: empty")
    for release in _releases(folder):
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", _date(release)):
            found.append(f"{release.name}/date: expected a day such as 2026-11-23, received {_date(release)!r}")
    return found


def render(folder: Path) -> str:
    """The text of CHANGELOG.md: what is not released first, then the releases, newest first."""
    parts = [HEAD, *_section("Unreleased", folder)]
    for release in sorted(_releases(folder), key=_order, reverse=True):
        parts += _section(f"{release.name} ({_date(release)})", release)
    return "\n".join(parts)


def _section(title: str, folder: Path) -> list[str]:
    groups = []
    for kind in KINDS:
        entries = [file.read_text(encoding="utf-8").strip() for file in sorted(folder.glob(f"*.{kind}.md"))]
        if entries:
            items = "\n".join("- " + entry.replace("\n", "\n  ") for entry in entries)
            groups.append(f"### {kind.capitalize()}\n\n{items}\n")
    return [f"## {title}\n", *groups] if groups else []


def _releases(folder: Path) -> list[Path]:
    return [place for place in folder.iterdir() if place.is_dir() and place.name[0].isdigit()]


def _order(release: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", release.name)]


def _date(release: Path) -> str:
    date = release / "date"
    return date.read_text(encoding="utf-8").strip() if date.is_file() else ""


def main() -> None:
    parser = argparse.ArgumentParser(description="Build CHANGELOG.md from the fragments in changelog.d.")
    parser.add_argument("--check", action="store_true", help="only say what is wrong with the fragments")
    checking = parser.parse_args().check
    folder = Path(__file__).resolve().parent
    if found := problems(folder):
        sys.exit("changelog.d: " + "\nchangelog.d: ".join(found))
    if not checking:
        (folder.parent / "CHANGELOG.md").write_text(render(folder), encoding="utf-8")


if __name__ == "__main__":
    main()
