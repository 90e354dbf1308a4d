"""A silo does each thing once, for what it agreed to, and shows no secret."""

from __future__ import annotations

import copy
import hashlib
import pickle
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest

from foedus.errors import GuaranteeError, SiloError
from foedus.secure import schedule
from foedus.secure.keys import Identity, Pair
from foedus.secure.messages import Call, Delivery, Survivors, sign
from foedus.secure.server import Round, Session
from foedus.secure.silo import KEPT, Member, _Bound, _Dealt, _Ready, _Revealed, _Sent
from foedus.secure.simulate import TASK, World, agree, begin, entropy, names, take

WORDS = np.arange(4, dtype=np.uint32)


@lru_cache
def world(n: int = 5, **agreed) -> World:
    return begin(*agree(names(n), **agreed))


@lru_cache
def steps() -> dict[str, Member | Delivery | Survivors]:
    """One silo's values of every step of a sum, and what it was sent."""
    w = world()
    round_ = Round(w.session, "a", w.members, TASK, 4)
    members, dealt = {}, {}
    for name, member in w.members.items():
        members[name], deposit = member.deposit(w.session.opened, round_.call)
        dealt[name] = members[name]
        round_.deposit(deposit)
    ready, sent = {}, {}
    deliveries = round_.deliveries()
    for name, delivery in deliveries.items():
        ready[name] = members[name].deliver(delivery, TASK)
        sent[name], masked = ready[name].mask(words := WORDS.copy())
        round_.masked(masked, words)
    statement = round_.survivors()
    revealed, _ = sent["silo0"].reveal(statement)
    return {
        "bound": w.members["silo0"], "dealt": dealt["silo0"], "ready": ready["silo0"], "sent": sent["silo0"],
        "revealed": revealed, "delivery": deliveries["silo0"], "statement": statement, "call": round_.call,
    }  # fmt: skip


def fresh(name: str = "silo0", seed: int = 0, **agreed) -> tuple[Member, Session, Identity]:
    terms, coordinator, identities = agree(names(5), seed, **agreed)
    return Member(name, identities[name], terms), Session.begin(coordinator, terms), coordinator


def test_a_call_not_answered_before_is_answered_with_fresh_secrets():
    member, session = world().members["silo0"], world().session
    one, a = member.deposit(session.opened, session.call("a", names(5)))
    _, b = one.deposit(None, session.call("b", names(5)))
    assert a.public != b.public and a.commitment != b.commitment
    assert not set(a.boxes.values()) & set(b.boxes.values())


def test_the_same_call_again_gets_the_same_deposit_and_another_under_its_label_none():
    session = world().session
    member, deposit = world().members["silo0"].deposit(session.opened, session.call("a", names(5)))
    assert member.deposit(session.opened, session.call("a", names(5))) == (member, deposit)
    with pytest.raises(SiloError, match="used before"):
        member.deposit(None, session.call("a", names(4)))


def test_a_label_is_never_dealt_masked_or_revealed_for_twice():
    s = steps()
    for step in ("ready", "sent", "revealed"):
        with pytest.raises(SiloError, match="used before"):
            s[step].deposit(None, s["call"])
        with pytest.raises(SiloError, match="next"):
            s[step].deliver(s["delivery"], TASK)
    for step in ("dealt", "sent", "revealed"):
        with pytest.raises(SiloError, match="next"):
            s[step].mask(WORDS.copy())
    for step in ("dealt", "ready"):
        with pytest.raises(SiloError, match="next"):
            s[step].reveal(s["statement"])


def test_the_same_statement_gets_the_same_bytes_and_a_second_one_nothing_for_good():
    s = steps()
    again, reveal = s["revealed"].reveal(s["statement"])
    assert again is s["revealed"] and reveal == s["revealed"]._sums["a"].reveal
    _, coordinator, _ = agree(names(5))
    other = sign(replace(s["statement"], survivors=tuple(names(5)[:4])), coordinator)
    for _ in range(2):
        with pytest.raises(SiloError, match="next"):
            s["revealed"].reveal(other)
    assert s["revealed"].reveal(s["statement"])[1] == reveal


def test_a_refused_step_leaves_the_value_as_it_was():
    s = steps()
    with pytest.raises(SiloError):
        s["sent"].reveal(replace(s["statement"], signature=bytes(64)))
    assert s["sent"].reveal(s["statement"])[1].keys.keys() == set(names(5)[1:])


def test_words_of_another_width_are_refused_and_stay_as_they_are():
    words = np.arange(4, dtype=np.uint16)
    with pytest.raises(SiloError, match="32 bits"):
        steps()["ready"].mask(words)
    assert (words == np.arange(4)).all()


def test_masking_works_in_place_and_hides_every_word():
    words = WORDS.copy()
    steps()["ready"].mask(words)
    assert (words != WORDS).all()


def test_an_invitation_to_another_agreement_or_by_another_is_refused():
    member, session, _ = fresh()
    with pytest.raises(SiloError, match="another agreement"):
        member.join(fresh(word=64)[1].invite())
    with pytest.raises(SiloError, match="signed by whom"):
        member.join(sign(session.invite(), Identity.fresh()))
    with pytest.raises(SiloError, match="roster"):
        replace(member, identity=Identity.fresh()).join(session.invite())
    joined, _ = member.join(session.invite())
    with pytest.raises(SiloError, match="second invitation"):
        joined.join(session.invite())


def test_nothing_is_opened_before_its_time():
    member, session, _ = fresh()
    with pytest.raises(SiloError, match="next"):
        member.open(())
    with pytest.raises(SiloError, match="next"):
        member.deposit(None, session.call("a", names(5)))
    with pytest.raises(SiloError, match="next"):
        member.deposit((), session.call("a", names(5)))
    with pytest.raises(SiloError, match="next"):
        member.mask(WORDS.copy())


def test_a_cohort_of_one_or_two_or_of_strangers_or_without_the_silo_is_refused():
    session, member = world().session, world().members["silo0"]
    for cohort in (["silo0"], ["silo0", "silo1"], ["silo0", "silo1", "stranger"], names(5)[1:]):
        with pytest.raises(SiloError, match="call"):
            member.deposit(session.opened, session.call("a", cohort))
    with pytest.raises(SiloError, match="call"):
        member.deposit(session.opened, Call(bytes(32), "a", tuple(names(5))))


def test_deliveries_of_too_few_or_of_strangers_are_refused():
    s = steps()
    parcels = s["delivery"].parcels
    few = dict(list(parcels.items())[:2])
    for wrong in (few, {}, parcels | {"silo0": parcels["silo1"]}, parcels | {"stranger": parcels["silo1"]}):
        with pytest.raises(SiloError, match="parcels"):
            s["dealt"].deliver(replace(s["delivery"], parcels=wrong), TASK)
    with pytest.raises(SiloError, match="next"):
        s["dealt"].deliver(replace(s["delivery"], session=bytes(32)), TASK)


def test_after_preparing_a_silos_own_secrets_are_gone_and_after_the_answer_those_of_others():
    s = steps()
    assert [type(s[step]._sums["a"]) for step in ("dealt", "ready", "sent", "revealed")] == [
        _Dealt, _Ready, _Sent, _Revealed
    ]  # fmt: skip
    secret, pair = s["dealt"]._sums["a"].secret, s["dealt"]._sums["a"].pair.secret
    for step in ("ready", "sent", "revealed"):
        held = repr({k: v for k, v in vars(s[step]._sums["a"]).items() if k != "sum_"})
        assert repr(secret) not in held and repr(pair) not in held
    assert not hasattr(s["sent"]._sums["a"], "seeds") and not hasattr(s["revealed"]._sums["a"], "shares")


def test_old_sums_that_never_ended_are_forgotten():
    member, session = world().members["silo0"], world().session
    for i in range(KEPT + 3):
        member, _ = member.deposit(session.opened, session.call(f"sum {i}", names(5)))
    assert list(member._sums) == [f"sum {i}" for i in range(3, KEPT + 3)]
    with pytest.raises(SiloError, match="used before"):
        member.deposit(None, session.call("sum 0", names(5)))


def secret_bytes(member: Member) -> list[bytes]:
    out = [member.identity.secret]
    if isinstance(member._session, _Bound):
        out += member._session.channels.values()
    for phase in member._sums.values():
        if isinstance(phase, _Dealt):
            out += [phase.secret, phase.pair.secret]
        if isinstance(phase, _Ready):
            out += phase.seeds
        if isinstance(phase, _Ready | _Sent):
            out += [share for shares in phase.shares.values() for share in shares]
    return out


def spellings(secret: bytes) -> list[str]:
    return [repr(secret)[2:-1], secret.hex(), str(int.from_bytes(secret))]


def test_no_secret_is_printed_pickled_or_copied():
    for step in ("dealt", "ready", "sent", "revealed"):
        member = steps()[step]
        for value in (member, member._session, *member._sums.values(), {"m": member}):
            text = f"{value!r} {value!s} {value}"
            assert not [s for secret in secret_bytes(member) for s in spellings(secret) if s in text]
        for way in (pickle.dumps, copy.deepcopy, copy.copy):
            with pytest.raises(GuaranteeError):
                way(member)


def test_no_error_holds_a_secret():
    s = steps()
    parcels = s["delivery"].parcels
    one = next(iter(parcels))
    damaged = {**parcels, one: replace(parcels[one], sealed=bytes(80))}
    tries = [
        lambda: s["dealt"].deliver(replace(s["delivery"], parcels=damaged), TASK),
        lambda: s["ready"].mask(np.zeros(3)),
        lambda: s["sent"].reveal(replace(s["statement"], task="other")),
        lambda: s["sent"].deposit(None, s["call"]),
    ]
    secrets = [
        text for step in ("dealt", "ready", "sent") for secret in secret_bytes(s[step]) for text in spellings(secret)
    ]
    for attempt in tries:
        with pytest.raises(SiloError) as caught:
            attempt()
        error: BaseException | None = caught.value
        while error is not None:
            assert not [text for text in secrets if text in f"{error!r} {error}"]
            error = error.__cause__ or error.__context__


def test_the_key_schedule_is_pinned():
    """A seeded session, its transcript, and the masks of one silo."""
    w = begin(*agree(names(4), 3), 3)
    zeros = {name: np.zeros(64, np.uint32) for name in w.members}
    _, outcome = take(w, "train 1", zeros)
    masked = b"".join(outcome.view.masked[name][1].tobytes() for name in sorted(zeros))
    assert w.session.bond.transcript.hex() == TRANSCRIPT
    assert hashlib.sha256(masked).hexdigest() == MASKS
    assert (outcome.total == 0).all()


def test_no_seed_is_derived_twice_in_ten_thousand_sessions():
    """Even where the same keys were drawn again in each session, another transcript gives other seeds."""
    bond = world().session.bond
    pair, public, secret = Pair.fresh(entropy(1)), Pair.fresh(entropy(2)).public, bytes(range(32))
    agreed = pair.agree(public)
    same = type("Same", (), {"agree": lambda self, public: agreed})()
    seeds = set()
    for i in range(10_000):
        sum_ = schedule.Scope(replace(bond, transcript=hashlib.sha256(b"%d" % i).digest()), "a", bond.members)
        object.__setattr__(sum_, "words", ("a", bytes(32)))
        seeds |= {schedule.pair_seed(same, public, sum_, TASK, "a", "b"), schedule.self_seed(secret, sum_, TASK, "a")}
    assert len(seeds) == 20_000


def test_every_seed_and_key_depends_on_all_that_the_parties_must_have_seen_alike():
    bond, pair, public = world().session.bond, Pair.fresh(entropy(1)), Pair.fresh(entropy(2)).public
    base = schedule.Scope(bond, "a", bond.members)
    sums = [
        base,
        replace(base, label="b"),
        replace(base, cohort=bond.members[:4]),
        replace(base, bond=replace(bond, transcript=bytes(32))),
        replace(base, bond=replace(bond, session=bytes(32))),
    ]
    keys = []
    for sum_ in sums:
        keys += [schedule.pair_seed(pair, public, sum_, task, "a", "b") for task in (TASK, "other")]
        keys += [schedule.self_seed(bytes(32), sum_, task, name) for task in (TASK, "other") for name in "ab"]
        keys += [schedule.box_key(bytes(32), sum_, *ends) for ends in ("ab", "ba")]
        keys += [schedule.pad(bytes(32), sum_, said, *ends) for said in (b"one", b"two") for ends in ("ab", "ba")]
    assert len(set(keys)) == len(keys)
    assert schedule.pair_seed(pair, public, base, TASK, "a", "b") == schedule.pair_seed(
        pair, public, base, TASK, "b", "a"
    )
    for word in (16, 64):
        other = replace(base, bond=replace(bond, agreement=replace(bond.agreement, word=word)))
        assert schedule.self_seed(bytes(32), other, TASK, "a") not in keys
        assert schedule.pair_seed(pair, public, other, TASK, "a", "b") not in keys


def test_the_label_alone_changes_every_key():
    """Although the digest of the call depends on it, too."""
    bond = world().session.bond
    one, two = (schedule.Scope(bond, label, bond.members) for label in "ab")
    assert one.words[0] != two.words[0] and one.words[1] != two.words[1]


TRANSCRIPT = "ed2f85cb1dc4cafd22f08f6a613c721fdca9f70d278a7bde6ee47e1db09a4387"
MASKS = "3bf9fbe4319ab3b238520abf16618bac23bd434d302aa3439a36d10d2ed50544"
