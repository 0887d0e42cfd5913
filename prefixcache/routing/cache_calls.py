"""CacheService of a gateway: what is about one prompt goes where that belongs, the rest to every replica.

Who wants something forgotten must be able to rely on it: if one replica cannot be reached,
`Invalidate` and `EndSession` fail and say so; the others have done it, and it can be asked
for again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from prefixcache.errors import InvalidArgument
from prefixcache.routing import merging
from prefixcache.routing.fleet import Fleet
from prefixcache.routing.forwarding import Answer, Answers, ask_all, ask_each, ask_first
from prefixcache.routing.incoming import Incoming
from prefixcache.routing.placement import Placement
from prefixcache.v1 import cache_pb2

SERVICE = cache_pb2.DESCRIPTOR.services_by_name["CacheService"].full_name
PIN, UNPIN = f"/{SERVICE}/Pin", f"/{SERVICE}/Unpin"

M = TypeVar("M", bound=Message)


def parsed(kind: type[M], data: bytes) -> M:
    """Return a message. Raises InvalidArgument if the bytes are none."""
    try:
        return kind.FromString(data)
    except DecodeError:
        raise InvalidArgument(
            f"the {kind.__name__} cannot be read: is text in it that is not UTF-8, or is the client made for another "
            "version of the protocol?"
        ) from None


class Cache:
    def __init__(self, fleet: Fleet, placement: Placement) -> None:
        self._fleet = fleet
        self._placement = placement

    async def lookup(self, method: str, data: bytes, incoming: Incoming) -> Answer:
        """What the replica says that Generate would choose."""
        request = parsed(cache_pb2.LookupRequest, data)
        placed = await self._placement.place(request.prompt, request.namespace, "", incoming)
        _, answer = await ask_first(self._fleet, placed.replicas, method, data, incoming)
        return answer

    async def pin(self, method: str, data: bytes, incoming: Incoming) -> Answer:
        """Pin where the prefix lies; what is published, everywhere."""
        request = parsed(cache_pb2.PinRequest, data)
        if request.published:
            answers = await ask_all(self._fleet, method, data, incoming)
            answers.check("what is to be published is not, there; pin it again when that replica is back")
            return _merge(answers, cache_pb2.PinResponse, merging.merged_pinned)
        placed = await self._placement.place(request.prompt, request.namespace, "", incoming, always=True)
        replica, answer = await ask_first(self._fleet, placed.by_prefix, method, data, incoming)
        # A pin of that name may have been elsewhere; one that cannot be ended there holds memory, and no more.
        others = [other for other in self._fleet.all if other is not replica]
        if others:
            unpin = cache_pb2.UnpinRequest(pin_id=request.pin_id, namespace=request.namespace)
            await ask_each(self._fleet, others, UNPIN, unpin.SerializeToString(), incoming)
        return answer

    async def unpin(self, method: str, data: bytes, incoming: Incoming) -> Answer:
        """End a pin wherever it is. NOT_FOUND if it is nowhere."""
        request = parsed(cache_pb2.UnpinRequest, data)
        answers = await ask_all(self._fleet, method, data, incoming)
        missing = {
            replica: refused
            for replica, refused in answers.refused.items()
            if refused.code is grpc.StatusCode.NOT_FOUND
        }
        rest = {replica: refused for replica, refused in answers.refused.items() if replica not in missing}
        found = Answers(answers.given, rest)
        if request.published or not answers.given:
            found.check("it may still be pinned there; unpin it again when that replica is back")
        else:
            found.check()
        if not answers.given:
            raise next(iter(missing.values()))
        return Answer(next(iter(answers.given.values())).data, found.metadata)

    async def pins(self, method: str, data: bytes, incoming: Incoming) -> Answer:
        """The pins of all that can be reached."""
        answers = await ask_all(self._fleet, method, data, incoming)
        answers.check()
        return _merge(answers, cache_pb2.ListPinsResponse, merging.merged_pins)

    async def stats(self, method: str, data: bytes, incoming: Incoming) -> Answer:
        """The sums of all that can be reached; see `merging.merged_stats`."""
        answers = await ask_all(self._fleet, method, data, incoming)
        answers.check()
        return _merge(answers, cache_pb2.GetStatsResponse, merging.merged_stats)

    async def end_session(self, method: str, data: bytes, incoming: Incoming) -> Answer:
        """End a session everywhere."""
        answers = await ask_all(self._fleet, method, data, incoming)
        answers.check("the session has not ended there; end it again when that replica is back or gone")
        return _merge(answers, cache_pb2.EndSessionResponse, merging.merged_ended)

    async def invalidate(self, method: str, data: bytes, incoming: Incoming) -> Answer:
        """Forget everywhere."""
        answers = await ask_all(self._fleet, method, data, incoming)
        answers.check("what it holds is not forgotten; invalidate again when that replica is back or gone")
        return _merge(answers, cache_pb2.InvalidateResponse, merging.merged_invalidated)


def _merge(answers: Answers, kind: type[Any], merge: Callable[[Sequence[Any]], Message]) -> Answer:
    parts = [kind.FromString(answer.data) for answer in answers.given.values()]
    return Answer(merge(parts).SerializeToString(), answers.metadata)
