"""Everything happens to Redis while replicas and a gateway serve: nobody's answer suffers, and hints come back."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from prefixcache.client import Client
from prefixcache.errors import Unavailable
from tests.redis import Line, RedisServer
from tests.replicas.processes import LEASE_SECONDS, Deployment, Replica, complete
from tests.replicas.traffic import TIMEOUT, asked, at, beginning
from tests.waiting import until

BLOCKS = 64
"""Of a prefix so long that its requests go where it lies."""


class Traffic:
    """Requests through a gateway that go on as if nothing had happened, each of them checked."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._numbers = itertools.count()
        self.home: dict[int, str] = {}

    @property
    def prompts(self) -> list[list[int]]:
        return [beginning(seed, BLOCKS) for seed in self.home]

    def begin(self, *seeds: int) -> None:
        """Send what nobody knows, and note where it went."""
        for seed in seeds:
            self.home[seed] = at(self._client, beginning(seed, BLOCKS))

    def go_on(self) -> None:
        """Send prompts that begin like those before, and find that each goes where the first one went."""
        for seed, home in self.home.items():
            number = next(self._numbers)
            completion = asked(self._client, [*beginning(seed, BLOCKS), number // 256, number % 256])
            assert (completion.replica, completion.usage.cached_tokens >= BLOCKS * 16) == (home, True)

    def go_on_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.go_on()


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to Redis and the line to it, what undoes it, and for how long it lasts."""

    name: str
    happen: Callable[[RedisServer, Line], object]
    undo: Callable[[RedisServer, Line], object] = lambda redis, line: None
    seconds: float = 0.0
    told: str = ""
    """What replicas come to say meanwhile of their hints, if anything."""

    def __str__(self) -> str:
        return self.name


def restart(redis: RedisServer, line: Line) -> None:
    redis.stop()
    redis.start()


def slow(redis: RedisServer, line: Line) -> None:
    line.delay = 2.5


def quick(redis: RedisServer, line: Line) -> None:
    line.delay = 0.0


def configure(name: str, value: str, password: str | None = None) -> Callable[[RedisServer, object], object]:
    def set_it(redis: RedisServer, line: object) -> None:
        with redis.client(password) as client:
            client.config_set(name, value)

    return set_it


def all_of(*parts: Callable[[RedisServer, Line], object]) -> Callable[[RedisServer, Line], object]:
    def happen(redis: RedisServer, line: Line) -> None:
        for part in parts:
            part(redis, line)

    return happen


def flush(redis: RedisServer, line: Line) -> None:
    with redis.client() as client:
        client.flushall()


def cut(redis: RedisServer, line: Line) -> None:
    line.cut()


LONGER_THAN_A_LEASE = 1.5 * LEASE_SECONDS
LONGER_THAN_A_RENEWAL = 0.5 * LEASE_SECONDS

FAULTS = [
    Fault("killed", lambda redis, _: redis.stop(), lambda redis, _: redis.start(), LONGER_THAN_A_LEASE, "Redis at"),
    Fault("restarted empty", restart),
    Fault("flushed", flush),
    Fault("cut off", cut),
    Fault("paused", lambda redis, _: redis.pause(), lambda redis, _: redis.resume(), LONGER_THAN_A_RENEWAL),
    Fault("slow", slow, quick, LONGER_THAN_A_RENEWAL),
    Fault("full", configure("maxmemory", "1"), configure("maxmemory", "0"), LONGER_THAN_A_RENEWAL),
    Fault(
        "empty and full",
        all_of(configure("maxmemory", "1"), flush),
        configure("maxmemory", "0"),
        LONGER_THAN_A_LEASE,
        "out of memory",
    ),
    Fault(
        "another password",
        all_of(configure("requirepass", "changed"), cut),
        configure("requirepass", "", password="changed"),
        LONGER_THAN_A_LEASE,
        "password",
    ),
]


def told(replica: Replica) -> str:
    """What a replica says of its hints."""
    with Client(replica.address) as client:
        hints = client.stats(timeout=TIMEOUT).hints
    assert hints is not None
    return hints.error


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_nobody_notices(fault: Fault, redis: RedisServer, deployment: Deployment) -> None:
    """Answers are right, prefixes are found by the gateway's own memory, and hints are complete again afterwards."""
    with Line(redis.port) as line:
        url = f"redis://127.0.0.1:{line.port}"
        replicas = deployment.replicas("a b", url, blocks=512)
        gateway = deployment.gateway("--redis", url).wait_for(*replicas)
        with Client(gateway.address) as client:
            traffic = Traffic(client)
            traffic.begin(1, 2)
            until(lambda: complete(redis.url, replicas, traffic.prompts), "that hints are complete")
            fault.happen(redis, line)
            traffic.go_on()
            traffic.begin(3, 4)
            traffic.go_on_for(fault.seconds)
            if fault.told:
                until(lambda: all(fault.told in told(replica) for replica in replicas), "that replicas say why")
            fault.undo(redis, line)
            traffic.go_on()
            traffic.begin(5)
            until(lambda: complete(redis.url, replicas, traffic.prompts), "that hints are complete again")
            traffic.go_on()
            gateway.wait_for(*replicas)


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("refused", "refuses connections: is it running there?"),
        ("wrong password", "refuses this user name and password"),
    ],
)
def test_not_usable_from_the_start(trouble: str, words: str, redis: RedisServer, deployment: Deployment) -> None:
    """Replicas serve; a gateway serves with those that it was told of, one that was told of none says why.

    As soon as Redis can be used, everything is as if it always had been.
    """
    if trouble == "refused":
        redis.stop()
    else:
        configure("requirepass", "changed")(redis, None)
    url = redis.url if trouble == "refused" else f"redis://:right@127.0.0.1:{redis.port}"
    replicas = deployment.replicas("a b", url, blocks=512)
    addresses = [f"--replica={replica.address}" for replica in replicas]
    gateway = deployment.gateway("--redis", url, *addresses).wait_for(*replicas)
    blind = deployment.gateway("--redis", url, ready=False)
    with Client(gateway.address) as client, Client(blind.address) as other:
        until(lambda: all(words in told(replica) for replica in replicas), "that replicas say why")
        with pytest.raises(Unavailable, match="no replica is known, since Redis cannot be asked"):
            other.generate([1, 2, 3], timeout=TIMEOUT)
        traffic = Traffic(client)
        traffic.begin(1, 2)
        traffic.go_on()
        if trouble == "refused":
            redis.start()
        else:
            configure("requirepass", "right", password="changed")(redis, None)
        blind.wait_for(*replicas)
        traffic.go_on()
        traffic.begin(3)
        until(lambda: complete(url, replicas, traffic.prompts), "that hints are complete")
        traffic.go_on()
        for seed, home in traffic.home.items():
            assert at(other, [*beginning(seed, BLOCKS), 7]) == home
