"""HTTP targets of the serving benchmark, against servers that answer, and fail, as vLLM and llama-server may."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from typer.testing import CliRunner

from benchmarks.bench_serving import app
from benchmarks.serving.drive import perform
from benchmarks.serving.http_target import HttpServer
from benchmarks.serving.measure import Record
from benchmarks.serving.targets import Failed, parse
from benchmarks.serving.traffic import Call, Phase, TokenSource
from benchmarks.serving.transformers_target import Transformers

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def event(content: Any) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


class Stub:
    """A server whose tokens are 1, 2, 3, ...; `fault` says what it does wrong.

    Events are written in pieces that end anywhere, so that a reader has to put lines
    together. A prompt is cached if it was sent before.
    """

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.bodies: list[dict[str, Any]] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        cached = len(body["prompt"]) - 1 if body["prompt"] in [old["prompt"] for old in self.bodies] else 0
        self.bodies.append(body)
        if self.fault == "refuses":
            return web.json_response({"error": {"message": "too long"}}, status=400)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        events = self.events(body, cached)
        if self.fault == "breaks":
            events = events[:2]
        if self.fault == "says so":
            events = [*events[:2], event({"error": {"message": "out of memory"}})]
        if self.fault == "garbles":
            events = [*events[:2], b"data: {]\n\n"]
        written = b"".join(events)
        for start in range(0, len(written), 37):
            await response.write(written[start : start + 37])
            await asyncio.sleep(0)
        if self.fault == "hangs":
            await asyncio.sleep(1)
        if self.fault == "breaks":
            assert request.transport is not None
            request.transport.abort()
        return response

    def events(self, body: dict[str, Any], cached: int) -> list[bytes]:
        raise NotImplementedError

    def routes(self) -> list[web.RouteDef]:
        raise NotImplementedError

    async def models(self, _: web.Request) -> web.StreamResponse:
        return web.json_response({"data": [{"id": "model", "owned_by": "vllm", "max_model_len": 8192}]})


class Vllm(Stub):
    """Two tokens per event; usage at the end."""

    def events(self, body: dict[str, Any], cached: int) -> list[bytes]:
        count = body["max_tokens"] - (self.fault == "stops early")
        ids = list(range(1, count + 1))
        pieces = [ids[start : start + 2] for start in range(0, count, 2)]
        choice = {"index": 0, "text": ""}
        usage = {
            "prompt_tokens": len(body["prompt"]) + (self.fault == "adds a token"),
            "completion_tokens": count + (self.fault == "miscounts"),
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        tokens = [event({"choices": [{**choice, "token_ids": piece}]}) for piece in pieces]
        return [*tokens, event({"choices": [], "usage": usage}), b"data: [DONE]\n\n"]

    async def version(self, _: web.Request) -> web.StreamResponse:
        return web.json_response({"version": "0.32.0"})

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/models", self.models),
            web.get("/version", self.version),
            web.post("/v1/completions", self.answer),
        ]


class TextOnly(Vllm):
    """A server that knows neither ids nor what is cached: an event per token, with text."""

    def events(self, body: dict[str, Any], cached: int) -> list[bytes]:
        count = body["max_tokens"]
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
        return [event({"choices": [{"text": "x"}]})] * count + [event({"choices": [], "usage": usage})]


class Llama(Stub):
    """An event per token; if it `holds back`, the 1st, 4th, 7th ... come with the next. Hangs up after each answer."""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        response = await super().answer(request)
        if response.prepared and request.transport is not None:
            await response.write_eof()
            asyncio.get_running_loop().call_later(0.0005, request.transport.close)
        return response

    def events(self, body: dict[str, Any], cached: int) -> list[bytes]:
        length, count = len(body["prompt"]), body["n_predict"]
        common = {"index": 0, "tokens_evaluated": length}
        progress = {"total": length, "cache": cached, "processed": length}
        events = [event({**common, "tokens": [], "tokens_predicted": 0, "prompt_progress": progress})]
        for number in range(1, count + 1):
            if self.fault != "holds back" or number % 3 != 1:
                events.append(event({**common, "tokens": [number], "tokens_predicted": number, "stop": False}))
        last = {"tokens": [], "tokens_predicted": count, "stop": True, "timings": {"cache_n": cached}}
        return [b": a comment\n\n", *events, event({**common, **last, "tokens_cached": 99})]

    async def props(self, _: web.Request) -> web.StreamResponse:
        settings = {"n_ctx": 8192}
        return web.json_response({"build_info": "b1", "total_slots": 4, "default_generation_settings": settings})

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/models", self.models),
            web.get("/props", self.props),
            web.post("/completion", self.answer),
        ]


@asynccontextmanager
async def serving(stub: Stub) -> AsyncIterator[int]:
    """Serve a stub; yields its port."""
    application = web.Application(client_max_size=2**24)
    application.add_routes(stub.routes())
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        port: int = runner.addresses[0][1]
        yield port
    finally:
        await runner.cleanup()


async def ask(stub: Stub, outputs: Sequence[int] = (5,), timeout: float = 10) -> list[Record]:
    """Send the same prompt once for each number of tokens, one after the other."""
    prompt = TokenSource(4096).fresh(12)
    async with serving(stub) as port, HttpServer("peer", "127.0.0.1", port, timeout) as target:
        session = [Call(prompt, output, "all") for output in outputs]
        return (await perform(target, Phase("all", [session]), timeout)).records


@pytest.mark.parametrize("kind", [Vllm, Llama])
async def test_tokens_counts_and_what_was_cached_are_read(kind: type[Stub]) -> None:
    first, second = await ask(kind(), (5, 4))
    assert [first.error, second.error] == [None, None]
    assert [first.tokens, second.tokens] == [[1, 2, 3, 4, 5], [1, 2, 3, 4]]
    assert [first.cached_tokens, second.cached_tokens] == [0, 11]
    assert [first.prompt_tokens, second.prompt_tokens] == [12, 12]
    assert first.sent < first.times[0] < first.times[-1] < second.sent


async def test_vllm_may_send_several_tokens_at_once() -> None:
    (record,) = await ask(Vllm())
    assert record.counts == [2, 2, 1]


async def test_requests_are_greedy_and_ask_for_ids() -> None:
    vllm, llama = Vllm(), Llama()
    await ask(vllm)
    await ask(llama)
    expected = {"temperature": 0, "ignore_eos": True, "stream": True}
    assert expected.items() <= vllm.bodies[0].items()
    assert expected.items() <= llama.bodies[0].items()
    assert vllm.bodies[0]["model"] == "model"
    assert vllm.bodies[0]["max_tokens"] == llama.bodies[0]["n_predict"] == 5
    assert vllm.bodies[0]["prompt"] == llama.bodies[0]["prompt"]


async def test_a_server_without_ids_is_counted_by_events() -> None:
    (record,) = await ask(TextOnly())
    assert (record.error, record.received, record.tokens, record.cached_tokens) == (None, 5, None, None)


async def test_tokens_that_llama_server_holds_back_are_counted_but_not_known() -> None:
    """Held back are 1, 4 and 7 of 7: the first counts from when the prompt was processed, the last from the end."""
    (record,) = await ask(Llama("holds back"), (7,))
    assert (record.error, record.received, record.tokens) == (None, 7, None)
    assert record.counts == [1, 1, 1, 2, 1, 1]


@pytest.mark.parametrize("kind", [Vllm, Llama])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("refuses", "HTTP 400.*too long"),
        ("breaks", "Client|Server"),
        ("says so", "out of memory"),
        ("garbles", "cannot be understood"),
    ],
)
async def test_a_failure_is_kept_in_the_record(kind: type[Stub], fault: str, message: str) -> None:
    records = await ask(kind(fault), (6, 6))
    for record in records:  # the second is sent in spite of the first
        assert record.error is not None
        assert re.search(message, record.error), record.error


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("stops early", "4 tokens came where 5 were asked for"),
        ("adds a token", "counts 13 prompt tokens where 12 were sent"),
        ("miscounts", "5 tokens came where the server counts 6"),
    ],
)
async def test_an_answer_that_is_not_as_asked_is_a_failure(fault: str, message: str) -> None:
    (record,) = await ask(Vllm(fault))
    assert message in (record.error or "")


async def test_a_request_that_takes_too_long_is_a_failure() -> None:
    (record,) = await ask(Vllm("hangs"), timeout=0.05)
    assert re.search("not finished within|Timeout", record.error or "")


async def test_nobody_there_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.serving.http_target.READY_SECONDS", 0.1)
    async with serving(Vllm()) as port:
        pass
    with pytest.raises(Failed, match="no models"):
        async with HttpServer("peer", "127.0.0.1", port, 1):
            pass


async def test_a_process_that_ends_instead_of_serving_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Transformers("transformers", [], 10)
    monkeypatch.setattr(target, "_command", [sys.executable, "-c", "raise SystemExit('no such model')"])
    with pytest.raises(Failed, match="ended with code 1: no such model"):
        async with target:
            pass


@pytest.mark.parametrize(
    "text", ["vllm", "vllm=", "vllm=localhost:80", "vllm=http://localhost", "=http://a:1", "a=ftp://a:1"]
)
def test_targets_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="target"):
        parse(text)


def test_targets_are_taken_apart() -> None:
    assert parse("ours") == ("ours", "", "", 0)
    assert parse("ours=grpc://127.0.0.1:50051") == ("ours", "grpc", "127.0.0.1", 50051)
    assert parse("vllm=http://localhost:8000/") == ("vllm", "http", "localhost", 8000)


# Through the command line


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """All that the benchmark reads of a model when others serve it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps({"vocab_size": 2048, "max_position_embeddings": 4096}))
    return tmp_path / "model"


async def bench(*arguments: str) -> tuple[int, str]:
    """Run the benchmark in a thread of its own; returns exit code and output."""
    done = await asyncio.to_thread(CliRunner().invoke, app, arguments)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


async def test_a_run_without_failures_ends_well_and_is_saved(model: Path, tmp_path: Path) -> None:
    result = tmp_path / "out.json"
    async with serving(Vllm()) as one, serving(Llama()) as other:
        targets = ("--target", f"vllm=http://127.0.0.1:{one}", "--target", f"llama=http://127.0.0.1:{other}")
        options = ("--requests", "3", "--shared", "20", "--own", "4", "--output", "6", "--repeats", "2")
        code, output = await bench("shared", "--model", str(model), *targets, *options, "--json", str(result))
    assert code == 0, output
    assert "llama-server b1" in output
    assert "vllm 0.32.0" in output
    report = json.loads(result.read_text())
    assert report["reference"] == "vllm"
    assert report["targets"]["llama"]["agreement"] == {"compared": 6, "equal": 6}
    for target in report["targets"].values():
        entry = target["labels"]["shared"]
        assert [repeat["output tokens"] for repeat in entry["repeats"]] == [18, 18]
        assert entry["median"]["prompt tokens"] == 72
        assert target["peak memory bytes"] > 0
    assert report["targets"]["vllm"]["labels"]["shared"]["ratio"]["output tokens/s"] == 1


async def test_every_scenario_runs_against_http_servers(model: Path) -> None:
    short: dict[str, tuple[str, ...]] = {
        "ttft": ("--length", "40", "--suffix", "8", "--pairs", "1"),
        "decode": ("--output", "4"),
        "sharing": ("--number", "1", "--number", "2", "--shared", "20", "--output", "4"),
        "agents": ("--requests", "4", "--system", "20", "--own", "4", "--output", "2", "--rate", "100"),
        "chat": ("--conversations", "2", "--turns", "2", "--user", "4", "--output", "2"),
        "trace": ("--requests", "4", "--scale", "256", "--speed", "50", "--max-output", "2"),
        "conversations": ("--runs", "1", "--max-output", "2"),
    }
    async with serving(Llama()) as port:
        target = ("--target", f"llama=http://127.0.0.1:{port}")
        for name, options in short.items():
            code, output = await bench(name, "--model", str(model), *target, *options, "--repeats", "1")
            assert code == 0, output
            assert "llama-server" in output


class FailsLater(Vllm):
    """Breaks off once the warm-up is over."""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.fault = "breaks" if len(self.bodies) >= 3 else ""
        return await super().answer(request)


async def test_a_failed_request_is_shown_and_the_exit_code_is_one(model: Path, tmp_path: Path) -> None:
    result = tmp_path / "out.json"
    options = ("--requests", "3", "--shared", "20", "--own", "4", "--output", "6", "--repeats", "1")
    async with serving(FailsLater()) as port:
        target = ("--target", f"vllm=http://127.0.0.1:{port}")
        code, output = await bench("shared", "--model", str(model), *target, *options, "--json", str(result))
    assert code == 1
    assert "3 requests failed" in output
    report = json.loads(result.read_text())
    assert len(report["errors"]) == 3
    assert report["targets"]["vllm"]["labels"]["shared"]["median"]["failed"] == 3


async def test_a_target_that_fails_its_warm_up_ends_the_run(model: Path) -> None:
    async with serving(Vllm("refuses")) as port:
        code, output = await bench("decode", "--model", str(model), "--target", f"vllm=http://127.0.0.1:{port}")
    assert code == 2
    assert "too long" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chat", "--plot", "x.png"), "no plot"),
        (("agents", "--plot", "x.png"), "give --rate"),
        (("decode", "--target", "a=http://h:1", "--target", "a=http://h:2"), "the same name"),
        (("decode", "--dtype", "int4"), "float32 or bfloat16"),
        (("trace", "--scale", "3"), "must divide"),
    ],
)
async def test_what_makes_no_sense_is_refused(model: Path, arguments: tuple[str, ...], message: str) -> None:
    code, output = await bench(arguments[0], "--model", str(model), *arguments[1:])
    assert code == 2
    assert message in output


async def test_a_prompt_that_is_too_long_for_the_model_is_refused(model: Path) -> None:
    async with serving(Vllm()) as port:
        target = ("--target", f"vllm=http://127.0.0.1:{port}")
        code, output = await bench("decode", "--output", "5000", "--model", str(model), *target)
    assert code == 2
    assert "4,096" in output


async def test_a_model_that_is_none_is_refused(tmp_path: Path) -> None:
    code, output = await bench("decode", "--model", str(tmp_path))
    assert code == 2
    assert "config.json" in output
