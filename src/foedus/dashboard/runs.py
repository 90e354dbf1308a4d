"""One run as the coordinator's page shows it: progress, quality, privacy, traffic, silos, ledger.

Only what the treaty discloses is in here: losses and quality are those of all silos together; a silo's name stands
beside its bytes, its time and its failures, and not even there where the treaty hides who takes part.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..report.folder import Ledger, Run, read_run
from .files import changed
from .spending import Spending, spending

REFUSED = ("refus", "charter", "withdrawn", "paused", "left the federation")
"""Words in a silo's answer by which a refusal is told from a failure."""

SLOW = 2.0
"""A silo is a straggler when it takes so many times the median of all."""

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Round:
    """A round of the federated phase. `loss`: mean over all targets of all silos, None where it is not disclosed.
    `came`: the silos that gave something, () where the treaty hides them; `failures`: silo → why.
    """

    number: int
    loss: float | None
    came: tuple[str, ...]
    failures: Mapping[str, str]
    seconds: float
    up: int
    down: int


@dataclass(frozen=True)
class Member:
    """One silo over a run so far. `seconds`: the median of its rounds. `last`: the last round it took part in."""

    name: str
    rounds: int
    failed: int
    refused: int
    last: int
    seconds: float | None
    up: int
    down: int
    why: str = ""
    slow: bool = False


@dataclass(frozen=True)
class RunView:
    """A run as it is now. `quality`: phase → (rounds, perplexities on validation text, all silos together);
    `domains`: domain → phase → perplexity, of the latest evaluation; `damaged`: why its folder cannot be read.
    """

    name: str
    folder: Path
    purpose: str = ""
    digest: str = ""
    ended: bool = False
    planned: int = 0
    minimum: int = 1
    hidden: bool = False
    rounds: tuple[Round, ...] = ()
    quality: Mapping[str, tuple[Sequence[int], Sequence[float]]] = field(default_factory=dict)
    domains: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    measured: str = ""
    privacy: Spending | None = None
    statement: str = ""
    silos: tuple[Member, ...] = ()
    ledger: Ledger = field(default_factory=Ledger)
    changed: float = 0.0
    damaged: str = ""

    @property
    def done(self) -> int:
        """The last round that was released."""
        return self.rounds[-1].number if self.rounds else 0

    @property
    def loss(self) -> float | None:
        """Of the last round that tells one."""
        return next((r.loss for r in reversed(self.rounds) if r.loss is not None), None)

    @property
    def perplexity(self) -> float | None:
        """The latest of the federated model."""
        values = self.quality.get("federated", ((), ()))[1]
        return values[-1] if values else None

    @property
    def up(self) -> int:
        """Bytes from silos."""
        return sum(r.up for r in self.rounds)

    @property
    def down(self) -> int:
        """Bytes to silos."""
        return sum(r.down for r in self.rounds)

    @property
    def failures(self) -> int:
        """Silos that did not give what a round asked for, over all rounds, refusals included."""
        return sum(len(r.failures) for r in self.rounds)

    @property
    def refusals(self) -> int:
        """Those of them that refused."""
        return sum(is_refusal(why) for r in self.rounds for why in r.failures.values())

    @property
    def pace(self) -> float | None:
        """Seconds of a round, the median of the last ten."""
        recent = [r.seconds for r in self.rounds[-10:] if r.seconds > 0]
        return statistics.median(recent) if recent else None

    @property
    def head(self) -> str:
        """The hash of the ledger's last record that fits."""
        whole = self.ledger.records[: self.ledger.broken_at]
        return str(whole[-1].get("hash", "")) if whole else ""


def run_view(folder: Path) -> RunView:
    """What there is to see of a run; never raises for what its folder holds."""
    written = max(changed(folder / name) for name in ("metrics.jsonl", "ledger.jsonl", "summary.json", "treaty.toml"))
    try:
        return _run_view(folder, read_run(folder), written)
    except (RunError, KeyError, TypeError, ValueError, AttributeError) as error:
        said = f"{error.came} in {error.where}" if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
        return RunView(folder.name, folder, damaged=said, changed=written)


def is_refusal(why: str) -> bool:
    """Whether a silo's reason says that it would not, rather than could not."""
    return any(word in why.lower() for word in REFUSED)


def _run_view(folder: Path, run: Run, written: float) -> RunView:
    treaty = run.treaty
    rounds = tuple(_round(record) for record in run.phase("federated"))
    asked = treaty.get("privacy") or {}
    told = run.ledger.records[: run.ledger.broken_at]
    privacy = spending(told, asked.get("epsilon"))
    quality, split = _quality(run)
    return RunView(
        name=folder.name,
        folder=folder,
        purpose=str((treaty.get("treaty") or {}).get("purpose") or ""),
        digest=next((str(r["body"].get("treaty", "")) for r in told if r.get("kind") == "opened"), ""),
        ended=run.ended,
        planned=int((treaty.get("algorithm") or {}).get("rounds") or 0),
        minimum=int((treaty.get("cohort") or {}).get("minimum") or 1),
        hidden=bool(asked.get("hide_cohort")),
        rounds=rounds,
        quality=quality,
        domains=_domains(run, split),
        measured=split,
        privacy=privacy,
        statement=str((run.summary.get("privacy") or {}).get("statement") or ""),
        silos=_members(run.phase("federated"), told),
        ledger=run.ledger,
        changed=written,
    )


def _round(record: Record) -> Round:
    silos, loss = record.get("silos") or {}, record.get("loss")
    return Round(
        number=int(record["round"]),
        loss=float(loss) if isinstance(loss, int | float) and math.isfinite(loss) else None,
        came=tuple(silos),
        failures={str(silo): str(why) for silo, why in (record.get("failures") or {}).items()},
        seconds=sum(float(record.get("seconds", {}).get(part) or 0) for part in ("train", "federation", "checkpoint")),
        up=sum(int(x.get("bytes_up", 0)) for x in silos.values()),
        down=sum(int(x.get("bytes_down", 0)) for x in silos.values()),
    )


def _members(records: Sequence[Record], told: Sequence[Record]) -> tuple[Member, ...]:
    """Silos by name, from what the rounds say of them; those that the ledger opens with are there from the start."""
    named = next((r["body"].get("silos", ()) for r in told if r.get("kind") == "opened"), ())
    seen = {name for r in records for kind in ("silos", "failures") for name in r.get(kind) or {}}
    found = [_member(name, records) for name in sorted({*named, *seen})]
    usual = statistics.median([m.seconds for m in found if m.seconds is not None] or [0.0])
    return tuple(_marked(member, usual) for member in found)


def _member(name: str, records: Sequence[Record]) -> Member:
    gave = [(r["round"], r["silos"][name]) for r in records if name in (r.get("silos") or {})]
    why = [str(r["failures"][name]) for r in records if name in (r.get("failures") or {})]
    refused = sum(map(is_refusal, why))
    seconds = [float(facts["seconds"]) for _, facts in gave if facts.get("seconds")]
    return Member(
        name=name,
        rounds=len(gave),
        failed=len(why) - refused,
        refused=refused,
        last=max((int(round) for round, _ in gave), default=0),
        seconds=statistics.median(seconds) if seconds else None,
        up=sum(int(facts.get("bytes_up", 0)) for _, facts in gave),
        down=sum(int(facts.get("bytes_down", 0)) for _, facts in gave),
        why=why[-1] if why else "",
    )


def _marked(member: Member, usual: float) -> Member:
    slow = member.seconds is not None and usual > 0 and member.seconds > SLOW * usual and member.seconds > 1
    return Member(**{**vars(member), "slow": slow})


def _quality(run: Run) -> tuple[dict[str, tuple[list[int], list[float]]], str]:
    """Perplexity by phase over rounds, of all silos together, on the split that most rounds were measured on."""
    rows = [r for r in run.evaluations if r.get("phase") in ("base", "federated") and r.get("perplexity")]
    splits = [str(r.get("split")) for r in rows]
    if not splits:
        return {}, ""
    split = max(("validation", "test"), key=splits.count)
    series: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        if row.get("split") == split:
            rounds, values = series.setdefault(str(row["phase"]), ([], []))
            rounds.append(int(row.get("round", 0)))
            values.append(float(row["perplexity"]["micro"]))
    return series, split


def _domains(run: Run, split: str) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for row in run.evaluations:
        if row.get("phase") in ("base", "federated") and row.get("split") == split:
            for domain, value in ((row.get("perplexity") or {}).get("by_domain") or {}).items():
                if isinstance(value, int | float):
                    found.setdefault(str(domain), {})[str(row["phase"])] = float(value)
    return dict(sorted(found.items()))
