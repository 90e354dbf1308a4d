"""FedLAP-DP: synthetic text that has the gradients of real text, made of private steps alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from foedus import tree
from foedus.algorithms.fedlap import INPUTS, SHARE, TARGETS, FedLap, _Queries
from foedus.errors import GuaranteeError, ModelError
from foedus.lm.adapters import LoRA, attach
from foedus.lm.bench import Bench
from foedus.lm.heads import attach_head, width
from foedus.lm.load import load_base
from foedus.lm.matching import Matcher, SoftText, Synthetic, descend, difference, within
from foedus.lm.objectives import make_objective
from foedus.lm.terms import Goal, Topic
from foedus.privacy.noise import SimulatedSource
from foedus.privacy.plan import Terms, make_plan
from foedus.server.aggregators import WeightedMean
from foedus.silo import LocalPlan, Silo
from foedus.silo.private import PrivateGradients
from foedus.silo.shard import Units
from foedus.stages import Weigh, chain
from foedus.types import Task, Update

from ..conftest import WORDS, sentences

SMALL = {"examples": 4, "length": 6, "vocabulary": 300, "queries": 2, "visits": 2, "boost": 2, "passes": 5}


@pytest.fixture(scope="module")
def bench() -> Bench:
    base = load_base("tiny:llama")
    attach(base, LoRA(rank=2, targets="attention"), 0)
    attach_head(base, "topics", (width(base), 3), 0)
    return Bench(base, make_objective("causal-lm", 16, topics=tuple(WORDS)), precision="fp32")


@pytest.fixture(scope="module")
def silos(bench) -> list[Silo]:
    return [silo_of(bench, domain) for domain in WORDS]


def silo_of(bench, domain: str, seed: int = 0, name: str = "", count: int = 12) -> Silo:
    table = pa.table({"text": [text[:30] for text in sentences(domain, count, seed)], "label": [domain] * count})
    encoded = bench.objective.encode(table, bench.base.tokenizer)
    documents, of = np.unique(encoded.documents, return_inverse=True)
    return Silo(name or domain, {"train": encoded}, units=Units(of, np.arange(len(documents)).astype(np.uint64)))


def start(bench) -> dict[str, np.ndarray]:
    """Parameters none of which is zero, as after some rounds."""
    random = np.random.default_rng(0)
    return {n: x if x.any() else 0.1 * random.standard_normal(x.shape, np.float32) for n, x in bench.start().items()}


def task_of(bench, round: int = 0, extra=None) -> Task:
    return Task(round, "", start(bench), tuple(WORDS), 7, {}, extra or {})


def plain(steps: int = 4, **changes) -> LocalPlan:
    return LocalPlan(lr=0.1, batch=6, steps=steps, optimizer="sgd", **changes)


def private(bench, steps: int = 4, z: float = 1.0, rate: float = 0.5) -> LocalPlan:
    terms = Terms("example", 1e-5, 3, noise_multiplier=z, steps=steps, rate=rate, divisor=6.0, rows=2)
    steps_ = make_plan(terms, SimulatedSource(3)).steps_at_silos(list(bench.start()))
    return LocalPlan(lr=0.1, batch=6, steps=steps, privacy=steps_, goal=Goal(terms=(Topic(0.5),)))


def fedlap(bench, plan: LocalPlan, **more) -> FedLap:
    return FedLap(plan, bench, tuple(WORDS), **(SMALL | more))


def flat(params) -> np.ndarray:
    return np.concatenate([np.asarray(params[name], np.float64).ravel() for name in sorted(params)])


def cosine(a, b) -> float:
    a, b = flat(a), flat(b)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def linear(w, inputs, targets) -> torch.Tensor:
    """Squared loss of a linear model of 3 outputs, twice differentiable."""
    return ((inputs[:, 0] @ w["w"].T - targets[:, 0]) ** 2).sum(1).mean()


def test_matched_examples_of_a_linear_model_have_the_real_gradient_and_the_server_steps_along_it():
    random = np.random.default_rng(0)
    real = [torch.from_numpy(random.standard_normal((50, 1, d)).astype(np.float32)) for d in (5, 3)]
    w = {"w": random.standard_normal((3, 5)).astype(np.float32)}
    leaf = {"w": torch.from_numpy(w["w"]).requires_grad_()}
    (slope,) = torch.autograd.grad(linear(leaf, *real), leaf["w"])
    begin = Synthetic(*(random.standard_normal((4, 1, d)).astype(np.float32) for d in (5, 3)))
    matcher = Matcher(linear, begin, rate=0.05, euclidean=0.1)
    assert matcher.match(w, {"w": slope.numpy()}, 400) < 0.01
    moved, _ = descend(linear, w, [(1.0, matcher.synthetic)], lr=0.01, steps=1, origin=w, radius=10.0)
    assert cosine(tree.minus(w, moved), {"w": slope.numpy()}) > 0.95


def test_the_difference_is_zero_for_one_direction_and_two_for_opposite_ones():
    g = {"a": torch.randn(4, 3), "b": torch.randn(5)}
    assert float(difference(g, {n: 3 * x for n, x in g.items()})) == pytest.approx(0.0, abs=1e-4)
    assert float(difference(g, {n: -x for n, x in g.items()})) == pytest.approx(2.0, abs=1e-4)
    assert float(difference(g, {n: 0 * x for n, x in g.items()})) == pytest.approx(1.0)


def test_soft_text_that_is_real_text_has_its_loss(bench):
    """One-hot targets and a token's own embedding give the cross-entropy that the bench computes."""
    loss = SoftText(bench)
    text = bench.objective.encode(pa.table({"text": ["fever dose"], "label": ["law"]}), bench.base.tokenizer)
    batch = bench.objective.collate(text, [0], 0)
    ids = batch["input_ids"]
    core = bench.model.get_base_model()
    inputs = core.get_input_embeddings()(ids).detach()[:, :-1] / loss._scale
    targets = 200.0 * torch.nn.functional.one_hot(ids[:, 1:], core.config.vocab_size).float()
    w = {name: torch.from_numpy(x) for name, x in start(bench).items()}
    wanted = bench.scores(start(bench), batch)
    assert float(loss(w, inputs, targets)) == pytest.approx(wanted["nll"][0] / wanted["targets"][0], rel=1e-4)


def test_matching_a_language_model_comes_nearer_to_a_real_gradient_head_and_all(bench, silos):
    plan = plain(goal=Goal(terms=(Topic(0.5),)))
    real = _Queries(bench, task_of(bench), silos[0], plan, {}).gradient(start(bench), 0)
    random, loss = np.random.default_rng(0), SoftText(bench, 0.5)
    begin = Synthetic(*(random.standard_normal(s, np.float32) for s in loss.shape(4, 6, 300)))
    matcher = Matcher(loss, begin, rate=0.2)
    first = matcher.match(start(bench), real, 1)
    assert first == pytest.approx(1.0, abs=0.3)
    assert matcher.match(start(bench), real, 15) < first - 0.3
    moved, _ = descend(
        loss, start(bench), [(1.0, matcher.synthetic)], lr=0.01, steps=1, origin=start(bench), radius=1e9
    )
    assert cosine(tree.minus(start(bench), moved), real) > 0.5


def test_the_server_never_leaves_the_trust_region(bench, silos):
    algorithm = replace(fedlap(bench, plain()), local=replace(plain(), lr=1e3), radius=0.25)
    updates = [u for u, _ in fedlap(bench, plain()).train(bench, task_of(bench), silos, [{}] * 3)]
    extra = algorithm.finish({}, mean_of(updates, task_of(bench)))
    w, left = algorithm.refine(start(bench), extra)
    assert 0.249 < tree.norm(tree.minus(w, start(bench))) <= 0.25
    assert left["report", "moved"][0] <= 0.25 and not [key for key in left if key[0] != "report"]


@pytest.mark.parametrize("radius", [1e-3, 0.1, 20.0])
def test_projection_ends_inside_to_the_last_bit_and_leaves_what_is_inside(radius):
    random = np.random.default_rng(0)
    origin = {"a": random.standard_normal((30, 7)).astype(np.float32) * 10}
    far = {"a": origin["a"] + random.standard_normal((30, 7)).astype(np.float32)}
    w, out = within(far, origin, radius)
    apart = np.linalg.norm(w["a"].astype(np.float64) - origin["a"])
    assert apart <= radius and out == (radius < 20.0)
    assert apart == pytest.approx(min(radius, np.linalg.norm((far["a"] - origin["a"]).astype(np.float64))), rel=1e-3)


def mean_of(updates: list[Update], task: Task, by: str = "examples"):
    stages = chain(Weigh(by))
    return WeightedMean().mean(WeightedMean().combine(stages.encode(u, task).tensors for u in updates).tensors)


@pytest.mark.parametrize("by", ["examples", "uniform"])
def test_the_union_comes_out_of_a_sum(bench, by):
    silos = [silo_of(bench, "law", count=6), silo_of(bench, "sport", count=12)]
    algorithm = fedlap(bench, plain())
    results = algorithm.train(bench, task_of(bench), silos, [{}] * 2)
    extra = algorithm.finish({}, mean_of([u for u, _ in results], task_of(bench), by))
    assert {slot for name, slot in extra if name == INPUTS} == {"law", "sport"}  # "medicine" did not take part
    for silo, (_, memory) in zip(silos, results, strict=True):
        np.testing.assert_allclose(extra[INPUTS, silo.name], memory["synthetic", "inputs"], rtol=1e-5)
        np.testing.assert_allclose(extra[TARGETS, silo.name], memory["synthetic", "targets"], rtol=1e-5)
    sizes = np.array([silo.examples for silo in silos], float)
    wanted = sizes / sizes.sum() if by == "examples" else [0.5, 0.5]
    assert [float(extra[SHARE, silo.name][0]) for silo in silos] == pytest.approx(list(wanted))
    parts = algorithm.parts({})
    assert {key: x.shape for key, x in results[0][0].tensors.items() if key[0] != "metric"} == parts


def test_text_is_asked_exactly_as_often_as_the_plan_accounts_for(bench, silos, monkeypatch):
    asked, read = [], []
    released, collate = PrivateGradients.released, type(bench.objective).collate
    monkeypatch.setattr(
        PrivateGradients, "released", lambda self, w, step: asked.append(step) or released(self, w, step)
    )

    def reading(self, *args):
        read.append(len(asked))
        return collate(self, *args)

    monkeypatch.setattr(type(bench.objective), "collate", reading)
    plan = private(bench, steps=7)
    ((update, memory),) = fedlap(bench, plan).train(bench, task_of(bench), silos[:1], [{}])
    assert asked == list(range(7)) and set(read) <= set(range(1, 8))  # nothing is read but inside a query
    fedlap(bench, plan).finish({}, mean_of([update], task_of(bench)))
    assert len(asked) == 7


def test_under_infinite_noise_the_examples_say_nothing_of_the_text(bench):
    plan = private(bench, z=1e9)
    found = [
        fedlap(bench, plan).train(bench, task_of(bench), [silo_of(bench, domain, name="law")], [{}])[0][1]
        for domain in ("law", "sport")
    ]
    for part in ("inputs", "targets"):
        np.testing.assert_allclose(found[0]["synthetic", part], found[1]["synthetic", part], atol=1e-2)
    tame = [
        fedlap(bench, private(bench, z=1e-6)).train(bench, task_of(bench), [silo_of(bench, d, name="law")], [{}])[0][1]
        for d in ("law", "sport")
    ]
    assert np.abs(tame[0]["synthetic", "inputs"] - tame[1]["synthetic", "inputs"]).max() > 0.1


def test_a_silo_goes_on_with_its_examples_and_starts_from_public_noise(bench, silos):
    algorithm = fedlap(bench, private(bench))
    ((_, first),) = algorithm.train(bench, task_of(bench), silos[:1], [{}])
    ((_, again),) = algorithm.train(bench, task_of(bench), silos[:1], [{}])
    assert all(np.array_equal(x, again[key]) for key, x in first.items())
    ((_, second),) = algorithm.train(bench, task_of(bench, 1), silos[:1], [first])
    near, far = (np.abs(second["synthetic", "inputs"] - x).mean() for x in (first["synthetic", "inputs"], 0.0))
    assert 0 < near < far


def test_a_round_lowers_the_real_loss(bench, silos):
    algorithm = fedlap(bench, plain(2, goal=Goal(terms=(Topic(0.5),))), boost=6, rate=0.2)
    updates = [u for u, _ in algorithm.train(bench, task_of(bench), silos, [{}] * 3)]
    w, _ = algorithm.refine(start(bench), algorithm.finish({}, mean_of(updates, task_of(bench))))

    def loss(params) -> float:
        sums = [bench.scores(params, bench.objective.collate(s.splits["train"], range(s.examples), 0)) for s in silos]
        return sum(x["nll"].sum() for x in sums) / sum(x["targets"].sum() for x in sums)

    assert loss(w) < loss(start(bench))
    assert any("topics" in name and np.abs(x - start(bench)[name]).max() > 0 for name, x in w.items())


def test_nobodys_round_moves_nothing(bench):
    algorithm = fedlap(bench, plain())
    zeros = {key: np.zeros(shape) for key, shape in algorithm.parts({}).items()}
    w, _ = algorithm.refine(start(bench), algorithm.finish({}, zeros))
    assert all(np.array_equal(x, w[name]) for name, x in start(bench).items())
    assert not any(x.any() for x in algorithm.direction(zeros).values())


def test_exact_steps_under_shares_of_noise_are_refused(bench):
    plan = private(bench, steps=1)
    shared = replace(plan, optimizer="sgd", privacy=replace(plan.privacy, lr=0.1))
    with pytest.raises(GuaranteeError, match="noise of their own"):
        fedlap(bench, shared)


def test_a_base_that_is_not_causal_is_refused():
    base = load_base("tiny:bert", "masked-lm")
    attach(base, LoRA(rank=2), 0)
    with pytest.raises(ModelError, match="causal-lm"):
        SoftText(Bench(base, make_objective("masked-lm", 16), precision="fp32"))
