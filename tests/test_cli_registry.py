"""`foedus registry` and `foedus rollback` on the command line, in a federation's home."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from foedus import console
from foedus.cli_registry import app, rollback
from foedus.deploy.home import FederationHome, Settings
from foedus.errors import FoedusError
from foedus.governance.ledger import verify
from foedus.secure.keys import Identity

from .governance.conftest import make_run

everything = typer.Typer()
everything.add_typer(app, name="registry")
everything.command()(rollback)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setattr(console.out, "_width", 250)


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    path = tmp_path_factory.mktemp("federation") / "notes"
    return FederationHome.create(path, Settings("notes", "127.0.0.1:9092"))


@pytest.fixture
def home(empty, tmp_path):
    """A federation's home with two runs that have ended."""
    import shutil

    shutil.copytree(empty.path, tmp_path / "notes")
    found = FederationHome.at(tmp_path / "notes")
    make_run(found.runs / "first", 1, keeper=found.identity())
    make_run(found.runs / "second", 2, silos={"a": 0.8, "b": 1.5}, keeper=found.identity())
    return found


def called(home, *words: str, code: int = 0):
    done = CliRunner().invoke(everything, [*map(str, words), "--home", str(home.path)])
    if isinstance(done.exception, FoedusError):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.stdout


def test_a_version_goes_from_a_run_to_production_and_back_out(home):
    assert "notes@1: candidate" in called(home, "registry", "register", home.runs / "first")
    said = called(home, "registry", "promote", "notes@1", "--epsilon", 8, "--by", "ops", "--why", "the first")
    assert "candidate → production, by ops (the first)" in said and said.count("passed") == 3
    called(home, "registry", "register", home.runs / "second")
    refused = called(home, "registry", "promote", "notes@2", code=1)
    assert "refused" in refused and "FAILED  quality by silos" in refused and "b: worse by 0.25" in refused
    called(home, "registry", "promote", "notes@2", "--worse", "0.3")
    back = called(home, "rollback", "notes@1", "--by", "ops", "--why", "complaints at b")
    assert "rollback: retired → production, in place of notes@2, by ops (complaints at b)" in back
    listed = json.loads(called(home, "registry", "list", "--json"))
    assert [(v["version"], v["stage"]) for v in listed] == [(1, "production"), (2, "retired")]
    assert "notes@1" in called(home, "registry", "list") and "bits per byte" not in called(
        home, "registry", "list", "x"
    )


def test_what_was_done_stands_in_the_federations_signed_ledger_without_names(home):
    called(home, "registry", "register", home.runs / "first", "--by", "Ms Operator")
    called(home, "registry", "promote", "notes@1", "--by", "Ms Operator")
    records = verify(home.ledger, key=home.public.hex())
    moves = [record["body"] for record in records if record["kind"] == "registry"]
    assert [(m["kind"], m["version"], m["accepted"]) for m in moves] == [("register", 1, True), ("promote", 1, True)]
    assert "Operator" not in home.ledger.read_text()


def test_a_run_whose_ledger_the_home_did_not_sign_is_promoted_only_by_whoever_says_who_did(home):
    make_run(home.runs / "unsigned", 3, name="simulated")
    called(home, "registry", "register", home.runs / "unsigned")
    assert "FAILED  ledger" in called(home, "registry", "promote", "simulated@1", code=1)
    called(home, "registry", "promote", "simulated@1", "--key", "any")
    stranger = Identity.fresh()
    make_run(home.runs / "strangers", 4, name="theirs", keeper=stranger)
    called(home, "registry", "register", home.runs / "strangers")
    assert "FAILED  ledger" in called(home, "registry", "promote", "theirs@1", code=1)
    called(home, "registry", "promote", "theirs@1", "--key", stranger.public.hex())


def test_show_tells_lineage_cost_and_history(home):
    called(home, "registry", "register", home.runs / "first")
    called(home, "registry", "promote", "notes@1")
    said = called(home, "registry", "show", "notes@1")
    for word in ("production", "ab" * 32, "tiny:llama", "first, 2 rounds", "for each example", "register", "promote"):
        assert word in said
    facts = json.loads(called(home, "registry", "show", "notes@1", "--json"))
    assert facts["spent"]["example"] == pytest.approx(facts["epsilon"]) and len(facts["moves"]) == 2


def test_a_version_without_a_guarantee_prints_as_json_too(home):
    make_run(home.runs / "open", 3, noise=None)
    called(home, "registry", "register", home.runs / "open", "--model", "open")
    assert json.loads(called(home, "registry", "show", "open@1", "--json"))["spent"] == {"none": None}
    assert "no bound" in called(home, "registry", "show", "open@1")


def test_the_adapter_in_production_is_exported_and_retired(home, tmp_path):
    called(home, "registry", "register", home.runs / "first")
    called(home, "registry", "promote", "notes@1")
    called(home, "registry", "export", "notes", tmp_path / "served")
    assert (tmp_path / "served/adapter_model.safetensors").is_file()
    assert "production → retired" in called(home, "registry", "retire", "notes@1", "--why", "withdrawn")
    with pytest.raises(FoedusError, match="in production"):
        called(home, "registry", "export", "notes", tmp_path / "again")


def test_an_unknown_version_suggests_the_nearest_and_a_folder_that_is_no_home_is_said(home, tmp_path):
    called(home, "registry", "register", home.runs / "first")
    with pytest.raises(FoedusError, match='Did you mean "notes@1"'):
        called(home, "rollback", "note@1")
    with pytest.raises(FoedusError, match="foedus init"):
        CliRunner().invoke(everything, ["rollback", "notes@1", "--home", str(tmp_path)], catch_exceptions=False)


def test_every_command_explains_itself():
    for words in (["registry", name] for name in typer.main.get_command(app).commands):
        assert "--json" in CliRunner().invoke(everything, [*words, "--help"]).output
