"""Noise in shares, inside words of an agreed size: a grid so coarse that no sum wraps, so fine that it costs little.

Each of n silos adds a discrete Gaussian of variance σ²/n to its integers; any n of them together add noise nearly as
good as one of σ² (Kairouz, Liu and Steinke 2021, arXiv 2102.06387), and `concentration` says how nearly. `fitted`
finds the grid. `plan.py` is the only caller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import GuaranteeError
from ..stages.noise import Tail
from ..stages.words import room

NUMBERS = 2**36
"""More numbers than any model trains; what depends on how many there are is counted for so many."""
CUT = 2.0**-100
"""The chance that any draw of a whole run is longer than its tail allows. The accountant counts it."""
FEWEST = 4.0
"""Steps of the grid in the standard deviation of a share."""
GROWTH = 0.1
"""Rounding may lengthen what one unit adds by so much of itself."""
FINEST = 2**39
"""Steps that the finest grid gives a coordinate, whatever the word: the sums stay exact in float64."""


@dataclass(frozen=True)
class Lattice:
    """A public grid for one silo's numbers. `step`: > 0, in update units; `most`: the largest rounded number, in steps;
    `tail`: of the noise that is added to it, None where silos add none. `most` + `tail.most` have room in a word.
    """

    step: float
    most: int
    tail: Tail | None


def fitted(word: int, parties: int, largest: float, std: float, draws: int) -> Lattice:
    """The finest grid on which `parties` silos' numbers, noise included, never add up to more than a word holds.

    `largest`: number before the noise, and `std`: of a silo's noise, ≥ 0, in update units and growth by rounding
    included. `draws`: how often silos draw noise in the whole run, each time at most `NUMBERS` numbers.
    A discrete Gaussian is subgaussian: |x| > T σ has a chance of at most 2 exp(−T² / 2) (Canonne, Kamath and Steinke
    2020, arXiv 2004.00010, section 4), which T makes less than `CUT` for all draws together.
    """
    space = min(room(word, parties), FINEST)
    if space < 8:
        raise GuaranteeError(
            "words in which every silo has 8 steps either way",
            f"{space}, with {word} bits and {parties} silos",
            "Take a larger [secure] word, or sum in smaller groups.",
        )
    reach = math.sqrt(2 * math.log(2 * NUMBERS * draws / CUT))
    step = (largest + reach * std) / (space - 2)
    most = math.ceil(largest / step) + 1
    return Lattice(step, most, Tail(std / step, space - most) if std else None)


def concentration(multiplier: float, shares: int, std: float) -> float:
    """ρ of noise in `shares` (≥ 1) of `std` (≥ 1/2) steps each, which together are `multiplier` times the bound.

    Kairouz, Liu and Steinke 2021, proposition 14, third bound: ½ (Δ / (√n σ) + τ √d)² for d numbers.
    """
    return 0.5 * (1 / multiplier + tau(shares, std) * math.sqrt(NUMBERS)) ** 2


def tau(shares: int, std: float) -> float:
    """τ = 10 Σ exp(−2π² σ² k / (k + 1)), k from 1 to n − 1: how far n discrete Gaussians are from one, in a number."""
    return 10 * math.fsum(math.exp(-2 * (math.pi * std) ** 2 * k / (k + 1)) for k in range(1, shares))
