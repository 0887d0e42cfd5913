"""Prompts computed ahead of time: in the engine's background, and confirmed when they are in the cache."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.events import EventStream
from engine.front import Front
from engine.loop import clock
from engine.request import Failed, Finished, Request, SamplingParams, Started
from engine.scheduler import Scheduler
from engine.tenants import tenant_of
from prefixcache.reasons import MissReason
from prefixcache.terms import DEFAULT_TERMS, Terms
from prefixcache.tokens import pack

_LOST = {
    MissReason.EVICTED: "others took its room; warm less at a time, or start the server with more --cache-memory",
    MissReason.EXPIRED: "its time to live was over",
    MissReason.INVALIDATED: "it was invalidated",
}


@dataclass(frozen=True, slots=True)
class Warmth:
    """What became of a prompt: how many of its tokens were cached before, and why not all are now, if so."""

    prompt_tokens: int
    cached_tokens: int
    error: str = ""

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens


async def warm(
    front: Front,
    prompt: Sequence[int],
    namespace: str,
    *,
    terms: Terms = DEFAULT_TERMS,
    deadline: float | None = None,
    charge: Callable[[int], None] = lambda _: None,
) -> Warmth:
    """Have a prompt computed, if it is not in the cache, and return when it is.

    `deadline` is a time of the engine's clock; `charge` is told how many tokens are
    computed, before they are. Raises what submitting a request raises, and what ends one.
    """

    def use(scheduler: Scheduler) -> bool:
        """Say whether all of it is cached, and then keep that on the given terms."""
        whole = scheduler.cached(prompt, namespace) == len(prompt)
        if whole:
            scheduler.cache.match(pack([*prompt, 0]), namespace, terms=terms).release()
        return whole

    if await front.ask(use):
        return Warmth(len(prompt), len(prompt))
    events = front.bridge.open()
    request = Request(
        id=f"warm-{secrets.token_hex(8)}",
        prompt=prompt,
        params=SamplingParams(),
        seed=0,
        sink=events.sink,
        namespace=namespace,
        background=True,
        terms=terms,
        arrival=clock(),
        deadline=deadline,
    )
    try:
        front.engine.loop.submit(request)
        cached = await _ended(events, charge)
    finally:
        front.engine.loop.abort(request)
    return Warmth(len(prompt), cached, await front.ask(lambda scheduler: _missing(scheduler, prompt, namespace)))


async def _ended(events: EventStream, charge: Callable[[int], None]) -> int:
    """Wait for the end of a request; return how many tokens were cached. Raises the error of a `Failed`."""
    while True:
        for event in await events.next():
            match event:
                case Started():
                    charge(event.prompt_tokens - event.cached_tokens)
                case Finished():
                    return event.usage.cached_tokens
                case Failed():
                    raise event.error


def _missing(scheduler: Scheduler, prompt: Sequence[int], namespace: str) -> str:
    """Say why not all of a prompt that has been computed is cached; "" if it is."""
    cached = scheduler.cached(prompt, namespace)
    if cached == len(prompt):
        return ""
    limit, size = scheduler.cache.stats(tenant_of(namespace)).limit, scheduler.cache.block_size
    reason = scheduler.lookup([*prompt, 0], namespace).reason
    if limit is not None and (limit * size < len(prompt) or reason not in _LOST):
        why = f"you may have {limit:,} blocks of {size} tokens cached, and no others could be given up"
    else:
        why = _LOST.get(reason, f"the reason is {reason.value}")
    return f"{cached:,} of its {len(prompt):,} tokens are cached now that it has been computed: {why}"
