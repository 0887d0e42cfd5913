"""`prefixcache warm`: progress for people, lines for machines, and an exit code that says whether all is warm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from prefixcache.cli import app
from prefixcache.client import Client
from tests.engine.serving import GatedRunner, PaperEngine, RunningServer
from tests.prefixcache.test_cli import on_terminal
from tests.serving import free_port

PROMPT = "The harbour opens at six. Boats that come in the night wait at the outer wall. "


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with RunningServer(PaperEngine()) as server:
        yield server.address


def run(address: str, *arguments: str, stdin: str | bytes | None = None) -> Result:
    result = CliRunner().invoke(app, ["warm", *arguments], input=stdin, env={"PREFIXCACHE_ADDRESS": address})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def file_of(path: Path, *values: object) -> str:
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values))
    return str(path)


def test_the_prompts_of_a_file_are_warm(address: str, tmp_path: Path) -> None:
    """What it did is one line; done again, it is said to have been warm."""
    file = file_of(
        tmp_path / "prompts.jsonl",
        f"file {PROMPT}",
        {"messages": [{"role": "system", "content": PROMPT}], "add_generation_prompt": False},
        {"prompt": f"file {PROMPT}", "namespace": "other", "ttl_seconds": 600, "priority": 90, "session": "s"},
    )
    done = run(address, file)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.startswith("3 prompts: 3 computed (")
    with Client(address) as client:
        assert client.lookup(f"file {PROMPT}").miss_reason == "none"
        assert client.lookup(f"file {PROMPT}", namespace="other").miss_reason == "none"
    assert run(address, file).stdout == "3 prompts: 3 cached already\n"


def test_what_failed_is_named_by_its_line(address: str, tmp_path: Path) -> None:
    """The others are warmed, and the exit code says that not all are."""
    path = tmp_path / "prompts.jsonl"
    file_of(path, f"some {PROMPT}", {"prompt": [999_999], "id": "too\x1b[31m high"}, {"prompt": "x", "tenant": "me"})
    path.write_text(path.read_text() + "\nnot JSON\n" + json.dumps(f"last {PROMPT}"))
    done = run(address, str(path))
    assert done.exit_code == 1
    assert done.stdout.startswith("5 prompts: 2 computed (") and done.stdout.endswith(", 3 failed\n")
    first, second, third = sorted(done.stderr.splitlines())
    assert first.startswith("line 2 (too\ufffd[31m high) failed: token id 999999")
    assert second == 'line 3 failed: "tenant" is for a server\'s own file (serve --warm): leave it out'
    assert third.startswith("line 5 failed: it is not JSON")


def test_json_has_a_line_per_prompt(address: str, tmp_path: Path) -> None:
    """With the line and the name that it was given, and nothing else on either output."""
    file = file_of(tmp_path / "prompts.jsonl", f"json {PROMPT}", {"prompt": "", "id": "empty"}, f"json {PROMPT}")
    done = run(address, file, "--json", "--namespace", "json")
    assert (done.exit_code, done.stderr) == (1, "")
    results = {entry.pop("line"): entry for entry in map(json.loads, done.stdout.splitlines())}
    tokens = len(f"json {PROMPT}") + 1
    assert results[1] == {
        "id": None,
        "state": "computed",
        "prompt_tokens": tokens,
        "cached_tokens": 0,
        "computed_tokens": tokens,
        "error": "",
        "replicas": None,
    }
    assert results[2]["id"] == "empty" and results[2]["state"] == "failed" and "not be empty" in results[2]["error"]
    assert results[3]["prompt_tokens"] == tokens


def test_prompts_can_be_piped_in(address: str) -> None:
    """With - for the file; options hold for all prompts that do not say otherwise."""
    lines = json.dumps(f"pipe {PROMPT}") + "\n" + json.dumps({"prompt": f"pipe {PROMPT}", "namespace": "own"})
    done = run(address, "-", "--namespace", "piped", "--priority", "10", "--ttl", "60", stdin=lines)
    assert done.exit_code == 0 and done.stdout.startswith("2 prompts: 2 computed")
    with Client(address) as client:
        assert client.lookup(f"pipe {PROMPT}").cached_tokens <= 1  # the token that every text begins with
        assert client.lookup(f"pipe {PROMPT}", namespace="piped").miss_reason == "none"
        assert client.lookup(f"pipe {PROMPT}", namespace="own").miss_reason == "none"


def test_no_prompts(address: str) -> None:
    """Nothing to do is done."""
    done = run(address, "-", stdin="\n\n")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "there are no prompts\n", "")


def test_a_file_that_cannot_be_read(address: str, tmp_path: Path) -> None:
    """A mistake of the command line."""
    done = run(address, str(tmp_path / "nowhere"))
    complaint = " ".join(done.stderr.replace("│", " ").split())  # in a box as wide as the path happens to make it
    assert done.exit_code == 2 and "cannot be read: No such file" in complaint


def test_no_server() -> None:
    """One line that says what to do."""
    done = run(f"127.0.0.1:{free_port()}", "-", stdin=json.dumps(PROMPT))
    assert done.exit_code == 1 and done.stdout == ""
    assert "no server answers" in done.stderr and "prefixcache serve" in done.stderr


def test_on_a_terminal_there_is_a_bar(tmp_path: Path) -> None:
    """It shows how many are done and how fast, goes when they all are, and Ctrl+C leaves what is done warm."""
    file = file_of(tmp_path / "prompts.jsonl", *(f"{number} {PROMPT}" for number in range(4)), {"prompt": ""})
    runner = GatedRunner()
    with (
        RunningServer(PaperEngine(runner=runner)) as server,
        runner,
        on_terminal("warm", file, "--address", server.address) as terminal,
    ):
        terminal.wait_for("0/5")
        runner.open()
        terminal.wait_for("line 5 failed")
        terminal.wait_for("5 prompts: 4 computed")
        assert terminal.wait_for_end() == 1
    runner = GatedRunner()
    with RunningServer(PaperEngine(runner=runner)) as server, runner:
        with on_terminal("warm", file, "--address", server.address) as terminal:
            terminal.wait_for("0/5")
            server.wait_until_warming(1)
            terminal.type("\x03")
            assert terminal.wait_for_end() == 130
        runner.open()
        server.wait_until_idle()
