"""What the streams of a client have in common: a call that is cancelled when they are closed, once."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self


class Call:
    """A call in progress. `close`, or leaving the `with` block, cancels what is not finished of it."""

    def __init__(self, call: Any, target: str) -> None:
        self._call = call
        self._target = target
        self._closed = False

    def close(self) -> None:
        """Cancel the call if it is not finished. Idempotent."""
        self._closed = True
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncCall:
    """`Call` for asyncio."""

    def __init__(self, call: Any, target: str) -> None:
        self._call = call
        self._target = target
        self._closed = False

    async def close(self) -> None:
        """Cancel the call if it is not finished. Idempotent."""
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
