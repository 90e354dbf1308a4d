"""What a run promised, worked out again from its folder alone, and the plot of ε by round."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..errors import RunError
from ..governance.disk import write_whole
from ..governance.ledger import verify
from ..privacy import accountant
from ..privacy.events import Event
from ..privacy.statement import statement
from ..treaty import from_dict, not_covered, unprotected
from .svg import COLOURS, NARROW, WIDE, sheet, standalone

POINTS = 8  # of the plot of ε by round
DIFFERENT = 25  # rounds of different cost that those points may have among them, before the last


def stated(run: Path) -> dict[str, Any]:
    """The guarantee of the rounds that a run's ledger holds: `epsilon`, `delta`, `unit`, `rounds`, `sentences`,
    `not_covered`.

    ε is composed anew from the ledger's events, after its chain of hashes was verified.
    """
    records = verify(run / "ledger.jsonl") if (run / "ledger.jsonl").exists() else []
    opened = next((record["body"] for record in records if record["kind"] == "opened"), None)
    if opened is None:
        do = "Start it with `foedus run`; a statement is about what a run has released."
        raise RunError("a run that has begun", "a folder without a ledger", do, where=str(run))
    treaty = from_dict(tomllib.loads((run / "treaty.toml").read_text()))
    facts = opened.get("privacy")
    if facts is None:
        return {"unit": "none", "epsilon": None, "delta": None, "rounds": _rounds(records), "not_covered": [],
                "sentences": [unprotected(treaty)]}  # fmt: skip
    charged = events_by_round(records)
    epsilon = spent(charged.values(), facts["delta"])
    done = f"This is what the {len(charged)} of {treaty.algorithm.rounds} rounds cost that were begun."
    return {
        "unit": facts["unit"], "neighbours": facts["neighbours"], "epsilon": epsilon, "delta": facts["delta"],
        "rounds": len(charged), "sentences": [*statement(facts, epsilon), done], "not_covered": not_covered(treaty),
        "simulated_noise": facts["simulated_noise"],
    }  # fmt: skip


def events_by_round(records: Sequence[Mapping[str, Any]]) -> dict[int, Event]:
    """Each round's event once, in the order of rounds: charged before it was released, or recorded after."""
    found = {r["body"]["round"]: r["body"]["event"] for r in records if r["kind"] in ("charge", "round")}
    return {round: found[round] for round in sorted(found)}


def spent(charged: Iterable[Event], delta: float) -> float | None:
    """ε of events together; None where one of them has no guarantee."""
    epsilon = accountant.upper({"mechanism": "together", "of": list(charged)}, delta)
    return epsilon if math.isfinite(epsilon) else None


def points(charged: Mapping[int, Event], delta: float, whole: Mapping[str, float]) -> list[Mapping[str, float]]:
    """ε after some of the rounds, evenly spread, for `plot`: fewer where every round has a cost of its own.

    `charged`: round → event. `whole`: the point after all of them, where it is known, else empty. Accounting for many
    different rounds takes long, and a page must not.
    """
    rounds, kept, work = list(charged), list[Mapping[str, float]](), 0
    last = len(rounds) - 1
    for at in sorted({round(last * i / (POINTS - 1)) for i in range(POINTS)}) if rounds else ():
        if at == last and whole:
            kept.append({"round": rounds[at], **whole})
            continue
        so_far = [charged[r] for r in rounds[: at + 1]]
        different = len({json.dumps(event, sort_keys=True) for event in so_far})
        work += different if different > 1 else 0
        if work <= DIFFERENT or at == last:
            cost = {"mechanism": "together", "of": so_far}
            ends = {"epsilon": accountant.upper(cost, delta), "rdp": accountant.renyi(cost, delta)}
            kept.append({"round": rounds[at], **ends})
    return kept


def _rounds(records: Sequence[dict[str, Any]]) -> int:
    return len({record["body"]["round"] for record in records if record["kind"] == "round"})


def plot(points: Sequence[Mapping[str, float]], delta: float, narrow: bool = False) -> Figure:
    """ε by round: PLD, which is stated, and RDP above it. `points`: as `curve.Point` has them."""
    drawn = sheet(NARROW if narrow else WIDE, 260)
    axes = drawn.subplots()
    rounds = [p["round"] for p in points]
    axes.plot(rounds, [p["epsilon"] for p in points], color=COLOURS["federated"], marker="o", label="PLD (stated)")
    axes.plot(rounds, [p["rdp"] for p in points], color=COLOURS["pooled"], linestyle="--", label="RDP")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("after round")
    axes.set_ylabel(f"epsilon at delta = {delta:g}")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    axes.legend(loc="lower right")
    return drawn


def draw(points: Sequence[Mapping[str, float]], delta: float, path: Path) -> Path:
    """Writes the plot as a picture file of its own."""
    return write_whole(path, standalone(lambda: plot(points, delta)))
