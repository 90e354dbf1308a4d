"""A base model, frozen: from the catalogue, a folder, a GGUF file, a Hugging Face id, or `tiny:<family>`.

Weights are read from safetensors only, and never with remote code. Read `adapters.py` next; `weights.py` is what lies
on disk.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.configuration_utils import PretrainedConfig

from ..assets import CATALOG, fetch
from ..errors import ModelError, one_of
from ..seeds import generator
from .cut import cut
from .tiny import FAMILIES, fill, tiny_config, tiny_tokenizer
from .weights import convert, digest, digest_of, named, quiet, refuse_pickles, short

TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "features": "AutoModel",
}
HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


@dataclass
class Base:
    """A frozen base model. `attach` (adapters.py) makes `model` a PeftModel in place.

    `model`: float32, eval mode, nothing requires a gradient. `name`: as the user gave it. `digest`: SHA-256 over
    configuration and weights, the same on every machine. `family`: the library's name of the architecture ("llama").
    `fresh`: modules that the weights did not contain, such as the head of a classifier; they must be trained. `size`:
    how many parameters it has, without any adapter. `kept`: where the model begins at kept states (`kept.py`), how many
    ids it knows; all others are places. 0 elsewhere.
    """

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    name: str
    digest: str
    task: str
    family: str
    labels: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    size: int = 0
    kept: int = 0


def load_base(
    name_or_path: str, task: str = "causal-lm", *, labels: Sequence[str] = (), layers: int | None = None
) -> Base:
    """The base called `name_or_path`, ready for `task`, frozen.

    `name_or_path`: a name of `foedus list models`; a folder in Hugging Face format; a .gguf file; a Hugging Face id;
    or `tiny:<family>`. `task`: causal-lm, masked-lm, sequence-classification (with at least two `labels`), seq2seq, or
    features (no head). `layers`: only so many of its blocks (`cut.py`); "name@8" says the same, and is what a cut is
    called. Raises `ModelError` when it is not there, holds pickled weights only, or cannot do the task.
    """
    whole, cut_to = _of_a_cut(name_or_path)
    if (layers or cut_to) is not None:
        return _cut(load_base(whole, task, labels=labels), layers or cut_to or 0)
    labels = _checked(task, labels)
    if name_or_path.startswith("tiny:"):
        return _tiny(name_or_path, task, labels)
    folder = _folder(name_or_path)
    config = _config(folder, name_or_path)
    known = _trained_labels(config)
    model, fresh = _weights(folder, name_or_path, task, _with_labels(config, labels))
    if labels and not fresh and known not in ((), labels):
        raise ModelError(
            f"a base whose classifier knows the labels {', '.join(labels)}, in this order",
            f"{name_or_path}, which was trained on {', '.join(known)}",
            "Use these labels, or a base without a trained classifier.",
        )
    return _base(model, _tokenizer(folder, name_or_path), name_or_path, digest(folder), task, labels, fresh)


def base_of(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, *, task: str = "causal-lm", name: str = ""
) -> Base:
    """A base from a model that the caller has loaded. It is taken over: made float32, put in eval mode, and frozen."""
    labels = tuple(model.config.id2label.values()) if task == "sequence-classification" else ()
    labels = _checked(task, labels)
    model = model.float()
    name = name or model.config.name_or_path or "a loaded model"
    return _base(model, tokenizer, name, digest_of(model.config.to_diff_dict(), named(model)), task, labels, ())


def _of_a_cut(name: str) -> tuple[str, int | None]:
    """The whole base that a name speaks of, and how many of its blocks; a folder may be called anything."""
    found = re.fullmatch(r"(.+)@(\d{1,4})", name)
    return (found[1], int(found[2])) if found and not Path(name).expanduser().exists() else (name, None)


def _cut(base: Base, layers: int) -> Base:
    new = cut(base.model, base.tokenizer, base.digest, layers, tiny=base.name.startswith("tiny:"))
    name = f"{base.name}@{layers}"
    base.model.name_or_path = base.model.config._name_or_path = name
    return replace(base, name=name, digest=new)


# ---- where a name leads ----


def _folder(name: str) -> Path:
    if name in _models():
        return _prepared(fetch(name), name)
    path = Path(name).expanduser()
    if path.exists():
        return _prepared(path, name)
    if HUB_ID.fullmatch(name):
        return _prepared(_hub(name), name)
    raise _unknown(name, "nothing of that name")


def _models() -> list[str]:
    return [name for name, asset in CATALOG.items() if asset.kind == "model"]


def _prepared(path: Path, name: str) -> Path:
    """The folder with config.json and safetensors for what lies at `path`."""
    if path.suffix == ".gguf":
        return convert(path)
    if (path / "config.json").is_file():
        refuse_pickles(path, name)
        return path
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return convert(ggufs[0])
    if (path / "adapter_config.json").is_file():
        came = f"{name}, which holds an adapter"
        raise ModelError("a base model", came, "Name the base that its adapter_config.json names.")
    came = f"{name}, with {len(ggufs)} .gguf files and no config.json"
    raise ModelError("a folder with config.json and safetensors, or one .gguf file", came, "Check the path.")


def _hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        with quiet():
            wanted = ["*.json", "*.safetensors", "*.txt", "*.model"]
            return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except (OSError, ValueError, RuntimeError, HfHubHTTPError, HFValidationError) as error:
        raise _unknown(name, f"nothing usable from the Hugging Face hub ({type(error).__name__})") from error


def _unknown(name: str, came: str) -> ModelError:
    tiny = [f"tiny:{family}" for family in FAMILIES]
    return ModelError(
        f'a base called "{name}"',
        came,
        f"{one_of(name, _models() + tiny)} A folder or a Hugging Face id works too (offline: one in its cache).",
    )


# ---- from a folder to a model ----


def _config(folder: Path, name: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        do = "Models that need code of their own are not run: use one that transformers knows."
        raise ModelError("a configuration that transformers can read", f"{name}: {short(error)}", do) from error


def _weights(folder: Path, name: str, task: str, config: PretrainedConfig) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """The model for `task`, and the names of the modules that its weights did not contain, filled from a generator."""
    _can_do(config, task, name)
    loader = getattr(transformers, TASKS[task])
    try:
        with quiet(), torch.random.fork_rng(devices=[]):  # the library draws what is missing; `_fill` replaces it
            model, info = loader.from_pretrained(
                folder, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
                output_loading_info=True,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        do = "Check that the folder is whole, and that its weights belong to its config.json."
        raise ModelError(f"weights for {task}", f"{name}: {short(error)}", do) from error
    missing = sorted(info["missing_keys"])
    if missing and task not in ("sequence-classification", "features"):
        came = f"{name}, without {len(missing)} of them, such as {missing[0]}"
        raise ModelError(f"all weights that {task} needs", came, f"It may be made for another task than {task}.")
    _fill(model, missing)
    return model, tuple(sorted({key.rpartition(".")[0] for key in missing}))


@torch.no_grad()
def _fill(model: torch.nn.Module, missing: Sequence[str]) -> None:
    """Parameters that the weights lack, the same on every machine: matrices N(0, 0.02²), scales one, biases zero."""
    for name in missing:
        parameter = model.get_parameter(name)
        if parameter.ndim > 1:
            parameter.copy_(torch.from_numpy(generator(0, "fresh", name).normal(0.0, 0.02, tuple(parameter.shape))))
        else:
            parameter.fill_(float(name.endswith("weight")))


def _tiny(name: str, task: str, labels: tuple[str, ...]) -> Base:
    config = _with_labels(tiny_config(name.removeprefix("tiny:")), labels)
    _can_do(config, task, name)
    with torch.random.fork_rng(devices=[]):  # the library draws weights; `fill` replaces them
        model = getattr(transformers, TASKS[task]).from_config(config)
    fill(model, "tiny", name)
    sha = digest_of({"name": name, "labels": len(labels)}, named(model))
    return _base(model, tiny_tokenizer(config.model_type), name, sha, task, labels, ())


def _base(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, name: str, digest: str, task: str,
    labels: tuple[str, ...], fresh: tuple[str, ...],
) -> Base:  # fmt: skip
    """The last touches: a padding token, a length that the model can take, the user's name for it, and frozen."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    model.config.pad_token_id = tokenizer.pad_token_id  # classifiers of the decoder kind look for the last token by it
    tokenizer.model_max_length = min(tokenizer.model_max_length, _room(model))
    model.name_or_path = model.config._name_or_path = name  # what PEFT writes into adapter_config.json
    model.eval().requires_grad_(False)
    size = sum(p.numel() for p in model.parameters())
    return Base(model, tokenizer, name, digest, task, model.config.model_type, labels, fresh, size)


def _room(model: torch.nn.Module) -> int:
    """How many tokens the model can take; learned positions of the RoBERTa kind begin after the padding index."""
    room = getattr(model.config, "max_position_embeddings", None) or 1 << 20
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            room = min(room, module.num_embeddings - module.padding_idx - 1)
    return int(room)


def _tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError("a tokenizer beside the weights", f"{name}: {short(error)}", "Save it there too.") from error
    if not tokenizer.is_fast:
        came = f"{name}, whose tokenizer is {type(tokenizer).__name__}"
        raise ModelError(
            "a tokenizer that knows where its tokens stand in the text (tokenizer.json)", came, "Convert it."
        )
    return tokenizer


# ---- tasks and labels ----


def _checked(task: str, labels: Sequence[str]) -> tuple[str, ...]:
    if task not in TASKS:
        raise ModelError("a known task", f'task="{task}"', one_of(task, TASKS))
    labels = tuple(labels)
    if task != "sequence-classification":
        return ()
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise ModelError(
            "at least two labels, all different", f"labels={list(labels)}", "Name them in the order to use."
        )
    return labels


def _with_labels(config: PretrainedConfig, labels: tuple[str, ...]) -> PretrainedConfig:
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
        config.problem_type = "single_label_classification"
    return config


def _trained_labels(config: PretrainedConfig) -> tuple[str, ...]:
    """The labels that a configuration names, () when it has only the library's placeholders."""
    labels = tuple(str(label) for _, label in sorted(config.id2label.items()))
    return () if all(label.startswith("LABEL_") for label in labels) else labels


def _can_do(config: PretrainedConfig, task: str, name: str) -> None:
    possible = [other for other in TASKS if _possible(config, other)]
    if task not in possible:
        came = f"{name}, of the family {config.model_type}"
        raise ModelError(f"a model that can do {task}", came, f"It can do: {', '.join(possible)}.")


def _possible(config: PretrainedConfig, task: str) -> bool:
    """An encoder has a causal-LM class too, but would see the answer: it counts only if set up as a decoder."""
    from transformers.models.auto import modeling_auto as auto

    masked = config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_encoder_decoder
    if task == "causal-lm":
        known = config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not config.is_encoder_decoder
        return known and (not masked or config.is_decoder)
    if task == "masked-lm":
        return masked
    names = {
        "sequence-classification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "features": auto.MODEL_MAPPING_NAMES,
    }
    return config.model_type in names[task]
