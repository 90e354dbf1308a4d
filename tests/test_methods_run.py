"""Whole runs of every method by its treaty: in the open, with noise for examples, behind masks, killed and resumed."""

from __future__ import annotations

import json
from collections import ChainMap
from pathlib import Path

import numpy as np
import pytest

from foedus import launch, loop
from foedus.attention import effective
from foedus.auditing import Subject, finished
from foedus.auditing import _inside as inside
from foedus.build import Workplace, build
from foedus.cli import main
from foedus.errors import GuaranteeError, TreatyError
from foedus.execute import begin, execute, treaty_of
from foedus.governance import Budget, RunFolder, SiloCustody, verify
from foedus.listing import LISTINGS
from foedus.methods import _ALGORITHMS
from foedus.report.privacy import stated
from foedus.report.words import ALGORITHMS as TITLES
from foedus.silo.handler import Handler
from foedus.stages.grid import Grid
from foedus.treaty import Treaty, load

from .conftest import sentences, write_treaty

PUBLIC = "public.csv"
SMALL = {
    "model.max_length": 16, "adapter.rank": 2, "adapter.targets": ["q_proj"], "data.label": "domain",
    "data.max_examples": 12, "silos.by": "iid", "silos.count": 3, "algorithm.rounds": 2, "local.steps": 1,
    "local.batch": 4, "local.optimizer": "sgd", "local.lr": 0.5, "server.weighting": "uniform",
    "evaluation.baselines": [], "evaluation.every": 9,
}  # fmt: skip
ALIGN = {"algorithm.name": "alignment", "alignment.public_text": PUBLIC, "alignment.features": 10,
         "alignment.project": 4}  # fmt: skip
TOPICS = {"topics.weight": 0.1}
METHODS = {
    "fedavg": {},
    "fedprox": {"algorithm.name": "fedprox", "algorithm.mu": 0.1},
    "scaffold": {"algorithm.name": "scaffold"},
    "alignment": ALIGN,
    **{f"alignment by {phi}": {**ALIGN, "alignment.attention": phi} for phi in ("entropy", "rank", "distance")},
    "alignment by error": {**ALIGN, **TOPICS, "alignment.attention": "error"},
    "alignment with class means": {**ALIGN, "alignment.head": "means"},
    "reversal": {"algorithm.name": "reversal"},
    "udalm": {"algorithm.name": "udalm", **TOPICS},
    "knn-adapter": {"algorithm.name": "knn-adapter", "knn.public_text": PUBLIC, "knn.neighbours": 4, "knn.width": 8},
    "fedlap": {"algorithm.name": "fedlap", "fedlap.samples": 2, "fedlap.length": 4, "fedlap.vocabulary": 8,
               "fedlap.boost": 1, "fedlap.passes": 2},
    "alone": {"algorithm.name": "alone"},
}  # fmt: skip
NOISED = {"alignment with a bias of tokens": {**ALIGN, "alignment.tokens": 30, "alignment.head": "means"}}
"""Methods that are for noised units alone."""
ENTROPY = METHODS["alignment by entropy"]
EXAMPLE = {"privacy.unit": "example", "privacy.noise_multiplier": 1.0, "privacy.rate": 0.3, "data.max_examples": None,
           "disclosure.loss": False, "disclosure.holdings": False, "privacy.randomness": "simulated"}  # fmt: skip
SILO = {"privacy.unit": "silo", "privacy.epsilon": 50.0, "privacy.accept_noise": True, "disclosure.loss": False,
        "disclosure.holdings": False, "privacy.randomness": "simulated"}  # fmt: skip
MASKED = {"secure.sums": "masked", "secure.range": 8.0, "disclosure.holdings": False, "cohort.minimum": 3}


def treaty(folder: Path, *changes: dict) -> Treaty:
    """A small one; later changes win."""
    lines = [f"line {i} of what {'everybody' if i % 3 else 'nobody'} may read, number {i * i}" for i in range(40)]
    (folder / PUBLIC).write_text("text\n" + "\n".join(f'"{line}"' for line in lines))
    return load(write_treaty(folder)).replace(**dict(ChainMap(*reversed(changes), SMALL)))


def run(by: Treaty, path: Path) -> dict:
    *_, last = execute(begin(by, path), build(by))
    return dict(last.row)


def rounds(path: Path) -> list[dict]:
    rows = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == "round"]


def test_every_algorithm_of_a_treaty_is_listed_with_a_line_and_has_a_title():
    listed = {row["name"]: row["about"] for row in LISTINGS["algorithms"]()}
    assert listed.keys() == TITLES.keys() == set(_ALGORITHMS)
    assert all(listed.values())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_to_an_adapter_and_a_page_that_names_it(tmp_path, method):
    by = treaty(tmp_path, METHODS[method])
    place = build(by)
    *_, last = execute(begin(by, tmp_path / "run"), place)
    assert np.isfinite(last.row["evaluation"]["federated"]["perplexity"]["micro"])
    state, _ = RunFolder.open(tmp_path / "run").restore("federated")
    moved = any((state.params[name] != x).any() for name, x in place.bench.start().items())
    assert moved == (method != "alone")
    title = TITLES[by.algorithm.name]
    assert title in (tmp_path / "run/report.html").read_text()
    assert title in (tmp_path / "run/adapter/README.md").read_text()


@pytest.mark.parametrize("method", [*METHODS, *NOISED])
def test_every_method_keeps_the_guarantee_that_its_ledger_bears_out(tmp_path, method):
    summary = run(treaty(tmp_path, (METHODS | NOISED)[method], EXAMPLE), tmp_path / "run")
    assert 0 < summary["privacy"]["epsilon"] == pytest.approx(stated(tmp_path / "run")["epsilon"], rel=1e-6)
    for silo in ("silo-0", "silo-1", "silo-2"):
        kinds = [(r["kind"], r["body"].get("round")) for r in Budget(tmp_path / "run/budgets", silo).ledger.records]
        assert sorted(kinds[1:]) == sorted((kind, i) for i in range(2) for kind in ("charge", "released"))


# ---- behind masks ----


def one_round(place: Workplace):
    return loop.one_round(place.federation, place.engine(), loop.start(place.federation, place.bench.start()))


HIDDEN = [(name, noise) for name in METHODS if name != "fedlap" for noise in ({}, EXAMPLE)]


@pytest.mark.parametrize(
    ("method", "noise"),
    HIDDEN + [(name, EXAMPLE) for name in NOISED],
    ids=lambda x: x if isinstance(x, str) else "noise in silos" if x else "no noise",
)
def test_a_method_behind_masks_is_the_one_in_the_open_up_to_the_grid(tmp_path, method, noise):
    by = treaty(tmp_path, (METHODS | NOISED)[method], noise)
    apart, hidden = build(by), build(by.replace(**MASKED))
    (step,) = (stage.step for stage in hidden.federation.stages.stages if isinstance(stage, Grid))
    (state, seen), (behind, summed) = one_round(apart), one_round(hidden)
    parts = apart.federation.algorithm.parts({name: x.shape for name, x in state.params.items()})
    for key in parts:
        np.testing.assert_allclose(summed.tensors[key], seen.tensors[key], rtol=0, atol=step + 1e-6, err_msg=str(key))
    rules = hidden.federation.algorithm
    made = {}  # of centres that the grid moved, by how a model that it moved sees public text
    if by.alignment.head == "means":
        made = rules.again(behind.params).head(behind.extra["centres", rules.topics.names["0.weight"]])
    for name, x in state.params.items():
        if name not in made:
            np.testing.assert_allclose(
                behind.params[name], x, rtol=0, atol=max(1.0, np.abs(x).max()) * (10 * step + 1e-6)
            )
    for name, x in made.items():
        np.testing.assert_array_equal(behind.params[name], x)
    for key, x in state.extra.items():
        np.testing.assert_allclose(behind.extra[key], x, rtol=1e-4, atol=100 * step + 1e-6, err_msg=str(key))


def test_synthetic_texts_behind_masks_are_refused_with_the_matrixs_reason(tmp_path):
    with pytest.raises(TreatyError, match="a slot that one silo alone fills hides nothing"):
        treaty(tmp_path, METHODS["fedlap"], MASKED)


def test_behind_masks_a_targets_mean_embedding_is_read_by_itself_with_the_noise_of_its_survey(tmp_path):
    place = build(treaty(tmp_path, ALIGN, EXAMPLE, MASKED, {"alignment.target": "silo-1"}))
    engine = place.engine()
    state, _ = loop.one_round(place.federation, engine, loop.start(place.federation, place.bench.start()))
    released = engine.memory["silo-1"]["alignment", "embedding"]
    np.testing.assert_allclose(state.extra["target", "mean"], released, atol=1e-6)
    with pytest.raises(TreatyError, match="no target in secure sums of exact parts"):
        treaty(tmp_path, ALIGN, MASKED, {"alignment.target": "silo-1"})


# ---- stopped and resumed, and silos as processes ----

ROUND = 1


def _stop_before_an_answer(monkeypatch) -> None:
    right = Handler._train

    def train(self, blob, silos, memories):
        answers = right(self, blob, silos, memories)
        if answers[0][0].round == ROUND:
            raise KeyboardInterrupt
        return answers

    monkeypatch.setattr(Handler, "_train", train)


def _stop_after_one_answer_was_kept(monkeypatch) -> None:
    right = SiloCustody.keep

    def keep(self, task, report, memory, split=""):
        right(self, task, report, memory, split)
        if report.round == ROUND:
            raise KeyboardInterrupt

    monkeypatch.setattr(SiloCustody, "keep", keep)


def _stop_before_the_checkpoint(monkeypatch) -> None:
    right = RunFolder.checkpoint

    def checkpoint(self, key, state, memory):
        if state.round == ROUND + 1:
            raise KeyboardInterrupt
        return right(self, key, state, memory)

    monkeypatch.setattr(RunFolder, "checkpoint", checkpoint)


@pytest.mark.parametrize("stop", [_stop_before_an_answer, _stop_after_one_answer_was_kept, _stop_before_the_checkpoint])
def test_alignment_with_private_surveys_stopped_and_resumed_ends_the_same_and_pays_once(tmp_path, monkeypatch, stop):
    by = treaty(tmp_path, ENTROPY, EXAMPLE, {"alignment.momentum": 0.5, "algorithm.rounds": 3})
    whole = run(by, tmp_path / "whole")
    folder = begin(by, tmp_path / "stopped")
    with monkeypatch.context() as moment:
        stop(moment)
        with pytest.raises(KeyboardInterrupt):
            list(execute(folder, build(by)))
    *_, last = execute(folder, build(treaty_of(folder)))
    assert last.row["adapter"]["sha256"] == whole["adapter"]["sha256"]
    assert last.row["algorithm"] == whole["algorithm"]
    assert [r["body"]["round"] for r in verify(folder.path / "ledger.jsonl") if r["kind"] == "round"] == [1, 2, 3]
    for silo in ("silo-0", "silo-1", "silo-2"):
        records = Budget(folder.path / "budgets", silo).ledger.records
        assert [r["body"]["round"] for r in records if r["kind"] == "charge"] == [0, 1, 2]


def test_alignment_with_a_process_for_each_silo_ends_in_the_same_adapter(tmp_path):
    by = treaty(tmp_path, ENTROPY, EXAMPLE)
    here = run(by, tmp_path / "here")
    *_, last = launch.carry_out(begin(by, tmp_path / "apart"), build(by), launch.PROCESSES)
    assert last.row["adapter"]["sha256"] == here["adapter"]["sha256"]
    assert last.row["algorithm"] == here["algorithm"]


# ---- whole silos ----


def test_alignment_protects_whole_silos_inside_one_clip_and_states_its_epsilon(tmp_path):
    summary = run(treaty(tmp_path, ENTROPY, SILO, {"alignment.scale": 0.1}), tmp_path / "run")
    assert summary["privacy"]["unit"] == "silo" and summary["privacy"]["epsilon"] <= 50
    assert stated(tmp_path / "run")["epsilon"] == pytest.approx(summary["privacy"]["epsilon"], rel=1e-6)
    assert "shares" not in summary["algorithm"] and set(summary["algorithm"]["reported"]) >= {"effective silos"}


def test_alignment_is_refused_discrete_noise_on_whole_silos(tmp_path):
    with pytest.raises(GuaranteeError, match="little but a difference of parameters"):
        build(treaty(tmp_path, ENTROPY, SILO, {"privacy.noise": "discrete-gaussian", "alignment.features": 32}))


# ---- what is said ----


def test_what_silos_weigh_and_how_even_that_is_are_reported(tmp_path):
    by = treaty(tmp_path, ENTROPY, {"alignment.gamma": 30.0})
    summary = run(by, tmp_path / "run")
    shares, reported = summary["algorithm"]["shares"], summary["algorithm"]["reported"]
    page = (tmp_path / "run/report.html").read_text()
    for at, row in enumerate(rounds(tmp_path / "run")):
        weights = np.array([row["silos"][silo]["attention"] for silo in shares])
        alpha = np.array([shares[silo][at] for silo in shares])
        np.testing.assert_allclose(alpha, weights / weights.sum(), rtol=1e-12)
        assert reported["effective silos"][at] == pytest.approx(effective(weights))
        assert f"{alpha[0]:.3f}" in page
    assert 1 <= reported["effective silos"][0] < 2.999
    assert "Domain attention" in page and len(reported["shift"]) == 2


def test_a_weight_has_no_name_beside_it_where_the_treaty_or_a_mask_hides_it(tmp_path):
    for name, hidden in {"quiet": {"disclosure.attention": False}, "masked": MASKED}.items():
        summary = run(treaty(tmp_path, ENTROPY, hidden), tmp_path / name)
        assert all("attention" not in silo for row in rounds(tmp_path / name) for silo in row["silos"].values())
        assert "shares" not in summary["algorithm"]
        assert all(1 <= x <= 3 for x in summary["algorithm"]["reported"]["effective silos"])
    with pytest.raises(TreatyError, match="attention = false where whole silos are protected"):
        treaty(tmp_path, ENTROPY, SILO, {"disclosure.attention": True})


def test_what_was_scrubbed_is_said_before_a_run_and_in_its_report(tmp_path, capsys, monkeypatch):
    by = treaty(tmp_path, {"data.scrub": True, "data.source": "letters.jsonl"})
    letters = [{"text": f"{text}, says b{i}@court.org", "domain": "law"} for i, text in enumerate(sentences("law", 60))]
    (tmp_path / "letters.jsonl").write_text("\n".join(map(json.dumps, letters)))
    (tmp_path / "letters.toml").write_text(by.resolved())
    monkeypatch.setattr("sys.argv", ["foedus", "check", str(tmp_path / "letters.toml")])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().out
    assert "What was scrubbed" in said and "12 email" in said
    run(by, tmp_path / "run")
    assert "What was scrubbed" in (tmp_path / "run/report.html").read_text()


def test_the_caveat_of_a_store_of_text_stands_where_the_guarantee_stands(tmp_path):
    store = METHODS["knn-adapter"]
    run(treaty(tmp_path, store, EXAMPLE), tmp_path / "private")
    run(treaty(tmp_path, store), tmp_path / "plain")
    for name in ("report.html", "adapter/README.md"):
        assert "does not cover what a silo" in (tmp_path / "private" / name).read_text(), name
        assert "does not cover what a silo" not in (tmp_path / "plain" / name).read_text(), name


def test_an_audit_looks_at_what_a_unit_adds_to_a_survey(tmp_path):
    made = treaty(tmp_path, ALIGN, EXAMPLE, {"algorithm.rounds": 1})
    run(made, tmp_path / "run")
    subject = Subject(build(made), *finished(RunFolder.open(tmp_path / "run")))
    checks = {check.name: check for check in inside(subject)}
    assert checks["surveys: no unit adds more than the bound"].passed
    assert checks["surveys: what a unit adds does not depend on the others"].passed
