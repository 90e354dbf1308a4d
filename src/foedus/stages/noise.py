"""Noise that a silo adds to its own update before it leaves.

With the whole noise the update protects itself, and the coordinator need not be trusted. A share of the noise protects
only the sum of enough updates, so only where nobody sees one alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ..errors import GuaranteeError, SiloError
from ..privacy.noise import Source, discrete_gaussian, gaussian
from ..types import Task, Update
from .base import Chain, Plain
from .grid import DELTA


@dataclass(frozen=True)
class Tail:
    """Where noise ends, so that sums fit into words. `std`: of the noise, at most; `most`: a draw that is larger is
    discarded with all that the silo would have sent. Both in steps of the grid.
    """

    std: float
    most: int


@dataclass(frozen=True)
class AddNoise(Plain):
    """Adds N(0, (multiplier · bound)² / shares) to every number of an update, from the silo's own source.

    `after`: the stages before this one, and `incoming`: the most one unit moves what comes into them, in L2 and update
    units; ∞ where it is they who limit it. `multipliers`: of each round, > 0. `shares`: among how many silos the noise
    is divided; any so many together add all of it. `step`: > 0 for integers on such a grid, which get discrete noise;
    `tail`: where that ends.
    """

    after: Chain
    multipliers: tuple[float, ...]
    source: Source
    shares: int = 1
    step: float | None = None
    tail: Tail | None = None
    incoming: float = math.inf

    def __post_init__(self) -> None:
        if not all(z > 0 for z in self.multipliers) or self.shares < 1:
            raise ValueError(f"Expected multipliers={self.multipliers} > 0 and shares={self.shares} >= 1.")
        if self.tail is not None and self.step is None:
            raise ValueError(f"Expected tail={self.tail} to end the noise of integers, which have a step.")

    def std(self, task: Task) -> float:
        """Of the noise on every number in the task's round, in update units."""
        bound = self.after.bound(self.incoming, task)
        if not 0 < bound < math.inf:
            raise ValueError(f"Expected a clip before the noise; the bound is {bound}.")
        return self.multipliers[task.round] * bound / math.sqrt(self.shares)

    def encode(self, update: Update, task: Task) -> Update:
        self._check(update)
        std = self.std(task)
        random = self.source.generator("silo", task.round, update.silo)
        return replace(update, tensors={key: x + self._noise(random, x, std) for key, x in update.tensors.items()})

    def _noise(self, random: np.random.Generator, like: np.ndarray, std: float) -> np.ndarray:
        if self.step is None:
            return gaussian(random, like.shape, std)
        return self._ended(discrete_gaussian(random, like.shape, std / self.step), std / self.step)

    def _ended(self, noise: np.ndarray, std: float) -> np.ndarray:
        if self.tail is None:
            return noise
        if std > self.tail.std * (1 + 1e-9):
            raise GuaranteeError(
                f"noise of at most {self.tail.std:g} steps, for which a word has room",
                f"{std:g}, since rounding lengthens an update of so many numbers more than the plan allows",
                "Take a larger [secure] word, smaller groups, or fewer trained numbers.",
            )
        if max(int(noise.max(initial=0)), -int(noise.min(initial=0))) > self.tail.most:
            raise SiloError(
                f"noise of at most {self.tail.most} steps", "a longer draw", "Nothing has left; the next round goes on."
            )
        return noise

    def _check(self, update: Update) -> None:
        if self.source.simulated and not update.silo:
            raise ValueError("Expected an update that says whose it is; else simulated noise is the same in all silos.")
        if self.incoming < math.inf and any(part != DELTA for part, _ in update.tensors):
            raise GuaranteeError(
                f'nothing but "{DELTA}" in an update whose units are limited one by one',
                ", ".join(sorted({part for part, _ in update.tensors} - {DELTA})),
                "No noise covers what one unit does to another part: leave it out ([disclosure] loss = false).",
            )
