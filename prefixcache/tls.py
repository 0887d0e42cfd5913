"""The server's end of TLS: its certificate, read again when the files change.

A certificate is renewed every few weeks, by replacing files. So every handshake looks
at the files' times, and a new pair is used from then on. What cannot be used is logged,
and the old pair stays.
"""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc
import structlog

from prefixcache.errors import InvalidArgument
from prefixcache.files import Signature, signature

log = structlog.get_logger()


def server_credentials(certificate: str, key: str, client_ca: str = "") -> grpc.ServerCredentials | None:
    """Return what a port is opened with, None (plaintext) without a certificate.

    With a `client_ca`, callers must show certificates that it has signed. Raises
    InvalidArgument for files of no use.
    """
    if not certificate:
        return None
    return _Files(Path(certificate), Path(key), Path(client_ca) if client_ca else None).credentials()


class _Files:
    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._certificate = certificate
        self._key = key
        self._client_ca = client_ca
        self._seen = self._signature()

    def credentials(self) -> grpc.ServerCredentials:
        return grpc.dynamic_ssl_server_credentials(
            self._read(),
            self._changed,  # type: ignore[arg-type]  # None is for no change
            require_client_authentication=self._client_ca is not None,
        )

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the new files if they have changed and can be used. Called by gRPC, on a thread of its own."""
        signature = self._signature()
        if signature == self._seen:
            return None
        self._seen = signature
        try:
            changed = self._read()
        except InvalidArgument as error:
            log.error(f"the TLS files have changed and cannot be used, so the old ones stay in use: {error}")
            return None
        log.info("the TLS files have changed and are in use now")
        return changed

    def _read(self) -> grpc.ServerCertificateConfiguration:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self._certificate, self._key, password=_no_password)
        except (OSError, ValueError) as error:  # SSLError is an OSError
            raise InvalidArgument(
                f"tls_certificate {self._certificate} and tls_key {self._key} are of no use: {_reason(error)}; "
                "they must be a certificate and its unencrypted private key, in PEM"
            ) from None
        if self._client_ca is not None:
            try:
                context.load_verify_locations(self._client_ca)
            except OSError as error:
                raise InvalidArgument(
                    f"tls_client_ca {self._client_ca} is of no use: {_reason(error)}; "
                    "it must be the certificate in PEM of whoever signs the clients' certificates"
                ) from None
        pair = (self._key.read_bytes(), self._certificate.read_bytes())
        return grpc.ssl_server_certificate_configuration(
            [pair], None if self._client_ca is None else self._client_ca.read_bytes()
        )

    def _signature(self) -> tuple[Signature, ...]:
        return tuple(signature(path) for path in (self._certificate, self._key, self._client_ca) if path is not None)


def _no_password() -> str:
    raise ValueError("the key is encrypted")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason.lower().replace("_", " ") if error.reason else "it is not PEM"
    return (error.strerror if isinstance(error, OSError) else str(error)) or str(error)
