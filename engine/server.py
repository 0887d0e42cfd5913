"""The gRPC server: it starts and ends in order, and turns every error into a status.

The calls are in `engine.generation_service` and `engine.cache_service`, conversion and
checks in `engine.wire`, all computing is on the engine's thread, tokenizing in a few
threads of its own.

    open port (NOT_SERVING) -> load -> warm up -> SERVING -> drain (NOT_SERVING) -> stop
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from engine import logs, wire
from engine.assembly import Engine, OnDeath, load_engine
from engine.cache_service import Cache
from engine.config import EngineConfig
from engine.front import Context, Front
from engine.generation_service import Generation
from prefixcache.errors import FailedPrecondition, Internal, PrefixCacheError
from prefixcache.v1 import cache_pb2, cache_pb2_grpc, generation_pb2, generation_pb2_grpc

# How long calls that have got their last event may take to send it, and how long
# everything else may take then, such as a health check that watches for ever.
FAREWELL_SECONDS = 5.0
GRACE_SECONDS = 0.5

GENERATION = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
CACHE = cache_pb2.DESCRIPTOR.services_by_name["CacheService"].full_name
SERVICES = ("", GENERATION, CACHE)

Load = Callable[[EngineConfig, OnDeath], Engine]

log = structlog.get_logger()


class Server:
    """One server in the running event loop. `died` is set, with the reason, when the engine has failed."""

    def __init__(self, config: EngineConfig, load: Load = load_engine) -> None:
        self.port = 0
        self.died: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self.front = Front(config)
        self._config = config
        self._load = load
        self._computing = ThreadPoolExecutor(1, "engine")
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
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(Generation(self.front), self._grpc)
        cache_pb2_grpc.add_CacheServiceServicer_to_server(Cache(self.front), self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        names = (GENERATION, CACHE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._grpc)

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
        self.front.open(engine)
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
        if self.front.loaded is None:
            return True
        self.front.loaded.loop.drain()
        await self.front.wait_for_callers(seconds)
        return not self.front.active

    async def stop(self) -> None:
        """End everything now: requests in progress get UNAVAILABLE. Idempotent."""
        await self._health.enter_graceful_shutdown()
        if self.front.loaded is not None:
            await asyncio.to_thread(self.front.loaded.loop.stop)
        await self.front.wait_for_callers(FAREWELL_SECONDS)
        await self._grpc.stop(GRACE_SECONDS)
        self.front.close()
        self._computing.shutdown(wait=False)

    def _bury(self, reason: BaseException) -> None:
        if not self.died.done():
            self.died.set_result(reason)

    async def _set_health(self, status: Any) -> None:
        for service in SERVICES:
            await self._health.set(service, status)


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
                f"shutting down: {server.front.active} requests may go on for {config.drain_seconds:g} seconds; "
                "a second signal ends them"
            )
            if not await server.drain(config.drain_seconds):
                log.warning(f"{server.front.active} requests did not finish in time and are ended")
    finally:
        await server.stop()
    if server.died.done():
        reason = server.died.result()
        log.error("the engine has failed, so the server ends", exc_info=reason)
        return 1
    log.info("shut down")
    return 0
