"""A trained model as a folder: config.json, model.safetensors and manifest.json, which has the SHA-256 of both
and of what belongs to the model besides, such as a vocabulary.

config.json is a whole model as refimpl/model.py has it: encoder, visible, heads. The weights have the names of the
specification, kernels (in, out).

Nothing in the folder is executed when it is read: JSON and safetensors hold numbers and names only.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors
from torch import Tensor

from refimpl import config
from refimpl import model as specification
from refimpl.model import Model
from torchimpl import model as modules

# Raised when a reader of this version could no longer read the folder. 1 had an encoder's Config in config.json, and no
# heads.
FORMAT = 2
CONFIG, WEIGHTS, MANIFEST = "config.json", "model.safetensors", "manifest.json"
# Vocabularies, and the like.
LARGEST_EXTRA = 256 * 2**20


class CheckpointError(ValueError):
    """A folder that cannot be read as a model, or weights that are not those of the configuration."""


@dataclass(frozen=True)
class Checkpoint:
    """A model, its weights by the names of the specification, and the SHA-256 of the file that held them."""

    model: Model
    weights: dict[str, Tensor]
    sha256: str


def save(folder: Path, model: Model, weights: Mapping[str, Tensor], extra: Mapping[str, bytes] | None = None) -> None:
    """Write a model folder, which appears under its name only when whole. A model that is there already is replaced.

    weights: by the names of the specification, as torchimpl.model.Model.weights gives them.
    extra: files that belong to the model, such as a vocabulary, by name; the manifest lists them too.

    Raises: CheckpointError for weights that `model` does not have or lacks, for another shape or a number that is not
        finite, for an extra file whose name is taken or leads elsewhere, and where something that is no model has the
        name of the folder.
    """
    _check(str(folder), model, weights)
    for name in extra or {}:
        if name in ("", ".", "..", CONFIG, WEIGHTS, MANIFEST) or set(name) & set("/\\\0"):
            raise CheckpointError(f"checkpoint: {folder}: no extra file can have the name {name!r}")
    held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    files = {
        CONFIG: (json.dumps(specification.to_dict(model), indent=2) + "\n").encode(),
        WEIGHTS: write_tensors(held),
        **(extra or {}),
    }
    listed = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    files[MANIFEST] = (json.dumps({"format": FORMAT, "files": listed}, indent=2) + "\n").encode()
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise CheckpointError(f"checkpoint: {folder} exists and is no model folder; it is left as it is")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, data in files.items():
            write(part / name, data)
        part.chmod(0o755)
        _place(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def load(folder: Path) -> Checkpoint:
    """Read a model folder.

    Raises: CheckpointError for a missing or changed file, another format, and as `save`; DomainError for a
        configuration that refimpl.model refuses.
    """
    held = _manifest(folder)
    files = {name: _intact(folder / name, held) for name in (CONFIG, WEIGHTS)}
    model = specification.from_dict(config.parsed(files[CONFIG], str(folder / CONFIG)))
    try:
        weights = read_tensors(files[WEIGHTS])
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint: {folder / WEIGHTS} is no safetensors file ({error})") from None
    _check(str(folder), model, weights)
    # In the order of the specification: a safetensors file has none of its own.
    ordered = {name: weights[name] for name in specification.shapes(model)}
    return Checkpoint(model, ordered, held[WEIGHTS]["sha256"])


def listed(folder: Path) -> tuple[str, ...]:
    """The names of all files that the manifest of a model folder lists.

    Raises: as `load`, for the manifest.
    """
    return tuple(_manifest(folder))


def extra(folder: Path, name: str) -> bytes:
    """A file that belongs to a model, as `save` wrote it.

    Raises: CheckpointError for one that is not listed, is missing, was changed or is beyond LARGEST_EXTRA; as `load`,
        for the manifest.
    """
    held = _manifest(folder)
    if name not in held:
        raise CheckpointError(f"checkpoint: {folder / MANIFEST} does not list {name}; it lists {', '.join(held)}")
    file = folder / name
    if file.is_file() and file.stat().st_size > LARGEST_EXTRA:
        raise CheckpointError(f"checkpoint: {file} has {file.stat().st_size} bytes; at most {LARGEST_EXTRA} are read")
    return _intact(file, held)


def module(model: Model, weights: Mapping[str, Tensor] | None = None, **options: Any) -> modules.Model:
    """The torch module of a whole model, with these weights or as it is initialised.

    options: what the encoder takes besides, such as dropout.
    """
    made = modules.Model(model, **options)
    if weights is not None:
        made.load_weights(weights)
    return made


def write(path: Path, data: bytes) -> None:
    """Write a file that appears under its name only when whole, also if the machine stops."""
    handle, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def _place(part: Path, folder: Path) -> None:
    """Rename `part`. A folder cannot be renamed onto another: the old one steps aside, and comes back if need be."""
    if not folder.exists():
        part.rename(folder)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        folder.rename(aside / folder.name)
        part.rename(folder)
    except BaseException:
        if not folder.exists():
            (aside / folder.name).rename(folder)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of every file by name, of a folder of this format."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        found = manifest["format"]
        files = {name: {kind: told[kind] for kind in ("bytes", "sha256")} for name, told in manifest["files"].items()}
        older, newer = found < FORMAT, found > FORMAT
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint: {folder} is no model folder: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"checkpoint: {folder / MANIFEST} is no manifest of a model folder") from None
    if newer:
        raise CheckpointError(f"checkpoint: {folder} has format {found}, this refimpl reads {FORMAT}")
    if older:
        raise CheckpointError(
            f"checkpoint: {folder} has format {found} of an earlier refimpl, whose {CONFIG} tells an encoder without "
            f"its heads. The weights have kept their names: read {WEIGHTS} with safetensors, and save them again with "
            "torchimpl.checkpoint.save(folder, refimpl.model.Model(config, heads, visible), weights); the heads of "
            'gau_alpha and flash were (SequenceClassifier(labels=..., pooling="mean_of_tokens"),)'
        )
    return files


def _intact(file: Path, listed: Mapping[str, Any]) -> bytes:
    if file.name not in listed:
        raise CheckpointError(f"checkpoint: {file.parent / MANIFEST} does not list {file.name}")
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint: {file} is missing") from None
    if hashlib.sha256(data).hexdigest() != listed[file.name]["sha256"]:
        raise CheckpointError(
            f"checkpoint: {file} is not the file that was written: {len(data)} bytes, expected "
            f"{listed[file.name]['bytes']} with SHA-256 {listed[file.name]['sha256'][:12]}..."
        )
    return data


def _check(where: str, model: Model, weights: Mapping[str, Tensor]) -> None:
    shapes = specification.shapes(model)
    missing, unknown = sorted(shapes.keys() - weights.keys()), sorted(weights.keys() - shapes.keys())
    if missing or unknown:
        raise CheckpointError(
            f"checkpoint: {where}: the weights are not those of {_called(model)}; missing: {_listed(missing)}; "
            f"unknown: {_listed(unknown)}"
        )
    for name, shape in shapes.items():
        tensor = weights[name]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise CheckpointError(
                f"checkpoint: {where}: expected {name} of shape {shape} and a floating dtype, received "
                f"{tuple(tensor.shape)} of {tensor.dtype}"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"checkpoint: {where}: {name} holds numbers that are not finite")


def _called(model: Model) -> str:
    """The encoder with its heads, in words."""
    return " with ".join([model.config.model, *(head["head"] for head in specification.to_dict(model)["heads"])])


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
