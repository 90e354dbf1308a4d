"""A silo's own process: it answers what it is asked, survives whatever an ask does to it, says no word of its data in
its log, and leaves with whoever it serves."""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from foedus.engines.base import Ask
from foedus.engines.frames import frames, listen, pack_ask, unpack_report
from foedus.errors import GuaranteeError, SiloError, WireError
from foedus.types import Receipt, Report
from foedus.worker import engine_of, serve

from .conftest import write_treaty


class Stub:
    """An engine that does what the kind of an ask says."""

    def ask(self, asks):
        (ask,) = asks
        deeds = {
            "data": ValueError("patient with a fever"),
            "refused": GuaranteeError("room in the budget", "none", "Stop."),
            "memory": MemoryError(),
            "huge": SiloError("x" * 100_000, "", ""),
        }
        if ask.kind in deeds:
            raise deeds[ask.kind]
        silo = "sport" if ask.kind == "another" else ask.silo
        yield Report(silo, 1, ask.payload, Receipt(silo, 1, disclosed={"loss": float("nan")}), ask.mail[::-1])
        if ask.kind == "two":
            yield Report(silo, 1, b"", Receipt(silo, 1))


@pytest.fixture
def coordinator() -> Iterator[socket.socket]:
    """A connection to a silo called law, which is served by a thread of this process."""
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    silo = threading.Thread(target=serve, args=(theirs, Stub(), "law"))
    silo.start()
    with ours:
        yield ours
    silo.join(10)
    theirs.close()
    assert not silo.is_alive()


def hear(connection: socket.socket) -> Iterator[Report]:
    return map(unpack_report, frames(connection))


def test_a_silo_first_says_that_it_is_ready_and_then_answers_each_ask(coordinator):
    heard = hear(coordinator)
    assert next(heard) == Report("law", 0, b"", Receipt("law", 0))
    for payload in (b"", b"task", b"x" * 3_000_000):
        coordinator.sendall(pack_ask(Ask("train", "law", payload, "test", b"liam")))
        report = next(heard)
        assert (report.payload, report.mail, report.round) == (payload, b"mail", 1)


@pytest.mark.parametrize("kind, failure", [
    ("data", "ValueError"), ("refused", "room in the budget"), ("memory", "MemoryError"), ("huge", "at most"),
    ("two", "ValueError"),
])  # fmt: skip
def test_whatever_an_ask_does_to_a_silo_it_answers_and_lives(coordinator, kind, failure):
    heard = hear(coordinator)
    next(heard)
    coordinator.sendall(pack_ask(Ask(kind, "law", b"")))
    report = next(heard)
    assert failure in report.receipt.failure and "fever" not in report.receipt.failure and report.payload == b""
    coordinator.sendall(pack_ask(Ask("train", "law", b"")))
    assert not next(heard).receipt.failure


def test_an_ask_for_another_silo_is_refused(coordinator):
    heard = hear(coordinator)
    next(heard)
    coordinator.sendall(pack_ask(Ask("train", "sport", b"")))
    report = next(heard)
    assert report.silo == "law" and 'one for "sport"' in report.receipt.failure


def test_bytes_that_are_no_ask_end_the_service():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"GET / HTTP/1.1\r\n")
        with pytest.raises(WireError):
            serve(theirs, Stub(), "law")


def test_the_log_says_where_an_error_was_raised_and_never_what_it_quoted(coordinator, caplog):
    caplog.set_level(logging.INFO)
    heard = hear(coordinator)
    next(heard)
    coordinator.sendall(pack_ask(Ask("data", "law", b"")))
    next(heard)
    assert "'data': ValueError" in caplog.text and "test_worker.py" in caplog.text and "in ask" in caplog.text
    assert "fever" not in caplog.text.replace('ValueError("patient with a fever")', "")  # the source line is shown


def test_an_unknown_silo_is_refused_with_the_nearest_known_one(tmp_path):
    with pytest.raises(SiloError, match='Did you mean "law"'):
        engine_of(write_treaty(tmp_path), "lew", tmp_path, 1)


def test_a_worker_serves_a_treaty_or_a_runs_folder_and_one_silo_only(tmp_path):
    from foedus.execute import begin
    from foedus.treaty import load

    begin(load(write_treaty(tmp_path)), tmp_path / "run")
    for source in (tmp_path / "treaty.toml", tmp_path / "run"):
        assert set(engine_of(source, "law", tmp_path, 1).silos) == {"law"}


def test_a_silo_that_adds_its_own_noise_keeps_its_budget_and_its_releases_in_its_own_folder(tmp_path):
    from foedus.treaty import load

    treaty = load(write_treaty(tmp_path)).replace(**{
        "privacy.unit": "example", "privacy.noise_multiplier": 1.0, "privacy.rate": 0.2, "local.batch": 8,
        "server.weighting": "uniform", "disclosure.loss": False, "disclosure.holdings": False,
        "evaluation.baselines": ["base"],
    })  # fmt: skip
    (tmp_path / "private.toml").write_text(treaty.resolved())
    custody = engine_of(tmp_path / "private.toml", "law", tmp_path / "own", 1).handler.custody
    assert [file.name for file in (tmp_path / "own/budgets").iterdir()] == ["law.jsonl"]
    custody.charge("law", 0)
    assert "charge" in (tmp_path / "own/budgets/law.jsonl").read_text()


def test_a_silo_of_secure_sums_answers_with_the_identity_that_was_dealt_to_it_or_not_at_all(tmp_path):
    from foedus.governance.circle import deal, fresh_circle
    from foedus.treaty import load

    treaty = load(write_treaty(tmp_path)).replace(**{"secure.sums": "masked", "disclosure.holdings": False,
                                                     "cohort.minimum": 3, "server.weighting": "uniform"})  # fmt: skip
    (tmp_path / "masked.toml").write_text(treaty.resolved())
    with pytest.raises(GuaranteeError, match="the identity of law"):
        engine_of(tmp_path / "masked.toml", "law", tmp_path / "law", 1)
    circle = fresh_circle(["law", "medicine", "sport"])
    deal(circle, {"law": tmp_path / "law"})
    handler = engine_of(tmp_path / "masked.toml", "law", tmp_path / "law", 1).handler
    assert handler.membership is not None and handler.stages.hides
    assert handler.membership.journal.folder == tmp_path / "law/journals"


WAITS = """
import sys, threading, foedus.worker as worker
def engine_of(*_):
    threading.Event().wait()
worker.engine_of = engine_of
sys.exit(worker.main())
"""


@pytest.mark.parametrize("way", ["the connection closes", "SIGTERM"])
def test_a_worker_ends_while_it_still_loads_its_model(tmp_path, way):
    with listen(tmp_path / "socket") as listener:
        listener.settimeout(20)
        command = [sys.executable, "-c", WAITS, "none", "--silo", "law", "--socket", str(tmp_path / "socket")]
        worker = subprocess.Popen(command)
        connection, _ = listener.accept()
    with connection:
        if way == "SIGTERM":
            worker.terminate()
            assert worker.wait(5) == -signal.SIGTERM
    assert worker.wait(5) in (0, -signal.SIGTERM)


def test_a_worker_without_a_coordinator_does_not_start(tmp_path):
    command = [sys.executable, "-m", "foedus.worker", "none", "--silo", "law", "--socket", str(tmp_path / "socket")]
    worker = subprocess.run(command, capture_output=True, text=True)
    assert worker.returncode == 1 and "FileNotFoundError" in worker.stderr


def test_a_silo_that_cannot_load_says_so_and_leaves(tmp_path):
    Path(tmp_path / "treaty.toml").write_text("[treaty]\n")
    with listen(tmp_path / "socket") as listener:
        listener.settimeout(20)
        command = [sys.executable, "-m", "foedus.worker", str(tmp_path / "treaty.toml"), "--silo", "law", "--socket"]
        worker = subprocess.Popen([*command, str(tmp_path / "socket")], stderr=subprocess.DEVNULL)
        connection, _ = listener.accept()
    with connection:
        (report,) = hear(connection)
    assert report.receipt.failure and report.silo == "law"
    assert worker.wait(5) == 1
