"""What a match hands out, and what is said of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from prefixcache.reasons import MissReason
from prefixcache.terms import Terms
from prefixcache.tree import Node, Session, Space

if TYPE_CHECKING:
    from prefixcache.cache import PrefixCache


class OutOfBlocks(Exception):
    """Not enough blocks are free or evictable. Nothing was changed."""


class BlockSource(NamedTuple):
    """A block whose first `tokens` slots a lease wants copied into its own first block."""

    block: int
    tokens: int


class Found(NamedTuple):
    """What is cached of a prompt, why not more, and the token position where its path ends.

    `alternative` is the length in tokens of the nearest cached path that goes on
    differently, 0 if there is none or nobody asked.
    """

    cached_tokens: int
    reason: MissReason
    position: int
    alternative: int = 0


@dataclass(frozen=True, slots=True)
class Stored:
    """Blocks became matchable. `parent` is the hash before them; hashes are 16 bytes each, joined."""

    sequence: int
    namespace: str
    parent: bytes
    hashes: bytes


@dataclass(frozen=True, slots=True)
class Removed:
    """Blocks are no longer matchable; the deepest comes first."""

    sequence: int
    namespace: str
    hashes: bytes


CacheEvent = Stored | Removed


class Lease:
    """A held prefix and the blocks computed after it.

    `blocks` is the sequence's block table: the first `shared` are the tree's, the
    rest are the lease's own. `cached_tokens` of the prompt need not be computed;
    those that go beyond the shared blocks come from `source`, whose block must be
    copied into the first own block before it is used. `reason` and `position` say
    why no more is cached. `stored` counts the tokens it has added to the tree. The first
    `base` blocks are those of a published prompt.
    """

    __slots__ = (
        "_barred", "_base", "_cache", "_held", "_prompt", "_source_node", "_target", "base", "blocks",
        "cached_tokens", "expires", "node", "position", "reason", "session", "shared", "source", "space", "stored",
        "terms",
    )  # fmt: skip

    def __init__(
        self, cache: PrefixCache, space: Space, node: Node, blocks: list[int], found: Found, terms: Terms
    ) -> None:
        self._cache: PrefixCache | None = cache
        self._source_node: Node | None = None
        self._prompt = b""
        self._target = b""
        self._barred = False
        self._base: Lease | None = None
        self.base = 0
        self._held: list[Node] = []  # where the path now ends in the tree, for each time that its end was cut off
        self.space = space
        self.node = node
        self.blocks = blocks
        self.shared = len(blocks)
        self.source: BlockSource | None = None
        self.cached_tokens, self.reason, self.position, _ = found
        self.terms = terms
        self.expires = cache.expiry_of(terms)
        self.session: Session | None = None
        self.stored = 0

    @property
    def released(self) -> bool:
        return self._cache is None

    @property
    def detached(self) -> bool:
        """Whether the prefix has been removed: it can be used to the end, but nothing can be added to it."""
        return self._barred or self.node.space is None

    @property
    def in_tree(self) -> int:
        """How many of its blocks, from the first, the tree has."""
        step: Node | None = next((node for node in (self.node, *self._held) if node.space is not None), None)
        count = self.base
        while step is not None:
            count += len(step.blocks)
            step = step.parent
        return count

    def stand_on(self, base: Lease) -> None:
        """Put the blocks of a published prompt, which `base` holds, in front of what matched behind it."""
        self._base = base
        self.base = len(base.blocks)
        self.blocks[:0] = base.blocks
        self.shared += self.base
        self.cached_tokens += base.cached_tokens
        self.position += base.cached_tokens
        if self.reason is MissReason.TOO_SHORT:
            self.reason = MissReason.NONE

    def copied(self) -> None:
        """The source block has been copied and need not be held any longer. Idempotent."""
        if self._cache is not None:
            self._cache._drop_source(self)

    def forgo_source(self) -> None:
        """Do without the partly matching block, so that nothing of it need be held."""
        if self.source is not None:
            self.cached_tokens -= self.source.tokens
            self.position = self.cached_tokens
            self.reason = MissReason.EVICTED
            self.source = None
            self.copied()

    def release(self, tail: bytes = b"") -> None:
        """Let everything go; a second call does nothing.

        `tail` is the packed tokens of the partly filled block behind the shared ones,
        if its keys and values are computed and may be kept for exact repeats.
        """
        if self._cache is not None:
            cache, self._cache = self._cache, None
            cache._release(self, tail)
