"""From the engine's thread to the event loop: one wake-up for all events of a step.

Waking an event loop from another thread costs a system call and the interpreter lock;
with many requests in a step, a wake-up per event would slow the engine down. Here the
first event of a burst wakes the loop, and the others are found when it has woken.

A message to a caller costs more than a token is worth when many are generated at once,
on a machine whose cores also run the model. So a stream can be paced: tokens that come
soon after others wait for company, at most for its interval. The first token, and
whatever is not a token, is never held back.
"""

from __future__ import annotations

import asyncio
from collections import deque

from engine.request import Event, Sampled


class EventStream:
    """The events of one request, in order. `sink` may be called on any thread, the rest on the event loop."""

    def __init__(self, bridge: EventBridge, loop: asyncio.AbstractEventLoop, interval: float) -> None:
        self._bridge = bridge
        self._loop = loop
        self._interval = interval
        self._posted: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._holding = False
        self._timer: asyncio.TimerHandle | None = None

    def sink(self, event: Event) -> None:
        """Hand over an event; never waits."""
        self._posted.append(event)  # before looking, so that whoever ends the holding finds it
        if not (self._holding and isinstance(event, Sampled)):
            self._bridge.wake(self)

    async def next(self) -> list[Event]:
        """Wait for events and return all that have come, at least one."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            if self._posted:  # not found already with what was rung for before
                break
        if self._timer is not None:
            self._timer.cancel()
        events = [self._posted.popleft() for _ in range(len(self._posted))]
        if self._interval and isinstance(events[-1], Sampled):
            self._holding = True
            self._timer = self._loop.call_later(self._interval, self._release)
        return events

    def left(self, kind: type[Event]) -> int:
        """Return how many events of a kind have come that `next` has not returned."""
        return sum(isinstance(event, kind) for event in list(self._posted))

    def ring(self) -> None:
        """Say that something has come."""
        self._arrived.set()

    def _release(self) -> None:
        self._holding = False
        if self._posted:
            self.ring()


class EventBridge:
    """Wakes one event loop for the streams of all requests."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[EventStream] = deque()
        self._woken = False

    def open(self, interval: float = 0.0) -> EventStream:
        """Return a stream whose tokens are handed out at most every `interval` seconds."""
        return EventStream(self, self._loop, interval)

    def wake(self, stream: EventStream) -> None:
        """Ring a stream on the event loop; on any thread, never waits."""
        self._waiting.append(stream)
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._ring)
            except RuntimeError:  # the loop is closed, so nobody listens any more
                assert self._loop.is_closed()

    def _ring(self) -> None:
        self._woken = False  # before looking, so that what comes from now on wakes again
        while self._waiting:
            self._waiting.popleft().ring()
