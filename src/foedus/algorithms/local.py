"""Local-only: every silo trains for itself, by the steps of the federation it is compared with, and sends nothing.

for every silo i, from where its last round ended:  w ← w − η ∇ℓ(w; b)
Δᵢ = 0

With private steps what it predicts has the guarantee of these steps, so it stands beside the others at the same ε.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import GuaranteeError
from ..lm.bench import Batch, Bench
from ..silo.shard import Silo
from ..silo.train import LocalPlan, train
from ..tree import as_part, part
from ..types import Params, Task, Tree, Update
from .base import Averaging, delta

OWN = "own"


@dataclass(frozen=True)
class Alone(Averaging):
    """A silo's parameters stay in its memory, and its predictions are theirs. The model of the federation stays.

    Raises `GuaranteeError` for shares of noise, which would be added to zeros, while the parameters have none.
    """

    local: LocalPlan

    def __post_init__(self) -> None:
        if self.local.privacy is not None and self.local.privacy.lr is not None:
            raise GuaranteeError(
                "steps with noise of their own, for silos that train alone",
                "shares of noise, which are added to updates",
                'Set [privacy] placement = "silo".',
            )

    def train(
        self, bench: Bench, task: Task, silos: Sequence[Silo], memories: Sequence[Tree]
    ) -> list[tuple[Update, Tree]]:
        return [self._alone(bench, task, silo, memory) for silo, memory in zip(silos, memories, strict=True)]

    def scores(self, bench: Bench, params: Params, silo: Silo, batch: Batch, memory: Tree) -> dict[str, np.ndarray]:
        return bench.scores(part(memory, OWN) or params, batch)

    def _alone(self, bench: Bench, task: Task, silo: Silo, memory: Tree) -> tuple[Update, Tree]:
        here = replace(task, params=part(memory, OWN) or task.params)
        other = {key: x for key, x in memory.items() if key[0] != OWN}
        (trained,) = train(bench, here, [silo], self.local, [other])
        update = delta(task, silo, replace(trained, params=task.params))
        return update, {**trained.memory, **as_part(OWN, trained.params)}
