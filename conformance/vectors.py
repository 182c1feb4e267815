"""The frozen corpus: one safetensors file a case and one manifest, readable without Python.

A file holds `input/<argument>` (F32 where that is exact, else F64; I64; BOOL), `expected/<output>` (F64, correctly
rounded from 50 digits) and `bound/<output>/<dtype>-<profile>` (F32, rounded up). An implementation passes where
|out - expected| <= bound; in an exact case both are rounded to the storage format and the bound is float32-strict
(float64-strict for float64). The manifest names every file with its SHA-256, size, attributes, clauses and the minimum
counts below which nobody may report success.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from conformance.budget import PROFILES, Profile
from conformance.case import OPERATORS, Case, cases, reference, selected

FOLDER = Path(__file__).parent / "vectors"
SCHEMA = 1
# Bounds that nothing passes by: they tell too coarse an arithmetic inside from a fault of logic.
FLOAT32_INSIDE = "float32-inside"
ELEVEN_BITS_INSIDE = "11-bits-inside"
PROVENANCE = (
    "inputs: SplitMix64 named by the case (conformance/generate.py); expected: the references in conformance/ops "
    "at 50 decimal digits, rounded once to float64; bounds: conformance/budget.py, rounded up to 12 bits"
)
# No case needs more; a larger file is refused before it is read.
LARGEST_FILE = 4 << 20


class CorpusError(ValueError):
    """The corpus on disk is not the one that the manifest describes."""


@dataclass(frozen=True)
class Vector:
    """A frozen case with its expected results and bounds (keys "float16-fused" and so on)."""

    case: Case
    expected: dict[str, np.ndarray] = field(repr=False)
    bounds: dict[str, dict[str, np.ndarray]] = field(repr=False)


def profiles(case: Case) -> list[Profile]:
    """Every profile a case is judged under: one for float64 and float32, three for each 16-bit format."""
    angle = case.angle
    return [
        Profile(dtype, name, "A64" if dtype == "float64" else angle)
        for dtype in case.dtypes
        for name in (PROFILES if dtype in ("float16", "bfloat16") else PROFILES[:1])
    ]


def build(case: Case) -> Vector:
    """Expected values and bounds of a case, from its reference at 50 digits."""
    expected: dict[str, np.ndarray] = {}
    bounds: dict[str, dict[str, np.ndarray]] = {}
    for profile in profiles(case):
        balls = reference(case.under(profile), digits=True)
        expected = {name: ball.value for name, ball in balls.items()}
        bounds[str(profile)] = {name: round_up(ball.rad) for name, ball in balls.items()}
    coarse = {
        FLOAT32_INSIDE: (Profile("float32"), 2.0**-24),
        ELEVEN_BITS_INSIDE: (Profile("float16", "eager"), 2.0**-11),
    }
    for key, dtype in ((FLOAT32_INSIDE, "float64"), (ELEVEN_BITS_INSIDE, "float32")):
        if dtype in case.dtypes:
            profile, blur = coarse[key]
            balls = reference(case.under(profile), digits=True, blur=blur)
            bounds[key] = {name: round_up(ball.rad) for name, ball in balls.items()}
    if not expected:
        raise CorpusError(f"{case.id}: no storage format holds every float input exactly")
    return _checked(Vector(case, expected, bounds))


def _checked(vector: Vector) -> Vector:
    """The vector, if it can judge: every output has a bound of its shape in every profile."""
    judged = profiles(vector.case)
    for name, value in vector.expected.items():
        for profile in judged:
            bound = vector.bounds.get(str(profile), {}).get(name)
            if bound is None or bound.shape != value.shape or not ((bound >= 0) | ~np.isfinite(value)).all():
                raise CorpusError(f"vectors: {vector.case.id}: {name} has no usable bound for {profile}")
    return vector


def round_up(radius: np.ndarray, bits: int = 12) -> np.ndarray:
    """`radius` as float32, rounded up to `bits` significant bits, so that the last bits of a platform do not show."""
    fraction, exponent = np.frexp(np.asarray(radius, np.float64))
    with np.errstate(over="ignore"):
        up = np.where(np.isfinite(radius), np.ldexp(np.ceil(np.ldexp(fraction, bits)), exponent - bits), radius)
    smallest = np.finfo(np.float32).tiny
    return np.where((up > 0) & (up < smallest), smallest, up).astype(np.float32)


def tensors(vector: Vector) -> dict[str, np.ndarray]:
    """What the file of a vector holds."""
    made: dict[str, np.ndarray] = {}
    for name, value in vector.case.arguments.items():
        if isinstance(value, np.ndarray):
            narrow = value.dtype.kind == "f" and np.array_equal(value.astype(np.float32).astype(np.float64), value)
            made[f"input/{name}"] = np.array(value, np.float32 if narrow else value.dtype, order="C")
    for name, value in vector.expected.items():
        made[f"expected/{name}"] = np.array(value, order="C")
    for profile, named in vector.bounds.items():
        for name, value in named.items():
            made[f"bound/{name}/{profile}"] = np.array(value, order="C")
    return made


def file_name(case: Case) -> str:
    return f"{case.op}/{case.name}.safetensors"


def attributes(case: Case) -> dict[str, Any]:
    """The arguments that are not arrays, as JSON holds them."""
    return {
        k: list(v) if isinstance(v, tuple) else v for k, v in case.arguments.items() if not isinstance(v, np.ndarray)
    }


def _serialised(case: Case) -> tuple[dict[str, Any], bytes]:
    from safetensors.numpy import save

    data = save(tensors(build(case)))
    entry = {
        "id": case.id,
        "file": file_name(case),
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "operator": case.op,
        "attributes": attributes(case),
        "exact": case.exact,
        "angle": case.angle,
        "dtypes": list(case.dtypes),
        "clauses": list(case.clauses),
        "ill_conditioned": case.ill_conditioned,
        "note": case.note,
    }
    return entry, data


def _serialised_by_id(identifier: str) -> tuple[dict[str, Any], bytes]:
    return _serialised(next(c for c in cases([identifier.split("/")[0]]) if c.id == identifier))


def generate(
    folder: Path, names: Sequence[str] | None = None, *, workers: int = 2, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Write the corpus (or the files of some operators) and return its manifest."""
    chosen = [c.id for c in cases(names)]
    if len(set(chosen)) != len(chosen):
        raise CorpusError(f"case names are not unique: {sorted({c for c in chosen if chosen.count(c) > 1})}")
    entries = []
    with get_context("spawn").Pool(workers) as pool:
        for entry, data in pool.imap(_serialised_by_id, chosen, chunksize=4):
            path = folder / entry["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            entries.append(entry)
            if progress:
                progress(entry["id"])
    return manifest(entries)


def manifest(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest of a list of case entries."""
    entries = sorted(entries, key=lambda e: e["id"])
    counts: dict[str, int] = {}
    for entry in entries:
        counts[entry["operator"]] = counts.get(entry["operator"], 0) + 1
    return {
        "schema": SCHEMA,
        "provenance": PROVENANCE,
        "sha256": _root(entries),
        "minimum": len(entries),
        "operators": {
            name: {
                "version": OPERATORS()[name].version,
                "arguments": list(OPERATORS()[name].parameters),
                "outputs": list(OPERATORS()[name].outputs),
                "judged": list(OPERATORS()[name].judged),
                "minimum": count,
            }
            for name, count in sorted(counts.items())
        },
        "cases": entries,
    }


def _root(entries: Sequence[dict[str, Any]]) -> str:
    """SHA-256 of the lines of all cases: what a file is for (exact, formats, attributes) counts as its bytes do."""
    return hashlib.sha256("\n".join(json.dumps(e, sort_keys=True) for e in entries).encode()).hexdigest()


def dump(description: dict[str, Any]) -> str:
    """The manifest as text: one line a case, so that a change reads as a change."""
    head = {k: v for k, v in description.items() if k != "cases"}
    lines = ",\n  ".join(json.dumps(e, sort_keys=True, allow_nan=False) for e in description["cases"])
    return json.dumps(head, indent=1, sort_keys=True)[:-2] + ',\n "cases": [\n  ' + lines + "\n ]\n}\n"


def regenerate(
    folder: Path = FOLDER, *, keep: bool = False, progress: Callable[[str], None] | None = None
) -> list[str]:
    """Rebuild the corpus beside `folder`; unless `keep`, put it in place when whole. Returns the files that differ."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".vectors-", dir=folder.parent))
    try:
        (fresh / "manifest.json").write_text(dump(generate(fresh, progress=progress)))
        changed = differences(folder, fresh)
        if changed and not keep:
            _put(fresh, folder)
        return changed
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _put(fresh: Path, folder: Path) -> None:
    """Exchange one folder for another; whatever happens in between, `folder` is one of the two."""
    old = fresh.with_name(fresh.name + "-old")
    try:
        if folder.exists():
            os.replace(folder, old)
        os.replace(fresh, folder)
        folder.chmod(0o755)
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        shutil.rmtree(old, ignore_errors=True)


def differences(one: Path, other: Path) -> list[str]:
    """Relative names of the files that are not byte-identical in both folders."""
    names = {str(p.relative_to(root)) for root in (one, other) if root.exists() for p in root.rglob("*") if p.is_file()}

    def content(root: Path, name: str) -> bytes | None:
        return (root / name).read_bytes() if (root / name).is_file() else None

    return sorted(n for n in names if content(one, n) != content(other, n))


def read_manifest(folder: Path = FOLDER) -> dict[str, Any]:
    """The manifest, checked against itself: counts, root hash, names that stay inside the folder."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise CorpusError(f"vectors: no manifest at {path}")
    try:
        read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorpusError(f"vectors: {path} is not JSON: {error}") from None
    try:
        return _consistent(read, folder)
    except (KeyError, TypeError, AttributeError) as error:
        raise CorpusError(f"vectors: {path} is not a manifest: {type(error).__name__}: {error}") from None


def _consistent(read: dict[str, Any], folder: Path) -> dict[str, Any]:
    if read.get("schema") != SCHEMA:
        raise CorpusError(f"vectors: expected schema {SCHEMA}, received {read.get('schema')!r}")
    entries, root = read["cases"], folder.resolve()
    for entry in entries:
        # A file name in the folder is not enough: "a/../../corpus/b" is one, and would leave a copy of the folder.
        inside = (folder / entry["file"]).resolve().is_relative_to(root)
        if not inside or ".." in Path(entry["file"]).parts:
            raise CorpusError(f"vectors: {entry['file']} leaves the corpus folder")
    for key in ("id", "file"):
        if len({e[key] for e in entries}) != len(entries):
            raise CorpusError(f"vectors: the manifest lists a case twice ({key})")
    digest = _root(entries)
    if digest != read["sha256"] or len(entries) < max(read["minimum"], 1):
        raise CorpusError(
            f"vectors: the manifest promises {read['minimum']} cases with root {read['sha256'][:12]}, "
            f"it lists {len(entries)} with root {digest[:12]}"
        )
    for name, operator in read["operators"].items():
        have = sum(e["operator"] == name for e in entries)
        if have < operator["minimum"]:
            raise CorpusError(f"vectors: {name} promises {operator['minimum']} cases, the manifest lists {have}")
    return read


def load(
    folder: Path = FOLDER, names: Sequence[str] | None = None, manifest: dict[str, Any] | None = None
) -> list[Vector]:
    """The vectors of all or of some operators, every byte checked against the manifest, read here unless given."""
    entries = (read_manifest(folder) if manifest is None else manifest)["cases"]
    return [_load(folder, e) for e in entries if names is None or selected(e["operator"], names)]


def load_case(identifier: str, folder: Path = FOLDER) -> Vector:
    """One vector by its id, "rope.rotate_interleaved/long-positions"."""
    entries = read_manifest(folder)["cases"]
    for entry in entries:
        if entry["id"] == identifier:
            return _load(folder, entry)
    near = [e["id"] for e in entries if e["operator"] == identifier.split("/")[0]] or sorted(
        {e["operator"] for e in entries}
    )
    raise CorpusError(f"vectors: no case {identifier!r}; there are: {', '.join(near)}")


def _load(folder: Path, entry: dict[str, Any]) -> Vector:
    from safetensors import SafetensorError
    from safetensors.numpy import load as parse

    path = folder / entry["file"]
    if not path.is_file():
        raise CorpusError(f"vectors: {entry['file']} is missing; the manifest promises it")
    size = path.stat().st_size
    if size != entry["bytes"] or size > LARGEST_FILE:
        raise CorpusError(f"vectors: {entry['file']} has {size} bytes, expected {entry['bytes']}")
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != entry["sha256"]:
        raise CorpusError(f"vectors: {entry['file']} has SHA-256 {digest[:12]}..., expected {entry['sha256'][:12]}...")
    try:
        return _checked(_parsed(entry, parse(data)))
    except (KeyError, SafetensorError) as error:
        raise CorpusError(f"vectors: {entry['file']} cannot be read: {type(error).__name__}: {error}") from None


def _parsed(entry: dict[str, Any], held: dict[str, np.ndarray]) -> Vector:
    arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry["attributes"].items()}
    expected: dict[str, np.ndarray] = {}
    bounds: dict[str, dict[str, np.ndarray]] = {}
    for key, value in held.items():
        kind, _, name = key.partition("/")
        if kind == "input":
            arguments[name] = value.astype(np.float64) if value.dtype.kind == "f" else value
        elif kind == "expected":
            expected[name] = value
        else:
            output, _, profile = name.partition("/")
            bounds.setdefault(profile, {})[output] = value.astype(np.float64)
    case = Case(
        entry["operator"],
        entry["id"].partition("/")[2],
        arguments,
        tuple(entry["clauses"]),
        entry["exact"],
        entry["angle"],
        entry["ill_conditioned"],
        tuple(entry["dtypes"]),
        entry["note"],
    )
    # The file lists its tensors by name; results are compared in the order in which they are returned.
    order = OPERATORS()[case.op].judged
    return Vector(case, {name: expected[name] for name in order}, bounds)


def verify(folder: Path = FOLDER) -> dict[str, Any]:
    """Check every byte of the corpus; returns the manifest, raises CorpusError at the first difference."""
    read = read_manifest(folder)
    known = {e["file"] for e in read["cases"]} | {"manifest.json"}
    stray = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    unknown = [name for name in stray if name not in known]
    if unknown:
        raise CorpusError(f"vectors: not in the manifest: {', '.join(unknown[:5])}")
    for entry in read["cases"]:
        _load(folder, entry)
    return read


def export(target: Path, folder: Path = FOLDER, names: Iterable[str] | None = None) -> int:
    """Copy the corpus (or some operators) to `target`, which appears only when whole; the number of cases."""
    if target.exists():
        raise CorpusError(f"vectors export: {target} exists already")
    read = verify(folder)
    chosen = None if names is None else list(names)
    entries = [e for e in read["cases"] if chosen is None or selected(e["operator"], chosen)]
    if not entries:
        raise CorpusError(f"vectors export: no case of {', '.join(chosen or ())}")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=target.name + ".", dir=target.parent))
    try:
        for entry in entries:
            path = part / entry["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / entry["file"], path)
        (part / "manifest.json").write_text(dump(manifest(entries)))
        part.chmod(0o755)
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return len(entries)


def weaknesses(vectors: Sequence[Vector]) -> list[str]:
    """Vectors that a lazy answer would pass: all zeros, the mean everywhere, the previous vector's output.

    Replayed under the strict and fused profiles when the corpus is built; the list must be empty.
    """
    from conformance.verdict import compare

    found = []
    previous: dict[str, np.ndarray] = {}
    for vector in vectors:
        finite = {k: np.where(np.isfinite(v), v, 0.0) for k, v in vector.expected.items()}
        answers = {
            "all zeros": {k: np.zeros_like(v) for k, v in vector.expected.items()},
            "the mean everywhere": {k: np.full_like(v, v.mean() if v.size else 0.0) for k, v in finite.items()},
            "the previous output": previous,
        }
        if all(v.size <= 1 for v in vector.expected.values()):
            # A single number is its own mean.
            del answers["the mean everywhere"]
        for answer, outputs in answers.items():
            if [v.shape for v in outputs.values()] != [v.shape for v in vector.expected.values()]:
                continue
            for profile in profiles(vector.case):
                if profile.name == "eager":
                    continue
                if compare(list(outputs.values()), vector, profile, exact=vector.case.exact).ok:
                    found.append(f"{vector.case.id} ({profile}) passes {answer}")
        previous = vector.expected
    return found
