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
from collections.abc import Iterator
from dataclasses import dataclass

from prefixcache.invariants import check
from prefixcache.keeping import Keeping
from prefixcache.lease import BlockSource, Found, Lease, OutOfBlocks, Stored
from prefixcache.reasons import MissReason
from prefixcache.terms import DEFAULT_TERMS, Terms
from prefixcache.tokens import TOKEN_BYTES, chain_hashes
from prefixcache.tree import MAX_EDGE_BLOCKS, Account, Node, Partial, Place, Space

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


class PrefixCache(Keeping):
    """A radix tree over `total_blocks` blocks of `block_size` tokens.

    `fingerprint` names what computes the blocks (model, dtype, tokenizer) and `secret`
    is the deployment's; both only enter the hashes. `listener` gets every event; it must
    neither raise nor call the cache. `account_of` says for whom the blocks of a namespace
    count. Pins hold at most the share `pin_share` of all blocks. A session nobody uses
    for `session_idle` seconds ends.
    """

    # Looking

    def lookup(self, packed: bytes, namespace: str = "") -> Found:
        """Say what a match would find. Changes nothing, not even recency. Costs what a match costs."""
        base, rest, inner = self.parts(packed, namespace)
        space = self._spaces.get(inner) or self._new_space(inner)
        place = self._tree.find(space.root, rest, self._whole_blocks_end(rest))
        found = self._found(place, rest)[0]
        if not base:
            return found
        before = len(base) // TOKEN_BYTES
        reason = MissReason.NONE if found.reason is MissReason.TOO_SHORT else found.reason
        return Found(before + found.cached_tokens, reason, before + found.position)

    def in_flight(self, packed: bytes, namespace: str = "", *, beyond: int = 0) -> bool:
        """Whether a live lease is computing a block that a match of `packed` will want behind `beyond` blocks."""
        base, rest, inner = self.parts(packed, namespace)
        space = self._spaces.get(inner)
        return space is not None and self._in_flight(rest, space, beyond - len(base) // self.block_bytes)

    def fits(self, packed: bytes, namespace: str, blocks: int) -> bool:
        """Whether a match of `packed` could be followed by allocating up to `blocks` blocks in all.

        Matched blocks that others hold already cost nothing; matched blocks that
        nobody holds are no longer available once they are matched.
        """
        base, rest, inner = self.parts(packed, namespace)
        space = self._spaces.get(inner)
        held = len(base) // self.block_bytes
        if space is not None:
            place = self._tree.find(space.root, rest, self._whole_blocks_end(rest))
            held += len(place.blocks)
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
        base, rest, inner = self.parts(packed, namespace)
        space = self._spaces.get(inner)
        if space is None:
            return 0
        place = self._tree.find(space.root, rest, self._whole_blocks_end(rest))
        node = place.node
        length = len(base) + place.offset + len(node.edge) - place.depth * self.block_bytes
        if place.depth == len(node.blocks):
            source = self._tree.partial(place, self._rest(rest, place.offset))
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

    # A request's way

    def match(self, packed: bytes, namespace: str = "", *, read: bool = True, terms: Terms = DEFAULT_TERMS) -> Lease:
        """Hold the longest cached prefix of a packed prompt of at least one token.

        The last token is never matched: its logits are wanted, so it is computed.
        Exactly what matched is refreshed, on the `terms` given, which hold for what the
        lease commits as well. With `read` False nothing is looked for. Splits an edge if
        the match ends inside one; costs O(length) with memcmp.
        """
        assert packed
        if not (read and self._published):
            return self._match(packed, self._space(namespace), read, terms)
        base, rest, inner = self.parts(packed, namespace)
        lease = self._match(rest, self._space(inner), read, terms)
        if base:
            below = self._space(self.shared_namespace)
            lease.stand_on(self._match(base + rest[:TOKEN_BYTES], below, True, DEFAULT_TERMS))
        return lease

    def _match(self, packed: bytes, space: Space, read: bool, terms: Terms) -> Lease:
        """Hold what one space has of a prompt."""
        source: Partial | None = None
        if read:
            place = self._tree.find(space.root, packed, self._whole_blocks_end(packed))
            node, blocks = place.node, place.blocks
            if place.depth < len(node.blocks):
                node = self._split(node, place.depth)
                place = place._replace(node=node)
            found, source = self._found(place, packed)
        else:
            node, blocks, found = space.root, [], Found(0, MissReason.BYPASSED, 0)
        lease = Lease(self, space, node, blocks, found, terms)
        self._leases.add(lease)
        self._tree.acquire(node)
        if terms.session:
            self._join(lease)
        if source is not None:
            holder, depth, tokens = source
            lease.source = BlockSource(holder.blocks[depth], tokens)
            lease._source_node = holder
            self._tree.acquire(holder)
            if len(holder.blocks) == 1:  # more of a longer one than matched would be refreshed
                self._use(lease, holder)
        if read:
            self._use(lease, node)
        if terms.session:
            self._claim(lease)
        return lease

    def announce(self, lease: Lease, packed: bytes) -> None:
        """Say that the lease will compute and commit the whole blocks of `packed`, for `in_flight` to find."""
        rest = packed[lease.base * self.block_bytes :]
        lease._prompt = rest
        target = rest[: len(rest) // self.block_bytes * self.block_bytes]
        if len(target) > (lease.shared - lease.base) * self.block_bytes:
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
        if (lease.shared - lease.base) * size >= len(lease._target):
            lease.space.computing.discard(lease)

    def evict(self, count: int) -> int:
        """Free `count` unused cached blocks, or as many as there are; returns how many.

        Leaves go first, in the policy's order, and are trimmed from their end to just
        what is needed.
        """
        return self._evict(self._queue, count)

    # Parts of these

    def _in_flight(self, packed: bytes, space: Space, beyond: int) -> bool:
        end = (beyond + 1) * self.block_bytes
        if not space.computing or end > self._whole_blocks_end(packed):
            return False
        wanted = packed[:end]
        return any(lease._target.startswith(wanted) for lease in space.computing if lease.shared - lease.base <= beyond)

    def _whole_blocks_end(self, packed: bytes) -> int:
        """Bytes of the whole blocks that may be matched: all but the last token."""
        return (len(packed) - TOKEN_BYTES) // self.block_bytes * self.block_bytes

    def _rest(self, packed: bytes, offset: int) -> bytes:
        """The tokens behind `offset` that a partly matching block may give: up to a block, without the last token."""
        return packed[offset : min(offset + self.block_bytes, len(packed) - TOKEN_BYTES)]

    def _found(self, place: Place, packed: bytes) -> tuple[Found, Partial | None]:
        """What a walk that ended at `place` found, with the partly matching block behind it."""
        source = self._tree.partial(place, self._rest(packed, place.offset))
        cached = place.offset // TOKEN_BYTES + (source.tokens if source else 0)
        return self._explain(place, packed, cached, source), source

    def _explain(self, place: Place, packed: bytes, cached: int, source: Partial | None) -> Found:
        """Say why a walk ended where it did, from the most to the least specific reason."""
        tokens = len(packed) // TOKEN_BYTES
        if tokens == 1:
            return Found(0, MissReason.TOO_SHORT, 0)
        if cached == tokens - 1:
            return Found(cached, MissReason.NONE, cached)
        space = place.node.space
        assert space is not None
        if space.computing and self._in_flight(packed, space, place.offset // self.block_bytes):
            return Found(cached, MissReason.IN_FLIGHT, cached)
        if self._removed and (removed := self._removed_reason(place, packed)) is not None:
            return Found(cached, removed, cached)
        # A cached prompt that merely ends here, in a partly filled block, does not go on differently.
        ends = source is not None and source.tokens * TOKEN_BYTES == len(source.node.edge) < self.block_bytes
        goes_on = place.depth < len(place.node.blocks) or len(place.node.children) > ends
        reason = MissReason.DIVERGED if cached and goes_on else MissReason.NEVER_SEEN
        return Found(cached, reason, cached)

    def _removed_reason(self, place: Place, packed: bytes) -> MissReason | None:
        """Whether the block behind `place` is remembered as removed, and why."""
        following = packed[place.offset : place.offset + self.block_bytes]
        if not following:
            return None
        node, size = place.node, self.block_bytes
        before = node.hash_of(place.depth - 1, size) if place.depth else node.end_hash(size)
        return self._removed.get(chain_hashes(before, following, size))

    def _use(self, lease: Lease, node: Node) -> None:
        """A match ended at a node."""
        self._uses += 1
        node.last_used = self._uses
        node.hits += 1
        node.value += 1.0
        terms = lease.terms
        if terms.priority > node.priority:
            node.priority = terms.priority
        if node.owner is not None:
            self._share(node, lease.session)
        if self._expiring and terms.sliding:
            self._extend(node, lease.expires)

    def _keep(self, lease: Lease, node: Node) -> None:
        """A lease would have stored the blocks of a node, had they not been there."""
        node.priority = max(node.priority, lease.terms.priority)
        self._share(node, lease.session)
        self._extend(node, lease.expires)

    def _own(self, node: Node, lease: Lease) -> None:
        """A node is new: it has the terms of the lease that made it."""
        node.priority = lease.terms.priority
        if lease.session is not None:
            node.owner = lease.session
            lease.session.nodes.add(node)
        if lease.expires < math.inf:
            self._set_expiry(node, lease.expires)

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
        if self._expiring and lease.terms.sliding and not lease.detached:
            self._extend(lease.node, self.expiry_of(lease.terms))
        if lease.session is not None:
            self._leave(lease)
        self._let_go(lease.node)
        for node in lease._held:
            self._let_go(node)
        self._keep_to_limit(lease.space.account)
        self._drop_if_empty(lease.space)
        if lease._base is not None:
            lease._base.release()

    def _name_of(self, node: Node) -> str:
        assert node.space is not None
        return node.space.name

    def _tokens_to(self, node: Node) -> bytes:
        assert node.space is not None
        edges: list[bytes] = []
        base = node.space.base
        step: Node | None = node
        while step is not None:
            edges.append(step.edge)
            step = step.parent
        return base + b"".join(reversed(edges))

    def check(self) -> None:
        """Verify every invariant; raises AssertionError. Walks everything: for tests."""
        check(self, self._pool, self._tree, self._spaces.values(), self._leases, self._pins)
