"""A replica is killed, stands still, or comes back: what its callers see, and what is believed of it."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest

from prefixcache.client import Client
from prefixcache.errors import Unavailable
from prefixcache.hints.schema import DEFAULT_PREFIX, Keys
from tests.engine.paper import generate
from tests.redis import RedisServer
from tests.replicas.processes import PAPER, Deployment, Replica, complete, leases, located
from tests.replicas.traffic import TIMEOUT, VOCABULARY, asked, at, beginning
from tests.waiting import until

LONG = 100
"""Blocks of a prefix so long that its replica gets its requests even if several wait there."""


def other(replicas: list[Replica], replica_id: str | None) -> tuple[Replica, Replica]:
    """Return the replica of that name, and the other one."""
    a, b = replicas
    return (a, b) if a.id == replica_id else (b, a)


def test_killed_in_mid_stream(redis: RedisServer, deployment: Deployment) -> None:
    """Its streams end with UNAVAILABLE; what had no token yet is answered by the other, as is all that comes then.

    When its lease has ended, nobody knows it any more.
    """
    replicas = deployment.replicas("a b", redis.url, step_seconds=0.03, max_running=2)
    gateway = deployment.gateway("--redis", redis.url, "--policy", "session").wait_for(*replicas)
    prompt = beginning(1, 20)
    with Client(gateway.address) as client, ThreadPoolExecutor(8) as pool:
        doomed, survivor = other(replicas, asked(client, prompt, session_id="one").replica)
        with Client(doomed.address) as direct:
            streams = [
                client.stream([*prompt, number], max_tokens=1500, session_id="one", timeout=TIMEOUT)
                for number in range(2)
            ]
            for stream in streams:
                next(stream)
            queued = [pool.submit(asked, client, [*prompt, 7, number], session_id="one") for number in range(3)]
            until(lambda: direct.stats(timeout=TIMEOUT).requests.waiting == 3, "that requests wait")
        doomed.kill()
        for stream in streams:
            with pytest.raises(Unavailable, match=f"replica {doomed.id} has gone while it answered"):
                stream.result()
        assert asked(client, beginning(2), session_id="one").replica == survivor.id
        assert [future.result().replica for future in queued] == [survivor.id] * 3
        until(lambda: set(leases(redis.url)) == {survivor.id}, "the end of its lease")
        gateway.wait_for(survivor)
        again = asked(client, [*prompt, 8], session_id="one")
        assert (again.replica, again.usage.cached_tokens) == (survivor.id, len(prompt))
        with Client(survivor.address) as direct:
            assert direct.lookup([*prompt, 1], timeout=TIMEOUT).elsewhere == ()


def test_what_waits_goes_to_a_replica_that_has_come_since(redis: RedisServer, deployment: Deployment) -> None:
    """When a request was accepted there was one replica; when that one is killed there is another."""
    slow = {"step_seconds": 0.03, "max_running": 1}
    [first] = deployment.replicas("first", redis.url, **slow)
    gateway = deployment.gateway("--redis", redis.url)
    with Client(gateway.address) as client, Client(first.address) as direct, ThreadPoolExecutor(1) as pool:
        stream = client.stream(beginning(1), max_tokens=1000, timeout=TIMEOUT)
        next(stream)
        queued = pool.submit(asked, client, beginning(2))
        until(lambda: direct.stats(timeout=TIMEOUT).requests.waiting == 1, "that a request waits")
        [second] = deployment.replicas("second", redis.url, **slow)
        gateway.wait_for(first, second)
        first.kill()
        assert queued.result().replica == "second"
        with pytest.raises(Unavailable, match="replica first has gone while it answered"):
            stream.result()


def test_standing_still_for_longer_than_its_lease(redis: RedisServer, deployment: Deployment) -> None:
    """Requests without a token go elsewhere, a stream that has begun waits for it to wake.

    What it says then is void, until it has registered anew; soon its hints are complete again.
    """
    replicas = deployment.replicas("a b", redis.url, step_seconds=0.02)
    gateway = deployment.gateway("--redis", redis.url).wait_for(*replicas)
    prompt = beginning(1, LONG)
    with Client(gateway.address) as client, ThreadPoolExecutor(8) as pool:
        sleeper, awake = other(replicas, at(client, prompt))
        until(lambda: located(redis.url, awake.hashes(prompt)) == {sleeper.id: 99, awake.id: 0}, "that it is published")
        stream = client.stream([*prompt, 1], max_tokens=100, timeout=60)
        next(stream)
        nonce = leases(redis.url)[sleeper.id].nonce
        table = Keys(DEFAULT_PREFIX).table(PAPER, sleeper.id, nonce)
        sleeper.process.pause()
        meanwhile = [pool.submit(asked, client, [*prompt, 2, number]) for number in range(3)]
        assert [future.result().replica for future in meanwhile] == [awake.id] * 3
        until(lambda: set(leases(redis.url)) == {awake.id}, "the end of its lease")
        gateway.wait_for(awake)
        assert asked(client, [*prompt, 3]).replica == awake.id
        assert located(redis.url, awake.hashes(prompt)) == {awake.id: 99}
        with redis.client() as raw:
            assert raw.exists(table), "its statements are there, and void"
        sleeper.process.resume()

        def registered() -> bool:
            lease = leases(redis.url).get(sleeper.id)
            assert lease is None or lease.nonce != nonce
            return lease is not None

        until(registered, "that it registers anew")
        assert stream.result().token_ids == generate([*prompt, 1], 100, VOCABULARY)
        gateway.wait_for(*replicas)
        until(lambda: complete(redis.url, replicas, [prompt, [*prompt, 1]]), "that hints are complete")
        with redis.client() as raw:
            assert not raw.exists(table)


@pytest.mark.parametrize("same_port", [True, False])
def test_restarted_under_its_name(same_port: bool, redis: RedisServer, deployment: Deployment) -> None:
    """What the old process said is void at once, and the new one is used, also if it is found elsewhere."""
    replicas = deployment.replicas("a b", redis.url)
    gateway = deployment.gateway("--redis", redis.url).wait_for(*replicas)
    prompt = beginning(1, LONG)
    with Client(gateway.address) as client:
        old, stays = other(replicas, at(client, prompt))
        until(lambda: located(redis.url, stays.hashes(prompt)) == {old.id: 99, stays.id: 0}, "that it is published")
        nonce = leases(redis.url)[old.id].nonce
        old.kill()
        assert asked(client, [*prompt, 1]).replica == stays.id
        port = old.port if same_port else 0
        [new] = deployment.replicas(old.id, redis.url, port=port)
        lease = leases(redis.url)[new.id]
        assert (lease.nonce != nonce, lease.address) == (True, new.address)
        found = located(redis.url, stays.hashes(prompt))
        assert (found.get(new.id, 0), found[stays.id]) == (0, 99)
        gateway.wait_for(*sorted([new, stays], key=lambda one: one.id))
        assert asked(client, [*prompt, 2]).replica == stays.id
        with Client(gateway.address, replica=new.id) as named:
            assert asked(named, prompt).usage.cached_tokens == 0
        fresh = itertools.count(2)
        until(lambda: at(client, beginning(next(fresh))) == new.id, "that it is used")
        until(lambda: complete(redis.url, [new, stays], [prompt]), "that hints are complete")
