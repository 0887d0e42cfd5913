"""Targets behind HTTP: OpenAI's completions as vLLM and others serve them, and llama-server's own.

Both stream server-sent events; a dialect says what is asked and what an event means.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from time import perf_counter
from types import TracebackType
from typing import Any, Protocol, Self

import aiohttp

from benchmarks.serving import memory
from benchmarks.serving.measure import Record
from benchmarks.serving.targets import READY_SECONDS, Failed

_READY_INTERVAL = 0.2
# Servers close idle connections after some seconds; one that is being closed must not be taken for a request.
_KEEP_ALIVE_SECONDS = 1.0


class Dialect(Protocol):
    """How one kind of server is asked, and what its events mean."""

    path: str
    headers: dict[str, str]

    def body(self, prompt: list[int], output: int) -> dict[str, Any]: ...
    def read(self, event: dict[str, Any], now: float, record: Record) -> None: ...


class Completions:
    """OpenAI's completions. Ids and cached tokens are told by servers that know vLLM's additions.

    Without ids an event with text is taken for one token; a sum that differs from the
    server's own is an error.
    """

    path = "/v1/completions"
    headers: dict[str, str] = {}  # noqa: RUF012 - never changed

    def __init__(self, model: str) -> None:
        self._model = model

    def body(self, prompt: list[int], output: int) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": output,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }

    def read(self, event: dict[str, Any], now: float, record: Record) -> None:
        for choice in event.get("choices") or ():
            ids = choice.get("token_ids")
            if ids is not None:
                record.add(now, len(ids))
                record.tokens = (record.tokens or []) + ids
            elif choice.get("text"):
                record.add(now, 1)
        if usage := event.get("usage"):
            record.prompt_tokens = usage["prompt_tokens"]
            record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
            if usage["completion_tokens"] != record.received:
                raise Failed(f"{record.received} tokens came where the server counts {usage['completion_tokens']}")


class LlamaServer:
    """llama-server's own endpoint.

    It holds back a token whose text ends within a character, and gives the id of the
    last one only; its running count is right all the same. A first token that was held
    back is taken to have come when the whole prompt was reported as processed, which is
    just before it is sampled.
    """

    path = "/completion"
    # It closes the connection at the end of a stream without having said so.
    headers = {"Connection": "close"}  # noqa: RUF012 - never changed

    def body(self, prompt: list[int], output: int) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "n_predict": output,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": True,
            "return_tokens": True,
            "return_progress": True,
            "stream": True,
        }

    def read(self, event: dict[str, Any], now: float, record: Record) -> None:
        progress = event.get("prompt_progress")
        if progress is not None:
            if progress["processed"] >= progress["total"] and not record.times:
                record.processed = now
            return
        new = event["tokens_predicted"] - record.received
        ids = event.get("tokens") or []
        if record.received == 0 and new > 1 and record.processed is not None:
            record.add(record.processed, 1)
            record.add(now, new - 1)
        else:
            record.add(now, new)
        if len(ids) == new and record.tokens is not None:
            record.tokens += ids
        elif new:
            record.tokens = None
        if event.get("stop"):
            record.prompt_tokens = event["tokens_evaluated"]
            record.cached_tokens = (event.get("timings") or {}).get("cache_n")


class HttpServer:
    """A server that runs at `host`:`port`; which dialect it speaks is found out by asking."""

    def __init__(self, name: str, host: str, port: int, timeout: float) -> None:
        self.name = name
        self._host, self._port = host, port
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._description: dict[str, Any] = {}

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            f"http://{self._host}:{self._port}",
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_SECONDS),
            timeout=self._timeout,
            headers={"Content-Type": "application/json"},
            read_bufsize=2**20,
        )
        try:
            self._dialect = await self._recognize()
        except BaseException:
            await self._session.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def describe(self) -> dict[str, Any]:
        return self._description

    def prepare(self, prompt: Sequence[int], output: int) -> bytes:
        return json.dumps(self._dialect.body(list(prompt), output), separators=(",", ":")).encode()

    async def complete(self, request: bytes, record: Record) -> None:
        record.tokens = []
        record.sent = perf_counter()
        try:
            async with self._session.post(self._dialect.path, data=request, headers=self._dialect.headers) as response:
                if response.status != 200:
                    raise Failed(f"HTTP {response.status}: {(await response.text())[:500]}")
                await self._events(response.content, record)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Failed(f"{type(error).__name__}: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Failed(f"an event that cannot be understood: {type(error).__name__}: {error}") from None

    async def _events(self, content: aiohttp.StreamReader, record: Record) -> None:
        rest = b""
        async for chunk in content.iter_any():
            now = perf_counter()
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                field, _, value = line.partition(b":")
                if field == b"error":
                    raise Failed(value.decode(errors="replace")[:500])
                if field == b"data" and (data := value.strip()) != b"[DONE]":
                    event = json.loads(data)
                    if "error" in event:
                        raise Failed(json.dumps(event["error"])[:500])
                    self._dialect.read(event, now, record)
        if not record.tokens and record.received:
            record.tokens = None  # never told

    def peak_memory(self) -> int | None:
        return memory.peak(self._host, self._port)

    async def _recognize(self) -> Dialect:
        """Wait for the server and ask what it is."""
        models = await self._wait()
        props = await self._get("/props")
        if props is not None and "build_info" in props:
            slots = {"version": props["build_info"], "slots": props.get("total_slots")}
            context = (props.get("default_generation_settings") or {}).get("n_ctx")
            self._description = {"server": "llama-server", **slots, "context": context}
            return LlamaServer()
        served = models["data"][0]
        told = await self._get("/version") or {}
        self._description = {
            "server": served.get("owned_by", "openai-compatible"),
            "version": told.get("version"),
            "max_model_len": served.get("max_model_len"),
            **{key: value for key, value in told.items() if key != "version"},
        }
        return Completions(served["id"])

    async def _wait(self) -> dict[str, Any]:
        end = perf_counter() + READY_SECONDS
        while True:
            models = await self._get("/v1/models")
            if models is not None and models.get("data"):
                return models
            if perf_counter() > end:
                raise Failed(f"{self.name}: no models at http://{self._host}:{self._port}/v1/models")
            await asyncio.sleep(_READY_INTERVAL)

    async def _get(self, path: str) -> dict[str, Any] | None:
        try:
            async with self._session.get(path) as response:
                answer = await response.json(content_type=None) if response.status == 200 else None
        except (aiohttp.ClientError, ValueError):
            return None
        return answer if isinstance(answer, dict) else None
