"""The fixed set of block ids: which are free, and which to hand out next.

Adjacent ids are memory that attention reads as one run, so the pool keeps its free
ids as runs and hands out the run that follows a sequence's last block if it can,
else the shortest run that is long enough. A sequence that will grow says by how
much (`room`); the ids behind it are then handed to others only when nothing else is
left of that run.

Who references a block that is not free is the tree's and the leases' business.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import pairwise


class BlockPool:
    """`total` block ids from 0, all free at first. Allocating and freeing cost O(log runs) per run."""

    def __init__(self, total: int) -> None:
        assert total > 0
        self.total = total
        self.free_count = total
        self._ids = list(range(total))  # one int object per id, whoever holds it
        self._length_at: dict[int, int] = {}  # first id of a free run -> its length
        self._start_before: dict[int, int] = {}  # id behind a free run -> its first id
        self._by_length: list[tuple[int, int]] = []  # (length, first id), ascending
        self._growing: dict[int, int] = {}  # id behind a growing sequence -> ids it may want
        self._add(0, total)

    def allocate(self, count: int, *, after: int | None = None, room: int = 0) -> list[int]:
        """Take `count` free ids; the caller has made sure that there are so many.

        `after` is the last id of the sequence that they will extend; `room` is how
        many more it may want later.
        """
        assert 0 <= count <= self.free_count
        taken: list[int] = []
        if after is not None:
            self._growing.pop(after + 1, None)
            length = self._length_at.get(after + 1)
            if length and count:
                self._take(after + 1, 0, min(length, count), taken)
        while len(taken) < count:
            run, offset, length = self._choose(count - len(taken), room)
            self._take(run, offset, length, taken)
        if room and count:
            self._growing[taken[-1] + 1] = room
        return taken

    def free(self, ids: list[int]) -> None:
        """Give ids back; they must not be free already."""
        self.free_count += len(ids)
        growing = self._growing
        start = previous = -2
        for block in sorted(ids):
            if growing:
                growing.pop(block + 1, None)
            if block != previous + 1:
                if start >= 0:
                    self._add(start, previous + 1 - start)
                start = block
            previous = block
        if start >= 0:
            self._add(start, previous + 1 - start)

    def settle(self, last: int) -> None:
        """The sequence that ends with id `last` grows no more."""
        self._growing.pop(last + 1, None)

    def runs(self) -> list[tuple[int, int]]:
        """Return the free runs as (first id, length), ascending."""
        return sorted(self._length_at.items())

    def check(self) -> None:
        """Verify that the run indexes agree, that runs are maximal, and that counts add up."""
        runs = self.runs()
        assert sum(length for _, length in runs) == self.free_count
        assert self._start_before == {start + length: start for start, length in runs}
        assert self._by_length == sorted((length, start) for start, length in runs)
        for (start, length), (following, _) in pairwise(runs):
            assert length > 0 and start + length < following, "free runs touch or overlap"

    def _choose(self, count: int, room: int) -> tuple[int, int, int]:
        """Return (free run, offset in it, length) to take: the best fit, behind a growing neighbour's room."""
        index = bisect_left(self._by_length, (count + room,))
        if index == len(self._by_length):
            index = min(bisect_left(self._by_length, (count,)), len(self._by_length) - 1)
        length, run = self._by_length[index]
        if length <= count:
            return run, 0, length
        return run, min(self._growing.get(run, 0), length - count), count

    def _take(self, run: int, offset: int, count: int, taken: list[int]) -> None:
        """Move `count` ids of a free run to `taken`."""
        length = self._length_at.pop(run)
        del self._start_before[run + length]
        del self._by_length[bisect_left(self._by_length, (length, run))]
        if offset:
            self._insert(run, offset)
        if offset + count < length:
            self._insert(run + offset + count, length - offset - count)
        taken += self._ids[run + offset : run + offset + count]
        self.free_count -= count

    def _add(self, start: int, length: int) -> None:
        """Insert a free run, joined with its free neighbours."""
        before = self._start_before.pop(start, None)
        if before is not None:
            joined = self._length_at.pop(before)
            del self._by_length[bisect_left(self._by_length, (joined, before))]
            start, length = before, length + joined
        behind = self._length_at.pop(start + length, None)
        if behind is not None:
            del self._start_before[start + length + behind]
            del self._by_length[bisect_left(self._by_length, (behind, start + length))]
            length += behind
        self._insert(start, length)

    def _insert(self, start: int, length: int) -> None:
        self._length_at[start] = length
        self._start_before[start + length] = start
        insort(self._by_length, (length, start))
