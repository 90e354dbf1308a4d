"""What the pages know: read-only pictures of a coordinator's home and of a silo's, taken from files alone.

`look()` takes one; `stamp()` says cheaply whether another would differ. Files may be absent, half written, or change
while they are read: a picture then lacks something, and the next one has it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from ..errors import FoedusError
from ..report.folder import verify_chain
from . import files
from .alarms import Alarm, of_federation, of_silo
from .charter import charter_words
from .released import Version, versions
from .runs import RunView, run_view
from .spending import epsilon

CLOCK = 30.0
"""Seconds after which a picture is taken anew though no file changed: some alarms are about time."""

RUN_FILES = ("metrics.jsonl", "ledger.jsonl", "summary.json", "treaty.toml")
MOST_REFUSALS = 200
ROUNDS = ("train", "open", "deposit")
"""Kinds of ask by which a silo gives something of a round; of a round under secure sums, the update is in the last."""


@dataclass(frozen=True)
class Federation:
    """A coordinator's home. `runs`: the newest first. `superlink`: whether the transport runs, None where unknown."""

    home: Path
    name: str
    address: str = ""
    runs: tuple[RunView, ...] = ()
    members: tuple[Mapping[str, Any], ...] = ()
    versions: tuple[Version, ...] = ()
    treaties: tuple[Mapping[str, Any], ...] = ()
    ledger_records: int = 0
    ledger_fits: bool = True
    ledger_said: str = ""
    ledger_head: str = ""
    superlink: bool | None = None
    deadline: float = 0.0
    running: Mapping[str, Any] = field(default_factory=dict)
    alarms: tuple[Alarm, ...] = ()

    def run(self, name: str = "") -> RunView | None:
        """A run by name; by default the newest. None where there is none of that name."""
        if not name:
            return self.runs[0] if self.runs else None
        return next((run for run in self.runs if run.name == name), None)


@dataclass(frozen=True)
class Agreed:
    """A treaty in a silo's home. `says`: what leaves the silo, a line each. ε at the budget's δ: `spent`, and
    `promised` for all of it; None where nobody is protected.
    """

    name: str
    digest: str
    rounds: int
    purpose: str
    signed: bool
    state: str
    says: tuple[str, ...] = ()
    unit: str = "none"
    given: int = 0
    spent: float | None = None
    promised: float | None = None


@dataclass(frozen=True)
class Refusal:
    """Messages that the silo did not answer as they asked. `number`: of the ledger's record, the last of its kind;
    `count`: how many there were by then; `clauses`: of the charter, where that said no.
    """

    number: int
    reason: str
    ask: str
    treaty: str
    count: int = 1
    clauses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Given:
    """A round that the silo gave. Nothing of what is in it."""

    treaty: str
    round: int
    ask: str
    payload: str
    size: int | None = None


@dataclass(frozen=True)
class Silo:
    """A silo's home. ε of all treaties at `delta`: `spent`, `promised`, and the most that its operator allows."""

    home: Path
    name: str
    coordinator: str = ""
    federation: str = ""
    connected: bool | None = None
    keys: str = ""
    paused: bool = False
    left: bool = False
    withdrawn: tuple[str, ...] = ()
    charter: Mapping[str, Any] = field(default_factory=dict)
    clauses: tuple[tuple[str, str], ...] = ()
    treaties: tuple[Agreed, ...] = ()
    rounds: tuple[Given, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    spent: float | None = None
    promised: float | None = None
    cap: float | None = None
    delta: float | None = None
    ledger_records: int = 0
    ledger_fits: bool = True
    ledger_said: str = ""
    ledger_head: str = ""
    alarms: tuple[Alarm, ...] = ()


class View(Protocol):
    """What an app asks of either."""

    home: Path

    def stamp(self) -> str:
        """Differs when a picture taken now would."""

    def look(self) -> Any:
        """A picture, taken now."""


@dataclass(frozen=True)
class CoordinatorView:
    """The coordinator's home; also a folder of runs, or a single run's folder, as a home with no more than that."""

    home: Path

    def stamp(self) -> str:
        """See `View`."""
        more = [path for run in self._runs() for path in _named(run, RUN_FILES)]
        own = ("federation.toml", "ledger.jsonl", "status.json", "registry.db", "registry.db-wal", "tls/server.crt")
        return files.stamp(
            [*_named(self.home, own), *more, *_all(self.home / "members"), *_all(self.home / "treaties")], _tick()
        )

    def look(self) -> Federation:
        """See `View`."""
        config, status = files.table(self.home / "federation.toml"), files.table(self.home / "status.json")
        found = [run_view(folder) for folder in self._runs()]
        config = {**config, **files.part(config, "federation")}
        records, fits, said, head = _ledger(self.home / "ledger.jsonl", skip=self._single())
        link = files.part(status, "superlink")
        picture = Federation(
            home=self.home,
            name=str(config.get("name") or status.get("name") or self.home.resolve().name),
            address=str(config.get("address") or link.get("address") or ""),
            runs=tuple(sorted(found, key=lambda run: (run.ended, -run.changed))),
            members=tuple(_member(path, status) for path in _all(self.home / "members")),
            versions=versions(self.home, str(config.get("registry") or "")),
            treaties=tuple(_proposal(path) for path in _treaty_files(self.home)),
            ledger_records=len(records),
            ledger_fits=fits,
            ledger_said=said,
            ledger_head=head,
            superlink=link.get("alive") if isinstance(link.get("alive"), bool) else None,
            deadline=_number(config.get("deadline_s"), 0.0),
            running=files.part(status, "run"),
        )
        return Federation(**{**vars(picture), "alarms": of_federation(picture)})

    def _runs(self) -> list[Path]:
        if self._single():
            return [self.home]
        inner = self.home / "runs"
        return [folder for folder in files.folders(inner if inner.is_dir() else self.home) if _is_run(folder)]

    def _single(self) -> bool:
        return _is_run(self.home)


@dataclass(frozen=True)
class SiloView:
    """A silo's home."""

    home: Path

    def stamp(self) -> str:
        """See `View`."""
        own = ("silo.toml", "charter.toml", "state.json", "status.json", "ledger.jsonl", "invitation.json")
        budgets = _all(self.home / "budgets")
        return files.stamp([*_named(self.home, own), *budgets, *_all(self.home / "treaties")], _tick())

    def look(self) -> Silo:
        """See `View`."""
        config, status = files.table(self.home / "silo.toml"), files.table(self.home / "status.json")
        config = {**config, **files.part(config, "silo")}
        state, charter = files.table(self.home / "state.json"), files.table(self.home / "charter.toml")
        name = str(config.get("name") or status.get("name") or self.home.resolve().name)
        records, fits, said, head = _ledger(self.home / "ledger.jsonl")
        budget, delta, cap = _budget(self.home / "budgets", charter)
        connected = status.get("connected")
        picture = Silo(
            home=self.home,
            name=name,
            coordinator=str(status.get("coordinator") or config.get("coordinator") or ""),
            federation=str(files.table(self.home / "invitation.json").get("name") or ""),
            connected=connected if isinstance(connected, bool) else None,
            keys=str(status.get("keys") or ""),
            paused=bool(state.get("paused")),
            left=bool(state.get("left")),
            withdrawn=tuple(_withdrawn(state)),
            charter=charter,
            clauses=tuple(charter_words(charter)),
            treaties=tuple(_agreed(self.home, name, status, state, records, budget, delta)),
            rounds=tuple(_given(records)),
            refusals=tuple(_refusals(records)),
            spent=_total(budget, "charge", delta),
            promised=_total(budget, "treaty", delta),
            cap=cap,
            delta=delta,
            ledger_records=len(records),
            ledger_fits=fits,
            ledger_said=said,
            ledger_head=head,
        )
        return Silo(**{**vars(picture), "alarms": of_silo(picture)})


# The coordinator's files


def _is_run(folder: Path) -> bool:
    return (folder / "treaty.toml").is_file() and not (folder / "federation.toml").is_file()


def _member(path: Path, status: Mapping[str, Any]) -> dict[str, Any]:
    card = files.table(path)
    now = files.part(status, "silos", path.stem)
    return {
        "name": str(card.get("name") or path.stem),
        "revoked": bool(card.get("revoked")),
        "connected": now.get("connected"),
        "since": _minute(now.get("since")),
    }


def _proposal(path: Path) -> dict[str, Any]:
    """A treaty's file as far as a page needs it, without checking a signature."""
    found = files.table(path)
    tables = files.part(found, "treaty")
    heading, silos = files.part(tables, "treaty"), files.part(found, "silos")
    return {
        "name": str(heading.get("name") or path.name.removesuffix(".treaty.json")),
        "digest": str(found.get("digest") or path.parent.name),
        "rounds": _number(files.part(tables, "algorithm").get("rounds"), 0),
        "purpose": str(heading.get("purpose") or ""),
        "silos": sorted(silos),
        "signed": sorted(name for name, line in silos.items() if isinstance(line, dict) and line.get("signature")),
        "tables": tables,
    }


def _treaty_files(home: Path) -> list[Path]:
    return [path for path in _all(home / "treaties") if path.name.endswith(".treaty.json")]


# The silo's files


def _agreed(
    home: Path, silo: str, status: Mapping, state: Mapping, records: Sequence, budget: Sequence, delta: float | None
) -> Iterable[Agreed]:
    for path in _treaty_files(home):
        found = _proposal(path)
        digest, now = found["digest"], files.part(status, "treaties", path.parent.name)
        mine = [r for r in budget if r["body"].get("treaty", "").startswith(digest)]
        withdrawn = any(x.startswith(digest) for x in _withdrawn(state))
        yield Agreed(
            name=found["name"],
            digest=digest,
            rounds=int(found["rounds"]),
            purpose=found["purpose"],
            signed=silo in found["signed"],
            state="withdrawn" if withdrawn else str(now.get("state") or ""),
            says=tuple(_leaves(found["tables"])),
            unit=str(files.part(found, "tables", "privacy").get("unit") or "none"),
            given=len({g.round for g in _given(records) if g.treaty.startswith(digest)}),
            spent=_total(mine, "charge", delta),
            promised=_total(mine, "treaty", delta),
        )


def _withdrawn(state: Mapping[str, Any]) -> list[str]:
    said = state.get("withdrawn")
    return list(map(str, said)) if isinstance(said, list) else []


def _leaves(tables: Mapping[str, Any]) -> list[str]:
    from ..treaty import describe, from_dict

    try:
        return describe(from_dict(tables))
    except FoedusError:
        return []


def _given(records: Sequence[Mapping[str, Any]]) -> list[Given]:
    return [
        Given(
            str(b.get("treaty", "")), int(_number(b.get("round"), 0)), str(b.get("ask", "")), str(b.get("payload", "")),
            b.get("bytes_up") if isinstance(b.get("bytes_up"), int) else None,
        )
        for r in records
        if r.get("kind") == "answered" and (b := r["body"]).get("ask") in ROUNDS and not b.get("failure")
    ]  # fmt: skip


def _refusals(records: Sequence[Mapping[str, Any]]) -> list[Refusal]:
    """One for each kind, the latest first: a ledger counts refusals that differ in nothing."""
    found: dict[tuple, Refusal] = {}
    for record in records:
        if record.get("kind") == "refused":
            body = record["body"]
            count, facts = int(_number(body.get("count"), 1)), {k: v for k, v in body.items() if k != "count"}
            key = (json.dumps(facts, sort_keys=True),)
            found.pop(key, None)
            found[key] = Refusal(
                int(record["index"]), str(body.get("reason", "")), str(body.get("ask", "")),
                str(body.get("treaty", "")), count, tuple(map(str, body.get("clauses") or ())),
            )  # fmt: skip
    return list(reversed(found.values()))[:MOST_REFUSALS]


def _budget(folder: Path, charter: Mapping) -> tuple[list[Mapping[str, Any]], float | None, float | None]:
    """The records of all budgets here, and (δ, ε) of the cap: the operator's, or else the charter's."""
    records = [r for path in _all(folder) if path.suffix == ".jsonl" for r in verify_chain(files.objects(path)).records]
    records = [r for r in records if isinstance(r.get("body"), dict)]
    cap = next((r["body"] for r in reversed(records) if r.get("kind") == "cap"), None)
    clause = files.part(charter, "privacy")
    own, delta = _number(clause.get("epsilon_for_life"), 0) or None, _number(clause.get("delta"), 0) or None
    if cap is None:
        return records, delta, own
    return records, cap["delta"], min(cap["epsilon"], own or cap["epsilon"])


def _total(records: Sequence[Mapping[str, Any]], kind: str, delta: float | None) -> float | None:
    """ε of all events of a kind together; None where there is no δ to state it at, or none of the kind."""
    events = [r["body"]["event"] for r in records if r.get("kind") == kind and r["body"].get("event")]
    if delta is None or not events:
        return 0.0 if delta is not None else None
    try:
        return epsilon(events, delta)
    except FoedusError:
        return None


# Both


def _ledger(path: Path, skip: bool = False) -> tuple[list[Mapping[str, Any]], bool, str, str]:
    """Its records, whether they fit, what does not, and the hash of the last one. `skip`: it is a run's."""
    if skip:
        return [], True, "", ""
    chain = verify_chain(files.objects(path))
    records = [r for r in chain.records if isinstance(r.get("body"), dict)]
    said = "" if chain.broken_at is None else f"Line {chain.broken_at + 1} does not fit: {chain.why}."
    return records, chain.broken_at is None, said, str(records[-1].get("hash", "")) if records else ""


def _named(folder: Path, names: Iterable[str]) -> list[Path]:
    return [folder / name for name in names]


def _all(folder: Path) -> list[Path]:
    """Every file in a folder and in the folders inside it, by name."""
    try:
        return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    except OSError:
        return []


def _number(value: Any, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else otherwise


def _tick() -> str:
    return str(int(time.time() / CLOCK))


def _minute(when: Any) -> str:
    """A moment in ISO 8601 as people read it; "" for none, and what is no moment as it is."""
    try:
        return f"{datetime.fromisoformat(str(when)).astimezone(UTC):%Y-%m-%d %H:%M} UTC" if when else ""
    except ValueError:
        return str(when)
