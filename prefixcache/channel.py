"""The connection of a client: its options, and statuses turned back into errors."""

from __future__ import annotations

from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from prefixcache import errors
from prefixcache.errors import DeadlineExceeded, PrefixCacheError, ResourceExhausted

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

# HealthCheckResponse{status: SERVING}. The health service is called with plain bytes, so
# that a client needs no package for it; an empty request asks for the whole server.
HEALTH = "/grpc.health.v1.Health/Check"
SERVING = b"\x08\x01"
HEALTH_INTERVAL = 0.1

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
            return errors.Unavailable(f"no answer from {target}: {details}")
    kind = _ERRORS.get(code.name)
    return kind(details) if kind is not None else PrefixCacheError(f"{target} answered {code.name}: {details}")


def _retry_after(error: Any) -> float | None:
    """Return the seconds in the RetryInfo of a status, if it has one."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.RetryInfo()
                if detail.Unpack(info):
                    return float(info.retry_delay.ToNanoseconds() / 1e9)
    return None


def heard_from(error: Any, before: str) -> str:
    """What a failed health check says about the server; nothing new if it merely took too long."""
    late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    return before if late else error.details() or before


def not_ready(target: str, timeout: float | None, heard: str) -> DeadlineExceeded:
    return DeadlineExceeded(f"the server at {target} was not ready within {timeout} seconds: {heard}")
