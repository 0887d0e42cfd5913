"""Warm over real gRPC: what is confirmed is cached, one bad prompt costs only itself, and nobody is kept waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import pytest

from engine.cache_service import WARMED_AT_ONCE
from engine.pace import BACKGROUND_TOKENS
from engine.request import Request, SamplingParams
from engine.scheduler import Scheduler
from engine.tenants import ANONYMOUS, namespace_key
from engine.warming import _missing
from prefixcache.cache import PrefixCache
from prefixcache.client import AsyncClient, Client
from prefixcache.errors import Cancelled, DeadlineExceeded, ResourceExhausted, Unavailable
from prefixcache.terms import Terms
from prefixcache.v1 import cache_pb2, prompt_pb2
from prefixcache.warming import Warmed, WarmPrompt
from tests.engine.paper import PaperRunner, generate
from tests.engine.serving import BLOCK, PAPER_LENGTH, GatedRunner, PaperEngine, RunningServer
from tests.engine.tenancy import entry, write

WARM = "/prefixcache.v1.CacheService/Warm"


@pytest.fixture(scope="module")
def paper() -> Iterator[RunningServer]:
    """One server that computes on paper; every test uses prompts of its own."""
    with RunningServer(PaperEngine()) as server:
        yield server


@pytest.fixture
def client(paper: RunningServer) -> Iterator[Client]:
    with Client(paper.address) as client:
        yield client


_NUMBERS = count()


def fresh(length: int = 40) -> list[int]:
    """A prompt that no other begins like."""
    number = next(_NUMBERS)
    return [number % 250, number // 250, *(position % 250 for position in range(length))][:length]


def by_id(warming: Iterator[Warmed]) -> dict[str, Warmed]:
    return {warmed.id: warmed for warmed in warming}


# What it answers


@pytest.mark.parametrize("length", [2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 300])
def test_a_warmed_prompt_computes_one_token_when_it_comes(client: Client, length: int) -> None:
    """Warm, then Generate: all but the last token, which is always computed, is cached, and the tokens are right."""
    prompt = fresh(length)
    (warmed,) = client.warm([prompt], timeout=10)
    assert warmed == Warmed("0", "computed", length, 0, length)
    completion = client.generate(prompt, max_tokens=5, timeout=10)
    assert completion.usage.cached_tokens == length - 1
    assert completion.token_ids == generate(prompt, 5, 256)


def test_a_prompt_that_begins_with_a_warmed_one_computes_the_rest(client: Client) -> None:
    """Also the last token of what was warmed is cached."""
    prefix = fresh(3 * BLOCK)
    list(client.warm([prefix], timeout=10))
    assert client.generate([*prefix, 7, 8, 9], max_tokens=1, timeout=10).usage.cached_tokens == 3 * BLOCK


def test_the_same_again_costs_nothing(paper: RunningServer, client: Client) -> None:
    """A call that is made again computes what is not cached yet, and says so of each prompt."""
    prompts = [fresh(), fresh(BLOCK), fresh(1), fresh(100)]
    first = by_id(client.warm(prompts[:2], timeout=10))
    assert {warmed.state for warmed in first.values()} == {"computed"}
    computed = paper.stats().totals.warmed_tokens
    again = by_id(client.warm(prompts, timeout=10))
    assert [again[str(i)].state for i in range(4)] == ["cached", "cached", "computed", "computed"]
    assert (again["0"].cached_tokens, again["0"].computed_tokens) == (40, 0)
    assert paper.stats().totals.warmed_tokens - computed == 1 + 100


def test_every_form_of_a_prompt(client: Client) -> None:
    """Text, token ids and messages with tools; each is found by a request of the same form, in its namespace."""
    turns = [{"role": "system", "content": "Be warm."}]
    tools = [{"name": "look"}]
    prompts: list[Any] = [
        "warmed text",
        {"prompt": fresh(), "id": "ids", "namespace": "warm"},
        {"prompt": turns, "tools": tools, "id": "chat", "add_generation_prompt": False},
    ]
    results = by_id(client.warm(prompts, namespace="text", timeout=10))
    assert results.keys() == {"0", "ids", "chat"}
    assert all(warmed.state == "computed" for warmed in results.values())
    assert client.lookup("warmed text", namespace="text").miss_reason == "none"
    assert client.lookup("warmed text").cached_tokens == 0
    assert client.lookup(prompts[1]["prompt"], namespace="warm").miss_reason == "none"
    asked = [*turns, {"role": "user", "content": "Are you?"}]
    found = client.generate(asked, tools=tools, namespace="text", max_tokens=1, timeout=10)
    assert found.usage.cached_tokens == results["chat"].prompt_tokens


def test_one_bad_prompt_does_not_end_the_stream(client: Client) -> None:
    """Each is answered with what is wrong with it, the others are warmed, and what can be told is told."""
    long = {"prompt": [1] * PAPER_LENGTH, "id": "long"}
    bad: list[Any] = [
        long,
        "",
        [],
        [999_999],
        "half a character: \ud800",
        {"prompt": "x", "tools": [{"name": "look"}]},
        {"prompt": "x", "id": "i" * 129},
        {"prompt": "x", "namespace": "n" * 257},
        {"prompt": "x", "priority": 101},
        {"prompt": "x", "priority": -1},
        {"prompt": "x", "ttl": 0.0},
        {"prompt": "x", "session_id": "s" * 300},
    ]
    results = by_id(client.warm([fresh(), *bad, fresh()], timeout=10))
    expected = {
        "long": "1999", "2": "empty", "3": "empty", "4": "vocabulary", "5": "cannot be sent", "6": "belong to messages",
        "7": "128 bytes", "8": "256 bytes", "9": "priority", "10": "cannot be sent", "11": "ttl", "12": "session_id",
    }  # fmt: skip
    for name, reason in expected.items():
        assert results[name].state == "failed" and reason in results[name].error, (name, results[name])
    assert results["0"].state == results["13"].state == "computed"
    assert len(results) == 14


def test_a_prompt_that_does_not_fit_into_the_pool_fails() -> None:
    """It could never be cached."""
    with RunningServer(PaperEngine(blocks=8)) as server, Client(server.address) as client:
        results = by_id(client.warm([fresh(9 * BLOCK), fresh(4 * BLOCK)], timeout=10))
        failed = results["0"]
        assert failed.state == "failed" and "the block pool holds" in failed.error
        assert (failed.prompt_tokens, failed.computed_tokens) == (9 * BLOCK, None)
        assert results["1"].state == "computed"


def test_an_empty_stream_is_answered_by_an_empty_stream(client: Client) -> None:
    """There is nothing to say."""
    assert list(client.warm([], timeout=10)) == []


def test_a_message_that_cannot_be_read_ends_the_call(paper: RunningServer) -> None:
    """Bytes that are no WarmRequest are the client's mistake, not a prompt's."""
    with grpc.insecure_channel(paper.address) as channel:
        call: Any = channel.stream_stream(WARM)
        with pytest.raises(grpc.RpcError) as caught:
            list(call(iter([b"\x0a\xff"]), timeout=10))
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    paper.wait_until_idle()


def test_nothing_asked_for_is_nothing_missed(paper: RunningServer, client: Client) -> None:
    """Warming leaves the counters of requests alone."""
    before = paper.stats().totals
    list(client.warm([fresh(), fresh()], timeout=10))
    after = paper.stats().totals
    assert (after.admitted, after.finished, after.prompt_tokens) == (
        before.admitted, before.finished, before.prompt_tokens,
    )  # fmt: skip
    assert after.miss_reasons == before.miss_reasons
    assert after.warmed_prompts == before.warmed_prompts + 2


# How it is kept


def test_terms_hold_for_what_is_warmed_and_for_what_was_cached(paper: RunningServer, client: Client) -> None:
    """The time to live of a prompt counts also if it was computed before; a longer one replaces a shorter."""
    prompt = fresh()
    list(client.warm([{"prompt": prompt, "ttl": 3600.0}], timeout=10))

    def expired_in(seconds: float) -> int:
        def look(scheduler: Scheduler) -> int:
            cache = scheduler.cache
            cache.tick(cache.now + seconds)
            return scheduler.cached(prompt, namespace_key(ANONYMOUS, ""))

        return paper.server.front.engine.loop.call(look).result(10)

    assert expired_in(0) == 40
    (again,) = client.warm([prompt], ttl=7200.0, timeout=10)
    assert again.state == "cached"
    assert expired_in(3601) == 40
    assert expired_in(7201) == 0


def test_what_has_the_higher_priority_is_evicted_last() -> None:
    """Prompts that were warmed with a priority stay when others need the room."""
    with RunningServer(PaperEngine(blocks=12)) as server, Client(server.address) as client:
        dear, cheap = fresh(4 * BLOCK), fresh(4 * BLOCK)
        list(client.warm([{"prompt": dear, "priority": 90}], timeout=10))
        list(client.warm([cheap], timeout=10))
        client.generate(fresh(6 * BLOCK), max_tokens=1, timeout=10)
        assert client.lookup(dear).miss_reason == "none"
        assert client.lookup(cheap).cached_tokens < 4 * BLOCK - 1


# What cannot be confirmed


def test_more_than_a_tenant_may_have_cached_is_not_confirmed(paper: RunningServer, client: Client) -> None:
    """It has been computed, but not all of it is kept: that is a failure, with the limit as the reason."""
    loop = paper.server.front.engine.loop
    loop.call(lambda scheduler: scheduler.cache.limit(ANONYMOUS, 4)).result(10)
    try:
        # One after the other: the large one takes the small one's room, perhaps before that is confirmed.
        (small,), (large,) = (list(client.warm([fresh(blocks * BLOCK)], timeout=10)) for blocks in (2, 10))
        assert small.state == "computed"
        assert large.state == "failed" and "you may have 4 blocks" in large.error
        assert large.computed_tokens == 10 * BLOCK
    finally:
        loop.call(lambda scheduler: scheduler.cache.limit(ANONYMOUS, None)).result(10)


def test_a_prompt_that_is_invalidated_while_it_is_computed_is_not_confirmed() -> None:
    """It ends at once, since nothing of it could be kept."""
    runner = GatedRunner()
    with RunningServer(PaperEngine(runner=runner)) as server, runner, Client(server.address) as client:
        warming = client.warm([fresh(1000)], timeout=10)
        server.wait_until_warming(1)
        invalidating = server.server.front.engine.loop.call(lambda scheduler: scheduler.cache.invalidate())
        runner.open()
        assert invalidating.result(10) == (0, 0)
        (warmed,) = warming
        assert warmed.state == "failed" and "invalidated" in warmed.error
        server.wait_until_idle()
        assert server.stats().cache.leased == 0


def _scheduler(cache: PrefixCache) -> Scheduler:
    return Scheduler(cache, max_length=1000, max_batch_tokens=64, max_running=4, eos=frozenset())


@pytest.mark.parametrize(
    ("lose", "reason"),
    [
        (lambda cache: cache.evict(2), "others took its room"),
        (lambda cache: cache.invalidate(), "it was invalidated"),
        (lambda cache: cache.tick(cache.now + 61), "its time to live was over"),
    ],
)
def test_what_is_lost_before_it_is_confirmed_is_explained(lose: Any, reason: str) -> None:
    """A prompt that was computed and is gone already is not said to be warm."""
    cache = PrefixCache(16, 4)
    scheduler, runner = _scheduler(cache), PaperRunner(16, 4, 256)
    key = namespace_key(ANONYMOUS, "")
    prompt = list(range(20))
    request = Request("r", prompt, SamplingParams(), 0, lambda _: None, key, background=True, terms=Terms(ttl=60.0))
    scheduler.submit(request)
    while (step := scheduler.schedule(cache.now)) is not None:
        scheduler.commit(step, runner.run(step), cache.now, 0.01)
    assert _missing(scheduler, prompt, key) == ""
    lose(cache)
    assert reason in _missing(scheduler, prompt, key)


# Whoever sends, waits or leaves


def test_prompts_are_read_as_they_are_done() -> None:
    """However many are sent, only a few are in progress; the rest waits on its way."""
    runner, sent = GatedRunner(), count()

    def endless() -> Iterator[list[int]]:
        while True:
            next(sent)
            yield fresh(1900)

    with RunningServer(PaperEngine(runner=runner)) as server, runner, Client(server.address) as client:
        with client.warm(endless()) as warming:
            for _ in range(5):
                assert server.server.front.engine.loop.background <= WARMED_AT_ONCE
                runner.permits.release(1900 // BACKGROUND_TOKENS)  # more steps than one prompt takes
                assert next(warming).state == "computed"
        assert next(sent) < 500, "what a stream buffers is a few dozen of such prompts"
        runner.open()
        server.wait_until_idle()


def test_answers_come_while_the_next_prompt_is_awaited(client: Client) -> None:
    """A slow producer sees what became of each prompt before it sends the next."""
    done = threading.Event()

    def slowly() -> Iterator[list[int]]:
        for _ in range(3):
            yield fresh()
            assert done.wait(10)
            done.clear()

    for number, warmed in enumerate(client.warm(slowly(), timeout=10)):
        assert warmed.id == str(number)
        done.set()


def test_what_is_queued_for_a_client_that_leaves_is_dropped() -> None:
    """Nothing is computed for nobody, and no block is held."""
    runner = GatedRunner()
    with RunningServer(PaperEngine(runner=runner)) as server, runner, Client(server.address) as client:
        with client.warm([fresh(500) for _ in range(10)]) as warming:
            server.wait_until_warming(1)
        server.wait_until_idle(each=runner.permits.release)  # step by step
        assert runner.computed_tokens < 1000
        assert server.stats().cache.leased == 0
        with pytest.raises(Cancelled):
            next(warming)


def test_a_deadline_ends_the_call() -> None:
    """Whatever is not done by then is dropped."""
    runner = GatedRunner()
    with RunningServer(PaperEngine(runner=runner)) as server, runner, Client(server.address) as client:
        with pytest.raises(DeadlineExceeded):
            list(client.warm([fresh(500), fresh(500)], timeout=0.3))
        runner.open()
        server.wait_until_idle()
        assert server.stats().cache.leased == 0


def test_requests_go_first() -> None:
    """A request that comes while a long prompt is warmed is in the next step, and the prompt is not."""
    runner = GatedRunner()
    with RunningServer(PaperEngine(runner=runner)) as server, runner, Client(server.address) as client:
        warming = client.warm([fresh(1000)], timeout=10)
        server.wait_until_warming(1)
        live = client.stream(fresh(100), max_tokens=1)
        server.wait_until_active()
        runner.permits.release(2)  # the step that was under way, and the next
        assert live.result().usage.cached_tokens == 0
        assert runner.computed_tokens < 1000
        runner.open()
        assert next(warming).state == "computed"


def test_a_request_for_what_is_being_warmed_takes_it_over() -> None:
    """It waits for the blocks instead of computing them again, and they come at full speed."""
    runner = GatedRunner()
    prompt = fresh(1000)
    with RunningServer(PaperEngine(runner=runner)) as server, runner, Client(server.address) as client:
        warming = client.warm([prompt], timeout=10)
        server.wait_until_warming(1)
        live = client.stream([*prompt, 1, 2, 3], max_tokens=1)
        server.wait_until_active()
        runner.open()
        assert live.result().token_ids == generate([*prompt, 1, 2, 3], 1, 256)
        assert next(warming).state == "computed"
        assert runner.computed_tokens == 1003


def test_warming_takes_nobodys_place_in_the_queue() -> None:
    """However much is being warmed, as many requests may wait as before."""
    runner = GatedRunner()
    engine = PaperEngine(max_running=1, runner=runner)
    with RunningServer(engine, max_queue=1) as server, runner, Client(server.address) as client:
        warming = client.warm([fresh(500) for _ in range(8)])
        server.wait_until_warming(1)
        streams = [client.stream(fresh(), max_tokens=1) for _ in range(2)]
        server.wait_until_active(2)
        with pytest.raises(ResourceExhausted, match="2 requests are waiting or running"):
            client.generate(fresh(), max_tokens=1, timeout=10)
        runner.open()
        for stream in streams:
            stream.result()
        warming.close()


def test_a_server_that_stops_ends_the_call() -> None:
    """The client hears that it is going, not that the prompts were bad."""
    runner = GatedRunner()
    with RunningServer(PaperEngine(runner=runner)) as server, runner, Client(server.address) as client:
        warming = client.warm([fresh(500) for _ in range(10)])
        server.wait_until_warming(1)
        assert server.drain(0.0) is True, "warming keeps no server from going down"
        stopping = asyncio.run_coroutine_threadsafe(server.server.stop(), server.loop)
        server.wait_until_stopping()
        runner.open()
        with pytest.raises(Unavailable):
            list(warming)
        stopping.result(30)


# Tenants


def test_tokens_that_are_warmed_count_towards_the_tokens_per_minute(tmp_path: Path) -> None:
    """A tenant that has used them up is told so for each prompt, and when it may go on."""
    tenants = write(tmp_path / "tenants.toml", entry("one", tokens_per_minute="100"))
    with RunningServer(PaperEngine(), tenants=tenants) as server, Client(server.address, token="one") as client:
        first, second = fresh(150), fresh(50)

        def one_after_the_other() -> Iterator[list[int]]:
            yield first
            assert done.wait(10)
            yield second

        done = threading.Event()
        warming = client.warm(one_after_the_other(), timeout=10)
        assert next(warming).state == "computed"
        done.set()
        refused = next(warming)
        assert refused.state == "failed" and "100 computed tokens per minute" in refused.error
        with pytest.raises(ResourceExhausted):
            list(client.warm([second], timeout=10))


# The client


def test_what_an_iterator_raises_is_raised_to_the_caller(client: Client) -> None:
    """After what was sent before has been answered."""

    def broken() -> Iterator[list[int]]:
        yield fresh()
        raise OSError("the disk is gone")

    warming = client.warm(broken(), timeout=10)
    assert next(warming).state == "computed"
    with pytest.raises(OSError, match="the disk is gone"):
        next(warming)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("one prompt", "put it into a list"),
        ({"prompt": "one prompt"}, "put it into a list"),
        ([{"promt": "x"}], "no key 'promt'"),
        ([{"id": "x"}], "no prompt without 'prompt'"),
        ([5], "a int is no prompt"),
    ],
)
def test_what_is_no_list_of_prompts_is_a_mistake_in_the_program(client: Client, prompts: Any, message: str) -> None:
    """Not an error of the service."""
    with pytest.raises(TypeError, match=message):
        list(client.warm(prompts, timeout=10))


def test_an_unknown_option_is_a_mistake_in_the_program(client: Client) -> None:
    """It would have been ignored."""
    with pytest.raises(TypeError, match="no option 'prio'"):
        client.warm([], prio=5)  # type: ignore[call-arg]  # what is tested


def test_nobody_there() -> None:
    """A server that does not answer is an error of the call."""
    with Client("127.0.0.1:1") as client, pytest.raises(Unavailable):
        list(client.warm([fresh()], timeout=5))


async def test_the_asynchronous_client_takes_asynchronous_iterators(paper: RunningServer) -> None:
    """The same results, from either kind of iterator; errors of the iterator are the caller's."""

    async def prompts(failing: bool) -> AsyncIterator[list[int] | WarmPrompt]:
        yield fresh()
        await asyncio.sleep(0)
        yield {"prompt": "", "id": "empty"}
        if failing:
            raise OSError("the disk is gone")

    async with AsyncClient(paper.address) as client:
        results = {warmed.id: warmed.state async for warmed in client.warm(prompts(False), timeout=10)}
        assert results == {"0": "computed", "empty": "failed"}
        states = [warmed.state async for warmed in client.warm([fresh(), "\ud800"], timeout=10)]
        assert sorted(states) == ["computed", "failed"]
        warming = client.warm(prompts(True), timeout=10)
        with pytest.raises(OSError, match="the disk is gone"):
            _ = [warmed async for warmed in warming]


async def test_an_asynchronous_warming_can_be_closed() -> None:
    """By its `with` block or by another task, whatever it is waiting for."""
    runner = GatedRunner()
    with RunningServer(PaperEngine(runner=runner)) as server, runner:
        async with AsyncClient(server.address) as client:
            async with client.warm([fresh(500)]) as warming:
                waiting = asyncio.ensure_future(anext(warming))
                await asyncio.to_thread(server.wait_until_warming, 1)
            with pytest.raises(Cancelled):
                await waiting
            with pytest.raises(Cancelled):
                await anext(warming)
            runner.open()
            await asyncio.to_thread(server.wait_until_idle)


def test_the_protocols_message_without_a_name_is_named_by_its_position(paper: RunningServer) -> None:
    """For clients that are not ours."""
    request = cache_pb2.WarmRequest(prompt=prompt_pb2.Prompt(token_ids=prompt_pb2.TokenIds(ids=fresh())))
    with grpc.insecure_channel(paper.address) as channel:
        call: Any = channel.stream_stream(
            WARM,
            request_serializer=cache_pb2.WarmRequest.SerializeToString,
            response_deserializer=cache_pb2.WarmResponse.FromString,
        )
        first, second = sorted(call(iter([request, cache_pb2.WarmRequest()]), timeout=10), key=lambda answer: answer.id)
    assert (first.id, first.state) == ("0", cache_pb2.WARM_STATE_COMPUTED)
    assert (second.id, second.state) == ("1", cache_pb2.WARM_STATE_FAILED)
    assert not second.HasField("prompt_tokens") and "prompt is not set" in second.error
