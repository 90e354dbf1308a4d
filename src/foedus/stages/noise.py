"""Noise that a silo adds to its own update before it leaves.

With the whole noise the update protects itself, and the coordinator need not be trusted. A share of the noise protects
only the sum of enough updates, so only where nobody sees one alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ..privacy.noise import Source, discrete_gaussian, gaussian
from ..types import Task, Update
from ..wire import digest
from .base import Chain, Plain


@dataclass(frozen=True)
class AddNoise(Plain):
    """Adds N(0, (multiplier · bound)² / shares) to every number of an update, from the silo's own source.

    `after`: the stages before this one, whose bound it covers. `multipliers`: of each round, > 0. `shares`: among how
    many silos the noise is divided; any so many together add all of it. `step`: > 0 for integers on such a grid, which
    get discrete noise.
    """

    after: Chain
    multipliers: tuple[float, ...]
    source: Source
    shares: int = 1
    step: float | None = None

    def __post_init__(self) -> None:
        if not all(z > 0 for z in self.multipliers) or self.shares < 1:
            raise ValueError(f"Expected multipliers={self.multipliers} > 0 and shares={self.shares} >= 1.")

    def encode(self, update: Update, task: Task) -> Update:
        bound = self.after.bound(math.inf, task)
        if not 0 < bound < math.inf:
            raise ValueError(f"Expected a clip before the noise; the bound is {bound}.")
        std = self.multipliers[task.round] * bound / math.sqrt(self.shares)
        random = self.source.generator("silo", task.round, _name(update))
        if self.step is None:
            noised = {key: x + gaussian(random, x.shape, std) for key, x in update.tensors.items()}
        else:
            noised = {key: x + discrete_gaussian(random, x.shape, std / self.step) for key, x in update.tensors.items()}
        return replace(update, tensors=noised)


def _name(update: Update) -> str:
    """Something that tells silos apart, so that a simulation does not give them all the same noise."""
    return digest(b"".join(np.ascontiguousarray(x).tobytes() for x in update.tensors.values()))
