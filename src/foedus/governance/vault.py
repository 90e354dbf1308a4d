"""Encryption at rest: what lies in a folder, under a key that does not.

    source ──▶ Key ──hkdf(salt, name)──▶ a key for one blob ──AES-256-GCM by chunks──▶ header + boxes

A blob says which key sealed it, so a wrong key is refused by name, and is bound to a `name` (a file's path inside the
vault's folder, or a purpose), so that one cannot be put in another's place. Every blob has a salt and so a key of its
own; its chunks are numbered and the last is marked, so none can be swapped, repeated or left off (STREAM, Hoang et al.
2015). What encryption cannot show is that a file was replaced by an older one of the same name: the ledger can.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from ..errors import GuaranteeError, WireError
from ..secure.keys import Secretive, hkdf, spell
from ..wire import canonical
from .disk import write_whole

MAGIC = b"FOEDUSV1"
RECORD = "vault.json"
VARIABLE = "FOEDUS_KEY"
SIZE, ID, SALT, TAG = 32, 8, 32, 16  # bytes
HEADER = len(MAGIC) + ID + SALT
CHUNK = 1 << 20  # bytes of a blob that are sealed at a time
SCRYPT = {"n": 1 << 17, "r": 8, "p": 1}  # 128 MiB and about half a second (OWASP 2023)


@dataclass(frozen=True, repr=False)
class Key(Secretive):
    """What opens a vault: 32 bytes. `id`: by which one knows it; it gives nothing of the key away."""

    secret: bytes

    def __post_init__(self) -> None:
        if len(self.secret) != SIZE:
            raise GuaranteeError(f"a key of {SIZE} bytes", f"{len(self.secret)}", "Make one with `fresh_key_file`.")

    @property
    def id(self) -> str:
        return hkdf(self.secret, b"", "vault key id")[:ID].hex()

    def of(self, salt: bytes) -> AESGCM:
        """For one blob."""
        return AESGCM(hkdf(self.secret, salt, "vault blob"))


# Where keys come from


class Source(Protocol):
    """Where a vault's key is kept. `folder`: of the vault, which holds the salt of a passphrase."""

    def key(self, folder: Path) -> Key: ...


@dataclass(frozen=True)
class FromFile:
    """64 hexadecimal digits in a file that its owner alone may read."""

    path: Path

    def key(self, folder: Path) -> Key:
        try:
            mode, text = self.path.stat().st_mode, self.path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            do = "Name the file that holds the key, or bring it back from where it is kept safe."
            raise GuaranteeError(f"a key in {self.path}", getattr(error, "strerror", "no text"), do) from error
        if mode & 0o077:
            came = f"one that others may use ({mode & 0o777:03o})"
            raise GuaranteeError(f"a key file of mode 600 at {self.path}", came, f"chmod 600 {self.path}")
        return _spelled(text, str(self.path))


@dataclass(frozen=True)
class FromEnvironment:
    """64 hexadecimal digits in a variable."""

    variable: str = VARIABLE

    def key(self, folder: Path) -> Key:
        if not (text := os.environ.get(self.variable, "")):
            do = "Set it where this process is started, from wherever the key is kept safe."
            raise GuaranteeError(f"a key in the variable {self.variable}", "nothing in it", do)
        return _spelled(text, self.variable)


@dataclass(frozen=True)
class FromPassphrase:
    """What a person knows. `ask`: gets it when it is needed. scrypt makes a key of it, with a salt in the folder."""

    ask: Callable[[], str] = field(repr=False)

    def key(self, folder: Path) -> Key:
        scrypt = _record(folder).get("scrypt") or {"salt": secrets.token_hex(SALT), **SCRYPT}
        if not (passphrase := self.ask()):
            raise GuaranteeError("a passphrase", "none", "Choose one of several words that belong to no quotation.")
        cost = {name: int(scrypt[name]) for name in SCRYPT}
        key = Key(Scrypt(bytes.fromhex(scrypt["salt"]), SIZE, **cost).derive(passphrase.encode()))
        if "scrypt" not in _record(folder):
            _write_record(folder, {**_record(folder), "scrypt": scrypt})
        return key


@dataclass(frozen=True)
class FromKeyring:
    """The keyring of the operating system, through the library `keyring`; a key is drawn where there is none yet."""

    service: str = "foedus"
    user: str = "vault"

    def key(self, folder: Path) -> Key:
        try:
            import keyring
            from keyring.errors import KeyringError
        except ImportError as error:
            raise GuaranteeError("the library keyring", "none", "pip install 'foedus[keyring]'") from error
        try:
            text = keyring.get_password(self.service, self.user)
            if text is None and "key" not in _record(folder):
                text = secrets.token_hex(SIZE)
                keyring.set_password(self.service, self.user, text)
        except KeyringError as error:
            do = "Unlock it, or keep the key in a file or in the environment."
            raise GuaranteeError("a keyring that this process may use", type(error).__name__, do) from error
        if text is None:
            do = "Unlock the keyring of the account that made the vault, or bring the key back from where it is kept."
            raise GuaranteeError(f"a key for {self.user!r} of {self.service!r} in the keyring", "none", do)
        return _spelled(text, "the keyring")


def source_of(spec: str, ask: Callable[[], str] | None = None) -> Source:
    """The source that a setting names: "env", "env:NAME", "file:PATH", "keyring", "keyring:SERVICE/USER" or
    "passphrase" (`ask` gets it).
    """
    kind, _, rest = spec.partition(":")
    if kind == "env":
        return FromEnvironment(rest or VARIABLE)
    if kind == "file" and rest:
        return FromFile(Path(rest))
    if kind == "keyring":
        service, _, user = rest.partition("/")
        return FromKeyring(service or "foedus", user or "vault")
    if kind == "passphrase" and not rest and ask is not None:
        return FromPassphrase(ask)
    expected = '"env", "env:NAME", "file:PATH", "keyring", "keyring:SERVICE/USER" or "passphrase"'
    raise GuaranteeError(f"a source of a key: {expected}", repr(spec), "The key itself stands in no setting.")


def fresh_key_file(path: Path) -> Path:
    """Draws a key into a new file of mode 600. Raises `GuaranteeError` where a file is already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        do = "Use that one, or name another: a key that is written over opens nothing any more."
        raise GuaranteeError(f"no file at {path}", "one", do) from error
    with open(handle, "w") as file:
        file.write(secrets.token_hex(SIZE) + "\n")
    return path


# The vault


@dataclass(frozen=True, repr=False)
class Vault(Secretive):
    """What seals and opens the files in a folder. `older`: keys that still open what they sealed; the first seals."""

    folder: Path
    own: Key
    older: tuple[Key, ...] = ()

    @classmethod
    def open(cls, folder: Path, source: Source, *older: Source) -> Vault:
        """The vault of a folder, made if there is none. Raises `GuaranteeError` for another key than that of the
        folder, before anything is read or written under it. `older`: sources of keys to be rotated out.
        """
        keys = [one.key(folder) for one in (source, *older)]
        known = _record(folder).get("key")
        if known is not None and known not in (key.id for key in keys):
            raise _wrong(known, keys[0].id, str(folder))
        if known is None:
            _write_record(folder, {**_record(folder), "key": keys[0].id})
        return cls(folder, keys[0], tuple(keys[1:]))

    @staticmethod
    def sealed(folder: Path) -> bool:
        """Whether a folder has a vault."""
        return "key" in _record(folder)

    # Bytes

    def seal(self, data: bytes, purpose: str) -> bytes:
        """A blob that only the key opens, and only for the same purpose."""
        return b"".join(self._boxes(_slices(data), purpose))

    def unseal(self, blob: bytes, purpose: str) -> bytes:
        """What `seal` was given. Raises `GuaranteeError` for another key, `WireError` for another purpose or blob."""
        view = memoryview(blob)
        rest = (bytes(view[at : at + CHUNK + TAG]) for at in range(HEADER, len(view), CHUNK + TAG))
        return b"".join(self._opened(bytes(view[:HEADER]), rest, purpose))

    # Files, bound to their path inside the folder

    def write(self, path: Path, data: bytes) -> Path:
        """Seals `data` into a file, whole or not at all, and a chunk at a time."""
        return write_whole(path, self._boxes(_slices(data), self._name(path)), private=True)

    def read(self, path: Path) -> bytes:
        """What a file was sealed with. Raises `WireError` for one that is plain, or was changed, cut off or moved."""
        return b"".join(self.stream(path))

    def stream(self, path: Path) -> Iterator[bytes]:
        """What a file was sealed with, in chunks; each was verified, and that they are all, when it has ended."""
        with path.open("rb") as file:
            header = file.read(HEADER)
            yield from self._opened(header, iter(lambda: file.read(CHUNK + TAG), b""), self._name(path))

    def take_in(self, path: Path) -> Path:
        """Seals a file that lies in the folder in plain; one that is sealed stays. Never holds more than a chunk."""
        if is_sealed(path):
            return path
        with path.open("rb") as file:
            return write_whole(path, self._boxes(iter(lambda: file.read(CHUNK), b""), self._name(path)), private=True)

    def rotate(self) -> int:
        """Seals everything in the folder under the vault's own key that an older one sealed; returns how many files.

        Open the vault with the new key, and the older ones after it. Cut off, it goes on when it is called again: the
        folder's record names the new key once nothing needs the older ones.
        """
        done = 0
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file() and not p.is_symlink()):
            with path.open("rb") as file:
                header = file.read(HEADER)
            if header.startswith(MAGIC) and header[len(MAGIC) :][:ID].hex() != self.own.id:
                write_whole(path, self._boxes(self.stream(path), self._name(path)), private=True)
                done += 1
        _write_record(self.folder, {**_record(self.folder), "key": self.own.id})
        return done

    def _name(self, path: Path) -> str:
        try:
            return path.resolve().relative_to(self.folder.resolve()).as_posix()
        except ValueError:
            do = "Seal it in a vault of its own folder."
            raise GuaranteeError(f"a file inside the vault's folder {self.folder}", str(path), do) from None

    def _boxes(self, data: Iterable[bytes], name: str) -> Iterator[bytes]:
        salt = secrets.token_bytes(SALT)
        header, cipher = MAGIC + bytes.fromhex(self.own.id) + salt, self.own.of(salt)
        yield header
        for number, last, chunk in _numbered(_whole_chunks(data)):
            yield cipher.encrypt(_nonce(number, last), chunk, spell(header, name))

    def _opened(self, header: bytes, boxes: Iterable[bytes], name: str) -> Iterator[bytes]:
        if len(header) != HEADER or not header.startswith(MAGIC):
            do = "Seal it with `Vault.take_in` if you trust it: whoever can write here could have put it there."
            raise WireError(f"sealed bytes for {name!r}", "bytes that no vault sealed", do)
        known = header[len(MAGIC) : len(MAGIC) + ID].hex()
        key = next((key for key in (self.own, *self.older) if key.id == known), None)
        if key is None:
            raise _wrong(known, self.own.id, name)
        cipher = key.of(header[-SALT:])
        for number, last, box in _numbered(boxes):
            try:
                yield cipher.decrypt(_nonce(number, last), box, spell(header, name))
            except (InvalidTag, ValueError):
                came = "others: they were changed or cut off, or belong to another name"
                do = "Bring the file back from a copy; if somebody moved it, move it back."
                raise WireError(f"the bytes that were sealed for {name!r}", came, do) from None


def is_sealed(path: Path) -> bool:
    """Whether a file looks like one that a vault wrote."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def keep(path: Path, blob: bytes, vault: Vault | None = None) -> Path:
    """Writes a file whole or not at all, sealed where there is a vault."""
    return vault.write(path, blob) if vault else write_whole(path, blob)


def kept(path: Path, vault: Vault | None = None) -> bytes:
    """The inverse of `keep`. Raises `GuaranteeError` for a sealed file without its vault, `WireError` for a plain one
    where there is a vault.
    """
    if vault:
        return vault.read(path)
    blob = path.read_bytes()
    if blob.startswith(MAGIC):
        do = "Name the source of its key, for example FOEDUS_KEY."
        raise GuaranteeError(f"the key that sealed {path.name}, {blob[len(MAGIC) :][:ID].hex()}", "no key", do)
    return blob


def _slices(data: bytes) -> Iterator[bytes]:
    view = memoryview(data)
    return (bytes(view[at : at + CHUNK]) for at in range(0, len(view), CHUNK))


def _whole_chunks(data: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in chunks of `CHUNK`, but the last, of which there is always one: an empty blob is one too."""
    held = b""
    for part in data:
        held = held + part if held else part
        while len(held) > CHUNK:
            yield held[:CHUNK]
            held = held[CHUNK:]
    yield held


def _numbered(items: Iterable[bytes]) -> Iterator[tuple[int, bool, bytes]]:
    """Each with its number and whether it is the last; of none, an empty one."""
    number, held = 0, None
    for item in items:
        if held is not None:
            yield number, False, held
            number += 1
        held = item
    yield number, True, held or b""


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([last])


def _spelled(text: str, where: str) -> Key:
    try:
        secret = bytes.fromhex(text.strip())
    except ValueError:
        secret = b""
    if len(secret) != SIZE:
        do = "`openssl rand -hex 32` makes one; a passphrase is another source."
        raise GuaranteeError(f"{2 * SIZE} hexadecimal digits in {where}", f"{len(text.strip())} characters", do)
    return Key(secret)


def _wrong(known: str, came: str, what: str) -> GuaranteeError:
    do = "Give the key that it was sealed with; nothing was read or written."
    return GuaranteeError(f"the key {known}, which sealed {what}", f"the key {came}", do)


def _record(folder: Path) -> Mapping[str, Any]:
    """What is known about a vault without its key: the key's id, and the salt and cost of a passphrase."""
    path = folder / RECORD
    return json.loads(path.read_bytes()) if path.exists() else {}


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RECORD, canonical(record))
