"""The messages of CacheService; what they share with generation is in `engine.wire`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from engine.feed import Numbered, Snapshot, SnapshotEnd
from engine.hints import HintStatus, Holder
from engine.scheduler import EngineStats
from engine.shapes import Shape
from engine.tenants import PUBLISHED, Caller, suffix_of
from engine.tokenizer import Place, Prompt
from engine.wire import (
    MAX_REQUEST_ID_BYTES,
    duration,
    miss_reason,
    read_name,
    read_namespace,
    read_prompt,
    read_seconds,
    read_terms,
)
from prefixcache.errors import InvalidArgument, PermissionDenied, PrefixCacheError
from prefixcache.lease import Found, Removed, Stored
from prefixcache.pins import Limit, Pin, Pinned
from prefixcache.terms import Terms
from prefixcache.v1 import cache_pb2


def write_found(
    prompt_tokens: int, found: Found, place: Place | None, elsewhere: Iterable[Holder]
) -> cache_pb2.LookupResponse:
    """Return what was found of a prompt, here and `elsewhere`.

    `place` is where the cached part ends in its text, if that was asked for.
    """
    return cache_pb2.LookupResponse(
        prompt_tokens=prompt_tokens,
        cached_tokens=found.cached_tokens,
        miss_reason=miss_reason(found.reason),
        miss_position=found.position,
        alternative_tokens=found.alternative or None,
        text=None if place is None else place.text,
        cached_characters=None if place is None else place.characters,
        elsewhere=[
            cache_pb2.ReplicaPrefix(replica_id=name, address=address, cached_tokens=tokens)
            for name, address, tokens in elsewhere
        ],
    )


class PinRoom(NamedTuple):
    """Blocks that a tenant's pins hold and may hold, and the time on the cache's clock."""

    pinned: int
    budget: int
    now: float


@dataclass(frozen=True, slots=True)
class Warm:
    """A checked WarmRequest; the prompt is not tokenized yet."""

    prompt: Prompt
    namespace: str
    terms: Terms


def read_warm(message: cache_pb2.WarmRequest, tenant: str, defaults: Terms) -> Warm:
    """Check a prompt to warm for a tenant; what it leaves open is as in `defaults`. Raises InvalidArgument."""
    if len(message.id.encode()) > MAX_REQUEST_ID_BYTES:
        raise InvalidArgument(f"id must have at most {MAX_REQUEST_ID_BYTES} bytes")
    namespace = read_namespace(tenant, message.cache.namespace, "cache.namespace")
    return Warm(read_prompt(message.prompt), namespace, read_terms(message.cache, "cache", defaults))


def warm_name(message: cache_pb2.WarmRequest, position: int) -> str:
    """Return the name of a prompt in its response, also if there is something wrong with it."""
    usable = 0 < len(message.id.encode()) <= MAX_REQUEST_ID_BYTES
    return message.id if usable else str(position)


def write_warmed(name: str, prompt_tokens: int, cached_tokens: int, error: str) -> cache_pb2.WarmResponse:
    """Return what became of a prompt that was warmed, all of it if there is no `error`."""
    state = cache_pb2.WARM_STATE_CACHED if cached_tokens == prompt_tokens else cache_pb2.WARM_STATE_COMPUTED
    return cache_pb2.WarmResponse(
        id=name,
        state=cache_pb2.WARM_STATE_FAILED if error else state,
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        computed_tokens=prompt_tokens - cached_tokens,
        error=error,
    )


def write_not_warmed(name: str, prompt_tokens: int | None, error: PrefixCacheError) -> cache_pb2.WarmResponse:
    """Return why a prompt was not warmed; its length is None if it could not be read."""
    return cache_pb2.WarmResponse(
        id=name, state=cache_pb2.WARM_STATE_FAILED, prompt_tokens=prompt_tokens, error=str(error)
    )


@dataclass(frozen=True, slots=True)
class PinWanted:
    """A checked PinRequest; the prompt is not tokenized yet, `ttl` is in seconds."""

    prompt: Prompt
    namespace: str
    name: str
    ttl: float | None
    cached_only: bool
    published: bool


def read_pin(message: cache_pb2.PinRequest, caller: Caller) -> PinWanted:
    """Check a prompt to pin. Raises InvalidArgument, and PermissionDenied for a publication by a mere tenant."""
    if message.published:
        _check_publisher(caller)
        if message.namespace or message.HasField("ttl"):
            raise InvalidArgument("what is published has neither namespace nor ttl; leave them out")
    return PinWanted(
        prompt=read_prompt(message.prompt),
        namespace=PUBLISHED if message.published else read_namespace(caller.tenant, message.namespace, "namespace"),
        name=read_name(message.pin_id, "pin_id"),
        ttl=read_seconds(message.ttl, "ttl") if message.HasField("ttl") else None,
        cached_only=message.cached_only,
        published=message.published,
    )


def read_unpin(message: cache_pb2.UnpinRequest, caller: Caller) -> tuple[str, str]:
    """Return the namespace and the name of a pin to end; raises as `read_pin` does."""
    if message.published:
        _check_publisher(caller)
        return PUBLISHED, read_name(message.pin_id, "pin_id")
    return read_namespace(caller.tenant, message.namespace, "namespace"), read_name(message.pin_id, "pin_id")


def _check_publisher(caller: Caller) -> None:
    if not caller.admin:
        raise PermissionDenied(
            f"tenant {caller.tenant!r} may not publish prompts; administrators may (admin = true in --tenants)"
        )


def write_pinned(prompt_tokens: int, pinned: Pinned, room: PinRoom) -> cache_pb2.PinResponse:
    why = {
        Limit.NOTHING: "",
        Limit.NOT_CACHED: "not all of the prompt is cached",
        Limit.BUDGET: f"the budget for pins, {room.budget:,} blocks, is used up; unpin something, or start the server "
        "with a larger --max-pinned-percent or more --cache-memory",
    }[pinned.limit]
    return cache_pb2.PinResponse(
        prompt_tokens=prompt_tokens,
        pinned_tokens=pinned.tokens,
        pinned_blocks=room.pinned,
        budget_blocks=room.budget,
        limited_by=why,
    )


def write_pins(pins: Iterable[Pin], room: PinRoom) -> cache_pb2.ListPinsResponse:
    return cache_pb2.ListPinsResponse(
        pins=[
            cache_pb2.Pin(
                pin_id=pin.key.name,
                namespace="" if pin.key.namespace == PUBLISHED else suffix_of(str(pin.key.namespace)),
                published=pin.key.namespace == PUBLISHED,
                tokens=pin.tokens,
                expires_in=None if math.isinf(pin.expires) else duration(pin.expires - room.now),
            )
            for pin in pins
        ],
        pinned_blocks=room.pinned,
        budget_blocks=room.budget,
    )


def read_watch(message: cache_pb2.WatchEventsRequest) -> tuple[str, int] | None:
    """Return after which event to go on (its stream id and number), or None to begin with a snapshot."""
    if not message.stream_id and not message.HasField("sequence"):
        return None
    if not message.stream_id or not message.HasField("sequence"):
        raise InvalidArgument("stream_id and sequence belong together; leave both absent to begin with a snapshot")
    return message.stream_id, message.sequence


def write_event(stream_id: str, numbered: Numbered) -> cache_pb2.WatchEventsResponse:
    message = cache_pb2.WatchEventsResponse(stream_id=stream_id, sequence=numbered.sequence)
    match numbered.event:
        case Snapshot(stored):
            message.snapshot.CopyFrom(_stored(stored))
        case SnapshotEnd(blocks):
            message.snapshot_end.blocks = blocks
        case Stored() as stored:
            message.stored.CopyFrom(_stored(stored))
        case Removed() as removed:
            message.removed.namespace = suffix_of(removed.namespace)
            message.removed.hashes = removed.hashes
    return message


def _stored(event: Stored) -> cache_pb2.BlocksStored:
    return cache_pb2.BlocksStored(namespace=suffix_of(event.namespace), parent=event.parent, hashes=event.hashes)


def write_shape(shape: Shape) -> cache_pb2.WatchPromptsResponse:
    response = cache_pb2.WatchPromptsResponse(
        namespace=shape.namespace, prompt_tokens=shape.prompt_tokens, cached_tokens=shape.cached_tokens
    )
    for piece in shape.pieces:
        response.pieces.add(hash=piece.hash, kind=piece.kind, characters=piece.characters)
    return response


def write_stats(
    stats: EngineStats, *, block_size: int, bytes_per_block: int, uptime: float, hints: HintStatus | None
) -> cache_pb2.GetStatsResponse:
    """Return a snapshot; `uptime` is in seconds, `hints` what is published, if it is and the caller may know."""
    blocks, totals = stats.cache, stats.totals
    return cache_pb2.GetStatsResponse(
        blocks=cache_pb2.BlockStats(
            block_size=block_size,
            total=blocks.total,
            free=blocks.free,
            cached=blocks.cached,
            leased=blocks.leased,
            evicted=blocks.evicted,
            bytes_per_block=bytes_per_block,
            pinned=blocks.pinned,
            expired=blocks.expired,
            invalidated=blocks.invalidated,
            quota=blocks.limit,
        ),
        requests=cache_pb2.RequestStats(
            waiting=stats.waiting,
            running=stats.running,
            admitted=totals.admitted,
            finished=totals.finished,
            aborted=totals.aborted,
            preempted=totals.preempted,
            steps=totals.steps,
            warmed=totals.warmed_prompts,
        ),
        tokens=cache_pb2.TokenStats(
            prompt=totals.prompt_tokens,
            cached=totals.cached_tokens,
            computed=totals.prompt_tokens - totals.cached_tokens,
            recomputed=totals.recomputed_tokens,
            generated=totals.generated_tokens,
            warmed=totals.warmed_tokens,
        ),
        miss_reasons={reason.value: count for reason, count in totals.miss_reasons.items()},
        uptime=duration(uptime),
        sessions=blocks.sessions,
        hints=None
        if hints is None
        else cache_pb2.HintStats(
            replica_id=hints.replica_id,
            current=hints.publisher.current,
            blocks=hints.publisher.blocks,
            republished=hints.publisher.republished,
            error=hints.publisher.error,
        ),
    )
