"""What a client sends: prompts and options as protocol messages.

A prompt is text, a sequence of token ids, or a list of messages such as
{"role": "user", "content": "..."}. What cannot be sent raises InvalidArgument here,
before it goes anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from google.protobuf.duration_pb2 import Duration

from prefixcache.errors import InvalidArgument
from prefixcache.v1 import cache_pb2, generation_pb2, prompt_pb2

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


class GenerateOptions(TypedDict, total=False):
    """How to generate. What is absent or None is left to the server's default; see Sampling in the protocol."""

    max_tokens: int | None
    """The most tokens to generate; as many as fit by default."""
    temperature: float | None
    """0, the default, is greedy."""
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    """The same seed, prompt and options give the same tokens."""
    stop: str | Sequence[str] | None
    """Stop before any of these strings."""
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    logprobs: int | None
    """Report log-probabilities of the chosen token and of this many of the most probable ones."""
    tools: Sequence[Mapping[str, Any]] | None
    """Tools the model may call; with messages only."""
    add_generation_prompt: bool | None
    """With messages only: render the header of the next assistant turn. True by default."""
    model: str | None
    request_id: str | None
    namespace: str | None
    """Prompts in different namespaces never share cached blocks."""
    read_cache: bool | None
    """Reuse cached blocks. True by default."""
    store_cache: bool | None
    """Keep what is computed for later requests. True by default."""
    ttl: float | None
    """Seconds that what this request uses and stores is kept, if it is not evicted before."""
    ttl_mode: Literal["sliding", "fixed"] | None
    """Whether every use starts the time to live anew (by default), or nothing does."""
    priority: int | None
    """0 to 100: lower ones are evicted first. 50 by default."""
    session_id: str | None
    """The chat or run it belongs to; what only that has used goes first when it ends."""
    keep_for: float | None
    """With a session: seconds that its blocks are kept for its next request, such as while a tool runs."""
    end_session_on_disconnect: bool | None
    """With a session: end it if this call ends before the answer is complete."""
    timeout: float | None
    """Seconds for the whole call; none by default."""


# Those that are fields of Sampling by the same name.
_SAMPLING = (
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop_token_ids", "ignore_eos"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs"),
)

_TTL_MODES = {"sliding": prompt_pb2.TTL_MODE_SLIDING, "fixed": prompt_pb2.TTL_MODE_FIXED}


def generate_request(prompt: Prompt, options: GenerateOptions) -> generation_pb2.GenerateRequest:
    unknown = options.keys() - GenerateOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"there is no option {sorted(unknown)[0]!r}; see GenerateOptions")
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    sampling = {name: given[name] for name in _SAMPLING if name in given}
    if "stop" in given:
        stop = given["stop"]
        sampling["stop"] = [stop] if isinstance(stop, str) else list(stop)
    message = prompt_message(prompt, given.get("tools"), given.get("add_generation_prompt"))
    try:
        return generation_pb2.GenerateRequest(
            model=given.get("model", ""),
            prompt=message,
            sampling=generation_pb2.Sampling(**sampling),
            cache=_cache_control(given),
            request_id=given.get("request_id", ""),
        )
    except ValueError as error:  # a number out of its type's range, or half a character
        raise InvalidArgument(f"an option cannot be sent: {error}") from error


def _cache_control(given: Mapping[str, Any]) -> prompt_pb2.CacheControl:
    control = cache_control(given.get("namespace"), given.get("ttl"), given.get("priority"), given.get("session_id"))
    for field, option in (("read", "read_cache"), ("store", "store_cache")):
        if option in given:
            setattr(control, field, given[option])
    mode = given.get("ttl_mode")
    if mode is not None and mode not in _TTL_MODES:
        raise InvalidArgument(f"ttl_mode cannot be {mode!r}; it is one of {', '.join(_TTL_MODES)}")
    control.ttl_mode = prompt_pb2.TTL_MODE_UNSPECIFIED if mode is None else _TTL_MODES[mode]
    if "keep_for" in given:
        set_seconds(control.keep_for, given["keep_for"])
    control.end_session_on_disconnect = given.get("end_session_on_disconnect", False)
    return control


def pin_request(
    prompt: Prompt,
    pin_id: str,
    namespace: str,
    ttl: float | None,
    cached_only: bool,
    published: bool,
    tools: Sequence[Mapping[str, Any]] | None,
) -> cache_pb2.PinRequest:
    request = cache_pb2.PinRequest(
        prompt=prompt_message(prompt, tools),
        namespace=namespace,
        pin_id=pin_id,
        cached_only=cached_only,
        published=published,
    )
    if ttl is not None:
        set_seconds(request.ttl, ttl)
    return request


def invalidate_request(
    prefix: Prompt | None,
    session_id: str | None,
    namespace: str,
    whole_namespace: bool,
    everything: bool,
    tools: Sequence[Mapping[str, Any]] | None,
) -> cache_pb2.InvalidateRequest:
    """Return what is to be forgotten. Raises InvalidArgument unless it is exactly one thing."""
    if (prefix is not None) + (session_id is not None) + whole_namespace + everything != 1:
        raise InvalidArgument("name exactly one of prefix, session_id, whole_namespace and everything")
    request = cache_pb2.InvalidateRequest(namespace=namespace)
    if prefix is not None:
        chat = not isinstance(prefix, str) and len(prefix) > 0 and isinstance(prefix[0], Mapping)
        request.prefix.CopyFrom(prompt_message(prefix, tools, False if chat else None))
    elif session_id is not None:
        request.session_id = session_id
    elif whole_namespace:
        request.whole_namespace = True
    else:
        request.everything = True
    return request


def set_seconds(duration: Duration, seconds: float) -> None:
    """Set a duration of the protocol. Raises InvalidArgument if it cannot hold so many."""
    try:
        duration.FromNanoseconds(round(seconds * 1e9))
    except (ValueError, OverflowError, TypeError) as error:
        raise InvalidArgument(f"{seconds!r} is no number of seconds that can be sent: {error}") from None


def cache_control(
    namespace: str | None, ttl: float | None, priority: int | None, session_id: str | None
) -> prompt_pb2.CacheControl:
    """Return where and how long something is kept; `ttl` is in seconds."""
    try:
        control = prompt_pb2.CacheControl(namespace=namespace or "", priority=priority, session_id=session_id or "")
    except ValueError as error:  # a number out of its type's range, or half a character
        raise InvalidArgument(f"an option cannot be sent: {error}") from error
    if ttl is not None:
        set_seconds(control.ttl, ttl)
    return control


def prompt_message(
    prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None = None, add_generation_prompt: bool | None = None
) -> prompt_pb2.Prompt:
    chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
    if not chat and (tools is not None or add_generation_prompt is not None):
        raise InvalidArgument("tools and add_generation_prompt belong to messages; send the prompt as messages")
    try:
        if isinstance(prompt, str):
            return prompt_pb2.Prompt(text=prompt)
        if not chat:
            return prompt_pb2.Prompt(token_ids=prompt_pb2.TokenIds(ids=prompt))  # type: ignore[arg-type]  # no chat
        return prompt_pb2.Prompt(
            messages=prompt_pb2.Chat(
                messages=[_message(turn, position) for position, turn in enumerate(prompt)],
                tools=[_json(tool) for tool in tools or ()],
                add_generation_prompt=add_generation_prompt,
            )
        )
    except ValueError as error:
        raise InvalidArgument(f"the prompt cannot be sent: {error}") from error


def _message(turn: object, position: int) -> prompt_pb2.Message:
    if not isinstance(turn, Mapping):
        raise InvalidArgument(f"message {position} is a {type(turn).__name__}; every message must be a dict")
    fields = dict(turn)
    content = fields.pop("content", None)
    if content is not None and not isinstance(content, str):
        raise InvalidArgument(f"the content of message {position} is a {type(content).__name__}; it must be text")
    calls = [_json(call) for call in fields.pop("tool_calls", None) or ()]
    known = {name: fields.pop(name, None) for name in ("role", "tool_call_id", "name")}
    if fields:
        raise InvalidArgument(f"message {position} has a key {sorted(fields)[0]!r}, which has no meaning here")
    return prompt_pb2.Message(content=content or "", tool_calls=calls, **known)


def _json(value: Mapping[str, Any]) -> str:
    """Return `value` as JSON with the keys in their order, which is part of the prompt."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except TypeError as error:
        raise InvalidArgument(f"a tool or tool call is no JSON: {error}") from error
