"""SCAFFOLD and DP-SCAFFOLD: the papers' equations over the real loop, and what each side keeps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from foedus import loop, tree
from foedus.algorithms.fedavg import FedAvg
from foedus.algorithms.fedprox import FedProx
from foedus.algorithms.scaffold import Scaffold
from foedus.build import build
from foedus.errors import TreatyError
from foedus.privacy.noise import SimulatedSource
from foedus.privacy.plan import Terms, make_plan
from foedus.server import FixedSize
from foedus.silo.private import PrivateGradients
from foedus.silo.train import LocalPlan
from foedus.treaty import from_dict
from foedus.types import Task

from ..conftest import rows
from .quadratics import Quadratics, optimum, rounds, silos
from .test_private import place

SGD = LocalPlan(lr=0.05, batch=12, epochs=20, optimizer="sgd")


def last(algorithm, whom, count, **more) -> np.ndarray:
    return [state for state, _ in rounds(algorithm, whom, count, **more)][-1].params["w"]


def controls(engine) -> dict[str, np.ndarray]:
    return {name: memory["control", "w"] for name, memory in engine.memory.items()}


# ---- the papers' claims ----


def test_where_silos_differ_fedavg_settles_beside_the_optimum_and_scaffold_in_it():
    whom = silos()
    best = optimum(whom)
    average = [state.params["w"] for state, _ in rounds(FedAvg(SGD), whom, 12)]
    assert np.linalg.norm(average[-1] - average[-2]) < 1e-3  # it has settled
    assert np.linalg.norm(average[-1] - best) > 0.1
    assert np.linalg.norm(last(Scaffold(SGD), whom, 14) - best) < 1e-3


def test_weighed_silos_settle_in_the_weighted_optimum():
    whom = silos(sizes=(6, 12, 24))
    sizes = [silo.examples for silo in whom.values()]
    ends = last(Scaffold(replace(SGD, batch=24)), whom, 14, weighting="examples")
    assert np.linalg.norm(ends - optimum(whom, sizes)) < 5e-3
    assert np.linalg.norm(ends - optimum(whom)) > 0.02


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_one_step_of_everybody_is_descent_on_the_mean_loss(schedule):
    whom, plan = silos(), replace(SGD, epochs=1, schedule=schedule, rounds=8)
    w = np.zeros(3)
    for round, (state, engine) in enumerate(rounds(Scaffold(plan), whom, 8)):
        gradients = {name: silo.splits["train"].gradient(w) for name, silo in whom.items()}
        w = w - plan.lr_at(round) * np.mean([*gradients.values()], axis=0)
        np.testing.assert_allclose(state.params["w"], w, rtol=1e-9)
        for name, control in controls(engine).items():
            np.testing.assert_allclose(control, gradients[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 20])
def test_a_silo_alone_needs_no_correction(steps):
    whom, plan = silos(1), replace(SGD, epochs=steps)
    np.testing.assert_allclose(last(Scaffold(plan), whom, 10), last(FedAvg(plan), whom, 10), rtol=1e-9)


def test_controls_of_zero_are_fedavg():
    bench, whom = Quadratics(), silos()
    for round in (0, 3):
        task = Task(round, "", bench.start(), tuple(whom), 0, extra=Scaffold(SGD).extra(bench.start()))
        ours = Scaffold(SGD).train(bench, task, [*whom.values()], [{}] * 4)
        plain = FedAvg(SGD).train(bench, task, [*whom.values()], [{}] * 4)
        for (mine, _), (theirs, _) in zip(ours, plain, strict=True):
            np.testing.assert_array_equal(mine.tensors["delta", "w"], theirs.tensors["delta", "w"])


def test_a_pull_of_zero_is_fedavg_in_every_round():
    whom = silos()
    np.testing.assert_array_equal(last(FedProx(SGD, mu=0.0), whom, 5), last(FedAvg(SGD), whom, 5))


# ---- what is kept where ----


def test_the_server_keeps_the_mean_of_what_the_silos_keep():
    for state, engine in rounds(Scaffold(SGD), silos(), 8):
        np.testing.assert_allclose(
            state.extra["control", "w"], np.mean([*controls(engine).values()], axis=0), rtol=0, atol=1e-12
        )


def test_the_mean_is_weighted_where_silos_weigh_their_examples():
    whom = silos(sizes=(6, 12, 24))
    sizes = [silo.examples for silo in whom.values()]
    for state, engine in rounds(Scaffold(replace(SGD, batch=24)), whom, 8, weighting="examples"):
        kept = np.average([controls(engine)[name] for name in whom], axis=0, weights=sizes)
        np.testing.assert_allclose(state.extra["control", "w"], kept, rtol=0, atol=1e-12)


def test_silos_that_were_not_asked_count_with_what_they_last_had():
    whom = silos()
    for state, engine in rounds(Scaffold(SGD, share=0.5), whom, 8, sampler=FixedSize(2), seed=1):
        known = [controls(engine).get(name, np.zeros(3)) for name in whom]
        np.testing.assert_allclose(state.extra["control", "w"], np.mean(known, axis=0), rtol=0, atol=1e-12)


def test_a_newcomer_trains_beside_silos_with_controls():
    bench, whom, algorithm = Quadratics(), list(silos(2).values()), Scaffold(SGD)
    task = Task(1, "", bench.start(), ("s0", "s1"), 0, extra=algorithm.extra(bench.start()))
    memories = [{("control", "w"): np.ones(3)}, {}]
    together = algorithm.train(bench, task, whom, memories)
    for silo, memory, (update, _) in zip(whom, memories, together, strict=True):
        ((alone, _),) = algorithm.train(bench, task, [silo], [memory])
        np.testing.assert_allclose(update.tensors["delta", "w"], alone.tensors["delta", "w"], rtol=1e-12)


def test_warm_rounds_move_controls_and_not_the_model():
    whom = silos()
    path = [(state, controls(engine)) for state, engine in rounds(Scaffold(SGD, warm=2), whom, 3)]
    plain = [state.params["w"] - 0 for state, _ in rounds(FedAvg(SGD), whom, 1)]
    for state, kept in path[:2]:
        assert not state.params["w"].any()
        np.testing.assert_allclose(state.extra["control", "w"], np.mean([*kept.values()], axis=0), atol=1e-12)
        np.testing.assert_allclose(state.extra["control", "w"], -plain[0] / (20 * SGD.lr), rtol=1e-9)
    assert path[2][0].params["w"].any()
    ahead, behind = (np.linalg.norm(last(Scaffold(SGD, warm=n), whom, 1 + n) - optimum(whom)) for n in (1, 0))
    assert ahead < behind


# ---- private steps ----


def private(z: float, norm: float, steps: int, units: int):
    terms = Terms("example", 1e-5, 10, noise_multiplier=z, max_norm=norm, rate=1.0, divisor=float(units), steps=steps)
    steps_at = make_plan(terms, SimulatedSource(0)).steps_at_silos(["w"])
    return LocalPlan(lr=0.05, batch=units, steps=steps, optimizer="sgd", privacy=steps_at)


def test_without_noise_and_clip_dp_scaffold_is_scaffold():
    whom = silos()
    ours = last(Scaffold(private(1e-9, 1e6, 5, 12)), whom, 10)
    np.testing.assert_allclose(ours, last(Scaffold(replace(SGD, epochs=5)), whom, 10), rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def p():
    return place(silos=3, local={"steps": 3, "batch": 6, "optimizer": "sgd", "lr": 0.1})


def test_a_control_is_the_mean_of_the_noisy_gradients_that_its_silo_stepped_along(p, monkeypatch):
    seen: list[dict[str, np.ndarray]] = []
    fill = PrivateGradients.fill

    def filled(self, leaves, step):
        out = fill(self, leaves, step)
        seen.append({name: x.grad.double().numpy().copy() for name, x in leaves.items()})
        return out

    monkeypatch.setattr(PrivateGradients, "fill", filled)
    algorithm = Scaffold(p.plan)
    whom, memories = list(p.silos.values()), [{}] * 3
    extra, params = algorithm.extra(p.bench.start()), p.bench.start()
    for round in range(3):
        seen.clear()
        task = Task(round, p.base.digest, params, tuple(p.silos), 5, extra=extra)
        answers = algorithm.train(p.bench, task, whom, memories)
        memories = [memory for _, memory in answers]
        mean = tree.scale(tree.total(update.tensors for update, _ in answers), 1 / 3)
        extra = algorithm.finish(extra, mean)
        params = {name: (x + mean["delta", name]).astype(np.float32) for name, x in params.items()}
        for k, memory in enumerate(memories):
            for name in params:
                stepped = np.mean([one[name][k] for one in seen], axis=0)
                np.testing.assert_allclose(memory["control", name], stepped, rtol=1e-4, atol=1e-5)
        for name in params:
            kept = np.mean([memory["control", name] for memory in memories], axis=0)
            np.testing.assert_allclose(extra["control", name], kept, rtol=0, atol=1e-6)
    assert len(seen) == 3 and tree.norm(extra) > 0


def test_an_update_has_the_parts_that_it_announces(p):
    algorithm = Scaffold(p.plan)
    start = p.bench.start()
    task = Task(0, p.base.digest, start, tuple(p.silos), 5, extra=algorithm.extra(start))
    ((update, _),) = algorithm.train(p.bench, task, [p.silos["s0"]], [{}])
    sent = {key: x.shape for key, x in update.tensors.items() if key[0] != "metric"}
    assert sent == algorithm.parts({name: x.shape for name, x in start.items()})
    delta, control = (tree.norm(tree.part(update.tensors, name)) for name in ("delta", "control"))
    assert control == pytest.approx(delta, rel=1e-3)  # from zero controls both are the path that was gone


def test_a_control_lives_beside_what_private_steps_remember():
    q = place(privacy={"quantile": 0.5, "max_norm": 1e-4}, local={"steps": 3, "batch": 6, "optimizer": "sgd"})
    algorithm, memory = Scaffold(q.plan), {}
    for round in range(2):
        task = Task(round, "", q.bench.start(), ("s0",), 5, extra=algorithm.extra(q.bench.start()))
        ((_, memory),) = algorithm.train(q.bench, task, [q.silos["s0"]], [memory])
        assert {key for key, _ in memory} == {"control", "private factor"}
    assert memory["private factor", ""][0] > 1.1


def test_controls_are_summed_under_masks_on_the_grid_of_the_update():
    ends = []
    for sums in ("open", "masked"):
        treaty = from_dict({
            "treaty": {"name": "t", "seed": 5}, "model": {"base": "tiny:llama", "max_length": 16},
            "adapter": {"rank": 2, "targets": "attention"}, "algorithm": {"name": "scaffold", "rounds": 2},
            "local": {"steps": 2, "batch": 4, "optimizer": "sgd", "lr": 0.1}, "data": {"source": "memory"},
            "server": {"weighting": "uniform"}, "secure": {"sums": sums, **({"word": 64} if sums == "masked" else {})},
        })  # fmt: skip
        q = build(treaty, {f"s{i}": rows(4, seed=i) for i in range(3)})
        engine = q.engine()
        *_, (state, _) = loop.run(q.federation, engine, loop.start(q.federation, q.bench.start()))
        ends.append(state)
        for (part, name), x in state.extra.items():
            kept = np.mean([memory[part, name] for memory in engine.memory.values()], axis=0)
            np.testing.assert_allclose(x, kept, rtol=0, atol=1e-6)
    for key, x in ends[0].extra.items():
        np.testing.assert_allclose(ends[1].extra[key], x, rtol=0, atol=1e-6)
    assert tree.norm(ends[0].extra) > 0.1


# ---- what is refused ----


@pytest.mark.parametrize("wrong", [
    {"optimizer": "adamw"}, {"momentum": 0.9}, {"weight_decay": 0.005}, {"max_grad_norm": 1.0},
])  # fmt: skip
def test_steps_whose_path_is_not_the_mean_gradient_are_refused(wrong):
    with pytest.raises(TreatyError, match=f"expected plain SGD.*{next(iter(wrong))}.*Set \\[local\\]"):
        Scaffold(replace(SGD, **wrong))


def test_shares_of_noise_are_refused_since_they_do_not_cover_the_controls():
    terms = Terms(
        "example", 1e-5, 3, noise_multiplier=1.0, max_norm=0.01, divisor=6.0, lr=0.5, silos=4, expected=4,
        placement="shared", minimum=3, colluding=1, parties=4, discrete=True, word=32,
    )  # fmt: skip
    steps = make_plan(terms, SimulatedSource(1)).steps_at_silos(["w"])
    with pytest.raises(TreatyError, match="shares of noise"):
        Scaffold(LocalPlan(lr=0.5, batch=6, steps=1, optimizer="sgd", privacy=steps))


@pytest.mark.parametrize("wrong", [{"share": 0.0}, {"share": 1.1}, {"warm": -1}])
def test_an_impossible_setting_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Scaffold(SGD, **wrong)


def test_controls_keep_the_width_of_the_parameters(p):
    algorithm = Scaffold(p.plan)
    extra = algorithm.extra(p.bench.start())
    moved = algorithm.finish(extra, {key: np.ones(x.shape) for key, x in extra.items()})
    assert {x.dtype for x in (*extra.values(), *moved.values())} == {np.dtype(np.float32)}
    assert torch.get_default_dtype() == torch.float32
