"""The threat model: it follows from the treaty, names tests that exist, and reads as a page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from foedus.report.threats import ASSETS, PARTIES, SIGHTS, render, threats, write_threats
from foedus.treaty import parse

from .pages import Page

ROOT = Path(__file__).parent.parent.parent
BASE = """
[treaty]
name = "notes"
[model]
base = "tiny:llama"
[data]
source = "memory"
[algorithm]
rounds = 4
[local]
steps = 1
optimizer = "sgd"
"""
NOISE = '[privacy]\nunit = "example"\nepsilon = 4.0\ndelta = 1e-5\nrate = 0.05\n'
ALIKE = '[server]\nweighting = "uniform"\n'
MASKED = ALIKE + '[secure]\nsums = "masked"\n'
ENCRYPTED = ALIKE + '[secure]\nsums = "encrypted"\n'
TREATIES = {"open": BASE, "private": BASE + NOISE, "masked": BASE + MASKED, "encrypted": BASE + ENCRYPTED,
            "seeded": BASE + NOISE + 'randomness = "simulated"\n',
            "both": BASE + NOISE + '[secure]\nsums = "masked"\n'}  # fmt: skip


def sight(known: dict, party: str, asset: str) -> str:
    return next(row["sight"] for row in known["sees"] if (row["party"], row["asset"]) == (party, asset))


@pytest.mark.parametrize("name", TREATIES)
def test_every_party_has_a_line_about_every_asset_in_words_of_a_closed_list(name):
    known = threats(parse(TREATIES[name]))
    assert [(row["party"], row["asset"]) for row in known["sees"]] == [(p, a) for p in PARTIES for a in ASSETS]
    assert {row["sight"] for row in known["sees"]} <= set(SIGHTS)
    assert json.loads(json.dumps(known)) == known and known["version"] == 1


@pytest.mark.parametrize(
    ("name", "seen"),
    [("open", "whole"), ("private", "noised"), ("seeded", "whole"), ("masked", "nothing"), ("encrypted", "nothing")],
)
def test_what_the_coordinator_sees_of_an_update_follows_from_sums_and_noise(name, seen):
    assert sight(threats(parse(TREATIES[name])), "coordinator", "update") == seen


def test_a_treaty_without_protection_says_that_nothing_defends():
    known = {row["id"]: row for row in threats(parse(BASE))["threats"]}
    assert known["update-reading"]["defends"].startswith("nothing") and not known["update-reading"]["tests"]
    assert known["membership"]["defends"].startswith("nothing")


def test_holdings_are_seen_where_the_treaty_discloses_them_or_weighs_by_them():
    told = BASE + "[disclosure]\nholdings = {}\n[server]\nweighting = {}\n"
    seen = [sight(threats(parse(told.format(*how))), "coordinator", "holdings")
            for how in (("true", '"uniform"'), ("false", '"examples"'), ("false", '"uniform"'))]  # fmt: skip
    assert seen == ["whole", "whole", "nothing"]


@pytest.mark.parametrize("name", TREATIES)
def test_every_test_that_is_named_as_evidence_exists(name):
    for row in threats(parse(TREATIES[name]))["threats"]:
        for test in row["tests"]:
            file, _, function = test.partition("::")
            assert re.search(rf"^def {function}\(", (ROOT / file).read_text(), re.M), test


@pytest.mark.parametrize("name", TREATIES)
def test_what_a_deployment_defends_against_names_tests_of_a_deployment(name):
    rows = [row for row in threats(parse(TREATIES[name]))["threats"] if row["needs"] == "deployment"]
    assert len(rows) >= 3 and all(any(test.startswith("tests/deploy/") for test in row["tests"]) for row in rows)


def test_the_page_is_well_formed_and_names_every_threat(tmp_path):
    data, shown = write_threats(parse(TREATIES["both"]), tmp_path)
    page = Page(shown.read_text())
    assert page.faults == []
    assert all(row["id"] in page.root.text for row in json.loads(data.read_text())["threats"])


def test_words_of_a_treaty_are_text_on_the_page():
    known = threats(parse(BASE)) | {"not_covered": ["<script>alert(1)</script>"]}
    assert "<script>" not in render(known)
