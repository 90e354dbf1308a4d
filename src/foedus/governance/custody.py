"""What has been released is kept before it is used, so that a crash never makes anybody release it again with fresh
noise.

`SiloCustody` is for noise that silos add: the charge goes to the silo's budget, the report to the silo's out-tray.
`KeptMechanism` is for noise that the server adds. A release that was cut off before it was kept has left nobody's
memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from .. import wire
from ..errors import GuaranteeError
from ..privacy.mechanisms import Mechanism, rounds_done
from ..types import Receipt, Release, Report, Total, Tree
from .budget import Budget
from .disk import write_whole
from .ledger import Ledger

Event = Mapping[str, Any]
PAYLOAD = ("payload", "bytes")


@dataclass(frozen=True)
class SiloCustody:
    """Budgets and out-trays of the silos of one treaty, whose rounds cost `events` and which costs `whole` in all.

    `ledger`: the run's, in which a round's cost stands before any silo pays it: a run that is cut off never states
    less than what may have left a silo.
    """

    budgets: Path
    tray: Path
    treaty: str
    unit: str
    events: Sequence[Event]
    whole: Event
    ledger: Ledger | None = None
    _open: dict[str, Budget] = field(default_factory=dict, repr=False)

    def reserve(self, silos: Sequence[str]) -> None:
        """Every silo makes room for the whole treaty, or refuses before anything is trained."""
        for silo in silos:
            self._budget(silo).reserve(self.treaty, self.unit, self.whole)

    def charge(self, silo: str, round: int) -> None:
        if not 0 <= round < len(self.events):
            do = "Whoever asks for more rounds than were agreed must propose a new treaty."
            raise GuaranteeError(f"one of the {len(self.events)} rounds that were agreed", f"round {round + 1}", do)
        if self.ledger is not None:
            body = {"round": round + 1, "event": dict(self.events[round])}
            self.ledger.once("charge", body, same=("round",))
        self._budget(silo).charge(self.treaty, self.unit, round, self.events[round])

    def kept(self, silo: str, task: str) -> tuple[Report, Tree] | None:
        path = self._path(silo)
        if not path.exists():
            return None
        tree, meta = wire.unpack(path.read_bytes())
        if meta["task"] != task:
            return None
        memory = {key: x for key, x in tree.items() if key != PAYLOAD}
        receipt = Receipt(**json.loads(meta["receipt"]))
        return Report(silo, receipt.round, tree[PAYLOAD].tobytes(), receipt), memory

    def keep(self, task: str, report: Report, memory: Tree) -> None:
        tree = {**memory, PAYLOAD: np.frombuffer(report.payload, np.uint8)}
        meta = {"task": task, "receipt": wire.canonical(asdict(report.receipt)).decode()}
        write_whole(self._path(report.silo), wire.pack(tree, meta))
        self._budget(report.silo).released(self.treaty, report.round)

    def _budget(self, silo: str) -> Budget:
        if silo not in self._open:
            self._open[silo] = Budget(self.budgets, silo)
        return self._open[silo]

    def _path(self, silo: str) -> Path:
        return self.tray / f"{quote(silo, safe='')}.safetensors"


@dataclass(frozen=True)
class KeptMechanism:
    """A mechanism whose releases are charged to a ledger before they are made, and kept before they are used."""

    mechanism: Mechanism
    ledger: Ledger
    path: Path

    def init(self) -> Tree:
        return self.mechanism.init()

    def release(self, total: Total, state: Tree) -> tuple[Release, Tree]:
        done = rounds_done(state)
        kept = self._kept(done)
        if kept is not None:
            return kept
        if any(record["kind"] == "round" and record["body"]["round"] == done + 1 for record in self.ledger.records):
            do = "Noise must not be drawn twice for one charge: resume from the last checkpoint, or start a new run."
            raise GuaranteeError("a round that was not released yet", f"round {done + 1}, which was", do)
        events: Sequence[Event] = getattr(self.mechanism, "events", ())
        if events:
            self.ledger.once("charge", {"round": done + 1, "event": dict(events[done])}, same=("round",))
        release, after = self.mechanism.release(total, state)
        self._keep(done, release, after)
        return release, after

    def _kept(self, round: int) -> tuple[Release, Tree] | None:
        if not self.path.exists():
            return None
        tree, meta = wire.unpack(self.path.read_bytes())
        if meta["round"] != round:
            return None
        tensors = {
            (part[len("release ") :], name): x for (part, name), x in tree.items() if part.startswith("release ")
        }
        state = {(part[len("state ") :], name): x for (part, name), x in tree.items() if part.startswith("state ")}
        return Release(tensors, meta["event"], meta["unit"]), state

    def _keep(self, round: int, release: Release, state: Tree) -> None:
        tree = {(f"release {part}", name): x for (part, name), x in release.tensors.items()}
        tree |= {(f"state {part}", name): x for (part, name), x in state.items()}
        meta = {"round": round, "event": dict(release.event), "unit": release.unit}
        write_whole(self.path, wire.pack(tree, meta))
