"""Checkpoints of TensorFlow: against files that TensorFlow wrote, against a writer of its own below, and hostile ones.

The writer shares no code with the reader. It writes TensorFlow's own index byte for byte (a test says so), and hands
every piece to a hook before its CRC is made, so that damage gets past the CRCs to what lies behind them.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import math
import os
import random
import struct
import time
import tracemalloc
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from refimpl import bundle
from refimpl.bundle import BundleError
from refimpl.check import SpecError

GOLDEN = Path(__file__).parents[1] / "golden" / "bundle"
# The folders that the golden files were taken from, where they stand beside the repository.
ORIGINALS = Path(__file__).parents[3] / "shared" / "golden"
NUMBERS = {
    "float32": 1, "float64": 2, "int32": 3, "uint8": 4, "int16": 5, "int8": 6, "string": 7, "int64": 9, "bool": 10,
    "bfloat16": 14, "uint16": 17, "float16": 19, "resource": 20, "uint32": 22, "uint64": 23,
}  # fmt: skip


# The writer


class Stored(NamedTuple):
    """A tensor as it lies in a shard."""

    dtype: str
    shape: tuple[int, ...]
    raw: bytes


class Cut(NamedTuple):
    """A partitioned variable. A part is its (start, length) of every axis, None for a whole axis, and its tensor."""

    dtype: str
    shape: tuple[int, ...]
    parts: list


def stored(array):
    return Stored(array.dtype.name, array.shape, array.tobytes())


def cut(array, *extents):
    """`array` partitioned at `extents`."""
    parts = []
    for extent in extents:
        place = tuple(slice(None) if axis is None else slice(axis[0], sum(axis)) for axis in extent)
        parts.append((extent, stored(np.ascontiguousarray(array[place]))))
    return Cut(array.dtype.name, array.shape, parts)


@functools.cache
def crc_table():
    table = []
    for register in range(256):
        for _ in range(8):
            register = register >> 1 ^ 0x82F63B78 if register & 1 else register >> 1
        table.append(register)
    return table


def crc(data):
    table, register = crc_table(), 0xFFFFFFFF
    for byte in data:
        register = table[(register ^ byte) & 255] ^ register >> 8
    return register ^ 0xFFFFFFFF


def masked(register):
    return ((register >> 15 | register << 17) + 0xA282EAD8) % 2**32


def varint(number):
    number %= 2**64
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number, value):
    """A field of a protocol buffer; as in proto3, a number that is 0 is left out."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value) if value else b""
    return varint(number << 3 | 2) + varint(len(value)) + value


def shape_message(shape):
    return b"".join(field(2, field(1, size)) for size in shape)


def entry_message(dtype, shape, shard, offset, size, checksum, slices=()):
    numbers = field(1, NUMBERS[dtype]) + field(2, shape_message(shape)) + field(3, shard) + field(4, offset)
    return numbers + field(5, size) + b"\x35" + struct.pack("<I", checksum) + b"".join(field(7, one) for one in slices)


def slice_message(extent):
    axes = (b"" if axis is None else field(1, axis[0]) + varint(2 << 3) + varint(axis[1]) for axis in extent)
    return b"".join(field(1, axis) for axis in axes)


def ordered(number):
    if -64 <= number < 64:
        return bytes([0x80 ^ number & 0xFF])
    count = next(count for count in range(2, 11) if -(1 << 7 * count - 1) <= number < 1 << 7 * count - 1)
    data = bytearray(number.to_bytes(count, "big", signed=True))
    for bit in range(count):
        data[bit // 8] ^= 0x80 >> bit % 8
    return bytes(data)


def slice_key(name, extent):
    escaped = b"".join(b"\0\xff" if byte == 0 else bytes([byte]) for byte in name.encode())
    key = b"\0" + escaped + b"\0\x01" + (bytes([1, len(extent)]) if extent else b"\0")
    return key + b"".join(ordered(start) + ordered(length) for start, length in (axis or (0, -1) for axis in extent))


def table_block(pairs, interval):
    out, restarts, last = bytearray(), [], b""
    for place, (key, value) in enumerate(pairs):
        shared = 0
        if place % interval:
            shared = len(os.path.commonprefix([last, key]))
        else:
            restarts.append(len(out))
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    restarts = restarts or [0]
    return bytes(out) + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def snappy(data):
    """Literals, and copies of four bytes or more that occurred before."""
    out, seen, literal, at = bytearray(varint(len(data))), {}, bytearray(), 0

    def flush():
        while literal:
            piece = bytes(literal[:300])
            del literal[:300]
            size = len(piece) - 1
            if size < 60:
                out.append(size << 2)
            else:
                out.extend([60 << 2, size] if size < 256 else [61 << 2, size & 255, size >> 8])
            out.extend(piece)

    while at < len(data):
        found = seen.get(data[at : at + 4])
        seen[data[at : at + 4]] = at
        if found is None or len(data) - at < 4:
            literal.append(data[at])
            at += 1
            continue
        flush()
        back, size = at - found, 4
        while size < 64 and at + size < len(data) and data[found + size] == data[at + size]:
            size += 1
        if size < 12 and back < 2048:
            out.extend([back >> 8 << 5 | size - 4 << 2 | 1, back & 255])
        elif back < 1 << 16:
            out.extend([size - 1 << 2 | 2, back & 255, back >> 8])
        else:
            out.extend([size - 1 << 2 | 3, *struct.pack("<I", back)])
        at += size
    flush()
    return bytes(out)


def separator(last, following):
    """A short key from `last` to below `following`, as LevelDB chooses it."""
    if following is None:
        place = next((place for place, byte in enumerate(last) if byte < 255), None)
        return last if place is None else last[:place] + bytes([last[place] + 1])
    place = len(os.path.commonprefix([last, following]))
    if place < min(len(last), len(following)) and last[place] < 255 and last[place] + 1 < following[place]:
        return last[:place] + bytes([last[place] + 1])
    return last


def keep(level, data):
    return data


def write_table(pairs, *, blocks=1, interval=16, compress=False, hook=keep):
    """The bytes of an index. `hook` is shown the content of every block before and after it is compressed."""
    out = bytearray()

    def put(level, content):
        at, content = len(out), hook(level, content)
        if compress:
            content = hook("snappy", snappy(content))
        content += b"\1" if compress else b"\0"
        out.extend(content + struct.pack("<I", masked(crc(content))))
        return varint(at) + varint(len(content) - 1)

    size, top = max(1, -(-len(pairs) // blocks)), []
    for begin in range(0, len(pairs), size):
        following = pairs[begin + size][0] if begin + size < len(pairs) else None
        handle = put("block", table_block(pairs[begin : begin + size], interval))
        top.append((separator(pairs[begin : begin + size][-1][0], following), handle))
    footer = put("meta", table_block([], 1)) + put("top", table_block(top, 1))
    return bytes(out) + hook("footer", footer.ljust(40, b"\0") + bytes.fromhex("57fb808b247547db"))


def header_message(shards=1, *, endianness=0, version=b"\x08\x01"):
    return field(1, shards) + field(2, endianness) + field(3, version)


def write(prefix, tensors, *, shards=1, padding=0, hook=keep, header=None, extra=(), **options):
    """Write a bundle: tensors go to the shards in turn, with `padding` bytes between them.

    hook: is also shown every key, and as (name, data) every tensor and every entry; the parts of p are p[0], p[1] ...
    extra: further (key, value) pairs.
    """
    data, pairs, turn = [bytearray() for _ in range(shards)], [], 0

    def place(name, key, tensor):
        nonlocal turn
        shard, turn = turn % shards, turn + 1
        raw = hook("tensor", (name, tensor.raw))
        raw = tensor.raw if isinstance(raw, tuple) else raw
        data[shard].extend(bytes(padding))
        message = entry_message(tensor.dtype, tensor.shape, shard, len(data[shard]), len(raw), masked(crc(raw)))
        data[shard].extend(raw)
        pairs.append((name, key, message))

    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, Cut):
            slices = [slice_message(extent) for extent, _ in tensor.parts]
            pairs.append((name, name.encode(), entry_message(tensor.dtype, tensor.shape, 0, 0, 0, 0, slices)))
            for number, (extent, part) in enumerate(tensor.parts):
                place(f"{name}[{number}]", slice_key(name, extent), part)
        else:
            place(name, name.encode(), tensor)
    pairs.append(("", b"", header_message(shards) if header is None else header))
    entries = []
    for name, key, message in pairs:
        changed = hook("entry", (name, message))
        entries.append((hook("key", key), message if isinstance(changed, tuple) else changed))
    index = write_table(sorted([*entries, *extra], key=lambda pair: pair[0]), hook=hook, **options)
    Path(f"{prefix}.index").write_bytes(index)
    for number, shard in enumerate(data):
        Path(f"{prefix}.data-{number:05d}-of-{shards:05d}").write_bytes(shard)
    return Path(prefix)


def only(level, change, name=None):
    """A hook that changes one level (of one name)."""

    def hook(at, data):
        if at != level or (name is not None and data[0] != name):
            return data
        return change(data[1] if isinstance(data, tuple) else data)

    return hook


def refused(prefix, message, **options):
    with pytest.raises(BundleError) as error:
        bundle.read(prefix, **options)
    assert str(error.value).startswith("bundle: ")
    assert message in str(error.value), str(error.value)


def same(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


W = np.arange(6, dtype=np.float32).reshape(2, 3)
ONE = {"w": stored(W)}


def entry(dtype="float32", shape=W.shape, shard=0, offset=0, size=24, slices=()):
    """A message about `W`, which the arguments make false."""
    return entry_message(dtype, shape, shard, offset, size, masked(crc(W.tobytes())), slices)


# What TensorFlow wrote


def listed(name):
    return json.loads((GOLDEN / name / "weights.json").read_text())


def test_every_variable_that_tensorflow_wrote_is_read_bit_for_bit():
    found = bundle.read(GOLDEN / "gau_alpha" / "bert_model.ckpt")
    expected = listed("gau_alpha")
    assert list(found) == list(expected)
    for name, array in found.items():
        assert (array.dtype.name, list(array.shape)) == (expected[name]["dtype"], expected[name]["shape"])
        assert hashlib.sha256(array.tobytes()).hexdigest() == expected[name]["sha256"]


@pytest.mark.parametrize("name", ["b4k_gau_alpha", "b4k_roformer", "b4k_roformer_emb", "b4k_roformer_v2"])
def test_every_original_is_read_bit_for_bit(name):
    if not (ORIGINALS / name).is_dir():
        pytest.skip(f"no {ORIGINALS / name}")
    expected = pytest.importorskip("safetensors.numpy").load_file(ORIGINALS / name / "weights.safetensors")
    found = bundle.read(ORIGINALS / name)
    assert list(found) == sorted(expected)
    for key, array in expected.items():
        same(found[key], array)


def test_the_writer_of_these_tests_writes_the_index_that_tensorflow_wrote(tmp_path):
    original = GOLDEN / "gau_alpha" / "bert_model.ckpt"
    data = Path(f"{original}.data-00000-of-00001").read_bytes()
    # The shard has the tensors in the order of their names, without anything between them.
    tensors, at = {}, 0
    for name, one in listed("gau_alpha").items():
        size = 4 * math.prod(one["shape"])
        tensors[name] = Stored(one["dtype"], tuple(one["shape"]), data[at : at + size])
        at += size
    assert at == len(data)
    write(tmp_path / "x", tensors)
    assert (tmp_path / "x.index").read_bytes() == Path(f"{original}.index").read_bytes()


def test_a_longer_index_of_tensorflow_is_listed(tmp_path):
    expected = listed("roformer")
    (tmp_path / "x.index").write_bytes((GOLDEN / "roformer" / "bert_model.ckpt.index").read_bytes())
    sizes = {name: 4 * math.prod(one["shape"]) for name, one in expected.items()}
    (tmp_path / "x.data-00000-of-00001").write_bytes(bytes(sum(sizes.values())))
    found = bundle.entries(tmp_path / "x")
    assert [(one.name, list(one.shape), one.dtype, one.bytes) for one in found.values()] == [
        (name, one["shape"], one["dtype"], sizes[name]) for name, one in expected.items()
    ]


def test_the_path_may_end_in_index_or_be_the_folder():
    folder = GOLDEN / "gau_alpha"
    prefix = folder / "bert_model.ckpt"
    assert bundle.entries(str(prefix)) == bundle.entries(f"{prefix}.index") == bundle.entries(folder)
    assert not (folder / "absent").exists()


# What the reader makes of the writer's files

ARRAYS = {
    "a/float32": W,
    "a/float64": np.array([np.pi, -0.0, np.inf], np.float64),
    "a/float16": np.array([1.5, -2.25, np.nan], np.float16),
    "b/int8": np.array([-128, 127], np.int8),
    "b/int16": np.array([[-32768], [32767]], np.int16),
    "b/int32": np.array(-7, np.int32),
    "b/int64": np.array([-(2**63), 2**63 - 1], np.int64),
    "c/uint8": np.arange(251, dtype=np.uint8),
    "c/uint16": np.array([65535, 1], np.uint16),
    "c/uint32": np.array([2**32 - 1, 5], np.uint32),
    "c/uint64": np.array([2**64 - 1, 3], np.uint64),
    "d/bool": np.array([[True, False, True]]),
    "e/empty": np.empty((3, 0, 5), np.float32),
    "é/scalar": np.array(2.5, np.float32),
}


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(("blocks", "interval"), [(1, 16), (1, 3), (4, 2), (15, 1)])
def test_arrays_come_back(tmp_path, shards, compress, blocks, interval):
    tensors = {name: stored(array) for name, array in ARRAYS.items()}
    write(tmp_path / "x", tensors, shards=shards, compress=compress, blocks=blocks, interval=interval)
    found = bundle.read(tmp_path / "x")
    assert list(found) == sorted(ARRAYS)
    for name, array in ARRAYS.items():
        same(found[name], array)


def test_entries_say_what_lies_where(tmp_path):
    write(tmp_path / "x", {"a": stored(W), "b": stored(np.array([1, 2], np.int16))}, shards=2, padding=8)
    assert list(bundle.entries(tmp_path / "x").values()) == [
        bundle.Entry("a", "float32", (2, 3), 24, 0, 8, crc(W.tobytes()), tmp_path / "x.data-00000-of-00002"),
        bundle.Entry("b", "int16", (2,), 4, 1, 8, crc(b"\1\0\2\0"), tmp_path / "x.data-00001-of-00002"),
    ]
    with pytest.raises(dataclasses.FrozenInstanceError):
        bundle.entries(tmp_path / "x")["a"].offset = 0


def test_only_the_names_that_are_asked_for_are_read(tmp_path):
    write(tmp_path / "x", {name: stored(W) for name in "abc"})
    damage(tmp_path / "x.data-00000-of-00001", 0)
    assert list(bundle.read(tmp_path / "x", ["c", "b"])) == ["c", "b"]
    refused(tmp_path / "x", "a: expected bytes of CRC-32C", names=["a"])


def test_bfloat16_is_read_as_the_same_numbers_in_float32(tmp_path):
    # 1, -2, 3.140625, infinity, the smallest subnormal of bfloat16, a NaN with a payload.
    halves = np.array([0x3F80, 0xC000, 0x4049, 0x7F80, 0x0001, 0x7FA5], np.uint16)
    write(tmp_path / "x", {"w": Stored("bfloat16", (2, 3), halves.tobytes())})
    found = bundle.read(tmp_path / "x")["w"]
    assert found.dtype == np.float32 and found.shape == (2, 3)
    np.testing.assert_array_equal(found.ravel()[:5], np.array([1, -2, 3.140625, np.inf, 2.0**-133], np.float32))
    assert found.view(np.uint32)[1, 2] == 0x7FA50000


def test_a_scalar_and_an_empty_bfloat16(tmp_path):
    write(tmp_path / "x", {"s": Stored("bfloat16", (), b"\x80\x3f"), "e": Stored("bfloat16", (0, 7), b"")})
    found = bundle.read(tmp_path / "x")
    assert found["s"].shape == () and found["s"] == 1
    assert found["e"].shape == (0, 7) and found["e"].dtype == np.float32


BIG = np.arange(5 * 200 * 7, dtype=np.float32).reshape(5, 200, 7)


@pytest.mark.parametrize(
    "extents",
    [
        [(None, (0, 70), None), (None, (70, 130), None)],
        [((0, 2), None, (0, 7)), ((2, 3), None, (0, 7))],
        [((0, 5), (0, 200), (0, 3)), ((0, 5), (0, 64), (3, 4)), ((0, 5), (64, 136), (3, 4))],
        [((0, 5), (0, 200), (0, 7))],
        [(None, None, None), ((0, 0), None, None)],
    ],
)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_partitioned_variable_is_put_together(tmp_path, extents, shards):
    write(tmp_path / "x", {"emb": cut(BIG, *extents), "z": stored(W)}, shards=shards, compress=True, blocks=2)
    found = bundle.read(tmp_path / "x")
    assert list(found) == ["emb", "z"]
    same(found["emb"], BIG)
    entry = bundle.entries(tmp_path / "x")["emb"]
    assert (entry.shape, entry.dtype, entry.bytes) == ((5, 200, 7), "float32", BIG.nbytes)
    assert [part.shape for _, part in entry.parts] == [
        tuple(whole if axis is None else axis[1] for axis, whole in zip(extent, BIG.shape, strict=True))
        for extent in extents
    ]


def test_a_partitioned_variable_may_have_any_name(tmp_path):
    write(tmp_path / "x", {"a\0é\0": cut(W, ((0, 1), None), ((1, 1), None))})
    same(bundle.read(tmp_path / "x")["a\0é\0"], W)


def test_a_partitioned_bfloat16_and_a_partitioned_scalar(tmp_path):
    halves = [Stored("bfloat16", (2,), b"\x80\x3f\0\0"), Stored("bfloat16", (1,), b"\0\xc0")]
    tensors = {
        "b": Cut("bfloat16", (3,), [(((0, 2),), halves[0]), (((2, 1),), halves[1])]),
        "s": Cut("float32", (), [((), stored(np.array(3, np.float32)))]),
    }
    write(tmp_path / "x", tensors)
    found = bundle.read(tmp_path / "x")
    same(found["b"], np.array([1, 0, -2], np.float32))
    same(found["s"], np.array(3, np.float32))


# From TensorFlow's ordered_code_test.cc and the length rule of ordered_code.cc.
@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "80"), (1, "81"), (63, "bf"), (64, "c040"), (-1, "7f"), (-64, "40"), (-65, "3fbf"), (8191, "dfff"),
        (8192, "e02000"), (-8192, "2000"), (-8193, "1fdfff"), (2**62 - 1, "ffbfffffffffffffff"),
        (2**62, "ffc04000000000000000"), (2**63 - 1, "ffc07fffffffffffffff"), (-(2**63), "003f8000000000000000"),
    ],
)  # fmt: skip
def test_signed_numbers_in_keys(number, expected):
    assert bundle._ordered(number).hex() == ordered(number).hex() == expected


def test_unknown_fields_are_skipped(tmp_path):
    # Number 99 as a varint, 64 bits, bytes and 32 bits; the same inside the shape, its axes and the version.
    more = varint(99 << 3) + varint(2**64 - 1) + varint(99 << 3 | 1) + bytes(8) + field(99, b"abc")
    more += varint(99 << 3 | 5) + bytes(4)
    shape = b"".join(field(2, more + field(1, size) + field(2, b"rows")) for size in W.shape) + more
    head = field(1, 1) + more + field(3, more + field(1, 1))
    message = more + field(1, 1) + field(2, shape) + field(5, 24) + entry()[-5:]
    write(tmp_path / "x", ONE, header=head + more, hook=only("entry", lambda _: message, "w"))
    same(bundle.read(tmp_path / "x")["w"], W)


def test_strings_and_resources_are_listed_and_refused(tmp_path):
    graph = Stored("string", (), b"\x05\0\0\0\0graph")
    tensors = {
        "_CHECKPOINTABLE_OBJECT_GRAPH": graph,
        "handle": Stored("resource", (), b"xyz"),
        "save_counter": stored(np.array(3, np.int64)),
        "w": stored(W),
    }
    write(tmp_path / "x", tensors)
    assert [one.dtype for one in bundle.entries(tmp_path / "x").values()] == ["string", "resource", "int64", "float32"]
    assert list(bundle.read(tmp_path / "x")) == ["save_counter", "w"]
    message = "expected a variable of numbers, received _CHECKPOINTABLE_OBJECT_GRAPH of dtype string"
    refused(tmp_path / "x", message, names=["w", "_CHECKPOINTABLE_OBJECT_GRAPH"])
    refused(tmp_path / "x", "handle of dtype resource", names=["handle"])


def test_a_dtype_that_has_no_name_here_is_listed_and_refused(tmp_path):
    write(tmp_path / "x", ONE, hook=only("entry", lambda message: b"\x08\x0b" + message[2:], "w"))
    assert bundle.entries(tmp_path / "x")["w"].dtype == "number 11"
    refused(tmp_path / "x", "w of dtype number 11", names=["w"])


def test_crcs_of_tensors_may_be_left_unchecked_and_those_of_the_index_not(tmp_path):
    write(tmp_path / "x", ONE)
    damage(tmp_path / "x.data-00000-of-00001", 5, 0x40)
    refused(tmp_path / "x", f"w: expected bytes of CRC-32C {crc(W.tobytes()):#010x}, received 0x")
    changed = bytearray(W.tobytes())
    changed[5] ^= 0x40
    assert bundle.read(tmp_path / "x", verify=False)["w"].tobytes() == changed
    damage(tmp_path / "x.index", 3)
    refused(tmp_path / "x", "the block at 0: expected bytes of CRC-32C", verify=False)


# CRC-32C and Snappy


# RFC 3720, B.4, and the check value of the catalogue of CRCs.
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0), (b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E), (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)  # fmt: skip
def test_crc32c_known_answers(data, expected):
    assert bundle.crc32c(data) == crc(data) == expected


@pytest.mark.parametrize("size", [*range(1, 9), 63, 64, 65, 127, 128, 129, 4099, 65536, 2**20 - 1, 2**20, 2**20 + 1])
def test_crc32c_of_every_size(size):
    data = np.random.default_rng(size).bytes(size)
    assert bundle.crc32c(data) == bundle.crc32c(np.frombuffer(data, np.uint8)) == crc(data)


def test_crc32c_over_several_pieces_is_that_of_the_whole():
    data = np.random.default_rng(3).bytes(5 * 2**19 + 77)
    assert bundle.crc32c(data) == crc(data)


@pytest.mark.parametrize(
    ("compressed", "expected"),
    [
        ("00", b""),
        ("03" + "08" + b"abc".hex(), b"abc"),
        # Copies with offsets of one byte and a bit, of two and of four bytes; the first runs into itself.
        ("0a" + "04" + b"ab".hex() + "1102", b"ababababab"),
        ("06" + "08" + b"abc".hex() + "0a0300", b"abcabc"),
        ("06" + "08" + b"abc".hex() + "0b03000000", b"abcabc"),
        ("c001" + "00" + "41" + "fe0100" + "fe0100" + "fa0100", b"A" * 192),
        # Lengths of literals in one to four bytes.
        *(
            ("46" + bytes([(59 + width) << 2, *(69).to_bytes(width, "little")]).hex() + "6b" * 70, b"k" * 70)
            for width in range(1, 5)
        ),
    ],
)
def test_snappy_known_answers(compressed, expected):
    assert bundle._unsnapped(bytes.fromhex(compressed), "here") == expected


def test_snappy_offsets_beyond_a_byte():
    literal = np.random.default_rng(0).bytes(300)
    start = varint(304) + bytes([61 << 2]) + struct.pack("<H", 299) + literal
    assert bundle._unsnapped(start + bytes([290 >> 8 << 5 | 1, 290 & 255]), "here") == literal + literal[10:14]
    assert bundle._unsnapped(start + bytes([3 << 2 | 2, 290 & 255, 290 >> 8]), "here") == literal + literal[10:14]
    assert bundle._unsnapped(start + bytes([3 << 2 | 3, 290 & 255, 290 >> 8, 0, 0]), "here") == literal + literal[10:14]


@pytest.mark.parametrize("seed", range(20))
def test_snappy_goes_there_and_back(seed):
    draw = random.Random(seed)
    words = [draw.randbytes(draw.randrange(1, 90)) for _ in range(6)]
    data = b"".join(draw.choice(words) * draw.randrange(1, 4) for _ in range(draw.randrange(200)))
    assert bundle._unsnapped(snappy(data), "here") == data


@pytest.mark.parametrize(
    ("compressed", "message"),
    [
        ("", "expected a number, received the end of 0 bytes"),
        ("8080", "expected a number"),
        ("ffffffff0f00", "expected at most 132 bytes from 6 of Snappy, received 4294967295"),
        ("05" + "08" + b"abc".hex(), "expected 5 bytes from Snappy, received 3"),
        ("02" + "08" + b"abc".hex(), "expected 2 bytes from Snappy, received 3"),
        ("04" + "0c" + b"abc".hex(), "expected Snappy elements inside 5 bytes, received one up to 6"),
        ("08" + "00" + "41" + "0100", "expected a Snappy copy of the 1 bytes so far, received 0 back"),
        ("08" + "00" + "41" + "0102", "expected a Snappy copy of the 1 bytes so far, received 2 back"),
        ("08" + "00" + "41" + "0e01", "expected Snappy elements inside 5 bytes, received one up to 6"),
        ("05" + "f8ffff", "expected Snappy elements inside 4 bytes"),
    ],
)
def test_snappy_that_is_malformed(compressed, message):
    with pytest.raises(BundleError) as error:
        bundle._unsnapped(bytes.fromhex(compressed), "here")
    assert message in str(error.value)


# Errors


def damage(file, at, bits=0xFF):
    data = bytearray(file.read_bytes())
    data[at] ^= bits
    file.write_bytes(data)


def test_the_error_is_one_of_the_specification():
    assert issubclass(BundleError, SpecError) and issubclass(BundleError, ValueError)


def test_files_that_are_missing_are_named(tmp_path):
    refused(tmp_path / "x", f"bundle: {tmp_path / 'x.index'}: expected a file, received No such file or directory")
    refused("a\0b", "expected a file, received embedded null byte")
    refused("a" * 5000, "expected a file, received File name too long")
    write(tmp_path / "x", ONE, shards=2)
    (tmp_path / "x.data-00000-of-00002").unlink()
    refused(tmp_path / "x", "x.data-00000-of-00002: expected a file, received No such file or directory")
    (tmp_path / "x.data-00000-of-00002").mkdir()
    refused(tmp_path / "x", "x.data-00000-of-00002: expected a file, received something else of that name")
    os.mkfifo(tmp_path / "pipe.index")
    refused(tmp_path / "pipe", "pipe.index: expected a file, received something else of that name")


def test_a_name_that_is_not_there_is_named(tmp_path):
    refused(write(tmp_path / "x", ONE), "expected one of its 1 variables, received 'v'", names=["w", "v"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "checkpoint: expected a file, received No such file or directory"),
        (b"", 'checkpoint: expected a line model_checkpoint_path: "...", received none'),
        (b"\xff\xfe\0", "received none"),
        (b'all_model_checkpoint_paths: "x"\n', "received none"),
        (b'model_checkpoint_path: "../x"\n', "expected a checkpoint in the same folder"),
        (b'model_checkpoint_path: "sub/../../x"\n', "received 'sub/../../x'"),
        (b'model_checkpoint_path: "/else/where/x"\n', "received '/else/where/x'"),
        (b'model_checkpoint_path: "away/x"\n', "received 'away/x'"),
        (b'model_checkpoint_path: "loop"\n', "loop.index: expected a file"),
        (b'model_checkpoint_path: "y"\n', "y.index: expected a file"),
    ],
)
def test_a_folder_names_a_checkpoint_of_its_own(tmp_path, text, message):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "away").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder / "loop")
    write(tmp_path / "x", ONE)
    if text is not None:
        (folder / "checkpoint").write_bytes(text)
    refused(folder, message)


def test_a_folder_may_link_its_files_to_elsewhere(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write(tmp_path / "blob", ONE)
    (folder / "x.index").symlink_to(tmp_path / "blob.index")
    (folder / "x.data-00000-of-00001").symlink_to(tmp_path / "blob.data-00000-of-00001")
    (folder / "checkpoint").write_text(f'model_checkpoint_path: "{folder}/x"\nall_model_checkpoint_paths: "y"\n')
    same(bundle.read(folder)["w"], W)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "the header: expected a positive number of shards, received 0"),
        (header_message(-1), "expected a positive number of shards, received -1"),
        (header_message(1 << 31), "expected a positive number of shards"),
        (header_message(endianness=1), "expected a little-endian checkpoint (0), received endianness 1"),
        (header_message(version=b"\x08\x02\x10\x02"), "a format for readers of version 1, received from 2 on, not []"),
        (header_message(version=b"\x1a\x01\x01"), "received from 0 on, not [1]"),
        (field(1, b"1"), "expected a field as its message has it, received number 1 of wire type 2"),
        (b"\x08\x01\x08\x01", "the header: expected field 1 once, received 2 times"),
    ],
)
def test_headers(tmp_path, header, message):
    refused(write(tmp_path / "x", ONE, header=header), message)


def test_a_table_without_a_header(tmp_path):
    (tmp_path / "x.index").write_bytes(write_table([(b"w", b"")]))
    refused(tmp_path / "x", "expected a positive number of shards, received 0")
    (tmp_path / "x.index").write_bytes(write_table([]))
    refused(tmp_path / "x", "expected a positive number of shards, received 0")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (entry(shape=(2, 4)), "x.index: w: expected 32 bytes for float32 of shape (2, 4), received 24"),
        (entry(size=20), "expected 24 bytes for float32 of shape (2, 3), received 20"),
        (entry(dtype="float64"), "expected 48 bytes for float64"),
        (entry(size=-24), "expected an offset and a size, received 0 and -24"),
        (entry(offset=-8), "expected an offset and a size, received -8 and 24"),
        (entry(shard=1), "expected a shard below 1, received 1"),
        (entry(shard=-1), "expected a shard below 1, received -1"),
        (entry(shape=(-2, -3)), "expected a shape of at most 32 axes that fits into memory, received [-2, -3]"),
        (entry(shape=(1,) * 33), "expected a shape of at most 32 axes"),
        (entry(shape=(0, 2**40, 2**40), size=0), "expected a shape of at most 32 axes that fits into memory"),
        (entry(shape=(2**32, 2**32), size=0), "that fits into memory"),
        (entry(offset=1), "x.data-00000-of-00001: expected 24 bytes to hold w, received 24 from 1 on"),
        (entry(offset=2**63 - 1), "expected 24 bytes to hold w"),
        (entry(shape=(2**40,), size=2**42), "expected 24 bytes to hold w, received 4398046511104 from 0 on"),
        (entry(dtype="string", size=25), "expected 24 bytes to hold w"),
        (field(1, 1) + field(2, b"\x18\x01") + field(5, 24), "x.index: w: expected a shape, received unknown_rank"),
        (b"\x0b" + entry(), "expected a field as its message has it, received number 1 of wire type 3"),
        (b"\x9b\x06" + entry(), "received number 99 of wire type 3"),
        (b"\x00\x00" + entry(), "received number 0 of wire type 0"),
        (varint(1 << 32) + b"\0" + entry(), "received number 536870912 of wire type 0"),
        (b"\x30\x00" + entry(), "received number 6 of wire type 0"),
        (entry()[:-1], "expected field 6 inside a message of"),
        (entry() + b"\x9a\x06\x7f", "expected field 99 inside a message of"),
        (entry() + b"\x08", "expected a number, received the end of"),
        (entry() + b"\x98\x06" + b"\xff" * 10, "expected a number of at most 64 bits"),
        (entry() + b"\x98\x06" + b"\xff" * 9 + b"\x02", "expected a number of at most 64 bits"),
        (entry() + b"\x08\x01", "expected field 1 once, received 2 times"),
        (entry() + b"\x35\0\0\0\0", "expected field 6 once, received 2 times"),
        (entry(slices=[b""]), "expected parts of numbers, no bytes, received 24 bytes of dtype float32"),
        (entry(size=0, dtype="string", slices=[b""]), "expected parts of numbers, no bytes"),
    ],
)
def test_entries_that_are_malformed(tmp_path, message, expected):
    refused(write(tmp_path / "x", ONE, hook=only("entry", lambda _: message, "w")), expected)


def test_an_empty_tensor_may_have_a_long_axis(tmp_path):
    write(tmp_path / "x", {"e": Stored("float64", (0, 2**58), b""), "m": Stored("int8", (1,) * 32, b"\7")})
    found = bundle.read(tmp_path / "x")
    assert found["e"].shape == (0, 2**58) and found["m"].shape == (1,) * 32


def test_tensors_that_overlap(tmp_path):
    early = only("entry", lambda _: entry(offset=20), "v")
    prefix = write(tmp_path / "x", {"a": stored(W), "v": stored(W)}, hook=early)
    refused(prefix, "expected a to end before v, received an end at 24, and 24 from 20 on")
    # No bytes overlap with nothing, and in another shard the same place is another place.
    inside = only("entry", lambda _: entry(offset=8, shape=(0,), size=0), "v")
    write(prefix, {"a": stored(W), "v": stored(W)}, hook=inside)
    assert bundle.read(prefix, verify=False)["v"].shape == (0,)
    write(prefix, {"a": stored(W), "b": stored(W), "e": Stored("float32", (0,), b"")}, shards=2)
    assert len(bundle.read(prefix)) == 3


def test_a_boolean_is_zero_or_one(tmp_path):
    write(tmp_path / "x", {"b": Stored("bool", (3,), b"\0\1\2")})
    refused(tmp_path / "x", "b: expected booleans stored as 0 or 1, received 2")


def test_memory_that_is_not_there(tmp_path, monkeypatch):
    def none(size, dtype):
        raise MemoryError

    write(tmp_path / "x", ONE)
    listed = bundle.entries(tmp_path / "x")
    monkeypatch.setattr(bundle, "entries", lambda prefix: listed)
    monkeypatch.setattr(np, "empty", none)
    refused(tmp_path / "x", "w: expected a tensor that fits into memory, received 24 bytes")


def test_files_that_shrink_while_they_are_read(tmp_path, monkeypatch):
    write(tmp_path / "x", ONE)
    listed = bundle.entries(tmp_path / "x")
    (tmp_path / "x.data-00000-of-00001").write_bytes(W.tobytes()[:20])
    monkeypatch.setattr(bundle, "entries", lambda prefix: listed)
    refused(tmp_path / "x", "x.data-00000-of-00001: expected 24 bytes from 0 on, received 20")
    (tmp_path / "x.data-00000-of-00001").unlink()
    refused(tmp_path / "x", "expected a file that can be read, received No such file or directory")


PLANE = np.arange(12, dtype=np.float32).reshape(4, 3)
UPPER, LOWER = ((0, 2), None), ((2, 2), None)


def parted(*parts, shape=(4, 3)):
    return {"p": Cut("float32", shape, [(extent, stored(np.zeros(size, np.float32))) for extent, size in parts])}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (parted((UPPER, (2, 3))), "x.index: p: expected parts that hold 12 elements, received 6"),
        (parted((UPPER, (2, 3)), (((1, 3), None), (3, 3))), "expected parts that hold 12 elements, received 15"),
        (parted((UPPER, (2, 3)), (((1, 2), None), (2, 3))), "expected parts that do not overlap, received p at (1, 0)"),
        (parted((((0, 5), None), (5, 3))), "expected a part inside shape (4, 3), received 5 from 0 on"),
        (parted((((3, 2), None), (2, 3))), "expected a part inside shape (4, 3), received 2 from 3 on"),
        (parted((((-1, 4), None), (4, 3))), "expected a part inside shape (4, 3), received 4 from -1 on"),
        (parted((((0, -2), None), (2, 3))), "expected a part inside shape (4, 3), received -2 from 0 on"),
        (parted((((2**63 - 1, 2**63 - 1), None), (2, 3))), "expected a part inside shape (4, 3)"),
        (parted((((0, 4),), (4, 3))), "expected parts of 2 axes, received 1"),
        (parted((((0, 4), None, None), (4, 3, 1))), "expected parts of 2 axes, received 3"),
        (parted((UPPER, (2, 2)), (LOWER, (2, 3))), "expected a part of float32 and shape (2, 3), received float32 of"),
    ],
)
def test_parts_that_do_not_make_a_whole(tmp_path, tensors, message):
    refused(write(tmp_path / "x", tensors), message)


def test_a_part_that_is_missing_a_part_that_is_left_over_and_a_part_of_parts(tmp_path):
    tensors = {"p": cut(PLANE, UPPER, LOWER)}
    message = entry_message("float32", (4, 3), 0, 0, 0, 0, [slice_message(UPPER), slice_message(UPPER)])
    write(tmp_path / "x", tensors, hook=only("entry", lambda _: message, "p"))
    refused(tmp_path / "x", "expected one part of shape (2, 3) at (0, 0), received none, or a second mention")
    write(tmp_path / "x", tensors, extra=[(slice_key("p", ((0, 1), None)), entry())])
    refused(tmp_path / "x", "expected parts that a variable lists, received others: [b'\\x00p\\x00\\x01")
    inner = entry_message("float32", (2, 3), 0, 0, 0, 0, [slice_message(UPPER)])
    write(tmp_path / "x", tensors, hook=only("entry", lambda _: inner, "p[1]"))
    refused(tmp_path / "x", "p at (2, 0): expected one part of shape (2, 3) at (0, 0), received none")
    kind = entry_message("int32", (2, 3), 0, 0, 24, 0)
    write(tmp_path / "x", tensors, hook=only("entry", lambda _: kind, "p[0]"))
    refused(tmp_path / "x", "expected a part of float32 and shape (2, 3), received int32 of shape (2, 3)")


def raw_block(*entries, restarts=(0,)):
    """A block of entries (shared, key, value) as they are given."""
    body = b"".join(
        varint(shared) + varint(len(key)) + varint(len(value)) + key + value for shared, key, value in entries
    )
    return body + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


HEAD = (0, b"", header_message())
# The empty metaindex with its trailer, which follows the last block of entries.
META = raw_block() + b"\0" + struct.pack("<I", masked(crc(raw_block() + b"\0")))


@pytest.mark.parametrize(
    ("level", "content", "message"),
    [
        ("block", b"", "expected restarts that fit into a block of 0 bytes, received 0"),
        ("block", bytes(3), "expected restarts that fit into a block of 3 bytes, received 0"),
        ("block", bytes(8), "expected restarts that fit into a block of 8 bytes, received 0"),
        ("block", b"\2\0\0\0" * 2, "expected restarts that fit into a block of 8 bytes, received 2"),
        ("block", raw_block(HEAD, restarts=(0,) * 5), "expected restarts that fit into a block of 33 bytes"),
        ("block", b"\xff" * 8, "expected restarts that fit into a block of 8 bytes, received 4294967295"),
        ("block", raw_block(HEAD, (1, b"w", b"")), "expected an entry at 9 of a block, received 1 bytes of 0 shared"),
        ("block", raw_block(HEAD, restarts=(0, 4)), "expected restarts where an entry begins, received [4]"),
        ("block", raw_block(HEAD, (0, b"w", b""), (1, b"x", b""), restarts=(0, 13)), "expected an entry at 13 of a"),
        ("block", b"\0\0\x7f" + bytes(4) + b"\1\0\0\0", "received 0 bytes of 0 shared, 0 and 127 up to 3"),
        ("block", b"\0\0\x80" + bytes(4) + b"\1\0\0\0", "expected an entry at 0 of a block"),
        ("block", raw_block(HEAD, (0, b"w", b""), (0, b"v", b"")), "expected keys in ascending order, received b'v'"),
        ("block", raw_block(HEAD, (0, b"w", b""), (1, b"", b"")), "expected keys in ascending order, received b'w'"),
        ("block", raw_block(HEAD, HEAD), "expected keys in ascending order, received b''"),
        ("block", raw_block(HEAD, (0, b"y", b"")), "ascending order, received b'y' between b'' and b'x'"),
        ("top", raw_block((0, b"x", b"\0\x7f\0")), "expected a block from 0 on, received 007f00, from 0"),
        ("top", raw_block((0, b"x", b"\x80")), "expected a number, received the end of 1 bytes"),
        ("top", raw_block((0, b"x", b"\0" + varint(2**60))), "the block at 0: expected at most"),
        ("top", raw_block((0, b"x", varint(2**63) + b"\0")), "expected at most"),
        ("footer", b"\x80" * 40 + bytes.fromhex("57fb808b247547db"), "expected a number of at most 64 bits"),
        ("footer", bytes(40) + bytes.fromhex("57fb808b247547da"), "expected the magic number 57fb808b247547db at its"),
        ("footer", bytes(47), "expected the magic number"),
        ("snappy", b"\xff\xff\xff\x7f", "expected at most 88 bytes from 4 of Snappy, received 268435455"),
    ],
)
def test_tables_that_are_malformed(tmp_path, level, content, message):
    refused(write(tmp_path / "x", ONE, compress=level == "snappy", hook=only(level, lambda _: content)), message)


def test_a_block_that_stands_in_the_table_twice(tmp_path):
    # After three lengths and the key x there is the place of the block, two bytes.
    twice = only("top", lambda was: raw_block((0, b"x", was[4:6]), (0, b"y", was[4:6])))
    refused(write(tmp_path / "x", ONE, hook=twice), "expected a block from 45 on, received 0028, from 0")


def write_blocks(folder, *blocks):
    """An index of blocks as they are given: (shared, rest of the key in the top block, content)."""
    out, top = bytearray(), []

    def put(content):
        handle = varint(len(out)) + varint(len(content))
        out.extend(content + b"\0" + struct.pack("<I", masked(crc(content + b"\0"))))
        return handle

    for shared, key, content in blocks:
        top.append((shared, key, put(content)))
    footer = put(raw_block()) + put(raw_block(*top))
    (folder / "x.index").write_bytes(out + footer.ljust(40, b"\0") + bytes.fromhex("57fb808b247547db"))


def test_a_block_of_any_length(tmp_path):
    for length in range(200):
        content = raw_block((0, b"x", b"\0" + varint(length)))
        prefix = write(tmp_path / "x", ONE, hook=only("top", lambda was, content=content: content))
        before = (tmp_path / "x.index").stat().st_size - 48
        if length + 5 > before:
            message = f"the block at 0: expected at most {before} bytes with its trailer, received {length + 5}"
        else:
            message = "the block at 0: expected bytes of CRC-32C"
        # 40 is the true one.
        if length != 40:
            refused(prefix, message)


def test_a_metaindex_that_is_damaged(tmp_path):
    index = write(tmp_path / "x", ONE).with_suffix(".index")
    damage(index, index.read_bytes().index(META))
    refused(tmp_path / "x", "the block at 45: expected bytes of CRC-32C")


def test_a_name_that_is_not_utf8(tmp_path):
    refused(write(tmp_path / "x", ONE, extra=[(b"\xff", entry())]), "expected names in UTF-8, received b'\\xff'")
    refused(write(tmp_path / "x", ONE, extra=[(b"\xed\xa0\x80", entry())]), "expected names in UTF-8")


def test_a_compression_that_is_unknown(tmp_path):
    index = bytearray(write(tmp_path / "x", ONE).with_suffix(".index").read_bytes())
    end = index.index(META) - 5
    index[end] = 2
    index[end + 1 : end + 5] = struct.pack("<I", masked(crc(index[: end + 1])))
    (tmp_path / "x.index").write_bytes(index)
    refused(tmp_path / "x", "expected no compression (0) or Snappy (1), received 2")


def test_an_index_of_a_wrong_size(tmp_path):
    for size in (0, 47):
        (tmp_path / "x.index").write_bytes(bytes(size))
        refused(tmp_path / "x", f"expected an index of 48 to 16777216 bytes, received {size}")
    with (tmp_path / "x.index").open("wb") as file:
        file.truncate(2**24 + 1)
    refused(tmp_path / "x", "received 16777217")


def test_names_that_would_fill_the_memory(tmp_path):
    # Each of the later names is the first one, shared, and a few bytes: 12 MB of names in 30 KB.
    entries = [HEAD, (0, b"n" * 4000, b""), *((4000, struct.pack(">H", number), b"") for number in range(3000))]
    refused(write(tmp_path / "x", ONE, hook=only("block", lambda _: raw_block(*entries))), "expected names of at most")


def test_keys_of_blocks_that_would_fill_the_time(tmp_path):
    # As the names above, in the top block: an empty block for each.
    first = (0, b"n" * 4000 + b"\0\0", raw_block(HEAD))
    write_blocks(tmp_path, first, *((4000, struct.pack(">H", 1 + number), raw_block()) for number in range(300)))
    refused(tmp_path / "x", "expected names of at most")


def test_a_key_that_belongs_before_the_block_it_is_in(tmp_path):
    write_blocks(tmp_path, (0, b"m", raw_block(HEAD)), (0, b"x", raw_block((0, b"b", b""))))
    refused(tmp_path / "x", "expected keys in ascending order, received b'b' between b'm' and b'x'")


@pytest.mark.parametrize("end", ["index", "data-00000-of-00001"])
def test_a_file_cut_short_anywhere_is_refused(tmp_path, end):
    write(tmp_path / "x", {"a": stored(W), "b": stored(np.array([1, 2], np.int8))})
    file = tmp_path / f"x.{end}"
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        refused(tmp_path / "x", "expected")


# Damage by chance

SMALL = {
    "a/kernel": stored(np.arange(35, dtype=np.float32).reshape(5, 7)),
    "a/bias": stored(np.arange(7, dtype=np.float64)),
    "b/half": Stored("bfloat16", (2, 3), bytes(range(100, 112))),
    "b/ids": stored(np.arange(11, dtype=np.int16)),
    "c/empty": stored(np.empty((0, 3), np.float32)),
    "c/flag": stored(np.array([True, False, True])),
    "c/scalar": stored(np.array(5, np.int64)),
    "d/graph": Stored("string", (), b"\x01\0\0\0\0x"),
    "e/parts": cut(np.arange(130, dtype=np.float32).reshape(65, 2), ((0, 64), None), ((64, 1), None)),
}
LAYOUTS = (
    {},
    {"shards": 2, "blocks": 3, "interval": 2},
    {"compress": True, "blocks": 2, "padding": 3},
    {"shards": 3, "compress": True, "interval": 4},
)
EXTREMES = (
    b"\0", b"\x01", b"\x7f", b"\x80", b"\xff", b"\xff\xff\xff\xff", b"\xff" * 9 + b"\x01", b"\xff" * 8 + b"\x7f",
    b"\x80" * 9 + b"\x01", b"\xff\xff\xff\xff\x0f", b"\xff\xff\xff\xff\x07", b"\x80\x80\x80\x80\x10", b"\xff" * 12,
)  # fmt: skip
# Where damage is done: to a file as it lies there, or before the CRCs are made.
LEVELS = ("file", "unverified", "tensor", "entry", "key", "block", "snappy", "top", "meta", "footer")
# Tensors that are other tensors with the CRCs of those, or a block that nobody reads.
HARMLESS = ("unverified", "tensor", "meta")


def mutated(draw, data):
    """One to three of: flipped bits, a cut, a splice, an insertion, a number set to an extreme."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 3))):
        at = draw.randrange(len(data) + 1)
        kind = draw.randrange(6)
        if kind == 0 and data:
            for _ in range(draw.choice((1, 1, 2, 8))):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at : at + draw.choice((1, 2, 5, 1 << 20))]
        elif kind == 2:
            begin = draw.randrange(len(data) + 1)
            piece = data[begin : begin + draw.randrange(1, 40)]
            data[at : at + draw.choice((0, len(piece)))] = piece
        elif kind == 3:
            data[at:at] = draw.randbytes(draw.randrange(1, 9))
        else:
            extreme = draw.choice(EXTREMES)
            data[at : at + draw.choice((0, 1, len(extreme)))] = extreme
    return bytes(data)


def content(tensors):
    """The bytes of every variable of numbers, put together by hand for the only one in parts."""
    return {
        name: b"".join(part.raw for _, part in one.parts) if isinstance(one, Cut) else one.raw
        for name, one in tensors.items()
        if one.dtype != "string"
    }


def taken(prefix, **options):
    """The bytes of what is read, bfloat16 as it was stored."""
    kinds = {name: one.dtype for name, one in bundle.entries(prefix).items()}
    found = {}
    for name, array in bundle.read(prefix, **options).items():
        if kinds[name] == "bfloat16":
            assert array.dtype == np.float32 and not (array.view(np.uint32) & 0xFFFF).any()
            found[name] = (array.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        else:
            assert array.dtype.name == kinds[name]
            found[name] = array.tobytes()
    return found


def damaged(folder, draw):
    """Write a damaged bundle; returns its prefix, the level, and what each level allows the reader to return."""
    level = draw.choice(LEVELS)
    layout = draw.choice([one for one in LAYOUTS if level != "snappy" or "compress" in one])
    prefix, expected, chosen = folder / "x", content(SMALL), draw.random()
    # There are a dozen tensors and entries, of which a few are to be changed, and a block or two.
    rate = 0.3 if level in ("tensor", "entry", "key") else 0.8

    def change(at, data):
        if at != level or draw.random() > rate:
            return data
        if at == "tensor":
            name, raw = data
            if name not in expected or not raw:
                return data
            changed = bytearray(raw)
            changed[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
            expected[name] = bytes(changed)
            return bytes(changed)
        return mutated(draw, data[1] if isinstance(data, tuple) else data)

    write(prefix, SMALL, hook=change, **layout)
    files = sorted(folder.glob("x.*"))
    if level == "file":
        file = draw.choice(files if chosen < 0.5 else [prefix.with_suffix(".index")])
        file.write_bytes(mutated(draw, file.read_bytes()))
    elif level == "unverified":
        shard = draw.choice([file for file in files if file.suffix != ".index"])
        damage(shard, draw.randrange(shard.stat().st_size))
    return prefix, level, expected


def judge(folder, seed):
    """Damage a bundle and read it; returns the level of the damage, and whether it was 'refused' or 'read'.

    With a CRC over everything that was touched, only the original itself may be read. Behind the CRCs of the index, it
    can say other things of the tensors (a name, a shape), but their bytes are held against their own CRCs.
    """
    prefix, level, expected = damaged(folder, random.Random(seed))
    # Watching the memory takes most of the time.
    if watched := seed % 10 == 0:
        tracemalloc.start()
    start = time.perf_counter()
    try:
        found = taken(prefix, verify=level != "unverified")
    except BundleError:
        outcome = "refused"
    else:
        outcome = "read"
        if level == "unverified":
            assert found.keys() == expected.keys()
            apart = [(a, b) for name in found for a, b in zip(found[name], expected[name], strict=True) if a != b]
            assert len(apart) <= 1 and all(a == b ^ 0xFF for a, b in apart)
        elif level in ("file", "tensor"):
            assert found == expected
        else:
            assert set(found.values()) <= set(expected.values())
    finally:
        seconds, memory = time.perf_counter() - start, tracemalloc.get_traced_memory()[1] if watched else 0
        tracemalloc.stop()
    assert seconds < 20 and memory < 2 << 20, f"{seconds} s, {memory} bytes"
    for file in folder.glob("x.*"):
        file.unlink()
    return level, outcome


def test_damage_by_chance_is_refused_or_harmless(tmp_path):
    # The tables of crc32c are no part of what an input costs.
    bundle.crc32c(bytes(1 << 20))
    counts = collections.Counter(judge(tmp_path, seed) for seed in range(1500))
    # Every level was reached, and what had no consequences was mostly no damage.
    assert {level for level, _ in counts} == set(LEVELS)
    assert all(counts[level, "refused"] > counts[level, "read"] for level in LEVELS if level not in HARMLESS)
    assert all(counts[level, "read"] > counts[level, "refused"] for level in HARMLESS)
