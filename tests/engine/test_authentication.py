"""Who may call: the file of tenants, and every way to be let in or not, over real gRPC."""

from __future__ import annotations

import asyncio
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from engine.authentication import Limits, bearer_token, read_tenants
from engine.config import load
from engine.gate import Gate
from engine.server import CACHE, GENERATION
from prefixcache import logs
from prefixcache.client import AsyncClient, Client
from prefixcache.errors import InvalidArgument, ResourceExhausted, Unauthenticated
from prefixcache.v1 import cache_pb2, cache_pb2_grpc, generation_pb2, generation_pb2_grpc, prompt_pb2
from tests.engine.serving import GatedRunner, PaperEngine, RunningServer
from tests.engine.tenancy import entry, hashed, write

SECRET = "prefixcache_not-to-be-repeated"


@pytest.fixture(scope="module")
def two_tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server of tenants a and b, whose tokens are "a" and "b"."""
    file = write(tmp_path_factory.mktemp("tenants") / "tenants.toml", entry("a"), entry("b"))
    with RunningServer(PaperEngine(), tenants=file) as server:
        yield server


# The file


def test_a_file_says_everything_about_its_tenants(tmp_path: Path) -> None:
    """Tokens, certificates, rights and limits; what is left out is no limit and no right."""
    lines = f"""
    [tenants.support]
    tokens = [{hashed("one")}, {hashed("two")}]
    certificates = ["support.example.com", "spiffe://example.com/support"]
    admin = true
    max_blocks = "20%"
    max_in_flight = 32
    tokens_per_minute = 600_000
    [tenants."web.eu"]
    tokens = []
    max_blocks = 40
    """
    directory = read_tenants(Path(write(tmp_path / "tenants.toml", lines)))
    support, web = directory.tenants["support"], directory.tenants["web.eu"]
    assert support.admin
    assert support.limits == Limits(0.2, 32, 600_000)
    assert (support.limits.blocks_of(1000), support.limits.blocks_of(1), web.limits.blocks_of(1000)) == (200, 1, 40)
    assert (web.admin, web.limits.max_in_flight, Limits().blocks_of(1000)) == (False, None, None)
    assert (
        directory.by_token("one") == directory.by_token("two") == directory.by_certificate(["x", "support.example.com"])
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "there is no tenant in it"),
        ("[tenants]", "there is no tenant in it"),
        ("[tenants.a]", "tenant 'a' has neither tokens nor certificates"),
        ("[tenant.a]", "the file has a key 'tenant', which has no meaning; did you mean tenants?"),
        ("[tenants.a]\ntoken = 1", "tenant 'a' has a key 'token', which has no meaning; did you mean tokens?"),
        ("[tenants.a]\ncolour = 1", "tenant 'a' has a key 'colour', which has no meaning. There are: admin, cert"),
        ("[tenants]\na = 1", r"tenant 'a' is not a table; write \[tenants.a\]"),
        ('[tenants."a b"]\ntokens = []', "a tenant's name has 1 to 64 letters, .* unlike 'a b'"),
        (f"[tenants.{'a' * 65}]\ntokens = []", "a tenant's name has 1 to 64 letters"),
        (f'[tenants.a]\ntokens = ["{SECRET}"]', r"tokens\[0\] of tenant 'a' is not the hash of a token"),
        (f'[tenants.a]\ntokens = "{SECRET}"', "tokens of tenant 'a' must be a list of texts"),
        ("[tenants.a]\ntokens = [1]", "tokens of tenant 'a' must be a list of texts"),
        ('[tenants.a]\ncertificates = [""]', "certificates of tenant 'a' must be a list of texts"),
        (entry("a", admin='"yes"'), "admin of tenant 'a' must be true or false"),
        (entry("a", max_blocks="0"), "max_blocks of tenant 'a' must be a number of blocks above 0, or a share"),
        (entry("a", max_blocks='"101%"'), "max_blocks of tenant 'a' must be"),
        (entry("a", max_blocks='"0%"'), "max_blocks of tenant 'a' must be"),
        (entry("a", max_blocks="0.5"), "max_blocks of tenant 'a' must be"),
        (entry("a", max_blocks="true"), "max_blocks of tenant 'a' must be"),
        (entry("a", max_in_flight="0"), "max_in_flight of tenant 'a' must be a whole number above 0"),
        (entry("a", tokens_per_minute="1.5"), "tokens_per_minute of tenant 'a' must be a whole number above 0"),
        (entry("a", SECRET) + entry("b", SECRET), "a token is there twice: of tenants 'a' and 'b'"),
        ('[tenants.a]\ncertificates = ["x", "x"]', "a certificate name is there twice: of tenants 'a' and 'a'"),
        (entry("a") + entry("a"), "is not TOML: "),
        ("[tenants.a", "is not TOML: "),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    """The message has the file and the place, and nothing that might be a token."""
    path = Path(write(tmp_path / "tenants.toml", text))
    with pytest.raises(InvalidArgument, match=words) as caught:
        read_tenants(path)
    assert str(path) in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Not there, and not text."""
    with pytest.raises(InvalidArgument, match="cannot be read: No such file"):
        read_tenants(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    with pytest.raises(InvalidArgument, match="is not UTF-8 text"):
        read_tenants(tmp_path / "bytes.toml")


@pytest.mark.parametrize(("mode", "may"), [(0o600, ""), (0o640, ""), (0o644, "may read"), (0o666, "may change")])
def test_a_file_that_everybody_may_open_is_warned_about(tmp_path: Path, mode: int, may: str) -> None:
    """Reading it tells who the tenants are, changing it lets anybody in."""
    path = Path(write(tmp_path / "tenants.toml", entry("a")))
    path.chmod(mode)
    with structlog.testing.capture_logs() as lines:
        Gate(str(path), certificates=False).open()
    warnings = [line["event"] for line in lines if line["log_level"] == "warning"]
    assert len(warnings) == bool(may)
    assert all(may in warning for warning in warnings)


def test_certificates_that_nobody_can_show_are_warned_about(tmp_path: Path) -> None:
    """Without a client CA the names in the file stand for nobody."""
    path = write(tmp_path / "tenants.toml", entry("a", certificates='["x"]'))
    with structlog.testing.capture_logs() as lines:
        Gate(path, certificates=False).open()
    assert ["tenant a has names of certificates" in line["event"] for line in lines] == [True]


# Tokens


@pytest.mark.parametrize(
    ("metadata", "token"),
    [
        ([], None),
        ([("authorization", "Bearer x")], "x"),
        ([("other", "y"), ("authorization", "bearer  x ")], "x"),
        ([("authorization", "Basic x")], ...),
        ([("authorization", "x")], ...),
        ([("authorization", "Bearer ")], ...),
        ([("authorization", "Bearer x"), ("authorization", "Bearer y")], ...),
    ],
)
def test_a_bearer_token_is_read_as_the_standard_writes_it(metadata: Any, token: Any) -> None:
    """The scheme in any case; anything else is refused without repeating it."""
    if token is ...:
        with pytest.raises(Unauthenticated, match="is not one bearer token; send a token as metadata"):
            bearer_token(metadata)
    else:
        assert bearer_token(metadata) == token


def calls(channel: grpc.Channel) -> dict[str, Any]:
    """Return a call of every method of our services, made with an empty request."""
    made: dict[str, Any] = {}
    services = (
        (generation_pb2.DESCRIPTOR, generation_pb2_grpc.GenerationServiceStub),
        (
            cache_pb2.DESCRIPTOR,
            cache_pb2_grpc.CacheServiceStub,
        ),
    )
    for file, stub in services:
        for service in file.services_by_name.values():
            for method in service.methods:
                request = GetMessageClass(method.input_type)()
                call = getattr(stub(channel), method.name)
                made[method.name] = (call, iter([request]) if method.client_streaming else request)
    return made


def complete(answer: Any) -> None:
    """Read a stream to its end; anything else is complete."""
    if hasattr(answer, "__next__"):
        list(answer)


@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Bearer A", "Basic YTpi", "Bearer " + "x" * 4000])
def test_no_method_answers_a_caller_who_is_not_known(two_tenants: RunningServer, authorization: str | None) -> None:
    """UNAUTHENTICATED, whatever is called, with what to do and without what was sent."""
    metadata = () if authorization is None else (("authorization", authorization),)
    with grpc.insecure_channel(two_tenants.address) as channel:
        for name, (call, request) in calls(channel).items():
            with pytest.raises(grpc.RpcError) as caught:
                complete(call(request, metadata=metadata, timeout=10))
            error: Any = caught.value
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED, name
            assert "token" in error.details()
            assert "xxxx" not in error.details()
            assert "wrong" not in error.details()


def test_a_message_of_an_unknown_caller_is_not_even_read(two_tenants: RunningServer) -> None:
    """Bytes that are no message get the same answer as a good one; the tokenizer and the engine see nothing."""
    admitted = two_tenants.stats().totals.admitted
    with grpc.insecure_channel(two_tenants.address) as channel:
        call: Any = channel.unary_stream(f"/{GENERATION}/Generate")
        with pytest.raises(grpc.RpcError) as caught:
            list(call(b"\x12\x7f", timeout=10))
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert two_tenants.stats().totals.admitted == admitted


def test_health_is_open_and_reflection_is_not(two_tenants: RunningServer) -> None:
    """Load balancers have no token; whoever explores the server needs one."""
    with grpc.insecure_channel(two_tenants.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", GENERATION, CACHE):
            response = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert response.status is health_pb2.HealthCheckResponse.SERVING
        watched = next(health.Watch(health_pb2.HealthCheckRequest(), timeout=10))
        assert watched.status is health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)

        def ask(metadata: Any) -> list[Any]:
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            return list(reflection.ServerReflectionInfo(iter([request]), metadata=metadata, timeout=10))

        with pytest.raises(grpc.RpcError) as caught:
            ask(())
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        (answer,) = ask((("authorization", "Bearer a"),))
        assert CACHE in [service.name for service in answer.list_services_response.service]


async def test_both_clients_send_a_token_with_every_call(two_tenants: RunningServer) -> None:
    """With one they are let in, with another or none they get Unauthenticated; readiness needs none."""
    with Client(two_tenants.address, token="a") as client, Client(two_tenants.address) as stranger:
        assert client.generate("x", max_tokens=1, timeout=10).usage.completion_tokens == 1
        assert client.lookup("x", timeout=10).prompt_tokens == len(client.tokenize("x", timeout=10))
        stranger.wait_until_ready(timeout=10)
        with pytest.raises(Unauthenticated, match=r"this server asks for a token; send .*PREFIXCACHE_TOKEN"):
            stranger.model(timeout=10)
        with pytest.raises(Unauthenticated):
            stranger.generate("x", timeout=10)
    async with AsyncClient(two_tenants.address, token="b") as client:
        assert (await client.generate("x", max_tokens=1, timeout=10)).usage.cached_tokens == 0
        assert (await client.model(timeout=10)).name == "paper"
    async with AsyncClient(two_tenants.address, token="c") as stranger:
        with pytest.raises(Unauthenticated, match="the token is not known here"):
            await stranger.generate("x", timeout=10)
        with pytest.raises(Unauthenticated, match="the token is not known here"):
            await stranger.stats(timeout=10)


def test_the_token_comes_from_the_environment(two_tenants: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none is given; an empty one given is none."""
    monkeypatch.setenv("PREFIXCACHE_TOKEN", "a")
    with Client(two_tenants.address) as client:
        assert client.model(timeout=10).name == "paper"
    with Client(two_tenants.address, token="") as client, pytest.raises(Unauthenticated):
        client.model(timeout=10)


def test_refused_callers_are_logged_once_in_a_while(tmp_path: Path) -> None:
    """The first at once, of many more in the minute after it only how many they were; never a token."""
    gate = Gate(write(tmp_path / "tenants.toml", entry("a")), certificates=False)
    with structlog.testing.capture_logs() as lines:
        for now in (0.0, 1.0, 59.0, 60.0):
            gate.refused(Unauthenticated("the token is not known here"), "ipv4:192.0.2.1:5", now)
    assert [line["refused_since_last_line"] for line in lines] == [1, 3]
    assert lines[0]["peer"] == "ipv4:192.0.2.1:5"


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_traceback_in_the_log_shows_no_values(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever went wrong, neither a token nor a prompt that a function held gets into the log."""

    def fail(token: str) -> None:
        raise ZeroDivisionError("a bug")

    logs.configure("info", form)
    try:
        fail(SECRET[::-1][::-1])
    except ZeroDivisionError:
        structlog.get_logger().exception("a call failed")
    finally:
        structlog.reset_defaults()
    written = capsys.readouterr().err
    assert "ZeroDivisionError: a bug" in written
    assert SECRET not in written


def test_without_a_file_everybody_may_call() -> None:
    """As long as nobody asks for tenants, a token is neither needed nor looked at."""
    with RunningServer(PaperEngine()) as server, Client(server.address, token="any") as client:
        assert client.generate("x", max_tokens=1, timeout=10).usage.completion_tokens == 1


# The file changes


async def test_a_changed_file_is_in_force_without_a_restart(tmp_path: Path) -> None:
    """A new token works, a withdrawn one stops working; a broken file changes nothing and is logged."""
    path = tmp_path / "tenants.toml"
    with (
        RunningServer(PaperEngine(), tenants=write(path, entry("a"))) as server,
        Client(server.address, token="a") as a,
        Client(server.address, token="b") as b,
    ):
        assert allowed(a)
        assert not allowed(b)
        write(path, entry("b"))
        while not allowed(b):  # the server looks twice a second
            await asyncio.sleep(0.02)
        with pytest.raises(Unauthenticated, match="withdrawn"):
            a.model(timeout=10)
        with structlog.testing.capture_logs() as lines:
            write(path, "[tenants.a]")
            while not any("stay as they were" in line["event"] for line in lines):
                await asyncio.sleep(0.02)
        assert allowed(b)


def allowed(client: Client) -> bool:
    try:
        client.model(timeout=10)
    except Unauthenticated:
        return False
    return True


def test_a_file_that_is_still_being_written_is_not_read(tmp_path: Path) -> None:
    """What has changed must be the same at two looks; a file that is gone is not a change."""
    path = tmp_path / "tenants.toml"
    gate = Gate(write(path, entry("a")), certificates=False)
    gate.open()
    assert not gate.changed()
    write(path, entry("a"), entry("b"))
    assert not gate.changed()
    path.write_text(entry("a"))
    assert not gate.changed()
    assert gate.changed()
    assert gate.reload() == []
    assert not gate.changed()
    path.unlink()
    assert not gate.changed()
    assert not gate.changed()


def test_what_a_tenant_had_cached_is_forgotten_with_it(tmp_path: Path) -> None:
    """Nobody could reach it any more; a tenant of the same name that comes later begins empty."""
    path = tmp_path / "tenants.toml"
    with RunningServer(PaperEngine(), tenants=write(path, entry("a"), entry("b"))) as server:
        with Client(server.address, token="a") as a, Client(server.address, token="b") as b:
            for client in (a, b):
                client.generate("something to remember " * 4, max_tokens=1, timeout=10)
            write(path, entry("b"))
            reload(server)
            write(path, entry("a"), entry("b"))
            reload(server)
            assert a.lookup("something to remember " * 4, timeout=10).cached_tokens == 0
            assert b.lookup("something to remember " * 4, timeout=10).cached_tokens > 0
        server.check()


def reload(server: RunningServer) -> None:
    asyncio.run_coroutine_threadsafe(server.server.reload_tenants(), server.loop).result(30)


def test_a_token_that_is_taken_out_ends_a_stream_of_requests(tmp_path: Path) -> None:
    """What came before is answered; the next message is refused like a new call."""
    path = tmp_path / "tenants.toml"
    messages: queue.SimpleQueue[cache_pb2.WarmRequest] = queue.SimpleQueue()
    one = cache_pb2.WarmRequest(prompt=prompt_pb2.Prompt(text="x"))
    with (
        RunningServer(PaperEngine(), tenants=write(path, entry("a", "old"))) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        call: Any = cache_pb2_grpc.CacheServiceStub(channel).Warm
        answers = call(iter(messages.get, None), metadata=(("authorization", "Bearer old"),), timeout=20)
        messages.put(one)
        assert next(answers).state == cache_pb2.WARM_STATE_COMPUTED
        write(path, entry("a", "new"))
        reload(server)
        messages.put(one)
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED


def test_sighup_reads_the_file_again(tmp_path: Path) -> None:
    """As operators expect of a server; it goes on."""
    program = """
import asyncio, sys
from engine.config import load
from engine.server import serve
from tests.engine.serving import PaperEngine
sys.exit(asyncio.run(serve(load(port=0, tenants=sys.argv[1]), PaperEngine())))
"""
    path = write(tmp_path / "tenants.toml", entry("a"))
    process = subprocess.Popen(
        [sys.executable, "-c", program, path], stderr=subprocess.PIPE, text=True, env={"PYTHONPATH": "."}
    )
    assert process.stderr is not None
    try:
        next(line for line in process.stderr if "serving " in line)
        process.send_signal(signal.SIGHUP)
        assert "the file of tenants was read again" in next(line for line in process.stderr if "tenants" in line)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


def test_a_file_of_no_use_prevents_the_start(tmp_path: Path) -> None:
    """Before anything is loaded or served."""
    file = write(tmp_path / "tenants.toml", "[tenants.a]")
    with pytest.raises(InvalidArgument, match="neither tokens nor certificates"), RunningServer(tenants=file):
        pass


# A safe way for tokens


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tenants": "x", "host": "0.0.0.0"}, "tokens would cross the network unencrypted to 0.0.0.0: give tls_cert"),
        ({"tenants": "x", "host": "::"}, "tokens would cross the network unencrypted"),
        ({"tenants": "x", "host": "example.com"}, "tokens would cross the network unencrypted"),
        ({"tls_certificate": "x"}, "tls_certificate and tls_key belong together"),
        ({"tls_key": "x"}, "tls_certificate and tls_key belong together"),
        ({"tls_client_ca": "x"}, "tls_client_ca needs TLS"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, str], words: str) -> None:
    """Above all tokens that anybody on the way could read."""
    with pytest.raises(InvalidArgument, match=words):
        load({}, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"host": "127.0.0.1"},
        {"host": "localhost"},
        {"host": "::1"},
        {"host": "0.0.0.0", "allow_plaintext": True},
        {"host": "0.0.0.0", "tls_certificate": "x", "tls_key": "y"},
    ],
)
def test_tokens_may_stay_here_or_be_encrypted_or_be_allowed(options: dict[str, object]) -> None:
    """On this machine, under TLS, or by a word of the operator."""
    assert load({}, tenants="x", **options).tenants == "x"


@pytest.mark.parametrize("target", ["192.0.2.1:5", "example.com:5", "dns:///example.com:5", "[2001:db8::1]:5"])
def test_a_client_does_not_send_a_token_unencrypted_by_accident(target: str) -> None:
    """To another machine it takes TLS, or a word that it may."""
    with pytest.raises(InvalidArgument, match=r"the token would cross the network to .* unencrypted"):
        Client(target, token="x")
    Client(target, token="x", tls=False).close()
    Client(target, token="x", tls=True).close()


@pytest.mark.parametrize("target", ["127.0.0.1:5", "localhost:5", "[::1]:5", "ipv4:127.0.0.1:5", "unix:/tmp/x"])
def test_a_token_needs_no_tls_on_this_machine(target: str) -> None:
    """Nothing crosses a network."""
    Client(target, token="x").close()


@pytest.mark.parametrize("token", ["a b", "a\n", "ä", '"a\x00'])
def test_a_token_that_cannot_be_one_is_refused_before_it_is_sent(token: str) -> None:
    """A line break that was copied along gets a message about that, not a failed call."""
    with pytest.raises(InvalidArgument, match="the token has characters that no token has") as caught:
        Client("127.0.0.1:5", token=token)
    assert token not in str(caught.value)


# Quotas


def test_requests_in_flight_are_limited_per_tenant(tmp_path: Path) -> None:
    """One more is refused with a time to come back, another tenant is not, and who ends makes room."""
    runner = GatedRunner()
    file = write(tmp_path / "tenants.toml", entry("a", max_in_flight="2"), entry("b"))
    with (
        RunningServer(PaperEngine(runner=runner), tenants=file) as server,
        runner,
        Client(server.address, token="a") as a,
        Client(server.address, token="b") as b,
    ):
        streams = [a.stream(f"{number}", max_tokens=2) for number in range(2)]
        server.wait_until_active(2)
        with pytest.raises(ResourceExhausted, match="you have 2 requests in flight, the most you may have") as caught:
            a.generate("one more")
        assert caught.value.retry_after == 1.0
        other = b.stream("mine", max_tokens=2)
        server.wait_until_active(3)
        runner.open()
        assert all(stream.result().usage.completion_tokens == 2 for stream in [*streams, other])
        assert a.generate("one more", max_tokens=1, timeout=10).usage.completion_tokens == 1


def test_computed_tokens_are_limited_and_cached_ones_are_free(tmp_path: Path) -> None:
    """A tenant that has used its minute is refused until it is paid; what is cached costs nothing."""
    file = write(tmp_path / "tenants.toml", entry("a", tokens_per_minute="60"), entry("b"))
    with (
        RunningServer(PaperEngine(), tenants=file) as server,
        Client(server.address, token="a") as a,
        Client(server.address, token="b") as b,
    ):
        long = list(range(50))
        for _ in range(4):  # 50 computed once, then 1; and 1 generated each time
            a.generate(long, max_tokens=1, timeout=10)
        a.generate([*range(100, 200)], max_tokens=1, timeout=10)  # begins with something left, ends in debt
        with pytest.raises(ResourceExhausted, match=r"used your 60 computed tokens per minute .* are free") as caught:
            a.generate(long, max_tokens=1, timeout=10)
        assert caught.value.retry_after is not None
        assert 90 < caught.value.retry_after <= 101
        assert b.generate(long, max_tokens=1, timeout=10).usage.computed_tokens == 50


def test_retry_information_is_google_rpc(tmp_path: Path) -> None:
    """Other clients find it where the standard puts it."""
    file = write(tmp_path / "tenants.toml", entry("a", tokens_per_minute="1"))
    metadata = (("authorization", "Bearer a"),)
    request = generation_pb2.GenerateRequest(prompt=prompt_pb2.Prompt(text="x"))
    with RunningServer(PaperEngine(), tenants=file) as server, grpc.insecure_channel(server.address) as channel:
        generate = generation_pb2_grpc.GenerationServiceStub(channel).Generate
        list(generate(request, metadata=metadata, timeout=10))
        with pytest.raises(grpc.RpcError) as caught:
            list(generate(request, metadata=metadata, timeout=10))
    error: Any = caught.value
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    info = error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert info.retry_delay.seconds > 60


def test_a_request_that_is_not_read_is_paid_for(tmp_path: Path) -> None:
    """Leaving early saves the tokens that were not computed yet, not those that were."""
    file = write(tmp_path / "tenants.toml", entry("a", tokens_per_minute="1000"))
    with RunningServer(PaperEngine(), tenants=file) as server, Client(server.address, token="a") as a:
        with a.stream("never read", max_tokens=1900):
            server.wait_until_active()
            while server.stats().totals.generated_tokens < 1200:
                threading.Event().wait(0.005)
        server.wait_until_idle()
        while not refused(a):  # the server learns a little later that the caller has left
            pass


def refused(client: Client) -> bool:
    try:
        client.generate("x", max_tokens=1, timeout=10)
    except ResourceExhausted:
        return True
    return False


def test_the_blocks_a_tenant_may_have_cached_follow_the_file(tmp_path: Path) -> None:
    """At the start and when the file changes; a share is one of the whole pool."""
    path = tmp_path / "tenants.toml"
    file = write(path, entry("a", max_blocks="4"), entry("b", max_blocks='"50%"'), entry("c"))
    with RunningServer(PaperEngine(blocks=100), tenants=file) as server:

        def limits() -> list[int | None]:
            cache = server.server.front.engine.loop.call(
                lambda scheduler: [scheduler.cache.stats(name).limit for name in "abc"]
            )
            return cache.result(10)

        assert limits() == [4, 50, None]
        with Client(server.address, token="a") as a, Client(server.address, token="c") as c:
            for client in (a, c):
                client.generate(list(range(160)), max_tokens=1, timeout=10)
            assert a.lookup(list(range(160)), timeout=10).cached_tokens == 64
            assert c.lookup(list(range(160)), timeout=10).cached_tokens == 159
        write(path, entry("a"), entry("b", max_blocks="7"), entry("c", max_blocks='"1%"'))
        reload(server)
        assert limits() == [None, 7, 1]
        server.check()
