"""A real server in a process of its own, for tests that use the product as its users do."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from prefixcache.local import LocalServer, free_port
from tests.engine import models

__all__ = ["ROOT", "command", "environment", "free_port", "noise_server", "python", "server"]

ROOT = Path(__file__).parent.parent


def environment(**variables: str) -> dict[str, str]:
    """Return this process's environment for a child that is to find the source and see no server or terminal."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFIXCACHE_")}
    for name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR"):
        kept.pop(name, None)
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return kept | {"PYTHONPATH": path, "TERM": "xterm-256color"} | variables


def python(*arguments: str, timeout: float, cwd: Path | None = None, **variables: str) -> str:
    """Run Python with warnings as errors, assert that it ends well without complaint, and return what it writes."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env=environment(**variables),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "prefixcache", *arguments]


@contextlib.contextmanager
def server(*options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run `prefixcache serve` with the embedded model; yield its address and process once it serves."""
    small = ("--cache-memory", "64MiB", "--threads", "2")
    with LocalServer(*small, *options, environment=environment()) as running:
        yield running.address, running.process


@contextlib.contextmanager
def noise_server(*options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The same with random weights and a token per byte: counts can be read off a prompt, and output never ends."""
    with tempfile.TemporaryDirectory() as directory:
        shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8}
        path = models.make("llama", Path(directory), tokenizer=True, max_position_embeddings=8192, **shape)
        with server("--model", str(path), *options) as running:
            yield running
