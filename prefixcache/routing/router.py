"""Where a request goes: who lives, how busy each replica is, and who holds how much of the prompt.

    router.update(leases, now)                  as often as leases are read
    for replica_id in router.rank(wanted, held, now):
        sent = router.sent(replica_id, wanted, now)
        ...                                     if it cannot be reached: failed, done, the next one
        sent.computed(now)                      at the first token
        sent.done(now)                          whatever happened

What a replica says of its load is up to a third of a lease old, so what this router has
sent and seen end since then is added to it. A block counts as held if Redis says so, if a
request that will compute it is on its way, or if one has been for less than SPECULATION
seconds: that long it may take until Redis knows. If Redis cannot be asked, what was sent
where is all that is known.

Nothing here waits, locks, or reads a clock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

from prefixcache.hints.schema import Lease
from prefixcache.routing.memory import Memory, Names, names_of, shared
from prefixcache.routing.policies import DEFAULT, POLICIES, Candidate, Policy, Wanted
from prefixcache.tokens import HASH_BYTES

__all__ = ["Candidate", "Policy", "Router", "Sent", "Wanted"]

SPECULATION = 2.0
"""Seconds from a block's computation until Redis surely tells of it."""
FIRST_PAUSE = 1.0
MAX_PAUSE = 30.0
"""How many seconds a replica is avoided that could not be reached: at first, and after many failures in a row."""
MAX_ENDED = 4096
"""How many requests are known after they have ended, so that leases that still count them are understood."""
REMEMBERED = 60.0
"""Seconds for which a replica without a lease is not forgotten."""


class Router:
    """Routes requests for one group of replicas. At most `memory_blocks` are remembered of what each was sent."""

    def __init__(self, policy: Policy = POLICIES[DEFAULT], *, memory_blocks: int = 1 << 17) -> None:
        self._policy = policy
        self._memory_blocks = memory_blocks
        self._replicas: dict[str, _Replica] = {}
        self._live: list[_Replica] = []
        self._turn = 0
        self._ranked: tuple[Wanted | None, dict[str, int]] = (None, {})

    def update(self, leases: Sequence[Lease], now: float) -> None:
        """These replicas live, and no others. Of one that is a new process nothing is remembered."""
        for lease in leases:
            known = self._replicas.get(lease.replica_id)
            if known is None or _process(known.lease) != _process(lease):
                known = _Replica(lease, self._memory_blocks)
                self._replicas[lease.replica_id] = known
            known.hear(lease, now)
        self._live = [self._replicas[lease.replica_id] for lease in sorted(leases, key=lambda one: one.replica_id)]
        for replica_id, known in list(self._replicas.items()):
            if known.heard < now - REMEMBERED:
                del self._replicas[replica_id]

    def rank(self, wanted: Wanted, held: Mapping[str, int] | None, now: float) -> list[str]:
        """Return the replicas to try, best first. None are left out that live, take requests and can be reached.

        `held` says of each replica how many of the prompt's first blocks it has by Redis;
        None, or a replica it leaves out, means that Redis cannot say. If all are being
        avoided, the one that failed least recently is tried all the same.
        """
        open_to_new = [one for one in self._live if not one.lease.draining]
        usable = [one for one in open_to_new if one.avoided_until <= now]
        if not usable:
            return [min(open_to_new, key=lambda one: one.failed_at).name] if open_to_new else []
        self._turn += 1
        names = names_of(wanted.hashes)
        held = held or {}
        cached = {one.name: one.cached(wanted, names, held.get(one.name), now) for one in usable}
        self._ranked = wanted, cached
        candidates = [one.candidate(cached[one.name]) for one in usable]
        seen = replace(wanted, tokens=_length(wanted, usable[0].lease.block_size), turn=self._turn)
        ranked = self._policy(seen, candidates)
        return [one.replica_id for one in ranked]

    def sent(self, replica_id: str, wanted: Wanted, now: float) -> Sent:
        """Say that a request goes to a replica. Until `Sent.done` it counts as in flight there."""
        replica = self._replicas[replica_id]
        names = names_of(wanted.hashes)
        ranked, cached = self._ranked
        tokens = cached.get(replica_id) if ranked is wanted else None
        if tokens is None:
            tokens = replica.cached(wanted, names, None, now)
        return Sent(replica, names, _length(wanted, replica.lease.block_size), tokens, now)

    def failed(self, replica_id: str, now: float) -> None:
        """Say that a replica could not be reached: it is avoided for a while, longer each time in a row."""
        replica = self._replicas.get(replica_id)
        if replica is not None:
            replica.failures += 1
            replica.failed_at = now
            replica.avoided_until = now + min(FIRST_PAUSE * 2 ** (replica.failures - 1), MAX_PAUSE)

    def in_flight(self, replica_id: str) -> int:
        """Return how many requests this router has sent to a replica that have not ended."""
        replica = self._replicas.get(replica_id)
        return 0 if replica is None else replica.running + replica.waiting


class Sent:
    """A request on its way to a replica, or running there."""

    __slots__ = ("_computed", "_done", "_replica", "computed_at", "done_at", "names", "sent_at", "tokens")

    def __init__(self, replica: _Replica, names: Names, length: int, cached: int, now: float) -> None:
        self.names = names
        self.tokens = max(length - cached, 1)
        """What the replica still has to compute of the prompt, as far as is known."""
        self.sent_at, self.computed_at, self.done_at = now, math.inf, math.inf
        self._replica = replica
        self._computed = self._done = False
        replica.sent[self] = None
        replica.memory.add(names, now)
        replica.waiting += 1
        replica.waiting_tokens += self.tokens
        replica.taken += -(-length // replica.lease.block_size)
        replica.flying[self] = None

    def computed(self, now: float) -> None:
        """Say that the first token has come: the prompt is cached there, and the replica can be reached. Idempotent."""
        if self._computed or self._done:
            return
        self._land()
        self.computed_at = now
        replica = self._replica
        replica.running += 1
        replica.memory.add(self.names, now)
        replica.failures, replica.avoided_until = 0, -math.inf

    def done(self, now: float) -> None:
        """Say that the request has ended, in whichever way. Idempotent."""
        if self._done:
            return
        if self._computed:
            self._replica.running -= 1
        else:
            self._land()
        self._done = True
        self.done_at, self.names = now, ()
        del self._replica.sent[self]
        self._replica.ended.append(self)

    def _land(self) -> None:
        """It waits no longer."""
        self._computed = True
        del self._replica.flying[self]
        self._replica.waiting -= 1
        self._replica.waiting_tokens -= self.tokens


class _Replica:
    """What a router knows of one process of a replica: its lease, and what this router has there itself."""

    def __init__(self, lease: Lease, memory_blocks: int) -> None:
        self.lease = lease
        self.heard = -math.inf
        self.memory = Memory(min(lease.blocks, memory_blocks))
        self.sent: dict[Sent, None] = {}  # all that have not ended
        self.flying: dict[Sent, None] = {}  # not computed yet, oldest first
        self.ended: deque[Sent] = deque(maxlen=MAX_ENDED)
        self.running = self.waiting = self.waiting_tokens = 0  # of this router
        self.others_running = self.others_waiting = self.others_tokens = 0
        self.taken = 0  # blocks of what was sent since the lease was renewed
        self.failures = 0
        self.failed_at = self.avoided_until = -math.inf
        self._stated_at = -math.inf

    @property
    def name(self) -> str:
        return self.lease.replica_id

    def hear(self, lease: Lease, now: float) -> None:
        """Take in a lease, which may be one seen before. What it counts beyond this router's own then is others'."""
        before, self.lease, self.heard = self.lease, lease, now
        if lease.nonce != before.nonce:  # it is back
            self.failures, self.avoided_until = 0, -math.inf
        stated_at = now - lease.age
        if lease.load == before.load and abs(stated_at - self._stated_at) < 0.5:
            return
        self._stated_at = stated_at
        load = lease.load
        running, waiting, tokens = self._own(stated_at)
        others = max(load.running + load.waiting - running - waiting, 0)
        self.others_waiting = min(others, max(load.waiting - waiting, 0))
        self.others_running = others - self.others_waiting
        self.others_tokens = max(load.waiting_tokens - tokens, 0)
        self.taken = 0

    def _own(self, at: float) -> tuple[int, int, int]:
        """How many of this router's requests ran and waited there at a time, and how much those had to compute."""
        while self.ended and self.ended[0].done_at <= at:
            self.ended.popleft()
        there = [sent for sent in (*self.sent, *self.ended) if sent.sent_at <= at < sent.done_at]
        waiting = [sent for sent in there if at < sent.computed_at]
        return len(there) - len(waiting), len(waiting), sum(sent.tokens for sent in waiting)

    def cached(self, wanted: Wanted, names: Names, held: int | None, now: float) -> int:
        """Return how many tokens of a prompt need not be computed here."""
        if not names:
            return 0
        if held is None:
            blocks = self.memory.leading(names)
        else:
            blocks = max(min(held, len(names)), self.memory.leading(names, now - SPECULATION))
        if blocks < len(names):
            for sent in self.flying:
                if len(sent.names) > blocks and sent.names[blocks] == names[blocks]:
                    blocks = shared(sent.names, names)
                    if blocks == len(names):
                        break
        size = self.lease.block_size
        return min(blocks * size, _length(wanted, size) - 1)

    def candidate(self, cached: int) -> Candidate:
        load = self.lease.load
        return Candidate(
            replica_id=self.name,
            cached_tokens=cached,
            running=self.running + self.others_running,
            waiting=self.waiting + self.others_waiting,
            waiting_tokens=self.waiting_tokens + self.others_tokens,
            room=load.free + load.cached - self.taken,
            blocks=self.lease.blocks,
        )


def _process(lease: Lease) -> str:
    """What tells one process of a replica from another; one that does not say has a lease of its own at least."""
    return lease.process or lease.nonce


def _length(wanted: Wanted, block_size: int) -> int:
    """The length of a prompt in tokens; if it is not known, what its blocks say and one more."""
    return wanted.tokens or len(wanted.hashes) // HASH_BYTES * block_size + 1
