"""Cutting text: what is recognised, and that nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixcache.doctor.pieces import Pieces, cut

LETTERS = "abzAZ019 \n\t\r.,:;-_/\\@#'\"{}[]()|+=TZ\u00e4\u4e2d\u20ac\u0301"


def kinds(text: str) -> list[tuple[str, str]]:
    return [(kind, piece) for kind, piece in cut(text) if kind != "space"]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("datetime", "2024-11-22T10:15:03.123456+00:00"),
        ("datetime", "2024-11-22 10:15:03,123"),
        ("datetime", "2024-11-22 10:15 UTC"),
        ("datetime", "Fri Nov 22 10:15:03 2024"),
        ("datetime", "Fri Nov  2 10:15:03 UTC 2024"),
        ("datetime", "Fri, 22 Nov 2024 10:15:03 GMT"),
        ("datetime", "Friday, November 22, 2024 at 10:15 AM"),
        ("datetime", "11/22/2024, 10:15:03 PM"),
        ("datetime", "10:15 on 2024-11-22"),
        ("datetime", "20241122T101503Z"),
        ("date", "2024-11-22"),
        ("date", "22.11.2024"),
        ("date", "November 22, 2024"),
        ("date", "the 22nd of November 2024"),
        ("date", "Nov 2024"),
        ("date", "3. M\u00e4rz 2024"),
        ("time", "10:15:03.5"),
        ("time", "3 pm"),
        ("time", "10:15 a.m."),
        ("weekday", "Wednesday"),
        ("timestamp", "1732270503"),
        ("timestamp", "1732270503123"),
        ("uuid", "550e8400-e29b-41d4-a716-446655440000"),
        ("id", "req_7f9c2ba4e88f"),
        ("id", "chatcmpl-AbC123xyz789"),
        ("id", "ORD-2024-8812"),
        ("id", "01ARZ3NDEKTSV4RRFFQ69G5FAV"),
        ("id", "eyJhbGciOiJIUzI1NiJ9"),
        ("hex", "7f9c2ba4e88f827d616045507605853e"),
        ("hex", "0x7f3a2b1c"),
        ("email", "anna.smith+bikes@mail.example.org"),
        ("ip", "10.0.0.1:8080"),
        ("ip", "2001:db8::1"),
        ("url", "https://harbour.example/rent?session=9f1c&lang=en"),
        ("number", "1,234.50"),
        ("word", "it's"),
        ("word", "May"),
        ("name", "get_user"),
    ],
)
def test_what_is_recognised(kind: str, text: str) -> None:
    """Each kind, in the middle of a sentence and at its end."""
    expected = text.removeprefix("the ")
    assert (kind, expected) in kinds(f"so {text} and")
    assert (kind, expected) in kinds(f"({text})")
    assert (kind, expected) in kinds(f"{text}\nnext")


@pytest.mark.parametrize("text", ["deadbeef and facade", "well-known-thing", "claude", "Mayor Mondale", "a/b", "1st"])
def test_words_are_no_ids(text: str) -> None:
    """Only what has a digit in it can be one."""
    assert not {kind for kind, _ in kinds(text)} & {"id", "hex", "date", "weekday", "number"}


def test_how_a_text_is_built_is_said_by_kinds() -> None:
    """Brackets, quotes and separators are kinds of their own; quotes in strings are not quotes."""
    assert [kind for kind, _ in kinds('{"a": "b\\"c"}')] == [
        "{",
        '"',
        "word",
        '"',
        ":",
        '"',
        "word",
        "escape",
        "word",
    ] + [
        '"',
        "}",
    ]


@given(st.text(alphabet=LETTERS, max_size=200) | st.text(max_size=100))
def test_pieces_joined_are_the_text(text: str) -> None:
    """Cut as a whole or line by line, nothing is lost, and no piece goes beyond its line."""
    assert "".join(piece for _, piece in cut(text)) == text
    pieces = Pieces().of_text(text)
    assert "".join(piece.text or "" for piece in pieces) == text
    assert all("\n" not in (piece.text or "") or piece.text == "\n" for piece in pieces)


@given(st.text(alphabet=LETTERS, max_size=60))
def test_equal_pieces_are_the_same_object(text: str) -> None:
    """So they are compared by identity; a shape that is known twice, too."""
    pieces = Pieces()
    assert all(one is other for one, other in zip(pieces.of_text(text), pieces.of_text(text), strict=True))
    shape = [(piece.hash, piece.kind, piece.length) for piece in pieces.of_text(text)]
    assert all(one is other for one, other in zip(pieces.of_shape(shape), pieces.of_shape(shape), strict=True))


def test_long_lines_are_cut_like_short_ones() -> None:
    """JSON on one line and prose without line breaks have the pieces that they have in parts."""
    parts = ['{"name": "search", "at": "2024-11-22"}, ', "Ask first whether somebody is hurt. "] * 20
    pieces = Pieces()
    joined = pieces.of_text("".join(parts))
    assert joined == [piece for part in parts for piece in pieces.of_text(part)]
