"""The coordinator finds the exact sum over the survivors, refuses what is late or forged, and gives up in time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from foedus.errors import CohortError, GuaranteeError
from foedus.secure import schedule
from foedus.secure.keys import Identity, Pair
from foedus.secure.messages import WORDS, sign
from foedus.secure.server import Round, Session
from foedus.secure.silo import Member
from foedus.secure.simulate import TASK, Schedule, agree, begin, names, sound, take


def inputs(silos, dtype=np.uint32, size=4):
    rng = np.random.default_rng(len(silos))
    return {name: rng.integers(0, np.iinfo(dtype).max, size, dtype, endpoint=True) for name in silos}


def dealt(n: int = 5, **agreed):
    """A round with all deposits, its members, and the deposits."""
    world = begin(*agree(names(n), **agreed))
    round_ = Round(world.session, "a", world.members, TASK, 4)
    made = {name: m.deposit(world.session.opened, round_.call) for name, m in world.members.items()}
    return round_, {name: m for name, (m, _) in made.items()}, [deposit for _, deposit in made.values()]


def masked(round_, members, deposits, who=None):
    """After the deliveries: the members, and their messages with words."""
    assert all(round_.deposit(deposit) for deposit in deposits)
    members, sent, x = dict(members), {}, inputs(members)
    for name, delivery in round_.deliveries().items():
        members[name], message = members[name].deliver(delivery, TASK).mask(words := x[name].copy())
        if who is None or name in who:
            sent[name] = message, words
    return members, sent, x


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("size", [1, 5, 70_001])
def test_the_sum_is_exact_modulo_every_word(word, size):
    x = inputs(names(4), WORDS[word], size)
    kept = {name: words.copy() for name, words in x.items()}
    _, outcome = take(begin(*agree(names(4), word=word)), "a", x, Schedule({"silo3": "mask"}))
    assert outcome.total.dtype == WORDS[word] and sound(outcome, x)
    assert all((x[name] == kept[name]).all() for name in x)


def test_a_steady_state_takes_two_exchanges_and_uses_no_key_twice():
    world, keys = begin(*agree(names(4))), []
    for i in range(4):
        world, outcome = take(world, f"sum {i}", inputs(names(4)), ahead=f"sum {i + 1}")
        assert sound(outcome, inputs(names(4))) and world.dealt[f"sum {i + 1}"].keys() == set(names(4))
        keys += [x for deposit in outcome.view.round.deposits.values() for x in (deposit.public, deposit.commitment)]
    assert len(set(keys)) == 4 * 4 * 2


def test_a_forged_deposit_is_refused_and_named_and_the_genuine_one_is_taken():
    round_, _, (deposit, *_) = dealt()
    forged = sign(replace(deposit, public=Pair.fresh().public), Identity.fresh())
    assert not round_.deposit(forged)
    assert "did not sign" in round_.liars["silo0"]
    assert round_.deposit(deposit) and not round_.deposit(deposit)


def test_a_deposit_of_a_stranger_or_another_sum_is_refused_and_blames_nobody():
    round_, _, (deposit, *_) = dealt()
    for other in (replace(deposit, name="stranger"), replace(deposit, label="b"), replace(deposit, session=bytes(32))):
        assert not round_.deposit(other)
    assert not round_.liars


def test_late_deposits_vectors_and_reveals_are_refused():
    round_, members, deposits = dealt()
    members, sent, x = masked(round_, {m: members[m] for m in names(5)}, deposits[:4])
    assert not round_.deposit(deposits[4])
    for name in names(5)[:4]:
        assert round_.masked(*sent[name])
    said = round_.survivors()
    reveals = {name: members[name].reveal(said)[1] for name in names(5)[:4]}
    assert not round_.masked(*sent["silo0"])
    for name in names(5)[:3]:
        assert round_.reveal(reveals[name]) and not round_.reveal(reveals[name])
    with pytest.raises(CohortError, match="got 0; lied: nobody"):
        round_.finish()
    assert round_.reveal(reveals["silo3"])
    total = round_.finish()
    assert (total == sum(x[name] for name in names(5)[:4])).all()
    assert round_.finish() is total and not round_.reveal(reveals["silo3"])


def test_a_vector_counts_once_and_not_after_the_statement():
    round_, members, deposits = dealt()
    members, sent, x = masked(round_, members, deposits)
    for name in names(5)[:4]:
        assert round_.masked(*sent[name]) and not round_.masked(*sent[name])
    said = round_.survivors()
    assert not round_.masked(*sent["silo4"])
    for name in said.survivors:
        assert round_.reveal(members[name].reveal(said)[1])
    assert (round_.finish() == sum(x[name] for name in names(5)[:4])).all()


def test_a_vector_before_the_deliveries_or_of_no_participant_is_not_taken():
    round_, members, deposits = dealt()
    other, others, theirs = dealt()
    _, sent, _ = masked(other, others, theirs)
    assert not round_.masked(*sent["silo0"])
    for deposit in deposits[:4]:
        round_.deposit(deposit)
    round_.deliveries()
    assert not round_.masked(*sent["silo4"])


@pytest.mark.parametrize("wrong", [np.zeros(5, np.uint32), np.zeros(4, np.uint16), np.zeros((2, 2), np.uint32)])
def test_a_vector_of_another_shape_or_width_is_refused_and_named(wrong):
    round_, members, deposits = dealt()
    _, sent, _ = masked(round_, members, deposits)
    assert not round_.masked(sent["silo0"][0], wrong)
    assert "another shape" in round_.liars["silo0"]


def test_words_that_were_changed_on_the_way_are_refused():
    round_, members, deposits = dealt()
    _, sent, _ = masked(round_, members, deposits)
    message, words = sent["silo0"]
    assert not round_.masked(message, words + np.uint32(1)) and "words" in round_.liars["silo0"]
    assert round_.masked(message, words)


def test_the_statement_is_the_same_whenever_it_is_asked_for():
    round_, members, deposits = dealt()
    _, sent, _ = masked(round_, members, deposits)
    for message, words in sent.values():
        round_.masked(message, words)
    said = round_.survivors()
    assert round_.survivors(round_.session.call("b", names(5))) is said


def test_too_few_deposits_vectors_or_neighbours_end_a_sum_before_anything_is_asked():
    round_, _, deposits = dealt()
    for deposit in deposits[:2]:
        round_.deposit(deposit)
    with pytest.raises(CohortError, match="deposits"):
        round_.deliveries()
    round_, members, deposits = dealt()
    _, sent, _ = masked(round_, members, deposits)
    for name in names(5)[:2]:
        round_.masked(*sent[name])
    with pytest.raises(CohortError, match="3 or more masked vectors"):
        round_.survivors()
    round_.masked(*sent["silo2"])
    with pytest.raises(CohortError, match="3 or more neighbours"):
        round_.survivors()


def test_who_has_too_few_neighbours_left_takes_no_part():
    """On a sparse circle: nobody could find its secrets, and that would end the sum."""
    world = begin(*agree(names(40), dropout="0.2"))
    round_ = Round(world.session, "a", world.members, TASK, 4)
    order, spare = world.session.bond.circle[0].order, len(round_.scope.neighbours("silo00")) - round_.scope.threshold
    lost = [order[(order.index("silo00") + steps) % 40] for steps in (1, -1, 9, 8, 7, -9, -8, -7, -6)]
    assert len(set(lost) & set(round_.scope.neighbours("silo00"))) == spare + 1
    for name, member in world.members.items():
        if name not in lost:
            round_.deposit(member.deposit(world.session.opened, round_.call)[1])
    deliveries = round_.deliveries()
    assert deliveries.keys() == set(names(40)) - {*lost, "silo00"}
    assert all(len(delivery.parcels) >= round_.scope.threshold for delivery in deliveries.values())


def test_a_cohort_of_one_or_two_cannot_be_called():
    session = begin(*agree(names(5))).session
    for n in (0, 1, 2):
        with pytest.raises(CohortError):
            Round(session, "a", names(n) if n > 1 else names(5)[:n], TASK, 4)


def test_a_cohort_too_small_for_the_agreed_collusion_cannot_be_called():
    session = begin(*agree(names(10), corrupt="0.2", dropout="0.2", minimum=4)).session
    with pytest.raises(GuaranteeError):
        _ = Round(session, "a", names(10)[:5], TASK, 4).scope.threshold


def gather(n: int = 5):
    terms, coordinator, identities = agree(names(n))
    session = Session.begin(coordinator, terms)
    joined = {name: Member(name, identity, terms).join(session.invite()) for name, identity in identities.items()}
    return session, joined, identities


def test_false_adverts_are_left_out_and_named():
    session, joined, identities = gather(8)
    adverts = [advert for _, advert in joined.values()]
    adverts[1] = sign(replace(adverts[1], channel=adverts[0].channel), identities["silo1"])
    adverts[2] = sign(adverts[2], identities["silo3"])
    adverts[4] = sign(replace(adverts[4], channel=bytes(32)), identities["silo4"])
    adverts += [adverts[5], sign(replace(adverts[6], channel=Pair.fresh().public), identities["silo6"])]
    session = session.adverts(adverts)
    assert [advert.name for advert in session.gathered] == ["silo0", "silo3", "silo5", "silo6", "silo7"]
    assert {name: why.split()[-1] for name, why in session.liars.items()} == {
        "silo1": "has", "silo2": "session", "silo4": "order", "silo6": "adverts"
    }  # fmt: skip


def test_a_session_of_too_few_is_not_gathered():
    session, joined, _ = gather()
    with pytest.raises(CohortError, match="3 silos or more"):
        session.adverts([joined["silo0"][1], joined["silo1"][1]])


def test_a_session_in_which_one_does_not_open_is_begun_anew():
    session, joined, _ = gather()
    session = session.adverts([advert for _, advert in joined.values()])
    openings = [member.open(session.gathered)[1] for member, _ in joined.values()]
    for some in (openings[:4], [*openings[:4], replace(openings[4], nonce=bytes(32))]):
        with pytest.raises(CohortError, match="none of silo4"):
            session.openings(some)
    assert session.members == () and session.openings(openings).members == tuple(names(5))


def test_joint_randomness_depends_on_everybodys_advert_and_nonce():
    session = begin(*agree(names(5))).session
    adverts, openings, seen = session.gathered, session.opened, {session.bond.transcript}
    for i in range(5):
        other = [replace(opening, nonce=bytes(32)) if i == j else opening for j, opening in enumerate(openings)]
        seen.add(schedule.transcript(session.agreement.digest, adverts, other))
        other = [replace(advert, channel=bytes(32)) if i == j else advert for j, advert in enumerate(adverts)]
        seen.add(schedule.transcript(session.agreement.digest, other, openings))
    seen.add(schedule.transcript(bytes(32), adverts, openings))
    assert len(seen) == 12
    assert schedule.transcript(session.agreement.digest, adverts[::-1], openings[::-1]) == session.bond.transcript


def test_the_graph_depends_on_the_joint_randomness_and_on_nothing_that_the_coordinator_chose():
    bond = begin(*agree(names(40), dropout="0.1")).session.bond
    again, other = replace(bond, session=bytes(32)), replace(bond, transcript=bytes(32))
    assert again.circle[0].order == bond.circle[0].order != other.circle[0].order


def test_the_coordinator_prints_no_key():
    session, _, _ = gather()
    assert session.identity.secret.hex() not in repr(session) and repr(session.identity.secret) not in repr(session)
