"""Why a prompt missed: Lookup and `started` name the reason, the position, the nearest alternative and the place."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from engine.embedded.vocabulary import BYTEWISE_SIZE, bytewise
from engine.tokenizer import Tokenizer
from prefixcache.client import AsyncClient, Client
from prefixcache.errors import FailedPrecondition, InvalidArgument
from prefixcache.reasons import MissReason
from prefixcache.results import Lookup
from prefixcache.v1 import cache_pb2, cache_pb2_grpc, prompt_pb2
from tests.engine.serving import BLOCK, PaperEngine, RunningServer

BEGIN = 1  # the token in front of every text
RULES = "You are the harbour's assistant. Boats that come at night wait at the outer wall. "


@pytest.fixture(scope="module")
def paper() -> Iterator[RunningServer]:
    with RunningServer(PaperEngine(blocks=1024)) as server:
        yield server


@pytest.fixture
def client(paper: RunningServer) -> Iterator[Client]:
    with Client(paper.address) as client:
        yield client


def why(client: Client, prompt: str, namespace: str) -> Lookup:
    return client.lookup(prompt, namespace=namespace, with_text=True)


def test_a_prompt_that_diverges(client: Client) -> None:
    """The place in the text is where it differs, and the alternative is the prompt that it differs from."""
    cached = RULES + "Today is Sunday. What does a berth cost?"
    client.generate(cached, max_tokens=1, namespace="diverges")
    found = why(client, RULES + "Today is Monday. What does a berth cost?", "diverges")
    same = len(RULES + "Today is ")
    assert found == Lookup(
        prompt_tokens=BEGIN + len(cached),
        cached_tokens=BEGIN + same,
        miss_reason=MissReason.DIVERGED,
        miss_position=BEGIN + same,
        alternative_tokens=BEGIN + len(cached),
        text=RULES + "Today is Monday. What does a berth cost?",
        cached_characters=same,
    )


def test_started_says_the_same(client: Client) -> None:
    """A request that was admitted is told what a lookup just before would have been told."""
    client.generate(RULES + "One.", max_tokens=1, namespace="started")
    found = why(client, RULES + "Two.", "started")
    started = client.generate(RULES + "Two.", max_tokens=1, namespace="started").started
    assert (started.cached_tokens, started.miss_reason, started.miss_position, started.alternative_tokens) == (
        found.cached_tokens,
        MissReason.DIVERGED,
        found.miss_position,
        found.alternative_tokens,
    )
    assert started.alternative_tokens == BEGIN + len(RULES + "One.")


def test_prompts_that_do_not_diverge_have_no_alternative(client: Client) -> None:
    """New, continued and fully cached prompts differ from nothing."""
    prompt = RULES.ljust(6 * BLOCK - BEGIN)
    assert why(client, prompt, "new") == Lookup(6 * BLOCK, 0, MissReason.NEVER_SEEN, 0, 0, prompt, 0)
    client.generate(prompt, max_tokens=1, namespace="new")
    last = 6 * BLOCK - 1
    assert why(client, prompt, "new") == Lookup(6 * BLOCK, last, MissReason.NONE, last, 0, prompt, len(prompt) - 1)
    longer = why(client, prompt + "And now?", "new")
    assert (longer.miss_reason, longer.alternative_tokens) == (MissReason.NEVER_SEEN, 0)
    assert (longer.miss_position, longer.cached_characters) == (6 * BLOCK, len(prompt))


def test_a_prompt_that_diverges_with_its_first_character(client: Client) -> None:
    """The token that begins every text is cached, but nothing of the text."""
    client.generate("abc" * 20, max_tokens=1, namespace="first")
    found = why(client, "xyz" * 20, "first")
    assert (found.miss_position, found.cached_characters, found.miss_reason) == (BEGIN, 0, MissReason.DIVERGED)
    ids = client.lookup([7, 8, 9], namespace="first", with_text=True)
    assert (ids.miss_position, ids.cached_characters) == (0, 0)


@pytest.mark.parametrize(
    ("cached", "asked", "characters"),
    [
        ("smile 🙂!", "smile 🙃!", 6),  # three of four bytes are the same
        ("smile é!", "smile è!", 6),
        ("smile é!", "smile é?", 7),
        ("👩\u200d🚀 flies", "👩\u200d🔬 looks", 2),  # a person, a joiner, and what the person does
        ("日本語です", "日本人です", 2),
    ],
)
def test_a_character_that_differs_in_its_last_byte_is_not_cached(
    client: Client, cached: str, asked: str, characters: int
) -> None:
    """Characters count whole, however many tokens they are made of."""
    client.generate(cached, max_tokens=1, namespace=cached)
    found = why(client, asked, cached)
    assert found.cached_characters == characters
    same = len(asked[:characters].encode())
    assert BEGIN + same <= found.cached_tokens < BEGIN + len(asked[: characters + 1].encode())


def test_messages_are_shown_as_the_template_renders_them(client: Client) -> None:
    """Roles and tools are part of the text, and the place is in it."""
    system = {"role": "system", "content": RULES}
    tools = [{"name": "tide", "parameters": {}}]
    for hour in ("ten", "two"):
        messages = [system, {"role": "user", "content": f"It is {hour}."}]
        found = client.lookup(messages, tools=tools, namespace="chat", with_text=True)
        client.generate(messages, tools=tools, namespace="chat", max_tokens=1)
    rendered_tools = '<|begin|><|system|>{"name": "tide", "parameters": {}}\n<|end|>'
    before = f"{rendered_tools}<|system|>{RULES}<|end|><|user|>It is t"
    assert found.text == before + "wo.<|end|><|assistant|>"
    assert found.cached_characters == len(before)
    open_ended = client.lookup(
        [system, {"role": "user", "content": "It is"}],
        tools=tools,
        add_generation_prompt=False,
        namespace="chat",
        with_text=True,
    )
    assert open_ended.text is not None and open_ended.text.endswith("It is<|end|>")


def test_token_ids_are_shown_as_text(client: Client) -> None:
    """What token ids stand for is decoded, special tokens by their names; half a character is not cached."""
    before = [258, *RULES.encode(), 257]
    client.generate([*before, *"🙂".encode()], max_tokens=1, namespace="ids")
    found = client.lookup([*before, *"🙃".encode(), 10], namespace="ids", with_text=True)
    assert found.text == f"<|system|>{RULES}<|end|>🙃\n"
    assert found.cached_characters == len(f"<|system|>{RULES}<|end|>")
    assert found.cached_tokens == len(before) + 3


def test_the_text_comes_only_if_it_is_asked_for(paper: RunningServer, client: Client) -> None:
    """Without with_text the response has neither text nor place; what there is nothing to say of is absent."""
    found = client.lookup(RULES, namespace="plain")
    assert (found.text, found.cached_characters) == (None, None)
    with grpc.insecure_channel(paper.address) as channel:
        prompt = prompt_pb2.Prompt(text=RULES)
        response = cache_pb2_grpc.CacheServiceStub(channel).Lookup(cache_pb2.LookupRequest(prompt=prompt))
    assert [response.HasField(name) for name in ("cached_tokens", "alternative_tokens", "text")] == [True, False, False]


def test_bad_prompts_are_refused_with_text_as_without(client: Client) -> None:
    """Nothing that cannot be a prompt has a place in its text."""
    for prompt in ("", [], [999]):
        with pytest.raises(InvalidArgument):
            client.lookup(prompt, with_text=True)
    without = bytewise()
    without.chat_template = None
    with (
        RunningServer(PaperEngine(tokenizer=Tokenizer(without, BYTEWISE_SIZE))) as server,
        Client(server.address) as other,
        pytest.raises(FailedPrecondition, match="no chat template"),
    ):
        other.lookup([{"role": "user", "content": "hi"}], with_text=True)


async def test_looking_up_the_place_with_asyncio(paper: RunningServer) -> None:
    """The asyncio client says the same."""
    async with AsyncClient(paper.address) as client:
        await client.generate(RULES + "a", max_tokens=1, namespace="asyncio")
        found = await client.lookup(RULES + "b", namespace="asyncio", with_text=True)
    assert (found.text, found.cached_characters) == (RULES + "b", len(RULES))
