"""An engine whose silos are elsewhere: it seals each ask, hands it to a line, and opens what comes back.

Every ask gets exactly one report. A message whose loss the line reports, or whose answer cannot be opened, is sent
again after a pause that doubles, and so is one that nobody answered until half of its time was over: always the same
bytes, which a silo answers from memory if it did the work before. Whatever comes for an ask that has its report is
dropped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..errors import FoedusError, SiloError
from ..silo.handler import failed
from ..types import Report, Tree
from .base import Ask
from .frames import pack_ask, unpack_report
from .line import Line
from .processes import round_of

log = logging.getLogger("foedus.engines.remote")
FIRST_LOOK_S, LONGEST_LOOK_S = 0.001, 0.02
"""How long it waits between two looks at the line: at first, and at most."""
LONGEST_BACKOFF_S = 30.0


class Seal(Protocol):
    """What makes an ask into bytes for one silo, and an answer into its report. `governance/envelope.py` signs."""

    def seal(self, ask: Ask) -> bytes:
        """The bytes of an ask: a new message, each time it is called."""

    def open(self, silo: str, asked: bytes, answer: bytes) -> Report:
        """The report in an answer of this silo to these bytes. Raises `FoedusError` for anything else."""


class Plain:
    """No seal: bare frames (`frames.py`). Whoever holds the line can write them."""

    def seal(self, ask: Ask) -> bytes:
        return pack_ask(ask)

    def open(self, silo: str, asked: bytes, answer: bytes) -> Report:
        report = unpack_report(answer)
        if report.silo != silo:
            raise SiloError(f"a report of {silo}", "one of another silo", "Each message goes to one silo.")
        return report


@dataclass
class _Open:
    """An ask without its report yet. `names`: of the messages that carried it. `again`: when it is sent (again)."""

    ask: Ask
    sealed: bytes
    due: float
    again: float
    names: list[str] = field(default_factory=list)
    failures: int = 0
    why: str = "no answer"


class Remote:
    """Answers asks over a line. Use one `ask` at a time.

    `deadline_s`: for the answer to one ask, all its tries counted. `retries`: how often it is sent again after a
    failure that was noticed. `backoff_s`: the pause before the first of these; each one is twice the one before, and
    at most half a minute.
    """

    def __init__(self, line: Line, seal: Seal, *, deadline_s: float, retries: int = 8, backoff_s: float = 0.25) -> None:
        for name, value, holds in (
            ("deadline_s", deadline_s, deadline_s > 0),
            ("retries", retries, retries >= 0),
            ("backoff_s", backoff_s, backoff_s >= 0),
        ):
            if not holds:
                raise ValueError(f"Expected {name}={value} {'> 0' if name == 'deadline_s' else '>= 0'}.")
        self.line, self.seal = line, seal
        self.deadline_s, self.retries, self.backoff_s = deadline_s, retries, backoff_s
        self.memory: dict[str, Tree] = {}  # always empty: silos keep their own
        self.resent = 0
        """Messages sent more than once, so far."""

    def ask(self, asks: Sequence[Ask]) -> Iterator[Report]:
        """One report for each ask, as they come."""
        waiting: list[_Open] = []
        for ask in asks:
            try:
                waiting.append(self._opened(ask))
            except FoedusError as error:
                yield failed(ask.silo, round_of(ask), error)
        carried: dict[str, _Open] = {}
        look = FIRST_LOOK_S
        while waiting:
            self._send(waiting, carried)
            done = list(self._hear(carried))
            for task, _ in done:
                waiting.remove(task)
            late = list(self._overdue(waiting))
            for task, _ in late:
                waiting.remove(task)
            done += late
            for task, report in done:
                for name in task.names:
                    carried.pop(name, None)
                yield report
            look = FIRST_LOOK_S if done else min(1.5 * look, LONGEST_LOOK_S)
            if waiting and not done:
                time.sleep(look)

    def close(self) -> None:
        """Lets go of the line."""
        self.line.close()

    def _opened(self, ask: Ask) -> _Open:
        now = time.monotonic()
        return _Open(ask, self.seal.seal(ask), due=now + self.deadline_s, again=now)

    def _send(self, waiting: Sequence[_Open], carried: dict[str, _Open]) -> None:
        """Sends what is to be sent now. What nobody answers is sent again at half of the time that is left to it."""
        now = time.monotonic()
        for task in waiting:
            if task.again <= now < task.due:
                self.resent += bool(task.names)
                name = self.line.send(task.ask.silo, task.sealed)
                task.names.append(name)
                task.again = now + max(self.deadline_s / 2, LONGEST_LOOK_S)
                carried[name] = task

    def _hear(self, carried: dict[str, _Open]) -> Iterator[tuple[_Open, Report]]:
        """The reports that have come. An ask has one, whatever comes after it."""
        answered = set()
        for name, answer in self.line.poll():
            task = carried.get(name)
            if task is None or id(task) in answered:
                continue
            report = self._report(task, answer)
            if report is not None:
                answered.add(id(task))
                yield task, report

    def _report(self, task: _Open, answer: bytes | str) -> Report | None:
        """The report in an answer; or that there will be none; or None, when it is asked for again."""
        if isinstance(answer, bytes):
            try:
                return self.seal.open(task.ask.silo, task.sealed, answer)
            except FoedusError as error:
                answer = f"an answer that cannot be opened ({error.came})"
        task.failures, task.why = task.failures + 1, answer
        log.info("%s: %s", task.ask.silo, answer)
        if task.failures > self.retries:
            return self._failed(task, f"none after {task.failures} tries: {answer}")
        task.again = time.monotonic() + min(self.backoff_s * 2 ** (task.failures - 1), LONGEST_BACKOFF_S)
        return None

    def _overdue(self, waiting: Sequence[_Open]) -> Iterator[tuple[_Open, Report]]:
        now = time.monotonic()
        for task in waiting:
            if now >= task.due:
                yield task, self._failed(task, f"none within {self.deadline_s:g} s: {task.why}")

    def _failed(self, task: _Open, came: str) -> Report:
        do = "It is asked again in the next round that it takes part in; its own log says more."
        return failed(task.ask.silo, round_of(task.ask), SiloError("an answer", came, do))
