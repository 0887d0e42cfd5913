"""Events on their way from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import threading

from engine.events import EventBridge, EventStream
from engine.request import Event, Sampled


async def take(stream: EventStream, count: int) -> list[Event]:
    events: list[Event] = []
    while len(events) < count:
        batch = await stream.next()
        assert batch
        events += batch
    return events


async def test_events_arrive_once_and_in_order_however_threads_race() -> None:
    """Two engines' worth of events for three requests each: nothing is lost, doubled or mixed up."""
    bridge = EventBridge(asyncio.get_running_loop())
    streams = [bridge.open() for _ in range(6)]

    def post(mine: list[EventStream]) -> None:
        for token in range(2000):
            for stream in mine:
                stream.sink(Sampled(token))

    threads = [threading.Thread(target=post, args=(streams[i::2],)) for i in range(2)]
    for thread in threads:
        thread.start()
    received = await asyncio.wait_for(asyncio.gather(*(take(stream, 2000) for stream in streams)), 30)
    assert all(events == [Sampled(token) for token in range(2000)] for events in received)


async def test_a_burst_is_one_batch() -> None:
    """What was posted before the loop got round to it comes together."""
    bridge = EventBridge(asyncio.get_running_loop())
    stream = bridge.open()
    for token in range(5):
        stream.sink(Sampled(token))
    assert len(await stream.next()) == 5


def test_events_for_a_loop_that_is_closed_are_dropped() -> None:
    """The engine's thread may still be at work when the server has gone; it must not fail for that."""
    loop = asyncio.new_event_loop()
    stream = EventBridge(loop).open()
    loop.close()
    stream.sink(Sampled(1))
    stream.sink(Sampled(2))
