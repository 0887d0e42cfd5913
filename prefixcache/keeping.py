"""What is kept and for how long: time to live, pins, sessions, limits, and forgetting on request.

Removal by any of these is the same thing: a node is cut off with all below it, and
running requests finish with what they hold.
"""

from __future__ import annotations

import math

from prefixcache.eviction import EvictionQueue
from prefixcache.lease import Lease
from prefixcache.pins import Holder, Limit, Pin, PinKey, Pinned, is_under
from prefixcache.published import Published
from prefixcache.reasons import MissReason
from prefixcache.terms import Terms
from prefixcache.tokens import TOKEN_BYTES
from prefixcache.tree import Account, Node, Place, Session, Space, SpaceKey


class Keeping(Published):
    """The middle one of the three layers of a `PrefixCache`."""

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
                    self._keep_to_limit(pin.account)
                case Session() as session:
                    self._idle(session)

    @property
    def next_expiry(self) -> float:
        """When `tick` will have something to do; infinite if never, as things are."""
        first = self._agenda.first()
        return math.inf if first is None else float(first[0])

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

    # Pins

    @property
    def pin_budget(self) -> int:
        """The most blocks that pins may hold."""
        return self._pins.budget

    def pin(
        self, packed: bytes, namespace: str, name: str, *, ttl: float | None = None, most: int | None = None
    ) -> Pinned:
        """Keep the cached whole blocks of `packed` from eviction, until `unpin` or for `ttl` seconds.

        As much of the beginning as the budget allows, and `most` blocks of the account.
        A pin of the same name in the namespace is replaced.
        """
        key = PinKey(namespace, Holder.CALLER, name)
        self._drop_pin(key)
        base, rest, inner = self.parts(packed + bytes(TOKEN_BYTES), namespace)  # so that something follows
        end = (len(rest) - TOKEN_BYTES) // self.block_bytes * self.block_bytes
        if base and not end:  # nothing but published blocks
            base, rest, inner, end = b"", base, self.shared_namespace, len(base)
        before = len(base) // TOKEN_BYTES
        space = self._spaces.get(inner)
        if space is None:
            return Pinned(before, Limit.NOT_CACHED)
        place = self._tree.find(space.root, rest, end)
        account = self._account(self._account_of(namespace))
        tokens = self._pin(key, place, math.inf if ttl is None else self.now + ttl, most, account)
        if tokens * TOKEN_BYTES < place.offset:
            return Pinned(before + tokens, Limit.BUDGET)
        return Pinned(before + tokens, Limit.NOTHING if place.offset == end else Limit.NOT_CACHED)

    def publish(self, packed: bytes, name: str) -> Pinned:
        """Let every namespace begin with the whole blocks of `packed`, cached in `shared_namespace`, until `unpublish`.

        They are pinned; only if all of them can be, is anything published. A prompt
        published under the same name before is replaced.
        """
        self.unpublish(name)
        pinned = self.pin(packed, self.shared_namespace, name)
        if pinned.limit is not Limit.NOTHING or not pinned.tokens:
            self.unpin(self.shared_namespace, name)
            return Pinned(0, pinned.limit)
        self._published = {**self._published, name: packed[: pinned.tokens * TOKEN_BYTES]}
        return pinned

    def unpublish(self, name: str) -> bool:
        """Let no more prompts begin with a published one, and forget what was stored behind it.

        Returns whether there was one.
        """
        base = self._published.get(name)
        if base is None:
            return False
        self._withdraw(name)
        self.unpin(self.shared_namespace, name)
        if base not in self._published.values():
            self._forget_spaces([space for space in self._spaces.values() if space.base == base])
        return True

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
            if pin.key.holder is Holder.CALLER and (account is None or pin.account.name == account)
        ]

    def pinned_blocks(self, account: str | None = None) -> int:
        """Blocks under pins, of callers and sessions; shared ones count once."""
        return self._tree.total.pinned if account is None else self._accounts.get(account, Account()).pinned

    def _pin(
        self, key: PinKey, place: Place, expires: float, most: int | None = None, account: Account | None = None
    ) -> int:
        """Pin what the budget allows of the path to `place`, for its or another account; returns how many tokens."""
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
        pin = Pin(key, node, tokens, expires, space.account if account is None else account)
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

    def keep_session(self, lease: Lease, seconds: float) -> int:
        """Pin what a lease has in the tree, for its session's next request or for so long; returns how many tokens.

        Counts towards the budget for pins.
        """
        if lease.session is None or lease.detached or lease.node.parent is None:
            return 0
        node = lease.node
        place = Place(node, len(node.blocks), (lease.shared - lease.base) * self.block_bytes, [])
        key = PinKey(lease.space.key, Holder.SESSION, lease.session.name)
        self._drop_pin(key)
        return self._pin(key, place, self.now + seconds) + lease.base * self.block_size

    def end_session(self, namespace: str, name: str) -> int:
        """Evict before all else what only this session has used; returns how many blocks that is."""
        return sum(self._end_session(inner, name) for inner in self._family(namespace))

    def _end_session(self, inner: SpaceKey, name: str) -> int:
        """End a session of one space."""
        space = self._spaces.get(inner)
        session = None if space is None else space.sessions.get(name)
        if session is None:
            return 0
        self._drop_pin(PinKey(inner, Holder.SESSION, name))
        session.ended = True
        for node in session.nodes:
            for queue in self._queues(session.space.account):
                queue.demote(node)
        self._drop_if_over(session)
        return sum(len(node.blocks) for node in session.nodes)

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
        assert lease.session is not None
        if self._drop_pin(PinKey(lease.space.key, Holder.SESSION, lease.session.name)):
            self._keep_to_limit(lease.space.account)

    def _leave(self, lease: Lease) -> None:
        session = lease.session
        assert session is not None
        session.leases -= 1
        self._refresh(session)
        self._drop_if_over(session)

    def _refresh(self, session: Session) -> None:
        if self._session_idle < math.inf and self._spaces.get(session.space.key) is session.space:
            self._agenda.push(self.now + self._session_idle, session)

    def _idle(self, session: Session) -> None:
        """A session has not been used for long, unless it is being used right now."""
        if session.leases:
            self._refresh(session)
        elif not session.ended:
            self._end_session(session.space.key, session.name)

    def _share(self, node: Node, session: Session | None) -> None:
        """A node and its ancestors are used by a session, or by a request without one."""
        step: Node | None = node
        while step is not None and step.owner is not None:  # what is above a shared node is shared
            if step.owner is not session:
                step.owner.nodes.discard(step)
                step.owner = None
            step = step.parent

    # Time

    def _extend(self, node: Node, expires: float) -> None:
        """Let a node and its ancestors live until `expires` at least."""
        if not self._expiring:
            return
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
        self._expiring = True
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

    # Forgetting

    def invalidate(self, namespace: str | None = None) -> tuple[int, int]:
        """Forget everything, or everything of one namespace; returns (blocks freed, blocks still in use).

        Blocks in use are not matched again from now on and are freed when their last
        lease ends.
        """
        names = list(self._spaces) if namespace is None else self._family(namespace)
        return self._forget_spaces([self._spaces[name] for name in names])

    def invalidate_account(self, account: str) -> tuple[int, int]:
        """Forget everything of an account, as `invalidate` does."""
        return self._forget_spaces([space for space in self._spaces.values() if space.account.name == account])

    def invalidate_prefix(self, packed: bytes, namespace: str = "") -> tuple[int, int]:
        """Forget everything that begins with `packed`, and what of its own blocks led only there.

        What is published stays. Returns (blocks freed, blocks still in use), as
        `invalidate` does.
        """
        freed = in_use = 0
        for name in self._family(namespace):
            space = self._spaces[name]
            if space.base.startswith(packed):
                unused, used = self._forget_spaces([space])
            elif packed.startswith(space.base):
                unused, used = self._invalidate_prefix(packed[len(space.base) :], space)
            else:
                continue
            freed += unused
            in_use += used
        return freed, in_use

    def _invalidate_prefix(self, packed: bytes, space: Space) -> tuple[int, int]:
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
        tops: list[Node] = []
        for inner in self._family(namespace):
            session = self._spaces[inner].sessions.get(name)
            if session is not None:
                self._drop_pin(PinKey(inner, Holder.SESSION, name))
                tops += [node for node in session.nodes if node.parent is None or node.parent.owner is not session]
        return self._invalidate(tops)

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
                if pin.key.namespace == self.shared_namespace:
                    self._withdraw(pin.key.name)
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
            del self._spaces[space.key]
            for session in space.sessions.values():
                self._agenda.discard(session)
            unused, used = self._invalidate([space.root])
            freed += unused
            in_use += used
        return freed, in_use
