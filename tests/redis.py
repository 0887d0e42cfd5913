"""A real Redis server for tests, on a free loopback port, with nothing written to disk.

And what may stand between it and a client: a line that is slow, or one with TLS.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from prefixcache.local import LocalRedis, redis_program


class RedisServer(LocalRedis):
    """A `LocalRedis` that can be asked directly."""

    def client(self, password: str | None = None) -> redis.Redis:
        """Return a client that asks once; to be closed."""
        return redis.Redis(port=self.port, password=password, protocol=2, retry=Retry(NoBackoff(), 0))

    def cli(self, *arguments: str) -> str:
        """Run redis-cli and return what it writes."""
        command = [redis_program("redis-cli"), "-p", str(self.port), *arguments]
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
        self.delay = 0.0
        self._target = port
        self._context: ssl.SSLContext | None = None
        if certificate is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(certificate, key)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]

    @property
    def connections(self) -> int:
        """How many there are now."""
        return len(self._open)

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._listening.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()  # from here on there are no new ones
        self.cut()
        for thread in self._threads:
            thread.join()
        self._listening.close()

    def cut(self) -> None:
        """End all connections there are."""
        for client in list(self._open):
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                self._open.add(client)
                self._threads.append(threading.Thread(target=self._connect, args=(client,)))
                self._threads[-1].start()

    def _connect(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.create_connection(("127.0.0.1", self._target)) as server:
            if self._context is None:
                self._pass(client, server)
            else:
                with self._context.wrap_socket(client.dup(), server_side=True) as encrypted:
                    self._pass(encrypted, server)
        self._open.discard(client)

    def _pass(self, client: socket.socket, server: socket.socket) -> None:
        while not self._ended.is_set():
            waiting = isinstance(client, ssl.SSLSocket) and client.pending()
            ready = [client] if waiting else select.select([client, server], [], [])[0]
            for source, target in ((client, server), (server, client)):
                if source in ready:
                    data = source.recv(1 << 16)
                    if not data:
                        return
                    if source is client and self.delay:
                        self._ended.wait(self.delay)
                    target.sendall(data)
