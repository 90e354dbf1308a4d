"""Surveys at a silo: what they find, how far a unit moves it, what noise hides, and that none is taken twice."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from foedus import wire
from foedus.audit import bounds
from foedus.audit.bounds import Scores, gaussian_fit, lower_bounds, p_value
from foedus.audit.checks import only
from foedus.build import build
from foedus.errors import GuaranteeError, SiloError
from foedus.governance.custody import SiloCustody
from foedus.lm.objectives import Encoded, Ragged, Words
from foedus.privacy import accountant
from foedus.privacy.noise import SimulatedSource, SystemSource
from foedus.privacy.plan import PrivacyPlan, Terms, make_plan
from foedus.silo import survey as module
from foedus.silo.handler import Handler
from foedus.silo.shard import Silo, Units
from foedus.silo.survey import survey
from foedus.silo.train import LocalPlan
from foedus.stages import chain
from foedus.treaty import from_dict
from foedus.tree import as_part
from foedus.types import Task, Update

from ..conftest import rows as texts

SHARES = (("count", 0.2), ("a", 0.3), ("b", 0.5))
PLAIN = LocalPlan(lr=0.1, batch=4, steps=1, rows=4)


@dataclass(frozen=True)
class Rows:
    """A bench that sees row numbers and nothing else, and counts how many at once."""

    sizes: list[int]

    @property
    def objective(self):
        return self

    def ready(self, data, rows):
        pass

    def collate(self, data, rows, seed):
        self.sizes.append(len(rows))
        return {"rows": np.asarray(rows)}

    def see(self, params, batch):
        return SimpleNamespace(rows=batch["rows"])


BENCH = Rows([])


def silo_of(*units: int, lengths: int = 3, name: str = "s") -> Silo:
    """A silo whose units have so many rows each, of like length but for the first."""
    count = sum(units)
    zeros = np.zeros(count, np.int64)
    inputs = Ragged.of([[1] * (1 + row % lengths) for row in range(count)])
    data = Encoded(inputs, Ragged.of([[]] * count), zeros, zeros, zeros, zeros, ("",) * count, Words(0, -1, 9, 0, 0))
    return Silo(name, {"train": data}, units=Units(np.repeat(np.arange(len(units)), units), np.arange(len(units))))


def told(**tables) -> dict:
    """Statistics that look their numbers up by row."""
    return {part: lambda seen, x=x: torch.from_numpy(x[seen.rows]) for part, x in tables.items()}


def plan_of(z: float = 1.0, source=None, **changes) -> tuple[PrivacyPlan, LocalPlan]:
    terms = Terms("example", 1e-5, 6, noise_multiplier=z, steps=1, surveys=(0, 2, 5), survey_parts=SHARES)
    made = make_plan(replace(terms, **changes), source or SimulatedSource(7))
    return made, replace(PLAIN, privacy=made.steps_at_silos(["w"]), survey=made.survey())


def task_of(round: int = 0, seed: int = 1) -> Task:
    return Task(round, "m", {}, ("s",), seed)


@dataclass(frozen=True)
class Fresh:
    """Other noise with every call, as the system's is, and the same with every run of a test."""

    asked: list[tuple]
    simulated = True

    def generator(self, *purpose):
        self.asked.append(purpose)
        return SimulatedSource(1).generator(len(self.asked), *purpose)


def quiet(**changes) -> LocalPlan:
    """Noise too small to see."""
    return plan_of(1e-9, **changes)[1]


def flat(surveyed) -> np.ndarray:
    return np.concatenate([surveyed.sums[part] for part in sorted(surveyed.sums)])


# ---- what a survey finds ----


def test_a_unit_adds_the_mean_over_its_rows_clipped_to_one():
    x = np.array([[0.2, 0.0], [0.6, 0.0], [3.0, 4.0], [0.0, 0.5]])
    found = survey(BENCH, task_of(), silo_of(2, 1, 1), quiet(rows=9), told(a=x, b=0.1 * x))
    np.testing.assert_allclose(found.sums["a"], [0.4 + 0.6, 0.8 + 0.5], atol=1e-6)
    np.testing.assert_allclose(found.sums["b"], [0.04 + 0.3, 0.4 + 0.05], atol=1e-6)
    assert found.sums["count"] == pytest.approx([3.0], abs=1e-6) and found.units == pytest.approx(3.0)
    np.testing.assert_allclose(found.mean("a"), found.sums["a"] / 3, atol=1e-6)
    assert found.std("a") == pytest.approx(found.stds["a"] / 3) and found.stds["a"] > 0
    assert all(x.dtype == np.float64 for x in found.sums.values())


def test_without_noise_each_row_is_a_unit_and_the_sums_are_exact():
    x = np.random.default_rng(0).standard_normal((11, 3))
    found = survey(BENCH, task_of(4), replace(silo_of(*[1] * 11), units=None), PLAIN, told(a=x))
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(found.sums["a"], (x / np.maximum(norms, 1)).sum(0), rtol=1e-12)
    assert found.sums["count"] == [11.0] and found.stds == {"count": 0.0, "a": 0.0} and found.std("a") == 0.0
    noised = survey(BENCH, task_of(), silo_of(*[1] * 11), quiet(), told(a=x, b=x))
    np.testing.assert_allclose(noised.sums["a"], found.sums["a"], atol=1e-6)


def test_a_limit_takes_always_the_same_rows_of_an_exact_survey():
    x, silo = np.eye(12), silo_of(*[1] * 12)
    found = [survey(BENCH, task_of(round), silo, PLAIN, told(a=x), limit=5) for round in range(3)]
    assert found[0].sums["count"] == [5.0] and set(found[0].sums["a"]) == {0.0, 1.0}
    assert all(np.array_equal(one.sums["a"], found[0].sums["a"]) for one in found)
    other = survey(BENCH, task_of(seed=3), silo, PLAIN, told(a=x), limit=5)
    assert not np.array_equal(other.sums["a"], found[0].sums["a"])
    assert survey(BENCH, task_of(), silo, PLAIN, told(a=x), limit=99).sums["count"] == [12.0]


@pytest.mark.parametrize("most", [1, 2, 5, 100])
def test_how_many_rows_go_through_an_exact_survey_at_once_changes_nothing_and_is_kept_to(most):
    x, silo = np.random.default_rng(1).standard_normal((20, 4)), silo_of(3, 9, 1, 7)
    bench = Rows([])
    found = survey(bench, task_of(), silo, replace(PLAIN, rows=most), told(a=x, b=x))
    assert max(bench.sizes) <= most and sum(bench.sizes) == 20
    np.testing.assert_allclose(flat(found), flat(survey(BENCH, task_of(), silo, PLAIN, told(a=x, b=x))), 1e-12)


def test_beside_noise_each_row_goes_through_the_model_by_itself_so_that_no_unit_bears_on_another():
    bench, silo = Rows([]), silo_of(3, 9, 1, 7)
    crowded = {"a": lambda seen: torch.full((len(seen.rows), 1), len(seen.rows) / 9)}
    found = survey(bench, task_of(), silo, quiet(rows=9), crowded | told(b=np.ones((20, 1))))
    assert set(bench.sizes) == {1} and len(bench.sizes) == 20
    assert found.sums["a"] == pytest.approx([4 / 9], abs=1e-6)


def test_a_unit_brings_at_most_so_many_rows_and_others_each_time():
    x, silo = np.eye(10), silo_of(10)
    seen = {tuple(survey(BENCH, task_of(round), silo, quiet(rows=3), told(a=x, b=x)).mean("a").round(3))
            for round in (0, 2, 5)}  # fmt: skip
    assert all(sorted(one)[-4:] == [0, 0.333, 0.333, 0.333] for one in seen) and len(seen) > 1


# ---- edges ----


@pytest.mark.parametrize("units", [[], [1]])
def test_a_survey_of_nobody_is_noise_and_one_of_a_single_unit_is_a_unit(units):
    silo = silo_of(1, 1)
    silo = replace(silo, units=only(silo.units, units))
    x = np.array([[0.6, 0.8], [0.0, 1.0]])
    found = survey(BENCH, task_of(), silo, quiet(), told(a=x, b=x))
    np.testing.assert_allclose(found.sums["a"], [0, len(units)], atol=1e-6)
    assert found.sums["count"] == pytest.approx([len(units)], abs=1e-6) and found.units >= 1.0
    loud = survey(BENCH, task_of(), silo, plan_of()[1], told(a=x, b=x))
    assert loud.sums["a"].shape == (2,) and not np.allclose(loud.sums["a"], found.sums["a"])


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, 1e200])
def test_what_is_not_finite_adds_zero_in_its_part_and_still_counts(broken):
    x = np.array([[0.5, 0.5], [broken, 0.1], [0.25, -broken]])
    for plan in (quiet(rows=9), PLAIN):
        found = survey(BENCH, task_of(), silo_of(1, 1, 1), plan, told(a=x, b=np.full((3, 1), 0.5)))
        np.testing.assert_allclose(found.sums["a"], [0.5, 0.5], atol=1e-6)
        np.testing.assert_allclose(found.sums["b"], [1.5], atol=1e-6)
        assert found.sums["count"] == pytest.approx([3.0], abs=1e-6)


def test_infinities_of_both_signs_in_one_unit_are_zero():
    x = np.array([[math.inf], [-math.inf], [0.5]])
    found = survey(BENCH, task_of(), silo_of(2, 1), quiet(rows=2), told(a=x, b=x))
    np.testing.assert_allclose(found.sums["a"], [0.5], atol=1e-6)


@pytest.mark.parametrize("wrong", [
    lambda seen: torch.zeros(len(seen.rows)), lambda seen: torch.zeros(len(seen.rows) + 1, 2),
    lambda seen: torch.zeros(2, 2), lambda seen: torch.zeros(()), lambda seen: torch.zeros(len(seen.rows), 2, 2),
    lambda seen: torch.zeros(len(seen.rows), 2 + int(seen.rows.min())),
])  # fmt: skip
def test_a_statistic_of_the_wrong_shape_is_refused_without_a_number_of_the_data(wrong):
    silo = silo_of(*[1] * 7)
    for plan in (quiet(), PLAIN):
        with pytest.raises(GuaranteeError, match=r"one vector for each row.*Return a tensor") as said:
            survey(BENCH, task_of(), silo, plan, {"a": wrong, **told(b=np.zeros((7, 1)))})
        assert "7" not in str(said.value) and "4" not in str(said.value)


def test_parts_and_rounds_that_nobody_paid_for_are_refused_before_anything_is_seen():
    x, bench = np.zeros((3, 1)), Rows([])
    silo, plan = silo_of(1, 1, 1), plan_of()[1]
    for statistics in (told(a=x), told(a=x, b=x, c=x), told(a=x, c=x), {}):
        with pytest.raises(GuaranteeError, match="divides the budget"):
            survey(bench, task_of(), silo, plan, statistics)
    with pytest.raises(GuaranteeError, match="round 2"):
        survey(bench, task_of(1), silo, plan, told(a=x, b=x))
    with pytest.raises(GuaranteeError, match="beside the count"):
        survey(bench, task_of(), silo, plan, told(a=x, b=x, count=x))
    assert not bench.sizes


def test_an_exact_survey_beside_private_steps_is_refused():
    with pytest.raises(GuaranteeError, match="so that they are paid for"):
        survey(BENCH, task_of(), silo_of(1), replace(plan_of()[1], survey=None), told(a=np.zeros((1, 1))))


def test_a_silo_without_a_row_says_so():
    for plan in (quiet(), PLAIN):
        with pytest.raises(SiloError, match="row to train on"):
            survey(BENCH, task_of(), silo_of(), plan, told(a=np.zeros((0, 1)), b=np.zeros((0, 1))))


# ---- what a unit can move ----


def adversarial(count: int, m: int, random: np.random.Generator) -> np.ndarray:
    """Vectors all in one direction, far too long, tiny, of norm just one, with holes in them."""
    x = random.standard_normal((count, m)) * 10.0 ** random.integers(-12, 13, (count, 1))
    x[: count // 2] = np.abs(x[: count // 2, :1]) * np.ones(m)
    x[random.random(x.shape) < 0.05] = random.choice([math.nan, math.inf, -math.inf, 1e308, 0.0])
    unit = random.random(count) < 0.2
    x[unit] = np.ones(m) / math.sqrt(m)
    return x


@pytest.mark.parametrize("trial", range(8))
def test_adding_or_removing_any_unit_moves_each_part_by_at_most_one(trial, monkeypatch):
    """Card 01, property tests 2 and 5."""
    random = np.random.default_rng(trial)
    sizes = random.integers(1, 5, 9)
    tables = told(a=adversarial(sizes.sum(), 3, random), b=adversarial(sizes.sum(), 1, random))
    monkeypatch.setattr("foedus.privacy.survey.gaussian", lambda random, shape, std: np.zeros(shape))
    silo, plan, units = silo_of(*sizes), plan_of(rows=99)[1], range(9)
    whole = survey(BENCH, task_of(), silo, plan, tables)
    moves = []
    for gone in units:
        rest = replace(silo, units=only(silo.units, [u for u in units if u != gone]))
        without = survey(BENCH, task_of(), rest, plan, tables)
        moves += [np.linalg.norm(whole.sums[part] - without.sums[part]) for part in ("a", "b", "count")]
    assert max(moves) == pytest.approx(1.0) and max(moves) <= 1 + 1e-12


# ---- noise and coins ----


def test_each_part_has_noise_of_the_planned_standard_deviation():
    """Card 01, property test 5: within 2 %."""
    made, plan = plan_of(2.0, survey_ratio=3.0, ratio=2.0)
    wide = np.zeros((1, 30_000))
    found = survey(BENCH, task_of(2), silo_of(1), plan, told(a=wide, b=wide))
    z = made.multipliers[2] * 3.0
    for part, share in (("a", 0.3), ("b", 0.5)):
        assert np.std(found.sums[part]) == pytest.approx(z / math.sqrt(share), rel=0.02)
        assert found.stds[part] == pytest.approx(z / math.sqrt(share))
        assert np.std(found.mean(part)) == pytest.approx(found.std(part), rel=0.02)
    thin = told(a=wide[:, :1], b=wide[:, :1])
    counts = [survey(BENCH, task_of(2), silo_of(1, name=f"s{i}"), plan, thin).sums["count"] for i in range(800)]
    assert np.std(counts) == pytest.approx(z / math.sqrt(0.2), rel=0.1) == pytest.approx(found.stds["count"], rel=0.1)


def noise_of(plan: LocalPlan, round: int = 0, name: str = "s") -> np.ndarray:
    zeros = np.zeros((1, 2000))
    return flat(survey(BENCH, task_of(round), silo_of(1, name=name), plan, told(a=zeros, b=zeros)))


def test_no_two_rounds_and_no_two_silos_share_noise_and_none_comes_from_a_seed_but_in_simulations():
    simulated, real = plan_of()[1], plan_of(source=SystemSource())[1]
    assert np.array_equal(noise_of(simulated), noise_of(simulated))
    drawn = [noise_of(simulated), noise_of(simulated, 2), noise_of(simulated, name="t")]
    for _ in range(2):
        np.random.seed(0)
        torch.manual_seed(0)
        drawn.append(noise_of(real))
    assert np.abs(np.corrcoef(drawn) - np.eye(5)).max() < 0.15
    parts = [x[:2000] for x in drawn] + [x[2000:4000] for x in drawn]
    assert np.abs(np.corrcoef(parts) - np.eye(10)).max() < 0.15


def test_units_are_drawn_by_secret_coins_at_the_stated_rate():
    plan = quiet(source=Fresh([]), survey_rate=0.3)
    x, silo = np.eye(40), silo_of(*[1] * 40)
    drawn = np.array([survey(BENCH, task_of(), silo, plan, told(a=x, b=x)).sums["a"].round(3) for _ in range(200)])
    assert drawn.mean() == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / drawn.size))
    assert np.var(drawn.sum(1)) == pytest.approx(0.21 * 40, rel=0.4)


# ---- an attack on a survey ----

RUNS = 600


def attacked(plan: LocalPlan) -> Scores:
    """The best attack there is: surveys with and without one unit, whose vector in every part has norm 1, weighed by
    their noise."""
    x = np.full((2, 4), 0.5)
    directions = {"a": np.full(4, 0.5), "b": np.full(4, 0.5), "count": np.ones(1)}
    silo = silo_of(1, 1)
    scores = []
    for inside in (True, False):
        chosen = replace(silo, units=only(silo.units, [0, 1] if inside else [1]))
        found = [survey(BENCH, task_of(), chosen, plan, told(a=x, b=x)) for _ in range(RUNS)]
        scores.append([sum(d @ x.sums[part] / x.stds[part] ** 2 for part, d in directions.items()) for x in found])
    return Scores(*map(np.array, scores))


def paid(made: PrivacyPlan) -> float:
    """What one survey of a plan costs, its steps left out."""
    return accountant.upper(made.events[0]["of"][1], 1e-5)


def test_an_attack_on_a_survey_finds_no_more_than_its_epsilon():
    made, plan = plan_of(1.2, Fresh([]))
    scores = attacked(plan)
    assert all(bound.epsilon <= paid(made) for bound in lower_bounds(scores, 1e-5) if not bound.estimate)
    assert p_value(gaussian_fit, scores, paid(made), 1e-5) > 1e-3
    assert np.mean(scores.members) - np.mean(scores.others) == pytest.approx(1.2**-2, rel=0.25)  # it does find it


def test_an_attack_finds_out_when_the_noise_is_halved(monkeypatch):
    made, plan = plan_of(1.2, Fresh([]))
    monkeypatch.setattr(type(plan.survey), "released", lambda self, sums, round, random: {
        part: x + 0.5 * random.standard_normal(x.shape) * self.std(part, round) for part, x in sums.items()
    })  # fmt: skip
    assert p_value(gaussian_fit, attacked(plan), paid(made), 1e-5) < 1e-3


def test_an_attack_finds_out_when_the_clip_is_left_out(monkeypatch):
    made, plan = plan_of(1.2, Fresh([]))
    monkeypatch.setattr(module, "_clipped", lambda x: 2 * x)
    assert p_value(gaussian_fit, attacked(plan), paid(made), 1e-5) < 1e-3


def test_a_sampled_survey_hides_a_unit_by_what_its_rate_says():
    made, plan = plan_of(0.6, Fresh([]), survey_rate=0.2)
    assert paid(made) < 0.8 * bounds.gaussian_epsilon(1 / 0.6, 1e-5)
    assert all(bound.epsilon <= paid(made) for bound in lower_bounds(attacked(plan), 1e-5) if not bound.estimate)


# ---- crashes ----


@dataclass(frozen=True)
class Asking:
    """An algorithm that does nothing but take a survey, and remembers it."""

    plan: LocalPlan
    taken: list[str]

    def train(self, bench, task, silos, memories):
        out = []
        for silo in silos:
            self.taken.append(silo.name)
            found = as_part("survey", survey(bench, task, silo, self.plan, told(a=np.eye(3), b=np.eye(3))).sums)
            out.append((Update(found, silo=silo.name), found))
        return out


def test_a_silo_that_takes_a_round_again_after_a_crash_gives_the_survey_that_it_gave(tmp_path):
    made, plan = plan_of(source=SystemSource())
    taken: list[str] = []

    def restarted() -> Handler:
        kept = SiloCustody(tmp_path / "budgets", tmp_path / "tray", "t", "example", made.events, made.event())
        return Handler(BENCH, Asking(plan, taken), chain(*made.stages()), "m", custody=kept)

    def answer(round: int, memory) -> tuple[bytes, dict]:
        ((report, after),) = restarted().train(wire.pack_task(task_of(round)), [silo_of(1, 1, 1)], [memory])
        return report.payload, after

    first, memory = answer(0, {})
    again, same = answer(0, {})
    assert first == again and taken == ["s"]
    assert {key: x.tolist() for key, x in memory.items()} == {key: x.tolist() for key, x in same.items()}
    later, _ = answer(2, memory)
    assert later != first and taken == ["s", "s"]
    sent = wire.unpack(first)[0]
    assert np.array_equal(sent["survey", "a"], memory["survey", "a"])
    unlucky = restarted()
    (tmp_path / "tray").rename(tmp_path / "lost")
    with pytest.raises(GuaranteeError, match="released"):
        unlucky.train(wire.pack_task(task_of(2)), [silo_of(1, 1, 1)], [{}])
    assert taken == ["s", "s"]


# ---- through a model ----


@pytest.fixture(scope="module")
def place():
    treaty = from_dict({
        "treaty": {"name": "t", "seed": 5}, "model": {"base": "tiny:llama", "max_length": 8},
        "adapter": {"rank": 2, "targets": "attention"}, "algorithm": {"rounds": 3}, "local": {"steps": 3, "batch": 6},
        "data": {"source": "memory"},
        "privacy": {"unit": "example", "noise_multiplier": 1.0, "rate": 0.2, "randomness": "simulated"},
    })  # fmt: skip
    return build(treaty, {"s": texts(4), "t": texts(3)})


def test_a_model_answers_what_it_makes_of_each_unit(place):
    silo, task = place.silos["s"], Task(0, place.base.digest, place.bench.start(), ("s",), 5)
    statistics = {"a": lambda seen: seen.features(), "b": lambda seen: seen.nll()[:, None] / 10}
    units = range(len(silo.units))
    assert silo.examples > len(units) > 5
    found = survey(place.bench, task, silo, replace(quiet(rows=99), rows=5), statistics)
    alone = [survey(place.bench, task, replace(silo, units=only(silo.units, [unit])), quiet(rows=99), statistics)
             for unit in units]  # fmt: skip
    for part in ("a", "b", "count"):
        np.testing.assert_allclose(found.sums[part], sum(one.sums[part] for one in alone), rtol=1e-3, atol=1e-3)
    assert found.sums["count"] == pytest.approx([len(units)], abs=1e-6) and 0.3 < found.mean("b")[0] < 0.7


def test_alignment_takes_the_surveys_that_were_paid_for_and_each_of_them_once(place):
    from foedus.algorithms.alignment import Alignment, survey_parts, survey_rounds
    from foedus.kernels import fourier_map

    source = Fresh([])
    terms = Terms("example", 1e-5, 3, noise_multiplier=1.0, steps=1, rate=0.2, divisor=6, surveys=survey_rounds(3, 2),
                  survey_parts=survey_parts("entropy"), survey_rate=0.5)  # fmt: skip
    made = make_plan(terms, source)
    plan = replace(place.plan, steps=1, privacy=made.steps_at_silos(list(place.bench.start())), survey=made.survey())
    maps = {-1: fourier_map(32, 8, (0.5, 1.0), 0)}
    algorithm = Alignment(plan, maps, rounds=3, silos=2, every=2, phi="entropy")
    silos, memories = list(place.silos.values()), [{}, {}]
    for round in range(3):
        task = Task(round, place.base.digest, place.bench.start(), tuple(place.silos), 5)
        memories = [memory for _, memory in algorithm.train(place.bench, task, silos, memories)]
    taken = [purpose for purpose in source.asked if purpose[0] == "survey"]
    assert sorted(taken) == [("survey", name, round) for name in place.silos for round in (0, 2)]
    assert {purpose[0] for purpose in source.asked} == {"survey", "steps"}
