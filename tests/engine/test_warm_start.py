"""Servers that are warm from their first request: by a file of prompts, and by what an earlier one remembered."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.embedded.vocabulary import VOCAB_SIZE
from engine.remember import Remembered, read, write
from engine.tenants import ANONYMOUS, namespace_key
from engine.warm_start import KEPT_SECONDS
from prefixcache.client import Client
from prefixcache.errors import FailedPrecondition
from prefixcache.local import LocalServer
from prefixcache.tokens import pack, unpack
from tests import serving as processes
from tests.engine import tenancy
from tests.engine.serving import BLOCK, FINGERPRINT, GatedRunner, PaperEngine, RunningServer

NAMESPACE = namespace_key(ANONYMOUS, "")
VOCAB = 261
SERVING = health_pb2.HealthCheckResponse.SERVING


def prompt_of(number: int, length: int = 40) -> list[int]:
    return [number, *(position % 250 for position in range(length - 1))]


def lines(path: Path, *values: object) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def remembered(path: Path, *prompts: list[int], used: float | None = None, namespace: str = NAMESPACE) -> str:
    """A file as an earlier paper server writes it."""
    when = time.time() if used is None else used
    write(path, [Remembered(namespace, pack(prompt), when) for prompt in prompts], FINGERPRINT)
    return str(path)


def tokens_in(path: Path) -> list[list[int]]:
    return [unpack(prefix.tokens) for prefix in read(path, FINGERPRINT, VOCAB)]


def health_of(address: str) -> Any:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=10).status


def wait_until_cached(client: Client, prompt: list[int]) -> None:
    pause = threading.Event()
    while client.lookup(prompt, timeout=10).cached_tokens < len(prompt) - 1:
        pause.wait(0.005)


# A file of prompts


def test_prompts_are_warm_before_the_server_says_that_it_serves(tmp_path: Path) -> None:
    """With --warm-before-serving; whoever calls earlier is served all the same."""
    file = lines(
        tmp_path / "prompts.jsonl", {"prompt": prompt_of(1)}, {"prompt": prompt_of(2), "namespace": "n"}, "text"
    )
    runner = GatedRunner()
    starting = RunningServer(PaperEngine(runner=runner), warm=file, warm_before_serving=True).begin()
    with starting as server, runner, Client(server.address) as client:
        client_ready = threading.Thread(target=client.wait_until_ready, args=(30,))
        client_ready.start()
        assert health_of(server.address) != SERVING
        runner.open()
        client_ready.join()
        assert client.lookup(prompt_of(1)).miss_reason == "none"
        assert client.lookup(prompt_of(2), namespace="n").miss_reason == "none"
        assert client.lookup("text").miss_reason == "none"
        totals = server.stats().totals
        assert (totals.warmed_prompts, totals.admitted) == (3, 0)


def test_otherwise_they_are_warmed_while_it_serves(tmp_path: Path) -> None:
    """A long file keeps nobody waiting."""
    file = lines(tmp_path / "prompts.jsonl", {"prompt": prompt_of(1)})
    runner = GatedRunner()
    with RunningServer(PaperEngine(runner=runner), warm=file) as server, runner, Client(server.address) as client:
        assert health_of(server.address) == SERVING
        server.wait_until_warming(1)
        runner.open()
        wait_until_cached(client, prompt_of(1))


def test_lines_that_are_no_prompts_are_named_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The others are warmed, and the server serves."""
    file = lines(
        tmp_path / "prompts.jsonl",
        {"promt": "x"},
        {"prompt": [999]},
        {"prompt": "x", "tenant": "who"},
        {"prompt": [1] * 40},
    )
    with RunningServer(PaperEngine(), warm=file, warm_before_serving=True) as server:
        assert server.stats().totals.warmed_prompts == 1
    log = capsys.readouterr().out
    assert "line 1 of " in log and "'promt' has no meaning" in log
    assert "line 2 of " in log and "vocabulary" in log
    assert "line 3 of " in log and "must name one of the tenants" in log
    assert "1 prompts computed, 0 cached already, 3 failed" in log


def test_of_many_bad_lines_a_few_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is something else does not fill the log."""
    file = lines(tmp_path / "prompts.jsonl", *range(50))
    with RunningServer(PaperEngine(), warm=file, warm_before_serving=True):
        pass
    log = capsys.readouterr().out
    assert log.count("is not warmed") == 5 and "50 failed" in log


def test_a_file_that_is_not_there_is_noticed_before_anything_is_loaded(tmp_path: Path) -> None:
    """A large model is not loaded for nothing."""

    def load(*_: object) -> Any:
        raise AssertionError("loaded")

    with pytest.raises(FailedPrecondition, match="check --warm"), RunningServer(load, warm=str(tmp_path / "none")):
        pass
    nowhere = str(tmp_path / "none" / "remembered")
    with pytest.raises(FailedPrecondition, match="its directory must be there"), RunningServer(load, remember=nowhere):
        pass


def test_prompts_of_tenants(tmp_path: Path) -> None:
    """Where callers are tenants, a line says whose prompt it is, and it is warm for that one only."""
    tenants = tenancy.write(tmp_path / "tenants.toml", tenancy.entry("a"), tenancy.entry("b"))
    file = lines(tmp_path / "prompts.jsonl", {"prompt": prompt_of(1), "tenant": "a"}, {"prompt": prompt_of(2)})
    options = {"tenants": tenants, "warm": file, "warm_before_serving": True}
    with RunningServer(PaperEngine(), **options) as server:
        with Client(server.address, token="a") as client:
            assert client.lookup(prompt_of(1)).cached_tokens == 39
            assert client.lookup(prompt_of(2)).cached_tokens == 0
        with Client(server.address, token="b") as client:
            assert client.lookup(prompt_of(1)).cached_tokens == 0


# What is remembered


def use(client: Client, prompt: list[int], times: int = 3) -> None:
    for number in range(times):
        client.generate([*prompt, number], max_tokens=1, timeout=10)


def test_the_prefixes_that_saved_most_are_warm_after_a_restart(tmp_path: Path) -> None:
    """Before the server says SERVING, and without counting as anybody's requests."""
    file = tmp_path / "remembered"
    shared, once = prompt_of(1, 10 * BLOCK), prompt_of(2, 10 * BLOCK)
    with RunningServer(PaperEngine(), remember=str(file)) as server, Client(server.address) as client:
        use(client, shared)
        use(client, once, times=1)
    assert [tokens[: len(shared)] for tokens in tokens_in(file)] == [shared]
    with RunningServer(PaperEngine(), remember=str(file)) as server, Client(server.address) as client:
        totals = server.stats().totals
        assert (totals.admitted, totals.warmed_prompts) == (0, 1)
        assert client.generate([*shared, 77], max_tokens=1, timeout=10).usage.cached_tokens >= len(shared)
        assert client.lookup(once).cached_tokens == 0


def test_it_is_written_while_the_server_serves(tmp_path: Path) -> None:
    """So that there is something to remember after a crash."""
    file = tmp_path / "remembered"
    running = RunningServer(PaperEngine(), remember=str(file), remember_seconds=0.02)
    with running as server, Client(server.address) as client:
        use(client, prompt_of(1))
        pause = threading.Event()
        while not file.exists() or not tokens_in(file):
            pause.wait(0.005)
        assert tokens_in(file)[0][:40] == prompt_of(1)


def test_what_nobody_has_used_yet_stays_remembered(tmp_path: Path) -> None:
    """A restart is no reason to forget: what was warmed is kept in the file until it has not been used for long."""
    file = tmp_path / "remembered"
    old = time.time() - KEPT_SECONDS + 3600
    write(file, [Remembered(NAMESPACE, pack(prompt_of(n)), old) for n in (1, 2)], FINGERPRINT)
    with RunningServer(PaperEngine(), remember=str(file)) as server, Client(server.address) as client:
        use(client, prompt_of(2))
    first, second = read(file, FINGERPRINT, VOCAB)
    assert unpack(first.tokens)[:40] == prompt_of(2) and first.used > old + 3600
    assert (unpack(second.tokens), second.used) == (prompt_of(1), round(old))
    remembered(file, prompt_of(1), used=time.time() - KEPT_SECONDS - 1)
    with RunningServer(PaperEngine(), remember=str(file)) as server:
        assert server.stats().totals.warmed_prompts == 0
    assert tokens_in(file) == []


def test_what_has_been_evicted_is_forgotten(tmp_path: Path) -> None:
    """There was no room for it, so there will be none after the next start."""
    file = tmp_path / "remembered"
    remembered(file, prompt_of(1), prompt_of(2))
    with RunningServer(PaperEngine(), remember=str(file)) as server:
        server.server.front.engine.loop.call(lambda scheduler: scheduler.cache.invalidate()).result(10)
    assert tokens_in(file) == []


def test_the_start_waits_only_so_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rest is warmed while the server serves; if that ends before, it is still remembered."""
    file = tmp_path / "remembered"
    remembered(file, prompt_of(1), prompt_of(2))
    options = {"remember": str(file), "remember_wait_seconds": 0.0}
    runner = GatedRunner()
    with RunningServer(PaperEngine(runner=runner), **options) as server, runner:
        assert health_of(server.address) == SERVING
        server.wait_until_warming(1)
        stopping = asyncio.run_coroutine_threadsafe(server.server.stop(), server.loop)
        runner.open()
        stopping.result(30)
    assert "2 of 2 remembered prefixes are not warm after 0 seconds" in capsys.readouterr().out
    assert tokens_in(file) == [prompt_of(1), prompt_of(2)]
    runner = GatedRunner()
    with RunningServer(PaperEngine(runner=runner), **options) as server, runner, Client(server.address) as client:
        runner.open()
        wait_until_cached(client, prompt_of(1))
        wait_until_cached(client, prompt_of(2))


@pytest.mark.parametrize("content", [b"", b"something else entirely", b"damaged"])
def test_a_file_that_is_no_good_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    """The log says why it is not used, and the server serves."""
    file = tmp_path / "remembered"
    remembered(file, prompt_of(1))
    file.write_bytes(file.read_bytes()[:-5] if content == b"damaged" else content)
    with RunningServer(PaperEngine(), remember=str(file)) as server, Client(server.address) as client:
        assert server.stats().totals.warmed_prompts == 0
        use(client, prompt_of(2))
    assert f"what is remembered in {file} is not used" in capsys.readouterr().out
    assert tokens_in(file)[0][:40] == prompt_of(2)


def test_what_another_model_has_remembered_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The token ids of one mean nothing to another."""
    file = tmp_path / "remembered"
    write(file, [Remembered(NAMESPACE, pack(prompt_of(1)), time.time())], "another")
    with RunningServer(PaperEngine(), remember=str(file)) as server:
        assert server.stats().totals.warmed_prompts == 0
    assert "it is of another model" in capsys.readouterr().out


def test_prefixes_of_tenants_who_are_gone_are_not_warmed(tmp_path: Path) -> None:
    """Nobody could use them."""
    file = tmp_path / "remembered"
    tenants = tenancy.write(tmp_path / "tenants.toml", tenancy.entry("a"))
    both = [Remembered(namespace_key(name, ""), pack(prompt_of(1)), time.time()) for name in ("a", "gone")]
    write(file, both, FINGERPRINT)
    with RunningServer(PaperEngine(), remember=str(file), tenants=tenants) as server:
        assert server.stats().totals.warmed_prompts == 1
    assert [prefix.namespace for prefix in read(file, FINGERPRINT, VOCAB)] == [namespace_key("a", "")]


def test_what_does_not_fit_any_more_is_left_out(tmp_path: Path) -> None:
    """A server with a smaller cache warms what it can."""
    file = tmp_path / "remembered"
    remembered(file, prompt_of(1, 60 * BLOCK), prompt_of(2))
    with RunningServer(PaperEngine(blocks=32), remember=str(file)) as server, Client(server.address) as client:
        assert client.lookup(prompt_of(2)).cached_tokens == 39
        assert client.lookup(prompt_of(1, 60 * BLOCK)).cached_tokens == 0
    assert tokens_in(file) == [prompt_of(2)]


def test_a_directory_that_goes_away_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The server serves on, and writes when it can again."""
    directory = tmp_path / "there"
    directory.mkdir()
    file = directory / "remembered"
    with RunningServer(PaperEngine(), remember=str(file), remember_seconds=0.01):
        pause = threading.Event()
        while not file.exists():
            pause.wait(0.005)
        directory.rename(tmp_path / "gone")
        log = ""
        while "nothing can be remembered" not in log:
            log += capsys.readouterr().out
            pause.wait(0.05)
        directory.mkdir()
        while not file.exists():
            pause.wait(0.005)
    log += capsys.readouterr().out
    assert log.count("nothing can be remembered") == 1


def test_a_server_that_was_killed_is_followed_by_a_warm_one(tmp_path: Path) -> None:
    """The real thing: a process that gets no chance to write, and the next one with the same file."""
    file = tmp_path / "remembered"
    options = ("--cache-memory", "64MiB", "--threads", "1", "--remember", str(file))
    system = "You are a helpful assistant of a bicycle shop. Answer briefly and stay polite, whatever is asked. " * 3
    with LocalServer(*options, "--remember-seconds", "0.1", environment=processes.environment()) as server:
        with Client(server.address) as client:
            for question in ("When do you open?", "Do you repair gears?", "What is a gravel bike?"):
                client.generate(system + question, max_tokens=1, timeout=30)
            prefix = client.tokenize(system)
            pause = threading.Event()
            while not file.exists() or not _holds(file, prefix, client.model().fingerprint):
                pause.wait(0.01)
        server.process.kill()
        server.process.wait()
    with LocalServer(*options, environment=processes.environment()) as server, Client(server.address) as client:
        assert client.lookup(system + "Do you sell lights?").cached_tokens >= len(prefix) - 1
        stats = client.stats()
        assert stats.requests.admitted == 0
        log = server.log()
    warmed = re.search(r"warmed \d+ remembered prefixes", log)
    assert warmed is not None
    assert warmed.start() < log.index("serving embedded")


def _holds(file: Path, prefix: list[int], fingerprint: str) -> bool:
    entries = read(file, fingerprint, VOCAB_SIZE)
    return any(unpack(entry.tokens)[: len(prefix) - 1] == prefix[:-1] for entry in entries)
