"""What routing is worth: several replicas, simulated, under every policy.

    python -m benchmarks.bench_routing [--trace trace.jsonl] [--replicas 16] [--plot routing.png] [--json out.json]

Each replica is the real prefix cache with a model of how long one GPU takes
(`benchmarks.replicas`, where its parameters come from); the router is the real one. Time is
simulated, so nothing here depends on the machine it runs on, and every run gives the same.

A request arrives as the trace says, faster or slower by one factor, so that the load is a
share of what the replicas could just serve if they had one cache of their summed size. One
that goes on from another's answer is sent when that answer has ended, if not later.

What the router knows is as late as in life: a replica renews its lease every 4 seconds, the
router reads all leases every second, and Redis learns of a block half a second after it is
there. *Own history* is the default policy without any of that: the router's memory alone,
of the prompts it sent where. *Product* is (tokens to compute) x (requests + 1), with the same
knowledge as the default. *Pooled* is one cache of the summed size that sees all
requests in the order of their arrival; it bounds the hit rate and has no times.
"""

from __future__ import annotations

import heapq
import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import workloads
from benchmarks.machine import wide_console
from benchmarks.replicas import BLOCK, Job, Machine, Replica, Told
from benchmarks.serving.measure import percentile
from prefixcache.cache import PrefixCache
from prefixcache.hints.schema import Lease, Load
from prefixcache.naming import BlockNames
from prefixcache.routing.memory import names_of
from prefixcache.routing.policies import DEFAULT, POLICIES, Candidate, Policy, round_robin
from prefixcache.routing.router import Router, Sent, Wanted
from prefixcache.tokens import TOKEN_BYTES

RENEWED = 4.0
READ = 1.0
LAG = 0.5
OWN_HISTORY = "own history"
PRODUCT = "product"
NAMES = BlockNames(b"", b"", BLOCK)


# Workloads


def recorded(path: Path, requests: int) -> list[Job]:
    """The first requests of a trace in the Mooncake format.

    A request goes on from the latest one whose whole blocks (two at least) its own begin
    with; a session is a chain of those.
    """
    jobs: list[Job] = []
    places: dict[tuple[int, int], int] = {}  # a place and the next id -> the place behind it
    ends: dict[int, int] = {}  # a place -> the request that ended there
    with path.open() as lines:
        for line, request in zip(lines, workloads.recorded(path, requests), strict=False):
            entry = json.loads(line)
            place, after = 0, None
            whole = entry["input_length"] // workloads.TRACE_BLOCK_TOKENS
            for depth, one in enumerate(entry["hash_ids"], 1):
                place = places.setdefault((place, one), len(places) + 1)
                after = ends.get(place, after)
                if depth == whole > 1:
                    ends[place] = len(jobs)
            session = f"session {len(jobs)}" if after is None else jobs[after].session
            at = entry["timestamp"] / 1000
            jobs.append(Job(len(jobs), at, *request, NAMES.of(request.prompt, ""), session, after))
    return jobs


def first(jobs: Sequence[Job], count: int) -> Sequence[Job]:
    return jobs[:count]


def generated(requests: int) -> list[Job]:
    """Agents (two of three sessions) and chats, of `requests` turns in all.

    An agent begins with one of 64 system prompts of 1,000 to 6,000 tokens, chosen by Zipf's
    law, and makes 3 to 20 calls, each with 100 to 3,000 tokens of results of tools. A chat
    begins with one of four prompts of 300 tokens and has 1 to 12 turns of 20 to 400 tokens.
    """
    source = random.Random("agents and chats")
    systems = [source.randbytes(source.randint(1_000, 6_000) * TOKEN_BYTES) for _ in range(64)]
    chats = [source.randbytes(300 * TOKEN_BYTES) for _ in range(4)]
    turns: list[tuple[float, int, int, bytes, bytes]] = []  # when, session, turn, prompt, output
    for session in itertools.count():
        if len(turns) >= requests:
            break
        at = source.random()
        agent = source.random() < 2 / 3
        history = source.choices(systems, cum_weights=workloads.zipf(64))[0] if agent else source.choice(chats)
        for turn in range(source.randint(3, 20) if agent else source.randint(1, 12)):
            new = source.randint(100, 3_000) if agent else source.randint(20, 400)
            prompt = history + source.randbytes(new * TOKEN_BYTES)
            output = source.randbytes((source.randint(20, 150) if agent else source.randint(50, 400)) * TOKEN_BYTES)
            turns.append((at, session, turn, prompt, output))
            history = prompt + output
            at += source.expovariate(200 if agent else 30)
    turns.sort(key=lambda turn: turn[:3])
    last: dict[int, int] = {}
    jobs = []
    for number, (at, session, _, prompt, output) in enumerate(turns[:requests]):
        jobs.append(Job(number, at, prompt, output, NAMES.of(prompt, ""), f"session {session}", last.get(session)))
        last[session] = number
    return jobs


# What can be reached


@dataclass(frozen=True)
class Pooled:
    """One cache of the summed size, and what the same requests then cost."""

    hit_rate: float
    rate: float
    """Requests per second that the replicas could just serve, each as full as it can be."""


def pooled(jobs: Sequence[Job], replicas: int, machine: Machine) -> Pooled:
    cache = PrefixCache(machine.blocks * replicas, BLOCK, memory_of_removed=0)
    seconds, prompts, cached = 0.0, 0, 0
    mean = sum(job.prompt_tokens + job.output_tokens for job in jobs) / len(jobs)
    batch = min(machine.max_running, machine.blocks * BLOCK / mean)
    for job in jobs:
        hit = replay(cache, job)
        prompts += job.prompt_tokens
        cached += hit
        seconds += machine.prefill_seconds(hit, job.prompt_tokens - hit)
        context = job.prompt_tokens + job.output_tokens / 2
        seconds += job.output_tokens * (machine.step / batch + machine.context_token * context)
    return Pooled(cached / prompts, replicas * len(jobs) / seconds)


def replay(cache: PrefixCache, job: Job) -> int:
    """Serve one request alone; return how many tokens of its prompt were cached."""
    lease = cache.match(job.prompt)
    lease.copied()
    cache.allocate(lease, job.blocks - len(lease.blocks))
    sequence = job.prompt + job.output
    size = BLOCK * TOKEN_BYTES
    end = (len(sequence) // TOKEN_BYTES - 1) // BLOCK * size  # the last token was never fed back
    cache.commit(lease, sequence[lease.shared * size : end])
    lease.release()
    return lease.cached_tokens


# The simulation


@dataclass
class Outcome:
    """What came of every request. `busy` is what each replica computed until the last one was due, in `seconds`."""

    requests: int = 0
    rejected: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    ttft: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def summary(self) -> dict[str, float]:
        mean_busy = sum(self.busy) / len(self.busy)
        return {
            "hit rate": self.hit_rate,
            "ttft mean s": sum(self.ttft) / len(self.ttft),
            "ttft p50 s": percentile(self.ttft, 50) or 0.0,
            "ttft p99 s": percentile(self.ttft, 99) or 0.0,
            "imbalance": max(self.busy) / mean_busy if mean_busy else 1.0,
            "busy": mean_busy / self.seconds if self.seconds else 0.0,
            "rejected": self.rejected,
            "requests": self.requests,
        }


class Simulation:
    """Requests, routers, and replicas of which they know what those say of themselves.

    With several routers each request goes through one of them by chance.
    """

    def __init__(
        self, jobs: Sequence[Job], count: int, machine: Machine, policy: Policy, *, hints: bool = True, routers: int = 1
    ) -> None:
        self.jobs = jobs
        self.told = [Told(LAG) for _ in range(count)] if hints else []
        self.replicas = [Replica(machine, self.told[number].hear if hints else None) for number in range(count)]
        self.routers = [Router(policy) for _ in range(routers)]
        self.outcome = Outcome()
        self.sent: dict[int, Sent] = {}
        self._source = random.Random("routers")
        self._names = {f"replica-{number:02}": number for number in range(count)}
        self._stated = [
            Lease(name, "n", "", "", BLOCK, machine.blocks, Load(free=machine.blocks), age=0.0) for name in self._names
        ]
        self._stated_at = [0.0] * count
        self._plans = [0] * count
        self._arrived: dict[int, float] = {}
        self._followers: dict[int, list[Job]] = {}
        self._open = len(jobs)
        self._speed = 1.0
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()

    def run(self, speed: float) -> Outcome:
        """Send every request at its time divided by `speed`, or when what it goes on from has ended. Once only."""
        self._speed = speed
        self._at(self.jobs[-1].at / speed, self._take_stock)
        for job in self.jobs:
            if job.after is None:
                self._at(job.at / speed, partial(self._arrive, job))
            else:
                self._followers.setdefault(job.after, []).append(job)
        count = len(self.replicas)
        for number in range(count):
            self._at(RENEWED * number / count, partial(self._renew, number))
        self._read(0.0)
        while self._open:
            now, _, happen = heapq.heappop(self._events)
            happen(now)
        self.outcome.requests = len(self.jobs)
        return self.outcome

    def _take_stock(self, now: float) -> None:
        self.outcome.seconds = now
        self.outcome.busy = [replica.busy_until(now) for replica in self.replicas]

    def _at(self, when: float, happen: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), happen))

    def _renew(self, number: int, now: float) -> None:
        self._stated[number] = replace(self._stated[number], load=self.replicas[number].load())
        self._stated_at[number] = now
        self._at(now + RENEWED, partial(self._renew, number))

    def _read(self, now: float) -> None:
        leases = [replace(lease, age=now - at) for lease, at in zip(self._stated, self._stated_at, strict=True)]
        for router in self.routers:
            router.update(leases, now)
        self._at(now + READ, self._read)

    def _arrive(self, job: Job, now: float) -> None:
        router = self._source.choice(self.routers)
        wanted = Wanted(job.hashes, job.prompt_tokens, job.session)
        held: dict[str, int] | None = None
        if self.told:
            names = names_of(job.hashes)
            held = {name: self.told[number].held(names, now) for name, number in self._names.items()}
        chosen = router.rank(wanted, held, now)[0]
        number = self._names[chosen]
        self._arrived[job.number] = now
        if self.replicas[number].submit(job):
            self.sent[job.number] = router.sent(chosen, wanted, now)
            self._plan(number, now)
        else:
            self.outcome.rejected += 1
            self._end(job, now)

    def _plan(self, number: int, now: float) -> None:
        if self.told:
            self.told[number].now = now
        until = self.replicas[number].plan(now)
        if until is not None:
            self._plans[number] += 1
            self._at(until, partial(self._finish, number, self._plans[number]))

    def _finish(self, number: int, plan: int, now: float) -> None:
        if plan != self._plans[number]:
            return  # it was cut short
        if self.told:
            self.told[number].now = now
        ended = self.replicas[number].finish(now)
        for job, cached in ended.first:
            self.outcome.prompt_tokens += job.prompt_tokens
            self.outcome.cached_tokens += cached
            self.outcome.ttft.append(now - self._arrived[job.number])
            self.sent[job.number].computed(now)
        for job in ended.last:
            self.sent.pop(job.number).done(now)
            self._end(job, now)
        self._plan(number, now)

    def _end(self, job: Job, now: float) -> None:
        self._open -= 1
        for following in self._followers.pop(job.number, ()):
            self._at(max(following.at / self._speed, now), partial(self._arrive, following))


# What is reported


def product(wanted: Wanted, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    """What the default policy is compared with; see there."""

    def score(one: Candidate) -> tuple[int, int]:
        return max(wanted.tokens - one.cached_tokens, 1) * (one.requests + 1), -one.room

    return sorted(round_robin(wanted, candidates), key=score)


COMPARED = {**POLICIES, OWN_HISTORY: POLICIES[DEFAULT], PRODUCT: product}
HINTED = (DEFAULT, PRODUCT)
"""Those that look at what replicas hold; the others need not be told."""

Report = dict[str, Any]


def simulate(jobs: Sequence[Job], replicas: int, machine: Machine, name: str, speed: float, routers: int) -> Report:
    """Run one of COMPARED."""
    hints = name in HINTED
    return Simulation(jobs, replicas, machine, COMPARED[name], hints=hints, routers=routers).run(speed).summary()


def measure(
    workload: Callable[[int], Sequence[Job]],
    sizes: Sequence[int],
    loads: Sequence[float],
    names: Sequence[str],
    machine: Machine,
    routers: int,
    per_replica: int,
    least: int,
    progress: Progress,
) -> list[Report]:
    """Simulate everything: for each number of replicas what is pooled, and each policy at each load."""
    task = progress.add_task("", total=len(sizes) * (1 + len(loads) * len(names)))
    report = []
    for size in sizes:
        progress.update(task, description=f"{size} replicas, pooled")
        some = workload(max(per_replica * size, least))
        bound = pooled(some, size, machine)
        progress.advance(task)
        spread = (some[-1].at - some[0].at) or 1.0
        runs: dict[str, dict[str, Report]] = {}
        for load in loads:
            for name in names:
                progress.update(task, description=f"{size} replicas, load {load:.0%}, {name}")
                speed = load * bound.rate * spread / len(some)
                runs.setdefault(f"{load:.0%}", {})[name] = simulate(some, size, machine, name, speed, routers)
                progress.advance(task)
        report.append({"replicas": size, "requests": len(some), "pooled": asdict(bound), "loads": runs})
    return report


def show(report: list[Report], console: Console) -> None:
    """One table for each number of replicas."""
    for part in report:
        bound = part["pooled"]
        title = f"{part['replicas']} replicas, {part['requests']:,} requests; at 100 %: {bound['rate']:.1f}/s; "
        table = Table(title=title + f"one pooled cache: {bound['hit_rate']:.1%} of prompt tokens")
        columns = ("hit rate", "of pooled", "ttft mean s", "p50 s", "p99 s", "max/mean busy", "busy", "rejected")
        for column in ("load", "policy", *columns):
            table.add_column(column, justify="left" if column in ("load", "policy") else "right")
        for load, runs in part["loads"].items():
            for name, run in runs.items():
                table.add_row(
                    load, name, f"{run['hit rate']:.1%}", f"{run['hit rate'] / bound['hit_rate']:.0%}",
                    *(f"{run[key]:.2f}" for key in ("ttft mean s", "ttft p50 s", "ttft p99 s", "imbalance")),
                    f"{run['busy']:.0%}", f"{run['rejected']:,}",
                )  # fmt: skip
            table.add_section()
        console.print(table)


Trace = Annotated[Path | None, typer.Option(help="A Mooncake trace instead of agents and chats.", exists=True)]
Sizes = Annotated[list[int] | None, typer.Option("--replicas", help="How many; several times for several.", min=1)]
Loads = Annotated[list[float] | None, typer.Option("--load", help="Share of saturation; several times.", min=0.01)]
Names = Annotated[list[str] | None, typer.Option("--policy", help="Of all policies, only this; several times.")]
Routers = Annotated[int, typer.Option(help="Routers that share the replicas and do not know of each other.", min=1)]
PerReplica = Annotated[int, typer.Option(help="Requests for each replica.", min=1)]
Least = Annotated[int, typer.Option(help="Requests at least.", min=10)]
Plot = Annotated[Path | None, typer.Option(help="Draw the results into this file.")]
Output = Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")]
Quick = Annotated[bool, typer.Option(help="Little of everything, to see that it runs.")]


def main(
    trace: Trace = None, replicas: Sizes = None, load: Loads = None, policy: Names = None, routers: Routers = 1,
    per_replica: PerReplica = 180, least: Least = 3_000, plot: Plot = None, output: Output = None, quick: Quick = False,
) -> None:  # fmt: skip
    """Compare routing policies on simulated replicas."""
    sizes, loads = replicas or [2, 4, 16, 64], load or [0.3, 0.6, 0.9, 1.0]
    if quick:
        sizes, loads, per_replica, least = sizes[:2], loads[-2:], 20, 200
    names = policy or [*COMPARED]
    for name in names:
        if name not in COMPARED:
            raise typer.BadParameter(f"there is no policy {name!r}; there are: {', '.join(COMPARED)}")
    console = wide_console()
    machine = Machine()
    workload = partial(first, recorded(trace, max(per_replica * max(sizes), least))) if trace else generated
    console.print(f"workload: {trace.name if trace else 'agents and chats'}; simulated time; {machine}", soft_wrap=True)
    with Progress(console=console, transient=True) as progress:
        report = measure(workload, sizes, loads, names, machine, routers, per_replica, least, progress)
    show(report, console)
    if output:
        whole = {"workload": trace.name if trace else "generated", "machine": asdict(machine), "routers": routers}
        output.write_text(json.dumps({**whole, "results": report}, indent=2) + "\n")
    if plot:
        from benchmarks.routing_plot import draw

        draw(report, plot)


if __name__ == "__main__":
    typer.run(main)
