"""The scheduler on a runner that checks every slot it reads (see tests/engine/paper.py)."""

from __future__ import annotations

import random
from itertools import count
from typing import Any

import pytest

from engine.request import (
    Event,
    Failed,
    Finished,
    FinishReason,
    Request,
    Sampled,
    SamplingParams,
    Started,
    State,
)
from engine.scheduler import PATIENCE, Scheduler
from prefixcache.cache import PrefixCache
from prefixcache.errors import DeadlineExceeded, InvalidArgument, Unavailable
from prefixcache.reasons import MissReason
from tests.engine.paper import PaperRunner, generate

VOCAB = 1000
SIZE = 4


class Bench:
    """A scheduler, its cache and a paper runner, stepped by hand."""

    def __init__(self, blocks: int = 64, **changed: Any) -> None:
        options: dict[str, Any] = {
            "max_length": 400,
            "max_batch_tokens": 64,
            "max_running": 8,
            "eos": frozenset({VOCAB}),
        } | changed
        self.cache = PrefixCache(blocks, SIZE)
        self.runner = PaperRunner(blocks, SIZE, VOCAB)
        self.scheduler = Scheduler(self.cache, **options)
        self.events: dict[str, list[Event]] = {}
        self.names = count()
        self.now = 0.0

    def submit(self, prompt: list[int], max_tokens: int | None = 3, **options: Any) -> Request:
        name = f"r{next(self.names)}"
        params = SamplingParams(max_tokens=max_tokens, **options.pop("params", {}))
        events = self.events[name] = []
        request = Request(name, prompt, params, 0, events.append, arrival=self.now, **options)
        self.scheduler.validate(prompt)
        self.scheduler.submit(request)
        return request

    def step(self) -> int:
        """Run one step; returns how many tokens it computed."""
        self.now += 1.0
        step = self.scheduler.schedule(self.now)
        if step is None:
            return 0
        sampled = self.runner.run(step)
        self.scheduler.commit(step, sampled, self.now, 0.5)
        self.cache.check()
        return sum(len(chunk.tokens) for chunk in step.chunks)

    def finish(self) -> None:
        for _ in range(10_000):
            if self.scheduler.idle:
                return
            assert self.step(), "nothing can be computed although requests are open"
        raise AssertionError("no end")

    def output(self, request: Request) -> list[int]:
        return [event.token for event in self.events[request.id] if isinstance(event, Sampled)]

    def started(self, request: Request) -> Started:
        (event,) = [event for event in self.events[request.id] if isinstance(event, Started)]
        return event

    def finished(self, request: Request) -> Finished:
        event = self.events[request.id][-1]
        assert isinstance(event, Finished)
        return event


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 100])
def test_repeat_computes_only_the_last_token(length: int) -> None:
    """The exact repeat of a prompt finds all but its last token, whatever its length is to a block."""
    bench = Bench()
    prompt = prompt_of(length)
    cold = bench.submit(prompt)
    bench.finish()
    computed = bench.runner.computed_tokens
    warm = bench.submit(prompt)
    bench.finish()
    assert bench.started(cold).cached_tokens == 0
    assert bench.started(warm).cached_tokens == length - 1
    assert bench.started(warm).reason is (MissReason.NONE if length > 1 else MissReason.TOO_SHORT)
    assert bench.runner.computed_tokens - computed == 1 + 2
    assert bench.output(warm) == bench.output(cold) == generate(prompt, 3, VOCAB)


def test_next_turn_finds_generated_tokens() -> None:
    """A chat's next turn reuses the answer as well: all whose keys and values were computed."""
    bench = Bench()
    first = bench.submit(prompt_of(10), max_tokens=9)
    bench.finish()
    history = prompt_of(10) + bench.output(first)
    turn = bench.submit(history + prompt_of(5, seed=1))
    bench.finish()
    assert bench.started(turn).cached_tokens == len(history) - 1  # the last token's were never computed


def test_chunked_prefill_equals_unchunked() -> None:
    """A prompt longer than a step's budget is computed in chunks and gives the same tokens."""
    bench = Bench(max_batch_tokens=8)
    request = bench.submit(prompt_of(50))
    bench.finish()
    assert bench.runner.largest_step == 8
    assert bench.output(request) == generate(prompt_of(50), 3, VOCAB)


def test_decodes_go_on_while_a_long_prompt_is_prefilled() -> None:
    """Every running request gets its token in every step, whatever else is prefilled."""
    bench = Bench(max_batch_tokens=8)
    short = bench.submit(prompt_of(4), max_tokens=20)
    bench.step()
    bench.submit(prompt_of(60, seed=1))
    for expected in range(2, 8):
        bench.step()
        assert len(bench.output(short)) == expected


def test_single_flight() -> None:
    """Of many cold requests with one prefix, one computes it and the others wait for its blocks."""
    bench = Bench(blocks=200, max_batch_tokens=16)
    prefix = prompt_of(80)
    requests = [bench.submit(prefix + prompt_of(3, seed=i + 1)) for i in range(6)]
    bench.finish()
    assert bench.runner.computed_tokens == 80 + 6 * 3 + 6 * 2
    assert [bench.started(r).cached_tokens for r in requests] == [0] + [80] * 5
    for i, request in enumerate(requests):
        assert bench.output(request) == generate(prefix + prompt_of(3, seed=i + 1), 3, VOCAB)


def test_flight_survives_its_leader() -> None:
    """If the request that computes a prefix is aborted, a waiting one takes over where it stopped."""
    bench = Bench(max_batch_tokens=16)
    leader = bench.submit(prompt_of(60))
    follower = bench.submit(prompt_of(60))
    bench.step()
    assert follower.state is State.WAITING
    bench.scheduler.abort(leader)
    bench.finish()
    assert bench.started(follower).cached_tokens == 16
    assert bench.output(follower) == generate(prompt_of(60), 3, VOCAB)


def test_preempted_requests_finish_with_the_same_tokens() -> None:
    """When decoding runs out of blocks the youngest gives way, and later gives the tokens it would have given."""
    bench = Bench(blocks=20)
    requests = [bench.submit(prompt_of(12, seed=i), max_tokens=40) for i in range(4)]
    bench.finish()
    stats = bench.scheduler.stats()
    assert stats.totals.preempted > 0
    assert stats.totals.recomputed_tokens == sum(bench.finished(r).usage.recomputed_tokens for r in requests)
    for i, request in enumerate(requests):
        assert bench.output(request) == generate(prompt_of(12, seed=i), 40, VOCAB)
        assert bench.started(request).cached_tokens == 0, "a preemption is not a hit"
    assert stats.totals.prompt_tokens == 48 and stats.totals.cached_tokens == 0


def test_waiting_for_blocks_counts_nothing() -> None:
    """A request that does not fit for many steps is counted, and refreshes what it will match, once: at admission."""
    bench = Bench(blocks=16)
    bench.submit(prompt_of(12), max_tokens=1)
    bench.finish()
    hog = bench.submit(prompt_of(40, seed=1), max_tokens=12)
    bench.step()
    waiting = bench.submit(prompt_of(12) + prompt_of(20, seed=2), max_tokens=1)
    before = bench.scheduler.stats().totals
    while hog.state is State.RUNNING:
        bench.step()
        if hog.state is State.RUNNING:
            assert waiting.state is State.WAITING
            now = bench.scheduler.stats().totals
            assert (now.admitted, now.prompt_tokens, now.cached_tokens, now.miss_reasons) == (
                before.admitted, before.prompt_tokens, before.cached_tokens, before.miss_reasons,
            )  # fmt: skip
    bench.finish()
    totals = bench.scheduler.stats().totals
    assert totals.admitted == totals.miss_reasons.total() == 3
    assert totals.prompt_tokens == 12 + 40 + 32


def test_a_block_that_has_been_copied_is_let_go() -> None:
    """A partly matching block is held until the step has copied it, not until the request ends."""
    bench = Bench()
    bench.submit(prompt_of(6), max_tokens=1)
    bench.finish()
    request = bench.submit(prompt_of(6) + prompt_of(3, seed=1))
    bench.step()
    assert bench.started(request).cached_tokens == 6
    assert request.lease is not None
    assert bench.cache.stats().leased == len(request.lease.blocks)


def test_eviction_and_recomputation() -> None:
    """A prompt whose blocks were evicted is computed again, gives the same tokens, and is told why."""
    bench = Bench(blocks=12)
    first = bench.submit(prompt_of(30))
    bench.finish()
    bench.submit(prompt_of(40, seed=1))
    bench.finish()
    again = bench.submit(prompt_of(30))
    bench.finish()
    assert bench.started(again).reason is MissReason.EVICTED
    assert bench.output(again) == bench.output(first)


def test_longer_cached_prefix_goes_first_but_nobody_starves() -> None:
    """A warm request overtakes a cold one, at most PATIENCE times."""
    bench = Bench(max_running=1, max_batch_tokens=64)
    bench.submit(prompt_of(40))
    bench.finish()
    cold = bench.submit(prompt_of(40, seed=1))
    warm = [bench.submit(prompt_of(40) + [i]) for i in range(PATIENCE + 4)]
    bench.finish()
    order = sorted([cold, *warm], key=lambda request: request.admitted_at)
    assert order.index(cold) == PATIENCE


def test_deadlines_reach_every_state() -> None:
    """A deadline ends a request in the queue, in prefill, in decoding and when preempted."""
    bench = Bench(blocks=20, max_batch_tokens=8, max_running=2)
    decoding = bench.submit(prompt_of(4), max_tokens=70, deadline=10.5)
    prefilling = bench.submit(prompt_of(60, seed=1), deadline=3.5)
    queued = bench.submit(prompt_of(4, seed=2), deadline=2.5)
    for _ in range(12):
        bench.step()
    for request, where in ((decoding, "after 10 tokens"), (prefilling, "after 0 tokens"), (queued, "in the queue")):
        (event,) = [event for event in bench.events[request.id] if isinstance(event, Failed)]
        assert isinstance(event.error, DeadlineExceeded) and where in str(event.error)
    stats = bench.cache.stats()
    assert stats.leased == 0 and stats.free + stats.cached == stats.total
    bench = Bench(blocks=20)
    requests = [bench.submit(prompt_of(12, seed=i), max_tokens=40, deadline=30.0 + i) for i in range(4)]
    while not any(r.state is State.WAITING and r.started for r in requests):
        bench.step()
    bench.now = 100.0
    bench.step()
    assert bench.scheduler.idle and bench.cache.stats().leased == 0


def test_abort_is_idempotent_and_keeps_what_was_computed() -> None:
    """An aborted request leaves no lease behind, and its blocks can be matched."""
    bench = Bench(max_batch_tokens=16)
    request = bench.submit(prompt_of(40))
    bench.step()
    bench.step()
    bench.scheduler.abort(request, Unavailable("gone"))
    bench.scheduler.abort(request, Unavailable("gone"))
    assert len(bench.events[request.id]) == 2
    assert bench.cache.stats().leased == 0
    assert bench.scheduler.lookup(prompt_of(40), "").cached_tokens == 32


@pytest.mark.parametrize("steps", [2, 4])
def test_a_caller_who_has_enough(steps: int) -> None:
    """A request completed from outside is told what it would have been, counts as finished, and leaves nothing."""
    bench = Bench(max_batch_tokens=16)
    request = bench.submit(prompt_of(30), max_tokens=9)
    for _ in range(steps):
        bench.step()
    finished = bench.scheduler.complete(request, bench.now, steps - 1)
    assert bench.scheduler.complete(request, bench.now, steps - 1) == finished
    bench.scheduler.abort(request, Unavailable("too late"))
    assert (finished.reason, finished.usage.completion_tokens) == (FinishReason.STOP, steps - 1)
    assert (finished.usage.prompt_tokens, finished.timings.total) == (30, float(steps))
    totals = bench.scheduler.stats().totals
    assert (totals.finished, totals.aborted) == (1, 0)
    assert bench.scheduler.idle and bench.cache.stats().leased == 0
    assert not any(isinstance(event, Failed | Finished) for event in bench.events[request.id])


def test_ends() -> None:
    """An output ends at an end-of-sequence token, a stop token, max_tokens or the end of the pool."""
    bench = Bench(blocks=8)
    tokens = generate(prompt_of(8), 30, VOCAB)
    by_length = bench.submit(prompt_of(8), max_tokens=5)
    bench.finish()
    by_stop = bench.submit(prompt_of(8), max_tokens=9, params={"stop_token_ids": frozenset({tokens[3]})})
    bench.finish()
    by_pool = bench.submit(prompt_of(8), max_tokens=None)
    bench.finish()
    assert bench.finished(by_length).reason is FinishReason.LENGTH
    assert bench.finished(by_length).usage.completion_tokens == 5
    assert bench.finished(by_stop).reason is FinishReason.STOP
    assert bench.finished(by_stop).stop_token == tokens[3]
    assert bench.output(by_stop) == tokens[:3]
    assert bench.output(by_pool) == tokens[: 8 * SIZE + 1 - 8]
    bench = Bench(eos=frozenset({tokens[2]}))
    by_eos = bench.submit(prompt_of(8), max_tokens=9)
    ignoring = bench.submit(prompt_of(8), max_tokens=9, params={"ignore_eos": True})
    bench.finish()
    assert bench.output(by_eos) == tokens[:2]
    assert bench.output(ignoring) == tokens[:9]


def test_reading_and_storing_can_be_switched_off() -> None:
    """Without `store` nothing is left in the cache; without `read` nothing is reused."""
    bench = Bench()
    bench.submit(prompt_of(20), store=False)
    bench.finish()
    assert bench.cache.stats().free == 64
    bench.submit(prompt_of(20))
    bench.finish()
    bypassing = bench.submit(prompt_of(20), read=False)
    bench.finish()
    assert bench.started(bypassing).cached_tokens == 0
    assert bench.started(bypassing).reason is MissReason.BYPASSED
    assert bench.output(bypassing) == generate(prompt_of(20), 3, VOCAB)


def test_namespaces_share_nothing() -> None:
    """The same prompt in two namespaces is computed twice."""
    bench = Bench()
    bench.submit(prompt_of(20), namespace="a")
    other = bench.submit(prompt_of(20), namespace="b")
    bench.finish()
    assert bench.started(other).cached_tokens == 0


def test_prompts_that_can_never_be_served_are_refused() -> None:
    """Empty, longer than the model, longer than the pool: each says so."""
    bench = Bench(blocks=4, max_length=30)
    for prompt, message in (([], "empty"), ([1] * 30, "at most 29"), ([1] * 17, "block pool holds 16")):
        with pytest.raises(InvalidArgument, match=message):
            bench.scheduler.validate(prompt)
    with pytest.raises(InvalidArgument, match="max_batch_tokens"):
        Bench(max_batch_tokens=4, max_running=8)


def test_a_prompt_as_large_as_the_pool_is_served_again_and_again() -> None:
    """Also when its partly matching block would need one block more than there is."""
    bench = Bench(blocks=4)
    for _ in range(3):
        request = bench.submit(prompt_of(16), max_tokens=1)
        bench.finish()
        assert bench.output(request) == generate(prompt_of(16), 1, VOCAB)


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic(seed: int) -> None:
    """Many requests with common prefixes in a pool far too small, some aborted: all right, nothing leaks."""
    rng = random.Random(seed)
    bench = Bench(blocks=rng.randint(20, 40), max_batch_tokens=rng.choice([8, 16, 64]), max_running=rng.randint(1, 8))
    stems = [prompt_of(rng.randint(1, 40), seed=100 + i) for i in range(4)]
    expected = {}
    for _ in range(60):
        prompt = rng.choice(stems)[: rng.randint(1, 40)] + prompt_of(rng.randint(1, 12), rng.randint(0, 5))
        length = rng.randint(1, 20)
        space = rng.choice(["", "", "b"])
        request = bench.submit(
            prompt, length, namespace=space, read=rng.random() < 0.9, store=rng.random() < 0.9,
            deadline=bench.now + rng.randint(1, 200) if rng.random() < 0.2 else None,
        )  # fmt: skip
        expected[request] = generate(prompt, length, VOCAB)
        for _ in range(rng.randint(0, 4)):
            bench.step()
        if rng.random() < 0.2:
            bench.scheduler.abort(rng.choice(list(expected)))
        if rng.random() < 0.05:
            bench.cache.invalidate(rng.choice([None, "", "b"]))
            bench.cache.check()
    bench.finish()
    for request, tokens in expected.items():
        output = bench.output(request)
        last = bench.events[request.id][-1] if bench.events[request.id] else None
        if isinstance(last, Finished):
            room = bench.cache.total_blocks * SIZE + 1 - len(request.prompt)
            assert output == tokens[:room]
        else:
            assert output == tokens[: len(output)]
    stats = bench.cache.stats()
    assert stats.leased == 0 and stats.free + stats.cached == stats.total
    totals = bench.scheduler.stats().totals
    assert totals.finished + totals.aborted == 60
