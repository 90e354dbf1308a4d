"""A limited pilot: few silos, few rounds, when to stop, and a treaty draft that says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..treaty import Treaty, from_dict
from .answers import Answers

SILOS, ROUNDS = 5, 10
TASKS = {"write": "causal-lm", "classify": "sequence-classification", "extract": "causal-lm",
         "answer-from-documents": "causal-lm"}  # fmt: skip


@dataclass(frozen=True)
class Pilot:
    """`stops`: what ends it, each to be looked at after every round. `treaty`: the draft."""

    silos: int
    rounds: int
    stops: tuple[str, ...]
    goes_on: str
    treaty: Treaty

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"silos": self.silos, "rounds": self.rounds, "stop": list(self.stops), "go_on": self.goes_on,
                "treaty": self.treaty.resolved()}  # fmt: skip


def pilot(a: Answers) -> Pilot:
    """What to try first. Its ε is what was asked for: what a pilot spends stays spent."""
    silos, rounds = min(a.silos, SILOS), min(a.rounds, ROUNDS)
    return Pilot(silos, rounds, _stops(a, silos), _goes_on(a), from_dict(_tables(a, silos, rounds)))


def _stops(a: Answers, silos: int) -> tuple[str, ...]:
    found = [
        "perplexity on held-out text is above the base model's after round 3",
        "in any silo the federated model is worse than the base model at the end",
        f"two rounds in a row lack more than {max(1, silos // 4)} silo{'s' * (silos // 4 > 1)}",
        "a ledger does not verify, or two parties saw different rounds",
    ]
    if a.unit != "none":
        found.append(f"the projected ε passes {a.epsilon:g}")
        found.append("`foedus audit` finds more than the stated ε allows")
    else:
        found.append("`foedus audit` brings a planted text back word for word")
    return tuple(found)


def _goes_on(a: Answers) -> str:
    gain = {"indicative": 5, "good": 10, "best": 20}[a.quality]
    return (
        f"Go on to all {a.silos} silos and {a.rounds} rounds if perplexity falls by {gain} % or more on held-out text"
        " of every silo, and if each silo gains over training alone, measured in a simulation on public text."
    )


def _tables(a: Answers, silos: int, rounds: int) -> dict[str, Any]:
    secret = silos >= 3
    tables: dict[str, Any] = {
        "treaty": {"name": "pilot", "purpose": "A limited pilot: say here what the model is for, and for whom."},
        "model": {"base": a.base, "task": TASKS[a.task], "max_length": max(8, min(8192, a.tokens))},
        "adapter": {"kind": "lora", "rank": a.rank, "alpha": float(2 * a.rank)},
        "data": {"source": "memory", "text": "text"},
        "silos": {"names": [f"silo-{i + 1}" for i in range(silos)]},
        "split": {"validation": 0.1, "test": 0.1},
        "algorithm": {"name": "fedavg", "rounds": rounds},
        "local": {"steps": a.steps, "batch": a.batch},
        "server": {"weighting": "uniform"},
        "cohort": {"minimum": max(3, silos - 1) if secret else silos},
        "evaluation": {"every": 1, "baselines": ["base"]},
        "disclosure": {"loss": False, "holdings": False},
    }
    if a.task == "classify":
        tables["data"] |= {"label": "label", "labels": ["first", "second"]}
    if a.sensitive:
        tables["data"]["scrub"] = ["addresses", "names", "urls"]
    if a.unit != "none":
        tables["privacy"] = _privacy(a)
    if a.unit == "author":
        tables["data"]["author"] = "author"
    if secret and a.unit != "silo":
        tables["secure"] = {"sums": "masked"}
    return tables


def _privacy(a: Answers) -> dict[str, Any]:
    asked = {"unit": a.unit, "epsilon": a.epsilon, "delta": a.delta}
    if a.unit in ("example", "author"):
        asked["rate"] = min(1.0, a.batch / a.examples)
    return asked
