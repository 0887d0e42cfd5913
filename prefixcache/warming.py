"""Computing prompts ahead of time, so that requests find them in the cache.

    with client.warm([system_prompt, {"prompt": tools_prompt, "id": "tools", "priority": 90}]) as warming:
        for warmed in warming:
            print(warmed.id, warmed.state, warmed.error)

Prompts are sent as the server takes them, so an iterator may be long or slow. What has
been confirmed is cached: if a call is cut off, the same call again computes the rest.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Required, TypedDict

import grpc

from prefixcache.channel import translated
from prefixcache.errors import Cancelled, InvalidArgument
from prefixcache.requests import Prompt, cache_control, prompt_message
from prefixcache.streams import AsyncCall, Call
from prefixcache.v1 import cache_pb2

MAX_ID_BYTES = 128

ALL_REPLICAS = 2**32 - 1
"""More than there are: through a gateway, a prompt is warmed on every replica."""

WarmState = Literal["cached", "computed", "failed"]


class WarmPrompt(TypedDict, total=False):
    """A prompt and what is to be said of it besides. What is absent or None is as for the whole call."""

    prompt: Required[Prompt]
    tools: Sequence[Mapping[str, Any]] | None
    """With messages only."""
    add_generation_prompt: bool | None
    """With messages only: render the header of the next assistant turn. True by default."""
    id: str | None
    """A name for it in the result; its position, from 0, by default."""
    namespace: str | None
    ttl: float | None
    """Seconds it is kept, if it is not evicted before."""
    priority: int | None
    """0 to 100: lower ones are evicted first. 50 by default."""
    session_id: str | None
    replicas: int | None
    """Through a gateway: on how many replicas, ALL_REPLICAS for all; one by default."""


Prompts = Iterable[Prompt | WarmPrompt]
AsyncPrompts = Prompts | AsyncIterable[Prompt | WarmPrompt]


class WarmOptions(TypedDict, total=False):
    """What holds for all prompts that do not say otherwise, and `timeout`, in seconds, for the whole call."""

    namespace: str | None
    ttl: float | None
    priority: int | None
    session_id: str | None
    replicas: int | None
    timeout: float | None


@dataclass(frozen=True, slots=True)
class Warmed:
    """What became of a prompt: it was cached already, it has been computed and is cached, or it failed with `error`.

    Counts are tokens, None where they are not known. Through a gateway, it is cached on so many
    `replicas`; they are those of the one that had to compute most.
    """

    id: str
    state: WarmState
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    computed_tokens: int | None = None
    error: str = ""
    replicas: int | None = None


class _Requests:
    """Makes requests. Prompts that cannot be sent wait in `unsent`; what their iterator raised is `failure`."""

    def __init__(self, prompts: AsyncPrompts, options: WarmOptions) -> None:
        if isinstance(prompts, str | Mapping):
            raise TypeError("one prompt is given where several are wanted: put it into a list")
        unknown = options.keys() - WarmOptions.__annotations__.keys()
        if unknown:
            raise TypeError(f"there is no option {sorted(unknown)[0]!r}; see WarmOptions")
        self.unsent: deque[Warmed] = deque()
        self.failure: Exception | None = None
        self._options = options
        self._position = 0

    def make(self, item: Prompt | WarmPrompt) -> cache_pb2.WarmRequest | None:
        given: Mapping[str, Any] = item if isinstance(item, Mapping) else {"prompt": item}
        if not isinstance(given.get("prompt", ""), Sequence):
            raise TypeError(f"a {type(given['prompt']).__name__} is no prompt; a prompt is text, token ids or messages")
        unknown = given.keys() - WarmPrompt.__annotations__.keys()
        if unknown or "prompt" not in given:
            what = f"no key {sorted(unknown)[0]!r}" if unknown else "no prompt without 'prompt'"
            raise TypeError(f"there is {what}; see WarmPrompt")
        position, name = str(self._position), given.get("id") or str(self._position)
        self._position += 1
        try:
            if len(name.encode(errors="replace")) > MAX_ID_BYTES:
                name = position
                raise InvalidArgument(f"an id must have at most {MAX_ID_BYTES} bytes")
            message = prompt_message(given["prompt"], given.get("tools"), given.get("add_generation_prompt"))
            control = cache_control(
                *(self._option(given, key) for key in ("namespace", "ttl", "priority", "session_id"))
            )
            replicas = self._option(given, "replicas") or 0
            if not 0 <= replicas <= ALL_REPLICAS:
                raise InvalidArgument(f"replicas is {replicas}; it must be at least 1, and at most ALL_REPLICAS")
            return cache_pb2.WarmRequest(prompt=message, id=name, cache=control, replicas=replicas)
        except InvalidArgument as error:
            self.unsent.append(Warmed(name, "failed", error=str(error)))
            return None

    def _option(self, given: Mapping[str, Any], key: str) -> Any:
        value = given.get(key)
        return self._options.get(key) if value is None else value


class Warming(Call):
    """Prompts being warmed: iterate over it for what became of each, in the order in which they are done.

    When the iterator of prompts raises, what was sent before is still answered, then the
    error is raised here. `close`, or leaving the `with` block, cancels what is not done.
    """

    def __init__(self, method: Any, prompts: Prompts, options: WarmOptions, target: str) -> None:
        self._requests = _Requests(prompts, options)
        super().__init__(method(self._sent(prompts), timeout=options.get("timeout")), target)

    def __iter__(self) -> Iterator[Warmed]:
        return self

    def __next__(self) -> Warmed:
        unsent = self._requests.unsent
        if unsent:
            return unsent.popleft()
        try:
            for message in self._call:
                return _warmed(message)
        except grpc.RpcError as error:
            if self._closed:
                raise Cancelled("the warming was ended") from None
            raise translated(error, self._target) from None
        if unsent:
            return unsent.popleft()
        if self._requests.failure is not None:
            raise self._requests.failure
        raise StopIteration

    def _sent(self, prompts: Prompts) -> Iterator[cache_pb2.WarmRequest]:
        """Yield the requests, in a thread of gRPC's."""
        try:
            for item in prompts:
                if (request := self._requests.make(item)) is not None:
                    yield request
        except Exception as error:  # noqa: BLE001 - raised again by `__next__`
            self._requests.failure = error


class AsyncWarming(AsyncCall):
    """`Warming` for asyncio; prompts may come from an asynchronous iterator, too."""

    def __init__(
        self,
        method: Any,
        prompts: AsyncPrompts,
        options: WarmOptions,
        target: str,
    ) -> None:
        self._requests = _Requests(prompts, options)
        super().__init__(method(self._sent(prompts), timeout=options.get("timeout")), target)

    def __aiter__(self) -> AsyncIterator[Warmed]:
        return self

    async def __anext__(self) -> Warmed:
        unsent = self._requests.unsent
        if unsent:
            return unsent.popleft()
        if self._closed:
            raise Cancelled("the warming was ended")
        try:
            if (message := await self._call.read()) is not grpc.aio.EOF:
                return _warmed(message)
        except grpc.RpcError as error:
            raise translated(error, self._target) from None
        except asyncio.CancelledError:
            if self._cancelled_by_close():
                raise Cancelled("the warming was ended") from None
            raise
        if unsent:
            return unsent.popleft()
        if self._requests.failure is not None:
            raise self._requests.failure
        raise StopAsyncIteration

    async def _sent(self, prompts: AsyncPrompts) -> AsyncIterator[cache_pb2.WarmRequest]:
        try:
            if isinstance(prompts, AsyncIterable):
                async for item in prompts:
                    if (request := self._requests.make(item)) is not None:
                        yield request
            else:
                for item in prompts:
                    if (request := self._requests.make(item)) is not None:
                        yield request
        except Exception as error:  # noqa: BLE001 - raised again by `__anext__`
            self._requests.failure = error


_STATES: dict[int, WarmState] = {cache_pb2.WARM_STATE_CACHED: "cached", cache_pb2.WARM_STATE_COMPUTED: "computed"}


def _warmed(message: cache_pb2.WarmResponse) -> Warmed:
    return Warmed(
        id=message.id,
        state=_STATES.get(message.state, "failed"),
        prompt_tokens=_known(message, "prompt_tokens"),
        cached_tokens=_known(message, "cached_tokens"),
        computed_tokens=_known(message, "computed_tokens"),
        error=message.error,
        replicas=message.replicas or None,
    )


def _known(
    message: cache_pb2.WarmResponse, field: Literal["prompt_tokens", "cached_tokens", "computed_tokens"]
) -> int | None:
    return getattr(message, field) if message.HasField(field) else None
