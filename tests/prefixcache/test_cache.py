"""What the cache's callers see: match, allocate, commit, release, lookup, evict, invalidate."""

from __future__ import annotations

import pytest

from prefixcache.cache import CacheStats, PrefixCache
from prefixcache.eviction import lfu
from prefixcache.lease import BlockSource, Found, Lease, OutOfBlocks
from prefixcache.reasons import MissReason
from prefixcache.tokens import pack

BLOCK = 4


@pytest.fixture
def cache() -> PrefixCache:
    return PrefixCache(64, BLOCK)


def store(cache: PrefixCache, tokens: list[int], namespace: str = "", *, keep_tail: bool = True) -> list[int]:
    """A request from start to end, after which all its tokens are cached; returns its block table."""
    size = cache.block_size
    lease = cache.match(pack(tokens), namespace)
    cache.allocate(lease, -(-len(tokens) // size) - len(lease.blocks))
    lease.copied()
    cache.commit(lease, pack(tokens[lease.shared * size : len(tokens) // size * size]))
    lease.release(pack(tokens[lease.shared * size :]) if keep_tail else b"")
    cache.check()
    return lease.blocks


def start(cache: PrefixCache, tokens: list[int], namespace: str = "") -> Lease:
    """A request that has its blocks and has announced what it computes, but computed nothing."""
    packed = pack(tokens)
    lease = cache.match(packed, namespace)
    cache.announce(lease, packed)
    cache.allocate(lease, -(-len(tokens) // cache.block_size) - len(lease.blocks))
    return lease


def cached(cache: PrefixCache, tokens: list[int], namespace: str = "") -> int:
    return cache.lookup(pack(tokens), namespace).cached_tokens


def tokens_from(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


# Match


def test_an_empty_cache_matches_nothing(cache: PrefixCache) -> None:
    """A cold prompt gets a lease without blocks, and a reason."""
    lease = cache.match(pack(tokens_from(0, 10)))
    assert (lease.blocks, lease.shared, lease.cached_tokens, lease.source) == ([], 0, 0, None)
    assert (lease.reason, lease.position) == (MissReason.NEVER_SEEN, 0)
    lease.release()
    assert cache.stats() == CacheStats(64, 64, 0, 0, 0)


def test_a_match_returns_the_blocks_that_were_committed(cache: PrefixCache) -> None:
    """The shared blocks are the same ids, in order."""
    blocks = store(cache, tokens_from(0, 12))
    lease = cache.match(pack([*tokens_from(0, 12), 99, 99]))
    assert lease.blocks == blocks and lease.shared == 3
    assert lease.cached_tokens == 12 and lease.reason is MissReason.NEVER_SEEN
    lease.release()


def test_a_match_may_end_in_the_middle_of_what_was_committed_at_once(cache: PrefixCache) -> None:
    """Edges are split where prompts part, and both parts stay matchable."""
    blocks = store(cache, tokens_from(0, 16))
    other = [*tokens_from(0, 8), 90, 91, 92, 93]
    other_blocks = store(cache, other)
    assert other_blocks[:2] == blocks[:2] and other_blocks[2] not in blocks
    assert cached(cache, [*tokens_from(0, 16), 99]) == 16
    assert cached(cache, [*other, 99]) == 12


def test_the_last_token_of_a_prompt_is_always_computed(cache: PrefixCache) -> None:
    """Its logits are wanted, so at least one token is left, even if all are cached."""
    store(cache, tokens_from(0, 8))
    lease = cache.match(pack(tokens_from(0, 8)))
    assert lease.cached_tokens == 7 and lease.shared == 1
    assert lease.source is not None and lease.source.tokens == 3
    assert (lease.reason, lease.position) == (MissReason.NONE, 7)
    lease.release()


def test_a_partly_matching_block_is_offered_for_copying(cache: PrefixCache) -> None:
    """Token-exact: the source names the block and how many of its slots are this prompt's."""
    blocks = store(cache, tokens_from(0, 12))
    lease = cache.match(pack([0, 1, 2, 3, 4, 5, 90, 91, 92]))
    assert lease.cached_tokens == 6 and lease.blocks == blocks[:1]
    assert lease.source == BlockSource(blocks[1], 2)
    lease.release()


def test_a_source_block_is_held_until_it_has_been_copied(cache: PrefixCache) -> None:
    """It cannot be evicted before, and can be afterwards."""
    store(cache, tokens_from(0, 8))
    lease = cache.match(pack([0, 1, 2, 3, 4, 90]))
    assert lease.source is not None
    assert cache.evict(64) == 0
    lease.copied()
    lease.copied()
    assert cache.evict(64) == 1
    lease.release()
    cache.check()


def test_a_source_is_let_go_with_the_lease(cache: PrefixCache) -> None:
    """A request that ends before copying leaks nothing."""
    store(cache, tokens_from(0, 8))
    cache.match(pack([0, 1, 2, 3, 4, 90])).release()
    assert cache.stats().leased == 0
    assert cache.evict(64) == 2


def test_reading_can_be_switched_off(cache: PrefixCache) -> None:
    """The prompt is computed as if cold, and says so."""
    store(cache, tokens_from(0, 12))
    lease = cache.match(pack(tokens_from(0, 12)), read=False)
    assert (lease.cached_tokens, lease.blocks, lease.reason) == (0, [], MissReason.BYPASSED)
    lease.release()


# Allocate


def test_allocating_evicts_exactly_what_is_missing(cache: PrefixCache) -> None:
    """Nothing is evicted while blocks are free, and then no more than needed."""
    store(cache, tokens_from(0, 40))
    lease = cache.match(pack([99]))
    cache.allocate(lease, 54)
    assert cache.stats() == CacheStats(64, 0, 10, 54, 0)
    cache.allocate(lease, 3)
    assert cache.stats() == CacheStats(64, 0, 7, 57, 3)
    lease.release()


def test_a_refused_allocation_changes_nothing(cache: PrefixCache) -> None:
    """All or nothing: neither the lease nor the cached prompts suffer."""
    store(cache, tokens_from(0, 40))
    lease = cache.match(pack([99]))
    with pytest.raises(OutOfBlocks):
        cache.allocate(lease, 65)
    assert lease.blocks == [] and cache.stats() == CacheStats(64, 54, 10, 0, 0)
    lease.release()


def test_leased_blocks_are_not_evicted(cache: PrefixCache) -> None:
    """What a lease holds stays, whoever asks; released, it goes."""
    store(cache, tokens_from(0, 40))
    holder = cache.match(pack(tokens_from(0, 41)))
    assert holder.shared == 10 and cache.available_blocks == 54
    lease = cache.match(pack([99]))
    with pytest.raises(OutOfBlocks):
        cache.allocate(lease, 55)
    holder.release()
    cache.allocate(lease, 64)
    lease.release()
    assert cache.stats() == CacheStats(64, 64, 0, 0, 10)


def test_a_growing_sequence_gets_adjacent_blocks(cache: PrefixCache) -> None:
    """Attention reads adjacent blocks as one run, so `room` keeps two sequences out of each other's way."""
    a, b = cache.match(pack([1])), cache.match(pack([2]))
    for lease in (a, b):
        cache.allocate(lease, 2, room=8)
    for _ in range(8):
        cache.allocate(a, 1)
        cache.allocate(b, 1)
    for lease in (a, b):
        assert lease.blocks == list(range(lease.blocks[0], lease.blocks[0] + 10))
        lease.release()


def test_a_finished_sequence_keeps_no_room_to_grow(cache: PrefixCache) -> None:
    """What comes next lies right behind it."""
    first = cache.match(pack([1]))
    cache.allocate(first, 2, room=20)
    cache.commit(first, pack(tokens_from(1, 8)))
    first.release()
    second = cache.match(pack([2]))
    cache.allocate(second, 1)
    assert second.blocks == [first.blocks[-1] + 1]
    second.release()


# Commit


def test_committed_blocks_are_shared_at_once(cache: PrefixCache) -> None:
    """A request admitted in the next step finds them, while the first one still runs."""
    tokens = tokens_from(0, 16)
    first = start(cache, tokens)
    cache.commit(first, pack(tokens[:8]))
    assert cached(cache, tokens) == 8
    second = cache.match(pack(tokens))
    assert second.blocks == first.blocks[:2]
    cache.commit(first, pack(tokens[8:16]))
    assert cached(cache, [*tokens, 99]) == 16
    cache.check()
    first.release()
    second.release()
    assert cache.stats().leased == 0


def test_generated_tokens_are_committed_like_prompt_tokens(cache: PrefixCache) -> None:
    """The next turn of a chat finds the question and the answer."""
    lease = start(cache, tokens_from(0, 6))
    cache.commit(lease, pack(tokens_from(0, 4)))
    cache.allocate(lease, 2)
    cache.commit(lease, pack(tokens_from(4, 8)))
    lease.release()
    assert cached(cache, [*tokens_from(0, 12), 99]) == 12


def test_a_sequence_committed_in_pieces_is_one_edge(cache: PrefixCache) -> None:
    """A chat that nobody branches off from costs one step to walk."""
    lease = start(cache, tokens_from(0, 32))
    for first in range(0, 32, 4):
        cache.commit(lease, pack(tokens_from(first, 4)))
        cache.check()
    assert lease.node.parent is not None and lease.node.parent.parent is None
    lease.release()
    assert cached(cache, tokens_from(0, 33)) == 32


def test_turns_of_a_conversation_are_one_edge(cache: PrefixCache) -> None:
    """The partly filled block that a turn ended with does not cut the sequence in two."""
    for length in (10, 23, 37, 51):
        store(cache, tokens_from(0, length))
    (space,) = cache._spaces.values()
    assert sorted(len(node.blocks) for node in cache._tree.nodes(space.root)) == [1, 12]


def test_an_edge_that_others_use_does_not_grow(cache: PrefixCache) -> None:
    """Another lease that ends at the same node must not come to hold more than it matched."""
    tokens = tokens_from(0, 8)
    first = start(cache, tokens_from(0, 16))
    cache.commit(first, pack(tokens))
    second = cache.match(pack(tokens_from(0, 9)))
    cache.commit(first, pack(tokens_from(8, 8)))
    cache.check()
    first.release()
    assert cache.stats().cached == 2 and second.blocks == first.blocks[:2]
    assert cache.evict(64) == 2
    second.release()


def test_edges_end_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Very long sequences are cut into several edges, whether committed at once or in pieces."""
    monkeypatch.setattr("prefixcache.cache.MAX_EDGE_BLOCKS", 4)
    for piece in (4, 12, 44):
        cache = PrefixCache(16, BLOCK)
        lease = start(cache, tokens_from(0, 44))
        for first in range(0, 44, piece):
            cache.commit(lease, pack(tokens_from(first, min(piece, 44 - first))))
            cache.check()
        lengths = []
        node = lease.node
        while node.parent is not None:
            lengths.append(len(node.blocks))
            node = node.parent
        assert max(lengths) <= 4 and sum(lengths) == 11
        lease.release()
        assert cached(cache, tokens_from(0, 45)) == 44


def test_committing_nothing_is_allowed(cache: PrefixCache) -> None:
    """A step that filled no block needs no special case."""
    lease = start(cache, [1, 2])
    cache.commit(lease, b"")
    assert cache.stats().cached == 0
    lease.release()


# Release and tails


def test_a_release_keeps_what_was_committed_and_frees_the_rest(cache: PrefixCache) -> None:
    """Blocks that were allocated and never committed go back to the pool."""
    lease = start(cache, tokens_from(0, 16))
    cache.commit(lease, pack(tokens_from(0, 8)))
    assert cache.stats() == CacheStats(64, 60, 0, 4, 0)
    lease.release()
    assert lease.released
    assert cache.stats() == CacheStats(64, 62, 2, 0, 0)


def test_a_partly_filled_block_is_kept_if_asked_for(cache: PrefixCache) -> None:
    """The tail costs one block and makes an exact repeat cheap."""
    store(cache, tokens_from(0, 6), keep_tail=False)
    assert cached(cache, tokens_from(0, 6)) == 4
    store(cache, tokens_from(0, 6))
    assert cached(cache, tokens_from(0, 6)) == 5
    assert cache.stats().cached == 2


def test_a_tail_gives_way_to_what_contains_it(cache: PrefixCache) -> None:
    """A longer tail or the whole block replaces it, so growing chats leave no trail of tails."""
    for length in (5, 6, 7):
        store(cache, tokens_from(0, length))
        assert cache.stats().cached == 2
    store(cache, tokens_from(0, 8))
    assert cache.stats().cached == 2
    assert cached(cache, tokens_from(0, 9)) == 8


def test_a_tail_that_is_contained_already_is_not_kept(cache: PrefixCache) -> None:
    """Neither a longer tail nor a whole block is joined by its own beginning."""
    store(cache, tokens_from(0, 7))
    store(cache, tokens_from(0, 6))
    assert cache.stats().cached == 2
    store(cache, tokens_from(10, 8))
    store(cache, tokens_from(10, 6))
    assert cache.stats().cached == 4


def test_tails_that_differ_live_side_by_side(cache: PrefixCache) -> None:
    """Each of several endings can be repeated."""
    endings = [[*tokens_from(0, 4), 7, ending] for ending in (1, 2, 3)]
    for tokens in endings:
        store(cache, tokens)
    assert [cached(cache, [*tokens, 99]) for tokens in endings] == [6, 6, 6]


def test_a_tail_in_use_survives_what_contains_it(cache: PrefixCache) -> None:
    """Another request is about to copy from it."""
    store(cache, tokens_from(0, 6))
    reader = cache.match(pack(tokens_from(0, 6)))
    assert reader.source is not None
    store(cache, tokens_from(0, 8))
    cache.check()
    assert cache.stats().leased == 2
    reader.release()
    cache.check()
    assert cache.stats().leased == 0 and cached(cache, tokens_from(0, 9)) == 8


def test_block_size_one_has_no_tails() -> None:
    """Every token is a whole block, and nothing is ever copied."""
    cache = PrefixCache(16, 1)
    store(cache, tokens_from(0, 5))
    lease = cache.match(pack(tokens_from(0, 5)))
    assert (lease.cached_tokens, lease.source) == (4, None)
    lease.release()


# Lookup and reasons


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([5], Found(0, MissReason.TOO_SHORT, 0)),
        (tokens_from(0, 8), Found(7, MissReason.NONE, 7)),
        (tokens_from(0, 3), Found(2, MissReason.NONE, 2)),
        ([50, 51, 52], Found(0, MissReason.NEVER_SEEN, 0)),
        ([*tokens_from(0, 8), 99, 99], Found(8, MissReason.NEVER_SEEN, 8)),
        ([*tokens_from(0, 5), 99, 99], Found(5, MissReason.DIVERGED, 5)),
        ([*tokens_from(0, 4), 99, 99], Found(4, MissReason.DIVERGED, 4)),
    ],
)
def test_a_lookup_says_why_no_more_is_cached(cache: PrefixCache, prompt: list[int], expected: Found) -> None:
    """The most specific reason that holds, and the position of the first token to compute."""
    store(cache, tokens_from(0, 8))
    assert cache.lookup(pack(prompt)) == expected
    lease = cache.match(pack(prompt))
    assert Found(lease.cached_tokens, lease.reason, lease.position) == expected
    lease.release()


def test_an_evicted_prefix_is_explained(cache: PrefixCache) -> None:
    """Wherever the cut is, the block behind it is known to have been evicted."""
    store(cache, tokens_from(0, 16))
    for remaining in (12, 8, 4, 0):
        cache.evict(1)
        assert cache.lookup(pack(tokens_from(0, 17))) == Found(remaining, MissReason.EVICTED, remaining)
    store(cache, tokens_from(0, 16))
    assert cache.lookup(pack(tokens_from(0, 16))).reason is MissReason.NONE


def test_an_invalidated_prefix_is_explained(cache: PrefixCache) -> None:
    """By lookup and match alike, also when the whole namespace is gone."""
    store(cache, tokens_from(0, 16), "a")
    cache.invalidate("a")
    assert cache.lookup(pack(tokens_from(0, 16)), "a") == Found(0, MissReason.INVALIDATED, 0)
    lease = cache.match(pack(tokens_from(0, 16)), "a")
    assert lease.reason is MissReason.INVALIDATED
    lease.release()


def test_a_namespace_of_which_everything_was_evicted_is_explained(cache: PrefixCache) -> None:
    """Forgetting an empty namespace does not forget why it is empty."""
    store(cache, tokens_from(0, 16), "a")
    cache.evict(64)
    assert cache.lookup(pack(tokens_from(0, 16)), "a") == Found(0, MissReason.EVICTED, 0)


def test_what_is_being_computed_is_in_flight_until_it_is_committed(cache: PrefixCache) -> None:
    """So that a second request can wait for it instead of computing it again."""
    tokens = tokens_from(0, 16)
    prompt = pack([*tokens, 99])
    lease = start(cache, tokens)
    assert cache.lookup(prompt) == Found(0, MissReason.IN_FLIGHT, 0)
    assert all(cache.in_flight(prompt, beyond=beyond) for beyond in range(4))
    assert not cache.in_flight(prompt, beyond=4)
    cache.commit(lease, pack(tokens[:8]))
    assert cache.lookup(prompt) == Found(8, MissReason.IN_FLIGHT, 8)
    assert not cache.in_flight(prompt, beyond=1)
    assert not cache.in_flight(pack([*tokens[:8], 99, 99, 99, 99, 99]), beyond=2)
    cache.commit(lease, pack(tokens[8:]))
    assert cache.lookup(prompt) == Found(16, MissReason.NONE, 16)
    lease.release()


def test_what_a_request_gave_up_is_not_in_flight(cache: PrefixCache) -> None:
    """A waiter never waits for somebody who has left."""
    other = start(cache, tokens_from(50, 16))
    lease = start(cache, tokens_from(0, 16))
    lease.release()
    assert cache.lookup(pack(tokens_from(0, 17))).reason is MissReason.NEVER_SEEN
    other.release()


def test_a_lookup_changes_nothing(cache: PrefixCache) -> None:
    """Not even what is evicted first."""
    store(cache, tokens_from(0, 8))
    store(cache, tokens_from(50, 8))
    for _ in range(5):
        assert cached(cache, tokens_from(0, 9)) == 8
        assert cached(cache, tokens_from(0, 6)) == 5
        assert cached(cache, tokens_from(90, 6), "elsewhere") == 0
    cache.evict(2)
    assert (cached(cache, tokens_from(0, 9)), cached(cache, tokens_from(50, 9))) == (0, 8)
    cache.check()


# Evict and invalidate


def test_the_least_recently_used_prefix_is_evicted_first(cache: PrefixCache) -> None:
    """A match counts as use, and so does having been computed."""
    for first in (0, 100, 200):
        store(cache, tokens_from(first, 8))
    cache.match(pack(tokens_from(0, 9))).release()
    store(cache, tokens_from(300, 8))
    for expected in ([8, 0, 8, 8], [8, 0, 0, 8], [0, 0, 0, 8]):
        cache.evict(2)
        assert [cached(cache, tokens_from(first, 9)) for first in (0, 100, 200, 300)] == expected


def test_a_prefix_is_as_recent_as_the_end_of_its_last_use(cache: PrefixCache) -> None:
    """A long request's blocks are newer than what came and went while it ran."""
    store(cache, tokens_from(0, 8))
    reader, writer = cache.match(pack(tokens_from(0, 9))), start(cache, tokens_from(50, 8))
    cache.commit(writer, pack(tokens_from(50, 8)))
    store(cache, tokens_from(100, 8))
    reader.release()
    writer.release()
    cache.evict(2)
    assert [cached(cache, tokens_from(first, 9)) for first in (0, 50, 100)] == [8, 8, 0]


def test_a_policy_can_be_chosen() -> None:
    """LFU keeps what was reused most, however long ago."""
    cache = PrefixCache(64, BLOCK, policy=lfu)
    store(cache, tokens_from(0, 8))
    for _ in range(3):
        cache.match(pack(tokens_from(0, 9))).release()
    store(cache, tokens_from(100, 8))
    cache.match(pack(tokens_from(100, 9))).release()
    cache.evict(2)
    assert [cached(cache, tokens_from(first, 9)) for first in (0, 100)] == [8, 0]


def test_a_parent_is_evictable_once_its_last_child_is_gone(cache: PrefixCache) -> None:
    """Two branches of one stem: the stem goes last."""
    store(cache, [*tokens_from(0, 8), *tokens_from(20, 4)])
    store(cache, [*tokens_from(0, 8), *tokens_from(30, 4)])
    assert cache.evict(2) == 2
    assert cached(cache, tokens_from(0, 9)) == 8
    assert cache.evict(10) == 2
    assert cache.stats() == CacheStats(64, 64, 0, 0, 4)


def test_evicting_more_than_there_is_evicts_all_there_is(cache: PrefixCache) -> None:
    """The count says how many."""
    store(cache, tokens_from(0, 8))
    held = cache.match(pack(tokens_from(0, 5)))
    assert cache.evict(10) == 1
    assert cache.evict(10) == 0
    held.release()
    assert cache.evict(10) == 1


def test_one_namespace_can_be_invalidated(cache: PrefixCache) -> None:
    """The others keep what they have."""
    for namespace in ("a", "b"):
        store(cache, tokens_from(0, 8), namespace)
    assert cache.invalidate("a") == (2, 0)
    assert (cached(cache, tokens_from(0, 9), "a"), cached(cache, tokens_from(0, 9), "b")) == (0, 8)
    assert cache.invalidate("unknown") == (0, 0)
    assert cache.invalidate() == (2, 0)
    cache.check()


def test_an_empty_namespace_costs_nothing(cache: PrefixCache) -> None:
    """Asking for a namespace, or evicting all of it, leaves nothing behind."""
    for number in range(100):
        cache.match(pack([1, 2]), f"tenant {number}").release()
        cache.lookup(pack([1, 2]), f"tenant {number}")
    store(cache, tokens_from(0, 8), "a")
    cache.evict(64)
    assert not cache._spaces


def test_a_detached_lease_can_be_used_to_the_end(cache: PrefixCache) -> None:
    """After an invalidation its blocks stay its own, but nothing of it is stored any more."""
    tokens = tokens_from(0, 16)
    lease = start(cache, tokens)
    cache.commit(lease, pack(tokens[:8]))
    blocks = list(lease.blocks)
    assert cache.invalidate() == (0, 2)
    assert lease.detached
    cache.commit(lease, pack(tokens[8:16]))
    cache.allocate(lease, 1)
    assert lease.blocks[:4] == blocks and cached(cache, tokens) == 0
    cache.check()
    lease.release(pack([1, 2]))
    assert cache.stats() == CacheStats(64, 64, 0, 0, 0, invalidated=2)
    cache.check()


def test_every_block_is_free_cached_or_leased(cache: PrefixCache) -> None:
    """The three always add up to all, and each is what it says."""
    lease = start(cache, tokens_from(0, 16))
    assert cache.stats() == CacheStats(64, 60, 0, 4, 0)
    cache.commit(lease, pack(tokens_from(0, 16)))
    assert cache.stats() == CacheStats(64, 60, 0, 4, 0)
    lease.release()
    assert cache.stats() == CacheStats(64, 60, 4, 0, 0)
    lease = cache.match(pack(tokens_from(0, 9)))
    assert cache.stats() == CacheStats(64, 60, 2, 2, 0)
    lease.release()
    assert cache.available_blocks == cache.total_blocks == 64
