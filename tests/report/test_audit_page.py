"""The audit's page. TEST FIXTURE: every figure in it is invented; nothing was attacked."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foedus.errors import RunError
from foedus.report.audit import allowed_tpr, findings, most_found, render, verdict, write_audit

from .pages import Element, Page, rows, values


def interval(value: float, wide: float = 0.02) -> dict[str, float]:
    return {"value": value, "low": max(0.0, value - wide), "high": min(1.0, value + wide)}


def attack_on_members(name: str, auc: float, **more: Any) -> dict[str, Any]:
    curve = [[i / 50, (i / 50) ** (1 / auc - 0.99)] for i in range(51)]
    tpr = {"0.001": interval(0.004, 0.003), "0.01": interval(0.03, 0.01)}
    return {"name": name, "auc": interval(auc), "tpr": tpr, "curve": curve, **more}


def bound(method: str, epsilon: float | None, canaries: str = "gradient", **more: Any) -> dict[str, Any]:
    of = {"canaries": canaries, "method": method, "epsilon": epsilon, "estimate": False, "ceiling": 2.15}
    return of | {"count": 1000, "confidence": 0.95, "delta": 1e-5, "source": "Steinke et al. 2023"} | more


def inversion_row(defence: str, batch: int, tokens: float) -> dict[str, Any]:
    of = {"attack": "span", "sent": "LoRA, rank 8", "batch": batch, "defence": defence, "exact": float(tokens == 1)}
    return of | {"tokens": tokens, "rouge1": tokens, "rouge2": 0.9 * tokens, "rougeL": tokens, "seconds": 0.4 * batch}


AUDIT: dict[str, Any] = {
    "format": 1,
    "run": {"name": "newsgroups-fixture", "model": "smollm2-135m", "adapter": "LoRA, rank 8", "silos": 8, "rounds": 20},
    "seconds": 61.2,
    "simulated_noise": False,
    "stated": {
        "epsilon": 8.0, "delta": 1e-5, "unit": "example", "neighbours": "add or remove one example", "rdp": 8.73,
        "statement": "Whoever reads the adapter learns almost nothing about one example. Figures invented.",
        "adversary": "whoever sees every message",
    },
    "membership": {
        "members": 500, "nonmembers": 480, "target": "the released adapter", "confidence": 0.95,
        "drawn": "training rows against held-out rows of the same silos",
        "attacks": [
            attack_on_members("loss", 0.52), attack_on_members("reference", 0.55),
            attack_on_members("lira", 0.56, note="16 shadow adapters"), attack_on_members("window", 0.51),
        ],
    },
    "canaries": {
        "count": 200, "inserted": 101, "confidence": 0.95,
        "exposure": [
            {"kind": "random tokens", "canaries": 50, "mean": 1.91, "max": 6.12, "most_possible": 9.97,
             "baseline": 1.44}
        ],
        "extraction": [
            {"kind": "random tokens", "tried": 50, "exact": 0, "tokens": 0.08, "prefix": 8,
             "examples": [{"prompt": "blue seven", "truth": "lamp", "recovered": "& <door>", "source": "canary"}]}
        ],
        "bounds": [
            bound("one-run", 1.93), bound("f-DP one-run", 2.6, ceiling=3.07), bound("Clopper-Pearson", None),
            bound("Gaussian fit", 9.1, estimate=True, ceiling=6.78), bound("one-run", 0.2, "input", ceiling=None),
        ],
    },
    "inversion": {
        "model": "smollm2-135m", "sentence": "the patient has diabetes", "tokens": 5,
        "rows": [inversion_row(defence, batch, tokens / batch) for defence, tokens in (("none", 1.0), ("noise 1", 0.0))
                 for batch in (1, 4, 64)]
        + [inversion_row("none", 1, 0.75) | {"attack": "token bag", "exact": None, "rouge1": None, "note": "no order"}],
        "examples": [
            {"attack": "span", "sent": "LoRA, rank 8", "defence": "none", "batch": 1, "source": "example",
             "truth": ["the patient has diabetes"], "recovered": ["the patient has diabetes"]},
            {"attack": "span", "sent": "LoRA, rank 8", "defence": "noise 1", "batch": 1, "source": "example",
             "truth": ["the patient has diabetes"], "recovered": []},
        ],
    },
    "checks": [
        {"name": "noise has the stated size", "passed": True, "p": 0.41, "detail": "chi-square, 1 048 576 samples"},
        {"name": "no unit moves the sum further than its clip", "passed": True, "p": None},
    ],
    "reconstruction": {
        "form": "The chance of naming the text right, at most.", "source": "Hayes et al. 2023 (arXiv 2302.07225)",
        "bounds": [{"prior": 1e-6, "bound": 0.003}, {"prior": 0.001, "bound": 0.31}],
    },
}  # fmt: skip

Change = Callable[[dict[str, Any]], None]


def changed(change: Change) -> dict[str, Any]:
    """The audit with a change, and without curves, which take long to draw."""
    audit = copy.deepcopy(AUDIT)
    for attack in audit["membership"]["attacks"]:
        attack["curve"] = []
    audit["inversion"]["rows"] = audit["inversion"]["rows"][-1:]
    change(audit)
    return audit


def page_of(audit: dict[str, Any]) -> Page:
    page = Page(render(audit))
    assert page.faults == []
    return page


@pytest.fixture(scope="module")
def whole() -> Page:
    return page_of(AUDIT)


def texts(cells: list[Element]) -> list[str]:
    return [" ".join(cell.text.split()) for cell in cells]


def set_at(*path: str | int, value: Any) -> Change:
    def change(audit: dict[str, Any]) -> None:
        inside: Any = audit
        for key in path[:-1]:
            inside = inside[key]
        inside[path[-1]] = value

    return change


# ---- the verdict ----


def test_an_audit_that_finds_nothing_says_so_and_claims_no_proof():
    kind, said = verdict(AUDIT)
    assert kind == "consistent" and "ε = 8" in said and "cannot prove" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_at("checks", 0, "passed", value=False), "noise has the stated size"),
        (set_at("canaries", "bounds", 0, "epsilon", value=8.4), "bounds ε from below by 8.4"),
        (set_at("membership", "attacks", 1, "tpr", "0.001", value={"value": 1, "low": 0.999, "high": 1}), "at least"),
    ],
)
def test_a_failed_check_a_bound_above_epsilon_and_an_impossible_attack_each_refute_the_statement(change, said):
    audit = changed(change)
    audit["stated"]["epsilon"] = 8.0 if "canaries" in said or "bounds" in said else 2.0
    audit["canaries"]["bounds"] = audit["canaries"]["bounds"][:1]
    kind, words = verdict(audit)
    assert kind == "violated" and said in words and len(findings(audit)) == 1
    section = page_of(audit).root.section("verdict")
    assert "The guarantee does not hold" in section.text and said in section.all("p", class_="verdict")[0].text


def test_an_estimate_above_epsilon_refutes_nothing():
    assert AUDIT["canaries"]["bounds"][3]["epsilon"] > AUDIT["stated"]["epsilon"]
    assert findings(AUDIT) == []


def test_a_bound_that_is_just_epsilon_refutes_nothing():
    assert findings(changed(set_at("canaries", "bounds", 0, "epsilon", value=8.0))) == []


def test_without_a_guarantee_the_page_says_that_first():
    none = {"epsilon": None, "delta": None, "unit": "none", "statement": "This run gives no privacy guarantee."}
    audit = changed(lambda a: a.update(stated=none, reconstruction={}))
    root = page_of(audit).root
    assert verdict(audit)[0] == "no guarantee" and allowed_tpr(audit) == {}
    assert "No guarantee to test" in root.section("verdict").text
    assert "no bound" in root.section("reconstruction").text
    assert "stated ε allows" not in root.section("membership").text


def test_a_failed_check_counts_without_a_guarantee_too():
    audit = changed(set_at("checks", 0, "passed", value=False))
    audit["stated"]["epsilon"] = None
    assert verdict(audit)[0] == "violated"


def test_with_nothing_measured_the_run_is_called_untested():
    audit = {"format": 1, "stated": AUDIT["stated"]}
    assert verdict(audit)[0] == "not tested"
    assert "nothing here has tested it" in page_of(audit).root.section("verdict").text


def test_seeded_noise_is_called_simulated_at_the_top(whole):
    assert "Simulated noise" not in whole.root.all("header")[0].text
    root = page_of(changed(set_at("simulated_noise", value=True))).root
    assert "Simulated noise" in root.all("p", class_="status")[0].text


# ---- what each section holds ----


def test_the_top_has_what_is_stated_beside_the_worst_that_was_found(whole):
    tiles = whole.root.section("verdict").all("dd", class_="big")
    assert values(tiles) == [8.0, 2.6, 0.03, 2]
    assert [tile.text for tile in tiles] == ["8", "2.6", "3\u00a0%", "2 of 2"]


def test_the_membership_table_holds_the_very_numbers_with_their_intervals(whole):
    table = rows(whole.root.section("membership").all("table")[0])
    auc, low_rate, high_rate = table["Loss against the base model's"]
    assert values([auc, low_rate, high_rate]) == [0.55, 0.004, 0.03]
    assert texts([auc]) == ["0.55 0.53 to 0.57"] and texts([high_rate]) == ["3 % 2 % to 4 %"]
    assert "16 shadow adapters" in whole.root.section("membership").text and "window" in table


def test_what_epsilon_allows_is_a_line_of_the_table_and_of_the_plot(whole):
    section = whole.root.section("membership")
    allowed = rows(section.all("table")[0])["The most that the stated ε allows"]
    assert values(allowed[1:]) == [allowed_tpr(AUDIT)[fpr] for fpr in ("0.001", "0.01")]
    assert any("the most ε allows" in text.text for text in section.all("text"))


def test_what_epsilon_allows_is_the_known_trade_off():
    assert most_found(0.0, 1.0, 1e-5) == 1e-5
    assert most_found(0.2, 0.0, 0.0) == pytest.approx(0.2)
    assert most_found(0.01, 8.0, 1e-5) == pytest.approx(1 - math.exp(-8) * (1 - 1e-5 - 0.01))
    assert most_found(0.5, 1e6, 0.0) == 1.0


def test_bounds_stand_beside_what_ideal_canaries_reach_and_estimates_are_called_so(whole):
    table = rows(whole.root.section("canaries").all("table")[0])
    one_run, fit = (next(cells for name, cells in table.items() if name.startswith(start))
                    for start in ("one-run, gradient", "Gaussian fit"))  # fmt: skip
    assert values(one_run) == [1.93, 2.15, 1000, 0.95]
    assert values(fit)[:2] == [9.1, 6.78]
    assert [("an estimate, no bound" in name) for name in table] == [False, False, False, True, False]
    assert any("stated ε" in text.text for text in whole.root.section("canaries").all("text"))


def test_exposure_and_extraction_are_shown_as_measured(whole):
    tables = whole.root.section("canaries").all("table")
    assert values(rows(tables[1])["random tokens"]) == [50, 1.91, 6.12, 9.97, 1.44]
    assert values(rows(tables[2])["random tokens"]) == [50, 0, 0.08, 8]
    assert texts(rows(tables[3])["blue seven"]) == ["lamp", "& <door>"]


def test_every_inversion_has_its_row_and_the_example_its_text(whole):
    example, table = whole.root.section("inversion").all("table")
    lines = table.all("tbody")[0].all("tr")
    assert len(lines) == len(AUDIT["inversion"]["rows"])
    assert values(lines[0].inside[1:]) == [1, 1.0, 1.0, 1.0, 0.9, 1.0, 0.4]
    assert texts(lines[-1].inside)[1:5] == ["1", "–", "75 %", "–"] and "no order" in lines[-1].text
    told = [texts(line.inside) for line in example.all("tbody")[0].all("tr")]
    sentence = AUDIT["inversion"]["sentence"]
    assert told == [
        ["span", "LoRA, rank 8", sentence, sentence],
        ["span", "LoRA, rank 8; noise 1", sentence, "nothing"],
    ]


def test_only_what_was_tried_at_several_batch_sizes_is_drawn(whole):
    drawn = " ".join(text.text for text in whole.root.section("inversion").all("text"))
    assert "span, LoRA, rank 8: none" in drawn and "token bag" not in drawn


def test_every_check_has_its_outcome_and_its_p(whole):
    table = whole.root.section("checks").all("tr")
    assert [cell.text for cell in table[1].inside[1:]] == ["passed", "0.41"]
    assert [cell.text for cell in table[2].inside[1:]] == ["passed", "–"]
    failed = page_of(changed(set_at("checks", 0, "passed", value=False))).root.section("checks")
    assert (
        len(failed.all("td", class_="failed")) == 1
        and "1 of 2" in page_of(changed(set_at("checks", 0, "passed", value=False))).root.section("verdict").text
    )


def test_the_bound_on_reconstruction_is_named_with_its_source(whole):
    section = whole.root.section("reconstruction")
    assert "2302.07225" in section.text
    assert values(rows(section.all("table")[0])["0.1\u00a0%"]) == [0.31]


# ---- a page for whatever there is ----


@pytest.mark.parametrize("missing", [key for key in AUDIT if key != "format"])
def test_whichever_section_is_missing_the_page_is_sound(missing):
    page_of(changed(lambda audit: audit.pop(missing)))


@pytest.mark.parametrize(
    ("section", "missing"),
    [
        ("membership", "attacks"), ("membership", "members"), ("canaries", "bounds"), ("canaries", "exposure"),
        ("canaries", "extraction"), ("canaries", "count"), ("inversion", "rows"), ("inversion", "examples"),
        ("reconstruction", "bounds"), ("stated", "delta"), ("stated", "statement"), ("run", "name"),
    ],
)  # fmt: skip
def test_whatever_a_section_lacks_the_page_is_sound(section, missing):
    page_of(changed(lambda audit: audit[section].pop(missing)))


def test_sections_say_that_they_were_not_measured():
    root = page_of({"format": 1}).root
    for section, said in {
        "membership": "not measured", "canaries": "No canaries", "inversion": "not tried", "checks": "not checked",
    }.items():  # fmt: skip
        assert said in root.section(section).text


def test_figures_that_are_null_are_dashes():
    def hollow(inside: Any) -> Any:
        if isinstance(inside, dict):
            kept = ("format", "batch", "passed", "name")
            return {key: x if key in kept else hollow(x) for key, x in inside.items()}
        if isinstance(inside, list):
            return [] if inside and isinstance(inside[0], list) else [hollow(x) for x in inside]
        return None if isinstance(inside, int | float) and not isinstance(inside, bool) else inside

    page_of(hollow(AUDIT))


def test_words_that_look_like_markup_are_only_words():
    evil = '<script>alert("1")</script>'
    change = set_at("run", "name", value=evil)
    audit = changed(change)
    audit["checks"][0]["name"] = audit["membership"]["attacks"][0]["name"] = evil
    audit["canaries"]["bounds"][0]["method"] = audit["inversion"]["rows"][0]["defence"] = evil
    root = page_of(audit).root
    assert len(root.all("script")) == 1 and root.all("h1")[0].text == evil


def test_headings_go_down_one_level_at_a_time():
    levels = [int(level) for level in re.findall(r"<h([1-6])[ >]", render(changed(lambda audit: None)))]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


def test_the_same_audit_gives_the_same_bytes():
    assert render(AUDIT) == render(copy.deepcopy(AUDIT))


# ---- files ----


def test_the_page_is_written_beside_the_audit(tmp_path: Path):
    audit = changed(lambda audit: audit.pop("canaries"))
    (tmp_path / "audit.json").write_text(json.dumps(audit))
    assert write_audit(tmp_path) == tmp_path / "audit.html"
    assert (tmp_path / "audit.html").read_text() == render(audit)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["audit.html", "audit.json"]


@pytest.mark.parametrize("content", [b"{", b"[1]", b"{}", b'{"format": 2}', b"\xff{}", b"[" * 200_000])
def test_a_damaged_audit_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "audit.json").write_bytes(content)
    with pytest.raises(RunError, match="an audit of format 1"):
        write_audit(tmp_path)
    assert not (tmp_path / "audit.html").exists()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda audit: audit["checks"][0].pop("passed"), "passed"),
        (set_at("membership", value=["loss"]), "AttributeError"),
        (set_at("inversion", "rows", 0, "batch", value="many"), "many"),
    ],
)
def test_an_audit_whose_parts_do_not_fit_is_refused_and_says_which(tmp_path: Path, change: Change, what: str):
    (tmp_path / "audit.json").write_text(json.dumps(changed(change)))
    with pytest.raises(RunError, match=what):
        write_audit(tmp_path)
    assert not (tmp_path / "audit.html").exists()


def test_a_folder_without_an_audit_is_refused(tmp_path: Path):
    with pytest.raises(RunError, match="foedus audit"):
        write_audit(tmp_path)


@pytest.mark.parametrize(
    "path",
    [("canaries", "extraction", 0, "examples", 0), ("inversion", "examples", 1), ("extraction", 0, "examples", 0)],
)
@pytest.mark.parametrize("source", ["silo", "", None])
def test_text_that_is_no_example_never_reaches_a_page(tmp_path: Path, path: tuple, source: str | None):
    def change(audit: dict[str, Any]) -> None:
        audit["extraction"] = copy.deepcopy(audit["canaries"]["extraction"])
        set_at(*path, "source", value=source)(audit)

    audit = changed(change)
    (tmp_path / "audit.json").write_text(json.dumps(audit))
    for make in (lambda: render(audit), lambda: write_audit(tmp_path)):
        with pytest.raises(RunError, match="no silo's text"):
            make()


def test_an_earlier_page_stays_until_the_new_one_is_whole(tmp_path: Path, monkeypatch):
    (tmp_path / "audit.json").write_text(json.dumps(changed(lambda audit: audit.pop("canaries"))))
    first = write_audit(tmp_path).read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("foedus.report.folder.os.replace", full_disk)
    with pytest.raises(RunError, match="No space left"):
        write_audit(tmp_path)
    assert (tmp_path / "audit.html").read_bytes() == first and not list(tmp_path.glob(".audit*"))
