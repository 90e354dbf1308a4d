"""Noise, and where it comes from: a cipher keyed by the operating system; in simulations, and only there, a seed.

A `Source` hands out generators; the samplers take one. What is drawn is float64 or int64: round it to fewer bits only
after it was added. Nothing here reads `torch.manual_seed`, `numpy.random.seed` or a treaty's seed.

Guarantees: two calls never share a key, nor do two processes, nor a run and its resumption; no key is printed,
logged, pickled or kept. Not covered: the floating-point attack of Mironov 2012 on continuous noise; use
`discrete_gaussian` on a grid where an attacker reads every last bit.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import NoReturn, Protocol

import numpy as np

from .. import seeds
from ..errors import GuaranteeError

Shape = int | tuple[int, ...]
LARGEST_VARIANCE = 4e12  # of Skellam noise; NumPy's Poisson sampler is wrong from a rate of 5e13 on
LARGEST_STD = 2.0**40  # of discrete noise; far more would not fit 64-bit integers once it is summed


class Source(Protocol):
    """Where noise comes from. `generator`: a fresh one for each call, and `purpose` says what it is for, in words."""

    @property
    def simulated(self) -> bool: ...
    def generator(self, *purpose: str | int) -> np.random.Generator: ...


@dataclass(frozen=True)
class SystemSource:
    """AES-128 in counter mode (FIPS 197), with 128 fresh bits of the operating system as the key of every call.

    It has no state, so that a fork copies nothing and a checkpoint holds nothing; `purpose` does not matter to it.
    """

    simulated = False

    def generator(self, *purpose: str | int) -> np.random.Generator:
        from randomgen import AESCounter

        key = np.array([secrets.randbits(64), secrets.randbits(64)], np.uint64)
        return _Fresh(AESCounter(key=key, counter=0))


@dataclass(frozen=True)
class SimulatedSource:
    """Noise that can be repeated, and so protects nobody: for simulations, whose reports must say "simulated noise".

    The same `seed` and `purpose` give the same stream on every machine, and different purposes give unrelated ones.
    """

    seed: int
    simulated = True

    def generator(self, *purpose: str | int) -> np.random.Generator:
        return seeds.generator(self.seed, "noise", *purpose)


class _Fresh(np.random.Generator):
    """A generator that refuses to be pickled or copied, and shows no state: whoever has that can take the noise off."""

    def __reduce__(self) -> NoReturn:
        raise GuaranteeError(
            "noise to be drawn where its generator was made",
            "a request to copy or pickle the generator",
            "Send the noisy sum, never the generator.",
        )

    def __repr__(self) -> str:
        return "<generator of privacy noise>"

    __str__ = __repr__


def gaussian(generator: np.random.Generator, shape: Shape, std: float) -> np.ndarray:
    """N(0, std²) in float64, of this `shape`. `std` ≥ 0 and finite; 0 gives zeros."""
    if not 0 <= std < math.inf:
        raise _refused("a standard deviation >= 0 and finite", f"std={std}")
    return np.asarray(generator.standard_normal(shape) * std, np.float64)


def discrete_gaussian(generator: np.random.Generator, shape: Shape, std: float) -> np.ndarray:
    """Integers x, int64, with chance proportional to exp(−x² / (2 std²)). `std` from 0 (zeros) to 2⁴⁰.

    Canonne, Kamath and Steinke 2020 (arXiv 2004.00010), algorithms 2 and 3: draw a discrete Laplace of scale t =
    ⌊std⌋ + 1, accept it with chance exp(−(|x| − std²/t)² / (2 std²)). What comes out is an exact integer, and the
    uniform part is drawn as one. Floating point enters where an exponential E of 53 bits is compared with a number a,
    for "yes, with chance exp(−a)", and where E − a is cut to an integer; a chance is off by some 2⁻⁵⁰, and the tail
    ends at 44 t. `exact_discrete_gaussian` is free of both.
    """
    if not 0 <= std <= LARGEST_STD:
        raise _refused(f"a standard deviation from 0 to {LARGEST_STD:.0f}", f"std={std}")
    out = np.zeros(shape, np.int64)
    flat, filled = out.reshape(-1), 0
    while std > 0 and filled < flat.size:
        found = _accepted(generator, min(1 << 15, 2 * (flat.size - filled) + 64), std)
        found = found[: flat.size - filled]
        flat[filled : filled + len(found)] = found
        filled += len(found)
    return out


def _accepted(generator: np.random.Generator, tries: int, std: float) -> np.ndarray:
    """Those of `tries` draws that become discrete Gaussians (algorithm 3), int64; in pieces that fit the cache."""
    scale = math.floor(std) + 1
    x = _discrete_laplace(generator, tries, scale)
    excess = np.abs(x) - std * std / scale
    excess *= excess
    excess *= 0.5 / (std * std)
    return np.asarray(x[generator.standard_exponential(len(x)) >= excess])


def _discrete_laplace(generator: np.random.Generator, tries: int, scale: int) -> np.ndarray:
    """Integers x with chance proportional to exp(−|x| / scale), fewer than `tries` (algorithm 2, lines 1 to 8).

    |x| = u + scale · v with u uniform below the scale, kept with chance exp(−u / scale), and v geometric. One
    exponential E decides both: given that E ≥ u / scale, what is left of it is again exponential, and v is its whole
    part.
    """
    signed = generator.integers(-scale, scale, tries)
    u = np.where(signed < 0, ~signed, signed)
    left = generator.standard_exponential(tries)
    left -= u / scale
    size = u + scale * np.floor(left).astype(np.int64)
    kept = (left >= 0) & ((size > 0) | (signed >= 0))  # zero has one sign only
    return np.where(signed < 0, -size, size)[kept]


def exact_discrete_gaussian(count: int, std: float) -> np.ndarray:
    """`count` integers, int64, from the exact sampler of OpenDP: rational arithmetic, and its own system randomness.

    For small releases, such as losses and counts: some 10 µs each. `std` > 0, and is read as the exact rational that
    it is.
    """
    try:
        from opendp import prelude as dp
    except ModuleNotFoundError as error:
        do = "Install it: pip install 'foedus[exact]'. Without it, `discrete_gaussian` draws the same law."
        raise GuaranteeError("OpenDP, whose sampler is exact", "no such library", do) from error

    if not 0 < std <= LARGEST_STD:
        raise _refused(f"a standard deviation above 0, up to {LARGEST_STD:.0f}", f"std={std}")
    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T=int)), dp.l2_distance(T=float)
    measure = dp.m.make_gaussian(*space, scale=float(std))
    return np.array(measure([0] * count), np.int64)


def skellam(generator: np.random.Generator, shape: Shape, variance: float) -> np.ndarray:
    """The difference of two Poisson draws of rate variance / 2, int64: a sum of Skellams is one again.

    `variance` from 0 to 4e12: beyond 5e13 NumPy's Poisson sampler is silently wrong by percents. Choose a coarser grid.
    """
    if not 0 <= variance <= LARGEST_VARIANCE:
        raise _refused(
            f"a variance from 0 to {LARGEST_VARIANCE:.0e}, where the Poisson sampler is right", f"{variance}"
        )
    rate = variance / 2
    return generator.poisson(rate, shape) - generator.poisson(rate, shape)


def _refused(expected: str, came: str) -> GuaranteeError:
    return GuaranteeError(expected, came, "Check the noise multiplier, the bound and the step of the grid.")
