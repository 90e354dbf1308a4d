"""FedAvg (McMahan et al. 2017, arXiv 1602.05629, algorithm 1); with another server optimizer it is FedOpt.

for every silo i:  w ← w_t;  for each local step:  w ← w − η ∇ℓ(w; b)
Δᵢ = w − w_t;      server:  w_{t+1} = w_t + Σ nᵢ Δᵢ / Σ nᵢ
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
class FedAvg(Averaging):
    """Local steps, then the difference."""

    local: LocalPlan

    def train(
        self, bench: Bench, task: Task, silos: Sequence[Silo], memories: Sequence[Tree]
    ) -> list[tuple[Update, Tree]]:
        results = train(bench, task, silos, self.local, memories)
        return [(delta(task, silo, r), r.memory) for silo, r in zip(silos, results, strict=True)]
