"""The command line, as people and programs use it: in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import write_treaty


def foedus(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "foedus", *words], capture_output=True, text=True, cwd=cwd,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "100"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run by the command line; returns its folder."""
    folder = tmp_path_factory.mktemp("cli")
    write_treaty(folder)
    done = foedus("run", "treaty.toml", "--out", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "said.txt").write_text(done.stdout + done.stderr)
    return folder / "run"


def test_a_run_shows_plain_lines_without_a_terminal_and_ends_with_the_comparison(finished):
    said = (finished.parent / "said.txt").read_text()
    assert "federated: round 3/3, 3 silos, loss" in said
    assert "report.html" in said and "adapter" in said
    for word in ("Base model", "Federated", "Pooled", "medicine"):
        assert word in said


def test_check_says_what_leaves_a_silo_what_it_costs_and_what_is_guaranteed(finished):
    done = foedus("check", "treaty.toml", cwd=finished.parent)
    assert done.returncode == 0, done.stderr
    for word in (
        "What leaves a silo",
        "bytes of one silo in one round",
        "minutes on this machine",
        "not protected",
        "[model]",
    ):
        assert word in done.stdout
    values = json.loads(foedus("check", "treaty.toml", "--json", cwd=finished.parent).stdout)
    summary = json.loads((finished / "summary.json").read_text())
    assert values["digest"] == summary["treaty"]["digest"]
    assert values["estimate"]["bytes_up"] == pytest.approx(summary["bytes"]["up"]["law"][0], abs=16)
    assert values["estimate"]["bytes_down"] == pytest.approx(summary["bytes"]["down"]["law"][0], abs=16)


def test_check_decides_what_goes_together_before_anything_is_loaded(finished):
    folder = finished.parent
    done = foedus("check", "treaty.toml", "--with", "Krum", "--with", "masked_sums", cwd=folder)
    assert done.returncode == 2 and "Loading" not in done.stderr
    assert "krum + non-iid: accepted if" in done.stdout and "masked-sums + krum: refused:" in " ".join(
        done.stdout.split()
    )
    for part in ("GuaranteeError", "features that go together", "masked-sums + krum", "Instead: robust rules over"):
        assert part in " ".join(done.stderr.split())
    done = foedus("check", "treaty.toml", "--with", "krum", "--with", "masked-sums", "--json", cwd=folder)
    rows = json.loads(done.stdout)["combinations"]
    assert done.returncode == 2 and {row["number"]: row["verdict"] for row in rows}[13] == "refuse"


def test_check_answers_about_a_plan_and_goes_on_where_nothing_is_refused(finished):
    done = foedus("check", "treaty.toml", "--with", "krum", "--json", cwd=finished.parent)
    (row,) = json.loads(done.stdout)["combinations"]
    assert done.returncode == 0 and (row["number"], row["name"], row["verdict"]) == (
        42,
        "krum + non-iid",
        "conditional",
    )
    assert row["said"].startswith("accepted if updates are mixed with their neighbours")


def test_check_suggests_the_nearest_feature(finished):
    done = foedus("check", "treaty.toml", "--with", "krumm", cwd=finished.parent)
    assert done.returncode == 2 and 'Did you mean "krum"?' in done.stderr


def test_report_and_resume_of_a_finished_run_agree_with_its_summary(finished):
    summary = json.loads((finished / "summary.json").read_text())
    reported = json.loads(foedus("report", str(finished), "--json").stdout)
    assert reported["summary"] == summary and Path(reported["report"]).exists()
    resumed = json.loads(foedus("resume", str(finished), "--json").stdout)
    assert resumed["adapter"] == summary["adapter"]


def test_a_second_run_into_the_same_folder_is_refused_in_three_parts(finished):
    done = foedus("run", "treaty.toml", "--out", "run", cwd=finished.parent)
    assert done.returncode == 2 and done.stdout == ""
    for word in ("RunError", "expected", "got", "do", "foedus resume"):
        assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bad_treaty_lists_every_mistake(tmp_path, finished):
    text = (finished.parent / "treaty.toml").read_text()
    (tmp_path / "bad.toml").write_text(text.replace("rank = 4", "rnak = 4").replace("rounds = 3", 'rounds = "three"'))
    done = foedus("check", str(tmp_path / "bad.toml"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "rnak" in done.stderr and "rank" in done.stderr and "rounds" in done.stderr


@pytest.mark.parametrize("what,name", [("models", "smollm2-135m-instruct"), ("datasets", "20newsgroups"),
                                       ("algorithms", "fedprox"), ("optimizers", "yogi"), ("stages", "Weigh"),
                                       ("mechanisms", "Unprotected"),
                                       ("combinations", "masked-sums + nf4")])  # fmt: skip
def test_list_names_what_a_treaty_can_say(what, name):
    done = foedus("list", what)
    assert done.returncode == 0 and name.split()[-1] in done.stdout
    assert name in {row["name"] for row in json.loads(foedus("list", what, "--json").stdout)}


def test_help_names_every_command():
    said = foedus("--help").stdout
    for command in ("check", "run", "resume", "report", "list", "fetch"):
        assert command in said
        assert foedus(command, "--help").returncode == 0


def test_an_unknown_asset_suggests_the_nearest():
    done = foedus("fetch", "smollm")
    assert done.returncode == 2 and "smollm2-135m-instruct" in done.stderr
