"""What every call passes through: who calls is found out, its messages are read, its errors become statuses.

In that order, so that nothing is done for a caller who is not known, not even reading. Every
answer, also an error, says which replica it comes from, if this one has a name.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health

from engine import wire
from engine.front import Context, Front
from prefixcache.errors import Internal, PrefixCacheError
from prefixcache.results import REPLICA

# Load balancers and probes ask, and are told nothing but whether the server serves.
OPEN = f"/{health.SERVICE_NAME}/"

log = structlog.get_logger()


class Answers(grpc.aio.ServerInterceptor):
    """Wraps every handler of a server; a service that is added needs to do nothing for it."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        name = "_".join(
            "stream" if many else "unary" for many in (handler.request_streaming, handler.response_streaming)
        )
        call = _Call(self._front, handler_call_details.method, handler, getattr(handler, name))
        answer = call.answer_streaming if handler.response_streaming else call.answer
        return handler._replace(request_deserializer=None, **{name: answer})


class _Call:
    """One call, from its bytes to its status."""

    def __init__(self, front: Front, method: str, handler: Any, handle: Callable[[Any, Context], Any]) -> None:
        self._front = front
        self._method = method
        self._deserialize = handler.request_deserializer
        self._streaming = handler.request_streaming
        self._handle = handle

    async def answer(self, data: Any, context: Context) -> Any:
        """Return the one response."""
        context.set_trailing_metadata(self._signature)
        try:
            return await self._handle(self._admitted(data, context), context)
        except Exception as error:  # noqa: BLE001 - becomes a status, or is raised again
            await self._refuse(context, error)

    async def answer_streaming(self, data: Any, context: Context) -> None:
        """Write the responses, of a handler that writes them itself or yields them."""
        context.set_trailing_metadata(self._signature)
        try:
            responses = self._handle(self._admitted(data, context), context)
            if hasattr(responses, "__aiter__"):
                async for response in responses:
                    await context.write(response)
            else:
                await responses
        except Exception as error:  # noqa: BLE001 - becomes a status, or is raised again
            await self._refuse(context, error)

    @property
    def _signature(self) -> tuple[tuple[str, str], ...]:
        return ((REPLICA, self._front.replica_id),) if self._front.replica_id else ()

    def _admitted(self, data: Any, context: Context) -> Any:
        """Return the request, or the iterator of requests, of a caller who may call."""
        self._admit(context)
        return self._read_each(data, context) if self._streaming else self._read(data)

    def _admit(self, context: Context) -> None:
        if not self._method.startswith(OPEN):
            self._front.admit(context)

    def _read(self, data: bytes) -> Any:
        try:
            return self._deserialize(data)
        except Exception as error:  # noqa: BLE001 - whatever protobuf raises
            raise wire.unreadable(self._method, error) from None

    async def _read_each(self, data: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
        async for message in data:
            self._admit(context)  # a token that was taken out since the call began gets nothing more done
            yield self._read(message)

    async def _refuse(self, context: Context, error: Exception) -> None:
        if not isinstance(error, PrefixCacheError):
            if isinstance(error, grpc.aio.AbortError) or context.done():
                raise error
            log.error("a call failed because of a bug", exc_info=error, method=self._method)
            error = Internal("the server has a bug; its log says more")
        status = wire.status_of(error)
        await context.abort(status.code, status.details, (*self._signature, *status.trailing_metadata))
