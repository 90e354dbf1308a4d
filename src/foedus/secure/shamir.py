"""Shamir's secret sharing (1979): any `threshold` shares give the secret back, fewer say nothing about it.

Everything is an integer modulo a 256-bit prime, written as 32 bytes, big end first.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import lcm, prod
from operator import mul

from ..errors import GuaranteeError, WireError
from .keys import Entropy

PRIME = 2**256 - 189  # the largest below 2²⁵⁶
SIZE = 32
_UNREDUCED = 2048  # bits that an evaluation may grow to before it is reduced


def fresh(entropy: Entropy = secrets.token_bytes) -> bytes:
    """A uniform secret below PRIME."""
    return _uniform(entropy).to_bytes(SIZE, "big")


def split(secret: bytes, threshold: int, points: Sequence[int], entropy: Entropy = secrets.token_bytes) -> list[bytes]:
    """One share for each of `points`: f(x) of a random polynomial f of degree threshold − 1 with f(0) = secret.

    `secret`: 32 bytes, below PRIME (see `fresh`; a `keys.Pair` is, too). `points`: different, from 1 to PRIME − 1, at
    least `threshold` of them. A GuaranteeError otherwise, which never quotes the secret.
    """
    value = int.from_bytes(secret, "big")
    if len(secret) != SIZE or value >= PRIME:
        raise _refused("a secret of 32 bytes below the prime", "another one", "Draw it with shamir.fresh.")
    if not 1 <= threshold <= len(points):
        came = f"threshold={threshold} for {len(points)} points"
        raise _refused("a threshold from 1 to the number of points", came, "Lower it, or share with more.")
    _check(points)
    coefficients = [*(_uniform(entropy) for _ in range(threshold - 1)), value]  # the highest first
    return [_at(coefficients, x).to_bytes(SIZE, "big") for x in points]


def recover(shares: Mapping[int, bytes]) -> bytes:
    """The secret, from shares by their points: exactly what was split, if at least `threshold` genuine ones are here.

    Fewer, or a false one among them, give other 32 bytes without a sign: check those against a commitment. A WireError
    for a share that is none.
    """
    secret: int = sum(map(mul, weights(tuple(shares)), map(_value, shares.values()))) % PRIME
    return secret.to_bytes(SIZE, "big")


def weights(points: Sequence[int]) -> tuple[int, ...]:
    """Lagrange's coefficients at zero: f(0) = Σ wᵢ f(xᵢ) for every f of degree below their number. Kept for next time.

    wᵢ = Π_{j≠i} xⱼ / (xⱼ − xᵢ), over the least common multiple of all denominators: one inversion for all.
    """
    return _weights(tuple(points))


@lru_cache(maxsize=4096)
def _weights(points: tuple[int, ...]) -> tuple[int, ...]:
    _check(points)
    below = [x * prod([y - x for y in points if y != x]) for x in points]
    common = lcm(*below)
    above = prod(points) * pow(common, -1, PRIME) % PRIME
    return tuple(common // each * above % PRIME for each in below)


def _at(coefficients: Sequence[int], x: int) -> int:
    """Horner's rule; reduced once in many steps, since a small x lets the value grow by a few bits only."""
    steps = max(1, _UNREDUCED // x.bit_length())
    value = 0
    for start in range(0, len(coefficients), steps):
        for coefficient in coefficients[start : start + steps]:
            value = value * x + coefficient
        value %= PRIME
    return value


def _uniform(entropy: Entropy) -> int:
    while (value := int.from_bytes(entropy(SIZE), "big")) >= PRIME:
        pass
    return value


def _value(share: bytes) -> int:
    value = int.from_bytes(share, "big")
    if len(share) != SIZE or value >= PRIME:
        raise WireError("a share of 32 bytes below the prime", "another one", "Leave it out, and whoever sent it.")
    return value


def _check(points: Sequence[int]) -> None:
    if not points or len(set(points)) < len(points) or not 0 < min(points) <= max(points) < PRIME:
        came = f"{len(points)} points, {len(set(points))} of them different"
        raise _refused("different points from 1 to the prime less one", came, "Number the holders from 1.")


def _refused(expected: str, came: str, do: str) -> GuaranteeError:
    return GuaranteeError(expected, came, do, where="secret sharing")
