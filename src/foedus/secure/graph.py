"""Who masks with whom: a circle of silos in random order, each beside its k nearest (Bell et al. 2020, SecAgg+).

On a circle, no group can be cut off unless k/2 silos in a row vanish or lie, in two places. The order comes from a seed
that nobody chose alone, so nobody chooses a neighbour.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from ..errors import GuaranteeError


def neighbours(cohort: Collection[str], seed: bytes, k: int) -> Mapping[str, tuple[str, ...]]:
    """Each silo's neighbours, sorted by name: the Harary graph of degree k on a random circle; k odd counts as k + 1.

    Regular, connected, symmetric; everybody is everybody's neighbour where k ≥ n − 1. Equal for all who know the cohort
    (in any order) and the seed. `seed`: 32 random bytes. A GuaranteeError for k < 1, or a name that comes twice.
    """
    if k < 1 or len(set(cohort)) < len(cohort):
        raise GuaranteeError(
            "a cohort of different names, and at least one neighbour for each",
            f"{len(cohort)} names, {len(set(cohort))} of them different, and k={k}",
            "Call every silo once; leave [secure] neighbours out to have it chosen.",
        )
    return Circle(tuple(sorted(cohort, key=lambda name: hmac.digest(seed, name.encode(), "sha256"))), k)


@dataclass(frozen=True)
class Circle(Mapping[str, tuple[str, ...]]):
    """The graph itself; iterating it goes round the circle. A silo's neighbours are worked out when asked for."""

    order: tuple[str, ...]
    k: int

    @cached_property
    def _place(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.order)}

    def __getitem__(self, name: str) -> tuple[str, ...]:
        place, n = self._place[name], len(self.order)
        reach = range(1, n) if self.k >= n - 1 else [s for d in range(1, (self.k + 1) // 2 + 1) for s in (d, -d)]
        return tuple(sorted(self.order[(place + step) % n] for step in reach))

    def __iter__(self) -> Iterator[str]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)
