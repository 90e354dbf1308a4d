"""No sum is opened twice for different survivors, or over different updates, whatever crashed in between."""

from __future__ import annotations

import numpy as np
import pytest

from foedus.errors import GuaranteeError, RunError
from foedus.governance import Journal, Ledger, Openings, Tray
from foedus.types import Receipt, Report


def test_a_silo_opens_a_sum_for_one_set_of_survivors_only(tmp_path):
    Journal(tmp_path).opens("a", "train 0", "w", ["a", "b", "c"])
    for journal in (Journal(tmp_path), Journal(tmp_path)):
        journal.opens("a", "train 0", "w", ["a", "b", "c"])
        with pytest.raises(GuaranteeError, match="for other survivors"):
            journal.opens("a", "train 0", "w", ["a", "b"])
        with pytest.raises(GuaranteeError, match="for another update"):
            journal.opens("a", "train 0", "other", ["a", "b", "c"])
    Journal(tmp_path).opens("a", "train 1", "w", ["a", "b"])
    Journal(tmp_path).opens("b", "train 0", "w", ["a", "b"])


def test_a_silo_gives_only_the_same_to_a_sum_that_it_opened(tmp_path):
    journal = Journal(tmp_path)
    journal.gives("a", "train 0", "w")
    journal.gives("a", "train 0", "other")  # nothing was opened yet
    journal.opens("a", "train 0", "other", ["a", "b", "c"])
    journal.gives("a", "train 0", "other")
    with pytest.raises(GuaranteeError, match="for another update"):
        journal.gives("a", "train 0", "w")


def test_a_journal_that_somebody_changed_is_noticed(tmp_path):
    Journal(tmp_path).opens("a", "train 0", "w", ["a", "b", "c"])
    file = tmp_path / "a.jsonl"
    file.write_text(file.read_text().replace('"b",', ""))
    with pytest.raises(RunError, match="changed the ledger"):
        Journal(tmp_path).gives("a", "train 0", "w")


def test_silos_with_odd_names_keep_journals_of_their_own(tmp_path):
    for name in ("a/b", "a.b", "../a"):
        Journal(tmp_path).opens(name, "train 0", name, ["x", "y", "z"])
        Journal(tmp_path).gives(name, "train 0", name)
    assert len(list(tmp_path.glob("*.jsonl"))) == 3


def test_the_coordinator_remembers_whom_it_decided_for(tmp_path):
    openings = Openings(Ledger(tmp_path / "ledger.jsonl"))
    assert openings.survivors("train 0") is None
    openings.decide("train 0", ["a", "b"])
    openings.decide("train 0", ["a", "b"])
    again = Openings(Ledger(tmp_path / "ledger.jsonl"))
    assert again.survivors("train 0") == ("a", "b") and again.survivors("train 1") is None
    assert len(again.ledger.records) == 1


def test_a_tray_tells_silos_and_splits_apart(tmp_path):
    tray = Tray(tmp_path)
    for silo in ("a", "a.b", "a b", "a test"):
        for split in ("", "test"):
            tray.keep("d", Report(silo, 0, f"{silo}|{split}".encode(), Receipt(silo, 0)), {}, split)
    for silo in ("a", "a.b", "a b", "a test"):
        for split in ("", "test"):
            report, _ = tray.kept(silo, "d", split)
            assert report.payload.decode() == f"{silo}|{split}" and report.silo == silo
    assert tray.kept("a", "another") is None


@pytest.mark.parametrize("every", [False, True])
def test_a_silo_that_was_restarted_remembers_what_it_knew_after_its_last_round(tmp_path, every):
    tray = Tray(tmp_path, every)
    assert tray.memory("a") == {}
    for round in (0, 9, 10):
        tray.keep(f"task {round}", Report("a", round, b"x", Receipt("a", round)), {("m", ""): np.array([round])})
    tray.keep("look", Report("a", 10, b"x", Receipt("a", 10)), {}, "test")
    assert tray.memory("a")["m", ""] == [10]


def test_evaluation_sums_are_kept_until_training_has_left_their_state_behind(tmp_path):
    for every in (False, True):
        tray = Tray(tmp_path / str(every), every)
        for silo in ("a", "b"):
            tray.keep("base", Report(silo, 0, b"x", Receipt(silo, 0)), {}, "test")
            tray.keep("now", Report(silo, 1, b"x", Receipt(silo, 1)), {}, "validation")
        tray.keep("task", Report("a", 0, b"x", Receipt("a", 0)), {})
        assert tray.kept("a", "base", "test")  # a state may be measured again while its round goes on
        tray.keep("task", Report("a", 1, b"x", Receipt("a", 1)), {})
        assert bool(tray.kept("a", "base", "test")) == every and tray.kept("b", "base", "test")
        assert tray.kept("a", "now", "validation") and tray.kept("a", "task")


def test_a_tray_keeps_the_last_round_or_all(tmp_path):
    for every, expected in ((False, 1), (True, 3)):
        tray = Tray(tmp_path / str(every), every)
        for round in range(3):
            tray.keep(f"task {round}", Report("a", round, b"x", Receipt("a", round)), {})
        assert len(list(tray.folder.iterdir())) == expected
        assert (tray.kept("a", "task 0") is not None) == every
        assert tray.kept("a", "task 2") is not None
