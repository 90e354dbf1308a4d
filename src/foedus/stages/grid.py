"""Rounding to a public grid, so that sums are integers and noise can be an integer too.

To the nearest point, ties to even; or, in runs without privacy, up or down by a public coin, so that what is rounded
away adds up to nothing on average. Rounding can lengthen an update, and the bound says by how much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from .. import seeds
from ..types import Key, Task, Total, Update
from .base import Plain

DELTA = "delta"
SINGLE = ("metric", "weight")
OTHERS = 16
"""Numbers that an update may have beside its delta, for the bound; the plan refuses more (`check_silos`)."""
MOST = 2**40
"""No rounded coordinate may be larger: the sum of thousands of them, with noise, must stay exact in float64."""


@dataclass(frozen=True)
class Grid(Plain):
    """Divides by `step` (> 0, in update units) and rounds to integers; `decode` multiplies the sum again.

    `scalars`: > 0, the step of weights and metrics, which are single numbers; None for the same one. `stochastic`:
    rounds up with the chance of the fraction, by coins of the task's seed that all can repeat. `most`: integers are cut
    to ±most (≥ 1), which brings no two updates further apart; None refuses those beyond 2⁴⁰. `rounded`: of two
    neighbours, how many are rounded: 1 where the unit is the whole update, and its neighbour zero; 2 where it is one of
    many in it.
    """

    step: float
    scalars: float | None = None
    stochastic: bool = False
    most: int | None = None
    rounded: int = 1

    def __post_init__(self) -> None:
        if not all(0 < step < math.inf for step in (self.step, self.scalars) if step is not None):
            raise ValueError(f"Expected 0 < step={self.step} < ∞, and scalars={self.scalars} alike.")
        if not (self.most is None or 1 <= self.most <= MOST) or self.rounded not in (1, 2):
            raise ValueError(f"Expected 1 <= most={self.most} <= {MOST} and rounded={self.rounded} to be 1 or 2.")

    def encode(self, update: Update, task: Task) -> Update:
        coins = seeds.generator(task.seed, "rounding", task.round, update.silo) if self.stochastic else None
        return replace(update, tensors={key: self._integers(key, x, coins) for key, x in update.tensors.items()})

    def decode(self, total: Total, task: Task) -> Total:
        return replace(total, tensors={key: x * self._step(key) for key, x in total.tensors.items()})

    def bound(self, bound: float, task: Task) -> float:
        """`bound` and what rounding adds to it: at most half a step a number, a whole one where coins decide."""
        numbers = sum(x.size for x in task.params.values())
        length = math.hypot(math.sqrt(numbers) * self.step, math.sqrt(OTHERS) * (self.scalars or self.step))
        return bound + self.rounded * length * (1.0 if self.stochastic else 0.5)

    def _integers(self, key: Key, x: np.ndarray, coins: np.random.Generator | None) -> np.ndarray:
        steps = np.asarray(x, np.float64) / self._step(key)
        whole = np.rint(steps) if coins is None else np.floor(steps + coins.random(steps.shape))
        if not np.abs(whole).max(initial=0.0) <= (MOST if self.most is None else math.inf):  # NaN is not
            raise ValueError(f"Expected coordinates of at most {MOST} steps; take a step larger than {self.step}.")
        return (whole if self.most is None else np.clip(whole, -self.most, self.most)).astype(np.int64)

    def _step(self, key: Key) -> float:
        return self.scalars if self.scalars is not None and key[0] in SINGLE else self.step
