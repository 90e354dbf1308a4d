"""Samplers: deterministic in (seed, round), and as random as they say."""

import numpy as np
import pytest

from foedus.server import FixedSize, Full, Poisson

SILOS = tuple(f"silo{i}" for i in range(10))


@pytest.mark.parametrize("sampler", [Full(), FixedSize(4), Poisson(0.3)])
def test_a_cohort_depends_on_seed_and_round_alone_and_keeps_the_order(sampler):
    for round in range(20):
        cohort = sampler.cohort(SILOS, round, 1)
        assert cohort == sampler.cohort(SILOS, round, 1)
        assert list(cohort) == sorted(cohort, key=SILOS.index)


def test_fixed_size_draws_every_silo_equally_often():
    drawn = np.array([[s in FixedSize(4).cohort(SILOS, r, 0) for s in SILOS] for r in range(2000)])
    assert (drawn.sum(1) == 4).all()
    np.testing.assert_allclose(drawn.mean(0), 0.4, atol=0.05)


def test_poisson_draws_every_silo_independently():
    drawn = np.array([[s in Poisson(0.3).cohort(SILOS, r, 0) for s in SILOS] for r in range(3000)])
    np.testing.assert_allclose(drawn.mean(0), 0.3, atol=0.04)
    sizes = drawn.sum(1)
    assert abs(sizes.var() - 10 * 0.3 * 0.7) < 0.2
    assert (sizes == 0).any()


@pytest.mark.parametrize("build", [lambda: FixedSize(0), lambda: Poisson(0.0), lambda: Poisson(1.1),
                                   lambda: FixedSize(11).cohort(SILOS, 0, 0)])  # fmt: skip
def test_impossible_samplers_are_refused(build):
    with pytest.raises(ValueError, match="Expected"):
        build()
