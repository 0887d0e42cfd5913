"""The events of the cache: complete, in order, to those they belong to, and not for those who do not read them."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from engine.feed import MAX_WATCHERS, Feed, Numbered, Snapshot, SnapshotEnd, Watcher
from engine.scheduler import Scheduler
from engine.tenants import ANONYMOUS, namespace_key, suffix_of, tenant_of
from prefixcache.cache import PrefixCache
from prefixcache.client import AsyncClient, Client
from prefixcache.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidArgument,
    OutOfRange,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from prefixcache.lease import Removed, Stored
from prefixcache.terms import Terms
from prefixcache.tokens import pack
from prefixcache.v1 import cache_pb2, cache_pb2_grpc
from prefixcache.watch import BlocksStored, CacheEvent, Position, Watch
from prefixcache.watch import SnapshotEnd as EndOfSnapshot
from tests.engine.serving import BLOCK, PaperEngine, RunningServer
from tests.engine.tenancy import entry, write

SIZE = 4


class World:
    """A cache and its feed in one event loop. The engine's thread is a thread that does what it is told."""

    def __init__(self, blocks: int = 32) -> None:
        self.cache = PrefixCache(blocks, SIZE, account_of=tenant_of)
        self._scheduler = Scheduler(
            self.cache, max_length=1000, max_batch_tokens=64, max_running=4, eos=frozenset(), max_pause=0.0
        )
        self._engine = ThreadPoolExecutor(1)
        self.feed = Feed(asyncio.get_running_loop(), self._call)

    def _call(self, function: Callable[[Scheduler], None]) -> Future[None]:
        return self._engine.submit(function, self._scheduler)

    def listening(self) -> bool:
        return self.cache.listener is not None

    async def do(self, function: Callable[[PrefixCache], Any]) -> None:
        """Run a function on the engine's thread."""
        await asyncio.wrap_future(self._engine.submit(function, self.cache))

    async def store(self, tenant: str, suffix: str, tokens: range, terms: Terms = Terms()) -> None:  # noqa: B008 - immutable
        """Store the whole blocks of a prompt."""

        def store(cache: PrefixCache) -> None:
            packed = pack(tokens)
            lease = cache.match(packed + pack([0]), namespace_key(tenant, suffix), terms=terms)
            cache.allocate(lease, len(tokens) // SIZE - lease.shared)
            cache.commit(lease, packed[lease.shared * cache.block_bytes :])
            lease.release()

        await self.do(store)

    def churn(self, tenant: str, times: int) -> None:
        """Store and forget a block so many times, while the event loop waits."""

        def churn() -> None:
            packed, key = pack(range(SIZE)), namespace_key(tenant, "")
            for _ in range(times):
                lease = self.cache.match(packed + pack([0]), key)
                self.cache.allocate(lease, 1)
                self.cache.commit(lease, packed)
                lease.release()
                self.cache.invalidate(key)

        self._engine.submit(churn).result()

    def end(self) -> None:
        self._engine.shutdown()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    world.end()


async def take(watcher: Watcher, count: int) -> list[Numbered]:
    return [await anext(watcher) for _ in range(count)]


def blocks_of(cache: PrefixCache, tenant: str | None = None) -> set[tuple[str, bytes]]:
    return {
        (suffix_of(stored.namespace), stored.hashes[start : start + 16])
        for stored in cache.stored(tenant)
        for start in range(0, len(stored.hashes), 16)
    }


# The feed


async def test_a_snapshot_comes_first_and_then_every_change(world: World) -> None:
    """What was stored before is in the snapshot, with the number of the last change; what comes later is counted on."""
    await world.store("a", "", range(8))
    async with world.feed.watch("a") as watcher:
        (first, snapshot), (second, end) = await take(watcher, 2)
        assert isinstance(snapshot, Snapshot) and len(snapshot.stored.hashes) == 32
        assert (first, second, end) == (0, 0, SnapshotEnd(2))
        await world.store("a", "", range(12))
        await world.do(lambda cache: cache.invalidate(namespace_key("a", "")))
        (third, stored), (fourth, removed) = await take(watcher, 2)
        assert (third, fourth) == (1, 2)
        assert isinstance(stored, Stored) and stored.parent == snapshot.stored.hashes[16:]
        assert (
            isinstance(removed, Removed)
            and removed.hashes == stored.hashes + stored.parent + snapshot.stored.hashes[:16]
        )
    async with world.feed.watch("a") as late:
        assert await take(late, 1) == [(2, SnapshotEnd(0))]


@pytest.mark.parametrize(
    "remove",
    [
        lambda cache: cache.evict(2),
        lambda cache: cache.tick(11.0),
        lambda cache: cache.invalidate(),
        lambda cache: cache.invalidate_account("a"),
        lambda cache: cache.invalidate_prefix(pack(range(6)), namespace_key("a", "x")),
        lambda cache: cache.invalidate_session(namespace_key("a", "x"), "chat"),
    ],
    ids=["evicted", "expired", "all invalidated", "tenant invalidated", "prefix invalidated", "session invalidated"],
)
async def test_what_goes_is_removed_whatever_the_reason(world: World, remove: Callable[[PrefixCache], Any]) -> None:
    """A watcher knows what is left, blocks removed with the deepest first."""
    terms = Terms(ttl=10.0, session="chat")
    await world.store("a", "x", range(12), terms)
    async with world.feed.watch("a") as watcher:
        (_, snapshot), _ = await take(watcher, 2)
        assert isinstance(snapshot, Snapshot)
        hashes = [snapshot.stored.hashes[start : start + 16] for start in range(0, 48, 16)]
        await world.do(remove)
        left = len(blocks_of(world.cache, "a"))
        assert left < 3
        ((_, removed),) = await take(watcher, 1)
        assert isinstance(removed, Removed)
        assert removed.hashes == b"".join(reversed(hashes[left:]))


async def test_tenants_see_only_their_own(world: World) -> None:
    """Neither the snapshot, nor the events, nor gaps in the numbers say anything of another tenant."""
    await world.store("a", "x", range(8))
    await world.store("b", "x", range(8))
    async with world.feed.watch("a") as of_a, world.feed.watch("b") as of_b:
        for watcher, tenant in ((of_a, "a"), (of_b, "b")):
            (_, snapshot), (_, end) = await take(watcher, 2)
            assert isinstance(snapshot, Snapshot)
            assert (snapshot.stored.namespace, end) == (namespace_key(tenant, "x"), SnapshotEnd(2))
        for length in (12, 16, 20):
            await world.store("b", "x", range(length))
        await world.store("a", "x", range(12))
        assert [number for number, _ in await take(of_b, 3)] == [1, 2, 3]
        ((number, event),) = await take(of_a, 1)
        assert isinstance(event, Stored)
        assert (number, tenant_of(event.namespace)) == (1, "a")
        assert of_a.stream_id != of_b.stream_id
        with pytest.raises(OutOfRange):
            async with world.feed.watch("a", (of_b.stream_id, 1)):
                pass


async def test_who_comes_back_misses_nothing(world: World) -> None:
    """Events that came while nobody watched are there, from exactly the one after the last that was seen."""
    async with world.feed.watch("a") as watcher:
        await world.store("a", "", range(4))
        await take(watcher, 2)
    for length in (8, 12, 16):
        await world.store("a", "", range(length))
    async with world.feed.watch("a", (watcher.stream_id, 1)) as again:
        assert again.stream_id == watcher.stream_id
        assert [number for number, _ in await take(again, 3)] == [2, 3, 4]
    async with world.feed.watch("a", (watcher.stream_id, 3)) as once_more:
        assert [number for number, _ in await take(once_more, 1)] == [4]


@pytest.mark.parametrize(("stream", "number"), [(True, 0), (True, 999), (False, 30)])
async def test_who_comes_back_too_late_must_start_over(world: World, stream: bool, number: int) -> None:
    """Events that are not kept, numbers that do not exist yet and other numberings are out of range."""
    world.feed.kept_bytes = 4096
    async with world.feed.watch("a") as watcher:
        for length in range(4, 124, 4):
            await world.store("a", "", range(length))
            await anext(watcher)
        last = (await take(watcher, 1))[0].sequence
        assert last == 30
    async with world.feed.watch("a", (watcher.stream_id, last)):
        pass
    with pytest.raises(OutOfRange, match="start over, without stream_id and sequence"):
        async with world.feed.watch("a", (watcher.stream_id if stream else "another", number)):
            pass


async def test_who_does_not_read_is_dropped(world: World) -> None:
    """One falls behind what is kept and is told so; another one reads on; what is kept stays within its limit."""
    world.feed.kept_bytes = 4096
    await world.store("a", "", range(64))
    async with world.feed.watch("a") as idle, world.feed.watch("a") as busy:
        await take(busy, 2)
        for round in range(30):
            await world.store("a", str(round), range(4))
            await take(busy, 2 if round >= 16 else 1)  # from then on a block is evicted for each
        assert busy.sequence == 44
        assert not idle.snapshot
        with pytest.raises(OutOfRange, match=r"faster than they were read.*start over"):
            await anext(idle)
        (channel,) = world.feed._channels.values()
        assert len(channel._events) <= 4096 // 256


async def test_the_cache_is_listened_to_only_as_long_as_needed(world: World) -> None:
    """Hashes cost time: there is a listener while somebody watches or may come back, and none before and after."""
    assert not world.listening()
    async with world.feed.watch("a"), world.feed.watch("b"):
        assert world.listening()
    assert world.listening()
    world.feed.kept_seconds = 0.0
    for tenant in "ab":
        async with world.feed.watch(tenant) as watcher:
            assert world.listening()
    while world.listening():
        await asyncio.sleep(0)
    with pytest.raises(OutOfRange):
        async with world.feed.watch("b", (watcher.stream_id, 0)):
            pass
    await world.store("b", "", range(8))
    async with world.feed.watch("b") as new:
        await take(new, 2)
        assert new.stream_id != watcher.stream_id


async def test_a_burst_of_changes_wakes_the_event_loop_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand changes cost the engine's thread one call of the event loop, and arrive in order."""
    loop = asyncio.get_running_loop()
    wake, calls = loop.call_soon_threadsafe, 0

    def counting(*arguments: Any) -> asyncio.Handle:
        nonlocal calls
        calls += 1
        return wake(*arguments)

    async with world.feed.watch("a") as watcher:
        await take(watcher, 1)
        while world.feed._timer is not None:  # what joining posted is delivered
            await asyncio.sleep(0)
        monkeypatch.setattr(loop, "call_soon_threadsafe", counting)
        for burst in (1, 2):
            world.churn("a", 500)
            last = burst * 1000
            assert [number for number, _ in await take(watcher, 1000)] == list(range(last - 999, last + 1))
            assert calls <= burst


async def test_a_tenant_has_so_many_watchers_and_no_more(world: World) -> None:
    """One too many is refused with a reason, others are not affected, and who leaves makes room."""
    watching = [world.feed.watch("a") for _ in range(MAX_WATCHERS)]
    for one in watching:
        await one.__aenter__()
    with pytest.raises(ResourceExhausted, match=f"{MAX_WATCHERS} calls are watching"):
        async with world.feed.watch("a"):
            pass
    async with world.feed.watch("b"):
        pass
    await watching.pop().__aexit__(None, None, None)
    async with world.feed.watch("a"):
        pass
    for one in watching:
        await one.__aexit__(None, None, None)


async def test_a_feed_that_closes_tells_its_watchers(world: World) -> None:
    """Whoever watches, and whoever wants to, learns that the server is shutting down."""
    async with world.feed.watch("a") as watcher:
        world.feed.close()
        with pytest.raises(Unavailable, match="shutting down"):
            await take(watcher, 2)
    with pytest.raises(Unavailable, match="shutting down"):
        async with world.feed.watch("a"):
            pass


# Over the network


class Replica:
    """The set of stored blocks as a watcher knows it. Asserts what the protocol promises."""

    def __init__(self) -> None:
        self.blocks: set[tuple[str, bytes]] = set()
        self.roots: dict[str, bytes] = {}
        self.sequence: int | None = None

    def apply(self, event: CacheEvent) -> None:
        if isinstance(event, EndOfSnapshot):
            assert event.blocks == len(self.blocks)
        elif isinstance(event, BlocksStored):
            parent = (event.namespace, event.parent)
            assert parent in self.blocks or self.roots.setdefault(event.namespace, event.parent) == event.parent
            new = {(event.namespace, block) for block in event.hashes}
            assert len(new) == len(event.hashes) and not new & self.blocks
            self.blocks |= new
        else:
            old = {(event.namespace, block) for block in event.hashes}
            assert old <= self.blocks
            self.blocks -= old
        snapshot = isinstance(event, EndOfSnapshot) or (isinstance(event, BlocksStored) and event.snapshot)
        assert self.sequence is None or event.sequence == self.sequence + (not snapshot)
        self.sequence = event.sequence

    def follow(self, watch: Watch, until: str) -> Position:
        """Apply events up to one of a namespace."""
        for event in watch:
            self.apply(event)
            if not isinstance(event, EndOfSnapshot) and event.namespace == until:
                break
        assert watch.position is not None
        return watch.position


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with RunningServer(PaperEngine(blocks=64)) as server:
        yield server


def stored_in(server: RunningServer) -> set[tuple[str, bytes]]:
    call = server.server.front.engine.loop.call
    return call(lambda scheduler: blocks_of(scheduler.cache)).result(30)


def forget(key: str, scheduler: Scheduler) -> None:
    scheduler.cache.invalidate(key)


def work(server: RunningServer, chance: random.Random, rounds: int) -> None:
    """Send prompts that share beginnings and evict each other, and forget some, at random."""
    call = server.server.front.engine.loop.call
    with Client(server.address) as client:
        for _ in range(rounds):
            suffix = chance.choice(["", "chat", "tools"])
            blocks = [chance.randrange(2) for _ in range(chance.randrange(1, 4))]
            prompt = [token for token in blocks for _ in range(BLOCK)] + [7] * chance.randrange(1, 300)
            client.generate(prompt, max_tokens=chance.randrange(1, 40), namespace=suffix)
            if chance.random() < 0.15:
                key = namespace_key(ANONYMOUS, suffix)
                call(partial(forget, key)).result(30)


def mark(server: RunningServer, namespace: str) -> None:
    """Store one block in a namespace that nothing else is in."""
    with Client(server.address) as client:
        client.generate([1] * (BLOCK + 1), max_tokens=1, namespace=namespace)


@pytest.mark.parametrize("seed", range(3))
def test_a_replica_is_the_cache(server: RunningServer, seed: int) -> None:
    """Whenever a watcher comes, its snapshot and the events behind it give exactly what the cache holds."""
    replicas: list[Replica] = []
    chance = random.Random(seed)
    with Client(server.address) as client:
        work(server, chance, 10)
        followers = []
        workers = [
            threading.Thread(target=work, args=(server, random.Random(f"{seed} {worker}"), 20)) for worker in range(2)
        ]
        for worker in workers:
            worker.start()
        for _ in range(3):  # they come while the cache changes
            replicas.append(Replica())
            watch = client.watch_events(timeout=60)
            followers.append(threading.Thread(target=replicas[-1].follow, args=(watch, "end")))
            followers[-1].start()
            work(server, chance, 3)
        for worker in workers:
            worker.join()
        mark(server, "end")
        for follower in followers:
            follower.join()
    held = stored_in(server)
    assert held
    assert [replica.blocks == held for replica in replicas] == [True] * 3


def test_a_watcher_that_was_cut_off_goes_on_where_it_was(server: RunningServer) -> None:
    """Cut off again and again, in the middle of the work, a replica misses nothing and gets nothing twice."""
    replica, chance = Replica(), random.Random(5)
    with Client(server.address) as client:
        work(server, chance, 5)
        position = None
        for number in range(6):
            with client.watch_events(after=position, timeout=30) as watch:
                mark(server, f"mark {number}")
                position = replica.follow(watch, f"mark {number}")
            work(server, chance, 5)
        mark(server, "end")
        with client.watch_events(after=position, timeout=30) as watch:
            replica.follow(watch, "end")
    assert replica.blocks == stored_in(server)


def test_a_slow_client_is_dropped_and_memory_stays_bounded(server: RunningServer) -> None:
    """A client that does not read gets OUT_OF_RANGE when it reads again; until then the server keeps only so much."""
    feed = server.server.front.feed
    feed.kept_bytes = 100_000
    name = "n" * 250

    def churn(scheduler: Scheduler) -> None:
        cache = scheduler.cache
        for start in range(5_000):
            packed = pack(range(start, start + BLOCK))
            lease = cache.match(packed + pack([0]), namespace_key(ANONYMOUS, name))
            cache.allocate(lease, 1)
            cache.commit(lease, packed)
            lease.release()

    options = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536))
    with grpc.insecure_channel(server.address, options=options) as channel:
        slow = cache_pb2_grpc.CacheServiceStub(channel).WatchEvents(cache_pb2.WatchEventsRequest())
        assert next(slow).HasField("snapshot_end")
        for _ in range(4):
            server.server.front.engine.loop.call(churn).result(30)
        mark(server, "later")
        with pytest.raises(grpc.RpcError) as caught:
            for _ in slow:
                pass
    assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE
    (tenant,) = feed._channels.values()
    assert tenant._bytes <= 100_000
    with Client(server.address) as client, client.watch_events(timeout=10) as again:
        assert any(isinstance(event, EndOfSnapshot) for event in again)


def test_a_watcher_that_leaves_leaves_nothing(server: RunningServer) -> None:
    """Closed, or past its deadline, a call is no watcher any more, and the cache is not listened to for it."""
    feed, loop = server.server.front.feed, server.server.front.engine.loop
    feed.kept_seconds = 0.0
    with Client(server.address) as client:
        watch = client.watch_events()
        next(watch)
        watch.close()
        with pytest.raises(Cancelled):
            next(watch)
        with pytest.raises(DeadlineExceeded):
            list(client.watch_events(timeout=0.2))
    while loop.call(lambda scheduler: scheduler.cache.listener).result(30) is not None:
        pass
    assert not feed._channels


def test_a_watcher_to_whom_nothing_happens_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pings of a client who waits are no attack, however long the silence."""
    monkeypatch.setattr("prefixcache.listening.PING_MILLISECONDS", 20)
    options = (("grpc.keepalive_time_ms", 100), ("grpc.http2.max_pings_without_data", 0))
    with RunningServer(PaperEngine()) as server, grpc.insecure_channel(server.address, options=options) as channel:
        watch = cache_pb2_grpc.CacheServiceStub(channel).WatchEvents(cache_pb2.WatchEventsRequest(), timeout=3.6)
        with pytest.raises(grpc.RpcError) as caught:
            list(watch)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_server_that_stops_says_so_to_watchers() -> None:
    """They are not cut off without a word, and the server does not wait for them."""
    with Client("127.0.0.1:1") as unreachable, pytest.raises(Unavailable):
        next(unreachable.watch_events())
    with RunningServer(PaperEngine()) as server:
        client = Client(server.address)
        watch = client.watch_events()
        next(watch)
    with client, pytest.raises(Unavailable, match="shutting down"):
        next(watch)


def test_a_token_that_was_taken_out_shows_nothing_more(tmp_path: Path) -> None:
    """A call that watches may be old; whoever may not call any more gets no further event."""
    tenants = tmp_path / "tenants.toml"
    options = {"tenants": write(tenants, entry("a"), entry("b"))}
    with RunningServer(PaperEngine(), **options) as server, Client(server.address, token="a") as client:
        watch = client.watch_events(timeout=30)
        assert next(watch) == EndOfSnapshot(0, 0)
        client.generate([1] * 40, max_tokens=1, namespace="seen")
        seen = next(watch)
        assert isinstance(seen, BlocksStored)
        assert seen.namespace == "seen"
        write(tenants, entry("b"))
        server.loop.call_soon_threadsafe(server.server.front.gate.reload)
        server.server.front.engine.loop.call(partial(forget, namespace_key("a", "seen"))).result(30)
        with pytest.raises(Unauthenticated):
            next(watch)


@pytest.mark.parametrize("request_fields", [{"stream_id": "x"}, {"sequence": 0}])
def test_half_a_position_is_refused(server: RunningServer, request_fields: dict[str, Any]) -> None:
    """stream_id and sequence belong together."""
    with grpc.insecure_channel(server.address) as channel:
        call = cache_pb2_grpc.CacheServiceStub(channel).WatchEvents(cache_pb2.WatchEventsRequest(**request_fields))
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_position_that_cannot_be_sent_is_refused_at_once() -> None:
    """A negative number is the caller's mistake, found before anything is sent."""
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidArgument, match="position cannot be sent"):
        client.watch_events(after=Position("x", -1))


async def test_watching_with_asyncio(server: RunningServer) -> None:
    """The asyncio client gets the same events, goes on after a disconnect, and can be closed by another task."""
    async with AsyncClient(server.address) as client:
        await client.generate([1] * 40, max_tokens=1, namespace="one")
        async with client.watch_events(timeout=30) as watch:
            first, end = await anext(watch), await anext(watch)
            assert isinstance(first, BlocksStored) and first.snapshot and first.namespace == "one"
            assert end == EndOfSnapshot(0, 2)
        await client.generate([2] * 40, max_tokens=1, namespace="two")
        async with client.watch_events(after=watch.position, timeout=30) as again:
            stored = await anext(again)
            assert isinstance(stored, BlocksStored) and not stored.snapshot
            assert (stored.namespace, stored.sequence, len(stored.hashes)) == ("two", 1, 2)
            waiting = asyncio.ensure_future(anext(again))
            await asyncio.sleep(0)
            await again.close()
            with pytest.raises(Cancelled):
                await waiting
        with pytest.raises(OutOfRange):
            await anext(client.watch_events(after=Position("gone", 1), timeout=30))
