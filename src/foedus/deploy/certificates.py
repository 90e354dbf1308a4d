"""The keys of the transport: a certificate authority of the federation's own, the server's certificate, nodes' keys.

    ca.crt ca.key           signs server certificates, and nothing else; silos get ca.crt with their invitation
    server.crt server.key   what the SuperLink shows; a new one at any time, and no silo notices
    node.key node.pub       of one silo; the coordinator admits node.pub, and revokes it (`engines/flower.py`)

All are elliptic-curve keys: P-256 for TLS, P-384 for nodes, as Flower asks. Private keys are for their owner's eyes
only, and a vault seals those that Flower does not read from their files. These keys protect the way; what is said is
signed again, with keys that Flower never sees (`governance/`).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..errors import RunError
from ..governance.disk import write_whole
from ..governance.vault import Vault, is_sealed, kept

CA_DAYS, SERVER_DAYS = 3650, 397
"""How long they hold. A server's is kept short, for nobody has to take notice when it is changed."""
SOON = timedelta(days=30)
"""How long before it expires a certificate is warned of."""
SKEW = timedelta(minutes=10)
"""How far a silo's clock may be behind."""

CA, SERVER = "ca", "server"


def make(folder: Path, hosts: Sequence[str], name: str, vault: Vault | None = None) -> None:
    """A new authority for the federation called `name`, and a certificate for the server that silos reach under these
    `hosts`: names or addresses. `vault`: seals the authority's key. Raises `RunError` where there is an authority
    already: silos trust it.
    """
    if (folder / f"{CA}.key").exists():
        do = "Silos trust the one that is there; `rotate` makes a new server certificate."
        raise RunError("a folder without a certificate authority", "one that has it", do, where=str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(f"{name} (Foedus CA)")
    usage = _usage(sign_certificates=True)
    certificate = (
        _builder(subject, subject, key.public_key(), key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    _keep(folder, CA, certificate, key, vault)
    rotate(folder, hosts, vault)


def rotate(folder: Path, hosts: Sequence[str] | None = None, vault: Vault | None = None) -> None:
    """A new key and certificate for the server, for the same hosts as before unless others are given. The SuperLink
    shows it when it is started anew; silos trust it because the authority is the same.

    Raises `RunError` without an authority, and without hosts; `GuaranteeError` where its key is sealed, and `vault`
    does not open it.
    """
    authority, signer = _load(folder, CA, vault)
    hosts = list(hosts if hosts is not None else served(folder))
    if not hosts:
        raise RunError("the hosts under which silos reach the server", "none", "Name at least one.")
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _builder(_name(hosts[0]), authority.subject, key.public_key(), signer.public_key(), SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        .sign(signer, hashes.SHA256())
    )
    _keep(folder, SERVER, certificate, key)


def served(folder: Path) -> list[str]:
    """The hosts that the server's certificate names."""
    names = _certificate(folder, SERVER).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def expiry(folder: Path) -> dict[str, datetime]:
    """When the authority and the server's certificate expire, in UTC."""
    return {kind: _certificate(folder, kind).not_valid_after_utc for kind in (CA, SERVER)}


def warnings(folder: Path, now: datetime | None = None) -> list[str]:
    """What an operator should see to, in plain words; nothing when all is well."""
    now = now or datetime.now(UTC)
    do = {CA: "make a new authority, and invite all silos anew", SERVER: "rotate it"}
    what = {CA: "The federation's CA", SERVER: "The server's certificate"}
    return [
        f"{what[kind]} {'expired' if end <= now else 'expires'} on {end:%Y-%m-%d}: {do[kind]}."
        for kind, end in expiry(folder).items()
        if end - now < SOON
    ]


def node_key() -> tuple[bytes, str]:
    """A new key for a silo's node: the private one as PEM, the public one as OpenSSH's line of text."""
    key = ec.generate_private_key(ec.SECP384R1())
    return _private(key), _public(key)


def keep_node_key(folder: Path, vault: Vault | None = None) -> str:
    """Writes a new node key, `node.key` and `node.pub`, and returns the public one. `vault`: seals the private one.
    Raises `RunError` where there is one already: the coordinator knows this silo by it.
    """
    if (folder / "node.key").exists():
        do = "The coordinator knows this silo by it. If it was revoked, move it away first."
        raise RunError("a folder without a node's key", "one that has it", do, where=str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    private, public = node_key()
    _write(folder / "node.key", private, vault)
    (folder / "node.pub").write_text(public + "\n")
    return public


def read_node_key(folder: Path, vault: Vault | None = None) -> bytes:
    """The private key of a node, PEM. Raises `GuaranteeError` where it is sealed, and `vault` does not open it;
    `RunError` where it is not the one that node.pub belongs to.
    """
    private = _read(folder / "node.key", vault)
    try:
        mine: Any = load_pem_private_key(private, None)
        known = _public(mine) == (folder / "node.pub").read_text().strip()
    except (OSError, ValueError, TypeError, AttributeError):
        known = False
    if not known:
        do = "Bring both back from a backup: the coordinator admits the node by them."
        raise RunError("the node's key that node.pub belongs to", "another, or none", do, where=str(folder))
    return private


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePublicKey,
    days: int,
) -> x509.CertificateBuilder:
    """What the two kinds of certificate have in common."""
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _usage(sign_certificates: bool = False) -> x509.KeyUsage:
    no = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
         "decipher_only"), False,
    )  # fmt: skip
    return x509.KeyUsage(
        digital_signature=not sign_certificates, key_cert_sign=sign_certificates, crl_sign=sign_certificates, **no
    )


def _name(words: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, words[:64])])


def _host(host: str) -> x509.GeneralName:
    """A host as a certificate names it."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise RunError("a host's name or address", f'"{host}"', "Leave out the port; spell names in ASCII.") from error


def _load(folder: Path, kind: str, vault: Vault | None) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A certificate and its key. Raises `RunError` unless both are there and belong together."""
    certificate = _certificate(folder, kind)
    file = folder / f"{kind}.key"
    try:
        key = load_pem_private_key(_read(file, vault), None)
    except (OSError, ValueError, TypeError) as error:
        raise RunError("a private key in PEM", type(error).__name__, "Bring it back from a backup.",
                       where=str(file)) from error  # fmt: skip
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        do = "Bring both back from the same backup."
        raise RunError(f"the key of {kind}.crt", "another one", do, where=str(file))
    return certificate, key


def _certificate(folder: Path, kind: str) -> x509.Certificate:
    file = folder / f"{kind}.crt"
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except (OSError, ValueError) as error:
        do = "`foedus init` makes one." if isinstance(error, FileNotFoundError) else "Bring it back from a backup."
        raise RunError("a certificate in PEM", type(error).__name__, do, where=str(file)) from error


def _keep(
    folder: Path, kind: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, vault: Vault | None = None
) -> None:
    _write(folder / f"{kind}.key", _private(key), vault)
    (folder / f"{kind}.crt").write_bytes(certificate.public_bytes(Encoding.PEM))


def _public(key: ec.EllipticCurvePrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, secret: bytes, vault: Vault | None) -> None:
    """A file for its owner's eyes only, from the first byte on; the old one stays whole until the new one is."""
    vault.write(path, secret) if vault else write_whole(path, secret, private=True)


def _read(path: Path, vault: Vault | None) -> bytes:
    """What `_write` wrote, also before there was a vault: what a key is worth, its public half says."""
    return kept(path, vault if is_sealed(path) else None)
