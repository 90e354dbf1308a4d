"""A silo's commands: a home, a federation, decisions that hold at once, and what it gave and spent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foedus.cli_silo import app
from foedus.deploy.home import SiloHome
from foedus.errors import DataError, RunError
from foedus.governance import Budget, consent
from foedus.privacy import events

from .deploy.federation import Federation
from .deploy.test_parties import treaty


def said(home: Path, *words: object) -> str:
    """What a command prints; what it raises is raised."""
    command = [*map(str, words), "--home", str(home)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def home(tmp_path):
    said(tmp_path / "hospital-a", "init", "--name", "hospital-a")
    return tmp_path / "hospital-a"


def test_a_silo_begins_with_a_card_to_hand_out_and_a_charter_that_permits_no_model(home):
    assert json.loads((home / "card.json").read_text())["name"] == "hospital-a"
    with pytest.raises(RunError, match="already there"):
        said(home, "init", "--name", "hospital-b")
    found = json.loads(said(home, "status", "--json"))
    assert (found["up"], found["federation"], found["treaties"]) == (False, None, [])


def test_a_silo_that_joined_nobody_or_has_no_data_is_not_served(home, tmp_path):
    with pytest.raises(RunError, match="join invitation.json"):
        said(home, "up")
    with pytest.raises(DataError, match="nothing at"):
        said(home, "up", "--data", tmp_path / "none.parquet")


def test_what_its_operator_decides_holds_at_once(home):
    state = SiloHome.at(home).state
    said(home, "pause")
    assert consent.read(state).paused and "paused" in said(home, "status")
    said(home, "resume")
    assert consent.read(state) == consent.Consent()
    said(home, "leave")
    assert consent.read(state).left


def test_consent_to_one_treaty_is_withdrawn_by_its_name(tmp_path):
    by, parties = treaty(tmp_path), Federation(tmp_path)
    parties.propose(by)
    home = parties.silos["north"].path
    assert "all signed" not in said(home, "status") and "signed here" in said(home, "status")
    with pytest.raises(RunError, match='Did you mean "three-parties"'):
        said(home, "leave", "three-party")
    said(home, "leave", "three-parties")
    assert consent.read(parties.silos["north"].state).withdrawn == (by.digest(),)
    assert "consent withdrawn" in said(home, "status")
    kinds = [record["kind"] for record in json.loads(said(home, "ledger", "--json"))]
    assert kinds == ["keeper", "joined", "signed"]
    assert "every hash and signature fits" in said(home, "ledger")


def test_a_budget_says_what_was_spent_and_what_is_allowed(home):
    charter = home / "charter.toml"
    kept = Budget(SiloHome.at(home).budgets, "hospital-a")
    event = events.gaussian(1.0)
    kept.reserve("ab" * 32, "example", event)
    kept.charge("ab" * 32, "example", 0, event)
    found = json.loads(said(home, "budget", "--json"))
    assert found["spent"]["example"] == found["promised"] > 0 and found["allowed"] > 0
    assert "for life" in said(home, "budget") and charter.exists()
