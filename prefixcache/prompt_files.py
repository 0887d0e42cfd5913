"""Files of prompts: one JSON value per line (JSONL).

    "You are a helpful assistant."
    {"prompt": "Once upon a time", "id": "tale"}
    {"prompt": [17, 2041, 9], "namespace": "team-a"}
    {"messages": [{"role": "system", "content": "..."}], "tools": [...], "priority": 90}

Empty lines mean nothing. A line that cannot be used is handed out as what is wrong with
it, so that one mistake in a long file costs one prompt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from prefixcache.requests import Prompt
from prefixcache.terms import MAX_PRIORITY

KEYS = (
    *("prompt", "messages", "tools", "add_generation_prompt"),
    *("id", "namespace", "ttl_seconds", "priority", "session", "tenant"),
)


@dataclass(frozen=True, slots=True)
class FilePrompt:
    """A prompt and what its line says of it; `line` counts from 1. None and "" where it says nothing.

    `tenant` says whose it is, in a file that a server reads for many.
    """

    line: int
    prompt: Prompt
    tools: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    id: str = ""
    namespace: str = ""
    ttl: float | None = None
    priority: int | None = None
    session: str = ""
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no prompt, and why; `id` if it gives one all the same."""

    line: int
    reason: str
    id: str = ""


def read_prompts(lines: Iterable[bytes], *, ignore_others: bool = False) -> Iterator[FilePrompt | BadLine]:
    """Yield what each line says, as it is read. Keys not in KEYS are mistakes, unless they are to be ignored."""
    for number, data in enumerate(lines, 1):
        text = data.removeprefix(b"\xef\xbb\xbf") if number == 1 else data
        if not text.strip():
            continue
        value: object = None
        try:
            value = json.loads(text.decode(), parse_constant=_refuse_constant)
            yield _read(number, value, ignore_others)
        except RecursionError:
            yield BadLine(number, "it is nested too deeply")
        except UnicodeDecodeError as error:
            yield BadLine(number, f"it is not UTF-8 text: byte {error.start} cannot be read")
        except json.JSONDecodeError as error:
            yield BadLine(number, f"it is not JSON: {error.msg} at character {error.colno}")
        except ValueError as error:
            name = value.get("id") if isinstance(value, dict) else None
            yield BadLine(number, str(error), name if isinstance(name, str) else "")


def _read(line: int, value: object, ignore_others: bool) -> FilePrompt:
    if isinstance(value, str):
        return FilePrompt(line, _prompt(value))
    if not isinstance(value, dict):
        raise ValueError('it must be a JSON string, or an object with "prompt" or "messages"')
    others = [key for key in value if key not in KEYS]
    if others and not ignore_others:
        raise ValueError(f"the key {others[0]!r} has no meaning here; there are {', '.join(KEYS)}")
    if ("prompt" in value) == ("messages" in value):
        raise ValueError('give either "prompt" or "messages"')
    prompt = _prompt(value["prompt"]) if "prompt" in value else _messages(value["messages"])
    chat = "messages" in value or (bool(prompt) and isinstance(prompt[0], Mapping))
    for key in ("tools", "add_generation_prompt"):
        if value.get(key) is not None and not chat:
            raise ValueError(f'"{key}" belongs to messages')
    return FilePrompt(
        line,
        prompt,
        tools=_tools(value.get("tools")),
        add_generation_prompt=_of_type(value, "add_generation_prompt", bool, None, "true or false"),
        id=_of_type(value, "id", str, "", "a string"),
        namespace=_of_type(value, "namespace", str, "", "a string"),
        ttl=_seconds(value.get("ttl_seconds")),
        priority=_priority(value.get("priority")),
        session=_of_type(value, "session", str, "", "a string"),
        tenant=_of_type(value, "tenant", str, "", "a string"),
    )


def _prompt(value: object) -> Prompt:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value:
        if all(type(token) is int for token in value):
            return value
        if isinstance(value[0], dict):
            return _messages(value)
    raise ValueError("the prompt must be text, a list of token ids or a list of messages, and not be empty")


def _messages(value: object) -> Sequence[Mapping[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise ValueError('"messages" must be a list of objects such as {"role": "user", "content": "..."}')
    return value


def _tools(value: object) -> Sequence[Mapping[str, Any]] | None:
    if value is not None and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise ValueError('"tools" must be a list of objects')
    return value


def _of_type(value: Mapping[str, Any], key: str, kind: type, default: Any, wanted: str) -> Any:
    given = value.get(key)
    if given is None:
        return default
    if not isinstance(given, kind):
        raise ValueError(f'"{key}" must be {wanted}')
    return given


def _seconds(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError('"ttl_seconds" must be a number above 0')
    return float(value)


def _priority(value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_PRIORITY:
        raise ValueError(f'"priority" must be a whole number from 0 to {MAX_PRIORITY}')
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
