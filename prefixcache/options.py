"""What the commands of `prefixcache` share: options, the prompt from wherever it is, the client, JSON output."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefixcache.errors import Unavailable

if TYPE_CHECKING:
    from prefixcache.client import Client

DEFAULT_ADDRESS = "127.0.0.1:50051"
ADDRESS_VARIABLE = "PREFIXCACHE_ADDRESS"
DEFAULT_MAX_TOKENS = 256


def _host_and_port(address: str) -> str:
    if ":" not in address:
        raise typer.BadParameter(f"{address!r} has no port: give host:port, such as {DEFAULT_ADDRESS}")
    return address


Address = Annotated[
    str,
    typer.Option(
        "--address", "-a", metavar="HOST:PORT", envvar=ADDRESS_VARIABLE, callback=_host_and_port, help="The server."
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


@contextlib.contextmanager
def connect(address: str) -> Iterator[Client]:
    from prefixcache.client import Client

    try:
        with Client(address) as client:
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
