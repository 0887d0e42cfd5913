"""The prefix cache: which blocks already hold a prompt's keys and values.

Token ids in, block ids out. One thread owns a cache; nothing here locks, reads a
clock (`tick` says what time it is), or knows what a block holds.

    lease = cache.match(packed, namespace)     longest cached prefix, held
    cache.allocate(lease, n)                   n more blocks, evicting if need be
    ... compute lease.cached_tokens onwards into lease.blocks ...
    cache.commit(lease, packed_blocks)         finished blocks become matchable
    lease.release(tail)                        everything is let go; idempotent

Who owns a block: the pool (free), a lease (allocated, not committed), or the tree
(committed). `commit` moves blocks from the lease to the tree and leaves the lease a
reference; if the tree has the same tokens already, the lease takes the tree's block
instead and its own goes back to the pool.

What is kept, and for how long, is steered by the terms of those who use it (time to
live, priority, session), by pins, by the quota of the account it belongs to, and by
invalidation. Removal by any of the last ways is the same thing: a node is cut off with
all below it, and running requests finish with what they hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prefixcache.eviction import EvictionQueue, Policy, lru
from prefixcache.heap import Heap
from prefixcache.invariants import check
from prefixcache.lease import BlockSource, CacheEvent, Found, Lease, OutOfBlocks, Removed, Stored
from prefixcache.pins import Holder, Limit, Pin, PinKey, Pinned, Pins, is_under
from prefixcache.pool import BlockPool
from prefixcache.reasons import MissReason
from prefixcache.terms import DEFAULT_TERMS, Terms
from prefixcache.tokens import HASH_BYTES, TOKEN_BYTES, chain_hashes, root_hash
from prefixcache.tree import MAX_EDGE_BLOCKS, Account, Node, Partial, Place, RadixTree, Session, Space

DEFAULT_MEMORY_OF_REMOVED = 32_768
"""How many removed runs of blocks are remembered to explain misses (about 100 bytes each)."""
MAX_ALTERNATIVES = 64
"""How many children are looked at, and how many nodes deep, for the nearest alternative to a prompt."""


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Blocks now (free + cached + pinned + leased = total), and blocks removed so far.

    `cached` ones are used by nobody and can be evicted, `pinned` ones are held by pins
    only. Of one account, `total` is the sum of its own and `free` is 0; `limit` is the
    most blocks it may have cached, None for any number.
    """

    total: int
    free: int
    cached: int
    leased: int
    evicted: int
    pinned: int = 0
    expired: int = 0
    invalidated: int = 0
    sessions: int = 0
    limit: int | None = None


class PrefixCache:
    """A radix tree over `total_blocks` blocks of `block_size` tokens.

    `fingerprint` names what computes the blocks (model, dtype, tokenizer) and `secret`
    is the deployment's; both only enter the hashes. `listener` gets every event; it must
    neither raise nor call the cache. `account_of` says for whom the blocks of a namespace
    count. Pins hold at most the share `pin_share` of all blocks. A session nobody uses
    for `session_idle` seconds ends.
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
        account_of: Callable[[str], str] = str,
        pin_share: float = 0.0,
        session_idle: float = math.inf,
    ) -> None:
        self.now = 0.0
        self.block_size = block_size
        self.block_bytes = block_size * TOKEN_BYTES
        self.listener = listener
        self._fingerprint = fingerprint
        self._secret = secret
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
        self._spaces: dict[str, Space] = {}
        self._leases: set[Lease] = set()
        self._removed: dict[bytes, MissReason] = {}
        self._memory_of_removed = memory_of_removed
        self._uses = 0
        self._events = 0

    # Looking

    @property
    def total_blocks(self) -> int:
        return self._pool.total

    def account_of(self, namespace: str) -> str:
        """Return for whom the blocks of a namespace count."""
        return self._account_of(namespace)

    @property
    def next_expiry(self) -> float:
        """When `tick` will have something to do; infinite if never, as things are."""
        first = self._agenda.first()
        return math.inf if first is None else float(first[0])

    @property
    def pin_budget(self) -> int:
        """The most blocks that pins may hold."""
        return self._pins.budget

    @property
    def available_blocks(self) -> int:
        """How many blocks `allocate` could hand out now."""
        return self._pool.free_count + self._tree.total.idle

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
            while node is not None and not node.refs and not node.pins:
                held -= depth
                node = node.parent
                depth = len(node.blocks) if node is not None else 0
        return blocks - held <= self.available_blocks

    def alternative(self, packed: bytes, namespace: str = "") -> int:
        """Return the length in tokens of a cached path that agrees with a prompt for longest, 0 if none agrees.

        Where that path branches, it is followed to what was used last.
        """
        space = self._spaces.get(namespace)
        if space is None:
            return 0
        place = self._tree.find(space.root, packed, self._whole_blocks_end(packed))
        node = place.node
        length = place.offset + len(node.edge) - place.depth * self.block_bytes
        if place.depth == len(node.blocks):
            source = self._tree.partial(place, self._rest(packed, place.offset))
            if source is not None and source.node is not node:
                node = source.node
                length += len(node.edge)
            elif node is space.root:
                return 0
        for _ in range(MAX_ALTERNATIVES):
            if not node.children:
                break
            nearest = [node.children[key] for key in node.keys[:MAX_ALTERNATIVES]]
            node = max(nearest, key=lambda child: child.last_used)
            length += len(node.edge)
        return length // TOKEN_BYTES

    def stats(self, account: str | None = None) -> CacheStats:
        """Count blocks, of all or of one account. Of one, costs a look at every lease."""
        if account is None:
            counts, free, total, limit = self._tree.total, self._pool.free_count, self._pool.total, None
        else:
            counts = self._accounts.get(account, Account())
            mine = [lease for lease in self._leases if lease.space.account is counts]
            outside = {block for lease in mine for block in lease.blocks[lease.in_tree :]}
            free, total = 0, counts.blocks + len(outside)
            limit = None if math.isinf(counts.limit) else int(counts.limit)
        cached, pinned = counts.idle, counts.pinned_idle
        return CacheStats(
            total=total,
            free=free,
            cached=cached,
            leased=total - free - cached - pinned,
            evicted=counts.evicted,
            pinned=pinned,
            expired=counts.expired,
            invalidated=counts.invalidated,
            sessions=sum(
                not session.ended
                for space in self._spaces.values()
                if account is None or space.account is counts
                for session in space.sessions.values()
            ),
            limit=limit,
        )

    def stored(self, account: str | None = None) -> Iterator[Stored]:
        """What is matchable now, of all or of one account; parents first. All have the number of the next event."""
        for space in self._spaces.values():
            if account is None or space.account.name == account:
                for node in self._tree.nodes(space.root):
                    if len(node.edge) >= self.block_bytes:
                        assert node.parent is not None
                        before = node.parent.end_hash(self.block_bytes)
                        yield Stored(self._events, space.name, before, node.hashes(self.block_bytes))

    # A request's way

    def match(self, packed: bytes, namespace: str = "", *, read: bool = True, terms: Terms = DEFAULT_TERMS) -> Lease:
        """Hold the longest cached prefix of a packed prompt of at least one token.

        The last token is never matched: its logits are wanted, so it is computed.
        Exactly what matched is refreshed, on the `terms` given, which hold for what the
        lease commits as well. With `read` False nothing is looked for. Splits an edge if
        the match ends inside one; costs O(length) with memcmp.
        """
        assert packed
        space = self._space(namespace)
        if not read:
            lease = Lease(self, space, space.root, [], Found(0, MissReason.BYPASSED, 0), terms)
            self._hold(lease)
            self._claim(lease)
            return lease
        place = self._tree.find(space.root, packed, self._whole_blocks_end(packed))
        node = place.node
        if place.depth < len(node.blocks):
            node = self._split(node, place.depth)
            place = place._replace(node=node)
        found, source = self._found(place, packed)
        lease = Lease(self, space, node, place.blocks, found, terms)
        if source is not None:
            holder, depth, tokens = source
            lease.source = BlockSource(holder.blocks[depth], tokens)
            lease._source_node = holder
            self._tree.acquire(holder)
        self._hold(lease)
        if source is not None and len(source.node.blocks) == 1:  # more of a longer one than matched would be refreshed
            self._use(lease, source.node)
        self._use(lease, node)
        self._claim(lease)
        return lease

    def announce(self, lease: Lease, packed: bytes) -> None:
        """Say that the lease will compute and commit the whole blocks of `packed`, for `in_flight` to find."""
        lease._prompt = packed
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

        Does nothing for a detached lease, and less if the account's limit is reached.
        Blocks that the tree has already are replaced in `lease.blocks` by the tree's
        and given back.
        """
        assert not lease.released and len(packed) % self.block_bytes == 0
        if not packed or lease.detached:
            return
        self._renew(lease)
        tree, size = self._tree, self.block_bytes
        assert lease.shared + len(packed) // size <= len(lease.blocks)
        node, offset = lease.node, 0
        while offset < len(packed):
            child = node.children.get(packed[offset : offset + size])
            if child is None:
                self._move(lease, node)  # held, since making room for an account may evict
                node = self._insert(lease, node, packed, offset)
                break
            depth = len(child.blocks)
            if not packed.startswith(child.edge, offset):
                depth = tree._common_blocks(child.edge, packed, offset, len(packed))
                if depth < len(child.blocks):
                    child = self._split(child, depth)
            self._adopt(lease, child.blocks)
            self._keep(lease, child)
            node, offset = child, offset + depth * size
        self._move(lease, node)
        if lease.shared * size >= len(lease._target):
            lease.space.computing.discard(lease)

    def evict(self, count: int) -> int:
        """Free `count` unused cached blocks, or as many as there are; returns how many.

        Leaves go first, in the policy's order, and are trimmed from their end to just
        what is needed.
        """
        return self._evict(self._queue, count)

    # What is kept

    def tick(self, now: float) -> None:
        """Say what time it is, in seconds on any clock that does not go back; remove what has expired.

        Costs next to nothing when nothing has.
        """
        self.now = now
        while (first := self._agenda.first()) is not None and first[0] <= now:
            self._agenda.pop()
            match first[1]:
                case Node() as node:
                    self._expire(node)
                case Pin() as pin:
                    self._drop_pin(pin.key)
                    self._keep_to_limit(self._account(self._account_of(pin.key.namespace)))
                case Session() as session:
                    self._idle(session)

    def expiry_of(self, terms: Terms) -> float:
        """When what is used now on these terms expires."""
        return math.inf if terms.ttl is None else self.now + terms.ttl

    def limit(self, account: str, blocks: int | None) -> None:
        """Set the most blocks that an account may have in the tree, None for any number; evicts what is above."""
        counts = self._account(account)
        counts.limit = math.inf if blocks is None else blocks
        if blocks is None:
            self._own_queues.pop(counts, None)
            return
        if counts not in self._own_queues:
            own = self._own_queues[counts] = EvictionQueue(self._policy)
            for space in self._spaces.values():
                if space.account is counts:
                    for node in self._tree.nodes(space.root):
                        if self._tree.evictable(node):
                            own.push(node)
        self._keep_to_limit(counts)

    def pin(
        self, packed: bytes, namespace: str, name: str, *, ttl: float | None = None, most: int | None = None
    ) -> Pinned:
        """Keep the cached whole blocks of `packed` from eviction, until `unpin` or for `ttl` seconds.

        As much of the beginning as the budget allows, and `most` blocks of the account.
        A pin of the same name in the namespace is replaced.
        """
        key = PinKey(namespace, Holder.CALLER, name)
        self._drop_pin(key)
        space = self._spaces.get(namespace)
        if space is None:
            return Pinned(0, Limit.NOT_CACHED)
        end = len(packed) // self.block_bytes * self.block_bytes
        place = self._tree.find(space.root, packed, end)
        tokens = self._pin(key, place, math.inf if ttl is None else self.now + ttl, most)
        if tokens * TOKEN_BYTES < place.offset:
            return Pinned(tokens, Limit.BUDGET)
        return Pinned(tokens, Limit.NOTHING if place.offset == end else Limit.NOT_CACHED)

    def unpin(self, namespace: str, name: str) -> bool:
        """End a pin; returns whether there was one."""
        dropped = self._drop_pin(PinKey(namespace, Holder.CALLER, name))
        self._keep_to_limit(self._account(self._account_of(namespace)))
        return dropped

    def pins(self, account: str | None = None) -> list[Pin]:
        """The pins that callers have made, of all or of one account, oldest first."""
        return [
            pin
            for pin in self._pins
            if pin.key.holder is Holder.CALLER and (account is None or self._account_of(pin.key.namespace) == account)
        ]

    def pinned_blocks(self, account: str | None = None) -> int:
        """Blocks under pins, of callers and sessions; shared ones count once."""
        return self._tree.total.pinned if account is None else self._accounts.get(account, Account()).pinned

    def keep_session(self, lease: Lease, seconds: float) -> int:
        """Pin what a lease has in the tree, for its session's next request or for so long; returns how many tokens.

        Counts towards the budget for pins.
        """
        if lease.session is None or lease.detached or lease.node.parent is None:
            return 0
        node = lease.node
        place = Place(node, len(node.blocks), lease.shared * self.block_bytes, [])
        key = PinKey(lease.space.name, Holder.SESSION, lease.session.name)
        self._drop_pin(key)
        return self._pin(key, place, self.now + seconds, None)

    def end_session(self, namespace: str, name: str) -> int:
        """Evict before all else what only this session has used; returns how many blocks that is."""
        space = self._spaces.get(namespace)
        session = None if space is None else space.sessions.get(name)
        if session is None:
            return 0
        self._drop_pin(PinKey(namespace, Holder.SESSION, name))
        session.ended = True
        for node in session.nodes:
            for queue in self._queues(session.space.account):
                queue.demote(node)
        self._drop_if_over(session)
        return sum(len(node.blocks) for node in session.nodes)

    def invalidate(self, namespace: str | None = None) -> tuple[int, int]:
        """Forget everything, or everything of one namespace; returns (blocks freed, blocks still in use).

        Blocks in use are not matched again from now on and are freed when their last
        lease ends.
        """
        names = list(self._spaces) if namespace is None else [namespace]
        return self._forget_spaces([self._spaces[name] for name in names if name in self._spaces])

    def invalidate_account(self, account: str) -> tuple[int, int]:
        """Forget everything of an account, as `invalidate` does."""
        return self._forget_spaces([space for space in self._spaces.values() if space.account.name == account])

    def invalidate_prefix(self, packed: bytes, namespace: str = "") -> tuple[int, int]:
        """Forget everything that begins with `packed`, and what of its own blocks led only there.

        Returns (blocks freed, blocks still in use), as `invalidate` does.
        """
        space = self._spaces.get(namespace)
        if space is None:
            return 0, 0
        for lease in self._leases:
            if lease.space is space and lease._prompt.startswith(packed):
                lease._barred = True
                space.computing.discard(lease)
        size = self.block_bytes
        end = len(packed) // size * size
        place = self._tree.find(space.root, packed, end)
        node, rest = place.node, packed[end:]
        if place.offset < end:
            return 0, 0
        if place.depth < len(node.blocks):
            goes_on = node.edge.startswith(rest, place.depth * size)
            tops = [node] if goes_on else []
        elif rest:
            tops = [child for key, child in node.children.items() if key.startswith(rest)]
            if node.parent is not None and self._leads_only_on(node, len(tops)):
                tops = [node]
        else:
            tops = [node]
        if len(tops) == 1:
            top = tops[0]
            while top.parent is not None and top.parent.parent is not None and self._leads_only_on(top.parent, 1):
                top = top.parent
            tops = [top]
        return self._invalidate(tops)

    def invalidate_session(self, namespace: str, name: str) -> tuple[int, int]:
        """Forget what only this session has used, as `invalidate` does."""
        space = self._spaces.get(namespace)
        session = None if space is None else space.sessions.get(name)
        if session is None:
            return 0, 0
        self._drop_pin(PinKey(namespace, Holder.SESSION, name))
        tops = [node for node in session.nodes if node.parent is None or node.parent.owner is not session]
        return self._invalidate(tops)

    def valuable(self, tokens: int) -> list[tuple[str, bytes]]:
        """The prefixes that saved most lately: (namespace, packed tokens), best first, of `tokens` tokens in all.

        Worth is matches, as far as they have not decayed, times length. What is a
        prefix of a better one is left out.
        """
        ranked: list[tuple[float, int, Node]] = []
        for space in self._spaces.values():
            stack = [(child, 0) for child in space.root.children.values()]
            while stack:
                node, before = stack.pop()
                length = before + len(node.edge)
                if node.value:
                    ranked.append((node.value * length, length, node))
                stack += [(child, length) for child in node.children.values()]
        ranked.sort(key=lambda entry: entry[:2], reverse=True)
        chosen: dict[Node, None] = {}
        covered: set[Node] = set()
        room = tokens * TOKEN_BYTES
        for _, _, node in ranked:
            path: list[Node] = []
            step: Node | None = node
            while step is not None and step not in covered:
                path.append(step)
                step = step.parent
            size = sum(len(part.edge) for part in path)
            if path and size <= room:
                room -= size
                covered.update(path)
                chosen[node] = None
        for node in list(chosen):  # a longer one that was chosen later contains it
            if any(child in covered for child in node.children.values()):
                del chosen[node]
        return [(self._name_of(node), self._tokens_to(node)) for node in chosen]

    def decay(self, factor: float) -> None:
        """Let what matches are worth fade; walks over everything."""
        for space in self._spaces.values():
            for node in self._tree.nodes(space.root):
                node.value *= factor

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
            space.account = self._account(self._account_of(namespace))
        return space

    def _account(self, name: str) -> Account:
        account = self._accounts.get(name)
        if account is None:
            account = self._accounts[name] = Account(name)
        return account

    def _new_space(self, namespace: str) -> Space:
        start = root_hash(self._fingerprint, self._secret, namespace.encode(), str(self.block_size).encode())
        return Space(namespace, start)

    def _drop_if_empty(self, space: Space) -> None:
        root = space.root
        if not root.children and not root.refs and self._spaces.get(space.name) is space:
            for session in space.sessions.values():
                self._agenda.discard(session)
            del self._spaces[space.name]

    def _name_of(self, node: Node) -> str:
        assert node.space is not None
        return node.space.name

    def _tokens_to(self, node: Node) -> bytes:
        edges: list[bytes] = []
        step: Node | None = node
        while step is not None:
            edges.append(step.edge)
            step = step.parent
        return b"".join(reversed(edges))

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

    def _use(self, lease: Lease, node: Node) -> None:
        """A match ended at a node."""
        self._touch(node)
        node.hits += 1
        node.value += 1.0
        if lease.terms.priority > node.priority:
            node.priority = lease.terms.priority
        self._share(node, lease.session)
        if lease.terms.sliding:
            self._extend(node, lease.expires)

    def _keep(self, lease: Lease, node: Node) -> None:
        """A lease would have stored the blocks of a node, had they not been there."""
        node.priority = max(node.priority, lease.terms.priority)
        self._share(node, lease.session)
        self._extend(node, lease.expires)

    def _split(self, node: Node, depth: int) -> Node:
        upper = self._tree.split(node, depth)
        if upper.expires < math.inf and not upper.pins:
            self._agenda.push(upper.expires, upper)
        return upper

    # Time

    def _extend(self, node: Node, expires: float) -> None:
        """Let a node and its ancestors live until `expires` at least."""
        step: Node | None = node
        while step is not None and step.parent is not None:
            if step.expires < expires:
                self._set_expiry(step, expires)
            step = step.parent

    def _renew(self, lease: Lease) -> None:
        """What a lease stores later than its time to live after the match lives as long from now."""
        if lease.expires <= self.now:
            lease.expires = self.expiry_of(lease.terms)

    def _set_expiry(self, node: Node, expires: float) -> None:
        node.expires = expires
        if expires < math.inf and not node.pins:
            self._agenda.push(expires, node)
        else:
            self._agenda.discard(node)

    def _expire(self, node: Node) -> None:
        """A node's time is over, unless a running request on sliding terms uses it."""
        if node.space is None or node.pins:
            return
        for lease in self._leases:
            if node.refs and lease.terms.sliding and is_under(lease.node, node):
                lease.expires = self.expiry_of(lease.terms)
                self._extend(lease.node, lease.expires)
        if node.expires <= self.now:
            space = node.space
            freed, used = self._cut(node, MissReason.EXPIRED)
            space.account.expired += freed + used
            self._tree.total.expired += freed + used
            self._drop_if_empty(space)

    # Pins

    def _pin(self, key: PinKey, place: Place, expires: float, most: int | None) -> int:
        """Pin what the budget allows of the path to `place`; returns how many tokens."""
        space = place.node.space
        assert space is not None
        limit = self._pins.budget if most is None else most
        blocks = self._pins.room(place.node, place.depth, space.account, limit)
        node, depth = place.node, place.depth
        excess = place.offset // self.block_bytes - blocks
        while excess >= depth and node.parent is not None:
            excess -= depth
            node = node.parent
            depth = len(node.blocks)
        if node.parent is None:
            return 0
        if depth - excess < len(node.blocks):
            node = self._split(node, depth - excess)
        tokens = blocks * self.block_size
        pin = Pin(key, node, tokens, expires)
        self._pins.add(pin)
        if expires < math.inf:
            self._agenda.push(expires, pin)
        return tokens

    def _drop_pin(self, key: PinKey) -> bool:
        if key not in self._pins:
            return False
        self._agenda.discard(self._pins[key])
        self._unpinned(self._pins.drop(key))
        return True

    def _unpinned(self, nodes: list[Node]) -> None:
        """Nodes, the deepest first, have no pins any more: their time goes on, and they can be evicted."""
        for node in reversed(nodes):
            if node.space is None:
                continue  # removed, or an ancestor was just now
            if node.expires <= self.now:
                self._expire(node)
            elif node.expires < math.inf:
                self._agenda.push(node.expires, node)
            if self._tree.evictable(node):
                self._enqueue(node)

    # Sessions

    def _hold(self, lease: Lease) -> None:
        """Count a lease at its node and in its session."""
        self._tree.acquire(lease.node)
        self._leases.add(lease)
        if lease.terms.session:
            self._join(lease)

    def _join(self, lease: Lease) -> None:
        """Make a lease one of its session."""
        name, space = lease.terms.session, lease.space
        session = space.sessions.get(name)
        if session is None:
            session = space.sessions[name] = Session(name, space)
        session.ended = False
        session.leases += 1
        lease.session = session
        self._refresh(session)

    def _claim(self, lease: Lease) -> None:
        """A lease of a session takes over what was kept for its next request."""
        if lease.session is not None and self._drop_pin(PinKey(lease.space.name, Holder.SESSION, lease.session.name)):
            self._keep_to_limit(lease.space.account)

    def _leave(self, lease: Lease) -> None:
        session = lease.session
        if session is not None:
            session.leases -= 1
            self._refresh(session)
            self._drop_if_over(session)

    def _refresh(self, session: Session) -> None:
        if self._session_idle < math.inf and self._spaces.get(session.space.name) is session.space:
            self._agenda.push(self.now + self._session_idle, session)

    def _idle(self, session: Session) -> None:
        """A session has not been used for long, unless it is being used right now."""
        if session.leases:
            self._refresh(session)
        elif not session.ended:
            self.end_session(session.space.name, session.name)

    def _drop_if_over(self, session: Session) -> None:
        """Forget a session that has ended and has nothing of its own left."""
        if session.ended and not session.leases and not session.nodes:
            self._agenda.discard(session)
            if session.space.sessions.get(session.name) is session:
                del session.space.sessions[session.name]

    def _share(self, node: Node, session: Session | None) -> None:
        """A node and its ancestors are used by a session, or by a request without one."""
        step: Node | None = node
        while step is not None and step.owner is not None:  # what is above a shared node is shared
            if step.owner is not session:
                step.owner.nodes.discard(step)
                step.owner = None
            step = step.parent

    def _own(self, node: Node, lease: Lease) -> None:
        """A node is new: it has the terms of the lease that made it."""
        node.priority = lease.terms.priority
        if lease.session is not None:
            node.owner = lease.session
            lease.session.nodes.add(node)
        if lease.expires < math.inf:
            self._set_expiry(node, lease.expires)

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
            self._dequeue(leaf, space.account)
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
        unused, in_use = self._tree.cut(top)
        self._pool.free(unused)
        if parent is not None and self._tree.evictable(parent):
            self._enqueue(parent)
        for owner in owners:
            if owner is not None:
                self._drop_if_over(owner)
        return len(unused), in_use

    def _leads_only_on(self, node: Node, children: int) -> bool:
        """Whether nothing ends at a node of the tree: it has so many children, and no lease or pin of its own."""
        active = sum(1 for child in node.children.values() if child.refs)
        pinned = sum(1 for child in node.children.values() if child.pins)
        return len(node.children) == children and (node.refs, node.pins) == (active, pinned)

    def _invalidate(self, tops: list[Node]) -> tuple[int, int]:
        freed = in_use = 0
        for top in tops:
            space = top.space
            assert space is not None
            unpinned: list[Node] = []
            for pin in self._pins.under(top):
                self._agenda.discard(pin)
                unpinned += self._pins.drop(pin.key)
            unused, used = self._cut(top, MissReason.INVALIDATED)
            self._unpinned(unpinned)
            for account in (space.account, self._tree.total):
                account.invalidated += unused + used
            freed += unused
            in_use += used
            self._drop_if_empty(space)
        return freed, in_use

    def _forget_spaces(self, spaces: list[Space]) -> tuple[int, int]:
        freed = in_use = 0
        for space in spaces:
            del self._spaces[space.name]
            for session in space.sessions.values():
                self._agenda.discard(session)
            unused, used = self._invalidate([space.root])
            freed += unused
            in_use += used
        return freed, in_use

    # Storing

    def _adopt(self, lease: Lease, blocks: list[int]) -> None:
        """Replace the lease's next own blocks by the tree's equal ones."""
        start, end = lease.shared, lease.shared + len(blocks)
        self._pool.free(lease.blocks[start:end])
        lease.blocks[start:end] = blocks
        lease.shared = end

    def _move(self, lease: Lease, node: Node) -> None:
        """Let a lease end at a node that continues its path."""
        if node is not lease.node:
            self._tree.acquire(node)
            self._let_go(lease.node)
            lease.node = node

    def _insert(self, lease: Lease, node: Node, packed: bytes, offset: int) -> Node:
        """Hang the rest of a commit below `node`, growing its edge where that changes nothing for others."""
        size = self.block_bytes
        count = (len(packed) - offset) // size
        allowed = self._make_room(lease.space.account, count)
        if allowed < count:  # nobody need wait for the rest
            lease.space.computing.discard(lease)
        blocks = lease.blocks[lease.shared : lease.shared + allowed]
        edge = packed[offset : offset + allowed * size]
        lease.shared += allowed
        lease.stored += allowed * self.block_size
        if not blocks:
            return node
        self._drop_superseded_tail(node, edge[:size])
        if node is lease.node and self._may_grow(node, lease):
            done = len(node.blocks)
            fits = MAX_EDGE_BLOCKS - done
            self._tree.grow(node, edge[: fits * size], blocks[:fits])
            edge, blocks = edge[fits * size :], blocks[fits:]
            self._publish_stored(lease.space, node, done)
        while blocks:
            node = self._tree.insert(node, edge[: MAX_EDGE_BLOCKS * size], blocks[:MAX_EDGE_BLOCKS])
            self._own(node, lease)
            edge, blocks = edge[MAX_EDGE_BLOCKS * size :], blocks[MAX_EDGE_BLOCKS:]
            self._publish_stored(lease.space, node, 0)
        return node

    def _may_grow(self, node: Node, lease: Lease) -> bool:
        """Whether a lease that ends at a node may make its edge longer: it is alone there, on the same terms."""
        alone = node.refs == 1 and not node.pins and not node.children and node.parent is not None
        return (
            alone
            and len(node.blocks) < MAX_EDGE_BLOCKS
            and node.expires == lease.expires
            and node.priority == lease.terms.priority
            and node.owner is lease.session
        )

    def _drop_superseded_tail(self, parent: Node, key: bytes) -> None:
        """Free a tail that a block about to be inserted contains, unless it is in use."""
        place = Place(parent, len(parent.blocks), 0, [])
        best = self._tree.partial(place, key)
        if best is None:
            return
        tail, _, shared = best
        whole = shared * TOKEN_BYTES == len(tail.edge)
        if self._tree.evictable(tail) and len(tail.edge) < self.block_bytes and whole:
            assert tail.space is not None
            self._dequeue(tail, tail.space.account)
            self._agenda.discard(tail)
            owner = tail.owner
            self._pool.free(self._tree.trim(tail, 1))
            if owner is not None:
                self._drop_if_over(owner)

    def _keep_tail(self, lease: Lease, tail: bytes) -> bool:
        """Keep the lease's partly filled block in the tree, unless what is there covers it."""
        assert len(tail) < self.block_bytes and lease.shared < len(lease.blocks)
        node = lease.node
        if lease.detached:
            return False
        self._renew(lease)
        best = self._tree.partial(Place(node, len(node.blocks), 0, []), tail)
        if best is not None and best.tokens * TOKEN_BYTES == len(tail):
            if len(best.node.blocks) == 1:
                self._touch(best.node)
                self._keep(lease, best.node)
            return False
        if not self._make_room(lease.space.account, 1):
            return False
        self._drop_superseded_tail(node, tail)
        leaf = self._tree.insert(node, tail, [lease.blocks[lease.shared]])
        self._own(leaf, lease)
        self._touch(leaf)
        self._enqueue(leaf)
        lease.stored += len(tail) // TOKEN_BYTES
        return True

    def _drop_source(self, lease: Lease) -> None:
        if lease._source_node is not None:
            self._let_go(lease._source_node)
            lease._source_node = None

    def _let_go(self, node: Node) -> None:
        leaf, unused = self._tree.release(node)
        if leaf is not None:
            self._enqueue(leaf)
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
        if lease.terms.sliding and not lease.detached:
            self._extend(lease.node, self.expiry_of(lease.terms))
        self._leave(lease)
        for node in (lease.node, *lease._held):
            self._let_go(node)
        self._keep_to_limit(lease.space.account)
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
        check(self, self._pool, self._tree, self._spaces.values(), self._leases, self._pins)
