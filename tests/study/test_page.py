"""The pages of a study and what it shows while it goes on."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from foedus.errors import RunError
from foedus.report.study import margin_text, p_text, spell, spelled, write_study
from foedus.study.progress import shown

from ..report.pages import Page
from .studies import TABLE_ONLY, Stub, carried_out, made


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    study = made(tmp_path_factory.mktemp("study"))
    carried_out(study)
    return study.out


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """A study of the table alone, whose pages are quick to write."""
    study = made(tmp_path_factory.mktemp("table"), TABLE_ONLY)
    carried_out(study)
    return study.out


@pytest.fixture(scope="module")
def page(folder) -> Page:
    return Page((folder / "study.html").read_text("utf-8"))


def change(folder: Path, place: Path, edit) -> tuple[str, str]:
    """The pages of the same results with something edited."""
    found = json.loads((folder / "results.json").read_text("utf-8"))
    edit(found)
    (place / "results.json").write_text(json.dumps(found))
    write_study(place)
    return (place / "study.html").read_text("utf-8"), (place / "study.md").read_text("utf-8")


def test_the_page_is_well_formed_labelled_and_needs_nothing_else(page):
    assert page.faults == []


def test_the_same_results_give_the_same_pages_byte_for_byte(folder, tmp_path):
    html, md = change(folder, tmp_path, lambda found: None)
    assert html == (folder / "study.html").read_text("utf-8") and md == (folder / "study.md").read_text("utf-8")


def test_every_section_has_its_figures(page):
    text = page.root.section("result").text
    assert "27.27 ± 0.16" in text and "79.1 ± 0.5\u00a0%" in text and "7.99" in text and "3 of 3" in text
    assert "The method is first, −12.5\u00a0% against the best rival, FedProx; p < 0.001." in text
    assert "1.11 (1.11 to 1.11)" in page.root.section("curve-pace").text
    assert "no pull" in page.root.section("ablation-parts").text
    assert "foedus study study.toml" in page.root.section("facts").text
    assert len(page.root.all("svg", role="img")) == 2 * 5  # wide and narrow


def test_published_figures_are_marked_wherever_they_stand(page, folder):
    marked = "other data and model: compare order and ratios only"
    assert marked in page.root.section("published").text and marked in page.root.section("curve-pace").text
    assert (folder / "study.md").read_text("utf-8").count(marked) == 2


def test_what_gives_no_guarantee_stands_in_rows_of_its_own(table, tmp_path):
    def bare(found):
        found["table"]["rows"][1]["guarantee"] = None

    html, md = change(table, tmp_path, bare)
    groups = [cell.text for cell in Page(html).root.section("result").all("th", scope="rowgroup")]
    assert groups[:3] == ["Same guarantee", "No guarantee", "For reference"]
    assert "| FedProx (no guarantee) |" in md


def test_the_best_is_bold_only_where_it_is_significant(table, tmp_path):
    def unsure(found):
        found["table"]["best"]["perplexity"]["significant"] = False
        found["table"]["margins"][0]["significant"] = False

    html, md = change(table, tmp_path, unsure)
    assert "<b>27.27 ± 0.16</b>" in (table / "study.html").read_text("utf-8")
    assert "<b>27.27 ± 0.16</b>" not in html and "27.27 ± 0.16 (not significant)" in md
    assert "first, −12.5\u00a0% against the best rival, FedProx; not significant (p < 0.001)." in md


def broken(found) -> None:
    found["cells"][0].update(status="failed", error="DataError: <gone>")
    found["cells"][1].update(status="not done")
    found["table"].update(same_guarantee=False)
    found.update(split="test", test_reads=[{"study": "a", "when": "2030-01-01"}])


def reread(found) -> None:
    reads = [{"study": x, "when": "2030-01-01"} for x in "ab"]
    found.update(split="test", test_reads=reads, simulated_noise=False)


WARNINGS = {
    "broken": ["1 of 9 runs failed", "1 of 9 runs are not done yet", "Not the same guarantee.",
               "has read the test data once, on 2030-01-01", "Simulated noise."],
    "reread": ["the test data read 2 times"],
    "whole": ["the test data were not read", "Simulated noise."],
}  # fmt: skip


@pytest.mark.parametrize("edit", [broken, reread, lambda found: None], ids=WARNINGS)
def test_what_a_reader_must_know_stands_first_and_nothing_else(table, tmp_path, edit, request):
    html, md = change(table, tmp_path, edit)
    first, said = Page(html).root.all("header")[0].text, WARNINGS[request.node.callspec.id]
    for words in {words for some in WARNINGS.values() for words in some}:
        assert (words in first) == (words in md) == (words in said), words
    assert Page(html).faults == [] and "<gone>" not in html


def test_a_study_without_a_single_result_has_a_page(tmp_path):
    study = made(tmp_path)
    carried_out(study, Stub(study, breaks=lambda cell: True))
    html = (study.out / "study.html").read_text("utf-8")
    assert Page(html).faults == [] and "23 of 23 runs failed" in html and "Nothing is measured yet." in html
    assert "new, seed 1 broke" in html


def test_markdown_tables_have_equal_rows_and_plots_that_are_there(folder):
    text = (folder / "study.md").read_text("utf-8")
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block
    named = re.findall(r"\]\((plots/[^)]+)\)", text)
    assert len(named) == 5 and all((folder / name).read_bytes().startswith(b"<?xml") for name in named)


def test_plots_as_files_keep_no_stand_in_colour(folder):
    for file in (folder / "plots").iterdir():
        assert not re.search(r"#(..)fe\1\b", file.read_text()), file


def test_figures_are_spelled_by_their_kind():
    def metric(kind):
        return {"kind": kind}

    assert spell(metric("number"), 22.734) == "22.73" and spell(metric("share"), 0.868) == "86.8\u00a0%"
    assert spell(metric("small"), -0.00123) == "−0.0012" and spell(metric("bytes"), 1.2e6) == "1.2\u00a0MB"
    assert spell(metric("number"), None) == "–" == spelled(metric("number"), None)
    assert spelled(metric("share"), {"mean": 0.8, "sd": 0.01}) == "80.0 ± 1.0\u00a0%"
    assert spelled(metric("number"), {"mean": 8.0, "sd": None}) == "8.00"
    assert p_text({"n": 1, "p": None}) == "one seed, no test" and p_text({"n": 3, "p": 0.04321}) == "p = 0.043"
    assert margin_text({"kind": "points"}, -0.029) == "−2.9\u00a0points"


def test_results_that_are_not_there_are_told_in_three_parts(tmp_path):
    with pytest.raises(RunError, match="results of a study"):
        write_study(tmp_path)


@pytest.fixture
def no_pages(monkeypatch):
    monkeypatch.setattr("foedus.report.write_study", lambda folder: None)


def test_without_a_terminal_progress_is_plain_lines(tmp_path, no_pages):
    study = made(tmp_path, TABLE_ONLY)
    said = io.StringIO()
    runner = Stub(study, breaks=lambda cell: cell.name == "prox, seed 1")
    list(shown(study.run(runner), Console(file=said, width=200)))
    lines = said.getvalue().splitlines()
    assert "\x1b" not in said.getvalue() and len(lines) == 18
    assert lines[0] == "0/9 cells, 1 running: new, seed 1 begins"
    broke = "prox, seed 1 FAILED: RuntimeError: prox, seed 1 broke"
    assert re.fullmatch(rf"2/9 cells, 0 running, 1 failed, about .* left: {broke}", lines[3])
    assert re.fullmatch(r"9/9 cells, 0 running, 1 failed: plain, seed 3 done in .*", lines[-1])


def test_on_a_terminal_progress_is_one_bar(tmp_path, no_pages):
    study = made(tmp_path, TABLE_ONLY)
    said = io.StringIO()
    list(shown(study.run(Stub(study)), Console(file=said, force_terminal=True, width=120)))
    assert "9/9" in said.getvalue() and "new, seed 1 done in" in said.getvalue()


def test_the_time_left_is_known_from_what_was_done_before(tmp_path, no_pages):
    study = made(tmp_path, TABLE_ONLY)
    steps = study.run(Stub(study))
    while next(steps).done < 4:
        pass
    steps.close()
    first = next(iter(again := study.run(Stub(study))))
    assert first.event.kind == "kept" and first.left == pytest.approx(2.0 * 8)
    again.close()
