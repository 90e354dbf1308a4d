"""The exchanges of one sum: what went to whom, what came back, who failed and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from .. import wire
from ..engines.base import Ask, Engine
from ..errors import CohortError, FoedusError, SiloError
from ..secure import messages
from ..types import Receipt, Report, Task
from .base import silent

M = TypeVar("M", bound=messages.Message)


class Post:
    """Asks for one task. `failures`: why each silo that failed did. Bytes are counted as they pass."""

    def __init__(self, engine: Engine, task: Task) -> None:
        self.engine, self.task, self.blob = engine, task, wire.pack_task(task)
        self.digest = wire.digest(self.blob)
        self.failures: dict[str, str] = {}
        self._receipts: dict[str, Receipt] = {}
        self._up: dict[str, int] = dict.fromkeys(task.cohort, 0)
        self._down: dict[str, int] = dict.fromkeys(task.cohort, 0)

    def ask(self, kind: str, mails: Mapping[str, bytes], split: str = "") -> Iterator[Report]:
        """The reports of those who answered, as they arrive. `mails`: one for each silo that is asked."""
        payload = self.blob if kind in ("train", "evaluate") else b""
        quiet = set(mails)
        for report in self.engine.ask([Ask(kind, name, payload, split, mail) for name, mail in mails.items()]):
            quiet.discard(report.silo)
            self._count(report, len(payload) + len(mails[report.silo]))
            if report.receipt.failure:
                self.failures[report.silo] = report.receipt.failure
            else:
                yield report
        self.failures |= {name: silent(name, self.task.round).receipt.failure for name in quiet}

    def collect(self, kind: str, names: Iterable[str], mail: bytes, message: type[M]) -> list[M]:
        """The answers of some silos to the same mail; who sends anything else has failed."""
        found: list[M] = []
        for report in self.ask(kind, dict.fromkeys(names, mail)):
            with self.blaming(report.silo):
                found.append(messages.unpack(message, report.mail))
        return found

    @contextmanager
    def blaming(self, silo: str) -> Iterator[None]:
        """Whatever is wrong with an answer is its silo's failure, and the others go on."""
        try:
            yield
        except (FoedusError, KeyError) as error:
            self.failures[silo] = str(error)

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Adds to a `CohortError` why silos failed."""
        try:
            yield
        except CohortError as error:
            why = "; ".join(f"{silo}: {failure}" for silo, failure in self.failures.items())
            raise CohortError(error.expected, f"{error.came} ({why or 'nobody failed'})", error.do) from error

    def receipts(self, survivors: Iterable[str]) -> tuple[Receipt, ...]:
        """One for each silo of the cohort, in order; who is in the sum has not failed, whatever came afterwards."""
        summed = set(survivors)
        return tuple(
            replace(self._receipts[name], bytes_up=self._up[name], bytes_down=self._down[name])
            if name in summed
            else Receipt(name, self.task.round, failure=self.failures.get(name, "did not answer"))
            for name in self.task.cohort
        )

    def _count(self, report: Report, down: int) -> None:
        if report.silo in self._up:
            self._up[report.silo] += len(report.payload) + len(report.mail)
            self._down[report.silo] += down
        if report.payload:
            self._receipts[report.silo] = report.receipt


def must(taken: bool, why: str | None) -> None:
    if not taken:
        expected = "one answer, in time and for this sum"
        raise SiloError(expected, why or "one that was late, or came twice", "It is left out of this sum.")
