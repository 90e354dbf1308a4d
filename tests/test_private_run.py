"""Whole private runs: what they promise, what they write before they release, and what no crash makes them repeat."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from foedus import wire
from foedus.build import build
from foedus.cli import main
from foedus.errors import GuaranteeError
from foedus.execute import begin, execute, treaty_of
from foedus.governance import Budget, Cap, RunFolder, verify
from foedus.privacy import accountant
from foedus.report.privacy import stated
from foedus.treaty import Treaty, load

from .conftest import write_treaty
from .test_crash import processes, work  # noqa: F401

EXAMPLE = {"privacy.unit": "example", "privacy.noise_multiplier": 1.0, "privacy.rate": 0.2, "local.batch": 8}
BASELINES = {"evaluation.baselines": ["base"]}


def private(folder: Path, **changes) -> Treaty:
    treaty = load(write_treaty(folder))
    safe = {"server.weighting": "uniform", "disclosure.loss": False, "disclosure.holdings": False}
    return treaty.replace(**{**BASELINES, **safe, **changes})


def run(treaty: Treaty, folder: Path) -> dict:
    *_, last = execute(begin(treaty, folder), build(treaty))
    return dict(last.row)


UNITS = {
    "example": EXAMPLE,
    "author": {**EXAMPLE, "privacy.unit": "author", "data.author": "domain", "privacy.rate": 1.0, "privacy.rows": 4},
    "groups of examples": {
        **EXAMPLE, "privacy.unit": "author", "data.author": "text", "privacy.sampling": "examples",
        "privacy.author_examples": 2,
    },
    "schedule": {**EXAMPLE, "privacy.noise_ratio": 0.5},
    "quantile": {**EXAMPLE, "privacy.quantile": 0.5},
    "layers": {**EXAMPLE, "privacy.clipping": "layers"},
    "factors": {**EXAMPLE, "privacy.clipping": "factors", "privacy.shares": [0.3, 0.7]},
    "correlated": {**EXAMPLE, "privacy.bands": 3},
    "silo": {"privacy.unit": "silo", "privacy.epsilon": 50.0, "privacy.accept_noise": True},
    "silo, adaptive": {"privacy.unit": "silo", "privacy.epsilon": 50.0, "privacy.accept_noise": True,
                       "privacy.quantile": 0.5},
    "silo, discrete": {"privacy.unit": "silo", "privacy.epsilon": 50.0, "privacy.accept_noise": True,
                       "privacy.noise": "discrete-gaussian"},
    "silo, correlated": {"privacy.unit": "silo", "privacy.epsilon": 50.0, "privacy.accept_noise": True,
                         "privacy.bands": 2},
    "silo, own noise": {"privacy.unit": "silo", "privacy.epsilon": 50.0, "privacy.accept_noise": True,
                        "privacy.placement": "silo"},
    "silo, shares": {"privacy.unit": "silo", "privacy.epsilon": 50.0, "privacy.accept_noise": True,
                     "privacy.placement": "shared", "cohort.minimum": 3, "privacy.noise": "discrete-gaussian"},
    "silo, sampled": {"privacy.unit": "silo", "privacy.epsilon": 50.0, "privacy.accept_noise": True,
                      "cohort.sampling": "poisson", "cohort.rate": 0.5, "privacy.hide_cohort": True},
}  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
def test_every_kind_of_guarantee_runs_to_a_statement_that_its_ledger_bears_out(tmp_path, unit):
    treaty = private(tmp_path, **UNITS[unit])
    summary = run(treaty, tmp_path / "run")
    promised = summary["privacy"]
    assert promised["unit"] == treaty.privacy.unit
    assert promised["epsilon"] <= (treaty.privacy.epsilon or promised["epsilon_rdp"])
    found = stated(tmp_path / "run")
    assert found["epsilon"] == pytest.approx(promised["epsilon"], rel=1e-6)
    words = " ".join(found["sentences"])
    trust = "Trusted" if "shar" not in unit else "does not hold"
    for needed in ("epsilon = ", "delta = ", "Neighbours:", "Against:", trust):
        assert needed in words
    assert "SIMULATED" not in words and len(found["not_covered"]) >= 3
    assert not any(r["body"].get("redone") for r in verify(tmp_path / "run/ledger.jsonl"))
    html = (tmp_path / "run/report.html").read_text()
    assert "Differential privacy with epsilon" in html


def test_noise_from_a_seed_says_so_everywhere(tmp_path):
    treaty = private(tmp_path, **EXAMPLE, **{"privacy.randomness": "simulated"})
    summary = run(treaty, tmp_path / "run")
    assert summary["privacy"]["simulated_noise"]
    for name in ("report.html", "adapter/README.md"):
        assert "SIMULATED NOISE" in (tmp_path / "run" / name).read_text(), name
    assert "SIMULATED NOISE" in stated(tmp_path / "run")["sentences"][0]
    again = run(treaty, tmp_path / "again")
    assert again["adapter"]["sha256"] == summary["adapter"]["sha256"]


def test_noise_from_the_system_is_never_the_same(tmp_path):
    treaty = private(tmp_path, **EXAMPLE)
    assert run(treaty, tmp_path / "a")["adapter"]["sha256"] != run(treaty, tmp_path / "b")["adapter"]["sha256"]


def test_no_count_and_no_loss_leaves_a_silo(tmp_path):
    treaty = private(tmp_path, **EXAMPLE)
    run(treaty, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rounds = [row for row in rows if row["kind"] == "round"]
    assert all(row["loss"] is None and "examples" not in silo for row in rounds for silo in row["silos"].values())
    for tray in (tmp_path / "run/out-tray").iterdir():
        payload = wire.unpack(tray.read_bytes())[0]["payload", "bytes"].tobytes()
        tensors = wire.unpack(payload)[0]
        assert {part for part, _ in tensors} == {"delta", "weight"}
        assert float(tensors["weight", "sum"][0]) == 1.0


def test_every_silo_pays_before_it_releases(tmp_path, monkeypatch):
    from foedus.silo.handler import Handler

    right, seen = Handler._train, []

    def train(self, blob, silos, memories):
        for silo in silos:
            kinds = [r["kind"] for r in Budget(tmp_path / "run/budgets", silo.name).ledger.records]
            seen.append(kinds[-1])
        return right(self, blob, silos, memories)

    monkeypatch.setattr(Handler, "_train", train)
    run(private(tmp_path, **EXAMPLE), tmp_path / "run")
    assert set(seen) == {"charge"} and len(seen) == 9


def test_a_run_that_is_cut_off_states_the_round_that_silos_may_have_released(tmp_path, monkeypatch):
    from foedus.silo.handler import Handler

    right = Handler._train

    def train(self, blob, silos, memories):
        answers = right(self, blob, silos, memories)
        if answers[0][0].round == 1:
            raise KeyboardInterrupt
        return answers

    monkeypatch.setattr(Handler, "_train", train)
    treaty = private(tmp_path, **EXAMPLE)
    with pytest.raises(KeyboardInterrupt):
        run(treaty, tmp_path / "run")
    two = accountant.upper(build(treaty).privacy.event(2), 1e-5)
    assert stated(tmp_path / "run")["epsilon"] == pytest.approx(two, rel=1e-6)


def test_budgets_outlive_a_run_where_the_silos_keep_them(tmp_path, monkeypatch):
    monkeypatch.setenv("FOEDUS_BUDGETS", str(tmp_path / "kept"))
    first = private(tmp_path, **EXAMPLE)
    run(first, tmp_path / "one")
    one = accountant.epsilon(Budget(tmp_path / "kept", "law").spent(), 1e-5).upper
    with pytest.raises(GuaranteeError, match="has not released yet"):
        run(first, tmp_path / "same treaty again")
    run(first.replace(**{"treaty.seed": 9}), tmp_path / "two")
    assert accountant.epsilon(Budget(tmp_path / "kept", "law").spent(), 1e-5).upper > one
    Budget(tmp_path / "kept", "law").allow(Cap(one, 1e-5))
    with pytest.raises(GuaranteeError, match="over the life of silo 'law'"):
        run(first.replace(**{"treaty.seed": 10}), tmp_path / "three")
    assert not (tmp_path / "three/adapter").exists()


def test_going_back_repeats_what_was_released_and_draws_nothing_anew(tmp_path):
    summary = run(private(tmp_path, **EXAMPLE), tmp_path / "run")
    folder = RunFolder.open(tmp_path / "run")
    *_, last = execute(folder, build(treaty_of(folder)), round=2)
    assert last.row["adapter"]["sha256"] == summary["adapter"]["sha256"]
    shutil.rmtree(tmp_path / "run/out-tray")
    with pytest.raises(GuaranteeError, match="has not released yet"):
        list(execute(folder, build(treaty_of(folder)), round=2))


def test_a_hidden_cohort_is_in_no_record(tmp_path):
    run(private(tmp_path, **UNITS["silo, sampled"]), tmp_path / "run")
    for record in verify(tmp_path / "run/ledger.jsonl"):
        assert record["kind"] != "round" or record["body"]["reports"] == record["body"]["failures"] == {}
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(row["silos"] == {} for row in rows if row["kind"] == "round")


def test_few_silos_are_refused_a_guarantee_on_silos(tmp_path):
    with pytest.raises(GuaranteeError, match="examples or authors instead"):
        build(private(tmp_path, **{"privacy.unit": "silo", "privacy.epsilon": 8.0}))


def test_bare_noise_without_a_clip_says_no_guarantee(tmp_path):
    bare = {"privacy.unit": "example", "privacy.noise_std": 0.01, "privacy.max_norm": "none", "privacy.rate": 0.2}
    summary = run(private(tmp_path, **bare), tmp_path / "run")
    assert summary["privacy"]["epsilon"] is None
    assert "No guarantee" in summary["privacy"]["statement"]
    assert stated(tmp_path / "run")["epsilon"] is None


def test_modules_are_chosen_by_public_text(tmp_path):
    chosen = {**EXAMPLE, "privacy.public_text": str(tmp_path / "notes.jsonl"), "privacy.keep_modules": 0.2}
    some, whole = build(private(tmp_path, **chosen)), build(private(tmp_path, **EXAMPLE))
    assert 0 < len(some.bench.start()) <= 0.3 * len(whole.bench.start())
    assert set(some.bench.start()) < set(whole.bench.start())


# ---- crashes ----


def progress(run: Path) -> int:
    """How many records a run and its silos have written."""
    files = [run / "ledger.jsonl", *(run / "budgets").glob("*.jsonl")]
    return sum(file.read_bytes().count(b"\n") for file in files if file.exists())


@pytest.mark.parametrize("changes", [EXAMPLE, UNITS["silo, correlated"]], ids=["example", "silo"])
def test_a_private_run_killed_at_random_moments_releases_every_round_once(tmp_path, processes, changes):  # noqa: F811
    treaty = private(tmp_path, **changes)
    file = tmp_path / "private.toml"
    file.write_text(treaty.resolved())
    chance, kills, path = random.Random(1), 0, tmp_path / "killed"
    releases: dict[str, set[bytes]] = {}
    while True:
        written = progress(path)
        process = processes.Process(target=work, args=(file, path))
        process.start()
        killed_at = written + chance.randint(1, 2) if kills < 6 else 1 << 30
        while process.exitcode is None and progress(path) < killed_at:
            process.join(0.002)
        process.join(chance.uniform(0, 0.05))
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        for tray in [*(path / "out-tray").glob("[!.]*"), *path.glob("release.safetensors")]:
            tree, facts = wire.unpack(tray.read_bytes())
            facts.pop("receipt", None)
            key = f"{tray.name} {facts.get('task', facts.get('round'))}"
            releases.setdefault(key, set()).add(b"".join(x.tobytes() for _, x in sorted(tree.items())))
    assert process.exitcode == 0 and kills >= 3
    assert all(len(seen) == 1 for seen in releases.values())  # what was kept for a task never changed
    records = verify(path / "ledger.jsonl")
    assert [r["body"]["round"] for r in records if r["kind"] == "round"] == [1, 2, 3]
    assert not any(r["body"].get("redone") for r in records)
    for silo in ("medicine", "law", "sport") if "silo" not in str(changes["privacy.unit"]) else ():
        kinds = [(r["kind"], r["body"].get("round")) for r in Budget(path / "budgets", silo).ledger.records]
        assert sorted(kinds[1:]) == sorted((kind, round) for round in range(3) for kind in ("charge", "released"))


# ---- commands ----


def called(capsys, *words: str) -> str:
    import sys

    sys.argv = ["foedus", *words]
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code, capsys.readouterr().err
    return capsys.readouterr().out


def test_privacy_plan_gives_the_fields_it_promises(capsys):
    words = "privacy plan --epsilon 8 --delta 1e-5 --unit example --examples 1000 --batch 64 --rounds 20 --json".split()
    said = json.loads(called(capsys, *words))
    assert {"noise_multiplier", "sampling_rate", "steps", "epsilon", "delta", "unit", "neighbours"} <= said.keys()
    assert said["epsilon"] <= 8 and said["sampling_rate"] == 0.064 and said["steps"] == 320
    assert len(said["alternatives"]) == 5
    assert "instead" in called(capsys, *"privacy plan --epsilon 8 --unit silo --silos 10".split())
    back = called(capsys, *"privacy plan --noise-multiplier 0.989 --examples 1000 --rounds 20 --json".split())
    assert json.loads(back)["epsilon"] == pytest.approx(8.0, abs=0.05)


def test_privacy_curve_and_statement_and_budget(tmp_path, capsys):
    treaty = private(tmp_path, **EXAMPLE)
    (tmp_path / "t.toml").write_text(treaty.resolved())
    picture = tmp_path / "curve.svg"
    said = json.loads(called(capsys, "privacy", "curve", str(tmp_path / "t.toml"), "--out", str(picture), "--json"))
    assert [p["round"] for p in said["rounds"]] == [1, 2, 3] and picture.read_text().startswith("<?xml")
    run(treaty, tmp_path / "run")
    words = called(capsys, "privacy", "statement", str(tmp_path / "run"))
    assert "epsilon = " in words and "Not covered" in words
    kept = str(tmp_path / "run/budgets")
    assert "there is no cap" in called(capsys, "privacy", "budget", kept, "--silo", "law")
    said = json.loads(called(capsys, "privacy", "budget", kept, "--silo", "law", "--epsilon", "9", "--json"))
    assert said["cap"] == 9 and 0 < said["spent"] < 9


def test_noise_is_not_in_what_a_run_writes_down(tmp_path):
    """No key, no seed of noise, no bare gradient: only digests, counts and what was released."""
    run(private(tmp_path, **EXAMPLE), tmp_path / "run")
    text = (tmp_path / "run/ledger.jsonl").read_text() + (tmp_path / "run/summary.json").read_text()
    assert "AESCounter" not in text and "key" not in json.loads(text.splitlines()[0])["body"]["privacy"]["terms"]
    fields = {"index", "previous", "kind", "body", "hash"}
    assert all(set(record) == fields for record in verify(tmp_path / "run/ledger.jsonl"))
