"""What this server says of itself to other replicas, and hears of them, through Redis.

    open -> start (the engine is loaded) -> drain -> stop

The engine's thread hands every change of the cache to the publisher, which never keeps
it waiting; a reader's questions have a budget, and no answer means that nothing is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engine.config import EngineConfig
from engine.feed import Feed
from engine.loop import EngineLoop, clock
from engine.scheduler import Scheduler
from engine.secret import read_secret, warn_of_secret
from engine.wire import ServedModel
from prefixcache.errors import Unavailable
from prefixcache.hints.connection import NoHints
from prefixcache.hints.locator import Locator
from prefixcache.hints.publisher import Publisher, PublisherStatus
from prefixcache.hints.schema import Group, Lease
from prefixcache.hosts import host_and_port

BUDGET_SECONDS = 0.08
"""How long a lookup may wait for what others hold."""
LEASES_SECONDS = 1.0
"""How long the list of the others is good for."""


class Holder(NamedTuple):
    """Another replica, where it is reached, and how many of a prompt's tokens it holds."""

    replica_id: str
    address: str
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class HintStatus:
    """Under which name this server publishes, and how that goes."""

    replica_id: str
    publisher: PublisherStatus


class Hints:
    """Lives in one event loop. Without --redis, it says and knows nothing."""

    def __init__(self, config: EngineConfig, feed: Feed) -> None:
        self._config = config
        self._feed = feed
        self._locator: Locator | None = None
        self._publisher: Publisher | None = None
        self._group: Group | None = None
        self._replica_id = ""
        self._leases: Sequence[Lease] = ()
        self._asked = -LEASES_SECONDS
        self._asking = asyncio.Lock()

    @property
    def used(self) -> bool:
        """Whether this server has a Redis."""
        return bool(self._config.redis)

    @property
    def status(self) -> HintStatus | None:
        """How publishing goes; None if nothing is published."""
        return None if self._publisher is None else HintStatus(self._replica_id, self._publisher.status)

    def name(self, port: int) -> str:
        """Return the name of this server, listening on `port`, among its replicas; "" if it has none."""
        if self._config.replica_id or not self.used:
            return self._config.replica_id
        host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())
        return f"{host[:58]}-{port}"

    def open(self) -> None:
        """Before the model is loaded: check secret and URL. Raises InvalidArgument if one is of no use."""
        read_secret(self._config.secret_file)
        warn_of_secret(self._config.secret_file, published=self.used)
        if self.used:
            self._locator = Locator(self._config.redis, prefix=self._config.redis_prefix)

    async def start(self, loop: EngineLoop, served: ServedModel, blocks: int, port: int) -> None:
        """Begin to publish what an engine with so many blocks has cached; it listens on `port`."""
        config = self._config
        if not self.used:
            return

        def restart(scheduler: Scheduler) -> None:
            publisher.restart(scheduler.cache.stored())

        def resync() -> None:
            with contextlib.suppress(Unavailable):  # an engine that has stopped stores nothing any more
                loop.call(restart)

        self._group = Group(config.deployment, served.fingerprint, served.block_size)
        self._replica_id = self.name(port)
        address = config.advertise or host_and_port(config.host, port)
        publisher = Publisher(
            config.redis,
            group=self._group,
            replica_id=self._replica_id,
            address=address,
            model=served.name,
            blocks=blocks,
            load=loop.load,
            resync=resync,
            prefix=config.redis_prefix,
            lease_seconds=config.lease_seconds,
        )

        def begin(scheduler: Scheduler) -> None:
            self._feed.hear_all(scheduler.cache, publisher.heard)
            restart(scheduler)

        await asyncio.wrap_future(loop.call(begin))
        publisher.start()
        self._publisher = publisher

    def drain(self) -> None:
        """Say that nothing new is taken."""
        if self._publisher is not None:
            self._publisher.drain()

    async def stop(self) -> None:
        """Leave, so that nobody waits for the lease to end. Idempotent."""
        if self._publisher is not None:
            await asyncio.to_thread(self._publisher.stop)
        if self._locator is not None:
            locator, self._locator = self._locator, None
            with contextlib.suppress(NoHints):
                await locator.close()

    async def elsewhere(self, hashes: bytes) -> list[Holder]:
        """Return which other replicas hold how much of a prompt, longest first; nothing if it is not known in time."""
        if self._locator is None or self._group is None or not hashes:
            return []
        try:
            async with asyncio.timeout(BUDGET_SECONDS):
                leases = await self._others(self._locator, self._group)
                found = await self._locator.find(self._group, hashes, leases) if leases else {}
        except (NoHints, TimeoutError):
            return []
        size = self._group.block_size
        holders = [
            Holder(lease.replica_id, lease.address, blocks * size)
            for lease in leases
            if (blocks := found.get(lease.replica_id, 0))
        ]
        return sorted(holders, key=lambda holder: -holder.cached_tokens)

    async def _others(self, locator: Locator, group: Group) -> Sequence[Lease]:
        """Return the leases of the other replicas, as of a moment ago. Raises NoHints at most once a moment."""
        async with self._asking:
            if clock() - self._asked >= LEASES_SECONDS:
                self._asked, self._leases = clock(), ()
                leases = await locator.leases(group)
                self._leases = [lease for lease in leases if lease.replica_id != self._replica_id]
        return self._leases
