"""Hidden states of frozen blocks, computed once for each text and kept on disk.

Where only the last blocks of a model have an adapter, what the blocks before them make of a text never changes. `keep`
computes that once for each row, in a file that later runs of the same silo share, and lets the model begin there: its
embedding becomes the table of kept states, and a token of a row is shown to it as its place in that table.

    ids ──embedding──▶ blocks 0 … f − 1 ──▶ kept (bfloat16)          once
                                             kept ──▶ blocks f … n ──▶ head          every step

The table says as much as the text: it lies where the silo's data lie, and never leaves. For models of Llama's kind that
predict the next token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from random import SystemRandom
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..errors import ModelError
from .load import Base
from .objectives import Encoded, Objective, Ragged

CAPACITY = 1 << 23
"""Tokens in a table. The file is sparse: room that is not used takes none on the disk."""
FORMAT = 2
"""Of the files: another one is another folder. In the first, rotary frequencies were rounded to bfloat16."""
TOGETHER = 16
"""Rows of one length that go through the blocks at once, which takes half the time of one by one."""
LONE = 512
"""The first places of a table are for the states of so many single tokens, for trials that know no text."""
ENTRY = np.dtype([("key", "S16"), ("place", "<i8"), ("length", "<i8")])


@dataclass(frozen=True)
class KeptObjective(Objective):
    """An objective that shows kept states to the model; see `keep`. A row's are computed when it is first asked for."""

    states: States | None = None

    def encode(self, examples: pa.Table, tokenizer: PreTrainedTokenizerBase) -> Encoded:
        assert self.states is not None
        encoded = super().encode(examples, tokenizer)
        return replace(encoded, places=self.states.places(encoded.inputs))

    def ready(self, encoded: Encoded, rows: Sequence[int]) -> None:
        assert self.states is not None and encoded.places is not None
        self.states.fill({int(encoded.places[row][0]): encoded.inputs[row] for row in rows})

    def collate(self, encoded: Encoded, rows: Sequence[int], generator_seed: int) -> dict[str, Tensor]:
        self.ready(encoded, rows)
        return super().collate(encoded, rows, generator_seed)


class States:
    """The kept states of one base's first blocks, in files that all runs in `folder` share. `table`: (CAPACITY, width)
    bfloat16; an index from a row's tokens to its place in it; and for each place whether a row there is filled.
    """

    def __init__(self, folder: Path, prefix: nn.Module, width: int) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # as private as the text
        self.folder, self.prefix = folder, prefix
        self._company = dict[tuple[int, int], bool]()
        self.lone = min(LONE, prefix.get_input_embeddings().num_embeddings)
        states, filled = folder / "states.bf16", folder / "filled"
        with FileLock(str(folder / "lock")):
            for file, size in ((states, 2 * CAPACITY * width), (filled, CAPACITY)):
                if not file.exists():
                    with file.open("wb") as new:
                        new.truncate(size)
        whole = torch.from_file(str(states), shared=True, size=CAPACITY * width, dtype=torch.bfloat16)
        self.table = whole.view(CAPACITY, width)
        self.filled = np.memmap(filled, np.uint8, "r+", shape=(CAPACITY,))
        self.fill({token: np.array([token]) for token in range(self.lone)})

    def places(self, rows: Ragged) -> Ragged:
        """Where the states of each row's tokens are to stand; rows of the same tokens share a place."""
        keys = [_key(row) for row in rows]
        with FileLock(str(self.folder / "lock")):
            index = self._index()
            missing = {key: len(row) for key, row in zip(keys, rows, strict=True) if key not in index}
            index |= self._reserve(missing, max((place + size for place, size in index.values()), default=self.lone))
        starts = np.array([index[key][0] for key in keys], np.int64)
        lengths = np.diff(rows.bounds)
        places = np.repeat(starts - rows.bounds[:-1], lengths) + np.arange(len(rows.values))
        return Ragged(places.astype(np.int32), rows.bounds)

    def fill(self, rows: Mapping[int, np.ndarray]) -> None:
        """Computes what is not there yet. `rows`: place → tokens. Not even rounding depends on the company that a row
        is read in, so processes that do it at once share the work: each goes in an order of its own, and leaves out
        what another has done meanwhile.
        """
        missing = [place for place in rows if not self.filled[place]]
        SystemRandom().shuffle(missing)
        alike: dict[int, list[int]] = {}
        for place in missing:
            alike.setdefault(len(rows[place]), []).append(place)
        for length, todo in alike.items():
            places = np.array(todo)
            while len(places := places[self.filled[places] == 0]):
                now = places[: min(TOGETHER, 1 << len(places).bit_length() - 1)].tolist()
                for place, states in zip(now, self._states(np.stack([rows[place] for place in now])), strict=True):
                    self.table[place : place + length] = states
                    self.filled[place] = 1

    def _index(self) -> dict[bytes, tuple[int, int]]:
        """Key → (place, length). A last entry torn by a crash is not there."""
        file = self.folder / "index"
        blob = file.read_bytes() if file.exists() else b""
        entries = np.frombuffer(blob[: len(blob) // ENTRY.itemsize * ENTRY.itemsize], ENTRY)
        return {key.ljust(16, b"\0"): (int(place), int(length)) for key, place, length in entries.tolist()}

    def _reserve(self, missing: Mapping[bytes, int], used: int) -> dict[bytes, tuple[int, int]]:
        """Places for new rows, by key and length, after those that are used."""
        ends = used + np.cumsum([0, *missing.values()])
        if ends[-1] > CAPACITY:
            raise ModelError(
                f"at most {CAPACITY:,} tokens in one table of kept states",
                f"{ends[-1]:,}",
                f"Delete {self.folder}, or leave out [performance] keep_states.",
            )
        places = list(zip(ends[:-1].tolist(), missing.values(), strict=True))
        entries = [(key, *place) for key, place in zip(missing, places, strict=True)]
        with (self.folder / "index").open("ab") as file:
            file.truncate(file.tell() // ENTRY.itemsize * ENTRY.itemsize)
            file.write(np.array(entries, ENTRY).tobytes())
        return dict(zip(missing, places, strict=True))

    def _states(self, rows: np.ndarray) -> Tensor:
        """(rows, tokens, width): what the frozen blocks make of rows of one length. One by one where a row of such
        company was seen to come out otherwise than alone, be it in the last bit: how a processor adds is its own.
        """
        if rows.shape not in self._company:
            last = self._through(rows)[-1]
            self._company[rows.shape] = len(rows) == 1 or torch.equal(last, self._through(rows[-1:])[0])
        if self._company[rows.shape]:
            return self._through(rows)
        return torch.cat([self._through(row[None]) for row in rows])

    @torch.no_grad()
    def _through(self, rows: np.ndarray) -> Tensor:
        ids = torch.from_numpy(rows.astype(np.int64))
        return self.prefix(input_ids=ids, use_cache=False).last_hidden_state.to(torch.bfloat16)


def keep(base: Base, objective: Objective, folder: Path, last: int | None = None) -> Objective:
    """Cuts `base.model` before its first trained block, in place, and returns the objective that feeds what is left.

    Call it after `attach` and before anything is encoded. `folder`: where states are kept, beside the silo's data.
    `last`: of a model with no trained block, how many are left, at least one, so that it may share the states of one
    that trains as many. The names of parameters stay as they were. Raises `ModelError` for a base that is not of
    Llama's kind or whose first block is trained.
    """
    core: Any = base.model.get_base_model() if hasattr(base.model, "get_base_model") else base.model
    first = _first_trained(base, core, objective, last or 1)
    _check(base)
    model = core.model
    with torch.device("meta"):
        prefix = type(model)(_with_layers(model.config, first)).eval()
    prefix.norm, prefix.rotary_emb = nn.Identity(), model.rotary_emb
    wanted = {name: x.to(torch.bfloat16) for name, x in model.state_dict().items() if name in prefix.state_dict()}
    prefix.load_state_dict(wanted, assign=True)
    states = States(folder / f"{base.digest[:16]}-{first}-{FORMAT}", prefix, model.config.hidden_size)
    model.layers = _Tail(list(model.layers)[first:], first)
    model.embed_tokens = nn.Embedding.from_pretrained(states.table, freeze=True)
    model.embed_tokens.register_forward_hook(lambda module, ids, out: out.float())
    base.kept = states.lone
    return KeptObjective(**{f.name: getattr(objective, f.name) for f in fields(objective)}, states=states)


def _first_trained(base: Base, core: Any, objective: Objective, last: int) -> int:
    """The number of the first block with a trained parameter; nothing before it may be trained."""
    layers = getattr(getattr(core, "model", None), "layers", None)
    if objective.task != "causal-lm" or base.family not in ("llama", "qwen2") or layers is None:
        raise ModelError("a causal-lm of Llama's kind", f"{base.family}, {objective.task}", "Leave out keep_states.")
    trained = [i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())]
    first = min(trained, default=max(0, len(layers) - last))
    if not first or any(p.requires_grad for p in core.model.embed_tokens.parameters()):
        raise ModelError("blocks below the first trained one", "none", "Set [adapter] blocks to fewer than it has.")
    return first


def _check(base: Base) -> None:
    """Trials read the states of the end token and of the one beside it; tables lie in the machine's own memory."""
    end = base.tokenizer.eos_token_id or 0
    if end + 1 >= LONE:
        raise ModelError(f"a tokenizer whose end token is below {LONE - 1}", f"{end}", "Leave out keep_states.")
    device = next(base.model.parameters()).device.type
    if device != "cpu":
        raise ModelError("a model on the processor, for kept states", f"one on {device}", "Leave out keep_states.")


def _with_layers(config: Any, layers: int) -> Any:
    config = type(config).from_dict(config.to_dict())
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    config._attn_implementation = "sdpa"
    return config


class _Tail(nn.ModuleList):
    """The last layers of a list, under the names that they had there."""

    def __init__(self, layers: Sequence[nn.Module], first: int) -> None:
        nn.Module.__init__(self)
        for i, layer in enumerate(layers):
            self.add_module(str(first + i), layer)

    def __getitem__(self, at: Any) -> Any:
        return list(self._modules.values())[at]


def _key(row: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(row, "<i4").tobytes(), digest_size=16).digest()
