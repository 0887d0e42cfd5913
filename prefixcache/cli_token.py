"""`prefixcache token`: a new token, and the lines about it for the file of tenants.

The token goes to stdout, alone, so that it can go straight into a file; what is said
about it goes to stderr. It is kept nowhere: the file of tenants has its hash.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import sys
from typing import Annotated

import typer
from rich.text import Text

from prefixcache import terminal
from prefixcache.names import TENANT_NAME, TENANT_NAME_RULE
from prefixcache.options import Json, write_json

# Says what it is wherever it turns up, also to programs that look for secrets where none should be.
BEGINNING = "prefixcache_"
RANDOM_BYTES = 32

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def token(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The tenant it is for.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Make a token for a tenant of `serve --tenants`, and the lines for that file.

    The token is shown once and kept nowhere: the lines hold its hash only.
    """
    secret = BEGINNING + secrets.token_urlsafe(RANDOM_BYTES)
    entry = "sha256:" + hashlib.sha256(secret.encode()).hexdigest()
    lines = f'[tenants.{_key(name)}]\ntokens = ["{entry}"]'
    if as_json:
        write_json(tenant=name, token=secret, hash=entry, toml=lines)
        return
    if not sys.stdout.isatty():
        typer.echo(secret)
        terminal.note(f"The token of {name} is written, and kept nowhere else.")
    else:
        terminal.note(f"The token of {name}, shown this once:\n")
        typer.echo(f"  {secret}\n")
    terminal.note("For the file of `serve --tenants` (a tenant that is there already: add the hash to its tokens):\n")
    terminal.console(stderr=True).print(Text(lines + "\n"), soft_wrap=True)


def _key(name: str) -> str:
    """Return a tenant's name as a key of TOML. Raises BadParameter for what no tenant can be called."""
    if not TENANT_NAME.fullmatch(name):
        raise typer.BadParameter(f"{TENANT_NAME_RULE}, unlike {name!r}")
    return name if _BARE_KEY.fullmatch(name) else f'"{name}"'
