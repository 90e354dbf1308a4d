"""`foedus ledger` on the command line, and the page for auditors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from foedus import console
from foedus.cli_ledger import app
from foedus.errors import FoedusError
from foedus.governance import Ledger
from foedus.governance.ledger import verify
from foedus.report import ledger_page
from foedus.report.ledger_page import document, render

from .governance.test_witness import KEYS, at, coordinators, sha, silos
from .report.pages import Page, rows


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setattr(console.out, "_width", 200)
    monkeypatch.setattr(console.err, "_width", 200)


@pytest.fixture
def three(tmp_path):
    """The ledgers of a coordinator and two silos that saw the same four rounds."""
    for path, make in {"c": coordinators, "a": silos, "b": silos}.items():
        folder = tmp_path / path
        folder.mkdir()
        make(folder / "ledger.jsonl") if path == "c" else make(folder / "ledger.jsonl", path)
    return tmp_path


def called(*words: str | Path, code: int = 0):
    done = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(done.exception, FoedusError):
        raise done.exception
    assert done.exit_code == code, done.output
    return done


def test_ledgers_of_three_parties_prove_that_they_saw_the_same_rounds(three):
    said = called("verify", three / "c", three / "a", three / "b").stdout
    assert said.count("whole, ") == 3 and said.count("4 rounds agree; nothing contradicts") == 3
    facts = json.loads(called("verify", three / "c", three / "a", "--json").stdout)
    assert facts["comparisons"][0]["same"] and len(facts["comparisons"][0]["agreed"]) == 4 and not facts["faults"]


def test_where_two_parties_part_is_said_and_is_an_exit_code(three, tmp_path):
    (tmp_path / "other").mkdir()
    silos(tmp_path / "other/ledger.jsonl", "a", changed=at(3, task=sha("other")))
    done = called("verify", three / "c", tmp_path / "other", code=1)
    assert "they contradict each other" in done.stdout and "round 3: the task" in done.stdout


def test_a_change_names_its_file_and_line_and_the_others_are_still_read(three):
    file = three / "a/ledger.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:2], lines[2].replace(b'"round":2', b'"round":9'), *lines[3:]]))
    done = called("verify", three / "c", three / "a", code=1)
    assert "ledger.jsonl, line 3" in done.stderr and "c/ledger.jsonl: whole" in done.stdout


def test_a_cut_is_found_by_a_head_and_a_stranger_by_the_key(three):
    file = three / "c/ledger.jsonl"
    head = json.loads(called("show", file, "--json").stdout)["head"]
    key = KEYS["coordinator"].public.hex()
    assert "whole" in called("verify", file, "--head", head, "--key", key).stdout
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))
    assert "cut off" in called("verify", file, "--head", head, code=1).stderr
    assert "signed by" in called("verify", file, "--key", "ab" * 32, code=1).stderr


def test_show_prints_the_last_records_and_the_head(three):
    said = called("show", three / "c", "--last", 2).stdout
    assert len(re.findall(r"^ +\d+  round", said, re.M)) == 2 and f"task {sha('task', 4)[:12]}…" in said
    assert "Head: 6:" in said
    chosen = json.loads(called("show", three / "c", "--kind", "opened", "--json").stdout)["records"]
    assert [record["kind"] for record in chosen] == ["opened"]


def test_an_export_holds_all_of_a_ledger_as_json(three):
    called("export", three / "c", three / "out.json", "--beside", three / "a")
    found = json.loads((three / "out.json").read_text())
    assert found["records"] == verify(three / "c/ledger.jsonl") and found["signed"] and found["verified"]
    assert found["comparisons"][0]["same"] and found["kinds"] == {"keeper": 1, "opened": 1, "round": 4}


def test_the_page_for_auditors_is_whole_labelled_and_needs_nothing_but_itself(three):
    called("export", three / "c", three / "out.html", "--beside", three / "a")
    html = (three / "out.html").read_text()
    page = Page(html)
    assert not page.faults
    assert "default-src 'none'" in html and not re.search(r"https?://|@import|url\(http", html)
    assert "Every hash and link of 6 records" in page.root.section("state").text
    assert KEYS["coordinator"].public.hex() in page.root.section("state").text
    assert [cells[0].text for cells in rows(page.root.section("kinds").all("table")[0]).values()] == ["1", "1", "4"]
    assert "4 rounds agree in every digest" in page.root.section("comparisons").text
    assert len(page.root.section("records").all("tr")) == 7
    levels = [int(level) for level in re.findall(r"<h([1-6])[ >]", html)]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


def test_the_page_says_where_parties_part_and_what_was_pruned_and_that_nobody_signs(tmp_path):
    ledger, other = coordinators(tmp_path / "c"), silos(tmp_path / "a", "a", changed=at(2, task=sha("x")))
    called("export", other.path, tmp_path / "one.html", "--beside", ledger.path)
    assert "They contradict each other" in Page((tmp_path / "one.html").read_text()).root.section("comparisons").text
    ledger.prune(keep=2)
    assert "2 records were dropped" in Page(render(document(ledger.path))).root.section("state").text
    plain = Ledger(tmp_path / "plain")
    plain.append("round", {"round": 1, "why": "<script>alert(1)</script>"})
    html = render(document(plain.path))
    assert "Nobody signs this ledger" in html and "<script>alert" not in html


def test_a_long_ledger_shows_its_end_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_page, "SHOWN", 3)
    section = Page(render(document(coordinators(tmp_path / "c").path))).root.section("records")
    assert [row.attributes.get("id") for row in section.all("tr")] == [None, "r3", "r4", "r5"]
    assert "The last 3 are shown; 3 earlier ones are in the JSON export" in section.text


def test_what_is_no_ledger_and_what_is_no_page_are_refused(three):
    with pytest.raises(FoedusError, match="none at"):
        called("verify", three / "nowhere")
    with pytest.raises(FoedusError, match=".json or .html"):
        called("export", three / "c", three / "out.pdf")


def test_a_homes_ledger_is_pruned_by_its_keeper(tmp_path):
    from foedus.deploy.home import SiloHome, SiloSettings

    home = SiloHome.create(tmp_path / "hospital-a", SiloSettings("hospital-a"))
    ledger = home.open_ledger()
    for i in range(5):
        ledger.append("asked", {"number": i})
    facts = json.loads(called("prune", "--keep", 2, "--home", home.path, "--json").stdout)
    assert facts["dropped"] == 3 and facts["head"] == str(ledger.head)
    assert "pruned" in {record["kind"] for record in verify(home.ledger, key=home.public.hex())}


def test_every_command_explains_itself():
    commands = typer.main.get_command(app).commands
    assert set(commands) == {"verify", "show", "export", "prune"}
    for name in commands:
        assert "--json" in called(name, "--help").output
