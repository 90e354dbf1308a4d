"""SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1, option II); with private steps it is DP-SCAFFOLD
(Noble, Bellet and Dieuleveut 2022, arXiv 2111.09278, algorithm 1).

y ← x;  for each local step:  y ← y − η (g(y) − cᵢ + c)
cᵢ⁺ = cᵢ − c + (x − y) / (K η)               the mean of the K gradients, noise included
Δᵢ = y − x,  Dᵢ = cᵢ⁺ − cᵢ;      server:  x ← x + Σ pᵢ Δᵢ,  c ← c + share · Σ pᵢ Dᵢ

Controls are made of gradients that private steps have released, so they cost nothing more. Everybody begins with 0, so
with all silos in every round c = Σ pᵢ cᵢ. c held at 0 for ever is FedAvg.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import TreatyError
from ..lm.bench import Bench
from ..silo.shard import Silo
from ..silo.train import LocalPlan, Trained, train
from ..tree import as_part, minus, part, scale, zeros
from ..types import Key, Params, Task, Tree, Update
from .base import Averaging, Shapes, delta

CONTROL = "control"
PLAIN = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "max_grad_norm": None}


@dataclass(frozen=True)
class Scaffold(Averaging):
    """Local steps of plain SGD, each moved by what the silo's mean gradient lacks of everybody's.

    `share`: the silos of a round over all silos, in (0, 1]. `warm`: so many first rounds the model stays, the steps go
    without controls, and silos report these alone (DP-SCAFFOLD-warm). Controls travel as lr · K · Dᵢ, in the units of
    an update, so that one clip, range or grid serves both parts. Raises `TreatyError` for local steps from whose end
    the mean gradient cannot be read, and for noise that would not cover the controls.
    """

    local: LocalPlan
    share: float = 1.0
    warm: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or self.warm < 0:
            raise ValueError(f"Expected 0 < share={self.share} <= 1 and warm={self.warm} >= 0.")
        _check(self.local)

    def train(
        self, bench: Bench, task: Task, silos: Sequence[Silo], memories: Sequence[Tree]
    ) -> list[tuple[Update, Tree]]:
        own = [part(memory, CONTROL) or zeros(task.params) for memory in memories]
        others = [{key: x for key, x in memory.items() if key[0] != CONTROL} for memory in memories]
        shifts = [self._shift(task, control) for control in own]
        results = train(bench, task, silos, self.local, others, shifts=shifts)
        return [self._answer(task, *each) for each in zip(silos, results, own, shifts, strict=True)]

    def parts(self, shapes: Shapes) -> Mapping[Key, tuple[int, ...]]:
        return {(name, parameter): shape for name in ("delta", CONTROL) for parameter, shape in shapes.items()}

    def extra(self, params: Params) -> Tree:
        return as_part(CONTROL, zeros(params))

    def finish(self, extra: Tree, mean: Tree) -> Tree:
        factor = self.share / self._length
        return {key: np.asarray(c + factor * mean[key], c.dtype) for key, c in extra.items()}

    def _shift(self, task: Task, own: Params) -> Params:
        """c − cᵢ."""
        return zeros(own) if task.round < self.warm else minus(part(task.extra, CONTROL), own)

    def _answer(self, task: Task, silo: Silo, trained: Trained, own: Params, shift: Params) -> tuple[Update, Tree]:
        path = self.local.lr_at(task.round) * self.local.steps_of(silo)
        back = minus(task.params, trained.params)
        control = {name: x / path - shift[name] for name, x in back.items()}
        if task.round < self.warm:
            trained = replace(trained, params=task.params)
        update = delta(task, silo, trained)
        sent = as_part(CONTROL, scale(minus(control, own), self._length))
        return replace(update, tensors={**update.tensors, **sent}), {**trained.memory, **as_part(CONTROL, control)}

    @property
    def _length(self) -> float:
        """Of a round's path where gradients have length 1, as both sides know it."""
        return self.local.lr * (self.local.steps or 1)


def _check(plan: LocalPlan) -> None:
    wrong = [f"{name} = {getattr(plan, name)!r}" for name, right in PLAIN.items() if getattr(plan, name) != right]
    if plan.privacy is not None and plan.privacy.lr is not None:
        wrong.append("shares of noise, which cover the delta alone")
    if wrong:
        raise TreatyError(
            "plain SGD at the silos, whose path divided by lr · steps is the mean gradient (SCAFFOLD, option II)",
            ", ".join(wrong),
            'Set [local] optimizer = "sgd" without momentum, weight_decay and max_grad_norm,'
            ' and [privacy] placement = "silo"; or take another algorithm.',
        )
