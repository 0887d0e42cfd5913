"""What Redis costs those who are served: one server without it, one with it, while it is well, hangs, is slow, is gone.

    python -m benchmarks.bench_redis [--rounds 5] [--redis-server /usr/bin/redis-server] [--json out.json] [--quick]

Both servers run side by side; in every round each is given the same requests, one after the
other, for every state of Redis in turn, and the ratio is that of the same round. Prompts
share a few system prompts and go on with tokens of their own, in a pool so small that
blocks are evicted all the time, so there is always something to be published. Nothing here
asserts a time; it reports what it finds.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import shapes
from benchmarks.machine import describe, machine, wide_console
from benchmarks.serving.measure import percentile
from prefixcache.client import AsyncClient
from prefixcache.errors import FailedPrecondition
from prefixcache.local import LocalRedis, LocalServer, free_port

STATES = ("well", "hangs", "2 s per answer", "gone")
SYSTEM_PROMPTS = 8
SYSTEM_TOKENS = 512
OWN_TOKENS = 128
OUTPUT = 8
AT_ONCE = 4
SLOW_SECONDS = 2.0
LOW, HIGH = 300, 4000  # ids that every shape has


class Way:
    """A TCP proxy to Redis, on a port of its own, that holds every answer back for `delay` seconds."""

    def __init__(self, redis: LocalRedis) -> None:
        self.delay = 0.0
        self.port = free_port()
        self._redis = redis

    @asynccontextmanager
    async def open(self) -> AsyncIterator[str]:
        """Run inside the block; yields the URL."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        async with server:
            yield f"redis://127.0.0.1:{self.port}"

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._redis.port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._pass(reader, back, False), self._pass(there, writer, True))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers: bool) -> None:
        try:
            while data := await reader.read(1 << 16):
                if answers and self.delay:
                    await asyncio.sleep(self.delay)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()


@contextmanager
def state(name: str, redis: LocalRedis, way: Way) -> Iterator[None]:
    """Bring Redis into a state, and make it well again."""
    match name:
        case "hangs":
            redis.pause()
        case "2 s per answer":
            way.delay = SLOW_SECONDS
        case "gone":
            redis.stop()
    try:
        yield
    finally:
        match name:
            case "hangs":
                redis.resume()
            case "2 s per answer":
                way.delay = 0.0
            case "gone":
                redis.start()


@dataclass(frozen=True)
class Phase:
    """Requests in a row: seconds to the first token of each, and requests per second."""

    first: list[float]
    rate: float

    def summary(self) -> dict[str, float]:
        p50, p99 = percentile(self.first, 50), percentile(self.first, 99)
        assert p50 is not None and p99 is not None, "there are requests"
        return {"ttft p50 ms": 1e3 * p50, "ttft p99 ms": 1e3 * p99, "requests/s": self.rate}


def prompts(count: int, seed: int) -> list[list[int]]:
    """The same prompts for the same seed."""
    system = random.Random(0)
    beginnings = [system.choices(range(LOW, HIGH), k=SYSTEM_TOKENS) for _ in range(SYSTEM_PROMPTS)]
    own = random.Random(seed)
    return [own.choice(beginnings) + own.choices(range(LOW, HIGH), k=OWN_TOKENS) for _ in range(count)]


async def phase(client: AsyncClient, wanted: list[list[int]]) -> Phase:
    """Send prompts, AT_ONCE at a time."""
    clock = asyncio.get_running_loop().time
    waiting = iter(wanted)
    first: list[float] = []

    async def sender() -> None:
        for prompt in waiting:
            completion = await client.generate(prompt, max_tokens=OUTPUT, ignore_eos=True)
            assert completion.ttft is not None, "max_tokens is not 0"
            first.append(completion.ttft)

    begin = clock()
    await asyncio.gather(*(sender() for _ in range(AT_ONCE)))
    return Phase(first, len(wanted) / (clock() - begin))


async def current(client: AsyncClient) -> None:
    """Wait until everything is published."""
    while True:
        hints = (await client.stats()).hints
        if hints is not None and hints.current:
            return
        await asyncio.sleep(0.05)


async def measure(
    plain: AsyncClient, hinted: AsyncClient, redis: LocalRedis, way: Way, rounds: int, requests: int, console: Console
) -> dict[str, list[tuple[Phase, Phase]]]:
    """Return, for each state, what a round gave without and with Redis."""
    found: dict[str, list[tuple[Phase, Phase]]] = {name: [] for name in STATES}
    for client in (plain, hinted):
        await phase(client, prompts(requests, 0))
    for number in range(rounds):
        for position, name in enumerate(STATES):
            await current(hinted)
            wanted = prompts(requests, 1 + number * len(STATES) + position)
            with state(name, redis, way):
                if (number + position) % 2:
                    with_redis = await phase(hinted, wanted)
                    without = await phase(plain, wanted)
                else:
                    without = await phase(plain, wanted)
                    with_redis = await phase(hinted, wanted)
            found[name].append((without, with_redis))
        console.print(f"round {number + 1} of {rounds}", style="dim")
    return found


def table(found: dict[str, list[tuple[Phase, Phase]]]) -> Table:
    view = Table(title="with Redis / without, in the same round: median (lowest to highest)")
    view.add_column("Redis")
    keys = ("ttft p50 ms", "ttft p99 ms", "requests/s")
    for key in keys:
        view.add_column(key, justify="right")
    for name, pairs in found.items():
        cells = []
        for key in keys:
            ratios = sorted(after.summary()[key] / before.summary()[key] for before, after in pairs)
            value = statistics.median(after.summary()[key] for _, after in pairs)
            cells.append(f"{value:.1f}  {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        view.add_row(name, *cells)
    return view


async def compare(model: Path, rounds: int, requests: int, program: str | None, console: Console) -> dict[str, Any]:
    with ExitStack() as stack:
        redis = stack.enter_context(LocalRedis(program=program))
        way = Way(redis)
        async with way.open() as url:
            options = ("--model", str(model), "--cache-memory", "48MiB", "--log-level", "error")
            servers = [LocalServer(*options), LocalServer(*options, "--redis", url, "--replica-id", "one")]
            plain_address, hinted_address = [
                (await asyncio.to_thread(stack.enter_context, server)).address for server in servers
            ]
            async with (
                AsyncClient(plain_address, token="", tls=False) as plain,
                AsyncClient(hinted_address, token="", tls=False) as hinted,
            ):
                found = await measure(plain, hinted, redis, way, rounds, requests, console)
                stats = (await hinted.stats()).blocks
    console.print(table(found))
    console.print(f"{stats.evicted:,} blocks were evicted from a pool of {stats.total:,} while this ran.", style="dim")
    return {name: [{"without": a.summary(), "with": b.summary()} for a, b in pairs] for name, pairs in found.items()}


def main(
    rounds: Annotated[int, typer.Option(min=1, help="How often each state is measured.")] = 5,
    requests: Annotated[int, typer.Option(min=1, help="Requests each time, to each server.")] = 150,
    redis_server: Annotated[str | None, typer.Option(help="The program; the one on PATH by default.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One round of a few requests.")] = False,
) -> None:
    """Measure what a server loses by publishing hints, whatever Redis does."""
    if quick:
        rounds, requests = 1, 30
    console, where = wide_console(), machine()
    console.print(f"{describe(where)}; {AT_ONCE} requests at a time", style="dim")
    with tempfile.TemporaryDirectory() as folder:
        model = shapes.make("tiny", Path(folder))
        try:
            found = asyncio.run(compare(model, rounds, requests, redis_server, console))
        except FailedPrecondition as error:
            raise SystemExit(f"error: {error}") from None
    if output is not None:
        output.write_text(json.dumps({"machine": where, "requests": requests, "states": found}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
