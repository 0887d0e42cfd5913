"""The connection of a client: its options, who it is for, and statuses turned back into errors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from prefixcache import errors
from prefixcache.errors import STATUS_DETAILS, DeadlineExceeded, InvalidArgument, PrefixCacheError, ResourceExhausted
from prefixcache.hosts import is_loopback
from prefixcache.results import REPLICA

M = TypeVar("M", bound=Message)

CHANNEL_OPTIONS = (
    # Notice within a minute that the other side of a long stream is gone.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # The server limits what it accepts; the token ids of a long text may be longer than the text.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A server that is being started is tried again soon.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)

TOKEN_VARIABLE = "PREFIXCACHE_TOKEN"
CA_VARIABLE = "PREFIXCACHE_CA"
CERTIFICATE_VARIABLE = "PREFIXCACHE_CERTIFICATE"
KEY_VARIABLE = "PREFIXCACHE_KEY"

# HealthCheckResponse{status: SERVING}. The health service is called with plain bytes, so
# that a client needs no package for it; an empty request asks for the whole server.
HEALTH = "/grpc.health.v1.Health/Check"
SERVING = b"\x08\x01"
HEALTH_INTERVAL = 0.1


@dataclass(frozen=True, slots=True)
class TLS:
    """The files (PEM) of an encrypted connection.

    `ca` is the certificate of whoever signed the server's; without it, the well-known
    authorities that gRPC brings are trusted. `certificate` and `key` are the client's own,
    for a server that asks for one.
    """

    ca: str | os.PathLike[str] | None = None
    certificate: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files. Raises InvalidArgument if one cannot be read."""
        if (self.certificate is None) != (self.key is None):
            raise InvalidArgument("a client's certificate and its key belong together: give both")
        return grpc.ssl_channel_credentials(_pem(self.ca), _pem(self.key), _pem(self.certificate))


@dataclass(frozen=True, slots=True)
class Connection:
    """What `Client` and `AsyncClient` open their channel with; `credentials` is None for plaintext."""

    credentials: grpc.ChannelCredentials | None
    metadata: tuple[tuple[str, str], ...] = ()

    def authorized(self, channel: Any) -> Any:
        """Return a channel for stubs, whose calls say who makes them."""
        return _Authorized(channel, self.metadata) if self.metadata else channel


def connection(
    target: str,
    token: str | None,
    tls: TLS | bool | None,
    environment: Mapping[str, str] | None = None,
    *,
    replica: str = "",
) -> Connection:
    """Return how to connect to `target`; what is None comes from the environment. Through a gateway, to one `replica`.

    Raises InvalidArgument for a token that cannot be one, and for one that would cross a
    network unencrypted, unless `tls` is False: then the caller has said that it may.
    """
    source = os.environ if environment is None else environment
    if token is None:
        token = source.get(TOKEN_VARIABLE, "")
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise InvalidArgument("the token has characters that no token has; was a line break or a quote copied with it?")
    if tls is None:
        tls = tls_of(source)
    if token and tls is None and not _stays_here(target):
        raise InvalidArgument(
            f"the token would cross the network to {target} unencrypted, for others to read: connect with TLS "
            "(tls=True or TLS(ca=...); --tls or --ca), or say that it may (tls=False; --no-tls) if something else "
            "encrypts the way"
        )
    credentials = (TLS() if tls is True else tls).credentials() if tls else None
    who = (("authorization", f"Bearer {token}"),) if token else ()
    return Connection(credentials, (*who, (REPLICA, replica)) if replica else who)


def tls_of(environment: Mapping[str, str]) -> TLS | None:
    """Return the files that an environment names for encrypted connections, None if it names none."""
    given = [environment.get(name) or None for name in (CA_VARIABLE, CERTIFICATE_VARIABLE, KEY_VARIABLE)]
    return TLS(*given) if any(given) else None


class _Authorized:
    """A channel, sync or aio, that adds metadata to every call."""

    def __init__(self, channel: Any, metadata: tuple[tuple[str, str], ...]) -> None:
        self._channel = channel
        self._metadata = metadata

    def __getattr__(self, name: str) -> Any:
        kind = getattr(self._channel, name)  # unary_unary and the others that stubs ask for
        return lambda *arguments, **options: partial(kind(*arguments, **options), metadata=self._metadata)


def _stays_here(target: str) -> bool:
    """Whether a gRPC target names this machine itself."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    host, _, _ = target.rpartition("/")[2].removeprefix("ipv4:").removeprefix("ipv6:").rpartition(":")
    return is_loopback(host)


def _pem(path: str | os.PathLike[str] | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidArgument(f"the file {path} cannot be read: {error.strerror}") from None


_ERRORS: dict[str, type[PrefixCacheError]] = {
    error.status: error for error in PrefixCacheError.__subclasses__() if error is not ResourceExhausted
}


def translated(error: Any, target: str) -> PrefixCacheError:
    """Return the error of our tree for the RpcError of a call, sync or aio (they share methods, but no class)."""
    code, details = error.code(), error.details() or "no reason given"
    match code:
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return ResourceExhausted(details, _retry_after(error))
        case grpc.StatusCode.DEADLINE_EXCEEDED if details == "Deadline Exceeded":  # noticed here, not there
            return DeadlineExceeded(f"no complete answer from {target} within the timeout")
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:  # not cancelled here, so the other side is going
            answered = any(key == REPLICA for key, _ in error.trailing_metadata() or ())
            return errors.Unavailable(f"no answer from {target}: {details}{'' if answered else _about_tls(details)}")
    kind = _ERRORS.get(code.name)
    return kind(details) if kind is not None else PrefixCacheError(f"{target} answered {code.name}: {details}")


def _retry_after(error: Any) -> float | None:
    """Return the seconds in the RetryInfo of a status, if it has one."""
    for info in details_of(error.trailing_metadata() or (), error_details_pb2.RetryInfo):
        return float(info.retry_delay.ToNanoseconds() / 1e9)
    return None


def details_of(trailing: Iterable[tuple[str, str | bytes]], kind: type[M]) -> Iterator[M]:
    """Return the details of one kind that a status has in its trailing metadata."""
    for key, value in trailing:
        if key == STATUS_DETAILS and isinstance(value, bytes):
            for detail in status_pb2.Status.FromString(value).details:
                info = kind()
                if detail.Unpack(info):
                    yield info


def _about_tls(details: str) -> str:
    """Return what to look at when an encrypted connection was not made; empty if that is not what happened."""
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return " (its certificate is signed by someone this client does not trust, or is another host's: see --ca)"
    if "WRONG_VERSION_NUMBER" in details:
        return " (this client speaks TLS and the server does not)"
    if "Socket closed" in details or "GOAWAY" in details:
        return " (does the server want TLS, or a client's certificate?)"
    return ""


def heard_from(error: Any, before: str) -> str:
    """What a failed health check says about the server; nothing new if it merely took too long."""
    late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    return before if late else error.details() or before


def not_ready(target: str, timeout: float | None, heard: str) -> DeadlineExceeded:
    return DeadlineExceeded(f"the server at {target} was not ready within {timeout} seconds: {heard}")
