"""A silo's own process: `python -m foedus.worker RUN_OR_TREATY --silo NAME --socket PATH`.

It is resident: model, data, memory and keys are loaded once and stay here. It connects to whoever listens at PATH, says
with an empty report that it is ready (or with a failed one why it will never be), and then answers one ask after
another (`engines/frames.py`) until the other side is gone; it then ends within a moment, whatever it was doing. The
silo's side of the work is `InProcess` over this one silo, so it does what it would do in any other engine.

It writes into its own folder only: by default, where the socket lies. The log on its standard error says what was asked
and how long it took, and where an error was raised, never its message: that could quote data.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .engines.base import Ask, Engine
from .engines.frames import connect, frames, pack_report, unpack_ask
from .engines.processes import Launch, round_of
from .errors import FoedusError, SiloError, WireError, one_of
from .silo.handler import failed
from .types import Receipt, Report

if TYPE_CHECKING:
    from .build import Workplace
    from .engines import InProcess
    from .governance.circle import Circle
    from .governance.vault import Vault
    from .treaty import Treaty

log = logging.getLogger("foedus.worker")
MOST = 1000
"""The most characters that the log shows of anything that came from outside."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves one silo until its coordinator is gone. The exit code: 1 for a silo that cannot be served, else 0."""
    wished = _options().parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    folder = wished.folder or wished.socket.parent
    with connect(wished.socket) as connection, _pid_in(folder) as pid:
        threading.Thread(target=_leave_with, args=(connection, pid), daemon=True).start()
        began = time.perf_counter()
        try:
            engine = engine_of(wished.source, wished.silo, folder, wished.threads)
        except Exception as error:
            _log("loading", error)
            connection.sendall(pack_report(failed(wished.silo, 0, error)))
            return 1
        log.info("ready after %.1f s", time.perf_counter() - began)
        serve(connection, engine, wished.silo)
    return 0


def command(source: Path, threads: int = 1) -> Launch:
    """How `Processes` starts the workers of a treaty, or of a run's folder: with the Python that runs now."""
    path = str(source.resolve())

    def launch(silo: str, place: Path) -> list[str]:
        options = ["--silo", silo, "--socket", str(place.resolve()), "--threads", str(threads)]
        return [sys.executable, "-m", "foedus.worker", path, *options]

    return launch


def engine_of(
    source: Treaty | Path,
    silo: str,
    folder: Path,
    threads: int,
    *,
    examples: Any = None,
    circle: Circle | None = None,
    budgets: Path | None = None,
    vault: Vault | None = None,
) -> InProcess:
    """What answers for one silo of a treaty, of its file, or of a run's folder: `engine_at` its `place_of`. `circle`:
    the parties to secure sums; left out, those that were dealt in `folder`.
    """
    treaty = _treaty(source) if isinstance(source, Path) else source
    from .governance.circle import dealt

    if circle is None and treaty.secure.sums != "open":
        circle = dealt(silo, folder)
    place = place_of(treaty, silo, threads, examples=examples, circle=circle)
    return engine_at(place, silo, folder, budgets=budgets, vault=vault)


def place_of(
    treaty: Treaty, silo: str, threads: int, *, examples: Any = None, circle: Circle | None = None
) -> Workplace:
    """A silo's own place under a treaty. `examples`: its own, as `build` takes them; left out, its share of the source
    that the treaty names. `circle`: the parties to secure sums, if it has any.

    Raises what `build` raises, and `SiloError` for a silo that the treaty does not have.
    """
    from .build import build  # heavy: a treaty that is wrong says so before

    data = None if examples is None else {silo: examples}
    place = build(treaty.replace(**{"performance.threads": threads}), data, circle=circle, only=silo)
    if silo not in place.silos:
        raise SiloError("one of the treaty's silos, with its data", f'"{silo}"', one_of(silo, place.federation.silos))
    return place


def engine_at(
    place: Workplace, silo: str, folder: Path, *, budgets: Path | None = None, vault: Vault | None = None
) -> InProcess:
    """What answers for one silo at its own place. `folder`: where it keeps what must outlive its process: out-tray and
    journal, and its budget unless `budgets` is another folder. `vault`: seals the out-tray.
    """
    from .execute import custody
    from .governance import TRAY, RunFolder, Tray

    kept = custody(RunFolder(folder, vault), place, budgets) or Tray(folder / TRAY, vault=vault)
    engine = place.engine(custody=kept)
    engine.memory[silo] = kept.memory(silo)
    return engine


def serve(connection: socket.socket, engine: Engine, silo: str) -> None:
    """Says that the silo is ready, and answers the asks on this connection until its other side closes it.

    Whatever goes wrong with an ask becomes a failed report. Raises `WireError` for bytes that are no ask.
    """
    connection.sendall(pack_report(Report(silo, 0, b"", Receipt(silo, 0))))
    for frame in frames(connection):
        connection.sendall(answer(engine, silo, unpack_ask(frame)))


def answer(engine: Engine, silo: str, ask: Ask) -> bytes:
    """The report of one silo to one ask, as a frame."""
    began = time.perf_counter()
    try:
        if ask.silo != silo:
            raise SiloError(f'an ask for "{silo}"', f'one for "{ask.silo}"', "Each silo has a process of its own.")
        (report,) = engine.ask([ask])
    except Exception as error:
        _log(repr(ask.kind[:MOST]), error)
        report = failed(silo, round_of(ask), error)
    log.info("%r: %s, %.2f s", ask.kind[:MOST], report.receipt.failure[:MOST] or "done", time.perf_counter() - began)
    try:
        return pack_report(report)
    except WireError as error:
        return pack_report(failed(silo, round_of(ask), error))


def _treaty(source: Path) -> Treaty:
    if not source.is_dir():
        from .treaty import load

        return load(source)
    from .execute import treaty_of
    from .governance import RunFolder

    return treaty_of(RunFolder.open(source))


def _leave_with(connection: socket.socket, pid: Path) -> None:
    """Ends this process when the other side is gone, even in the middle of a step: nobody would hear what it gives."""
    hung_up = select.poll()
    hung_up.register(connection, 0)  # of a hang-up one is always told
    hung_up.poll()
    pid.unlink(missing_ok=True)
    os._exit(0)


@contextmanager
def _pid_in(folder: Path) -> Iterator[Path]:
    """A file with this process's number."""
    pid = folder / "pid"
    pid.write_text(f"{os.getpid()}\n")
    try:
        yield pid
    finally:
        pid.unlink(missing_ok=True)


def _log(what: str, error: BaseException) -> None:
    """Says where an error and its causes were raised. Only our own errors are quoted: the others' may hold data."""
    chain: BaseException | None = error
    while chain is not None:
        said = str(chain)[:MOST] if isinstance(chain, FoedusError) else type(chain).__name__
        log.error("%s: %s\n%s", what, said, "".join(traceback.format_tb(chain.__traceback__)).rstrip())
        chain = chain.__cause__ or (None if chain.__suppress_context__ else chain.__context__)


def _options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m foedus.worker", description="Serve one silo of a treaty.")
    options.add_argument("source", type=Path, metavar="RUN_OR_TREATY", help="a run's folder, or a treaty")
    options.add_argument("--silo", required=True, help="whom to serve")
    options.add_argument("--socket", required=True, type=Path, help="where the coordinator listens")
    options.add_argument("--folder", type=Path, help="where the silo keeps what is its own; the socket's by default")
    options.add_argument("--threads", type=int, default=1, help="of the processor; several silos share it")
    return options


if __name__ == "__main__":
    sys.exit(main())
