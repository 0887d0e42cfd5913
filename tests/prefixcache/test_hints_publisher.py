"""A replica's side of the hints: a real Redis, and everything that can go wrong with it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import redis
from structlog.testing import capture_logs

from prefixcache.errors import InvalidArgument
from prefixcache.hints import publisher, schema
from prefixcache.hints.schema import Group, Keys, Lease, Load
from prefixcache.naming import BlockNames
from prefixcache.tokens import pack
from tests.prefixcache.replica import GROUP, Replica, chain, each, table_of
from tests.redis import Line, RedisServer
from tests.serving import environment
from tests.waiting import until

KEYS = Keys()


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture
def client(server: RedisServer) -> Iterator[redis.Redis]:
    with server.client() as connected:
        yield connected


@contextmanager
def other_process(url: str, replica_id: str, seed: int) -> Iterator[subprocess.Popen[str]]:
    """Yield a replica in a process of its own that has published its blocks; killed at the end if it still runs."""
    command = [sys.executable, "-m", "tests.prefixcache.replica", url, replica_id, str(seed)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment(), **pipes)
    try:
        assert process.stdout is not None
        until(lambda: process.stdout is None or "published" in process.stdout.readline())
        yield process
    finally:
        process.kill()
        process.communicate()


# What is said


def test_what_is_stored_is_in_redis_and_what_is_removed_is_not(server: RedisServer, client: redis.Redis) -> None:
    """Also when far more was stored and removed in all than there is room for."""
    with Replica(server.url, blocks=1000) as replica:
        for seed in range(20):
            replica.store(chain(seed))
            if seed >= 3:
                replica.remove(chain(seed - 3))
        until(lambda: replica.is_complete(client))
        until(lambda: replica.publisher.status.current and replica.publisher.status.blocks == 900)
        assert replica.publisher.status.republished == 0


def test_what_was_heard_before_the_start_is_published(server: RedisServer, client: redis.Redis) -> None:
    """An engine need not wait until its publisher runs."""
    replica = Replica(server.url)
    replica.store(chain(1))
    with replica:
        until(lambda: replica.is_complete(client))


def test_a_snapshot_replaces_everything(server: RedisServer, client: redis.Redis) -> None:
    """What was stored before and is not in it is gone, and what comes after it is added to it."""
    with Replica(server.url) as replica:
        replica.store(chain(1))
        until(lambda: replica.is_complete(client))
        replica.stored = [chain(2), chain(3)]
        replica.restart()
        replica.store(chain(4))
        until(lambda: replica.is_complete(client))


def test_the_lease_says_how_busy_the_replica_is(server: RedisServer, client: redis.Redis) -> None:
    """A change of its load is told long before the lease has to be renewed."""
    with Replica(server.url, lease_seconds=3600.0) as replica:
        replica.store(chain(1))
        replica.load = Load(running=3, waiting=2, waiting_tokens=900, free=10, cached=20)

        def told() -> bool:
            lease = replica.lease(client)
            return lease is not None and lease.load == replica.load and lease.published == 300

        until(told)
        lease = replica.lease(client)
        assert lease is not None
        assert (lease.address, lease.model, lease.blocks) == ("replica.example.com:50051", "embedded", 5000)
        assert (lease.block_size, lease.lease_seconds, lease.draining) == (16, 3600.0, False)


def test_a_lease_lasts_while_the_process_does(server: RedisServer, client: redis.Redis) -> None:
    """It is renewed under the same nonce, so what has been published stays valid."""
    with Replica(server.url, lease_seconds=0.3) as replica:
        until(lambda: replica.lease(client))
        first = replica.lease(client)
        renewals = 0
        record = client.hget(KEYS.replicas(GROUP), "a")
        while renewals < 8:
            if (now := client.hget(KEYS.replicas(GROUP), "a")) != record:
                record, renewals = now, renewals + 1
        last = replica.lease(client)
        assert first is not None and last is not None and first.nonce == last.nonce


def test_a_draining_replica_says_so(server: RedisServer, client: redis.Redis) -> None:
    """At once, not when its lease is next renewed."""
    with Replica(server.url, lease_seconds=3600.0) as replica:
        until(lambda: replica.lease(client))
        replica.publisher.drain()
        until(lambda: (lease := replica.lease(client)) and lease.draining)


def test_a_replica_that_stops_leaves_nothing_behind(server: RedisServer, client: redis.Redis) -> None:
    """Neither its lease nor its table; and stopping twice is no mistake."""
    with Replica(server.url) as replica:
        replica.store(chain(1))
        until(lambda: replica.is_complete(client))
    replica.publisher.stop()
    assert client.keys() == [KEYS.groups.encode()]
    assert not replica.publisher.status.current
    replica.store(chain(2))  # is not kept for anybody


def test_a_publisher_that_was_never_started_can_be_stopped(server: RedisServer) -> None:
    """An engine that fails to start stops what it has made."""
    Replica(server.url).publisher.stop()


def test_readers_find_no_block_without_its_parents(server: RedisServer, client: redis.Redis) -> None:
    """At no moment while a conversation grows by hundreds of blocks at a time, and while it is removed again."""
    turns = [chain(seed, 400) for seed in range(15)]
    conversation = b"".join(turns)
    seen = set()
    with Replica(server.url, blocks=6000) as replica:
        until(lambda: replica.publisher.status.current)
        lease = replica.lease(client)
        assert lease is not None
        for change, order in ((replica.store, turns), (replica.remove, turns[::-1])):
            for turn in order:
                change(turn)
                while not replica.is_complete(client):
                    holds = table_of(client, lease).holds(conversation)
                    held = sum(holds)
                    assert holds == [True] * held + [False] * (6000 - held)
                    seen.add(held)
    assert len(seen) > 10


def test_a_name_of_no_use_is_refused() -> None:
    """Names become parts of keys."""
    for options in ({"replica_id": "a b"}, {"group": Group("", "ab", 16)}, {"url": "http://example.com"}):
        values: dict[str, Any] = {"url": "redis://localhost", "group": GROUP, "replica_id": "a", **options}
        with pytest.raises(InvalidArgument):
            publisher.Publisher(**values, address="", model="", blocks=1, load=Load, resync=lambda: None)


def test_nothing_readable_is_in_redis(server: RedisServer, client: redis.Redis) -> None:
    """Neither tokens nor anything that could be compared between deployments with different secrets."""
    ids = [3_111_222_333 + 13 * number for number in range(160)]
    found = []
    for secret in (b"one", b"two"):
        names = BlockNames(bytes.fromhex(GROUP.fingerprint), secret, GROUP.block_size)
        hashes = names.of(pack([*ids, 1]), "support")
        assert len(hashes) == 160
        with Replica(server.url) as replica:
            replica.store(hashes)
            until(partial(replica.is_complete, client))
            found.append({bytes(each(hashes)[i][4:8]) for i in range(10)})
            everything = b"".join(_dump(client))
            assert b"support" not in everything
            for token in ids:
                assert str(token).encode() not in everything
                assert pack([token]) not in everything
    assert not found[0] & found[1]


def _dump(client: Any) -> Iterator[bytes]:
    """Yield all keys and values."""
    for key in client.scan_iter():
        yield key
        kind = client.type(key)
        if kind == b"string":
            yield client.get(key)
        elif kind == b"hash":
            for name, value in client.hgetall(key).items():
                yield from (name, value)
        else:
            yield from client.zrange(key, 0, -1)


# Who may say it


def test_what_a_process_says_under_an_old_nonce_is_void(server: RedisServer, client: redis.Redis) -> None:
    """A late writer changes nothing, neither its lease nor a table."""
    with Replica(server.url) as replica:
        replica.store(chain(1))
        until(lambda: replica.is_complete(client))
        before = set(_dump(client)) - {client.hget(KEYS.replicas(GROUP), "a")}
        old = "0123456789abcdef"
        keys = [KEYS.replicas(GROUP), KEYS.table(GROUP, "a", old)]
        said: list[tuple[str, list[Any]]] = [
            (schema.RENEW, [1000, "{}", ""]),
            (schema.BEGIN, [1000, bytes(16), 320]),
            (schema.PUBLISH, [1000, bytes(16), bytes(16), replica.publisher._table.patches([1])]),
            (schema.REGISTER, [1000, "{}", 0]),
        ]
        for script, arguments in said:
            answer: Any = client.eval(script, 2, *keys, "a", old, *arguments)
            assert answer == 0 or answer[1] == 0
        client.eval(schema.LEAVE, 2, *keys, "a", old)
        assert before <= set(_dump(client))
        assert replica.is_complete(client)


def test_a_process_that_slept_longer_than_its_lease_has_to_register_anew(
    server: RedisServer, client: redis.Redis
) -> None:
    """Nobody sees it while it sleeps; then it comes back under a new nonce with all that it has."""
    with other_process(server.url, "a", 1) as process:
        twin = Replica(server.url)  # never started: only the truth about the other
        twin.stored = [chain(1)]
        until(lambda: twin.is_complete(client))
        first = twin.lease(client)
        process.send_signal(signal.SIGSTOP)
        until(lambda: twin.lease(client) is None)
        process.send_signal(signal.SIGCONT)
        until(lambda: twin.is_complete(client))
        last = twin.lease(client)
        assert first is not None and last is not None and first.nonce != last.nonce
        until(lambda: not client.exists(KEYS.table(GROUP, "a", first.nonce)))


def test_a_process_takes_over_from_one_that_was_killed(server: RedisServer, client: redis.Redis) -> None:
    """Under the same id, at once: the old one's blocks are gone and its table too, though its lease goes on."""
    with other_process(server.url, "a", 1) as process:
        old = Replica(server.url).lease(client)
        process.kill()
        process.wait()
        with Replica(server.url) as replica:
            replica.store(chain(2))
            until(lambda: replica.is_complete(client))
            assert old is not None
            assert not client.exists(KEYS.table(GROUP, "a", old.nonce))


def test_two_processes_with_one_id_are_told_and_only_one_publishes(server: RedisServer, client: redis.Redis) -> None:
    """The one that came last has the name; the other says what is wrong, once, and goes on when the name is free."""
    with capture_logs() as logs, Replica(server.url) as first:
        first.store(chain(1))
        until(lambda: first.is_complete(client))
        with Replica(server.url) as second:
            second.store(chain(2))
            until(lambda: "another process" in first.publisher.status.error)
            assert "--replica-id" in first.publisher.status.error
            assert not first.publisher.status.current
            until(lambda: second.is_complete(client))
        until(lambda: first.is_complete(client) and first.publisher.status.current)
        errors = [line for line in logs if line["log_level"] == "error"]
        assert len(errors) == 1


# What can happen to Redis


def _flush(server: RedisServer, client: redis.Redis, replica: Replica) -> None:
    client.flushall()


def _forget_scripts(server: RedisServer, client: redis.Redis, replica: Replica) -> None:
    client.script_flush()


def _restart_empty(server: RedisServer, client: redis.Redis, replica: Replica) -> None:
    server.stop()
    server.start()


def _lose_the_table(server: RedisServer, client: redis.Redis, replica: Replica) -> None:
    """As a Redis that evicts would."""
    lease = replica.lease(client)
    assert lease is not None
    client.delete(KEYS.table(GROUP, "a", lease.nonce))


def _lose_the_roster(server: RedisServer, client: redis.Redis, replica: Replica) -> None:
    client.delete(KEYS.replicas(GROUP))


def _go_back_in_time(server: RedisServer, client: redis.Redis, replica: Replica) -> None:
    """As a failover to a replica that lags does: an older table under a lease that is still valid."""
    lease = replica.lease(client)
    assert lease is not None
    key = KEYS.table(GROUP, "a", lease.nonce)
    older = client.get(key)
    replica.store(chain(50))
    until(lambda: replica.is_complete(client))
    client.set(key, older)  # type: ignore[arg-type]


def _go_back_to_an_older_nonce(server: RedisServer, client: redis.Redis, replica: Replica) -> None:
    """A lease of this very process, from before it lost it, that would last for an hour."""
    record = client.hget(KEYS.replicas(GROUP), "a")
    assert isinstance(record, bytes)
    lease = replica.lease(client)
    client.flushall()
    until(lambda: replica.is_complete(client))
    now = replica.lease(client)
    assert lease is not None and now is not None and lease.nonce != now.nonce
    deadline = str(int(record[:13]) + 3_600_000).encode()
    client.hset(KEYS.replicas(GROUP), "a", deadline + record[13:])


def _fill_up(server: RedisServer, client: redis.Redis, replica: Replica) -> None:
    client.config_set("maxmemory", 1)


def _change_the_password(server: RedisServer, client: redis.Redis, replica: Replica) -> None:
    """For a while."""
    client.config_set("requirepass", "other")
    client.client_kill_filter(_type="normal", skipme=True)
    until(lambda: "asks for a password" in replica.publisher.status.error)
    client.config_set("requirepass", "")


def _cut_all_connections(server: RedisServer, client: redis.Redis, replica: Replica) -> None:
    client.client_kill_filter(_type="normal", skipme=True)


@pytest.mark.parametrize(
    "happens",
    [
        _flush,
        _forget_scripts,
        _restart_empty,
        _lose_the_table,
        _lose_the_roster,
        _go_back_in_time,
        _go_back_to_an_older_nonce,
        _fill_up,
        _change_the_password,
        _cut_all_connections,
    ],
    ids=lambda function: function.__name__[1:],
)
def test_hints_are_complete_again_whatever_happens_to_redis(
    server: RedisServer, client: redis.Redis, happens: Callable[[RedisServer, redis.Redis, Replica], None]
) -> None:
    """With what was stored before and what is stored afterwards, although nobody asks the engine for anything."""
    with Replica(server.url) as replica:
        for seed in range(5):
            replica.store(chain(seed))
        until(lambda: replica.is_complete(client))
        happens(server, client, replica)
        replica.store(chain(100))
        replica.remove(chain(3))
        until(lambda: replica.is_complete(client), happens.__name__)
        until(lambda: replica.publisher.status.current)
        assert replica.publisher.status.error == ""
        assert not replica.asked.acquire(blocking=False)


def test_a_loss_is_noticed_although_nothing_is_stored(server: RedisServer, client: redis.Redis) -> None:
    """The state of the table is looked at whenever the lease is renewed."""
    with Replica(server.url) as replica:
        replica.store(chain(1))
        until(lambda: replica.is_complete(client))
        _lose_the_table(server, client, replica)
        until(lambda: replica.publisher.status.republished == 1)
        until(lambda: replica.is_complete(client))


def _refused(server: RedisServer, client: redis.Redis) -> Iterator[str]:
    server.stop()
    yield "refuses connections"
    server.start()


def _full(server: RedisServer, client: redis.Redis) -> Iterator[str]:
    client.config_set("maxmemory", 1)
    yield "out of memory"
    client.config_set("maxmemory", 0)


def _locked(server: RedisServer, client: redis.Redis) -> Iterator[str]:
    client.config_set("requirepass", "other")
    yield "asks for a password"
    client.config_set("requirepass", "")


def _paused(server: RedisServer, client: redis.Redis) -> Iterator[str]:
    server.pause()
    yield "does not answer in time"
    server.resume()


def _read_only(server: RedisServer, client: redis.Redis) -> Iterator[str]:
    client.config_set("replica-read-only", "yes")
    client.replicaof("127.0.0.1", "1")
    yield "read-only replica"
    client.replicaof("NO", "ONE")


@pytest.mark.parametrize(
    "fails", [_refused, _full, _locked, _paused, _read_only], ids=lambda function: function.__name__[1:]
)
def test_a_redis_that_cannot_be_used_from_the_start_is_used_when_it_can(
    server: RedisServer,
    client: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
    fails: Callable[[RedisServer, redis.Redis], Iterator[str]],
) -> None:
    """What is wrong is logged once, and that it is over is logged once."""
    monkeypatch.setattr(publisher, "CALL_SECONDS", 0.3)
    failing = fails(server, client)
    reason = next(failing)
    with capture_logs() as logs, Replica(server.url) as replica:
        replica.store(chain(1))
        until(lambda: reason in replica.publisher.status.error)
        replica.store(chain(2))
        assert list(failing) == []
        until(lambda: replica.is_complete(client) and replica.publisher.status.current)
        said = [line for line in logs if line["log_level"] != "debug"]
        assert [line["log_level"] for line in said] == ["warning", "info"]
        assert reason in said[0]["reason"]


def test_a_full_redis_still_learns_what_needs_no_more_memory(server: RedisServer, client: redis.Redis) -> None:
    """Leases are renewed and buckets written over; nothing is republished, and nothing is an error."""
    with Replica(server.url) as replica:
        replica.store(chain(1))
        until(lambda: replica.is_complete(client))
        first = replica.lease(client)
        client.config_set("maxmemory", 1)
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            client.set("other", "value")
        record = client.hget(KEYS.replicas(GROUP), "a")
        until(lambda: client.hget(KEYS.replicas(GROUP), "a") != record)
        replica.store(chain(2))
        until(lambda: replica.is_complete(client))
        last = replica.lease(client)
        assert first is not None and last is not None and first.nonce == last.nonce
        assert replica.publisher.status.republished == 0


def test_a_wrong_password_is_said_and_not_shown() -> None:
    """The message names the Redis, but no password."""
    with RedisServer("--requirepass", "right") as server, capture_logs() as logs:
        url = f"redis://:wrong-one@127.0.0.1:{server.port}"
        with Replica(url) as replica:
            until(lambda: "refuses this user name and password" in replica.publisher.status.error)
            until(lambda: logs)
        assert "wrong-one" not in str(logs)
        with server.client("right") as client, Replica(server.url, password="right") as replica:
            replica.store(chain(1))
            until(lambda: replica.is_complete(client))


def test_a_slow_redis_costs_only_time(server: RedisServer, client: redis.Redis) -> None:
    """Many changes go with each call, and all of them arrive; the engine's thread never waits."""
    with Line(server.port) as line, Replica(f"redis://127.0.0.1:{line.port}") as replica:
        until(lambda: replica.lease(client))
        line.delay = 0.1
        for seed in range(200):
            replica.store(chain(seed, 10))
        until(lambda: replica.is_complete(client) and replica.publisher.status.current)


def test_calls_without_an_answer_are_made_good(
    server: RedisServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows whether they were carried out, so everything is published anew."""
    monkeypatch.setattr(publisher, "CALL_SECONDS", 0.2)
    with Line(server.port) as line, Replica(f"redis://127.0.0.1:{line.port}", lease_seconds=30.0) as replica:
        replica.store(chain(1))
        until(lambda: replica.is_complete(client))
        line.delay = 1.0
        replica.store(chain(2))
        until(lambda: "does not answer in time" in replica.publisher.status.error)
        line.delay = 0.0
        replica.remove(chain(1))
        line.cut()
        until(lambda: replica.is_complete(client) and replica.publisher.status.current)
        assert replica.publisher.status.republished >= 1


def test_a_publisher_ends_although_redis_hangs(server: RedisServer, client: redis.Redis) -> None:
    """Its thread is gone after `stop`, and a later start of Redis sees nothing of it but what runs out by itself."""
    with Replica(server.url) as replica:
        until(lambda: replica.lease(client))
        server.pause()
    assert not replica.publisher._thread.is_alive()
    server.resume()
    until(lambda: replica.lease(client) is None)


def test_an_inbox_that_is_full_is_dropped_and_everything_asked_for_once(
    server: RedisServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never holds more than its bound, and a snapshot, however large, makes all good."""
    monkeypatch.setattr(publisher, "BUFFER_BYTES", 20_000)
    replica = Replica(server.url)
    for seed in range(8):
        replica.store(chain(seed))
        assert sum(len(event.hashes) for event in replica.publisher._inbox._events) <= 20_000
    with replica:
        assert replica.asked.acquire(timeout=30)
        assert not replica.publisher.status.current
        replica.store(chain(8))
        replica.restart()
        until(lambda: replica.is_complete(client))
        replica.store(chain(9))
        until(lambda: replica.is_complete(client) and replica.publisher.status.current)
        assert not replica.asked.acquire(blocking=False)


def test_a_replica_is_complete_after_all_of_it_at_once(server: RedisServer, client: redis.Redis) -> None:
    """Three replicas, with a Redis that is killed and started while they store and remove."""
    replicas = [Replica(server.url, name, blocks=2000) for name in "abc"]
    for replica in replicas:
        replica.publisher.start()
    try:
        for seed in range(40):
            for replica in replicas:
                replica.store(chain(seed, 100))
                if seed >= 15:
                    replica.remove(chain(seed - 15, 100))
            if seed == 20:
                until(lambda: replicas[0].publisher.status.blocks)
                server.stop()
            if seed == 30:
                server.start()
        for replica in replicas:
            until(partial(replica.is_complete, client))
    finally:
        for replica in replicas:
            replica.publisher.stop()
    assert client.hgetall(KEYS.replicas(GROUP)) == {}


def test_a_lease_that_cannot_be_read_is_none() -> None:
    """Whatever stands there, a reader goes on without it."""
    good = Lease("a", "n" * 16, "h:1", "m", 16, 10, Load(running=1))
    record = b"%013d" % 2000 + b"n" * 16 + good.payload().encode()
    parsed = Lease.parse("a", record, 1000)
    assert parsed is not None and parsed.load.running == 1 and parsed.age == 11.0
    assert Lease.parse("a", record, 2000) is None
    damaged: Sequence[bytes] = (b"", b"x" * 60, record[:-1], record[:29] + b"[]", record[:29] + b"null", b"\xff" * 40)
    assert [Lease.parse("a", each_one, 1000) for each_one in damaged] == [None] * len(damaged)
    newer = record[:-1] + b',"more":1}'
    assert Lease.parse("a", newer, 1000) is not None


def test_a_group_is_found_by_its_name() -> None:
    """And what is no group's name is refused."""
    assert Group.parse(str(GROUP)) == GROUP
    for name in ("", "main", "main:abc", "a b:abc:16", "main::16", "main:abc:x"):
        with pytest.raises(InvalidArgument):
            Group.parse(name)
