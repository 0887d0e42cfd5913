"""The replicas that a gateway may send to: who is there, and who answers.

Redis says who is there, every second. If it cannot be asked, or has lost what it knew, the
replicas known before stay as long as they answer: every replica is asked for its health,
every second and at once after a failed call. One that does not answer is not sent
anything, and calls that wait for its first word go elsewhere if they can.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import grpc

from prefixcache.errors import InvalidArgument, NotFound, Unavailable
from prefixcache.hints.connection import NoHints
from prefixcache.hints.locator import Locator
from prefixcache.hints.schema import Group, Lease, Load
from prefixcache.routing.replica import Refused, Replica
from prefixcache.routing.router import Router
from prefixcache.v1 import generation_pb2

LOOK_SECONDS = 1.0
"""How often Redis is asked who is there, and each replica how it is."""
SHORTEST_PAUSE = 0.05
ANSWER_SECONDS = 4.0
"""How long a replica may take to say how it is, before it is taken for lost."""
READY_SECONDS = 2.0
"""How long the first calls wait until it is known who is there."""

FIXED_BLOCK_SIZE = 16
FIXED_BLOCKS = 1 << 16
"""What is assumed of a replica that was named, until it says more."""

MODEL = "/prefixcache.v1.GenerationService/GetModel"

clock = time.monotonic

Open = Callable[[str], grpc.aio.Channel]


class Fleet:
    """Follows a group of replicas, and those `named` by their addresses, in one event loop.

    `group`: the one to follow; if None, the only one (of a `deployment`), or the one with
    most live replicas. `open_channel` may raise InvalidArgument for an address that must not
    be sent to. `changed` is called when it may have changed whether there is anybody.
    """

    def __init__(
        self,
        router: Router,
        open_channel: Open,
        log: Any,
        *,
        locator: Locator | None = None,
        group: Group | None = None,
        deployment: str | None = None,
        named: Sequence[str] = (),
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.group = group
        self._router = router
        self._open = open_channel
        self._log = log
        self._locator = locator
        self._given = group
        self._deployment = deployment
        self._named = named
        self._changed = changed
        self._replicas: dict[str, Replica] = {}
        self._following: dict[Replica, asyncio.Task[None]] = {}
        self._looking: asyncio.Task[None] | None = None
        self._look_again = asyncio.Event()
        self._ready = asyncio.Event()
        self._complaint = ""
        self._nobody_at = 0.0
        self._refused: dict[str, str] = {}

    def start(self) -> None:
        """Begin to follow."""
        for address in self._named:
            load = Load(free=FIXED_BLOCKS)
            self._add(Lease(address, "named", address, "", FIXED_BLOCK_SIZE, FIXED_BLOCKS, load), fixed=True)
        self._looking = asyncio.create_task(self._look())

    async def close(self) -> None:
        """End, and close what is open as soon as nothing uses it."""
        tasks = [*filter(None, [self._looking]), *self._following.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for replica in self._replicas.values():
            replica.retire()
        self._replicas.clear()
        if self._locator is not None:
            with contextlib.suppress(NoHints):
                await self._locator.close()

    async def ready(self) -> None:
        """Wait until it is known who is there; not for long."""
        if not self._ready.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ready.wait(), READY_SECONDS)
            self._ready.set()

    @property
    def all(self) -> list[Replica]:
        """Every replica that holds, as far as is known, something, whether it can be reached or not."""
        return sorted(self._replicas.values(), key=lambda replica: replica.id)

    @property
    def usable(self) -> list[Replica]:
        """Those that can be sent to now. If none can, those that may turn out to be."""
        willing = [replica for replica in self.all if not replica.lease.draining]
        return [replica for replica in willing if replica.serving] or willing

    @property
    def serving(self) -> bool:
        """Whether there is a replica that takes requests."""
        return any(replica.serving and not replica.lease.draining for replica in self._replicas.values())

    @property
    def leases(self) -> list[Lease]:
        """What is known of those that say in Redis what they hold."""
        return [replica.lease for replica in self.all if not replica.fixed]

    def get(self, replica_id: str) -> Replica:
        """Return the replica of that name. Raises NotFound."""
        replica = self._replicas.get(replica_id)
        if replica is None:
            raise NotFound(f"there is no replica {replica_id!r} here; `prefixcache replicas` lists those there are")
        return replica

    def nobody(self) -> Unavailable:
        """What to tell a caller when there is no replica to send to."""
        if self._complaint:
            return Unavailable("no replica is known, since Redis cannot be asked; the gateway's log says why")
        if self._refused:
            return Unavailable(f"no replica can be used: {'; '.join(sorted(self._refused.values()))}")
        if self._replicas:
            return Unavailable("all replicas are shutting down: try again when others have started")
        return Unavailable("no replica is running: start one with `prefixcache serve --redis ... --advertise ...`")

    def failed(self, replica: Replica) -> None:
        """Say that a call could not reach a replica: nothing is sent there until it answers again."""
        if replica.serving:  # many calls may fail at once, and it is one failure
            self._router.failed(replica.id, clock())
            self._log.warning(f"replica {replica.id} cannot be reached; others are asked meanwhile")
            replica.serving, replica.trouble = False, "it could not be reached"
            self._changed()
        replica.ask_again.set()
        self._look_again.set()

    # Who is there

    async def _look(self) -> None:
        while True:
            try:
                await self._look_once()
            except Exception:  # noqa: BLE001 - without this the gateway would be blind from now on
                self._log.exception("following the replicas failed because of a bug; it goes on")
            if not self._ready.is_set():
                await asyncio.gather(*(replica.asked.wait() for replica in self._replicas.values()))
                self._adopt_names()
                self._tell_router(clock())
                self._ready.set()
            await asyncio.sleep(SHORTEST_PAUSE)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._look_again.wait(), LOOK_SECONDS - SHORTEST_PAUSE)
            self._look_again.clear()

    async def _look_once(self) -> None:
        listed = await self._listed()
        now = clock()
        if not listed:
            self._nobody_at = now
        if listed is not None:
            for lease in listed:
                self._see(lease, now)
            self._forget({lease.replica_id for lease in listed}, now)
        self._adopt_names()
        self._tell_router(now)
        self._changed()

    def _tell_router(self, now: float) -> None:
        aged = [
            one.lease if one.fixed else replace(one.lease, age=one.lease.age + now - one.listed)
            for one in self._replicas.values()
        ]
        self._router.update(aged, now)

    async def _listed(self) -> list[Lease] | None:
        """Return the leases in Redis, None if it cannot be asked."""
        if self._locator is None:
            return []
        try:
            leases = await self._of_group(self._locator)
        except NoHints as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                self._log.warning(f"{error}; the replicas that are known stay in use")
            return None
        if self._complaint:
            self._log.info("Redis answers again")
            self._complaint = ""
        return leases

    async def _of_group(self, locator: Locator) -> list[Lease]:
        """Return the leases of the group, after choosing one if need be."""
        leases = [] if self.group is None else await locator.leases(self.group)
        if leases or self._given is not None:
            return leases
        found: list[tuple[Group, list[Lease]]] = []
        for group in await locator.groups():
            if group != self.group and self._deployment in (None, group.deployment):
                found.append((group, await locator.leases(group)))
        alive = sorted((entry for entry in found if entry[1]), key=lambda entry: (-len(entry[1]), str(entry[0])))
        if not alive:
            return []
        self.group, leases = alive[0]
        self._log.info(f"the replicas of group {self.group} are used")
        if len(alive) > 1:
            others = ", ".join(f"{group} ({len(live)})" for group, live in alive[1:])
            self._log.warning(f"there are other groups, with fewer replicas: {others}; --group names the one to use")
        for replica in [replica for replica in self.all if not replica.fixed]:
            self._remove(replica, "another group is used now")
        return leases

    def _see(self, lease: Lease, now: float) -> None:
        known = self._replicas.get(lease.replica_id)
        if known is not None and known.fixed:
            self._remove(known, "it is registered in Redis as well")
            known = None
        if known is not None and known.lease.address != lease.address:
            self._remove(known, f"it is at {lease.address} now")
            known = None
        if known is None:
            for other in [one for one in self.all if one.fixed and one.lease.address == lease.address]:
                self._remove(other, f"it is registered in Redis, as {lease.replica_id}")
            known = self._add(lease)
        if known is not None:
            if known.lease.nonce != lease.nonce:
                known.ask_again.set()
            known.lease, known.listed = lease, now

    def _forget(self, listed: set[str], now: float) -> None:
        """Let go of those that Redis does not know any more and that do not answer, or have not come back.

        If it knew nobody at all, or could not be asked, those who answer have a lease's time from then on to come back.
        """
        for replica in self.all:
            if replica.fixed or replica.id in listed:
                continue
            gone = now - max(replica.listed, self._nobody_at) > replica.lease.lease_seconds
            if gone or not replica.serving:
                self._remove(replica, "its lease has ended")
                replica.lose()  # it may stand still, and nobody asks it any more how it is

    def _adopt_names(self) -> None:
        """Call replicas that were named by an address as they call themselves."""
        for replica in [one for one in self.all if one.fixed and one.signature not in ("", one.id)]:
            if replica.signature in self._replicas:
                self._remove(replica, f"it is replica {replica.signature}, which is known")
            else:
                del self._replicas[replica.id]
                replica.lease = replace(replica.lease, replica_id=replica.signature)
                self._replicas[replica.id] = replica

    def _add(self, lease: Lease, *, fixed: bool = False) -> Replica | None:
        try:
            channel = self._open(lease.address)
        except InvalidArgument as error:
            if self._refused.get(lease.address) != str(error):
                self._refused[lease.address] = str(error)
                self._log.error(f"replica {lease.replica_id} cannot be used: {error}")
            return None
        replica = Replica(lease, channel, fixed=fixed)
        self._replicas[replica.id] = replica
        self._following[replica] = asyncio.create_task(self._follow(replica))
        self._log.info(f"replica {replica.id} is at {lease.address}")
        return replica

    def _remove(self, replica: Replica, why: str) -> None:
        self._log.info(f"replica {replica.id} is gone: {why}")
        del self._replicas[replica.id]
        self._following.pop(replica).cancel()
        if not replica.serving:
            replica.lose()
        replica.retire()

    # Who answers

    async def _follow(self, replica: Replica) -> None:
        """Ask a replica how it is, for as long as it is known."""
        while True:
            replica.ask_again.clear()
            await self._ask(replica)
            replica.asked.set()
            await asyncio.sleep(SHORTEST_PAUSE)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(replica.ask_again.wait(), LOOK_SECONDS - SHORTEST_PAUSE)

    async def _ask(self, replica: Replica) -> None:
        served = replica.serving
        try:
            await replica.ask_health(ANSWER_SECONDS)
            if replica.fixed and replica.serving and not replica.lease.model:
                await self._ask_model(replica)
        except Refused as refused:
            replica.serving = False
            replica.trouble = refused.details or refused.code.name
            replica.lose()
        except Exception:  # noqa: BLE001 - without this the gateway would be blind from now on
            self._log.exception(f"asking replica {replica.id} failed because of a bug; it goes on")
        if served != replica.serving:
            self._log.info(f"replica {replica.id} {'serves' if replica.serving else 'is not used: ' + replica.trouble}")
            self._look_again.set()
            self._changed()

    async def _ask_model(self, replica: Replica) -> None:
        """Find out what a replica that was named serves; it may want to know first who asks, so it need not say."""
        model, size = "unknown", FIXED_BLOCK_SIZE
        with contextlib.suppress(Refused):
            async with replica.call(MODEL, b"", timeout=ANSWER_SECONDS) as call:
                served = generation_pb2.GetModelResponse.FromString(await call.only())
                model, size = served.name, served.block_size or size
        replica.lease = replace(replica.lease, model=model, block_size=size)
