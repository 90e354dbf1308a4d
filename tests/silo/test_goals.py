"""Local training on goals: plain and private, with heads, and with shifts of the gradient."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from foedus import tree
from foedus.errors import GuaranteeError
from foedus.kernels import fourier_map
from foedus.lm.adapters import LoRA, attach
from foedus.lm.bench import Bench
from foedus.lm.clipping import Clipping
from foedus.lm.heads import attach_head, is_head
from foedus.lm.load import load_base
from foedus.lm.objectives import Objective
from foedus.lm.terms import Denoise, Goal, MeanPull, Pull, Reversal, Topic
from foedus.silo import LocalPlan, Silo
from foedus.silo.private import PrivateGradients
from foedus.silo.shard import Units
from foedus.silo.train import train
from foedus.types import Task

from ..conftest import WORDS, sentences
from ..lm.test_per_example import clipped_by_hand
from .test_private import place, quiet

MAP = {-1: fourier_map(32, 24, (0.5, 1.0), 0)}
AIM = np.random.default_rng(0).standard_normal(24) / 5
GOAL = Goal(1.0, (Topic(0.5), Pull(1.0, MAP, AIM), Reversal(0.3, 1), Denoise(0.2, 0.3, 260)))
SGD = LocalPlan(lr=0.5, batch=6, steps=1, optimizer="sgd")


def headed(base):
    attach(base, LoRA(rank=2), 0)
    attach_head(base, "topics", (32, 8, 3), 0)
    attach_head(base, "domains", (32, 2), 0)
    return base


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(headed(load_base("tiny:llama")), Objective("causal-lm", 64, topics=tuple(WORDS)), precision="fp32")


@pytest.fixture(scope="module")
def silos(bench) -> list[Silo]:
    def encode(domain):
        table = pa.table({"text": sentences(domain, 20), "label": [domain] * 20})
        return bench.objective.encode(table, bench.base.tokenizer)

    return [Silo(domain, {"train": encode(domain)}) for domain in WORDS]


def task(bench, params=None) -> Task:
    return Task(0, "", params or bench.start(), tuple(WORDS), 7)


def scattered(bench):
    draw = np.random.default_rng(1)
    return {n: x + 0.05 * draw.standard_normal(x.shape).astype("f4") for n, x in bench.start().items()}


def batch_of(bench, silo, plan=SGD):
    rows = silo.rows(7, 0, 0, plan.batch, plan.steps, plan.epochs)
    return bench.objective.collate(silo.splits["train"], rows, 0)


def gradient(bench, params, batch, goal):
    leaves = bench.leaves([params])
    bench.totals(leaves, [batch], [goal])[0].sum().backward()
    return {name: np.zeros(x.shape[1:], "f4") if x.grad is None else x.grad[0].numpy() for name, x in leaves.items()}


def moved(trained, start):
    return {name: trained.params[name] - x for name, x in start.items()}


def test_one_silo_takes_one_step_along_the_gradient_of_its_goal(bench, silos):
    goal, start = Goal(1.0, (Topic(0.5), Pull(1.0, MAP, AIM), MeanPull(0.5, MAP, AIM))), scattered(bench)
    (ours,) = train(bench, task(bench, start), silos[:1], SGD, [{}], goals=[goal])
    for name, g in gradient(bench, start, batch_of(bench, silos[0]), goal).items():
        np.testing.assert_allclose(ours.params[name], start[name] - 0.5 * g, atol=1e-6)


def test_silos_with_different_goals_train_side_by_side_as_each_alone(bench, silos):
    goals, plan = [GOAL, Goal(), Goal(0.0, (Topic(1.0),))], replace(SGD, steps=2)
    together = train(bench, task(bench), silos, plan, [{}] * 3, goals=goals)
    for silo, goal, one in zip(silos, goals, together, strict=True):
        (alone,) = train(bench, task(bench), [silo], plan, [{}], goals=[goal])
        for name, x in alone.params.items():
            np.testing.assert_allclose(one.params[name], x, atol=2e-6)
        assert one.targets == alone.targets == (0 if goal.tokens == 0 else alone.targets)
    assert not any(x.any() for name, x in moved(together[1], bench.start()).items() if is_head(name))


def test_a_plans_goal_is_what_is_minimised_where_none_is_given(bench, silos):
    (by_plan,) = train(bench, task(bench), silos[:1], replace(SGD, goal=GOAL), [{}])
    (given,) = train(bench, task(bench), silos[:1], SGD, [{}], goals=[GOAL])
    assert all(np.array_equal(x, given.params[name]) for name, x in by_plan.params.items())


def test_with_plain_goals_every_number_is_that_of_a_model_without_heads(bench, silos):
    base = load_base("tiny:llama")
    attach(base, LoRA(rank=2), 0)
    bare = Bench(base, bench.objective, precision="fp32")
    plan = LocalPlan(lr=0.01, batch=4, steps=3, weight_decay=0.1, keep=True)
    for pull in (0.0, 0.3):
        ours = train(bench, task(bench), silos, plan, [{}] * 3, pull=pull)
        theirs = train(bare, task(bare), silos, plan, [{}] * 3, pull=pull)
        for one, other in zip(ours, theirs, strict=True):
            assert all(np.array_equal(one.params[name], x) for name, x in other.params.items())
            assert (one.loss, one.targets) == (other.loss, other.targets)


def test_the_topic_head_learns_which_silo_a_text_is_from(bench, silos):
    pooled = replace(silos[0], splits={"train": encoded_together(bench)}, shards=())
    plan = LocalPlan(lr=0.02, batch=24, steps=30)
    (trained,) = train(bench, task(bench), [pooled], plan, [{}], goals=[Goal(0.0, (Topic(1.0),))])
    batch = bench.objective.collate(pooled.splits["train"], range(len(pooled.splits["train"])), 0)
    seen = bench.see(trained.params, batch)
    found = seen.head("topics", seen.features()).argmax(1)
    assert (found == batch["topics"]).float().mean() > 0.9


def encoded_together(bench, count=20):
    texts = {domain: sentences(domain, count) for domain in WORDS}
    table = pa.table({"text": [t for each in texts.values() for t in each], "label": np.repeat(list(texts), count)})
    return bench.objective.encode(table, bench.base.tokenizer)


# ---- shifts ----


def shifts_of(bench, count):
    draw = np.random.default_rng(5)
    return [{n: draw.standard_normal(x.shape).astype("f4") for n, x in bench.start().items()} for _ in range(count)]


def test_a_shift_is_added_to_each_silos_gradient_after_its_clip(bench, silos):
    plan, shifts = replace(SGD, max_grad_norm=1e-3), shifts_of(bench, 3)
    shifted = train(bench, task(bench), silos, plan, [{}] * 3, shifts=shifts)
    free = train(bench, task(bench), silos, plan, [{}] * 3)
    for one, other, shift in zip(shifted, free, shifts, strict=True):
        assert tree.norm(moved(other, bench.start())) == pytest.approx(0.5e-3, rel=1e-3)
        for name, x in shift.items():
            np.testing.assert_allclose(one.params[name] - other.params[name], -0.5 * x, atol=1e-6)


def test_a_shift_is_added_after_the_noise(p):
    plan = replace(p.plan, optimizer="sgd", lr=0.5, steps=1, privacy=replace(p.plan.privacy, steps=1))
    (shift,) = shifts_of(p.bench, 1)
    asked = Task(0, p.base.digest, p.bench.start(), tuple(p.silos), 5)
    one, other = (train(p.bench, asked, [p.silos["s0"]], plan, [{}], shifts=x)[0] for x in ([shift], None))
    for name, x in shift.items():
        np.testing.assert_allclose(one.params[name] - other.params[name], -0.5 * x, atol=2e-6)


def test_shifts_under_shares_of_noise_are_refused(p):
    plan = replace(p.plan, lr=0.1, steps=1, optimizer="sgd", privacy=replace(p.plan.privacy, lr=0.1, steps=1))
    asked = Task(0, p.base.digest, p.bench.start(), tuple(p.silos), 5)
    with pytest.raises(GuaranteeError, match="a shift of every gradient"):
        train(p.bench, asked, [p.silos["s0"]], plan, [{}], shifts=shifts_of(p.bench, 1))


# ---- private steps ----


@pytest.fixture(scope="module")
def p():
    return place()


@pytest.fixture(scope="module")
def private(bench, silos):
    """The place's plan on a bench with heads."""
    encoded = encoded_together(bench, 4)
    units = Units(encoded.documents, np.arange(encoded.documents.max() + 1, dtype=np.uint64))
    plan = place().plan
    plan = replace(plan, privacy=replace(plan.privacy, parts=replace(plan.privacy.parts, of={})))
    return bench, Silo("s0", {"train": encoded}, units=units), plan


def step(bench, silo, plan, goal):
    leaves = bench.leaves([scattered(bench)])
    gradients = PrivateGradients(bench, task(bench), [silo], plan, [{}], [goal])
    gradients.fill(leaves, 0)
    return {name: x.grad[0].numpy() for name, x in leaves.items()}


def test_a_private_step_is_the_sum_of_the_units_clipped_gradients_of_the_goal(private):
    bench, silo, plan = private
    goal, plan = Goal(1.0, (Topic(0.5), Pull(1.0, MAP, AIM))), quiet(plan, rate=1.0, rows=100)
    rows = np.argsort(silo.units.of, kind="stable")
    batch, owners = bench.objective.collate(silo.splits["train"], rows, 0), silo.units.of[rows]
    found = [
        {n: torch.from_numpy(x) for n, x in gradient(bench, scattered(bench), pick(batch, owners == u), goal).items()}
        for u in range(len(silo.units))
    ]
    wanted, _ = clipped_by_hand(found, Clipping(plan.privacy.parts.norms))
    for name, x in step(bench, silo, plan, goal).items():
        np.testing.assert_allclose(x * plan.privacy.divisor, wanted[name].numpy(), atol=2e-5)


def pick(batch, chosen):
    return {name: x[torch.from_numpy(chosen)] for name, x in batch.items()}


def test_how_many_rows_go_through_at_once_changes_no_goal(private):
    bench, silo, plan = private
    goal, plan = Goal(1.0, (Topic(0.5), Pull(1.0, MAP, AIM))), quiet(plan, rate=1.0, rows=100)
    whole = step(bench, silo, plan, goal)
    for rows in (1, 5):
        for name, x in step(bench, silo, replace(plan, rows=rows), goal).items():
            np.testing.assert_allclose(x, whole[name], rtol=2e-4, atol=2e-6)


def test_heads_get_noise_like_all_others_even_when_no_term_asks_them(private):
    bench, silo, plan = private
    released = step(bench, silo, plan, Goal())
    heads = np.concatenate([x.ravel() for name, x in released.items() if is_head(name)])
    assert np.std(heads) == pytest.approx(
        plan.privacy.multipliers[0] * plan.privacy.parts.norms[0] / plan.privacy.divisor, rel=0.15
    )


def test_a_goal_that_mixes_rows_cannot_be_trained_privately(private):
    bench, silo, plan = private
    with pytest.raises(GuaranteeError, match="MeanPull"):
        train(bench, task(bench), [silo], plan, [{}], goals=[Goal(1.0, (MeanPull(1.0, MAP, AIM),))])


def test_a_private_round_on_a_goal_stays_finite_and_moves_the_heads(private):
    bench, silo, plan = private
    (one,) = train(bench, task(bench), [silo], plan, [{}], goals=[GOAL])
    assert all(np.isfinite(x).all() for x in one.params.values()) and math.isfinite(one.loss)
    assert all(x.any() for name, x in moved(one, bench.start()).items() if is_head(name))
