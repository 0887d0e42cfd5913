"""What the services have in common: the engine once it is loaded, tokenizing off the event loop, who is calling."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, TypeVar

import grpc

from engine.assembly import Engine
from engine.config import EngineConfig
from engine.events import EventBridge
from engine.feed import Feed
from engine.gate import Gate
from engine.hints import Hints, Holder
from engine.loop import clock
from engine.quotas import Quota
from engine.scheduler import Scheduler
from engine.shapes import Shapes
from engine.tenants import Caller
from engine.tokenizer import Place, Prompt
from prefixcache.errors import Unauthenticated, Unavailable
from prefixcache.terms import Terms
from prefixcache.tokens import pack

TOKENIZER_THREADS = 2
LONG_PROMPT = 2048
"""Tokens from which on a prompt's blocks are named off the event loop."""

Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")

_CALLER: ContextVar[Caller] = ContextVar("caller")


class Front:
    """Lives in one event loop; `open` gives it its engine. `active` counts the Generate calls in progress."""

    def __init__(self, config: EngineConfig) -> None:
        self.bridge = EventBridge(asyncio.get_running_loop())
        self.feed = Feed(asyncio.get_running_loop(), lambda function: self.engine.loop.call(function))
        self.shapes = Shapes(asyncio.get_running_loop())
        self.stream_interval = config.stream_interval_ms / 1000
        self.gate = Gate(config.tenants, certificates=bool(config.tls_client_ca))
        self.hints = Hints(config, self.feed)
        self.replica_id = config.replica_id
        self.active = 0
        self.terms = Terms(ttl=config.default_ttl_seconds or None, sliding=config.ttl_mode == "sliding")
        self._engine: Engine | None = None
        self._began = 0.0
        self._tokenizing = ThreadPoolExecutor(TOKENIZER_THREADS, "tokenizer")

    def open(self, engine: Engine) -> None:
        """From now on there is an engine."""
        self._engine = engine
        self._began = clock()

    @property
    def loaded(self) -> Engine | None:
        """The engine, or None while the model is being loaded."""
        return self._engine

    @property
    def engine(self) -> Engine:
        """The engine. Raises Unavailable while the model is being loaded."""
        if self._engine is None:
            raise Unavailable("the model is still being loaded; wait until the health service says SERVING")
        return self._engine

    @property
    def uptime(self) -> float:
        """Seconds since the server began to serve."""
        return clock() - self._began

    def admit(self, context: Context) -> None:
        """Find out who makes the call that this task answers. Raises Unauthenticated."""
        try:
            _CALLER.set(self.gate.caller(context))
        except Unauthenticated as error:
            self.gate.refused(error, context.peer(), clock())
            raise

    def caller(self, context: Context) -> Caller:
        """Who is calling, as `admit` found out."""
        return _CALLER.get()

    @contextlib.contextmanager
    def computing(self, context: Context) -> Iterator[Quota]:
        """Count a call that makes the engine compute, and yield the quota to charge. Raises ResourceExhausted."""
        quota = self.gate.quota(self.caller(context))
        quota.enter(clock())
        try:
            yield quota
        finally:
            quota.leave()

    async def encode(self, prompt: Prompt, limit: int | None = None) -> list[int]:
        """Tokenize off the event loop."""
        tokenizer = self.engine.tokenizer
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, tokenizer.encode, prompt, limit)

    async def locate(self, prompt: Prompt, tokens: int) -> Place:
        """Find where in a prompt's text its first `tokens` tokens end, off the event loop."""
        tokenizer = self.engine.tokenizer
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, tokenizer.locate, prompt, tokens)

    async def hashes(self, ids: Sequence[int], namespace: str) -> bytes:
        """Return the hashes of the blocks of a prompt that a request could reuse, 16 bytes each."""
        cache = self.engine.cache

        def name() -> bytes:
            return cache.names.of(pack(ids), namespace, cache.published)

        if len(ids) < LONG_PROMPT:
            return name()
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, name)

    async def elsewhere(self, ids: Sequence[int], namespace: str) -> list[Holder]:
        """Return which other replicas hold how much of a prompt, longest first; nothing if it is not known."""
        return await self.hints.elsewhere(await self.hashes(ids, namespace)) if self.hints.used else []

    async def ask(self, function: Callable[[Scheduler], T]) -> T:
        """Run `function` on the engine's thread between two steps, and return what it returns."""
        answer: Future[T] = self.engine.loop.call(function)
        return await asyncio.wrap_future(answer)

    async def wait_for_callers(self, seconds: float) -> None:
        """Wait until no Generate call is active, for at most `seconds`."""
        end = clock() + seconds
        while self.active and clock() < end:
            await asyncio.sleep(0.01)

    def close(self) -> None:
        self._tokenizing.shutdown(wait=False, cancel_futures=True)
