"""Plans: sampler, clip, noise and event agree, and what would not hold is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from foedus.errors import GuaranteeError
from foedus.privacy import accountant
from foedus.privacy.curve import alternatives, by_group, by_round
from foedus.privacy.mechanisms import AtSilos, Bare, Correlated, DiscreteGaussian, Gaussian
from foedus.privacy.noise import SimulatedSource, SystemSource
from foedus.privacy.plan import Terms, facts, make_plan
from foedus.privacy.steps import parts_of
from foedus.server import ExpectedMean, SecretPoisson, WeightedMean
from foedus.stages import chain
from foedus.stages.clip import Clip
from foedus.stages.grid import Grid
from foedus.stages.noise import AddNoise
from foedus.types import Task, Update

SOURCE = SimulatedSource(3)
EXAMPLE = Terms("example", 1e-5, 20, epsilon=8.0, steps=16, rate=0.064, divisor=64)
SILO = Terms("silo", 1e-5, 10, noise_multiplier=2.0, silos=100, expected=100)


def test_the_noise_found_costs_what_was_asked_and_not_a_hundredth_less():
    plan = make_plan(EXAMPLE, SOURCE)
    assert 7.95 < plan.epsilon <= 8.0
    said = facts(plan, lower=True)
    assert said["epsilon_lower"] <= said["epsilon"] == plan.epsilon <= said["epsilon_rdp"]
    assert make_plan(replace(EXAMPLE, epsilon=4.0), SOURCE).multiplier > plan.multiplier


def test_what_a_plan_says_in_json_is_what_it_does():
    said = facts(make_plan(EXAMPLE, SOURCE))
    assert {"noise_multiplier", "sampling_rate", "steps", "epsilon", "delta", "unit", "neighbours"} <= said.keys()
    assert (said["steps"], said["sampling_rate"], said["unit"]) == (320, 0.064, "example")
    assert said["simulated_noise"] and not facts(make_plan(EXAMPLE, SystemSource()))["simulated_noise"]
    assert accountant.epsilon(said["event"], said["delta"]).upper == said["epsilon"]


def test_all_that_bears_on_the_guarantee_comes_from_one_plan():
    plan = make_plan(EXAMPLE, SOURCE)
    steps = plan.steps_at_silos(["w"])
    assert steps.multipliers == plan.multipliers == (plan.multiplier,) * 20
    assert (steps.rate, steps.divisor, steps.steps) == (EXAMPLE.rate, EXAMPLE.divisor, EXAMPLE.steps)
    assert steps.parts.std("w", 1.0) == EXAMPLE.max_norm
    assert isinstance(plan.mechanism(), AtSilos) and isinstance(plan.aggregator(), WeightedMean)
    assert plan.mechanism().events == plan.events and len(plan.events) == 20


def test_a_run_that_stops_early_costs_less():
    plan = make_plan(EXAMPLE, SOURCE)
    spent = [accountant.upper(plan.event(r), 1e-5) for r in (0, 1, 10, 20)]
    assert spent[0] == 0 and spent == sorted(spent) and spent[-1] == plan.epsilon


def test_rounds_composed_one_by_one_cost_what_the_whole_costs():
    plan = make_plan(replace(EXAMPLE, rounds=4), SOURCE)
    one_by_one = {"mechanism": "together", "of": list(plan.events)}
    assert accountant.epsilon(one_by_one, 1e-5).upper == pytest.approx(plan.epsilon, rel=1e-6)


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_a_declared_schedule_is_charged_round_by_round(ratio):
    plan = make_plan(replace(EXAMPLE, rounds=5, ratio=ratio), SOURCE)
    z = plan.multipliers
    assert z[-1] / z[0] == pytest.approx(ratio) and plan.epsilon <= 8.0
    assert [e["of"]["of"]["multiplier"] for e in plan.events] == pytest.approx(z)


def test_authors_drawn_by_their_examples_are_groups():
    one = make_plan(replace(EXAMPLE, unit="author", group=1), SOURCE)
    four = make_plan(replace(EXAMPLE, unit="author", group=4), SOURCE)
    assert four.multiplier > one.multiplier
    same = replace(four, multiplier=one.multiplier)
    by_accountant = accountant.group(one.event(), 4, 1e-5)
    assert same.epsilon == pytest.approx(by_accountant, rel=0.01)


def test_correlated_noise_is_paid_once_and_covers_every_participation():
    plan = make_plan(replace(EXAMPLE, bands=4), SOURCE)
    assert plan.event(1) == plan.event(20) or plan.epsilon == pytest.approx(
        accountant.epsilon(plan.event(1), 1e-5).upper
    )
    steps = plan.steps_at_silos(["w"])
    assert steps.period == 16 and steps.sensitivity > 1
    keys = np.arange(1000, dtype=np.uint64)
    seen = np.concatenate([steps.sample(keys, at, None) for at in range(steps.period)])
    assert sorted(seen) == list(range(1000))  # everybody once in every period


# ---- whole silos ----


def test_each_placement_of_the_noise_has_its_own_parts():
    def kinds(**changes):
        plan = make_plan(replace(SILO, **changes), SOURCE)
        return [type(stage) for stage in plan.stages()], type(plan.mechanism())

    assert kinds() == ([Clip], Gaussian)
    assert kinds(placement="silo") == ([Clip, AddNoise], AtSilos)
    assert kinds(placement="shared", minimum=4, discrete=True) == ([Clip, Grid, AddNoise], AtSilos)
    assert kinds(discrete=True) == ([Clip, Grid], DiscreteGaussian)
    assert kinds(bands=3) == ([Clip], Correlated)
    assert kinds(noise_multiplier=None, noise_std=0.1, max_norm=None) == ([], Bare)


def test_sampling_counts_only_where_nobody_learns_who_took_part():
    hidden = make_plan(replace(SILO, rate=0.1, expected=10), SOURCE)
    assert hidden.epsilon < make_plan(SILO, SOURCE).epsilon
    assert isinstance(hidden.sampler(), SecretPoisson) and make_plan(SILO, SOURCE).sampler() is None


def test_the_mean_is_divided_by_a_public_count():
    assert make_plan(SILO, SOURCE).aggregator() == ExpectedMean(100)


def test_secret_coins_are_not_in_the_treaty():
    silos = tuple(f"s{i}" for i in range(200))
    real = SecretPoisson(0.5, SystemSource())
    assert real.cohort(silos, 0, 1) != real.cohort(silos, 0, 1)
    drawn = [len(SecretPoisson(0.3, SimulatedSource(i)).cohort(silos, 0, 1)) for i in range(50)]
    assert np.mean(drawn) == pytest.approx(60, abs=5)


def test_few_silos_are_told_to_protect_examples_or_authors_instead():
    plan = make_plan(replace(SILO, silos=5, expected=5), SOURCE)
    with pytest.raises(GuaranteeError, match="examples or authors instead"):
        plan.check_silos(100_000, accepted=False)
    plan.check_silos(100_000, accepted=True)
    make_plan(replace(SILO, silos=10_000, expected=10_000), SOURCE).check_silos(100_000, accepted=False)


def test_shares_of_any_silos_up_to_the_minimum_add_up_to_the_whole_noise():
    plan = make_plan(replace(SILO, placement="shared", minimum=4), SOURCE)
    params = {"w": np.zeros(20_000, np.float32)}
    total = 0.0
    for silo in range(4):
        tensors = {("delta", "w"): np.full(20_000, 1e-4 * (silo + 1), np.float32)}
        task = Task(0, "m", params, (), 0)
        noised = chain(*plan.stages()).encode(Update(tensors, silo=f"s{silo}"), task)
        total = total + noised.tensors["delta", "w"] - tensors["delta", "w"]
    assert np.std(total) == pytest.approx(2.0 * 1.0, rel=0.03)


def test_noise_that_silos_add_differs_from_silo_to_silo_even_when_simulated():
    stage = make_plan(replace(SILO, placement="silo"), SOURCE).stages()[-1]
    task = Task(0, "m", {"w": np.zeros(50)}, (), 0)
    same = {("delta", "w"): np.zeros(50)}
    a, b = (stage.encode(Update(same, silo=name), task).tensors["delta", "w"] for name in "ab")
    assert not np.allclose(a, b)
    with pytest.raises(ValueError, match="whose it is"):
        stage.encode(Update(same), task)


# ---- bare noise, and what is refused ----


@pytest.mark.parametrize("unit", ["example", "silo"])
def test_bare_noise_without_a_clip_has_no_guarantee(unit):
    plan = make_plan(Terms(unit, 1e-5, 2, noise_std=0.5, max_norm=None), SOURCE)
    assert plan.epsilon == math.inf and facts(plan)["epsilon"] is None
    from foedus.privacy.statement import statement

    assert any(sentence.startswith("No guarantee") for sentence in statement(facts(plan), None))


def test_bare_noise_with_a_clip_costs_what_its_multiplier_costs():
    bare = make_plan(replace(EXAMPLE, epsilon=None, noise_std=0.5, max_norm=0.25), SOURCE)
    same = make_plan(replace(EXAMPLE, epsilon=None, noise_multiplier=2.0), SOURCE)
    assert bare.epsilon == same.epsilon
    assert bare.steps_at_silos(["w"]).parts.std("w", bare.multiplier) == pytest.approx(0.5)


@pytest.mark.parametrize("wrong", [
    {"epsilon": None}, {"noise_multiplier": 1.0}, {"delta": 0.0}, {"delta": 1.0}, {"rate": 0.0}, {"rate": 1.5},
    {"epsilon": -1.0}, {"epsilon": math.inf}, {"max_norm": None}, {"max_norm": 0.0}, {"steps": 0}, {"rounds": 0},
    {"discrete": True}, {"bands": 2, "ratio": 2.0}, {"bands": 2, "quantile": 0.5},
    {"quantile": 0.5, "clipping": "layers"},
    {"shares": (0.5, 0.5)}, {"divisor": math.nan},
])  # fmt: skip
def test_terms_that_cannot_hold_are_refused(wrong):
    with pytest.raises(GuaranteeError):
        replace(EXAMPLE, **wrong)


@pytest.mark.parametrize("placement", ["silo", "shared"])
def test_sampling_earns_nothing_against_a_coordinator_that_sees_who_took_part(placement):
    with pytest.raises(GuaranteeError, match="only a trusted coordinator keeps"):
        replace(SILO, rate=0.5, placement=placement)


def test_discrete_noise_under_sampling_is_refused_and_told_why():
    with pytest.raises(GuaranteeError, match="No tight accountant"):
        replace(SILO, discrete=True, rate=0.5)


# ---- parts ----


def test_parts_share_one_budget_and_one_norm():
    names = ["layers.0.q.lora_A.w", "layers.0.q.lora_B.w", "layers.1.q.lora_A.w", "head.w"]
    layers = parts_of(names, "layers", 2.0)
    assert len(layers.norms) == 3 and math.hypot(*layers.norms) == pytest.approx(2.0)
    factors = parts_of(names, "factors", 2.0, (0.2, 0.3, 0.5))
    assert factors.of[names[0]] == factors.of[names[2]] != factors.of[names[1]]
    multipliers = [factors.std(name, 1.0) / factors.norms[factors.of[name]] for name in (names[0], names[1], names[3])]
    assert sum(m**-2 for m in multipliers) == pytest.approx(1.0)  # together one Gaussian of multiplier 1
    with pytest.raises(ValueError, match="3 shares"):
        parts_of(names, "factors", 1.0, (0.5, 0.5))


# ---- curves ----


def test_curves_rise_with_rounds_and_groups():
    plan = make_plan(replace(EXAMPLE, rounds=6), SOURCE)
    points, groups = by_round(plan, 3), by_group(plan)
    assert [p.round for p in points] == [1, 4, 6] and points[-1].epsilon == plan.epsilon
    assert all(a.epsilon < b.epsilon and a.epsilon <= a.rdp for a, b in zip(points, points[1:], strict=False))
    assert [g.size for g in groups] == [1, 2, 4, 8]
    assert groups[1].epsilon > groups[0].epsilon


def test_alternatives_cost_the_same():
    asked, *others = alternatives(replace(EXAMPLE, rounds=5))
    assert asked.change == "as asked" and len(others) == 4
    assert {o.change: o.noise < asked.noise for o in others}["twice the examples"]
