"""Background requests: what is computed ahead of time waits for, and gives way to, whatever somebody waits for.

On a runner that checks every slot it reads (tests/engine/paper.py), beside a machine whose
steps cost known seconds (tests/engine/machine.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from engine.pace import BACKGROUND_SHARE, BACKGROUND_TOKENS
from engine.request import Event, Failed, Finished, Request, Sampled, SamplingParams, Started, State
from engine.scheduler import Scheduler
from prefixcache.cache import PrefixCache
from prefixcache.errors import DeadlineExceeded, FailedPrecondition, ResourceExhausted
from prefixcache.reasons import MissReason
from tests.engine.machine import Machine, load_of
from tests.engine.paper import PaperRunner, generate

VOCAB = 1000
SIZE = 4
PAUSE = 0.02


class Bench:
    """A scheduler, its cache, a paper runner and a clock, stepped by hand."""

    def __init__(
        self, blocks: int = 64, machine: Machine | None = None, size: int = SIZE, checked: bool = True, **changed: Any
    ) -> None:
        options: dict[str, Any] = {
            "max_length": 1000,
            "max_batch_tokens": 64,
            "max_running": 8,
            "eos": frozenset(),
            "max_pause": 0.25,
            "background_pause": PAUSE,
        } | changed
        self.machine = machine or Machine(step=0.001, row=1e-3)
        self.cache = PrefixCache(blocks, size)
        self.runner = PaperRunner(blocks, size, VOCAB)
        self._checked = checked
        self.scheduler = Scheduler(self.cache, **options)
        self.events: dict[Request, list[Event]] = {}
        self.seconds = 0.0
        self.now = 0.0
        self._names = count()

    def submit(self, prompt: list[int], max_tokens: int = 3, **options: Any) -> Request:
        events: list[Event] = []
        params = SamplingParams(max_tokens=max_tokens)
        name, arrival = f"r{next(self._names)}", options.pop("arrival", self.now)
        request = Request(name, prompt, params, 0, events.append, arrival=arrival, **options)
        self.events[request] = events
        self.scheduler.validate(prompt)
        self.scheduler.submit(request)
        return request

    def warm(self, prompt: list[int], **options: Any) -> Request:
        return self.submit(prompt, background=True, **options)

    def step(self) -> dict[Request, int]:
        """Run one step, of `seconds`; return how many tokens of whom it computed."""
        step = self.scheduler.schedule(self.now)
        if step is None:
            return {}
        assert step.load.rows == load_of(step).rows
        self.seconds = self.machine.run(step.load)
        self.now += self.seconds
        if self._checked:
            self.scheduler.commit(step, self.runner.run(step), self.now, self.seconds)
            self.cache.check()
        else:
            sampled = [Sampled(1) if chunk.sample else None for chunk in step.chunks]
            self.scheduler.commit(step, sampled, self.now, self.seconds)
        return {chunk.request: len(chunk.tokens) for chunk in step.chunks}

    def finish(self) -> None:
        while not self.scheduler.idle:
            assert self.step() or self.scheduler.idle, "nothing can be computed although requests are open"

    def finished(self, request: Request) -> Finished:
        event = self.events[request][-1]
        assert isinstance(event, Finished)
        return event

    def started(self, request: Request) -> Started:
        event = self.events[request][0]
        assert isinstance(event, Started)
        return event

    def output(self, request: Request) -> list[int]:
        return [event.token for event in self.events[request] if isinstance(event, Sampled)]

    def error(self, request: Request) -> str:
        event = self.events[request][-1]
        assert isinstance(event, Failed)
        return str(event.error)

    def nothing_held(self) -> bool:
        stats = self.cache.stats()
        return self.scheduler.idle and stats.leased == 0 and stats.free + stats.cached == stats.total


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 16, 50])
def test_all_of_the_prompt_is_computed_and_nothing_is_sampled(length: int) -> None:
    """It ends with a `Finished` of no tokens, and then the prompt is cached to its last token."""
    bench = Bench()
    request = bench.warm(prompt_of(length))
    bench.finish()
    started, finished = bench.events[request]
    assert isinstance(started, Started) and isinstance(finished, Finished)
    assert (finished.usage.prompt_tokens, finished.usage.cached_tokens) == (length, 0)
    assert finished.usage.completion_tokens == 0
    assert bench.runner.computed_tokens == length
    assert bench.scheduler.cached(prompt_of(length), "") == length
    assert bench.nothing_held()


def test_a_warmed_prompt_is_a_hit_to_the_last_token() -> None:
    """A live request for it computes its last token only, one that goes on only what is new, with the right tokens."""
    bench = Bench()
    bench.warm(prompt_of(40))
    bench.finish()
    same, longer = bench.submit(prompt_of(40)), bench.submit(prompt_of(40) + prompt_of(5, seed=1))
    bench.finish()
    assert [bench.started(request).cached_tokens for request in (same, longer)] == [39, 40]
    assert bench.output(same) == generate(prompt_of(40), 3, VOCAB)
    assert bench.output(longer) == generate(prompt_of(40) + prompt_of(5, seed=1), 3, VOCAB)


def test_what_is_cached_is_counted_to_the_last_token() -> None:
    """`cached` tells a prompt that is stored as a whole from one without its last token, which a lookup does not."""
    bench = Bench()
    bench.submit(prompt_of(15), max_tokens=1)
    bench.finish()
    assert bench.scheduler.cached(prompt_of(16), "") == bench.scheduler.lookup(prompt_of(16), "").cached_tokens == 15
    bench.warm(prompt_of(16))
    bench.finish()
    assert bench.scheduler.cached(prompt_of(16), "") == 16
    assert bench.scheduler.cached(prompt_of(16), "other") == 0


def test_background_requests_are_computed_one_at_a_time_in_order() -> None:
    """The second begins when the first has ended, so that no more than one holds blocks."""
    bench = Bench()
    requests = [bench.warm(prompt_of(50, seed=i)) for i in range(3)]
    order: list[Request] = []
    while not bench.scheduler.idle:
        (request,) = bench.step()
        if request not in order:
            order.append(request)
        assert sum(other.lease is not None for other in requests) <= 1
    assert order == requests


def test_a_live_prompt_goes_first() -> None:
    """While a live prompt is computed or waits, the background gets nothing; it goes on where it was."""
    bench = Bench(max_batch_tokens=8, blocks=100)
    background = bench.warm(prompt_of(80))
    bench.step()
    before = background.computed
    live = bench.submit(prompt_of(60, seed=1))
    while live.first_token_at is None:
        assert bench.step().keys() == {live}
    assert 0 < before == background.computed < 80
    bench.finish()
    assert bench.runner.computed_tokens == 80 + 60 + 2
    assert bench.started(background).cached_tokens == 0


def test_it_does_not_take_a_place_among_the_running() -> None:
    """With one place for live requests, a background request in progress leaves it to them."""
    bench = Bench(max_running=1, max_batch_tokens=4, blocks=100)
    background = bench.warm(prompt_of(80))
    bench.step()
    live = bench.submit(prompt_of(8, seed=1))
    assert bench.step().keys() == {live} and live.state is State.RUNNING
    assert background.state is State.RUNNING
    bench.finish()
    assert bench.finished(background).usage.computed_tokens == 80


def test_alone_its_steps_stay_below_the_limit() -> None:
    """So a live request that arrives waits no longer than that; and not much less is computed than fits."""
    machine = Machine()
    bench = Bench(blocks=1000, size=16, machine=machine, max_length=20_000, max_batch_tokens=2048)
    bench.warm(prompt_of(4000))
    steps: list[tuple[int, float]] = []
    while not bench.scheduler.idle:
        (tokens,) = bench.step().values()
        steps.append((tokens, bench.seconds))
    assert max(seconds for _, seconds in steps) < 1.15 * PAUSE
    assert sum(seconds for _, seconds in steps[10:-1]) / len(steps[10:-1]) > 0.75 * PAUSE
    assert all(tokens % 16 == 0 for tokens, _ in steps[8:-1]), "chunks end with blocks"


@pytest.mark.parametrize("machine", [Machine(step=0.003), Machine(step=0.03), Machine(row=0.004)])
def test_streams_are_slowed_down_by_a_share_at_most(machine: Machine) -> None:
    """They go on in every step, none of which is long, and taken together they lose no more; the background goes on."""
    bench = Bench(blocks=1000, size=16, machine=machine, max_length=20_000, max_batch_tokens=2048)
    streams = [bench.submit(prompt_of(100, seed=i), max_tokens=1000) for i in range(4)]
    while any(stream.first_token_at is None for stream in streams):
        bench.step()
    for _ in range(10):
        bench.step()
    alone = bench.seconds
    background = bench.warm(prompt_of(8000, seed=9))
    begin = bench.now
    for _ in range(200):
        computed = bench.step()
        assert all(computed[stream] == 1 for stream in streams)
        least = (alone + BACKGROUND_TOKENS * machine.row) * (1 + 1.5 * BACKGROUND_SHARE)
        assert bench.seconds < max(1.2 * PAUSE, least)
    assert 1 + BACKGROUND_SHARE / 2 < (bench.now - begin) / (200 * alone) < 1 + 1.5 * BACKGROUND_SHARE
    assert background.computed >= BACKGROUND_TOKENS * 5


def test_it_progresses_on_a_machine_that_is_too_slow_for_the_limit() -> None:
    """Where no chunk keeps to the limit, a few tokens are computed in as many steps as the streams' share allows."""
    bench = Bench(machine=Machine(row=0.1))
    stream = bench.submit(prompt_of(4), max_tokens=200)
    bench.step()
    background = bench.warm(prompt_of(40, seed=1))
    while background.state is not State.FINISHED:
        assert bench.step().get(background, 0) < 2 * BACKGROUND_TOKENS
    assert stream.state is State.RUNNING


def test_a_step_may_take_longer_if_it_does_anyway() -> None:
    """Where the weights alone take longer than the limit, a chunk takes a share of that, not next to nothing."""
    machine = Machine(step=0.5)
    bench = Bench(blocks=1000, size=16, machine=machine, max_length=20_000, max_batch_tokens=2048)
    bench.warm(prompt_of(12_000))
    steps = []
    while not bench.scheduler.idle:
        (tokens,) = bench.step().values()
        assert bench.seconds < 0.5 * (1 + 2 * BACKGROUND_SHARE)
        steps.append(tokens)
    assert max(steps) > 500 and len(steps) < 80


def _first_tokens(warming: bool) -> list[float]:
    """Seconds to the first token of requests that arrive at random, 13 per second, sorted; warming all the time or not.

    The machine is about what 6 layers x 256 are on two cores.
    """
    machine = Machine(step=0.003, row=110e-6, prompt_key=15e-9, stream_key=30e-9, noise=0.1)
    options = {"max_length": 20_000, "max_batch_tokens": 2048, "max_running": 64, "background_pause": 0.01}
    bench = Bench(blocks=20_000, size=16, machine=machine, checked=False, **options)
    bench.submit([1] * 1000, max_tokens=10)
    bench.finish()
    rng = random.Random(0)
    due = bench.now
    arrivals = [due := due + rng.expovariate(13) for _ in range(400)]
    requests: list[Request] = []
    prompts = count(10)
    while len(requests) < len(arrivals) or any(request.state is not State.FINISHED for request in requests[-50:]):
        while len(requests) < len(arrivals) and arrivals[len(requests)] <= bench.now:
            arrived = arrivals[len(requests)]
            requests.append(bench.submit([next(prompts)] * 128, max_tokens=8, arrival=arrived))
        if warming and bench.scheduler.stats().background < 2:
            bench.warm([next(prompts)] * 2000)
        if not bench.step():
            bench.now = arrivals[len(requests)]
    if warming:
        assert bench.scheduler.stats().totals.warmed_tokens > 1500 * bench.now, "warming goes on beside the traffic"
    return sorted((request.first_token_at or 0.0) - request.arrival for request in requests)


def test_live_requests_hardly_wait_for_it() -> None:
    """On a machine that is busy half of the time, the slowest in a hundred wait at most a fifth longer."""
    without, with_ = _first_tokens(warming=False), _first_tokens(warming=True)
    assert with_[-5] < 1.2 * without[-5]
    assert with_[200] < without[200] + 0.01


def test_before_anybody_is_served_it_takes_whole_steps() -> None:
    """A server that warms up before it serves has nobody to spare; afterwards it has."""
    bench = Bench(blocks=1000, size=16, machine=Machine(), max_length=20_000, max_batch_tokens=2048)
    bench.scheduler.hurry(True)
    background = bench.warm(prompt_of(10_000))
    assert bench.step() == bench.step() == {background: 2048}
    bench.scheduler.hurry(False)
    assert bench.step()[background] < 2048


def test_the_pace_of_live_requests_learns_from_the_background() -> None:
    """A long live prompt beside streams keeps to its own limit from its first step on."""
    machine = Machine()
    bench = Bench(blocks=2000, size=16, machine=machine, max_length=30_000, max_batch_tokens=2048)
    bench.warm(prompt_of(4000))
    bench.finish()
    bench.submit(prompt_of(100, seed=1), max_tokens=500)
    bench.step()
    live = bench.submit(prompt_of(8000, seed=2))
    while live.first_token_at is None:
        bench.step()
        assert bench.seconds < 1.15 * 0.25


def test_who_waits_for_its_blocks_promotes_it() -> None:
    """A live request for the same prefix makes it live until its end: it takes whole steps and goes before others."""
    bench = Bench(max_batch_tokens=16, blocks=200)
    background = bench.warm(prompt_of(100))
    bench.step()
    assert background.computed < 16
    live = bench.submit(prompt_of(100) + prompt_of(3, seed=1))
    other = bench.submit(prompt_of(60, seed=2))
    assert bench.step() == {background: 16}
    while background.state is State.RUNNING:
        assert bench.step().keys() & {background, other}
    bench.finish()
    assert bench.started(live).cached_tokens == 100
    assert bench.output(live) == generate(prompt_of(100) + prompt_of(3, seed=1), 3, VOCAB)
    assert bench.runner.computed_tokens == 100 + 3 + 60 + 4
    assert bench.finished(background).usage.completion_tokens == 0
    assert bench.nothing_held()


def test_a_promoted_one_and_a_live_prompt_that_is_cut_are_both_computed() -> None:
    """Two prompts that are partly computed share the steps, and both are right."""
    bench = Bench(max_batch_tokens=16, blocks=200)
    background = bench.warm(prompt_of(100))
    bench.step()
    cut = bench.submit(prompt_of(70, seed=1))
    bench.step()
    assert 0 < cut.computed < 70
    live = bench.submit(prompt_of(90) + prompt_of(5, seed=2))
    bench.finish()
    assert bench.output(cut) == generate(prompt_of(70, seed=1), 3, VOCAB)
    assert bench.output(live) == generate(prompt_of(90) + prompt_of(5, seed=2), 3, VOCAB)
    assert bench.started(live).cached_tokens == 88
    assert bench.finished(background).usage.prompt_tokens == 100


def test_who_only_shares_what_is_computed_already_does_not_promote_it() -> None:
    """A live request that takes another way behind the blocks which are there does not wait."""
    bench = Bench(max_batch_tokens=16, blocks=200)
    background = bench.warm(prompt_of(100))
    while background.computed < 40:
        bench.step()
    live = bench.submit(prompt_of(40)[:32] + prompt_of(20, seed=1))
    assert bench.step().keys() == {live}
    assert bench.started(live).cached_tokens == 32
    bench.finish()


def test_what_a_live_request_computes_is_waited_for() -> None:
    """A background request does not compute again what a live one is about to have computed, and lets others pass."""
    bench = Bench(max_batch_tokens=8, blocks=200)
    live = bench.submit(prompt_of(40), max_tokens=30)
    bench.step()
    background = bench.warm(prompt_of(40))
    other = bench.warm(prompt_of(10, seed=1))
    while live.first_token_at is None:
        bench.step()
    assert background.state is State.WAITING
    bench.finish()
    assert bench.started(background).cached_tokens == 39
    assert bench.finished(other).usage.computed_tokens == 10
    assert bench.runner.computed_tokens == 40 + 29 + 1 + 10


def test_its_blocks_count_as_available_for_an_admission() -> None:
    """A live prompt that does not fit beside it is admitted at once; what was computed stays cached if it can."""
    bench = Bench(blocks=20)
    background = bench.warm(prompt_of(60))
    while background.computed < 12:
        bench.step()
    live = bench.submit(prompt_of(40, seed=1), max_tokens=2)
    assert bench.step() == {live: 40}
    assert background.state is State.WAITING and background.lease is None
    bench.finish()
    assert bench.finished(background).usage.recomputed_tokens < 60
    assert bench.scheduler.cached(prompt_of(60), "") == 60
    totals = bench.scheduler.stats().totals
    assert (totals.preempted, totals.recomputed_tokens) == (0, 0), "the background counts apart"


def _holds_blocks(request: Request) -> bool:
    return request.lease is not None


def test_it_is_preempted_before_a_live_one() -> None:
    """When a stream needs a block and there is none, the background gives its blocks up, however young others are."""
    bench = Bench(blocks=35, machine=Machine(row=0.1))
    streams = [bench.submit(prompt_of(12, seed=i), max_tokens=30) for i in range(2)]
    bench.step()
    background = bench.warm(prompt_of(100, seed=2))
    while not background.computed:
        bench.step()
    while _holds_blocks(background):
        bench.step()
    assert background.state is State.WAITING and background.computed < 100
    assert [stream.state for stream in streams] == [State.RUNNING] * 2
    bench.finish()
    assert bench.scheduler.stats().totals.preempted == 0
    assert [bench.output(stream) for stream in streams] == [generate(prompt_of(12, seed=i), 30, VOCAB) for i in (0, 1)]
    assert bench.finished(background).usage.prompt_tokens == 100


def test_it_does_not_begin_while_a_live_request_waits_for_memory() -> None:
    """Otherwise it would take the blocks that the one waiting needs, again and again."""
    bench = Bench(blocks=16)
    hog = bench.submit(prompt_of(40), max_tokens=15)
    bench.step()
    waiting = bench.submit(prompt_of(40, seed=1))
    background = bench.warm(prompt_of(4, seed=2))
    while waiting.state is State.WAITING:
        assert background.started is None
        bench.step()
    assert hog.state is State.FINISHED
    bench.finish()
    assert bench.finished(background).usage.computed_tokens == 4


def test_it_leaves_running_requests_a_block_each() -> None:
    """A background prompt that fills the pool waits for streams to end instead of being preempted in the next step."""
    bench = Bench(blocks=16)
    stream = bench.submit(prompt_of(4), max_tokens=20)
    bench.step()
    background = bench.warm(prompt_of(60, seed=1))
    while stream.state is State.RUNNING:
        bench.step()
        assert background.started is None
    bench.finish()
    assert bench.scheduler.cached(prompt_of(60, seed=1), "") == 60


def test_one_that_can_never_begin_is_refused() -> None:
    """When nothing else runs and it still does not fit, since others hold blocks, it ends with a reason."""
    bench = Bench(blocks=16)
    lease = bench.cache.match(b"\0\0\0\0")
    bench.cache.allocate(lease, 10)
    refused = [bench.warm(prompt_of(40, seed=i)) for i in range(20)]
    fits = bench.warm(prompt_of(20))
    bench.finish()
    for request in refused:
        (event,) = bench.events[request]
        assert isinstance(event, Failed) and isinstance(event.error, ResourceExhausted)
    assert bench.finished(fits).usage.computed_tokens == 20
    lease.release()
    assert bench.nothing_held()


def test_an_invalidated_one_ends() -> None:
    """What is computed behind an invalidated prefix cannot be stored, so it is not computed."""
    bench = Bench()
    request = bench.warm(prompt_of(100))
    bench.step()
    bench.cache.invalidate()
    assert not bench.step()
    assert isinstance(bench.events[request][-1], Failed) and "invalidated" in bench.error(request)
    assert bench.nothing_held()
    assert bench.cache.stats().cached == 0
    event = bench.events[request][-1]
    assert isinstance(event, Failed) and isinstance(event.error, FailedPrecondition)


def _waiting(bench: Bench) -> Request:
    bench.submit(prompt_of(8, seed=1), max_tokens=50)
    request = bench.warm(prompt_of(60))
    assert request.state is State.WAITING
    return request


def _computing(bench: Bench) -> Request:
    request = bench.warm(prompt_of(60))
    bench.step()
    return request


def _preempted(bench: Bench) -> Request:
    request = _computing(bench)
    bench.submit(prompt_of(70, seed=1))
    bench.step()
    assert request.state is State.WAITING and request.started is not None
    return request


def _promoted(bench: Bench) -> Request:
    request = _computing(bench)
    bench.submit(prompt_of(60))
    bench.step()
    assert bench.scheduler.stats().running == 0 and bench.scheduler.stats().background == 1
    return request


STATES = [_waiting, _computing, _preempted, _promoted]


@pytest.mark.parametrize("reach", STATES)
def test_it_can_be_given_up_in_every_state(reach: Callable[[Bench], Request]) -> None:
    """Nothing is left of it but what is cached, the others go on, and it hears nothing more."""
    bench = Bench(blocks=20, max_batch_tokens=16)
    request = reach(bench)
    heard = len(bench.events[request])
    bench.scheduler.abort(request)
    bench.scheduler.abort(request)
    bench.cache.check()
    assert request not in bench.step()
    bench.finish()
    assert len(bench.events[request]) == heard
    assert bench.nothing_held()
    totals = bench.scheduler.stats().totals
    assert (totals.aborted, totals.warmed_prompts) == (0, 0)


@pytest.mark.parametrize("reach", STATES)
def test_its_deadline_holds_in_every_state(reach: Callable[[Bench], Request]) -> None:
    """It is told how far it came."""
    bench = Bench(blocks=20, max_batch_tokens=16)
    submit = bench.scheduler.submit

    def with_deadline(request: Request) -> None:
        request.deadline = 100.0 if request.background else None
        submit(request)

    bench.scheduler.submit = with_deadline  # type: ignore[method-assign]
    request = reach(bench)
    bench.now = 100.0
    bench.step()
    (event,) = [event for event in bench.events[request] if isinstance(event, Failed)]
    assert isinstance(event.error, DeadlineExceeded) and "of 60 tokens were computed" in str(event.error)
    bench.finish()
    assert bench.nothing_held()


def test_counters_of_live_traffic_hear_nothing_of_it() -> None:
    """Prompts and tokens that are warmed are counted apart: hit rates and miss reasons are those of callers."""
    bench = Bench()
    bench.warm(prompt_of(40))
    bench.finish()
    bench.warm(prompt_of(40) + prompt_of(10, seed=1))
    bench.finish()
    totals = bench.scheduler.stats().totals
    assert (totals.warmed_prompts, totals.warmed_tokens) == (2, 50)
    apart = replace(totals, steps=0, warmed_prompts=0, warmed_tokens=0)
    assert apart == type(totals)()
    bench.submit(prompt_of(40))
    bench.finish()
    totals = bench.scheduler.stats().totals
    assert (totals.admitted, totals.finished, totals.prompt_tokens, totals.cached_tokens) == (1, 1, 40, 39)
    assert totals.miss_reasons == {MissReason.NONE: 1}


def test_what_is_in_the_background_is_counted_apart() -> None:
    """Waiting and running are what callers wait for; the background is neither."""
    bench = Bench()
    bench.warm(prompt_of(100))
    bench.warm(prompt_of(100, seed=1))
    bench.step()
    stats = bench.scheduler.stats()
    assert (stats.waiting, stats.running, stats.background) == (0, 0, 2)
    assert bench.scheduler.waiting == 0 and not bench.scheduler.idle


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic(seed: int) -> None:
    """Live and background requests with common prefixes in a small pool, some given up: all right, nothing leaks."""
    rng = random.Random(seed)
    bench = Bench(
        blocks=rng.randint(20, 40),
        max_batch_tokens=rng.choice([8, 16, 64]),
        max_running=rng.randint(1, 8),
        machine=Machine(step=1e-3, row=rng.choice([1e-5, 1e-3]), noise=0.5),
    )
    stems = [prompt_of(rng.randint(1, 40), seed=100 + i) for i in range(4)]
    live: dict[Request, list[int]] = {}
    background: list[Request] = []
    for _ in range(80):
        prompt = rng.choice(stems)[: rng.randint(1, 40)] + prompt_of(rng.randint(1, 12), rng.randint(0, 5))
        options = {
            "namespace": rng.choice(["", "", "b"]),
            "deadline": bench.now + rng.random() if rng.random() < 0.2 else None,
        }
        if rng.random() < 0.5:
            background.append(bench.warm(prompt, **options))
        else:
            length = rng.randint(1, 20)
            request = bench.submit(prompt, length, read=rng.random() < 0.9, store=rng.random() < 0.9, **options)
            live[request] = generate(prompt, length, VOCAB)
        for _ in range(rng.randint(0, 6)):
            bench.step()
        if rng.random() < 0.2:
            bench.scheduler.abort(rng.choice([*live, *background]))
        if rng.random() < 0.05:
            bench.cache.invalidate(rng.choice([None, "", "b"]))
            bench.cache.check()
    bench.finish()
    assert bench.nothing_held()
    for request, tokens in live.items():
        output = bench.output(request)
        whole = bench.events[request] and isinstance(bench.events[request][-1], Finished)
        room = bench.cache.total_blocks * SIZE + 1 - len(request.prompt)
        assert output == (tokens[:room] if whole else tokens[: len(output)])
    ends = [bench.events[request][-1] for request in background if bench.events[request]]
    done = [event for event in ends if isinstance(event, Finished)]
    assert len(done) == bench.scheduler.stats().totals.warmed_prompts > 5
    assert all(event.usage.completion_tokens == 0 for event in done)
    totals = bench.scheduler.stats().totals
    assert totals.finished + totals.aborted == len(live)
