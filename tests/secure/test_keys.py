"""Keys do what their standards say, refuse what is no key, and never show a secret."""

from __future__ import annotations

import copy
import hmac
import pickle
import traceback
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.errors import GuaranteeError, WireError
from foedus.secure import keys, shamir
from foedus.secure.keys import Identity, Pair, Secretive

SECRET = bytes(range(32))
LOW_ORDER = [  # every u of low order modulo p = 2²⁵⁵ − 19, in all its spellings of 255 bits
    *(value.to_bytes(32, "little") for p in [2**255 - 19] for value in (0, 1, p - 1, p, p + 1)),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
]
words = st.lists(st.text(max_size=4) | st.binary(max_size=4) | st.integers(-300, 300), max_size=4)


def test_an_identity_signs_as_rfc_8032_says():
    me = Identity(bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"))
    assert me.public.hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert me.sign(b"").hex() == (
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
    )


def test_a_signature_holds_for_its_key_and_its_words_only():
    me, other = Identity.fresh(), Identity.fresh()
    signature = me.sign(b"survivors")
    assert keys.verify(me.public, signature, b"survivors")
    assert not keys.verify(me.public, signature, b"survivors.")
    assert not keys.verify(other.public, signature, b"survivors")
    assert not keys.verify(me.public, signature[:-1] + bytes([signature[-1] ^ 1]), b"survivors")


@pytest.mark.parametrize("public", [b"", b"short", bytes(33), b"\xff" * 32])
def test_what_is_no_key_or_no_signature_verifies_nothing(public):
    assert not keys.verify(public, bytes(64), b"")
    assert not keys.verify(Identity(SECRET).public, b"", b"")


def test_two_agree_as_rfc_7748_says():
    u = k = (9).to_bytes(32, "little")
    for round_ in range(1, 1001):
        u, k = k, Pair(k).agree(u)
        if round_ == 1:
            assert k.hex() == "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    assert k.hex() == "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51"


def test_both_sides_agree_and_a_third_does_not():
    a, b, c = Pair.fresh(), Pair.fresh(), Pair.fresh()
    assert a.agree(b.public) == b.agree(a.public) != c.agree(a.public)


@pytest.mark.parametrize("public", [*LOW_ORDER, *(key[:31] + bytes([key[31] | 128]) for key in LOW_ORDER)])
def test_a_key_of_low_order_is_refused(public):
    assert not keys.usable(public)
    with pytest.raises(WireError, match="not of low order"):
        Pair.fresh().agree(public)


@pytest.mark.parametrize("public", [b"", bytes(31), bytes([9] * 33)])
def test_a_key_of_another_length_is_refused(public):
    assert not keys.usable(public)
    with pytest.raises(WireError, match=f"{len(public)} bytes"):
        Pair.fresh().agree(public)


def test_an_honest_key_is_usable():
    assert keys.usable(Pair.fresh().public)


@given(st.binary(min_size=32, max_size=32))
def test_a_drawn_secret_is_clamped_and_so_can_be_shared(drawn):
    pair = Pair.fresh(lambda n: drawn[:n])
    assert int.from_bytes(pair.secret, "big") < shamir.PRIME
    assert pair.public == Pair(drawn).public  # clamping is what X25519 does by itself
    assert shamir.recover(dict(enumerate(shamir.split(pair.secret, 2, [1, 2]), 1))) == pair.secret


def test_the_least_and_the_greatest_draw_are_clamped_too():
    assert Pair.fresh(bytes).secret == bytes([0] * 31 + [64])
    assert Pair.fresh(lambda n: b"\xff" * n).secret == bytes([248] + [255] * 30 + [127])


def test_a_simulator_can_draw_the_same_keys_again():
    assert Pair.fresh(lambda n: b"\7" * n) == Pair.fresh(lambda n: b"\7" * n) != Pair.fresh()
    assert Identity.fresh(lambda n: b"\7" * n) == Identity.fresh(lambda n: b"\7" * n) != Identity.fresh()


@pytest.mark.parametrize("value", [Identity(SECRET), Pair(SECRET)])
def test_a_secret_is_not_printed_pickled_or_copied(value):
    assert value.public  # what it has worked out by now does not show either
    for shown in (repr(value), str(value), f"{value}", repr([value]), repr(Holder(value))):
        assert SECRET.hex() not in shown and repr(SECRET) not in shown and "secret" in shown
    for leak in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(GuaranteeError, match="stay in the memory"):
            leak(value)


@dataclass(frozen=True, repr=False)
class Holder(Secretive):
    inside: Secretive


@given(words, words)
def test_no_two_lists_of_words_are_spelled_alike(one, other):
    assert (keys.spell(*one) == keys.spell(*other)) == (list(map(kind, one)) == list(map(kind, other)))


def test_words_keep_their_borders_and_their_kinds():
    alike = [("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), (b"abc",), (1,), ("1",), (b"1",), ()]
    assert len({keys.spell(*words) for words in alike}) == len(alike)


def kind(word):
    return type(word), word


def test_the_key_schedule_is_pinned():
    one = "0000000000000001"
    assert keys.spell("a", 1, b"\0").hex() == f"73{one}61" + f"69{one}31" + f"62{one}00"
    derived = keys.hkdf(SECRET, b"salt", "mask", "train 3", 7, b"x")
    assert derived.hex() == "dc8ee07b09afaf1ef1e4756a571d7392359677ed89bab84ae222e6e82c7f4523"


@given(st.binary(max_size=40), st.binary(max_size=40), words)
def test_hkdf_is_that_of_rfc_5869(secret, salt, words):
    extracted = hmac.digest(salt or bytes(32), secret, "sha256")
    expected = hmac.digest(extracted, keys.spell("foedus secure 1", *words) + b"\1", "sha256")
    assert keys.hkdf(secret, salt, *words) == expected


def test_a_box_is_the_one_of_the_published_vectors():
    """McGrew and Viega's test cases 13 and 14 of GCM, whose nonce is zero as ours is."""
    assert keys.seal(bytes(32), b"").hex() == "530f8afbc74536b9a963b4f1c4cb738b"
    assert keys.seal(bytes(32), bytes(16)).hex() == "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919"


@given(st.binary(max_size=80), st.binary(max_size=20))
def test_a_box_opens_for_its_key_and_its_circumstances_only(blob, associated):
    box, other = keys.seal(SECRET, blob, associated), bytes(32)
    assert len(box) == len(blob) + 16 and keys.unseal(SECRET, box, associated) == blob
    for wrong in (bytes([box[0] ^ 1]) + box[1:], box[:-1], b""):
        with pytest.raises(WireError, match="a box sealed under this key"):
            keys.unseal(SECRET, wrong, associated)
    for key, circumstances in ((other, associated), (SECRET, associated + b"!")):
        with pytest.raises(WireError, match="a box sealed under this key"):
            keys.unseal(key, box, circumstances)


def test_errors_quote_no_secret():
    pair = Pair(SECRET)
    for fail in (lambda: pair.agree(bytes(32)), lambda: keys.unseal(SECRET, b"box"), lambda: pickle.dumps(pair)):
        with pytest.raises((WireError, GuaranteeError)) as caught:
            fail()
        told = "".join(traceback.format_exception(caught.value))
        assert SECRET.hex() not in told and repr(SECRET) not in told and caught.value.__cause__ is None
