"""What crosses the wire: every field read and written, every mistake named."""

from __future__ import annotations

import math
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from engine import wire
from engine.request import Finished, FinishReason, Sampled, SamplingParams, Started, Timings, Usage
from engine.tenants import namespace_key
from engine.tokenizer import Chat
from prefixcache.errors import QUEUE_FULL, InvalidArgument, NotFound, PrefixCacheError, ResourceExhausted
from prefixcache.reasons import MissReason
from prefixcache.v1 import generation_pb2, prompt_pb2

SERVED = wire.ServedModel("embedded", "llama", 100, 50, "float32", "cpu", 16, True, [3], "f")


def text(**fields: Any) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(prompt=prompt_pb2.Prompt(text="hi"), **fields)


def sampling(**fields: Any) -> generation_pb2.GenerateRequest:
    return text(sampling=generation_pb2.Sampling(**fields))


def chat(*turns: prompt_pb2.Message, **fields: Any) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(prompt=prompt_pb2.Prompt(messages=prompt_pb2.Chat(messages=turns, **fields)))


def test_a_bare_request_gets_the_defaults() -> None:
    """Greedy, to the model's end, reading and storing, with a name and a seed made up here."""
    first, second = (wire.read_generate(text(), SERVED, "acme") for _ in range(2))
    assert first.params == SamplingParams()
    assert (first.prompt, first.read, first.store) == ("hi", True, True)
    assert first.id
    assert first.id != second.id
    assert first.seed != second.seed


def test_every_field_of_sampling_is_read() -> None:
    """What the caller sets arrives, zeros included."""
    request = sampling(
        max_tokens=5,
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        min_p=0.125,
        seed=2**64 - 1,
        stop=["a", "b"],
        stop_token_ids=[1, 2],
        ignore_eos=True,
        repetition_penalty=1.5,
        presence_penalty=-1,
        frequency_penalty=2,
        logit_bias={4: -100},
        logprobs=0,
    )
    generation = wire.read_generate(request, SERVED, "acme")
    assert generation.params == SamplingParams(
        max_tokens=5,
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        min_p=0.125,
        seed=2**64 - 1,
        stop=("a", "b"),
        stop_token_ids=frozenset({1, 2}),
        ignore_eos=True,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=2.0,
        logit_bias={4: -100.0},
        logprobs=0,
    )
    assert generation.seed == 2**64 - 1


def test_cache_control_and_name_are_read() -> None:
    """The switches can be turned off, and the namespace lies below the caller's own."""
    cache = prompt_pb2.CacheControl(read=False, store=False, namespace="team")
    generation = wire.read_generate(text(cache=cache, request_id="r", model="embedded"), SERVED, "acme")
    assert (generation.id, generation.read, generation.store) == ("r", False, False)
    assert generation.namespace == namespace_key("acme", "team")


def test_a_conversation_is_read_with_its_tools_in_order() -> None:
    """Keys of tools stay in the order in which they were written; absent fields stay absent."""
    call = prompt_pb2.Message(role="assistant", tool_calls=['{"z": 1, "a": 1.5}'])
    answer = prompt_pb2.Message(role="tool", content="42", tool_call_id="c", name="f")
    prompt = wire.read_generate(chat(call, answer, tools=['{"z": {"y": 1, "x": 2}}']), SERVED, "acme").prompt
    assert prompt == Chat(
        messages=[
            {"role": "assistant", "content": "", "tool_calls": [{"z": 1, "a": 1.5}]},
            {"role": "tool", "content": "42", "tool_call_id": "c", "name": "f"},
        ],
        tools=[{"z": {"y": 1, "x": 2}}],
    )
    assert isinstance(prompt, Chat)
    assert list(prompt.tools[0]["z"]) == ["y", "x"]
    closed = wire.read_generate(chat(answer, add_generation_prompt=False), SERVED, "acme").prompt
    assert isinstance(closed, Chat)
    assert not closed.add_generation_prompt


USER = prompt_pb2.Message(role="user", content="hi")


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (generation_pb2.GenerateRequest(), "prompt is not set; send one of prompt.text"),
        (generation_pb2.GenerateRequest(prompt=prompt_pb2.Prompt(text="")), "prompt.text is empty"),
        (
            generation_pb2.GenerateRequest(prompt=prompt_pb2.Prompt(token_ids=prompt_pb2.TokenIds())),
            "prompt.token_ids is empty",
        ),
        (chat(), "prompt.messages.messages is empty"),
        (chat(USER, prompt_pb2.Message(content="x")), r"prompt.messages.messages\[1\].role is empty"),
        (chat(prompt_pb2.Message(role="x" * 65)), r"messages\[0\].role must have at most 64 bytes"),
        (chat(USER, tools=["{"]), r"prompt.messages.tools\[0\] must be a JSON object: Expecting"),
        (chat(USER, tools=["{}", "[]"]), r"tools\[1\] must be a JSON object, in braces"),
        (chat(USER, tools=['{"a": NaN}']), r"tools\[0\] must be a JSON object: NaN is not JSON"),
        (chat(USER, tools=["[" * 100_000]), r"tools\[0\] must be a JSON object: it is nested too deeply"),
        (
            chat(prompt_pb2.Message(role="assistant", tool_calls=["x"])),
            r"messages\[0\].tool_calls\[0\] must be a JSON object",
        ),
        (text(request_id="é" * 65), "request_id must have at most 128 bytes"),
        (text(request_id="a\nb"), "request_id must consist of printable characters"),
        (text(cache=prompt_pb2.CacheControl(namespace="é" * 129)), "cache.namespace must have at most 256 bytes"),
        (sampling(max_tokens=0), "max_tokens must be at least 1, not 0"),
        (sampling(temperature=-0.5), "temperature must be from 0 to 100, not -0.5"),
        (sampling(temperature=math.nan), "temperature must be from 0 to 100, not nan"),
        (sampling(temperature=math.inf), "temperature must be from 0 to 100, not inf"),
        (sampling(top_p=0), "top_p must be above 0 to 1"),
        (sampling(top_p=1.5), "top_p must be above 0 to 1"),
        (sampling(min_p=2), "min_p must be from 0 to 1"),
        (sampling(repetition_penalty=0), "repetition_penalty must be above 0 to 10"),
        (sampling(presence_penalty=3), "presence_penalty must be from -2 to 2"),
        (sampling(frequency_penalty=-3), "frequency_penalty must be from -2 to 2"),
        (sampling(logprobs=21), "logprobs must be from 0 to 20, not 21"),
        (sampling(stop=["x"] * 17), "at most 16 stop strings are allowed, not 17"),
        (sampling(stop=[""]), "every stop string must have 1 to 256 characters, not 0"),
        (sampling(stop=["x" * 257]), "every stop string must have 1 to 256 characters, not 257"),
        (sampling(stop_token_ids=range(65)), "at most 64 stop token ids are allowed, not 65"),
        (sampling(stop_token_ids=[50]), "stop_token_ids names token 50, but the vocabulary ends at 49"),
        (sampling(logit_bias={50: 1}), "logit_bias names token 50, but the vocabulary ends at 49"),
        (sampling(logit_bias={1: 101}), r"logit_bias\[1\] must be from -100 to 100"),
        (
            sampling(logit_bias=dict.fromkeys(range(1025), 1.0)),
            "at most 1024 logit_bias entries are allowed, not 1025",
        ),
    ],
)
def test_what_is_wrong_with_a_request_is_named(request_: generation_pb2.GenerateRequest, words: str) -> None:
    """Each mistake is INVALID_ARGUMENT; the message has the field and what is allowed."""
    with pytest.raises(InvalidArgument, match=words):
        wire.read_generate(request_, SERVED, "acme")


def test_another_model_is_not_found() -> None:
    """The message says what is served, and does not repeat an endless name."""
    with pytest.raises(NotFound, match="model 'gpt' is not served here, only 'embedded'"):
        wire.read_generate(text(model="gpt"), SERVED, "acme")
    with pytest.raises(NotFound) as caught:
        wire.read_generate(text(model="x" * 10_000), SERVED, "acme")
    assert len(str(caught.value)) < 300


@given(st.tuples(st.text(), st.text()), st.tuples(st.text(), st.text()))
def test_namespace_keys_never_collide(one: tuple[str, str], other: tuple[str, str]) -> None:
    """Two callers with suffixes of their choice never reach the same namespace."""
    assert (namespace_key(*one) == namespace_key(*other)) == (one == other)


def test_started_is_written_whole() -> None:
    """Zeros are said, not left out, and every reason has its name in the protocol."""
    message = wire.write_started("r", Started(7, 0, MissReason.NEVER_SEEN, 0)).started
    assert (message.request_id, message.prompt_tokens, message.cached_tokens) == ("r", 7, 0)
    assert message.HasField("cached_tokens")
    assert message.HasField("miss_position")
    names = {
        prompt_pb2.MissReason.Name(wire.write_started("", Started(1, 0, reason, 0)).started.miss_reason)
        for reason in MissReason
    }
    assert names == set(prompt_pb2.MissReason.keys()) - {"MISS_REASON_UNSPECIFIED"}


def test_a_delta_has_log_probabilities_only_if_asked_for() -> None:
    """One entry per token, the most probable ones in their order."""
    plain = wire.write_delta("ab", [Sampled(1), Sampled(2)]).delta
    assert (plain.text, list(plain.token_ids), len(plain.logprobs)) == ("ab", [1, 2], 0)
    rich = wire.write_delta("", [Sampled(1, -0.5, ((1, -0.5), (9, -1.5)))]).delta
    assert rich.logprobs[0].logprob == -0.5
    assert [(entry.token_id, entry.logprob) for entry in rich.logprobs[0].top] == [(1, -0.5), (9, -1.5)]


def test_finished_says_what_stopped_it() -> None:
    """The stop string, or the stop token in decimal, or nothing."""
    usage, timings = Usage(10, 4, 3, 0), Timings(0.25, 0.5, 1.0, 0.125)
    message = wire.write_finished(Finished(FinishReason.STOP, usage, timings, 42)).finished
    assert (message.reason, message.stopped_by) == (generation_pb2.FINISH_REASON_STOP, "42")
    assert (message.usage.cached_tokens, message.usage.computed_tokens) == (4, 6)
    assert message.timings.first_token.ToMilliseconds() == 500
    by_string = wire.write_finished(Finished(FinishReason.STOP, usage, timings), "END").finished
    assert by_string.stopped_by == "END"
    length = wire.write_finished(Finished(FinishReason.LENGTH, usage, timings)).finished
    assert (length.reason, length.stopped_by) == (generation_pb2.FINISH_REASON_LENGTH, "")


@pytest.mark.parametrize("kind", PrefixCacheError.__subclasses__())
def test_every_error_travels_as_its_status(kind: type[PrefixCacheError]) -> None:
    """The status is the one that the class names, the message is the error's own."""
    status = wire.status_of(kind("what happened"))
    assert (status.code.name, status.details, status.trailing_metadata) == (kind.status, "what happened", ())


def test_a_full_queue_says_when_to_try_again() -> None:
    """RetryInfo is in the details, and the details repeat code and message."""
    status = wire.status_of(ResourceExhausted("full", retry_after=1.5))
    assert status.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    [(key, value)] = status.trailing_metadata
    detail = status_pb2.Status.FromString(value)
    info = error_details_pb2.RetryInfo()
    assert key == "grpc-status-details-bin"
    assert (detail.code, detail.message) == (status.code.value[0], "full")
    assert detail.details[0].Unpack(info)
    assert info.retry_delay.ToMilliseconds() == 1500


def test_a_reason_travels_for_programs() -> None:
    """A full queue can be told from a quota, which another replica would refuse as well."""
    [(_, value)] = wire.status_of(ResourceExhausted("full", retry_after=1.5, reason=QUEUE_FULL)).trailing_metadata
    info = error_details_pb2.ErrorInfo()
    assert status_pb2.Status.FromString(value).details[1].Unpack(info)
    assert (info.reason, info.domain) == ("QUEUE_FULL", "prefixcache")


def test_an_endless_message_is_cut() -> None:
    """Statuses travel in headers, which have a limit."""
    assert len(wire.status_of(InvalidArgument("x" * 100_000)).details) == wire.MAX_STATUS_CHARACTERS
