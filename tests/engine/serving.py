"""Servers for tests: real gRPC on a free port, in a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from engine.assembly import Engine, OnDeath, load_engine
from engine.config import EngineConfig, load
from engine.embedded.vocabulary import BYTEWISE_SIZE, bytewise
from engine.loop import EngineLoop, StepRunner
from engine.request import Sampled
from engine.scheduler import EngineStats, Scheduler, Step
from engine.secret import read_secret
from engine.server import Load, Server
from engine.tenants import PUBLISHED, tenant_of
from engine.tokenizer import Tokenizer
from engine.wire import ServedModel
from prefixcache.cache import PrefixCache
from prefixcache.errors import Unavailable
from tests.engine.paper import PaperRunner

BLOCK = 16
PAPER_LENGTH = 2000
FINGERPRINT = "70617065" * 4


class RunningServer:
    """A served engine. Leaving the `with` block ends it."""

    def __init__(self, load_with: Load = load_engine, **options: object) -> None:
        self._load = load_with
        self._config: EngineConfig = load({}, **{"port": 0, "threads": 1, **options})
        self._listening = threading.Event()
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._begun = False
        self._thread = threading.Thread(target=self._run)
        self.loop: asyncio.AbstractEventLoop
        self.server: Server

    @property
    def address(self) -> str:
        return self.server.address

    def begin(self) -> Self:
        """Return as soon as the port is open; the engine may still be loading."""
        self._begun = True
        self._thread.start()
        assert self._listening.wait(30)
        return self

    def __enter__(self) -> Self:
        """Return when the server serves, or, after `begin`, at once."""
        if self._begun:
            return self
        self.begin()
        assert self._started.wait(60)
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._ending.set)
            self._thread.join()

    def drain(self, seconds: float) -> bool:
        return asyncio.run_coroutine_threadsafe(self.server.drain(seconds), self.loop).result(60)

    def stats(self) -> EngineStats:
        """Ask the engine itself."""
        return self.server.front.engine.loop.call(lambda scheduler: scheduler.stats()).result(30)

    def check(self) -> None:
        """Assert every invariant of the cache, between two steps."""
        self.server.front.engine.loop.call(lambda scheduler: scheduler.cache.check()).result(30)

    def wait_until_active(self, calls: int = 1) -> None:
        """Return when so many Generate calls have reached the engine."""
        self._wait(lambda: self.server.front.active >= calls)

    def wait_until_warming(self, prompts: int) -> None:
        """Return when so many prompts are in the background."""
        self._wait(lambda: self.server.front.engine.loop.background >= prompts)

    def wait_until_idle(self, each: Callable[[], None] = lambda: None) -> None:
        """Return when no request is waiting or running any more; do `each` before every look."""

        def idle() -> bool:
            each()
            return self.server.front.engine.loop.idle()

        self._wait(idle)
        self.stats()

    def wait_until_stopping(self) -> None:
        """Return when the engine has been told to stop."""

        def stopping() -> bool:
            try:
                self.server.front.engine.loop.call(lambda _: None)
            except Unavailable:
                return True
            return False

        self._wait(stopping)

    @staticmethod
    def _wait(condition: Callable[[], bool]) -> None:
        pause = threading.Event()
        while not condition():
            pause.wait(0.005)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._ending = asyncio.Event()
        self.server = Server(self._config, self._load)
        starting = asyncio.create_task(self.server.start())
        while not self.server.port and not starting.done():
            await asyncio.sleep(0.001)
        self._listening.set()
        try:
            await starting
            self._started.set()
            await self._ending.wait()
        except Exception as failure:  # noqa: BLE001 - raised again in the test's thread
            self._failure = failure
            self._started.set()
        finally:
            await self.server.stop()


class PaperEngine:
    """Loads an engine that computes on paper, in microseconds and checking every block it reads."""

    def __init__(
        self,
        blocks: int = 256,
        max_running: int = 8,
        tokenizer: Tokenizer | None = None,
        runner: StepRunner | None = None,
    ) -> None:
        self._blocks = blocks
        self._max_running = max_running
        self._tokenizer = tokenizer or Tokenizer(bytewise(), BYTEWISE_SIZE)
        self._runner = runner or PaperRunner(blocks, BLOCK, 256)

    def __call__(self, config: EngineConfig, on_death: OnDeath) -> Engine:
        eos = 257
        cache = PrefixCache(
            self._blocks,
            BLOCK,
            fingerprint=bytes.fromhex(FINGERPRINT),
            secret=read_secret(config.secret_file),
            account_of=tenant_of,
            pin_share=config.max_pinned_percent / 100,
            shared_namespace=PUBLISHED,
        )
        scheduler = Scheduler(
            cache,
            max_length=PAPER_LENGTH,
            max_batch_tokens=256,
            max_running=self._max_running,
            eos=frozenset({eos}),
        )
        loop = EngineLoop(scheduler, self._runner, max_queue=config.max_queue, on_death=on_death)
        served = ServedModel(
            "paper",
            "paper",
            PAPER_LENGTH,
            BYTEWISE_SIZE,
            "float32",
            "cpu",
            BLOCK,
            self._tokenizer.has_chat_template,
            [eos],
            FINGERPRINT,
        )
        return Engine(loop, cache, self._tokenizer, served, self._blocks, 1024)


class GatedRunner(PaperRunner):
    """Computes a step for every permit that is released; none at first, all at the end of its `with` block."""

    def __init__(self, blocks: int = 256) -> None:
        super().__init__(blocks, BLOCK, 256)
        self.permits = threading.Semaphore(0)
        self.failure: BaseException | None = None

    def run(self, step: Step) -> list[Sampled | None]:
        self.permits.acquire()
        if self.failure is not None:
            raise self.failure
        return super().run(step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.open()

    def open(self) -> None:
        """Let everything through from now on."""
        self.permits.release(1_000_000)
