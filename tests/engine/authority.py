"""Certificates for tests, made by the `openssl` command as an operator would make them."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from prefixcache.channel import TLS

KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True)
class Signed:
    """A certificate and its key, as files."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates with a key of its own; everything lies in one directory."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self._directory = directory
        own = self._make(name, f"/CN={name}")
        self.certificate, self._key = own.certificate, own.key

    def sign(self, name: str, *alternatives: str, common_name: str = "") -> Signed:
        """Make a certificate with alternative names such as DNS:example.com; `name` is that of its files."""
        extra = ["-CA", str(self.certificate), "-CAkey", str(self._key)]
        if alternatives:
            extra += ["-addext", f"subjectAltName={','.join(alternatives)}"]
        return self._make(name, f"/CN={common_name or name}", *extra)

    def server(self, name: str = "server") -> Signed:
        """Make a certificate for this machine."""
        return self.sign(name, "DNS:localhost", "IP:127.0.0.1")

    def tls(self, client: Signed | None = None) -> TLS:
        """Return how a client connects that trusts this authority, with a certificate if one is given."""
        if client is None:
            return TLS(ca=self.certificate)
        return TLS(ca=self.certificate, certificate=client.certificate, key=client.key)

    def _make(self, name: str, subject: str, *extra: str) -> Signed:
        signed = Signed(self._directory / f"{name}.pem", self._directory / f"{name}.key")
        files = ("-out", str(signed.certificate), "-keyout", str(signed.key))
        command = ["openssl", "req", "-x509", *KEY, *files, "-subj", subject, "-days", "2", *extra]
        subprocess.run(command, check=True, capture_output=True)
        return signed
