"""ε of a run as it goes: spent, projected to the end of the treaty, and the limit.

What is spent is composed from the ledger's events, each round once, and once more for every time that it was redone
with another outcome. What is projected adds the rounds that the plan still has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..errors import FoedusError
from ..privacy import accountant, events
from ..privacy.plan import Terms, round_events

POINTS = 8
"""Of a curve of ε by round."""

SLACK = 1e-6
"""Relative difference of two sums of the same events in another order."""

Record = Mapping[str, Any]
Event = Mapping[str, Any]


@dataclass(frozen=True)
class Spending:
    """ε at `delta` for one `unit`. `points`: (round, ε) so far. `limit`: of the treaty. `simulated`: nobody is
    protected, the figures say what real noise would cost. None for an ε without bound.
    """

    unit: str
    delta: float
    spent: float | None
    projected: float | None
    limit: float | None
    rounds: int
    planned: int
    points: tuple[tuple[int, float], ...] = ()
    simulated: bool = False

    @property
    def over(self) -> bool:
        """Whether the limit is passed already."""
        return self._passes(self.spent)

    @property
    def will_be_over(self) -> bool:
        """Whether the treaty, carried to its end, would pass the limit."""
        return self._passes(self.projected)

    def _passes(self, epsilon: float | None) -> bool:
        return self.limit is not None and (epsilon is None or epsilon > self.limit * (1 + SLACK))


def spending(records: Sequence[Record], limit: float | None = None) -> Spending | None:
    """What a run's ledger says of its privacy; None where its treaty protects nobody, or nothing is opened yet.

    `limit`: the treaty's ε; left out, what the plan promised.
    """
    facts = next((r["body"].get("privacy") for r in records if r.get("kind") == "opened"), None)
    if not facts:
        return None
    delta, planned = float(facts["delta"]), int(facts["terms"]["rounds"])
    charged = by_round(records)
    ends = sorted(charged)
    flat = [event for round in ends for event in charged[round]]
    return Spending(
        unit=str(facts["unit"]),
        delta=delta,
        spent=epsilon(flat, delta),
        projected=epsilon([*flat, *left(facts, set(charged))], delta),
        limit=limit if limit is not None else facts.get("epsilon"),
        rounds=len(charged),
        planned=planned,
        points=tuple(_points(charged, ends, delta)),
        simulated=bool(facts.get("simulated_noise")),
    )


def by_round(records: Sequence[Record]) -> dict[int, list[Event]]:
    """Round (from 1) → the events that it cost: one, and one more for each time that it was redone otherwise."""
    found: dict[int, list[Event]] = {}
    for record in records:
        body = record.get("body") or {}
        if record.get("kind") in ("charge", "round") and body.get("event"):
            known = found.setdefault(int(body["round"]), [])
            if body.get("redone") and record["kind"] == "round":
                known.append(body["event"])
            else:
                known[:1] = [body["event"]]
    return found


def left(facts: Record, done: set[int]) -> list[Event]:
    """What the plan's rounds that are not `done` will cost."""
    terms = {key: _tuples(x) for key, x in facts["terms"].items()}
    try:
        planned = round_events(Terms(**terms), float(facts["noise_multiplier"] or 0.0))
    except (FoedusError, TypeError, ValueError):  # terms of another version
        return []
    return [event for round, event in enumerate(planned, start=1) if round not in done]


def epsilon(charged: Sequence[Event], delta: float) -> float | None:
    """ε of events together, from above; None where there is no bound. Remembered, since accounting takes long."""
    return _epsilon(json.dumps(_counted(charged), sort_keys=True), delta)


@lru_cache(maxsize=512)
def _epsilon(charged: str, delta: float) -> float | None:
    cost = accountant.upper(json.loads(charged), delta)
    return cost if math.isfinite(cost) else None


def _counted(charged: Sequence[Event]) -> dict[str, Any]:
    """All events together, equal ones counted."""
    counts: dict[str, int] = {}
    for event in charged:
        key = json.dumps(event, sort_keys=True)
        counts[key] = counts.get(key, 0) + 1
    return events.together(*(events.repeat(json.loads(key), times) for key, times in counts.items()))


def _points(charged: Mapping[int, Sequence[Event]], ends: Sequence[int], delta: float) -> list[tuple[int, float]]:
    last = len(ends) - 1
    chosen = sorted({round(last * i / (POINTS - 1)) for i in range(POINTS)}) if ends else []
    costs = [(ends[at], epsilon([e for r in ends[: at + 1] for e in charged[r]], delta)) for at in chosen]
    return [(round, cost) for round, cost in costs if cost is not None]


def _tuples(x: Any) -> Any:
    return tuple(_tuples(y) for y in x) if isinstance(x, list) else x
