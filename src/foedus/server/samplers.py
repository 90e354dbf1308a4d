"""Samplers: which silos are asked in a round. Deterministic in (seed, round), and in the order the silos are named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..privacy.noise import Source
from ..seeds import generator


class Sampler(Protocol):
    def cohort(self, silos: Sequence[str], round: int, seed: int) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Full:
    """Every silo, every round."""

    def cohort(self, silos: Sequence[str], round: int, seed: int) -> tuple[str, ...]:
        return tuple(silos)


@dataclass(frozen=True)
class FixedSize:
    """`size` silos without replacement, each subset equally likely."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"Expected size={self.size} >= 1.")

    def cohort(self, silos: Sequence[str], round: int, seed: int) -> tuple[str, ...]:
        if self.size > len(silos):
            raise ValueError(f"Expected size={self.size} <= {len(silos)} silos.")
        chosen = generator(seed, "sampling", round).choice(len(silos), self.size, replace=False)
        return tuple(silos[i] for i in sorted(chosen))


@dataclass(frozen=True)
class Poisson:
    """Each silo independently with probability `rate`; a cohort may be empty."""

    rate: float

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"Expected 0 < rate={self.rate} <= 1.")

    def cohort(self, silos: Sequence[str], round: int, seed: int) -> tuple[str, ...]:
        coins = generator(seed, "sampling", round).random(len(silos))
        return tuple(silo for silo, coin in zip(silos, coins, strict=True) if coin < self.rate)


@dataclass(frozen=True)
class SecretPoisson:
    """The same with coins that nobody can compute from the treaty: amplification by sampling needs them secret."""

    rate: float
    source: Source

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"Expected 0 < rate={self.rate} <= 1.")

    def cohort(self, silos: Sequence[str], round: int, seed: int) -> tuple[str, ...]:
        coins = self.source.generator("cohort", round).random(len(silos))
        return tuple(silo for silo, coin in zip(silos, coins, strict=True) if coin < self.rate)
