"""What a plan costs along the way, and what else would cost the same: for people who choose a treaty."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..errors import GuaranteeError
from . import accountant
from .noise import SystemSource
from .plan import PrivacyPlan, Terms, make_plan

GROUPS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Point:
    """ε after so many rounds at the plan's δ: `epsilon` by PLD, from above; `rdp` beside it."""

    round: int
    epsilon: float
    rdp: float


@dataclass(frozen=True)
class Group:
    """ε for `size` units that come or go together, at the same δ."""

    size: int
    epsilon: float


@dataclass(frozen=True)
class Alternative:
    """Terms that give the same ε with another multiplier. `noise`: the standard deviation of a step's noise over the
    clip norm, once divided by the batch: what training feels.
    """

    change: str
    multiplier: float
    rate: float
    steps: int
    noise: float


def by_round(plan: PrivacyPlan, points: int = 12) -> list[Point]:
    """ε after some of the rounds, evenly spread, the first and the last among them."""
    rounds = plan.terms.rounds
    chosen = sorted({max(1, round(1 + (rounds - 1) * i / max(1, points - 1))) for i in range(points)})
    costs, delta = [(r, plan.event(r)) for r in chosen], plan.terms.delta
    return [Point(r, accountant.upper(cost, delta), accountant.renyi(cost, delta)) for r, cost in costs]


def by_group(plan: PrivacyPlan) -> list[Group]:
    """ε for units that come or go together; sizes without a finite one are left out."""
    out = []
    for size in GROUPS:
        try:
            out.append(Group(size, accountant.group(plan.event(), size, plan.terms.delta)))
        except GuaranteeError:
            break
    return out


def alternatives(terms: Terms) -> list[Alternative]:
    """Ways to the same ε, the terms themselves first."""
    out = []
    for change, other in _changes(terms):
        try:
            plan = make_plan(other, SystemSource())
        except GuaranteeError:
            continue
        steps = other.steps * other.rounds if other.local else other.rounds
        size = other.divisor if other.local else other.expected
        out.append(Alternative(change, plan.multiplier, other.rate, steps, plan.multiplier / size))
    return out


def _changes(t: Terms) -> Iterator[tuple[str, Terms]]:
    yield "as asked", t
    if t.local and not t.distributed:  # whose steps are rounds
        yield (
            "twice the batch, half the steps",
            replace(t, rate=min(1.0, 2 * t.rate), divisor=2 * t.divisor, steps=max(1, t.steps // 2)),
        )
        yield "half the batch, twice the steps", replace(t, rate=t.rate / 2, divisor=t.divisor / 2, steps=2 * t.steps)
    half = max(1, t.rounds // 2)
    surveys = tuple(round for round in t.surveys if round < half)
    yield (
        "half the rounds",
        replace(t, rounds=half, surveys=surveys, survey_parts=t.survey_parts if surveys else ()),
    )
    if t.local:
        yield "twice the examples", replace(t, rate=t.rate / 2)
    else:
        yield "ten times the silos", replace(t, silos=10 * t.silos, expected=10 * t.expected, parties=10 * t.parties)
