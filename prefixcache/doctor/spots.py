"""Finds the spots where the prompts of a group differ and then go on alike.

What most of a group has in common, piece by piece, is its frame. A spot is what lies
between two neighbouring pieces of the frame, or a volatile piece of it, where the
prompts differ. What is long there, and what comes behind the frame, may still be alike
in some of the prompts, such as those of one agent among several with a preamble in
common; these are looked at in the same way.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

from prefixcache.doctor.alignment import Block, Group, Groups, Stream
from prefixcache.doctor.pieces import TOKEN, VOLATILE, Piece
from prefixcache.tokens import TOKEN_BYTES

VARYING = "text"
SPACES = "spaces"

# In so many prompts of a group a piece must be the same to belong to the frame.
_FRAME = 0.8
_DEPTH = 3
_LEAST_PART = 48
_WORDS = frozenset({"word", "name", "letter", "conjunction", TOKEN})
# Short spots with no more than this in between are one, unless there are words.
_BETWEEN = 2
_SHORT = 12
_CONTEXT = 3


class Edit(NamedTuple):
    """A range of a prompt's pieces, and what to put there."""

    start: int
    end: int
    instead: tuple[Piece, ...] = ()


@dataclass(slots=True)
class Spot:
    """Where prompts differ, and in what: kinds of volatile pieces, VARYING or SPACES.

    `edits` has the ranges of every prompt with something there; for SPACES, of every
    prompt with others than most, and with those that most have. `values` is how many
    different things prompts have there, nothing included. `behind` is how many tokens of
    the frame come after it, and `further` how many of smaller groups in all. `depth` is
    0 in a group of whole prompts; a deeper spot may lie within another. `after` is what
    it stands behind: keys of a few pieces.
    """

    kinds: tuple[str, ...]
    behind: int
    after: tuple[int, ...] = ()
    further: int = 0
    depth: int = 0
    edits: dict[int, list[Edit]] = field(default_factory=dict)
    values: int = 0

    @property
    def bound(self) -> int:
        """More tokens than can be saved here."""
        return self.behind * len(self.edits) + self.further


class View(NamedTuple):
    """A prompt's pieces and its stream; `arranged` if that is in another order."""

    pieces: Sequence[Piece]
    stream: Stream
    arranged: bool


Look = Callable[[int], View]
Parts = dict[int, tuple[int, int]]
"""Parts of the streams of some prompts: from where to where."""


def find_spots(look: Look, count: int) -> tuple[list[list[int]], list[Spot]]:
    """Return the groups of the prompts 0 to count - 1, and the spots in them, outer ones first."""
    groups, spots, _ = _examine(look, {prompt: (0, len(look(prompt).stream)) for prompt in range(count)}, 0)
    return groups, sorted(spots, key=lambda spot: spot.depth)


def _examine(look: Look, parts: Parts, depth: int) -> tuple[list[list[int]], list[Spot], int]:
    """Group parts of prompts; return the groups, the spots in them, and how many tokens are in common."""
    groups = Groups()
    for prompt, part in parts.items():
        groups.add(look(prompt).stream.part(*part), prompt)
    spots: list[Spot] = []
    common = 0
    for group in groups.all:
        if len(group.members) > 1:
            frame = _Frame(look, group, parts)
            found, rests = frame.spots()
            further = 0
            for rest in rests if depth + 1 < _DEPTH else []:
                _, inner, tokens = _examine(look, rest, depth + 1)
                spots += inner
                further += tokens
            for spot in found:
                spot.depth, spot.further = depth, further
            spots += found
            common += frame.tokens * len(group.members) + further
    return [group.members for group in groups.all], spots, common


class _Member(NamedTuple):
    """A prompt of a group, and where it agrees with the first."""

    prompt: int
    view: View
    stream: Stream
    blocks: list[Block]

    def place(self, place: int) -> int | None:
        """Return where the piece of the first at `place` is in this one, None if it is not there."""
        index = bisect_right(self.blocks, place, key=lambda block: block.reference) - 1
        if index < 0:
            return None
        block = self.blocks[index]
        return block.own + place - block.reference if place < block.reference + block.length else None

    def gap(self, place: int) -> tuple[int, int] | None:
        """Return the range of pieces, spaces all of them, in front of the one at `place`; None if it is not there."""
        before, after = self.place(place - 1), self.place(place)
        if before is None or after != before + 1:
            return None
        return self.stream.positions[before] + 1, self.stream.positions[after]

    def between(self, start: int, end: int) -> tuple[int, int] | None:
        """Return the part of the stream between the pieces at `start` - 1 and `end`; None if it has not both."""
        before, after = self.place(start - 1) if start else -1, self.place(end)
        return None if before is None or after is None else (before + 1, after)

    def range_of(self, part: tuple[int, int]) -> tuple[int, int] | None:
        """Return a part of the stream as a range of pieces; None if other pieces or fields are in between."""
        positions = self.stream.positions[slice(*part)]
        if not positions:
            return 0, 0
        low, high = positions[0], positions[-1] + 1
        between = [piece for piece in self.view.pieces[low:high] if not piece.blank]
        if len(between) != len(positions) or any(piece.is_field for piece in between):
            return None
        return low, high


class _Frame:
    """What the prompts of a group have in common, and where they differ."""

    def __init__(self, look: Look, group: Group, parts: Parts) -> None:
        self._look = look
        self._group = group
        self._parts = parts
        pieces, positions = look(group.members[0]).pieces, group.reference.positions
        self._pieces = [pieces[position] for position in positions]
        self._stable = self._common()
        self._end = max((place + 1 for place, stable in enumerate(self._stable) if stable), default=0)
        lengths = [
            len(piece.tokens) // TOKEN_BYTES if stable else 0
            for piece, stable in zip(self._pieces, self._stable, strict=True)
        ]
        self._behind = [*accumulate(reversed(lengths), initial=0)][::-1]

    @property
    def tokens(self) -> int:
        """How many tokens the group has in common."""
        return self._behind[0]

    def spots(self) -> tuple[list[Spot], list[Parts]]:
        """Return the spots, and the parts of the prompts that are long there or behind the frame."""
        ranges, spaces = self._differences()
        moves = [_Values(Spot((), self._behind[end], self._before(start))) for start, end in ranges]
        usual = {place: max(gaps, key=lambda gap: gaps[gap]) for place, gaps in spaces.items()}
        evened = Spot((SPACES,), self._behind[min(usual, default=0)])
        rests: list[Parts] = [{} for _ in range(len(ranges) + 1)]
        for member in self._members():
            parts = [member.between(start, end) for start, end in ranges]
            for part, values in zip(parts, moves, strict=True):
                values.add(member, part)
            edits = [Edit(*gap, instead) for gap, instead in self._unusual(member, usual)]
            if edits:
                evened.edits[member.prompt] = edits
            offset = self._parts[member.prompt][0]
            for part, rest in zip([*parts, self._behind_in(member)], rests, strict=True):
                if part is not None and part[1] - part[0] >= _LEAST_PART:
                    rest[member.prompt] = (offset + part[0], offset + part[1])
        evened.values = max((len(gaps) for gaps in spaces.values()), default=0)
        spots = [spot for spot in (values.result() for values in moves) if spot is not None]
        return [*spots, *([evened] if evened.edits else [])], [rest for rest in rests if len(rest) > 1]

    def _before(self, place: int) -> tuple[int, ...]:
        return tuple(piece.key for piece in self._pieces[max(place - _CONTEXT, 0) : place])

    def _common(self) -> list[bool]:
        steps = [0] * (len(self._pieces) + 1)
        for blocks in self._group.blocks:
            for block in blocks:
                steps[block.reference] += 1
                steps[block.reference + block.length] -= 1
        least = _FRAME * len(self._group.members)
        return [covered >= least for covered in accumulate(steps[:-1])]

    def _members(self) -> Iterator[_Member]:
        for prompt, blocks in zip(self._group.members, self._group.blocks, strict=True):
            view = self._look(prompt)
            yield _Member(prompt, view, view.stream.part(*self._parts[prompt]), blocks)

    def _differences(self) -> tuple[list[tuple[int, int]], dict[int, Counter[tuple[Piece, ...]]]]:
        """Return the ranges of the reference where prompts differ, and the spaces where those do, by place."""
        volatile = [
            place
            for place, piece in enumerate(self._pieces[: self._end])
            if piece.volatile and self._stable[place]
        ]  # fmt: skip
        varying: set[int] = set()
        inserted: Counter[int] = Counter()
        places: set[int] = set()
        members = self._members()
        first = next(members)
        for member in members:
            different = [place for place in volatile if self._differs(member, place)]
            varying.update(different)
            inserted.update(_insertions(member.blocks))
            if not first.view.arranged and not member.view.arranged:
                places.update(_unequal_gaps(first, member, different))
        spaces: dict[int, Counter[tuple[Piece, ...]]] = {
            place: Counter() for place in sorted(places) if place < self._end
        }
        if spaces:
            for member in self._members():
                for place, gap in self._gaps(member, spaces):
                    spaces[place][tuple(member.view.pieces[slice(*gap)])] += 1
        ranges = [(place, place + 1) for place in varying]
        ranges += _runs([*(not stable for stable in self._stable[: self._end]), False])
        ranges += [(place, place) for place, times in inserted.items() if times > 1 and self._inside(place)]
        return self._joined(sorted(ranges)), spaces

    def _differs(self, member: _Member, place: int) -> bool:
        own = member.place(place)
        return own is not None and member.view.pieces[member.stream.positions[own]] is not self._pieces[place]

    def _inside(self, place: int) -> bool:
        return place < self._end and self._stable[place] and (place == 0 or self._stable[place - 1])

    def _joined(self, ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Join ranges with next to nothing in between, such as a date, a comma and a time."""
        joined: list[tuple[int, int]] = []
        for start, end in ranges:
            if joined and max(end - start, joined[-1][1] - joined[-1][0]) <= _SHORT:
                between = self._pieces[joined[-1][1] : start]
                if len(between) <= _BETWEEN and not any(piece.kind in _WORDS or piece.is_field for piece in between):
                    joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
                    continue
            joined.append((start, end))
        return joined

    def _gaps(self, member: _Member, places: Iterable[int]) -> Iterator[tuple[int, tuple[int, int]]]:
        for place in places:
            gap = None if member.view.arranged else member.gap(place)
            if gap is not None:
                yield place, gap

    def _unusual(
        self, member: _Member, usual: dict[int, tuple[Piece, ...]]
    ) -> Iterator[tuple[tuple[int, int], tuple[Piece, ...]]]:
        for place, gap in self._gaps(member, usual):
            if tuple(member.view.pieces[slice(*gap)]) != usual[place]:
                yield gap, usual[place]

    def _behind_in(self, member: _Member) -> tuple[int, int] | None:
        """Return the part of a prompt behind the last piece that it has of the frame."""
        for block in reversed(member.blocks):
            if block.reference < self._end:
                return block.own + min(block.length, self._end - block.reference), len(member.stream)
        return None


class _Values:
    """What the prompts have at a spot."""

    def __init__(self, spot: Spot) -> None:
        self._spot = spot
        self._kinds: Counter[tuple[str, ...]] = Counter()
        self._values: set[tuple[Piece, ...]] = set()

    def add(self, member: _Member, part: tuple[int, int] | None) -> None:
        found = None if part is None else member.range_of(part)
        if found is None:
            return
        value = member.view.pieces[slice(*found)]
        self._values.add(tuple(value))
        if value:
            self._spot.edits[member.prompt] = [Edit(*found)]
            self._kinds[_kinds(value)] += 1

    def result(self) -> Spot | None:
        """Return the spot, or None if all have the same there."""
        spot, kinds = self._spot, self._kinds
        spot.values = len(self._values)
        if spot.values < 2:
            return None
        spot.kinds = (VARYING,) if (VARYING,) in kinds else max(kinds, key=lambda entry: kinds[entry])
        return spot


def _unequal_gaps(first: _Member, member: _Member, different: Sequence[int]) -> Iterator[int]:
    """Yield the places in front of which two prompts that agree there have other spaces.

    `different` are the places of volatile pieces that are not the same. What lies
    between them is compared as a whole.
    """
    ours, theirs = first.stream.positions, member.stream.positions
    for block in member.blocks:
        end = block.reference + block.length
        shift = block.own - block.reference
        cuts = [place for place in different if block.reference <= place < end]
        for low, high in pairwise([block.reference, *cuts, end - 1]):
            one = first.view.pieces[ours[low] + 1 : ours[high]]
            other = member.view.pieces[theirs[low + shift] + 1 : theirs[high + shift]]
            if one != other:
                for place in range(low + 1, high + 1):
                    gap = first.view.pieces[ours[place - 1] + 1 : ours[place]]
                    if gap != member.view.pieces[theirs[place - 1 + shift] + 1 : theirs[place + shift]]:
                        yield place


def _kinds(value: Sequence[Piece]) -> tuple[str, ...]:
    """Return the kinds of the volatile pieces that a value consists of, or VARYING if there is something else."""
    kinds = tuple(dict.fromkeys(piece.kind for piece in value if piece.kind in VOLATILE))
    return (VARYING,) if not kinds or any(piece.kind in _WORDS for piece in value) else kinds


def _runs(flags: Iterable[bool]) -> list[tuple[int, int]]:
    """Return the ranges in which all flags are set; the last flag is not."""
    runs = []
    start = None
    for place, flag in enumerate(flags):
        if flag and start is None:
            start = place
        elif not flag and start is not None:
            runs.append((start, place))
            start = None
    return runs


def _insertions(blocks: Sequence[Block]) -> list[int]:
    """Return the places of the reference in front of which a prompt has something more."""
    places = []
    end, own_end = 0, 0
    for block in blocks:
        if block.reference == end and block.own > own_end:
            places.append(block.reference)
        end, own_end = block.reference + block.length, block.own + block.length
    return places
