"""A store of text: what it finds, how it is weighed against the base, and what it costs."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from foedus.errors import ModelError
from foedus.lm import datastore
from foedus.lm.adapters import Frozen, LoRA, attach
from foedus.lm.bench import Bench
from foedus.lm.datastore import (
    HEAD,
    Datastore,
    Found,
    Interpolated,
    Lookup,
    Reader,
    Stores,
    log_mixture,
    mixture_scores,
    network,
    rows_of,
)
from foedus.lm.heads import attach_head, width
from foedus.lm.load import load_base
from foedus.lm.objectives import make_objective
from foedus.lm.terms import Goal

from ..conftest import sentences

pytest.importorskip("faiss")
LOOKUP = Lookup(neighbours=8)


@pytest.fixture(scope="module")
def bench() -> Bench:
    base = load_base("tiny:llama")
    attach(base, Frozen(), 0)
    attach_head(base, HEAD, LOOKUP.sizes(width(base)), 0)
    return Bench(base, make_objective("causal-lm", 24), precision="fp32")


@pytest.fixture(scope="module")
def reader(bench) -> Reader:
    return Reader(bench, LOOKUP)


@pytest.fixture(scope="module")
def text(bench):
    return bench.objective.encode(pa.table({"text": sentences("law", 20)}), bench.base.tokenizer)


def keys(count: int, seed: int = 0) -> np.ndarray:
    """Points in clusters, as keys of text are."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((40, 64))[rng.integers(0, 40, count)] + 0.5 * rng.standard_normal((count, 64))).astype(
        np.float16
    )


def batch_of(bench, text, rows):
    return bench.objective.collate(text, rows, 0)


def answers(found: Found, weight: float, temperature: float) -> torch.Tensor:
    """What the network must say for a certain (λ, T)."""
    logit = math.log(weight / (1 - weight)) - math.log(LOOKUP.weight / (1 - LOOKUP.weight))
    shift = math.log(math.expm1(temperature)) - math.log(math.expm1(LOOKUP.temperature))
    return torch.tensor([logit, shift]).expand(*found.mask.shape, 2)


def chances(reader, store, batch, answer, vocabulary) -> torch.Tensor:
    """(b, t, V): the mixture's probability of every token, each put in as the target in turn."""
    found = reader.read(batch, store)
    logits = reader.bench.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.detach()
    logp = logits.log_softmax(-1)
    each = []
    for token in range(vocabulary):
        asked = replace(found, targets=torch.full_like(found.targets, token), nll=-logp[..., token])
        each.append(log_mixture(asked, answer(found), reader.lookup).exp())
    return torch.stack(each, -1)[found.mask]


def test_the_mixture_adds_up_to_one(bench, reader, text):
    store = reader.store(rows_of(text, np.arange(10)))
    batch = batch_of(bench, text, [10, 11])
    vocabulary = bench.model.config.vocab_size
    for weight, temperature in [(0.25, 0.1), (0.9, 2.0), (0.01, 1e-3)]:
        p = chances(reader, store, batch, lambda found, w=weight, t=temperature: answers(found, w, t), vocabulary)
        np.testing.assert_allclose(p.sum(-1).numpy(), 1.0, atol=1e-5)


def test_without_weight_the_base_speaks_alone_and_with_all_of_it_the_store(bench, reader, text):
    found = reader.read(batch_of(bench, text, [10, 11]), reader.store(rows_of(text, np.arange(10))))
    alone = torch.tensor([-1e4, 0.0]).expand(*found.mask.shape, 2)
    assert torch.equal(log_mixture(found, alone, LOOKUP)[found.mask], -found.nll[found.mask])
    near = (-found.distances / LOOKUP.temperature).softmax(-1)
    own = (near * (found.tokens == found.targets[..., None])).sum(-1)
    p = log_mixture(found, torch.tensor([1e4, 0.0]).expand(*found.mask.shape, 2), LOOKUP).exp()
    np.testing.assert_allclose(p[found.mask], own[found.mask], atol=1e-6)


def test_the_base_inside_is_the_base(bench, reader, text):
    batch = batch_of(bench, text, [3, 4, 5])
    found = reader.read(batch, reader.store(rows_of(text, np.zeros(0, np.int64))))
    plain = bench.scores(bench.start(), batch)
    np.testing.assert_allclose((found.nll * found.mask).sum(1), plain["nll"], rtol=1e-5)
    mixed = mixture_scores(reader, Datastore.of(np.zeros((0, 32), np.float16), np.zeros(0)), bench.start(), batch)
    for name, x in plain.items():  # an empty store says nothing
        np.testing.assert_allclose(mixed[name], x, rtol=1e-5)


def test_a_query_that_equals_a_key_is_answered_by_it_when_cold(bench, reader, text):
    one = rows_of(text, np.array([7]))
    found = reader.read(batch_of(bench, one, [0]), reader.store(one))
    p = log_mixture(found, torch.tensor([1e4, -60.0]).expand(*found.mask.shape, 2), LOOKUP).exp()
    np.testing.assert_allclose(p[found.mask], 1.0, atol=1e-5)


def test_the_network_starts_at_the_constant_solution(bench, reader, text):
    found = reader.read(batch_of(bench, text, [1, 2]), reader.store(text))
    assert not network(bench, bench.start(), found.features).any()
    weights, own, base = datastore._weighed(found.distances, torch.zeros(*found.mask.shape, 2), LOOKUP)
    np.testing.assert_allclose(own.exp(), LOOKUP.weight, rtol=1e-5)
    np.testing.assert_allclose((own.exp() + base.exp()), 1.0, rtol=1e-6)
    wanted = (-found.distances / LOOKUP.temperature).softmax(-1)
    np.testing.assert_allclose(weights[found.mask], wanted[found.mask], rtol=1e-4, atol=1e-7)


def fitted(bench, batch, term, steps=60, lr=1e-2) -> tuple[list[float], dict]:
    leaves = bench.leaves([bench.start()])
    optimizer = torch.optim.Adam(leaves.values(), lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        (total,), *_ = bench.totals(leaves, [batch], [Goal(0.0, (term,))])
        total.backward()
        optimizer.step()
        losses.append(float(total.detach()))
    return losses, {name: x[0].detach().numpy() for name, x in leaves.items()}


def best_constant(found: Found) -> tuple[float, float, float]:
    """(loss, λ, T) of the best constant on a grid."""

    def loss(weight, temperature):
        rows = -log_mixture(found, answers(found, weight, temperature), LOOKUP) * found.mask
        return float((rows.sum(1) / found.mask.sum(1)).mean())

    grid = [(w, t) for w in (0.05, 0.25, 0.5, 0.75, 0.95) for t in (0.03, 0.1, 0.3, 1.0)]
    return min((loss(*each), *each) for each in grid)


def test_the_network_is_never_worse_than_the_best_constant_on_what_it_was_tuned_on(bench, text):
    store, batch = Reader(bench, LOOKUP).store(rows_of(text, np.arange(14))), batch_of(bench, text, [*range(14, 20)])
    least, weight, temperature = best_constant(Reader(bench, LOOKUP).read(batch, store))
    reader = Reader(bench, replace(LOOKUP, weight=weight, temperature=temperature))
    losses, _ = fitted(bench, batch, Interpolated(reader, store))
    assert losses[0] == pytest.approx(least, rel=1e-4)
    assert losses[-1] < losses[0]


def trusted(bench, reader, params, batch, store) -> float:
    found = reader.read(batch, store)
    _, own, _ = datastore._weighed(found.distances, network(bench, params, found.features), reader.lookup)
    return float(own.exp()[found.mask].mean())


def test_tuned_on_the_store_itself_it_would_trust_nothing_else_and_apart_it_does_not(bench, reader, text):
    rng = np.random.default_rng(0)
    noise = pa.table({"text": ["".join(chr(97 + x) for x in rng.integers(0, 26, 20)) for _ in range(12)]})
    text = bench.objective.encode(noise, bench.base.tokenizer)  # nothing to learn: only what is stored can be known
    stored, held = np.arange(8), batch_of(bench, text, [8, 9, 10, 11])
    store = reader.store(rows_of(text, stored))
    own = batch_of(bench, text, [0, 1, 2, 3])
    _, leaked = fitted(bench, own, Interpolated(reader, store), steps=40, lr=5e-2)
    _, sound = fitted(bench, held, Interpolated(reader, store), steps=40, lr=5e-2)
    assert trusted(bench, reader, leaked, own, store) > 0.95
    assert trusted(bench, reader, sound, held, store) < 0.5


def test_an_inverted_file_finds_what_looking_at_all_finds():
    x, tokens, queries = keys(6000), np.arange(6000), keys(100, seed=1)
    exact, fast = Datastore.of(x, tokens), Datastore.of(x, tokens, exact=100)
    assert fast.index.nprobe == 32 and fast.index.nlist == 77
    (near, wanted), (_, found) = exact.search(queries, 16), fast.search(queries, 16)
    recall = np.mean([len(set(a) & set(b)) / 16 for a, b in zip(wanted, found, strict=True)])
    assert recall >= 0.95
    brute = ((queries[:, None].astype(np.float32) - x[None].astype(np.float32)) ** 2).sum(-1)
    np.testing.assert_allclose(near, np.sort(brute, 1)[:, :16], rtol=1e-3, atol=1e-3)


def test_a_store_with_fewer_entries_than_neighbours_says_so():
    distances, tokens = Datastore.of(keys(3), np.array([5, 6, 7])).search(keys(2), 5)
    assert np.isinf(distances[:, 3:]).all() and (tokens[:, 3:] == -1).all()
    assert np.isfinite(distances[:, :3]).all() and set(tokens[0, :3]) == {5, 6, 7}


def test_the_projection_is_public_and_keeps_distances(bench):
    x = np.random.default_rng(0).standard_normal((50, 600))
    p = Lookup().projection(600)
    assert np.array_equal(p, Lookup().projection(600)) and not np.array_equal(p, Lookup(seed=1).projection(600))
    before, after = np.linalg.norm(x[:25] - x[25:], axis=1), np.linalg.norm(x[:25] @ p - x[25:] @ p, axis=1)
    assert np.mean(after**2 / before**2) == pytest.approx(1.0, abs=0.1)
    assert Lookup().projection(width(bench.base)) is None


def test_padding_and_company_change_no_row(bench, reader, text):
    store = reader.store(text)
    alone = [mixture_scores(reader, store, bench.start(), batch_of(bench, text, [row])) for row in (2, 3)]
    both = mixture_scores(reader, store, bench.start(), batch_of(bench, text, [2, 3]))
    for name, x in both.items():
        np.testing.assert_allclose(x, np.concatenate([one[name] for one in alone]), rtol=1e-4)


def test_a_stored_text_is_predicted_better_than_the_base_does(bench, reader, text):
    batch, store = batch_of(bench, text, [2, 3]), reader.store(text)
    mixed, plain = mixture_scores(reader, store, bench.start(), batch), bench.scores(bench.start(), batch)
    assert (mixed["nll"] < plain["nll"]).all() and (mixed["correct"] > plain["correct"]).all()
    assert (mixed["targets"] == plain["targets"]).all()


def test_rows_can_be_taken_out(text):
    part = rows_of(replace(text, silent=np.arange(len(text.inputs.values)) % 3 == 0), np.array([4, 1]))
    assert len(part) == 2 and np.array_equal(part.inputs[0], text.inputs[4]) and part.domains == ("", "")
    bounds = text.inputs.bounds
    wanted = np.concatenate([np.arange(bounds[r], bounds[r + 1]) % 3 == 0 for r in (4, 1)])
    assert np.array_equal(part.silent, wanted) and part.targets.tolist() == text.targets[[4, 1]].tolist()


def test_a_store_is_made_once(reader, text):
    stores = Stores()
    assert stores.of(reader, text) is stores.of(reader, text)
    part = rows_of(text, np.arange(3))
    assert stores.of(reader, part, whole=part) is not stores.of(reader, text)


def test_a_model_that_moves_is_refused():
    base = load_base("tiny:llama")
    attach(base, LoRA(rank=2), 0)
    with pytest.raises(ModelError, match="a frozen base"):
        Reader(Bench(base, make_objective("causal-lm", 24), precision="fp32"), LOOKUP)


def test_without_faiss_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ModelError, match=r"foedus\[knn\]"):
        Datastore.of(keys(3), np.arange(3))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "falcon"])
def test_every_causal_family_has_keys(family):
    base = load_base(f"tiny:{family}")
    attach(base, Frozen(), 0)
    attach_head(base, HEAD, LOOKUP.sizes(width(base)), 0)
    bench = Bench(base, make_objective("causal-lm", 24), precision="fp32")
    reader, text = Reader(bench, LOOKUP), bench.objective.encode(pa.table({"text": ["a b c d"]}), base.tokenizer)
    assert len(reader.store(text)) == text.tokens
