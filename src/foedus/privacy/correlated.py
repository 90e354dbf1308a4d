"""Noise that is correlated over rounds, for participation that is nobody's random choice: banded matrix factorisation.

All prefix sums of x₁ … xₙ are A x, with A lower triangular and full of ones. Write A = B C and release B (C x + z),
which is A (x + C⁻¹ z): a round's noise is partly taken back in the next ones, so that sums of rounds carry less of
it. What is protected is C x + z, one Gaussian for the whole run, however the units that take part are chosen (Denisov
et al. 2022, arXiv 2202.08312). C is Toeplitz with few bands, so that a round's noise needs only the last bands − 1 of
them (Choquette-Choo et al. 2023, arXiv 2306.08153; McMahan, Xu and Zhang 2024, arXiv 2404.16706, for Toeplitz
factors).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..errors import GuaranteeError
from . import events

Past = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Banded:
    """A lower-triangular Toeplitz C: `coefficients[k]` is k rows below the diagonal; 1 first, none rising, none < 0."""

    coefficients: tuple[float, ...]

    def __post_init__(self) -> None:
        c = self.coefficients
        falls = all(a >= b for a, b in zip(c, c[1:], strict=False))
        if not c or c[0] != 1.0 or not falls or not c[-1] >= 0:
            raise _refused("coefficients that start with 1, never rise and are never below 0", f"{c}")

    @property
    def bands(self) -> int:
        return len(self.coefficients)

    def next(self, state: Sequence[np.ndarray], fresh: np.ndarray) -> tuple[np.ndarray, Past]:
        """This round's noise, and the state for the next: one row of the forward substitution of C y = z, in float64.

        `fresh`: N(0, std²), of any shape. `state`: not to be written to; the noise of the last rounds, the latest
        first; empty before the first.
        """
        noise = np.array(fresh, np.float64)
        for coefficient, past in zip(self.coefficients[1:], state, strict=False):
            noise -= coefficient * past
        return noise, (noise, *state)[: self.bands - 1]

    def event(self, multiplier: float) -> dict[str, Any]:
        """The cost of the whole run: one Gaussian. `multiplier`: std of the fresh noise / (`sensitivity` · bound)."""
        return events.gaussian(multiplier)


@lru_cache(maxsize=64)
def optimal(rounds: int, bands: int) -> Banded:
    """The factors of `bands` ≥ 1 that add least noise to the prefix sums of `rounds`; one band is independent noise.

    Least is `error` · ‖c‖, which is what counts when a unit's rounds are at least `bands` apart. Found by descent
    from the first bands of the square root of A, cₖ = C(2k, k) / 4ᵏ (Fichtenberger et al. 2022, arXiv 2202.11205); six
    digits are kept.
    """
    if not 1 <= bands <= rounds:
        raise _refused("bands from 1 to the number of rounds", f"bands={bands} of {rounds} rounds")
    if bands == 1:
        return Banded((1.0,))
    from scipy.optimize import minimize

    k = np.arange(1, bands)
    start = np.log(2 * k - 1)  # the logits of the ratios (2k − 1) / 2k of the square root
    found = minimize(_noise, start, (rounds,), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    c = np.minimum.accumulate(np.round(_falling(found.x), 6))
    return Banded(tuple(float(x) for x in c))


def sensitivity(coefficients: Sequence[float], rounds: int, separation: int, participations: int) -> float:
    """How far one unit, whose part in a round is at most 1 long, can move C x: its L2 length at worst, exactly.

    The unit takes part at most `participations` times, any two of them at least `separation` ≥ 1 rounds apart. As no
    coefficient rises nor is below 0, two columns of C have an inner product ≥ 0 that only shrinks as they move apart or
    later; so it is worst to take part in the first round and then as often as allowed, always in the same direction
    (Kalinin and Lampert 2024, arXiv 2405.13763). A test tries all patterns of short runs.
    """
    Banded(tuple(coefficients))
    if min(rounds, separation, participations) < 1:
        came = f"{rounds}, {separation} and {participations}"
        raise _refused("rounds, separation and participations of at least 1 each", came)
    column = np.zeros(rounds)
    column[: len(coefficients)] = coefficients[:rounds]
    moved = np.zeros(rounds)
    for start in range(0, min(rounds, separation * participations), separation):
        moved[start:] += column[: rounds - start]
    return float(np.linalg.norm(moved))


def error(coefficients: Sequence[float], rounds: int) -> float:
    """Root mean square over rounds of the noise in a prefix sum, for fresh noise of std 1: ‖A C⁻¹‖_F / √rounds."""
    response = _divided(np.ones(rounds), np.asarray(coefficients, float))
    return math.sqrt(float(np.cumsum(response**2).mean()))


def _noise(logits: np.ndarray, rounds: int) -> tuple[float, np.ndarray]:
    """log(error² · ‖c‖²) of the coefficients that have these `logits`, and its gradient in them.

    With power series: r = 1 / ((1 − x) c) is the first column of A C⁻¹, and ∂r/∂cₖ = −xᵏ r / c.
    """
    c = _falling(logits)
    response = _divided(np.ones(rounds), c)
    weighted = response * np.arange(rounds, 0, -1) / rounds
    squares, length = float(weighted @ response), float(c @ c)
    slope = _divided(response, c)
    of_c = np.array([-2 * (weighted[k:] @ slope[: rounds - k]) for k in range(len(c))]) / squares + 2 * c / length
    tails = np.cumsum((of_c * c)[::-1])[::-1][1:]  # a ratio moves every coefficient from its own on
    return math.log(squares * length), tails / (1 + np.exp(logits))


def _falling(logits: np.ndarray) -> np.ndarray:
    """1, then products of ratios between 0 and 1, given by their logits."""
    return np.concatenate([[1.0], np.cumprod(1 / (1 + np.exp(-logits)))])


def _divided(series: np.ndarray, by: np.ndarray) -> np.ndarray:
    """The power series `series` / `by`, as many terms as it has."""
    from scipy.signal import lfilter

    return np.asarray(lfilter([1.0], by, series), float)


def _refused(expected: str, came: str) -> GuaranteeError:
    return GuaranteeError(expected, came, "Take factors from `optimal(rounds, bands)`.")
