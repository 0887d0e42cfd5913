"""Where a benchmark ran, and where it writes."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from rich.console import Console


def machine() -> dict[str, Any]:
    """The processor, how many of its cores this process may use, and the Python version."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}


def describe(where: dict[str, Any]) -> str:
    return f"{where['cpu']}, {where['cores']} cores, Python {where['python']}"


def wide_console() -> Console:
    """The terminal; in a file, lines of 110 characters, so that tables stay whole."""
    console = Console()
    return console if console.is_terminal else Console(width=110)
