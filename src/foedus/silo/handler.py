"""What a silo does when it is asked; the same code under every engine.

Raw data, memory and the bare update stay inside. What leaves is a `Report`: the encoded update, and a receipt with the
facts that the treaty says silos disclose.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Protocol

from .. import tree, wire
from ..errors import FoedusError, GuaranteeError, SiloError
from ..lm.bench import Bench
from ..secure.mail import purpose_of
from ..stages.base import Chain
from ..types import Key, Receipt, Report, Task, Update
from .evaluate import HELD_OUT, evaluate
from .keyring import Keyring
from .membership import Membership
from .shard import Silo
from .train import Memory

if TYPE_CHECKING:
    from ..algorithms.base import Algorithm


ATTENTION: Key = ("attention", "weight")
"""The part of an update that is its weight, of an algorithm whose silos weigh themselves."""


class Custody(Protocol):
    """What a silo remembers of what it gave, so that nothing is given twice and each release is paid for before it is
    made.
    """

    def charge(self, silo: str, round: int) -> None:
        """Writes the round's cost to the silo's budget, durably, unless it is there; refuses what exceeds it."""

    def kept(self, silo: str, task: str, split: str = "") -> tuple[Report, Memory] | None:
        """The report that answered the task with this digest, if it is the silo's last, and the memory after it. What
        is kept was not masked yet.
        """

    def keep(self, task: str, report: Report, memory: Memory, split: str = "") -> None:
        """Remembers a report, durably, before it leaves."""

    def memory(self, silo: str) -> Memory:
        """The memory after the silo's last report, for a process that was restarted."""


@dataclass(frozen=True)
class Handler:
    """A silo's side of a treaty. `stages`: of its update; `measures`: of its evaluation sums. `disclose`: which facts
    ("loss", "holdings", "attention") it lets out, its loss and its weight under its own name unless a stage hides
    updates. `custody`: who remembers what it released. `membership`: its side of secure sums.
    """

    bench: Bench
    algorithm: Algorithm
    stages: Chain
    model: str
    disclose: frozenset[str] = frozenset()
    evaluation_rows: int | None = None
    custody: Custody | None = None
    measures: Chain = Chain()
    membership: Membership | Keyring | None = None

    def train(
        self, blob: bytes, silos: Sequence[Silo], memories: Sequence[Memory], mails: Sequence[bytes] = ()
    ) -> list[tuple[Report, Memory]]:
        """Trains the silos side by side. Raises `SiloError` when one of them cannot; then nobody's memory changed."""
        task, digest = _opened(blob)
        self._deliver([silo.name for silo in silos], mails, digest)
        answers = {silo.name: self._kept(silo.name, digest) for silo in silos}
        todo = [(silo, memory) for silo, memory in zip(silos, memories, strict=True) if answers[silo.name] is None]
        for silo, _ in todo:
            self._charge(silo.name, task.round)
        for report, memory in self._train(blob, *zip(*todo, strict=True)) if todo else ():
            self._keep(digest, report, memory)
            answers[report.silo] = report, memory
        found = [answer for answer in answers.values() if answer is not None]
        return [
            (self._sealed(report, self.stages, task, purpose_of("train", "", task.round)), memory)
            for report, memory in found
        ]

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

    def evaluate(self, blob: bytes, silo: Silo, memory: Memory, split: str, mail: bytes = b"") -> Report:
        """Sums over a held-out split; see `silo/evaluate.py`. `memory`: the silo's, after its last round. Raises
        `SiloError` for text that was trained on: nobody has paid for exact sums over it.
        """
        if split not in HELD_OUT:
            raise SiloError(
                f"a held-out split ({', '.join(HELD_OUT)})", "another one", "Text that was trained on is not evaluated."
            )
        began = time.perf_counter()
        task, digest = self._read(blob), _opened(blob)[1]
        self._deliver([silo.name], [mail], digest)
        kept = self._kept(silo.name, digest, split) if self.measures.hides else None
        if kept is None:
            with _as_silo_error():
                scores = partial(self.algorithm.scores, self.bench, task.params, silo, memory=memory)
                data, objective = silo.splits[split], self.bench.objective
                sums = evaluate(scores, data, objective, seed=task.seed, limit=self.evaluation_rows)
            update = self.measures.split()[0].encode(Update(sums, silo=silo.name), task)
            kept = self._report(silo, task, blob, update, time.perf_counter() - began, {}), {}
            if self.measures.hides:
                self._keep(digest, *kept, split)
        return self._sealed(kept[0], self.measures, task, purpose_of("evaluate", split, task.round))

    def answer(self, kind: str, silo: str, mail: bytes) -> Report:
        """A step of a secure sum other than giving a vector: joining, dealing shares, opening."""
        began = time.perf_counter()
        if self.membership is None:
            raise SiloError(
                "a treaty with secure sums", f"a request to {kind}", "Coordinator and silo must run the same treaty."
            )
        try:
            answer = self.membership.answer(kind, silo, mail)
        except FoedusError as error:
            return failed(silo, 0, error)
        return Report(silo, 0, b"", Receipt(silo, 0, seconds=time.perf_counter() - began), answer)

    def _deliver(self, silos: Sequence[str], mails: Sequence[bytes], task: str) -> None:
        """Before any work: whether each silo has what it needs to mask its answer to this task."""
        if self.membership is not None:
            for silo, mail in zip(silos, mails, strict=True):
                self.membership.deliver(silo, mail, task)

    def _sealed(self, report: Report, stages: Chain, task: Task, purpose: str) -> Report:
        """The report as it leaves: through the stages that hide, if there are any."""
        hiding = stages.split()[1]
        if not hiding.stages:
            return report
        if self.membership is None:
            raise GuaranteeError(
                "a silo that is a member of a secure sum", "one that is not", "Nothing leaves it in the clear."
            )
        try:
            self.membership.gives(report.silo, purpose, report.receipt.payload)
            hidden = hiding.encode(Update(wire.unpack(report.payload)[0], silo=report.silo), task)
        except FoedusError as error:
            return failed(report.silo, task.round, error)
        payload = wire.pack(hidden.tensors, {"round": task.round})
        receipt = replace(report.receipt, payload=wire.digest(payload), bytes_up=len(payload))
        return Report(report.silo, task.round, payload, receipt, self.membership.mail(report.silo))

    def _charge(self, silo: str, round: int) -> None:
        if self.custody is not None:
            self.custody.charge(silo, round)

    def _kept(self, silo: str, task: str, split: str = "") -> tuple[Report, Memory] | None:
        return None if self.custody is None else self.custody.kept(silo, task, split)

    def _keep(self, task: str, report: Report, memory: Memory, split: str = "") -> None:
        if self.custody is not None:
            self.custody.keep(task, report, memory, split)

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
        metric = tree.part(update.tensors, "metric")
        if "loss" not in self.disclose:  # then it is no part of the sum either
            update = replace(update, tensors={key: x for key, x in update.tensors.items() if key[0] != "metric"})
        elif not self.stages.hides:
            facts["loss"] = float(metric["loss"][0] / max(1.0, float(metric["targets"][0])))
        encoded = self.stages.split()[0].encode(replace(update, silo=silo.name), task)
        if "attention" in self.disclose and not self.stages.hides and ATTENTION in encoded.tensors:
            facts["attention"] = float(encoded.tensors[ATTENTION][0])
        return self._report(silo, task, blob, encoded, seconds, facts)

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
