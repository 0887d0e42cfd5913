"""What to tell a user about a dependency that is not installed."""

from __future__ import annotations

from prefixcache.errors import FailedPrecondition


def not_installed(error: ImportError, what: str, extra: str, instead: str = "") -> FailedPrecondition:
    """Return the error for `what` that needs `extra`; a missing module of ours is our own bug, and is raised again."""
    missing = (error.name or "").partition(".")[0]
    if missing in ("", "engine", "prefixcache"):
        raise error
    hint = f" ({instead})" if instead else ""
    return FailedPrecondition(
        f"{what} needs {missing}, which is not installed: pip install 'prefixcache[{extra}]'{hint}"
    )
