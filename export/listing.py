"""What a file of weights holds, told by its headers: names, shapes, dtypes, bytes, and which model of ours it is.

listing.of(Path("bert_model.ckpt")).tensors
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refimpl import originals
from refimpl.check import SpecError
from refimpl.models import _heads
from torchimpl import source as sources
from torchimpl.source import FLOATS, FOLDER, Header, Source


@dataclass(frozen=True)
class Listing:
    """The tensors of a source and what they were recognised as."""

    path: Path
    kind: str
    tensors: Mapping[str, Header]
    # Numbers of floating tensors, where what is there twice is counted once and what has no part is not.
    parameters: int
    # What was detected, in words and in order: layout, model, heads, dialect; or why it is not one of ours.
    detected: Mapping[str, str]


def of(path: Path, config_file: Path | None = None) -> Listing:
    """The listing of anything that torchimpl.source.find reads, and of an ONNX file.

    Raises: as that; SpecError for an ONNX file that is none.
    """
    if path.suffix == ".onnx":
        return _onnx(path)
    source = sources.find(path, config_file)
    if source.kind == FOLDER:
        detected, unused = _of_folder(source), frozenset[str]()
    else:
        detected, unused = _of_original(source)
    counted = [header for name, header in source.tensors.items() if name not in unused and header.dtype in FLOATS]
    return Listing(path, source.kind, source.tensors, sum(math.prod(one.shape) for one in counted), detected)


def as_json(listing: Listing) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "path": str(listing.path),
        "kind": listing.kind,
        "parameters": listing.parameters,
        "bytes": sum(header.bytes for header in listing.tensors.values()),
        "detected": dict(listing.detected),
        "tensors": [
            {"name": name, "shape": list(header.shape), "dtype": header.dtype, "bytes": header.bytes}
            for name, header in listing.tensors.items()
        ],
    }


def _of_folder(source: Source) -> dict[str, str]:
    model = source.config
    return {
        "layout": "refimpl",
        "model": model.config.model,
        "visible": model.visible,
        "heads": _heads_of(model.heads),
        "dialect": " or ".join(originals.equal_dialects(model.config)) or "none of those known",
    }


def _of_original(source: Source) -> tuple[dict[str, str], frozenset[str]]:
    """What was detected, and the tensors that do not count as parameters."""
    try:
        layout, model = originals.recognise(source.tensors)
    except SpecError as error:
        return {"layout": f"not recognised: {error}"}, frozenset()
    detected = {"layout": f"{layout}: {originals.LAYOUTS[layout]}", "model": model}
    if source.config_file is None:
        return {**detected, "configuration": "none beside the weights"}, originals.unused(source.tensors, layout)
    detected["configuration"] = str(source.config_file)
    try:
        plan = originals.plan(source.shapes, source.config)
        detected["dialect"] = " or ".join(plan.dialects) or "none of those known; the epsilon is layer_norm_eps"
    except SpecError as error:
        # The first dialect stands in for the one that is not told, to see whether all else fits.
        try:
            plan = originals.plan(source.shapes, source.config, dialect="bert4keras-0.11.3")
        except SpecError:
            return {**detected, "convertible": f"no: {error}"}, originals.unused(source.tensors, layout)
        detected["dialect"] = "not told; conversion asks for it"
    heads, visible = _heads_of(plan.model.heads), plan.model.visible
    return {**detected, "visible": visible, "heads": heads}, frozenset([*plan.copies, *plan.left_out])


def _heads_of(heads: tuple[Any, ...]) -> str:
    return ", ".join(map(_heads.name_of, heads)) or "none"


def _onnx(path: Path) -> Listing:
    import onnx

    try:
        # Numbers in a file beside it are not opened.
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise SpecError(f"listing: {path}: expected an ONNX file, received {type(error).__name__}: {error}") from None
    tensors = {}
    for tensor in model.graph.initializer:
        dtype = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
        dtype = {"float": "float32", "double": "float64"}.get(dtype, dtype)
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        shape = tuple(tensor.dims)
        tensors[tensor.name] = Header(dtype, shape, math.prod(shape) * kind.itemsize, path)
    told = {entry.key: entry.value for entry in model.metadata_props if entry.key.startswith("refimpl.")}
    opsets = ", ".join(f"{entry.domain or 'ai.onnx'} {entry.version}" for entry in model.opset_import)
    counted = sum(math.prod(header.shape) for header in tensors.values() if header.dtype in FLOATS)
    inputs, outputs = (", ".join(entry.name for entry in part) for part in (model.graph.input, model.graph.output))
    return Listing(path, "ONNX file", tensors, counted, {"opset": opsets, "inputs": inputs, "outputs": outputs, **told})
