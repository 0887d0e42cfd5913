"""Finds the same things in another order: keys of JSON objects, items of lists, tools, lines, sections.

A collection is known by what is in it, whatever the order. If prompts have the same
collection in different orders, it is sorted; no prompt has to be compared with another.
Volatile pieces in items count as equal, so that items with a date in them are found
again. One pass over the pieces of a prompt finds all its collections; they are nested
or apart, never crossing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from prefixcache.doctor.pieces import CLOSING, FIELD, OPENING, QUOTES, Piece

KEYS = "keys"
ITEMS = "items"
TOOLS = "tools"
LINES = "lines"
SECTIONS = "sections"

_BEFORE_VALUE = frozenset({"{", "[", "(", ",", ":"})
_TOOL = FIELD + "tool"
_LEAST_LINES = 3
_LEAST_ENUMERATED = 3
_LONGEST_ELEMENT = 200
"""In lines."""

Range = tuple[int, int]


@dataclass(slots=True)
class Collection:
    """Items of a prompt, as ranges of its pieces, whose order may not matter.

    `identity` is the same for the same items in any order, `order` says in which they are.
    """

    kind: str
    items: list[Range]
    identity: int
    order: tuple[int, ...]

    @property
    def start(self) -> int:
        return self.items[0][0]

    @property
    def end(self) -> int:
        return self.items[-1][1]


class Orders:
    """The orders in which the prompts have had each collection."""

    def __init__(self) -> None:
        self._seen: dict[int, set[tuple[int, ...]]] = {}

    def add(self, collections: Iterable[Collection]) -> None:
        for collection in collections:
            self._seen.setdefault(collection.identity, set()).add(collection.order)

    def varying(self) -> dict[int, Range]:
        """Return the collections that occur in several orders: how many items at either end are always the same."""
        return {identity: _fixed_ends(orders) for identity, orders in self._seen.items() if len(orders) > 1}


def arrange(pieces: Sequence[Piece], collections: Sequence[Collection], fixed: dict[int, Range]) -> list[int]:
    """Return the positions of the pieces with these collections sorted, but for the items at their fixed ends.

    What separates items stays where it is, so the first item is followed by what
    followed the first item before.
    """
    outside_in = sorted(collections, key=lambda collection: (collection.start, -collection.end))
    return _arrange(pieces, 0, len(pieces), outside_in, fixed)


def _arrange(
    pieces: Sequence[Piece], start: int, end: int, collections: Sequence[Collection], fixed: dict[int, Range]
) -> list[int]:
    positions: list[int] = []
    index = 0
    while index < len(collections):
        outer = collections[index]
        index += 1
        inner: list[Collection] = []
        while index < len(collections) and collections[index].start < outer.end:
            inner.append(collections[index])
            index += 1
        positions += range(start, outer.start)
        arranged = [
            _arrange(pieces, low, high, [part for part in inner if low <= part.start and part.end <= high], fixed)
            for low, high in outer.items
        ]
        first, last = fixed.get(outer.identity, (0, 0)) if outer.kind != KEYS else (0, 0)
        middle = slice(first, len(arranged) - last)
        arranged[middle] = sorted(arranged[middle], key=lambda item: _sort_key(pieces, item))
        for number, item in enumerate(arranged):
            positions += item
            if number + 1 < len(arranged):
                positions += range(outer.items[number][1], outer.items[number + 1][0])
        start = outer.end
    positions += range(start, end)
    return positions


def parts(pieces: Sequence[Piece]) -> list[Range]:
    """Return the ranges of a prompt's parts, without the pieces that name their fields."""
    fields = [position for position, piece in enumerate(pieces) if piece.is_field]
    if not fields:
        return [(0, len(pieces))]
    return [(start + 1, end) for start, end in zip(fields, [*fields[1:], len(pieces)], strict=True)]


def _sort_key(pieces: Sequence[Piece], positions: Iterable[int]) -> tuple[list[str], list[str]]:
    """Sort by what does not vary, and what is equal then by everything."""
    item = [piece for piece in (pieces[position] for position in positions) if not piece.blank]
    return [piece.order for piece in item], [piece.text or piece.order for piece in item]


def _fixed_ends(orders: set[tuple[int, ...]]) -> Range:
    some = next(iter(orders))
    ends = []
    for step in (1, -1):
        count = 0
        for column in zip(*(order[::step] for order in orders), strict=True):
            if len(set(column)) > 1:
                break
            count += 1
        ends.append(count)
    assert sum(ends) < len(some)
    return ends[0], ends[1]


# Finding collections


@dataclass(slots=True)
class _Open:
    """A bracket that has not been closed yet: where its items begin and what has been found in it."""

    kind: str
    position: int
    starts: list[int]
    colons: dict[int, int] = field(default_factory=dict)
    inner: list[tuple[int, int, int]] = field(default_factory=list)


def find_collections(pieces: Sequence[Piece]) -> list[Collection]:
    """Return the collections in a prompt. Costs time in proportion to its length."""
    return _Search(pieces).run()


class _Search:
    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        self._keys = [0 if piece.blank else piece.key for piece in pieces]
        self._found: list[Collection] = []
        self._open: list[_Open] = []
        self._quote = ""
        # What is outside of brackets: the clause, the lines of the block, the blocks of the part.
        self._clause = 0
        self._separators: list[Range] = []
        self._line = 0
        self._lines: list[Range] = []
        self._blocks: list[Range] = []
        self._all_lines: list[Range] = []

    def run(self) -> list[Collection]:
        tools: list[Range] = []
        for start, end in parts(self._pieces):
            self._clause = self._line = start
            for position in [place for place, piece in enumerate(self._pieces[start:end], start) if piece.structural]:
                self._take(position, self._pieces[position].kind)
            self._end_part(end)
            if start and self._pieces[start - 1].kind == _TOOL:
                tools.append((start, end))
        if len(tools) > 1:
            self._add(TOOLS, tools, [self._tool_hash(*tool) for tool in tools])
        return self._found

    def _take(self, position: int, kind: str) -> None:
        if kind == "newline":
            self._quote = ""
            if self._open and not self._blank(self._line_start(position), position):
                return
            self._open.clear()  # no bracket is meant to go beyond an empty line
            self._end_line(position)
        elif self._quote:
            if kind == self._quote:
                self._quote = ""
        elif kind in OPENING:
            self._open.append(_Open(kind, position, [position + 1]))
        elif kind in CLOSING:
            self._close(position, kind)
        elif self._open:
            self._inside(position, kind)
        elif kind in {",", "conjunction"}:
            self._separate(position)
        elif kind in {"stop", ":", ";"}:
            self._end_clause(position)

    def _inside(self, position: int, kind: str) -> None:
        top = self._open[-1]
        if kind in QUOTES:
            before = position - 1
            while before >= 0 and self._pieces[before].blank:
                before -= 1
            if self._pieces[before].kind in _BEFORE_VALUE:
                self._quote = kind
        elif kind == ",":
            top.starts.append(position + 1)
        elif kind == ":":
            top.colons.setdefault(len(top.starts), position)

    def _close(self, position: int, kind: str) -> None:
        if not self._open or OPENING[self._open[-1].kind] != kind:
            self._open.clear()
            return
        top = self._open.pop()
        ends = [start - 1 for start in top.starts[1:]] + [position]
        items = [self._trim(start, end) for start, end in zip(top.starts, ends, strict=True)]
        numbered = [(number, item) for number, item in enumerate(items, start=1) if item[0] < item[1]]
        first = ord(top.kind)
        if top.kind == "{" and numbered and all(number in top.colons for number, _ in numbered):
            names, values = [], []
            for number, (start, end) in numbered:
                colon = top.colons[number]
                names.append(self._hash(start, colon, top.inner))
                values.append(self._hash(colon + 1, end, top.inner))
            whole = hash((first, *sorted(zip(names, values, strict=True))))
            self._add(KEYS, [item for _, item in numbered], names)
        else:
            hashes = [self._hash(start, end, top.inner) for _, (start, end) in numbered]
            whole = hash((first, *sorted(hashes)))
            self._add(ITEMS, [item for _, item in numbered], hashes)
        if self._open:
            self._open[-1].inner.append((top.position, position + 1, whole))

    # Outside of brackets

    def _separate(self, position: int) -> None:
        if self._separators and self._blank(self._separators[-1][1], position):
            self._separators[-1] = (self._separators[-1][0], position + 1)  # ", and"
        else:
            self._separators.append((position, position + 1))

    def _end_clause(self, position: int) -> None:
        """Take what the clause enumerates: "a, b and c". Words around the enumeration are not part of it."""
        if len(self._separators) + 1 >= _LEAST_ENUMERATED:
            first = self._bullet(self._line)[1] if self._clause == self._line else self._clause
            starts = [first, *(end for _, end in self._separators)]
            ends = [*(start for start, _ in self._separators), position]
            items = [self._trim(start, end) for start, end in zip(starts, ends, strict=True)]
            if all(self._units(*item) == 1 for item in items[1:-1]):
                items[0] = (max(items[0][1] - 1, items[0][0]), items[0][1])
                items[-1] = (items[-1][0], min(items[-1][0] + 1, items[-1][1]))
            if all(start < end for start, end in items):
                self._add(LINES, items, [self._hash(*item) for item in items])
        self._clause = position + 1
        self._separators.clear()

    def _end_line(self, position: int) -> None:
        self._end_clause(position)
        if self._blank(self._line, position):
            self._end_block()
        else:
            self._lines.append(self._trim(self._line, position))
            self._all_lines.append(self._lines[-1])
        self._line = position + 1

    def _end_block(self) -> None:
        if not self._lines:
            return
        run: list[Range] = []
        mark = 0
        bulleted = False
        for start, end in self._lines:
            bullet, after = self._bullet(start)
            if bullet and bullet == mark:
                run.append((after, end))
            elif run and not bullet and self._pieces[start - 1].blank and self._pieces[start - 1].kind != "newline":
                run[-1] = (run[-1][0], end)
            else:
                self._add_lines(run)
                run, mark = ([(after, end)], bullet) if bullet else ([], 0)
            bulleted = bulleted or bool(bullet)
        self._add_lines(run)
        names = {self._keys[start] for start, _ in self._lines}
        if not bulleted and len(self._lines) == len(names) >= _LEAST_LINES:
            self._add_lines(list(self._lines))
        self._blocks.append((self._lines[0][0], self._lines[-1][1]))
        self._lines.clear()

    def _end_part(self, position: int) -> None:
        self._open.clear()
        self._quote = ""
        self._end_line(position)
        self._end_block()
        self._add_runs(self._blocks, lambda block: self._keys[block[0]])
        self._add_runs(self._elements(), lambda element: self._keys[element[0] + 1])
        self._blocks.clear()
        self._all_lines.clear()

    def _elements(self) -> list[Range]:
        """Return what begins with a line like <document id="7"> and ends with a line like </document>."""
        elements: list[Range] = []
        lines = self._all_lines
        index = 0
        while index < len(lines):
            start = lines[index][0]
            last = index
            if self._pieces[start].kind == "<" and self._keys[start + 1 : start + 2] != [0]:
                name = self._keys[start + 1 : start + 2]
                for last in range(index, min(index + _LONGEST_ELEMENT, len(lines))):
                    end = lines[last][1]
                    kinds = [piece.kind for piece in self._pieces[end - 4 : end]]
                    if kinds[:1] == ["<"] and kinds[3:] == [">"] and self._keys[end - 2 : end - 1] == name:
                        elements.append((start, end))
                        break
                else:
                    last = index
            index = last + 1
        return elements

    def _add_runs(self, items: Iterable[Range], mark_of: Callable[[Range], int]) -> None:
        """Add what follows each other and begins alike."""
        run: list[Range] = []
        for item in items:
            if run and (mark_of(item) != mark_of(run[-1]) or not self._blank(run[-1][1], item[0])):
                self._add_sections(run)
                run = []
            run.append(item)
        self._add_sections(run)

    def _add_lines(self, items: list[Range]) -> None:
        self._add(LINES, items, [self._hash(*item) for item in items])

    def _add_sections(self, items: list[Range]) -> None:
        self._add(SECTIONS, items, [self._hash(*item) for item in items])

    def _bullet(self, start: int) -> tuple[int, int]:
        """Return what marks a line as an item of a list, 0 if nothing does, and where the item begins."""
        pieces = self._pieces
        end = start
        while end + 1 < len(pieces) and pieces[end].blank:
            end += 1
        first = pieces[end]
        if first.kind == "punctuation":
            end += 1
        elif first.kind == "number" and end + 1 < len(pieces) and pieces[end + 1].kind in {"stop", ")"}:
            end += 2
        else:
            return 0, start
        while end < len(pieces) and pieces[end].blank and pieces[end].kind != "newline":
            end += 1
        return first.key, end

    # Parts of the above

    def _add(self, kind: str, items: list[Range], hashes: list[int]) -> None:
        if len(set(hashes)) > 1 and all(start < end for start, end in items):
            self._found.append(Collection(kind, items, hash(tuple(sorted(hashes))), tuple(hashes)))

    def _hash(self, start: int, end: int, inner: Sequence[tuple[int, int, int]] = ()) -> int:
        """Return what is the same for a range of pieces whatever its spaces and the order inside of collections."""
        keys: list[int] = []
        for low, high, whole in inner:
            if start <= low and high <= end:
                keys += self._keys[start:low]
                keys.append(whole)
                start = high
        keys += self._keys[start:end]
        return hash(tuple(filter(None, keys)))

    def _tool_hash(self, start: int, end: int) -> int:
        """Return what is the same for a tool whatever the order of its keys."""
        return hash(tuple(sorted(filter(None, self._keys[start:end]))))

    def _line_start(self, position: int) -> int:
        start = position
        while start > self._line and self._pieces[start - 1].kind != "newline":
            start -= 1
        return start

    def _trim(self, start: int, end: int) -> Range:
        while start < end and self._pieces[start].blank:
            start += 1
        while start < end and self._pieces[end - 1].blank:
            end -= 1
        return start, end

    def _blank(self, start: int, end: int) -> bool:
        return not any(self._keys[start:end])

    def _units(self, start: int, end: int) -> int:
        return sum(1 for key in self._keys[start:end] if key)
