"""Domain attention: how much a silo weighs, from how much it holds and how it sees its own text.

    w_i = (n_i / n_max)^b · exp(γ(φ_i − 1))   for γ ≥ 0
    w_i = (n_i / n_max)^b · exp(γ φ_i)        for γ < 0
    α_i = w_i / Σ_j w_j                       the softmax of b·ln n_i + γ φ_i (Wang et al., preprint, eq. 4, with n_i)

Every weight is in (0, 1], which is public, so a sum of weighted updates has a bound; and α is a ratio of two sums, so
nobody's weight need be seen. γ > 0 favours silos with a large φ, γ < 0 those with a small one; γ = 0, b = 1 is n_i / n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

STEEPEST = 100.0
"""The largest |γ|: e⁻¹⁰⁰ is still a weight, and decides between any two φ that differ by more than rounding."""


@dataclass(frozen=True)
class Attention:
    """How a silo's weight follows from what it holds and sees. All fields are public.

    `gamma` (γ): in [−100, 100]. `exponent` (b): ≥ 0. `most` (n_max): from so many examples on, more weigh no more.
    `ceiling`: the largest weight, in (0, 1]; see `ceiling`.
    """

    gamma: float
    exponent: float = 1.0
    most: int = 1
    ceiling: float = 1.0

    def __post_init__(self) -> None:
        if not abs(self.gamma) <= STEEPEST:
            raise ValueError(f"Expected gamma={self.gamma} in [−{STEEPEST:g}, {STEEPEST:g}].")
        if not 0 <= self.exponent < math.inf:
            raise ValueError(f"Expected exponent={self.exponent} ≥ 0.")
        if not self.most >= 1:
            raise ValueError(f"Expected most={self.most} ≥ 1.")
        if not 0 < self.ceiling <= 1:
            raise ValueError(f"Expected ceiling={self.ceiling} in (0, 1].")

    def weight(self, examples: float | np.ndarray, phi: float | np.ndarray) -> np.ndarray:
        """w in (0, ceiling], float64, of a silo or of several. `examples`: ≥ 1, cut at `most`. `phi`: cut to [0, 1]; a
        NaN counts as the φ that weighs least.
        """
        held = np.clip(np.asarray(examples, np.float64), 1, self.most) / self.most
        least = 0.0 if self.gamma >= 0 else 1.0
        seen = np.clip(np.nan_to_num(np.asarray(phi, np.float64), nan=least), 0.0, 1.0)
        steep = np.exp(self.gamma * (seen - (self.gamma >= 0)))
        return np.minimum(held**self.exponent * steep, self.ceiling)

    def least(self, examples: int = 1) -> float:
        """What a silo with at least that many examples weighs whatever its φ."""
        return float(self.weight(examples, 0.0 if self.gamma >= 0 else 1.0))


def ceiling(largest: float, others: float) -> float:
    """The weight up to which a silo's share stays within `largest` in (0, 1), when the other silos' weights add up to
    `others` or more: others · largest / (1 − largest), at most 1.

    A silo applies it alone, from what is public: with `others` = (cohort − 1) · `Attention.least()` the share is
    certain; with the total that the last round released, less the silo's own weight in it, it holds as far as weights
    stand still (and the noise allows), and costs much less attention.
    """
    if not 0 < largest < 1:
        raise ValueError(f"Expected largest={largest} in (0, 1).")
    if not others > 0:
        raise ValueError(f"Expected others={others} > 0.")
    return min(1.0, others * largest / (1.0 - largest))


def shares(weights: np.ndarray, largest: float = 1.0) -> np.ndarray:
    """α (N,), which adds up to 1, of weights (N,) ≥ 0 that everybody may see; none above `largest` in [1/N, 1].

    What a cut share loses goes to the others in proportion to their weights.
    """
    weights = np.asarray(weights, np.float64)
    if not largest * len(weights) >= 1 - 1e-12:
        raise ValueError(f"Expected largest={largest} ≥ 1/{len(weights)}: {len(weights)} shares add up to 1.")
    out = weights / weights.sum()
    full = np.zeros(len(out), bool)
    while (out[~full] > largest).any():
        full |= out > largest
        out[full] = largest
        rest = weights[~full].sum()
        out[~full] = weights[~full] / rest * (1.0 - largest * full.sum()) if rest else 0.0
    return out


def effective(weights: np.ndarray) -> float:
    """N_eff = 1 / Σ α² in [1, N]: how many silos with equal shares would be as even."""
    alpha = np.asarray(weights, np.float64) / np.sum(weights)
    return float(1.0 / (alpha @ alpha))


# φ: what a silo sees in its own text, in [0, 1]


def uncertainty(entropy: float | np.ndarray, vocabulary: int) -> np.ndarray:
    """Mean entropy of the next token, in nats, over that of a uniform choice: H / ln V."""
    return np.clip(np.asarray(entropy, np.float64) / math.log(vocabulary), 0.0, 1.0)


def richness(covariance: np.ndarray) -> float:
    """Effective rank over dimensions, in [1/p, 1]; see `effective_rank`."""
    return effective_rank(covariance) / len(covariance)


def effective_rank(covariance: np.ndarray) -> float:
    """exp(−Σ p_k ln p_k) in [1, p], p_k = s_k / Σ s, s_k the singular values of centred features (Roy & Vetterli 2007).

    `covariance`: their second moment (p, p), whose eigenvalues are s_k². It may be noised: its symmetric half counts,
    and negative eigenvalues count as 0. Noise makes it richer. One without a positive eigenvalue has rank 1.
    """
    squares = np.maximum(np.linalg.eigvalsh((covariance + covariance.T) / 2), 0.0)
    squares[squares < len(covariance) * np.finfo(np.float64).eps * squares.max()] = 0.0
    singular = np.sqrt(squares[squares > 0])
    p = singular / singular.sum() if len(singular) else np.ones(1)
    return float(np.exp(-(p * np.log(p)).sum()))


def inaccuracy(correct: float | np.ndarray, examples: float | np.ndarray) -> np.ndarray:
    """1 − accuracy, of two counts that may be noised; no examples is no accuracy."""
    return np.clip(1.0 - np.asarray(correct, np.float64) / np.maximum(examples, 1.0), 0.0, 1.0)


def distance(mean: np.ndarray, target: np.ndarray) -> float:
    """‖mean − target‖ / 2 of two mean embeddings of rows of norm at most one; noise may not take it above 1."""
    return float(min(np.linalg.norm(np.asarray(mean, np.float64) - target) / 2.0, 1.0))
