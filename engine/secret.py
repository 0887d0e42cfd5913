"""The deployment's secret, which enters the hashes by which blocks are named."""

from __future__ import annotations

from pathlib import Path

import structlog

from prefixcache.errors import InvalidArgument
from prefixcache.files import open_to_everybody

MIN_BYTES = 16

log = structlog.get_logger()


def read_secret(file: str) -> bytes:
    """Return the bytes of a file without the spaces around them, b"" if none is named. Raises InvalidArgument."""
    if not file:
        return b""
    try:
        secret = Path(file).read_bytes().strip()
    except OSError as error:
        raise InvalidArgument(f"the secret in {file} cannot be read: {error.strerror}") from None
    if len(secret) < MIN_BYTES:
        raise InvalidArgument(
            f"the secret in {file} has {len(secret)} bytes and could be guessed; it must have at least {MIN_BYTES}: "
            f"openssl rand -hex 32 > {file}"
        )
    return secret


def warn_of_secret(file: str, *, published: bool) -> None:
    """Log what is unsafe about the secret of a server, whose hashes may be `published`."""
    if file:
        if what := open_to_everybody(Path(file)):
            log.warning(f"everybody on this machine may {what} the secret of the deployment: chmod 600 {file}")
    elif published:
        log.warning(
            "hashes in Redis have no secret: whoever can read them could find out, by trying, whether a prompt was "
            "sent. Give all replicas the same --secret-file to prevent it"
        )
