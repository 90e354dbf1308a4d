"""A process for every silo: the same answers as in one process, and nothing that a silo's process does, or stops doing,
harms more than that silo."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from foedus import wire
from foedus.build import build
from foedus.engines.base import Ask
from foedus.engines.frames import pack_report
from foedus.engines.processes import Processes
from foedus.governance import Tray
from foedus.treaty import load
from foedus.types import Receipt, Report, Task
from foedus.worker import command

from ..conftest import write_treaty

SILOS = ("law", "sport")
KEEPS = {"local.keep_optimizer": True, "adapter.dropout": 0.1, "data.keep": list(SILOS)}

# A silo's process that plays a part: it hears asks, says what it was given (in hexadecimal, or in a file), or does what
# it was told. It needs nothing of foedus, so that it starts in milliseconds.
PLAYER = """
import os, socket, struct, sys, time
coordinator = socket.socket(socket.AF_UNIX)
coordinator.connect(sys.argv[1])
def hear():
    prefix = coordinator.recv(24, socket.MSG_WAITALL)
    coordinator.recv(sum(struct.unpack("<4sIQQ", prefix)[1:]), socket.MSG_WAITALL)
def say(what):
    coordinator.sendall(open(what, "rb").read() if what.startswith("/") else bytes.fromhex(what))
moves = {
    "hear": hear,
    "hang": lambda: time.sleep(600),
    "die": lambda: os.kill(os.getpid(), 9),
    "leave": lambda: sys.exit(3),
}
for move in sys.argv[2:]:
    moves.get(move, lambda: say(move))()
while coordinator.recv(1 << 20):
    pass
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A treaty's workplace in this process, whose silos keep their optimizers and draw dropout."""
    treaty = load(write_treaty(tmp_path_factory.mktemp("treaty"))).replace(**KEEPS)
    (treaty.folder / "treaty.toml").write_text(treaty.resolved())
    return build(treaty.replace(**{"performance.cohort_batch": 1}))


@pytest.fixture(scope="module")
def engine(place, tmp_path_factory) -> Iterator[Processes]:
    """The same silos in processes of their own, started once for the whole file."""
    launch = command(place.treaty.folder / "treaty.toml")
    deep = tmp_path_factory.mktemp("silos") / ("deep" * 30)
    with Processes(launch, SILOS, deep, deadline_s=60) as engine:
        yield engine


@pytest.fixture
def played(tmp_path) -> Iterator[Callable[..., Processes]]:
    """Makes engines whose silos play the moves that they are given."""
    made: list[Processes] = []

    def make(moves: dict[str, list[str]], **more) -> Processes:
        def launch(silo: str, socket: Path) -> list[str]:
            return [sys.executable, "-I", "-S", "-c", PLAYER, str(socket), *moves[silo]]

        made.append(Processes(launch, tuple(moves), tmp_path / "silos", **{"deadline_s": 30, **more}))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def said(silo: str, payload: bytes = b"", failure: str = "") -> str:
    """A report as a player's move."""
    return pack_report(Report(silo, 0, payload, Receipt(silo, 0, failure=failure))).hex()


def asks(*silos: str, kind: str = "join") -> list[Ask]:
    return [Ask(kind, silo, b"") for silo in silos]


def task_asks(place, round: int = 0, kind: str = "train", split: str = "") -> list[Ask]:
    task = wire.pack_task(Task(round, place.base.digest, place.bench.start(), SILOS, 1))
    return [Ask(kind, silo, task, split) for silo in SILOS]


def answers(engine, asks: list[Ask]) -> dict[str, Report]:
    """Reports by silo, without how long they took."""
    return {r.silo: replace(r, receipt=replace(r.receipt, seconds=0.0)) for r in engine.ask(asks)}


def why(engine, asks: list[Ask]) -> dict[str, str]:
    return {r.silo: r.receipt.failure for r in engine.ask(asks)}


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def soon(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while not true() and time.monotonic() < until:
        time.sleep(0.02)
    return true()


# The same work in processes of their own


def test_silos_in_processes_of_their_own_answer_bit_for_bit_as_in_one(place, engine):
    one = place.engine()
    for round in (0, 1):  # the second depends on what each silo kept to itself
        assert answers(engine, task_asks(place, round)) == answers(one, task_asks(place, round))
    looks = task_asks(place, 2, "evaluate", "validation")
    assert answers(engine, looks) == answers(one, looks)
    assert engine.memory == {} and set(one.memory) == set(SILOS)


def test_a_silo_killed_while_it_trains_fails_alone_and_comes_back_with_what_it_gave_last(place, engine):
    before = answers(engine, task_asks(place, 6))
    victim = engine.pids["law"]
    os.kill(victim, signal.SIGSTOP)  # so that it is surely still at work when it is killed
    kill = threading.Timer(1.0, os.kill, (victim, signal.SIGKILL))
    kill.start()
    reports = answers(engine, task_asks(place, 7))
    kill.join()
    assert "its process ended (SIGKILL)" in reports["law"].receipt.failure and reports["law"].round == 7
    assert reports["law"].payload == b"" and not reports["sport"].receipt.failure
    assert engine.pids.keys() == {"sport"} and gone(victim) and not (engine.folder / "law/pid").exists()
    assert answers(engine, task_asks(place, 6)[:1])["law"] == before["law"]  # though its memory has moved on since
    assert Tray(engine.folder / "law/out-tray").memory("law")


def test_a_silo_keeps_its_log_its_pid_and_what_it_gave_last_to_itself_and_no_word_of_its_data(place, engine):
    assert all(why(engine, asks(*SILOS, kind="evaluate")).values())  # no task in it: errors are logged too
    assert not any(why(engine, task_asks(place)).values())
    for silo in SILOS:
        folder = engine.folder / silo
        assert {file.name for file in folder.iterdir()} == {"log", "pid", "out-tray"}
        assert folder.stat().st_mode & 0o77 == 0  # nobody else may look into it
        assert int((folder / "pid").read_text()) == engine.pids[silo]
        log = (folder / "log").read_text()
        assert "ready after" in log and "'train': done" in log
        assert not any(word in log for word in ("court", "judge", "goal", "coach"))


# Silos that do not do their part


def test_a_silo_that_dies_in_the_middle_of_an_ask_is_named_and_the_others_go_on(played):
    engine = played({"a": [said("a"), "hear", "die"], "b": [said("b"), "hear", said("b", b"sums")]})
    reports = answers(engine, asks("a", "b"))
    assert "its process ended (SIGKILL)" in reports["a"].receipt.failure
    assert reports["b"].payload == b"sums" and not reports["b"].receipt.failure
    assert engine.pids.keys() == {"b"}


def test_a_silo_that_hangs_past_the_deadline_is_killed_and_a_new_process_starts_at_the_next_ask(played):
    engine = played({"a": [said("a"), "hear", "hang"]}, deadline_s=0.3)
    for _ in range(2):
        assert "nothing came within 0.3 s" in why(engine, asks("a"))["a"]
        assert not engine.pids


def test_a_stopped_silo_is_killed_at_its_deadline(played):
    engine = played({"a": [said("a"), *["hear", said("a", b"sums")] * 2]}, deadline_s=1.0)
    assert not why(engine, asks("a"))["a"]
    victim = engine.pids["a"]
    os.kill(victim, signal.SIGSTOP)
    assert "nothing came within 1 s" in why(engine, asks("a"))["a"]
    assert gone(victim)


def test_a_silo_that_ended_stays_out_when_it_is_not_to_be_restarted(played):
    engine = played({"a": [said("a"), "hear", said("a"), "hear", "die"]}, restart=False)
    assert why(engine, asks("a"))["a"] == ""
    assert "SIGKILL" in why(engine, asks("a"))["a"]
    assert "has ended" in why(engine, asks("a"))["a"] and not engine.pids


def test_a_silo_that_ended_is_not_restarted_for_a_step_that_needs_what_it_had_in_memory(played):
    engine = played({"a": [said("a"), "hear", "die"]})
    assert "SIGKILL" in why(engine, asks("a", kind="deposit"))["a"]
    for kind in ("unmask", "decrypt"):
        assert "has ended" in why(engine, asks("a", kind=kind))["a"]
    for kind in ("join", "keys"):
        assert "SIGKILL" in why(engine, asks("a", kind=kind))["a"]


@pytest.mark.parametrize("garbage", [
    b"\x80\x04pickle".hex(), b"FDS\x02".hex(), said("b"), said("a").replace("7b", "5b"), "ff" * 10_000,
], ids=["pickle", "another version", "another silo's", "another header", "noise"])  # fmt: skip
def test_a_silo_that_sends_garbage_is_taken_down_and_named(played, garbage):
    engine = played({"a": [said("a"), "hear", garbage]})
    assert "no report" in why(engine, asks("a"))["a"] and not engine.pids


def test_garbage_after_a_report_ends_the_process_and_leaves_the_report(played):
    engine = played({"a": [said("a"), "hear", said("a", b"sums") + "00" * 40]})
    assert [r.payload for r in engine.ask(asks("a"))] == [b"sums"]
    assert not engine.pids


def test_garbage_instead_of_a_greeting_is_refused_too(played):
    assert "no report" in why(played({"a": [b"hello, I am a".hex()]}), asks("a"))["a"]


def test_a_silo_that_cannot_start_says_why_and_is_waited_for_no_longer(played, tmp_path):
    engine = played({"a": [said("a", failure="no such data"), "leave"], "b": ["leave"]})
    reports = answers(engine, asks("a", "b"))
    assert reports["a"].receipt.failure == "no such data"
    assert "exit code 3" in reports["b"].receipt.failure and not engine.pids
    with Processes(lambda silo, socket: [str(tmp_path / "nothing")], ("a",), tmp_path / "x", deadline_s=1) as none:
        assert "a process that starts" in why(none, asks("a"))["a"]
    with Processes(lambda silo, socket: [sys.executable, "-c", "1/0"], ("a",), tmp_path / "y", deadline_s=9) as broken:
        assert "exit code 1" in why(broken, asks("a"))["a"]
        assert "ZeroDivisionError" in (tmp_path / "y/a/log").read_text()


def test_a_silo_that_takes_too_long_to_start_is_waited_for_no_longer(played):
    assert "within 0.2 s" in why(played({"a": ["hang"]}, start_s=0.2), asks("a"))["a"]


def test_an_answer_that_nobody_waited_for_is_not_taken_for_the_next_one(played):
    engine = played({"a": [said("a"), "hear", "hear", said("a", b"first"), said("a", b"second")], "b": ["leave"]})
    first = engine.ask(asks("a", "b"))
    assert next(first).silo == "b"
    first.close()
    assert [r.payload for r in engine.ask(asks("a"))] == [b"second"]


# Carrying


def test_silos_answer_as_they_are_done_and_one_is_asked_one_thing_at_a_time(played):
    slow = played({"a": [said("a"), "hear", "hang"], "b": [said("b"), *["hear", said("b")] * 2]}, deadline_s=1.0)
    assert [r.silo for r in slow.ask(asks("a", "b", "b"))] == ["b", "b", "a"]


def test_no_more_than_so_many_silos_train_at_once_but_any_number_may_talk(played, tmp_path):
    def engine() -> Processes:
        return played({silo: [said(silo), "hear", "hang"] for silo in "abc"}, together=1, deadline_s=0.4)

    for kind, waves in (("train", 3), ("evaluate", 3), ("join", 1)):
        began = time.monotonic()
        assert all("nothing came" in failure for failure in why(engine(), asks(*"abc", kind=kind)).values())
        assert waves * 0.4 <= time.monotonic() - began < waves * 0.4 + 1.5, kind


def test_large_payloads_come_through_whole_both_ways_and_at_the_same_time(played, tmp_path):
    large = {silo: os.urandom(1 << 24) for silo in "ab"}
    for silo, payload in large.items():
        (tmp_path / silo).write_bytes(bytes.fromhex(said(silo, payload)))
    engine = played({silo: [said(silo), "hear", str(tmp_path / silo)] for silo in large})
    reports = engine.ask([Ask("train", silo, payload) for silo, payload in large.items()])
    assert {r.silo: r.payload for r in reports} == large


def test_a_folder_too_deep_for_a_sockets_address_is_no_obstacle(place, engine):
    assert len(os.fsencode(engine.folder)) > 108
    assert not any(why(engine, task_asks(place)).values())


# Nothing is left behind


def test_closing_leaves_no_process_no_zombie_and_no_socket(played, tmp_path):
    engine = played({"a": [said("a"), "hear", said("a")], "b": ["hang"]}, start_s=0.5)
    why(engine, asks("a", "b"))
    pids = list(engine.pids.values())
    assert pids
    engine.close()
    assert not any(psutil.pid_exists(pid) for pid in pids) and not engine.pids
    assert {file.name for file in (tmp_path / "silos").rglob("*") if not file.is_dir()} == {"log"}


COORDINATOR = """
import sys
from pathlib import Path
from foedus.engines.base import Ask
from foedus.engines.processes import Processes

STUCK = '''
import sys, threading, foedus.worker as worker
class Engine:
    def ask(self, asks):
        threading.Event().wait()
worker.engine_of = lambda *_: Engine()
sys.exit(worker.main())
'''
def launch(silo, socket):
    return [sys.executable, "-c", STUCK, "none", "--silo", silo, "--socket", str(socket)]
for _ in Processes(launch, ("a", "b"), Path(sys.argv[1]), deadline_s=600).ask([Ask("train", x, b"") for x in "ab"]):
    pass
"""


def test_silos_at_work_are_gone_within_seconds_of_their_coordinators_death(tmp_path):
    coordinator = subprocess.Popen([sys.executable, "-c", COORDINATOR, str(tmp_path)])
    try:
        logs = [tmp_path / silo / "log" for silo in "ab"]
        assert soon(lambda: all(log.exists() and "ready" in log.read_text() for log in logs), 30)
        pids = [int((tmp_path / silo / "pid").read_text()) for silo in "ab"]
    finally:
        coordinator.kill()
        coordinator.wait()
    assert soon(lambda: all(map(gone, pids)), 5)
    assert {file.name for file in tmp_path.rglob("*") if not file.is_dir()} == {"log"}
