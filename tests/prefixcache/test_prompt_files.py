"""Files of prompts: every form of a line, and what is said of those that are none."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from prefixcache.prompt_files import BadLine, FilePrompt, read_prompts


def read(*lines: str | bytes, ignore_others: bool = False) -> list[FilePrompt | BadLine]:
    data = [line.encode() if isinstance(line, str) else line for line in lines]
    return list(read_prompts([line + b"\n" for line in data], ignore_others=ignore_others))


def test_every_form_of_a_prompt() -> None:
    """Text, token ids and messages, bare or with what else is to be said of them."""
    turns = [{"role": "user", "content": "hello"}]
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert read(
        '"plain text"',
        '{"prompt": "text", "id": "a", "namespace": "team", "ttl_seconds": 60, "priority": 0, "session": "s"}',
        '{"prompt": [1, 2, 3]}',
        json.dumps({"prompt": turns}),
        json.dumps({"messages": turns, "tools": tools, "add_generation_prompt": False}),
    ) == [
        FilePrompt(1, "plain text"),
        FilePrompt(2, "text", id="a", namespace="team", ttl=60.0, priority=0, session="s"),
        FilePrompt(3, [1, 2, 3]),
        FilePrompt(4, turns),
        FilePrompt(5, turns, tools=tools, add_generation_prompt=False),
    ]


def test_null_is_as_good_as_nothing() -> None:
    """A program that writes every key need not leave any out."""
    line = '{"prompt": "p", "tools": null, "id": null, "namespace": null, "ttl_seconds": null, "priority": null}'
    assert read(line) == [FilePrompt(1, "p")]


def test_empty_lines_and_a_byte_order_mark_mean_nothing() -> None:
    """Lines are counted as an editor counts them."""
    assert read(b"\xef\xbb\xbf" + b'"a"', "", "   ", '"b"\r') == [FilePrompt(1, "a"), FilePrompt(4, "b")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("You are", "not JSON"),
        ('{"prompt": "a"', "not JSON"),
        ("[1, 2]", "must be a JSON string, or an object"),
        ("17", "must be a JSON string, or an object"),
        ('""', "not be empty"),
        ('{"prompt": []}', "not be empty"),
        ('{"prompt": [1, "a"]}', "token ids"),
        ('{"prompt": [true]}', "token ids"),
        ('{"prompt": 5}', "token ids"),
        ("{}", 'either "prompt" or "messages"'),
        ('{"prompt": "a", "messages": [{"role": "user"}]}', 'either "prompt" or "messages"'),
        ('{"messages": []}', "list of objects such as"),
        ('{"messages": ["hello"]}', "list of objects such as"),
        ('{"prompt": [{"role": "user"}, "hello"]}', "list of objects such as"),
        ('{"prompt": "a", "tools": []}', '"tools" belongs to messages'),
        ('{"messages": [{"role": "user"}], "tools": ["look"]}', '"tools" must be'),
        ('{"messages": [{"role": "user"}], "add_generation_prompt": 1}', "true or false"),
        ('{"prompt": "a", "id": 5}', '"id" must be a string'),
        ('{"prompt": "a", "namespace": []}', '"namespace" must be a string'),
        ('{"prompt": "a", "namesapce": "b"}', "'namesapce' has no meaning here"),
        ('{"prompt": "a", "ttl_seconds": 0}', "above 0"),
        ('{"prompt": "a", "ttl_seconds": "60"}', "above 0"),
        ('{"prompt": "a", "ttl_seconds": 1e999}', "above 0"),
        ('{"prompt": "a", "ttl_seconds": NaN}', "NaN is not JSON"),
        ('{"prompt": "a", "priority": 101}', "from 0 to 100"),
        ('{"prompt": "a", "priority": 1.5}', "from 0 to 100"),
        (b'"\xff"', "not UTF-8 text: byte 1"),
        ('{"prompt": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_a_line_that_is_no_prompt_says_why_and_costs_only_itself(line: str | bytes, reason: str) -> None:
    """The lines around it are read."""
    first, bad, last = read('"first"', line, '"last"')
    assert (first, last) == (FilePrompt(1, "first"), FilePrompt(3, "last"))
    assert isinstance(bad, BadLine) and bad.line == 2
    assert reason in bad.reason


def test_a_bad_line_keeps_its_name() -> None:
    """Whoever gave it can tell which it was."""
    (bad,) = read('{"prompt": "", "id": "greeting"}')
    assert isinstance(bad, BadLine) and bad.id == "greeting"


def test_other_keys_can_be_ignored() -> None:
    """Logs of requests hold more than prompts."""
    line = '{"messages": [{"role": "user", "content": "a"}], "model": "m", "temperature": 0.5}'
    assert isinstance(read(line)[0], BadLine)
    assert read(line, ignore_others=True) == [FilePrompt(1, [{"role": "user", "content": "a"}])]


def test_lines_are_read_as_they_are_asked_for() -> None:
    """A file of any size, or a pipe that has no end."""

    def endless() -> Iterator[bytes]:
        while True:
            yield b'"again"\n'

    prompts = read_prompts(endless())
    assert [next(prompts) for _ in range(3)] == [FilePrompt(n, "again") for n in (1, 2, 3)]
