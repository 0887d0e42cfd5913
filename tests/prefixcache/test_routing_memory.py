"""What a router remembers of what it sent: beginnings of prompts, within bounds."""

from __future__ import annotations

import math
from itertools import takewhile

from hypothesis import given
from hypothesis import strategies as st

from prefixcache.routing.memory import Memory, leading, names_of, shared
from prefixcache.tokens import chain_hashes

PROMPTS = st.lists(st.integers(0, 2), min_size=0, max_size=12).map(tuple)


def names(prompt: tuple[int, ...]) -> list[int]:
    """Names of the blocks of a prompt, a token each: equal for equal beginnings."""
    return list(names_of(chain_hashes(b"", bytes(prompt), 1)))


def naive(sent: list[tuple[float, list[int]]], prompt: list[int], since: float) -> int:
    """How many blocks from the first were part of something sent at `since` or later."""
    known = {name for time, other in sent if time >= since for name in other}
    return sum(1 for _ in takewhile(known.__contains__, prompt))


@given(st.lists(PROMPTS, max_size=20), PROMPTS, st.integers(0, 20))
def test_with_room_everything_that_was_sent_is_known(
    prompts: list[tuple[int, ...]], asked: tuple[int, ...], since: int
) -> None:
    """Also how long ago each block was last sent, as long as nothing had to be forgotten."""
    memory = Memory(10_000)
    for time, prompt in enumerate(prompts):
        memory.add(names(prompt), float(time))
    sent = [(float(time), names(prompt)) for time, prompt in enumerate(prompts)]
    assert memory.leading(names(asked)) == naive(sent, names(asked), -math.inf)
    assert memory.leading(names(asked), float(since)) == naive(sent, names(asked), float(since))


@given(st.lists(PROMPTS, min_size=1, max_size=60), st.integers(1, 30))
def test_without_room_the_oldest_is_forgotten_and_what_remains_is_a_beginning(
    prompts: list[tuple[int, ...]], blocks: int
) -> None:
    """Never more than the bound, never a block without those before it, and the last prompt as far as it fits."""
    memory = Memory(blocks)
    half = max(blocks // 2, 1)
    for time, prompt in enumerate(prompts):
        chain = names(prompt)
        memory.add(chain, float(time))
        assert len(memory) <= max(blocks, 2)
        assert memory.leading(chain, float(time)) == min(len(chain), half)
        for other in map(names, prompts[: time + 1]):
            known = [memory.leading([name]) for name in other]
            assert known == sorted(known, reverse=True), "a block is remembered without those before it"
            assert memory.leading(other) == sum(known)


def test_a_prompt_sent_again_outlives_those_that_are_not() -> None:
    """A system prompt that all share stays, whatever else comes and goes."""
    memory = Memory(40)
    system = tuple([1] * 5)
    for number in range(100):
        memory.add(names((*system, 2, *divmod(number, 10), 3, 4)), float(number))
    assert memory.leading(names((*system, 9, 9))) == 5
    assert memory.leading(names((*system, 2, 0, 0, 3, 4))) < 10, "the first one is long forgotten"


@given(PROMPTS, PROMPTS)
def test_shared_is_where_two_prompts_part(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    """Found by halving, as if compared one by one."""
    expected = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
    assert shared(names(a), names(b)) == expected


@given(st.integers(0, 100), st.integers(0, 100))
def test_leading_finds_the_end_of_what_is_known(length: int, known: int) -> None:
    """At any length, at any end, in few questions."""
    asked: list[int] = []

    def question(name: int) -> bool:
        asked.append(name)
        return name < known

    assert leading(range(length), question) == min(length, known)
    assert len(asked) <= 1 + math.ceil(math.log2(length + 1))


def test_names_are_the_first_half_of_each_hash() -> None:
    """One integer per block, different if the hashes are."""
    hashes = chain_hashes(b"", bytes(100), 1)
    assert len(set(names_of(hashes))) == 100
    assert names_of(b"") == names_of(b"")[:0]
