"""A silo's resident process: one to a home, loaded once for each treaty, and silent about why it cannot."""

from __future__ import annotations

import json

import pytest

from foedus.deploy import host as hosts
from foedus.deploy.host import MOST_LOADED, Host
from foedus.deploy.resident import resident
from foedus.errors import FoedusError, RunError, SiloError
from foedus.governance import Budget

from .federation import Federation
from .test_parties import SILO, treaty


@pytest.fixture
def parties(tmp_path):
    return Federation(tmp_path)


def test_a_home_has_one_resident_process_whose_status_goes_with_it(tmp_path, parties):
    home = parties.home
    with resident(home.path, home.status, {"role": "coordinator"}) as status:
        status(run=None, silos={})
        assert json.loads(home.status.read_text())["silos"] == {} and home.read_status()["role"] == "coordinator"
        with pytest.raises(RunError, match="up already"), resident(home.path, home.status, {}):
            pass
    assert not home.status.exists()


def test_a_model_and_data_are_loaded_once_and_what_goes_wrong_stays_with_the_silo(parties, monkeypatch):
    parties.propose(treaty(parties.folder))
    said, (signed,) = {}, parties.silos["north"].signed()
    parties.files["north"].write_text('{"text": "a patient with a fever", "domain": "law"}\n')
    host = Host(parties.silos["north"], parties.files["north"], said.update)
    assert [one["state"] for one in said["treaties"].values()] == ["signed"]
    with pytest.raises(SiloError) as refused:
        host.work(signed)
    assert "examples" not in str(refused.value) and "fever" not in str(refused.value)
    (one,) = said["treaties"].values()
    assert one["state"] == "failed" and isinstance(refused.value.__cause__, FoedusError)
    loaded = []
    monkeypatch.setattr(hosts.Host, "_loaded", lambda _, signed: loaded.append(signed.name) or object())
    assert host.work(signed) is host.work(signed) and loaded == ["three-parties"]
    (one,) = said["treaties"].values()
    assert one["state"] == "ready"


def test_noise_that_the_server_adds_is_promised_in_the_budget_of_a_silo_elsewhere(parties):
    for silo in parties.silos.values():
        noisy = silo.charter.read_text().replace("epsilon = 8.0", 'epsilon = 1e6\nplacements = ["server"]')
        silo.charter.write_text(noisy.replace("life = 10.0", "life = 1e6\nsimulated_noise = true"))
    parties.propose(treaty(parties.folder, SILO))
    home = parties.silos["north"]
    (signed,) = home.signed()
    Host(home, parties.files["north"]).work(signed)
    kept = Budget(home.budgets, "north")
    assert kept.knows(signed.digest) and kept.promised() != Budget(parties.folder, "nobody").promised()


def test_models_of_the_latest_treaties_are_held_and_no_others(parties, monkeypatch):
    for i in range(MOST_LOADED + 1):
        parties.propose(treaty(parties.folder, {"treaty.name": f"t{i}"}))
    loaded, host = [], Host(parties.silos["north"])
    monkeypatch.setattr(hosts.Host, "_loaded", lambda _, signed: loaded.append(signed.name) or object())
    first, *others = parties.silos["north"].signed()
    for signed in (first, *others, others[-1], first):
        host.work(signed)
    assert loaded == ["t0", "t1", "t2", "t0"]
