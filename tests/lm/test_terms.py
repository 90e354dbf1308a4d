"""Terms against their equations, goals against one unit at a time, and what the proof refuses."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from foedus.errors import GuaranteeError, ModelError
from foedus.kernels import fourier_map
from foedus.lm import bench as bench_module
from foedus.lm.adapters import Frozen, Full, LoRA, attach
from foedus.lm.bench import Bench
from foedus.lm.clipping import Clipping
from foedus.lm.heads import attach_head, head, is_head
from foedus.lm.load import load_base
from foedus.lm.objectives import make_objective
from foedus.lm.terms import Denoise, Goal, MeanPull, Pull, Reversal, Topic, embedding

from .test_bench import make_batch, scattered
from .test_per_example import clipped_by_hand, close

LORA = LoRA(rank=3)
MAPS = {-1: fourier_map(32, 24, (0.5, 1.0), 0), 0: fourier_map(32, 24, (0.5, 1.0), 1, project=6)}
AIM = np.random.default_rng(0).standard_normal(48) / 5
WORDS = 260
TERMS = {
    "topic": Topic(0.7),
    "smoothed": Topic(0.7, smoothing=0.2),
    "pseudo": Topic(0.7, threshold=0.34),
    "pull": Pull(2.0, MAPS, AIM),
    "shallow pull": Pull(2.0, {-1: MAPS[-1]}, AIM[:24]),
    "reversal": Reversal(0.5, 1),
    "denoise": Denoise(0.4, 0.3, WORDS),
}
SHALLOW = Goal(0.8, tuple(term for term in TERMS.values() if getattr(term, "shallow", False)))
ALL = Goal(0.8, tuple(TERMS.values()))


def make_bench(family="llama", adapter=LORA, task="causal-lm", precision="fp32"):
    base = load_base(f"tiny:{family}", task)
    attach(base, adapter, 0)
    attach_head(base, "topics", (32, 8, 3), 0)
    attach_head(base, "domains", (32, 2), 0)
    return Bench(base, make_objective(task, 64), precision=precision)


def make(task="causal-lm", rows=5, length=9, seed=0):
    batch = make_batch(task, rows, length, seed)
    topics = torch.tensor([0, -1, 2, 1, 0, 2, -1])[:rows]
    return batch | {"topics": topics, "rows": torch.arange(rows), "draws": torch.arange(rows) + 100 * seed}


@pytest.fixture(scope="module")
def bench():
    return make_bench()


@pytest.fixture(scope="module")
def params(bench):
    return scattered(bench, 1)[0]


def pick(batch, rows):
    return {name: x[rows] for name, x in batch.items()}


def gradient(bench, params, batch, goal):
    leaves = bench.leaves([params])
    (total,), *_ = bench.totals(leaves, [batch], [goal])
    if total.requires_grad:
        total.backward()
    return {name: torch.zeros_like(x[0]) if x.grad is None else x.grad[0] for name, x in leaves.items()}


def states_of(bench, params, batch, layer):
    """From the model as it is."""
    values = {name: torch.from_numpy(x) for name, x in params.items()}
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return torch.func.functional_call(bench.model, values, (), given | {"output_hidden_states": True}).hidden_states[
        layer
    ]


def features_of(bench, params, batch, layer=-1):
    mask = batch["attention_mask"][..., None].float()
    return F.normalize((states_of(bench, params, batch, layer) * mask).sum(1) / mask.sum(1), dim=1)


# ---- what is seen ----


def test_features_are_means_over_a_rows_tokens_of_length_one(bench, params):
    batch = make()
    seen = bench.see(params, batch)
    for layer, theirs in ((-1, -1), (0, 1), (1, 2), (-2, 1)):
        wanted = features_of(bench, params, batch, theirs)
        torch.testing.assert_close(seen.features(layer), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(seen.features().norm(dim=1).round(decimals=5), torch.ones(5))
    assert not seen.features().requires_grad and not seen.nll().requires_grad


@pytest.mark.parametrize(
    ("family", "task"), [("llama", "causal-lm"), ("gpt2", "causal-lm"), ("bert", "masked-lm"), ("t5", "seq2seq")]
)
def test_losses_and_entropies_of_rows_are_those_of_the_logits(family, task):
    bench = make_bench(family, task=task)
    batch, (params,) = make(task), scattered(bench, 1)
    batch["labels"][3] = -100
    seen = bench.see(params, batch)
    with torch.no_grad():
        values = {name: torch.from_numpy(x) for name, x in params.items()}
        logits = torch.func.functional_call(bench.model, values, (), bench._inputs(batch)).logits
    for row in range(5):
        one = pick(batch, [row])
        said, targets = bench.objective.align(logits[row : row + 1], one["labels"])
        logs = said.log_softmax(-1)
        nll = F.cross_entropy(said, targets) if len(targets) else torch.zeros(())
        entropy = -(logs.exp() * logs).sum(-1).mean() if len(targets) else torch.zeros(())
        torch.testing.assert_close(seen.nll()[row], nll, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(seen.entropy()[row], entropy, rtol=1e-5, atol=1e-6)


def test_the_model_is_never_given_what_a_batch_carries_beside_its_text(bench, params):
    bare = {name: x for name, x in make().items() if name in ("input_ids", "attention_mask", "labels")}
    assert torch.equal(bench.see(params, make()).nll(), bench.see(params, bare).nll())
    leaves = bench.leaves([params] * 2)
    assert torch.equal(bench.losses(leaves, [make(), make()])[0], bench.losses(leaves, [bare, bare])[0])


def test_the_map_is_that_of_the_kernel_and_has_norm_one(bench, params):
    seen = bench.see(params, make())
    parts = [each(seen.features(layer).numpy()) for layer, each in MAPS.items()]
    ours = embedding(seen, MAPS)
    np.testing.assert_allclose(ours.numpy(), np.concatenate(parts, 1) / np.sqrt(2), atol=1e-5)
    torch.testing.assert_close(ours.norm(dim=1), torch.ones(5))


# ---- terms against their equations ----


def scores_of(bench, params, batch):
    weights = {name.rpartition("foedus_heads.")[2]: x for name, x in params.items() if is_head(name)}
    x = bench.see(params, batch).features().double().numpy()
    x = np.maximum(x @ weights["topics.0.weight"].T + weights["topics.0.bias"], 0)
    return x @ weights["topics.2.weight"].T + weights["topics.2.bias"]


def sharpened(params):
    """With a head that is sure of itself."""
    return {name: 40 * x if "topics.2.weight" in name else x for name, x in params.items()}


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_topic_is_the_smoothed_cross_entropy_and_exactly_zero_where_nobody_knows(bench, params, smoothing):
    batch = make()
    scores = scores_of(bench, params, batch)
    logs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    found = Topic(1.0, smoothing=smoothing)(bench.see(params, batch)).numpy()
    for row, label in enumerate(batch["topics"].tolist()):
        wanted = -((1 - smoothing) * logs[row, label] + smoothing * logs[row].mean()) if label >= 0 else 0.0
        assert found[row] == pytest.approx(wanted, abs=1e-5)
    assert found[1] == 0.0


def test_unknown_topics_move_nothing_at_all(bench, params):
    batch = make() | {"topics": torch.full((5,), -1)}
    found = gradient(bench, params, batch, Goal(0.0, (Topic(1.0),)))
    assert not any(x.any() for x in found.values())


def test_a_pseudo_label_is_what_the_head_is_sure_of_and_is_held_fixed(bench, params):
    batch, params = make() | {"topics": torch.full((5,), -1)}, sharpened(params)
    chances = np.exp(scores_of(bench, params, batch))
    chances /= chances.sum(1, keepdims=True)
    sure = chances.max(1)
    threshold = float(np.sort(sure)[2] + np.sort(sure)[1]) / 2
    term = Topic(1.0, threshold=threshold)
    np.testing.assert_allclose(
        term(bench.see(params, batch)).numpy(), np.where(sure >= threshold, -np.log(sure), 0), atol=1e-4
    )
    told = batch | {"topics": torch.from_numpy(np.where(sure >= threshold, chances.argmax(1), -1))}
    close(gradient(bench, params, batch, Goal(0.0, (term,))), gradient(bench, params, told, Goal(0.0, (Topic(1.0),))))
    some = batch | {"topics": make()["topics"]}
    ours, wanted = (each(bench.see(params, some)) for each in (Topic(1.0, threshold=0.01), Topic(1.0)))
    known = some["topics"] >= 0
    assert (chances.argmax(1) != some["topics"].numpy())[known.numpy()].any()
    assert torch.equal(ours[known], wanted[known]) and bool((ours[~known] > 0).all())


def by_formula(bench, params, batch, value):
    """The gradient of `value(mean of φ)` by autograd through the model as it is."""
    values = {name: torch.from_numpy(x).requires_grad_() for name, x in params.items()}
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    hidden = torch.func.functional_call(bench.model, values, (), given | {"output_hidden_states": True}).hidden_states
    mask, parts = batch["attention_mask"][..., None].float(), []
    for layer, each in ((-1, MAPS[-1]), (1, MAPS[0])):
        x = F.normalize((hidden[layer] * mask).sum(1) / mask.sum(1), dim=1).double()
        x = x if each.projection is None else x @ torch.from_numpy(each.projection)
        z = x @ torch.from_numpy(each.frequencies)
        parts.append(torch.cat([z.cos(), z.sin()], 1) / math.sqrt(z.shape[1]))
    mean = (torch.cat(parts, 1) / math.sqrt(2)).mean(0)
    grads = torch.autograd.grad(value(mean), list(values.values()), allow_unused=True)
    zeros = (torch.zeros_like(x) for x in values.values())
    return {n: z if g is None else g for n, g, z in zip(values, grads, zeros, strict=True)}, mean.detach()


def test_pull_has_the_gradient_of_twice_the_mean_times_the_coefficient(bench, params):
    batch, c = make(), torch.from_numpy(AIM)
    wanted, _ = by_formula(bench, params, batch, lambda mean: 2 * mean @ c)
    close(gradient(bench, params, batch, Goal(0.0, (Pull(1.0, MAPS, AIM),))), wanted)


def test_mean_pull_is_the_squared_distance_and_pull_its_gradient_at_a_fixed_coefficient(bench, params):
    batch, m = make(), torch.from_numpy(AIM)
    wanted, mean = by_formula(bench, params, batch, lambda mean: (mean - m).square().sum())
    mean_pull = Goal(0.0, (MeanPull(1.0, MAPS, AIM),))
    close(gradient(bench, params, batch, mean_pull), wanted)
    (total,), *_ = bench.totals(bench.leaves([params]), [batch], [mean_pull])
    assert total.item() == pytest.approx(float((mean - m).square().sum()), rel=1e-5)
    close(gradient(bench, params, batch, Goal(0.0, (Pull(1.0, MAPS, mean.numpy() - AIM),))), wanted)


def test_reversal_turns_the_gradient_of_the_features_and_not_that_of_the_head(bench, params):
    batch, label = make(), torch.ones(5, dtype=torch.long)

    @dataclass(frozen=True)
    class Classifier:
        weight: float = 1.0
        shallow: ClassVar[bool] = True

        def __call__(self, seen):
            return F.cross_entropy(seen.head("domains", seen.features()), label, reduction="none")

    turned = gradient(bench, params, batch, Goal(0.0, (Reversal(1.0, 1),)))
    straight = gradient(bench, params, batch, Goal(0.0, (Classifier(),)))
    assert any(x.any() for name, x in straight.items() if not is_head(name))
    for name, x in straight.items():
        assert torch.equal(turned[name], x if is_head(name) else -x), name
    weak = gradient(bench, params, batch, Goal(0.0, (Reversal(1.0, 1, strength=0.25),)))
    for name, x in straight.items():
        torch.testing.assert_close(weak[name], x if is_head(name) else -0.25 * x)
    seen = bench.see(params, batch)
    assert torch.equal(Reversal(1.0, 1)(seen), Classifier()(seen))


def test_denoise_changes_about_its_rate_of_the_ids_and_never_padding(bench, params):
    batch, ids, term = make(), torch.randint(5, 200, (200, 40)), Denoise(1.0, 0.15, WORDS)
    others = term._others(ids, torch.arange(200))
    assert 0.13 < (others != ids).float().mean() < 0.17
    assert others.min() >= 0 and others.max() < WORDS
    read, seen = [], bench.see(params, batch)
    spy = replace(seen, run=lambda given: (read.append(given), seen.run(given))[1])
    losses = Denoise(1.0, 1.0, WORDS)(spy)
    changed = read[0] != batch["input_ids"]
    assert torch.equal(changed, batch["attention_mask"].bool())
    assert torch.equal(losses, bench.see(params, batch | {"input_ids": read[0]}).nll())


def test_what_denoise_puts_in_place_of_a_place_does_not_depend_on_where_it_was():
    term, row = Denoise(1.0, 0.3, 50), np.arange(40)
    here, there = (term._noisy(row + at, 7) for at in (1000, 4321))
    hit = here < 50
    assert hit.any() and np.array_equal(here[hit], there[hit]) and np.array_equal(there[~hit], (row + 4321)[~hit])


def test_denoise_draws_for_a_row_from_its_number_alone(bench):
    ids, term = torch.randint(5, 200, (4, 30)), Denoise(1.0, 0.3, WORDS)
    whole = term._others(ids, torch.tensor([7, 8, 9, 7]))
    assert torch.equal(whole[2:], term._others(ids[2:], torch.tensor([9, 7])))
    assert not torch.equal(whole, term._others(ids, torch.tensor([1, 2, 3, 4])))


# ---- goals, unit by unit ----

UNITS = torch.tensor([0, 1, 1, 2, 2])


def one_by_one(bench, params, batch, units, goal):
    return [gradient(bench, params, pick(batch, units == u), goal) for u in range(int(units.max()) + 1)]


def agree(bench, batch, units, goal, tolerance=1e-5):
    (params,) = scattered(bench, 1)
    parts = {name: i % 2 for i, name in enumerate(params)}
    found = one_by_one(bench, params, batch, units, goal)
    for clipping in (Clipping((0.7, 0.3), parts), Clipping((math.inf,))):
        result = bench.clipped(bench.leaves([params]), [batch], [units], [clipping], [goal])
        wanted, norms = clipped_by_hand(found, clipping)
        close({name: x[0] for name, x in result.gradients.items()}, wanted, tolerance)
        torch.testing.assert_close(result.norms[0], norms, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("name", TERMS)
def test_a_units_gradient_of_each_term_is_that_of_a_pass_over_it_alone(bench, name):
    agree(bench, make(), UNITS, Goal(1.0, (TERMS[name],)))


@pytest.mark.parametrize("goal", [SHALLOW, replace(SHALLOW, tokens=0.0)], ids=["tokens", "no tokens"])
def test_a_goal_of_the_last_layer_goes_the_fast_way_to_the_same_numbers(bench, goal):
    slow = make_bench()
    slow._fast = None
    slow._prepare()
    assert len(goal.terms) == 5 and goal.shallow and not ALL.shallow
    agree(bench, make(), UNITS, goal)
    three, goals = scattered(bench, 3), [goal, Goal(), Goal(0.3, (TERMS["shallow pull"],))]
    batches = [make(rows=rows, length=length, seed=rows) for rows, length in ((5, 9), (3, 7), (4, 5))]
    batches[0]["labels"][1] = -100
    batches[1]["labels"][2] = -100
    units = [torch.tensor([0, -1, 1, 1, 2]), torch.tensor([0, 1, 1]), torch.arange(4)]
    clippings = [Clipping((0.3,)), Clipping((0.1,)), Clipping((math.inf,))]
    ours, wanted = (b.clipped(b.leaves(three), batches, units, clippings, goals) for b in (bench, slow))
    assert ours.gradients.keys() == wanted.gradients.keys()
    close(ours.gradients, wanted.gradients)
    for one, other in zip((*ours.norms, ours.losses), (*wanted.norms, wanted.losses), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert ours.targets.tolist() == wanted.targets.tolist()
    leaves = [b.leaves(three) for b in (bench, slow)]
    for b, x in zip((bench, slow), leaves, strict=True):
        totals, *_ = b.totals(x, batches, goals)
        (totals * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    found = [{n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in each.items()} for each in leaves]
    close(*found)
    for one, other in zip(
        *(b.totals(x, batches, goals) for b, x in zip((bench, slow), leaves, strict=True)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "adapter", "task"),
    [
        ("llama", LORA, "causal-lm"),
        ("llama", Full(), "causal-lm"),
        ("llama", Frozen(), "causal-lm"),
        ("gpt2", LoRA(rank=2, embeddings=True), "causal-lm"),
        ("gpt2", Full(), "causal-lm"),
        ("bert", LORA, "masked-lm"),
        ("t5", LORA, "seq2seq"),
    ],
)
def test_a_units_gradient_of_a_whole_goal_is_that_of_a_pass_over_it_alone(family, adapter, task):
    agree(make_bench(family, adapter, task), make(task), UNITS, ALL)


@pytest.mark.parametrize(
    "adapter", [LoRA(rank=2, targets="attention", freeze_a=True), Frozen()], ids=["half", "frozen"]
)
def test_the_fast_way_serves_adapters_that_train_less(adapter):
    bench = make_bench(adapter=adapter)
    assert bench._goes_fast([SHALLOW])
    agree(bench, make(), UNITS, SHALLOW)


def test_silos_with_goals_of_their_own_go_side_by_side(bench):
    goals = [Goal(), ALL, Goal(0.0, (TERMS["topic"],))]
    three = scattered(bench, 3)
    batches = [make(rows=rows, length=length, seed=rows) for rows, length in ((5, 9), (3, 7), (4, 5))]
    units = [torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 1, 1]), torch.arange(4)]
    result = bench.clipped(bench.leaves(three), batches, units, [Clipping((0.3,))] * 3, goals)
    totals, sums, counts = bench.totals(bench.leaves(three), batches, goals)
    for k in range(3):
        wanted, norms = clipped_by_hand(one_by_one(bench, three[k], batches[k], units[k], goals[k]), Clipping((0.3,)))
        close({name: x[k] for name, x in result.gradients.items()}, wanted)
        torch.testing.assert_close(result.norms[k], norms, rtol=1e-5, atol=1e-6)
        alone = bench.totals(bench.leaves(three[k : k + 1]), batches[k : k + 1], goals[k : k + 1])
        torch.testing.assert_close(totals[k], alone[0][0])
    torch.testing.assert_close(result.losses, sums)
    assert result.targets.tolist() == counts.tolist() and counts[2] == 0 < counts[1]


def test_rows_of_nobody_add_nothing_and_a_batch_of_nobody_gives_zeros(bench, params):
    batch = make()
    batch["labels"][2] = -100
    batch["topics"][2] = 1
    clip, leaves = [Clipping((0.3,))], bench.leaves([params])
    some = bench.clipped(leaves, [batch], [torch.tensor([0, 1, -1, 1, 2])], clip, [ALL])
    rest = bench.clipped(leaves, [pick(batch, [0, 1, 3, 4])], [torch.tensor([0, 1, 1, 2])], clip, [ALL])
    close({n: x[0] for n, x in some.gradients.items()}, {n: x[0] for n, x in rest.gradients.items()})
    none = bench.clipped(leaves, [pick(batch, [2])], [torch.tensor([-1])], clip, [ALL])
    assert all(not x.any() for x in none.gradients.values()) and none.norms[0].shape == (0, 1)


def test_a_unit_without_targets_still_has_its_terms(bench, params):
    batch = make()
    batch["labels"][0] = -100
    both = bench.clipped(
        bench.leaves([params]), [batch], [UNITS], [Clipping((math.inf,))], [Goal(1.0, (TERMS["pull"],))]
    )
    assert both.norms[0][0] > 0


def test_in_bf16_a_goal_is_within_its_rounding(params):
    half, exact, batch = make_bench(precision="bf16"), make_bench(), make()
    results = [
        b.clipped(
            b.leaves([params]), [batch], [UNITS], [Clipping((0.3,))], [Goal(1.0, (TERMS["topic"], TERMS["pull"]))]
        )
        for b in (half, exact)
    ]
    ours, wanted = ({n: x[0] for n, x in one.gradients.items()} for one in results)
    close(ours, wanted, 0.05)


# ---- the proof ----


@dataclass(frozen=True)
class Contrast:
    """Against the rule: what it says of a row depends on the others."""

    weight: float = 1.0
    shallow: bool = False

    def __call__(self, seen):
        x = seen.features()
        return (x - x.mean(0)).square().sum(1)


@pytest.mark.parametrize(
    "term",
    [Contrast(), Contrast(shallow=True), MeanPull(1.0, MAPS, AIM), MeanPull(1.0, {-1: MAPS[-1]}, AIM[:24])],
    ids=["contrast", "shallow contrast", "mean pull", "shallow mean pull"],
)
def test_a_term_in_which_rows_meet_is_refused_by_name(bench, params, term):
    goal = Goal(1.0, (TERMS["topic"], term))
    with pytest.raises(GuaranteeError, match=f"{type(term).__name__}.*together"):
        bench.clipped(bench.leaves([params]), [make()], [UNITS], [Clipping((1.0,))], [goal])
    with pytest.raises(GuaranteeError, match=type(term).__name__):
        bench.prove(goal)


def test_the_proof_of_a_term_is_not_run_again_for_other_numbers(monkeypatch):
    bench, seen = make_bench(), []
    total = bench._total
    monkeypatch.setattr(bench, "_total", lambda *args: (seen.append(1), total(*args))[1])
    for c in (AIM, 2 * AIM):
        bench.prove(Goal(1.0, (Pull(0.1, MAPS, c), TERMS["topic"])))
    assert len(seen) == 4  # two units alone, for each of the two terms
    bench.prove(Goal(1.0, (Pull(0.2, {0: MAPS[0]}, AIM[:24]),)))
    assert len(seen) == 6


def test_a_term_that_moved_nothing_is_not_taken_for_proven():
    bench = make_bench()
    bench.prove(Goal(1.0, (Pull(1.0, MAPS, 0 * AIM),)))
    known = len(bench._proven)
    bench.prove(Goal(1.0, (Pull(1.0, MAPS, AIM),)))
    assert len(bench._proven) == known + 1


def test_a_term_that_says_it_is_shallow_and_is_not_is_refused(bench, params):
    @dataclass(frozen=True)
    class Deep:
        ask: str
        weight: float = 1.0
        shallow: bool = True

        def __call__(self, seen):
            asks = {"layer": lambda: seen.features(0), "nll": seen.nll, "entropy": seen.entropy,
                    "again": lambda: seen.again(seen.batch["input_ids"] + 1)}  # fmt: skip
            return asks[self.ask]()

    for ask in ("layer", "nll", "entropy", "again"):
        with pytest.raises(ModelError, match="shallow"):
            bench.totals(bench.leaves([params]), [make()], [Goal(1.0, (Deep(ask),))])


def test_a_term_that_answers_with_anything_but_one_number_a_row_is_refused(bench, params):
    @dataclass(frozen=True)
    class One:
        weight: float = 1.0

        def __call__(self, seen):
            return seen.nll().mean()

    with pytest.raises(ValueError, match="5 numbers of One"):
        bench.totals(bench.leaves([params]), [make()], [Goal(1.0, (One(),))])


# ---- what does not change, and what is not computed ----


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_plain_goal_gives_the_same_bits_as_none(family):
    bench = make_bench(family)
    two, batches = scattered(bench, 2), [make(), make(rows=3, seed=1)]
    units, clippings = [UNITS, torch.arange(3)], [Clipping((0.3,))] * 2
    plain = bench.clipped(bench.leaves(two), batches, units, clippings)
    for goal in (Goal(), Goal(1.0, (Topic(0.0), replace(TERMS["pull"], weight=0.0)))):
        found = bench.clipped(bench.leaves(two), batches, units, clippings, [goal] * 2)
        assert all(torch.equal(x, plain.gradients[name]) for name, x in found.gradients.items())
        assert goal.plain and torch.equal(found.losses, plain.losses)
    assert plain.gradients.keys() == bench.start().keys()
    leaves, others = bench.leaves(two), bench.leaves(two)
    sums, counts = bench.losses(leaves, batches)
    (sums / counts).sum().backward()
    totals, *_ = bench.totals(others, batches, [Goal()] * 2)
    totals.sum().backward()
    for name, x in leaves.items():
        assert (x.grad is None) == (others[name].grad is None) == is_head(name)
        assert is_head(name) or torch.equal(x.grad, others[name].grad)


def test_terms_of_features_take_one_pass_through_the_model(bench, params):
    goal, calls = Goal(1.0, (TERMS["topic"], TERMS["pull"], TERMS["reversal"])), []
    assert not goal.shallow
    bench.prove(goal)
    handle = bench._core.base_model.register_forward_hook(lambda *_: calls.append(1))
    gradient(bench, params, make(), goal)
    bench.clipped(bench.leaves([params]), [make()], [UNITS], [Clipping((1.0,))], [goal])
    assert len(calls) == 2
    gradient(bench, params, make(), Goal(0.0, (TERMS["denoise"],)))
    handle.remove()
    assert len(calls) == 3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_tokens_no_cross_entropy_is_computed(family, monkeypatch):
    bench, goal = make_bench(family), Goal(0.0, (TERMS["topic"],))
    params = bench.start()
    bench.prove(goal)

    asked, forward = [], bench_module.head.forward
    monkeypatch.setattr(
        bench_module.head,
        "forward",
        lambda states, *rest, **how: (asked.append(len(states)), forward(states, *rest, **how))[1],
    )
    _, sums, counts = bench.totals(bench.leaves([params]), [make()], [goal])
    result = bench.clipped(bench.leaves([params]), [make()], [UNITS], [Clipping((1.0,))], [goal])
    assert sums.tolist() == result.losses.tolist() == [0.0]
    assert counts.tolist() == result.targets.tolist() == [0] and not any(asked)


def test_a_term_of_weight_zero_touches_no_head(bench, params):
    found = gradient(bench, params, make(), Goal(1.0, (Topic(0.0), TERMS["reversal"])))
    assert all(not x.any() for name, x in found.items() if "topics" in name)
    assert all(x.any() for name, x in found.items() if "domains" in name)


def test_a_goal_needs_what_its_terms_read(bench, params):
    bare = {name: x for name, x in make().items() if name in ("input_ids", "attention_mask", "labels")}
    for term, missing in ((TERMS["topic"], "topics"), (TERMS["denoise"], "draws")):
        with pytest.raises(ModelError, match=f'"{missing}" in the batch'):
            bench.totals(bench.leaves([params]), [bare], [Goal(1.0, (term,))])


@pytest.mark.parametrize(
    "make_wrong",
    [
        lambda: Goal(-1.0),
        lambda: Goal(1.0, (Topic(math.nan),)),
        lambda: Goal().plus(Reversal(-0.1, 0)),
        lambda: Topic(1.0, smoothing=1.0),
        lambda: Topic(1.0, threshold=0.0),
        lambda: Denoise(1.0, 0.0, 9),
        lambda: Denoise(1.0, 0.1, 1),
    ],
)
def test_senseless_numbers_are_refused(make_wrong):
    with pytest.raises(ValueError, match="Expected"):
        make_wrong()


def test_plus_adds_terms_and_leaves_the_goal_as_it_was():
    goal = Goal(0.5, (TERMS["topic"],))
    more = goal.plus(TERMS["pull"], TERMS["reversal"])
    assert more.terms == (TERMS["topic"], TERMS["pull"], TERMS["reversal"]) and more.tokens == 0.5
    assert len(goal.terms) == 1 and Goal().plain and not goal.plain and not Goal(0.5).plain


def test_a_head_is_used_with_the_parameters_of_the_pass(bench, params):
    seen, x = bench.see(params, make()), torch.randn(4, 32)
    assert not torch.equal(seen.head("domains", x), head(bench, "domains")(x))
