"""What crosses the wire: canonical JSON, digests, and trees as safetensors with a small header.

A message is one safetensors blob. Its tensors are named "0", "1", …; its metadata holds, as canonical JSON, the
version of the format, the keys in that order, and the facts that travel with them. Nothing that executes can be inside.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from .errors import WireError
from .types import Task

VERSION = 1
Words = tuple[str, ...]
DTYPES = {
    "<f8": "F64", "<f4": "F32", "<f2": "F16", "<i8": "I64", "<i4": "I32", "<i2": "I16", "|i1": "I8",
    "<u8": "U64", "<u4": "U32", "<u2": "U16", "|u1": "U8", "|b1": "BOOL",
}  # fmt: skip
"""NumPy's names of the kinds of numbers that a message may hold, and safetensors'."""


def canonical(value: Any) -> bytes:
    """JSON with sorted keys, no spaces, no NaN: equal values give equal bytes.

    >>> canonical({"b": 1, "a": [True, None]})
    b'{"a":[true,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(blob: bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(blob).hexdigest()


def pack(tree: Mapping[Words, np.ndarray], facts: Mapping[str, Any]) -> bytes:
    """Arrays keyed by words, and facts, as bytes; the same content always gives the same bytes."""
    keys = sorted(tree)
    header = canonical({"version": VERSION, "keys": keys, "facts": dict(facts)}).decode()
    return _blob([np.asarray(tree[key], order="C") for key in keys], header)


def unpack(blob: bytes) -> tuple[dict[Any, np.ndarray], dict[str, Any]]:
    """The inverse of `pack`. Raises `WireError` for anything that `pack` could not have written."""
    header, tensors = _header(blob), _tensors(blob)
    keys = header["keys"]
    if {str(i) for i in range(len(keys))} != tensors.keys():
        raise _bad("one tensor for each key", f"{len(keys)} keys and {len(tensors)} tensors")
    return {tuple(key): tensors[str(i)] for i, key in enumerate(keys)}, header["facts"]


def pack_task(task: Task) -> bytes:
    """A task as bytes: parameters and shared state as tensors, the rest as facts."""
    tree: dict[Words, np.ndarray] = {("params", name): x for name, x in task.params.items()}
    tree |= {("extra", *key): x for key, x in task.extra.items()}
    facts = {"round": task.round, "model": task.model, "cohort": list(task.cohort), "seed": task.seed}
    return pack(tree, facts | {"settings": dict(task.settings)})


def unpack_task(blob: bytes) -> Task:
    """The inverse of `pack_task`."""
    tree, facts = unpack(blob)
    try:
        params = {key[1]: x for key, x in tree.items() if key[0] == "params"}
        extra = {key[1:]: x for key, x in tree.items() if key[0] == "extra"}
        return Task(
            int(facts["round"]), str(facts["model"]), params, tuple(facts["cohort"]), int(facts["seed"]),
            dict(facts["settings"]), extra,
        )  # fmt: skip
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise _bad("the facts of a task (round, model, cohort, seed, settings)", repr(error)) from error


def _blob(arrays: Sequence[np.ndarray], header: str) -> bytes:
    """A safetensors blob. Put together in one go: `safetensors.numpy.save` takes thirty times as long for megabytes."""
    entries: dict[str, Any] = {"__metadata__": {"foedus": header}}
    end = 0
    for i, x in enumerate(arrays):
        if x.dtype.str not in DTYPES:
            raise WireError(
                f"numbers of a kind among {', '.join(DTYPES)}", f"{x.dtype}", "Convert them before packing."
            )
        start, end = end, end + x.nbytes
        entries[str(i)] = {"dtype": DTYPES[x.dtype.str], "shape": x.shape, "data_offsets": (start, end)}
    head = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)  # the format wants arrays aligned
    return b"".join([len(head).to_bytes(8, "little"), head, *(x.reshape(-1).view(np.uint8).data for x in arrays)])


def _header(blob: bytes) -> dict[str, Any]:
    try:
        size = int.from_bytes(blob[:8], "little")
        header = json.loads(json.loads(blob[8 : 8 + size])["__metadata__"]["foedus"])
        keys, facts = header["keys"], header["facts"]
        well_formed = all(key and all(isinstance(word, str) for word in key) for key in keys)
        if header["version"] != VERSION:
            raise _bad(f"message format {VERSION}", f"format {header['version']!r}")
        if not well_formed or not isinstance(facts, dict):
            raise _bad("keys that are lists of words, and facts", "something else")
        return {"keys": keys, "facts": facts}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, MemoryError) as error:
        raise _bad("a safetensors message with a foedus header", f"{len(blob)} bytes without one") from error


def _tensors(blob: bytes) -> dict[str, np.ndarray]:
    try:
        return load(blob)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _bad("a whole safetensors blob", f"{len(blob)} bytes that are not ({error})") from error


def _bad(expected: str, came: str) -> WireError:
    return WireError(expected, came, "The sender and this side must run versions of foedus that speak the same format.")
