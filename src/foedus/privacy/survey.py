"""Surveys: noised sums of numbers that a silo finds for each of its units, such as a mean embedding or a token entropy.

    S ~ Poisson(q);   s̃_j = Σ_{u ∈ S} clip₁(v_j(u)) + N(0, z_j² I);   1/z² = Σ_j 1/z_j²

A unit's vector in each part j has an L2 norm of at most 1, and one of its parts is the number 1, so that sums become
means. All parts of a survey are one Gaussian of multiplier z. `silo/survey.py` finds the vectors and clips them;
`plan.py` is the only place that makes a `Survey`, and charges it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import GuaranteeError
from .noise import Source, gaussian

COUNT = "count"
"""The part that counts units; no survey is without it."""


@dataclass(frozen=True)
class Survey:
    """The surveys of one silo. Neighbours differ in one unit, added or removed.

    `rounds`: in which one is taken, from 0, ascending, each of them once. `multipliers`: z > 0 in each of these rounds.
    `shares`: of 1/z², > 0, by part, adding up to 1: part j has noise of standard deviation z / √share_j. `rate`: q in
    (0, 1], of a unit's being in a survey. `rows`: a unit's vector is the mean over at most so many of its rows.
    """

    rounds: tuple[int, ...]
    multipliers: tuple[float, ...]
    shares: Mapping[str, float]
    rate: float
    rows: int
    source: Source

    def __post_init__(self) -> None:
        if not self.rounds or len(self.rounds) != len(self.multipliers) or not all(z > 0 for z in self.multipliers):
            raise ValueError(f"Expected multipliers={self.multipliers} > 0, one for each of rounds={self.rounds}.")
        if COUNT not in self.shares or not all(share > 0 for share in self.shares.values()):
            raise ValueError(f"Expected shares={dict(self.shares)} > 0, one of them for {COUNT!r}.")
        if not math.isclose(sum(self.shares.values()), 1.0, rel_tol=1e-9):
            raise ValueError(f"Expected shares={dict(self.shares)} that add up to 1.")
        if not 0 < self.rate <= 1 or self.rows < 1:
            raise ValueError(f"Expected 0 < rate={self.rate} <= 1 and rows={self.rows} >= 1.")

    def check(self, parts: Iterable[str], round: int) -> None:
        """Refuses what was not paid for: another round, or other `parts` (`COUNT` aside) than the plan's."""
        if round not in self.rounds:
            raise GuaranteeError(
                "a survey in one of the rounds that the plan pays for one",
                f"round {round + 1}",
                "Ask `round in plan.survey.rounds` before taking one, or add the round to the plan's surveys.",
            )
        if {*parts, COUNT} != set(self.shares):
            raise GuaranteeError(
                f"a survey of {', '.join(sorted(self.shares))}, among which the plan divides the budget",
                f"one of {', '.join(sorted({*parts, COUNT}))}",
                "Survey all parts of the plan at once, and name no others.",
            )

    def sample(self, units: int, random: np.random.Generator) -> np.ndarray:
        """Which of so many `units` are in a survey, ascending: each by a secret coin of its own."""
        return np.flatnonzero(random.random(units) < self.rate)

    def std(self, part: str, round: int) -> float:
        """The standard deviation of the noise on each number of a part; a unit moves the part by at most 1."""
        return self.multipliers[self.rounds.index(round)] / math.sqrt(self.shares[part])

    def released(
        self, sums: Mapping[str, np.ndarray], round: int, random: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Sums with their noise, float64. `sums`: by part, of vectors that are clipped already."""
        return {part: x + gaussian(random, x.shape, self.std(part, round)) for part, x in sums.items()}
