"""Sends phases to targets and collects records: for each repeat, for each target, every phase."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks.serving.measure import Agreement, Figures, Record, by_label, figures
from benchmarks.serving.targets import Failed, Target
from benchmarks.serving.traffic import Phase, Scenario, TokenSource, check_lengths

SETTLE = 1.0
"""Seconds of rest before a target's turn: threads of the one before go on spinning for a while, or tidy up."""


@dataclass
class Limits:
    """Seconds: the longest a request may take, and the time to first token of a good one."""

    timeout: float
    ttft: float


@dataclass
class Run:
    """One run of the benchmark: for each target, for each label, the figures of every repeat."""

    targets: dict[str, dict[str, Any]] = field(default_factory=dict)
    figures: dict[str, dict[str, list[Figures]]] = field(default_factory=dict)
    agreement: dict[str, Agreement] = field(default_factory=dict)
    memory: dict[str, int | None] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


@dataclass
class Outcome:
    """What one target made of one phase: records by session and call, seconds, and the share of a core we used."""

    records: list[Record]
    wall: float
    own_cpu: float


async def perform(target: Target, phase: Phase, timeout: float, done: Callable[[], None] = lambda: None) -> Outcome:
    """Send a phase. Every call ends up in a record, failed or not; requests are encoded before the clock starts."""
    prepared = [[target.prepare(call.prompt, call.output) for call in session] for session in phase.sessions]
    records = [[Record(call.label, len(call.prompt), call.output) for call in session] for session in phase.sessions]
    waiting = iter(range(len(phase.sessions)))
    begin = 0.0

    async def session(number: int) -> None:
        if phase.starts is not None:
            await asyncio.sleep(begin + phase.starts[number] - time.perf_counter())
        for request, record in zip(prepared[number], records[number], strict=True):
            try:
                async with asyncio.timeout(timeout):
                    await target.complete(request, record)
            except Failed as error:
                record.error = str(error)
            except TimeoutError:
                record.error = f"not finished within {timeout:g} s"
            record.check()
            done()

    async def worker() -> None:
        for number in waiting:
            await session(number)

    workers = len(phase.sessions) if phase.starts is not None or phase.concurrency is None else phase.concurrency
    gc.collect()
    gc.disable()  # so that no collection falls between a token and its time stamp
    try:
        begin, cpu = time.perf_counter(), time.process_time()
        async with asyncio.TaskGroup() as group:
            for _ in range(min(workers, len(phase.sessions))):
                group.create_task(worker())
        wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    finally:
        gc.enable()
    return Outcome([record for session in records for record in session], wall, cpu / wall)


async def measure(
    targets: Sequence[Target],
    reference: str,
    scenario: Scenario,
    source: TokenSource,
    repeats: int,
    longest: int,
    limits: Limits,
    progress: Callable[[str, int, int | None], None],
) -> Run:
    """Run a scenario on targets that are connected; `progress` is told what happens, how many calls
    have ended since it was told last, and how many there will be once that is known.

    Targets take turns in going first. Raises ValueError if a call is too long for the
    model, and Failed if a warm-up fails.
    """
    run = Run()
    for target in targets:
        run.targets[target.name] = await target.describe()
        run.figures[target.name] = {}
        run.agreement[target.name] = Agreement()
    warmup = scenario.warmup(source)
    check_lengths(warmup, longest)
    for target in targets:
        progress(f"{target.name}: warming up", 0, None)
        await _warm(target, warmup, limits.timeout)
    for repeat in range(repeats):
        phases = scenario.phases(source)
        check_lengths(phases, longest)
        total = repeats * len(targets) * sum(phase.calls() for phase in phases)
        records: dict[str, list[Record]] = {}
        for target in [*targets[repeat % len(targets) :], *targets[: repeat % len(targets)]]:
            records[target.name] = []
            await asyncio.sleep(SETTLE)
            for phase in phases:
                title = f"{repeat + 1}/{repeats} {target.name}: {phase.label}"
                outcome = await perform(target, phase, limits.timeout, partial(progress, title, 1, total))
                run.errors += [f"{title}: {record.error}" for record in outcome.records if record.error is not None]
                if phase.counted:
                    records[target.name] += outcome.records
                    _file(run.figures[target.name], outcome, limits.ttft)
        for target in targets:
            run.agreement[target.name].add(records[target.name], records[reference])
    for target in targets:
        run.memory[target.name] = target.peak_memory()
    return run


def _file(labels: dict[str, list[Figures]], outcome: Outcome, ttft_limit: float) -> None:
    for label, records in by_label(outcome.records).items():
        made = figures(records, outcome.wall, ttft_limit) | {"generator cores": outcome.own_cpu}
        labels.setdefault(label, []).append(made)


async def _warm(target: Target, phases: Sequence[Phase], timeout: float) -> None:
    for phase in phases:
        outcome = await perform(target, phase, timeout)
        failed = [record.error for record in outcome.records if record.error is not None]
        if failed:
            raise Failed(f"{target.name} failed {len(failed)} of {len(outcome.records)} warm-up requests: {failed[0]}")
