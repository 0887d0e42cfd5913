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

Pins count like references, apart from them: `Node.pins` is those that end at the node
plus the children with pins.

What is cut off (`cut`) while leases end in it lives on outside the tree, its nodes with
`space` None, until those leases end.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from prefixcache.terms import DEFAULT_PRIORITY
from prefixcache.tokens import HASH_BYTES, TOKEN_BYTES, chain_hashes, common_tokens

SpaceKey = str | tuple[str, bytes]
"""What a space is found by: a namespace, or a namespace and the published prompt it is behind."""

MAX_EDGE_BLOCKS = 1024
"""Bounds what splitting, trimming or growing an edge copies (64 KiB at 16 tokens a block)."""


class Node:
    """An edge and what lies below it. `blocks` and `edge` always describe the same tokens.

    `expires` is when it is to be removed, `owner` the session that alone has used it,
    if one has. `hits` counts the matches that ended here, `value` does so with decay.
    """

    __slots__ = (
        "blocks", "children", "edge", "expires", "hits", "keys", "last_used", "owner", "parent", "pins", "priority",
        "refs", "space", "value", "_hashes",
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
        self.value = 0.0
        self.pins = 0
        self.expires = math.inf
        self.priority = DEFAULT_PRIORITY
        self.owner: Session | None = None
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
class Session:
    """Requests that belong together, and the nodes that only they have used."""

    name: str
    space: Space
    nodes: set[Node] = field(default_factory=set)
    leases: int = 0
    ended: bool = False


@dataclass(eq=False, slots=True)
class Account:
    """Whose blocks are counted together: those in the tree, without references and pins, with pins, with only these.

    `limit` is the most blocks it may have in the tree.
    """

    name: str = ""
    limit: float = math.inf
    blocks: int = 0
    idle: int = 0
    pinned: int = 0
    pinned_idle: int = 0
    evicted: int = 0
    expired: int = 0
    invalidated: int = 0


@dataclass(eq=False, slots=True)
class Space:
    """The tree of one namespace, and the leases that are computing something new in it.

    Of a namespace, or of the part of it behind a published prompt, whose packed tokens
    are `base`.
    """

    name: str
    root_hash: bytes
    base: bytes = b""
    account: Account = field(default_factory=Account)
    root: Node = field(init=False)
    computing: set[Any] = field(default_factory=set)  # the cache's leases
    sessions: dict[str, Session] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root = Node(self, None, b"", [])

    @property
    def key(self) -> SpaceKey:
        return (self.name, self.base) if self.base else self.name


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
        self.total = Account()
        """Counts over all namespaces."""

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
        upper.pins = 1 if node.pins else 0
        upper.expires = node.expires
        upper.priority = node.priority
        if node.owner is not None:
            upper.owner = node.owner
            node.owner.nodes.add(upper)
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
        self._count(parent.space, len(blocks), len(blocks))
        return node

    def grow(self, node: Node, edge: bytes, blocks: list[int]) -> None:
        """Append to the edge of a referenced leaf without pins."""
        assert node.refs and not node.pins and not node.children and len(node.edge) % self.block_bytes == 0
        node.edge += edge
        node.blocks = node.blocks + blocks
        self._count(node.space, len(blocks), 0)

    def trim(self, leaf: Node, count: int) -> list[int]:
        """Take the last `count` blocks off an unreferenced leaf, removing it if none is left."""
        assert self.evictable(leaf) and 0 < count <= len(leaf.blocks)
        keep = len(leaf.blocks) - count
        removed = leaf.blocks[keep:]
        self._count(leaf.space, -count, -count)
        if keep:
            leaf.edge = leaf.edge[: keep * self.block_bytes]
            leaf.blocks = leaf.blocks[:keep]
            leaf._hashes = leaf._hashes[: keep * HASH_BYTES]
        else:
            self._unlink(leaf)
        return removed

    def cut(self, top: Node) -> tuple[list[int], int]:
        """Cut a node and all below it off, none of it pinned: it is not found or added to any more.

        Returns the blocks nobody uses, which are no longer the tree's, and how many
        are still in use; those leave as their references do (see `release`). The
        parent loses the reference it has if `top` has any: whoever holds a lease in
        there must hold the parent before.
        """
        assert not top.pins
        unused: list[int] = []
        blocks = in_use = 0
        space, parent = top.space, top.parent
        for node in [top, *self.nodes(top)]:
            node.space = None
            blocks += len(node.blocks)
            if node.refs:
                in_use += len(node.blocks)
            else:
                unused += node.blocks
            if node.owner is not None:
                self._disown(node)
        self._count(space, -blocks, -len(unused))
        if parent is not None:
            self._detach(top, parent)
            if top.refs:
                self.release(parent)
        return unused, in_use

    def _unlink(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        self._detach(node, parent)
        parent.last_used = max(parent.last_used, node.last_used)
        parent.priority = max(parent.priority, node.priority)
        parent.hits += node.hits
        parent.value += node.value
        node.space = None
        if node.owner is not None:
            self._disown(node)

    def _detach(self, node: Node, parent: Node) -> None:
        key = node.edge[: self.block_bytes]
        del parent.children[key]
        del parent.keys[bisect_left(parent.keys, key)]
        node.parent = None

    @staticmethod
    def _disown(node: Node) -> None:
        assert node.owner is not None
        node.owner.nodes.discard(node)
        node.owner = None

    def _count(self, space: Space | None, blocks: int, idle: int) -> None:
        """Add blocks to the counts of all, and of the account that they belong to."""
        assert space is not None
        total, account = self.total, space.account
        total.blocks += blocks
        account.blocks += blocks
        total.idle += idle
        account.idle += idle

    def _count_pins(self, space: Space | None, pinned: int, idle: int) -> None:
        """Count blocks as pinned, some of which have no references."""
        assert space is not None
        for account in (self.total, space.account):
            account.pinned += pinned
            account.pinned_idle += idle
            account.idle -= idle

    # References

    @staticmethod
    def evictable(node: Node) -> bool:
        """Whether a node is an unused leaf of the tree."""
        return not (node.refs or node.pins or node.children or node.parent is None or node.space is None)

    def acquire(self, node: Node) -> None:
        """Add a reference to a node of the tree."""
        step: Node | None = node
        idle = pinned = 0
        while step is not None:
            step.refs += 1
            if step.refs > 1:
                break
            if step.pins:
                pinned += len(step.blocks)
            else:
                idle += len(step.blocks)
            step = step.parent
        if idle or pinned:
            assert node.space is not None
            total, account = self.total, node.space.account
            total.idle -= idle
            account.idle -= idle
            if pinned:
                total.pinned_idle -= pinned
                account.pinned_idle -= pinned

    def release(self, node: Node) -> tuple[Node | None, list[int]]:
        """Drop a reference of a node.

        Returns the node if it is now an unreferenced leaf of the tree (None if not),
        and the blocks of cut-off nodes that lost their last reference.
        """
        assert node.refs > 0
        unused: list[int] = []
        attached = node.space is not None
        idle = pinned = 0
        step: Node | None = node
        while step is not None:
            step.refs -= 1
            if step.refs:
                break
            if not attached:
                unused += step.blocks
            elif step.pins:
                pinned += len(step.blocks)
            else:
                idle += len(step.blocks)
            step = step.parent
        if idle or pinned:
            assert node.space is not None
            total, account = self.total, node.space.account
            total.idle += idle
            account.idle += idle
            if pinned:
                total.pinned_idle += pinned
                account.pinned_idle += pinned
        return (node if self.evictable(node) else None), unused

    def pin(self, node: Node) -> None:
        """Add a pin to a node of the tree."""
        step: Node | None = node
        pinned = idle = 0
        while step is not None:
            step.pins += 1
            if step.pins > 1:
                break
            pinned += len(step.blocks)
            if not step.refs:
                idle += len(step.blocks)
            step = step.parent
        self._count_pins(node.space, pinned, idle)

    def unpin(self, node: Node) -> list[Node]:
        """Drop a pin of a node; returns the nodes that have none left."""
        assert node.pins > 0
        free: list[Node] = []
        pinned = idle = 0
        step: Node | None = node
        while step is not None:
            step.pins -= 1
            if step.pins:
                break
            free.append(step)
            pinned += len(step.blocks)
            if not step.refs:
                idle += len(step.blocks)
            step = step.parent
        self._count_pins(node.space, -pinned, -idle)
        return free
