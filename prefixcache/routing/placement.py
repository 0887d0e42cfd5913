"""Where a prompt belongs: its blocks' names from a replica, who holds them from Redis, the order from the router.

Each of the three may fail, and then it is decided without. Of a prompt nothing is kept here
but hashes: those of blocks in the router, and one of its beginning.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from prefixcache.hints.connection import NoHints
from prefixcache.hints.locator import Locator
from prefixcache.routing.fleet import Fleet, clock
from prefixcache.routing.incoming import Incoming
from prefixcache.routing.replica import Refused, Replica
from prefixcache.routing.router import Router, Sent, Wanted
from prefixcache.v1 import generation_pb2, prompt_pb2

TOKENIZE = "/prefixcache.v1.GenerationService/Tokenize"
TOKENIZE_SECONDS = 1.0
TOKENIZE_SECONDS_PER_MEBIBYTE = 1.0
"""How long the names of blocks are waited for."""

BEGINNING = 512
BEGINNINGS = 8192


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a prompt is to go: the replicas, best first, and how many of its blocks each holds, if Redis said."""

    wanted: Wanted
    replicas: Sequence[Replica]
    held: dict[str, int] | None

    @property
    def by_prefix(self) -> Sequence[Replica]:
        """The replicas, those that hold most first."""
        held = self.held or {}
        return sorted(self.replicas, key=lambda replica: -held.get(replica.id, 0))


class Placement:
    """`needs_hashes`: whether the router's policy looks at what is held."""

    def __init__(self, fleet: Fleet, router: Router, locator: Locator | None, *, needs_hashes: bool = True) -> None:
        self._fleet = fleet
        self._router = router
        self._locator = locator
        self._needs_hashes = needs_hashes
        self._key = secrets.token_bytes(16)
        self._went: OrderedDict[int, str] = OrderedDict()  # a prompt's beginning -> where it went last

    async def place(
        self, prompt: prompt_pb2.Prompt, namespace: str, session: str, incoming: Incoming, *, always: bool = False
    ) -> Placed:
        """Return where a prompt is to go. Raises Unavailable if there is nobody.

        `always` finds out who holds what, also if the router's policy does not ask.
        """
        await self._fleet.ready()
        if not self._fleet.usable:
            raise self._fleet.nobody()
        hashes, tokens = b"", 0
        if (self._needs_hashes or always) and len(self._fleet.all) > 1:
            hashes, tokens = await self._names(prompt, namespace, incoming)
        wanted = Wanted(hashes, tokens, session)
        held = await self._held(hashes)
        usable = {replica.id: replica for replica in self._fleet.usable}
        ranked = [usable.pop(name) for name in self._router.rank(wanted, held, clock()) if name in usable]
        replicas = ranked + list(usable.values())  # those that the router avoids are the last resort
        if not replicas:
            raise self._fleet.nobody()
        return Placed(wanted, replicas, held)

    def sent(self, replica: Replica, wanted: Wanted, prompt: prompt_pb2.Prompt | None) -> Sent | None:
        """Say that a prompt goes to a replica; None if the router has not heard of that one yet."""
        if prompt is not None:
            key = self._beginning(prompt)
            self._went[key] = replica.id
            self._went.move_to_end(key)
            if len(self._went) > BEGINNINGS:
                self._went.popitem(last=False)
        try:
            return self._router.sent(replica.id, wanted, clock())
        except KeyError:
            return None

    async def _names(self, prompt: prompt_pb2.Prompt, namespace: str, incoming: Incoming) -> tuple[bytes, int]:
        """Return the hashes of a prompt's blocks and its length, nothing if it cannot be found out now."""
        request = generation_pb2.TokenizeRequest(
            prompt=prompt, with_block_hashes=True, namespace=namespace, without_token_ids=True
        ).SerializeToString()
        seconds = TOKENIZE_SECONDS + TOKENIZE_SECONDS_PER_MEBIBYTE * len(request) / 2**20
        asked: set[str] = set()
        for _ in range(2):
            replica = self._to_ask(prompt, asked)
            if replica is None:
                break
            asked.add(replica.id)
            try:
                async with replica.call(
                    TOKENIZE, request, incoming.metadata, incoming.within(seconds), movable=_always
                ) as call:
                    response = generation_pb2.TokenizeResponse.FromString(await call.only())
                    return response.block_hashes, response.prompt_tokens
            except Refused as refused:
                if not refused.unreachable:
                    break  # the replica that gets the prompt will say the same to its caller
                self._fleet.failed(replica)
        return b"", 0

    def _to_ask(self, prompt: prompt_pb2.Prompt, asked: set[str]) -> Replica | None:
        """Return whom to ask about a prompt: who has seen its beginning, else who is least busy."""
        replicas = {replica.id: replica for replica in self._fleet.usable if replica.id not in asked}
        went = replicas.get(self._went.get(self._beginning(prompt), ""))
        return went or min(replicas.values(), key=lambda replica: replica.busy, default=None)

    async def _held(self, hashes: bytes) -> dict[str, int] | None:
        group, leases = self._fleet.group, self._fleet.leases
        if self._locator is None or group is None or not leases:
            return None
        if not hashes:
            return {}
        try:
            return await self._locator.find(group, hashes, leases)
        except NoHints:
            return None

    def _beginning(self, prompt: prompt_pb2.Prompt) -> int:
        match prompt.WhichOneof("content"):
            case "text":
                begin = prompt.text[:BEGINNING]
            case "token_ids":
                begin = repr(prompt.token_ids.ids[:BEGINNING])
            case _:
                begin = "\n".join(turn.content[:BEGINNING] for turn in prompt.messages.messages[:1])
        return xxh3_64_intdigest(self._key + begin.encode(errors="replace"))


def _always() -> bool:
    return True
