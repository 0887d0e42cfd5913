"""A replica's side of the hints: keeps its lease and its table in Redis current, in a thread of its own.

    engine's thread      puts what it has stored and removed into a bounded inbox
    publisher's thread   applies it to its own table, whether Redis answers or not, and
                         tells Redis which buckets have changed

Nothing waits for Redis but this thread. When something was lost on the way there (a state
that is not the expected one, a call without an answer) all of the table is published
anew; when something was lost on the way here (the inbox was full) the engine is asked
for all that is stored.

Changes that go to Redis in one call are seen there all at once. What is too much for one
call goes in the order in which buckets changed first, with all that is in them by then: so
parents come before children roughly, and while all of a table is published anew not at
all. A lookup in such a moment may find less than there is, or a child without its parents.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import structlog

from prefixcache.hints import schema
from prefixcache.hints.connection import NoHints, call, close, end, explained, open_redis, shown
from prefixcache.hints.schema import DEFAULT_PREFIX, Group, Keys, Lease, Load, checked_name
from prefixcache.hints.table import BUCKET_BYTES, Table
from prefixcache.lease import CacheEvent, Stored
from prefixcache.tokens import HASH_BYTES

BUFFER_BYTES = 32 << 20
"""How much of what the engine has said may wait to be applied: more than a million blocks."""
SLICE_BLOCKS = 512
"""Applied at a time: about a millisecond in which the engine cannot run."""
CALL_BUCKETS = 512
"""Published by one call, wherever they lie; Redis is busy with it for about a millisecond."""
CALL_BYTES = 64 << 10
"""Published by one call when all of the table is."""
CALL_SECONDS = 3.0
"""How long a call may take. There is nobody who waits for it."""
GATHER_SECONDS = 0.002
"""Between a change and its publication, so that those which come together go together."""
LOAD_SECONDS = 0.5
"""How often a load that changes is told, at most."""
BACKOFF_SECONDS = (0.05, 2.0)
INTEREST_SECONDS = 3600
"""How long a group is listed after its last replica was there."""
LIST_SECONDS = 60.0
"""Between two times that a replica lists its group."""
LEAVE_SECONDS = 1.0
STOP_SECONDS = 3.0

_EVENT_BYTES = 256  # besides its hashes
_SLICE_BYTES = SLICE_BLOCKS * HASH_BYTES
_CALL_RUN = CALL_BYTES // BUCKET_BYTES

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class PublisherStatus:
    """`current`: Redis knows all that is stored, but for the last moments. `blocks`: what it knows.

    `republished` counts how often everything was published again; `error` says why
    nothing can be published now.
    """

    current: bool = False
    blocks: int = 0
    republished: int = 0
    error: str = ""


class Publisher:
    """Publishes what one replica has, from `start` to `stop`.

    `load` is called from the publisher's thread and must be quick and safe there. `resync`
    is called there too; it asks for `restart` to be called by the engine, soon. Raises
    InvalidArgument for a URL or a name of no use; nothing after that raises.
    """

    def __init__(
        self,
        url: str,
        *,
        group: Group,
        replica_id: str,
        address: str,
        model: str,
        blocks: int,
        load: Callable[[], Load],
        resync: Callable[[], None],
        prefix: str = DEFAULT_PREFIX,
        lease_seconds: float = 12.0,
        username: str | None = None,
        password: str | None = None,
    ) -> None:
        checked_name(replica_id, "the replica id")
        checked_name(group.deployment, "the deployment")
        self._redis = open_redis(url, timeout=CALL_SECONDS, username=username, password=password)
        self._where = shown(url)
        self._group = group
        self._keys = Keys(prefix)
        self._replica_id = replica_id
        self._address = address
        self._model = model
        self._blocks = blocks
        self._load = load
        self._resync = resync
        self._lease_seconds = lease_seconds
        self._thread = threading.Thread(target=self._run, name="hints", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._woken = False
        self._inbox = _Inbox()
        self._process = secrets.token_hex(8)
        self._draining = False
        self._ended = threading.Event()
        # From here on for the publisher's thread only.
        self._arrived = asyncio.Event()  # something in the inbox
        self._news = asyncio.Event()  # something to be told to Redis
        self._end = asyncio.Event()
        self._table = Table(blocks)
        self._applying = False  # a snapshot: the table is not yet worth publishing
        self._nonce = ""
        self._own: deque[str] = deque(maxlen=16)  # nonces that are known not to be another live process's
        self._taking_over = True
        self._renew_at = 0.0
        self._load_at = 0.0
        self._told: Load | None = None
        self._told_draining = False
        self._list_at = 0.0
        self._state: bytes | None = None  # of the table in Redis; None if that is not known
        self._anew = False  # the table is another one than that which was begun in Redis
        self._rest = 0  # the first bucket of those still to be published anew
        self._changed: deque[int] = deque()  # buckets to be published
        self._republished = 0
        self._logged: Literal["nothing", "current", "stopped"] = "nothing"
        self._delay = BACKOFF_SECONDS[0]
        self._status = PublisherStatus()

    # From any thread

    def start(self) -> None:
        """Begin to publish; what was heard before is not lost."""
        self._thread.start()

    def stop(self) -> None:
        """Leave Redis, if that can be done within a second, and end. Idempotent."""
        self._ended.set()
        self._post(self._end.set)
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS)

    def drain(self) -> None:
        """Say in the lease, at once, that nothing new is taken."""
        self._draining = True
        self._post(self._news.set)

    @property
    def status(self) -> PublisherStatus:
        return self._status

    # On the engine's thread

    def heard(self, event: CacheEvent) -> None:
        """Take note of a change. Never waits; if too much is waiting already, all of it is dropped."""
        inbox = self._inbox
        if inbox.full or self._ended.is_set():
            return
        inbox.put(event)
        self._wake()

    def restart(self, stored: Iterable[Stored]) -> None:
        """Forget everything: this is what is stored. What is heard later comes after it."""
        self._inbox = _Inbox([event.hashes for event in stored])
        self._wake()

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            self._post(self._look)

    def _post(self, function: Callable[[], None]) -> None:
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended
                loop.call_soon_threadsafe(function)

    # On the publisher's thread

    def _look(self) -> None:
        self._woken = False  # before looking, so that what comes from now on wakes
        self._arrived.set()

    def _run(self) -> None:
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(self._main(loop))
        finally:
            loop.close()  # waits for nothing, such as the resolver of host names

    async def _main(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._look()
        if self._ended.is_set():
            self._end.set()
        ending = asyncio.create_task(self._end.wait())
        tasks = [asyncio.create_task(self._apply()), asyncio.create_task(self._publish())]
        done, _ = await asyncio.wait([ending, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in done - {ending}:
            log.error("hints have ended by a bug; requests are served as ever", exc_info=task.exception())
        await end([ending, *tasks])
        with contextlib.suppress(NoHints, TimeoutError):
            async with asyncio.timeout(LEAVE_SECONDS):
                if self._own:
                    await self._leave(self._own[-1])
        with contextlib.suppress(NoHints, TimeoutError), explained(self._where):
            async with asyncio.timeout(LEAVE_SECONDS):
                await close(self._redis)
        self._status = PublisherStatus(False, 0, self._republished, "the publisher has ended")
        self._ended.set()

    # Applying

    async def _apply(self) -> None:
        while True:
            inbox = self._inbox
            if inbox.full and not inbox.reported:
                inbox.reported = True
                self._logged = "stopped"
                log.warning(
                    "more changes of the cache came than could be noted for Redis: hints are built anew",
                    redis=self._where,
                )
                self._say()
                self._resync()
            if inbox.snapshot is not None:
                await self._begin_anew(inbox, inbox.snapshot)
                continue
            event = inbox.next()
            if event is None:
                self._arrived.clear()
                if self._inbox is inbox and not inbox.waits:
                    await self._arrived.wait()
                continue
            change = self._table.add if isinstance(event, Stored) else self._table.discard
            await self._in_slices(change, event.hashes)
            inbox.done(event)

    async def _begin_anew(self, inbox: _Inbox, snapshot: list[bytes]) -> None:
        self._applying = True
        self._table.clear()
        for hashes in snapshot:
            if self._inbox is not inbox:
                return
            await self._in_slices(self._table.add, hashes)
        inbox.snapshot = None
        self._applying = False
        self._anew = True
        self._news.set()

    async def _in_slices(self, change: Callable[[bytes], None], hashes: bytes) -> None:
        for start in range(0, len(hashes), _SLICE_BYTES):
            change(hashes[start : start + _SLICE_BYTES])
            self._news.set()
            await asyncio.sleep(0)

    # Publishing

    async def _publish(self) -> None:
        while True:
            try:
                await self._hold()
            except NoHints as error:
                self._say(str(error))
            except Exception as error:
                log.exception("hints failed in a way that nobody expected; they are tried again")
                self._say(f"unexpected: {type(error).__name__}")
            await asyncio.sleep(self._delay * random.uniform(0.5, 1.0))
            self._delay = min(self._delay * 2, BACKOFF_SECONDS[1])

    async def _hold(self) -> None:
        """Keep the lease, and the table current, until Redis cannot be asked."""
        while True:
            if not self._nonce:
                await self._register()
            elif self._renewal_is_due():
                await self._renew()
            elif self._applying:
                await self._wait()
            elif self._anew or self._state is None:
                await self._begin()
            elif self._rest < self._table.buckets:
                await self._go_on()
            elif self._changed or self._table.dirty:
                await self._tell()
            else:
                self._say()
                if await self._wait():
                    await asyncio.sleep(GATHER_SECONDS)

    async def _wait(self) -> bool:
        """Wait for news, or until the lease or the load is to be looked at; say whether there are any."""
        self._news.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, min(self._renew_at, self._load_at) - time.monotonic())):
                await self._news.wait()
                return True
        return False

    async def _ask(self, script: str, *arguments: str | bytes | int, nonce: str | None = None) -> object:
        """Run a script on the keys of this replica."""
        nonce = self._nonce if nonce is None else nonce
        keys = [self._keys.replicas(self._group), self._keys.table(self._group, self._replica_id, nonce)]
        with explained(self._where):
            async with asyncio.timeout(CALL_SECONDS):
                answer = await call(self._redis, script, keys, [self._replica_id, nonce, *arguments])
        self._delay = BACKOFF_SECONDS[0]
        return answer

    # The lease

    def _lease(self, nonce: str) -> str:
        self._told = self._load()
        self._told_draining = self._draining
        lease = Lease(
            replica_id=self._replica_id,
            nonce=nonce,
            address=self._address,
            model=self._model,
            block_size=self._group.block_size,
            blocks=self._blocks,
            load=self._told,
            published=self._published,
            draining=self._told_draining,
            lease_seconds=self._lease_seconds,
            process=self._process,
        )
        return lease.payload()

    @property
    def _milliseconds(self) -> int:
        return int(self._lease_seconds * 1000)

    @property
    def _published(self) -> int:
        complete = self._state is not None and self._rest >= self._table.buckets
        return len(self._table) if complete and not self._applying and not self._anew else 0

    def _renewed(self) -> None:
        now = time.monotonic()
        self._renew_at = now + self._lease_seconds / 3 * random.uniform(0.8, 1.0)
        self._load_at = now + LOAD_SECONDS

    def _renewal_is_due(self) -> bool:
        now = time.monotonic()
        if now >= self._renew_at or self._draining != self._told_draining:
            return True
        if now < self._load_at:
            return False
        self._load_at = now + LOAD_SECONDS
        return self._load() != self._told

    async def _register(self) -> None:
        """Take the replica's name; returns also if another live process has it, when its lease should be over."""
        nonce = secrets.token_hex(schema.NONCE_CHARACTERS // 2)
        self._own.append(nonce)
        take = self._taking_over
        while True:
            arguments = (self._milliseconds, self._lease(nonce), int(take))
            answer = await self._ask(schema.REGISTER, *arguments, nonce=nonce)
            assert isinstance(answer, list)
            before, taken, left = answer[0].decode(), bool(answer[1]), answer[2] / 1000
            if taken or before not in self._own:
                break
            take = True  # what a Redis that was set back to an earlier time still knows of this process
        if not taken:
            self._contested(left)
            await asyncio.sleep(left * random.uniform(1.0, 1.1))
            return
        self._taking_over = False
        self._nonce, self._state = nonce, None
        self._renewed()
        if before not in ("", nonce):
            await self._leave(before)
        await self._list_group()

    async def _list_group(self) -> None:
        """Say that the group is there, for those who ask which there are."""
        self._list_at = time.monotonic() + LIST_SECONDS
        now = int(time.time() * 1000)
        until = now + INTEREST_SECONDS * 1000
        with explained(self._where):
            async with asyncio.timeout(CALL_SECONDS):
                await self._redis.execute_command("ZREMRANGEBYSCORE", self._keys.groups, "-inf", now)
                await self._redis.execute_command("ZADD", self._keys.groups, until, str(self._group))

    def _contested(self, left: float) -> None:
        error = f"another process is alive as replica {self._replica_id!r}: give each a --replica-id of its own"
        if self._status.error != error:
            log.error(
                error,
                redis=self._where,
                meaning="this one publishes nothing until the other's lease is over",
                seconds=round(left, 1),
            )
        self._logged = "stopped"
        self._status = PublisherStatus(False, 0, self._republished, error)

    async def _renew(self) -> None:
        state = b"" if self._state is None else self._state
        answer = await self._ask(schema.RENEW, self._milliseconds, self._lease(self._nonce), state)
        self._renewed()
        if answer != 1:
            self._lost(lease=answer == 0)
        if time.monotonic() >= self._list_at:
            await self._list_group()

    def _lost(self, *, lease: bool) -> None:
        """Redis has lost the table, or the lease too: then what was said so far is void, and a new nonce is needed."""
        log.debug("hints are published anew", redis=self._where, lost="the lease" if lease else "the table")
        self._state = None
        if lease:
            self._nonce = ""

    async def _leave(self, nonce: str) -> None:
        await self._ask(schema.LEAVE, nonce=nonce)

    # The table

    async def _begin(self) -> None:
        state, anew = _new_state(), self._anew
        self._state, self._anew = None, False
        if await self._ask(schema.BEGIN, self._milliseconds, state, len(self._table.data)) != 1:
            self._lost(lease=True)
            return
        if self._logged != "nothing" and not anew:
            self._republished += 1
        self._state, self._rest = state, 0
        self._changed.clear()
        self._table.dirty = {}

    async def _go_on(self) -> None:
        """Publish the next part of all of the table that has something in it."""
        while self._rest < self._table.buckets:
            buckets = range(self._rest, min(self._rest + _CALL_RUN, self._table.buckets))
            self._rest = buckets.stop
            if self._table.any_in(buckets):
                await self._change(self._table.patches(buckets))
                break
        if self._rest >= self._table.buckets:
            self._renew_at = 0.0  # so that the number of blocks is told

    async def _tell(self) -> None:
        """Publish the buckets that have changed, those first that did first."""
        if not self._changed:
            self._changed.extend(self._table.dirty)
            self._table.dirty = {}
        buckets = list(islice(self._changed, CALL_BUCKETS))
        if await self._change(self._table.patches(buckets)):
            for _ in buckets:
                self._changed.popleft()

    async def _change(self, patches: bytes) -> bool:
        """Write into the table in Redis; False if it is not the one that was expected, or not this one's any more."""
        before, after = self._state, _new_state()
        assert before is not None
        self._state = None  # not known until there is an answer
        answer = await self._ask(schema.PUBLISH, self._milliseconds, before, after, patches)
        if answer != 1:
            self._lost(lease=answer == 0)
            return False
        self._state = after
        return True

    # What is said of it

    def _say(self, error: str = "") -> None:
        """Note how it stands; log it if hints have stopped or are current again."""
        current = not error and not self._inbox.full and not self._applying and not self._anew
        self._status = PublisherStatus(current, self._published, self._republished, error)
        if current and self._logged != "current":
            self._logged = "current"
            log.info("hints are current", redis=self._where, replica=self._replica_id, blocks=self._published)
        elif error and self._logged != "stopped":
            self._logged = "stopped"
            log.warning(
                "hints are not published: routers do not see what is cached here; requests are served as ever",
                reason=error,
            )


class _Inbox:
    """What the engine's thread has said and the publisher's has not applied yet: a snapshot first, if there is one.

    Each thread writes its own counter only.
    """

    def __init__(self, snapshot: list[bytes] | None = None) -> None:
        self.snapshot = snapshot
        self.full = False
        self.reported = False
        self._events: deque[CacheEvent] = deque()
        self._heard = 0
        self._applied = 0

    @property
    def waits(self) -> bool:
        """Whether there is something to be done."""
        return bool(self._events) or self.snapshot is not None or (self.full and not self.reported)

    def put(self, event: CacheEvent) -> None:
        self._heard += _size(event)
        if self._heard - self._applied > BUFFER_BYTES:
            self.full = True
            self._events.clear()
        else:
            self._events.append(event)

    def next(self) -> CacheEvent | None:
        try:
            return self._events.popleft()
        except IndexError:
            return None

    def done(self, event: CacheEvent) -> None:
        self._applied += _size(event)


def _size(event: CacheEvent) -> int:
    return len(event.hashes) + _EVENT_BYTES


def _new_state() -> bytes:
    return secrets.token_bytes(schema.STATE_BYTES)
