"""Prompts as clients send them, or as shapes, and the parts they consist of.

A prompt in a file is a JSON string, or an object with `prompt` (text, token ids or
messages) or `messages` (with `tools`, and `system` where that is a field of its own); an
object may wrap another one as its `body`. A `namespace` in it keeps it apart from
others, everything else is left alone. Its parts are the texts in it, in the order in
which a model reads them: tools first, then the messages.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixcache.doctor.pieces import TOKEN, Piece, Pieces
from prefixcache.errors import InvalidArgument

TEXT = "text"
TOOL = "tool"
CALLS = "calls"
FIELDS = {
    **{role: role for role in ("system", "developer", "user", "assistant")},
    "tool": "tool result",
    "function": "tool result",
}
"""What the content of a message is called, by the role of who speaks."""
JSON_LINES = (".jsonl", ".ndjson", ".json")

Visit = Callable[[str, str], str]
"""Takes the name of a field and its text; returns the text to put there."""


@dataclass(slots=True)
class Prompt:
    """A prompt, its pieces, and how many characters it has.

    `source` is what was read, None for a shape; `name` says where. `prompt_tokens` and
    `cached_tokens` are the server's counts, where it was the server that told of it.
    """

    name: str
    pieces: list[Piece]
    characters: int
    source: Any = None
    namespace: str = ""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None

    def rewritten(self, pieces: Sequence[Piece]) -> Any:
        """Return the source with the text of other pieces, whose fields are the same."""
        if self.pieces[0].kind == TOKEN:
            return _with_tokens(self.source, [piece.hash for piece in pieces])
        texts: list[str] = []
        start = 1
        for end in [i for i, piece in enumerate(pieces) if piece.is_field][1:] + [len(pieces)]:
            texts.append("".join([piece.text or "" for piece in pieces[start:end]]))
            start = end + 1
        remaining = iter(texts)
        return _walk(self.source, lambda field, text: next(remaining))


def prompt_from(source: Any, pieces: Pieces, name: str) -> Prompt:
    """Return what a line of a file says. Raises InvalidArgument if that is no prompt."""
    namespace = _namespace(source)
    ids = _token_ids(source)
    if ids is not None:
        return Prompt(name, pieces.of_tokens(ids), 0, source, namespace)
    found: list[Piece] = []
    characters = 0
    for field, text in fields_of(source):
        characters += len(text)
        found.append(pieces.field(field))
        found += pieces.of_text(text)
    if not characters:
        raise InvalidArgument("the prompt is empty")
    return Prompt(name, found, characters, source, namespace)


def prompt_from_shape(shape: Sequence[tuple[int, str, int]], pieces: Pieces, name: str, namespace: str) -> Prompt:
    """Return the prompt with pieces of which only (hash, kind, length) are known."""
    return Prompt(name, pieces.of_shape(shape), sum(length for _, _, length in shape), namespace=namespace)


def fields_of(source: Any) -> Iterator[tuple[str, str]]:
    """Return the parts of a prompt, each with the name of its field, in reading order."""
    fields: list[tuple[str, str]] = []

    def collect(field: str, text: str) -> str:
        fields.append((field, text))
        return text

    _walk(source, collect)
    return iter(fields)


def read_prompts(place: Path | None, data: bytes, pieces: Pieces) -> Iterator[Prompt]:
    """Yield the prompts in the bytes of a file, or of stdin (`place` None).

    One per line if it is stdin or its name ends in .jsonl, .ndjson or .json; otherwise
    the file is one prompt. Raises InvalidArgument, with the number of the line.
    """
    name = "stdin" if place is None else str(place)
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{name} is not UTF-8 text: byte {error.start} cannot be read") from None
    if place is not None and place.suffix not in JSON_LINES:
        yield _named(text, pieces, name)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _named(_parsed(line, f"{name}, line {number}"), pieces, f"{name}, line {number}")


def sendable(source: Any) -> tuple[Any, Sequence[Mapping[str, Any]] | None]:
    """Return a source as the prompt and the tools that a client takes."""
    if isinstance(source, str):
        return source, None
    if "body" in source:
        return sendable(source["body"])
    prompt = source.get("prompt")
    if isinstance(prompt, str) or (prompt and not isinstance(prompt[0], dict)):
        return prompt, None
    messages = [{**turn, "content": _joined(turn.get("content"))} for turn in prompt or source["messages"]]
    if source.get("system"):
        messages.insert(0, {"role": "system", "content": _joined(source["system"])})
    return messages, source.get("tools") or None


def _named(source: Any, pieces: Pieces, name: str) -> Prompt:
    try:
        return prompt_from(source, pieces, name)
    except InvalidArgument as error:
        raise InvalidArgument(f"{name}: {error}") from None


def _parsed(line: str, name: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise InvalidArgument(
            f"{name} is not JSON ({error}): write each prompt on a line of its own, as a JSON string or as an object "
            'such as {"messages": [...]}; plain text belongs into a file whose name ends in .txt'
        ) from None
    except RecursionError:
        raise InvalidArgument(f"{name} is nested too deeply") from None


def _namespace(source: Any) -> str:
    if not isinstance(source, dict):
        return ""
    if isinstance(source.get("body"), dict):
        return _namespace(source["body"])
    namespace = source.get("namespace", "")
    return namespace if isinstance(namespace, str) else ""


def _token_ids(source: Any) -> list[int] | None:
    """Return the token ids that a source is, or None if it is something else."""
    if not isinstance(source, dict):
        return None
    if isinstance(source.get("body"), dict):
        return _token_ids(source["body"])
    ids = source.get("prompt")
    if not isinstance(ids, list) or (ids and isinstance(ids[0], dict)):
        return None
    if not ids or not all(type(token) is int and 0 <= token < 2**32 for token in ids):
        raise InvalidArgument("prompt is a list, so it must hold messages or token ids, at least one")
    return ids


def _with_tokens(source: Any, ids: list[int]) -> Any:
    if "body" in source:
        return {**source, "body": _with_tokens(source["body"], ids)}
    return {**source, "prompt": ids}


def _walk(source: Any, visit: Visit) -> Any:
    """Show every part of a prompt to `visit`, in reading order; return it with the texts that it returns."""
    if isinstance(source, str):
        return visit(TEXT, source)
    if not isinstance(source, dict):
        raise InvalidArgument(f"a prompt is a JSON string or object, not {_kind_of(source)}")
    if "body" in source:
        return {**source, "body": _walk(source["body"], visit)}
    prompt = source.get("prompt")
    if isinstance(prompt, str):
        return {**source, "prompt": visit(TEXT, prompt)}
    if prompt is not None and not isinstance(prompt, list):
        raise InvalidArgument(f"prompt must be text, token ids or messages, not {_kind_of(prompt)}")
    key = "messages" if prompt is None else "prompt"
    if source.get(key) is None:
        raise InvalidArgument("the object has neither prompt nor messages")
    changed = dict(source)
    if source.get("tools"):
        changed["tools"] = [_object(tool, TOOL, visit) for tool in _list(source["tools"], "tools")]
    if source.get("system"):
        changed["system"] = _content(source["system"], "system", visit, "system")
    messages = _list(source[key], key)
    changed[key] = [_message(message, f"{key}[{index}]", visit) for index, message in enumerate(messages)]
    return changed


def _message(message: Any, place: str, visit: Visit) -> Any:
    if not isinstance(message, dict):
        raise InvalidArgument(f"{place} must be an object with role and content, not {_kind_of(message)}")
    changed = dict(message)
    field = FIELDS.get(str(message.get("role")), "other")
    changed["content"] = _content(message.get("content"), field, visit, place)
    if message.get("tool_calls"):
        calls = _list(message["tool_calls"], f"{place}.tool_calls")
        changed["tool_calls"] = [_object(call, CALLS, visit) for call in calls]
    for name in ("name", "tool_call_id"):
        if isinstance(message.get(name), str):
            changed[name] = visit(name, message[name])
    return changed


def _content(content: Any, field: str, visit: Visit, place: str) -> Any:
    if content is None:
        visit(field, "")
        return None
    if isinstance(content, str):
        return visit(field, content)
    changed = []
    for part in _list(content, f"{place}.content"):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            changed.append({**part, "text": visit(field, part["text"])})
        else:
            raise InvalidArgument(f"{place}.content has a part without text; only text can be looked at")
    return changed


def _object(value: Any, field: str, visit: Visit) -> Any:
    """Show an object as JSON with the keys in their order. What comes back and is no JSON leaves it as it is."""
    text = visit(field, json.dumps(value, ensure_ascii=False))
    try:
        return json.loads(text)
    except ValueError:
        return value


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidArgument(f"{place} must be a list, not {_kind_of(value)}")
    return value


def _joined(content: Any) -> Any:
    """Return the text of a content that may be a list of texts."""
    return "".join(part["text"] for part in content) if isinstance(content, list) else content


def _kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
