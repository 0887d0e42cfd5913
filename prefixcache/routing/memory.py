"""What was sent to a replica lately, as a guess of what it holds.

Names of blocks are the first 8 bytes of their hashes, as integers: a prompt is taken in
and looked up without a step of Python per block.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence

Names = Sequence[int]


def names_of(hashes: bytes) -> Names:
    """Return the names of blocks from their hashes, 16 bytes each, joined."""
    return array("Q", hashes)[::2]


def leading(names: Names, known: Callable[[int], bool]) -> int:
    """Return how many names, from the first, are known, by halving: whatever is known is a beginning of its prompt."""
    if not names or not known(names[0]):
        return 0
    return bisect_left(range(len(names)), True, key=lambda at: not known(names[at]))


def shared(a: Names, b: Names) -> int:
    """Return how many leading blocks two prompts share; equal names at one place mean equal names before it."""
    return bisect_left(range(min(len(a), len(b))), True, key=lambda at: a[at] != b[at])


class Memory:
    """Blocks of the prompts sent to one replica, each with the time when it was last sent; at most `blocks` of them.

    They are in two generations: when the younger one is full it becomes the older one, and
    what was older is forgotten. A prompt enters as a whole, so that each generation is made
    of beginnings, and times never grow along a prompt. About 120 bytes per block.
    """

    __slots__ = ("_half", "_old", "_young")

    def __init__(self, blocks: int) -> None:
        self._half = max(blocks // 2, 1)
        self._young: dict[int, float] = {}
        self._old: dict[int, float] = {}

    def __len__(self) -> int:
        """How many blocks are remembered; one in both generations counts twice."""
        return len(self._young) + len(self._old)

    def add(self, names: Names, now: float) -> None:
        """A prompt was sent. `now` never goes back. Of one longer than a generation, the beginning is kept."""
        if len(names) > self._half:
            names = names[: self._half]
        if len(self._young) + len(names) > self._half:
            self._young, self._old = {}, self._young
        self._young.update(dict.fromkeys(names, now))

    def leading(self, names: Names, since: float = -math.inf) -> int:
        """Return how many blocks of a prompt, from the first, were sent at `since` or later."""
        young, old = self._young.get, self._old.get

        def known(name: int) -> bool:
            sent = young(name)
            if sent is None:
                sent = old(name)
            return sent is not None and sent >= since

        return leading(names, known)
