"""Who may call: the file of tenants, and which of them a caller is.

    [tenants.support]
    tokens = ["sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"]
    certificates = ["support.example.com"]     # common or alternative names
    admin = false
    max_blocks = "20%"                         # or a number of blocks
    max_in_flight = 32
    tokens_per_minute = 600_000

The file holds hashes only, so that reading it lets nobody in. What is wrong with it is
an error that names the place and never repeats a value that might be a token.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hmac import compare_digest
from pathlib import Path
from typing import Any

from engine.config import closest
from engine.tenants import Caller
from prefixcache.errors import InvalidArgument, Unauthenticated
from prefixcache.names import TENANT_NAME, TENANT_NAME_RULE

_TOKEN = re.compile(r"sha256:([0-9a-f]{64})")
_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")

HOW_TO_SAY = "send a token as metadata 'authorization: Bearer TOKEN': Client(target, token=...), or PREFIXCACHE_TOKEN"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tenant may use; None is no limit. `max_blocks` is a number of blocks, or below 1 a share of all."""

    max_blocks: int | float | None = None
    max_in_flight: int | None = None
    tokens_per_minute: int | None = None

    def blocks_of(self, total: int) -> int | None:
        """Return how many of `total` blocks may be cached."""
        if isinstance(self.max_blocks, float):
            return max(int(self.max_blocks * total), 1)
        return self.max_blocks


@dataclass(frozen=True, slots=True)
class Tenant:
    """One entry of the file. `tokens` are the SHA-256 digests of bearer tokens."""

    name: str
    tokens: tuple[bytes, ...] = ()
    certificates: tuple[str, ...] = ()
    admin: bool = False
    limits: Limits = field(default_factory=Limits)


class Directory:
    """All tenants of a file, and how to tell them apart."""

    def __init__(self, tenants: Iterable[Tenant]) -> None:
        self.tenants = {tenant.name: tenant for tenant in tenants}
        self._tokens: list[tuple[bytes, Caller]] = []
        self._certificates: dict[str, Caller] = {}
        for tenant in self.tenants.values():
            caller = Caller(tenant.name, tenant.admin)
            self._tokens += [(digest, caller) for digest in tenant.tokens]
            self._certificates |= dict.fromkeys(tenant.certificates, caller)

    @property
    def has_tokens(self) -> bool:
        return bool(self._tokens)

    def by_token(self, token: str) -> Caller:
        """Return whose token this is. Takes as long for a wrong one as for any right one. Raises Unauthenticated."""
        presented = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        found: Caller | None = None
        for known, caller in self._tokens:
            if compare_digest(known, presented):
                found = caller
        if found is None:
            raise Unauthenticated(
                "the token is not known here: it was withdrawn, or it is another server's; "
                "ask for a new one where the server is run"
            )
        return found

    def by_certificate(self, names: Iterable[str]) -> Caller:
        """Return whom a verified certificate with these names stands for. Raises Unauthenticated."""
        found = {self._certificates[name] for name in names if name in self._certificates}
        if len(found) == 1:
            return found.pop()
        if found:
            raise Unauthenticated(f"the certificate has the names of several tenants; {HOW_TO_SAY}")
        raise Unauthenticated(f"the certificate has the name of no tenant; {HOW_TO_SAY}")


def nobody(certificates: bool) -> Unauthenticated:
    """The error for a caller who shows nothing; `certificates`: one would have been looked at."""
    either = " (or a certificate)" if certificates else ""
    return Unauthenticated(f"this server asks for a token{either}; {HOW_TO_SAY}")


def bearer_token(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """Return the token in a call's metadata, or None. Raises Unauthenticated for what is no bearer token."""
    values = [value for key, value in metadata if key == "authorization"]
    if not values:
        return None
    scheme, _, token = str(values[0]).partition(" ")
    if len(values) > 1 or scheme.lower() != "bearer" or not token.strip():
        raise Unauthenticated(f"the 'authorization' metadata is not one bearer token; {HOW_TO_SAY}")
    return token.strip()


# Reading the file


def read_tenants(path: Path) -> Directory:
    """Read a file of tenants. Raises InvalidArgument that names what is wrong with it."""
    try:
        data = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise InvalidArgument(f"the file of tenants {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidArgument(f"the file of tenants {path} is not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument(f"the file of tenants {path} is not TOML: {error}") from None
    try:
        return _directory(data)
    except InvalidArgument as error:
        raise InvalidArgument(f"the file of tenants {path}: {error}") from None


def _directory(data: Mapping[str, Any]) -> Directory:
    _only(data, ("tenants",), "the file")
    entries = data.get("tenants")
    if not isinstance(entries, dict) or not entries:
        raise InvalidArgument("there is no tenant in it; `prefixcache token NAME` writes the lines for one")
    tenants = [_tenant(name, entry) for name, entry in entries.items()]
    _unshared(tenants, "token", lambda tenant: tenant.tokens)
    _unshared(tenants, "certificate name", lambda tenant: tenant.certificates)
    return Directory(tenants)


def _tenant(name: str, entry: object) -> Tenant:
    if not TENANT_NAME.fullmatch(name):
        raise InvalidArgument(f"{TENANT_NAME_RULE}, unlike {name[:80]!r}")
    place = f"tenant {name!r}"
    if not isinstance(entry, dict):
        raise InvalidArgument(f"{place} is not a table; write [tenants.{name}]")
    _only(entry, ("tokens", "certificates", "admin", "max_blocks", "max_in_flight", "tokens_per_minute"), place)
    if "tokens" not in entry and "certificates" not in entry:
        raise InvalidArgument(f"{place} has neither tokens nor certificates; `prefixcache token {name}` makes a token")
    admin = entry.get("admin", False)
    if not isinstance(admin, bool):
        raise InvalidArgument(f"admin of {place} must be true or false")
    return Tenant(
        name,
        tuple(_digest(text, f"tokens[{i}] of {place}") for i, text in enumerate(_strings(entry, "tokens", place))),
        tuple(_strings(entry, "certificates", place)),
        admin,
        Limits(
            _blocks(entry.get("max_blocks"), place),
            _count(entry.get("max_in_flight"), f"max_in_flight of {place}"),
            _count(entry.get("tokens_per_minute"), f"tokens_per_minute of {place}"),
        ),
    )


def _only(table: Mapping[str, Any], known: Iterable[str], place: str) -> None:
    for key in table:
        if key not in known:
            raise InvalidArgument(
                f"{place} has a key {key!r}, which has no meaning{closest(key, dict.fromkeys(known))}"
            )


def _strings(entry: Mapping[str, Any], key: str, place: str) -> list[str]:
    values = entry.get(key, [])
    if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
        raise InvalidArgument(f"{key} of {place} must be a list of texts in quotes")
    return values


def _digest(text: str, place: str) -> bytes:
    match = _TOKEN.fullmatch(text.lower())
    if match is None:
        raise InvalidArgument(
            f"{place} is not the hash of a token: 'sha256:' and 64 hexadecimal digits, as `prefixcache token` writes it"
        )
    return bytes.fromhex(match[1])


def _blocks(value: object, place: str) -> int | float | None:
    if isinstance(value, str) and (share := _SHARE.fullmatch(value.strip())) and 0 < float(share[1]) <= 100:
        return float(share[1]) / 100
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise InvalidArgument(f"max_blocks of {place} must be a number of blocks above 0, or a share such as '20%'")


def _count(value: object, place: str) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise InvalidArgument(f"{place} must be a whole number above 0")


def _unshared(tenants: Iterable[Tenant], what: str, of: Any) -> None:
    """Raise InvalidArgument if two entries have the same token or certificate name, or one has it twice."""
    owners: dict[object, str] = {}
    for tenant in tenants:
        for value in of(tenant):
            if value in owners:
                both = f"tenants {owners[value]!r} and {tenant.name!r}"
                raise InvalidArgument(f"a {what} is there twice: of {both}; every one belongs to one tenant, once")
            owners[value] = tenant.name
