"""A base model, frozen: from the catalogue, a folder, a GGUF file, a Hugging Face id, or `tiny:<family>`.

Weights are read from safetensors only (a pickle can run code), never with remote code. A GGUF file is converted once: the
result lies in the cache under the file's SHA-256 and loads in a second or two afterwards. Read `adapters.py` next.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.configuration_utils import PretrainedConfig

from ..assets import CATALOG, cache_dir, fetch
from ..errors import ModelError, one_of
from ..seeds import generator
from ..wire import canonical
from .tiny import FAMILIES, fill, tiny_config, tiny_tokenizer

TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "features": "AutoModel",
}
CONVERTER = 1  # goes into the cache's name: raise it when conversion changes what it writes
VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "quantization_config", "architectures")
HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
Tensor = tuple[str, str, tuple[int, ...], Any]  # name, dtype, shape, and a buffer of its bytes
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
log = logging.getLogger("foedus")


@dataclass
class Base:
    """A frozen base model. `attach` (adapters.py) makes `model` a PeftModel in place.

    `model`: float32, eval mode, nothing requires a gradient. `name`: as the user gave it. `digest`: SHA-256 over
    configuration and weights, the same on every machine. `family`: the library's name of the architecture ("llama").
    `fresh`: modules that the weights did not contain, such as the head of a classifier; they must be trained.
    """

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    name: str
    digest: str
    task: str
    family: str
    labels: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()


def load_base(name_or_path: str, task: str = "causal-lm", *, labels: Sequence[str] = ()) -> Base:
    """The base called `name_or_path`, ready for `task`, frozen.

    `name_or_path`: a name of `foedus list models`; a folder in Hugging Face format; a .gguf file; a Hugging Face id;
    or `tiny:<family>`. `task`: causal-lm, masked-lm, sequence-classification (with at least two `labels`), seq2seq, or
    features (no head). Raises `ModelError` when it is not there, holds pickled weights only, or cannot do the task.
    """
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
    return _base(model, _tokenizer(folder, name_or_path), name_or_path, _digest(folder), task, labels, fresh)


def base_of(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, *, task: str = "causal-lm", name: str = ""
) -> Base:
    """A base from a model that the caller has loaded. It is taken over: made float32, put in eval mode, and frozen."""
    labels = tuple(model.config.id2label.values()) if task == "sequence-classification" else ()
    labels = _checked(task, labels)
    model = model.float()
    digest = digest_of(model.config.to_diff_dict(), _named(model))
    return _base(model, tokenizer, name or model.config.name_or_path or "a loaded model", digest, task, labels, ())


def digest_of(config: Mapping[str, Any], tensors: Iterable[Tensor]) -> str:
    """SHA-256 over a configuration (without what differs between library versions) and tensors, in the order given."""
    sha = hashlib.sha256(canonical({key: value for key, value in config.items() if key not in VOLATILE}))
    for name, dtype, shape, content in tensors:
        sha.update(canonical([name, dtype, list(shape)]))
        sha.update(content)
    return sha.hexdigest()


def convert(gguf: Path) -> Path:
    """The folder in the cache that holds this GGUF file as safetensors, with its tokenizer; made at the first call.

    The folder's name is the SHA-256 of the GGUF file and the converter's version. It appears whole or not at all.
    """
    with gguf.open("rb") as file:
        sha = hashlib.file_digest(file, "sha256").hexdigest()
    folder = _converted() / f"{sha}-v{CONVERTER}"
    if folder.is_dir():
        return folder
    log.info("converting %s, once", gguf.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
        _convert(gguf, scratch)
        facts = {"gguf": sha, "converter": CONVERTER}  # config.json holds the same, spelt as this library version does
        (scratch / "digest").write_text(digest_of(facts, _tensors(scratch)))
        _publish(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _publish(scratch: Path, folder: Path) -> None:
    try:
        scratch.rename(folder)
    except OSError:
        if not folder.is_dir():  # if it is, another process was first, and its folder is as good
            raise


def _convert(gguf: Path, folder: Path) -> None:
    """Float32, because nothing shorter is exact: a Q4_1 weight is scale × level + minimum, with more bits than a half.

    The model as loaded refuses `save_pretrained` (its configuration says "quantized"), so a plain one is built from the
    same configuration and takes its weights. Tied weights are saved once, and tied again when loaded.
    """
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    try:
        with _quiet():
            loaded = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
            tokenizer = _split_digits(AutoTokenizer.from_pretrained(**where), gguf)
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, ImportError) as error:
        do = "Use a whole GGUF file of an architecture that transformers reads, or the model in safetensors."
        raise ModelError("a GGUF file that transformers can read", f"{gguf.name}: {_short(error)}", do) from error
    config = loaded.config
    del config.quantization_config
    with torch.device("meta"):
        plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder, max_shard_size="1000GB")
    tokenizer.save_pretrained(folder)


def _split_digits(tokenizer: PreTrainedTokenizerBase, gguf: Path) -> PreTrainedTokenizerBase:
    """SmolLM's vocabulary was learned with every digit apart, which its GGUF says ("smollm") and the library overlooks."""
    from gguf import GGUFReader

    kind = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    if kind is not None and kind.contents() == "smollm":
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    return tokenizer


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
        _refuse_pickles(path, name)
        return path
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return convert(ggufs[0])
    if (path / "adapter_config.json").is_file():
        came = f"{name}, which holds an adapter"
        raise ModelError("a base model", came, "Name the base that its adapter_config.json names.")
    came = f"{name}, with {len(ggufs)} .gguf files and no config.json"
    raise ModelError("a folder with config.json and safetensors, or one .gguf file", came, "Check the path.")


def _refuse_pickles(folder: Path, name: str) -> None:
    if _weight_files(folder):
        return
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
    if pickled:
        raise ModelError(
            "weights in safetensors",
            f"{name}, whose weights are pickled ({', '.join(pickled[:3])}) and could run code",
            "Convert them on a machine you can lose: from_pretrained, then save_pretrained.",
        )
    raise ModelError(
        "weights in safetensors", f"{name}, without model.safetensors", "Check that the download is whole."
    )


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / shard for shard in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else []


def _hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        with _quiet():
            wanted = ["*.json", "*.safetensors", "*.txt", "*.model"]
            return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except (OSError, ValueError, RuntimeError, HfHubHTTPError, HFValidationError) as error:
        raise _unknown(name, f"nothing usable from the Hugging Face hub ({type(error).__name__})") from error


def _unknown(name: str, came: str) -> ModelError:
    tiny = [f"tiny:{family}" for family in FAMILIES]
    return ModelError(
        f'a base called "{name}"',
        came,
        f"{one_of(name, _models() + tiny)} A folder or a Hugging Face id works too; offline, the id must be in its cache.",
    )


# ---- from a folder to a model ----


def _config(folder: Path, name: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        do = "Models that need code of their own are not run: use one that transformers knows."
        raise ModelError("a configuration that transformers can read", f"{name}: {_short(error)}", do) from error


def _weights(folder: Path, name: str, task: str, config: PretrainedConfig) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """The model for `task`, and the names of the modules that its weights did not contain, filled from a generator."""
    _can_do(config, task, name)
    loader = getattr(transformers, TASKS[task])
    try:
        with _quiet():
            model, info = loader.from_pretrained(
                folder, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
                output_loading_info=True,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        do = "Check that the folder is whole, and that its weights belong to its config.json."
        raise ModelError(f"weights for {task}", f"{name}: {_short(error)}", do) from error
    missing = sorted(info["missing_keys"])
    if missing and task not in ("sequence-classification", "features"):
        came = f"{name}, without {len(missing)} of them, such as {missing[0]}"
        raise ModelError(f"all weights that {task} needs", came, f"It may be made for another task than {task}.")
    fresh = tuple(sorted({key.rpartition(".")[0] for key in missing}))
    _fill(model, fresh)
    return model, fresh


@torch.no_grad()
def _fill(model: torch.nn.Module, fresh: Sequence[str]) -> None:
    """Modules without weights get the same ones on every machine: N(0, 0.02²) for matrices, zero for biases."""
    for name in fresh:
        for key, parameter in model.get_submodule(name).named_parameters(recurse=False):
            draw = generator(0, "head", name, key).normal(0.0, 0.02, tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(draw) if parameter.ndim > 1 else torch.zeros_like(parameter))


def _tiny(name: str, task: str, labels: tuple[str, ...]) -> Base:
    config = _with_labels(tiny_config(name.removeprefix("tiny:")), labels)
    _can_do(config, task, name)
    with torch.random.fork_rng(devices=[]):  # the library draws weights of its own, which `fill` replaces
        model = getattr(transformers, TASKS[task]).from_config(config)
    fill(model, "tiny", name)
    digest = digest_of({"name": name, "labels": len(labels)}, _named(model))
    return _base(model, tiny_tokenizer(config.model_type), name, digest, task, labels, ())


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
    return Base(model, tokenizer, name, digest, task, model.config.model_type, labels, fresh)


def _room(model: torch.nn.Module) -> int:
    """How many tokens the model can take; learned positions of the RoBERTa kind begin after the padding index."""
    room = getattr(model.config, "max_position_embeddings", None) or 1 << 20
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            room = min(room, module.num_embeddings - module.padding_idx - 1)
    return int(room)


def _tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError("a tokenizer beside the weights", f"{name}: {_short(error)}", "Save it there too.") from error
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
    """An encoder has a causal-LM class too, but it would see the answer: it counts only if it is set up as a decoder."""
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


# ---- digests, and quiet ----


def _digest(folder: Path) -> str:
    cached = folder / "digest"
    if folder.parent == _converted() and cached.is_file():
        return cached.read_text()
    return digest_of(json.loads((folder / "config.json").read_text()), _tensors(folder))


def _tensors(folder: Path) -> list[Tensor]:
    """All weights of a folder in the order of their names, however they are spread over files."""
    return sorted((x for file in _weight_files(folder) for x in _stored(file)), key=lambda x: x[0])


def _stored(file: Path) -> Iterator[Tensor]:
    """The tensors of a safetensors file as they lie on disk (the library has no view of a bfloat16's bytes)."""
    content = np.memmap(file, np.uint8, "r")
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:start].tobytes())
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            yield name, entry["dtype"], tuple(entry["shape"]), content[start + first : start + last]


def _named(model: torch.nn.Module) -> Iterator[Tensor]:
    for name, x in sorted(model.state_dict().items()):
        array = np.ascontiguousarray(x.detach().cpu().numpy())
        yield name, str(array.dtype), array.shape, array.reshape(-1).view(np.uint8)


def _converted() -> Path:
    return cache_dir() / "converted"


def _short(error: Exception) -> str:
    """The first line of a library's message, without its full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".")[:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no advice from the libraries meanwhile; what they write to stderr is dropped.

    The GGUF reader draws its bar without asking any switch, hence the redirection.
    """
    from transformers.utils import logging as switches

    level, bars = switches.get_verbosity(), switches.is_progress_bar_enabled()
    switches.set_verbosity_error()
    switches.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        switches.set_verbosity(level)
        if bars:
            switches.enable_progress_bar()
