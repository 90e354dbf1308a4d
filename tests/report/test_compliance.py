"""The compliance record: evidence that can be looked up, gaps that are said, and never a verdict."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from foedus.report.compliance import FRAMEWORKS, compliance, write_compliance

from .conftest import HIDING, TREATY
from .pages import Page

ROOT = Path(__file__).parent.parent.parent
WHOLE, SECRET = (text.replace("[silos]", 'domain = "domain"\n\n[silos]') for text in (TREATY, HIDING))
PRIVATE = '[privacy]\nunit = "example"\nepsilon = 8.0\ndelta = 1e-5\nrate = 0.1\n'


def rows(known: dict, framework: str) -> dict:
    found = next(x for x in known["frameworks"] if x["name"] == framework)
    return {row["reference"]: row for row in found["rows"]}


def cited(known: dict, kind: str = "") -> list[dict]:
    return [e for x in known["frameworks"] for row in x["rows"] for e in row["evidence"] if kind in ("", e["kind"])]


@pytest.fixture
def known(make_run) -> dict:
    return compliance(make_run(treaty=WHOLE))


def test_every_provision_has_evidence_or_a_gap_and_no_verdict(known):
    assert [x["name"] for x in known["frameworks"]] == [name for name, _, _ in FRAMEWORKS]
    for framework in known["frameworks"]:
        for row in framework["rows"]:
            assert row["evidence"] or row["gaps"], row["reference"]
    said = json.dumps(known).lower()
    assert not re.search(r"\b(is|are|fully) compliant|complies with|lawful basis is met|satisfies\b", said)
    assert "no legal conclusion" in known["conclusion"]


def test_the_record_is_the_same_whenever_it_is_written(make_run):
    folder = make_run(treaty=WHOLE)
    first = [path.read_bytes() for path in write_compliance(folder)]
    assert [path.read_bytes() for path in write_compliance(folder)] == first


def test_what_protects_nobody_is_a_gap(known):
    by_design = rows(known, "GDPR")["Art. 25"]
    assert any("No privacy guarantee" in gap for gap in by_design["gaps"])
    assert any("in the open" in gap for gap in by_design["gaps"])


def test_a_guarantee_is_cited_from_the_ledger_with_what_it_leaves_out(private):
    folder, _ = private(treaty=SECRET + PRIVATE)
    row = rows(compliance(folder), "NIST AI RMF")["MEASURE 2.10"]
    assert any(e["kind"] == "guarantee" and "delta = 1e-05" in e["what"] for e in row["evidence"])
    assert any("ε does not cover" in gap for gap in row["gaps"])


def test_noise_that_was_simulated_is_a_gap(private):
    folder, _ = private(treaty=SECRET + PRIVATE, simulated=True)
    assert any("simulated" in gap for gap in rows(compliance(folder), "GDPR")["Art. 32"]["gaps"])


def test_records_of_the_ledger_are_cited_by_number_and_hash(known, make_run):
    folder = make_run(treaty=WHOLE)
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    where = [e["where"] for e in cited(compliance(folder), "ledger")]
    assert any(lines[-1]["hash"] in said for said in where)
    assert any('kind "round", 8 records, 1 to 8' in said for said in where)


def test_a_ledger_that_somebody_changed_is_no_evidence(make_run):
    folder = make_run(treaty=WHOLE)
    ledger = folder / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('"round":3', '"round":4', 1))
    known = compliance(folder)
    assert not known["ledger"]["verified"]
    row = rows(known, "HIPAA")["§ 164.312(b)"]
    assert any("does not verify" in gap for gap in row["gaps"])
    assert not any("without gap or change" in e["what"] for e in cited(known))


def test_a_treaty_that_is_not_the_ledgers_is_a_gap(make_run):
    assert any(
        "opens with treaty abab" in gap for gap in rows(compliance(make_run(treaty=WHOLE)), "GDPR")["Art. 5(2)"]["gaps"]
    )


def test_a_treaty_without_a_purpose_is_a_gap(make_run):
    folder = make_run(treaty=WHOLE)
    treaty = folder / "treaty.toml"
    treaty.write_text(re.sub(r'purpose = ".*"', 'purpose = ""', treaty.read_text()))
    assert rows(compliance(folder), "NIST AI RMF")["MAP 1.1"]["state"] == "gap"


def test_an_unfinished_run_says_what_is_missing(make_run):
    known = compliance(make_run(treaty=WHOLE, ended=False))
    assert any("has not ended" in gap for gap in rows(known, "EU AI Act")["Art. 15"]["gaps"])


def test_every_test_that_is_cited_exists(known, private):
    folder, _ = private(treaty=SECRET + PRIVATE)
    for evidence in (*cited(known, "test"), *cited(compliance(folder), "test")):
        file, _, function = evidence["where"].partition("::")
        assert re.search(rf"^def {function}\(", (ROOT / file).read_text(), re.M), evidence["where"]


def test_the_page_is_well_formed_and_holds_every_row(make_run):
    data, shown = write_compliance(make_run(treaty=WHOLE))
    page = Page(shown.read_text())
    assert page.faults == []
    for framework in json.loads(data.read_text())["frameworks"]:
        assert all(row["reference"] in page.root.text for row in framework["rows"])
