"""Cells carried out: side by side, resumed, failing, stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from foedus.study.cells import Cell, settings
from foedus.study.conduct import Conduct
from foedus.study.running import MEASURES, Launcher, carry_out, keep, kept, place_of

from .studies import TABLE_ONLY, Stub, invented, made


@pytest.fixture
def study(tmp_path) -> Conduct:
    return made(tmp_path, only=["table"])


def events(study: Conduct, runner, jobs: int = 1):
    return list(carry_out(study.chosen, study.out, settings(study.study), runner, jobs))


def test_every_cell_begins_and_is_done_once(study):
    runner = Stub(study)
    found = [(event.kind, event.cell.name) for event in events(study, runner)]
    names = [cell.name for cell in study.chosen]
    assert found == [pair for name in names for pair in (("begin", name), ("done", name))]
    assert runner.served == names


def test_what_is_done_is_not_done_again(study):
    events(study, Stub(study))
    again = Stub(study)
    found = events(study, again)
    assert again.served == [] and {event.kind for event in found} == {"kept"}
    assert found[0].measures["run"]["epsilon"] == 7.99
    (place_of(study.out, study.chosen[2]) / MEASURES).unlink()
    events(study, again)
    assert again.served == [study.chosen[2].name]


def test_other_settings_measure_anew(study):
    events(study, Stub(study))
    place = place_of(study.out, study.chosen[0])
    told = settings(study.study)
    assert kept(place, told) and kept(place, {**told, "samples": 7}) is None


def test_a_cell_that_fails_stops_no_other_and_is_tried_again(study):
    broken = study.chosen[1].name
    found = events(study, Stub(study, breaks=lambda cell: cell.name == broken))
    kinds = {event.cell.name: event for event in found if event.kind != "begin"}
    assert kinds.pop(broken).error == f"RuntimeError: {broken} broke"
    assert {event.kind for event in kinds.values()} == {"done"} and len(kinds) == len(study.chosen) - 1
    again = Stub(study)
    events(study, again)
    assert again.served == [broken]


def test_a_runner_that_leaves_nothing_has_failed(study):
    found = events(study, lambda cell, place: None)
    assert {event.kind for event in found} == {"begin", "failed"} and "without measures" in found[-1].error


def test_so_many_run_at_a_time_and_no_more(study):
    lock, now, most = threading.Lock(), [0], [0]
    ready = threading.Barrier(3)

    def runner(cell: Cell, place: Path) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        ready.wait(timeout=5)  # three are here at once, or this breaks
        with lock:
            now[0] -= 1
        keep(place, settings(study.study), invented(cell))

    found = events(study, runner, jobs=3)
    assert [event.kind for event in found].count("done") == 9 and most == [3]


def test_whoever_closes_it_stops_what_runs(study):
    stopped = threading.Event()

    def runner(cell: Cell, place: Path) -> None:
        assert stopped.wait(timeout=5)

    steps = carry_out(study.chosen, study.out, settings(study.study), runner, 2, stopped.set)
    assert [next(steps).kind, next(steps).kind] == ["begin", "begin"]
    steps.close()
    assert stopped.is_set()


def test_a_torn_write_leaves_no_measures(study, monkeypatch):
    place = place_of(study.out, study.chosen[0])
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(Exception, match="No space left"):
        keep(place, settings(study.study), {"a": 1})
    assert kept(place, settings(study.study)) is None


def launched(study: Conduct, monkeypatch, program: str) -> Launcher:
    """A launcher whose processes run this program instead of `foedus.study.cell`, for every folder they are given."""
    work = (
        "import os, sys\nfor line in sys.stdin:\n folder = line.strip()\n log = open(folder + '/log', 'a')\n " + program
    )
    start = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **how: start([sys.executable, "-c", work, *command[3:]], **how)
    )
    return Launcher(settings(study.study), threads=1)


def test_a_process_that_fails_is_told_by_the_last_line_of_its_log(study, monkeypatch):
    launcher = launched(
        study, monkeypatch, "print('loading\\nDataError: no such column', file=log, flush=True); print(1, flush=True)"
    )
    found = events(Conduct(study.study, study.plan, study.out, 1, study.chosen[:1], ""), launcher)
    launcher.close()
    assert found[-1].kind == "failed" and "DataError: no such column" in found[-1].error


def test_a_process_is_told_its_treaty_its_settings_and_its_threads(study, monkeypatch):
    program = "print(sys.argv[1:], os.environ['OMP_NUM_THREADS'], file=log, flush=True); print(0, flush=True)"
    launcher = launched(study, monkeypatch, program)
    cell = study.chosen[0]
    place = place_of(study.out, cell)
    launcher(cell, place)
    launcher.close()
    wanted = json.loads((place / "cell.json").read_text())
    assert wanted["treaty"] == cell.treaty.resolved() and wanted["settings"]["split"] == "validation"
    assert (place / wanted["origin"]).resolve() == cell.treaty.folder
    assert (place / "log").read_text().split() == ["['--threads',", "'1']", "1"]


def test_one_process_works_on_one_cell_after_another(study, monkeypatch):
    launcher = launched(study, monkeypatch, "print(os.getpid(), file=log, flush=True); print(0, flush=True)")
    for cell in study.chosen[:3]:
        launcher(cell, place_of(study.out, cell))
    launcher.close()
    assert len({(place_of(study.out, cell) / "log").read_text() for cell in study.chosen[:3]}) == 1


def test_a_process_that_dies_is_replaced(study, monkeypatch):
    launcher = launched(study, monkeypatch, "os._exit(3)")
    for _ in range(2):
        with pytest.raises(Exception, match="exit code 3"):
            launcher(study.chosen[0], place_of(study.out, study.chosen[0]))
    launcher.close()


def test_a_stopped_launcher_kills_and_starts_no_more(study, monkeypatch):
    launcher = launched(study, monkeypatch, "import time; time.sleep(60)")
    threading.Timer(0.3, launcher.close).start()
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(Exception, match="signal 9|being stopped"):
            launcher(study.chosen[0], place_of(study.out, study.chosen[0]))
    assert time.monotonic() - began < 10


def test_a_process_ends_with_the_one_that_started_it():
    program = """
import queue, threading, time
from foedus.study.cell import _listen
threading.Thread(target=_listen, args=(queue.Queue(),)).start()
print("up", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"up\n"
    process.stdin.close()
    assert process.wait(timeout=10) == 2
    process.stdout.close()


def test_a_study_is_locked_while_it_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("foedus.report.write_study", lambda folder: None)
    study = made(tmp_path, TABLE_ONLY)
    steps = study.run(Stub(study))
    next(steps)
    with pytest.raises(Exception, match="nobody else"):
        next(made(tmp_path, TABLE_ONLY).run(Stub(study)))
    steps.close()


def test_a_killed_study_goes_on_where_it_was(tmp_path):
    study = made(tmp_path, TABLE_ONLY)
    program = f"""
import os, signal
from pathlib import Path
from tests.study.studies import Stub
from foedus.study.conduct import Conduct
study = Conduct.of(Path({str(tmp_path / "study.toml")!r}), Path({str(tmp_path / "out")!r}))
for number, step in enumerate(study.run(Stub(study))):
    if number == 6:
        os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    runner = Stub(study)
    kinds = [step.event.kind for step in study.run(runner) if step.event]
    assert kinds.count("kept") >= 3 and len(runner.served) + kinds.count("kept") == len(study.chosen)
    assert (tmp_path / "out/study.html").is_file()
