"""GenerationService: requests go to the engine, events come back.

A call that has been submitted is aborted in the `finally` that every end of it passes,
so a caller who leaves, at any point, leaves nothing behind.
"""
# ruff: noqa: N802 - the protocol names the methods

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

import structlog

from engine import wire
from engine.assembly import Engine
from engine.events import EventStream
from engine.front import Context, Front
from engine.loop import clock
from engine.quotas import Quota
from engine.request import Failed, Finished, Request, Sampled, Started
from engine.scheduler import Scheduler
from engine.tokenizer import TextStream
from prefixcache.v1 import generation_pb2, generation_pb2_grpc

log = structlog.get_logger()


class Generation(generation_pb2_grpc.GenerationServiceServicer):
    def __init__(self, front: Front) -> None:
        self._front = front

    async def Generate(self, message: generation_pb2.GenerateRequest, context: Context) -> None:  # type: ignore[override]  # the stub knows generators only
        with self._front.computing(context) as quota:
            await self._generate(message, context, quota)

    async def _generate(self, message: generation_pb2.GenerateRequest, context: Context, quota: Quota) -> None:
        front, engine = self._front, self._front.engine
        arrival = clock()
        remaining = context.time_remaining()
        generation = wire.read_generate(message, engine.served, front.caller(context).tenant, front.terms)
        prompt = await front.encode(generation.prompt, engine.served.max_length - 1)
        # Stop strings are looked for as events come, and what is generated behind one is lost work.
        events = front.bridge.open(0.0 if generation.params.stop else front.stream_interval)
        request = Request(
            id=generation.id,
            prompt=prompt,
            params=generation.params,
            seed=generation.seed,
            sink=events.sink,
            namespace=generation.namespace,
            read=generation.read,
            store=generation.store,
            terms=generation.terms,
            keep_for=generation.keep_for,
            arrival=arrival,
            deadline=None if remaining is None else arrival + remaining,
        )
        front.active += 1
        try:
            engine.loop.submit(request)
            saw = partial(front.shapes.saw, generation.prompt, generation.namespace, tokenizer=engine.tokenizer)
            await _relay(front, engine, request, events, context, quota, saw)
        except BaseException as error:
            if generation.end_session and isinstance(error, asyncio.CancelledError):
                session = generation.terms.session
                engine.loop.call(lambda scheduler: scheduler.cache.end_session(request.namespace, session))
            quota.charge(events.left(Sampled), clock())  # what nobody has read was computed all the same
            raise
        finally:
            front.active -= 1
            engine.loop.abort(request)

    async def Tokenize(
        self, message: generation_pb2.TokenizeRequest, context: Context
    ) -> generation_pb2.TokenizeResponse:
        namespace = wire.read_namespace(self._front.caller(context).tenant, message.namespace, "namespace")
        ids = await self._front.encode(wire.read_prompt(message.prompt))
        hashes = await self._front.hashes(ids, namespace) if message.with_block_hashes else b""
        return wire.write_tokens(ids, hashes, with_ids=not message.without_token_ids)

    async def GetModel(
        self, message: generation_pb2.GetModelRequest, context: Context
    ) -> generation_pb2.GetModelResponse:
        return wire.write_model(self._front.engine.served)


async def _relay(
    front: Front,
    engine: Engine,
    request: Request,
    events: EventStream,
    context: Context,
    quota: Quota,
    saw: Callable[[Started], None],
) -> None:
    """Send a request's events to the caller until the last one. Raises the error of a `Failed`."""
    stream = TextStream(engine.tokenizer, request.params.stop)
    last: Finished | None = None
    while last is None:
        text = ""
        tokens: list[Sampled] = []
        batch = await events.next()
        quota.charge(sum(isinstance(event, Sampled) for event in batch), clock())
        for event in batch:
            match event:
                case Started():
                    quota.charge(event.prompt_tokens - event.cached_tokens, clock())
                    saw(event)
                    await context.write(wire.write_started(request.id, event))
                case Sampled() if stream.stop is None:
                    text += stream.push(event.token)
                    tokens.append(event)
                case Finished():
                    last = event
                    text += stream.flush()
                case Failed() if stream.stop is None:
                    raise event.error
        if tokens or text:
            await context.write(wire.write_delta(text, tokens))
        if stream.stop is not None:
            complete = partial(Scheduler.complete, request=request, now=clock(), completion_tokens=stream.tokens)
            last = await front.ask(complete)
    await context.write(wire.write_finished(last, stream.stop))
    log.debug(
        "finished",
        request_id=request.id,
        reason=last.reason.value,
        prompt_tokens=last.usage.prompt_tokens,
        cached_tokens=last.usage.cached_tokens,
        completion_tokens=last.usage.completion_tokens,
        seconds=round(last.timings.total, 4),
    )
