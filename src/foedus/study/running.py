"""Cells carried out by some processes, each working on one after another; what is done is done, also after `kill -9`.

    OUT/cells/KEY/   cell.json  what is to be done     run/  the run's folder     measures.json  its figures     log

A cell is done when `measures.json` is there and was made with the same settings. A runner makes it; `Launcher` is the
one that starts processes, and tests bring others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from ..errors import RunError
from ..governance.disk import write_whole
from .cells import Cell

CELL, MEASURES, RUN, LOG = "cell.json", "measures.json", "run", "log"
LONGEST = 2000
"""Letters of an error that are kept."""

Settings = Mapping[str, Any]
Runner = Callable[[Cell, Path], None]
"""Carries a cell out in its folder and leaves `measures.json` there, by `keep`; may be called by several threads."""


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Event:
    """`kind`: "kept" (was done before), "begin", "done" or "failed"; `error`: why; `seconds`: how long it took."""

    kind: str
    cell: Cell
    seconds: float = 0.0
    error: str = ""
    measures: Mapping[str, Any] = field(default_factory=dict)


def carry_out(
    cells: Sequence[Cell], out: Path, settings: Settings, runner: Runner, jobs: int, stop: Callable[[], None] = _nothing
) -> Iterator[Event]:
    """Events of all cells, `jobs` at a time, those first that were done before. A cell that fails stops no other.

    When it is closed, or interrupted, it calls `stop`, which must make the runners return, and waits for them.
    """
    todo = []
    for cell in cells:
        if measures := kept(place_of(out, cell), cell.told(settings)):
            yield Event("kept", cell, float(measures.get("wall") or 0.0), measures=measures)
        else:
            todo.append(cell)
    waiting, running = iter(todo), dict[Future[float], Cell]()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while True:
                while len(running) < jobs and (cell := next(waiting, None)) is not None:
                    running[pool.submit(_timed, runner, cell, place_of(out, cell))] = cell
                    yield Event("begin", cell)
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield _ended(running.pop(future), future, out, settings)
        except BaseException:
            stop()
            raise


def _timed(runner: Runner, cell: Cell, place: Path) -> float:
    began = time.perf_counter()
    runner(cell, place)
    return time.perf_counter() - began


def _ended(cell: Cell, future: Future[float], out: Path, settings: Settings) -> Event:
    error = future.exception()
    if error is not None and not isinstance(error, Exception):
        raise error
    measures = kept(place_of(out, cell), cell.told(settings))
    if error is not None or measures is None:
        why = f"{type(error).__name__}: {error}" if error else "RunError: it ended without measures"
        return Event("failed", cell, error=why[-LONGEST:])
    return Event("done", cell, future.result(), measures=measures)


def place_of(out: Path, cell: Cell) -> Path:
    """A cell's folder."""
    return out / "cells" / cell.key


def keep(place: Path, settings: Settings, measures: Mapping[str, Any]) -> None:
    """Writes a cell's measures, whole or not at all."""
    blob = json.dumps({"settings": dict(settings), "measures": measures}, indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(place / MEASURES, blob.encode() + b"\n")


def kept(place: Path, settings: Settings) -> dict[str, Any] | None:
    """A cell's measures; None while there are none that were made with these settings."""
    file = place / MEASURES
    if not file.is_file():
        return None
    found = json.loads(file.read_text("utf-8"))
    return found["measures"] if found["settings"] == dict(settings) else None


@dataclass(frozen=True)
class Launcher:
    """A runner: processes of `foedus.study.cell` with so many threads, each of which works on one cell after another. A
    process ends when its standard input does, so none outlives the study, however that ends.
    """

    settings: Settings
    threads: int
    _alive: list[subprocess.Popen[str]] = field(default_factory=list, repr=False)
    _idle: list[subprocess.Popen[str]] = field(default_factory=list, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)
    _closed: list[bool] = field(default_factory=list, repr=False)

    def __call__(self, cell: Cell, place: Path) -> None:
        """Raises `RunError` with the last line of the log when the cell fails."""
        wanted = {
            "name": cell.name, "treaty": cell.treaty.resolved(), "settings": dict(cell.told(self.settings)),
            "origin": os.path.relpath(cell.treaty.folder or Path(), place),
        }  # fmt: skip
        write_whole(place / CELL, json.dumps(wanted, indent=2, ensure_ascii=False).encode())
        process = self._worker()
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):
            print(place.resolve(), file=process.stdin, flush=True)
        answer = process.stdout.readline().strip()
        if answer:
            with self._lock:
                self._idle.append(process)
        if answer != "0":
            why = _last_words(place / LOG, 1 if answer else _ended_by(process))
            raise RunError("a cell that ends well", why, f"Its log: {place / LOG}.")

    def _worker(self) -> subprocess.Popen[str]:
        """A process that has nothing to do; a new one where there is none."""
        with self._lock:
            if self._closed:
                raise RunError("a study that goes on", "one that is being stopped", "Start it again.")
            if self._idle:
                return self._idle.pop()
            command = [sys.executable, "-m", "foedus.study.cell", "--threads", str(self.threads)]
            environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "OMP_WAIT_POLICY": "PASSIVE"}
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
                start_new_session=True,
            )  # fmt: skip
            self._alive.append(process)
            return process

    def close(self) -> None:
        """Ends all processes, and starts no more."""
        with self._lock:
            self._closed.append(True)
            for process in self._alive:
                process.kill()
            while self._idle:
                _ended_by(self._idle.pop())


def _ended_by(process: subprocess.Popen[str]) -> int:
    """The code with which a process ended that says nothing more."""
    code = process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()
    return code


def _last_words(log: Path, code: int) -> str:
    if code < 0:
        return f"the end by signal {-code}"
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"the exit code {code}"
