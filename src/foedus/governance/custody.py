"""What has been released is kept before it is used, so that a crash never makes anybody release it again with fresh
noise.

`Tray` is a silo's memory of what it gave, before any mask; `SiloCustody` adds the charge to the silo's budget, where
silos add noise, and `Accounted` has written the same charge into the run's ledger by then. `KeptMechanism` is for noise
that the server adds. A release that was cut off before it was kept has left nobody's memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from .. import wire
from ..errors import FoedusError, GuaranteeError
from ..privacy.mechanisms import Mechanism, rounds_done
from ..types import Receipt, Release, Report, Total, Tree
from .budget import Budget
from .ledger import Ledger
from .vault import Vault, keep, kept

if TYPE_CHECKING:
    from ..engines.base import Ask, Engine

Event = Mapping[str, Any]
PAYLOAD = ("payload", "bytes")
TRAY = "out-tray"
"""The folder of a tray, in the folder of a run or of a silo's work under one treaty."""


@dataclass(frozen=True)
class Tray:
    """What each silo gave last, with a file for each held-out split beside that for training, until a later round has
    left it behind; `every`: of all rounds.

    It holds updates before they were masked, so it lies with the silo, and nobody else may read it. `vault`: seals it.
    """

    folder: Path
    every: bool = False
    vault: Vault | None = None

    def charge(self, silo: str, round: int) -> None:
        """Nothing is to be paid."""

    def kept(self, silo: str, task: str, split: str = "") -> tuple[Report, Tree] | None:
        for path in self.folder.glob(f"{_name(silo, split)}.*safetensors"):
            tree, meta = wire.unpack(kept(path, self.vault))
            if meta["task"] == task:
                memory = {key: x for key, x in tree.items() if key != PAYLOAD}
                receipt = Receipt(**json.loads(meta["receipt"]))
                return Report(silo, receipt.round, tree[PAYLOAD].tobytes(), receipt), memory
        return None

    def keep(self, task: str, report: Report, memory: Tree, split: str = "") -> None:
        tree = {**memory, PAYLOAD: np.frombuffer(report.payload, np.uint8)}
        meta = {"task": task, "receipt": wire.canonical(asdict(report.receipt)).decode()}
        keep(self.path(report.silo, report.round, split), wire.pack(tree, meta), self.vault)
        if not split and not self.every:
            self._drop_sums(report.silo, report.round)

    def memory(self, silo: str) -> Tree:
        """What the silo kept for its next round, as it was after the last one that it gave."""
        paths = self.folder.glob(f"{_name(silo, '')}.*safetensors")
        found = [wire.unpack(kept(path, self.vault)) for path in paths]
        rounds = [json.loads(meta["receipt"])["round"] for _, meta in found]
        if not rounds:
            return {}
        tree, _ = found[rounds.index(max(rounds))]
        return {key: x for key, x in tree.items() if key != PAYLOAD}

    def path(self, silo: str, round: int, split: str = "") -> Path:
        """Where the answer of a round lies."""
        return self.folder / f"{_name(silo, split)}.{f'{round}.' if self.every else ''}safetensors"

    def _drop_sums(self, silo: str, round: int) -> None:
        """Removes evaluation sums of states before this round: who trains on has measured those."""
        for path in set(self.folder.glob(f"{_name(silo, '*')}.safetensors")) - {self.path(silo, round)}:
            with suppress(FoedusError, OSError):
                _, meta = wire.unpack(kept(path, self.vault))
                if json.loads(meta["receipt"])["round"] < round:
                    path.unlink()


def _name(silo: str, split: str) -> str:
    """No two silos and splits have names of which one continues the other."""
    return quote(silo, safe="").replace(".", "%2E") + "." + (split or "train")


@dataclass(frozen=True)
class SiloCustody:
    """Budgets and out-trays of the silos of one treaty, whose rounds cost `events` and which costs `whole` in all."""

    budgets: Path
    tray: Path
    treaty: str
    unit: str
    events: Sequence[Event]
    whole: Event
    every: bool = False
    vault: Vault | None = None
    _open: dict[str, Budget] = field(default_factory=dict, repr=False)

    def reserve(self, silos: Sequence[str]) -> None:
        """Every silo makes room for the whole treaty, or refuses before anything is trained."""
        for silo in silos:
            self._budget(silo).reserve(self.treaty, self.unit, self.whole)

    def charge(self, silo: str, round: int) -> None:
        if not 0 <= round < len(self.events):
            do = "Whoever asks for more rounds than were agreed must propose a new treaty."
            raise GuaranteeError(f"one of the {len(self.events)} rounds that were agreed", f"round {round + 1}", do)
        self._budget(silo).charge(self.treaty, self.unit, round, self.events[round])

    def kept(self, silo: str, task: str, split: str = "") -> tuple[Report, Tree] | None:
        return self._tray.kept(silo, task, split)

    def keep(self, task: str, report: Report, memory: Tree, split: str = "") -> None:
        self._tray.keep(task, report, memory, split)
        if not split:
            self._budget(report.silo).released(self.treaty, report.round)

    def memory(self, silo: str) -> Tree:
        return self._tray.memory(silo)

    @property
    def _tray(self) -> Tray:
        return Tray(self.tray, self.every, self.vault)

    def _budget(self, silo: str) -> Budget:
        if silo not in self._open:
            self._open[silo] = Budget(self.budgets, silo)
        return self._open[silo]


@dataclass(frozen=True)
class Accounted:
    """An engine whose rounds stand in the run's ledger, with what they cost, before any silo is asked to train: a run
    that is cut off never states less than what may have left a silo.
    """

    engine: Engine
    ledger: Ledger
    events: Sequence[Event]

    @property
    def memory(self) -> dict[str, Tree]:
        return self.engine.memory

    def ask(self, asks: Sequence[Ask]) -> Iterator[Report]:
        for task in {ask.payload for ask in asks if ask.kind == "train"}:
            round = wire.unpack_task(task).round
            body = {"round": round + 1, "event": dict(self.events[round])}
            self.ledger.once("charge", body, same=("round",))
        yield from self.engine.ask(asks)


@dataclass(frozen=True)
class KeptMechanism:
    """A mechanism whose releases are charged to a ledger before they are made, and kept before they are used: with
    the mechanism's state, from which noise could be told, so `vault` seals it.
    """

    mechanism: Mechanism
    ledger: Ledger
    path: Path
    vault: Vault | None = None

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
        tree, meta = wire.unpack(kept(self.path, self.vault))
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
        keep(self.path, wire.pack(tree, meta), self.vault)
