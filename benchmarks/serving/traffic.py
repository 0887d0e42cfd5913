"""What is sent: scenarios as phases of sessions of calls, the same for every target.

A *call* is a prompt of token ids and the number of tokens to generate. The calls of a
*session* follow one another, each sent when the one before has ended. The sessions of
a *phase* start at given times, or as soon as the phase's concurrency allows. A
*scenario* makes the phases of one repeat from a source of ids; every repeat, and the
warm-up before, draws ids that were not used before, so that what is cold in one
repeat was cold in all.
"""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Protocol

import numpy as np

from benchmarks import workloads
from benchmarks.workloads import TRACE_BLOCK_TOKENS

FIRST_ID = 300
"""The lowest id used: below are the special tokens and the bytes of a byte-level vocabulary."""

TO_CACHE = 2
"""Tokens to generate so that a prompt is cached: with one, transformers keeps nothing of the last pass over it."""

TRACE_RATE = 3.4
"""Requests per second of the generated trace: that of the recorded one."""


@dataclass(frozen=True, slots=True)
class Call:
    """A prompt and how many tokens to generate after it; `label` is what its figures are filed under."""

    prompt: array[int]
    output: int
    label: str


@dataclass(frozen=True, slots=True)
class Phase:
    """Sessions that run together.

    `starts` are seconds from the phase's beginning, one per session. Without them a
    session starts as soon as fewer than `concurrency` run (None: all at once). What is
    not `counted` only prepares the caches.
    """

    label: str
    sessions: Sequence[Sequence[Call]]
    starts: Sequence[float] | None = None
    concurrency: int | None = None
    counted: bool = True

    def calls(self) -> int:
        return sum(map(len, self.sessions))


class TokenSource:
    """Token ids from FIRST_ID up to the vocabulary's size, never the same twice, the same for the same seed."""

    def __init__(self, vocabulary: int, seed: int = 0) -> None:
        if vocabulary < 2 * FIRST_ID:
            raise ValueError(f"a vocabulary of {vocabulary} is too small; prompts need at least {2 * FIRST_ID}")
        self.vocabulary = vocabulary
        self.random = random.Random(f"bench_serving {seed}")
        self._firsts = self.random.sample(range(FIRST_ID, vocabulary), vocabulary - FIRST_ID)
        self._given = 0

    def fresh(self, length: int) -> array[int]:
        """Random ids. No two sequences begin with the same id, until all ids have begun one."""
        first = self._firsts[self._given % len(self._firsts)]
        self._given += 1
        return array("I", [first, *self.random.choices(range(FIRST_ID, self.vocabulary), k=length - 1)])

    def mapping(self) -> Mapping:
        """Another mapping of any tokens to ids every time."""
        return Mapping(self.vocabulary, self.random.getrandbits(62) | 1, self.random.getrandbits(62))

    def permutation(self, size: int) -> list[int]:
        """Another order of `size` ids every time: equal texts, renamed, are new to a cache."""
        return self.random.sample(range(FIRST_ID, self.vocabulary), size)


@dataclass(frozen=True, slots=True)
class Mapping:
    """Maps packed tokens of `benchmarks.workloads` to ids of a vocabulary: what was equal stays equal."""

    vocabulary: int
    factor: int
    offset: int

    def __call__(self, packed: bytes) -> array[int]:
        tokens = np.frombuffer(packed, "<u4").astype(np.uint64)
        with np.errstate(over="ignore"):
            mixed = (tokens * np.uint64(self.factor) + np.uint64(self.offset)) >> np.uint64(24)
        ids = mixed % np.uint64(self.vocabulary - FIRST_ID) + np.uint64(FIRST_ID)
        return array("I", ids.astype(np.uint32).tobytes())


class Scenario(Protocol):
    """A kind of traffic."""

    @property
    def name(self) -> str: ...
    def warmup(self, source: TokenSource) -> list[Phase]:
        """Prompts of the shapes to come, so that no counted one is the first of its shape."""
        ...

    def phases(self, source: TokenSource) -> list[Phase]:
        """The phases of the next repeat."""
        ...


def poisson(source: random.Random, rate: float, count: int) -> list[float]:
    """Arrival times in seconds: `count` of them, `rate` per second, gaps drawn from the exponential distribution."""
    return list(accumulate(source.expovariate(rate) for _ in range(count)))


def trimmed(phase: Phase, sessions: int, calls: int) -> Phase:
    """The first sessions of a phase, the first calls of each, all at once."""
    return Phase(phase.label, [session[:calls] for session in phase.sessions[:sessions]])


# Scenarios


@dataclass(frozen=True)
class Ttft:
    """One prompt at a time: cold, then with all but its last `suffix` tokens cached."""

    lengths: Sequence[int] = (256, 1024, 4096)
    suffix: int = 64
    pairs: int = 5
    name: str = "ttft"

    def __post_init__(self) -> None:
        if min(self.lengths) <= self.suffix:
            raise ValueError(f"a prompt of {min(self.lengths)} tokens has no prefix before a suffix of {self.suffix}")

    def warmup(self, source: TokenSource) -> list[Phase]:
        return [Phase("warm-up", [self._pair(length, source) for length in self.lengths], concurrency=1)]

    def phases(self, source: TokenSource) -> list[Phase]:
        # Lengths in turn, so that a slow moment of the machine is not one length's.
        pairs = [self._pair(length, source) for _ in range(self.pairs) for length in self.lengths]
        return [Phase(self.name, pairs, concurrency=1)]

    def _pair(self, length: int, source: TokenSource) -> list[Call]:
        prefix = source.fresh(length - self.suffix)
        return [
            Call(prefix + source.fresh(self.suffix), TO_CACHE, self.label(length, state)) for state in ("cold", "warm")
        ]

    @staticmethod
    def label(length: int, state: str) -> str:
        return f"{length} {state}"


@dataclass(frozen=True)
class Decode:
    """One sequence at a time: `output` tokens after a short prompt."""

    prompt: int = 64
    output: int = 256
    sequences: int = 2
    name: str = "decode"

    def warmup(self, source: TokenSource) -> list[Phase]:
        return [Phase("warm-up", [[Call(source.fresh(self.prompt), min(self.output, 16), "")]])]

    def phases(self, source: TokenSource) -> list[Phase]:
        calls = [Call(source.fresh(self.prompt), self.output, self.name) for _ in range(self.sequences)]
        return [Phase(self.name, [calls])]


@dataclass(frozen=True)
class Shared:
    """All at once: prompts that share their first tokens, none of which is cached when they come."""

    requests: int = 64
    shared: int = 1024
    own: int = 128
    output: int = 64
    name: str = "shared"

    def warmup(self, source: TokenSource) -> list[Phase]:
        return [self._phase(source, min(self.requests, 8), min(self.output, 8))]

    def phases(self, source: TokenSource) -> list[Phase]:
        return [self._phase(source, self.requests, self.output)]

    def _phase(self, source: TokenSource, requests: int, output: int) -> Phase:
        prefix = source.fresh(self.shared)
        return Phase(self.name, [[Call(prefix + source.fresh(self.own), output, self.name)] for _ in range(requests)])


@dataclass(frozen=True)
class Sharing:
    """1, 2, 4, ... sequences that decode after one cached prefix.

    The prefix is sent alone first. Then, for each number, so many prompts of the prefix
    and `own` tokens are sent at once.
    """

    numbers: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
    shared: int = 4096
    own: int = 16
    output: int = 64
    name: str = "sharing"

    def warmup(self, source: TokenSource) -> list[Phase]:
        return self._phases(source, [min(self.numbers), min(max(self.numbers), 8)], min(self.output, 8))

    def phases(self, source: TokenSource) -> list[Phase]:
        return self._phases(source, self.numbers, self.output)

    def _phases(self, source: TokenSource, numbers: Sequence[int], output: int) -> list[Phase]:
        prefix = source.fresh(self.shared)
        phases = [Phase("prime", [[Call(prefix + source.fresh(self.own), TO_CACHE, "prime")]], counted=False)]
        for number in numbers:
            sessions = [[Call(prefix + source.fresh(self.own), output, str(number))] for _ in range(number)]
            phases.append(Phase(str(number), sessions))
        return phases


@dataclass(frozen=True)
class Agents:
    """System prompts chosen by Zipf's law, each with a question of its own.

    With `rates` requests arrive as a Poisson process, one phase per rate (requests per
    second); otherwise `concurrency` are kept running.
    """

    requests: int = 64
    systems: int = 8
    system: int = 2048
    own: int = 128
    output: int = 64
    concurrency: int = 8
    rates: Sequence[float] = ()
    name: str = "agents"

    def warmup(self, source: TokenSource) -> list[Phase]:
        return [trimmed(self._phase(source, self.name), 8, 1)]

    def phases(self, source: TokenSource) -> list[Phase]:
        if not self.rates:
            return [self._phase(source, self.name)]
        return [self._phase(source, f"{rate:g}/s", rate) for rate in self.rates]

    def _phase(self, source: TokenSource, label: str, rate: float | None = None) -> Phase:
        ids = source.mapping()
        made = workloads.agents(self.requests, self.systems, self.system, self.own, self.output)
        sessions = [[Call(ids(request.prompt), self.output, label)] for request in made]
        starts = None if rate is None else poisson(source.random, rate, len(sessions))
        return Phase(label, sessions, starts, None if starts else self.concurrency)


@dataclass(frozen=True)
class Chat:
    """Conversations that grow: a turn is sent when the answer to the one before has come.

    The prompt carries recorded answers, not the generated ones, so it is the same for
    every target. Lengths are half to one and a half times the means given.
    """

    conversations: int = 16
    turns: int = 6
    user: int = 100
    output: int = 60
    concurrency: int = 8
    name: str = "chat"

    def warmup(self, source: TokenSource) -> list[Phase]:
        return [trimmed(phase, 4, 2) for phase in self.phases(source)]

    def phases(self, source: TokenSource) -> list[Phase]:
        ids = source.mapping()
        sessions: dict[bytes, list[Call]] = {}
        for request in workloads.chat(self.conversations, self.turns, self.user, self.output):
            # Random tokens: a conversation is known by its beginning.
            call = Call(ids(request.prompt), request.output_tokens, self.name)
            sessions.setdefault(request.prompt[:32], []).append(call)
        return [Phase(self.name, list(sessions.values()), concurrency=self.concurrency)]


@dataclass(frozen=True)
class Trace:
    """A trace in the Mooncake format with its own arrival times, or a generated one that arrives as a Poisson process.

    Lengths are divided by `scale`: of each 512 tokens that a hash id stands for, the
    first 512 / scale are kept, so what was shared stays shared. Times are divided by `speed`.
    """

    file: Path | None = None
    requests: int = 100
    scale: int = 16
    speed: float = 1.0
    max_output: int = 128
    name: str = "trace"

    def __post_init__(self) -> None:
        if not 1 <= self.scale <= TRACE_BLOCK_TOKENS or TRACE_BLOCK_TOKENS % self.scale:
            raise ValueError(f"the scale must divide {TRACE_BLOCK_TOKENS}")

    def warmup(self, source: TokenSource) -> list[Phase]:
        return [trimmed(phase, 8, 1) for phase in self.phases(source)]

    def phases(self, source: TokenSource) -> list[Phase]:
        ids = source.mapping()
        made = workloads.recorded(self.file, self.requests) if self.file else workloads.synthetic(self.requests)
        sessions = []
        for request in made:
            output = min(max(request.output_tokens // self.scale, 1), self.max_output)
            sessions.append([Call(self._scaled(ids(request.prompt)), output, self.name)])
        times = self._recorded_times() if self.file else poisson(random.Random("trace"), TRACE_RATE, len(sessions))
        return [Phase(self.name, sessions, [time / self.speed for time in times])]

    def _scaled(self, prompt: array[int]) -> array[int]:
        kept = TRACE_BLOCK_TOKENS // self.scale
        scaled = array("I")
        for start in range(0, len(prompt), TRACE_BLOCK_TOKENS):
            length = min(len(prompt) - start, TRACE_BLOCK_TOKENS)
            scaled += prompt[start : start + min(-(-length // self.scale), kept)]
        return scaled

    def _recorded_times(self) -> list[float]:
        assert self.file is not None
        with self.file.open() as lines:
            times = [json.loads(line)["timestamp"] / 1000 for line in islice(lines, self.requests)]
        return [time - times[0] for time in times]


def check_lengths(phases: Iterable[Phase], longest: int) -> None:
    """Raise ValueError if a call is longer than the model allows."""
    for phase in phases:
        for session in phase.sessions:
            for call in session:
                if len(call.prompt) + call.output > longest:
                    raise ValueError(
                        f"{phase.label}: a prompt of {len(call.prompt):,} tokens and {call.output} to generate "
                        f"are more than the {longest:,} that the model takes"
                    )
