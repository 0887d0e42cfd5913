"""What the commands of `prefixcache` share: options, the prompt from wherever it is, the client, JSON output.

A command with an `address` also gets the options of `_connection_options`, which it need
not name: `connect` knows what was given.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.main import get_command

from prefixcache.errors import InvalidArgument, Unavailable
from prefixcache.terms import MAX_PRIORITY

if TYPE_CHECKING:
    from prefixcache.channel import TLS
    from prefixcache.client import Client

DEFAULT_ADDRESS = "127.0.0.1:50051"
ADDRESS_VARIABLE = "PREFIXCACHE_ADDRESS"
DEFAULT_MAX_TOKENS = 256
CONNECTION = "Connection"


def _host_and_port(address: str) -> str:
    if ":" not in address:
        raise typer.BadParameter(f"{address!r} has no port: give host:port, such as {DEFAULT_ADDRESS}")
    return address


Address = Annotated[
    str,
    typer.Option(
        "--address",
        "-a",
        metavar="HOST:PORT",
        envvar=ADDRESS_VARIABLE,
        callback=_host_and_port,
        help="The server.",
        rich_help_panel=CONNECTION,
    ),
]
Prompt = Annotated[
    str | None, typer.Argument(metavar="PROMPT", help="The prompt, or - to read it from stdin.", show_default=False)
]
File = Annotated[
    Path | None,
    typer.Option("--file", "-f", exists=True, dir_okay=False, readable=True, help="Read the prompt from this file."),
]
Namespace = Annotated[
    str, typer.Option(help="Share cached prefixes only within this namespace.", show_default="the caller's own")
]
Json = Annotated[bool, typer.Option("--json", help="Write one JSON object instead of text.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="The most tokens to generate.")]
Temperature = Annotated[
    float | None, typer.Option(help="0 takes the most probable token, more adds chance.", show_default="0")
]
Seed = Annotated[int | None, typer.Option(min=0, help="The same seed and prompt give the same tokens.")]
TimeToLive = Annotated[
    float | None,
    typer.Option(
        "--ttl", min=0.001, metavar="SECONDS", help="How long it is kept, if not evicted before.", show_default=False
    ),
]
Priority = Annotated[
    int | None,
    typer.Option(min=0, max=MAX_PRIORITY, help="Prompts of a lower priority are evicted first.", show_default="50"),
]
Timeout = Annotated[float | None, typer.Option(min=0.001, help="Seconds to wait for the whole answer.")]


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """Return the prompt from wherever it is, exactly as it is there."""
    if (prompt is None) == (file is None):
        raise typer.BadParameter("give the prompt as PROMPT, or - to read it from stdin, or with --file")
    if prompt is not None and prompt != "-":
        return prompt
    data = sys.stdin.buffer.read() if file is None else file.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        where = "stdin" if file is None else str(file)
        raise typer.BadParameter(f"{where} is not UTF-8 text: byte {error.start} cannot be read") from None


# What was given of the options of a connection on the command line that is being carried out.
_given: dict[str, Any] = {}


def _remember(parameter: typer.CallbackParam, value: Any) -> Any:
    _given[str(parameter.name)] = value
    return value


def _option(*names: str, **what: Any) -> Any:
    return typer.Option(
        *names, callback=_remember, expose_value=False, show_default=False, rich_help_panel=CONNECTION, **what
    )


def _file(name: str, **what: Any) -> Any:
    return _option(name, metavar="FILE", exists=True, dir_okay=False, readable=True, **what)


def _connection_options(
    token_file: Annotated[
        Path | None,
        _file("--token-file", help="The file of the token that says who calls. Else it is that in PREFIXCACHE_TOKEN."),
    ] = None,
    tls: Annotated[
        bool | None,
        _option("--tls/--no-tls", help="Encrypt the connection, as --ca and --certificate do; or never."),
    ] = None,
    ca: Annotated[
        Path | None, _file("--ca", envvar="PREFIXCACHE_CA", help="Who signed the server's certificate (PEM).")
    ] = None,
    certificate: Annotated[
        Path | None,
        _file("--certificate", envvar="PREFIXCACHE_CERTIFICATE", help="The caller's own certificate (PEM)."),
    ] = None,
    key: Annotated[Path | None, _file("--key", envvar="PREFIXCACHE_KEY", help="Its private key (PEM).")] = None,
    replica: Annotated[
        str | None, _option("--replica", metavar="ID", help="Through a gateway: ask this replica, and no other.")
    ] = None,
) -> None:
    """Take the options of every command that connects to a server."""


@functools.cache
def connection_parameters() -> list[Any]:
    """Return the parameters to add to a command that connects to a server."""
    app = typer.Typer(add_completion=False)
    app.command()(_connection_options)
    return [parameter for parameter in get_command(app).params if parameter.name != "help"]


def _token() -> str | None:
    """Return the token of --token-file; None leaves it to the environment."""
    path: Path | None = _given.get("token_file")
    if path is None:
        return None
    try:
        token = path.read_text().strip()
    except UnicodeDecodeError:
        token = ""
    if not token:
        raise InvalidArgument(f"there is no token in {path}; `prefixcache token NAME > FILE` writes one")
    return token


def _tls() -> TLS | bool | None:
    """Return what the options say of the connection; None leaves it to the environment."""
    from prefixcache.channel import TLS

    files = {name: _given[name] for name in ("ca", "certificate", "key") if _given.get(name) is not None}
    wanted: bool | None = _given.get("tls")
    return TLS(**files) if files and wanted is not False else wanted


@contextlib.contextmanager
def connect(address: str) -> Iterator[Client]:
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # what it says of failed handshakes comes as an error as well
    from prefixcache.client import Client

    try:
        with Client(address, token=_token(), tls=_tls(), replica=_given.get("replica") or "") as client:
            yield client
    except Unavailable:
        if _answers(address):
            raise
        raise Unavailable(
            f"no server answers at {address}: start one with `prefixcache serve`, or name another with --address"
        ) from None


def _answers(address: str) -> bool:
    """Whether anything accepts connections at `address`; True if it is not a host and a port, so cannot be tried."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return True
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except (OSError, OverflowError):
        return False
    return True


def write_json(**fields: object) -> None:
    typer.echo(json.dumps(fields, ensure_ascii=False))
    sys.stdout.flush()
