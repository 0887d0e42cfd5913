"""Groups prompts that are alike and aligns each with the first of its group.

Spaces are left out and volatile pieces of a kind are equal, so prompts that differ in a
clock only align completely. Work grows with the length of the prompts, not with the
square of their number or length: a prompt is compared with the few groups that share
the most of a sample of its pairs of pieces, and is aligned with one prompt.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from prefixcache.doctor.pieces import Piece

_KEY_BYTES = 8
_COMPARED_BYTES = 1024
_MASK = 2**64 - 1

# A pair is in the sample if its first key says so, in every prompt or in none.
_SAMPLED = 8
_SAMPLE = 32
_GROUPS_PER_PAIR = 16
_ALIKE = 0.3
_BEGINNING = 24 * _KEY_BYTES
_ENOUGH = 128

# Fewer pieces that agree between two places that differ are taken for chance.
_LEAST_BLOCK = 3
_NEARBY = 8

# Behind one or two pieces that differ, so many that agree are no chance.
_STEPS = ((1, 1), (0, 1), (1, 0), (1, 2), (2, 1), (2, 2))
_RESUMED = 24


class Block(NamedTuple):
    """So many pieces are the same, from these indexes on in the two streams."""

    reference: int
    own: int
    length: int


class Stream:
    """What of a prompt is aligned: where its pieces without spaces are, in an order of their own, and their keys."""

    __slots__ = ("packed", "positions")

    def __init__(self, positions: array[int], packed: bytes) -> None:
        self.positions = positions
        self.packed = packed

    @classmethod
    def of(cls, pieces: Sequence[Piece], order: Iterable[int]) -> Stream:
        """Return the stream of a prompt's pieces in this order."""
        positions = array("I", [position for position in order if not pieces[position].blank])
        return cls(positions, array("Q", [pieces[position].key for position in positions]).tobytes())

    @property
    def keys(self) -> memoryview:
        return memoryview(self.packed).cast("Q")

    def part(self, start: int, end: int) -> Stream:
        """Return what lies between two indexes."""
        if start == 0 and end == len(self):
            return self
        return Stream(self.positions[start:end], self.packed[start * _KEY_BYTES : end * _KEY_BYTES])

    def __len__(self) -> int:
        return len(self.positions)


class Group:
    """Prompts that are alike; what they are aligned with is the first one."""

    def __init__(self, first: Stream, prompt: int) -> None:
        self.reference = first
        self.members: list[int] = [prompt]
        self.blocks: list[list[Block]] = [[Block(0, 0, len(first))]]
        counts = Counter(_pairs(first.keys))
        self._places = {pair: place for place, pair in enumerate(_pairs(first.keys)) if counts[pair] == 1}

    def add(self, stream: Stream, prompt: int) -> None:
        self.members.append(prompt)
        self.blocks.append(self._align(stream))

    def _align(self, stream: Stream) -> list[Block]:
        ours, theirs = self.reference, stream
        tail = _common_end(ours.packed, theirs.packed, min(len(ours), len(theirs)))
        head = _common_start(ours.packed, theirs.packed, min(len(ours), len(theirs)))
        blocks = [Block(0, 0, head)] if head else []
        at = own_at = head
        while (block := _resumed(ours, theirs, at, own_at)) is not None:
            blocks.append(block)
            at, own_at = block.reference + block.length, block.own + block.length
        tail = min(tail, len(ours) - at, len(theirs) - own_at)
        end, own_end = len(ours) - tail, len(theirs) - tail
        if at < end and own_at < own_end:
            blocks += self._between(theirs.keys, at, end, own_at, own_end)
        if tail:
            blocks.append(Block(end, own_end, tail))
        return _without_chance(blocks, len(ours), len(theirs))

    def _between(self, own: Sequence[int], start: int, end: int, own_start: int, own_end: int) -> list[Block]:
        """Align what lies between common ends, by pairs that occur once on either side."""
        ours, places = self.reference.keys, self._places
        once: dict[int, int] = {}
        for at, pair in enumerate(_pairs(own[own_start:own_end]), own_start):
            if pair in places:
                once[pair] = -1 if pair in once else at
        met = [(at, places[pair]) for pair, at in once.items() if at >= 0 and start <= places[pair] < end - 1]
        blocks: list[Block] = []
        low, own_low = start, own_start
        for own_at, at in _longest_rise(met):
            if at < low or own_at < own_low:
                continue  # the block before goes over it
            first, own_first = at, own_at
            while first > low and own_first > own_low and ours[first - 1] == own[own_first - 1]:
                first, own_first = first - 1, own_first - 1
            while at < end and own_at < own_end and ours[at] == own[own_at]:
                at, own_at = at + 1, own_at + 1
            blocks.append(Block(first, own_first, at - first))
            low, own_low = at, own_at
        return blocks


class Groups:
    """The groups so far."""

    def __init__(self) -> None:
        self.all: list[Group] = []
        self._starts: dict[int, list[int]] = {}
        self._wholes: dict[int, list[int]] = {}
        self._beginnings: dict[bytes, list[Group]] = {}
        self._sizes: list[tuple[int, int]] = []

    def add(self, stream: Stream, prompt: int) -> None:
        """Put a prompt into the group it is most like, or into a new one."""
        same_start = self._with_the_same_beginning(stream)
        if same_start is not None:
            same_start.add(stream, prompt)
            return
        start, whole = _samples(stream.keys)
        best, score = -1, 0.0
        for pairs, index, side in ((start, self._starts, 0), (whole, self._wholes, 1)):
            shared: Counter[int] = Counter()
            for pair in pairs:
                shared.update(index.get(pair, ()))
            for group, count in shared.items():
                alike = count / max(min(len(pairs), self._sizes[group][side]), 1)
                if alike > score:
                    best, score = group, alike
        if score >= _ALIKE:
            self.all[best].add(stream, prompt)
            return
        self.all.append(Group(stream, prompt))
        self._sizes.append((len(start), len(whole)))
        same = self._beginnings.setdefault(stream.packed[:_BEGINNING], [])
        if len(same) < _GROUPS_PER_PAIR:
            same.append(self.all[-1])
        for pairs, index in ((start, self._starts), (whole, self._wholes)):
            for pair in pairs:
                known = index.setdefault(pair, [])
                if len(known) < _GROUPS_PER_PAIR:
                    known.append(len(self.all) - 1)

    def _with_the_same_beginning(self, stream: Stream) -> Group | None:
        """Return the group with which so much of the beginning agrees that there is no need to look further."""
        best, most = None, -1
        for group in self._beginnings.get(stream.packed[:_BEGINNING], ()):
            shorter = min(len(stream), len(group.reference))
            common = _common_start(group.reference.packed, stream.packed, shorter)
            if common > most and common >= min(_ENOUGH, _ALIKE * shorter):
                best, most = group, common
        return best


def _pairs(keys: Sequence[int]) -> list[int]:
    return [first * 31 + second & _MASK for first, second in pairwise(keys)]


def _samples(keys: Sequence[int]) -> tuple[set[int], set[int]]:
    """Return a sample of a prompt's pairs from its beginning, and one from all over it."""
    places = [place for place, key in enumerate(keys[:-1]) if not key % _SAMPLED]
    if len(places) < _SAMPLE:
        places = list(range(len(keys) - 1))
    sampled = [keys[place] * 31 + keys[place + 1] & _MASK for place in places]
    return set(sampled[:_SAMPLE]), set(sorted(set(sampled))[:_SAMPLE])


def _resumed(ours: Stream, theirs: Stream, at: int, own_at: int) -> Block | None:
    """Return what is the same again behind a small difference, if it is much; the usual case, and cheap."""
    for step, own_step in _STEPS:
        start, own_start = at + step, own_at + own_step
        most = min(len(ours) - start, len(theirs) - own_start)
        if most >= _RESUMED:
            common = _common_start(ours.packed[start * _KEY_BYTES :], theirs.packed[own_start * _KEY_BYTES :], most)
            if common >= _RESUMED:
                return Block(start, own_start, common)
    return None


def _common_start(ours: bytes, theirs: bytes, most: int) -> int:
    """Return how many leading keys two packed streams share, at most `most`."""
    at, end = 0, most * _KEY_BYTES
    while at < end:
        step = min(_COMPARED_BYTES, end - at)
        one, other = ours[at : at + step], theirs[at : at + step]
        if one != other:
            difference = int.from_bytes(one, "little") ^ int.from_bytes(other, "little")
            return (at + ((difference & -difference).bit_length() - 1) // 8) // _KEY_BYTES
        at += step
    return most


def _common_end(ours: bytes, theirs: bytes, most: int) -> int:
    """Return how many trailing keys two packed streams share, at most `most`."""
    done, end = 0, most * _KEY_BYTES
    while done < end:
        step = min(_COMPARED_BYTES, end - done)
        one = ours[len(ours) - done - step : len(ours) - done]
        other = theirs[len(theirs) - done - step : len(theirs) - done]
        if one != other:
            difference = int.from_bytes(one, "little") ^ int.from_bytes(other, "little")
            return (done + step - (difference.bit_length() + 7) // 8) // _KEY_BYTES
        done += step
    return most


def _longest_rise(met: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the longest part of (own, reference) places, sorted by own, in which both rise."""
    ends: list[int] = []
    tops: list[int] = []
    before: list[int] = []
    for index, (_, place) in enumerate(met):
        length = bisect_left(tops, place)
        before.append(ends[length - 1] if length else -1)
        if length == len(tops):
            tops.append(place)
            ends.append(index)
        else:
            tops[length] = place
            ends[length] = index
    rise: list[tuple[int, int]] = []
    index = ends[-1] if ends else -1
    while index >= 0:
        rise.append(met[index])
        index = before[index]
    return rise[::-1]


def _without_chance(blocks: list[Block], length: int, own_length: int) -> list[Block]:
    """Leave out short blocks between long differences: that these pieces agree means nothing."""
    kept: list[Block] = []
    for index, block in enumerate(blocks):
        before = blocks[index - 1] if index else Block(0, 0, 0)
        after = blocks[index + 1] if index + 1 < len(blocks) else Block(length, own_length, 0)
        gap = max(block.reference - before.reference - before.length, block.own - before.own - before.length)
        next_gap = max(after.reference - block.reference - block.length, after.own - block.own - block.length)
        if block.length >= _LEAST_BLOCK or not gap or not next_gap or max(gap, next_gap) <= _NEARBY:
            kept.append(block)
    return kept
