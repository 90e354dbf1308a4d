"""UDALM (Karouzos, Paraskevopoulos and Potamianos, NAACL 2021, arXiv 2104.07078, section 3), federated: sources have
topic labels, the target has text alone, and all learn the language while the sources learn the topics.

    ℓᵢ = λ · ℓ_topic + (1 − λ) · ℓ_LM        at a silo with labels, over its own text
    ℓᵢ =               (1 − λ) · ℓ_LM        at one without: an unknown topic adds nothing
    Δᵢ and the server's step: FedAvg

Before that, in rounds of pre-training, ℓᵢ = ℓ_LM at silos without labels; the others send zero. The paper's encoder
predicts masked tokens of the target; what is predicted here is the base's own task, be it masked or causal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import TreatyError
from ..lm.bench import Bench
from ..lm.terms import Goal, Topic
from ..silo.shard import Silo
from ..silo.train import LocalPlan, Trained, train
from ..types import Task, Tree, Update
from .base import Averaging, delta


@dataclass(frozen=True)
class Udalm(Averaging):
    """Local steps on topics and tokens together.

    `mix`: λ in [0, 1]. 1 is topics alone, and 0 leaves the head as it is; the paper's is n / (n + m) for n labelled
    and m unlabelled texts of a step, 1/9. `pretrain`: so many first rounds of language modelling on text without
    labels. `local.goal` has the topic head; its weight there counts for nothing. `unlabelled`: the silos without
    labels, as the treaty names them, for a silo's own labels decide nothing that shows: whether it sends noise or zeros
    would tell of a single label.
    """

    local: LocalPlan
    mix: float = 1 / 9
    pretrain: int = 0
    unlabelled: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.mix <= 1 or self.pretrain < 0:
            raise ValueError(f"Expected 0 <= mix={self.mix} <= 1 and pretrain={self.pretrain} >= 0.")
        if self.mix and not any(isinstance(term, Topic) for term in self.local.goal.terms):
            raise TreatyError("a topic head, for UDALM", "none", "Set [topics] weight above 0, and [data] label.")

    def train(
        self, bench: Bench, task: Task, silos: Sequence[Silo], memories: Sequence[Tree]
    ) -> list[tuple[Update, Tree]]:
        early = task.round < self.pretrain
        plan = replace(self.local, goal=Goal() if early else self._goal)
        answers = {s.name: _stay(task, s, memory) for s, memory in zip(silos, memories, strict=True)}
        moving = [i for i, silo in enumerate(silos) if not early or silo.name in self.unlabelled]
        if moving:
            results = train(bench, task, [silos[i] for i in moving], plan, [memories[i] for i in moving])
            for i, r in zip(moving, results, strict=True):
                answers[silos[i].name] = delta(task, silos[i], r), r.memory
        return [answers[silo.name] for silo in silos]

    @property
    def _goal(self) -> Goal:
        """Whatever else the treaty's goal has stays."""
        terms = self.local.goal.terms
        return Goal(1 - self.mix, tuple(replace(t, weight=self.mix) if isinstance(t, Topic) else t for t in terms))


def _stay(task: Task, silo: Silo, memory: Tree) -> tuple[Update, Tree]:
    """Zero, which weighs nothing where examples do."""
    return replace(delta(task, silo, Trained(task.params, 0.0, 0, memory)), weight=0.0), memory
