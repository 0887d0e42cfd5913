"""Cuts text into pieces: words, numbers, spaces, punctuation, and what tends to change from prompt to prompt.

The pieces of a text, joined, are the text. No piece goes beyond its line and cutting
never looks beyond it, so equal lines have equal pieces wherever they stand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from xxhash import xxh3_64_intdigest

from prefixcache.tokens import TOKEN_BYTES, pack

VOLATILE = {
    "datetime": "date and time",
    "date": "date",
    "time": "clock time",
    "weekday": "weekday",
    "timestamp": "Unix timestamp",
    "uuid": "UUID",
    "id": "id",
    "hex": "hexadecimal id",
    "email": "e-mail address",
    "ip": "IP address",
    "url": "URL",
    "number": "number",
}
"""Kinds of pieces that tend to differ where prompts are otherwise alike, and what to call them."""

BLANK = frozenset({"space", "newline", "whitespace"})
QUOTES = frozenset({'"', "'"})
OPENING = {"{": "}", "[": "]", "(": ")"}
CLOSING = frozenset(OPENING.values())
STRUCTURE = frozenset({*OPENING, *CLOSING, *QUOTES, ",", ":", ";", "stop", "newline", "conjunction"})
"""Kinds of pieces that say how a text is built."""

FIELD = "field "
"""A piece of a kind that begins so stands in front of a part of a prompt and has no text: `field user`."""
TOKEN = "token"
"""A token id of a prompt that is token ids."""

FIELD_TOKENS = 4
CHARACTERS_PER_TOKEN = 4
"""What text has on average with the tokenizers of today; only ratios depend on it."""

_MONTH = (
    r"(?:Jan(?:uary?)?|Feb(?:ruary?)?|Mar(?:ch)?|M\u00e4rz|Apr(?:il)?|Ma[yi]|Jun[ei]?|Jul[yi]?|Aug(?:ust)?"
    r"|Sept?(?:ember)?|O[ck]t(?:ober)?|Nov(?:ember)?|De[cz](?:ember)?)\.?"
)
_DAY = r"(?:Mon|Tue(?:s)?|Wed(?:nes)?|Thu(?:rs)?|Fri|Sat(?:ur)?|Sun)(?:day)?"
_ZONE = r"(?:\ ?(?:Z|UTC|GMT|CES?T|[ECMP][SD]T|BST|IST|JST)(?:[+-]\d{1,2})?\b|\ ?[+-]\d{2}:?\d{2}\b)"
_NOON = r"(?:[AaPp][Mm]\b|[ap]\.m\.)"
_CLOCK = rf"(?:\d{{1,2}}:\d{{2}}(?::\d{{2}}(?:[.,]\d{{1,9}})?)?(?:\ ?{_NOON})?{_ZONE}?|\d{{1,2}}\ ?{_NOON})"
_NUMERIC_DATE = r"(?:\d{4}-\d{1,2}-\d{1,2}|\d{4}/\d{1,2}/\d{1,2}|\d{1,2}/\d{1,2}/\d{2,4}|\d{1,2}\.\d{1,2}\.\d{2,4})"
_SPOKEN_DATE = (
    rf"(?:{_MONTH}\ \d{{1,2}}(?:st|nd|rd|th)?(?!\d)(?:,?\ \d{{4}})?"
    rf"|\d{{1,2}}(?:st|nd|rd|th|\.)?(?:\ of)?[\ -]{_MONTH}(?:,?[\ -]\d{{4}})?(?![^\W\d])"
    rf"|{_MONTH}\ \d{{4}})"
)
_DATE = rf"(?:(?:{_DAY}\.?,?\ (?:the\ )?)?(?:{_NUMERIC_DATE}|{_SPOKEN_DATE})(?!\d))"

# What stands further up is taken. Each matches at least one character, and the last one
# any, so the pieces of a text are the whole of it. Most pieces are spaces and plain
# words, so these come first.
_PATTERNS = (
    ("space", r"\ (?![^\S\n])"),
    ("word", rf"(?!{_DAY}\b|{_MONTH})[A-Za-z]+(?=[\ \n,;)])(?<!\band)(?<!\bor)"),
    ("newline", r"\n"),
    ("whitespace", r"[^\S\n]+"),
    ("datetime", rf"{_DAY}\ {_MONTH}\ +\d{{1,2}}\ {_CLOCK}\ \d{{4}}(?!\w)|\d{{8}}T\d{{6}}(?:\.\d+)?Z?(?!\w)"),
    ("datetime", rf"{_DATE}(?:[T_]|,?\ (?:at\ |-\ )?){_CLOCK}(?!\w)"),
    ("datetime", rf"{_CLOCK},?\ (?:on\ )?{_DATE}(?!\w)"),
    ("date", rf"{_DATE}(?!\w)"),
    ("time", rf"{_CLOCK}(?!\w)"),
    ("weekday", r"(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day\b"),
    ("uuid", r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}(?!\w)"),
    ("url", r"(?:https?|wss?|ftp|s3|gs)://[^\s\"'<>()\[\]{}|\\^`]*[\w/=&%\#-]"),
    ("email", r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+"),
    ("ip", r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}(?::\d{1,5})?(?!\w|\.\d)"),
    ("ip", r"(?:(?:[0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}|(?:[0-9a-fA-F]{1,4}:){2,6}(?::[0-9a-fA-F]{1,4}){1,5})(?!\w)"),
    ("timestamp", r"1(?:\d{9}(?:\.\d{1,9})?|\d{12}|\d{15}|\d{18})(?!\w)"),
    ("hex", r"0x[0-9a-fA-F]{4,}(?!\w)|(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{7,}(?!\w)"),
    ("hex", r"(?=[A-F]*\d)(?=\d*[A-F])[0-9A-F]{7,}(?!\w)"),
    # A prefix and an ending with a digit; a prefix in capitals and numbers; a mixture of cases and digits; a ULID.
    # Nothing looks further ahead than so many characters, or long texts would take for ever.
    ("id", r"[A-Za-z]{2,12}[_-](?=[A-Za-z]{0,64}\d)[0-9A-Za-z]{6,128}(?:[_-][0-9A-Za-z]{1,128}){0,8}(?!\w)"),
    ("id", r"[A-Z]{2,8}-\d[\d-]{0,32}\d(?!\w)"),
    ("id", r"(?=[a-zA-Z_-]{0,64}\d)(?=[A-Z\d_-]{0,64}[a-z])(?=[a-z\d_-]{0,64}[A-Z])[A-Za-z0-9_-]{16,2048}={0,2}(?!\w)"),
    ("id", r"(?=[A-Z]{0,26}\d)[0-9A-HJKMNP-TV-Z]{26}(?!\w)"),
    ("number", r"\d+(?:[.,]\d+)*(?!\w)"),
    ("conjunction", r"(?:and|or)\b"),
    ("letter", r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"),
    ("word", r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*(?!\w)"),
    ("name", r"\w+"),
    ("escape", r"\\[\"'\\/bfnrtu]"),
    ("stop", r"[.!?]"),
    ("", r"[{}\[\]()<>:,;|\"']"),  # these are their own kind: they say how a text is built
    ("punctuation", r"(?P<mark>[^\w\s])(?P=mark)*"),
    ("other", r"(?s:.)"),
)  # fmt: skip
_PIECE = re.compile("|".join(f"({pattern})" for _, pattern in _PATTERNS), re.VERBOSE)

_KINDS: list[str] = [""]
for _kind, _pattern in _PATTERNS:
    _KINDS += [_kind] * (1 + re.compile(_pattern, re.VERBOSE).groups)

# A line without end, such as JSON on one line, is cut where it is likely to be alike
# again behind what varies.
_LONG = 240
_CHUNK = re.compile(r".*?(?:[a-z]{3}[.!?;]\ (?=[A-Z])|\}(?:,\ ?)?|$)", re.VERBOSE | re.DOTALL)


def cut(text: str) -> Iterator[tuple[str, str]]:
    """Yield (kind, text) of the pieces of a text; costs time in proportion to its length."""
    for match in _PIECE.finditer(text):
        index = match.lastindex
        assert index is not None
        found = match[0]
        yield _KINDS[index] or found, found


class Piece:
    """A piece; the same one wherever it occurs, so that pieces are compared by identity.

    `key` is equal for pieces that may stand in for each other: equal ones, and volatile
    ones of a kind. A piece that `is_field` names the part behind it. `tokens` are packed
    ids that stand for its tokens, and `order` is what it is sorted by. `text` is None if
    only the shape is known.
    """

    __slots__ = (
        "blank", "hash", "is_field", "key", "kind", "length", "order", "structural", "text", "tokens", "volatile",
    )  # fmt: skip

    def __init__(self, kind: str, hash: int, length: int, text: str | None, tokens: bytes) -> None:
        self.kind = kind
        self.hash = hash
        self.length = length
        self.text = text
        self.tokens = tokens
        self.blank = kind in BLANK
        self.volatile = kind in VOLATILE
        self.structural = kind in STRUCTURE
        self.is_field = kind.startswith(FIELD)
        self.key = xxh3_64_intdigest(kind.encode()) if self.volatile else hash
        self.order = kind if self.volatile else f"{hash:016x}" if text is None else text


class Pieces:
    """All pieces of some prompts, each once."""

    def __init__(self) -> None:
        self._texts: dict[tuple[str, str], Piece] = {}
        self._shapes: dict[tuple[int, str, int], Piece] = {}
        self._lines: dict[str, tuple[Piece, ...]] = {}

    def of_text(self, text: str) -> list[Piece]:
        """Return the pieces of a text; lines that occurred before cost next to nothing."""
        pieces: list[Piece] = []
        for line in text.split("\n"):
            pieces += self._line(line)
            pieces.append(self._piece("newline", "\n"))
        pieces.pop()
        return pieces

    def of_shape(self, shape: Sequence[tuple[int, str, int]]) -> list[Piece]:
        """Return the pieces whose (hash, kind, length in characters) are known."""
        return [self._shape(*entry) for entry in shape]

    def of_tokens(self, ids: Sequence[int]) -> list[Piece]:
        """Return token ids as pieces."""
        return [self._token(token) for token in ids]

    def field(self, name: str) -> Piece:
        """Return the piece that stands in front of a part of a prompt."""
        return self._shape(xxh3_64_intdigest(name.encode()), FIELD + name, 0)

    def _line(self, line: str) -> Sequence[Piece]:
        known = self._lines.get(line)
        if known is not None:
            return known
        if len(line) <= _LONG:
            pieces = tuple(self._piece(kind, text) for kind, text in cut(line))
        else:
            pieces = tuple(piece for chunk in _CHUNK.findall(line) for piece in self._chunk(chunk))
        self._lines[line] = pieces
        return pieces

    def _chunk(self, chunk: str) -> Sequence[Piece]:
        known = self._lines.get(chunk)
        if known is None:
            known = self._lines[chunk] = tuple(self._piece(kind, text) for kind, text in cut(chunk))
        return known

    def _piece(self, kind: str, text: str) -> Piece:
        piece = self._texts.get((kind, text))
        if piece is None:
            hash = xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))
            piece = self._texts[kind, text] = Piece(kind, hash, len(text), text, _token_ids(hash, len(text)))
        return piece

    def _shape(self, hash: int, kind: str, length: int) -> Piece:
        piece = self._shapes.get((hash, kind, length))
        if piece is None:
            text = "" if kind.startswith(FIELD) else None
            tokens = _token_ids(hash, FIELD_TOKENS * CHARACTERS_PER_TOKEN if text == "" else length)
            piece = self._shapes[hash, kind, length] = Piece(kind, hash, length, text, tokens)
        return piece

    def _token(self, token: int) -> Piece:
        piece = self._shapes.get((token, TOKEN, 0))
        if piece is None:
            piece = Piece(TOKEN, token, 0, None, pack([token]))
            self._shapes[token, TOKEN, 0] = piece
        return piece


def _token_ids(hash: int, length: int) -> bytes:
    """Return packed ids that stand for the tokens of a piece: one per four characters, at least one.

    A tokenizer joins short pieces, a space and a word mostly, so there are too many of
    them; but none is without one, so that any difference between prompts shows.
    """
    count = max(1, round(length / CHARACTERS_PER_TOKEN))
    return b"".join(((hash + index) & 0xFFFF_FFFF).to_bytes(TOKEN_BYTES, "little") for index in range(count))
