"""A model folder or somebody else's checkpoint on arrays from a file, in NumPy, PyTorch or ONNX Runtime.

    outputs = running.run(Path("bert_model.ckpt"), running.inputs(Path("ids.npz")), dialect="bert4keras-0.11.3")

NumPy is the specification, which calculates in float64 alone: with dtype float32 its weights and outputs are rounded to
float32. PyTorch and ONNX Runtime calculate in the dtype.
"""

import io
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from refimpl import check, dialects
from refimpl import model as specification
from refimpl.model import Model
from refimpl.models import _encoder
from torchimpl import convert
from torchimpl import source as sources
from torchimpl.source import FOLDER

BACKENDS = ("numpy", "torch", "onnx")
DTYPES = ("float64", "float32")
MASKS = ("bert4keras",)
# What an array may be called, in our words and in those of Hugging Face.
NAMES: Mapping[str, tuple[str, ...]] = {
    "token_ids": ("token_ids", "input_ids"),
    "segment_ids": ("segment_ids", "token_type_ids"),
    "mask": ("mask", "attention_mask"),
    "positions": ("positions", "position_ids"),
}
# Of all inputs unpacked, of the outputs of one run, and of the scores of the texts that are run at a time.
LARGEST_INPUT, LARGEST_OUTPUT, LARGEST_SCORES = 1 << 28, 1 << 32, 1 << 28


class RunError(check.SpecError):
    """Inputs that are not those of a model, or outputs that would not fit."""


def inputs(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by our names: token_ids (b, n) and, as far as given, segment_ids, mask, positions.

    Masks may be boolean, or numbers 0 and 1 as Hugging Face has them. Nothing pickled is opened, and sizes are bounded
    before anything is allocated.

    Raises: RunError for a file that is none, an array that is unknown or given under both its names, and shapes that
        differ.
    """
    held = _arrays(file)
    known = [name for names in NAMES.values() for name in names]
    unknown = sorted(held.keys() - set(known))
    if unknown:
        _refuse(str(file), f"arrays named {', '.join(known)}", ", ".join(unknown))
    made = {}
    for ours, names in NAMES.items():
        given = [name for name in names if name in held]
        if len(given) > 1:
            _refuse(str(file), f"one of {' and '.join(names)}", "both")
        if given:
            made[ours] = held[given[0]]
    if "token_ids" not in made:
        _refuse(str(file), "an array token_ids or input_ids", ", ".join(held) or "no array")
    shape = made["token_ids"].shape
    if len(shape) != 2 or 0 in shape:
        _refuse(str(file), "token_ids of shape (b, n), neither of them 0", shape)
    for name, array in made.items():
        if array.shape != shape:
            _refuse(str(file), f"{name} of the shape {shape} of token_ids", array.shape)
        kinds = "biu" if name == "mask" else "iu"
        if array.dtype.kind not in kinds:
            _refuse(str(file), f"{name} of whole numbers", array.dtype)
        if name != "mask":
            made[name] = array.astype(np.int64)
    if "mask" in made:
        mask = made["mask"]
        if not np.isin(mask, (0, 1)).all():
            _refuse(str(file), "a mask of 0 and 1", "other numbers")
        made["mask"] = mask.astype(np.bool_)
    return made


def run(
    path: Path,
    given: Mapping[str, np.ndarray],
    *,
    config_file: Path | None = None,
    model: str | None = None,
    dialect: str | None = None,
    backend: str = "numpy",
    dtype: str = "float64",
    layers: bool = False,
    mask_from_ids: str | None = None,
) -> dict[str, np.ndarray]:
    """Everything that a model gives on `given`, by name; with `layers` hidden_states.0 ... hidden_states.L too.

    dialect: of a checkpoint, whose constants it was trained with; of a model folder, whose constants to take instead of
        its own. mask_from_ids: whose rule makes the mask where none is given; without it every token is real.

    Raises: RunError for a backend, dtype or rule that is not known, a mask that is given and asked to be derived, and
        outputs beyond LARGEST_OUTPUT, and a model with a head that chooses among texts; as torchimpl.source.find,
        convert.load, refimpl.model.forward.
    """
    for name, value, choices in (("backend", backend, BACKENDS), ("dtype", dtype, DTYPES)):
        if value not in choices:
            _refuse(name, f"one of {', '.join(choices)}", repr(value))
    given = dict(given)
    if mask_from_ids is not None:
        if mask_from_ids not in MASKS:
            _refuse("mask_from_ids", f"one of {', '.join(MASKS)}", repr(mask_from_ids))
        if "mask" in given:
            _refuse("mask_from_ids", "no mask among the inputs", "one")
        given["mask"] = _encoder.mask_from_ids_bert4keras(given["token_ids"])
    held, weights = _model(path, config_file, model, dialect)
    if held.choosing:
        _refuse(str(path), "a model of one text a row", "the head multiple_choice, which reads (b, k, n)")
    rows = _rows(held, given["token_ids"].shape, layers)
    # Alike for every backend: torch and ONNX Runtime would say it in their words, or read a table from its end.
    segment_ids, mask, positions = (given.get(name) for name in ("segment_ids", "mask", "positions"))
    _encoder.checked_inputs("run", given["token_ids"], segment_ids, mask, positions, held.config)
    onnx = partial(_onnx, positions=positions is not None)
    made: Mapping[str, Any] = {"numpy": _numpy, "torch": _torch, "onnx": onnx}
    call = made[backend](held, weights, dtype, layers)
    parts = []
    for start in range(0, len(given["token_ids"]), rows):
        parts.append(call({name: array[start : start + rows] for name, array in given.items()}))
    return {name: np.concatenate([part[name] for part in parts]).astype(dtype) for name in parts[0]}


def packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of an .npz file."""
    made = io.BytesIO()
    np.savez(made, allow_pickle=False, **arrays)
    return made.getvalue()


def _model(
    path: Path, config_file: Path | None, model: str | None, dialect: str | None
) -> tuple[Model, dict[str, Any]]:
    source = sources.find(path, config_file)
    if source.kind != FOLDER:
        return convert.load(source, convert.plan(source, model=model, dialect=dialect))
    if model is not None:
        _refuse(str(path), "no model for a model folder, which names its own", model)
    held, weights = convert.load(source, None)
    if dialect is not None:
        held = Model(dialects.replaced(held.config, dialect), held.heads, held.visible)
    return held, weights


def _rows(model: Model, shape: tuple[int, ...], layers: bool) -> int:
    """How many texts are run at a time, so that their scores stay within LARGEST_SCORES."""
    b, n = shape
    config = model.config
    wide = config.hidden_size * (2 + (config.layers if layers else 0))
    wide += config.vocab_size if "mlm_logits" in specification.outputs(model) else 0
    if 8 * b * n * wide > LARGEST_OUTPUT:
        _refuse("run", f"outputs of at most {LARGEST_OUTPUT} bytes", f"{8 * b * n * wide} of {b} texts of {n} tokens")
    scores = 8 * getattr(config, "heads", 1) * n * n
    return max(1, min(b, LARGEST_SCORES // max(scores, 8 * n * wide)))


def _numpy(model: Model, weights: Mapping[str, Any], dtype: str, layers: bool) -> Any:
    import torch

    rounded = {name: tensor.to(getattr(torch, dtype)).double().numpy() for name, tensor in weights.items()}

    def call(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        made = specification.forward(rounded, **given, model=model)
        states = specification.hidden_states(rounded, **given, model=model) if layers else []
        return {**made, **{f"hidden_states.{i}": state for i, state in enumerate(states)}}

    return call


def _torch(model: Model, weights: Mapping[str, Any], dtype: str, layers: bool) -> Any:
    import torch

    from torchimpl import checkpoint

    kind = getattr(torch, dtype)
    # A module begins in float32, which would round weights of float64.
    module = checkpoint.module(model).to(kind).eval()
    module.load_weights({name: tensor.to(kind) for name, tensor in weights.items()})

    def call(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in given.items()}
        with torch.no_grad():
            made = {name: tensor.numpy() for name, tensor in module(**tensors).items()}
            states = module.hidden_states(**tensors) if layers else []
        return {**made, **{f"hidden_states.{i}": state.numpy() for i, state in enumerate(states)}}

    return call


def _onnx(model: Model, weights: Mapping[str, Any], dtype: str, layers: bool, *, positions: bool) -> Any:
    import onnxruntime
    import torch

    from export import model as exported

    held = {name: tensor.to(getattr(torch, dtype)).numpy() for name, tensor in weights.items()}
    file = exported.build(model, held, layers=layers, positions=positions).SerializeToString()
    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    except Exception as error:
        _refuse("backend onnx", f"a graph that ONNX Runtime has in {dtype}", str(error).splitlines()[0])
    names = [entry.name for entry in session.get_outputs()]

    def call(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        ids = given["token_ids"]
        filled = {
            "token_ids": ids,
            "segment_ids": given.get("segment_ids", np.zeros_like(ids)),
            "mask": given.get("mask", np.ones(ids.shape, np.bool_)),
            **({"positions": given["positions"]} if positions else {}),
        }
        return dict(zip(names, session.run(names, filled), strict=True))

    return call


def _arrays(file: Path) -> dict[str, np.ndarray]:
    made = {}
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
            size = sum(part.file_size for part in parts)
            if size > LARGEST_INPUT:
                _refuse(str(file), f"arrays of at most {LARGEST_INPUT} bytes", size)
            for part in parts:
                if not part.filename.endswith(".npy") or part.filename[:-4] in made:
                    _refuse(str(file), "arrays, each once", part.filename)
                with archive.open(part) as packed:
                    data = io.BytesIO(packed.read())
                _check_header(file, part.filename, data)
                made[part.filename[:-4]] = np.lib.format.read_array(data, allow_pickle=False)
    except RunError:
        raise
    # A malformed archive or array may raise almost anything.
    except Exception as error:
        told = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        _refuse(str(file), "an .npz file of numbers", told)
    return made


def _check_header(file: Path, name: str, data: io.BytesIO) -> None:
    """The array that a header announces is there, so that no more is allocated than the file has."""
    version = np.lib.format.read_magic(data)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(data)
    announced = int(np.prod([int(axis) for axis in shape], dtype=object)) * dtype.itemsize
    there = data.getbuffer().nbytes - data.tell()
    if dtype.hasobject or announced != there:
        _refuse(f"{file}: {name}", f"{there} bytes of numbers", f"{announced} of dtype {dtype}")
    data.seek(0)


def _refuse(where: str, expected: str, received: Any) -> NoReturn:
    raise RunError(f"run: {where}: expected {expected}, received {received}")
