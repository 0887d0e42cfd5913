"""What a server does so that prompts are warm before the first request: at its start, and for its next one.

At the start it computes the prefixes that were the most valuable before (`--remember`),
then the prompts of a file (`--warm`). While it serves it writes down the most valuable
prefixes every few seconds, so that even a killed server is followed by a warm one.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from bisect import bisect_left
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import structlog

from engine import cache_wire
from engine.config import EngineConfig
from engine.front import Front
from engine.remember import Remembered, Unusable, read, write
from engine.scheduler import Scheduler
from engine.tenants import ANONYMOUS, tenant_of
from engine.warming import Warmth, warm
from prefixcache.errors import FailedPrecondition, InvalidArgument, PrefixCacheError, Unavailable
from prefixcache.prompt_files import BadLine, FilePrompt, read_prompts
from prefixcache.requests import cache_control, prompt_message
from prefixcache.tokens import TOKEN_BYTES, unpack
from prefixcache.v1 import cache_pb2

SHARE = 0.9
"""The share of the cache that is remembered: the rest is for what comes before it is warm."""
HALF_LIFE_SECONDS = 3600.0
"""After so long, a use of a prefix is worth half of one now."""
KEPT_SECONDS = 7 * 86_400.0
"""A prefix that nobody has used for so long is no longer remembered, however often the server is restarted."""
MAX_COMPLAINTS = 5

log = structlog.get_logger()


class WarmStart:
    """Lives in one event loop. `check`, then `before_serving`, then `go_on`, then `end`."""

    def __init__(self, front: Front, config: EngineConfig) -> None:
        self._front = front
        self._prompts = Path(config.warm) if config.warm else None
        self._first = config.warm_before_serving and self._prompts is not None
        self._file = Path(config.remember) if config.remember else None
        self._interval = config.remember_seconds
        self._patience = config.remember_wait_seconds
        self._carried: list[Remembered] = []  # of the file, the most valuable first
        self._tried = 0  # so many of them have been warmed, or could not be
        self._tasks: list[asyncio.Task[None]] = []
        self._writing = threading.Lock()
        self._writes = True

    def check(self) -> None:
        """Raise FailedPrecondition if the files can be of no use, before a model is loaded for nothing."""
        if self._prompts is not None and not os.access(self._prompts, os.R_OK):
            raise FailedPrecondition(f"the prompts to warm cannot be read from {self._prompts}: check --warm")
        if self._file is not None and not os.access(self._file.parent, os.W_OK):
            raise FailedPrecondition(
                f"nothing can be remembered in {self._file}: its directory must be there, and writable"
            )

    async def before_serving(self) -> None:
        """Warm what is to be warm before the server says that it serves; in large steps, as nobody is served yet."""
        if self._file is not None:
            self._read(self._file)
        if not self._carried and not self._first:
            return
        await self._front.ask(lambda scheduler: scheduler.hurry(True))
        if self._carried:
            await self._recall()
        if self._first and self._prompts is not None:
            await self._warm_prompts(self._prompts)
        await self._front.ask(lambda scheduler: scheduler.hurry(False))

    def go_on(self) -> None:
        """Warm the rest, and begin to remember."""
        if self._tried < len(self._carried):
            self._begin(self._recall_rest())
        if self._prompts is not None and not self._first:
            self._begin(self._warm_prompts(self._prompts))
        if self._file is not None:
            self._begin(self._remember(self._file))

    async def end(self) -> None:
        """Stop warming, and write down what is valuable now. Idempotent; the engine may be gone."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._tasks and self._file is not None:
            self._tasks.clear()
            await self._write(self._file)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        async def run() -> None:
            try:
                await work
            except Unavailable:
                pass  # the engine has ended
            except Exception:
                log.exception("warming failed because of a bug; requests are served all the same")

        self._tasks.append(asyncio.create_task(run()))

    # What was remembered

    def _read(self, file: Path) -> None:
        served = self._front.engine.served
        try:
            found = read(file, served.fingerprint, served.vocab_size)
        except Unusable as reason:
            log.warning(f"what is remembered in {file} is not used: {reason}; it will be replaced")
            return
        known = {tenant.name for tenant in self._front.gate.tenants} or {ANONYMOUS}
        oldest = time.time() - KEPT_SECONDS
        self._carried = [prefix for prefix in found if tenant_of(prefix.namespace) in known and prefix.used > oldest]

    async def _recall(self) -> None:
        """Warm what was remembered, for at most so long as the server may wait with serving."""
        begun = time.monotonic()
        log.info(f"warming {len(self._carried):,} prefixes that were valuable before, then serving")
        try:
            async with asyncio.timeout(self._patience):
                await self._recall_rest()
        except TimeoutError:
            log.warning(
                f"{len(self._carried) - self._tried:,} of {len(self._carried):,} remembered prefixes are not warm "
                f"after {self._patience:g} seconds: they are warmed while the server serves (--remember-wait-seconds)"
            )
        if not self._tried:
            return
        log.info(
            f"warmed {self._tried:,} remembered prefixes",
            tokens=sum(len(prefix.tokens) for prefix in self._carried[: self._tried]) // TOKEN_BYTES,
            seconds=round(time.monotonic() - begun, 3),
        )

    async def _recall_rest(self) -> None:
        while self._tried < len(self._carried):
            prefix = self._carried[self._tried]
            try:
                await warm(self._front, unpack(prefix.tokens), prefix.namespace, terms=self._front.terms)
            except Unavailable:
                raise
            except PrefixCacheError as error:
                log.debug(f"a remembered prefix is not warmed: {error}")
            self._tried += 1

    # What will be remembered

    async def _remember(self, file: Path) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await self._front.ask(lambda scheduler: scheduler.cache.decay(0.5 ** (self._interval / HALF_LIFE_SECONDS)))
            await self._write(file)

    async def _write(self, file: Path) -> None:
        try:
            prefixes = await self._front.ask(self._valuable)
            await asyncio.to_thread(self._replace, file, prefixes)
        except Unavailable:
            return
        except OSError as error:
            if self._writes:
                log.warning(f"nothing can be remembered in {file}: {error.strerror}; it will be tried again")
            self._writes = False
        else:
            self._writes = True

    def _replace(self, file: Path, prefixes: list[Remembered]) -> None:
        with self._writing:  # a thread goes on when the task that waits for it is cancelled
            write(file, prefixes, self._front.engine.served.fingerprint)

    def _valuable(self, scheduler: Scheduler) -> list[Remembered]:
        """What was of use since the start, then what was before it and is still cached, or not yet warm again."""
        cache = scheduler.cache
        now = time.time()
        room = int(cache.total_blocks * cache.block_size * SHARE)
        prefixes = [Remembered(namespace, tokens, now) for namespace, tokens in cache.valuable(room)]
        room -= sum(len(prefix.tokens) for prefix in prefixes) // TOKEN_BYTES
        used = sorted((prefix.namespace, prefix.tokens) for prefix in prefixes)
        for place, prefix in enumerate(self._carried):
            tokens = len(prefix.tokens) // TOKEN_BYTES
            if tokens > room or prefix.used < now - KEPT_SECONDS or _contained(prefix, used):
                continue
            found = cache.lookup(prefix.tokens + bytes(TOKEN_BYTES), prefix.namespace)  # the last is never found
            if place < self._tried and found.cached_tokens < tokens:
                continue
            room -= tokens
            prefixes.append(prefix)
        return prefixes

    # A file of prompts

    async def _warm_prompts(self, file: Path) -> None:
        begun = time.monotonic()
        computed = cached = failed = tokens = 0
        log.info(f"warming the prompts of {file}")
        with file.open("rb") as lines:
            for line in read_prompts(lines):
                try:
                    warmth = await self._warm_line(line)
                except Unavailable:
                    raise
                except PrefixCacheError as error:
                    warmth = Warmth(0, 0, str(error))
                if warmth.error:
                    failed += 1
                    if failed <= MAX_COMPLAINTS:
                        log.warning(f"line {line.line} of {file} is not warmed: {warmth.error}")
                elif warmth.computed_tokens:
                    computed += 1
                else:
                    cached += 1
                tokens += warmth.computed_tokens
        log.info(
            f"warmed {file}: {computed:,} prompts computed, {cached:,} cached already, {failed:,} failed",
            tokens=tokens,
            seconds=round(time.monotonic() - begun, 3),
        )

    async def _warm_line(self, line: FilePrompt | BadLine) -> Warmth:
        """Raises what is wrong with the line."""
        if isinstance(line, BadLine):
            raise InvalidArgument(line.reason)
        front = self._front
        known = {tenant.name for tenant in front.gate.tenants} or {ANONYMOUS}
        tenant = line.tenant or ANONYMOUS
        if tenant not in known:
            raise InvalidArgument('"tenant" must name one of the tenants that may call here')
        message = cache_pb2.WarmRequest(
            prompt=prompt_message(line.prompt, line.tools, line.add_generation_prompt),
            cache=cache_control(line.namespace, line.ttl, line.priority, line.session),
        )
        wanted = cache_wire.read_warm(message, tenant, front.terms)
        prompt = await front.encode(wanted.prompt, front.engine.served.max_length - 1)
        return await warm(front, prompt, wanted.namespace, terms=wanted.terms)


def _contained(prefix: Remembered, others: list[tuple[str, bytes]]) -> bool:
    """Whether a prefix is the beginning of one of `others`, which are sorted."""
    place = bisect_left(others, (prefix.namespace, prefix.tokens))
    if place == len(others):
        return False
    namespace, tokens = others[place]
    return namespace == prefix.namespace and tokens.startswith(prefix.tokens)
