"""Events on their way from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import threading

import pytest

from engine.events import EventBridge, EventStream
from engine.request import Event, Failed, Sampled, Started
from prefixcache.errors import Unavailable
from prefixcache.reasons import MissReason


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


async def test_a_paced_stream_bundles_tokens_but_holds_back_nothing_else() -> None:
    """The first token comes at once, those after it when the interval is over, an ending without waiting."""
    bridge = EventBridge(asyncio.get_running_loop())
    started, failed = Started(1, 0, MissReason.NONE, 0), Failed(Unavailable("over"))
    stream = bridge.open(interval=3600)
    for event in (started, Sampled(0)):
        stream.sink(event)
        assert await stream.next() == [event]
    stream.sink(Sampled(1))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(stream.next(), 0.05)
    stream.sink(Sampled(2))
    stream.sink(failed)
    assert await stream.next() == [Sampled(1), Sampled(2), failed]

    stream = bridge.open(interval=0.05)
    stream.sink(Sampled(0))
    assert await stream.next() == [Sampled(0)]
    stream.sink(Sampled(1))
    assert await asyncio.wait_for(stream.next(), 10) == [Sampled(1)]


def test_events_for_a_loop_that_is_closed_are_dropped() -> None:
    """The engine's thread may still be at work when the server has gone; it must not fail for that."""
    loop = asyncio.new_event_loop()
    stream = EventBridge(loop).open()
    loop.close()
    stream.sink(Sampled(1))
    stream.sink(Sampled(2))
