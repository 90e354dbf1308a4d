"""Two messages in one mail: the openings that establish a session, and the first call to a sum."""

from __future__ import annotations

import numpy as np

from .. import wire
from ..errors import WireError

OPENINGS, CALL = ("openings",), ("call",)


def bundle(openings: bytes, call: bytes) -> bytes:
    """Both as bytes; `openings` is empty for who has seen them."""
    return wire.pack({OPENINGS: np.frombuffer(openings, np.uint8), CALL: np.frombuffer(call, np.uint8)}, {})


def unbundle(mail: bytes) -> tuple[bytes, bytes]:
    """The inverse of `bundle`."""
    tree, _ = wire.unpack(mail)
    if set(tree) != {OPENINGS, CALL}:
        raise WireError("openings and a call", "something else", "Both sides must run versions that speak alike.")
    return tree[OPENINGS].tobytes(), tree[CALL].tobytes()
