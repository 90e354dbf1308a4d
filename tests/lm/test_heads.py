"""Heads start by knowing nothing, are trained like everything else, and are saved beside the adapter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import PeftModel

from foedus.errors import ModelError
from foedus.lm.adapters import Frozen, Full, LoRA, attach, load_adapter, load_params, params_of, save_adapter
from foedus.lm.bench import Bench
from foedus.lm.heads import WEIGHTS, attach_head, head, is_head, load_heads, width
from foedus.lm.load import load_base
from foedus.lm.objectives import make_objective

from .test_bench import make_batch

ADAPTERS = [LoRA(rank=2, targets="attention"), Full(), Frozen()]
SIZES = (32, 8, 3)


def headed(adapter=ADAPTERS[0], family="llama", seed=0):
    base = load_base(f"tiny:{family}")
    attach(base, adapter, seed)
    attach_head(base, "topics", SIZES, seed)
    attach_head(base, "domains", (32, 2), seed)
    return base


def trained(base):
    draw = np.random.default_rng(3)
    return {name: x + draw.standard_normal(x.shape).astype("f4") for name, x in params_of(base.model).items()}


def of_heads(params):
    return {name.partition("foedus_heads.")[2]: x for name, x in params.items() if is_head(name)}


def test_a_head_starts_by_giving_every_class_the_same_chance():
    base = headed()
    x = torch.randn(5, width(base))
    assert torch.equal(head(base.model, "topics")(x), torch.zeros(5, 3))
    assert torch.equal(head(base.model, "domains")(x), torch.zeros(5, 2))


def test_the_same_seed_draws_the_same_head_and_another_seed_or_name_another():
    one, again, other = headed(), headed(), headed(seed=1)
    first = of_heads(params_of(one.model))["topics.0.weight"]
    assert np.array_equal(first, of_heads(params_of(again.model))["topics.0.weight"])
    assert not np.array_equal(first, of_heads(params_of(other.model))["topics.0.weight"])
    assert 0.8 / np.sqrt(32) < abs(first).max() <= 1 / np.sqrt(32)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=["lora", "full", "frozen"])
def test_the_parameters_of_heads_are_among_those_that_a_round_changes(adapter):
    bench = Bench(headed(adapter), make_objective("causal-lm", 24), precision="fp32")
    names = {"topics.0.weight", "topics.0.bias", "topics.2.weight", "topics.2.bias", "domains.0.weight",
             "domains.0.bias"}  # fmt: skip
    assert of_heads(bench.start()).keys() == names
    assert head(bench, "topics") is head(bench.model, "topics")
    if adapter == Frozen():
        assert all(is_head(name) for name in bench.start())


@pytest.mark.parametrize("adapter", ADAPTERS, ids=["lora", "full", "frozen"])
def test_a_base_with_heads_says_what_it_said(adapter):
    batch = make_batch("causal-lm", 3, 9, 0)
    base = load_base("tiny:llama")
    attach(base, adapter, 0)
    with torch.no_grad():
        plain, with_heads = base.model(**batch).logits, headed(adapter).model(**batch).logits
    assert torch.equal(plain, with_heads)


def test_lora_with_heads_takes_the_fast_way_and_silos_still_stack():
    bench = Bench(headed(), make_objective("causal-lm", 24), precision="fp32")
    assert bench._fast is not None and bench.stacks
    other = Bench(headed(family="gpt2"), make_objective("causal-lm", 24), precision="fp32")
    assert other._fast is None and other.stacks


@pytest.mark.parametrize("adapter", ADAPTERS, ids=["lora", "full", "frozen"])
def test_an_adapter_with_heads_is_saved_and_leaves_the_model_as_it_was(adapter, tmp_path, capfd):
    base = headed(adapter)
    before, params = params_of(base.model), trained(base)
    assert len(save_adapter(base, adapter, params, tmp_path, "# A card\n")) == 64
    assert all(np.array_equal(x, before[name]) for name, x in params_of(base.model).items())
    again = headed(adapter, seed=9)
    load_heads(again.model, tmp_path)
    for name, x in of_heads(params_of(again.model)).items():
        assert np.array_equal(x, of_heads(params)[name])
    assert "Warning" not in capfd.readouterr().err


def test_a_loaded_adapter_brings_its_heads_and_peft_reads_the_folder_without_them(tmp_path):
    base, batch = headed(), make_batch("causal-lm", 3, 9, 0)
    params, x = trained(base), torch.randn(4, 32)
    save_adapter(base, ADAPTERS[0], params, tmp_path, "# A card\n")
    load_params(base.model, params)
    ours, theirs = load_base("tiny:llama"), load_base("tiny:llama")
    load_adapter(ours, tmp_path)
    theirs.model = PeftModel.from_pretrained(theirs.model, tmp_path).eval()
    with torch.no_grad():
        wanted = base.model(**batch).logits
        assert torch.equal(ours.model(**batch).logits, wanted)
        assert torch.equal(theirs.model(**batch).logits, wanted)
        for name in ("topics", "domains"):
            assert torch.equal(head(ours.model, name)(x), head(base.model, name)(x))
    assert not any(p.requires_grad for p in head(ours.model, "topics").parameters())


def test_a_fully_trained_model_is_a_base_without_its_heads(tmp_path):
    base, batch = headed(Full()), make_batch("causal-lm", 3, 9, 0)
    params = trained(base)
    save_adapter(base, Full(), params, tmp_path, "# A card\n")
    load_params(base.model, params)
    again = load_base(str(tmp_path))
    assert (tmp_path / WEIGHTS).is_file()
    with torch.no_grad():
        assert torch.equal(again.model(**batch).logits, base.model(**batch).logits)


def test_an_adapter_without_heads_has_no_file_for_them(tmp_path):
    base = load_base("tiny:llama")
    attach(base, ADAPTERS[0], 0)
    save_adapter(base, ADAPTERS[0], params_of(base.model), tmp_path, "# A card\n")
    assert not (tmp_path / WEIGHTS).exists()


def test_a_name_that_is_taken_wrong_sizes_and_unknown_heads_are_refused():
    base = headed()
    with pytest.raises(ModelError, match="new name"):
        attach_head(base, "topics", SIZES, 0)
    with pytest.raises(ModelError, match="new name"):
        attach_head(base, "to.pics", SIZES, 0)
    with pytest.raises(ModelError, match="sizes from inputs"):
        attach_head(base, "more", (32,), 0)
    with pytest.raises(ModelError, match='Did you mean "topics"'):
        head(base.model, "topic")
