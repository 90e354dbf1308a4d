"""How many neighbours a silo needs, and how many of their shares open a secret: the published search.

Bell et al. 2020 (SecAgg+), as the search of Google's Federated Compute Platform (`graph_parameter_finder`) has it. In a
cohort of n silos some are corrupt, that is, collude with the coordinator, and some drop out. It takes the smallest even
degree k, and for it the smallest threshold t, such that over the random order of the circle

- **secure**, but for a chance of 2⁻⁴⁰: the honest silos that stay are connected (half of that chance), and no silo has
  too many corrupt neighbours (the other half, a union over n silos). Too many for a curious coordinator: t, which open
  a secret. For a lying one: so many that 2t ≤ k + corrupt ones, and t answers could come to each of two different
  statements about who survived;
- **correct**, but for a chance of 2⁻²⁰: every silo keeps t neighbours (a union over n silos).

That is for silos who drop out wherever they stand. A lying coordinator may pick them by their places instead, to part
the sum. But silos only answer while t neighbours stay, so each honest one is summed with at least t − corrupt ones of
its honest neighbours; and as t is more than k/2, without corrupt silos the sum cannot be parted at all.

In a complete graph nothing is left to chance: all of this holds, or it cannot. One thing differs from that project: it
raises a threshold of 1 to 2 without asking whether two neighbours stay; here such a degree is passed over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..errors import GuaranteeError

SECURITY, CORRECTNESS = 40, 20  # bits: the chances of failure are 2⁻⁴⁰ and 2⁻²⁰
SMALL = 16  # silos, up to which the graph is complete: a tenth of them, rounded down, is one or nobody at all
_FUZZ = 1e-9  # so that 0.29 · 100 counts as 29


@dataclass(frozen=True)
class Graph:
    """Each silo has `neighbours`; `threshold` shares, of as many of them, open one of its secrets."""

    neighbours: int
    threshold: int

    @property
    def spare(self) -> int:
        """How many silos may vanish, whichever they are, and the sum of the others is still found."""
        return self.neighbours - self.threshold


@lru_cache(maxsize=1024)
def choose(
    n: int,
    corrupt: float,
    dropout: float,
    *,
    malicious: bool = True,
    neighbours: int | None = None,
    threshold: int | None = None,
) -> Graph:
    """The graph for a cohort of `n` silos: complete up to SMALL of them, or where the search finds nothing smaller.

    `corrupt`, `dropout`: shares of the silos, from 0 up to 1; counts are rounded down. `malicious`: the coordinator may
    lie, not only look. `neighbours`, `threshold`: fixed by hand; an odd degree counts as the next even one.
    A GuaranteeError where no graph, or not the one asked for, is both secure and correct.
    """
    if not (0 <= corrupt < 1 and 0 <= dropout < 1):
        came = f"corrupt={corrupt:g} and dropout={dropout:g}"
        raise _refused("shares of silos from 0 up to 1", came, "State the worst that you expect of a round.")
    bad = math.floor(corrupt * n + _FUZZ), math.floor(dropout * n + _FUZZ)
    if not thresholds(n, n - 1, *bad, malicious=malicious):
        raise _hopeless(n, *bad, malicious)
    for k in _degrees(n, neighbours):
        allowed = thresholds(n, k, *bad, malicious=malicious)
        if allowed and (threshold is None or threshold in allowed):
            return Graph(k, threshold or allowed.start)
    raise _unfit(n, *bad, malicious, neighbours, threshold)


def thresholds(n: int, k: int, corrupt: int, dropped: int, *, malicious: bool = True) -> range:
    """The thresholds that make degree `k` both secure and correct, by counts of silos; empty where none does."""
    most_corrupt, most_dropped = corrupt, dropped
    if k < n - 1:
        if _cut_off(n, k, corrupt + dropped) >= -(SECURITY + 1) * math.log(2):
            return range(0)
        most_corrupt = _most(n, corrupt, k, 2.0 ** -(SECURITY + 1) / n)
        most_dropped = _most(n, dropped, k, 2.0**-CORRECTNESS / n)
    least = (k + most_corrupt) // 2 + 1 if malicious else most_corrupt + 1
    return range(max(least, 2), k - most_dropped + 1)  # one share must never be the secret


def _degrees(n: int, neighbours: int | None) -> Iterable[int]:
    """The degrees to try, the smallest first."""
    if neighbours is not None:
        return [min(neighbours + neighbours % 2, n - 1)]
    return [*(range(2, n - 1, 2) if n > SMALL else ()), n - 1]


def _cut_off(n: int, k: int, bad: int) -> float:
    """The log of a bound on the chance that taking `bad` silos, k < n − 1, leaves the circle in two pieces.

    That takes k/2 of them in a row in each of two places: a union over n (n − k − 1) / 2 pairs of places.
    """
    if bad < k:
        return -math.inf
    f = _log_factorials(n)
    return math.log(n) + math.log(n - k - 1) - math.log(2) + float(f[bad] - f[bad - k] - f[n] + f[n - k])


def _most(n: int, marked: int, k: int, chance: float) -> int:
    """The smallest m such that more than m of k neighbours are marked with a chance below `chance`.

    Hypergeometric: k drawn of n, `marked` of which are marked. The terms are taken as logs, and added from the far end
    of the tail on, so that chances of 10⁻¹⁸ and less keep their digits; one minus a sum would lose them. What rounding
    cannot tell from `chance` counts as not below it.
    """
    f = _log_factorials(n)
    x = np.arange(max(0, k - (n - marked)), min(k, marked) + 1)
    ways = f[marked] - f[x] - f[marked - x] + f[n - marked] - f[k - x] - f[n - marked - k + x]
    at_least = np.cumsum(np.exp(ways - f[n] + f[k] + f[n - k])[::-1])[::-1]
    return int(x[0] + np.count_nonzero(at_least[1:] >= chance * (1 - 1e-9)))


@lru_cache(maxsize=8)
def _log_factorials(n: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """log 0!, …, log n!."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1.0, n + 1)))])


def _hopeless(n: int, corrupt: int, dropped: int, malicious: bool) -> GuaranteeError:
    least = max(corrupt + (2 if malicious else 1) * dropped + 2, dropped + 3)
    return _refused(
        f"at least {least} silos, where {corrupt} may be corrupt and {dropped} may drop out",
        f"a cohort of {n}",
        "Ask for more silos, or state a lower [secure] dropout or corrupt.",
    )


def _unfit(
    n: int, corrupt: int, dropped: int, malicious: bool, neighbours: int | None, threshold: int | None
) -> GuaranteeError:
    asked = " and ".join(f"{k}={v}" for k, v in (("neighbours", neighbours), ("threshold", threshold)) if v is not None)
    fit = thresholds(n, n - 1, corrupt, dropped, malicious=malicious)
    return _refused(
        f"a secure and correct graph of {n} silos, {corrupt} of them corrupt and {dropped} dropping out",
        asked,
        f"Leave it out to have it chosen; neighbours={n - 1} works with threshold={fit.start} to {fit[-1]}.",
    )


def _refused(expected: str, came: str, do: str) -> GuaranteeError:
    return GuaranteeError(expected, came, do, where="[secure]")
