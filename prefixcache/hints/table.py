"""Which blocks a replica has, in a few bytes each: a cuckoo filter that is a plain string in Redis.

A block is known by the first 8 bytes of its hash: 4 say where it may be (one of two
buckets), 4 are its mark there. A reader needs nothing but the string, two ranges of it
at most for a block. At 4.7 bytes per block that the pool has room for it never grows,
whatever is evicted and stored, and what a replica wrote goes away in one piece.

Two blocks whose marks and buckets agree are taken for one another: with 16 marks in two
buckets of 8, about 4 of 10^9 lookups of one block find what is not there. A hint that is
wrong costs time, never a wrong answer.

B. Fan, D. G. Andersen, M. Kaminsky, M. D. Mitzenmacher: Cuckoo Filter: Practically Better
Than Bloom (CoNEXT 2014). The second bucket is (mark - first) mod buckets, which leads
back by the same formula and needs no power of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from struct import Struct

MARKS = 8
"""Marks in a bucket."""
MARK_BYTES = 4
BUCKET_BYTES = MARKS * MARK_BYTES
LOAD = 0.85
"""How full a table may become. Above 0.95 no room is found any more; below 0.9 few marks have to move for another."""
SPARE = 8
"""Buckets on top of that, without which the table of a small pool may fill up unevenly."""
MAX_MOVES = 200

_NAME = Struct("<II8x")  # of a 16-byte hash: bucket, mark
_MARK = Struct("<I")
_PAIR = Struct("<II")


class Table:
    """The marks of at most `blocks` blocks.

    `dirty` are the buckets changed since the caller took them, in the order in which
    they changed first.
    """

    def __init__(self, blocks: int) -> None:
        self.buckets = math.ceil(blocks / (MARKS * LOAD)) + SPARE
        self.data = bytearray(self.buckets * BUCKET_BYTES)
        self.dirty: dict[int, None] = {}
        self.overflows = 0
        """Blocks for which no room was found; nobody will hear of them."""
        self._counts = bytearray(self.buckets)
        self._size = 0
        self._turn = 0

    def __len__(self) -> int:
        return self._size

    def add(self, hashes: bytes) -> None:
        """Add blocks by their hashes, 16 bytes each, joined. One that is there already is there twice then."""
        buckets, counts, data, dirty = self.buckets, self._counts, self.data, self.dirty
        for place, mark in _NAME.iter_unpack(hashes):
            mark = mark or 1  # 0 is an empty slot
            bucket = place % buckets
            other = (mark - bucket) % buckets
            if counts[other] < counts[bucket]:
                bucket = other
            count = counts[bucket]
            if count == MARKS:
                self._make_room(bucket, mark)
                continue
            _MARK.pack_into(data, bucket * BUCKET_BYTES + count * MARK_BYTES, mark)
            counts[bucket] = count + 1
            self._size += 1
            dirty[bucket] = None

    def discard(self, hashes: bytes) -> None:
        """Remove blocks by their hashes; what is not there is passed over."""
        for place, mark in _NAME.iter_unpack(hashes):
            mark = mark or 1
            bucket = place % self.buckets
            if not self._remove(bucket, mark):
                self._remove((mark - bucket) % self.buckets, mark)

    def clear(self) -> None:
        """Remove everything. Nothing is dirty then: a new table is empty."""
        self.data[:] = bytes(len(self.data))
        self._counts[:] = bytes(self.buckets)
        self._size = self.overflows = 0
        self.dirty = {}

    def holds(self, hashes: bytes) -> list[bool]:
        """Say of each block whether it is (or seems to be) here."""
        found = []
        for place, mark in _NAME.iter_unpack(hashes):
            mark = mark or 1
            bucket = place % self.buckets
            other = (mark - bucket) % self.buckets
            found.append(self._slot(bucket, mark) >= 0 or self._slot(other, mark) >= 0)
        return found

    def patches(self, buckets: Iterable[int]) -> bytes:
        """Return what those buckets are now, as the script that publishes takes it.

        Buckets that lie side by side are one piece: its first bucket, how many, their bytes.
        """
        pieces = []
        for first, count in _runs(sorted(buckets)):
            pieces.append(_PAIR.pack(first, count))
            pieces.append(bytes(self.data[first * BUCKET_BYTES : (first + count) * BUCKET_BYTES]))
        return b"".join(pieces)

    def any_in(self, buckets: range) -> bool:
        """Say whether there is a block in any of neighbouring buckets."""
        return any(self._counts[buckets.start : buckets.stop])

    def _slot(self, bucket: int, mark: int) -> int:
        """Return where in `data` a bucket has a mark, or -1."""
        start = bucket * BUCKET_BYTES
        end = start + BUCKET_BYTES
        wanted = _MARK.pack(mark)
        found = self.data.find(wanted, start, end)
        while found >= 0 and (found - start) % MARK_BYTES:  # across two marks
            found = self.data.find(wanted, found + 1, end)
        return found

    def _remove(self, bucket: int, mark: int) -> bool:
        slot = self._slot(bucket, mark)
        if slot < 0:
            return False
        self._counts[bucket] -= 1
        self._size -= 1
        last = bucket * BUCKET_BYTES + self._counts[bucket] * MARK_BYTES
        self.data[slot : slot + MARK_BYTES] = self.data[last : last + MARK_BYTES]
        self.data[last : last + MARK_BYTES] = bytes(MARK_BYTES)
        self.dirty[bucket] = None
        return True

    def _make_room(self, bucket: int, mark: int) -> None:
        """Put a mark in the place of another, that in its other bucket, and so on until one is not full."""
        for _ in range(MAX_MOVES):
            self._turn = (self._turn + 1) % MARKS
            slot = bucket * BUCKET_BYTES + self._turn * MARK_BYTES
            (moved,) = _MARK.unpack_from(self.data, slot)
            _MARK.pack_into(self.data, slot, mark)
            self.dirty[bucket] = None
            mark, bucket = moved, (moved - bucket) % self.buckets
            count = self._counts[bucket]
            if count < MARKS:
                _MARK.pack_into(self.data, bucket * BUCKET_BYTES + count * MARK_BYTES, mark)
                self._counts[bucket] = count + 1
                self._size += 1
                self.dirty[bucket] = None
                return
        self.overflows += 1


def query(hashes: bytes) -> bytes:
    """Return what a lookup sends for a chain of blocks, 8 bytes each, from their hashes of 16."""
    return b"".join([_PAIR.pack(place, mark or 1) for place, mark in _NAME.iter_unpack(hashes)])


def _runs(buckets: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Return ascending numbers as (first, how many) of those that follow each other."""
    first = count = 0
    for bucket in buckets:
        if count and bucket == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = bucket, 1
    if count:
        yield first, count
