"""Attacks find members after over-training, find none without training, and read documents as the model does."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.stats import binomtest
from torch.nn import functional as F

from foedus.audit import membership
from foedus.audit.bounds import Scores, curve
from foedus.audit.membership import documents_of, infer, read, sample, select
from foedus.lm.adapters import LoRA, attach
from foedus.lm.bench import Bench
from foedus.lm.load import load_base
from foedus.lm.objectives import concat, make_objective

from ..conftest import sentences


def make_bench(family="llama", task="causal-lm", precision="fp32", labels=()) -> Bench:
    base = load_base(f"tiny:{family}", task, labels=labels)
    attach(base, LoRA(rank=4), 0)
    return Bench(base, make_objective(task, 24, labels), precision=precision)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return make_bench()


def encode(bench, texts, **columns):
    return bench.objective.encode(pa.table({"text": texts, **columns}), bench.base.tokenizer)


@pytest.fixture(scope="module")
def data(bench):
    texts = sentences("medicine", 60) + sentences("law", 60)
    order = np.random.default_rng(0).permutation(120)
    members, others = ([texts[i] for i in part] for part in np.split(order, 2))
    return encode(bench, members), encode(bench, others)


def overfit(bench, data, steps=60) -> dict[str, np.ndarray]:
    """The parameters after some passes of plain AdamW over all of `data`."""
    leaves = bench.leaves([bench.start()])
    optimizer = torch.optim.AdamW(leaves.values(), lr=0.02, weight_decay=0.0)
    batch = bench.objective.collate(data, np.arange(len(data)), 0)
    for _ in range(steps):
        sums, counts = bench.losses(leaves, [batch])
        optimizer.zero_grad()
        (sums / counts).sum().backward()
        optimizer.step()
    return {name: x[0].detach().numpy() for name, x in leaves.items()}


@pytest.fixture(scope="module")
def attacks(bench, data):
    members, others = data
    released = overfit(bench, members)
    return {attack.name: attack for attack in infer(bench, released, bench.start(), members, others, seed=1)}


def test_members_of_an_overfitted_adapter_are_found(attacks):
    assert attacks["loss"].curve.auc_low > 0.5 and attacks["reference"].curve.auc_low > 0.6
    assert attacks["min-k%++"].curve.auc > 0.55 and attacks["zlib"].curve.auc > 0.55


def test_the_base_model_is_the_better_reference(attacks):
    assert attacks["reference"].curve.auc > attacks["loss"].curve.auc


def test_the_control_is_the_base_models_own_loss_and_finds_nobody_in_fair_splits(bench, data, attacks):
    """One split in twenty may look unfair; of 200 splits of the same documents, few enough do."""
    loss = read(bench, bench.start(), concat(data), seed=1).loss
    assert attacks[membership.CONTROL].curve == curve(Scores(-loss[:60], -loss[60:]))
    splits = [np.random.default_rng(i).permutation(-loss) for i in range(200)]
    fair = [c.auc_low <= 0.5 <= c.auc_high for c in (curve(Scores(x[:60], x[60:])) for x in splits)]
    assert binomtest(sum(fair), 200, 0.95, "less").pvalue > 1e-3
    assert [name for name, attack in attacks.items() if attack.control] == [membership.CONTROL]


def test_without_training_no_attack_knows_more_than_the_control(bench, data):
    said = {attack.name: attack for attack in infer(bench, bench.start(), bench.start(), *data, seed=1)}
    assert said["loss"].curve == said[membership.CONTROL].curve
    assert said["reference"].curve.auc == 0.5  # all scores are zero: ties, and no order of the rows leaks in


def test_a_split_that_differs_in_kind_is_shown_by_the_control(bench):
    members, others = encode(bench, ["a " * 8] * 30), encode(bench, sentences("law", 30))
    control = infer(bench, bench.start(), bench.start(), members, others, seed=1)[-1]
    assert control.control and (control.curve.auc_low > 0.5 or control.curve.auc_high < 0.5)


# ---- what a model says ----


@pytest.mark.parametrize("family, task", [("llama", "causal-lm"), ("gpt2", "causal-lm"), ("bert", "masked-lm"),
                                          ("t5", "seq2seq"), ("bert", "sequence-classification")])  # fmt: skip
def test_losses_are_the_benchs_own(family, task):
    labels = ("a", "b") if task == "sequence-classification" else ()
    bench = make_bench(family, task, labels=labels)
    more = {"label": ["a", "b"] * 5} if labels else {"target": sentences("law", 10)} if task == "seq2seq" else {}
    data = encode(bench, [s * (1 + i % 3) for i, s in enumerate(sentences("sport", 10))], **more)
    params = {name: x + np.float32(0.1) for name, x in bench.start().items()}
    said = read(bench, params, data, seed=3)
    rows = np.arange(len(data))
    scores = bench.scores(params, bench.objective.collate(data, rows, membership.derive(3, "membership")))
    np.testing.assert_allclose(said.nll, np.bincount(data.documents, weights=scores["nll"]), rtol=1e-4)
    np.testing.assert_array_equal(said.targets, np.bincount(data.documents, weights=scores["targets"]))


def test_min_k_plus_plus_is_what_its_paper_says(bench):
    data = encode(bench, ["goal team coach match"])
    assert len(data) == 1
    row = torch.tensor(np.array(data.inputs[0]))[None].long()
    logp = F.log_softmax(bench.model(row).logits[0, :-1], -1).detach()
    mean, square = (logp.exp() * logp).sum(-1), (logp.exp() * logp**2).sum(-1)
    z = (logp[torch.arange(len(logp)), row[0, 1:]] - mean) / (square - mean**2).sqrt()
    z = z[-int(data.targets[0]) :].sort().values
    expected = z[: int(0.2 * len(z))].mean()
    assert read(bench, bench.start(), data, seed=0).lowest[0] == pytest.approx(float(expected), rel=1e-4)


def test_a_document_of_several_windows_is_one_unit(bench):
    data = encode(bench, [" ".join(sentences("law", 6)), "short"])
    assert len(data) > 2 and len(read(bench, bench.start(), data, seed=0).nll) == 2


def test_bf16_reads_nearly_the_same(data):
    exact, half = (read(make_bench(precision=p), make_bench().start(), data[0], seed=0) for p in ("fp32", "bf16"))
    np.testing.assert_allclose(half.loss, exact.loss, rtol=0.02)


def test_zlib_sizes_are_those_of_the_texts(bench):
    texts = sentences("law", 3)
    sizes = membership.compressed(bench, encode(bench, texts))
    assert all(n == len(zlib.compress(text.encode())) for n, text in zip(sizes, texts, strict=True))


def test_lira_standardises_by_the_shadows_that_never_saw_the_text():
    said = np.array([[1.0, 5.0], [3.0, 7.0], [100.0, 9.0], [5.0, -100.0]])
    outside = np.array([[True, True], [True, True], [False, True], [True, False]])
    pooled = np.sqrt((8 + 8) / 4)
    np.testing.assert_allclose(membership.standardised(np.array([5.0, 7.0]), said, outside), [2 / pooled, 0.0])
    with pytest.raises(ValueError, match="two shadows"):
        membership.standardised(np.zeros(2), said, np.array([[True, True]] + [[False, True]] * 3))


def test_select_and_sample_keep_documents_whole(bench):
    data = encode(bench, [" ".join(sentences("law", 4)), *sentences("law", 9, seed=1)])
    chosen = select(data, [0, 4])
    assert list(documents_of(chosen)) == [0, 4]
    assert chosen.tokens == data.targets[np.isin(data.documents, [0, 4])].sum()
    assert len(documents_of(sample(data, 5, seed=1))) == 5
    np.testing.assert_array_equal(sample(data, 5, seed=1).documents, sample(data, 5, seed=1).documents)
    np.testing.assert_array_equal(concat([chosen, chosen]).inputs[0], data.inputs[0])


def test_the_section_of_the_page_is_plain_json(attacks):
    said = json.loads(json.dumps(membership.section(list(attacks.values()), "train against test"), allow_nan=False))
    assert [attack["name"] for attack in said["attacks"]] == [*attacks]
    assert set(said["attacks"][0]["tpr"]) == {"0.001", "0.01"} and len(said["attacks"][0]["curve"]) <= 200
    assert "too few non-members to resolve 0.1%, 1.0%" in said["attacks"][0]["note"]
