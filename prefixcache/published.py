"""Prompts that every account may begin with, while what follows stays its own.

A published prompt is pinned in a namespace that is nobody's. A prompt that begins with
one is in two parts: the beginning is matched there, the rest in a space of the caller's
own that belongs to this beginning. So the blocks of the beginning are shared by all,
and nothing behind it is seen by anybody else.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from prefixcache.store import Store
from prefixcache.tokens import TOKEN_BYTES
from prefixcache.tree import SpaceKey


class Parts(NamedTuple):
    """A prompt's published beginning, and the rest with the key of the space that it belongs to."""

    base: bytes
    rest: bytes
    space: SpaceKey


class Published(Store):
    """Adds published beginnings to a `Store`. None of its work is done while nothing is published."""

    def parts(self, packed: bytes, namespace: str) -> Parts:
        """Divide a packed prompt behind the longest published prompt it begins with and goes on from.

        Not if more of it is cached in the namespace itself, from before the publication.
        """
        base = b""
        if self._published and namespace != self.shared_namespace:
            for published in self._published.values():
                longer = len(base) < len(published) < len(packed)
                if longer and packed.startswith(published) and self._holds(published):
                    base = published
        if not base:
            return Parts(b"", packed, namespace)
        parts = Parts(base, packed[len(base) :], (namespace, base))
        whole = self._matched(packed, namespace)
        divided = whole > len(base) and len(base) + self._matched(parts.rest, parts.space)
        return Parts(b"", packed, namespace) if whole > max(divided, len(base)) else parts

    @property
    def published(self) -> Collection[bytes]:
        """The published prompts, packed. On any thread: they are replaced, never changed."""
        return self._published.values()

    def _withdraw(self, name: str) -> None:
        self._published = {other: prompt for other, prompt in self._published.items() if other != name}

    def _matched(self, packed: bytes, key: SpaceKey) -> int:
        """Return how many bytes of a prompt, in whole blocks, a space has."""
        space = self._spaces.get(key)
        return 0 if space is None else self._tree.find(space.root, packed, len(packed) - TOKEN_BYTES).offset

    def _holds(self, published: bytes) -> bool:
        """Whether a published prompt is still there, and not invalidated."""
        return self._matched(published + bytes(TOKEN_BYTES), self.shared_namespace) == len(published)

    def _family(self, namespace: str) -> list[SpaceKey]:
        """Return the keys of a namespace's spaces: its own, and those behind published prompts."""
        return [key for key, space in self._spaces.items() if space.name == namespace]
