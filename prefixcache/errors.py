"""Every error a caller can meet, as one tree.

Each class names the gRPC status it travels as; `engine.wire` turns errors into
statuses and `prefixcache.client` turns statuses back into errors. A message says
what happened, what it means and what to do. Our own bugs are `assert`s, not these.
"""

from __future__ import annotations


class PrefixCacheError(Exception):
    """Base of all errors. `status` is the name of the gRPC status code it travels as."""

    status = "UNKNOWN"


class InvalidArgument(PrefixCacheError):
    """The request cannot be served as it is, now or later."""

    status = "INVALID_ARGUMENT"


class Unauthenticated(PrefixCacheError):
    """The server asks who is calling, and what it was shown is nothing it knows."""

    status = "UNAUTHENTICATED"


class PermissionDenied(PrefixCacheError):
    """The server knows who is calling, and that caller may not do this."""

    status = "PERMISSION_DENIED"


class NotFound(PrefixCacheError):
    """The thing named does not exist here, such as another model."""

    status = "NOT_FOUND"


class FailedPrecondition(PrefixCacheError):
    """The request is well formed, but this server or model cannot do it."""

    status = "FAILED_PRECONDITION"


class OutOfRange(PrefixCacheError):
    """The events to go on from are no longer kept, or were not read in time: begin again with a snapshot."""

    status = "OUT_OF_RANGE"


QUEUE_FULL = "QUEUE_FULL"
"""The reason of a ResourceExhausted that is this server's own: another replica may have room."""

REASON_DOMAIN = "prefixcache"
"""The domain of such reasons in a google.rpc.ErrorInfo."""

STATUS_DETAILS = "grpc-status-details-bin"
"""The trailing metadata in which a status says more, as a google.rpc.Status."""


class ResourceExhausted(PrefixCacheError):
    """A limit was reached. `retry_after` (seconds) says when to try again, if that helps; `reason` is for programs."""

    status = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after: float | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.reason = reason


class DeadlineExceeded(PrefixCacheError):
    """The caller's deadline passed before the answer was complete."""

    status = "DEADLINE_EXCEEDED"


class Cancelled(PrefixCacheError):
    """The caller gave the request up."""

    status = "CANCELLED"


class Unavailable(PrefixCacheError):
    """No server answers, or it is shutting down, or its engine has failed."""

    status = "UNAVAILABLE"


class Internal(PrefixCacheError):
    """A bug on our side; the server's log has the details."""

    status = "INTERNAL"
