"""Degree and threshold are those of the published search, and what they promise holds on graphs."""

from __future__ import annotations

import math
import random
import time
from fractions import Fraction
from itertools import combinations
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.errors import GuaranteeError
from foedus.secure import parameters
from foedus.secure.graph import neighbours
from foedus.secure.parameters import Graph, choose, thresholds

PUBLISHED = {  # corrupt, dropout, lying coordinator → n:k/t, the vectors of graph_parameter_finder_test.cc
    (0.45, 0.45, False): "100:92/46 1000:822/417 10000:3494/1771 100000:5508/2788 1000000:6240/3156",
    (0.33, 0.33, False): "10:8/4 100:68/34 1000:286/150 10000:422/221 100000:480/251 1000000:518/270",
    (0.3, 0.3, True): "100:92/62 1000:872/584 10000:4822/3230 100000:9388/6286 1000000:11136/7454",
    (0.05, 0.33, False): "100:28/6 1000:72/24 10000:86/29 100000:96/32 1000000:102/34",
    (0.05, 0.33, True): "10:8/5 100:72/39 1000:398/223 10000:746/420 100000:882/496 1000000:970/545",
    (0.33, 0.05, False): "10:4/4 100:34/29 1000:78/60 10000:92/70 100000:102/77 1000000:110/83",
    (0.33, 0.05, True): "10:4/4 100:42/37 1000:132/109 10000:178/146 100000:196/160 1000000:212/173",
    (0.05, 0.05, False): "10:2/2 100:12/6 1000:30/17 10000:34/20 100000:36/21 1000000:38/22",
    (0.05, 0.05, True): "10:2/2 100:16/11 1000:52/37 10000:62/44 100000:68/48 1000000:74/52",
    (0.33, 0.0, False): "10:4/4 100:26/25 1000:38/36 10000:42/40 100000:46/44 1000000:50/47",
    (0.33, 0.0, True): "10:4/4 100:26/26 1000:38/37 10000:42/41 100000:46/45 1000000:50/49",
    (0.0, 0.33, False): "100:26/2 1000:38/2 10000:42/2 100000:46/2 1000000:50/2",
    (0.0, 0.33, True): "10:8/5 100:68/35 1000:228/115 10000:326/164 100000:372/187 1000000:410/206",
    (0.0, 0.0, False): "10:2/2 100:2/2 1000:2/2 10000:2/2 100000:2/2 1000000:2/2",
    (0.0, 0.0, True): "10:2/2 100:2/2 1000:2/2 10000:2/2 100000:2/2 1000000:2/2",
}
REIMPLEMENTED = {  # the same search by another hand: corrupt, dropout → n:k/t curious, then lying
    (0.05, 0.05): "30:4/2 30:4/3 100:12/6 100:16/11 1000:30/17 1000:52/37 10000:34/20 10000:62/44",
    (0.05, 0.1): "30:6/2 30:8/5 100:16/6 100:26/16 1000:36/19 1000:78/52 10000:42/22 10000:96/64",
    (0.1, 0.1): "30:8/4 30:10/7 100:22/11 100:32/22 1000:48/27 1000:96/67 10000:54/31 10000:122/85",
    (0.2, 0.2): "30:14/7 30:20/14 100:40/21 100:62/42 1000:98/54 1000:302/206 10000:122/67 10000:482/328",
}
VECTORS = [
    *((*model, *vector.split(":")) for model, line in PUBLISHED.items() for vector in line.split()),
    *((*pair, i % 2 == 1, *v.split(":")) for pair, line in REIMPLEMENTED.items() for i, v in enumerate(line.split())),
]
rates = st.integers(0, 45).map(lambda percent: percent / 100)


def counts(n: int, *shares: float) -> list[int]:
    return [int(Fraction(str(share)) * n) for share in shares]


def searched(n: int, corrupt: float, dropout: float, malicious: bool) -> Graph:
    """The published search, which knows no complete graph."""
    found = ((k, thresholds(n, k, *counts(n, corrupt, dropout), malicious=malicious)) for k in range(2, n - 1, 2))
    return next(Graph(k, allowed.start) for k, allowed in found if allowed)


@pytest.mark.parametrize(("corrupt", "dropout", "malicious", "n", "expected"), VECTORS)
def test_the_search_finds_what_was_published(corrupt, dropout, malicious, n, expected):
    assert searched(int(n), corrupt, dropout, malicious) == Graph(*map(int, expected.split("/")))


@pytest.mark.parametrize("corrupt", [0.0, 0.05])
def test_a_threshold_of_two_needs_two_neighbours_who_stay(corrupt):
    """The published vectors have degree 4 and threshold 2 here, although three of four neighbours may drop out."""
    assert not thresholds(10, 4, 0, 3, malicious=False)
    assert searched(10, corrupt, 0.33, False) == Graph(6, 2)


@pytest.mark.parametrize("n", [17, 30, 100, 1000])
def test_larger_cohorts_get_what_the_search_finds(n):
    assert choose(n, 0.1, 0.1) == searched(n, 0.1, 0.1, True)
    assert choose(n, 0.1, 0.1, malicious=False) == searched(n, 0.1, 0.1, False)


def test_a_hundred_silos_get_32_neighbours_and_a_threshold_of_22():
    assert choose(100, 0.1, 0.1) == Graph(32, 22) and choose(100, 0.1, 0.1).spare == 10


@given(st.integers(3, parameters.SMALL), rates, rates)
def test_small_cohorts_get_the_complete_graph_or_none(n, corrupt, dropout):
    bad, gone = counts(n, corrupt, dropout)
    if bad + 2 * gone + 2 > n or gone + 3 > n:
        with pytest.raises(GuaranteeError, match="Ask for more silos"):
            choose(n, corrupt, dropout)
    else:
        assert choose(n, corrupt, dropout) == Graph(n - 1, max((n - 1 + bad) // 2 + 1, 2))


@given(st.integers(3, 120), rates, rates, st.booleans())
def test_whatever_is_chosen_keeps_the_thresholds_promise(n, corrupt, dropout, malicious):
    """A threshold that corrupt neighbours do not reach, nor two statements together; and one that survivors do."""
    bad, gone = counts(n, corrupt, dropout)
    try:
        graph = choose(n, corrupt, dropout, malicious=malicious)
    except GuaranteeError:
        assert bad + (1 + malicious) * gone + 2 > n or gone + 3 > n
        return
    k, t = graph.neighbours, graph.threshold
    assert 2 <= t <= k <= n - 1 and (k % 2 == 0 or k == n - 1)
    assert not malicious or 2 * t > k
    if k == n - 1:
        assert graph.spare >= gone and (2 * t > k + bad if malicious else t > bad)


@given(st.integers(4, 60), rates, rates, st.booleans())
def test_the_search_never_finds_what_the_complete_graph_cannot_do(n, corrupt, dropout, malicious):
    bad = counts(n, corrupt, dropout)
    if not thresholds(n, n - 1, *bad, malicious=malicious):
        assert not any(thresholds(n, k, *bad, malicious=malicious) for k in range(2, n - 1, 2))


@given(st.integers(2, 30), st.data())
def test_the_tail_is_that_of_exact_arithmetic(n, data):
    marked, k = data.draw(st.integers(0, n)), data.draw(st.integers(0, n))
    chance = data.draw(st.sampled_from([0.3, 1e-3, 2.0**-20, 2.0**-41]))
    ways = [comb(marked, x) * comb(n - marked, k - x) for x in range(k + 1)]
    below = Fraction(chance) * (1 - Fraction(1, 10**9))  # 3/10 is not below 0.3, however that rounds
    expected = next(m for m in range(k + 1) if Fraction(sum(ways[m + 1 :]), comb(n, k)) < below)
    assert parameters._most(n, marked, k, chance) == expected


def test_a_tail_that_is_exactly_the_chance_is_not_below_it():
    assert parameters._most(10, 9, 7, 0.3) == 7


def test_a_tail_of_one_in_ten_to_the_seventeenth_keeps_its_digits():
    """One minus a sum would be zero here, and the degree 612 instead of 42."""
    n, k, marked = 10_000, 42, 500
    m = parameters._most(n, marked, k, 2.0**-41 / n)
    tail = [sum(comb(marked, x) * comb(n - marked, k - x) for x in range(low, k + 1)) for low in (m + 1, m)]
    assert Fraction(tail[0], comb(n, k)) < Fraction(1, 2**41 * n) <= Fraction(tail[1], comb(n, k))


@pytest.mark.parametrize(("n", "k"), [(6, 2), (8, 2), (8, 4), (9, 4), (10, 6)])
def test_the_bound_on_being_cut_off_covers_every_way_of_it(n, k):
    """All choices of the bad, counted out, against the bound."""
    circle = neighbours([str(i) for i in range(n)], bytes(32), k)
    for bad in range(n - 1):
        chosen = list(combinations(circle, bad))
        apart = sum(not in_one_piece(circle, set(circle) - set(gone)) for gone in chosen)
        assert apart <= math.exp(parameters._cut_off(n, k, bad)) * len(chosen) * (1 + 1e-9)


@pytest.mark.parametrize(("n", "share"), [(12, 0.1), (30, 0.1), (60, 0.2), (100, 0.1)])
def test_after_the_dropout_that_was_stated_every_silo_keeps_its_threshold(n, share):
    graph, draw, names = choose(n, share, share), random.Random(n), [str(i) for i in range(n)]
    for _ in range(30):
        circle = neighbours(names, draw.randbytes(32), graph.neighbours)
        left = set(names) - set(draw.sample(names, int(share * n)))
        corrupt = set(draw.sample(names, int(share * n)))
        for name in left:
            assert len(left & set(circle[name])) >= graph.threshold
            assert 2 * graph.threshold > graph.neighbours + len(corrupt & set(circle[name]))


@given(st.integers(17, 40), st.integers(0, 39), st.randoms(use_true_random=False))
def test_survivors_who_each_keep_the_threshold_are_one_piece(n, dropped, draw):
    """Whoever picks the dropped, even by their places: more than half of one's neighbours bridge every gap."""
    k = draw.randrange(2, n - 1, 2)
    circle = neighbours([str(i) for i in range(n)], draw.randbytes(32), k)
    left = set(circle) - set(draw.sample(list(circle), min(dropped, n)))
    while short := {name for name in left if 2 * len(left & set(circle[name])) <= k}:
        left -= short
    assert in_one_piece(circle, left)


def in_one_piece(circle, left: set[str]) -> bool:
    seen, edge = set(), set(sorted(left)[:1])
    while edge:
        seen |= edge
        edge = {other for name in edge for other in circle[name]} & left - seen
    return seen == left


def test_spare_is_how_many_may_vanish():
    assert Graph(neighbours=32, threshold=22).spare == 10


TOO_SMALL = [
    *((n, corrupt, dropout, True) for n, corrupt, dropout in [(0, 0, 0), (2, 0, 0), (3, 0, 0.34), (3, 0.67, 0)]),
    *((9, share, share, malicious) for share, malicious in [(0.34, True), (0.45, False)]),
]


@pytest.mark.parametrize(("n", "corrupt", "dropout", "malicious"), TOO_SMALL)
def test_a_cohort_that_is_too_small_is_refused_with_the_size_that_would_do(n, corrupt, dropout, malicious):
    with pytest.raises(GuaranteeError, match=f"at least .* silos.* got a cohort of {n}. Ask for more") as caught:
        choose(n, corrupt, dropout, malicious=malicious)
    enough = int(caught.value.expected.split()[2])
    assert thresholds(enough, enough - 1, *counts(n, corrupt, dropout), malicious=malicious)
    assert not thresholds(enough - 1, enough - 2, *counts(n, corrupt, dropout), malicious=malicious)


@pytest.mark.parametrize(("corrupt", "dropout", "malicious"), [(0.5, 0.5, False), (0.5, 0.5, True), (0.34, 0.34, True)])
def test_rates_at_which_no_graph_works_are_refused_at_once(corrupt, dropout, malicious):
    began = time.process_time()
    with pytest.raises(GuaranteeError, match="Ask for more silos, or state a lower"):
        choose(100_000, corrupt, dropout, malicious=malicious)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(("corrupt", "dropout"), [(-0.1, 0.1), (0.1, 1.0), (1.5, 0.0), (float("nan"), 0.1)])
def test_what_is_no_share_is_refused(corrupt, dropout):
    with pytest.raises(GuaranteeError, match="shares of silos from 0 up to 1"):
        choose(10, corrupt, dropout)


def test_shares_that_floating_point_spells_badly_count_as_meant():
    """0.29 · 100 is 28.999…; it means 29 silos, whether corrupt or dropped."""
    assert choose(100, 0.29, 0.1, neighbours=99) == choose(100, Fraction(29, 100), 0.1, neighbours=99) == Graph(99, 65)
    assert choose(100, 0.1, 0.29, neighbours=99, threshold=70).spare == 29
    with pytest.raises(GuaranteeError, match="threshold=55 to 70"):
        choose(100, 0.1, 0.29, neighbours=99, threshold=71)


def test_what_is_fixed_by_hand_is_taken_where_it_holds():
    assert choose(100, 0.1, 0.1, neighbours=41) == Graph(42, thresholds(100, 42, 10, 10).start)
    assert choose(100, 0.1, 0.1, neighbours=500) == Graph(99, 55)
    assert choose(100, 0.1, 0.1, neighbours=32, threshold=22) == Graph(32, 22)
    high = choose(100, 0.1, 0.1, threshold=40)
    assert high.threshold == 40 and 40 in thresholds(100, high.neighbours, 10, 10)
    assert choose(10, 0.1, 0.1, threshold=7) == Graph(9, 7)


@pytest.mark.parametrize(
    "fixed",
    [
        {"neighbours": 30},
        {"neighbours": 32, "threshold": 21},
        {"neighbours": 32, "threshold": 23},
        {"threshold": 95},
        {"neighbours": 0},
        {"threshold": 1},
    ],
)
def test_what_is_fixed_by_hand_and_does_not_hold_is_refused(fixed):
    with pytest.raises(GuaranteeError, match="neighbours=99 works with threshold=55 to 89") as caught:
        choose(100, 0.1, 0.1, **fixed)
    assert caught.value.came == " and ".join(f"{name}={value}" for name, value in fixed.items())
