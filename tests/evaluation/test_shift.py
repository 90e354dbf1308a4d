"""How differently silos speak: MMD between features with what would give a collapse away, and divergence of words."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foedus.evaluation.shift import _own_scale, discrepancy, divergence, spread, unigrams, vocabulary
from foedus.kernels import bandwidths, mmd_unbiased, relabelled


def features(*shifts: float, n: int = 40) -> dict[str, np.ndarray]:
    """Unit vectors of one silo a shift."""
    random = np.random.default_rng(0)
    raw = {f"s{i}": random.normal(size=(n, 6)) + shift * np.eye(6)[0] for i, shift in enumerate(shifts)}
    return {name: x / np.linalg.norm(x, axis=1, keepdims=True) for name, x in raw.items()}


def found(held: dict[str, np.ndarray], targets: tuple[str, ...] = ()) -> dict:
    return discrepancy(held, targets, (0.5, 1.0), 99, np.random.default_rng(0))


def test_pairs_and_target_are_means_of_what_the_kernel_says():
    held = features(0.0, 0.5, 2.0)
    one = {(a, b): mmd_unbiased(held[a], held[b], (0.5, 1.0)) for a, b in (("s0", "s1"), ("s0", "s2"), ("s1", "s2"))}
    out = found(held, ("s2",))
    assert out["pairs"]["mmd2"] == pytest.approx(np.mean(list(one.values())), abs=1e-6)
    assert out["target"]["mmd2"] == pytest.approx((one["s0", "s2"] + one["s1", "s2"]) / 2, abs=1e-6)
    assert out["by_pair"] == pytest.approx({f"{a} | {b}": x for (a, b), x in one.items()}, abs=1e-6)


def test_a_shift_is_told_from_chance_and_chance_from_a_shift():
    apart, alike = found(features(0.0, 0.0, 1.5), ("s2",)), found(features(0.0, 0.0, 0.0), ("s2",))
    assert apart["pairs"]["p"] == apart["target"]["p"] == 0.01
    assert apart["pairs"]["mmd2"] > apart["pairs"]["null"]["q95"]
    assert alike["pairs"]["p"] > 0.05 and abs(alike["pairs"]["null"]["mean"]) < 2 * alike["pairs"]["null"]["sd"]


def test_chance_is_what_the_same_means_come_to_when_texts_are_dealt_anew():
    held = features(0.0, 0.5, 2.0)
    out, (_, null) = found(held, ("s2",)), relabelled([*held.values()], (0.5, 1.0), 99, np.random.default_rng(0))
    for name, (i, j) in {"pairs": ([0, 0, 1], [1, 2, 2]), "target": ([0, 1], [2, 2])}.items():
        dealt = null[:, i, j].mean(1)
        expected = {"mean": dealt.mean(), "sd": dealt.std(), "q95": np.quantile(dealt, 0.95)}
        assert out[name]["null"] == pytest.approx(expected)


def test_without_a_target_or_without_sources_there_is_no_distance_to_it():
    assert found(features(0.0, 1.0))["target"] is None
    assert found(features(0.0, 1.0), ("s0", "s1"))["target"] is None


def test_a_collapse_lowers_the_distance_but_is_seen_in_what_stands_beside_it():
    held = features(0.0, 1.5, 3.0)
    centre = np.concatenate(list(held.values())).mean(0)
    shrunk = {name: centre + 0.01 * (x - centre) for name, x in held.items()}
    flat = {name: x * np.eye(6)[0] for name, x in held.items()}
    assert found(shrunk)["pairs"]["mmd2"] < 0.01 * found(held)["pairs"]["mmd2"]
    whole, small, thin = spread(held), spread(shrunk), spread(flat)
    assert small["variance"] == pytest.approx(1e-4 * whole["variance"])
    assert small["own_scale"] == pytest.approx(whole["own_scale"], rel=1e-3)
    assert thin["effective_rank"] == pytest.approx(1.0) and whole["effective_rank"] > 4
    dead = spread({name: np.ones_like(x) for name, x in held.items()})
    assert dead == {"variance": 0.0, "effective_rank": 1.0, "own_scale": None}


def test_the_own_scale_of_many_rows_is_taken_from_rows_of_all_silos():
    groups = [np.ones((40, 6)), *features(0.0, 1.0).values()]
    few, all_of_them = (_own_scale(groups, np.concatenate(groups), most) for most in (30, 2000))
    assert few == pytest.approx(all_of_them, rel=0.2)


def test_the_variance_is_the_mean_squared_distance_to_the_mean():
    rows = np.concatenate(list(features(0.0, 1.0).values()))
    assert spread(features(0.0, 1.0))["variance"] == pytest.approx(((rows - rows.mean(0)) ** 2).sum(1).mean())
    assert bandwidths(rows)[2] ** 2 == pytest.approx(2 * spread(features(0.0, 1.0))["variance"], rel=0.2)


# Words


def test_the_vocabulary_holds_the_most_frequent_words_whatever_their_order():
    assert vocabulary(["b a b", "C c a d"], most=3) == ("a", "b", "c")
    assert vocabulary(["d c a", "b c b A"], most=3) == ("a", "b", "c")


def test_unigrams_are_a_distribution_without_zeros_and_count_what_has_no_place_as_other():
    p = unigrams(["a b a x y"], ("a", "b", "c"))
    np.testing.assert_allclose(p, np.array([2.01, 1.01, 0.01, 2.01]) / 5.04)
    assert (unigrams([], ("a",)) == 0.5).all()


def test_divergence_is_zero_of_the_same_one_of_the_disjoint_and_symmetric():
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.1, 0.8])
    assert divergence(p, p) == 0.0 and divergence(p, q) == pytest.approx(divergence(q, p))
    tiny = 1e-12
    assert divergence(np.array([1 - tiny, tiny]), np.array([tiny, 1 - tiny])) == pytest.approx(1.0, abs=1e-6)


DISTRIBUTIONS = st.lists(st.floats(1e-3, 1), min_size=5, max_size=5).map(lambda x: np.array(x) / sum(x))


@settings(max_examples=50, deadline=None)
@given(DISTRIBUTIONS, DISTRIBUTIONS)
def test_divergence_never_falls_as_more_comes_from_far(p, q):
    found = [divergence(p, (1 - k) * p + k * q) for k in np.linspace(0, 1, 13)]
    assert (np.diff(found) >= -1e-12).all() and 0 <= found[-1] <= 1
    assert (np.diff(found, 2) >= -1e-12).all()  # because it is convex
