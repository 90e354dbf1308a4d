"""Certificates: silos trust what the authority signed, whichever it is, and nothing else."""

from __future__ import annotations

import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_public_key

from foedus.deploy import certificates
from foedus.errors import RunError

HOSTS = ["coordinator.example", "127.0.0.1", "::1"]


@pytest.fixture
def tls(tmp_path: Path) -> Path:
    certificates.make(tmp_path / "tls", HOSTS, "a federation")
    return tmp_path / "tls"


def greet(authority: bytes, tls: Path, host: str) -> None:
    """A TLS 1.3 handshake in memory. Raises `ssl.SSLError` when the silo does not trust the server."""
    trust = ssl.create_default_context(cadata=authority.decode())
    trust.verify_flags |= ssl.VERIFY_X509_STRICT
    shows = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    shows.load_cert_chain(tls / "server.crt", tls / "server.key")
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    silo, server = trust.wrap_bio(down, up, server_hostname=host), shows.wrap_bio(up, down, server_side=True)
    for end in (silo, server, silo, server):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            pass


def test_silos_trust_the_server_under_each_of_its_hosts_and_under_no_other(tls):
    authority = (tls / "ca.crt").read_bytes()
    for host in HOSTS:
        greet(authority, tls, host)
    with pytest.raises(ssl.SSLCertVerificationError, match="[Hh]ostname"):
        greet(authority, tls, "elsewhere.example")


def test_a_rotated_certificate_is_another_one_that_silos_trust_as_before(tls):
    authority, before = (tls / "ca.crt").read_bytes(), (tls / "server.crt").read_bytes()
    certificates.rotate(tls)
    assert (tls / "server.crt").read_bytes() != before
    assert (tls / "ca.crt").read_bytes() == authority
    assert certificates.served(tls) == HOSTS
    greet(authority, tls, HOSTS[0])
    certificates.rotate(tls, ["new.example"])
    greet(authority, tls, "new.example")


def test_the_server_of_another_federation_is_not_trusted(tls, tmp_path):
    certificates.make(tmp_path / "other", HOSTS, "a federation")
    with pytest.raises(ssl.SSLCertVerificationError):
        greet((tls / "ca.crt").read_bytes(), tmp_path / "other", HOSTS[0])


def test_private_keys_are_for_their_owner_only(tls):
    certificates.keep_node_key(tls)
    certificates.rotate(tls)
    for name in ("ca.key", "server.key", "node.key"):
        assert stat.S_IMODE((tls / name).stat().st_mode) == 0o600
    assert not list(tls.glob("*.new"))


def test_an_authority_and_a_node_key_are_never_overwritten(tls):
    with pytest.raises(RunError, match="rotate"):
        certificates.make(tls, HOSTS, "again")
    certificates.keep_node_key(tls)
    with pytest.raises(RunError, match="knows this silo by it"):
        certificates.keep_node_key(tls)


def test_an_operator_is_warned_a_month_before_anything_expires(tls):
    ends = certificates.expiry(tls)
    assert ends["server"] < ends["ca"]
    assert certificates.warnings(tls) == []
    soon = certificates.warnings(tls, ends["server"] - timedelta(days=29))
    assert soon == [f"The server's certificate expires on {ends['server']:%Y-%m-%d}: rotate it."]
    assert len(certificates.warnings(tls, datetime.now(UTC) + timedelta(days=5000))) == 2


def test_a_node_key_is_of_the_curve_that_flower_asks_for():
    private, public = certificates.node_key()
    assert public.startswith("ecdsa-sha2-nistp384 ")
    assert load_pem_private_key(private, None).public_key() == load_ssh_public_key(public.encode())


def test_what_is_missing_or_mixed_up_is_named(tls, tmp_path):
    with pytest.raises(RunError, match="foedus init"):
        certificates.rotate(tmp_path / "nowhere")
    with pytest.raises(RunError, match="Name at least one"):
        certificates.rotate(tls, [])
    with pytest.raises(RunError, match="Leave out the port"):
        certificates.rotate(tls, ["späte.example"])
    (tls / "ca.key").write_bytes((tls / "server.key").read_bytes())
    with pytest.raises(RunError, match="same backup"):
        certificates.rotate(tls)
