"""From a URL to a Redis: limited users, TLS, Cluster and Sentinel, each a real one."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from prefixcache.errors import InvalidArgument
from prefixcache.hints.connection import NoHints, open_redis, shown
from prefixcache.hints.locator import Locator
from tests.engine.authority import Authority
from tests.prefixcache.replica import GROUP, Replica, chain
from tests.redis import Line, RedisServer, Sentinel
from tests.serving import ROOT, free_port
from tests.waiting import until

PATIENT = 10.0


async def found(url: str, **options: str) -> dict[str, int]:
    """Return what a reader finds of `chain(1)`."""
    reader = Locator(url, timeout=PATIENT, **options)
    try:
        assert await reader.groups() == [GROUP]
        return await reader.find(GROUP, chain(1), await reader.leases(GROUP))
    finally:
        await reader.close()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "no URL"),
        ("localhost:6379", "no URL"),
        ("http://localhost", "no URL"),
        ("redis+other://localhost", "no URL"),
        ("redis://", "no host"),
        ("redis://localhost:99999", "no valid port"),
        ("redis://localhost:x", "no valid port"),
        ("redis://localhost/one", "number of a database"),
        ("redis://one,two", "several hosts"),
        ("redis://localhost?timeout=3", "not known"),
        ("redis://localhost?ssl_ca_certs=ca.pem", "need rediss://"),
        ("rediss://localhost?ssl_ca_certs=/no/such/file", "not a file"),
        ("rediss://localhost?ssl_check_hostname=maybe", "true or false"),
        ("unix://socket", "does not name a socket"),
        ("redis+cluster://localhost/1", "only one"),
        ("redis+sentinel://localhost", "which service"),
        ("redis://:sec?ret@localhost", "percent-encode"),
    ],
)
def test_a_url_of_no_use_is_refused(url: str, words: str) -> None:
    """At once, and with what is wrong with it."""
    with pytest.raises(InvalidArgument, match=re.escape(words)):
        open_redis(url, timeout=1)


@pytest.mark.parametrize(
    "url",
    [
        "redis://me:secret@localhost/x",
        "redis://:secret@localhost/x",
        "redis://me:secret/with@signs@localhost/x",
        "redis://me:secret?no=1@localhost",
        "rediss://me:secret@localhost?nothing=1",
        "redis+sentinel://localhost?sentinel_password=secret",
        "secret",
        "nonsense://:secret@localhost",
    ],
)
def test_passwords_are_not_shown(url: str) -> None:
    """Neither in messages nor in what goes into logs."""
    assert "secret" not in shown(url)
    with pytest.raises(InvalidArgument) as caught:
        open_redis(url, timeout=1)
    assert "secret" not in str(caught.value)


def test_a_url_is_shown_as_far_as_it_is_no_secret() -> None:
    """So that one sees which Redis is meant."""
    assert shown("rediss://me:secret@example.com:6380/1?ssl_ca_certs=ca.pem") == "rediss://me:***@example.com:6380/1"
    assert shown("redis+cluster://one:1,[::1]:2") == "redis+cluster://one:1,[::1]:2"
    assert shown("unix:///run/redis.sock") == "unix:///run/redis.sock"


async def test_a_url_names_user_password_and_database() -> None:
    """Percent-encoded; what is given beside the URL is stronger."""
    with RedisServer() as server, server.client() as client:
        client.acl_setuser("me&you", enabled=True, passwords=["+p@ss/word?"], commands=["+@all"], keys=["*"])
        url = f"redis://me%26you:p%40ss%2Fword%3F@127.0.0.1:{server.port}/3"
        with Replica(url) as replica:
            replica.store(chain(1))
            until(lambda: replica.publisher.status.blocks)
            assert await found(url) == {"a": 300}
            assert client.keys() == []
            with redis.Redis(port=server.port, db=3) as third:
                assert len(third.keys()) == 3
            with pytest.raises(NoHints, match="refuses this user name"):
                await found(url, password="other")


async def test_a_unix_socket_will_do(tmp_path: Path) -> None:
    """For a Redis on the same machine."""
    socket = tmp_path / "redis.sock"
    with RedisServer("--unixsocket", str(socket)):
        until(socket.exists)
        with Replica(f"unix://{socket}") as replica:
            replica.store(chain(1))
            until(lambda: replica.publisher.status.blocks)
            assert await found(f"unix://{socket}") == {"a": 300}


# A user who may do no more than is needed


def acl_line() -> str:
    """Return the ACL line that the documentation gives."""
    page = (ROOT / "docs" / "redis.md").read_text()
    line = re.search(r"^(user prefixcache .*)$", page, re.MULTILINE)
    assert line is not None
    return line[1]


async def test_the_documented_user_can_do_all_that_is_needed(tmp_path: Path) -> None:
    """Publish, renew, leave and find, with exactly the line of docs/redis.md; and nothing else."""
    users = tmp_path / "users.acl"
    users.write_text(f"user default on nopass ~* &* +@all\n{acl_line().replace('PASSWORD', 'secret')}\n")
    with RedisServer("--aclfile", str(users)) as server, server.client() as client:
        url = f"redis://prefixcache:secret@127.0.0.1:{server.port}"
        with Replica(url) as replica:
            replica.store(chain(1))
            until(lambda: replica.is_complete(client))
            assert await found(url) == {"a": 300}
            for happens in (client.flushall, client.script_flush):
                happens()
                replica.store(chain(2))
                until(lambda: replica.is_complete(client))
                replica.remove(chain(2))
        assert client.keys() == [b"prefixcache:groups"]
        assert client.acl_log() == []
        with redis.Redis(port=server.port, username="prefixcache", password="secret") as limited:
            for refused in (
                lambda: limited.set("prefixcache:x", "1"),
                lambda: limited.hgetall("other"),
                limited.flushall,
                limited.keys,
            ):
                with pytest.raises(redis.exceptions.NoPermissionError):
                    refused()


async def test_a_user_who_may_not_is_told_where_to_read() -> None:
    """The message has what Redis says and names the page with the ACL line."""
    with RedisServer() as server, server.client() as client:
        client.acl_setuser("poor", enabled=True, nopass=True, commands=["+get"], keys=["*"])
        url = f"redis://poor:any@127.0.0.1:{server.port}"
        with Replica(url) as replica:
            until(lambda: "docs/redis.md has the ACL line" in replica.publisher.status.error)
        reader = Locator(url, timeout=PATIENT)
        with pytest.raises(NoHints, match="evalsha"):
            await reader.leases(GROUP)
        await reader.close()


# TLS, Cluster, Sentinel


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


async def test_tls_with_an_authority_of_ones_own(authority: Authority) -> None:
    """Publishing and finding go through it; a certificate that is not trusted is said to be none."""
    signed = authority.server()
    with RedisServer() as server, Line(server.port, signed.certificate, signed.key) as line:
        url = f"rediss://127.0.0.1:{line.port}"
        trusting = f"{url}?ssl_ca_certs={authority.certificate}"
        with Replica(trusting) as replica:
            replica.store(chain(1))
            until(lambda: replica.publisher.status.blocks)
            assert await found(trusting) == {"a": 300}
            reader = Locator(url, timeout=PATIENT)
            with pytest.raises(NoHints, match="not trusted"):
                await reader.leases(GROUP)
            await reader.close()
            plain = Locator(f"redis://127.0.0.1:{line.port}", timeout=PATIENT)
            with pytest.raises(NoHints):
                await plain.leases(GROUP)
            await plain.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisServer]:
    port = next(port for port in iter(free_port, None) if port < 55_000)  # nodes talk on a port 10,000 above
    with RedisServer("--cluster-enabled", "yes", port=port) as server:
        server.cli("cluster", "addslots", *map(str, range(16384)))
        until(lambda: "cluster_state:ok" in server.cli("cluster", "info"))
        yield server


async def test_a_cluster_has_a_group_on_one_of_its_nodes(cluster: RedisServer) -> None:
    """A script may use all keys of a group together; any node may be named, and some that do not answer."""
    url = f"redis+cluster://127.0.0.1:1,127.0.0.1:{cluster.port}"
    with cluster.client() as client, Replica(url, "a") as a, Replica(url, "b") as b:
        a.store(chain(1))
        b.store(chain(1, 100))
        until(lambda: a.is_complete(client) and b.is_complete(client))
        assert await found(url) == {"a": 300, "b": 100}
        slots = {client.cluster("keyslot", key) for key in client.scan_iter() if key != b"prefixcache:groups"}
        assert len(slots) == 1


async def test_a_cluster_user_needs_no_more_than_documented(cluster: RedisServer) -> None:
    """The same line does, with what it has for asking which node has which slots."""
    cluster.cli("acl", "setuser", *acl_line().replace("PASSWORD", "secret").split()[1:])
    url = f"redis+cluster://prefixcache:secret@127.0.0.1:{cluster.port}"
    with cluster.client() as client, Replica(url, "c") as replica:
        replica.store(chain(1))
        until(lambda: replica.is_complete(client))
        assert await found(url) == {"c": 300}
        assert client.acl_log() == []


async def test_a_cluster_that_is_not_there_is_no_hints(cluster: RedisServer) -> None:
    """And the same for one that is a single Redis."""
    reader = Locator("redis+cluster://127.0.0.1:1", timeout=PATIENT)
    with pytest.raises(NoHints):
        await reader.leases(GROUP)
    await reader.close()
    with RedisServer() as single, Replica(f"redis+cluster://127.0.0.1:{single.port}") as replica:
        until(lambda: replica.publisher.status.error)


async def test_the_master_is_found_through_sentinels_also_after_a_failover() -> None:
    """Publishing goes on at the new one, with everything, and readers follow."""
    with contextlib.ExitStack() as running:
        first = running.enter_context(RedisServer("--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0"))
        second = running.enter_context(RedisServer("--replicaof", "127.0.0.1", str(first.port)))
        one, two = running.enter_context(first.client()), running.enter_context(second.client())
        until(lambda: two.info("replication")["master_link_status"] == "up")
        sentinel = running.enter_context(Sentinel(first.port))
        until(lambda: "slaves=1" in sentinel.cli("info", "sentinel"))
        replica = running.enter_context(Replica(sentinel.url))
        replica.store(chain(1))
        until(lambda: replica.is_complete(one))
        assert await found(sentinel.url) == {"a": 300}
        first.stop()

        def promoted() -> bool:
            with contextlib.suppress(redis.ConnectionError):  # Sentinel ends all connections when it promotes
                return bool(two.info("replication")["role"] == "master")
            return False

        until(promoted)
        replica.store(chain(2))
        until(lambda: replica.is_complete(two) and replica.publisher.status.current)
        assert await found(sentinel.url) == {"a": 300}


async def test_a_service_the_sentinels_do_not_know_is_said() -> None:
    """Or sentinels that are not there."""
    with RedisServer() as server, Sentinel(server.port) as sentinel:
        for url in (sentinel.url.replace("main", "other"), "redis+sentinel://127.0.0.1:1/main"):
            reader = Locator(url, timeout=PATIENT)
            with pytest.raises(NoHints, match="sentinels"):
                await reader.leases(GROUP)
            await reader.close()


def test_a_publisher_takes_no_url_of_no_use() -> None:
    """The engine can refuse to start then, which it does for nothing else about Redis."""
    with pytest.raises(InvalidArgument, match="number of a database"):
        Replica("redis://localhost/x")
