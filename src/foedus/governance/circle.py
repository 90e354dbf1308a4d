"""Who may take part in secure sums, and by which keys one knows them.

In a federation every silo makes its own identity and the public halves are exchanged beforehand. In a simulation one
process makes them all; where silos are processes of their own, `deal` gives each of them its own, in its own folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .. import wire
from ..errors import GuaranteeError
from ..secure.keys import SIZE, Identity

ROSTER, SECRET = "roster.json", "identity"


@dataclass(frozen=True)
class Circle:
    """`roster`: everybody's public key; `silos`: the identities that this process holds; `coordinator`: its identity
    where this process is the coordinator, else its public key.
    """

    roster: Mapping[str, bytes]
    silos: dict[str, Identity] = field(repr=False)
    coordinator: Identity | bytes = field(repr=False)

    @property
    def chair(self) -> bytes:
        """The coordinator's public key."""
        return self.coordinator if isinstance(self.coordinator, bytes) else self.coordinator.public


def fresh_circle(silos: Iterable[str]) -> Circle:
    """Identities drawn now, all of them in this process."""
    identities = {name: Identity.fresh() for name in silos}
    return Circle({name: one.public for name, one in identities.items()}, identities, Identity.fresh())


def deal(circle: Circle, folders: Mapping[str, Path]) -> None:
    """Writes the roster and its own identity, readable by its owner only, into each silo's folder. The circle does not
    hold those identities any more: from now on they are the silos'.
    """
    said = {"silos": {name: key.hex() for name, key in circle.roster.items()}, "coordinator": circle.chair.hex()}
    for name, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ROSTER).write_bytes(wire.canonical(said))
        secret = folder / SECRET
        secret.unlink(missing_ok=True)
        with os.fdopen(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(circle.silos.pop(name).secret)


def take_back(folders: Iterable[Path]) -> None:
    """Removes the identities that were dealt: a simulation's last as long as its processes."""
    for folder in folders:
        (folder / SECRET).unlink(missing_ok=True)


def dealt(silo: str, folder: Path) -> Circle:
    """What `deal` wrote for one silo. Raises `GuaranteeError` where there is nothing."""
    try:
        said = json.loads((folder / ROSTER).read_bytes())
        secret = (folder / SECRET).read_bytes()
    except OSError as error:
        do = "Start the silo through its coordinator, which deals the identities of a simulation."
        raise GuaranteeError(f"the identity of {silo} in {folder}", "none", do) from error
    roster = {name: bytes.fromhex(key) for name, key in said["silos"].items()}
    identity = Identity(secret)
    if len(secret) != SIZE or roster.get(silo) != identity.public:
        raise GuaranteeError(f"the identity of {silo}, as in the roster", "another", "Deal the identities anew.")
    return Circle(roster, {silo: identity}, bytes.fromhex(said["coordinator"]))
