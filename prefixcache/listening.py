"""The port of a gRPC server, whether that is an engine or a gateway."""

from __future__ import annotations

import grpc

from prefixcache.errors import FailedPrecondition

PING_MILLISECONDS = 10_000
"""A client who waits sends pings to learn whether the server is still there (every 30 seconds, see
`prefixcache.channel`). One who sends them more often than this is cut off."""


def options(max_request_bytes: int) -> list[tuple[str, int]]:
    """Return the options of a server that takes requests of at most so many bytes."""
    return [
        ("grpc.max_receive_message_length", max_request_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),  # a second server on the same port is an error
        ("grpc.http2.min_ping_interval_without_data_ms", PING_MILLISECONDS),
    ]


def open_port(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    """Listen at an address, in plaintext without `credentials`; return the port. Raises FailedPrecondition."""
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise FailedPrecondition(
            f"cannot listen on {address}: is another server running there? Choose another --port or --host"
        ) from error
