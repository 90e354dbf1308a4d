"""Lower bounds hold as often as they say, reach what peers reach with ideal canaries, and read scores only."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest, norm

from foedus.audit import bounds
from foedus.audit.bounds import METHODS, Guess, Scores, ceiling, curve, ideal, lower_bounds, p_value

DELTA = 1e-5
# ../shared/peers/differential-privacy.md, section 5, "Audit power ceiling", columns 1000 canaries
PEERS = {
    2: {"one-run": 0.48, "f-DP one-run": 0.62, "Clopper-Pearson": 0.30, "Gaussian fit": 0.91},
    4: {"one-run": 1.20, "f-DP one-run": 1.60, "Clopper-Pearson": 1.00, "Gaussian fit": 2.88},
    8: {"one-run": 2.15, "f-DP one-run": 3.07, "Clopper-Pearson": 1.99, "Gaussian fit": 6.78},
}


def randomized_response(epsilon: float, canaries: int, generator: np.random.Generator) -> Scores:
    """The most that (ε, 0)-DP lets through: each coin shown truly with probability e^ε / (1 + e^ε)."""
    inside = bounds.coins(canaries, generator)
    truth = generator.random(canaries) < 1 / (1 + math.exp(-epsilon))
    shown = np.where(truth, inside, ~inside) + 1e-6 * generator.random(canaries)
    return Scores(shown[inside], shown[~inside])


@pytest.mark.parametrize("epsilon", PEERS)
@pytest.mark.parametrize("name", METHODS)
def test_ideal_canaries_reach_what_peers_reach_and_never_the_truth(name, epsilon):
    reached = ceiling(METHODS[name], epsilon, DELTA, 1000, trials=20)
    assert 0.9 * PEERS[epsilon][name] <= reached < epsilon  # the peers' figures are means of 3 draws: ± 10 %


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("epsilon", [0.5, 3.0])
def test_a_bound_exceeds_the_truth_in_at_most_one_audit_of_twenty(name, epsilon):
    generator = np.random.default_rng(7)
    wrong = sum(METHODS[name](ideal(epsilon, DELTA, 300, generator), DELTA, 0.95).epsilon > epsilon for _ in range(300))
    assert binomtest(wrong, 300, 0.05, "greater").pvalue > 1e-3


@pytest.mark.parametrize("name", ["one-run", "Clopper-Pearson"])
def test_bounds_for_any_mechanism_hold_for_the_worst_one(name):
    generator = np.random.default_rng(8)
    said = [METHODS[name](randomized_response(1.0, 400, generator), 0.0, 0.95).epsilon for _ in range(300)]
    assert binomtest(sum(x > 1.0 for x in said), 300, 0.05, "greater").pvalue > 1e-3
    assert np.mean(said) > 0.5


def test_scores_that_say_nothing_bound_nothing():
    generator = np.random.default_rng(1)
    same = Scores(np.zeros(500), np.zeros(400))
    noise = Scores(generator.standard_normal(500), generator.standard_normal(500))
    assert all(bound.epsilon == 0 for bound in lower_bounds(same, DELTA))
    assert all(bound.epsilon < 0.2 for bound in lower_bounds(noise, DELTA))


def test_a_perfect_attack_is_bounded_by_how_many_canaries_there_are():
    """v of v right guesses: (e^ε / (1 + e^ε))^v = level, so ε = −ln(level^(−1/v) − 1)."""
    scores = Scores(np.ones(500), np.zeros(500))
    level = 0.05 / len(bounds.guesses(scores))
    best = max(guess.correct for guess in bounds.guesses(scores))
    assert bounds.one_run(scores, 0.0).epsilon == pytest.approx(-math.log(level ** (-1 / best) - 1), abs=2e-3)
    assert bounds.one_run(Scores(np.ones(5000), np.zeros(5000)), 0.0).epsilon > bounds.one_run(scores, 0.0).epsilon


def test_the_one_run_p_value_is_the_theorem():
    guess = Guess(100, 40, 33)
    chance = math.e / (1 + math.e)
    tail = sum(binom.pmf(k, 40, chance) for k in range(33, 41))
    assert bounds.one_run_p(guess, 1.0, 0.0) == pytest.approx(tail)
    alpha = max(sum(binom.pmf(k, 40, chance) for k in range(33 - i, 33)) / i for i in range(1, 34))
    assert bounds.one_run_p(guess, 1.0, 1e-4) == pytest.approx(tail + 2 * 100 * 1e-4 * alpha)


def test_the_f_dp_recursion_is_the_papers_by_hand():
    """Two right of three guesses on ten canaries: two rounds of the loop."""
    mu, level = 0.1, 0.3

    def less(x):
        return norm.cdf(norm.ppf(x) - mu)

    r, h = level * 2 / 10, level * 1 / 10
    h1 = max(h, less(r))
    r1 = r + 1 / 2 * (h1 - h)
    h2 = max(h1, less(r1))
    assert h < h1 < h2
    assert bounds.fdp_mass(Guess(10, 3, 2), mu, level) == pytest.approx(r1 + h2)


def test_a_limit_at_a_threshold_from_the_scores_themselves_is_exact():
    """The share of a uniform variable beyond the third largest of 20: wrong exactly as often as it says."""
    generator = np.random.default_rng(0)
    tops = [np.sort(generator.random(20))[::-1] for _ in range(2000)]
    wrong = sum(1 - x[2] > bounds._limits(Scores(x, x), 0.1, 0.2)[1] for x in tops)
    assert binomtest(wrong, 2000, 0.2).pvalue > 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_bounds_look_at_ranks_only(name):
    scores = ideal(4.0, DELTA, 400, np.random.default_rng(3))
    warped = Scores(np.exp(scores.members) - 7, np.exp(scores.others) - 7)
    shuffled = Scores(scores.members[::-1], np.sort(scores.others))
    said = METHODS[name](scores, DELTA, 0.95)
    assert METHODS[name](warped, DELTA, 0.95) == said == METHODS[name](shuffled, DELTA, 0.95)


def test_ties_never_help():
    coarse = ideal(8.0, DELTA, 400, np.random.default_rng(4))
    coarse = Scores(np.round(coarse.members), np.round(coarse.others))
    shifted = Scores(coarse.members + 1e-9, coarse.others)  # the same, with every tie broken for the attacker
    for method in METHODS.values():
        assert method(coarse, DELTA, 0.95).epsilon <= method(shifted, DELTA, 0.95).epsilon


@pytest.mark.parametrize("name", METHODS)
def test_more_confidence_and_more_delta_both_lower_a_bound(name):
    scores = ideal(6.0, DELTA, 600, np.random.default_rng(5))
    steps = [METHODS[name](scores, delta, confidence).epsilon
             for delta, confidence in ((1e-6, 0.9), (1e-6, 0.99), (1e-4, 0.99))]  # fmt: skip
    assert steps[0] >= steps[1] >= steps[2] > 0


def test_only_the_gaussian_fit_is_an_estimate_and_each_says_what_it_assumes():
    said = {bound.method: bound for bound in lower_bounds(ideal(4.0, DELTA, 200, np.random.default_rng(6)), DELTA)}
    assert list(said) == list(METHODS)
    assert {name for name, bound in said.items() if bound.estimate} == {"Gaussian fit"}
    assert all(bound.assumes and bound.canaries == 200 for bound in said.values())


def test_halved_noise_is_caught_and_the_right_noise_is_not():
    """Claimed ε = 8; with half the noise μ doubles."""
    generator = np.random.default_rng(9)
    mu = bounds.gaussian_mu(8.0, DELTA)
    inside = bounds.coins(1000, generator)
    noise = generator.standard_normal(1000)
    right, wrong = (noise + shift * inside for shift in (mu, 2 * mu))
    assert p_value(bounds.gaussian_fit, Scores(wrong[inside], wrong[~inside]), 8.0, DELTA) < 1e-3
    assert p_value(bounds.gaussian_fit, Scores(right[inside], right[~inside]), 8.0, DELTA) > 1e-3


def test_gaussian_mu_and_epsilon_are_each_others_inverse_and_agree_with_the_card():
    """Card 00: analytic Gaussian at δ = 1e-5, ε = .5, 1, 2, 4."""
    for epsilon, std in ((0.5, 7.032), (1, 3.731), (2, 1.994), (4, 1.081)):
        assert 1 / bounds.gaussian_mu(epsilon, DELTA) == pytest.approx(std, abs=6e-4)
        assert bounds.gaussian_epsilon(bounds.gaussian_mu(epsilon, DELTA), DELTA) == pytest.approx(epsilon, abs=1e-5)
    assert bounds.gaussian_epsilon(0.0, DELTA) == 0 and bounds.gaussian_epsilon(math.inf, DELTA) == math.inf


# ---- curves ----


def test_the_area_is_the_share_of_pairs_in_order():
    generator = np.random.default_rng(2)
    a, b = generator.integers(0, 6, 40), generator.integers(0, 5, 30)
    pairs = (a[:, None] > b).mean() + (a[:, None] == b).mean() / 2
    said = curve(Scores(a, b))
    assert said.auc == pytest.approx(pairs) and said.auc_low < pairs < said.auc_high
    area = np.trapezoid([y for _, y in said.points], [x for x, _ in said.points])
    assert area == pytest.approx(pairs)


def test_an_interval_of_the_area_covers_it_and_is_no_point_at_one():
    generator = np.random.default_rng(3)
    truth = float(bounds.ndtr(1 / math.sqrt(2)))
    said = [curve(Scores(generator.standard_normal(60) + 1, generator.standard_normal(80))) for _ in range(300)]
    covered = sum(c.auc_low <= truth <= c.auc_high for c in said)
    assert binomtest(covered, 300, 0.95, "less").pvalue > 1e-3
    perfect = curve(Scores(np.ones(50), np.zeros(50)))
    assert perfect.auc == 1 and 0.85 < perfect.auc_low < 1 and perfect.auc_high == 1


def test_rates_at_low_false_positive_rates_say_when_they_cannot_be_seen():
    others, members = np.arange(200.0), np.array([250.0, 198.5, 150.0, 10.0])
    low, high = curve(Scores(members, others)).rates
    assert (low.tpr, low.resolved) == (0.25, False)  # 0.1 % of 200 is nobody: beyond all of them
    assert (high.tpr, high.resolved) == (0.5, True)  # two of 200 may be: beyond 197
    exact = binomtest(1, 4).proportion_ci(0.95, "exact")
    assert (low.low, low.high) == pytest.approx((exact.low, exact.high))


def test_a_curve_has_at_most_200_points_from_corner_to_corner():
    points = curve(ideal(4.0, DELTA, 3000, np.random.default_rng(1))).points
    assert len(points) <= 200 and points[0] == (0, 0) and points[-1] == (1, 1)
    assert all(a <= c and b <= d for (a, b), (c, d) in zip(points, points[1:], strict=False))


def test_halves_are_disjoint_and_complete():
    scores = Scores(np.arange(9), 100 + np.arange(8))
    left, right = scores.halves(np.random.default_rng(0))
    assert sorted([*left.members, *right.members]) == list(range(9))
    assert sorted([*left.others, *right.others]) == [100 + i for i in range(8)]


@pytest.mark.parametrize("members, others", [([], [1.0]), ([1.0], []), ([math.nan], [1.0]), ([[1.0]], [1.0])])
def test_scores_that_are_none_are_refused(members, others):
    with pytest.raises(ValueError, match="Expected"):
        Scores(np.array(members), np.array(others))


@pytest.mark.parametrize("name", METHODS)
def test_a_confidence_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match="confidence"):
        METHODS[name](Scores(np.ones(9), np.zeros(9)), DELTA, 1.0)
