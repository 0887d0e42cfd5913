"""The simulation of replicas: every request is accounted for, and the cache in it is the real one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import bench_routing
from benchmarks.bench_routing import COMPARED, Simulation, generated, pooled, recorded, replay
from benchmarks.replicas import BLOCK, Job, Machine, Replica, Told
from prefixcache.cache import PrefixCache
from prefixcache.routing.memory import names_of
from prefixcache.routing.policies import DEFAULT, POLICIES

SMALL = Machine(blocks=4_000, max_running=16, max_waiting=200)


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    return generated(150)


@pytest.mark.parametrize("name", COMPARED)
def test_every_request_is_accounted_for(name: str, jobs: list[Job]) -> None:
    """It gets its first token or is rejected, nothing is left anywhere, and the caches are consistent."""
    hints = name in bench_routing.HINTED
    simulation = Simulation(jobs, 3, SMALL, COMPARED[name], hints=hints, routers=2)
    outcome = simulation.run(0.05)
    assert outcome.requests == len(jobs) == len(outcome.ttft) + outcome.rejected
    assert not outcome.rejected and not simulation.sent
    assert outcome.prompt_tokens == sum(job.prompt_tokens for job in jobs)
    assert sum(replica.prompt_tokens for replica in simulation.replicas) == outcome.prompt_tokens
    assert sum(replica.cached_tokens for replica in simulation.replicas) == outcome.cached_tokens > 0
    assert all(time > 0 for time in outcome.ttft)
    assert len(outcome.busy) == 3 and outcome.seconds == pytest.approx(jobs[-1].at / 0.05)
    assert all(0 < busy <= outcome.seconds for busy in outcome.busy)
    for replica in simulation.replicas:
        replica.cache.check()
        load = replica.load()
        assert load.running == load.waiting == load.waiting_tokens == 0
        assert load.free + load.cached == SMALL.blocks
    for router in simulation.routers:
        assert [router.in_flight(f"replica-{number:02}") for number in range(3)] == [0, 0, 0]


def test_one_replica_caches_what_a_replay_caches(jobs: list[Job]) -> None:
    """Requests far apart in time, under memory pressure, whatever the policy: eviction is the real one."""
    apart = [replace(job, at=60.0 * job.number) for job in jobs]
    for policy in ("round-robin", DEFAULT):
        outcome = Simulation(apart, 1, SMALL, POLICIES[policy]).run(1.0)
        cache = PrefixCache(SMALL.blocks, BLOCK)
        assert outcome.cached_tokens == sum(replay(cache, job) for job in apart)
        assert outcome.hit_rate == pytest.approx(pooled(apart, 1, SMALL).hit_rate)
        assert cache.stats().evicted > 0, "there was no pressure"


def test_what_redis_knows_is_what_the_cache_holds_a_while_ago(jobs: list[Job]) -> None:
    """The lag over, every whole block of a prompt that is cached is known, and none that is not."""
    told = Told(lag=0.5)
    replica = Replica(SMALL, told.hear)
    now = 0.0
    for job in jobs[:60]:
        told.now = now
        assert replica.submit(job)
        while (until := replica.plan(now)) is not None:
            told.now = now = until
            replica.finish(now)
        names = names_of(job.hashes)
        assert told.held(names, now + 0.5) == replica.cache.lookup(job.prompt).cached_tokens // BLOCK == len(names)
    assert replica.cache.stats().evicted > 0
    for job in jobs[:60]:
        assert told.held(names_of(job.hashes), now + 0.5) == replica.cache.lookup(job.prompt).cached_tokens // BLOCK


def test_nothing_is_known_before_the_lag_is_over(jobs: list[Job]) -> None:
    """And then it is."""
    told = Told(lag=0.5)
    replica = Replica(SMALL, told.hear)
    replica.submit(jobs[0])
    until = replica.plan(0.0)
    while until is not None:
        told.now = last = until
        replica.finish(last)
        until = replica.plan(last)
    names = names_of(jobs[0].hashes)
    assert told.held(names, 0.4) == 0
    assert told.held(names, last + 0.5) == len(names)


def test_times_are_those_of_the_model(jobs: list[Job]) -> None:
    """A cold prompt alone takes its chunks, then a step per token."""
    machine = Machine(chunk=1_000)
    job = jobs[0]
    replica = Replica(machine)
    replica.submit(job)
    now = 0.0
    expected = sum(
        machine.step + machine.prefill_seconds(start, min(1_000, job.prompt_tokens - start))
        for start in range(0, job.prompt_tokens, 1_000)
    )
    first: list[float] = []
    while (until := replica.plan(now)) is not None:
        now = until
        if replica.finish(now).first:
            first.append(now)
    assert first == [pytest.approx(expected)]
    context = range(job.prompt_tokens + 1, job.prompt_tokens + job.output_tokens)
    assert now - first[0] == pytest.approx(sum(machine.step + machine.context_token * tokens for tokens in context))
    assert replica.busy == pytest.approx(now)


def test_a_job_that_comes_while_tokens_are_generated_waits_for_one_step_only(jobs: list[Job]) -> None:
    """The steps planned ahead are cut short behind the one that runs."""
    replica = Replica(Machine())
    replica.submit(jobs[0])
    now = 0.0
    while True:
        until = replica.plan(now)
        assert until is not None
        now = until
        if replica.finish(now).first:
            break
    far = replica.plan(now)
    replica.submit(jobs[1])
    near = replica.plan(now + 0.001)
    assert far is not None and near is not None
    assert now + 0.006 <= near < now + 0.010 < far


def test_a_full_queue_rejects(jobs: list[Job]) -> None:
    """What is rejected is counted, and what follows from it is sent all the same."""
    outcome = Simulation(jobs, 1, replace(SMALL, max_running=2, max_waiting=2), POLICIES["round-robin"]).run(1e6)
    assert outcome.rejected > 0
    assert len(outcome.ttft) + outcome.rejected == len(jobs)


def test_a_recorded_request_follows_the_one_it_goes_on_from(tmp_path: Path) -> None:
    """Two whole blocks alike make it the same session; the block that all share does not."""
    lines = [
        {"timestamp": 0, "input_length": 1030, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 10, "input_length": 1030, "output_length": 5, "hash_ids": [0, 3, 4]},
        {"timestamp": 20, "input_length": 1600, "output_length": 5, "hash_ids": [0, 1, 5, 6]},
        {"timestamp": 3000, "input_length": 2000, "output_length": 5, "hash_ids": [0, 1, 5, 7]},
        {"timestamp": 4000, "input_length": 2000, "output_length": 5, "hash_ids": [0, 9, 5, 7]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    jobs = recorded(path, 100)
    assert [job.after for job in jobs] == [None, None, 0, 2, None]
    assert [job.session for job in jobs] == ["session 0", "session 1", "session 0", "session 0", "session 4"]
    assert [job.at for job in jobs] == [0, 0.01, 0.02, 3, 4]
    assert [job.prompt_tokens for job in jobs] == [1030, 1030, 1600, 2000, 2000]
    assert jobs[2].prompt.startswith(jobs[0].prompt[: 1024 * 4])


def test_a_run_reports_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every policy, with the hit rate below the bound of one pooled cache."""
    result, plot = tmp_path / "routing.json", tmp_path / "routing.png"
    bench_routing.main(replicas=[2], load=[0.5, 1.0], per_replica=20, least=60, output=result, plot=plot)
    (part,) = json.loads(result.read_text())["results"]
    assert list(part["loads"]) == ["50%", "100%"]
    for runs in part["loads"].values():
        assert list(runs) == list(COMPARED)
        assert all(run["hit rate"] <= part["pooled"]["hit_rate"] + 0.01 for run in runs.values())
        assert all(run["requests"] == 60 for run in runs.values())
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "one pooled cache" in capsys.readouterr().out
