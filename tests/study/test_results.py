"""What a study says: who is best, by how much, how surely, and along which curves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from foedus.study.conduct import Conduct, read_results
from foedus.study.results import results

from .studies import STUDY, TABLE_ONLY, Stub, by, carried_out, invented, made


@pytest.fixture
def no_pages(monkeypatch) -> None:
    monkeypatch.setattr("foedus.report.write_study", lambda folder: None)


def worked_out(study: Conduct, change=lambda cell, measures: measures, without=lambda cell: False, **about):
    done = {c.key: change(c, invented(c)) for c in study.plan.cells if not without(c)}
    return results(study.study, study.plan, done, {}, about)


@pytest.fixture
def study(tmp_path) -> Conduct:
    return made(tmp_path)


def test_a_row_has_means_and_deviations_over_seeds(study):
    row = by(worked_out(study)["table"]["rows"], "method", "new")
    values = [30 - 4 + 1 + 0.1 * s + 0.015 * s**2 for s in (1, 2, 3)]
    found = row["figures"]["perplexity"]
    assert found["mean"] == pytest.approx(sum(values) / 3) and found["n"] == 3
    assert found["values"] == {str(s): pytest.approx(v) for s, v in zip((1, 2, 3), values, strict=True)}
    assert row["guarantee"] == {"epsilon": 7.99, "delta": 1e-5, "unit": "example", "neighbours": "add or remove one"}


def test_the_best_is_tested_against_the_best_rival(study):
    best = worked_out(study)["table"]["best"]["perplexity"]
    assert (best["method"], best["against"], best["significant"]) == ("new", "prox", True)
    assert best["test"]["below"] == 3 and best["test"]["p"] < 0.05


def test_noise_as_large_as_the_difference_is_not_significant(study):
    shift = {1: 0.0, 2: 9.0, 3: -7.0}

    def noisy(cell, measures):
        if cell.name.startswith("new"):
            measures["phases"]["federated"]["perplexity"]["micro"] += shift[cell.treaty.seed]
        return measures

    best = worked_out(study, noisy)["table"]["best"]["perplexity"]
    assert best["method"] == "new" and not best["significant"] and best["test"]["p"] > 0.05


def test_a_rival_that_is_best_is_called_the_best(study):
    def worse(cell, measures):
        if cell.name.startswith("new"):
            measures["phases"]["federated"]["perplexity"]["micro"] += 20
        return measures

    table = worked_out(study, worse)["table"]
    assert table["best"]["perplexity"]["method"] == "prox" and table["best"]["perplexity"]["against"] == "plain"
    assert by(table["margins"], "figure", "perplexity")["measured"] > 0


def test_who_gives_no_guarantee_cannot_win(study):
    def bare(cell, measures):
        if cell.name.startswith("new"):
            measures["run"] |= {"epsilon": None, "unit": "none"}
        return measures

    found = worked_out(study, bare)["table"]
    assert by(found["rows"], "method", "new")["guarantee"] is None
    assert found["best"]["perplexity"]["method"] == "prox"
    assert by(found["margins"], "figure", "perplexity")["measured"] is None


def test_one_seed_without_a_guarantee_takes_it_from_the_method(study):
    def bare(cell, measures):
        if cell.name == "prox, seed 2":
            measures["run"]["epsilon"] = None
        return measures

    assert by(worked_out(study, bare)["table"]["rows"], "method", "prox")["guarantee"] is None


def test_another_epsilon_is_noticed(study):
    def loose(cell, measures):
        if cell.name.startswith("prox"):
            measures["run"]["epsilon"] = 9.0
        return measures

    assert worked_out(study)["table"]["same_guarantee"]
    assert not worked_out(study, loose)["table"]["same_guarantee"]


def test_another_phase_of_a_run_has_its_own_figures_and_no_guarantee(study):
    row = by(worked_out(study)["table"]["rows"], "method", "pooled")
    assert row["figures"]["perplexity"]["mean"] == pytest.approx(20.2) and row["figures"]["epsilon"] is None
    assert row["guarantee"] is None


def test_margins_stand_beside_the_published_ones(study):
    margins = worked_out(study)["table"]["margins"]
    found = by(margins, "figure", "perplexity")
    ours, theirs = 27 + 0.2 + 0.07, 31 - 0.08 + 0.2 + 0.14 / 3 * 1.01
    assert found["measured"] == pytest.approx(ours / theirs - 1) and found["published"] == pytest.approx(-0.2)
    accuracy = by(margins, "figure", "accuracy")
    assert accuracy["kind"] == "points" and accuracy["published"] == pytest.approx(0.1)
    assert by(margins, "figure", "mmd")["published"] == pytest.approx(-0.5)


def test_an_unbiased_mmd_below_zero_has_no_relative_margin(study):
    def tiny(cell, measures):
        measures["phases"]["federated"]["mmd"]["pairs"]["mmd2"] -= 0.2
        return measures

    assert by(worked_out(study, tiny)["table"]["margins"], "figure", "mmd")["measured"] is None


def test_a_curve_has_a_shape_and_the_published_one_beside_it(study):
    curve = by(worked_out(study)["curves"], "key", "pace")
    line = by(curve["lines"], "method", "new")
    figure = line["figures"]["perplexity"]
    assert [round(p["mean"], 2) for p in figure["points"]] == [27.27, 28.27, 30.27]
    assert figure["shape"]["rho"] == pytest.approx(1.0) and figure["beside"]["published_ratio"] == pytest.approx(1.5)
    assert figure["beside"]["milder"] is True and line["epsilon"] == [7.99] * 3


def test_the_published_range_alone_is_compared_with_what_is_published(tmp_path):
    study = made(tmp_path, STUDY.replace("x = [0.01, 0.04]", "x = [0.01, 0.02]"))
    figure = by(by(worked_out(study)["curves"], "key", "pace")["lines"], "method", "new")["figures"]["perplexity"]
    assert figure["shape"]["points"] == 3 and figure["beside"]["shape"]["points"] == 2


def test_shift_is_read_off_the_tables_cells(study):
    curve = by(worked_out(study)["curves"], "key", "shift")
    line = by(curve["lines"], "method", "new")
    assert line["shift_bits"] == [0.0, pytest.approx(0.3)]
    assert line["figures"]["perplexity"]["shape"]["ends"]["ratio"] == pytest.approx(1.4)


def test_an_ablation_pairs_each_variant_with_the_whole(study):
    (ablation,) = worked_out(study)["ablations"]
    without = by(ablation["rows"], "key", "no-pull")
    assert without["beside_whole"]["perplexity"]["above"] == 2
    assert by(ablation["rows"], "key", "new")["beside_whole"]["perplexity"] is None


def test_what_is_missing_is_left_out_and_named(study):
    found = worked_out(study, without=lambda cell: cell.name == "new, seed 2")
    row = by(found["table"]["rows"], "method", "new")
    assert row["figures"]["perplexity"]["n"] == 2 and row["missing"] == [2]
    assert by(found["cells"], "name", "new, seed 2")["status"] == "not done"


def test_nothing_done_is_a_result_too(study):
    found = worked_out(study, without=lambda cell: True)
    assert found["table"]["best"] == {"perplexity": None, "accuracy": None, "mmd": None}
    json.dumps(found, allow_nan=False)


def test_a_study_leaves_its_results_its_command_and_its_commit(tmp_path, no_pages):
    study = made(tmp_path, TABLE_ONLY)
    carried_out(study)
    found = read_results(study.out)
    assert found["command"] == "foedus study study.toml" and len(found["commit"]) == 40
    assert found["simulated_noise"] and found["hardware"] == [{"cpu": "invented", "cores": 2}]
    assert found["digest"] == study.study.digest() and found["seeds"] == [1, 2, 3]
    assert {cell["status"] for cell in found["cells"]} == {"done"}


def test_reading_the_test_split_is_noted_once_and_again_when_the_study_changes(tmp_path, no_pages):
    text = TABLE_ONLY.replace("seeds = [1, 2, 3]", 'seeds = [1]\nsplit = "test"')
    for _ in range(2):
        carried_out(made(tmp_path, text))
    assert len(read_results(tmp_path / "out")["test_reads"]) == 1
    carried_out(made(tmp_path, text.replace('mu" = 0.5', 'mu" = 0.6')))
    assert len(read_results(tmp_path / "out")["test_reads"]) == 2


def test_only_what_is_wished_is_carried_out_and_the_rest_is_kept(tmp_path, no_pages):
    study = made(tmp_path, only=["pace"])
    runner = Stub(study)
    carried_out(study, runner)
    assert len(runner.served) == 18 and all("new" in name or "plain" in name for name in runner.served)
    one = made(tmp_path, only=["prox"])
    carried_out(one)
    found = read_results(Path(tmp_path / "out"))
    assert sum(cell["status"] == "done" for cell in found["cells"]) == 21
    with pytest.raises(Exception, match='Did you mean "pace"'):
        made(tmp_path, only=["pase"])
