"""Published prompts: shared by all at the beginning, nobody else's behind it."""

from __future__ import annotations

import pytest

from prefixcache.cache import PrefixCache
from prefixcache.lease import Lease
from prefixcache.pins import Limit
from prefixcache.reasons import MissReason
from prefixcache.terms import DEFAULT_TERMS, Terms
from prefixcache.tokens import pack

BLOCK = 4
SYSTEM = list(range(1000, 1018))  # four blocks and a half


@pytest.fixture
def cache() -> PrefixCache:
    cache = PrefixCache(64, BLOCK, pin_share=0.5)
    store(cache, SYSTEM, cache.shared_namespace)
    assert cache.publish(pack(SYSTEM), "system") == (16, Limit.NOTHING)
    return cache


def begin(cache: PrefixCache, tokens: list[int], namespace: str, terms: Terms = DEFAULT_TERMS) -> Lease:
    packed = pack(tokens)
    lease = cache.match(packed, namespace, terms=terms)
    cache.announce(lease, packed)
    cache.allocate(lease, -(-len(tokens) // BLOCK) - len(lease.blocks))
    lease.copied()
    cache.commit(lease, pack(tokens[lease.shared * BLOCK : len(tokens) // BLOCK * BLOCK]))
    cache.check()
    return lease


def store(cache: PrefixCache, tokens: list[int], namespace: str, terms: Terms = DEFAULT_TERMS) -> Lease:
    lease = begin(cache, tokens, namespace, terms)
    lease.release(pack(tokens[lease.shared * BLOCK :]))
    cache.check()
    return lease


def cached(cache: PrefixCache, tokens: list[int], namespace: str) -> int:
    return cache.lookup(pack([*tokens, 9]), namespace).cached_tokens


def test_every_namespace_begins_with_the_same_blocks(cache: PrefixCache) -> None:
    """Though none of them has ever computed them."""
    one = begin(cache, [*SYSTEM, 1, 2, 3, 4, 5], "a")
    other = begin(cache, [*SYSTEM, 6, 7, 8], "b")
    assert one.cached_tokens == other.cached_tokens == 16
    assert one.blocks[:4] == other.blocks[:4] and not set(one.blocks[4:]) & set(other.blocks[4:])
    one.release()
    other.release()
    cache.check()


def test_what_follows_is_seen_by_nobody_else(cache: PrefixCache) -> None:
    """Not by a match, not by a copied part of a block, not by a lookup's reason."""
    private = [*SYSTEM, *range(1, 20)]
    store(cache, private, "a")
    assert cached(cache, private, "a") == 37
    for length in (19, 20, 30, 37):
        found = cache.lookup(pack(private[:length]), "b")
        assert (found.cached_tokens, found.reason) == (16, MissReason.NEVER_SEEN)
        assert cache.alternative(pack(private[:length]), "b") == 0
    lease = cache.match(pack(private), "b")
    assert (lease.cached_tokens, lease.source) == (16, None)
    lease.release()
    assert not cache.in_flight(pack(private), "b", beyond=4)


def test_a_lookup_says_what_the_match_finds(cache: PrefixCache) -> None:
    """Wherever the prompt ends: within the published one, at its end, one token behind it, and far behind."""
    store(cache, [*SYSTEM, *range(1, 20)], "a")
    prompt = [*SYSTEM, *range(1, 12), 500, 501]
    for length in range(1, len(prompt) + 1):
        packed = pack(prompt[:length])
        found = cache.lookup(packed, "a")
        lease = cache.match(packed, "a")
        assert found[:3] == (lease.cached_tokens, lease.reason, lease.position)
        assert lease.cached_tokens < length
        if length >= 17:
            assert lease.cached_tokens >= 16
        lease.release()
        cache.check()


def test_single_flight_works_behind_a_published_prompt(cache: PrefixCache) -> None:
    """The second request of a namespace waits for the first one's blocks."""
    prompt = pack([*SYSTEM, *range(1, 20)])
    lease = cache.match(prompt, "a")
    cache.announce(lease, prompt)
    assert cache.in_flight(prompt, "a", beyond=4)
    assert cache.lookup(prompt, "a").reason is MissReason.IN_FLIGHT
    assert not cache.in_flight(prompt, "a", beyond=3)
    lease.release()


def test_sessions_and_pins_work_behind_a_published_prompt(cache: PrefixCache) -> None:
    """They hold what is behind it; the counts include it."""
    chat = [*SYSTEM, *range(1, 15)]
    lease = begin(cache, chat, "a", Terms(session="s"))
    assert cache.keep_session(lease, 10) == 32
    lease.release()
    assert cache.end_session("a", "s") == 4
    assert cache.pin(pack(chat), "a", "p") == (32, Limit.NOTHING)
    assert cache.pin(pack(SYSTEM), "a", "q") == (16, Limit.NOTHING)
    assert [pin.key.name for pin in cache.pins("a")] == ["p", "q"]
    assert cache.evict(64) == 1  # the half block of the published prompt
    assert cached(cache, chat, "a") == 32
    assert cache.unpin("a", "p") and cache.unpin("a", "q")
    assert cache.invalidate_session("a", "s") == (4, 0)
    cache.check()


def test_forgetting_leaves_what_is_published(cache: PrefixCache) -> None:
    """By prefix, shorter or longer than it, and by namespace."""
    for prefix in ([*SYSTEM, 1, 2], SYSTEM[:3], SYSTEM):
        store(cache, [*SYSTEM, *range(1, 15)], "a")
        store(cache, [*SYSTEM, *range(1, 15)], "b")
        cache.invalidate_prefix(pack(prefix), "a")
        assert cached(cache, [*SYSTEM, *range(1, 15)], "a") <= 17
        assert cached(cache, [*SYSTEM, *range(1, 15)], "b") == 32
    store(cache, [*SYSTEM, *range(1, 15)], "a")
    assert cache.invalidate("a") == (4, 0)
    cache.check()


def test_what_is_unpublished_is_shared_no_longer(cache: PrefixCache) -> None:
    """Running requests finish with it; what was stored behind it is forgotten."""
    chat = [*SYSTEM, *range(1, 15)]
    store(cache, chat, "a")
    lease = cache.match(pack([*chat, 1]), "a")
    assert cache.unpublish("system") and not cache.unpublish("system")
    cache.check()
    assert lease.detached
    assert cached(cache, chat, "a") == 0
    cache.evict(64)
    cache.check()
    lease.release()
    cache.check()
    cache.evict(64)
    assert cache.stats().free == 64


def test_invalidating_the_published_prompt_itself_ends_it(cache: PrefixCache) -> None:
    """Nobody begins with it any more, and nothing wrong is served."""
    store(cache, [*SYSTEM, *range(1, 15)], "a")
    cache.invalidate(cache.shared_namespace)
    assert cached(cache, [*SYSTEM, *range(1, 15)], "a") == 0
    cache.check()


def test_the_longest_published_prompt_counts(cache: PrefixCache) -> None:
    """One may continue another."""
    longer = [*SYSTEM, *range(2000, 2010)]
    store(cache, longer, cache.shared_namespace)
    cache.publish(pack(longer), "longer")
    assert cached(cache, longer, "a") == 28
    assert cached(cache, [*SYSTEM, 1], "a") == 16
    cache.unpublish("longer")
    assert cached(cache, longer, "a") == 16


def test_what_cannot_be_pinned_whole_is_not_published() -> None:
    """Half a published prompt would be none."""
    cache = PrefixCache(64, BLOCK, pin_share=0.05)
    store(cache, SYSTEM, cache.shared_namespace)
    assert cache.publish(pack(SYSTEM), "system") == (0, Limit.BUDGET)
    assert cache.publish(pack([1, 2, 3, 4]), "other") == (0, Limit.NOT_CACHED)
    assert cached(cache, SYSTEM, "a") == 0 and not cache.pins()


def test_valuable_prefixes_behind_a_published_prompt_are_whole(cache: PrefixCache) -> None:
    """Their tokens begin at the beginning, so that they can be computed again anywhere."""
    chat = [*SYSTEM, *range(1, 15)]
    store(cache, chat, "a")
    cache.match(pack([*chat, 1]), "a").release()
    assert ("a", pack(chat)) in cache.valuable(1000)


def test_hashes_behind_a_published_prompt_depend_on_it() -> None:
    """The same tail behind two beginnings has two names; on every replica the same ones."""

    def names(beginning: list[int]) -> set[bytes]:
        cache = PrefixCache(64, BLOCK, pin_share=0.5)
        store(cache, beginning, cache.shared_namespace)
        cache.publish(pack(beginning), "system")
        store(cache, [*beginning, 1, 2, 3, 4], "a")
        return {event.hashes for event in cache.stored("a")}

    assert names(SYSTEM[:8]) == names(SYSTEM[:8])
    assert not names(SYSTEM[:8]) & names(SYSTEM[4:12])
