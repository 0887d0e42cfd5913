"""What the attention of one step reads: computed once per step, executed in every layer.

Pure arithmetic over block tables; no tensors. The rows of a step are the tokens it
computes. A row's keys are covered exactly once, by one *base* read and any number of
*further* reads, whose partial results are merged:

- A shared run: blocks that lead the tables of several sequences and lie before all of
  their chunks. It is read once for all rows of the group, so groups form a trie, and
  sequences are put in the trie's order, which makes the rows of every group adjacent.
- The private rest of a sequence's cached positions, for the rows of its chunk.
- The chunk itself, causally. A chunk of a single row needs no causal mask: that row
  reads its private rest and itself as one range ("tail"). Short tails of several
  sequences are padded to a common length and read together.

With a sliding window, a sequence that is longer than the window leaves all groups. A
single row then reads the last `window` positions; a longer chunk is cut into tiles,
each reading what its rows can see, under a mask ("band").

Positions become slots (block * block_size + offset) and these runs of adjacent slots.
What is scattered over many short runs is gathered instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

MIN_PADDED = 2
"""Fewer short tails than this are not worth reading together."""
SHORT_CALLS = 64
"""A tail is short if it has at most this many times the slots that are copied in the time of a kernel call. Measured:
4 tails of 5,000 slots and 16 of 1,800 are still read faster together."""
BAND_ROWS = 256
"""Rows of one tile of a chunk in a sliding window."""


@dataclass(frozen=True, slots=True)
class Span:
    """A part of one sequence: `length` tokens computed from position `start` on, and its block table."""

    start: int
    length: int
    blocks: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Slots:
    """Where keys lie: runs of adjacent slots (first, last + 1), or, if scattered, every slot."""

    runs: tuple[tuple[int, int], ...] = ()
    scattered: Integers | None = None


@dataclass(frozen=True, slots=True)
class Read:
    """Rows first..last-1 all see all of `slots`."""

    first: int
    last: int
    slots: Slots


@dataclass(frozen=True, slots=True)
class Causal:
    """Rows first..last-1 see each other, up to themselves."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Padded:
    """Row rows[i] sees the first lengths[i] of slots[i]; the rest of slots[i] repeats a valid slot."""

    rows: list[int]
    slots: Integers
    lengths: Integers


@dataclass(frozen=True, slots=True)
class Band:
    """Row first + i sees key j of `slots` if offset + i - window < j <= offset + i."""

    first: int
    last: int
    slots: Slots
    offset: int
    window: int


@dataclass(slots=True)
class Reads:
    """The reads of one kind of layer. `base` covers every row once; `further` in any order."""

    base: list[Read | Causal | Padded | Band] = field(default_factory=list)
    further: list[Read] = field(default_factory=list)

    def permutation(self) -> Integers | None:
        """Return which place of the concatenated base results row i is at; None if at place i."""
        rows: list[int] = []
        for read in self.base:
            rows.extend(read.rows if isinstance(read, Padded) else range(read.first, read.last))
        if all(row == place for place, row in enumerate(rows)):
            return None
        return np.argsort(np.array(rows, dtype=np.int64))


class Plan:
    """The plan of one step over `spans`.

    `order[i]` is the index of the span whose rows come i-th and `first_row[index]`
    where they begin; `positions` and `slots` say for every row its position and where
    its keys and values are written. `call_slots` is how many slots can be copied in
    about the time a kernel call takes, and decides between few calls and little copying.
    For kernels that read `scattered` slots where they are, no read is cut into runs.
    """

    def __init__(self, spans: Sequence[Span], block_size: int, call_slots: int, *, scattered: bool = False) -> None:
        self._spans = spans
        self._size = block_size
        self._call_slots = call_slots
        self._scattered = scattered
        self.order: list[int] = []
        # The windowless plan is always made: its trie decides the order of the rows.
        single_rows_first = sorted(range(len(spans)), key=lambda index: spans[index].length > 1)
        self._begin = [0] * len(spans)
        groups: list[tuple[list[int], int, int]] = []
        self._descend(single_rows_first, 0, 0, groups, self.order)
        self.first_row = [0] * len(spans)
        self.rows = 0
        for index in self.order:
            self.first_row[index] = self.rows
            self.rows += spans[index].length
        self._full = self._assemble(groups, None)
        ordered = [spans[index] for index in self.order]
        if self.rows == len(spans):  # nothing but single rows, and as many as there are sequences
            self.positions = np.array([span.start for span in ordered], dtype=np.int64)
            blocks = np.array([span.blocks[span.start // block_size] for span in ordered], dtype=np.int64)
            self.slots = blocks * block_size + self.positions % block_size
        else:
            self.positions = np.concatenate([np.arange(span.start, span.end) for span in ordered])
            self.slots = np.concatenate([self._every_slot(span, span.start, span.end) for span in ordered])

    def reads(self, window: int | None = None) -> Reads:
        """Return the reads of layers without, or with this, sliding window."""
        if window is None or all(span.end <= window for span in self._spans):
            return self._full
        self._begin = [0] * len(self._spans)
        groups: list[tuple[list[int], int, int]] = []
        neighbours: list[int] = []
        for index in self.order:  # a group's rows must stay adjacent, so a longer sequence parts its neighbours
            if self._spans[index].end <= window:
                neighbours.append(index)
            elif neighbours:
                self._descend(neighbours, 0, 0, groups, [])
                neighbours = []
        if neighbours:
            self._descend(neighbours, 0, 0, groups, [])
        return self._assemble(groups, window)

    # The trie of shared runs

    def _descend(
        self, members: list[int], depth: int, begin: int, groups: list[tuple[list[int], int, int]], order: list[int]
    ) -> None:
        """Find the groups among `members`, which agree in `depth` blocks, of which `begin` are read already.

        Appends (members, first block, last block + 1) of each shared run to `groups` and
        the members to `order`, and notes in `_begin` from which position on each reads alone.
        """
        branches: dict[int, list[int]] = {}
        for index in members:
            span = self._spans[index]
            ends_here = span.start // self._size <= depth
            branches.setdefault(~index if ends_here else span.blocks[depth], []).append(index)
        for branch in branches.values():
            if len(branch) == 1:
                order.append(branch[0])
                self._begin[branch[0]] = begin * self._size
                continue
            end = self._agreement(branch, depth)
            if self._worth_sharing(branch, (end - begin) * self._size):
                groups.append((branch, begin, end))
                self._descend(branch, end, end, groups, order)
            else:
                self._descend(branch, end, begin, groups, order)

    def _agreement(self, members: list[int], depth: int) -> int:
        """Return how many leading blocks the members share that are wholly before their chunks."""
        end = min(self._spans[index].start for index in members) // self._size
        table = self._spans[members[0]].blocks
        for index in members[1:]:
            end = _common(table, self._spans[index].blocks, depth, end)
        return end

    def _worth_sharing(self, members: list[int], slots: int) -> bool:
        """Whether one more call and merge cost less than each member reading the run by itself.

        A chunk of several rows would need a call of its own for it anyway.
        """
        chunks = sum(self._spans[index].length > 1 for index in members)
        return chunks > 1 or (len(members) - 1) * slots >= 2 * self._call_slots

    # From positions to reads

    def _assemble(self, groups: list[tuple[list[int], int, int]], window: int | None) -> Reads:
        reads = Reads()
        tails: list[tuple[int, int, int]] = []  # span, first position, end
        for members, begin, end in groups:
            first = min(self.first_row[index] for index in members)
            last = max(self.first_row[index] + self._spans[index].length for index in members)
            slots = self._slots(self._spans[members[0]], begin * self._size, end * self._size)
            reads.further += self._split(first, last, slots)
        for index in self.order:
            span, first = self._spans[index], self.first_row[index]
            beyond = window is not None and span.end > window
            if span.length == 1:
                begin = span.end - window if beyond and window else self._begin[index]
                tails.append((index, begin, span.end))
            elif beyond and window:
                reads.base += self._bands(span, first, window)
            else:
                reads.base.append(Causal(first, first + span.length))
                if span.start > self._begin[index]:
                    slots = self._slots(span, self._begin[index], span.start)
                    reads.further += self._split(first, first + span.length, slots)
        self._add_tails(reads, tails)
        return reads

    def _bands(self, span: Span, first: int, window: int) -> list[Band]:
        bands = []
        for start in range(span.start, span.end, BAND_ROWS):
            end = min(start + BAND_ROWS, span.end)
            seen = max(start + 1 - window, 0)
            row = first + start - span.start
            slots = self._slots(span, seen, end, one=True)
            bands.append(Band(row, row + end - start, slots, start - seen, window))
        return bands

    def _add_tails(self, reads: Reads, tails: list[tuple[int, int, int]]) -> None:
        """Read short tails padded, in groups of similar length, and long ones by themselves."""
        limit = SHORT_CALLS * self._call_slots
        short = [tail for tail in tails if tail[2] - tail[1] <= limit]
        short.sort(key=lambda tail: tail[2] - tail[1], reverse=True)
        alone = [tail for tail in tails if tail[2] - tail[1] > limit]
        while len(short) >= MIN_PADDED:
            longest = short[0][2] - short[0][1]
            count = sum(2 * (end - begin) >= longest for _, begin, end in short)
            if count < MIN_PADDED or len(short) - count < MIN_PADDED:
                count = len(short)
            reads.base.append(self._padded(sorted(short[:count], key=lambda tail: self.first_row[tail[0]])))
            short = short[count:]
        for index, begin, end in alone + short:
            row = self.first_row[index]
            parts = self._split(row, row + 1, self._slots(self._spans[index], begin, end))
            reads.base.append(parts[0])
            reads.further += parts[1:]

    def _padded(self, tails: list[tuple[int, int, int]]) -> Padded:
        begins = np.array([begin for _, begin, _ in tails], dtype=np.int64)
        ends = np.array([end for _, _, end in tails], dtype=np.int64)
        lengths = ends - begins
        longest = int(lengths.max())
        positions = np.minimum(begins[:, None] + np.arange(longest), ends[:, None] - 1)
        first_blocks = begins // self._size
        width = int(((ends - 1) // self._size - first_blocks).max()) + 1
        table = np.zeros((len(tails), width), dtype=np.int64)
        for place, (index, begin, _) in enumerate(tails):
            some = self._spans[index].blocks[begin // self._size : begin // self._size + width]
            table[place, : len(some)] = some
        blocks = np.take_along_axis(table, positions // self._size - first_blocks[:, None], axis=1)
        slots = blocks * self._size + positions % self._size
        return Padded([self.first_row[index] for index, _, _ in tails], slots, lengths)

    # From positions to slots

    def _slots(self, span: Span, begin: int, end: int, *, one: bool = False) -> Slots:
        """Return where positions begin..end-1 lie; with `one`, as a single run or scattered."""
        size = self._size
        first_block = begin // size
        runs = _runs(span.blocks[first_block : -(-end // size)])
        if len(runs) > 1 and (one or self._scattered or (end - begin) < len(runs) * self._call_slots):
            return Slots(scattered=self._every_slot(span, begin, end))
        slots = [[first * size, last * size] for first, last in runs]
        slots[0][0] += begin - first_block * size
        slots[-1][1] -= -end % size
        return Slots(runs=tuple((first, last) for first, last in slots))

    def _every_slot(self, span: Span, begin: int, end: int) -> Integers:
        first_block = begin // self._size
        blocks = np.array(span.blocks[first_block : -(-end // self._size)], dtype=np.int64)
        slots = (blocks[:, None] * self._size + np.arange(self._size)).ravel()
        return slots[begin - first_block * self._size : end - first_block * self._size]

    @staticmethod
    def _split(first: int, last: int, slots: Slots) -> list[Read]:
        """Return a read per run."""
        if len(slots.runs) < 2:
            return [Read(first, last, slots)]
        return [Read(first, last, Slots(runs=(run,))) for run in slots.runs]


def _common(one: Sequence[int], other: Sequence[int], low: int, high: int) -> int:
    """Return the largest n <= `high` with one[low:n] == other[low:n], comparing slices in C."""
    while low < high:
        if one[low:high] == other[low:high]:
            return high
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
            if high - low == 1:
                break
        else:
            high = middle
    return low


def _runs(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Return the maximal runs (first, last + 1) of adjacent ids, in order."""
    ids = np.array(blocks, dtype=np.int64)
    breaks = np.flatnonzero(np.diff(ids) != 1)
    if not breaks.size:
        return [(blocks[0], blocks[-1] + 1)]
    firsts = ids[np.concatenate(([0], breaks + 1))].tolist()
    lasts = ids[np.concatenate((breaks, [len(ids) - 1]))].tolist()
    return [(first, last + 1) for first, last in zip(firsts, lasts, strict=True)]
