"""The size of prefill chunks, on machines whose costs are known (see tests/engine/machine.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine.pace import MIN_TOKENS, TRUST, Load, Pace
from tests.engine.machine import Machine

LIMIT = 0.25
MOST = 2048
SIZE = 16


def streams(count: int, context: int = 500) -> Load:
    return Load(stream_rows=count, stream_keys=count * context)


@dataclass
class Prefilled:
    """What happened while a prompt was prefilled: tokens and seconds of each step."""

    tokens: list[int]
    seconds: list[float]

    def rate(self, after: int = 0) -> float:
        """Tokens per second, without the first `after` steps."""
        return sum(self.tokens[after:]) / sum(self.seconds[after:])


def decode(pace: Pace, machine: Machine, count: int, steps: int, context: int = 500) -> None:
    for i in range(steps):
        load = streams(count, context + i)
        pace.observe(load, machine.run(load))


def prefill(
    pace: Pace, machine: Machine, count: int, start: int = 0, length: int = 30_000, context: int = 500
) -> Prefilled:
    """Prefill one prompt beside `count` streams."""
    done = Prefilled([], [])
    position, end = start, start + length
    while position < end:
        load = streams(count, context)
        tokens = pace.chunk(load, position, end - position)
        assert 0 < tokens <= MOST - count
        load.add_prompt(position, tokens)
        done.tokens.append(tokens)
        done.seconds.append(machine.run(load))
        pace.observe(load, done.seconds[-1])
        position += tokens
    return done


def warm(machine: Machine, limit: float = LIMIT) -> Pace:
    """A pace that has seen a short prompt and eight streams."""
    pace = Pace(limit, MOST, SIZE)
    prefill(pace, machine, 0, length=300)
    decode(pace, machine, 8, 20)
    return pace


def test_a_long_prompt_beside_streams() -> None:
    """Steps keep to the limit from the first on, and prefill is nearly as fast as the limit permits."""
    machine = Machine()
    pace = warm(machine)
    done = prefill(pace, machine, 8)
    assert max(done.seconds) < 1.15 * LIMIT
    assert max(done.seconds[3:]) < LIMIT
    assert done.rate() > 0.95 * machine.rate(streams(8), 0, 30_000, LIMIT)


def test_alone_a_prompt_is_computed_in_the_largest_steps() -> None:
    """With nobody streaming there is nothing to wait for, whatever a step takes."""
    machine = Machine()
    done = prefill(warm(machine), machine, 0)
    assert set(done.tokens[:-2]) == {MOST}
    assert max(done.seconds) > 4 * LIMIT


def test_no_limit() -> None:
    """0 is no limit: chunks fill the step, up to the end of a block."""
    machine = Machine()
    pace = warm(machine, limit=0.0)
    assert pace.chunk(streams(8), 0, 30_000) == MOST - SIZE


def test_a_careful_start() -> None:
    """Nothing known, the first chunk is the least; then chunks grow without a step over the limit."""
    pace = Pace(LIMIT, MOST, SIZE)
    done = prefill(pace, Machine(), 8)
    assert done.tokens[0] == MIN_TOKENS
    assert max(done.tokens[:6]) > 500
    assert max(done.seconds) < LIMIT


machines = st.builds(
    Machine,
    step=st.floats(0.001, 0.1),
    row=st.floats(1e-5, 1e-3),
    prompt_key=st.floats(1e-9, 1e-6),
    stream_key=st.floats(1e-9, 5e-6),
)
phases = st.lists(
    st.tuples(
        st.sampled_from([0, 0, 1, 4, 8, 32, 64]),  # streams
        st.sampled_from([0, 0, 0, 1000, 30_000]),  # cached
        st.sampled_from([5, 20, 60, 300, 1000, 3000, 20_000]),  # computed
        st.sampled_from([1, 3, 50]),  # decode steps before
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=150)
@given(machine=machines, limit=st.sampled_from([0.05, 0.1, 0.25, 0.5, 1.0]), phases=phases)
def test_any_machine_any_history(machine: Machine, limit: float, phases: list[tuple[int, int, int, int]]) -> None:
    """After three steps of a prompt the limit holds; those are never far over it; after ten the rate is good."""
    pace = Pace(limit, MOST, SIZE)
    for count, start, length, decoded in phases:
        load = streams(count)
        load.add_prompt(start + length, MIN_TOKENS)
        assume(machine.exactly(load) < 0.5 * limit)
        decode(pace, machine, max(count, 1), decoded)
        done = prefill(pace, machine, count, start, length)
        if count:
            assert max(done.seconds) < (TRUST + 0.5) * limit  # and what the streams cost
            assert all(seconds < 1.3 * limit for seconds in done.seconds[3:])
        if count and len(done.tokens) > 15:
            begun = start + sum(done.tokens[:10])
            assert done.rate(after=10) > 0.8 * machine.rate(streams(count), begun, start + length, limit)


@pytest.mark.parametrize("factor", [3.0, 1 / 3])
def test_the_machine_changes(factor: float) -> None:
    """A machine that becomes slower is followed within three steps, a faster one is soon made use of."""
    machine = Machine(slower=lambda steps: factor if steps > 60 else 1.0)
    pace = warm(machine)
    before = machine.steps
    done = prefill(pace, machine, 8)
    change = 60 - before
    assert change > 10
    over = [i for i, seconds in enumerate(done.seconds) if seconds > 1.3 * LIMIT]
    assert all(change <= i < change + 3 for i in over)
    assert len(over) == (3 if factor > 1 else 0)
    settled = done.seconds[change + 10 : -2]
    assert 0.7 * LIMIT < min(settled) <= max(settled) < 1.1 * LIMIT


def test_what_was_known_before_a_change_counts_less_and_less() -> None:
    """On a machine that has become slower, another prompt's first steps are not planned as on the old one."""
    machine = Machine(slower=lambda steps: 3.0 if steps > 60 else 1.0)
    pace = warm(machine)
    prefill(pace, machine, 8)
    decode(pace, machine, 8, 10)
    done = prefill(pace, machine, 8)
    assert done.seconds[0] < 2.5 * LIMIT
    assert max(done.seconds[1:3]) < 1.9 * LIMIT
    assert max(done.seconds[3:]) < 1.1 * LIMIT


def test_noise() -> None:
    """On a machine whose steps vary by a fifth, the limit is what a step takes at most, by and large."""
    machine = Machine(noise=0.2)
    done = prefill(warm(machine), machine, 8)
    mean = sum(done.seconds) / len(done.seconds)
    assert 0.8 * LIMIT < mean < LIMIT
    assert sum(seconds > 1.3 * LIMIT for seconds in done.seconds) < 0.07 * len(done.seconds)


def test_outliers_are_outliers() -> None:
    """Every tenth step takes ten times as long; the others are as large as without them, nearly."""
    outlier: Callable[[int], float] = lambda steps: 10.0 if steps % 10 == 0 else 1.0  # noqa: E731
    machine, calm = Machine(slower=outlier), Machine()
    done, reference = prefill(warm(machine), machine, 8), prefill(warm(calm), calm, 8)
    usual = sorted(done.seconds)[: -len(done.seconds) // 10 - 1]
    assert max(usual) < 1.3 * LIMIT
    assert len(done.tokens) < 1.1 * len(reference.tokens)


@pytest.mark.parametrize("length", [5, 300, 2048])
def test_a_slow_first_step(length: int) -> None:
    """The first step of a process may take much longer than it should; the pace recovers."""
    machine = Machine(slower=lambda steps: 10.0 if steps == 1 else 1.0)
    pace = Pace(LIMIT, MOST, SIZE)
    prefill(pace, machine, 0, length=length)
    done = prefill(pace, machine, 8)
    assert max(done.seconds) < 1.3 * LIMIT
    assert done.rate() > 0.9 * machine.rate(streams(8), 0, 30_000, LIMIT)


def test_many_short_steps_do_not_wash_away_what_is_known_of_long_ones() -> None:
    """After thousands of steps of streams and short prompts, the first chunk of a long one is right at once."""
    machine = Machine(noise=0.05)
    pace = warm(machine)
    prefill(pace, machine, 8, length=10_000)
    for i in range(200):
        decode(pace, machine, 8, 20)
        prefill(pace, machine, 8, length=3 + i % 30)
    done = prefill(pace, machine, 8)
    assert all(0.5 * LIMIT < seconds < 1.3 * LIMIT for seconds in done.seconds[:-1])


def test_streams_that_come_and_go() -> None:
    """More streams leave less for prompts; the limit is that of the whole step."""
    machine = Machine()
    pace = warm(machine)
    for count in (8, 64, 1, 32):
        decode(pace, machine, count, 3, context=1000)
        done = prefill(pace, machine, count, length=8000, context=1000)
        assert max(done.seconds) < 1.15 * LIMIT
        assert sorted(done.seconds)[len(done.seconds) // 2] > 0.8 * LIMIT


@pytest.mark.parametrize("machine", [Machine(), Machine(step=0.4)])
def test_progress_wins(machine: Machine) -> None:
    """Where streams alone take longer than the limit, prompts get a third of the time: half of what streams take."""
    alone = machine.exactly(streams(8))
    pace = warm(machine, limit=alone / 2)
    done = prefill(pace, machine, 8, length=3000)
    assert max(done.seconds) < 1.6 * alone
    assert done.rate() > machine.rate(streams(8), 0, 3000, 100.0) / 3.3


def test_the_least_chunk() -> None:
    """However long a row takes, a step takes MIN_TOKENS of a prompt."""
    machine = Machine(row=0.01)
    done = prefill(warm(machine), machine, 8, length=960)
    assert set(done.tokens) == {MIN_TOKENS}
    assert min(done.seconds) > 1.3 * LIMIT


def test_chunks_end_with_blocks_and_prompts() -> None:
    """A cut is at the end of a block; a prompt's end is neither left alone nor cut into crumbs."""
    pace = Pace(LIMIT, MOST, SIZE)
    assert pace.chunk(Load(), 0, 5000) == 2048
    assert pace.chunk(Load(), 5, 5000) == 2048 - 5
    assert pace.chunk(Load(), 0, 2048) == 2048
    assert pace.chunk(Load(), 0, 2050) == 2016, "34 tokens more cost what 2 would"
    assert pace.chunk(streams(8), 0, 36) == 36, "four more than planned save a step"
    assert pace.chunk(streams(8), 0, 37) == 32
    assert pace.chunk(streams(8), 3, 100) == 29


def test_full_steps() -> None:
    """Behind another prompt a chunk is at least a block, or the prompt's end; the first gets what there is."""
    pace = Pace(LIMIT, MOST, SIZE)
    load = Load(prompt_rows=MOST - 10)
    assert pace.chunk(load, 0, 100) == 0
    assert pace.chunk(load, 0, 10) == 10
    assert pace.chunk(Load(prompt_rows=MOST), 0, 1) == 0
    assert pace.chunk(streams(MOST - 10), 0, 100) == 10
    machine = Machine()
    pace = warm(machine)
    prefill(pace, machine, 8)
    load = streams(8)
    load.add_prompt(0, pace.chunk(load, 0, 30_000))
    assert pace.chunk(load, 0, 30_000) == 0, "the first has taken all that fits below the limit"
    load = streams(8)
    load.add_prompt(0, 100)
    both = 100 + pace.chunk(load, 100, 30_000)
    assert abs(both - pace.chunk(streams(8), 0, 30_000)) <= SIZE, "two prompts share what one would get"


@given(
    observed=st.lists(
        st.tuples(
            st.integers(0, 64), st.integers(0, 50_000), st.integers(0, 2048), st.integers(0, 30_000),
            st.floats(0.0, 1e6, allow_nan=False),
        ),
        max_size=30,
    ),
    limit=st.floats(0.0, 10.0),
    block=st.sampled_from([1, 4, 16, 1024]),
    planned=st.tuples(st.integers(0, 64), st.integers(0, 50_000), st.integers(0, 300)),
    start=st.integers(0, 100_000),
    rest=st.integers(1, 100_000),
)  # fmt: skip
def test_whatever_is_observed(
    observed: list[tuple[int, int, int, int, float]],
    limit: float,
    block: int,
    planned: tuple[int, int, int],
    start: int,
    rest: int,
) -> None:
    """Sense or nonsense: a chunk is within the prompt and the step, the first of a step is never empty."""
    pace = Pace(limit, MOST, block)
    for rows, keys, tokens, position, seconds in observed:
        load = Load(stream_rows=rows, stream_keys=keys)
        load.add_prompt(position, tokens)
        pace.observe(load, seconds)
        count, context, others = planned
        load = Load(stream_rows=count, stream_keys=context)
        if others:
            load.add_prompt(0, others)
        chunk = pace.chunk(load, start, rest)
        assert (0 if others else 1) <= chunk <= min(rest, MOST - load.rows)
        if not others and chunk < rest:
            assert chunk >= MIN_TOKENS or (start + chunk) % block == 0
