"""`prefixcache route`, as a process: it starts, serves whoever comes, and ends in order."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from prefixcache.channel import TLS
from prefixcache.cli import app
from prefixcache.client import Client
from prefixcache.errors import Unavailable
from tests.engine.authority import Authority
from tests.engine.serving import GatedRunner, PaperEngine, RunningServer
from tests.redis import RedisServer
from tests.serving import command, environment, free_port
from tests.waiting import until


class Routing:
    """A gateway in a process of its own, with its log."""

    def __init__(self, log: Path, *options: str) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self._log = log
        arguments = ("route", "--port", self.address.rpartition(":")[2], "--log-format", "text", *options)
        with log.open("wb") as output:
            self.process = subprocess.Popen(command(*arguments), env=environment(), stderr=output)

    def log(self) -> str:
        return self._log.read_text()


@contextlib.contextmanager
def routing(folder: Path, *options: str, tls: TLS | None = None) -> Iterator[Routing]:
    """Run it until it serves."""
    running = Routing(folder / "log", *options)
    try:
        with Client(running.address, token="", tls=tls or False) as client:
            client.wait_until_ready(timeout=30)
        yield running
    finally:
        running.process.kill()
        running.process.wait()


def run(*arguments: str, **variables: str) -> Result:
    result = CliRunner().invoke(app, list(arguments), env={"PREFIXCACHE_REDIS": None, **variables})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def words(text: str) -> str:
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def test_replicas_in_redis_are_behind_one_address(tmp_path: Path) -> None:
    """Found by the URL; every command works through it, on one replica by name if wanted; a signal ends it."""
    with (
        RedisServer() as redis,
        RunningServer(PaperEngine(), replica_id="a", redis=redis.url),
        RunningServer(PaperEngine(), replica_id="b", redis=redis.url),
        routing(tmp_path, "--redis", redis.url) as gateway,
    ):
        until(lambda: "replica b serves" in gateway.log() and "replica a serves" in gateway.log(), "both")
        address = ("--address", gateway.address)
        done = run("generate", "x y z", "--max-tokens", "2", "--json", *address)
        assert done.exit_code == 0, done.stderr
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text('"a prompt"\n"another prompt"\n')
        done = run("warm", str(prompts), "--replicas", "all", *address)
        assert (done.exit_code, done.stdout[:19]) == (0, "2 prompts: 2 comput")
        for name in ("a", "b"):
            done = run("lookup", "a prompt", "--replica", name, *address)
            assert done.stdout.startswith("8 of 9 prompt tokens are cached")
        done = run("events", "--count", "1", "--replica", "a", *address)
        assert done.exit_code == 0, done.stderr
        done = run("stats", "--replica", "nobody", *address)
        assert (done.exit_code, "there is no replica 'nobody' here" in words(done.stderr)) == (1, True)
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(20) == 0
        assert gateway.log().rstrip().endswith("shut down")


def test_calls_in_progress_may_finish(tmp_path: Path) -> None:
    """The first signal lets them, and refuses new ones."""
    runner = GatedRunner()
    with (
        RunningServer(PaperEngine(runner=runner)) as replica,
        runner,
        routing(tmp_path, "--replica", replica.address) as gateway,
        Client(gateway.address) as client,
    ):
        stream = client.stream("x", max_tokens=3)
        replica.wait_until_active(1)
        gateway.process.send_signal(signal.SIGINT)
        until(lambda: "shutting down: 1 calls may go on for 30 seconds" in gateway.log(), "the first signal")
        with pytest.raises(Unavailable):
            client.generate("y", timeout=10)
        runner.open()
        assert stream.result().usage.completion_tokens == 3
        assert gateway.process.wait(20) == 0


def test_both_ways_are_encrypted(tmp_path: Path) -> None:
    """To the gateway with its certificate, from there with whom it trusts."""
    authority = Authority(tmp_path)
    own = authority.server()
    files = ("--tls-certificate", str(own.certificate), "--tls-key", str(own.key))
    with (
        RunningServer(PaperEngine(), tls_certificate=str(own.certificate), tls_key=str(own.key)) as replica,
        routing(
            tmp_path, "--replica", replica.address, *files, "--ca", str(authority.tls().ca), tls=authority.tls()
        ) as gateway,
        Client(gateway.address, tls=authority.tls()) as client,
    ):
        assert client.generate("x", max_tokens=1, timeout=10).replica == replica.address


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "say where the replicas are"),
        (("--replica", "nowhere"), "'nowhere' has no port"),
        (("--replica", "a:1", "--policy", "best"), "there is no policy 'best'; there are prefix"),
        (("--replica", "a:1", "--group", "x"), "is no group of replicas"),
        (("--replica", "a:1", "--tls-key", "x"), "belong together: give both"),
        (("--replica", "a:1", "--tls-key", "x", "--tls-certificate", "y"), "tls_certificate y and tls_key x are of no"),
        (("--replica", "a:1", "--ca", "/nowhere"), "does not exist"),
    ],
)
def test_options_of_no_use_are_named(options: tuple[str, ...], message: str) -> None:
    """Exit code 2, nothing is started."""
    done = run("route", *options, COLUMNS="300")
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in words(done.stderr)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--redis", "http://x"), 2, "is no URL of a Redis"),
        (("--replica", "127.0.0.1:1", "--port", "TAKEN"), 1, "is another server running there? Choose another --port"),
    ],
)
def test_what_cannot_be_started_ends_with_one_line(options: tuple[str, ...], code: int, message: str) -> None:
    """No traceback; a mistake in an option is told from what this machine cannot do."""
    with RunningServer(PaperEngine()) as other:
        taken = other.address.rpartition(":")[2]
        arguments = [taken if option == "TAKEN" else option for option in options]
        done = subprocess.run(
            command("route", *arguments),
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == code
    assert message in words(done.stderr)
    assert "Traceback" not in done.stderr
