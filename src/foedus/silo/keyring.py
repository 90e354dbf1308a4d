"""A silo's side of encrypted sums: whose key it encrypts under, and, where it holds one, which sums it opens.

Secret keys live here, in memory, and nowhere else: a silo that was restarted draws a new one for a new session. What
must outlive it, so that no sum is given to or opened twice with a difference, is in the `journal`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .. import wire
from ..errors import SiloError, WireError
from ..secure.backends import PublicKey
from ..secure.holder import Holder, believed
from ..secure.keys import Identity
from ..secure.messages import Agreement, Decrypt, Invitation, SumKey, name_of, pack, unpack
from ..stages.encrypt import Encrypted
from .membership import Journal


class Keyring:
    """Answers the steps of encrypted sums for the silos whose `identities` this process holds; it is their `Keys`.

    `agreement`: what the silo knows by itself. `holders`: who may draw a session's key. `sums`: what is encrypted, by
    the purpose of the sum. A holder opens these and nothing else: each for one set of silos, with one result, and for
    one request a session, since how often somebody else's ciphertext is refused can tell of the key.
    """

    def __init__(
        self,
        agreement: Agreement,
        identities: Mapping[str, Identity],
        holders: Sequence[str],
        sums: Mapping[str, Encrypted],
        journal: Journal | None = None,
    ) -> None:
        (self.ring,) = {what.sums.ring for what in sums.values()}
        self.agreement, self.identities, self.holders, self.sums = agreement, identities, tuple(holders), sums
        self.journal = journal
        self._drawn: dict[str, Holder] = {}
        self._requests: dict[tuple[str, str], bytes] = {}
        self._keys: dict[str, PublicKey] = {}
        self._sessions: dict[str, list[bytes]] = {}
        self._noted: dict[tuple[str, str], tuple[str, tuple[str, ...]]] = {}
        self._last: tuple[bytes, bytes, PublicKey] | None = None

    def answer(self, kind: str, silo: str, mail: bytes) -> bytes:
        """What the silo answers to "keys" or "decrypt"."""
        if kind == "keys":
            return self._draw(silo, unpack(Invitation, mail))
        if kind == "decrypt":
            return self._open(silo, unpack(Decrypt, mail))
        raise SiloError(
            "a step of an encrypted sum (keys, decrypt)", f"{kind!r}", "Both sides must run one treaty and version."
        )

    def deliver(self, silo: str, mail: bytes, task: str) -> None:
        """Takes the key for the answer to this task, if it may be believed, and no session's that the silo has left."""
        session, key = self._believed(mail)
        known = self._sessions.setdefault(silo, [])
        if session in known[:-1]:
            raise SiloError(
                "the key of this session", "one of a session that is over", "Do not go on with whoever sent it."
            )
        if session not in known:
            known.append(session)
        self._keys[silo] = key

    def gives(self, silo: str, purpose: str, words: str) -> None:
        """Says for which sum the words are, and their digest before encryption; refuses to give anything else to it,
        since whether it was opened the silo cannot know.
        """
        self._note(silo, purpose, words)

    def key(self, silo: str) -> PublicKey:
        if silo not in self._keys:
            raise SiloError("a key to encrypt under", "none", "Nothing leaves in the clear: send the session's key.")
        return self._keys[silo]

    def mail(self, silo: str) -> bytes:
        """What goes along with ciphertexts: nothing."""
        return b""

    def _draw(self, silo: str, invitation: Invitation) -> bytes:
        if silo not in self.holders:
            raise SiloError(f"one of {', '.join(self.holders)} to draw the key", silo, "Compare the treaties.")
        self._drawn[silo] = Holder.drawn(silo, self.identities[silo], self.agreement, invitation, self.ring)
        self._requests = {key: asked for key, asked in self._requests.items() if key[0] != silo}
        return pack(self._drawn[silo].offer)

    def _open(self, silo: str, request: Decrypt) -> bytes:
        if silo not in self._drawn:
            raise SiloError(
                "a silo with the key of a session",
                "one that has none, as after a restart",
                "The coordinator begins a new session.",
            )
        holder = self._drawn[silo]
        holder.check(request)
        if request.purpose not in self.sums:
            raise SiloError("a sum that the treaty speaks of", f"{request.purpose!r}", "It stays closed.")
        if self._requests.setdefault((silo, request.purpose), name_of(request)) != name_of(request):
            raise SiloError(
                f"one request to open {request.purpose!r} in a session", "another", "Begin a new session for the sum."
            )
        opened = holder.open(request, self.sums[request.purpose].sums)
        values = wire.digest(np.ascontiguousarray(opened.values).tobytes())
        self._note(silo, f"decrypt {request.purpose}", values, request.survivors)
        return pack(holder.tell(request, opened))

    def _note(self, silo: str, purpose: str, words: str, survivors: tuple[str, ...] = ()) -> None:
        """Notes, durably and before it leaves, what the silo gives or tells; refuses another for the same purpose."""
        if self.journal is not None:
            self.journal.opens(silo, purpose, words, survivors)
        if self._noted.setdefault((silo, purpose), (words, survivors)) != (words, survivors):
            raise SiloError(f"one answer to {purpose!r}", "a request for another", "Two of them would say too much.")

    def _believed(self, mail: bytes) -> tuple[bytes, PublicKey]:
        """Session and key of an offer; the last is remembered, as all silos of a process get the same."""
        if self._last is None or self._last[0] != mail:
            try:
                offer = unpack(SumKey, mail)
            except WireError as error:
                raise SiloError(error.expected, error.came, error.do) from error
            self._last = mail, *believed(offer, self.agreement, self.holders, self.ring)
        return self._last[1:]
