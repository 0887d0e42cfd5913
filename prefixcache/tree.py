"""The radix tree: from token ids to block ids.

An edge is a run of whole blocks: the packed tokens and the ids of the blocks that
hold their keys and values. Nodes own the edge that leads to them. Children are
found by the packed tokens of their first block, in which siblings always differ.

A *tail* is the one exception to whole blocks: a leaf of a single block that is only
partly filled, kept so that the exact repeat of a prompt computes nothing but its
last token. Its key is shorter than a block, so the walk over whole blocks never
meets it; it is only ever copied from.

References. `Node.refs` counts the leases that end at the node plus the children
with references of their own. So a node with references has ancestors with
references, adding one costs a step per ancestor that had none, and everything that
may be evicted is exactly the nodes without.

Recency. A match touches only the node it ends at. What a node's descendants add to
its recency and its hits is added when they are removed: before that a leaf-first
eviction has no use for it.

A namespace that is cut off (`retire`) while leases end in it lives on outside the
tree, its nodes with `space` None, until those leases end.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from prefixcache.tokens import HASH_BYTES, TOKEN_BYTES, chain_hashes, common_tokens

MAX_EDGE_BLOCKS = 1024
"""Bounds what splitting, trimming or growing an edge copies (64 KiB at 16 tokens a block)."""


class Node:
    """An edge and what lies below it. `blocks` and `edge` always describe the same tokens."""

    __slots__ = (
        "blocks", "children", "edge", "hits", "keys", "last_used", "parent", "queued", "refs", "space", "_hashes",
    )  # fmt: skip

    def __init__(self, space: Space | None, parent: Node | None, edge: bytes, blocks: list[int]) -> None:
        self.space = space
        self.parent = parent
        self.edge = edge
        self.blocks = blocks
        self.children: dict[bytes, Node] = {}
        self.keys: list[bytes] = []  # the children's, ascending
        self.refs = 0
        self.last_used = 0
        self.hits = 0
        self.queued = False
        self._hashes = b""

    def hashes(self, block_bytes: int) -> bytes:
        """Return the chained hashes of this node's blocks, 16 bytes each; each is computed once."""
        self._hash(len(self.blocks), block_bytes)
        return self._hashes

    def hash_of(self, index: int, block_bytes: int) -> bytes:
        """Return the chained hash of one block, without computing those behind it."""
        self._hash(index + 1, block_bytes)
        return self._hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES]

    def _hash(self, blocks: int, block_bytes: int) -> None:
        """Have the hashes of the first so many blocks."""
        done = len(self._hashes) // HASH_BYTES
        if done < blocks:
            assert self.parent is not None
            before = self._hashes[-HASH_BYTES:] or self.parent.end_hash(block_bytes)
            new = self.edge[done * block_bytes : blocks * block_bytes]
            self._hashes += chain_hashes(before, new, block_bytes)

    def end_hash(self, block_bytes: int) -> bytes:
        """Return the hash of this node's last block; for a root, what its chains start from."""
        pending = []
        node = self
        while node.parent is not None and not node._hashes:
            pending.append(node)
            node = node.parent
        for below in reversed(pending):  # parents first, so that none recurses deeper than one level
            below.hashes(block_bytes)
        if self.parent is None:
            assert self.space is not None
            return self.space.root_hash
        return self.hash_of(len(self.blocks) - 1, block_bytes)


@dataclass(eq=False, slots=True)
class Space:
    """The tree of one namespace, and the leases that are computing something new in it."""

    name: str
    root_hash: bytes
    root: Node = field(init=False)
    computing: set[Any] = field(default_factory=set)  # the cache's leases

    def __post_init__(self) -> None:
        self.root = Node(self, None, b"", [])


class Place(NamedTuple):
    """Where a walk ended: after `depth` blocks of `node`'s edge, `offset` bytes into the prompt."""

    node: Node
    depth: int
    offset: int
    blocks: list[int]


class Partial(NamedTuple):
    """The block after `depth` blocks of `node`'s edge shares its first `tokens` tokens with what was looked for."""

    node: Node
    depth: int
    tokens: int


class RadixTree:
    """Nodes of all namespaces. Knows nothing of leases but their counts, and nothing of free blocks."""

    def __init__(self, block_size: int) -> None:
        self.block_bytes = block_size * TOKEN_BYTES
        self.block_count = 0
        """Blocks in the tree."""
        self.idle_blocks = 0
        """Of these, blocks in nodes without references: what can be evicted."""

    # Looking

    def find(self, root: Node, packed: bytes, end: int) -> Place:
        """Return the end of the longest path of whole blocks that packed[:end] follows. Changes nothing."""
        size = self.block_bytes
        node, offset = root, 0
        blocks: list[int] = []
        last = end - size
        while offset <= last:
            child = node.children.get(packed[offset : offset + size])
            if child is None:
                break
            edge = child.edge
            if not packed.startswith(edge, offset, end):
                depth = self._common_blocks(edge, packed, offset, end)
                blocks += child.blocks[:depth]
                return Place(child, depth, offset + depth * size, blocks)
            node = child
            offset += len(edge)
            blocks += child.blocks
        return Place(node, len(node.blocks), offset, blocks)

    def _common_blocks(self, edge: bytes, packed: bytes, offset: int, end: int) -> int:
        """Return how many whole blocks of `edge` packed[offset:end] starts with; at least the first agrees."""
        size = self.block_bytes
        low, high = 1, min(len(edge), end - offset) // size
        while low < high:
            middle = (low + high + 1) // 2
            if packed.startswith(edge[low * size : middle * size], offset + low * size):
                low = middle
            else:
                high = middle - 1
        return low

    def partial(self, place: Place, rest: bytes) -> Partial | None:
        """Find the block behind `place` that shares the most leading tokens with `rest` (up to a block).

        Returns None if no token is shared. Among siblings in order, the best is a
        neighbour of `rest`.
        """
        node, depth = place.node, place.depth
        if not rest:
            return None
        if depth < len(node.blocks):
            size = self.block_bytes
            shared = common_tokens(node.edge[depth * size : (depth + 1) * size], rest)
            return Partial(node, depth, shared) if shared else None
        keys = node.keys
        index = bisect_left(keys, rest)
        best, best_key = 0, b""
        for key in keys[max(index - 1, 0) : index + 1]:
            shared = common_tokens(key, rest)
            if shared > best:
                best, best_key = shared, key
        return Partial(node.children[best_key], 0, best) if best else None

    def nodes(self, root: Node) -> Iterator[Node]:
        """All nodes below `root`, parents first."""
        stack = list(root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()

    # Changing

    def split(self, node: Node, depth: int) -> Node:
        """Cut the edge after `depth` blocks and return the new upper node.

        The lower part keeps its identity, so leases that end at the node's end stay
        true. Nothing is touched: recency and hits remain below.
        """
        parent = node.parent
        assert parent is not None and 0 < depth < len(node.blocks)
        cut = depth * self.block_bytes
        upper = Node(node.space, parent, node.edge[:cut], node.blocks[:depth])
        key = node.edge[: self.block_bytes]
        parent.children[key] = upper  # same key, so the parent's `keys` stay true
        node.edge = node.edge[cut:]
        node.blocks = node.blocks[depth:]
        node.parent = upper
        below = node.edge[: self.block_bytes]
        upper.children[below] = node
        upper.keys.append(below)
        upper.refs = 1 if node.refs else 0
        upper._hashes = node._hashes[: depth * HASH_BYTES]
        node._hashes = node._hashes[depth * HASH_BYTES :]
        return upper

    def insert(self, parent: Node, edge: bytes, blocks: list[int]) -> Node:
        """Add a leaf without references below `parent` and return it; no sibling has its first block."""
        key = edge[: self.block_bytes]
        assert parent.space is not None and key not in parent.children
        node = Node(parent.space, parent, edge, blocks)
        parent.children[key] = node
        insort(parent.keys, key)
        self.block_count += len(blocks)
        self.idle_blocks += len(blocks)
        return node

    def grow(self, node: Node, edge: bytes, blocks: list[int]) -> None:
        """Append to the edge of a referenced leaf."""
        assert node.refs and not node.children and len(node.edge) % self.block_bytes == 0
        node.edge += edge
        node.blocks = node.blocks + blocks
        self.block_count += len(blocks)

    def trim(self, leaf: Node, count: int) -> list[int]:
        """Take the last `count` blocks off an unreferenced leaf, removing it if none is left."""
        assert not leaf.refs and not leaf.children and 0 < count <= len(leaf.blocks)
        keep = len(leaf.blocks) - count
        removed = leaf.blocks[keep:]
        self.block_count -= count
        self.idle_blocks -= count
        if keep:
            leaf.edge = leaf.edge[: keep * self.block_bytes]
            leaf.blocks = leaf.blocks[:keep]
            leaf._hashes = leaf._hashes[: keep * HASH_BYTES]
        else:
            self._unlink(leaf)
        return removed

    def retire(self, space: Space) -> tuple[list[int], int]:
        """Cut a whole namespace off: nothing in it is found or added to any more.

        Returns the blocks nobody uses, which are no longer the tree's, and how many
        are still in use; those leave as their references do (see `release`).
        """
        unused: list[int] = []
        in_use = 0
        for node in [space.root, *self.nodes(space.root)]:
            node.space = None
            self.block_count -= len(node.blocks)
            if node.refs:
                in_use += len(node.blocks)
            else:
                self.idle_blocks -= len(node.blocks)
                unused += node.blocks
        return unused, in_use

    def _unlink(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        key = node.edge[: self.block_bytes]
        del parent.children[key]
        del parent.keys[bisect_left(parent.keys, key)]
        parent.last_used = max(parent.last_used, node.last_used)
        parent.hits += node.hits
        node.parent = None
        node.space = None

    # References

    @staticmethod
    def evictable(node: Node) -> bool:
        """Whether a node is an unused leaf of the tree."""
        return not (node.refs or node.children or node.parent is None or node.space is None)

    def acquire(self, node: Node) -> None:
        """Add a reference to a node."""
        step: Node | None = node
        woken = 0
        while step is not None:
            step.refs += 1
            if step.refs > 1:
                break
            woken += len(step.blocks)
            step = step.parent
        self.idle_blocks -= woken

    def release(self, node: Node) -> tuple[Node | None, list[int]]:
        """Drop a reference of a node.

        Returns the node if it is now an unreferenced leaf of the tree (None if not),
        and the blocks of cut-off nodes that lost their last reference.
        """
        assert node.refs > 0
        unused: list[int] = []
        attached = node.space is not None
        idle = 0
        step: Node | None = node
        while step is not None:
            step.refs -= 1
            if step.refs:
                break
            if attached:
                idle += len(step.blocks)
            else:
                unused += step.blocks
            step = step.parent
        self.idle_blocks += idle
        return (node if self.evictable(node) else None), unused
