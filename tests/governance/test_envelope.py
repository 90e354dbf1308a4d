"""Envelopes: what is sealed is what arrives, for whom it was sealed, and nothing else opens."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from foedus.governance import envelope
from foedus.governance.envelope import (
    ANSWER,
    ASK,
    NOTHING,
    OVERHEAD,
    Reason,
    Refused,
    name_of,
    number_of,
    seal,
    unseal,
)
from foedus.secure.keys import Identity, spell

CHAIR, SILO = Identity(bytes(32)), Identity(bytes([1] * 32))
TREATY = bytes([7] * 32)
BLOB = seal(CHAIR, SILO.public, TREATY, 5, b"body")


def opened(blob: bytes, **changes):
    values = {"kind": ASK, "senders": {CHAIR.public}, "receiver": SILO.public, "most": 100, **changes}
    return unseal(blob, **values)


def reason(blob: bytes, **changes) -> Reason:
    with pytest.raises(Refused) as caught:
        opened(blob, **changes)
    assert str(caught.value).startswith(f"refused ({caught.value.reason}): expected ")
    return caught.value.reason


@settings(max_examples=50)
@given(some.binary(max_size=100), some.integers(1, 2**64 - 1), some.binary(min_size=32, max_size=32))
def test_an_envelope_arrives_as_it_was_sealed(body, number, treaty):
    found = opened(seal(CHAIR, SILO.public, treaty, number, body))
    assert (bytes(found.body), found.number, found.treaty) == (body, number, treaty)
    assert (found.sender, found.receiver) == (CHAIR.public, SILO.public)


def test_equal_values_give_equal_bytes_and_one_overhead():
    assert seal(CHAIR, SILO.public, TREATY, 5, b"body") == BLOB and len(BLOB) == OVERHEAD + 4 == 249
    assert number_of(BLOB) == 5 and name_of(BLOB) == opened(BLOB).name


def test_no_bit_can_be_changed():
    for bit in range(8 * len(BLOB)):
        changed = bytearray(BLOB)
        changed[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(Refused):
            opened(bytes(changed))


def test_no_end_can_be_cut_off_and_nothing_added():
    for cut in range(len(BLOB)):
        assert reason(BLOB[:cut]) == Reason.TRUNCATED
    assert reason(BLOB + b"x") == Reason.TRUNCATED


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"most": 3}, Reason.OVERSIZED),
        ({"senders": {SILO.public}}, Reason.STRANGER),
        ({"senders": set()}, Reason.STRANGER),
        ({"receiver": CHAIR.public}, Reason.MISDIRECTED),
        ({"kind": ANSWER}, Reason.MALFORMED),
    ],
)
def test_an_envelope_opens_for_whom_and_as_what_it_was_sealed(changes, expected):
    assert reason(BLOB, **changes) == expected


def test_an_answer_names_the_ask_and_is_none_itself():
    answer = seal(SILO, CHAIR.public, TREATY, 5, b"", answers=name_of(BLOB))
    assert opened(answer, kind=ANSWER, senders={SILO.public}, receiver=CHAIR.public).answers == name_of(BLOB)
    assert reason(answer, senders={SILO.public}, receiver=CHAIR.public) == Reason.MALFORMED


@pytest.mark.parametrize("kind", [ASK, ANSWER], ids=["opened as an ask", "opened as an answer"])
@pytest.mark.parametrize(
    ("called", "answers"),
    [(ANSWER, NOTHING), (ASK, name_of(BLOB))],
    ids=["an answer to nothing", "an ask that answers"],
)
def test_an_envelope_is_what_it_is_called_whoever_signed_it(kind, called, answers):
    head = envelope._HEAD.pack(
        envelope.MAGIC, called, 5, 4, CHAIR.public, SILO.public, TREATY, answers, sha256(b"body").digest()
    )
    blob = head + CHAIR.sign(spell(envelope._CONTEXT, head)) + b"body"
    assert reason(blob, kind=kind) == Reason.MALFORMED


def test_an_ask_has_a_number():
    assert reason(seal(CHAIR, SILO.public, TREATY, 0, b"body")) == Reason.MALFORMED


def test_a_signature_for_another_purpose_is_none(monkeypatch):
    monkeypatch.setattr(envelope, "_CONTEXT", "foedus treaty 1")
    other = seal(CHAIR, SILO.public, TREATY, 5, b"body")
    monkeypatch.undo()
    assert reason(other) == Reason.FORGED


def test_whoever_cannot_sign_makes_nobody_hash_what_he_sends(monkeypatch):
    forged = BLOB[: OVERHEAD - 64] + bytes(64) + BLOB[OVERHEAD:]
    monkeypatch.setattr(envelope.hashlib, "sha256", None)
    assert reason(forged) == Reason.FORGED and reason(BLOB[:-1]) == Reason.TRUNCATED


def test_every_reason_has_its_advice():
    assert {Refused(reason, "x", "y").do for reason in Reason} and set(envelope._ADVICE) == set(Reason)
