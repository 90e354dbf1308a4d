"""Weights on disk: safetensors only, their digest, and GGUF files converted once.

A GGUF file takes 15 to 100 s to read and is read once: the result lies in the cache under the file's SHA-256 and
loads in a second or two. Read `load.py` first.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from filelock import FileLock
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..assets import cache_dir
from ..errors import AssetError, ModelError
from ..wire import canonical

CONVERTER = 1  # goes into the cache's name: raise it when conversion changes what it writes
VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "quantization_config", "architectures")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_HEADER = 100_000_000  # the safetensors format's own limit
Tensor = tuple[str, str, tuple[int, ...], Any]  # name, dtype, shape, and a buffer of its bytes
log = logging.getLogger("foedus")


def digest_of(config: Mapping[str, Any], tensors: Iterable[Tensor]) -> str:
    """SHA-256 over a configuration (without what differs between library versions) and tensors, in the order given."""
    sha = hashlib.sha256(canonical({key: value for key, value in config.items() if key not in VOLATILE}))
    for name, dtype, shape, content in tensors:
        sha.update(canonical([name, dtype, list(shape)]))
        sha.update(content)
    return sha.hexdigest()


def digest(folder: Path) -> str:
    """The digest of a model's folder: its configuration and its weights, however these are spread over files."""
    if folder.parent == converted():
        return (folder / "digest").read_text()
    return digest_of(json.loads((folder / "config.json").read_text()), _tensors(folder))


def convert(gguf: Path) -> Path:
    """The folder in the cache that holds this GGUF file as safetensors, with its tokenizer; made at the first call.

    The folder's name is the SHA-256 of the GGUF file and the converter's version. It appears whole or not at all: one
    process converts, others wait, and what a killed one left behind is swept away. A damaged folder is made anew.
    """
    with gguf.open("rb") as file:
        sha = hashlib.file_digest(file, "sha256").hexdigest()
    folder = converted() / f"{sha}-v{CONVERTER}"
    if _whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not _whole(folder):
                _make(gguf, sha, folder)
    except OSError as error:
        do = "Make room, mend the permissions, or set FOEDUS_CACHE to another folder."
        raise AssetError("a cache folder that can be written", str(error), do, where=gguf.name) from error
    return folder


def _make(gguf: Path, sha: str, folder: Path) -> None:
    log.info("converting %s, once", gguf.name)
    scratch = folder.with_suffix(".making")
    for old in (scratch, folder):
        shutil.rmtree(old, ignore_errors=True)
    scratch.mkdir()
    try:
        _convert(gguf, scratch)
        facts = {"gguf": sha, "converter": CONVERTER}  # config.json holds the same, spelt as this library version does
        (scratch / "digest").write_text(digest_of(facts, _tensors(scratch)))
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _whole(folder: Path) -> bool:
    """Whether the folder is there, and its weights are as long as their header says."""
    try:
        start, header = _header(folder / "model.safetensors")
        end = start + max(entry["data_offsets"][1] for entry in header.values())
        return (folder / "digest").is_file() and (folder / "model.safetensors").stat().st_size == end
    except (OSError, ValueError, KeyError):
        return False


def refuse_pickles(folder: Path, name: str) -> None:
    """Raise `ModelError` unless the folder holds its weights as safetensors. (A pickle can run code.)"""
    if _files(folder):
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


def converted() -> Path:
    """Where converted models are kept; the folder need not exist yet."""
    return cache_dir() / "converted"


def named(model: torch.nn.Module) -> Iterator[Tensor]:
    """The tensors of a model in memory, in the order of their names."""
    for name, x in sorted(model.state_dict().items()):
        array = np.ascontiguousarray(x.detach().cpu().numpy())
        yield name, str(array.dtype), array.shape, array.reshape(-1).view(np.uint8)


def short(error: Exception) -> str:
    """The first line of a library's message, without its full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".")[:200]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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


def _convert(gguf: Path, folder: Path) -> None:
    """Float32, because nothing shorter is exact: a Q4_1 weight is scale × level + minimum, with more bits than a half.

    The model as loaded refuses `save_pretrained` (its configuration says "quantized"), so a plain one is built from the
    same configuration and takes its weights. Tied weights are saved once, and tied again when loaded.
    """
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    try:
        with quiet():
            loaded = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
            tokenizer = _split_digits(AutoTokenizer.from_pretrained(**where), gguf)
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, ImportError) as error:
        do = "Use a whole GGUF file of an architecture that transformers reads, or the model in safetensors."
        raise ModelError("a GGUF file that transformers can read", f"{gguf.name}: {short(error)}", do) from error
    config = loaded.config
    del config.quantization_config
    with torch.device("meta"):
        plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.generation_config = loaded.generation_config
    try:
        with quiet():
            plain.save_pretrained(folder, max_shard_size="1000GB")
            tokenizer.save_pretrained(folder)
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(str(error)) from error


def _split_digits(tokenizer: PreTrainedTokenizerBase, gguf: Path) -> PreTrainedTokenizerBase:
    """SmolLM's vocabulary was learned with every digit apart: its GGUF says so ("smollm"), the library overlooks it."""
    from gguf import GGUFReader

    kind = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    if kind is not None and kind.contents() == "smollm":
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    return tokenizer


def _tensors(folder: Path) -> list[Tensor]:
    """All weights of a folder in the order of their names, however they are spread over files."""
    return sorted((x for file in _files(folder) for x in _stored(file)), key=lambda x: x[0])


def _stored(file: Path) -> Iterator[Tensor]:
    """The tensors of a safetensors file as they lie on disk (the library has no view of a bfloat16's bytes)."""
    content = np.memmap(file, np.uint8, "r")
    start, header = _header(file)
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        yield name, entry["dtype"], tuple(entry["shape"]), content[start + first : start + last]


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where a safetensors file's data starts, and what it says it holds."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(min(size, MAX_HEADER)))
    return 8 + size, {name: entry for name, entry in header.items() if name != "__metadata__"}


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / shard for shard in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else []
