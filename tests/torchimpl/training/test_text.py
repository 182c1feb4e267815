"""Texts as token ids: words by both segmenters, windows cut by hand, and files that are refused in words."""

import io
import json
import struct
import zipfile

import numpy as np
import pytest

from refimpl import tokenizer as tokenizers
from torchimpl.training import text
from torchimpl.training.run import TrainError

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "we", "run", "##ning", "##s", "far", "天", "气", "好", "!"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    file = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    file.write_text("\n".join(TOKENS) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def tokenizer(vocabulary):
    return tokenizers.read(vocabulary)


def halves(line):
    """A segmenter: 天气 is one word."""
    return ["天气" if part == "天" else part for part in line if part != "气"]


def ids(*tokens):
    return [TOKENS.index(token) for token in tokens]


def test_word_pieces_go_on_with_their_word(tokenizer):
    found, words = text.pieces("We running far", tokenizer)
    assert found == ids("we", "run", "##ning", "far")
    assert words == [0, 1, 1, 2]
    assert text.pieces("天气好!", tokenizer) == (ids("天", "气", "好", "!"), [0, 1, 2, 3])
    assert text.pieces("", tokenizer) == ([], [])


def test_a_segmenter_says_what_a_word_is(tokenizer):
    assert text.pieces("天气好!", tokenizer, halves) == (ids("天", "气", "好", "!"), [0, 0, 1, 2])
    # What has no token is no word.
    assert text.pieces("we far", tokenizer, lambda line: ["we", " ", "far"]) == (ids("we", "far"), [0, 1])


def test_segmenters_by_name():
    assert text.segmenter("wordpiece") is None
    assert text.segmenter("textwrap:wrap")("a b") == ["a b"]
    with pytest.raises(TrainError, match="wordpiece, jieba or module:function, received 'lac'"):
        text.segmenter("lac")
    for name in ("textwrap:none", "no.such.module:cut"):
        with pytest.raises(TrainError, match=f"segmenter {name} cannot be loaded"):
            text.segmenter(name)


def test_jieba_is_used_where_it_is_installed(tokenizer):
    pytest.importorskip("jieba", reason="jieba is optional")
    assert "".join(text.segmenter("jieba")("天气好")) == "天气好"


def test_windows_are_cut_between_words_by_hand(tokenizer):
    made, mask, words = text.windows(iter(["we running far", "", "far"]), tokenizer, 5)
    assert made.tolist() == [
        ids("[CLS]", "we", "run", "##ning", "[SEP]"),
        ids("[CLS]", "far", "[SEP]", "[PAD]", "[PAD]"),
        ids("[CLS]", "far", "[SEP]", "[PAD]", "[PAD]"),
    ]
    assert words.tolist() == [[-1, 0, 1, 1, -1], [-1, 0, -1, -1, -1], [-1, 0, -1, -1, -1]]
    assert mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2, [True] * 3 + [False] * 2]
    # A word is not torn as long as it has room.
    made, _, words = text.windows(iter(["we running"]), tokenizer, 4)
    assert made.tolist() == [ids("[CLS]", "we", "[SEP]", "[PAD]"), ids("[CLS]", "run", "##ning", "[SEP]")]
    made, _, words = text.windows(iter(["running"]), tokenizer, 3)
    assert made.tolist() == [ids("[CLS]", "run", "[SEP]"), ids("[CLS]", "##ning", "[SEP]")]
    assert words.tolist() == [[-1, 0, -1]] * 2
    with pytest.raises(TrainError, match="length of 3 or more"):
        text.windows(iter(["we"]), tokenizer, 2)
    with pytest.raises(TrainError, match="no token"):
        text.windows(iter([""]), tokenizer, 9)


def test_examples_by_hand(tokenizer):
    rows = [text.Row("we run", None, "a"), text.Row("far", None, "b")]
    made, segments, mask, lengths = text.encoded(rows, tokenizer, 9)
    assert made.tolist() == [ids("[CLS]", "we", "run", "[SEP]"), ids("[CLS]", "far", "[SEP]", "[PAD]")]
    assert segments.tolist() == [[0] * 4] * 2
    assert mask.tolist() == [[True] * 4, [True] * 3 + [False]]
    assert lengths == (4, 3)
    made, segments, mask, lengths = text.encoded([text.Row("we run far", "far!", "a")], tokenizer, 7)
    assert made.tolist() == [ids("[CLS]", "we", "run", "[SEP]", "far", "!", "[SEP]")]
    assert segments.tolist() == [[0, 0, 0, 0, 1, 1, 1]] and mask.all()
    # [CLS] we run far [SEP] far ! [SEP]
    assert lengths == (8,)
    made, *_ = text.encoded([text.Row("we", "far far far far", "a")], tokenizer, 6)
    assert made.tolist() == [ids("[CLS]", "we", "[SEP]", "far", "far", "[SEP]")]
    # What is cut stays in its place among what is not, and the width is that of what is left.
    rows = [text.Row("far", None, "a"), text.Row("we running far!", None, "b"), text.Row("run", None, "a")]
    made, _, mask, lengths = text.encoded(rows, tokenizer, 5)
    assert made.tolist() == [
        ids("[CLS]", "far", "[SEP]", "[PAD]", "[PAD]"),
        ids("[CLS]", "we", "run", "##ning", "[SEP]"),
        ids("[CLS]", "run", "[SEP]", "[PAD]", "[PAD]"),
    ]
    assert mask.sum(axis=1).tolist() == [3, 5, 3] and lengths == (3, 7, 3)
    with pytest.raises(TrainError, match="length of 5 or more"):
        text.encoded(rows, tokenizer, 4)


def test_texts_are_tokenised_once(tokenizer, monkeypatch):
    asked = []
    whole = tokenizer.pieces_batch
    monkeypatch.setattr(tokenizer, "pieces_batch", lambda texts: asked.extend(texts) or whole(texts))
    monkeypatch.setattr(tokenizer, "pieces", None)
    rows = [text.Row("we running far!", None, "a"), text.Row("we run", None, "b")]
    made, *_, lengths = text.encoded(rows, tokenizer, 5)
    assert asked == ["we running far!", "we run"] and made.shape == (2, 5) and lengths == (7, 4)
    asked.clear()
    *_, lengths = text.encoded([text.Row("we running", "far far far", "a")], tokenizer, 5)
    assert asked == ["we running", "far far far"] and lengths == (9,)


def test_what_is_cut_is_told_in_words():
    assert text.cut((3, 5, 5), 5) == ""
    assert text.cut((3, 6, 5, 1340), 5) == "2 of 4 texts cut to --length 5, the longest from 1,340 tokens"


def test_words_of_a_tokenizer_json_are_those_of_the_vocabulary(tokenizer, tmp_path):
    tokenizer._words.save(str(tmp_path / "tokenizer.json"))
    other = tokenizers.read(tmp_path / "tokenizer.json")
    assert type(other) is not type(tokenizer)
    for segment in (None, halves):
        assert text.pieces("we running 天气", other, segment) == text.pieces("we running 天气", tokenizer, segment)


def test_padding_is_needed_where_texts_are_put_together():
    made = tokenizers.Tokenizer(TOKENS[1:], lower_case=True)
    for use in (
        lambda: text.windows(iter(["we"]), made, 9),
        lambda: text.encoded([text.Row("we", None, "a")], made, 9),
    ):
        with pytest.raises(TrainError, match=r"the tokenizer has no \[PAD\]"):
            use()
    assert text.special(made, "[MASK]") == 3


def test_a_corpus_of_lines_and_of_objects(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone\n\n  two \n", encoding="utf-8")
    assert list(text.documents(tmp_path / "a.txt")) == ["one", "two"]
    (tmp_path / "a.jsonl").write_text('{"text": "one", "id": 3}\n{"text": "t\\nwo"}\n')
    assert list(text.documents(tmp_path / "a.jsonl")) == ["one", "t\nwo"]
    with pytest.raises(TrainError, match=r"corpus as .txt, .jsonl or .npz, received .*a.parquet"):
        list(text.documents(tmp_path / "a.parquet"))


@pytest.mark.parametrize(("line", "told"), [
    ("{", "no JSON"), ("[1]", "expected an object, received \\[1\\]"), ("{}", "a text under 'text', received None"),
    ('{"text": 3}', "received 3"), ("[" * 100000, "no JSON"),
])  # fmt: skip
def test_a_line_that_is_no_text_is_named(tmp_path, line, told):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' + line)
    with pytest.raises(TrainError, match=f"line 2: .*{told}"):
        list(text.documents(tmp_path / "a.jsonl"))


def test_lines_and_files_are_bounded(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one\n" + "x" * 20)
    monkeypatch.setattr(text, "LONGEST_LINE", 10)
    with pytest.raises(TrainError, match="line 2: longer than 10 characters"):
        list(text.documents(tmp_path / "a.txt"))
    monkeypatch.setattr(text, "LARGEST_FILE", 10)
    with pytest.raises(TrainError, match="24 bytes; at most 10"):
        list(text.documents(tmp_path / "a.txt"))
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(TrainError, match="line 1: no UTF-8"):
        list(text.documents(tmp_path / "b.txt"))


def test_examples_from_every_kind_of_file(tmp_path):
    expected = [text.Row('a "b"', None, "good"), text.Row("c, d", None, "bad")]
    (tmp_path / "a.tsv").write_text('label\ttext\ngood\ta "b"\nbad\tc, d\n')
    (tmp_path / "a.csv").write_text('text,label\n"a ""b""",good\n"c, d",bad\n')
    lines = [json.dumps({"text": row.text, "label": row.label}) for row in expected]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for name in ("a.tsv", "a.csv", "a.jsonl"):
        assert text.rows(tmp_path / name) == expected
    (tmp_path / "pair.jsonl").write_text('{"text": "a", "pair": "b", "label": 1}')
    assert text.rows(tmp_path / "pair.jsonl") == [text.Row("a", "b", "1")]


@pytest.mark.parametrize(("name", "held", "told"), [
    ("a.tsv", "text\tlabel\n", "has no example"),
    ("a.tsv", "text\tlabel\na\n", "row 2: expected the fields of the first"),
    ("a.tsv", "text\tlabel\na\tb\tc\n", "row 2: expected the fields of the first"),
    ("a.tsv", "text\tclass\na\tb\n", "a text under 'label', received None"),
    ("a.csv", 'text,label\n"a', "is no table in UTF-8"),
    ("a.jsonl", '{"text": "a", "label": true}', "under 'label', received True"),
    ("a.jsonl", '{"text": "a", "label": "b"}\n{"text": "a", "pair": "c", "label": "b"}', "some examples have a pair"),
    ("a.xml", "", "received .*a.xml"),
])  # fmt: skip
def test_files_that_are_no_examples(tmp_path, name, held, told):
    (tmp_path / name).write_text(held)
    with pytest.raises(TrainError, match=told):
        text.rows(tmp_path / name)


def test_arrays_are_checked(tmp_path):
    file = tmp_path / "a.npz"
    np.savez(file, a=np.ones((2, 3)), b=np.ones(2))
    assert text.arrays(file, ("a",), ("a", "b")).keys() == {"a", "b"}
    with pytest.raises(TrainError, match="has no c; it has a, b"):
        text.arrays(file, ("c",), ("a", "b", "c"))
    with pytest.raises(TrainError, match="unknown arrays b; the known ones are a"):
        text.arrays(file, (), ("a",))
    np.savez(file, a=np.ones((2, 3)), b=np.ones(3))
    with pytest.raises(TrainError, match="as many rows"):
        text.arrays(file, (), ("a", "b"))
    np.savez(file, a=np.array([{}], dtype=object))
    with pytest.raises(TrainError, match=r"no archive of plain arrays \(a\.npy holds objects"):
        text.arrays(file, (), ("a",))
    np.savez(file, a=np.ones((2, 3)))
    whole = file.read_bytes()
    for damaged in (b"nothing", whole[:-30], whole.replace(b"NUMPY", b"NUMPI"), whole.replace(b"'<f8'", b"'<x8'")):
        file.write_bytes(damaged)
        with pytest.raises(TrainError, match="no archive of plain arrays"):
            text.arrays(file, (), ("a",))
    np.savez_compressed(file, a=np.arange(999))
    whole = bytearray(file.read_bytes())
    # Behind the local header (30 bytes, a.npy, 20 bytes of zip64): a kind of block that deflate does not have.
    whole[55] = 7
    file.write_bytes(whole)
    with pytest.raises(TrainError, match=r"no archive of plain arrays \(Error -3 while decompressing"):
        text.arrays(file, (), ("a",))
    np.save(tmp_path / "b.npy", np.ones(3))
    with pytest.raises(TrainError, match="no archive of plain arrays"):
        text.arrays(tmp_path / "b.npy", (), ("a",))


def archive(file, **members):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as held:
        for name, data in members.items():
            held.writestr(f"{name}.npy", data)
    return file


def told_array(shape, data, dtype="<i8"):
    """A .npy whose header tells this shape, whatever the data are."""
    made = io.BytesIO()
    np.lib.format.write_array_header_1_0(made, {"descr": dtype, "fortran_order": False, "shape": shape})
    return made.getvalue() + data


def test_no_array_is_made_that_the_bytes_cannot_fill(tmp_path, monkeypatch):
    """A terabyte in the header, a terabyte in the directory, and more zeros than are allowed: nothing is unpacked."""

    def read(*_, **__):
        raise AssertionError("an array was made")

    monkeypatch.setattr(np.lib.format, "read_array", read)
    file = archive(tmp_path / "a.npz", a=told_array((1 << 37,), bytes(8)))
    with pytest.raises(TrainError, match=r"\(137438953472,\) of int64 are 1099511627776 bytes, received 8"):
        text.arrays(file, ("a",), ("a",))
    file = archive(tmp_path / "a.npz", a=told_array((2, 1 << 62, 1 << 62), bytes(8)))
    with pytest.raises(TrainError, match="no archive of plain arrays"):
        text.arrays(file, ("a",), ("a",))
    # A first array that is right does not open the way for a second one.
    file = archive(tmp_path / "a.npz", a=told_array((1,), bytes(8)), b=told_array((1, 1 << 37), bytes(8)))
    with pytest.raises(TrainError, match=r"b\.npy: \(1, 137438953472\)"):
        text.arrays(file, ("a",), ("a", "b"))
    data = archive(file, a=told_array((1 << 17,), bytes(1 << 20))).read_bytes()
    assert len(data) < 5000
    monkeypatch.setattr(text, "LARGEST_ARRAYS", 1 << 20)
    with pytest.raises(TrainError, match=f"has {(1 << 20) + 128} bytes of arrays; at most {1 << 20} are read"):
        text.arrays(file, ("a",), ("a",))
    # The directory is what is believed: one that tells more has no such bytes behind it.
    monkeypatch.setattr(text, "LARGEST_ARRAYS", 1 << 40)
    size = struct.pack("<I", (1 << 20) + 128)
    assert data.count(size) == 2
    file.write_bytes(data.replace(size, struct.pack("<I", 1 << 31)))
    with pytest.raises(TrainError, match="are 1048576 bytes, received 2147483520"):
        text.arrays(file, ("a",), ("a",))
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(file, "w") as held:
        for _ in range(2):
            held.writestr("a.npy", told_array((1,), bytes(8)))
    with pytest.raises(TrainError, match="two arrays of one name"):
        text.arrays(file, ("a",), ("a",))


def test_arrays_are_read_as_numpy_writes_them(tmp_path):
    held = {"a": np.arange(6, dtype=">i2").reshape(2, 3).T.copy(order="F"), "b": np.array([True, False, True])}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **held)
        found = text.arrays(tmp_path / "a.npz", ("a", "b"), ("a", "b"))
        assert all(
            np.array_equal(found[name], array) and found[name].dtype == array.dtype for name, array in held.items()
        )
    np.savez(tmp_path / "a.npz", a=np.zeros((2, 0)))
    assert text.arrays(tmp_path / "a.npz", (), ("a",))["a"].shape == (2, 0)
