"""The radix tree by itself: walking, splitting, references, hashes."""

from __future__ import annotations

import pytest

from prefixcache.tokens import HASH_BYTES, TOKEN_BYTES, chain_hashes, pack
from prefixcache.tree import Node, Place, RadixTree, Space

SIZE = 2
BYTES = SIZE * TOKEN_BYTES


@pytest.fixture
def tree() -> RadixTree:
    return RadixTree(SIZE)


@pytest.fixture
def space() -> Space:
    return Space("tenant", b"root hash of 16b")


def find(tree: RadixTree, space: Space, tokens: list[int]) -> Place:
    packed = pack(tokens)
    return tree.find(space.root, packed, len(packed) // BYTES * BYTES)


def test_a_walk_takes_whole_edges_and_parts_of_the_last(tree: RadixTree, space: Space) -> None:
    """The place names the node, how many of its blocks agree, and the blocks of the whole path."""
    upper = tree.insert(space.root, pack([1, 1, 2, 2]), [7, 3])
    lower = tree.insert(upper, pack([3, 3, 4, 4, 5, 5]), [9, 4, 6])
    assert find(tree, space, [1, 1, 2, 2]) == (upper, 2, 2 * BYTES, [7, 3])
    assert find(tree, space, [1, 1, 2, 2, 3, 3, 4, 4, 9, 9]) == (lower, 2, 4 * BYTES, [7, 3, 9, 4])
    assert find(tree, space, [1, 1, 9, 9]) == (upper, 1, BYTES, [7])
    assert find(tree, space, [1, 1, 2, 2, 9, 9]) == (upper, 2, 2 * BYTES, [7, 3])
    assert find(tree, space, [9, 9]) == (space.root, 0, 0, [])
    assert find(tree, space, [1]) == (space.root, 0, 0, [])


def test_a_walk_never_goes_beyond_its_end(tree: RadixTree, space: Space) -> None:
    """Tokens behind `end` do not count, although they agree."""
    node = tree.insert(space.root, pack([1, 1, 2, 2, 3, 3]), [0, 1, 2])
    packed = pack([1, 1, 2, 2, 3, 3])
    for blocks in range(1, 4):
        assert tree.find(space.root, packed, blocks * BYTES).depth == blocks
    assert tree.find(space.root, packed, 0) == (space.root, 0, 0, [])
    assert node.blocks == [0, 1, 2]


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 64])
def test_the_point_of_difference_is_found_in_edges_of_any_length(tree: RadixTree, space: Space, length: int) -> None:
    """Binary search gives the same as counting."""
    tokens = [block for number in range(length) for block in (number, number)]
    tree.insert(space.root, pack(tokens), list(range(length)))
    for depth in range(1, length):
        other = list(tokens)
        other[depth * SIZE + 1] = 99
        assert find(tree, space, other).depth == depth


def test_a_split_keeps_the_lower_node_and_all_that_is_known_of_it(tree: RadixTree, space: Space) -> None:
    """Leases that end at a node stay true: identity, references, recency and hashes remain below."""
    node = tree.insert(space.root, pack([1, 1, 2, 2, 3, 3]), [5, 6, 7])
    child = tree.insert(node, pack([4, 4]), [8])
    tree.acquire(child)
    node.last_used, node.hits = 12, 3
    hashes = node.hashes(BYTES)
    before = find(tree, space, [1, 1, 2, 2, 3, 3, 4, 4]).blocks
    upper = tree.split(node, 1)
    assert (upper.blocks, node.blocks) == ([5], [6, 7])
    assert upper.edge == pack([1, 1]) and node.edge == pack([2, 2, 3, 3])
    assert node.parent is upper and upper.parent is space.root and child.parent is node
    assert upper.refs == 1 and node.refs == 1
    assert (node.last_used, node.hits) == (12, 3)
    assert upper.hashes(BYTES) + node.hashes(BYTES) == hashes
    assert find(tree, space, [1, 1, 2, 2, 3, 3, 4, 4]).blocks == before
    tree.release(child)
    assert tree.total.idle == tree.total.blocks == 4


def test_the_partly_matching_block_is_the_best_of_all_children(tree: RadixTree, space: Space) -> None:
    """Among many siblings, whichever shares the most leading tokens is found."""
    wide = RadixTree(4)
    keys = [[1, 2, 3, 4], [1, 2, 9, 9], [1, 300, 1, 1], [256, 1, 1, 1], [257, 1, 1, 1], [7], [7, 8]]
    nodes = {tuple(key): wide.insert(space.root, pack(key), [index]) for index, key in enumerate(keys)}
    place = Place(space.root, 0, 0, [])
    for rest in ([1, 2, 3], [1, 2, 9, 1], [1, 300, 9], [256], [257, 1, 9], [7, 8, 9], [7, 9], [2, 2], [], [1, 9]):
        shared = {
            key: next((i for i, (a, b) in enumerate(zip(key, rest, strict=False)) if a != b), min(len(key), len(rest)))
            for key in nodes
        }
        found = wide.partial(place, pack(rest))
        if max(shared.values()) == 0:
            assert found is None
        else:
            assert found is not None
            node, index, tokens = found
            assert index == 0 and tokens == max(shared.values())
            assert any(node is nodes[key] and count == tokens for key, count in shared.items())


def test_inside_an_edge_only_its_next_block_can_match_partly(tree: RadixTree, space: Space) -> None:
    """The index says which block of the node to copy."""
    node = tree.insert(space.root, pack([1, 1, 2, 3, 4, 4]), [0, 1, 2])
    assert tree.partial(Place(node, 1, BYTES, [0]), pack([2])) == (node, 1, 1)
    assert tree.partial(Place(node, 1, BYTES, [0]), pack([9])) is None
    assert tree.partial(Place(node, 3, 3 * BYTES, [0, 1, 2]), pack([2])) is None


def test_whole_blocks_never_match_a_partly_filled_one(tree: RadixTree, space: Space) -> None:
    """A tail is only ever copied from."""
    tail = tree.insert(space.root, pack([1]), [0])
    assert find(tree, space, [1, 1]).node is space.root
    assert tree.partial(Place(space.root, 0, 0, []), pack([1, 1])) == (tail, 0, 1)


def test_references_reach_every_ancestor_once(tree: RadixTree, space: Space) -> None:
    """A node's ancestors are in use as long as one lease ends anywhere below."""
    upper = tree.insert(space.root, pack([1, 1]), [0])
    left = tree.insert(upper, pack([2, 2, 3, 3]), [1, 2])
    right = tree.insert(upper, pack([4, 4]), [3])
    assert tree.total.idle == 4
    tree.acquire(left)
    tree.acquire(left)
    tree.acquire(right)
    assert (left.refs, right.refs, upper.refs, space.root.refs) == (2, 1, 2, 1)
    assert tree.total.idle == 0
    assert tree.release(left) == (None, [])
    assert tree.release(left) == (left, [])
    assert (upper.refs, tree.total.idle) == (1, 2)
    assert tree.release(right) == (right, [])
    assert (upper.refs, space.root.refs, tree.total.idle) == (0, 0, 4)


def test_trimming_takes_the_end_of_a_leaf(tree: RadixTree, space: Space) -> None:
    """Tokens, blocks and hashes shrink together; without blocks left the leaf is gone."""
    upper = tree.insert(space.root, pack([1, 1]), [0])
    leaf = tree.insert(upper, pack([2, 2, 3, 3, 4, 4]), [1, 2, 3])
    hashes = leaf.hashes(BYTES)
    assert tree.trim(leaf, 2) == [2, 3]
    assert (leaf.blocks, leaf.edge, leaf.hashes(BYTES)) == ([1], pack([2, 2]), hashes[:HASH_BYTES])
    assert tree.total.blocks == tree.total.idle == 2
    assert tree.trim(leaf, 1) == [1]
    assert not upper.children and not upper.keys
    assert RadixTree.evictable(upper) and not RadixTree.evictable(leaf)


def test_what_descendants_add_to_a_node_is_added_when_they_go(tree: RadixTree, space: Space) -> None:
    """A parent becomes as recent and as often reused as what was below it."""
    upper = tree.insert(space.root, pack([1, 1]), [0])
    leaf = tree.insert(upper, pack([2, 2]), [1])
    upper.last_used, upper.hits = 3, 1
    leaf.last_used, leaf.hits = 8, 5
    tree.trim(leaf, 1)
    assert (upper.last_used, upper.hits) == (8, 6)


def test_a_retired_space_gives_up_what_is_unused_at_once_and_the_rest_later(tree: RadixTree, space: Space) -> None:
    """Blocks in use leave with the last reference to them, deepest first."""
    upper = tree.insert(space.root, pack([1, 1]), [0])
    used = tree.insert(upper, pack([2, 2]), [1])
    tree.insert(upper, pack([3, 3]), [2])
    tree.acquire(used)
    unused, in_use = tree.cut(space.root)
    assert (unused, in_use) == ([2], 2)
    assert tree.total.blocks == tree.total.idle == 0
    assert tree.release(used) == (None, [1, 0])
    assert tree.total.idle == 0


def test_hashes_are_chained_along_the_path_and_computed_as_far_as_asked(tree: RadixTree, space: Space) -> None:
    """One block's hash needs nothing behind it; growth and asking in pieces change nothing."""
    tokens = [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    expected = chain_hashes(space.root_hash, pack(tokens), BYTES)
    upper = tree.insert(space.root, pack(tokens[:4]), [0, 1])
    leaf = tree.insert(upper, pack(tokens[4:6]), [2])
    assert leaf.hash_of(0, BYTES) == expected[2 * HASH_BYTES : 3 * HASH_BYTES]
    tree.acquire(leaf)
    tree.grow(leaf, pack(tokens[6:]), [3, 4])
    assert leaf.hash_of(1, BYTES) == expected[3 * HASH_BYTES : 4 * HASH_BYTES]
    assert len(leaf._hashes) == 2 * HASH_BYTES
    assert upper.hashes(BYTES) + leaf.hashes(BYTES) == expected
    assert leaf.end_hash(BYTES) == expected[-HASH_BYTES:]
    assert space.root.end_hash(BYTES) == space.root_hash


def test_paths_far_deeper_than_the_recursion_limit_can_be_hashed(tree: RadixTree, space: Space) -> None:
    """Nothing recurses along a path."""
    node: Node = space.root
    for number in range(3_000):
        node = tree.insert(node, pack([number, number]), [number])
    packed = pack([token for number in range(3_000) for token in (number, number)])
    assert node.end_hash(BYTES) == chain_hashes(space.root_hash, packed, BYTES)[-HASH_BYTES:]


def test_nodes_come_parents_first(tree: RadixTree, space: Space) -> None:
    """Whoever reverses the order has children first."""
    upper = tree.insert(space.root, pack([1, 1]), [0])
    below = [tree.insert(upper, pack([token, token]), [token]) for token in (2, 3)]
    deepest = tree.insert(below[0], pack([4, 4]), [4])
    order = list(tree.nodes(space.root))
    assert set(order) == {upper, deepest, *below}
    assert order.index(upper) == 0 and order.index(below[0]) < order.index(deepest)
