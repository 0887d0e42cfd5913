"""The memory of whoever listens on a port of this machine, found through /proc."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_PROC = Path("/proc")
_LISTEN = "0A"
_LOCAL = ("127.0.0.1", "localhost", "::1", "0.0.0.0")


def peak(host: str, port: int) -> int | None:
    """Bytes: the largest resident size so far of each process in the listener's tree, summed.

    Pages that processes share count once for each. None if nobody of this machine can
    be found listening there.
    """
    if host not in _LOCAL:
        return None
    listeners = _holders(_sockets(port))
    return sum(map(_high_water, _tree(listeners))) if listeners else None


def _sockets(port: int) -> set[str]:
    """Inodes of the sockets that listen on a port."""
    inodes = set()
    for table in (_PROC / "net/tcp", _PROC / "net/tcp6"):
        if table.exists():
            for line in table.read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and int(fields[1].rsplit(":", 1)[1], 16) == port:
                    inodes.add(fields[9])
    return inodes


def _holders(inodes: set[str]) -> set[int]:
    """Processes that have one of these sockets open."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    found = set()
    for process in _processes():
        try:
            links = list((_PROC / str(process) / "fd").iterdir())
        except OSError:  # ended, or not ours to see
            continue
        for link in links:
            try:
                if str(link.readlink()) in wanted:
                    found.add(process)
                    break
            except OSError:  # closed meanwhile
                continue
    return found


def _tree(roots: Iterable[int]) -> set[int]:
    """Processes and all that descend from them."""
    children: dict[int, list[int]] = {}
    for process in _processes():
        try:
            stat = (_PROC / str(process) / "stat").read_text()
        except OSError:
            continue
        parent = int(stat.rsplit(")", 1)[1].split()[1])  # the name in brackets may contain anything
        children.setdefault(parent, []).append(process)
    found: set[int] = set()
    left = list(roots)
    while left:
        process = left.pop()
        if process not in found:
            found.add(process)
            left += children.get(process, [])
    return found


def _high_water(process: int) -> int:
    try:
        status = (_PROC / str(process) / "status").read_text()
    except OSError:
        return 0
    lines = [line.split() for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0][1]) * 1024 if lines else 0


def _processes() -> list[int]:
    return [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()]
