"""How much a tenant may have going on at once, and how many tokens a minute it may have computed.

What is counted: prompt tokens that had to be computed, and generated tokens. Prompt
tokens from the cache cost nothing. What a request costs is known only while it runs, so
it is paid as it comes: a request may begin while there is anything left, and what it
takes beyond that is a debt, which is paid off before the next one may begin. Over time
nobody gets more than its rate, and nobody is refused for what might be cached.
"""

from __future__ import annotations

from engine.authentication import Limits
from prefixcache.errors import ResourceExhausted

IN_FLIGHT_RETRY_SECONDS = 1.0


class Quota:
    """What one tenant uses of its limits; used by one thread. Times are of one clock, in seconds."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.in_flight = 0
        self._limits = limits or Limits()
        self._left = float(self._limits.tokens_per_minute or 0)
        self._at: float | None = None

    def limit(self, limits: Limits) -> None:
        """Replace the limits; what is in flight and what is owed stays."""
        before, after = self._limits.tokens_per_minute, limits.tokens_per_minute
        if after is not None:
            self._left = float(after) if before is None else min(self._left, float(after))
        self._limits = limits

    def enter(self, now: float) -> None:
        """Begin a request. Raises ResourceExhausted, which says when to try again; then nothing was begun."""
        most = self._limits.max_in_flight
        if most is not None and self.in_flight >= most:
            raise ResourceExhausted(
                f"you have {self.in_flight} requests in flight, the most you may have: wait for one to end",
                retry_after=IN_FLIGHT_RETRY_SECONDS,
            )
        self.check(now)
        self.in_flight += 1

    def check(self, now: float) -> None:
        """Raise ResourceExhausted, which says when to try again, if there are no tokens left to be computed."""
        rate = self._limits.tokens_per_minute
        if rate is not None:
            self._refill(now, rate)
            if self._left < 1:
                wait = (1 - self._left) * 60 / rate
                raise ResourceExhausted(
                    f"you have used your {rate:,} computed tokens per minute (cached prompt tokens are free): "
                    f"try again in {wait:.1f} seconds",
                    retry_after=wait,
                )

    def leave(self) -> None:
        """End a request that has begun."""
        self.in_flight -= 1

    def charge(self, tokens: int, now: float) -> None:
        """Count tokens that were computed."""
        rate = self._limits.tokens_per_minute
        if rate is not None:
            self._refill(now, rate)
            self._left -= tokens

    def _refill(self, now: float, rate: int) -> None:
        if self._at is not None:
            self._left = min(self._left + (now - self._at) * rate / 60, float(rate))
        self._at = now
