"""What a cache consists of, and how things leave it.

The pool has the free blocks, the tree those that can be matched. A node leaves the tree
by eviction, leaf by leaf from its end, or by being cut off with all below it. Either way
it is published, and its beginning is remembered with the reason, to explain misses.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from prefixcache.eviction import EvictionQueue, Policy, lru
from prefixcache.heap import Heap
from prefixcache.lease import CacheEvent, Lease, Removed, Stored
from prefixcache.naming import BlockNames
from prefixcache.pins import Pin, Pins, is_under
from prefixcache.pool import BlockPool
from prefixcache.reasons import MissReason
from prefixcache.tokens import HASH_BYTES, TOKEN_BYTES
from prefixcache.tree import Account, Node, RadixTree, Session, Space, SpaceKey

DEFAULT_MEMORY_OF_REMOVED = 32_768
"""How many removed runs of blocks are remembered to explain misses (about 100 bytes each)."""


class Store:
    """Blocks, nodes, namespaces and accounts; the lowest of the three layers of a `PrefixCache`."""

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
        account_of: Callable[[str], str] = str,
        pin_share: float = 0.0,
        session_idle: float = math.inf,
        shared_namespace: str = "published",
    ) -> None:
        self.now = 0.0
        self.block_size = block_size
        self.block_bytes = block_size * TOKEN_BYTES
        self.listener = listener
        self.names = BlockNames(fingerprint, secret, block_size, shared_namespace)
        self._pool = BlockPool(total_blocks)
        self._tree = RadixTree(block_size)
        self._policy = policy
        self._queue = EvictionQueue(policy)
        self._account_of = account_of
        self._accounts: dict[str, Account] = {}
        self._own_queues: dict[Account, EvictionQueue] = {}  # of accounts with a limit
        self._pins = Pins(self._tree, int(total_blocks * pin_share))
        self._session_idle = session_idle
        self._agenda: Heap[Node | Pin | Session] = Heap()  # by the time to look at them
        self._expiring = False  # whether anything has ever had a time to live
        self._spaces: dict[SpaceKey, Space] = {}
        self.shared_namespace = shared_namespace
        self._published: dict[str, bytes] = {}  # packed tokens by name; replaced, never changed
        self._leases: set[Lease] = set()
        self._removed: dict[bytes, MissReason] = {}
        self._memory_of_removed = memory_of_removed
        self._uses = 0
        self._events = 0

    @property
    def total_blocks(self) -> int:
        return self._pool.total

    def account_of(self, namespace: str) -> str:
        """Return for whom the blocks of a namespace count."""
        return self._account_of(namespace)

    @property
    def free_blocks(self) -> int:
        """How many blocks hold nothing."""
        return self._pool.free_count

    @property
    def evictable_blocks(self) -> int:
        """How many blocks are cached, and used by nobody."""
        return self._tree.total.idle

    @property
    def available_blocks(self) -> int:
        """How many blocks `allocate` could hand out now."""
        return self.free_blocks + self.evictable_blocks

    # Namespaces and accounts

    def _space(self, key: SpaceKey) -> Space:
        space = self._spaces.get(key)
        if space is None:
            space = self._spaces[key] = self._new_space(key)
            space.account = self._account(self._account_of(space.name))
        return space

    def _account(self, name: str) -> Account:
        account = self._accounts.get(name)
        if account is None:
            account = self._accounts[name] = Account(name)
        return account

    def _new_space(self, key: SpaceKey) -> Space:
        if isinstance(key, str):
            return Space(key, self.names.root(key))
        name, base = key
        return Space(name, self.names.behind(name, base), base)

    def _drop_if_empty(self, space: Space) -> None:
        root = space.root
        if not root.children and not root.refs and self._spaces.get(space.key) is space:
            for session in space.sessions.values():
                self._agenda.discard(session)
            del self._spaces[space.key]

    def _drop_if_over(self, session: Session) -> None:
        """Forget a session that has ended and has nothing of its own left."""
        if session.ended and not session.leases and not session.nodes:
            self._agenda.discard(session)
            if session.space.sessions.get(session.name) is session:
                del session.space.sessions[session.name]

    # Nodes

    def _split(self, node: Node, depth: int) -> Node:
        upper = self._tree.split(node, depth)
        if upper.expires < math.inf and not upper.pins:
            self._agenda.push(upper.expires, upper)
        return upper

    def _touch(self, node: Node) -> None:
        self._uses += 1
        node.last_used = self._uses

    def _let_go(self, node: Node) -> None:
        leaf, unused = self._tree.release(node)
        if leaf is not None:
            self._enqueue(leaf)
        self._pool.free(unused)

    # Removing

    def _queues(self, account: Account) -> list[EvictionQueue]:
        own = self._own_queues.get(account)
        return [self._queue] if own is None else [self._queue, own]

    def _enqueue(self, leaf: Node) -> None:
        assert leaf.space is not None
        for queue in self._queues(leaf.space.account):
            queue.push(leaf)

    def _dequeue(self, node: Node, account: Account) -> None:
        for queue in self._queues(account):
            queue.discard(node)

    def _evict(self, queue: EvictionQueue, count: int) -> int:
        freed: list[int] = []
        while len(freed) < count:
            leaf = queue.pop()
            if leaf is None:
                break
            space, parent, owner = leaf.space, leaf.parent, leaf.owner
            assert space is not None and parent is not None
            take = min(count - len(freed), len(leaf.blocks))
            self._forget(space, leaf, len(leaf.blocks) - take, MissReason.EVICTED)
            freed += self._tree.trim(leaf, take)
            space.account.evicted += take
            if leaf.parent is not None:
                self._enqueue(leaf)
                continue
            if self._own_queues:
                self._dequeue(leaf, space.account)
            if self._expiring:
                self._agenda.discard(leaf)
            if owner is not None:
                self._drop_if_over(owner)
            if self._tree.evictable(parent):
                self._enqueue(parent)
            elif parent is space.root:
                self._drop_if_empty(space)
        self._pool.free(freed)
        self._tree.total.evicted += len(freed)
        return len(freed)

    def _make_room(self, account: Account, count: int) -> int:
        """Let an account store `count` more blocks, evicting its own; returns how many of them it may."""
        if account not in self._own_queues:
            return count
        over = account.blocks + count - account.limit
        if over > 0:
            self._evict(self._own_queues[account], int(over))
        return int(max(min(count, account.limit - account.blocks), 0))

    def _keep_to_limit(self, account: Account) -> None:
        """Evict what an account has above its limit, as far as it is not in use."""
        if account.blocks > account.limit:
            self._evict(self._own_queues[account], int(account.blocks - account.limit))

    def _cut(self, top: Node, reason: MissReason) -> tuple[int, int]:
        """Remove a node, which has no pins, and all below it; returns (blocks freed, blocks still in use)."""
        space, parent = top.space, top.parent
        assert space is not None
        below = [top, *self._tree.nodes(top)]
        if top.parent is None:
            for child in top.children.values():
                self._remember(child.hash_of(0, self.block_bytes), reason)
        else:
            self._remember(top.hash_of(0, self.block_bytes), reason)
        owners = {node.owner for node in below}
        for node in reversed(below):
            self._publish_removed(space, node, 0)
            self._dequeue(node, space.account)
            self._agenda.discard(node)
        if parent is not None and top.refs:
            for lease in self._leases:
                if any(is_under(node, top) for node in (lease.node, *lease._held)):
                    self._tree.acquire(parent)
                    lease._held.append(parent)
                    space.computing.discard(lease)  # it can add nothing that others could wait for
        unused, in_use = self._tree.cut(top)
        self._pool.free(unused)
        if parent is not None and self._tree.evictable(parent):
            self._enqueue(parent)
        for owner in owners:
            if owner is not None:
                self._drop_if_over(owner)
        return len(unused), in_use

    # What is told and remembered

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
