"""What `make demo-deploy` relies on, without running it: its treaties, its charters, its commands, its tidiness."""

from __future__ import annotations

import subprocess
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from demos import deploy

from foedus.deploy.cost import cost_of
from foedus.secure.keys import Identity
from foedus.treaty import charter, parse, signed

from .test_deploy_files import parsed


class Rehearsal(deploy.Stage):
    """A stage on which commands are only written down."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.said: list[list[str]] = []

    def foedus(self, *words, show=True, fails=False):
        self.said.append(list(words))
        return subprocess.CompletedProcess(words, 0, "{}", "")

    def write(self, home, file, changes):
        pass

    def sent(self, treaty):
        return f"post/{treaty}.treaty.json"

    def page(self, home):
        return ""

    def until(self, process, what, holds):
        pass

    def kill(self, name):
        self._up.pop(name).wait()

    def _start(self, name, *words):
        self.said.append(list(words))
        self._up[name] = subprocess.Popen(["true"])


def charter_of_the_demo() -> charter.Charter:
    """A new charter after its operator has edited it."""
    text = charter.template("silo", date.today() + timedelta(365))
    for key, value in deploy.permitted(deploy.TREATY).items():
        text, count = deploy.edited(text, key, value)
        assert count == 1, key
    return charter.parse(text)


def refusals(changes: dict, tmp_path: Path) -> list[str]:
    """The clauses that a silo of the demo has against a variant of its treaty."""
    treaty = parse(deploy.varied(deploy.TREATY.read_text(), changes))
    keys = {name: Identity.fresh() for name in deploy.SILOS}
    chair = Identity.fresh()
    made = signed.propose(treaty, chair, {name: own.public for name, own in keys.items()})
    permits = charter_of_the_demo()
    cost = cost_of(treaty, deploy.STRICT, tmp_path / "budgets", permits.privacy.delta)
    found = charter.refusals(permits, made, joined=chair.public, cost=cost, now=datetime.now(UTC))
    return [refusal.clause for refusal in found]


def test_the_silos_of_the_demo_permit_its_treaty_and_the_hasty_one(tmp_path):
    assert refusals({}, tmp_path) == refusals(deploy.HASTY, tmp_path) == []


def test_the_greedy_treaty_is_refused_with_the_clauses_it_breaks(tmp_path):
    clauses = ["[adapters] max_rank", "[privacy] epsilon", "[privacy] epsilon_for_life"]
    assert refusals(deploy.GREEDY, tmp_path) == clauses


def test_a_variant_differs_in_what_it_says_and_in_nothing_else():
    before, after = (parse(deploy.varied(deploy.TREATY.read_text(), x)) for x in ({}, deploy.HASTY))
    assert (after.treaty.name, after.algorithm.rounds, after.evaluation.every) == ("newsgroups-hasty", 1, 1)
    assert (after.server.lr, after.local.lr) == (deploy.HASTY["lr"], before.local.lr)
    assert after.adapter == before.adapter and after.data == before.data


def test_every_command_of_the_demo_exists(tmp_path, monkeypatch):
    monkeypatch.setattr(deploy, "archives", lambda stage: None)
    with Rehearsal(deploy.fresh(tmp_path / "demo")) as stage:
        stage.browser = None
        deploy.play(stage)
    named = {" ".join(words[:2]) for words in stage.said}
    assert {"coordinator up", "silo up", "treaty sign", "silo ledger", "ledger verify", "silo budget"} <= named
    for words in stage.said:
        parsed(words)


def test_all_that_a_stage_started_has_ended_when_it_is_left(tmp_path):
    with pytest.raises(KeyboardInterrupt), deploy.Stage(deploy.fresh(tmp_path / "demo")) as stage:
        for name in ("coordinator", "silo"):
            stage._up[name] = subprocess.Popen(["sleep", "60"])
        raise KeyboardInterrupt
    assert all(process.poll() is not None for process in stage._up.values())


def test_only_the_folder_of_an_earlier_demo_is_emptied(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="another folder"):
        deploy.fresh(tmp_path)
    assert (tmp_path / "thesis.txt").exists()
    root = deploy.fresh(tmp_path / "demo")
    (root / deploy.FEDERATION).mkdir()
    (root / deploy.FEDERATION / "federation.toml").touch()
    assert not (deploy.fresh(root) / deploy.FEDERATION).exists()
