"""Which blocks a replica has, as a compact string: beside a plain collection of hashes."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixcache.hints.table import BUCKET_BYTES, MARKS, Table, query
from tests.prefixcache.replica import chain, each, marks


@given(blocks=st.integers(1, 600), rounds=st.integers(1, 8), share=st.floats(0.1, 1.0), seed=st.integers(0, 1 << 32))
def test_a_table_holds_what_was_added_and_not_removed(blocks: int, rounds: int, share: float, seed: int) -> None:
    """Also when all of its room is used, again and again by others."""
    dice = random.Random(seed)
    table = Table(blocks)
    held: list[bytes] = []
    for _ in range(rounds):
        added = each(dice.randbytes(16 * (blocks - len(held))))
        table.add(b"".join(added))
        held += added
        assert all(table.holds(b"".join(held)))
        assert table.overflows == 0
        dice.shuffle(held)
        gone = int(len(held) * share)
        table.discard(b"".join(held[:gone]))
        del held[:gone]
        assert len(table) == len(held)
        assert marks(table.data) == Counter(block[4:8] for block in held)
    assert all(table.holds(b"".join(held)))


def test_a_full_table_hardly_ever_finds_what_is_not_there() -> None:
    """Four of 10^9 lookups of a block are wrong; none of these 20,000 is."""
    table = Table(20_000)
    table.add(chain(1, 20_000))
    assert not any(table.holds(chain(2, 20_000)))


def test_what_was_never_added_is_passed_over_when_removed() -> None:
    """Nothing else is removed in its place."""
    table = Table(100)
    table.add(chain(1, 50))
    table.discard(chain(2, 50))
    assert len(table) == 50
    assert all(table.holds(chain(1, 50)))


def test_a_table_that_is_overfull_loses_blocks_and_counts_them() -> None:
    """More than the pool has is a mistake elsewhere; it costs hints, nothing else."""
    table = Table(100)
    slots = table.buckets * MARKS
    table.add(chain(1, slots + 20))
    assert table.overflows >= 20
    assert len(table) == slots + 20 - table.overflows
    assert sum(table.holds(chain(1, slots + 20))) == len(table)


def test_changed_buckets_make_another_table_the_same() -> None:
    """What is dirty, sent as patches in the order of its changes, is all that has changed."""
    table, copy = Table(1000), bytearray(Table(1000).data)
    for seed in range(5):
        table.add(chain(seed, 150))
        if seed:
            table.discard(chain(seed - 1, 150))
        _apply(copy, table.patches(table.dirty))
        table.dirty = {}
        assert copy == table.data


def test_buckets_side_by_side_are_one_patch() -> None:
    """A number and a count say where it lies, so long runs cost nothing but themselves."""
    table = Table(1000)
    table.add(chain(1, 1000))
    assert len(table.patches(range(10, 30))) == 8 + 20 * BUCKET_BYTES
    assert len(table.patches([3, 1, 2, 7])) == 2 * 8 + 4 * BUCKET_BYTES
    assert table.patches([]) == b""


def test_a_table_that_is_cleared_is_as_new() -> None:
    """Nothing is in it, and nothing dirty."""
    table = Table(50)
    table.add(chain(1, 50))
    table.clear()
    assert (len(table), table.dirty, any(table.data)) == (0, {}, False)
    table.add(chain(2, 50))
    assert all(table.holds(chain(2, 50)))


@pytest.mark.parametrize("place", [0, 1, 17])
def test_a_mark_of_zero_is_not_an_empty_slot(place: int) -> None:
    """A block whose mark would be that of an empty slot has another one, everywhere."""
    zero = place.to_bytes(4, "little") + bytes(12)
    table = Table(100)
    assert table.holds(zero) == [False]
    table.add(zero)
    assert table.holds(zero) == [True]
    assert query(zero)[4:] == b"\1\0\0\0"
    table.discard(zero)
    assert not any(table.data)


def _apply(copy: bytearray, patches: bytes) -> None:
    """Do what the script in Redis does."""
    at = 0
    while at < len(patches):
        bucket, count = (int.from_bytes(patches[at + i : at + i + 4], "little") for i in (0, 4))
        stop = at + 8 + count * BUCKET_BYTES
        copy[bucket * BUCKET_BYTES : (bucket + count) * BUCKET_BYTES] = patches[at + 8 : stop]
        at = stop
