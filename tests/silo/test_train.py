"""Local training against plain PyTorch, its limits, and what silos keep to themselves."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from foedus import tree
from foedus.algorithms import FedAvg, FedProx
from foedus.errors import SiloError
from foedus.lm.adapters import LoRA, attach
from foedus.lm.bench import Bench
from foedus.lm.load import load_base
from foedus.lm.objectives import make_objective
from foedus.silo import LocalPlan, Silo
from foedus.silo.train import train
from foedus.types import Task

from ..conftest import WORDS, sentences

PLAN = LocalPlan(lr=0.01, batch=4, steps=3)


@pytest.fixture(scope="module")
def bench() -> Bench:
    base = load_base("tiny:llama")
    attach(base, LoRA(rank=4), 0)
    return Bench(base, make_objective("causal-lm", 24), precision="fp32")


@pytest.fixture(scope="module")
def silos(bench) -> list[Silo]:
    def encode(domain):
        return bench.objective.encode(pa.table({"text": sentences(domain, 20)}), bench.base.tokenizer)

    return [Silo(domain, {"train": encode(domain)}) for domain in WORDS]


def task(bench, round=0) -> Task:
    return Task(round, "", bench.start(), tuple(WORDS), 7)


def moved(bench, trained) -> float:
    return tree.norm(tree.minus(trained.params, bench.start()))


def by_hand(bench, silo, plan: LocalPlan, rounds: int = 1) -> dict[str, np.ndarray]:
    """The same steps with torch.optim on one silo's parameters and nothing of ours but the loss."""
    params = {name: torch.from_numpy(x[None]).requires_grad_() for name, x in bench.start().items()}
    cls = torch.optim.AdamW if plan.optimizer == "adamw" else torch.optim.SGD
    optimizer = cls(params.values(), lr=plan.lr, weight_decay=plan.weight_decay)
    for round in range(rounds):
        for step in range(plan.steps):
            batch = bench.objective.collate(
                silo.splits["train"], silo.rows(7, round, step, plan.batch, plan.steps, None), 0
            )
            sums, counts = bench.losses(params, [batch])
            optimizer.zero_grad()
            (sums[0] / counts[0]).backward()
            optimizer.step()
    return {name: x[0].detach().numpy() for name, x in params.items()}


@pytest.mark.parametrize("plan", [PLAN, LocalPlan(lr=0.1, batch=4, steps=3, optimizer="sgd", weight_decay=0.01)])
def test_local_training_is_plain_pytorch(bench, silos, plan):
    (ours,) = train(bench, task(bench), silos[:1], plan, [{}])
    for name, x in by_hand(bench, silos[0], plan).items():
        np.testing.assert_allclose(
            ours.params[name], x, rtol=1e-3, atol=2e-3
        )  # a root near zero turns rounding into a step; steps are 1e-2


def test_a_kept_optimizer_goes_on_where_it_stopped(bench, silos):
    plan = LocalPlan(lr=0.01, batch=4, steps=2, keep=True)
    (first,) = train(bench, task(bench), silos[:1], plan, [{}])
    again = Task(1, "", first.params, tuple(WORDS), 7)
    (second,) = train(bench, again, silos[:1], plan, [first.memory])
    for name, x in by_hand(bench, silos[0], LocalPlan(lr=0.01, batch=4, steps=2), rounds=2).items():
        np.testing.assert_allclose(
            second.params[name], x, rtol=1e-3, atol=2e-3
        )  # a root near zero turns rounding into a step; steps are 1e-2
    (forgot,) = train(bench, again, silos[:1], LocalPlan(lr=0.01, batch=4, steps=2), [{}])
    assert not np.allclose(forgot.params[name], second.params[name], rtol=1e-4)


def test_fedprox_without_a_pull_is_fedavg_and_a_stronger_pull_stays_closer(bench, silos):
    plan = LocalPlan(lr=0.5, batch=4, steps=4, optimizer="sgd")
    (average,) = FedAvg(plan).train(bench, task(bench), silos[:1], [{}])
    (free,) = FedProx(plan, mu=0.0).train(bench, task(bench), silos[:1], [{}])
    for key, x in average[0].tensors.items():
        np.testing.assert_array_equal(x, free[0].tensors[key])
    far = [tree.norm(tree.part(FedProx(plan, mu=mu).train(bench, task(bench), silos[:1], [{}])[0][0].tensors, "delta"))
           for mu in (0.0, 0.3, 1.5)]  # fmt: skip
    assert far[0] > far[1] > far[2] > 0


def test_an_update_is_local_minus_global_and_weighs_its_examples(bench, silos):
    ((update, _),) = FedAvg(PLAN).train(bench, task(bench), silos[:1], [{}])
    (trained,) = train(bench, task(bench), silos[:1], PLAN, [{}])
    for name, start in bench.start().items():
        np.testing.assert_array_equal(update.tensors["delta", name], trained.params[name] - start)
    assert update.weight == len(silos[0].splits["train"])
    assert update.tensors["metric", "targets"][0] == trained.targets > 0


def test_each_silos_gradient_is_clipped_by_itself(bench, silos):
    plan = LocalPlan(lr=1.0, batch=4, steps=1, optimizer="sgd", max_grad_norm=1e-3)
    for silo in silos:
        (one,) = train(bench, task(bench), [silo], plan, [{}])
        assert moved(bench, one) == pytest.approx(1e-3, rel=1e-3)


def test_a_loss_that_explodes_names_the_silo(bench, silos):
    with pytest.raises(SiloError, match=f"NaN or infinity at {silos[0].name}.*Lower"):
        train(bench, task(bench), silos[:1], LocalPlan(lr=1e30, batch=4, steps=4, optimizer="sgd"), [{}])


def test_schedules_start_warm_fall_and_stay_positive():
    cosine = LocalPlan(lr=1.0, batch=1, steps=1, schedule="cosine", warmup=2, rounds=10)
    rates = [cosine.lr_at(r) for r in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert all(a > b for a, b in zip(rates[2:], rates[3:], strict=False)) and rates[-1] > 0
    linear = LocalPlan(lr=1.0, batch=1, steps=1, schedule="linear", rounds=4)
    assert [linear.lr_at(r) for r in range(4)] == pytest.approx([1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("wrong", [{"steps": None}, {"epochs": 1}, {"lr": 0.0}, {"batch": 0}])
def test_an_impossible_plan_is_refused(wrong):
    with pytest.raises(ValueError, match="Expected"):
        LocalPlan(**({"lr": 0.1, "batch": 4, "steps": 2} | wrong))
