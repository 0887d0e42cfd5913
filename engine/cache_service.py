"""CacheService: looks into the cache, and steers it."""
# ruff: noqa: N802 - the protocol names the methods

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from engine import cache_wire, wire
from engine.front import Context, Front
from engine.loop import clock
from engine.quotas import Quota
from engine.warming import warm
from prefixcache.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from prefixcache.v1 import cache_pb2, cache_pb2_grpc

WARMED_AT_ONCE = 4
"""How many prompts of one Warm call are read, tokenized or computed at the same time."""


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
        room = asyncio.Semaphore(WARMED_AT_ONCE)
        writing = asyncio.Lock()  # a stream takes one message at a time

        async def answer(position: int, message: cache_pb2.WarmRequest, quota: Quota) -> None:
            response = await self._warm(position, message, context, quota)
            async with writing:
                await context.write(response)
            room.release()

        with self._front.computing(context) as quota:
            try:
                async with asyncio.TaskGroup() as group:
                    position = 0
                    await room.acquire()
                    async for message in messages:
                        group.create_task(answer(position, message, quota))
                        position += 1
                        await room.acquire()  # before the next is read: whoever sends too fast has to wait
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None

    async def _warm(
        self, position: int, message: cache_pb2.WarmRequest, context: Context, quota: Quota
    ) -> cache_pb2.WarmResponse:
        """Warm one prompt of a stream. Raises only what concerns the others as well."""
        front = self._front
        remaining = context.time_remaining()
        deadline = None if remaining is None else clock() + remaining
        name, prompt_tokens = str(position), None
        try:
            wanted = cache_wire.read_warm(message, front.caller(context).tenant)
            name = message.id or name
            prompt = await front.encode(wanted.prompt, front.engine.served.max_length - 1)
            prompt_tokens = len(prompt)
            quota.check(clock())
            warmth = await warm(
                front,
                prompt,
                wanted.namespace,
                deadline=deadline,
                charge=lambda tokens: quota.charge(tokens, clock()),
            )
        except (InvalidArgument, FailedPrecondition, ResourceExhausted) as error:
            return cache_wire.write_not_warmed(name, prompt_tokens, error)
        return cache_wire.write_warmed(name, len(prompt), warmth.cached_tokens, warmth.error)
