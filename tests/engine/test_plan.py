"""The plan of a step: every row reads exactly the keys it must see, each of them once."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.plan import BAND_ROWS, Band, Causal, Padded, Plan, Read, Reads, Slots, Span

SIZE = 4


def every(slots: Slots) -> list[int]:
    """All slots, in order."""
    if slots.scattered is not None:
        assert not slots.runs
        return [int(slot) for slot in slots.scattered]
    return [slot for first, last in slots.runs for slot in range(first, last)]


def seen(plan: Plan, reads: Reads, window: int | None) -> list[Counter[int]]:
    """Simulate the reads: how often each row sees each slot. Causal reads see what their rows write."""
    rows: list[Counter[int]] = [Counter() for _ in range(plan.rows)]
    written = plan.slots.tolist()
    for read in [*reads.base, *reads.further]:
        if isinstance(read, Read):
            for row in range(read.first, read.last):
                rows[row].update(every(read.slots))
        elif isinstance(read, Causal):
            for row in range(read.first, read.last):
                rows[row].update(written[read.first : row + 1])
        elif isinstance(read, Padded):
            for row, slots, length in zip(read.rows, read.slots.tolist(), read.lengths.tolist(), strict=True):
                assert set(slots[length:]) <= set(slots[:length]), "padding must be finite numbers"
                rows[row].update(slots[:length])
        else:
            assert window is not None
            slots = every(read.slots)
            for row in range(read.first, read.last):
                place = read.offset + row - read.first
                rows[row].update(slots[max(place - window + 1, 0) : place + 1])
    return rows


def verify(spans: list[Span], call_slots: int, window: int | None) -> None:
    """Check order, positions, slots and what every row reads."""
    plan = Plan(spans, SIZE, call_slots)
    reads = plan.reads(window)
    assert sorted(plan.order) == list(range(len(spans)))
    assert plan.rows == sum(span.length for span in spans)
    counts = seen(plan, reads, window)
    for span, first in zip(spans, plan.first_row, strict=True):
        for row in range(first, first + span.length):
            position = span.start + row - first
            assert plan.positions[row] == position
            begin = max(position + 1 - window, 0) if window else 0
            table = [span.blocks[p // SIZE] * SIZE + p % SIZE for p in range(position + 1)]
            assert plan.slots[row] == table[-1]
            assert counts[row] == Counter(table[begin:])
    places = [row for read in reads.base for row in (read.rows if isinstance(read, Padded) else _range(read))]
    permutation = reads.permutation()
    assert sorted(places) == list(range(plan.rows)), "base reads cover every row once"
    if permutation is None:
        assert places == sorted(places)
    else:
        assert [places[place] for place in permutation.tolist()] == list(range(plan.rows))


def _range(read: Read | Causal | Band) -> range:
    return range(read.first, read.last)


@st.composite
def steps(draw: st.DrawFn) -> list[Span]:
    """Return spans whose block tables branch like a tree, with ids adjacent or not."""
    shuffled = draw(st.booleans())
    ids = list(range(400))
    if shuffled:
        random.Random(draw(st.integers(0, 9))).shuffle(ids)
    tables: list[list[int]] = []
    spans: list[Span] = []
    for _ in range(draw(st.integers(1, 9))):
        table: list[int] = []
        related = draw(st.booleans())
        if tables and related:
            parent = tables[draw(st.integers(0, len(tables) - 1))]
            table = parent[: draw(st.integers(0, len(parent) - 1))]
        shared = len(table) * SIZE
        start = shared + draw(st.integers(0, 20))
        length = draw(st.sampled_from([1, 1, 1, 2, 5, 11]))
        missing = -(-(start + length) // SIZE) - len(table)
        table = table + [ids.pop() for _ in range(missing + draw(st.integers(0, 2)))]
        tables.append(table)
        spans.append(Span(start, length, table))
    return spans


@settings(max_examples=400, deadline=None)
@given(steps(), st.sampled_from([1, 3, 8, 1000]), st.sampled_from([None, 1, 3, 9, 20, 1000]))
def test_every_row_reads_its_keys_once(spans: list[Span], call_slots: int, window: int | None) -> None:
    """Whatever is shared, scattered, padded or cut by a window."""
    verify(spans, call_slots, window)


def test_shared_run_is_read_once() -> None:
    """Sequences that share blocks read them in one call, and those that share more, again in one call."""
    system, tools = [0, 1, 2, 3], [10, 11]
    spans = [
        Span(24, 1, system + tools + [20]),
        Span(17, 1, system + [30]),
        Span(25, 1, system + tools + [40]),
        Span(3, 1, [50]),
    ]
    plan = Plan(spans, SIZE, call_slots=1)
    reads = plan.reads()
    assert [(read.last - read.first, read.slots.runs) for read in reads.further] == [(3, ((0, 16),)), (2, ((40, 48),))]
    verify(spans, 1, None)


def test_little_sharing_is_not_worth_a_call() -> None:
    """Two single rows that share a block of 4 read it with their own ones if a call costs 100 slots."""
    spans = [Span(8, 1, [0, 1, 2]), Span(8, 1, [0, 3, 4])]
    reads = Plan(spans, SIZE, call_slots=100).reads()
    assert reads.further == []


def test_sharing_ends_before_the_first_chunk() -> None:
    """A block that one of the sequences is only writing now is not part of the shared run."""
    spans = [Span(8, 8, [0, 1, 2, 3]), Span(16, 1, [0, 1, 2, 3, 4])]
    reads = Plan(spans, SIZE, call_slots=1).reads()
    assert reads.further[0].slots.runs == ((0, 8),)
    verify(spans, 1, None)


def test_adjacent_blocks_are_one_run() -> None:
    """Adjacent ids are read as one zero-copy run, cut to the positions that are valid."""
    plan = Plan([Span(37, 1, list(range(7, 20)))], SIZE, call_slots=8)
    (read,) = plan.reads().base
    assert isinstance(read, Read) and read.slots == Slots(runs=((28, 66),))


def test_few_long_runs_are_read_one_by_one_and_many_short_ones_gathered() -> None:
    """It depends on how many slots can be copied in the time of a call."""
    halves = [*range(10), *range(50, 60)]
    reads = Plan([Span(79, 1, halves)], SIZE, call_slots=8).reads()
    assert [read.slots.runs for read in [*reads.base, *reads.further] if isinstance(read, Read)] == [
        ((0, 40),),
        ((200, 240),),
    ]
    (read,) = Plan([Span(79, 1, list(range(0, 40, 2)))], SIZE, call_slots=8).reads().base
    assert isinstance(read, Read) and read.slots.scattered is not None


def test_short_tails_are_padded_together_and_long_ones_are_not() -> None:
    """Eight short sequences make one padded read; a long one among them is read alone."""
    spans = [Span(5 + i % 2, 1, [2 * i, 2 * i + 1]) for i in range(8)] + [Span(1199, 1, list(range(20, 320)))]
    base = Plan(spans, SIZE, call_slots=16).reads().base
    assert sorted(type(read).__name__ for read in base) == ["Padded", "Read"]
    verify(spans, 16, None)


def test_a_long_chunk_in_a_window_is_cut_into_tiles() -> None:
    """No tile reads more than its rows and one window."""
    length, window = 3 * BAND_ROWS + 5, 50
    spans = [Span(60, length, list(range(-(-(60 + length) // SIZE))))]
    plan = Plan(spans, SIZE, call_slots=16)
    reads = plan.reads(window)
    assert [type(read) for read in reads.base] == [Band] * 4
    assert all(isinstance(read, Band) and len(every(read.slots)) < BAND_ROWS + window for read in reads.base)
    counts = seen(plan, reads, window)
    assert all(sum(count.values()) == window for count in counts)


def test_a_window_that_nobody_exceeds_changes_nothing() -> None:
    """The plan without a window is used as it is."""
    plan = Plan([Span(8, 4, [0, 1, 2])], SIZE, call_slots=1)
    assert plan.reads(12) is plan.reads(None)
    assert plan.reads(11) is not plan.reads(None)


@pytest.mark.parametrize("depth", [1, 50, 2000])
def test_long_shared_prefixes(depth: int) -> None:
    """Tables that agree for thousands of blocks are compared to the last one."""
    shared = list(range(depth))
    spans = [Span((depth + 1) * SIZE, 1, shared + [5000 + i, 6000 + i]) for i in range(3)]
    shared_read = Plan(spans, SIZE, call_slots=1).reads().further[0]
    assert shared_read == Read(0, 3, Slots(runs=((0, depth * SIZE),)))
