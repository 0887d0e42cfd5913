"""What warming costs those who are served meanwhile: live traffic with and without it, in one run.

    python -m benchmarks.bench_warm [--prompts 100] [--length 4096] [--json out.json] [--quick]

Requests arrive at random times, however long others take; each begins with one of a few
cached system prompts and goes on with tokens of its own. A *pair* is the same arrivals
twice, once alone and once while long prompts are being warmed, from the first arrival to
the last; which goes first alternates. All pairs together warm `--prompts` prompts or
more. The clock runs from when a request was to be sent to its first token at the client.

How many requests arrive is a share (`--load`) of what the server can take one after
another, measured first. Nothing here asserts a time; it reports what it finds.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import shapes
from benchmarks.machine import describe, machine, wide_console
from benchmarks.serving.measure import percentile
from prefixcache.client import AsyncClient
from prefixcache.local import LocalServer

SYSTEM_PROMPTS = 8
SYSTEM_TOKENS = 1024
OWN_TOKENS = 128
OUTPUT = 8
LOW, HIGH = 300, 4000  # ids that every shape has
SENT_AHEAD = 8
"""Prompts to warm that are on their way at the same time; more than the server takes at once."""
WANTED = 1.2
"""The most that the slowest requests may be slowed down."""


@dataclass
class Phase:
    """What happened to requests: seconds to the first token and in all; and what was warmed meanwhile."""

    first: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    prompts: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, other: Phase) -> None:
        self.first += other.first
        self.total += other.total
        self.prompts += other.prompts
        self.tokens += other.tokens
        self.seconds += other.seconds

    def summary(self) -> dict[str, Any]:
        return {
            "requests": len(self.first),
            "ttft p50 ms": 1e3 * _percentile(self.first, 50),
            "ttft p99 ms": 1e3 * _percentile(self.first, 99),
            "total p50 ms": 1e3 * _percentile(self.total, 50),
            "total p99 ms": 1e3 * _percentile(self.total, 99),
        }


class Prompts:
    """Token ids; no two sequences begin alike."""

    def __init__(self) -> None:
        self._random = random.Random(0)
        self._pairs = itertools.product(range(LOW, HIGH), repeat=2)
        self.system = [self.sequence(SYSTEM_TOKENS) for _ in range(SYSTEM_PROMPTS)]

    def sequence(self, length: int) -> list[int]:
        second, first = next(self._pairs)  # the first token changes every time, as far as there are enough
        return [first, second, *self._random.choices(range(LOW, HIGH), k=length - 2)]

    def live(self) -> list[int]:
        return self._random.choice(self.system) + self.sequence(OWN_TOKENS)


async def one(client: AsyncClient, prompt: list[int]) -> tuple[float, float]:
    """Send a request; return the seconds to its first token and to its end."""
    completion = await client.generate(prompt, max_tokens=OUTPUT, ignore_eos=True)
    assert completion.ttft is not None, "max_tokens is not 0"
    return completion.ttft, completion.elapsed


async def capacity(client: AsyncClient, prompts: Prompts, requests: int) -> float:
    """Requests per second, one after another."""
    for system in prompts.system:
        await one(client, system)
    return 1 / statistics.median([(await one(client, prompts.live()))[1] for _ in range(requests)])


async def traffic(client: AsyncClient, arrivals: list[float], prompts: Prompts) -> Phase:
    """Send requests when they are due, in seconds from now."""
    clock = asyncio.get_running_loop().time
    begin = clock()

    async def send(due: float, prompt: list[int]) -> tuple[float, float]:
        await asyncio.sleep(max(due - (clock() - begin), 0.0))
        late = clock() - begin - due
        first, total = await one(client, prompt)
        return late + first, late + total

    seconds = await asyncio.gather(*(send(due, prompts.live()) for due in arrivals))
    return Phase([first for first, _ in seconds], [total for _, total in seconds])


async def traffic_while_warming(
    client: AsyncClient, arrivals: list[float], prompts: Prompts, count: int, length: int
) -> Phase:
    """Send requests while prompts are warmed: `count` of them, or more, until the last request is answered."""
    served: asyncio.Task[Phase] | None = None
    warmed = Phase()
    ahead = asyncio.Semaphore(SENT_AHEAD)

    async def wanted() -> AsyncIterator[list[int]]:
        for number in itertools.count():
            await ahead.acquire()
            if number >= count and served is not None and served.done():
                return
            yield prompts.sequence(length)

    clock = asyncio.get_running_loop().time
    async with client.warm(wanted()) as warming:
        begin = clock()
        served = asyncio.create_task(traffic(client, arrivals, prompts))
        async for result in warming:
            if result.state != "computed" or result.computed_tokens is None:
                raise RuntimeError(f"a prompt was not warmed: {result.error or result.state}")
            warmed.prompts += 1
            warmed.tokens += result.computed_tokens
            ahead.release()
        warmed.seconds = clock() - begin
    warmed.add(await served)
    return warmed


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """When `count` requests arrive at random, `rate` per second on average."""
    draw = random.Random(seed)
    return list(itertools.accumulate(draw.expovariate(rate) for _ in range(count)))


def _percentile(values: list[float], percent: float) -> float:
    value = percentile(values, percent)
    assert value is not None, "there are requests"
    return value


def report_of(pairs: list[tuple[Phase, Phase]]) -> dict[str, Any]:
    """Compare all requests of all pairs, without and with warming."""
    alone, beside = Phase(), Phase()
    for first, second in pairs:
        alone.add(first)
        beside.add(second)
    without, with_ = alone.summary(), beside.summary()
    names = [name for name in without if name.endswith(" ms")]
    return {
        "without": without,
        "with": with_,
        "ratios": {name.removesuffix(" ms"): with_[name] / without[name] for name in names},
        "ttft p99 ratio of each pair": [
            _percentile(second.first, 99) / _percentile(first.first, 99) for first, second in pairs
        ],
        "warmed": {
            "prompts": beside.prompts,
            "tokens": beside.tokens,
            "tokens per second": beside.tokens / beside.seconds,
        },
    }


async def measure(
    address: str, progress: Progress, *, prompts: int, length: int, pairs: int, requests: int, load: float
) -> dict[str, Any]:
    """Run all pairs against the server at `address`."""
    ids = Prompts()
    done: list[tuple[Phase, Phase]] = []
    task = progress.add_task("how much it can take", total=2 * pairs + 1)
    async with AsyncClient(address) as client:
        async for _ in client.warm([ids.sequence(length)]):
            pass  # so that no kind of step is the first of its kind
        rate = load * await capacity(client, ids, min(requests, 20))
        progress.advance(task)
        for number in range(pairs):
            arrivals = poisson(rate, requests, seed=number)
            phases: dict[bool, Phase] = {}
            for warming in (False, True) if number % 2 == 0 else (True, False):
                progress.update(task, description=f"pair {number + 1}, {'with' if warming else 'without'} warming")
                if warming:
                    count = -(-prompts // pairs)
                    phases[warming] = await traffic_while_warming(client, arrivals, ids, count, length)
                else:
                    phases[warming] = await traffic(client, arrivals, ids)
                progress.advance(task)
            done.append((phases[False], phases[True]))
    return {"requests per second": rate, **report_of(done)}


def main(
    shape: Annotated[str, typer.Option(help=f"The model: {', '.join(shapes.SHAPES)}.")] = "tiny",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    prompts: Annotated[int, typer.Option(help="Prompts to warm in all, at least.", min=1)] = 100,
    length: Annotated[int, typer.Option(help="Tokens of each.", min=2)] = 4096,
    pairs: Annotated[int, typer.Option(help="How often the traffic runs, without and with warming.", min=1)] = 4,
    requests: Annotated[int, typer.Option(help="Requests each time.", min=1)] = 300,
    load: Annotated[float, typer.Option(help="Arrivals, as a share of what can be served one by one.", min=0.01)] = 0.5,
    pause: Annotated[int, typer.Option(help="The server's --warm-pause-ms.", min=1)] = 10,
    address: Annotated[str | None, typer.Option(help="A running server instead of one of its own.")] = None,
    result_file: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
    quick: Annotated[bool, typer.Option(help="Little of everything, to see that it runs.")] = False,
) -> None:
    """Measure how much slower requests are while prompts are warmed."""
    if quick:
        prompts, length, pairs, requests = 4, 512, 2, 8
    console = wide_console()
    where = machine()
    console.print(f"{describe(where)}; model: {shape}, {dtype}")
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(console=console, transient=True))
        if address is None:
            path = shapes.make(shape, Path(stack.enter_context(tempfile.TemporaryDirectory())), dtype)
            options = ("--dtype", dtype, "--cache-memory", "3GiB", "--warm-pause-ms", str(pause))
            address = stack.enter_context(LocalServer("--model", str(path), *options)).address
        found = asyncio.run(
            measure(address, progress, prompts=prompts, length=length, pairs=pairs, requests=requests, load=load)
        )
    show(found, length, console)
    report = {"machine": where, "shape": shape, "dtype": dtype, "length": length, "pause ms": pause, **found}
    if result_file:
        result_file.write_text(json.dumps(report, indent=2) + "\n")


def show(found: dict[str, Any], length: int, console: Console) -> None:
    warmed = found["warmed"]
    table = Table(title=f"{found['requests per second']:.1f} requests per second, without and with warming")
    for column in ("", "without, ms", "with, ms", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for name, ratio in found["ratios"].items():
        values = (found[side][f"{name} ms"] for side in ("without", "with"))
        table.add_row(name, *(f"{value:.1f}" for value in values), f"{ratio:.2f}")
    console.print(table)
    each = ", ".join(f"{ratio:.2f}" for ratio in found["ttft p99 ratio of each pair"])
    console.print(
        f"{found['without']['requests']} requests each; warmed meanwhile: {warmed['prompts']} prompts of {length:,} "
        f"tokens, {warmed['tokens per second']:,.0f} tokens per second"
    )
    console.print(
        f"p99 of the time to first token, with / without: {found['ratios']['ttft p99']:.2f} "
        f"(wanted: at most {WANTED}; of each pair: {each})",
        soft_wrap=True,
    )


if __name__ == "__main__":
    typer.run(main)
