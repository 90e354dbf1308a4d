"""Canaries reach what can be reached, find what was planted, and find nothing in a sound mechanism."""

from __future__ import annotations

import json
import math
from itertools import repeat

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, kstest

from foedus.audit import bounds, canaries
from foedus.audit.bounds import METHODS, ceiling, gaussian_mu
from foedus.audit.canaries import Planted, Tensor, extract, gradient_canaries, plant, run, sampling
from foedus.audit.membership import documents_of, read, select
from foedus.errors import GuaranteeError, ModelError
from foedus.lm.adapters import LoRA, attach
from foedus.lm.bench import Bench
from foedus.lm.load import load_base
from foedus.lm.objectives import concat, make_objective
from foedus.privacy.noise import SimulatedSource, SystemSource
from foedus.privacy.steps import Following, PrivateSteps, parts_of

from ..conftest import sentences
from .test_membership import encode, overfit

DELTA = 1e-5
Z = 1 / gaussian_mu(8.0, DELTA)
"""The noise multiplier of one Gaussian step at ε = 8."""


@pytest.fixture(scope="module")
def bench() -> Bench:
    base = load_base("tiny:llama")
    attach(base, LoRA(rank=16), 0)
    return Bench(base, make_objective("causal-lm", 32), precision="fp32")


# ---- gradient canaries ----


def layout(multiplier, sizes=(1500, 700, 800), norm=0.5) -> list[Tensor]:
    return [Tensor(f"tensor {i}", size, norm, multiplier * norm) for i, size in enumerate(sizes)]


def trial(step, tensors, *, count=1000, steps=1, rate=1.0, scale=1.0, width=1, seed=0, **more):
    generator = np.random.default_rng(seed)
    crowd = generator.standard_normal(sum(t.size for t in tensors))
    made = gradient_canaries(tensors, count, generator, width=width)
    return run(step, repeat(crowd, steps), tensors, made, generator, rate=rate, scale=scale, **more)


def honest(tensors):
    std = np.repeat([t.std for t in tensors], [t.size for t in tensors])
    return lambda total, generator: total + std * generator.standard_normal(len(total))


def failures(trial) -> set[str]:
    return {check.name for check in trial.checks if not check.passed}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("steps", [1, 20])
def test_gradient_canaries_reach_four_fifths_of_the_ceiling_and_more(name, steps):
    """A thousand of them, true ε = 8, mean of three runs, against the ideal ones; `steps` share the budget."""
    tensors = layout(Z * math.sqrt(steps))
    reached = [METHODS[name](trial(honest(tensors), tensors, steps=steps, seed=seed).scores, DELTA, 0.95).epsilon
               for seed in range(3)]  # fmt: skip
    assert 0.8 * ceiling(METHODS[name], 8.0, DELTA, 1000, trials=20) <= np.mean(reached) < 8.0


def test_under_sampling_they_reach_the_ceiling_of_the_mechanism_itself():
    tensors, generator = layout(1.13), np.random.default_rng(1)
    ours = [trial(honest(tensors), tensors, steps=100, rate=0.1, seed=seed).scores for seed in range(4)]
    best = [canaries.ideal(1.13, 0.1, 100, 1000, generator) for _ in range(4)]
    means = [np.mean([bounds.one_run_fdp(scores, DELTA).epsilon for scores in some]) for some in (ours, best)]
    assert means[0] == pytest.approx(means[1], rel=0.15) and means[0] > 1


def test_a_score_is_the_likelihood_ratio():
    """At one step without sampling a member's score minus another's is (y − ½) / z² apart in mean: 1/z² = μ²."""
    scores = trial(honest(layout(Z)), layout(Z), seed=3).scores
    assert scores.members.mean() - scores.others.mean() == pytest.approx(1 / Z**2, rel=0.1)
    assert canaries.evidence(np.array([0.5]), 2.0, 0.3)[0] == pytest.approx(0.0)
    y, z, q = 1.7, 0.8, 0.05
    density = [math.exp(-((y - mean) ** 2) / (2 * z * z)) for mean in (0, 1)]
    exact = math.log(((1 - q) * density[0] + q * density[1]) / density[0])
    assert canaries.evidence(np.array([y]), z, q)[0] == pytest.approx(exact)


@pytest.mark.parametrize("width", [1, 3])
def test_canaries_are_orthogonal_and_of_the_greatest_norm_in_every_part(width):
    tensors = [Tensor("a", 600, 0.3, 1.0, 0), Tensor("b", 500, 0.4, 2.0, 1), Tensor("c", 100, 0.3, 1.0, 0)]
    made = gradient_canaries(tensors, 100, np.random.default_rng(0), width=width)
    rows = np.zeros((100, 1200))
    rows[np.arange(100)[:, None], made.places] = made.values
    np.testing.assert_allclose(rows @ rows.T, np.eye(100) * 0.25, atol=1e-12)  # 0.3² + 0.4²
    first = np.r_[0:600, 1100:1200]
    np.testing.assert_allclose(np.linalg.norm(rows[:, first], axis=1), 0.3)
    assert 1 / made.multiplier**2 == pytest.approx(0.3**2 + 0.4**2 / 4)


def test_shares_of_the_budget_add_up_to_the_plans_multiplier():
    """Parts with norms C_j and multipliers z / √share_j are one Gaussian of multiplier z."""
    z, norms, shares = 1.3, (0.2, 0.7), (0.4, 0.6)
    tensors = [Tensor(f"{j}", 500, c, z * c / math.sqrt(s), j)
               for j, (c, s) in enumerate(zip(norms, shares, strict=True))]  # fmt: skip
    assert gradient_canaries(tensors, 50, np.random.default_rng(0)).multiplier == pytest.approx(z)


def test_a_part_without_room_is_left_alone_and_without_any_room_there_are_no_canaries():
    tensors = [Tensor("large", 500, 1.0, 1.0, 0), Tensor("small", 20, 1.0, 1.0, 1)]
    made = gradient_canaries(tensors, 100, np.random.default_rng(0))
    assert made.places.max() < 500 and made.multiplier == pytest.approx(1.0)
    with pytest.raises(ValueError, match="coordinates or more"):
        gradient_canaries(tensors, 600, np.random.default_rng(0))


def test_a_sound_mechanism_passes_every_check():
    tensors = layout(Z)
    failed = [failures(trial(honest(tensors), tensors, count=50, steps=5, rate=0.5, seed=s)) for s in range(100)]
    assert sum(map(bool, failed)) <= 3  # five checks, each wrong once in a thousand


def test_a_public_divisor_and_float32_releases_change_nothing():
    tensors = layout(Z)
    plain = honest(tensors)
    mean = trial(lambda x, g: (plain(x, g) / 64).astype("f4"), tensors, scale=64, seed=5)
    assert not failures(mean)
    np.testing.assert_allclose(mean.scores.members, trial(plain, tensors, seed=5).scores.members, rtol=1e-3, atol=1e-3)


def planted_bugs(tensors):
    plain, d = honest(tensors), sum(t.size for t in tensors)
    std = np.repeat([t.std for t in tensors], [t.size for t in tensors])

    def reused(total, generator):
        return total + std * np.random.default_rng(7).standard_normal(d)

    turn = iter(range(100))

    def alternating(total, generator):
        return total + std * np.random.default_rng(next(turn) % 3).standard_normal(d)

    def twin(total, generator):
        noise = generator.standard_normal(1500)
        return total + std * np.concatenate([noise[: t.size] for t in tensors])

    def missing(total, generator):
        noise = std * generator.standard_normal(d)
        noise[1500:2200] = 0
        return total + noise

    def uniform(total, generator):
        return total + std * generator.uniform(-math.sqrt(3), math.sqrt(3), d)

    size, fresh = "the noise has the stated size on every tensor", "the noise is fresh in every step"
    once = "the sum goes in once, unscaled"
    return {
        "noise halved": (lambda x, g: x + (plain(x, g) - x) / 2, size),
        "noise 5 % too small": (lambda x, g: x + 0.95 * (plain(x, g) - x), size),
        "noise added twice": (lambda x, g: plain(plain(x, g), g), size),
        "noise missing on one tensor": (missing, size),
        "seed reused in every step": (reused, fresh),
        "seed reused in every third step": (alternating, fresh),
        "one seed for all tensors": (twin, "no two tensors get the same noise"),
        "noise that is not Gaussian": (uniform, "the noise is Gaussian"),
        "divided by the batch's true size": (lambda x, g: plain(x, g) * 64 / 61, once),
        "the sum counted twice": (lambda x, g: plain(2 * x, g), once),
    }


@pytest.mark.parametrize("bug", planted_bugs(layout(Z)))
def test_a_planted_bug_is_caught(bug):
    tensors = layout(Z)
    step, name = planted_bugs(tensors)[bug]
    assert name in failures(trial(step, tensors, count=100, steps=10, rate=0.2))


def test_a_tenth_too_little_noise_on_one_small_tensor_is_caught_and_named():
    tensors = layout(Z, (40_000, 400))
    plain = honest(tensors)

    def weak(total, generator):
        noise = plain(total, generator) - total
        noise[40_000:] *= 0.9
        return total + noise

    (check, *_) = trial(weak, tensors, count=100, steps=10).checks
    assert not check.passed and "furthest off, tensor 1" in check.detail


def test_halved_noise_breaks_the_stated_epsilon_too():
    tensors = layout(Z)
    step = planted_bugs(tensors)["noise halved"][0]
    right, wrong = (trial(s, tensors).scores for s in (honest(tensors), step))
    assert bounds.p_value(bounds.gaussian_fit, wrong, 8.0, DELTA) < 1e-3
    assert bounds.p_value(bounds.gaussian_fit, right, 8.0, DELTA) > 1e-3


def test_noise_that_is_correlated_on_purpose_is_not_asked_to_be_fresh():
    names = {check.name for check in trial(honest(layout(Z)), layout(Z), steps=3, independent=False).checks}
    assert "the noise is fresh in every step" not in names and len(names) == 4


def test_a_mechanism_may_work_in_place_and_a_wrong_shape_is_refused():
    tensors = layout(Z)

    def in_place(total, generator):
        total += honest(tensors)(total, generator) - total
        return total

    assert not failures(trial(in_place, tensors, steps=3))
    with pytest.raises(ValueError, match="shape"):
        trial(lambda x, g: x[:-1], tensors)


SHAPES = {"layers.0.a": (40, 20), "layers.1.a": (30, 30), "head": (10, 90)}


def plan(z=Z, **more) -> PrivateSteps:
    parts = parts_of(list(SHAPES), "layers", 0.7, (0.5, 0.3, 0.2))
    rest = {"rows": 1, "parts": parts, "multipliers": (z,), "source": SimulatedSource(1)} | more
    return PrivateSteps("example", rate=0.5, divisor=32.0, steps=4, **rest)


@pytest.mark.parametrize("more", [{}, {"following": Following()}, {"sensitivity": 1.3}])
def test_the_private_steps_of_a_plan_pass_and_reach_the_ceiling(more):
    steps = plan(**more)
    tensors, step = canaries.mechanism(steps, SHAPES)
    tried = trial(step, tensors, count=700, scale=steps.divisor, seed=2)
    assert not failures(tried)
    growth = steps.following.growth if steps.following else 1.0
    assert tried.multiplier == pytest.approx(Z * steps.sensitivity * growth)
    if not more:
        assert bounds.gaussian_fit(tried.scores, DELTA).epsilon > 0.8 * ceiling(bounds.gaussian_fit, 8.0, DELTA, 700)


def test_private_steps_that_do_not_do_as_their_plan_says_are_caught():
    tensors, step = canaries.mechanism(plan(), SHAPES)  # simulated noise for one purpose is the same in every step
    assert failures(trial(step, tensors, steps=3, count=50, scale=32.0)) == {"the noise is fresh in every step"}
    tensors, step = canaries.mechanism(plan(source=SystemSource()), SHAPES)
    assert "the noise is fresh in every step" not in failures(trial(step, tensors, steps=3, count=50, scale=32.0))
    assert "the sum goes in once, unscaled" in failures(trial(step, tensors, count=50, scale=28.0))
    with pytest.raises(GuaranteeError, match="without a clip"):
        canaries.mechanism(plan(bare_std=1.0), SHAPES)


def test_poisson_sampling_passes_and_shuffling_is_caught():
    generator = np.random.default_rng(0)
    failed = 0
    for rate, steps in ((0.002, 60), (0.1, 40), (0.5, 20)):
        for _ in range(100):
            failed += any(not check.passed for check in sampling(generator.random((steps, 300)) < rate, rate))
    assert binomtest(failed, 300, 3e-3, "greater").pvalue > 1e-3
    shuffled = np.zeros((40, 300), bool)
    for epoch in range(4):
        order = generator.permutation(300).reshape(10, 30)
        shuffled[np.arange(40)[epoch * 10 : epoch * 10 + 10, None], order] = True
    caught = {check.name for check in sampling(shuffled, 0.1) if not check.passed}
    assert caught == {"batches vary in size as Poisson sampling has it", "units vary in how often they are drawn"}
    assert not sampling(generator.random((40, 300)) < 0.12, 0.1)[0].passed
    assert all(check.passed for check in sampling(np.ones((5, 9), bool), 1.0))


# ---- input canaries ----


@pytest.fixture(scope="module")
def planted(bench) -> Planted:
    texts = canaries.random_texts(bench, 40, 16, np.random.default_rng(3))
    return plant(encode(bench, texts), "random tokens", np.random.default_rng(4))


@pytest.fixture(scope="module")
def released(bench, planted):
    """An adapter that has learnt its canaries by heart, in a small training split."""
    return overfit(bench, canaries.insert(encode(bench, sentences("law", 4)), planted), steps=150)


def test_coins_decide_who_is_inserted(bench, planted):
    train = encode(bench, sentences("law", 9))
    more = canaries.insert(train, planted)
    assert len(documents_of(more)) == 9 + planted.members.sum()
    tosses = [plant(planted.data, "", np.random.default_rng(i)).members.mean() for i in range(100)]
    assert np.mean(tosses) == pytest.approx(0.5, abs=0.04)
    with pytest.raises(ValueError, match="members"):
        Planted(planted.data, np.ones(3, bool), "")


def test_inserted_canaries_are_told_from_the_others(bench, planted, released):
    scores = canaries.scores(bench, released, bench.start(), planted, seed=0)
    assert len(scores.members) == planted.members.sum() and len(scores) == 40
    assert bounds.curve(scores).auc > 0.95 and bounds.one_run(scores, DELTA).epsilon > 0.5
    untouched = canaries.scores(bench, bench.start(), bench.start(), planted, seed=0)
    assert all(bound.epsilon == 0 for bound in bounds.lower_bounds(untouched, DELTA))


def test_inserted_canaries_are_exposed_and_the_others_are_as_hidden_as_chance_has_it(bench, planted, released):
    texts = canaries.random_texts(bench, 63, 16, np.random.default_rng(5))
    said = canaries.exposure(bench, released, planted, encode(bench, texts), seed=0)
    assert said.most == 6 and said.highest == 6 and said.mean > 5
    assert said.baseline == pytest.approx(1 / math.log(2), abs=0.9)


def test_exposure_counts_the_references_that_are_likelier(bench, planted):
    """By hand for one canary, with itself twice among the references: a tie, of which half come before."""
    one = Planted(select(planted.data, [0, 1]), np.array([True, False]), "")
    references = concat([one.data, select(planted.data, range(10))])
    loss = read(bench, bench.start(), references, seed=0).loss
    rank = 1 + (loss < loss[0] - 1e-6).sum() + 1
    said = canaries.exposure(bench, bench.start(), one, references, seed=0)
    assert said.mean == pytest.approx(math.log2(13 / rank), abs=1e-6)


def test_a_model_finishes_what_it_knows_by_heart_and_nothing_else(bench, planted, released):
    inside = documents_of(planted.data)[planted.members]
    known = extract(bench, released, select(planted.data, inside), "random", prefix=6, suffix=6, show=2)
    hidden = np.setdiff1d(documents_of(planted.data), inside)
    unknown = extract(bench, released, select(planted.data, hidden), "random", prefix=6, suffix=6)
    assert known.exact > known.tried / 2 and known.tokens > 0.6 and unknown.exact == 0 and not unknown.examples
    assert 0.6 < known.low < known.exact / known.tried <= known.high and 0 < unknown.high < 0.3
    prompt, truth, recovered = known.examples[0]
    assert len(known.examples) == 2 and prompt and truth and recovered


def test_one_wrong_token_is_no_extraction_and_any_beam_may_be_right(bench, planted, monkeypatch):
    data = select(planted.data, [0, 1])
    truths = [data.inputs[row][7:13] for row in (0, 1)]
    wrong = [np.stack([truth * 0, np.r_[truth[:5], 0]]) for truth in truths]
    monkeypatch.setattr(canaries, "continuations", lambda *_: wrong)
    said = extract(bench, bench.start(), data, "", prefix=6, suffix=6, beams=2)
    assert (said.tried, said.exact) == (2, 0) and said.tokens == pytest.approx(5 / 6)
    monkeypatch.setattr(canaries, "continuations", lambda *_: [np.stack([truth * 0, truth]) for truth in truths])
    assert extract(bench, bench.start(), data, "", prefix=6, suffix=6, beams=2).exact == 2


def test_greedy_search_is_the_models_own_generation(bench, released):
    prompt = np.array([1, 40, 50, 60])
    (said,) = canaries.continuations(bench, released, [prompt], 8)
    ids = torch.tensor(prompt)[None]
    params = {name: torch.from_numpy(x) for name, x in released.items()}
    for _ in range(8):
        logits = torch.func.functional_call(bench.model, params, (), {"input_ids": ids}).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    np.testing.assert_array_equal(said[0], ids[0, 4:])


def test_a_beam_of_every_word_finds_the_likeliest_pair(bench):
    prompt = np.array([1, 40, 50])
    words = len(bench.base.tokenizer)
    (said,) = canaries.continuations(bench, bench.start(), [prompt], 2, beams=words)
    first = torch.log_softmax(bench.model(torch.tensor(prompt)[None]).logits[0, -1], -1)
    rows = torch.cat([torch.tensor(prompt).expand(words, 3), torch.arange(words)[:, None]], 1)
    both = first[:, None] + torch.log_softmax(bench.model(rows).logits[:, -1], -1)
    assert tuple(said[0]) == divmod(int(both.argmax()), both.shape[1])


def test_texts_too_short_for_the_probe_are_left_out_and_other_tasks_refused(bench):
    assert extract(bench, bench.start(), encode(bench, ["a"]), "", prefix=6, suffix=6).tried == 0
    base = load_base("tiny:bert", "masked-lm")
    attach(base, LoRA(rank=2), 0)
    other = Bench(base, make_objective("masked-lm", 24), precision="fp32")
    with pytest.raises(ModelError, match="causal"):
        extract(other, other.start(), encode(other, ["a b c"]), "", prefix=1, suffix=1)


def test_random_texts_are_uniform_over_plain_words_and_never_the_same(bench):
    texts = canaries.random_texts(bench, 400, 8, np.random.default_rng(0))
    assert len(set(texts)) == 400 and all(text.isascii() for text in texts)
    letters = np.array([ord(c) for c in "".join(texts) if c.isdigit()])
    assert kstest(letters - 48 + np.random.default_rng(1).random(len(letters)), "uniform", (0, 10)).pvalue > 1e-3


def test_the_hardest_texts_have_the_highest_loss_under_the_base(bench):
    data = encode(bench, sentences("law", 10) + canaries.random_texts(bench, 10, 16, np.random.default_rng(2)))
    loss = read(bench, bench.start(), data, seed=0).loss
    hard = documents_of(canaries.hardest(bench, bench.start(), data, 5, seed=0))
    assert loss[hard].min() >= np.sort(loss)[-5]


def test_records_for_the_page_are_plain_json(bench, planted, released):
    tensors = layout(Z)
    tried = trial(honest(tensors), tensors, count=100, steps=2)
    inside = select(planted.data, documents_of(planted.data)[planted.members])
    records = [
        canaries.extraction_record(extract(bench, released, inside, "random", prefix=6, suffix=6, show=1)),
        canaries.exposure_record(canaries.exposure(bench, released, planted, inside, seed=0)),
        *[canaries.check_record(check) for check in tried.checks],
        *canaries.bound_records(tried.scores, "gradient", 8.0, DELTA),
    ]
    said = json.loads(json.dumps(records, allow_nan=False))
    assert said[0]["examples"][0]["source"] == "canary" and said[2]["passed"] and said[-1]["estimate"]
    assert all(0 < record["ceiling"] < 8 for record in said[-4:]) and list(METHODS) == [x["method"] for x in said[-4:]]
    assert canaries.bound_records(tried.scores, "input", None, DELTA)[0]["ceiling"] is None
