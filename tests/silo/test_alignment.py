"""Alignment and domain attention: the sums are the paper's equations, behind the real loop and a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from foedus import loop, tree
from foedus.algorithms import FedAvg
from foedus.algorithms import alignment as module
from foedus.algorithms.alignment import OWN, Alignment, survey_parts, survey_rounds
from foedus.attention import Attention, effective
from foedus.build import build
from foedus.discriminant import discriminant
from foedus.engines import InProcess
from foedus.errors import GuaranteeError
from foedus.kernels import fourier_map
from foedus.lm.adapters import LoRA, attach
from foedus.lm.bench import Bench
from foedus.lm.heads import attach_bias, attach_head, names, width
from foedus.lm.load import load_base
from foedus.lm.objectives import make_objective
from foedus.lm.statistics import token_rows, topic_rows
from foedus.lm.terms import Goal, MeanPull, Pull, Topic
from foedus.loop import Federation
from foedus.marginals import Marginals
from foedus.privacy import Unprotected
from foedus.privacy.noise import SimulatedSource
from foedus.privacy.plan import PrivacyPlan, Terms, make_plan
from foedus.server import Full, Sgd, WeightedMean
from foedus.silo import Handler, LocalPlan, Silo, Units
from foedus.silo.survey import Surveyed, survey
from foedus.silo.train import train
from foedus.stages import Weigh, chain
from foedus.treaty import from_dict
from foedus.types import Params, Release, State, Task, Update

from ..conftest import WORDS, sentences

PLAN = LocalPlan(lr=0.5, batch=8, steps=2, optimizer="sgd", goal=Goal(terms=(Topic(0.1),)))
ROUNDS = 3


@pytest.fixture(scope="module")
def bench() -> Bench:
    base = load_base("tiny:llama")
    attach(base, LoRA(rank=4), 0)
    attach_head(base, "topics", (width(base), len(WORDS)), 0)
    return Bench(base, make_objective("causal-lm", 24, topics=tuple(WORDS)), precision="fp32")


@pytest.fixture(scope="module")
def silos(bench) -> dict[str, Silo]:
    """Silos of different sizes, each with words of its own."""
    out = {}
    for size, domain in zip((16, 24, 32), WORDS, strict=False):
        table = pa.table({"text": sentences(domain, size), "label": [domain] * size})
        data = bench.objective.encode(table, bench.base.tokenizer)
        units = Units(np.arange(len(data)), np.arange(len(data), dtype=np.uint64))
        out[domain] = Silo(domain, {"train": data}, units=units)
    return out


@pytest.fixture(scope="module")
def maps(bench):
    return {-1: fourier_map(width(bench.base), 20, (0.3, 0.4, 0.6, 0.8, 1.2), 3)}


def align(maps, plan=PLAN, **more) -> Alignment:
    return Alignment(plan, maps, rounds=ROUNDS, silos=3, **more)


def run(algorithm, bench, silos, by="uniform") -> Iterator[tuple[State, Release, InProcess]]:
    federation = Federation(
        algorithm, chain(Weigh(by)), WeightedMean(), Unprotected(), Sgd(1.0), Full(), tuple(silos), "m", ROUNDS, seed=5
    )
    engine = InProcess(Handler(bench, algorithm, federation.stages, "m"), silos, algorithm.local)
    for state, release in loop.run(federation, engine, loop.start(federation, bench.start())):
        yield state, release, engine


def last(*args, **more) -> tuple[State, Release, InProcess]:
    return list(run(*args, **more))[-1]


@pytest.fixture(scope="module")
def first(bench, silos, maps) -> tuple[State, dict[str, Params]]:
    """The state after one round, and what each silo then keeps."""
    state, _, engine = next(run(align(maps), bench, silos))
    return state, {name: tree.part(memory, OWN) for name, memory in engine.memory.items()}


def second(silos, state: State) -> Task:
    """The task of the round after `first`."""
    return Task(1, "m", state.params, tuple(silos), 5, extra=state.extra)


def test_without_pull_and_with_gamma_0_it_is_fedavg(bench, silos, maps):
    weighed = align(maps, weight=0.0, attention=Attention(0.0, 1.0, most=1000))
    ours, theirs = last(weighed, bench, silos)[0], last(FedAvg(PLAN), bench, silos, by="examples")[0]
    for name, x in theirs.params.items():
        np.testing.assert_allclose(ours.params[name], x, atol=1e-6)
    uniform = align(maps, weight=0.0), FedAvg(PLAN)
    ours, theirs = (next(run(algorithm, bench, silos))[0] for algorithm in uniform)
    assert all(np.abs(ours.params[name] - x).max() < 1e-6 for name, x in theirs.params.items())


def test_one_full_step_without_noise_is_a_pooled_gradient_step(bench, silos, maps):
    """Card 01, property 1: K = 1, γ = 0, b = 1; of silos' mean losses, weighed by how many rows they have."""
    plan = replace(PLAN, goal=Goal(), lr=1.0, steps=None, epochs=1, batch=1000)
    equal = {name: replace(silo, splits={"train": silo.splits["train"]}) for name, silo in silos.items()}
    algorithm = align(maps, plan, weight=0.0, attention=Attention(0.0, 1.0, most=1000))
    state, _, _ = next(run(algorithm, bench, equal))
    params = {name: x for name, x in bench.start().items()}
    total: dict[str, np.ndarray] = {name: np.zeros_like(x) for name, x in params.items()}
    for silo in equal.values():
        leaves = bench.leaves([params])
        sums, counts = bench.losses(leaves, [bench.objective.collate(silo.splits["train"], range(silo.examples), 0)])
        (sums[0] / counts[0] * silo.examples / sum(s.examples for s in equal.values())).backward()
        for name, x in leaves.items():
            total[name] += 0 if x.grad is None else x.grad[0].numpy()
    for name, x in state.params.items():
        np.testing.assert_allclose(x, params[name] - total[name], atol=1e-6)


def test_the_release_is_the_mean_embedding_and_each_silo_pulls_away_from_its_own(bench, silos, maps, first):
    state, kept = first
    own = {name: x["embedding"] for name, x in kept.items()}
    for name, silo in silos.items():
        seen = bench.see(bench.start(), bench.objective.collate(silo.splits["train"], range(silo.examples), 0))
        np.testing.assert_allclose(own[name], maps[-1](seen.features().numpy()).mean(0), atol=1e-5)
    np.testing.assert_allclose(state.extra["embedding", "mean"], np.mean(list(own.values()), 0), atol=1e-7)
    for name, silo in silos.items():
        others = np.mean([x for other, x in own.items() if other != name], 0)
        away = align(maps)._away(second(silos, state), silo, {"embedding": own[name]})
        np.testing.assert_allclose(away, own[name] - others, atol=1e-7)


def test_the_reported_shift_is_the_mean_mmd_of_two_silos(first):
    state, kept = first
    own = [x["embedding"] for x in kept.values()]
    pairs = [np.sum((a - b) ** 2) for i, a in enumerate(own) for b in own[:i]]
    assert state.extra["report", "shift"][0] == pytest.approx(np.mean(pairs), rel=1e-5)


def test_noise_in_the_embeddings_does_not_move_the_reported_shift_on_average(maps):
    random, stds = np.random.default_rng(0), np.array([0.05, 0.1, 0.2])
    means = random.normal(0, 0.1, (3, 20))
    pairs = [np.sum((a - b) ** 2) for i, a in enumerate(means) for b in means[:i]]
    found = []
    for _ in range(2000):
        own = means + stds[:, None] * random.standard_normal(means.shape)
        sums = {"mean": own.mean(0), "square": np.array([(own**2).sum(1).mean()]), "count": np.ones(1)}
        sums["noise"] = np.array([20 * np.mean(stds**2)])
        found.append(align(maps)._released({}, sums)["report", "shift"][0])
    assert np.mean(found) == pytest.approx(np.mean(pairs), abs=5 * np.std(found) / np.sqrt(2000))
    assert np.mean(pairs) > 10 * np.std(found) / np.sqrt(2000)


def test_a_private_pull_has_the_gradient_of_the_exact_one_where_it_was_measured(bench, silos, maps, first):
    state, kept = first
    paid = replace(PLAN, privacy=private().steps_at_silos(list(bench.start())))
    name, silo = next(iter(silos.items()))
    gradients = []
    for plan, kind in ((PLAN, MeanPull), (paid, Pull)):
        terms = align(maps, plan, weight=0.7)._pull(second(silos, state), silo, kept[name])
        assert [type(term) for term in terms] == [kind]
        leaves = bench.leaves([bench.start()])
        batch = bench.objective.collate(silo.splits["train"], range(silo.examples), 0)
        bench.totals(leaves, [batch], [Goal(0.0, tuple(terms))])[0].sum().backward()
        gradients.append(np.concatenate([x.grad.numpy().ravel() for x in leaves.values() if x.grad is not None]))
    assert np.abs(gradients[0]).max() > 1e-4
    np.testing.assert_allclose(gradients[1], gradients[0], atol=1e-3 * np.abs(gradients[0]).max())


def test_alignment_draws_the_silos_together(bench, silos, maps):
    plan = LocalPlan(lr=0.03, batch=1000, epochs=1, optimizer="sgd", goal=Goal(tokens=0.0))
    shifts = [
        [state.extra["report", "shift"][0] for state, _, _ in run(align(maps, plan, weight=weight), bench, silos)]
        for weight in (0.0, 1.0, 5.0)
    ]
    assert shifts[2][-1] < shifts[1][-1] < shifts[0][-1]
    assert shifts[0][0] == shifts[0][-1] == shifts[2][0]  # nothing but the pull moves anything here


# ---- what a silo keeps of its surveys ----


def told(monkeypatch, *found: Surveyed) -> list[dict]:
    """Surveys that find this, one after another, and what each was asked for."""
    asked: list[dict] = []
    answers = iter(found)
    monkeypatch.setattr(module, "survey", lambda *_, **how: asked.append(how) or next(answers))
    return asked


def surveyed(mean: float, std: float, units: float = 4.0) -> Surveyed:
    sums = {"embedding": np.full(20, mean * units), "count": np.array([units])}
    return Surveyed(sums, {"embedding": std * units, "count": std})


def test_a_running_mean_of_embeddings_has_the_variance_of_one(monkeypatch, silos, maps):
    told(monkeypatch, surveyed(0.5, 0.2), surveyed(0.1, 0.3))
    algorithm, silo, own = align(maps, momentum=0.75, rate=0.5), silos["law"], {}
    for round, (mean, variance) in enumerate(((0.5, 0.04), (0.75 * 0.5 + 0.25 * 0.1, 0.5625 * 0.04 + 0.0625 * 0.09))):
        own = algorithm._surveyed(None, Task(round, "m", {}, (), 0), silo, tree.as_part(OWN, own))
        np.testing.assert_allclose(own["embedding"], mean)
        assert own["variance"][0] == pytest.approx(variance) and own["round"][0] == round
        assert own["examples"][0] == 8.0  # as many as were in it, over the rate


def test_a_survey_that_found_nobody_changes_nothing_and_sends_zeros(monkeypatch, silos, maps):
    told(monkeypatch, surveyed(0.5, 0.2, units=4.0), surveyed(9.0, 9.0, units=0.3))
    algorithm, silo = align(maps, target="law"), silos["law"]
    own = algorithm._surveyed(None, Task(0, "m", {}, (), 0), silo, {})
    after = algorithm._surveyed(None, Task(1, "m", {}, (), 0), silo, tree.as_part(OWN, own))
    assert {key: x.tolist() for key, x in after.items()} == {key: x.tolist() for key, x in own.items()}
    sent = algorithm._embedded(Task(1, "m", {}, (), 0), silo, after)
    assert all(not x.any() for x in sent.values())
    assert all(x.any() for x in algorithm._embedded(Task(0, "m", {}, (), 0), silo, own).values())


def test_text_is_surveyed_in_the_agreed_rounds_and_no_more_of_it_than_agreed(monkeypatch, silos, maps):
    asked = told(monkeypatch, surveyed(0.5, 0.0), surveyed(0.4, 0.0))
    algorithm, silo, own, sent = align(maps, every=3, rows=5), silos["law"], {}, []
    for round in range(6):
        task = Task(round, "m", {}, (), 0)
        own = algorithm._surveyed(None, task, silo, tree.as_part(OWN, own))
        weighed = {**own, "weight": np.ones(1)}
        sent.append(("embedding", "mean") in algorithm._update(task, silo, Update({}, 1.0, "law"), weighed).tensors)
    assert asked == [{"limit": 5}] * 2 and sent == [True, False, False] * 2


def test_silos_that_align_to_a_target_leave_it_where_it_is(bench, silos, maps):
    target = next(iter(silos))
    state, _, engine = next(run(align(maps, target=target), bench, silos))
    own = {name: tree.part(memory, OWN)["embedding"] for name, memory in engine.memory.items()}
    np.testing.assert_allclose(state.extra["target", "mean"], own[target], atol=1e-7)
    for name, silo in silos.items():
        away = align(maps, target=target)._away(second(silos, state), silo, {"embedding": own[name]})
        expected = own[name] - own[target] if name != target else 1.5 * (own[name] - np.mean(list(own.values()), 0))
        np.testing.assert_allclose(away, expected, atol=1e-6)


@pytest.mark.parametrize("phi", ["entropy", "error", "rank", "distance"])
def test_silos_weigh_by_attention_and_the_effective_number_is_told(phi, bench, silos, maps):
    moments = np.random.default_rng(0).normal(size=(width(bench.base), 6)) if phi == "rank" else None
    algorithm = align(maps, attention=Attention(5.0, 0.0), phi=phi, moments=moments)
    state, release, engine = last(algorithm, bench, silos)
    found = [float(tree.part(memory, OWN)["phi"][0]) for memory in engine.memory.values()]
    assert all(0 <= x <= 1 for x in found)
    assert 1 <= state.extra["report", "effective silos"][0] <= 3
    if phi == "distance":
        return
    assert len(set(found)) > 1
    weights = Attention(5.0, 0.0).weight(1, np.array(found))
    assert state.extra["report", "effective silos"][0] == pytest.approx(effective(weights))
    assert state.extra["attention", "mean"][0] == pytest.approx(weights.mean())


def test_a_noised_sum_of_weights_divides_by_no_less_than_it_can_be(maps):
    algorithm = align(maps, attention=Attention(2.0, 0.0), phi="entropy", scale=0.5)
    for noised, divisor in ((0.2, 0.4), (0.01, np.exp(-2.0)), (-0.3, np.exp(-2.0))):
        mean = {("delta", "w"): np.ones(2), ("attention", "weight"): np.array([noised])}
        np.testing.assert_allclose(algorithm.direction(mean)["w"], 1 / divisor)


def test_the_scale_of_what_stands_beside_the_delta_changes_no_result(bench, silos, maps, first):
    state, _, _ = next(run(align(maps, scale=0.25), bench, silos))
    assert state.extra.keys() == first[0].extra.keys()
    for key, x in {**state.extra, **tree.as_part("delta", state.params)}.items():
        np.testing.assert_allclose(x, {**first[0].extra, **tree.as_part("delta", first[0].params)}[key], atol=1e-6)


def test_a_capped_silo_has_no_larger_share_once_weights_stand_still(bench, silos, maps):
    steep = align(maps, attention=Attention(0.0, 8.0, most=1000), cap=0.5, weight=0.0)
    *_, (state, _, _) = run(steep, bench, silos)
    assert state.extra["report", "effective silos"][0] > 1.5
    *_, (state, _, _) = run(replace(steep, cap=1.0), bench, silos)
    assert state.extra["report", "effective silos"][0] < 1.5


def test_the_last_round_hands_out_the_running_mean(bench, silos, maps):
    plain = [state.params for state, _, _ in run(align(maps), bench, silos)]
    mean = [state.params for state, _, _ in run(align(maps, average=0.5), bench, silos)]
    weights = np.array([0.25, 0.5, 1.0]) / 1.75
    for name, x in mean[-1].items():
        np.testing.assert_allclose(mean[0][name], plain[0][name])
        np.testing.assert_allclose(x, sum(w * p[name] for w, p in zip(weights, plain, strict=True)), atol=1e-6)


def test_the_pull_fades_with_the_released_shift_or_grows_over_half_the_rounds(maps):
    extra = {(OWN, "shift"): np.array([0.2]), (OWN, "first shift"): np.array([0.8])}
    task = Task(1, "m", {}, (), 0, extra=extra)
    assert align(maps, schedule="shift", weight=2.0)._strength(task) == pytest.approx(0.5)
    assert align(maps, schedule="ramp", weight=3.0)._strength(task) == pytest.approx(2.0)
    assert align(maps, weight=3.0)._strength(task) == 3.0


def test_every_part_that_is_sent_is_one_that_was_declared(bench, silos, maps, topics):
    for more in ({}, {"target": next(iter(silos))}, {"topics": topics}):
        algorithm = align(maps, **more)
        declared = algorithm.parts({name: x.shape for name, x in bench.start().items()})
        for silo in silos.values():
            ((update, _),) = algorithm.train(bench, Task(0, "m", bench.start(), tuple(silos), 5), [silo], [{}])
            sent = {key: x.shape for key, x in update.tensors.items() if key[0] != "metric"}
            assert sent.items() <= declared.items()


def test_behind_masks_it_takes_the_rounds_that_it_takes_in_the_open(tmp_path):
    words = [word for domain in WORDS.values() for word in domain]
    (tmp_path / "public.csv").write_text("text\n" + "\n".join(f"the {a} and the {b}" for a in words for b in words[:2]))
    rows = {domain: [{"text": text} for text in sentences(domain, 12)] for domain in WORDS}
    found = []
    for sums in ("open", "masked"):
        treaty = from_dict({
            "treaty": {"name": "x"}, "model": {"base": "tiny:llama", "max_length": 16}, "data": {"source": "memory"},
            "algorithm": {"name": "alignment", "rounds": 2},
            "local": {"steps": 1, "batch": 4, "optimizer": "sgd"},
            "alignment": {"public_text": "public.csv", "attention": "entropy", "gamma": 3.0, "features": 16},
            "secure": {"sums": sums}, "cohort": {"minimum": 3}, "server": {"weighting": "uniform"},
        }, folder=tmp_path)  # fmt: skip
        at = build(treaty, rows)
        *_, (state, _) = loop.run(at.federation, at.engine(), loop.start(at.federation, at.bench.start()))
        found.append({**state.extra, **tree.as_part("delta", state.params)})
    assert found[0].keys() == found[1].keys() and ("embedding", "mean") in found[0]
    for key, x in found[0].items():
        np.testing.assert_allclose(found[1][key], x, atol=2e-6, err_msg=str(key))


# ---- a head of class means ----


@pytest.fixture(scope="module")
def topics(bench, silos):
    """What makes the head, by the text of one silo as if it were public."""
    data = silos["law"].splits["train"]
    seen = bench.see(bench.start(), bench.objective.collate(data, range(len(data)), 0))
    return discriminant(seen.features().detach().numpy(), len(WORDS), names(bench.model)["topics"])


def test_the_head_is_made_of_all_silos_class_means_under_the_last_survey(bench, silos, maps, topics):
    algorithm = align(maps, replace(PLAN, goal=Goal()), every=2, topics=topics)
    states = [(state, release) for state, release, _ in run(algorithm, bench, silos)]
    before = states[1][0].params  # what round 3, whose survey is the last, begins with
    sums = np.zeros(topics.size)
    for silo in silos.values():
        data = silo.splits["train"]
        seen = bench.see(before, bench.objective.collate(data, range(len(data)), 0))
        sums += topic_rows(seen, topics).detach().double().mean(0).numpy()
    for name, x in topics.head(topics.centres(sums)).items():
        np.testing.assert_allclose(states[-1][0].params[name], x, rtol=1e-4, atol=1e-4)


def test_a_head_of_class_means_has_no_delta_and_stands_still_between_surveys(bench, silos, maps, topics):
    algorithm = align(maps, replace(PLAN, goal=Goal()), every=ROUNDS, topics=topics, average=0.5)
    shapes = {name: x.shape for name, x in bench.start().items()}
    assert not {("delta", name) for name in topics.names.values()} & algorithm.parts(shapes).keys()
    (one, _, _), *_, (end, _, _) = run(algorithm, bench, silos)
    assert one.params.keys() == shapes.keys()
    assert all(np.array_equal(one.params[name], end.params[name]) for name in topics.names.values())


def test_the_head_is_of_the_model_as_it_is_after_a_survey_and_at_the_end(bench, silos, maps, topics):
    looked = []

    def again(params):
        looked.append(params)
        seen = bench.see(params, bench.objective.collate(data, range(len(data)), 0))
        return discriminant(seen.features().detach().numpy(), len(WORDS), topics.names)

    data = silos["law"].splits["train"]
    algorithm = align(maps, replace(PLAN, goal=Goal()), every=ROUNDS, topics=topics, again=again)
    states = [state for state, _, _ in run(algorithm, bench, silos)]
    assert len(looked) == 2 < ROUNDS  # the one survey found the model as it began
    sums = np.zeros(topics.size)
    for silo in silos.values():
        own = silo.splits["train"]
        seen = bench.see(bench.start(), bench.objective.collate(own, range(len(own)), 0))
        sums += topic_rows(seen, topics).detach().double().mean(0).numpy()
    now = again(states[-1].params)
    assert not np.allclose(now.center, topics.center, atol=1e-4)
    for name, x in now.head(topics.centres(sums)).items():
        np.testing.assert_allclose(states[-1].params[name], x, rtol=1e-4, atol=1e-4)
    shared = states[1].extra["centres", topics.names["0.weight"]]
    assert shared.shape == (len(WORDS), len(topics.center))  # no counts


def test_later_surveys_see_topics_as_the_model_then_is(bench, silos, maps, topics):
    looked = []

    def again(params):
        looked.append({name: x for name, x in params.items() if name not in topics.names.values()})
        return topics

    algorithm = align(maps, replace(PLAN, goal=Goal()), every=2, topics=topics, again=again)
    states = [state for state, _, _ in run(algorithm, bench, silos)]
    after = [0, *[1] * len(silos), 2]  # the first survey; what each silo's second sees; the end
    for params, i in zip(looked, after, strict=True):
        assert all(np.array_equal(x, states[i].params[name]) for name, x in params.items())


def test_a_private_head_is_made_of_what_surveys_released(bench, silos, maps, topics):
    surveys = {"surveys": (0,), "survey_parts": survey_parts("none", topics=True), "survey_ratio": 2.0}
    terms = Terms("example", 1e-5, ROUNDS, noise_multiplier=0.5, steps=2, rate=0.5, divisor=8.0, **surveys)
    made = make_plan(terms, SimulatedSource(1))
    plan = replace(PLAN, goal=Goal(), privacy=made.steps_at_silos(list(bench.start())), survey=made.survey())
    state, _, engine = last(align(maps, plan, every=ROUNDS, topics=topics), bench, silos)
    released = [tree.part(memory, OWN)["topics"] for memory in engine.memory.values()]
    for name, x in topics.head(topics.centres(np.sum(released, 0))).items():
        np.testing.assert_allclose(state.params[name], x, rtol=1e-5, atol=1e-5)
    unpaid = replace(plan, survey=replace(made.survey(), shares=dict(survey_parts("none"))))
    with pytest.raises(GuaranteeError, match="survey"):
        last(align(maps, unpaid, every=ROUNDS, topics=topics), bench, silos)


# ---- a bias of tokens ----


@pytest.fixture(scope="module")
def biased(silos):
    base = load_base("tiny:llama")
    attach(base, LoRA(rank=2, targets="attention"), 0)
    attach_bias(base)
    return Bench(base, make_objective("causal-lm", 24), precision="fp32")


@pytest.fixture(scope="module")
def tokens(biased):
    name = names(biased.model)["tokens"]["bias"]
    return Marginals(60, 8.0, len(biased.start()[name]), name)


def counted(bench, **surveys):
    parts = survey_parts("none", tokens=True)
    terms = Terms("example", 1e-5, ROUNDS, noise_multiplier=0.5, steps=2, rate=0.5, divisor=8.0,
                  survey_parts=parts, **{"surveys": (0,), "survey_ratio": 2.0, **surveys})  # fmt: skip
    made = make_plan(terms, SimulatedSource(1))
    return replace(PLAN, goal=Goal(), privacy=made.steps_at_silos(list(bench.start())), survey=made.survey())


def test_a_bias_is_made_of_what_surveys_released_and_no_step_moves_it(biased, silos, maps, tokens):
    plan = counted(biased)
    algorithm = align(maps, plan, every=ROUNDS, tokens=tokens)
    shapes = {name: x.shape for name, x in biased.start().items()}
    assert ("delta", tokens.name) not in algorithm.parts(shapes)
    (one, _, engine), *_, (end, _, _) = run(algorithm, biased, silos)
    own = [tree.part(memory, OWN) for memory in engine.memory.values()]
    alone = [plan.survey.std("tokens", 0) / x["examples"][0] for x in own]
    std = np.sqrt(np.sum(np.square(alone))) / len(own)
    expected = tokens.moved(biased.start(), np.mean([x["tokens"] for x in own], 0), std)
    np.testing.assert_allclose(one.params[tokens.name], expected[tokens.name], rtol=1e-4, atol=1e-5)
    assert one.params[tokens.name].any() and np.array_equal(one.params[tokens.name], end.params[tokens.name])


def test_what_stands_still_is_moved_by_no_noise_of_a_step(biased, silos, tokens):
    task = Task(0, "m", biased.start(), tuple(silos), 5)
    for still in ((), (tokens.name,)):
        (found,) = train(biased, task, [silos["law"]], counted(biased), [{}], still=still)
        moved = {name for name, x in found.params.items() if not np.array_equal(x, task.params[name])}
        assert moved == task.params.keys() - set(still)


def test_one_unit_moves_the_sums_of_tokens_by_no_more_than_their_noise_was_made_for(biased, silos, tokens):
    """Clipped by the survey: even a text that says one word over and over."""
    silo = silos["law"]
    small = Marginals(tokens.counted, 0.01, tokens.tokens, tokens.name)  # every row is far out of its room
    exact = replace(PLAN, goal=Goal())
    statistics = {"tokens": lambda seen: token_rows(seen, small)}
    task = Task(0, "m", biased.start(), tuple(silos), 5)
    found = survey(biased, task, silo, exact, statistics)
    assert np.linalg.norm(found.sums["tokens"]) <= found.units + 1e-6
    one = survey(biased, task, silo, exact, statistics, limit=1)
    assert np.linalg.norm(one.sums["tokens"]) == pytest.approx(1.0)


# ---- privacy ----


def private() -> PrivacyPlan:
    surveys = {"surveys": survey_rounds(ROUNDS, 2), "survey_parts": survey_parts("entropy"), "survey_ratio": 2.0}
    terms = Terms("example", 1e-5, ROUNDS, noise_multiplier=0.5, steps=2, rate=0.5, divisor=8.0, **surveys)
    return make_plan(terms, SimulatedSource(1))


def test_private_silos_pull_by_what_they_released_and_weigh_by_it(bench, silos, maps):
    made = private()
    plan = replace(PLAN, privacy=made.steps_at_silos(list(bench.start())), survey=made.survey())
    algorithm = align(maps, plan, every=2, phi="entropy", attention=Attention(2.0, 1.0, most=1000))
    (state, _, first), _, (_, _, third) = run(algorithm, bench, silos)
    assert ("embedding", "mean") in state.extra
    memory = tree.part(first.memory[next(iter(silos))], OWN)
    assert memory["variance"][0] > 0 and memory["round"][0] == 2  # the surveys were those of rounds 1 and 3
    exact = replace(PLAN, goal=PLAN.goal)
    ((_, kept),) = align(maps, exact).train(bench, Task(0, "m", bench.start(), (), 5), [silos["law"]], [{}])
    assert not np.allclose(
        tree.part(kept, OWN)["embedding"], tree.part(third.memory["law"], OWN)["embedding"], atol=1e-3
    )


def test_a_private_silo_weighs_by_what_its_survey_released_and_not_by_what_it_has(bench, silos, maps):
    paid = replace(PLAN, privacy=private().steps_at_silos(list(bench.start())))
    weights = Attention(2.0, 1.0, most=40)
    own = {"examples": np.array([20.0]), "phi": np.array([0.3])}
    for plan, told in ((PLAN, False), (paid, True)):
        algorithm = align(maps, plan, attention=weights, phi="entropy")
        for silo in silos.values():
            w = algorithm._weight(Task(0, "m", {}, (), 5), silo, own)
            assert w == weights.weight(20.0 if told else silo.examples, 0.3)
    alone = align(maps, paid, attention=weights, phi="entropy")
    assert len({float(alone._weight(Task(0, "m", {}, (), 5), silo, {})[0]) for silo in silos.values()}) == 1


def test_a_survey_that_the_plan_does_not_pay_for_is_refused(bench, silos, maps):
    made = private()
    plan = replace(PLAN, privacy=made.steps_at_silos(list(bench.start())))
    task = Task(0, "m", bench.start(), tuple(silos), 5)
    with pytest.raises(GuaranteeError, match="survey"):
        align(maps, plan).train(bench, task, [silos["law"]], [{}])
    paid = replace(plan, survey=made.survey())
    with pytest.raises(GuaranteeError, match="survey"):
        align(maps, paid, every=1, phi="entropy").train(bench, replace(task, round=1), [silos["law"]], [{}])
    with pytest.raises(GuaranteeError, match="survey"):
        align(maps, paid, every=2, phi="none").train(bench, task, [silos["law"]], [{}])


@pytest.mark.parametrize(
    "bad", [{"weight": -1.0}, {"every": 0}, {"momentum": 1.0}, {"cap": 0.0}, {"average": 1.0}, {"phi": "rank"}]
)
def test_what_makes_no_sense_is_refused(bad, maps):
    with pytest.raises(ValueError, match="Expected"):
        align(maps, **bad)
