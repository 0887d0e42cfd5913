"""Who is calling, and what is theirs."""

from __future__ import annotations

from dataclasses import dataclass

ANONYMOUS = "anonymous"
"""The tenant of every caller, as long as callers are not authenticated."""


PUBLISHED = "0:,9:published"
"""The namespace of published prompts: one of the tenant without a name, which nobody is."""


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated tenant. `admin`: also sees and steers what belongs to the whole server."""

    tenant: str = ANONYMOUS
    admin: bool = True


def namespace_key(tenant: str, suffix: str) -> str:
    """Return the cache's namespace for a tenant and the suffix it chose; no two pairs give the same key."""
    return f"{len(tenant)}:{tenant},{len(suffix)}:{suffix}"


def tenant_of(key: str) -> str:
    """Return the tenant of a namespace key."""
    return _parts(key)[0]


def suffix_of(key: str) -> str:
    """Return the suffix of a namespace key."""
    return _parts(key)[1]


def _parts(key: str) -> tuple[str, str]:
    length, _, rest = key.partition(":")
    end = int(length)
    return rest[:end], rest[end + 1 :].partition(":")[2]
