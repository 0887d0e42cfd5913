"""Whom the requests are sent to: this project's server, or anything behind HTTP (see `http_target`).

A target prepares requests before the clock runs (encoding a long prompt takes a while)
and fills in records while it does.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from time import perf_counter
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import grpc

from benchmarks.serving import memory
from benchmarks.serving.measure import Record
from prefixcache.channel import CHANNEL_OPTIONS
from prefixcache.client import AsyncClient
from prefixcache.errors import PrefixCacheError
from prefixcache.local import LocalServer
from prefixcache.v1 import generation_pb2, prompt_pb2

OURS = "ours"
TRANSFORMERS = "transformers"
READY_SECONDS = 120.0
CACHE_MEMORY = "2GiB"


class Failed(Exception):
    """A request, or a whole target, that did not do what it should; the message says what."""


class Target(Protocol):
    """A server under test. Entering connects, and starts it if need be; raises Failed if that does not work."""

    name: str

    async def __aenter__(self) -> Self: ...
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    async def describe(self) -> dict[str, Any]:
        """What the target says about itself."""
        ...

    def prepare(self, prompt: Sequence[int], output: int) -> bytes:
        """Encode a request for so many greedy tokens, end of sequence ignored."""
        ...

    async def complete(self, request: bytes, record: Record) -> None:
        """Send it and fill in what comes back. Raises Failed."""
        ...

    def peak_memory(self) -> int | None:
        """Bytes; None where that cannot be seen."""
        ...


class Address(NamedTuple):
    """`--target` taken apart. Without a host the benchmark starts the server itself."""

    name: str
    scheme: str
    host: str
    port: int


def parse(text: str) -> Address:
    """Take `ours`, `transformers`, `NAME=grpc://host:port` or `NAME=http://host:port` apart; raises ValueError."""
    name, _, url = text.partition("=")
    if not url:
        if name not in (OURS, TRANSFORMERS):
            raise ValueError(
                f"target {text!r}: give {OURS!r}, {TRANSFORMERS!r}, NAME=grpc://host:port or NAME=http://host:port"
            )
        return Address(name, "", "", 0)
    scheme, separator, address = url.partition("://")
    host, _, port = address.rstrip("/").rpartition(":")
    if not name or not separator or scheme not in ("grpc", "http") or not host or not port.isdigit():
        raise ValueError(f"target {text!r}: give NAME=grpc://host:port or NAME=http://host:port")
    return Address(name, scheme, host, int(port))


class Ours:
    """This project's server, running at `address`, or started with `options` if that is None.

    The client library returns text when it is final; what is counted here are tokens
    when they come, so the messages of the protocol are read directly, through the same
    kind of channel.
    """

    def __init__(self, name: str, address: str | None, options: Sequence[str] = ()) -> None:
        self.name = name
        self._address = address
        self._options = options
        self._server: LocalServer | None = None

    async def __aenter__(self) -> Self:
        if self._address is None:
            self._server = LocalServer(*self._options)
            try:
                await asyncio.to_thread(self._server.__enter__)
            except PrefixCacheError as error:
                raise Failed(f"{self.name}: {error}") from None
            self._address = self._server.address
        self._client = AsyncClient(self._address)
        try:
            await self._client.wait_until_ready(READY_SECONDS)
        except PrefixCacheError as error:
            await self._client.close()
            raise Failed(f"{self.name}: {error}") from None
        self._channel = grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS)
        self._generate: Any = self._channel.unary_stream(
            "/prefixcache.v1.GenerationService/Generate",
            response_deserializer=generation_pb2.GenerateResponse.FromString,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()
        await self._client.close()
        if self._server is not None:
            await asyncio.to_thread(self._server.__exit__, None, None, None)

    async def describe(self) -> dict[str, Any]:
        own = {"version": version("prefixcache"), "options": shlex.join(self._options)} if self._server else {}
        return {"server": "prefixcache", **own, **asdict(await self._client.model())}

    def prepare(self, prompt: Sequence[int], output: int) -> bytes:
        return generation_pb2.GenerateRequest(
            prompt=prompt_pb2.Prompt(token_ids=prompt_pb2.TokenIds(ids=prompt)),
            sampling=generation_pb2.Sampling(max_tokens=output, ignore_eos=True),
        ).SerializeToString()

    async def complete(self, request: bytes, record: Record) -> None:
        record.tokens = []
        finished = False
        record.sent = perf_counter()
        call = self._generate(request)
        try:
            while (response := await call.read()) is not grpc.aio.EOF:
                now = perf_counter()
                match response.WhichOneof("event"):
                    case "delta":
                        record.add(now, len(response.delta.token_ids))
                        record.tokens += response.delta.token_ids
                    case "started":
                        record.prompt_tokens = response.started.prompt_tokens
                        record.cached_tokens = response.started.cached_tokens
                    case "finished":
                        finished = True
        except grpc.RpcError as error:
            raise Failed(f"{error.code().name}: {error.details()}") from None
        finally:
            call.cancel()
        if not finished:
            raise Failed("the stream ended before the output was finished")

    def peak_memory(self) -> int | None:
        assert self._address is not None, "entered"
        host, port = self._address.rsplit(":", 1)
        return memory.peak(host, int(port))


def server_options(model: str, dtype: str, given: str) -> list[str]:
    """Options of `prefixcache serve`: what is `given` on the benchmark's command line, the rest as needed here."""
    options = shlex.split(given)
    defaults = {"--model": model, "--dtype": dtype, "--cache-memory": CACHE_MEMORY}
    for option, value in defaults.items():
        if not any(word == option or word.startswith(f"{option}=") for word in options):
            options += [option, value]
    return options
