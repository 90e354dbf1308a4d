"""How long it takes to find the noise for an ε: `python -m benchmarks.calibrate`.

Ours beside dp-accounting's own `calibrate_dp_mechanism` over its PLD accountant, each in a fresh process of its own,
the import of dp-accounting included; both to a thousandth of the multiplier. Wall seconds, the median of several
processes in turn.
"""

from __future__ import annotations

import time

from .apart import apart
from .table import Row, faster, finish, median, share

PLANS = ((0.064, 320, 8.0, 1e-5), (0.01, 1000, 2.0, 1e-5))  # rate, steps, ε, δ
REPEATS, LIMIT = 3, 2.0


def ours(rate: float, steps: int, epsilon: float, delta: float) -> tuple[float, float]:
    """(seconds, multiplier)"""
    began = time.perf_counter()
    from foedus.privacy import accountant, events

    def event(z: float) -> dict:
        return events.repeat(events.poisson(rate, events.gaussian(z)), steps)

    multiplier = accountant.calibrate(event, epsilon, delta)
    return time.perf_counter() - began, multiplier


def theirs(rate: float, steps: int, epsilon: float, delta: float) -> tuple[float, float]:
    """(seconds, multiplier)"""
    began = time.perf_counter()
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    def event(z: float) -> dp_accounting.DpEvent:
        sampled = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(z))
        return dp_accounting.SelfComposedDpEvent(sampled, steps)

    multiplier = dp_accounting.calibrate_dp_mechanism(PLDAccountant, event, epsilon, delta, tol=1e-3)
    return time.perf_counter() - began, float(multiplier)


def rows(repeats: int = REPEATS) -> list[Row]:
    """For every plan: seconds beside dp-accounting's and beside the limit, and the two multipliers."""
    out = []
    for plan in PLANS:
        found = [(apart(ours, *plan), apart(theirs, *plan)) for _ in range(repeats)]
        mine, peers = (median([pair[side][0] for pair in found]) for side in (0, 1))
        name = "calibrate: q = {}, {} steps, ε = {}".format(*plan)
        out += [
            faster(f"{name}, against dp-accounting", mine, peers, "s"),
            share(f"{name}, against the limit", mine, LIMIT, "s", 1.0),
            share(f"{name}, noise multiplier", found[0][0][1], found[0][1][1], "", 1.005),
        ]
    return out


if __name__ == "__main__":
    finish("calibrate", rows())
