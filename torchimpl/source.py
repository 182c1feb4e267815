"""Where weights come from: a checkpoint of TensorFlow, a file of safetensors or of PyTorch, or a model folder of ours.

    source = source.find(Path("chinese_roformer-v2-char_L-12_H-768_A-12"));   source.tensors;   source.read(names)

`find` reads headers and configurations alone. Every number in them is bounded by the size of a file before anything is
allocated for it, names of files stay inside their folder, and pickles are opened by torch's reader of weights alone,
which executes nothing.
"""

import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from refimpl import bundle, check, config
from refimpl import model as specification
from refimpl.model import Model

if TYPE_CHECKING:
    from torch import Tensor

TENSORFLOW, SAFETENSORS, TORCH, FOLDER = "TensorFlow checkpoint", "safetensors", "PyTorch file", "model folder"
# Of a configuration and of the list of shards, far beyond any; and of a vocabulary.
_LARGEST_CONFIG, _LARGEST_INDEX, _LARGEST_VOCABULARY = 1 << 20, 1 << 25, 1 << 26
# In the order in which they are looked for; those of transformers go before bert4torch's.
_CONFIGS = {
    TENSORFLOW: ("bert_config.json", "config.json"),
    SAFETENSORS: ("config.json", "bert4torch_config.json", "bert_config.json"),
    TORCH: ("config.json", "bert4torch_config.json", "bert_config.json"),
}
# Where a folder has several, the first is taken, as transformers does.
_WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
_SUFFIXES = {".safetensors": SAFETENSORS, ".bin": TORCH, ".pt": TORCH, ".pth": TORCH}
CARRIED = ("vocab.txt", "tokenizer.json", "tokenizer_config.json")
_SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
FLOATS = ("float16", "bfloat16", "float32", "float64")


class SourceError(check.SpecError):
    """Files that cannot be read as weights with their configuration."""


@dataclass(frozen=True)
class Header:
    """What a file tells of a tensor before it is read."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    file: Path


@dataclass(frozen=True)
class Source:
    """Weights that were found, and what lies beside them; nothing of them is in memory."""

    path: Path
    kind: str
    tensors: Mapping[str, Header]
    config_file: Path | None
    # What the configuration holds: JSON of theirs, or a model of ours.
    config: Any
    # Vocabularies, by name.
    carried: Mapping[str, Path]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by name."""
        return {name: header.shape for name, header in self.tensors.items()}

    def read(self, names: Iterable[str]) -> "dict[str, Tensor]":
        """These tensors, in the dtype in which they are stored.

        Raises: SourceError for numbers that are no floating ones, and for a file that changed or is damaged;
            BundleError as bundle.read.
        """
        wanted = list(names)
        for name in wanted:
            header = self.tensors[name]
            if header.dtype not in FLOATS:
                _refuse(f"{header.file}: {name}", f"a dtype among {', '.join(FLOATS)}", header.dtype)
        found: dict[str, Tensor] = {}
        for file in dict.fromkeys(self.tensors[name].file for name in wanted):
            own = [name for name in wanted if self.tensors[name].file == file]
            found |= _READERS[TENSORFLOW if self.kind == TENSORFLOW else _kind_of(file)](self, file, own)
        for name, tensor in found.items():
            header = self.tensors[name]
            if tuple(tensor.shape) != header.shape or str(tensor.dtype) != f"torch.{header.dtype}":
                _refuse(f"{header.file}: {name}", f"{header.dtype} of shape {header.shape}", "another since")
        return {name: found[name] for name in wanted}


def find(path: Path, config_file: Path | None = None) -> Source:
    """The weights at a path: a file, the prefix of a TensorFlow checkpoint, or a folder that holds one of them.

    config_file: their configuration, where it does not lie beside them under its usual name.

    Raises: SourceError for a path where no weights are or several kinds of them, files that are malformed, and shards
        outside their folder; BundleError as bundle.entries; DomainError for JSON that is malformed.
    """
    if path.is_dir() and (path / "manifest.json").is_file():
        if config_file is not None:
            _refuse(str(path), "no other configuration for a model folder", config_file)
        return _folder(path)
    kind, weights = _weights(path)
    beside = weights if weights.is_dir() else weights.parent
    if config_file is None:
        config_file = next((beside / name for name in _CONFIGS[kind] if (beside / name).is_file()), None)
    given = None if config_file is None else config.parsed(text(config_file, _LARGEST_CONFIG), str(config_file))
    carried = {name: beside / name for name in CARRIED if (beside / name).is_file()}
    return Source(path, kind, _tensors(kind, weights), config_file, given, carried)


def carried(source: Source) -> dict[str, bytes]:
    """The vocabularies beside the weights, by name.

    Raises: SourceError for a file beyond any vocabulary's size.
    """
    return {name: text(file, _LARGEST_VOCABULARY) for name, file in source.carried.items()}


def text(file: Path, largest: int = _LARGEST_CONFIG) -> bytes:
    """The bytes of a small file.

    Raises: SourceError for one that is missing or larger.
    """
    size = _size(file)
    if size > largest:
        _refuse(str(file), f"at most {largest} bytes", size)
    try:
        return file.read_bytes()
    except OSError as error:
        _refuse(str(file), "a file that can be read", error.strerror or error)


def _folder(path: Path) -> Source:
    file = path / "config.json"
    given = config.parsed(text(file, _LARGEST_CONFIG), str(file))
    tensors = _tensors(SAFETENSORS, path / "model.safetensors")
    model: Model = specification.from_dict(given)
    return Source(path, FOLDER, tensors, file, model, {n: path / n for n in CARRIED if (path / n).is_file()})


def _weights(path: Path) -> tuple[str, Path]:
    """What kind of weights a path names, and the file or prefix."""
    if path.is_dir():
        indexes = sorted(path.glob("*.index"))
        named = next((path / name for name in _WEIGHTS if (path / name).is_file()), None)
        if named is not None and indexes:
            _refuse(str(path), "weights of one kind; name the file", f"{named.name} and {indexes[0].name}")
        if named is not None:
            return _kind_of(named), named
        if indexes:
            # One alone needs no file `checkpoint`, whose paths may be those of another machine.
            return TENSORFLOW, indexes[0].with_suffix("") if len(indexes) == 1 else path
        _refuse(str(path), f"a folder with manifest.json, {', '.join(_WEIGHTS)} or *.index", "none of them")
    if path.suffix == ".index" or path.with_name(path.name + ".index").is_file():
        return TENSORFLOW, path.with_suffix("") if path.suffix == ".index" else path
    if not path.is_file():
        _refuse(str(path), "a folder, a file of weights or the prefix of a TensorFlow checkpoint", "nothing there")
    return _kind_of(path), path


def _kind_of(file: Path) -> str:
    name = file.name.removesuffix(".index.json")
    if Path(name).suffix not in _SUFFIXES:
        _refuse(str(file), f"a file of weights ({', '.join(_SUFFIXES)}) or a .index", f"the name {file.name}")
    return _SUFFIXES[Path(name).suffix]


def _tensors(kind: str, weights: Path) -> dict[str, Header]:
    if kind == TENSORFLOW:
        found = bundle.entries(weights)
        return {name: Header(entry.dtype, entry.shape, entry.bytes, weights) for name, entry in found.items()}
    if weights.name.endswith(".index.json"):
        return _sharded(kind, weights)
    return _HEADERS[kind](weights)


def _sharded(kind: str, index: Path) -> dict[str, Header]:
    told = config.parsed(text(index, _LARGEST_INDEX), str(index))
    listed = told.get("weight_map") if isinstance(told, Mapping) else None
    if not isinstance(listed, Mapping) or not all(isinstance(name, str) for name in listed.values()):
        _refuse(str(index), 'an object with "weight_map", names of tensors to names of files', "another")
    found: dict[str, Header] = {}
    for name in sorted(set(listed.values())):
        # The file itself may be a link to elsewhere, as in a cache of downloads.
        if not re.fullmatch(r"[\w.-]+", name) or set(name) <= {"."} or _SUFFIXES.get(Path(name).suffix) != kind:
            _refuse(str(index), "shards by the names of files in the same folder", repr(name))
        shard = _HEADERS[kind](index.parent / name)
        other = sorted({tensor for tensor, file in listed.items() if file == name} ^ shard.keys())
        if other:
            _refuse(str(index.parent / name), f"the tensors that {index.name} lists for it", f"not so: {other[0]}")
        found |= shard
    return found


def _safetensors_headers(file: Path) -> dict[str, Header]:
    from safetensors import SafetensorError, safe_open

    _size(file)
    try:
        with safe_open(file, "np") as held:
            found = {name: held.get_slice(name) for name in held.keys()}  # noqa: SIM118
            told = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in found.items()}
    except (SafetensorError, OSError, ValueError) as error:
        _refuse(str(file), "a file of safetensors", error)
    made = {}
    for name, (dtype, shape) in told.items():
        count = 1
        for axis in shape:
            count *= axis
        bits = int(re.sub(r"\D", "", dtype.split("_")[0]) or 8)
        made[name] = Header(_SAFETENSORS_DTYPES.get(dtype, dtype), shape, count * bits // 8, file)
    return made


def _torch_headers(file: Path) -> dict[str, Header]:
    made = {}
    for name, tensor in _state(file, "meta").items():
        count = tensor.numel() * tensor.element_size()
        held = tensor.untyped_storage().nbytes()
        if count > held:
            _refuse(f"{file}: {name}", f"at most the {held} bytes that it holds", f"a view of {count}")
        made[name] = Header(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), count, file)
    return made


def _state(file: Path, device: str) -> "dict[str, Tensor]":
    """The state dict in a file of torch.save, on "cpu" or without numbers on "meta"."""
    import torch

    size = _size(file)
    if zipfile.is_zipfile(file):
        try:
            with zipfile.ZipFile(file) as archive:
                unpacked = sum(part.file_size for part in archive.infolist())
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            _refuse(str(file), "a file of torch.save", error)
        # torch.save does not compress.
        if unpacked > size:
            _refuse(str(file), f"at most {size} bytes in a file of that size", f"{unpacked} unpacked")
    try:
        held = torch.load(file, map_location=device, weights_only=True)
    # A malformed pickle may raise almost anything.
    except Exception as error:
        reason = re.search(r"WeightsUnpickler error: *([^\n]+)", str(error))
        told = reason[1].strip() if reason else f"{type(error).__name__}: {str(error).splitlines()[:1] or ['']}"
        _refuse(str(file), "a file of torch.save that holds weights alone", told)
    if not isinstance(held, Mapping) or not held:
        _refuse(str(file), "a state dict, names to tensors", type(held).__name__)
    for name, tensor in held.items():
        sound = isinstance(name, str) and isinstance(tensor, torch.Tensor)
        if not sound or tensor.layout != torch.strided or tensor.is_quantized:
            kind = type(tensor).__name__ if not isinstance(tensor, torch.Tensor) else "a sparse or quantised tensor"
            _refuse(str(file), "a state dict, names to tensors", f"{name!r}: {kind}")
    return dict(held)


def _read_tensorflow(source: Source, prefix: Path, names: list[str]) -> "dict[str, Tensor]":
    import torch

    made = {}
    for name, array in bundle.read(prefix, names).items():
        # bundle gives the numbers of bfloat16 in float32.
        made[name] = torch.from_numpy(array).to(getattr(torch, source.tensors[name].dtype))
    return made


def _read_safetensors(source: Source, file: Path, names: list[str]) -> "dict[str, Tensor]":
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as held:
            return {name: held.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        _refuse(str(file), "a file of safetensors", error)


def _read_torch(source: Source, file: Path, names: list[str]) -> "dict[str, Tensor]":
    held = _state(file, "cpu")
    if not held.keys() >= set(names):
        _refuse(str(file), "the tensors that it held before", "another file since")
    return {name: held[name].detach() for name in names}


_HEADERS = {SAFETENSORS: _safetensors_headers, TORCH: _torch_headers}
_READERS = {TENSORFLOW: _read_tensorflow, SAFETENSORS: _read_safetensors, TORCH: _read_torch}


def _size(file: Path) -> int:
    try:
        if not file.is_file():
            _refuse(str(file), "a file", "nothing of that name")
        return file.stat().st_size
    except OSError as error:
        _refuse(str(file), "a file", error.strerror or error)


def _refuse(where: str, expected: str, received: Any) -> NoReturn:
    raise SourceError(f"source: {where}: expected {expected}, received {received}")
