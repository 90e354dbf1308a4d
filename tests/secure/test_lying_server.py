"""A coordinator that lies: every honest silo refuses, or what opens is a sum in which it has honest neighbours enough.

The lies that a silo can see by itself are tried one by one. Against those that it cannot see, statements that differ
from silo to silo, the attack of `secure.attack` does its best with everything that was revealed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations, product

import numpy as np
import pytest

from foedus.errors import SiloError
from foedus.secure import attack, silo
from foedus.secure.keys import Identity, Pair
from foedus.secure.messages import (
    Advert,
    Box,
    Delivery,
    Deposit,
    Masked,
    Opening,
    Parcel,
    Reveal,
    Survivors,
    digest,
    name_of,
    sign,
)  # fmt: skip
from foedus.secure.server import Round, Session
from foedus.secure.silo import Member
from foedus.secure.simulate import TASK, agree, begin, names, take

OTHER = "6b" * 32


@dataclass(frozen=True)
class Stage:
    """A sum up to the masked vectors, all of whose values are kept. `tasks`: for which task each silo masked."""

    round: Round
    coordinator: Identity
    states: dict[str, list[Member]]
    delivered: dict[str, Delivery]
    masked: dict[str, tuple[Masked, np.ndarray]]
    inputs: dict[str, np.ndarray]

    def said(self, survivors: Iterable[str], **change) -> Survivors:
        """A statement, signed as it should be, whatever it says."""
        r = self.round
        said = Survivors(
            r.session.session, r.call.label, name_of(r.call), TASK, tuple(sorted(r.deposits)), tuple(sorted(survivors))
        )
        return sign(replace(said, **change), self.coordinator)

    def seen(self, answers: list[tuple[Survivors, Reveal]], corrupt: Iterable[str] = ()) -> attack.Seen:
        scopes = dict.fromkeys(self.states, self.round.scope)
        spoils = {name: self.states[name] for name in corrupt}
        return attack.Seen(scopes, self.round.deposits, self.delivered, self.masked, answers, spoils)

    def answers(self, told: dict[str, Survivors]) -> list[tuple[Survivors, Reveal]]:
        """What the silos answer that do not refuse."""
        return [(said, reveal) for name, said in told.items() if (reveal := self.answer(name, said))]

    def answer(self, name: str, said: Survivors) -> Reveal | None:
        try:
            return self.states[name][-1].reveal(said)[1]
        except SiloError:
            return None


@lru_cache
def stage(n: int, corrupt: str = "0", dropout: str = "0", changed: str = "", minimum: int = 3) -> Stage:
    """`changed`: a silo that is given another model than the others."""
    terms = agree(names(n), corrupt=corrupt, dropout=dropout, minimum=minimum)
    world = begin(*terms)
    round_ = Round(world.session, "a", world.members, TASK, 3)
    states: dict[str, list[Member]] = {}
    for name, member in world.members.items():
        dealt, deposit = member.deposit(world.session.opened, round_.call)
        states[name] = [dealt]
        assert round_.deposit(deposit)
    delivered, masked, rng = round_.deliveries(), {}, np.random.default_rng(n)
    inputs = {name: rng.integers(0, 2**32, 3, dtype=np.uint32) for name in states}
    for name, delivery in delivered.items():
        ready = states[name][0].deliver(delivery, OTHER if name == changed else TASK)
        sent, message = ready.mask(words := inputs[name].copy())
        states[name] += [ready, sent]
        masked[name] = message, words
    return Stage(round_, terms[1], states, delivered, masked, inputs)


def claimed(s: Stage, seen: attack.Seen) -> set[frozenset[str]]:
    """What opens; each of it must be exact, and give each silo in it t − c honest neighbours beside it."""
    sums, scope, c = attack.opened(seen), s.round.scope, len(seen.corrupt)
    for group, words in sums.items():
        assert (words == sum(s.inputs[name] for name in group)).all()
        for name in group:
            assert len(group & set(scope.neighbours(name))) >= scope.threshold - c, (group, name)
    return set(sums)


def test_the_attack_finds_the_sum_of_an_honest_run_and_nothing_without_reveals():
    s = stage(5)
    assert claimed(s, s.seen([])) == set()
    said = s.said(names(5))
    assert claimed(s, s.seen(s.answers(dict.fromkeys(names(5), said)))) == {frozenset(names(5))}


def test_the_attack_reads_a_silo_all_of_whose_neighbours_are_corrupt():
    """So that what it does not find is not there."""
    s = stage(5)
    seen = s.seen([], corrupt=names(5)[1:])
    assert (attack.opened(seen)[frozenset({"silo0"})] == s.inputs["silo0"]).all()


def test_too_few_corrupt_silos_learn_nothing_without_reveals():
    s = stage(6, corrupt="0.17")
    assert attack.opened(s.seen([], corrupt=["silo5"])) == {}


# The lies that a silo sees


@pytest.mark.parametrize("labels", list(product(["alive", "dead", "both", "neither"], repeat=2)))
def test_only_a_statement_that_fits_what_the_silo_saw_is_answered_and_with_one_value_a_neighbour(labels, monkeypatch):
    """Every way to label four neighbours. "Both" is a survivor that took no part: dead and alive at once."""
    sealed = []
    monkeypatch.setattr(silo, "seal", lambda key, blob, context=b"": sealed.append(blob) or bytes(len(blob) + 16))
    s = stage(5)
    shares = s.states["silo0"][-1]._sums["a"].shares
    for more in product(["alive", "dead", "both", "neither"], repeat=2):
        label = dict(zip(names(5)[1:], labels + more, strict=True)) | {"silo0": "alive"}
        participants = tuple(name for name in names(5) if label[name] in ("alive", "dead"))
        survivors = tuple(name for name in names(5) if label[name] in ("alive", "both"))
        answer = s.answer("silo0", s.said(survivors, participants=participants))
        consistent = set(label.values()) <= {"alive", "dead"} and len(survivors) >= 4
        assert (answer is not None) == consistent, label
        if answer:
            (values,) = sealed
            one_each = [shares[name][label[name] == "dead"] for name in names(5)[1:]]
            assert values == b"".join(one_each)
        sealed.clear()


def test_a_statement_of_fewer_survivors_than_agreed_is_refused():
    s = stage(6, minimum=5)
    assert s.round.scope.threshold == 3
    assert s.answer("silo0", s.said(names(6)[:4])) is None
    assert s.answer("silo0", s.said(names(6)[:5])) is not None


def test_a_survivor_that_took_no_part_is_refused():
    s = stage(5)
    parcels = {name: parcel for name, parcel in s.delivered["silo0"].parcels.items() if name != "silo4"}
    ready = s.states["silo0"][0].deliver(replace(s.delivered["silo0"], parcels=parcels), TASK)
    member, _ = ready.mask(np.zeros(3, np.uint32))
    four = tuple(names(5)[:4])
    with pytest.raises(SiloError, match="of the cohort"):
        member.reveal(s.said(["silo0", "silo1", "silo2", "silo4"], participants=four))
    assert member.reveal(s.said(four, participants=four))


def test_a_statement_without_the_silo_of_another_sum_or_not_signed_is_refused():
    s = stage(5)
    everybody = names(5)
    wrong = [
        s.said(everybody[1:]),
        s.said(everybody, task=OTHER),
        s.said(everybody, call=bytes(32)),
        s.said(everybody, session=bytes(32)),
        s.said(everybody, label="b"),
        s.said([*everybody, "stranger"], participants=(*everybody, "stranger")),
        s.said(everybody, participants=tuple(everybody[:4])),
        replace(s.said(everybody), survivors=tuple(everybody[:4])),
        sign(s.said(everybody), Identity.fresh()),
    ]
    assert [s.answer("silo0", said) for said in wrong] == [None] * len(wrong)
    assert s.answer("silo0", s.said(everybody)) is not None


def test_a_second_statement_is_never_answered():
    s = stage(5)
    for first, second in combinations([names(5), names(5)[:4], [*names(5)[:3], "silo4"]], 2):
        member, _ = s.states["silo0"][-1].reveal(s.said(first))
        with pytest.raises(SiloError):
            member.reveal(s.said(second))
        with pytest.raises(SiloError):
            member.reveal(s.said(first, next=s.round.session.call("b", names(5))))


def gathered(n: int = 5):
    """A session of silos that have sent their adverts."""
    terms, coordinator, identities = agree(names(n))
    session = Session.begin(coordinator, terms)
    joined = {name: Member(name, identity, terms).join(session.invite()) for name, identity in identities.items()}
    return session, {name: m for name, (m, _) in joined.items()}, [a for _, a in joined.values()], identities


def bad_adverts() -> dict[str, list[Advert]]:
    session, _, adverts, identities = ADVERTS
    mine, theirs, *rest = adverts
    low = [bytes(32), (1).to_bytes(32, "little"), bytes.fromhex("ecffffff" + "ff" * 27 + "7f")]
    stranger = Identity.fresh()
    return {
        "own advert left out": adverts[1:],
        "own advert changed": [sign(replace(mine, channel=Pair.fresh().public), identities["silo0"]), *adverts[1:]],
        "own key shown as another's": [mine, sign(replace(theirs, channel=mine.channel), identities["silo1"]), *rest],
        "two silos with one key": [mine, theirs, sign(replace(rest[0], channel=theirs.channel), identities["silo2"])],
        "one silo twice": [*adverts, sign(replace(theirs, channel=Pair.fresh().public), identities["silo1"])],
        "the same advert twice": [*adverts, theirs],
        "a forged signature": [mine, replace(theirs, channel=Pair.fresh().public), *rest],
        "signed by another": [mine, sign(theirs, identities["silo2"]), *rest],
        "a stranger": [*adverts, sign(replace(theirs, name="stranger", channel=Pair.fresh().public), stranger)],
        "of another session": [mine, sign(replace(theirs, session=bytes(32)), identities["silo1"]), *rest],
        **{
            f"a key of low order {i}": [mine, sign(replace(theirs, channel=key), identities["silo1"]), *rest]
            for i, key in enumerate(low)
        },
        "too few": adverts[:2],
        "nobody": [],
    }


ADVERTS = gathered()


@pytest.mark.parametrize("lie", bad_adverts())
def test_false_adverts_are_refused(lie):
    _, members, adverts, _ = ADVERTS
    with pytest.raises(SiloError):
        members["silo0"].open(bad_adverts()[lie])
    assert members["silo0"].open(adverts)[1].nonce


def test_false_openings_are_refused():
    session, members, adverts, _ = ADVERTS
    opened = {name: member.open(adverts) for name, member in members.items()}
    openings = [opening for _, opening in opened.values()]
    me, call = opened["silo0"][0], session.call("a", names(5))
    wrong = [
        openings[1:],
        [*openings, openings[0]],
        [replace(openings[0], nonce=bytes(32)), *openings[1:]],
        [*openings[:4], Opening(session.session, "stranger", bytes(32))],
        [replace(openings[0], session=bytes(32)), *openings[1:]],
    ]
    for some in wrong:
        with pytest.raises(SiloError):
            me.deposit(some, call)
    assert me.deposit(openings, call)[1].boxes.keys() == set(names(5)[1:])


def test_silos_that_were_shown_different_adverts_open_nothing_of_each_other():
    session, members, adverts, _ = ADVERTS
    shown = {name: adverts if name in ("silo0", "silo1") else adverts[2:] for name in members}
    opened = {name: member.open(shown[name]) for name, member in members.items()}
    openings = {name: opening for name, (_, opening) in opened.items()}
    calls = {5: session.call("a", names(5)), 3: session.call("a", names(5)[2:])}
    dealt = {
        name: opened[name][0].deposit([openings[advert.name] for advert in some], calls[len(some)])
        for name, some in shown.items()
    }
    whole = Round(replace(session, gathered=tuple(adverts), opened=tuple(openings.values())), "a", names(5), TASK, 3)
    for _, deposit in dealt.values():
        whole.deposit(deposit)
    assert whole.deposits.keys() == {"silo0", "silo1"} and len(whole.liars) == 3
    forced = {name: deposit for name, (_, deposit) in dealt.items()}

    def parcel(deposit: Deposit, box: Box) -> Parcel:
        return Parcel(deposit.public, deposit.commitment, box.of_self, box.of_pair, box.sealed)

    other = forced["silo2"].boxes["silo3"]
    parcels = {name: parcel(forced[name], forced[name].boxes.get("silo0", other)) for name in names(5)[1:]}
    with pytest.raises(SiloError, match="does not open"):
        dealt["silo0"][0].deliver(Delivery(session.session, "a", parcels), TASK)


def test_a_changed_box_key_or_hash_is_noticed_before_training():
    s = stage(5)
    dealt, delivery = s.states["silo0"][0], s.delivered["silo0"]
    parcel, swapped = delivery.parcels["silo1"], delivery.parcels["silo2"]
    for wrong in (
        replace(parcel, public=Pair.fresh().public),
        replace(parcel, public=bytes(32)),
        replace(parcel, commitment=digest(b"")),
        replace(parcel, of_self=parcel.of_pair, of_pair=parcel.of_self),
        replace(parcel, sealed=parcel.sealed[:-1] + bytes([parcel.sealed[-1] ^ 1])),
        replace(parcel, sealed=swapped.sealed),
        swapped,
    ):
        with pytest.raises(SiloError, match="silo1 dealt"):
            dealt.deliver(replace(delivery, parcels={**delivery.parcels, "silo1": wrong}), TASK)


def test_messages_of_an_old_session_are_refused():
    old, new = begin(*agree(names(4)), 1), begin(*agree(names(4)), 2)
    x = {name: np.ones(2, np.uint32) for name in names(4)}
    old, outcome = take(old, "a", x)
    said = outcome.view.answers[0][0]
    for member in (
        new.members["silo0"],
        Member("silo0", new.members["silo0"].identity, new.members["silo0"].agreement),
    ):
        for message in (
            lambda m: m.join(old.session.invite()) if m._session else m.open(old.session.gathered),
            lambda m: m.open(old.session.gathered),
            lambda m: m.deposit(old.session.opened, old.session.call("b", names(4))),
            lambda m: m.deliver(outcome.view.delivered["silo0"], TASK),
            lambda m: m.reveal(said),
        ):
            with pytest.raises(SiloError):
                message(member)


# The lies that it does not see


def test_every_split_of_five_silos_opens_at_most_the_sum_of_four_who_heard_the_same():
    """Each silo may be told any set of survivors that it would answer: all 3,125 ways."""
    s = stage(5)
    sets = [names(5), *combinations(names(5), 4)]
    answers = {(name, i): s.answer(name, s.said(told)) for name in names(5) for i, told in enumerate(sets)}
    said = [s.said(told) for told in sets]
    opened = set()
    for views in product(*[[i for i, told in enumerate(sets) if name in told] for name in names(5)]):
        # A reveal opens if three neighbours of its silo heard the same; of the ways without hope one in eight is tried.
        heard = [(said[i], answers[name, i]) for name, i in zip(names(5), views, strict=True)]
        if max(map(views.count, views)) >= 4 or hash(views) % 8 == 0:
            found = claimed(s, s.seen(heard))
            assert len(found) <= 1 and all(len(group) >= 4 for group in found)
            opened |= found
    assert opened == {frozenset(told) for told in sets}


@pytest.mark.parametrize("seed", range(8))
def test_random_views_with_a_corrupt_silo_never_open_less_than_the_claim(seed):
    """The corrupt silo answers every statement, and gives all it knows; n = 6 and 7, one of them corrupt."""
    n, rng = 6 + seed % 2, np.random.default_rng(seed)
    s, corrupt = stage(n, corrupt="0.17"), f"silo{n - 1}"
    honest = names(n)[:-1]
    for _ in range(25):
        sets = [sorted(rng.choice(names(n), rng.integers(n - 2, n + 1), replace=False)) for _ in range(3)]
        told = {name: s.said([*map(str, sets[rng.integers(3)])]) for name in honest}
        answers = s.answers(told)
        for said in {name_of(said): said for said in told.values()}.values():
            answers += s.answers({corrupt: said})
        claimed(s, s.seen(answers, [corrupt]))


def test_half_told_one_set_and_half_another_open_neither():
    s = stage(6)
    one, two = s.said(names(6)[:5]), s.said(names(6)[1:])
    told = {name: one if name < "silo3" else two for name in names(6)}
    answers = s.answers(told)
    assert len(answers) == 6 and claimed(s, s.seen(answers)) == set()


def test_each_told_that_it_alone_and_its_non_neighbours_live_answers_nothing():
    s = stage(40, dropout="0.1")
    scope = s.round.scope
    assert len(scope.neighbours("silo00")) < 39
    told = {name: s.said(set(names(40)) - set(scope.neighbours(name))) for name in names(40)}
    assert s.answers(told) == []


def test_silos_of_a_sparse_graph_told_of_as_few_neighbours_as_they_accept_open_nothing_forbidden():
    s = stage(40, dropout="0.1")
    scope, told = s.round.scope, {}
    for name in names(40):
        dead = scope.neighbours(name)[: len(scope.neighbours(name)) - scope.threshold]
        told[name] = s.said(set(names(40)) - set(dead))
    answers = s.answers(told)
    assert len(answers) == 40 and claimed(s, s.seen(answers)) == set()


def test_a_silo_with_another_model_is_in_no_sum():
    s = stage(5, changed="silo4")
    for told in (names(5), names(5)[:4]):
        heard = {name: s.said(told) for name in names(5)[:4]} | {"silo4": s.said(names(5), task=OTHER)}
        found = claimed(s, s.seen(s.answers(heard)))
        assert found == ({frozenset(told)} if len(told) == 4 else set())
        assert s.answer("silo4", s.said(names(5))) is None


def test_a_late_vector_of_a_silo_declared_dead_stays_hidden():
    """Its pair masks open, its own does not: the second mask is for this."""
    s = stage(5)
    found = claimed(s, s.seen(s.answers(dict.fromkeys(names(5)[:4], s.said(names(5)[:4])))))
    assert found == {frozenset(names(5)[:4])}


def test_calls_that_differ_from_silo_to_silo_open_nothing_across():
    """The same label for two cohorts: boxes and masks are bound to the cohort, too."""
    world = begin(*agree(names(5)))
    calls = {name: world.session.call("a", names(5) if name != "silo4" else names(5)[1:]) for name in names(5)}
    dealt = {name: m.deposit(world.session.opened, calls[name]) for name, m in world.members.items()}
    round_ = Round(world.session, "a", names(5), TASK, 2)
    assert [round_.deposit(deposit) for _, deposit in dealt.values()] == [True] * 4 + [False]
    assert "another call" in round_.liars["silo4"]
    with pytest.raises(SiloError):
        dealt["silo4"][0].deliver(round_.deliveries()["silo1"], TASK)


def test_nobody_chooses_the_graph_by_label_or_cohort():
    bond = stage(40, dropout="0.1").round.session.bond
    graphs = [silo.Scope(bond, label, bond.members).neighbours("silo00") for label in ("a", "b", "c")]
    fewer = silo.Scope(bond, "a", bond.members[:30]).neighbours("silo00")
    assert len(set(graphs)) == 1
    assert set(fewer) == set(graphs[0]) & set(bond.members[:30])


def test_no_choice_of_cohort_makes_corrupt_silos_more_than_was_agreed():
    """Ten per cent of thirty silos are three; they may all be among the ten that are called."""
    terms, _, _ = agree(names(15), corrupt="0.2", minimum=5)
    bond = silo.Bond(terms, bytes(32), bytes(32), tuple(names(15)))
    for n in range(6, 16):
        scope = silo.Scope(bond, "a", tuple(names(15)[:n]))
        assert 2 * scope.threshold > n - 1 + terms.colluders
