"""Clipping as a stage: a silo's whole update, extra parts included, is brought to an L2 norm of at most C.

With `quantile` the norm follows the updates: each silo adds one bit, whether its update was within the norm, and the
server moves the norm by the released (noised, charged) share of such silos. Andrew et al. 2021 (arXiv 1905.03871),
algorithm 1, with its letters: C ← C · exp(−η_C (b̃ − γ)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ..tree import finite, norm, scale, zeros
from ..types import Key, Task, Tree, Update
from .base import Plain, Settings

WITHIN: Key = ("within", "sum")
NORM = "clip"


@dataclass(frozen=True)
class Clip(Plain):
    """Brings an update to L2 norm `max_norm` (> 0, in update units) at most.

    `quantile`: γ in (0, 1), or None for a fixed norm; `rate`: η_C > 0. `bit`: what the bit weighs in the sum, beside
    a norm of 1 for the update; the bit is sent as ±`bit` / 2 times the current norm, so that one bound holds both.
    Guarantees: a zero update stays zero; one with a NaN or an infinity becomes zero; the norm of what leaves is at most
    `bound`.
    """

    max_norm: float
    quantile: float | None = None
    rate: float = 0.2
    bit: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.max_norm < math.inf:
            raise ValueError(f"Expected 0 < max_norm={self.max_norm} < ∞.")
        if self.quantile is not None and not (0 < self.quantile < 1 and self.bit > 0 and self.rate > 0):
            raise ValueError(f"Expected 0 < quantile={self.quantile} < 1, bit={self.bit} > 0 and rate={self.rate} > 0.")

    def encode(self, update: Update, task: Task) -> Update:
        limit = self._limit(task.settings)
        whole = norm(update.tensors) if finite(update.tensors) else math.inf
        factor = 1.0 if whole <= limit else (limit / whole if whole < math.inf else 0.0)
        tensors = _within(scale(update.tensors, factor), limit) if factor else zeros(update.tensors)
        if self.quantile is not None:
            tensors = {**tensors, WITHIN: np.array([math.copysign(self.bit * limit / 2, limit - whole)])}
        return replace(update, tensors=tensors)

    def bound(self, bound: float, task: Task) -> float:
        limit = self._limit(task.settings)
        return limit if self.quantile is None else limit * math.hypot(1.0, self.bit / 2)

    def start(self) -> Settings:
        return {} if self.quantile is None else {NORM: self.max_norm}

    def learn(self, mean: Tree, settings: Settings) -> Settings:
        """The next round's norm, from the mean of the released bits."""
        if self.quantile is None or WITHIN not in mean:
            return settings
        limit = self._limit(settings)
        share = float(np.clip(float(mean[WITHIN][0]) / (self.bit * limit) + 0.5, 0.0, 1.0))
        return {**settings, NORM: limit * math.exp(-self.rate * (share - self.quantile))}

    def _limit(self, settings: Settings) -> float:
        return self.max_norm if self.quantile is None else float(settings[NORM])


def _within(tensors: Tree, limit: float) -> Tree:
    """The same, a rounding error smaller where rounding left it over the limit."""
    over = norm(tensors)
    return tensors if over <= limit else scale(tensors, limit / over * (1 - 1e-6))
