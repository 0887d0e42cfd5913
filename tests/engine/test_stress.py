"""Three hundred calls at once against a pool far too small, with cancellations and deadlines in every state."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

from engine.request import Sampled
from engine.scheduler import Step
from prefixcache.client import AsyncClient
from prefixcache.errors import Cancelled, DeadlineExceeded, PrefixCacheError
from tests.engine.paper import PaperRunner, generate
from tests.engine.serving import BLOCK, PaperEngine, RunningServer

CALLS = 300
VOCAB = 256  # what the paper runner says


def prompt_for(rng: random.Random) -> list[int]:
    """A prompt that shares its beginning with many others, some of them whole."""
    stem = random.Random(rng.randint(0, 5)).choices(range(200), k=rng.choice([0, 40, 100, 300]))
    return stem + rng.choices(range(3), k=rng.randint(1, 40))


async def call(client: AsyncClient, seed: int) -> str:
    """Make one call, perhaps leaving early; returns how it ended. A wrong answer fails the test."""
    rng = random.Random(seed)
    prompt, length = prompt_for(rng), rng.randint(1, 60)
    await asyncio.sleep(rng.random() / 4)
    manner = rng.choice(["stay", "stay", "leave", "leave", "deadline"])
    timeout = rng.random() / 2 if manner == "deadline" else None
    stream = client.stream(prompt, max_tokens=length, timeout=timeout, ignore_eos=True)
    leaving = None
    if manner == "leave":  # anywhere from before it is sent to after it has ended
        leaving = asyncio.get_running_loop().call_later(rng.random(), lambda: asyncio.ensure_future(stream.close()))
    try:
        completion = await stream.result()
    except Cancelled:
        return "Cancelled" if manner == "leave" else "Cancelled without being asked to"
    except DeadlineExceeded:
        return "DeadlineExceeded" if manner == "deadline" else "DeadlineExceeded without a deadline"
    finally:
        if leaving is not None:
            leaving.cancel()
    assert completion.token_ids == generate(prompt, length, VOCAB)
    assert completion.usage.cached_tokens + completion.usage.computed_tokens == len(prompt)
    return "finished"


async def storm(address: str) -> Counter[str]:
    async with AsyncClient(address) as client:
        ends = await asyncio.gather(*(call(client, seed) for seed in range(CALLS)), return_exceptions=True)
    for end in ends:
        if isinstance(end, BaseException) and not isinstance(end, PrefixCacheError):
            raise end
    return Counter(end if isinstance(end, str) else type(end).__name__ for end in ends)


class SlowRunner(PaperRunner):
    """Takes its time, so that calls pile up and deadlines pass in every state."""

    def run(self, step: Step) -> list[Sampled | None]:
        time.sleep(0.003)
        return super().run(step)


def test_storm() -> None:
    """Every call ends with the right answer or the status it asked for; afterwards nothing is held."""
    engine = PaperEngine(blocks=40, max_running=16, runner=SlowRunner(40, BLOCK, VOCAB))
    with RunningServer(engine, max_queue=CALLS) as server:
        ends = asyncio.run(storm(server.address))
        server.wait_until_idle()
        stats = server.stats()
        server.check()
    assert ends.keys() <= {"finished", "Cancelled", "DeadlineExceeded"}, ends
    assert min(ends["finished"], ends["Cancelled"], ends["DeadlineExceeded"]) > 0, ends
    assert stats.totals.preempted > 0
    assert stats.totals.finished + stats.totals.aborted <= CALLS
    assert (stats.waiting, stats.running, stats.cache.leased) == (0, 0, 0)
    assert stats.cache.free + stats.cache.cached == stats.cache.total


def test_storm_on_the_real_engine() -> None:
    """The same with a model: calls that finish give the tokens that they give one by one."""

    async def together(address: str) -> list[list[int] | str]:
        async def one(client: AsyncClient, seed: int) -> list[int] | str:
            rng = random.Random(seed)
            timeout = rng.random() if rng.random() < 0.3 else None
            try:
                prompt = prompt_for(rng)
                return (await client.generate(prompt, max_tokens=8, ignore_eos=True, timeout=timeout)).token_ids
            except DeadlineExceeded:
                return "deadline"

        async with AsyncClient(address) as client:
            return list(await asyncio.gather(*(one(client, seed) for seed in range(60))))

    async def one_by_one(address: str) -> list[list[int]]:
        async with AsyncClient(address) as client:
            answers = []
            for seed in range(60):
                rng = random.Random(seed)
                rng.random() if rng.random() < 0.3 else None
                completion = await client.generate(
                    prompt_for(rng), max_tokens=8, ignore_eos=True, read_cache=False, store_cache=False
                )
                answers.append(completion.token_ids)
            return answers

    block = 16 * 4 * 2 * 4 * 64 * 4  # bytes: 16 tokens, 4 layers, keys and values of 4 heads, 64 numbers in float32
    with RunningServer(model="embedded", cache_memory=str(40 * block), max_running=16) as server:
        storm = asyncio.run(together(server.address))
        server.wait_until_idle()
        server.check()
        stats = server.stats()
        calm = asyncio.run(one_by_one(server.address))
    finished = [(a, b) for a, b in zip(storm, calm, strict=True) if a != "deadline"]
    assert len(finished) > 20
    assert all(a == b for a, b in finished)
    assert stats.cache.leased == 0
    assert stats.cache.total == 40
