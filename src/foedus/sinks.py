"""Where figures of a run may go beside its folder: TensorBoard and MLflow. Both are optional, and off unless asked for.

A sink is ordinary code that takes rows of metrics.jsonl, one by one as they come or all of a finished run:

    with TensorBoard(folder) as sink:
        for row in run.metrics():
            sink.take(row)

What goes there is what the treaty discloses to everybody who may read the run's folder, and no more than totals: no
silo's own figure leaves. Neither library may call home: their telemetry is switched off before they are loaded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from .errors import RunError

Row = Mapping[str, Any]
SILENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false"}


class Sink(Protocol):
    """Takes rows of metrics in their order; `close` writes what is left."""

    def take(self, row: Row) -> None: ...

    def close(self) -> None: ...


def figures(row: Row) -> Iterator[tuple[str, float, int]]:
    """(name, value, round) of a row, all silos together. A domain's figure is named after it; NaN is left out.

    >>> list(figures({"kind": "round", "phase": "federated", "round": 3, "loss": 2.5, "silos": {}, "seconds": {}}))[0]
    ('federated/loss', 2.5, 3)
    """
    phase, at = str(row.get("phase")), int(row.get("round", 0))
    if phase.startswith("local:"):
        return
    found = _of_round(row) if row.get("kind") == "round" else _of_evaluation(row)
    for name, value in found:
        if isinstance(value, int | float) and math.isfinite(value):
            yield f"{phase}/{name}", float(value), at


def replay(rows: Iterable[Row], sink: Sink) -> None:
    """Gives a sink all rows, and closes it, whatever happens."""
    try:
        for row in rows:
            sink.take(row)
    finally:
        sink.close()


class _Closing:
    """Used as a context, a sink is closed at its end."""

    def close(self) -> None:
        """Writes what is left."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class TensorBoard(_Closing):
    """Event files in `folder`, as TensorBoard reads them, without TensorFlow and without torch."""

    def __init__(self, folder: Path) -> None:
        with _needed("tensorboard"):
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventFileWriter(str(folder))

    def take(self, row: Row) -> None:
        """Adds the row's figures."""
        for name, value, at in figures(row):
            kept = self._summary(value=[self._summary.Value(tag=name, simple_value=value)])
            self._writer.add_event(self._event(step=at, summary=kept))

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


class MLflow(_Closing):
    """A run called `name` in `experiment` of the store at `uri`, such as "sqlite:///mlflow.db" or a server's address.
    `tags`: what it is known by, such as the treaty's digest.
    """

    def __init__(self, uri: str, experiment: str, name: str, tags: Mapping[str, str] | None = None) -> None:
        os.environ.update({key: value for key, value in SILENT.items() if key not in os.environ})
        with _needed("mlflow"):
            from mlflow.tracking import MlflowClient
        self._client = MlflowClient(tracking_uri=uri)
        known = self._client.get_experiment_by_name(experiment)
        place = known.experiment_id if known else self._client.create_experiment(experiment)
        self._run = self._client.create_run(place, run_name=name, tags=dict(tags or {})).info.run_id

    def take(self, row: Row) -> None:
        """Adds the row's figures."""
        for name, value, at in figures(row):
            self._client.log_metric(self._run, _allowed(name), value, step=at)

    def close(self) -> None:
        """Says that the run is done."""
        self._client.set_terminated(self._run)


class _needed:
    """Turns a missing library into an error that says how to bring it."""

    def __init__(self, library: str) -> None:
        self.library = library

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, ImportError):
            do = f"Install it with `pip install foedus[{self.library}]`, or leave this sink out."
            raise RunError(f"the optional library {self.library}", "it is not installed", do) from error


def _of_round(row: Row) -> Iterator[tuple[str, Any]]:
    silos, seconds = row.get("silos") or {}, row.get("seconds") or {}
    yield "loss", row.get("loss")
    yield "silos", len(silos)
    yield "failures", len(row.get("failures") or {})
    for way in ("up", "down"):
        yield f"bytes_{way}", sum(int(facts.get(f"bytes_{way}", 0)) for facts in silos.values())
    yield "seconds", sum(float(x) for x in seconds.values())
    yield from ((f"reported/{name}", value) for name, value in (row.get("reported") or {}).items())


def _of_evaluation(row: Row) -> Iterator[tuple[str, Any]]:
    split = row.get("split")
    for metric in ("perplexity", "bits_per_byte", "accuracy", "token_accuracy"):
        found = row.get(metric) or {}
        yield f"{split}/{metric}", found.get("micro")
        yield from (
            (f"{split}/{metric} by domain/{domain}", value) for domain, value in (found.get("by_domain") or {}).items()
        )


def _allowed(name: str) -> str:
    """MLflow takes letters, digits, and `_-./ :` in a metric's name."""
    return "".join(letter if letter.isalnum() or letter in "_-./ :" else "_" for letter in name)[:250]
