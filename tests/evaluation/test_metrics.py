"""Figures come from sums that add, never from averages of averages."""

import math

import numpy as np
import pytest

from foedus.evaluation import figures


def sums(**domains):
    names = ("nll", "targets", "correct", "bytes")
    return {(n, d): np.array([float(x)]) for d, values in domains.items() for n, x in zip(names, values, strict=True)}


SILOS = {"a": sums(law=(20, 10, 5, 40), sport=(3, 1, 1, 5)), "b": sums(law=(400, 100, 10, 350)), "c": sums()}


def test_micro_macro_domain_and_silo_are_what_their_names_say():
    p = figures(SILOS, labelled=False)["perplexity"]
    assert p["micro"] == pytest.approx(math.exp(423 / 111))
    assert p["by_silo"] == pytest.approx({"a": math.exp(23 / 11), "b": math.exp(4)})
    assert p["macro"] == pytest.approx((math.exp(23 / 11) + math.exp(4)) / 2)
    assert p["by_domain"] == pytest.approx({"law": math.exp(420 / 110), "sport": math.exp(3)})


def test_bits_per_byte_and_token_accuracy_come_from_the_same_sums():
    table = figures(SILOS, labelled=False)
    assert table["bits_per_byte"]["micro"] == pytest.approx(423 / math.log(2) / 395)
    assert table["token_accuracy"]["micro"] == pytest.approx(16 / 111)
    assert "accuracy" not in table


def test_labelled_targets_give_accuracy_and_no_bits():
    table = figures(SILOS, labelled=True)
    assert table["accuracy"]["micro"] == pytest.approx(16 / 111)
    assert set(table) == {"perplexity", "accuracy"}


def test_splitting_a_silo_in_two_changes_nothing_but_the_macro_mean():
    a = {"one": sums(law=(20, 10, 5, 40), sport=(3, 1, 1, 5))}
    b = {"x": sums(law=(20, 10, 5, 40)), "y": sums(sport=(3, 1, 1, 5))}
    left, right = figures(a, labelled=False)["perplexity"], figures(b, labelled=False)["perplexity"]
    assert left["micro"] == right["micro"] and left["by_domain"] == right["by_domain"]
    assert left["macro"] != right["macro"]


def test_nothing_to_judge_by_is_nan_and_a_hopeless_model_is_finite():
    assert math.isnan(figures({"a": sums()}, labelled=False)["perplexity"]["micro"])
    assert math.isfinite(figures({"a": sums(law=(1e9, 1, 0, 1))}, labelled=False)["perplexity"]["micro"])
