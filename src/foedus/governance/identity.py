"""Who a party is, on disk: `NAME.key`, its Ed25519 seed, and `NAME.pub`, by which the others know it.

The seed is sealed by a vault where there is one, and lies there as it is where there is none; either way only its owner
may read the file. There is no way to replace a key in place: a new key is a new party, and a new treaty.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Protocol

from ..errors import FoedusError, GuaranteeError, RunError
from ..secure.keys import SIZE, Identity
from ..wire import digest
from .disk import disk, sync_folder

_PLAIN, _SEALED = b"foedus key 1 plain\n", b"foedus key 1 sealed\n"


class Vault(Protocol):
    """What seals files at rest; see `vault.py`."""

    def seal(self, blob: bytes, purpose: str, /) -> bytes: ...
    def unseal(self, blob: bytes, purpose: str, /) -> bytes: ...


def create(folder: Path, name: str, vault: Vault | None = None) -> Identity:
    """Draws an identity and writes both files. Raises `RunError` where there is one already."""
    identity = Identity.fresh()
    content = _PLAIN + identity.secret if vault is None else _SEALED + vault.seal(identity.secret, _purpose(name))
    path = _key(folder, name)
    with disk(path):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            do = "Use it, or move its folder away: whoever knew the old key must be told the new one."
            raise RunError(f"no identity at {path}", "one that is already there", do) from None
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        (folder / f"{name}.pub").write_text(f"{identity.public.hex()}\n")
        sync_folder(folder)
    return identity


def load(folder: Path, name: str, vault: Vault | None = None) -> Identity:
    """What `create` wrote. Raises `RunError` where there is nothing, and `GuaranteeError` for a key that others may
    read, that is sealed and there is no vault (or one with another key), or that is not the one of `NAME.pub`.
    """
    path = _key(folder, name)
    try:
        mode, content = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise RunError(
            f"the identity at {path}", error.strerror or "none", "Make one with `foedus init` or `foedus silo init`."
        ) from error
    if stat.S_IMODE(mode) & 0o077:
        raise GuaranteeError(
            "a key that only its owner can read", f"mode {stat.S_IMODE(mode):o}",
            f"Run `chmod 600 {path.name}` if nobody else has read it; else make a new identity.", where=str(path),
        )  # fmt: skip
    identity = Identity(_secret(path, name, content, vault))
    if identity.public != public_of(folder, name):
        raise GuaranteeError(
            f"the key whose public half is in {name}.pub", "another", "Restore both files.", where=str(path)
        )
    return identity


def public_of(folder: Path, name: str) -> bytes:
    """The public half, 32 bytes, without the secret. Raises `RunError` where there is none."""
    path = folder / f"{name}.pub"
    try:
        return key_from(path.read_text().strip())
    except (OSError, ValueError, FoedusError) as error:
        raise RunError(f"a public key at {path}", "none", "Restore the file.") from error


def sealed(folder: Path, name: str) -> bool:
    """Whether the key is sealed by a vault."""
    with _key(folder, name).open("rb") as file:
        return file.read(len(_SEALED)) == _SEALED


def key_from(words: str) -> bytes:
    """A public key from its 64 hexadecimal digits, in lower case, as cards and treaties spell it. Raises
    `GuaranteeError` for any other text.
    """
    try:
        public = bytes.fromhex(words)
    except ValueError:
        public = b""
    if len(public) != SIZE or public.hex() != words:
        came = f"{len(words)} characters that are not"
        raise GuaranteeError("a public key: 64 hexadecimal digits", came, "Copy it whole from the party's card.")
    return public


def fingerprint(public: bytes) -> str:
    """What two people compare over the telephone: 20 digits of SHA-256, in groups of four.

    >>> fingerprint(bytes(32))
    '6668 7aad f862 bd77 6c8f'
    """
    short = digest(public)[:20]
    return " ".join(short[i : i + 4] for i in range(0, len(short), 4))


def _secret(path: Path, name: str, content: bytes, vault: Vault | None) -> bytes:
    secret = b""
    if content.startswith(_PLAIN):
        secret = content.removeprefix(_PLAIN)
    elif content.startswith(_SEALED):
        if vault is None:
            do = "Give the vault's key: a file, FOEDUS_KEY in the environment, or the system's keyring."
            raise GuaranteeError("the vault that sealed this key", "none", do, where=str(path))
        secret = vault.unseal(content.removeprefix(_SEALED), _purpose(name))
    if len(secret) != SIZE:
        raise GuaranteeError("a key as it was written", "something else", "Restore the file.", where=str(path))
    return secret


def _purpose(name: str) -> str:
    return f"identity {name}"


def _key(folder: Path, name: str) -> Path:
    return folder / f"{name}.key"
