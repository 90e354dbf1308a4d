"""What masks cost a silo: `python -m benchmarks.masks`.

A million and ten million parameters masked with 33 seeds (32 neighbours and one's own), in words of 16 and 32 bits. The
limit is the same number of words through the same two calls, the cipher's and the adder's, on one piece of 128 KiB that
never leaves the cache, with nothing around them. Beside it Flower's SecAgg+, which has words of 64 bits only. All take
turns in one process, in processor time of one core; each figure is the best of several.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from foedus.secure import masks

from .apart import installed
from .noise import seconds
from .table import Row, faster, finish, share

SIZES = {10**6: 7, 10**7: 3}  # parameters: repeats
WORDS = (np.uint16, np.uint32)
SEEDS = 33
LIMIT, TIMES = 1.5, 20  # of the cipher and the adder; faster than Flower


def best(repeats: int, *calls: Callable[[], object]) -> list[float]:
    """The least seconds of each, called in turn; the first turn is not counted."""
    times = [[seconds(call) for call in calls] for _ in range(repeats + 1)][1:]
    return [min(column) for column in zip(*times, strict=True)]


def rows(sizes: Mapping[int, int] = SIZES, seeds: int = SEEDS) -> list[Row]:
    """By size and word. `sizes`: parameters, and how often they are masked."""
    return [row for size, repeats in sizes.items() for row in mask_rows(size, seeds, repeats)]


def mask_rows(size: int, seeds: int, repeats: int) -> list[Row]:
    """Masking `size` parameters, against the limit and against Flower."""
    chosen = [secrets.token_bytes(32) for _ in range(seeds)]
    calls: list[Callable[[], object]] = []
    for word in WORDS:
        words = np.zeros(size, word)
        calls += [
            lambda word=word: limit(size * seeds, word),
            lambda words=words: masks.add(words, chosen, [1, -1] * (seeds // 2) + [1] * (seeds % 2)),
        ]
    peer = installed("flwr")
    if peer:
        from .peer_secagg import mask

        calls.append(lambda: mask(size, chosen))
    times = best(repeats, *calls)
    out = []
    for i, word in enumerate(WORDS):
        least, ours = times[2 * i : 2 * i + 2]
        name = f"masks: {size:,} parameters, {seeds} seeds, {8 * np.dtype(word).itemsize} bits"
        out += [
            share(f"{name}, against the cipher and the adder alone", ours, least, "s", LIMIT),
            faster(f"{name}, against Flower's SecAgg+", ours, times[-1] if peer else None, "s", TIMES),
        ]
    return out


def limit(count: int, word: type) -> None:
    """`count` words of AES-128-CTR, each added once, in a piece that stays in the cache."""
    stream, zeros = Cipher(AES(bytes(16)), CTR(bytes(16))).encryptor(), bytes(masks.CHUNK)
    buffer = bytearray(masks.CHUNK + masks.BLOCK)
    words = np.zeros(masks.CHUNK // np.dtype(word).itemsize, word)
    mask = np.frombuffer(buffer, word, words.size)
    for _ in range(round(count / words.size)):
        stream.update_into(zeros, buffer)
        np.add(words, mask, out=words)


if __name__ == "__main__":
    finish("masks", rows())
