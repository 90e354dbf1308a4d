"""Approximate sums of real numbers under encryption: CKKS (Cheon, Kim, Kim and Song 2017), additions only.

For a sum that stays with the key holder. No treaty may use it for one that goes back to the coordinator: a decrypted
value carries the noise of its ciphertext, and both together give the secret key away (Li and Micciancio 2021). One may
flood it with noise √(12 τ) · 2^(κ/2) times as large, for τ decryptions and κ bits (Li et al. 2022). Over a thousand
decryptions of sums of a hundred silos, κ = 64 leaves some three of this modulus's 60 bits for the sum, and κ = 30 some
twenty; BFV leaves 44, exact, with room for several numbers. So flooding is not offered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .backends import Adder, PublicKey, Ring, SecretKey
from .bfv import FAILURE, RINGS

DEGREE, BITS = 4096, (60,)


@dataclass(frozen=True)
class Reals:
    """What is summed: `length` numbers from -`largest` to `largest` by each of up to `parties` silos."""

    length: int
    largest: float
    parties: int

    def __post_init__(self) -> None:
        if not (0 < self.largest < math.inf and self.parties >= 1 and self.length >= 1):
            raise ValueError(f"Expected length, parties >= 1 and 0 < largest={self.largest} < ∞; got {self}.")

    @property
    def ring(self) -> Ring:
        """With the largest scale at which the sum does not wrap: a coefficient is at most the largest number."""
        most = max(1.0, self.parties * self.largest)
        return Ring("ckks", DEGREE, BITS, 2 ** math.floor(BITS[0] - 2 - math.log2(most)))

    @property
    def error(self) -> float:
        """The most that a number of the decrypted sum is off, but for a chance of 2⁻⁶⁴: a slot gathers the noise of all
        coefficients, real and imaginary."""
        noise = math.sqrt(2 * math.log(4 / FAILURE) * self.parties * DEGREE) * RINGS[BITS]
        return noise / self.ring.plain


def encrypt(reals: Reals, key: PublicKey, values: np.ndarray) -> bytes:
    """One silo's (length,) numbers as a vector for `Adder.add`."""
    if values.shape != (reals.length,) or not np.abs(values).max() <= reals.largest:
        raise ValueError(f"Expected {reals.length} numbers of at most {reals.largest}.")
    return key.encrypt(values.astype(np.float64))


def adder(reals: Reals, key: PublicKey) -> Adder:
    """Whoever adds vectors without reading them."""
    return Adder(key, reals.length, reals.parties)


def decrypt(reals: Reals, key: SecretKey, blob: bytes) -> np.ndarray:
    """(length,) float64, each within `Reals.error` of the sum. **For the key holder alone**: see above."""
    return key.decrypt(blob, reals.length)
