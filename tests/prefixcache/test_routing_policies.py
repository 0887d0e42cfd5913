"""Policies: who is best for a request, and who comes after."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixcache.routing.policies import DEFAULT, POLICIES, SAVING, Candidate, Wanted
from prefixcache.tokens import chain_hashes

IDLE = Candidate("", cached_tokens=0, running=0, waiting=0, waiting_tokens=0, room=1000, blocks=1000)


def replicas(count: int) -> list[Candidate]:
    return [replace(IDLE, replica_id=f"replica-{number}") for number in range(count)]


def order(policy: str, wanted: Wanted, candidates: list[Candidate]) -> list[str]:
    return [one.replica_id for one in POLICIES[policy](wanted, candidates)]


def prompt(seed: int, blocks: int = 40, shared: int = 0) -> Wanted:
    """A prompt of which the first `shared` blocks are the same for every seed."""
    tokens = bytes(shared) + random.Random(seed).randbytes(blocks - shared)
    return Wanted(chain_hashes(b"", tokens, 1), blocks * 16)


CANDIDATES = st.builds(
    replace,
    st.just(IDLE),
    cached_tokens=st.integers(0, 639),
    running=st.integers(0, 50),
    waiting=st.integers(0, 50),
    waiting_tokens=st.integers(0, 100_000),
    room=st.integers(-100, 1000),
)


@pytest.mark.parametrize("policy", POLICIES)
@given(
    some=st.lists(CANDIDATES, min_size=1, max_size=8),
    tokens=st.sampled_from([0, 640]),
    known=st.booleans(),
    session=st.sampled_from(["", "s"]),
    turn=st.integers(0, 100),
)
def test_every_candidate_is_ranked_once(
    policy: str, some: list[Candidate], tokens: int, known: bool, session: str, turn: int
) -> None:
    """Whatever is known of the prompt, so that whoever cannot reach the first has a second to try."""
    candidates = [replace(one, replica_id=f"replica-{number}") for number, one in enumerate(some)]
    wanted = Wanted(prompt(1).hashes if known else b"", tokens, session, turn)
    assert sorted(order(policy, wanted, candidates)) == sorted(one.replica_id for one in candidates)


def test_round_robin_takes_turns() -> None:
    """Each replica gets as many requests as the others, and a different one is second each time."""
    wanted = [Wanted(b"", 0, turn=turn) for turn in range(12)]
    orders = [order("round-robin", one, replicas(4)) for one in wanted]
    assert Counter(names[0] for names in orders) == {f"replica-{number}": 3 for number in range(4)}
    assert Counter(names[1] for names in orders) == {f"replica-{number}": 3 for number in range(4)}


def test_least_loaded_counts_requests_then_tokens() -> None:
    """Running and waiting ones alike; between idle replicas, in turn."""
    a, b, c = replicas(3)
    a, b, c = replace(a, running=2), replace(b, running=1, waiting_tokens=9), replace(c, waiting=1, waiting_tokens=5)
    assert order("least-loaded", Wanted(b"", 0), [a, b, c]) == ["replica-2", "replica-1", "replica-0"]
    first = {order("least-loaded", Wanted(b"", 0, turn=turn), replicas(3))[0] for turn in range(3)}
    assert len(first) == 3


@pytest.mark.parametrize("policy", ["session", "consistent-hash"])
def test_prompts_that_begin_alike_stay_together(policy: str) -> None:
    """However they go on, and however busy their replica is."""
    alike = [prompt(seed, shared=16) for seed in range(20)]
    busy = [replace(one, running=number) for number, one in enumerate(replicas(8))]
    assert len({tuple(order(policy, one, busy)) for one in alike}) == 1
    others = {order(policy, prompt(seed), busy)[0] for seed in range(100)}
    assert len(others) == 8


def test_a_session_stays_together_whatever_it_asks() -> None:
    """Its name decides, and different sessions are spread."""
    first = {order("session", replace(prompt(seed), session="mine"), replicas(8))[0] for seed in range(20)}
    assert len(first) == 1
    spread = Counter(order("session", replace(prompt(1), session=f"s{n}"), replicas(8))[0] for n in range(800))
    assert len(spread) == 8 and max(spread.values()) < 160


@pytest.mark.parametrize("policy", ["session", "consistent-hash"])
def test_only_the_prompts_of_a_replica_that_goes_move(policy: str) -> None:
    """All others stay where they are, also when a replica comes."""
    prompts = [prompt(seed) for seed in range(400)]
    all_eight = replicas(8)
    before = [order(policy, one, all_eight)[0] for one in prompts]
    after = [order(policy, one, all_eight[:-1])[0] for one in prompts]
    moved = [old for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {"replica-7"} and len(moved) == before.count("replica-7")
    assert 20 < len(moved) < 90, "about one in eight"


def test_a_prompt_too_short_for_a_block_goes_where_least_is_done() -> None:
    """There is nothing to tell it from others by."""
    a, b = replicas(2)
    for policy in ("session", "consistent-hash", DEFAULT):
        assert order(policy, Wanted(b"", 5), [replace(a, running=3), b])[0] == "replica-1"


def test_the_default_goes_where_the_prefix_is() -> None:
    """Also if some requests run there, and the longest prefix is best."""
    a, b, c = replicas(3)
    a, b = replace(a, cached_tokens=4000, running=3), replace(b, cached_tokens=2000)
    assert order(DEFAULT, Wanted(b"", 4100), [c, b, a]) == ["replica-0", "replica-1", "replica-2"]


def test_the_default_goes_elsewhere_when_what_waits_exceeds_what_is_saved() -> None:
    """SAVING waiting tokens are worth one that is computed."""
    a, b = replicas(2)
    wanted = Wanted(b"", 4100)
    below = replace(a, cached_tokens=4000, waiting_tokens=SAVING * 4000 - 1)
    above = replace(a, cached_tokens=4000, waiting_tokens=SAVING * 4000 + 1)
    assert order(DEFAULT, wanted, [below, b])[0] == "replica-0"
    assert order(DEFAULT, wanted, [above, b])[0] == "replica-1"


def test_the_default_goes_elsewhere_when_many_more_requests_run_there() -> None:
    """Though none of their prompts waits: they share the steps."""
    a, b = replicas(2)
    wanted = Wanted(b"", 4100)
    assert order(DEFAULT, wanted, [replace(a, cached_tokens=4000, running=7), b])[0] == "replica-0"
    assert order(DEFAULT, wanted, [replace(a, cached_tokens=4000, running=9), b])[0] == "replica-1"


def test_a_prompt_nobody_knows_goes_where_most_memory_can_be_given_up() -> None:
    """Between replicas that are as busy; in turn if they are equal in this as well."""
    a, b, c = replicas(3)
    assert order(DEFAULT, Wanted(b"", 500), [replace(a, room=10), replace(b, room=300), replace(c, room=20)]) == [
        "replica-1",
        "replica-2",
        "replica-0",
    ]
    assert len({order(DEFAULT, Wanted(b"", 500, turn=turn), replicas(3))[0] for turn in range(3)}) == 3


def test_a_prompt_that_is_cached_everywhere_is_shared_by_load() -> None:
    """An exact repeat costs next to nothing anywhere; requests decide, however few tokens it takes."""
    a, b = (replace(one, cached_tokens=4099) for one in replicas(2))
    assert order(DEFAULT, Wanted(b"", 4100), [replace(a, running=2), replace(b, running=1)])[0] == "replica-1"
