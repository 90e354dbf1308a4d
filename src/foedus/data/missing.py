"""Labels that are missing completely at random, in three senses, so that a study can ask what each costs.

Who loses a label depends on the seed and the text alone: not on the silo, the order of rows, or the other texts. And
masks are nested: what is missing at a rate of 0.1 is missing at 0.2 too, so that a curve over rates compares like with
like. Only training loses labels; what is held out keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import DataError, one_of
from ..seeds import generator
from .split import share_of

KINDS = ("sequence", "token", "topic")


@dataclass(frozen=True)
class Missing:
    """`rate` in [0, 1): of texts, or of tokens for the kind "token", that lose their labels.

    `kind`: "sequence", a text loses all its targets and its topic; "token", single tokens are no targets; "topic", a
    text loses its topic alone.
    """

    rate: float
    kind: Literal["sequence", "token", "topic"] = "sequence"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataError("a kind of missing label", f'"{self.kind}"', one_of(self.kind, KINDS))
        if not 0 <= self.rate < 1:
            raise DataError(
                "0 ≤ missing < 1", f"missing={self.rate}", "Take 0.3; with all labels gone nothing is learned."
            )

    def topics(self, texts: Sequence[str]) -> np.ndarray:
        """(texts,) bool: whether the topic is lost."""
        return self._lost(texts) if self.kind != "token" else np.zeros(len(texts), bool)

    def tokens(self, text: str, window: int, length: int) -> np.ndarray:
        """(length,) bool: which tokens of a text's window (counted from 0) are no targets."""
        if self.kind == "token":
            return generator(self.seed, "missing", text, window).random(length) < self.rate
        return np.full(length, self.kind == "sequence" and bool(self._lost([text])[0]))

    def _lost(self, texts: Sequence[str]) -> np.ndarray:
        return share_of(texts, self.seed, "missing") < self.rate
