"""The coordinator's commands: a home, silos admitted and put out, an invitation, and how the federation is."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from foedus import cli_coordinator, cli_silo
from foedus.deploy import certificates, signing
from foedus.deploy.home import FederationHome, SiloHome, read_invitation
from foedus.errors import RunError

from .deploy.federation import Federation
from .deploy.test_parties import treaty

app = typer.Typer()
app.command()(cli_coordinator.init)
app.command()(cli_coordinator.status)
app.add_typer(cli_coordinator.app, name="coordinator")
app.add_typer(cli_silo.app, name="silo")


def said(*words: object) -> str:
    """What a command prints; what it raises is raised."""
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def home(tmp_path):
    said("init", tmp_path / "federation", "--address", "127.0.0.1:9443")
    return tmp_path / "federation"


def card(folder, name="hospital-a"):
    said("silo", "init", "--name", name, "--home", folder / name)
    return folder / name / "card.json"


def test_a_federation_begins_with_keys_certificates_and_a_fingerprint_to_compare(tmp_path, home):
    made = FederationHome.at(home)
    assert made.settings.name == "federation" and made.invitation().fingerprint in said("status", "--home", home) + str(
        made.invitation().fingerprint
    )
    assert certificates.served(made.tls) == ["127.0.0.1", "localhost"]
    with pytest.raises(RunError, match="already there"):
        said("init", home)


def test_silos_are_admitted_by_their_cards_and_join_by_an_invitation(tmp_path, home):
    one, two = card(tmp_path), card(tmp_path, "hospital-b")
    spelled = json.loads(said("coordinator", "admit", one, two, "--home", home, "--json"))
    assert list(spelled) == ["hospital-a", "hospital-b"]
    (tmp_path / "invitation.json").write_text(said("coordinator", "invite", "--home", home))
    assert read_invitation(tmp_path / "invitation.json").coordinator == FederationHome.at(home).public.hex()
    told = said("silo", "join", tmp_path / "invitation.json", "--home", tmp_path / "hospital-a")
    assert FederationHome.at(home).invitation().fingerprint in told
    assert SiloHome.at(tmp_path / "hospital-a").joined == FederationHome.at(home).public


def test_a_silo_that_was_put_out_is_told_of_as_such(tmp_path, home):
    said("coordinator", "admit", card(tmp_path), "--home", home)
    said("coordinator", "revoke", "hospital-a", "--home", home)
    found = json.loads(said("status", "--home", home, "--json"))
    assert found["silos"] == {} and found["revoked"] == ["hospital-a"]
    assert "No silo is admitted yet" in said("status", "--home", home)


def test_the_servers_certificate_is_rotated_under_the_same_authority(home):
    tls = FederationHome.at(home).tls
    before = [(tls / name).read_bytes() for name in ("ca.crt", "server.crt")]
    said("coordinator", "rotate", "--host", "fed.example", "--home", home)
    after = [(tls / name).read_bytes() for name in ("ca.crt", "server.crt")]
    assert before[0] == after[0] and before[1] != after[1] and certificates.served(tls) == ["fed.example"]


def test_the_status_says_what_is_missing_in_words_and_for_programs(tmp_path, home):
    said("coordinator", "admit", card(tmp_path), "--home", home)
    assert "federation: not up" in said("status", "--home", home)
    found = json.loads(said("status", "--home", home, "--json"))
    assert found["silos"]["hospital-a"]["connected"] is False and found["certificates"]["warnings"] == []


def test_the_status_says_how_many_signatures_are_here_and_who_will_be_asked_for_the_rest(tmp_path):
    parties = Federation(tmp_path)
    parties.propose(treaty(tmp_path), signers=("north",))
    assert "0 of 3 signatures are here; a run asks for those of north, east, south" in status_of(parties)
    signing.collect(parties.home, parties.silos["north"].signed())
    assert "1 of 3 signatures are here; a run asks for those of east, south" in status_of(parties)
    for name in ("east", "south"):
        parties.sign_late(name)
        signing.collect(parties.home, parties.silos[name].signed())
    assert "all signed" in status_of(parties)


def status_of(parties: Federation) -> str:
    return " ".join(said("status", "--home", parties.home.path).split())


def test_a_certificate_is_rotated_in_a_home_whose_authority_is_sealed(tmp_path, monkeypatch):
    monkeypatch.setenv("FOEDUS_KEY", "ab" * 32)
    said("init", tmp_path / "sealed", "--key", "env")
    before = (tmp_path / "sealed/tls/server.crt").read_bytes()
    said("coordinator", "rotate", "--home", tmp_path / "sealed")
    assert (tmp_path / "sealed/tls/server.crt").read_bytes() != before
