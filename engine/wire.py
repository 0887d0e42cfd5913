"""The only place where protobuf becomes domain objects and back, and errors become statuses.

Everything that a caller sends is checked here, before anything is done with it; what
needs the tokenizer is checked by the tokenizer. A message about a field names it, and
says what is allowed. Nothing of a prompt goes into a message.
"""

from __future__ import annotations

import json
import random
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2

from engine.request import Finished, FinishReason, Sampled, SamplingParams, Started
from engine.tenants import namespace_key
from engine.tokenizer import Chat, Prompt
from prefixcache.errors import (
    REASON_DOMAIN,
    STATUS_DETAILS,
    InvalidArgument,
    NotFound,
    PrefixCacheError,
    ResourceExhausted,
)
from prefixcache.reasons import MissReason
from prefixcache.terms import DEFAULT_TERMS, MAX_PRIORITY, Terms
from prefixcache.v1 import generation_pb2, prompt_pb2

MAX_REQUEST_ID_BYTES = 128
MAX_NAMESPACE_BYTES = 256
MAX_NAME_BYTES = 128
MAX_ROLE_BYTES = 64
MAX_KEEP_SECONDS = 3600.0
# gRPC sends a message in a header; long ones are cut off or refused on the way.
MAX_STATUS_CHARACTERS = 2000


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What GetModel reports; lengths in tokens."""

    name: str
    architecture: str
    max_length: int
    vocab_size: int
    dtype: str
    device: str
    block_size: int
    has_chat_template: bool
    eos_token_ids: Sequence[int]
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Generation:
    """A checked GenerateRequest; the prompt is not tokenized yet."""

    id: str
    prompt: Prompt
    params: SamplingParams
    seed: int
    namespace: str
    read: bool
    store: bool
    terms: Terms
    keep_for: float
    end_session: bool


# Requests


def read_generate(
    message: generation_pb2.GenerateRequest, served: ServedModel, tenant: str, defaults: Terms = DEFAULT_TERMS
) -> Generation:
    """Check a request of a tenant; what it leaves open is as in `defaults`.

    Raises InvalidArgument, or NotFound for another model.
    """
    if message.model and message.model != served.name:
        raise NotFound(
            f"model {_shortened(message.model)!r} is not served here, only {served.name!r}; leave model empty to use it"
        )
    if len(message.request_id.encode()) > MAX_REQUEST_ID_BYTES:
        raise InvalidArgument(f"request_id must have at most {MAX_REQUEST_ID_BYTES} bytes")
    if message.request_id and not message.request_id.isprintable():
        raise InvalidArgument("request_id must consist of printable characters: it is written to logs")
    params = _read_sampling(message.sampling)
    params.validate(served.vocab_size)
    cache = message.cache
    terms = read_terms(cache, "cache", defaults)
    keep_for = 0.0
    if cache.HasField("keep_for"):
        keep_for = read_seconds(cache.keep_for, "cache.keep_for")
        if keep_for > MAX_KEEP_SECONDS:
            raise InvalidArgument(
                f"cache.keep_for must be at most {MAX_KEEP_SECONDS:g} seconds; pin what must stay longer"
            )
    if not terms.session and (keep_for or cache.end_session_on_disconnect):
        raise InvalidArgument("cache.keep_for and cache.end_session_on_disconnect belong to a session; send session_id")
    return Generation(
        id=message.request_id or secrets.token_hex(8),
        prompt=read_prompt(message.prompt),
        params=params,
        seed=message.sampling.seed if message.sampling.HasField("seed") else random.getrandbits(63),
        namespace=read_namespace(tenant, cache.namespace, "cache.namespace"),
        read=cache.read if cache.HasField("read") else True,
        store=cache.store if cache.HasField("store") else True,
        terms=terms,
        keep_for=keep_for,
        end_session=cache.end_session_on_disconnect,
    )


def read_terms(message: prompt_pb2.CacheControl, field: str, defaults: Terms) -> Terms:
    """Return on which terms a request uses the cache. Raises InvalidArgument naming what is wrong below `field`."""
    ttl = read_seconds(message.ttl, f"{field}.ttl") if message.HasField("ttl") else defaults.ttl
    sliding = defaults.sliding
    if message.ttl_mode != prompt_pb2.TTL_MODE_UNSPECIFIED:
        if message.ttl_mode not in prompt_pb2.TtlMode.values():
            raise InvalidArgument(f"{field}.ttl_mode is {message.ttl_mode}, which this server does not know")
        sliding = message.ttl_mode == prompt_pb2.TTL_MODE_SLIDING
    priority = message.priority if message.HasField("priority") else defaults.priority
    if priority > MAX_PRIORITY:
        raise InvalidArgument(f"{field}.priority is {priority}; it must be from 0 to {MAX_PRIORITY}")
    if message.session_id:
        read_name(message.session_id, f"{field}.session_id")
    return Terms(ttl, sliding, priority, message.session_id)


def read_seconds(message: Duration, field: str) -> float:
    """Return a duration in seconds. Raises InvalidArgument unless it is above zero."""
    seconds: float = message.seconds + message.nanos / 1e9
    if seconds <= 0:
        raise InvalidArgument(f"{field} is {seconds:g} seconds; it must be above 0, or absent")
    return seconds


def read_name(name: str, field: str) -> str:
    """Return a name that a caller has given to something. Raises InvalidArgument if it is none."""
    if not name:
        raise InvalidArgument(f"{field} is empty; give a name")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise InvalidArgument(f"{field} must have at most {MAX_NAME_BYTES} bytes")
    if not name.isprintable():
        raise InvalidArgument(f"{field} must consist of printable characters")
    return name


def read_prompt(message: prompt_pb2.Prompt) -> Prompt:
    """Return the prompt in one of its three forms. Raises InvalidArgument if it is empty or malformed."""
    match message.WhichOneof("content"):
        case "text":
            if not message.text:
                raise InvalidArgument("prompt.text is empty; send at least one character")
            return message.text
        case "token_ids":
            if not message.token_ids.ids:
                raise InvalidArgument("prompt.token_ids is empty; send at least one token id")
            return list(message.token_ids.ids)
        case "messages":
            return _read_chat(message.messages)
    raise InvalidArgument("prompt is not set; send one of prompt.text, prompt.token_ids, prompt.messages")


def read_namespace(tenant: str, suffix: str, field: str) -> str:
    """Return a tenant's namespace key for the suffix in `field`. Raises InvalidArgument if it is too long."""
    if len(suffix.encode()) > MAX_NAMESPACE_BYTES:
        raise InvalidArgument(f"{field} must have at most {MAX_NAMESPACE_BYTES} bytes")
    return namespace_key(tenant, suffix)


def _read_sampling(message: generation_pb2.Sampling) -> SamplingParams:
    given: dict[str, Any] = {
        name: getattr(message, name)
        for name in (
            "max_tokens",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "seed",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "logprobs",
        )
        if message.HasField(name)
    }
    return SamplingParams(
        stop=tuple(message.stop),
        stop_token_ids=frozenset(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logit_bias=dict(message.logit_bias),
        **given,
    )


def _read_chat(message: prompt_pb2.Chat) -> Chat:
    if not message.messages:
        raise InvalidArgument("prompt.messages.messages is empty; send at least one message")
    return Chat(
        messages=[_read_message(turn, f"prompt.messages.messages[{i}]") for i, turn in enumerate(message.messages)],
        tools=[_read_object(text, f"prompt.messages.tools[{i}]") for i, text in enumerate(message.tools)],
        add_generation_prompt=message.add_generation_prompt if message.HasField("add_generation_prompt") else True,
    )


def _read_message(message: prompt_pb2.Message, field: str) -> dict[str, Any]:
    if not message.role:
        raise InvalidArgument(f"{field}.role is empty; say who speaks, such as 'user'")
    if len(message.role.encode()) > MAX_ROLE_BYTES:
        raise InvalidArgument(f"{field}.role must have at most {MAX_ROLE_BYTES} bytes")
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        calls = enumerate(message.tool_calls)
        turn["tool_calls"] = [_read_object(text, f"{field}.tool_calls[{i}]") for i, text in calls]
    if message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    if message.name:
        turn["name"] = message.name
    return turn


def _read_object(text: str, field: str) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidArgument(f"{field} must be a JSON object: {reason}") from None
    if not isinstance(value, dict):
        raise InvalidArgument(f"{field} must be a JSON object, in braces")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# Responses


def write_started(request_id: str, started: Started) -> generation_pb2.GenerateResponse:
    return generation_pb2.GenerateResponse(
        started=generation_pb2.Started(
            request_id=request_id,
            prompt_tokens=started.prompt_tokens,
            cached_tokens=started.cached_tokens,
            miss_reason=miss_reason(started.reason),
            miss_position=started.position,
            alternative_tokens=started.alternative or None,
        )
    )


def write_delta(text: str, tokens: Iterable[Sampled]) -> generation_pb2.GenerateResponse:
    delta = generation_pb2.Delta(text=text)
    for sampled in tokens:
        delta.token_ids.append(sampled.token)
        if sampled.logprob is not None:
            delta.logprobs.append(
                generation_pb2.TokenLogprobs(
                    logprob=sampled.logprob,
                    top=[
                        generation_pb2.TokenLogprob(token_id=token, logprob=logprob) for token, logprob in sampled.top
                    ],
                )
            )
    return generation_pb2.GenerateResponse(delta=delta)


def write_finished(finished: Finished, stop: str | None = None) -> generation_pb2.GenerateResponse:
    """Return the last event; `stop` is the stop string that ended the output, if one did."""
    usage, timings = finished.usage, finished.timings
    if stop is None and finished.stop_token is not None:
        stop = str(finished.stop_token)
    return generation_pb2.GenerateResponse(
        finished=generation_pb2.Finished(
            reason=_FINISH_REASONS[finished.reason],
            usage=generation_pb2.Usage(
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                computed_tokens=usage.computed_tokens,
                completion_tokens=usage.completion_tokens,
                recomputed_tokens=usage.recomputed_tokens,
                written_tokens=usage.written_tokens,
            ),
            timings=generation_pb2.Timings(
                queue=duration(timings.queue),
                first_token=duration(timings.first_token),
                total=duration(timings.total),
                prefill=duration(timings.prefill),
            ),
            stopped_by=stop or "",
            kept_tokens=finished.kept_tokens,
        )
    )


def write_tokens(ids: Sequence[int], hashes: bytes, *, with_ids: bool) -> generation_pb2.TokenizeResponse:
    return generation_pb2.TokenizeResponse(
        token_ids=ids if with_ids else (), block_hashes=hashes, prompt_tokens=len(ids)
    )


def write_model(served: ServedModel) -> generation_pb2.GetModelResponse:
    return generation_pb2.GetModelResponse(
        name=served.name,
        architecture=served.architecture,
        max_length=served.max_length,
        vocab_size=served.vocab_size,
        dtype=served.dtype,
        device=served.device,
        block_size=served.block_size,
        has_chat_template=served.has_chat_template,
        eos_token_ids=served.eos_token_ids,
        fingerprint=served.fingerprint,
    )


_FINISH_REASONS = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}


def miss_reason(reason: MissReason) -> prompt_pb2.MissReason.ValueType:
    return prompt_pb2.MissReason.Value(f"MISS_REASON_{reason.name}")


def duration(seconds: float) -> Duration:
    message = Duration()
    message.FromNanoseconds(round(max(seconds, 0.0) * 1e9))
    return message


# Errors


@dataclass(frozen=True, slots=True)
class Status:
    """What a failed call ends with: the arguments of a gRPC context's `abort`."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, bytes], ...] = ()


def status_of(error: PrefixCacheError) -> Status:
    """Return the status an error travels as, with RetryInfo and ErrorInfo if it says when to try again, and why."""
    details = _shortened(str(error), MAX_STATUS_CHARACTERS)
    trailing: tuple[tuple[str, bytes], ...] = ()
    if isinstance(error, ResourceExhausted) and error.retry_after is not None:
        status = status_pb2.Status(code=code_pb2.Code.Value(error.status), message=details)
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=duration(error.retry_after)))
        if error.reason:
            status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=REASON_DOMAIN))
        trailing = ((STATUS_DETAILS, status.SerializeToString()),)
    return Status(grpc.StatusCode[error.status], details, trailing)


def unreadable(method: str, error: Exception) -> InvalidArgument:
    """Return the error for a request to `method` whose bytes are not the message it takes."""
    if "UTF-8" in str(error):
        return InvalidArgument(f"a text field of the request to {method} is not valid UTF-8; encode text as UTF-8")
    return InvalidArgument(
        f"the request to {method} cannot be read; is the client made for another version of the protocol?"
    )


def _shortened(text: str, limit: int = 100) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
