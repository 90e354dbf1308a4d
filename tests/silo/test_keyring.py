"""A silo's side of encrypted sums: it encrypts under no key but the holder's, and a holder opens each sum once."""

from __future__ import annotations

import pickle
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from foedus.errors import FoedusError, GuaranteeError, SiloError
from foedus.secure.backends import SecretKey
from foedus.secure.holder import Holder, told
from foedus.secure.keys import Identity
from foedus.secure.messages import Agreement, Decrypt, Decrypted, Invitation, SumKey, pack, sign, unpack
from foedus.silo.keyring import Keyring
from foedus.stages.encrypt import ENCRYPTED, Encrypt, Encrypted
from foedus.stages.words import SUM, layout_of
from foedus.types import Task, Update

NAMES = ("a", "b", "c", "d")
HOLDERS = ("a", "b")
WHAT = Encrypted(layout_of({("delta", "w"): (5,)}, (), 32, len(NAMES)))
SUMS = {"train 0": WHAT, "train 1": WHAT}
TASK = Task(0, "model", {}, NAMES, 1)


class Party:
    """Silos of one process and their coordinator. `key`: the answer of the holder "a" to an invitation."""

    def __init__(self) -> None:
        self.identities = {name: Identity.fresh() for name in NAMES}
        self.chair = Identity.fresh()
        self.agreement = self.agree("treaty")
        self.ring = Keyring(self.agreement, self.identities, HOLDERS, SUMS)
        self.key = self.begin()

    def agree(self, treaty: str) -> Agreement:
        roster = {name: one.public for name, one in self.identities.items()}
        return Agreement(treaty, "model", roster, self.chair.public, 32, Fraction(0), Fraction(0), 3)

    def invitation(self, nonce: int = 0, agreement: Agreement | None = None) -> Invitation:
        return sign(Invitation((agreement or self.agreement).digest, bytes([nonce] * 32)), self.chair)

    def begin(self, nonce: int = 0) -> SumKey:
        self.key = unpack(SumKey, self.ring.answer("keys", "a", pack(self.invitation(nonce))))
        return self.key

    @property
    def session(self) -> bytes:
        return self.ring._drawn["a"].session

    def give(self, silo: str, words: np.ndarray, purpose: str = "train 0") -> bytes:
        """What leaves a silo."""
        self.ring.deliver(silo, pack(self.key), "task")
        self.ring.gives(silo, purpose, words.tobytes().hex())
        sent = Encrypt(WHAT, self.ring).encode(Update({SUM: words}, silo=silo), TASK).tensors
        assert sent.keys() == {ENCRYPTED}
        return sent[ENCRYPTED].tobytes()

    def total(self, silos: str = "abcd", purpose: str = "train 0") -> bytes:
        adder = WHAT.adder(self.ring._drawn["a"].key.public)
        for silo in silos:
            adder.add(self.give(silo, words_of(silo), purpose))
        return adder.total()

    def request(self, total: bytes, survivors: str = "abcd", purpose: str = "train 0") -> Decrypt:
        return sign(Decrypt(self.session, purpose, tuple(survivors), total), self.chair)

    def ask(self, request: Decrypt) -> np.ndarray:
        answer = unpack(Decrypted, self.ring.answer("decrypt", "a", pack(request)))
        values = told(answer, request, "a", self.agreement, WHAT.sums)
        return WHAT.lowered(values, len(request.survivors))


def words_of(silo: str) -> np.ndarray:
    return np.full(5, "abcd".index(silo) + 1, np.uint32)


def sum_of(silos: str) -> np.ndarray:
    return sum(words_of(silo) for silo in silos)


@pytest.fixture
def party() -> Party:
    return Party()


class Kept:
    """A journal in memory that outlives keyrings."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], tuple[str, tuple[str, ...]]] = {}

    def gives(self, silo, purpose, words):
        raise AssertionError("a silo that encrypts cannot wait to be told what was opened")

    def opens(self, silo, purpose, words, survivors):
        if self.rows.setdefault((silo, purpose), (words, tuple(survivors))) != (words, tuple(survivors)):
            raise GuaranteeError("one opening", "a second", "Stop.")


def test_the_sum_of_whoever_came_is_opened(party):
    assert (party.ask(party.request(party.total())) == sum_of("abcd")).all()
    assert (party.ask(party.request(party.total("bcd", "train 1"), "bcd", "train 1")) == sum_of("bcd")).all()


# ---- whose key ----


def forged_by_another(party) -> SumKey:
    return sign(replace(party.key), party.identities["c"])


def of_a_silo_that_is_no_holder(party) -> SumKey:
    return sign(replace(party.key, name="c"), party.identities["c"])


def with_another_key_inside(party) -> SumKey:
    return replace(party.key, key=SecretKey.fresh(WHAT.sums.ring).public.pack())


def moved_to_another_session(party) -> SumKey:
    return replace(party.key, invitation=party.invitation(nonce=1))


def for_another_agreement(party) -> SumKey:
    invitation = party.invitation(agreement=party.agree("another treaty"))
    return sign(replace(party.key, invitation=invitation), party.identities["a"])


def without_the_coordinator(party) -> SumKey:
    invitation = sign(Invitation(party.agreement.digest, bytes(32)), party.identities["a"])
    return sign(replace(party.key, invitation=invitation), party.identities["a"])


def for_no_session(party) -> SumKey:
    return sign(replace(party.key, invitation=None), party.identities["a"])


def with_other_parameters(party) -> SumKey:
    other = Encrypted(layout_of({("delta", "w"): (5,)}, (), 16, 3)).sums.ring
    assert other != WHAT.sums.ring
    return sign(replace(party.key, key=SecretKey.fresh(other).public.pack()), party.identities["a"])


def with_garbage(party) -> SumKey:
    return sign(replace(party.key, key=b"garbage"), party.identities["a"])


@pytest.mark.parametrize("wrong", [
    forged_by_another, of_a_silo_that_is_no_holder, with_another_key_inside, moved_to_another_session,
    for_another_agreement, without_the_coordinator, for_no_session, with_other_parameters, with_garbage,
])  # fmt: skip
def test_a_silo_encrypts_under_no_key_but_that_which_a_holder_signed_for_this_session(party, wrong):
    key = wrong(party)
    with pytest.raises(SiloError):
        party.ring.deliver("d", pack(key), "task")
    with pytest.raises(SiloError, match="a key to encrypt under"):
        Encrypt(WHAT, party.ring).encode(Update({SUM: words_of("d")}, silo="d"), TASK)
    party.ring.deliver("d", pack(party.key), "task")  # the right one is taken


def test_what_is_no_key_at_all_is_refused(party):
    for mail in (b"", b"garbage", pack(party.invitation())):
        with pytest.raises(SiloError):
            party.ring.deliver("d", mail, "task")


def test_a_session_that_is_over_is_not_gone_back_to(party):
    old = party.key
    party.ring.deliver("d", pack(old), "task")
    new = party.begin(nonce=1)
    for _ in range(2):
        party.ring.deliver("d", pack(new), "task")
    with pytest.raises(SiloError, match="a session that is over"):
        party.ring.deliver("d", pack(old), "task")
    party.ring.deliver("c", pack(old), "task")  # who has seen nothing newer cannot know


def test_only_a_key_holder_draws_a_key_and_only_for_what_was_agreed(party):
    with pytest.raises(SiloError, match="a, b to draw the key"):
        party.ring.answer("keys", "c", pack(party.invitation()))
    for wrong in (party.invitation(agreement=party.agree("another")),
                  sign(Invitation(party.agreement.digest, bytes(32)), party.identities["c"])):  # fmt: skip
        with pytest.raises(SiloError, match="invitation to what was agreed"):
            party.ring.answer("keys", "a", pack(wrong))


# ---- what is opened ----


def test_a_sum_of_fewer_than_the_minimum_is_not_opened(party):
    with pytest.raises(FoedusError, match="a sum over 3 to 4 silos"):
        party.ask(party.request(party.total("ab"), "ab"))


def test_a_sum_that_says_another_number_of_silos_than_are_named_is_not_opened(party):
    with pytest.raises(SiloError, match="a sum over the 4 silos that are named"):
        party.ask(party.request(party.total("abc"), "abcd"))
    with pytest.raises(SiloError, match="one over 4"):  # somebody's vector came twice
        party.ask(party.request(party.total("abcc", "train 1"), "abc", "train 1"))


def test_a_sum_is_opened_once_whoever_asks_and_however_often_the_silo_restarts(party):
    journal = Kept()
    party.ring.journal = journal
    before = party.ask(party.request(party.total("abc"), "abc"))
    party.ring = Keyring(party.agreement, party.identities, HOLDERS, SUMS, journal)  # restarted
    party.begin(nonce=1)
    with pytest.raises(GuaranteeError, match="one opening"):
        party.ask(party.request(party.total("abcd"), "abcd"))
    party.begin(nonce=2)
    with pytest.raises(GuaranteeError, match="one opening"):  # as many others
        party.ask(party.request(party.total("bcd"), "bcd"))
    party.begin(nonce=3)
    assert (party.ask(party.request(party.total("abc"), "abc")) == before).all()


def test_without_a_journal_a_silo_still_remembers_while_it_runs(party):
    party.ask(party.request(party.total("abc"), "abc"))
    party.begin(nonce=1)
    with pytest.raises(SiloError, match="one answer to 'decrypt train 0'"):
        party.ask(party.request(party.total("bcd"), "bcd"))


def test_a_session_has_one_request_for_a_sum_so_that_refusals_tell_nothing_of_the_key(party):
    request = party.request(party.total())
    before = party.ask(request)
    assert (party.ask(request) == before).all()  # the same again changes nothing
    with pytest.raises(SiloError, match="one request to open"):
        party.ask(party.request(party.total()))
    party.begin(nonce=1)
    with pytest.raises(FoedusError, match="a sum over 3 to 4 silos"):
        party.ask(party.request(party.total("a"), "abcd"))
    with pytest.raises(SiloError, match="one request to open"):
        party.ask(party.request(party.total("abcd"), "abcd"))


def test_only_sums_of_the_treaty_are_opened_and_only_for_the_coordinator(party):
    total = party.total()
    wrong = {
        "a sum that the treaty speaks of": party.request(total, purpose="train 2"),
        "silos of the roster": party.request(total, survivors="abcx"),
        "that the coordinator signed": replace(party.request(total, purpose="train 1"), signature=bytes(64)),
        "in the session of this key": sign(replace(party.request(total), session=bytes(32)), party.chair),
    }
    for why, request in wrong.items():
        with pytest.raises(SiloError, match=why):
            party.ask(request)
    assert (party.ask(party.request(total)) == sum_of("abcd")).all()  # which uses up nobody's only request


def test_a_silo_without_the_key_opens_nothing(party):
    request = party.request(party.total())
    for silo in ("b", "c"):
        with pytest.raises(SiloError, match="the key of a session"):
            party.ring.answer("decrypt", silo, pack(request))


def test_an_answer_that_is_not_the_holders_to_this_request_is_refused(party):
    request = party.request(party.total())
    answer = unpack(Decrypted, party.ring.answer("decrypt", "a", pack(request)))
    wrong = [
        sign(answer, party.identities["b"]),
        sign(replace(answer, name="b"), party.identities["b"]),
        sign(replace(answer, request=bytes(32)), party.identities["a"]),
        sign(replace(answer, words=answer.words[:-4]), party.identities["a"]),
        replace(answer, words=bytes(len(answer.words))),
    ]
    for one in wrong:
        with pytest.raises(FoedusError):
            told(one, request, "a", party.agreement, WHAT.sums)


# ---- what is given ----


def test_a_silo_gives_one_thing_to_a_sum_since_it_cannot_know_what_was_opened(party):
    party.ring.journal = Kept()
    party.give("a", words_of("a"))
    party.give("a", words_of("a"))  # the same again, encrypted anew
    with pytest.raises(GuaranteeError, match="one opening"):
        party.give("a", words_of("b"))


def test_the_same_words_never_leave_as_the_same_bytes(party):
    assert len({party.give("d", words_of("d")) for _ in range(4)}) == 4


def test_a_holder_is_not_printed_and_not_pickled(party):
    holder = party.ring._drawn["a"]
    assert isinstance(holder, Holder) and repr(holder) == "<Holder: secret>"
    with pytest.raises(GuaranteeError):
        pickle.dumps(holder)


def test_a_step_that_nobody_knows_is_refused(party):
    with pytest.raises(SiloError, match="a step of an encrypted sum"):
        party.ring.answer("unmask", "a", b"")
