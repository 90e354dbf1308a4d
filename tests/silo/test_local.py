"""Silos that train alone: each goes on from where it was, sends zeros, and answers with what it has itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from foedus import tree
from foedus.algorithms.fedavg import FedAvg
from foedus.algorithms.local import Alone
from foedus.engines.base import Ask
from foedus.errors import GuaranteeError
from foedus.privacy.noise import SimulatedSource
from foedus.privacy.plan import Terms, make_plan
from foedus.silo.train import LocalPlan
from foedus.types import Task
from foedus.wire import pack_task, unpack

from .quadratics import optimum, rounds, silos
from .test_private import place

SGD = LocalPlan(lr=0.2, batch=12, epochs=20, optimizer="sgd")


def test_each_silo_ends_in_its_own_optimum_and_the_model_stays():
    whom = silos()
    *_, (state, engine) = rounds(Alone(SGD), whom, 8)
    assert not state.params["w"].any()
    for name, silo in whom.items():
        np.testing.assert_allclose(engine.memory[name]["own", "w"], optimum({name: silo}), rtol=0, atol=2e-3)


def test_a_silo_alone_is_a_federation_of_one():
    whom = silos()
    *_, (_, engine) = rounds(Alone(SGD), whom, 2)
    for name, silo in whom.items():
        *_, (state, _) = rounds(FedAvg(SGD), {name: silo}, 2)
        np.testing.assert_allclose(engine.memory[name]["own", "w"], state.params["w"], rtol=1e-12)


@pytest.fixture(scope="module")
def p():
    return place(silos=2, split={"validation": 0.2, "test": 0.0})


def after(p, algorithm, count: int) -> dict[str, dict]:
    """The silos' memories after so many rounds; what they sent is zero."""
    memories: dict[str, dict] = {name: {} for name in p.silos}
    for round in range(count):
        task = Task(round, p.base.digest, p.bench.start(), tuple(p.silos), 5)
        answers = algorithm.train(p.bench, task, list(p.silos.values()), list(memories.values()))
        for name, (update, memory) in zip(p.silos, answers, strict=True):
            memories[name] = memory
            assert tree.norm(tree.part(update.tensors, "delta")) == 0
            sent = {key: x.shape for key, x in update.tensors.items() if key[0] != "metric"}
            assert sent == algorithm.parts({name: x.shape for name, x in p.bench.start().items()})
    return memories


def test_private_steps_go_on_from_round_to_round_with_noise_of_their_own(p):
    memories = after(p, Alone(p.plan), 2)
    moved = [tree.norm(tree.minus(tree.part(memory, "own"), p.bench.start())) for memory in memories.values()]
    once = [tree.norm(tree.minus(tree.part(m, "own"), p.bench.start())) for m in after(p, Alone(p.plan), 1).values()]
    assert all(b > a > 0 for a, b in zip(once, moved, strict=True))
    assert moved[0] != moved[1]


def test_what_private_steps_and_optimizers_remember_stays_beside_it():
    q = place(privacy={"quantile": 0.5, "max_norm": 1e-4})
    algorithm = Alone(replace(q.plan, keep=True))
    (memory,) = after(q, algorithm, 2).values()
    assert {key for key, _ in memory} == {"own", "private factor", "step", "exp_avg", "exp_avg_sq"}
    assert memory["private factor", ""][0] > 1.1
    assert next(x for (key, _), x in memory.items() if key == "step") == 6


def test_a_silo_answers_with_its_own_parameters_and_with_the_models_before_it_has_some(p):
    algorithm = Alone(p.plan)
    engine = p.engine(rules=replace(p.federation, algorithm=algorithm))
    task = pack_task(Task(0, p.base.digest, p.bench.start(), tuple(p.silos), 5))

    def figures(engine) -> list[dict]:
        return [unpack(r.payload)[0] for r in engine.ask([Ask("evaluate", s, task, "validation") for s in p.silos])]

    before = figures(engine)
    assert before == figures(p.engine())
    engine.memory.update(after(p, algorithm, 2))
    assert all(a != b for a, b in zip(before, figures(engine), strict=True))
    mine, batch = engine.memory["s0"], p.bench.objective.collate(p.silos["s0"].splits["validation"], [0, 1], 0)
    found = algorithm.scores(p.bench, p.bench.start(), p.silos["s0"], batch, mine)
    np.testing.assert_array_equal(found["nll"], p.bench.scores(tree.part(mine, "own"), batch)["nll"])


def test_shares_of_noise_are_refused_since_they_would_be_added_to_zeros():
    terms = Terms(
        "example", 1e-5, 3, noise_multiplier=1.0, max_norm=0.01, divisor=6.0, lr=0.5, silos=4, expected=4,
        placement="shared", minimum=3, colluding=1, parties=4, discrete=True, word=32,
    )  # fmt: skip
    steps = make_plan(terms, SimulatedSource(1)).steps_at_silos(["w"])
    with pytest.raises(GuaranteeError, match="noise of their own"):
        Alone(LocalPlan(lr=0.5, batch=6, steps=1, optimizer="sgd", privacy=steps))
