"""A treaty between organisations, from homes on disk to an adapter in the registry; and as real processes over TLS."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from foedus.build import build
from foedus.deploy.coordinator import running, status
from foedus.deploy.run import Present, begin_run, carry_out, is_deployed, over_flower
from foedus.engines import Ask, flower
from foedus.engines.line import Faults
from foedus.errors import RunError
from foedus.governance import RunFolder, consent, verify
from foedus.governance.registry import Registry
from foedus.governance.vault import fresh_key_file, is_sealed
from foedus.governance.witness import compare
from foedus.progress import shown
from foedus.treaty import Treaty
from foedus.types import Receipt, Report

from .federation import Federation, all_connected, free_port, process, soon
from .test_parties import MASKED, SILOS, files, last, same, treaty


def as_in_one_process(by: Treaty, folder: RunFolder, data: Path) -> bool:
    """Whether a run came to the parameters of the same treaty with all data in this process."""
    place, (state, _) = build(by, files(data)), folder.restore("federated")
    return same(state, last(place, place.engine()))


@pytest.mark.parametrize("sums", [{}, MASKED], ids=["open", "masked"])
def test_a_signed_treaty_over_a_bad_line_gives_the_adapter_of_one_process_and_registers_it(tmp_path, sums):
    by = treaty(tmp_path, sums, {"algorithm.rounds": 3, "cohort.minimum": 3})
    crashes = {"north": frozenset({3}), "south": frozenset({6})}
    faults, said = (
        Faults(refuse=0.1, duplicate=0.3, delay_s=0.01, crash=crashes),
        {"deadline_s": 6.0, "patience_s": 600.0},
    )
    parties = Federation(tmp_path, faults, said)
    parties.propose(by, signers=("north", "east"))
    folder = begin_run(parties.home, by)
    assert is_deployed(folder)
    seen = []
    for event in carry_out(parties.home, folder, lines=parties.lines):
        seen.append(event.kind)
        if event.phase == "no signature of south under three-parties yet":
            parties.sign_late("south")
    assert seen[:4] == ["silo", "silo", "waiting", "silo"] and seen.count("round") == 3
    assert as_in_one_process(by, folder, tmp_path)
    registry = Registry(parties.home.registry, parties.home.store)
    (version,) = registry.versions()
    registry.close()
    assert (version.model, str(version.stage), version.treaty) == (by.name, "candidate", by.digest())
    assert running(parties.home)["state"] == "done"
    own = verify(folder.path / "ledger.jsonl")
    for silo in parties.silos.values():
        found = compare(own, verify(silo.ledger))
        assert found.same and len(found.agreed) == 3


@pytest.mark.parametrize("sums", [{}, MASKED], ids=["open", "masked"])
def test_flowers_simulation_gives_the_adapter_of_one_process(tmp_path, sums):
    by = treaty(tmp_path, sums, {"algorithm.rounds": 2, "cohort.minimum": 3})
    parties = Federation(tmp_path)
    parties.propose(by)
    folder = begin_run(parties.home, by)

    def simulated(home, nodes) -> flower.SimulatedLine:
        return flower.SimulatedLine({name: parties.guard(name) for name in nodes})

    assert [event.kind for event in carry_out(parties.home, folder, lines=simulated)][-1] == "done"
    assert as_in_one_process(by, folder, tmp_path)


def test_where_homes_have_vaults_checkpoints_and_out_trays_are_sealed(tmp_path):
    key = f"file:{fresh_key_file(tmp_path / 'vault.key')}"
    by = treaty(tmp_path, {"algorithm.rounds": 1, "evaluation.baselines": []})
    parties = Federation(tmp_path, settings={"key": key})
    north = parties.silos["north"]
    north.file.write_text(north.file.read_text().replace('key = ""', f'key = "{key}"'))
    parties.propose(by)
    with pytest.raises(RunError, match="inside the home"):
        begin_run(parties.home, by, tmp_path / "elsewhere")
    folder = begin_run(parties.home, by)
    for event in carry_out(parties.home, RunFolder.open(folder.path), lines=parties.lines):
        if event.kind == "round":
            found = [*folder.path.glob("checkpoints/*.safetensors"), *north.path.glob("work/*/out-tray/*")]
            assert len(found) > 1 and all(map(is_sealed, found))
    assert list(carry_out(parties.home, RunFolder.open(folder.path), lines=parties.lines))[-1].kind == "done"


def test_a_silo_that_is_paused_or_withdrew_is_left_out_from_the_next_round_on(tmp_path):
    by = treaty(tmp_path, {"algorithm.rounds": 4, "evaluation.every": 9, "evaluation.baselines": []})
    parties = Federation(tmp_path)
    parties.propose(by)
    folder, took = begin_run(parties.home, by), []
    for event in carry_out(parties.home, folder, lines=parties.lines):
        if event.kind != "round":
            continue
        took.append(sorted(event.row["silos"]))
        match event.round:
            case 1:
                consent.write(parties.silos["north"].state, consent.Consent(paused=True))
            case 2:
                consent.write(parties.silos["north"].state, consent.Consent())
                consent.write(parties.silos["south"].state, consent.Consent().without(by.digest()))
    assert took == [sorted(SILOS), ["east", "south"], ["east", "north"], ["east", "north"]]


def test_a_round_with_too_few_silos_waits_for_them_and_then_stops_a_run_that_can_be_resumed(tmp_path):
    by = treaty(tmp_path, {"cohort.minimum": 3, "evaluation.baselines": []})
    parties = Federation(tmp_path, settings={"patience_s": 3.0})
    parties.propose(by)
    folder = begin_run(parties.home, by)
    with pytest.raises(RunError, match="enough silos within 3 s"):
        for event in carry_out(parties.home, folder, lines=parties.lines):
            if event.kind == "begin":
                consent.write(parties.silos["north"].state, consent.Consent(paused=True))
    assert running(parties.home)["state"] == "stopped"
    waited = 0
    for event in carry_out(parties.home, folder, lines=parties.lines):
        if event.kind == "waiting":
            waited += 1
            consent.write(parties.silos["north"].state, consent.Consent())
    assert waited == 1 and as_in_one_process(by, folder, tmp_path)


def test_a_run_that_begins_before_its_superlink_waits_for_it_as_long_as_patience_lasts(tmp_path):
    by = treaty(tmp_path, {"algorithm.rounds": 1, "evaluation.baselines": []})
    parties, looks = Federation(tmp_path, settings={"patience_s": 1.5}), []
    parties.propose(by)
    folder, said = begin_run(parties.home, by), Console(file=StringIO(), width=200)
    with pytest.raises(RunError, match=r"a SuperLink within 1\.5 s"):
        list(shown(carry_out(parties.home, folder), console=said))
    assert "waiting: the SuperLink cannot be reached" in (words := said.file.getvalue())
    assert words.count("waiting") == 1 and "`foedus coordinator up` starts it" in words
    assert running(parties.home)["state"] == "stopped"

    def second_time(home, nodes):
        looks.append(running(home)["state"])
        return over_flower(home, nodes) if len(looks) == 1 else parties.lines(home, nodes)

    kinds = [event.kind for event in carry_out(parties.home, folder, lines=second_time)]
    assert looks == ["running", "waiting"] and (kinds[0], kinds[-1]) == ("waiting", "done")


@pytest.mark.parametrize("sums", [{}, MASKED], ids=["open", "masked"])
def test_a_run_whose_coordinator_was_stopped_goes_on_where_it_was(tmp_path, sums):
    by = treaty(tmp_path, sums, {"evaluation.baselines": []})
    parties = Federation(tmp_path)
    parties.propose(by)
    folder = begin_run(parties.home, by)
    with closing(carry_out(parties.home, folder, lines=parties.lines)) as events:
        assert next(event for event in events if event.kind == "round").round == 1
    assert running(parties.home)["state"] == "stopped"
    seen = [(event.kind, event.round) for event in carry_out(parties.home, folder, lines=parties.lines)]
    assert [round for kind, round in seen if kind == "round"] == [2]
    assert as_in_one_process(by, folder, tmp_path)
    before = (folder.path / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match="a run that goes on, to go back in"):
        next(carry_out(parties.home, folder, round=1, lines=parties.lines))
    assert (folder.path / "metrics.jsonl").read_bytes() == before


def test_a_treaty_that_was_not_proposed_is_not_begun_and_a_treaty_is_begun_once(tmp_path):
    by, parties = treaty(tmp_path), Federation(tmp_path)
    with pytest.raises(RunError, match="a treaty that was proposed"):
        begin_run(parties.home, by)
    parties.propose(by, signers=())
    begin_run(parties.home, by)
    with pytest.raises(RunError, match="already there"):
        begin_run(parties.home, by)


def test_the_status_of_a_federation_says_who_is_missing(tmp_path):
    by, parties = treaty(tmp_path), Federation(tmp_path)
    parties.propose(by, signers=("north",))
    said = status(parties.home)
    assert not said["up"] and set(said["silos"]) == set(SILOS)
    (one,) = said["treaties"]
    assert (one["digest"], one["binding"], one["missing"]) == (by.digest(), False, ["north", "east", "south"])
    assert (one["signatures"], one["silos"]) == (0, 3)
    assert said["certificates"]["warnings"] == [] and said["ledger"]["verified"]
    json.dumps(said)


# ---- real processes ----


@pytest.mark.timeout(300)
def test_real_processes_over_tls_give_the_adapter_of_one_though_a_silo_is_killed_on_the_way(tmp_path):
    pytest.importorskip("flwr")
    by = treaty(tmp_path, {"cohort.minimum": 3, "evaluation.baselines": []})
    parties = Federation(tmp_path, settings={"address": f"127.0.0.1:{free_port()}", "patience_s": 120.0})
    parties.propose(by, signers=("north", "east"))
    homes = {name: silo.path for name, silo in parties.silos.items()}

    def silo(name: str):
        return process(homes[name], "cli_silo", "--data", str(parties.files[name]))

    with ExitStack() as ends:
        chair = ends.enter_context(process(parties.home.path, "cli_coordinator"))
        silos = {name: ends.enter_context(silo(name)) for name in SILOS}
        assert soon(lambda: all_connected(parties), 120)
        parties.sign_late("south")
        folder = begin_run(parties.home, by)
        for event in carry_out(parties.home, folder):
            if event.kind == "round" and event.round == 1:
                silos["east"].kill()
                silos["east"].wait()
                silos["east"] = ends.enter_context(silo("east"))
        assert as_in_one_process(by, folder, tmp_path)
        own = verify(folder.path / "ledger.jsonl")
        assert all(compare(own, verify(one.ledger)).same for one in parties.silos.values())
        for one in (*silos.values(), chair):
            one.terminate()
        assert [one.wait(20) for one in (*silos.values(), chair)] == [0, 0, 0, 0]
    assert not any(home.read_status() for home in (parties.home, *parties.silos.values()))


class Calls:
    """An engine that is asked, and a line on which only some are there. `refused`: a kind of ask."""

    def __init__(self, refused: str = "") -> None:
        self.memory, self.here, self.kinds, self.refused = {}, frozenset(SILOS), [], refused

    def silos(self) -> frozenset[str]:
        return self.here

    def ask(self, asks: Sequence[Ask]) -> Iterator[Report]:
        self.kinds += [(ask.kind, ask.silo) for ask in asks]
        for ask in asks:
            failure = "closed" if ask.kind == self.refused else ""
            yield Report(ask.silo, 0, b"", Receipt(ask.silo, 0, failure=failure))


def test_a_silo_is_introduced_once_and_one_that_is_gone_fails_without_anybody_waiting(tmp_path):
    parties = Federation(tmp_path)
    parties.propose(treaty(tmp_path))
    calls, (signed,) = Calls(), parties.home.signed()
    engine, asks = Present(calls, calls, signed, grace_s=0.05), [Ask("join", silo, b"") for silo in ("north", "east")]
    assert all(not report.receipt.failure for _ in range(2) for report in engine.ask(asks))
    assert calls.kinds == [(kind, silo) for kind in ("hello", "agree", "join", "join") for silo in ("north", "east")]
    calls.here = frozenset(["north"])
    assert not [report for report in engine.ask(asks) if report.receipt.failure]  # it may be about to come back
    time.sleep(0.06)
    assert [report.silo for report in engine.ask(asks) if report.receipt.failure] == ["east"]
    calls.here = frozenset(SILOS)
    assert not [report for report in engine.ask(asks) if report.receipt.failure]


def test_a_silo_that_may_not_say_what_it_came_to_is_greeted_once_and_asked_for_no_work(tmp_path):
    parties = Federation(tmp_path)
    parties.propose(treaty(tmp_path))
    calls = Calls(refused="agree")
    engine = Present(calls, calls, *parties.home.signed())
    for _ in range(2):
        (report,) = engine.ask([Ask("join", "north", b"")])
        assert report.receipt.failure == "closed"
    assert [kind for kind, _ in calls.kinds] == ["hello", "agree", "agree"]
