"""A server's hints, in a real Redis: what is published, what others find, and that nothing waits for it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.config import load
from prefixcache.cli import app
from prefixcache.client import Client
from prefixcache.errors import InvalidArgument
from prefixcache.hints import publisher
from prefixcache.hints.schema import Group
from prefixcache.local import LocalServer
from prefixcache.results import Lookup, ReplicaPrefix
from prefixcache.tokens import HASH_BYTES
from tests.engine.hinted import cached, leases, publishes_exactly, secret_file
from tests.engine.paper import generate
from tests.engine.serving import BLOCK, GatedRunner, PaperEngine, RunningServer
from tests.engine.tenancy import entry, write
from tests.redis import RedisServer
from tests.waiting import until

PROMPT = [(7 * number) % 251 for number in range(100)]  # 96 of them are whole blocks
NOBODY = "redis://127.0.0.1:1"


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with RedisServer() as redis:
        yield redis


# What is published


def test_what_is_published_is_what_is_cached(redis: RedisServer, tmp_path: Path) -> None:
    """Of all tenants and of what is published to them, whether it was stored, evicted, expired or invalidated."""
    tenants = write(tmp_path / "tenants.toml", entry("a"), entry("b"), entry("boss", admin="true"))
    with (
        RunningServer(
            PaperEngine(blocks=48), redis=redis.url, tenants=tenants, secret_file=secret_file(tmp_path)
        ) as server,
        Client(server.address, token="boss") as boss,
        Client(server.address, token="a") as a,
        Client(server.address, token="b") as b,
    ):

        def agrees(blocks: int) -> None:
            assert len(cached(server)) == blocks * HASH_BYTES
            until(lambda: publishes_exactly(redis, server))

        agrees(0)
        for client in (a, b):
            client.generate(PROMPT, max_tokens=1, namespace="notes")
        agrees(12)
        boss.pin(PROMPT[:64], "beginning", published=True)
        for client in (a, b):
            client.generate(PROMPT, max_tokens=1)
        agrees(12 + 4 + 2 * 2)
        a.generate([1, *PROMPT], max_tokens=1, ttl=0.001)
        agrees(20)
        a.invalidate(namespace="notes", whole_namespace=True)
        agrees(14)
        for number in range(20):
            b.generate([number, *PROMPT], max_tokens=1)
        assert server.stats().cache.evicted > 0
        until(lambda: publishes_exactly(redis, server))
        boss.unpin("beginning", published=True)
        for client in (a, b, boss):
            client.invalidate(everything=True)
        until(lambda: publishes_exactly(redis, server))
        server.check()


def test_watchers_of_events_and_redis_are_told_alike(redis: RedisServer) -> None:
    """Who begins to watch, and who leaves, takes nothing from what is published."""
    with RunningServer(PaperEngine(), redis=redis.url) as server, Client(server.address) as client:
        server.server.front.feed.kept_seconds = 0.0
        client.generate(PROMPT, max_tokens=1)
        with client.watch_events() as watch:
            hashes = set(next(watch).hashes)  # type: ignore[union-attr]  # the snapshot
            next(watch)
            client.generate([1, *PROMPT], max_tokens=1)
            while len(hashes) < 12:
                hashes |= set(next(watch).hashes)  # type: ignore[union-attr]  # stored
        until(lambda: not server.server.front.feed._channels)
        assert b"".join(sorted(hashes)) == b"".join(sorted(split(cached(server))))
        client.generate([2, *PROMPT], max_tokens=1)
        assert len(cached(server)) == 18 * HASH_BYTES
        until(lambda: publishes_exactly(redis, server))


def test_what_was_too_much_to_note_is_published_from_the_cache(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no room at all for changes, each has the engine asked for all that is stored, and nothing is missing."""
    monkeypatch.setattr(publisher, "BUFFER_BYTES", 0)
    with RunningServer(PaperEngine(blocks=48), redis=redis.url) as server, Client(server.address) as client:
        for number in range(12):
            client.generate([number, *PROMPT], max_tokens=1)
        assert server.stats().cache.evicted > 0
        until(lambda: publishes_exactly(redis, server))
        client.invalidate(everything=True)
        until(lambda: publishes_exactly(redis, server))
        server.check()


def test_the_lease_says_who_and_how_busy(redis: RedisServer) -> None:
    """Address, model and sizes; what waits and what runs; that it drains; and nothing once it has ended."""
    runner = GatedRunner()
    with (
        RunningServer(PaperEngine(runner=runner, max_running=1), redis=redis.url, replica_id="one") as server,
        runner,
        Client(server.address) as client,
    ):
        until(lambda: "one" in leases(redis))
        lease = leases(redis)["one"]
        assert (lease.address, lease.model, lease.block_size, lease.blocks) == (server.address, "paper", BLOCK, 256)
        streams = [client.stream(PROMPT, max_tokens=2, namespace="x")]
        until(lambda: leases(redis)["one"].load.running == 1)  # its first step has been put together
        streams += [client.stream(PROMPT, max_tokens=2, namespace=name) for name in ("y", "z")]
        server.wait_until_active(3)
        until(lambda: leases(redis)["one"].load.waiting == 2)
        load = leases(redis)["one"].load
        assert (load.running, load.waiting_tokens, load.cached) == (1, 100, 0)
        runner.permits.release()
        until(lambda: leases(redis)["one"].load.waiting_tokens == 200)
        load = leases(redis)["one"].load
        assert (load.running, load.waiting, load.free) == (1, 2, 249)
        runner.open()
        assert [stream.result().usage.completion_tokens for stream in streams] == [2, 2, 2]
        again = client.generate(PROMPT, max_tokens=2, namespace="x").usage
        until(lambda: leases(redis)["one"].load.prompt_tokens == 400)
        load = leases(redis)["one"].load
        assert (load.running, load.waiting, load.waiting_tokens, load.cached_tokens) == (0, 0, 0, again.cached_tokens)
        assert (load.cached, load.free) == (server.stats().cache.cached, server.stats().cache.free)
        assert not leases(redis)["one"].draining
        assert server.drain(1.0)
        until(lambda: leases(redis)["one"].draining)
    assert leases(redis) == {}


def test_what_waits_counts_without_what_is_cached(redis: RedisServer) -> None:
    """A queue of prompts that are cached but for their ends is a short one."""
    runner = GatedRunner()
    with (
        RunningServer(PaperEngine(runner=runner, max_running=1), redis=redis.url, replica_id="one") as server,
        runner,
        Client(server.address) as client,
    ):
        first = client.stream(PROMPT, max_tokens=1)
        runner.permits.release()
        first.result()
        streams = [client.stream([*PROMPT[:96], *[number] * 10], max_tokens=2) for number in range(4)]
        server.wait_until_active(4)
        runner.permits.release()
        until(lambda: leases(redis)["one"].load.waiting_tokens == 30)
        assert leases(redis)["one"].load.waiting == 3
        for stream in streams:
            stream.close()
        runner.open()


# What others find


def test_servers_see_each_other_in_lookups(redis: RedisServer) -> None:
    """Who holds how much of a prompt, longest first, without oneself and those that hold nothing."""
    with ExitStack() as exits:
        servers = [
            exits.enter_context(RunningServer(PaperEngine(), redis=redis.url, replica_id=name)) for name in "abcd"
        ]
        clients = [exits.enter_context(Client(server.address)) for server in servers]
        for client, length in zip(clients[:3], (40, 100, 20), strict=True):
            client.generate(PROMPT[:length], max_tokens=1)
        expected = [ReplicaPrefix("b", servers[1].address, 96), ReplicaPrefix("c", servers[2].address, 16)]
        found = looked_up(clients[0], lambda found: len(found.elsewhere) == 2)
        assert list(found.elsewhere) == expected
        assert found.cached_tokens == 40
        holders = looked_up(clients[3], lambda found: len(found.elsewhere) == 3).elsewhere
        assert list(holders) == [expected[0], ReplicaPrefix("a", servers[0].address, 32), expected[1]]
        assert clients[0].lookup(PROMPT, namespace="other").elsewhere == ()
        clients[1].invalidate(everything=True)
        looked_up(clients[0], lambda found: [holder.replica_id for holder in found.elsewhere] == ["c"])


def test_commands_show_the_others(redis: RedisServer) -> None:
    """lookup, why and stats say it in a line, and --json in full."""
    text = "The harbour opens at six. " * 8
    with (
        RunningServer(PaperEngine(), redis=redis.url, replica_id="here") as here,
        RunningServer(PaperEngine(), redis=redis.url, replica_id="there") as there,
        Client(here.address) as asked,
        Client(there.address) as client,
    ):
        client.generate(text, max_tokens=1)
        looked_up(asked, lambda found: bool(found.elsewhere), text)
        line = f"eplica there at {there.address} holds 208 of the {len(text) + 1}"
        run = CliRunner()
        assert line in run.invoke(app, ["lookup", text, "--address", here.address]).stdout
        assert line in run.invoke(app, ["why", "-", "--address", here.address], input=text).stdout
        for command in ("lookup", "why"):
            arguments = [command, "-", "--json", "--address", here.address]
            found = f'"elsewhere": [{{"replica_id": "there", "address": "{there.address}", "cached_tokens": 208}}]'
            assert found in run.invoke(app, arguments, input=text).stdout
        until(lambda: (hints := client.stats().hints) is not None and hints.current and hints.blocks == 13)
        shown = " ".join(run.invoke(app, ["stats", "--address", there.address]).stdout.split())
        assert "hints 13 blocks known to others as there; current" in shown


def test_statistics_of_hints_are_for_administrators(redis: RedisServer, tmp_path: Path) -> None:
    """A tenant is not told; without Redis there is nothing to tell."""
    tenants = write(tmp_path / "tenants.toml", entry("a"), entry("boss", admin="true"))
    options = {"redis": redis.url, "tenants": tenants, "secret_file": secret_file(tmp_path), "replica_id": "one"}
    with (
        RunningServer(PaperEngine(), **options) as server,
        Client(server.address, token="a") as a,
        Client(server.address, token="boss") as boss,
    ):
        hints = boss.stats().hints
        assert hints is not None and hints.replica_id == "one"
        assert a.stats().hints is None
    with RunningServer(PaperEngine()) as server, Client(server.address) as client:
        assert client.stats().hints is None


def test_deployments_with_other_secrets_share_no_hash(redis: RedisServer, tmp_path: Path) -> None:
    """Neither finds the other's blocks; with the same secret both do."""
    with ExitStack() as exits:
        servers = []
        for name, secret in (("a", "the first secret of all"), ("b", "the second secret of all")):
            options = {"redis": redis.url, "replica_id": name, "secret_file": secret_file(tmp_path, secret)}
            servers.append(exits.enter_context(RunningServer(PaperEngine(), **options)))
        same = exits.enter_context(RunningServer(PaperEngine(), **{**options, "replica_id": "c"}))
        for server in (*servers, same):
            client = exits.enter_context(Client(server.address))
            client.generate(PROMPT, max_tokens=1)
            until(lambda server=server: publishes_exactly(redis, server))  # type: ignore[misc]
        hashes = [set(split(cached(server))) for server in (*servers, same)]
        assert len(hashes[0]) == 6
        assert not hashes[0] & hashes[1] and hashes[1] == hashes[2]
        found = looked_up(client, lambda found: bool(found.elsewhere))
        assert [holder.replica_id for holder in found.elsewhere] == ["b"]


# What happens when Redis does not do its part


@pytest.mark.parametrize("broken", ["refused", "password", "killed", "paused"])
def test_requests_are_answered_the_same_without_redis(redis: RedisServer, broken: str) -> None:
    """From the start or in between: what is generated and cached is the same, and lookups know of nobody."""
    url = {"refused": NOBODY, "password": redis.url.replace("//", "//somebody:wrong@")}.get(broken, redis.url)
    with RunningServer(PaperEngine(), redis=url) as server, Client(server.address) as client:
        if broken in ("killed", "paused"):
            client.generate(PROMPT, max_tokens=1)
            until(lambda: publishes_exactly(redis, server))
            redis.stop() if broken == "killed" else redis.pause()
        with ThreadPoolExecutor(8) as pool:
            prompts = [[number, *PROMPT] for number in range(24)]
            answers = list(pool.map(lambda prompt: client.generate(prompt, max_tokens=9, timeout=60), prompts))
        assert [answer.token_ids for answer in answers] == [generate(prompt, 9, 256) for prompt in prompts]
        found = client.lookup(prompts[0], timeout=20)
        assert (found.cached_tokens, found.elsewhere) == (100, ())
        if broken != "paused":
            until(lambda: (hints := client.stats().hints) is not None and hints.error != "")
        server.check()


def test_all_is_known_again_when_redis_is_back(redis: RedisServer) -> None:
    """A Redis that was restarted empty, or did not answer for a while, learns what was stored meanwhile."""
    with RunningServer(PaperEngine(), redis=redis.url) as server, Client(server.address) as client:
        client.generate(PROMPT, max_tokens=1)
        until(lambda: publishes_exactly(redis, server))
        for number, (harm, repair) in enumerate(((redis.stop, redis.start), (redis.pause, redis.resume))):
            harm()
            client.generate([number, *PROMPT], max_tokens=1)
            repair()
            until(lambda: publishes_exactly(redis, server))
        assert len(cached(server)) == 18 * HASH_BYTES


def test_a_server_ends_while_redis_does_not_answer(redis: RedisServer) -> None:
    """Its callers are answered first; nothing waits for Redis for long."""
    server = RunningServer(PaperEngine(), redis=redis.url)
    with server, Client(server.address) as client:
        until(lambda: publishes_exactly(redis, server))
        redis.pause()
        assert client.generate(PROMPT, max_tokens=2).token_ids == generate(PROMPT, 2, 256)


def test_a_process_that_is_told_to_end_leaves_redis(tmp_path: Path) -> None:
    """SIGTERM takes lease and table away at once; no password is in the log."""
    with RedisServer("--requirepass", "open-sesame") as redis:
        url = redis.url.replace("//", "//:open-sesame@")
        options = ("--model", "embedded", "--cache-memory", "16MiB", "--replica-id", "one", "--redis", url)
        with LocalServer(*options, "--secret-file", secret_file(tmp_path)) as server, Client(server.address) as client:
            client.generate("What is told to Redis?", max_tokens=1)
            model = client.model()
            group = Group("main", model.fingerprint, model.block_size)

            def keys() -> str:
                return redis.cli("--no-auth-warning", "-a", "open-sesame", "keys", "*")

            until(lambda: f"{{{group}}}:blocks:one:" in keys())
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(30)
            assert f"{{{group}}}" not in keys()
            log = server.log()
        assert "open-sesame" not in log and "one" in log


# Options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"redis": "redis://h", "host": "0.0.0.0"}, "0.0.0.0 does not say: give advertise"),
        ({"redis": "redis://h", "tenants": "t.toml"}, "redis needs secret_file: without a secret"),
        ({"advertise": "h:1"}, "give redis as well, or neither"),
        ({"redis": "redis://h", "advertise": "h"}, "option advertise cannot be 'h': give host:port"),
        ({"redis": "redis://h", "advertise": "h:0"}, "give host:port"),
        ({"redis": "redis://h", "advertise": "h:70000"}, "give host:port"),
        ({"replica_id": "a b"}, "replica_id is 'a b'; it must be 1 to 64 letters"),
        ({"deployment": "a:b"}, "deployment is 'a:b'; it must be"),
        ({"redis_prefix": "a{b}"}, "without spaces and braces"),
        ({"redis_prefix": ""}, "it must be 1 to 64"),
        ({"lease_seconds": 1}, "option lease_seconds cannot be 1"),
        ({"lease_seconds": 301}, "option lease_seconds cannot be 301"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object], words: str) -> None:
    """With the reason, before anything is loaded."""
    with pytest.raises(InvalidArgument, match=words):
        load({}, **options)


def test_a_server_that_others_can_reach_says_how() -> None:
    """With --advertise it may listen anywhere, with a name in front of the port or an address in brackets."""
    for address in ("engine-3.example:50051", "10.0.0.7:1", "[fd00::7]:65535"):
        assert load({}, redis="redis://h", host="0.0.0.0", advertise=address).advertise == address


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read: No such file"), ("short", "has 5 bytes and could be guessed"), (" \n", "has 0 bytes")],
)
def test_a_secret_of_no_use_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    """Missing, empty or short: the server does not start."""
    path = tmp_path / "secret"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidArgument, match=words), RunningServer(PaperEngine(), secret_file=str(path)):
        pass


@pytest.mark.parametrize("url", ["localhost:6379", "http://:open-sesame@localhost", "redis://:open-sesame@localhost:x"])
def test_a_url_of_no_use_is_refused(url: str) -> None:
    """Before the model is loaded, and without the password."""
    with pytest.raises(InvalidArgument) as caught, RunningServer(PaperEngine(), redis=url):
        pass
    assert "open-sesame" not in str(caught.value)


def test_what_is_unsafe_about_a_secret_is_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that others can read, and none at all while hashes are published."""
    path = Path(secret_file(tmp_path))
    path.chmod(0o644)
    with RunningServer(PaperEngine(), secret_file=str(path)):
        pass
    assert "everybody on this machine may read the secret of the deployment: chmod 600" in capsys.readouterr().out
    with RunningServer(PaperEngine(), redis=NOBODY):
        pass
    assert "hashes in Redis have no secret" in capsys.readouterr().out


def looked_up(client: Client, condition: Callable[[Lookup], bool], prompt: str | list[int] = PROMPT) -> Lookup:
    """Look a prompt up until what is found is as it should be."""
    last: list[Lookup] = []

    def holds() -> bool:
        last[:] = [client.lookup(prompt, timeout=20)]
        return condition(last[0])

    until(holds)
    return last[0]


def split(hashes: bytes) -> list[bytes]:
    return [hashes[start : start + HASH_BYTES] for start in range(0, len(hashes), HASH_BYTES)]
