"""A trained model as an ONNX file that is held against the specification before it is written.

The file takes token_ids and segment_ids (int64) and mask (bool, True = token), all of shape (batch, length), and gives
logits, embedding and last_hidden_state. Weights keep their names, layers are calls of local functions, and the metadata
tells the configuration, where the weights come from and how far the graph is from the specification. The same folder
gives the same bytes.
"""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import inliner

import refimpl
from export import graph, parity
from refimpl import config as configuration
from torchimpl import checkpoint

# Of refimpl.format in the metadata; raised when a reader of this version could no longer use the file.
FORMAT = 1
INPUTS = ("token_ids", "segment_ids", "mask")
OUTPUTS = ("logits", "embedding", "last_hidden_state")
OPSET = 23
DTYPES = ("float32", "float64")
# A protobuf message cannot be larger.
LARGEST = 2**31 - 1


class ExportError(ValueError):
    """A model that cannot be written as one ONNX file."""


def build(config: Any, weights: Mapping[str, np.ndarray], *, opset: int = OPSET) -> onnx.ModelProto:
    """The graph of a model in the dtype of its weights, without metadata."""
    size = sum(array.nbytes for array in weights.values())
    if size > LARGEST * 0.99:
        raise ExportError(f"export: the weights have {size} bytes; one ONNX file holds less than {LARGEST}")
    forward = getattr(importlib.import_module(f"export.models.{config.model}"), "forward", None)
    if forward is None:
        raise ExportError(f"export: {config.model} is an encoder without a classifier, which cannot be exported yet")
    ids = np.zeros((2, 3), np.int64)
    examples = {"token_ids": ids, "segment_ids": ids, "mask": np.ones(ids.shape, np.bool_)}

    def call(**inputs: graph.Value) -> Any:
        return forward({name: graph.initializer(name, a) for name, a in weights.items()}, **inputs, config=config)

    built = graph.build(call, examples, opset=opset, outputs=OUTPUTS)
    if built.fixed:
        raise ExportError(f"export: the graph of {config.model} takes only {dict(built.fixed)}")
    _name_sizes(built.model, config)
    return built.model


def export(
    folder: Path, file: Path, *, opset: int = OPSET, dtype: str = "float32", inline: bool = False
) -> tuple[parity.Parity, ...]:
    """Write the ONNX file of a model folder, which appears under its name only when it is whole and agrees.

    inline: without local functions, for readers that do not know them; runtimes inline them by themselves.

    Raises: CheckpointError as torchimpl.checkpoint.load; ParityError where the graph leaves its bound.
    """
    if opset not in graph.OPSETS:
        raise ExportError(f"export: expected an opset among {graph.OPSETS}, received {opset}")
    if dtype not in DTYPES:
        raise ExportError(f"export: expected a dtype among {DTYPES}, received {dtype!r}")
    if file.is_dir():
        raise ExportError(f"export: expected the name of a file to write, received the folder {file}")
    held = checkpoint.load(folder)
    # Rounded once, so that what is compared is the graph and not the storage.
    weights = {name: tensor.to(getattr(torch, dtype)).numpy() for name, tensor in held.weights.items()}
    exact = {name: array.astype(np.float64) for name, array in weights.items()}
    model, twin = build(held.config, weights, opset=opset), build(held.config, exact, opset=opset)
    if inline:
        model = inliner.inline_local_functions(model)
    onnx.checker.check_model(model, full_check=True)
    found = parity.check(model, twin, held.config, exact)
    told = {
        "refimpl.format": str(FORMAT),
        "refimpl.config": json.dumps(configuration.to_dict(held.config)),
        "refimpl.dtype": dtype,
        "refimpl.opset": str(opset),
        "refimpl.parity": json.dumps([figures._asdict() for figures in found]),
        "refimpl.weights.sha256": held.sha256,
    }
    onnx.helper.set_model_props(model, told)
    model.producer_name, model.producer_version = "refimpl", refimpl.__version__
    file.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write(file, model.SerializeToString(deterministic=True))
    return found


def _name_sizes(model: onnx.ModelProto, config: Any) -> None:
    """One name for the batch and one for the length, in place of one for every axis."""
    widths = {"logits": config.labels, "embedding": config.hidden_size, "last_hidden_state": config.hidden_size}
    for entry in (*model.graph.input, *model.graph.output):
        sizes: list[str | int] = ["batch"] if entry.name in ("logits", "embedding") else ["batch", "length"]
        sizes += [widths[entry.name]] if entry.name in widths else []
        kind = entry.type.tensor_type.elem_type
        entry.CopyFrom(onnx.helper.make_tensor_value_info(entry.name, kind, sizes))
