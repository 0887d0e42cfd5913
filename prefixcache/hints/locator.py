"""A reader's side of the hints: who is there, and who holds how much of a prompt.

A caller never waits longer than its budget. What Redis has not answered by then goes on
in the background until it has or fails, so that a connection that takes longer than the
budget (TLS, another continent) is there for the next one. After a failure nobody waits at
all for a while, and then one caller tries.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from prefixcache.errors import InvalidArgument
from prefixcache.hints import schema
from prefixcache.hints.connection import NoHints, call, close, end, explained, open_redis, shown
from prefixcache.hints.schema import DEFAULT_PREFIX, Group, Keys, Lease
from prefixcache.hints.table import query

PAUSE_SECONDS = 1.0
"""How long nobody asks where blocks are after Redis could not be asked."""
CALL_SECONDS = 2.0
"""How long a call may go on behind the back of its caller."""
MAX_CALLS = 16
"""At a time, each on a connection of its own; the others wait for one of them to end."""

Answer = TypeVar("Answer")


class Locator:
    """Asks the Redis at a URL. `timeout` is what each call may take, in seconds. All of them raise NoHints.

    Raises InvalidArgument for a URL of no use. Lives in one event loop; to be closed.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = DEFAULT_PREFIX,
        timeout: float = 0.03,
        username: str | None = None,
        password: str | None = None,
    ) -> None:
        self._timeout = timeout
        self._redis = open_redis(url, timeout=max(timeout, CALL_SECONDS), username=username, password=password)
        self._where = shown(url)
        self._keys = Keys(prefix)
        self._calls: set[asyncio.Task[Any]] = set()
        self._room = asyncio.Semaphore(MAX_CALLS)
        self._failure = ""
        self._ask_again_at = 0.0

    async def groups(self) -> list[Group]:
        """Return the groups that have replicas, or had some lately, those seen last first."""
        now = int(time.time() * 1000)
        names = await self._within(
            lambda: self._redis.execute_command("ZRANGEBYSCORE", self._keys.groups, now, "+inf"),
        )
        groups = []
        for name in reversed(names):
            try:
                groups.append(Group.parse(name.decode()))
            except (InvalidArgument, UnicodeDecodeError):
                continue  # of another version
        return groups

    async def leases(self, group: Group) -> list[Lease]:
        """Return what the replicas that are alive say of themselves, sorted by their ids. One round trip."""
        roster = await self._within(lambda: call(self._redis, schema.ROSTER, [self._keys.replicas(group)], []))
        now, records = int(roster[0]), roster[1:]
        found = []
        for name, record in zip(records[::2], records[1::2], strict=True):
            lease = Lease.parse(name.decode(errors="replace"), record, now)
            if lease is not None:
                found.append(lease)
        return sorted(found, key=lambda lease: lease.replica_id)

    async def find(self, group: Group, hashes: bytes, leases: Sequence[Lease]) -> dict[str, int]:
        """Return how many of a prompt's blocks, from the first, each of those replicas holds, by replica id.

        Left out are those of which Redis has nothing, as when it has lost it, or they have
        a new lease: what they hold is not known. `hashes` are 16 bytes per block. One round
        trip. For about a second after a failure it raises at once, so that not every
        request waits for what does not come.
        """
        if not leases:
            return {}
        if not hashes:
            return {lease.replica_id: 0 for lease in leases}
        if self._failure:
            now = time.monotonic()
            if now < self._ask_again_at:
                raise NoHints(self._failure)
            self._ask_again_at = now + PAUSE_SECONDS  # the others go on without
        keys = [self._keys.table(group, lease.replica_id, lease.nonce) for lease in leases]
        found = await self._within(lambda: call(self._redis, schema.FIND, keys, [query(hashes)]))
        return {lease.replica_id: blocks for lease, blocks in zip(leases, map(int, found), strict=True) if blocks >= 0}

    async def close(self) -> None:
        """Give up what is still going on, and close the connections."""
        await end(self._calls)
        with explained(self._where):
            await close(self._redis)

    async def _within(self, ask: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Return what a call returns, if it does so within the budget."""
        start = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout):
                await self._room.acquire()
        except TimeoutError:
            raise NoHints(f"too many questions wait for Redis at {self._where}") from None
        task = asyncio.ensure_future(self._explained(ask))
        self._calls.add(task)
        task.add_done_callback(self._ended)
        await asyncio.wait({task}, timeout=max(0.0, start + self._timeout - time.monotonic()))
        if not task.done():
            self._failed(f"Redis at {self._where} does not answer within {self._timeout * 1000:g} ms")
        elif (error := task.exception()) is not None:
            self._failed(str(error) or repr(error))
        else:
            self._failure = ""
            return task.result()
        raise NoHints(self._failure)

    async def _explained(self, ask: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        with explained(self._where):
            async with asyncio.timeout(max(self._timeout, CALL_SECONDS)):
                return await ask()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._calls.discard(task)
        self._room.release()
        if not task.cancelled():
            task.exception()  # is known, also if nobody waits for it any more

    def _failed(self, reason: str) -> None:
        self._failure = reason
        self._ask_again_at = time.monotonic() + PAUSE_SECONDS
