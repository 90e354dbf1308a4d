"""DANN (Ganin and Lempitsky 2015, arXiv 1409.7495, equations 4–6), federated (after Peng et al. 2020, arXiv 1911.02054,
without features that travel): a head learns which silo a text is from, and the features learn to hide it.

d_i = silo i's number;     ℓᵢ = ℓ(w; b) + weight · CE(head(R_λ(h(x))), d_i)
R_λ(h) = h,  ∂R_λ/∂h = −λ,     λ = 2 / (1 + exp(−10 p)) − 1     at p = round / rounds
Δᵢ and the server's step: FedAvg, of the head as well

A silo sees its own class alone, so only the mean of all silos' heads tells them apart, and the more steps a round has
the further each head runs to its own silo.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import SiloError, one_of
from ..lm.bench import Bench
from ..lm.terms import Goal, Reversal
from ..silo.shard import Silo
from ..silo.train import LocalPlan, train
from ..types import Task, Tree, Update
from .base import Averaging, delta


@dataclass(frozen=True)
class Dann(Averaging):
    """Local steps with a discriminator behind a gradient that is reversed.

    `domains`: the federation's silos, in the order of the outputs of the head "domains"; public. `weight` ≥ 0 of the
    discriminator's loss; 0 is FedAvg. The paper's is 1, for features that it trains from scratch.
    """

    local: LocalPlan
    domains: tuple[str, ...]
    weight: float = 0.1

    def __post_init__(self) -> None:
        if not self.weight >= 0 or len(set(self.domains)) < len(self.domains):
            raise ValueError(f"Expected weight={self.weight} >= 0 and distinct domains={self.domains}.")

    def train(
        self, bench: Bench, task: Task, silos: Sequence[Silo], memories: Sequence[Tree]
    ) -> list[tuple[Update, Tree]]:
        goals = [self._goal(task, silo) for silo in silos]
        results = train(bench, task, silos, self.local, memories, goals=goals)
        return [(delta(task, silo, r), r.memory) for silo, r in zip(silos, results, strict=True)]

    def _goal(self, task: Task, silo: Silo) -> Goal:
        if silo.name not in self.domains:
            known = one_of(silo.name, self.domains)
            raise SiloError("one of the silos that the discriminator knows", f'"{silo.name}"', known)
        strength = reversed_by(task.round / self.local.rounds)
        return self.local.goal.plus(Reversal(self.weight, self.domains.index(silo.name), strength=strength))


def reversed_by(progress: float) -> float:
    """λ at a share of training in [0, 1]: from 0 to almost 1 (Ganin and Lempitsky 2015, section 4).

    >>> round(reversed_by(0.0), 4), round(reversed_by(0.5), 4), round(reversed_by(1.0), 4)
    (0.0, 0.9866, 0.9999)
    """
    return 2 / (1 + math.exp(-10 * progress)) - 1
