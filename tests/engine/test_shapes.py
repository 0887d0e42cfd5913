"""Shapes of arriving prompts: who sees which, and that nobody sees their text."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from engine.embedded.vocabulary import BYTEWISE_SIZE, bytewise
from engine.request import Started
from engine.shapes import COMPUTED_AT_ONCE, MAX_WATCHERS, QUEUED, PieceShape, Shape, Shapes, Watcher
from engine.tenants import Caller, namespace_key
from engine.tokenizer import Chat, Prompt, Tokenizer
from prefixcache.client import AsyncClient, Client
from prefixcache.doctor.pieces import STRUCTURE, cut
from prefixcache.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidArgument,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from prefixcache.reasons import MissReason
from prefixcache.v1 import cache_pb2, cache_pb2_grpc
from tests.engine.serving import PaperEngine, RunningServer
from tests.engine.tenancy import entry, write

ANNA, BOB, ROOT = Caller("anna", admin=False), Caller("bob", admin=False), Caller("root", admin=True)
STARTED = Started(100, 40, MissReason.DIVERGED, 40)
TOKENIZER = Tokenizer(bytewise(), BYTEWISE_SIZE)
SECRET = "Guest Anastasia Featherstone, born 1987-03-14, lives in Harbourview; her code is tulip_4711."


@pytest.fixture
async def shapes() -> AsyncIterator[Shapes]:
    shapes = Shapes(asyncio.get_running_loop())
    yield shapes
    shapes.close()


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with RunningServer(PaperEngine(blocks=1024)) as server:
        yield server


def say(shapes: Shapes, prompt: Prompt, tenant: str = "anna", suffix: str = "") -> None:
    shapes.saw(prompt, namespace_key(tenant, suffix), STARTED, TOKENIZER)


async def take(watcher: Watcher, count: int) -> list[Shape]:
    async with asyncio.timeout(10):
        return [await anext(watcher) for _ in range(count)]


def outline(shape: Shape) -> list[tuple[str, int]]:
    return [(kind, characters) for _, kind, characters in shape.pieces]


# What is told


async def test_a_shape_is_kinds_and_lengths_of_pieces(shapes: Shapes) -> None:
    """As the doctor cuts the text, behind the name of the field; and what the cache had."""
    async with shapes.watch(ANNA) as watcher:
        say(shapes, SECRET, suffix="guests")
        (shape,) = await take(watcher, 1)
    assert outline(shape) == [("field text", 0), *((kind, len(text)) for kind, text in cut(SECRET))]
    assert (shape.namespace, shape.prompt_tokens, shape.cached_tokens) == ("guests", 100, 40)


async def test_all_forms_of_prompts_have_shapes(shapes: Shapes) -> None:
    """Conversations with their tools first, token ids by the text they stand for."""
    chat = Chat([{"role": "captain", "content": "Hello"}, {"role": "user", "content": "x"}], [{"name": "find"}])
    async with shapes.watch(ANNA) as watcher:
        say(shapes, chat)
        say(shapes, TOKENIZER.encode("so 17"))
        of_chat, of_ids = await take(watcher, 2)
    assert [kind for kind, _ in outline(of_chat) if kind.startswith("field")] == [
        "field tool",
        "field other",
        "field user",
    ]
    assert outline(of_ids) == [("field text", 0), ("word", 2), ("space", 1), ("number", 2)]


async def test_equal_text_has_equal_hashes_until_the_server_starts_anew(shapes: Shapes) -> None:
    """In any prompt of this server, and in none of another."""
    others = Shapes(asyncio.get_running_loop())
    async with shapes.watch(ANNA) as watcher, others.watch(ANNA) as other:
        for prompt in ("bikes and boats", "boats and bikes"):
            say(shapes, prompt)
        say(others, "bikes and boats")
        first, second = await take(watcher, 2)
        (foreign,) = await take(other, 1)
    others.close()
    assert [piece.hash for piece in first.pieces[1:]] == [piece.hash for piece in reversed(second.pieces[1:])]
    assert not {piece.hash for piece in first.pieces} & {piece.hash for piece in foreign.pieces}


async def test_a_tenant_sees_its_own_prompts_only(shapes: Shapes) -> None:
    """Who administrates sees all, in namespaces that keep the tenants apart."""
    async with shapes.watch(ANNA) as anna, shapes.watch(BOB) as bob, shapes.watch(ROOT) as root:
        for number, tenant in enumerate(("anna", "bob", "root")):
            say(shapes, "x" * (number + 1), tenant, "n")
        assert [len(shape.pieces) and shape.pieces[1].characters for shape in await take(anna, 1)] == [1]
        assert [shape.pieces[1].characters for shape in await take(bob, 1)] == [2]
        seen = await take(root, 3)
        assert {shape.namespace for shape in seen} == {"anna/n", "bob/n", "n"}
        for watcher in (anna, bob):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(watcher), 0.01)


async def test_one_in_so_many(shapes: Shapes) -> None:
    """The others are not even looked at."""
    async with shapes.watch(ANNA, one_in=3) as watcher:
        for number in range(1, 7):
            say(shapes, "x" * number)
        assert [shape.pieces[1].characters for shape in await take(watcher, 2)] == [3, 6]


# What it costs


async def test_nothing_is_computed_while_nobody_watches(shapes: Shapes) -> None:
    """Before the first watcher, and after the last one has left."""
    unusable: Any = None
    for _ in range(2):
        shapes.saw([1, 2, 3], namespace_key("anna", ""), STARTED, unusable)
        async with shapes.watch(ANNA) as watcher:
            say(shapes, "seen")
            assert len(await take(watcher, 1)) == 1
    assert shapes.watchers == 0


async def test_prompts_that_come_faster_than_they_are_computed_are_left_out(shapes: Shapes) -> None:
    """No more than a few wait for it, and the watching goes on."""
    gate = threading.Event()

    class Slow(Tokenizer):
        def decode(self, ids: Any) -> str:
            gate.wait(10)
            return super().decode(ids)

    slow = Slow(bytewise(), BYTEWISE_SIZE)
    async with shapes.watch(ANNA) as watcher:
        for _ in range(COMPUTED_AT_ONCE + 10):
            shapes.saw([104, 105], namespace_key("anna", ""), STARTED, slow)
        gate.set()
        await take(watcher, COMPUTED_AT_ONCE)
        say(shapes, "the next")
        assert outline((await take(watcher, 1))[0])[1] == ("word", 3)


async def test_a_watcher_who_does_not_read_is_dropped() -> None:
    """When its queue is full, with what it can do about it; nothing of the queue is kept."""
    watcher = Watcher(ANNA, 1)
    shape = Shape([PieceShape(1, "word", 3)], "", 1, 0)
    for _ in range(QUEUED + 1):
        watcher.give(shape)
    with pytest.raises(ResourceExhausted, match="one_in"):
        await anext(watcher)
    assert not watcher.wants("anna")


async def test_only_so_many_may_watch(shapes: Shapes) -> None:
    """Of a tenant; when one has left there is room again."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(MAX_WATCHERS - 1):
            await stack.enter_async_context(shapes.watch(ANNA))
        async with shapes.watch(ANNA):
            with pytest.raises(ResourceExhausted, match="end one of them first"):
                await stack.enter_async_context(shapes.watch(ANNA))
            await stack.enter_async_context(shapes.watch(BOB))
        await stack.enter_async_context(shapes.watch(ANNA))
        assert shapes.watchers == MAX_WATCHERS + 1


async def test_watchers_are_told_when_the_server_shuts_down() -> None:
    """What has come is still handed out; nobody else may watch."""
    shapes = Shapes(asyncio.get_running_loop())
    async with shapes.watch(ANNA) as watcher:
        watcher.give(Shape([], "", 1, 0))
        shapes.close()
        assert len(await take(watcher, 1)) == 1
        with pytest.raises(Unavailable, match="shutting down"):
            await anext(watcher)
        say(shapes, "too late")
    with pytest.raises(Unavailable, match="shutting down"):
        async with shapes.watch(ANNA):
            pass


# Over the wire


def wait_for_watchers(server: RunningServer, count: int) -> None:
    pause = threading.Event()
    while server.server.front.shapes.watchers != count:
        pause.wait(0.005)


def test_no_text_goes_over_the_wire(server: RunningServer) -> None:
    """No word, number or date of a prompt, its tools or its namespace's neighbours is in the bytes of a message."""
    messages = [{"role": "system", "content": SECRET}, {"role": "user", "content": "Who is she?"}]
    tools = [{"type": "function", "function": {"name": "unlock_door", "description": "Opens the cellar."}}]
    with grpc.insecure_channel(server.address) as channel, Client(server.address) as client:
        method: Any = channel.unary_stream("/prefixcache.v1.CacheService/WatchPrompts")
        call = method(b"", timeout=20)
        wait_for_watchers(server, 1)
        client.generate(SECRET, max_tokens=1, timeout=20)
        client.generate(messages, tools=tools, max_tokens=1, timeout=20)
        received = [next(call), next(call)]
        call.cancel()
    wait_for_watchers(server, 0)
    text = f"{SECRET} {messages} {tools}"
    words = {word for word in re.findall(r"\w{3,}", text) if word not in {"system", "user", "tool", "name"}}
    assert len(words) > 20
    assert not [word for word in words for data in received if word.encode() in data and word not in KINDS]
    shapes = [cache_pb2.WatchPromptsResponse.FromString(data) for data in received]
    assert all(piece.kind in KINDS for shape in shapes for piece in shape.pieces)
    assert shapes[0].prompt_tokens == len(SECRET) + 1


KINDS = {
    *(
        "field text",
        "field tool",
        "field system",
        "field user",
        "word",
        "space",
        "date",
        "number",
        "name",
        "whitespace",
    ),
    *STRUCTURE,
}


def test_a_client_watches_prompts(server: RunningServer) -> None:
    """Each with what the cache had for it; closing ends it, here and there."""
    with Client(server.address) as client:
        watch = client.watch_prompts(timeout=20)
        wait_for_watchers(server, 1)
        for _ in range(2):
            client.generate("Boats and bikes", max_tokens=1, namespace="harbour", timeout=20)
        cold, warm = next(watch), next(watch)
        assert cold.pieces == warm.pieces
        assert [kind for _, kind, _ in cold.pieces] == ["field text", "word", "space", "conjunction", "space", "word"]
        assert (cold.namespace, cold.prompt_tokens, cold.cached_tokens, warm.cached_tokens) == ("harbour", 16, 0, 15)
        watch.close()
        with pytest.raises(Cancelled, match="was ended"):
            next(watch)
    wait_for_watchers(server, 0)


async def test_a_client_for_asyncio_watches_prompts(server: RunningServer) -> None:
    """With the same methods."""
    async with AsyncClient(server.address) as client:
        async with client.watch_prompts(one_in=2, timeout=20) as watch:
            await asyncio.to_thread(wait_for_watchers, server, 1)
            for number in range(2):
                await client.generate("y" * (number + 1), max_tokens=1, timeout=20)
            assert (await anext(watch)).pieces[1][2] == 2
        with pytest.raises(DeadlineExceeded):
            await anext(client.watch_prompts(timeout=0.1))
    await asyncio.to_thread(wait_for_watchers, server, 0)


def test_one_in_that_is_no_number_is_refused(server: RunningServer) -> None:
    """Before anything is sent."""
    with Client(server.address) as client, pytest.raises(InvalidArgument, match="one_in"):
        client.watch_prompts(one_in=-1)


def test_warming_and_looking_up_are_no_prompts(server: RunningServer) -> None:
    """What nobody waits for an answer to is not what makes answers slow."""
    with Client(server.address) as client, client.watch_prompts(timeout=20) as watch:
        wait_for_watchers(server, 1)
        list(client.warm([{"prompt": "warmed"}]))
        client.lookup("looked up", timeout=20)
        client.generate("asked", max_tokens=1, timeout=20)
        assert next(watch).pieces[1][2] == len("asked")
    wait_for_watchers(server, 0)


def test_a_tenant_watches_its_own_prompts_while_its_token_is_good(tmp_path: Path) -> None:
    """Another's are not told; once the token is taken out of the file, neither are its own."""
    path = tmp_path / "tenants.toml"
    with (
        RunningServer(PaperEngine(), tenants=write(path, entry("anna"), entry("bob"))) as server,
        Client(server.address, token="anna") as anna,
        Client(server.address, token="bob") as bob,
        Client(server.address, token="another") as renewed,
    ):
        watch = anna.watch_prompts(timeout=20)
        wait_for_watchers(server, 1)
        for client, text in ((bob, "bob's"), (anna, "anna's")):
            client.generate(text, max_tokens=1, timeout=20)
        assert next(watch).pieces[1][2] == len("anna's")
        write(path, entry("anna", "another"), entry("bob"))
        asyncio.run_coroutine_threadsafe(server.server.reload_tenants(), server.loop).result(30)
        renewed.generate("anna's", max_tokens=1, timeout=20)
        with pytest.raises(Unauthenticated):
            next(watch)


def test_a_watcher_is_told_when_the_server_goes() -> None:
    """As Unavailable, not as a bug."""
    with RunningServer(PaperEngine()) as server, grpc.insecure_channel(server.address) as channel:
        call = cache_pb2_grpc.CacheServiceStub(channel).WatchPrompts(cache_pb2.WatchPromptsRequest(), timeout=20)
        wait_for_watchers(server, 1)
        server.__exit__(None, None, None)
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
