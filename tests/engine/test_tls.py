"""Encrypted connections with certificates that are made here: who trusts whom, and what changes without a restart."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from engine.tenants import suffix_of, tenant_of
from prefixcache.channel import TLS
from prefixcache.client import AsyncClient, Client
from prefixcache.errors import InvalidArgument, Unauthenticated, Unavailable
from prefixcache.local import LocalServer
from tests.engine.authority import Authority, Signed
from tests.engine.serving import PaperEngine, RunningServer
from tests.engine.tenancy import entry, write
from tests.serving import command, environment


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def own(authority: Authority) -> Signed:
    """The server's certificate."""
    return authority.server()


@pytest.fixture(scope="module")
def encrypted(own: Signed) -> Iterator[RunningServer]:
    """A server with TLS and without tenants."""
    with RunningServer(PaperEngine(), tls_certificate=str(own.certificate), tls_key=str(own.key)) as server:
        yield server


# The server's certificate


async def test_both_clients_speak_tls_with_whom_they_trust(encrypted: RunningServer, authority: Authority) -> None:
    """By the address and by the name in the certificate."""
    with Client(encrypted.address, tls=authority.tls()) as client:
        client.wait_until_ready(timeout=10)
        assert client.generate("x", max_tokens=1, timeout=10).usage.completion_tokens == 1
    async with AsyncClient(f"localhost:{encrypted.server.port}", tls=authority.tls()) as client:
        await client.wait_until_ready(timeout=10)
        assert (await client.generate("x", max_tokens=1, timeout=10)).usage.completion_tokens == 1


def test_whom_a_client_does_not_trust_it_does_not_talk_to(encrypted: RunningServer, tmp_path: Path) -> None:
    """Another authority's certificate, or the well-known authorities: the error says what to look at."""
    for tls in (Authority(tmp_path).tls(), True):
        with Client(encrypted.address, tls=tls) as client, pytest.raises(Unavailable, match=r"not trust.*see --ca"):
            client.model(timeout=10)


def test_plain_and_encrypted_ends_do_not_understand_each_other(encrypted: RunningServer, authority: Authority) -> None:
    """Neither end is left guessing why."""
    with Client(encrypted.address) as client, pytest.raises(Unavailable, match="does the server want TLS"):
        client.model(timeout=10)
    with (
        RunningServer(PaperEngine()) as plain,
        Client(plain.address, tls=authority.tls()) as client,
        pytest.raises(Unavailable, match="this client speaks TLS and the server does not"),
    ):
        client.model(timeout=10)


def test_the_environment_says_whom_to_trust(
    encrypted: RunningServer, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PREFIXCACHE_CA makes a client speak TLS; False is stronger."""
    monkeypatch.setenv("PREFIXCACHE_CA", str(authority.certificate))
    with Client(encrypted.address) as client:
        assert client.model(timeout=10).name == "paper"
    with Client(encrypted.address, tls=False) as client, pytest.raises(Unavailable):
        client.model(timeout=10)


def test_a_renewed_certificate_is_used_without_a_restart(authority: Authority, tmp_path: Path) -> None:
    """New connections get it as soon as it is there; what cannot be used is logged, and the old one stays."""
    other = Authority(tmp_path, "other")
    first, second = authority.server("first"), other.server("second")
    certificate, key = tmp_path / "used.pem", tmp_path / "used.key"

    def use(signed: Signed) -> None:
        certificate.write_bytes(signed.certificate.read_bytes())
        key.write_bytes(signed.key.read_bytes())

    def works(tls: TLS) -> bool:
        with Client(server.address, tls=tls) as client:
            try:
                return bool(client.model(timeout=10))
            except Unavailable:
                return False

    use(first)
    with RunningServer(PaperEngine(), tls_certificate=str(certificate), tls_key=str(key)) as server:
        assert works(authority.tls())
        use(second)
        assert works(other.tls())
        assert not works(authority.tls())
        with structlog.testing.capture_logs() as lines:
            key.write_text("nonsense")
            assert works(other.tls())
            assert works(other.tls())
        assert ["the old ones stay in use" in line["event"] for line in lines] == [True]
        use(first)
        assert works(authority.tls())


def test_files_of_no_use_prevent_the_start(authority: Authority, own: Signed, tmp_path: Path) -> None:
    """Missing, nonsense, a key of another certificate, a key with a password: each is named."""
    stranger = authority.sign("stranger")
    nonsense = tmp_path / "nonsense"
    nonsense.write_text("nonsense")
    locked = tmp_path / "locked.key"
    subprocess.run(
        ["openssl", "ec", "-in", own.key, "-out", locked, "-aes256", "-passout", "pass:x"],
        check=True,
        capture_output=True,
    )
    files = {"tls_certificate": own.certificate, "tls_key": own.key}
    wrong: list[tuple[dict[str, Path], str]] = [
        ({"tls_certificate": tmp_path / "none"}, "are of no use: No such file"),
        ({"tls_key": nonsense}, "are of no use: "),
        ({"tls_key": stranger.key}, "are of no use: key values mismatch"),
        ({"tls_key": locked}, "are of no use: the key is encrypted"),
        ({"tls_client_ca": nonsense}, "tls_client_ca .* is of no use: "),
    ]
    for change, words in wrong:
        options = {name: str(path) for name, path in {**files, **change}.items()}
        with pytest.raises(InvalidArgument, match=words), RunningServer(PaperEngine(), **options):
            pass


# The client's certificate


@pytest.fixture(scope="module")
def mutual(authority: Authority, own: Signed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that wants a certificate of everybody, and knows three tenants by its names."""
    file = write(
        tmp_path_factory.mktemp("tenants") / "tenants.toml",
        entry("a", certificates='["a.example.com"]'),
        entry("b", certificates='["spiffe://example.com/b"]'),
        entry("c", certificates='["c"]', admin="true"),
    )
    options = {"tls_certificate": own.certificate, "tls_key": own.key, "tls_client_ca": authority.certificate}
    with RunningServer(PaperEngine(), tenants=file, **{name: str(path) for name, path in options.items()}) as server:
        yield server


def whose(server: RunningServer, tls: TLS, token: str = "") -> str:
    """Return whose prompts a caller's are, as the cache has them."""
    suffix = os.urandom(8).hex()
    with Client(server.address, token=token, tls=tls) as client:
        client.generate("a prompt of more than a block", max_tokens=1, namespace=suffix, timeout=10)
    stored = server.server.front.engine.loop.call(lambda scheduler: list(scheduler.cache.stored())).result(10)
    (tenant,) = {tenant_of(one.namespace) for one in stored if suffix_of(one.namespace) == suffix}
    return tenant


@pytest.mark.parametrize(
    ("common_name", "alternatives", "tenant"),
    [
        ("x", ["DNS:other.example.com", "DNS:a.example.com"], "a"),
        ("x", ["URI:spiffe://example.com/b"], "b"),
        ("c", [], "c"),
        ("c", ["DNS:other.example.com"], "c"),
    ],
)
def test_a_certificate_stands_for_the_tenant_of_its_name(
    mutual: RunningServer, authority: Authority, common_name: str, alternatives: list[str], tenant: str
) -> None:
    """Its common name or any alternative one; what is cached is that tenant's."""
    tls = authority.tls(authority.sign("client", *alternatives, common_name=common_name))
    assert whose(mutual, tls) == tenant


@pytest.mark.parametrize(
    ("common_name", "alternatives", "words"),
    [
        ("x", ["DNS:example.com"], "the certificate has the name of no tenant"),
        ("A.EXAMPLE.COM", [], "the certificate has the name of no tenant"),
        ("c", ["DNS:a.example.com"], "the certificate has the names of several tenants"),
    ],
)
def test_a_certificate_without_one_tenants_name_stands_for_nobody(
    mutual: RunningServer, authority: Authority, common_name: str, alternatives: list[str], words: str
) -> None:
    """However well it is signed."""
    tls = authority.tls(authority.sign("client", *alternatives, common_name=common_name))
    with Client(mutual.address, tls=tls) as client, pytest.raises(Unauthenticated, match=words):
        client.model(timeout=10)


def test_a_token_is_stronger_than_the_certificate(mutual: RunningServer, authority: Authority) -> None:
    """A proxy with a certificate of its own passes on whose token it was given; a wrong one is not overlooked."""
    tls = authority.tls(authority.sign("client", common_name="c"))
    assert whose(mutual, tls, token="a") == "a"
    with Client(mutual.address, token="wrong", tls=tls) as client, pytest.raises(Unauthenticated, match="not known"):
        client.model(timeout=10)


def test_without_a_certificate_of_the_authority_nobody_connects(
    mutual: RunningServer, authority: Authority, tmp_path: Path
) -> None:
    """None, another authority's, or one that an authority's client signed: the handshake fails, also for a token."""
    other = Authority(tmp_path, "other")
    forged = other.sign("forged", "DNS:a.example.com")
    for tls in (
        authority.tls(),
        TLS(ca=authority.certificate, certificate=forged.certificate, key=forged.key),
    ):
        with Client(mutual.address, token="a", tls=tls) as client, pytest.raises(Unavailable):
            client.model(timeout=10)


def test_a_certificate_without_its_key_is_refused(own: Signed, tmp_path: Path) -> None:
    """By the client, before it connects; so is a file that is not there."""
    with pytest.raises(InvalidArgument, match="belong together"):
        Client("127.0.0.1:5", tls=TLS(certificate=own.certificate))
    with pytest.raises(InvalidArgument, match=r"none.* cannot be read: No such file"):
        Client("127.0.0.1:5", tls=TLS(ca=tmp_path / "none"))


# As users have it: processes, files, environment


def test_the_command_line_over_tls_with_tokens(authority: Authority, own: Signed, tmp_path: Path) -> None:
    """`token` makes one, `serve` takes it, and every client command connects with files or the environment."""
    made = subprocess.run(command("token", "support"), env=environment(), capture_output=True, text=True, check=True)
    token_file = tmp_path / "support.token"
    token_file.write_text(made.stdout)
    lines = made.stderr[made.stderr.index("[tenants") :]
    server = LocalServer(
        *("--tenants", write(tmp_path / "tenants.toml", lines), "--cache-memory", "64MiB", "--threads", "1"),
        *("--tls-certificate", str(own.certificate), "--tls-key", str(own.key)),
        environment=environment(),
        tls=authority.tls(),
    )

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        line = command(*arguments, "--address", server.address)
        return subprocess.run(line, env=environment(**variables), capture_output=True, text=True, check=False)

    ca = ("--ca", str(authority.certificate))
    with server:
        assert run("stats", *ca, "--token-file", str(token_file)).returncode == 0
        variables = {"PREFIXCACHE_CA": str(authority.certificate), "PREFIXCACHE_TOKEN": made.stdout.strip()}
        assert run("lookup", "x", **variables).returncode == 0
        unknown = run("stats", *ca)
        assert unknown.returncode == 1
        assert unknown.stderr.startswith("error: this server asks for a token; ")
        plain = run("stats")
        assert plain.returncode == 1
        assert "does the server want TLS" in plain.stderr
        assert plain.stderr.count("\n") == unknown.stderr.count("\n") == 1
        assert made.stdout.strip() not in server.log()
