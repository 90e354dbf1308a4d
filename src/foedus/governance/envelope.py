"""What passes between a coordinator and a silo: one signed envelope around opaque bytes.

    b"FDE" version | kind | number | body bytes | sender | receiver | treaty | answers | body digest | signature | body

The head has a fixed length, so nothing in it is parsed and one message has one spelling. Numbers are little-endian;
sender and receiver are Ed25519 keys; treaty, answers and body digest are SHA-256, `answers` that of the head of the
envelope that is answered. The signature covers the head, and with it the body's length and digest. `unseal` looks at
the length before anything else, at the signature before it hashes the body, and gives every refusal its `Reason`.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Container
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ..errors import WireError
from ..secure.keys import SIZE, Identity, spell, verify

VERSION = 1
MAGIC = b"FDE" + bytes([VERSION])
NOTHING = bytes(SIZE)
"""In place of `answers`, in an envelope that answers none."""
_CONTEXT = "foedus envelope 1"
_HEAD = struct.Struct("<4sBQQ32s32s32s32s32s")
_SIGNATURE = 64
OVERHEAD = _HEAD.size + _SIGNATURE
"""Bytes of an envelope beside its body."""
ASK, ANSWER = 1, 2

CLOSED = b"FDX" + bytes([VERSION])
"""All that a sender hears who did not prove that it may ask: the same bytes, whatever was wrong."""


class Reason(StrEnum):
    """Why a message was refused. There are no others, and every ledger and metric uses these words."""

    OVERSIZED = "oversized"
    TRUNCATED = "truncated"
    MALFORMED = "malformed"
    STRANGER = "stranger"
    FORGED = "forged"
    MISDIRECTED = "misdirected"
    ALTERED = "altered"
    WRONG_TREATY = "wrong treaty"
    REPLAYED = "replayed"
    OUT_OF_ORDER = "out of order"
    UNSOLICITED = "unsolicited"
    UNSIGNED = "unsigned"
    NOT_AGREED = "not agreed"
    CHARTER = "charter"
    PAUSED = "paused"
    WITHDRAWN = "withdrawn"
    LEFT = "left"
    WRONG_MODEL = "wrong model"
    WRONG_SHAPE = "wrong shape"
    NON_FINITE = "non-finite"
    FALSE_RECEIPT = "false receipt"
    CLOSED = "closed"
    UNABLE = "unable"


_RESEND = "Send it again; if that does not help, both sides must run versions of foedus that speak the same format."
_STOP = "Do not go on with whoever sent it, and find out how it came to be sent."
_ADVICE = {
    Reason.OVERSIZED: "Ask for less at a time, or have the charter's [limits] max_bytes raised.",
    Reason.TRUNCATED: _RESEND,
    Reason.MALFORMED: _RESEND,
    Reason.STRANGER: "Sign with the key that the treaty names.",
    Reason.FORGED: _STOP,
    Reason.MISDIRECTED: _STOP,
    Reason.ALTERED: _RESEND,
    Reason.WRONG_TREATY: "Have the treaty signed by this silo first; a changed one is a new one.",
    Reason.REPLAYED: "Number every new message anew.",
    Reason.OUT_OF_ORDER: "Go on from the last round; what was done cannot be done otherwise.",
    Reason.UNSOLICITED: _STOP,
    Reason.UNSIGNED: "Collect the missing signatures; `foedus treaty verify` lists them.",
    Reason.NOT_AGREED: "Ask for what the treaty says, or propose another treaty.",
    Reason.CHARTER: "Propose a treaty within the charter, or ask the silo's operator to change it.",
    Reason.PAUSED: "Wait until the silo's operator resumes it.",
    Reason.WITHDRAWN: "Go on without this silo.",
    Reason.LEFT: "Go on without this silo.",
    Reason.WRONG_MODEL: "Load the same base model on both sides.",
    Reason.WRONG_SHAPE: "Both sides must build the same model from the same treaty.",
    Reason.NON_FINITE: "Lower the learning rate, or find out who sent numbers that are none.",
    Reason.FALSE_RECEIPT: _STOP,
    Reason.CLOSED: "Compare the keys of both sides with the treaty: `foedus treaty verify`.",
    Reason.UNABLE: "The log of the side that refused says where.",
}


class Refused(WireError):
    """A message that is not answered as it asks. `reason`: from the closed list."""

    def __init__(self, reason: Reason, expected: str, came: str, do: str = "") -> None:
        self.reason = reason
        super().__init__(expected, came, do or _ADVICE[reason], where=f"refused ({reason})")

    def __reduce__(self) -> tuple[Any, ...]:
        return Refused, (self.reason, self.expected, self.came, self.do)


@dataclass(frozen=True)
class Envelope:
    """An envelope that was opened. `name`: SHA-256 of its head, by which an answer refers to it; one name, one body."""

    kind: int
    number: int
    sender: bytes
    receiver: bytes
    treaty: bytes
    answers: bytes
    name: bytes
    body: memoryview


def seal(
    identity: Identity, receiver: bytes, treaty: bytes, number: int, body: bytes, *, answers: bytes = NOTHING
) -> bytes:
    """An ask; with `answers`, the answer to the envelope of that name. The same values always give the same bytes."""
    kind = ASK if answers == NOTHING else ANSWER
    content = hashlib.sha256(body).digest()
    head = _HEAD.pack(MAGIC, kind, number, len(body), identity.public, receiver, treaty, answers, content)
    return b"".join([head, identity.sign(spell(_CONTEXT, head)), body])


def unseal(blob: bytes, *, kind: int, senders: Container[bytes], receiver: bytes, most: int) -> Envelope:
    """The envelope in these bytes, if one of `senders` signed it for `receiver`. `most`: bytes of a body. Raises
    `Refused`, and costs no more than a signature for whoever cannot sign.
    """
    if len(blob) > most + OVERHEAD:
        raise Refused(Reason.OVERSIZED, f"at most {most:,} bytes", f"{len(blob) - OVERHEAD:,}")
    if not MAGIC.startswith(blob[: len(MAGIC)]):
        raise Refused(Reason.MALFORMED, f"an envelope of version {VERSION}", "bytes that begin otherwise")
    if len(blob) < OVERHEAD:
        raise Refused(Reason.TRUNCATED, f"{OVERHEAD} bytes of head and signature", f"{len(blob)}")
    _, said, number, size, sender, to, treaty, answers, content = _HEAD.unpack_from(blob)
    if size != len(blob) - OVERHEAD:
        raise Refused(Reason.TRUNCATED, f"a body of {size:,} bytes", f"one of {len(blob) - OVERHEAD:,}")
    if sender not in senders:
        raise Refused(Reason.STRANGER, "a sender that the treaty names", f"the key {sender.hex()[:16]}…")
    head = blob[: _HEAD.size]
    if not verify(sender, blob[_HEAD.size : OVERHEAD], spell(_CONTEXT, head)):
        raise Refused(Reason.FORGED, "the signature of its sender", "another")
    if said != kind or (answers == NOTHING) != (kind == ASK) or number < 1:
        raise Refused(Reason.MALFORMED, "an ask with a number" if kind == ASK else "an answer", "something else")
    if to != receiver:
        raise Refused(Reason.MISDIRECTED, "a message for this party", "one for another")
    body = memoryview(blob)[OVERHEAD:]
    if hashlib.sha256(body).digest() != content:
        raise Refused(Reason.ALTERED, "the body that was signed", "another")
    return Envelope(said, number, sender, to, treaty, answers, _name(head), body)


def name_of(blob: bytes) -> bytes:
    """By which name an answer refers to these sealed bytes, which are one's own."""
    return _name(blob[: _HEAD.size])


def number_of(blob: bytes) -> int:
    """The number of these sealed bytes, which are one's own."""
    return int(_HEAD.unpack_from(blob)[2])


def _name(head: bytes) -> bytes:
    return hashlib.sha256(head).digest()
