"""A bias of tokens brings what a model expects to what text has, by sums that one row moves by at most 1."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foedus.algorithms.alignment import survey_parts
from foedus.errors import DataError, ModelError
from foedus.lm.adapters import Frozen, LoRA, attach, load_adapter, load_params, params_of, save_adapter
from foedus.lm.bench import Bench
from foedus.lm.clipping import Clipping
from foedus.lm.heads import BIAS, attach_bias, attach_head, head, is_head, names, width
from foedus.lm.load import load_base
from foedus.lm.objectives import make_objective
from foedus.lm.statistics import token_rows
from foedus.lm.terms import Goal, Topic
from foedus.marginals import NOISE, RARE, Marginals, marginals

from .lm.test_bench import make_batch

TOKENS = 9


def of(counted=TOKENS, room=1.0, tokens=TOKENS):
    return Marginals(counted, room, tokens, "b")


def test_exact_counts_make_the_expected_what_is_there():
    """With one context the model's softmax is its unigram, so one release is the whole answer."""
    random = np.random.default_rng(0)
    logits, there = random.normal(size=TOKENS), random.dirichlet(np.ones(TOKENS))
    expected = np.exp(logits) / np.exp(logits).sum()
    bias = of().moved({"b": np.zeros(TOKENS, np.float32)}, 1e4 * np.concatenate([there, expected]), 0.0)["b"]
    said = np.exp(logits + bias)
    np.testing.assert_allclose(said / said.sum(), there, atol=5 * RARE)
    assert bias.dtype == np.float32


def test_what_the_sums_are_divided_by_does_not_matter_and_biases_add_up():
    sums = np.random.default_rng(1).random(2 * TOKENS)
    start = {"b": np.ones(TOKENS, np.float32)}
    one, other = of().moved(start, sums, 0.01), of().moved(start, sums / 7, 0.01 / 7)
    np.testing.assert_allclose(one["b"], other["b"], rtol=1e-5)
    np.testing.assert_allclose(
        one["b"] - of().moved({"b": np.zeros(TOKENS, np.float32)}, sums, 0.01)["b"], 1, rtol=1e-5
    )


def test_noise_alone_moves_no_logit_far_and_a_token_that_only_the_model_says_is_held_back():
    random, tokens, std = np.random.default_rng(2), 20000, 0.5
    many = of(tokens, tokens=tokens)
    noise = random.normal(0, std, 2 * tokens)
    bias = many.moved({"b": np.zeros(tokens, np.float32)}, noise, std)["b"]
    assert np.abs(bias).max() < np.log((NOISE + 4.5) / NOISE) and np.abs(bias).mean() < 0.25
    noise[tokens] += 100 * std  # the model expects token 0 a hundred standard deviations' worth, and it is not there
    assert many.moved({"b": np.zeros(tokens, np.float32)}, noise, std)["b"][0] < -3


def test_tokens_that_are_not_counted_keep_their_logits():
    start = {"b": np.arange(TOKENS, dtype=np.float32), "other": np.ones(3)}
    moved = of(2).moved(start, np.array([1.0, 2.0, 2.0, 1.0]), 0.0)
    assert moved.keys() == {"b"} and list(np.flatnonzero(moved["b"] != start["b"])) == [0, 1]
    assert moved["b"][0] < 0 and moved["b"][1] > 1
    assert not of().still["b"].any() and of().size == 2 * TOKENS


def test_public_text_tells_the_room_of_a_row_and_nothing_else():
    public = np.zeros((3, 6))
    public[:2, 1], public[:2, 4] = 3.0, 4.0
    assert marginals(public, TOKENS, "b") == Marginals(3, 7.5, TOKENS, "b")
    with pytest.raises(DataError, match="two tokens"):
        marginals(np.zeros((3, 6)), TOKENS, "b")


def test_half_of_a_survey_is_for_tokens():
    shares = dict(survey_parts("none", topics=True, tokens=True))
    assert shares["tokens"] == 0.5 and shares["topics"] == 0.25 and sum(shares.values()) == pytest.approx(1)
    assert dict(survey_parts("none", tokens=True))["tokens"] == 0.5


# ---- in a model ----


def biased(family="llama", adapter=None, seed=0):
    base = load_base(f"tiny:{family}")
    attach(base, adapter or LoRA(rank=2, targets="attention"), seed)
    attach_head(base, "topics", (width(base), 3), seed)
    attach_bias(base)
    return base


def bench_of(family="llama", **options):
    return Bench(biased(family), make_objective("causal-lm", 24), precision="fp32", **options)


def some(bench, seed=3):
    random = np.random.default_rng(seed)
    return {n: x + random.normal(0, 0.5, x.shape).astype("f4") for n, x in bench.start().items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_way_through_the_model_says_what_logits_plus_bias_say(family):
    bench, batch = bench_of(family), make_batch("causal-lm", 3, 9, 0)
    assert (bench._fast is not None) == (family == "llama")
    params = some(bench)
    bias = torch.from_numpy(params[names(bench.model)[BIAS]["bias"]])
    load_params(bench.model, {**params, names(bench.model)[BIAS]["bias"]: 0 * bias.numpy()})
    with torch.no_grad():
        plain = bench.model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits
    load_params(bench.model, params)
    with torch.no_grad():
        logits = bench.model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits
    torch.testing.assert_close(logits, plain + bias)
    said, meant = bench.objective.align(logits, batch["labels"])
    nll = torch.nn.functional.cross_entropy(said, meant, reduction="none")
    seen = bench.see(params, batch)
    torch.testing.assert_close(seen.losses, nll, atol=1e-4, rtol=1e-4)
    leaves = bench.leaves([params])
    torch.testing.assert_close(bench.losses(leaves, [batch])[0][0], nll.sum(), atol=1e-3, rtol=1e-4)
    assert bench.scores(params, batch)["nll"].sum() == pytest.approx(nll.sum().item(), rel=1e-4)
    hits = (said.argmax(-1) == meant).sum().item()
    assert bench.scores(params, batch)["correct"].sum() == hits
    goal = Goal(terms=(Topic(0.1),))
    there = {**batch, "topics": torch.zeros(len(batch["labels"]), dtype=torch.long)}
    assert bench.totals(leaves, [there], [goal])[1].item() == pytest.approx(nll.sum().item(), rel=1e-4)
    torch.testing.assert_close(seen.expected(len(bias)).sum(0), said.softmax(-1).sum(0), atol=1e-3, rtol=1e-3)
    assert torch.equal(seen.counts(len(bias)).sum(0), torch.bincount(meant, minlength=len(bias)).float())
    entropy = -(said.softmax(-1) * said.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(seen.entropy(), seen._per_row(entropy), atol=1e-3, rtol=1e-3)


def test_silos_with_biases_of_their_own_in_one_pass_are_as_one_by_one():
    bench, batches = bench_of(), [make_batch("causal-lm", 3, 9, i) for i in range(2)]
    params = [some(bench, 1), some(bench, 2)]
    units = [torch.arange(3)] * 2
    clippings = [Clipping((1e6,), {})] * 2
    both = bench.clipped(bench.leaves(params), batches, units, clippings)
    for k in range(2):
        alone = bench.clipped(bench.leaves([params[k]]), [batches[k]], units[:1], clippings[:1])
        assert both.losses[k].item() == pytest.approx(alone.losses[0].item(), rel=1e-5)
        for name, x in alone.gradients.items():
            torch.testing.assert_close(both.gradients[name][k], x[0], atol=1e-4, rtol=1e-3)
    assert not bench.stacks
    assert not both.gradients[names(bench.model)[BIAS]["bias"]].any()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_terms_are_clipped_beside_a_bias_and_it_has_no_gradient(family):
    bench, batch = bench_of(family), make_batch("causal-lm", 3, 9, 0)
    batch = {**batch, "topics": torch.tensor([0, 1, -1])}
    found = bench.clipped(
        bench.leaves([some(bench)]), [batch], [torch.arange(3)], [Clipping((1e6,), {})], [Goal(terms=(Topic(0.5),))]
    )
    assert not found.gradients[names(bench.model)[BIAS]["bias"]].any()
    assert found.gradients[names(bench.model)["topics"]["0.weight"]].any()


def test_a_row_of_counts_is_in_rooms_and_adds_up_to_its_targets():
    bench, batch = bench_of(), make_batch("causal-lm", 3, 9, 0)
    tokens = len(bench.start()[names(bench.model)[BIAS]["bias"]])
    found = token_rows(bench.see(bench.start(), batch), of(tokens, 5.0, tokens))
    assert found.shape == (3, 2 * tokens)
    targets = torch.bincount(bench._owners(batch), minlength=3).float()
    torch.testing.assert_close(found.view(3, 2, tokens).sum(2), (targets / 5.0)[:, None].expand(3, 2))


def test_a_saved_bias_is_said_by_whoever_loads_it_and_by_nobody_else(tmp_path):
    base, batch = biased(), make_batch("causal-lm", 3, 9, 0)
    draw = np.random.default_rng(3)
    params = {name: x + draw.standard_normal(x.shape).astype("f4") for name, x in params_of(base.model).items()}
    save_adapter(base, LoRA(rank=2, targets="attention"), params, tmp_path, "# A card\n")
    load_params(base.model, params)
    ours = load_base("tiny:llama")
    load_adapter(ours, tmp_path)
    with torch.no_grad():
        assert torch.equal(ours.model(**batch).logits, base.model(**batch).logits)
    assert not any(p.requires_grad for name, p in ours.model.named_parameters() if is_head(name))
    assert head(ours.model, BIAS).bias.any()


def test_a_model_without_tokens_and_a_second_bias_are_refused():
    with pytest.raises(ModelError, match="one that has it"):
        attach_bias(biased())
    base = load_base("tiny:bert", task="sequence-classification", labels=("a", "b"))
    attach(base, Frozen(), 0)
    with pytest.raises(ModelError, match="predicts no tokens"):
        attach_bias(base)
