"""The names of blocks: hashes that say the same in every process with the same model and the same secret."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from prefixcache.tokens import HASH_BYTES, TOKEN_BYTES, chain_hashes, root_hash


@dataclass(frozen=True, slots=True)
class BlockNames:
    """How blocks of `block_size` tokens are named.

    `fingerprint` is what computes them (model, dtype, tokenizer), `secret` the
    deployment's: without it nobody can tell which tokens a hash stands for by trying.
    `shared` is the namespace of published prompts.
    """

    fingerprint: bytes
    secret: bytes = field(repr=False)
    block_size: int
    shared: str = "published"

    @property
    def block_bytes(self) -> int:
        return self.block_size * TOKEN_BYTES

    def root(self, namespace: str) -> bytes:
        """Return what the chains of a namespace start from."""
        return root_hash(self.fingerprint, self.secret, namespace.encode(), str(self.block_size).encode())

    def behind(self, namespace: str, base: bytes) -> bytes:
        """Return what the chains of a namespace start from behind a published prompt (packed, whole blocks)."""
        end = chain_hashes(self.root(self.shared), base, self.block_bytes)[-HASH_BYTES:]
        return root_hash(self.root(namespace), end)

    def of(self, packed: bytes, namespace: str, published: Iterable[bytes] = ()) -> bytes:
        """Return the hashes of the whole blocks of a packed prompt that a request could reuse, 16 bytes each.

        That is all but the last token, which is always computed. A prompt that begins with
        a `published` one is named as the cache does it: the beginning is everybody's.
        """
        whole = (len(packed) - TOKEN_BYTES) // self.block_bytes * self.block_bytes
        base = max((prompt for prompt in published if packed[:whole].startswith(prompt)), key=len, default=b"")
        if not base:
            return chain_hashes(self.root(namespace), packed[:whole], self.block_bytes)
        shared = chain_hashes(self.root(self.shared), base, self.block_bytes)
        own = root_hash(self.root(namespace), shared[-HASH_BYTES:])
        return shared + chain_hashes(own, packed[len(base) : whole], self.block_bytes)
