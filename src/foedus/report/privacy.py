"""What a run promised, worked out again from its folder alone, and the plot of ε by round."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..errors import RunError
from ..governance.disk import write_whole
from ..governance.ledger import verify
from ..privacy import accountant
from ..privacy.statement import statement
from ..treaty import from_dict, not_covered, unprotected
from .svg import COLOURS, NARROW, WIDE, sheet, standalone


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
                "sentences": [unprotected()]}  # fmt: skip
    charged = _events(records)
    spent = accountant.upper({"mechanism": "together", "of": charged}, facts["delta"])
    epsilon = spent if spent != float("inf") else None
    done = f"This is what the {len(charged)} of {treaty.algorithm.rounds} rounds cost that were begun."
    return {
        "unit": facts["unit"], "neighbours": facts["neighbours"], "epsilon": epsilon, "delta": facts["delta"],
        "rounds": len(charged), "sentences": [*statement(facts, epsilon), done], "not_covered": not_covered(treaty),
        "simulated_noise": facts["simulated_noise"],
    }  # fmt: skip


def _events(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each round's event once: charged before it was released, or recorded after."""
    by_round = {r["body"]["round"]: r["body"]["event"] for r in records if r["kind"] in ("charge", "round")}
    return [by_round[round] for round in sorted(by_round)]


def _rounds(records: Sequence[dict[str, Any]]) -> int:
    return len({record["body"]["round"] for record in records if record["kind"] == "round"})


def plot(points: Sequence[Mapping[str, float]], delta: float, narrow: bool = False) -> Figure:
    """ε by round: PLD, which is stated, and RDP above it. `points`: as `curve.Point` has them."""
    drawn = sheet(NARROW if narrow else WIDE, 260)
    axes = drawn.subplots()
    rounds = [p["round"] for p in points]
    axes.plot(rounds, [p["epsilon"] for p in points], color=COLOURS["federated"], marker="o", label="PLD (stated)")
    axes.plot(rounds, [p["rdp"] for p in points], color=COLOURS["pooled"], linestyle="--", label="RDP")
    axes.set_xlabel("after round")
    axes.set_ylabel(f"epsilon at delta = {delta:g}")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    axes.legend(loc="lower right")
    return drawn


def draw(points: Sequence[Mapping[str, float]], delta: float, path: Path) -> Path:
    """Writes the plot as a picture file of its own."""
    return write_whole(path, standalone(lambda: plot(points, delta)))
