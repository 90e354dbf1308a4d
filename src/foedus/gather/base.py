"""How a cohort's answers become one sum: in the open, or so that the coordinator learns the sum and nothing else."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

from .. import wire
from ..engines.base import Ask, Engine
from ..errors import GuaranteeError
from ..secure.keys import Identity
from ..server.aggregators import Aggregator
from ..types import Receipt, Report, Task, Total, Tree

Gathered = tuple[Total, tuple[Receipt, ...]]


class Gather(Protocol):
    """`blind`: whether only the sum is seen. `gather`: asks the task's cohort and adds up what it answers, still
    encoded; the receipts of all that were asked, in their order, name those who failed.
    """

    blind: ClassVar[bool]

    def gather(self, engine: Engine, kind: str, task: Task, *, split: str = "") -> Gathered: ...


@dataclass(frozen=True)
class InTheOpen:
    """The coordinator sees every answer, and adds them up as the aggregator says."""

    aggregator: Aggregator
    blind: ClassVar[bool] = False

    def gather(self, engine: Engine, kind: str, task: Task, *, split: str = "") -> Gathered:
        receipts: list[Receipt] = []
        total = self.aggregator.combine(_updates(ask(engine, kind, task, split=split), receipts))
        return total, tuple(receipts)


def ask(engine: Engine, kind: str, task: Task, *, split: str = "") -> Iterator[Report]:
    """Asks the task's whole cohort; yields the reports in the order of the cohort, each as soon as its turn has come.

    Only what came before its turn is held, so that a round's memory does not grow with its cohort.
    """
    blob = wire.pack_task(task)
    due, early = deque(task.cohort), dict[str, Report]()
    for report in engine.ask([Ask(kind, silo, blob, split) for silo in task.cohort]):
        early[report.silo] = report
        while due and due[0] in early:
            yield early.pop(due.popleft())
    for silo in due:
        yield early[silo] if silo in early else silent(silo, task.round)


def silent(silo: str, round: int) -> Report:
    """What stands for the report of a silo that sent none."""
    return Report(silo, round, b"", Receipt(silo, round, failure="did not answer"))


def _updates(reports: Iterable[Report], receipts: list[Receipt]) -> Iterator[Tree]:
    """The encoded updates, one after another; the receipts of all reports are added to `receipts` as they come."""
    for report in reports:
        receipts.append(report.receipt)
        if not report.receipt.failure:
            yield wire.unpack(report.payload)[0]


def signer(coordinator: Identity | bytes) -> Identity:
    """The coordinator's identity. Raises `GuaranteeError` in a silo's own process, which has only its public key."""
    if isinstance(coordinator, bytes):
        do = "Gather in the coordinator's process."
        raise GuaranteeError("the identity of the coordinator", "its public key alone", do)
    return coordinator
