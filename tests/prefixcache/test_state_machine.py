"""A hypothesis state machine drives the cache against a naive model that keeps every sequence in a list.

The sacred part is a simulated memory: what a lease computes is written as
`memory[block][slot] = (namespace, all tokens up to this position)`, a block source
is copied slot by slot, fresh blocks are wiped, and every token that a live lease
calls cached or computed must find exactly its own prefix in its slot, after every
step. A block handed out twice, copied wrongly, freed too early or shown to another
namespace cannot pass that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prefixcache.cache import PrefixCache
from prefixcache.eviction import POLICIES
from prefixcache.lease import CacheEvent, Found, Lease, OutOfBlocks, Removed, Stored
from prefixcache.pins import Limit
from prefixcache.reasons import MissReason
from prefixcache.terms import Terms
from prefixcache.tokens import HASH_BYTES, pack
from prefixcache.tree import MAX_EDGE_BLOCKS

Slot = tuple[str, tuple[int, ...]]
PROFILE = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)

BASES = (
    (0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    (0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 0),
    (1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0),
)

namespaces = st.sampled_from(["", "", "", "a", "b"])
# Prompts leave a few bases anywhere, so they share prefixes, collide and split each other's edges.
prompts = st.builds(
    lambda base, length, own: (base[:length] + tuple(own))[:14] or (0,),
    st.sampled_from(BASES),
    st.integers(0, 12),
    st.lists(st.integers(0, 1), max_size=4),
)
which = st.integers(0, 5)  # one of the running requests
names = st.sampled_from(["p", "q"])
terms = st.just(Terms()) | st.builds(
    Terms,
    ttl=st.sampled_from([None, 2.0, 5.0]),
    sliding=st.booleans(),
    priority=st.sampled_from([50, 50, 0, 90]),
    session=st.sampled_from(["", "s", "t"]),
)


@dataclass(eq=False)
class Running:
    """A request as the engine would hold it."""

    lease: Lease
    namespace: str
    tokens: tuple[int, ...]  # the prompt, then what it generates
    prompt: int
    computed: int  # tokens whose slots are filled
    stores: bool
    terms: Terms
    invalidated: bool = False
    limited: bool = False  # its account's limit kept it from storing all it wanted


class CacheMachine(RuleBasedStateMachine):
    """Requests of three namespaces against one small cache."""

    policy = "lru"
    max_edge_blocks = MAX_EDGE_BLOCKS
    controlled = False
    publishes = False

    @initialize(total=st.integers(3, 40), block_size=st.sampled_from([1, 2, 3, 4]), remembered=st.integers(0, 4))
    def build(self, total: int, block_size: int, remembered: int) -> None:
        self.size = block_size
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("prefixcache.cache.MAX_EDGE_BLOCKS", self.max_edge_blocks)
        self.events: list[CacheEvent] = []
        self.cache = PrefixCache(
            total,
            block_size,
            policy=POLICIES[self.policy],
            listener=self.events.append,
            memory_of_removed=remembered,
            pin_share=0.4 if self.controlled else 0.0,
            session_idle=4.0 if self.controlled else math.inf,
        )
        self.memory: list[list[Slot | None]] = [[None] * block_size for _ in range(total)]
        self.running: list[Running] = []
        self.stored: dict[Slot, float] = {}  # every sequence a match may use, and until when
        self.pins: dict[tuple[str, str], tuple[tuple[int, ...], float]] = {}
        self.limits: dict[str, int] = {}
        self.published: dict[str, tuple[int, ...]] = {}
        self.perhaps: set[tuple[str, str]] = set()  # pins that may have ended with a publication
        self.now = 0.0
        self.complete = True  # nothing of `stored` has been evicted
        self.matchable: set[bytes] = set()
        self.replayed = 0
        self.removed_anything = False

    def teardown(self) -> None:
        self.patch.undo()
        for request in list(self.running):
            request.lease.release()
        self.cache.check()
        assert self.cache.stats().leased == 0, "a lease leaked"
        self.cache.invalidate()
        self.cache.check()
        assert self.cache.stats().free == self.cache.total_blocks

    # The model

    def cached_at_most(self, namespace: str, tokens: tuple[int, ...]) -> int:
        """The longest prefix, without the last token, that was stored and not invalidated since."""
        longest = 0
        pinned = [(owner, prefix) for (owner, _), (prefix, _) in self.pins.items()]
        pinned += [(namespace, prefix) for prefix in self.published.values()]
        for owner, sequence in [*self.stored, *pinned]:
            if owner == namespace:
                shared = 0
                while shared < min(len(sequence), len(tokens) - 1) and sequence[shared] == tokens[shared]:
                    shared += 1
                longest = max(longest, shared)
        return longest

    def being_computed(self, namespace: str, tokens: tuple[int, ...], block: int) -> bool:
        end = (block + 1) * self.size
        return end < len(tokens) and any(
            request.namespace == namespace
            and request.stores
            and not request.invalidated
            and not request.limited
            and request.lease.shared <= block
            and end <= request.prompt
            and request.tokens[:end] == tokens[:end]
            for request in self.running
        )

    def remember(self, request: Running, tokens: int, expires: float) -> None:
        """The first `tokens` of a request may be reused until `expires`."""
        key = (request.namespace, request.tokens[:tokens])
        if tokens:
            self.stored[key] = max(expires, self.stored.get(key, 0.0))

    def used(self, request: Running) -> None:
        """What a request has in the tree is used now."""
        ttl = request.terms.ttl
        if request.terms.sliding and not request.invalidated:
            self.remember(request, request.lease.shared * self.size, math.inf if ttl is None else self.now + ttl)

    def notice_removal(self) -> None:
        """Requests whose prefix has been removed go on without storing."""
        for request in self.running:
            if request.lease.detached and not request.invalidated:
                request.invalidated = True
                assert self.removed_anything

    def expect(self, request: Running, position: int) -> None:
        """The slot of a position holds the request's own prefix."""
        block = request.lease.blocks[position // self.size]
        owner = self.cache.shared_namespace if position < request.lease.base * self.size else request.namespace
        expected = (owner, request.tokens[: position + 1])
        assert self.memory[block][position % self.size] == expected

    # The ways of a request

    @precondition(lambda self: len(self.running) < 6)
    @rule(
        namespace=namespaces,
        tokens=prompts,
        read=st.sampled_from([True, True, True, False]),
        stores=st.booleans(),
        terms=terms,
    )
    def start(self, namespace: str, tokens: tuple[int, ...], read: bool, stores: bool, terms: Terms) -> None:
        self.match(namespace, tokens, read, stores, terms)

    @precondition(lambda self: self.running)
    @rule(which=which, tokens=st.integers(1, 16), ahead=st.integers(0, 2), token=st.integers(0, 1))
    def proceed(self, which: int, tokens: int, ahead: int, token: int) -> None:
        request = self.running[which % len(self.running)]
        self.allocate(request, tokens, ahead)
        self.compute(request, tokens, token)

    @precondition(lambda self: self.running)
    @rule(which=which, blocks=st.integers(0, 3) | st.just(100))
    def store(self, which: int, blocks: int) -> None:
        self.commit(self.running[which % len(self.running)], blocks)

    @precondition(lambda self: self.running)
    @rule(which=which, keep_tail=st.booleans())
    def end(self, which: int, keep_tail: bool) -> None:
        self.release(self.running[which % len(self.running)], keep_tail)

    @rule(namespace=namespaces, tokens=prompts, generated=st.integers(0, 6), keep_tail=st.booleans(), terms=terms)
    def whole_request(
        self, namespace: str, tokens: tuple[int, ...], generated: int, keep_tail: bool, terms: Terms
    ) -> None:
        """A request from start to end while the others stand still."""
        request = self.match(namespace, tokens, True, True, terms)
        count = len(tokens) + generated - request.computed
        self.allocate(request, count, 0)
        self.compute(request, count, 1)
        self.commit(request, 100)
        self.release(request, keep_tail)

    # Steps of these

    def match(self, namespace: str, tokens: tuple[int, ...], read: bool, stores: bool, terms: Terms) -> Running:
        packed = pack(tokens)
        if not self.controlled:
            terms = Terms()
        found = self.cache.lookup(packed, namespace)
        lease = self.cache.match(packed, namespace, read=read, terms=terms)
        cached, reason = lease.cached_tokens, lease.reason
        if not read:
            assert (cached, reason, lease.blocks, lease.source) == (0, MissReason.BYPASSED, [], None)
        else:
            assert found == Found(cached, reason, lease.position), "a lookup promised something else"
            self.check_found(namespace, tokens, cached, reason)
        whole, rest = divmod(cached, self.size)
        assert lease.shared == len(lease.blocks) == whole
        request = Running(lease, namespace, tokens, len(tokens), whole * self.size, stores, terms)
        self.running.append(request)
        self.notice_removal()
        self.used(request)
        assert (lease.source is not None) == (rest > 0)
        if lease.source is not None:
            assert lease.source.tokens == rest
            for slot in range(rest):
                expected = (namespace, tokens[: whole * self.size + slot + 1])
                assert self.memory[lease.source.block][slot] == expected, "a source block holds something else"
        if stores:
            self.cache.announce(lease, packed)
        return request

    def check_found(self, namespace: str, tokens: tuple[int, ...], cached: int, reason: MissReason) -> None:
        allowed = self.cached_at_most(namespace, tokens)
        assert cached <= allowed
        if self.complete:
            assert cached == allowed
        assert reason is not MissReason.EVICTED or self.cache.stats().evicted
        assert (reason is MissReason.TOO_SHORT) == (len(tokens) == 1)
        assert (reason is MissReason.NONE) == (cached == len(tokens) - 1 and len(tokens) > 1)
        if reason not in (MissReason.TOO_SHORT, MissReason.NONE):
            in_flight = self.being_computed(namespace, tokens, cached // self.size)
            assert (reason is MissReason.IN_FLIGHT) == in_flight

    def allocate(self, request: Running, tokens: int, ahead: int) -> None:
        """Blocks for the next tokens and some more, or as many as there are."""
        lease = request.lease
        stats, available = self.cache.stats(), self.cache.available_blocks
        assert available == stats.free + stats.cached
        needed = -(-(request.computed + tokens) // self.size) + ahead - len(lease.blocks)
        before = list(lease.blocks)
        if needed > available:
            with pytest.raises(OutOfBlocks):
                self.cache.allocate(lease, needed)
            assert (lease.blocks, self.cache.stats()) == (before, stats), "a refused allocation changed something"
        count = max(0, min(needed, available))
        self.cache.allocate(lease, count, room=ahead)
        fresh = lease.blocks[len(before) :]
        assert lease.blocks[: len(before)] == before and len(fresh) == count
        evicted = self.cache.stats().evicted - stats.evicted
        assert evicted == max(0, count - stats.free), "not exactly what was missing was evicted"
        if evicted:
            self.complete = False
        for block in fresh:
            self.memory[block] = [None] * self.size
        if lease.source is not None and request.computed < lease.cached_tokens and len(lease.blocks) > lease.shared:
            source, target = self.memory[lease.source.block], self.memory[lease.blocks[lease.shared]]
            target[: lease.source.tokens] = source[: lease.source.tokens]
            request.computed = lease.cached_tokens
            lease.copied()
            lease.copied()

    def compute(self, request: Running, tokens: int, token: int) -> None:
        """Fill the slots of the next tokens as far as there are blocks; behind the prompt, of generated ones."""
        lease = request.lease
        end = min(request.computed + tokens, len(lease.blocks) * self.size)
        request.tokens += (token,) * (end - len(request.tokens))
        for position in range(request.computed, end):
            assert position // self.size >= lease.shared, "writing into a block of the tree"
            slots = self.memory[lease.blocks[position // self.size]]
            slots[position % self.size] = (request.namespace, request.tokens[: position + 1])
        request.computed = max(request.computed, end)

    def commit(self, request: Running, blocks: int) -> None:
        lease = request.lease
        if not request.stores:
            return
        end = min(lease.shared + blocks, request.computed // self.size)
        before = self.cache.stats().evicted
        self.cache.commit(lease, pack(request.tokens[lease.shared * self.size : end * self.size]))
        limited = request.namespace in self.limits
        if limited:
            self.complete = False
        assert self.cache.stats().evicted == before or limited
        assert lease.detached == request.invalidated
        if not lease.detached:
            assert lease.shared == end or limited
            request.limited |= lease.shared < end
            self.remember(request, lease.shared * self.size, lease.expires)

    def release(self, request: Running, keep_tail: bool) -> None:
        lease = request.lease
        self.running.remove(request)
        self.used(request)
        if request.namespace in self.limits:
            self.complete = False
        tail = request.tokens[lease.shared * self.size : request.computed]
        if request.stores and keep_tail and len(tail) < self.size:
            if tail and not request.invalidated:
                self.remember(request, request.computed, max(lease.expires, self.cache.expiry_of(request.terms)))
            lease.release(pack(tail))
        else:
            lease.release()
        stats = self.cache.stats()
        lease.release()
        lease.release(pack(tail))
        lease.copied()
        assert lease.released and self.cache.stats() == stats, "a second release did something"

    # What happens besides

    @precondition(lambda self: self.cache.stats().cached)
    @rule(count=st.integers(1, 6))
    def evict(self, count: int) -> None:
        stats = self.cache.stats()
        freed = self.cache.evict(count)
        assert freed == min(count, stats.cached)
        after = self.cache.stats()
        assert (after.free, after.cached) == (stats.free + freed, stats.cached - freed)
        if freed:
            self.complete = False

    @precondition(lambda self: len(self.stored) > 5)
    @rule(namespace=namespaces | st.none())
    def invalidate(self, namespace: str | None) -> None:
        self.forget(lambda: self.cache.invalidate(namespace))
        for request in self.running:
            request.invalidated |= namespace in (None, request.namespace)
        self.stored = {key: expires for key, expires in self.stored.items() if namespace not in (None, key[0])}
        self.pins = {key: pin for key, pin in self.pins.items() if namespace not in (None, key[0])}
        if namespace is None:
            self.published = {}
        if not self.stored and not self.published:
            self.complete = True

    def forget(self, call: Callable[[], tuple[int, int]]) -> None:
        """Check what a kind of invalidation says of itself."""
        before = self.cache.stats()
        freed, in_use = call()
        after = self.cache.stats()
        unused = (before.cached + before.pinned) - (after.cached + after.pinned)
        assert after.free - before.free == freed == unused
        assert in_use <= after.leased == before.leased
        assert after.invalidated - before.invalidated == freed + in_use
        self.removed_anything = True
        self.complete = False

    @rule(namespace=namespaces, tokens=prompts)
    def look(self, namespace: str, tokens: tuple[int, ...]) -> None:
        """A lookup agrees with the model and changes nothing that can be seen."""
        before, events = self.cache.stats(), len(self.events)
        found = self.cache.lookup(pack(tokens), namespace)
        assert found == self.cache.lookup(pack(tokens), namespace)
        assert found.cached_tokens <= self.cached_at_most(namespace, tokens)
        for beyond in range(4):
            in_flight = self.cache.in_flight(pack(tokens), namespace, beyond=beyond)
            assert in_flight == self.being_computed(namespace, tokens, beyond)
        assert (self.cache.stats(), len(self.events)) == (before, events)

    # What is kept; only where `controlled`

    @precondition(lambda self: self.controlled)
    @rule(seconds=st.sampled_from([0.0, 1.0, 1.0, 3.0]))
    def wait(self, seconds: float) -> None:
        for request in self.running:
            self.used(request)
        self.now += seconds
        for request in self.running:
            self.used(request)
        before = self.cache.stats()
        self.pins = {key: pin for key, pin in self.pins.items() if pin[1] > self.now}
        self.cache.tick(self.now)
        if self.cache.stats().expired > before.expired or self.limits:
            self.removed_anything = True
            self.complete = False
        self.stored = {key: expires for key, expires in self.stored.items() if expires > self.now}
        self.notice_removal()

    @precondition(lambda self: self.controlled)
    @rule(
        namespace=namespaces, tokens=prompts, name=names, ttl=st.sampled_from([None, 2.0, 4.0]), most=st.integers(0, 9)
    )
    def pin(self, namespace: str, tokens: tuple[int, ...], name: str, ttl: float | None, most: int) -> None:
        before = self.cache.stats().expired
        self.pins.pop((namespace, name), None)
        self.perhaps.discard((namespace, name))
        whole = len(tokens) // self.size * self.size
        allowed = min(self.cached_at_most(namespace, (*tokens, 9)), whole)
        held, limit = self.cache.pin(pack(tokens), namespace, name, ttl=ttl, most=most)
        assert held % self.size == 0 and held <= allowed
        assert (limit is Limit.NOTHING) == (held == whole) or limit is Limit.NOT_CACHED
        if held:
            self.pins[namespace, name] = (tokens[:held], math.inf if ttl is None else self.now + ttl)
        self.removed_anything |= self.cache.stats().expired > before
        self.complete &= self.cache.stats().expired == before
        self.notice_removal()

    @precondition(lambda self: self.controlled)
    @rule(namespace=namespaces, name=names)
    def unpin(self, namespace: str, name: str) -> None:
        before = self.cache.stats()
        ended = self.cache.unpin(namespace, name)
        assert ended == ((namespace, name) in self.pins) or (namespace, name) in self.perhaps
        self.perhaps.discard((namespace, name))
        self.pins.pop((namespace, name), None)
        self.removed_anything |= self.cache.stats().expired > before.expired
        self.complete &= (self.cache.stats().expired, self.cache.stats().evicted) == (before.expired, before.evicted)
        self.notice_removal()

    @precondition(lambda self: self.controlled)
    @rule(namespace=namespaces, blocks=st.integers(0, 8) | st.none())
    def limit(self, namespace: str, blocks: int | None) -> None:
        self.cache.limit(namespace, blocks)
        self.limits.pop(namespace, None)
        if blocks is not None:
            self.limits[namespace] = blocks
            self.complete = False

    @precondition(lambda self: self.controlled)
    @rule(namespace=namespaces, name=st.sampled_from(["s", "t"]))
    def end_session(self, namespace: str, name: str) -> None:
        """What only an ended session used is evicted before anything else."""
        before = self.cache.stats().expired
        blocks = self.cache.end_session(namespace, name)
        assert blocks <= self.cache.total_blocks
        self.removed_anything |= self.cache.stats().expired > before
        self.complete &= self.cache.stats().expired == before
        self.notice_removal()

    @precondition(lambda self: self.controlled and self.running)
    @rule(which=which, seconds=st.sampled_from([1.0, 3.0]))
    def keep_session(self, which: int, seconds: float) -> None:
        request = self.running[which % len(self.running)]
        before = self.cache.stats().expired
        kept = self.cache.keep_session(request.lease, seconds)
        assert kept <= request.lease.shared * self.size
        if kept:
            key = (request.namespace, f"session {request.terms.session}")
            self.pins[key] = (request.tokens[:kept], self.now + seconds)
        self.complete &= self.cache.stats().expired == before
        self.notice_removal()

    @precondition(lambda self: self.controlled and len(self.stored) > 3)
    @rule(namespace=namespaces, tokens=prompts)
    def invalidate_prefix(self, namespace: str, tokens: tuple[int, ...]) -> None:
        """From now on nothing that begins with the prompt is reused."""
        self.forget(lambda: self.cache.invalidate_prefix(pack(tokens), namespace))
        for (owner, sequence), expires in list(self.stored.items()):
            if owner == namespace and sequence[: len(tokens)] == tokens:
                del self.stored[owner, sequence]
                shorter = (owner, sequence[: len(tokens) - 1])
                self.stored[shorter] = max(expires, self.stored.get(shorter, 0.0))
        self.pins = {
            key: pin
            for key, pin in self.pins.items()
            if key[0] != namespace or self.cache.lookup(pack((*pin[0], 9)), namespace).cached_tokens >= len(pin[0])
        }
        left = self.cache.lookup(pack((*tokens, 9)), namespace).cached_tokens
        assert left < len(tokens) or any(prefix[:left] == tokens for prefix in self.published.values())
        self.notice_removal()

    @precondition(lambda self: self.controlled)
    @rule(namespace=namespaces, name=st.sampled_from(["s", "t"]))
    def invalidate_session(self, namespace: str, name: str) -> None:
        self.forget(lambda: self.cache.invalidate_session(namespace, name))
        self.pins = {
            key: pin
            for key, pin in self.pins.items()
            if key[0] != namespace or self.cache.lookup(pack((*pin[0], 9)), namespace).cached_tokens >= len(pin[0])
        }
        self.notice_removal()

    @precondition(lambda self: self.publishes)
    @rule(tokens=prompts, name=names)
    def publish(self, tokens: tuple[int, ...], name: str) -> None:
        """Let everybody begin with a prompt."""
        self.unpublish(name)
        self.whole_request(self.cache.shared_namespace, tokens, 0, False, Terms())
        held, limit = self.cache.publish(pack(tokens), name)
        if held:
            assert limit is Limit.NOTHING and held == len(tokens) // self.size * self.size
            self.published[name] = tokens[:held]
        self.complete = False

    @precondition(lambda self: self.published)
    @rule(name=names)
    def unpublish(self, name: str) -> None:
        """Nobody may begin with it any more; what was stored behind it goes."""
        assert self.cache.unpublish(name) == (name in self.published)
        self.published.pop(name, None)
        self.removed_anything = True
        self.complete = False
        for key, (prefix, _) in list(self.pins.items()):
            if self.cache.lookup(pack((*prefix, 9)), key[0]).cached_tokens < len(prefix):
                del self.pins[key]
                self.perhaps.add(key)
        self.notice_removal()

    # After every step

    @invariant()
    def pins_hold(self) -> None:
        """What is pinned is there."""
        for (namespace, name), (prefix, _) in self.pins.items():
            if not name.startswith("session"):
                assert self.cache.lookup(pack((*prefix, 9)), namespace).cached_tokens >= len(prefix)

    @invariant()
    def sound(self) -> None:
        self.cache.check()

    @invariant()
    def contents_are_right(self) -> None:
        for request in self.running:
            for position in range(request.computed):
                self.expect(request, position)

    @invariant()
    def events_tell_what_is_matchable(self) -> None:
        """Replayed events name exactly the blocks in the tree, parents first and deepest out first."""
        for event in self.events[self.replayed :]:
            assert event.sequence == self.replayed
            self.replayed += 1
            hashes = [event.hashes[i : i + HASH_BYTES] for i in range(0, len(event.hashes), HASH_BYTES)]
            match event:
                case Stored():
                    assert not self.matchable.intersection(hashes)
                    self.matchable.update(hashes)
                case Removed():
                    assert self.matchable.issuperset(hashes)
                    self.matchable.difference_update(hashes)
        assert self.matchable == set(whole_block_hashes(self.cache))


def whole_block_hashes(cache: PrefixCache) -> list[bytes]:
    hashes = []
    for space in cache._spaces.values():
        for node in cache._tree.nodes(space.root):
            if len(node.edge) >= cache.block_bytes:
                joined = node.hashes(cache.block_bytes)
                hashes += [joined[i : i + HASH_BYTES] for i in range(0, len(joined), HASH_BYTES)]
    return hashes


class LfuMachine(CacheMachine):
    policy = "lfu"


class SlruMachine(CacheMachine):
    policy = "slru"


class ControlledMachine(CacheMachine):
    """Time passes; requests have terms; pins, limits, sessions and all ways of forgetting."""

    controlled = True


class ControlledLfuMachine(ControlledMachine):
    policy = "lfu"
    max_edge_blocks = 2


class PublishingMachine(ControlledMachine):
    """Namespaces share published beginnings, and nothing behind them."""

    publishes = True


class ShortEdgesMachine(CacheMachine):
    """Edges of two blocks at most, so that commits and growth cross edges all the time."""

    max_edge_blocks = 2


for machine in (
    CacheMachine,
    LfuMachine,
    SlruMachine,
    ShortEdgesMachine,
    ControlledMachine,
    ControlledLfuMachine,
    PublishingMachine,
):
    machine.TestCase.settings = PROFILE
TestLru = CacheMachine.TestCase
TestLfu = LfuMachine.TestCase
TestSlru = SlruMachine.TestCase
TestShortEdges = ShortEdgesMachine.TestCase
TestControlled = ControlledMachine.TestCase
TestControlledLfu = ControlledLfuMachine.TestCase
TestPublishing = PublishingMachine.TestCase
