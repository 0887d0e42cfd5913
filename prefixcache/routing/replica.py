"""One replica as a gateway sees it: the channel to it, and calls whose messages pass through as bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from types import TracebackType
from typing import Any, Self

import grpc
from google.rpc import error_details_pb2

from prefixcache.channel import HEALTH, SERVING, details_of
from prefixcache.errors import QUEUE_FULL, REASON_DOMAIN, STATUS_DETAILS
from prefixcache.hints.schema import Lease
from prefixcache.results import REPLICA

Metadata = tuple[tuple[str, str | bytes], ...]


class Refused(Exception):
    """The status, other than OK, with which a call to a replica has ended; `metadata` is what came with it.

    A `final` one cannot be made up for by another replica.
    """

    def __init__(
        self, replica_id: str, code: grpc.StatusCode, details: str, metadata: Metadata = (), *, final: bool = False
    ) -> None:
        super().__init__(f"{replica_id}: {code.name}: {details}")
        self.replica_id = replica_id
        self.code = code
        self.details = details
        self.metadata = metadata
        self.final = final

    @property
    def unreachable(self) -> bool:
        """Whether the replica is gone, or going."""
        return self.code is grpc.StatusCode.UNAVAILABLE

    @property
    def full(self) -> bool:
        """Whether its queue is full, which another's need not be; a tenant's quota is another matter."""
        if self.code is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            return False
        return any(
            info.reason == QUEUE_FULL and info.domain == REASON_DOMAIN
            for info in details_of(self.metadata, error_details_pb2.ErrorInfo)
        )


def signed(metadata: Iterable[tuple[str, Any]], replica_id: str) -> Metadata:
    """Return a replica's trailing metadata as they are passed on: with its name, if it did not give it."""
    kept = tuple((key, value) for key, value in metadata if key == STATUS_DETAILS or not key.startswith("grpc-"))
    return kept if any(key == REPLICA for key, _ in kept) else (*kept, (REPLICA, replica_id))


class Replica:
    """Where calls can be sent. `retire` closes the channel as soon as no call uses it.

    `lease` is the last that is known and `listed` when it was; a `fixed` replica was not
    found but named. `serving` is whether it said so when it was last asked, `trouble` why
    not, and `signature` the name that it gives itself in its answers, "" if none.
    """

    def __init__(self, lease: Lease, channel: grpc.aio.Channel, *, fixed: bool = False) -> None:
        self.lease = lease
        self.fixed = fixed
        self.listed = 0.0
        self.serving = False
        self.trouble = "it has not answered yet"
        self.signature = ""
        self.asked = asyncio.Event()
        self.ask_again = asyncio.Event()
        self._channel: Any = channel  # its types know messages, and these are bytes
        self._calls: set[Call] = set()
        self._retired = self._closed = False

    @property
    def id(self) -> str:
        return self.lease.replica_id

    @property
    def busy(self) -> int:
        """How many calls are in progress."""
        return len(self._calls)

    def call(
        self,
        method: str,
        request: bytes | AsyncIterator[bytes] | None,
        metadata: Metadata = (),
        timeout: float | None = None,
        *,
        movable: Callable[[], bool] = lambda: False,
    ) -> Call:
        """Begin a call; with None for the request its messages are to be written.

        `movable` is asked when the replica has stopped answering: if it says so, the call
        ends with UNAVAILABLE. Otherwise it waits for the replica to wake.
        """
        if isinstance(request, bytes):
            call = self._channel.unary_stream(method)(request, metadata=metadata, timeout=timeout)
        else:
            call = self._channel.stream_stream(method)(request, metadata=metadata, timeout=timeout)
        return Call(self, call, movable, self._calls)

    async def ask_health(self, seconds: float) -> None:
        """Find out whether it serves, within so many seconds. Raises Refused if it does not answer."""
        async with self.call(HEALTH, b"", timeout=seconds) as call:
            self.serving = await call.read() == SERVING
            trailing = await call.trailing()
        self.trouble = "" if self.serving else "it is starting or shutting down"
        self.signature = next((str(value) for key, value in trailing if key == REPLICA), "")

    def lose(self) -> None:
        """It does not answer any more: end the calls that can go elsewhere."""
        for call in list(self._calls):
            call.lose()

    def retire(self) -> None:
        """Close the channel as soon as nothing uses it."""
        self._retired = True
        self.close_if_unused()

    def close_if_unused(self) -> None:
        if self._retired and not self._calls and not self._closed:
            self._closed = True
            _closing.add(closing := asyncio.ensure_future(self._channel.close()))
            closing.add_done_callback(_closing.discard)


_closing: set[asyncio.Future[None]] = set()


class Call:
    """A call in progress. Leaving its `with` block cancels what has not ended."""

    def __init__(self, replica: Replica, call: Any, movable: Callable[[], bool], calls: set[Call]) -> None:
        self.replica = replica
        self._call = call
        self._movable = movable
        self._lost = False
        self._calls = calls
        calls.add(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what has not ended. Idempotent."""
        self._call.cancel()
        self._calls.discard(self)
        self.replica.close_if_unused()

    def lose(self) -> None:
        """See `Replica.call`."""
        if self._movable():
            self._lost = True
            self._call.cancel()

    async def read(self) -> bytes | None:
        """Return the next message, None behind the last. Raises Refused."""
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise self._refused(error) from None
        except asyncio.CancelledError:
            if _cancelled_here():
                raise
            raise self._cut_off() from None
        if message is grpc.aio.EOF:
            return None
        data: bytes = message
        return data

    async def only(self) -> bytes:
        """Return the one message of a call that has one. Raises Refused."""
        message = await self.read()
        if message is None or await self.read() is not None:
            raise Refused(self.replica.id, grpc.StatusCode.INTERNAL, "the replica answered with no or several messages")
        return message

    async def write(self, message: bytes) -> None:
        """Send a message, when there is room for it. Raises Refused."""
        try:
            await self._call.write(message)
        except grpc.aio.AioRpcError as error:
            raise self._refused(error) from None
        except asyncio.InvalidStateError:
            raise await self._ended() from None
        except asyncio.CancelledError:
            if _cancelled_here():
                raise
            raise self._cut_off() from None

    async def done_writing(self) -> None:
        """Say that there are no more messages."""
        if not self._call.done():
            await self._call.done_writing()

    async def initial(self) -> Metadata:
        """The metadata that came before the first message."""
        return tuple((key, value) for key, value in await self._call.initial_metadata() if not key.startswith("grpc-"))

    async def trailing(self) -> Metadata:
        """The metadata that came behind the last message."""
        return tuple(await self._call.trailing_metadata() or ())

    async def _ended(self) -> Refused:
        code, details = await self._call.code(), await self._call.details()
        if code is grpc.StatusCode.CANCELLED:
            return self._cut_off()
        return Refused(self.replica.id, code, details or "", await self.trailing())

    def _refused(self, error: grpc.aio.AioRpcError) -> Refused:
        if error.code() is grpc.StatusCode.CANCELLED:
            return self._cut_off()
        return Refused(self.replica.id, error.code(), error.details() or "", tuple(error.trailing_metadata() or ()))

    def _cut_off(self) -> Refused:
        """The replica, or this side when it was lost, has ended the call; its caller has not."""
        why = "does not answer any more" if self._lost else "has ended the call"
        details = f"replica {self.replica.id} {why}: send the request again"
        return Refused(self.replica.id, grpc.StatusCode.UNAVAILABLE, details)


def _cancelled_here() -> bool:
    """Whether a CancelledError means that this task is cancelled, and not a call that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
