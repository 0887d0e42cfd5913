"""Writes prompts as they would be with some of the advice followed.

What varies is taken from its place, where a name in brackets stays, and is said at the
end: of a text, or of the last user message, which every chat template accepts and
behind which nothing stable comes. A text that ends with a line such as "Answer:" keeps
that at its end.

    Now: 2024-11-22 10:15          Now: [date and time]
    You answer guests. ...    ->   You answer guests. ...
    Question: Is there tea?        Question: Is there tea?

                                   [date and time]: 2024-11-22 10:15
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field

from prefixcache.doctor.orders import Collection, Range, arrange, parts
from prefixcache.doctor.pieces import FIELD, TOKEN, Piece, Pieces
from prefixcache.doctor.spots import Edit

_USER = FIELD + "user"
_TEXT = FIELD + "text"
_LONGEST_CUE = 6


@dataclass(slots=True)
class Plan:
    """What to change in one prompt, by the number of the advice that says so.

    `end` is where what is moved goes, once that has been looked for.
    """

    moves: list[tuple[int, Edit]] = field(default_factory=list)
    spaces: list[tuple[int, Edit]] = field(default_factory=list)
    collections: list[tuple[int, Collection]] = field(default_factory=list)
    end: int | None = None


class Rewriter:
    """Writes prompts anew. `names` are what moved pieces are called, by the number of the advice."""

    def __init__(self, pieces: Pieces, names: dict[int, str], fixed: dict[int, Range]) -> None:
        self._fixed = fixed
        self._placeholders = {number: tuple(pieces.of_text(f"[{name}]")) for number, name in names.items()}
        self._labels = {number: pieces.of_text(f"\n[{name}]: ") for number, name in names.items()}
        self._line_end = pieces.of_text("\n")[0]

    def rewrite(self, pieces: Sequence[Piece], plan: Plan, advice: Container[int]) -> Sequence[Piece]:
        """Return a prompt's pieces with the given advice followed."""
        collections = [collection for number, collection in plan.collections if number in advice]
        edits = [edit for number, edit in plan.spaces if number in advice]
        moves = [(number, edit) for number, edit in plan.moves if number in advice]
        if not edits and not moves and not collections:
            return pieces
        notes: list[Piece] = []
        done = 0
        if moves and plan.end is None:
            plan.end = _end(pieces)
        end = plan.end or 0
        for number, edit in sorted(moves, key=lambda move: _outer_first(move[1])):
            if edit.start >= done:
                done = edit.end
                end = len(pieces) if edit.start < end < edit.end else end  # the last line is moved as well
                notes += self._labels[number]
                notes += pieces[edit.start : edit.end]
                instead = () if pieces[0].kind == TOKEN else self._placeholders[number]
                edits.append(edit._replace(instead=instead))
        if notes:
            edits.append(Edit(end, end, self._note(pieces, notes, end)))
        order = arrange(pieces, collections, self._fixed) if collections else range(len(pieces))
        return _edited(pieces, order, edits)

    def _note(self, pieces: Sequence[Piece], notes: list[Piece], end: int) -> tuple[Piece, ...]:
        """Return what is put at the end: in front of a last line, or behind an empty one."""
        if pieces[0].kind == TOKEN:
            return tuple(piece for piece in notes if piece.kind == TOKEN)
        if end < len(pieces) and not pieces[end].is_field:
            return (*notes[1:], self._line_end, self._line_end)
        return (self._line_end, *notes)


def _outer_first(edit: Edit) -> tuple[int, bool, int]:
    return edit.start, edit.start < edit.end, -edit.end


def _edited(pieces: Sequence[Piece], order: Sequence[int], edits: Iterable[Edit]) -> list[Piece]:
    """Return the pieces in this order, edited. Of an edit within another nothing remains."""
    apart: list[Edit] = []
    for edit in sorted(edits, key=_outer_first):
        if not apart or edit.start >= apart[-1].end:
            apart.append(edit)
    changed: list[Piece] = []
    if isinstance(order, range):
        done = 0
        for edit in apart:
            changed += pieces[done : edit.start]
            changed += edit.instead
            done = edit.end
        return changed + list(pieces[done:])
    gone = {position for edit in apart for position in range(edit.start, edit.end)}
    instead: dict[int, list[Piece]] = {}
    for edit in apart:
        instead.setdefault(edit.start, []).extend(edit.instead)
    for position in order:
        changed += instead.get(position, ())
        if position not in gone:
            changed.append(pieces[position])
    return changed + instead.get(len(pieces), [])


def _end(pieces: Sequence[Piece]) -> int:
    """Return where to say at the end of a prompt what was moved."""
    if pieces[0].kind == _TEXT:
        return _cue(pieces) or len(pieces)
    users = [end for start, end in parts(pieces) if start and pieces[start - 1].kind == _USER]
    return users[-1] if users else len(pieces)


def _cue(pieces: Sequence[Piece]) -> int:
    """Return where the last line begins if it asks for an answer, as in "Answer:"; else 0."""
    end = len(pieces)
    while end and pieces[end - 1].blank:
        end -= 1
    start = end
    while start and pieces[start - 1].kind != "newline":
        start -= 1
    words = sum(1 for piece in pieces[start:end] if not piece.blank)
    return start if words and words <= _LONGEST_CUE and pieces[end - 1].kind == ":" else 0
