"""A silo's side of secure sums: its members of the sessions it was invited to, and what it refuses to help open.

A session's secrets live here, in memory, and nowhere else: a silo that was restarted begins a new session. What must
outlive it, so that no sum is opened twice for different survivors, is in the `journal`.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from .. import wire
from ..errors import SiloError
from ..secure.keys import Entropy, Identity
from ..secure.mail import unbundle
from ..secure.messages import Adverts, Agreement, Call, Delivery, Invitation, Openings, Survivors, pack, unpack
from ..secure.silo import Member

SESSIONS = 1000
"""A process joins so many sessions and no more: each draws who masks with whom anew, and a coordinator that could go on
drawing would find, one day, a victim among corrupt neighbours (with a chance of 2⁻⁴⁰ each time)."""


class Journal(Protocol):
    """What a silo remembers of the sums it gave to and helped to open; see `governance/openings.py`."""

    def gives(self, silo: str, purpose: str, words: str) -> None: ...
    def opens(self, silo: str, purpose: str, words: str, survivors: Sequence[str]) -> None: ...


class Membership:
    """Answers the steps of a secure sum for the silos whose `identities` this process holds; it is their `Masks`.

    `agreement`: what the silo knows by itself; a session under any other is refused.
    """

    def __init__(
        self,
        agreement: Agreement,
        identities: Mapping[str, Identity],
        journal: Journal | None = None,
        entropy: Entropy = secrets.token_bytes,
    ) -> None:
        self.agreement, self.identities, self.journal, self.entropy = agreement, identities, journal, entropy
        self._members: dict[str, Member] = {}
        self._sessions: Counter[str] = Counter()
        self._mail: dict[str, bytes] = {}
        self._delivered: dict[str, tuple[str, str]] = {}
        self._given: dict[tuple[str, str], tuple[str, str]] = {}

    def answer(self, kind: str, silo: str, mail: bytes) -> bytes:
        """What the silo answers to "join", "open", "deposit" or "unmask"."""
        if kind == "join":
            self._sessions[silo] += 1
            if self._sessions[silo] > SESSIONS:
                do = "Ask the coordinator why it begins so many; restarting this silo lets it join again."
                raise SiloError(f"at most {SESSIONS} sessions", "one more", do)
            member = Member(silo, self.identities[silo], self.agreement, self.entropy)
            self._members[silo], advert = member.join(unpack(Invitation, mail))
            return pack(advert)
        if kind == "open":
            self._members[silo], opening = self._member(silo).open(unpack(Adverts, mail).adverts)
            return pack(opening)
        if kind == "deposit":
            openings, call = unbundle(mail)
            known = unpack(Openings, openings).openings if openings else None
            self._members[silo], deposit = self._member(silo).deposit(known, unpack(Call, call))
            return pack(deposit)
        if kind == "unmask":
            return self._unmask(silo, unpack(Survivors, mail))
        raise SiloError(
            "a step of a secure sum (join, open, deposit, unmask)", f"{kind!r}", "Both sides must run one version."
        )

    def deliver(self, silo: str, mail: bytes, task: str) -> None:
        """Takes what the silo's neighbours dealt for the answer to this task. Asked again, it does nothing."""
        delivery, came = unpack(Delivery, mail), wire.digest(mail + task.encode())
        if self._delivered.get(silo) != (delivery.label, came):
            self._members[silo] = self._member(silo).deliver(delivery, task)
            self._delivered[silo] = delivery.label, came

    def gives(self, silo: str, purpose: str, words: str) -> None:
        """Says what the words of the last delivery will be: for which sum, and their digest before any mask."""
        if self.journal is not None:
            self.journal.gives(silo, purpose, words)
        label, _ = self._delivered[silo]
        self._given[silo, label] = purpose, words

    def add(self, silo: str, words: np.ndarray) -> None:
        self._members[silo], masked = self._member(silo).mask(words)
        self._mail[silo] = pack(masked)

    def mail(self, silo: str) -> bytes:
        """What goes along with the words that were masked last."""
        return self._mail.pop(silo)

    def _unmask(self, silo: str, survivors: Survivors) -> bytes:
        member, reveal = self._member(silo).reveal(survivors)
        purpose, words = self._given[silo, survivors.label]
        if self.journal is not None:  # before the shares leave
            self.journal.opens(silo, purpose, words, survivors.survivors)
        self._members[silo] = member
        return pack(reveal)

    def _member(self, silo: str) -> Member:
        if silo not in self._members:
            raise SiloError(
                "a silo that is in a session",
                "one that is in none, as after a restart",
                "The coordinator invites it to a new one.",
            )
        return self._members[silo]
