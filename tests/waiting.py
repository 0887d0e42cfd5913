"""Waiting in tests: for a condition, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable

WAIT_SECONDS = 60.0


def until(condition: Callable[[], object], what: str = "it") -> None:
    """Return when a condition holds; fail if it never does."""
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end, f"{what} did not come true: {condition}"
        time.sleep(0.005)
