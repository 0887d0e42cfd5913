"""A gateway as a process: it starts, serves until it is told to end, and drains."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import grpc
import structlog

from prefixcache.hosts import host_and_port
from prefixcache.routing.gateway import Gateway, Settings

log = structlog.get_logger()


async def serve(
    settings: Settings, host: str, port: int, credentials: grpc.ServerCredentials | None, drain_seconds: float
) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit code; in plaintext without `credentials`.

    The first signal drains; the second ends the process at once. Raises InvalidArgument for
    settings of no use, FailedPrecondition if the port cannot be had.
    """
    gateway = Gateway(settings)
    asked = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        if asked.is_set():
            log.warning(f"{number.name}: ending at once")
            sys.stderr.flush()
            os._exit(128 + number)
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    try:
        port = await gateway.start(host_and_port(host, port), credentials)
        log.info(f"the gateway is at {host_and_port(host, port)}", policy=settings.policy, tls=credentials is not None)
        await asked.wait()
        log.info(
            f"shutting down: {gateway.active} calls may go on for {drain_seconds:g} seconds; a second signal ends them"
        )
        if not await gateway.drain(drain_seconds):
            log.warning(f"{gateway.active} calls did not finish in time and are ended")
    finally:
        await gateway.stop()
    log.info("shut down")
    return 0
