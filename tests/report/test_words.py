from __future__ import annotations

import math
from typing import Any

import pytest

from foedus.report.compare import compare, figure, listed, percent, signed_percent, verdict
from foedus.report.words import bytes_text, parameters_text, seconds_text, shorten, thousands


def evaluation(**micro: float) -> dict[str, Any]:
    """Every phase with one domain whose perplexity is the mean."""
    return {phase: means(value, {"a": value}) for phase, value in micro.items()}


def means(micro: float | None, by_domain: dict[str, float]) -> dict[str, Any]:
    return {"perplexity": {"micro": micro, "macro": micro, "by_domain": by_domain, "by_silo": {}}}


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        (
            {"base": 50, "federated": 34.5, "pooled": 33.89},
            "Federated training lowered perplexity on 1 of 1 domains, by 31 % overall, "
            "and came within 1.8 % of pooling the data.",
        ),
        (
            {"base": 50, "federated": 40, "pooled": 30},
            "Federated training lowered perplexity on 1 of 1 domains, by 20 % overall, "
            "and stays 33 % above what pooling the data gives.",
        ),
        (
            {"base": 50, "federated": 40, "pooled": 42},
            "Federated training lowered perplexity on 1 of 1 domains, by 20 % overall, "
            "and ended 4.8 % below pooling the data.",
        ),
        (
            {"base": 50, "federated": 40, "pooled": 40.001},
            "Federated training lowered perplexity on 1 of 1 domains, by 20 % overall, and matched pooling the data.",
        ),
        (
            {"base": 50, "federated": 56},
            "Federated training did not help here: perplexity rose on 1 of 1 domains, by 12 % overall.",
        ),
        ({"base": 50, "federated": 50.001}, "Federated training left perplexity as it was overall."),
        ({"federated": 40}, "The federated model's perplexity is 40.00; the base model was not evaluated beside it."),
        ({"base": 50}, "No evaluation of the federated model is recorded."),
        ({}, "No evaluation of the federated model is recorded."),
        (
            {"base": 50, "federated": math.nan},
            "The federated model's perplexity is not a finite number: training diverged.",
        ),
    ],
)
def test_the_first_sentence_says_what_the_figures_say(figures, words):
    assert verdict(evaluation(**figures))[0].replace("\u00a0", " ") == words


def test_domains_that_went_the_other_way_are_named():
    base = means(50, {"a": 50, "b": 50, "c": 50})
    better = {"base": base, "federated": means(45, {"a": 40, "b": 51, "c": 50})}
    assert verdict(better)[0].startswith("Federated training lowered perplexity on 1 of 3 domains")
    assert verdict(better)[1] == "It is higher than the base model's on b."
    worse = {"base": base, "federated": means(55, {"a": 60, "b": 60, "c": 49})}
    assert "rose on 2 of 3 domains" in verdict(worse)[0]
    assert verdict(worse)[1] == "It is lower than the base model's on c."


@pytest.mark.parametrize(
    ("alone", "words"),
    [
        (50, "10 % lower than what the silos reach alone"),
        (40, "gain nothing by federating"),
        (45, "the same perplexity"),
    ],
)
def test_silos_alone_are_compared_honestly(alone, words):
    sentences = " ".join(verdict(evaluation(base=60, local_only=alone, federated=45)))
    assert words in sentences.replace("\u00a0", " ")


def test_no_domains_means_no_count_of_domains():
    words = verdict({"base": means(50, {}), "federated": means(40, {})})[0]
    assert words.replace("\u00a0", " ") == "Federated training lowered perplexity, by 20 % overall."


def test_accuracy_is_told_where_it_was_measured():
    figures = evaluation(base=3.0, federated=2.0)
    for phase, value in (("base", 0.412), ("federated", 0.78)):
        figures[phase]["accuracy"] = {"micro": value, "macro": value, "by_domain": {}, "by_silo": {}}
    assert verdict(figures)[-1].replace("\u00a0", " ") == "Accuracy went from 41.2 % to 78.0 %."


def test_a_phase_without_a_domain_leaves_a_gap_and_null_is_not_a_number():
    figures = {"base": means(50, {"a": 50, "b": 9}), "federated": means(None, {"a": None})}
    c = compare(figures)
    assert c is not None and [row.name for row in c.domains] == ["a", "b"]
    assert math.isnan(c.domains[0].values["federated"]) and "federated" not in c.domains[1].values
    assert c.micro.change() is None


def test_figures_are_spelled_as_people_read_them():
    assert [figure(x) for x in (None, math.nan, math.inf, 4.5, 999.994, 1234.5, 123456.0)] == [
        "–", "not a number", "∞", "4.50", "999.99", "1234.5", "123,456",
    ]  # fmt: skip
    assert figure(0.6123, "accuracy") == "61.2\u00a0%" and figure(1.2345, "bits_per_byte") == "1.234"
    assert [percent(x) for x in (0.31, -0.018, 0.0006)] == ["31\u00a0%", "1.8\u00a0%", "0.06\u00a0%"]
    assert [signed_percent(x) for x in (None, -0.312, 0.004, -0.0001)] == [
        "–",
        "−31.2\u00a0%",
        "+0.4\u00a0%",
        "0.0\u00a0%",
    ]
    assert [bytes_text(x) for x in (0, 999, 1000, 999_600, 9_766_312, 4.2e9, 3e12)] == [
        "0\u00a0B", "999\u00a0B", "1\u00a0kB", "1\u00a0MB", "9.77\u00a0MB", "4.2\u00a0GB", "3\u00a0TB",
    ]  # fmt: skip
    assert [seconds_text(x) for x in (0, 0.0001, 0.042, 3.14, 99.97, 252, 7500, 7200, math.nan)] == [
        "0\u00a0ms", "< 1\u00a0ms", "42\u00a0ms", "3.1\u00a0s", "1\u00a0min 40\u00a0s", "4\u00a0min 12\u00a0s",
        "2\u00a0h 5\u00a0min", "2\u00a0h", "–",
    ]  # fmt: skip
    assert [parameters_text(x) for x in (812, 2_442_240, 134_515_008, 1.54e9)] == [
        "812", "2.44\u00a0million", "135\u00a0million", "1.54\u00a0billion",
    ]  # fmt: skip
    assert thousands(1_234_567) == "1\u2009234\u2009567"


def test_names_are_listed_and_shortened_without_losing_their_ends():
    assert [listed(names) for names in (["a"], ["a", "b"], list("abcd"), list("abcdefg"))] == [
        "a", "a and b", "a, b, c and 1 other", "a, b, c and 4 others",
    ]  # fmt: skip
    assert shorten("talk.politics.mideast", 14) == "talk.poli…east" and len(shorten("x" * 99, 14)) == 14
    assert shorten("sci.med", 14) == "sci.med"
