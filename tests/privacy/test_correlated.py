"""Correlated noise: streaming equals the matrices, sensitivity equals all patterns tried, and sums carry less noise."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import toeplitz

from foedus.errors import GuaranteeError
from foedus.privacy import accountant, events
from foedus.privacy.correlated import Banded, _noise, error, optimal, sensitivity

falling = st.lists(st.floats(0.05, 1.0), min_size=0, max_size=5).map(lambda ratios: (1.0, *np.cumprod(ratios).tolist()))


def matrix(coefficients: tuple[float, ...], rounds: int) -> np.ndarray:
    column = np.zeros(rounds)
    column[: len(coefficients)] = coefficients[:rounds]
    return np.tril(toeplitz(column))


def stream(factors: Banded, fresh: np.ndarray) -> np.ndarray:
    state, rows = (), []
    for z in fresh:
        noise, state = factors.next(state, z)
        assert len(state) <= factors.bands - 1
        rows.append(noise)
    return np.array(rows)


@given(falling, st.integers(1, 12))
def test_streaming_solves_the_matrix_equation(coefficients, rounds):
    fresh = np.random.default_rng(1).standard_normal((rounds, 2, 3))
    solved = np.linalg.solve(matrix(coefficients, rounds), fresh.reshape(rounds, -1)).reshape(fresh.shape)
    assert stream(Banded(coefficients), fresh) == pytest.approx(solved, abs=1e-9)


def test_the_state_may_be_stored_and_taken_up_again():
    factors, fresh = optimal(10, 4), np.random.default_rng(2).standard_normal((10, 5))
    _, state = factors.next((), fresh[0])
    kept = [np.array(x) for x in state]
    assert factors.next(kept, fresh[1])[0] == pytest.approx(stream(factors, fresh)[1])


def test_fresh_noise_is_left_as_it_was():
    fresh = np.ones(3)
    optimal(10, 4).next((np.full(3, 5.0),), fresh)
    assert (fresh == 1).all()


def test_one_band_is_independent_noise():
    fresh = np.random.default_rng(3).standard_normal((6, 2))
    assert (stream(optimal(6, 1), fresh) == fresh).all()
    assert sensitivity((1.0,), 6, 2, 3) == pytest.approx(3**0.5)


@settings(max_examples=40, deadline=None)
@given(falling, st.integers(1, 7), st.integers(1, 4), st.integers(1, 4))
def test_sensitivity_is_that_of_the_worst_pattern_of_participation(coefficients, rounds, separation, participations):
    c = matrix(coefficients, rounds)
    worst = 0.0
    for count in range(1, participations + 1):
        for pattern in combinations(range(rounds), count):
            if all(b - a >= separation for a, b in zip(pattern, pattern[1:], strict=False)):
                worst = max(worst, float(np.linalg.norm(c[:, pattern].sum(1))))
    assert sensitivity(coefficients, rounds, separation, participations) == pytest.approx(worst)


def test_contributions_in_other_directions_never_move_it_further():
    random = np.random.default_rng(4)
    c, most = matrix(optimal(8, 5).coefficients, 8), sensitivity(optimal(8, 5).coefficients, 8, 2, 4)
    for _ in range(200):
        x = np.zeros((8, 3))
        x[::2] = random.standard_normal((4, 3))
        x[::2] /= np.linalg.norm(x[::2], axis=1, keepdims=True)
        assert np.linalg.norm(c @ x) <= most * (1 + 1e-12)


def test_far_apart_rounds_add_up_as_if_they_were_orthogonal():
    c = optimal(40, 8).coefficients
    assert sensitivity(c, 40, 8, 5) == pytest.approx(5**0.5 * np.linalg.norm(c), rel=1e-3)


@given(falling, st.integers(1, 12))
def test_error_is_that_of_the_explicit_matrices(coefficients, rounds):
    left = np.tril(np.ones((rounds, rounds))) @ np.linalg.inv(matrix(coefficients, rounds))
    assert error(coefficients, rounds) == pytest.approx(np.linalg.norm(left) / rounds**0.5)


@pytest.mark.parametrize(("rounds", "bands"), [(20, 5), (320, 16), (320, 64)])
def test_correlated_noise_beats_independent_noise_and_the_square_root(rounds, bands):
    root = [1.0]
    for k in range(1, bands):
        root.append(root[-1] * (2 * k - 1) / (2 * k))
    ours, roots = (error(c, rounds) * np.linalg.norm(c) for c in (optimal(rounds, bands).coefficients, root))
    assert ours < roots and ours < 0.7 * error((1.0,), rounds)


def test_more_bands_never_do_worse():
    costs = [error(c, 100) * np.linalg.norm(c) for c in (optimal(100, b).coefficients for b in (1, 2, 4, 8, 16, 32))]
    assert costs == sorted(costs, reverse=True)


def test_with_three_bands_no_point_of_a_grid_is_better():
    best = error(optimal(12, 3).coefficients, 12) * np.linalg.norm(optimal(12, 3).coefficients)
    for a in np.linspace(0, 1, 41):
        for b in np.linspace(0, a, 21):
            assert best <= error((1.0, a, b), 12) * np.linalg.norm((1.0, a, b)) + 1e-6


def test_the_descent_knows_its_slope():
    at = np.random.default_rng(6).standard_normal(4)
    step = 1e-6 * np.eye(4)
    slope = [(_noise(at + h, 9)[0] - _noise(at - h, 9)[0]) / 2e-6 for h in step]
    assert _noise(at, 9)[1] == pytest.approx(slope, rel=1e-5)


def test_noise_has_the_covariance_that_the_matrices_say():
    factors = optimal(6, 3)
    noise = stream(factors, np.random.default_rng(5).standard_normal((6, 400_000)))
    inverse = np.linalg.inv(matrix(factors.coefficients, 6))
    assert np.cov(noise) == pytest.approx(inverse @ inverse.T, abs=0.012)


def test_a_whole_run_costs_one_gaussian():
    factors = optimal(100, 8)
    assert factors.event(2.0) == events.gaussian(2.0)
    assert accountant.upper(factors.event(2.0), 1e-5) == accountant.upper(events.gaussian(2.0), 1e-5)


@pytest.mark.parametrize("wrong", [(), (0.5,), (1.0, 1.5), (1.0, -0.1), (1.0, 0.2, 0.3), (1.0, float("nan"))])
def test_coefficients_whose_sensitivity_is_not_known_are_refused(wrong):
    with pytest.raises(GuaranteeError, match="never rise"):
        Banded(wrong)
    with pytest.raises(GuaranteeError):
        sensitivity(wrong, 4, 1, 1)


@pytest.mark.parametrize(("rounds", "bands"), [(5, 0), (5, 6)])
def test_bands_beyond_the_run_are_refused(rounds, bands):
    with pytest.raises(GuaranteeError, match="bands from 1"):
        optimal(rounds, bands)
