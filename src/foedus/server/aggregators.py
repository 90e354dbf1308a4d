"""Aggregators: many encoded updates to one total, and one released total to a mean."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from .. import tree
from ..stages.weigh import WEIGHT
from ..types import Key, Total, Tree


class Aggregator(Protocol):
    """`linear`: only the sum of the updates is needed, so single ones may be hidden."""

    linear: ClassVar[bool]

    def combine(self, updates: Iterable[Tree]) -> Total: ...
    def bound(self, bound: float) -> float: ...
    def mean(self, released: Tree) -> Tree: ...


@dataclass(frozen=True)
class WeightedMean:
    """Σ wᵢ Δᵢ / Σ wᵢ: the sum of what the stage `Weigh` sent, divided by the released sum of weights.

    Guarantees: the sum is taken in float64 in the order given, so equal answers in equal order give equal bits.
    A total weight of zero (an empty cohort) gives a mean of zero.
    """

    linear: ClassVar[bool] = True

    def combine(self, updates: Iterable[Tree]) -> Total:
        count = 0

        def counted() -> Iterable[Tree]:
            nonlocal count
            for update in updates:
                count += 1
                yield update

        return Total(tree.total(counted()), float("inf"), count)

    def bound(self, bound: float) -> float:
        return bound

    def mean(self, released: Tree) -> Tree:
        weight = float(released[WEIGHT][0]) if WEIGHT in released else 0.0
        return {key: _share(key, x, weight) for key, x in released.items() if key != WEIGHT}


@dataclass(frozen=True)
class ExpectedMean:
    """Σ Δᵢ / E: divided by a public expected count, not by who came, which is private under sampling.

    Guarantees: one silo more or less moves the mean by its bound / `expected`, whoever else is there.
    """

    expected: float
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.expected > 0:
            raise ValueError(f"Expected expected={self.expected} > 0.")

    def combine(self, updates: Iterable[Tree]) -> Total:
        return WeightedMean().combine(updates)

    def bound(self, bound: float) -> float:
        return bound

    def mean(self, released: Tree) -> Tree:
        return {key: x / self.expected for key, x in released.items()}


def _share(key: Key, x: np.ndarray, weight: float) -> np.ndarray:
    if key[0] == "metric":
        return x
    return x / weight if weight > 0 else x * 0.0
