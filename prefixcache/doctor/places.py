"""Where in a prompt something is, and what stands there, for people."""

from __future__ import annotations

from collections.abc import Sequence

from prefixcache.doctor.orders import Range, parts
from prefixcache.doctor.pieces import FIELD, TOKEN, Piece
from prefixcache.doctor.report import Example

_CONTEXT = 28
_LONGEST_VALUE = 60
_ROLES = {"system", "developer", "user", "assistant", "other"}


def part_of(pieces: Sequence[Piece], position: int) -> str:
    """Return the part that a position is in, such as "system message" or "tool 2"; "" of a prompt that is one text."""
    fields = [place for place, piece in enumerate(pieces) if piece.is_field]
    before = [place for place in fields if place <= position]
    if not before:
        return ""
    name = pieces[before[-1]].kind.removeprefix(FIELD)
    same = [place for place in fields if pieces[place].kind == FIELD + name]
    number = f" {same.index(before[-1]) + 1}" if len(same) > 1 else ""
    match name:
        case "text":
            return ""
        case "tool":
            return f"tool{number or ' 1'}"
        case "calls":
            return f"tool call{number}"
        case _ if name in _ROLES:
            return f"{name} message{number}"
        case _:
            return f"{name.replace('_', ' ')}{number}"


def line_and_column(pieces: Sequence[Piece], position: int) -> tuple[int, int]:
    """Return the line and the column, both from 1, of a position in its part."""
    line, column = 1, 1
    for piece in pieces[:position]:
        if piece.is_field:
            line, column = 1, 1
        elif piece.kind == "newline":
            line, column = line + 1, 1
        else:
            column += piece.length
    return line, column


def example(pieces: Sequence[Piece], value: Range) -> Example | None:
    """Return a range of a prompt's pieces and what is around it on its line; None if only shapes are known."""
    start, end = value
    if any(piece.text is None for piece in pieces[start:end]):
        return _of_tokens(pieces[start:end]) if pieces[start].kind == TOKEN else None
    low, high = next((low, high) for low, high in reversed(parts(pieces)) if low <= start)
    before = "".join([piece.text or "" for piece in pieces[low:start]])
    after = "".join([piece.text or "" for piece in pieces[end : min(high, end + _CONTEXT)]])
    text = "".join([piece.text or "" for piece in pieces[start:end]])
    return Example(
        _writable(_cut_front(before.rpartition("\n")[2], _CONTEXT)),
        _writable(_cut_back(text, _LONGEST_VALUE)),
        _writable(_cut_back(after.partition("\n")[0], _CONTEXT)),
    )


def _of_tokens(pieces: Sequence[Piece]) -> Example:
    ids = " ".join(str(piece.hash) for piece in pieces)
    return Example("", _cut_back(ids, _LONGEST_VALUE), "")


def _writable(text: str) -> str:
    """Return text without the half characters that JSON can have."""
    return text.encode("utf-8", "replace").decode()


def _cut_front(text: str, length: int) -> str:
    return text if len(text) <= length else "..." + text[-length:]


def _cut_back(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + "..."
