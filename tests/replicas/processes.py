"""Replicas, gateways and a Redis as processes, and what can be asked of them from outside."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from prefixcache.client import Client
from prefixcache.hints.connection import NoHints
from prefixcache.hints.locator import Locator
from prefixcache.hints.schema import Group, Lease
from prefixcache.tokens import HASH_BYTES
from prefixcache.v1 import generation_pb2, generation_pb2_grpc, prompt_pb2
from tests.engine.serving import BLOCK, FINGERPRINT
from tests.serving import ROOT, environment, free_port
from tests.waiting import until

WAIT_SECONDS = 60.0
LEASE_SECONDS = 2.0
PAPER = Group("main", FINGERPRINT, BLOCK)


class Nursery:
    """Starts processes, see `tests.replicas.nursery`. Leaving the `with` block kills those that still run."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.replicas.nursery"],
            env=environment(GRPC_VERBOSITY="ERROR"),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def start(self, log: Path, **task: object) -> Process:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({"log": str(log), **task}), file=self._process.stdin, flush=True)
        return Process(int(self._process.stdout.readline()), log)


class Process:
    """One that the nursery has started."""

    def __init__(self, number: int, log: Path) -> None:
        self._log = log
        self._handle = os.pidfd_open(number)

    def kill(self) -> None:
        """End it with SIGKILL. Idempotent."""
        if self._handle < 0:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)
        self._wait()

    def end(self) -> None:
        """End it with SIGTERM, and let it finish."""
        signal.pidfd_send_signal(self._handle, signal.SIGTERM)
        self._wait()

    def pause(self) -> None:
        signal.pidfd_send_signal(self._handle, signal.SIGSTOP)

    def resume(self) -> None:
        signal.pidfd_send_signal(self._handle, signal.SIGCONT)

    def log(self) -> str:
        return self._log.read_text()

    @property
    def running(self) -> bool:
        return self._handle >= 0 and not select.select([self._handle], [], [], 0)[0]

    def _wait(self) -> None:
        assert select.select([self._handle], [], [], WAIT_SECONDS)[0], f"it did not end: {self.log()[-2000:]}"
        os.close(self._handle)
        self._handle = -1


class Served:
    """A process that serves at an address. `start` and `wait` in between `kill` and the next start."""

    def __init__(self, nursery: Nursery, log: Path, port: int) -> None:
        self._nursery = nursery
        self._log = log
        self.port = port
        self.process: Process

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def _task(self) -> dict[str, Any]:
        raise NotImplementedError

    def start(self) -> Self:
        self.process = self._nursery.start(self._log, **self._task)
        return self

    def wait(self) -> Self:
        """Return when it serves."""
        with Client(self.address) as client:
            until(lambda: self._serves(client), f"that {self.address} serves")
        return self

    def kill(self) -> None:
        self.process.kill()

    def listens(self) -> bool:
        """Whether its port is open."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def _serves(self, client: Client) -> bool:
        assert self.process.running, self.process.log()[-2000:]
        with contextlib.suppress(Exception):
            client.wait_until_ready(timeout=0.5)
            return True
        return False


class Replica(Served):
    """A server whose engine computes on paper, `step_seconds` for every step; with `model`, that model instead."""

    def __init__(
        self,
        nursery: Nursery,
        log: Path,
        replica_id: str,
        options: dict[str, Any],
        *,
        blocks: int = 256,
        max_running: int = 8,
        step_seconds: float = 0.0,
        port: int = 0,
    ) -> None:
        super().__init__(nursery, log, port or free_port())
        self.id = replica_id
        self._options = options
        self._paper = {"blocks": blocks, "max_running": max_running, "step_seconds": step_seconds}

    @property
    def _task(self) -> dict[str, Any]:
        options = {"replica_id": self.id, "port": self.port, "log_format": "text", "threads": 1, **self._options}
        if "model" not in options:
            return {"paper": self._paper, "options": options}
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        return {"command": ["serve", *arguments]}

    def cached_blocks(self, prompt: list[int]) -> int:
        """How many whole blocks of a prompt are cached, as the engine says."""
        with Client(self.address) as client:
            return client.lookup(prompt, timeout=20).cached_tokens // BLOCK

    def is_idle(self) -> bool:
        """Whether nothing waits or runs, and no block is in use."""
        with Client(self.address) as client:
            stats = client.stats(timeout=20)
        return stats.requests.waiting == stats.requests.running == stats.blocks.leased == 0

    def hashes(self, prompt: list[int], metadata: tuple[tuple[str, str | bytes], ...] = ()) -> bytes:
        """Return the names of a prompt's blocks."""
        with grpc.insecure_channel(self.address) as channel:
            request = generation_pb2.TokenizeRequest(
                prompt=prompt_pb2.Prompt(token_ids=prompt_pb2.TokenIds(ids=prompt)), with_block_hashes=True
            )
            answer = generation_pb2_grpc.GenerationServiceStub(channel).Tokenize(request, metadata=metadata, timeout=20)
        assert len(answer.block_hashes) == (len(prompt) - 1) // BLOCK * HASH_BYTES
        return answer.block_hashes


class Gateway(Served):
    """`prefixcache route` with these arguments."""

    def __init__(self, nursery: Nursery, log: Path, arguments: Sequence[str], port: int = 0) -> None:
        super().__init__(nursery, log, port or free_port())
        self._arguments = arguments

    @property
    def _task(self) -> dict[str, Any]:
        return {"command": ["route", *self._arguments, "--port", str(self.port), "--log-format", "text"]}

    def wait_for(self, *replicas: Replica) -> Self:
        """Return when it uses these replicas, and no others."""
        names = [replica.id for replica in replicas]
        until(lambda: self.answering() == names, f"that the gateway uses {names}")
        return self

    def answering(self) -> list[str]:
        """Return the replicas behind it that answer."""
        with Client(self.address) as client, contextlib.suppress(Exception):
            hints = client.stats(timeout=20).hints
            return hints.replica_id.split(", ") if hints is not None else []
        return []


class Deployment:
    """Processes that belong together. Leaving the `with` block kills them."""

    def __init__(self, nursery: Nursery, directory: Path) -> None:
        self._nursery = nursery
        self._directory = directory
        self._all: list[Served] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for served in self._all:
            served.kill()

    def replicas(self, names: str, redis: str, **more: Any) -> list[Replica]:
        """Start replicas of these names, separated by blanks, and wait until they serve."""
        machine = {name: more.pop(name) for name in ("blocks", "max_running", "step_seconds", "port") if name in more}
        options = {"redis": redis, "lease_seconds": LEASE_SECONDS, **more}
        started = [
            Replica(self._nursery, self._directory / f"{name}.log", name, options, **machine) for name in names.split()
        ]
        for replica in started:
            self._begin(replica)
        return [replica.wait() for replica in started]

    def gateway(self, *arguments: str, port: int = 0, ready: bool = True) -> Gateway:
        """Start a gateway, and wait until it sends to a replica, if it is to be `ready`, or else can be asked."""
        log = self._directory / f"gateway-{len(self._all)}.log"
        gateway = Gateway(self._nursery, log, arguments, port)
        self._begin(gateway)
        if ready:
            return gateway.wait()
        until(gateway.listens, "that the gateway listens")
        return gateway

    def _begin(self, served: Served) -> None:
        self._all.append(served)
        served.start()


def leases(url: str, group: Group = PAPER) -> dict[str, Lease]:
    """Return the live leases by replica; none if Redis cannot be asked."""

    async def ask() -> dict[str, Lease]:
        async with _locator(url) as locator:
            return {lease.replica_id: lease for lease in await locator.leases(group)}

    try:
        return asyncio.run(ask())
    except NoHints:
        return {}


def located(url: str, hashes: bytes, group: Group = PAPER) -> dict[str, int]:
    """Return how many blocks of a prompt each live replica has, by what readers find in Redis."""

    async def ask() -> dict[str, int]:
        async with _locator(url) as locator:
            return await locator.find(group, hashes, await locator.leases(group))

    try:
        return asyncio.run(ask())
    except NoHints:
        return {}


@contextlib.asynccontextmanager
async def _locator(url: str) -> AsyncIterator[Locator]:
    locator = Locator(url, timeout=2.0)
    try:
        yield locator
    finally:
        with contextlib.suppress(NoHints):
            await locator.close()


def complete(url: str, replicas: Sequence[Replica], prompts: Sequence[list[int]]) -> bool:
    """Whether each replica says that its hints are current, and Redis says of these prompts what its engine does."""
    for replica in replicas:
        with Client(replica.address) as client:
            hints = client.stats(timeout=20).hints
        if hints is None or not hints.current:
            return False
    for prompt in prompts:
        found = located(url, replicas[0].hashes(prompt))
        if found != {replica.id: replica.cached_blocks(prompt) for replica in replicas}:
            return False
    return True
