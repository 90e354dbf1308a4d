"""Private local steps (DP-SGD, Abadi et al. 2016, arXiv 1607.00133) at one silo: who is in a step, and what is released
of it.

    S ~ Poisson(q);   g̃ = (Σ_{u ∈ S} clip(g_u) + N(0, z² C²)) / B

q and B are public numbers of the plan, never made of a silo's own data. A step's release is the only thing that
training sees, so optimizers, momentum and weight decay are post-processing. Where silos add shares of noise to updates
that nobody sees alone (`lr`), the step has none: its noise is that of the stages. `silo/private.py` runs these steps;
`plan.py` is the only place that makes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .correlated import Banded
from .noise import Source, gaussian

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Parts:
    """How a gradient is cut into parts, each with its own norm and its own share of the budget.

    `of`: parameter → part. `norms`: C_j > 0. `shares`: of 1/z², > 0, adding up to 1: part j gets the noise multiplier
    z / √share_j, and all parts together are one Gaussian of multiplier z (1/z² = Σ 1/z_j²).
    """

    of: Mapping[str, int]
    norms: tuple[float, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.norms) != len(self.shares) or not all(x > 0 for x in (*self.norms, *self.shares)):
            raise ValueError(f"Expected as many norms={self.norms} as shares={self.shares}, all > 0.")
        if not math.isclose(sum(self.shares), 1.0, rel_tol=1e-9):
            raise ValueError(f"Expected shares={self.shares} that add up to 1.")

    def std(self, name: str, multiplier: float) -> float:
        """The standard deviation of the noise on a parameter."""
        part = self.of.get(name, 0)
        return multiplier * self.norms[part] / math.sqrt(self.shares[part])


@dataclass(frozen=True)
class Following:
    """A clip norm that follows a quantile of the gradients' norms, by one noised bit a step (Andrew et al. 2021).

    `quantile`: γ in (0, 1). `rate`: η_C > 0. `bit`: what a unit's bit weighs beside its gradient, in units of the norm.
    """

    quantile: float = 0.5
    rate: float = 0.2
    bit: float = 0.5

    @property
    def growth(self) -> float:
        """How much the bit adds to the bound of a unit."""
        return math.hypot(1.0, self.bit / 2)

    def next(self, factor: float, bits: float, divisor: float) -> float:
        """The norm's next factor, given the noised sum of bits of ±bit/2 and the public expected count."""
        share = min(1.0, max(0.0, bits / (self.bit * divisor) + 0.5))
        return factor * math.exp(-self.rate * (share - self.quantile))


@dataclass(frozen=True)
class PrivateSteps:
    """The steps of all rounds at one silo.

    `rate`: q in (0, 1], of a unit being in a step. `divisor`: B > 0, public. `multipliers`: z of each round. `rows`: a
    unit brings at most so many of its rows to a step. `factors` and `sensitivity`: of correlated noise; a unit is then
    in every `period`-th step, by its key and not by chance, and `rate` is 1 / period. `bare_std`: of noise without a
    clip, which guarantees nothing. `lr`: given where silos add shares of the noise to their whole updates instead; the
    one step is then exact, without noise, and never leaves its silo; it is of plain SGD with this learning rate.
    """

    unit: str
    rate: float
    divisor: float
    steps: int
    rows: int
    parts: Parts
    multipliers: tuple[float, ...]
    source: Source
    following: Following | None = None
    factors: Banded | None = None
    sensitivity: float = 1.0
    period: int = 1
    bare_std: float | None = None
    lr: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1 or not self.divisor > 0 or self.steps < 1 or self.rows < 1 or self.period < 1:
            raise ValueError(
                f"Expected 0 < rate={self.rate} <= 1, divisor={self.divisor} > 0, steps={self.steps},"
                f" rows={self.rows} and period={self.period} >= 1."
            )
        if not all(z > 0 for z in self.multipliers):
            raise ValueError(f"Expected multipliers={self.multipliers} > 0.")
        if self.lr is not None and (self.lr <= 0 or self.steps > 1 or self.following or self.factors or self.bare_std):
            raise ValueError(f"Expected lr={self.lr} > 0 with one step, one norm and independent noise.")

    @property
    def dtype(self) -> type[np.floating[Any]]:
        """Of a release. Before the noise nothing may be lost to rounding that the noise does not cover."""
        return np.float32 if self.lr is None else np.float64

    def sample(self, keys: np.ndarray, at: int, random: np.random.Generator) -> np.ndarray:
        """Which units are in step `at`, of all that the silo has done; ascending. `keys`: (units,) uint64.

        Every unit by a coin of its own, so that nobody's presence bears on another's; the coins are private.
        """
        if self.factors is not None:
            return np.flatnonzero(keys % np.uint64(self.period) == np.uint64(at % self.period))
        return np.flatnonzero(random.random(len(keys)) < self.rate)

    def noise(
        self, shapes: Mapping[str, tuple[int, ...]], round: int, factor: float, random: np.random.Generator
    ) -> Arrays:
        """Independent noise for every parameter, float64, for norms that are `factor` times the plan's; none at all
        where it is added to the whole update.
        """
        if self.lr is not None:
            return {name: np.zeros(shape) for name, shape in shapes.items()}
        if self.bare_std is not None:
            return {name: gaussian(random, shape, self.bare_std) for name, shape in shapes.items()}
        growth = self.following.growth if self.following else 1.0
        multiplier = self.multipliers[round] * self.sensitivity * growth * factor
        return {name: gaussian(random, shape, self.parts.std(name, multiplier)) for name, shape in shapes.items()}

    def count(self, norms: np.ndarray, round: int, factor: float, random: np.random.Generator) -> float:
        """The noised sum of the units' bits, ±bit/2, in units of the norm. `norms`: (units,), private."""
        if self.following is None:
            return 0.0
        bit, limit = self.following.bit, self.parts.norms[0] * factor
        inside = np.where(np.nan_to_num(norms, nan=np.inf) <= limit, bit / 2, -bit / 2).sum()
        return float(inside + gaussian(random, (), self.multipliers[round] * self.following.growth))

    def released(self, sums: Arrays, noise: Arrays) -> dict[str, np.ndarray]:
        """(sum + noise) / B, which is all that training sees of a step."""
        return {
            name: ((x.astype(np.float64) + noise[name]) / self.divisor).astype(self.dtype) for name, x in sums.items()
        }


def parts_of(names: Sequence[str], how: str, max_norm: float, shares: Sequence[float] = ()) -> Parts:
    """The parts of a gradient. `how`: "whole"; "layers": one a transformer block, and one for all else; "factors":
    LoRA's A, its B, and all else.

    Norms are `max_norm` / √parts each, so that the whole is at most `max_norm`; shares are equal unless given.
    """
    labels = [_label(name, how) for name in names]
    order = sorted(set(labels))
    given = tuple(shares) or (1 / len(order),) * len(order)
    if len(given) != len(order):
        raise ValueError(f"Expected {len(order)} shares, of {', '.join(order)}; got {len(given)}.")
    norms = (max_norm / math.sqrt(len(order)),) * len(order)
    return Parts({name: order.index(label) for name, label in zip(names, labels, strict=True)}, norms, given)


def _label(name: str, how: str) -> str:
    if how == "layers":
        numbered = [
            f"{before}.{word}" for before, word in zip(_words(name), _words(name)[1:], strict=False) if word.isdigit()
        ]
        return numbered[0] if numbered else "~rest"
    if how == "factors":
        return next((word for word in _words(name) if word.startswith("lora_")), "~rest").replace("embedding_", "")
    return "whole"


def _words(name: str) -> list[str]:
    return name.split(".")
