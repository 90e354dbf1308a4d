"""Federated DANN: which way each part moves, how fast the reversal sets in, and its limit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional as F

from foedus import tree
from foedus.algorithms.fedavg import FedAvg
from foedus.algorithms.reversal import Dann, reversed_by
from foedus.errors import SiloError
from foedus.lm.adapters import LoRA, attach
from foedus.lm.bench import Bench
from foedus.lm.heads import attach_head, head, is_head, width
from foedus.lm.load import load_base
from foedus.lm.objectives import make_objective
from foedus.lm.terms import Goal
from foedus.silo import LocalPlan, Silo
from foedus.types import Task

from ..conftest import WORDS, sentences
from .test_udalm import never_zero, pooled

NAMES = tuple(WORDS)
PLAN = LocalPlan(lr=1.0, batch=64, epochs=1, optimizer="sgd", rounds=10)  # each step on the whole text


@pytest.fixture(scope="module")
def bench() -> Bench:
    base = load_base("tiny:llama")
    attach(base, LoRA(rank=2), 0)
    attach_head(base, "domains", (width(base), 8, len(NAMES)), 0)
    never_zero(base)
    return Bench(base, make_objective("causal-lm", 24), precision="fp32")


@pytest.fixture(scope="module")
def silos(bench) -> list[Silo]:
    def encode(domain):
        return bench.objective.encode(pa.table({"text": sentences(domain, 8)}), bench.base.tokenizer)

    return [Silo(domain, {"train": encode(domain)}) for domain in NAMES]


def deltas(algorithm, bench, silos, round: int = 0) -> list[dict[str, np.ndarray]]:
    answers = algorithm.train(bench, Task(round, "", bench.start(), NAMES, 0), silos, [{} for _ in silos])
    return [tree.part(update.tensors, "delta") for update, _ in answers]


def split(delta) -> tuple[dict, dict]:
    """What moved in the head, and in the features."""
    return {n: x for n, x in delta.items() if is_head(n)}, {n: x for n, x in delta.items() if not is_head(n)}


def alone(weight: float = 1.0, **plan) -> Dann:
    """The discriminator with nothing beside it."""
    return Dann(replace(PLAN, goal=Goal(0.0), **plan), NAMES, weight)


def whole(bench, silo) -> dict[str, torch.Tensor]:
    return bench.objective.collate(silo.splits["train"], np.arange(silo.examples), 0)


def told_apart(scores, label: int) -> torch.Tensor:
    return F.cross_entropy(scores, torch.full((len(scores),), label))


def losses(bench, params, silo, label: int) -> float:
    with torch.no_grad():
        seen = bench.see(params, whole(bench, silo))
        return float(told_apart(seen.head("domains", seen.features()), label))


def test_the_head_learns_the_silo_and_the_features_unlearn_it(bench, silos):
    for k, delta in enumerate(deltas(alone(lr=0.01), bench, silos, 5)):
        start = bench.start()
        before = losses(bench, start, silos[k], k)
        learned, hidden = ({name: x + part.get(name, 0) for name, x in start.items()} for part in split(delta))
        assert losses(bench, learned, silos[k], k) < before < losses(bench, hidden, silos[k], k)


def test_a_step_of_everybody_is_the_equation_of_ganin_and_lempitsky(bench, silos):
    """θ_d ← θ_d − ∂L_d/∂θ_d and θ_f ← θ_f − (∂L_y/∂θ_f − λ ∂L_d/∂θ_f), L_d over the texts of all silos."""
    ours = deltas(Dann(PLAN, NAMES, 1.0), bench, silos, 2)
    named = {name: p for name, p in bench.model.named_parameters() if p.requires_grad}
    told, said = [], []
    for k, silo in enumerate(silos):
        nll, features = pooled(bench, whole(bench, silo))
        told.append(told_apart(head(bench, "domains")(features), k))
        said.append(nll)
    l_d, l_y = (torch.stack(x).mean() for x in (told, said))
    both = [torch.autograd.grad(x, list(named.values()), retain_graph=True, allow_unused=True) for x in (l_d, l_y)]
    strength = reversed_by(2 / PLAN.rounds)
    for name, d, y in zip(named, *both, strict=True):
        expected = -d if is_head(name) else -(y - strength * d)
        moved = np.mean([delta[name] for delta in ours], axis=0)
        np.testing.assert_allclose(moved, expected.numpy(), rtol=1e-3, atol=2e-6)


def test_in_the_first_round_the_head_learns_and_the_features_are_let_be(bench, silos):
    for delta in deltas(alone(), bench, silos, 0):
        learned, hidden = split(delta)
        assert tree.norm(learned) > 0 and tree.norm(hidden) == 0


def test_the_reversal_sets_in_as_published():
    rates = [reversed_by(p) for p in (0.0, 0.1, 0.25, 0.5, 1.0)]
    assert rates == pytest.approx([0.0, np.tanh(0.5), np.tanh(1.25), np.tanh(2.5), np.tanh(5.0)])  # the same curve


def test_the_features_move_in_proportion_to_the_reversal(bench, silos):
    early, late = (split(deltas(alone(), bench, silos[:1], round)[0])[1] for round in (1, 9))
    ratio = reversed_by(0.9) / reversed_by(0.1)
    for name, x in early.items():
        np.testing.assert_allclose(late[name], ratio * x, rtol=2e-2, atol=1e-6)


def test_without_weight_it_is_fedavg(bench, silos):
    ours, plain = (deltas(a, bench, silos, 5) for a in (Dann(PLAN, NAMES, 0.0), FedAvg(PLAN)))
    for mine, theirs in zip(ours, plain, strict=True):
        for name, x in mine.items():
            np.testing.assert_array_equal(x, theirs[name])


def test_a_silo_that_the_discriminator_does_not_know_is_refused(bench, silos):
    with pytest.raises(SiloError, match="discriminator knows.*medicin.*Did you mean"):
        deltas(Dann(PLAN, NAMES), bench, [replace(silos[0], name="medicin", shards=silos[0].shards)])


@pytest.mark.parametrize("wrong", [{"weight": -1.0}, {"domains": ("a", "a")}])
def test_an_impossible_setting_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Dann(**({"local": PLAN, "domains": NAMES} | wrong))
