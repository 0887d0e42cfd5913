"""Gateways for tests: real gRPC on a free port, in a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType
from typing import Any, Self

from prefixcache.routing.gateway import Gateway, Settings

WAIT_SECONDS = 20.0


class RunningGateway:
    """A gateway with these settings. Leaving the `with` block ends it."""

    def __init__(self, *replicas: str, log: Any = None, **settings: Any) -> None:
        self._settings = Settings(replicas=replicas, **settings)
        self._log = log
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self.address = ""
        self.gateway: Gateway
        self.loop: asyncio.AbstractEventLoop

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(WAIT_SECONDS)
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.loop.call_soon_threadsafe(self._ending.set)
        self._thread.join()

    def drain(self, seconds: float) -> bool:
        return asyncio.run_coroutine_threadsafe(self.gateway.drain(seconds), self.loop).result(60)

    def stop(self) -> None:
        """End it now, whatever is in progress."""
        asyncio.run_coroutine_threadsafe(self.gateway.stop(), self.loop).result(60)

    def lose(self, replica_id: str) -> None:
        """Do what is done when a replica has not said for too long how it is."""
        self.loop.call_soon_threadsafe(self.gateway.fleet.get(replica_id).lose)

    def serving(self) -> list[str]:
        """The replicas that take requests, as the gateway knows them."""
        return [replica.id for replica in self.gateway.fleet.all if replica.serving]

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._ending = asyncio.Event()
        try:
            self.gateway = Gateway(self._settings, self._log)
            port = await self.gateway.start("127.0.0.1:0")
        except BaseException as failure:  # noqa: BLE001 - raised again in the test's thread
            self._failure = failure
            return
        else:
            self.address = f"127.0.0.1:{port}"
        finally:
            self._started.set()
        await self._ending.wait()
        await self.gateway.stop()
