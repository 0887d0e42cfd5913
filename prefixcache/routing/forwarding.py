"""Passing calls on: to one replica, to the first of several that can be reached, to every one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import NamedTuple

from prefixcache.errors import Unavailable
from prefixcache.results import REPLICA
from prefixcache.routing.fleet import Fleet
from prefixcache.routing.incoming import Context, Incoming
from prefixcache.routing.replica import Call, Metadata, Refused, Replica, signed


class Answer(NamedTuple):
    """A message, and the metadata that go behind it."""

    data: bytes
    metadata: Metadata


async def ask(replica: Replica, method: str, data: bytes, incoming: Incoming) -> Answer:
    """Make a call of one message each way. Raises Refused."""
    async with replica.call(method, data, incoming.metadata, incoming.remaining, movable=lambda: True) as call:
        return Answer(await call.only(), signed(await call.trailing(), replica.id))


async def ask_first(
    fleet: Fleet, replicas: Sequence[Replica], method: str, data: bytes, incoming: Incoming
) -> tuple[Replica, Answer]:
    """Ask one replica after the other until one can be reached. Raises Refused, of the last, and Unavailable."""
    last: Refused | None = None
    for replica in replicas:
        try:
            return replica, await ask(replica, method, data, incoming)
        except Refused as refused:
            if not refused.unreachable:
                raise
            fleet.failed(replica)
            last = refused
    raise last or fleet.nobody()


class Answers(NamedTuple):
    """What every replica said."""

    given: dict[Replica, Answer]
    refused: dict[Replica, Refused]

    @property
    def metadata(self) -> Metadata:
        """The names of those who answered, behind each other."""
        return ((REPLICA, ",".join(replica.id for replica in self.given)),)

    def check(self, consequence: str = "") -> None:
        """Raise what a replica has refused the call with; one that cannot be reached is refused with `consequence`.

        Without a consequence those that cannot be reached are left out, unless it is all of them.
        """
        for refused in self.refused.values():
            if not refused.unreachable:
                raise refused
        for replica, refused in self.refused.items():
            if consequence:
                raise Unavailable(f"replica {replica.id} cannot be reached, so {consequence} ({refused.details})")
            if not self.given:
                raise refused


async def ask_all(fleet: Fleet, method: str, data: bytes, incoming: Incoming) -> Answers:
    """Ask every replica at the same time. Raises Unavailable if there is none."""
    await fleet.ready()
    return await ask_each(fleet, fleet.all, method, data, incoming)


async def ask_each(fleet: Fleet, replicas: Iterable[Replica], method: str, data: bytes, incoming: Incoming) -> Answers:
    """Ask these replicas at the same time. Raises Unavailable if there are none."""
    answers = Answers({}, {})

    async def one(replica: Replica) -> Answer | Refused:
        try:
            return await ask(replica, method, data, incoming)
        except Refused as refused:
            if refused.unreachable:
                fleet.failed(replica)
            return refused

    asked = list(replicas)
    if not asked:
        raise fleet.nobody()
    for replica, answer in zip(asked, await asyncio.gather(*map(one, asked)), strict=True):
        if isinstance(answer, Refused):
            answers.refused[replica] = answer
        else:
            answers.given[replica] = answer
    return answers


async def relay(
    replica: Replica, method: str, request: bytes | AsyncIterator[bytes], incoming: Incoming, context: Context
) -> Metadata:
    """Pass a call and all that is answered through; return what goes behind it. Raises Refused."""
    async with replica.call(method, request, incoming.metadata, incoming.remaining) as call:
        await pass_on(call, context)
        return signed(await call.trailing(), replica.id)


async def pass_on(call: Call, context: Context, *first: bytes) -> None:
    """Write the messages that were read already, then those that come."""
    if first and (metadata := await call.initial()):
        await context.send_initial_metadata(metadata)
    for message in first:
        await context.write(message)
    while (message_or_end := await call.read()) is not None:
        await context.write(message_or_end)
