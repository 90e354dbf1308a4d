"""What a silo has spent of its privacy, over all treaties: one ledger file a silo, kept by the silo.

A file holds records of the kinds `cap` (what the silo's operator allows for life), `treaty` (what a treaty may cost at
most, written when the silo takes part), `charge` (a round's cost, written before anything of that round is released)
and `released` (written once the release is kept, before it leaves). Costs of different treaties compose: the
accountant adds their events, for the same people may be in all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import GuaranteeError
from ..privacy import accountant, events
from .ledger import Ledger, Record

UNITS = ("example", "author", "silo")


@dataclass(frozen=True)
class Cap:
    """The most a silo's operator allows, at `delta`, for one unit, over the silo's life."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not self.epsilon > 0 or not 0 < self.delta < 1:
            do = "Give both, for example --epsilon 10 --delta 1e-5."
            raise GuaranteeError("epsilon > 0 and 0 < delta < 1", f"epsilon={self.epsilon}, delta={self.delta}", do)


class Budget:
    """One silo's budget in `folder`. Opening it verifies the file's chain of hashes."""

    def __init__(self, folder: Path, silo: str) -> None:
        self.silo = silo
        folder.mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger(folder / f"{_file_name(silo)}.jsonl")

    @property
    def cap(self) -> Cap | None:
        """The last cap that was set."""
        body = next((r["body"] for r in reversed(self.ledger.records) if r["kind"] == "cap"), None)
        return None if body is None else Cap(body["epsilon"], body["delta"])

    def allow(self, cap: Cap) -> None:
        """Sets the cap. A lower one than what is spent stops all further treaties."""
        self.ledger.append("cap", {"epsilon": cap.epsilon, "delta": cap.delta})

    def spent(self, unit: str | None = None) -> dict[str, Any]:
        """The event of everything charged so far, for all units or one."""
        return _total(
            [r["body"] for r in self.ledger.records if r["kind"] == "charge" and unit in (None, r["body"]["unit"])]
        )

    def promised(self) -> dict[str, Any]:
        """The event of all treaties in full: what a treaty has not spent yet, it still may."""
        return _total([r["body"] for r in self.ledger.records if r["kind"] == "treaty"])

    def knows(self, treaty: str) -> bool:
        """Whether room was made for this treaty."""
        return any(r["kind"] == "treaty" and r["body"]["treaty"] == treaty for r in self.ledger.records)

    def reserve(self, treaty: str, unit: str, event: Mapping[str, Any]) -> None:
        """Takes note of what a whole treaty will cost. Raises `GuaranteeError` when the cap does not leave room for
        it.
        """
        if self.knows(treaty):
            return
        cap = self.cap
        if cap is not None:
            before = accountant.upper(self.promised(), cap.delta)
            after = accountant.upper(events.together(self.promised(), event), cap.delta)
            if after > cap.epsilon:
                raise GuaranteeError(
                    f"at most ε = {cap.epsilon:g} at δ = {cap.delta:g} over the life of silo {self.silo!r}",
                    f"ε = {after:.3f} with this treaty, of which {before:.3f} is spent or promised",
                    "Ask for less, or leave this silo out: what is spent stays spent.",
                )
        self.ledger.append("treaty", {"treaty": treaty, "unit": unit, "event": dict(event)})

    def charge(self, treaty: str, unit: str, round: int, event: Mapping[str, Any]) -> None:
        """Writes the cost of a round before it is released. Raises `GuaranteeError` when it was released already."""
        if any(self._is(record, "released", treaty, round) for record in self.ledger.records):
            raise GuaranteeError(
                f"a round that silo {self.silo!r} has not released yet",
                f"round {round + 1} of treaty {treaty[:12]}, which it has",
                "Noise must not be drawn twice for one charge: resume the run where it ended, or propose a new treaty.",
            )
        if not any(self._is(record, "charge", treaty, round) for record in self.ledger.records):
            body = {"treaty": treaty, "unit": unit, "round": round, "event": dict(event)}
            self.ledger.append("charge", body)

    def released(self, treaty: str, round: int) -> None:
        """Notes that a round's release exists."""
        if not any(self._is(record, "released", treaty, round) for record in self.ledger.records):
            self.ledger.append("released", {"treaty": treaty, "round": round})

    def _is(self, record: Record, kind: str, treaty: str, round: int) -> bool:
        body = record["body"]
        return record["kind"] == kind and (body["treaty"], body["round"]) == (treaty, round)


def _total(bodies: list[Mapping[str, Any]]) -> dict[str, Any]:
    """All events together; equal ones counted."""
    counts: list[tuple[Mapping[str, Any], int]] = []
    for body in bodies:
        if counts and counts[-1][0] == body["event"]:
            counts[-1] = body["event"], counts[-1][1] + 1
        else:
            counts.append((body["event"], 1))
    return events.together(*(events.repeat(event, times) for event, times in counts))


def _file_name(silo: str) -> str:
    from urllib.parse import quote

    return quote(silo, safe="")
