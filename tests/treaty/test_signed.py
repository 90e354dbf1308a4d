"""Signed treaties: who takes part, by which key, and that nothing of it can be changed afterwards."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations

import pytest

from foedus.errors import FoedusError, GuaranteeError, TreatyError
from foedus.secure.keys import Identity
from foedus.treaty import Mistakes, parse, signed
from foedus.treaty.signed import Signed, propose, unpack

from ..deploy.parties import TREATY

CHAIR = Identity.fresh()
SILOS = {name: Identity.fresh() for name in ("north", "south", "west")}
KEYS = {name: one.public for name, one in SILOS.items()}


def proposed(text: str = TREATY) -> Signed:
    return propose(parse(text), CHAIR, {**KEYS, "east": Identity.fresh().public})


def complete() -> Signed:
    made = proposed()
    for one in SILOS.values():
        made = made.signed_by(one)
    return made


def test_a_treaty_binds_once_the_coordinator_and_every_silo_signed_it():
    made = proposed()
    for name, one in SILOS.items():
        assert not made.binding and name in made.missing
        with pytest.raises(GuaranteeError, match=name):
            made.require()
        made = made.signed_by(one)
    made.require()
    assert made.binding and made.missing == ()
    assert not replace(made, proposed=b"").binding


def test_signatures_come_in_any_order_and_from_any_copies():
    copies = [proposed().signed_by(one) for one in SILOS.values()]
    assert {proposed().merged(*order).packed() for order in permutations(copies)} == {complete().packed()}


def test_a_file_is_read_back_and_keeps_the_signatures_that_were_there(tmp_path):
    first, second = (proposed().signed_by(SILOS[name]) for name in ("north", "south"))
    signed.save(first, tmp_path)
    path = signed.save(second, tmp_path)
    assert path.name == "tiny.treaty.json" and set(signed.load(path).signatures) == {"north", "south"}


def test_no_byte_of_a_file_can_be_changed():
    blob = complete().packed()
    for place in range(0, len(blob), 61):
        for changed in (blob[:place] + bytes([blob[place] ^ 1]) + blob[place + 1 :], blob[:place]):
            with pytest.raises(FoedusError):
                unpack(changed)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("algorithm", "rounds", 6), ("treaty", "purpose", "another"), ("local", "lr", 0.5), ("treaty", "seed", 2)],
)
def test_any_change_of_a_word_needs_every_signature_anew(section, key, value):
    found = json.loads(complete().packed())
    found["treaty"][section][key] = value
    made = complete()
    changed = made.treaty.replace(**{f"{section}.{key}": value})
    with pytest.raises(GuaranteeError, match="signature"):
        replace(made, treaty=changed)
    with pytest.raises(FoedusError):
        unpack(json.dumps({**found, "digest": changed.digest()}, indent=2, sort_keys=True).encode() + b"\n")


def test_another_key_in_the_roster_needs_every_signature_anew():
    made = complete()
    roster = {**made.roster, "west": Identity.fresh().public}
    with pytest.raises(GuaranteeError, match="signature"):
        replace(made, roster=roster, signatures={"north": made.signatures["north"]}, proposed=b"")
    with pytest.raises(GuaranteeError, match="signature"):
        replace(made, roster=roster, signatures={})
    with pytest.raises(GuaranteeError, match="signature"):
        replace(made, coordinator=Identity.fresh().public, proposed=b"")


def test_a_signature_counts_for_whom_it_was_made_alone():
    made = complete()
    north = made.signatures["north"]
    for signatures in ({"south": north}, {"north": made.proposed}, {"north": b""}, {"north": bytes(64)}):
        with pytest.raises(GuaranteeError, match="signature"):
            replace(made, signatures=signatures)
    with pytest.raises(GuaranteeError, match="signature"):
        replace(made, proposed=north)
    with pytest.raises(GuaranteeError, match="roster"):
        replace(made, signatures={"east": north})


def test_whoever_the_treaty_does_not_name_cannot_sign_it():
    with pytest.raises(GuaranteeError, match="a key that the treaty names"):
        proposed().signed_by(Identity.fresh())


def test_copies_of_other_treaties_or_other_parties_do_not_merge():
    other = proposed(TREATY.replace("seed = 1", "seed = 2"))
    with pytest.raises(GuaranteeError, match=other.digest[:12]):
        proposed().merged(other)
    elsewhere = propose(parse(TREATY), Identity.fresh(), KEYS)
    assert elsewhere.digest == proposed().digest
    with pytest.raises(GuaranteeError, match="other parties"):
        proposed().merged(elsewhere)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('names = ["north", "south", "west"]', 'names = ["north", "noth"]', '"noth"'),
        ('names = ["north", "south", "west"]', "", "names of the silos"),
        ("every = 2", 'every = 2\nbaselines = ["local"]', "baselines"),
    ],
)
def test_a_treaty_that_no_federation_can_carry_out_is_not_proposed(old, new, expected):
    with pytest.raises((Mistakes, GuaranteeError), match=expected):
        proposed(TREATY.replace(old, new))


def test_every_party_has_a_key_of_its_own():
    with pytest.raises(GuaranteeError, match="two share"):
        propose(parse(TREATY), CHAIR, {**KEYS, "west": KEYS["north"]})
    with pytest.raises(GuaranteeError, match="two share"):
        propose(parse(TREATY), CHAIR, {**KEYS, "west": CHAIR.public})


@pytest.mark.parametrize(
    "blob", [b"", b"{}", b"[]", b"null", b"[" * 10**5, b'{"format":2}', b"9" * 10**5, bytes(3_000_000)]
)
def test_what_is_no_signed_treaty_is_told_so(blob):
    with pytest.raises(TreatyError, match="a signed treaty as it was written"):
        unpack(blob)


def test_a_home_finds_a_treaty_by_its_digest(tmp_path):
    made = complete()
    path = signed.save(made, signed.place(tmp_path, made.digest))
    assert signed.found(tmp_path, made.digest) == made and signed.every(tmp_path) == [made]
    assert signed.found(tmp_path, made.digest[:12] + "0" * 52) is None and signed.found(tmp_path, "0" * 64) is None
    path.write_bytes(made.packed().replace(b"tiny", b"tony", 1))
    with pytest.raises(FoedusError):
        signed.found(tmp_path, made.digest)


def test_two_treaties_whose_digests_begin_alike_share_no_folder(tmp_path, monkeypatch):
    """Twelve digits collide after some 2^24 tries of whoever writes treaties; here one digit is enough."""
    monkeypatch.setattr(signed, "SHORT", 1)
    first = complete()
    folder = signed.place(tmp_path, first.digest)
    signed.save(first, folder)
    texts = (TREATY.replace('"tiny"', f'"tiny{i}"') for i in range(1000))
    other = next(made for made in map(proposed, texts) if made.digest[:1] == first.digest[:1])
    with pytest.raises(GuaranteeError, match="copies of treaty"):
        signed.save(other, folder)
    assert [path.name for path in folder.iterdir()] == ["tiny.treaty.json"]


def test_performance_is_each_partys_own():
    quick = parse(TREATY + "[performance]\nthreads = 2\n")
    made = propose(quick, CHAIR, KEYS)
    assert made.digest == proposed().digest and unpack(made.packed()).treaty.performance.threads is None
