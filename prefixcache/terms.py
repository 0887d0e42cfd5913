"""On which terms a request uses the cache: how long, and how dearly, what it uses and stores is kept."""

from __future__ import annotations

from typing import NamedTuple

DEFAULT_PRIORITY = 50
MAX_PRIORITY = 100


class Terms(NamedTuple):
    """`ttl` is in seconds, None for as long as there is room; a `sliding` one begins anew with every use.

    Blocks of a lower `priority` are evicted first. `session` groups what only it uses.
    """

    ttl: float | None = None
    sliding: bool = True
    priority: int = DEFAULT_PRIORITY
    session: str = ""


DEFAULT_TERMS = Terms()
