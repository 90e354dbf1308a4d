"""Encrypted sums over an engine, the coordinator's side: it adds ciphertexts that it cannot read, and a silo that holds
the key opens the sum.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from .. import wire
from ..engines.base import Engine
from ..errors import CohortError
from ..secure.backends import Adder, PublicKey
from ..secure.holder import believed, told
from ..secure.keys import SIZE, Identity
from ..secure.mail import purpose_of
from ..secure.messages import Agreement, Decrypt, Decrypted, Invitation, SumKey, pack, sign
from ..stages.encrypt import ENCRYPTED, Encrypted
from ..types import Report, Task, Total
from .base import Gathered, signer
from .once import Openings, decide, enough, opened_before
from .post import Post, must


class _Closed(CohortError):
    """The holder of the key did not open the sum."""


@dataclass(frozen=True)
class _Session:
    """A key that a silo has drawn, and its `offer` of it, for everybody."""

    session: bytes
    key: PublicKey
    offer: SumKey


@dataclass
class EncryptedSums:
    """The coordinator sees the sum over the silos that came, and nothing else, as long as it adds up what it says.

    A session goes on from sum to sum under one key, which the first of the `holders` that answers has drawn. It goes
    out with every task, so that silos need to remember nothing. If its holder is gone at the end of a sum, all begin a
    new session, once: that silo after its restart, or the next holder, draws another key, and the silos give the same
    words again. `what` is encrypted, for each kind of ask. `coordinator`: its identity; a silo's own process has only
    its public key, and gathers nothing. In memory are the sum and the vector that comes in.
    """

    agreement: Agreement
    coordinator: Identity | bytes = field(repr=False)
    holders: tuple[str, ...]
    what: Mapping[str, Encrypted] = field(repr=False)
    openings: Openings | None = None
    blind: ClassVar[bool] = True
    _session: _Session | None = field(default=None, init=False, repr=False)

    def gather(self, engine: Engine, kind: str, task: Task, *, split: str = "") -> Gathered:
        if not task.cohort:
            return Total({}, math.inf, 0), ()
        post = Post(engine, task)
        with post.explaining():
            try:
                words, survivors = self._sum(post, kind, split)
            except _Closed:
                words, survivors = self._sum(post, kind, split)
        return Total({ENCRYPTED: words}, math.inf, len(survivors)), post.receipts(survivors)

    def _sum(self, post: Post, kind: str, split: str) -> tuple[np.ndarray, list[str]]:
        purpose, what = purpose_of(kind, split, post.task.round), self.what[kind]
        session = self._joined(post)
        adder = what.adder(session.key)
        mails = dict.fromkeys(post.task.cohort, pack(session.offer))
        survivors = sorted(_added(post.ask(kind, mails, split), post, adder, opened_before(self.openings, purpose)))
        enough(self.agreement.minimum, len(survivors))
        decide(self.openings, purpose, survivors)
        request = Decrypt(session.session, purpose, tuple(survivors), adder.total())
        return self._opened(post, session.offer.name, sign(request, signer(self.coordinator)), what), survivors

    def _joined(self, post: Post) -> _Session:
        """The session that goes on; a new one when there is none."""
        self._session = self._session or next(self._sessions(post), None)
        if self._session is None:
            raise CohortError(
                f"a key for the sums from {' or '.join(self.holders)}",
                "none",
                "Bring a key holder back and resume: the silos give the same again.",
            )
        return self._session

    def _sessions(self, post: Post) -> Iterator[_Session]:
        """A new session with each of the holders that answers, one after another."""
        invitation = sign(Invitation(self.agreement.digest, secrets.token_bytes(SIZE)), signer(self.coordinator))
        ring = next(iter(self.what.values())).sums.ring
        for holder in self.holders:
            for offer in post.collect("keys", [holder], pack(invitation), SumKey):
                with post.blaming(holder):
                    must((offer.name, offer.invitation) == (holder, invitation), "a key for something else")
                    yield _Session(*believed(offer, self.agreement, [holder], ring), offer)

    def _opened(self, post: Post, holder: str, request: Decrypt, what: Encrypted) -> np.ndarray:
        for answer in post.collect("decrypt", [holder], pack(request), Decrypted):
            with post.blaming(holder):
                return told(answer, request, holder, self.agreement, what.sums)
        self._session = None
        raise _Closed(
            f"{holder}, which holds the key, to open the sum",
            "no sum",
            "Bring it back and resume: it or another holder draws a new key, and the silos give the same again.",
        )


def _added(reports: Iterable[Report], post: Post, adder: Adder, before: Sequence[str] | None) -> set[str]:
    """Who came, their vectors added up; only of those for whom the sum may have been opened `before`, if it may."""
    came: set[str] = set()
    for report in reports:
        if before is None or report.silo in before:
            with post.blaming(report.silo):
                must(report.silo not in came, None)
                adder.add(_vector(report))
                came.add(report.silo)
    return came


def _vector(report: Report) -> bytes:
    return wire.unpack(report.payload)[0][ENCRYPTED].tobytes()
