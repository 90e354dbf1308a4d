"""What a silo does when it is asked; the same code under every engine.

Raw data, memory and the bare update stay inside. What leaves is a `Report`: the encoded update, and a receipt with the
facts that the treaty says silos disclose.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from .. import tree, wire
from ..errors import FoedusError, SiloError
from ..lm.bench import Bench
from ..stages.base import Chain
from ..types import Receipt, Report, Task, Update
from .evaluate import evaluate
from .shard import Silo
from .train import Memory

if TYPE_CHECKING:
    from ..algorithms.base import Algorithm


class Custody(Protocol):
    """What a silo remembers of its releases, so that none is given twice and each is paid for before it is made."""

    def charge(self, silo: str, round: int) -> None:
        """Writes the round's cost to the silo's budget, durably, unless it is there; refuses what exceeds it."""

    def kept(self, silo: str, task: str) -> tuple[Report, Memory] | None:
        """The report that answered the task with this digest, if it is the silo's last, and the memory after it."""

    def keep(self, task: str, report: Report, memory: Memory) -> None:
        """Remembers a report, durably, before it leaves."""


@dataclass(frozen=True)
class Handler:
    """A silo's side of a treaty. `disclose`: which facts ("loss", "holdings") may stand in a receipt. `custody`: where
    silos add noise of their own, who remembers what they released."""

    bench: Bench
    algorithm: Algorithm
    stages: Chain
    model: str
    disclose: frozenset[str] = frozenset()
    evaluation_rows: int | None = None
    custody: Custody | None = None

    def train(self, blob: bytes, silos: Sequence[Silo], memories: Sequence[Memory]) -> list[tuple[Report, Memory]]:
        """Trains the silos side by side. Raises `SiloError` when one of them cannot; then nobody's memory changed."""
        if self.custody is None:
            return self._train(blob, silos, memories)
        task, digest = _opened(blob)
        answers = {silo.name: self.custody.kept(silo.name, digest) for silo in silos}
        todo = [(silo, memory) for silo, memory in zip(silos, memories, strict=True) if answers[silo.name] is None]
        for silo, _ in todo:
            self.custody.charge(silo.name, task.round)
        for report, memory in self._train(blob, *zip(*todo, strict=True)) if todo else ():
            self.custody.keep(digest, report, memory)
            answers[report.silo] = report, memory
        return [answer for answer in answers.values() if answer is not None]

    def _train(self, blob: bytes, silos: Sequence[Silo], memories: Sequence[Memory]) -> list[tuple[Report, Memory]]:
        began = time.perf_counter()
        task = self._read(blob)
        with _as_silo_error():
            results = self.algorithm.train(self.bench, task, silos, memories)
        seconds = (time.perf_counter() - began) / len(silos)
        return [
            (self._trained(silo, task, blob, update, seconds), memory)
            for silo, (update, memory) in zip(silos, results, strict=True)
        ]

    def evaluate(self, blob: bytes, silo: Silo, split: str) -> Report:
        """Sums over a held-out split; see `silo/evaluate.py`."""
        began = time.perf_counter()
        task = self._read(blob)
        with _as_silo_error():
            sums = evaluate(self.bench, task.params, silo.splits[split], seed=task.seed, limit=self.evaluation_rows)
        return self._report(silo, task, blob, Update(sums), time.perf_counter() - began, {})

    def _read(self, blob: bytes) -> Task:
        task, _ = _opened(blob)
        if task.model != self.model:
            raise SiloError(
                f"a task for the base model {self.model[:12]}",
                f"one for {task.model[:12]}",
                "Coordinator and silo must load the same base model; compare `foedus check` on both sides.",
            )
        return task

    def _trained(self, silo: Silo, task: Task, blob: bytes, update: Update, seconds: float) -> Report:
        facts: dict[str, float] = {}
        if "holdings" in self.disclose:
            facts["examples"] = float(silo.examples)
        if "loss" in self.disclose:
            metric = tree.part(update.tensors, "metric")
            facts["loss"] = float(metric["loss"][0] / max(1.0, float(metric["targets"][0])))
        else:  # then it is no part of the sum either
            update = replace(update, tensors={key: x for key, x in update.tensors.items() if key[0] != "metric"})
        return self._report(silo, task, blob, self.stages.encode(update, task), seconds, facts)

    def _report(self, silo: Silo, task: Task, blob: bytes, update: Update, seconds: float, facts) -> Report:
        payload = wire.pack(update.tensors, {"round": task.round})
        receipt = Receipt(
            silo.name, task.round, _opened(blob)[1], wire.digest(payload), len(blob), len(payload), seconds, facts
        )
        return Report(silo.name, task.round, payload, receipt)


@lru_cache(maxsize=1)
def _opened(blob: bytes) -> tuple[Task, str]:
    """A task and its digest. Silos that share a process open the same blob once; they never write to its arrays."""
    return wire.unpack_task(blob), wire.digest(blob)


def failed(silo: str, round: int, error: Exception) -> Report:
    """The answer of a silo that could not do its part: no payload, and the reason without any of its data."""
    why = str(error) if isinstance(error, FoedusError) else type(error).__name__
    return Report(silo, round, b"", Receipt(silo, round, failure=why))


@contextmanager
def _as_silo_error() -> Iterator[None]:
    """Turns whatever local work raises into a `SiloError` that names the kind of error, and none of the data."""
    try:
        yield
    except FoedusError:
        raise
    except Exception as error:
        raise SiloError(
            "local work to succeed",
            type(error).__name__,
            "The silo's own log holds the traceback; its data stayed inside.",
        ) from error
