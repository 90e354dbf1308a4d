"""Domain accuracy: what a head recognises, what a linear probe can still tell."""

from __future__ import annotations

import math

import numpy as np
import pytest

from foedus.evaluation.probe import a_distance, macro_accuracy, probe


def clouds(gap: float, sizes: tuple[int, ...] = (40, 40, 40), size: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return size * (random.normal(size=(len(labels), 5)) + gap * np.eye(5)[labels]), labels


def test_macro_accuracy_counts_every_class_alike_and_leaves_out_what_nobody_labelled():
    labels = np.array([0, 0, 0, 0, 2, -1, -1])
    assert macro_accuracy(np.array([0, 0, 0, 1, 2, 1, 0]), labels) == pytest.approx((0.75 + 1.0) / 2)
    assert macro_accuracy(np.zeros(7, int), labels) == 0.5
    assert math.isnan(macro_accuracy(np.zeros(2, int), np.array([-1, -1])))


def test_the_probe_tells_silos_apart_when_it_can_and_is_at_chance_when_it_cannot():
    far, near = probe(*clouds(4.0), seed=0), probe(*clouds(0.0), seed=0)
    assert far.accuracy > 0.95 and far.chance == near.chance == pytest.approx(1 / 3)
    assert abs(near.accuracy - near.chance) < 0.15


def test_the_probe_never_sees_what_it_is_judged_by():
    random = np.random.default_rng(0)
    wide, labels = random.normal(size=(60, 200)), np.repeat([0, 1], 30)  # a probe could learn all of it by heart
    assert probe(wide, labels, seed=0).accuracy < 0.7


def test_shrinking_features_hides_nothing_from_the_probe():
    assert probe(*clouds(1.5, size=1e-4), seed=0).accuracy == pytest.approx(probe(*clouds(1.5), seed=0).accuracy)


def test_a_large_class_does_not_hide_a_small_one():
    assert probe(*clouds(1.5, (400, 25)), seed=0).accuracy > 0.75


def test_the_probe_is_the_same_again_and_refuses_what_cannot_be_judged():
    assert probe(*clouds(1.0), seed=3) == probe(*clouds(1.0), seed=3)
    for sizes in ((40,), (40, 4)):
        with pytest.raises(ValueError, match="two classes or more of 5"):
            probe(*clouds(1.0, sizes), seed=0)


def test_a_distance_runs_from_zero_to_two():
    x, labels = clouds(8.0)
    assert a_distance(x[labels == 0], x[labels == 1], 0) > 1.9
    y, _ = clouds(0.0)
    assert 0 <= a_distance(y[:40], y[40:], 0) < 0.5
