"""Reading prompts in the forms in which clients send them, and putting them together again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefixcache.doctor import Pieces, Prompt, prompt_from, read_prompts, sendable
from prefixcache.errors import InvalidArgument

CALL = {"id": "call_7f9c2ba4", "type": "function", "function": {"name": "find", "arguments": '{"what": "bike"}'}}
CHAT: dict[str, Any] = {
    "model": "served",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "none", "tool_call_id": "call_7f9c2ba4", "name": "find"},
    ],
    "tools": [{"type": "function", "function": {"name": "find"}}],
}
FORMS: list[Any] = [
    "plain text\nof two lines",
    {"prompt": "text", "max_tokens": 5},
    {"prompt": [{"role": "user", "content": "Hello"}]},
    {"prompt": [5, 6, 7]},
    CHAT,
    {"system": "Be brief.", "messages": [{"role": "user", "content": "Hello"}]},
    {"custom_id": "7", "body": CHAT},
    {"body": {"prompt": [5, 6]}},
]


def read(text: str, name: str = "prompts.jsonl") -> list[Prompt]:
    return list(read_prompts(Path(name), text.encode(), Pieces()))


@pytest.mark.parametrize("source", FORMS, ids=lambda source: json.dumps(source)[:40])
def test_what_is_read_can_be_put_together_again(source: Any) -> None:
    """Every form comes back as it was from its own pieces; what is not a prompt in it is left alone."""
    prompt = prompt_from(source, Pieces(), "")
    assert prompt.rewritten(prompt.pieces) == source


def test_a_chat_is_read_in_the_order_in_which_models_read_it() -> None:
    """Tools first, then the messages with everything in them, each part under its name."""
    prompt = prompt_from(CHAT, Pieces(), "")
    fields = [piece.kind.removeprefix("field ") for piece in prompt.pieces if piece.is_field]
    assert fields == ["tool", "system", "user", "user", "assistant", "calls", "tool result", "name", "tool_call_id"]


def test_a_tool_that_would_be_no_json_stays_as_it_was() -> None:
    """A number in a schema cannot be replaced by a name in brackets."""
    pieces = Pieces()
    source = {"messages": [{"role": "user", "content": "x"}], "tools": [{"maximum": 17}]}
    prompt = prompt_from(source, pieces, "")
    broken = [piece if piece.kind != "number" else pieces.of_text("[")[0] for piece in prompt.pieces]
    assert prompt.rewritten(broken) == source


@pytest.mark.parametrize(
    ("source", "prompt", "tools"),
    [
        ("text", "text", None),
        ({"prompt": [1, 2]}, [1, 2], None),
        (
            {"system": "Be brief.", "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]},
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
            None,
        ),
        (
            {"body": {"prompt": [{"role": "user", "content": "x"}], "tools": [{"name": "find"}]}},
            [{"role": "user", "content": "x"}],
            [{"name": "find"}],
        ),
    ],
)
def test_every_form_can_be_sent(source: Any, prompt: Any, tools: Any) -> None:
    """A client takes text, token ids, or messages whose content is text."""
    assert sendable(source) == (prompt, tools)


def test_a_file_has_a_prompt_per_line() -> None:
    """Empty lines and a byte order mark mean nothing; prompts are named by file and line."""
    prompts = list(read_prompts(Path("p.jsonl"), b'\xef\xbb\xbf"one"\n\n{"prompt": "two"}\r\n', Pieces()))
    assert [prompt.name for prompt in prompts] == ["p.jsonl, line 1", "p.jsonl, line 3"]
    assert [prompt.source for prompt in prompts] == ["one", {"prompt": "two"}]


def test_a_file_of_text_is_one_prompt() -> None:
    """Its lines are those of the prompt."""
    (prompt,) = read("one\ntwo\n", "prompt.txt")
    assert (prompt.name, prompt.source) == ("prompt.txt", "one\ntwo\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 2 is not JSON"),
        ('{"a": ', "line 2 is not JSON"),
        ("7", "a prompt is a JSON string or object, not a number"),
        ("[]", "not a list"),
        ('""', "the prompt is empty"),
        ("{}", "neither prompt nor messages"),
        ('{"prompt": 5}', "prompt must be text, token ids or messages, not a number"),
        ('{"prompt": []}', "messages or token ids, at least one"),
        ('{"prompt": [1, -2]}', "messages or token ids"),
        ('{"prompt": [1, "a"]}', "messages or token ids"),
        ('{"messages": {}}', "messages must be a list, not an object"),
        ('{"messages": []}', "the prompt is empty"),
        ('{"messages": ["hello"]}', "messages[0] must be an object with role and content, not a string"),
        ('{"messages": [{"role": "user", "content": 5}]}', "messages[0].content must be a list, not a number"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "only text can be looked at"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": "find"}', "tools must be a list"),
        ("[" * 100_000, "line 2 is nested too deeply"),
    ],
)
def test_what_is_no_prompt_is_refused_with_its_line(line: str, message: str) -> None:
    """The error says where it is and what is wrong."""
    with pytest.raises(InvalidArgument) as caught:
        read(f'"fine"\n{line}\n')
    assert "prompts.jsonl, line 2" in str(caught.value)
    assert message in str(caught.value)


def test_bytes_that_are_no_text_are_refused() -> None:
    """With the place at which they are."""
    with pytest.raises(InvalidArgument, match=r"stdin is not UTF-8 text: byte 3 cannot be read"):
        list(read_prompts(None, b'"a\n\xff"', Pieces()))
