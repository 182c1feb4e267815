"""Checkpoints of other people as model folders of ours, number by number.

    convert(Path("chinese_roformer-v2-char_L-12_H-768_A-12"), Path("models/v2"), dialect="bert4keras-0.11.3")

Which tensor is which weight is refimpl/originals.py, how files are read torchimpl/source.py. Nothing is calculated: a
weight is a tensor as it is stored, transposed or one of its rows, in its own dtype unless another is asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from refimpl import originals
from refimpl.model import Model, Visible
from refimpl.originals import Plan
from torchimpl import source as sources
from torchimpl.source import FLOATS, FOLDER, Source, SourceError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Converted:
    """What was found and what was made of it."""

    source: Source
    plan: Plan
    # Of the weights that were written.
    dtypes: tuple[str, ...]
    parameters: int


def plan(
    source: Source,
    *,
    model: str | None = None,
    dialect: str | None = None,
    visible: Visible | None = None,
    pooler: Literal["tanh", "linear"] | None = None,
    ignore: Sequence[str] = (),
) -> Plan:
    """refimpl.originals.plan of a source.

    Raises: as that; SourceError for a model folder, which is ours already.
    """
    if source.kind == FOLDER:
        raise SourceError(f"source: {source.path} is a model folder already; there is nothing to convert")
    asked = {"model": model, "dialect": dialect, "visible": visible, "pooler": pooler}
    made: Plan = originals.plan(source.shapes, source.config, ignore=ignore, **asked)  # type: ignore[arg-type]
    return made


def weights(source: Source, plan: Plan, dtype: str | None = None) -> "dict[str, Tensor]":
    """Our weights, read from a source; of the dtype in which each is stored, or of `dtype`.

    C1. A tensor that is there twice must be the same bit by bit, else the model is not tied and not the one it seems.
    C2. Every number must be finite, before and after a change of dtype.
    Raises: SourceError naming the tensor; as Source.read.
    """
    import torch

    if dtype is not None and dtype not in FLOATS:
        raise SourceError(f"source: expected a dtype among {', '.join(FLOATS)}, received {dtype!r}")
    needed = dict.fromkeys([part.theirs for part in plan.parts.values()] + list(plan.copies))
    held = source.read(needed)
    for copy, of in plan.copies.items():
        if not _same_bits(held[copy], held[of]):
            raise SourceError(
                f"source: {source.path}: expected {copy} to be {of} bit by bit, as tied weights are; received "
                f"{_difference(held[copy], held[of])}"
            )
    made = {}
    for ours, part in plan.parts.items():
        tensor = held[part.theirs]
        if not torch.isfinite(tensor).all():
            raise SourceError(f"source: {source.path}: {part.theirs} holds numbers that are not finite")
        taken = part.take(tensor)
        made[ours] = taken if dtype is None else taken.to(getattr(torch, dtype))
        if not torch.isfinite(made[ours]).all():
            raise SourceError(f"source: {source.path}: {part.theirs} has numbers beyond the range of {dtype}")
    return made


def load(source: Source, plan: Plan | None, dtype: str | None = None) -> "tuple[Model, dict[str, Tensor]]":
    """The model and weights of any source: with its plan, or of a model folder, which needs none.

    Raises: as `weights`, and as torchimpl.checkpoint.load.
    """
    if plan is not None:
        return plan.model, weights(source, plan, dtype)
    from torchimpl import checkpoint

    held = checkpoint.load(source.path)
    return held.model, held.weights


def convert(
    path: Path,
    folder: Path,
    *,
    config_file: Path | None = None,
    model: str | None = None,
    dialect: str | None = None,
    visible: Visible | None = None,
    pooler: Literal["tanh", "linear"] | None = None,
    ignore: Sequence[str] = (),
    dtype: str | None = None,
) -> Converted:
    """Write the model folder of a checkpoint, which appears under its name only when whole, with its vocabulary.

    Raises: as source.find, `plan`, `weights` and torchimpl.checkpoint.save.
    """
    source = sources.find(path, config_file)
    made = plan(source, model=model, dialect=dialect, visible=visible, pooler=pooler, ignore=ignore)
    # Loading torch takes seconds, so it comes behind everything that can be refused without it.
    from torchimpl import checkpoint

    files = sources.carried(source)
    if folder.exists() and not (folder / checkpoint.MANIFEST).is_file():
        raise checkpoint.CheckpointError(f"checkpoint: {folder} exists and is no model folder; it is left as it is")
    held = weights(source, made, dtype)
    checkpoint.save(folder, made.model, held, files)
    dtypes = tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in held.values()}))
    return Converted(source, made, dtypes, sum(tensor.numel() for tensor in held.values()))


def _same_bits(one: "Tensor", other: "Tensor") -> bool:
    import torch

    if one.dtype != other.dtype:
        return False
    bits = [tensor.contiguous().view(torch.uint8) for tensor in (one, other)]
    return bool(torch.equal(*bits))


def _difference(one: "Tensor", other: "Tensor") -> str:
    if one.dtype != other.dtype:
        return f"{one.dtype} and {other.dtype}"
    differ = int((one != other).sum())
    return f"{differ} of {one.numel()} numbers that differ" if differ else "zeros of another sign, or NaN"
