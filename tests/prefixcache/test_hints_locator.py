"""A reader's side of the hints: what it finds, beside a plain search; and that nobody waits for Redis."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefixcache.hints import locator as locator_module
from prefixcache.hints.connection import NoHints
from prefixcache.hints.locator import Locator
from prefixcache.hints.schema import NO_STATE, Group, Keys, Lease, Load
from prefixcache.hints.table import Table
from tests.prefixcache.replica import GROUP, Replica, chain, each
from tests.redis import Line, RedisServer
from tests.waiting import until

PATIENT = 10.0
KEYS = Keys()


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture
def client(server: RedisServer) -> Iterator[redis.Redis]:
    with server.client() as connected:
        connected.flushall()
        yield connected


def leases(*names: str) -> list[Lease]:
    return [Lease(name, name.rjust(16, "0"), "h:1", "m", 16, 100, Load()) for name in names]


async def locate(url: str, hashes: bytes, *names: str) -> dict[str, int]:
    found = Locator(url, timeout=PATIENT)
    try:
        return await found.find(GROUP, hashes, leases(*names))
    finally:
        await found.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(prompts=st.integers(1, 12), longest=st.integers(1, 120), owners=st.integers(1, 6), seed=st.integers(0, 1 << 32))
def test_a_lookup_finds_what_a_plain_search_finds(
    server: RedisServer, client: redis.Redis, prompts: int, longest: int, owners: int, seed: int
) -> None:
    """Of owners with as much as they have room for, after much was stored and removed; prompts branch off others."""
    dice = random.Random(seed)
    chains: list[list[bytes]] = []
    for _ in range(prompts):
        base = dice.choice(chains)[: dice.randrange(longest)] if chains and dice.random() < 0.7 else []
        chains.append(base + each(dice.randbytes(16 * dice.randint(1, longest))))
    names = [f"owner-{number}" for number in range(owners)]
    held: dict[str, set[bytes]] = {}
    room = sum(map(len, chains))
    for name in names:
        table, mine, others = Table(room), set[bytes](), b""
        for _ in range(4):
            table.discard(b"".join(mine) + others)
            mine = set()
            for blocks in chains:
                mine.update(blocks[: dice.choice([0, len(blocks), dice.randint(0, len(blocks))])])
            others = dice.randbytes(16 * (room - len(mine)))
            table.add(b"".join(mine))
            table.add(others)
        assert table.overflows == 0
        client.set(KEYS.table(GROUP, name, name.rjust(16, "0")), NO_STATE + table.data)
        held[name] = mine

    async def compare() -> None:
        reader = Locator(server.url, timeout=PATIENT)
        try:
            for blocks in chains:
                found = await reader.find(GROUP, b"".join(blocks), leases(*names))
                assert found == {name: _leading(blocks, held[name]) for name in names}
        finally:
            await reader.close()

    asyncio.run(compare())


def _leading(blocks: list[bytes], held: set[bytes]) -> int:
    return next((number for number, block in enumerate(blocks) if block not in held), len(blocks))


async def test_every_length_is_found_in_a_chain(server: RedisServer, client: redis.Redis) -> None:
    """From nothing to all of it, whoever is asked first."""
    blocks = each(chain(1, 33))
    tables = {str(length): Table(40) for length in range(34)}
    for name, table in tables.items():
        table.add(b"".join(blocks[: int(name)]))
        client.set(KEYS.table(GROUP, name, name.rjust(16, "0")), NO_STATE + table.data)
    names = list(tables)
    for order in (names, names[::-1], random.Random(1).sample(names, 34)):
        assert await locate(server.url, chain(1, 33), *order) == {name: int(name) for name in order}


async def test_nothing_is_said_of_whom_nothing_is_known(server: RedisServer, client: redis.Redis) -> None:
    """A replica without a table, one that is damaged, nobody to ask about; a prompt without blocks is held nowhere."""
    client.set(KEYS.table(GROUP, "b", "b".rjust(16, "0")), b"short")
    client.set(KEYS.table(GROUP, "c", "c".rjust(16, "0")), NO_STATE + Table(10).data)
    assert await locate(server.url, chain(1), "a", "b", "c") == {"c": 0}
    assert await locate(server.url, b"", "a") == {"a": 0}
    assert await locate(server.url, chain(1)) == {}


async def test_replicas_and_their_groups_are_listed(server: RedisServer, client: redis.Redis) -> None:
    """Those with a live lease, by id; groups that are of no interest any more, or no groups, are left out."""
    later = time.time() * 2000
    client.zadd(KEYS.groups, {b"old:abc:16": 1.0, b"nonsense": later, b"\xff": later})
    client.hset(KEYS.replicas(GROUP), "dead", b"%013d" % 1000 + b"n" * 16 + b"{}")
    client.hset(KEYS.replicas(GROUP), "broken", "?")
    reader = Locator(server.url, timeout=PATIENT)
    with Replica(server.url, "b") as b, Replica(server.url, "a") as a:
        until(lambda: a.publisher.status.current and b.publisher.status.current)
        found = await reader.leases(GROUP)
        assert [lease.replica_id for lease in found] == ["a", "b"]
        assert await reader.groups() == [GROUP]
        assert await reader.leases(Group("other", "ab", 16)) == []
    assert await reader.leases(GROUP) == []
    await reader.close()


async def test_a_prefix_keeps_deployments_apart(server: RedisServer, client: redis.Redis) -> None:
    """Every key begins with it, so readers with another one see nothing."""
    with Replica(server.url, prefix="mine:") as replica:
        replica.store(chain(1))
        until(lambda: replica.is_complete(client, "mine:"))
        assert all(key.startswith(b"mine:") for key in client.scan_iter())
        mine, others = Locator(server.url, prefix="mine:", timeout=PATIENT), Locator(server.url, timeout=PATIENT)
        found = await mine.find(GROUP, chain(1), await mine.leases(GROUP))
        assert found == {"a": 300}
        assert await others.groups() == []
        await mine.close()
        await others.close()


async def test_the_statements_of_a_lost_lease_are_not_found(server: RedisServer, client: redis.Redis) -> None:
    """A reader asks about the nonce in the lease, and the table of another one is not even looked at."""
    with Replica(server.url) as replica:
        replica.store(chain(1))
        until(lambda: replica.is_complete(client))
        reader = Locator(server.url, timeout=PATIENT)
        live = await reader.leases(GROUP)
        client.set(KEYS.table(GROUP, "a", "f" * 16), NO_STATE + Table(10).data)
        assert await reader.find(GROUP, chain(1), live) == {"a": 300}
        old = leases("a")
        assert await reader.find(GROUP, chain(1), old) == {}
        await reader.close()


# When Redis cannot be asked


async def test_lookups_are_not_tried_again_for_a_while_after_a_failure() -> None:
    """The first pays the time that it may take, the others raise at once; and it is found again when it is back."""
    with RedisServer() as server, server.client() as client, Replica(server.url) as replica:
        replica.store(chain(1))
        until(lambda: replica.is_complete(client))
        reader = Locator(server.url)
        live = leases("a")
        server.pause()
        with pytest.raises(NoHints, match="does not answer within 30 ms"):
            await reader.find(GROUP, chain(1), live)
        assert len(reader._calls) == 1
        for _ in range(100):
            with pytest.raises(NoHints, match="does not answer within 30 ms"):
                await reader.find(GROUP, chain(1), live)
        assert len(reader._calls) == 1  # nobody else has asked
        with pytest.raises(NoHints):
            await reader.leases(GROUP)  # asks, whatever was before
        server.resume()
        end = time.monotonic() + 30
        found: dict[str, int] = {}
        while not found and time.monotonic() < end:
            try:
                found = await reader.find(GROUP, chain(1), await reader.leases(GROUP))
            except NoHints:
                await asyncio.sleep(0.01)
        assert found == {"a": 300}
        await reader.close()


async def test_a_connection_slower_than_the_budget_is_made_behind_the_callers_back(
    server: RedisServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lookup gives up when its time is over, but what it has begun goes on and serves the next one."""
    monkeypatch.setattr(locator_module, "PAUSE_SECONDS", 0.0)
    with Line(server.port) as line:
        line.delay = 0.6
        reader = Locator(f"redis://127.0.0.1:{line.port}", timeout=0.2)
        with pytest.raises(NoHints):
            await reader.find(GROUP, chain(1), leases("a"))
        await asyncio.gather(*reader._calls)
        line.delay = 0.0
        assert await reader.find(GROUP, chain(1), leases("a")) == {}
        assert line.connections == 1
        await reader.close()


async def test_a_caller_may_give_up(server: RedisServer, client: redis.Redis) -> None:
    """A lookup that is cancelled leaves nothing behind that disturbs others, and closing ends what still goes on."""
    with Line(server.port) as line:
        line.delay = 0.5
        reader = Locator(f"redis://127.0.0.1:{line.port}", timeout=PATIENT)
        asking = [asyncio.create_task(reader.find(GROUP, chain(1), leases("a"))) for _ in range(40)]
        while len(reader._calls) < locator_module.MAX_CALLS:
            await asyncio.sleep(0)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await reader.close()
        assert not reader._calls


async def test_many_lookups_at_a_time_are_all_answered(server: RedisServer, client: redis.Redis) -> None:
    """Over a bounded number of connections."""
    table = Table(300)
    table.add(chain(1))
    client.set(KEYS.table(GROUP, "a", "a".rjust(16, "0")), NO_STATE + table.data)
    reader = Locator(server.url, timeout=PATIENT)
    before = client.info("clients")["connected_clients"]
    found = await asyncio.gather(*[reader.find(GROUP, chain(1), leases("a")) for _ in range(300)])
    assert found == [{"a": 300}] * 300
    after = client.info("clients")["connected_clients"]
    assert after - before <= locator_module.MAX_CALLS
    await reader.close()


async def test_what_is_wrong_is_said() -> None:
    """In words that say what to do, without the password."""
    with RedisServer("--requirepass", "right") as server:
        for url, words in (
            (server.url, "asks for a password"),
            (f"redis://:wrong@127.0.0.1:{server.port}", "refuses this user name and password"),
            ("unix:///nowhere/redis.sock", "no such socket"),
        ):
            reader = Locator(url, timeout=PATIENT)
            with pytest.raises(NoHints, match=words) as caught:
                await reader.leases(GROUP)
            assert "wrong" not in str(caught.value)
            await reader.close()
    reader = Locator(server.url, timeout=PATIENT)
    with pytest.raises(NoHints, match="refuses connections"):
        await reader.find(GROUP, chain(1), leases("a"))
    await reader.close()
