"""Exact sums of integers under encryption: BFV (Fan and Vercauteren 2012), additions only.

    Sums ──▶ encrypt (each silo) ──▶ adder (the coordinator, blind) ──▶ decrypt (a key holder) ──▶ Opened

Each vector carries a 1 beside its values, so that whoever decrypts sees how many silos are in the sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from ..errors import CohortError
from .backends import Adder, PublicKey, Ring, SecretKey, seal
from .packing import Packing

DEGREE = 4096
RINGS = {(60,): 315.0, (60, 49): 32.0}
"""Moduli, the quickest first, and a standard deviation that the noise of a fresh ciphertext does not exceed (of each
coefficient, as a sub-Gaussian variable). One prime: e·u + e₁ + e₂·s with SEAL's errors of variance 10.5 and ternary u
and s, √(2 · 10.5 · 4096), and a tenth. Two: what rounding leaves when the last prime is divided away, √(4097 / 4)."""
FAILURE = 2.0**-64
"""Chance that a coefficient of a sum is decrypted wrongly, at most. A wrong one would also tell of the key (Cheon et
al. 2024, "Attacks against the IND-CPA-D security of exact FHE schemes")."""


@dataclass(frozen=True)
class Sums:
    """What is summed: `length` integers from 0 to `largest` by each of up to `parties` silos. Public; all that silos,
    coordinator and key holders must agree on follows from it.
    """

    length: int
    largest: int
    parties: int

    @cached_property
    def packing(self) -> Packing:
        """How the integers lie in slots: in those of the ring that takes fewest bytes, of two that take as many in
        those of the quicker."""
        return min((Packing(self.largest, self.parties, slot_bits(bits, self.parties)) for bits in RINGS),
                   key=lambda packing: packing.slots(10**6))  # fmt: skip

    @property
    def ring(self) -> Ring:
        """The same for every length, so one key serves training and evaluation."""
        bits = next(bits for bits in RINGS if slot_bits(bits, self.parties) == self.packing.slot_bits)
        return Ring("bfv", DEGREE, bits, _prime_above(2**self.packing.slot_bits))

    @property
    def slots(self) -> int:
        """Slots of a vector, the count among them."""
        return self.packing.slots(self.length + 1)


@dataclass(frozen=True)
class Opened:
    """A decrypted sum. `values`: (length,) uint64; `count`: how many silos are in it."""

    values: np.ndarray
    count: int


def slot_bits(bits: tuple[int, ...], parties: int) -> int:
    """Bits of a slot in a ring with this modulus, so that the noise of `parties` ciphertexts stays below half of what
    a unit of a slot weighs: q / 2t > noise, but for a chance of `FAILURE` (Hoeffding's inequality).
    """
    noise = math.sqrt(2 * math.log(2 / FAILURE) * parties) * RINGS[bits] + parties / 2
    return int(bits[0] - 1 - math.log2(noise) - 0.01)


def encrypt(sums: Sums, key: PublicKey, values: np.ndarray) -> bytes:
    """One silo's (length,) integers as a vector for `Adder.add`. Raises `SiloError` for one above `largest`."""
    if values.shape != (sums.length,):
        raise ValueError(f"Expected {sums.length} values; got an array of shape {values.shape}.")
    return key.encrypt(sums.packing.pack(np.concatenate([[np.uint64(1)], values.astype(np.uint64)])))


def adder(sums: Sums, key: PublicKey) -> Adder:
    """The coordinator's side: `add` each silo's vector, then send `total` to a key holder."""
    return Adder(key, sums.slots, sums.parties)


def decrypt(sums: Sums, key: SecretKey, blob: bytes, minimum: int) -> Opened:
    """The sum, exact. Raises `CohortError` when it is of fewer than `minimum` silos, or cannot be a sum at all; then it
    is told to nobody. That stops mistakes; a coordinator that lies can put any count into a sum.
    """
    slots = key.decrypt(blob, sums.slots)
    whole = sums.packing.unpack(slots, sums.length + 1)
    count, values = int(whole[0]), whole[1:]
    if not minimum <= count <= sums.parties:
        raise CohortError(
            f"a sum over {minimum} to {sums.parties} silos",
            f"one that says {count}",
            "It stays closed: a sum over fewer says too much about each.",
        )
    if values.size and int(values.max()) > count * sums.largest:
        raise CohortError(
            f"sums of at most {count} · {sums.largest}",
            f"{int(values.max())}",
            "It stays closed: a vector was broken, added twice, or encrypted for another layout.",
        )
    return Opened(values, count)


@lru_cache(maxsize=64)
def _prime_above(low: int) -> int:
    """The smallest prime above `low` that is 1 modulo 2 · DEGREE, as slots need it."""
    return next(p for p in _candidates(low) if seal().Modulus(p).is_prime())


def _candidates(low: int) -> Iterator[int]:
    step = 2 * DEGREE
    first = low - low % step + 1
    return (first + i * step for i in range(1 if first <= low else 0, 1 << 20))
