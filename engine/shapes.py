"""What arriving prompts look like, told to those who watch: hashes, kinds and lengths of pieces, never text.

Nothing is done while nobody watches. Shapes are computed on a thread of their own, at
most a few at a time: prompts that come faster than that are left out, since to follow
traffic one need not see all of it. A watcher has a short queue; one who lets it fill up
is dropped. Hashes are keyed, so they say nothing to who has no key, and the keys are new
with every start of the server. Every tenant has its own, so that nobody, by sending words
and comparing their hashes, finds out which ones another tenant sends.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple, Self

from engine.request import Started
from engine.tenants import Caller, suffix_of, tenant_of
from engine.tokenizer import Chat, Prompt, Tokenizer
from prefixcache.doctor.pieces import FIELD, cut
from prefixcache.doctor.prompts import fields_of
from prefixcache.errors import PrefixCacheError, ResourceExhausted, Unavailable

QUEUED = 256
"""Shapes that may wait for a watcher to read them."""
COMPUTED_AT_ONCE = 32
"""Prompts that may wait for their shape to be computed."""
MAX_WATCHERS = 16
"""Of a tenant, at a time."""

_HASH_BYTES = 8
_REMEMBERED_HASHES = 65_536


class PieceShape(NamedTuple):
    """A piece of a prompt; equal text, equal hash."""

    hash: int
    kind: str
    characters: int


@dataclass(frozen=True, slots=True)
class Shape:
    """A prompt; `cached_tokens` of its tokens were cached when it was admitted."""

    pieces: Sequence[PieceShape]
    namespace: str
    prompt_tokens: int
    cached_tokens: int


class Shapes:
    """Lives in one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._watchers: set[Watcher] = set()
        self._thread = ThreadPoolExecutor(1, "shapes")
        self._waiting = 0
        self._closed = False
        self._key = secrets.token_bytes(16)
        self._hashes: dict[tuple[str, str], int] = {}

    @property
    def watchers(self) -> int:
        """How many watch."""
        return len(self._watchers)

    @asynccontextmanager
    async def watch(self, caller: Caller, one_in: int = 1) -> AsyncIterator[Watcher]:
        """Watch one in so many of the caller's prompts; who administrates watches everybody's.

        Raises ResourceExhausted if the tenant has too many watchers, Unavailable if the
        server is shutting down.
        """
        if self._closed:
            raise _shutting_down()
        if sum(watcher.caller.tenant == caller.tenant for watcher in self._watchers) >= MAX_WATCHERS:
            raise ResourceExhausted(
                f"{MAX_WATCHERS} calls are watching prompts already, which is the most allowed: end one of them first"
            )
        watcher = Watcher(caller, one_in)
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    def saw(self, prompt: Prompt, key: str, started: Started, tokenizer: Tokenizer) -> None:
        """A prompt of the namespace with this key has been admitted; never waits."""
        tenant = tenant_of(key)
        concerned = [watcher for watcher in self._watchers if watcher.wants(tenant)]
        if not concerned or self._waiting >= COMPUTED_AT_ONCE:
            return
        self._waiting += 1
        computing = self._loop.run_in_executor(self._thread, self._pieces, prompt, tenant, tokenizer)

        def tell(done: asyncio.Future[list[PieceShape]]) -> None:
            self._waiting -= 1
            if done.cancelled():
                return
            pieces = done.result()
            for watcher in concerned:
                namespace = suffix_of(key) if tenant == watcher.caller.tenant else f"{tenant}/{suffix_of(key)}"
                watcher.give(Shape(pieces, namespace, started.prompt_tokens, started.cached_tokens))

        computing.add_done_callback(tell)

    def close(self) -> None:
        """Tell every watcher that the server is shutting down, and let nobody else watch."""
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        for watcher in self._watchers:
            watcher.fail(_shutting_down())

    # On the thread of its own

    def _pieces(self, prompt: Prompt, tenant: str, tokenizer: Tokenizer) -> list[PieceShape]:
        pieces = []
        for field, text in _fields(prompt, tokenizer):
            pieces.append(PieceShape(self._hash(tenant, field), FIELD + field, 0))
            pieces += [PieceShape(self._hash(tenant, piece), kind, len(piece)) for kind, piece in cut(text)]
        return pieces

    def _hash(self, tenant: str, text: str) -> int:
        known = self._hashes.get((tenant, text))
        if known is None:
            if len(self._hashes) >= _REMEMBERED_HASHES:
                self._hashes.clear()
            own = blake2b(tenant.encode(), digest_size=16, key=self._key).digest()
            digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_HASH_BYTES, key=own).digest()
            known = self._hashes[tenant, text] = int.from_bytes(digest, "little")
        return known


class Watcher:
    """One who watches; iterate over it for shapes.

    Iterating ends only by an error: ResourceExhausted if it was too slow, Unavailable
    if the server shuts down.
    """

    def __init__(self, caller: Caller, one_in: int) -> None:
        self.caller = caller
        self._one_in = one_in
        self._seen = 0
        self._queue: deque[Shape] = deque()
        self._arrived = asyncio.Event()
        self._failure: PrefixCacheError | None = None

    def wants(self, tenant: str) -> bool:
        """Whether this prompt of a tenant is one to report; counts it."""
        if self._failure is not None or not (self.caller.admin or tenant == self.caller.tenant):
            return False
        self._seen += 1
        return self._seen % self._one_in == 0

    def give(self, shape: Shape) -> None:
        if self._failure is not None:
            return
        if len(self._queue) < QUEUED:
            self._queue.append(shape)
            self._arrived.set()
            return
        self._queue.clear()
        self.fail(
            ResourceExhausted(
                "prompts came faster than they were read, so the watching has ended: watch one in several with one_in, "
                "or read faster"
            )
        )

    def fail(self, error: PrefixCacheError) -> None:
        """What is queued still comes, then this error."""
        self._failure = error
        self._arrived.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Shape:
        while not self._queue:
            if self._failure is not None:
                raise self._failure
            self._arrived.clear()
            await self._arrived.wait()
        return self._queue.popleft()


def _fields(prompt: Prompt, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    if isinstance(prompt, Chat):
        return fields_of({"messages": list(prompt.messages), "tools": list(prompt.tools)})
    return fields_of(prompt if isinstance(prompt, str) else tokenizer.decode(prompt))


def _shutting_down() -> Unavailable:
    return Unavailable("the server is shutting down: watch the one that replaces it")
