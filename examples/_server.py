"""The server of an example: the one at --address, or one that lives as long as the example."""

from __future__ import annotations

import argparse
import contextlib
import secrets
import signal
import sys
from collections.abc import Iterator

from rich.console import Console

from prefixcache.client import Client
from prefixcache.errors import PrefixCacheError
from prefixcache.local import LocalServer

console = Console(highlight=False)


def fresh_namespace() -> str:
    """Return a namespace that nobody has used: its prompts are cold, however often an example runs."""
    return f"example-{secrets.token_hex(4)}"


@contextlib.contextmanager
def connect(description: str) -> Iterator[Client]:
    """Yield a client of the server that the command line names, or of a new one. An error becomes one line."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--address", metavar="HOST:PORT", help="a running server (default: start one)")
    address = parser.parse_args().address
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` ends the server then, too
    try:
        with contextlib.ExitStack() as stack:
            yield stack.enter_context(Client(address or stack.enter_context(embedded_server())))
    except PrefixCacheError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


@contextlib.contextmanager
def embedded_server() -> Iterator[str]:
    """Start a server with the embedded model and yield its address; it ends with the block."""
    with contextlib.ExitStack() as stack:
        with console.status("Starting a server with the embedded model ..."):
            server = stack.enter_context(LocalServer("--model", "embedded"))
        console.print(f"A server with the embedded model is ready at {server.address}.", style="dim")
        yield server.address
    console.print("The server has shut down.", style="dim")
