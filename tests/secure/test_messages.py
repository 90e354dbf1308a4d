"""Messages: one spelling each, nothing else is read, and a golden list of what each shows."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus import wire
from foedus.errors import GuaranteeError, WireError
from foedus.secure import messages
from foedus.secure.messages import (
    Advert,
    Adverts,
    Agreement,
    Box,
    Call,
    Decrypt,
    Decrypted,
    Delivery,
    Deposit,
    Invitation,
    Key,
    Masked,
    Opening,
    Openings,
    Parcel,
    Reveal,
    SumKey,
    Survivors,
    genuine,
    pack,
    sign,
    unpack,
)  # fmt: skip
from foedus.secure.silo import Member
from foedus.secure.simulate import agree, begin, names, take


def octets(word: str, size: int = 32) -> bytes:
    return hashlib.shake_256(word.encode()).digest(size)


CALL = Call(octets("session"), "train 4", ("a", "b", "c"))
ADVERT = Advert(octets("session"), "a", octets("key"), octets("commitment"))
OPENING = Opening(octets("session"), "a", octets("nonce"))
BOXES = {name: Box(octets(name), octets(name + "1"), octets(name, 80)) for name in "bc"}
DEPOSIT = Deposit(octets("session"), "a", "train 4", octets("call"), octets("public"), octets("commitment"), BOXES)
PARCEL = Parcel(octets("public"), octets("commitment"), octets("b"), octets("b1"), octets("b", 80))
KEYS = {name: Key(octets(name), octets(name + "1"), octets(name, 16)) for name in "bc"}
EXAMPLES = [
    Invitation(octets("agreement"), octets("nonce")),
    ADVERT,
    Adverts((ADVERT, replace(ADVERT, name="b"))),
    OPENING,
    Openings((OPENING, replace(OPENING, name="b"))),
    CALL,
    DEPOSIT,
    Delivery(octets("session"), "train 4", {"b": PARCEL, "c": PARCEL}),
    Masked(octets("session"), "a", "train 3", "5a" * 32, octets("words")),
    Survivors(octets("session"), "train 3", octets("call"), "5a" * 32, ("a", "b", "c"), ("a", "b"), CALL),
    Survivors(octets("session"), "train 3", octets("call"), "5a" * 32, ("a", "b", "c"), ("a", "b")),
    Reveal(octets("session"), "a", "train 3", octets("statement"), octets("sealed", 80), KEYS, DEPOSIT),
    Reveal(octets("session"), "a", "train 3", octets("statement"), octets("sealed", 80), KEYS),
    SumKey(Invitation(octets("agreement"), octets("nonce")), "a", octets("key", 90)),
    Decrypt(octets("session"), "train 3", ("a", "b"), octets("total", 80)),
    Decrypted(octets("request"), "a", octets("words", 40)),
]
SHOWN = {
    "Invitation": "agreement=32 nonce=32 signature=64",
    "Advert": "channel=32 commitment=32 name session=32 signature=64",
    "Opening": "name nonce=32 session=32",
    "Call": "cohort label session=32",
    "Deposit": "boxes=288 call=32 commitment=32 label name public=32 session=32 signature=64",
    "Delivery": "label parcels=416 session=32",
    "Masked": "label name session=32 signature=64 task words=32",
    "Survivors": "call=32 label next participants session=32 signature=64 survivors task",
    "SumKey": "invitation=440 key=90 name signature=64",
    "Decrypt": "purpose session=32 signature=64 survivors total=80",
    "Decrypted": "name request=32 signature=64 words=40",
    "Reveal": "keys=160 label name next sealed=80 session=32 signature=64 statement=32",
}
"""What each message shows: texts and lists of names, and byte strings with their length. Two neighbours each."""


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_what_is_packed_is_unpacked(message):
    assert unpack(type(message), pack(message)) == message
    assert pack(unpack(type(message), pack(message))) == pack(message)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_is_read_as_nothing_else(message):
    for other in {type(example) for example in EXAMPLES} - {type(message)}:
        with pytest.raises(WireError):
            unpack(other, pack(message))


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_truncated_or_longer_message_is_refused(message):
    blob = pack(message)
    for damaged in (blob[:-1], blob[: len(blob) // 2], b"", blob + b"\0"):
        with pytest.raises(WireError):
            unpack(type(message), damaged)


@given(st.sampled_from(EXAMPLES), st.integers(0), st.integers(1, 255))
def test_a_damaged_message_is_refused_or_is_another(message, place, change):
    blob = bytearray(pack(message))
    blob[place % len(blob)] ^= change
    try:
        assert unpack(type(message), bytes(blob)) != message
    except WireError:
        pass


@given(st.sampled_from(sorted({type(example) for example in EXAMPLES}, key=str)), st.binary(max_size=300))
def test_noise_is_no_message(kind, blob):
    with pytest.raises(WireError):
        unpack(kind, blob)


def test_every_message_shows_what_the_list_says_and_no_more():
    for message in EXAMPLES:
        kind = type(message).__name__
        if kind not in SHOWN or getattr(message, "next", None) is not None:
            continue
        tree, facts = wire.unpack(pack(message))
        sizes = {key[0]: f"={x.size}" for key, x in tree.items() if x.size}
        assert facts.keys() - {"kind"} | sizes.keys() | {"next"} >= {f.name for f in fields(message)}
        assert (
            " ".join(f.name + sizes.get(f.name, "") for f in sorted(fields(message), key=lambda f: f.name))
            == SHOWN[kind]
        )
        assert all(x.dtype == np.uint8 and x.ndim == 1 for x in tree.values())


def test_the_bytes_of_messages_are_pinned():
    """A change of these is a change of the format: raise `keys._CONTEXT`."""
    assert hashlib.sha256(b"".join(map(pack, EXAMPLES))).hexdigest() == GOLDEN


def test_lists_of_names_are_sorted_and_without_repetition():
    for cohort in (("b", "a"), ("a", "a"), ("a", ""), (1,)):
        facts = {"kind": "Call", "label": "x", "cohort": list(cohort)}
        blob = wire.pack({("session",): np.zeros(32, np.uint8)}, facts)
        with pytest.raises(WireError):
            unpack(Call, blob)


@pytest.mark.parametrize("change", [{"session": b"short"}, {"label": ""}, {"cohort": None}])
def test_what_no_message_can_hold_is_not_packed(change):
    with pytest.raises(WireError):
        unpack(Call, pack(replace(CALL, **change)))


def test_a_reveal_has_room_for_one_value_a_neighbour():
    world = begin(*agree(names(5)))
    x = {name: np.zeros(2, np.uint32) for name in world.members}
    _, outcome = take(world, "a", x)
    for _, reveal in outcome.view.answers:
        assert len(reveal.sealed) == 4 * 32 + 16


def test_a_signature_is_for_one_kind_of_message_and_every_field_of_it():
    _, identity, _ = agree(names(3))
    for message in EXAMPLES:
        if not hasattr(message, "signature"):
            continue
        signed = sign(message, identity)
        assert genuine(signed, identity.public) and not genuine(message, identity.public)
        for f in fields(message):
            value = getattr(signed, f.name)
            if isinstance(value, bytes):
                changed = replace(signed, **{f.name: bytes([value[0] ^ 1]) + value[1:]})
            elif isinstance(value, str):
                changed = replace(signed, **{f.name: value + "x"})
            elif isinstance(value, dict):
                changed = replace(signed, **{f.name: dict(list(value.items())[1:])})
            elif isinstance(value, Invitation):
                changed = replace(signed, invitation=replace(value, nonce=octets("another")))
            elif isinstance(value, tuple):
                changed = replace(signed, **{f.name: value[1:]})
            else:
                changed = replace(signed, next=None if value else CALL if isinstance(message, Survivors) else DEPOSIT)
            assert not genuine(changed, identity.public), f.name


def agreement(**change) -> Agreement:
    roster = {name: octets(name) for name in names(20)}
    terms = {"word": 32, "corrupt": Fraction("0.1"), "dropout": Fraction("0.1"), "minimum": 4, "roster": roster}
    return Agreement("t", "m", coordinator=octets("coordinator"), **{**terms, **change})


def test_an_agreement_that_would_show_less_than_two_honest_silos_cannot_be_made():
    for change in ({"minimum": 3}, {"minimum": 2, "corrupt": Fraction(0)}, {"minimum": 1, "corrupt": Fraction(0)}):
        with pytest.raises(GuaranteeError, match="two honest silos"):
            agreement(**change)


def test_an_agreement_of_other_words_or_shared_identities_cannot_be_made():
    with pytest.raises(GuaranteeError, match="16, 32 or 64"):
        agreement(word=8)
    shared = {name: octets("same") for name in names(20)}
    for roster in (shared, {"a": octets("coordinator"), "b": octets("b")}):
        with pytest.raises(GuaranteeError, match="identity of its own"):
            agreement(roster=roster, corrupt=Fraction(0))


def test_every_term_of_an_agreement_is_in_its_digest():
    changes = [
        {"word": 16}, {"corrupt": Fraction("0.05")}, {"dropout": Fraction("0.2")}, {"minimum": 5}, {"neighbours": 8},
        {"threshold": 9}, {"roster": {name: octets(name + "x") for name in names(20)}},
    ]  # fmt: skip
    terms = [agreement(), *(agreement(**change) for change in changes)]
    terms += [replace(terms[0], treaty="u"), replace(terms[0], model="u"), replace(terms[0], coordinator=octets("u"))]
    assert len({term.digest for term in terms}) == len(terms)
    assert agreement().digest == agreement().digest


def test_no_message_holds_a_secret_or_an_input():
    """Everything that a sum sends, as bytes, searched for every secret of every silo at every step."""
    secrets, blobs = set(), []
    terms = agree(names(4))
    drawn = Recorder(secrets)
    world = begin(*terms)
    world = replace(world, members={k: replace(v, entropy=drawn.wrap(v.entropy)) for k, v in world.members.items()})
    x = {name: np.frombuffer(octets(name), np.uint32).copy() for name in world.members}
    world, _ = take(world, "a", x, ahead="b")
    _, outcome = take(world, "b", x)
    blobs = [blob for blob, _ in world.past.values()] + [words.tobytes() for _, words in outcome.view.masked.values()]
    assert len(secrets) == 4 * 2 * 6  # a pair, a secret, a key of the values, and a coefficient for each
    hidden = {secret[1:-1] for secret in secrets} | {words.tobytes() for words in x.values()}  # keys are clamped
    assert not [secret for secret in hidden for blob in blobs if secret in blob]


class Recorder:
    """Notes all bytes that silos draw."""

    def __init__(self, into: set[bytes]) -> None:
        self.into = into

    def wrap(self, entropy):
        def draw(count: int) -> bytes:
            drawn = entropy(count)
            self.into.add(drawn)
            return drawn

        return draw


def test_only_named_kinds_are_messages():
    assert {type(example).__name__ for example in EXAMPLES} == {kind.__name__ for kind in messages.Message.__args__}
    assert not any(isinstance(value, Member) for value in EXAMPLES)


GOLDEN = "b2c0ac32ce234d487febc5f5abf492d07a1db519313592d21f85911cc478f753"
