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
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

import grpc
from google.rpc import error_details_pb2, status_pb2

from prefixcache import errors
from prefixcache.errors import Cancelled, DeadlineExceeded, InvalidArgument, PrefixCacheError, ResourceExhausted
from prefixcache.results import (
    Completion,
    Fold,
    Lookup,
    Model,
    Started,
    Stats,
    lookup_from,
    model_from,
    stats_from,
)
from prefixcache.v1 import cache_pb2, cache_pb2_grpc, generation_pb2, generation_pb2_grpc, prompt_pb2

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]

CHANNEL_OPTIONS = (
    # Notice within a minute that the other side of a long stream is gone.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # The server limits what it accepts; the token ids of a long text may be longer than the text.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A server that is being started is tried again soon.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)

# HealthCheckResponse{status: SERVING}. The health service is called with plain bytes, so
# that a client needs no package for it; an empty request asks for the whole server.
_HEALTH = "/grpc.health.v1.Health/Check"
_SERVING = b"\x08\x01"
_HEALTH_INTERVAL = 0.1


class GenerateOptions(TypedDict, total=False):
    """How to generate. What is absent or None is left to the server's default; see Sampling in the protocol."""

    max_tokens: int | None
    """The most tokens to generate; as many as fit by default."""
    temperature: float | None
    """0, the default, is greedy."""
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    """The same seed, prompt and options give the same tokens."""
    stop: str | Sequence[str] | None
    """Stop before any of these strings."""
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    logprobs: int | None
    """Report log-probabilities of the chosen token and of this many of the most probable ones."""
    tools: Sequence[Mapping[str, Any]] | None
    """Tools the model may call; with messages only."""
    add_generation_prompt: bool | None
    """With messages only: render the header of the next assistant turn. True by default."""
    model: str | None
    request_id: str | None
    namespace: str | None
    """Prompts in different namespaces never share cached blocks."""
    read_cache: bool | None
    """Reuse cached blocks. True by default."""
    store_cache: bool | None
    """Keep what is computed for later requests. True by default."""
    timeout: float | None
    """Seconds for the whole call; none by default."""


# Those that are fields of Sampling by the same name.
_SAMPLING = (
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop_token_ids", "ignore_eos"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs"),
)


# Requests


def _generate_request(prompt: Prompt, options: GenerateOptions) -> generation_pb2.GenerateRequest:
    unknown = options.keys() - GenerateOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"there is no option {sorted(unknown)[0]!r}; see GenerateOptions")
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    sampling = {name: given[name] for name in _SAMPLING if name in given}
    if "stop" in given:
        stop = given["stop"]
        sampling["stop"] = [stop] if isinstance(stop, str) else list(stop)
    message = _prompt(prompt, given.get("tools"), given.get("add_generation_prompt"))
    try:
        return generation_pb2.GenerateRequest(
            model=given.get("model", ""),
            prompt=message,
            sampling=generation_pb2.Sampling(**sampling),
            cache=prompt_pb2.CacheControl(
                namespace=given.get("namespace", ""),
                read=given.get("read_cache"),
                store=given.get("store_cache"),
            ),
            request_id=given.get("request_id", ""),
        )
    except ValueError as error:  # a number out of its type's range, or half a character
        raise InvalidArgument(f"an option cannot be sent: {error}") from error


def _prompt(
    prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None = None, add_generation_prompt: bool | None = None
) -> prompt_pb2.Prompt:
    chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
    if not chat and (tools is not None or add_generation_prompt is not None):
        raise InvalidArgument("tools and add_generation_prompt belong to messages; send the prompt as messages")
    try:
        if isinstance(prompt, str):
            return prompt_pb2.Prompt(text=prompt)
        if not chat:
            return prompt_pb2.Prompt(token_ids=prompt_pb2.TokenIds(ids=prompt))  # type: ignore[arg-type]  # no chat
        return prompt_pb2.Prompt(
            messages=prompt_pb2.Chat(
                messages=[_message(turn, position) for position, turn in enumerate(prompt)],
                tools=[_json(tool) for tool in tools or ()],
                add_generation_prompt=add_generation_prompt,
            )
        )
    except ValueError as error:
        raise InvalidArgument(f"the prompt cannot be sent: {error}") from error


def _message(turn: object, position: int) -> prompt_pb2.Message:
    if not isinstance(turn, Mapping):
        raise InvalidArgument(f"message {position} is a {type(turn).__name__}; every message must be a dict")
    fields = dict(turn)
    content = fields.pop("content", None)
    if content is not None and not isinstance(content, str):
        raise InvalidArgument(f"the content of message {position} is a {type(content).__name__}; it must be text")
    calls = [_json(call) for call in fields.pop("tool_calls", None) or ()]
    known = {name: fields.pop(name, None) for name in ("role", "tool_call_id", "name")}
    if fields:
        raise InvalidArgument(f"message {position} has a key {sorted(fields)[0]!r}, which has no meaning here")
    return prompt_pb2.Message(content=content or "", tool_calls=calls, **known)


def _json(value: Mapping[str, Any]) -> str:
    """Return `value` as JSON with the keys in their order, which is part of the prompt."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except TypeError as error:
        raise InvalidArgument(f"a tool or tool call is no JSON: {error}") from error


# Errors

_ERRORS: dict[str, type[PrefixCacheError]] = {
    error.status: error for error in PrefixCacheError.__subclasses__() if error is not ResourceExhausted
}


def _translated(error: Any, target: str) -> PrefixCacheError:
    """Return the error of our tree for the RpcError of a call, sync or aio (they share methods, but no class)."""
    code, details = error.code(), error.details() or "no reason given"
    match code:
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return ResourceExhausted(details, _retry_after(error))
        case grpc.StatusCode.DEADLINE_EXCEEDED if details == "Deadline Exceeded":  # noticed here, not there
            return DeadlineExceeded(f"no complete answer from {target} within the timeout")
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:  # not cancelled here, so the other side is going
            return errors.Unavailable(f"no answer from {target}: {details}")
    kind = _ERRORS.get(code.name)
    return kind(details) if kind is not None else PrefixCacheError(f"{target} answered {code.name}: {details}")


def _retry_after(error: Any) -> float | None:
    """Return the seconds in the RetryInfo of a status, if it has one."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.RetryInfo()
                if detail.Unpack(info):
                    return float(info.retry_delay.ToNanoseconds() / 1e9)
    return None


def _heard(error: Any, before: str) -> str:
    """What a failed health check says about the server; nothing new if it merely took too long."""
    late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    return before if late else error.details() or before


def _not_ready(target: str, timeout: float | None, heard: str) -> DeadlineExceeded:
    return DeadlineExceeded(f"the server at {target} was not ready within {timeout} seconds: {heard}")


# Threads


class Client:
    """A connection to one server; made when first needed, closed by `close` or at the end of `with`."""

    def __init__(self, target: str, *, credentials: grpc.ChannelCredentials | None = None) -> None:
        self.target = target
        if credentials is None:
            self._channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(target, credentials, options=CHANNEL_OPTIONS)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._cache = cache_pb2_grpc.CacheServiceStub(self._channel)
        self._health: Any = self._channel.unary_unary(_HEALTH)

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
        request = generation_pb2.TokenizeRequest(prompt=_prompt(prompt, tools))
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
        timeout: float | None = None,
    ) -> Lookup:
        """Say how much of a prompt is cached and why not more; changes nothing."""
        request = cache_pb2.LookupRequest(prompt=_prompt(prompt, tools), namespace=namespace)
        return lookup_from(self._call(self._cache.Lookup, request, timeout))

    def stats(self, *, timeout: float | None = None) -> Stats:
        """Return the server's sizes and counters."""
        return stats_from(self._call(self._cache.GetStats, cache_pb2.GetStatsRequest(), timeout))

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Return when the server serves; raise DeadlineExceeded if it does not within `timeout` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        heard = "nobody answers at that address"
        while end is None or time.monotonic() < end:
            left = None if end is None else end - time.monotonic()
            try:
                if self._health(b"", timeout=left, wait_for_ready=True) == _SERVING:
                    return
                heard = "it is starting or shutting down"
            except grpc.RpcError as error:
                heard = _heard(error, heard)
            time.sleep(_HEALTH_INTERVAL)
        raise _not_ready(self.target, timeout, heard)

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
            raise _translated(error, self.target) from None


class Stream:
    """An output being generated: iterate over it for its pieces of text.

    `started` says what the cache had as soon as the first piece is here. `result` waits
    for the end. `close`, or leaving the `with` block, cancels what is not finished yet.
    """

    def __init__(self, method: Any, prompt: Prompt, options: GenerateOptions, target: str) -> None:
        request = _generate_request(prompt, options)
        self._target = target
        self._fold = Fold()
        self._call = method(request, timeout=options.get("timeout"))
        self._closed = False

    @property
    def started(self) -> Started | None:
        return self._fold.started

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            for response in self._call:
                if text := self._fold.add(response):
                    return text
        except grpc.RpcError as error:
            if self._closed:
                raise Cancelled("the stream was closed before its end") from None
            raise _translated(error, self._target) from None
        raise StopIteration

    def result(self) -> Completion:
        """Wait for the end and return everything, also what was iterated over before."""
        for _ in self:
            pass
        return self._fold.completion()

    def close(self) -> None:
        """Cancel the request if it is not finished. Idempotent."""
        self._closed = True
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# asyncio


class AsyncClient:
    """`Client` for asyncio; to be made and used in one event loop."""

    def __init__(self, target: str, *, credentials: grpc.ChannelCredentials | None = None) -> None:
        self.target = target
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, options=CHANNEL_OPTIONS)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._cache = cache_pb2_grpc.CacheServiceStub(self._channel)
        self._health: Any = self._channel.unary_unary(_HEALTH)

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
        request = generation_pb2.TokenizeRequest(prompt=_prompt(prompt, tools))
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
        timeout: float | None = None,
    ) -> Lookup:
        """Say how much of a prompt is cached and why not more; changes nothing."""
        request = cache_pb2.LookupRequest(prompt=_prompt(prompt, tools), namespace=namespace)
        return lookup_from(await self._call(self._cache.Lookup, request, timeout))

    async def stats(self, *, timeout: float | None = None) -> Stats:
        """Return the server's sizes and counters."""
        return stats_from(await self._call(self._cache.GetStats, cache_pb2.GetStatsRequest(), timeout))

    async def wait_until_ready(self, timeout: float | None = None) -> None:
        """Return when the server serves; raise DeadlineExceeded if it does not within `timeout` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        heard = "nobody answers at that address"
        while end is None or time.monotonic() < end:
            left = None if end is None else end - time.monotonic()
            try:
                if await self._health(b"", timeout=left, wait_for_ready=True) == _SERVING:
                    return
                heard = "it is starting or shutting down"
            except grpc.RpcError as error:
                heard = _heard(error, heard)
            await asyncio.sleep(_HEALTH_INTERVAL)
        raise _not_ready(self.target, timeout, heard)

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
            raise _translated(error, self.target) from None


class AsyncStream:
    """`Stream` for asyncio."""

    def __init__(self, method: Any, prompt: Prompt, options: GenerateOptions, target: str) -> None:
        request = _generate_request(prompt, options)
        self._target = target
        self._fold = Fold()
        self._call = method(request, timeout=options.get("timeout"))
        self._closed = False

    @property
    def started(self) -> Started | None:
        return self._fold.started

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
        except grpc.RpcError as error:
            raise _translated(error, self._target) from None
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

    async def close(self) -> None:
        """Cancel the request if it is not finished. Idempotent."""
        self._closed = True
        self._call.cancel()

    def _cancelled_by_close(self) -> bool:
        """Whether a CancelledError means that another task closed the stream, not that this task is cancelled."""
        task = asyncio.current_task()
        return self._closed and not (task is not None and task.cancelling())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
