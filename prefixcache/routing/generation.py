"""GenerationService of a gateway: a prompt goes where its prefix lies, and its answer comes back as it is.

The first message, which only says that the request was admitted, is held back until there
is a second. Until then a replica that goes away is replaced by the next, once each; from
then on it never is, since its caller has seen what only that replica can go on with.
"""

from __future__ import annotations

from collections.abc import Callable

from google.protobuf.message import DecodeError

from prefixcache.routing.fleet import Fleet, clock
from prefixcache.routing.forwarding import Answer, ask_first, pass_on
from prefixcache.routing.incoming import Context, Incoming
from prefixcache.routing.placement import Placed, Placement
from prefixcache.routing.replica import Metadata, Refused, Replica, signed
from prefixcache.routing.router import Wanted
from prefixcache.v1 import generation_pb2

SERVICE = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
GENERATE = f"/{SERVICE}/Generate"


class Generation:
    def __init__(self, fleet: Fleet, placement: Placement) -> None:
        self._fleet = fleet
        self._placement = placement

    async def any(self, method: str, data: bytes, incoming: Incoming) -> Answer:
        """A call that every replica answers alike."""
        await self._fleet.ready()
        replicas = sorted(self._fleet.usable, key=lambda replica: replica.busy)
        _, answer = await ask_first(self._fleet, replicas, method, data, incoming)
        return answer

    async def generate(self, data: bytes, incoming: Incoming, context: Context) -> Metadata:
        """Write the answer; return what goes behind it. Raises Refused, and Unavailable if there is nobody."""
        request, placed = await self._placed(data, incoming)
        tried: list[Replica] = []

        def left() -> list[Replica]:
            """Those not tried yet: by their order, then those that have come since."""
            known = self._fleet.all
            ordered = [one for one in placed.replicas if one in known and one not in tried]
            return ordered or [one for one in self._fleet.usable if one.serving and one not in tried]

        replica = placed.replicas[0]
        while True:
            tried.append(replica)
            try:
                return await self._attempt(replica, left, data, request, placed.wanted, incoming, context)
            except Refused as refused:
                if refused.unreachable:
                    self._fleet.failed(replica)
                if refused.final or not (refused.unreachable or refused.full):
                    raise
                if not (others := left()):
                    raise _last(refused) from None
                replica = others[0]

    async def _placed(self, data: bytes, incoming: Incoming) -> tuple[generation_pb2.GenerateRequest | None, Placed]:
        """Return what is asked for, None if it cannot be read, which a replica may say, and where it is to go."""
        try:
            request = generation_pb2.GenerateRequest.FromString(data)
        except DecodeError:
            await self._fleet.ready()
            if not (usable := self._fleet.usable):
                raise self._fleet.nobody() from None
            return None, Placed(Wanted(b"", 0), usable, None)
        cache = request.cache
        return request, await self._placement.place(request.prompt, cache.namespace, cache.session_id, incoming)

    async def _attempt(
        self,
        replica: Replica,
        left: Callable[[], list[Replica]],
        data: bytes,
        request: generation_pb2.GenerateRequest | None,
        wanted: Wanted,
        incoming: Incoming,
        context: Context,
    ) -> Metadata:
        """Have one replica answer. Raises Refused, which can be made up for elsewhere if nothing was written."""
        begun = False
        sent = self._placement.sent(replica, wanted, None if request is None else request.prompt)
        call = replica.call(
            GENERATE, data, incoming.metadata, incoming.remaining, movable=lambda: not begun and bool(left())
        )
        try:
            async with call:
                first = await call.read()
                second = None if first is None else await call.read()
                if sent is not None:
                    sent.computed(clock())
                begun = True
                await pass_on(call, context, *(message for message in (first, second) if message is not None))
                return signed(await call.trailing(), replica.id)
        except Refused as refused:
            raise (_broken(refused) if begun else refused) from None
        finally:
            if sent is not None:
                sent.done(clock())


def _last(refused: Refused) -> Refused:
    """Return what to tell a caller when the last replica there is could not be reached, or is full."""
    details = refused.details
    if refused.unreachable:
        details = f"no replica can be reached; at last, {refused.replica_id} could not ({details})"
    return Refused(refused.replica_id, refused.code, details, refused.metadata, final=True)


def _broken(refused: Refused) -> Refused:
    """Return what to tell a caller who has seen a part of the answer: nobody else can go on with it."""
    details = refused.details
    if refused.unreachable:
        details = (
            f"replica {refused.replica_id} has gone while it answered, and what it had still to say is lost: "
            f"send the request again ({details})"
        )
    return Refused(refused.replica_id, refused.code, details, refused.metadata, final=True)
