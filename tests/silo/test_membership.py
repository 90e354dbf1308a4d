"""A silo's side of secure sums: one session at a time, and no step for a sum that it did not give to."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from foedus.errors import FoedusError, SiloError
from foedus.secure.keys import Identity
from foedus.secure.mail import bundle
from foedus.secure.messages import Advert, Adverts, Agreement, Deposit, Masked, Opening, Openings, Reveal, pack, unpack
from foedus.secure.server import Round, Session
from foedus.silo.membership import SESSIONS, Membership

NAMES = ("a", "b", "c", "d")


class Kept:
    """A journal that remembers what it was told."""

    def __init__(self) -> None:
        self.gave: list[tuple[str, str, str]] = []
        self.opened: list[tuple[str, str, str, tuple[str, ...]]] = []

    def gives(self, silo, purpose, words):
        self.gave.append((silo, purpose, words))

    def opens(self, silo, purpose, words, survivors):
        self.opened.append((silo, purpose, words, tuple(survivors)))


@pytest.fixture
def parties():
    identities = {name: Identity.fresh() for name in NAMES}
    chair = Identity.fresh()
    roster = {name: one.public for name, one in identities.items()}
    agreement = Agreement("t", "m", roster, chair.public, 32, Fraction(0), Fraction(0), 3)
    return Membership(agreement, identities, Kept()), chair, agreement


def session(membership, chair, agreement) -> Session:
    begun = Session.begin(chair, agreement)
    adverts = [unpack(Advert, membership.answer("join", name, pack(begun.invite()))) for name in NAMES]
    begun = begun.adverts(adverts)
    shown = pack(Adverts(begun.gathered))
    return begun.openings([unpack(Opening, membership.answer("open", name, shown)) for name in NAMES])


def dealt(membership, held: Session, label: str, task: str, first: bool = False) -> Round:
    round = Round(held, label, NAMES, task, 5)
    openings = pack(Openings(held.opened)) if first else b""
    for name in NAMES:
        mail = bundle(openings, pack(round.call))
        assert round.deposit(unpack(Deposit, membership.answer("deposit", name, mail)))
    for name, delivery in round.deliveries().items():
        membership.deliver(name, pack(delivery), task)
        membership.deliver(name, pack(delivery), task)  # once more changes nothing
    return round


def given(membership, round: Round, purpose: str) -> None:
    for i, name in enumerate(NAMES):
        words = np.full(5, i + 1, np.uint32)
        membership.gives(name, purpose, f"{purpose} of {name}")
        membership.add(name, words)
        assert round.masked(unpack(Masked, membership.mail(name)), words)


def opened(membership, round: Round) -> np.ndarray:
    statement = pack(round.survivors())
    for name in NAMES:
        assert round.reveal(unpack(Reveal, membership.answer("unmask", name, statement)))
    return round.finish()


def test_what_is_written_before_a_sum_is_opened_is_about_that_sum(parties):
    membership, chair, agreement = parties
    held = session(membership, chair, agreement)
    train = dealt(membership, held, "1", "task", first=True)
    given(membership, train, "train 0")
    evaluate = dealt(membership, held, "2", "other task")
    given(membership, evaluate, "evaluate test 0")
    assert (opened(membership, train) == 10).all()  # while another sum is under way
    assert {record[1:3] for record in membership.journal.opened} == {("train 0", f"train 0 of {x}") for x in NAMES}
    assert (opened(membership, evaluate) == 10).all()


def test_a_silo_that_was_restarted_waits_for_a_new_session(parties):
    membership, chair, agreement = parties
    held = session(membership, chair, agreement)
    round = dealt(membership, held, "1", "task", first=True)
    restarted = Membership(agreement, membership.identities)
    for kind in ("deposit", "unmask"):
        with pytest.raises(FoedusError):
            restarted.answer(kind, "a", bundle(b"", pack(round.call)) if kind == "deposit" else b"")
    assert (opened_anew(restarted, chair, agreement) == 10).all()


def opened_anew(membership, chair, agreement) -> np.ndarray:
    round = dealt(membership, session(membership, chair, agreement), "1", "task", first=True)
    given(membership, round, "train 0")
    return opened(membership, round)


def test_a_journal_that_refuses_keeps_the_shares_inside(parties):
    membership, chair, agreement = parties

    class Refuses(Kept):
        def opens(self, *record):
            raise SiloError("a sum that was not opened", "one that was", "Stop.")

    membership.journal = Refuses()
    round = dealt(membership, session(membership, chair, agreement), "1", "task", first=True)
    given(membership, round, "train 0")
    with pytest.raises(SiloError, match="Stop"):
        membership.answer("unmask", "a", pack(round.survivors()))


def test_a_coordinator_cannot_begin_sessions_until_one_suits_it(parties):
    membership, chair, agreement = parties
    membership._sessions["a"] = SESSIONS - 1
    membership.answer("join", "a", pack(Session.begin(chair, agreement).invite()))
    with pytest.raises(SiloError, match="at most 1000 sessions"):
        membership.answer("join", "a", pack(Session.begin(chair, agreement).invite()))
    membership.answer("join", "b", pack(Session.begin(chair, agreement).invite()))


def test_a_step_that_nobody_knows_is_refused(parties):
    with pytest.raises(SiloError, match="a step of a secure sum"):
        parties[0].answer("tell", "a", b"")
