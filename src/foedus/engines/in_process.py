"""Every silo in this process, over one shared frozen base. The reference for what every other engine must give.

Asks that carry the same task to silos with equally many local steps may be answered side by side ("cohort batching");
how many, is the caller's number, so that results never depend on timing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .. import wire
from ..errors import SiloError
from ..silo.handler import Handler, failed
from ..silo.shard import Silo
from ..silo.train import LocalPlan, age
from ..types import Report, Tree
from .base import Ask


class InProcess:
    """Answers asks with `handler`, at most `together` silos at a time. `memory` is what each silo keeps to itself."""

    def __init__(self, handler: Handler, silos: Mapping[str, Silo], plan: LocalPlan, together: int = 1) -> None:
        self.handler, self.silos, self.plan, self.together = handler, silos, plan, max(1, together)
        self.memory: dict[str, Tree] = {}

    def ask(self, asks: Sequence[Ask]) -> Iterator[Report]:
        for group in self._groups(asks):
            yield from self._train(group) if group[0].kind == "train" else [self._answer(group[0])]

    def _groups(self, asks: Sequence[Ask]) -> Iterator[list[Ask]]:
        """Neighbouring asks that can be answered side by side."""
        group: list[Ask] = []
        for ask in asks:
            if group and not self._fits(group, ask):
                yield group
                group = []
            group.append(ask)
        if group:
            yield group

    def _fits(self, group: Sequence[Ask], ask: Ask) -> bool:
        first = group[0]
        return (
            len(group) < self.together
            and ask.kind == first.kind == "train"
            and ask.payload == first.payload
            and self._pace(ask) == self._pace(first)
        )

    def _pace(self, ask: Ask) -> tuple[int, int]:
        """Steps this silo will take, and has taken with the optimizer that it keeps."""
        return self.plan.steps_of(self.silos[ask.silo]), age(self.memory.get(ask.silo, {}))

    def _train(self, group: Sequence[Ask]) -> Iterator[Report]:
        silos = [self.silos[ask.silo] for ask in group]
        try:
            memories, mails = [self.memory.get(silo.name, {}) for silo in silos], [ask.mail for ask in group]
            answers = self.handler.train(group[0].payload, silos, memories, mails)
        except SiloError as error:
            if len(group) > 1:  # find out who it was, and keep the others
                for ask in group:
                    yield from self._train([ask])
            else:
                yield failed(group[0].silo, wire.unpack_task(group[0].payload).round, error)
            return
        for report, memory in answers:
            self.memory[report.silo] = memory
            yield report

    def _answer(self, ask: Ask) -> Report:
        try:
            if ask.kind == "evaluate":
                memory = self.memory.get(ask.silo, {})
                return self.handler.evaluate(ask.payload, self.silos[ask.silo], memory, ask.split, ask.mail)
            return self.handler.answer(ask.kind, ask.silo, ask.mail)
        except SiloError as error:
            return failed(ask.silo, wire.unpack_task(ask.payload).round if ask.payload else 0, error)
