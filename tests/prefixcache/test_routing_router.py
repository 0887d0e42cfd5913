"""The router: who lives, who is busy, who holds what, and who is avoided."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixcache.hints.schema import Lease, Load
from prefixcache.routing.policies import POLICIES, Candidate
from prefixcache.routing.router import FIRST_PAUSE, MAX_PAUSE, REMEMBERED, SPECULATION, Router, Sent, Wanted
from prefixcache.tokens import chain_hashes

BLOCK = 16


def lease(replica_id: str, nonce: str = "n", *, draining: bool = False, age: float = 0.0, **load: int) -> Lease:
    told = Load(**{"free": 1000, **load})
    return Lease(replica_id, nonce, f"{replica_id}:1", "model", BLOCK, 1000, told, draining=draining, age=age)


def prompt(seed: int, blocks: int = 100, shared: int = 0, session: str = "") -> Wanted:
    """A prompt of which the first `shared` blocks are the same for every seed."""
    tokens = bytes(shared) + random.Random(seed).randbytes(blocks - shared)
    return Wanted(chain_hashes(b"", tokens, 1), blocks * BLOCK + 1, session)


class Seen:
    """A policy that keeps what it was shown, and leaves the order alone."""

    def __init__(self) -> None:
        self.wanted = Wanted(b"", 0)
        self.candidates: dict[str, Candidate] = {}

    def __call__(self, wanted: Wanted, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        self.wanted = wanted
        self.candidates = {one.replica_id: one for one in candidates}
        return candidates


def shown(router: Router, seen: Seen, wanted: Wanted, held: dict[str, int] | None, now: float) -> dict[str, int]:
    """How many blocks of a prompt the policy is told that each replica holds."""
    router.rank(wanted, held, now)
    return {name: one.cached_tokens // BLOCK for name, one in seen.candidates.items()}


def test_the_replica_that_holds_the_prefix_comes_first() -> None:
    """As Redis says; the others follow, for a caller whose first cannot be reached."""
    router = Router()
    router.update([lease("a"), lease("b"), lease("c")], 0.0)
    ranked = router.rank(prompt(1), {"a": 0, "b": 100, "c": 50}, 0.0)
    assert ranked == ["b", "c", "a"]


def test_who_is_draining_or_gone_is_never_offered() -> None:
    """Nor anybody, if there is nobody else."""
    router = Router()
    assert router.rank(prompt(1), None, 0.0) == []
    router.update([lease("a", draining=True), lease("b"), lease("c")], 0.0)
    assert sorted(router.rank(prompt(1), {"a": 100}, 0.0)) == ["b", "c"]
    router.update([lease("a", draining=True), lease("b")], 1.0)
    assert router.rank(prompt(1), {"a": 100}, 1.0) == ["b"]
    router.update([lease("a", draining=True)], 2.0)
    assert router.rank(prompt(1), {"a": 100}, 2.0) == []
    router.update([], 3.0)
    assert router.rank(prompt(1), {"a": 100}, 3.0) == []


@pytest.mark.parametrize("policy", POLICIES)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["live", "draining", "gone", "failed", "new"]))))
def test_whatever_happens_the_living_are_offered_and_only_they(policy: str, events: list[tuple[str, str]]) -> None:
    """Somebody always, as long as one lives that takes requests."""
    router = Router(POLICIES[policy])
    living: dict[str, Lease] = {}
    for now, (name, event) in enumerate(events):
        if event == "gone":
            living.pop(name, None)
        elif event == "failed":
            router.failed(name, float(now))
        else:
            living[name] = lease(name, f"n{now}" if event == "new" else "n", draining=event == "draining")
        router.update(list(living.values()), float(now))
        open_to_new = {one.replica_id for one in living.values() if not one.draining}
        ranked = router.rank(prompt(now), None, float(now))
        assert len(set(ranked)) == len(ranked) and set(ranked) <= open_to_new
        assert bool(ranked) == bool(open_to_new)


def test_what_is_on_its_way_counts_as_held_before_redis_knows() -> None:
    """From when it is sent until SPECULATION seconds after it was computed, however long it waited."""
    seen = Seen()
    router = Router(seen)
    router.update([lease("a"), lease("b")], 0.0)
    sent = router.sent("a", prompt(1, shared=60), 0.0)
    other, nothing = prompt(2, shared=60), {"a": 0, "b": 0}
    assert shown(router, seen, other, nothing, 100.0) == {"a": 60, "b": 0}
    sent.computed(200.0)
    assert shown(router, seen, other, nothing, 200.0 + SPECULATION) == {"a": 60, "b": 0}
    assert shown(router, seen, other, nothing, 200.1 + SPECULATION) == {"a": 0, "b": 0}
    assert shown(router, seen, other, {"a": 10, "b": 7}, 300.0) == {"a": 10, "b": 7}


def test_without_redis_what_was_sent_counts_for_as_long_as_it_is_remembered() -> None:
    """Also for a single replica that Redis knows nothing of."""
    seen = Seen()
    router = Router(seen)
    router.update([lease("a"), lease("b")], 0.0)
    router.sent("a", prompt(1, shared=60), 0.0).done(1.0)
    router.sent("b", prompt(2, shared=30), 0.0).done(1.0)
    assert shown(router, seen, prompt(3, shared=60), None, 1000.0) == {"a": 60, "b": 30}
    assert shown(router, seen, prompt(3, shared=60), {"b": 0}, 1000.0) == {"a": 60, "b": 0}


def test_a_new_nonce_voids_what_was_remembered() -> None:
    """The process that held it is gone; what ends late of it does not touch the new one."""
    seen = Seen()
    router = Router(seen)
    router.update([lease("a")], 0.0)
    old = router.sent("a", prompt(1), 0.0)
    assert shown(router, seen, prompt(1), None, 0.0) == {"a": 100}
    router.failed("a", 0.5)
    router.update([lease("a", "another")], 1.0)
    assert shown(router, seen, prompt(1), None, 1.0) == {"a": 0}
    assert router.in_flight("a") == 0
    old.computed(2.0)
    old.done(3.0)
    assert router.in_flight("a") == 0 and shown(router, seen, prompt(1), None, 3.0) == {"a": 0}


def test_a_process_with_a_new_lease_is_the_same() -> None:
    """When Redis has lost its lease, what it has cached is still there; another process has it not."""
    seen = Seen()
    router = Router(seen)
    router.update([replace(lease("a", "first"), process="one")], 0.0)
    router.sent("a", prompt(1), 0.0)
    router.update([replace(lease("a", "second"), process="one")], 1.0)
    assert shown(router, seen, prompt(1), None, 1.0) == {"a": 100}
    assert router.in_flight("a") == 1
    router.update([replace(lease("a", "third"), process="two")], 2.0)
    assert shown(router, seen, prompt(1), None, 2.0) == {"a": 0}


def test_a_lease_that_was_missing_for_a_moment_is_taken_up_again() -> None:
    """With the same nonce it is the same process; one that is away for long is forgotten."""
    seen = Seen()
    router = Router(seen)
    router.update([lease("a"), lease("b")], 0.0)
    sent = router.sent("a", prompt(1), 0.0)
    router.update([lease("b")], 1.0)
    router.update([lease("a"), lease("b")], 2.0)
    assert router.in_flight("a") == 1 and shown(router, seen, prompt(1), None, 2.0) == {"a": 100, "b": 0}
    router.update([lease("b")], 3.0 + REMEMBERED)
    router.update([lease("a"), lease("b")], 4.0 + REMEMBERED)
    assert router.in_flight("a") == 0
    sent.done(5.0 + REMEMBERED)
    assert router.in_flight("a") == 0


def test_load_is_what_the_lease_said_and_what_was_sent_since() -> None:
    """Others' requests show in the lease only, this router's own at once."""
    seen = Seen()
    router = Router(seen)
    mine: list[Sent] = []
    router.update([lease("a", running=3, waiting=2, waiting_tokens=500)], 0.0)
    for seed in range(4):
        wanted = prompt(seed)
        router.rank(wanted, {"a": 0}, 0.0)
        mine.append(router.sent("a", wanted, 0.0))
    mine[0].computed(0.1)
    router.rank(prompt(9), {}, 0.2)
    one = seen.candidates["a"]
    assert (one.running, one.waiting) == (3 + 1, 2 + 3)
    assert one.waiting_tokens == 500 + 3 * 1601
    assert one.room == 1000 - 4 * 101
    # the next lease counts these four as well, and three of the others have ended
    router.update([lease("a", running=4, waiting=2, waiting_tokens=5000)], 1.0)
    router.rank(prompt(9), {}, 1.0)
    one = seen.candidates["a"]
    assert one.requests == 6 and one.waiting_tokens == 5000 and one.room == 1000
    for sent in mine:
        sent.done(2.0)
    router.rank(prompt(9), {}, 2.0)
    assert seen.candidates["a"].requests == 2


def test_what_has_ended_since_a_lease_was_stated_is_not_taken_for_others() -> None:
    """Nor is what waited then and runs now: who is idle looks idle."""
    seen = Seen()
    router = Router(seen)
    router.update([lease("a")], 0.0)
    ended, running, later = (router.sent("a", prompt(seed), at) for seed, at in ((1, 0.0), (2, 0.1), (3, 0.6)))
    ended.computed(0.2)
    ended.done(0.9)
    running.computed(0.8)
    later.done(0.9)
    router.update([lease("a", age=0.5, running=1, waiting=1, waiting_tokens=1601)], 1.0)
    router.rank(prompt(9), {}, 1.0)
    one = seen.candidates["a"]
    assert (one.running, one.waiting, one.waiting_tokens) == (1, 0, 0)
    running.done(1.1)
    router.rank(prompt(9), {}, 1.1)
    assert seen.candidates["a"].requests == 0


def test_a_lease_read_twice_is_counted_once() -> None:
    """What has ended since it was renewed does not come back when it is read again."""
    seen = Seen()
    router = Router(seen)
    router.update([lease("a")], 0.0)
    sent = router.sent("a", prompt(1), 0.0)
    for now in (1.0, 2.0, 3.0):
        router.update([lease("a", running=1, age=now - 1.0)], now)
        if now == 2.0:
            sent.done(2.5)
    router.rank(prompt(9), {}, 3.0)
    assert seen.candidates["a"].requests == 0


def test_a_prompt_that_is_held_leaves_little_waiting() -> None:
    """What waits is what must be computed, by what the ranking knew."""
    seen = Seen()
    router = Router(seen)
    router.update([lease("a")], 0.0)
    wanted = prompt(1)
    router.rank(wanted, {"a": 90}, 0.0)
    sent = router.sent("a", wanted, 0.0)
    assert sent.tokens == 10 * BLOCK + 1
    router.rank(prompt(2), {"a": 0}, 0.0)
    assert seen.candidates["a"].waiting_tokens == 10 * BLOCK + 1
    sent.done(1.0)
    router.rank(prompt(2), {"a": 0}, 1.0)
    assert seen.candidates["a"].waiting_tokens == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["send", "compute", "end", "end twice"]))))
def test_counts_in_flight_return_to_zero(events: list[tuple[int, str]]) -> None:
    """Whatever order requests start, give a token and end in, and however often that is said."""
    seen = Seen()
    router = Router(seen)
    router.update([lease("a")], 0.0)
    sent = [router.sent("a", prompt(seed), 0.0) for seed in range(6)]
    ended: set[int] = set()
    for number, event in events:
        if event == "send":
            sent.append(router.sent("a", prompt(number), 0.0))
        elif event == "compute":
            sent[number].computed(1.0)
        else:
            sent[number].done(1.0)
            sent[number].done(1.0)
            ended.add(number)
        assert router.in_flight("a") == len(sent) - len(ended)
    for one in sent:
        one.done(2.0)
        one.computed(3.0)
    router.rank(prompt(99), {}, 3.0)
    one_seen = seen.candidates["a"]
    assert router.in_flight("a") == one_seen.requests == one_seen.waiting_tokens == 0


def test_who_cannot_be_reached_is_avoided_for_longer_and_longer() -> None:
    """Twice as long each time in a row, up to a bound; an answer ends that."""
    router = Router()
    router.update([lease("a"), lease("b")], 0.0)
    now, pauses = 0.0, []
    for _ in range(8):
        router.failed("a", now)
        start = now
        while router.rank(prompt(1), {"a": 100}, now)[0] == "b":
            now += 0.5
        pauses.append(now - start)
    assert pauses[:3] == [FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE] and pauses[-1] == MAX_PAUSE
    router.sent("a", prompt(1), now).computed(now)
    router.failed("a", now)
    assert router.rank(prompt(1), {"a": 100}, now) == ["b"]
    assert router.rank(prompt(1), {"a": 100}, now + FIRST_PAUSE)[0] == "a"


def test_a_renewed_process_is_not_avoided() -> None:
    """A new nonce means that it has started again."""
    router = Router()
    router.update([lease("a"), lease("b")], 0.0)
    router.failed("a", 0.0)
    router.update([lease("a", "another"), lease("b")], 0.1)
    assert sorted(router.rank(prompt(1), None, 0.1)) == ["a", "b"]


def test_a_process_that_has_a_lease_again_keeps_its_cache_and_is_not_avoided() -> None:
    """It stood still for longer than its lease, say: a new nonce, the same blocks, the same requests."""
    seen = Seen()
    router = Router(seen)
    router.update([replace(lease("a"), process="p"), lease("b")], 0.0)
    sent = router.sent("a", prompt(1), 0.0)
    router.failed("a", 0.5)
    router.update([replace(lease("a", "another"), process="p"), lease("b")], 0.6)
    assert shown(router, seen, prompt(1), None, 0.6) == {"a": 100, "b": 0}
    assert router.in_flight("a") == 1
    sent.done(1.0)
    assert router.in_flight("a") == 0


def test_if_all_are_avoided_the_one_that_failed_least_recently_is_tried() -> None:
    """Never nobody; and not one that is draining."""
    router = Router()
    router.update([lease("a"), lease("b"), lease("c", draining=True)], 0.0)
    router.failed("b", 0.1)
    router.failed("a", 0.2)
    assert router.rank(prompt(1), None, 0.3) == ["b"]
    router.failed("nobody knows it", 0.4)


def test_a_hot_prefix_spreads_when_its_replica_saturates_and_then_stays_put() -> None:
    """A second replica gets it, both share its requests, and neither a third nor the first alone does."""
    router = Router()
    leases = [lease(name) for name in "abcd"]
    router.update(leases, 0.0)
    held = dict.fromkeys("abcd", 0)
    went: list[str] = []
    running = []
    for seed in range(120):
        now = seed * 0.1
        wanted = prompt(seed, blocks=260, shared=250)
        first = router.rank(wanted, held, now)[0]
        held[first] = 250
        went.append(first)
        sent = router.sent(first, wanted, now)
        sent.computed(now)
        running.append(sent)
        if len(running) > 12:  # as many as arrive end
            running.pop(0).done(now)
    holders = list(dict.fromkeys(went))
    assert len(holders) == 2, "it spread to one more"
    assert went[: went.index(holders[1])] == [holders[0]] * 8, "at first all go to one"
    late = went[-60:]
    assert abs(late.count(holders[0]) - late.count(holders[1])) <= 10, "in the end both have their share"


def test_the_length_of_a_prompt_follows_from_its_blocks_if_nobody_says_it() -> None:
    """So that a caller without token counts is routed by its hashes all the same."""
    seen = Seen()
    router = Router(seen)
    router.update([lease("a"), lease("b")], 0.0)
    router.rank(replace(prompt(1), tokens=0), {"a": 100, "b": 0}, 0.0)
    assert seen.wanted.tokens == 1601
    assert seen.candidates["a"].cached_tokens == 1600
    router.rank(Wanted(b"", 0), {"a": 0, "b": 0}, 0.0)
    assert seen.candidates["a"].cached_tokens == 0


def test_turns_are_counted_by_the_router() -> None:
    """So that a policy needs no memory."""
    router = Router(POLICIES["round-robin"])
    router.update([lease("b"), lease("a")], 0.0)
    first = [router.rank(prompt(1), None, 0.0)[0] for _ in range(6)]
    assert sorted(first[:2]) == ["a", "b"] and first == first[:2] * 3


def test_at_most_so_many_blocks_are_remembered_of_each_replica() -> None:
    """As many as it has, or as the router may keep."""
    seen = Seen()
    router = Router(seen, memory_blocks=100)
    router.update([lease("a")], 0.0)
    for seed in range(10):
        router.sent("a", prompt(seed, blocks=40), float(seed)).done(float(seed))
    found = [shown(router, seen, prompt(seed, blocks=40), None, 10.0)["a"] for seed in range(10)]
    assert found == [0] * 8 + [40, 40]
