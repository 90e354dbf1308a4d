"""MMD: what the estimators, the permutation test and the Fourier features promise (card 01, property tests 2 and 3)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from foedus.errors import DataError
from foedus.kernels import (
    bandwidths,
    debiased,
    fourier_map,
    kernel,
    mmd_biased,
    mmd_unbiased,
    permutation_test,
    relabelled,
)

S = (0.7, 1.0, 1.4)


def rows(n: int, seed: int = 0, shift: float = 0.0, width: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1.0, (n, width))


# Bandwidths and kernel


def test_bandwidths_stand_around_the_median_distance():
    x = rows(50)
    squared = [float((a - b) @ (a - b)) for i, a in enumerate(x) for b in x[i + 1 :]]
    assert np.array(bandwidths(x)) ** 2 == pytest.approx(np.median(squared) * np.array([0.25, 0.5, 1, 2, 4]))


def test_text_without_variety_has_no_bandwidth():
    for x in (np.ones((20, 3)), rows(1)):
        with pytest.raises(DataError, match="more various"):
            bandwidths(x)


def test_the_kernel_is_the_mean_of_gaussians_and_positive_definite():
    x, y = rows(12), rows(9, 1)
    direct = np.array([[np.mean([np.exp(-((a - b) @ (a - b)) / (2 * s * s)) for s in S]) for b in y] for a in x])
    np.testing.assert_allclose(kernel(x, y, S), direct, rtol=1e-12)
    assert np.linalg.eigvalsh(kernel(x, x, S)).min() > 0
    np.testing.assert_allclose(np.diag(kernel(x, x, S)), 1.0, rtol=1e-12)


# Estimators


def by_definition(x: np.ndarray, y: np.ndarray, diagonals: bool) -> float:
    def k(a, b):
        return np.mean([np.exp(-((a - b) @ (a - b)) / (2 * s * s)) for s in S])

    def within(z):
        pairs = [k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if diagonals or i != j]
        return np.mean(pairs)

    return within(x) + within(y) - 2 * np.mean([k(a, b) for a in x for b in y])


def test_the_estimators_are_their_definitions():
    x, y = rows(9), rows(7, 1, 0.5)
    assert mmd_biased(x, y, S) == pytest.approx(by_definition(x, y, True), rel=1e-10)
    assert mmd_unbiased(x, y, S) == pytest.approx(by_definition(x, y, False), rel=1e-10)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 2**32 - 1), st.floats(0, 3))
def test_the_biased_one_is_never_negative_and_exceeds_the_unbiased(n, m, seed, shift):
    x, y = rows(n, seed), rows(m, seed + 1, shift)
    assert mmd_biased(x, y, S) >= -1e-12
    assert mmd_biased(x, y, S) >= mmd_unbiased(x, y, S)
    assert mmd_biased(x, y, S) == pytest.approx(mmd_biased(y, x, S), abs=1e-12)


def test_a_sample_is_at_no_biased_distance_from_itself():
    assert mmd_biased(rows(30), rows(30), S) == pytest.approx(0.0, abs=1e-12)


def test_the_unbiased_one_averages_to_zero_when_nothing_differs_and_the_biased_does_not():
    found = [(mmd_unbiased(rows(15, 2 * i), rows(20, 2 * i + 1), S)) for i in range(400)]
    assert abs(np.mean(found)) < 2 * np.std(found) / np.sqrt(len(found))
    assert min(found) < 0 < np.mean([mmd_biased(rows(15, 2 * i), rows(20, 2 * i + 1), S) for i in range(20)])


def test_taking_the_noise_off_leaves_the_clean_distance_on_average():
    random, (std_x, std_y) = np.random.default_rng(3), (0.1, 0.3)
    fourier = fourier_map(4, 64, S, 0)
    x, y = fourier(rows(40)).mean(0), fourier(rows(40, 1, 0.5)).mean(0)

    def noised(mean, std):
        return mean + std * random.standard_normal(64)

    found = [debiased(noised(x, std_x), noised(y, std_y), std_x, std_y) for _ in range(2000)]
    clean = debiased(x, y, 0.0, 0.0)
    assert clean == pytest.approx(float(((x - y) ** 2).sum()))
    assert abs(np.mean(found) - clean) < 3 * np.std(found) / np.sqrt(len(found))
    assert 64 * (std_x**2 + std_y**2) > 10 * clean  # without it, noise is all that one would see


# Permutation test


def test_p_is_uniform_when_nothing_differs():
    found = [permutation_test(rows(12, 2 * i), rows(9, 2 * i + 1), S, 49, np.random.default_rng(i)) for i in range(300)]
    assert kstest(np.array(found) - np.random.default_rng(0).uniform(0, 0.02, 300), "uniform").pvalue > 0.01


def test_p_is_small_under_a_shift_and_never_zero():
    random = np.random.default_rng(0)
    assert permutation_test(rows(40), rows(40, 1, 1.0), S, 199, random) == 1 / 200
    assert permutation_test(np.ones((5, 2)), np.ones((6, 2)), S, 20, random) == 1.0


def test_the_distances_of_all_pairs_come_from_one_matrix():
    groups = [rows(20), rows(25, 1, 0.3), rows(15, 2, 1.0)]
    observed, null = relabelled(groups, S, 40, np.random.default_rng(0))
    for i, x in enumerate(groups):
        for j, y in enumerate(groups):
            assert observed[i, j] == pytest.approx(mmd_unbiased(x, y, S) if i != j else 0.0, abs=1e-6)
    assert null.shape == (40, 3, 3) and abs(null[:, 0, 1].mean()) < 0.01
    assert null[:, 0, 1].max() < observed[0, 2]


def test_rows_that_are_nearly_alike_are_told_apart_in_single_precision():
    x, y = 0.05 * np.random.default_rng(0).normal(size=(2, 600, 6))
    observed, _ = relabelled([x, y], (1.0, 2.0), 0, np.random.default_rng(0))
    assert observed[0, 1] == pytest.approx(mmd_unbiased(x, y, (1.0, 2.0)), abs=2e-9)


# Fourier features


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([None, 3]), st.floats(1e-3, 1e3))
def test_fourier_features_have_norm_one_whatever_comes_in(seed, project, size):
    fourier = fourier_map(4, 20, S, seed, project)
    out = fourier(size * rows(10, seed))
    assert out.shape == (10, fourier.features) == (10, 20) and fourier.width == 4
    np.testing.assert_allclose(np.linalg.norm(out, axis=1), 1.0, rtol=0, atol=1e-14)


def test_replacing_a_record_moves_a_mean_embedding_by_two_over_n_at_most():
    fourier = fourier_map(4, 20, S, 0)
    x = rows(8)
    for i in range(8):
        other = x.copy()
        other[i] = 50.0 * rows(1, i)
        assert np.linalg.norm(fourier(x).mean(0) - fourier(other).mean(0)) <= 2 / 8


@pytest.mark.parametrize("seed", range(5))
def test_their_dot_products_approach_the_kernel(seed):
    x, y = rows(40, seed), rows(40, seed + 100)
    gaps = {}
    for features in (200, 3200):
        fourier = fourier_map(4, features, S, seed)
        gaps[features] = np.abs(fourier(x) @ fourier(y).T - kernel(x, y, S)).max()
        assert gaps[features] < 3 / np.sqrt(features / 2)
    assert gaps[3200] < gaps[200]


def test_mmd_is_the_distance_of_mean_embeddings():
    x, y = rows(60), rows(60, 1, 0.5)
    fourier = fourier_map(4, 8000, S, 0)
    assert debiased(fourier(x).mean(0), fourier(y).mean(0), 0, 0) == pytest.approx(mmd_biased(x, y, S), abs=0.02)


def test_a_projection_keeps_distances_on_average():
    x, y = rows(30, width=200), rows(30, 1, width=200)
    near = fourier_map(200, 4000, bandwidths(x), 0, project=64)
    assert np.abs(near(x) @ near(y).T - kernel(x, y, bandwidths(x))).mean() < 0.1


def test_everyone_who_knows_the_seed_draws_the_same_map():
    one, same, other = (fourier_map(4, 20, S, seed, 3)(rows(5)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other)


def test_a_map_without_room_for_every_bandwidth_is_refused():
    for features in (5, 4):
        with pytest.raises(ValueError, match="two a bandwidth"):
            fourier_map(4, features, S, 0)
