"""What must hold of a cache between any two calls; `PrefixCache.check` for tests.

1. free + cached + pinned + leased = total; no block is in two of these, none is lost.
2. A node's references are the leases that end at it plus its children with
   references, so its ancestors have references if it has. The same holds of pins.
3. Every unused leaf is known to eviction; nothing in use or pinned can be evicted.
   Pins hold at most their budget.
4. Edges are whole blocks (a tail is less than one, and a leaf); siblings differ in
   their first block; children lie under their own key.
5. A node belongs to the namespace in whose tree it is. What only one session has used
   has nothing shared below it.
6. Accounts count their blocks, and have at most as many as their limit. Nothing is
   there whose time is over, unless it is pinned; the agenda knows all that will be.
"""

from __future__ import annotations

from collections.abc import Collection
from math import inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefixcache.cache import PrefixCache
    from prefixcache.lease import Lease
    from prefixcache.pins import Pins
    from prefixcache.pool import BlockPool
    from prefixcache.tree import Account, Node, RadixTree, Space


def check(
    cache: PrefixCache,
    pool: BlockPool,
    tree: RadixTree,
    spaces: Collection[Space],
    leases: Collection[Lease],
    pins: Pins,
) -> None:
    """Derive every block's owner and every node's references anew, and compare; raises AssertionError."""
    size = tree.block_bytes
    pool.check()
    free = {block for start, length in pool.runs() for block in range(start, start + length)}
    owner: dict[int, Node] = {}
    ends: dict[Node, int] = {}
    for lease in leases:
        for end in (lease.node, *lease._held, lease._source_node):
            if end is not None:
                ends[end] = ends.get(end, 0) + 1
    tops = {space.root for space in spaces}
    for node in ends:  # the roots of cut-off parts are reached through the leases in them
        while node.parent is not None:
            node = node.parent
        tops.add(node)
    pinned_at: dict[Node, int] = {}
    for pin in pins:
        pinned_at[pin.node] = pinned_at.get(pin.node, 0) + 1
        assert pin.node.space is not None, "what was removed is still pinned"
    counts: dict[Account, list[int]] = {tree.total: [0, 0, 0, 0]}
    for top in tops:
        for node in [top, *tree.nodes(top)]:
            attached = top.space is not None
            active = sum(1 for child in node.children.values() if child.refs)
            assert node.refs == ends.get(node, 0) + active, "references are leases plus active children"
            active_pins = sum(1 for child in node.children.values() if child.pins)
            assert node.pins == pinned_at.get(node, 0) + active_pins or not attached, "pins are miscounted"
            assert (node.space is None) != attached, "a cut-off node still knows its namespace"
            assert node.space is None or node.space.root is top, "a node is in another namespace's tree"
            assert node.keys == sorted(node.children), "keys out of step with children"
            for key, child in node.children.items():
                assert child.parent is node and child.edge[:size] == key, "child under another key"
            if attached and node is not top:
                tail = len(node.edge) < size
                assert node.blocks and not (tail and node.children), "an empty node, or children below a tail"
                assert tail or len(node.edge) == len(node.blocks) * size, "edge is not whole blocks"
                assert node.space is not None and node.parent is not None
                for account in (tree.total, node.space.account):
                    sums = counts.setdefault(account, [0, 0, 0, 0])
                    sums[0] += len(node.blocks)
                    sums[1] += 0 if node.refs or node.pins else len(node.blocks)
                    sums[2] += len(node.blocks) if node.pins else 0
                    sums[3] += len(node.blocks) if node.pins and not node.refs else 0
                if tree.evictable(node):
                    queues = cache._queues(node.space.account)
                    assert all(node in queue for queue in queues), "an unused leaf that eviction does not know"
                session = node.owner
                assert session is None or (node in session.nodes and session.space is node.space), "a lost node"
                above = node.parent.owner
                assert above is None or session is above, "what only one session used has something shared below it"
                assert node.expires > cache.now or node.pins, "what has expired is still there"
                assert node.expires == inf or node.pins or node in cache._agenda, "an expiry that nobody will notice"
            if attached or node.refs:
                for block in node.blocks:
                    assert block not in owner, "two nodes hold one block"
                    owner[block] = node
    for account in {tree.total, *cache._accounts.values()}:
        counted = [account.blocks, account.idle, account.pinned, account.pinned_idle]
        assert counted == counts.get(account, [0, 0, 0, 0]), "block counters are off"
        assert account.blocks <= account.limit or not account.idle, "an account keeps more than its limit"
    assert tree.total.pinned <= pins.budget, "pins hold more than their budget"
    for space in spaces:
        for session in space.sessions.values():
            assert all(node.owner is session for node in session.nodes), "a session has what is not its own"
            assert session.leases == sum(1 for lease in leases if lease.session is session)
    assert not free & owner.keys(), "a free block is in the tree"
    private: set[int] = set()
    for lease in leases:
        path: list[int] = []
        step: Node | None = lease.node
        while step is not None:
            path[:0] = step.blocks
            step = step.parent
        if lease._base is not None:
            assert lease.blocks[: lease.base] == lease._base.blocks, "a lease does not begin with what it stands on"
        assert lease.blocks[lease.base : lease.shared] == path or lease.node.space is None, (
            "a lease's blocks are not its path"
        )
        own = lease.blocks[lease.shared :]
        assert not private.intersection(own) and len(set(own)) == len(own), "two leases own one block"
        private.update(own)
    assert not private & free and not private & owner.keys(), "an own block is free or in the tree"
    assert len(free) + len(owner) + len(private) == pool.total, "a block is lost"
    stats = cache.stats()
    assert stats.free + stats.cached + stats.pinned + stats.leased == stats.total
