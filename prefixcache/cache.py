"""The prefix cache: which blocks already hold a prompt's keys and values.

Token ids in, block ids out. One thread owns a cache; nothing here locks, reads a
clock, or knows what a block holds.

    lease = cache.match(packed, namespace)     longest cached prefix, held
    cache.allocate(lease, n)                   n more blocks, evicting if need be
    ... compute lease.cached_tokens onwards into lease.blocks ...
    cache.commit(lease, packed_blocks)         finished blocks become matchable
    lease.release(tail)                        everything is let go; idempotent

Who owns a block: the pool (free), a lease (allocated, not committed), or the tree
(committed). `commit` moves blocks from the lease to the tree and leaves the lease a
reference; if the tree has the same tokens already, the lease takes the tree's block
instead and its own goes back to the pool.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from prefixcache.eviction import EvictionQueue, Policy, lru
from prefixcache.invariants import check
from prefixcache.pool import BlockPool
from prefixcache.reasons import MissReason
from prefixcache.tokens import HASH_BYTES, TOKEN_BYTES, chain_hashes, root_hash
from prefixcache.tree import MAX_EDGE_BLOCKS, Node, Partial, Place, RadixTree, Space

DEFAULT_MEMORY_OF_REMOVED = 32_768
"""How many removed runs of blocks are remembered to explain misses (about 100 bytes each)."""


class OutOfBlocks(Exception):
    """Not enough blocks are free or evictable. Nothing was changed."""


class BlockSource(NamedTuple):
    """A block whose first `tokens` slots a lease wants copied into its own first block."""

    block: int
    tokens: int


class Found(NamedTuple):
    """What is cached of a prompt, why not more, and the token position where its path ends."""

    cached_tokens: int
    reason: MissReason
    position: int


@dataclass(frozen=True, slots=True)
class Stored:
    """Blocks became matchable. `parent` is the hash before them; hashes are 16 bytes each, joined."""

    sequence: int
    namespace: str
    parent: bytes
    hashes: bytes


@dataclass(frozen=True, slots=True)
class Removed:
    """Blocks are no longer matchable; the deepest comes first."""

    sequence: int
    namespace: str
    hashes: bytes


CacheEvent = Stored | Removed


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Blocks now (free + cached + leased = total), and blocks evicted so far."""

    total: int
    free: int
    cached: int
    leased: int
    evicted: int


class Lease:
    """A held prefix and the blocks computed after it.

    `blocks` is the sequence's block table: the first `shared` are the tree's, the
    rest are the lease's own. `cached_tokens` of the prompt need not be computed;
    those that go beyond the shared blocks come from `source`, whose block must be
    copied into the first own block before it is used. `reason` and `position` say
    why no more is cached.
    """

    __slots__ = (
        "_cache", "_source_node", "_target", "blocks", "cached_tokens", "node", "position", "reason", "shared",
        "source", "space",
    )  # fmt: skip

    def __init__(self, cache: PrefixCache, space: Space, node: Node, blocks: list[int], found: Found) -> None:
        self._cache: PrefixCache | None = cache
        self._source_node: Node | None = None
        self._target = b""
        self.space = space
        self.node = node
        self.blocks = blocks
        self.shared = len(blocks)
        self.source: BlockSource | None = None
        self.cached_tokens, self.reason, self.position = found

    @property
    def released(self) -> bool:
        return self._cache is None

    @property
    def detached(self) -> bool:
        """Whether the prefix was invalidated: it can be used to the end, but nothing can be added to it."""
        return self.node.space is None

    def copied(self) -> None:
        """The source block has been copied and need not be held any longer. Idempotent."""
        if self._cache is not None:
            self._cache._drop_source(self)

    def forgo_source(self) -> None:
        """Do without the partly matching block, so that nothing of it need be held."""
        if self.source is not None:
            self.cached_tokens -= self.source.tokens
            self.position = self.cached_tokens
            self.reason = MissReason.EVICTED
            self.source = None
            self.copied()

    def release(self, tail: bytes = b"") -> None:
        """Let everything go; a second call does nothing.

        `tail` is the packed tokens of the partly filled block behind the shared ones,
        if its keys and values are computed and may be kept for exact repeats.
        """
        if self._cache is not None:
            cache, self._cache = self._cache, None
            cache._release(self, tail)


class PrefixCache:
    """A radix tree over `total_blocks` blocks of `block_size` tokens.

    `fingerprint` names what computes the blocks (model, dtype, tokenizer) and `secret`
    is the deployment's; both only enter the hashes. `listener` gets every event; it must
    neither raise nor call the cache.
    """

    def __init__(
        self,
        total_blocks: int,
        block_size: int = 16,
        *,
        policy: Policy = lru,
        fingerprint: bytes = b"",
        secret: bytes = b"",
        listener: Callable[[CacheEvent], None] | None = None,
        memory_of_removed: int = DEFAULT_MEMORY_OF_REMOVED,
    ) -> None:
        self.block_size = block_size
        self.block_bytes = block_size * TOKEN_BYTES
        self.listener = listener
        self._fingerprint = fingerprint
        self._secret = secret
        self._pool = BlockPool(total_blocks)
        self._tree = RadixTree(block_size)
        self._queue = EvictionQueue(policy)
        self._spaces: dict[str, Space] = {}
        self._leases: set[Lease] = set()
        self._removed: dict[bytes, MissReason] = {}
        self._memory_of_removed = memory_of_removed
        self._uses = 0
        self._events = 0
        self._evicted = 0

    # Looking

    @property
    def total_blocks(self) -> int:
        return self._pool.total

    @property
    def available_blocks(self) -> int:
        """How many blocks `allocate` could hand out now."""
        return self._pool.free_count + self._tree.idle_blocks

    def lookup(self, packed: bytes, namespace: str = "") -> Found:
        """Say what a match would find. Changes nothing, not even recency. Costs what a match costs."""
        space = self._spaces.get(namespace) or self._new_space(namespace)
        place = self._tree.find(space.root, packed, self._whole_blocks_end(packed))
        return self._found(place, packed)[0]

    def in_flight(self, packed: bytes, namespace: str = "", *, beyond: int = 0) -> bool:
        """Whether a live lease is computing a block that a match of `packed` will want behind `beyond` blocks."""
        space = self._spaces.get(namespace)
        end = (beyond + 1) * self.block_bytes
        if space is None or not space.computing or end > self._whole_blocks_end(packed):
            return False
        wanted = packed[:end]
        return any(lease._target.startswith(wanted) for lease in space.computing if lease.shared <= beyond)

    def fits(self, packed: bytes, namespace: str, blocks: int) -> bool:
        """Whether a match of `packed` could be followed by allocating up to `blocks` blocks in all.

        Matched blocks that others hold already cost nothing; matched blocks that
        nobody holds are no longer available once they are matched.
        """
        space = self._spaces.get(namespace)
        held = 0
        if space is not None:
            place = self._tree.find(space.root, packed, self._whole_blocks_end(packed))
            held = len(place.blocks)
            node: Node | None = place.node
            depth = place.depth
            while node is not None and not node.refs:
                held -= depth
                node = node.parent
                depth = len(node.blocks) if node is not None else 0
        return blocks - held <= self.available_blocks

    def stats(self) -> CacheStats:
        cached = self._tree.idle_blocks
        free = self._pool.free_count
        return CacheStats(self._pool.total, free, cached, self._pool.total - free - cached, self._evicted)

    # A request's way

    def match(self, packed: bytes, namespace: str = "", *, read: bool = True) -> Lease:
        """Hold the longest cached prefix of a packed prompt of at least one token.

        The last token is never matched: its logits are wanted, so it is computed.
        Exactly what matched is refreshed. With `read` False nothing is looked for.
        Splits an edge if the match ends inside one; costs O(length) with memcmp.
        """
        assert packed
        space = self._space(namespace)
        if not read:
            lease = Lease(self, space, space.root, [], Found(0, MissReason.BYPASSED, 0))
        else:
            place = self._tree.find(space.root, packed, self._whole_blocks_end(packed))
            node = place.node
            if place.depth < len(node.blocks):
                node = self._tree.split(node, place.depth)
                place = place._replace(node=node)
            found, source = self._found(place, packed)
            lease = Lease(self, space, node, place.blocks, found)
            if source is not None:
                holder, depth, tokens = source
                lease.source = BlockSource(holder.blocks[depth], tokens)
                lease._source_node = holder
                self._tree.acquire(holder)
                if len(holder.blocks) == 1:  # more of a longer one than matched would be refreshed
                    self._touch(holder)
                    holder.hits += 1
            self._touch(node)
            node.hits += 1
        self._tree.acquire(lease.node)
        self._leases.add(lease)
        return lease

    def announce(self, lease: Lease, packed: bytes) -> None:
        """Say that the lease will compute and commit the whole blocks of `packed`, for `in_flight` to find."""
        target = packed[: len(packed) // self.block_bytes * self.block_bytes]
        if len(target) > lease.shared * self.block_bytes:
            lease._target = target
            lease.space.computing.add(lease)

    def allocate(self, lease: Lease, count: int, *, room: int = 0) -> None:
        """Append `count` blocks to a lease, evicting exactly what is missing.

        `room` is how many more the sequence may want later: a preference for where
        the blocks lie, not a reservation. Raises OutOfBlocks, having changed nothing.
        """
        assert not lease.released
        if count > self.available_blocks:
            raise OutOfBlocks
        missing = count - self._pool.free_count
        if missing > 0:
            self.evict(missing)
        after = lease.blocks[-1] if lease.blocks else None
        lease.blocks += self._pool.allocate(count, after=after, room=room)

    def commit(self, lease: Lease, packed: bytes) -> None:
        """Put the lease's next own blocks, which hold the whole blocks of tokens `packed`, into the tree.

        Does nothing for a detached lease. Blocks that the tree has already are
        replaced in `lease.blocks` by the tree's and given back.
        """
        assert not lease.released and len(packed) % self.block_bytes == 0
        if not packed or lease.detached:
            return
        tree, size = self._tree, self.block_bytes
        assert lease.shared + len(packed) // size <= len(lease.blocks)
        node, offset = lease.node, 0
        while offset < len(packed):
            child = node.children.get(packed[offset : offset + size])
            if child is None:
                node = self._insert(lease, node, packed, offset)
                break
            depth = len(child.blocks)
            if not packed.startswith(child.edge, offset):
                depth = tree._common_blocks(child.edge, packed, offset, len(packed))
                if depth < len(child.blocks):
                    child = tree.split(child, depth)
            self._adopt(lease, child.blocks)
            node, offset = child, offset + depth * size
        if node is not lease.node:
            tree.acquire(node)
            self._let_go(lease.node)
            lease.node = node
        if lease.shared * size >= len(lease._target):
            lease.space.computing.discard(lease)

    def evict(self, count: int) -> int:
        """Free `count` unused cached blocks, or as many as there are; returns how many.

        Leaves go first, in the policy's order, and are trimmed from their end to just
        what is needed.
        """
        freed: list[int] = []
        while len(freed) < count:
            leaf = self._queue.pop()
            if leaf is None:
                break
            space, parent = leaf.space, leaf.parent
            assert space is not None and parent is not None
            take = min(count - len(freed), len(leaf.blocks))
            self._forget(space, leaf, len(leaf.blocks) - take, MissReason.EVICTED)
            freed += self._tree.trim(leaf, take)
            if leaf.parent is not None:
                self._queue.push(leaf)
            elif self._tree.evictable(parent):
                self._queue.push(parent)
            elif parent is space.root:
                self._drop_if_empty(space)
        self._pool.free(freed)
        self._evicted += len(freed)
        return len(freed)

    def invalidate(self, namespace: str | None = None) -> tuple[int, int]:
        """Forget everything, or everything of one namespace; returns (blocks freed, blocks still in use).

        Blocks in use are not matched again from now on and are freed when their last
        lease ends.
        """
        names = list(self._spaces) if namespace is None else [namespace]
        freed = in_use = 0
        for space in [self._spaces.pop(name) for name in names if name in self._spaces]:
            for node in reversed(list(self._tree.nodes(space.root))):
                self._publish_removed(space, node, 0)
                self._queue.removed(node)
            for top in space.root.children.values():
                self._remember(top.hash_of(0, self.block_bytes), MissReason.INVALIDATED)
            unused, used = self._tree.retire(space)
            self._pool.free(unused)
            freed += len(unused)
            in_use += used
        return freed, in_use

    # Parts of the above

    def _whole_blocks_end(self, packed: bytes) -> int:
        """Bytes of the whole blocks that may be matched: all but the last token."""
        return (len(packed) - TOKEN_BYTES) // self.block_bytes * self.block_bytes

    def _rest(self, packed: bytes, offset: int) -> bytes:
        """The tokens behind `offset` that a partly matching block may give: up to a block, without the last token."""
        return packed[offset : min(offset + self.block_bytes, len(packed) - TOKEN_BYTES)]

    def _space(self, namespace: str) -> Space:
        space = self._spaces.get(namespace)
        if space is None:
            space = self._spaces[namespace] = self._new_space(namespace)
        return space

    def _new_space(self, namespace: str) -> Space:
        start = root_hash(self._fingerprint, self._secret, namespace.encode(), str(self.block_size).encode())
        return Space(namespace, start)

    def _drop_if_empty(self, space: Space) -> None:
        root = space.root
        if not root.children and not root.refs and self._spaces.get(space.name) is space:
            del self._spaces[space.name]

    def _found(self, place: Place, packed: bytes) -> tuple[Found, Partial | None]:
        """What a walk that ended at `place` found, with the partly matching block behind it."""
        source = self._tree.partial(place, self._rest(packed, place.offset))
        cached = place.offset // TOKEN_BYTES + (source.tokens if source else 0)
        return self._explain(place, packed, cached), source

    def _explain(self, place: Place, packed: bytes, cached: int) -> Found:
        """Say why a walk ended where it did, from the most to the least specific reason."""
        tokens = len(packed) // TOKEN_BYTES
        if tokens == 1:
            return Found(0, MissReason.TOO_SHORT, 0)
        if cached == tokens - 1:
            return Found(cached, MissReason.NONE, cached)
        space = place.node.space
        assert space is not None
        if self.in_flight(packed, space.name, beyond=place.offset // self.block_bytes):
            return Found(cached, MissReason.IN_FLIGHT, cached)
        removed = self._removed_reason(place, packed)
        if removed is not None:
            return Found(cached, removed, cached)
        goes_on = place.depth < len(place.node.blocks) or place.node.children
        reason = MissReason.DIVERGED if cached and goes_on else MissReason.NEVER_SEEN
        return Found(cached, reason, cached)

    def _removed_reason(self, place: Place, packed: bytes) -> MissReason | None:
        """Whether the block behind `place` is remembered as removed, and why."""
        following = packed[place.offset : place.offset + self.block_bytes]
        if not self._removed or not following:
            return None
        node, size = place.node, self.block_bytes
        before = node.hash_of(place.depth - 1, size) if place.depth else node.end_hash(size)
        return self._removed.get(chain_hashes(before, following, size))

    def _touch(self, node: Node) -> None:
        self._uses += 1
        node.last_used = self._uses

    def _adopt(self, lease: Lease, blocks: list[int]) -> None:
        """Replace the lease's next own blocks by the tree's equal ones."""
        start, end = lease.shared, lease.shared + len(blocks)
        self._pool.free(lease.blocks[start:end])
        lease.blocks[start:end] = blocks
        lease.shared = end

    def _insert(self, lease: Lease, node: Node, packed: bytes, offset: int) -> Node:
        """Hang the rest of a commit below `node`, growing its edge where that changes nothing for others."""
        size = self.block_bytes
        blocks = lease.blocks[lease.shared : lease.shared + (len(packed) - offset) // size]
        lease.shared += len(blocks)
        edge = packed[offset:]
        self._drop_superseded_tail(node, edge[:size])
        alone = node is lease.node and node.refs == 1 and not node.children and node.parent is not None
        if alone and len(node.blocks) < MAX_EDGE_BLOCKS:
            done = len(node.blocks)
            fits = MAX_EDGE_BLOCKS - done
            self._tree.grow(node, edge[: fits * size], blocks[:fits])
            edge, blocks = edge[fits * size :], blocks[fits:]
            self._publish_stored(lease.space, node, done)
        while blocks:
            node = self._tree.insert(node, edge[: MAX_EDGE_BLOCKS * size], blocks[:MAX_EDGE_BLOCKS])
            edge, blocks = edge[MAX_EDGE_BLOCKS * size :], blocks[MAX_EDGE_BLOCKS:]
            self._publish_stored(lease.space, node, 0)
        return node

    def _drop_superseded_tail(self, parent: Node, key: bytes) -> None:
        """Free a tail that a block about to be inserted contains, unless it is in use."""
        place = Place(parent, len(parent.blocks), 0, [])
        best = self._tree.partial(place, key)
        if best is None:
            return
        tail, _, shared = best
        if not tail.refs and len(tail.edge) < self.block_bytes and shared * TOKEN_BYTES == len(tail.edge):
            self._queue.removed(tail)
            self._pool.free(self._tree.trim(tail, 1))

    def _keep_tail(self, lease: Lease, tail: bytes) -> bool:
        """Keep the lease's partly filled block in the tree, unless what is there covers it."""
        assert len(tail) < self.block_bytes and lease.shared < len(lease.blocks)
        node = lease.node
        if node.space is None:
            return False
        best = self._tree.partial(Place(node, len(node.blocks), 0, []), tail)
        if best is not None and best.tokens * TOKEN_BYTES == len(tail):
            if len(best.node.blocks) == 1:
                self._touch(best.node)
            return False
        self._drop_superseded_tail(node, tail)
        leaf = self._tree.insert(node, tail, [lease.blocks[lease.shared]])
        self._touch(leaf)
        self._queue.push(leaf)
        return True

    def _drop_source(self, lease: Lease) -> None:
        if lease._source_node is not None:
            self._let_go(lease._source_node)
            lease._source_node = None

    def _let_go(self, node: Node) -> None:
        leaf, unused = self._tree.release(node)
        if leaf is not None:
            self._queue.push(leaf)
        self._pool.free(unused)

    def _release(self, lease: Lease, tail: bytes) -> None:
        self._leases.remove(lease)
        lease.space.computing.discard(lease)
        lease._target = b""
        self._drop_source(lease)
        if lease.blocks:
            self._pool.settle(lease.blocks[-1])
        kept = 1 if tail and self._keep_tail(lease, tail) else 0
        self._pool.free(lease.blocks[lease.shared + kept :])
        if lease.node.parent is not None:
            self._touch(lease.node)
        self._let_go(lease.node)
        self._drop_if_empty(lease.space)

    # What others are told

    def _forget(self, space: Space, leaf: Node, keep: int, reason: MissReason) -> None:
        """Before blocks behind the first `keep` of a leaf are removed: publish it and remember where."""
        self._publish_removed(space, leaf, keep)
        if self._memory_of_removed:
            self._remember(leaf.hash_of(keep, self.block_bytes), reason)

    def _remember(self, block_hash: bytes, reason: MissReason) -> None:
        self._removed.pop(block_hash, None)
        self._removed[block_hash] = reason
        if len(self._removed) > self._memory_of_removed:
            del self._removed[next(iter(self._removed))]

    def _publish_stored(self, space: Space, node: Node, known: int) -> None:
        """Publish the blocks of a node behind the first `known`."""
        if self.listener is None:
            return
        assert node.parent is not None
        size = self.block_bytes
        before = node.hash_of(known - 1, size) if known else node.parent.end_hash(size)
        hashes = node.hashes(size)[known * HASH_BYTES :]
        self._publish(Stored(self._events, space.name, before, hashes))

    def _publish_removed(self, space: Space, node: Node, keep: int) -> None:
        if self.listener is None or len(node.edge) < self.block_bytes:
            return
        hashes = node.hashes(self.block_bytes)
        deepest_first = [hashes[i : i + HASH_BYTES] for i in range(keep * HASH_BYTES, len(hashes), HASH_BYTES)][::-1]
        self._publish(Removed(self._events, space.name, b"".join(deepest_first)))

    def _publish(self, event: CacheEvent) -> None:
        self._events += 1
        assert self.listener is not None
        self.listener(event)

    def check(self) -> None:
        """Verify every invariant; raises AssertionError. Walks everything: for tests."""
        check(self, self._pool, self._tree, self._spaces.values(), self._leases)
