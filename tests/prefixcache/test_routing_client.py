"""Clients that choose among replicas themselves."""

from __future__ import annotations

import asyncio
import contextlib
import glob
import os
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefixcache.client import AsyncClient, AsyncRoutingClient, Client, RoutingClient
from prefixcache.errors import Cancelled, InvalidArgument, NotFound, Unauthenticated, Unavailable
from tests.engine.authority import Authority
from tests.engine.hinted import leases
from tests.engine.paper import generate
from tests.engine.serving import PaperEngine, RunningServer
from tests.engine.tenancy import entry, write
from tests.redis import RedisServer
from tests.serving import environment, free_port
from tests.waiting import until


@contextlib.contextmanager
def replicas(names: str, **options: Any) -> Iterator[list[RunningServer]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(RunningServer(PaperEngine(), replica_id=name, **options)) for name in names]


@pytest.fixture(scope="module")
def two() -> Iterator[list[str]]:
    """The addresses of two replicas."""
    with replicas("ab") as servers:
        yield [server.address for server in servers]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "routing"]


def test_it_does_what_a_client_does(two: list[str]) -> None:
    """A prompt goes where it was, and every method is there."""
    prompt = list(range(60))
    with RoutingClient(replicas=two) as client:
        client.wait_until_ready(timeout=10)
        answers = [client.generate(prompt, max_tokens=3, timeout=10) for _ in range(3)]
        assert len({answer.replica for answer in answers}) == 1
        assert [answer.token_ids for answer in answers] == 3 * [generate(prompt, 3, 256)]
        assert answers[-1].usage.cached_tokens == 59
        assert client.lookup(prompt, timeout=10).cached_tokens == 59
        with client.warm(["warm"], replicas=2, timeout=10) as warming:
            assert [entry.replicas for entry in warming] == [2]
        assert client.stats(timeout=10).blocks.total == 2 * 256
        assert client.invalidate(everything=True, timeout=10).freed_blocks > 0
        with pytest.raises(NotFound, match="no pin"):
            client.unpin("none", timeout=10)


async def test_it_does_so_for_asyncio(two: list[str]) -> None:
    """Streams, too."""
    async with AsyncRoutingClient(replicas=two) as client:
        assert isinstance(client, AsyncClient)
        async with client.stream("some text", max_tokens=8, timeout=10) as stream:
            text = "".join([piece async for piece in stream])
        assert (await stream.result()).text == text
        assert (await client.model(timeout=10)).name == "paper"


def test_replicas_are_found_in_redis() -> None:
    """Nothing but its URL is needed."""
    with RedisServer() as redis, replicas("ab", redis=redis.url), RoutingClient(redis.url) as client:
        until(lambda: client.stats(timeout=10).blocks.total == 2 * 256, "both replicas")
        seen = {client.generate(f"{chr(65 + n)} question", max_tokens=1, timeout=10).replica for n in range(8)}
        assert seen == {"a", "b"}


def test_the_policy_can_be_chosen(two: list[str]) -> None:
    """In turn, here, whatever is cached where."""
    with RoutingClient(replicas=two, policy="round-robin") as client:
        seen = [client.generate("the same", max_tokens=1, timeout=10).replica for _ in range(4)]
        assert sorted(str(name) for name in seen) == ["a", "a", "b", "b"]


def test_a_token_goes_to_the_replicas(tmp_path: Path) -> None:
    """And nowhere else: it says who calls there."""
    tenants = write(tmp_path / "tenants.toml", entry("red"))
    with replicas("ab", tenants=tenants) as servers:
        addresses = [server.address for server in servers]
        with RoutingClient(replicas=addresses, token="red") as client:
            assert client.generate("x", max_tokens=1, timeout=10).usage.completion_tokens == 1
        with RoutingClient(replicas=addresses, token="blue") as client, pytest.raises(Unauthenticated):
            client.generate("x", timeout=10)


def test_the_way_to_the_replicas_is_encrypted(tmp_path: Path) -> None:
    """With whom the client trusts, and with nobody else."""
    authority = Authority(tmp_path)
    own = authority.server()
    with replicas("ab", tls_certificate=str(own.certificate), tls_key=str(own.key)) as servers:
        addresses = [server.address for server in servers]
        with RoutingClient(replicas=addresses, tls=authority.tls()) as client:
            assert client.generate("x", max_tokens=1, timeout=10).replica in ("a", "b")
        with RoutingClient(replicas=addresses) as client, pytest.raises(Unavailable):
            client.generate("x", timeout=10)


def test_a_token_does_not_cross_a_network_in_the_open() -> None:
    """Not to an address that is named, and not to one that Redis names."""
    with pytest.raises(InvalidArgument, match=r"the token would cross the network to 192\.0\.2\.1:5 unencrypted"):
        RoutingClient(replicas=["192.0.2.1:5"], token="secret")
    with RedisServer() as redis, replicas("a", redis=redis.url, advertise="192.0.2.1:5"):
        until(lambda: "a" in leases(redis), "its lease")
        with (
            RoutingClient(redis.url, token="secret") as client,
            pytest.raises(Unavailable, match="no replica can be used: the token would cross the network"),
        ):
            client.generate("x", timeout=10)
    assert not threads()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "say where the replicas are"),
        ({"replicas": ["nowhere"]}, "has no port"),
        ({"redis": "http://x"}, "is no URL of a Redis"),
        ({"replicas": ["a:1"], "policy": "best"}, "no policy 'best'"),
        ({"replicas": ["127.0.0.1:1"], "token": "two words"}, "characters that no token has"),
    ],
)
def test_what_cannot_be_used_is_said_at_once(settings: dict[str, Any], words: str) -> None:
    """By both clients, and nothing is left running."""
    for kind in (RoutingClient, AsyncRoutingClient):
        with pytest.raises(InvalidArgument, match=words):
            kind(**settings)
    assert not threads()


def test_closing_it_leaves_nothing(two: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread and no socket; what was in progress is cancelled. Only this user could have opened the socket."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    client = RoutingClient(replicas=two)
    (folder,) = tmp_path.iterdir()
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    assert threads() == ["routing"]
    stream = client.stream("x", max_tokens=1900, timeout=30)
    next(stream)
    stream.close()
    with pytest.raises(Cancelled):
        stream.result()
    client.close()
    client.close()
    assert not threads()
    assert list(tmp_path.iterdir()) == []


def test_a_long_way_to_temporary_files_is_no_obstacle(
    two: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of a socket must be short."""
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    before = set(glob.glob("/tmp/prefixcache-*"))
    with RoutingClient(replicas=two) as client:
        assert client.model(timeout=10).name == "paper"
    assert set(glob.glob("/tmp/prefixcache-*")) == before
    assert list(deep.iterdir()) == []


def test_nobody_answers() -> None:
    """The error is that of any client."""
    with RoutingClient(replicas=[f"127.0.0.1:{free_port()}"]) as client, pytest.raises(Unavailable):
        client.generate("x", timeout=10)


async def test_the_event_loop_is_not_held_up(two: list[str]) -> None:
    """Many at once, in one loop."""
    async with AsyncRoutingClient(replicas=two) as client:
        prompts = [[*range(20), number] for number in range(20)]
        answers = await asyncio.gather(*(client.generate(prompt, max_tokens=3, timeout=20) for prompt in prompts))
        assert [answer.token_ids for answer in answers] == [generate(prompt, 3, 256) for prompt in prompts]


MISSING = """
import sys
sys.modules[{missing!r}] = None
from prefixcache.client import RoutingClient
try:
    RoutingClient(redis="redis://127.0.0.1:1")
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("missing", ["redis", "structlog", "grpc_health", "grpc_reflection"])
def test_a_missing_dependency_is_named(missing: str) -> None:
    """With what installs it; a plain client needs none of them."""
    program = MISSING.format(missing=missing)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.startswith(f"FailedPrecondition a client that routes needs {missing}, which is not installed")
    assert "pip install 'prefixcache[route]'" in done.stdout


def test_a_client_has_no_other_names() -> None:
    """What the module makes up on request is no more than those two."""
    import prefixcache.client as module

    assert issubclass(module.RoutingClient, Client)
    with pytest.raises(AttributeError, match="has no attribute 'RoutedClient'"):
        module.RoutedClient  # type: ignore[attr-defined]  # noqa: B018
