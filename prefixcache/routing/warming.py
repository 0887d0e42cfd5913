"""Warm of a gateway: every prompt to the replica where it belongs, or to several.

Each replica gets one stream, of the prompts that go there. No more prompts are read from
the caller than are being worked on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

from prefixcache.answering import answer_each
from prefixcache.results import REPLICA
from prefixcache.routing.cache_calls import SERVICE, parsed
from prefixcache.routing.fleet import Fleet, clock
from prefixcache.routing.incoming import Context, Incoming
from prefixcache.routing.merging import merged_warmed
from prefixcache.routing.placement import Placed, Placement
from prefixcache.routing.replica import Metadata, Refused, Replica
from prefixcache.v1 import cache_pb2
from prefixcache.warming import MAX_ID_BYTES

WARM = f"/{SERVICE}/Warm"

AT_ONCE = 4
"""How many prompts of a call are with one replica, which reads no more of them at a time."""


class Warming:
    """Answers Warm calls."""

    def __init__(self, fleet: Fleet, placement: Placement) -> None:
        self._fleet = fleet
        self._placement = placement

    async def warm(self, requests: AsyncIterator[bytes], incoming: Incoming, context: Context) -> Metadata:
        """Write what becomes of each prompt, as it is done; return what goes behind it.

        Raises Refused if a replica ends the whole call, for a reason that concerns all prompts.
        """
        await self._fleet.ready()
        call = _Call(self._fleet, self._placement, incoming)
        at_once = AT_ONCE * max(len(self._fleet.usable), 1)

        async def answer(position: int, data: bytes) -> bytes:
            return (await call.warm(position, data)).SerializeToString()

        try:
            await answer_each(requests, at_once, answer, context.write)
            return await call.end()
        finally:
            await call.close()


class _Call:
    """One Warm call: its lanes, one to each replica that it needs."""

    def __init__(self, fleet: Fleet, placement: Placement, incoming: Incoming) -> None:
        self._fleet = fleet
        self._placement = placement
        self._incoming = incoming
        self._lanes: dict[Replica, _Lane] = {}

    async def warm(self, position: int, data: bytes) -> cache_pb2.WarmResponse:
        """Have a prompt warmed where it belongs. Raises what concerns the other prompts as well."""
        request = parsed(cache_pb2.WarmRequest, data)
        name = request.id if 0 < len(request.id.encode()) <= MAX_ID_BYTES else str(position)
        cache = request.cache
        placed = await self._placement.place(request.prompt, cache.namespace, cache.session_id, self._incoming)
        left = list(placed.replicas)
        count = min(max(request.replicas, 1), len(left))
        first, left[:] = left[:count], left[count:]
        parts = await asyncio.gather(*(self._on_one(replica, left, request, placed) for replica in first))
        response = merged_warmed(parts)
        response.id = name
        return response

    async def _on_one(
        self, replica: Replica, left: list[Replica], request: cache_pb2.WarmRequest, placed: Placed
    ) -> cache_pb2.WarmResponse:
        """Warm a prompt on one replica, or if that cannot be reached on one of those that are left."""
        while True:
            try:
                return await self._try(replica, request, placed)
            except Refused as refused:
                if not refused.unreachable:
                    raise
                self._fleet.failed(replica)
                if not left:
                    error = f"replica {replica.id} cannot be reached: {refused.details}"
                    return cache_pb2.WarmResponse(state=cache_pb2.WARM_STATE_FAILED, error=error)
                replica = left.pop(0)

    async def _try(self, replica: Replica, request: cache_pb2.WarmRequest, placed: Placed) -> cache_pb2.WarmResponse:
        lane = self._lanes.get(replica)
        if lane is None or lane.broken:
            lane = self._lanes[replica] = _Lane(replica, self._incoming)
        sent = self._placement.sent(replica, placed.wanted, request.prompt)
        try:
            response = await lane.warm(request)
            if sent is not None and response.state != cache_pb2.WARM_STATE_FAILED:
                sent.computed(clock())
            return response
        finally:
            if sent is not None:
                sent.done(clock())

    async def end(self) -> Metadata:
        """Wait until all streams have ended in order."""
        await asyncio.gather(*(lane.end() for lane in self._lanes.values()))
        return ((REPLICA, ",".join(sorted(replica.id for replica in self._lanes))),) if self._lanes else ()

    async def close(self) -> None:
        """End the streams now, in whatever state they are."""
        for lane in self._lanes.values():
            lane.close()


class _Lane:
    """A stream of prompts to one replica."""

    def __init__(self, replica: Replica, incoming: Incoming) -> None:
        self.broken = False
        self._replica = replica
        self._call = replica.call(WARM, None, incoming.metadata, incoming.remaining, movable=lambda: True)
        self._room = asyncio.Semaphore(AT_ONCE)
        self._writing = asyncio.Lock()
        self._waiting: dict[str, asyncio.Future[cache_pb2.WarmResponse]] = {}
        self._count = 0
        self._failure: Refused | None = None
        self._reading = asyncio.create_task(self._read())

    async def warm(self, request: cache_pb2.WarmRequest) -> cache_pb2.WarmResponse:
        """Send a prompt and wait for what becomes of it. Raises Refused."""
        async with self._room:
            message = cache_pb2.WarmRequest()
            message.CopyFrom(request)
            message.replicas = 0
            answer: asyncio.Future[cache_pb2.WarmResponse] = asyncio.get_running_loop().create_future()
            async with self._writing:
                if self._reading.done():
                    raise self._end_of_stream()
                name = str(self._count)  # what the replica calls a prompt whose own name is of no use
                self._count += 1
                if len(message.id.encode()) <= MAX_ID_BYTES:
                    message.id = name
                self._waiting[name] = answer
                await self._call.write(message.SerializeToString())
            return await answer

    async def end(self) -> None:
        """Say that there are no more prompts and wait for the end. Raises Refused, unless others have done the rest."""
        await self._call.done_writing()
        await self._reading
        if self._failure is not None and not self._failure.unreachable:
            raise self._failure

    def close(self) -> None:
        """End it now. Idempotent."""
        self._reading.cancel()
        self._call.close()

    async def _read(self) -> None:
        """Hand out the answers until the stream ends, in whichever way."""
        try:
            while (data := await self._call.read()) is not None:
                response = cache_pb2.WarmResponse.FromString(data)
                if (answer := self._waiting.pop(response.id, None)) is not None:
                    answer.set_result(response)
        except Refused as refused:
            self._failure = refused
        finally:
            self.broken = True
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(self._end_of_stream())
                    answer.exception()  # whoever waited for it may have left

    def _end_of_stream(self) -> Refused:
        details = "the stream of prompts has ended early"
        return self._failure or Refused(self._replica.id, grpc.StatusCode.UNAVAILABLE, details)
