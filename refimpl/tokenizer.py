"""Texts to token ids as BERT's Chinese models were fed: basic splitting, then WordPiece, by the `tokenizers` library.

    tokenizer = read("vocab.txt")
    tokenizer.encode("今天天气很好")     tokens, token ids, segment ids, and where each token stands in the text

A vocab.txt does not tell whether texts are in lower case. tokenizer_config.json beside it may ("do_lower_case"); where
nothing does they are, as for the released Chinese models. A tokenizer.json of Hugging Face tells all of it.

A word-based model (RoFormer's 50,000 words) is given `segment`, which cuts a text into words: a word of the vocabulary
is one token, any other goes through WordPiece.

Source: arXiv:1810.04805; bert4keras (Tokenizer), whose published tables the tests hold. Special tokens that stand in a
text, "[MASK]", are text: they are cut into their characters.
Differs: Hugging Face's tokenizers, those of a tokenizer.json among them, keep special tokens whole, and print [UNK]
where bert4keras prints the word.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from refimpl import check, config

PAD, UNKNOWN, FIRST, SEPARATOR, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# A longer word is unknown as a whole.
LONGEST_WORD = 100
# In a model folder: the first that is there, and what it leaves open.
JSON, VOCAB = FILES = ("tokenizer.json", "vocab.txt")
CONFIG = "tokenizer_config.json"
# A vocabulary beyond this is taken for another kind of file.
LARGEST_VOCAB = 64 * 2**20
LARGEST_JSON = 256 * 2**20
# No space stands behind these when tokens are joined to a text, besides the marks of CJK.
_OPENING = "+-/={(<["
_CJK = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip
_CONTRACTION = re.compile("' (re|m|s|t|ve|d|ll) ")
_DECIMAL = re.compile(r"(\d\.) (?=\d)")

Segment = Callable[[str], Sequence[str]]
Span = tuple[int, int]
Piece = tuple[int, Span]


class Encoded(NamedTuple):
    """One text or a pair, with its special tokens.

    offsets: characters start to end in the text that the token is of (`segment_ids` tells which); (0, 0) for the
        special tokens.
    length: how many tokens there were before any was cut, the special ones included.
    """

    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    segment_ids: tuple[int, ...]
    offsets: tuple[Span, ...]
    length: int


class Simplified(NamedTuple):
    """A smaller vocabulary, and the row of the old token table that every row of the new one is."""

    tokens: tuple[str, ...]
    old_ids: tuple[int, ...]


class AnyTokenizer:
    """What a tokenizer does, whatever cuts its words: `read` makes one of a file.

    ids: of all tokens. words: cuts a text, with places; of the `tokenizers` library.
    Raises: DomainError for a special token that is missing.
    """

    def __init__(self, words: Any, ids: Mapping[str, int]) -> None:
        self.ids, self._words = ids, words
        self._tokens = {index: token for token, index in ids.items()}
        absent = [token for token in (UNKNOWN, FIRST, SEPARATOR) if token not in ids]
        check.domain("tokenizer", not absent, f"a vocabulary with {', '.join(absent)}", tokens=len(ids))

    def token(self, index: int) -> str:
        """The token of an id.

        Raises: DomainError for an id that is not of the vocabulary.
        """
        try:
            return self._tokens[index]
        except KeyError:
            raise check.DomainError(f"tokenizer.token: expected {self._range()}, received {index}") from None

    def pieces(self, text: str) -> list[Piece]:
        """The ids of a text without special tokens, each with its place in the text."""
        found = self._words.encode(_check_text(text), add_special_tokens=False)
        return list(zip(found.ids, found.offsets, strict=True))

    def pieces_batch(self, texts: Sequence[str]) -> list[list[Piece]]:
        """`pieces` of many texts at once, on all cores."""
        found = self._words.encode_batch([_check_text(text) for text in texts], add_special_tokens=False)
        return [list(zip(one.ids, one.offsets, strict=True)) for one in found]

    def encode(
        self,
        text: str,
        second: str | None = None,
        *,
        max_length: int | None = None,
        truncate: Literal["left", "right"] = "right",
    ) -> Encoded:
        """[CLS] text [SEP], or [CLS] text [SEP] second [SEP], the second of segment 1.

        max_length: of all tokens; the longer text loses a token until they fit, the first of equals, at the end that
            `truncate` names.
        Raises: DomainError for what is no text, and for a length that the special tokens fill.
        """
        parts = [self.pieces(given) for given in (text, second) if given is not None]
        return self._joined([text, second], parts, max_length, truncate)

    def encode_batch(
        self,
        texts: Sequence[str | tuple[str, str]],
        *,
        max_length: int | None = None,
        truncate: Literal["left", "right"] = "right",
    ) -> list[Encoded]:
        """`encode` of many texts and pairs at once, on all cores."""
        pairs = [(given, None) if isinstance(given, str) else given for given in texts]
        split = iter(self.pieces_batch([text for pair in pairs for text in pair if text is not None]))
        made = []
        for pair in pairs:
            parts = [next(split) for text in pair if text is not None]
            made.append(self._joined(pair, parts, max_length, truncate))
        return made

    def decode(self, token_ids: Sequence[int]) -> str:
        """A text of the tokens, without the special ones, as a tokenizer.json says.

        Raises: DomainError for an id that is not of the vocabulary.
        """
        self._check_ids(token_ids)
        return str(self._words.decode(list(token_ids), skip_special_tokens=True))

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        outside = [index for index in token_ids if index not in self._tokens]
        check.domain("tokenizer.decode", not outside, self._range(), received=outside[:3])

    def _range(self) -> str:
        return f"ids from {min(self._tokens)} to {max(self._tokens)}"

    def _joined(
        self, texts: Sequence[str | None], parts: list[list[Piece]], max_length: int | None, truncate: str
    ) -> Encoded:
        check.domain("tokenizer.encode", truncate in ("left", "right"), "truncate left or right", truncate=truncate)
        least, lengths = len(parts) + 1, [len(part) for part in parts]
        length = sum(lengths) + least
        if max_length is not None:
            check.domain("tokenizer.encode", max_length > least, f"max_length > {least}", max_length=max_length)
            kept = _kept(lengths, max_length - least)
            parts = [
                part[len(part) - left :] if truncate == "left" else part[:left]
                for part, left in zip(parts, kept, strict=True)
            ]
        rows: list[tuple[str, int, int, Span]] = [(FIRST, self.ids[FIRST], 0, (0, 0))]
        for number, (part, text) in enumerate(zip(parts, texts, strict=False)):
            rows += [(self._shown(index, text, span), index, number, span) for index, span in part]
            rows.append((SEPARATOR, self.ids[SEPARATOR], number, (0, 0)))
        tokens, token_ids, segment_ids, offsets = zip(*rows, strict=True)
        return Encoded(tokens, token_ids, segment_ids, offsets, length)

    def _shown(self, index: int, text: str | None, span: Span) -> str:
        """The token, as `encode` gives it."""
        return self._tokens[index]


class Tokenizer(AnyTokenizer):
    """WordPiece over a vocabulary, whose order gives the ids.

    segment: cuts a text into words, which together are the text; it is given the text in lower case where lower_case.
    Raises: DomainError for a token that stands twice and for a special token that is missing.
    """

    def __init__(self, vocab: Sequence[str], *, lower_case: bool, segment: Segment | None = None) -> None:
        library = _library()
        self.vocab, self.lower_case, self.segment = tuple(vocab), lower_case, segment
        ids = {token: index for index, token in enumerate(self.vocab)}
        if len(ids) < len(self.vocab):
            twice = next(token for index, token in enumerate(self.vocab) if ids[token] != index)
            raise check.DomainError(f"tokenizer: the token {twice!r} stands twice in the vocabulary")
        pieces = library.models.WordPiece(ids, unk_token=UNKNOWN, max_input_chars_per_word=LONGEST_WORD)
        words = library.Tokenizer(pieces)
        words.normalizer = library.normalizers.BertNormalizer(
            clean_text=True, handle_chinese_chars=True, strip_accents=lower_case, lowercase=lower_case
        )
        words.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
        super().__init__(words, ids)

    def pieces(self, text: str) -> list[Piece]:
        return super().pieces(text) if self.segment is None else self._segmented(_check_text(text))

    def pieces_batch(self, texts: Sequence[str]) -> list[list[Piece]]:
        return super().pieces_batch(texts) if self.segment is None else [self.pieces(text) for text in texts]

    def decode(self, token_ids: Sequence[int]) -> str:
        """A text of the tokens, without the special ones: no space around characters of CJK, none before marks.

        Raises: DomainError for an id that is not of the vocabulary.
        """
        self._check_ids(token_ids)
        text = ""
        for token in (self.vocab[index] for index in token_ids):
            if token in SPECIAL:
                continue
            if token.startswith("##") and len(token) > 2:
                text += token[2:]
            elif len(token) == 1 and _is_mark(token):
                text += token + " "
            elif (len(token) == 1 and _is_cjk(token)) or (text and _is_cjk(text[-1])):
                text += token
            else:
                text += " " + token
        text = _CONTRACTION.sub(r"'\1 ", re.sub(" +", " ", text))
        return _DECIMAL.sub(r"\1", _closed(text)).strip()

    def _shown(self, index: int, text: str | None, span: Span) -> str:
        """The token; of an unknown word the word itself."""
        if self.vocab[index] != UNKNOWN or text is None:
            return self.vocab[index]
        return str(self._words.normalizer.normalize_str(text[slice(*span)])).strip()

    def _segmented(self, text: str) -> list[Piece]:
        lowered, origin = text, list(range(len(text)))
        if self.lower_case:
            lowered = text.lower()
            if len(lowered) != len(text):
                lowered = "".join(character.lower() for character in text)
                origin = [index for index, character in enumerate(text) for _ in character.lower()]
        words = list(self.segment(lowered)) if self.segment else [lowered]
        if "".join(words) != lowered:
            raise check.DomainError(f"tokenizer: segment must give words that together are the text {lowered[:40]!r}")
        found: list[Piece] = []
        start = 0
        for word in words:
            if word in self.ids and word not in SPECIAL:
                inner = [(self.ids[word], (0, len(word)))]
            else:
                split = self._words.encode(word, add_special_tokens=False)
                inner = list(zip(split.ids, split.offsets, strict=True))
            found += [(index, (origin[start + a], origin[start + b - 1] + 1)) for index, (a, b) in inner]
            start += len(word)
        return found


def read(file: str | Path, *, lower_case: bool | None = None, segment: Segment | None = None) -> AnyTokenizer:
    """The tokenizer of a tokenizer.json, or of a vocab.txt, whatever its name.

    lower_case: where None, of a vocab.txt, what tokenizer_config.json beside it says.
    Raises: OSError for a file that cannot be read; as `parsed` and `told_lower_case`.
    """
    path = Path(file)
    beside = path.with_name(CONFIG)
    if lower_case is None and path.suffix != ".json" and beside.is_file():
        lower_case = told_lower_case(bounded(beside), str(beside))
    return parsed(bounded(path), str(path), lower_case=lower_case, segment=segment)


def parsed(data: bytes, where: str, *, lower_case: bool | None = None, segment: Segment | None = None) -> AnyTokenizer:
    """The tokenizer of the bytes of a file, which is a tokenizer.json where its name ends so, else a vocab.txt.

    lower_case: where None, texts of a vocab.txt are in lower case.
    Raises: DomainError for what is no such file, for lower_case and segment with a tokenizer.json, which tells itself;
        as Tokenizer.
    """
    if not where.endswith(".json"):
        made = parsed_vocab(data, where)
        try:
            return Tokenizer(made, lower_case=lower_case is not False, segment=segment)
        except check.DomainError as error:
            raise check.DomainError(f"{error}; of {where}") from None
    told = lower_case is None and segment is None
    check.domain("tokenizer", told, f"no lower_case and no segment, which {where} tells itself", lower_case=lower_case)
    library = _library()
    try:
        words = library.Tokenizer.from_buffer(data)
    # What the library raises has no class of its own.
    except Exception as error:
        raise check.DomainError(f"tokenizer: {where} is no tokenizer.json ({error})") from None
    words.no_padding()
    words.no_truncation()
    try:
        return AnyTokenizer(words, words.get_vocab(with_added_tokens=True))
    except check.DomainError as error:
        raise check.DomainError(f"{error}; of {where}") from None


def told_lower_case(data: bytes, where: str) -> bool | None:
    """What a tokenizer_config.json says of lower case; None where it is silent.

    Raises: DomainError for what is no JSON object, and for do_lower_case that is no boolean.
    """
    held = config.parsed(data, where)
    check.domain("tokenizer", isinstance(held, dict), f"a JSON object in {where}", received=held)
    told = held.get("do_lower_case")
    check.domain("tokenizer", told is None or isinstance(told, bool), f"a boolean in {where}", do_lower_case=told)
    return told


def read_vocab(file: str | Path) -> tuple[str, ...]:
    """The tokens of a vocab.txt, one a line, whose numbers from 0 are the ids.

    Raises: DomainError for a file that is no text in UTF-8, is too large, or has an empty line.
    """
    return parsed_vocab(bounded(Path(file)), str(file))


def parsed_vocab(data: bytes, where: str) -> tuple[str, ...]:
    """`read_vocab` of the bytes of a file."""
    try:
        lines = data.decode().removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise check.DomainError(f"tokenizer.read_vocab: {where} is no text in UTF-8 (byte {error.start})") from None
    # No more than blanks: the line separator U+2028 is a token of BERT's Chinese vocabulary.
    tokens = tuple(line.strip(" \t") for line in lines)
    empty = [number for number, token in enumerate(tokens, 1) if not token]
    check.domain("tokenizer.read_vocab", not empty, f"a token in every line of {where}", empty_lines=empty[:3])
    return tokens


def bounded(path: Path) -> bytes:
    """The bytes of a file of a tokenizer.

    Raises: DomainError for one that is too large; OSError for one that cannot be read.
    """
    largest = LARGEST_JSON if path.suffix == ".json" else LARGEST_VOCAB
    size = path.stat().st_size
    check.domain("tokenizer", size <= largest, f"{path} of at most {largest} bytes", bytes=size)
    return path.read_bytes()


def simplified(vocab: Sequence[str], *, first: Sequence[str] = SPECIAL[:4]) -> Simplified:
    """The vocabulary without what a Chinese model hardly meets; `first` come first, in this order.

    Left out are the special tokens that `first` does not name, and tokens of several characters (## not counted) that
    hold a character of CJK or a mark.

    Raises: DomainError for a token of `first` that the vocabulary lacks.
    Source: bert4keras (load_vocab), whose base and small models were cut down to 13,584 tokens by it.
    """
    ids = {token: index for index, token in enumerate(vocab)}
    absent = [token for token in first if token not in ids]
    check.domain("tokenizer.simplified", not absent, f"a vocabulary with {', '.join(absent)}", tokens=len(vocab))
    kept = [token for token in vocab if token not in first and not _dropped(token)]
    tokens = (*first, *kept)
    return Simplified(tokens, tuple(ids[token] for token in tokens))


def greedy(words: Sequence[str]) -> Segment:
    """A `segment` that takes the longest of the words that begins where it stands, else one character.

    For vocabularies of words where no segmenter is at hand; the originals cut with jieba.
    """
    known, longest = frozenset(words), max(map(len, words), default=1)

    def segment(text: str) -> list[str]:
        found, start = [], 0
        while start < len(text):
            ends = range(min(start + longest, len(text)), start + 1, -1)
            end = next((end for end in ends if text[start:end] in known), start + 1)
            found.append(text[start:end])
            start = end
        return found

    return segment


def _library() -> Any:
    """Loaded here, so that refimpl needs it only where there is text."""
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        told = "tokenizer: texts need the Python package tokenizers, which is not installed: pip install tokenizers"
        raise ModuleNotFoundError(told, name=error.name) from None
    return tokenizers


def _kept(lengths: Sequence[int], most: int) -> list[int]:
    """What is left of one part or two where the longer loses a token, the first of equals, until they have `most`."""
    if sum(lengths) <= most:
        return list(lengths)
    if len(lengths) == 1:
        return [most]
    # Tokens of the longer go until the two are equal; from there on in turns, the first part's before.
    first, second = lengths
    short = min(lengths)
    if most < 2 * short:
        return [most // 2, most - most // 2]
    return [most - short, second] if first > second else [first, most - short]


def _check_text(text: Any) -> str:
    check.domain("tokenizer", isinstance(text, str), "a text", received=text)
    return str(text)


def _dropped(token: str) -> bool:
    if token in SPECIAL:
        return True
    inner = token.removeprefix("##")
    return len(inner) > 1 and any(_is_cjk(character) or _is_mark(character) for character in inner)


def _closed(text: str) -> str:
    """Without the space behind opening marks and marks of CJK."""
    kept = []
    for index, character in enumerate(text):
        before = text[index - 1] if index else ""
        if character == " " and before and (before in _OPENING or (_is_mark(before) and ord(before) > 0xFF)):
            continue
        kept.append(character)
    return "".join(kept)


def _is_cjk(character: str) -> bool:
    return any(low <= ord(character) <= high for low, high in _CJK)


def _is_mark(character: str) -> bool:
    code = ord(character)
    ascii_mark = 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126
    return ascii_mark or unicodedata.category(character).startswith("P")
