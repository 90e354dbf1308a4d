"""`foedus audit`: what it finds in a sound run, an unprotected one, and one with a bug; and what it never does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from foedus import auditing
from foedus.audit import mechanisms
from foedus.audit.canaries import WRONG
from foedus.auditing import Subject, audit, finished, verdict_of
from foedus.build import build
from foedus.errors import RunError
from foedus.execute import begin, execute, treaty_of
from foedus.governance import RunFolder
from foedus.privacy import mechanisms as released
from foedus.privacy.noise import SimulatedSource
from foedus.privacy.plan import Terms, make_plan
from foedus.privacy.steps import PrivateSteps
from foedus.server.samplers import SecretPoisson
from foedus.stages import noise as stage
from foedus.wire import digest

from .conftest import rows
from .test_private_run import EXAMPLE, called, private

SHAPES = {"first": (40, 50), "second": (60, 50), "third": (9,)}
WHOLE = {"unit": "silo", "delta": 1e-5, "rounds": 3, "silos": 10, "expected": 10.0, "epsilon": 20.0}
INSIDE = {"unit": "example", "delta": 1e-5, "rounds": 3, "steps": 4, "rate": 0.3, "divisor": 8.0,
          "noise_multiplier": 1.0}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def few():
    """Fewer of everything, for speed."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"SHADOWS": 4, "DOCUMENTS": 24, "TEXTS": 24, "CANARIES": 300}.items():
            patch.setattr(auditing, name, value)
        yield


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Private runs with and without sampling, and one without protection, each of a tiny model."""
    folders = {}
    unsampled = {**EXAMPLE, "privacy.rate": 1.0, "privacy.noise_multiplier": 4.0}
    for name, changes in {"private": EXAMPLE, "plain": {"local.batch": 8}, "unsampled": unsampled}.items():
        path = tmp_path_factory.mktemp(name)
        folders[name] = begin(private(path, **changes, **{"algorithm.rounds": 2}), path / "run")
        list(execute(folders[name], build(treaty_of(folders[name]))))
    return folders


@pytest.fixture(scope="module")
def places(ran):
    return {name: build(treaty_of(folder)) for name, folder in ran.items()}


def contents(folder: RunFolder) -> dict[str, str]:
    """What is in a run's folder, but for its audit."""
    files = [file for file in folder.path.rglob("*") if file.is_file() and not file.name.startswith("audit.")]
    return {str(file): digest(file.read_bytes()) for file in files}


def subject(ran, places, name: str = "private") -> Subject:
    return Subject(places[name], *finished(ran[name]))


def shingles(length: int = 4) -> set[str]:
    """Every few words in a row of the run's own texts."""
    texts = [row["text"].split() for row in rows()]
    return {" ".join(words[i : i + length]) for words in texts for i in range(len(words) - length + 1)}


@pytest.fixture(scope="module")
def audited(few, ran, places) -> dict:
    """The audit of the private run; its folder must be as it was before."""
    before = contents(ran["private"])
    found = audit(ran["private"], places["private"])
    assert contents(ran["private"]) == before
    return found


def test_an_audit_of_a_sound_private_run_contradicts_nothing_that_it_states(audited):
    assert verdict_of(audited)[0] == "consistent", verdict_of(audited)
    sections = {"checks", "membership", "canaries", "inversion", "extraction", "reconstruction"}
    assert sections <= audited.keys()
    assert len(audited["checks"]) >= 13 and all(check["passed"] for check in audited["checks"])
    bounds = audited["canaries"]["bounds"]
    assert {bound["canaries"] for bound in bounds} == {"gradient", "input"}
    assert all(bound["epsilon"] <= audited["stated"]["epsilon"] for bound in bounds if not bound["estimate"])
    assert {attack["name"] for attack in audited["membership"]["attacks"]} >= {"loss", "reference", "lira", "base"}
    assert all(row["bound"] >= row["prior"] for row in audited["reconstruction"]["bounds"])


def test_an_audit_shows_no_text_of_a_silo(ran, audited):
    for name in ("audit.json", "audit.html"):
        text = (ran["private"].path / name).read_text()
        assert "the patient has diabetes" in text
        assert not [words for words in shingles() if words in text], name


def test_a_run_without_protection_can_be_audited_and_states_no_guarantee(ran, capsys):
    said = called(capsys, "audit", str(ran["plain"].path))
    assert said.startswith("No guarantee.") and "audit.html" in said
    found = json.loads((ran["plain"].path / "audit.json").read_text())
    assert found["stated"]["epsilon"] is None and "checks" not in found and "reconstruction" not in found
    assert {bound["canaries"] for bound in found["canaries"]["bounds"]} == {"input"}
    assert found["inversion"]["rows"] and found["membership"]["attacks"]


def test_noise_of_half_the_size_is_called_a_violation(ran, places, monkeypatch):
    right = PrivateSteps.noise
    monkeypatch.setattr(PrivateSteps, "noise", lambda *a: {name: x / 2 for name, x in right(*a).items()})
    monkeypatch.setattr(auditing, "SECTIONS", {"checks": auditing.SECTIONS["checks"]})
    found = audit(ran["private"], places["private"])
    kind, said = verdict_of(found)
    assert kind == "violated" and "stated size" in said
    failed = [check for check in found["checks"] if not check["passed"]]
    assert len(failed) >= 2 and all(check["p"] < WRONG for check in failed)


def test_canaries_alone_refute_a_guarantee_without_noise(ran, places, monkeypatch):
    right = PrivateSteps.noise
    monkeypatch.setattr(PrivateSteps, "noise", lambda *a: {name: x * 1e-3 for name, x in right(*a).items()})
    monkeypatch.setattr(auditing, "_texts", lambda s: {})
    s = subject(ran, places, "unsampled")
    proven = [bound["epsilon"] for bound in auditing._canaries(s)["bounds"] if not bound["estimate"]]
    assert len(proven) == 3 and max(proven) > s.stated["epsilon"] > 1


def test_what_assumes_no_sampling_is_an_estimate_where_there_is_some(ran, places, monkeypatch):
    monkeypatch.setattr(auditing, "_texts", lambda s: {})
    kinds = {
        name: {b["method"] for b in auditing._canaries(subject(ran, places, name))["bounds"] if b["estimate"]}
        for name in ("private", "unsampled")
    }
    assert kinds == {"private": {"f-DP one-run", "Gaussian fit"}, "unsampled": {"Gaussian fit"}}


def test_an_unfinished_run_is_refused(tmp_path):
    folder = begin(private(tmp_path, **EXAMPLE), tmp_path / "run")
    with pytest.raises(RunError, match="foedus resume"):
        audit(folder, None)  # type: ignore[arg-type]


def test_training_with_canaries_that_was_cut_short_says_so(ran, places, monkeypatch):
    s = subject(ran, places)
    assert auditing._shortened(s)[1:] == (2, "all 4 steps")
    for most, rounds, steps, said in ((2, 1, 2, "the first 2 of 4"), (1, 1, 1, "the first 1 of 4")):
        monkeypatch.setattr(auditing, "STEPS", most)
        plan, kept, words = auditing._shortened(s)
        assert (kept, plan.steps, plan.privacy.steps) == (rounds, steps, steps) and said in words
        found = auditing._texts(s)
        assert said in found["exposure"][0]["kind"]
        assert all(bound["trained_epsilon"] < s.stated["epsilon"] for bound in found["bounds"])


def test_what_is_too_long_to_read_is_read_by_first_windows_and_that_is_said(ran, places, monkeypatch):
    s = subject(ran, places)
    twice = auditing.concat([s.split("train")] * 2)
    half = auditing.replace(twice, documents=twice.documents % (twice.documents.max() // 2 + 1))
    monkeypatch.setattr(auditing, "sample", lambda data, count, *, seed: data)
    assert len(auditing._readable(s, half)) == len(half)
    monkeypatch.setattr(auditing, "READING", 4 * s.parameters * 500)
    read = auditing._readable(s, half)
    assert len(read) == len(auditing.documents_of(read)) >= 10 and len(read.inputs.values) <= 500
    monkeypatch.setattr(Subject, "split", lambda s, *names: half)
    monkeypatch.setattr(auditing, "SHADOWS", 0)
    monkeypatch.setattr(auditing, "TINY", 0)
    assert "first window" in auditing._membership(s)["drawn"]


def test_every_canary_is_a_unit_of_its_own(ran, places):
    s = subject(ran, places)
    silo = s.fullest
    bare = auditing._with_units(silo, s.place.plan, 1, None).units
    assert np.array_equal(bare.of, silo.units.of)
    grown = auditing.replace(silo, splits={"train": auditing.concat([silo.splits["train"]] * 2)}, shards=())
    units = auditing._with_units(grown, s.place.plan, 1, silo.units).units
    assert np.array_equal(units.of[: len(silo.units.of)], silo.units.of)
    assert len(units) == 2 * len(silo.units) == len(set(units.keys.tolist()))
    assert len(units.of) == len(grown.splits["train"])


def test_what_a_guarantee_allows_counts_that_few_others_resolve_no_low_rate(ran, places):
    few, many = (auditing._allowed(subject(ran, places), others)["allowed"]["tpr"] for others in (30, 30_000))
    assert few["0.001"] > many["0.001"] and few["0.01"] > many["0.01"] > many["0.001"]


# ---- the mechanism's own checks ----


PLANS = {
    "at the server": WHOLE,
    "on a schedule": {**WHOLE, "ratio": 0.5},
    "discrete": {**WHOLE, "discrete": True},
    "correlated": {**WHOLE, "bands": 2},
    "following a quantile": {**WHOLE, "quantile": 0.5},
    "in the silo": {**WHOLE, "placement": "silo"},
    "shared, discrete": {**WHOLE, "placement": "shared", "minimum": 4, "discrete": True},
    "sampled": {**WHOLE, "rate": 0.5, "expected": 5.0},
    "in steps": INSIDE,
    "in steps on a schedule": {**INSIDE, "ratio": 2.0},
    "in steps by layers": {**INSIDE, "clipping": "factors"},
}


def checked(**terms) -> dict[str, auditing.Check]:
    plan = make_plan(Terms(**terms), SimulatedSource(3))
    random = np.random.default_rng(4)
    trial = mechanisms.tried(mechanisms.rounds_of(plan, SHAPES, 300), 300, random, plan.terms.rate, plan.terms.divisor)
    return {check.name: check for check in [*mechanisms.check_server(plan, SHAPES), *trial.checks]}


def caught(found: dict[str, auditing.Check]) -> set[str]:
    return {name for name, check in found.items() if not check.passed}


@pytest.mark.parametrize("terms", PLANS.values(), ids=PLANS)
def test_sound_mechanisms_pass(terms):
    found = checked(**terms)
    assert len(found) >= 4 and min(check.p for check in found.values()) > WRONG / 100, found


def test_gradient_canaries_come_near_what_ideal_ones_reach():
    plan = make_plan(Terms(**{**INSIDE, "rate": 1.0}), SimulatedSource(3))
    rounds = mechanisms.rounds_of(plan, SHAPES, 1000)
    found = []
    for seed in range(3):
        trial = mechanisms.tried(rounds, 1000, np.random.default_rng(seed), 1.0, 8.0)
        found.append(auditing.bound_records(trial.scores, "gradient", plan.epsilon, 1e-5))
    for alike in zip(*found, strict=True):
        assert np.mean([bound["epsilon"] for bound in alike]) >= 0.8 * alike[0]["ceiling"], alike[0]
        assert all(bound["epsilon"] <= plan.epsilon or bound["estimate"] for bound in alike)


def halved(module):
    def plant(monkeypatch) -> None:
        right = module.gaussian
        monkeypatch.setattr(module, "gaussian", lambda random, shape, std: right(random, shape, std / 2))

    return plant


def one_tensor_without(monkeypatch) -> None:
    right = released.gaussian
    monkeypatch.setattr(
        released, "gaussian", lambda random, shape, std: right(random, shape, std) * (shape != SHAPES["third"])
    )


def deaf_to_the_bound(monkeypatch) -> None:
    monkeypatch.setattr(released, "_finite", lambda total: 1.0)


def one_seed(monkeypatch) -> None:
    right = SimulatedSource.generator
    monkeypatch.setattr(SimulatedSource, "generator", lambda self, *purpose: right(self, purpose[0]))


def fixed_cohorts(monkeypatch) -> None:
    def cohort(self, silos, round, seed):
        random = np.random.default_rng(round)
        return tuple(random.choice(silos, int(self.rate * len(silos)), replace=False))

    monkeypatch.setattr(SecretPoisson, "cohort", cohort)


SIZE = "the noise has the stated size on every tensor"
BUGS = {
    "noise halved at the server": (WHOLE, halved(released), SIZE),
    "noise halved in the silo": ({**WHOLE, "placement": "silo"}, halved(stage), SIZE),
    "correlated noise halved": ({**WHOLE, "bands": 2}, halved(released), SIZE),
    "no noise on one tensor": (WHOLE, one_tensor_without, SIZE),
    "noise that ignores the bound": (WHOLE, deaf_to_the_bound, "the noise grows with the bound"),
    "a total without a bound released": (WHOLE, deaf_to_the_bound, "a total without a bound is refused"),
    "one seed for all rounds": (WHOLE, one_seed, "the noise is fresh in every step"),
    "cohorts of one size as Poisson": (
        {**WHOLE, "rate": 0.5, "expected": 5.0}, fixed_cohorts, "batches vary in size as Poisson sampling has it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_in_a_mechanism_is_caught(monkeypatch, bug):
    terms, plant, by = BUGS[bug]
    plant(monkeypatch)
    found = checked(**terms)
    assert by in caught(found) and found[by].p < WRONG, found


def test_noise_that_guarantees_nothing_is_not_checked():
    bare = {**INSIDE, "noise_multiplier": None, "noise_std": 0.1, "max_norm": None}
    plan = make_plan(Terms(**bare), SimulatedSource(3))
    assert mechanisms.rounds_of(plan, SHAPES, 300) == []
    whole = {**WHOLE, "epsilon": None, "noise_std": 0.1, "max_norm": None}
    plan = make_plan(Terms(**whole), SimulatedSource(3))
    assert mechanisms.rounds_of(plan, SHAPES, 300) == [] and mechanisms.check_server(plan, SHAPES) == []


def test_an_audit_reads_only_a_folder_that_is_a_run(tmp_path, capsys):
    import sys

    from foedus.cli import main

    sys.argv = ["foedus", "audit", str(Path(tmp_path))]
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "treaty.toml" in capsys.readouterr().err
