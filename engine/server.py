"""The gRPC server: it carries requests to the engine and events back, and starts and ends in order.

Conversion and checks are in `engine.wire`, all computing is on the engine's thread,
tokenizing in a few threads of its own. A call that has been submitted is aborted in
the `finally` that every end of it passes, so a caller who leaves, at any point, leaves
nothing behind.

    open port (NOT_SERVING) -> load -> warm up -> SERVING -> drain (NOT_SERVING) -> stop
"""
# ruff: noqa: N802 - the protocol names the methods

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from engine import logs, wire
from engine.assembly import Engine, OnDeath, load_engine
from engine.config import EngineConfig
from engine.events import EventBridge, EventStream
from engine.loop import clock
from engine.request import Failed, Finished, Request, Sampled, Started
from engine.scheduler import Scheduler
from engine.tokenizer import Prompt, TextStream
from prefixcache.errors import FailedPrecondition, Internal, PrefixCacheError, Unavailable
from prefixcache.v1 import cache_pb2, cache_pb2_grpc, generation_pb2, generation_pb2_grpc

TOKENIZER_THREADS = 2
# How long calls that have got their last event may take to send it, and how long
# everything else may take then, such as a health check that watches for ever.
FAREWELL_SECONDS = 5.0
GRACE_SECONDS = 0.5

GENERATION = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
CACHE = cache_pb2.DESCRIPTOR.services_by_name["CacheService"].full_name
SERVICES = ("", GENERATION, CACHE)

Context = grpc.aio.ServicerContext[Any, Any]
Load = Callable[[EngineConfig, OnDeath], Engine]

log = structlog.get_logger()


class Server:
    """One server in the running event loop. `died` is set, with the reason, when the engine has failed."""

    def __init__(self, config: EngineConfig, load: Load = load_engine) -> None:
        self.port = 0
        self.died: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self.bridge = EventBridge(asyncio.get_running_loop())
        self.stream_interval = config.stream_interval_ms / 1000
        self.active = 0
        self._config = config
        self._load = load
        self._engine: Engine | None = None
        self._began = 0.0
        self._computing = ThreadPoolExecutor(1, "engine")
        self._tokenizing = ThreadPoolExecutor(TOKENIZER_THREADS, "tokenizer")
        self._health = health.aio.HealthServicer()
        self._grpc = grpc.aio.server(
            interceptors=[_Answers()],
            options=[
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # a second server on the same port is an error
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),  # allows clients' keepalive
            ],
        )
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(_Generation(self), self._grpc)
        cache_pb2_grpc.add_CacheServiceServicer_to_server(_Cache(self), self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        names = (GENERATION, CACHE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._grpc)

    @property
    def engine(self) -> Engine:
        """The engine. Raises Unavailable while the model is being loaded."""
        if self._engine is None:
            raise Unavailable("the model is still being loaded; wait until the health service says SERVING")
        return self._engine

    @property
    def uptime(self) -> float:
        """Seconds since the server began to serve."""
        return clock() - self._began

    @property
    def address(self) -> str:
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        return f"{host}:{self.port or self._config.port}"

    async def start(self) -> None:
        """Open the port, load and warm up the engine, and serve.

        Raises FailedPrecondition if the port cannot be had, and what loading raises.
        """
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            self.port = self._grpc.add_insecure_port(self.address)
        except RuntimeError as error:
            raise FailedPrecondition(
                f"cannot listen on {self.address}: is another server running there? Choose another --port or --host"
            ) from error
        await self._grpc.start()
        running = asyncio.get_running_loop()

        def on_death(reason: BaseException) -> None:
            if not running.is_closed():
                running.call_soon_threadsafe(self._bury, reason)

        engine = await running.run_in_executor(self._computing, self._load, self._config, on_death)
        engine.loop.start(self._computing)
        self._engine = engine
        self._began = clock()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        tokens = engine.blocks * engine.served.block_size
        log.info(
            f"serving {engine.served.name} on {self.address}: room for {tokens:,} cached tokens",
            architecture=engine.served.architecture,
            dtype=engine.served.dtype,
            device=engine.served.device,
            blocks=engine.blocks,
            block_size=engine.served.block_size,
            cache_bytes=engine.blocks * engine.bytes_per_block,
            max_length=engine.served.max_length,
        )

    async def drain(self, seconds: float) -> bool:
        """Refuse new requests and wait for those accepted; return whether all ended within `seconds`."""
        await self._health.enter_graceful_shutdown()
        if self._engine is None:
            return True
        self._engine.loop.drain()
        await self._wait_for_callers(seconds)
        return not self.active

    async def stop(self) -> None:
        """End everything now: requests in progress get UNAVAILABLE. Idempotent."""
        await self._health.enter_graceful_shutdown()
        if self._engine is not None:
            await asyncio.to_thread(self._engine.loop.stop)
        await self._wait_for_callers(FAREWELL_SECONDS)
        await self._grpc.stop(GRACE_SECONDS)
        self._tokenizing.shutdown(wait=False, cancel_futures=True)
        self._computing.shutdown(wait=False)

    async def encode(self, prompt: Prompt, limit: int | None = None) -> list[int]:
        """Tokenize off the event loop."""
        tokenizer = self.engine.tokenizer
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, tokenizer.encode, prompt, limit)

    async def _wait_for_callers(self, seconds: float) -> None:
        """Wait until no Generate call is active, for at most `seconds`."""
        end = clock() + seconds
        while self.active and clock() < end:
            await asyncio.sleep(0.01)

    def _bury(self, reason: BaseException) -> None:
        if not self.died.done():
            self.died.set_result(reason)

    async def _set_health(self, status: Any) -> None:
        for service in SERVICES:
            await self._health.set(service, status)


class _Generation(generation_pb2_grpc.GenerationServiceServicer):
    def __init__(self, server: Server) -> None:
        self._server = server

    async def Generate(self, message: generation_pb2.GenerateRequest, context: Context) -> None:  # type: ignore[override]  # the stub knows generators only
        server, engine = self._server, self._server.engine
        arrival = clock()
        remaining = context.time_remaining()
        generation = wire.read_generate(message, engine.served)
        prompt = await server.encode(generation.prompt, engine.served.max_length - 1)
        # Stop strings are looked for as events come, and what is generated behind one is lost work.
        events = server.bridge.open(0.0 if generation.params.stop else server.stream_interval)
        request = Request(
            id=generation.id,
            prompt=prompt,
            params=generation.params,
            seed=generation.seed,
            sink=events.sink,
            namespace=generation.namespace,
            read=generation.read,
            store=generation.store,
            arrival=arrival,
            deadline=None if remaining is None else arrival + remaining,
        )
        server.active += 1
        try:
            engine.loop.submit(request)
            await _relay(engine, request, events, context)
        finally:
            server.active -= 1
            engine.loop.abort(request)

    async def Tokenize(
        self, message: generation_pb2.TokenizeRequest, context: Context
    ) -> generation_pb2.TokenizeResponse:
        ids = await self._server.encode(wire.read_prompt(message.prompt))
        return wire.write_tokens(ids)

    async def GetModel(
        self, message: generation_pb2.GetModelRequest, context: Context
    ) -> generation_pb2.GetModelResponse:
        return wire.write_model(self._server.engine.served)


class _Cache(cache_pb2_grpc.CacheServiceServicer):
    def __init__(self, server: Server) -> None:
        self._server = server

    async def Lookup(self, message: cache_pb2.LookupRequest, context: Context) -> cache_pb2.LookupResponse:
        engine = self._server.engine
        namespace = wire.read_namespace(message.namespace, "namespace")
        prompt = await self._server.encode(wire.read_prompt(message.prompt))
        found = await asyncio.wrap_future(engine.loop.call(lambda scheduler: scheduler.lookup(prompt, namespace)))
        return wire.write_found(len(prompt), found)

    async def GetStats(self, message: cache_pb2.GetStatsRequest, context: Context) -> cache_pb2.GetStatsResponse:
        engine = self._server.engine
        stats = await asyncio.wrap_future(engine.loop.call(lambda scheduler: scheduler.stats()))
        return wire.write_stats(
            stats,
            block_size=engine.served.block_size,
            bytes_per_block=engine.bytes_per_block,
            uptime=self._server.uptime,
        )


async def _relay(engine: Engine, request: Request, events: EventStream, context: Context) -> None:
    """Send a request's events to the caller until the last one. Raises the error of a `Failed`."""
    stream = TextStream(engine.tokenizer, request.params.stop)
    last: Finished | None = None
    while last is None:
        text = ""
        tokens: list[Sampled] = []
        for event in await events.next():
            match event:
                case Started():
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
            last = await asyncio.wrap_future(engine.loop.call(complete))
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


class _Answers(grpc.aio.ServerInterceptor):
    """Turns every error of a handler, and requests that cannot be read, into the status they travel as."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        deserialize = handler.request_deserializer

        def read(data: bytes) -> Any:
            try:
                return deserialize(data)
            except Exception as error:  # noqa: BLE001 - raised again by `_answered`, where it can become a status
                return wire.unreadable(handler_call_details.method, error)

        if handler.response_streaming:
            return handler._replace(request_deserializer=read, unary_stream=_answered(handler.unary_stream))
        return handler._replace(request_deserializer=read, unary_unary=_answered(handler.unary_unary))


def _answered(handle: Callable[[Any, Context], Awaitable[Any]]) -> Callable[[Any, Context], Awaitable[Any]]:
    async def answered(message: Any, context: Context) -> Any:
        try:
            if isinstance(message, PrefixCacheError):
                raise message
            return await handle(message, context)
        except PrefixCacheError as error:
            await _refuse(context, error)
        except Exception as error:
            if isinstance(error, grpc.aio.AbortError) or context.done():
                raise
            log.exception("a call failed because of a bug")
            await _refuse(context, Internal("the server has a bug; its log says more"))

    return answered


async def _refuse(context: Context, error: PrefixCacheError) -> None:
    status = wire.status_of(error)
    await context.abort(status.code, status.details, status.trailing_metadata)


async def serve(config: EngineConfig, load: Load = load_engine) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit code: 0, or 1 if the engine failed.

    The first signal drains; the second, or one while the model is being loaded, ends the
    process at once. Raises what `Server.start` raises.
    """
    logs.configure(config)
    server = Server(config, load)
    asked = asyncio.Event()
    ready = False

    def on_signal(number: signal.Signals) -> None:
        if asked.is_set() or not ready:
            log.warning(f"{number.name}: ending at once")
            sys.stderr.flush()
            os._exit(128 + number if ready else 0)
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    try:
        await server.start()
        ready = True
        waiting = asyncio.create_task(asked.wait())
        either: set[asyncio.Future[Any]] = {waiting, server.died}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not server.died.done():
            log.info(
                f"shutting down: {server.active} requests may go on for {config.drain_seconds:g} seconds; "
                "a second signal ends them"
            )
            if not await server.drain(config.drain_seconds):
                log.warning(f"{server.active} requests did not finish in time and are ended")
    finally:
        await server.stop()
    if server.died.done():
        reason = server.died.result()
        log.error("the engine has failed, so the server ends", exc_info=reason)
        return 1
    log.info("shut down")
    return 0
