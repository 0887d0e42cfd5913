"""A gateway that finds its replicas, and what they hold, in a real Redis."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from structlog.testing import capture_logs

from prefixcache.client import Client
from prefixcache.errors import Unavailable
from tests.engine.paper import generate
from tests.engine.serving import PaperEngine, RunningServer
from tests.prefixcache.gateways import RunningGateway
from tests.redis import RedisServer
from tests.serving import free_port
from tests.waiting import until

TOKENS = 320


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    """One for all tests, each with a prefix of its own."""
    with RedisServer() as redis:
        yield redis


@contextlib.contextmanager
def replicas(redis: RedisServer, prefix: str, names: str, **options: object) -> Iterator[dict[str, RunningServer]]:
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(
                RunningServer(PaperEngine(), redis=redis.url, redis_prefix=prefix, replica_id=name, **options)
            )
            for name in names
        }


@contextlib.contextmanager
def gateway(redis: RedisServer, prefix: str, names: str, *fixed: str) -> Iterator[RunningGateway]:
    with RunningGateway(*fixed, redis=redis.url, redis_prefix=prefix) as running:
        until(lambda: running.serving() == list(names), f"replicas {names} that serve")
        yield running


def prompt_of(group: int, agent: int, turn: int = 0) -> list[int]:
    """What an agent sends: the system prompt of its group, then what is its own."""
    system = random.Random(group).choices(range(256), k=TOKENS)
    return system + random.Random(f"{group} {agent}").choices(range(256), k=20 * (turn + 1))


def _published(client: Client) -> int:
    """How many blocks all replicas together have published."""
    hints = client.stats(timeout=10).hints
    return hints.blocks if hints is not None and hints.current else 0


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_agents_land_where_their_prefix_lies(redis: RedisServer, names: str) -> None:
    """Each group's system prompt is computed once, all replicas are used, and the tokens are a single engine's."""
    prefix = f"lie-{names}:"
    with replicas(redis, prefix, names) as servers, gateway(redis, prefix, names) as running:
        with Client(running.address) as client:
            groups = range(2 * len(names))
            first = {group: client.generate(prompt_of(group, 0), max_tokens=4, timeout=20) for group in groups}
            assert {answer.replica for answer in first.values()} == set(names)
            until(lambda: _published(client) >= len(groups) * TOKENS // 16, "hints in Redis")
            for agent in range(1, 4):
                for group in groups:
                    answer = client.generate(prompt_of(group, agent), max_tokens=4, timeout=20)
                    assert answer.replica == first[group].replica
                    assert answer.usage.cached_tokens >= TOKENS
                    assert answer.token_ids == generate(prompt_of(group, agent), 4, 256)
        computed = sum(
            server.stats().totals.prompt_tokens - server.stats().totals.cached_tokens for server in servers.values()
        )
        assert computed < len(groups) * (TOKENS + 4 * 30)


def test_what_is_cached_is_found_by_a_gateway_that_has_just_started(redis: RedisServer) -> None:
    """It has sent nothing itself: Redis knows. Replicas say of each other what they hold."""
    with replicas(redis, "new:", "abc") as servers:
        with Client(servers["b"].address) as direct:
            direct.generate(prompt_of(1, 0), max_tokens=1, timeout=20)
        with Client(servers["a"].address) as other:
            until(lambda: other.lookup(prompt_of(1, 0), timeout=20).elsewhere, "hints in Redis")
        with gateway(redis, "new:", "abc") as running, Client(running.address) as client:
            for agent in range(1, 4):
                answer = client.generate(prompt_of(1, agent), max_tokens=1, timeout=20)
                assert (answer.replica, answer.usage.cached_tokens) == ("b", TOKENS)


def test_many_agents_at_once_get_what_one_engine_would_say(redis: RedisServer) -> None:
    """Thirty in five groups, at the same time."""
    with replicas(redis, "many:", "ab"), gateway(redis, "many:", "ab") as running, Client(running.address) as client:

        def ask(number: int) -> bool:
            prompt = prompt_of(number % 5, number)
            return client.generate(prompt, max_tokens=6, timeout=30).token_ids == generate(prompt, 6, 256)

        with ThreadPoolExecutor(10) as threads:
            assert all(threads.map(ask, range(30)))
        stats = client.stats(timeout=10)
        assert stats.requests.finished == 30
        assert stats.hints is not None and stats.hints.replica_id == "a, b"


def test_replicas_come_and_go(redis: RedisServer) -> None:
    """Within about a second, without anybody telling the gateway; one that drains gets nothing new."""
    prefix = "come:"
    with (
        replicas(redis, prefix, "a") as first,
        gateway(redis, prefix, "a") as running,
        Client(running.address) as client,
    ):
        with replicas(redis, prefix, "b") as second:
            until(lambda: running.serving() == ["a", "b"], "the second replica")
            until(
                lambda: client.generate(prompt_of(random.randrange(10**9), 0), max_tokens=1).replica == "b", "its turn"
            )
            second["b"].drain(5)
            until(lambda: running.serving() == ["a"], "the first alone")
            assert client.generate(prompt_of(3, 0), max_tokens=1, timeout=10).replica == "a"
        until(lambda: [one.id for one in running.gateway.fleet.all] == ["a"], "the end of the second replica")
        first["a"].drain(5)
        until(lambda: running.serving() == [], "nobody")
        with pytest.raises(Unavailable, match="shutting down"):
            client.generate("x", timeout=10)


def test_without_redis_it_goes_on() -> None:
    """With the replicas it knew and what it remembers; when Redis is back, with that."""
    with (
        RedisServer() as own,
        capture_logs() as lines,
        replicas(own, "own:", "ab"),
        gateway(own, "own:", "ab") as running,
        Client(running.address) as client,
    ):
        where = [client.generate(prompt_of(group, 0), max_tokens=1, timeout=20).replica for group in range(6)]
        own.stop()
        until(lambda: any("stay in use" in line["event"] for line in lines), "a line in the log")
        for group in range(6):
            answer = client.generate(prompt_of(group, 1), max_tokens=1, timeout=20)
            assert (answer.replica, answer.usage.cached_tokens) == (where[group], TOKENS)
        assert running.serving() == ["a", "b"]
        own.start()
        until(lambda: any("Redis answers again" in line["event"] for line in lines), "another line")
        assert client.generate(prompt_of(1, 2), max_tokens=1, timeout=20).replica == where[1]


def test_a_gateway_that_has_never_seen_redis_says_so() -> None:
    """To callers in general terms, in the log in full; where it is fails nobody else."""
    with (
        capture_logs() as lines,
        RunningGateway(redis=f"redis://127.0.0.1:{free_port()}") as blind,
        Client(blind.address) as client,
    ):
        with pytest.raises(Unavailable, match=r"no replica is known, since Redis cannot be asked; .*log"):
            client.generate("x", timeout=10)
        assert any("refuses connections" in line["event"] or "cannot be reached" in line["event"] for line in lines)
        with pytest.raises(Unavailable):
            client.invalidate(everything=True, timeout=10)


def test_a_redis_that_has_lost_everything_costs_nothing() -> None:
    """The replicas are there all the same, register anew, and are found again."""
    with (
        RedisServer() as own,
        replicas(own, "own:", "ab", lease_seconds=2),
        gateway(own, "own:", "ab") as running,
        Client(running.address) as client,
    ):
        where = client.generate(prompt_of(1, 0), max_tokens=1, timeout=20).replica
        own.cli("flushall")
        for agent in range(1, 4):
            assert client.generate(prompt_of(1, agent), max_tokens=1, timeout=20).replica == where
        until(
            lambda: own.cli("hlen", own.cli("keys", "*:replicas").strip() or "none").strip() == "2", "both to register"
        )
        assert running.serving() == ["a", "b"]


def test_a_replica_is_known_once(redis: RedisServer) -> None:
    """Also if it is named by its address and registered in Redis."""
    with replicas(redis, "once:", "ab") as servers, gateway(redis, "once:", "ab", servers["a"].address) as running:
        until(lambda: not any(one.fixed for one in running.gateway.fleet.all), "one way of knowing it")
        assert running.serving() == ["a", "b"]


def test_of_several_groups_the_largest_is_used(redis: RedisServer) -> None:
    """The log says which, and which others there are; one can be named, or a deployment."""
    prefix = "groups:"
    with (
        replicas(redis, prefix, "a", deployment="small"),
        replicas(redis, prefix, "bc", deployment="large"),
        capture_logs() as lines,
    ):
        with gateway(redis, prefix, "bc") as running:
            assert str(running.gateway.fleet.group).startswith("large:")
        assert any("there are other groups, with fewer replicas: small:" in line["event"] for line in lines)
        with RunningGateway(redis=redis.url, redis_prefix=prefix, deployment="small") as running:
            until(lambda: running.serving() == ["a"], "the small deployment")
            name = str(running.gateway.fleet.group)
        with RunningGateway(redis=redis.url, redis_prefix=prefix, group=name) as running:
            until(lambda: running.serving() == ["a"], "the group that was named")
        with (
            RunningGateway(redis=redis.url, redis_prefix=prefix, group="other:ab:16") as running,
            Client(running.address) as client,
            pytest.raises(Unavailable, match="no replica is running"),
        ):
            client.generate("x", timeout=10)
