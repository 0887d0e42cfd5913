"""The engine's thread: submitting, aborting, draining, dying."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from engine.loop import EngineLoop, StepRunner, clock
from engine.request import Event, Failed, Finished, Request, Sampled, SamplingParams
from engine.scheduler import Scheduler, Step
from prefixcache.cache import PrefixCache
from prefixcache.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from tests.engine.paper import PaperRunner, generate

VOCAB = 1000


class Listener:
    """Collects one request's events; `ended` is set by the last one."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()

    def __call__(self, event: Event) -> None:
        assert not self.ended.is_set(), "an event after the last one"
        self.events.append(event)
        if isinstance(event, Finished | Failed):
            self.ended.set()

    def output(self) -> list[int]:
        return [event.token for event in self.events if isinstance(event, Sampled)]


Engine = Callable[..., EngineLoop]


@pytest.fixture
def engine() -> Iterator[Engine]:
    """Makes started engines and stops them."""
    made: list[EngineLoop] = []

    def make(
        runner: StepRunner | None = None, blocks: int = 64, max_queue: int = 1000, on_death: Any = None
    ) -> EngineLoop:
        cache = PrefixCache(blocks, 4)
        scheduler = Scheduler(cache, max_length=500, max_batch_tokens=32, max_running=8, eos=frozenset())
        runner = runner or PaperRunner(blocks, 4, VOCAB)
        loop = EngineLoop(scheduler, runner, max_queue=max_queue, on_death=on_death or (lambda error: None))
        loop.start()
        made.append(loop)
        return loop

    yield make
    for loop in made:
        loop.stop()


def request(prompt: list[int], listener: Listener, max_tokens: int = 5, deadline: float | None = None) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    return Request("r", prompt, params, 0, listener, arrival=clock(), deadline=deadline)


class GatedRunner:
    """A runner that waits in every step until it is let on."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.failure: BaseException | None = None

    def run(self, step: Step) -> list[Sampled | None]:
        self.entered.set()
        assert self.gate.wait(10)
        if self.failure is not None:
            raise self.failure
        return [Sampled(1) if chunk.sample else None for chunk in step.chunks]


def test_a_request_is_served(engine: Engine) -> None:
    """Started, one Sampled per token, Finished; then the engine is idle again."""
    loop = engine()
    listener = Listener()
    loop.submit(request([1, 2, 3], listener))
    assert listener.ended.wait(10)
    assert listener.output() == generate([1, 2, 3], 5, VOCAB)
    assert isinstance(listener.events[-1], Finished)
    assert loop.idle()


def test_queue_full_says_when_to_retry(engine: Engine) -> None:
    """Beyond max_queue + max_running open requests, a submit is refused and nothing is queued."""
    runner = GatedRunner()
    loop = engine(runner, max_queue=2)
    listeners = [Listener() for _ in range(10)]
    for listener in listeners:
        loop.submit(request([1], listener))
    with pytest.raises(ResourceExhausted, match="queue is full") as refused:
        loop.submit(request([1], Listener()))
    assert refused.value.retry_after is not None and 0 < refused.value.retry_after <= 30
    runner.gate.set()
    assert all(listener.ended.wait(10) for listener in listeners)
    loop.submit(request([1], last := Listener()))
    assert last.ended.wait(10)


def test_abort_with_a_step_in_flight(engine: Engine) -> None:
    """Aborting while the model runs takes effect right after the step; no event follows."""
    runner = GatedRunner()
    loop = engine(runner)
    listener = Listener()
    running = request([1] * 20, listener, max_tokens=100)
    loop.submit(running)
    assert runner.entered.wait(10)
    loop.abort(running)
    loop.abort(running)
    runner.gate.set()
    stats = loop.call(lambda scheduler: scheduler.stats()).result(10)
    assert (stats.running, stats.cache.leased, stats.totals.aborted) == (0, 0, 1)
    assert loop.idle()
    assert not listener.ended.is_set()


def test_drain_refuses_new_and_finishes_old(engine: Engine) -> None:
    """After drain() accepted requests are served to the end and new ones are refused."""
    runner = GatedRunner()
    loop = engine(runner)
    loop.submit(request([1], listener := Listener()))
    loop.drain()
    with pytest.raises(Unavailable, match="shutting down"):
        loop.submit(request([1], Listener()))
    runner.gate.set()
    assert listener.ended.wait(10)
    assert isinstance(listener.events[-1], Finished)


def test_stop_fails_what_is_open(engine: Engine) -> None:
    """stop() tells every open request, and later calls are refused."""
    runner = GatedRunner()
    loop = engine(runner)
    listeners = [Listener() for _ in range(3)]
    for listener in listeners:
        loop.submit(request([1], listener, max_tokens=400))
    assert runner.entered.wait(10)
    stopper = threading.Thread(target=loop.stop)
    stopper.start()
    runner.gate.set()
    stopper.join(10)
    for listener in listeners:
        assert isinstance(listener.events[-1], Failed)
        assert isinstance(listener.events[-1].error, Unavailable)
    with pytest.raises(Unavailable):
        loop.call(lambda scheduler: None)


def test_death_tells_everyone(engine: Engine) -> None:
    """If a step raises, every open request fails with Unavailable, then on_death is called, then all is refused."""
    runner = GatedRunner()
    runner.failure = RuntimeError("device lost")
    deaths: list[BaseException] = []
    died = threading.Event()

    def on_death(error: BaseException) -> None:
        deaths.append(error)
        died.set()

    loop = engine(runner, on_death=on_death)
    listeners = [Listener() for _ in range(20)]
    for listener in listeners:
        loop.submit(request([1], listener))
    runner.gate.set()
    assert died.wait(10)
    assert deaths == [runner.failure]
    for listener in listeners:
        (event,) = [event for event in listener.events if isinstance(event, Failed)]
        assert "engine has failed" in str(event.error)
    with pytest.raises(Unavailable, match="engine has failed"):
        loop.submit(request([1], Listener()))


def test_a_deadline_passes_while_the_engine_is_busy(engine: Engine) -> None:
    """A queued request whose deadline passes during a step is told after it."""
    runner = GatedRunner()
    loop = engine(runner)
    loop.submit(request([1], Listener(), max_tokens=400))
    assert runner.entered.wait(10)
    late = Listener()
    loop.submit(request([2], late, deadline=clock() + 0.01))
    time.sleep(0.02)
    runner.gate.set()
    assert late.ended.wait(10)
    assert isinstance(late.events[-1], Failed)
    assert isinstance(late.events[-1].error, DeadlineExceeded)


def test_many_threads(engine: Engine) -> None:
    """Requests and aborts from several threads at once: every answer is right and nothing leaks."""
    loop = engine(blocks=40)

    def talk(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(30):
            prompt = [1, 2, 3, 4, 5] * rng.randint(1, 6) + [rng.randint(0, 3)] * rng.randint(0, 4)
            listener = Listener()
            mine = request(prompt, listener, rng.randint(1, 8))
            loop.submit(mine)
            if rng.random() < 0.3:
                time.sleep(rng.random() / 500)
                loop.abort(mine)
            else:
                assert listener.ended.wait(20)
                expected = generate(prompt, mine.params.max_tokens or 0, VOCAB)
                assert listener.output() == expected

    failures: list[BaseException] = []

    def guarded(seed: int) -> None:
        try:
            talk(seed)
        except BaseException as error:  # noqa: BLE001 - reported by the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures, failures
    loop.call(lambda scheduler: scheduler.cache.check()).result(10)
    stats = loop.call(lambda scheduler: scheduler.stats()).result(10)
    assert stats.cache.leased == 0
