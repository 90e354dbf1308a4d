"""UDALM, federated: the mixed goal, its limits, and what text without labels is good for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional as F

from foedus import tree
from foedus.algorithms.fedavg import FedAvg
from foedus.algorithms.udalm import Udalm
from foedus.errors import TreatyError
from foedus.lm.adapters import Full, LoRA, attach
from foedus.lm.bench import Bench
from foedus.lm.heads import attach_head, head, is_head, width
from foedus.lm.load import load_base
from foedus.lm.objectives import make_objective
from foedus.lm.terms import Goal, Topic
from foedus.privacy.noise import SimulatedSource
from foedus.privacy.plan import Terms, make_plan
from foedus.silo import LocalPlan, Silo, Units
from foedus.types import Task

TOPICS = ("one", "two", "three")
OLD, NEW = ("ABCD", "EFGH", "IJKL"), ("MNOP", "QRST", "UVWX")
"""The letters of each topic, and those that the target has in place of half of them."""
PLAN = LocalPlan(lr=0.01, batch=24, steps=2, goal=Goal(terms=(Topic(0.3),)))
SGD = replace(PLAN, lr=0.5, optimizer="sgd")


@torch.no_grad()
def never_zero(base) -> None:
    """Nothing trainable begins as all zeros, so that whatever may move the features does."""
    draw = np.random.default_rng(0)
    for p in base.model.parameters():
        if p.requires_grad and not p.any():
            p.copy_(torch.from_numpy(0.1 * draw.standard_normal(tuple(p.shape), np.float32)))


def bench_of(base: str, task: str, adapter) -> Bench:
    base = load_base(base, task)
    attach(base, adapter, 0)
    attach_head(base, "topics", (width(base), len(TOPICS)), 0)
    never_zero(base)
    return Bench(base, make_objective(task, 16, topics=TOPICS), precision="fp32")


@pytest.fixture(scope="module")
def bench() -> Bench:
    return bench_of("tiny:llama", "causal-lm", Full())


def texts(bench: Bench, shifted: float, count: int, seed: int):
    """Texts of eight letters, of the three topics in turn; so many of the letters are the target's."""
    random = np.random.default_rng(seed)
    letters = [[random.choice(list((NEW if random.random() < shifted else OLD)[i % 3])) for _ in range(8)]
               for i in range(count)]  # fmt: skip
    table = pa.table({"text": ["".join(x) for x in letters], "label": [TOPICS[i % 3] for i in range(count)]})
    return bench.objective.encode(table, bench.base.tokenizer)


def silos(bench: Bench) -> list[Silo]:
    return [
        Silo("source", {"train": texts(bench, 0.0, 48, 1)}),
        Silo("target", {"train": texts(bench, 0.5, 48, 2).without_topics()}),
    ]


def task(bench: Bench, round: int = 0, params=None) -> Task:
    return Task(round, "", params or bench.start(), ("source", "target"), 0)


def deltas(algorithm, bench: Bench, whom, round: int = 0) -> list[dict[str, np.ndarray]]:
    answers = algorithm.train(bench, task(bench, round), whom, [{} for _ in whom])
    return [tree.part(update.tensors, "delta") for update, _ in answers]


def assert_equal(left, right) -> None:
    for name, x in left.items():
        np.testing.assert_array_equal(x, right[name])


def test_topics_alone_are_training_on_the_source_alone(bench):
    source, target = deltas(Udalm(PLAN, mix=1.0), bench, silos(bench))
    (plain,) = deltas(FedAvg(replace(PLAN, goal=Goal(0.0, (Topic(1.0),)))), bench, silos(bench)[:1])
    assert_equal(source, plain)
    assert tree.norm(source) > 0 and tree.norm(target) == 0


def test_tokens_alone_touch_no_weight_of_the_head_and_are_plain_language_modelling(bench):
    ours = deltas(Udalm(PLAN, mix=0.0), bench, silos(bench))
    plain = deltas(FedAvg(replace(PLAN, goal=Goal())), bench, silos(bench))
    for mine, theirs in zip(ours, plain, strict=True):
        assert_equal(mine, theirs)
        heads = {name for name in mine if is_head(name)}
        assert heads and not any(mine[name].any() for name in heads)


def pooled(bench: Bench, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean cross-entropy of all tokens, and the features, in nothing but the model's own code and PyTorch."""
    out = bench.model(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    logits, labels = out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    mask = batch["attention_mask"][..., None]
    features = F.normalize((out.hidden_states[-1] * mask).sum(1) / mask.sum(1), dim=1)
    return F.cross_entropy(logits, labels, ignore_index=-100), features


def test_a_step_of_source_and_target_is_the_gradient_of_the_weighted_loss_on_both(bench):
    mix, plan, whom = 1 / 9, replace(SGD, lr=1.0, batch=48, steps=1), silos(bench)
    both = deltas(Udalm(plan, mix), bench, whom)
    whole = [bench.objective.collate(silo.splits["train"], np.arange(48), 0) for silo in whom]
    (source, features), (target, _) = (pooled(bench, batch) for batch in whole)
    topics = F.cross_entropy(head(bench, "topics")(features), whole[0]["topics"])
    loss = (mix * topics + (1 - mix) * source + (1 - mix) * target) / 2
    named = {name: p for name, p in bench.model.named_parameters() if p.requires_grad}
    gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    for name, gradient in gradients.items():
        moved = (both[0][name] + both[1][name]) / 2
        np.testing.assert_allclose(moved, -gradient.numpy(), rtol=1e-3, atol=1e-5)


def test_first_the_target_learns_its_language_and_the_others_send_zero_that_weighs_nothing(bench):
    algorithm, whom = Udalm(PLAN, pretrain=2, unlabelled=("target",)), silos(bench)
    for round in (0, 1):
        answers = algorithm.train(bench, task(bench, round), whom, [{("step", "x"): np.ones(1)}, {}])
        (still, kept), (moved, _) = answers
        assert tree.norm(still.tensors) == 0 and still.weight == 0 and ("step", "x") in kept
        (plain,) = deltas(FedAvg(replace(PLAN, goal=Goal())), bench, whom[1:], round)
        assert_equal(tree.part(moved.tensors, "delta"), plain)
    assert all(tree.norm(x) > 0 for x in deltas(algorithm, bench, whom, 2))
    assert not any(tree.norm(x) for x in deltas(algorithm, bench, whom[:1], 0))


def test_no_label_of_a_silo_decides_whether_it_sends_zeros(bench):
    source, target = silos(bench)
    for algorithm in (Udalm(PLAN, pretrain=1), Udalm(PLAN, pretrain=1, unlabelled=("source", "target"))):
        with_labels, without = (
            deltas(algorithm, bench, [replace(source, splits={"train": text})])[0]
            for text in (source.splits["train"], source.splits["train"].without_topics())
        )
        assert_equal(with_labels, without)


def accuracy(bench: Bench, params, encoded) -> float:
    with torch.no_grad():
        seen = bench.see(params, bench.objective.collate(encoded, np.arange(len(encoded)), 0))
        return float((seen.head("topics", seen.features()).argmax(1).numpy() == encoded.topics).mean())


def trained(algorithm, bench: Bench, whom, rounds: int):
    params = bench.start()
    for round in range(rounds):
        answers = algorithm.train(bench, task(bench, round, params), whom, [{} for _ in whom])
        params = {
            name: (x + np.mean([update.tensors["delta", name] for update, _ in answers], axis=0)).astype(np.float32)
            for name, x in params.items()
        }
    return params


def test_under_other_words_the_targets_text_makes_its_topics_known(bench):
    new = texts(bench, 1.0, 90, 3)  # of the target's own letters only
    source_only, ours = (
        accuracy(bench, trained(Udalm(PLAN, mix), bench, silos(bench), 8), new) for mix in (1.0, 1 / 9)
    )
    assert ours > source_only + 0.2 and ours > 0.8


def test_under_private_steps_a_text_moves_either_silo_by_the_norm_at_most(bench):
    terms = Terms("example", 1e-5, 1, noise_multiplier=1e-9, max_norm=0.01, rate=1.0, divisor=4.0, steps=1)
    steps = make_plan(terms, SimulatedSource(0)).steps_at_silos(list(bench.start()))
    plan = replace(SGD, lr=1.0, steps=1, privacy=steps)
    for silo in silos(bench):
        moved = []
        for some in (3, 2):
            units = Units(np.arange(48), np.arange(some, dtype=np.uint64))  # a row each, the first so many
            moved += deltas(Udalm(plan), bench, [replace(silo, units=units)])
        assert tree.norm(tree.minus(*moved)) == pytest.approx(0.01 / 4, rel=1e-2)


def test_a_masked_model_mixes_topics_with_masked_tokens():
    bert = bench_of("tiny:bert", "masked-lm", LoRA(rank=2))
    whom = silos(bert)
    (source, _), (target, _) = Udalm(SGD, mix=0.5).train(bert, task(bert), whom, [{}, {}])
    for update, silo in zip((source, target), whom, strict=True):
        asked = update.tensors["metric", "targets"][0]
        assert 0 < asked < silo.splits["train"].inputs.values.size / 2
    heads = [{name for (_, name), x in u.tensors.items() if is_head(name) and x.any()} for u in (source, target)]
    assert heads[0] and not heads[1]


@pytest.mark.parametrize("wrong", [{"mix": -0.1}, {"mix": 1.1}, {"pretrain": -1}])
def test_an_impossible_setting_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Udalm(PLAN, **wrong)


def test_topics_need_a_head():
    with pytest.raises(TreatyError, match=r"topic head.*\[topics\]"):
        Udalm(replace(PLAN, goal=Goal()))
    Udalm(replace(PLAN, goal=Goal()), mix=0.0)
