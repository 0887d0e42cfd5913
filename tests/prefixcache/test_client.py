"""The client against real servers: the same behaviour in threads and in asyncio."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from prefixcache.client import AsyncClient, Client
from prefixcache.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    PrefixCacheError,
    ResourceExhausted,
    Unavailable,
)
from prefixcache.results import Completion, Stats
from tests.engine.paper import generate
from tests.engine.serving import GatedRunner, PaperEngine, RunningServer

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hé?"}]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with RunningServer(PaperEngine()) as server:
        yield server


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


@pytest.fixture
async def async_client(server: RunningServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.address) as client:
        yield client


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def comparable(completion: Completion) -> tuple[Any, ...]:
    """What of a completion does not depend on time, name and cache."""
    return completion.text, completion.token_ids, completion.finish_reason, completion.usage.prompt_tokens


# Results


def test_a_completion_is_plain_data(client: Client) -> None:
    """Text, tokens, counts, reason and times, with the counts adding up."""
    prompt = list(b"plain data")
    completion = client.generate(prompt, max_tokens=12, request_id="r-1", timeout=10)
    usage = completion.usage
    assert completion.token_ids == generate(prompt, 12, 256)
    assert completion.text == bytes(completion.token_ids).decode("utf-8", "replace")
    assert (completion.finish_reason, completion.stopped_by, completion.request_id) == ("length", "", "r-1")
    assert (usage.prompt_tokens, usage.completion_tokens) == (10, 12)
    assert usage.cached_tokens + usage.computed_tokens == usage.prompt_tokens
    assert completion.ttft is not None
    assert 0 < completion.ttft <= completion.elapsed
    assert 0 <= completion.timings.queue <= completion.timings.first_token <= completion.timings.total


def test_a_repeat_says_how_much_was_cached(client: Client) -> None:
    """The second time everything but the last token is, and the reason is that nothing was missed."""
    prompt = list(b"the same prompt, twice, over more than one block")
    first = client.generate(prompt, max_tokens=3, timeout=10)
    second = client.generate(prompt, max_tokens=3, timeout=10)
    assert (first.usage.cached_tokens, first.miss_reason, first.miss_position) == (0, "never_seen", 0)
    assert (second.usage.cached_tokens, second.miss_reason) == (len(prompt) - 1, "none")
    assert second.text == first.text


def test_a_stream_is_the_completion_in_pieces(client: Client) -> None:
    """What the cache had is known with the first piece; the pieces joined are the text."""
    with client.stream("in pieces", max_tokens=40, timeout=10) as stream:
        pieces = [next(stream)]
        assert stream.started is not None
        assert stream.started.prompt_tokens == len(client.tokenize("in pieces", timeout=10))
        pieces += stream
    assert all(pieces)
    assert "".join(pieces) == stream.result().text == client.generate("in pieces", max_tokens=40, timeout=10).text


async def test_asyncio_gives_the_same(client: Client, async_client: AsyncClient) -> None:
    """Completion, stream and the questions about model and cache agree between both clients."""
    completion = client.generate("the same", max_tokens=20, timeout=10)
    assert comparable(await async_client.generate("the same", max_tokens=20, timeout=10)) == comparable(completion)
    async with async_client.stream("the same", max_tokens=20, timeout=10) as stream:
        pieces = [piece async for piece in stream]
    assert comparable(await stream.result()) == comparable(completion)
    assert "".join(pieces) == completion.text
    assert stream.started is not None
    assert await async_client.model(timeout=10) == client.model(timeout=10)
    assert await async_client.lookup("the same", timeout=10) == client.lookup("the same", timeout=10)
    assert await async_client.tokenize("the same", timeout=10) == client.tokenize("the same", timeout=10)
    assert isinstance(await async_client.stats(timeout=10), Stats)
    await async_client.wait_until_ready(timeout=10)


def test_the_three_forms_of_a_prompt_meet_in_token_ids(client: Client) -> None:
    """Messages, their rendered text and its token ids are one prompt to the cache."""
    ids = client.tokenize(MESSAGES, timeout=10)
    rendered = "<|system|>Be brief.<|end|><|user|>Hé?<|end|><|assistant|>"
    assert ids == client.tokenize(rendered, timeout=10)
    client.generate(ids, max_tokens=1, namespace="forms", timeout=10)
    for form in (MESSAGES, rendered, ids):
        assert client.lookup(form, namespace="forms", timeout=10).cached_tokens == len(ids) - 1
    assert client.generate(MESSAGES, max_tokens=1, namespace="forms", timeout=10).usage.prompt_tokens == len(ids)


def test_tools_keep_the_order_of_their_keys(client: Client) -> None:
    """Another order is another prompt, so the client and the wire must not choose one."""
    one = {"name": "f", "arguments": {"b": 1, "a": 2.5}}
    other = {"arguments": {"a": 2.5, "b": 1}, "name": "f"}
    texts = [bytes(t for t in client.tokenize(MESSAGES, tools=[tool], timeout=10) if t < 256) for tool in (one, other)]
    assert texts[0].startswith(b'{"name": "f", "arguments": {"b": 1, "a": 2.5}}')
    assert texts[1].startswith(b'{"arguments": {"a": 2.5, "b": 1}, "name": "f"}')


def test_a_conversation_with_tool_calls_is_sent_whole(client: Client) -> None:
    """An assistant turn without content and the answer of the tool reach the template."""
    turns: list[dict[str, Any]] = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}, {"name": "g"}]},
        {"role": "tool", "content": "42", "tool_call_id": "c", "name": "f"},
    ]
    text = bytes(token for token in client.tokenize(turns, timeout=10) if token < 256)
    assert text.endswith(b'{"name": "f"}\n{"name": "g"}42')


def test_options_reach_the_server(client: Client) -> None:
    """Stop strings alone or in a list, stop tokens, bias, and switches; None is the default."""
    prompt = list(b"options")
    tokens = generate(prompt, 80, 256)
    at = next(i for i in range(3, 80) if 32 < tokens[i] < 127 and tokens[i] not in tokens[:i])
    options: dict[str, Any]
    for options in ({"stop": chr(tokens[at])}, {"stop": [chr(tokens[at])]}, {"stop_token_ids": [tokens[at]]}):
        completion = client.generate(prompt, max_tokens=100, temperature=None, timeout=10, **options)
        assert (completion.finish_reason, completion.usage.completion_tokens) == ("stop", at + 1)
    with pytest.raises(NotFound, match="model 'other' is not served"):
        client.generate(prompt, model="other", timeout=10)
    with pytest.raises(TypeError, match="there is no option 'max_token'"):
        client.generate(prompt, max_token=1)  # type: ignore[call-arg]


# Mistakes


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("half \ud83d a character", {}, "the prompt cannot be sent: .*surrogates not allowed"),
        ("x", {"stop": "\ud83d"}, "an option cannot be sent: .*surrogates not allowed"),
        ("x", {"request_id": "\ud83d"}, "an option cannot be sent: .*surrogates not allowed"),
        ([-1], {}, "the prompt cannot be sent: .*-1"),
        ([2**40], {}, "the prompt cannot be sent: "),
        ("x", {"max_tokens": -1}, "an option cannot be sent: .*-1"),
        ("x", {"tools": [{}]}, "tools and add_generation_prompt belong to messages"),
        (MESSAGES, {"tools": [{"a": object()}]}, "a tool or tool call is no JSON"),
        (MESSAGES, {"tools": [{"a": float("nan")}]}, "the prompt cannot be sent: .*not JSON compliant"),
        ([{"role": "user", "content": ["part"]}], {}, "the content of message 0 is a list; it must be text"),
        ([{"role": "user", "contents": "x"}], {}, "message 0 has a key 'contents', which has no meaning here"),
        ([{"role": "user", "content": "x"}, "x"], {}, "message 1 is a str; every message must be a dict"),
        ("", {}, "prompt.text is empty"),
        ([], {}, "prompt.token_ids is empty"),
        ([{"content": "x"}], {}, r"messages\[0\].role is empty"),
        ("x", {"temperature": 1000}, "temperature must be from 0 to 100, not 1000.0"),
    ],
)
async def test_mistakes_are_invalid_arguments(
    client: Client, async_client: AsyncClient, prompt: Any, options: Any, words: str
) -> None:
    """Found here or there, by either client, they are the same error with the field in its message."""
    with pytest.raises(InvalidArgument, match=words):
        client.generate(prompt, timeout=10, **options)
    with pytest.raises(InvalidArgument, match=words):
        await async_client.generate(prompt, timeout=10, **options)


async def test_grpcs_own_errors_never_leak() -> None:
    """Nobody there, a server of something else, a deadline: errors of our tree, and the address in the message."""
    address = free_address()
    with Client(address) as client:
        calls: list[Any] = [client.generate, client.tokenize, client.lookup]
        for call in calls:
            with pytest.raises(Unavailable, match=f"no answer from {address}"):
                call("x", timeout=5)
        with pytest.raises(DeadlineExceeded, match=f"{address} was not ready within 0.2 seconds: nobody answers"):
            client.wait_until_ready(timeout=0.2)
    async with AsyncClient(address) as client:
        with pytest.raises(Unavailable, match=f"no answer from {address}"):
            await client.generate("x", timeout=5)
        with pytest.raises(Unavailable):
            await client.stats(timeout=5)
        with pytest.raises(DeadlineExceeded, match="nobody answers"):
            await client.wait_until_ready(timeout=0.2)


def test_a_server_of_another_kind_is_named() -> None:
    """A status that is not in our tree still is one of our errors, with its name."""
    other = grpc.server(ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    with Client(f"127.0.0.1:{port}") as client, pytest.raises(PrefixCacheError, match="answered UNIMPLEMENTED"):
        client.model(timeout=10)
    other.stop(None).wait()


# Time and patience


async def test_deadlines_and_full_queues_are_told_by_both_clients() -> None:
    """DeadlineExceeded after the timeout, ResourceExhausted with the seconds to wait."""
    runner = GatedRunner()
    with RunningServer(PaperEngine(max_running=1, runner=runner), max_queue=1) as server, runner:
        async with AsyncClient(server.address) as patient:
            streams = [patient.stream("one"), patient.stream("two")]
            await asyncio.to_thread(server.wait_until_active, 2)
            with Client(server.address) as client:
                with pytest.raises(ResourceExhausted, match="queue is full") as caught:
                    client.generate("three")
                assert caught.value.retry_after is not None
                assert caught.value.retry_after > 0
            with pytest.raises(ResourceExhausted, match="queue is full") as caught:
                await patient.generate("three")
            assert caught.value.retry_after is not None
            for stream in streams:
                await stream.close()
            runner.open()
            await asyncio.to_thread(server.wait_until_idle)
            runner.permits = threading.Semaphore(0)
            with Client(server.address) as client, pytest.raises(DeadlineExceeded):
                client.generate("four", timeout=0.1)
            with pytest.raises(DeadlineExceeded):
                await patient.generate("four", timeout=0.1)
            runner.open()


async def test_closing_a_stream_cancels_the_request(server: RunningServer, async_client: AsyncClient) -> None:
    """Left early, it is over on the server too; its result then is Cancelled, a complete one stays."""
    async with async_client.stream("left early", max_tokens=1900) as stream:
        async for _ in stream:
            break
    with pytest.raises(Cancelled, match="closed before its end"):
        await stream.result()
    await asyncio.to_thread(server.wait_until_idle)
    assert server.stats().cache.leased == 0
    async with async_client.stream("read to its end", max_tokens=2, timeout=10) as stream:
        await stream.result()
    assert (await stream.result()).usage.completion_tokens == 2


async def test_cancelling_the_task_cancels_the_request(server: RunningServer, async_client: AsyncClient) -> None:
    """asyncio's own cancellation passes through, and the server stops working for nobody."""
    aborted = server.stats().totals.aborted
    task = asyncio.create_task(async_client.generate("cancelled", max_tokens=1900))
    while not server.stats().running:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(server.wait_until_idle)
    assert server.stats().totals.aborted == aborted + 1


async def test_many_calls_share_one_client(async_client: AsyncClient) -> None:
    """Concurrent streams over one connection each get their own tokens."""
    prompts = [list(b"shared beginning of many blocks " * 2) + [number] for number in range(40)]
    completions = await asyncio.gather(*(async_client.generate(prompt, max_tokens=5, timeout=30) for prompt in prompts))
    assert [completion.token_ids for completion in completions] == [generate(prompt, 5, 256) for prompt in prompts]


# Installing


def test_the_client_needs_neither_torch_nor_the_engine() -> None:
    """`pip install prefixcache` brings it, so importing it must not bring more."""
    code = """
import sys
for name in ("torch", "transformers", "tokenizers", "engine", "pydantic", "structlog", "grpc_health"):
    sys.modules[name] = None  # importing it fails, as if it were not installed
import prefixcache.client
"""
    subprocess.run([sys.executable, "-c", code], check=True)
