"""A whole run into a folder: what is in it, what it says, and what happens when it is stopped, damaged or repeated."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from peft import PeftModel

from foedus.build import build
from foedus.errors import CohortError, RunError
from foedus.execute import begin, execute, treaty_of
from foedus.governance import RunFolder, verify
from foedus.treaty import load

from .conftest import write_treaty


def finish(folder: RunFolder, **more) -> dict:
    *_, last = execute(folder, build(treaty_of(folder)), **more)
    return dict(last.row)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run for the whole file, with its treaty beside it."""
    place = tmp_path_factory.mktemp("finished")
    folder = begin(load(write_treaty(place)), place / "run")
    finish(folder)
    return place


@pytest.fixture
def run(finished, tmp_path) -> RunFolder:
    """A copy of it, to do with as a test likes."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return RunFolder.open(tmp_path / "run")


def test_the_folder_holds_what_its_docstring_says(run):
    files = (
        "treaty.toml", "metrics.jsonl", "ledger.jsonl", "checkpoints/index.json", "summary.json", "report.html",
        "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/README.md",
    )  # fmt: skip
    for name in files:
        assert (run.path / name).stat().st_size > 0, name


def test_the_summary_says_what_was_asked_of_it(run, treaty):
    summary = run.read_json("summary.json")
    assert summary["treaty"]["digest"] == treaty.digest()
    assert (summary["rounds"], summary["silos"]) == (3, 3)
    for way in ("up", "down"):
        assert {silo: len(x) for silo, x in summary["bytes"][way].items()} == {"medicine": 3, "law": 3, "sport": 3}
        assert all(b > 0 for x in summary["bytes"][way].values() for b in x)
    assert summary["privacy"]["epsilon"] is None and "not protected" in summary["privacy"]["statement"]
    for arm in ("base", "local_only", "pooled", "federated"):
        perplexity = summary["evaluation"][arm]["perplexity"]
        assert perplexity["micro"] > 1 and perplexity["macro"] > 1
        assert set(perplexity["by_domain"]) == {"medicine", "law", "sport"}
    assert summary["seconds"]["total"] == pytest.approx(sum(v for k, v in summary["seconds"].items() if k != "total"))
    assert {"python", "torch", "transformers", "peft", "foedus"} <= set(summary["versions"])


def test_training_helps_on_every_domain(run):
    evaluation = run.read_json("summary.json")["evaluation"]
    for domain, before in evaluation["base"]["perplexity"]["by_domain"].items():
        assert evaluation["federated"]["perplexity"]["by_domain"][domain] < 0.8 * before


def test_the_adapter_loads_with_peft_and_is_the_one_that_was_trained(run, treaty):
    import hashlib

    from foedus.lm.load import load_base

    model = PeftModel.from_pretrained(load_base("tiny:llama").model, run.path / "adapter")
    state, _ = run.restore("federated")
    loaded = dict(model.named_parameters())
    assert any("lora_B" in name and x.abs().sum() > 0 for name, x in loaded.items())
    for name, x in state.params.items():
        np.testing.assert_array_equal(loaded[name].detach().numpy(), x)
    weights = (run.path / "adapter/adapter_model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == run.read_json("summary.json")["adapter"]["sha256"]


def test_the_same_treaty_gives_the_same_adapter(run, treaty, tmp_path):
    again = begin(treaty, tmp_path / "again")
    assert finish(again)["adapter"]["sha256"] == run.read_json("summary.json")["adapter"]["sha256"]


def test_another_seed_gives_another_adapter(run, treaty, tmp_path):
    other = begin(treaty.replace(**{"treaty.seed": 2}), tmp_path / "other")
    assert finish(other)["adapter"]["sha256"] != run.read_json("summary.json")["adapter"]["sha256"]


def test_the_ledger_chains_every_round_and_holds_no_data(run):
    records = verify(run.path / "ledger.jsonl")
    assert [r["kind"] for r in records] == ["opened", "round", "round", "round", "closed"]
    text = (run.path / "ledger.jsonl").read_text()
    for word in ("patient", "judge", "goal"):
        assert word not in text
    state, _ = run.restore("federated")
    assert records[3]["body"]["round"] == state.round


def test_a_finished_run_resumed_changes_nothing(run):
    before = {
        p: p.read_bytes()
        for p in run.path.rglob("*")
        if p.is_file() and p.name not in (".lock", "summary.json", "report.html")
    }
    finish(run)
    assert before == {p: p.read_bytes() for p in before}


def test_a_run_goes_back_to_an_earlier_checkpoint_and_ends_the_same(run):
    sha = run.read_json("summary.json")["adapter"]["sha256"]
    assert finish(run, round=2)["adapter"]["sha256"] == sha
    assert [r["body"]["round"] for r in verify(run.path / "ledger.jsonl") if r["kind"] == "round"] == [1, 2, 3]
    rounds = [row["round"] for row in run.metrics() if row["kind"] == "round" and row["phase"] == "federated"]
    assert rounds == [1, 2, 3]


def test_a_damaged_checkpoint_stops_the_run_and_the_earlier_one_finishes_it(treaty, tmp_path):
    folder = begin(treaty, tmp_path / "run")
    events = execute(folder, build(treaty))
    while next(events).round < 2:
        pass
    events.close()
    newest = folder.path / folder.read_json("checkpoints/index.json")["federated"][-1]["file"]
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.raises(RunError, match="--round 1"):
        finish(folder)
    assert finish(folder, round=1)["rounds"] == 3


def test_a_run_that_loses_too_many_silos_stops_with_a_checkpoint_to_go_on_from(treaty, tmp_path):
    strict = treaty.replace(**{"cohort.minimum": 3})
    folder = begin(strict, tmp_path / "run")
    place = build(strict)
    events = execute(folder, place)
    while next(events).kind != "round":
        pass
    whole = place.silos["law"].splits["train"].inputs.values.copy()
    place.silos["law"].splits["train"].inputs.values[...] = 10**6
    with pytest.raises(CohortError, match="at least 3 silos.*law"):
        list(events)
    place.silos["law"].splits["train"].inputs.values[...] = whole
    assert folder.restore("federated")[0].round == 1
    assert finish(folder)["failures"] == []


def test_a_failing_silo_stands_in_summary_ledger_and_metrics(treaty, tmp_path):
    folder = begin(treaty.replace(**{"evaluation.baselines": []}), tmp_path / "run")
    place = build(treaty_of(folder))
    place.silos["law"].splits["train"].inputs.values[...] = 10**6
    *_, last = execute(folder, place)
    assert {(f["round"], f["silo"]) for f in last.row["failures"]} == {(1, "law"), (2, "law"), (3, "law")}
    record = next(r for r in verify(folder.path / "ledger.jsonl") if r["kind"] == "round")
    assert set(record["body"]["failures"]) == {"law"} and set(record["body"]["reports"]) == {"medicine", "sport"}


def test_pooled_training_on_one_silo_is_that_silo_alone(treaty, tmp_path):
    """The three arms are one procedure: with one silo they all take the same steps on the same rows."""
    one = treaty.replace(**{"data.keep": ["law"], "server.weighting": "uniform"})
    folder = begin(one, tmp_path / "run")
    evaluation = finish(folder)["evaluation"]
    pooled, alone = evaluation["pooled"]["perplexity"]["micro"], evaluation["local_only"]["perplexity"]["micro"]
    assert pooled == pytest.approx(alone, rel=1e-3)


def test_metrics_are_one_json_object_a_line(run):
    kinds = [json.loads(line)["kind"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert set(kinds) == {"round", "evaluation"}


def test_no_path_or_name_of_this_machine_is_published(run, tmp_path):
    for name in ("summary.json", "ledger.jsonl", "metrics.jsonl", "adapter/README.md", "adapter/adapter_config.json"):
        assert str(tmp_path) not in (run.path / name).read_text(), name


@pytest.mark.parametrize("changes", [
    {"algorithm.name": "fedprox", "algorithm.mu": 0.1, "server.optimizer": "yogi", "server.lr": 0.01},
    {"server.optimizer": "momentum", "server.momentum": 0.5},
    {"server.optimizer": "adam", "server.lr": 0.01},
    {"server.optimizer": "adagrad", "server.lr": 0.01},
    {"cohort.sampling": "fixed", "cohort.size": 2},
    {"cohort.sampling": "poisson", "cohort.rate": 0.5},
    {"local.steps": None, "local.epochs": 1},
    {"local.optimizer": "sgd", "local.lr": 0.5, "local.schedule": "cosine"},
    {"adapter": {"kind": "full"}},
    {"silos": {"by": "iid", "count": 4}},
    {"silos": {"by": "dirichlet", "count": 3, "alpha": 1.0}},
    {"silos": {"by": "quantity", "count": 3, "alpha": 2.0}},
], ids=str)  # fmt: skip
def test_every_choice_that_a_treaty_offers_runs_and_learns(treaty, tmp_path, changes):
    chosen = treaty.replace(**{"evaluation.baselines": ["base"], **changes})
    evaluation = finish(begin(chosen, tmp_path / "run"))["evaluation"]
    assert evaluation["federated"]["perplexity"]["micro"] < evaluation["base"]["perplexity"]["micro"]


def test_full_parameter_training_saves_a_model_that_transformers_loads(treaty, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = begin(treaty.replace(adapter={"kind": "full"}), tmp_path / "run")
    finish(folder)
    model = AutoModelForCausalLM.from_pretrained(folder.path / "adapter")
    state, _ = folder.restore("federated")
    for name, x in dict(model.named_parameters()).items():
        np.testing.assert_array_equal(x.detach().numpy(), state.params[name])


def test_a_treaty_without_held_out_text_runs_and_reports_no_figures(treaty, tmp_path):
    none = treaty.replace(
        **{"split.validation": 0.0, "split.test": 0.0, "evaluation.baselines": [], "evaluation.every": 9}
    )
    assert finish(begin(none, tmp_path / "run"))["evaluation"] == {}


def test_relative_data_is_found_again_by_a_resumed_run(treaty, tmp_path, monkeypatch):
    folder = begin(treaty, tmp_path / "run")
    monkeypatch.chdir("/")
    assert replace(treaty_of(folder), folder=None) == replace(treaty, folder=None)
    assert finish(folder)["silos"] == 3
