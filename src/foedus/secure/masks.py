"""Masks: a seed of 256 bits becomes a vector of uniform words, added to another at the speed of the cipher.

The generator is AES-128 in counter mode (FIPS 197, SP 800-38A) over zeros. Its key and its first counter block are the
two halves of `hkdf(seed, b"", "keystream")`; its bytes are read as little-endian words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from ..errors import GuaranteeError
from .keys import hkdf

Words = np.ndarray[Any, np.dtype[Any]]
"""A vector of uint16, uint32 or uint64: integers modulo 2¹⁶, 2³² or 2⁶⁴."""

CHUNK = 1 << 17  # bytes: keystream, zeros and words of a chunk stay in the cache of a core
BLOCK = 16
_ZEROS = memoryview(bytes(CHUNK))


def add(words: Words, seeds: Sequence[bytes], signs: Sequence[int]) -> None:
    """Adds to `words`, in place and modulo 2^bits, the keystream of each seed (sign +1), or subtracts it (sign −1).

    Guarantees: for a seed that an observer does not know, the result says nothing about `words`, which is uniform over
    all of them; +1 and −1 of one seed cancel exactly, whatever the length. Never use a seed for two vectors.
    A GuaranteeError for anything but a contiguous vector of unsigned words, seeds of 32 bytes, and signs of ±1.
    """
    _check(words, seeds, signs)
    streams = [(_stream(seed), np.add if sign > 0 else np.subtract) for seed, sign in zip(seeds, signs, strict=True)]
    buffer = bytearray(min(CHUNK, words.nbytes) + BLOCK)  # the cipher asks for room for one block more
    mask = np.frombuffer(buffer, words.dtype.newbyteorder("<"))[: CHUNK // words.itemsize]
    for start in range(0, words.size, mask.size):
        chunk = words[start : start + mask.size]
        zeros, part = _ZEROS[: chunk.nbytes], mask[: chunk.size]
        for stream, combine in streams:
            stream.update_into(zeros, buffer)
            combine(chunk, part, out=chunk)


def keystream(seed: bytes, count: int, dtype: Any) -> Words:
    """The first `count` words of a seed: what `add` would add to zeros."""
    words = np.zeros(count, dtype)
    add(words, [seed], [1])
    return words


def _stream(seed: bytes) -> CipherContext:
    derived = hkdf(seed, b"", "keystream")
    return Cipher(AES(derived[:BLOCK]), CTR(derived[BLOCK:])).encryptor()


def _check(words: Words, seeds: Sequence[bytes], signs: Sequence[int]) -> None:
    if words.dtype not in (np.uint16, np.uint32, np.uint64) or words.ndim != 1 or not words.flags.c_contiguous:
        came = f"{words.dtype} of shape {words.shape}"
        raise _refused("a contiguous vector of uint16, uint32 or uint64", came, "Lay the numbers out as words first.")
    if sizes := {len(seed) for seed in seeds} - {32}:
        raise _refused("seeds of 32 bytes", f"some of {sorted(sizes)}", "Derive them with keys.hkdf.")
    if len(signs) != len(seeds) or not set(signs) <= {1, -1}:
        came = f"{len(signs)} signs for {len(seeds)} seeds, of the values {sorted(set(signs))}"
        raise _refused("one sign, +1 or -1, for each seed", came, "Add for one side of a pair, subtract for the other.")


def _refused(expected: str, came: str, do: str) -> GuaranteeError:
    return GuaranteeError(expected, came, do, where="masks")
