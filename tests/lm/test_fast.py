"""The hand-written step of the Llama family equals the model's own, and the head equals the cross-entropy of its
logits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from foedus.lm import fast, head
from foedus.lm.adapters import LoRA
from foedus.lm.bench import Bench
from foedus.lm.objectives import make_objective

from .test_bench import gradients_of, make_batch, make_bench, plain, scattered

SMALL = {
    "vocab_size": 211, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "llama": transformers.LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "llama with biases": transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "llama with wide heads": transformers.LlamaConfig(**SMALL, num_key_value_heads=1, head_dim=16),
    "llama with scaled rotary": transformers.LlamaConfig(
        **SMALL, rope_parameters={
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral": transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=None),
    "qwen2": transformers.Qwen2Config(**SMALL, num_key_value_heads=2),
}  # fmt: skip


def bench_of(config, precision="fp32", **lora):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))  # norms and biases that matter
    options = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora
    model = get_peft_model(model, LoraConfig(**options)).eval()
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=2)
    return Bench(
        SimpleNamespace(model=model, tokenizer=tokenizer), make_objective("causal-lm", 64), precision=precision
    )


def compare(bench, batches):
    params = scattered(bench, len(batches))
    expected, leaves = bench.leaves(params), bench.leaves(params)
    pairs = plain(bench, expected, batches)
    reference = torch.stack([F.cross_entropy(logits, targets, reduction="sum") for logits, targets in pairs])
    sums, _ = bench.losses(leaves, batches)
    torch.testing.assert_close(sums, reference, rtol=3e-6, atol=1e-5)
    wanted = gradients_of(reference, expected)
    torch.testing.assert_close(gradients_of(sums, leaves), wanted, rtol=1e-3, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("silos", [1, 3])
@pytest.mark.parametrize("kind", MODELS)
def test_losses_and_gradients_are_the_models_own(kind, silos):
    bench = bench_of(MODELS[kind])
    assert bench._fast is not None
    compare(bench, [make_batch("causal-lm", 4 - k, 9 + 4 * k, k) for k in range(silos)])


def test_ranks_and_scales_may_differ_from_layer_to_layer():
    bench = bench_of(MODELS["llama"], rank_pattern={"q_proj": 5, "down_proj": 1}, alpha_pattern={"v_proj": 2})
    compare(bench, [make_batch("causal-lm", 2, 9, k) for k in range(2)])


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"], ["gate_proj", "o_proj"]])
def test_layers_without_an_adapter_get_none(targets):
    bench = bench_of(MODELS["qwen2"], target_modules=targets)
    assert bench._fast is not None
    compare(bench, [make_batch("causal-lm", 2, 9, k) for k in range(2)])


def test_rows_without_padding_take_the_short_way():
    batch = make_batch("causal-lm", 3, 8, 0)
    batch |= {"attention_mask": torch.ones_like(batch["input_ids"]), "labels": batch["input_ids"]}
    compare(bench_of(MODELS["llama"]), [batch])
    compare(bench_of(MODELS["llama"]), [batch, batch])


def test_targets_may_be_few():
    batch = make_batch("causal-lm", 3, 12, 0)
    batch["labels"][:, :6] = -100
    batch["labels"][1] = -100
    compare(bench_of(MODELS["llama"]), [batch, make_batch("causal-lm", 2, 5, 1)])


def test_padding_on_the_left_goes_through_the_models_own_code():
    bench, batch = bench_of(MODELS["llama"]), make_batch("causal-lm", 3, 9, 0)
    batch = {name: x.flip(1) for name, x in batch.items()}
    assert bench._tokens(batch, 1) is None
    compare(bench, [batch])


def test_attention_over_long_rows_is_made_again_and_not_kept(monkeypatch):
    monkeypatch.setattr(fast, "KEPT", 4)
    compare(bench_of(MODELS["llama"]), [make_batch("causal-lm", 3, 9, 0), make_batch("causal-lm", 2, 12, 1)])


@pytest.mark.parametrize(
    "change",
    [
        lambda: bench_of(MODELS["qwen2"], target_modules=["q_proj", "embed_tokens"]),
        lambda: bench_of(MODELS["llama"], lora_dropout=0.1),
        lambda: bench_of(MODELS["llama"], use_dora=True),
        lambda: bench_of(MODELS["llama with biases"], lora_bias=True),
        lambda: bench_of(MODELS["llama"], modules_to_save=["norm"]),
        lambda: bench_of(transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4)),
        lambda: bench_of(transformers.LlamaConfig(**SMALL, hidden_act="gelu")),
        lambda: make_bench("causal-lm", "gpt2", LoRA()),
    ],
    ids=["embedding", "dropout", "dora", "lora bias", "a trained norm", "sliding window", "gelu", "gpt2"],
)
def test_what_the_fast_step_does_not_cover_it_leaves_to_the_model(change):
    assert change()._fast is None


def test_the_workspace_is_reused_and_grows_only_when_needed(monkeypatch):
    monkeypatch.setattr(fast, "BLOCK", 1000)
    bench = bench_of(MODELS["llama"])
    big, small = make_batch("causal-lm", 4, 16, 0), make_batch("causal-lm", 2, 6, 1)
    compare(bench, [big])
    blocks = [block.data_ptr() for block in bench._fast.space.blocks]
    for batch in (small, big, small):
        compare(bench, [batch])
    assert [block.data_ptr() for block in bench._fast.space.blocks] == blocks
    assert len(blocks) > 3


@pytest.mark.parametrize("words", [7, 50, 64, 4096])
@pytest.mark.parametrize("biased", [False, True])
def test_the_head_in_blocks_is_the_cross_entropy_of_all_logits(monkeypatch, words, biased):
    monkeypatch.setattr(head, "WORDS", words)
    monkeypatch.setattr(head, "ROWS", 5)
    torch.manual_seed(0)
    states = 3 * torch.randn(13, 8, requires_grad=True).detach().requires_grad_()
    weight, targets = torch.randn(50, 8), torch.randint(0, 50, (13,))
    bias = torch.randn(50) if biased else None
    logits = F.linear(states, weight, bias)
    nll, factor = head.cross_entropy(states, weight, bias, targets), torch.rand(13)
    reference = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(nll, reference)
    (ours,), (theirs,) = (torch.autograd.grad((x * factor).sum(), states, retain_graph=True) for x in (nll, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(head.forward(states, weight, bias, targets, hits=True)[2], logits.argmax(-1) == targets)


def test_of_equal_logits_the_first_is_the_arg_max(monkeypatch):
    monkeypatch.setattr(head, "WORDS", 3)
    weight = torch.zeros(9, 4)
    hits = head.forward(torch.randn(9, 4), weight, None, torch.arange(9), hits=True)[2]
    assert hits.tolist() == [True] + [False] * 8


def test_a_target_that_the_model_finds_impossible_has_a_finite_loss():
    states, weight = torch.tensor([[300.0]]), torch.tensor([[1.0], [-1.0]])
    assert head.cross_entropy(states, weight, None, torch.tensor([1])).item() == pytest.approx(600.0)
