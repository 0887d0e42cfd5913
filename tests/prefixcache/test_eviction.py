"""The order of eviction, and what keeping it costs."""

from __future__ import annotations

import pytest

from prefixcache.eviction import POLICIES, EvictionQueue, lfu, lru, slru
from prefixcache.tokens import pack
from prefixcache.tree import Node, RadixTree, Space


@pytest.fixture
def tree() -> RadixTree:
    return RadixTree(1)


@pytest.fixture
def root() -> Node:
    return Space("", b"hash").root


def leaf(tree: RadixTree, parent: Node, number: int, *, last_used: int, hits: int = 0) -> Node:
    node = tree.insert(parent, pack([number]), [number])
    node.last_used, node.hits = last_used, hits
    return node


def drain(queue: EvictionQueue, tree: RadixTree) -> list[int]:
    order = []
    while (node := queue.pop()) is not None:
        order += tree.trim(node, len(node.blocks))
    return order


@pytest.mark.parametrize(
    ("name", "expected"),
    [("lru", [0, 1, 2, 3]), ("lfu", [1, 3, 0, 2]), ("slru", [1, 3, 0, 2])],
)
def test_leaves_go_in_the_order_of_the_policy(name: str, expected: list[int], tree: RadixTree, root: Node) -> None:
    """Each policy is a function from a node to something sortable; the lowest goes first."""
    queue = EvictionQueue(POLICIES[name])
    for number, hits in enumerate([1, 0, 2, 0]):
        queue.push(leaf(tree, root, number, last_used=number, hits=hits))
    assert drain(queue, tree) == expected


def test_policies_differ_in_what_they_keep(tree: RadixTree, root: Node) -> None:
    """LFU keeps the most reused, segmented LRU anything reused that is recent, LRU what is recent."""
    often, once, never = (leaf(tree, root, n, last_used=n, hits=hits) for n, hits in enumerate([9, 1, 0]))
    assert min([often, once, never], key=lru) is often
    assert min([often, once, never], key=lfu) is never
    assert min([often, once], key=lfu) is once
    assert min([often, once], key=slru) is often


def test_equal_priorities_go_first_in_first_out(tree: RadixTree, root: Node) -> None:
    """Nodes are never compared themselves."""
    queue = EvictionQueue(lambda node: 0)
    for number in range(20):
        queue.push(leaf(tree, root, number, last_used=0))
    assert drain(queue, tree) == list(range(20))


def test_what_became_more_valuable_since_is_put_back(tree: RadixTree, root: Node) -> None:
    """A match that only changes `last_used` is honoured when the node's turn comes."""
    queue = EvictionQueue(lru)
    nodes = [leaf(tree, root, number, last_used=number) for number in range(3)]
    for node in nodes:
        queue.push(node)
    nodes[0].last_used = 10
    assert drain(queue, tree) == [1, 2, 0]


def test_a_leaf_in_use_is_passed_over_and_comes_back_by_being_pushed(tree: RadixTree, root: Node) -> None:
    """Dropping it from the queue is no loss: whoever releases it pushes it again."""
    queue = EvictionQueue(lru)
    node = leaf(tree, root, 1, last_used=1)
    queue.push(node)
    tree.acquire(node)
    assert queue.pop() is None and node not in queue
    tree.release(node)
    queue.push(node)
    assert queue.pop() is node


def test_a_node_that_got_children_is_no_leaf(tree: RadixTree, root: Node) -> None:
    """Only leaves are evicted, so what is cached of a path is always a prefix of it."""
    queue = EvictionQueue(lru)
    upper = leaf(tree, root, 1, last_used=1)
    queue.push(upper)
    below = leaf(tree, upper, 2, last_used=2)
    queue.push(below)
    assert queue.pop() is below
    tree.trim(below, 1)
    queue.push(upper)
    assert queue.pop() is upper
    assert queue.pop() is None


def test_a_leaf_is_queued_once_however_often_it_is_pushed(tree: RadixTree, root: Node) -> None:
    """A popular prompt that is released a thousand times is one entry."""
    queue = EvictionQueue(lru)
    node = leaf(tree, root, 1, last_used=1)
    for _ in range(1_000):
        queue.push(node)
    assert len(queue) == 1


def test_what_was_removed_otherwise_is_never_returned_and_does_not_pile_up(tree: RadixTree, root: Node) -> None:
    """The queue stays in proportion to what is in the tree."""
    queue = EvictionQueue(lru)
    kept = [leaf(tree, root, number, last_used=number) for number in range(5)]
    for node in kept:
        queue.push(node)
    for number in range(100, 1_100):
        node = leaf(tree, root, number, last_used=number)
        queue.push(node)
        queue.discard(node)
        tree.trim(node, 1)
        assert len(queue) <= 2 * (len(kept) + 1)
    assert drain(queue, tree) == list(range(5))


def test_removing_what_is_not_queued_changes_nothing(tree: RadixTree, root: Node) -> None:
    """Inner nodes and leaves in use may be reported as removed, too."""
    queue = EvictionQueue(lru)
    queue.push(leaf(tree, root, 1, last_used=1))
    queue.discard(leaf(tree, root, 2, last_used=2))
    assert len(queue) == 1 and drain(queue, tree) == [1]
