"""The server over real gRPC: what it answers, when it serves, and how it ends."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from transformers import PreTrainedTokenizerFast

from engine.assembly import Engine, OnDeath
from engine.config import EngineConfig, load
from engine.embedded.vocabulary import BYTEWISE_SIZE, bytewise
from engine.server import Server
from engine.tokenizer import Tokenizer
from prefixcache.client import AsyncClient, Client
from prefixcache.errors import Cancelled, DeadlineExceeded, FailedPrecondition, ResourceExhausted, Unavailable
from prefixcache.v1 import cache_pb2, generation_pb2, generation_pb2_grpc, prompt_pb2
from tests.engine.paper import generate
from tests.engine.serving import PAPER_LENGTH, GatedRunner, PaperEngine, RunningServer

GENERATE = "/prefixcache.v1.GenerationService/Generate"
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="module")
def paper() -> Iterator[RunningServer]:
    """One server that computes on paper; tests leave nothing running on it."""
    with RunningServer(PaperEngine()) as server:
        yield server


@pytest.fixture
def client(paper: RunningServer) -> Iterator[Client]:
    with Client(paper.address) as client:
        yield client


def health_of(address: str, service: str = "") -> Any:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(service=service), wait_for_ready=True, timeout=10).status


def failure_of(address: str, request: bytes, method: str = GENERATE) -> Any:
    """Send bytes as they are and return the error they are answered with."""
    with grpc.insecure_channel(address) as channel:
        call: Any = channel.unary_stream(method)
        with pytest.raises(grpc.RpcError) as caught:
            list(call(request, timeout=10))
    return caught.value


# What it answers


def test_the_stream_is_started_deltas_finished(paper: RunningServer) -> None:
    """One event of each end, and the tokens that the engine generates in between."""
    prompt = list(range(40))
    request = generation_pb2.GenerateRequest(
        prompt=prompt_pb2.Prompt(token_ids=prompt_pb2.TokenIds(ids=prompt)),
        sampling=generation_pb2.Sampling(max_tokens=9),
        request_id="mine",
    )
    with grpc.insecure_channel(paper.address) as channel:
        events = list(generation_pb2_grpc.GenerationServiceStub(channel).Generate(request, timeout=10))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["started", *["delta"] * (len(kinds) - 2), "finished"]
    assert events[0].started.request_id == "mine"
    assert [token for event in events for token in event.delta.token_ids] == generate(prompt, 9, 256)
    assert events[-1].finished.usage.completion_tokens == 9


def test_a_stop_string_ends_the_request_in_the_engine(paper: RunningServer, client: Client) -> None:
    """Text before it comes out, tokens are counted up to it, and nothing goes on behind the caller's back."""
    prompt = list(b"stop")
    tokens = generate(prompt, 60, 256)
    at = next(i for i in range(5, 60) if 32 < tokens[i] < 127 and tokens[i] not in tokens[:i])
    completion = client.generate(prompt, max_tokens=1500, stop=["never", chr(tokens[at])], timeout=10)
    assert (completion.finish_reason, completion.stopped_by) == ("stop", chr(tokens[at]))
    assert completion.text == bytes(tokens[:at]).decode("utf-8", "replace")
    assert completion.token_ids == tokens[: at + 1]
    assert completion.usage.completion_tokens == at + 1
    assert completion.timings.total >= completion.timings.first_token >= completion.timings.queue >= 0
    assert paper.stats().running == 0


def test_a_stop_string_that_is_complete_with_the_last_token_is_found(client: Client) -> None:
    """Being out of tokens at the same time does not hide it."""
    prompt = list(b"stop")
    tokens = generate(prompt, 60, 256)
    at = next(i for i in range(5, 60) if 32 < tokens[i] < 127 and tokens[i] not in tokens[:i])
    completion = client.generate(prompt, max_tokens=at + 1, stop=chr(tokens[at]), timeout=10)
    assert (completion.finish_reason, completion.usage.completion_tokens) == ("stop", at + 1)


def test_a_stop_token_ends_the_request(client: Client) -> None:
    """Its id says what ended the output; it is counted but not part of the output."""
    prompt = list(b"stop token")
    tokens = generate(prompt, 60, 256)
    at = next(i for i in range(3, 60) if tokens[i] not in tokens[:i])
    completion = client.generate(prompt, max_tokens=100, stop_token_ids=[tokens[at]], timeout=10)
    assert (completion.finish_reason, completion.stopped_by) == ("stop", str(tokens[at]))
    assert completion.token_ids == tokens[:at]
    assert completion.usage.completion_tokens == at + 1


def test_the_model_and_the_cache_can_be_asked_about(paper: RunningServer, client: Client) -> None:
    """GetModel, Tokenize, Lookup and GetStats agree with what a generation reports."""
    model = client.model(timeout=10)
    assert (model.name, model.max_length, model.has_chat_template) == ("paper", PAPER_LENGTH, True)
    before = client.stats(timeout=10)
    text = "what was asked about once"
    assert client.lookup(text, namespace="asked", timeout=10).cached_tokens == 0
    completion = client.generate(text, max_tokens=1, namespace="asked", timeout=10)
    found = client.lookup(text, namespace="asked", timeout=10)
    assert found.prompt_tokens == completion.usage.prompt_tokens == len(client.tokenize(text, timeout=10))
    assert found.cached_tokens == found.prompt_tokens - 1
    assert client.lookup(text, namespace="other", timeout=10).cached_tokens == 0
    after = client.stats(timeout=10)
    assert after.requests.finished == before.requests.finished + 1
    assert after.tokens.prompt == before.tokens.prompt + found.prompt_tokens
    assert after.blocks.total == after.blocks.free + after.blocks.cached + after.blocks.leased
    assert after.uptime > 0


def test_switching_the_cache_off_is_obeyed(client: Client) -> None:
    """Not read: everything is computed. Not stored: the next one finds nothing."""
    prompt = list(b"a prompt that is long enough for two blocks")
    client.generate(prompt, max_tokens=1, namespace="off", store_cache=False, timeout=10)
    assert client.generate(prompt, max_tokens=1, namespace="off", timeout=10).usage.cached_tokens == 0
    bypassed = client.generate(prompt, max_tokens=1, namespace="off", read_cache=False, timeout=10)
    assert (bypassed.usage.cached_tokens, bypassed.miss_reason) == (0, "bypassed")
    assert client.generate(prompt, max_tokens=1, namespace="off", timeout=10).usage.cached_tokens == len(prompt) - 1


# Bad input


def encoded(**fields: Any) -> bytes:
    return generation_pb2.GenerateRequest(**fields).SerializeToString()


def text(value: str) -> prompt_pb2.Prompt:
    return prompt_pb2.Prompt(text=value)


def ids(*values: int) -> prompt_pb2.Prompt:
    return prompt_pb2.Prompt(token_ids=prompt_pb2.TokenIds(ids=values))


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        (b"", "INVALID_ARGUMENT", "prompt is not set"),
        (encoded(prompt=text("")), "INVALID_ARGUMENT", "prompt.text is empty"),
        (encoded(prompt=ids()), "INVALID_ARGUMENT", "prompt.token_ids is empty"),
        (encoded(prompt=text("x" * PAPER_LENGTH)), "INVALID_ARGUMENT", f"at most {PAPER_LENGTH - 1} and one for"),
        (encoded(prompt=text("x" * 10**6)), "INVALID_ARGUMENT", "the prompt has at least"),
        (encoded(prompt=ids(1, 5000)), "INVALID_ARGUMENT", "token id 5000 at position 1"),
        (encoded(prompt=text("x"), model="other"), "NOT_FOUND", "model 'other' is not served here"),
        (
            encoded(prompt=text("x"), sampling=generation_pb2.Sampling(top_p=7)),
            "INVALID_ARGUMENT",
            "top_p must be above 0 to 1, not 7.0",
        ),
        (
            encoded(prompt=text("x"), sampling=generation_pb2.Sampling(stop=["x"] * 17)),
            "INVALID_ARGUMENT",
            "at most 16 stop strings are allowed, not 17",
        ),
        (b"\x12\x04\x0a\x02\xff\xfe", "INVALID_ARGUMENT", "is not valid UTF-8; encode text as UTF-8"),
        (b"\x12\x7f", "INVALID_ARGUMENT", "cannot be read; is the client made for another version"),
        (encoded(prompt=text("x" * (5 << 20))), "RESOURCE_EXHAUSTED", "larger than max"),
    ],
)
def test_bad_input_is_answered_with_its_status(paper: RunningServer, request_: bytes, code: str, words: str) -> None:
    """Every mistake has a status and a message that says what is wrong; nothing of it reaches the engine."""
    admitted = paper.stats().totals.admitted
    error = failure_of(paper.address, request_)
    assert error.code().name == code
    assert words in error.details()
    assert paper.stats().totals.admitted == admitted


def test_other_methods_refuse_bad_input_alike(paper: RunningServer) -> None:
    """Tokenize and Lookup check what they are sent, and say so in the same words."""
    methods = ("/prefixcache.v1.GenerationService/Tokenize", "/prefixcache.v1.CacheService/Lookup")
    with grpc.insecure_channel(paper.address) as channel:
        tokenize: Any = channel.unary_unary(methods[0])
        lookup: Any = channel.unary_unary(methods[1])
        for method in (tokenize, lookup):
            for request, words in ((b"", "prompt is not set"), (b"\x0a\x04\x0a\x02\xff\xfe", "not valid UTF-8")):
                with pytest.raises(grpc.RpcError, match=words) as caught:
                    method(request, timeout=10)
                error: Any = caught.value
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        too_long = cache_pb2.LookupRequest(prompt=text("x"), namespace="x" * 257).SerializeToString()
        with pytest.raises(grpc.RpcError, match="namespace must have at most 256 bytes"):
            lookup(too_long, timeout=10)


def test_a_prompt_longer_than_the_pool_is_refused() -> None:
    """It could never be admitted, so it does not wait either."""
    with RunningServer(PaperEngine(blocks=4), max_pinned_percent=0) as server:
        error = failure_of(server.address, encoded(prompt=text("x" * 64)))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "the prompt has 65 tokens, but the block pool holds 64" in error.details()


def test_messages_without_a_chat_template_are_refused() -> None:
    """FAILED_PRECONDITION, and what to send instead."""
    pretrained: PreTrainedTokenizerFast = bytewise()
    pretrained.chat_template = None
    tokenizer = Tokenizer(pretrained, BYTEWISE_SIZE)
    with RunningServer(PaperEngine(tokenizer=tokenizer)) as server, Client(server.address) as client:
        assert not client.model(timeout=10).has_chat_template
        with pytest.raises(FailedPrecondition, match=r"no chat template.* send the prompt as text or as token ids"):
            client.generate([{"role": "user", "content": "hi"}], timeout=10)


def test_a_full_queue_says_when_to_try_again() -> None:
    """RESOURCE_EXHAUSTED with RetryInfo; those accepted are served."""
    runner = GatedRunner()
    with (
        RunningServer(PaperEngine(max_running=1, runner=runner), max_queue=1) as server,
        runner,
        Client(server.address) as client,
    ):
        accepted = [client.stream("first", max_tokens=2), client.stream("second", max_tokens=2)]
        server.wait_until_active(2)
        with pytest.raises(ResourceExhausted, match=r"the queue is full .*try again in") as caught:
            client.generate("one more")
        assert caught.value.retry_after is not None
        assert caught.value.retry_after > 0
        runner.open()
        assert [stream.result().usage.completion_tokens for stream in accepted] == [2, 2]


def test_retry_information_is_google_rpc() -> None:
    """Other clients find it where the standard puts it."""
    runner = GatedRunner()
    with RunningServer(PaperEngine(max_running=1, runner=runner), max_queue=1) as server, runner:
        with Client(server.address) as client:
            streams = [client.stream("first"), client.stream("second")]
            server.wait_until_active(2)
            error = failure_of(server.address, encoded(prompt=text("third")))
            for stream in streams:
                stream.close()
        status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
        assert status.details[0].Is(error_details_pb2.RetryInfo.DESCRIPTOR)
        runner.open()


def test_a_bug_is_internal_and_does_not_tell_the_caller_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log has the details, the status has none, and the server goes on."""

    def broken(self: Tokenizer, *_: object) -> list[int]:
        raise ZeroDivisionError("secret prompt")

    with RunningServer(PaperEngine()) as server:
        with monkeypatch.context() as patch:
            patch.setattr(Tokenizer, "encode", broken)
            error = failure_of(server.address, encoded(prompt=text("x")))
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in error.details()
        with Client(server.address) as client:
            assert client.generate("x", max_tokens=1, timeout=10).usage.completion_tokens == 1


# Callers who leave


def test_cancelling_in_mid_stream_leaves_nothing_running(paper: RunningServer, client: Client) -> None:
    """Leaving the block cancels; the engine stops, and its blocks are free or cached."""
    with client.stream("to be cancelled", max_tokens=1900) as stream:
        next(stream)
    paper.wait_until_idle()
    stats = paper.stats()
    assert (stats.waiting, stats.running, stats.cache.leased) == (0, 0, 0)
    paper.check()
    with pytest.raises(Cancelled):
        stream.result()


def test_a_deadline_ends_the_request_in_every_state() -> None:
    """Running or waiting, the caller gets DEADLINE_EXCEEDED and the engine nothing to do."""
    runner = GatedRunner()
    with (
        RunningServer(PaperEngine(max_running=1, runner=runner)) as server,
        runner,
        Client(server.address) as client,
    ):
        running = client.stream("running", timeout=0.3)
        waiting = client.stream("waiting", timeout=0.3)
        for stream in (running, waiting):
            with pytest.raises(DeadlineExceeded):
                stream.result()
        runner.open()
        server.wait_until_idle()
        assert server.stats().totals.aborted == 2
        assert client.generate("next", max_tokens=3, timeout=10).usage.completion_tokens == 3
        server.check()


async def test_many_callers_who_leave_at_any_moment_leave_nothing_behind() -> None:
    """A pool far too small, cancellations and deadlines everywhere: every call ends, and every block is let go."""
    dice = random.Random(7)
    outcomes: list[str] = []

    with RunningServer(PaperEngine(blocks=24)) as server:
        async with AsyncClient(server.address) as client:

            async def call(number: int) -> None:
                prompt = list(b"shared system prompt" * 3)[: dice.randrange(10, 60)] + [number % 250]
                timeout = dice.choice([None, None, 0.001, 0.02, 0.2])
                stream = client.stream(prompt, max_tokens=dice.randrange(1, 200), timeout=timeout)
                if dice.random() < 0.3:
                    await asyncio.sleep(dice.random() * 0.2)
                    await stream.close()
                try:
                    outcomes.append((await stream.result()).finish_reason)
                except (Cancelled, DeadlineExceeded) as error:
                    outcomes.append(type(error).__name__)

            await asyncio.wait_for(asyncio.gather(*(call(number) for number in range(200))), 60)
        await asyncio.to_thread(server.wait_until_idle)
        stats = server.stats()
        server.check()
    assert len(outcomes) == 200
    assert {"length", "Cancelled", "DeadlineExceeded"} <= set(outcomes)
    assert stats.cache.leased == 0
    assert stats.cache.free + stats.cache.cached == stats.cache.total


# Starting and ending


def test_health_and_reflection_answer_for_both_services(paper: RunningServer) -> None:
    """Bare stubs, as probes and grpcurl use them."""
    services = ["prefixcache.v1.GenerationService", "prefixcache.v1.CacheService"]
    assert {health_of(paper.address, name) for name in ["", *services]} == {SERVING}
    with grpc.insecure_channel(paper.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=services[0]),
        ]
        listed, described = stub.ServerReflectionInfo(iter(requests), timeout=10)
    assert {*services, "grpc.health.v1.Health"} <= {entry.name for entry in listed.list_services_response.service}
    assert described.file_descriptor_response.file_descriptor_proto


def test_nothing_is_served_while_the_model_is_being_loaded() -> None:
    """The port answers: NOT_SERVING, and UNAVAILABLE with the reason; then it serves."""
    loaded = threading.Event()
    paper = PaperEngine()

    def load_when_told(config: EngineConfig, on_death: OnDeath) -> Engine:
        assert loaded.wait(30)
        return paper(config, on_death)

    with RunningServer(load_when_told).begin() as server:
        assert health_of(server.address) == NOT_SERVING
        with Client(server.address) as client:
            with pytest.raises(Unavailable, match="still being loaded"):
                client.generate("x", timeout=10)
            with pytest.raises(DeadlineExceeded, match=r"not ready within 0\.2 seconds: it is starting or shutting"):
                client.wait_until_ready(timeout=0.2)
            loaded.set()
            client.wait_until_ready(timeout=30)
        assert health_of(server.address) == SERVING


def test_what_prevents_loading_reaches_whoever_started_the_server() -> None:
    """The error of loading is raised by start, and the port is closed again."""

    def refuse(config: EngineConfig, on_death: OnDeath) -> Engine:
        raise FailedPrecondition("no such model")

    with pytest.raises(FailedPrecondition, match="no such model"), RunningServer(refuse):
        pass


def test_a_port_in_use_is_an_error(paper: RunningServer) -> None:
    """Two servers never share a port unnoticed."""
    with pytest.raises(FailedPrecondition, match="is another server running there"):
        asyncio.run(start_at(paper.server.port))


async def start_at(port: int) -> None:
    server = Server(load({}, port=port), PaperEngine())
    try:
        await server.start()
    finally:
        await server.stop()


def test_draining_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    """Health says NOT_SERVING, a new request UNAVAILABLE, the accepted one is completed."""
    runner = GatedRunner()
    with RunningServer(PaperEngine(runner=runner)) as server, runner, Client(server.address) as client:
        accepted = client.stream("accepted", max_tokens=20)
        server.wait_until_active()
        assert not server.drain(0.05)
        assert health_of(server.address) == NOT_SERVING
        with pytest.raises(Unavailable, match="shutting down"):
            client.generate("too late", timeout=10)
        runner.open()
        assert accepted.result().usage.completion_tokens == 20
        assert server.drain(10)


def test_stopping_tells_those_who_still_wait() -> None:
    """Whoever is not done when time is up gets UNAVAILABLE, not a broken connection."""
    runner = GatedRunner()
    with RunningServer(PaperEngine(runner=runner)) as server, runner, Client(server.address) as client:
        stream = client.stream("never finished")
        server.wait_until_active()
        stopping = asyncio.run_coroutine_threadsafe(server.server.stop(), server.loop)
        server.wait_until_stopping()
        runner.open()
        with pytest.raises(Unavailable, match="shut down"):
            stream.result()
        stopping.result(30)


PROCESS = """
import asyncio, sys, threading
import tests.engine.serving as serving
from engine.config import load
from engine.server import serve

runner = serving.GatedRunner()
def obey():
    for line in sys.stdin:
        if line.strip() == "open":
            runner.open()
        elif line.strip() == "fail":
            runner.failure = RuntimeError("the device is gone")
            runner.open()
threading.Thread(target=obey, daemon=True).start()
sys.exit(asyncio.run(serve(load(port=0, drain_seconds=20), serving.PaperEngine(runner=runner))))
"""


class Process:
    """A server in a process of its own, which computes when told to."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROCESS],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": "."},
        )
        self.address = self.line("serving ")["event"].split(" on ")[1].split(": ")[0]

    def line(self, beginning: str) -> dict[str, Any]:
        """Return the next log line that begins so."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            entry: dict[str, Any] = json.loads(line)
            if entry["event"].startswith(beginning):
                return entry
        raise AssertionError(f"the process ended without saying {beginning!r}")

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def process() -> Iterator[Process]:
    process = Process()
    yield process
    process.close()


def test_sigterm_drains_and_exits_with_zero(process: Process) -> None:
    """A stream in progress is completed, a new one refused, and the exit code says that all is well."""
    with Client(process.address) as client:
        client.wait_until_ready(10)
        stream = client.stream("accepted", max_tokens=30)
        process.tell("open")
        next(stream)
        process.process.send_signal(signal.SIGTERM)
        process.line("shutting down")
        assert stream.result().usage.completion_tokens == 30
        assert process.process.wait(20) == 0
        with pytest.raises(Unavailable, match="no answer from"):
            client.generate("too late", timeout=10)


def test_a_second_signal_ends_the_process_at_once(process: Process) -> None:
    """Whoever does not want to wait for the drain need not."""
    with Client(process.address) as client:
        client.wait_until_ready(10)
        stream = client.stream("never finished")
        process.process.send_signal(signal.SIGINT)
        assert process.line("shutting down")["event"]
        process.process.send_signal(signal.SIGINT)
        assert process.process.wait(10) == 128 + signal.SIGINT
        with pytest.raises(Unavailable):
            stream.result()


def test_the_death_of_the_engine_is_told_to_everyone(process: Process) -> None:
    """Waiting callers get UNAVAILABLE with the reason, the log the traceback, the parent a non-zero exit code."""
    with Client(process.address) as client:
        client.wait_until_ready(10)
        streams = [client.stream(f"waiting {number}") for number in range(3)]
        process.tell("fail")
        for stream in streams:
            with pytest.raises(Unavailable, match=r"the engine has failed|no answer"):
                stream.result()
        entry = process.line("the engine has failed")
        assert "the device is gone" in entry["exception"]
        assert process.process.wait(20) == 1
