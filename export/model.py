"""A trained model as an ONNX file that is held against the specification before it is written.

The file takes token_ids and segment_ids (int64) and mask (bool, True = token), all of shape (batch, length), or (batch,
choices, length) where a head chooses, and gives what the model gives, by the names of refimpl.model.OUTPUTS. Weights
keep their names, layers are calls of local functions, and the metadata tells the model, where the weights come from and
how far the graph is from the specification. The same folder gives the same bytes.
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
from export.graph import Value
from export.models import _encoder, _heads
from refimpl import model as specification
from refimpl.model import Model
from refimpl.models import _heads as heads_of
from torchimpl import checkpoint

# Of refimpl.format in the metadata; raised when a reader of this version could no longer use the file. 1 told an
# encoder and no heads, in refimpl.config.
FORMAT = 2
INPUTS = ("token_ids", "segment_ids", "mask")
# Of a graph that is asked to take them.
POSITIONS = "positions"
OPSET = 23
DTYPES = ("float32", "float64")
# A protobuf message cannot be larger.
LARGEST = 2**31 - 1


class ExportError(ValueError):
    """A model that cannot be written as one ONNX file."""


def build(
    model: Model,
    weights: Mapping[str, np.ndarray],
    *,
    opset: int = OPSET,
    stored: bool = True,
    layers: bool = False,
    positions: bool = False,
) -> onnx.ModelProto:
    """The graph of a model in the dtype of its weights, without metadata.

    stored: whether the file holds the weights. Without them it is no whole model: onnx's ReferenceEvaluator takes them
        beside the inputs, by their names, and no message has to hold them.
    layers: whether it gives hidden_states.0 ... hidden_states.L too, behind its other outputs.
    positions: whether it takes the positions of all tokens, int64 of the shape of token_ids, as its fourth input; else
        they are 0, 1, 2, ... of the array. runtime.session takes files with neither of the two.

    Raises: ExportError for weights that one ONNX file cannot hold.
    """
    size = sum(array.nbytes for array in weights.values())
    if stored and size > LARGEST * 0.99:
        dtype = next(iter(weights.values())).dtype
        raise ExportError(f"export: the weights have {size} bytes in {dtype}; one ONNX file holds less than {LARGEST}")
    ids = np.zeros((2, 5, 3) if model.choosing else (2, 3), np.int64)
    examples = {"token_ids": ids, "segment_ids": ids, "mask": np.ones(ids.shape, np.bool_)}
    if positions:
        examples[POSITIONS] = ids

    def call(**inputs: Value) -> list[Value]:
        kept = graph.initializer if stored else _absent
        held = {name: kept(name, array) for name, array in weights.items()}
        return list(forward(held, **inputs, model=model, layers=layers).values())

    built = graph.build(call, examples, opset=opset, outputs=outputs(model, layers=layers))
    if built.fixed:
        raise ExportError(f"export: the graph of {model.config.model} takes only {dict(built.fixed)}")
    _name_sizes(built.model, model)
    return built.model


def outputs(model: Model, *, layers: bool = False) -> tuple[str, ...]:
    """The names of what a graph gives, in order."""
    return specification.outputs(model) + (_states(model) if layers else ())


def forward(
    weights: Mapping[str, Value],
    token_ids: Value,
    segment_ids: Value,
    mask: Value,
    positions: Value | None = None,
    *,
    model: Model,
    layers: bool = False,
) -> dict[str, Value]:
    """refimpl.model.forward, written into the graph; with `layers` every hidden state too, the embedding's first."""
    lead = [token_ids.size(axis) for axis in range(token_ids.ndim - 1)]

    def apart(x: Value) -> Value:
        """(batch * choices, ...) as (batch, choices, ...)."""
        return x.reshape(*lead, *(x.size(axis) for axis in range(1, x.ndim)))

    if model.choosing:
        # Every choice is a text by itself.
        texts, n = lead[0] * lead[1], token_ids.size(2)
        token_ids, segment_ids, mask = (x.reshape(texts, n) for x in (token_ids, segment_ids, mask))
        positions = None if positions is None else positions.reshape(texts, n)
    encoder = importlib.import_module(f"export.models.{model.config.model}")
    # Of flash, the Config says it.
    seen = {} if model.config.model == "flash" else {"visible": _encoder.VISIBLE[model.visible]}
    states = encoder.hidden_states(weights, token_ids, segment_ids, mask, positions, config=model.config, **seen)
    made = {"last_hidden_state": states[-1]}
    for head in model.heads:
        if isinstance(head, heads_of.Pooler):
            made["pooled"] = _heads.pooled(weights, states[-1], head=head)
    for head in model.heads:
        if not isinstance(head, heads_of.Pooler):
            made |= _heads.given(head, weights, states, mask, positions, made.get("pooled"), model.config, apart)
    if layers:
        made |= dict(zip(_states(model), states, strict=True))
    if model.choosing:
        made = {name: x if name == "choice_logits" else apart(x) for name, x in made.items()}
    return {name: made[name] for name in outputs(model, layers=layers)}


def export(
    folder: Path, file: Path, *, opset: int = OPSET, dtype: str = "float32", inline: bool = False
) -> tuple[parity.Parity, ...]:
    """Write the ONNX file of a model folder, which appears under its name only when it is whole and agrees.

    inline: without local functions, for readers that do not know them; runtimes inline them by themselves.

    Raises: CheckpointError as torchimpl.checkpoint.load; ParityError where the graph leaves its bound, and where the
        model amplifies roundings by so much that the bound would say nothing.
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
    model = build(held.model, weights, opset=opset)
    # Twice as large as a file in float32, so that no message could hold it.
    twin = build(held.model, exact, opset=opset, stored=False)
    if inline:
        model = inliner.inline_local_functions(model)
    onnx.checker.check_model(model, full_check=True)
    found = parity.check(model, twin, held.model, exact)
    told = {
        "refimpl.format": str(FORMAT),
        "refimpl.model": json.dumps(specification.to_dict(held.model)),
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


def _states(model: Model) -> tuple[str, ...]:
    return tuple(f"hidden_states.{i}" for i in range(model.config.layers + 1))


def _absent(name: str, array: np.ndarray) -> Value:
    """A weight that the graph names and does not hold."""
    return graph.scope().value(name, array.dtype, array.shape)


def _name_sizes(made: onnx.ModelProto, model: Model) -> None:
    """One name for the batch, one for the choices and one for the length, in place of one for every axis."""
    d, lead = model.config.hidden_size, ["batch", "choices"] if model.choosing else ["batch"]
    heads = {heads_of.name_of(head): head for head in model.heads}
    pointer: Any = heads.get("entity_pointer", heads.get("efficient_entity_pointer"))
    classifier: Any = heads.get("sequence_classifier")
    sizes: dict[str, list[str | int]] = {
        **{name: ["length"] for name in (*INPUTS, POSITIONS)},
        **{name: ["length", d] for name in _states(model)},
        "last_hidden_state": ["length", d],
        "mlm_logits": ["length", model.config.vocab_size],
        "pooled": [d],
        "next_sentence_logits": [2],
        "logits": [classifier.labels] if classifier else [],
        "embedding": [d],
        "choice_logits": [],
        "entity_scores": [pointer.types if pointer else 0, "length", "length"],
        "span_scores": ["length", "length"],
    }
    for entry in (*made.graph.input, *made.graph.output):
        kind = entry.type.tensor_type.elem_type
        entry.CopyFrom(onnx.helper.make_tensor_value_info(entry.name, kind, [*lead, *sizes[entry.name]]))
