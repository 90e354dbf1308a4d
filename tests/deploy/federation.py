"""A federation with real homes on disk, joined as its people would: what the tests of runs between parties stand on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from foedus.deploy import signing
from foedus.deploy.guard import Guard
from foedus.deploy.home import FederationHome, Settings, SiloHome, SiloSettings, read_card
from foedus.deploy.host import Host
from foedus.engines.line import Faults, Loopback
from foedus.treaty import Treaty, signed

from .parties import CHARTER
from .test_parties import SILOS, files


@dataclass
class Federation:
    """A coordinator and three silos that joined, in one folder. `faults`: of the line between them; `charter`: of every
    silo.
    """

    folder: Path
    faults: Faults = field(default_factory=Faults)
    settings: Mapping[str, object] = field(default_factory=dict)
    charter: str = CHARTER

    def __post_init__(self) -> None:
        said = {"deadline_s": 60.0, "backoff_s": 0.01, "patience_s": 30.0, "dashboard": "", **self.settings}
        address = str(said.pop("address", "127.0.0.1:9443"))
        self.home = FederationHome.create(self.folder / "federation", Settings("tests", address, **said))  # type: ignore[arg-type]
        self.silos = {name: SiloHome.create(self.folder / name, SiloSettings(name, dashboard="")) for name in SILOS}
        for silo in self.silos.values():
            self.home.admit(read_card(silo.card))
            silo.join(self.home.invitation())
            silo.charter.write_text(self.charter)
        (self.folder / "data").mkdir()
        self.files = files(self.folder / "data")

    def propose(self, treaty: Treaty, signers: tuple[str, ...] = SILOS) -> None:
        """The treaty in every home, signed there by these."""
        made, _ = signing.propose(self.home, treaty)
        for name, silo in self.silos.items():
            if name in signers:
                signing.sign(silo, made)
            else:
                signed.save(made, signed.place(silo.treaties, made.digest))

    def sign_late(self, name: str) -> None:
        """A silo signs the one treaty that it has."""
        signing.sign(self.silos[name], *self.silos[name].signed())

    def lines(self, home: FederationHome, nodes: Mapping[str, str]) -> Loopback:
        """A line to silos in this process."""
        return Loopback({name: partial(self.guard, name) for name in nodes}, self.faults)

    def guard(self, name: str) -> Guard:
        """The process of a silo, as it starts."""
        return Host(self.silos[name], self.files[name]).guard


# ---- real processes ----


@contextmanager
def process(home: Path, app: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A resident process of `foedus`, as its operator starts it. Ends with it."""
    code = f"from foedus.{app} import app; app()"
    with (home / "log").open("ab") as log:
        command = [sys.executable, "-c", code, "up", "--home", str(home), *words]
        started = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        yield started
    finally:
        started.kill()
        started.wait()


def soon(holds: Callable[[], bool], seconds: float = 60.0) -> bool:
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(0.05)
    return holds()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def all_connected(parties: Federation) -> bool:
    silos = parties.home.read_status().get("silos", {})
    return len(silos) == 3 and all(silo["connected"] for silo in silos.values())
