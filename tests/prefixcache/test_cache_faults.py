"""Faults that prefix caches are known for, each with a test that ours does not have it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from prefixcache.cache import PrefixCache
from prefixcache.eviction import POLICIES, lru
from prefixcache.lease import CacheEvent, Found, Lease, OutOfBlocks, Removed, Stored
from prefixcache.reasons import MissReason
from prefixcache.tokens import HASH_BYTES, chain_hashes, pack
from prefixcache.tree import Node, RadixTree
from tests.prefixcache.test_cache import cached, start, store, tokens_from

BLOCK = 16


@pytest.fixture
def cache() -> PrefixCache:
    return PrefixCache(256, BLOCK)


# What a match refreshes


def test_a_match_inside_an_edge_does_not_refresh_the_rest_of_it(cache: PrefixCache) -> None:
    """The unmatched rest stays as old as it was, so it goes before a newer entry."""
    store(cache, tokens_from(0, 64))
    store(cache, tokens_from(100, 16))
    cache.match(pack(tokens_from(0, 33))).release()
    cache.evict(2)
    assert cached(cache, tokens_from(0, 65)) == 32
    assert cached(cache, tokens_from(100, 17)) == 16


def test_a_match_inside_an_edge_refreshes_what_it_matched(cache: PrefixCache) -> None:
    """The matched part is newer than an entry stored before the match."""
    store(cache, tokens_from(0, 64))
    store(cache, tokens_from(100, 16))
    cache.match(pack(tokens_from(0, 33))).release()
    cache.evict(3)
    assert cached(cache, tokens_from(0, 65)) == 32
    assert cached(cache, tokens_from(100, 17)) == 0


def test_a_prefix_is_as_recent_as_anything_that_matched_through_it(cache: PrefixCache) -> None:
    """A stem used by a branch that is gone since is not older than that branch was."""
    stem = tokens_from(0, 32)
    store(cache, [*stem, *tokens_from(50, 16)])
    store(cache, [*stem, *tokens_from(80, 16)])
    store(cache, tokens_from(100, 16))
    cache.match(pack([*stem, *tokens_from(80, 17)])).release()
    cache.evict(2)
    assert cached(cache, [*stem, *tokens_from(80, 17)]) == 48
    cache.evict(1)
    assert cached(cache, [*stem, 1]) == 32


def test_a_tail_that_is_copied_from_is_refreshed(cache: PrefixCache) -> None:
    """An often repeated prompt keeps its last, partly filled block, also if nobody stores it again."""
    store(cache, tokens_from(0, 20))
    store(cache, tokens_from(100, 16))
    cache.match(pack(tokens_from(0, 20))).release()
    cache.evict(1)
    assert cached(cache, tokens_from(0, 20)) == 19
    assert cached(cache, tokens_from(100, 17)) == 0


def test_a_tail_that_is_computed_again_is_refreshed(cache: PrefixCache) -> None:
    """Also by a request that did not read the cache: it would have stored the same."""
    store(cache, tokens_from(0, 20))
    store(cache, tokens_from(100, 16))
    lease = cache.match(pack(tokens_from(0, 21)), read=False)
    cache.allocate(lease, 2)
    cache.commit(lease, pack(tokens_from(0, 16)))
    lease.release(pack(tokens_from(16, 4)))
    cache.evict(1)
    assert cached(cache, tokens_from(0, 20)) == 19
    assert cached(cache, tokens_from(100, 17)) == 0


@pytest.mark.parametrize("tail", [False, True])
def test_sharing_a_few_tokens_of_a_long_entry_does_not_refresh_it(cache: PrefixCache, tail: bool) -> None:
    """Neither copying from its first block nor ending with a tail that it contains."""
    store(cache, tokens_from(0, 64))
    store(cache, tokens_from(100, 16))
    if tail:
        store(cache, tokens_from(0, 3))
    else:
        cache.match(pack([0, 1, 2, 99])).release()
    cache.evict(4)
    assert cached(cache, tokens_from(0, 65)) == 0
    assert cached(cache, tokens_from(100, 17)) == 16


# What an eviction takes, and what finding it costs


@pytest.mark.parametrize("blocks", [10, 1024, 2500])
def test_asking_for_one_block_takes_one_block_of_a_long_leaf(blocks: int) -> None:
    """Its tail is trimmed; the rest stays matchable, however often that happens."""
    cache = PrefixCache(blocks, BLOCK)
    tokens = tokens_from(0, blocks * BLOCK)
    store(cache, tokens)
    for gone in range(1, 6):
        assert cache.evict(1) == 1
        assert cached(cache, tokens) == (blocks - gone) * BLOCK
    cache.check()


def test_a_long_leaf_is_not_trimmed_below_what_is_needed(cache: PrefixCache) -> None:
    """An allocation that misses three blocks costs three."""
    store(cache, tokens_from(0, 200 * BLOCK))
    lease = cache.match(pack([9_999]))
    cache.allocate(lease, 59)
    assert cached(cache, tokens_from(0, 200 * BLOCK + 1)) == 197 * BLOCK
    lease.release()


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[int]:
    """Replace a method by itself with a counter; returns a list of one number."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = [0]

    def counted(*arguments: Any) -> Any:
        calls[0] += 1
        return original(*arguments)

    monkeypatch.setattr(owner, name, staticmethod(counted) if name == "evictable" else counted)
    return calls


def test_an_eviction_looks_at_the_nodes_it_evicts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among 10,000 leaves, the policy and the tree are asked about a handful, not about all."""
    asked = [0]

    def policy(node: Node) -> int:
        asked[0] += 1
        return lru(node)

    leaves = 10_000
    cache = PrefixCache(leaves, 1, policy=policy)
    for number in range(leaves):
        lease = cache.match(pack([number]))
        cache.allocate(lease, 1)
        cache.commit(lease, pack([number]))
        lease.release()
    walks = count_calls(monkeypatch, RadixTree, "nodes")
    looks = count_calls(monkeypatch, RadixTree, "evictable")
    for taken in (1, 10, 100):
        asked[0] = looks[0] = 0
        assert cache.evict(taken) == taken
        assert asked[0] <= 2 * taken
        assert looks[0] <= 4 * taken
    assert walks == [0]


def test_a_stale_entry_of_the_queue_is_corrected_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matches pay for what they made stale: the next eviction looks at each once, the one after at none."""
    cache = PrefixCache(1_000, 1)
    for number in range(1_000):
        store_one(cache, number)
    for number in range(999):
        cache.match(pack([number, 0])).release()
    looks = count_calls(monkeypatch, RadixTree, "evictable")
    assert cache.evict(1) == 1 and cached(cache, [999, 0]) == 0
    assert looks[0] <= 1_000 + 2
    looks[0] = 0
    assert cache.evict(1) == 1 and cached(cache, [0, 0]) == 0
    assert looks[0] <= 4


def store_one(cache: PrefixCache, token: int) -> None:
    """As `store` for one token, without its check of everything."""
    lease = cache.match(pack([token]))
    cache.allocate(lease, 1)
    cache.commit(lease, pack([token]))
    lease.release()


def test_the_eviction_queue_is_bounded_by_the_tree() -> None:
    """However often prompts are matched, extended, shortened and invalidated."""
    cache = PrefixCache(200, 1)
    source = random.Random(1)
    for _ in range(3_000):
        stem = source.randrange(5)
        tokens = [stem, *(source.randrange(3) for _ in range(source.randrange(1, 6)))]
        lease = cache.match(pack(tokens), str(stem % 2))
        cache.allocate(lease, len(tokens) - lease.shared)
        cache.commit(lease, pack(tokens[lease.shared :]))
        lease.release()
        if source.random() < 0.05:
            cache.invalidate(str(stem % 2))
        nodes = sum(1 for space in cache._spaces.values() for _ in cache._tree.nodes(space.root))
        assert len(cache._queue) <= 2 * nodes + 2
    cache.check()


def test_tails_that_were_replaced_do_not_pile_up_in_the_queue() -> None:
    """A conversation that grows token by token is two entries, not hundreds."""
    cache = PrefixCache(64, BLOCK)
    for length in range(1, 500):
        store(cache, tokens_from(0, length))
        assert len(cache._queue) <= 4


# When blocks become visible


def test_blocks_are_matchable_only_after_their_commit(cache: PrefixCache) -> None:
    """Allocated is not computed: others are told that it is under way, and get nothing."""
    tokens = tokens_from(0, 48)
    lease = start(cache, tokens)
    other = cache.match(pack([*tokens, 1]))
    assert (other.cached_tokens, other.blocks, other.reason) == (0, [], MissReason.IN_FLIGHT)
    other.release()
    cache.commit(lease, pack(tokens[:16]))
    assert cached(cache, [*tokens, 1]) == 16
    lease.release()
    assert cached(cache, [*tokens, 1]) == 16
    cache.check()


def test_blocks_of_an_aborted_request_are_never_matched(cache: PrefixCache) -> None:
    """They go back to the pool and are somebody else's next."""
    lease = start(cache, tokens_from(0, 48))
    aborted = set(lease.blocks)
    lease.release()
    assert cached(cache, tokens_from(0, 49)) == 0
    assert aborted & set(store(cache, tokens_from(100, 48)))


def test_duplicates_computed_side_by_side_end_as_one_copy(cache: PrefixCache) -> None:
    """Both leases hold the same blocks afterwards, and the second copies are free at once."""
    tokens = tokens_from(0, 64)
    first, second = start(cache, tokens), start(cache, tokens)
    assert not set(first.blocks) & set(second.blocks)
    cache.commit(first, pack(tokens))
    cache.commit(second, pack(tokens))
    assert first.blocks == second.blocks and second.shared == 4
    assert cache.stats().free == 256 - 4
    cache.check()
    first.release()
    second.release()
    assert cache.stats().cached == 4


def test_duplicates_that_overlap_in_part_are_merged_in_part(cache: PrefixCache) -> None:
    """In pieces that do not line up, with tokens that differ after a while, and with tables kept in order."""
    stem = tokens_from(0, 48)
    first, second = start(cache, [*stem, *tokens_from(100, 16)]), start(cache, [*stem, *tokens_from(200, 16)])
    own = list(second.blocks)
    cache.commit(first, pack(stem[:16]))
    cache.commit(second, pack(stem[:32]))
    assert second.blocks == [first.blocks[0], *own[1:]]
    cache.commit(first, pack([*stem[16:], *tokens_from(100, 16)]))
    cache.commit(second, pack([*stem[32:], *tokens_from(200, 16)]))
    assert second.blocks[:3] == first.blocks[:3] and second.blocks[3] == own[3]
    assert first.blocks[1] == own[1]
    assert cache.stats().free == 256 - 5
    cache.check()
    first.release()
    second.release()
    assert cache.stats().cached == 5


# Leases


def test_a_double_release_is_harmless(cache: PrefixCache) -> None:
    """The second does nothing, even if somebody else holds the same prefix by then."""
    store(cache, tokens_from(0, 32))
    first = cache.match(pack(tokens_from(0, 33)))
    first.release()
    second = cache.match(pack(tokens_from(0, 33)))
    before = cache.stats()
    first.release()
    first.release(pack([1, 2, 3]))
    first.copied()
    assert cache.stats() == before
    assert cache.evict(256) == 0
    second.release()
    cache.check()


def running(cache: PrefixCache) -> Lease:
    """A lease in the middle of everything: shared blocks, a source, own blocks, some of them committed."""
    lease = start(cache, [*tokens_from(0, 24), *tokens_from(200, 40)])
    assert lease.shared == 1 and lease.source is not None
    cache.commit(lease, pack([*tokens_from(16, 8), *tokens_from(200, 8)]))
    return lease


def released_while_matched(cache: PrefixCache) -> None:
    cache.match(pack(tokens_from(0, 33))).release()


def released_with_source(cache: PrefixCache) -> None:
    cache.match(pack(tokens_from(0, 20))).release()


def released_while_running(cache: PrefixCache) -> None:
    running(cache).release()


def released_with_tail(cache: PrefixCache) -> None:
    running(cache).release(pack([208, 209]))


def released_after_refusal(cache: PrefixCache) -> None:
    lease = running(cache)
    with pytest.raises(OutOfBlocks):
        cache.allocate(lease, 10_000)
    lease.release()


def released_after_invalidation(cache: PrefixCache) -> None:
    lease = running(cache)
    cache.invalidate()
    lease.release(pack([208, 209]))


def released_without_reading(cache: PrefixCache) -> None:
    lease = cache.match(pack(tokens_from(0, 32)), read=False)
    cache.allocate(lease, 2)
    cache.commit(lease, pack(tokens_from(0, 32)))
    lease.release()


@pytest.mark.parametrize(
    "end",
    [
        released_while_matched,
        released_with_source,
        released_while_running,
        released_with_tail,
        released_after_refusal,
        released_after_invalidation,
        released_without_reading,
    ],
)
def test_a_lease_never_leaks(cache: PrefixCache, end: Callable[[PrefixCache], None]) -> None:
    """Whatever state a request ends in, nothing stays leased and everything can be evicted."""
    store(cache, tokens_from(0, 32))
    end(cache)
    cache.check()
    assert cache.stats().leased == 0
    cache.evict(256)
    assert cache.stats().free == 256
    assert not cache._leases and not cache._spaces


# The exact repeat of a prompt

AROUND_BLOCKS = [1, 2, 15, 16, 17, 18, 31, 32, 33, 47, 48, 49, 1023, 1024, 1025]


@pytest.mark.parametrize("length", AROUND_BLOCKS)
@pytest.mark.parametrize("generated", [0, 1, 5, 16])
@pytest.mark.parametrize("block_size", [1, 2, 16])
def test_an_exact_repeat_computes_only_the_last_token(length: int, generated: int, block_size: int) -> None:
    """For lengths around block boundaries, by way of the partly filled block, whatever was generated after it."""
    cache = PrefixCache(2_048, block_size)
    prompt = tokens_from(0, length)
    store(cache, [*prompt, *tokens_from(5_000, generated)])
    for _ in range(2):
        lease = cache.match(pack(prompt))
        assert lease.cached_tokens == length - 1
        assert lease.reason is (MissReason.NONE if length > 1 else MissReason.TOO_SHORT)
        assert lease.shared == (length - 1) // block_size
        lease.release()


@pytest.mark.parametrize("length", AROUND_BLOCKS)
def test_a_repeat_with_another_answer_leaves_both_repeatable(length: int) -> None:
    """Two answers to one prompt share all of the prompt, and neither displaces the other."""
    cache = PrefixCache(256, BLOCK)
    prompt = tokens_from(0, length)
    answers = [tokens_from(5_000, 7), tokens_from(6_000, 20)]
    for answer in answers:
        store(cache, [*prompt, *answer])
    for answer in answers:
        assert cached(cache, [*prompt, *answer, 1]) == length + len(answer)
    assert cached(cache, prompt) == length - 1


# What the tree keeps alive


def test_edges_hold_their_own_bytes_and_no_more(cache: PrefixCache) -> None:
    """No edge is a view of a prompt, so a prompt's memory goes when its caller lets go of it."""
    prompt = pack([*tokens_from(0, 100), *tokens_from(1_000, 30)])
    before = sys.getrefcount(prompt)
    for packed in (prompt, pack([*tokens_from(0, 100), *tokens_from(2_000, 30)])):
        lease = cache.match(packed)
        cache.announce(lease, packed)
        cache.allocate(lease, 9 - len(lease.blocks))
        cache.commit(lease, packed[lease.shared * cache.block_bytes : 8 * cache.block_bytes])
        lease.release(packed[8 * cache.block_bytes :])
        del lease
    cache.evict(1)
    assert sys.getrefcount(prompt) == before
    nodes = [node for space in cache._spaces.values() for node in cache._tree.nodes(space.root)]
    assert len(nodes) >= 3
    for node in nodes:
        assert type(node.edge) is bytes
        assert len(node.edge) <= len(node.blocks) * cache.block_bytes
    assert sum(len(node.blocks) for node in nodes) == cache.stats().cached


def test_removed_reasons_are_remembered_within_a_budget() -> None:
    """The newest are known, the oldest forgotten, and their number never exceeds the budget."""
    cache = PrefixCache(64, 1, memory_of_removed=100)
    for number in range(1_000):
        store_one(cache, number)
    cache.evict(64)
    assert len(cache._removed) == 100
    assert cache.lookup(pack([999, 0])).reason is MissReason.EVICTED
    assert cache.lookup(pack([0, 0])).reason is MissReason.NEVER_SEEN


def test_what_was_removed_again_is_remembered_as_the_newest() -> None:
    """The budget goes to what was removed last, however early it was removed first."""
    cache = PrefixCache(8, 1, memory_of_removed=2)
    for number in (1, 2, 1, 3):
        store_one(cache, number)
        cache.evict(1)
    reasons = [cache.lookup(pack([number, 0])).reason for number in (1, 2, 3)]
    assert reasons == [MissReason.EVICTED, MissReason.NEVER_SEEN, MissReason.EVICTED]


def test_remembering_can_be_switched_off() -> None:
    """With a budget of nothing, nothing is kept and nothing is hashed."""
    cache = PrefixCache(8, 1, memory_of_removed=0)
    store_one(cache, 1)
    cache.evict(1)
    store_one(cache, 2)
    cache.invalidate()
    assert not cache._removed
    assert cache.lookup(pack([1, 0])).reason is MissReason.NEVER_SEEN


# Namespaces


def test_nothing_is_shared_between_namespaces(cache: PrefixCache) -> None:
    """Not by a match, not by a lookup, not by copying part of a block."""
    blocks = store(cache, tokens_from(0, 40), "a")
    for length in (41, 40, 33, 20, 2):
        prompt = pack(tokens_from(0, length))
        assert cache.lookup(prompt, "b") == Found(0, MissReason.NEVER_SEEN, 0)
        lease = cache.match(prompt, "b")
        assert (lease.blocks, lease.cached_tokens, lease.source) == ([], 0, None)
        lease.release()
    assert not set(store(cache, tokens_from(0, 40), "b")) & set(blocks)
    assert cached(cache, tokens_from(0, 40), "b") == 39


def test_reasons_tell_nothing_about_other_namespaces(cache: PrefixCache) -> None:
    """Evicted, invalidated, diverged and in flight are facts of one namespace only."""
    prompt = pack(tokens_from(0, 33))
    lease = start(cache, tokens_from(0, 33), "a")
    assert cache.in_flight(prompt, "a") and not cache.in_flight(prompt, "b")
    assert cache.lookup(prompt, "b").reason is MissReason.NEVER_SEEN
    cache.commit(lease, pack(tokens_from(0, 32)))
    lease.release()
    cache.evict(1)
    assert cache.lookup(prompt, "a").reason is MissReason.EVICTED
    assert cache.lookup(prompt, "b").reason is MissReason.NEVER_SEEN
    cache.invalidate("a")
    assert cache.lookup(prompt, "a").reason is MissReason.INVALIDATED
    assert cache.lookup(prompt, "b").reason is MissReason.NEVER_SEEN
    store(cache, tokens_from(0, 8), "a")
    assert cache.lookup(pack([0, 1, 99, 99]), "a").reason is MissReason.DIVERGED
    assert cache.lookup(pack([0, 1, 99, 99]), "b").reason is MissReason.NEVER_SEEN


def test_duplicates_are_not_merged_across_namespaces(cache: PrefixCache) -> None:
    """Two tenants computing the same prompt at once keep a copy each."""
    first, second = start(cache, tokens_from(0, 32), "a"), start(cache, tokens_from(0, 32), "b")
    for lease in (first, second):
        cache.commit(lease, pack(tokens_from(0, 32)))
    assert not set(first.blocks) & set(second.blocks)
    cache.check()
    first.release()
    second.release()
    assert cache.stats().cached == 4


def stored_hashes(namespace: str = "", **options: Any) -> bytes:
    events: list[CacheEvent] = []
    cache = PrefixCache(8, options.pop("block_size", BLOCK), listener=events.append, **options)
    store(cache, tokens_from(0, 32), namespace)
    return b"".join(event.hashes for event in events if isinstance(event, Stored))


def test_hashes_are_of_one_namespace_model_secret_and_block_size() -> None:
    """The same tokens have other names wherever their blocks must not be mixed up."""
    variants = [
        stored_hashes(),
        stored_hashes("a"),
        stored_hashes("b"),
        stored_hashes(fingerprint=b"model"),
        stored_hashes(secret=b"model"),
        stored_hashes("model"),
        stored_hashes(block_size=8),
        stored_hashes(block_size=32),
    ]
    names = [hashes[i : i + HASH_BYTES] for hashes in variants for i in range(0, len(hashes), HASH_BYTES)]
    assert len(names) == len(set(names)) == 6 * 2 + 4 + 1


HASHES_OF_A_PROMPT = """
from prefixcache.cache import PrefixCache
from prefixcache.tokens import pack
events = []
cache = PrefixCache(8, 16, fingerprint=b"model", secret=b"secret", listener=events.append)
lease = cache.match(pack(range(33)), "tenant")
cache.allocate(lease, 2)
cache.commit(lease, pack(range(32)))
lease.release()
cache.evict(8)
print([(event.parent.hex() if hasattr(event, "parent") else "", event.hashes.hex()) for event in events])
"""


def test_hashes_are_the_same_in_every_process() -> None:
    """Whatever PYTHONHASHSEED is: replicas name the same block alike."""
    printed = set()
    for seed in ("0", "1", "4242"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", HASHES_OF_A_PROMPT]
        printed.add(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert len(printed) == 1 and len(printed.pop()) > 4 * 2 * HASH_BYTES


# Counting


def test_what_is_reported_as_cached_is_what_is_reused(cache: PrefixCache) -> None:
    """Shared blocks and the slots to copy add up to the cached tokens, every time."""
    source = random.Random(2)
    for _ in range(100):
        tokens = [source.randrange(2) for _ in range(source.randrange(1, 80))]
        lease = cache.match(pack(tokens))
        copied = lease.source.tokens if lease.source else 0
        assert lease.cached_tokens == lease.shared * BLOCK + copied < len(tokens)
        lease.release()
        store(cache, tokens)


def test_evicted_blocks_are_counted_and_nothing_else_is(cache: PrefixCache) -> None:
    """Neither a superseded tail, nor an invalidation, nor a merged duplicate is an eviction."""
    store(cache, tokens_from(0, 20))
    store(cache, tokens_from(0, 32))
    first, second = start(cache, tokens_from(100, 16)), start(cache, tokens_from(100, 16))
    for lease in (first, second):
        cache.commit(lease, pack(tokens_from(100, 16)))
        lease.release()
    cache.invalidate()
    assert cache.stats().evicted == 0
    store(cache, tokens_from(0, 32))
    cache.evict(100)
    assert cache.stats().evicted == 2


def test_an_invalidation_reports_what_is_in_use(cache: PrefixCache) -> None:
    """It does not claim to have freed what a lease still holds, and that is freed when the lease ends."""
    store(cache, tokens_from(0, 64))
    store(cache, tokens_from(100, 32))
    lease = cache.match(pack(tokens_from(0, 33)))
    reader = cache.match(pack(tokens_from(100, 20)))
    assert reader.source is not None
    assert cache.invalidate() == (2, 4)
    assert cache.stats().free == 256 - 4
    assert cached(cache, tokens_from(0, 65)) == 0
    reader.copied()
    assert cache.stats().free == 256 - 3
    for held in (lease, reader):
        held.release()
    assert cache.stats().free == 256
    assert cache.invalidate() == (0, 0)
    cache.check()


def test_the_same_prompt_can_be_stored_again_while_the_invalidated_one_is_in_use(cache: PrefixCache) -> None:
    """Old and new blocks are different ones, and neither lease disturbs the other."""
    store(cache, tokens_from(0, 32))
    old = cache.match(pack(tokens_from(0, 33)))
    cache.invalidate("")
    new_blocks = store(cache, tokens_from(0, 32))
    assert not set(new_blocks) & set(old.blocks)
    old.release()
    cache.check()
    assert cached(cache, tokens_from(0, 33)) == 32 and cache.stats().free == 256 - 2


# Repeating tokens


@pytest.mark.parametrize("block_size", [1, 2, 16])
def test_prompts_of_one_repeated_token_match_by_length(block_size: int) -> None:
    """All blocks hold equal tokens, and still each stands for its own position."""
    cache = PrefixCache(512, block_size)
    longest = 0
    for length in (40, 3, 64, 17, 65, 16, 128):
        prompt = [7] * length
        lease = cache.match(pack(prompt))
        assert lease.cached_tokens == min(longest, length - 1)
        assert len(set(lease.blocks)) == len(lease.blocks)
        lease.release()
        blocks = store(cache, prompt)
        assert len(set(blocks)) == len(blocks)
        longest = max(longest, length)


# Events


class Replica:
    """Somebody who only hears the events, and insists on their order."""

    def __init__(self) -> None:
        self.heard = 0
        self.roots: dict[str, bytes] = {}
        self.parent: dict[bytes, bytes] = {}
        self.children: dict[bytes, int] = {}

    def __call__(self, event: CacheEvent) -> None:
        assert event.sequence == self.heard, "a gap in the sequence numbers"
        self.heard += 1
        assert event.hashes and len(event.hashes) % HASH_BYTES == 0
        names = [event.hashes[i : i + HASH_BYTES] for i in range(0, len(event.hashes), HASH_BYTES)]
        if isinstance(event, Stored):
            before = event.parent
            if before not in self.parent:
                assert self.roots.setdefault(event.namespace, before) == before, "stored before its parent"
            for name in names:
                assert name not in self.parent, "stored twice"
                self.parent[name] = before
                self.children[before] = self.children.get(before, 0) + 1
                before = name
        else:
            assert isinstance(event, Removed)
            for name in names:
                assert not self.children.get(name), "removed before its children"
                self.children[self.parent.pop(name)] -= 1

    def cached_blocks(self, tokens: list[int], namespace: str) -> int:
        """Blocks of a prompt that this replica believes to be cached."""
        packed = pack(tokens)
        hashes = chain_hashes(self.roots.get(namespace, b""), packed[: (len(tokens) - 1) // 4 * 16], 16)
        names = [hashes[i : i + HASH_BYTES] for i in range(0, len(hashes), HASH_BYTES)]
        return next((index for index, name in enumerate(names) if name not in self.parent), len(names))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("longest_edge", [3, 1024])
def test_events_replayed_give_exactly_what_is_matchable(
    policy: str, longest_edge: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gapless, parents before children when stored, deepest first when removed, through splits and invalidations."""
    monkeypatch.setattr("prefixcache.cache.MAX_EDGE_BLOCKS", longest_edge)
    replica, source = Replica(), random.Random(3)
    cache = PrefixCache(40, 4, policy=POLICIES[policy], listener=replica)
    known: list[list[int]] = [[]]
    for round_number in range(600):
        stem = source.choice(known)
        tokens = stem[: source.randrange(len(stem) + 1)] + [source.randrange(2) for _ in range(source.randrange(1, 30))]
        known = [*known[-20:], tokens[:60]]
        namespace = source.choice("ab")
        lease = cache.match(pack(known[-1]), namespace)
        cache.allocate(lease, len(known[-1]) // 4 - len(lease.blocks) + 1)
        while lease.shared < len(known[-1]) // 4:
            end = min(lease.shared + source.randrange(1, 5), len(known[-1]) // 4)
            cache.commit(lease, pack(known[-1][lease.shared * 4 : end * 4]))
        lease.release(pack(known[-1][lease.shared * 4 :]))
        if round_number % 100 == 99:
            cache.invalidate(source.choice(["a", None]))
        cache.check()
        for probe in (*known, [0] * 9):
            for name in "ab":
                if probe:
                    found = cache.lookup(pack(probe), name).cached_tokens
                    assert replica.cached_blocks(probe, name) == found // 4
    assert cache.stats().evicted > 100
    cache.invalidate()
    assert not replica.parent


def test_partly_filled_blocks_are_not_published(cache: PrefixCache) -> None:
    """They are of use here only, so nobody hears of them, coming or going."""
    events: list[CacheEvent] = []
    cache.listener = events.append
    store(cache, tokens_from(0, 10))
    assert cache.stats().cached == 1
    cache.evict(1)
    store(cache, tokens_from(0, 10))
    cache.invalidate()
    assert events == []


def test_a_listener_hears_the_same_if_it_comes_late(cache: PrefixCache) -> None:
    """Hashes do not depend on when they are computed."""
    late: list[CacheEvent] = []
    store(cache, tokens_from(0, 32))
    cache.listener = late.append
    store(cache, tokens_from(0, 64))
    early = stored_hashes()
    assert isinstance(late[0], Stored) and late[0].parent == early[-HASH_BYTES:]
