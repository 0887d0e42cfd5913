"""Why a prompt's cached prefix is no longer than it is."""

from __future__ import annotations

from enum import StrEnum


class MissReason(StrEnum):
    """One reason per match or lookup; the most specific one that is known to hold."""

    NONE = "none"
    """Nothing was missed: all tokens but the last, which is always computed, were cached."""
    NEVER_SEEN = "never_seen"
    """No prompt has gone on like this from here."""
    DIVERGED = "diverged"
    """A cached prompt agrees up to the position and then goes on differently."""
    EVICTED = "evicted"
    """The next block was cached and has been evicted."""
    INVALIDATED = "invalidated"
    """The next block was cached and has been invalidated."""
    TOO_SHORT = "too_short"
    """The prompt has one token, which is always computed."""
    IN_FLIGHT = "in_flight"
    """Another request is computing the next block right now."""
    BYPASSED = "bypassed"
    """The request asked for the cache not to be read."""
    EXPIRED = "expired"
    """The next block was cached and its time to live is over."""
