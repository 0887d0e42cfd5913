"""Simulated replicas: the real prefix cache, and a model of how long one GPU takes.

A replica works in steps, as the engine does. A step computes one token for each running
request and up to `chunk` prompt tokens, first come, first served. Its duration is

    step + context_token x (tokens of context that its running requests read)
         + for each prompt token at position p: (1 + p / attention) / prefill_rate

The defaults are those of a model with 8 billion parameters of 16 bits (Llama 3.1 8B: 32
layers, 8 KV heads of 128, so 128 KiB of keys and values per token) on an H100 with 80 GB,
from its data sheet: 16 GB of weights are read at 3.35 TB/s in 4.8 ms, with what else a step
needs 6 ms; a token of context takes 128 KiB / 2.8 TB/s = 47 ns; 16 GFLOP per prompt token
at 400 TFLOP/s are 25,000 tokens/s; attention adds 0.52 MFLOP per token of context, which
doubles that at 30,000 tokens; and 56 GB remain for 26,000 blocks of 16 tokens.

What is simplified: a request's blocks are all allocated when it is admitted, those of its
answer included, so that nothing is preempted.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from prefixcache.cache import PrefixCache
from prefixcache.hints.schema import Load
from prefixcache.lease import CacheEvent, Lease, Stored
from prefixcache.routing.memory import Names, leading, names_of
from prefixcache.tokens import TOKEN_BYTES

BLOCK = 16
BLOCK_BYTES = BLOCK * TOKEN_BYTES


@dataclass(frozen=True)
class Machine:
    """What a replica can do; see above for the units."""

    blocks: int = 26_000
    prefill_rate: float = 25_000.0
    attention: float = 30_000.0
    step: float = 0.006
    context_token: float = 47e-9
    chunk: int = 2_048
    max_running: int = 128
    max_waiting: int = 128

    def prefill_seconds(self, start: int, count: int) -> float:
        """What `count` prompt tokens from position `start` on add to a step."""
        return count * (1 + (start + count / 2) / self.attention) / self.prefill_rate

    def decode_seconds(self, batch: int, context: int, steps: int) -> float:
        """What `steps` steps take that compute nothing but a token each for `batch` requests."""
        grown = batch * steps * (steps - 1) / 2
        return steps * self.step + self.context_token * (context * steps + grown)


@dataclass(eq=False, slots=True)
class Job:
    """One request: when it is to be sent, what it asks, and after which other one (by number) it can be asked."""

    number: int
    at: float
    prompt: bytes
    output: bytes
    hashes: bytes
    session: str
    after: int | None = None

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt) // TOKEN_BYTES

    @property
    def output_tokens(self) -> int:
        return max(len(self.output) // TOKEN_BYTES, 1)

    @property
    def blocks(self) -> int:
        return -(-(self.prompt_tokens + self.output_tokens) // BLOCK)


@dataclass(eq=False, slots=True)
class Running:
    """A job that was admitted."""

    job: Job
    lease: Lease
    position: int
    """Prompt tokens computed so far."""


@dataclass
class Ended:
    """What happened in a span: who got the first token (and how many tokens were cached), and who the last."""

    first: list[tuple[Job, int]] = field(default_factory=list)
    last: list[Job] = field(default_factory=list)


class Replica:
    """One engine. `submit` and `finish` change it; after both, `plan` says until when it is busy."""

    def __init__(self, machine: Machine, listener: Callable[[CacheEvent], None] | None = None) -> None:
        self.machine = machine
        self.cache = PrefixCache(machine.blocks, BLOCK, listener=listener, memory_of_removed=0)
        self.busy = 0.0
        self.prompt_tokens = self.cached_tokens = 0
        self._waiting: deque[Job] = deque()
        self._prefilling: deque[Running] = deque()
        self._decoding: list[tuple[int, int, Running]] = []  # a heap by the step after which each ends
        self._context = 0  # tokens that a step of those reads
        self._steps = 0
        self._span: tuple[float, int, list[tuple[Running, int]]] | None = None  # since when, steps, chunks

    def submit(self, job: Job) -> bool:
        """Take in a job, or refuse it: the queue is full, or it is too long for the cache."""
        if len(self._waiting) >= self.machine.max_waiting or job.blocks > self.machine.blocks:
            return False
        self._waiting.append(job)
        return True

    def load(self) -> Load:
        waiting_tokens = sum(job.prompt_tokens for job in self._waiting)
        waiting_tokens += sum(one.job.prompt_tokens - one.position for one in self._prefilling)
        stats = self.cache.stats()
        return Load(
            running=len(self._prefilling) + len(self._decoding),
            waiting=len(self._waiting),
            waiting_tokens=waiting_tokens,
            free=stats.free,
            cached=stats.cached,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
        )

    def busy_until(self, now: float) -> float:
        """Return for how many seconds it has computed so far."""
        return self.busy + (now - self._span[0] if self._span else 0.0)

    def plan(self, now: float) -> float | None:
        """Begin what comes next; return when it ends, or None if there is nothing to do.

        While only tokens are generated, all steps up to the first end are one span. If a job
        has been submitted since, it is cut short behind the step that is being computed.
        """
        machine = self.machine
        batch = len(self._decoding)
        if self._span is not None:
            since, steps, chunks = self._span
            if not chunks:
                steps = self._cut(now - since, steps)
                self._span = since, steps, chunks
                return since + machine.decode_seconds(batch, self._context, steps)
            return None
        chunks = self._chunks()
        if chunks:
            self._span = now, 1, chunks
            seconds = machine.decode_seconds(batch, self._context, 1)
            return now + seconds + sum(machine.prefill_seconds(one.position, count) for one, count in chunks)
        if batch:
            steps = self._decoding[0][0] - self._steps
            self._span = now, steps, []
            return now + machine.decode_seconds(batch, self._context, steps)
        return None

    def finish(self, now: float) -> Ended:
        """The span that was planned is over."""
        assert self._span is not None
        since, steps, chunks = self._span
        self._span = None
        self.busy += now - since
        self._steps += steps
        self._context += steps * len(self._decoding)
        ended = Ended()
        while self._decoding and self._decoding[0][0] <= self._steps:
            _, _, one = heapq.heappop(self._decoding)
            self._context -= one.job.prompt_tokens + one.job.output_tokens
            self._end(one, ended)
        for one, count in chunks:
            one.position += count
            self._commit(one, one.job.prompt, one.position)
            if one.position == one.job.prompt_tokens:
                self._prefilling.remove(one)
                ended.first.append((one.job, one.lease.cached_tokens))
                if one.job.output_tokens == 1:
                    self._end(one, ended)
                else:
                    last = self._steps + one.job.output_tokens - 1
                    heapq.heappush(self._decoding, (last, one.job.number, one))
                    self._context += one.job.prompt_tokens + 1
        return ended

    def _end(self, one: Running, ended: Ended) -> None:
        sequence = one.job.prompt + one.job.output
        self._commit(one, sequence, len(sequence) // TOKEN_BYTES - 1)  # the last token was never fed back
        one.lease.release()
        ended.last.append(one.job)

    def _commit(self, one: Running, sequence: bytes, tokens: int) -> None:
        """Store the whole blocks among the first `tokens` tokens."""
        start, end = one.lease.shared * BLOCK_BYTES, tokens // BLOCK * BLOCK_BYTES
        self.cache.commit(one.lease, sequence[start:end])

    def _cut(self, passed: float, steps: int) -> int:
        """How many steps of a span have begun after some seconds."""
        batch, context = len(self._decoding), self._context
        return 1 + bisect_left(
            range(1, steps), passed, key=lambda begun: self.machine.decode_seconds(batch, context, begun)
        )

    def _chunks(self) -> list[tuple[Running, int]]:
        """Which prompt tokens the next step computes."""
        left = self.machine.chunk
        chunks: list[tuple[Running, int]] = []
        for one in self._prefilling:
            count = min(left, one.job.prompt_tokens - one.position)
            chunks.append((one, count))
            left -= count
            if not left:
                return chunks
        while left and self._waiting:
            admitted = self._admit(self._waiting[0])
            if admitted is None:
                break
            self._waiting.popleft()
            self._prefilling.append(admitted)
            count = min(left, admitted.job.prompt_tokens - admitted.position)
            chunks.append((admitted, count))
            left -= count
        return chunks

    def _admit(self, job: Job) -> Running | None:
        """Give a job its blocks, unless there are none or another one is computing what it wants."""
        cache = self.cache
        if len(self._prefilling) + len(self._decoding) >= self.machine.max_running:
            return None
        if self._prefilling:
            beyond = cache.lookup(job.prompt).cached_tokens // BLOCK
            if cache.in_flight(job.prompt, beyond=beyond):
                return None
        if not cache.fits(job.prompt, "", job.blocks):
            return None
        lease = cache.match(job.prompt)
        lease.copied()
        cache.allocate(lease, job.blocks - len(lease.blocks))
        cache.announce(lease, job.prompt)
        self.prompt_tokens += job.prompt_tokens
        self.cached_tokens += lease.cached_tokens
        return Running(job, lease, lease.cached_tokens)


class Told:
    """What Redis knows of a replica's blocks: its cache's events, `lag` seconds later."""

    def __init__(self, lag: float) -> None:
        self.now = 0.0
        """When what is heard happens; set by the simulation."""
        self._lag = lag
        self._blocks: set[int] = set()
        self._coming: deque[tuple[float, bool, Names]] = deque()

    def hear(self, event: CacheEvent) -> None:
        self._coming.append((self.now + self._lag, isinstance(event, Stored), names_of(event.hashes)))

    def held(self, names: Names, now: float) -> int:
        """Return how many of a prompt's first blocks are known to be there."""
        while self._coming and self._coming[0][0] <= now:
            _, stored, changed = self._coming.popleft()
            if stored:
                self._blocks.update(changed)
            else:
                self._blocks.difference_update(changed)
        return leading(names, self._blocks.__contains__)
