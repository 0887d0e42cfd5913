"""One answer from those of several replicas."""

from __future__ import annotations

from collections.abc import Sequence

from prefixcache.v1 import cache_pb2


def merged_stats(parts: Sequence[cache_pb2.GetStatsResponse]) -> cache_pb2.GetStatsResponse:
    """Return the sums: of blocks, requests, tokens, sessions and reasons.

    A prefix that several replicas hold counts once in each, so `blocks` is memory, not
    distinct content; a session counts in each replica it has been on. Sizes of one block
    are the first replica's, `uptime` is that of the youngest, so that it falls when
    counters do. `hints` names all that publish, is current if all are, and has the first
    error.
    """
    total = cache_pb2.GetStatsResponse()
    for part in parts:
        for name in ("total", "free", "cached", "leased", "evicted", "pinned", "expired", "invalidated"):
            setattr(total.blocks, name, getattr(total.blocks, name) + getattr(part.blocks, name))
        if part.blocks.HasField("quota"):
            total.blocks.quota += part.blocks.quota
        for section in ("requests", "tokens"):
            into, what = getattr(total, section), getattr(part, section)
            for field, count in what.ListFields():
                setattr(into, field.name, getattr(into, field.name) + count)
        for reason, count in part.miss_reasons.items():
            total.miss_reasons[reason] += count
        total.sessions += part.sessions
    first = parts[0]
    total.blocks.block_size = first.blocks.block_size
    total.blocks.bytes_per_block = first.blocks.bytes_per_block
    total.uptime.CopyFrom(min((part.uptime for part in parts), key=lambda uptime: uptime.ToNanoseconds()))
    hints = [part.hints for part in parts if part.HasField("hints")]
    if hints:
        total.hints.replica_id = ", ".join(sorted(one.replica_id for one in hints))
        total.hints.current = all(one.current for one in hints)
        total.hints.blocks = sum(one.blocks for one in hints)
        total.hints.republished = sum(one.republished for one in hints)
        total.hints.error = next((one.error for one in hints if one.error), "")
    return total


def merged_pins(parts: Sequence[cache_pb2.ListPinsResponse]) -> cache_pb2.ListPinsResponse:
    """Return all pins, what is published once, and the sums of blocks that they hold and may hold."""
    total = cache_pb2.ListPinsResponse()
    seen = set()
    for part in parts:
        total.pinned_blocks += part.pinned_blocks
        total.budget_blocks += part.budget_blocks
        for pin in part.pins:
            key = (pin.namespace, pin.pin_id, pin.published)
            if key not in seen:
                seen.add(key)
                total.pins.add().CopyFrom(pin)
    return total


def merged_pinned(parts: Sequence[cache_pb2.PinResponse]) -> cache_pb2.PinResponse:
    """Return what is pinned on every replica: the least of any, the sums of blocks held and to be held."""
    least = min(parts, key=lambda part: part.pinned_tokens)
    return cache_pb2.PinResponse(
        prompt_tokens=least.prompt_tokens,
        pinned_tokens=least.pinned_tokens,
        pinned_blocks=sum(part.pinned_blocks for part in parts),
        budget_blocks=sum(part.budget_blocks for part in parts),
        limited_by=next((part.limited_by for part in parts if part.limited_by), ""),
    )


def merged_ended(parts: Sequence[cache_pb2.EndSessionResponse]) -> cache_pb2.EndSessionResponse:
    return cache_pb2.EndSessionResponse(blocks=sum(part.blocks for part in parts))


def merged_invalidated(parts: Sequence[cache_pb2.InvalidateResponse]) -> cache_pb2.InvalidateResponse:
    return cache_pb2.InvalidateResponse(
        freed_blocks=sum(part.freed_blocks for part in parts), in_use_blocks=sum(part.in_use_blocks for part in parts)
    )


def merged_warmed(parts: Sequence[cache_pb2.WarmResponse]) -> cache_pb2.WarmResponse:
    """Return what became of one prompt on several replicas, and on how many it is cached now.

    It is what one says that failed, else the one that had to compute most.
    """
    failed = [part for part in parts if part.state == cache_pb2.WARM_STATE_FAILED]
    merged = cache_pb2.WarmResponse()
    merged.CopyFrom(failed[0] if failed else max(parts, key=lambda part: part.computed_tokens))
    merged.replicas = len(parts) - len(failed)
    return merged
