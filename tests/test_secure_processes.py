"""Silos as real processes: the sums are those of one process, whoever is killed, whenever; the coordinator too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from demos import secure as demo

from foedus import launch, loop, wire
from foedus.build import build
from foedus.engines import Ask
from foedus.engines.processes import Processes, home
from foedus.errors import RunError, SiloError
from foedus.execute import SILOS, begin, execute, open_session, treaty_of
from foedus.governance import Budget, RunFolder, verify
from foedus.governance.circle import deal
from foedus.treaty import Treaty, load
from foedus.types import Report
from foedus.worker import command

from .conftest import write_treaty
from .engines.test_processes import PLAYER, gone, said, soon
from .test_secure_run import SECURE, in_plain_sight, same

ONE_BY_ONE = {"performance.threads": 1, "performance.cohort_batch": 1, "evaluation.every": 100}
FOUR = {**SECURE, **ONE_BY_ONE, "silos.by": "iid", "silos.count": 4, "secure.dropout": 0.25, "secure.corrupt": 0.0,
        "algorithm.rounds": 4}  # fmt: skip
SHARES = {
    "privacy.unit": "example", "privacy.noise_multiplier": 1.0, "privacy.rate": 0.3, "local.batch": 8, "local.steps": 1,
    "local.optimizer": "sgd", "local.lr": 1.0, "server.optimizer": "adam", "server.lr": 0.01,
    "privacy.placement": "shared", "privacy.noise": "discrete-gaussian", "disclosure.loss": False,
}  # fmt: skip


def agreed(folder: Path, **changes) -> Treaty:
    """A treaty that lies in a file, as workers read it."""
    treaty = load(write_treaty(folder)).replace(**{**ONE_BY_ONE, "evaluation.baselines": ["base"], **changes})
    (folder / "treaty.toml").write_text(treaty.resolved())
    return treaty


class Killing:
    """Processes of which some get `kill -9` in the middle of an ask: at (round, kind), the one named."""

    def __init__(self, engine: Processes, script: dict[tuple[int, str], str]) -> None:
        self.engine, self.script, self.round = engine, script, 0

    @property
    def memory(self):
        return self.engine.memory

    def ask(self, asks: Sequence[Ask]) -> Iterator[Report]:
        kind = asks[0].kind if asks else ""
        if asks and asks[0].payload:
            self.round = wire.unpack_task(asks[0].payload).round
        silo = self.script.pop((self.round, kind), None)
        if silo is not None:
            pid = self.engine.pids[silo]
            os.kill(pid, signal.SIGSTOP)  # it takes what it is sent, and gets no further
            threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
        yield from self.engine.ask(asks)
        self.round += kind == "unmask"


def test_kill_9_of_a_silo_in_any_phase_leaves_the_plain_sum_of_the_survivors(tmp_path):
    treaty = agreed(tmp_path, **{**FOUR, "algorithm.rounds": 3})
    place, folder = build(treaty), begin(treaty, tmp_path / "run")
    a, b, c, d = place.silos
    own = folder.path / SILOS
    deal(place.sums.circle, {name: home(own, name) for name in place.silos})
    with Processes(command(folder.path), list(place.silos), own, deadline_s=60) as engine:
        assert not any(report.receipt.failure for report in engine.start())
        killing = Killing(engine, {(0, "deposit"): a, (1, "train"): b, (2, "unmask"): c})
        session = open_session(folder, place, killing)
        *_, (state, _) = loop.run(session.rules, session.engine, loop.start(session.rules, place.bench.start()))
    assert not killing.script
    survivors = demo.opened_sums(verify(folder.path / "ledger.jsonl"))
    assert survivors == {"train 0": [b, c, d], "train 1": [a, c, d], "train 2": [a, b, c, d]}
    plain = in_plain_sight(build(treaty), lambda round: survivors[f"train {round}"])
    assert same(state, plain)
    missed = {a: "train 0", b: "train 1", c: "train 2", d: ""}
    for name in place.silos:
        assert demo.opened(folder.path, name) == [purpose for purpose in survivors if purpose != missed[name]]


def started(*words: str, cwd: Path) -> subprocess.Popen[str]:
    """The command line in a process that hears Ctrl-C, even where these tests run in the background and do not."""
    return subprocess.Popen(
        [sys.executable, "-m", "foedus", *words], cwd=cwd, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env={**os.environ, "NO_COLOR": "1"}, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def pids(run: Path) -> list[int]:
    return [int(text) for file in run.glob(f"{SILOS}/*/pid") if (text := file.read_text())]


def cut_off(process: subprocess.Popen[str], run: Path, when: Callable[[], bool], how: int) -> str:
    """Sends the coordinator a signal as soon as something is true; its silos are gone within seconds. What it said."""
    assert soon(lambda: when() or process.poll() is not None, 90) and process.poll() is None
    silos = pids(run)
    process.send_signal(how)
    _, words = process.communicate()
    assert silos and soon(lambda: all(map(gone, silos)), 5)
    return words


def test_kill_9_of_the_coordinator_opens_nothing_twice_and_states_no_less_than_what_was_given(tmp_path, monkeypatch):
    treaty = agreed(tmp_path, **{**FOUR, **SHARES, "silos.count": 3, "secure.dropout": 0.0, "algorithm.rounds": 12})
    run = tmp_path / "run"
    monkeypatch.setenv("FOEDUS_KEEP_TRAYS", "1")
    first = started("run", "treaty.toml", "--out", "run", "--engine", "processes", cwd=tmp_path)
    ledger = run / "ledger.jsonl"
    cut_off(first, run, lambda: ledger.exists() and b'"train 4"' in ledger.read_bytes(), signal.SIGKILL)
    given = {path: path.read_bytes() for path in run.glob("silos/*/out-tray/*.train.*")}
    charged = {r["body"]["round"] for r in verify(ledger) if r["kind"] == "charge"}
    assert {int(path.suffixes[-2][1:]) + 1 for path in given} <= charged

    folder = RunFolder.open(run)
    kinds = [(event.kind, event.round) for event in launch.carry_out(folder, build(treaty_of(folder)))]
    assert kinds[:3] == [("silo", 1), ("silo", 2), ("silo", 3)] and kinds[-1][0] == "done"
    assert next(round for kind, round in kinds if kind == "begin") >= 4  # it went on
    records = verify(ledger)
    assert not any(r["body"].get("redone") for r in records)
    assert all(path.read_bytes() == blob for path, blob in given.items())  # nothing was given anew
    for silo in demo.silos(run):
        helped = demo.opened(run, silo)
        assert len(set(helped)) == len(helped) and {f"train {round}" for round in range(12)} <= set(helped)
        kinds = [(r["kind"], r["body"].get("round")) for r in Budget(home(run / SILOS, silo) / "budgets", silo)
                 .ledger.records[1:]]  # fmt: skip
        assert sorted(kinds) == sorted((kind, round) for round in range(12) for kind in ("charge", "released"))
    survivors = demo.opened_sums(records)
    assert demo._prepaid(records).held and demo._plain_addition(run, records, survivors).held
    assert not list(run.glob("silos/*/identity"))
    assert treaty.digest() == records[0]["body"]["treaty"]

    survivors["train 5"] = survivors["train 5"][1:]
    with pytest.raises(SystemExit, match="got none"):  # one sum without one silo, and all later tasks are others
        demo._plain_addition(run, records, survivors)


def test_ctrl_c_ends_all_silos_and_says_how_to_go_on(tmp_path):
    agreed(tmp_path)
    run = tmp_path / "run"
    process = started("run", "treaty.toml", "--out", "run", "--engine", "processes", cwd=tmp_path)
    words = cut_off(process, run, lambda: len(pids(run)) >= 2, signal.SIGINT)
    assert process.returncode == 130 and "foedus resume run" in words
    assert not pids(run) and not list(run.glob("silos/*/identity"))


def test_a_silo_that_cannot_load_is_heard_of_at_once(tmp_path, monkeypatch):
    treaty = agreed(tmp_path)
    moves = {"law": ["hang"], "medicine": [said("medicine", failure="expected room; got none. Buy some.")]}

    def player(source: Path, threads: int):
        return lambda silo, socket: [sys.executable, "-I", "-S", "-c", PLAYER, str(socket), *moves.get(silo, ["hang"])]

    monkeypatch.setattr(launch, "command", player)
    with pytest.raises(SiloError, match="'medicine' to load.*expected room; got none"):
        list(launch.carry_out(begin(treaty, tmp_path / "run"), build(treaty), "processes"))
    assert not pids(tmp_path / "run")


def test_a_run_keeps_the_engine_that_it_began_with(tmp_path):
    treaty = agreed(tmp_path)
    here, apart = begin(treaty, tmp_path / "here"), begin(treaty, tmp_path / "apart")
    place = build(treaty)
    next(launch.carry_out(here, place, "in-process"))
    (apart.path / SILOS).mkdir()
    apart.write_json(launch.CHOSEN, {"engine": "processes"})
    for folder, other in ((here, "processes"), (apart, "in-process")):
        with pytest.raises(RunError, match="the engine that the run began with"):
            next(launch.carry_out(folder, place, other))
    with pytest.raises(RunError, match="began with a process for each"):
        next(execute(apart, place))
    older = begin(treaty, tmp_path / "older")  # of a version that knew one engine
    older.write("ledger.jsonl", b"")
    with pytest.raises(RunError, match="in-process"):
        next(launch.carry_out(older, place, "processes"))
    with pytest.raises(RunError, match='Did you mean "processes"'):
        next(launch.carry_out(here, place, "process"))


def test_identities_leave_the_coordinator_when_they_are_dealt(tmp_path):
    place = build(agreed(tmp_path, **FOUR))
    homes = {name: tmp_path / name for name in place.silos}
    deal(place.sums.circle, homes)
    assert not place.sums.circle.silos and not place.sums.membership.identities
    assert all((folder / "identity").stat().st_mode & 0o777 == 0o600 for folder in homes.values())


def test_a_rounds_cost_is_in_the_ledger_before_any_silo_is_asked_to_train(tmp_path):
    class Watching:
        memory: dict = {}

        def ask(self, asks: Sequence[Ask]) -> Iterator[Report]:
            if any(ask.kind == "train" for ask in asks):
                costs = [r["body"]["round"] for r in verify(tmp_path / "run/ledger.jsonl") if r["kind"] == "charge"]
                seen.append(costs)
            yield from inner.ask(asks)

    seen: list[list[int]] = []
    treaty = agreed(tmp_path, **{**FOUR, **SHARES, "silos.count": 5})
    place = build(treaty)
    inner = place.engine()
    session = open_session(begin(treaty, tmp_path / "run"), place, Watching())
    for _ in loop.run(session.rules, session.engine, loop.start(session.rules, place.bench.start())):
        pass
    assert seen == [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4]]
