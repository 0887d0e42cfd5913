"""`prefixcache pin`, `unpin`, `pins`, `invalidate`, `end-session`, and sessions of `chat`, against a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner, Result

from prefixcache.cli import app
from prefixcache.client import Client
from tests.serving import noise_server

PROMPT = "The harbour opens at six. Boats that come in the night wait at the outer wall. "  # a token per byte


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with noise_server() as (address, _):
        yield address


def run(address: str, *arguments: str, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(app, list(arguments), input=stdin, env={"PREFIXCACHE_ADDRESS": address})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_prompt_is_pinned_listed_and_unpinned(address: str) -> None:
    """Each command says what it did; unpinning twice is an error in a line."""
    pinned = run(address, "pin", "harbour", PROMPT, "--ttl", "600")
    assert pinned.exit_code == 0, pinned.stderr
    whole = (len(PROMPT) + 1) // 16 * 16
    assert f"{whole} of {len(PROMPT) + 1} prompt tokens are pinned" in pinned.stdout
    listed = run(address, "pins")
    assert "harbour" in listed.stdout and str(whole) in listed.stdout and f"pins hold {whole // 16} of" in listed.stdout
    assert json.loads(run(address, "pins", "--json").stdout)["pins"][0]["pin_id"] == "harbour"
    assert run(address, "unpin", "harbour").exit_code == 0
    again = run(address, "unpin", "harbour")
    assert again.exit_code == 1 and "there is no pin 'harbour'" in again.stderr


def test_what_cannot_be_pinned_is_said(address: str) -> None:
    """With --cached-only nothing is computed, so nothing is there to pin: exit code 1."""
    result = run(address, "pin", "new", f"new {PROMPT}", "--cached-only")
    assert result.exit_code == 1
    assert "not all of the prompt is cached" in result.stderr


def test_a_prompt_is_forgotten(address: str) -> None:
    """Once; the second time nothing of it is there."""
    run(address, "generate", f"forget {PROMPT}", "--max-tokens", "1", "--priority", "70", "--ttl", "600")
    done = run(address, "invalidate", f"forget {PROMPT}")
    assert done.exit_code == 0 and "blocks are free now" in done.stdout
    assert "nothing of that was cached" in run(address, "invalidate", f"forget {PROMPT}").stdout
    assert json.loads(run(address, "invalidate", "--session", "nobody", "--json").stdout) == {
        "freed_blocks": 0,
        "in_use_blocks": 0,
    }


def test_one_thing_is_forgotten_at_a_time(address: str) -> None:
    """None or two are a mistake of the command line: exit code 2."""
    for arguments in ([], ["x", "--everything"], ["--session", "s", "--whole-namespace"]):
        result = run(address, "invalidate", *arguments)
        assert result.exit_code == 2 and "name one thing to forget" in result.stderr


def test_a_session_is_ended_by_its_name(address: str) -> None:
    """What only it has used goes first."""
    run(address, "generate", f"session {PROMPT}", "--max-tokens", "1", "--session", "mine")
    ended = run(address, "end-session", "mine")
    assert ended.stdout == f"{-(-(len(PROMPT) + 9) // 16)} blocks go first from now on\n"


def test_a_chat_is_a_session_that_ends_with_it(address: str) -> None:
    """Nothing of it is left as a session afterwards."""
    assert run(address, "chat", "--max-tokens", "3", stdin="Hello\n/reset\nAnd you?\n").exit_code == 0
    with Client(address) as client:
        assert client.stats().sessions == 0
