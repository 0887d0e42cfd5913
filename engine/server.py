"""The gRPC server: it starts and ends in order.

The calls are in `engine.generation_service` and `engine.cache_service`, what all of them
pass through in `engine.answers`, conversion and checks in `engine.wire`; all computing is
on the engine's thread, tokenizing in a few threads of its own.

    open port (NOT_SERVING) -> load -> warm up -> warm prompts -> SERVING -> drain (NOT_SERVING) -> stop
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from engine.answers import Answers
from engine.assembly import Engine, OnDeath, load_engine
from engine.cache_service import Cache
from engine.config import EngineConfig
from engine.front import Front
from engine.generation_service import Generation
from engine.scheduler import Scheduler
from engine.warm_start import WarmStart
from prefixcache import listening, logs, tls
from prefixcache.errors import Unavailable
from prefixcache.hosts import host_and_port
from prefixcache.v1 import cache_pb2, cache_pb2_grpc, generation_pb2, generation_pb2_grpc

# How long calls that have got their last event may take to send it, and how long
# everything else may take then, such as a health check that watches for ever.
FAREWELL_SECONDS = 5.0
GRACE_SECONDS = 0.5

# How often the file of tenants is looked at; one that has changed is read at the second look.
FOLLOW_SECONDS = 0.5

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
        self._warm_start = WarmStart(self.front, config)
        self._config = config
        self._load = load
        self._computing = ThreadPoolExecutor(1, "engine")
        self._following: asyncio.Task[None] | None = None
        self._health = health.aio.HealthServicer()
        self._grpc = grpc.aio.server(
            interceptors=[Answers(self.front)],
            options=listening.options(config.max_message_bytes),
        )
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(Generation(self.front), self._grpc)
        cache_pb2_grpc.add_CacheServiceServicer_to_server(Cache(self.front), self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        names = (GENERATION, CACHE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._grpc)

    @property
    def address(self) -> str:
        return host_and_port(self._config.host, self.port or self._config.port)

    async def start(self) -> None:
        """Open the port, load and warm up the engine, and serve.

        Raises FailedPrecondition if the port cannot be had, InvalidArgument or
        FailedPrecondition if the files of tenants, of TLS, to warm or to remember are of no
        use, and what loading raises.
        """
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self.front.gate.open()
        self.front.hints.open()
        self._warm_start.check()
        self._open_port()
        self.front.replica_id = self.front.hints.name(self.port)
        await self._grpc.start()
        running = asyncio.get_running_loop()

        def on_death(reason: BaseException) -> None:
            if not running.is_closed():
                running.call_soon_threadsafe(self._bury, reason)

        engine = await running.run_in_executor(self._computing, self._load, self._config, on_death)
        engine.loop.start(self._computing)
        self.front.open(engine)
        await self._limit_tenants()
        if self._config.tenants:
            self._following = asyncio.create_task(self._follow_tenants())
        await self._warm_start.before_serving()
        await self.front.hints.start(engine.loop, engine.served, engine.blocks, self.port)
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        self._warm_start.go_on()
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
            tls=bool(self._config.tls_certificate),
            tenants=len(self.front.gate.tenants),
            **({"replica": self.front.replica_id} if self.front.replica_id else {}),
        )

    async def drain(self, seconds: float) -> bool:
        """Refuse new requests and wait for those accepted; return whether all ended within `seconds`."""
        await self._health.enter_graceful_shutdown()
        if self.front.loaded is None:
            return True
        self.front.hints.drain()
        self.front.loaded.loop.drain()
        await self.front.wait_for_callers(seconds)
        return not self.front.active

    async def stop(self) -> None:
        """End everything now: requests in progress get UNAVAILABLE. Idempotent."""
        await self._health.enter_graceful_shutdown()
        await self._warm_start.end()
        await self.front.hints.stop()
        if self.front.loaded is not None:
            await asyncio.to_thread(self.front.loaded.loop.stop)
        self.front.feed.close()
        self.front.shapes.close()
        await self.front.wait_for_callers(FAREWELL_SECONDS)
        if self._following is not None:
            self._following.cancel()
        await self._grpc.stop(GRACE_SECONDS)
        self.front.close()
        self._computing.shutdown(wait=False)

    async def reload_tenants(self) -> None:
        """Read the file of tenants again, now. What cannot be used is logged, and the old one stays in force.

        What a tenant that is gone has cached is forgotten: nobody could reach it any more.
        """
        gone = self.front.gate.reload()
        if gone is not None and self.front.loaded is not None:
            await self._limit_tenants(gone)

    def _open_port(self) -> None:
        credentials = tls.server_credentials(
            self._config.tls_certificate, self._config.tls_key, self._config.tls_client_ca
        )
        self.port = listening.open_port(self._grpc, self.address, credentials)

    async def _limit_tenants(self, gone: Sequence[str] = ()) -> None:
        """Tell the cache how many blocks each tenant may have cached, and to forget those who are gone."""
        limits = {tenant.name: tenant.limits.blocks_of(self.front.engine.blocks) for tenant in self.front.gate.tenants}

        def apply(scheduler: Scheduler) -> None:
            for name in gone:
                scheduler.cache.limit(name, None)
                scheduler.cache.invalidate_account(name)
            for name, blocks in limits.items():
                scheduler.cache.limit(name, blocks)

        if limits:
            await self.front.ask(apply)

    async def _follow_tenants(self) -> None:
        """Read the file of tenants again whenever it has changed, until the engine ends."""
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            try:
                if self.front.gate.changed():
                    await self.reload_tenants()
            except Unavailable:
                return
            except Exception:
                log.exception("following the file of tenants failed because of a bug; it goes on")

    def _bury(self, reason: BaseException) -> None:
        if not self.died.done():
            self.died.set_result(reason)

    async def _set_health(self, status: Any) -> None:
        for service in SERVICES:
            await self._health.set(service, status)


async def serve(config: EngineConfig, load: Load = load_engine) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit code: 0, or 1 if the engine failed.

    The first signal drains; the second, or one while the model is being loaded, ends the
    process at once. SIGHUP reads the file of tenants again. Raises what `Server.start` raises.
    """
    logs.configure(config.log_level, config.log_format)
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
    if config.tenants:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, server.front.gate.expire)
    try:
        await server.start()
        ready = True
        gc.freeze()  # what was loaded stays, and looking at it again would stop everybody for tens of milliseconds
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
