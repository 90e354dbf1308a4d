"""What both sides of a secure sum say alike beside its messages: what the sum is for, and two messages in one mail."""

from __future__ import annotations

import numpy as np

from .. import wire
from ..errors import WireError

OPENINGS, CALL = ("openings",), ("call",)


def purpose_of(kind: str, split: str, round: int) -> str:
    """What a sum is for, in words.

    >>> purpose_of("train", "", 3), purpose_of("evaluate", "test", 3)
    ('train 3', 'evaluate test 3')
    """
    return " ".join(filter(None, (kind, split, str(round))))


def bundle(openings: bytes, call: bytes) -> bytes:
    """Both as bytes; `openings` is empty for who has seen them."""
    return wire.pack({OPENINGS: np.frombuffer(openings, np.uint8), CALL: np.frombuffer(call, np.uint8)}, {})


def unbundle(mail: bytes) -> tuple[bytes, bytes]:
    """The inverse of `bundle`."""
    tree, _ = wire.unpack(mail)
    if set(tree) != {OPENINGS, CALL}:
        raise WireError("openings and a call", "something else", "Both sides must run versions that speak alike.")
    return tree[OPENINGS].tobytes(), tree[CALL].tobytes()
