"""Decides what one step computes, and books what came of it.

    schedule, run, commit

`schedule` plans a step: a decode token of every running request, then chunks of
prompts, then requests from the queue. How much of the prompts goes into a step, so that
running streams keep their pace, is up to `engine.pace`. `commit` puts the blocks that
the step filled into the cache at once, so that a request admitted next already shares
them, and turns sampled tokens into events. No tensors and no sockets; the time is
passed in.

Admission. Requests come in order of arrival, but among the first WINDOW the one
with the longest cached prefix goes first, since its blocks may be evicted while it
waits. Whoever has been passed over PATIENCE times is next, whatever others have
cached. A request whose next block another one is computing waits for it instead of
computing it again (single flight).

Memory. All blocks of a prompt are allocated at admission, so a prefill never stops
half way. When a decoding request needs a block and none can be had, the youngest
running request is preempted: its computed blocks stay cached while there is room,
and it goes back to the head of the queue.

Background requests have a queue of their own. One at a time is computed, in steps in
which no live request waits and no live prompt is computed, and so little of it that
a live one that arrives then hardly waits. It is the first to give its blocks up, also
for an admission. When a live request waits for what it computes it is no longer in the
background: until its end it is treated like a live one.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from engine.pace import Load, Pace
from engine.request import (
    Failed,
    Finished,
    FinishReason,
    Request,
    Sampled,
    Started,
    State,
    Timings,
    Usage,
)
from prefixcache.cache import CacheStats, PrefixCache
from prefixcache.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    PrefixCacheError,
    ResourceExhausted,
)
from prefixcache.hints.schema import Load as ReplicaLoad
from prefixcache.lease import Found, Lease, OutOfBlocks
from prefixcache.reasons import MissReason
from prefixcache.tokens import TOKEN_BYTES, pack

WINDOW = 16
PATIENCE = 8
ROOM_BLOCKS = 64
"""How much room to grow a sequence asks for at most, so that its blocks stay adjacent."""


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Before the step: copy the first `tokens` slots of one block to another, in all layers."""

    source: int
    target: int
    tokens: int


class Chunk(NamedTuple):
    """The part of one request that a step computes: `tokens` at positions from `start` on.

    `blocks` is the request's block table (position p lies in blocks[p // block_size]);
    `sample` says whether a token is to be sampled after the last one.
    """

    request: Request
    start: int
    tokens: list[int]
    blocks: list[int]
    sample: bool


@dataclass(frozen=True, slots=True)
class Step:
    """What one forward pass computes; `load` says how much that is."""

    chunks: list[Chunk]
    copies: list[BlockCopy]
    load: Load = field(default_factory=Load)


@dataclass(slots=True)
class Totals:
    """Counters since the start. Token counts are taken once, at first admission.

    Background requests count in the last two only, which are taken when they end.
    """

    admitted: int = 0
    finished: int = 0
    aborted: int = 0
    preempted: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    generated_tokens: int = 0
    miss_reasons: Counter[MissReason] = field(default_factory=Counter)
    warmed_prompts: int = 0
    warmed_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for people and monitors. `background` requests are not among those waiting and running."""

    cache: CacheStats
    waiting: int
    running: int
    background: int
    totals: Totals


class Scheduler:
    """Owns the queue, the running requests and their leases; used by one thread.

    `max_length` is the model's limit on prompt plus output, `max_batch_tokens` the
    most tokens of one step, `eos` the token ids that end an output. `max_pause` is how
    many seconds a step with prompts may take while anybody decodes, 0 for any, and
    `background_pause` a step with a background prompt.
    """

    def __init__(
        self,
        cache: PrefixCache,
        *,
        max_length: int,
        max_batch_tokens: int,
        max_running: int,
        eos: frozenset[int],
        max_pause: float = 0.0,
        background_pause: float = 0.01,
    ) -> None:
        if max_batch_tokens < max_running:
            raise InvalidArgument(
                f"max_batch_tokens ({max_batch_tokens}) must be at least max_running ({max_running}): "
                "every running request needs a place in each step"
            )
        self.cache = cache
        self.max_running = max_running
        self._max_length = max_length
        self._pace = Pace(max_pause, max_batch_tokens, cache.block_size, background_pause)
        self._eos = eos
        self._waiting: list[Request] = []
        self._running: list[Request] = []  # oldest admission first
        self._later: list[Request] = []  # background requests that wait
        self._background: Request | None = None  # the one that is computed, unless it is among those running
        self._hurried = False
        self._deadlines: list[tuple[float, int, Request]] = []
        self._totals = Totals()
        self._totals_of: defaultdict[str, Totals] = defaultdict(Totals)

    # From outside

    @property
    def idle(self) -> bool:
        return not (self._waiting or self._running or self._later or self._background)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def validate(self, prompt: Sequence[int]) -> None:
        """Raise InvalidArgument for a prompt that could never be served. Callable from any thread."""
        if not prompt:
            raise InvalidArgument("the prompt is empty: send at least one token")
        if len(prompt) >= self._max_length:
            raise InvalidArgument(
                f"the prompt has {len(prompt)} tokens, but the model takes at most {self._max_length - 1} "
                "and one for the output: shorten it"
            )
        if len(prompt) > self._pool_tokens:
            raise InvalidArgument(
                f"the prompt has {len(prompt)} tokens, but the block pool holds {self._pool_tokens} beside "
                "what may be pinned: shorten it, or start the server with more --cache-memory"
            )

    def submit(self, request: Request) -> None:
        """Put a validated request at the end of its queue."""
        params = request.params
        request.account = self.cache.account_of(request.namespace)
        if request.background:
            request.max_length = len(request.prompt)
            self._later.append(request)
        else:
            wanted = self._max_length if params.max_tokens is None else len(request.prompt) + params.max_tokens
            # The last token's keys and values are never needed, hence one more than the pool holds.
            request.max_length = min(wanted, self._max_length, self._pool_tokens + 1)
            request.cached_before = self._cached_tokens(request)
            self._waiting.append(request)
        if request.deadline is not None:
            alive = len(self._waiting) + len(self._running) + len(self._later) + 1
            if len(self._deadlines) > 2 * alive:  # mostly of ended requests
                self._deadlines = [entry for entry in self._deadlines if entry[2].state is not State.FINISHED]
                heapq.heapify(self._deadlines)
            heapq.heappush(self._deadlines, (request.deadline, id(request), request))

    def abort(self, request: Request, error: PrefixCacheError | None = None) -> None:
        """End a request in any state; what it computed stays cached. Idempotent.

        With `error`, the request is told by a `Failed`; without, it hears nothing more.
        """
        if self._end(request):
            for totals in self._counted(request):
                totals.aborted += not request.background
            if error is not None:
                request.sink(Failed(error))

    def complete(self, request: Request, now: float, completion_tokens: int) -> Finished:
        """End a request whose caller has all it wants, `completion_tokens` of what was generated.

        It must have started. Counted as finished; no event follows. Idempotent.
        """
        self._keep(request)
        if self._end(request):
            for totals in self._counted(request):
                totals.finished += 1
        return _finished(request, now, FinishReason.STOP, completion_tokens)

    def lookup(self, prompt: Sequence[int], namespace: str) -> Found:
        """What a request with this prompt would find now."""
        packed = pack(prompt)
        found = self.cache.lookup(packed, namespace)
        return found._replace(alternative=self._alternative(found.reason, packed, namespace))

    def tick(self, now: float) -> None:
        """Say what time it is; what has expired in the cache is removed."""
        self.cache.tick(now)

    def hurry(self, hurry: bool) -> None:
        """Say whether nobody is served yet, so that background requests may take whole steps."""
        self._hurried = hurry

    def cached(self, prompt: Sequence[int], namespace: str) -> int:
        """How many of a prompt's tokens are cached from its beginning; unlike in a lookup, the last one counts too."""
        return self.cache.lookup(pack([*prompt, 0]), namespace).cached_tokens  # the last token of all is never matched

    def stats(self, tenant: str | None = None) -> EngineStats:
        """Count everything, or what concerns one tenant."""
        totals = self._totals if tenant is None else self._totals_of.get(tenant, Totals())
        totals = replace(totals, miss_reasons=Counter(totals.miss_reasons))
        computed = [*self._running, *([self._background] if self._background is not None else ())]
        waiting, running, later = (
            [request for request in requests if tenant is None or request.account == tenant]
            for requests in (self._waiting, computed, self._later)
        )
        background = sum(request.background for request in running)
        return EngineStats(
            self.cache.stats(tenant), len(waiting), len(running) - background, len(later) + background, totals
        )

    def load(self) -> ReplicaLoad:
        """How busy this is, for other replicas. Callable from any thread, also in the middle of a step."""
        waiting, running = list(self._waiting), list(self._running)
        return ReplicaLoad(
            running=len(running),
            waiting=len(waiting),
            waiting_tokens=sum(left for request in waiting + running if (left := request.uncomputed) > 1),
            free=self.cache.free_blocks,
            cached=self.cache.evictable_blocks,
            prompt_tokens=self._totals.prompt_tokens,
            cached_tokens=self._totals.cached_tokens,
        )

    # The step

    def schedule(self, now: float) -> Step | None:
        """Plan the next step, or return None if nothing can be computed."""
        self.cache.tick(now)
        self._expire(now)
        self._grow()
        cached: dict[Request, int] = {}
        self._promote(cached)
        chunks: list[Chunk] = []
        copies: list[BlockCopy] = []
        # At most one and a promoted one, since nobody is admitted behind a prompt that is cut.
        prefilling: list[Request] = []
        keys = 0
        for request in self._running:
            tokens = request.tokens
            length = len(tokens)
            if length - request.computed == 1 and not request.background:
                assert request.lease is not None
                chunks.append(Chunk(request, length - 1, tokens[-1:], request.lease.blocks, True))
                keys += length
            else:
                prefilling.append(request)
        load = Load(stream_rows=len(chunks), stream_keys=keys)
        full = False
        for request in prefilling:
            room = 0 if full else self._room_for(request, request.computed, load)
            full = not room or not self._add_chunk(request, room, chunks, load)
        while not full and len(self._running) < self.max_running:
            admitted = self._next_waiting(cached)
            if admitted is None:
                break
            room = self._room_for(admitted, cached[admitted], load)
            if not room:
                break
            self._admit(admitted, now, copies)
            full = not self._add_chunk(admitted, room, chunks, load)
        if not self._waiting and not load.prompt_rows:
            self._add_background(now, chunks, copies, load)
        return Step(chunks, copies, load) if chunks else None

    def commit(self, step: Step, sampled: Sequence[Sampled | None], now: float, seconds: float) -> None:
        """Book a step that has been run: `sampled` has an entry per chunk, `seconds` is what the run took."""
        self._totals.steps += 1
        self._pace.observe(step.load, seconds)
        size = self.cache.block_size
        for chunk, sample in zip(step.chunks, sampled, strict=True):
            request = chunk.request
            lease = request.lease
            assert lease is not None and (sample is not None) == chunk.sample
            if step.copies:
                lease.copied()
            request.computed = computed = chunk.start + len(chunk.tokens)
            if request.first_token_at is None:
                request.prefill_seconds += seconds
            if computed // size > lease.shared and request.store and not lease.detached:
                self._commit_blocks(request, lease)
            if sample is not None:
                self._book(request, sample, now)
            elif request.background and computed == len(request.tokens):
                request.first_token_at = now
                self._finish(request, now, None)

    # Parts of the above

    @property
    def _pool_tokens(self) -> int:
        return (self.cache.total_blocks - self.cache.pin_budget) * self.cache.block_size

    def _counted(self, request: Request) -> tuple[Totals, Totals]:
        """The counters that a request counts in."""
        return self._totals, self._totals_of[request.account]

    def _alternative(self, reason: MissReason, packed: bytes, namespace: str) -> int:
        return self.cache.alternative(packed, namespace) if reason is MissReason.DIVERGED else 0

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.cache.block_size)

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, request = heapq.heappop(self._deadlines)
            where = "in the queue" if request.state is State.WAITING else f"after {len(request.output)} tokens"
            if request.background:
                where = f"when {request.computed} of {len(request.tokens)} tokens were computed"
            self.abort(request, DeadlineExceeded(f"the deadline passed {where}: allow more time or send less"))

    def _grow(self) -> None:
        """Give every running request the block its next token needs, preempting the youngest if there is none."""
        size = self.cache.block_size
        for request in list(self._running):
            lease = request.lease
            if lease is None:
                continue  # preempted for an older one
            if len(request.tokens) <= len(lease.blocks) * size:
                continue
            missing = self._blocks_for(len(request.tokens)) - len(lease.blocks)
            while missing > 0 and request.state is State.RUNNING:
                try:
                    self.cache.allocate(lease, missing, room=self._room(request))
                    missing = 0
                except OutOfBlocks:
                    self._preempt(self._background or self._running[-1])

    def _promote(self, cached: dict[Request, int]) -> None:
        """Treat the background request like a live one from now on if one of those admitted next waits for its blocks.

        `cached` remembers within one step how many tokens of whom are cached.
        """
        background = self._background
        if background is None:
            return
        alone = all(len(request.tokens) - request.computed == 1 for request in self._running)
        for request in self._waiting[:WINDOW]:
            tokens = cached[request] = self._cached_tokens(request)
            # With no live prompt being computed, there is nobody else whom it could wait for.
            if self._computed_by_another(request, tokens) and (alone or self._wants(request, tokens, background)):
                self._background = None
                self._running.append(background)
                return

    def _wants(self, request: Request, cached: int, other: Request) -> bool:
        """Whether the next block of a request, `cached` tokens of which are cached, is one that another computes."""
        assert other.lease is not None
        block = cached // self.cache.block_size
        wanted = request.packed[: (block + 1) * self.cache.block_bytes]
        return request.namespace == other.namespace and other.lease.shared <= block and other.packed.startswith(wanted)

    def _room(self, request: Request) -> int:
        final = self._blocks_for(request.max_length - 1)
        return min(max(final - self._blocks_for(len(request.tokens)), 0), ROOM_BLOCKS)

    def _room_for(self, request: Request, start: int, load: Load) -> int:
        """How many tokens from position `start` on a step of `load` may compute of a request."""
        return self._pace.chunk(load, start, len(request.tokens) - start)

    def _add_chunk(self, request: Request, room: int, chunks: list[Chunk], load: Load) -> bool:
        """Add the next `room` tokens to a step, or as many as there are; returns whether that is all of them."""
        assert request.lease is not None
        start, total = request.computed, len(request.tokens)
        end = min(start + room, total)
        sample = end == total and not request.background
        chunks.append(Chunk(request, start, request.tokens[start:end], request.lease.blocks, sample))
        load.add_prompt(start, end - start)
        return end == total

    def _add_background(self, now: float, chunks: list[Chunk], copies: list[BlockCopy], load: Load) -> None:
        """Add some of a background request to a step without live prompts, of the next one if none has begun."""
        if self._background is not None and self._background.lease is not None and self._background.lease.detached:
            self.abort(self._background, FailedPrecondition("the prompt was invalidated while it was being computed"))
        if not self._pace.spares(load):
            return
        if self._background is None:
            self._background = self._next_background(idle=not chunks)
            if self._background is None:
                return
            self._later.remove(self._background)
            self._begin(self._background, now, copies)
        request = self._background
        start, rest = request.computed, len(request.tokens) - request.computed
        room = (self._pace.chunk if self._hurried else self._pace.background_chunk)(load, start, rest)
        self._add_chunk(request, room, chunks, load)
        load.background = True

    def _next_background(self, *, idle: bool) -> Request | None:
        """Choose which background request begins, or none; if nothing else runs, fail what can never begin."""
        for request in self._later[: None if idle else WINDOW]:
            if self._computed_by_another(request, self._cached_tokens(request)):
                continue
            if self._fits(request):
                return request
            if not idle:
                return None
            self.abort(request, ResourceExhausted("there is no room for the prompt beside what is kept in the cache"))
        return None

    def _next_waiting(self, cached: dict[Request, int]) -> Request | None:
        """Choose who is admitted next, or nobody; what is in the background gives way to it."""
        best: Request | None = None
        for request in self._waiting[:WINDOW]:
            if request not in cached:
                cached[request] = self._cached_tokens(request)
            if self._computed_by_another(request, cached[request]):
                continue
            if best is None or cached[request] > cached[best]:
                best = request
            if request.passed_over >= PATIENCE:
                best = request
                break
        if best is not None and not self._fits(best) and self._background is not None:
            self._preempt(self._background)
        return best if best is not None and self._fits(best) else None

    def _cached_tokens(self, request: Request) -> int:
        return self.cache.lookup(request.packed, request.namespace).cached_tokens if request.read else 0

    def _computed_by_another(self, request: Request, cached: int) -> bool:
        if not request.read:
            return False
        return self.cache.in_flight(request.packed, request.namespace, beyond=cached // self.cache.block_size)

    def _fits(self, request: Request) -> bool:
        """Whether a request can be admitted and those running can still take a block each."""
        blocks = self._blocks_for(len(request.tokens)) + len(self._running)
        if not request.read:
            return blocks <= self.cache.available_blocks
        return self.cache.fits(request.packed, request.namespace, blocks)

    def _admit(self, request: Request, now: float, copies: list[BlockCopy]) -> None:
        place = self._waiting.index(request)
        for other in self._waiting[:place]:
            other.passed_over += 1
        del self._waiting[place]
        self._running.append(request)
        self._begin(request, now, copies)

    def _begin(self, request: Request, now: float, copies: list[BlockCopy]) -> None:
        """Give a request its blocks."""
        lease = self.cache.match(request.packed, request.namespace, read=request.read, terms=request.terms)
        missing = self._blocks_for(len(request.tokens)) - lease.shared
        try:
            self.cache.allocate(lease, missing, room=self._room(request))
        except OutOfBlocks:  # what holds the source block holds the room that `_fits` saw
            lease.forgo_source()
            self.cache.allocate(lease, missing, room=self._room(request))
        if lease.source is not None:
            copies.append(BlockCopy(lease.source.block, lease.blocks[lease.shared], lease.source.tokens))
        if request.store:
            self.cache.announce(lease, request.packed)
        request.state = State.RUNNING
        request.lease = lease
        again = max(request.computed - lease.cached_tokens, 0)
        request.recomputed += again
        request.computed = lease.cached_tokens
        if request.started is None:
            request.admitted_at = now
            alternative = self._alternative(lease.reason, request.packed, request.namespace)
            started = Started(len(request.prompt), lease.cached_tokens, lease.reason, lease.position, alternative)
            request.started = started
            if not request.background:
                for totals in self._counted(request):
                    totals.admitted += 1
                    totals.prompt_tokens += started.prompt_tokens
                    totals.cached_tokens += started.cached_tokens
                    totals.miss_reasons[started.reason] += 1
            request.sink(started)
        if not request.background:
            for totals in self._counted(request):
                totals.recomputed_tokens += again

    def _preempt(self, request: Request) -> None:
        """Put a request that is computed back to the head of its queue."""
        self._leave(request)
        self._release(request)
        request.state = State.WAITING
        if request.background:
            self._later.insert(0, request)
            return
        request.packed = pack(request.tokens)
        request.passed_over = PATIENCE
        self._waiting.insert(0, request)
        for totals in self._counted(request):
            totals.preempted += 1

    def _leave(self, request: Request) -> None:
        """Take a request out of those that are computed."""
        if request is self._background:
            self._background = None
        else:
            self._running.remove(request)

    def _commit_blocks(self, request: Request, lease: Lease) -> None:
        size = self.cache.block_size
        start, end = lease.shared * size, request.computed // size * size
        if end * TOKEN_BYTES <= len(request.packed):
            packed = request.packed[start * TOKEN_BYTES : end * TOKEN_BYTES]
        else:
            packed = pack(request.tokens[start:end])
        self.cache.commit(lease, packed)

    def _end(self, request: Request) -> bool:
        """Take a request out of wherever it is; returns False if it had ended already."""
        if request.state is State.FINISHED:
            return False
        if request.state is State.WAITING:
            (self._later if request.background else self._waiting).remove(request)
        else:
            self._leave(request)
            self._release(request)
        request.state = State.FINISHED
        return True

    def _release(self, request: Request) -> None:
        """Let a request's blocks go, keeping its partly filled last one for an exact repeat."""
        lease = request.lease
        assert lease is not None
        tail = request.tokens[lease.shared * self.cache.block_size : request.computed]
        keep = request.store and 0 < len(tail) < self.cache.block_size
        lease.release(pack(tail) if keep else b"")
        copied = 0 if lease.source is None else lease.source.tokens  # these were in the cache before
        request.written += max(lease.stored - copied, 0)
        request.lease = None

    def _keep(self, request: Request) -> None:
        """Before a request ends well: keep its session's blocks, if it asked for that."""
        if request.keep_for and request.lease is not None:
            request.kept = self.cache.keep_session(request.lease, request.keep_for)

    def _book(self, request: Request, sample: Sampled, now: float) -> None:
        """Add a sampled token; the one that ends the output is counted but not part of it."""
        request.tokens.append(sample.token)
        self._totals.generated_tokens += 1
        self._totals_of[request.account].generated_tokens += 1
        if request.first_token_at is None:
            request.first_token_at = now
        params = request.params
        ends = sample.token in params.stop_token_ids or (sample.token in self._eos and not params.ignore_eos)
        if not ends:
            request.sink(sample)
        if ends or len(request.tokens) >= request.max_length:
            self._finish(request, now, sample.token if ends else None)

    def _finish(self, request: Request, now: float, stop_token: int | None) -> None:
        self._keep(request)
        self._end(request)
        for totals in self._counted(request):
            if request.background:
                assert request.started is not None
                totals.warmed_prompts += 1
                totals.warmed_tokens += len(request.prompt) - request.started.cached_tokens
            else:
                totals.finished += 1
        reason = FinishReason.LENGTH if stop_token is None else FinishReason.STOP
        request.sink(_finished(request, now, reason, len(request.tokens) - len(request.prompt), stop_token))


def _finished(
    request: Request, now: float, reason: FinishReason, completion_tokens: int, stop_token: int | None = None
) -> Finished:
    """What there is to say of a request that has generated something, or was computed in the background, and ended."""
    assert request.started is not None and request.first_token_at is not None
    usage = Usage(
        prompt_tokens=request.started.prompt_tokens,
        cached_tokens=request.started.cached_tokens,
        completion_tokens=completion_tokens,
        recomputed_tokens=request.recomputed,
        written_tokens=request.written,
    )
    timings = Timings(
        queue=request.admitted_at - request.arrival,
        first_token=request.first_token_at - request.arrival,
        total=now - request.arrival,
        prefill=request.prefill_seconds,
    )
    return Finished(reason, usage, timings, stop_token, request.kept)
