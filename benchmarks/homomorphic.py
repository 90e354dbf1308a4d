"""What encrypted sums cost: `python -m benchmarks.homomorphic`.

Integers under BFV, whole words and packed bytes, and real numbers under CKKS, beside TenSEAL's CKKS with the parameters
that are customary for federated averaging (8192; 60, 40, 40, 60: room for multiplications that no average needs) and
with additions only (8192; 60, 60). Encryption ends in bytes, addition and decryption begin with them, on all sides. The
best of several turns, taken in turn, in processor time of one thread.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from foedus.secure import bfv, ckks
from foedus.secure.backends import Adder, SecretKey

from .apart import installed
from .table import Row, faster, finish, more, share

COUNT, PEER_COUNT, PARTIES, TURNS = 10**6, 2**17, 100, 5
SPEED = 5.0  # million integers that are encrypted a second
STEPS = ("encrypt", "add", "decrypt")


@dataclass(frozen=True)
class Case:
    """One way to sum vectors of `count` numbers; what is encrypted is bytes, or a list of them."""

    count: int
    encrypt: Callable[[], Any]
    add: Callable[[Any], object]
    decrypt: Callable[[Any], object]


@dataclass(frozen=True)
class Figures:
    """`speed`: million numbers a second, by step; `size`: bytes of a number."""

    speed: Mapping[str, float]
    size: float


def integers(largest: int, count: int = COUNT) -> Case:
    """BFV: integers from 0 to `largest`."""
    sums = bfv.Sums(count, largest, PARTIES)
    key = SecretKey.fresh(sums.ring)
    values = np.random.default_rng(0).integers(0, largest, count, np.uint64, endpoint=True)
    adder = Adder(key.public, sums.slots, 10**6)
    return Case(count, lambda: bfv.encrypt(sums, key.public, values), adder.add,
                lambda blob: bfv.decrypt(sums, key, blob, 1))  # fmt: skip


def reals(count: int = COUNT) -> Case:
    """CKKS: numbers of at most 1."""
    what = ckks.Reals(count, 1.0, PARTIES)
    key = SecretKey.fresh(what.ring)
    adder = Adder(key.public, count, 10**6)
    return Case(count, lambda: ckks.encrypt(what, key.public, _numbers(count)), adder.add,
                lambda blob: ckks.decrypt(what, key, blob))  # fmt: skip


def tenseal(bits: Sequence[int], count: int = PEER_COUNT) -> Case:
    """TenSEAL's CKKS under a public key, one vector for every 4096 numbers."""
    import tenseal as ts

    context = ts.context(ts.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=list(bits), n_threads=1)
    context.global_scale = 2**40
    chunks = np.split(_numbers(count), range(4096, count, 4096))
    total = [ts.ckks_vector(context, chunk) for chunk in chunks]

    def read(blobs: Sequence[bytes]) -> list[Any]:
        return [ts.ckks_vector_from(context, blob) for blob in blobs]

    def add(blobs: Sequence[bytes]) -> None:
        for own, other in zip(total, read(blobs), strict=True):
            own += other

    return Case(count, lambda: [ts.ckks_vector(context, chunk).serialize() for chunk in chunks], add,
                lambda blobs: [vector.decrypt() for vector in read(blobs)])  # fmt: skip


def measure(cases: Mapping[str, Case], turns: int = TURNS) -> dict[str, Figures]:
    """The best of `turns` of every step of each case, all in turn."""
    seconds = {(name, step): math.inf for name in cases for step in STEPS}
    sizes = {}
    for _ in range(turns):
        for name, case in cases.items():
            blob, *times = _turn(case)
            sizes[name] = len(blob) if isinstance(blob, bytes) else sum(map(len, blob))
            for step, taken in zip(STEPS, times, strict=True):
                seconds[name, step] = min(seconds[name, step], taken)
    return {
        name: Figures({step: case.count / 1e6 / seconds[name, step] for step in STEPS}, sizes[name] / case.count)
        for name, case in cases.items()
    }


def rows(count: int = COUNT, peer_count: int = PEER_COUNT, turns: int = TURNS) -> list[Row]:
    """Speed and bytes of each way against the targets, fp32 and TenSEAL."""
    cases = {
        "BFV, 32-bit words": integers(2**32 // PARTIES, count),
        "BFV, packed bytes": integers(255, count),
        "CKKS": reals(count),
    }
    peers = {"customary": (60, 40, 40, 60), "additions only": (60, 60)} if installed("tenseal") else {}
    found = measure(cases | {name: tenseal(bits, peer_count) for name, bits in peers.items()}, turns)
    words, packed, real = (found[name] for name in cases)
    out = [
        more(
            "encrypted: BFV, 32-bit words, encrypted, against 5 M a second", words.speed["encrypt"], SPEED, "M/s", 1.0
        ),
        share("encrypted: BFV, 32-bit words, bytes, against fp32", words.size, 4.0, "B", 4.0),
        more(
            "encrypted: BFV, packed bytes, encrypted, against 5 M a second", packed.speed["encrypt"], SPEED, "M/s", 1.0
        ),
        share("encrypted: BFV, packed bytes, bytes, against fp32", packed.size, 4.0, "B", 1.5),
        share("encrypted: CKKS, bytes, against fp32", real.size, 4.0, "B", 8.1),
    ]
    for name in cases:
        for peer in ("customary", "additions only"):
            out += _beside(name, found[name], peer, found.get(peer))
    return out


def _beside(name: str, ours: Figures, peer: str, theirs: Figures | None) -> list[Row]:
    title = f"encrypted: {name}, against TenSEAL, {peer}"
    speeds = [more(f"{title}: {s}", ours.speed[s], theirs.speed[s] if theirs else None, "M/s") for s in STEPS]
    return [*speeds, faster(f"{title}: bytes", ours.size, theirs.size, "B")] if theirs else speeds


def _turn(case: Case) -> tuple[Any, float, float, float]:
    start = time.process_time()
    blob = case.encrypt()
    encrypted = time.process_time()
    case.add(blob)
    added = time.process_time()
    case.decrypt(blob)
    return blob, encrypted - start, added - encrypted, time.process_time() - added


def _numbers(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0.0, 0.01, count)


if __name__ == "__main__":
    finish("homomorphic", rows())
