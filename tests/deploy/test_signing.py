"""`foedus treaty`: proposed by the coordinator, read, signed or refused by silos, collected until it binds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foedus.cli_treaty import app
from foedus.deploy.home import FederationHome, Settings, SiloHome, SiloSettings, read_card
from foedus.errors import FoedusError, GuaranteeError
from foedus.governance import Ledger, identity
from foedus.treaty import signed

from .parties import CHARTER, SILOS, TREATY


@pytest.fixture
def homes(tmp_path, monkeypatch):
    """A federation that has admitted three silos, which took its invitation."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    federation = FederationHome.create(tmp_path / "federation", Settings("health", "127.0.0.1:9443"))
    (tmp_path / "treaty.toml").write_text(TREATY)
    for name in SILOS:
        home = SiloHome.create(tmp_path / name, SiloSettings(name))
        home.charter.write_text(CHARTER)
        home.join(federation.invitation())
        federation.admit(read_card(home.card))
    return tmp_path


def said(*words: str | Path, fails: bool = False):
    """What a command prints as JSON, or the error that it raises."""
    result = CliRunner().invoke(app, [*map(str, words), "--json"])
    if fails:
        assert isinstance(result.exception, FoedusError | SystemExit)
        return result.exception
    assert result.exit_code == 0, result.exception
    return json.loads(result.stdout)


def copied(homes: Path, name: str) -> Path:
    """The coordinator's file, sent to a silo."""
    (file,) = (homes / "federation/treaties").glob("*/*.treaty.json")
    copy = homes / name / file.name
    copy.write_bytes(file.read_bytes())
    return copy


def test_a_treaty_is_proposed_signed_by_each_silo_and_binds_once_collected(homes):
    made = said("propose", homes / "treaty.toml", "--home", homes / "federation")
    assert made["missing"] == list(SILOS) and Path(made["file"]).parent.name == made["digest"][:12]
    copies = [copied(homes, name) for name in SILOS]
    for name, copy in zip(SILOS, copies, strict=True):
        assert said("sign", copy, "--home", homes / name)["signed"] == [name]
    assert CliRunner().invoke(app, ["verify", made["file"]]).exit_code == 1
    (found,) = said("collect", *copies, "--home", homes / "federation")
    assert found["binding"] and said("verify", made["file"])["binding"]
    back = homes / "north" / "back.treaty.json"
    back.write_bytes(Path(made["file"]).read_bytes())
    assert said("collect", back, "--home", homes / "north")[0]["binding"]
    assert signed.found(homes / "north/treaties", made["digest"]).binding


def test_a_treaty_is_shown_in_plain_words_with_the_charters_verdict(homes):
    said("propose", homes / "treaty.toml", "--home", homes / "federation")
    copy = copied(homes, "north")
    shown = CliRunner().invoke(app, ["show", str(copy), "--home", str(homes / "north")]).stdout
    for words in ("a LoRA adapter of rank 4 of tiny:llama", "What leaves a silo", "No privacy guarantee", "permits it",
                  "west, key", "not signed yet", "could name silos of its own",
                  "from these columns of a silo's data: text"):  # fmt: skip
        assert words in shown
    (homes / "north/charter.toml").write_text(CHARTER.replace("max_rank = 8", "max_rank = 2"))
    shown = CliRunner().invoke(app, ["show", str(copy), "--home", str(homes / "north")]).stdout
    assert "[adapters] max_rank allows at most 2 rank; asked: 4" in shown and "would not sign" in shown
    assert said("show", copy, "--home", homes / "federation")["charter"] is None


def test_a_treaty_that_is_shown_names_every_column_and_source_and_its_words_move_no_cursor(homes):
    hostile = (
        TREATY.replace('name = "tiny"', 'name = "tiny"\npurpose = "for \\u001b[2J\\u202eyou"')
        .replace('source = "memory"', 'source = "friends"\nauthor = "patient"\ntimestamp = "seen"')
        .replace("[silos]", '[silos]\nby = "iid"\ncount = 3')
    )
    (homes / "treaty.toml").write_text(hostile)
    said("propose", homes / "treaty.toml", "--home", homes / "federation")
    shown = CliRunner().invoke(app, ["show", str(copied(homes, "north")), "--home", str(homes / "north")]).stdout
    assert "silo's data: text, patient, seen" in shown
    assert "and from these sources beside it: friends" in shown
    assert "\x1b" not in shown and "\u202e" not in shown and "for \ufffd[2J\ufffdyou" in shown


def test_a_silo_refuses_with_the_clause_that_says_no_and_its_ledger_shows_the_attempt(homes):
    said("propose", homes / "treaty.toml", "--home", homes / "federation")
    copy, before = copied(homes, "north"), copied(homes, "north").read_bytes()
    (homes / "north/charter.toml").write_text(CHARTER.replace("max_rounds = 10", "max_rounds = 2"))
    error = said("sign", copy, "--home", homes / "north", fails=True)
    assert isinstance(error, GuaranteeError) and "[training] max_rounds" in str(error)
    (record,) = [r["body"] for r in Ledger(homes / "north/ledger.jsonl").records if r["kind"] == "refused"]
    assert record["reason"] == "charter" and record["ask"] == "sign" and "max_rounds" in record["clauses"][0]
    assert copy.read_bytes() == before and not list((homes / "north/treaties").iterdir())


def test_a_silo_signs_nothing_that_knows_it_by_another_key_or_that_its_coordinator_did_not_sign(homes):
    said("propose", homes / "treaty.toml", "--home", homes / "federation")
    copy = copied(homes, "north")
    error = said("sign", copy, "--home", homes / "south", fails=False)
    assert error["signed"] == ["south"]
    for end in ("key", "pub"):
        (homes / f"west/identity/silo.{end}").unlink()
    identity.create(homes / "west/identity", "silo")
    assert "Send your card" in str(said("sign", copy, "--home", homes / "west", fails=True))
    found = json.loads(copied(homes, "north").read_bytes())
    del found["coordinator"]["signature"]
    copy.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")
    assert "that its coordinator signed" in str(said("sign", copy, "--home", homes / "north", fails=True))


def test_a_revoked_silo_is_in_no_new_treaty(homes):
    FederationHome.at(homes / "federation").revoke("west")
    assert '"west"' in str(said("propose", homes / "treaty.toml", "--home", homes / "federation", fails=True))


def test_commands_want_the_right_home(homes):
    assert "federation.toml" in str(said("propose", homes / "treaty.toml", "--home", homes / "north", fails=True))
    said("propose", homes / "treaty.toml", "--home", homes / "federation")
    copy = copied(homes, "north")
    assert "silo.toml" in str(said("sign", copy, "--home", homes / "federation", fails=True))
    assert "Sign it first" in str(said("collect", copy, "--home", homes / "north", fails=True))
