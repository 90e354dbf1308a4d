"""What the pages know of a home: from files alone, however unfinished these are."""

from __future__ import annotations

import json
import time

import pytest

from foedus.dashboard import CoordinatorView, SiloView
from foedus.dashboard.alarms import ALARMS, of_federation, of_silo
from foedus.dashboard.view import _minute

from .homes import evaluation, federation, silo, write_run


def names(alarms) -> list[str]:
    return [alarm.name for alarm in alarms if alarm.name != "disk-low"]


def test_a_run_is_read_as_far_as_it_got(tmp_path):
    run = CoordinatorView(federation(tmp_path / "home", done=4)).look().run()
    assert (run.done, run.planned, run.up, run.down) == (4, 6, 12_000, 24_000)
    assert [member.name for member in run.silos] == ["north", "south", "west"]
    assert not run.ended


def test_what_is_spent_and_what_the_rest_will_cost_add_up_to_the_plan(tmp_path):
    found = [CoordinatorView(federation(tmp_path / str(done), done)).look().run().privacy for done in (2, 4, 6)]
    assert found[0].spent < found[1].spent < found[2].spent == pytest.approx(found[2].projected)
    assert {round(p.projected, 9) for p in found} == {round(found[2].spent, 9)}


def test_rounds_that_were_redone_otherwise_cost_again_and_raise_an_alarm_before_the_limit_is_passed(tmp_path):
    home = federation(tmp_path / "home", done=4, redone=(1, 2, 3, 4))
    treaty = home / "runs" / "notes" / "treaty.toml"
    whole = CoordinatorView(federation(tmp_path / "plain", done=6)).look().run().privacy.spent
    treaty.write_text(treaty.read_text().replace("epsilon = 8.0", f"epsilon = {whole * 1.001:.6f}"))
    found = CoordinatorView(home).look()
    assert found.run().privacy.projected > found.run().privacy.limit
    assert {"epsilon-over", "epsilon-projected"} & set(names(found.alarms))


def test_files_that_are_absent_or_half_written_leave_gaps_and_raise_nothing(tmp_path):
    home = federation(tmp_path / "home")
    assert CoordinatorView(tmp_path / "nowhere").look().runs == ()
    for path in [path for path in home.rglob("*") if path.is_file()]:
        kept = path.read_bytes()
        for part in (b"", kept[: len(kept) // 2], b"\xff\x00 no text", b"[]", b'{"a": [1'):
            path.write_bytes(part)
            CoordinatorView(home).look()
        path.unlink()
        CoordinatorView(home).look()
        path.write_bytes(kept)


def test_a_silos_files_may_be_half_written_too(tmp_path):
    home = silo(tmp_path / "home")
    for path in [path for path in home.rglob("*") if path.is_file()]:
        kept = path.read_bytes()
        for part in (b"", kept[: len(kept) // 2], b"\xff\x00", b'{"silos": 3, "treaty": {"treaty": []}}', b"[1]\n{}\n"):
            path.write_bytes(part)
            SiloView(home).look()
        path.write_bytes(kept)


def test_a_changed_record_is_named_by_its_line(tmp_path):
    home = federation(tmp_path / "home")
    ledger = home / "runs" / "notes" / "ledger.jsonl"
    lines = ledger.read_text().splitlines()
    ledger.write_text("\n".join([*lines[:2], lines[2].replace("cd", "ce", 1), *lines[3:]]) + "\n")
    found = CoordinatorView(home).look()
    assert found.run().ledger.broken_at == 2
    assert "Line 3" in next(alarm.said for alarm in found.alarms if alarm.name == "ledger-broken")


def test_the_stamp_changes_with_the_files_and_with_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr("foedus.dashboard.view._tick", lambda: "0")
    view = CoordinatorView(federation(tmp_path / "home"))
    before = view.stamp()
    assert view.stamp() == before
    with (view.home / "runs" / "notes" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(evaluation("federated", 4, 50.0)) + "\n")
    assert view.stamp() != before


def test_no_figure_of_a_single_silo_is_in_a_run_but_bytes_times_and_failures(tmp_path):
    run = CoordinatorView(federation(tmp_path / "home", loss=[3.0] * 4, perplexity=[90.0] * 4)).look().run()
    assert "777.125" not in repr(run)


FIRING = {
    "silo-missing": {"failures": {4: {"west": "no answer in 60 s"}}},
    "silo-refuses": {"failures": {4: {"west": "refused (charter): [adapters] max_rank"}}},
    "cohort-small": {"failures": {4: {"west": "no answer in 60 s"}}},
    "straggler": {"slow": "west"},
    "loss-rises": {"perplexity": [90.0, 80.0, 85.0, 99.0]},
}


@pytest.mark.parametrize("name", FIRING)
def test_an_alarm_fires_where_there_is_cause(tmp_path, name):
    assert name in names(CoordinatorView(federation(tmp_path / "home", **FIRING[name])).look().alarms)


def test_a_run_without_cause_raises_no_alarm(tmp_path):
    home = federation(tmp_path / "home", perplexity=[90.0, 80.0, 75.0, 70.0])
    assert names(CoordinatorView(home).look().alarms) == []
    assert names(SiloView(silo(tmp_path / "silo")).look().alarms) == []


def test_a_run_that_waits_says_for_whom(tmp_path):
    home = federation(tmp_path / "home")
    status = json.loads((home / "status.json").read_text())
    status["run"] = {"name": "notes", "state": "waiting", "round": 2, "rounds": 4, "why": "expected 3 silos; got 2"}
    (home / "status.json").write_text(json.dumps(status))
    (alarm,) = [x for x in CoordinatorView(home).look().alarms if x.name == "waiting"]
    assert (alarm.about, alarm.said) == ("notes", "expected 3 silos; got 2")


def test_a_run_that_does_not_advance_is_told_from_one_that_ended(tmp_path):
    later = time.time() + 3600
    for ended, firing in ((False, ["stalled"]), (True, [])):
        found = CoordinatorView(federation(tmp_path / str(ended), ended=ended)).look()
        assert names(of_federation(found, later)) == firing


def test_a_silos_alarms_are_about_its_pause_its_budget_its_charter_and_its_line(tmp_path):
    from datetime import date

    home = silo(tmp_path / "home", state={"paused": True}, expires=date(2020, 1, 1))
    (home / "status.json").write_text('{"connected": false, "keys": "plain"}')
    (home / "charter.toml").write_text((home / "charter.toml").read_text().replace("16.0", "1.0"))
    found = SiloView(home).look()
    assert {"paused", "disconnected", "keys-plain", "charter-expires", "budget-over"} == set(names(of_silo(found)))


def test_a_silo_sees_its_treaties_its_rounds_its_budget_and_its_refusals(tmp_path):
    found = SiloView(silo(tmp_path / "home")).look()
    (treaty,) = found.treaties
    assert (treaty.name, treaty.signed, treaty.given, treaty.rounds) == ("notes", True, 4, 6)
    assert 0 < found.spent < found.promised < found.cap == 10.0
    assert [(r.reason, r.count) for r in found.refusals] == [("replayed", 4), ("charter", 1)]
    assert "max_rank" in found.refusals[1].clauses[0]
    assert ("Base models", "tiny:llama, whatever its content") in found.clauses


def test_every_alarm_says_what_to_do():
    for name, kind in ALARMS.items():
        assert kind.severity in ("critical", "warning", "notice") and kind.do.endswith("."), name


def test_a_folder_of_runs_and_a_single_run_are_homes_too(tmp_path):
    write_run(tmp_path / "runs" / "one", 2)
    assert [run.name for run in CoordinatorView(tmp_path / "runs").look().runs] == ["one"]
    assert CoordinatorView(tmp_path / "runs" / "one").look().run().done == 2


def test_a_moment_reads_as_people_read_it():
    assert _minute("2026-11-22T00:09:30.935314+01:00") == "2026-11-21 23:09 UTC"
    assert (_minute(None), _minute("lately")) == ("", "lately")
