"""A publisher of hints and, beside it, the truth about what is stored.

`python -m tests.prefixcache.replica URL ID SEED` is one in a process of its own: it stores the blocks
of `chain(SEED)`, says so on a line of its own once they are published, and ends with its
standard input.
"""

from __future__ import annotations

import random
import sys
import threading
from collections import Counter
from typing import Any

import redis

from prefixcache.hints.publisher import Publisher
from prefixcache.hints.schema import STATE_BYTES, Group, Keys, Lease, Load
from prefixcache.hints.table import BUCKET_BYTES, MARK_BYTES, Table
from prefixcache.lease import Removed, Stored
from prefixcache.tokens import HASH_BYTES
from tests.waiting import until

GROUP = Group("main", "9f8e7d6c5b4a3210", 16)
LEASE_SECONDS = 1.0


def chain(seed: int, blocks: int = 300) -> bytes:
    """Return the hashes of a chain of blocks."""
    return random.Random(seed).randbytes(blocks * HASH_BYTES)


def each(hashes: bytes) -> list[bytes]:
    return [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]


class Replica:
    """What an engine would be to its publisher. `load` may be changed at any time."""

    def __init__(self, url: str, replica_id: str = "a", *, blocks: int = 5000, **options: Any) -> None:
        self.replica_id = replica_id
        self.load = Load()
        self.stored: list[bytes] = []
        self.asked = threading.Semaphore(0)
        """Released for each time that the publisher has asked for everything."""
        self.publisher = Publisher(
            url,
            group=GROUP,
            replica_id=replica_id,
            address="replica.example.com:50051",
            model="embedded",
            blocks=blocks,
            load=lambda: self.load,
            resync=self.asked.release,
            **{"lease_seconds": LEASE_SECONDS, **options},
        )

    def __enter__(self) -> Replica:
        self.publisher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.publisher.stop()

    def store(self, hashes: bytes) -> None:
        self.stored.append(hashes)
        self.publisher.heard(Stored(0, "", b"", hashes))

    def remove(self, hashes: bytes) -> None:
        """Remove what was stored as one."""
        self.stored.remove(hashes)
        self.publisher.heard(Removed(0, "", b"".join(reversed(each(hashes)))))

    def restart(self) -> None:
        self.publisher.restart([Stored(0, "", b"", hashes) for hashes in self.stored])

    def lease(self, client: redis.Redis, prefix: str = "prefixcache:") -> Lease | None:
        """Return the lease by which readers see it; None if it has none, or Redis cannot be asked."""
        try:
            record = client.hget(Keys(prefix).replicas(GROUP), self.replica_id)
            seconds, micros = client.time()
        except redis.RedisError:
            return None
        assert isinstance(record, bytes | None)
        return None if record is None else Lease.parse(self.replica_id, record, seconds * 1000 + micros // 1000)

    def is_complete(self, client: redis.Redis, prefix: str = "prefixcache:") -> bool:
        """Whether its table in Redis, under its live lease, has what is stored, and nothing else."""
        lease = self.lease(client, prefix)
        if lease is None:
            return False
        try:
            table = table_of(client, lease, prefix)
        except redis.RedisError:
            return False
        stored = b"".join(self.stored)
        return all(table.holds(stored)) and marks(table.data) == Counter(block[4:8] for block in each(stored))


def table_of(client: redis.Redis, lease: Lease, prefix: str = "prefixcache:") -> Table:
    """Return what Redis has of the replica with a lease; empty if that is nothing."""
    value = client.get(Keys(prefix).table(GROUP, lease.replica_id, lease.nonce)) or b""
    assert isinstance(value, bytes)
    table = Table(0)
    table.data = bytearray(value[STATE_BYTES:])
    table.buckets = len(table.data) // BUCKET_BYTES or 1
    return table


def marks(data: bytes | bytearray) -> Counter[bytes]:
    """Return what is in a table, wherever it lies."""
    slots = (bytes(data[at : at + MARK_BYTES]) for at in range(0, len(data), MARK_BYTES))
    return Counter(mark for mark in slots if any(mark))


def main() -> None:
    url, replica_id, seed = sys.argv[1:]
    with Replica(url, replica_id) as replica:
        replica.store(chain(int(seed)))
        until(lambda: replica.publisher.status.blocks)
        print("published", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
