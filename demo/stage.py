"""A long run in stages: what is done is taken up as long as nothing that it depends on has changed.

A stage is a folder. `begun` holds the key of everything that the stage depends on; stage.json, written last, holds the
key, the result and the SHA-256 of the stage's files. Only folders that carry such a key are ever removed, and none that
is reached through a link.
"""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from conformance import report

ROOT = Path(__file__).resolve().parent.parent
DONE, BEGUN = "stage.json", "begun"


class StageError(ValueError):
    """A folder that is in the way."""


class Stage(NamedTuple):
    """What a stage gave: its result, its folder, the seconds that it took, and whether it had been done before."""

    name: str
    result: Any
    folder: Path
    seconds: float
    taken_up: bool


def stage(
    out: Path, name: str, depends: Mapping[str, Any], make: Callable[[Path], Any], *, fresh: bool = False
) -> Stage:
    """The result of make(folder), which JSON can hold; or the result of last time, where key and files are the same.

    A stage that was stopped finds its folder again as it left it, unless what it depends on has changed.
    `fresh` begins anew in any case, and so does a result that says {"ok": false}.
    """
    folder, key = out / name, hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    done = None if fresh else _done(folder, key)
    if done is not None:
        return Stage(name, done["result"], folder, done["seconds"], True)
    _reachable(out, folder)
    if fresh or not _begun(folder, key):
        _clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DONE).unlink(missing_ok=True)
    report.write(folder / BEGUN, key)
    started = time.perf_counter()
    result, seconds = make(folder), time.perf_counter() - started
    # Read back, so that a first and a second run see the same: tuples become lists.
    told = json.dumps({"key": key, "seconds": seconds, "result": result, "files": _files(folder)})
    report.write(folder / DONE, told)
    return Stage(name, json.loads(told)["result"], folder, seconds, False)


def code(*folders: str) -> str:
    """A hash of the Python files of folders (or files) of this project, and of the deviations that are listed."""
    made = hashlib.sha256()
    for folder in folders:
        place = ROOT / folder
        found = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.suffix in (".py", ".txt"))
        for file in found:
            made.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return made.hexdigest()


def digest(file: Path) -> str:
    """The SHA-256 of a file that an earlier stage made."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of other people's packages; "" for one that is absent."""
    made = {}
    for package in packages:
        try:
            made[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            made[package] = ""
    return made


def _done(folder: Path, key: str) -> Any:
    done = _told(folder)
    same = done.get("key") == key and done.get("files") == _files(folder)
    failed = isinstance(done.get("result"), dict) and done["result"].get("ok") is False
    return done if same and not failed else None


def _told(folder: Path) -> dict[str, Any]:
    """What stage.json says; nothing where it is absent, damaged or somebody else's."""
    try:
        told = json.loads((folder / DONE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) and {"key", "seconds", "result", "files"} <= told.keys() else {}


def _begun(folder: Path, key: str | None = None) -> bool:
    """Whether a stage with this key, or with any, was begun here."""
    try:
        found = (folder / BEGUN).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return found == key if key is not None else re.fullmatch("[0-9a-f]{64}", found) is not None


def _reachable(out: Path, folder: Path) -> None:
    for path in (folder, *folder.parents):
        if path == out:
            return
        if path.is_symlink():
            raise StageError(f"demo: {path} is in the way: it is a link, and what it points to is left as it is")


def _clear(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (_told(folder) or _begun(folder))):
        raise StageError(f"demo: {folder} is in the way: it was not made by the demonstration and is left as it is")
    # What says whose the folder is goes last: when this is stopped, the next run can go on with it.
    for path in sorted(folder.iterdir(), key=lambda path: path.name in (BEGUN, DONE)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    folder.rmdir()


def _files(folder: Path) -> dict[str, str]:
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (DONE, BEGUN))
    return {p.relative_to(folder).as_posix(): digest(p) for p in found}
