"""Statistics over few seeds, by hand and against SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from foedus.study.statistics import paired, ratio, shape, significant, summary

ONE = {1: 20.1, 2: 20.9, 3: 19.6}
OTHER = {1: 22.0, 2: 23.1, 3: 21.9}


def test_a_summary_has_mean_and_the_deviation_of_a_sample():
    found = summary(ONE)
    assert found["mean"] == pytest.approx((20.1 + 20.9 + 19.6) / 3)
    assert found["sd"] == pytest.approx(np.std([20.1, 20.9, 19.6], ddof=1))
    assert (found["low"], found["high"], found["n"]) == (19.6, 20.9, 3)
    assert summary({4: 1.0})["sd"] is None and summary({}) is None


def test_the_paired_test_is_scipys_and_the_textbooks():
    found = paired(ONE, OTHER)
    theirs = stats.ttest_rel(list(ONE.values()), list(OTHER.values()))
    assert (found["t"], found["p"]) == pytest.approx((theirs.statistic, theirs.pvalue))
    d = np.array([-1.9, -2.2, -2.3])
    t = d.mean() / (d.std(ddof=1) / math.sqrt(3))
    assert found["t"] == pytest.approx(t)
    # with two degrees of freedom Student's distribution has a closed form
    assert found["p"] == pytest.approx(1 - abs(t) / math.sqrt(t * t + 2))
    assert (found["below"], found["above"], found["n"]) == (3, 0, 3)
    assert (found["low"], found["high"]) == pytest.approx((-2.3, -1.9))


def test_only_seeds_that_both_have_are_paired():
    assert paired({1: 1.0, 2: 2.0, 9: 100.0}, {2: 1.0, 1: 0.5, 7: 3.0})["n"] == 2
    assert paired({1: 1.0}, {2: 1.0}) is None


def test_one_seed_and_equal_differences_prove_nothing():
    assert paired({1: 1.0}, {1: 2.0})["p"] is None
    same = paired({1: 1.0, 2: 2.0, 3: 3.0}, {1: 2.0, 2: 3.0, 3: 4.0})
    assert same["p"] is None and same["below"] == 3
    assert not significant(same) and not significant(None)
    assert not significant(paired({1: 1.1, 2: 2.0, 3: 3.3}, {1: 1.0, 2: 2.1, 3: 3.0}))
    assert significant(paired(ONE, OTHER))


def test_the_ratio_is_of_means_and_its_interval_holds_it():
    start, end = {1: 1.0, 2: 2.0, 3: 3.0}, {1: 2.0, 2: 2.0, 3: 5.0}
    found = ratio(start, end)
    assert found["ratio"] == pytest.approx(1.5)
    draws = [[seed + 1 for seed in draw] for draw in np.ndindex(3, 3, 3)]
    every = [sum(end[s] for s in draw) / sum(start[s] for s in draw) for draw in draws]
    exact = np.quantile(every, (0.025, 0.975), method="inverted_cdf")
    assert (found["low"], found["high"]) == pytest.approx(tuple(exact))
    assert ratio(start, end) == found
    assert ratio({1: 2.0}, {1: 3.0})["low"] is None
    assert ratio({1: 0.0}, {1: 3.0}) is None and ratio({1: 1.0}, {2: 1.0}) is None


def spread(means: list[float]) -> list[dict[int, float]]:
    return [{seed: mean * (1 + 0.001 * seed) for seed in (1, 2, 3)} for mean in means]


def test_a_curve_that_rises_ever_faster_keeps_all_three_criteria():
    found = shape([0.2, 0.4, 0.6, 0.8, 1.0], spread([1.0, 1.1, 1.3, 1.8, 2.6]))
    assert found["rho"] == pytest.approx(1.0)
    assert (found["first"], found["second"]) == pytest.approx((0.75 * 1.002, 3.25 * 1.002))
    assert found["monotone"] and found["beyond"] and found["steeper"]
    assert found["ends"]["ratio"] == pytest.approx(2.6)


def test_a_curve_that_flattens_or_turns_is_told_so():
    flat = shape([1, 2, 3, 4], spread([1.0, 1.5, 1.6, 1.65]))
    assert flat["monotone"] and flat["steeper"] is False
    turned = shape([1, 2, 3, 4], spread([1.0, 2.0, 1.5, 0.9]))
    assert turned["monotone"] is False and turned["beyond"] is False
    assert shape([1, 2, 3], spread([1.0, 2.0, 3.0]))["steeper"] is False
    level = shape([1, 2, 3], spread([1.0, 1.0, 1.0]))
    assert level["rho"] is None and level["monotone"] is None


def test_a_curve_that_is_to_fall_is_judged_the_other_way():
    found = shape([1, 2, 3, 4], spread([3.0, 2.9, 2.5, 1.0]), "falls")
    assert found["rho"] == pytest.approx(-1.0)
    assert found["monotone"] and found["beyond"] and found["steeper"]


def test_points_without_a_value_are_left_out():
    found = shape([1, 2, 3, 4], [*spread([1.0, 2.0]), {}, *spread([5.0])])
    assert found["points"] == 3 and found["ends"]["ratio"] == pytest.approx(5.0)
    nothing = shape([1, 2], [{}, {}])
    assert nothing["points"] == 0 and nothing["ends"] is None and nothing["rho"] is None
