"""Lets callers in: who they are, what they may use, and the file that says so.

The file is read at the start and again when it changes; if the new one cannot be used,
the old one stays in force. Nothing is read while a call waits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import structlog

from engine.authentication import Directory, Tenant, bearer_token, nobody, read_tenants
from engine.quotas import Quota
from engine.tenants import ANONYMOUS, Caller
from prefixcache.errors import InvalidArgument, Unauthenticated
from prefixcache.files import Signature, open_to_everybody, signature

REPORT_SECONDS = 60.0

log = structlog.get_logger()


class Gate:
    """Used in one event loop. Without a file everybody is the anonymous tenant, who may do everything.

    `certificates`: callers show certificates that were verified. `open` reads the file.
    """

    def __init__(self, file: str, *, certificates: bool) -> None:
        self._path = Path(file) if file else None
        self._certificates = certificates
        self._directory: Directory | None = None
        self._quotas = {} if file else {ANONYMOUS: Quota()}
        self._read_as: Signature = None
        self._seen_as: Signature = None
        self._refused = 0
        self._reported: float | None = None

    def open(self) -> None:
        """Read the file, if there is one. Raises InvalidArgument if it cannot be used."""
        if self._path is not None:
            self._read_as = self._seen_as = signature(self._path)
            self._use(read_tenants(self._path))

    @property
    def tenants(self) -> list[Tenant]:
        """The tenants of the file."""
        return [] if self._directory is None else list(self._directory.tenants.values())

    def caller(self, context: grpc.aio.ServicerContext[Any, Any]) -> Caller:
        """Return who makes a call: whose token it has or, without a token, whose certificate.

        Raises Unauthenticated. A wrong token is refused, whatever the certificate says.
        """
        if self._path is None:
            return Caller()
        assert self._directory is not None, "calls come in before the gate was opened"
        token = bearer_token(context.invocation_metadata() or ())
        if token is not None:
            return self._directory.by_token(token)
        if not self._certificates:
            raise nobody(certificates=False)
        shown = context.auth_context()
        names = (*shown.get("x509_common_name", ()), *shown.get("x509_subject_alternative_name", ()))
        return self._directory.by_certificate(name.decode(errors="replace") for name in names)

    def quota(self, caller: Caller) -> Quota:
        """Return what a caller's tenant has used of its limits. Raises Unauthenticated for one that is gone."""
        quota = self._quotas.get(caller.tenant)
        if quota is None:
            raise Unauthenticated("you were taken from the file of tenants; ask where the server is run")
        return quota

    def refused(self, error: Unauthenticated, peer: str, now: float) -> None:
        """Log a refused call; of many in a minute, only the first and how many more there were."""
        self._refused += 1
        if self._reported is None or now - self._reported >= REPORT_SECONDS:
            log.warning(f"a caller was refused: {error}", peer=peer, refused_since_last_line=self._refused)
            self._refused, self._reported = 0, now

    # Following the file

    def changed(self) -> bool:
        """Whether the file is another one than was read, and no longer being written: the same at two looks."""
        if self._path is None:
            return False
        before, self._seen_as = self._seen_as, signature(self._path)
        return self._seen_as not in (None, self._read_as) and self._seen_as == before

    def expire(self) -> None:
        """Have the file read again at the next look, also if it seems the same."""
        self._read_as = None

    def reload(self) -> list[str] | None:
        """Read the file again; return the names of tenants that are gone, or None if the old one stays in force."""
        if self._path is None:
            return None
        before = self.tenants
        self._read_as = signature(self._path)
        try:
            self._use(read_tenants(self._path))
        except InvalidArgument as error:
            log.error(f"the tenants stay as they were: {error}")
            return None
        gone = [tenant.name for tenant in before if tenant.name not in self._names]
        for name in gone:
            del self._quotas[name]
        log.info("the file of tenants was read again", tenants=len(self.tenants), gone=len(gone))
        return gone

    @property
    def _names(self) -> set[str]:
        return {tenant.name for tenant in self.tenants}

    def _use(self, directory: Directory) -> None:
        assert self._path is not None
        self._directory = directory
        for tenant in self.tenants:
            quota = self._quotas.get(tenant.name)
            if quota is None:
                self._quotas[tenant.name] = Quota(tenant.limits)
            else:
                quota.limit(tenant.limits)
        self._warn(self._path)

    def _warn(self, path: Path) -> None:
        if what := open_to_everybody(path):
            log.warning(f"everybody on this machine may {what} the file of tenants: chmod 600 {path}")
        if not self._certificates:
            for tenant in self.tenants:
                if tenant.certificates:
                    log.warning(
                        f"tenant {tenant.name} has names of certificates, which nobody can show without tls_client_ca"
                    )
