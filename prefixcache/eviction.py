"""Which unused leaf goes first.

A policy is one function from a node to something sortable; the lowest is evicted
first. It may look at `last_used` (a counter of cache operations) and `hits` (how
many matches reused the node). Add one to POLICIES and it can be chosen by name.

The queue holds each node at most once and is corrected lazily: a node that is in
use, gone, or no leaf any more when its turn comes is dropped (it comes back when it
becomes an unused leaf again), one that has become more valuable since is put back
with its new priority. So an eviction costs O(log n) and the work of correcting an
entry is paid for by the match that made it stale.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

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
    """Unused leaves in the order of a policy."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._heap: list[tuple[Any, int, Node]] = []
        self._pushed = 0
        self._gone = 0

    def push(self, leaf: Node) -> None:
        """Add an unused leaf, if it is not there already."""
        if not leaf.queued:
            leaf.queued = True
            self._push(self._policy(leaf), leaf)

    def pop(self) -> Node | None:
        """Take out the leaf to evict first, or None if there is none."""
        while self._heap:
            priority, _, node = heapq.heappop(self._heap)
            if not node.queued:  # removed meanwhile
                self._gone -= 1
                continue
            if not RadixTree.evictable(node):
                node.queued = False
                continue
            current = self._policy(node)
            if current != priority:
                self._push(current, node)
                continue
            node.queued = False
            return node
        return None

    def removed(self, node: Node) -> None:
        """A node leaves the tree by another way than `pop`; keeps what is queued in proportion to the tree."""
        if node.queued:
            node.queued = False
            self._gone += 1
            if self._gone * 2 > len(self._heap):
                self._heap = [entry for entry in self._heap if entry[2].queued]
                heapq.heapify(self._heap)
                self._gone = 0

    def _push(self, priority: Any, node: Node) -> None:
        self._pushed += 1  # breaks ties: the first in is the first out
        heapq.heappush(self._heap, (priority, self._pushed, node))

    def __len__(self) -> int:
        return len(self._heap)
