"""The graph of neighbours: the same for all, regular, hard to cut, and nobody's choice."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.errors import GuaranteeError
from foedus.secure.graph import neighbours

SEED = bytes(range(32))
sizes, degrees, seeds = st.integers(1, 24), st.integers(1, 28), st.binary(min_size=32, max_size=32)


def names(n: int) -> list[str]:
    return [f"silo {i}" for i in range(n)]


def connected(graph, left: set[str]) -> bool:
    """Whether those who are left reach one another without the others."""
    seen, edge = set(), {next(iter(left))}
    while edge:
        seen |= edge
        edge = {other for name in edge for other in graph[name]} & left - seen
    return seen == left


@given(sizes, degrees, seeds)
def test_neighbourhood_is_mutual_regular_and_connected(n, k, seed):
    graph = neighbours(names(n), seed, k)
    degree = min(k + k % 2, n - 1)
    assert set(graph) == set(names(n)) and len(graph) == n
    for name in graph:
        assert len(graph[name]) == len(set(graph[name])) == degree
        assert name not in graph[name] and all(name in graph[other] for other in graph[name])
        assert list(graph[name]) == sorted(graph[name])
    assert connected(graph, set(graph))


@given(sizes, degrees, seeds, st.randoms(use_true_random=False))
def test_the_order_of_the_cohort_is_no_matter(n, k, seed, draw):
    shuffled = draw.sample(names(n), n)
    assert dict(neighbours(shuffled, seed, k)) == dict(neighbours(tuple(names(n)), seed, k))
    assert neighbours(set(shuffled), seed, k) == neighbours(names(n), seed, k)


@given(st.integers(5, 20), st.integers(2, 6), seeds, st.randoms(use_true_random=False))
def test_fewer_than_k_who_vanish_cut_nobody_off(n, k, seed, draw):
    graph = neighbours(names(n), seed, k)
    left = set(draw.sample(names(n), n - min(k + k % 2, n - 1) + 1))
    assert connected(graph, left)


def test_the_graph_is_pinned():
    assert dict(neighbours([f"s{i}" for i in range(7)], SEED, 2)) == {
        "s0": ("s1", "s3"),
        "s1": ("s0", "s6"),
        "s6": ("s1", "s4"),
        "s4": ("s2", "s6"),
        "s2": ("s4", "s5"),
        "s5": ("s2", "s3"),
        "s3": ("s0", "s5"),
    }


def test_another_seed_is_another_graph():
    graphs = {tuple(neighbours(names(20), i.to_bytes(32, "big"), 4)["silo 0"]) for i in range(200)}
    assert len(graphs) > 180


def test_everybody_is_as_likely_a_neighbour():
    rounds, n, k = 3000, 12, 4
    met = Counter(other for i in range(rounds) for other in neighbours(names(n), i.to_bytes(32, "big"), k)["silo 0"])
    due, spread = rounds * k / (n - 1), (rounds * k / (n - 1) * (1 - k / (n - 1))) ** 0.5
    assert len(met) == n - 1 and all(abs(count - due) < 5 * spread for count in met.values())


@pytest.mark.parametrize(("k", "degree"), [(1, 2), (3, 4), (4, 4), (5, 6), (6, 6), (8, 8), (9, 9), (10, 9), (99, 9)])
def test_an_odd_degree_is_rounded_up_and_a_large_one_is_the_complete_graph(k, degree):
    assert {len(others) for others in neighbours(names(10), SEED, k).values()} == {degree}


def test_a_degree_just_below_the_complete_graph_counts_nobody_twice():
    for n in range(3, 30):
        for others in neighbours(names(n), SEED, n - 2).values():
            assert len(set(others)) == len(others) >= n - 2


def test_one_silo_has_no_neighbour_and_two_have_each_other():
    assert dict(neighbours(["a"], SEED, 2)) == {"a": ()}
    assert dict(neighbours(["a", "b"], SEED, 2)) == {"a": ("b",), "b": ("a",)}
    assert dict(neighbours([], SEED, 2)) == {}


@pytest.mark.parametrize(("cohort", "k"), [(["a", "b", "a"], 2), (["a", "b"], 0), (["a", "b"], -2)])
def test_a_name_twice_or_no_neighbour_at_all_is_refused(cohort, k):
    with pytest.raises(GuaranteeError, match="different names, and at least one neighbour"):
        neighbours(cohort, SEED, k)


def test_a_stranger_has_no_place():
    with pytest.raises(KeyError):
        neighbours(names(5), SEED, 2)["stranger"]


def test_ten_thousand_silos_have_their_places():
    graph, draw = neighbours(names(10_000), SEED, 96), random.Random(1)
    for name in draw.sample(names(10_000), 50):
        assert len(graph[name]) == 96 and all(name in graph[other] for other in graph[name])
