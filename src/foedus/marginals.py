"""A bias of each token's logit, by which a model says tokens as often as the silos' text does.

    b_v ← b_v + log((c_v + κ) / (e_v + κ))        c: how often v is in the text; e: how often the model expects it there
    p(v | h) ∝ p₀(v | h) exp(b_v)                  "fast marginal adaptation", with β = 1

Kneser, Peters & Klakow 1997, "Language model adaptation using dynamic marginals"; of classes, logit adjustment (Menon
et al. 2021, eq. 9). One release of sums does it, no gradient: what silos add are the counts of each text and the
model's expectation at the same places, for the first K of the vocabulary, which has its commonest tokens first. κ is
twice the noise, so that a token of which nothing is known keeps its logit, and one that the model expects and nobody
writes loses what the noise lets see.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import DataError
from .types import Params

ROOM = 1.5
"""r, in norms of the median public row: the texts of silos may be longer than public ones."""
NOISE = 2.0
"""κ, in standard deviations of the noise on a count."""
RARE = 1e-5
"""κ is at least so much of all that was counted: what exact sums have not seen may still occur."""


@dataclass(frozen=True)
class Marginals:
    """What makes the bias. All of it is public.

    `counted`: K, of the vocabulary's first tokens. `room`: r > 0, the norm of a row that is one in the release.
    `tokens`: C ≥ K, of the model. `name`: the model's name of the bias, (C,).
    """

    counted: int
    room: float
    tokens: int
    name: str

    @property
    def size(self) -> int:
        """How many numbers a row gives: the count of each token, and what the model expected."""
        return 2 * self.counted

    @property
    def still(self) -> Params:
        """No step of the bias."""
        return {self.name: np.zeros(self.tokens, np.float32)}

    def moved(self, params: Params, means: np.ndarray, std: float) -> Params:
        """The bias of `params` after a release, float32. `means`: (2K,) sums or means of rows, whatever they are
        divided by; `std`: of the noise on each of them, ≥ 0.
        """
        there, expected = np.maximum(np.asarray(means, np.float64), 0.0).reshape(2, -1)
        least = max(NOISE * std, RARE * float(there.sum()), np.finfo(np.float64).tiny)
        bias = params[self.name].astype(np.float64)
        bias[: self.counted] += np.log((there + least) / (expected + least))
        return {self.name: bias.astype(np.float32)}


def marginals(public: np.ndarray, tokens: int, name: str) -> Marginals:
    """From (n, 2K) rows of public text, of room 1. Raises `DataError` where none of them has a target."""
    norms = np.linalg.norm(public, axis=1)
    if not norms.any():
        raise DataError("public text of two tokens and more", "none", "Name a public text of longer examples.")
    return Marginals(public.shape[1] // 2, ROOM * float(np.median(norms[norms > 0])), tokens, name)
