"""The registry: what is released is known by its bytes, comes into use behind checks, and goes back in one step."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import sqlalchemy as sql
from sqlalchemy.dialects import postgresql as dialect

from foedus.errors import RunError
from foedus.governance import Ledger
from foedus.governance import registry as module
from foedus.governance.registry import Registry, Rules, Stage
from foedus.privacy import accountant, events
from foedus.secure.keys import Identity

from .conftest import DELTA, make_run

BETTER, WORSE = {"a": 0.9, "b": 1.0}, {"a": 0.9, "b": 1.3}


@pytest.fixture
def runs(tmp_path):
    """Runs by what they came to: each called gives another adapter."""

    def make(weights, **facts):
        return make_run(tmp_path / "runs" / f"run-{weights}", weights, **facts)

    return make


@pytest.fixture
def two(registry, runs):
    """A registry with notes@1 in production and notes@2, a better candidate."""
    registry.register(runs(1))
    assert registry.promote("notes@1").accepted
    registry.register(runs(2, silos=BETTER))
    return registry


def stages(registry):
    return [str(version.stage) for version in registry.versions("notes")]


def failed(move):
    return [check.name for check in move.checks if check.passed is False]


def test_a_finished_run_is_registered_with_its_lineage(registry, runs):
    version = registry.register(runs(1, rounds=3))
    assert registry.version("notes@1") == version and version.stage is Stage.candidate
    assert (version.rounds, version.base, version.base_digest, version.treaty) == (
        3,
        "tiny:llama",
        "cd" * 32,
        "ab" * 32,
    )
    assert version.unit == "example" and version.delta == DELTA and version.parent is None
    assert version.epsilon == accountant.upper(events.repeat(events.gaussian(4.0), 3), DELTA)
    assert version.evaluation["bits_per_byte"]["by_silo"] == {"a": 1.0, "b": 1.2}
    assert set(version.files) == {"adapter_model.safetensors", "adapter_config.json"}


def test_the_same_adapter_is_registered_once(registry, runs):
    run = runs(1)
    assert registry.register(run) == registry.register(run) and len(registry.versions()) == 1
    assert registry.register(run, model="another").name == "another@1"


def test_the_registry_needs_no_run_folder_afterwards(registry, runs):
    import shutil

    run = runs(1)
    registry.register(run)
    shutil.rmtree(run)
    assert registry.promote("notes@1").accepted
    assert (registry.serving("notes") / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(("spoil", "why"), [
    (lambda run: (run / "summary.json").unlink(), "a run that has ended"),
    (lambda run: (run / "adapter/adapter_model.safetensors").write_bytes(b"other"), "ledger closes with"),
    (lambda run: os.truncate(run / "ledger.jsonl", 900), "cut off"),
    (lambda run: edit(run, ("treaty", "digest"), "0" * 64), "one treaty"),
    (lambda run: edit(run, ("adapter", "sha256"), "0" * 64), "ledger closes with"),
    (lambda run: edit(run, ("privacy", "epsilon"), 0.1), "states what its ledger bears out"),
    (lambda run: edit(run, ("name",), "../../etc"), "a name of a model"),
])  # fmt: skip
def test_a_run_that_its_ledger_does_not_bear_out_is_refused(registry, runs, spoil, why):
    run = runs(1)
    spoil(run)
    with pytest.raises(RunError, match=why):
        registry.register(run)
    assert registry.versions() == []


def edit(run, path, value):
    summary = json.loads((run / "summary.json").read_text())
    at = summary
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = value
    (run / "summary.json").write_text(json.dumps(summary))


def test_a_better_candidate_replaces_what_is_in_production(two):
    move = two.promote("notes@2", by="ops", why="better")
    assert move.accepted and move.replaced == 1 and stages(two) == ["retired", "production"]
    assert two.production("notes").parent == 1 and all(check.passed in (True, None) for check in move.checks)
    assert os.path.samefile(two.serving("notes"), two.folder(two.version("notes@2")))


def test_a_version_that_is_worse_at_one_silo_is_not_promoted_and_the_checks_are_kept(two, runs):
    two.register(runs(3, silos=WORSE))
    move = two.promote("notes@3", by="ops", why="the mean is better")
    assert not move.accepted and failed(move) == ["quality by silos"] and stages(two)[2] == "candidate"
    assert two.moves("notes")[-1] == move and "b: worse by 0.0833" in next(
        c.came for c in move.checks if c.passed is False
    )
    assert two.promote("notes@3", rules=Rules(worse=0.1)).accepted


def test_a_version_that_was_not_measured_where_production_was_is_not_promoted(two, runs):
    two.register(runs(3, silos={"a": 0.5}, domains={"sport": 0.5}))
    assert failed(two.promote("notes@3")) == ["quality by silos", "quality by domains"]


def test_epsilon_beyond_the_budget_is_refused_and_counts_all_versions_together(two, runs):
    each = two.version("notes@1").epsilon
    assert failed(two.promote("notes@2", rules=Rules(epsilon=each))) == ["epsilon"]
    both = accountant.upper(events.repeat(events.gaussian(4.0), 4), DELTA)
    assert two.promote("notes@2", rules=Rules(epsilon=both)).accepted


def test_a_version_without_a_guarantee_is_within_no_budget(registry, runs):
    registry.register(runs(1, noise=None))
    assert registry.version("notes@1").epsilon is None
    assert failed(registry.promote("notes@1", rules=Rules(epsilon=100))) == ["epsilon"]
    assert registry.promote("notes@1").accepted


def test_bytes_that_changed_in_the_store_are_not_promoted_rolled_back_to_or_exported(two, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        file = two.folder(two.version("notes@2")) / name
        before = file.read_bytes()
        file.write_bytes(before + b" ")
        move = two.promote("notes@2")
        assert failed(move) == ["content"] and name in move.checks[0].came
        with pytest.raises(RunError, match="the bytes of"):
            two.export("notes@2", tmp_path / "out")
        file.write_bytes(before)
    assert not (tmp_path / "out").exists()


def test_a_ledger_that_changed_since_is_not_promoted(two):
    ledger = two.store / two.version("notes@2").place / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    for spoilt in (lines[:-1], [*lines[:1], *lines[2:]], [lines[0].replace(b"abab", b"abac"), *lines[1:]]):
        ledger.write_bytes(b"".join(spoilt))
        assert failed(two.promote("notes@2")) == ["ledger"]
    ledger.unlink()
    assert failed(two.promote("notes@2")) == ["ledger"]


def test_a_ledger_must_be_signed_by_the_key_that_is_asked_for(registry, runs):
    keeper = Identity.fresh()
    registry.register(runs(1, keeper=keeper))
    assert failed(registry.promote("notes@1", rules=Rules(key=Identity.fresh().public.hex()))) == ["ledger"]
    assert registry.promote("notes@1", rules=Rules(key=keeper.public.hex())).accepted


def test_rollback_is_one_step_and_says_who_and_why(two):
    two.promote("notes@2")
    move = two.rollback("notes@1", by="ops", why="complaints")
    assert (move.kind, move.by, move.why, move.replaced) == ("rollback", "ops", "complaints", 2)
    assert stages(two) == ["production", "retired"]
    assert os.path.samefile(two.serving("notes"), two.folder(two.version("notes@1")))
    assert two.rollback("notes@2").accepted and stages(two) == ["retired", "production"]


def test_a_rollback_gives_no_epsilon_back(two):
    two.promote("notes@2")
    before = two.spent("notes", DELTA)
    two.rollback("notes@1")
    two.retire("notes@1")
    assert (
        two.spent("notes", DELTA)
        == before
        == {"example": accountant.upper(events.repeat(events.gaussian(4.0), 4), DELTA)}
    )
    assert not hasattr(two, "delete")


def test_a_version_that_went_on_from_the_same_run_counts_once(registry, tmp_path):
    registry.register(make_run(tmp_path / "one/run", 1, rounds=2, begun=0))
    registry.register(make_run(tmp_path / "two/run", 2, rounds=5, begun=0))
    assert registry.spent("notes", DELTA) == {
        "example": accountant.upper(events.repeat(events.gaussian(4.0), 5), DELTA)
    }


def test_one_cannot_roll_back_to_what_was_never_in_production(two):
    with pytest.raises(RunError, match="never was"):
        two.rollback("notes@2")
    with pytest.raises(RunError, match="is there now"):
        two.rollback("notes@1")
    with pytest.raises(RunError, match="notes@1"):
        two.rollback("notes@7")
    with pytest.raises(RunError, match="MODEL@VERSION"):
        two.rollback("notes")


def test_retiring_what_is_in_production_leaves_nothing_to_serve(two):
    two.retire("notes@1", by="ops", why="withdrawn")
    assert two.production("notes") is None and not two.serving("notes").is_symlink()
    with pytest.raises(RunError, match="a candidate"):
        two.promote("notes@1")
    with pytest.raises(RunError, match="retired"):
        two.retire("notes@1")
    assert two.rollback("notes@1").accepted


def test_the_adapter_in_production_is_exported_whole(two, tmp_path):
    out = two.export("notes", tmp_path / "served")
    assert {path.name for path in out.iterdir()} == set(two.version("notes@1").files)
    with pytest.raises(RunError, match="no file or folder"):
        two.export("notes", out)


def test_two_promoters_at_once_leave_one_version_in_production_and_a_record_of_both(database, registry, runs, tmp_path):
    for weights in range(6):
        registry.register(runs(weights))

    def promote(number):
        own = Registry(database, tmp_path / "store")
        try:
            return own.promote(f"notes@{number}")
        finally:
            own.close()

    with ThreadPoolExecutor(6) as pool:
        moves = list(pool.map(promote, range(1, 7)))
    assert all(move.accepted for move in moves) and len({move.number for move in moves}) == 6
    assert sorted(stages(registry)) == ["production"] + ["retired"] * 5
    assert sorted(move.replaced or 0 for move in moves) != [0] * 6
    chain = {move.version: move.replaced for move in moves}
    assert len(set(chain.values())) == 6  # each replaced another: they went one after the other
    assert os.path.samefile(registry.serving("notes"), registry.folder(registry.production("notes")))


def test_two_registrars_of_one_run_agree_on_its_version(database, registry, runs, tmp_path):
    run = runs(1)

    def register(_):
        own = Registry(database, tmp_path / "store")
        try:
            return own.register(run).name
        finally:
            own.close()

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(register, range(4))) == {"notes@1"}


def test_the_database_itself_allows_one_version_in_production(two):
    with pytest.raises(sql.exc.IntegrityError), two._writing() as connection:
        connection.execute(sql.update(module._VERSIONS).values(stage="production"))
    assert stages(two) == ["production", "candidate"]


def test_a_crash_before_the_commit_changes_nothing(two, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_record", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        two.promote("notes@2")
    assert stages(two) == ["production", "candidate"] and two.promote("notes@2").accepted


def test_a_crash_after_the_commit_is_mended_when_the_registry_is_opened_next(database, two, tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "federation.jsonl")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Registry, "mend", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        two.promote("notes@2")
    assert os.path.samefile(two.serving("notes"), two.folder(two.version("notes@1")))
    Registry(database, tmp_path / "store", ledger).close()
    assert os.path.samefile(two.serving("notes"), two.folder(two.version("notes@2")))
    noted = [(r["body"]["kind"], r["body"]["version"], r["body"]["accepted"]) for r in ledger.records]
    assert noted == [("register", 1, True), ("promote", 1, True), ("register", 2, True), ("promote", 2, True)]
    Registry(database, tmp_path / "store", ledger).close()
    assert len(ledger.records) == 4 and "ops" not in (tmp_path / "federation.jsonl").read_text()


def test_moves_stay_in_a_ledger_that_is_pruned_and_are_not_told_twice(database, two, tmp_path):
    ledger = Ledger(tmp_path / "federation.jsonl", Identity.fresh())
    Registry(database, tmp_path / "store", ledger).close()
    before = ledger.head
    assert ledger.prune(keep=0) == 0
    Registry(database, tmp_path / "store", ledger).close()
    assert ledger.head == before


def test_a_process_killed_while_it_promotes_leaves_the_registry_whole(database, two, tmp_path):
    code = (
        "import os, sys, pathlib\n"
        "from foedus.governance import registry as module\n"
        "real = module._stage\n"
        "def dies(connection, version, stage):\n"
        "    real(connection, version, stage)\n"
        "    if stage == 'production':\n"
        "        os.kill(os.getpid(), 9)\n"
        "module._stage = dies\n"
        "module.Registry(sys.argv[1], pathlib.Path(sys.argv[2])).promote('notes@2')\n"
    )
    died = subprocess.run([sys.executable, "-c", code, database, str(tmp_path / "store")], capture_output=True)
    assert died.returncode == -9, died.stderr
    assert stages(two) == ["production", "candidate"] and two.promote("notes@2").accepted


def test_a_newer_registry_and_a_database_that_is_away_are_said(database, registry, tmp_path):
    with registry._writing() as connection:
        connection.execute(sql.update(module._FORMAT).values(format=2))
    with pytest.raises(RunError, match="format 1.*format 2"):
        Registry(database, tmp_path / "store")


def test_a_password_is_never_shown(tmp_path):
    with pytest.raises(RunError, match="a database that answers") as error:
        Registry("postgresql://ops:hunter2@127.0.0.1:1/foedus", tmp_path)
    assert "hunter2" not in str(error.value)
    with pytest.raises(RunError, match="sqlite or postgresql"):
        Registry("mysql://root@localhost/x", tmp_path)


def test_what_a_promotion_asks_is_checked():
    with pytest.raises(RunError, match="worse"):
        Rules(worse=-1)
    with pytest.raises(RunError):
        replace(Rules(), epsilon=0.0)


def test_the_statements_are_postgresqls_too():
    """Where no server can start, at least its dialect takes what is written."""
    index = str(sql.schema.CreateIndex(module._PRODUCTION).compile(dialect=dialect.dialect()))
    assert index.startswith("CREATE UNIQUE INDEX one_in_production") and "WHERE stage = 'production'" in index
    for table in module._METADATA.sorted_tables:
        assert "CREATE TABLE" in str(sql.schema.CreateTable(table).compile(dialect=dialect.dialect()))
