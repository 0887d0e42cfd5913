"""`prefixcache token`, and the options of a connection that every client command has."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tomllib
from pathlib import Path

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner, Result

from engine.authentication import read_tenants
from prefixcache.cli import app
from tests.engine.serving import PaperEngine, RunningServer
from tests.engine.tenancy import entry, write
from tests.serving import free_port

CONNECTION = ("--token-file", "--tls", "--ca", "--certificate", "--key")


def run(*arguments: str, **variables: str | None) -> Result:
    clean = {name: None for name in os.environ if name.startswith("PREFIXCACHE_")}
    result = CliRunner().invoke(app, list(arguments), env={**clean, "COLUMNS": "200", **variables})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize("name", ["support", "a.b-c_1", "0"])
def test_token_makes_a_token_and_the_lines_of_its_tenant(tmp_path: Path, name: str) -> None:
    """stdout is the token alone; what stderr says of it is TOML that lets exactly that token in."""
    made = run("token", name)
    assert made.exit_code == 0
    assert re.fullmatch(r"prefixcache_[A-Za-z0-9_-]{43}\n", made.stdout)
    token = made.stdout.strip()
    assert token not in made.stderr
    lines = made.stderr[made.stderr.index("[tenants") :]
    directory = read_tenants(Path(write(tmp_path / "tenants.toml", lines)))
    assert directory.by_token(token).tenant == name
    assert not directory.by_token(token).admin


def test_no_two_tokens_are_alike_and_machines_get_json() -> None:
    """All that the lines for people say, in one object."""
    made = [json.loads(run("token", "x", "--json").stdout) for _ in range(2)]
    assert made[0]["token"] != made[1]["token"]
    for one in made:
        assert set(one) == {"tenant", "token", "hash", "toml"}
        assert one["hash"] == "sha256:" + hashlib.sha256(one["token"].encode()).hexdigest()
        assert tomllib.loads(one["toml"]) == {"tenants": {"x": {"tokens": [one["hash"]]}}}


@pytest.mark.parametrize("name", ["", "a b", "-a", "a" * 65, "ä", 'a"]\n[tenants.b'])
def test_a_name_that_no_tenant_can_have_is_refused(name: str) -> None:
    """Before there is a token for it, with the rule."""
    result = run("token", "--", name)
    assert result.exit_code == 2
    assert "1 to 64 letters" in result.stderr
    assert result.stdout == ""


def test_every_command_of_a_client_has_the_options_of_a_connection() -> None:
    """Also those that are added later; of the commands that are no clients, `route` alone has a way to servers."""
    group = get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    context = typer.Context(group)
    connecting = set()
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        options = {option for parameter in command.params for option in parameter.opts}
        assert set(CONNECTION) <= options or not set(CONNECTION) & options or name == "route"
        assert ("--address" in options) == (set(CONNECTION) <= options)
        if "--address" in options:
            connecting.add(name)
    assert {"generate", "chat", "lookup", "stats"} <= connecting
    assert "token" not in connecting


def test_a_token_comes_from_a_file_or_the_environment(tmp_path: Path) -> None:
    """The file is stronger, whatever surrounds the token in it; without any the server's answer is the error."""
    file = tmp_path / "token"
    file.write_text("\n a \r\n")
    with RunningServer(PaperEngine(), tenants=write(tmp_path / "tenants.toml", entry("a"), entry("b"))) as server:
        asked = ("stats", "--json", "--address", server.address)
        assert run(*asked, "--token-file", str(file), PREFIXCACHE_TOKEN="wrong").exit_code == 0
        assert run(*asked, PREFIXCACHE_TOKEN="b").exit_code == 0
        for result in (run(*asked), run(*asked, PREFIXCACHE_TOKEN="")):  # and nothing is left of the calls before
            assert result.exit_code == 1
            assert re.fullmatch(r"error: this server asks for a token; .*PREFIXCACHE_TOKEN\n", result.stderr)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--token-file", "/no/such/file"], 2, "/no/such/file"),
        (["--ca", "/no/such/file"], 2, "/no/such/file"),
        (["--token-file", "{empty}"], 1, "there is no token in .*; `prefixcache token NAME > FILE` writes one"),
        (["--token-file", "{bytes}"], 1, "there is no token in"),
        (["--token-file", "{two}"], 1, "the token has characters that no token has"),
        (["--certificate", "{two}"], 1, "a client's certificate and its key belong together"),
        (["--token-file", "{good}", "--address", "192.0.2.1:5"], 1, "the token would cross the network .* --no-tls"),
    ],
)
def test_files_of_no_use_are_named(tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    """Before anything is sent, and without what is in them."""
    contents = {"empty": b"\n", "bytes": b"\xff\xfe", "two": b"one two", "good": b"token"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    filled = [part.format(**{name: tmp_path / name for name in contents}) for part in arguments]
    result = run("stats", "--address", f"127.0.0.1:{free_port()}", *filled)
    assert result.exit_code == code
    assert re.search(words, " ".join(result.stderr.split()))
    assert "one two" not in result.stderr
