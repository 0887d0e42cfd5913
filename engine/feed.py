"""What is stored in the cache and what is removed from it, told to those who watch.

A tenant that is watched has a channel: a numbering of its own and its latest events.
A watcher has no queue, only the number of the last event it was given. So one who is
slow costs nothing, one who falls behind what the channel keeps is dropped, and one who
comes back is no different from one who was slow. A channel without watchers goes on
for a while, for those who come back.

    engine's thread   changes are posted as they happen; a snapshot is taken between two
                      steps and posted as well, which is its place among the changes
    event loop        what was posted is numbered in its order, and watchers are woken

The cache has a listener only while there is a channel, or one who hears everything, since
hashes cost time.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple, Self

from engine.scheduler import Scheduler
from engine.tenants import tenant_of
from prefixcache.cache import PrefixCache
from prefixcache.errors import OutOfRange, PrefixCacheError, ResourceExhausted, Unavailable
from prefixcache.lease import CacheEvent, Stored
from prefixcache.tokens import HASH_BYTES

KEPT_BYTES = 8 << 20
"""How much of its latest events a channel keeps: about 30,000 changes of a block, or 500,000 blocks in long runs."""
KEPT_SECONDS = 300.0
"""How long a channel goes on without watchers."""
MAX_WATCHERS = 16
"""Of a tenant, at a time: each may hold a snapshot while it reads it."""
PAUSE_SECONDS = 0.02
"""Between two deliveries, so that many small changes do not wake the event loop for each."""

_EVENT_BYTES = 256  # besides its hashes


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Blocks that were stored before; parents first."""

    stored: Stored


@dataclass(frozen=True, slots=True)
class SnapshotEnd:
    """The snapshot is complete; it named so many blocks."""

    blocks: int


class Numbered(NamedTuple):
    """An event and the number of the last change that is known with it."""

    sequence: int
    event: Snapshot | SnapshotEnd | CacheEvent


class Feed:
    """Lives in one event loop; `call` runs a function on the engine's thread between two steps."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, call: Callable[[Callable[[Scheduler], None]], Future[None]]
    ) -> None:
        self.kept_bytes = KEPT_BYTES
        self.kept_seconds = KEPT_SECONDS
        self._loop = loop
        self._call = call
        self._channels: dict[str, _Channel] = {}
        self._timer: asyncio.Handle | None = None
        self._closed = False
        # From here on for the engine's thread as well.
        self._heard: frozenset[str] = frozenset()
        self._hears_all: Callable[[CacheEvent], None] | None = None
        self._posted: deque[tuple[str, CacheEvent | Watcher]] = deque()
        self._woken = False

    @asynccontextmanager
    async def watch(self, tenant: str, after: tuple[str, int] | None = None) -> AsyncIterator[Watcher]:
        """Watch the namespaces of a tenant: from a snapshot on, or `after` an event (its stream id and number).

        Raises OutOfRange if not everything after that event is kept, ResourceExhausted
        if the tenant has too many watchers, Unavailable if the server is shutting down.
        """
        if self._closed:
            raise _shutting_down()
        channel = self._resumed(tenant, *after) if after is not None else self._channel(tenant)
        watcher = Watcher(channel, None if after is None else after[1])
        channel.enter(watcher)
        try:
            if after is None:
                joining = self._call(lambda scheduler: self._join(scheduler.cache, tenant, watcher))
                await asyncio.wrap_future(joining)
            yield watcher
        finally:
            channel.leave(watcher)

    def close(self) -> None:
        """Tell every watcher that the server is shutting down, and let nobody else watch."""
        self._closed = True
        for channel in self._channels.values():
            channel.close()

    # On the event loop

    def _channel(self, tenant: str) -> _Channel:
        channel = self._channels.get(tenant)
        if channel is None:
            channel = self._channels[tenant] = _Channel(self, self._loop, lambda: self._expire(tenant))
        return channel

    def _resumed(self, tenant: str, stream_id: str, sequence: int) -> _Channel:
        channel = self._channels.get(tenant)
        if channel is None or channel.stream_id != stream_id or not channel.keeps(sequence):
            raise OutOfRange(
                "what has happened after that event is not known any more: "
                "start over, without stream_id and sequence, with a snapshot"
            )
        return channel

    def _expire(self, tenant: str) -> None:
        del self._channels[tenant]
        with contextlib.suppress(Unavailable):  # an engine that has stopped says nothing more
            self._call(lambda scheduler: self._leave(scheduler.cache, tenant))

    def _wake(self) -> None:
        if self._timer is None:
            self._deliver()

    def _deliver(self) -> None:
        """Hand out what was posted, and look again after a pause until nothing has come."""
        if not self._posted:
            self._timer = None
            self._woken = False  # before looking again, so that what comes from now on wakes
            if self._posted:
                self._timer = self._loop.call_soon(self._deliver)
            return
        changed = set()
        while self._posted:
            tenant, event = self._posted.popleft()
            channel = self._channels.get(tenant)
            if isinstance(event, Watcher):
                event.begin()
            elif channel is not None:
                channel.add(event)
                changed.add(channel)
        for channel in changed:
            channel.wake()
        self._timer = self._loop.call_later(PAUSE_SECONDS, self._deliver)

    # On the engine's thread

    def hear_all(self, cache: PrefixCache, listener: Callable[[CacheEvent], None]) -> None:
        """Tell one listener of every change from now on, whosever it is, on the engine's thread, as it happens."""
        self._hears_all = listener
        cache.listener = self._listen

    def _join(self, cache: PrefixCache, tenant: str, watcher: Watcher) -> None:
        self._heard |= {tenant}
        cache.listener = self._listen
        watcher.snapshot.extend(cache.stored(tenant))
        self._post(tenant, watcher)

    def _leave(self, cache: PrefixCache, tenant: str) -> None:
        self._heard -= {tenant}
        if not self._heard and self._hears_all is None:
            cache.listener = None

    def _listen(self, event: CacheEvent) -> None:
        if self._hears_all is not None:
            self._hears_all(event)
        if not self._heard:
            return
        tenant = tenant_of(event.namespace)
        if tenant in self._heard:
            self._post(tenant, event)

    def _post(self, tenant: str, event: CacheEvent | Watcher) -> None:
        self._posted.append((tenant, event))
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._wake)
            except RuntimeError:  # the loop is closed, so nobody watches any more
                assert self._loop.is_closed()


class Watcher:
    """One who watches; iterate over it for its events. `stream_id` names their numbering.

    Iterating ends only by an error: OutOfRange if it was too slow, Unavailable if the
    server shuts down.
    """

    def __init__(self, channel: _Channel, sequence: int | None) -> None:
        self.stream_id = channel.stream_id
        self.sequence = sequence
        self.snapshot: deque[Stored] = deque()
        self._channel = channel
        self._blocks: int | None = None
        self._arrived = asyncio.Event()
        self._failure: PrefixCacheError | None = None

    def begin(self) -> None:
        """The snapshot is there: it contains every change so far."""
        self.sequence = self._channel.sequence
        self._blocks = sum(len(stored.hashes) for stored in self.snapshot) // HASH_BYTES
        self.ring()

    def ring(self) -> None:
        """Say that there may be something new."""
        self._arrived.set()

    def fail(self, error: PrefixCacheError) -> None:
        """Nothing more comes but this error."""
        self._failure = error
        self.snapshot.clear()
        self.ring()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Numbered:
        while True:
            self._arrived.clear()
            if self._failure is not None:
                raise self._failure
            if self.sequence is not None and (event := self._next(self.sequence)) is not None:
                return event
            await self._arrived.wait()

    def _next(self, sequence: int) -> Numbered | None:
        if self.snapshot:
            return Numbered(sequence, Snapshot(self.snapshot.popleft()))
        if self._blocks is not None:
            end, self._blocks = SnapshotEnd(self._blocks), None
            return Numbered(sequence, end)
        change = self._channel.after(sequence)
        if change is None:
            return None
        self.sequence = sequence + 1
        return Numbered(sequence + 1, change)


class _Channel:
    """The events of one tenant, numbered from 1, of which the latest are kept, and those who watch them."""

    def __init__(self, feed: Feed, loop: asyncio.AbstractEventLoop, expire: Callable[[], None]) -> None:
        self.stream_id = secrets.token_hex(8)
        self.sequence = 0
        self._feed = feed
        self._loop = loop
        self._expire = expire
        self._watchers: set[Watcher] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._events: dict[int, CacheEvent] = {}
        self._bytes = 0

    def enter(self, watcher: Watcher) -> None:
        """Raises ResourceExhausted if there are too many."""
        if len(self._watchers) >= MAX_WATCHERS:
            raise ResourceExhausted(
                f"{MAX_WATCHERS} calls are watching events already, which is the most allowed: end one of them first"
            )
        self._watchers.add(watcher)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def leave(self, watcher: Watcher) -> None:
        """Idempotent."""
        if watcher in self._watchers:
            self._watchers.remove(watcher)
            if not self._watchers:
                self._timer = self._loop.call_later(self._feed.kept_seconds, self._expire)

    def close(self) -> None:
        for watcher in self._watchers:
            watcher.fail(_shutting_down())

    def add(self, event: CacheEvent) -> None:
        self.sequence += 1
        self._events[self.sequence] = event
        self._bytes += _size(event)
        while self._bytes > self._feed.kept_bytes:
            oldest = self.sequence - len(self._events) + 1
            self._bytes -= _size(self._events.pop(oldest))

    def keeps(self, sequence: int) -> bool:
        """Whether every event after that number is there."""
        return self.sequence - len(self._events) <= sequence <= self.sequence

    def after(self, sequence: int) -> CacheEvent | None:
        return self._events.get(sequence + 1)

    def wake(self) -> None:
        """Wake the watchers, and drop those that are too far behind."""
        for watcher in list(self._watchers):
            if watcher.sequence is None or self.keeps(watcher.sequence):
                watcher.ring()
                continue
            watcher.fail(
                OutOfRange(
                    "events came faster than they were read, and those not read are not kept any more: "
                    "start over, without stream_id and sequence, with a snapshot; and read faster"
                )
            )
            self.leave(watcher)


def _size(event: CacheEvent) -> int:
    return len(event.hashes) + _EVENT_BYTES


def _shutting_down() -> Unavailable:
    return Unavailable("the server is shutting down: watch the one that replaces it, from a snapshot on")
