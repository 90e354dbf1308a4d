"""Encrypted sums: who holds a session's secret key, why the others take its public half, and what it opens with it.

    Invitation ─▶ Holder.drawn ─▶ offer ─▶ believed (every silo)      once a session
    the sum of the silos' vectors ─▶ Decrypt ─▶ check, open ─▶ tell ─▶ told (the coordinator)

The secret key is in the memory of the silo that drew it, for one session, and goes nowhere: who restarts draws another.
A silo encrypts under no key but one that a holder named by the treaty signed, together with the coordinator's own
invitation to what was agreed. `backends.trust` says what that does not stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import SiloError, WireError
from .backends import PublicKey, Ring, SecretKey, public_key
from .bfv import Opened, Sums, decrypt
from .keys import Identity, Secretive
from .messages import Agreement, Decrypt, Decrypted, Invitation, SumKey, genuine, name_of, sign


@dataclass(frozen=True, repr=False)
class Holder(Secretive):
    """A silo with the secret key of one session. `offer`: its public half, for everybody."""

    identity: Identity
    agreement: Agreement
    session: bytes
    key: SecretKey
    offer: SumKey

    @classmethod
    def drawn(cls, name: str, identity: Identity, agreement: Agreement, invitation: Invitation, ring: Ring) -> Holder:
        """Draws the key. Raises `SiloError` for an invitation to anything but what was agreed."""
        session = _session(invitation, agreement)
        key = SecretKey.fresh(ring)
        offer = sign(SumKey(invitation, name, key.public.pack()), identity)
        return cls(identity, agreement, session, key, offer)

    def check(self, request: Decrypt) -> None:
        """Raises `SiloError` unless the coordinator asks, in this key's session, for a sum of silos of the roster."""
        if request.session != self.session:
            raise _refused("a request in the session of this key", "one in another", "Begin a new session.")
        if not genuine(request, self.agreement.coordinator):
            raise _refused("a request that the coordinator signed", "a forged one", "Do not go on with its sender.")
        strangers = sorted(set(request.survivors) - self.agreement.roster.keys())
        if strangers:
            raise _refused("silos of the roster", ", ".join(strangers), "Compare the treaties.")

    def open(self, request: Decrypt, sums: Sums) -> Opened:
        """What a request asks for that `check` let pass, if it says that it is a sum over exactly the silos that are
        named, enough of them. Raises `SiloError` or `CohortError`; then nobody has been told anything.
        """
        opened = decrypt(sums, self.key, request.total, self.agreement.minimum)
        if opened.count != len(request.survivors):
            raise _refused(
                f"a sum over the {len(request.survivors)} silos that are named",
                f"one over {opened.count}",
                "It stays closed: add up each survivor's vector once.",
            )
        return opened

    def tell(self, request: Decrypt, opened: Opened) -> Decrypted:
        """The answer. Write down before that the sum was opened, and for whom."""
        words = opened.values.astype(_integers(self.agreement)).tobytes()
        return sign(Decrypted(name_of(request), self.offer.name, words), self.identity)


def believed(offer: SumKey, agreement: Agreement, holders: Sequence[str], ring: Ring) -> tuple[bytes, PublicKey]:
    """The session of an offer and its key, if one of the `holders` drew it for what was agreed, with parameters that
    follow from it. Raises `SiloError`.
    """
    if offer.invitation is None:
        raise _refused("a key for one session", "one for none", "Do not go on with whoever sent it.")
    session = _session(offer.invitation, agreement)
    if offer.name not in holders:
        raise _refused(f"the key of {' or '.join(holders)}", f"one of {offer.name}", "Compare the treaties.")
    if not genuine(offer, agreement.roster.get(offer.name, b"")):
        raise _refused(
            f"a key that {offer.name} signed for this session",
            "a forged one, or one for another session",
            "Do not go on with whoever sent it: it could read everything.",
        )
    try:
        return session, public_key(offer.key, ring)
    except WireError as error:
        raise SiloError(error.expected, error.came, error.do) from error


def told(answer: Decrypted, request: Decrypt, holder: str, agreement: Agreement, sums: Sums) -> np.ndarray:
    """The sum's integers, (length,), if the answer is the holder's to this request. Raises `WireError`."""
    asked = answer.request == name_of(request) and answer.name == holder
    if not asked or not genuine(answer, agreement.roster[holder]):
        raise WireError("the holder's answer to this request", "another", "Ask again, in a new session.")
    words = np.frombuffer(answer.words, np.uint8)
    if len(words) != sums.length * _integers(agreement).itemsize:
        raise WireError(f"{sums.length} words", f"{len(words)} bytes", "Both sides must run one treaty and version.")
    return words.view(_integers(agreement))


def _session(invitation: Invitation, agreement: Agreement) -> bytes:
    if invitation.agreement != agreement.digest or not genuine(invitation, agreement.coordinator):
        raise _refused("the coordinator's invitation to what was agreed", "another", "Compare the treaties.")
    return name_of(invitation)


def _integers(agreement: Agreement) -> np.dtype[np.unsignedinteger]:
    """Sums are below 2^word."""
    return np.dtype(f"<u{agreement.word // 8}")


def _refused(expected: str, came: str, do: str) -> SiloError:
    return SiloError(expected, came, do, where="encrypted sums")
