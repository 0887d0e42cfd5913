"""Files of tenants for tests."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def hashed(token: str) -> str:
    """Return a token's hash as it stands in the file, quotes included."""
    return f'"sha256:{hashlib.sha256(token.encode()).hexdigest()}"'


def entry(name: str, token: str = "", **more: str) -> str:
    """Return the lines of a tenant whose token is, if no other is given, its name; values are TOML."""
    lines = [f"[tenants.{name}]", f"tokens = [{hashed(token or name)}]"]
    return "\n".join([*lines, *(f"{key} = {value}" for key, value in more.items())]) + "\n"


def write(path: Path, *entries: str) -> str:
    """Replace the file in one step, as a careful operator does, and return its path."""
    draft = path.with_suffix(".new")
    draft.touch(mode=0o600)
    draft.write_text("\n".join(entries))
    os.replace(draft, path)
    return str(path)
