"""Which block ids the pool hands out, and that it knows what is free."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from prefixcache.pool import BlockPool


def test_every_block_is_free_at_first_and_can_be_taken_once() -> None:
    """All ids from 0 are handed out, none twice, and coming back they are one run again."""
    pool = BlockPool(10)
    taken = pool.allocate(4) + pool.allocate(6)
    assert sorted(taken) == list(range(10))
    assert pool.free_count == 0 and pool.runs() == []
    pool.free(taken[::-1])
    assert pool.free_count == 10 and pool.runs() == [(0, 10)]
    pool.check()


def test_nothing_is_allocated_for_nothing() -> None:
    """Zero blocks may be asked for, even of an empty pool."""
    pool = BlockPool(1)
    pool.allocate(1)
    assert pool.allocate(0) == []
    assert pool.allocate(0, after=0, room=3) == []


def test_blocks_of_one_allocation_are_adjacent_if_a_run_is_long_enough() -> None:
    """A longer run is cut rather than two shorter ones joined."""
    pool = BlockPool(20)
    first, second, _ = pool.allocate(3), pool.allocate(3), pool.allocate(3)
    pool.free(first)
    assert second == [3, 4, 5]
    assert pool.allocate(5) == [9, 10, 11, 12, 13]


def test_the_shortest_run_that_is_long_enough_is_taken() -> None:
    """Small allocations do not eat up the long runs."""
    pool = BlockPool(20)
    a, _, c, _ = pool.allocate(4), pool.allocate(1), pool.allocate(2), pool.allocate(1)
    pool.free(a + c)
    assert pool.runs() == [(0, 4), (5, 2), (8, 12)]
    assert pool.allocate(2) == [5, 6]
    assert pool.allocate(3) == [0, 1, 2]


def test_a_sequence_goes_on_behind_its_last_block() -> None:
    """What follows the last id is preferred to every other run."""
    pool = BlockPool(20)
    a = pool.allocate(2)
    hole, _ = pool.allocate(2), pool.allocate(2)
    pool.free(hole)
    assert pool.allocate(1, after=a[-1]) == [2]
    assert pool.allocate(3, after=2) == [3, 6, 7]


def test_an_allocation_larger_than_every_run_takes_the_longest_ones() -> None:
    """Fragmentation never makes blocks unavailable."""
    pool = BlockPool(9)
    ids = pool.allocate(9)
    pool.free([ids[0], *ids[2:4], *ids[5:9]])
    assert pool.allocate(6) == [5, 6, 7, 8, 2, 3]
    assert pool.allocate(1) == [0]


def test_room_to_grow_is_left_behind_a_sequence_while_there_is_other_space() -> None:
    """Two growing sequences stay contiguous, each in its own part of the run."""
    pool = BlockPool(40)
    a = pool.allocate(2, room=5)
    b = pool.allocate(2, room=5)
    for _ in range(5):
        a += pool.allocate(1, after=a[-1])
        b += pool.allocate(1, after=b[-1])
    assert a == list(range(a[0], a[0] + 7))
    assert b == list(range(b[0], b[0] + 7))


def test_a_sequence_that_will_grow_starts_where_it_can() -> None:
    """A run that also has its room is preferred to one that just fits."""
    pool = BlockPool(20)
    short, _ = pool.allocate(2), pool.allocate(1)
    pool.free(short)
    assert pool.allocate(2, room=5) == [3, 4]
    assert pool.allocate(2, room=50) == [0, 1]


def test_room_is_a_preference_only() -> None:
    """When nothing else is left, blocks kept for growth are handed out too."""
    pool = BlockPool(6)
    a = pool.allocate(2, room=4)
    b = pool.allocate(4)
    assert sorted(a + b) == list(range(6))


def test_a_settled_sequence_keeps_no_room() -> None:
    """After `settle`, the next allocation is adjacent to it."""
    pool = BlockPool(20)
    a = pool.allocate(2, room=5)
    pool.settle(a[-1])
    assert pool.allocate(2) == [2, 3]


def test_wishes_for_room_do_not_pile_up() -> None:
    """A sequence that frees its blocks without settling leaves nothing behind."""
    pool = BlockPool(8)
    for _ in range(50):
        pool.free(pool.allocate(3, room=4))
    assert not pool._growing
    grown = pool.allocate(1, room=7)
    for room in range(6, 0, -1):
        grown += pool.allocate(1, after=grown[-1], room=room)
    assert len(pool._growing) == 1


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    st.integers(1, 30),
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 4), st.booleans(), st.integers(0, 5)), max_size=40),
)
def test_any_sequence_of_calls_keeps_the_books_right(total: int, calls: list[tuple[int, int, bool, int]]) -> None:
    """Whatever is allocated, extended and freed: no id is given twice, none is lost, runs stay maximal."""
    pool = BlockPool(total)
    held: list[list[int]] = []
    for count, room, free, which in calls:
        if free and held:
            pool.free(held.pop(which % len(held)))
        elif count <= pool.free_count:
            owner = held[which % len(held)] if held and which < 3 else []
            owner += pool.allocate(count, after=owner[-1] if owner else None, room=room)
            if not any(owner is one for one in held):
                held.append(owner)
        pool.check()
        ids = [block for one in held for block in one]
        assert len(ids) == len(set(ids)) == total - pool.free_count
        assert all(0 <= block < total for block in ids)
