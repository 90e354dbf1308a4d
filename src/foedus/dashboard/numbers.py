"""`/metrics`: what Prometheus reads. The only file that imports its client."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily

from .alarms import ALARMS, Alarm
from .runs import RunView
from .view import Federation, Silo

TYPE = CONTENT_TYPE_LATEST


def of_federation(found: Federation) -> bytes:
    """A coordinator's numbers, a label for each run."""
    return _text([*_runs(found.runs), *_ledger(found.ledger_records, found.ledger_fits), *_alarms(found.alarms)])


def of_silo(found: Silo) -> bytes:
    """A silo's numbers. Nothing of what it holds or sent but how often."""
    given = CounterMetricFamily("foedus_rounds_given", "Rounds that this silo answered.", value=len(found.rounds))
    refused = CounterMetricFamily("foedus_refusals", "Messages that were refused.", labels=["reason"])
    for reason in sorted({refusal.reason for refusal in found.refusals}):
        refused.add_metric([reason], sum(r.count for r in found.refusals if r.reason == reason))
    epsilon = GaugeMetricFamily("foedus_epsilon_for_life", "Epsilon over all treaties.", labels=["what"])
    for what, value in (("spent", found.spent), ("promised", found.promised), ("allowed", found.cap)):
        if value is not None:
            epsilon.add_metric([what], value)
    paused = GaugeMetricFamily("foedus_paused", "1 while this silo gives nothing.", value=float(found.paused))
    return _text([given, refused, epsilon, paused, *_ledger(found.ledger_records, found.ledger_fits),
                  *_alarms(found.alarms)])  # fmt: skip


def _runs(runs: Iterable[RunView]) -> list[Metric]:
    label = ["run"]
    done = GaugeMetricFamily("foedus_round", "The last round that was released.", labels=label)
    planned = GaugeMetricFamily("foedus_rounds_planned", "Rounds of the treaty.", labels=label)
    loss = GaugeMetricFamily("foedus_loss", "Mean training loss of the last round, all silos together.", labels=label)
    perplexity = GaugeMetricFamily("foedus_perplexity", "Of the last evaluation, all silos together.", labels=label)
    epsilon = GaugeMetricFamily("foedus_epsilon", "Epsilon of the treaty.", labels=["run", "what"])
    bytes_ = CounterMetricFamily("foedus_bytes", "Payload bytes.", labels=["run", "direction"])
    failures = CounterMetricFamily("foedus_failures", "Asks of silos that failed.", labels=label)
    refusals = CounterMetricFamily("foedus_refusals", "Asks that silos refused.", labels=label)
    seconds = SummaryMetricFamily("foedus_round_seconds", "How long rounds took.", labels=label)
    silos = GaugeMetricFamily("foedus_cohort", "Silos in the last round.", labels=label)
    for run in runs:
        name = [run.name]
        done.add_metric(name, run.done)
        planned.add_metric(name, run.planned)
        failures.add_metric(name, run.failures - run.refusals)
        refusals.add_metric(name, run.refusals)
        seconds.add_metric(name, count_value=len(run.rounds), sum_value=sum(r.seconds for r in run.rounds))
        for way, count in (("up", run.up), ("down", run.down)):
            bytes_.add_metric([run.name, way], count)
        if run.rounds and not run.hidden:
            silos.add_metric(name, len(run.rounds[-1].came))
        for family, value in ((loss, run.loss), (perplexity, run.perplexity)):
            if value is not None:
                family.add_metric(name, value)
        if run.privacy is not None:
            p = run.privacy
            for what, value in (("spent", p.spent), ("projected", p.projected), ("limit", p.limit)):
                epsilon.add_metric([run.name, what], float("inf") if value is None else value)
    return [done, planned, loss, perplexity, epsilon, bytes_, failures, refusals, seconds, silos]


def _ledger(records: int, fits: bool) -> list[Metric]:
    return [
        GaugeMetricFamily("foedus_ledger_records", "Records of the party's own ledger.", value=records),
        GaugeMetricFamily("foedus_ledger_verified", "1 where its chain of hashes holds.", value=float(fits)),
    ]


def _alarms(firing: Iterable[Alarm]) -> list[Metric]:
    """All there are, with how many of each fire now."""
    names = [alarm.name for alarm in firing]
    family = GaugeMetricFamily("foedus_alarm", "How many of an alarm fire.", labels=["alarm", "severity"])
    for name, kind in ALARMS.items():
        family.add_metric([name, kind.severity], names.count(name))
    return [family]


class _Once:
    """A collector of families that are made already."""

    def __init__(self, families: list[Metric]) -> None:
        self.families = families

    def collect(self) -> list[Metric]:
        return self.families


def _text(families: list[Metric]) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Once(families))
    return generate_latest(registry)
