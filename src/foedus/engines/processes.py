"""Every silo in an operating-system process of its own, which keeps its model, its data, its memory and its keys.

Coordinator and silo talk over a Unix socket in frames (`frames.py`); `worker.py` is the silo's side. A process that
ends, hangs past its deadline or says what is no report is taken down, and its silo's answer is a failure. Processes end
with their coordinator, even when that is killed.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from .. import wire
from ..errors import SiloError, WireError
from ..silo.handler import failed
from ..types import Report, Tree
from .base import Ask
from .frames import Inbox, listen, pack_ask, unpack_report

log = logging.getLogger("foedus.processes")

Launch = Callable[[str, Path], Sequence[str]]

START = "start"
"""The kind of ask that wants nothing but a process that is ready."""
WORK = (START, "train", "evaluate")
"""Kinds of ask that keep a core busy."""
BEGIN = ("join", "keys", *WORK)
"""Kinds of ask that a new process can answer; all others go on with what it had in memory."""
GRACE_S = 2.0
"""How long a process may take to leave before it is killed."""
LOOK_S = 0.1
"""How often a process that has not connected yet is looked at: one that ends then leaves no other sign."""


class Processes:
    """Answers asks with one process a silo, started when first asked. Use one `ask` at a time, and `close` at the end.

    `launch(silo, socket)`: the command of a silo's worker, which connects to that socket. `folder`: gets a folder for
    each silo, with its log, its pid, and its socket while it starts. `deadline_s`: for the answer to one ask;
    `start_s`: for loading model and data. `together`: how many may train or evaluate at once; the cores, when left out.
    `restart`: whether a silo whose process ended gets a new one when it is next asked to train, evaluate or join; what
    the old one had in memory is lost.
    """

    def __init__(
        self, launch: Launch, silos: Sequence[str], folder: Path, *, deadline_s: float, start_s: float = 600.0,
        together: int | None = None, restart: bool = True,
    ) -> None:  # fmt: skip
        self.launch, self.silos, self.folder, self.restart = launch, tuple(silos), folder, restart
        self.deadline_s, self.start_s = deadline_s, start_s
        self.together = max(1, together or os.cpu_count() or 1)
        self.memory: dict[str, Tree] = {}  # always empty: silos keep their own
        self._workers: dict[str, _Worker] = {}

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> dict[str, int]:
        """The processes that run now, by silo."""
        return {silo: worker.process.pid for silo, worker in self._workers.items() if worker.runs}

    def ask(self, asks: Sequence[Ask]) -> Iterator[Report]:
        waiting = deque(asks)
        try:
            while waiting or self._asked():
                yield from self._send(waiting)
                yield from self._listen()
        finally:
            for worker in self._asked():
                worker.forget()

    def start(self) -> Iterator[Report]:
        """Starts all processes ahead of the first ask; each tells when it is ready, or why it will never be."""
        return self.ask([Ask(START, silo, b"") for silo in self.silos if silo not in self.pids])

    def close(self) -> None:
        """Ends all processes, and waits until they are gone."""
        for worker in self._workers.values():
            worker.process.terminate()
        for worker in self._workers.values():
            worker.end(GRACE_S)
        self._workers.clear()

    def _asked(self) -> list[_Worker]:
        return [worker for worker in self._workers.values() if worker.asked]

    def _send(self, waiting: deque[Ask]) -> Iterator[Report]:
        """Gives every silo that is free its next ask; the others keep their place."""
        for _ in range(len(waiting)):
            ask = waiting.popleft()
            if not self._free(ask):
                waiting.append(ask)
                continue
            try:
                self._worker(ask).take(ask)
            except (SiloError, WireError) as error:
                yield failed(ask.silo, round_of(ask), error)

    def _free(self, ask: Ask) -> bool:
        at_work = [worker.asked for worker in self._workers.values() if worker.asked]
        room = ask.kind not in WORK or sum(other.kind in WORK for other in at_work) < self.together
        return room and all(other.silo != ask.silo for other in at_work)

    def _worker(self, ask: Ask) -> _Worker:
        """The process of the silo that is asked, started unless it runs."""
        silo = ask.silo
        known = self._workers.get(silo)
        if known is not None and known.runs:
            return known
        if known is not None:
            known.end()
            if not self.restart or ask.kind not in BEGIN:
                do = "It is started anew when it can begin again." if self.restart else "It stays out of this run."
                raise SiloError("an answer", "none: its process has ended", do)
        log.info("%s: starting", silo)
        place = home(self.folder, silo)
        self._workers[silo] = worker = _Worker(silo, self.launch, place, self.start_s, self.deadline_s)
        return worker

    def _listen(self) -> Iterator[Report]:
        """Waits until something happens at the silos that were asked, and tells what came of it."""
        asked = self._asked()
        if not asked:
            return
        with selectors.DefaultSelector() as selector:
            for worker in asked:
                selector.register(worker.channel, worker.interest, worker)
            events = [(key.data, mask) for key, mask in selector.select(min(worker.patience for worker in asked))]
        for worker, mask in events:
            yield from self._hear(worker, mask)
        for worker in self._asked():
            if why := worker.overdue:
                yield from self._lose(worker, why)

    def _hear(self, worker: _Worker, mask: int) -> Iterator[Report]:
        try:
            yield from worker.move(mask)
        except OSError:
            yield from self._lose(worker, "", GRACE_S)
        except WireError as error:
            yield from self._lose(worker, f"it sent no report, but {error.came}")

    def _lose(self, worker: _Worker, why: str, grace: float = 0.0) -> Iterator[Report]:
        """Takes a process down, and answers for it. `why`: "" when it ended by itself, or is about to."""
        ask, ended = worker.asked, worker.end(grace)
        why = why or f"its process ended ({ended})"
        log.warning("%s: %s", worker.silo, why)
        if ask is not None:
            do = "Its log says more; " + ("it is started anew." if self.restart else "it stays out of this run.")
            yield failed(ask.silo, round_of(ask), SiloError("an answer", f"none: {why}", do))


class _Worker:
    """One silo's process as its coordinator sees it: started, connected, ready; and asked, or not. `asked`: what it has
    not answered yet."""

    def __init__(self, silo: str, launch: Launch, place: Path, start_s: float, deadline_s: float) -> None:
        place.mkdir(parents=True, exist_ok=True)
        place.chmod(0o700)
        self.silo, self.place, self.deadline_s = silo, place, deadline_s
        self.asked: Ask | None = None
        self.channel, self._connected, self._ready = listen(place / "socket"), False, False
        self._inbox, self._unsent, self._stale = Inbox(), memoryview(b""), 0
        self._limit_s, self._due = start_s, time.monotonic() + start_s
        try:
            self.process = self._start(launch(silo, place / "socket"))
        except OSError as error:
            self._close()
            do = "Check the command that starts a silo."
            raise SiloError("a process that starts", error.strerror or type(error).__name__, do) from error

    def _start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with (self.place / "log").open("ab") as file:  # its own session, so that Ctrl-C reaches the coordinator alone
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file, start_new_session=True
            )

    @property
    def runs(self) -> bool:
        return self.process.poll() is None

    @property
    def interest(self) -> int:
        """What its channel is waited for."""
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self._ready and self._unsent else 0)

    @property
    def patience(self) -> float:
        """Seconds until it must be looked at again, whatever happens."""
        left = max(0.0, self._due - time.monotonic())
        return left if self._connected else min(left, LOOK_S)

    @property
    def overdue(self) -> str:
        """Why it is waited for no longer; "" while it is."""
        if not self._connected and not self.runs:
            return f"its process ended ({_how(self.process)})"
        return f"nothing came within {self._limit_s:g} s" if time.monotonic() >= self._due else ""

    def take(self, ask: Ask) -> None:
        """Takes an ask, to be sent as soon as it is ready. Raises `WireError` for one that is too large."""
        if ask.kind != START:
            frame = pack_ask(ask)
            self._unsent = memoryview(bytes(self._unsent) + frame if self._unsent else frame)
        self.asked = ask
        self._wait()

    def forget(self) -> None:
        """Nobody waits for the answer any more; it is dropped when it comes."""
        self.asked, self._stale = None, self._stale + 1

    def move(self, mask: int) -> Iterator[Report]:
        """Does what its channel is ready for, and tells what it answered. Raises `OSError` when the process is gone,
        and `WireError` for what is no report of this silo's."""
        if not self._connected:
            self._connect()
            return
        if mask & selectors.EVENT_WRITE:
            sent = self.channel.send(self._unsent)
            self._unsent = self._unsent[sent:]
        if mask & selectors.EVENT_READ:
            chunk = self.channel.recv(1 << 20)
            if not chunk:
                raise ConnectionResetError
            for frame in self._inbox.feed(chunk):
                yield from self._heard(unpack_report(frame))

    def end(self, grace: float = 0.0) -> str:
        """Ends the process, leaves nothing of it but its log, and tells how it ended. Any number of times."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(grace)
        self.process.kill()
        self.process.wait()
        self._close()
        self.asked = None
        return _how(self.process)

    def _connect(self) -> None:
        connection, _ = self.channel.accept()
        connection.setblocking(False)
        self.channel.close()
        (self.place / "socket").unlink(missing_ok=True)
        self.channel, self._connected = connection, True

    def _heard(self, report: Report) -> Iterator[Report]:
        """The first report is a greeting; then there is one for each ask, in their order."""
        ask = self.asked
        if report.silo != self.silo:
            raise WireError(f"a report of {self.silo}", "one of another silo", "Each process serves one silo.")
        if not self._ready and report.receipt.failure:
            self.end(GRACE_S)
            if ask is not None:
                yield Report(self.silo, round_of(ask), b"", replace(report.receipt, round=round_of(ask)))
        elif not self._ready:
            self._ready, self._limit_s = True, self.deadline_s
            self._wait()
            if ask is not None and ask.kind == START:
                self.asked = None
                yield report
        elif self._stale:
            self._stale -= 1
        elif ask is not None:
            self.asked = None
            yield report

    def _wait(self) -> None:
        """Starts its time anew."""
        self._due = time.monotonic() + self._limit_s

    def _close(self) -> None:
        self.channel.close()
        for name in ("socket", "pid"):
            (self.place / name).unlink(missing_ok=True)


def home(folder: Path, silo: str) -> Path:
    """A silo's own folder, inside that of all."""
    return folder / quote(silo, safe="")


def round_of(ask: Ask) -> int:
    """The round of the task that an ask carries; 0 where it carries none."""
    with suppress(WireError):
        return wire.unpack_task(ask.payload).round
    return 0


def _how(process: subprocess.Popen[bytes]) -> str:
    """How a process ended: by which signal, or with which code."""
    code = process.poll() or 0
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
