"""What is trained on a frozen base: a low-rank adapter (LoRA, through PEFT), all of its parameters (Full), or none of
them (Frozen), beside heads (`heads.py`).

`attach` makes `base.model` trainable in place; `params_of` and `load_params` are the way in and out, as NumPy arrays by
name; `save_adapter` writes a folder that `peft.PeftModel.from_pretrained` reads. Read `objectives.py` next.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError, one_of
from ..seeds import generator
from ..wire import canonical
from .heads import WEIGHTS as HEAD_WEIGHTS
from .heads import is_head, load_heads, save_heads
from .load import Base
from .weights import quiet

RECORD = "foedus.json"  # beside the weights: which base they belong to, and what they are
LORA_WEIGHTS, FULL_WEIGHTS = "adapter_model.safetensors", "model.safetensors"
PEFT_TASKS = {
    "causal-lm": TaskType.CAUSAL_LM,
    "sequence-classification": TaskType.SEQ_CLS,
    "seq2seq": TaskType.SEQ_2_SEQ_LM,
}  # PEFT has no name for masked-lm: its plain PeftModel serves


@dataclass(frozen=True)
class LoRA:
    """ΔW = (alpha / rank) · B · A for every target (Hu et al. 2021). All sides must agree on these values.

    `targets`: "all-linear" (every linear layer of the blocks, not the output head), "attention" (the projections of the
    attention layers), or the names of modules, matched from the right as PEFT does. `embeddings`: the token embedding
    too; where the output head is tied to it, the head keeps the base's weights. `freeze_a`: only B is trained
    (FFA-LoRA, Sun et al. 2024, arXiv 2403.12313): half the numbers, and sums of updates are then exact in ΔW.
    `blocks`: ≥ 1, only so many of the last blocks are adapted; None for all.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    embeddings: bool = False
    freeze_a: bool = False
    blocks: int | None = None

    def __post_init__(self) -> None:
        _check(isinstance(self.rank, int) and 1 <= self.rank <= 1024, "a whole rank of 1…1024", f"rank={self.rank}")
        _check(0 < self.alpha < math.inf, "alpha > 0", f"alpha={self.alpha}")
        _check(0 <= self.dropout < 1, "0 ≤ dropout < 1", f"dropout={self.dropout}")
        if isinstance(self.targets, str):
            known = ("all-linear", "attention")
            _check(self.targets in known, "known targets", f'targets="{self.targets}"', one_of(self.targets, known))
        else:
            object.__setattr__(self, "targets", tuple(self.targets))
            _check(bool(self.targets), "at least one target", "targets=()")


@dataclass(frozen=True)
class Full:
    """Every parameter of the model is trained; tied weights count once."""


@dataclass(frozen=True)
class Frozen:
    """Nothing of the base is trained: only the heads that are put on it are."""


Adapter = LoRA | Full | Frozen


def attach(base: Base, adapter: Adapter, seed: int) -> None:
    """Make `base.model` trainable: a PeftModel for LoRA, the model itself for Full; Frozen leaves it as it is.

    A is drawn from `seed` and the parameter's name, so every silo and every machine starts from the same; B is zero,
    so the logits are the base's, bit for bit. A classifier's head is trained whole. Raises `ModelError` for unknown
    targets and for a base that has an adapter already.
    """
    _check(not _attached(base.model), "a base without an adapter", f"{base.name} with one", "Load the base again.")
    if not isinstance(adapter, LoRA):
        base.model.requires_grad_(isinstance(adapter, Full))
        return
    targets = target_modules(base, adapter)
    conv1d = any(isinstance(base.model.get_submodule(name), Conv1D) for name in targets)
    config = LoraConfig(
        task_type=PEFT_TASKS.get(base.task), r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout,
        target_modules=targets, modules_to_save=list(heads(base)) or None, fan_in_fan_out=conv1d,
    )  # fmt: skip
    with _peft_speaks():
        base.model = get_peft_model(base.model, config)
    _initialise(base.model, seed)
    if adapter.freeze_a:
        for name, x in base.model.named_parameters():
            x.requires_grad_(x.requires_grad and not (".lora_A." in name or ".lora_embedding_A" in name))
    base.model.eval()


def target_modules(base: Base, adapter: LoRA) -> list[str]:
    """The full names of the modules that `adapter` adapts, in the model's order."""
    linear = [name for name, module in base.model.named_modules() if _linear(module) and _in_block(name)]
    if adapter.targets == "all-linear":
        chosen = linear
    elif adapter.targets == "attention":
        chosen = [name for name in linear if "attn" in name.lower() or "attention" in name.lower()]
    else:
        chosen = _named_targets(base, adapter.targets)
    if adapter.blocks is not None:
        last = sorted({_block(name) for name in linear})[-adapter.blocks :]
        chosen = [name for name in chosen if not _in_block(name) or _block(name) in last]
    if not chosen:
        came = f"{base.name} ({base.family}) with none"
        raise ModelError(f"layers to adapt for targets={adapter.targets!r}", came, "Name the modules instead.")
    if adapter.embeddings:
        chosen += [name for name in _embeddings(base.model) if name not in chosen]
    return chosen


def heads(base: Base) -> tuple[str, ...]:
    """The modules that are trained whole beside LoRA: a classifier's head, and whatever the weights did not contain."""
    if base.task != "sequence-classification":
        return ()
    children = [name for name, child in base.model.named_children() if any(True for _ in child.parameters())]
    head = [name for name in children if name != base.model.base_model_prefix]
    inside = tuple(f"{name}." for name in head)
    return (*head, *(name for name in base.fresh if name not in head and not name.startswith(inside)))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name, in the model's order; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def params_of(model: nn.Module) -> dict[str, np.ndarray]:
    """Float32 copies of the trained parameters."""
    return {name: x.detach().cpu().float().numpy().copy() for name, x in trainable(model).items()}


@torch.no_grad()
def load_params(model: nn.Module, params: Mapping[str, np.ndarray]) -> None:
    """Copy `params` into the trained parameters. Names and shapes must be the model's own; else `ModelError`."""
    own = trainable(model)
    if own.keys() != params.keys():
        odd = sorted(own.keys() ^ params.keys())
        came = f"{len(params)} with {len(odd)} in one only, such as {odd[0]}"
        raise ModelError(f"the model's {len(own)} trained parameters", came, "Use the same base and the same adapter.")
    for name, parameter in own.items():
        if tuple(parameter.shape) != params[name].shape:
            came = f"{params[name].shape}"
            raise ModelError(f"{name} of shape {tuple(parameter.shape)}", came, "Use the same base and the same rank.")
        parameter.copy_(torch.as_tensor(params[name]))


def save_adapter(base: Base, adapter: Adapter, params: Mapping[str, np.ndarray], folder: Path, card: str) -> str:
    """Write `params` and the model card into `folder`; returns the SHA-256 of the weights file.

    LoRA: PEFT's format. Full: the whole model with its tokenizer. Heads: a file of their own beside it, and the only
    one for Frozen. The model itself is left as it was. What was written is read back through PEFT and compared,
    because a file that PEFT reads as something else would be noticed much later.
    """
    before = params_of(base.model)
    try:
        load_params(base.model, params)
        _write(base, adapter, folder)
        _read_back(base.model, params, folder)
    finally:
        load_params(base.model, before)
    sha = _sha256(folder / {LoRA: LORA_WEIGHTS, Full: FULL_WEIGHTS, Frozen: HEAD_WEIGHTS}[type(adapter)])
    heads = {"heads": _sha256(folder / HEAD_WEIGHTS)} if any(map(is_head, params)) else {}
    facts = {"name": base.name, "digest": base.digest, "family": base.family, "task": base.task}
    kind = {"kind": type(adapter).__name__.lower(), **asdict(adapter)}
    record = {"format": 1, "base": facts | {"labels": list(base.labels)}, "adapter": kind, "sha256": sha} | heads
    (folder / RECORD).write_bytes(canonical(record))
    (folder / "README.md").write_text(card, encoding="utf-8")
    return sha


def load_adapter(base: Base, folder: Path) -> None:
    """Put the adapter in `folder` and its heads on `base`, which has none yet, frozen and ready for use;
    `check_adapter` first."""
    check_adapter(base, folder)
    with _peft_speaks():
        base.model = PeftModel.from_pretrained(base.model, folder).eval()
    load_heads(base.model, folder)


def check_adapter(base: Base, folder: Path) -> None:
    """Raise `ModelError` unless the adapter in `folder` was made for exactly this base.

    Looks at the adapter's layers and their sizes, then at the family, the task, the labels and the base's digest
    that `save_adapter` recorded; an adapter made elsewhere has no such record, and is judged by layers and sizes.
    """
    _check(not _attached(base.model), "a base without an adapter", f"{base.name} with one", "Load the base again.")
    if not (folder / "adapter_config.json").is_file():
        came = f"{folder.name} without adapter_config.json"
        do = "Name the folder that `save_adapter` wrote; a fully trained model is loaded by `load_base`."
        raise ModelError("a folder with an adapter", came, do)
    record = _record(folder)
    for fact, own in (("family", base.family), ("task", base.task), ("labels", list(base.labels))):
        if record and record[fact] != own:
            raise _mismatch(base, f"the {fact} {record[fact]}", f"{base.name}, with the {fact} {own}", record)
    _check_layers(base, folder, record)
    if record and record["digest"] != base.digest:
        expected = f"the base {record['name']} with the digest {record['digest'][:12]}…"
        raise _mismatch(base, expected, f"{base.name} with {base.digest[:12]}…", record)


# ---- which modules ----


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _block(name: str) -> int:
    """The number of the block that a module is in."""
    return next(int(word) for word in name.split(".") if word.isdigit())


def _in_block(name: str) -> bool:
    """Blocks stand in numbered lists ("model.layers.3.mlp"); heads, poolers and projections of embeddings do not."""
    return any(word.isdecimal() for word in name.split("."))


def _named_targets(base: Base, names: tuple[str, ...]) -> list[str]:
    able = [n for n, module in base.model.named_modules() if _linear(module) or isinstance(module, nn.Embedding)]
    for name in names:
        if not any(full == name or full.endswith(f".{name}") for full in able):
            known = {full.rpartition(".")[2] for full in able}
            raise ModelError(f'layers called "{name}" in {base.name}', "none", one_of(name, known))
    return [full for full in able if any(full == name or full.endswith(f".{name}") for name in names)]


def _embeddings(model: nn.Module) -> list[str]:
    """Every token embedding that is looked up. An encoder-decoder shares its table between two such modules, and the
    third, under whose name it is registered, is never called.
    """
    owner = model.get_input_embeddings()
    tables = [
        (name, m) for name, m in model.named_modules() if isinstance(m, nn.Embedding) and m.weight is owner.weight
    ]
    return [name for name, module in tables if len(tables) == 1 or module is not owner]


@torch.no_grad()
def _initialise(model: nn.Module, seed: int) -> None:
    """A ~ U(−1/√n, 1/√n) over n inputs, as PEFT draws it for linear layers, and B = 0.

    An embedding's input is one-hot, so n = 1 there. (PEFT starts embeddings with A = 0 and B random; here every layer
    has the same half at zero, which is what algorithms that freeze or share A rely on.)
    """
    for name, parameter in trainable(model).items():
        if "lora_A" in name or "lora_embedding_A" in name:
            inputs = 1 if "lora_embedding_A" in name else parameter.shape[1]
            draw = generator(seed, "lora", name).uniform(-1.0, 1.0, tuple(parameter.shape)) / math.sqrt(inputs)
            parameter.copy_(torch.from_numpy(draw.astype(np.float32)))
        elif "lora_" in name:
            parameter.zero_()


def _attached(model: nn.Module) -> bool:
    return isinstance(model, PeftModel) or any(parameter.requires_grad for parameter in model.parameters())


@contextlib.contextmanager
def _peft_speaks() -> Iterator[None]:
    """Without two of PEFT's warnings that are not about us: on merging into tied weights, and on a name it uses."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        yield


# ---- writing and reading ----


def _write(base: Base, adapter: Adapter, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT would take an old card for one of its own
    save_heads(base.model, folder)
    if isinstance(adapter, Frozen):
        return
    if isinstance(adapter, Full):
        own = {name: x for name, x in base.model.state_dict().items() if not is_head(name)}
        with quiet():
            base.model.save_pretrained(folder, max_shard_size="1000GB", state_dict=own)
            base.tokenizer.save_pretrained(folder)
        return
    base.model.save_pretrained(folder, save_embedding_layers=False)  # "auto" would ask the hub about the base
    path = folder / "adapter_config.json"
    config = {key: sorted(x) if isinstance(x, list) else x for key, x in json.loads(path.read_text()).items()}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")  # PEFT writes sets in the order of the day


def _read_back(model: nn.Module, params: Mapping[str, np.ndarray], folder: Path) -> None:
    load_params(model, {name: np.full_like(x, np.nan) for name, x in params.items()})
    load_heads(model, folder)
    unexpected: list[str] = []
    if isinstance(model, PeftModel):
        unexpected = set_peft_model_state_dict(model, load_file(folder / LORA_WEIGHTS)).unexpected_keys
    elif (folder / FULL_WEIGHTS).is_file():
        unexpected = model.load_state_dict(load_file(folder / FULL_WEIGHTS), strict=False).unexpected_keys
    found = params_of(model)
    wrong = [name for name, x in params.items() if not np.array_equal(found[name], x, equal_nan=True)]
    if wrong or unexpected:
        came = f"{len(wrong)} different, such as {[*wrong, *unexpected][0]}"
        raise ModelError("a saved adapter that reads back as it was", came, "Report this: the file must not be used.")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _record(folder: Path) -> dict[str, Any]:
    """What `save_adapter` recorded about the base; {} for an adapter made elsewhere."""
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        base = json.loads(path.read_bytes())["base"]
        return {key: base[key] for key in ("name", "digest", "family", "task", "labels")}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"a readable {RECORD}", f"a damaged one in {folder.name}", "Save the adapter again."
        ) from error


def _check_layers(base: Base, folder: Path, record: Mapping[str, Any]) -> None:
    sizes = _sizes(base.model)
    for key, shape in _shapes(folder).items():
        name, _, half = key.removeprefix("base_model.model.").rpartition(".lora_")
        if (name or half) not in sizes:
            raise _mismatch(base, f"a base with {name or half}", f"{base.name} ({base.family}) without it", record)
        own = sizes[name or half]
        if not name:
            fits, meant = shape == own, f"{half} of shape {shape}"
        elif half.startswith(("A", "embedding_A")):
            fits, meant = shape[1] == own[1], f"{name} with {shape[1]} inputs"
        else:
            fits, meant = shape[0] == own[0], f"{name} with {shape[0]} outputs"
        if not fits:
            raise _mismatch(base, meant, f"{base.name} with {' × '.join(map(str, own))}", record)


def _sizes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """(outputs, inputs) of each layer that LoRA can adapt, and the shape of each parameter by its own name."""
    sizes: dict[str, tuple[int, ...]] = {name: tuple(x.shape) for name, x in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            sizes[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            sizes[name] = (module.weight.shape[1], module.weight.shape[0])
        elif isinstance(module, nn.Embedding):
            sizes[name] = (module.embedding_dim, module.num_embeddings)  # its input is one-hot
    return sizes


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(folder / LORA_WEIGHTS, "numpy") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        do = "Save the adapter again; pickled adapters are not read."
        raise ModelError(f"a whole {LORA_WEIGHTS}", f"{folder.name}: {error}", do) from error


def _mismatch(base: Base, expected: str, came: str, record: Mapping[str, Any]) -> ModelError:
    made_for = record.get("name", "the base that its adapter_config.json names")
    return ModelError(expected, came, f"Load {made_for}, or train an adapter for {base.name}.")


def _check(holds: bool, expected: str, came: str, do: str = "Correct it in [adapter].") -> None:
    if not holds:
        raise ModelError(expected, came, do)
