"""A cut of a base: fewer blocks, a bridge between them, a name and a digest that say so."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from foedus.errors import ModelError
from foedus.lm.adapters import LoRA, attach
from foedus.lm.bench import Bench
from foedus.lm.cut import _fitted
from foedus.lm.load import load_base
from foedus.lm.objectives import make_objective


@pytest.mark.parametrize("name", ["tiny:llama", "tiny:gpt2"])
def test_a_cut_has_its_name_and_a_digest_of_its_own_and_comes_back_by_that_name(name):
    whole, cut = load_base(name), load_base(name, layers=1)
    assert cut.name == f"{name}@1" and cut.digest != whole.digest
    assert load_base(cut.name).digest == cut.digest
    assert cut.model.config.num_hidden_layers == 1
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(load_base(cut.name).model(ids).logits, cut.model(ids).logits)


def test_a_cut_is_nearer_to_its_base_than_blocks_that_are_left_out_alone():
    whole, cut, bare = load_base("tiny:llama"), load_base("tiny:llama", layers=1), load_base("tiny:llama", layers=1)
    (block,) = bare.model.model.layers
    block._forward_hooks.clear()
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, len(whole.tokenizer), (8, 16)))
    with torch.no_grad():
        truth, near, far = (base.model(ids).logits[:, 1:] for base in (whole, cut, bare))
    assert (near - truth).norm() < (far - truth).norm()


def test_a_bridge_over_nothing_but_an_affine_map_is_exact():
    base = load_base("tiny:llama")
    first, second = base.model.model.layers
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) / 8
    second.forward = lambda x, *_, **__: x + x @ weight + 1.0
    rows = [torch.randint(5, 250, (40,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(6)]
    found, bias = _fitted(base.model, base.model.model.layers, 1, 0, rows)
    assert torch.allclose(found, weight, atol=2e-2) and torch.allclose(bias, torch.ones(32), atol=2e-2)
    assert first is base.model.model.layers[0]


def test_private_steps_go_through_a_cut():
    base = load_base("tiny:llama@1")
    attach(base, LoRA(rank=2), 0)
    objective = make_objective("causal-lm", 16)
    bench = Bench(base, objective)
    bench.prove()
    data = objective.encode(pa.table({"text": ["the cat sat on the mat"] * 2}), base.tokenizer)
    assert bench.scores(bench.start(), objective.collate(data, [0, 1], 0))["targets"].sum() > 0


@pytest.mark.parametrize("layers", [2, 3])
def test_more_blocks_than_can_be_left_are_refused(layers):
    with pytest.raises(ModelError, match="fewer than the 2 blocks"):
        load_base("tiny:llama", layers=layers)


def test_a_base_without_one_list_of_blocks_is_refused():
    with pytest.raises(ModelError, match="in one list"):
        load_base("tiny:bert", "masked-lm", layers=1)
