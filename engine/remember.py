"""The file in which a server remembers its most valuable prefixes, to warm them after a restart.

A line of JSON about the file, then a line of JSON per prefix, the most valuable first:

    {"format": "prefixcache remembered prefixes", "version": 1, "fingerprint": "...", "checksum": "..."}
    {"namespace": "9:anonymous,0:", "used": 1790000000, "tokens": [17, 2041, 9]}

It holds prompts, as token ids, so only its owner may read it. It is replaced as a whole
or not at all. What is read is checked to the last token: a file that something else has
written, or half of one, must neither crash the server nor be computed.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from engine.tenants import suffix_of, tenant_of
from prefixcache.tokens import pack, unpack

FORMAT = "prefixcache remembered prefixes"
VERSION = 1
MAX_BYTES = 64 * 2**20


class Unusable(Exception):
    """The file cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Remembered:
    """A prefix: the cache's namespace, packed tokens, and when it was last among the valuable (seconds since 1970)."""

    namespace: str
    tokens: bytes
    used: float


def write(path: Path, prefixes: Iterable[Remembered], fingerprint: str) -> int:
    """Replace the file by the first of `prefixes`, as many as MAX_BYTES allow, and return how many. Raises OSError."""
    lines: list[bytes] = []
    left = MAX_BYTES - 1024  # the first line is shorter than that
    for prefix in prefixes:
        entry = {"namespace": prefix.namespace, "used": round(prefix.used), "tokens": unpack(prefix.tokens)}
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        if len(line) > left:
            break
        left -= len(line)
        lines.append(line)
    body = b"".join(lines)
    head = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint,
        "checksum": xxh3_128_hexdigest(body),
    }
    _replace(path, json.dumps(head).encode() + b"\n" + body)
    return len(lines)


def read(path: Path, fingerprint: str, vocab_size: int) -> list[Remembered]:
    """Return what was written for a model of this fingerprint; nothing if there is no file. Raises Unusable."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Unusable(f"it cannot be read ({error.strerror})") from None
    if len(data) > MAX_BYTES:
        raise Unusable(f"it is longer than {MAX_BYTES:,} bytes")
    first, _, body = data.partition(b"\n")
    try:
        head = json.loads(first)
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise ValueError
    except (ValueError, RecursionError):
        raise Unusable("it is no file of remembered prefixes") from None
    if head.get("version") != VERSION:
        raise Unusable(f"it is of version {head.get('version')!r}, not {VERSION}")
    if head.get("fingerprint") != fingerprint:
        raise Unusable("it is of another model, precision, tokenizer or block size")
    if head.get("checksum") != xxh3_128_hexdigest(body):
        raise Unusable("it is damaged")
    try:
        return [_entry(json.loads(line), vocab_size) for line in body.splitlines()]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise Unusable("it is damaged") from None


def _entry(entry: Any, vocab_size: int) -> Remembered:
    namespace, tokens, used = entry["namespace"], entry["tokens"], entry["used"]
    if not isinstance(namespace, str) or not tokens or not all(type(token) is int for token in tokens):
        raise ValueError
    if not 0 <= min(tokens) <= max(tokens) < vocab_size:
        raise ValueError
    tenant_of(namespace), suffix_of(namespace)  # raises ValueError if they cannot be told
    return Remembered(namespace, pack(tokens), float(used))


def _replace(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, such that a crash leaves the old one or the new one."""
    new = path.with_name(path.name + ".new")
    with contextlib.suppress(FileNotFoundError):
        new.unlink()  # of a server that was killed, perhaps
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
