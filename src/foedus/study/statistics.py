"""What few seeds can say: means and spreads, paired tests, bootstrap intervals, and the shape of a curve.

A paired t-test (Student 1908) over three seeds has two degrees of freedom, so its p goes with the sign and the range of
the differences, which need no assumption. With three seeds the sign alone can never be significant: 2 · ½³ = 0.25.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from ..seeds import generator

RESAMPLES = 10_000
CONFIDENCE = 0.95
SIGNIFICANT = 0.05

BySeed = Mapping[int, float]


def summary(values: BySeed) -> dict[str, Any] | None:
    """Mean, standard deviation over seeds (n − 1; None for one seed), range, and the values; None for none."""
    if not values:
        return None
    x = np.array([values[seed] for seed in sorted(values)])
    sd = float(x.std(ddof=1)) if x.size > 1 else None
    return {"mean": float(x.mean()), "sd": sd, "n": int(x.size), "low": float(x.min()), "high": float(x.max()),
            "values": {str(seed): float(values[seed]) for seed in sorted(values)}}  # fmt: skip


def paired(one: BySeed, other: BySeed) -> dict[str, Any] | None:
    """one − other over the seeds that both have: mean, range, how many are below zero and above, and the two-sided p of
    the paired t-test. p is None for fewer than two seeds, and where all differences are equal: nothing then says how
    much chance moves them. None without a common seed.
    """
    seeds = sorted(set(one) & set(other))
    if not seeds:
        return None
    x = np.array([one[seed] - other[seed] for seed in seeds])
    scale = max(abs(one[seed]) + abs(other[seed]) for seed in seeds)
    spread = float(np.ptp(x)) > 1e-12 * scale
    t, p = (float(v) for v in stats.ttest_1samp(x, 0.0)) if spread else (None, None)
    return {"n": len(seeds), "mean": float(x.mean()), "low": float(x.min()), "high": float(x.max()),
            "below": int((x < 0).sum()), "above": int((x > 0).sum()), "t": t, "p": p}  # fmt: skip


def significant(test: Mapping[str, Any] | None) -> bool:
    """Whether a paired test says p < 0.05."""
    return test is not None and test["p"] is not None and test["p"] < SIGNIFICANT


def ratio(start: BySeed, end: BySeed) -> dict[str, Any] | None:
    """mean(end) / mean(start), and its percentile bootstrap interval over seeds, drawn in pairs (Efron 1979).

    None without a common seed or where a mean is not above zero; no interval for fewer than two seeds.
    """
    seeds = sorted(set(start) & set(end))
    a, b = np.array([start[seed] for seed in seeds]), np.array([end[seed] for seed in seeds])
    if not seeds or a.mean() <= 0 or b.mean() <= 0:
        return None
    found: dict[str, Any] = {"ratio": float(b.mean() / a.mean()), "low": None, "high": None, "n": len(seeds)}
    if len(seeds) > 1:
        drawn = generator(0, "bootstrap", len(seeds)).integers(len(seeds), size=(RESAMPLES, len(seeds)))
        below = a[drawn].mean(axis=1)
        ratios = b[drawn].mean(axis=1)[below > 0] / below[below > 0]
        found["low"], found["high"] = (
            float(q) for q in np.quantile(ratios, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
        )
    return found


def shape(x: Sequence[float], by_point: Sequence[BySeed], direction: str = "rises") -> dict[str, Any]:
    """What card 01 asks of a curve: Spearman's ρ of the means ≥ 0.9 (≤ −0.9 where it falls), an end-to-start ratio
    whose interval is above 1 (below), and a second half steeper than the first.

    Slopes are least squares over the points up to the middle one and from it on. Points without a value are left out.
    """
    sign = -1.0 if direction == "falls" else 1.0
    known = [(at, values) for at, values in zip(x, by_point, strict=True) if values]
    xs = np.array([at for at, _ in known])
    means = np.array([np.mean(list(values.values())) for _, values in known])
    rho = _spearman(xs, means)
    ends = ratio(known[0][1], known[-1][1]) if len(known) > 1 else None
    first, second = _halves(xs, means)
    beyond = None if ends is None or ends["low"] is None else (ends["low"] > 1 if sign > 0 else ends["high"] < 1)
    return {
        "points": len(known), "rho": rho, "ends": ends, "first": first, "second": second,
        "monotone": None if rho is None else sign * rho >= 0.9,
        "beyond": beyond,
        "steeper": None if first is None or second is None else sign * (second - first) > 1e-9 * abs(first),
    }  # fmt: skip


def _spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """None for fewer than two points, and for a flat curve, which has no order."""
    if len(x) < 2 or np.ptp(y) == 0:
        return None
    return float(stats.spearmanr(x, y).statistic)


def _halves(x: np.ndarray, y: np.ndarray) -> tuple[float | None, float | None]:
    """Slopes of both halves, which share the middle point of an odd number; None where a half has one point only."""
    half = math.ceil(len(x) / 2)
    if half < 2:
        return None, None
    return tuple(float(stats.linregress(a, b).slope) for a, b in ((x[:half], y[:half]), (x[-half:], y[-half:])))  # type: ignore[return-value]
