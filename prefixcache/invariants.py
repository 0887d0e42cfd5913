"""What must hold of a cache between any two calls; `PrefixCache.check` for tests.

1. free + cached + leased = total; no block is in two of these, none is lost.
2. A node's references are the leases that end at it plus its children with
   references, so its ancestors have references if it has.
3. Every unused leaf is known to eviction; nothing in use can be evicted.
4. Edges are whole blocks (a tail is less than one, and a leaf); siblings differ in
   their first block; children lie under their own key.
5. A node belongs to the namespace in whose tree it is.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefixcache.cache import Lease, PrefixCache
    from prefixcache.pool import BlockPool
    from prefixcache.tree import Node, RadixTree, Space


def check(
    cache: PrefixCache, pool: BlockPool, tree: RadixTree, spaces: Collection[Space], leases: Collection[Lease]
) -> None:
    """Derive every block's owner and every node's references anew, and compare; raises AssertionError."""
    size = tree.block_bytes
    pool.check()
    free = {block for start, length in pool.runs() for block in range(start, start + length)}
    owner: dict[int, Node] = {}
    ends: dict[Node, int] = {}
    for lease in leases:
        ends[lease.node] = ends.get(lease.node, 0) + 1
        if lease._source_node is not None:
            ends[lease._source_node] = ends.get(lease._source_node, 0) + 1
    tops = {space.root for space in spaces}
    for node in ends:  # the roots of cut-off parts are reached through the leases in them
        while node.parent is not None:
            node = node.parent
        tops.add(node)
    idle = count = 0
    for top in tops:
        for node in [top, *tree.nodes(top)]:
            attached = top.space is not None
            active = sum(1 for child in node.children.values() if child.refs)
            assert node.refs == ends.get(node, 0) + active, "references are leases plus active children"
            assert (node.space is None) != attached, "a cut-off node still knows its namespace"
            assert node.space is None or node.space.root is top, "a node is in another namespace's tree"
            assert node.keys == sorted(node.children), "keys out of step with children"
            for key, child in node.children.items():
                assert child.parent is node and child.edge[:size] == key, "child under another key"
            if attached and node is not top:
                tail = len(node.edge) < size
                assert node.blocks and not (tail and node.children), "an empty node, or children below a tail"
                assert tail or len(node.edge) == len(node.blocks) * size, "edge is not whole blocks"
                count += len(node.blocks)
                idle += 0 if node.refs else len(node.blocks)
                if tree.evictable(node):
                    assert node.queued, "an unused leaf that eviction does not know"
            if attached or node.refs:
                for block in node.blocks:
                    assert block not in owner, "two nodes hold one block"
                    owner[block] = node
    assert (count, idle) == (tree.block_count, tree.idle_blocks), "block counters are off"
    assert not free & owner.keys(), "a free block is in the tree"
    private: set[int] = set()
    for lease in leases:
        path: list[int] = []
        step: Node | None = lease.node
        while step is not None:
            path[:0] = step.blocks
            step = step.parent
        assert lease.blocks[: lease.shared] == path or lease.detached, "a lease's blocks are not its path"
        own = lease.blocks[lease.shared :]
        assert not private.intersection(own) and len(set(own)) == len(own), "two leases own one block"
        private.update(own)
    assert not private & free and not private & owner.keys(), "an own block is free or in the tree"
    assert len(free) + len(owner) + len(private) == pool.total, "a block is lost"
    stats = cache.stats()
    assert stats.free + stats.cached + stats.leased == stats.total
