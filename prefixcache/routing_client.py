"""Clients that choose among replicas themselves: no gateway to run, the same methods.

    with RoutingClient(redis="redis://cache.internal:6379") as client:
        print(client.generate("Once upon a time", max_tokens=50).replica)

There is one way of routing, that of `prefixcache route`: these clients run a gateway within
the process, on a thread of its own, behind a socket that only this user can open. What it
has to say goes to the logger "prefixcache.routing". Needs `prefixcache[route]`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from prefixcache.channel import TLS, TOKEN_VARIABLE, connection, tls_of
from prefixcache.client import AsyncClient, Client
from prefixcache.extras import not_installed
from prefixcache.hints.schema import DEFAULT_PREFIX
from prefixcache.routing.policies import DEFAULT

if TYPE_CHECKING:
    from prefixcache.routing.gateway import Settings

LONGEST_SOCKET = 100
"""Bytes that the path of a socket may have."""


class RoutingOptions(TypedDict, total=False):
    """How a client routes.

    `policy` says how a replica is chosen ("prefix" unless said otherwise), `group` or
    `deployment` among which. `token` and `tls` are as for a `Client`, and are for the
    replicas. `redis_prefix` is what all keys in Redis begin with.
    """

    policy: str
    token: str | None
    tls: TLS | bool | None
    group: str
    deployment: str
    redis_prefix: str


class RoutingClient(Client):
    """A `Client` of several replicas: those registered in `redis` (a URL), and `replicas` by their addresses.

    To be closed.
    """

    def __init__(self, redis: str = "", replicas: Sequence[str] = (), **options: Unpack[RoutingOptions]) -> None:
        self._router = _Router(redis, replicas, **options)
        try:
            super().__init__(self._router.target, token=self._router.token, tls=False)
        except BaseException:
            self._router.close()
            raise

    def close(self) -> None:
        """Close the connections; calls in progress are cancelled. Idempotent."""
        super().close()
        self._router.close()


class AsyncRoutingClient(AsyncClient):
    """`RoutingClient` for asyncio; to be made and used in one event loop."""

    def __init__(self, redis: str = "", replicas: Sequence[str] = (), **options: Unpack[RoutingOptions]) -> None:
        self._router = _Router(redis, replicas, **options)
        try:
            super().__init__(self._router.target, token=self._router.token, tls=False)
        except BaseException:
            self._router.close()
            raise

    async def close(self) -> None:
        """Close the connections; calls in progress are cancelled. Idempotent."""
        await super().close()
        await asyncio.to_thread(self._router.close)


class _Router:
    """A gateway on a thread, at `target`. Raises what making one raises, and FailedPrecondition if it cannot run."""

    def __init__(
        self,
        redis: str,
        replicas: Sequence[str],
        *,
        policy: str = DEFAULT,
        token: str | None = None,
        tls: TLS | bool | None = None,
        group: str = "",
        deployment: str = "",
        redis_prefix: str = DEFAULT_PREFIX,
    ) -> None:
        try:
            from prefixcache.routing.gateway import Settings
        except ImportError as error:
            instead = "or talk to a gateway, `prefixcache route`, for which a plain Client will do"
            raise not_installed(error, "a client that routes", "route", instead) from None
        self.token = os.environ.get(TOKEN_VARIABLE, "") if token is None else token
        settings = Settings(
            redis=redis,
            redis_prefix=redis_prefix,
            deployment=deployment,
            group=group,
            replicas=tuple(replicas),
            policy=policy,
            tls=tls_of(os.environ) if tls is None else tls,
            token=self.token,
        )
        settings.check()
        for address in settings.replicas:
            connection(address, self.token, settings.tls, {})  # raises if the token must not go there
        self._folder = _folder()
        self.target = f"unix:{self._folder}/gateway"
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(settings,), name="routing", daemon=True)
        self._thread.start()
        try:
            self._started.result()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the gateway. Idempotent."""
        if self._started.done() and self._started.exception() is None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self, settings: Settings) -> None:
        try:
            asyncio.run(self._serve(settings))
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)

    async def _serve(self, settings: Settings) -> None:
        from prefixcache.routing.gateway import Gateway

        self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
        gateway = Gateway(settings, _log())
        try:
            await gateway.start(self.target)
            self._started.set_result(None)
            await self._ending.wait()
        finally:
            await gateway.stop()


def _folder() -> str:
    """Return a new folder for a socket, which nobody else may enter."""
    folder = tempfile.mkdtemp(prefix="prefixcache-")
    if len(os.fsencode(folder)) > LONGEST_SOCKET - len("/gateway"):
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="prefixcache-", dir="/tmp")
    return folder


def _log() -> Any:
    """Return a log that goes where the program's own goes."""
    import structlog

    return structlog.wrap_logger(
        logging.getLogger("prefixcache.routing"),
        processors=[structlog.stdlib.filter_by_level, structlog.processors.format_exc_info, _line],
        wrapper_class=structlog.stdlib.BoundLogger,
        context_class=dict,
    )


def _line(logger: object, method: str, event: Any) -> str:
    """Return the text of a log line, with the traceback if there is one."""
    return "\n".join(str(event[key]) for key in ("event", "exception") if key in event)
