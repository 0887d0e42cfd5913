"""Packing, comparing and hashing of tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixcache.errors import InvalidArgument
from prefixcache.tokens import HASH_BYTES, TOKEN_BYTES, chain_hashes, common_tokens, pack, root_hash, unpack

token_ids = st.lists(st.integers(0, 2**32 - 1), max_size=40)
few_ids = st.lists(st.sampled_from([0, 1, 256, 2**24, 2**32 - 1]), max_size=20)


def test_tokens_are_packed_little_endian_four_bytes_each() -> None:
    """The layout is part of the hashes, so it is fixed."""
    assert pack([1, 256, 2**32 - 1]) == b"\x01\0\0\0" + b"\0\x01\0\0" + b"\xff\xff\xff\xff"
    assert pack([]) == b""


@given(token_ids)
def test_unpack_returns_what_was_packed(ids: list[int]) -> None:
    """Packing loses nothing, for every id that fits."""
    packed = pack(ids)
    assert len(packed) == len(ids) * TOKEN_BYTES
    assert unpack(packed) == ids


@pytest.mark.parametrize("ids", [[-1], [2**32], [1.5], ["a"], "abc", [None]])
def test_what_is_no_token_id_is_refused(ids: list[int]) -> None:
    """Callers' mistakes are InvalidArgument, with the range in the message."""
    with pytest.raises(InvalidArgument, match="0 to 4294967295"):
        pack(ids)


@given(few_ids, few_ids)
def test_common_tokens_counts_equal_leading_tokens(a: list[int], b: list[int]) -> None:
    """Whole tokens count, however many bytes of the next one agree."""
    expected = 0
    while expected < min(len(a), len(b)) and a[expected] == b[expected]:
        expected += 1
    assert common_tokens(pack(a), pack(b)) == expected


def test_tokens_that_differ_only_in_their_last_byte_differ() -> None:
    """Three equal bytes of four are no equal token."""
    assert common_tokens(pack([5, 1]), pack([5, 1 + 2**24])) == 1


@given(st.binary(max_size=8), token_ids, st.integers(1, 5), st.integers(0, 6))
def test_a_chain_can_be_hashed_in_pieces(parent: bytes, ids: list[int], block: int, cut: int) -> None:
    """Continuing from the last hash of a first piece gives the hashes of the whole."""
    size = block * TOKEN_BYTES
    packed = pack(ids)
    first = packed[: cut * size]
    head = chain_hashes(parent, first, size)
    tail = chain_hashes(head[-HASH_BYTES:] or parent, packed[len(first) :], size)
    assert head + tail == chain_hashes(parent, packed, size)
    assert len(head + tail) == -(-len(packed) // size) * HASH_BYTES


def test_a_hash_depends_on_everything_before_it() -> None:
    """Equal blocks behind different parents have different hashes."""
    a = chain_hashes(b"root", pack([1, 2, 9, 9]), 8)
    b = chain_hashes(b"root", pack([1, 3, 9, 9]), 8)
    assert a[HASH_BYTES:] != b[HASH_BYTES:]
    assert chain_hashes(b"other", pack([1, 2]), 8) != a[:HASH_BYTES]


def test_fields_of_a_root_hash_do_not_run_together() -> None:
    """A namespace cannot be chosen so that it looks like another field."""
    lists = [(b"ab", b"c"), (b"a", b"bc"), (b"abc",), (b"abc", b""), (b"", b"abc"), ()]
    assert len({root_hash(*fields) for fields in lists}) == len(lists)


def test_hashes_are_those_of_every_other_machine() -> None:
    """Pinned: changing them makes every hint and every stored block of a deployment worthless."""
    root = root_hash(b"model", b"secret", b"tenant", b"16")
    assert root.hex() == "470ff7cd31f788c098f5a89693a56956"
    assert chain_hashes(root, pack(range(20)), 64).hex() == (
        "f71aacbd2f4910afbc71d319181b393fa9fa8b310d9fcb07cb7c767d977c5965"
    )
