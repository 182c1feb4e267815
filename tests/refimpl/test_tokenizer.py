"""refimpl.tokenizer against bert4keras' published tables, and its laws on any text."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl import tokenizer
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
