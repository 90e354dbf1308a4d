"""The scoring: every rule is a line that anybody can read, dispute and change. Points add up; a bar rules out.

An option with the most points, above zero and not barred, is what the advice names first. The points are judgements,
not measurements: what they weigh is whether the option does what is asked, and what it costs beside the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .answers import Answers
from .cost import Costs

OPTIONS = {
    "federation": "train one adapter where the texts lie, and add up updates",
    "pooling": "bring the texts to one place under rules, and train there",
    "retrieval": "let a model look up governed documents, and train nothing",
    "on-premise-inference": "run a base model where the texts lie, and train nothing",
    "redaction": "take out what identifies people, then pool or share what is left",
}
FEW = 1000  # texts of all silos together
SLOW = 0.25  # hours of network a round
LOUD = 1.0
"""Noise felt in a step's mean over the clip norm: beyond it, noise is longer than any signal."""


@dataclass(frozen=True)
class Rule:
    """`points` for or against an `option`; None bars it. `when`: of the answers and the costs of federating."""

    option: str
    points: int | None
    when: Callable[[Answers, Costs], bool]
    because: str


@dataclass(frozen=True)
class Option:
    """One option with the rules that met. `barred`: whether one of them rules it out."""

    name: str
    met: tuple[Rule, ...]

    @property
    def score(self) -> int:
        """The points together."""
        return sum(rule.points or 0 for rule in self.met)

    @property
    def barred(self) -> bool:
        """Whether it is no option."""
        return any(rule.points is None for rule in self.met)

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        reasons = [{"points": rule.points, "because": rule.because} for rule in self.met]
        return {"name": self.name, "about": OPTIONS[self.name], "score": self.score, "barred": self.barred,
                "reasons": reasons}  # fmt: skip


RULES: tuple[Rule, ...] = (
    Rule("federation", None, lambda a, c: a.silos == 1, "There is one place only: nothing to federate."),
    Rule("federation", 4, lambda a, c: a.pooling == "no" and a.silos >= 3,
         "The texts may not be brought together, and three or more hold them: this is what federation is for."),
    Rule("federation", 1, lambda a, c: a.pooling == "under-governance" and a.sensitive,
         "Pooling personal texts takes agreements and a party that all trust; federation needs less of both."),
    Rule("federation", -3, lambda a, c: a.pooling == "yes",
         "The texts may be pooled: federation would cost rounds, bytes and quality, and protect what needs none."),
    Rule("federation", -2, lambda a, c: a.where == "one-organisation", "One organisation can agree with itself."),
    Rule("federation", -2, lambda a, c: a.silos == 2,
         "With two silos each reads the other's update off the sum: secure sums need three."),
    Rule("federation", 1, lambda a, c: a.silos >= 5,
         "A silo hides better in a larger sum, and may be missing at times."),
    Rule("federation", 2, lambda a, c: a.task in ("write", "classify", "extract"),
         "A small adapter learns a style, a vocabulary or a task well."),
    Rule("federation", -3, lambda a, c: a.task == "answer-from-documents",
         "Adapters learn manners, not facts; facts that they do learn can be read out of them."),
    Rule("federation", -1, lambda a, c: a.changes == "yes",
         "What changes every few weeks would be trained again and again."),
    Rule("federation", -2, lambda a, c: a.silos * a.examples < FEW, f"Fewer than {FEW:,} texts in all teach little."),
    Rule("federation", -3, lambda a, c: a.hardware == "none",
         "Every silo has to train, and has nothing to train with."),
    Rule("federation", -2, lambda a, c: c.hours_network > SLOW * a.rounds,
         "A round would take more than a quarter of an hour on the network alone: a lower rank sends less."),
    Rule("federation", -3, lambda a, c: c.felt is not None and c.felt > LOUD,
         "The noise for this ε would be longer than what is learned: ask for less, or have more texts or silos."),
    Rule("pooling", None, lambda a, c: a.pooling == "no", "The texts may not be brought together."),
    Rule("pooling", 4, lambda a, c: a.pooling == "yes",
         "They may be pooled: training in one place is simplest and best."),
    Rule("pooling", 2, lambda a, c: a.pooling == "under-governance", "They may be pooled under rules."),
    Rule("pooling", 1, lambda a, c: a.where == "one-organisation", "One organisation can govern one place."),
    Rule("pooling", 1, lambda a, c: a.quality == "best", "Nothing trains better than on all texts together."),
    Rule("pooling", -2, lambda a, c: a.sensitivity == "special",
         "One place with all special categories is one leak away."),
    Rule("pooling", -1, lambda a, c: a.where == "several-organisations" and a.sensitive,
         "Someone must hold everybody's texts, and answer for them."),
    Rule("pooling", -2, lambda a, c: a.task == "answer-from-documents", "Training teaches manners more than facts."),
    Rule("retrieval", 5, lambda a, c: a.task == "answer-from-documents",
         "Looking facts up is exact, can cite its source, and forgets what is deleted."),
    Rule("retrieval", 2, lambda a, c: a.changes == "yes", "An index changes with its documents; a model does not."),
    Rule("retrieval", -2, lambda a, c: a.task in ("write", "classify"), "Looking up teaches no style and no classes."),
    Rule("retrieval", -1, lambda a, c: a.pooling == "no" and a.where == "several-organisations",
         "Each silo would search its own documents alone: a search across silos shows them."),
    Rule("retrieval", 1, lambda a, c: a.silos * a.examples < FEW, "It works from the first document on."),
    Rule("on-premise-inference", 3, lambda a, c: a.quality == "indicative",
         "A base model may be good enough as it is."),
    Rule("on-premise-inference", 2, lambda a, c: a.silos * a.examples < FEW, "There are too few texts to train on."),
    Rule("on-premise-inference", 1, lambda a, c: a.sensitivity == "special",
         "Nothing is trained, so nothing is remembered."),
    Rule("on-premise-inference", 1, lambda a, c: a.task == "extract", "Instructed models extract well untrained."),
    Rule("on-premise-inference", -2, lambda a, c: a.quality == "best", "An untrained model does not know the domain."),
    Rule("on-premise-inference", -2, lambda a, c: a.hardware == "none", "There is nothing to run it on."),
    Rule("redaction", 2, lambda a, c: a.sensitivity == "personal" and a.pooling == "under-governance",
         "Where identifiers are what forbids pooling, taking them out may allow it."),
    Rule("redaction", -2, lambda a, c: a.sensitivity == "special",
         "What a text is about identifies people too; names are not all of it."),
    Rule("redaction", -1, lambda a, c: a.sensitivity in ("public", "internal"), "There is little to take out."),
    Rule("redaction", -1, lambda a, c: a.quality == "best",
         "What is taken out is not learned, and some is taken wrongly."),
    Rule("redaction", -2, lambda a, c: a.pooling == "no", "It is no permission: what is left may still not be pooled."),
)  # fmt: skip


def judge(a: Answers, c: Costs) -> tuple[Option, ...]:
    """Every option, the best first; barred ones last."""
    found = [Option(name, tuple(r for r in RULES if r.option == name and r.when(a, c))) for name in OPTIONS]
    return tuple(sorted(found, key=lambda option: (option.barred, -option.score)))
