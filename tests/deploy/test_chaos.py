"""Real processes under kills and cuts, in short; `python -m benchmarks.chaos` does it at length."""

from __future__ import annotations

from collections import Counter

import pytest
from benchmarks.chaos import KINDS, chaos, troubles

from foedus.deploy.run import begin_run, is_deployed
from foedus.governance import RunFolder

from .federation import Federation
from .test_parties import treaty


@pytest.mark.timeout(600)
def test_kills_and_cuts_change_nothing_but_the_time_and_who_is_not_admitted_sees_nothing(tmp_path):
    pytest.importorskip("flwr")
    said: list[str] = []
    found = chaos(tmp_path, rounds=4, kills=4, seed=1, told=said.append)
    assert all(check.held for check in found), "\n".join(map(str, [*said, *found]))


def test_the_plan_of_troubles_is_that_of_its_seed_has_every_kind_and_ends_before_the_last_round():
    plan = troubles(rounds=20, kills=20, seed=1)
    assert plan == troubles(20, 20, 1) != troubles(20, 20, 2)
    assert {Counter(t.kind for t in plan)[kind] for kind in KINDS} == {3, 4}
    assert [t.after for t in plan] == sorted(t.after for t in plan) and plan[-1].after < 19
    assert {t.kind for t in troubles(4, 4, 1)} == {"silo", "run", "coordinator", "cut"}


def test_a_run_whose_process_died_as_it_began_is_begun_again(tmp_path, monkeypatch):
    by, parties = treaty(tmp_path), Federation(tmp_path)
    parties.propose(by)
    with monkeypatch.context() as patch:
        patch.setattr("foedus.deploy.run.begin", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            begin_run(parties.home, by)
    assert is_deployed(begin_run(parties.home, by))
    assert is_deployed(RunFolder.open(parties.home.runs / by.name))
