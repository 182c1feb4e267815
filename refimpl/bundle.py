"""Checkpoints of TensorFlow (format V2, "tensor bundle"), read without TensorFlow.

    PREFIX.index                  a sorted table, name -> BundleEntryProto (dtype, shape, shard, offset, size, CRC)
    PREFIX.data-00000-of-00002    a shard: shard[offset : offset + size] is the tensor, row after row, little-endian

The files are taken to be hostile: every number in them is bounded by the size of a file before anything is allocated
for it, and what is malformed, cut short or overlapping is a BundleError. Nothing in them is executed.

Source: tensorflow/core/lib/io/table (LevelDB's format), core/protobuf/tensor_bundle.proto,
core/util/saved_tensor_slice_util.cc, core/lib/strings/ordered_code.cc; Snappy's format_description.txt; RFC 3720, B.4.
"""

import functools
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from refimpl import check

# The values of TensorFlow's enum DataType that a checkpoint may hold.
DTYPES = {
    1: "float32", 2: "float64", 3: "int32", 4: "uint8", 5: "int16", 6: "int8", 7: "string", 8: "complex64", 9: "int64",
    10: "bool", 14: "bfloat16", 17: "uint16", 18: "complex128", 19: "float16", 20: "resource", 21: "variant",
    22: "uint32", 23: "uint64",
}  # fmt: skip
# How `read` takes them; the others are only listed. NumPy has no bfloat16: it is the upper half of a float32.
_STORED = {name: np.dtype(name).newbyteorder("<") for name in DTYPES.values() if re.match("float|u?int|bool", name)}
_STORED["bfloat16"] = np.dtype("<u2")

_MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
_FOOTER = 48
# A block is followed by its compression (one byte) and the CRC of both.
_TRAILER = 5
# Far beyond any checkpoint, whose index has some dozen bytes a variable; they keep a forged one within memory.
_LARGEST_INDEX = 1 << 24
_MOST_AXES = 32
# A name is stored as what differs from the one before, so that a forged index of a megabyte could hold terabytes.
_NAME_BYTES = 64
# Wire types of protocol buffers.
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


class BundleError(check.SpecError):
    """A file that is no intact checkpoint, or a variable that it does not hold as numbers."""


@dataclass(frozen=True)
class Entry:
    """A variable, which the bytes [offset, offset + bytes) of `file` hold.

    A partitioned variable lies in `parts` instead, each with the index of its first element in the whole.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    shard: int
    offset: int
    crc32c: int
    file: Path
    parts: tuple[tuple[tuple[int, ...], "Entry"], ...] = ()


def entries(prefix: str | Path) -> dict[str, Entry]:
    """Every variable of a checkpoint by name, in the order of the names; the shards are measured, but not read.

    prefix: the path without `.index` or with it, or a folder whose file `checkpoint` names one inside that folder.

    Raises: BundleError for files that are missing or malformed, a big-endian checkpoint, a tensor that leaves its shard
        or shares bytes with another, and parts that do not add up to their variable.
    """
    prefix = _prefix(Path(prefix))
    where = f"{prefix}.index"
    table = _table(Path(where))
    shards = _shards(table.pop(b"", b""), f"{where}: the header")
    # The key of a part begins with a zero byte, which no name does.
    parts = {key: table.pop(key) for key in list(table) if key[:1] == b"\0"}
    found = {}
    for key, value in table.items():
        name = key.decode(errors="replace")
        _expect(name.encode() == key, where, "names in UTF-8", key)
        found[name] = _entry(name, value, prefix, shards, parts, f"{where}: {name}")
    _expect(not parts, where, "parts that a variable lists", f"others: {[*parts][:1]}")
    _check_places([held for entry in found.values() for held in ([part for _, part in entry.parts] or [entry])])
    return found


def read(prefix: str | Path, names: Iterable[str] | None = None, *, verify: bool = True) -> dict[str, np.ndarray]:
    """The variables `names`, or all that are numbers, as arrays; bfloat16 as the same numbers in float32.

    verify: hold the tensors against their CRCs. The index is always held against its own.

    Raises: BundleError as `entries`, for a name that is not there or stands for a string or resource, and for a tensor
        whose bytes are not those of its CRC.
    """
    listed = entries(prefix)
    wanted = [name for name in listed if listed[name].dtype in _STORED] if names is None else list(names)
    for name in wanted:
        _expect(name in listed, str(prefix), f"one of its {len(listed)} variables", repr(name))
        dtype = listed[name].dtype
        _expect(dtype in _STORED, str(prefix), "a variable of numbers", f"{name} of dtype {dtype}")
    return {name: _array(listed[name], verify) for name in wanted}


def crc32c(data: Any) -> int:
    """CRC-32C (Castagnoli, reflected) of a contiguous buffer: 0xE3069283 of b"123456789".

    The register is linear in itself and the bytes. So 2^20 bytes are cut into lanes of 64, all lanes are taken four
    bytes further at once, and the registers of neighbours join in pairs: that of the first, moved over as many zeros as
    the second has bytes, xor that of the second. Zeros in front leave an empty register empty, and fill the lanes up.
    """
    held = np.frombuffer(data, np.uint8) if len(data) else np.empty(0, np.uint8)
    register = np.array([0xFFFFFFFF], np.uint32)
    for begin in range(0, held.size, 1 << 20):
        block = held[begin : begin + (1 << 20)]
        for bit in range(21):
            if block.size >> bit & 1:
                register = _moved(register, 1 << bit)
        lanes = 1 << ((block.size - 1) // 64).bit_length()
        padded = np.zeros(64 * lanes, np.uint8)
        padded[padded.size - block.size :] = block
        state = np.zeros(lanes, np.uint32)
        for words in np.ascontiguousarray(padded.view("<u4").reshape(lanes, 16).T):
            state = _moved(state ^ words, 4)
        width = 64
        while state.size > 1:
            state, width = _moved(state[0::2], width) ^ state[1::2], 2 * width
        register = register ^ state
    return int(register[0]) ^ 0xFFFFFFFF


def _moved(registers: np.ndarray, count: int) -> np.ndarray:
    """What `count` zero bytes, a power of two, make of registers."""
    low, high = _tables(count)
    moved: np.ndarray = low.take(registers & 0xFFFF) ^ high.take(registers >> 16)
    return moved


@functools.cache
def _tables(count: int) -> np.ndarray:
    """What `count` zero bytes make of the lower and of the upper half of a register."""
    if count > 1:
        return _moved(_tables(count // 2), count // 2)
    half = np.arange(1 << 16, dtype=np.uint32)
    tables = np.stack([half, half << 16])
    for _ in range(8):
        tables = np.where(tables & 1, tables >> 1 ^ np.uint32(0x82F63B78), tables >> 1)
    return tables


def _unmasked(stored: int) -> int:
    """A CRC as it was before it was masked, which is done because CRCs of what holds its own CRC are all the same."""
    turned = stored - 0xA282EAD8 & 0xFFFFFFFF
    return (turned >> 17 | turned << 15) & 0xFFFFFFFF


def _array(entry: Entry, verify: bool) -> np.ndarray:
    try:
        stored = _whole(entry, verify) if entry.parts else _tensor(entry, verify)
        if entry.dtype == "bfloat16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
    except MemoryError:
        _refuse(f"{entry.file}: {entry.name}", "a tensor that fits into memory", f"{entry.bytes} bytes")
    # NumPy counts on a bool being 0 or 1, and calculates nonsense with others.
    most = int(stored.view(np.uint8).max(initial=0)) if entry.dtype == "bool" else 0
    _expect(most < 2, f"{entry.file}: {entry.name}", "booleans stored as 0 or 1", most)
    return stored


def _tensor(entry: Entry, verify: bool) -> np.ndarray:
    held = _bytes(entry.file, entry.offset, entry.bytes)
    if verify:
        _check_crc(held, entry.crc32c, f"{entry.file}: {entry.name}")
    return held.view(_STORED[entry.dtype]).reshape(entry.shape)


def _whole(entry: Entry, verify: bool) -> np.ndarray:
    # The parts have as many elements as the whole, so where none overlap no gap is left.
    whole, filled = np.empty(entry.shape, _STORED[entry.dtype]), np.zeros(entry.shape, bool)
    for starts, part in entry.parts:
        place = tuple(slice(start, start + size) for start, size in zip(starts, part.shape, strict=True))
        _expect(not filled[place].any(), str(part.file), "parts that do not overlap", part.name)
        whole[place], filled[place] = _tensor(part, verify), True
    return whole


def _shards(header: bytes, where: str) -> int:
    """The number of shards of a checkpoint that this file can read."""
    found = _message(header, {1: _VARINT, 2: _VARINT, 3: _LENGTH}, where)
    shards = _integer(found, 1, where)
    _expect(1 <= shards < 1 << 31, where, "a positive number of shards", shards)
    endianness = _integer(found, 2, where)
    _expect(endianness == 0, where, "a little-endian checkpoint (0)", f"endianness {endianness}")
    # TensorFlow has written version 1 only. A later one may say from which reader on it can be read, and by which not.
    version = _message(_one(found, 3, b"", where), {2: _VARINT, 3: _LENGTH}, where)
    oldest, bad = _integer(version, 2, where), [*_one(version, 3, b"", where)]
    _expect(oldest <= 1 and 1 not in bad, where, "a format for readers of version 1", f"from {oldest} on, not {bad}")
    return shards


def _entry(name: str, value: bytes, prefix: Path, shards: int, parts: dict[bytes, bytes], where: str) -> Entry:
    """The entry of a variable, which takes those of its own parts out of `parts`."""
    kinds = {1: _VARINT, 2: _LENGTH, 3: _VARINT, 4: _VARINT, 5: _VARINT, 6: _FIXED32, 7: _LENGTH}
    found = _message(value, kinds, where)
    number, shard, offset, size = (_integer(found, field, where) for field in (1, 3, 4, 5))
    dtype = DTYPES.get(number, f"number {number}")
    crc = _unmasked(int.from_bytes(_one(found, 6, bytes(4), where), "little"))
    axes = _message(_one(found, 2, b"", where), {2: _LENGTH, 3: _VARINT}, where)
    _expect(not _integer(axes, 3, where), where, "a shape", "unknown_rank")
    shape = tuple(_integer(_message(axis, {1: _VARINT}, where), 1, where) for axis in axes[2])
    # An axis of length zero makes a tensor small, but NumPy multiplies the others all the same.
    fits = len(shape) <= _MOST_AXES and min(shape, default=0) >= 0 and math.prod(n for n in shape if n) < 1 << 60
    _expect(fits, where, f"a shape of at most {_MOST_AXES} axes that fits into memory", [*shape])
    _expect(0 <= shard < shards, where, f"a shard below {shards}", shard)
    _expect(min(offset, size) >= 0, where, "an offset and a size", f"{offset} and {size}")
    elements, width = math.prod(shape), _STORED[dtype].itemsize if dtype in _STORED else None
    file = Path(f"{prefix}.data-{shard:05d}-of-{shards:05d}")
    if not found[7]:
        fits = width is None or size == elements * width
        _expect(fits, where, f"{elements * (width or 0)} bytes for {dtype} of shape {shape}", size)
        return Entry(name, dtype, shape, size, shard, offset, crc, file)
    _expect(size == 0 and width is not None, where, "parts of numbers, no bytes", f"{size} bytes of dtype {dtype}")
    own = []
    for message in found[7]:
        starts, lengths, key = _extents(name, message, shape, where)
        _expect(key in parts, where, f"one part of shape {lengths} at {starts}", "none, or a second mention")
        part = _entry(f"{name} at {starts}", parts.pop(key), prefix, shards, {}, f"{where} at {starts}")
        same = (part.dtype, part.shape) == (dtype, lengths)
        _expect(same, where, f"a part of {dtype} and shape {lengths}", f"{part.dtype} of shape {part.shape}")
        own.append((starts, part))
    held = sum(math.prod(part.shape) for _, part in own)
    _expect(held == elements, where, f"parts that hold {elements} elements", held)
    return Entry(name, dtype, shape, elements * (width or 0), shard, offset, crc, file, tuple(own))


def _extents(
    name: str, message: bytes, shape: tuple[int, ...], where: str
) -> tuple[tuple[int, ...], tuple[int, ...], bytes]:
    """Of a part: where it begins, its shape, and its key (EncodeTensorNameSlice), whose bytes sort as the parts do."""
    extents = _message(message, {1: _LENGTH}, where)[1]
    _expect(len(extents) == len(shape), where, f"parts of {len(shape)} axes", len(extents))
    starts, lengths = [], []
    # 0 stands for a part; the name, its end, and the number of axes follow. UTF-8 has no 0xFF to be escaped.
    key = b"\0" + name.encode().replace(b"\0", b"\0\xff") + b"\0\1" + (bytes([1, len(shape)]) if shape else b"\0")
    for extent, whole in zip(extents, shape, strict=True):
        found = _message(extent, {1: _VARINT, 2: _VARINT}, where)
        start, length = _integer(found, 1, where), _integer(found, 2, where)
        # An axis that is not cut is written without a length; in the key its length is -1.
        key += _ordered(start) + _ordered(length if found[2] else -1)
        length = length if found[2] else whole
        fits = min(start, length) >= 0 and start + length <= whole
        _expect(fits, where, f"a part inside shape {shape}", f"{length} from {start} on")
        starts.append(start)
        lengths.append(length)
    return tuple(starts), tuple(lengths), key


def _ordered(number: int) -> bytes:
    """OrderedCode::WriteSignedNumIncreasing: big-endian, its leading bits turned over, one for each byte."""
    count = max(number, ~number).bit_length() // 7 + 1
    leading = (1 << count) - 1 << 7 * count
    return ((number ^ leading) & (1 << 8 * count) - 1).to_bytes(count, "big")


def _check_places(stored: list[Entry]) -> None:
    """Every tensor lies inside its shard, and no two share a byte."""
    sizes = {file: _size(file) for file in sorted({entry.file for entry in stored})}
    ends = dict.fromkeys(sizes, (0, ""))
    for entry in sorted(stored, key=lambda entry: (entry.offset, entry.bytes)):
        place, (end, before) = f"{entry.bytes} from {entry.offset} on", ends[entry.file]
        fits = entry.offset + entry.bytes <= sizes[entry.file]
        _expect(fits, str(entry.file), f"{sizes[entry.file]} bytes to hold {entry.name}", place)
        if entry.bytes:
            received = f"an end at {end}, and {place}"
            _expect(entry.offset >= end, str(entry.file), f"{before} to end before {entry.name}", received)
            ends[entry.file] = entry.offset + entry.bytes, entry.name


def _table(file: Path) -> dict[bytes, bytes]:
    """The sorted table of an index: its top block has a key not below those of each other block, and where that is."""
    size, where = _size(file), str(file)
    _expect(_FOOTER <= size <= _LARGEST_INDEX, where, f"an index of {_FOOTER} to {_LARGEST_INDEX} bytes", size)
    data = _bytes(file, 0, size).tobytes()
    footer, body = data[-_FOOTER:], data[:-_FOOTER]
    _expect(footer[-8:] == _MAGIC, where, f"the magic number {_MAGIC.hex()} at its end", footer[-8:].hex())
    meta, at = _handle(footer, 0, where)
    top, _ = _handle(footer, at, where)
    # Nothing stands in the metaindex that is used here, but it is part of an intact file.
    _block(body, *meta, where)
    table: dict[bytes, bytes] = {}
    last, end, total, most = b"", 0, 0, _NAME_BYTES * size
    for separator, handle in _pairs(_block(body, *top, where), where):
        (offset, length), at = _handle(handle, 0, where)
        _expect(at == len(handle) and offset >= end, where, f"a block from {end} on", f"{handle.hex()}, from {offset}")
        end, total = offset + length + _TRAILER, total + len(separator)
        _expect(total <= most, where, f"names of at most {most} bytes", total)
        for key, value in _pairs(_block(body, offset, length, where), where):
            total += len(key)
            _expect(total <= most, where, f"names of at most {most} bytes", total)
            if (key <= last and table) or key > separator:
                _refuse(where, "keys in ascending order", f"{key!r} between {last!r} and {separator!r}")
            table[key], last = value, key
        last = separator
    return table


def _handle(data: bytes, at: int, where: str) -> tuple[tuple[int, int], int]:
    """Offset and length of a block, and where the bytes go on."""
    offset, at = _varint(data, at, where)
    length, at = _varint(data, at, where)
    return (offset, length), at


def _block(body: bytes, offset: int, length: int, where: str) -> bytes:
    where, end = f"{where}: the block at {offset}", offset + length
    _expect(end + _TRAILER <= len(body), where, f"at most {len(body)} bytes with its trailer", end + _TRAILER)
    stored = int.from_bytes(body[end + 1 : end + _TRAILER], "little")
    _check_crc(body[offset : end + 1], _unmasked(stored), where)
    _expect(body[end] < 2, where, "no compression (0) or Snappy (1)", body[end])
    return _unsnapped(body[offset:end], where) if body[end] else body[offset:end]


def _pairs(block: bytes, where: str) -> Iterator[tuple[bytes, bytes]]:
    """The entries of a block. Each is the length that its key shares with the one before, the rest, and the value."""
    count = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 - 4 * count
    # An entry has three bytes or more, and is at most one restart; the first restart is there without any.
    _expect(count > 0 and end >= 3 * (count - 1), where, f"restarts that fit into a block of {len(block)} bytes", count)
    # Where a key stands in full. Who reads from the start needs none of them; they only have to be true.
    restarts = set(np.frombuffer(block, "<u4", count, end).tolist())
    at, key = 0, b""
    while at < end:
        begin = at
        shared, at = _varint(block, at, where)
        rest, at = _varint(block, at, where)
        length, at = _varint(block, at, where)
        fits = shared <= len(key) and at + rest + length <= end and not (shared and begin in restarts)
        received = f"{shared} bytes of {len(key)} shared, {rest} and {length} up to {end}"
        _expect(fits, where, f"an entry at {begin} of a block", received)
        restarts.discard(begin)
        key = key[:shared] + block[at : at + rest]
        at += rest + length
        yield key, block[at - length : at]
    # The one restart of an empty block is 0.
    _expect(not restarts - {0}, where, "restarts where an entry begins", [*restarts][:1])


def _unsnapped(data: bytes, where: str) -> bytes:
    """Snappy: literal bytes, and copies of what was put out before, which may run into themselves."""
    length, at = _varint(data, 0, where)
    # No element puts out more than a copy does: 64 bytes for three.
    _expect(length <= 22 * len(data), where, f"at most {22 * len(data)} bytes from {len(data)} of Snappy", length)
    out = bytearray()
    while at < len(data):
        tag, kind = data[at], data[at] & 3
        # Bytes after the tag: of a literal's length where that is 60 or more, or of a copy's offset.
        extra = (max(0, (tag >> 2) - 59), 1, 2, 4)[kind]
        at += 1 + extra
        number = int.from_bytes(data[at - extra : at], "little")
        if kind == 0:
            size = 1 + (number if extra else tag >> 2)
            out += data[at : at + size]
            at += size
        else:
            size, back = (4 + (tag >> 2 & 7), tag >> 5 << 8 | number) if kind == 1 else (1 + (tag >> 2), number)
            begin = len(out) - back
            _expect(0 <= begin < len(out), where, f"a Snappy copy of the {len(out)} bytes so far", f"{back} back")
            out += (out[begin : begin + size] * -(-size // back))[:size]
        _expect(at <= len(data), where, f"Snappy elements inside {len(data)} bytes", f"one up to {at}")
    _expect(len(out) == length, where, f"{length} bytes from Snappy", len(out))
    return bytes(out)


def _message(data: bytes, kinds: dict[int, int], where: str) -> dict[int, list[Any]]:
    """Protocol buffers: the values of the fields in `kinds`, which has their wire types; other fields are skipped."""
    found: dict[int, list[Any]] = {number: [] for number in kinds}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at, where)
        number, kind = tag >> 3, tag & 7
        known = 0 < number < 1 << 29 and kind in (_VARINT, _FIXED64, _LENGTH, _FIXED32)
        known = known and kind == kinds.get(number, kind)
        _expect(known, where, "a field as its message has it", f"number {number} of wire type {kind}")
        if kind == _VARINT:
            value, at = _varint(data, at, where)
            found.get(number, []).append(value)
            continue
        size, at = _varint(data, at, where) if kind == _LENGTH else (8 if kind == _FIXED64 else 4, at)
        at += size
        _expect(at <= len(data), where, f"field {number} inside a message of {len(data)} bytes", f"its end at {at}")
        found.get(number, []).append(data[at - size : at])
    return found


def _one(found: dict[int, list[Any]], number: int, default: Any, where: str) -> Any:
    _expect(len(found[number]) < 2, where, f"field {number} once", f"{len(found[number])} times")
    return found[number][0] if found[number] else default


def _integer(found: dict[int, list[Any]], number: int, where: str) -> int:
    """A field as a signed number of 64 bits; a field that is left out is 0."""
    value: int = _one(found, number, 0, where)
    return value - (value >> 63 << 64)


def _varint(data: bytes, at: int, where: str) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        _expect(at < len(data), where, "a number", f"the end of {len(data)} bytes")
        value, at = value | (data[at] & 127) << shift, at + 1
        if data[at - 1] < 128 and value < 1 << 64:
            return value, at
    _refuse(where, "a number of at most 64 bits", f"a longer one before byte {at}")


def _prefix(given: Path) -> Path:
    prefix = given.with_suffix("") if given.suffix == ".index" else given
    if os.path.isfile(f"{prefix}.index") or not os.path.isdir(given):
        return prefix
    state = given / "checkpoint"
    text = _bytes(state, 0, min(_size(state), 1 << 20)).tobytes().decode(errors="replace")
    named = re.search(r'^\s*model_checkpoint_path:\s*"([^"\\\0]+)"', text, re.MULTILINE)
    if named is None:
        _refuse(str(state), 'a line model_checkpoint_path: "..."', "none")
    prefix = given / named[1]
    # Resolved without .index: the files themselves may be links to elsewhere, as in a cache of downloads.
    inside = Path(os.path.realpath(prefix)).is_relative_to(os.path.realpath(given))
    _expect(inside, str(state), "a checkpoint in the same folder; name another by its own path", repr(named[1]))
    return prefix


def _size(file: Path) -> int:
    try:
        found = file.stat()
    except (OSError, ValueError) as error:
        _refuse(str(file), "a file", getattr(error, "strerror", None) or error)
    _expect(stat.S_ISREG(found.st_mode), str(file), "a file", "something else of that name")
    return found.st_size


def _bytes(file: Path, offset: int, size: int) -> np.ndarray:
    held = np.empty(size, np.uint8)
    try:
        with file.open("rb") as source:
            source.seek(offset)
            count = source.readinto(held.data)
    except OSError as error:
        _refuse(str(file), "a file that can be read", error.strerror or error)
    _expect(count == size, str(file), f"{size} bytes from {offset} on", count)
    return held


def _check_crc(data: Any, stored: int, where: str) -> None:
    found = crc32c(data)
    _expect(found == stored, where, f"bytes of CRC-32C {stored:#010x}", f"{found:#010x}")


def _expect(condition: bool, where: str, expected: str, received: Any) -> None:
    if not condition:
        _refuse(where, expected, received)


def _refuse(where: str, expected: str, received: Any) -> NoReturn:
    raise BundleError(f"bundle: {where}: expected {expected}, received {received}")
