"""CacheService: looks into the cache, and steers it."""
# ruff: noqa: N802 - the protocol names the methods

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

from engine import cache_wire, wire
from engine.front import Context, Front
from engine.loop import clock
from engine.quotas import Quota
from engine.scheduler import Scheduler
from engine.tenants import PUBLISHED, Caller, tenant_of
from engine.warming import Warmth, warm
from prefixcache.answering import answer_each
from prefixcache.cache import PrefixCache
from prefixcache.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from prefixcache.terms import Terms
from prefixcache.tokens import pack
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
        elsewhere = await self._front.elsewhere(ids, namespace)
        return cache_wire.write_found(len(ids), found, place, elsewhere)

    async def GetStats(self, message: cache_pb2.GetStatsRequest, context: Context) -> cache_pb2.GetStatsResponse:
        engine = self._front.engine
        caller = self._front.caller(context)
        tenant = None if caller.admin else caller.tenant
        stats = await self._front.ask(lambda scheduler: scheduler.stats(tenant))
        return cache_wire.write_stats(
            stats,
            block_size=engine.served.block_size,
            bytes_per_block=engine.bytes_per_block,
            uptime=self._front.uptime,
            hints=self._front.hints.status if caller.admin else None,
        )

    async def Pin(self, message: cache_pb2.PinRequest, context: Context) -> cache_pb2.PinResponse:
        front, caller = self._front, self._front.caller(context)
        wanted = cache_wire.read_pin(message, caller)
        prompt = await front.encode(wanted.prompt, front.engine.served.max_length - 1)
        if not wanted.cached_only:
            with front.computing(context) as quota:
                await self._compute(prompt, wanted.namespace, front.terms, context, quota)

        def pin(scheduler: Scheduler) -> cache_pb2.PinResponse:
            cache, packed = scheduler.cache, pack(prompt)
            if wanted.published:
                pinned = cache.publish(packed, wanted.name)
            else:
                pinned = cache.pin(packed, wanted.namespace, wanted.name, ttl=wanted.ttl)
            return cache_wire.write_pinned(len(prompt), pinned, _pin_room(scheduler, caller))

        return await front.ask(pin)

    async def Unpin(self, message: cache_pb2.UnpinRequest, context: Context) -> cache_pb2.UnpinResponse:
        namespace, name = cache_wire.read_unpin(message, self._front.caller(context))

        def unpin(scheduler: Scheduler) -> bool:
            return scheduler.cache.unpublish(name) if message.published else scheduler.cache.unpin(namespace, name)

        if not await self._front.ask(unpin):
            raise NotFound(f"there is no pin {name!r} in this namespace; it may have ended")
        return cache_pb2.UnpinResponse()

    async def ListPins(self, message: cache_pb2.ListPinsRequest, context: Context) -> cache_pb2.ListPinsResponse:
        caller = self._front.caller(context)

        def pins(scheduler: Scheduler) -> cache_pb2.ListPinsResponse:
            cache = scheduler.cache
            found = cache.pins(caller.tenant) + (cache.pins(tenant_of(PUBLISHED)) if caller.admin else [])
            return cache_wire.write_pins(found, _pin_room(scheduler, caller))

        return await self._front.ask(pins)

    async def EndSession(self, message: cache_pb2.EndSessionRequest, context: Context) -> cache_pb2.EndSessionResponse:
        namespace = wire.read_namespace(self._front.caller(context).tenant, message.namespace, "namespace")
        name = wire.read_name(message.session_id, "session_id")
        blocks = await self._front.ask(lambda scheduler: scheduler.cache.end_session(namespace, name))
        return cache_pb2.EndSessionResponse(blocks=blocks)

    async def Invalidate(self, message: cache_pb2.InvalidateRequest, context: Context) -> cache_pb2.InvalidateResponse:
        tenant = self._front.caller(context).tenant
        namespace = wire.read_namespace(tenant, message.namespace, "namespace")
        forget: Callable[[PrefixCache], tuple[int, int]]
        match message.WhichOneof("what"):
            case "prefix":
                packed = pack(await self._front.encode(wire.read_prompt(message.prefix)))
                forget = partial(PrefixCache.invalidate_prefix, packed=packed, namespace=namespace)
            case "session_id":
                name = wire.read_name(message.session_id, "session_id")
                forget = partial(PrefixCache.invalidate_session, namespace=namespace, name=name)
            case "whole_namespace" if message.whole_namespace:
                forget = partial(PrefixCache.invalidate, namespace=namespace)
            case "everything" if message.everything:
                forget = partial(PrefixCache.invalidate_account, account=tenant)
            case _:
                raise InvalidArgument(
                    "nothing is named; send one of prefix, session_id, whole_namespace = true, everything = true"
                )
        freed, in_use = await self._front.ask(lambda scheduler: forget(scheduler.cache))
        return cache_pb2.InvalidateResponse(freed_blocks=freed, in_use_blocks=in_use)

    async def WatchEvents(self, message: cache_pb2.WatchEventsRequest, context: Context) -> None:  # type: ignore[override]  # the stub knows generators only
        after = cache_wire.read_watch(message)
        tenant = self._front.caller(context).tenant
        async with self._front.feed.watch(tenant, after) as watcher:
            async for numbered in watcher:
                self._front.admit(context)  # a token that was taken out since the call began shows nothing more
                await context.write(cache_wire.write_event(watcher.stream_id, numbered))

    async def WatchPrompts(self, message: cache_pb2.WatchPromptsRequest, context: Context) -> None:  # type: ignore[override]  # the stub knows generators only
        caller = self._front.caller(context)
        async with self._front.shapes.watch(caller, message.one_in or 1) as watcher:
            async for shape in watcher:
                self._front.admit(context)  # a token that was taken out since the call began shows nothing more
                await context.write(cache_wire.write_shape(shape))

    async def Warm(self, messages: AsyncIterator[cache_pb2.WarmRequest], context: Context) -> None:  # type: ignore[override]  # the stub knows generators only
        with self._front.computing(context) as quota:

            async def answer(position: int, message: cache_pb2.WarmRequest) -> cache_pb2.WarmResponse:
                return await self._warm(position, message, context, quota)

            await answer_each(messages, WARMED_AT_ONCE, answer, context.write)

    async def _warm(
        self, position: int, message: cache_pb2.WarmRequest, context: Context, quota: Quota
    ) -> cache_pb2.WarmResponse:
        """Warm one prompt of a stream. Raises only what concerns the others as well."""
        front = self._front
        name, prompt_tokens = cache_wire.warm_name(message, position), None
        try:
            wanted = cache_wire.read_warm(message, front.caller(context).tenant, front.terms)
            prompt = await front.encode(wanted.prompt, front.engine.served.max_length - 1)
            prompt_tokens = len(prompt)
            quota.check(clock())
            warmth = await self._compute(prompt, wanted.namespace, wanted.terms, context, quota)
        except (InvalidArgument, FailedPrecondition, ResourceExhausted) as error:
            return cache_wire.write_not_warmed(name, prompt_tokens, error)
        return cache_wire.write_warmed(name, len(prompt), warmth.cached_tokens, warmth.error)

    async def _compute(
        self, prompt: Sequence[int], namespace: str, terms: Terms, context: Context, quota: Quota
    ) -> Warmth:
        """Have a prompt computed ahead of time, within the call's deadline and at the caller's expense."""
        remaining = context.time_remaining()
        return await warm(
            self._front,
            prompt,
            namespace,
            terms=terms,
            deadline=None if remaining is None else clock() + remaining,
            charge=lambda tokens: quota.charge(tokens, clock()),
        )


def _pin_room(scheduler: Scheduler, caller: Caller) -> cache_wire.PinRoom:
    """Blocks under a tenant's pins; to administrators, under all."""
    cache = scheduler.cache
    pinned = cache.pinned_blocks(None if caller.admin else caller.tenant)
    return cache_wire.PinRoom(pinned, cache.pin_budget, cache.now)
