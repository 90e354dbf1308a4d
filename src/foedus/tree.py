"""Arithmetic on trees of arrays. A tree maps a key to an array; the functions here never change their arguments."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

import numpy as np

K = TypeVar("K", bound=Hashable)
Arrays = Mapping[K, np.ndarray]


def norm(tree: Arrays[K]) -> float:
    """L2 norm over all entries together; NaN or infinity when an entry is."""
    return math.sqrt(sum(float(np.vdot(x, x)) for x in (np.asarray(a, np.float64) for a in tree.values())))


def scale(tree: Arrays[K], factor: float) -> dict[K, np.ndarray]:
    """Every entry times `factor`, in its own dtype."""
    return {key: x * np.asarray(factor, x.dtype) for key, x in tree.items()}


def minus(left: Arrays[K], right: Arrays[K]) -> dict[K, np.ndarray]:
    """`left` − `right`, entry by entry."""
    _same_keys(left, right)
    return {key: x - right[key] for key, x in left.items()}


def add(left: Arrays[K], right: Arrays[K]) -> dict[K, np.ndarray]:
    """`left` + `right`, entry by entry."""
    _same_keys(left, right)
    return {key: x + right[key] for key, x in left.items()}


def total(trees: Iterable[Arrays[K]]) -> dict[K, np.ndarray]:
    """The sum, accumulated in float64 (integers stay integers) and in the order given; {} of nothing."""
    out: dict[K, np.ndarray] = {}
    for tree in trees:
        if not out:
            out = {key: _wide(x) for key, x in tree.items()}
        else:
            _same_keys(out, tree)
            for key, x in tree.items():
                np.add(out[key], x, out=out[key])
    return out


def zeros(tree: Arrays[K]) -> dict[K, np.ndarray]:
    """Zeros of the same shapes and dtypes."""
    return {key: np.zeros_like(x) for key, x in tree.items()}


def finite(tree: Arrays[K]) -> bool:
    """Whether no entry is NaN or infinite."""
    return all(bool(np.isfinite(x).all()) for x in tree.values())


def size(tree: Arrays[K]) -> int:
    """How many numbers the tree holds."""
    return sum(x.size for x in tree.values())


def part(tree: Mapping[tuple[str, str], np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The entries of one part, keyed by parameter: `part(update, "delta")["layers.3.q_proj.lora_A"]`."""
    return {parameter: x for (part_name, parameter), x in tree.items() if part_name == name}


def as_part(name: str, arrays: Mapping[str, np.ndarray]) -> dict[tuple[str, str], np.ndarray]:
    """The inverse of `part`: every entry keyed by (name, parameter)."""
    return {(name, parameter): x for parameter, x in arrays.items()}


def _wide(x: np.ndarray) -> np.ndarray:
    return np.array(x, np.float64) if np.issubdtype(x.dtype, np.floating) else np.array(x)


def _same_keys(left: Arrays[K], right: Arrays[K]) -> None:
    if left.keys() != right.keys():
        odd = sorted(map(str, left.keys() ^ right.keys()))
        raise ValueError(f"Expected two trees with the same keys; {len(odd)} are in one only, such as {odd[0]}.")
