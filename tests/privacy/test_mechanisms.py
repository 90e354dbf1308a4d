"""Mechanisms: noise of the stated size on every coordinate, and nothing released without a bound.

The record-and-replay test runs over every mechanism: with the same noise, totals that differ by one unit give releases
that differ by that unit's part and by nothing else.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from foedus.errors import GuaranteeError
from foedus.privacy.mechanisms import AtSilos, Unprotected, rounds_done
from foedus.privacy.noise import SimulatedSource, SystemSource
from foedus.privacy.plan import Terms, make_plan
from foedus.types import Total

SHAPES = {("delta", "a"): (300, 20), ("delta", "b"): (4000,), ("within", "sum"): (1,)}
SILO = Terms("silo", 1e-5, 4, noise_multiplier=1.5, silos=10, expected=10)
KINDS = {
    "gaussian": {}, "discrete": {"discrete": True}, "correlated": {"bands": 3}, "schedule": {"ratio": 3.0},
    "bare": {"noise_multiplier": None, "noise_std": 1.5, "max_norm": None},
}  # fmt: skip


def mechanism(kind: str, source=None):
    return make_plan(replace(SILO, **KINDS[kind]), source or SystemSource()).mechanism()


def total(value: float = 0.0, bound: float = 1.0) -> Total:
    return Total({key: np.full(shape, value) for key, shape in SHAPES.items()}, bound, 5)


def flat(tensors) -> np.ndarray:
    return np.concatenate([x.ravel() for x in tensors.values()])


@pytest.mark.parametrize("kind", KINDS)
def test_noise_has_the_stated_size_on_every_tensor(kind):
    made = mechanism(kind)
    release, _ = made.release(total(), made.init())
    expected = 1.5 * (getattr(made, "sensitivity", 1.0))
    for key, x in release.tensors.items():
        squares = float(np.square(x / expected).sum())
        p = 2 * min(stats.chi2.cdf(squares, x.size), stats.chi2.sf(squares, x.size))
        assert p > 1e-6, (kind, key, p)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "bare"])
def test_the_noise_grows_with_the_bound(kind):
    made = mechanism(kind, SimulatedSource(1))
    one, _ = made.release(total(bound=1.0), made.init())
    two, _ = made.release(total(bound=2.0), made.init())
    assert np.std(flat(two.tensors)) == pytest.approx(2 * np.std(flat(one.tensors)), rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_noise_shows_the_difference_of_two_totals_and_nothing_else(kind):
    """Record and replay, arXiv 2602.17454."""
    made = mechanism(kind, SimulatedSource(2))
    apart = 1000 * getattr(made, "step", 1e-3)
    a, b = (made.release(total(value), made.init())[0] for value in (0.0, apart))
    assert np.abs(flat(b.tensors) - flat(a.tensors) - apart).max() <= 1e-9
    assert a.event == b.event and a.unit == b.unit and a.tensors.keys() == b.tensors.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_rounds_and_no_two_runs_share_noise(kind):
    made = mechanism(kind)
    first, state = made.release(total(), made.init())
    second, state = made.release(total(), state)
    again, _ = mechanism(kind).release(total(), made.init())
    x, y, z = flat(first.tensors), flat(second.tensors), flat(again.tensors)
    assert rounds_done(state) == 2
    assert not np.array_equal(x, y) and not np.array_equal(x, z)
    if kind != "correlated":  # there it is meant
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / math.sqrt(len(x))


def test_correlated_noise_is_what_an_explicit_solve_gives():
    made = mechanism("correlated", SimulatedSource(4))
    state, rows = made.init(), []
    for _ in range(4):
        release, state = made.release(total(), state)
        rows.append(flat(release.tensors))
    c = np.zeros((4, 4))
    for i, coefficient in enumerate(made.factors.coefficients):
        c += coefficient * np.eye(4, k=-i)
    independent = c @ np.stack(rows)
    assert np.std(independent, axis=1) == pytest.approx(np.full(4, 1.5 * made.sensitivity), rel=0.05)
    assert np.abs(np.corrcoef(independent)[np.triu_indices(4, 1)]).max() < 0.06
    assert np.corrcoef(np.stack(rows))[0, 1] < -0.1  # the next round takes some of it back


@pytest.mark.parametrize("bound", [math.inf, math.nan, 0.0, -1.0])
@pytest.mark.parametrize("kind", ["gaussian", "discrete", "correlated"])
def test_a_total_without_a_bound_is_refused(kind, bound):
    made = mechanism(kind)
    with pytest.raises(GuaranteeError, match="finite bound"):
        made.release(total(bound=bound), made.init())


def test_discrete_noise_stays_on_its_grid_and_refuses_what_is_off_it():
    made = mechanism("discrete")
    release, _ = made.release(total(), made.init())
    points = flat(release.tensors) / made.step
    assert np.array_equal(points, np.rint(points))
    with pytest.raises(GuaranteeError, match="between its points"):
        made.release(total(made.step / 2), made.init())


def test_bare_noise_and_none_protect_nobody():
    bare = mechanism("bare")
    release, _ = bare.release(total(bound=math.inf), bare.init())
    assert release.unit == "" and release.event["mechanism"] == "none"
    assert Unprotected().release(total(), {})[0].unit == ""


def test_what_silos_protected_is_passed_on_with_its_event():
    made = AtSilos("example", ({"mechanism": "gaussian", "multiplier": 1.0},) * 2)
    release, state = made.release(total(3.0), made.init())
    assert release.unit == "example" and release.event["multiplier"] == 1.0 and rounds_done(state) == 1
    assert np.array_equal(flat(release.tensors), flat(total(3.0).tensors))


def test_an_empty_cohort_gets_noise_all_the_same():
    made = mechanism("gaussian")
    release, _ = made.release(replace(total(), count=0), made.init())
    assert np.std(flat(release.tensors)) == pytest.approx(1.5, rel=0.05)
