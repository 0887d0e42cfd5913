"""From the engine's thread to the event loop: one wake-up for all events of a step.

Waking an event loop from another thread costs a system call and the interpreter lock;
with many requests in a step, a wake-up per event would slow the engine down. Here the
first event of a burst wakes the loop, and the others are found when it has woken.
"""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial

from engine.request import Event


class EventStream:
    """The events of one request, in order. `sink` may be called on any thread, the rest on the event loop."""

    def __init__(self, bridge: EventBridge) -> None:
        self.sink = partial(bridge.post, self)
        self._events: list[Event] = []
        self._arrived = asyncio.Event()

    async def next(self) -> list[Event]:
        """Wait for events and return all that have come, at least one."""
        await self._arrived.wait()
        self._arrived.clear()
        events, self._events = self._events, []
        return events

    def deliver(self, event: Event) -> None:
        self._events.append(event)
        self._arrived.set()


class EventBridge:
    """Carries events of all requests to one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._posted: deque[tuple[EventStream, Event]] = deque()
        self._woken = False

    def open(self) -> EventStream:
        return EventStream(self)

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
