"""The sacred test: whatever the cache did, greedy tokens are those of transformers' own `generate`.

Scheduler, cache, runner and real (tiny, random) models together, in float32, for every
architecture that `tests.engine.models` makes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch

from engine.kv import KVPool
from engine.model import LoadedModel, from_pretrained_model
from engine.request import Event, Failed, Request, Sampled, SamplingParams, Started
from engine.runner import Runner
from engine.scheduler import Scheduler
from prefixcache.cache import PrefixCache
from prefixcache.reasons import MissReason
from tests.engine import models

SIZE = 16
OUTPUT = 8
PREFIXES = (15, 16, 17, 31, 32, 33, 47)  # at, one below and one above the ends of blocks


class Reference:
    """transformers' own greedy continuation of a prompt, computed once per prompt."""

    def __init__(self, architecture: str) -> None:
        self._model: Any = models.build(architecture)
        self._made: dict[tuple[int, ...], list[int]] = {}

    def __call__(self, prompt: list[int], output: int = OUTPUT) -> list[int]:
        made = self._made.get(tuple(prompt), [])
        if len(made) < output:
            with torch.inference_mode():
                ids = self._model.generate(
                    torch.tensor([prompt]),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                    max_new_tokens=output,
                    min_new_tokens=output,
                    do_sample=False,
                )
            made = self._made[tuple(prompt)] = ids[0, len(prompt) :].tolist()
        return made[:output]


class Engine:
    """A real engine, stepped by the test itself."""

    def __init__(self, loaded: LoadedModel, blocks: int = 64, budget: int = 512) -> None:
        self.cache = PrefixCache(blocks, SIZE)
        pool = KVPool(loaded.geometry, blocks, SIZE)
        for tensor in [*pool.keys, *pool.values]:
            tensor.fill_(torch.nan)  # whoever reads what was never written gets caught
        self._runner = Runner(loaded, pool)
        self.scheduler = Scheduler(
            self.cache,
            max_length=loaded.max_length,
            max_batch_tokens=budget,
            max_running=8,
            eos=frozenset(),
        )
        self._names = count()
        self.events: dict[Request, list[Event]] = {}

    def submit(self, prompt: list[int], output: int = OUTPUT) -> Request:
        events: list[Event] = []
        bias = {models.EOS: -100.0}  # the reference cannot choose it either
        params = SamplingParams(max_tokens=output, logit_bias=bias)
        request = Request(f"r{next(self._names)}", prompt, params, 0, events.append)
        self.scheduler.validate(prompt)
        self.scheduler.submit(request)
        self.events[request] = events
        return request

    def finish(self) -> None:
        now = 0.0
        while (step := self.scheduler.schedule(now)) is not None:
            self.scheduler.commit(step, self._runner.run(step), now, 0.0)
            self.cache.check()
            now += 1.0
        assert self.scheduler.idle

    def answer(self, prompt: list[int], output: int = OUTPUT) -> list[int]:
        request = self.submit(prompt, output)
        self.finish()
        return self.tokens(request)

    def tokens(self, request: Request) -> list[int]:
        assert not any(isinstance(event, Failed) for event in self.events[request])
        return [event.token for event in self.events[request] if isinstance(event, Sampled)]

    def started(self, request: Request) -> Started:
        (event,) = [event for event in self.events[request] if isinstance(event, Started)]
        return event


Subject = tuple[Callable[..., Engine], Reference]


@pytest.fixture(scope="module", params=list(models.ARCHITECTURES))
def subject(request: pytest.FixtureRequest) -> Subject:
    """A maker of engines of one architecture, and its reference."""
    loaded = from_pretrained_model(models.build(request.param), request.param)
    return (lambda **options: Engine(loaded, **options)), Reference(request.param)


def tokens(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(256), k=length)


def test_warm_equals_cold_equals_reference(subject: Subject) -> None:
    """For prefixes around the ends of blocks: the same tokens cold, after the prefix alone, and repeated."""
    make, reference = subject
    for length in PREFIXES:
        engine = make()
        prefix = tokens(length, seed=length)
        prompt = prefix + tokens(9, seed=100 + length)
        assert engine.answer(prompt) == reference(prompt), f"cold, {length}"
        engine = make()
        engine.answer(prefix + tokens(5, seed=200 + length))
        warm = engine.submit(prompt)
        engine.finish()
        repeated = engine.submit(prompt)
        engine.finish()
        assert engine.started(warm).cached_tokens == length
        assert engine.started(repeated).cached_tokens == len(prompt) - 1
        assert engine.tokens(warm) == engine.tokens(repeated) == reference(prompt), f"warm, {length}"


def test_chunked_equals_unchunked(subject: Subject) -> None:
    """A prompt computed in chunks of 8 tokens, whose ends fall anywhere in blocks, gives the same tokens."""
    make, reference = subject
    prompt = tokens(75, seed=1)
    engine = make(budget=8)
    assert engine.answer(prompt) == reference(prompt)
    again = engine.submit(prompt)
    engine.finish()
    assert engine.started(again).cached_tokens == 74
    assert engine.tokens(again) == reference(prompt)


def test_in_company_equals_alone(subject: Subject) -> None:
    """In a ragged batch with related and unrelated prompts, every one gets the tokens it gets alone."""
    make, reference = subject
    engine = make(budget=64)
    system, other = tokens(40, seed=2), tokens(21, seed=3)
    prompts = [system + tokens(3 + i, seed=10 + i) for i in range(3)]
    prompts += [system[:24] + tokens(6, seed=20), other, other + tokens(2, seed=21), tokens(1, seed=22)]
    engine.answer(other)
    requests = [engine.submit(prompt) for prompt in prompts]
    engine.finish()
    for request, prompt in zip(requests, prompts, strict=True):
        assert engine.tokens(request) == reference(prompt)
    assert engine.started(requests[1]).cached_tokens == 32  # the third block was not whole anywhere yet
    assert engine.started(requests[4]).cached_tokens == 20


def test_after_preemption_and_eviction(subject: Subject) -> None:
    """In a pool far too small, preempted, evicted and recomputed requests give the same tokens."""
    make, reference = subject
    engine = make(blocks=8)
    prompts = [tokens(20 + 5 * i, seed=30 + i) for i in range(4)]
    requests = [engine.submit(prompt, output=24) for prompt in prompts]
    engine.finish()
    for request, prompt in zip(requests, prompts, strict=True):
        assert engine.tokens(request) == reference(prompt, 24)
    assert engine.scheduler.stats().totals.preempted > 0
    engine.answer(tokens(100, seed=40))
    evicted = engine.submit(prompts[0])
    engine.finish()
    assert engine.started(evicted).reason is MissReason.EVICTED
    assert engine.tokens(evicted) == reference(prompts[0])


def test_growing_chat(subject: Subject) -> None:
    """Turn by turn, each prompt is all before it; only what is new is computed."""
    make, reference = subject
    engine = make()
    history: list[int] = []
    for turn in range(4):
        history = history + tokens(7 + turn, seed=50 + turn)
        request = engine.submit(history)
        engine.finish()
        assert engine.tokens(request) == reference(history)
        expected = len(history) - (7 + turn) - 1 if turn else 0
        assert engine.started(request).cached_tokens == expected
        history = history + engine.tokens(request)
