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
import math
from collections import deque
from functools import partial

from engine.request import Event, Sampled


class EventStream:
    """The events of one request, in order. `sink` may be called on any thread, the rest on the event loop."""

    def __init__(self, bridge: EventBridge, loop: asyncio.AbstractEventLoop, interval: float) -> None:
        self.sink = partial(bridge.post, self)
        self._loop = loop
        self._interval = interval
        self._events: list[Event] = []
        self._arrived = asyncio.Event()
        self._due = -math.inf  # when tokens may be handed out again
        self._timer: asyncio.TimerHandle | None = None

    async def next(self) -> list[Event]:
        """Wait for events and return all that have come, at least one."""
        await self._arrived.wait()
        self._arrived.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        events, self._events = self._events, []
        if isinstance(events[-1], Sampled):
            self._due = self._loop.time() + self._interval
        return events

    def deliver(self, event: Event) -> None:
        self._events.append(event)
        if not isinstance(event, Sampled) or self._loop.time() >= self._due:
            self._arrived.set()
        elif self._timer is None:
            self._timer = self._loop.call_at(self._due, self._arrived.set)


class EventBridge:
    """Carries events of all requests to one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._posted: deque[tuple[EventStream, Event]] = deque()
        self._woken = False

    def open(self, interval: float = 0.0) -> EventStream:
        """Return a stream whose tokens are handed out at most every `interval` seconds."""
        return EventStream(self, self._loop, interval)

    def post(self, stream: EventStream, event: Event) -> None:
        """Hand over an event; on any thread, never waits."""
        self._posted.append((stream, event))
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop is closed, so nobody listens any more
                assert self._loop.is_closed()

    def _deliver(self) -> None:
        self._woken = False  # before looking, so that what is posted from now on wakes again
        while self._posted:
            stream, event = self._posted.popleft()
            stream.deliver(event)
