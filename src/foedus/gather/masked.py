"""Masked sums over an engine, the coordinator's side: sessions, deposits, vectors, openings. `secure/` says why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from .. import wire
from ..engines.base import Engine
from ..secure import messages
from ..secure.keys import Identity
from ..secure.mail import bundle, purpose_of
from ..secure.messages import Advert, Adverts, Agreement, Call, Deposit, Opening, Reveal, pack, unpack
from ..secure.parameters import SMALL
from ..secure.server import Round, Session
from ..stages.words import SUM
from ..types import Report, Task, Total
from .base import Gathered, signer
from .once import Openings, decide, enough, opened_before
from .post import Post, must


@dataclass
class Masked:
    """The coordinator sees the sum over each group of silos, and nothing else; the treaty may make one group of all.

    A session goes on from sum to sum, and keys for the next one ride along with the opening of the last: while the
    same silos answer, a sum takes two exchanges. Who was lost is asked, before the next sum, whether it is back; if so,
    all begin a new session. `coordinator`: its identity; a silo's own process has only its public key, and gathers
    nothing. `size`: of a silo's answer in words, for each kind of ask.
    """

    agreement: Agreement
    coordinator: Identity | bytes = field(repr=False)
    size: Mapping[str, int]
    openings: Openings | None = None
    blind: ClassVar[bool] = True
    _session: Session | None = field(default=None, init=False, repr=False)
    _established: set[str] = field(default_factory=set, init=False, repr=False)
    _lost: set[str] = field(default_factory=set, init=False, repr=False)
    _ahead: dict[tuple[str, ...], tuple[Call, dict[str, Deposit]]] = field(default_factory=dict, init=False, repr=False)
    _sums: int = field(default=0, init=False, repr=False)

    def gather(self, engine: Engine, kind: str, task: Task, *, split: str = "") -> Gathered:
        if not task.cohort:
            return Total({}, math.inf, 0), ()
        post, purpose = Post(engine, task), purpose_of(kind, split, task.round)
        try:
            with post.explaining():
                words, survivors = self._sum(post, purpose, kind, split)
        finally:
            self._lost = set(post.failures)
        return Total({SUM: words}, math.inf, len(survivors)), post.receipts(survivors)

    def _sum(self, post: Post, purpose: str, kind: str, split: str) -> tuple[np.ndarray, list[str]]:
        rounds = self._dealt(post, self._joined(post), self.size[kind])
        self._masked(post, rounds, kind, split, opened_before(self.openings, purpose))
        summed = self._large_enough(rounds)
        survivors = sorted(name for round in summed for name in round.arrived)
        decide(self.openings, purpose, survivors)
        return self._opened(post, summed), survivors

    # ---- a session ----

    def _joined(self, post: Post) -> Session:
        """The session that goes on; a new one when there is none that fits, or when a silo that was lost is back."""
        session, cohort = self._session, post.task.cohort
        if session is not None and not self._fits(session, cohort):
            session = None
        away = [name for name in cohort if session is None or name not in session.members or name in self._lost]
        if session is not None and not away:
            return session
        fresh = Session.begin(signer(self.coordinator), self.agreement)
        adverts = post.collect("join", away, pack(fresh.invite()), Advert)
        if session is not None and not adverts:
            return session
        everybody = self.agreement.roster if len(self.agreement.roster) <= SMALL else cohort
        others = [name for name in everybody if name not in away]
        adverts += post.collect("join", others, pack(fresh.invite()), Advert)
        self._session = self._with_joint_randomness(post, fresh, adverts)
        self._ahead, self._established = {}, set()
        return self._session

    def _fits(self, session: Session, cohort: Sequence[str]) -> bool:
        """Whether enough of the members are asked for each to keep its neighbours: all of them matter where each has
        only some.
        """
        asked = len(set(cohort) & set(session.members))
        return session.bond.circle is None or asked >= (1 - self.agreement.dropout) * len(session.members)

    def _with_joint_randomness(self, post: Post, fresh: Session, adverts: list[Advert]) -> Session:
        """A session of all who join and open; who joined and does not open is left out, and the others begin anew."""
        while True:
            gathered = fresh.adverts(adverts)
            names = [advert.name for advert in gathered.gathered]
            openings = post.collect("open", names, pack(Adverts(gathered.gathered)), Opening)
            if len(openings) == len(names):
                return gathered.openings(openings)
            fresh = Session.begin(signer(self.coordinator), self.agreement)
            adverts = post.collect("join", sorted(x.name for x in openings), pack(fresh.invite()), Advert)

    # ---- a sum ----

    def _dealt(self, post: Post, session: Session, size: int) -> list[Round]:
        """A round for each group, with the deposits of those who are there; what came ahead is not asked for again."""
        there = {name for name in post.task.cohort if name in session.members} - post.failures.keys()
        rounds, groups = [], session.bond.groups
        for cohort in (tuple(name for name in group if name in there) for group in groups):
            if len(groups) == 1 or len(cohort) >= self.agreement.minimum:
                call, deposits = self._ahead.get(cohort, (session.call(self._label(), cohort), {}))
                rounds.append(Round(session, call.label, cohort, post.digest, size))
                for deposit in deposits.values():
                    rounds[-1].deposit(deposit)
        self._ask_deposits(post, rounds, pack(messages.Openings(session.opened)))
        return rounds

    def _ask_deposits(self, post: Post, rounds: Sequence[Round], openings: bytes) -> None:
        mails = {
            name: bundle(b"" if name in self._established else openings, pack(round.call))
            for round in rounds
            for name in round.call.cohort
            if name not in round.deposits
        }
        for report in post.ask("deposit", mails):
            with post.blaming(report.silo):
                round = _of(rounds, report.silo)
                must(round.deposit(unpack(Deposit, report.mail)), round.liars.get(report.silo))
                self._established.add(report.silo)

    def _masked(self, post: Post, rounds: Sequence[Round], kind: str, split: str, before: Sequence[str] | None) -> None:
        """Adds up the vectors; only of those for whom the sum may have been opened `before`, if it may."""
        groups = [round for round in rounds if len(rounds) == 1 or len(round.deposits) >= self.agreement.minimum]
        mails = {name: pack(mail) for round in groups for name, mail in round.deliveries().items()}
        for report in post.ask(kind, mails, split):
            if before is None or report.silo in before:
                with post.blaming(report.silo):
                    round = _of(rounds, report.silo)
                    taken = round.masked(unpack(messages.Masked, report.mail), _words(report))
                    must(taken, round.liars.get(report.silo))

    def _large_enough(self, rounds: Sequence[Round]) -> list[Round]:
        """The groups whose sum may become known; a CohortError when there is none."""
        enough(self.agreement.minimum, max((len(round.arrived) for round in rounds), default=0))
        return [round for round in rounds if len(round.arrived) >= self.agreement.minimum]

    def _opened(self, post: Post, rounds: Sequence[Round]) -> np.ndarray:
        """The sum of the groups' sums. The survivors' deposits for another sum like this one ride along."""
        calls = {round.arrived: round.session.call(self._label(), round.arrived) for round in rounds}
        statements = {round.arrived: pack(round.survivors(calls[round.arrived])) for round in rounds}
        mails = {name: statement for names, statement in statements.items() for name in names}
        for report in post.ask("unmask", mails):
            with post.blaming(report.silo):
                round = _of(rounds, report.silo)
                must(round.reveal(unpack(Reveal, report.mail)), round.liars.get(report.silo))
        self._ahead = {round.arrived: (calls[round.arrived], round.next) for round in rounds}
        words: np.ndarray = sum(round.finish() for round in rounds)
        return words

    def _label(self) -> str:
        self._sums += 1
        return f"sum {self._sums}"


def _of(rounds: Sequence[Round], silo: str) -> Round:
    return next(round for round in rounds if silo in round.call.cohort)


def _words(report: Report) -> np.ndarray:
    return wire.unpack(report.payload)[0][SUM]
