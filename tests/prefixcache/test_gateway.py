"""The gateway over real gRPC: what passes through as it is, and where requests go when replicas do not answer."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from structlog.testing import capture_logs

from prefixcache.channel import TLS
from prefixcache.client import AsyncClient, Client
from prefixcache.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from prefixcache.routing.gateway import Gateway, Settings
from prefixcache.routing.policies import Candidate, rendezvous
from prefixcache.v1 import generation_pb2, prompt_pb2
from tests.engine.paper import generate
from tests.engine.serving import GatedRunner, PaperEngine, RunningServer
from tests.engine.tenancy import entry, write
from tests.prefixcache.gateways import RunningGateway
from tests.serving import free_port
from tests.waiting import until

GENERATE = "/prefixcache.v1.GenerationService/Generate"
REPLICA = "prefixcache-replica"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Pair:
    """Two replicas that compute on paper, `a` and `b`, behind a gateway."""

    def __init__(self, a: RunningServer, b: RunningServer, gateway: RunningGateway) -> None:
        self.a, self.b, self.gateway = a, b, gateway

    @property
    def address(self) -> str:
        return self.gateway.address

    def running(self) -> int:
        return sum(one.stats().running + one.stats().waiting for one in (self.a, self.b))


@contextlib.contextmanager
def pair(**settings: Any) -> Iterator[Pair]:
    with (
        RunningServer(PaperEngine(), replica_id="a") as a,
        RunningServer(PaperEngine(), replica_id="b") as b,
        RunningGateway(a.address, b.address, **settings) as gateway,
    ):
        until(lambda: gateway.serving() == ["a", "b"], "two replicas that serve")
        yield Pair(a, b, gateway)


@pytest.fixture(scope="module")
def two() -> Iterator[Pair]:
    """A gateway and two replicas; tests leave nothing running on them."""
    with pair() as both:
        yield both


@pytest.fixture
def client(two: Pair) -> Iterator[Client]:
    with Client(two.address) as client:
        yield client


def encoded(prompt: str = "x", **fields: Any) -> bytes:
    return generation_pb2.GenerateRequest(prompt=prompt_pb2.Prompt(text=prompt), **fields).SerializeToString()


def called(address: str, method: str, request: bytes, **options: Any) -> tuple[list[bytes], Any]:
    """Make a call with plain bytes; return the messages and the call."""
    with grpc.insecure_channel(address, options=[("grpc.max_send_message_length", -1)]) as channel:
        stub: Any = channel.unary_stream(method)
        call = stub(request, timeout=options.pop("timeout", 10), **options)
        return list(call), call


def failure(address: str, request: bytes, method: str = GENERATE, **options: Any) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        called(address, method, request, **options)
    return caught.value


def metadata_of(call: Any) -> dict[str, Any]:
    return dict(call.trailing_metadata())


# What passes through


def test_an_answer_is_that_of_the_replica(two: Pair, client: Client) -> None:
    """Tokens, counts and text are a single engine's, and the answer says whose they are."""
    prompt = list(range(50))
    completion = client.generate(prompt, max_tokens=9, timeout=10)
    assert completion.token_ids == generate(prompt, 9, 256)
    assert completion.replica in ("a", "b")
    again = client.generate(prompt, max_tokens=9, timeout=10)
    assert (again.replica, again.usage.cached_tokens) == (completion.replica, 49)


def test_the_name_of_a_replica_that_gives_none_is_its_address() -> None:
    """A server without a name is known by where it was said to be."""
    with (
        RunningServer(PaperEngine()) as only,
        RunningGateway(only.address) as gateway,
        Client(gateway.address) as client,
    ):
        assert client.generate("x", max_tokens=1, timeout=10).replica == only.address


async def test_the_asynchronous_client_needs_to_know_nothing(two: Pair) -> None:
    """Streaming through the gateway is streaming."""
    async with AsyncClient(two.address) as client:
        async with client.stream("some text", max_tokens=20, timeout=10) as stream:
            pieces = [text async for text in stream]
        assert "".join(pieces) == (await stream.result()).text
        assert (await client.model(timeout=10)).name == "paper"


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        (b"\x12\x7f", "INVALID_ARGUMENT", "cannot be read; is the client made for another version"),
        (b"\x12\x04\x0a\x02\xff\xfe", "INVALID_ARGUMENT", "is not valid UTF-8"),
        (b"", "INVALID_ARGUMENT", "prompt is not set"),
        (encoded(""), "INVALID_ARGUMENT", "prompt.text is empty"),
        (encoded(model="other"), "NOT_FOUND", "model 'other' is not served here"),
        (encoded("x" * 10**5), "INVALID_ARGUMENT", "the prompt has at least"),
        (encoded("x" * (5 << 20)), "RESOURCE_EXHAUSTED", "larger than max"),
    ],
)
def test_a_refusal_is_the_replicas_own(two: Pair, request_: bytes, code: str, words: str) -> None:
    """Status and words, also for what the gateway itself cannot read; it says who refused."""
    error = failure(two.address, request_)
    assert error.code().name == code
    assert words in error.details()
    assert metadata_of(error)[REPLICA] in ("a", "b")
    assert error.details() == failure(two.a.address, request_).details()


def test_a_message_may_be_as_large_as_the_replicas_take() -> None:
    """More than gRPC's own default, both ways."""
    with (
        RunningServer(PaperEngine(), max_message_bytes=32 << 20) as only,
        RunningGateway(only.address) as gateway,
        Client(gateway.address) as client,
    ):
        ids = [200] * (5 << 19)  # of two bytes each
        assert client.tokenize(ids, timeout=60) == ids


def test_who_calls_is_the_replicas_business(tmp_path: Any) -> None:
    """A token goes through, what belongs to one tenant is not shown to another, and the gateway refuses nobody."""
    tenants = write(tmp_path / "tenants.toml", entry("red"), entry("blue"))
    with (
        RunningServer(PaperEngine(), replica_id="a", tenants=tenants) as a,
        RunningServer(PaperEngine(), replica_id="b", tenants=tenants) as b,
        RunningGateway(a.address, b.address) as gateway,
    ):
        with Client(gateway.address, token="nobody") as client, pytest.raises(Unauthenticated, match="not known"):
            client.generate("x", timeout=10)
        with Client(gateway.address, token="") as client, pytest.raises(Unauthenticated):
            client.stats(timeout=10)
        prompt = "a prompt that is long enough for two blocks and more"
        with Client(gateway.address, token="red") as red, Client(gateway.address, token="blue") as blue:
            first = red.generate(prompt, max_tokens=1, timeout=10)
            again = red.generate(prompt, max_tokens=1, timeout=10)
            assert again.replica == first.replica
            assert again.usage.cached_tokens == again.usage.prompt_tokens - 1
            for _ in range(2):
                assert blue.lookup(prompt, timeout=10).cached_tokens == 0
            assert red.invalidate(everything=True, timeout=10).freed_blocks > 0


def test_metadata_that_belong_to_the_connection_stay_here(two: Pair) -> None:
    """Any that callers may send, also in bytes, are no obstacle; a reserved one is left out."""
    extra = (("x-trace", "1"), ("x-trace-bin", b"\x00\xff"), ("traceparent", "00-ab-cd-01"))
    messages, call = called(
        two.address, GENERATE, encoded(sampling=generation_pb2.Sampling(max_tokens=1)), metadata=extra
    )
    assert len(messages) >= 2
    assert metadata_of(call)[REPLICA] in ("a", "b")


def test_a_deadline_holds_at_the_replica(two: Pair) -> None:
    """It ends the request there too."""
    runner = GatedRunner()
    with (
        RunningServer(PaperEngine(runner=runner)) as only,
        runner,
        RunningGateway(only.address) as gateway,
        Client(gateway.address) as client,
    ):
        with pytest.raises(DeadlineExceeded):
            client.generate("x", timeout=0.3)
        runner.open()
        only.wait_until_idle()
        assert only.stats().totals.aborted == 1


@pytest.mark.parametrize("state", ["queued", "computing", "streaming"])
def test_a_caller_who_leaves_leaves_nothing_behind(state: str) -> None:
    """In every state the replica's request is aborted and its blocks are free."""
    runner = GatedRunner()
    with (
        RunningServer(PaperEngine(max_running=1, runner=runner)) as only,
        runner,
        RunningGateway(only.address) as gateway,
        Client(gateway.address) as client,
    ):
        first = client.stream("first", max_tokens=1000) if state == "queued" else None
        if first is not None:
            only.wait_until_active(1)
        stream = client.stream("a prompt", max_tokens=1000, store_cache=False)
        only.wait_until_active(2 if first is not None else 1)
        if state == "streaming":
            runner.permits.release(5)
            next(stream)
        for one in filter(None, (stream, first)):
            one.close()
        until(lambda: only.server.front.active == 0, "the end of the calls")
        runner.open()
        only.wait_until_idle()
        assert only.stats().cache.leased == 0
        until(lambda: gateway.gateway.active == 0, "the end of the calls in the gateway")


def test_a_caller_who_reads_slowly_gets_everything(two: Pair, client: Client) -> None:
    """What it has not read waits, and is in order."""
    prompt = list(b"slow")
    with client.stream(prompt, max_tokens=600, timeout=30) as stream:
        next(stream)
        until(lambda: two.running() == 0, "the end of the generation")
        assert stream.result().token_ids == generate(prompt, 600, 256)


# Health and reflection


def health_of(address: str, service: str = "") -> Any:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(service=service), wait_for_ready=True, timeout=10).status


def test_it_serves_while_one_replica_does() -> None:
    """Not before there is one, and not after the last."""
    ports = [free_port(), free_port()]
    with RunningGateway(*(f"127.0.0.1:{port}" for port in ports)) as gateway:
        assert health_of(gateway.address) == NOT_SERVING
        with Client(gateway.address) as client, pytest.raises(Unavailable):
            client.generate("x", timeout=10)
        with RunningServer(PaperEngine(), port=ports[0]) as first:
            until(lambda: health_of(gateway.address) == SERVING, "SERVING")
            with RunningServer(PaperEngine(), port=ports[1]):
                until(lambda: len(gateway.serving()) == 2, "both")
            until(lambda: len(gateway.serving()) == 1, "one")
            assert health_of(gateway.address, "prefixcache.v1.CacheService") == SERVING
            first.drain(1)
            until(lambda: health_of(gateway.address) == NOT_SERVING, "NOT_SERVING while draining")
        assert health_of(gateway.address) == NOT_SERVING


def test_it_can_be_reflected_on(two: Pair) -> None:
    """`grpcurl list` shows what a replica shows."""
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    names = []
    for address in (two.address, two.a.address):
        with grpc.insecure_channel(address) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            [response] = stub.ServerReflectionInfo(iter([request]), timeout=10)
            names.append({service.name for service in response.list_services_response.service})
    assert names[0] == names[1]


# Replicas that do not answer


def session_at(replica_id: str) -> str:
    """Return a session whose first choice is this one of `a` and `b`."""
    candidates = [Candidate(name, 0, 0, 0, 0, 0, 0) for name in ("a", "b")]
    names = (f"session {number}" for number in itertools.count())
    return next(name for name in names if rendezvous(name.encode(), candidates)[0].replica_id == replica_id)


AT_A = session_at("a")


@contextlib.contextmanager
def one_standing_still(**options: Any) -> Iterator[tuple[Pair, GatedRunner]]:
    """Sessions stay where they belong, and `a` computes only what it is permitted, one request at a time."""
    runner = GatedRunner()
    with (
        RunningServer(PaperEngine(), replica_id="b") as b,
        RunningServer(PaperEngine(max_running=1, runner=runner), replica_id="a", **options) as a,
        runner,
        RunningGateway(a.address, b.address, policy="session") as gateway,
    ):
        until(lambda: gateway.serving() == ["a", "b"], "two replicas that serve")
        yield Pair(a, b, gateway), runner


def test_a_replica_that_has_gone_is_not_asked_again() -> None:
    """Its callers do not notice: the other one answers."""
    with pair(policy="session") as two, Client(two.address) as client:
        assert client.generate("x", max_tokens=1, session_id=AT_A, timeout=10).replica == "a"
        two.a.__exit__(None, None, None)
        for _ in range(3):
            assert client.generate("x", max_tokens=1, session_id=AT_A, timeout=10).replica == "b"
        until(lambda: two.gateway.serving() == ["b"], "only b")


def test_what_has_no_token_yet_goes_elsewhere_when_its_replica_fails() -> None:
    """Its caller gets the whole answer, from another replica, and does not see that it began twice."""
    with one_standing_still() as (two, runner), Client(two.address) as client:
        prompt = list(b"wait")
        streams = [client.stream(prompt, max_tokens=5, session_id=AT_A, timeout=30) for _ in range(2)]
        two.a.wait_until_active(2)
        runner.failure = RuntimeError("the model is gone")
        runner.open()
        for stream in streams:
            completion = stream.result()
            assert (completion.token_ids, completion.replica) == (generate(prompt, 5, 256), "b")


def test_what_has_a_token_does_not() -> None:
    """UNAVAILABLE says whose loss it is and what to do; nobody else is asked to begin anew."""
    with one_standing_still() as (two, runner), Client(two.address) as client:
        stream = client.stream(list(b"wait"), max_tokens=1000, session_id=AT_A, timeout=30)
        runner.permits.release(5)
        next(stream)
        runner.failure = RuntimeError("the model is gone")
        runner.open()
        with pytest.raises(Unavailable, match=r"replica a has gone while it answered.*send the request again"):
            stream.result()
        assert two.b.stats().totals.admitted == 0


def test_what_waits_for_a_replica_that_has_stopped_answering_goes_elsewhere() -> None:
    """The connection stands, but nobody is there: as soon as that is clear, the others answer."""
    with one_standing_still() as (two, runner), Client(two.address) as client:
        stream = client.stream(list(b"wait"), max_tokens=5, session_id=AT_A, timeout=30)
        two.a.wait_until_active(1)
        two.gateway.lose("a")
        assert stream.result().replica == "b"
        runner.open()
        two.a.wait_until_idle()
        assert two.a.stats().totals.aborted == 1


def test_a_full_queue_is_passed_by() -> None:
    """The next replica takes the request. Who wants that one alone is told when to try again."""
    with (
        one_standing_still(max_queue=1) as (two, runner),
        Client(two.a.address) as direct,
        Client(two.address) as client,
        Client(two.address, replica="a") as forced,
    ):
        streams = [direct.stream("first", max_tokens=2) for _ in range(2)]
        two.a.wait_until_active(2)
        assert client.generate("x", max_tokens=1, session_id=AT_A, timeout=10).replica == "b"
        with pytest.raises(ResourceExhausted, match="queue is full") as full:
            forced.generate("x", timeout=10)
        assert full.value.retry_after
        runner.open()
        assert [stream.result().usage.completion_tokens for stream in streams] == [2, 2]


def test_a_quota_is_not_passed_by(tmp_path: Any) -> None:
    """Another replica would count from nothing: what a tenant may use is not to be had by being refused."""
    tenants = write(tmp_path / "tenants.toml", entry("red", tokens_per_minute="5"))
    with (
        RunningServer(PaperEngine(), replica_id="a", tenants=tenants) as a,
        RunningServer(PaperEngine(), replica_id="b", tenants=tenants) as b,
        RunningGateway(a.address, b.address, policy="session") as gateway,
        Client(gateway.address, token="red") as client,
    ):
        until(lambda: len(gateway.serving()) == 2, "both")
        assert client.generate("x" * 20, max_tokens=1, session_id=AT_A, timeout=10).replica == "a"
        with pytest.raises(ResourceExhausted, match="you have used your 5 computed tokens") as spent:
            client.generate("y" * 20, max_tokens=1, session_id=AT_A, timeout=10)
        assert spent.value.retry_after
        assert b.stats().totals.admitted == 0


# One replica by its name


def test_a_caller_can_name_the_replica(two: Pair) -> None:
    """Whatever it asks, that one answers; its statistics and its events are to be had in this way."""
    for name, server in (("a", two.a), ("b", two.b)):
        with Client(two.address, replica=name) as client:
            prompt = f"a prompt for {name} that is longer than a block"
            assert client.generate(prompt, max_tokens=1, timeout=10).replica == name
            admitted = server.stats().totals.admitted
            assert client.stats(timeout=10).requests.admitted == admitted
            with client.watch_events(timeout=10) as watch:
                assert next(iter(watch)).sequence >= 0
            with client.warm([f"warm {prompt}"], timeout=10) as warming:
                assert [warmed.state for warmed in warming] == ["computed"]
            assert client.lookup(f"warm {prompt}", timeout=10).cached_tokens > 0


def test_a_name_that_nobody_has(two: Pair) -> None:
    """NOT_FOUND, for every kind of call."""
    with Client(two.address, replica="c") as client:
        for call in (lambda: client.generate("x", timeout=10), lambda: client.stats(timeout=10)):
            with pytest.raises(NotFound, match="no replica 'c' here"):
                call()
        with client.warm(["x"], timeout=10) as warming, pytest.raises(NotFound, match="no replica 'c'"):
            next(warming)


def test_events_are_those_of_one_replica(two: Pair, client: Client) -> None:
    """Who does not say which is told to."""
    with client.watch_events(timeout=10) as watch, pytest.raises(FailedPrecondition, match="as prefixcache-replica"):
        next(iter(watch))
    with client.watch_prompts(timeout=10) as shapes, pytest.raises(FailedPrecondition, match="about one replica"):
        next(iter(shapes))


# The end


def test_calls_in_progress_may_finish_when_it_drains() -> None:
    """New ones are refused with what to do, and its health says so first."""
    with one_standing_still() as (two, runner), Client(two.address) as client:
        stream = client.stream(list(b"wait"), max_tokens=5, session_id=AT_A, timeout=30)
        two.a.wait_until_active(1)
        assert not two.gateway.drain(0)
        assert health_of(two.address) == NOT_SERVING
        with pytest.raises(Unavailable, match="the gateway is shutting down: send the request to another one"):
            client.generate("x", timeout=10)
        runner.open()
        assert stream.result().token_ids == generate(list(b"wait"), 5, 256)
        assert two.gateway.drain(10)


def test_calls_that_do_not_finish_are_ended() -> None:
    """With UNAVAILABLE, here and at the replica."""
    with one_standing_still() as (two, _), Client(two.address) as client:
        stream = client.stream(list(b"wait"), max_tokens=5, session_id=AT_A, timeout=30)
        two.a.wait_until_active(1)
        two.gateway.stop()
        with pytest.raises(Unavailable, match="the gateway has shut down"):
            stream.result()
        until(lambda: two.a.server.front.active == 0, "the end at the replica")


# Settings and the log


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "say where the replicas are"),
        ({"replicas": ["somewhere"]}, "'somewhere' has no port"),
        ({"replicas": ["a:1"], "policy": "best"}, "no policy 'best'; there are prefix, round-robin"),
        ({"replicas": ["a:1"], "group": "x"}, "'x' is no group of replicas"),
        ({"replicas": ["a:1"], "deployment": "two words"}, "the deployment is 'two words'"),
        ({"redis": "http://x"}, "is no URL of a Redis"),
        ({"replicas": ["a:1"], "tls": TLS(ca="/nowhere")}, "the file /nowhere cannot be read"),
    ],
)
async def test_settings_of_no_use_are_named(settings: dict[str, Any], words: str) -> None:
    """Before anything is opened."""
    with pytest.raises(InvalidArgument, match=words):
        Gateway(Settings(**settings))


async def test_a_port_that_is_taken(two: Pair) -> None:
    """It says what to do."""
    gateway = Gateway(Settings(replicas=[two.a.address]))
    with pytest.raises(FailedPrecondition, match="is another server running there"):
        await gateway.start(two.address)
    await gateway.stop()


def test_no_prompt_gets_into_the_log() -> None:
    """Not in any case: answered, refused, of no use, without a replica."""
    secret = "the-harbour-opens-at-six"
    with capture_logs() as lines, pair() as two, Client(two.address) as client:
        client.generate(secret, max_tokens=1, timeout=10)
        for bad in ({"temperature": -1.0}, {"namespace": secret * 100}):
            with pytest.raises(InvalidArgument):
                client.generate(secret, timeout=10, **bad)
        with client.warm([secret], timeout=10) as warming:
            list(warming)
        for server in (two.a, two.b):
            server.__exit__(None, None, None)
        with pytest.raises(Unavailable):
            client.generate(secret, timeout=10)
    assert lines and secret not in repr(lines)
