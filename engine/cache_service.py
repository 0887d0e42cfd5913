"""CacheService: looks into the cache, and steers it."""
# ruff: noqa: N802 - the protocol names the methods

from __future__ import annotations

from collections.abc import AsyncIterator

from engine import cache_wire, wire
from engine.front import Context, Front
from prefixcache.v1 import cache_pb2, cache_pb2_grpc


class Cache(cache_pb2_grpc.CacheServiceServicer):
    def __init__(self, front: Front) -> None:
        self._front = front

    async def Lookup(self, message: cache_pb2.LookupRequest, context: Context) -> cache_pb2.LookupResponse:
        namespace = wire.read_namespace(self._front.caller(context).tenant, message.namespace, "namespace")
        prompt = wire.read_prompt(message.prompt)
        ids = await self._front.encode(prompt)
        found = await self._front.ask(lambda scheduler: scheduler.lookup(ids, namespace))
        place = await self._front.locate(prompt, found.cached_tokens) if message.with_text else None
        return cache_wire.write_found(len(ids), found, place)

    async def GetStats(self, message: cache_pb2.GetStatsRequest, context: Context) -> cache_pb2.GetStatsResponse:
        engine = self._front.engine
        stats = await self._front.ask(lambda scheduler: scheduler.stats())
        return cache_wire.write_stats(
            stats,
            block_size=engine.served.block_size,
            bytes_per_block=engine.bytes_per_block,
            uptime=self._front.uptime,
        )

    async def Pin(self, message: cache_pb2.PinRequest, context: Context) -> cache_pb2.PinResponse:
        raise NotImplementedError

    async def Unpin(self, message: cache_pb2.UnpinRequest, context: Context) -> cache_pb2.UnpinResponse:
        raise NotImplementedError

    async def ListPins(self, message: cache_pb2.ListPinsRequest, context: Context) -> cache_pb2.ListPinsResponse:
        raise NotImplementedError

    async def EndSession(self, message: cache_pb2.EndSessionRequest, context: Context) -> cache_pb2.EndSessionResponse:
        raise NotImplementedError

    async def Invalidate(self, message: cache_pb2.InvalidateRequest, context: Context) -> cache_pb2.InvalidateResponse:
        raise NotImplementedError

    async def WatchEvents(self, message: cache_pb2.WatchEventsRequest, context: Context) -> None:  # type: ignore[override]  # the stub knows generators only
        after = cache_wire.read_watch(message)
        tenant = self._front.caller(context).tenant
        async with self._front.feed.watch(tenant, after) as watcher:
            async for numbered in watcher:
                await context.write(cache_wire.write_event(watcher.stream_id, numbered))

    async def WatchPrompts(self, message: cache_pb2.WatchPromptsRequest, context: Context) -> None:  # type: ignore[override]  # the stub knows generators only
        raise NotImplementedError

    async def Warm(self, messages: AsyncIterator[cache_pb2.WarmRequest], context: Context) -> None:  # type: ignore[override]  # the stub knows generators only
        raise NotImplementedError
