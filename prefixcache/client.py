"""The client: one class for threads, one for asyncio, the same methods in both.

    with Client("localhost:50051") as client:
        print(client.generate("Once upon a time", max_tokens=50).text)

    async with AsyncClient("localhost:50051") as client:
        async with client.stream("Once upon a time") as stream:
            async for text in stream:
                print(text, end="")

A prompt is text, a sequence of token ids, or a list of messages such as
{"role": "user", "content": "..."}. Every error is one of `prefixcache.errors`.
`timeout` is in seconds and covers the whole call; without one a call waits as long as
the server works on it. A client may be shared by threads (`Client`) or tasks
(`AsyncClient`).

`token` says who calls, where the server asks; PREFIXCACHE_TOKEN when None. `tls` is True
or a TLS for an encrypted connection, False for a plain one on which a token may go
unencrypted, too; when None, encrypted if PREFIXCACHE_CA (or _CERTIFICATE and _KEY) names
files for it, plain if not. `replica` names the one that a gateway is to ask, whatever it is
asked.

`RoutingClient` and `AsyncRoutingClient` need no gateway: see `prefixcache.routing_client`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

import grpc

from prefixcache.channel import (
    CHANNEL_OPTIONS,
    HEALTH,
    HEALTH_INTERVAL,
    SERVING,
    TLS,
    connection,
    heard_from,
    not_ready,
    translated,
)
from prefixcache.errors import Cancelled
from prefixcache.requests import (
    GenerateOptions,
    Prompt,
    generate_request,
    invalidate_request,
    pin_request,
    prompt_message,
)
from prefixcache.results import (
    Completion,
    Fold,
    Invalidated,
    Lookup,
    Model,
    Pinned,
    Pins,
    Started,
    Stats,
    invalidated_from,
    lookup_from,
    model_from,
    pinned_from,
    pins_from,
    stats_from,
)
from prefixcache.streams import AsyncCall, Call
from prefixcache.v1 import cache_pb2, cache_pb2_grpc, generation_pb2, generation_pb2_grpc
from prefixcache.warming import AsyncPrompts, AsyncWarming, Prompts, Warming, WarmOptions
from prefixcache.watch import (
    AsyncWatch,
    AsyncWatching,
    Position,
    PromptShape,
    Watch,
    Watching,
    shape_from,
    watch_prompts_request,
)

if TYPE_CHECKING:
    from prefixcache.routing_client import AsyncRoutingClient as AsyncRoutingClient
    from prefixcache.routing_client import RoutingClient as RoutingClient
else:

    def __getattr__(name: str) -> Any:
        """Return the clients that route, which are made of those here."""
        if name in ("RoutingClient", "AsyncRoutingClient"):
            from prefixcache import routing_client

            return getattr(routing_client, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Threads


class Client:
    """A connection to one server; made when first needed, closed by `close` or at the end of `with`."""

    def __init__(
        self, target: str, *, token: str | None = None, tls: TLS | bool | None = None, replica: str = ""
    ) -> None:
        self.target = target
        link = connection(target, token, tls, replica=replica)
        if link.credentials is None:
            self._channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(target, link.credentials, options=CHANNEL_OPTIONS)
        authorized: grpc.Channel = link.authorized(self._channel)
        self._generation = generation_pb2_grpc.GenerationServiceStub(authorized)
        self._cache = cache_pb2_grpc.CacheServiceStub(authorized)
        self._health: Any = self._channel.unary_unary(HEALTH)

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """Return the continuation of a prompt when it is complete."""
        with self.stream(prompt, **options) as stream:
            return stream.result()

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Stream:
        """Return the continuation of a prompt as it is generated."""
        return Stream(self._generation.Generate, prompt, options, self.target)

    def tokenize(
        self, prompt: Prompt, *, tools: Sequence[Mapping[str, Any]] | None = None, timeout: float | None = None
    ) -> list[int]:
        """Return the token ids of a prompt, as `generate` would use them."""
        request = generation_pb2.TokenizeRequest(prompt=prompt_message(prompt, tools))
        return list(self._call(self._generation.Tokenize, request, timeout).token_ids)

    def model(self, *, timeout: float | None = None) -> Model:
        """Describe the served model."""
        return model_from(self._call(self._generation.GetModel, generation_pb2.GetModelRequest(), timeout))

    def lookup(
        self,
        prompt: Prompt,
        *,
        namespace: str = "",
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        with_text: bool = False,
        timeout: float | None = None,
    ) -> Lookup:
        """Say how much of a prompt is cached and why not more, `with_text` also where; changes nothing."""
        message = prompt_message(prompt, tools, add_generation_prompt)
        request = cache_pb2.LookupRequest(prompt=message, namespace=namespace, with_text=with_text)
        return lookup_from(self._call(self._cache.Lookup, request, timeout))

    def stats(self, *, timeout: float | None = None) -> Stats:
        """Return the server's sizes and counters."""
        return stats_from(self._call(self._cache.GetStats, cache_pb2.GetStatsRequest(), timeout))

    def pin(
        self,
        prompt: Prompt,
        pin_id: str,
        *,
        namespace: str = "",
        ttl: float | None = None,
        cached_only: bool = False,
        published: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        timeout: float | None = None,
    ) -> Pinned:
        """Keep a prompt's blocks from eviction, for `ttl` seconds or until `unpin`; compute first what is missing.

        `published`, for administrators, lets every tenant's prompts begin with it.
        """
        request = pin_request(prompt, pin_id, namespace, ttl, cached_only, published, tools)
        return pinned_from(self._call(self._cache.Pin, request, timeout))

    def unpin(self, pin_id: str, *, namespace: str = "", published: bool = False, timeout: float | None = None) -> None:
        """End a pin, or what is `published`. Raises NotFound if there is none of that name."""
        request = cache_pb2.UnpinRequest(pin_id=pin_id, namespace=namespace, published=published)
        self._call(self._cache.Unpin, request, timeout)

    def pins(self, *, timeout: float | None = None) -> Pins:
        """List the caller's pins."""
        return pins_from(self._call(self._cache.ListPins, cache_pb2.ListPinsRequest(), timeout))

    def end_session(self, session_id: str, *, namespace: str = "", timeout: float | None = None) -> int:
        """End a session; return how many blocks only it has used, which are given up first from now on."""
        request = cache_pb2.EndSessionRequest(session_id=session_id, namespace=namespace)
        return int((self._call(self._cache.EndSession, request, timeout)).blocks)

    def invalidate(
        self,
        prefix: Prompt | None = None,
        *,
        session_id: str | None = None,
        namespace: str = "",
        whole_namespace: bool = False,
        everything: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        timeout: float | None = None,
    ) -> Invalidated:
        """Forget what begins with a prompt, what only a session used, a namespace, or everything of the caller's."""
        request = invalidate_request(prefix, session_id, namespace, whole_namespace, everything, tools)
        return invalidated_from(self._call(self._cache.Invalidate, request, timeout))

    def watch_events(self, *, after: Position | None = None, timeout: float | None = None) -> Watch:
        """Return what is stored in the cache, then every change; only changes if `after` says where to go on."""
        return Watch(self._cache.WatchEvents, after, self.target, timeout)

    def watch_prompts(self, *, one_in: int = 1, timeout: float | None = None) -> Watching[PromptShape]:
        """Return the shapes of prompts as they arrive, one in so many: hashes, kinds and lengths, never text."""
        request = watch_prompts_request(one_in)
        return Watching(self._cache.WatchPrompts(request, timeout=timeout), shape_from, self.target)

    def warm(self, prompts: Prompts, **options: Unpack[WarmOptions]) -> Warming:
        """Compute prompts ahead of time, so that requests find them in the cache; those go first meanwhile."""
        return Warming(self._cache.Warm, prompts, options, self.target)

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Return when the server serves; raise DeadlineExceeded if it does not within `timeout` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        heard = "nobody answers at that address"
        while end is None or time.monotonic() < end:
            left = None if end is None else end - time.monotonic()
            try:
                if self._health(b"", timeout=left, wait_for_ready=True) == SERVING:
                    return
                heard = "it is starting or shutting down"
            except grpc.RpcError as error:
                heard = heard_from(error, heard)
            time.sleep(HEALTH_INTERVAL)
        raise not_ready(self.target, timeout, heard)

    def close(self) -> None:
        """Close the connection; calls in progress are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        try:
            return method(request, timeout=timeout)
        except grpc.RpcError as error:
            raise translated(error, self.target) from None


class Stream(Call):
    """An output being generated: iterate over it for its pieces of text.

    `started` says what the cache had as soon as the first piece is here. `result` waits
    for the end. `close`, or leaving the `with` block, cancels what is not finished yet.
    """

    def __init__(self, method: Any, prompt: Prompt, options: GenerateOptions, target: str) -> None:
        request = generate_request(prompt, options)
        self._fold = Fold()
        super().__init__(method(request, timeout=options.get("timeout")), target)

    @property
    def started(self) -> Started | None:
        return self._fold.started

    @property
    def replica(self) -> str | None:
        """Which replica has answered, once the stream has ended; None if it did not say."""
        return self._fold.replica

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            for response in self._call:
                if text := self._fold.add(response):
                    return text
            self._fold.sign(self._call.trailing_metadata())
        except grpc.RpcError as error:
            if self._closed:
                raise Cancelled("the stream was closed before its end") from None
            raise translated(error, self._target) from None
        raise StopIteration

    def result(self) -> Completion:
        """Wait for the end and return everything, also what was iterated over before."""
        for _ in self:
            pass
        return self._fold.completion()


# asyncio


class AsyncClient:
    """`Client` for asyncio; to be made and used in one event loop."""

    def __init__(
        self, target: str, *, token: str | None = None, tls: TLS | bool | None = None, replica: str = ""
    ) -> None:
        self.target = target
        link = connection(target, token, tls, replica=replica)
        if link.credentials is None:
            self._channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(target, link.credentials, options=CHANNEL_OPTIONS)
        authorized: grpc.aio.Channel = link.authorized(self._channel)
        self._generation = generation_pb2_grpc.GenerationServiceStub(authorized)
        self._cache = cache_pb2_grpc.CacheServiceStub(authorized)
        self._health: Any = self._channel.unary_unary(HEALTH)

    async def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """Return the continuation of a prompt when it is complete."""
        async with self.stream(prompt, **options) as stream:
            return await stream.result()

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """Return the continuation of a prompt as it is generated."""
        return AsyncStream(self._generation.Generate, prompt, options, self.target)

    async def tokenize(
        self, prompt: Prompt, *, tools: Sequence[Mapping[str, Any]] | None = None, timeout: float | None = None
    ) -> list[int]:
        """Return the token ids of a prompt, as `generate` would use them."""
        request = generation_pb2.TokenizeRequest(prompt=prompt_message(prompt, tools))
        return list((await self._call(self._generation.Tokenize, request, timeout)).token_ids)

    async def model(self, *, timeout: float | None = None) -> Model:
        """Describe the served model."""
        return model_from(await self._call(self._generation.GetModel, generation_pb2.GetModelRequest(), timeout))

    async def lookup(
        self,
        prompt: Prompt,
        *,
        namespace: str = "",
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        with_text: bool = False,
        timeout: float | None = None,
    ) -> Lookup:
        """Say how much of a prompt is cached and why not more, `with_text` also where; changes nothing."""
        message = prompt_message(prompt, tools, add_generation_prompt)
        request = cache_pb2.LookupRequest(prompt=message, namespace=namespace, with_text=with_text)
        return lookup_from(await self._call(self._cache.Lookup, request, timeout))

    async def stats(self, *, timeout: float | None = None) -> Stats:
        """Return the server's sizes and counters."""
        return stats_from(await self._call(self._cache.GetStats, cache_pb2.GetStatsRequest(), timeout))

    async def pin(
        self,
        prompt: Prompt,
        pin_id: str,
        *,
        namespace: str = "",
        ttl: float | None = None,
        cached_only: bool = False,
        published: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        timeout: float | None = None,
    ) -> Pinned:
        """Keep a prompt's blocks from eviction, for `ttl` seconds or until `unpin`; compute first what is missing.

        `published`, for administrators, lets every tenant's prompts begin with it.
        """
        request = pin_request(prompt, pin_id, namespace, ttl, cached_only, published, tools)
        return pinned_from(await self._call(self._cache.Pin, request, timeout))

    async def unpin(
        self, pin_id: str, *, namespace: str = "", published: bool = False, timeout: float | None = None
    ) -> None:
        """End a pin, or what is `published`. Raises NotFound if there is none of that name."""
        request = cache_pb2.UnpinRequest(pin_id=pin_id, namespace=namespace, published=published)
        await self._call(self._cache.Unpin, request, timeout)

    async def pins(self, *, timeout: float | None = None) -> Pins:
        """List the caller's pins."""
        return pins_from(await self._call(self._cache.ListPins, cache_pb2.ListPinsRequest(), timeout))

    async def end_session(self, session_id: str, *, namespace: str = "", timeout: float | None = None) -> int:
        """End a session; return how many blocks only it has used, which are given up first from now on."""
        request = cache_pb2.EndSessionRequest(session_id=session_id, namespace=namespace)
        return int((await self._call(self._cache.EndSession, request, timeout)).blocks)

    async def invalidate(
        self,
        prefix: Prompt | None = None,
        *,
        session_id: str | None = None,
        namespace: str = "",
        whole_namespace: bool = False,
        everything: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        timeout: float | None = None,
    ) -> Invalidated:
        """Forget what begins with a prompt, what only a session used, a namespace, or everything of the caller's."""
        request = invalidate_request(prefix, session_id, namespace, whole_namespace, everything, tools)
        return invalidated_from(await self._call(self._cache.Invalidate, request, timeout))

    def watch_events(self, *, after: Position | None = None, timeout: float | None = None) -> AsyncWatch:
        """Return what is stored in the cache, then every change; only changes if `after` says where to go on."""
        return AsyncWatch(self._cache.WatchEvents, after, self.target, timeout)

    def watch_prompts(self, *, one_in: int = 1, timeout: float | None = None) -> AsyncWatching[PromptShape]:
        """Return the shapes of prompts as they arrive, one in so many: hashes, kinds and lengths, never text."""
        request = watch_prompts_request(one_in)
        return AsyncWatching(self._cache.WatchPrompts(request, timeout=timeout), shape_from, self.target)

    def warm(self, prompts: AsyncPrompts, **options: Unpack[WarmOptions]) -> AsyncWarming:
        """Compute prompts ahead of time, so that requests find them in the cache; those go first meanwhile."""
        return AsyncWarming(self._cache.Warm, prompts, options, self.target)

    async def wait_until_ready(self, timeout: float | None = None) -> None:
        """Return when the server serves; raise DeadlineExceeded if it does not within `timeout` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        heard = "nobody answers at that address"
        while end is None or time.monotonic() < end:
            left = None if end is None else end - time.monotonic()
            try:
                if await self._health(b"", timeout=left, wait_for_ready=True) == SERVING:
                    return
                heard = "it is starting or shutting down"
            except grpc.RpcError as error:
                heard = heard_from(error, heard)
            await asyncio.sleep(HEALTH_INTERVAL)
        raise not_ready(self.target, timeout, heard)

    async def close(self) -> None:
        """Close the connection; calls in progress are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        try:
            return await method(request, timeout=timeout)
        except grpc.RpcError as error:
            raise translated(error, self.target) from None


class AsyncStream(AsyncCall):
    """`Stream` for asyncio."""

    def __init__(self, method: Any, prompt: Prompt, options: GenerateOptions, target: str) -> None:
        request = generate_request(prompt, options)
        self._fold = Fold()
        super().__init__(method(request, timeout=options.get("timeout")), target)

    @property
    def started(self) -> Started | None:
        return self._fold.started

    @property
    def replica(self) -> str | None:
        """Which replica has answered, once the stream has ended; None if it did not say."""
        return self._fold.replica

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        if self._closed:
            if self._fold.complete:
                raise StopAsyncIteration
            raise Cancelled("the stream was closed before its end")
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:
                if text := self._fold.add(response):
                    return text
            self._fold.sign(await self._call.trailing_metadata())
        except grpc.RpcError as error:
            raise translated(error, self._target) from None
        except asyncio.CancelledError:
            if self._cancelled_by_close():
                raise Cancelled("the stream was closed before its end") from None
            raise
        raise StopAsyncIteration

    async def result(self) -> Completion:
        """Wait for the end and return everything, also what was iterated over before."""
        async for _ in self:
            pass
        return self._fold.completion()
