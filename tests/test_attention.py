"""Domain attention: weights, shares and what silos see in their own text (card 01, property test 4)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foedus.attention import (
    Attention,
    ceiling,
    distance,
    effective,
    effective_rank,
    inaccuracy,
    richness,
    shares,
    uncertainty,
)

GAMMAS = st.floats(-20, 20)
PHIS = st.lists(st.floats(0, 1), min_size=2, max_size=8).map(np.array)
HELD = np.array([10, 400, 30, 90, 1000, 1, 77, 5])


def alpha(gamma: float, phi: np.ndarray, exponent: float = 1.0, largest: float = 1.0) -> np.ndarray:
    return shares(Attention(gamma, exponent, most=1000).weight(HELD[: len(phi)], phi), largest)


@settings(max_examples=60, deadline=None)
@given(GAMMAS, PHIS, st.floats(0, 2))
def test_shares_add_up_to_one_and_weights_stay_within_their_public_bound(gamma, phi, exponent):
    attention = Attention(gamma, exponent, most=1000)
    weights = attention.weight(HELD[: len(phi)], phi)
    assert ((weights >= attention.least() * (1 - 1e-12)) & (weights <= 1)).all()
    assert shares(weights).sum() == pytest.approx(1.0)
    assert 1 - 1e-9 <= effective(weights) <= len(phi) + 1e-9


@settings(max_examples=40, deadline=None)
@given(GAMMAS, PHIS, st.randoms(use_true_random=False))
def test_shares_follow_the_silos_when_these_change_places(gamma, phi, random):
    order = random.sample(range(len(phi)), len(phi))
    attention = Attention(gamma, most=1000)
    weights = attention.weight(HELD[: len(phi)], phi)
    np.testing.assert_allclose(shares(weights[order], 0.6), shares(weights, 0.6)[order])


@settings(max_examples=40, deadline=None)
@given(GAMMAS, st.lists(st.floats(0, 0.5), min_size=2, max_size=8).map(np.array), st.floats(0, 0.5))
def test_only_differences_of_phi_count(gamma, phi, more):
    np.testing.assert_allclose(alpha(gamma, phi), alpha(gamma, phi + more), rtol=1e-9)


def test_shares_are_the_softmax_that_was_printed():
    phi = np.array([0.2, 0.9, 0.5])
    for gamma in (-2.0, 0.7, 3.0):
        np.testing.assert_allclose(alpha(gamma, phi, exponent=0), np.exp(gamma * phi) / np.exp(gamma * phi).sum())


def test_no_gamma_is_plain_weighted_averaging_exactly():
    held = HELD / HELD.sum()
    np.testing.assert_allclose(alpha(0.0, np.linspace(0, 1, 8)), held, rtol=1e-15)
    np.testing.assert_allclose(alpha(0.0, np.linspace(0, 1, 8), exponent=0), np.full(8, 1 / 8), rtol=1e-15)


def test_a_steep_gamma_chooses_the_most_or_the_least():
    phi = np.array([0.1, 0.4, 0.9, 0.2])
    np.testing.assert_allclose(alpha(100.0, phi), [0, 0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(alpha(-100.0, phi, exponent=0), [1, 0, 0, 0], atol=1e-4)


def test_more_examples_than_the_public_count_weigh_no_more_and_phi_is_cut_to_its_range():
    attention = Attention(1.0, most=100)
    assert attention.weight(10**6, 0.5) == attention.weight(100, 0.5)
    assert attention.weight(100, 7.0) == attention.weight(100, 1.0) == 1.0
    assert attention.weight(100, np.nan) == attention.weight(100, 0.0)
    assert Attention(-1.0, most=100).weight(100, np.nan) == Attention(-1.0, most=100).least(100)
    assert Attention(1.0, most=100).weight(-3.0, 1.0) == 0.01  # a count may be noised


def test_what_cannot_be_is_refused():
    for wrong in ({"gamma": 101.0}, {"gamma": np.nan}, {"exponent": -1.0}, {"most": 0}, {"ceiling": 0.0}):
        with pytest.raises(ValueError, match=f"Expected {next(iter(wrong))}="):
            Attention(**{"gamma": 1.0, **wrong})


# Caps


@settings(max_examples=60, deadline=None)
@given(GAMMAS, PHIS, st.floats(0.5, 1))
def test_no_capped_share_is_above_the_cap_and_the_others_keep_their_proportions(gamma, phi, largest):
    free, capped = alpha(gamma, phi), alpha(gamma, phi, largest=largest)
    assert capped.sum() == pytest.approx(1.0) and (capped <= largest + 1e-12).all()
    below = capped < largest - 1e-9
    if below.sum() > 1 and free[below].sum() > 1e-300:
        np.testing.assert_allclose(capped[below] / capped[below].sum(), free[below] / free[below].sum(), atol=1e-9)


def test_a_cap_that_shares_cannot_keep_is_refused():
    np.testing.assert_allclose(shares(np.array([1.0, 9.0, 90.0]), 1 / 3), np.full(3, 1 / 3))
    with pytest.raises(ValueError, match="1/3"):
        shares(np.ones(3), 0.3)


@settings(max_examples=60, deadline=None)
@given(st.floats(-5, 5), PHIS, st.floats(0.2, 0.9))
def test_a_silo_that_keeps_its_ceiling_alone_keeps_its_share_whatever_the_others_do(gamma, phi, largest):
    free = Attention(gamma, 0.0)
    limit = ceiling(largest, (len(phi) - 1) * free.least())
    weights = free.weight(1, phi)
    for i, weight in enumerate(weights):
        assert shares(np.array([min(weight, limit), *np.delete(weights, i)]))[0] <= largest + 1e-12
    assert (Attention(gamma, 0.0, ceiling=limit).weight(1, phi) <= limit).all()


def test_a_ceiling_takes_no_more_than_it_must():
    for largest, others in ((0.25, 0.9), (0.5, 0.3)):
        limit = ceiling(largest, others)
        assert limit < 1 and limit / (limit + others) == pytest.approx(largest)
    assert ceiling(0.9, 3.0) == 1.0
    for wrong in ((1.0, 1.0), (0.5, 0.0)):
        with pytest.raises(ValueError, match="Expected"):
            ceiling(*wrong)


def test_effective_counts_how_many_silos_decide():
    assert effective(np.ones(5)) == pytest.approx(5)
    assert effective(np.array([1.0, 0.0, 0.0])) == 1.0


# φ


def test_uncertainty_is_one_for_a_uniform_choice_and_zero_for_none():
    np.testing.assert_allclose(uncertainty(np.array([0.0, np.log(50), 99.0]), 50), [0, 1, 1])


def test_effective_rank_counts_the_directions_that_features_take():
    for k in (1, 3, 8):
        assert effective_rank(np.diag([2.0] * k + [0.0] * (8 - k))) == pytest.approx(k)
    assert richness(np.eye(8)) == pytest.approx(1.0)
    assert effective_rank(np.zeros((4, 4))) == 1.0


def test_effective_rank_is_that_of_the_singular_values_of_centred_features():
    x = np.random.default_rng(0).normal(size=(100, 6)) * [5, 3, 1, 1, 0.5, 0.1]
    singular = np.linalg.svd(x - x.mean(0), compute_uv=False)
    p = singular / singular.sum()
    assert effective_rank(np.cov(x.T)) == pytest.approx(np.exp(-(p * np.log(p)).sum()))


def test_a_noised_moment_has_a_rank_within_bounds():
    noise = np.random.default_rng(0).normal(size=(20, 5, 5))
    assert all(1 <= effective_rank(np.eye(5) + 3 * x) <= 5 for x in noise)


def test_inaccuracy_and_distance_stay_in_their_range_under_noise():
    np.testing.assert_allclose(inaccuracy(np.array([3.0, -2.0, 30.0]), 10), [0.7, 1, 0])
    assert inaccuracy(0.0, 0.0) == 1.0
    assert distance(np.array([1.0, 0]), np.array([-1.0, 0])) == 1.0
    assert distance(np.array([1.0, 0]), np.array([1.0, 0])) == 0.0
    assert distance(np.full(4, 9.0), np.zeros(4)) == 1.0
