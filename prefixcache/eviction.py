"""Which unused leaf goes first.

A policy is one function from a node to something sortable; the lowest is evicted
first. It may look at `last_used` (a counter of cache operations) and `hits` (how
many matches reused the node). Add one to POLICIES and it can be chosen by name. Before
any policy comes a node's rank: what only a session used that has ended goes first, then
everything in the order of the priorities that requests asked for.

The queue holds each node at most once and is corrected lazily: a node that is in
use, gone, or no leaf any more when its turn comes is dropped (it comes back when it
becomes an unused leaf again), one that has become more valuable since is put back
with its new priority. So an eviction costs O(log n) and the work of correcting an
entry is paid for by the match that made it stale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefixcache.heap import Heap
from prefixcache.tree import Node, RadixTree

Policy = Callable[[Node], Any]


def lru(node: Node) -> int:
    """Least recently used."""
    return node.last_used


def lfu(node: Node) -> tuple[int, int]:
    """Least often reused, then least recently used."""
    return node.hits, node.last_used


def slru(node: Node) -> tuple[bool, int]:
    """LRU in two segments: what was never reused goes before all that was, however long ago that was."""
    return node.hits > 0, node.last_used


POLICIES: dict[str, Policy] = {"lru": lru, "lfu": lfu, "slru": slru}


class EvictionQueue:
    """Unused leaves in the order of their rank, and of a policy within one."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._heap: Heap[Node] = Heap()

    def push(self, leaf: Node) -> None:
        """Add an unused leaf, if it is not there already."""
        if leaf not in self._heap:
            self._heap.push(self._key(leaf), leaf)

    def demote(self, leaf: Node) -> None:
        """Say that a leaf has become less valuable, which is not noticed otherwise."""
        if leaf in self._heap:
            self._heap.push(self._key(leaf), leaf)

    def pop(self) -> Node | None:
        """Take out the leaf to evict first, or None if there is none."""
        while (first := self._heap.pop()) is not None:
            key, node = first
            if not RadixTree.evictable(node):
                continue
            current = self._key(node)
            if current == key:
                return node
            self._heap.push(current, node)
        return None

    def discard(self, node: Node) -> None:
        """A node leaves the tree by another way than `pop`."""
        self._heap.discard(node)

    def _key(self, node: Node) -> tuple[int, Any]:
        owner = node.owner
        return -1 if owner is not None and owner.ended else node.priority, self._policy(node)

    def __contains__(self, node: Node) -> bool:
        return node in self._heap

    def __len__(self) -> int:
        return len(self._heap)
