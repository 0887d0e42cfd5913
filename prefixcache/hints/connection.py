"""From a URL to a Redis client: TLS, ACL users, Sentinel, Cluster.

redis://[user:password@]host[:port][/database]
rediss://...?ssl_ca_certs=FILE              the same with TLS; also ssl_certfile, ssl_keyfile, ssl_check_hostname
unix:///path/to/socket
redis+cluster://host:port,host:port         also rediss+cluster://
redis+sentinel://host:port,host:port/service[/database]   also rediss+sentinel://
    ?sentinel_username=...&sentinel_password=...          what the sentinels ask for, if they do

Special characters in a name or a password are percent-encoded. Nothing here tries
anything twice: who asks Redis decides whether there is time for that.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha1
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import parse_qsl, quote, unquote

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from redis.exceptions import TimeoutError as RedisTimeoutError

from prefixcache.errors import InvalidArgument

AnyRedis: TypeAlias = Redis | RedisCluster

REDIS_PORT = 6379
SENTINEL_PORT = 26379

_SCHEME = re.compile(r"(redis|rediss)(\+cluster|\+sentinel)?|unix")
_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_SENTINEL_OPTIONS = ("sentinel_username", "sentinel_password")
_HIDDEN = "***"


class NoHints(Exception):
    """Redis cannot be asked now; the message says why."""


@dataclass(frozen=True, slots=True)
class _Place:
    """What a URL says."""

    kind: str  # "", "cluster", "sentinel" or "unix"
    tls: bool
    hosts: list[tuple[str, int]]
    path: str
    username: str | None
    password: str | None = field(repr=False)
    options: dict[str, str] = field(repr=False)


def open_redis(url: str, *, timeout: float, username: str | None = None, password: str | None = None) -> AnyRedis:
    """Return a client for the Redis at a URL; it connects when it is used.

    No connection and no answer is waited for longer than `timeout` seconds. Name and
    password given here are stronger than those in the URL. Raises InvalidArgument if the
    URL is of no use. To be closed by `close`.
    """
    place = _parse(url)
    common: dict[str, Any] = {
        "username": place.username if username is None else username,
        "password": place.password if password is None else password,
        **_limits(timeout),
        **_tls(place),
    }
    if place.kind == "unix":
        return Redis(unix_socket_path=place.path, **common)
    if place.kind == "cluster":
        if place.path:
            raise InvalidArgument(f"{shown(url)} names a database, and a Redis Cluster has only one: leave it out")
        nodes = [ClusterNode(host, port) for host, port in place.hosts]
        return RedisCluster(startup_nodes=nodes, require_full_coverage=False, **common)
    if place.kind == "sentinel":
        return _master(url, place, timeout, common)
    host, port = place.hosts[0]
    return Redis(host=host, port=port, db=_database(url, place.path), **common)


async def close(redis: AnyRedis) -> None:
    """Close a client and all of its connections."""
    await redis.aclose()
    if isinstance(redis, Redis) and isinstance(redis.connection_pool, SentinelConnectionPool):
        await redis.connection_pool.sentinel_manager.aclose()


def shown(url: str) -> str:
    """Return a URL without its passwords, for messages and logs."""
    scheme, found, rest = url.partition("://")
    if not found:
        return _HIDDEN
    address, _, query = rest.partition("?")
    user, at, hosts = address.rpartition("@")
    if "@" in query:  # a password with a question mark that was not encoded
        user, at, hosts, query = "", "@", query.rpartition("@")[2], ""
    name, colon, _ = user.partition(":")
    hidden = f"{name}:{_HIDDEN}" if colon or not name else name
    return f"{scheme}://{hidden}@{hosts}" if at else f"{scheme}://{hosts}"


async def call(redis: AnyRedis, script: str, keys: Sequence[str], arguments: Sequence[str | bytes | int]) -> Any:
    """Run a script inside Redis. Costs a second round trip if Redis does not have it yet."""
    try:
        return await redis.execute_command("EVALSHA", _digest(script), len(keys), *keys, *arguments)
    except NoScriptError:
        return await redis.execute_command("EVAL", script, len(keys), *keys, *arguments)


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Raise NoHints for whatever keeps Redis from being asked in the block; `where` is a URL as `shown`."""
    try:
        yield
    except (RedisError, RedisClusterException, OSError, EOFError) as error:
        raise NoHints(f"Redis at {where} {_reason(error)}") from error


async def end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks that may be asking Redis, and return when they have ended.

    A cancellation that meets a timeout of zero, which redis-py has, is lost: then once more.
    """
    going_on = set(tasks)
    while going_on:
        for task in going_on:
            task.cancel()
        _, going_on = await asyncio.wait(going_on, timeout=0.02)


@cache
def _digest(script: str) -> str:
    return sha1(script.encode(), usedforsecurity=False).hexdigest()


def _limits(timeout: float) -> dict[str, Any]:
    return {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,  # no HELLO, which a user may not be allowed to say
        "driver_info": None,  # no CLIENT SETINFO either
    }


def _tls(place: _Place) -> dict[str, Any]:
    if not place.tls:
        return {}
    options: dict[str, Any] = {name: value for name, value in place.options.items() if name in _FILES}
    if "ssl_check_hostname" in place.options:
        options["ssl_check_hostname"] = place.options["ssl_check_hostname"] == "true"
    return {"ssl": True, **options}


def _master(url: str, place: _Place, timeout: float, common: dict[str, Any]) -> Redis:
    service, _, database = place.path.partition("/")
    if not service:
        raise InvalidArgument(
            f"{shown(url)} does not say which service the sentinels watch: redis+sentinel://host:26379/SERVICE"
        )
    own = {
        "username": place.options.get("sentinel_username"),
        "password": place.options.get("sentinel_password"),
        **_limits(timeout),
        **_tls(place),
    }
    sentinel = Sentinel(place.hosts, sentinel_kwargs=own)  # type: ignore[no-untyped-call]
    master: Redis = sentinel.master_for(unquote(service), db=_database(url, database), **common)
    return master


def _parse(url: str) -> _Place:
    scheme, found, rest = url.partition("://")
    if not found or not _SCHEME.fullmatch(scheme):
        raise InvalidArgument(
            f"{shown(url)} is no URL of a Redis: it begins with redis://, rediss://, unix://, redis+cluster:// "
            "or redis+sentinel://"
        )
    address, _, query = rest.partition("?")
    if "@" in query:
        raise InvalidArgument(
            f"{shown(url)} has a question mark in its password: percent-encode it, as %3F; and @ as %40, / as %2F"
        )
    user, at, location = address.rpartition("@")
    name, colon, password = user.partition(":")
    tls = scheme.startswith("rediss")
    kind = "unix" if scheme == "unix" else scheme.partition("+")[2]
    options = _options(url, query, tls, kind)
    secrets = (unquote(name) or None if at else None, unquote(password) if colon else None)
    if kind == "unix":
        if not location.startswith("/"):
            raise InvalidArgument(f"{shown(url)} does not name a socket: unix:///path/to/socket")
        return _Place(kind, tls, [], unquote(location), *secrets, options)
    hosts, _, path = location.partition("/")
    port = SENTINEL_PORT if kind == "sentinel" else REDIS_PORT
    places = [_host(url, host, port) for host in hosts.split(",")]
    if not kind and len(places) > 1:
        raise InvalidArgument(
            f"{shown(url)} names several hosts: say what they are, redis+cluster:// or redis+sentinel://"
        )
    return _Place(kind, tls, places, path, *secrets, options)


def _host(url: str, text: str, default: int) -> tuple[str, int]:
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:]+))(?::(\d{1,5}))?", text)
    port = int(found[3] or default) if found else 0
    if not found or not 0 < port < 65536:
        raise InvalidArgument(f"{shown(url)} is of no use: there is no host, or no valid port, in it")
    return found[1] or unquote(found[2]), port


def _database(url: str, path: str) -> int:
    if path and not path.isdecimal():
        raise InvalidArgument(f"{shown(url)} ends in something that is not the number of a database")
    return int(path or 0)


def _options(url: str, query: str, tls: bool, kind: str) -> dict[str, str]:
    known = [*((*_FILES, "ssl_check_hostname") if tls else ()), *(_SENTINEL_OPTIONS if kind == "sentinel" else ())]
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name, value in options.items():
        if name not in known:
            allowed = f"there are {', '.join(known)}" if known else "it can have none (those for TLS need rediss://)"
            raise InvalidArgument(f"{shown(url)} has an option {quote(name)[:40]!r} that is not known: {allowed}")
        if name in _FILES and not Path(value).is_file():
            raise InvalidArgument(f"{name}={value} of {shown(url)} is not a file")
        if name == "ssl_check_hostname" and value not in ("true", "false"):
            raise InvalidArgument(f"ssl_check_hostname of {shown(url)} is {value!r}; it is true or false")
    return options


_SAID = {
    "NOAUTH": "asks for a password: put it in the URL, redis://user:password@host",
    "LOADING": "is loading its data and does not answer yet",
    "MASTERDOWN": "is a replica that has lost its master",
    "NOREPLICAS": "takes no writes, since it has too few replicas",
    "MISCONF": "takes no writes, since it cannot save its data",
    "CLUSTERDOWN": "is a Cluster that is down",
    "BUSY": "is busy with somebody's script",
    "OOM": "is out of memory: give it more (maxmemory; docs/redis.md says how much), or let it evict",
    "WRONGPASS": "refuses this user name and password",
}


def _reason(error: Exception) -> str:
    """Return what goes on after "Redis at URL"."""
    said = _said(error)
    if isinstance(error, RedisTimeoutError | TimeoutError):
        return "does not answer in time"
    if isinstance(error, BusyLoadingError):
        return _SAID["LOADING"]
    if isinstance(error, OutOfMemoryError):
        return _SAID["OOM"]
    if "unauthenticated" in said:  # of a command that is long
        return _SAID["NOAUTH"]
    if isinstance(error, AuthenticationError):
        return _SAID["NOAUTH"] if "required" in said else _SAID["WRONGPASS"]
    if isinstance(error, NoPermissionError) or "NOPERM" in said or "can't run this command" in said:
        return f"does not allow its user what is needed; docs/redis.md has the ACL line ({said})"
    if isinstance(error, ReadOnlyError) or "READONLY" in said:
        return "is a read-only replica: name the one that takes writes, or the sentinels"
    if isinstance(error, MasterNotFoundError):
        return f"cannot be found by way of its sentinels ({said})"
    if isinstance(error, ResponseError):
        known = next((words for code, words in _SAID.items() if re.search(rf"\b{code}\b", said)), None)
        return known or f"answers with an error ({said})"
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"has a certificate that is not trusted, see ssl_ca_certs ({cause.verify_message})"
        if isinstance(cause, ssl.SSLError):
            return f"does not speak TLS as expected ({cause.reason or cause})"
        if isinstance(cause, ConnectionRefusedError):
            return "refuses connections: is it running there?"
        if isinstance(cause, FileNotFoundError):
            return "is not there: there is no such socket"
        if isinstance(cause, socket.gaierror):
            return "has a host name that is not known"
    return f"cannot be reached ({said})"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it came from, one after the other."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _said(error: Exception) -> str:
    """Return an error's own words, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
