"""Weighting as a stage: big silos count for more, and the weight travels as one more coordinate of the sum.

A weighted mean is one released sum divided by another, Σ wᵢ Δᵢ / Σ wᵢ, so no weight is ever sent on its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ..types import Key, Task, Update
from .base import Plain

WEIGHT: Key = ("weight", "sum")


@dataclass(frozen=True)
class Weigh(Plain):
    """Scales an update by its weight wᵢ and adds wᵢ as the coordinate `("weight", "sum")`.

    `by`: "examples" weighs by the number of training examples (McMahan et al. 2017, eq. 1: nᵢ / n), "uniform" by 1.
    `max_weight`: no silo weighs more; > 0, or None for no cap (and then no bound, unless uniform).
    The part `metric` is left alone: its entries are sums already.
    """

    by: Literal["examples", "uniform"] = "examples"
    max_weight: float | None = None

    def __post_init__(self) -> None:
        if self.max_weight is not None and not self.max_weight > 0:
            raise ValueError(f"Expected max_weight={self.max_weight} > 0.")

    def encode(self, update: Update, task: Task) -> Update:
        weight = min(update.weight if self.by == "examples" else 1.0, self._cap)
        scaled = {
            key: x if key[0] == "metric" else x * np.asarray(weight, x.dtype) for key, x in update.tensors.items()
        }
        return replace(update, tensors=scaled | {WEIGHT: np.array([float(weight)])})

    def bound(self, bound: float, task: Task) -> float:
        weight = min(self._cap, 1.0) if self.by == "uniform" else self._cap
        return weight * math.hypot(bound, 1.0)

    @property
    def _cap(self) -> float:
        return math.inf if self.max_weight is None else self.max_weight
