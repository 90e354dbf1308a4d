"""Which coordinates of a vector are encrypted, where not all are; the others are masked, and none leave in the clear.

The choice is public and made from public data alone (after the sensitivity maps of Jin et al. 2023, FedML-HE): one made
from private gradients would itself say something about them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .. import wire
from ..errors import WireError


@dataclass(frozen=True)
class Selection:
    """A public choice among `length` coordinates. `bits`: a bit for each, the first highest; canonical."""

    length: int
    bits: bytes

    def __post_init__(self) -> None:
        spare = len(self.bits) * 8 - self.length
        if not 0 <= spare < 8 or (spare and self.bits[-1] & ((1 << spare) - 1)):
            raise WireError(
                f"a bit for each of {self.length} coordinates, and zeros to the end of the last byte",
                f"{len(self.bits)} bytes",
                "Make it with `select`, on every side from the same public data.",
            )

    @cached_property
    def chosen(self) -> np.ndarray:
        """(length,) bool: which are encrypted."""
        return np.unpackbits(np.frombuffer(self.bits, np.uint8), count=self.length).astype(bool)

    @property
    def count(self) -> int:
        """How many are."""
        return int(self.chosen.sum())

    @property
    def digest(self) -> str:
        """What all sides must agree on before a round."""
        return wire.digest(self.length.to_bytes(8, "big") + self.bits)

    def split(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(length,) → those to encrypt, and those to mask; each in order."""
        return words[self.chosen], words[~self.chosen]

    def join(self, encrypted: np.ndarray, masked: np.ndarray) -> np.ndarray:
        """The inverse of `split`, for sums too: both halves must be sums over the same silos."""
        whole = np.empty(self.length, encrypted.dtype)
        whole[self.chosen], whole[~self.chosen] = encrypted, masked
        return whole


def everything(length: int) -> Selection:
    """All coordinates."""
    return _of(np.ones(length, bool))


def select(sensitivity: np.ndarray, share: float) -> Selection:
    """The `share` (0 to 1, rounded up) of coordinates with the largest `sensitivity`, (length,) and finite; of equals
    the first.

    >>> select(np.array([1.0, 3.0, 2.0, 3.0]), 0.5).chosen.tolist()
    [False, True, False, True]
    """
    if not 0 <= share <= 1 or not np.isfinite(sensitivity).all():
        raise ValueError(f"Expected 0 <= share={share} <= 1, and finite sensitivities.")
    count = -int(-share * len(sensitivity) // 1)
    chosen = np.zeros(len(sensitivity), bool)
    chosen[np.argsort(-sensitivity, kind="stable")[:count]] = True
    return _of(chosen)


def sensitivity(gradients: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The mean size of each coordinate's gradient over rows of public text, by parameter; what does not move there is
    hoped not to be told by private text either, which is a heuristic and no guarantee.
    """
    total: dict[str, np.ndarray] = {}
    rows = 0
    for gradient in gradients:
        total = {name: np.abs(x, dtype=np.float64) + total.get(name, 0.0) for name, x in gradient.items()}
        rows += 1
    return {name: x / rows for name, x in total.items()}


def _of(chosen: np.ndarray) -> Selection:
    return Selection(len(chosen), np.packbits(chosen).tobytes())
