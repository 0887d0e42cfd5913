"""A gateway is killed, or a client that routes loses Redis: new calls find their prefixes all the same."""

from __future__ import annotations

import pytest

from prefixcache.client import Client, RoutingClient
from prefixcache.errors import Unavailable
from tests.redis import RedisServer
from tests.replicas.processes import Deployment, complete
from tests.replicas.traffic import TIMEOUT, asked, at, beginning
from tests.waiting import until

BLOCKS = 64


def test_a_gateway_that_was_killed_is_replaced(redis: RedisServer, deployment: Deployment) -> None:
    """Its streams end with UNAVAILABLE and leave nothing behind; the same clients' new calls succeed.

    It has kept nothing, and learns from Redis where prefixes lie.
    """
    replicas = deployment.replicas("a b", redis.url, step_seconds=0.02)
    old = deployment.gateway("--redis", redis.url).wait_for(*replicas)
    prompts = [beginning(seed, BLOCKS) for seed in range(3)]
    with Client(old.address) as client:
        home = [at(client, prompt) for prompt in prompts]
        assert set(home) == {"a", "b"}
        streams = [client.stream([*prompt, 1], max_tokens=800, timeout=TIMEOUT) for prompt in prompts]
        for stream in streams:
            next(stream)
        until(lambda: complete(redis.url, replicas, prompts), "that hints are complete")
        old.kill()
        for stream in streams:
            with pytest.raises(Unavailable):
                stream.result()
        with pytest.raises(Unavailable):
            client.generate(prompts[0], timeout=TIMEOUT)
        deployment.gateway("--redis", redis.url, port=old.port).wait_for(*replicas)
        client.wait_until_ready(timeout=TIMEOUT)
        for prompt, replica_id in zip(prompts, home, strict=True):
            completion = asked(client, [*prompt, 2])
            assert (completion.replica, completion.usage.cached_tokens) == (replica_id, len(prompt))
        for replica in replicas:
            until(replica.is_idle, "that streams of the old gateway have ended")


def test_a_client_that_routes_goes_on_without_redis(redis: RedisServer, deployment: Deployment) -> None:
    """By its own memory; also around a replica that is killed meanwhile."""
    replicas = deployment.replicas("a b", redis.url)
    prompts = [beginning(seed, BLOCKS) for seed in range(3)]
    with RoutingClient(redis.url) as client:
        home = [at(client, prompt) for prompt in prompts]
        assert set(home) == {"a", "b"}
        redis.stop()
        for number in range(3):
            assert [at(client, [*prompt, number]) for prompt in prompts] == home
        replicas[0].kill()
        assert {at(client, [*prompt, 4]) for prompt in prompts} == {"b"}
    with RoutingClient(redis.url, [replicas[1].address]) as client:
        assert at(client, [*prompts[0], 5]) == "b"
    with RoutingClient(redis.url) as client, pytest.raises(Unavailable, match="Redis cannot be asked"):
        client.generate(prompts[0], timeout=TIMEOUT)
