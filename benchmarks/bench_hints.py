"""What hints in Redis cost: memory, publishing, finding; beside other layouts in the same Redis.

    python -m benchmarks.bench_hints [--redis-server /usr/bin/redis-server] [--json out.json] [--quick]

Everything goes through the real `Publisher` and the real `Locator`, to a Redis that is
started here. Bytes are differences of Redis' own `used_memory`. The other layouts:

    hash per block     one hash per block, one field per owner with a JSON object
    small hashes       blocks in hashes of about 100, a bit per owner for each block
    a key per block    for lookups: GETs in one pipeline, and one MGET, for all of a prompt

Lookups are of prompts of which an owner has half; they are timed at the client, in
Python, one at a time. Nothing here asserts a time; it reports what it finds.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import redis
import structlog
import typer
from redis.asyncio import Redis as AsyncRedis
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe, machine, wide_console
from prefixcache.errors import FailedPrecondition
from prefixcache.hints import schema
from prefixcache.hints.connection import NoHints
from prefixcache.hints.locator import Locator
from prefixcache.hints.publisher import Publisher
from prefixcache.hints.schema import Group, Keys, Lease, Load
from prefixcache.hints.table import query
from prefixcache.lease import Stored
from prefixcache.local import LocalRedis
from prefixcache.tokens import HASH_BYTES

BLOCK = 16
GROUP = Group("main", "9f8e7d6c5b4a3210", BLOCK)
KEYS = Keys()
OWNERS = (1, 3, 16)
PROMPTS = (2_048, 32_768)
RUN = 2_048
"""Blocks of one prompt, as they are stored together."""
TURN = 32
"""Blocks of one event when changes are published one after the other."""
WAIT_SECONDS = 120.0


@contextmanager
def local_redis(program: str | None) -> Iterator[str]:
    """Run a Redis that writes nothing to disk; yield its URL."""
    try:
        server = LocalRedis(program=program)
    except FailedPrecondition as error:
        raise typer.BadParameter(str(error)) from None
    with server:
        yield server.url


def until(condition: Callable[[], object], pause: float = 0.001) -> None:
    """Wait for a condition."""
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"nothing came of it within {WAIT_SECONDS:g} s")
        time.sleep(pause)


@contextmanager
def publisher(url: str, number: int, blocks: int) -> Iterator[Publisher]:
    """Run the publisher of a replica with a pool of so many blocks."""
    made = Publisher(
        url,
        group=GROUP,
        replica_id=f"replica-{number}",
        address="replica.example.com:50051",
        model="benchmark",
        blocks=blocks,
        load=Load,
        resync=lambda: None,
    )
    made.start()
    try:
        yield made
    finally:
        made.stop()


def snapshot(hashes: bytes) -> Iterator[Stored]:
    """Return what is stored, a prompt at a time."""
    for start in range(0, len(hashes), RUN * HASH_BYTES):
        yield Stored(0, "", b"", hashes[start : start + RUN * HASH_BYTES])


def lease_of(client: redis.Redis, number: int) -> Lease | None:
    """Return the lease of a replica as it stands in Redis."""
    name = f"replica-{number}"
    record = client.hget(KEYS.replicas(GROUP), name)
    return Lease.parse(name, record, 0) if isinstance(record, bytes) else None


def published(client: redis.Redis, number: int) -> int:
    lease = lease_of(client, number)
    return 0 if lease is None else lease.published


def used(client: redis.Redis) -> int:
    """Return Redis' own figure; what is freed lazily is waited for."""
    until(lambda: client.info("memory")["lazyfree_pending_objects"] == 0)
    return int(client.info("memory")["used_memory"])


# Measuring


@dataclass(frozen=True)
class Spread:
    """Of timings, in milliseconds."""

    p50: float
    p99: float

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        ordered = sorted(seconds)
        return cls(*(ordered[int(share * (len(ordered) - 1))] * 1000 for share in (0.5, 0.99)))


@dataclass(frozen=True)
class Filled:
    """One size of the pool."""

    bytes_per_block: dict[str, float]
    """Per block and owner, by number of owners."""
    publish_seconds: float
    """All of it, from a snapshot."""
    blocks_per_second: float
    """One event after the other, `TURN` blocks each."""
    republish_seconds: float
    """From the loss of the table to the lease that says it is complete."""
    lag: Spread
    """From `heard` until a lookup finds it."""
    find: dict[str, dict[str, Spread]]
    """By length of the prompt and number of owners."""


def fill(url: str, client: redis.Redis, blocks: int, samples: int) -> Filled:
    """Measure everything with pools of so many blocks."""
    hashes = os.urandom(blocks * HASH_BYTES)
    sizes: dict[str, float] = {}
    find: dict[str, dict[str, Spread]] = {}
    with ExitStack() as replicas:
        client.flushall()
        before = used(client)
        publish_seconds = 0.0
        for number in range(max(OWNERS)):
            replica = replicas.enter_context(publisher(url, number, blocks))
            seconds = publishing(replica, client, number, hashes)
            publish_seconds = publish_seconds or seconds
            if number + 1 in OWNERS:
                sizes[str(number + 1)] = (used(client) - before) / blocks / (number + 1)
                found = asyncio.run(lookups(url, client, hashes, number + 1, samples))
                for length, spread in found.items():
                    find.setdefault(length, {})[str(number + 1)] = spread
    client.flushall()
    with publisher(url, 0, blocks + TURN * samples + 1) as replica:
        until(lambda: replica.status.current)
        start = time.perf_counter()
        for at in range(0, len(hashes), TURN * HASH_BYTES):
            replica.heard(Stored(0, "", b"", hashes[at : at + TURN * HASH_BYTES]))
        until(lambda: replica.status.blocks == blocks)
        rate = blocks / (time.perf_counter() - start)
        lag = Spread.of(lags(replica, client, samples))
        republish = republishing(replica, client, blocks + samples * TURN)
    return Filled(sizes, publish_seconds, rate, republish, lag, find)


def publishing(replica: Publisher, client: redis.Redis, number: int, hashes: bytes) -> float:
    """Time from a snapshot until the lease says that all of it is published."""
    until(lambda: replica.status.current)
    start = time.perf_counter()
    replica.restart(snapshot(hashes))
    until(lambda: published(client, number) == len(hashes) // HASH_BYTES)
    return time.perf_counter() - start


def lags(replica: Publisher, client: redis.Redis, samples: int) -> list[float]:
    """Time from `heard` until a lookup finds it, for events that come one at a time."""
    lease = lease_of(client, 0)
    assert lease is not None
    find = client.register_script(schema.FIND)
    seconds = []
    for _ in range(samples):
        hashes = os.urandom(TURN * HASH_BYTES)
        names = query(hashes)
        start = time.perf_counter()
        replica.heard(Stored(0, "", b"", hashes))
        while find(keys=[KEYS.table(GROUP, lease.replica_id, lease.nonce)], args=[names]) != [TURN]:
            pass
        seconds.append(time.perf_counter() - start)
    return seconds


def republishing(replica: Publisher, client: redis.Redis, blocks: int) -> float:
    """Time from the loss of a table, which the next change brings to light, until all of it is there again."""
    until(lambda: replica.status.current and replica.status.blocks == blocks)
    lease = lease_of(client, 0)
    assert lease is not None
    client.unlink(KEYS.table(GROUP, lease.replica_id, lease.nonce))
    start = time.perf_counter()
    replica.heard(Stored(0, "", b"", os.urandom(HASH_BYTES)))
    until(lambda: published(client, 0) == blocks + 1)
    return time.perf_counter() - start


async def lookups(url: str, client: redis.Redis, hashes: bytes, owners: int, samples: int) -> dict[str, Spread]:
    """Time lookups through the locator, of all owners at once."""
    locator = Locator(url, timeout=WAIT_SECONDS)
    leases = [lease for number in range(owners) if (lease := lease_of(client, number)) is not None]
    found = {}
    for tokens in PROMPTS:
        prompts = halved(hashes, tokens // BLOCK, samples)

        async def find(prompt: bytes) -> None:
            held = await locator.find(GROUP, prompt, leases)
            if set(held.values()) != {len(prompt) // HASH_BYTES // 2}:
                raise NoHints(f"a lookup found {held}")

        found[f"{tokens:,}"] = await timed(find, prompts)
    await locator.close()
    return found


def halved(hashes: bytes, blocks: int, samples: int) -> list[bytes]:
    """Return prompts of so many blocks of which the first half is stored."""
    half = blocks // 2 * HASH_BYTES
    starts = range(0, len(hashes) - half, max(HASH_BYTES, (len(hashes) - half) // samples // HASH_BYTES * HASH_BYTES))
    return [hashes[start : start + half] + os.urandom(half) for start in starts[:samples]]


async def timed(ask: Callable[[bytes], Awaitable[None]], prompts: Iterable[bytes]) -> Spread:
    seconds = []
    for number, prompt in enumerate(prompts):
        start = time.perf_counter()
        await ask(prompt)
        if number:  # the first one connects
            seconds.append(time.perf_counter() - start)
    return Spread.of(seconds)


# Other layouts


def other_layouts(client: redis.Redis, blocks: int) -> dict[str, dict[str, float]]:
    """Bytes per block and owner of other ways to say the same, by number of owners."""
    names = [os.urandom(HASH_BYTES) for _ in range(blocks)]
    sizes: dict[str, dict[str, float]] = {"hash per block": {}, "small hashes": {}}
    for owners in (1, 3):
        for layout, store in (("hash per block", _hash_per_block), ("small hashes", _small_hashes)):
            client.flushall()
            before = used(client)
            store(client, names, owners)
            sizes[layout][str(owners)] = (used(client) - before) / blocks / owners
    client.flushall()
    return sizes


def _hash_per_block(client: redis.Redis, names: list[bytes], owners: int) -> None:
    pipeline = client.pipeline(transaction=False)
    for number, name in enumerate(names):
        said = json.dumps({"tier": "device", "stored": 1_700_000_000_000 + number, "ttl": 3600})
        pipeline.hset(f"block:{name.hex()}", mapping={f"replica-{owner}": said for owner in range(owners)})
        if number % 1000 == 999:
            pipeline.execute()
    pipeline.execute()


def _small_hashes(client: redis.Redis, names: list[bytes], owners: int) -> None:
    buckets = max(1, len(names) // 100)
    mask = (1 << owners) - 1
    pipeline = client.pipeline(transaction=False)
    for number, name in enumerate(names):
        pipeline.hset(f"b:{int.from_bytes(name[8:], 'little') % buckets}", name[:8], mask)
        if number % 1000 == 999:
            pipeline.execute()
    pipeline.execute()


async def other_lookups(url: str, blocks: int, samples: int) -> dict[str, dict[str, Spread]]:
    """Time lookups of a prompt with a key per block, one owner."""
    hashes = os.urandom(blocks * HASH_BYTES)
    names = [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]
    found: dict[str, dict[str, Spread]] = {}
    async with AsyncRedis.from_url(url, protocol=2) as client:
        await client.flushall()
        for at in range(0, blocks, 10_000):
            await client.mset(dict.fromkeys(names[at : at + 10_000], b"1"))

        async def gets(prompt: bytes) -> None:
            pipeline = client.pipeline(transaction=False)
            for at in range(0, len(prompt), HASH_BYTES):
                pipeline.get(prompt[at : at + HASH_BYTES])
            _leading(await pipeline.execute(), prompt)

        async def mget(prompt: bytes) -> None:
            asked = [prompt[at : at + HASH_BYTES] for at in range(0, len(prompt), HASH_BYTES)]
            _leading(await client.mget(asked), prompt)

        for tokens in PROMPTS:
            prompts = halved(hashes, tokens // BLOCK, samples)
            found[f"{tokens:,}"] = {"GETs": await timed(gets, prompts), "MGET": await timed(mget, prompts)}
        await client.flushall()
    return found


def _leading(answers: list[Any], prompt: bytes) -> None:
    held = next((number for number, answer in enumerate(answers) if answer is None), len(answers))
    if held != len(prompt) // HASH_BYTES // 2:
        raise NoHints(f"a lookup found {held}")


# What is reported


def show(report: dict[str, Any], console: Console) -> None:
    """The report as tables."""
    filled: dict[str, Filled] = report["hints"]
    layouts: dict[str, dict[str, float]] = report["layouts"]
    table = _table("bytes per block and owner", *(f"{owners} owners" if owners > 1 else "1 owner" for owners in OWNERS))
    for blocks, result in filled.items():
        table.add_row(f"hints, {blocks} blocks", *(f"{size:.1f}" for size in result.bytes_per_block.values()))
    for layout, sizes in layouts.items():
        table.add_row(f"{layout}, {report['layout_blocks']:,} blocks", *(f"{size:.1f}" for size in sizes.values()), "")
    console.print(table)

    table = _table("publishing", "all s", "all again s", "blocks/s", "lag p50 ms", "p99")
    for blocks, result in filled.items():
        rate = f"{result.blocks_per_second:,.0f}"
        seconds = (f"{result.publish_seconds:.2f}", f"{result.republish_seconds:.2f}")
        table.add_row(f"{blocks} blocks", *seconds, rate, f"{result.lag.p50:.2f}", f"{result.lag.p99:.2f}")
    console.print(table)

    table = _table("finding, tokens", "p50 ms", "p99", "GETs p50", "p99", "MGET p50", "p99", "MGET / hints")
    for blocks, result in filled.items():
        for tokens, spreads in result.find.items():
            for owners, spread in spreads.items():
                gets, mget = report["lookups"][tokens]["GETs"], report["lookups"][tokens]["MGET"]
                alone = owners == "1"
                others = [f"{value:.2f}" if alone else "" for value in (gets.p50, gets.p99, mget.p50, mget.p99)]
                ratio = f"{mget.p50 / spread.p50:.1f}" if alone else ""
                name = f"{tokens}, {blocks} blocks, {owners} owner{'' if alone else 's'}"
                table.add_row(name, f"{spread.p50:.2f}", f"{spread.p99:.2f}", *others, ratio)
    console.print(table)


def _table(*columns: str) -> Table:
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


Server = Annotated[str | None, typer.Option("--redis-server", help="The program; the one on PATH by default.")]
Output = Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")]
Quick = Annotated[bool, typer.Option(help="A tenth of everything, to see that it runs.")]


def main(redis_server: Server = None, output: Output = None, quick: Quick = False) -> None:
    """Measure memory, publishing and lookups of hints, beside other layouts."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    console = wide_console()
    sizes = [10_000, 100_000] if quick else [100_000, 1_000_000]
    samples = 100 if quick else 1_000
    where = machine()
    with local_redis(redis_server) as url, redis.Redis.from_url(url, protocol=2) as client:
        server = client.info()
        where["redis"] = f"{server['redis_version']}, {server['mem_allocator']}"
        console.print(f"{describe(where)}; Redis {where['redis']}")
        console.print(f"blocks of {BLOCK} tokens; prompts of which owners have half; the same Redis for all")
        report: dict[str, Any] = {
            "layout_blocks": sizes[0],
            "layouts": other_layouts(client, sizes[0]),
            "lookups": asyncio.run(other_lookups(url, sizes[0], samples)),
            "hints": {f"{blocks:,}": fill(url, client, blocks, samples) for blocks in sizes},
        }
    show(report, console)
    if output:
        output.write_text(json.dumps({"machine": where, **report}, default=asdict, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
