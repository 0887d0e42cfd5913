"""`prefixcache replicas`: a table for people, JSON for machines, live on a terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner, Result

from prefixcache.cli import app
from prefixcache.client import Client
from tests.engine.serving import PaperEngine, RunningServer
from tests.prefixcache.test_cli import on_terminal
from tests.redis import RedisServer
from tests.serving import free_port
from tests.waiting import until


def run(*arguments: str, **variables: str) -> Result:
    result = CliRunner().invoke(app, ["replicas", *arguments], env={"PREFIXCACHE_REDIS": None, **variables})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def redis() -> Iterator[str]:
    """A Redis with two replicas, of which one has answered the same prompt twice."""
    with (
        RedisServer() as redis,
        RunningServer(PaperEngine(), replica_id="first", redis=redis.url, lease_seconds=2) as first,
        RunningServer(PaperEngine(), replica_id="second", redis=redis.url, lease_seconds=2),
        Client(first.address) as client,
    ):
        for _ in range(2):
            client.generate(list(range(161)), max_tokens=1, timeout=10)
        until(lambda: _lease(redis.url, "first")["published"] == 10, "a lease with the new figures")
        yield redis.url


def _lease(url: str, name: str) -> dict[str, object]:
    (group,) = json.loads(run("--redis", url, "--json").stdout)["groups"]
    return next(lease for lease in group["replicas"] if lease["replica_id"] == name)


def test_the_table(redis: str) -> None:
    """One line per replica under the name of their group, complete, also where there is no terminal."""
    done = run("--redis", redis)
    assert (done.exit_code, done.stderr) == (0, "")
    head, titles, _, first, second, *_ = done.stdout.splitlines()
    assert re.fullmatch(r"main:[0-9a-f]{16}:16  paper, 2 replicas", head.strip())
    assert titles.split()[:7] == ["replica", "address", "seen", "running", "waiting", "tokens", "used"]
    name, address, age, unit, running, waiting, tokens, used, blocks, published, rate = first.split()
    assert (name, unit, running, waiting, tokens, blocks, published) == ("first", "s", "0", "0", "0", "256", "10")
    assert address.startswith("127.0.0.1:") and 0 <= float(age) <= 2
    assert (used, rate) == ("4%", "50%")
    assert second.split()[0] == "second" and second.split()[-1] == "-"


def test_json_has_everything_but_the_nonce(redis: str) -> None:
    """What a lease says, and the rate of hits; null where nothing was asked yet."""
    lease = _lease(redis, "first")
    assert lease["blocks"] == 256 and lease["draining"] is False and lease["model"] == "paper"
    assert lease["hit_rate"] == pytest.approx(160 / 322)
    assert "nonce" not in lease
    assert _lease(redis, "second")["hit_rate"] is None


def test_only_what_is_named(redis: str) -> None:
    """A group, or a deployment; the URL may be in the environment."""
    name = json.loads(run("--json", PREFIXCACHE_REDIS=redis).stdout)["groups"][0]["group"]
    for options, count in (
        (("--group", name), 2),
        (("--group", "main:ab:16"), 0),
        (("--deployment", "main"), 2),
        (("--deployment", "other"), 0),
        (("--redis-prefix", "other:"), 0),
    ):
        groups = json.loads(run("--redis", redis, "--json", *options).stdout)["groups"]
        assert sum(len(group["replicas"]) for group in groups) == count


def test_on_a_terminal_it_goes_on(redis: str) -> None:
    """Until Ctrl+C; with --once it does not."""
    with on_terminal("replicas", "--redis", redis) as screen:
        screen.wait_for("first .* 256")
        screen.wait_for("Ctrl\\+C ends")
        screen.type("\x03")
        assert screen.wait_for_end() == 0
    with on_terminal("replicas", "--redis", redis, "--once") as screen:
        screen.wait_for("second")
        assert screen.wait_for_end() == 0


def test_nobody_is_there() -> None:
    """It says how to change that."""
    with RedisServer() as redis:
        done = run("--redis", redis.url)
        assert done.exit_code == 0
        assert done.stdout.startswith("no replica is registered: start one with `prefixcache serve --redis")
        assert json.loads(run("--redis", redis.url, "--json").stdout) == {"groups": []}


def test_mistakes_are_one_line() -> None:
    """No Redis named, one of no use, a group that is none, one that does not answer."""
    for options, code, message in (
        ((), 2, "say where the replicas are registered"),
        (("--redis", "http://x"), 1, "is no URL of a Redis"),
        (("--redis", "redis://127.0.0.1:1", "--group", "x"), 1, "is no group of replicas"),
        (("--redis", f"redis://127.0.0.1:{free_port()}"), 1, "Redis at redis://127.0.0.1:"),
    ):
        done = run(*options)
        assert (done.exit_code, done.stdout) == (code, "")
        assert message in " ".join(re.sub("[│]", " ", done.stderr).split())
