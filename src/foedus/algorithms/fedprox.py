"""FedProx (Li et al. 2020, arXiv 1812.06127, equation 2): each silo minimises ℓ(w) + μ/2 ‖w − w_t‖².

So every local gradient is pulled back by μ (w − w_t). μ = 0 is FedAvg.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..lm.bench import Bench
from ..silo.shard import Silo
from ..silo.train import LocalPlan, train
from ..types import Task, Tree, Update
from .base import Averaging, delta


@dataclass(frozen=True)
class FedProx(Averaging):
    """Local steps with a pull of strength `mu` ≥ 0 towards the global model."""

    local: LocalPlan
    mu: float = 0.01

    def __post_init__(self) -> None:
        if not self.mu >= 0:
            raise ValueError(f"Expected mu={self.mu} >= 0.")

    def train(
        self, bench: Bench, task: Task, silos: Sequence[Silo], memories: Sequence[Tree]
    ) -> list[tuple[Update, Tree]]:
        results = train(bench, task, silos, self.local, memories, pull=self.mu)
        return [(delta(task, silo, r), r.memory) for silo, r in zip(silos, results, strict=True)]
