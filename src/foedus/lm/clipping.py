"""Norms to which each unit's gradient is clipped: one for the whole of it, or one for each of its parts.

A unit is whoever a guarantee protects: a document, or an author with all rows of theirs in a batch. Its gradient is
that of the mean loss of its own targets, so no unit's gradient depends on another's. Read `per_example.py` next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clipping:
    """`norms`: L2, > 0, one for each part. `parts`: which part a parameter belongs to; those it does not name are in
    part 0.

    Guarantees: what a unit adds to part j has an L2 norm of at most `norms[j]`, so of at most `bound` in all; a unit
    with a NaN or an infinity anywhere adds zero; a zero gradient stays zero; a norm of ∞ clips nothing, and then
    there is no bound.
    """

    norms: tuple[float, ...]
    parts: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.norms or not all(norm > 0 for norm in self.norms):
            raise ValueError(f"Expected norms={self.norms} > 0, at least one.")
        if any(not 0 <= part < len(self.norms) for part in self.parts.values()):
            raise ValueError(f"Expected parts numbered 0 … {len(self.norms) - 1}; got {set(self.parts.values())}.")

    @property
    def bound(self) -> float:
        """The most one unit can move the sum, in L2, when it is added or removed."""
        return math.hypot(*self.norms)

    def within(self, share: float) -> Clipping:
        """To this share of each norm."""
        return replace(self, norms=tuple(share * norm for norm in self.norms))

    def part(self, name: str) -> int:
        """The part of a parameter."""
        return self.parts.get(name, 0)

    def factors(self, squares: Tensor) -> Tensor:
        """From (units, parts) squared norms the (units, parts) factors in [0, 1] that clip, float32."""
        norms = squares.double().sqrt()
        limits = torch.tensor(self.norms, dtype=torch.float64, device=squares.device)
        sound = torch.isfinite(norms).all(1, keepdim=True)
        factors = (limits / norms.clamp(min=1e-30)).clamp(max=1.0)
        return torch.where(sound, factors, torch.zeros_like(factors)).float()


@dataclass(frozen=True)
class ClippedSums:
    """What `Bench.clipped` gives for K silos.

    `gradients`: (K, *shape) float32 by parameter: the sum over a silo's units of factor · gradient. `norms`: for each
    silo (units, parts) float32, before clipping; private. `losses`: (K,) sums of cross-entropy in nats and `targets`:
    (K,) numbers of targets (int64); private too.
    """

    gradients: dict[str, Tensor]
    norms: list[Tensor]
    losses: Tensor
    targets: Tensor
