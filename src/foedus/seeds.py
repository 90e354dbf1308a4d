"""Named random generators: every draw says what it is for, so that draws never depend on one another's order.

`generator(seed, "sampling", 3)` is the same stream on every machine. Nothing here is fit for privacy noise, which comes
from the operating system.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit integer for (seed, names): SHA-256 of their unambiguous spelling."""
    spelling = repr((seed, *names)).encode()
    return int.from_bytes(hashlib.sha256(spelling).digest()[:8], "little") >> 1


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator (Philox) of its own for these names."""
    return np.random.Generator(np.random.Philox(derive(seed, *names)))
