"""A call that a gateway has taken, as it is passed on: its metadata, its deadline, and how its errors are told."""

from __future__ import annotations

from typing import Any

import grpc

from prefixcache.results import REPLICA
from prefixcache.routing.replica import Metadata

Context = grpc.aio.ServicerContext[Any, Any]

# What belongs to one connection or to this gateway, and says nothing to a replica.
_OWN = ("user-agent", REPLICA)


class Incoming:
    """What a caller sent besides messages. `forced` is the one replica that it wants, None if any will do."""

    def __init__(self, context: Context) -> None:
        given = tuple((key, value) for key, value in context.invocation_metadata() or ())
        names = [str(value) for key, value in given if key == REPLICA]
        self.forced = names[-1] if names else None
        self.metadata: Metadata = tuple(
            (key, value) for key, value in given if key not in _OWN and not key.startswith(("grpc-", ":"))
        )
        self._context = context

    @property
    def remaining(self) -> float | None:
        """Seconds until the caller's deadline, None if it has none."""
        return self._context.time_remaining()

    def within(self, seconds: float) -> float:
        """So many seconds, or until the caller's deadline."""
        remaining = self.remaining
        return seconds if remaining is None else min(seconds, remaining)
