"""Enough shares give the secret back exactly; one fewer is as likely under any other secret."""

from __future__ import annotations

import random
import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.errors import GuaranteeError, WireError
from foedus.secure import shamir
from foedus.secure.shamir import PRIME

values = st.integers(0, PRIME - 1) | st.sampled_from([0, 1, PRIME - 1])
draws = st.randoms(use_true_random=False)


def as_bytes(value: int) -> bytes:
    return value.to_bytes(32, "big")


def as_int(blob: bytes) -> int:
    return int.from_bytes(blob, "big")


def supply(*numbers: int):
    """An entropy that gives these numbers in turn."""
    left = iter(numbers)
    return lambda n: next(left).to_bytes(n, "big")


def coefficients(points: dict[int, int]) -> list[int]:
    """Those of the polynomial through these points, the highest first: Lagrange's formula, multiplied out."""
    total = [0] * len(points)
    for x, y in points.items():
        basis = [y]
        for other in points:
            if other != x:
                inverse = pow(x - other, -1, PRIME)
                scaled = [b * inverse % PRIME for b in basis]
                basis = [(a - other * b) % PRIME for a, b in zip([*scaled, 0], [0, *scaled], strict=True)]
        total = [(a + b) % PRIME for a, b in zip(total, basis, strict=True)]
    return total


def test_the_prime_is_the_largest_of_256_bits():
    def is_prime(n: int) -> bool:
        """Miller and Rabin, to 32 bases."""
        odd, twos = n - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        return all(
            (x := pow(base, odd, n)) in (1, n - 1) or any((x := x * x % n) == n - 1 for _ in range(twos - 1))
            for base in range(2, 34)
        )

    assert PRIME.bit_length() == 256 and is_prime(PRIME)
    assert not any(is_prime(n) for n in range(PRIME + 2, 2**256, 2))


@given(values, st.integers(1, 12), st.integers(0, 8), draws)
def test_any_threshold_of_the_shares_gives_the_secret_back(secret, threshold, more, draw):
    points = draw.sample(range(1, 1000), threshold + more)
    shares = dict(zip(points, shamir.split(as_bytes(secret), threshold, points, draw.randbytes), strict=True))
    for count in (threshold, threshold + more):
        held = draw.sample(points, count)
        assert shamir.recover({x: shares[x] for x in held}) == as_bytes(secret)


@given(values, st.lists(st.integers(1, PRIME - 1), min_size=4, max_size=6, unique=True))
def test_points_may_be_any_numbers_below_the_prime(secret, points):
    shares = dict(zip(points, shamir.split(as_bytes(secret), 4, points), strict=True))
    assert shamir.recover(dict(list(shares.items())[-4:])) == as_bytes(secret)


@given(values, values, st.integers(2, 6), draws)
def test_fewer_shares_are_as_likely_under_every_secret(secret, other, threshold, draw):
    """For any other secret just one choice of the random coefficients gives the very same shares."""
    points = draw.sample(range(1, 100), threshold)
    held = shamir.split(as_bytes(secret), threshold, points, draw.randbytes)[:-1]
    line = {0: other} | dict(zip(points, map(as_int, held), strict=False))
    *drawn, constant = coefficients(line)
    assert constant == other
    assert shamir.split(as_bytes(other), threshold, points, supply(*drawn))[:-1] == held


@given(values, st.integers(2, 6), draws)
def test_shares_lie_on_the_polynomial_that_was_drawn(secret, threshold, draw):
    drawn = [draw.randrange(PRIME) for _ in range(threshold - 1)]
    points = draw.sample(range(1, 2**40), threshold)
    shares = shamir.split(as_bytes(secret), threshold, points, supply(*drawn))
    for x, share in zip(points, shares, strict=True):
        terms = (c * pow(x, i, PRIME) for i, c in enumerate([secret, *reversed(drawn)]))
        assert as_int(share) == sum(terms) % PRIME


def test_a_long_polynomial_is_evaluated_exactly():
    for points in (range(1, 301), range(2**30, 2**30 + 300), range(PRIME - 300, PRIME)):
        secret = shamir.fresh()
        shares = dict(zip(points, shamir.split(secret, 200, points), strict=True))
        assert shamir.recover({x: shares[x] for x in list(points)[::-1][:200]}) == secret


def test_weights_serve_every_secret_that_has_the_same_points():
    points = (3, 1, 40, 7)
    weights = shamir.weights(points)
    assert shamir.weights(list(points)) is weights
    assert sum(weights) % PRIME == 1  # a constant polynomial is its own value at zero
    for secret in (shamir.fresh(), shamir.fresh()):
        shares = shamir.split(secret, 4, points)
        assert sum(w * as_int(s) for w, s in zip(weights, shares, strict=True)) % PRIME == as_int(secret)


def test_what_is_drawn_is_uniform_below_the_prime():
    assert shamir.fresh(supply(2**256 - 1, PRIME, PRIME - 1)) == as_bytes(PRIME - 1)
    shares = shamir.split(as_bytes(0), 2, [1, 2], supply(PRIME + 5, 9))
    assert shares == [as_bytes(9), as_bytes(18)]


def test_shares_differ_each_time():
    secret = shamir.fresh()
    assert shamir.split(secret, 2, [1, 2]) != shamir.split(secret, 2, [1, 2])


def test_with_a_threshold_of_one_each_share_is_the_secret():
    secret = shamir.fresh()
    assert shamir.split(secret, 1, [1, 2]) == [secret, secret]


def test_a_false_share_gives_another_secret():
    secret = shamir.fresh()
    shares = dict(enumerate(shamir.split(secret, 3, [1, 2, 3]), 1))
    assert shamir.recover(shares | {2: shamir.fresh()}) != secret


@pytest.mark.parametrize("threshold", [0, -1, 4])
def test_a_threshold_that_cannot_be_met_is_refused(threshold):
    with pytest.raises(GuaranteeError, match="from 1 to the number of points"):
        shamir.split(bytes(32), threshold, [1, 2, 3])


@pytest.mark.parametrize("points", [[0, 1], [1, 1], [-1, 1], [1, PRIME]])
def test_points_that_give_the_secret_away_or_meet_are_refused(points):
    with pytest.raises(GuaranteeError, match="different points"):
        shamir.split(bytes(32), 2, points)
    with pytest.raises(GuaranteeError, match="different points"):
        shamir.weights(points)


def test_nothing_is_recovered_from_nothing():
    with pytest.raises(GuaranteeError, match="0 points"):
        shamir.recover({})


@pytest.mark.parametrize("secret", [b"", bytes(31), bytes(33), as_bytes(PRIME), b"\xff" * 32])
def test_what_is_no_number_below_the_prime_is_refused_unquoted(secret):
    with pytest.raises(GuaranteeError, match="below the prime; got another one"):
        shamir.split(secret, 2, [1, 2])
    with pytest.raises(WireError, match="below the prime; got another one"):
        shamir.recover({1: secret, 2: bytes(32)})


def test_hundred_holders_recover_what_was_shared_among_them():
    draw, points = random.Random(4), range(1, 101)
    for _ in range(20):
        secret = secrets.token_bytes(31).rjust(32, b"\0")
        shares = dict(zip(points, shamir.split(secret, 51, points), strict=True))
        assert shamir.recover({x: shares[x] for x in draw.sample(list(points), 51)}) == secret
