"""A gateway: several replicas behind one address, for clients that need not know.

It speaks the services of a replica. Requests are read only to find out where they belong,
answers not at all. It refuses nobody: who calls, and what they may do, is the replicas'
business, whom it shows the caller's own metadata. So it keeps nothing of a prompt but
hashes, and logs nothing of one.

A caller that sends `prefixcache-replica: ID` in its metadata gets that replica, whatever it
asks; every answer has it in its trailing metadata.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from prefixcache import listening
from prefixcache.channel import CHANNEL_OPTIONS, TLS, connection
from prefixcache.errors import FailedPrecondition, Internal, InvalidArgument, PrefixCacheError, Unavailable
from prefixcache.hints.connection import NoHints
from prefixcache.hints.locator import Locator
from prefixcache.hints.schema import DEFAULT_PREFIX, Group, checked_name
from prefixcache.routing import cache_calls, generation
from prefixcache.routing.cache_calls import Cache
from prefixcache.routing.fleet import Fleet
from prefixcache.routing.forwarding import Answer, ask, relay
from prefixcache.routing.generation import Generation
from prefixcache.routing.incoming import Context, Incoming
from prefixcache.routing.placement import Placement
from prefixcache.routing.policies import DEFAULT, POLICIES
from prefixcache.routing.replica import Metadata, Refused, signed
from prefixcache.routing.router import Router
from prefixcache.routing.warming import Warming

MAX_MESSAGE_BYTES = 256 * 2**20
"""The largest request that is taken; a replica's own limit is lower, and is what callers meet."""

ROSTER_SECONDS = 1.0
FIND_SECONDS = 0.03
"""How long Redis may take to say who is there, and who holds a prompt."""

GRACE_SECONDS = 0.5
FAREWELL_SECONDS = 5.0

# Policies that do not look at what a prompt begins with.
_BLIND = ("round-robin", "least-loaded")

Unary = Callable[[str, bytes, Incoming], Awaitable[Answer]]
Streaming = Callable[[Any, Incoming, Context], Awaitable[Metadata]]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a gateway is told.

    Of `redis` (a URL) and `replicas` (addresses), at least one. `group` names the group of
    replicas to use; without it, the only one (of `deployment`), or the largest. `tls` is for
    the way to the replicas, and `token` one that is known to go there, if there is one; see
    `prefixcache.channel.connection`.
    """

    redis: str = ""
    redis_prefix: str = DEFAULT_PREFIX
    deployment: str = ""
    group: str = ""
    replicas: Sequence[str] = ()
    policy: str = DEFAULT
    tls: TLS | bool | None = None
    token: str = field(default="", repr=False)

    def check(self) -> None:
        """Raise InvalidArgument if no gateway can be made of it."""
        if not self.redis and not self.replicas:
            raise InvalidArgument("say where the replicas are: the URL of their Redis, or their addresses")
        if self.policy not in POLICIES:
            raise InvalidArgument(f"there is no policy {self.policy!r}; there are {', '.join(POLICIES)}")
        for address in self.replicas:
            if ":" not in address:
                raise InvalidArgument(f"the replica {address!r} has no port: give host:port, such as 10.0.0.7:50051")
        if self.deployment:
            checked_name(self.deployment, "the deployment")
        if self.group:
            Group.parse(self.group)


class Gateway:
    """One gateway in the running event loop. Raises InvalidArgument if the settings are of no use."""

    def __init__(self, settings: Settings, log: Any = None) -> None:
        settings.check()
        self._log = structlog.get_logger() if log is None else log
        self._settings = settings
        self._credentials = connection("", None, settings.tls, {}).credentials if settings.tls else None
        # Nobody waits for the roster, so that may take longer than what a prompt waits for.
        roster = self._locator(ROSTER_SECONDS)
        self._finding = self._locator(FIND_SECONDS)
        router = Router(POLICIES[settings.policy])
        self.fleet = Fleet(
            router,
            self._open,
            self._log,
            locator=roster,
            group=Group.parse(settings.group) if settings.group else None,
            deployment=settings.deployment or None,
            named=settings.replicas,
            changed=self._changed,
        )
        placement = Placement(self.fleet, router, self._finding, needs_hashes=settings.policy not in _BLIND)
        self._generation = Generation(self.fleet, placement)
        self._cache = Cache(self.fleet, placement)
        self._warming = Warming(self.fleet, placement)
        self._active: set[asyncio.Task[Any]] = set()
        self._refusing = False
        self._ending = False
        self._health = health.aio.HealthServicer()
        self._serving: bool | None = None
        self._telling: asyncio.Task[None] | None = None
        self._grpc = grpc.aio.server(options=listening.options(MAX_MESSAGE_BYTES))
        self._grpc.add_generic_rpc_handlers(tuple(self._handlers()))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        names = (generation.SERVICE, cache_calls.SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._grpc)

    @property
    def active(self) -> int:
        """How many calls are in progress."""
        return len(self._active)

    async def start(self, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
        """Serve at an address; return the port. Raises FailedPrecondition if it cannot be had."""
        port = listening.open_port(self._grpc, address, credentials)
        self._changed()
        self.fleet.start()
        await self._grpc.start()
        return port

    async def drain(self, seconds: float) -> bool:
        """Refuse new calls and wait for those in progress; return whether all ended within `seconds`."""
        self._refusing = True
        await self._health.enter_graceful_shutdown()
        return await self._wait_for_callers(seconds)

    async def stop(self) -> None:
        """End everything now: calls in progress get UNAVAILABLE. Idempotent."""
        self._refusing = self._ending = True
        await self._health.enter_graceful_shutdown()
        for task in list(self._active):
            task.cancel()
        await self._wait_for_callers(FAREWELL_SECONDS)
        await self._grpc.stop(GRACE_SECONDS)
        await self.fleet.close()
        if self._finding is not None:
            with contextlib.suppress(NoHints):
                await self._finding.close()

    def _locator(self, seconds: float) -> Locator | None:
        settings = self._settings
        return Locator(settings.redis, prefix=settings.redis_prefix, timeout=seconds) if settings.redis else None

    async def _wait_for_callers(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while self._active and time.monotonic() < end:
            await asyncio.sleep(0.01)
        return not self._active

    def _open(self, address: str) -> grpc.aio.Channel:
        """Open a channel to a replica. Raises InvalidArgument if a token would go there unencrypted."""
        if self._settings.token:
            connection(address, self._settings.token, self._settings.tls, {})
        if self._credentials is None:
            return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        return grpc.aio.secure_channel(address, self._credentials, options=CHANNEL_OPTIONS)

    def _changed(self) -> None:
        """Tell those who watch the health if it is another one now."""
        if self.fleet.serving != self._serving:
            self._serving = self.fleet.serving
            self._telling = asyncio.get_running_loop().create_task(self._tell(self._serving, self._telling))

    async def _tell(self, serving: bool, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await before
        status = health_pb2.HealthCheckResponse
        for service in ("", generation.SERVICE, cache_calls.SERVICE):
            await self._health.set(service, status.SERVING if serving else status.NOT_SERVING)

    # The calls

    def _handlers(self) -> Iterator[grpc.GenericRpcHandler]:
        text, cache = self._generation, self._cache
        unary: dict[str, dict[str, Unary]] = {
            generation.SERVICE: {"Tokenize": text.any, "GetModel": text.any},
            cache_calls.SERVICE: {
                "Lookup": cache.lookup,
                "Pin": cache.pin,
                "Unpin": cache.unpin,
                "ListPins": cache.pins,
                "EndSession": cache.end_session,
                "Invalidate": cache.invalidate,
                "GetStats": cache.stats,
            },
        }
        streaming: dict[str, dict[str, Streaming]] = {
            generation.SERVICE: {"Generate": text.generate},
            cache_calls.SERVICE: {"WatchEvents": _name_one, "WatchPrompts": _name_one},
        }
        for service in (generation.SERVICE, cache_calls.SERVICE):
            handlers: dict[str, Any] = {}
            for name, answer in unary[service].items():
                handlers[name] = grpc.unary_unary_rpc_method_handler(self._unary(f"/{service}/{name}", answer))
            for name, write in streaming[service].items():
                handlers[name] = grpc.unary_stream_rpc_method_handler(self._streaming(f"/{service}/{name}", write))
            if service == cache_calls.SERVICE:
                warm = self._streaming(f"/{service}/Warm", self._warming.warm)
                handlers["Warm"] = grpc.stream_stream_rpc_method_handler(warm)
            yield grpc.method_handlers_generic_handler(service, handlers)

    def _unary(self, method: str, answer: Unary) -> Any:
        async def handle(data: bytes, context: Context) -> Any:
            async with self._call(method, context) as incoming:
                if incoming.forced is None:
                    given = await answer(method, data, incoming)
                else:
                    await self.fleet.ready()
                    given = await ask(self.fleet.get(incoming.forced), method, data, incoming)
                context.set_trailing_metadata(given.metadata)
                return given.data

        return handle

    def _streaming(self, method: str, write: Streaming) -> Any:
        async def handle(request: bytes | AsyncIterator[bytes], context: Context) -> None:
            async with self._call(method, context) as incoming:
                if incoming.forced is None:
                    behind = await write(request, incoming, context)
                else:
                    await self.fleet.ready()
                    behind = await relay(self.fleet.get(incoming.forced), method, request, incoming, context)
                context.set_trailing_metadata(behind)

        return handle

    @contextlib.asynccontextmanager
    async def _call(self, method: str, context: Context) -> AsyncIterator[Incoming]:
        """What all calls pass through: they are counted, and errors become statuses."""
        task = asyncio.current_task()
        assert task is not None
        self._active.add(task)
        try:
            if self._refusing:
                raise Unavailable("the gateway is shutting down: send the request to another one")
            yield Incoming(context)
        except Refused as refused:
            await context.abort(refused.code, refused.details, signed(refused.metadata, refused.replica_id))
        except PrefixCacheError as error:
            await context.abort(grpc.StatusCode[error.status], str(error))
        except asyncio.CancelledError:
            if not self._ending or context.done():
                raise
            task.uncancel()
            details = "the gateway has shut down: send the request to another one"
            await context.abort(grpc.StatusCode.UNAVAILABLE, details)
        except Exception as error:
            if isinstance(error, grpc.aio.AbortError) or context.done():
                raise
            self._log.error("a call failed because of a bug", exc_info=error, method=method)
            await context.abort(grpc.StatusCode[Internal.status], "the gateway has a bug; its log says more")
        finally:
            self._active.discard(task)


async def _name_one(request: Any, incoming: Incoming, context: Context) -> Metadata:
    """What is about one replica alone."""
    raise FailedPrecondition(
        "this is about one replica: name it in the call's metadata, as prefixcache-replica "
        "(`prefixcache replicas` lists them)"
    )
