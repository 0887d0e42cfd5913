"""transformers' continuous batching as a target: a process of its own, spoken to like any other server."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import Self

from benchmarks.serving.http_target import HttpServer
from benchmarks.serving.targets import Failed
from prefixcache.local import free_port

STOP_SECONDS = 20.0


class Transformers(HttpServer):
    """Starts `transformers_worker` with the given options and ends it."""

    def __init__(self, name: str, options: list[str], timeout: float) -> None:
        port = free_port()
        super().__init__(name, "127.0.0.1", port, timeout)
        worker = [sys.executable, "-m", "benchmarks.serving.transformers_worker", "--port", str(port)]
        self._command = [*worker, *options]

    async def __aenter__(self) -> Self:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `_end`
        self._process = subprocess.Popen(self._command, stdout=self._log, stderr=self._log)
        entering = asyncio.ensure_future(super().__aenter__())
        try:
            while not entering.done():
                await asyncio.wait([entering], timeout=0.2)
                if self._process.poll() is not None:
                    entering.cancel()
                    await asyncio.wait([entering])
                    raise Failed(f"{self.name}: its process ended with code {self._process.returncode}: {self._tail()}")
            return await entering
        except BaseException:
            self._end()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await super().__aexit__(kind, error, trace)
        await asyncio.to_thread(self._end)

    def _tail(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-2000:]

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
