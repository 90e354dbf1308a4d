"""What the reliability checklist asks for and no other test holds; `docs/checklist.md` says which item each is for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from foedus.audit.checks import only
from foedus.build import build, privacy_plan, privacy_terms
from foedus.data import bound_contributions
from foedus.errors import DataError
from foedus.lm.adapters import LoRA, load_params, save_adapter
from foedus.lm.bench import Bench
from foedus.lm.clipping import Clipping
from foedus.lm.load import load_base
from foedus.privacy import accountant, events
from foedus.privacy.noise import SystemSource
from foedus.privacy.plan import facts
from foedus.privacy.statement import statement
from foedus.privacy.steps import PrivateSteps
from foedus.silo.private import PrivateGradients
from foedus.silo.train import train
from foedus.treaty import Treaty, from_dict, not_covered
from foedus.types import Task

from ..conftest import rows

KINDS = {
    "whole": {}, "layers": {"clipping": "layers"}, "factors": {"clipping": "factors", "shares": [0.3, 0.7]},
    "quantile": {"quantile": 0.5}, "correlated": {"bands": 3},
}  # fmt: skip


def treaty(base: str = "tiny:llama", task: str = "causal-lm", **sections) -> Treaty:
    privacy = {"unit": "example", "noise_multiplier": 1.0, "rate": 0.2, "randomness": "simulated"}
    return from_dict({
        "treaty": {"name": "t", "seed": 5}, "model": {"base": base, "task": task, "max_length": 16},
        "adapter": {"rank": 2, "targets": "attention"}, "algorithm": {"rounds": 3},
        "data": {"source": "memory", "author": "author", "label": "domain"},
        **sections, "local": {"steps": 3, "batch": 6} | sections.get("local", {}),
        "privacy": privacy | sections.get("privacy", {}),
    })  # fmt: skip


def place(count: int = 12, **sections):
    texts = [*rows(count), *({"text": word, "domain": "medicine"} for word in ("Yes", "No", "Well"))]
    return build(treaty(**sections), {"s": [{**row, "author": f"p{i % 7}"} for i, row in enumerate(texts)]})


def task_of(p, round: int = 0) -> Task:
    """A task at parameters where every one has a gradient."""
    random = np.random.default_rng(3)
    params = {n: (x + 0.05 * random.standard_normal(x.shape)).astype(np.float32) for n, x in p.bench.start().items()}
    return Task(round, p.base.digest, params, tuple(p.silos), 5)


@pytest.fixture(scope="module")
def p():
    return place()


def loud(plan, **changes):
    """A plan in which every unit is in every step with all its rows, and whose clip always bites."""
    steps = plan.privacy
    norms = tuple(1e-3 * norm for norm in steps.parts.norms)
    changes = {"rate": 1.0, "rows": 100, "period": 1, "parts": replace(steps.parts, norms=norms), **changes}
    return replace(plan, privacy=replace(steps, **changes))


def silent(plan, **changes):
    """The same with noise that is next to nothing."""
    return loud(plan, multipliers=tuple(1e-9 for _ in plan.privacy.multipliers), **changes)


def filled(p, plan, silo, step: int = 0) -> np.ndarray:
    """What a step releases, as one vector, times the divisor."""
    leaves = p.bench.leaves([task_of(p).params])
    PrivateGradients(p.bench, task_of(p), [silo], plan, [{}]).fill(leaves, step)
    return np.concatenate([x.grad.double().numpy().ravel() for x in leaves.values()]) * plan.privacy.divisor


def some(p, units):
    silo = p.silos["s"]
    return replace(silo, units=only(silo.units, list(units)))


# ---- clipping (items 3 to 7) ----


SQUARES = [0.0, 1e-45, 1e-30, 1e-6, 1.0, 3e7, 1e30, 3e38, math.inf, math.nan]


@settings(max_examples=200, deadline=None)
@given(st.tuples(*[st.sampled_from(SQUARES)] * 2), st.tuples(*[st.sampled_from([1e-6, 0.3, 1.0, 1e4])] * 2))
def test_clipped_norms_are_within_their_bounds_whatever_they_were(squares, norms):
    clipping = Clipping(norms, {"a": 0, "b": 1})
    factors = clipping.factors(torch.tensor([squares], dtype=torch.float32))[0].double().numpy()
    if not all(map(math.isfinite, squares)):
        assert not factors.any()
        return
    left = factors * np.sqrt(np.array(squares, np.float32).astype(np.float64))
    assert (left <= np.array(norms) * (1 + 1e-6)).all() and (factors <= 1).all()
    assert np.linalg.norm(left) <= clipping.bound * (1 + 1e-6)


def test_one_unit_in_the_place_of_another_moves_the_sum_by_at_most_twice_the_norm(p):
    plan = silent(p.plan)
    bound = plan.privacy.parts.norms[0]
    for gone, come in [(0, 9), (3, 10), (5, 11)]:
        apart = filled(p, plan, some(p, [1, 2, gone])) - filled(p, plan, some(p, [1, 2, come]))
        assert 0 < np.linalg.norm(apart) <= 2 * bound * (1 + 1e-3)


@pytest.mark.parametrize("base, task", [
    ("tiny:llama", "causal-lm"), ("tiny:gpt2", "causal-lm"), ("tiny:bert", "masked-lm"),
    ("tiny:bert", "sequence-classification"),
])  # fmt: skip
def test_a_unit_adds_the_same_beside_short_and_long_ones(base, task):
    """Losses are means over a unit's own targets; a batch's number of targets bears on nobody."""
    p = place(base=base, task=task)
    inputs, units = p.silos["s"].splits["train"].inputs, p.silos["s"].units
    lengths = [sum(len(inputs[int(row)]) for row in np.flatnonzero(units.of == unit)) for unit in range(len(units))]
    short, long, mine = int(np.argmin(lengths)), int(np.argmax(lengths)), 4
    assert lengths[short] < lengths[long]
    plan = silent(p.plan)
    alone = filled(p, plan, some(p, [mine]))
    for other in {short, long} - {mine}:
        beside = filled(p, plan, some(p, sorted([mine, other]))) - filled(p, plan, some(p, [other]))
        assert np.linalg.norm(beside - alone) <= 1e-3 * plan.privacy.parts.norms[0]


def test_an_earlier_gradient_is_overwritten_and_not_added_to(p):
    leaves, stale = (p.bench.leaves([task_of(p).params]) for _ in range(2))
    for leaf in stale.values():
        leaf.grad = torch.full_like(leaf, 1e6)
    for these in (leaves, stale):
        PrivateGradients(p.bench, task_of(p), [p.silos["s"]], p.plan, [{}]).fill(these, 0)
    assert all(torch.equal(leaves[name].grad, stale[name].grad) for name in leaves)


@pytest.mark.parametrize("most", [1, 2, 100])
def test_noise_is_drawn_once_a_step_whatever_the_passes(p, monkeypatch, most):
    drawn, right = [], PrivateSteps.noise
    monkeypatch.setattr(PrivateSteps, "noise", lambda self, *a: drawn.append(1) or right(self, *a))
    filled(p, replace(loud(p.plan), rows=most), p.silos["s"])
    assert len(drawn) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_of_the_treaty_reaches_the_clip_in_every_way_of_clipping(kind, monkeypatch):
    p, seen, right = place(privacy={"max_norm": 0.25, **KINDS[kind]}), [], Bench.clipped
    monkeypatch.setattr(Bench, "clipped", lambda self, *a: seen.extend(a[3]) or right(self, *a))
    filled(p, p.plan, p.silos["s"])
    assert seen and all(clipping.bound == pytest.approx(0.25) for clipping in seen)
    assert all(clipping.parts == p.plan.privacy.parts.of for clipping in seen)


@pytest.mark.parametrize("local", [
    {"optimizer": "adamw", "weight_decay": 0.1}, {"optimizer": "sgd", "momentum": 0.9}, {"keep_optimizer": True},
], ids=str)  # fmt: skip
def test_training_learns_of_the_data_through_releases_alone(p, monkeypatch, local):
    """Two collections that have nothing in common train to the same parameters when their releases are the same."""
    plan = replace(place(local=local).plan, privacy=p.plan.privacy)
    random = np.random.default_rng(0)
    said = {name: random.standard_normal(x.shape).astype(np.float32) for name, x in p.bench.start().items()}
    monkeypatch.setattr(PrivateSteps, "released", lambda self, sums, noise: {n: said[n] for n in sums})
    trained = [train(p.bench, task_of(p), [some(p, units)], plan, [{}], pull=0.1)[0] for units in ([0, 1, 2], [9], [])]
    for other in trained[1:]:
        for name, x in trained[0].params.items():
            assert np.array_equal(x, other.params[name]), name
        assert trained[0].memory.keys() == other.memory.keys()
        assert all(np.array_equal(x, other.memory[key]) for key, x in trained[0].memory.items())


# ---- noise (items 8 and 9) ----


@pytest.mark.parametrize("norm, divisor, z", [(1.0, 6, 1.0), (0.2, 6, 1.0), (1.0, 60, 1.0), (1.0, 6, 4.0)])
def test_noise_is_multiplier_times_norm_over_the_public_divisor(norm, divisor, z):
    p = place(local={"batch": divisor}, privacy={"max_norm": norm, "noise_multiplier": z})
    leaves = p.bench.leaves([task_of(p).params])
    PrivateGradients(p.bench, task_of(p), [some(p, [])], p.plan, [{}]).fill(leaves, 0)
    released = np.concatenate([x.grad.numpy().ravel() for x in leaves.values()])
    assert np.std(released) == pytest.approx(z * norm / divisor, rel=5 / math.sqrt(2 * released.size))


def test_what_is_released_of_a_half_precision_model_is_float32_with_noise_in_every_bit(p):
    p = place(performance={"precision": "bf16"})
    leaves = p.bench.leaves([task_of(p).params])
    PrivateGradients(p.bench, task_of(p), [p.silos["s"]], p.plan, [{}]).fill(leaves, 0)
    for leaf in leaves.values():
        assert leaf.grad.dtype == torch.float32
        assert (leaf.grad != leaf.grad.bfloat16().float()).float().mean() > 0.9


# ---- sampling and accounting (items 12 to 18) ----


@pytest.mark.parametrize("cohort, hidden", [
    ({}, False), ({"sampling": "fixed", "size": 2}, False), ({"sampling": "poisson", "rate": 0.5}, False),
    ({"sampling": "poisson", "rate": 0.5}, True),
])  # fmt: skip
def test_only_secret_coins_earn_the_amplification_of_sampling(cohort, hidden):
    silo = {"unit": "silo", "noise_multiplier": 1.0, "hide_cohort": hidden, "rate": None, "accept_noise": True}
    terms = privacy_terms(treaty(cohort=cohort, privacy=silo), 4)
    assert terms.rate == (0.5 if hidden else 1.0)


def test_nothing_in_a_plan_depends_on_what_silos_hold(p):
    """Rate, divisor, steps and noise are the treaty's: the size of the data is in none of them."""
    few, many = place(4), place(30)
    assert len(few.silos["s"].units) < len(many.silos["s"].units)
    assert facts(few.privacy) == facts(many.privacy) == facts(p.privacy)
    assert few.plan == replace(many.plan, privacy=few.plan.privacy)
    assert few.plan.privacy == many.plan.privacy
    assert {place.plan.steps_of(place.silos["s"]) for place in (few, many)} == {3}


def test_the_bit_that_moves_a_clip_norm_is_paid_for_by_the_same_multiplier():
    """Gradient and bit are one vector of length ≤ √(1 + (bit/2)²): with that much more noise on both, z is right."""
    steps = place(privacy={"quantile": 0.5, "noise_multiplier": 2.0}).plan.privacy
    random, shape = np.random.default_rng(0), {"w": (200_000,)}
    noise = np.std(steps.noise(shape, 0, 1.0, random)["w"])
    bits = np.std([steps.count(np.zeros(0), 0, 1.0, random) for _ in range(20_000)])
    of_gradient, of_bit = noise / 1.0, bits / (steps.following.bit / 2)
    assert events.joint(of_gradient, of_bit) == pytest.approx(2.0, rel=0.02)
    unit = {"mechanism": "repeat", "times": 3, "of": events.poisson(0.2, events.gaussian(2.0))}
    charged = place(privacy={"quantile": 0.5, "noise_multiplier": 2.0}).privacy.events[0]
    assert accountant.upper(charged, 1e-5) >= accountant.upper(unit, 1e-5) * (1 - 1e-9)


READ = {
    "training loss": {"disclosure": {"loss": True}}, "how much each silo holds": {"disclosure": {"holdings": True}},
    "when to stop": {}, "which round to keep": {}, "hyper-parameters that were tuned": {}, "held-out": {},
    "labels": {"base": "tiny:bert", "task": "sequence-classification"}, "how long a silo took": {},
    "silos alone": {"evaluation": {"baselines": ["local"]}}, "pooled": {"evaluation": {"baselines": ["pooled"]}},
}  # fmt: skip


@pytest.mark.parametrize("what", READ)
def test_whatever_reads_private_data_without_charge_is_named(what):
    made = treaty(**READ[what])
    assert any(what in line for line in not_covered(made))
    quiet = treaty(disclosure={"loss": False, "holdings": False}, evaluation={"baselines": []})
    assert READ[what] == {} or not any(what in line for line in not_covered(quiet))


def test_an_author_keeps_at_most_as_many_examples_as_said_whoever_else_writes():
    table = pa.table({"text": [f"{i} by {i % 5}" for i in range(50)], "author": [f"p{i % 5}" for i in range(50)]})
    kept = bound_contributions(table, 3, seed=1)
    assert {a: kept["author"].to_pylist().count(a) for a in set(kept["author"].to_pylist())} == {
        f"p{i}": 3 for i in range(5)
    }
    alone = bound_contributions(table.filter(pa.compute.equal(table["author"], "p2")), 3, seed=1)
    assert alone["text"].to_pylist() == [t for t in kept["text"].to_pylist() if t.endswith("by 2")]
    with pytest.raises(DataError, match="authors"):
        bound_contributions(table.drop_columns("author"), 3, seed=1)


TRUST = {
    "server": ({}, "Trusted: the coordinator, which sees every update"),
    "silo": ({"placement": "silo"}, "Trusted: the silo itself"),
    "shared": ({"placement": "shared"}, "against it this guarantee does not hold"),
}


@pytest.mark.parametrize("placement", TRUST)
def test_each_placement_of_the_noise_says_whom_it_trusts(placement):
    more, said = TRUST[placement]
    silo = {"unit": "silo", "noise_multiplier": 1.0, "rate": None, "accept_noise": True, **more}
    made = facts(privacy_plan(treaty(privacy=silo), 4))
    assert any(said in sentence for sentence in statement(made, made["epsilon"]))


# ---- record and replay (item 20) ----


@contextmanager
def replayed(random_of) -> Iterator[list]:
    """Private steps whose coins are all heads and whose noise is drawn by `random_of(step)`; yields what was drawn."""
    drawn: list[tuple[str, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        right = PrivateSteps.noise

        def noise(self, shapes, round, factor, random):
            drawn.append(tuple(shapes))
            return right(self, shapes, round, factor, random_of(len(drawn)))

        patch.setattr(PrivateSteps, "noise", noise)
        patch.setattr(PrivateSteps, "sample", lambda self, keys, at, random: np.arange(len(keys)))
        yield drawn


def run_of(p, plan, silo, steps: int = 3) -> tuple[np.ndarray, list]:
    """The releases of some steps with noise that is the same in every call, and the order in which it was drawn."""
    with replayed(lambda step: np.random.default_rng(step)) as drawn:
        gradients = PrivateGradients(p.bench, task_of(p), [silo], plan, [{}])
        out = []
        for step in range(steps):
            gradients.factors = [1.0]  # a released number, so it is part of what is replayed
            leaves = p.bench.leaves([task_of(p).params])
            gradients.fill(leaves, step)
            out.append(np.concatenate([x.grad.double().numpy().ravel() for x in leaves.values()]))
        return np.stack(out) * plan.privacy.divisor, list(drawn)


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_on_one_unit_less_a_step_differs_by_that_units_part_and_by_nothing_else(kind):
    """Record and replay (arXiv 2602.17454): same coins, same noise; same draws in the same order; a bounded rest."""
    p = place(privacy=KINDS[kind])
    plan, units = loud(p.plan), list(range(6))
    bound = math.hypot(*plan.privacy.parts.norms)
    whole, order = run_of(p, plan, some(p, units))
    part, again = run_of(p, plan, some(p, units[:3] + units[4:]))
    assert order == again
    moved = np.linalg.norm(whole - part, axis=1)
    assert (moved <= bound * (1 + 1e-2)).all() and (moved > 0).all()
    assert np.linalg.norm(whole, axis=1).min() > 10 * bound  # the noise was there, at its full size


# ---- hygiene (item 21) ----


def test_a_privately_trained_adapter_has_moved_and_says_the_same_once_loaded(p, tmp_path):
    (trained,) = train(p.bench, Task(0, p.base.digest, p.bench.start(), ("s",), 5), [p.silos["s"]], p.plan, [{}])
    halves = {name: x for name, x in trained.params.items() if "lora_B" in name}
    assert halves and all(x.any() for x in halves.values())
    save_adapter(p.base, LoRA(2, targets="attention"), trained.params, tmp_path / "adapter", "")
    again = load_base("tiny:llama", "causal-lm")
    loaded = PeftModel.from_pretrained(again.model, tmp_path / "adapter").eval()
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        theirs = loaded(input_ids=ids).logits
        kept = p.bench.start()
        load_params(p.base.model, trained.params)
        ours = p.base.model(input_ids=ids).logits
        load_params(p.base.model, kept)
    assert torch.allclose(theirs, ours, atol=1e-6)


def test_dropout_and_masks_fall_by_secret_coins():
    """Under a public seed whoever knows it sees whose mask changed when a unit came."""
    dropping = {"adapter": {"rank": 2, "targets": "attention", "dropout": 0.3}}
    for sections in (dropping, {"base": "tiny:bert", "task": "masked-lm"}):
        p = place(**sections)
        real = silent(p.plan, source=SystemSource())
        one, other = (filled(p, real, some(p, [0, 1, 2])) for _ in range(2))
        assert np.linalg.norm(one - other) > 0.01 * real.privacy.parts.norms[0]
