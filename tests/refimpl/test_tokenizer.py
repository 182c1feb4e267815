"""refimpl.tokenizer against bert4keras' published tables, its laws on any text, and the files that it reads."""

import json
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from refimpl import cli, tokenizer
from refimpl.check import DomainError

GOLDEN = Path(__file__).parents[1] / "golden" / "b4k_tokenizer"
VOCAB = tokenizer.read_vocab(GOLDEN / "vocab.txt")
TABLES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
WORDS = TABLES["words_for_pre_tokenize"]
SINGLE = [case for case in TABLES["cases"] if "text2" not in case]
PAIRS = [case for case in TABLES["cases"] if "text2" in case]
texts = st.text(st.sampled_from("今天气a bZé１．,!-[]#\u200b\u3000\tßİΣ𠀀中国人民公园"), max_size=24) | st.text(
    max_size=12
)


def made(case: dict) -> tokenizer.Tokenizer:
    segment = tokenizer.greedy(WORDS) if case["pre_tokenize"] else None
    return tokenizer.Tokenizer(VOCAB, lower_case=case["do_lower_case"], segment=segment)


def test_the_tables_hold_both_kinds() -> None:
    assert (len(SINGLE), len(PAIRS)) == (52, 48)


@pytest.mark.parametrize("case", SINGLE, ids=lambda case: f"{case['text'][:12]}-{case['do_lower_case']}")
def test_bert4keras_on_one_text(case) -> None:
    found = made(case).encode(case["text"])
    assert list(found.tokens) == case["tokens"]
    assert list(found.token_ids) == case["token_ids"]
    assert list(found.segment_ids) == case["segment_ids"]
    assert [list(range(*span)) for span in found.offsets] == case["rematch"]
    assert made(case).decode(found.token_ids) == case["decode"]


def test_bert4keras_on_pairs() -> None:
    for case in PAIRS:
        given = (case["text"], case["text2"])
        options = {"max_length": case["maxlen"], "truncate": case["truncate_from"]}
        found = made(case).encode(*given, **options)
        assert list(found.token_ids) == case["token_ids"], case
        assert list(found.segment_ids) == case["segment_ids"], case
        assert made(case).encode_batch([given, given[0]], **options)[0] == found


def test_bert4keras_simplified_vocabulary() -> None:
    expected = TABLES["simplified"]
    found = tokenizer.simplified(VOCAB, first=expected["startswith"])
    assert list(found.tokens) == expected["tokens"]
    assert list(found.old_ids) == expected["keep_tokens"]
    with pytest.raises(DomainError, match="expected a vocabulary with missing"):
        tokenizer.simplified(VOCAB, first=["missing"])


@given(texts, st.booleans(), st.booleans())
def test_offsets_lie_in_the_text_in_order(text, lower_case, cut) -> None:
    segment = tokenizer.greedy(WORDS) if cut else None
    made = tokenizer.Tokenizer(VOCAB, lower_case=lower_case, segment=segment)
    end = 0
    for index, (start, stop) in made.pieces(text):
        assert end <= start < stop <= len(text)
        end = stop
        token = VOCAB[index].removeprefix("##")
        if token.isascii() and token.isalpha() and text[start:stop].isascii():
            assert (text[start:stop].lower() if lower_case else text[start:stop]) == token


@given(st.lists(texts, max_size=4), st.integers(4, 12), st.sampled_from(["left", "right"]))
def test_a_batch_is_its_texts(batch, max_length, truncate) -> None:
    made = tokenizer.Tokenizer(VOCAB, lower_case=True)
    pairs = [*batch, *zip(batch, batch[::-1], strict=True)]
    found = made.encode_batch(pairs, max_length=max_length, truncate=truncate)
    for given_, one in zip(pairs, found, strict=True):
        pair = (given_, None) if isinstance(given_, str) else given_
        assert one == made.encode(*pair, max_length=max_length, truncate=truncate)
        assert len(one.token_ids) <= max_length and one.tokens[-1] == "[SEP]"


def test_the_length_before_the_cut_is_told() -> None:
    made = tokenizer.Tokenizer(VOCAB, lower_case=True)
    # [CLS] 今 天 天 气 [SEP], and with [CLS] 今 天 天 气 [SEP] 今 天 [SEP] of which five characters are left.
    assert made.encode("今天天气").length == 6
    assert made.encode("今天天气", max_length=6).length == 6
    assert made.encode("今天天气", max_length=3).length == 6
    found = made.encode("今天天气", "今天", max_length=8)
    assert (len(found.token_ids), found.length) == (8, 9)
    assert [one.length for one in made.encode_batch(["", ("", "今")], max_length=4)] == [2, 4]


def test_a_text_may_lose_all_its_tokens_on_the_left() -> None:
    found = tokenizer.Tokenizer(VOCAB, lower_case=True).encode("今天", "气", max_length=4, truncate="left")
    assert found.tokens == ("[CLS]", "[SEP]", "气", "[SEP]") and found.length == 6


@given(st.lists(st.integers(0, 9), min_size=1, max_size=2), st.integers(1, 20), st.sampled_from(["left", "right"]))
def test_the_longer_text_loses_one_token_after_the_other(lengths, most, truncate) -> None:
    made = tokenizer.Tokenizer(VOCAB, lower_case=True)
    parts = ["今天气" * 3, "中国人" * 3]
    due = [list(part[:size]) for part, size in zip(parts, lengths, strict=False)]
    given_ = ["".join(part) for part in due]
    while sum(map(len, due)) > most:
        (due[0] if len(due[0]) >= len(due[-1]) else due[1]).pop(0 if truncate == "left" else -1)
    found = made.encode(*given_, max_length=most + len(due) + 1, truncate=truncate)
    expected = [token for part in due for token in (*part, "[SEP]")]
    assert found.tokens == ("[CLS]", *expected)
    assert found.length == sum(lengths) + len(lengths) + 1
    # Places are those in the text that was not cut.
    held = [(given_[s], a, b) for s, (a, b) in zip(found.segment_ids, found.offsets, strict=True) if b]
    assert [text[a:b] for text, a, b in held] == [token for part in due for token in part]


@given(texts)
def test_greedy_words_are_the_text(text) -> None:
    words = tokenizer.greedy(WORDS)(text)
    assert "".join(words) == text and all(len(word) == 1 or word in WORDS for word in words)


def test_greedy_takes_the_longest() -> None:
    assert tokenizer.greedy(["北京", "北京大学", "大学生"])("在北京大学生活") == ["在", "北京大学", "生", "活"]


def test_a_character_that_grows_in_lower_case_keeps_the_places() -> None:
    # "İ" has two characters in lower case, of which one is a mark that is stripped.
    made = tokenizer.Tokenizer(VOCAB, lower_case=True, segment=tokenizer.greedy(WORDS))
    assert made.encode("İ今天").offsets[-2] == (1, 3)


def test_longer_words_than_the_limit_are_unknown() -> None:
    made = tokenizer.Tokenizer(VOCAB, lower_case=True)
    unknown = VOCAB.index("[UNK]")
    assert [index for index, _ in made.pieces("a" * 101)] == [unknown]
    assert unknown not in [index for index, _ in made.pieces("a" * 100)]


def test_what_is_refused(tmp_path) -> None:
    with pytest.raises(DomainError, match="'今' stands twice"):
        tokenizer.Tokenizer([*VOCAB, "今"], lower_case=True)
    with pytest.raises(DomainError, match=r"expected a vocabulary with \[SEP\]"):
        tokenizer.Tokenizer([token for token in VOCAB if token != "[SEP]"], lower_case=True)
    made = tokenizer.Tokenizer(VOCAB, lower_case=True)
    with pytest.raises(DomainError, match="expected a text"):
        made.encode(b"bytes")
    with pytest.raises(DomainError, match="max_length > 3"):
        made.encode("a", "b", max_length=3)
    with pytest.raises(DomainError, match="truncate left or right"):
        made.encode("a", truncate="middle")
    with pytest.raises(DomainError, match=f"ids from 0 to {len(VOCAB) - 1}"):
        made.decode([0, -1])
    with pytest.raises(DomainError, match="words that together are the text"):
        tokenizer.Tokenizer(VOCAB, lower_case=True, segment=str.split).encode("a b")
    file = tmp_path / "vocab.txt"
    file.write_bytes(b"[PAD]\n\xff\n")
    with pytest.raises(DomainError, match="no text in UTF-8"):
        tokenizer.read_vocab(file)
    file.write_text("[PAD]\n\n[UNK]\n")
    with pytest.raises(DomainError, match=r"a token in every line.*\[2\]"):
        tokenizer.read_vocab(file)


def test_lines_may_end_as_windows_writes_them(tmp_path) -> None:
    file = tmp_path / "vocab.txt"
    file.write_bytes("[PAD]\r\n今\r\n".encode())
    assert tokenizer.read_vocab(file) == ("[PAD]", "今")


TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "we", "run", "##ning", "We", "天"]


def vocab_file(folder: Path, tokens=TOKENS, name="vocab.txt") -> Path:
    (folder / name).write_text("\n".join(tokens), encoding="utf-8")
    return folder / name


def json_file(folder: Path, tokens=TOKENS, *, lower_case=True) -> Path:
    """As Hugging Face's BertTokenizerFast saves one: special tokens are added tokens, with padding and truncation."""
    ids = {token: index for index, token in enumerate(tokens)}
    held = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]"))
    held.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lower_case)
    held.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    held.decoder = tokenizers.decoders.WordPiece()
    held.add_special_tokens([token for token in tokens if token.startswith("[")])
    held.enable_padding(length=9)
    held.enable_truncation(3)
    held.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_the_line_separator_is_a_token_of_berts_chinese_vocabulary(tmp_path) -> None:
    file = vocab_file(tmp_path, [*TOKENS, "\u2028", "##\u2028", "\u00a0", "b"])
    assert tokenizer.read_vocab(file) == (*TOKENS, "\u2028", "##\u2028", "\u00a0", "b")
    file.write_bytes("\ufeff[PAD]\r今 \r\n".encode())
    assert tokenizer.read_vocab(file) == ("[PAD]", "今")


def test_both_files_give_the_same_ids_and_places(tmp_path) -> None:
    one, two = tokenizer.read(vocab_file(tmp_path)), tokenizer.read(json_file(tmp_path))
    assert type(two) is tokenizer.AnyTokenizer and two.ids == {token: index for index, token in enumerate(TOKENS)}
    for made in (one, two):
        assert made.pieces("We running 天") == [(5, (0, 2)), (6, (3, 6)), (7, (6, 10)), (9, (11, 12))]
        assert made.encode("We", "天", max_length=5).token_ids == (2, 5, 3, 9, 3)
        assert made.encode_batch(["we running", ("we", "天天")], max_length=5)[1].segment_ids == (0, 0, 0, 1, 1)
        assert made.pieces_batch(["天", "", "we"]) == [[(9, (0, 1))], [], [(5, (0, 2))]]
        assert [made.token(index) for index in (0, 7, 9)] == ["[PAD]", "##ning", "天"]
        assert made.decode([2, 6, 7, 3]) == "running"
        for wrong in (10, -1):
            with pytest.raises(DomainError, match=f"ids from 0 to 9, received {wrong}"):
                made.token(wrong)
            with pytest.raises(DomainError, match=rf"ids from 0 to 9, received received=\[{wrong}\]"):
                made.decode([3, wrong])
        with pytest.raises(DomainError, match="expected a text"):
            made.pieces(3)
    # The one takes special tokens in a text for text, the other does not; and an unknown word is told or not.
    assert one.pieces("[SEP]")[0][0] != 3 and two.pieces("[SEP]") == [(3, (0, 5))]
    assert (one.encode("cat").tokens[1], two.encode("cat").tokens[1]) == ("cat", "[UNK]")


def test_added_tokens_are_tokens(tmp_path) -> None:
    held = tokenizers.Tokenizer.from_file(str(json_file(tmp_path)))
    held.add_tokens(["天气"])
    held.save(str(tmp_path / "tokenizer.json"))
    made = tokenizer.read(tmp_path / "tokenizer.json")
    assert made.encode("天天气").token_ids == (2, 9, 10, 3) and made.token(10) == "天气"


def test_who_says_what_is_in_lower_case(tmp_path) -> None:
    file, beside = vocab_file(tmp_path, name="words.txt"), tmp_path / "tokenizer_config.json"
    lower, cased = TOKENS.index("we"), TOKENS.index("We")

    def found(**given) -> int:
        return tokenizer.read(file, **given).pieces("We")[0][0]

    assert (found(), found(lower_case=False)) == (lower, cased)
    for told, expected in (("{}", lower), ('{"do_lower_case": true}', lower), ('{"do_lower_case": false}', cased)):
        beside.write_text(told)
        assert found() == expected
    assert found(lower_case=True) == lower
    for wrong, words in (("[]", "a JSON object"), ('{"do_lower_case": "no"}', "a boolean in"), ("{", "is no JSON")):
        beside.write_text(wrong)
        with pytest.raises(DomainError, match=words):
            found()
    # A tokenizer.json tells itself, whatever lies beside it.
    assert tokenizer.read(json_file(tmp_path, lower_case=False)).pieces("We")[0][0] == cased
    with pytest.raises(DomainError, match=r"no lower_case and no segment, which .*tokenizer\.json tells itself"):
        tokenizer.read(tmp_path / "tokenizer.json", lower_case=True)
    with pytest.raises(DomainError, match="no lower_case and no segment"):
        tokenizer.read(tmp_path / "tokenizer.json", segment=list)
    assert tokenizer.read(file, lower_case=True, segment=lambda text: [text]).pieces("running") != []


def test_files_that_are_none_are_named(tmp_path, monkeypatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DomainError, match=r"tokenizer\.json is no tokenizer\.json"):
        tokenizer.read(tmp_path / "tokenizer.json")
    for made in (vocab_file, json_file):
        with pytest.raises(
            DomainError, match=r"a vocabulary with \[CLS\], \[SEP\], received tokens=3; of .*/\w+\.\w+$"
        ):
            tokenizer.read(made(tmp_path, ["[PAD]", "[UNK]", "we"]))
    with pytest.raises(DomainError, match=r"'we' stands twice in the vocabulary; of .*vocab\.txt"):
        tokenizer.read(vocab_file(tmp_path, [*TOKENS, "we"]))
    with pytest.raises(FileNotFoundError):
        tokenizer.read(tmp_path / "absent.txt")
    monkeypatch.setattr(tokenizer, "LARGEST_VOCAB", 4)
    with pytest.raises(DomainError, match=r"vocab\.txt of at most 4 bytes, received bytes="):
        tokenizer.read(tmp_path / "vocab.txt")


def test_the_package_that_is_missing_is_named_with_what_to_do(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        ModuleNotFoundError, match="tokenizers, which is not installed: pip install tokenizers"
    ) as raised:
        tokenizer.Tokenizer(VOCAB, lower_case=True)
    # By this name the command line finds the extra.
    assert raised.value.name == "tokenizers" and cli._extra_that_brings("tokenizers") == "train"
