"""A topic head that is made of class means: Fisher's linear discriminant, with the covariance of public text.

    f(x)   = clip₁(S (x − b) / r)                         b, S = (C + ε I)^−½ and r from the features of public text
    m_c    = Σ_{x of topic c} f(x) / n_c                  two sums over rows, of which silos release their noised means
    s_c(x) = r² (⟨m_c, f(x)⟩ − ‖m_c‖² / 2)                log-odds, if each topic has the covariance C; linear in x

A model that goes on learning moves and shrinks all features, and a head of its past is soon worth nothing. What it does
to public text is known: with b, S and r of the model as it is now, the released m_c stand where they stood in f.

One release of sums trains the whole head: Fisher 1936; of clients' exact sums, Legate et al. 2023, "Guiding the last
layer in federated learning with pre-trained models"; of noised ones, Mehta et al. 2023, "Differentially private image
classification from features". So it takes no room in any gradient's clip, and no gradient of it draws the silos'
features apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from .errors import DataError
from .types import Params

COUNTED = 0.4
"""The number that a row adds to its topic's count. Its features keep √(1 − 0.4²) of the norm of 1 that a row has."""
ROOM = 1.5
"""r, in lengths of the median public row: the texts of silos lie farther out than public text does."""
RIDGE = 0.5
"""ε, in mean variances of a feature of public text."""
FEWEST = 0.01
"""A topic counts as at least this share of all rows: noise may leave it with none, or with fewer."""


@dataclass(frozen=True)
class Discriminant:
    """What makes a head of class means. All of it is public.

    `topics`: how many there are, ≥ 2. `center`: b, (p,). `scale`: S / r, (p, p). `room`: r > 0. `names`: the model's
    names of the head's "0.weight", (C, p), and "0.bias", (C,).
    """

    topics: int
    center: np.ndarray = field(repr=False)
    scale: np.ndarray = field(repr=False)
    room: float
    names: Mapping[str, str]

    @property
    def size(self) -> int:
        """How many numbers a row gives: for each topic its features and its count."""
        return self.topics * (len(self.center) + 1)

    @property
    def still(self) -> Params:
        """No step of the head's parameters."""
        return {self.names["0.weight"]: np.zeros((self.topics, len(self.center)), np.float32),
                self.names["0.bias"]: np.zeros(self.topics, np.float32)}  # fmt: skip

    def centres(self, means: np.ndarray) -> np.ndarray | None:
        """m of each topic, (C, p), from (C · (p + 1),) sums or means of rows, whatever they are divided by; None where
        noise left no row at all. None of them is longer than 1: what noise made longer is brought back to it.
        """
        table = np.asarray(means, np.float64).reshape(self.topics, -1)
        counts, total = table[:, -1] / COUNTED, table[:, -1].sum() / COUNTED
        if not total > 0:
            return None
        centres = table[:, :-1] / np.sqrt(1 - COUNTED**2) / np.maximum(counts, FEWEST * total)[:, None]
        return np.asarray(centres / np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1.0))

    def head(self, centres: np.ndarray) -> Params:
        """The head's parameters, float32. `centres`: as from `centres`, of this model or of what it was before."""
        weight = self.room**2 * centres @ self.scale
        bias = -weight @ self.center - self.room**2 * (centres**2).sum(1) / 2
        return {self.names["0.weight"]: weight.astype(np.float32), self.names["0.bias"]: bias.astype(np.float32)}


def discriminant(public: np.ndarray, topics: int, names: Mapping[str, str]) -> Discriminant:
    """From (n, p) features of public text. Raises `DataError` where they are all alike."""
    x = np.asarray(public, np.float64)
    center = x.mean(0)
    variances, axes = np.linalg.eigh((x - center).T @ (x - center) / max(1, len(x) - 1))
    ridge = RIDGE * float(variances.mean())
    if not ridge > 0:
        raise DataError(
            "public text whose features differ", f"{len(x)} rows that are alike", "Name a public text of more examples."
        )
    root = axes / np.sqrt(np.maximum(variances, 0.0) + ridge) @ axes.T
    room = ROOM * float(np.median(np.linalg.norm((x - center) @ root, axis=1)))
    return Discriminant(topics, center, root / room, room, names)
