"""Answering a stream of requests several at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

Request = TypeVar("Request")
Response = TypeVar("Response")


async def answer_each(
    requests: AsyncIterator[Request],
    at_once: int,
    answer: Callable[[int, Request], Awaitable[Response]],
    write: Callable[[Response], Awaitable[None]],
) -> None:
    """Write the answer to each request, of which `answer` also gets the position, as soon as there is one.

    No more than `at_once` are read that are not answered: whoever sends too fast has to
    wait. Raises what any `answer` raises, and then the others are cancelled.
    """
    room = asyncio.Semaphore(at_once)
    writing = asyncio.Lock()  # a stream takes one message at a time

    async def one(position: int, request: Request) -> None:
        response = await answer(position, request)
        async with writing:
            await write(response)
        room.release()

    try:
        async with asyncio.TaskGroup() as group:
            position = 0
            await room.acquire()
            async for request in requests:
                group.create_task(one(position, request))
                position += 1
                await room.acquire()  # before the next is read
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
