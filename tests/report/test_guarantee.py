"""What a private run's page, card and terminal say of its guarantee.

TEST FIXTURE: the figures of training are invented; those of privacy are a real plan's.
"""

from __future__ import annotations

import json
import time

import pytest

from foedus.errors import RunError
from foedus.privacy.noise import SystemSource
from foedus.privacy.plan import PrivacyPlan, Terms, facts
from foedus.privacy.statement import statement
from foedus.report import model_card, write_report
from foedus.report.guarantee import epsilon_text, guarantee_of, sections

from .conftest import EXAMPLE, HIDING, ROUNDS, TREATY, UNCOVERED, planned
from .pages import Element, Page, rows, values
from .test_console import printed

SILO = Terms("silo", 1e-5, ROUNDS, noise_multiplier=2.0, silos=50, expected=50.0)
SECRET = HIDING + '[privacy]\nunit = "silo"\nhide_cohort = true\n'


def shown(folder) -> Element:
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert page.faults == []
    return page.root


def words(element: Element) -> str:
    return " ".join(element.text.split())


TERMS = {
    "example": EXAMPLE,
    "author": Terms("author", 1e-6, ROUNDS, noise_multiplier=1.0, steps=10, rate=0.1, divisor=8.0, rows=4),
    "schedule": Terms("example", 1e-5, ROUNDS, noise_multiplier=1.0, ratio=0.5, steps=2, rate=0.1, divisor=8.0),
    "silo": SILO,
    "correlated": Terms("silo", 1e-5, ROUNDS, noise_multiplier=2.0, silos=50, expected=50.0, bands=2),
    "discrete shares": Terms(
        "silo", 2.5e-6, ROUNDS, noise_multiplier=2.0, silos=50, expected=50.0, placement="shared", minimum=9,
        discrete=True,
    ),
    "shares in words": Terms(
        "author", 2.5e-6, ROUNDS, noise_multiplier=2.0, silos=8, expected=8.0, placement="shared", minimum=6,
        discrete=True, word=32, parties=8, colluding=1, lr=0.5, rate=0.1, divisor=8.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TERMS)
def test_every_guarantee_is_shown_whole(private, kind):
    folder, recorded = private(TERMS[kind])
    root = shown(folder)
    section = root.section("privacy")
    big = section.all("dd", class_="big")
    assert values(big[:2]) == [recorded["epsilon"], recorded["delta"]]
    assert big[0].text == epsilon_text(recorded["epsilon"]) and recorded["unit"] in big[2].text
    said = words(section)
    for sentence in statement(recorded, recorded["epsilon"]):
        assert sentence.partition(": ")[2] in said or sentence in said
    for what in UNCOVERED:
        assert what in said
    assert f"{epsilon_text(recorded['epsilon'])} for one {recorded['unit']}" in root.all("header")[0].text
    assert "no privacy guarantee" not in root.all("header")[0].text and "SIMULATED" not in said


def test_shares_of_noise_say_whom_they_hold_against(private):
    folder, recorded = private(TERMS["shares in words"])
    assert "against the coordinator and 1 silo in league with it" in guarantee_of(recorded).short
    assert "in 4 rounds" in words(shown(folder).section("privacy"))


@pytest.mark.parametrize("kind", TERMS)
def test_the_plot_of_cost_rises_to_the_epsilon_that_is_stated(private, kind):
    folder, recorded = private(TERMS[kind])
    section = shown(folder).section("privacy")
    assert len(section.all("figure")) == 1 and "Epsilon by round" in section.all("svg")[0].attributes["aria-label"]
    table = rows(section.all("table")[0])
    assert list(table) == ["1", "2", "3", "4"]
    costs = [values(table[at]) for at in table]
    assert costs == sorted(costs)
    assert costs[-1] == [recorded["epsilon"], recorded["epsilon_rdp"]]
    assert all(pld <= rdp + 1e-9 for pld, rdp in costs)
    assert ("paid with the first" in words(section)) == (kind == "correlated")


def test_a_plot_of_many_different_rounds_is_made_in_time(private):
    terms = Terms("example", 1e-5, 60, noise_multiplier=2.0, ratio=0.5, steps=2, rate=0.05, divisor=8.0)
    from foedus.privacy import accountant
    from foedus.report.privacy import points

    plan = PrivacyPlan(terms, 2.0, SystemSource())
    accountant.upper(plan.event(1), 1e-5)  # the library is loaded
    began = time.process_time()
    found = points(dict(enumerate(plan.events, 1)), 1e-5, {"epsilon": 9.0, "rdp": 10.0})
    assert time.process_time() - began < 6
    assert [p["round"] for p in found] == [1, 9, 60] and found[-1]["epsilon"] == 9.0
    assert found[1]["epsilon"] == accountant.upper(plan.event(9), 1e-5)


def test_simulated_noise_is_called_so_before_any_figure(private):
    folder, recorded = private(simulated=True)
    root = shown(folder)
    section = root.section("privacy")
    assert words(section).index("SIMULATED NOISE It was drawn") < words(section).index("epsilon")
    assert [link.text for link in root.all("header")[0].all("a", class_="badge")] == ["simulated noise"]
    assert section.all("div", class_="bare")
    line = printed({"privacy": recorded}, 400).splitlines()[-1]
    assert line.startswith("Privacy: SIMULATED NOISE, nobody is protected")
    card = model_card({"privacy": recorded}, TREATY)
    assert "The noise of this run was simulated" in card and "SIMULATED NOISE" in card
    assert "It may repeat passages" in card


def test_noise_without_a_bound_is_no_guarantee(private):
    folder, recorded = private(Terms("example", 1e-5, ROUNDS, noise_std=0.1, max_norm=None, rate=0.1, divisor=8.0))
    root = shown(folder)
    section = root.section("privacy")
    assert recorded["epsilon"] is None and "No guarantee" in section.text
    assert "no privacy guarantee" in root.all("header")[0].text
    assert section.all("div", class_="bare") and not section.all("figure")
    assert "No guarantee" in printed({"privacy": recorded}) and "No guarantee" in model_card({"privacy": recorded}, "")


def test_a_private_run_leaves_no_section_empty_and_no_heading_without_text(private):
    folder, _ = private()
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in metrics:
        row.pop("loss", None)
        for facts_of in row.get("silos", {}).values():
            facts_of.pop("loss")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    root = shown(folder)
    training = root.section("training")
    assert "No losses are recorded: the treaty lets no silo disclose its loss." in words(training)
    assert [h.text for h in training.all("h3")] == ["Perplexity on validation text"]
    for section in root.all("main")[0].all("section"):
        tags = [child.tag for child in section.inside]
        assert len(tags) > 1
        assert not any(a in ("h2", "h3") and b in ("h2", "h3") for a, b in zip(tags, tags[1:], strict=False)
                       if (a, b) != ("h2", "h3"))  # fmt: skip
        assert tags[-1] not in ("h2", "h3")


def test_a_hidden_cohort_is_called_hidden_and_not_absent(private):
    folder, _ = private(Terms("silo", 1e-5, ROUNDS, noise_multiplier=2.0, silos=50, expected=25.0, rate=0.5),
                        treaty=SECRET)  # fmt: skip
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in metrics:
        if row["kind"] == "round":
            row.update(silos={}, failures={}, loss=None)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    summary = json.loads((folder / "summary.json").read_text())
    summary["bytes"] = {way: dict.fromkeys(summary["bytes"][way], [0] * ROUNDS) for way in ("up", "down")}
    (folder / "summary.json").write_text(json.dumps(summary))
    root = shown(folder)
    assert "is in no record" in root.section("traffic").text and not root.section("traffic").all("figure")
    assert "is in no record" in root.section("attendance").text and not root.section("attendance").all("figure")


def test_a_private_run_under_way_says_what_its_rounds_cost_so_far(private):
    folder, recorded = private(rounds=2, ended=False, treaty=HIDING.replace("rounds = 8", f"rounds = {ROUNDS}"))
    section = shown(folder).section("privacy")
    spent = values(section.all("dd", class_="big")[:1])[0]
    assert 0 < spent < recorded["epsilon"]
    assert f"2 rounds cost, those begun so far. All 4 may cost {epsilon_text(recorded['epsilon'])}." in words(section)
    ledger = (folder / "ledger.jsonl").read_text()
    (folder / "ledger.jsonl").write_text(ledger.replace('"multiplier":1.0', '"multiplier":9.0'))
    assert "assume no guarantee" in shown(folder).section("privacy").text


def test_the_same_folder_gives_the_same_private_page(private):
    folder, _ = private()
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


def test_an_audit_beside_the_page_is_linked_with_its_verdict(private):
    folder, recorded = private()
    assert "audit" not in words(shown(folder).section("privacy"))
    audit = {"format": 1, "stated": {"epsilon": recorded["epsilon"], "delta": recorded["delta"]},
             "checks": [{"name": "the noise has the stated size", "passed": False, "p": 1e-9}]}  # fmt: skip
    (folder / "audit.json").write_text(json.dumps(audit))
    assert "audit.html" not in (write_report(folder)).read_text()
    (folder / "audit.html").write_text("<!doctype html>")
    section = shown(folder).section("privacy")
    assert "leaks more than it states" in section.text and "the noise has the stated size" in section.text
    assert [a.attributes["href"] for a in section.all("a")] == ["audit.html"]
    (folder / "audit.json").write_text(json.dumps({"format": 1, "checks": 7}))
    with pytest.raises(RunError, match="audit"):
        write_report(folder)


@pytest.mark.parametrize("kind", TERMS)
def test_the_terminal_says_it_on_one_line(private, kind):
    _, recorded = private(TERMS[kind])
    line = printed({"privacy": recorded}, 400).splitlines()[-1]
    for needed in (f"epsilon = {epsilon_text(recorded['epsilon'])}", f"delta = {recorded['delta']:g}",
                   f"one {recorded['unit']} (add or remove one)", "against"):  # fmt: skip
        assert needed in line, line


@pytest.mark.parametrize("kind", TERMS)
def test_the_card_says_who_is_protected_from_whom_and_what_is_not_covered(private, kind):
    _, recorded = private(TERMS[kind])
    card = model_card({"privacy": recorded}, TREATY)
    body = card[card.index("## Privacy") : card.index("## Limits")]
    assert f"**epsilon = {epsilon_text(recorded['epsilon'])} and delta = {recorded['delta']:g} for" in body
    for needed in ("- Neighbours:", "- Against:", "- How:", "Not covered by the guarantee:", *UNCOVERED):
        assert needed in body
    assert "| Differential privacy | epsilon = " in card and "It may repeat passages" not in card


def test_the_figure_in_large_is_the_one_in_the_sentence():
    known = facts(planned(EXAMPLE))
    sentences = statement(known, known["epsilon"])
    assert f"epsilon = {epsilon_text(known['epsilon'])} and" in sentences[0]
    assert guarantee_of(known).short.startswith(f"epsilon = {epsilon_text(known['epsilon'])}")
    assert sections(sentences)[0] == ("", sentences[0])
    assert sections(["SIMULATED NOISE: from a seed.", *sentences])[1] == ("", sentences[0])


def test_a_summary_of_another_make_is_shown_as_it_is():
    given = guarantee_of({"unit": "record", "epsilon": 2.5})
    assert given.protects == "one record" and given.short == "epsilon = 2.50 for one record" and given.sentences == ()
    assert guarantee_of({}).short == "" and not guarantee_of({}).stated
