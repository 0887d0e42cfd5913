"""What stays in the cache and what goes: time to live, priority, sessions, pins, limits, invalidation."""

from __future__ import annotations

import math

import pytest

from prefixcache.cache import PrefixCache
from prefixcache.lease import Lease
from prefixcache.pins import Limit, Pinned
from prefixcache.reasons import MissReason
from prefixcache.terms import DEFAULT_TERMS, Terms
from prefixcache.tokens import pack

BLOCK = 4


@pytest.fixture
def cache() -> PrefixCache:
    return PrefixCache(32, BLOCK, pin_share=0.5)


def tokens_from(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


def begin(cache: PrefixCache, tokens: list[int], terms: Terms = DEFAULT_TERMS, namespace: str = "") -> Lease:
    """A request that has computed and committed its whole blocks."""
    packed = pack(tokens)
    lease = cache.match(packed, namespace, terms=terms)
    cache.announce(lease, packed)
    cache.allocate(lease, -(-len(tokens) // BLOCK) - len(lease.blocks))
    lease.copied()
    cache.commit(lease, pack(tokens[lease.shared * BLOCK : len(tokens) // BLOCK * BLOCK]))
    cache.check()
    return lease


def store(cache: PrefixCache, tokens: list[int], terms: Terms = DEFAULT_TERMS, namespace: str = "") -> Lease:
    """A request from start to end, after which all its tokens are cached."""
    lease = begin(cache, tokens, terms, namespace)
    lease.release(pack(tokens[lease.shared * BLOCK :]) if not lease.detached else b"")
    cache.check()
    return lease


def cached(cache: PrefixCache, tokens: list[int], namespace: str = "") -> int:
    """How many of these tokens a longer prompt would find."""
    return cache.lookup(pack([*tokens, 999]), namespace).cached_tokens


def reason(cache: PrefixCache, tokens: list[int], namespace: str = "") -> MissReason:
    return cache.lookup(pack([*tokens, 999]), namespace).reason


# Time to live


def test_what_has_expired_is_not_served_and_frees_its_blocks(cache: PrefixCache) -> None:
    """Up to the last moment it is there; then it is gone, and the miss says why."""
    tokens = tokens_from(0, 10)
    store(cache, tokens, Terms(ttl=5))
    cache.tick(4.999)
    assert cached(cache, tokens) == 10
    cache.tick(5)
    assert cached(cache, tokens) == 0
    assert reason(cache, tokens) is MissReason.EXPIRED
    assert (cache.stats().free, cache.stats().expired) == (32, 3)
    cache.check()


def test_a_sliding_time_begins_anew_with_every_use_and_a_fixed_one_does_not(cache: PrefixCache) -> None:
    """Uses at 3 seconds carry a sliding time of 5 to 8; a fixed one ends at 5."""
    slides, stays = tokens_from(0, 8), tokens_from(100, 8)
    for tokens, sliding in ((slides, True), (stays, False)):
        store(cache, tokens, Terms(ttl=5, sliding=sliding))
    cache.tick(3)
    for tokens, sliding in ((slides, True), (stays, False)):
        cache.match(pack([*tokens, 1]), terms=Terms(ttl=5, sliding=sliding)).release()
    cache.tick(5)
    assert (cached(cache, slides), cached(cache, stays)) == (8, 0)
    cache.tick(8)
    assert cached(cache, slides) == 0
    cache.check()


def test_of_a_shared_prefix_the_longest_time_counts(cache: PrefixCache) -> None:
    """What a request without a time to live has used stays; what only the other used goes."""
    shared = tokens_from(0, 8)
    store(cache, [*shared, *tokens_from(50, 8)], Terms(ttl=5))
    store(cache, [*shared, *tokens_from(70, 8)])
    cache.tick(100)
    assert cached(cache, shared) == 8
    assert cached(cache, [*shared, *tokens_from(50, 8)]) == 8
    assert cached(cache, [*shared, *tokens_from(70, 8)]) == 16


def test_a_running_request_on_sliding_terms_keeps_its_prefix_alive(cache: PrefixCache) -> None:
    """However long it runs; afterwards the time counts from its end."""
    tokens = tokens_from(0, 8)
    lease = begin(cache, tokens, Terms(ttl=5))
    for now in (4, 9, 50):
        cache.tick(now)
        cache.check()
        assert cached(cache, tokens) == 8 and not lease.detached
    cache.allocate(lease, 1)
    cache.commit(lease, pack(tokens_from(8, 4)))
    cache.tick(52)
    lease.release()
    cache.tick(56.9)
    assert cached(cache, tokens_from(0, 12)) == 12
    cache.tick(57)
    assert cached(cache, tokens) == 0
    cache.check()


def test_a_running_request_on_fixed_terms_finishes_with_what_it_has(cache: PrefixCache) -> None:
    """Its blocks are nobody else's from then on, and free when it ends."""
    tokens = tokens_from(0, 8)
    lease = begin(cache, tokens, Terms(ttl=5, sliding=False))
    cache.tick(5)
    assert lease.detached and cached(cache, tokens) == 0
    assert cache.stats().leased == 2
    cache.check()
    lease.release()
    assert cache.stats().free == 32


def test_nobody_waits_for_what_a_cut_off_request_computes(cache: PrefixCache) -> None:
    """Its blocks will never be matchable, so another request computes them itself."""
    tokens = tokens_from(0, 16)
    lease = cache.match(pack(tokens), terms=Terms(ttl=5, sliding=False))
    cache.announce(lease, pack(tokens))
    cache.allocate(lease, 4)
    cache.commit(lease, pack(tokens[:8]))
    assert cache.in_flight(pack([*tokens, 1]), beyond=2)
    cache.tick(5)
    assert lease.detached
    assert not cache.in_flight(pack([*tokens, 1]), beyond=0) and not cache.in_flight(pack([*tokens, 1]), beyond=2)
    lease.release()
    cache.check()


def test_expiry_costs_nothing_to_those_without_a_time(cache: PrefixCache) -> None:
    """Without any time to live there is nothing to look at, and nothing is due."""
    store(cache, tokens_from(0, 8))
    assert cache.next_expiry == math.inf
    store(cache, tokens_from(100, 8), Terms(ttl=7))
    assert cache.next_expiry == 7


def test_an_edge_is_not_lengthened_by_what_lives_shorter(cache: PrefixCache) -> None:
    """The continuation of a lasting prompt may expire without it."""
    store(cache, tokens_from(0, 8))
    store(cache, tokens_from(0, 16), Terms(ttl=5))
    cache.tick(6)
    assert cached(cache, tokens_from(0, 16)) == 8


# Priority


def test_lower_priorities_are_evicted_first_however_recently_used(cache: PrefixCache) -> None:
    """The dearest prompt is the last to go."""
    store(cache, tokens_from(0, 8), Terms(priority=90))
    store(cache, tokens_from(100, 8))
    store(cache, tokens_from(200, 8), Terms(priority=10))
    cache.evict(2)
    assert [cached(cache, tokens_from(first, 8)) for first in (0, 100, 200)] == [8, 8, 0]
    cache.evict(2)
    assert [cached(cache, tokens_from(first, 8)) for first in (0, 100, 200)] == [8, 0, 0]


def test_a_shared_prefix_has_the_priority_of_its_dearest_user(cache: PrefixCache) -> None:
    """A cheap request does not make a dear prefix cheap, nor what it adds dear."""
    shared = tokens_from(0, 8)
    store(cache, shared, Terms(priority=90))
    store(cache, [*shared, *tokens_from(50, 8)], Terms(priority=10))
    store(cache, tokens_from(100, 8))
    cache.evict(2)
    assert cached(cache, [*shared, *tokens_from(50, 8)]) == 8
    cache.evict(2)
    assert (cached(cache, shared), cached(cache, tokens_from(100, 8))) == (8, 0)


def test_what_a_dear_request_reuses_becomes_dear(cache: PrefixCache) -> None:
    """Priorities are raised by use."""
    store(cache, tokens_from(0, 8), Terms(priority=10))
    store(cache, tokens_from(100, 8))
    cache.match(pack(tokens_from(0, 9)), terms=Terms(priority=80)).release()
    cache.evict(2)
    assert (cached(cache, tokens_from(0, 8)), cached(cache, tokens_from(100, 8))) == (8, 0)


# Sessions


def test_what_only_an_ended_session_used_goes_first(cache: PrefixCache) -> None:
    """Before older prompts, and before those of a lower priority; what others used as well stays."""
    shared = tokens_from(0, 8)
    store(cache, tokens_from(100, 8), Terms(priority=0))
    store(cache, shared)
    store(cache, [*shared, *tokens_from(50, 8)], Terms(session="s"))
    assert cache.end_session("", "s") == 2
    cache.evict(2)
    assert cached(cache, [*shared, *tokens_from(50, 8)]) == 8
    assert cached(cache, tokens_from(100, 8)) == 8


def test_a_session_that_goes_on_after_its_end_is_a_session_again(cache: PrefixCache) -> None:
    """Using it puts its blocks back among the others."""
    tokens = tokens_from(0, 8)
    store(cache, tokens, Terms(session="s"))
    cache.end_session("", "s")
    store(cache, tokens_from(100, 8))
    cache.match(pack([*tokens, 1]), terms=Terms(session="s")).release()
    assert cache.stats().sessions == 1
    cache.evict(2)
    assert (cached(cache, tokens), cached(cache, tokens_from(100, 8))) == (8, 0)


def test_what_another_session_uses_is_nobodys_own_any_more(cache: PrefixCache) -> None:
    """Ending one of two sessions costs the other nothing."""
    tokens = tokens_from(0, 8)
    store(cache, tokens, Terms(session="s"))
    store(cache, [*tokens, *tokens_from(50, 4)], Terms(session="t"))
    assert cache.end_session("", "s") == 0
    assert cache.end_session("", "t") == 1


def test_sessions_of_one_name_in_two_namespaces_are_two(cache: PrefixCache) -> None:
    """Ending one leaves the other alone."""
    store(cache, tokens_from(0, 8), Terms(session="s"), "a")
    store(cache, tokens_from(0, 8), Terms(session="s"), "b")
    assert cache.end_session("a", "s") == 2
    assert cache.stats("b").sessions == 1 and cache.stats("a").sessions == 0


def test_an_idle_session_ends_by_itself_but_not_while_it_runs() -> None:
    """The idle time counts from the last request's end."""
    cache = PrefixCache(32, BLOCK, session_idle=10)
    lease = begin(cache, tokens_from(0, 8), Terms(session="s"))
    cache.tick(25)
    assert cache.stats().sessions == 1
    lease.release()
    cache.tick(34)
    assert cache.stats().sessions == 1
    cache.tick(36)
    assert cache.stats().sessions == 0
    cache.check()


def test_a_session_is_kept_for_its_next_request_or_for_a_while(cache: PrefixCache) -> None:
    """Its blocks are not evicted meanwhile; its next request, or the time, ends that."""
    tokens = tokens_from(0, 8)
    lease = begin(cache, tokens, Terms(session="s"))
    assert cache.keep_session(lease, 30) == 8
    lease.release()
    assert cache.evict(10) == 0
    assert (cache.stats().pinned, cache.stats().leased) == (2, 0)
    cache.match(pack([*tokens, 1]), terms=Terms(session="s")).release()
    assert cache.stats().pinned == 0
    lease = begin(cache, tokens, Terms(session="s"))
    cache.keep_session(lease, 30)
    lease.release()
    cache.tick(30)
    assert cache.stats().pinned == 0 and cache.evict(10) == 2
    cache.check()


def test_ending_a_session_ends_what_was_kept_for_it(cache: PrefixCache) -> None:
    """Nobody will come back for it."""
    lease = begin(cache, tokens_from(0, 8), Terms(session="s"))
    cache.keep_session(lease, 30)
    lease.release()
    cache.end_session("", "s")
    assert cache.evict(10) == 2


# Pins


def test_a_pin_holds_against_eviction_and_expiry_until_it_ends(cache: PrefixCache) -> None:
    """Its time to live counts again from when it is unpinned, and is over at once if it has passed."""
    tokens = tokens_from(0, 10)
    store(cache, tokens, Terms(ttl=5))
    assert cache.pin(pack(tokens), "", "system") == Pinned(8, Limit.NOTHING)
    assert cache.evict(32) == 1  # the partly filled last block
    cache.tick(100)
    assert cached(cache, tokens) == 8
    assert cache.unpin("", "system")
    assert cached(cache, tokens) == 0 and not cache.unpin("", "system")
    cache.check()


def test_a_pin_with_a_time_ends_by_itself(cache: PrefixCache) -> None:
    """To the tick."""
    store(cache, tokens_from(0, 8))
    cache.pin(pack(tokens_from(0, 8)), "", "p", ttl=10)
    cache.tick(9)
    assert len(cache.pins()) == 1 and cache.evict(2) == 0
    cache.tick(10)
    assert not cache.pins() and cache.evict(2) == 2


def test_pins_stay_within_their_budget_and_pin_the_beginning(cache: PrefixCache) -> None:
    """16 blocks of 32 may be pinned; a shared beginning counts once."""
    store(cache, tokens_from(0, 60))
    assert cache.pin(pack(tokens_from(0, 40)), "", "one") == Pinned(40, Limit.NOTHING)
    assert cache.pin(pack(tokens_from(0, 60)), "", "two") == Pinned(60, Limit.NOTHING)
    assert cache.pinned_blocks() == 15
    store(cache, tokens_from(100, 20))
    assert cache.pin(pack(tokens_from(100, 20)), "", "three") == Pinned(4, Limit.BUDGET)
    assert cache.pinned_blocks() == cache.pin_budget == 16
    store(cache, tokens_from(200, 8))
    assert cache.pin(pack(tokens_from(200, 8)), "", "four") == Pinned(0, Limit.BUDGET)
    assert [pin.key.name for pin in cache.pins()] == ["one", "two", "three"]
    cache.check()


def test_a_pin_of_the_same_name_moves(cache: PrefixCache) -> None:
    """The old prompt is let go before the budget is looked at; doing it twice is like doing it once."""
    for first in (0, 100):
        store(cache, tokens_from(first, 60))
        for _ in range(2):
            assert cache.pin(pack(tokens_from(first, 60)), "", "p") == Pinned(60, Limit.NOTHING)
    assert cache.pinned_blocks() == 15
    cache.evict(17)
    assert (cached(cache, tokens_from(0, 60)), cached(cache, tokens_from(100, 60))) == (0, 60)


def test_only_what_is_cached_is_pinned(cache: PrefixCache) -> None:
    """The rest is said not to be."""
    store(cache, tokens_from(0, 8))
    assert cache.pin(pack(tokens_from(0, 20)), "", "p") == Pinned(8, Limit.NOT_CACHED)
    assert cache.pin(pack(tokens_from(500, 20)), "", "q") == Pinned(0, Limit.NOT_CACHED)
    assert cache.pin(pack(tokens_from(0, 8)), "elsewhere", "p") == Pinned(0, Limit.NOT_CACHED)


def test_blocks_are_in_one_of_four_states(cache: PrefixCache) -> None:
    """Pinned counts what no request uses; a pinned block in use counts as leased."""
    store(cache, tokens_from(0, 8))
    store(cache, tokens_from(100, 8))
    cache.pin(pack(tokens_from(0, 8)), "", "p")
    lease = cache.match(pack(tokens_from(0, 9)))
    stats = cache.stats()
    assert (stats.free, stats.cached, stats.pinned, stats.leased) == (28, 2, 0, 2)
    lease.release()
    stats = cache.stats()
    assert (stats.free, stats.cached, stats.pinned, stats.leased) == (28, 2, 2, 0)


# Accounts


def test_an_account_never_has_more_than_its_limit_and_evicts_its_own() -> None:
    """Others keep what they have, though it is older."""
    cache = PrefixCache(32, BLOCK)
    store(cache, tokens_from(0, 16), namespace="other")
    cache.limit("mine", 3)
    for first in (100, 200, 300):
        store(cache, tokens_from(first, 8), namespace="mine")
        assert cache.stats("mine").cached <= 3
    assert cached(cache, tokens_from(0, 16), "other") == 16
    assert cached(cache, tokens_from(300, 8), "mine") == 8
    assert cache.stats("mine").limit == 3 and cache.stats("other").limit is None
    cache.check()


def test_what_a_limit_has_no_room_for_is_computed_but_not_kept() -> None:
    """The beginning is stored; nobody waits for the rest."""
    cache = PrefixCache(32, BLOCK)
    cache.limit("mine", 2)
    lease = begin(cache, tokens_from(0, 16), namespace="mine")
    assert lease.shared == 2 and lease.stored == 8
    assert not cache.in_flight(pack(tokens_from(0, 17)), "mine", beyond=2)
    lease.release()
    assert cached(cache, tokens_from(0, 16), "mine") == 8


def test_lowering_a_limit_evicts_at_once_what_is_not_in_use() -> None:
    """What is in use goes when its request ends."""
    cache = PrefixCache(32, BLOCK)
    store(cache, tokens_from(0, 8), namespace="mine")
    lease = begin(cache, tokens_from(100, 8), namespace="mine")
    cache.limit("mine", 1)
    cache.check()
    assert cache.stats("mine").total == 2
    lease.release()
    cache.check()
    assert cache.stats("mine").total == 1
    cache.limit("mine", None)
    store(cache, tokens_from(200, 40), namespace="mine")
    assert cache.stats("mine").total == 11


def test_an_account_is_told_of_its_own_blocks_only() -> None:
    """Nothing in its numbers changes with what others do."""
    cache = PrefixCache(32, BLOCK)
    store(cache, tokens_from(0, 8), namespace="a")
    before = cache.stats("a")
    lease = begin(cache, tokens_from(0, 40), namespace="b")
    assert cache.stats("a") == before
    assert (before.total, before.free, before.cached, before.leased) == (2, 0, 2, 0)
    assert (cache.stats("b").total, cache.stats("b").leased) == (10, 10)
    lease.release()


# Invalidation


def test_invalidating_a_prefix_forgets_what_begins_with_it_and_what_led_only_there(cache: PrefixCache) -> None:
    """Prompts that go another way before its end stay whole."""
    shared = tokens_from(0, 8)
    one, two = [*shared, *tokens_from(50, 8)], [*shared, *tokens_from(70, 8)]
    store(cache, one)
    store(cache, two)
    assert cache.invalidate_prefix(pack(one[:14])) == (2, 0)
    assert (cached(cache, one), cached(cache, two)) == (8, 16)
    assert reason(cache, one) is MissReason.INVALIDATED
    assert cache.invalidate_prefix(pack(two)) == (4, 0)
    assert cache.stats().free == 32
    cache.check()


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 11, 12, 13])
def test_no_token_beyond_the_prefix_survives(cache: PrefixCache, length: int) -> None:
    """Wherever in a block, and in an edge, it ends."""
    tokens = tokens_from(0, 13)
    store(cache, tokens)
    store(cache, [*tokens[:6], 500, 501, 502])
    cache.invalidate_prefix(pack(tokens[:length]))
    assert cached(cache, tokens) < length
    if length > 6:
        assert cached(cache, [*tokens[:6], 500, 501, 502]) >= 8
    cache.check()


def test_a_prefix_that_nothing_begins_with_costs_nothing(cache: PrefixCache) -> None:
    """Also if others share its beginning."""
    store(cache, tokens_from(0, 16))
    assert cache.invalidate_prefix(pack([*tokens_from(0, 10), 77])) == (0, 0)
    assert cache.invalidate_prefix(pack(tokens_from(0, 20))) == (0, 0)
    assert cache.invalidate_prefix(pack([1, 2]), "elsewhere") == (0, 0)
    assert cached(cache, tokens_from(0, 16)) == 16


def test_a_running_request_does_not_store_again_what_was_invalidated(cache: PrefixCache) -> None:
    """Neither if its prefix was cut off under it nor if it has committed nothing yet."""
    tokens = tokens_from(0, 16)
    running = begin(cache, tokens)
    cache.allocate(running, 1)
    starting = cache.match(pack([*tokens[:8], 90, 91]))
    cache.announce(starting, pack([*tokens[:8], 90, 91, 92, 93, 94]))
    cache.allocate(starting, 1)
    freed, in_use = cache.invalidate_prefix(pack(tokens[:8]))
    assert (freed, in_use) == (0, 4)
    cache.commit(running, pack(tokens_from(16, 4)))
    cache.commit(starting, pack([90, 91, 92, 93]))
    cache.check()
    assert cached(cache, tokens) == 0
    running.release()
    starting.release()
    cache.check()
    assert cache.stats().free == 32


def test_what_is_above_the_cut_is_held_until_the_request_below_ends(cache: PrefixCache) -> None:
    """A request whose end was cut off still reads its beginning, which must not be evicted."""
    shared = tokens_from(0, 8)
    store(cache, [*shared, *tokens_from(70, 8)])
    lease = begin(cache, [*shared, *tokens_from(50, 8)])
    cache.invalidate_prefix(pack([*shared, *tokens_from(50, 8)]))
    assert lease.detached
    cache.evict(32)
    cache.check()
    assert cached(cache, shared) == 8
    lease.release()
    cache.check()
    assert cache.evict(32) == 2


def test_invalidating_a_session_forgets_its_own_only(cache: PrefixCache) -> None:
    """What others have used too stays."""
    shared = tokens_from(0, 8)
    store(cache, shared)
    store(cache, [*shared, *tokens_from(50, 10)], Terms(session="s"))
    store(cache, tokens_from(100, 8), Terms(session="s"))
    assert cache.invalidate_session("", "s") == (5, 0)
    assert cached(cache, shared) == 8 and cached(cache, tokens_from(100, 8)) == 0
    assert cache.invalidate_session("", "s") == (0, 0)


def test_invalidation_ends_pins(cache: PrefixCache) -> None:
    """What was asked to be forgotten is forgotten; the pin's room is free again."""
    store(cache, tokens_from(0, 16))
    cache.pin(pack(tokens_from(0, 16)), "", "p")
    assert cache.invalidate_prefix(pack(tokens_from(0, 12))) == (4, 0)
    assert not cache.pins() and cache.pinned_blocks() == 0
    assert not cache.unpin("", "p")


def test_an_account_is_invalidated_with_all_its_namespaces() -> None:
    """And no other's."""
    cache = PrefixCache(32, BLOCK, account_of=lambda namespace: namespace[0])
    for namespace in ("a1", "a2", "b1"):
        store(cache, tokens_from(0, 8), namespace=namespace)
    assert cache.invalidate_account("a") == (4, 0)
    assert [cached(cache, tokens_from(0, 8), namespace) for namespace in ("a1", "a2", "b1")] == [0, 0, 8]


# What is worth keeping, and what is near


def test_the_most_valuable_prefixes_are_those_that_saved_most(cache: PrefixCache) -> None:
    """Matches times length, the best first; what is contained in a better one is left out."""
    long, short, cold = tokens_from(0, 24), tokens_from(100, 8), tokens_from(200, 8)
    for tokens in (long, short, cold):
        store(cache, tokens)
    for _ in range(3):
        cache.match(pack([*short, 1])).release()
        cache.match(pack([*long[:12], 1])).release()
    cache.match(pack([*long, 1])).release()
    assert cache.valuable(1000) == [("", pack(long)), ("", pack(short))]
    assert cache.valuable(20) == [("", pack(long[:12])), ("", pack(short))]
    cache.decay(0.0)
    assert cache.valuable(1000) == []


def test_the_nearest_alternative_is_as_long_as_what_it_goes_on_to(cache: PrefixCache) -> None:
    """To the end of the cached prompt that agrees for longest."""
    shared = tokens_from(0, 8)
    store(cache, [*shared, *tokens_from(50, 12)])
    assert cache.alternative(pack([*shared, 50, 51, 999])) == 20
    assert cache.alternative(pack([*shared, 999])) == 20
    assert cache.alternative(pack([0, 1, 999])) == 20
    assert cache.alternative(pack([999])) == 0
    assert cache.alternative(pack(shared), "elsewhere") == 0


def test_a_snapshot_names_what_is_stored_parents_first() -> None:
    """Of all, or of one account."""
    cache = PrefixCache(32, BLOCK)
    store(cache, tokens_from(0, 8), namespace="a")
    store(cache, [*tokens_from(0, 4), *tokens_from(50, 4)], namespace="a")
    store(cache, tokens_from(0, 8), namespace="b")
    named = list(cache.stored("a"))
    assert {event.namespace for event in named} == {"a"}
    known = {named[0].parent}
    for event in named:
        assert event.parent in known
        known.update(event.hashes[i : i + 16] for i in range(0, len(event.hashes), 16))
    assert len(known) == 1 + 3
    assert sum(len(event.hashes) for event in cache.stored()) == 16 * 5
