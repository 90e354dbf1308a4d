"""A treaty as parties sign it: its tables, who takes part by which key, and their signatures.

What is signed is all that binds: the treaty's digest, the coordinator's key and the roster. Whatever of it changes
needs every signature anew, and another word in the treaty is another treaty. Signatures come one by one, in any order,
and `merged` brings them together. The file is JSON, `NAME.treaty.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .. import wire
from ..errors import FoedusError, GuaranteeError, TreatyError, one_of
from ..governance.disk import write_whole
from ..governance.identity import key_from
from ..secure.keys import Identity, spell, verify
from .core import Treaty, from_dict
from .deployed import obstacles, roster
from .mistakes import Mistakes

FORMAT = 1
SUFFIX = ".treaty.json"
MOST_BYTES = 1 << 21
"""Of a file: a treaty has 1 MB at most, and a silo's line less than 300 bytes."""
SIGNATURE = 64
SHORT = 12
"""Digits of a digest by which folders are called."""
_CONTEXT = "foedus treaty 1"


@dataclass(frozen=True)
class Signed:
    """`roster`: the Ed25519 key of every silo that the treaty names; `coordinator`: the coordinator's. `signatures`: of
    silos by name; `proposed`: the coordinator's own, b"" before it signed.

    Only genuine signatures fit in. Raises `TreatyError` or `GuaranteeError` for anything else.
    """

    treaty: Treaty
    coordinator: bytes
    roster: Mapping[str, bytes]
    proposed: bytes = b""
    signatures: Mapping[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if problems := obstacles(self.treaty):
            raise Mistakes(problems)
        _check_roster(self.treaty, self.coordinator, self.roster)
        if self.proposed and not verify(self.coordinator, self.proposed, self._said("coordinator", "")):
            raise _forged("the coordinator")
        for silo, signature in self.signatures.items():
            if silo not in self.roster:
                raise _refused("signatures of silos in the roster", f'"{silo}"', one_of(silo, self.roster))
            if not verify(self.roster[silo], signature, self._said("silo", silo)):
                raise _forged(f'"{silo}"')
        object.__setattr__(self, "roster", MappingProxyType(dict(self.roster)))
        object.__setattr__(self, "signatures", MappingProxyType(dict(self.signatures)))

    @property
    def name(self) -> str:
        """What the treaty calls itself."""
        return self.treaty.name

    @cached_property
    def digest(self) -> str:
        """The treaty's: by it ledgers, budgets, envelopes and folders name it."""
        return self.treaty.digest()

    @property
    def missing(self) -> tuple[str, ...]:
        """Silos of the roster that have not signed, in the treaty's order."""
        return tuple(silo for silo in roster(self.treaty) if silo not in self.signatures)

    @property
    def binding(self) -> bool:
        """Whether the coordinator and every silo of the roster signed: before that nothing is trained."""
        return bool(self.proposed) and not self.missing

    def signed_by(self, identity: Identity) -> Signed:
        """With the signature of this identity, as whoever the treaty knows it. Raises `GuaranteeError` for others."""
        if identity.public == self.coordinator:
            return replace(self, proposed=identity.sign(self._said("coordinator", "")))
        silo = next((name for name, key in self.roster.items() if key == identity.public), None)
        if silo is None:
            do = "Ask the coordinator to admit this silo's card, and to propose the treaty anew."
            raise _refused("a key that the treaty names", f"the key {identity.public.hex()[:16]}…", do)
        signature = identity.sign(self._said("silo", silo))
        return replace(self, signatures={**self.signatures, silo: signature})

    def merged(self, *others: Signed) -> Signed:
        """With the signatures of other copies of the same treaty. Raises `GuaranteeError` for another treaty's."""
        found = self
        for other in others:
            if other._terms != self._terms:
                came = "the same one between other parties" if other.digest == self.digest else other.digest[:12]
                do = "Any change is a new treaty, and needs another name or seed: sign and collect each by itself."
                raise _refused(f"copies of treaty {self.digest[:12]} between the same parties", came, do)
            signatures = {**other.signatures, **found.signatures}
            found = replace(found, proposed=found.proposed or other.proposed, signatures=signatures)
        return found

    def require(self) -> None:
        """Raises `GuaranteeError` naming who has not signed, unless all have."""
        if not self.binding:
            absent = [*([] if self.proposed else ["the coordinator"]), *self.missing]
            do = "Collect their signatures with `foedus treaty collect`, or propose a treaty without them."
            raise _refused("a treaty that all its parties signed", f"none of {', '.join(absent)}", do)

    def packed(self) -> bytes:
        """As bytes; the same value always gives the same ones."""
        tables = {name: table for name, table in self.treaty.tables().items() if name != "performance"}
        silos = {
            silo: {"key": key.hex(), **_spelled(self.signatures.get(silo, b""))} for silo, key in self.roster.items()
        }
        coordinator = {"key": self.coordinator.hex(), **_spelled(self.proposed)}
        value = {
            "format": FORMAT, "digest": self.digest, "treaty": tables, "coordinator": coordinator, "silos": silos
        }  # fmt: skip
        return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()

    @cached_property
    def _terms(self) -> bytes:
        keys = {silo: key.hex() for silo, key in self.roster.items()}
        return spell(self.digest, self.coordinator, wire.canonical(keys))

    def _said(self, role: str, silo: str) -> bytes:
        """What a party signs: who it is in this treaty, and the treaty with all its parties."""
        return spell(_CONTEXT, role, silo, self._terms)


def propose(treaty: Treaty, identity: Identity, keys: Mapping[str, bytes]) -> Signed:
    """A treaty as the coordinator first signs it. `keys`: of all members by name, of which the treaty names some.

    Raises `Mistakes` for a treaty that no federation of organisations can carry out, and `GuaranteeError` for a silo
    without a key.
    """
    if problems := obstacles(treaty):
        raise Mistakes(problems)
    named = roster(treaty)
    for silo in named:
        if silo not in keys:
            do = f"Admit its card with `foedus coordinator admit`. {one_of(silo, keys)}"
            raise _refused("a key for every silo of the treaty", f'none for "{silo}"', do)
    return Signed(treaty, identity.public, {silo: keys[silo] for silo in named}).signed_by(identity)


def unpack(blob: bytes, where: str = "") -> Signed:
    """The inverse of `Signed.packed`, every signature checked. Raises a `FoedusError` for anything that is not the
    bytes of a signed treaty; `where`: what it calls them.
    """
    if len(blob) > MOST_BYTES:
        raise _unreadable(f"{len(blob):,} bytes", where)
    try:
        found = json.loads(blob)
        if found["format"] != FORMAT:
            raise _unreadable(f"format {found['format']!r}", where)
        silos, coordinator = found["silos"], found["coordinator"]
        signatures = {silo: bytes.fromhex(x["signature"]) for silo, x in silos.items() if "signature" in x}
        keys = {silo: key_from(x["key"]) for silo, x in silos.items()}
        chair, proposed = key_from(coordinator["key"]), bytes.fromhex(coordinator.get("signature", ""))
        tables, said = found["treaty"], found["digest"]
    except FoedusError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(type(error).__name__, where) from error
    signed = Signed(from_dict(tables, where), chair, keys, proposed, signatures)
    if signed.digest != said or signed.packed() != bytes(blob):
        raise _unreadable("one whose bytes are not those of its content", where)
    return signed


def load(path: Path) -> Signed:
    """The signed treaty in a file. Raises as `unpack` does."""
    try:
        with path.open("rb") as file:
            blob = file.read(MOST_BYTES + 1)
    except OSError as error:
        near = [other.name for other in path.parent.glob(f"*{SUFFIX}")] if path.parent.is_dir() else []
        raise TreatyError(
            "a signed treaty's file", error.strerror or str(error), one_of(path.name, near), where=str(path)
        ) from None
    return unpack(blob, str(path))


def save(signed: Signed, folder: Path) -> Path:
    """Writes `NAME.treaty.json` in a folder, durably; what signatures were there already are kept.

    Raises `GuaranteeError` in the `place` of another treaty: whoever writes treaties can make two whose digests begin
    alike, and what a silo remembers of its work goes by that beginning.
    """
    path = folder / f"{signed.name}{SUFFIX}"
    for other in folder.glob(f"*{SUFFIX}") if folder.name == signed.digest[:SHORT] else ():
        load(other).merged(signed)
    known = [load(path)] if path.exists() else []
    return write_whole(path, signed.merged(*known).packed())


def place(treaties: Path, digest: str) -> Path:
    """A treaty's folder among those of a home."""
    return treaties / digest[:SHORT]


def found(treaties: Path, digest: str, load: Callable[[Path], Signed] = load) -> Signed | None:
    """The treaty with this digest in a home, with all signatures that are known there; None where there is none.

    Raises a `FoedusError` where its file was changed. `load`: one that remembers what it read.
    """
    for path in sorted(place(treaties, digest).glob(f"*{SUFFIX}")):
        signed = load(path)
        if signed.digest == digest:
            return signed
    return None


def every(treaties: Path) -> list[Signed]:
    """All treaties of a home, by name."""
    return sorted((load(path) for path in treaties.glob(f"*/*{SUFFIX}")), key=lambda signed: signed.name)


def _check_roster(treaty: Treaty, coordinator: bytes, keys: Mapping[str, bytes]) -> None:
    named = set(roster(treaty))
    if set(keys) != named:
        odd = ", ".join(sorted(named ^ set(keys)))
        raise _refused("a key for each silo that the treaty names, and no other", f"otherwise for {odd}", "Add it.")
    if len({coordinator, *keys.values()}) <= len(keys):
        raise _refused("an identity of its own for every party", "one that two share", "Make each its own key.")


def _spelled(signature: bytes) -> dict[str, Any]:
    return {"signature": signature.hex()} if signature else {}


def _forged(who: str) -> GuaranteeError:
    do = "Do not sign it. Ask for the file again, and for the key of whoever sent it."
    return _refused(f"the signature of {who} under this very treaty", "another", do)


def _refused(expected: str, came: str, do: str) -> GuaranteeError:
    return GuaranteeError(expected, came, do)


def _unreadable(came: str, where: str) -> TreatyError:
    do = "Ask for the file again: it is written by `foedus treaty`, and by no editor."
    return TreatyError("a signed treaty as it was written", came, do, where=where)
