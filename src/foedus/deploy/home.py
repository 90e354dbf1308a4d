"""The two homes: the coordinator's and a silo's, what lies where in them, and how each comes to know the other.

    coordinator                                    silo
    create ──────────────────────────────────────▶ create ─▶ card.json (its name, its keys)
    admit(card) ─▶ members/NAME.json
    invitation  ─▶ invitation.json ──────────────▶ join(invitation)

A card is signed by the key that it shows, an invitation by the coordinator's: a file that was changed on the way is
refused. That it is whose it says, two people make sure of by comparing fingerprints over another way. A home's own file
(`federation.toml`, `silo.toml`) holds no secret; keys lie beside it, for their owner's eyes only.
"""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..errors import RunError, one_of
from ..governance import TRAY, Ledger, consent, identity
from ..governance.consent import Consent
from ..governance.disk import disk, write_whole
from ..governance.identity import fingerprint, key_from
from ..governance.vault import Vault, source_of
from ..secure.keys import Identity, spell, verify
from ..treaty import charter, signed
from ..treaty.rules import FOLDER_NAME
from ..treaty.signed import Signed
from . import certificates

CHARTER_DAYS = 365
"""A new charter permits nothing after so many days, unless its operator says so."""
T = TypeVar("T")


@dataclass(frozen=True)
class Card:
    """Who a silo is: its name, its identity's public key (hexadecimal), its node's (OpenSSH), and its signature."""

    name: str
    key: str
    node: str
    signature: str = ""

    def __post_init__(self) -> None:
        _check_name("a silo", self.name)
        key_from(self.key)
        if self.signature and not verify(key_from(self.key), _bytes(self.signature), self._said):
            raise _forged("a card as its silo signed it")

    def signed_by(self, owner: Identity) -> Card:
        return replace(self, signature=owner.sign(self._said).hex())

    @property
    def fingerprint(self) -> str:
        return fingerprint(key_from(self.key))

    @property
    def _said(self) -> bytes:
        return spell("foedus card 1", self.name, self.key, self.node)


@dataclass(frozen=True)
class Invitation:
    """Which federation: its name, where it is reached, its certificate authority (PEM), and its coordinator's key."""

    federation: str
    address: str
    authority: str
    coordinator: str
    signature: str = ""

    def __post_init__(self) -> None:
        if self.signature and not verify(key_from(self.coordinator), _bytes(self.signature), self._said):
            raise _forged("an invitation as its coordinator signed it")

    def signed_by(self, owner: Identity) -> Invitation:
        return replace(self, signature=owner.sign(self._said).hex())

    @property
    def fingerprint(self) -> str:
        return fingerprint(key_from(self.coordinator))

    @property
    def _said(self) -> bytes:
        return spell("foedus invitation 1", self.federation, self.address, self.authority, self.coordinator)


@dataclass(frozen=True)
class Settings:
    """What `federation.toml` says. `address`: "host:port" by which silos reach the coordinator; `listen`: where it
    listens, if that is not the same port here. `deadline_s`: for one answer of a silo, `retries` and `backoff_s`: of a
    message that was lost; `patience_s`: how long a run waits for the SuperLink and for enough silos. `registry`: a
    database's URL; left out, a file of this home. `key`: where the vault's key comes from ("env", "file:PATH",
    "keyring"); "" for no vault.
    """

    name: str
    address: str
    listen: str = ""
    dashboard: str = "127.0.0.1:8800"
    registry: str = ""
    deadline_s: float = 1800.0
    retries: int = 8
    backoff_s: float = 0.5
    patience_s: float = 86400.0
    key: str = ""

    def __post_init__(self) -> None:
        host, port = split_address(self.address)
        if not self.listen:
            here = host if host in ("127.0.0.1", "localhost", "::1") else "0.0.0.0"
            object.__setattr__(self, "listen", f"{here}:{port}")
        for number in ("deadline_s", "backoff_s", "patience_s"):
            if not getattr(self, number) > 0:
                raise RunError(f"{number} > 0", f"{getattr(self, number)}", "Mend federation.toml.")


@dataclass(frozen=True)
class SiloSettings:
    """What `silo.toml` says. `coordinator`: "host:port", once it joined. `threads`: of the processor. `key`: where the
    vault's key comes from, as in `Settings`.
    """

    name: str
    coordinator: str = ""
    dashboard: str = "127.0.0.1:8801"
    threads: int = 1
    key: str = ""


@dataclass(frozen=True)
class Home:
    """What both homes have. Make one with `create`, find one with `at`."""

    path: Path
    FILE: ClassVar[str]
    OWNER: ClassVar[str]
    SETTINGS: ClassVar[type]

    @property
    def settings(self) -> Any:
        """What its own file says, read anew: a value of `SETTINGS`."""
        return _read_settings(self.file, self.SETTINGS)

    @property
    def file(self) -> Path:
        return self.path / self.FILE

    @property
    def keys(self) -> Path:
        """The folder of keys."""
        return self.path / "identity"

    @property
    def treaties(self) -> Path:
        return self.path / "treaties"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def status(self) -> Path:
        """Written by the resident process while it runs: what it is, and how it is."""
        return self.path / "status.json"

    @property
    def public(self) -> bytes:
        """The public half of its identity."""
        return identity.public_of(self.keys, self.OWNER)

    def identity(self) -> Identity:
        return identity.load(self.keys, self.OWNER, self.vault())

    def vault(self) -> Vault | None:
        """What seals keys at rest; None where its own file names no key for it."""
        spec = self.settings.key
        return Vault.open(self.path, source_of(spec)) if spec else None

    def open_ledger(self) -> Ledger:
        """Its own ledger, signed."""
        return Ledger(self.ledger, self.identity(), self.settings.name)

    def signed(self) -> list[Signed]:
        """All its treaties."""
        return signed.every(self.treaties)

    def read_status(self) -> dict[str, Any]:
        """What the resident process says of itself; {} where none is alive."""
        try:
            found = json.loads(self.status.read_bytes())
            os.kill(int(found["pid"]), 0)
        except PermissionError:
            return dict(found)
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return dict(found)


@dataclass(frozen=True)
class FederationHome(Home):
    """The coordinator's."""

    FILE: ClassVar[str] = "federation.toml"
    OWNER: ClassVar[str] = "coordinator"
    SETTINGS: ClassVar[type] = Settings

    @classmethod
    def create(cls, path: Path, settings: Settings) -> FederationHome:
        """A new home: keys, certificates, and a ledger. Raises `RunError` where something is already."""
        _check_name("a federation", settings.name.lower())
        home = cls(_new_folder(path))
        vault = Vault.open(path, source_of(settings.key)) if settings.key else None
        identity.create(home.keys, cls.OWNER, vault)
        host, _ = split_address(settings.address)
        hosts = list(dict.fromkeys([host, "localhost", "127.0.0.1"]))
        certificates.make(home.tls, hosts, settings.name, vault)
        for folder in (home.tls, home.members, home.treaties, home.runs, home.flower):
            folder.mkdir(mode=0o700, exist_ok=True)
        _write_settings(home.file, settings, _FEDERATION)
        home.open_ledger().append("founded", {"federation": settings.name})
        return home

    @classmethod
    def at(cls, path: Path) -> FederationHome:
        """The home at `path`. Raises `RunError` where there is none."""
        return cls(_known_folder(path, cls.FILE, "foedus init"))

    @property
    def tls(self) -> Path:
        return self.path / "tls"

    @property
    def members(self) -> Path:
        return self.path / "members"

    @property
    def runs(self) -> Path:
        return self.path / "runs"

    @property
    def flower(self) -> Path:
        """The SuperLink's state, and its socket."""
        return self.path / "flower"

    @property
    def store(self) -> Path:
        """The adapters of the registry."""
        return self.path / "store"

    @property
    def registry(self) -> str:
        """The registry's database, as a URL."""
        return self.settings.registry or f"sqlite:///{(self.path / 'registry.db').resolve()}"

    def numbers(self, digest: str) -> Path:
        """The numbers of messages under one treaty: they outlive every run of it."""
        return signed.place(self.treaties, digest) / "numbers.json"

    def cards(self, revoked: bool = False) -> dict[str, Card]:
        """The silos that are admitted, or those that no longer are, by name."""
        found = [_read_json(path) for path in sorted(self.members.glob("*.json"))]
        asked = [x for x in found if bool(x.get("revoked")) == revoked]
        return {x["name"]: _value(Card, x, f"members/{x['name']}.json") for x in asked}

    def admit(self, card: Card) -> None:
        """Takes a silo in. Raises `RunError` for another one of its name, and for a key that somebody else has."""
        for name, known in {**self.cards(revoked=True), **self.cards()}.items():
            same = {"name": name == card.name, "key": known.key == card.key, "node": known.node == card.node}
            if all(same.values()) and name in self.cards():
                return
            if same["node"] and name not in self.cards():
                do = "Ask the silo for a new card: `foedus silo init` in a new home makes new keys."
                raise RunError("a node key that was not revoked", f"that of {name}", do)
            if name in self.cards() and any(same.values()):
                do = f"Revoke {name} first, if this is its new card."
                raise RunError("a name and keys that no other silo has", f"those of {name}", do)
        write_whole(self._member(card.name), _json({**asdict(card), "revoked": False}))
        self.open_ledger().append("admitted", {"silo": card.name, "key": card.key})

    def revoke(self, name: str) -> None:
        """Puts a silo out, for good: from now on its node is not let in. Raises `RunError` for a silo that is none."""
        known = self.cards()
        if name not in known:
            raise RunError("a silo that is admitted", f'"{name}"', one_of(name, known))
        write_whole(self._member(name), _json({**asdict(known[name]), "revoked": True}))
        self.open_ledger().append("revoked", {"silo": name, "key": known[name].key})

    def invitation(self) -> Invitation:
        """What a silo must know to join; no secret."""
        said, authority = self.settings, (self.tls / "ca.crt").read_text()
        return Invitation(said.name, said.address, authority, self.public.hex()).signed_by(self.identity())

    def _member(self, name: str) -> Path:
        return self.members / f"{name}.json"


@dataclass(frozen=True)
class SiloHome(Home):
    """A silo's."""

    FILE: ClassVar[str] = "silo.toml"
    OWNER: ClassVar[str] = "silo"
    SETTINGS: ClassVar[type] = SiloSettings

    @classmethod
    def create(cls, path: Path, settings: SiloSettings) -> SiloHome:
        """A new home: keys, a card to hand out, and a charter that permits no model yet. Raises `RunError` where
        something is already.
        """
        _check_name("a silo", settings.name)
        home = cls(_new_folder(path))
        vault = Vault.open(path, source_of(settings.key)) if settings.key else None
        owner = identity.create(home.keys, cls.OWNER, vault)
        node = certificates.keep_node_key(home.keys, vault)
        for folder in (home.treaties, home.budgets, path / "work"):
            folder.mkdir(mode=0o700, exist_ok=True)
        _write_settings(home.file, settings, _SILO)
        home.charter.write_text(charter.template(settings.name, date.today() + timedelta(CHARTER_DAYS)))
        write_whole(home.card, _json(asdict(Card(settings.name, owner.public.hex(), node.strip()).signed_by(owner))))
        return home

    @classmethod
    def at(cls, path: Path) -> SiloHome:
        """The home at `path`. Raises `RunError` where there is none."""
        return cls(_known_folder(path, cls.FILE, "foedus silo init --name NAME"))

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def charter(self) -> Path:
        return self.path / "charter.toml"

    @property
    def card(self) -> Path:
        return self.path / "card.json"

    @property
    def budgets(self) -> Path:
        return self.path / "budgets"

    @property
    def state(self) -> Path:
        """What its operator decided: paused, left, consent withdrawn."""
        return self.path / "state.json"

    @property
    def node(self) -> bytes:
        """The private key of its node, PEM."""
        return certificates.read_node_key(self.keys, self.vault())

    @property
    def flower(self) -> Path:
        """What its node remembers."""
        return self.path / "flower.json"

    def work(self, digest: str) -> Path:
        """What it keeps of its work under one treaty."""
        return self.path / "work" / digest[:12]

    def decide(self, decided: Consent) -> None:
        """Writes down what its operator decided, and removes the last answers under treaties that it left: nothing will
        be given again.
        """
        consent.write(self.state, decided)
        left = self.path.glob(f"work/*/{TRAY}") if decided.left else (self.work(x) / TRAY for x in decided.withdrawn)
        for tray in left:
            shutil.rmtree(tray, ignore_errors=True)

    @property
    def invitation(self) -> Invitation | None:
        """The one that it took; None before."""
        file = self.path / "invitation.json"
        return read_invitation(file) if file.exists() else None

    @property
    def joined(self) -> bytes:
        """The key of the coordinator whose invitation it took; b"" before."""
        taken = self.invitation
        return key_from(taken.coordinator) if taken else b""

    def join(self, invitation: Invitation) -> None:
        """Takes an invitation. Raises `RunError` for another federation's, where it has joined one."""
        known = self.invitation
        if known is not None and known.coordinator != invitation.coordinator:
            do = "A silo is in one federation: make another home for this one."
            raise RunError(f"an invitation to {known.federation}", f"one to {invitation.federation}", do)
        write_whole(self.path / "invitation.json", _json(asdict(invitation)))
        lines = self.file.read_text().splitlines()
        said = [line for line in lines if not line.startswith("coordinator")]
        said.insert(1 + next(i for i, x in enumerate(said) if x.startswith("name")), _line("coordinator", invitation))
        write_whole(self.file, ("\n".join(said) + "\n").encode())
        self.open_ledger().append("joined", {"coordinator": invitation.coordinator})


def read_card(path: Path) -> Card:
    """A card from its file. Raises `RunError` for what is none, and `GuaranteeError` for one that was changed."""
    card = _value(Card, _read_json(path), str(path))
    if not card.signature:
        raise _forged("a card that its silo signed")
    return card


def read_invitation(path: Path) -> Invitation:
    """An invitation from its file. Raises as `read_card` does."""
    invitation = _value(Invitation, _read_json(path), str(path))
    if not invitation.signature:
        raise _forged("an invitation that its coordinator signed")
    return invitation


def invitation_bytes(invitation: Invitation) -> bytes:
    """The file of an invitation."""
    return _json(asdict(invitation))


def split_address(address: str) -> tuple[str, int]:
    """Host and port. Raises `RunError` for anything else."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise RunError('an address "host:port"', f'"{address}"', 'Write, for example, "federation.example:9443".')
    return host.strip("[]"), int(port)


# Files

_FEDERATION = {
    "name": "", "address": "by which silos reach the coordinator", "listen": "where it listens",
    "dashboard": "of the coordinator's page; empty for none",
    "registry": "a database's URL; empty: a file of this home", "deadline_s": "seconds for one answer of a silo",
    "retries": "of a message that was lost", "backoff_s": "seconds before the first of them; each doubles",
    "patience_s": "seconds that a run waits for the SuperLink and for enough silos",
    "key": 'of what lies encrypted: "env", "file:PATH", "keyring"; empty: files that only their owner reads',
}  # fmt: skip
_SILO = {
    "name": "", "coordinator": "where the federation is reached; `foedus silo join` writes it",
    "dashboard": "of the silo's page; empty for none", "threads": "of the processor", "key": _FEDERATION["key"],
}  # fmt: skip


def _write_settings(path: Path, settings: Any, about: Mapping[str, str]) -> None:
    lines = [f"{name} = {json.dumps(value)}" for name, value in asdict(settings).items()]
    said = [f"{line:<40} # {about[name]}" if about[name] else line for name, line in zip(about, lines, strict=True)]
    write_whole(path, ("\n".join(said) + "\n").encode())


def _line(name: str, invitation: Invitation) -> str:
    return f"{f'{name} = {json.dumps(invitation.address)}':<40} # {_SILO[name]}"


def _read_settings(path: Path, kind: type[T]) -> T:
    try:
        found = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path.name} as TOML", f"{error}", "Mend it, or restore it.", where=str(path)) from error
    seconds = {name: float(x) for name, x in found.items() if name.endswith("_s") and type(x) is int}
    return _value(kind, {**found, **seconds}, str(path))


def _value(kind: type[T], found: Mapping[str, Any], where: str) -> T:
    """A frozen value from a file's fields, each of its type. Raises `RunError`."""
    types = {field.name: field.type for field in fields(kind)}  # type: ignore[arg-type]
    known = {name: x for name, x in found.items() if name != "revoked"}
    for odd in (name for name in known if name not in types):
        raise RunError("a key that is known", f'"{odd}"', one_of(odd, types), where=where)
    for name, value in known.items():
        if type(value).__name__ != types[name]:
            came = f"{name} = {value!r}"
            raise RunError(f"{name} as {types[name]}", came, "Mend the file.", where=where)
    try:
        return kind(**known)
    except TypeError as error:
        raise RunError(
            f"a whole {kind.__name__.lower()}", str(error), "Ask for the file again.", where=where
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes()[: 1 << 20])
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"JSON in {path.name}", f"{type(error).__name__}", "Ask for the file again.",
                       where=str(path)) from error  # fmt: skip
    if not isinstance(found, dict):
        raise RunError("an object", type(found).__name__, "Ask for the file again.", where=str(path))
    return found


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _new_folder(path: Path) -> Path:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        do = "Name another folder, or use the home that is there."
        raise RunError("no folder, or an empty one", "something that is already there", do, where=str(path))
    with disk(path):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
    return path


def _known_folder(path: Path, file: str, how: str) -> Path:
    if not (path / file).is_file():
        do = f"Make one with `{how}`, or name its folder with --home."
        raise RunError(f"a home with {file}", "none", do, where=str(path))
    return path


def _check_name(what: str, name: str) -> None:
    if not FOLDER_NAME.fullmatch(name):
        do = 'Use letters, digits, "_", "-" and ".", the last two not at the start, 80 at most.'
        raise RunError(f"a name for {what} that is fit for a folder", f'"{name}"', do)


def _bytes(words: str) -> bytes:
    try:
        return bytes.fromhex(words)
    except ValueError:
        return b""


def _forged(expected: str) -> RunError:
    return RunError(expected, "one that it did not sign", "Ask for the file again, and compare fingerprints.")
