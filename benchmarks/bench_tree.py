"""What the index costs per operation, beside a plain dictionary of chained block hashes.

    python -m benchmarks.bench_tree [--trace trace.jsonl] [--json out.json] [--quick]

Prompts are packed before the clock starts. A *match* is match and release, an
*insert* is allocate and commit of everything not cached, prompt and output alike.
The baseline runs on the same requests in the same process: it hashes a prompt block
by block (xxh3_128, chained) until a hash is not in the dictionary.

Nothing here asserts a time; it reports what it finds.
"""

from __future__ import annotations

import json
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from operator import add
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from typing import Annotated, Any, NamedTuple, Protocol

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from xxhash import xxh3_128_digest

from benchmarks import workloads
from benchmarks.machine import describe, machine, wide_console
from benchmarks.workloads import Request, Workload
from prefixcache.cache import PrefixCache
from prefixcache.eviction import POLICIES
from prefixcache.lease import CacheEvent, Lease
from prefixcache.tokens import TOKEN_BYTES

BLOCK = 16
BLOCK_BYTES = BLOCK * TOKEN_BYTES
LONG_PROMPT = 32_768


class Index(Protocol):
    """What is measured; handles are whatever the index likes."""

    def match(self, prompt: bytes) -> Any: ...
    def cached_tokens(self, handle: Any) -> int: ...
    def missing(self, handle: Any, sequence: bytes) -> int:
        """How many blocks must be evicted before `sequence` fits."""
        ...

    def evict(self, count: int) -> int: ...
    def insert(self, handle: Any, sequence: bytes) -> None: ...
    def release(self, handle: Any) -> None: ...


class Tree:
    """The prefix cache as the engine uses it."""

    def __init__(self, blocks: int, policy: str = "lru", listener: Callable[[CacheEvent], None] | None = None) -> None:
        self.cache = PrefixCache(blocks, BLOCK, policy=POLICIES[policy], listener=listener)

    def match(self, prompt: bytes) -> Lease:
        return self.cache.match(prompt)

    def cached_tokens(self, handle: Lease) -> int:
        return handle.cached_tokens

    def missing(self, handle: Lease, sequence: bytes) -> int:
        return len(sequence) // BLOCK_BYTES - handle.shared - self.cache.stats().free

    def evict(self, count: int) -> int:
        return self.cache.evict(count)

    def insert(self, handle: Lease, sequence: bytes) -> None:
        self.cache.allocate(handle, len(sequence) // BLOCK_BYTES - handle.shared)
        start, end = handle.shared * BLOCK_BYTES, len(sequence) // BLOCK_BYTES * BLOCK_BYTES
        self.cache.commit(handle, sequence[start:end])

    def release(self, handle: Lease) -> None:
        handle.release()


class HashChain:
    """The baseline: block hash -> block, least recently used first, deepest first within a sequence."""

    def __init__(self, blocks: int) -> None:
        self.free = list(range(blocks))
        self.blocks: OrderedDict[bytes, int] = OrderedDict()

    def match(self, prompt: bytes) -> list[bytes]:
        """Returns the hashes of the cached blocks, all but the last token considered."""
        hashes: list[bytes] = []
        parent = b""
        for start in range(0, (len(prompt) - TOKEN_BYTES) // BLOCK_BYTES * BLOCK_BYTES, BLOCK_BYTES):
            parent = xxh3_128_digest(parent + prompt[start : start + BLOCK_BYTES])
            if parent not in self.blocks:
                break
            hashes.append(parent)
        for block_hash in reversed(hashes):
            self.blocks.move_to_end(block_hash)
        return hashes

    def cached_tokens(self, handle: list[bytes]) -> int:
        return len(handle) * BLOCK

    def missing(self, handle: list[bytes], sequence: bytes) -> int:
        return len(sequence) // BLOCK_BYTES - len(handle) - len(self.free)

    def evict(self, count: int) -> int:
        count = min(count, len(self.blocks))
        self.free += [self.blocks.popitem(last=False)[1] for _ in range(count)]
        return count

    def insert(self, handle: list[bytes], sequence: bytes) -> None:
        parent = handle[-1] if handle else b""
        added: list[bytes] = []
        for start in range(len(handle) * BLOCK_BYTES, len(sequence) - BLOCK_BYTES + 1, BLOCK_BYTES):
            parent = xxh3_128_digest(parent + sequence[start : start + BLOCK_BYTES])
            added.append(parent)
        for block_hash in reversed(added):
            if block_hash not in self.blocks:
                self.blocks[block_hash] = self.free.pop()

    def release(self, handle: list[bytes]) -> None:
        pass


@dataclass
class Timing:
    """Nanoseconds of each call, and the tokens they were about."""

    calls: list[int] = field(default_factory=list)
    tokens: int = 0

    def add(self, nanoseconds: int, tokens: int) -> None:
        self.calls.append(nanoseconds)
        self.tokens += tokens

    def microseconds(self, share: float) -> float:
        return sorted(self.calls)[int(share * (len(self.calls) - 1))] / 1000 if self.calls else 0.0

    def summary(self) -> Summary:
        per_token = sum(self.calls) / self.tokens if self.tokens else 0.0
        return Summary(self.microseconds(0.5), self.microseconds(0.99), per_token)


@dataclass(frozen=True)
class Summary:
    """Microseconds per call, nanoseconds per token."""

    p50: float
    p99: float
    per_token: float


@dataclass
class Run:
    """One index over one workload."""

    match: Timing = field(default_factory=Timing)
    insert: Timing = field(default_factory=Timing)
    evict: Timing = field(default_factory=Timing)
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens

    @property
    def median_request(self) -> float:
        """Microseconds of match, insert and release together."""
        return float(median(map(add, self.match.calls, self.insert.calls))) / 1000


def serve(index: Index, requests: Iterable[Request]) -> Run:
    """Put every request through the index, one after the other."""
    run = Run()
    for request in requests:
        sequence = request.prompt + request.output
        start = perf_counter_ns()
        handle = index.match(request.prompt)
        matched = perf_counter_ns() - start
        cached = index.cached_tokens(handle)
        missing = index.missing(handle, sequence)
        if missing > 0:
            start = perf_counter_ns()
            evicted = index.evict(missing)
            run.evict.add(perf_counter_ns() - start, evicted * BLOCK)
        start = perf_counter_ns()
        index.insert(handle, sequence)
        inserted = perf_counter_ns()
        index.release(handle)
        released = perf_counter_ns() - inserted
        run.match.add(matched + released, request.prompt_tokens)
        run.insert.add(inserted - start, len(sequence) // TOKEN_BYTES - cached)
        run.prompt_tokens += request.prompt_tokens
        run.cached_tokens += cached
    return run


# What is reported


def operations(workload: Workload, blocks: int) -> dict[str, dict[str, Summary]]:
    """Match and insert with room for everything."""
    tree, chain = serve(Tree(blocks), workload()), serve(HashChain(blocks), workload())
    return {
        "match": {"tree": tree.match.summary(), "chain": chain.match.summary()},
        "insert": {"tree": tree.insert.summary(), "chain": chain.insert.summary()},
    }


def pressure(workload: Workload, blocks: int) -> dict[str, Summary]:
    """Evictions with room for 30 % of the unique tokens."""
    room = blocks * 3 // 10
    tree, chain = serve(Tree(room), workload()), serve(HashChain(room), workload())
    return {"tree": tree.evict.summary(), "chain": chain.evict.summary()}


def hit_rates(workload: Workload, room: int) -> dict[str, float]:
    """Share of prompt tokens reused, by policy, with `room` blocks."""
    return {policy: serve(Tree(max(room, 1), policy), workload()).hit_rate for policy in POLICIES}


def long_prompt(repeats: int = 2_000) -> dict[str, Summary]:
    """A fully cached prompt of 32,768 tokens."""
    request = next(workloads.sized(1, LONG_PROMPT))
    tree = Tree(LONG_PROMPT // BLOCK + 1)
    serve(tree, [request])
    match, both = Timing(), Timing()
    for _ in range(repeats):
        start = perf_counter_ns()
        lease = tree.cache.match(request.prompt)
        matched = perf_counter_ns()
        lease.release()
        both.add(perf_counter_ns() - start, LONG_PROMPT)
        match.add(matched - start, LONG_PROMPT)
        assert lease.cached_tokens == LONG_PROMPT - 1
    return {"match": match.summary(), "match and release": both.summary()}


def growth(prompts: int, length: int = 512, samples: int = 2_000) -> Summary:
    """Match and release of fully cached prompts among so many others."""
    tree = Tree(prompts * length // BLOCK)
    kept = []
    for number, request in enumerate(workloads.sized(prompts, length)):
        serve(tree, [request])
        if number % max(prompts // samples, 1) == 0:
            kept.append(bytes(bytearray(request.prompt)))  # a copy: the tree may hold the original
    timing = Timing()
    for prompt in kept:
        start = perf_counter_ns()
        tree.cache.match(prompt).release()
        timing.add(perf_counter_ns() - start, length)
    return timing.summary()


def events(workload: Workload, blocks: int) -> dict[str, float]:
    """Median microseconds of bookkeeping per request without and with a listener."""
    received: list[CacheEvent] = []
    off = serve(Tree(blocks), workload())
    on = serve(Tree(blocks, listener=received.append), workload())
    return {"off": off.median_request, "on": on.median_request}


def metadata(workload: Workload, blocks: int) -> float:
    """Bytes that the filled cache holds per cached token, the 4 of the token itself included."""
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    tree = Tree(blocks)
    for request in workload():
        serve(tree, [request])
    del request
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (after - before) / (tree.cache.stats().cached * BLOCK)


class Step(NamedTuple):
    """One measurement: where its result goes in the report, and how to get it."""

    section: str
    key: str
    measure: Callable[[], Any]


def plan(named: dict[str, Workload], blocks: dict[str, int], sizes: list[int]) -> list[Step]:
    """Everything that is measured, in order."""
    steps = [Step("operations", name, partial(operations, named[name], blocks[name])) for name in named]
    for name in ("agents", "branch"):
        steps.append(Step("eviction", name, partial(pressure, named[name], blocks[name])))
    steps.append(Step("long_prompt", f"{LONG_PROMPT:,} tokens", long_prompt))
    steps += [Step("growth", f"{size:,}", partial(growth, size)) for size in sizes]
    for name in ("agents", "trace"):
        for label, percent in (("10 %", 10), ("30 %", 30), ("unbounded", 100)):
            room = blocks[name] * percent // 100
            steps.append(Step("hit_rates", f"{name}, {label}", partial(hit_rates, named[name], room)))
    for name in ("agents", "chat"):
        steps.append(Step("events", name, partial(events, named[name], blocks[name])))
    for name in ("agents", "branch"):
        steps.append(Step("metadata", name, partial(metadata, named[name], blocks[name])))
    return steps


def collect(named: dict[str, Workload], sizes: list[int], console: Console) -> dict[str, dict[str, Any]]:
    """Run the plan under a progress bar."""
    report: dict[str, dict[str, Any]] = {}
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("counting blocks", total=None)
        blocks = {name: workloads.unique_blocks(workload(), BLOCK) + 1 for name, workload in named.items()}
        steps = plan(named, blocks, sizes)
        progress.update(bar, total=len(steps))
        for step in steps:
            progress.update(bar, description=f"{step.section}: {step.key}")
            report.setdefault(step.section, {})[step.key] = step.measure()
            progress.advance(bar)
    return report


def show(report: dict[str, dict[str, Any]], console: Console) -> None:
    """The report as tables."""
    columns = ("p50 us", "p99 us", "ns/token", "hash chain p50", "p99", "ns/token", "chain / tree")
    table = _table("one call", *columns)
    rows = {
        f"{name}: {operation}": pair for name, both in report["operations"].items() for operation, pair in both.items()
    }
    rows |= {f"{name}: evict (room for 30 %)": pair for name, pair in report["eviction"].items()}
    for name, pair in rows.items():
        tree, chain = pair["tree"], pair["chain"]
        table.add_row(name, *_cells(tree), *_cells(chain), f"{chain.p50 / tree.p50:.1f}")
    console.print(table)

    table = _table("match of a fully cached prompt", "p50 us", "p99 us", "ns/token")
    for name, summary in report["long_prompt"].items():
        for part, timing in summary.items():
            table.add_row(f"{name}: {part}", *_cells(timing))
    for name, timing in report["growth"].items():
        table.add_row(f"512 tokens, among {name} prompts", *_cells(timing))
    console.print(table)

    table = _table("prompt tokens reused", *POLICIES)
    for name, rates in report["hit_rates"].items():
        table.add_row(name, *(f"{rate:.1%}" for rate in rates.values()))
    console.print(table)

    table = _table("one request", "events off p50 us", "on", "on / off")
    for name, cost in report["events"].items():
        table.add_row(name, f"{cost['off']:.1f}", f"{cost['on']:.1f}", f"{cost['on'] / cost['off']:.2f}")
    console.print(table)

    table = _table("metadata", "bytes per cached token")
    for name, size in report["metadata"].items():
        table.add_row(name, f"{size:.1f}")
    console.print(table)


def _table(*columns: str) -> Table:
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _cells(summary: Summary) -> list[str]:
    return [f"{summary.p50:.1f}", f"{summary.p99:.1f}", f"{summary.per_token:.1f}"]


Trace = Annotated[Path | None, typer.Option(help="A Mooncake trace instead of a generated one.", exists=True)]
TraceRequests = Annotated[int, typer.Option(help="How many requests of the trace to use.", min=100)]
Output = Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")]
Quick = Annotated[bool, typer.Option(help="A tenth of the requests, to see that everything runs.")]


def main(
    trace: Trace = None, trace_requests: TraceRequests = 3_000, output: Output = None, quick: Quick = False
) -> None:
    """Measure match, insert and evict, beside a dictionary of chained block hashes."""
    console = wide_console()
    scale = 10 if quick else 1
    named: dict[str, Workload] = {
        "agents": partial(workloads.agents, 5_000 // scale),
        "chat": partial(workloads.chat, 500 // scale),
        "trace": partial(workloads.recorded, trace, trace_requests // scale)
        if trace
        else partial(workloads.synthetic, trace_requests // scale),
        "branch": partial(workloads.branch, 20_000 // scale),
    }
    where = machine()
    console.print(describe(where))
    console.print(f"trace: {trace.name if trace else 'generated'}; blocks of {BLOCK} tokens; one thread")
    report = collect(named, [1_000, 10_000] if quick else [1_000, 10_000, 100_000], console)
    show(report, console)
    if output:
        output.write_text(json.dumps({"machine": where, **report}, default=asdict, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
