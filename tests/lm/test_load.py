"""Bases: tiny ones of every family, folders, GGUF files, the catalogue, and everything that is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from transformers import AutoModelForCausalLM

from foedus.assets import fetch
from foedus.errors import AssetError, ModelError
from foedus.lm import weights
from foedus.lm.load import TASKS, base_of, load_base
from foedus.lm.objectives import make_objective
from foedus.lm.tiny import FAMILIES, tiny_tokenizer
from foedus.seeds import generator

CAUSAL, MASKED, SEQ2SEQ = ("llama", "gpt2", "gpt_neox", "falcon"), ("bert", "roberta", "albert"), ("t5", "bart")
LABELS = ("no", "yes")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOEDUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def save(folder: Path, name: str = "tiny:llama", task: str = "causal-lm") -> Path:
    base = load_base(name, task, labels=LABELS)
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 25).view(2, 10)).logits


def write_gguf(path: Path, pre: str = "smollm") -> Path:
    """A small Llama as llama.cpp writes them: Q4_1, output head tied to the embedding, GPT-2 vocabulary."""
    words = tiny_tokenizer("gpt2")
    tokens = [word for word, _ in sorted(words.get_vocab().items(), key=lambda item: item[1])]
    merges = [" ".join(pair) for pair in json.loads(words.backend_tokenizer.to_str())["model"]["merges"]]
    out = GGUFWriter(path, "llama")
    out.add_context_length(128)
    out.add_embedding_length(64)
    out.add_block_count(2)
    out.add_feed_forward_length(96)
    out.add_head_count(4)
    out.add_head_count_kv(2)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(10000.0)
    out.add_rope_dimension_count(16)
    out.add_vocab_size(len(tokens))
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(pre)
    out.add_token_list(tokens)
    out.add_token_types([3 if i < 5 else 1 for i in range(len(tokens))])
    out.add_token_merges(merges)
    for add, i in ((out.add_bos_token_id, 1), (out.add_eos_token_id, 2), (out.add_pad_token_id, 0)):
        add(i)
    square, narrow, wide, flat = (64, 64), (32, 64), (96, 64), (64, 96)
    block = {"attn_q": square, "attn_k": narrow, "attn_v": narrow, "attn_output": square}
    block |= {"ffn_gate": wide, "ffn_up": wide, "ffn_down": flat}
    shapes = {"token_embd": (len(tokens), 64)} | {f"blk.{i}.{name}": x for i in range(2) for name, x in block.items()}
    for name, shape in shapes.items():
        matrix = generator(0, name).standard_normal(shape, np.float32) / 8
        kind = GGMLQuantizationType.Q4_1
        out.add_tensor(f"{name}.weight", quants.quantize(matrix, kind), raw_dtype=kind)
    for name in ("output_norm", *(f"blk.{i}.{norm}" for i in range(2) for norm in ("attn_norm", "ffn_norm"))):
        out.add_tensor(f"{name}.weight", np.ones(64, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


# ---- tiny models ----


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_tiny_base_for_its_tasks_and_refuses_the_others(family):
    able = {"features", "sequence-classification"}
    able |= {"causal-lm"} if family in CAUSAL else {"masked-lm"} if family in MASKED else {"seq2seq"}
    for task in TASKS:
        if task in able:
            base = load_base(f"tiny:{family}", task, labels=LABELS)
            assert (base.family, base.task, base.name) == (family, task, f"tiny:{family}")
            assert not base.model.training and not any(p.requires_grad for p in base.model.parameters())
            assert {p.dtype for p in base.model.parameters()} == {torch.float32}
        else:
            with pytest.raises(ModelError, match=f"can do {task}.*It can do: "):
                load_base(f"tiny:{family}", task, labels=LABELS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_tokenizer_spells_any_text(family):
    tokenizer = tiny_tokenizer(family)
    for text in ("The doctor, and the court.", "中文 🙂 é\x00\n\t  x", ""):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_a_tiny_base_is_the_same_in_another_process_and_leaves_the_random_state_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    base = load_base("tiny:gpt2")
    assert torch.equal(state, torch.get_rng_state())
    code = "from foedus.lm.load import load_base; print(load_base('tiny:gpt2').digest)"
    environment = os.environ | {"PYTHONPATH": "src", "PYTHONHASHSEED": "7"}
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=root)
    assert out.stdout.strip() == base.digest, out.stderr
    assert len({load_base(f"tiny:{family}", "features").digest for family in FAMILIES}) == len(FAMILIES)


# ---- folders ----


def test_a_folder_loads_as_it_was_saved_and_its_digest_does_not_depend_on_sharding(tmp_path):
    tiny = load_base("tiny:llama")
    one = load_base(str(save(tmp_path / "one")))
    tiny.model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    tiny.tokenizer.save_pretrained(tmp_path / "many")
    many = load_base(str(tmp_path / "many"))
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert torch.equal(logits(one.model), logits(tiny.model)) and torch.equal(logits(many.model), logits(tiny.model))
    assert one.digest == many.digest
    assert one.name == one.model.config._name_or_path == str(tmp_path / "one")


def test_a_changed_weight_or_a_changed_configuration_changes_the_digest(tmp_path):
    first = load_base(str(save(tmp_path / "a"))).digest
    model = load_base("tiny:llama").model
    model.model.norm.weight[0] += 1
    model.save_pretrained(tmp_path / "a")
    assert load_base(str(tmp_path / "a")).digest != first
    config = json.loads((save(tmp_path / "b") / "config.json").read_text())
    assert load_base(str(tmp_path / "b")).digest == first
    (tmp_path / "b" / "config.json").write_text(json.dumps(config | {"transformers_version": "5.0.0"}))
    assert load_base(str(tmp_path / "b")).digest == first
    (tmp_path / "b" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert load_base(str(tmp_path / "b")).digest != first


def test_a_classifier_on_a_base_without_one_starts_from_the_same_head_everywhere(tmp_path):
    folder = str(save(tmp_path / "base"))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = load_base(folder, "sequence-classification", labels=LABELS)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    two = load_base(folder, "sequence-classification", labels=LABELS)
    assert one.fresh == ("score",) and one.labels == LABELS
    assert torch.equal(one.model.score.weight, two.model.score.weight) and one.model.score.weight.std() > 0
    assert one.model.config.id2label == {0: "no", 1: "yes"}


def test_a_trained_classifier_keeps_its_head_and_refuses_other_labels(tmp_path):
    folder = str(save(tmp_path / "base", "tiny:bert", "sequence-classification"))
    base = load_base(folder, "sequence-classification", labels=LABELS)
    assert base.fresh == ()
    with pytest.raises(ModelError, match="knows the labels yes, no, in this order.*trained on no, yes"):
        load_base(folder, "sequence-classification", labels=LABELS[::-1])
    with pytest.raises(ModelError, match="weights for sequence-classification"):
        load_base(folder, "sequence-classification", labels=("a", "b", "c"))


def test_a_loaded_model_becomes_a_base():
    model = load_base("tiny:gpt2").model.double().train().requires_grad_(True)
    base = base_of(model, tiny_tokenizer("gpt2"), name="mine")
    assert (base.name, base.family, base.task) == ("mine", "gpt2", "causal-lm")
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    assert base_of(model, tiny_tokenizer("gpt2")).digest == base.digest


def test_a_tokenizer_says_no_more_than_the_model_can_take(tmp_path):
    assert load_base("tiny:roberta", "masked-lm").tokenizer.model_max_length == 512
    folder = save(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    assert load_base(str(folder)).tokenizer.model_max_length == 64


# ---- GGUF ----


def test_a_gguf_file_is_converted_once_and_says_exactly_what_it_said(tmp_path, cache, capfd):
    path = write_gguf(tmp_path / "model.gguf")
    base = load_base(str(path))
    folder = next((cache / "converted").glob("*-v*[0-9]"))
    assert capfd.readouterr() == ("", "")
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    again = load_base(str(path))
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp and again.digest == base.digest
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
    with weights.quiet():
        reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    assert torch.equal(logits(base.model), logits(reference))
    base.model.save_pretrained(tmp_path / "saved")


def test_a_digest_of_a_gguf_file_is_of_the_file_not_of_the_library_that_read_it(tmp_path, cache):
    path = write_gguf(tmp_path / "model.gguf")
    folder = weights.convert(path)
    first = (folder / "digest").read_text()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"a_default_of_a_later_version": 1}))
    assert load_base(str(path)).digest == first
    assert load_base(str(write_gguf(tmp_path / "other.gguf", pre="default"))).digest != first


def test_digits_stand_apart_where_the_gguf_file_says_so(tmp_path, cache):
    apart = load_base(str(write_gguf(tmp_path / "a.gguf"))).tokenizer
    assert apart.tokenize("in 2015\n  2") == ["in", "Ġ", "2", "0", "1", "5", "Ċ", "Ġ", "Ġ", "2"]
    pre = json.loads(apart.backend_tokenizer.to_str())["pre_tokenizer"]
    assert [part["type"] for part in pre["pretokenizers"]] == ["Digits", "ByteLevel"]
    plain = load_base(str(write_gguf(tmp_path / "b.gguf", pre="default"))).tokenizer
    assert json.loads(plain.backend_tokenizer.to_str())["pre_tokenizer"]["type"] == "ByteLevel"


def test_what_a_killed_conversion_left_is_swept_away_and_a_truncated_one_made_anew(tmp_path, cache):
    path = write_gguf(tmp_path / "model.gguf")
    folder = weights.convert(path)
    digest = (folder / "digest").read_text()
    scratch = folder.with_suffix(".making")
    shutil.copytree(folder, scratch)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    assert weights.convert(path) == folder and not scratch.exists()
    assert load_base(str(path)).digest == digest


def test_a_conversion_that_fails_leaves_nothing(tmp_path, cache, monkeypatch):
    path = write_gguf(tmp_path / "model.gguf")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.LlamaForCausalLM.save_pretrained", full)
    with pytest.raises(AssetError, match="No space left.*FOEDUS_CACHE"):
        weights.convert(path)
    assert [x for x in (cache / "converted").iterdir() if x.is_dir()] == []


def test_a_damaged_gguf_file_is_refused(tmp_path, cache):
    whole = write_gguf(tmp_path / "model.gguf").read_bytes()
    for name, content in {"empty": b"", "cut": whole[: len(whole) // 3], "text": b"not a model" * 99}.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(ModelError, match="GGUF file that transformers can read"):
            load_base(str(path))


# ---- refusals ----


def test_pickled_weights_are_refused_by_name(tmp_path):
    folder = save(tmp_path / "base")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"safetensors.*pickled \(pytorch_model.bin\)"):
        load_base(str(folder))


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _no_tokenizer(folder: Path) -> None:
    for file in folder.glob("token*"):
        file.unlink()


def _cut(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:4000])


def _config(**facts):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | facts))

    return change


def _only_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_no_weights, "without model.safetensors"),
        (_no_tokenizer, "a tokenizer beside the weights"),
        (_cut, "weights for causal-lm"),
        (_config(hidden_size=64), "weights for causal-lm"),
        (_config(num_hidden_layers=3), "all weights that causal-lm needs"),
        (_config(model_type="nonsense"), "a configuration that transformers can read"),
        (_config(model_type="nonsense", auto_map={"AutoConfig": "code.Config"}), "code of their own are not run"),
        (_only_adapter, "which holds an adapter"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "a configuration that transformers can read"),
    ],
)
def test_a_broken_folder_is_refused_with_the_reason(tmp_path, harm, message):
    folder = save(tmp_path / "base")
    harm(folder)
    with pytest.raises(ModelError, match=message):
        load_base(str(folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("smollm2-135m-instuct",), 'Did you mean "smollm2-135m-instruct"'),
        (("tiny:lama",), 'Did you mean "tiny:llama"'),
        (("somebody/nothing-of-ours",), "nothing usable from the Hugging Face hub.*offline"),
        (("no such name at all",), "nothing of that name"),
        (("20newsgroups",), "expected a base called"),
        (("tiny:gpt2", "causal"), 'Did you mean "causal-lm"'),
        (("tiny:gpt2", "sequence-classification"), "at least two labels"),
        (("all-minilm-l6-v2", "masked-lm"), "all weights that masked-lm needs"),
        (("all-minilm-l6-v2", "causal-lm"), "can do causal-lm"),
    ],
)
def test_what_cannot_be_loaded_says_what_to_do(arguments, message):
    with pytest.raises(ModelError, match=message):
        load_base(*arguments)


def test_an_encoder_set_up_as_a_decoder_may_do_causal_lm(tmp_path):
    folder = save(tmp_path / "base", "tiny:bert", "masked-lm")
    with pytest.raises(ModelError, match="can do causal-lm"):
        load_base(str(folder))
    _config(is_decoder=True)(folder)
    assert load_base(str(folder)).task == "causal-lm"


# ---- the real one ----


def test_smollm2_finds_a_sentence_far_likelier_than_its_words_shuffled():
    base = load_base("smollm2-135m-instruct")
    assert fetch("smollm2-135m-instruct").is_dir() and base.family == "llama"
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
    sentence = "The Roman Empire ruled the Mediterranean world for centuries after the fall of the Republic."
    shuffled = " ".join(generator(0, "shuffle").permutation(sentence.split()))
    objective = make_objective("causal-lm", 64)
    encoded = objective.encode(pa.table({"text": [sentence, shuffled]}), base.tokenizer)
    perplexity = []
    for row in range(2):
        batch = objective.collate(encoded, [row], 0)
        with torch.no_grad():
            out = base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        said, meant = objective.align(out, batch["labels"])
        perplexity.append(torch.nn.functional.cross_entropy(said, meant).exp().item())
    assert perplexity[0] < 60 and perplexity[1] > 10 * perplexity[0]
