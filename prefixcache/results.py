"""What a client gets back: plain data, made from the protocol's messages.

Counts are tokens and times are seconds. A reason that this version does not know is
None.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from prefixcache.errors import Internal
from prefixcache.reasons import MissReason
from prefixcache.v1 import cache_pb2, generation_pb2, prompt_pb2

FinishReason = Literal["stop", "length"]

REPLICA = "prefixcache-replica"
"""The key in an answer's trailing metadata under which a replica gives its name; in a call's, the one it wants."""


@dataclass(frozen=True, slots=True)
class Started:
    """What the cache had for a request when it was admitted."""

    request_id: str
    prompt_tokens: int
    cached_tokens: int
    miss_reason: MissReason | None
    miss_position: int
    alternative_tokens: int = 0
    """If it diverged: length of the nearest cached prompt, which is the same up to `miss_position`."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms: that of the chosen token, and (token id, logprob) of the most probable ones."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request; cached + computed = prompt.

    `written_tokens` of prompt and output were added to the cache.
    """

    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    completion_tokens: int
    recomputed_tokens: int
    written_tokens: int = 0

    def as_openai(self) -> dict[str, object]:
        """Return the counts under the names of OpenAI's chat completions."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def as_anthropic(self) -> dict[str, int]:
        """Return the counts under the names of Anthropic's messages, whose input is without what was read or written.

        What was written counts as the prompt's as far as it goes, since the output is written after it.
        """
        written = min(self.written_tokens, self.computed_tokens)
        return {
            "input_tokens": self.computed_tokens - written,
            "cache_creation_input_tokens": written,
            "cache_read_input_tokens": self.cached_tokens,
            "output_tokens": self.completion_tokens,
        }


@dataclass(frozen=True, slots=True)
class Timings:
    """By the server's clock: arrival to admission, to first token, to the end; forward passes to first token."""

    queue: float
    first_token: float
    total: float
    prefill: float


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished generation.

    `stopped_by` is the stop string or stop token id (in decimal) that ended it, or "".
    `logprobs` has one entry per token if they were asked for. `ttft` and `elapsed` are
    measured by the client, from sending to the first token and to the end; `ttft` is
    None if there was no token. `kept_tokens` are kept for the session's next request, if
    that was asked for. `replica` is the one that answered, None if it did not say.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason
    stopped_by: str
    started: Started
    usage: Usage
    timings: Timings
    ttft: float | None
    elapsed: float
    kept_tokens: int = 0
    replica: str | None = None

    @property
    def request_id(self) -> str:
        return self.started.request_id

    @property
    def miss_reason(self) -> MissReason | None:
        """Why no more of the prompt was cached."""
        return self.started.miss_reason

    @property
    def miss_position(self) -> int:
        """Where the prompt left the cached path."""
        return self.started.miss_position

    @property
    def alternative_tokens(self) -> int:
        """If it diverged: length of the nearest cached prompt."""
        return self.started.alternative_tokens


@dataclass(frozen=True, slots=True)
class ReplicaPrefix:
    """Another replica that holds the beginning of a prompt, so many tokens of it; `address` is host:port."""

    replica_id: str
    address: str
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Lookup:
    """How much of a prompt is cached, why not more, and where it leaves the cached path.

    If the text was asked for, it is what the model reads, of which `cached_characters` are cached.
    `elsewhere` are the other replicas that hold some of it, by what they published last; longest first.
    """

    prompt_tokens: int
    cached_tokens: int
    miss_reason: MissReason | None
    miss_position: int
    alternative_tokens: int = 0
    """If it diverges: length of the nearest cached prompt, which is the same up to `miss_position`."""
    text: str | None = None
    cached_characters: int | None = None
    elsewhere: tuple[ReplicaPrefix, ...] = ()


@dataclass(frozen=True, slots=True)
class Pinned:
    """How much of a prompt is pinned, what all pins of the caller hold and may hold, and why not more, in words."""

    prompt_tokens: int
    pinned_tokens: int
    pinned_blocks: int
    budget_blocks: int
    limited_by: str


@dataclass(frozen=True, slots=True)
class Pin:
    """A pin; `expires_in` is in seconds, None until it is ended. A `published` one serves every tenant."""

    pin_id: str
    namespace: str
    tokens: int
    expires_in: float | None
    published: bool = False


@dataclass(frozen=True, slots=True)
class Pins:
    """The caller's pins, and the blocks that they hold together and may hold."""

    pins: tuple[Pin, ...]
    pinned_blocks: int
    budget_blocks: int


@dataclass(frozen=True, slots=True)
class Invalidated:
    """Blocks that are free now, and blocks that running requests still use and nobody else will."""

    freed_blocks: int
    in_use_blocks: int


@dataclass(frozen=True, slots=True)
class Model:
    """The served model; `max_length` is prompt plus output."""

    name: str
    architecture: str
    max_length: int
    vocab_size: int
    dtype: str
    device: str
    block_size: int
    has_chat_template: bool
    eos_token_ids: tuple[int, ...]
    fingerprint: str


@dataclass(frozen=True, slots=True)
class BlockStats:
    """The block pool; free + cached + pinned + leased = total.

    A tenant among others sees its own only: `total` is the sum of its own, `free` is 0.
    `quota` is the most blocks that it may have cached, None for any number.
    """

    block_size: int
    total: int
    free: int
    cached: int
    leased: int
    evicted: int
    bytes_per_block: int
    pinned: int = 0
    expired: int = 0
    invalidated: int = 0
    quota: int | None = None


@dataclass(frozen=True, slots=True)
class RequestStats:
    """Waiting and running now; the rest counted since the start. `warmed` prompts are in no other count."""

    waiting: int
    running: int
    admitted: int
    finished: int
    aborted: int
    preempted: int
    steps: int
    warmed: int = 0


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Tokens since the start; prompt = cached + computed. `warmed` ones are in no other count."""

    prompt: int
    cached: int
    computed: int
    recomputed: int
    generated: int
    warmed: int = 0


@dataclass(frozen=True, slots=True)
class HintStats:
    """What a replica publishes of its cache for others to find.

    `current`: all that is cached is known there, but for the last moments. `error` says why
    nothing can be published now, "" if it can. `republished` is how often all had to be.
    """

    replica_id: str
    current: bool
    blocks: int
    republished: int
    error: str


@dataclass(frozen=True, slots=True)
class Stats:
    """Sizes now and counters since the start; `miss_reasons` counts requests by reason, `uptime` is in seconds.

    `hints` are None if nothing is published, and for callers who are not administrators.
    """

    blocks: BlockStats
    requests: RequestStats
    tokens: TokenStats
    miss_reasons: Mapping[str, int]
    uptime: float
    sessions: int = 0
    hints: HintStats | None = None


class Fold:
    """Collects the events of one generation; `started` is set as soon as it is known, `replica` by `sign`."""

    def __init__(self) -> None:
        self.started: Started | None = None
        self.replica: str | None = None
        self._sent = time.perf_counter()
        self._first: float | None = None
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._completion: Completion | None = None

    def add(self, response: generation_pb2.GenerateResponse) -> str:
        """Take the next event and return the text it adds, which may be ""."""
        match response.WhichOneof("event"):
            case "started":
                message = response.started
                self.started = Started(
                    message.request_id,
                    message.prompt_tokens,
                    message.cached_tokens,
                    _miss_reason(message.miss_reason),
                    message.miss_position,
                    message.alternative_tokens,
                )
            case "delta":
                return self._delta(response.delta)
            case "finished":
                self._completion = self._finish(response.finished)
        return ""

    @property
    def complete(self) -> bool:
        """Whether the last event has come."""
        return self._completion is not None

    def sign(self, trailing_metadata: Iterable[tuple[str, str | bytes]] | None) -> None:
        """Take what came behind the last event: which replica has answered."""
        for key, value in trailing_metadata or ():
            if key == REPLICA and isinstance(value, str):
                self.replica = value

    def completion(self) -> Completion:
        """Return the result. Raises Internal if the server ended the stream without one."""
        if self._completion is None:
            raise Internal("the server ended the stream before the output was finished; send the request again")
        return replace(self._completion, replica=self.replica)

    def _delta(self, delta: generation_pb2.Delta) -> str:
        if self._first is None and delta.token_ids:
            self._first = time.perf_counter()
        self._texts.append(delta.text)
        self._token_ids += delta.token_ids
        for entry in delta.logprobs:
            top = tuple((candidate.token_id, candidate.logprob) for candidate in entry.top)
            self._logprobs.append(TokenLogprobs(entry.logprob, top))
        return delta.text

    def _finish(self, finished: generation_pb2.Finished) -> Completion:
        if self.started is None:
            raise Internal("the server finished a request that it had not started; report this")
        usage, timings = finished.usage, finished.timings
        stopped = finished.reason == generation_pb2.FINISH_REASON_STOP
        return Completion(
            text="".join(self._texts),
            token_ids=self._token_ids,
            logprobs=self._logprobs,
            finish_reason="stop" if stopped else "length",
            stopped_by=finished.stopped_by,
            started=self.started,
            usage=Usage(
                usage.prompt_tokens,
                usage.cached_tokens,
                usage.computed_tokens,
                usage.completion_tokens,
                usage.recomputed_tokens,
                usage.written_tokens,
            ),
            timings=Timings(
                timings.queue.ToNanoseconds() / 1e9,
                timings.first_token.ToNanoseconds() / 1e9,
                timings.total.ToNanoseconds() / 1e9,
                timings.prefill.ToNanoseconds() / 1e9,
            ),
            ttft=None if self._first is None else self._first - self._sent,
            elapsed=time.perf_counter() - self._sent,
            kept_tokens=finished.kept_tokens,
        )


def lookup_from(message: cache_pb2.LookupResponse) -> Lookup:
    return Lookup(
        message.prompt_tokens,
        message.cached_tokens,
        _miss_reason(message.miss_reason),
        message.miss_position,
        message.alternative_tokens,
        message.text if message.HasField("text") else None,
        message.cached_characters if message.HasField("cached_characters") else None,
        tuple(ReplicaPrefix(other.replica_id, other.address, other.cached_tokens) for other in message.elsewhere),
    )


def pinned_from(message: cache_pb2.PinResponse) -> Pinned:
    return Pinned(
        message.prompt_tokens, message.pinned_tokens, message.pinned_blocks, message.budget_blocks, message.limited_by
    )


def pins_from(message: cache_pb2.ListPinsResponse) -> Pins:
    pins = tuple(
        Pin(
            pin.pin_id,
            pin.namespace,
            pin.tokens,
            pin.expires_in.ToNanoseconds() / 1e9 if pin.HasField("expires_in") else None,
            pin.published,
        )
        for pin in message.pins
    )
    return Pins(pins, message.pinned_blocks, message.budget_blocks)


def invalidated_from(message: cache_pb2.InvalidateResponse) -> Invalidated:
    return Invalidated(message.freed_blocks, message.in_use_blocks)


def model_from(message: generation_pb2.GetModelResponse) -> Model:
    return Model(
        message.name,
        message.architecture,
        message.max_length,
        message.vocab_size,
        message.dtype,
        message.device,
        message.block_size,
        message.has_chat_template,
        tuple(message.eos_token_ids),
        message.fingerprint,
    )


def stats_from(message: cache_pb2.GetStatsResponse) -> Stats:
    blocks, requests, tokens, hints = message.blocks, message.requests, message.tokens, message.hints
    return Stats(
        BlockStats(
            blocks.block_size,
            blocks.total,
            blocks.free,
            blocks.cached,
            blocks.leased,
            blocks.evicted,
            blocks.bytes_per_block,
            blocks.pinned,
            blocks.expired,
            blocks.invalidated,
            blocks.quota if blocks.HasField("quota") else None,
        ),
        RequestStats(
            requests.waiting,
            requests.running,
            requests.admitted,
            requests.finished,
            requests.aborted,
            requests.preempted,
            requests.steps,
            requests.warmed,
        ),
        TokenStats(tokens.prompt, tokens.cached, tokens.computed, tokens.recomputed, tokens.generated, tokens.warmed),
        dict(message.miss_reasons),
        message.uptime.ToNanoseconds() / 1e9,
        message.sessions,
        HintStats(hints.replica_id, hints.current, hints.blocks, hints.republished, hints.error)
        if message.HasField("hints")
        else None,
    )


def _miss_reason(value: prompt_pb2.MissReason.ValueType) -> MissReason | None:
    entry = prompt_pb2.MissReason.DESCRIPTOR.values_by_number.get(value)
    name = "" if entry is None else entry.name.removeprefix("MISS_REASON_")
    return MissReason[name] if name in MissReason.__members__ else None
