"""`foedus study` on the command line, with runs that are invented."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foedus import console
from foedus.cli import app
from foedus.errors import FoedusError
from foedus.study import conduct
from foedus.study.cells import plan
from foedus.study.spec import load

from .study.studies import STUDY, TABLE_ONLY, Stub, write_study

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "treaties/studies").glob("alignment*.toml"))


@pytest.fixture
def breaks(monkeypatch):
    """Runs that are invented; a test adds to the list the names of those that are to fail."""
    failing: list[str] = []

    class Invented(Stub):
        def __init__(self, settings, threads) -> None:
            super().__init__(settings, lambda cell: cell.name in failing)

        def close(self) -> None:
            pass

    monkeypatch.setattr(console.out, "_width", 160)
    monkeypatch.setattr(conduct, "Launcher", Invented)
    return failing


def called(folder: Path, *words: str, text: str = TABLE_ONLY):
    file = write_study(folder, text)
    return CliRunner().invoke(app, ["study", str(file), "--out", str(folder / "out"), *words])


def test_a_study_ends_with_its_table_and_says_where_its_pages_are(tmp_path, breaks):
    done = called(tmp_path)
    assert done.exit_code == 0, done.output
    assert re.search(r"The method\s+27\.27 ± 0\.16\s+79\.1 ± 0\.5\s%\s+0\.0758 ± 0\.0003", done.stdout)
    assert "Pooled (no guarantee)" in done.stdout and "SIMULATED NOISE" in done.stdout
    assert str(tmp_path / "out/study.html") in done.stdout.replace("\n", "")
    assert "9/9 cells" in done.stderr


def test_json_is_everything(tmp_path, breaks):
    done = called(tmp_path, "--json", "--jobs", "3")
    assert json.loads(done.stdout) == conduct.read_results(tmp_path / "out")


def test_a_failed_run_is_named_and_the_exit_code_says_so(tmp_path, breaks):
    breaks.append("prox, seed 2")
    done = called(tmp_path)
    assert done.exit_code == 1 and "failed prox, seed 2: RuntimeError: prox, seed 2 broke" in done.stderr
    assert "The method" in done.stdout
    breaks.clear()
    assert called(tmp_path).exit_code == 0


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(tmp_path, breaks, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(conduct.Conduct, "run", interrupted)
    done = called(tmp_path)
    assert done.exit_code == 130 and "the same command goes on" in done.stderr


def test_only_a_part_is_carried_out(tmp_path, breaks):
    done = called(tmp_path, "--only", "prox", text=TABLE_ONLY)
    assert done.exit_code == 0 and "3/3 cells" in done.stderr


def test_a_study_that_is_not_sound_is_told_before_anything_runs(tmp_path, breaks):
    done = called(tmp_path, text=STUDY.replace('"local.lr" = 0.02', '"local.lrr" = 0.02'))
    assert isinstance(done.exception, FoedusError) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_study_that_ships_resolves(file):
    study = load(file)
    planned = plan(study, file)
    tuning = file.stem == "alignment-tuning"  # what decides; the others are the record
    assert len(planned.cells) >= 15 and study.study.split == ("validation" if tuning else "test")
    treaties = [cell.treaty for cell in planned.cells]
    given = {t.privacy.epsilon for t in treaties if t.privacy.unit != "none" and t.privacy.noise_multiplier is None}
    assert given == {8.0} and {t.privacy.unit for t in treaties} <= {"example", "none"}
    if tuning:  # nothing published is beside it
        return
    published = {row.method: (row.perplexity, row.accuracy, row.mmd) for row in study.published.row}
    assert published["alignment"] == (20.64, 0.897, 0.058) and published["fedlap"] == (22.73, 0.868, 0.074)


def test_the_small_study_is_made_of_runs_of_the_whole_one():
    small, whole = (ROOT / "treaties/studies" / f"{name}.toml" for name in ("alignment-small", "alignment"))
    small, whole = ({cell.key for cell in plan(load(file), file).cells} for file in (small, whole))
    assert small <= whole


def test_the_whole_study_has_the_curves_of_the_paper_and_more():
    study = load(ROOT / "treaties/studies/alignment.toml")
    curves = {curve.key: curve for curve in study.curve}
    assert [p.x for p in curves["noise"].point] == [0.2, 0.6, 1.0, 2, 5, 10]
    assert {"missing-sequence", "missing-token", "missing-topic", "shift", "weight", "gamma"} <= set(curves)
    assert [p.label for p in curves["shift"].point] == ["Low", "Moderate", "High", "Extreme"]
    assert len(study.ablation[0].variant) >= 8


def test_on_other_text_everything_is_set_as_the_record_has_it():
    folder = ROOT / "treaties/studies"
    small, other = (load(folder / f"alignment-{name}.toml") for name in ("small", "reddit"))
    assert {m.key: m.changes() for m in small.method} == {m.key: m.changes() for m in other.method}
    small, other = (tomllib.loads((folder / f"{name}-topics.toml").read_text()) for name in ("newsgroups", "reddit"))
    own = {"treaty", "data", "silos"}
    assert {name for name in small if small[name] != other[name]} == own | {"privacy"}
    assert {key for key, x in small["privacy"].items() if other["privacy"][key] != x} == {"rate"}
