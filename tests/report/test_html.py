from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foedus.errors import RunError
from foedus.report import read_run, write_report
from foedus.report.compare import figure, signed_percent

from .conftest import NOT_REAL, STATEMENT, TREATY, write_run
from .pages import Page, rows, values

PHASES = ("base", "local_only", "federated", "pooled")


def page_of(folder: Path) -> Page:
    html = write_report(folder).read_text(encoding="utf-8")
    page = Page(html)
    assert page.faults == []
    return page


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Page, dict[str, Any], str]:
    """The page of an ordinary run with all baselines, its summary, and its text; for tests that only read."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    summary = write_run(folder, failures=[(2, "sci.med", "its loss is not a number")])
    return page_of(folder), summary, (folder / "report.html").read_text(encoding="utf-8")


def test_the_table_by_domain_holds_the_very_numbers_of_the_summary(whole):
    page, summary, _ = whole
    evaluation = summary["evaluation"]
    table = rows(page.root.section("result").all("table")[0])
    for domain in evaluation["base"]["perplexity"]["by_domain"]:
        *shown, against_base, against_pooled = values(table[domain])
        expected = [evaluation[phase]["perplexity"]["by_domain"][domain] for phase in PHASES]
        assert shown == expected
        assert against_base == expected[2] / expected[0] - 1
        assert against_pooled == expected[2] / expected[3] - 1
        assert [cell.text.strip() for cell in table[domain][:4]] == [figure(value) for value in expected]
        assert table[domain][4].text.strip() == signed_percent(against_base)
    for name, mean in (("All text", "micro"), ("Mean over silos", "macro")):
        assert values(table[name])[:4] == [evaluation[phase]["perplexity"][mean] for phase in PHASES]


def test_the_page_opens_with_the_four_overall_figures_and_the_verdict(whole):
    page, summary, _ = whole
    result = page.root.section("result")
    assert values(result.all("dd", class_="big")) == [
        summary["evaluation"][phase]["perplexity"]["micro"] for phase in PHASES
    ]
    assert result.all("p", class_="verdict")[0].text.startswith("Federated training lowered perplexity on 5 of 5")


def test_every_metric_that_was_measured_has_a_table_by_domain(make_run):
    result = page_of(make_run(silos=2, rounds=2, alone=False, labels=True)).root.section("result")
    captions = " ".join(caption.text for caption in result.all("caption"))
    for title in ("Perplexity by domain", "Bits per byte by domain", "Accuracy by domain", "Next-token accuracy"):
        assert title in captions


def test_the_privacy_statement_stands_as_it_is_in_the_summary(whole):
    root = whole[0].root
    assert root.section("privacy").all("p", class_="statement")[0].text == STATEMENT
    assert any(link.text == "no privacy guarantee" for link in root.all("header")[0].all("a"))


def test_a_guarantee_is_shown_with_its_unit_and_its_numbers(make_run):
    guarantee = {"unit": "record", "epsilon": 2.5, "delta": 1e-5, "statement": "Each record is protected."}
    root = page_of(
        make_run(silos=2, rounds=2, alone=False, change=lambda summary: summary.update(privacy=guarantee))
    ).root
    words = root.section("privacy").text
    assert "record" in words and "2.5" in words and "1e-05" in words
    assert "no privacy guarantee" not in root.all("header")[0].text


def test_bytes_times_and_holdings_are_those_of_the_summary(whole):
    summary, root = whole[1], whole[0].root
    by_silo, by_round = root.section("traffic").all("table")
    for silo, (up, down) in ((silo, values(cells)) for silo, cells in rows(by_silo).items()):
        assert (up, down) == (sum(summary["bytes"]["up"][silo]), sum(summary["bytes"]["down"][silo]))
    assert values(rows(by_round)["3"])[0] == sum(series[2] for series in summary["bytes"]["up"].values())
    times = rows(root.section("time").all("table")[0])
    assert values(times["training"])[0] == summary["seconds"]["train"]
    assert values(times["the federation"])[0] == summary["seconds"]["federation"]
    assert sum(values(cells)[0] for cells in times.values()) == pytest.approx(summary["seconds"]["total"])
    sizes, matrix = root.section("holdings").all("table")
    for silo, held in summary["holdings"].items():
        assert values(rows(sizes)[silo]) == [held[part] for part in ("train", "validation", "test", "tokens")]
        assert sum(values(rows(matrix)[silo])) == sum(held["domains"].values())


def test_the_facts_name_every_digest_and_version(whole):
    summary, words = whole[1], whole[0].root.section("facts").text
    facts = [summary["treaty"]["digest"], summary["model"]["digest"], summary["adapter"]["sha256"]]
    for fact in facts + list(summary["versions"].values()):
        assert fact in words
    assert TREATY.strip() in words


def test_the_code_loads_the_adapter_with_peft(whole):
    words = whole[0].root.section("use").text
    assert 'PeftModel.from_pretrained(base.model, "adapter")' in words
    assert "foedus run treaty.toml" in words


def test_every_plot_is_there_for_wide_and_for_narrow_pages_with_a_table_beside_it(whole):
    main = whole[0].root.all("main")[0]
    figures = main.all("figure")
    assert len(figures) == 7
    for one in figures:
        assert [svg.attributes["class"] for svg in one.all("svg")] == ["wide", "narrow"]
        assert one.all("figcaption")[0].text.strip()
    for section in main.all("section"):
        assert not section.all("figure") or section.all("table")


def test_text_in_plots_is_text_and_colours_follow_the_page(whole):
    html = whole[2]
    drawings = "".join(re.findall(r"<svg class=\"(?:wide|narrow).*?</svg>", html, flags=re.S))
    assert ">talk.politics.mideast</text>" in drawings
    assert "var(--federated)" in drawings
    assert not re.search(r"#[0-9a-f]{6}\b", drawings), "a colour that dark pages cannot change"
    assert "DejaVu" not in drawings


def test_the_page_needs_nothing_but_itself(whole):
    html = whole[2]
    for foreign in ("http://", "https://", "@import", "url(http", "//cdn"):
        assert foreign not in html
    assert "default-src 'none'" in html


def luminance(colour: str) -> float:
    if len(colour) == 4:
        colour = "#" + "".join(2 * digit for digit in colour[1:])
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """WCAG 2.2: from 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_and_marks_stand_out_in_light_dark_and_print(whole):
    schemes = re.findall(r":root \{(.*?)\}", whole[2], flags=re.S)
    assert len(schemes) == 3
    for scheme in schemes:
        colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]+)", scheme))
        for ground in (colours["paper"], colours["panel"]):
            assert all(contrast(colours[name], ground) >= 4.5 for name in ("ink", "muted", "link"))
        for name in ("base", "local-only", "federated", "pooled", "up", "down", "fail"):
            assert contrast(colours[name], colours["paper"]) >= 3


def test_headings_go_down_one_level_at_a_time(whole):
    html = whole[2]
    levels = [int(level) for level in re.findall(r"<h([1-6])[ >]", html)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


def test_the_same_folder_gives_the_same_bytes(make_run):
    folder = make_run(silos=3, rounds=2, failures=[(2, "sci.med", "gone")])
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    assert str(folder).encode() not in first


@pytest.mark.parametrize("ended", [True, False])
def test_a_name_that_looks_like_markup_is_only_a_name(make_run, ended):
    evil = [
        '<script>alert("1")</script>',
        "a & b's <img src=x onerror=alert(1)>",
        '"><svg onload=alert(1)>',
        "{{ 7*7 }}",
    ]
    treaty = TREATY.replace(NOT_REAL, "<b>bold</b>")
    folder = make_run(names=evil, rounds=1, ended=ended, treaty=treaty, failures=[(1, evil[0], "<i>why</i> ]]>")])
    page = page_of(folder)
    assert len(page.root.all("script")) == 1
    assert page.root.all("img") == [] and page.root.all("b", class_="bold") == []
    table = rows(page.root.section("result").all("table")[0])
    assert set(evil) <= set(table)
    assert "<b>bold</b>" in page.root.all("header")[0].text
    assert "<i>why</i> ]]>" in page.root.section("attendance").text


def test_names_in_any_script_or_none_are_drawn(make_run):
    names = [
        "医学 新聞",
        "$\\frac{1}$",
        "двор, 🏥",
        "two\nlines",
        "_hidden",
        "tab\tbell\x07",
        "\u202ertl",
        "-",
        "x" * 300,
    ]
    root = page_of(make_run(names=names, rounds=1)).root
    assert {"医学 新聞", "$\\frac{1}$", "_hidden"} <= {text.text for text in root.all("text")}


def test_a_run_without_baselines_compares_what_there_is(make_run):
    root = page_of(make_run(silos=2, rounds=2, alone=False)).root
    words = root.section("result").text
    assert "pool" not in words.lower() and "alone" not in words.lower()
    assert len(root.section("result").all("dd", class_="big")) == 2


def test_a_run_with_no_comparison_at_all_still_says_its_perplexity(make_run):
    def only_federated(summary: dict[str, Any]) -> None:
        summary["evaluation"] = {"federated": summary["evaluation"]["federated"]}

    words = page_of(make_run(silos=2, rounds=2, alone=False, change=only_federated)).root.section("result").text
    assert "the base model was not evaluated beside it" in words


def test_a_run_under_way_says_so_and_shows_what_is_there(make_run):
    root = page_of(make_run(silos=2, ended=False)).root
    assert "has not ended: 8 of 8 rounds are recorded" in root.all("p", class_="status")[0].text
    assert "validation text" in root.section("result").text
    assert "assume no guarantee" in root.section("privacy").text
    assert "no record closes it yet" in root.section("ledger").text
    assert "foedus resume" in root.section("use").text
    assert root.section("training").all("figure")


def test_a_folder_with_only_a_treaty_makes_a_page(tmp_path):
    (tmp_path / "treaty.toml").write_text(TREATY)
    root = page_of(tmp_path).root
    assert "0 of 8 rounds" in root.all("p", class_="status")[0].text
    assert "No evaluation of the federated model" in root.section("result").text
    assert "holds no ledger" in root.section("ledger").text


@pytest.mark.parametrize(
    "missing",
    ["evaluation", "holdings bytes seconds", "privacy versions hardware adapter model",
     "treaty algorithm failures seed rounds silos name"],
)  # fmt: skip
def test_whatever_the_summary_lacks_the_page_is_sound(make_run, missing):
    def without(summary: dict[str, Any]) -> None:
        for key in missing.split():
            del summary[key]

    page_of(make_run(silos=1, rounds=1, alone=False, change=without))


@pytest.mark.parametrize("missing", ["metrics.jsonl", "ledger.jsonl", "treaty.toml", "summary.json"])
def test_whichever_file_the_folder_lacks_the_page_is_sound(make_run, missing):
    folder = make_run(silos=2, rounds=2, alone=False)
    (folder / missing).unlink()
    page_of(folder)


def test_what_silos_do_not_disclose_is_not_shown_and_the_page_says_why(make_run):
    treaty = TREATY.replace("loss = true", "loss = false").replace("holdings = true", "holdings = false")
    folder = make_run(silos=2, rounds=2, alone=False, treaty=treaty, change=lambda summary: summary.update(holdings={}))
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in metrics:
        row.pop("loss", None)
        for facts in row.get("silos", {}).values():
            facts.pop("loss")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    root = page_of(folder).root
    assert "No losses are recorded" in root.section("training").text
    assert "lets no silo disclose its loss" in root.section("training").text
    assert "lets no silo disclose what it holds" in root.section("holdings").text


def test_where_only_the_mean_loss_is_known_it_is_drawn(make_run):
    folder = make_run(silos=3, rounds=3, alone=False)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in metrics:
        row["silos"] = {name: {"bytes_up": 1} for name in row.get("silos", {})}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    section = page_of(folder).root.section("training")
    assert "all silos together" in section.text
    assert list(rows(section.all("table")[0])) == ["all silos together"]


def test_a_run_under_way_compares_models_after_the_same_round_on_the_same_text(make_run):
    folder = make_run(silos=2, rounds=4, ended=False)
    lines = [
        line for line in (folder / "metrics.jsonl").read_text().splitlines()[:-1] if '"pooled","round":4' not in line
    ]
    assert any('"pooled","round":3' in line for line in lines)
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    result = page_of(folder).root.section("result")
    assert "after round 4" in result.text and "Pooled" not in result.text


def test_a_value_that_was_not_finite_is_called_so(make_run):
    def diverged(summary: dict[str, Any]) -> None:
        perplexity = summary["evaluation"]["federated"]["perplexity"]
        perplexity |= {"micro": None, "macro": None, "by_domain": dict.fromkeys(perplexity["by_domain"])}

    root = page_of(make_run(silos=2, rounds=2, change=diverged)).root
    assert "training diverged" in root.section("result").text
    assert "not a number" in root.section("result").all("table")[0].text


def test_a_hundred_silos_stay_readable(make_run):
    folder = make_run(silos=100, mixed=True, rounds=3, alone=False, failures=[(3, "silo-050", "did not answer")])
    root = page_of(folder).root
    assert (folder / "report.html").stat().st_size < 2_000_000
    assert "the line is the median" in root.section("training").text
    assert len(rows(root.section("holdings").all("table")[0])) == 100
    for svg in root.all("svg", class_="wide"):
        assert int(svg.attributes["viewbox"].split()[3]) < 1100, "no plot grows beyond a screen or so"


def test_sixty_domains_are_a_scatter_and_a_table_with_its_means_first(make_run):
    root = page_of(make_run(silos=60, rounds=1, alone=False)).root
    table = root.section("result").all("table")[0]
    assert list(rows(table))[:2] == ["All text", "Mean over silos"]
    assert "below the line is better" in root.section("result").text


def test_failures_are_named_with_their_round_and_reason(whole):
    section = whole[0].root.section("attendance")
    row = section.all("tbody")[0].all("tr")[0]
    assert [cell.text for cell in row.inside] == ["2", "sci.med", "its loss is not a number"]
    assert section.all("figure")


def test_a_run_without_failures_says_so_without_a_plot(make_run):
    section = page_of(make_run(silos=2, rounds=2, alone=False)).root.section("attendance")
    assert "No silo failed in any round, and every silo took part in every round" in section.text
    assert not section.all("figure")


def test_a_whole_chain_is_recomputed_and_a_changed_record_is_found(make_run):
    folder = make_run(silos=2, rounds=4, alone=False)
    assert "All 6 hashes were recomputed" in page_of(folder).root.section("ledger").text
    ledger = folder / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('"round":4', '"round":5', 1))
    assert "broken at record 4" in page_of(folder).root.section("ledger").text


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda records: records.pop(3), "index"),
        (lambda records: records[3].update(previous="0" * 64), "does not name the hash"),
        (lambda records: records[3].update(hash="0" * 64), "not that of its content"),
        (lambda records: records[3].update(body={"loss": float("nan")}), "not that of its content"),
        (lambda records: records[0].update(previous="f" * 64), "does not name the hash"),
    ],
)
def test_every_kind_of_damage_to_the_chain_is_found(make_run, damage: Callable[[list], Any], why):
    folder = make_run(silos=2, rounds=4, alone=False)
    records = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    damage(records)
    (folder / "ledger.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    ledger = read_run(folder).ledger
    assert ledger.broken_at in (0, 3) and why in ledger.why


def test_a_round_that_was_written_again_counts_once(make_run):
    folder = make_run(rounds=3)
    before = read_run(folder)
    lines = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(lines + lines)
    after = read_run(folder)
    assert len(after.rounds) == len(before.rounds) and len(after.evaluations) == len(before.evaluations)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", b"{"), ("summary.json", b"[1]"), ("summary.json", b"\xff{}"), ("treaty.toml", b"= 3"),
        ("metrics.jsonl", b"{\n{}\n"), ("metrics.jsonl", b"3\n"), ("ledger.jsonl", b"not json\n"),
        ("summary.json", b"[" * 200_000),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_by_its_name(make_run, name, content):
    folder = make_run(silos=2, rounds=2, alone=False)
    (folder / name).write_bytes(content)
    with pytest.raises(RunError, match=re.escape(name)):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_half_a_last_line_is_left_out(make_run):
    folder = make_run(silos=2, rounds=2, names=["Zürich", "Łódź"])
    before = len(read_run(folder).rounds)
    for cut in (3, 11, 12):
        with (folder / "metrics.jsonl").open("ab") as file:
            file.write('{"silo":"Zürich'.encode()[:cut])
        assert len(read_run(folder).rounds) == before
        lines = (folder / "metrics.jsonl").read_bytes()
        (folder / "metrics.jsonl").write_bytes(lines[: lines.rfind(b"\n") + 1])


@pytest.mark.parametrize("make", [False, True])
def test_a_folder_that_is_no_run_is_refused(tmp_path, make):
    folder = tmp_path / "elsewhere"
    if make:
        folder.mkdir()
    with pytest.raises(RunError, match="the folder of a run"):
        write_report(folder)


def test_an_earlier_report_stays_until_the_new_one_is_whole(make_run, monkeypatch):
    folder = make_run(silos=2, rounds=2, alone=False)
    first = write_report(folder).read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("foedus.report.folder.os.replace", full_disk)
    with pytest.raises(RunError, match="No space left"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == first
    assert not list(folder.glob(".report*"))
