"""What a test finds in Redis about a server, and what that server has cached."""

from __future__ import annotations

from pathlib import Path

from redis import Redis

from prefixcache.hints.schema import DEFAULT_PREFIX, STATE_BYTES, Group, Keys, Lease
from prefixcache.hints.table import MARK_BYTES, Table
from prefixcache.tokens import HASH_BYTES
from tests.engine.serving import BLOCK, FINGERPRINT, RunningServer
from tests.redis import RedisServer

GROUP = Group("main", FINGERPRINT, BLOCK)


def secret_file(directory: Path, secret: str = "kept among the replicas") -> str:
    """Write a deployment's secret and return the file's name."""
    path = directory / f"{secret}.secret"
    path.touch(mode=0o600)
    path.write_text(secret + "\n")
    return str(path)


def leases(redis: RedisServer, group: Group = GROUP) -> dict[str, Lease]:
    """Return the live leases of a group by replica id."""
    with Redis(port=redis.port) as client:
        seconds, microseconds = client.time()
        now = seconds * 1000 + microseconds // 1000
        records: dict[bytes, bytes] = client.hgetall(Keys(DEFAULT_PREFIX).replicas(group))
        found = [Lease.parse(name.decode(), record, now) for name, record in records.items()]
    return {lease.replica_id: lease for lease in found if lease is not None}


def publishes_exactly(redis: RedisServer, server: RunningServer) -> bool:
    """Whether Redis has just the blocks that a server has cached: every one of them, and as many."""
    lease = leases(redis).get(server.server.front.replica_id)
    if lease is None:
        return False
    with Redis(port=redis.port) as client:
        data = client.get(Keys(DEFAULT_PREFIX).table(GROUP, lease.replica_id, lease.nonce))
    if not isinstance(data, bytes):
        return False
    table = Table(lease.blocks)
    table.data = bytearray(data[STATE_BYTES:])
    marks = sum(any(table.data[at : at + MARK_BYTES]) for at in range(0, len(table.data), MARK_BYTES))
    stored = cached(server)
    return marks * HASH_BYTES == len(stored) and all(table.holds(stored))


def cached(server: RunningServer) -> bytes:
    """Return the hashes of all blocks that a server has cached."""
    hashes = server.server.front.engine.loop.call(
        lambda scheduler: b"".join(stored.hashes for stored in scheduler.cache.stored())
    )
    return hashes.result(30)
