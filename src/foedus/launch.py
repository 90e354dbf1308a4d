"""How a run reaches its silos: all of them in this process, or each in an operating-system process of its own.

With "processes" a silo's model, data, keys and memory are its own process's (`worker.py`), and what must outlive that
process (budget, journal, out-tray) lies in its own folder, RUN/silos/NAME. It is a simulation all the same: the silos
share a machine, and the coordinator, which has read their data to know their names, deals them their identities.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from .build import Workplace
from .engines.processes import Processes, home
from .errors import RunError, SiloError, one_of
from .execute import SILOS, Event, execute
from .governance import RunFolder
from .governance.circle import deal, take_back
from .worker import command

HERE, PROCESSES, FLOWER = "in-process", "processes", "flower"
ENGINES = (HERE, PROCESSES)
"""Those of one machine; `deploy/coordinator.py` has the one that crosses machines."""
CHOSEN = "engine.json"
DEADLINE_S = 1800.0
"""For one answer of a silo; one that hangs for longer is killed, and the others go on."""


def carry_out(
    folder: RunFolder, place: Workplace, engine: str | None = None, *, round: int | None = None
) -> Iterator[Event]:
    """`execute` with the engine of this name; left out, the one that the run began with. Close it to end its processes.

    A run keeps its engine, since what its silos gave and spent lies with it. Raises `RunError` for another one, and
    `SiloError` for a silo that cannot load its model and its data.
    """
    if _chosen(folder, engine) == HERE:
        yield from execute(folder, place, round=round)
        return
    if not place.whole:
        do = "Silos that bring their own data run elsewhere: `foedus run TREATY --engine flower`."
        raise RunError("a treaty whose source has the data of all silos", "one whose silos hand theirs over", do)
    own, threads = folder.path / SILOS, place.treaty.performance.threads or 1
    together = max(1, (os.cpu_count() or 1) // threads)
    homes = {name: home(own, name) for name in place.silos}
    with folder.lock():
        if place.sums is not None:
            deal(place.sums.circle, homes)
        try:
            launch = command(folder.path, threads)
            with Processes(launch, list(homes), own, deadline_s=DEADLINE_S, together=together) as silos:
                yield from _started(silos)
                yield from execute(folder, place, round=round, engine=silos)
        finally:
            take_back(homes.values())


def _started(silos: Processes) -> Iterator[Event]:
    """An event for each silo that is ready. Asked ahead of all work, so that one that cannot load is heard of first."""
    for ready, report in enumerate(silos.start(), start=1):
        if report.receipt.failure:
            log = home(silos.folder, report.silo) / "log"
            do = f"Its log says where: {log}. Mend it, and go on with `foedus resume`."
            raise SiloError(f"silo {report.silo!r} to load its model and its data", report.receipt.failure, do)
        yield Event("silo", report.silo, ready, len(silos.silos))


def _chosen(folder: RunFolder, engine: str | None) -> str:
    """The engine of the run, from now on."""
    if engine not in (None, *ENGINES):
        raise RunError(f"an engine: {', '.join(ENGINES)}", f'"{engine}"', one_of(engine, ENGINES))
    known = folder.read_json(CHOSEN) or {}
    if known.get("engine") == FLOWER:
        do = "Go on with `foedus resume`, in the federation's home."
        raise RunError("a run on this machine", "one between organisations", do, where=str(folder.path))
    begun = HERE if (folder.path / "ledger.jsonl").exists() else None
    before: str | None = known.get("engine", begun)
    if before is not None and engine not in (None, before):
        do = "Leave --engine out: what its silos gave and spent lies where they ran."
        raise RunError(f"the engine that the run began with, {before}", f'"{engine}"', do, where=str(folder.path))
    chosen = before or engine or HERE
    if not known:
        folder.write_json(CHOSEN, {"engine": chosen})
    return chosen
