"""Adapters on every family and task: what is trained, where it starts, and that what is saved is what was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from foedus.errors import ModelError
from foedus.lm.adapters import (
    Full,
    LoRA,
    attach,
    check_adapter,
    heads,
    load_adapter,
    load_params,
    params_of,
    save_adapter,
    target_modules,
    trainable,
)
from foedus.lm.load import Base, load_base
from foedus.lm.objectives import make_objective
from foedus.lm.tiny import tiny_config, tiny_tokenizer
from foedus.seeds import generator

# PeftModel.from_pretrained, called here as a user calls it, uses a name that transformers 5 deprecates, and warns of
# merging an embedding's adapter into tied weights.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
]

LABELS = ("no", "yes")
PAIRS = [
    *((family, "causal-lm") for family in ("llama", "gpt2", "gpt_neox", "falcon")),
    *((family, "masked-lm") for family in ("bert", "roberta", "albert")),
    *((family, "seq2seq") for family in ("t5", "bart")),
    *((f, "sequence-classification") for f in "llama gpt2 gpt_neox falcon bert roberta albert t5 bart".split()),
]
EXAMPLES = pa.table(
    {
        "text": ["The patient had a fever.", "The court heard the appeal, and the judge agreed."],
        "target": ["fever", "appeal"],
        "label": ["no", "yes"],
    }
)


def fresh(family: str = "llama", task: str = "causal-lm") -> Base:
    return load_base(f"tiny:{family}", task, labels=LABELS)


def batch_for(base: Base) -> dict[str, torch.Tensor]:
    objective = make_objective(base.task, 32, LABELS)
    encoded = objective.encode(EXAMPLES, base.tokenizer)
    return objective.collate(encoded, range(len(encoded)), 1)


def logits(base: Base) -> torch.Tensor:
    with torch.no_grad():
        return base.model(
            **{k: x for k, x in batch_for(base).items() if k != "labels" or base.task == "seq2seq"}
        ).logits


def trained(base: Base, size: float = 0.05) -> dict[str, np.ndarray]:
    """Parameters as they may be after training: every one moved."""
    noise = {name: generator(1, name).standard_normal(x.shape, np.float32) for name, x in params_of(base.model).items()}
    return {name: x + np.float32(size) * noise[name] for name, x in params_of(base.model).items()}


@pytest.mark.parametrize(("family", "task"), PAIRS)
def test_an_adapter_starts_as_the_base_and_every_part_of_it_learns(family, task):
    base = fresh(family, task)
    before = logits(base)
    attach(base, LoRA(rank=4, embeddings=True), seed=1)
    assert isinstance(base.model, PeftModel) and torch.equal(logits(base), before)
    load_params(base.model, trained(base))
    assert not torch.equal(logits(base), before)
    base.model(**batch_for(base)).loss.backward()
    dead = [name for name, x in trainable(base.model).items() if x.grad is None or not x.grad.any()]
    assert dead == []


@pytest.mark.parametrize(("family", "task"), PAIRS)
def test_full_training_trains_every_parameter_once(family, task):
    base = fresh(family, task)
    before, count = logits(base), sum(x.numel() for x in set(base.model.parameters()))
    attach(base, Full(), seed=1)
    assert torch.equal(logits(base), before)
    assert sum(x.numel() for x in trainable(base.model).values()) == count
    base.model(**batch_for(base)).loss.backward()
    assert all(x.grad is not None for x in trainable(base.model).values())


@pytest.mark.parametrize(("family", "task"), PAIRS)
@pytest.mark.parametrize("embeddings", [False, True])
def test_a_saved_adapter_loads_with_peft_and_says_the_same(family, task, embeddings, tmp_path, capfd):
    base, adapter = fresh(family, task), LoRA(rank=4, embeddings=embeddings)
    attach(base, adapter, seed=1)
    start, params = params_of(base.model), trained(base)
    sha = save_adapter(base, adapter, params, tmp_path / "adapter", "# A card\n")
    assert len(sha) == 64 and (tmp_path / "adapter" / "README.md").read_text() == "# A card\n"
    assert all(np.array_equal(x, start[name]) for name, x in params_of(base.model).items())
    load_params(base.model, params)
    theirs = fresh(family, task)
    theirs.model = PeftModel.from_pretrained(theirs.model, tmp_path / "adapter").eval()
    assert torch.equal(logits(theirs), logits(base))
    halves = {name: x for name, x in theirs.model.named_parameters() if "lora_" in name}
    assert halves and all(x.any() for x in halves.values())
    ours = fresh(family, task)
    load_adapter(ours, tmp_path / "adapter")
    assert torch.equal(logits(ours), logits(base))
    assert "Warning" not in capfd.readouterr().err


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_a_fully_trained_model_is_saved_whole_and_loads_as_a_base(family, tmp_path, capfd):
    base = fresh(family, {"bert": "masked-lm", "t5": "seq2seq"}.get(family, "causal-lm"))
    attach(base, Full(), seed=1)
    params = trained(base)
    save_adapter(base, Full(), params, tmp_path / "model", "# A card\n")
    load_params(base.model, params)
    again = load_base(str(tmp_path / "model"), base.task)
    assert torch.equal(logits(again), logits(base)) and again.digest != base.digest
    assert capfd.readouterr().err == ""


def test_the_same_seed_gives_the_same_start_whatever_was_drawn_before():
    starts = []
    for seed, state in ((1, 0), (1, 99), (2, 0)):
        base = fresh()
        torch.manual_seed(state)
        attach(base, LoRA(), seed)
        starts.append(params_of(base.model))
    assert all(np.array_equal(starts[0][name], starts[1][name]) for name in starts[0])
    a = [name for name in starts[0] if "lora_A" in name]
    assert all(not np.array_equal(starts[0][name], starts[2][name]) for name in a)
    assert all(not x.any() for name, x in starts[0].items() if name not in a)
    assert len({starts[0][name].tobytes() for name in a}) == len(a)


def test_a_is_drawn_as_peft_draws_it():
    base = fresh("gpt2")
    attach(base, LoRA(rank=64, embeddings=True), seed=3)
    for name, x in params_of(base.model).items():
        if "lora_A" in name:
            bound = 1 / np.sqrt(x.shape[1])
            assert np.abs(x).max() <= bound and abs(x.std() - bound / np.sqrt(3)) < 0.05 * bound
        elif "lora_embedding_A" in name:
            assert np.abs(x).max() <= 1 and abs(x.std() - 1 / np.sqrt(3)) < 0.05


@pytest.mark.parametrize(("family", "task"), PAIRS)
def test_all_linear_means_every_linear_layer_of_the_blocks_and_no_head(family, task):
    base = fresh(family, task)
    targets = target_modules(base, LoRA())
    linear = [n for n, m in base.model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    outside = set(linear) - set(targets)
    assert not any(
        name.split(".")[-1] in ("k", "v", "c_fc", "query", "o_proj", "fc1", "dense_h_to_4h") for name in outside
    )
    ends = ("lm_head", "embed_out", "score", "classifier", "decoder", "pooler", "embedding_hidden_mapping_in")
    inside = ("cls.predictions", "lm_head.", "predictions.", "classifier.", "classification_head", "pooler")
    assert all(name.endswith(ends) or any(x in name for x in inside) for name in outside), outside
    attach(base, LoRA(), seed=0)
    wrapped = {n.removeprefix("base_model.model.") for n, m in base.model.named_modules() if hasattr(m, "lora_A")}
    assert wrapped == set(targets)


ATTENTION = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "gpt2": {"c_attn", "c_proj"},
    "gpt_neox": {"query_key_value", "dense"},
    "falcon": {"query_key_value", "dense"},
    "bert": {"query", "key", "value", "dense"},
    "roberta": {"query", "key", "value", "dense"},
    "albert": {"query", "key", "value", "dense"},
    "t5": {"q", "k", "v", "o"},
    "bart": {"q_proj", "k_proj", "v_proj", "out_proj"},
}


@pytest.mark.parametrize(("family", "task"), PAIRS)
def test_attention_means_the_projections_of_the_attention_layers(family, task):
    base = fresh(family, task)
    targets = target_modules(base, LoRA(targets="attention"))
    assert {name.split(".")[-1] for name in targets} == ATTENTION[family]
    blocks = {"albert": 1, "t5": 6, "bart": 6}.get(family, 2)
    assert len(targets) == blocks * len(ATTENTION[family])
    assert not any(word in name for name in targets for word in ("mlp", "intermediate", "fc", "ffn", "wi", "wo"))


@pytest.mark.parametrize(("family", "task"), [pair for pair in PAIRS if pair[1] == "sequence-classification"])
def test_a_classifiers_head_is_trained_whole(family, task):
    base = fresh(family, task)
    size = sum(x.numel() for name, x in base.model.named_parameters() if name.startswith(heads(base)))
    attach(base, LoRA(), seed=0)
    trained_whole = [x for name, x in trainable(base.model).items() if "modules_to_save" in name]
    assert size > 0 and sum(x.numel() for x in trained_whole) == size


def test_a_head_that_the_weights_did_not_contain_is_trained_too(tmp_path):
    encoder = load_base("tiny:roberta", "masked-lm")
    encoder.model.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    base = load_base(str(tmp_path), "sequence-classification", labels=LABELS)
    assert base.fresh == ("classifier.dense", "classifier.out_proj") and heads(base) == ("classifier",)
    sentence = load_base("all-minilm-l6-v2", "sequence-classification", labels=LABELS)
    assert sentence.fresh == heads(sentence) == ("classifier",)


def test_named_targets_are_matched_from_the_right_and_unknown_ones_refused():
    base = fresh("gpt2")
    assert target_modules(base, LoRA(targets=("attn.c_proj",))) == [f"transformer.h.{i}.attn.c_proj" for i in range(2)]
    assert target_modules(base, LoRA(targets=("lm_head", "wte"))) == ["transformer.wte", "lm_head"]
    with pytest.raises(ModelError, match='called "c_atn".*Did you mean "c_attn"'):
        target_modules(base, LoRA(targets=("c_atn",)))
    with pytest.raises(ModelError, match='called "ln_1"'):
        target_modules(base, LoRA(targets=("ln_1",)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 1025}, "rank=1025"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"alpha": 0}, "alpha=0"),
        ({"alpha": float("inf")}, "alpha=inf"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"targets": "all_linear"}, 'Did you mean "all-linear"'),
        ({"targets": ()}, "at least one target"),
    ],
)
def test_an_adapter_out_of_range_is_refused(values, message):
    with pytest.raises(ModelError, match=message):
        LoRA(**values)


def test_a_base_takes_one_adapter_only():
    for adapter in (LoRA(), Full()):
        base = fresh()
        attach(base, adapter, seed=0)
        with pytest.raises(ModelError, match="a base without an adapter"):
            attach(base, LoRA(), seed=0)


def test_parameters_of_another_adapter_are_refused():
    base = fresh()
    attach(base, LoRA(rank=4), seed=0)
    params = params_of(base.model)
    first = next(iter(params))
    with pytest.raises(ModelError, match="such as"):
        load_params(base.model, {name: x for name, x in params.items() if name != first})
    with pytest.raises(ModelError, match="the same rank"):
        load_params(base.model, params | {first: params[first][:2]})


def test_parameters_are_copies_in_float32_in_the_models_order():
    base = fresh()
    attach(base, LoRA(rank=4), seed=0)
    params = params_of(base.model)
    assert list(params) == [name for name, x in base.model.named_parameters() if x.requires_grad]
    assert {x.dtype for x in params.values()} == {np.dtype(np.float32)}
    next(iter(params.values()))[:] = 9
    assert not any((x == 9).any() for x in params_of(base.model).values())


# ---- what is on disk ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    base, adapter = fresh(), LoRA(rank=4)
    attach(base, adapter, seed=1)
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    save_adapter(base, adapter, trained(base), folder, "# A card\n")
    return folder


def copy(saved: Path, to: Path) -> Path:
    return Path(shutil.copytree(saved, to / "adapter"))


def test_the_same_parameters_give_the_same_files_whatever_was_there(tmp_path):
    files = []
    for _ in range(2):
        base, adapter = fresh(), LoRA(rank=4)
        attach(base, adapter, seed=1)
        save_adapter(base, adapter, trained(base), tmp_path / "adapter", "# A card\n")
        files.append({path.name: path.read_bytes() for path in sorted((tmp_path / "adapter").iterdir())})
    assert files[0] == files[1]
    assert set(files[0]) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "foedus.json"}


def test_an_adapter_names_its_base_as_the_user_did_and_no_path_of_this_machine(saved):
    assert PeftConfig.from_pretrained(saved).base_model_name_or_path == "tiny:llama"
    text = "".join(path.read_text() for path in saved.glob("*.json"))
    assert str(Path.home()) not in text and str(saved.parent) not in text
    targets = json.loads((saved / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)  # PEFT keeps a set, whose order differs from process to process
    record = json.loads((saved / "foedus.json").read_text())
    assert record["base"]["digest"] == fresh().digest and record["adapter"]["rank"] == 4


def test_an_adapter_fits_its_own_base_only(saved, tmp_path):
    check_adapter(fresh(), saved)
    for family, message in {"gpt2": "the family llama.*the family gpt2.*Load tiny:llama", "falcon": "family"}.items():
        with pytest.raises(ModelError, match=message):
            check_adapter(fresh(family), saved)
    with pytest.raises(ModelError, match="the task causal-lm.*the task sequence-classification"):
        check_adapter(fresh("llama", "sequence-classification"), saved)
    other = fresh()
    other.model.model.norm.weight[0] += 1
    other.digest = "0" * 64
    with pytest.raises(ModelError, match="with the digest [0-9a-f]{12}….*0{12}…"):
        check_adapter(other, saved)


def wider(tmp_path: Path) -> Base:
    config = tiny_config("llama")
    config.hidden_size, config.num_hidden_layers = 48, 1
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    tiny_tokenizer("llama").save_pretrained(tmp_path / "wide")
    return load_base(str(tmp_path / "wide"))


def test_an_adapter_made_elsewhere_is_judged_by_its_layers_and_their_sizes(saved, tmp_path):
    folder = copy(saved, tmp_path)
    (folder / "foedus.json").unlink()
    check_adapter(fresh(), folder)
    with pytest.raises(ModelError, match="a base with model.layers.0.mlp.down_proj; got tiny:gpt2 .* without it"):
        check_adapter(fresh("gpt2"), folder)
    wide = wider(tmp_path)
    with pytest.raises(ModelError, match="with 32 (inputs|outputs); got .* with .*48"):
        check_adapter(wide, folder)
    for base in (fresh("gpt2"), wide):
        with pytest.raises(ModelError):
            load_adapter(base, folder)


def test_a_classifier_with_another_number_of_labels_does_not_fit(tmp_path):
    base, adapter = fresh("bert", "sequence-classification"), LoRA()
    attach(base, adapter, seed=1)
    save_adapter(base, adapter, trained(base), tmp_path / "adapter", "")
    three = load_base("tiny:bert", "sequence-classification", labels=("a", "b", "c"))
    with pytest.raises(ModelError, match="the labels"):
        check_adapter(three, tmp_path / "adapter")
    (tmp_path / "adapter" / "foedus.json").unlink()
    with pytest.raises(ModelError, match=r"classifier.(weight|bias) of shape \(2,.*3"):
        check_adapter(three, tmp_path / "adapter")


def test_a_broken_adapter_is_refused_with_the_reason(saved, tmp_path):
    def broken(name: str, content: bytes | None) -> Path:
        folder = copy(saved, tmp_path / f"{name}-{content and len(content)}")
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        return folder

    for name, content, message in (
        ("adapter_config.json", None, "a folder with an adapter"),
        ("adapter_model.safetensors", None, "a whole adapter_model.safetensors"),
        (
            "adapter_model.safetensors",
            (saved / "adapter_model.safetensors").read_bytes()[:900],
            "a whole adapter_model",
        ),
        ("foedus.json", b"{", "a readable foedus.json"),
        ("foedus.json", b'{"base": 1}', "a readable foedus.json"),
    ):
        with pytest.raises(ModelError, match=message):
            check_adapter(fresh(), broken(name, content))


def test_an_adapter_that_peft_would_read_as_something_else_is_noticed_when_saved(tmp_path, monkeypatch):
    base, adapter = fresh(), LoRA(rank=4)
    attach(base, adapter, seed=1)
    params, save = trained(base), PeftModel.save_pretrained

    def lossy(model, folder, **options):
        save(model, folder, **options)
        path = Path(folder) / "adapter_model.safetensors"
        tensors = load_file(path)
        tensors.pop(next(name for name in sorted(tensors) if "lora_B" in name))
        save_file(tensors, path)

    monkeypatch.setattr(PeftModel, "save_pretrained", lossy)
    with pytest.raises(ModelError, match="reads back as it was; got 1 different"):
        save_adapter(base, adapter, params, tmp_path / "adapter", "")
