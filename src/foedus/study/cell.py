"""Cells, one after another, in a process of their own: `python -m foedus.study.cell --threads N`.

Every line of its standard input names a folder. It carries out the treaty in FOLDER/cell.json into FOLDER/run, or goes
on where that was left, measures the result, writes FOLDER/measures.json, and answers with a line: 0, or 1 where that
failed. What it says meanwhile goes to FOLDER/log. One process for many cells, so that libraries are imported, and the
same text is scrubbed, once. Ends when its standard input does.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any

from ..governance import RunFolder
from ..treaty import Treaty, parse
from .running import CELL, LOG, RUN, keep

if TYPE_CHECKING:
    from ..build import Workplace

Measure = Callable[..., Mapping[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Works until its standard input ends."""
    options = argparse.ArgumentParser(prog="foedus.study.cell")
    options.add_argument("--threads", type=int, required=True)
    threads = options.parse_args(arguments).threads
    folders: Queue[str] = Queue()
    threading.Thread(target=_listen, args=(folders,), daemon=True).start()
    with os.fdopen(os.dup(1), "w") as answers:
        while True:
            code = _logged(Path(folders.get()), threads)
            print(code, file=answers, flush=True)


def _logged(folder: Path, threads: int) -> int:
    """0, or 1 where the cell failed; its error is then the log's last line."""
    with (folder / LOG).open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    try:
        carry_out(folder, threads)
    except Exception as error:
        import traceback

        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 1
    finally:
        gc.collect()  # the cell's model
    return 0


def carry_out(folder: Path, threads: int, measure: Measure | None = None) -> None:
    """Runs and measures the cell in `folder`. `measure`: left out, `measure.measure`."""
    from ..execute import begin, execute

    if measure is None:
        from .measure import measure
    began = time.perf_counter()
    wanted = json.loads((folder / CELL).read_text("utf-8"))
    settings = wanted["settings"]
    treaty = replace(parse(wanted["treaty"], str(folder / CELL)), folder=folder / wanted["origin"])
    path = folder / RUN
    run = RunFolder.open(path) if (path / "treaty.toml").is_file() else begin(treaty, path)
    place = _built(_with(treaty, threads), settings["split"])
    if run.read_json("summary.json") is None:
        for event in execute(run, place):
            print(f"{event.kind} {event.phase} {event.round}/{event.rounds}", flush=True)
    told = {key: x for key, x in settings.items() if key not in ("far", "far_keep")}
    figures = measure(path, place, far=_far(treaty, settings), **told)
    summary = run.read_json("summary.json")
    keep(folder, settings, {**figures, **of_summary(summary), "wall": time.perf_counter() - began})


def of_summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a study takes from a run's summary: its guarantee, what it cost, and where it ran."""
    privacy = summary["privacy"]
    return {
        "run": {
            "unit": privacy["unit"], "epsilon": privacy.get("epsilon"), "delta": privacy.get("delta"),
            "neighbours": privacy.get("neighbours"), "simulated_noise": bool(privacy.get("simulated_noise")),
            "bytes_up": sum(map(sum, summary["bytes"]["up"].values())), "seconds": summary["seconds"]["total"],
            "failures": len(summary["failures"]), "parameters": summary["adapter"]["parameters"],
        },
        "versions": summary["versions"],
        "hardware": summary["hardware"],
    }  # fmt: skip


def _built(treaty: Treaty, split: str) -> Workplace:
    """The treaty made ready, without validation text where another split is measured: nobody looks at it on the way."""
    from ..build import build, silo_splits

    found = silo_splits(treaty)
    if split != "validation":
        found = {name: replace(parts, validation=parts.validation.slice(0, 0)) for name, parts in found.items()}
    return build(treaty, found)


def _far(treaty: Treaty, settings: Mapping[str, Any]) -> list[str]:
    """The texts that shift goes towards, scrubbed as the silos' own; none where the study names no source."""
    from ..build import columns
    from ..data import only, read
    from ..data.scrub import scrub_table

    if settings["far"] is None:
        return []
    table = read(settings["far"], columns(treaty), base=treaty.folder or Path())
    if settings["far_keep"]:
        table = only(table, settings["far_keep"])
    if treaty.data.scrub:
        table, _ = scrub_table(table, treaty.data.scrub)
    texts: list[str] = table["text"].to_pylist()
    return texts


def _with(treaty: Treaty, threads: int) -> Treaty:
    """Threads bear on speed only, and are no part of the digest."""
    return treaty.replace(**{"performance.threads": threads})


def _listen(folders: Queue[str]) -> None:
    """Whoever started this process holds the other end of its standard input, and lets go of it when it dies."""
    for line in sys.stdin:
        folders.put(line.rstrip("\n"))
    os._exit(2)


if __name__ == "__main__":
    raise SystemExit(main())
