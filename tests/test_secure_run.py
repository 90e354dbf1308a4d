"""Whole runs with secure sums: exact, whoever vanishes; nothing but the sum is seen; no sum is opened twice."""

from __future__ import annotations

import base64
import json
import os
import random
import secrets
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from foedus import loop, wire
from foedus.build import Workplace, build
from foedus.engines import Ask
from foedus.errors import CohortError, GuaranteeError
from foedus.execute import begin, execute, open_session
from foedus.gather import InTheOpen, ask
from foedus.governance import RunFolder, verify
from foedus.report.privacy import stated
from foedus.secure.mail import bundle
from foedus.secure.messages import pack
from foedus.stages import chain
from foedus.stages.noise import AddNoise
from foedus.stages.words import SUM
from foedus.treaty import Treaty, load
from foedus.types import Report, Task, Total

from .conftest import write_treaty
from .test_crash import finish, processes, work  # noqa: F401

SECURE = {"secure.sums": "masked", "disclosure.holdings": False, "server.weighting": "uniform", "cohort.minimum": 3,
          "evaluation.baselines": ["base"]}  # fmt: skip
SIX = {"silos.by": "iid", "silos.count": 6, "secure.dropout": 0.3}


def secure(folder: Path, **changes) -> Treaty:
    return load(write_treaty(folder)).replace(**{**SECURE, **changes})


class InWords:
    """The survivors' integers added up in plain sight: what a secure sum must equal, bit by bit."""

    blind = True

    def __init__(self, survivors: Callable[[int], Sequence[str]] | None = None) -> None:
        self.survivors = survivors

    def gather(self, engine, kind, task, *, split=""):
        reports = [r for r in ask(engine, kind, task, split=split)
                   if self.survivors is None or r.silo in self.survivors(task.round)]  # fmt: skip
        words = sum(wire.unpack(r.payload)[0][SUM] for r in reports)
        return Total({SUM: words}, float("inf"), len(reports)), tuple(r.receipt for r in reports)


def in_plain_sight(place: Workplace, survivors=None) -> loop.State:
    """The state after all rounds of the same stages without masks."""
    stages = chain(*place.federation.stages.stages[:-1])
    rules = replace(place.federation, stages=stages, gather=None)
    engine = place.engine(rules=rules)

    class Plain(InTheOpen):
        def gather(self, engine, kind, task, *, split=""):
            return InWords(survivors).gather(engine, kind, task, split=split)

    rules = replace(rules, gather=Plain(rules.aggregator))
    *_, (state, _) = loop.run(rules, engine, loop.start(rules, place.bench.start()))
    return state


def trained(place: Workplace, engine=None) -> loop.State:
    *_, (state, _) = loop.run(
        place.federation, engine or place.engine(), loop.start(place.federation, place.bench.start())
    )
    return state


def same(one: loop.State, other: loop.State) -> bool:
    return all((one.params[name] == other.params[name]).all() for name in one.params)


class Vanishing:
    """An engine whose silos vanish: at (round, kind) those named stop answering, for so many asks or for good."""

    def __init__(self, engine, script: dict[tuple[int, str], Sequence[str]], back: int = 10**6) -> None:
        self.engine, self.script, self.back = engine, script, back
        self.gone: dict[str, int] = {}
        self.round = 0
        self.seen: list[tuple[int, str, Report]] = []

    @property
    def memory(self):
        return self.engine.memory

    def ask(self, asks: Sequence[Ask]) -> Iterator[Report]:
        if asks and asks[0].payload:
            self.round = wire.unpack_task(asks[0].payload).round
        if asks:
            self.gone |= dict.fromkeys(self.script.get((self.round, asks[0].kind), ()), self.back)
        for report in self.engine.ask([a for a in asks if not self.gone.get(a.silo)]):
            self.seen.append((self.round, asks[0].kind, report))
            yield report
        self.gone = {silo: left - 1 for silo, left in self.gone.items() if left > 1}


@pytest.mark.parametrize("word", [16, 32, 64])
def test_a_masked_run_ends_where_plain_integer_addition_does(tmp_path, word):
    place = build(secure(tmp_path, **{"secure.word": word}))
    assert same(trained(place), in_plain_sight(place))


CHOICES = {
    "FedProx": {"algorithm.name": "fedprox", "algorithm.mu": 0.1},
    "Yogi": {"server.optimizer": "yogi", "server.lr": 0.01},
    "weights": {"server.weighting": "examples", "server.max_weight": 40.0},
    "a sample of silos": {**SIX, "cohort.sampling": "fixed", "cohort.size": 4},
    "full training": {"adapter.kind": "full"},
    "example-level noise": {"privacy.unit": "example", "privacy.noise_multiplier": 1.0, "privacy.rate": 0.2,
                            "privacy.randomness": "simulated", "disclosure.loss": False},
    "noise by the server, a norm that follows": {
        "privacy.unit": "silo", "privacy.noise_multiplier": 0.1, "privacy.accept_noise": True, "privacy.quantile": 0.5,
        "privacy.randomness": "simulated", "disclosure.loss": False},
    "shares of noise": {
        **SIX, "privacy.unit": "silo", "privacy.noise_multiplier": 2.0, "privacy.accept_noise": True,
        "privacy.placement": "shared", "privacy.noise": "discrete-gaussian", "privacy.randomness": "simulated",
        "disclosure.loss": False, "cohort.minimum": 4},
}  # fmt: skip


CHOICES["shares of noise for authors"] = SHARED = {
    **SIX, "privacy.unit": "author", "data.author": "text", "privacy.noise_multiplier": 2.0, "privacy.rate": 0.3,
    "privacy.placement": "shared", "privacy.noise": "discrete-gaussian", "privacy.randomness": "simulated",
    "disclosure.loss": False, "cohort.minimum": 4, "local.steps": 1, "local.optimizer": "sgd", "local.batch": 8,
    "local.lr": 1.0, "local.momentum": 0.0}  # fmt: skip


def test_groups_are_drawn_by_what_no_party_chooses(tmp_path):
    changes = {
        "silos.by": "iid",
        "silos.count": 9,
        "secure.group_size": 4,
        "secure.dropout": 0.0,
        "secure.corrupt": 0.0,
    }
    place = build(secure(tmp_path, **changes))
    drawn = set()
    for _ in range(3):
        gather = replace(place.federation.gather)  # a session of its own
        rules = replace(place.federation, gather=gather)
        loop.one_round(rules, place.engine(), loop.start(rules, place.bench.start()))
        groups = gather._session.bond.groups
        assert sorted(map(len, groups)) == [4, 5] and sorted(sum(groups, ())) == list(place.silos)
        drawn.add(groups)
        across = gather._session.call("mixed", [groups[0][0], *groups[1][:3]])
        report = place.engine().handler.answer("deposit", groups[0][0], bundle(b"", pack(across)))
        assert "silos of one group" in report.receipt.failure
    assert len(drawn) > 1
    assert same(trained(place), in_plain_sight(place))


@pytest.mark.parametrize("choice", CHOICES)
def test_masks_change_nothing_for_any_algorithm(tmp_path, choice):
    place = build(secure(tmp_path, **CHOICES[choice]))
    assert same(trained(place), in_plain_sight(place))


PHASES = ("deposit", "train", "unmask")


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("who", [1, 2])
def test_the_sum_is_that_of_the_survivors_whenever_others_vanish(tmp_path, phase, who):
    place = build(secure(tmp_path, **SIX))
    gone = place.federation.silos[1 : 1 + who]
    when = 0 if phase == "deposit" else 1  # later deposits ride along
    engine = Vanishing(place.engine(), {(when, phase): gone})
    summed = {"deposit": 0, "train": 1, "unmask": 2}[phase]
    plain = in_plain_sight(place, lambda round: [x for x in place.silos if round < summed or x not in gone])
    assert same(trained(place, engine), plain)


def test_a_silo_that_comes_back_is_in_the_sum_again(tmp_path):
    place = build(secure(tmp_path, **SIX))
    lost = place.federation.silos[2]
    engine = Vanishing(place.engine(), {(1, "train"): [lost]}, back=2)
    plain = in_plain_sight(place, lambda round: [x for x in place.silos if round != 1 or x != lost])
    assert same(trained(place, engine), plain)


def test_too_few_survivors_end_the_round_before_anything_is_opened(tmp_path):
    place = build(secure(tmp_path, **SIX))
    engine = Vanishing(place.engine(), {(0, "train"): place.federation.silos[:4]})
    with pytest.raises(CohortError, match="did not answer"):
        trained(place, engine)
    assert all(kind != "unmask" for _, kind, _ in engine.seen)


def test_while_the_same_silos_answer_a_round_takes_two_exchanges(tmp_path):
    place = build(secure(tmp_path))
    engine = Vanishing(place.engine(), {})
    trained(place, engine)
    kinds = [list(dict.fromkeys(kind for round, kind, _ in engine.seen if round == r)) for r in range(3)]
    assert kinds[1] == kinds[2] == ["train", "unmask"]


def test_nothing_leaves_a_silo_but_the_masked_vector_and_protocol_messages_of_fixed_size(tmp_path):
    """The golden test of the wire: every field of every report, and that none of them knows the data."""
    seen = {}
    for name, changes in {"one": {}, "other": {"treaty.seed": 2}}.items():
        place = build(secure(tmp_path, **changes))
        engine = Vanishing(place.engine(), {})
        trained(place, engine)
        seen[name] = [(r, kind, report.silo, len(report.payload), len(report.mail)) for r, kind, report in engine.seen]
        for _, kind, report in engine.seen:
            assert bool(report.payload) == (kind == "train")
            assert report.receipt.disclosed == {} and not report.receipt.failure
            if kind == "train":
                tree, facts = wire.unpack(report.payload)
                assert set(tree) == {SUM} and set(facts) == {"round"}
                words = tree[SUM].view(np.uint8)
                assert np.bincount(words, minlength=256).std() < 3 * np.sqrt(len(words) / 256)
    sizes = {name: {(kind, payload, mail) for _, kind, _, payload, mail in rows} for name, rows in seen.items()}
    lengths = {kind: {mail for k, _, mail in sizes["one"] | sizes["other"] if k == kind} for kind in PHASES}
    assert all(max(found) - min(found) <= 40 for found in lengths.values())  # names of silos differ in length
    assert len({payload for kind, payload, _ in sizes["one"] | sizes["other"] if kind == "train"}) == 1


def test_a_secure_run_says_what_was_seen_and_writes_a_report(tmp_path):
    treaty = secure(tmp_path, **{"disclosure.loss": True})
    *_, last = execute(begin(treaty, tmp_path / "run"), build(treaty))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rounds = [row for row in rows if row["kind"] == "round"]
    assert all(row["loss"] > 0 and row["scaled"] == 0 for row in rounds)
    assert all("loss" not in silo for row in rounds for silo in row["silos"].values())
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    assert all(set(row["sums"]) == {"all silos"} for row in evaluations)
    assert (
        last.row["evaluation"]["federated"]["perplexity"]["micro"]
        < last.row["evaluation"]["base"]["perplexity"]["micro"]
    )
    assert (tmp_path / "run/report.html").exists()
    page = (tmp_path / "run/report.html").read_text()
    assert "All text" in page and "ean over silos" not in page  # which nobody knows
    assert not (tmp_path / "run/out-tray").exists()  # what silos gave before any mask is not left lying about


def test_masked_evaluation_sums_are_those_of_open_evaluation(tmp_path):
    rows = {}
    for name, changes in {"masked": {}, "open": {"secure.sums": "open"}}.items():
        treaty = secure(tmp_path, **changes, **{"algorithm.rounds": 1})
        *_, last = execute(begin(treaty, tmp_path / name), build(treaty))
        rows[name] = last.row["evaluation"]["base"]["perplexity"]["micro"]
    assert rows["masked"] == pytest.approx(rows["open"], rel=1e-5)


# ---- crashes ----


def opened(run: Path) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """What each silo's journal says that it helped to open."""
    return {
        file.stem: [(r["body"]["purpose"], tuple(r["body"]["survivors"])) for r in verify(file)]
        for file in (run / "journals").glob("*.jsonl")
    }


@pytest.mark.parametrize("noise", ["no noise", "shares of noise"])
def test_a_secure_run_killed_at_random_moments_opens_every_sum_once(tmp_path, processes, noise):  # noqa: F811
    changes = {**CHOICES["shares of noise"], "privacy.randomness": "system"} if noise != "no noise" else SIX
    treaty = secure(tmp_path, **changes, **{"evaluation.every": 2})
    file = tmp_path / "secure.toml"
    file.write_text(treaty.resolved())
    finish(processes, file, tmp_path / "first")  # also starts the server
    seconds = finish(processes, file, tmp_path / "whole")
    chance, kills, runs = random.Random(1), 0, 0
    while kills < 4:
        run, runs = tmp_path / f"killed-{runs}", runs + 1
        kills += killed(processes, file, run, chance, seconds)
        adapters = [(path / "adapter/adapter_model.safetensors").read_bytes() for path in (tmp_path / "whole", run)]
        assert (adapters[0] == adapters[1]) == (noise == "no noise")  # noise is drawn anew in a run, never in a round
        journals = opened(run).values()
        assert len(journals) == 6 and len({tuple(sorted(journal)) for journal in journals}) == 1
        assert all(len({purpose for purpose, _ in journal}) == len(journal) for journal in journals)
        assert [r["body"]["round"] for r in verify(run / "ledger.jsonl") if r["kind"] == "round"] == [1, 2, 3]


def killed(processes, file: Path, run: Path, chance: random.Random, seconds: float) -> int:  # noqa: F811
    """Carries a run through, killing it at random moments; returns how often."""
    kills = 0
    while True:
        process = processes.Process(target=work, args=(file, run))
        process.start()
        process.join(chance.uniform(0.0, seconds))
        if process.exitcode is not None:
            assert process.exitcode == 0
            return kills
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1


def test_a_sum_that_may_have_been_opened_is_opened_for_nobody_else(tmp_path):
    treaty = secure(tmp_path, **SIX)
    place = build(treaty)
    session = open_session(begin(treaty, tmp_path / "run"), place)
    state = loop.start(session.rules, place.bench.start())
    state, _ = loop.one_round(session.rules, session.engine, state)

    again = open_session(RunFolder.open(tmp_path / "run"), build(treaty))  # as after a crash that lost the checkpoint
    engine = Vanishing(again.engine, {(0, "train"): place.federation.silos[:1]})
    with pytest.raises(CohortError, match="would give a silo away"):
        loop.one_round(again.rules, engine, loop.start(again.rules, place.bench.start()))

    careless = open_session(RunFolder.open(tmp_path / "run"), build(treaty))
    rules = replace(careless.rules, gather=replace(careless.rules.gather, openings=None))
    engine = Vanishing(careless.engine, {(0, "train"): place.federation.silos[:1]})
    with pytest.raises(CohortError, match="opened once"):  # the silos refuse by themselves
        loop.one_round(rules, engine, loop.start(rules, place.bench.start()))

    repeated = open_session(RunFolder.open(tmp_path / "run"), build(treaty))
    once_more, _ = loop.one_round(repeated.rules, repeated.engine, loop.start(repeated.rules, place.bench.start()))
    assert same(state, once_more)


def test_a_silo_gives_nothing_else_to_a_sum_that_was_opened(tmp_path):
    treaty = secure(tmp_path, **SIX)
    place = build(treaty)
    session = open_session(begin(treaty, tmp_path / "run"), place)
    start = loop.start(session.rules, place.bench.start())
    loop.one_round(session.rules, session.engine, start)
    again = open_session(RunFolder.open(tmp_path / "run"), build(treaty))
    moved = replace(start, params={name: x + 1 for name, x in start.params.items()})
    with pytest.raises(CohortError, match="again for another update"):
        loop.one_round(again.rules, again.engine, moved)


def test_no_secret_is_in_anything_that_a_run_writes_or_sends(tmp_path):
    drawn: list[bytes] = []

    def entropy(count: int) -> bytes:
        drawn.append(secrets.token_bytes(count))
        return drawn[-1]

    treaty = secure(tmp_path, **SIX)
    place = build(treaty)
    place.sums.membership.entropy = entropy
    folder = begin(treaty, tmp_path / "run")
    session = open_session(folder, place)
    engine = Vanishing(session.engine, {(1, "train"): place.federation.silos[:1]})
    for state, _ in loop.run(session.rules, engine, loop.start(session.rules, place.bench.start())):
        folder.checkpoint("federated", state, {})
    silos = [identity.secret for identity in place.sums.circle.silos.values()]
    hidden = [x for x in drawn if len(x) == 32] + silos + [place.sums.circle.coordinator.secret]
    nonces = {wire.digest(x) for x in drawn}
    assert len(hidden) > 100 and nonces
    written = b"".join(file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file())
    said = written + repr(place).encode() + repr(session).encode()
    for secret in hidden:
        for spelled in (secret, secret.hex().encode(), base64.b64encode(secret)):
            assert spelled not in said
    sent = b"".join(report.payload + report.mail for _, kind, report in engine.seen if kind != "open")
    assert not any(secret in sent for secret in hidden)  # "open" shows what was committed to, on purpose


def test_with_shares_of_noise_every_silo_masks_with_every_other(tmp_path):
    """In a sparse graph a lying coordinator could learn the sum of fewer than carry the whole noise."""
    many = {**CHOICES["shares of noise"], "silos.count": 20, "cohort.minimum": 14}
    assert build(secure(tmp_path, **many)).sums.agreement.neighbours == 19
    apart = {key: value for key, value in many.items() if not key.startswith("privacy.")}
    assert build(secure(tmp_path, **apart)).sums.agreement.neighbours is None


@pytest.mark.parametrize("unit", ["author", "example", "silo"])
def test_shares_of_noise_are_stated_charged_and_enough(tmp_path, unit):
    changes = {**SHARED, "privacy.randomness": "system"} if unit != "silo" else {
        **CHOICES["shares of noise"], "privacy.randomness": "system"}  # fmt: skip
    if unit == "example":
        changes |= {"privacy.unit": "example", "data.author": None}
    treaty = secure(tmp_path, **changes)
    place = build(treaty)
    *_, last = execute(begin(treaty, tmp_path / "run"), place)
    promised, found = last.row["privacy"], stated(tmp_path / "run")
    assert promised["unit"] == unit and found["epsilon"] == pytest.approx(promised["epsilon"], rel=1e-6)
    words = " ".join(found["sentences"])
    assert "the coordinator and at most 1 of the silos together" in words and "at least 4 silos" in words
    assert place.privacy.terms.minimum - place.privacy.terms.colluding == 3
    charged = [r["kind"] for r in verify(tmp_path / "run/ledger.jsonl") if r["kind"] in ("charge", "round")]
    assert charged == ["charge", "round"] * 3


def test_a_round_of_fewer_than_carry_the_noise_is_never_opened(tmp_path):
    place = build(secure(tmp_path, **SHARED))
    engine = Vanishing(place.engine(), {(0, "train"): place.federation.silos[:3]})
    with pytest.raises(CohortError, match="4 silos or more"):
        trained(place, engine)
    assert all(kind != "unmask" for _, kind, _ in engine.seen)


def test_evaluation_sums_are_opened_for_one_set_of_survivors_a_round(tmp_path):
    place = build(secure(tmp_path, **SIX))
    session = open_session(begin(secure(tmp_path, **SIX), tmp_path / "run"), place)
    params = place.bench.start()
    task = Task(1, place.base.digest, params, place.federation.silos, 1)
    first, _ = session.rules.gather.gather(session.engine, "evaluate", task, split="test")
    fewer = replace(task, cohort=task.cohort[1:])
    again = replace(session.rules.gather, openings=None)  # a coordinator that does not remember
    with pytest.raises(CohortError, match="opened once"):
        again.gather(session.engine, "evaluate", fewer, split="test")
    same_again, _ = replace(session.rules.gather).gather(session.engine, "evaluate", task, split="test")
    assert (first.tensors[SUM] == same_again.tensors[SUM]).all()


def test_stages_that_hide_and_a_gathering_that_is_blind_go_together(tmp_path):
    rules = build(secure(tmp_path)).federation
    with pytest.raises(GuaranteeError, match="Give both or neither"):
        replace(rules, gather=None)
    with pytest.raises(GuaranteeError, match="Give both or neither"):
        replace(rules, stages=chain(*rules.stages.stages[:-1]))


def test_a_silo_without_its_keys_sends_nothing(tmp_path):
    place = build(secure(tmp_path))
    engine = place.engine()
    engine.handler = replace(engine.handler, membership=None)
    with pytest.raises(CohortError, match="a treaty with secure sums"):
        trained(place, engine)
    task = Task(0, place.base.digest, place.bench.start(), place.federation.silos, 1)
    with pytest.raises(GuaranteeError, match="Nothing leaves it in the clear"):
        list(ask(engine, "train", task))


@pytest.mark.parametrize("choice", ["shares of noise", "shares of noise for authors"])
def test_what_a_run_releases_carries_the_noise_that_its_plan_accounts_for(tmp_path, choice):
    place = build(secure(tmp_path, **CHOICES[choice]))
    plan, stages = place.privacy, place.federation.stages.stages
    task = Task(0, place.base.digest, place.bench.start(), place.federation.silos, 1)
    noise = next(stage for stage in stages if isinstance(stage, AddNoise))
    sums = []
    for kept in (stages, [stage for stage in stages if stage is not noise]):  # the same coins, with and without noise
        rules = replace(place.federation, stages=chain(*kept[:-1]), gather=None)
        total, _ = InWords().gather(place.engine(rules=rules), "train", task)
        sums.append(rules.stages.decode(total, task).tensors)
    added = np.concatenate([(sums[0][key] - sums[1][key]).reshape(-1) for key in sums[0]])
    bound = noise.after.bound(noise.incoming, task)
    assert bound >= plan.terms.unit_norm
    least = plan.multipliers[0] * bound * np.sqrt(6 / plan.terms.sharing)  # six silos, each with a share
    assert added.std() == pytest.approx(least, rel=0.05) and abs(added.mean()) < 4 * least / np.sqrt(added.size)
