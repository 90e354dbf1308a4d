"""Arithmetic on trees."""

import numpy as np
import pytest

from foedus import tree

A = {("delta", "w"): np.array([3.0, 0.0], np.float32), ("delta", "v"): np.array([4.0], np.float32)}


def test_the_norm_is_over_all_entries_together():
    assert tree.norm(A) == pytest.approx(5.0)
    assert tree.norm({}) == 0.0
    assert not np.isfinite(tree.norm({("a", "b"): np.array([np.nan])}))


def test_sums_are_taken_in_float64_and_leave_their_arguments_alone():
    small = {("x", "y"): np.array([1e-8], np.float32)}
    one = {("x", "y"): np.array([1.0], np.float32)}
    total = tree.total([one, small])
    assert total["x", "y"].dtype == np.float64
    assert total["x", "y"][0] == 1.0 + np.float64(np.float32(1e-8))
    assert one["x", "y"][0] == 1.0
    assert tree.total([]) == {}


def test_integers_stay_integers_in_a_sum():
    assert tree.total([{("a", "b"): np.array([1])}, {("a", "b"): np.array([2])}])["a", "b"].dtype == np.int64


def test_add_undoes_minus():
    again = tree.add(tree.minus(A, tree.scale(A, 0.5)), tree.scale(A, 0.5))
    for key, x in A.items():
        np.testing.assert_array_equal(again[key], x)


def test_trees_with_different_keys_are_refused_by_name():
    with pytest.raises(ValueError, match="delta.*v"):
        tree.add(A, {("delta", "w"): A["delta", "w"]})


def test_part_and_as_part_are_inverse():
    assert tree.as_part("delta", tree.part(A, "delta")).keys() == A.keys()
    assert tree.part(A, "other") == {}


def test_size_and_finite():
    assert tree.size(A) == 3
    assert tree.finite(A) and not tree.finite({("a", "b"): np.array([np.inf])})
