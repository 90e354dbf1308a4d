"""Sinks: what goes to TensorBoard and MLflow is what everybody may read, and nothing calls home."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from foedus.errors import RunError
from foedus.sinks import MLflow, TensorBoard, figures, replay

ROUND = {"kind": "round", "phase": "federated", "round": 2, "loss": 2.5, "failures": {"west": "gone"},
         "silos": {"north": {"bytes_up": 10, "bytes_down": 20, "loss": 777.0}}, "seconds": {"train": 1.0}}  # fmt: skip
EVALUATION = {
    "kind": "evaluation",
    "phase": "federated",
    "round": 2,
    "split": "validation",
    "perplexity": {"micro": 40.0, "by_silo": {"north": 777.0}, "by_domain": {"wards & co": 41.0}},
}
ROWS = [ROUND, EVALUATION, {**ROUND, "round": 3, "loss": float("nan")}, {**ROUND, "phase": "local:north"}]


def test_figures_are_those_of_all_silos_together():
    found = [figure for row in ROWS for figure in figures(row)]
    assert ("federated/loss", 2.5, 2) in found and ("federated/bytes_down", 20.0, 2) in found
    assert ("federated/validation/perplexity by domain/wards & co", 41.0, 2) in found
    assert 777.0 not in {value for _, value, _ in found}
    assert not any(name.startswith("local") for name, _, _ in found)


def test_a_figure_that_is_no_number_is_left_out():
    assert ("federated/loss", 3) not in {(name, at) for row in ROWS for name, _, at in figures(row)}


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    replay(ROWS, TensorBoard(tmp_path))
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in found.Scalars("federated/loss")] == [(2, 2.5)]


def test_mlflow_reads_what_was_written(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "store").as_uri()
    replay(ROWS, MLflow(uri, "notes", "one", {"treaty": "ab"}))
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("notes").experiment_id])
    assert run.data.metrics["federated/loss"] == 2.5 and run.info.status == "FINISHED"
    assert run.data.metrics["federated/validation/perplexity by domain/wards _ co"] == 41.0


def test_mlflow_is_told_to_be_silent_before_it_is_loaded(monkeypatch):
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    with pytest.raises(RunError, match="mlflow"):
        MLflow("file:///nowhere", "notes", "one")
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == os.environ["DO_NOT_TRACK"] == "true"


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    with pytest.raises(RunError, match="tensorboard"):
        TensorBoard(tmp_path)


def test_nothing_is_loaded_unless_it_is_asked_for():
    code = "import sys, foedus.sinks; print([m for m in ('mlflow', 'tensorboard', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
