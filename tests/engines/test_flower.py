"""The real thing: a SuperLink and three silos as processes of their own, over TLS, and whatever befalls them.

`FOEDUS_LARGE=1` adds the test of a message of 500 MB.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path

import httpx
import pytest

from foedus import wire
from foedus.deploy import certificates
from foedus.engines.base import Ask
from foedus.engines.frames import MAGIC, pack_report, unpack_ask, unpack_report
from foedus.engines.line import Away, Loopback
from foedus.engines.remote import Plain, Remote
from foedus.errors import RunError
from foedus.types import Receipt, Report

flower = pytest.importorskip("foedus.engines.flower")

SILOS = ("a", "b", "c")
PATIENCE_S = 90.0  # for one step of a test, on a machine that is busy
FORK = multiprocessing.get_context("fork")  # a silo starts at once: what it imports is here already

WHOLE = flower.PIECE
"""The pieces of a deployment."""


def answer(name: str) -> Callable[[bytes], bytes]:
    """A silo's: a report where it was asked an ask; else its name and its process, then what it was asked. Told to
    "sleep" or to "fail", it does.
    """

    def place(blob: bytes) -> bytes:
        if blob.startswith(MAGIC):
            ask = unpack_ask(blob)
            return pack_report(Report(name, 1, ask.payload[::-1], Receipt(name, 1, payload=wire.digest(ask.payload))))
        if blob.startswith(b"sleep"):
            time.sleep(1.0)
        if blob == b"fail":
            raise ValueError("a secret")
        return f"{name} {os.getpid()} ".encode() + blob

    return place


@dataclass
class Federation:
    """A SuperLink and its silos. `address`: where it listens. `keys`: (private, public) of each silo's node."""

    folder: Path
    address: str
    keys: Mapping[str, tuple[bytes, str]]
    silos: dict[str, multiprocessing.process.BaseProcess] = field(default_factory=dict)
    link: flower.SuperLink | None = None

    @property
    def members(self) -> dict[str, str]:
        return {silo: public for silo, (_, public) in self.keys.items()}

    @property
    def authority(self) -> bytes:
        return (self.folder / "tls" / "ca.crt").read_bytes()

    @property
    def socket(self) -> Path:
        return self.folder / "flower" / "socket"

    def begin(self) -> None:
        tls = self.folder / "tls"
        self.link = flower.SuperLink(
            self.folder / "flower", self.address, certificate=tls / "server.crt", key=tls / "server.key"
        )
        flower.admit(self.socket, self.members)

    def start(self, silo: str) -> None:
        options = {"memory": self.folder / f"{silo}.json"}
        process = FORK.Process(
            target=flower.serve, args=(self.address, self.authority, self.keys[silo][0], answer(silo)), kwargs=options,
            daemon=True,
        )  # fmt: skip
        process.start()
        self.silos[silo] = process

    def kill(self, silo: str) -> None:
        process = self.silos[silo]
        os.kill(process.pid, signal.SIGKILL)
        process.join()

    def end(self) -> None:
        for process in self.silos.values():
            process.kill()
            process.join()
        self.link.stop()


@contextmanager
def federated(folder: Path, piece: int) -> Iterator[Federation]:
    """A SuperLink and silos, whose messages travel in pieces of so many bytes: here and in the silos, which are forked
    from here.
    """
    before, flower.PIECE = flower.PIECE, piece
    certificates.make(folder / "tls", ["127.0.0.1"], "test")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    federation = Federation(folder, address, {silo: certificates.node_key() for silo in SILOS})
    try:
        for silo in SILOS:  # before there is a SuperLink: they wait for it
            federation.start(silo)
        federation.begin()
        yield federation
    finally:
        federation.end()
        flower.PIECE = before


@pytest.fixture(scope="module")
def federation(tmp_path_factory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp(
        "federation-with-a-name-that-makes-the-path-of-its-socket-far-too-long-for-a-socket"
    )
    with federated(folder, 1 << 16) as federation:  # so that small messages have many pieces
        yield federation


@pytest.fixture(scope="module")
def line(federation) -> Iterator[flower.FlowerLine]:
    with flower.FlowerLine(federation.socket, federation.members) as line:
        until(lambda: line.silos() == set(SILOS))
        yield line


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


def hear(line: flower.FlowerLine, *names: str) -> list[bytes | str]:
    """What came for these messages, in their order."""
    found: dict[str, bytes | str] = {}

    def all_came() -> bool:
        found.update(line.poll())
        return found.keys() >= set(names)

    until(all_came)
    return [found[name] for name in names]


def test_three_silos_answer_from_processes_that_stay(line, federation):
    first = hear(line, *(line.send(silo, b"one") for silo in SILOS))
    assert first == [f"{silo} {federation.silos[silo].pid} one".encode() for silo in SILOS]
    second = hear(line, *(line.send(silo, b"two") for silo in SILOS))
    assert second == [f"{silo} {federation.silos[silo].pid} two".encode() for silo in SILOS]


def test_messages_of_any_size_arrive_as_they_were_sent(line):
    blobs = [b"", b"x", bytes(flower.PIECE), bytes(flower.PIECE) + b"\1", os.urandom(2 * flower.PIECE + 1)]
    answers = hear(line, *(line.send("a", blob) for blob in blobs))
    assert [found.split(b" ", 2)[2] for found in answers] == blobs


def test_the_same_asks_get_the_same_reports_in_process_in_flowers_simulation_and_over_tls(line):
    asks = [Ask("train", silo, os.urandom(100_000)) for silo in SILOS]
    simulated = flower.SimulatedLine({silo: answer(silo) for silo in SILOS})
    lines = (Loopback({silo: partial(answer, silo) for silo in SILOS}), simulated, line)
    found = [sorted(map(pack_report, Remote(way, Plain(), deadline_s=PATIENCE_S).ask(asks))) for way in lines]
    simulated.close()
    assert found[0] == found[1] == found[2]
    assert [unpack_report(report).receipt.failure for report in found[2]] == ["", "", ""]


def test_an_answer_that_raises_is_told_of_without_its_words(line):
    (found,) = hear(line, line.send("b", b"fail"))
    assert found == "its node failed (ValueError)"


def test_who_is_not_on_the_line_is_told_of(line):
    (found,) = hear(line, line.send("d", b"x"))
    assert found == "d is not connected"


def test_a_silo_that_is_killed_at_work_and_returns_is_heard_of_and_answers_again(line, federation):
    (first,) = hear(line, line.send("a", b"x"))
    name = line.send("a", b"sleep")
    time.sleep(0.3)
    federation.kill("a")
    federation.start("a")
    (found,) = hear(line, name)
    assert found == "a has connected anew since"
    until(lambda: "a" in line.silos())
    (again,) = hear(line, line.send("a", b"x"))
    assert again == f"a {federation.silos['a'].pid} x".encode() != first


def test_the_network_sees_nothing_but_what_a_node_needs(federation, line):
    trust = flower.ssl.create_default_context(cadata=federation.authority.decode())
    with httpx.Client(base_url=f"https://{federation.address}", verify=trust, timeout=PATIENCE_S) as stranger:
        for path in ("control/start-run", "control/register-node", "control/list-nodes", "runtime/acquire-task",
                     "runtime/get-nodes", "fleet/get-fab", "fleet/get-run", "fleet/register-node"):  # fmt: skip
            assert stranger.post(f"/v1/{path}").status_code == 404, path
        for path in ("/", "/docs", "/openapi.json", "/health"):
            assert stranger.get(path).status_code == 404, path
        header = {"content-type": "application/protobuf"}
        for path in sorted(flower.NODE_PATHS):
            refused = stranger.post(path, headers=header)
            assert refused.status_code in (400, 401), (path, refused.status_code)
        large = stranger.post("/v1/fleet/push-object", headers=header, content=bytes(flower.MOST_REQUEST + 1))
        assert large.status_code == 413
    assert federation.socket.stat().st_mode & 0o777 == 0o600


def test_a_plain_or_an_old_connection_is_refused(federation):
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://{federation.address}/", timeout=PATIENCE_S)
    old = flower.ssl.create_default_context(cadata=federation.authority.decode())
    old.maximum_version = flower.ssl.TLSVersion.TLSv1_2
    with pytest.raises(httpx.ConnectError, match="(?i)protocol|version|handshake"):
        httpx.get(f"https://{federation.address}/", verify=old, timeout=PATIENCE_S)


def test_a_silo_that_was_not_admitted_waits_and_sees_nothing(federation, line):
    private, _ = certificates.node_key()
    with serving(federation.address, federation.authority, private) as (told, asked):
        until(lambda: bool(told))
        assert "has not admitted this key" in told[0]
    assert not asked


def test_a_server_of_another_authority_is_not_spoken_to(federation, tmp_path):
    certificates.make(tmp_path, ["127.0.0.1"], "another")
    with serving(federation.address, (tmp_path / "ca.crt").read_bytes(), federation.keys["a"][0]) as (told, _):
        until(lambda: bool(told))
        assert "not of the federation's CA" in told[0]


def test_a_revoked_silo_is_cut_off_at_once_and_for_good(federation):
    key = certificates.node_key()
    members = federation.members | {"d": key[1]}
    flower.admit(federation.socket, members)
    with (
        serving(federation.address, federation.authority, key[0]) as (told, asked),
        flower.FlowerLine(federation.socket, members) as line,
    ):
        until(lambda: "d" in line.silos())
        hear(line, line.send("d", b"x"))
        flower.admit(federation.socket, federation.members)
        until(lambda: "d" not in line.silos())
        (found,) = hear(line, line.send("d", b"y"))
        assert found == "d is not connected"
        until(lambda: "has revoked it" in told[-1])
    assert asked == [b"x"]
    assert set(flower.nodes(federation.socket)) == set(SILOS)
    with pytest.raises(RunError, match="the silo makes a new one"):
        flower.admit(federation.socket, members)


def test_a_run_carries_no_code_and_always_the_same_bundle():
    assert flower._bundle() == flower._bundle()
    with zipfile.ZipFile(BytesIO(flower._bundle())) as bundle:
        assert bundle.namelist() == ["pyproject.toml"]


def test_nothing_is_told_to_flower(federation):
    """No telemetry (its random id would lie in `source`), no update check (`.cache`), no apps installed."""
    found = {path.name for path in (federation.folder / "flower").iterdir()}
    assert found <= {"state.db", "state.db-shm", "state.db-wal", "log", "socket"}


def test_a_superlink_that_is_killed_and_restarted_goes_on_with_the_same_line(line, federation):
    name = line.send("b", b"sleep")
    time.sleep(0.3)
    os.kill(federation.link.pid, signal.SIGKILL)
    (found,) = hear(line, name)
    assert "lost it" in found or "could not be sent" in found or "not connected" in found
    federation.link.stop()
    federation.begin()
    until(lambda: line.silos() == set(SILOS))
    answers = hear(line, *(line.send(silo, b"again") for silo in SILOS))
    assert answers == [f"{silo} {federation.silos[silo].pid} again".encode() for silo in SILOS]


def test_the_process_that_faces_the_network_is_given_no_secret(tmp_path, monkeypatch):
    for name in ("FOEDUS_KEY", "FOEDUS_DASHBOARD_TOKEN", "PGPASSWORD"):
        monkeypatch.setenv(name, "secret")
    found = flower._environment(tmp_path)
    assert "secret" not in found.values() and found["FLWR_HOME"] == str(tmp_path) and "PATH" in found


def test_without_a_superlink_there_is_no_line(tmp_path):
    with pytest.raises(Away, match="foedus coordinator up"):
        flower.FlowerLine(tmp_path / "socket", {})


@pytest.mark.parametrize("late", ["nodes", "_claim"])
def test_a_superlink_that_goes_away_while_a_line_begins_is_away(federation, monkeypatch, late):
    def gone(*_: object) -> None:
        raise httpx.ConnectError("gone")

    monkeypatch.setattr(flower._Run, late, gone)
    with pytest.raises(Away):
        flower.FlowerLine(federation.link.socket, {})


def test_a_superlink_that_cannot_start_says_why(federation, tmp_path):
    tls = federation.folder / "tls"
    with pytest.raises(RunError, match="Address already in use"):
        flower.SuperLink(tmp_path, federation.address, certificate=tls / "server.crt", key=tls / "server.key")


def test_flowers_simulation_carries_the_same_bytes_without_ray():
    line = flower.SimulatedLine({silo: answer(silo) for silo in SILOS})
    try:
        assert line.silos() == set(SILOS)
        blob = os.urandom(10_000)
        found = hear(line, *(line.send(silo, blob) for silo in SILOS), line.send("d", blob))
        assert found == [f"{silo} {os.getpid()} ".encode() + blob for silo in SILOS] + ["d is not connected"]
        (failed,) = hear(line, line.send("b", b"fail"))
        assert "its node failed" in failed and "secret" not in failed
    finally:
        line.close()


@pytest.mark.skipif("FOEDUS_LARGE" not in os.environ, reason="500 MB take a minute; set FOEDUS_LARGE=1")
def test_500_mb_stream_through(tmp_path):
    blob = os.urandom(1 << 20) * 500
    with federated(tmp_path, WHOLE) as federation, flower.FlowerLine(federation.socket, federation.members) as line:
        until(lambda: "a" in line.silos())
        (found,) = hear(line, line.send("a", blob))
    assert found.endswith(blob)


@contextmanager
def serving(address: str, authority: bytes, key: bytes) -> Iterator[tuple[list[str], list[bytes]]]:
    """A silo in a thread: what it told of its connection, and what it was asked."""
    told: list[str] = []
    asked: list[bytes] = []
    stop = threading.Event()

    def place(blob: bytes) -> bytes:
        asked.append(blob)
        return b""

    options = {"stop": stop, "told": told.append}
    silo = threading.Thread(target=flower.serve, args=(address, authority, key, place), kwargs=options)
    silo.start()
    try:
        yield told, asked
    finally:
        stop.set()
        silo.join(PATIENCE_S)
