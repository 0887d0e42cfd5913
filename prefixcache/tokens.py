"""Token ids as packed bytes, and the chained hashes that name blocks to strangers.

A sequence of token ids is packed once into little-endian unsigned 32-bit integers;
from then on prefixes are compared with memcmp, never token by token.

A block's hash covers everything that must agree before its keys and values may be
used: the model (through the fingerprint), the namespace, and all tokens up to the
block's end (through the parent's hash). It depends on nothing else: not on the
process, the machine or PYTHONHASHSEED.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable

from xxhash import xxh3_128_digest

from prefixcache.errors import InvalidArgument

TOKEN_BYTES = 4
HASH_BYTES = 16


def pack(ids: Iterable[int]) -> bytes:
    """Return token ids as little-endian uint32 bytes, 4 per token.

    Raises InvalidArgument if one is not an integer from 0 to 2**32 - 1.
    """
    assert not isinstance(ids, bytes | bytearray), "bytes are packed already"
    try:
        packed = array("I", ids)
    except (OverflowError, TypeError) as error:
        raise InvalidArgument(f"token ids must be integers from 0 to 4294967295: {error}") from None
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack(packed: bytes) -> list[int]:
    """Return the token ids that `pack` was given."""
    ids = array("I", packed)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tolist()


def common_tokens(a: bytes, b: bytes) -> int:
    """Return how many leading tokens two packed sequences share. Linear; meant for single blocks."""
    length = min(len(a), len(b))
    difference = int.from_bytes(a[:length], "little") ^ int.from_bytes(b[:length], "little")
    if not difference:
        return length // TOKEN_BYTES
    return ((difference & -difference).bit_length() - 1) // (8 * TOKEN_BYTES)


def root_hash(*fields: bytes) -> bytes:
    """Return the hash that a chain starts from.

    Fields are length-prefixed, so that no two different lists of fields collide.
    """
    return xxh3_128_digest(b"".join(len(field).to_bytes(8, "little") + field for field in fields))


def chain_hashes(parent: bytes, packed: bytes, block_bytes: int) -> bytes:
    """Return the hashes of consecutive blocks, 16 bytes each, joined.

    `parent` is the hash of the block before (or the root hash). A last block that is
    only partly filled is hashed as it is. About 18 ns per token at 16 tokens a block.
    """
    starts = range(0, len(packed), block_bytes)
    return b"".join([parent := xxh3_128_digest(parent + packed[start : start + block_bytes]) for start in starts])
