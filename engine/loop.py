"""The engine's one thread, which owns cache, scheduler and runner.

Other threads never touch those: they post commands, which are carried out between
two steps. So there is nothing to lock but the count of open requests, and nothing
to think about but one step at a time.

If a step raises, the thread tells every open request, then its owner (`on_death`),
and ends: the state of a model that failed half way is not worth guessing at.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import replace
from typing import Protocol, TypeVar

from engine.request import Event, Failed, Finished, Request, Sampled
from engine.scheduler import Scheduler, Step
from prefixcache.errors import QUEUE_FULL, PrefixCacheError, ResourceExhausted, Unavailable
from prefixcache.hints.schema import Load

T = TypeVar("T")

LAST = (Finished, Failed)
LONGEST_WAIT = 3600.0
"""Seconds; a limit of the platform's own waiting is not far above."""

clock = time.monotonic
"""The clock of arrivals, deadlines and timings, in seconds."""


class StepRunner(Protocol):
    """What computes a step; see `engine.runner`."""

    def run(self, step: Step) -> Sequence[Sampled | None]: ...


class EngineLoop:
    """Runs steps while there is work and sleeps while there is none.

    At most `max_queue` requests may wait besides those that can run at once; background
    requests do not count.
    `on_death` is called on the engine thread, once, after every request was told.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        *,
        max_queue: int,
        on_death: Callable[[BaseException], None],
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._limit = max_queue + scheduler.max_running
        self._on_death = on_death
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._started = False
        self._lock = threading.Lock()  # guards the fields below
        self._open: set[Request] = set()
        self._live = 0  # how many of them are not in the background
        self._refusing: str | None = None
        self._stopping = False
        self._last_finish = clock()
        self._finish_interval = 0.1

    # From any thread

    def start(self, thread: Executor | None = None) -> None:
        """Begin, on the one thread of an executor if one is given, else on a thread of its own.

        Give the executor that the model was loaded on: the teams of threads that share
        a tensor operation belong to the thread that started it, and two teams on the
        same cores make each other sleep and wake in every operation.
        """
        if thread is None:
            threading.Thread(target=self._run, name="engine", daemon=True).start()
        else:
            thread.submit(self._run)
        self._started = True

    def submit(self, request: Request) -> None:
        """Accept a request; from here on it is told everything through its sink.

        Raises InvalidArgument (it could never be served), ResourceExhausted (the
        queue is full; says when to retry) or Unavailable (draining, stopped or dead).
        """
        self._scheduler.validate(request.prompt)
        tell = request.sink

        def sink(event: Event) -> None:
            if not isinstance(event, LAST) or self._close(request, isinstance(event, Finished)):
                tell(event)

        with self._lock:
            if self._refusing is not None:
                raise Unavailable(self._refusing)
            if self._live >= self._limit and not request.background:
                wait = min(max(self._finish_interval, 0.05), 30.0)
                raise ResourceExhausted(
                    f"the queue is full ({self._live} requests are waiting or running): "
                    f"try again in {wait:.2f} seconds",
                    retry_after=wait,
                    reason=QUEUE_FULL,
                )
            request.sink = sink
            self._open.add(request)
            self._live += not request.background
        self._inbox.put(lambda: self._scheduler.submit(request))

    def abort(self, request: Request, error: PrefixCacheError | None = None) -> None:
        """End a request in any state. Idempotent. With `error`, its sink gets a `Failed`, otherwise nothing more."""

        def end() -> None:
            self._scheduler.abort(request, error)
            self._close(request, False)

        with self._lock:
            if request not in self._open:
                return
        self._inbox.put(end)

    def call(self, function: Callable[[Scheduler], T]) -> Future[T]:
        """Run `function` on the engine thread between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    self._scheduler.tick(clock())
                    future.set_result(function(self._scheduler))
                except Exception as error:  # noqa: BLE001 - the caller gets it
                    future.set_exception(error)

        with self._lock:
            if self._stopping:
                raise Unavailable(self._refusing or "the engine has stopped")
            self._inbox.put(run)
        return future

    def drain(self) -> None:
        """Refuse new requests; those accepted go on."""
        with self._lock:
            self._refusing = self._refusing or "the server is shutting down: send the request to another one"

    def idle(self) -> bool:
        """Whether every request accepted has ended."""
        with self._lock:
            return not self._open

    def load(self) -> Load:
        """How busy the engine is, also with requests that have come during the step that is being computed."""
        load = self._scheduler.load()
        with self._lock:
            return replace(load, waiting=max(self._live - load.running, load.waiting))

    @property
    def background(self) -> int:
        """How many background requests have not ended."""
        with self._lock:
            return len(self._open) - self._live

    def stop(self) -> None:
        """Fail what is still open with Unavailable, end the loop and wait for it. Idempotent."""
        self.drain()
        with self._lock:
            self._stopping = True
        self._inbox.put(lambda: None)  # wakes the thread
        if self._started:
            self._ended.wait()

    # On the engine thread

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._obey()
                self._step()
            self._end(Unavailable("the server has shut down: send the request to another one"))
        except BaseException as death:  # noqa: BLE001 - told to everyone, see on_death
            message = "the engine has failed and this server is going down: send the request to another one"
            self._end(Unavailable(message))
            self._on_death(death)
        finally:
            self._ended.set()

    def _obey(self) -> None:
        """Carry out the commands that have come; with nothing to compute, wait for one, or for something to expire."""
        while self._scheduler.idle:
            now = clock()
            self._scheduler.tick(now)
            try:
                self._inbox.get(timeout=min(self._scheduler.cache.next_expiry - now, LONGEST_WAIT))()
                break
            except queue.Empty:
                pass
        while not self._inbox.empty():  # nobody else takes anything out
            self._inbox.get()()

    def _step(self) -> None:
        scheduler = self._scheduler
        step = scheduler.schedule(clock())
        if step is None:
            assert scheduler.idle, "requests wait, nothing runs, and nobody can be admitted"
            return
        begin = clock()
        sampled = self._runner.run(step)
        end = clock()
        scheduler.commit(step, sampled, end, end - begin)

    def _close(self, request: Request, finished: bool) -> bool:
        """Count a request as ended; returns False if it was before."""
        with self._lock:
            if request not in self._open:
                return False
            self._open.remove(request)
            self._live -= not request.background
            if finished and not request.background:
                now = clock()
                interval = min(now - self._last_finish, 5.0)  # a pause says nothing about a busy time
                self._finish_interval += (interval - self._finish_interval) / 8
                self._last_finish = now
            return True

    def _end(self, error: PrefixCacheError) -> None:
        """Refuse everything from now on, answer the calls that were posted, fail what is open."""
        with self._lock:
            self._stopping = True
            self._refusing = str(error)
            still_open = list(self._open)
        while not self._inbox.empty():
            with contextlib.suppress(Exception):  # after a death the scheduler may be in any state
                self._inbox.get()()
        for request in still_open:
            request.sink(Failed(error))
