"""A request and what it goes through: plain data, no tensors, no sockets.

A `Request` belongs to the engine's one thread from the moment it is submitted. The
front end reads nothing of it afterwards; it is told everything by events.

    waiting --admit--> running --finish / abort / fail--> finished
       ^                  |
       +----preempt-------+
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from prefixcache.errors import InvalidArgument, PrefixCacheError
from prefixcache.lease import Lease
from prefixcache.reasons import MissReason
from prefixcache.terms import DEFAULT_TERMS, Terms
from prefixcache.tokens import pack

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKENS = 64
MAX_LOGIT_BIASES = 1024
MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when to stop; the fields mean what the protocol says of them."""

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    def validate(self, vocab_size: int) -> None:
        """Raise InvalidArgument naming the first field that is out of range."""
        _within("temperature", self.temperature, 0, 100)
        _within("top_p", self.top_p, 0, 1, open_low=True)
        _within("min_p", self.min_p, 0, 1)
        _within("repetition_penalty", self.repetition_penalty, 0, 10, open_low=True)
        _within("presence_penalty", self.presence_penalty, -2, 2)
        _within("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidArgument(f"max_tokens must be at least 1, not {self.max_tokens}")
        if self.top_k < 0:
            raise InvalidArgument(f"top_k must not be negative, not {self.top_k}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise InvalidArgument(f"logprobs must be from 0 to {MAX_LOGPROBS}, not {self.logprobs}")
        _at_most("stop strings", len(self.stop), MAX_STOP_STRINGS)
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
                raise InvalidArgument(
                    f"every stop string must have 1 to {MAX_STOP_CHARACTERS} characters, not {len(text)}"
                )
        _at_most("stop token ids", len(self.stop_token_ids), MAX_STOP_TOKENS)
        _at_most("logit_bias entries", len(self.logit_bias), MAX_LOGIT_BIASES)
        for token, bias in self.logit_bias.items():
            _within(f"logit_bias[{token}]", bias, -100, 100)
        for name, tokens in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            for token in tokens:
                if not 0 <= token < vocab_size:
                    raise InvalidArgument(f"{name} names token {token}, but the vocabulary ends at {vocab_size - 1}")


def _within(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    inside = low < value <= high if open_low else low <= value <= high  # NaN is in neither
    if not inside:
        raise InvalidArgument(f"{name} must be {'above' if open_low else 'from'} {low} to {high}, not {value}")


def _at_most(name: str, count: int, limit: int) -> None:
    if count > limit:
        raise InvalidArgument(f"at most {limit} {name} are allowed, not {count}")


@dataclass(frozen=True, slots=True)
class Started:
    """The request was admitted for the first time; the fields are those of `prefixcache.cache.Found`."""

    prompt_tokens: int
    cached_tokens: int
    reason: MissReason
    position: int
    alternative: int = 0


@dataclass(frozen=True, slots=True)
class Sampled:
    """One generated token; log-probabilities (natural logarithm) if they were asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class FinishReason(Enum):
    """Why the engine ended a request. Stop strings are found by the front end."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts; cached + computed = prompt. `written_tokens` were added to the cache."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    recomputed_tokens: int
    written_tokens: int = 0

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds: arrival to admission, to first token, to the end; forward passes up to the first token."""

    queue: float
    first_token: float
    total: float
    prefill: float


@dataclass(frozen=True, slots=True)
class Finished:
    """The engine generates no more for this request. `kept_tokens` are kept for its session's next one."""

    reason: FinishReason
    usage: Usage
    timings: Timings
    stop_token: int | None = None
    kept_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ends with an error instead of a `Finished`."""

    error: PrefixCacheError


Event = Started | Sampled | Finished | Failed


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Request:
    """One prompt being served.

    `tokens` is the prompt followed by what was generated; `computed` of them have
    their keys and values in the lease's blocks. `packed` is what has to be prefilled:
    the prompt, after a preemption together with what was generated by then. `seed` is always set: the caller's,
    or one drawn at arrival. Times are those of the engine's clock, in seconds.

    A `background` request only puts its prompt into the cache: all of its tokens are
    computed, none is sampled, and requests that somebody waits for go first. `terms` say
    how what it uses and stores is kept, `keep_for` for how many seconds its session's
    blocks are kept from eviction when it has finished. `cached_before` tokens of the
    prompt were cached when it was submitted.
    """

    id: str
    prompt: Sequence[int]
    params: SamplingParams
    seed: int
    sink: Callable[[Event], None]
    namespace: str = ""
    read: bool = True
    store: bool = True
    background: bool = False
    terms: Terms = DEFAULT_TERMS
    keep_for: float = 0.0
    arrival: float = 0.0
    deadline: float | None = None

    state: State = State.WAITING
    account: str = ""
    tokens: list[int] = field(init=False)
    packed: bytes = field(init=False)
    computed: int = 0
    lease: Lease | None = None
    max_length: int = 0
    started: Started | None = None
    passed_over: int = 0
    recomputed: int = 0
    written: int = 0
    kept: int | None = None
    admitted_at: float = 0.0
    first_token_at: float | None = None
    prefill_seconds: float = 0.0
    cached_before: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.packed = pack(self.tokens)

    @property
    def uncomputed(self) -> int:
        """How many tokens still have to be computed before the next one is sampled, as far as is known."""
        return max(len(self.tokens) - max(self.computed, self.cached_before), 0)

    @property
    def output(self) -> list[int]:
        """The generated tokens (a copy)."""
        return self.tokens[len(self.prompt) :]
