"""ε against two other accountants and closed forms; monotone, additive, and refused where it cannot be computed."""

from __future__ import annotations

import math
import time
import warnings

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from foedus.errors import GuaranteeError
from foedus.privacy import accountant, events

CARD = [  # rate, multiplier, steps, ε by Rényi accounting at δ = 1e-5 (card 00)
    (256 / 60000, 1.1, 14062, 2.597),
    (0.01, 1.0, 1000, 2.101),
    (0.02, 1.0, 500, 3.144),
    (0.1, 1.0, 100, 7.899),
    (0.2, 1.0, 100, 15.97),
    (0.05, 0.8, 200, 8.732),
    (1.0, 10.0, 100, 4.729),
    (1.0, 5.0, 50, 7.077),
]
PEERS = [  # multiplier, rate, steps, δ, ε by PLD (peers file, section 3)
    (0.6, 1e-4, 20000, 1e-6, 0.642),
    (1.0, 0.01, 1000, 1e-5, 1.828),
    (0.8, 0.02, 410, 1e-5, 4.292),
    (2.0, 0.1, 200, 1e-5, 3.360),
    (5.0, 0.5, 200, 1e-5, 6.701),
    (8.0, 1.0, 200, 1e-5, 8.596),
    (0.5, 1e-3, 1000, 1e-5, 3.239),
]
CLOSED = [(0.5, 7.032), (1.0, 3.731), (2.0, 1.994), (4.0, 1.081)]  # ε, multiplier of one Gaussian at δ = 1e-5 (card 00)
FEW = settings(max_examples=4, deadline=None)


def steps(rate: float, multiplier: float, times: int) -> dict:
    return events.repeat(events.poisson(rate, events.gaussian(multiplier)), times)


@pytest.mark.parametrize(("rate", "multiplier", "times", "said"), CARD)
def test_renyi_accounting_gives_the_values_of_the_card_and_losses_give_less(rate, multiplier, times, said):
    cost = accountant.epsilon(steps(rate, multiplier, times), 1e-5)
    assert cost.rdp == pytest.approx(said, abs=0.005 if said > 10 else 0.0006)
    assert cost.lower <= cost.upper < cost.rdp


@pytest.mark.parametrize(("multiplier", "rate", "times", "delta", "said"), PEERS)
def test_loss_distributions_give_the_values_of_the_peers(multiplier, rate, times, delta, said):
    found = accountant.upper(steps(rate, multiplier, times), delta)
    assert said - 0.0006 <= found <= said * 1.003


@pytest.mark.parametrize(("multiplier", "rate", "times", "delta", "said"), PEERS)
def test_a_second_accountant_agrees_within_its_own_error(multiplier, rate, times, delta, said):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants.analysis import prv

        law = prv.PoissonSubsampledGaussianPRV(rate, multiplier)
        domain = prv.compute_safe_domain_size([law], [times], eps_error=0.01, delta_error=delta / 1000)
        whole = prv.Domain.create_aligned(-domain, domain, 0.01 / math.sqrt(times / 2 * math.log(24 * 1e3 / delta)))
        composed = prv.compose_heterogeneous(
            [prv.discretize(prv.TruncatedPrivacyRandomVariable(law, whole.t_min, whole.t_max), whole)], [times]
        )
        low, _, high = composed.compute_epsilon(delta, delta / 1000, 0.01)
    assert low <= accountant.upper(steps(rate, multiplier, times), delta) <= high + 0.01


@pytest.mark.parametrize(
    ("multiplier", "rate", "times", "delta", "clt"), [(0.6, 1e-4, 20000, 1e-6, 0.209), (0.5, 1e-3, 1000, 1e-5, 0.852)]
)
def test_it_does_not_fall_into_the_trap_of_the_central_limit(multiplier, rate, times, delta, clt):
    mu = rate * math.sqrt(times * math.expm1(multiplier**-2))  # Bu et al. 2019, which states less than is spent
    assert accountant.upper(events.gaussian(1 / mu), delta) == pytest.approx(clt, abs=0.002)
    assert accountant.upper(steps(rate, multiplier, times), delta) > 3 * clt


@pytest.mark.parametrize(("epsilon", "multiplier"), CLOSED)
def test_one_gaussian_has_the_closed_form(epsilon, multiplier):
    assert multiplier - 0.0005 <= accountant.calibrate(events.gaussian, epsilon, 1e-5) <= multiplier * 1.0015
    cost = accountant.epsilon(events.gaussian(multiplier), 1e-5)
    assert cost.lower == cost.upper == pytest.approx(epsilon, abs=0.001)


@FEW
@given(st.floats(0.2, 20), st.floats(1e-9, 0.1))
def test_delta_undoes_epsilon(multiplier, delta):
    epsilon = accountant.upper(events.gaussian(multiplier), delta)
    found = accountant.delta(events.gaussian(multiplier), epsilon)
    exact = norm.cdf(0.5 / multiplier - epsilon * multiplier) - math.exp(epsilon) * norm.cdf(
        -0.5 / multiplier - epsilon * multiplier
    )
    assert found == pytest.approx(exact, rel=1e-6, abs=1e-15)
    assert found <= delta * (1 + 1e-9) if epsilon else True


def test_many_gaussians_without_sampling_are_one():
    several = events.together(events.repeat(events.gaussian(10.0), 75), events.gaussian(2.0))
    assert accountant.upper(several, 1e-5) == accountant.upper(events.gaussian(1.0), 1e-5)


def test_a_rate_of_one_is_no_sampling_and_a_rate_of_zero_costs_nothing():
    assert accountant.epsilon(steps(1.0, 5.0, 50), 1e-5) == accountant.epsilon(
        events.repeat(events.gaussian(5.0), 50), 1e-5
    )
    assert accountant.epsilon(steps(0.0, 5.0, 50), 1e-5) == accountant.Epsilon(0.0, 0.0, 0.0)


def test_several_gaussians_on_one_sample_are_one_sampled_gaussian():
    joined = events.poisson(0.1, events.together(events.gaussian(2.0), events.gaussian(3.0)))
    one = events.poisson(0.1, events.gaussian(events.joint(2.0, 3.0)))
    assert accountant.upper(joined, 1e-5) == pytest.approx(accountant.upper(one, 1e-5), rel=1e-9)


@FEW
@given(st.floats(0.002, 0.3), st.floats(0.6, 3.0), st.integers(2, 100), st.floats(1.05, 2.0))
def test_it_costs_more_to_sample_more_to_step_more_and_to_add_less_noise(rate, multiplier, times, more):
    here = accountant.upper(steps(rate, multiplier, times), 1e-5)
    slack = 2e-3 * here + 1e-9
    assert accountant.upper(steps(min(1.0, rate * more), multiplier, times), 1e-5) >= here - slack
    assert accountant.upper(steps(rate, multiplier, math.ceil(times * more)), 1e-5) >= here - slack
    assert accountant.upper(steps(rate, multiplier / more, times), 1e-5) >= here - slack
    assert accountant.upper(steps(rate, multiplier, times), 1e-7) >= here - slack


@FEW
@given(st.floats(0.01, 0.3), st.floats(0.7, 3.0), st.integers(2, 200), st.floats(0.1, 0.9))
def test_a_run_that_is_split_costs_what_the_whole_costs(rate, multiplier, times, cut):
    first = max(1, min(times - 1, int(cut * times)))
    split = events.together(steps(rate, multiplier, first), steps(rate, multiplier, times - first))
    assert accountant.upper(split, 1e-5) == accountant.upper(steps(rate, multiplier, times), 1e-5)


@FEW
@given(st.floats(0.01, 0.3), st.floats(0.7, 3.0), st.integers(1, 200))
def test_the_lower_end_is_below_the_upper_and_the_upper_below_renyi(rate, multiplier, times):
    cost = accountant.epsilon(steps(rate, multiplier, times), 1e-5)
    assert 0 <= cost.lower <= cost.upper <= cost.rdp


def test_a_schedule_costs_between_its_least_and_its_most_noise():
    schedule = events.together(
        *(events.repeat(events.poisson(0.05, events.gaussian(z)), 20) for z in np.linspace(0.8, 1.6, 10))
    )
    found = accountant.upper(schedule, 1e-5)
    assert accountant.upper(steps(0.05, 1.6, 200), 1e-5) < found < accountant.upper(steps(0.05, 0.8, 200), 1e-5)


def test_a_mixture_of_one_length_is_a_sampled_gaussian():
    one = events.repeat(events.mixture(2.0, [0.0, 2.0], [0.9, 0.1]), 50)
    assert accountant.epsilon(one, 1e-5) == accountant.epsilon(steps(0.1, 1.0, 50), 1e-5)


def test_a_mixture_costs_less_than_its_longest_length_always_would():
    some = events.repeat(events.mixture(2.0, [0.0, 1.0, 2.0], [0.81, 0.18, 0.01]), 20)
    most = events.repeat(events.mixture(2.0, [0.0, 2.0], [0.81, 0.19]), 20)
    least = events.repeat(events.mixture(2.0, [0.0, 1.0], [0.81, 0.19]), 20)
    costs = [accountant.upper(event, 1e-5) for event in (least, some, most)]
    assert costs[0] < costs[1] < costs[2]


@pytest.mark.parametrize(("rate", "multiplier"), [(0.064, 0.9), (0.001, 0.5), (0.5, 4.0)])
def test_renyi_divergences_are_those_of_dp_accounting_and_convex_between_its_whole_orders(rate, multiplier):
    orders = accountant._ORDERS
    whole = orders[orders == np.floor(orders)]
    theirs = RdpAccountant(whole)
    theirs.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(multiplier)))
    ours = accountant._divergences(accountant._bill(events.poisson(rate, events.gaussian(multiplier))))
    assert ours[orders == np.floor(orders)] == pytest.approx(theirs.rdp, rel=1e-6)
    # (order - 1) times the divergence is convex: dp-accounting's fractional orders are not between these, ours are
    assert (ours * (orders - 1) <= np.interp(orders, [1, *whole], [0, *theirs.rdp * (whole - 1)]) * (1 + 1e-9)).all()
    assert (np.diff(ours) >= -1e-9 * ours[1:]).all()


# Noise that is known by its Rényi divergences alone, on samples; and noise whose tail was cut.


def curve(rate: float, rho: float, times: int = 1, kind=events.symmetric) -> dict:
    return events.repeat(events.poisson(rate, kind(rho)), times)


@pytest.mark.parametrize(("multiplier", "rate", "times", "delta", "said"), PEERS)
def test_sampled_concentrated_noise_costs_at_least_what_the_gaussian_of_its_rho_does(
    multiplier, rate, times, delta, said
):
    gauss = accountant.upper(steps(rate, multiplier, times), delta)
    ours = accountant.upper(curve(rate, 0.5 / multiplier**2, times), delta)
    whatever = accountant.upper(curve(rate, 0.5 / multiplier**2, times, events.zcdp), delta)
    assert gauss * (1 - 1e-6) <= ours <= whatever
    assert ours >= accountant.renyi(steps(rate, multiplier, times), delta) * (1 - 1e-6)


def test_symmetric_noise_on_a_sample_costs_what_renyi_accounting_says_of_the_gaussian():
    assert accountant.upper(curve(0.064, 0.5, 320), 1e-5) == pytest.approx(8.716, abs=1e-3)
    assert accountant.renyi(steps(0.064, 1.0, 320), 1e-5) == pytest.approx(8.659, abs=1e-3)
    assert accountant.upper(curve(0.064, 0.5, 320, events.zcdp), 1e-5) == pytest.approx(10.352, abs=1e-3)


@pytest.mark.parametrize("kind", [events.zcdp, events.symmetric])
def test_a_sample_of_all_costs_what_the_whole_costs_and_of_nobody_nothing(kind):
    whole = events.repeat(events.zcdp(0.02), 30)
    assert accountant.epsilon(curve(1.0, 0.02, 30, kind), 1e-5) == accountant.epsilon(whole, 1e-5)
    assert accountant.upper(curve(0.0, 0.02, 30, kind), 1e-5) == 0
    assert accountant.upper(curve(1 - 1e-9, 0.02, 30, kind), 1e-5) == pytest.approx(
        accountant.upper(whole, 1e-5), rel=0.01
    )


@FEW
@given(st.floats(0.002, 0.5), st.floats(0.01, 1.0), st.integers(1, 200), st.booleans(), st.floats(1.05, 2.0))
def test_sampled_concentrated_noise_costs_more_with_more_of_anything(rate, rho, times, mirrored, more):
    kind = events.symmetric if mirrored else events.zcdp
    here = accountant.upper(curve(rate, rho, times, kind), 1e-5) * (1 - 1e-9)
    assert accountant.upper(curve(min(1.0, rate * more), rho, times, kind), 1e-5) >= here
    assert accountant.upper(curve(rate, rho * more, times, kind), 1e-5) >= here
    assert accountant.upper(curve(rate, rho, math.ceil(times * more), kind), 1e-5) >= here
    assert here <= accountant.upper(events.repeat(events.zcdp(rho), times), 1e-5)


@pytest.mark.parametrize("std", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("rate", [0.01, 0.2, 0.7])
def test_discrete_gaussians_on_a_sample_cost_no_more_than_their_rho_says(std, rate):
    x = np.arange(-200, 201)
    absent, present = -(x**2) / (2 * std**2), -((x - 1) ** 2) / (2 * std**2)
    absent, present = absent - np.logaddexp.reduce(absent), present - np.logaddexp.reduce(present)
    mixed = np.logaddexp(absent + math.log1p(-rate), present + math.log(rate))
    stated = accountant._by_curve(rate, 0.5 / std**2, True)
    for order, most in zip(accountant._ORDERS, stated, strict=True):
        if order <= 32:
            for p, q in ((mixed, absent), (absent, mixed)):
                assert np.logaddexp.reduce(order * p + (1 - order) * q) / (order - 1) <= most * (1 + 1e-9)


def test_without_a_unit_is_never_further_from_the_sample_than_the_sample_from_it():
    """Mironov, Talwar and Zhang 2019, theorem 5, at every pair of points that a mirror swaps; r = p'(x) / p(x)."""
    q, r, order = np.meshgrid(np.linspace(0, 1, 41), np.exp(np.linspace(-9, 9, 73)), [1.0, 1.1, 2.0, 7.5, 60.0])
    here, there = 1 - q + q * r, 1 - q + q / r
    gain = here**order + r * there**order
    loss = here ** (1 - order) + r * there ** (1 - order)
    assert (gain >= loss * (1 - 1e-12)).all()


def test_a_group_on_a_sample_is_there_when_one_of_it_is():
    one, two = curve(0.01, 0.1, 50), accountant.group(curve(0.01, 0.1, 50), 2, 1e-5)
    assert accountant.group(one, 1, 1e-5) >= accountant.upper(one, 1e-5)
    assert two == pytest.approx(accountant.upper(curve(1 - 0.99**2, 0.4, 50, events.zcdp), 1e-5), rel=1e-9)


def test_the_chance_of_a_cut_tail_is_paid_for_in_delta():
    noise = events.repeat(events.zcdp(0.005), 20)
    cut = events.together(noise, events.cut(1e-7))
    free, paid = (accountant.upper(event, 1e-5) for event in (noise, cut))
    assert free < paid < 1.1 * free
    assert accountant.delta(noise, paid) + (1 + math.exp(paid)) * 1e-7 <= 1e-5
    assert accountant.delta(cut, 1.0) == pytest.approx(accountant.delta(noise, 1.0) + (1 + math.e) * 1e-7)
    assert accountant.epsilon(cut, 1e-5).rdp == paid
    many = events.together(noise, events.repeat(events.cut(1e-9), 100))
    assert accountant.upper(many, 1e-5) == pytest.approx(paid, rel=1e-9)
    little = events.together(noise, events.cut(1e-8))
    assert accountant.group(little, 2, 1e-5) > accountant.group(noise, 2, 1e-5)


def test_a_cut_that_takes_all_of_delta_is_refused():
    for chance, rho in ((1e-5, 0.01), (1e-9, 20.0), (2.0**-100, 1e4)):
        with pytest.raises(GuaranteeError, match="a finite epsilon"):
            accountant.upper(events.together(events.zcdp(rho), events.cut(chance)), 1e-5)


def test_noise_that_will_be_cut_can_be_calibrated():
    def event(z: float) -> dict:
        return events.together(events.repeat(events.zcdp(0.5 / z**2), 10), events.cut(2.0**-100))

    z = accountant.calibrate(event, 2.0, 1e-5)
    assert 1.99 < accountant.upper(event(z), 1e-5) <= 2.0


# Groups.


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_group_without_sampling_divides_the_noise(size):
    event = events.repeat(events.gaussian(10.0), 20)
    assert accountant.group(event, size, 1e-5) == pytest.approx(
        accountant.upper(events.repeat(events.gaussian(10.0 / size), 20), 1e-5)
    )


def test_a_group_of_one_is_a_unit():
    assert accountant.group(steps(0.05, 1.0, 100), 1, 1e-5) == accountant.upper(steps(0.05, 1.0, 100), 1e-5)


def test_a_sampled_group_costs_more_than_the_naive_product_says_at_the_same_delta_or_is_told_truly():
    one = accountant.upper(steps(0.01, 1.0, 100), 1e-5)
    two = accountant.group(steps(0.01, 1.0, 100), 2, 1e-5)
    assert two > 2 * one  # k · ε at the same δ would have stated less than is spent
    assert two < accountant.upper(steps(1 - 0.99**2, 0.5, 100), 1e-5)  # both always together


def test_a_group_is_covered_by_the_unit_guarantee_stretched_in_delta_too():
    event = steps(0.02, 1.2, 50)
    epsilon = accountant.group(event, 2, 1e-4)
    per_unit = epsilon / 2
    stretched = accountant.delta(event, per_unit) * (1 + math.exp(per_unit))
    assert stretched >= 1e-4 * 0.99  # the group's own distribution is no worse than the general lemma


def test_zcdp_of_a_group_grows_with_its_square():
    assert accountant.group(events.zcdp(0.1), 3, 1e-5) == pytest.approx(accountant.upper(events.zcdp(0.9), 1e-5))


def test_a_group_of_nobody_is_refused():
    with pytest.raises(GuaranteeError, match="at least one unit"):
        accountant.group(events.gaussian(1.0), 0, 1e-5)


# Attacks.


@pytest.mark.parametrize("multiplier", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("fpr", [0.001, 0.01, 0.2])
def test_what_attacks_can_reach_is_exact_for_one_gaussian(multiplier, fpr):
    event = events.gaussian(multiplier)
    assert accountant.advantage(event) == pytest.approx(2 * norm.cdf(0.5 / multiplier) - 1, rel=1e-9)
    best = norm.cdf(norm.ppf(fpr) + 1 / multiplier)
    assert best * (1 - 1e-9) <= accountant.tpr_at(event, fpr) <= best * 1.001 + 1e-6


def test_the_best_attack_on_sampled_noise_stays_below_the_bound_and_reaches_near():
    rate, z = 0.3, 0.7
    event = events.poisson(rate, events.gaussian(z))
    x = np.random.default_rng(0).standard_normal(200_000) * z
    threshold = np.quantile(x, 0.99)
    reached = (1 - rate) * norm.sf(threshold / z) + rate * norm.sf((threshold - 1) / z)
    bound = accountant.tpr_at(event, 0.01)
    assert reached <= bound * 1.05 and bound < 1.3 * reached


def test_without_a_guarantee_every_attack_may_succeed_and_with_nothing_released_none_gains():
    lost, nothing = events.none("nothing is clipped"), events.together()
    assert (
        accountant.advantage(lost)
        == accountant.tpr_at(lost, 0.01)
        == accountant.reconstruction_bound(lost, 0.001)
        == 1.0
    )
    assert accountant.advantage(nothing) == 0.0 and accountant.tpr_at(nothing, 0.01) == pytest.approx(0.01)


def test_a_reconstruction_bound_lies_between_the_prior_and_that_of_epsilon_delta():
    event, prior = steps(0.02, 1.0, 200), 1e-3
    epsilon = accountant.upper(event, 1e-5)
    assert prior < accountant.reconstruction_bound(event, prior) <= math.exp(epsilon) * prior + 1e-5


def test_discrete_noise_has_bounds_too():
    event = events.repeat(events.zcdp(0.005), 20)
    cost = accountant.epsilon(event, 1e-5)
    assert cost.lower == 0.0 and cost.upper == cost.rdp == pytest.approx(
        accountant.epsilon(events.repeat(events.gaussian(10.0), 20), 1e-5).rdp
    )
    assert 0.01 < accountant.tpr_at(event, 0.01) < 1


# Calibration.


@pytest.mark.parametrize(
    ("rate", "times", "epsilon"), [(0.064, 320, 8.0), (0.064, 320, 1.0), (0.01, 1000, 2.0), (0.01, 200, 0.5)]
)
def test_calibrated_noise_is_enough_and_hardly_more(rate, times, epsilon):
    multiplier = accountant.calibrate(lambda z: steps(rate, z, times), epsilon, 1e-5)
    assert accountant.upper(steps(rate, multiplier, times), 1e-5) <= epsilon
    assert accountant.upper(steps(rate, multiplier * 0.995, times), 1e-5) > epsilon


def test_calibrating_takes_less_than_two_seconds():
    began = time.process_time()
    accountant.calibrate(lambda z: steps(0.0641, z, 320), 7.9, 1e-5)
    assert time.process_time() - began < 2


def test_a_schedule_can_be_calibrated():
    def schedule(z: float) -> dict:
        return events.together(*(steps(0.05, z * factor, 10) for factor in (2, 1.5, 1)))

    multiplier = accountant.calibrate(schedule, 3.0, 1e-5)
    assert 2.95 < accountant.upper(schedule(multiplier), 1e-5) <= 3.0


@pytest.mark.parametrize(
    "event_of", [lambda z: events.none(), lambda z: events.together(events.gaussian(1.0), events.gaussian(z))]
)
def test_an_epsilon_that_no_noise_reaches_is_refused(event_of):
    with pytest.raises(GuaranteeError, match="some amount of noise"):
        accountant.calibrate(event_of, 1.0, 1e-5)


@pytest.mark.parametrize(
    ("epsilon", "delta"), [(0.0, 1e-5), (-1.0, 1e-5), (math.inf, 1e-5), (math.nan, 1e-5), (1.0, 0.0), (1.0, 1.0)]
)
def test_an_epsilon_or_delta_that_means_nothing_is_refused(epsilon, delta):
    with pytest.raises(GuaranteeError):
        accountant.calibrate(events.gaussian, epsilon, delta)


# Edges.


def test_no_guarantee_costs_infinity_whatever_it_is_composed_with():
    for event in (
        events.none(),
        events.together(events.gaussian(1.0), events.none("x")),
        events.poisson(0.5, events.none()),
    ):
        assert accountant.epsilon(event, 1e-5) == accountant.Epsilon(math.inf, math.inf, math.inf)
        assert accountant.delta(event, 10.0) == 1.0


def test_nothing_released_costs_nothing():
    assert accountant.epsilon(events.together(), 1e-5) == accountant.Epsilon(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("rate", "multiplier", "times"), [(0.5, 0.02, 1000), (0.5, 0.3, 10**6), (1e-5, 0.4, 10**5), (0.01, 100.0, 10)]
)
def test_extreme_settings_end_soon_in_a_number_that_holds_or_in_a_refusal(rate, multiplier, times):
    began = time.process_time()
    try:
        found = accountant.upper(steps(rate, multiplier, times), 1e-5)
    except GuaranteeError:
        found = math.inf
    assert 0 <= found <= accountant.epsilon(events.repeat(events.gaussian(multiplier), times), 1e-5).rdp
    assert time.process_time() - began < 10


def test_a_delta_too_small_for_loss_distributions_is_told_by_renyi():
    cost = accountant.epsilon(steps(0.01, 1.0, 100), 1e-18)
    assert cost.upper == cost.rdp < 100


def test_what_sampling_cannot_amplify_is_refused():
    with pytest.raises(GuaranteeError, match="a Poisson sample of Gaussians"):
        accountant.epsilon(events.poisson(0.1, events.together(events.zcdp(0.1), events.gaussian(1.0))), 1e-5)
