"""kNN-Adapter: who is in a store, who tunes against it, what leaves, and whom the guarantee covers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from foedus import tree
from foedus.algorithms.knn_adapter import KnnAdapter, _with_rows, in_store
from foedus.errors import DataError, GuaranteeError
from foedus.lm.adapters import Frozen, attach
from foedus.lm.bench import Bench
from foedus.lm.datastore import HEAD, Interpolated, Lookup, Reader
from foedus.lm.heads import attach_head, is_head, width
from foedus.lm.load import load_base
from foedus.lm.objectives import concat, make_objective
from foedus.lm.terms import Goal, Topic
from foedus.privacy.noise import SimulatedSource
from foedus.privacy.plan import Terms, make_plan
from foedus.seeds import derive
from foedus.silo import LocalPlan, Silo
from foedus.silo.private import PrivateGradients
from foedus.silo.shard import Units
from foedus.types import Task

from ..conftest import WORDS, sentences

pytest.importorskip("faiss")
LOOKUP = Lookup(neighbours=8)
PLAN = LocalPlan(lr=0.01, batch=4, steps=4)


@pytest.fixture(scope="module")
def bench() -> Bench:
    base = load_base("tiny:llama")
    attach(base, Frozen(), 0)
    attach_head(base, HEAD, LOOKUP.sizes(width(base)), 0)
    attach_head(base, "topics", (width(base), 3), 0)
    return Bench(base, make_objective("causal-lm", 16, topics=tuple(WORDS)), precision="fp32")


def texts(bench, domain: str, count: int = 24, seed: int = 0):
    table = pa.table({"text": [text[:24] for text in sentences(domain, count, seed)], "label": [domain] * count})
    return bench.objective.encode(table, bench.base.tokenizer)


def silo_of(encoded, name: str = "law", *, units: bool = True) -> Silo:
    documents, first, of = np.unique(encoded.documents, return_index=True, return_inverse=True)
    keys = [derive(0, "unit", encoded.inputs[int(row)].tobytes().hex()) for row in first]
    return Silo(name, {"train": encoded}, units=Units(of, np.array(keys, np.uint64)) if units else None)


def task_of(bench) -> Task:
    return Task(0, "", bench.start(), ("law",), 7)


def private(bench, z: float = 1.0, steps: int = 2) -> LocalPlan:
    terms = Terms("example", 1e-5, 3, noise_multiplier=z, steps=steps, rate=1.0, divisor=6.0, rows=4)
    privacy = make_plan(terms, SimulatedSource(3)).steps_at_silos(list(bench.start()))
    return replace(PLAN, steps=steps, privacy=privacy)


@pytest.mark.parametrize("units", [True, False])
def test_a_store_and_what_is_tuned_on_it_never_meet_and_nobody_moves_another(bench, units):
    whole = texts(bench, "law", 40)
    silo = silo_of(whole, units=units)
    stored = in_store(silo)
    tuned = _with_rows(silo, ~stored).splits["train"]
    assert not set(whole.documents[stored]) & set(tuned.documents) and 0.6 < stored.mean() < 0.95
    algorithm = KnnAdapter(PLAN, LOOKUP)
    assert np.array_equal(algorithm._tuned(silo).splits["train"].documents, tuned.documents)
    assert len(algorithm._own(Reader(bench, LOOKUP), silo)) == whole.targets[stored].sum()
    extra = silo_of(concat([texts(bench, "sport", 1), whole]), units=units)
    assert np.array_equal(in_store(extra)[len(texts(bench, "sport", 1)) :], stored)


def test_all_rows_of_an_author_are_on_one_side(bench):
    whole = texts(bench, "law", 40)
    authors = whole.documents % 7
    silo = Silo("law", {"train": whole}, units=Units(authors, np.array([derive(1, a) for a in range(7)], np.uint64)))
    stored = in_store(silo)
    assert all(len(set(stored[authors == a])) == 1 for a in range(7))


def test_rounds_train_the_network_and_nothing_else_and_lower_the_loss(bench):
    silo, algorithm = silo_of(texts(bench, "law"), units=False), KnnAdapter(replace(PLAN, steps=20), LOOKUP)
    ((update, _),) = algorithm.train(bench, task_of(bench), [silo], [{}])
    delta = tree.part(update.tensors, "delta")
    assert {key[0] for key in update.tensors} == {"delta", "metric"} and all(is_head(name) for name in delta)
    after = tree.add(bench.start(), delta)
    batch = bench.objective.collate(silo.splits["train"], np.flatnonzero(~in_store(silo)), 0)
    losses = [algorithm.scores(bench, params, silo, batch, {})["nll"].sum() for params in (bench.start(), after)]
    assert losses[1] < losses[0]


def test_topics_are_learned_beside_and_the_base_is_not_asked_for_its_own_loss(bench):
    plan = replace(PLAN, goal=Goal(terms=(Topic(0.5),)))
    algorithm, silo = KnnAdapter(plan, LOOKUP), silo_of(texts(bench, "law"))
    goal = algorithm._goal(Reader(bench, LOOKUP), silo)
    assert goal.tokens == 0.0 and [type(term) for term in goal.terms] == [Topic, Interpolated]
    ((update, _),) = algorithm.train(bench, task_of(bench), [silo], [{}])
    assert any("topics" in name and x.any() for name, x in tree.part(update.tensors, "delta").items())


def test_private_steps_without_public_text_are_refused(bench):
    with pytest.raises(GuaranteeError, match="each unit bears on the loss of all others"):
        KnnAdapter(private(bench), LOOKUP)
    with pytest.raises(DataError, match="public text"):
        KnnAdapter(PLAN, LOOKUP, answers="public")


def test_units_are_clipped_and_noised_by_the_ordinary_private_steps(bench):
    public, silo = texts(bench, "sport"), silo_of(texts(bench, "law"))
    algorithm = KnnAdapter(private(bench), LOOKUP, public=public)
    ((update, memory),) = algorithm.train(bench, task_of(bench), [silo], [{}])
    assert tree.finite(update.tensors) and tree.norm(tree.part(update.tensors, "delta")) > 0
    assert not memory and [text for text, *_ in algorithm.stores.made.values()] == [public]  # nothing of its own
    assert algorithm._tuned(silo) is silo


def step(bench, algorithm, silo: Silo, goal: Goal) -> np.ndarray:
    """The sum of one private step in which everybody is, almost without noise."""
    gradients = PrivateGradients(bench, task_of(bench), [silo], algorithm.local, [{}], [goal])
    (found,), *_ = gradients.released(bench.leaves([nonzero(bench)]), 0)
    return np.concatenate([x.astype(np.float64).ravel() for x in found.values()]) * algorithm.local.privacy.divisor


def nonzero(bench) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {n: x if x.any() else 0.1 * random.standard_normal(x.shape, np.float32) for n, x in bench.start().items()}


def test_beside_a_public_store_a_unit_moves_a_step_by_its_own_clipped_gradient_only(bench):
    plan = private(bench, z=1e-9)
    plan = replace(plan, privacy=replace(plan.privacy, parts=replace(plan.privacy.parts, norms=(0.05,))))
    algorithm = KnnAdapter(plan, LOOKUP, public=texts(bench, "sport"))
    whole = silo_of(texts(bench, "law", 5))
    goal = algorithm._goal(Reader(bench, LOOKUP), whole)
    everybody = step(bench, algorithm, whole, goal)
    for gone in range(5):
        rest = _with_rows(whole, whole.units.of != gone)
        moved = np.linalg.norm(everybody - step(bench, algorithm, rest, algorithm._goal(Reader(bench, LOOKUP), rest)))
        assert moved <= 0.05 * (1 + 1e-3)


def test_in_a_store_of_its_own_text_one_unit_would_move_all_others(bench):
    """Why units inside a silo cannot be protected there."""
    whole, reader = silo_of(texts(bench, "law", 12)), Reader(bench, LOOKUP)
    algorithm = KnnAdapter(private(bench, z=1e-9), LOOKUP, public=texts(bench, "sport"))
    stored = np.isin(whole.units.of, range(6))
    tuned = _with_rows(whole, ~stored)
    with_it, without = (
        step(bench, algorithm, tuned, Goal(0.0, (Interpolated(reader, reader.store(text)),)))
        for text in (
            _with_rows(whole, stored).splits["train"],
            _with_rows(whole, stored & (whole.units.of != 0)).splits["train"],
        )
    )
    assert np.linalg.norm(with_it - without) > 0  # six tuning units move, though none of them came or went


def test_answers_come_from_the_silos_own_store_or_from_the_public_one(bench):
    silo, public = silo_of(texts(bench, "law")), texts(bench, "sport")
    batch = bench.objective.collate(silo.splits["train"], np.arange(4), 0)
    own, shared = (
        KnnAdapter(private(bench), LOOKUP, public=public, answers=x).scores(bench, bench.start(), silo, batch, {})
        for x in ("own", "public")
    )
    assert own["nll"].sum() < shared["nll"].sum()
    assert own.keys() == bench.scores(bench.start(), batch).keys()
    other = KnnAdapter(private(bench), LOOKUP, public=public, answers="public")
    again = other.scores(bench, bench.start(), silo_of(texts(bench, "medicine"), "medicine"), batch, {})
    assert np.array_equal(again["nll"], shared["nll"])  # the same whoever asks


def test_the_caveat_is_there_to_be_shown():
    assert "does not cover" in KnnAdapter.caveat


def test_a_silo_all_of_whose_text_is_in_the_store_says_so_and_not_how_much_it_is(bench):
    silo = silo_of(texts(bench, "law", 1), units=False)
    with pytest.raises(DataError, match="silo 'law'") as said:
        _with_rows(silo, np.zeros(1, bool))
    assert not any(letter.isdigit() for letter in str(said.value))
