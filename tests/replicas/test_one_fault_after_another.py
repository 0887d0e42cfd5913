"""Random requests, many of them cancelled, while one thing after another breaks: only the killed lose streams."""

from __future__ import annotations

import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from prefixcache.client import Client
from prefixcache.errors import Unavailable
from tests.engine.paper import generate
from tests.redis import Line, RedisServer
from tests.replicas.processes import Deployment, Replica, complete, leases
from tests.replicas.traffic import VOCABULARY, beginning
from tests.waiting import until

SEED = 1000
CALLERS = 6
TIMEOUT = 60.0


class Load:
    """Callers who send one request after another until they are told to stop; each answer is checked."""

    def __init__(self, address: str, seed: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self.killed: set[str] = set()
        self._address = address
        self._seed = seed
        self._numbers = itertools.count()
        self._enough = threading.Event()
        self._pool = ThreadPoolExecutor(CALLERS)

    def begin(self) -> None:
        self._callers = [self._pool.submit(self._call) for _ in range(CALLERS)]

    def go_on(self, requests: int) -> None:
        """Return when so many more have ended."""
        wanted = self.outcomes.total() + requests
        until(lambda: self.outcomes.total() >= wanted or self._broken(), f"{requests} more requests")

    def end(self) -> None:
        """Return when all have ended. Raises what was wrong with an answer."""
        self._enough.set()
        for caller in self._callers:
            caller.result()
        self._pool.shutdown()

    def _broken(self) -> bool:
        return any(caller.done() for caller in self._callers)

    def _call(self) -> None:
        with Client(self._address) as client:
            while not self._enough.is_set():
                outcome = self._ask(client, random.Random(self._seed + next(self._numbers)))
                self.outcomes[outcome] += 1  # only read elsewhere, and a count that is lost is made up for

    def _ask(self, client: Client, dice: random.Random) -> str:
        prompt = beginning(dice.randrange(6), 16)[: dice.randrange(1, 257)]
        prompt += dice.choices(range(VOCABULARY), k=dice.randrange(1, 40))
        count = dice.randrange(1, 60)
        pieces = dice.randrange(4) if dice.random() < 0.25 else None
        try:
            with client.stream(prompt, max_tokens=count, timeout=TIMEOUT) as stream:
                for _ in itertools.islice(stream, pieces):
                    pass
                if pieces is not None:
                    return "cancelled"
                completion = stream.result()
        except Unavailable as error:
            gone = any(f"replica {name} has gone while it answered" in str(error) for name in self.killed)
            if stream.started is None or not gone:
                raise
            return "lost"
        assert completion.token_ids == generate(prompt, count, VOCABULARY)
        assert completion.usage.cached_tokens + completion.usage.computed_tokens == len(prompt)
        return "answered"


def test_nothing_is_lost_but_streams_of_the_killed(redis: RedisServer, deployment: Deployment) -> None:
    """Every answer is right, or says that its replica has gone; afterwards no block is in use, hints are complete."""
    with Line(redis.port) as line:
        url = f"redis://127.0.0.1:{line.port}"
        replicas = deployment.replicas("a b c", url, blocks=96, max_running=3, step_seconds=0.002)
        gateway = deployment.gateway("--redis", url).wait_for(*replicas)
        load = Load(gateway.address, SEED)

        def kill(replica: Replica) -> None:
            load.killed.add(replica.id)
            replica.kill()
            load.go_on(10)
            replica.start()
            gateway.wait_for(*replicas)
            load.go_on(10)

        def stop(replica: Replica) -> None:
            replica.process.pause()
            until(lambda: replica.id not in leases(redis.url), "the end of its lease")
            load.go_on(2)
            replica.process.resume()
            gateway.wait_for(*replicas)
            load.go_on(10)

        def for_some_requests(happen: Callable[[], object], undo: Callable[[], object]) -> None:
            happen()
            load.go_on(10)
            undo()
            load.go_on(10)

        faults: list[Callable[[], object]] = [
            *(partial(kill, replica) for replica in replicas),
            partial(stop, replicas[0]),
            partial(for_some_requests, redis.stop, redis.start),
            partial(for_some_requests, redis.pause, redis.resume),
            partial(for_some_requests, partial(setattr, line, "delay", 1.0), partial(setattr, line, "delay", 0.0)),
            partial(for_some_requests, line.cut, partial(redis.cli, "FLUSHALL")),
        ]
        random.Random(SEED).shuffle(faults)
        load.begin()
        try:
            for fault in faults:
                load.go_on(5)
                fault()
        finally:
            load.end()
        assert load.outcomes["answered"] >= 100 and load.outcomes["cancelled"]
        for replica in replicas:
            until(replica.is_idle, f"that nothing is left on {replica.id}")
        gateway.wait_for(*replicas)
        until(lambda: complete(redis.url, replicas, [beginning(seed, 16) for seed in range(6)]), "complete hints")
