"""A bench computes what the model's own loss says, for every family and task, one silo or several, in fp32 and bf16."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from foedus.errors import ModelError
from foedus.lm.adapters import Full, LoRA, attach
from foedus.lm.bench import Bench, preferred_cohort
from foedus.lm.load import load_base
from foedus.lm.objectives import make_objective

CASES = [
    ("causal-lm", "llama"), ("causal-lm", "gpt2"), ("causal-lm", "gpt_neox"), ("causal-lm", "falcon"),
    ("masked-lm", "bert"), ("masked-lm", "roberta"), ("masked-lm", "albert"),
    ("sequence-classification", "llama"), ("sequence-classification", "gpt2"), ("sequence-classification", "bert"),
    ("sequence-classification", "roberta"), ("sequence-classification", "albert"), ("sequence-classification", "bart"),
    ("seq2seq", "t5"), ("seq2seq", "bart"),
]  # fmt: skip
ADAPTERS = [LoRA(rank=3), LoRA(rank=2, targets="attention", embeddings=True), Full()]
SHAPES = [(3, 9), (2, 12), (4, 5)]  # rows and tokens of three silos' batches
EOS = 2


def make_bench(task, family, adapter, precision="fp32"):
    labels = ("a", "b", "c") if task == "sequence-classification" else ()
    base = load_base(f"tiny:{family}", task, labels=labels)
    attach(base, adapter, seed=0)
    return Bench(base, make_objective(task, 64, labels), precision=precision)


def make_batch(task, rows, length, seed):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 200, (rows, length), generator=draw)
    lengths = torch.randint(3, length + 1, (rows,), generator=draw)
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = ids.masked_fill(mask == 0, 0).scatter(1, lengths[:, None] - 1, EOS)
    labels = ids.masked_fill(mask == 0, -100)
    if task == "sequence-classification":
        labels = torch.randint(0, 3, (rows,), generator=draw)
    if task == "masked-lm":
        labels = torch.where(torch.rand(ids.shape, generator=draw) < 0.4, labels, -100)
        labels[0, 0] = 7
    if task == "seq2seq":
        labels = torch.randint(5, 200, (rows, 4 + rows), generator=draw)
        labels[-1, 3:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def scattered(bench, count, size=0.05):
    """Parameters of `count` silos, each somewhere else."""
    draw = np.random.default_rng(1)
    start = bench.start()
    return [{n: x + size * draw.standard_normal(x.shape).astype("f4") for n, x in start.items()} for _ in range(count)]


def batches_of(task):
    return [make_batch(task, rows, length, seed) for seed, (rows, length) in enumerate(SHAPES)]


def plain(bench, leaves, batches):
    """The same from the model as it is: (logits at the targets, targets) of each silo."""
    for k, batch in enumerate(batches):
        params = {name: x[k] for name, x in leaves.items()}
        output = torch.func.functional_call(bench.model, params, (), bench._inputs(batch))
        yield bench.objective.align(output.logits, batch["labels"])


def gradients_of(sums, leaves):
    weights = torch.arange(1.0, len(sums) + 1)  # silo k counts k + 1 times, so that a mix-up shows
    (sums * weights).sum().backward()
    return torch.cat([torch.zeros(x.numel()) if x.grad is None else x.grad.flatten() for x in leaves.values()])


@pytest.mark.parametrize("adapter", ADAPTERS, ids=["lora", "lora-embeddings", "full"])
@pytest.mark.parametrize(("task", "family"), CASES)
def test_losses_and_gradients_of_three_silos_are_those_of_each_alone(task, family, adapter):
    bench = make_bench(task, family, adapter)
    params, batches = scattered(bench, 3), batches_of(task)
    expected, leaves = bench.leaves(params), bench.leaves(params)
    pairs = list(plain(bench, expected, batches))
    reference = torch.stack([F.cross_entropy(logits, targets, reduction="sum") for logits, targets in pairs])
    sums, counts = bench.losses(leaves, batches)
    assert bench.stacks == (family != "t5" or adapter != Full())
    assert counts.tolist() == [len(targets) for _, targets in pairs]
    torch.testing.assert_close(sums, reference, rtol=2e-6, atol=1e-5)
    wanted = gradients_of(reference, expected)
    torch.testing.assert_close(gradients_of(sums, leaves), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(("task", "family"), CASES)
def test_scores_are_sums_over_the_targets_of_each_row(task, family):
    bench = make_bench(task, family, LoRA(rank=3))
    (params,), batch = scattered(bench, 1), make_batch(task, 3, 9, 0)
    scores = bench.scores(params, batch)
    ((logits, targets),) = plain(bench, bench.leaves([params]), [batch])
    assert scores["nll"].dtype == np.float64
    assert scores["targets"].sum() == len(targets)
    assert scores["correct"].sum() == int((logits.argmax(-1) == targets).sum())
    assert scores["nll"].sum() == pytest.approx(F.cross_entropy(logits, targets, reduction="sum").item(), rel=1e-5)
    one = bench.scores(params, {name: x[1:2] for name, x in batch.items()})
    assert scores["nll"][1] == pytest.approx(one["nll"][0], rel=1e-5)
    assert scores["targets"][1] == one["targets"][0]


@pytest.mark.parametrize(("task", "family"), [case for case in CASES if case[0] != "sequence-classification"])
def test_bf16_is_as_close_to_fp32_as_autocast(task, family):
    exact, half = (make_bench(task, family, LoRA(rank=3), precision) for precision in ("fp32", "bf16"))
    params, batches = scattered(exact, 3), batches_of(task)
    assert half.precision == "bf16"
    expected, cast, leaves = exact.leaves(params), exact.leaves(params), half.leaves(params)
    reference, sums = exact.losses(expected, batches)[0], half.losses(leaves, batches)[0]
    torch.testing.assert_close(sums, reference, rtol=1e-2, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        pairs = [(logits.float(), targets) for logits, targets in plain(exact, cast, batches)]
    usual = torch.stack([F.cross_entropy(logits, targets, reduction="sum") for logits, targets in pairs])
    wanted, ours, theirs = (gradients_of(*x) for x in ((reference, expected), (sums, leaves), (usual, cast)))
    assert float((ours - wanted).norm()) < 1.5 * float((theirs - wanted).norm())
    assert all(x.grad is None or x.grad.dtype == torch.float32 for x in leaves.values())


def test_without_bf16_hardware_auto_is_fp32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    assert make_bench("causal-lm", "llama", LoRA(), "auto").precision == "fp32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert make_bench("causal-lm", "llama", LoRA(), "auto").precision == "bf16"


def test_a_model_whose_every_matrix_is_trained_stays_fp32():
    assert make_bench("causal-lm", "gpt2", Full(), "bf16").precision == "fp32"


def test_an_unknown_precision_is_refused():
    with pytest.raises(ModelError, match="bf16"):
        make_bench("causal-lm", "llama", LoRA(), "bf17")


def test_dropout_draws_anew_and_never_stacks():
    bench = make_bench("causal-lm", "llama", LoRA(rank=3, dropout=0.5))
    (params,), batch = scattered(bench, 1, 0.5), make_batch("causal-lm", 3, 9, 0)
    assert not bench.stacks

    def loss(seed):
        torch.manual_seed(seed)
        return bench.losses(bench.leaves([params]), [batch])[0].item()

    assert loss(1) == loss(1) != loss(2)
    assert bench.scores(params, batch)["nll"].tolist() == bench.scores(params, batch)["nll"].tolist()
    assert not any(module.training for module in bench.model.modules())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_bench_leaves_its_model_as_it_was(family):
    bench = make_bench("causal-lm", family, LoRA(rank=3), "bf16")
    before = {name: x.clone() for name, x in bench.model.state_dict().items()}
    forwards = {name: module.forward.__func__ for name, module in bench.model.named_modules()}
    leaves = bench.leaves(scattered(bench, 2))
    bench.losses(leaves, batches_of("causal-lm")[:2])[0].sum().backward()
    after = bench.model.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert all(type(p) is torch.nn.Parameter and p.dtype == torch.float32 for p in bench.model.parameters())
    assert all(module.forward.__func__ is forwards[name] for name, module in bench.model.named_modules())
    ids = torch.tensor([[5, 6, 7]])
    made = bench.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert made.shape[1] > 3


def test_a_batch_without_targets_costs_nothing_and_says_so():
    for family in ("llama", "gpt2"):
        bench = make_bench("causal-lm", family, LoRA(rank=3))
        batch = make_batch("causal-lm", 2, 6, 0)
        empty = batch | {"labels": torch.full_like(batch["labels"], -100)}
        leaves = bench.leaves(scattered(bench, 2))
        sums, counts = bench.losses(leaves, [batch, empty])
        assert counts.tolist() == [counts[0].item(), 0]
        assert sums[1].item() == 0.0
        sums.sum().backward()
        assert all(x.grad is None or float(x.grad[1].abs().max()) == 0 for x in leaves.values())
        assert bench.losses(bench.leaves(scattered(bench, 1)), [empty])[0].tolist() == [0.0]


def test_a_nan_in_one_silo_stays_in_it():
    bench = make_bench("causal-lm", "llama", LoRA(rank=3))
    params = scattered(bench, 2)
    params[1] = {name: np.full_like(x, np.nan) for name, x in params[1].items()}
    leaves = bench.leaves(params)
    sums, _ = bench.losses(leaves, batches_of("causal-lm")[:2])
    assert torch.isfinite(sums).tolist() == [True, False]
    sums.sum().backward()
    assert all(bool(torch.isfinite(x.grad[0]).all()) for x in leaves.values())


def fingerprint(family):
    bench = make_bench("causal-lm", family, LoRA(rank=3), "bf16")
    leaves = bench.leaves(scattered(bench, 3))
    sums, _ = bench.losses(leaves, batches_of("causal-lm"))
    return hashlib.sha256(sums.detach().numpy().tobytes() + gradients_of(sums, leaves).numpy().tobytes()).hexdigest()


def test_another_process_agrees_to_the_bit():
    script = f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"
    script += "from lm.test_bench import fingerprint\nfor family in ('llama', 'gpt2'): print(fingerprint(family))"
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent / "src")])}
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert other.stdout.split() == [fingerprint("llama"), fingerprint("gpt2")], other.stderr


def test_one_step_after_another_agrees_to_the_bit():
    bench = make_bench("causal-lm", "llama", LoRA(rank=3), "bf16")
    params = scattered(bench, 3)

    def step():
        leaves = bench.leaves(params)
        sums, _ = bench.losses(leaves, batches_of("causal-lm"))
        return torch.cat([sums.detach(), gradients_of(sums, leaves)])

    first = step()
    bench.scores(params[0], make_batch("causal-lm", 4, 20, 5))
    assert torch.equal(first, step())


def test_silos_are_stacked_while_their_tokens_fit_one_batch():
    bench = make_bench("causal-lm", "llama", LoRA(rank=3))
    assert preferred_cohort(bench, rows=4, tokens=16, silos=100) == 64
    assert preferred_cohort(bench, rows=4, tokens=16, silos=10) == 10
    assert preferred_cohort(bench, rows=64, tokens=128, silos=10) == 1


def test_large_layers_and_what_cannot_stack_go_one_by_one(monkeypatch):
    assert preferred_cohort(make_bench("causal-lm", "llama", LoRA(dropout=0.1)), 4, 16, 100) == 1
    bench = make_bench("causal-lm", "llama", LoRA(rank=3))
    bench.model.config.num_hidden_layers, many = 1, torch.nn.Parameter(torch.empty(5_000_000, device="meta"))
    monkeypatch.setattr(bench.model, "parameters", lambda: [many])
    assert preferred_cohort(bench, rows=4, tokens=32, silos=100) == 3
    assert preferred_cohort(bench, rows=8, tokens=128, silos=100) == 1
    monkeypatch.setattr(bench.model, "parameters", lambda: [many] * 8)
    assert preferred_cohort(bench, rows=1, tokens=8, silos=100) == 1  # 40 million trained numbers a silo
