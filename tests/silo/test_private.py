"""Private steps in a silo: what training sees, what a unit can move, and what stays as it was."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from foedus.audit.checks import contributions, only
from foedus.build import build
from foedus.errors import GuaranteeError
from foedus.lm.bench import ROUNDED
from foedus.privacy.noise import SimulatedSource, SystemSource
from foedus.privacy.plan import PrivacyPlan, Terms, make_plan
from foedus.silo.private import PrivateGradients, in_passes
from foedus.silo.shard import Units
from foedus.silo.train import LocalPlan, train
from foedus.stages import chain
from foedus.treaty import from_dict
from foedus.tree import as_part
from foedus.types import Task, Update

from ..conftest import rows


def place(base: str = "tiny:llama", task: str = "causal-lm", silos: int = 1, **more):
    privacy = {"unit": "example", "noise_multiplier": 1.0, "rate": 0.2, "randomness": "simulated"} | more.pop(
        "privacy", {}
    )
    treaty = from_dict({
        "treaty": {"name": "t", "seed": 5}, "model": {"base": base, "task": task, "max_length": 16},
        "adapter": {"rank": 2, "targets": "attention"}, "algorithm": {"rounds": 3}, "local": {"steps": 3, "batch": 6},
        "data": {"source": "memory", "author": "author", "label": "domain"}, "privacy": privacy, **more,
    })  # fmt: skip
    examples = [{**row, "author": f"p{i % 7}"} for i, row in enumerate(rows(20))]
    return build(treaty, {f"s{i}": examples for i in range(silos)})


def task_of(p, round: int = 0) -> Task:
    return Task(round, p.base.digest, p.bench.start(), tuple(p.silos), 5)


@pytest.fixture(scope="module")
def p():
    return place()


def quiet(plan, z: float = 1e-9, **changes):
    return replace(plan, privacy=replace(plan.privacy, multipliers=(z,) * 3, **changes))


def step(p, plan, silo=None, at: int = 0) -> np.ndarray:
    leaves = p.bench.leaves([p.bench.start()])
    PrivateGradients(p.bench, task_of(p), [silo or p.silos["s0"]], plan, [{}]).fill(leaves, at)
    return np.concatenate([x.grad.double().numpy().ravel() for x in leaves.values()])


def test_simulated_noise_gives_the_same_again_and_the_systems_never(p):
    assert np.array_equal(step(p, p.plan), step(p, p.plan))
    real = replace(p.plan, privacy=replace(p.plan.privacy, source=SystemSource()))
    torch.manual_seed(0)
    np.random.seed(0)
    one = step(p, real)
    torch.manual_seed(0)
    np.random.seed(0)
    assert not np.array_equal(one, step(p, real))


def test_a_batch_of_nobody_is_a_step_of_noise(p):
    silo = replace(p.silos["s0"], units=only(p.silos["s0"].units, []))
    released = step(p, p.plan, silo)
    assert np.std(released) == pytest.approx(1.0 / 6, rel=0.03)


@pytest.mark.parametrize("most", [1, 2, 7, 1000])
def test_how_many_rows_go_through_at_once_changes_nothing(p, most):
    whole = quiet(p.plan, rate=1.0)
    np.testing.assert_allclose(step(p, replace(whole, rows=most)), step(p, whole), rtol=2e-4, atol=2e-6)


def test_adding_or_removing_any_unit_moves_the_sum_by_at_most_the_norm(p):
    silo, plan = p.silos["s0"], quiet(p.plan, rate=1.0, rows=100)  # all rows, so that no coin decides
    small = replace(plan, privacy=replace(plan.privacy, parts=replace(plan.privacy.parts, norms=(0.01,))))
    units = list(range(12))
    whole = step(p, small, replace(silo, units=only(silo.units, units)))
    for gone in units:
        rest = replace(silo, units=only(silo.units, [u for u in units if u != gone]))
        moved = np.linalg.norm(whole - step(p, small, rest)) * plan.privacy.divisor
        assert moved <= 0.01 * (1 + 1e-3)
        assert moved == pytest.approx(0.01 * ROUNDED[p.bench.precision], rel=5e-3)  # each is clipped, to just that


def test_an_author_with_many_rows_moves_it_no_further():
    p = place(privacy={"unit": "author", "rows": 50})
    alone, _, bound = contributions(p.bench, task_of(p), p.silos["s0"], p.plan, most=7)
    assert len(p.silos["s0"].units) == 7
    assert max(np.linalg.norm(x) for x in alone) <= bound * (1 + 1e-3)


@pytest.mark.parametrize("sampling", ["units", "examples"])
def test_an_author_keeps_no_more_examples_than_the_treaty_says(sampling):
    p = place(privacy={"unit": "author", "author_examples": 2, "sampling": sampling})
    documents = set(p.silos["s0"].splits["train"].documents.tolist())
    assert len(documents) <= 2 * 7 and len(p.silos["s0"].units) == (7 if sampling == "units" else len(documents))


def test_one_document_is_one_unit_whatever_its_windows():
    p = place(model={"base": "tiny:llama", "max_length": 8})
    units = p.silos["s0"].units
    assert len(units) < len(units.of) and len(set(units.of)) == len(units)
    assert all(len(units.rows(u, 1, np.random.default_rng(0))) == 1 for u in range(len(units)))


def test_private_steps_train_and_noise_from_the_system_trains_as_well(p):
    real = replace(p.plan, privacy=replace(p.plan.privacy, source=SystemSource()))
    for plan in (p.plan, real):
        (trained,) = train(p.bench, task_of(p), [p.silos["s0"]], plan, [{}])
        assert any(not np.array_equal(trained.params[n], x) for n, x in p.bench.start().items())


def test_silos_side_by_side_give_what_they_give_alone():
    p = place(silos=3)
    together = train(p.bench, task_of(p), list(p.silos.values()), p.plan, [{}] * 3)
    for silo, result in zip(p.silos.values(), together, strict=True):
        (alone,) = train(p.bench, task_of(p), [silo], p.plan, [{}])
        for name, x in alone.params.items():
            np.testing.assert_allclose(result.params[name], x, rtol=1e-3, atol=1e-4)
    assert not np.allclose(*(next(iter(r.params.values())) for r in together[:2]))  # each has noise of its own


@pytest.mark.parametrize("base, task", [
    ("tiny:gpt2", "causal-lm"), ("tiny:bert", "masked-lm"), ("tiny:bert", "sequence-classification"),
])  # fmt: skip
def test_other_models_and_tasks_train_privately(base, task):
    p = place(base, task)
    (trained,) = train(p.bench, task_of(p), [p.silos["s0"]], p.plan, [{}])
    assert all(np.isfinite(x).all() for x in trained.params.values())


def test_what_a_silo_remembers_goes_on_where_it_stopped():
    p = place(privacy={"bands": 3})
    silo = p.silos["s0"]
    (first,) = train(p.bench, task_of(p), [silo], p.plan, [{}])
    assert {key for key, _ in first.memory} == {"private noise 000", "private noise 001", "private steps done"}
    q = place(privacy={"quantile": 0.5, "max_norm": 1e-4})
    (first,) = train(q.bench, task_of(q), [q.silos["s0"]], q.plan, [{}])
    (second,) = train(q.bench, task_of(q, 1), [q.silos["s0"]], q.plan, [first.memory])
    factors = [float(t.memory["private factor", ""][0]) for t in (first, second)]
    assert 1 < factors[0] < factors[1]  # most norms are above so small a limit, so it grows


def test_a_silo_that_missed_rounds_keeps_its_units_as_far_apart_as_its_noise_assumes():
    """Correlated noise counts a silo's own steps; turns taken by the round would bring a unit back too soon."""
    p = place(privacy={"bands": 3, "rate": 0.2})
    silo, memory, steps = p.silos["s0"], {}, p.plan.privacy
    assert steps.period == 5 and steps.steps == 3
    seen = []
    for round in (0, 5, 10):  # by rounds, step 0 would be number 0, 15 and 30: the same units each time
        gradients = PrivateGradients(p.bench, task_of(p, round % 3), [silo], p.plan, [memory])
        drawn = [gradients._draw(0, step, np.random.default_rng(0)) for step in range(3)]
        seen += [{int(silo.units.of[rows[0]]) for rows in units} for units in drawn]
        memory = gradients.memory(0)
    for unit in range(len(silo.units)):
        turns = [at for at, chosen in enumerate(seen) if unit in chosen]
        assert all(b - a == 5 for a, b in zip(turns, turns[1:], strict=False))


def test_a_loss_that_is_not_finite_is_nobodys_business(p, monkeypatch):
    from foedus.lm.bench import Bench

    right = Bench.clipped
    monkeypatch.setattr(Bench, "clipped", lambda *a: replace(right(*a), losses=torch.tensor([float("nan")])))
    train(p.bench, task_of(p), [p.silos["s0"]], p.plan, [{}])


# ---- shares of noise: one exact step, whose noise the stages add ----

LR, DIVISOR = 0.5, 6.0


def shared(p, **changes) -> tuple[PrivacyPlan, LocalPlan]:
    """A plan whose noise is added to whole updates, in shares, and the silo's side of it."""
    terms = Terms(
        "author", 1e-5, 3, noise_multiplier=1.0, max_norm=0.01, divisor=DIVISOR, rows=100, lr=LR, silos=4, expected=4,
        placement="shared", minimum=3, colluding=1, parties=4, discrete=True, word=32,
    )  # fmt: skip
    plan = make_plan(replace(terms, **changes), SimulatedSource(1))
    steps = plan.steps_at_silos(list(p.bench.start()))
    return plan, replace(p.plan, lr=LR, steps=1, optimizer="sgd", privacy=steps)


@pytest.fixture(scope="module")
def authors():
    return place(privacy={"unit": "author", "rows": 50})


def moved(p, plan, silo) -> dict[str, np.ndarray]:
    (trained,) = train(p.bench, task_of(p), [silo], plan, [{}])
    return {name: trained.params[name] - x for name, x in p.bench.start().items()}


def flat(arrays) -> np.ndarray:
    return np.concatenate([x.ravel() for x in arrays.values()])


def test_a_step_under_shares_has_no_noise_of_its_own_and_the_stages_have_all_of_it(authors):
    p = authors
    made, plan = shared(p)
    silo = replace(p.silos["s0"], units=only(p.silos["s0"].units, []))
    nothing = moved(p, plan, silo)
    assert not flat(nothing).any()
    update = Update(as_part("delta", nothing), silo="s0")
    task = task_of(p)
    left = chain(*made.stages()).encode(update, task).tensors
    noise = made.stages()[-1]
    assert np.std(flat(left)) * noise.step == pytest.approx(noise.std(task), rel=0.05)
    assert noise.std(task) * 2**0.5 == pytest.approx(LR * 0.01 / DIVISOR, rel=1e-3)  # two shares make it whole


def test_one_author_moves_an_update_by_the_learning_rate_times_the_norm_over_the_batch_at_most(authors):
    p, (made, plan) = authors, shared(authors)
    silo, units, most = p.silos["s0"], list(range(7)), made.terms.unit_norm
    whole = flat(moved(p, plan, replace(silo, units=only(silo.units, units))))
    for gone in units:
        rest = only(silo.units, [u for u in units if u != gone])
        apart = np.linalg.norm(whole - flat(moved(p, plan, replace(silo, units=rest))))
        assert apart <= most * (1 + 1e-4)
        assert apart == pytest.approx(most * ROUNDED[p.bench.precision], rel=5e-3)  # each is clipped, to just that
    assert np.linalg.norm(whole) > 1.5 * most


def test_what_leaves_the_stages_differs_by_one_author_and_by_what_rounding_adds(authors):
    p, (made, plan) = authors, shared(authors)
    silo, task, grid = p.silos["s0"], task_of(p), made.stages()[0]
    bound = grid.bound(made.terms.unit_norm, task)
    both = [
        flat(grid.encode(Update(as_part("delta", moved(p, plan, replace(silo, units=only(silo.units, some))))), task)
             .tensors)
        for some in (range(7), range(6))
    ]  # fmt: skip
    assert 0.9 * made.terms.unit_norm < np.linalg.norm(both[0] - both[1]) * grid.step <= bound


def test_an_update_under_shares_is_minus_the_learning_rate_times_the_gradient_to_the_last_step_of_the_grid(authors):
    p, (made, plan) = authors, shared(authors)
    leaves = p.bench.leaves([p.bench.start()])
    (released,), _, _ = PrivateGradients(p.bench, task_of(p), [p.silos["s0"]], plan, [{}]).released(leaves, 0)
    update = moved(p, plan, p.silos["s0"])
    assert np.abs(flat(update) + LR * flat(released)).max() < 1e-3 * made.stages()[-1].step
    assert flat(update).any()


def test_nothing_beside_the_delta_leaves_where_noise_covers_units_one_by_one(authors):
    made, plan = shared(authors)
    with_loss = Update(as_part("delta", authors.bench.start()) | {("metric", "loss"): np.array([3.0])}, silo="s0")
    with pytest.raises(GuaranteeError, match="metric"):
        chain(*made.stages()).encode(with_loss, task_of(authors))


@pytest.mark.parametrize("wrong", [
    {"optimizer": "adamw"}, {"momentum": 0.9}, {"weight_decay": 0.1}, {"max_grad_norm": 1.0}, {"steps": 2},
    {"schedule": "cosine"}, {"warmup": 1}, {"lr": 0.6},
])  # fmt: skip
def test_whatever_is_not_one_step_of_plain_sgd_is_refused_under_shares(authors, wrong):
    _, plan = shared(authors)
    with pytest.raises(GuaranteeError, match=f"plain SGD.*{next(iter(wrong))}"):
        replace(plan, **wrong)


def test_units_are_drawn_by_secret_coins_under_shares_too(authors):
    _, plan = shared(authors, rate=0.3)
    real = replace(plan, privacy=replace(plan.privacy, source=SystemSource()))
    assert len({flat(moved(authors, real, authors.silos["s0"])).tobytes() for _ in range(5)}) > 1


def test_units_go_through_whole():
    units = [np.arange(n) for n in (3, 4, 10, 1, 1)]
    assert [[len(u) for u in one] for one in in_passes(units, 8)] == [[3, 4], [10], [1, 1]]
    assert in_passes([], 8) == []


def test_a_unit_with_too_many_rows_brings_some_at_random():
    units = Units(np.array([0, 0, 0, 0, 1]), np.arange(2, dtype=np.uint64))
    drawn = {tuple(units.rows(0, 2, np.random.default_rng(i))) for i in range(50)}
    assert len(drawn) == 6 and list(units.rows(1, 2, np.random.default_rng(0))) == [4]


def test_poisson_batches_have_the_stated_mean_and_spread():
    p = place(privacy={"rate": 0.3})
    silo, steps = p.silos["s0"], replace(p.plan.privacy, source=SimulatedSource(9))
    gradients = PrivateGradients(p.bench, task_of(p), [silo], replace(p.plan, privacy=steps), [{}])
    sizes = [len(gradients._draw(0, at, SystemSource().generator("x"))) for at in range(300)]
    n = len(silo.units)
    assert np.mean(sizes) == pytest.approx(0.3 * n, abs=5 * (0.21 * n / 300) ** 0.5)
    assert np.var(sizes) == pytest.approx(0.21 * n, rel=0.4)
