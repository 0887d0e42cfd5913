"""Watching what a server's cache stores and removes, and the shapes of prompts that arrive.

    with client.watch_events() as watch:
        for event in watch:
            ...

First come the blocks that are stored already, then `SnapshotEnd`, then every change.
After a disconnect, `client.watch_events(after=watch.position)` goes on where it was cut
off; if that is too long ago it raises OutOfRange, and a new snapshot is needed.
`client.watch_prompts()` begins with the next prompt.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import grpc

from prefixcache.channel import translated
from prefixcache.errors import Cancelled, InvalidArgument, Unavailable
from prefixcache.streams import AsyncCall, Call
from prefixcache.tokens import HASH_BYTES
from prefixcache.v1 import cache_pb2

T = TypeVar("T")


class Position(NamedTuple):
    """An event, as the place after which to go on."""

    stream_id: str
    sequence: int


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """Blocks that can be reused, each the continuation of the one before; `parent` is the hash before the first.

    `snapshot`: they were stored before the watching began.
    """

    sequence: int
    namespace: str
    parent: bytes
    hashes: tuple[bytes, ...]
    snapshot: bool = False


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """Blocks that can no longer be reused, whatever the reason; the deepest comes first."""

    sequence: int
    namespace: str
    hashes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class SnapshotEnd:
    """All blocks that were stored already have been named; there are so many."""

    sequence: int
    blocks: int


CacheEvent = BlocksStored | BlocksRemoved | SnapshotEnd


@dataclass(frozen=True, slots=True)
class PromptShape:
    """A prompt that arrived, without its text.

    `pieces` are (hash, kind, length in characters) of its words, numbers, spaces and so
    on. Hashes are equal for equal text, until the server starts anew.
    """

    pieces: tuple[tuple[int, str, int], ...]
    namespace: str
    prompt_tokens: int
    cached_tokens: int


class _Reader:
    """Turns messages into events. `position` is None until the snapshot is complete."""

    def __init__(self, after: Position | None) -> None:
        self.position = after

    def request(self) -> cache_pb2.WatchEventsRequest:
        if self.position is None:
            return cache_pb2.WatchEventsRequest()
        try:
            return cache_pb2.WatchEventsRequest(stream_id=self.position.stream_id, sequence=self.position.sequence)
        except (ValueError, TypeError) as error:
            raise InvalidArgument(f"the position cannot be sent: {error}") from error

    def read(self, message: cache_pb2.WatchEventsResponse) -> CacheEvent | None:
        """Return the event, or None for one of a kind that this version does not know."""
        kind = message.WhichOneof("event")
        if kind == "snapshot":
            return _stored(message.sequence, message.snapshot, snapshot=True)
        self.position = Position(message.stream_id, message.sequence)
        match kind:
            case "stored":
                return _stored(message.sequence, message.stored)
            case "removed":
                return BlocksRemoved(message.sequence, message.removed.namespace, _split(message.removed.hashes))
            case "snapshot_end":
                return SnapshotEnd(message.sequence, message.snapshot_end.blocks)
        return None


def _stored(sequence: int, message: cache_pb2.BlocksStored, *, snapshot: bool = False) -> BlocksStored:
    return BlocksStored(sequence, message.namespace, message.parent, _split(message.hashes), snapshot)


def _split(hashes: bytes) -> tuple[bytes, ...]:
    return tuple(hashes[start : start + HASH_BYTES] for start in range(0, len(hashes), HASH_BYTES))


def watch_prompts_request(one_in: int) -> cache_pb2.WatchPromptsRequest:
    try:
        return cache_pb2.WatchPromptsRequest(one_in=one_in)
    except (ValueError, TypeError) as error:
        raise InvalidArgument(f"one_in cannot be sent: {error}") from error


def shape_from(message: cache_pb2.WatchPromptsResponse) -> PromptShape:
    pieces = tuple((piece.hash, piece.kind, piece.characters) for piece in message.pieces)
    return PromptShape(pieces, message.namespace, message.prompt_tokens, message.cached_tokens)


class Watching(Call, Generic[T]):
    """What a server tells for as long as somebody listens; iterate over it. It does not end by itself.

    `close`, or leaving the `with` block, ends the watching.
    """

    def __init__(self, call: Any, read: Callable[[Any], T | None], target: str) -> None:
        super().__init__(call, target)
        self._read = read

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            for message in self._call:
                if (event := self._read(message)) is not None:
                    return event
        except grpc.RpcError as error:
            if self._closed:
                raise Cancelled("the watching was ended") from None
            raise translated(error, self._target) from None
        raise _ended(self._target)


class AsyncWatching(AsyncCall, Generic[T]):
    """`Watching` for asyncio."""

    def __init__(self, call: Any, read: Callable[[Any], T | None], target: str) -> None:
        super().__init__(call, target)
        self._read = read

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        if self._closed:
            raise Cancelled("the watching was ended")
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                if (event := self._read(message)) is not None:
                    return event
        except grpc.RpcError as error:
            raise translated(error, self._target) from None
        except asyncio.CancelledError:
            if self._cancelled_by_close():
                raise Cancelled("the watching was ended") from None
            raise
        raise _ended(self._target)


class Watch(Watching[CacheEvent]):
    """The events of a server's cache.

    `position` is that of the last event, to go on after a disconnect; None until the
    snapshot is complete.
    """

    def __init__(self, method: Any, after: Position | None, target: str, timeout: float | None) -> None:
        self._reader = _Reader(after)
        super().__init__(method(self._reader.request(), timeout=timeout), self._reader.read, target)

    @property
    def position(self) -> Position | None:
        return self._reader.position


class AsyncWatch(AsyncWatching[CacheEvent]):
    """`Watch` for asyncio."""

    def __init__(self, method: Any, after: Position | None, target: str, timeout: float | None) -> None:
        self._reader = _Reader(after)
        super().__init__(method(self._reader.request(), timeout=timeout), self._reader.read, target)

    @property
    def position(self) -> Position | None:
        return self._reader.position


def _ended(target: str) -> Unavailable:
    return Unavailable(f"{target} ended the stream: watch it again")
