"""What a prefix cache would have made of prompts that come one after another: the real one, with no model behind it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from prefixcache.cache import PrefixCache
from prefixcache.tokens import TOKEN_BYTES


class Outcome(NamedTuple):
    """Prompt tokens, and how many of them were found in the cache."""

    tokens: int
    cached: int

    @property
    def computed(self) -> int:
        return self.tokens - self.cached

    @property
    def share(self) -> float:
        return self.cached / self.tokens if self.tokens else 0.0


def simulate(prompts: Iterable[tuple[str, bytes]], block_size: int, blocks: int | None = None) -> Outcome:
    """Send (namespace, packed tokens) through an empty cache of `blocks` blocks, or one in which all have room.

    A prompt that is longer than the cache is counted and not kept.
    """
    entries = list(prompts)
    block_bytes = block_size * TOKEN_BYTES
    if blocks is None:
        blocks = sum(-(-len(packed) // block_bytes) for _, packed in entries) + 1
    cache = PrefixCache(blocks, block_size)
    tokens = cached = 0
    for namespace, packed in entries:
        tokens += len(packed) // TOKEN_BYTES
        needed = -(-len(packed) // block_bytes)
        if not packed or needed > blocks:
            continue
        lease = cache.match(packed, namespace)
        cached += lease.cached_tokens
        if needed - lease.shared > cache.available_blocks:
            lease.forgo_source()
        cache.allocate(lease, needed - lease.shared)
        lease.copied()
        whole = len(packed) // block_bytes * block_bytes
        cache.commit(lease, packed[lease.shared * block_bytes : whole])
        lease.release(packed[whole:])
    return Outcome(tokens, cached)
