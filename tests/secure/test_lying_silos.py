"""Silos that lie: what they do is harmless, or it ends the sum, which then shows nothing; and they are named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from foedus.errors import CohortError, SiloError
from foedus.secure import attack, shamir
from foedus.secure.keys import Pair, seal
from foedus.secure.messages import Deposit, Reveal, Survivors, digest, name_of, sign
from foedus.secure.schedule import Scope, box_context, box_key
from foedus.secure.server import Round
from foedus.secure.silo import Member
from foedus.secure.simulate import TASK, agree, begin, names

LIAR, N = "silo2", 7
Lie = Callable[[Member, Scope, Deposit], Deposit]


class Sum:
    """One sum in which `LIAR` may send another deposit, or another reveal, than an honest silo would."""

    def __init__(self, lie: Lie | None = None, gone: str = "") -> None:
        world = begin(*agree(names(N), corrupt="0.15"))
        self.round = Round(world.session, "a", world.members, TASK, 3)
        self.members, self.accused = dict(world.members), []
        self.x = {name: np.arange(3, dtype=np.uint32) * (i + 1) for i, name in enumerate(self.members)}
        for name, member in world.members.items():
            self.members[name], deposit = member.deposit(world.session.opened, self.round.call)
            if lie and name == LIAR:
                deposit = sign(lie(self.members[name], self.round.scope, deposit), member.identity)
            self.round.deposit(deposit)
        self.masked = {}
        for name, delivery in self.round.deliveries().items():
            try:
                ready = self.members[name].deliver(delivery, TASK)
            except SiloError as error:
                self.accused.append((name, str(error)))
                continue
            if name != gone:
                self.members[name], message = ready.mask(words := self.x[name].copy())
                self.masked[name] = message, words
                assert self.round.masked(message, words)

    def reveals(self, lie: Callable[[Member, Survivors, Reveal], Reveal] | None = None) -> Sum:
        self.said, self.answers = self.round.survivors(), []
        for name in self.said.survivors:
            member, reveal = self.members[name].reveal(self.said)
            if lie and name == LIAR:
                reveal = sign(lie(self.members[name], self.said, reveal), member.identity)
            self.answers.append((self.said, reveal))
            self.round.reveal(reveal)
        return self

    def exact(self) -> bool:
        return bool((self.round.finish() == sum(self.x[name] for name in self.said.survivors)).all())

    def opened(self) -> set[frozenset[str]]:
        scopes = dict.fromkeys(names(N), self.round.scope)
        deliveries = self.round.deliveries()
        return set(attack.opened(attack.Seen(scopes, self.round.deposits, deliveries, self.masked, self.answers)))


def boxed(member: Member, scope: Scope, deposit: Deposit, shares: dict[str, tuple[bytes, bytes]]) -> Deposit:
    """The deposit with other shares, well sealed, and their true hashes."""
    boxes = dict(deposit.boxes)
    for name, (mine, ours) in shares.items():
        box = replace(boxes[name], of_self=digest(mine), of_pair=digest(ours))
        key = box_key(member._session.channels[name], scope, LIAR, name)
        boxes[name] = replace(box, sealed=seal(key, mine + ours, box_context(scope, LIAR, name, deposit, box)))
    return replace(deposit, boxes=boxes)


def garbage(member: Member, scope: Scope, deposit: Deposit) -> Deposit:
    return replace(deposit, boxes=deposit.boxes | {"silo4": replace(deposit.boxes["silo4"], sealed=bytes(80))})


def broken_promise(member: Member, scope: Scope, deposit: Deposit) -> Deposit:
    """Well sealed shares that are not those it promised."""
    box = deposit.boxes["silo4"]
    key = box_key(member._session.channels["silo4"], scope, LIAR, "silo4")
    context = box_context(scope, LIAR, "silo4", deposit, box)
    return replace(deposit, boxes=deposit.boxes | {"silo4": replace(box, sealed=seal(key, bytes(64), context))})


def inconsistent(member: Member, scope: Scope, deposit: Deposit) -> Deposit:
    """Shares that lie on no one polynomial."""
    return boxed(member, scope, deposit, {name: (shamir.fresh(), shamir.fresh()) for name in deposit.boxes})


def another_commitment(member: Member, scope: Scope, deposit: Deposit) -> Deposit:
    held, points = member._sums["a"], list(scope.points(LIAR).values())
    mine = shamir.split(held.secret, scope.threshold, points)
    ours = shamir.split(held.pair.secret, scope.threshold, points)
    changed = replace(deposit, commitment=digest(b"another"))
    return boxed(member, scope, changed, dict(zip(deposit.boxes, zip(mine, ours, strict=True), strict=True)))


def another_pair(member: Member, scope: Scope, deposit: Deposit) -> Deposit:
    held, points = member._sums["a"], list(scope.points(LIAR).values())
    mine = shamir.split(held.secret, scope.threshold, points)
    ours = shamir.split(Pair.fresh().secret, scope.threshold, points)
    return boxed(member, scope, deposit, dict(zip(deposit.boxes, zip(mine, ours, strict=True), strict=True)))


@pytest.mark.parametrize("lie", [garbage, broken_promise])
def test_who_gets_a_false_box_names_the_dealer_and_stays_out_and_the_sum_is_exact(lie):
    s = Sum(lie).reveals()
    assert [name for name, _ in s.accused] == ["silo4"] and LIAR in s.accused[0][1]
    assert s.exact() and s.said.survivors == tuple(name for name in names(N) if name != "silo4")


@pytest.mark.parametrize(
    "lie, gone", [(inconsistent, ""), (another_commitment, ""), (inconsistent, LIAR), (another_pair, LIAR)]
)
def test_who_dealt_shares_of_another_secret_ends_the_sum_is_named_and_nothing_opens(lie, gone):
    s = Sum(lie, gone).reveals()
    with pytest.raises(CohortError, match=f"another of {LIAR}"):
        s.round.finish()
    assert s.round.liars == {LIAR: "shares of another secret than it published"}
    assert s.opened() == set()


def test_shares_that_nobody_needs_may_be_false():
    """A false pair secret of a silo that survives is never opened."""
    s = Sum(another_pair).reveals()
    assert s.exact() and not s.round.liars


@pytest.mark.parametrize(
    "lie",
    [
        lambda member, scope, deposit: replace(deposit, boxes=dict(list(deposit.boxes.items())[1:])),
        lambda member, scope, deposit: replace(deposit, boxes=deposit.boxes | {LIAR: deposit.boxes["silo0"]}),
        lambda member, scope, deposit: replace(deposit, public=bytes(32)),
        lambda member, scope, deposit: replace(deposit, call=bytes(32)),
    ],
    ids=["a box less", "a box for itself", "low order", "another call"],
)
def test_a_deposit_that_no_honest_silo_sends_is_refused_and_named(lie):
    s = Sum(lie)
    assert LIAR in s.round.liars and LIAR not in s.round.deposits
    assert s.reveals().exact() and LIAR not in s.said.survivors


def resealed(member: Member, said: Survivors, values: Callable[[list[bytes]], list[bytes]], share=None) -> Reveal:
    """An honest reveal in all but the values, or the shares of their key."""
    sent = member._sums["a"]
    honest = [shares[name not in said.survivors] for name, shares in sent.shares.items()]
    key = shamir.fresh()
    made = replace(member)._reveal(sent, said, name_of(said))
    locks = shamir.split(key, sent.sum_.threshold, list(sent.sum_.points(LIAR).values()))
    keys = {}
    for (name, old), lock in zip(made.keys.items(), locks, strict=True):
        keys[name] = replace(member._key(sent.sum_, name_of(said), name, share or lock), key=old.key)
    return replace(made, sealed=seal(key, b"".join(values(honest)), name_of(said)), keys=keys)


def test_false_shares_are_noticed_by_their_hashes_and_named_and_the_sum_is_exact():
    def lie(member, said, reveal):
        return resealed(member, said, lambda values: [bytes(32), *values[1:]])

    s = Sum().reveals(lie)
    assert s.exact() and s.round.liars == {LIAR: "a share that is not the one that silo0 dealt"}


def test_a_share_of_the_wrong_secret_is_no_share():
    """A silo that claims that a survivor is dead gives away its pair share, which is counted for nothing."""

    def lie(member, said, reveal):
        return resealed(member, said, lambda values: [shares[1] for shares in member._sums["a"].shares.values()])

    s = Sum().reveals(lie)
    assert s.exact() and "dealt" in s.round.liars[LIAR]
    assert s.opened() == {frozenset(names(N))}


def test_values_under_a_key_that_was_shared_falsely_are_not_opened_and_their_silo_is_named():
    def lie(member, said, reveal):
        return resealed(member, said, lambda values: values, share=shamir.fresh())

    s = Sum().reveals(lie)
    assert s.exact() and s.round.liars == {LIAR: "values that its own key does not open"}


def test_garbage_for_values_is_named():
    s = Sum().reveals(lambda member, said, reveal: replace(reveal, sealed=bytes(len(reveal.sealed))))
    assert s.exact() and s.round.liars == {LIAR: "values that its own key does not open"}


def test_who_gives_false_keys_to_many_is_named_and_none_of_them_is():
    def lie(member, said, reveal):
        return replace(reveal, keys={name: replace(key, key=bytes(32)) for name, key in reveal.keys.items()})

    s = Sum().reveals(lie)
    assert s.exact() and s.round.liars == {LIAR: "pads that too many others contradict"}
    assert all(LIAR in pair for pair in s.round.disputes)


def test_who_contradicts_one_other_is_in_a_dispute_that_nobody_can_decide():
    def lie(member, said, reveal):
        return replace(reveal, keys=reveal.keys | {"silo0": replace(reveal.keys["silo0"], key=bytes(32))})

    s = Sum().reveals(lie)
    assert s.exact() and not s.round.liars and s.round.disputes == {("silo0", LIAR)}


@pytest.mark.parametrize(
    "lie",
    [
        lambda member, said, reveal: replace(reveal, sealed=reveal.sealed + bytes(32)),
        lambda member, said, reveal: replace(reveal, sealed=reveal.sealed[:-32]),
        lambda member, said, reveal: replace(reveal, keys=dict(list(reveal.keys.items())[1:])),
        lambda member, said, reveal: replace(reveal, keys=reveal.keys | {LIAR: reveal.keys["silo0"]}),
        lambda member, said, reveal: replace(reveal, statement=bytes(32)),
    ],
    ids=["more values", "fewer values", "a key less", "a key for itself", "another statement"],
)
def test_a_reveal_that_no_honest_silo_sends_is_refused_and_named(lie):
    s = Sum().reveals(lie)
    assert s.round.liars.keys() == {LIAR}
    assert s.exact()


def test_claims_in_the_name_of_another_are_refused():
    s = Sum()
    said = s.round.survivors()
    member = s.members[LIAR]
    _, reveal = member.reveal(said)
    assert not s.round.reveal(sign(replace(reveal, name="silo0"), member.identity))
    assert "did not sign" in s.round.liars["silo0"]
    assert s.reveals().exact()


def test_a_vector_for_another_task_is_refused_and_named():
    s = Sum(gone=LIAR)
    member = s.members[LIAR].deliver(s.round.deliveries()[LIAR], "6b" * 32)
    assert not s.round.masked(member.mask(words := s.x[LIAR].copy())[1], words)
    assert "another task" in s.round.liars[LIAR]
    assert s.reveals().exact()


def test_a_liar_among_too_few_ends_the_sum_and_every_liar_is_listed():
    def lie(member, said, reveal):
        return replace(reveal, sealed=bytes(len(reveal.sealed)))

    s = Sum(gone="silo0")
    s.said, kept = s.round.survivors(), []
    for name in [n for n in s.said.survivors if n not in ("silo5", "silo6")]:
        member, reveal = s.members[name].reveal(s.said)
        reveal = sign(lie(member, s.said, reveal), member.identity) if name == LIAR else reveal
        kept.append((s.said, reveal))
        s.round.reveal(reveal)
    s.answers = kept
    with pytest.raises(CohortError, match="lied: .*"):
        s.round.finish()
    assert s.opened() == set()
