"""Rounding to a public grid, so that sums are integers and noise can be an integer too.

Deterministic rounding to the nearest point, ties to even; the norm of an update of d numbers grows by at most √d ·
step / 2, and the bound says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ..types import Task, Total, Update
from .base import Plain

MOST = 2**40
"""No rounded coordinate may be larger: the sum of thousands of them, with noise, must stay exact in float64."""


@dataclass(frozen=True)
class Grid(Plain):
    """Divides by `step` (> 0, in update units) and rounds to integers; `decode` multiplies the sum again."""

    step: float

    def __post_init__(self) -> None:
        if not 0 < self.step < math.inf:
            raise ValueError(f"Expected 0 < step={self.step} < ∞.")

    def encode(self, update: Update, task: Task) -> Update:
        rounded = {key: np.rint(np.asarray(x, np.float64) / self.step) for key, x in update.tensors.items()}
        if any(np.abs(x).max(initial=0.0) > MOST for x in rounded.values()):
            raise ValueError(f"Expected coordinates of at most {MOST} steps; take a step larger than {self.step}.")
        return replace(update, tensors={key: x.astype(np.int64) for key, x in rounded.items()})

    def decode(self, total: Total, task: Task) -> Total:
        return replace(total, tensors={key: x * self.step for key, x in total.tensors.items()})

    def bound(self, bound: float, task: Task) -> float:
        """`bound` and what rounding adds to it; d is the number of parameters, and a few more for other parts."""
        numbers = sum(x.size for x in task.params.values()) + 16
        return bound + math.sqrt(numbers) * self.step / 2
