"""Answers that are right only if the right prefix was used: what a wrong one would change, and would be seen by."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from random import Random

import pytest

from engine.embedded.desks import DESKS
from engine.embedded.dialogues import Conversation, draw_sheet, messages_of
from engine.embedded.values import Source
from prefixcache import sample
from prefixcache.client import Client
from prefixcache.results import Completion
from tests.engine.serving import RunningServer
from tests.serving import command, environment

BLOCK_BYTES = 16 * 4 * 2 * 256 * 4
"""16 tokens, 4 layers, keys and values of 256 numbers in float32."""
SHEET = (
    "You answer questions at the shop desk of Elwick.\n\nPrice list:\n"
    "- Korwood sofa: price {price} euros; shelf W 32\n- Berigan stool: price 61.10 euros; shelf E 77\n"
    "- Palena rack: price 55.25 euros; shelf U 57\n- Quinmont kettle: price 84.60 euros; shelf K 39\n"
    "- Danbury bowl: price 60.40 euros; shelf K 64\n- Selira kettle: price 41.75 euros; shelf W 95\n"
    "\nThe desk: opening time 7:56; closing time 18:20"
)
QUESTION = "How much is the Korwood sofa?"
QUESTIONS = (QUESTION, "What does the Korwood sofa cost?", "What is the price of the Korwood sofa?")
PRICES = ("60.75", "31.25")
"""Two prices of as many tokens; nothing else on the sheet differs."""


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with RunningServer(cache_memory="32MiB", threads=2) as server:
        yield server
        server.check()


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


def ask(client: Client, price: str, question: str = QUESTION, **options: object) -> Completion:
    messages = [
        {"role": "system", "content": SHEET.format(price=price)},
        {"role": "user", "content": question},
    ]
    return client.generate(messages, max_tokens=24, timeout=60, **options)  # type: ignore[arg-type]


def test_two_sheets_that_differ_in_one_fact_early_on(client: Client) -> None:
    """Each gives its own answer, cold, from the cache, and when the other one is cached as well."""
    lengths = {len(client.tokenize(SHEET.format(price=price))) for price in PRICES}
    assert len(lengths) == 1
    for _ in range(3):
        for price, other in (PRICES, PRICES[::-1]):
            answer = ask(client, price, namespace="one")
            assert price in answer.text and other not in answer.text
    warm = ask(client, PRICES[0], namespace="one")
    assert warm.usage.cached_tokens == warm.usage.prompt_tokens - 1
    second = ask(client, PRICES[1], "What does the Korwood sofa cost?", namespace="one")
    assert PRICES[1] in second.text
    assert lengths.pop() <= second.usage.cached_tokens < second.usage.prompt_tokens


def test_in_two_namespaces(client: Client) -> None:
    """What one tenant's sheet says is never the answer to another's question, though both are cached."""
    for _ in range(2):
        for namespace, price in zip(("red", "blue"), PRICES, strict=True):
            assert price in ask(client, price, namespace=namespace).text
    first = ask(client, PRICES[0], namespace="blue")
    assert PRICES[0] in first.text
    assert first.usage.cached_tokens < first.usage.prompt_tokens // 2


def test_under_eviction_pressure() -> None:
    """In a pool with room for less than two sheets, in which every answer evicts something."""
    with (
        RunningServer(cache_memory=str(28 * BLOCK_BYTES), threads=2) as server,
        Client(server.address) as client,
    ):
        assert client.stats().blocks.total == 28
        cached = 0
        for number in range(24):
            price = PRICES[number * 7 % 5 % 2]
            question = (QUESTION, "And the price of the Korwood sofa?", "What is the price of the Korwood sofa?")[
                number % 3
            ]
            answer = ask(client, price, question)
            cached += answer.usage.cached_tokens
            assert price in answer.text
        server.check()
        assert server.stats().cache.evicted > 0
        assert cached > 0


def test_answers_are_the_same_from_the_cache(client: Client) -> None:
    """Held-out dialogues: the same tokens cold and warm, and nearly all of them right."""
    right = asked = 0
    for number in range(8):
        source = Source(Random(f"test {number}"), held_out=True)
        sheet = draw_sheet(source, 800 + 400 * number)
        turns = Conversation(source, sheet).turns(3)
        for index, turn in enumerate(turns):
            messages = [*messages_of(sheet, turns[:index]), *turn.messages[:-1]]
            tools = {"tools": sheet.tools} if sheet.tools else {}
            cold = client.generate(messages, max_tokens=64, read_cache=False, store_cache=False, **tools)  # type: ignore[arg-type]
            warm = [client.generate(messages, max_tokens=64, **tools) for _ in range(2)]  # type: ignore[arg-type]
            assert warm[0].token_ids == warm[1].token_ids == cold.token_ids
            assert warm[1].usage.cached_tokens == warm[1].usage.prompt_tokens - 1
            right += cold.text == turn.answer
            asked += 1
    assert right >= 0.9 * asked


def test_the_sample_is_answered(client: Client) -> None:
    """What the examples and `prefixcache chat` begin with: right, and from the cache from the second one on."""
    facts = sample.facts()
    messages = [{"role": "system", "content": sample.sheet()}]
    expected = (
        facts["Korwood sofa"]["price"],
        facts["Korwood sofa"]["shelf"],
        facts["Dalland kettle"]["shelf"],
        facts["The desk"]["closing time"],
        "not in my notes",
    )
    for number, (question, fact) in enumerate(zip(sample.QUESTIONS, expected, strict=True)):
        messages.append({"role": "user", "content": question})
        answer = client.generate(messages, max_tokens=32, namespace="sample")
        messages.append({"role": "assistant", "content": answer.text})
        assert fact in answer.text
        assert number == 0 or answer.usage.cached_tokens > 1200


def test_chat_brings_the_sample(server: RunningServer) -> None:
    """`prefixcache chat` without a system prompt: there is one to ask about, and it stays cached."""
    turns = "/system\nHow much is the Korwood sofa?\nAnd on which shelf is it?\n"
    chat = command("chat", "--namespace", "chat", "--address", server.address)
    result = subprocess.run(chat, input=turns, env=environment(), capture_output=True, text=True, check=True)
    assert sample.sheet() in result.stderr
    first, second = result.stdout.splitlines()
    assert "60.75 euros" in first and "W 32" in second
    costs = re.findall(r"([\d,]+) prompt tokens = ([\d,]+) cached", result.stderr)
    assert [int(cached.replace(",", "")) > 1200 for _, cached in costs] == [False, True]


def test_every_desk_can_be_asked_in_every_layout(client: Client) -> None:
    """The first question about a short sheet, of each kind that there is."""
    right = 0
    cases = [(desk, layout) for desk in DESKS for layout in ("list", "sentences")]
    for desk, layout in cases:
        source = Source(Random(f"{desk.name} {layout}"), held_out=True)
        sheet = draw_sheet(source, 500, desk, layout)
        (turn,) = Conversation(source, sheet).turns(1)
        tools = {"tools": sheet.tools} if sheet.tools else {}
        answer = client.generate([*messages_of(sheet, ()), *turn.messages[:-1]], max_tokens=64, **tools)  # type: ignore[arg-type]
        right += answer.text == turn.answer
    assert right >= len(cases) - 1
