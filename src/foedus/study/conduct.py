"""A study from its file to its pages. Read this first; then `cells.py`, `running.py` and `results.py`.

    OUT/   results.json   study.html   study.md   plots/   cells/KEY/…   test-reads.json

It may be killed at any moment: called again, it goes on with the cells that are not done, and with each run from its
last checkpoint. Cells that failed are tried again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import report
from ..errors import TreatyError, one_of
from ..governance import RunFolder
from .cells import Cell, Plan, plan, settings
from .results import commit, results
from .running import Event, Launcher, Runner, carry_out, kept, place_of
from .spec import Study, load

READS = "test-reads.json"
RESULTS = "results.json"


@dataclass(frozen=True)
class Progress:
    """How far a study is: an event of a cell, or kind "written" once the pages are. `left`: seconds, about; None while
    nothing is known.
    """

    kind: str
    event: Event | None
    total: int
    done: int = 0
    running: int = 0
    failed: int = 0
    left: float | None = None


@dataclass(frozen=True)
class Conduct:
    """A study made ready: its file read, every treaty resolved. Making one raises `Mistakes` for a file that is not
    sound; nothing runs before `run()`.
    """

    study: Study
    plan: Plan
    out: Path
    jobs: int
    chosen: tuple[Cell, ...]
    command: str

    @classmethod
    def of(
        cls, file: Path, out: Path | None = None, jobs: int | None = None, only: Sequence[str] = (), command: str = ""
    ) -> Conduct:
        """The study in a file. `only`: what to carry out of it: "table", keys of curves, ablations and methods."""
        study = load(file)
        whole = plan(study, file)
        chosen = _chosen(study, whole, only, file)
        return cls(study, whole, out or Path("runs/studies") / study.name, jobs or study.study.jobs, chosen, command)

    def run(self, runner: Runner | None = None) -> Iterator[Progress]:
        """Carries out the cells that are not done, then writes results and pages, also of a study that is stopped."""
        self.out.mkdir(parents=True, exist_ok=True)
        told = settings(self.study)
        launcher = Launcher(told, threads=max(1, (os.cpu_count() or 1) // self.jobs))
        folder = RunFolder(self.out)
        with folder.lock():
            _note_reading(folder, self.study)
            failed: dict[str, str] = {}
            try:
                cells = carry_out(self.chosen, self.out, told, runner or launcher, self.jobs, launcher.close)
                with closing(cells) as events:
                    yield from self._counted(events, failed)
            finally:
                launcher.close()
                self._write(folder, told, failed)
        yield Progress("written", None, len(self.chosen), len(self.chosen) - len(failed), 0, len(failed))

    def _counted(self, events: Iterator[Event], failed: dict[str, str]) -> Iterator[Progress]:
        total, done, running, seconds = len(self.chosen), 0, 0, list[float]()
        for event in events:
            running += {"begin": 1, "done": -1, "failed": -1}.get(event.kind, 0)
            done += event.kind in ("done", "kept")
            if event.kind == "failed":
                failed[event.cell.key] = event.error
            if event.seconds:
                seconds.append(event.seconds)
            todo = total - done - len(failed)
            left = sum(seconds) / len(seconds) * todo / min(self.jobs, max(1, todo)) if seconds else None
            yield Progress("cell", event, total, done, running, len(failed), left)

    def _write(self, folder: RunFolder, told: Mapping[str, Any], failed: Mapping[str, str]) -> None:
        cells = {cell.key: kept(place_of(self.out, cell), cell.told(told)) for cell in self.plan.cells}
        done = {key: measures for key, measures in cells.items() if measures is not None}
        about = {
            "command": self.command, **commit(Path(__file__).parent), "jobs": self.jobs,
            "test_reads": folder.read_json(READS) or [], "written": _today(),
        }  # fmt: skip
        folder.write_json(RESULTS, results(self.study, self.plan, done, failed, about))
        report.write_study(self.out)


def read_results(out: Path) -> dict[str, Any]:
    """What `run` has written."""
    found: dict[str, Any] = json.loads((out / RESULTS).read_text("utf-8"))
    return found


def _chosen(study: Study, whole: Plan, only: Sequence[str], file: Path) -> tuple[Cell, ...]:
    """The cells of some parts or methods; of all, for none."""
    known = {"table", *study.methods(), *(c.key for c in study.curve), *(a.key for a in study.ablation)}
    for name in only:
        if name not in known:
            raise TreatyError("a part or a method of the study", f'"{name}"', one_of(name, known), where=str(file))
    wished = {use.cell for use in whole.uses if not only or {use.part[-1], use.row} & set(only)}
    return tuple(cell for cell in whole.cells if cell.key in wished)


def _note_reading(folder: RunFolder, study: Study) -> None:
    """The test split is to be read once. A study that is changed and read again says how often."""
    if study.study.split != "test":
        return
    reads = folder.read_json(READS) or []
    if study.digest() not in [read["study"] for read in reads]:
        folder.write_json(READS, [*reads, {"study": study.digest(), "when": _today()}])


def _today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")
