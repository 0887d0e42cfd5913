"""Prefixes that are kept from eviction, within a budget of blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from prefixcache.tree import Account, Node, RadixTree, SpaceKey


class Holder(StrEnum):
    """On whose behalf something is pinned; their names do not meet."""

    CALLER = "caller"
    SESSION = "session"


class PinKey(NamedTuple):
    namespace: SpaceKey
    holder: Holder
    name: str


class Limit(StrEnum):
    """Why no more of a prompt is pinned."""

    NOTHING = "nothing"
    NOT_CACHED = "not_cached"
    BUDGET = "budget"


class Pinned(NamedTuple):
    """How many tokens a pin holds, and why not all whole blocks."""

    tokens: int
    limit: Limit


@dataclass(eq=False, slots=True, frozen=True)
class Pin:
    """`tokens` from the beginning of a namespace's tree to `node`; `expires` is on the cache's clock."""

    key: PinKey
    node: Node
    tokens: int
    expires: float
    account: Account


class Pins:
    """All pins."""

    def __init__(self, tree: RadixTree, budget: int) -> None:
        self.budget = budget
        self._tree = tree
        self._pins: dict[PinKey, Pin] = {}

    def room(self, node: Node, depth: int, account: Account, limit: int) -> int:
        """Return how many of the blocks from the root to `depth` blocks into `node` may be pinned.

        `limit` is the most blocks the account's pins may hold, whatever others have.
        """
        on_path = depth
        pinned = depth if node.pins else 0
        step = node.parent
        while step is not None:
            on_path += len(step.blocks)
            pinned += len(step.blocks) if step.pins else 0
            step = step.parent
        left = min(self.budget - self._tree.total.pinned, limit - account.pinned)
        return min(on_path, pinned + max(left, 0))

    def add(self, pin: Pin) -> None:
        """Pin a node of the tree; the key must be free."""
        assert pin.key not in self._pins
        self._pins[pin.key] = pin
        self._tree.pin(pin.node)

    def drop(self, key: PinKey) -> list[Node]:
        """End a pin; returns the nodes that it leaves without any, the deepest first."""
        return self._tree.unpin(self._pins.pop(key).node)

    def under(self, top: Node) -> list[Pin]:
        """Return the pins that end at `top` or below."""
        return [pin for pin in self if is_under(pin.node, top)] if top.pins else []

    def __getitem__(self, key: PinKey) -> Pin:
        return self._pins[key]

    def __contains__(self, key: PinKey) -> bool:
        return key in self._pins

    def __iter__(self) -> Iterator[Pin]:
        return iter(list(self._pins.values()))


def is_under(node: Node, top: Node) -> bool:
    """Whether `node` is `top` or below it."""
    step: Node | None = node
    while step is not None and step is not top:
        step = step.parent
    return step is top
