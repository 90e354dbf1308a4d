"""What surveys cost, and what the plan lets them be: their noise is one Gaussian, paid in the round that takes it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from foedus.errors import GuaranteeError
from foedus.privacy import accountant, events
from foedus.privacy.curve import _changes
from foedus.privacy.noise import SimulatedSource
from foedus.privacy.plan import Terms, facts, make_plan, round_events
from foedus.privacy.statement import statement
from foedus.privacy.survey import Survey

SOURCE = SimulatedSource(3)
PARTS = (("count", 0.1), ("entropy", 0.3), ("mean", 0.6))
BARE = Terms("example", 1e-5, 10, noise_multiplier=1.0, steps=8, rate=0.05, divisor=20)
ASKED = replace(BARE, surveys=(0, 4, 9), survey_parts=PARTS, survey_rate=0.25, survey_ratio=3.0)


def surveys_of(terms: Terms, z: float) -> events.Event:
    """What the surveys of a plan cost, without its steps."""
    rounds = round_events(terms, z)
    return events.together(*(rounds[round]["of"][1] for round in terms.surveys))


# ---- what they cost ----


def test_a_round_with_a_survey_costs_its_steps_and_the_survey_and_every_other_its_steps():
    plan, plain = make_plan(ASKED, SOURCE), make_plan(BARE, SOURCE)
    taken = events.poisson(0.25, events.gaussian(3.0))
    for round, (event, steps) in enumerate(zip(plan.events, plain.events, strict=True)):
        assert event == (events.together(steps, taken) if round in ASKED.surveys else steps)
    assert events.check(json.loads(json.dumps(plan.event()))) == plan.event()


def test_all_parts_of_a_survey_are_one_gaussian_of_its_multiplier():
    survey = make_plan(ASKED, SOURCE).survey()
    stds = [survey.std(part, 4) for part, _ in PARTS]
    assert events.joint(*stds) == pytest.approx(3.0)  # 1/z² = Σ 1/z_j²
    apart = events.together(*map(events.gaussian, stds))
    assert accountant.upper(apart, 1e-5) == pytest.approx(accountant.upper(events.gaussian(3.0), 1e-5), rel=1e-9)
    on_a_sample = [accountant.renyi(events.poisson(0.25, of), 1e-5) for of in (apart, events.gaussian(3.0))]
    assert on_a_sample[0] == pytest.approx(on_a_sample[1], rel=1e-9)


@pytest.mark.parametrize("rate, z, rounds, rdp", [
    (0.1, 1.0, 100, 7.899), (0.02, 1.0, 500, 3.144), (0.05, 0.8, 200, 8.732), (1.0, 10.0, 100, 4.729),
    (1.0, 5.0, 50, 7.077),
])  # fmt: skip
def test_surveys_cost_what_the_card_says_of_gaussians_on_samples(rate, z, rounds, rdp):
    """Card 00, regression values at δ = 1e-5, by Rényi accounting; a loss distribution may say less, never more."""
    every = replace(ASKED, rounds=rounds, surveys=tuple(range(rounds)), survey_rate=rate, survey_ratio=z)
    said = accountant.upper(surveys_of(every, 1.0), 1e-5)
    assert 0.85 * rdp < said <= rdp + 5e-3


def test_with_surveys_the_epsilon_that_was_asked_is_kept_and_each_of_them_costs_something():
    asked = replace(ASKED, noise_multiplier=None, epsilon=4.0, survey_ratio=1.0, steps=2)
    plan = make_plan(asked, SOURCE)
    assert 3.9 < plan.epsilon <= 4.0
    spent = [accountant.upper(events.together(*round_events(replace(asked, surveys=some), plan.multiplier)), 1e-5)
             for some in ((0,), (0, 4), (0, 4, 9))]  # fmt: skip
    bare = replace(BARE, steps=2)
    none = make_plan(replace(bare, noise_multiplier=plan.multiplier), SOURCE).epsilon
    assert none < spent[0] < spent[1] < spent[2] == pytest.approx(plan.epsilon, rel=1e-6)
    assert plan.multiplier > make_plan(replace(bare, noise_multiplier=None, epsilon=4.0), SOURCE).multiplier


def test_fewer_units_and_more_noise_make_surveys_cheaper():
    changes = {"survey_rate": 1.0}, {}, {"survey_rate": 0.1}, {"survey_rate": 0.1, "survey_ratio": 9.0}
    costs = [accountant.upper(surveys_of(replace(ASKED, **change), 1.0), 1e-5) for change in changes]
    assert costs == sorted(costs, reverse=True) and costs[-1] < 0.1 * costs[0]


def test_a_run_that_stops_before_a_survey_has_not_paid_for_it():
    plan = make_plan(ASKED, SOURCE)
    plain = make_plan(BARE, SOURCE)
    assert accountant.upper(plan.event(9), 1e-5) < accountant.upper(plan.event(10), 1e-5) == plan.epsilon
    early = replace(ASKED, surveys=(9,))
    assert make_plan(early, SOURCE).event(9) == plain.event(9)


@pytest.mark.parametrize("rate", [0.25, 1.0])
def test_authors_whose_examples_are_surveyed_pay_as_groups(rate):
    four = replace(ASKED, unit="author", group=4, survey_rate=rate)
    one = replace(ASKED, unit="example", survey_rate=rate)
    by_accountant = accountant.group(surveys_of(one, 1.0), 4, 1e-5)
    assert accountant.upper(surveys_of(four, 1.0), 1e-5) == pytest.approx(by_accountant, rel=0.01)
    assert by_accountant > accountant.upper(surveys_of(one, 1.0), 1e-5)


def test_groups_of_units_count_surveys():
    event = make_plan(replace(ASKED, rounds=1, surveys=(0,), steps=1), SOURCE).event()
    assert accountant.group(event, 1, 1e-5) == pytest.approx(accountant.upper(event, 1e-5), rel=1e-3)
    assert accountant.group(event, 2, 1e-5) > 1.5 * accountant.upper(event, 1e-5)


def test_other_ways_to_the_same_epsilon_take_the_surveys_that_they_have_rounds_for():
    halved = {surveys: next(t for change, t in _changes(replace(ASKED, surveys=surveys)) if change == "half the rounds")
              for surveys in ((0, 4, 9), (9,))}  # fmt: skip
    assert halved[0, 4, 9].surveys == (0, 4) and halved[0, 4, 9].survey_parts == PARTS
    assert halved[9,] == replace(BARE, rounds=5, survey_rate=0.25, survey_ratio=3.0)


def test_without_a_clip_of_the_steps_a_survey_earns_no_guarantee_either():
    plan = make_plan(replace(ASKED, noise_multiplier=None, noise_std=0.5, max_norm=None), SOURCE)
    assert plan.epsilon == math.inf and plan.survey().multipliers == (1.5,) * 3


# ---- what the plan makes ----


def test_the_surveys_of_a_run_are_those_that_the_plan_paid_for():
    survey = make_plan(replace(ASKED, ratio=2.0, rows=3), SOURCE).survey()
    schedule = make_plan(replace(BARE, ratio=2.0), SOURCE).multipliers
    assert survey.rounds == (0, 4, 9) and survey.rate == 0.25 and survey.rows == 3 and survey.source is SOURCE
    assert survey.multipliers == pytest.approx([3 * schedule[0], 3 * schedule[4], 3 * schedule[9]])
    assert dict(survey.shares) == dict(PARTS)
    assert make_plan(BARE, SOURCE).survey() is None


@pytest.mark.parametrize("part, share", PARTS)
def test_each_part_has_noise_of_the_planned_standard_deviation(part, share):
    """Card 01, property test 5: within 2 %."""
    survey = make_plan(ASKED, SOURCE).survey()
    zeros = {name: np.zeros(40_000) for name, _ in PARTS}
    noise = survey.released(zeros, 9, SOURCE.generator("trial", part))[part]
    assert np.std(noise) == pytest.approx(3.0 / math.sqrt(share), rel=0.02) == pytest.approx(survey.std(part, 9))
    assert noise.dtype == np.float64 and abs(noise.mean()) < 5 * np.std(noise) / 200


def test_parts_of_one_survey_share_no_noise():
    survey = make_plan(ASKED, SOURCE).survey()
    released = survey.released({name: np.zeros(10_000) for name, _ in PARTS}, 0, SOURCE.generator("trial"))
    assert np.abs(np.corrcoef([*released.values()]) - np.eye(3)).max() < 0.05


def test_units_enter_a_survey_by_independent_coins_of_the_stated_rate():
    survey = make_plan(ASKED, SOURCE).survey()
    sizes = [len(survey.sample(400, SOURCE.generator("coins", i))) for i in range(500)]
    assert np.mean(sizes) == pytest.approx(100, abs=5 * math.sqrt(75 / 500))
    assert np.var(sizes) == pytest.approx(75, rel=0.3)


@pytest.mark.parametrize("wrong, why", [
    ({"surveys": (0, 10)}, "rounds 0 to 9"), ({"surveys": (4, 0)}, "ascending"), ({"surveys": (0, 0)}, "ascending"),
    ({"surveys": ()}, "rounds 0 to 9"), ({"survey_parts": ()}, "'count' among them"),
    ({"survey_parts": (("mean", 1.0),)}, "'count' among them"),
    ({"survey_parts": (("count", 0.5), ("count", 0.5))}, "'count' among them"),
    ({"survey_parts": (("count", 0.1), ("mean", 0.8))}, "add up to 1"),
    ({"survey_parts": (("count", -0.5), ("mean", 1.5))}, "> 0"),
    ({"survey_rate": 0.0}, "survey_rate"), ({"survey_rate": 1.5}, "survey_rate"), ({"bands": 4}, "bands"),
    ({"survey_ratio": 0.0}, "survey_ratio"), ({"survey_ratio": math.inf}, "survey_ratio"),
    ({"unit": "silo", "rate": 1.0}, "one more part of its update"),
    ({"placement": "shared", "word": 32, "discrete": True, "steps": 1, "lr": 0.1, "minimum": 3, "parties": 3},
     "shares of noise"),
])  # fmt: skip
def test_surveys_that_cannot_be_kept_or_paid_for_are_refused(wrong, why):
    with pytest.raises(GuaranteeError, match=why):
        replace(ASKED, **wrong)


@pytest.mark.parametrize("wrong", [
    {"rounds": ()}, {"multipliers": (1.0,)}, {"multipliers": (1.0, 0.0)}, {"shares": {"mean": 1.0}},
    {"shares": {"count": 0.5, "mean": 0.4}}, {"shares": {"count": 1.5, "mean": -0.5}}, {"rate": 0.0}, {"rows": 0},
])  # fmt: skip
def test_a_survey_of_wrong_numbers_cannot_be_made(wrong):
    right = Survey((0, 2), (1.0, 1.0), {"count": 0.5, "mean": 0.5}, 0.5, 1, SOURCE)
    with pytest.raises(ValueError, match="Expected"):
        replace(right, **wrong)


def test_a_survey_that_was_not_paid_for_is_refused():
    survey = make_plan(ASKED, SOURCE).survey()
    survey.check(["entropy", "mean"], 4)
    with pytest.raises(GuaranteeError, match="round 4"):
        survey.check(["entropy", "mean"], 3)
    for others in (["mean"], ["entropy", "mean", "more"], []):
        with pytest.raises(GuaranteeError, match="divides the budget"):
            survey.check(others, 4)


# ---- what is said of them ----


def test_the_statement_says_what_surveys_release_when_and_to_whom():
    plan = make_plan(ASKED, SOURCE)
    said = json.loads(json.dumps(facts(plan)))
    assert said == facts(plan)
    (line,) = [line for line in statement(said, plan.epsilon) if line.startswith("Surveys:")]
    for words in ("3 times, in rounds 1, 5, 10", "count, entropy, mean", "each unit with probability 0.25",
                  "3 times the multiplier", "for whoever sees that", "to all silos", "epsilon covers"):  # fmt: skip
        assert words in line


def test_a_statement_without_surveys_does_not_speak_of_them():
    plan = make_plan(BARE, SOURCE)
    old = facts(plan)
    old["terms"] = {name: x for name, x in old["terms"].items() if "survey" not in name}  # as older runs recorded it
    for record in (facts(plan), old):
        assert not any("Surveys" in line for line in statement(record, plan.epsilon))


def test_the_statement_says_when_single_examples_of_authors_are_surveyed():
    plan = make_plan(replace(ASKED, unit="author", group=2, surveys=(3,), survey_ratio=1.0, rounds=4), SOURCE)
    (line,) = [line for line in statement(facts(plan), 8.0) if line.startswith("Surveys:")]
    assert "once, in round 4," in line and "each example with probability" in line and "of the multiplier of" in line
