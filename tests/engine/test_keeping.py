"""Time to live, priority, sessions, pins and invalidation over real gRPC."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import pytest

from prefixcache.client import AsyncClient, Client
from prefixcache.errors import InvalidArgument, NotFound
from prefixcache.reasons import MissReason
from prefixcache.requests import GenerateOptions
from prefixcache.results import Invalidated, Pins
from tests.engine.serving import GatedRunner, PaperEngine, RunningServer

T = TypeVar("T")
BLOCKS = 64


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with RunningServer(PaperEngine(blocks=BLOCKS)) as server:
        yield server


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


def prompt_from(first: int, count: int) -> list[int]:
    return [(first + number) % 250 for number in range(count)]


def fill(client: Client) -> None:
    """Send prompts that would evict everything that can be evicted."""
    for number in range(BLOCKS // 8):
        client.generate([200 + number, *prompt_from(40 * number, 127)], max_tokens=1)


# Requests


def test_a_prompt_expires_on_the_terms_of_its_request(server: RunningServer, client: Client) -> None:
    """The engine's own clock removes it, though no request comes; the next one is told why it missed."""
    prompt = prompt_from(0, 40)
    client.generate(prompt, max_tokens=1, ttl=0.2, ttl_mode="fixed")
    gone = threading.Event()
    while server.stats().cache.expired == 0:
        gone.wait(0.02)
    assert client.lookup(prompt).miss_reason is MissReason.EXPIRED
    again = client.generate(prompt, max_tokens=1)
    assert (again.usage.cached_tokens, again.miss_reason) == (0, MissReason.EXPIRED)


def test_the_server_s_default_time_to_live_holds_for_requests_that_say_nothing() -> None:
    """And a request's own goes before it."""
    with RunningServer(PaperEngine(), default_ttl_seconds=0.2) as server, Client(server.address) as client:
        client.generate(prompt_from(0, 40), max_tokens=1)
        client.generate(prompt_from(100, 40), max_tokens=1, ttl=3600)
        gone = threading.Event()
        while server.stats().cache.expired == 0:
            gone.wait(0.02)
        assert client.lookup(prompt_from(0, 40)).cached_tokens == 0
        assert client.lookup(prompt_from(100, 40)).cached_tokens == 39


def test_a_dear_prompt_outlives_what_came_later(client: Client) -> None:
    """Whatever is sent, as long as it is sent at a lower priority."""
    prompt = prompt_from(0, 64)
    client.generate(prompt, max_tokens=1, priority=80)
    fill(client)
    assert client.lookup(prompt).cached_tokens == 63


def test_a_reply_says_what_was_written(client: Client) -> None:
    """Whole blocks and the tail, of prompt and output; nothing if nothing was to be stored."""
    first = client.generate(prompt_from(0, 40), max_tokens=9, ignore_eos=True)
    assert first.usage.written_tokens == 48  # the last token's keys and values are never computed
    assert client.generate(prompt_from(0, 40), max_tokens=9, ignore_eos=True).usage.written_tokens == 0
    assert client.generate(prompt_from(9, 40), max_tokens=1, store_cache=False).usage.written_tokens == 0


def test_a_diverging_prompt_is_told_of_the_nearest_one(client: Client) -> None:
    """In the reply as in a lookup."""
    client.generate(prompt_from(0, 100), max_tokens=1)
    other = [*prompt_from(0, 50), 249, 249]
    assert client.lookup(other).alternative_tokens == 100
    assert client.generate(other, max_tokens=1).alternative_tokens == 100


WRONG: list[tuple[GenerateOptions, str]] = [
    ({"ttl": 0}, "cache.ttl is 0 seconds; it must be above 0"),
    ({"ttl": -3}, "cache.ttl is -3 seconds"),
    ({"priority": 101}, "cache.priority is 101; it must be from 0 to 100"),
    ({"session_id": "s" * 129}, "cache.session_id must have at most 128 bytes"),
    ({"session_id": "a\nb"}, "cache.session_id must consist of printable characters"),
    ({"keep_for": 5}, "send session_id"),
    ({"end_session_on_disconnect": True}, "send session_id"),
    ({"session_id": "s", "keep_for": 3601}, "cache.keep_for must be at most 3600 seconds"),
    ({"session_id": "s", "keep_for": 0}, "cache.keep_for is 0 seconds"),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_terms_that_make_no_sense_are_refused(client: Client, options: GenerateOptions, words: str) -> None:
    """INVALID_ARGUMENT with the field and what is allowed."""
    with pytest.raises(InvalidArgument, match=words):
        client.generate([1, 2, 3], **options)


# Sessions


def test_an_ended_session_makes_room_first(client: Client) -> None:
    """What it shares with others stays."""
    system = prompt_from(0, 64)
    client.generate(system, max_tokens=1)
    client.generate([*system, *prompt_from(100, 64)], max_tokens=1, session_id="chat")
    assert client.stats().sessions == 1
    assert client.end_session("chat") == 4
    assert client.stats().sessions == 0
    for first in (130, 190):  # 60 blocks: the four that are missing are the session's
        client.generate(prompt_from(first, 480), max_tokens=1)
    assert client.lookup([*system, *prompt_from(100, 64)]).cached_tokens == 64


def test_a_session_that_waits_for_a_tool_is_not_evicted(server: RunningServer, client: Client) -> None:
    """The reply says how much is kept; the next request of the session ends it."""
    prompt = prompt_from(0, 64)
    kept = client.generate(prompt, max_tokens=1, session_id="run", keep_for=600)
    assert kept.kept_tokens == 64
    fill(client)
    assert client.lookup(prompt).cached_tokens == 63
    assert client.stats().blocks.pinned == 4
    client.generate([*prompt, 7], max_tokens=1, session_id="run")
    assert client.stats().blocks.pinned == 0
    server.check()


def test_what_is_kept_is_within_the_budget_for_pins(client: Client) -> None:
    """16 of 64 blocks; the reply is honest about it."""
    answer = client.generate(prompt_from(0, 480), max_tokens=1, session_id="run", keep_for=600)
    assert answer.kept_tokens == 256


def test_a_session_ends_with_its_client_if_asked() -> None:
    """A caller who leaves in the middle leaves blocks that go first."""

    async def leave(address: str, runner: GatedRunner) -> None:
        async with AsyncClient(address) as client:
            stream = client.stream(prompt_from(0, 64), session_id="s", end_session_on_disconnect=True)
            runner.permits.release(2)
            async for _ in stream:
                break
            asking = asyncio.create_task(client.stats())
            while not asking.done():
                runner.permits.release()
                await asyncio.sleep(0.005)
            assert asking.result().sessions == 1
            await stream.close()

    runner = GatedRunner(BLOCKS)
    engine = PaperEngine(blocks=BLOCKS, runner=runner)
    with RunningServer(engine, stream_interval_ms=0) as server, runner, Client(server.address) as client:
        asyncio.run(leave(server.address, runner))
        runner.open()
        server.wait_until_idle()
        assert client.stats().sessions == 0
        server.check()


# Pins


def test_a_pinned_prompt_is_computed_and_stays(server: RunningServer, client: Client) -> None:
    """It need not have been sent before; pinning again changes nothing."""
    prompt = prompt_from(0, 100)
    for _ in range(2):
        pinned = client.pin(prompt, "system")
        assert (pinned.prompt_tokens, pinned.pinned_tokens, pinned.limited_by) == (100, 96, "")
        assert (pinned.pinned_blocks, pinned.budget_blocks) == (6, 16)
    fill(client)
    assert client.generate([*prompt[:96], 1], max_tokens=1).usage.cached_tokens == 96
    server.check()


def test_pins_are_listed_and_ended(client: Client) -> None:
    """With their namespace and the time they have left; ending one twice is NOT_FOUND."""
    client.pin(prompt_from(0, 32), "a", ttl=100)
    client.pin(prompt_from(0, 48), "b", namespace="team")
    listed = client.pins()
    assert [(pin.pin_id, pin.namespace, pin.tokens) for pin in listed.pins] == [("a", "", 32), ("b", "team", 48)]
    assert listed.pins[0].expires_in is not None and 90 < listed.pins[0].expires_in <= 100
    assert listed.pins[1].expires_in is None
    client.unpin("a")
    client.unpin("b", namespace="team")
    assert client.pins() == Pins((), 0, 16)
    with pytest.raises(NotFound, match="no pin 'a'"):
        client.unpin("a")


def test_more_than_the_budget_is_pinned_in_part_and_said(client: Client) -> None:
    """The longest beginning that fits; live requests go on with the rest of the pool."""
    pinned = client.pin(prompt_from(0, 400), "big")
    assert (pinned.pinned_tokens, pinned.pinned_blocks) == (256, 16)
    assert "budget for pins, 16 blocks, is used up" in pinned.limited_by
    longest = 16 * (BLOCKS - 16)
    assert client.generate(prompt_from(100, longest), max_tokens=1).usage.prompt_tokens == longest
    with pytest.raises(InvalidArgument, match=f"holds {longest} beside what may be pinned"):
        client.generate(prompt_from(100, longest + 1), max_tokens=1)


def test_pinning_only_what_is_cached_computes_nothing(server: RunningServer, client: Client) -> None:
    """And says that not all of it is there."""
    steps = server.stats().totals.steps
    pinned = client.pin(prompt_from(0, 64), "p", cached_only=True)
    assert (pinned.pinned_tokens, pinned.limited_by) == (0, "not all of the prompt is cached")
    assert server.stats().totals.steps == steps


def test_a_pin_needs_a_name(client: Client) -> None:
    """INVALID_ARGUMENT."""
    with pytest.raises(InvalidArgument, match="pin_id is empty"):
        client.pin([1, 2, 3], "")


# Invalidation


def test_each_way_of_forgetting_forgets_that_and_no_more(client: Client) -> None:
    """By prefix, session, namespace and everything; the miss says that it was invalidated."""
    system, chat = prompt_from(0, 64), [*prompt_from(0, 64), *prompt_from(100, 64)]
    client.generate(system, max_tokens=1)
    client.generate(chat, max_tokens=1, session_id="s")
    client.generate(system, max_tokens=1, namespace="team")
    assert client.invalidate(session_id="s") == Invalidated(4, 0)
    assert client.lookup(chat).cached_tokens == 64
    assert client.lookup(chat).miss_reason is MissReason.INVALIDATED
    assert client.invalidate(chat) == Invalidated(0, 0)
    assert client.invalidate(system[:20]) == Invalidated(4, 0)
    assert client.lookup(system).cached_tokens == 0
    assert client.lookup(system, namespace="team").cached_tokens == 63
    assert client.invalidate(namespace="team", whole_namespace=True) == Invalidated(4, 0)
    client.generate(system, max_tokens=1)
    client.generate(system, max_tokens=1, namespace="other")
    assert client.invalidate(everything=True) == Invalidated(8, 0)
    assert client.stats().blocks.free == BLOCKS
    assert client.stats().blocks.invalidated == 20


def test_messages_are_forgotten_with_all_that_follows_them() -> None:
    """A system prompt given as messages is the beginning of every chat with it."""
    with RunningServer(PaperEngine()) as server, Client(server.address) as client:
        system = {"role": "system", "content": "Be kind to everyone who asks you anything at all."}
        turns = [system, {"role": "user", "content": "Hello"}]
        client.generate(turns, max_tokens=1)
        assert client.invalidate([system]).freed_blocks > 0
        assert client.lookup(turns).cached_tokens < 16


def test_what_a_running_request_uses_is_reported_as_in_use() -> None:
    """It finishes right; nobody reuses its blocks, and they are free when it ends."""
    runner = GatedRunner(BLOCKS)
    prompt = prompt_from(0, 64)
    with RunningServer(PaperEngine(blocks=BLOCKS, runner=runner)) as server, runner, Client(server.address) as client:
        with client.stream(prompt, max_tokens=600, ignore_eos=True) as stream:
            runner.permits.release()
            while between_steps(runner, lambda: client.lookup(prompt)).cached_tokens < 63:
                pass
            done = between_steps(runner, lambda: client.invalidate(prompt[:32]))
            assert done.freed_blocks == 0 and done.in_use_blocks >= 4
            assert between_steps(runner, lambda: client.lookup(prompt)).cached_tokens == 0
            runner.open()
            assert len(stream.result().token_ids) == 600
        server.wait_until_idle()
        assert server.stats().cache.free == BLOCKS
        server.check()


def between_steps(runner: GatedRunner, call: Callable[[], T]) -> T:
    """Make a call that the engine answers between two steps, and let it get there."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(call)
        while not answer.done():
            runner.permits.release()
            wait([answer], 0.005)
    return answer.result()


def test_exactly_one_thing_can_be_forgotten_at_a_time(client: Client) -> None:
    """The client says so, and the server to clients that do not."""
    with pytest.raises(InvalidArgument, match="exactly one"):
        client.invalidate()
    with pytest.raises(InvalidArgument, match="exactly one"):
        client.invalidate([1], everything=True)


async def test_the_asyncio_client_does_the_same(server: RunningServer) -> None:
    """Pin, list, unpin, end, invalidate."""
    async with AsyncClient(server.address) as client:
        prompt = prompt_from(0, 64)
        assert (await client.pin(prompt, "p")).pinned_tokens == 64
        assert [pin.pin_id for pin in (await client.pins()).pins] == ["p"]
        await client.unpin("p")
        await client.generate([*prompt, 1, *prompt], max_tokens=1, session_id="s")
        assert await client.end_session("s") > 0
        assert (await client.invalidate(prompt)).freed_blocks >= 4
