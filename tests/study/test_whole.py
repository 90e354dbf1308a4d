"""A real study, tiny: two methods, two seeds, one round, each run in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from foedus.study.conduct import Conduct, read_results

from ..conftest import write_treaty
from ..report.pages import Page
from .studies import by

STUDY = """
[study]
name = "real"
title = "A real study, tiny"
treaty = "treaty.toml"
seeds = [1, 2]
jobs = 2

[measure]
samples = 20
permutations = 10
public = "notes.jsonl"
far = "notes.jsonl"
far_keep = ["law"]

[[method]]
key = "prox"
title = "FedProx"
role = "ours"
set = { "algorithm.name" = "fedprox", "algorithm.mu" = 0.1 }

[[method]]
key = "plain"
title = "FedAvg"
role = "rival"

[[curve]]
key = "shift"
title = "Shift"
x = "share of far text"
source = "shift"
methods = ["prox", "plain"]
point = [{ label = "Low", x = 0 }, { label = "Moderate", x = 0.333 }, { label = "Extreme", x = 1 }]
"""
PRIVATE = """
[privacy]
unit = "example"
noise_multiplier = 1.0
rate = 0.2
randomness = "simulated"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    treaty = write_treaty(folder)
    base = treaty.read_text().replace("rounds = 3", "rounds = 1").replace('["base", "local", "pooled"]', '["base"]')
    treaty.write_text(base + PRIVATE)
    (folder / "study.toml").write_text(STUDY)
    return folder


@pytest.fixture(scope="module")
def said(folder) -> subprocess.CompletedProcess[str]:
    return foedus("study", "study.toml", "--out", "out", cwd=folder)


def foedus(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "140"}
    return subprocess.run(
        [sys.executable, "-m", "foedus", *words], capture_output=True, text=True, cwd=cwd, env=environment
    )


def test_the_command_carries_out_every_run_and_compares(said, folder):
    assert said.returncode == 0, said.stderr
    assert "4/4 cells, 0 running" in said.stderr
    assert "\x1b" not in said.stdout + said.stderr
    for word in ("FedProx", "FedAvg", "Perplexity", "SIMULATED NOISE", "study.html"):
        assert word in said.stdout
    found = read_results(folder / "out")
    assert [cell["status"] for cell in found["cells"]] == ["done"] * 4
    row = by(found["table"]["rows"], "method", "prox")
    assert row["guarantee"]["unit"] == "example" and 0 < row["guarantee"]["epsilon"] < 50
    for key in ("perplexity", "mmd", "mmd_p", "rank", "bytes_up", "seconds"):
        assert row["figures"][key]["n"] == 2, key
    assert found["hardware"][0]["threads"] == max(1, (os.cpu_count() or 1) // 2)


def test_the_shift_curve_is_measured_without_further_runs(said, folder):
    line = read_results(folder / "out")["curves"][0]["lines"][0]
    assert line["shift_bits"] == sorted(line["shift_bits"]) and line["shift_bits"][0] == 0
    assert all(point["n"] == 2 for point in line["figures"]["perplexity"]["points"])


def test_its_page_is_sound_and_says_what_it_is(said, folder):
    page = Page((folder / "out/study.html").read_text("utf-8"))
    assert page.faults == []
    header = page.root.all("header")[0].text
    assert "Simulated noise." in header and "the test data were not read" in header


def test_again_it_runs_nothing_and_says_the_same(said, folder):
    before = (folder / "out/study.html").read_text("utf-8")
    made = Conduct.of(folder / "study.toml", folder / "out", command="foedus study study.toml --out out")
    kinds = [step.event.kind for step in made.run(no_runner) if step.event]
    assert kinds == ["kept"] * 4
    assert (folder / "out/study.html").read_text("utf-8") == before


def no_runner(cell, place) -> None:
    raise AssertionError(f"{cell.name} was to be kept")


def test_a_cell_without_measures_is_measured_again_and_not_trained_again(said, folder):
    from foedus.study.cell import carry_out

    place = next((folder / "out/cells").iterdir())
    before = json.loads((place / "measures.json").read_text())
    (place / "measures.json").unlink()
    stamp = (place / "run/summary.json").stat().st_mtime_ns
    carry_out(place, threads=1)
    after = json.loads((place / "measures.json").read_text())
    assert (place / "run/summary.json").stat().st_mtime_ns == stamp
    assert {**after["measures"], "wall": 0} == {**before["measures"], "wall": 0}
