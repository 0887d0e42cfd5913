"""The messages of CacheService; what they share with generation is in `engine.wire`."""

from __future__ import annotations

from engine.scheduler import EngineStats
from engine.wire import duration, miss_reason
from prefixcache.cache import Found
from prefixcache.v1 import cache_pb2


def write_found(prompt_tokens: int, found: Found) -> cache_pb2.LookupResponse:
    return cache_pb2.LookupResponse(
        prompt_tokens=prompt_tokens,
        cached_tokens=found.cached_tokens,
        miss_reason=miss_reason(found.reason),
        miss_position=found.position,
    )


def write_stats(
    stats: EngineStats, *, block_size: int, bytes_per_block: int, uptime: float
) -> cache_pb2.GetStatsResponse:
    """Return a snapshot; `uptime` is in seconds."""
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
        ),
        requests=cache_pb2.RequestStats(
            waiting=stats.waiting,
            running=stats.running,
            admitted=totals.admitted,
            finished=totals.finished,
            aborted=totals.aborted,
            preempted=totals.preempted,
            steps=totals.steps,
        ),
        tokens=cache_pb2.TokenStats(
            prompt=totals.prompt_tokens,
            cached=totals.cached_tokens,
            computed=totals.prompt_tokens - totals.cached_tokens,
            recomputed=totals.recomputed_tokens,
            generated=totals.generated_tokens,
        ),
        miss_reasons={reason.value: count for reason, count in totals.miss_reasons.items()},
        uptime=duration(uptime),
    )
