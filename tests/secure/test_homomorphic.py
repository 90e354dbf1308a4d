"""Sums under encryption are exact to the last unit, are opened by the key holder alone, and fail closed."""

from __future__ import annotations

import dataclasses
import pickle
import random
import sys
import tracemalloc
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foedus import wire
from foedus.errors import CohortError, GuaranteeError, SiloError, WireError
from foedus.secure import backends, bfv, ckks
from foedus.secure.backends import PublicKey, Ring, SecretKey, public_key
from foedus.secure.bfv import Sums
from foedus.secure.packing import Packing

CASES = [(255, 3), (255, 8), (255, 16), (255, 100), (327, 100), (2**32 // 3 - 1, 3), ((2**64 - 1) // 5, 5)]


@cache
def key_of(ring: Ring) -> SecretKey:
    return SecretKey.fresh(ring)


def vectors(sums: Sums, silos: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, sums.largest, sums.length, np.uint64, endpoint=True) for _ in range(silos)]


def added(sums: Sums, each: list[np.ndarray]) -> bytes:
    adder = bfv.adder(sums, key_of(sums.ring).public)
    for values in each:
        adder.add(bfv.encrypt(sums, adder.key, values))
    return adder.total()


# ---- packing ----


@given(
    largest=st.integers(1, 2**64 - 1), parties=st.integers(1, 300), bits=st.integers(9, 62), count=st.integers(1, 40),
    data=st.data(),
)  # fmt: skip
def test_sums_of_packed_values_are_those_of_the_values_up_to_the_largest(largest, parties, bits, count, data):
    largest = min(largest, (2**64 - 1) // parties)
    packing = Packing(largest, parties, bits)
    values = np.array(data.draw(st.lists(st.sampled_from([0, 1, largest // 2, largest]), min_size=count,
                                         max_size=count)), np.uint64)  # fmt: skip
    slots = packing.pack(values)
    assert len(slots) == packing.slots(count) and int(slots.max()) * parties < 2**bits
    with np.errstate(over="raise"):
        assert (packing.unpack(slots * np.uint64(parties), count) == values * np.uint64(parties)).all()


@given(largest=st.integers(1, 2**40), parties=st.integers(1, 300))
def test_a_value_of_one_more_than_the_largest_is_refused(largest, parties):
    packing = Packing(largest, parties, 45)
    packing.pack(np.array([largest], np.uint64))
    with pytest.raises(SiloError, match="nothing has left this silo"):
        packing.pack(np.array([0, largest + 1], np.uint64))


def test_a_field_holds_the_largest_sum_and_not_one_more():
    for largest, parties in [(255, 4), (255, 100), (1, 1), (2**40, 3)]:
        packing = Packing(largest, parties, 62)
        assert largest * parties < 2**packing.field and largest * parties >= 2 ** (packing.field - 1)


def test_eight_bits_of_a_hundred_silos_go_three_to_a_slot_and_of_sixteen_four():
    assert Sums(9, 255, 100).packing.per_slot == 3 and Sums(9, 255, 16).packing.per_slot == 4


@pytest.mark.parametrize("numbers", [(0, 1, 40), (1, 0, 40), (1, 1, 0), (1, 1, 63)])
def test_a_packing_of_nothing_is_refused(numbers):
    with pytest.raises(ValueError, match="Expected largest"):
        Packing(*numbers)


def test_a_packing_whose_sum_would_overflow_is_refused():
    Packing((2**64 - 1) // 3, 3, 45)
    with pytest.raises(GuaranteeError, match="2\\^64"):
        Packing((2**64 - 1) // 3 + 1, 3, 45)
    with pytest.raises(GuaranteeError, match="add a bit each"):
        Packing(1, 2**9, 9)


# ---- sums ----


@pytest.mark.parametrize(("largest", "parties"), CASES)
def test_the_decrypted_sum_is_the_integer_sum(largest, parties):
    sums = Sums(9001, largest, parties)
    each = vectors(sums, 3)
    opened = bfv.decrypt(sums, key_of(sums.ring), added(sums, each), 3)
    assert opened.count == 3 and (opened.values == sum(each)).all()


@pytest.mark.parametrize(("largest", "parties"), [case for case in CASES if case[1] <= 16])
def test_everybody_at_the_limit_gives_the_exact_sum(largest, parties):
    sums = Sums(5, largest, parties)
    full = np.full(5, largest, np.uint64)
    opened = bfv.decrypt(sums, key_of(sums.ring), added(sums, [full] * parties), parties)
    assert opened.count == parties and (opened.values == np.uint64(largest * parties)).all()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 255), min_size=7, max_size=7), min_size=2, max_size=8))
def test_any_small_integers_are_summed_exactly(rows):
    sums = Sums(7, 255, 8)
    each = [np.array(row, np.uint64) for row in rows]
    opened = bfv.decrypt(sums, key_of(sums.ring), added(sums, each), 2)
    assert (opened.values == np.sum(each, axis=0)).all() and opened.count == len(rows)


@pytest.mark.parametrize("bits", bfv.RINGS)
def test_the_noise_of_fresh_ciphertexts_is_within_what_the_slots_are_reckoned_for(bits):
    ring = Ring("bfv", bfv.DEGREE, bits, bfv._prime_above(2**20))
    key, seal = key_of(ring), backends.seal()
    noises = []
    for row in key.public.unpack_vector(key.public.encrypt(np.zeros(40 * 4096, np.uint64)), 40 * 4096):
        budget = key._decryptor.invariant_noise_budget(key.public.load(row))
        noises.append(bits[0] - 1 - 20 - budget)  # log2 of the largest of 4096 coefficients, rounded up
    assert seal.__version__ and max(noises) <= np.log2(5.3 * bfv.RINGS[bits]) + 1


@pytest.mark.parametrize("parties", [3, 100, 10_000])
@pytest.mark.parametrize("bits", bfv.RINGS)
def test_a_slot_leaves_the_noise_of_everybody_eight_and_a_half_deviations(bits, parties):
    noise = bfv.RINGS[bits] * parties**0.5
    assert 2.0 ** (bits[0] - 1 - bfv.slot_bits(bits, parties)) > 8.5 * noise


@pytest.mark.parametrize("largest", [255, 2**32 // 100])
def test_the_sum_of_a_hundred_vectors_at_the_limit_still_has_a_noise_budget(largest):
    sums = Sums(1, largest, 100)
    key, full = key_of(sums.ring), np.array([largest], np.uint64)
    total = added(sums, [full] * 100)
    (row,) = key.public.unpack_vector(total, sums.slots)
    assert key._decryptor.invariant_noise_budget(key.public.load(row)) >= 1
    assert bfv.decrypt(sums, key, total, 3).values.tolist() == [100 * largest]


def test_two_encryptions_of_the_same_values_share_no_coefficient():
    sums = Sums(3, 255, 8)
    key, values = key_of(sums.ring).public, np.arange(3, dtype=np.uint64)
    one, two = (key.unpack_vector(bfv.encrypt(sums, key, values), sums.slots) for _ in range(2))
    assert (one == two).mean() < 1e-3


# ---- who may open what ----


def test_a_sum_over_fewer_than_the_minimum_stays_closed():
    sums = Sums(4, 255, 8)
    with pytest.raises(CohortError, match="one that says 2"):
        bfv.decrypt(sums, key_of(sums.ring), added(sums, vectors(sums, 2)), 3)


def test_a_vector_that_is_no_fresh_one_of_a_silo_does_not_open_as_a_sum():
    sums = Sums(4, 200, 8)
    key = key_of(sums.ring)
    slots = sums.packing.pack(np.array([3, 200, 200, 200, 200], np.uint64))
    slots[1] += np.uint64(500 << sums.packing.field)  # a silo that puts in more than it may
    with pytest.raises(CohortError, match="stays closed"):
        bfv.decrypt(sums, key, key.public.encrypt(slots), 3)


def test_a_coordinator_that_lies_can_have_a_single_vector_opened_as_the_statement_says():
    sums = Sums(4, 255, 8)
    key, victim = key_of(sums.ring), vectors(sums, 1)[0]
    forged = sums.packing.pack(np.array([2, 0, 0, 0, 0], np.uint64))  # two more silos that put in nothing
    adder = bfv.adder(sums, key.public)
    adder.add(bfv.encrypt(sums, key.public, victim))
    adder.add(key.public.encrypt(forged))
    assert (bfv.decrypt(sums, key, adder.total(), 3).values == victim).all()


def test_the_adder_holds_the_sum_and_one_vector_however_many_come():
    sums = Sums(50_000, 2**32 // 100, 100)
    key = key_of(sums.ring).public
    adder, blob, peaks = bfv.adder(sums, key), bfv.encrypt(sums, key, np.zeros(50_000, np.uint64)), []
    tracemalloc.start()
    for _ in range(6):
        adder.add(blob)
        peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert peaks[-1] <= 1.01 * peaks[2] < 6 * len(blob)


def test_more_vectors_than_room_was_reckoned_for_are_not_added():
    sums = Sums(4, 255, 3)
    with pytest.raises(CohortError, match="at most 3"):
        added(sums, vectors(sums, 4))
    with pytest.raises(CohortError, match="none"):
        bfv.adder(sums, key_of(sums.ring).public).total()


def test_another_key_opens_nothing():
    sums = Sums(4, 255, 3)
    blob = added(sums, vectors(sums, 3))
    other = SecretKey.fresh(sums.ring)
    with pytest.raises(WireError, match="session's key"):
        bfv.decrypt(sums, other, blob, 3)
    renamed = SecretKey(key_of(sums.ring).public, other._secret)
    with pytest.raises(CohortError):
        bfv.decrypt(sums, renamed, blob, 3)


def test_a_secret_key_is_not_printed_and_not_pickled():
    key = key_of(Sums(4, 255, 3).ring)
    assert repr(key) == "<SecretKey: secret>" and "blob" not in repr(key.public)
    with pytest.raises(GuaranteeError):
        pickle.dumps(key)


# ---- the wire ----


def test_a_public_key_survives_the_wire_and_vectors_know_it():
    sums = Sums(4, 255, 3)
    key = key_of(sums.ring).public
    again = public_key(key.pack(), sums.ring)
    assert again == key and again.digest == key.digest and again.pack() == key.pack()


@pytest.mark.parametrize("change", ["format", "scheme", "degree", "primes", "plain"])
def test_a_public_key_for_other_parameters_is_refused_by_name(change):
    ring = Sums(4, 255, 3).ring
    tree, facts = wire.unpack(key_of(ring).public.pack())
    with pytest.raises(WireError, match=change):
        public_key(wire.pack(tree, facts | {change: 7}), ring)


def test_a_public_key_with_too_little_or_too_much_is_refused():
    ring = Sums(4, 255, 3).ring
    key = key_of(ring).public
    for blob in (key.blob[:-1], key.blob + b"x", b""):
        with pytest.raises(WireError):
            public_key(dataclasses.replace(key, blob=blob).pack(), ring)
    with pytest.raises(WireError, match="one public key"):
        public_key(wire.pack({}, ring.facts()), ring)


def test_a_ring_of_too_few_bits_of_security_cannot_be_made():
    with pytest.raises(GuaranteeError, match="128 bits"):
        _ = Ring("bfv", 2048, (60, 49), bfv._prime_above(2**20)).context


def damaged(blob: bytes, rng: random.Random) -> bytes:
    wrong = bytearray(blob)
    kind = rng.randrange(3)
    if kind == 0:
        return bytes(wrong[: rng.randrange(len(wrong))])
    for _ in range(3):
        wrong[rng.randrange(len(wrong) if kind == 1 else 600)] = rng.randrange(256)
    return bytes(wrong)


def test_a_damaged_vector_is_refused_or_is_another_vector_and_never_anything_else():
    sums = Sums(4, 255, 3)
    key = key_of(sums.ring)
    blob, rng, refused = bfv.encrypt(sums, key.public, np.arange(4, dtype=np.uint64)), random.Random(0), 0
    for _ in range(300):
        adder = bfv.adder(sums, key.public)
        try:
            adder.add(damaged(blob, rng))
        except WireError:
            refused += 1
            assert adder.added == 0
    assert refused > 150


def test_a_damaged_public_key_is_refused_or_is_another_key():
    ring = Sums(4, 255, 3).ring
    blob, rng, refused = key_of(ring).public.pack(), random.Random(0), 0
    for _ in range(300):
        try:
            public_key(damaged(blob, rng), ring)
        except WireError:
            refused += 1
    assert refused > 150


@pytest.mark.parametrize("shape", [(1,), (2, 3), (0,)])
def test_a_vector_of_another_length_is_refused_and_the_sum_goes_on_without_it(shape):
    sums = Sums(4, 255, 3)
    key, each = key_of(sums.ring), vectors(sums, 3)
    adder = bfv.adder(sums, key.public)
    adder.add(bfv.encrypt(sums, key.public, each[0]))
    wrong = wire.pack({backends.CIPHERTEXTS: np.zeros(shape, np.uint64)},
                      {"format": backends.FORMAT, "key": key.public.digest})  # fmt: skip
    with pytest.raises(WireError, match="1 ciphertexts of degree 4096"):
        adder.add(wrong)
    for values in each[1:]:
        adder.add(bfv.encrypt(sums, key.public, values))
    assert (bfv.decrypt(sums, key, adder.total(), 3).values == sum(each)).all()


def test_coefficients_above_the_modulus_are_refused():
    sums = Sums(4, 255, 3)
    key = key_of(sums.ring).public
    table = np.full((1, 8192), sums.ring.modulus, np.uint64)
    with pytest.raises(WireError, match="below the ring's modulus"):
        bfv.adder(sums, key).add(key.pack_vector(table))
    bfv.adder(sums, key).add(key.pack_vector(table - np.uint64(1)))


def test_values_of_another_length_are_not_encrypted():
    sums = Sums(4, 255, 3)
    with pytest.raises(ValueError, match="4 values"):
        bfv.encrypt(sums, key_of(sums.ring).public, np.zeros(5, np.uint64))


def test_a_vector_of_integers_takes_less_than_four_times_the_bytes_of_fp32_and_of_bytes_less_than_one_and_a_half():
    for largest, most in ((2**32 // 100, 4.0), (255, 1.5)):
        sums = Sums(100_000, largest, 100)
        blob = bfv.encrypt(sums, key_of(sums.ring).public, np.zeros(sums.length, np.uint64))
        assert len(blob) <= most * 4 * sums.length


# ---- it fails closed ----


def test_without_the_library_a_treaty_that_asks_for_it_is_refused_and_told_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "seal", None)
    with pytest.raises(GuaranteeError, match="foedus\\[he\\]") as refused:
        backends.check("bfv")
    assert "nothing is sent in the clear" in refused.value.do
    with pytest.raises(GuaranteeError):
        PublicKey(Sums(4, 255, 3).ring, b"").encrypt(np.zeros(1, np.uint64))


def test_a_library_that_is_there_but_does_not_import_counts_as_missing(monkeypatch, tmp_path):
    (tmp_path / "seal.py").write_text("raise OSError('GLIBCXX_3.4.32 not found')")
    monkeypatch.delitem(sys.modules, "seal", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(GuaranteeError, match="GLIBCXX"):
        backends.check("bfv")


def test_with_the_library_bfv_is_accepted_and_any_other_scheme_is_not():
    backends.check("bfv")
    with pytest.raises(GuaranteeError, match="scheme bfv"):
        backends.check("paillier")


def test_threshold_keys_are_refused_with_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "openfhe", None)
    with pytest.raises(GuaranteeError, match="OpenFHE, does not import here"):
        backends.threshold_keys()
    monkeypatch.setitem(sys.modules, "openfhe", sys)
    with pytest.raises(GuaranteeError, match="no threshold decryption with it yet"):
        backends.threshold_keys()


def test_what_a_shared_key_means_is_said_with_its_number_of_holders():
    assert "One silo holds" in backends.trust(1) and "3 silos each hold" in backends.trust(3)
    for holders in (1, 2, 3):
        assert "do not collude" in backends.trust(holders) and "not such a coordinator" in backends.trust(holders)


# ---- real numbers ----


@pytest.mark.parametrize(("largest", "parties"), [(1.0, 3), (1.0, 100), (0.01, 8), (300.0, 8)])
def test_sums_of_real_numbers_are_within_the_stated_error(largest, parties):
    reals = ckks.Reals(5000, largest, parties)
    key, rng = key_of(reals.ring), np.random.default_rng(0)
    adder, each = ckks.adder(reals, key.public), rng.uniform(-largest, largest, (3, 5000))
    each[:, :3] = largest
    for values in each:
        adder.add(ckks.encrypt(reals, key.public, values))
    found = ckks.decrypt(reals, key, adder.total())
    worst = np.abs(found - each.sum(0)).max()
    assert reals.error / 200 < worst <= reals.error < 1e-8 * largest * parties


def test_real_numbers_of_everybody_at_the_limit_do_not_wrap():
    reals = ckks.Reals(2048, 1.0, 4)
    key = key_of(reals.ring)
    for values in (np.full(2048, 1.0), np.full(2048, -1.0), np.where(np.arange(2048) % 2, 1.0, -1.0)):
        adder = ckks.adder(reals, key.public)
        for _ in range(4):
            adder.add(ckks.encrypt(reals, key.public, values))
        assert np.abs(ckks.decrypt(reals, key, adder.total()) - 4 * values).max() <= reals.error


@pytest.mark.parametrize("wrong", [1.1, np.nan, np.inf])
def test_a_real_number_above_the_limit_is_not_encrypted(wrong):
    reals = ckks.Reals(2, 1.0, 3)
    with pytest.raises(ValueError, match="at most 1.0"):
        ckks.encrypt(reals, key_of(reals.ring).public, np.array([0.0, wrong]))


@pytest.mark.parametrize("numbers", [(0, 1.0, 3), (1, 0.0, 3), (1, float("inf"), 3), (1, 1.0, 0)])
def test_real_numbers_without_a_range_are_refused(numbers):
    with pytest.raises(ValueError, match="Expected length"):
        ckks.Reals(*numbers)


def test_a_treaty_cannot_send_approximate_sums_back_to_the_coordinator():
    with pytest.raises(GuaranteeError, match="Li and Micciancio") as refused:
        backends.check("ckks")
    assert '"bfv"' in refused.value.do
