"""Noise in shares: it fits the words, any few shares make it whole, and what rounding and sharing cost is counted."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foedus.audit import mechanisms
from foedus.errors import GuaranteeError, SiloError
from foedus.privacy import accountant, shares
from foedus.privacy.mechanisms import AtSilos
from foedus.privacy.noise import SimulatedSource, SystemSource
from foedus.privacy.plan import EMPTIED, NEIGHBOURS, Terms, facts, make_plan
from foedus.privacy.statement import statement
from foedus.server import ExpectedMean
from foedus.stages import chain
from foedus.stages import noise as noise_stage
from foedus.stages.clip import Clip
from foedus.stages.grid import Grid
from foedus.stages.noise import AddNoise
from foedus.stages.words import room
from foedus.tree import norm
from foedus.types import Task, Update

SOURCE = SystemSource()
SILO = Terms(
    "silo", 1e-5, 10, noise_multiplier=2.0, silos=20, expected=20, placement="shared", discrete=True, word=32,
    minimum=8, colluding=2, parties=20,
)  # fmt: skip
AUTHOR = Terms(
    "author", 1e-5, 320, epsilon=8.0, rate=0.064, divisor=64, lr=0.5, silos=10, expected=10, placement="shared",
    discrete=True, word=32, minimum=6, colluding=1, parties=10,
)  # fmt: skip
SIZE = 20_000


def task(size: int = SIZE) -> Task:
    return Task(0, "m", {"w": np.zeros(size, np.float32)}, (), 0)


def update(x: np.ndarray, silo: str = "a") -> Update:
    return Update({("delta", "w"): x}, silo=silo)


def integers(plan, x: np.ndarray, silo: str = "a") -> np.ndarray:
    return chain(*plan.stages()).encode(update(x, silo), task(x.size)).tensors["delta", "w"]


# ---- what the plan makes ----


@pytest.mark.parametrize("terms", [SILO, AUTHOR])
def test_clip_grid_and_shares_come_from_one_plan_and_the_server_adds_nothing(terms):
    plan = make_plan(terms, SOURCE)
    kinds = [type(stage) for stage in plan.stages()]
    assert kinds == ([Grid, AddNoise] if terms.local else [Clip, Grid, AddNoise])
    assert isinstance(plan.mechanism(), AtSilos) and plan.at_silos
    assert plan.aggregator() == ExpectedMean(terms.expected)
    assert plan.stages()[-1].shares == terms.minimum - terms.colluding
    assert plan.stages()[-1].step == plan.stages()[-2].step


def test_costs_are_as_they_were_found():
    assert make_plan(SILO, SOURCE).epsilon == pytest.approx(8.07941, abs=1e-4)
    author = make_plan(AUTHOR, SOURCE)
    assert author.multiplier == pytest.approx(1.058, abs=1e-3) and 7.95 < author.epsilon <= 8.0
    assert make_plan(replace(AUTHOR, rate=1.0, rounds=10), SOURCE).multiplier == pytest.approx(2.017, abs=0.02)


def test_distributed_noise_costs_hardly_more_than_the_same_noise_at_a_trusted_server():
    central = make_plan(replace(SILO, placement="server", word=0, colluding=0, discrete=True), SOURCE)
    assert make_plan(SILO, SOURCE).epsilon == pytest.approx(central.epsilon, rel=1e-6)


def test_every_way_to_place_the_noise_adds_it_once_and_none_leaves_it_out():
    """In the step, in the stages or at the server: whoever turns off two of them is found here."""
    local = Terms("example", 1e-5, 3, noise_multiplier=1.5, rate=0.5, divisor=8.0)
    whole = Terms("silo", 1e-5, 3, noise_multiplier=1.5, silos=8, expected=8)
    kinds = [
        local, replace(AUTHOR, epsilon=None, noise_multiplier=1.5), whole, replace(whole, discrete=True),
        replace(whole, placement="silo"), replace(whole, placement="shared"), replace(SILO, noise_multiplier=1.5),
        replace(whole, discrete=True, word=32, parties=8), replace(whole, placement="silo", discrete=True, word=32),
    ]  # fmt: skip
    for terms in kinds:
        plan = make_plan(terms, SOURCE)
        steps, stages = plan.steps_at_silos(["w"]), [s for s in plan.stages() if isinstance(s, AddNoise)]
        in_steps = bool(steps is not None and steps.noise({"w": (50,)}, 0, 1.0, SOURCE.generator("x"))["w"].all())
        at_server = not isinstance(plan.mechanism(), AtSilos)
        assert in_steps + len(stages) + at_server == 1, terms


# ---- words ----


@settings(max_examples=200, deadline=None)
@given(
    word=st.sampled_from([16, 32, 64]), parties=st.integers(1, 2000), largest=st.floats(1e-6, 1e6),
    noise=st.floats(0, 1e4), draws=st.integers(1, 10**6),
)  # fmt: skip
def test_no_sum_of_numbers_and_noise_can_wrap(word, parties, largest, noise, draws):
    if room(word, parties) < 8:
        with pytest.raises(GuaranteeError, match="larger .secure. word"):
            shares.fitted(word, parties, largest, noise * largest, draws)
        return
    cells = shares.fitted(word, parties, largest, noise * largest, draws)
    tail = cells.tail.most if cells.tail else 0
    assert parties * (cells.most + tail) <= 2 ** (word - 1) - 1
    assert largest / cells.step + 0.5 <= cells.most and tail >= 0


@pytest.mark.parametrize("word, dtype", [(16, np.int16), (32, np.int32)])
def test_a_word_has_room_for_all_and_for_no_step_more(word, dtype):
    parties, most = 7, room(word, 7)
    assert sum([dtype(most)] * parties, start=dtype(0)) == parties * most
    over = np.array([most + 1] * parties, dtype)
    assert np.add.reduce(over, dtype=dtype) != parties * (most + 1)


@pytest.mark.parametrize("terms", [SILO, replace(SILO, word=16), AUTHOR])
def test_what_leaves_a_silo_always_has_room_however_large_its_numbers_are(terms):
    plan = make_plan(terms, SOURCE)
    for x in (np.full(300, 1e6), -np.full(300, 1e30), np.eye(1, 300)[0] * 5):
        assert np.abs(integers(plan, x)).max() <= room(terms.word, terms.parties)


def test_a_clipped_update_is_never_cut_on_its_way_to_the_grid():
    plan = make_plan(replace(SILO, word=16), SOURCE)
    clip, grid, _ = plan.stages()
    alone = clip.encode(update(np.eye(1, 50)[0] * 1e9), task(50))
    assert grid.encode(alone, task(50)).tensors["delta", "w"][0] == round(1 / grid.step) <= grid.most


@pytest.mark.parametrize("terms", [SILO, replace(SILO, word=16, rounds=1000), AUTHOR])
def test_a_draw_that_is_too_long_comes_less_than_once_in_2_to_the_100_runs(terms):
    tail = make_plan(terms, SOURCE).stages()[-1].tail
    draws = shares.NUMBERS * terms.rounds * terms.silos
    assert math.log(2 * draws) - (tail.most / tail.std) ** 2 / 2 <= -100 * math.log(2)


@pytest.mark.parametrize("terms", [SILO, AUTHOR])
def test_the_chance_of_such_a_draw_is_in_what_the_ledger_charges(terms):
    plan = make_plan(terms, SOURCE)
    cuts = [part for event in plan.events for part in event["of"] if part["mechanism"] == "cut"]
    assert sum(cut["chance"] for cut in cuts) == pytest.approx(2.0**-100)


def test_a_draw_that_is_too_long_ends_the_silos_round_and_nothing_leaves(monkeypatch):
    plan = make_plan(SILO, SOURCE)
    most = plan.stages()[-1].tail.most
    for worst, stops in ((most, False), (-most, False), (most + 1, True), (-most - 1, True)):
        monkeypatch.setattr(noise_stage, "discrete_gaussian", lambda r, shape, std, n=worst: np.full(shape, n))
        if stops:
            with pytest.raises(SiloError, match="a longer draw"):
                integers(plan, np.zeros(5))
        else:
            assert np.abs(integers(plan, np.full(5, 9.0))).max() <= room(32, 20)


def test_noise_that_outgrew_what_the_plan_has_room_for_is_refused_at_the_silo():
    plan = make_plan(replace(SILO, word=16), SOURCE)
    with pytest.raises(GuaranteeError, match="rounding lengthens"):
        integers(plan, np.zeros(10_000))


def test_sums_of_words_come_back_as_the_sum_of_what_went_in():
    plan, parties, random = make_plan(replace(SILO, noise_multiplier=0.5), SOURCE), 20, np.random.default_rng(0)
    updates = [random.normal(size=400) / 40 for _ in range(parties)]
    words = [integers(plan, x, f"s{i}").astype(np.int32) for i, x in enumerate(updates)]
    total = np.add.reduce(words, dtype=np.int32) * plan.stages()[-1].step
    expected = sum(x / max(1.0, np.linalg.norm(x)) for x in updates)
    assert np.std(total - expected) == pytest.approx(0.5 * math.sqrt(20 / 6), rel=0.15)


# ---- shares ----


@pytest.mark.parametrize("terms, whole", [(SILO, 2.0), (AUTHOR, None)])
@pytest.mark.parametrize("honest", [6, 18])
def test_any_shares_of_the_fewest_honest_silos_make_the_noise_whole_and_more_add_to_it(terms, whole, honest):
    plan = make_plan(terms, SOURCE)
    noise = sum(integers(plan, np.zeros(SIZE), f"s{i}") for i in range(honest)) * plan.stages()[-1].step
    bound = chain(*plan.stages()[:-1]).bound(plan.stages()[-1].incoming, task())
    needed = terms.minimum - terms.colluding
    assert bound >= terms.unit_norm and (whole is None or plan.multiplier == whole)
    assert np.std(noise) == pytest.approx(plan.multiplier * bound * math.sqrt(honest / needed), rel=0.03)


def test_with_fewer_shares_than_the_plan_says_the_noise_is_not_whole():
    plan = make_plan(SILO, SOURCE)
    noise = sum(integers(plan, np.zeros(SIZE), f"s{i}") for i in range(5)) * plan.stages()[-1].step
    assert np.std(noise) < 0.95 * plan.multiplier


@pytest.mark.parametrize("terms", [SILO, replace(AUTHOR, rounds=20, epsilon=None, noise_multiplier=1.0)])
def test_an_audit_finds_in_the_stages_the_noise_that_the_plan_states(terms):
    plan = make_plan(terms, SOURCE)
    rounds = mechanisms.rounds_of(plan, {"a": (40, 50), "b": (3000,)}, 200)
    trial = mechanisms.tried(rounds[:10], 200, np.random.default_rng(0), terms.rate, terms.divisor)
    assert len(trial.checks) >= 4 and min(check.p for check in trial.checks) > 1e-5
    assert not mechanisms.proves(plan)  # a share alone protects nobody


# ---- rounding ----


def test_noise_covers_the_length_that_rounding_adds_to_a_silos_update():
    """Numbers just above half a step are all rounded up: a vector of norm C becomes one of more than C."""
    plan, size = make_plan(replace(SILO, word=16, parties=10), SOURCE), 60
    _, grid, noise = plan.stages()
    x = np.full(size, 0.51 * grid.step)
    x[0] = math.sqrt(1 - (size - 1) * x[1] ** 2) * (1 - 1e-9)
    x[0] = (math.floor(x[0] / grid.step - 0.51) + 0.51) * grid.step
    rounded = norm(chain(*plan.stages()[:2]).encode(update(x), task(size)).tensors) * grid.step
    covered = noise.std(task(size)) * math.sqrt(noise.shares) / plan.multiplier
    assert rounded > 1.0003 and rounded <= covered
    assert covered == pytest.approx(1 + math.sqrt(size + 16) * grid.step / 2, rel=1e-9)


def test_noise_covers_how_far_rounding_takes_two_neighbours_apart():
    """Two sums on either side of a half are a whole step apart in every number, however little one unit added."""
    plan, size = make_plan(AUTHOR, SOURCE), 400
    grid, noise = plan.stages()
    below, above = (grid.encode(update(np.full(size, (0.5 + s) * grid.step)), task(size)) for s in (-1e-3, 1e-3))
    apart = np.linalg.norm(above.tensors["delta", "w"] - below.tensors["delta", "w"]) * grid.step
    covered = noise.std(task(size)) * math.sqrt(noise.shares) / plan.multiplier
    assert apart == pytest.approx(math.sqrt(size) * grid.step)
    assert covered - AUTHOR.unit_norm >= apart
    assert covered == pytest.approx(AUTHOR.unit_norm + math.sqrt(size + 16) * grid.step, rel=1e-12)


def test_one_unit_moves_an_update_by_the_learning_rate_times_its_clipped_gradient_over_the_batch():
    assert AUTHOR.unit_norm == 0.5 * 1.0 / 64 and AUTHOR.largest == 0.5
    assert SILO.unit_norm == SILO.largest == 1.0


# ---- τ ----


def cost(std: float, count: int, order: float, apart: int = 1) -> float:
    """Rényi divergence of a sum of discrete Gaussians from the same sum some steps apart, by convolution."""
    x = np.arange(-60, 61)
    law = one = np.exp(-(x**2) / (2 * std**2)) / np.exp(-(x**2) / (2 * std**2)).sum()
    for _ in range(count - 1):
        law = np.convolve(law, one)
    logs = np.log(law[np.abs(np.arange(len(law)) - len(law) // 2) <= 10 + 8 * std * math.sqrt(count)])
    return float(np.logaddexp.reduce(order * logs[apart:] + (1 - order) * logs[:-apart]) / (order - 1))


@pytest.mark.parametrize("std", [0.5, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("apart", [1, 2])
def test_a_sum_of_discrete_gaussians_costs_no_more_than_its_tau_says(std, count, apart):
    stated = 0.5 * (apart / (math.sqrt(count) * std) + shares.tau(count, std)) ** 2
    for order in (1.05, 1.5, 2, 4, 8):
        assert cost(std, count, order, apart) <= order * stated * (1 + 1e-9)


@pytest.mark.parametrize("std, count, more", [(0.5, 8, 1.14), (0.6, 8, 1.02), (0.8, 2, 1.00001)])
def test_leaving_tau_out_would_state_less_than_a_sum_of_small_shares_costs(std, count, more):
    assert cost(std, count, 1.5) > more * 1.5 / (2 * count * std**2)


def test_at_four_steps_a_share_tau_is_too_small_to_see_and_one_share_has_none():
    assert shares.concentration(2.0, 1, 0.5) == 1 / 8
    assert shares.concentration(2.0, 500, 4.0) == pytest.approx(1 / 8, rel=1e-12)
    assert 1e-70 < shares.tau(500, 4.0) < 1e-60
    assert shares.concentration(2.0, 2, 1.0) > 1000  # and at one step it is not


def test_tau_is_the_sum_that_the_paper_says():
    terms = [math.exp(-2 * math.pi**2 * 0.49 * k / (k + 1)) for k in (1, 2, 3)]
    assert shares.tau(4, 0.7) == pytest.approx(10 * sum(terms), rel=1e-12)
    assert shares.tau(1, 0.7) == 0


# ---- refused ----


@pytest.mark.parametrize("wrong, says", [
    ({"discrete": False}, "an integer, in sums of integers"), ({"minimum": 2}, "minimum > 2"),
    ({"parties": 7}, "parties ≥ 8"), ({"word": 24}, "word 16, 32 or 64"), ({"colluding": -1}, "colluding ≥ 0"),
    ({"rate": 0.5}, "only a trusted coordinator keeps"), ({"bands": 2}, "correlated noise at the server"),
    ({"quantile": 0.5}, "a fixed clip norm"),
])  # fmt: skip
def test_shares_of_silos_that_cannot_hold_are_refused(wrong, says):
    with pytest.raises(GuaranteeError, match=says):
        replace(SILO, **wrong)


@pytest.mark.parametrize("wrong, says", [
    ({"word": 0}, "secure sums"), ({"steps": 2}, "one local step"), ({"lr": 0.0}, "one local step"),
    ({"lr": math.nan}, "lr < ∞"), ({"quantile": 0.5}, "a fixed clip norm"), ({"group": 4}, "one fixed clip norm"),
    ({"clipping": "layers"}, "one fixed clip norm"), ({"bands": 2}, "one fixed clip norm|at the server"),
    ({"discrete": False}, "an integer"), ({"minimum": 1}, "minimum > 1"),
])  # fmt: skip
def test_shares_for_units_inside_silos_that_cannot_hold_are_refused(wrong, says):
    with pytest.raises(GuaranteeError, match=says):
        replace(AUTHOR, **wrong)


def test_words_in_which_the_noise_is_coarser_than_a_sum_of_gaussians_bears_are_refused():
    make_plan(replace(SILO, word=16, parties=400, silos=400), SOURCE)
    with pytest.raises(GuaranteeError, match="4 steps in the standard deviation.* word = 32"):
        make_plan(replace(SILO, word=16, parties=800, silos=800), SOURCE)
    with pytest.raises(GuaranteeError, match="8 steps either way"):
        make_plan(replace(SILO, word=16, parties=5000, silos=5000), SOURCE)


def test_words_in_which_rounding_would_cost_more_than_a_tenth_are_refused_with_one_that_does():
    small = make_plan(replace(SILO, word=16), SOURCE)
    assert small.growth(200) < 0.1 < small.growth(10_000)
    with pytest.raises(GuaranteeError, match="word = 32"):
        small.check_silos(10_000, accepted=True)
    small.check_silos(200, accepted=True)
    with pytest.raises(GuaranteeError, match="smaller groups, or train fewer"):
        make_plan(replace(AUTHOR, word=64), SOURCE).check_silos(2**37, accepted=True)
    make_plan(AUTHOR, SOURCE).check_silos(10**7, accepted=False)


# ---- words for people ----


def test_the_statement_names_unit_neighbours_and_adversary_and_what_ends_a_round():
    for terms, neighbours in ((SILO, EMPTIED), (AUTHOR, NEIGHBOURS)):
        made = facts(make_plan(terms, SOURCE))
        said = " ".join(statement(made, made["epsilon"]))
        least, colluding = terms.minimum, terms.colluding
        assert made["neighbours"] == neighbours and neighbours in said and f"one {terms.unit}" in said
        assert f"the coordinator and at most {colluding} of the silos together" in said
        assert f"fewer than {least} silos is abandoned" in said and f"the shares of {least - colluding}" in said
        assert "what rounding to integers adds" in said and "words of 32 bits" in said
        assert accountant.upper(made["event"], 1e-5) == made["epsilon"]


def test_without_colluders_nothing_is_promised_against_a_silo_that_takes_part():
    made = facts(make_plan(replace(SILO, colluding=0), SOURCE))
    assert any("but not a silo that took part" in sentence for sentence in statement(made, made["epsilon"]))


def test_without_secure_sums_shares_of_the_noise_stay_a_rehearsal():
    made = facts(make_plan(replace(SILO, word=0, colluding=0), SimulatedSource(1)))
    assert made["neighbours"] == NEIGHBOURS
    assert any("against it this guarantee does not hold" in sentence for sentence in statement(made, made["epsilon"]))
    old = {**made, "terms": {k: v for k, v in made["terms"].items() if k not in ("word", "parties", "colluding", "lr")}}
    assert statement(old, made["epsilon"]) == statement(made, made["epsilon"])
