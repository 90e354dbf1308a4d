"""Whole runs with encrypted sums: exact, whoever vanishes; the coordinator carries ciphertexts; each sum opens once."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace

import numpy as np
import pytest

from foedus import loop, wire
from foedus.build import build
from foedus.errors import CohortError, GuaranteeError, TreatyError
from foedus.estimate import estimate
from foedus.execute import begin, execute, open_session
from foedus.gather import EncryptedSums
from foedus.governance import RunFolder, verify
from foedus.secure.keys import Identity
from foedus.secure.messages import Decrypted, SumKey, pack, sign, unpack
from foedus.stages.encrypt import ENCRYPTED
from foedus.treaty import Treaty, describe, statement
from foedus.types import Report

from .test_crash import finish, processes  # noqa: F401
from .test_secure_run import CHOICES, SIX, Vanishing, in_plain_sight, killed, opened, same, secure, trained


def encrypted(folder, **changes) -> Treaty:
    return secure(folder, **{"secure.sums": "encrypted", **changes})


def holder_of(place) -> str:
    return place.federation.gather.holders[0]


class Missing(Vanishing):
    """An engine whose silos do not answer one ask: the first of its kind in a round."""

    def ask(self, asks):
        yield from super().ask(asks)
        self.script.pop((self.round, asks[0].kind), None)


# ---- exact ----


@pytest.mark.parametrize("word", [16, 32, 64])
def test_an_encrypted_run_ends_where_plain_integer_addition_does(tmp_path, word):
    place = build(encrypted(tmp_path, **{"secure.word": word}))
    assert same(trained(place), in_plain_sight(place))


@pytest.mark.parametrize("choice", [name for name in CHOICES if "shares" not in name])
def test_encryption_changes_nothing_for_any_algorithm(tmp_path, choice):
    place = build(encrypted(tmp_path, **CHOICES[choice]))
    assert same(trained(place), in_plain_sight(place))


def test_encrypted_evaluation_sums_are_those_of_open_evaluation(tmp_path):
    rows = {}
    for name, changes in {"encrypted": {}, "open": {"secure.sums": "open"}}.items():
        treaty = encrypted(tmp_path, **changes, **{"algorithm.rounds": 1})
        *_, last = execute(begin(treaty, tmp_path / name), build(treaty))
        rows[name] = [last.row["evaluation"][which]["perplexity"]["micro"] for which in ("base", "federated")]
    assert rows["encrypted"] == pytest.approx(rows["open"], rel=1e-4)


# ---- who vanishes ----


@pytest.mark.parametrize("who", [1, 2])
def test_the_sum_is_that_of_the_silos_that_came(tmp_path, who):
    place = build(encrypted(tmp_path, **SIX))
    gone = place.federation.silos[3 : 3 + who]
    engine = Vanishing(place.engine(), {(1, "train"): gone})
    plain = in_plain_sight(place, lambda round: [x for x in place.silos if round < 1 or x not in gone])
    assert same(trained(place, engine), plain)


def test_too_few_end_the_round_before_anything_is_opened(tmp_path):
    place = build(encrypted(tmp_path, **SIX))
    engine = Vanishing(place.engine(), {(0, "train"): place.federation.silos[2:]})
    with pytest.raises(CohortError, match="3 silos or more in a sum.*did not answer"):
        trained(place, engine)
    assert all(kind != "decrypt" for _, kind, _ in engine.seen)


def test_a_holder_that_lost_its_key_draws_another_and_the_silos_give_the_same_again(tmp_path):
    place = build(encrypted(tmp_path, **SIX))
    engine = Missing(place.engine(), {(1, "decrypt"): [holder_of(place)]}, back=1)
    assert same(trained(place, engine), in_plain_sight(place))
    kinds = [kind for round, kind, _ in engine.seen if round == 1]
    assert list(dict.fromkeys(kinds)) == ["train", "keys", "decrypt"] and kinds.count("train") == 12


def test_who_came_too_late_for_a_sum_that_may_have_been_opened_is_left_out_of_it(tmp_path):
    treaty = encrypted(tmp_path, **SIX)
    place = build(treaty)
    late = place.federation.silos[4]
    session = open_session(begin(treaty, tmp_path / "run"), place)
    engine = Missing(session.engine, {(0, "train"): [late], (0, "decrypt"): [holder_of(place)]}, back=1)
    start = loop.start(session.rules, place.bench.start())
    state, release = loop.one_round(session.rules, engine, start)
    assert [r.silo for r in release.receipts if r.failure] == [late]
    rules = replace(place.federation, rounds=1)
    plain = in_plain_sight(replace(place, federation=rules), lambda _: [x for x in place.silos if x != late])
    assert same(state, plain)


def test_without_the_only_holder_there_is_no_sum_and_the_error_says_who_is_gone(tmp_path):
    place = build(encrypted(tmp_path, **SIX))
    holder = holder_of(place)
    engine = Vanishing(place.engine(), {(1, "decrypt"): [holder]})
    with pytest.raises(CohortError, match=f"a key for the sums from {holder}.*{holder}: .*did not answer.*Bring"):
        trained(place, engine)
    engine = Vanishing(place.engine(), {(0, "keys"): [holder]})
    with pytest.raises(CohortError, match="a key for the sums from"):
        trained(replace(place, federation=fresh(place)), engine)
    assert not engine.seen


@pytest.mark.parametrize("kind", ["keys", "decrypt"])
def test_another_holder_takes_the_place_of_one_that_is_gone(tmp_path, kind):
    place = build(encrypted(tmp_path, **SIX, **{"secure.key_holders": 2}))
    first, second = place.federation.gather.holders
    when = 0 if kind == "keys" else 1
    engine = Vanishing(place.engine(), {(when, kind): [first]})
    state = trained(place, engine)
    plain = in_plain_sight(place, lambda round: [x for x in place.silos if round < when or x != first])
    assert same(state, plain)
    assert {report.silo for round, k, report in engine.seen if k == "decrypt" and round > when} == {second}


def test_a_run_that_stopped_without_its_holder_goes_on_when_that_is_back(tmp_path):
    treaty = encrypted(tmp_path, **SIX)
    place = build(treaty)
    session = open_session(begin(treaty, tmp_path / "run"), place)
    start = loop.start(session.rules, place.bench.start())
    with pytest.raises(CohortError):
        loop.one_round(session.rules, Vanishing(session.engine, {(0, "decrypt"): [holder_of(place)]}), start)
    again = open_session(RunFolder.open(tmp_path / "run"), build(treaty))
    state, _ = loop.one_round(again.rules, again.engine, start)
    plain, _ = loop.one_round(place.federation, place.engine(), start)
    assert same(state, plain)


# ---- what is seen ----


def test_nothing_leaves_a_silo_but_ciphertexts_a_signed_key_and_the_sum(tmp_path):
    """The golden test of the wire: every field of every report, and that none of them knows the data."""
    sizes = set()
    for seed in (1, 2):
        place = build(encrypted(tmp_path, **{"treaty.seed": seed}))
        engine = Vanishing(place.engine(), {})
        trained(place, engine)
        for _, kind, report in engine.seen:
            assert report.receipt.disclosed == {} and not report.receipt.failure
            sizes.add((kind, len(report.payload), len(report.mail)))
            if kind == "train":
                tree, facts = wire.unpack(report.payload)
                assert set(tree) == {ENCRYPTED} and set(facts) == {"round"} and not report.mail
                seen = tree[ENCRYPTED]
                assert np.bincount(seen, minlength=256).std() < 3 * np.sqrt(len(seen) / 256) + 8  # and a short header
            else:
                assert not report.payload and report.silo == holder_of(place)
                unpack({"keys": SumKey, "decrypt": Decrypted}[kind], report.mail)
    assert len(sizes) == 3


def test_the_estimate_counts_the_bytes_of_ciphertexts(tmp_path):
    place = build(encrypted(tmp_path))
    engine = Vanishing(place.engine(), {})
    trained(place, engine)
    sent = {len(report.payload) for _, kind, report in engine.seen if kind == "train"}
    assert sent == {estimate(place).bytes_up}


def test_while_a_session_goes_on_a_round_takes_two_exchanges_and_the_second_is_with_one_silo(tmp_path):
    place = build(encrypted(tmp_path))
    engine = Vanishing(place.engine(), {})
    trained(place, engine)
    kinds = [[kind for round, kind, _ in engine.seen if round == r] for r in range(3)]
    assert kinds == [["keys", *["train"] * 3, "decrypt"], *[[*["train"] * 3, "decrypt"]] * 2]


def test_an_encrypted_run_says_who_holds_the_key_and_writes_a_report(tmp_path):
    treaty = encrypted(tmp_path, **{"disclosure.loss": True})
    *_, last = execute(begin(treaty, tmp_path / "run"), build(treaty))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rounds = [row for row in rows if row["kind"] == "round"]
    assert all(row["loss"] > 0 and row["scaled"] == 0 for row in rounds)
    assert all(set(row["sums"]) == {"all silos"} for row in rows if row["kind"] == "evaluation")
    assert any(line.startswith("from the first silo by name: public keys") for line in describe(treaty))
    assert "do not collude" in statement(treaty) and "do not collude" in last.row["privacy"]["statement"]
    assert (tmp_path / "run/report.html").exists() and not (tmp_path / "run/out-tray").exists()


def test_no_secret_key_is_in_anything_that_a_run_writes_or_sends(tmp_path):
    treaty = encrypted(tmp_path)
    place = build(treaty)
    folder = begin(treaty, tmp_path / "run")
    session = open_session(folder, place)
    engine = Missing(session.engine, {(1, "decrypt"): [holder_of(place)]}, back=1)
    for state, _ in loop.run(session.rules, engine, loop.start(session.rules, place.bench.start())):
        folder.checkpoint("federated", state, {})
    secret = place.sums.membership._drawn[holder_of(place)].key._secret.to_string()
    part = secret[len(secret) // 2 :][:64]
    written = b"".join(file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file())
    sent = b"".join(report.payload + report.mail for _, _, report in engine.seen)
    assert part not in written + sent + repr(place).encode() + repr(session).encode()


# ---- whose key ----


class Between:
    """An engine that is the coordinator's, and changes the holder's key on its way."""

    def __init__(self, engine, change) -> None:
        self.engine, self.change, self.memory, self.left = engine, change, engine.memory, []

    def ask(self, asks):
        if asks and asks[0].kind == "train":
            asks = [replace(one, mail=pack(self.change(unpack(SumKey, one.mail)))) for one in asks]
        for report in self.engine.ask(asks):
            if asks[0].kind == "train":
                self.left.append(report.payload)
            yield report


def test_silos_encrypt_under_no_key_that_somebody_else_signed_or_that_is_for_another_session(tmp_path):
    place = build(encrypted(tmp_path))
    other = trained_session(place)
    mallory = Identity.fresh()
    changes = [
        lambda key: sign(key, mallory),
        lambda key: sign(key, place.sums.circle.coordinator),
        lambda key: replace(other, invitation=key.invitation),
        lambda key: replace(key, key=other.key),
    ]
    for change in changes:
        engine = Between(place.engine(), change)
        with pytest.raises(CohortError, match="a forged one, or one for another session"):
            loop.one_round(fresh(place), engine, loop.start(place.federation, place.bench.start()))
        assert engine.left and not any(engine.left)


def fresh(place) -> loop.Federation:
    """The rules, with a session of their own."""
    return replace(place.federation, gather=replace(place.federation.gather))


def trained_session(place) -> SumKey:
    """The key of a session that is over."""
    rules = fresh(place)
    loop.one_round(rules, place.engine(), loop.start(rules, place.bench.start()))
    return rules.gather._session.offer


# ---- crashes ----


def test_a_sum_that_may_have_been_opened_is_opened_for_nobody_else(tmp_path):
    treaty = encrypted(tmp_path, **SIX)
    place = build(treaty)
    last = place.federation.silos[-1:]
    session = open_session(begin(treaty, tmp_path / "run"), place)
    start = loop.start(session.rules, place.bench.start())
    state, _ = loop.one_round(session.rules, session.engine, start)

    again = open_session(RunFolder.open(tmp_path / "run"), build(treaty))  # as after a crash that lost the checkpoint
    with pytest.raises(CohortError, match="would give a silo away"):
        loop.one_round(again.rules, Vanishing(again.engine, {(0, "train"): last}), start)

    careless = open_session(RunFolder.open(tmp_path / "run"), build(treaty))
    rules = replace(careless.rules, gather=replace(careless.rules.gather, openings=None))
    with pytest.raises(CohortError, match="opened once"):  # the holder refuses by itself
        loop.one_round(rules, Vanishing(careless.engine, {(0, "train"): last}), start)

    repeated = open_session(RunFolder.open(tmp_path / "run"), build(treaty))
    once_more, _ = loop.one_round(repeated.rules, repeated.engine, start)
    assert same(state, once_more)


def test_a_silo_gives_nothing_else_to_a_sum_that_it_gave_to(tmp_path):
    treaty = encrypted(tmp_path, **SIX)
    place = build(treaty)
    session = open_session(begin(treaty, tmp_path / "run"), place)
    start = loop.start(session.rules, place.bench.start())
    with pytest.raises(CohortError):  # given, and never opened
        loop.one_round(session.rules, Vanishing(session.engine, {(0, "decrypt"): [holder_of(place)]}), start)
    again = open_session(RunFolder.open(tmp_path / "run"), build(treaty))
    moved = replace(start, params={name: x + 1 for name, x in start.params.items()})
    with pytest.raises(CohortError, match="again for another update"):
        loop.one_round(again.rules, again.engine, moved)


def test_an_encrypted_run_killed_at_random_moments_opens_every_sum_once(tmp_path, processes):  # noqa: F811
    treaty = encrypted(tmp_path, **{"evaluation.every": 3, "secure.dropout": 0.0})
    file = tmp_path / "secure.toml"
    file.write_text(treaty.resolved())
    finish(processes, file, tmp_path / "first")  # also starts the server
    seconds = finish(processes, file, tmp_path / "whole")
    chance, kills, runs = random.Random(1), 0, 0
    while kills < 3:
        run, runs = tmp_path / f"killed-{runs}", runs + 1
        kills += killed(processes, file, run, chance, seconds)
        adapters = [(path / "adapter/adapter_model.safetensors").read_bytes() for path in (tmp_path / "whole", run)]
        assert adapters[0] == adapters[1]
        journals = opened(run)
        purposes = {silo: [purpose for purpose, _ in rows] for silo, rows in journals.items()}
        assert len(journals) == 3 and all(len(set(rows)) == len(rows) for rows in purposes.values())
        sums = {silo: [x for x in rows if x.startswith("decrypt")] for silo, rows in purposes.items()}
        assert [silo for silo, rows in sums.items() if rows] == [sorted(journals)[0]]
        assert {f"decrypt train {i}" for i in range(3)} < set(sums[sorted(journals)[0]])
        assert [r["body"]["round"] for r in verify(run / "ledger.jsonl") if r["kind"] == "round"] == [1, 2, 3]


# ---- what cannot be built ----


def test_without_the_library_no_encrypted_run_is_built(tmp_path, monkeypatch):
    treaty = encrypted(tmp_path)
    monkeypatch.setitem(sys.modules, "seal", None)
    with pytest.raises(GuaranteeError, match="nothing is sent in the clear"):
        build(treaty)


@pytest.mark.parametrize(("changes", "why"), [
    ({"secure.encrypted_share": 0.5}, "no run can sum the rest under masks"),
    ({**SIX, "secure.group_size": 6, "secure.dropout": 0.1}, "one sum over all silos"),
])  # fmt: skip
def test_what_no_run_can_keep_yet_is_refused_when_it_is_built(tmp_path, changes, why):
    treaty = encrypted(tmp_path, **changes)
    with pytest.raises(GuaranteeError, match=why):
        build(treaty)


def test_approximate_sums_and_shares_of_noise_are_no_treaty_under_encryption(tmp_path):
    with pytest.raises(TreatyError, match='scheme = "bfv"'):
        encrypted(tmp_path, **{"secure.scheme": "ckks"})
    with pytest.raises(TreatyError, match='sums = "masked"'):
        encrypted(tmp_path, **CHOICES["shares of noise"])


def test_a_silos_own_process_has_no_coordinators_identity_and_gathers_nothing(tmp_path):
    place = build(encrypted(tmp_path))
    gather: EncryptedSums = replace(place.federation.gather, coordinator=place.sums.circle.chair)
    with pytest.raises(GuaranteeError, match="the identity of the coordinator"):
        loop.one_round(replace(place.federation, gather=gather), place.engine(),
                       loop.start(place.federation, place.bench.start()))  # fmt: skip


def test_garbage_from_a_silo_is_its_own_failure_and_what_comes_twice_counts_once(tmp_path):
    place = build(encrypted(tmp_path, **SIX))
    engine, (odd, twice) = place.engine(), place.federation.silos[3:5]

    class Garbling:
        memory = engine.memory

        def ask(self, asks):
            for report in engine.ask(asks):
                bad = report.silo == odd and asks[0].kind == "train"
                yield Report(odd, report.round, b"garbage", report.receipt) if bad else report
                if report.silo == twice:
                    yield report

    plain = in_plain_sight(place, lambda _: [x for x in place.silos if x != odd])
    assert same(trained(place, Garbling()), plain)


def test_the_coordinator_takes_no_key_of_another_session_or_of_another_silo(tmp_path):
    place = build(encrypted(tmp_path, **{"secure.key_holders": 2}))
    engine, old = place.engine(), trained_session(place)

    class Replaying:
        memory = engine.memory

        def ask(self, asks):
            for report in engine.ask(asks):
                yield replace(report, mail=pack(old)) if asks[0].kind == "keys" else report

    with pytest.raises(CohortError, match="a key for the sums from .*a key for something else"):
        loop.one_round(fresh(place), Replaying(), loop.start(place.federation, place.bench.start()))
