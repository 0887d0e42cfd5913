"""The scheduler on a machine whose steps cost known seconds: streams keep their pace while prompts are prefilled."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import count

import pytest

from engine.pace import MIN_TOKENS, Load
from engine.request import Event, Request, Sampled, SamplingParams, State
from engine.scheduler import Scheduler, Step
from prefixcache.cache import PrefixCache
from tests.engine.machine import Machine, load_of
from tests.engine.paper import PaperRunner, generate

LIMIT = 0.25
SIZE = 16
MOST = 2048
LONG = 30_000


@dataclass
class Ran:
    """A step that was run."""

    step: Step
    load: Load
    seconds: float

    def tokens_of(self, request: Request) -> int:
        return sum(len(chunk.tokens) for chunk in self.step.chunks if chunk.request is request)


class Bench:
    """A scheduler beside a machine that computes nothing but the time; every sampled token is 1."""

    def __init__(self, machine: Machine | None = None, limit: float = LIMIT, blocks: int = 8000) -> None:
        self.machine = machine or Machine()
        self.cache = PrefixCache(blocks, SIZE)
        self.scheduler = Scheduler(
            self.cache,
            max_length=100_000,
            max_batch_tokens=MOST,
            max_running=16,
            eos=frozenset(),
            max_pause=limit,
        )
        self.events: dict[Request, list[Event]] = {}
        self._names = count()
        self._now = 0.0

    def submit(self, length: int, max_tokens: int = 10_000) -> Request:
        """A request with a prompt of its own."""
        name = next(self._names)
        events: list[Event] = []
        prompt = [1000 + name] * length
        request = Request(f"r{name}", prompt, SamplingParams(max_tokens=max_tokens), 0, events.append)
        self.events[request] = events
        self.scheduler.submit(request)
        return request

    def step(self) -> Ran:
        step = self.scheduler.schedule(self._now)
        assert step is not None
        load = load_of(step)
        assert load == step.load, "the scheduler counts what it plans"
        assert load.rows <= MOST
        seconds = self.machine.run(load)
        self._now += seconds
        sampled = [Sampled(1) if chunk.sample else None for chunk in step.chunks]
        self.scheduler.commit(step, sampled, self._now, seconds)
        return Ran(step, load, seconds)

    def prefill(self, request: Request) -> list[Ran]:
        """Step until a request has its first token."""
        ran: list[Ran] = []
        while request.first_token_at is None:
            ran.append(self.step())
        return ran

    def stream(self, number: int) -> list[Request]:
        """Requests that have begun to decode, and have done so for some steps."""
        requests = [self.submit(100 + i) for i in range(number)]
        for request in requests:
            self.prefill(request)
        for _ in range(10):
            self.step()
        return requests


def test_streams_keep_their_pace_while_a_long_prompt_is_prefilled() -> None:
    """Every step gives every stream a token within about the limit; prefill is nearly as fast as that permits."""
    bench = Bench()
    streams = bench.stream(8)
    before = [len(request.output) for request in streams]
    ran = bench.prefill(bench.submit(LONG))
    assert [len(request.output) - n for request, n in zip(streams, before, strict=True)] == [len(ran)] * 8
    assert max(step.seconds for step in ran) < 1.3 * LIMIT
    assert max(step.seconds for step in ran[3:]) < 1.05 * LIMIT
    rate = LONG / sum(step.seconds for step in ran)
    assert rate > 0.95 * bench.machine.rate(Load(stream_rows=8, stream_keys=8 * 170), 0, LONG, LIMIT)


def test_without_a_limit_they_wait() -> None:
    """What the limit is for: steps of several times as long."""
    bench = Bench(limit=0.0)
    bench.stream(8)
    ran = bench.prefill(bench.submit(LONG))
    assert max(step.seconds for step in ran) > 10 * LIMIT


def test_without_streams_steps_are_as_large_as_allowed() -> None:
    """Nobody waits for a token, so nothing is limited; a new one decoding limits the next step."""
    bench = Bench()
    bench.scheduler.abort(bench.stream(1)[0])
    first, second = bench.submit(10_000), bench.submit(10_000)
    ran = bench.prefill(first)
    assert [step.load.rows for step in ran] == [MOST] * len(ran)
    assert ran[-1].tokens_of(second) > 0
    after = bench.prefill(second)
    assert all(step.load.rows < MOST and step.seconds < 1.3 * LIMIT for step in after)


def test_full_steps_come_back_when_the_last_stream_ends() -> None:
    """The limit holds for exactly as long as somebody streams."""
    bench = Bench()
    (stream,) = bench.stream(1)
    prompt = bench.submit(LONG)
    for _ in range(10):
        assert bench.step().seconds < 1.3 * LIMIT
    bench.scheduler.abort(stream)
    assert bench.step().tokens_of(prompt) == MOST - prompt.computed % SIZE


def test_prompts_are_computed_in_order_of_admission() -> None:
    """Of two long prompts the second gets what the first leaves of a step, so none of most."""
    bench = Bench()
    bench.stream(4)
    first, second = bench.submit(8000), bench.submit(8000)
    for step in bench.prefill(first):
        if step.tokens_of(second):
            assert first.first_token_at is not None, "the first ended in this step"
    assert all(step.seconds < 1.3 * LIMIT for step in bench.prefill(second))


def test_short_prompts_share_a_step() -> None:
    """Prompts that fit below the limit together are admitted together; who does not fit waits uncounted."""
    limit = 0.1
    bench = Bench(limit=limit)
    bench.stream(4)
    bench.prefill(bench.submit(3000))
    requests = [bench.submit(400) for _ in range(10)]
    step = bench.step()
    admitted = [request for request in requests if request.state is not State.WAITING]
    assert 1 < len(admitted) < 10
    assert admitted == requests[: len(admitted)]
    assert all(request.passed_over == 0 for request in requests)
    assert 0.7 * limit < step.seconds < 1.1 * limit
    bench.prefill(requests[-1])
    assert all(request.first_token_at is not None for request in requests)


def test_nobody_is_admitted_for_less_than_a_block() -> None:
    """What is left of a step is not worth a chunk, unless a prompt ends in it."""
    bench = Bench()
    first, second = bench.submit(MOST - 8), bench.submit(100)
    assert bench.step().tokens_of(first) == MOST - 8
    assert second.state is State.WAITING and second.passed_over == 0
    bench = Bench()
    first, second = bench.submit(MOST - 8), bench.submit(8)
    step = bench.step()
    assert (step.tokens_of(first), step.tokens_of(second)) == (MOST - 8, 8)


def test_progress_wins_over_the_limit() -> None:
    """Where a row takes so long that no chunk keeps to the limit, a prompt still gets its least one in each step."""
    bench = Bench(Machine(row=0.01))
    bench.stream(8)
    ran = bench.prefill(bench.submit(320))
    assert [step.load.prompt_rows for step in ran] == [MIN_TOKENS] * 10


def test_chunks_end_with_blocks() -> None:
    """Whatever is computed of a prompt can be shared at once, but for its end."""
    bench = Bench()
    bench.stream(8)
    prompt = bench.submit(5005)
    while prompt.first_token_at is None:
        bench.step()
        assert prompt.computed % SIZE == 0 or prompt.first_token_at is not None
        assert bench.scheduler.lookup(prompt.prompt, "").cached_tokens >= prompt.computed // SIZE * SIZE - SIZE
    assert prompt.computed == 5005


def test_no_crumbs() -> None:
    """A prompt that is a little longer than a step does not leave a step of two tokens."""
    bench = Bench()
    prompt = bench.submit(MOST + 2)
    assert [step.tokens_of(prompt) for step in bench.prefill(prompt)] == [2016, 34]


@pytest.mark.parametrize("seed", range(6))
def test_tokens_do_not_depend_on_the_pace(seed: int) -> None:
    """Prompts cut anywhere by a noisy machine, in a small pool with preemptions, give the right tokens."""
    rng = random.Random(seed)
    vocab, size, blocks = 1000, 4, 90
    machine = Machine(step=0.01, row=1e-4, prompt_key=1e-6, noise=0.5)
    cache = PrefixCache(blocks, size)
    runner = PaperRunner(blocks, size, vocab)
    scheduler = Scheduler(
        cache, max_length=400, max_batch_tokens=128, max_running=6, eos=frozenset(), max_pause=0.02 if seed else 0.001
    )
    outputs: dict[Request, list[Event]] = {}
    cuts = 0

    def step() -> int:
        planned = scheduler.schedule(0.0)
        assert planned is not None
        assert planned.load.rows == load_of(planned).rows <= 128
        sampled = runner.run(planned)
        scheduler.commit(planned, sampled, 0.0, machine.run(planned.load))
        cache.check()
        return sum(not chunk.sample for chunk in planned.chunks)

    stem = [rng.randrange(vocab) for _ in range(150)]
    for number in range(30):
        prompt = stem[: rng.choice([0, 50, 150])] + [rng.randrange(vocab) for _ in range(rng.randint(1, 100))]
        events: list[Event] = []
        request = Request(f"r{number}", prompt, SamplingParams(max_tokens=rng.randint(1, 30)), 0, events.append)
        scheduler.submit(request)
        outputs[request] = events
        for _ in range(rng.randint(0, 6)):
            if not scheduler.idle:
                cuts += step()
    while not scheduler.idle:
        cuts += step()
    assert cuts > 10
    for request, events in outputs.items():
        tokens = [event.token for event in events if isinstance(event, Sampled)]
        assert tokens == generate(request.prompt, request.params.max_tokens or 0, vocab)
    stats = cache.stats()
    assert stats.leased == 0 and stats.free + stats.cached == stats.total
