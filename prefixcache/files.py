"""Noticing that a file has changed, or that others may use it."""

from __future__ import annotations

import os
from pathlib import Path
from stat import S_IROTH, S_IWOTH

Signature = tuple[int, int, int] | None


def signature(path: Path) -> Signature:
    """Return what changes when a file is written or replaced; None if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def open_to_everybody(path: Path) -> str:
    """Return what everybody on this machine may do with a file: "change" it, "read" it, or ""."""
    mode = path.stat().st_mode
    if mode & S_IWOTH:
        return "change"
    return "read" if mode & S_IROTH else ""
