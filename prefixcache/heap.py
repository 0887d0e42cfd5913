"""A heap whose items can be moved and taken out.

Both leave the old entry in the heap, to be dropped when it comes up; when half of the
entries are such, the heap is built anew. So everything costs O(log n), spread over the
calls, and no item is kept alive for long after it was taken out.
"""

from __future__ import annotations

import heapq
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


class Heap(Generic[Item]):
    """Items in the order of their keys; of equal keys, the first in is the first out."""

    def __init__(self) -> None:
        self._entries: list[tuple[Any, int, Item]] = []
        self._current: dict[Item, int] = {}  # the number of an item's valid entry
        self._pushed = 0

    def push(self, key: Any, item: Item) -> None:
        """Add an item, or move it to another key."""
        self._pushed = number = self._pushed + 1
        self._current[item] = number
        heapq.heappush(self._entries, (key, number, item))
        if len(self._entries) > 2 * len(self._current) + 16:
            self._compact()

    def discard(self, item: Item) -> None:
        """Take an item out, if it is in."""
        if self._current.pop(item, None) is not None and len(self._entries) > 2 * len(self._current) + 16:
            self._compact()

    def first(self) -> tuple[Any, Item] | None:
        """Return the lowest key and its item, which stays in; None if there is none."""
        while self._entries:
            key, number, item = self._entries[0]
            if self._current.get(item) == number:
                return key, item
            heapq.heappop(self._entries)
        return None

    def pop(self) -> tuple[Any, Item] | None:
        """Take out the item with the lowest key, or return None if there is none."""
        current = self._current
        while self._entries:
            key, number, item = heapq.heappop(self._entries)
            if current.get(item) == number:
                del current[item]
                return key, item
        return None

    def __contains__(self, item: Item) -> bool:
        return item in self._current

    def __len__(self) -> int:
        return len(self._current)

    def _compact(self) -> None:
        self._entries = [entry for entry in self._entries if self._current.get(entry[2]) == entry[1]]
        heapq.heapify(self._entries)
