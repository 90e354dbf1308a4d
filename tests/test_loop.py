"""The loop and its verbs composed by hand, over least squares instead of a language model.

Contracts that cut across: the bound holds for every chain and attack, stages are pure, one silo is plain descent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest

from foedus import loop, tree, wire
from foedus.algorithms.base import Averaging
from foedus.errors import CohortError, GuaranteeError
from foedus.loop import Federation
from foedus.privacy import Unprotected
from foedus.privacy.noise import SimulatedSource
from foedus.privacy.plan import Terms, make_plan
from foedus.server import Adaptive, FixedSize, Full, Poisson, Sgd, WeightedMean
from foedus.stages import Plain, Weigh, chain
from foedus.types import Receipt, Report, State, Task, Total, Update

D, SILOS = 4, tuple(f"silo{i}" for i in range(5))
PARAMS = {"w": np.zeros(D)}


def data(seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=D)
    out = {}
    for i, silo in enumerate(SILOS):
        x = rng.normal(size=(8 + 4 * i, D))
        out[silo] = (x, x @ (truth + 0.1 * rng.normal(size=D)))
    return out


class LeastSquares(Averaging):
    """An engine's silos and an algorithm in one: five steps of gradient descent."""

    def __init__(self, stages, data, broken: dict[str, str] | None = None, order=1):
        self.stages, self.data, self.broken, self.order = stages, data, broken or {}, order

    def local(self, task: Task, silo: str) -> Update:
        w, (x, y) = task.params["w"].copy(), self.data[silo]
        for _ in range(5):
            w -= 0.1 * x.T @ (x @ w - y) / len(y)
        return Update({("delta", "w"): w - task.params["w"]}, weight=len(y))

    def ask(self, asks):
        for a in asks[:: self.order]:
            task = wire.unpack_task(a.payload)
            if a.silo in self.broken:
                if self.broken[a.silo]:
                    yield Report(a.silo, task.round, b"", Receipt(a.silo, task.round, failure=self.broken[a.silo]))
                continue
            payload = wire.pack(self.stages.encode(self.local(task, a.silo), task).tensors, {})
            yield Report(a.silo, task.round, payload, Receipt(a.silo, task.round))


def federation(stages=None, silos=SILOS, **more) -> Federation:
    stages = stages or chain(Weigh())
    fields = {
        "algorithm": LeastSquares(stages, data()), "stages": stages, "aggregator": WeightedMean(),
        "mechanism": Unprotected(), "server_optimizer": Sgd(1.0), "sampler": Full(), "silos": silos, "model": "none",
        "rounds": 3,
    }  # fmt: skip
    return Federation(**(fields | more))


def go(f: Federation, engine=None, state: State | None = None):
    engine = engine or LeastSquares(f.stages, data())
    return list(loop.run(f, engine, state or loop.start(f, PARAMS)))


def test_a_weighted_mean_is_the_equation_of_mcmahan_et_al():
    f = federation(rounds=1)
    engine, task = LeastSquares(f.stages, data()), Task(0, "none", PARAMS, SILOS, 0)
    updates = [engine.local(task, silo) for silo in SILOS]
    n = sum(u.weight for u in updates)
    expected = sum(u.weight / n * u.tensors["delta", "w"] for u in updates)
    np.testing.assert_allclose(go(f)[-1][0].params["w"], expected, rtol=1e-12)


def test_one_silo_is_plain_descent():
    f = federation(silos=SILOS[:1], rounds=4)
    w, (x, y) = np.zeros(D), data()[SILOS[0]]
    for _ in range(4 * 5):
        w -= 0.1 * x.T @ (x @ w - y) / len(y)
    np.testing.assert_allclose(go(f)[-1][0].params["w"], w, rtol=1e-12)


class Telling(LeastSquares):
    """Steps twice as far, and refines what it gets by what the round left."""

    def direction(self, mean):
        return {"w": 2 * mean["delta", "w"]}

    def finish(self, extra, mean):
        return {**extra, ("own", "mean"): mean["delta", "w"]}

    def refine(self, params, extra):
        return {"w": params["w"] + extra["own", "mean"]}, {**extra, ("own", "stepped"): params["w"]}


def test_an_algorithm_directs_the_step_and_refines_what_came_of_it_with_what_the_round_left():
    f = federation(rounds=1)
    (plain, _), (state, _) = go(f)[-1], go(replace(f, algorithm=Telling(f.stages, data())))[-1]
    for times, found in ((1, state.extra["own", "mean"]), (2, state.extra["own", "stepped"]), (3, state.params["w"])):
        np.testing.assert_allclose(found, times * plain.params["w"])


def test_answers_may_come_in_any_order():
    f = federation()
    back = LeastSquares(f.stages, data(), order=-1)
    np.testing.assert_array_equal(go(f)[-1][0].params["w"], go(f, back)[-1][0].params["w"])


@pytest.mark.parametrize(
    "optimizer", [Sgd(1.0), Sgd(0.5, 0.9), Adaptive("adam"), Adaptive("yogi"), Adaptive("adagrad")]
)
@pytest.mark.parametrize("sampler", [Full(), FixedSize(3), Poisson(0.5)])
def test_a_run_goes_on_from_any_state_as_if_it_had_not_stopped(optimizer, sampler):
    f = federation(server_optimizer=optimizer, sampler=sampler, rounds=6)
    whole = [state for state, _ in go(f)]
    for state in whole[:-1]:
        np.testing.assert_array_equal(go(f, state=state)[-1][0].params["w"], whole[-1].params["w"])


@pytest.mark.parametrize("optimizer", [Sgd(1.0, 0.9), Adaptive("adam"), Adaptive("yogi")])
def test_a_release_does_not_depend_on_the_server_optimizer(optimizer):
    ours, plain = go(federation(server_optimizer=optimizer, rounds=1)), go(federation(rounds=1))
    np.testing.assert_array_equal(ours[0][1].tensors["delta", "w"], plain[0][1].tensors["delta", "w"])


def test_a_silo_that_fails_or_stays_silent_is_named_and_left_out():
    f = federation(rounds=1)
    state, release = go(f, LeastSquares(f.stages, data(), {"silo1": "no disk", "silo3": ""}))[0]
    assert {r.silo: r.failure for r in release.receipts if r.failure} == {"silo1": "no disk", "silo3": "did not answer"}
    rest = federation(rounds=1, silos=("silo0", "silo2", "silo4"))
    np.testing.assert_array_equal(state.params["w"], go(rest)[0][0].params["w"])


def test_too_few_reports_stop_the_run_and_the_last_state_stays_good():
    f = federation(minimum=4, rounds=3)
    fine = LeastSquares(f.stages, data())
    run = loop.run(f, fine, loop.start(f, PARAMS))
    state, _ = next(run)
    fine.broken = {"silo1": "no disk", "silo3": "no disk"}
    with pytest.raises(CohortError, match="at least 4 silos.*3 of the 5.*silo1: no disk"):
        next(run)
    fine.broken = {}
    assert go(f, fine, state)[-1][0].round == 3


def test_an_empty_poisson_cohort_changes_nothing():
    f = federation(sampler=Poisson(1e-9), rounds=2)
    (state, release), _ = go(f)
    np.testing.assert_array_equal(state.params["w"], PARAMS["w"])
    assert release.receipts == () and state.round == 1


def test_chance_that_draws_fewer_than_the_minimum_makes_an_empty_round():
    f = federation(sampler=Poisson(0.3), minimum=4, rounds=20)
    sizes = [len(release.receipts) for _, release in go(f)]
    assert 0 in sizes and all(size == 0 or size >= 4 for size in sizes)


def test_without_a_mechanism_a_release_says_that_it_protects_nobody():
    _, release = go(federation(rounds=1))[0]
    assert release.event == {"mechanism": "none"} and release.unit == ""


@dataclass(frozen=True)
class Hiding(Plain):
    hides: ClassVar[bool] = True


class Median(WeightedMean):
    linear: ClassVar[bool] = False


def test_an_aggregator_that_looks_at_single_updates_is_refused_where_they_are_hidden():
    with pytest.raises(GuaranteeError, match="hides single updates"):
        federation(chain(Weigh(), Hiding()), aggregator=Median())


# The contract that every stage signs. A silo's contribution is replaced by nothing: its own norm is at most the bound.

CHAINS = {
    "uniform": chain(Weigh("uniform")),
    "capped": chain(Weigh("examples", 12.0)),
    "twice": chain(Weigh("uniform")),
}
ATTACKS = {
    "huge": lambda u: Update(tree.scale(u.tensors, 1e6), u.weight),
    "zero": lambda u: Update(tree.scale(u.tensors, 0.0), u.weight),
    "many examples": lambda u: Update(u.tensors, 1e9),
}


@pytest.mark.parametrize("stages", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_one_silo_counts_for_at_most_the_bound(stages, attack):
    task = Task(0, "none", PARAMS, SILOS, 0, stages.start())
    bad = attack(LeastSquares(stages, data()).local(task, "silo0"))
    norm = tree.norm(bad.tensors)
    alone = stages.decode(Total(stages.encode(bad, task).tensors, 0.0, 1), task)
    assert tree.norm(alone.tensors) <= stages.bound(norm, task) * (1 + 1e-9)


def test_an_uncapped_weight_has_no_bound():
    task = Task(0, "none", PARAMS, SILOS, 0)
    assert chain(Weigh()).bound(1.0, task) == math.inf
    assert chain(Weigh("uniform")).bound(math.inf, task) == math.inf


@pytest.mark.parametrize("stages", CHAINS.values(), ids=CHAINS)
def test_stages_are_pure(stages):
    task = Task(0, "none", PARAMS, SILOS, 0, stages.start())
    update = LeastSquares(stages, data()).local(task, "silo0")
    before = {key: x.copy() for key, x in update.tensors.items()}
    first, second = stages.encode(update, task), stages.encode(update, task)
    for key, x in first.tensors.items():
        np.testing.assert_array_equal(x, second.tensors[key])
    for key, x in update.tensors.items():
        np.testing.assert_array_equal(x, before[key])


def test_metric_sums_are_not_weighted():
    task = Task(0, "none", PARAMS, SILOS, 0)
    update = Update({("metric", "loss"): np.array([2.0]), ("delta", "w"): np.ones(2)}, weight=3.0)
    encoded = Weigh().encode(update, task).tensors
    assert (
        encoded["metric", "loss"][0] == 2.0 and encoded["delta", "w"][0] == 3.0 and encoded["weight", "sum"][0] == 3.0
    )


def test_values_print_compare_hash_and_pickle():
    import pickle

    for value in (chain(Weigh("examples", 5.0)), Sgd(1.0, 0.9), Adaptive("yogi"), FixedSize(3), Poisson(0.5), Full(),
                  WeightedMean(), Unprotected()):  # fmt: skip
        assert pickle.loads(pickle.dumps(value)) == value and hash(value) == hash(replace(value))
    assert "max_weight=5.0" in repr(chain(Weigh("examples", 5.0)))


def test_a_weight_cap_must_be_positive():
    with pytest.raises(ValueError, match="max_weight=0"):
        Weigh("examples", 0.0)


# whole silos under a guarantee


def guarded(rate: float = 0.5, seed: int = 0, z: float = 1.0):
    """A federation whose mean is released with noise, from a plan."""
    terms = Terms("silo", 1e-5, 8, noise_multiplier=z, max_norm=0.1, silos=5, expected=5 * rate, rate=rate)
    plan = make_plan(terms, SimulatedSource(seed))
    stages = chain(*plan.stages())
    f = Federation(
        LeastSquares(stages, data()), stages, plan.aggregator(), plan.mechanism(), Sgd(), plan.sampler() or Full(),
        SILOS, "base", 8,
    )  # fmt: skip
    return f, LeastSquares(stages, data())


def test_a_round_in_which_chance_asked_nobody_is_noise_like_any_other():
    f, engine = guarded(rate=0.05)
    rounds = list(loop.run(f, engine, loop.start(f, PARAMS)))
    empty = [r for _, r in rounds if not r.receipts]
    asked = [r for _, r in rounds if r.receipts]
    assert empty and asked
    assert {tuple(r.tensors) for r in empty} == {tuple(r.tensors) for r in asked}
    assert all(r.unit == "silo" and np.abs(r.tensors["delta", "w"]).max() > 0 for r in empty)
    states = [loop.start(f, PARAMS), *(state for state, _ in rounds)]
    moved = [not np.array_equal(a.params["w"], b.params["w"]) for a, b in zip(states, states[1:], strict=False)]
    assert all(moved)


def test_one_silo_more_or_less_moves_the_mean_by_its_bound_over_a_public_count():
    f, _ = guarded(rate=1.0, z=1e-9)
    means = []
    for gone in ((), ("silo3",)):
        engine = LeastSquares(f.stages, data(), broken=dict.fromkeys(gone, "left"))
        state, _ = loop.one_round(f, engine, loop.start(f, PARAMS))
        means.append(state.params["w"])
    assert np.linalg.norm(means[0] - means[1]) == pytest.approx(0.1 / 5, rel=1e-5)
