"""What a finished run is compared by, measured on a tiny one with far text and a silo whose labels nobody has."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from foedus.algorithms.local import Alone
from foedus.build import build
from foedus.errors import RunError
from foedus.execute import begin, execute, treaty_of
from foedus.governance import RunFolder
from foedus.kernels import mmd_unbiased
from foedus.study import measure as measure_file
from foedus.study.measure import LEVELS, Look, Ruler, measure
from foedus.treaty import load

from ..conftest import sentences, write_treaty

HOW = {"samples": 12, "permutations": 39, "public": "notes.jsonl"}
FAR = [text.replace("e", "zq") for text in sentences("law", 20, seed=9)]
TOPICAL = {"data.unlabelled": ["sport"], "data.label": "domain", "topics.weight": 1.0, "local.lr": 0.05}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of three silos, and its treaty beside it."""
    folder = tmp_path_factory.mktemp("measured")
    treaty = load(write_treaty(folder)).replace(**TOPICAL)
    made = begin(treaty, folder / "run")
    for _ in execute(made, build(treaty_of(made))):
        pass
    return folder / "run"


@pytest.fixture(scope="module")
def place(run):
    return build(treaty_of(RunFolder.open(run)))


@pytest.fixture(scope="module")
def found(run, place) -> dict:
    return measure(run, place, far=FAR, **HOW)


@pytest.fixture
def copy(run, tmp_path) -> Path:
    shutil.copytree(run.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def test_all_phases_of_the_run_are_measured_and_it_can_be_written_down(found):
    assert list(found["phases"]) == ["base", "federated", "pooled", "local_only"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found["measured"]["documents"]) == {"medicine", "law", "sport"}
    assert found["measured"]["targets"] == ["sport"]


def test_the_same_arguments_give_the_same_figures_whoever_makes_the_run_ready(run, found):
    assert measure(run, far=FAR, **HOW) == found
    assert measure(run, far=FAR, **HOW, seed=1) != found


def test_perplexity_is_that_of_the_runs_own_summary(run, found):
    summary = json.loads((run / "summary.json").read_text())["evaluation"]
    for phase, figures in found["phases"].items():
        assert figures["perplexity"]["micro"] == pytest.approx(summary[phase]["perplexity"]["micro"])
        assert figures["perplexity"]["by_silo"] == pytest.approx(summary[phase]["perplexity"]["by_silo"])
        assert figures["d3"] == pytest.approx(summary[phase]["token_accuracy"]["macro"])
    assert found["phases"]["federated"]["perplexity"]["micro"] < found["phases"]["base"]["perplexity"]["micro"]


def test_perplexity_of_sources_and_target_make_up_the_whole(found):
    p = found["phases"]["federated"]["perplexity"]
    assert p["target"] == pytest.approx(p["by_silo"]["sport"])
    low, high = sorted((p["sources"], p["target"]))
    assert low < p["micro"] < high


def test_what_the_run_did_not_note_is_scored_again_by_its_algorithm_and_comes_out_alike(copy, place, found):
    kept = [row for row in map(json.loads, (copy / "metrics.jsonl").read_text().splitlines()) if row["kind"] == "round"]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    asked: list[str] = []

    class Telling(type(place.federation.algorithm)):
        def scores(self, bench, params, silo, batch, memory):
            asked.append(silo.name)
            return super().scores(bench, params, silo, batch, memory)

    own = Telling(**vars(place.federation.algorithm))
    again = measure(copy, replace(place, federation=replace(place.federation, algorithm=own)), **HOW)
    assert set(asked) == {"medicine", "law", "sport"}
    for phase, figures in again["phases"].items():
        assert figures["perplexity"]["by_silo"] == pytest.approx(found["phases"][phase]["perplexity"]["by_silo"])


def test_features_are_those_of_each_silos_own_model_on_a_sample_of_documents(run, place, found, monkeypatch):
    shown: dict[str, dict] = {}
    whole = measure_file.discrepancy

    def noting(features, targets, widths, *rest):
        shown[len(shown)] = dict(features)
        return whole(features, targets, widths, *rest)

    monkeypatch.setattr(measure_file, "discrepancy", noting)
    measure(run, place, **HOW)
    for features, phase in zip(shown.values(), found["phases"].values(), strict=True):
        assert all(len(x) <= 12 for x in features.values())
        np.testing.assert_allclose(np.linalg.norm(np.concatenate(list(features.values())), axis=1), 1.0, atol=1e-5)
        law, sport = features["law"], features["sport"]
        expected = mmd_unbiased(law, sport, found["measured"]["bandwidths"])
        assert phase["mmd"]["by_pair"]["law | sport"] == pytest.approx(expected, abs=1e-6)
    assert not np.allclose(shown[0]["law"], shown[1]["law"])  # the base, and after training


def test_bandwidths_come_from_public_text_and_stay_the_same_for_all_phases(run, place, found):
    (run.parent / "other.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in FAR))
    again = measure(run, place, **{**HOW, "public": "other.jsonl"})["measured"]["bandwidths"]
    assert len(again) == 5 and again != found["measured"]["bandwidths"]


def test_silos_with_words_of_their_own_are_told_apart(found):
    for figures in found["phases"].values():
        pairs, target = figures["mmd"]["pairs"], figures["mmd"]["target"]
        assert pairs["mmd2"] > pairs["null"]["q95"] and pairs["p"] == 1 / 40 and target["mmd2"] > 0
        assert figures["d2"]["accuracy"] > 0.6 > figures["d2"]["chance"] == pytest.approx(1 / 3)
        assert 1 < figures["d2"]["a_distance"] <= 2
        assert 0 < figures["spread"]["variance"] < 1 < figures["spread"]["effective_rank"] <= 32


def test_far_text_shifts_words_features_and_perplexity_more_and_more(found):
    levels = [found["shift"][name] for name in LEVELS]
    assert [level["k"] for level in levels] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert levels[0]["jsd"] == 0.0 == levels[0]["mmd2"]
    for name in ("jsd", "mmd2"):
        assert (np.diff([level[name] for level in levels]) > 0).all()
    perplexity = [level["perplexity"]["federated"] for level in levels]
    assert perplexity[0] == pytest.approx(found["phases"]["federated"]["perplexity"]["micro"])
    assert perplexity[0] < perplexity[3]
    assert np.log(perplexity) == pytest.approx(np.linspace(*np.log([perplexity[0], perplexity[3]]), 4))


def test_every_absent_figure_has_a_reason(run, place, found):
    assert found["guarantee"]["epsilon"] is None and found["absent"]["guarantee.epsilon"] == "no guarantee"
    bare = place.treaty.replace(**{"data.unlabelled": [], "topics.weight": 0.0, "evaluation.baselines": []})
    out = measure(run, replace(place, treaty=bare), **HOW)
    assert out["phases"]["pooled"] is None and "pooled" in out["absent"]["phases.pooled"]
    assert out["phases"]["federated"]["mmd"]["target"] is None and out["shift"] is None
    assert out["absent"]["phases.federated.d1"] == "the model has no topic head"
    assert {"shift", "phases.local_only", "phases.federated.perplexity.target"} <= set(out["absent"])

    def missing(value, path=""):
        if isinstance(value, dict):
            return {p for key, x in value.items() for p in missing(x, f"{path}.{key}".lstrip("."))}
        return {path} if value is None else set()

    assert missing(out) == set(out["absent"])


def test_domain_accuracy_is_that_of_the_topic_head_which_begins_knowing_nothing(found):
    base, federated, alone = (found["phases"][phase]["d1"] for phase in ("base", "federated", "local_only"))
    assert base["all"] == pytest.approx(base["chance"]) == pytest.approx(1 / 3)
    assert federated["sources"] > 0.6 and federated["target"] == 0.0  # of the target's topic nobody told it
    assert alone["sources"] == 1.0  # each silo has one topic, and knows no other


def test_domain_accuracy_is_macro_over_topics_by_whose_text_it_is(place, run, monkeypatch):
    ruler = Ruler(place, RunFolder.open(run), "test", 1, 1, 0, (1.0,), {})
    monkeypatch.setattr(place.bench, "objective", replace(place.bench.objective, topics=("a", "b")))

    def look(said, true):
        return Look(np.zeros((len(said), 1)), np.array(said), np.array(true))

    looks = {"law": look([0, 0, 1], [0, 0, 0]), "medicine": look([1], [1]), "sport": look([1, 1], [-1, -1])}
    out = measure_file._d1(ruler, looks)
    assert out["all"] == out["sources"] == pytest.approx((2 / 3 + 1) / 2) and out["chance"] == 0.5
    assert out["target"].why == "no document has a known topic"


def test_cost_is_all_that_the_federated_rounds_sent(run, found):
    summary = json.loads((run / "summary.json").read_text())
    for way in ("up", "down"):
        assert found["cost"]["bytes"][way] == sum(map(sum, summary["bytes"][way].values())) > 0
    assert found["cost"]["seconds"] == summary["seconds"]


def test_a_run_that_is_not_finished_and_a_split_without_text_are_refused(copy, place):
    empty = pa.table({name: pa.array([], pa.string()) for name in ("text", "label")})
    nothing = place.bench.objective.encode(empty, place.base.tokenizer)
    silos = {name: replace(silo, splits={**silo.splits, "test": nothing}) for name, silo in place.silos.items()}
    with pytest.raises(RunError, match="train, validation"):
        measure(copy, replace(place, silos=silos), **HOW)
    (copy / "summary.json").unlink()
    with pytest.raises(RunError, match="foedus resume"):
        measure(copy, place, **HOW)


def test_a_silo_that_trains_alone_is_measured_with_its_own_parameters(copy, place, found):
    """As algorithm "alone" keeps them in its memory."""
    folder = RunFolder.open(copy)
    state, memories = folder.restore("federated")
    own = {("own", name): x for name, x in folder.restore("local%3Alaw")[0].params.items()}
    folder.checkpoint("federated", replace(state, round=state.round + 1), {**memories, "law": own})
    algorithm = Alone(place.plan)
    out = measure(copy, replace(place, federation=replace(place.federation, algorithm=algorithm)), **HOW)
    mixed, whole, alone = (x["phases"][p] for x, p in ((out, "federated"), (found, "federated"), (found, "local_only")))
    assert mixed["perplexity"]["by_silo"]["law"] == pytest.approx(alone["perplexity"]["by_silo"]["law"])
    assert mixed["perplexity"]["by_silo"]["sport"] == pytest.approx(whole["perplexity"]["by_silo"]["sport"])
    assert mixed["mmd"]["by_pair"]["medicine | sport"] == pytest.approx(whole["mmd"]["by_pair"]["medicine | sport"])
    assert mixed["mmd"]["by_pair"]["law | sport"] != pytest.approx(whole["mmd"]["by_pair"]["law | sport"])
